/* Waiting for another rank, and the board on which ranks tell each other why a group is over.
 *
 * A wait looks for a moment, then gives its core away between looks, then sleeps in the kernel, a
 * slice at a time; after each slice it looks whether the group was given up, whether the awaited
 * rank lives and whether time is up. The first to find trouble writes the verdict, which all others
 * find in their next slice.
 */
#include "collectives.h"

#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { WAIT_SLICE_MS = 10, MAX_CHAIN = 8, PATIENCE_SLICES = 100 };
enum { YIELD_NS = 100000 /* a wait this long gives its core away at each look, then sleeps */ };

enum verdict { DEAD = 1, TIMED_OUT = 2, ABORTED = 3, LEFT = 4 };

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int has_come(const counter *counter, uint32_t target) {
    return (int32_t)(atomic_load_explicit(&counter->value, memory_order_acquire) - target) >= 0;
}

void isthmus_rank_advance(counter *counter, uint32_t value) {
    atomic_store(&counter->value, value); /* before the look at the sleepers */
    if (atomic_load(&counter->num_sleepers))
        syscall(SYS_futex, &counter->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void sleep_for(counter *counter, uint32_t target) {
    struct timespec slice = {0, WAIT_SLICE_MS * 1000000};
    atomic_fetch_add(&counter->num_sleepers, 1);
    uint32_t seen = atomic_load(&counter->value);
    if ((int32_t)(seen - target) < 0)
        syscall(SYS_futex, &counter->value, FUTEX_WAIT, seen, &slice, NULL, 0);
    atomic_fetch_sub(&counter->num_sleepers, 1);
}

static void give_up(group *g, int kind, int32_t place) {
    uint64_t none = 0;
    uint64_t own = (uint64_t)g->places[g->rank];
    uint64_t verdict = (uint64_t)kind << 48 | own << 32 | (uint32_t)place;
    atomic_compare_exchange_strong(&g->board->verdict, &none, verdict);
}

/* Whether a rank that says it waits still does so: a stopped process would say it for ever. */
static int is_awake(const group *g, const board_place *place) {
    uint32_t num_slices = atomic_load(&place->num_slices);
    struct timespec slice = {0, WAIT_SLICE_MS * 1000000};
    for (int turn = 0; turn < PATIENCE_SLICES && !atomic_load(&g->board->verdict); ++turn) {
        nanosleep(&slice, NULL);
        if (atomic_load(&place->num_slices) != num_slices) return 1;
    }
    return 0;
}

/* Whom to blame for a wait that took too long: not who waits for another one in turn. */
static int32_t place_to_blame(const group *g, int32_t awaited) {
    int32_t place = awaited, own = g->places[g->rank];
    for (int step = 0; step < MAX_CHAIN && place != own; ++step) {
        const board_place *it = &g->board->places[place];
        uint32_t next = atomic_load(&it->waiting_for);
        if (next == 0 || !is_awake(g, it)) return place;
        place = (int32_t)next - 1;
    }
    return awaited; /* ranks that wait for each other */
}

static int wait_long(group *g, int32_t rank, counter *counter, uint32_t target) {
    board *b = g->board;
    int64_t start = now_ns();
    int32_t place = g->places[rank];
    board_place *own = &b->places[g->places[g->rank]];
    int answer = DONE;
    atomic_store(&own->waiting_for, (uint32_t)place + 1);
    while (!has_come(counter, target)) {
        if (now_ns() - start < YIELD_NS) {
            sched_yield();
            continue;
        }
        if (atomic_load(&b->verdict)) {
            answer = GIVEN_UP;
            break;
        }
        struct pollfd exited = {g->pidfds[rank], POLLIN, 0};
        int is_dead = poll(&exited, 1, 0) > 0;
        int has_left = atomic_load(&b->places[place].has_left) != 0;
        if ((is_dead || has_left) && !has_come(counter, target)) {
            give_up(g, is_dead ? DEAD : LEFT, place);
            continue;
        }
        if (g->timeout_ns >= 0 && now_ns() - start > g->timeout_ns) {
            give_up(g, TIMED_OUT, place_to_blame(g, place));
            continue;
        }
        sleep_for(counter, target);
        atomic_fetch_add(&own->num_slices, 1);
    }
    atomic_store(&own->waiting_for, 0);
    return answer;
}

int isthmus_rank_wait(group *g, int32_t rank, counter *counter, uint32_t target, int is_brief) {
    if (has_come(counter, target)) return DONE;
    if (!is_brief) return wait_long(g, rank, counter, target);
    int64_t end = now_ns() + g->spin_ns;
    do {
        for (int turn = 0; turn < 32; ++turn) {
            relax();
            if (has_come(counter, target)) return DONE;
        }
    } while (now_ns() < end);
    return AGAIN;
}

/* ---- the board */

EXPORT int64_t isthmus_board_bytes(int32_t num_places) {
    return (int64_t)sizeof(board) + num_places * (int64_t)sizeof(board_place);
}

EXPORT uint64_t isthmus_board_verdict(const board *b) { return atomic_load(&b->verdict); }

/* `blamed` is a place, or anything with the highest bit that the callers agree on. */
EXPORT void isthmus_board_post(board *b, int32_t place, int kind, uint32_t blamed,
                               const char *reason) {
    uint64_t none = 0, verdict = (uint64_t)kind << 48 | (uint64_t)place << 32 | blamed;
    strncpy(b->places[place].reason, reason, sizeof b->places[place].reason - 1);
    atomic_compare_exchange_strong(&b->verdict, &none, verdict);
}

EXPORT const char *isthmus_board_reason(const board *b, int32_t place) {
    return b->places[place].reason;
}

EXPORT void isthmus_board_leave(board *b, int32_t place) {
    atomic_store(&b->places[place].has_left, 1);
}
