/* Exchange among the ranks of one host through a memory file that all of them map.
 *
 * Ranks of a group go in lock-step rounds. In round s each rank writes its piece into its own slot
 * (two slots a rank, taken in turn), then its `round` becomes s; whoever needs the piece waits for
 * that and copies. A rank enters round s only when all have entered s - 1, that is, are done with
 * reading s - 2, whose slots it is about to overwrite. One wait a round is therefore enough.
 *
 * Two ranks send to each other through mailboxes: rings of cells with one writer and one reader.
 *
 * A wait looks for a moment, then gives its core away between looks, then sleeps in the kernel, a
 * slice at a time; after each slice it looks whether the group was given up, whether the awaited rank lives and whether time is up.
 * The first to find trouble writes the verdict, which all others find in their next slice.
 */
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORT __attribute__((visibility("default")))

enum { CELL_BYTES = 64 * 1024, LINE = 64, WAIT_SLICE_MS = 10, MAX_CHAIN = 8 };
enum { YIELD_NS = 100000 /* a wait this long gives its core away at each look, then sleeps */ };
enum { TWO_PHASE_BYTES = 16 * 1024 /* an all-reduce of more, by more than two, is shared out */ };
enum { SUM_BLOCK = 2048 };

enum dtype { F32 = 0, BF16 = 1, F16 = 2, F64 = 3, I32 = 4, I64 = 5 };
enum operation { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, BROADCAST, BARRIER };
enum answer { DONE = 0, AGAIN = 1, GIVEN_UP = 2, MISMATCH = 3 };
enum verdict { DEAD = 1, TIMED_OUT = 2, ABORTED = 3, LEFT = 4 };

/* ---- what is shared; all zero at the start */

typedef struct {
    _Atomic uint32_t waiting_for; /* 1 + place of the rank that this one sleeps for, or 0 */
    _Atomic uint32_t num_slices;  /* it slept; a stopped process counts no further */
    _Atomic uint32_t has_left;
    char reason[LINE * 8 - 12]; /* why this rank called the group off; written before the verdict */
} board_place;

typedef struct {
    _Atomic uint64_t verdict; /* kind << 48 | place that says so << 32 | whom to blame */
    char pad[LINE - 8];
    board_place places[];
} board;

typedef struct {
    _Atomic uint32_t value;
    _Atomic uint32_t num_sleepers;
} counter;

typedef struct {
    counter round;
    uint32_t operation[2]; /* by parity of the round */
    uint32_t num_rounds[2];
    uint64_t num_bytes[2];
    char pad[2 * LINE - 40];
} rank_line;

typedef struct {
    counter head; /* cells written */
    char pad[LINE - 8];
    counter tail; /* cells read */
    char pad2[LINE - 8];
} mailbox;

typedef struct {
    uint64_t message_bytes;
    char pad[LINE - 8];
    char data[CELL_BYTES];
} cell;

/* ---- what is this process's own */

typedef struct {
    board *board;
    rank_line *lines;
    char *slots;
    char *mail;
    int32_t rank, size;
    int64_t slot_bytes, num_cells;
    int64_t spin_ns;
    uint32_t round; /* the last one entered */
    int is_waiting; /* a call answered AGAIN: its round is entered, not read */
    int64_t step, num_steps; /* within a call */
    int64_t timeout_ns;      /* of the call; < 0: none */
    int32_t other;           /* whom a mismatch is with */
    int32_t *places;         /* on the board, by rank */
    int32_t *pidfds;         /* by rank */
} group;

static int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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

/* ---- sums, in rank order, the same on every rank */

static inline __attribute__((always_inline)) float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline __attribute__((always_inline)) uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

static inline __attribute__((always_inline)) float from_f16(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &magnitude, 4);
    f *= 0x1p112f; /* rebias the exponent; subnormals come out right */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    bits = magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : bits;
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&f, &bits, 4);
    return f;
}

static inline __attribute__((always_inline)) uint16_t to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    float small;
    memcpy(&small, &magnitude, 4);
    small += 0.5f; /* a subnormal's bits fall out of the addition's own rounding */
    uint32_t subnormal;
    memcpy(&subnormal, &small, 4);
    subnormal -= 0x3f000000;
    uint32_t h = magnitude < 0x38800000 ? subnormal : normal;
    h = magnitude >= 0x477ff000 ? 0x7c00 : h;
    h = magnitude > 0x7f800000 ? 0x7e00 : h;
    return (uint16_t)(sign | h);
}

#define SAME(x) (x)
#define DEFINE_SUM(NAME, TYPE, WIDE, LOAD, STORE)                                            \
    static inline __attribute__((always_inline)) void NAME##_body(                           \
        TYPE *out, const TYPE *const *parts, int num_parts, int64_t count) {                 \
        WIDE total[SUM_BLOCK];                                                               \
        for (int64_t start = 0; start < count; start += SUM_BLOCK) {                         \
            int64_t n = smaller(SUM_BLOCK, count - start);                                   \
            for (int64_t i = 0; i < n; ++i) total[i] = LOAD(parts[0][start + i]);            \
            for (int r = 1; r < num_parts; ++r) {                                            \
                const TYPE *part = parts[r] + start;                                         \
                for (int64_t i = 0; i < n; ++i) total[i] += LOAD(part[i]);                   \
            }                                                                                \
            for (int64_t i = 0; i < n; ++i) out[start + i] = STORE(total[i]);                \
        }                                                                                    \
    }
DEFINE_SUM(sum_f32, float, float, SAME, SAME)
DEFINE_SUM(sum_bf16, uint16_t, float, from_bf16, to_bf16)
DEFINE_SUM(sum_f16, uint16_t, float, from_f16, to_f16)
DEFINE_SUM(sum_f64, double, double, SAME, SAME)
DEFINE_SUM(sum_i32, uint32_t, uint32_t, SAME, SAME) /* unsigned: overflow wraps, as in torch */
DEFINE_SUM(sum_i64, uint64_t, uint64_t, SAME, SAME)

#define SUM_BODY                                                                             \
    switch (dtype) {                                                                         \
    case F32: sum_f32_body(out, (const float *const *)parts, num_parts, count); break;       \
    case BF16: sum_bf16_body(out, (const uint16_t *const *)parts, num_parts, count); break;  \
    case F16: sum_f16_body(out, (const uint16_t *const *)parts, num_parts, count); break;    \
    case F64: sum_f64_body(out, (const double *const *)parts, num_parts, count); break;      \
    case I32: sum_i32_body(out, (const uint32_t *const *)parts, num_parts, count); break;    \
    case I64: sum_i64_body(out, (const uint64_t *const *)parts, num_parts, count); break;    \
    }

typedef void sum_fn(int dtype, void *out, const void *const *parts, int num_parts, int64_t count);

static void sum_portable(int dtype, void *out, const void *const *parts, int num_parts,
                         int64_t count) {
    SUM_BODY
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void sum_avx2(int dtype, void *out,
                                                     const void *const *parts, int num_parts,
                                                     int64_t count) {
    SUM_BODY
}
#endif

static sum_fn *sum = sum_portable;

__attribute__((constructor)) static void choose_sum(void) {
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1 /* xsave */)) return;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1 /* avx2 */)) return;
    uint32_t states, high;
    __asm__ volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
    if ((states & 6) == 6) sum = sum_avx2;
#endif
}

static int64_t item_bytes(int dtype) {
    static const int64_t bytes[] = {4, 2, 2, 8, 4, 8};
    return bytes[dtype];
}

/* ---- waiting */

static int has_come(const counter *counter, uint32_t target) {
    return (int32_t)(atomic_load_explicit(&counter->value, memory_order_acquire) - target) >= 0;
}

static void advance(counter *counter, uint32_t value) {
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

/* Whom to blame for a wait that took too long: not who waits for another one in turn. */
static int32_t place_to_blame(const group *g, int32_t awaited) {
    int32_t place = awaited, own = g->places[g->rank];
    for (int step = 0; step < MAX_CHAIN && place != own; ++step) {
        const board_place *it = &g->board->places[place];
        struct timespec several_slices = {0, 10 * WAIT_SLICE_MS * 1000000};
        uint32_t num_slices = atomic_load(&it->num_slices);
        nanosleep(&several_slices, NULL);
        uint32_t next = atomic_load(&it->waiting_for);
        if (next == 0 || atomic_load(&it->num_slices) == num_slices) return place;
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

/* With `is_brief` the answer may be AGAIN: the caller holds a lock that others want. */
static int wait_for(group *g, int32_t rank, counter *counter, uint32_t target, int is_brief) {
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

/* ---- rounds */

static char *slot_of(const group *g, int32_t rank, uint32_t round) {
    return g->slots + ((int64_t)rank * 2 + (round & 1)) * g->slot_bytes;
}

static int wait_for_all(group *g, uint32_t round, int is_brief) {
    for (int32_t rank = 0; rank < g->size; ++rank) {
        if (rank == g->rank) continue;
        int answer = wait_for(g, rank, &g->lines[rank].round, round, is_brief);
        if (answer != DONE) return answer;
    }
    return DONE;
}

/* The piece stands in the slot of round + 1: tell the others. */
static void enter(group *g, uint32_t operation, uint64_t num_bytes, int64_t num_rounds) {
    rank_line *own = &g->lines[g->rank];
    uint32_t parity = ++g->round & 1;
    own->operation[parity] = operation;
    own->num_bytes[parity] = num_bytes;
    own->num_rounds[parity] = (uint32_t)num_rounds;
    advance(&own->round, g->round);
}

static int is_same_call(group *g, int32_t rank, uint32_t operation, uint64_t num_bytes) {
    const rank_line *line = &g->lines[rank];
    uint32_t parity = g->round & 1;
    if (line->operation[parity] == operation && line->num_bytes[parity] == num_bytes) return 1;
    g->other = rank;
    return 0;
}

typedef struct call call;
struct call {
    uint32_t operation; /* with dtype or source: alike on all ranks */
    uint64_t num_bytes; /* alike on all ranks */
    int64_t num_steps;
    int32_t source; /* the only one that others wait for, or -1 */
    int dtype;
    const char *in;
    char *out;
    const int64_t *in_bytes, *out_bytes; /* by rank */
    void (*write)(const group *g, const call *c, char *slot);
    int (*read)(group *g, const call *c);
};

/* Goes through the steps of a call; after AGAIN the same call goes on where it was. */
static int run(group *g, const call *c, int64_t timeout_ns, int is_brief) {
    g->timeout_ns = timeout_ns;
    if (atomic_load(&g->board->verdict)) return GIVEN_UP;
    if (g->step == 0 && !g->is_waiting) g->num_steps = c->num_steps;
    int answer = DONE;
    while (g->step < g->num_steps) {
        if (!g->is_waiting) {
            if ((answer = wait_for_all(g, g->round, is_brief)) != DONE) break;
            if (c->source < 0 || c->source == g->rank) c->write(g, c, slot_of(g, g->rank, g->round + 1));
            enter(g, c->operation, c->num_bytes, c->num_steps);
            g->is_waiting = 1;
        }
        if (c->source < 0)
            answer = wait_for_all(g, g->round, is_brief);
        else if (c->source != g->rank)
            answer = wait_for(g, c->source, &g->lines[c->source].round, g->round, is_brief);
        if (answer != DONE) break;
        g->is_waiting = 0;
        for (int32_t rank = 0; rank < g->size; ++rank)
            if ((c->source < 0 || c->source == rank) &&
                !is_same_call(g, rank, c->operation, c->num_bytes))
                return MISMATCH;
        if ((answer = c->read(g, c)) != DONE) break;
        ++g->step;
    }
    if (answer != AGAIN) g->step = g->is_waiting = 0;
    return answer;
}

/* What the step covers of a part that goes `most` bytes at a time. */
static int64_t piece_bytes(int64_t step, int64_t most, int64_t part_bytes) {
    return larger(0, smaller(most, part_bytes - step * most));
}

static int64_t steps_of(int64_t most, int64_t part_bytes) { return (part_bytes + most - 1) / most; }

static int64_t longest(const group *g, const int64_t *bytes) {
    int64_t most = 0;
    for (int32_t rank = 0; rank < g->size; ++rank) most = larger(most, bytes[rank]);
    return most;
}

static int64_t total(const group *g, const int64_t *bytes) {
    int64_t all = 0;
    for (int32_t rank = 0; rank < g->size; ++rank) all += bytes[rank];
    return all;
}

/* A slot in parts, one a rank, after a table of their whole sizes. */
static int64_t part_room(const group *g) {
    return (g->slot_bytes - round_up(g->size * 8, LINE)) / g->size / LINE * LINE;
}
static int64_t part_offset(const group *g, int32_t rank) {
    return round_up(g->size * 8, LINE) + rank * part_room(g);
}

/* ---- all-reduce */

static void write_whole(const group *g, const call *c, char *slot) {
    memcpy(slot, c->in + g->step * g->slot_bytes,
           piece_bytes(g->step, g->slot_bytes, c->in_bytes[0]));
}

static void sum_slots(const group *g, int dtype, int64_t offset, char *out, int64_t num_bytes) {
    const void *parts[g->size];
    for (int32_t rank = 0; rank < g->size; ++rank)
        parts[rank] = slot_of(g, rank, g->round) + offset;
    sum(dtype, out, parts, g->size, num_bytes / item_bytes(dtype));
}

static int read_sum(group *g, const call *c) {
    sum_slots(g, c->dtype, 0, c->out + g->step * g->slot_bytes,
              piece_bytes(g->step, g->slot_bytes, c->in_bytes[0]));
    return DONE;
}

/* Every rank sums a share of each piece, then all take the shares: two steps a piece. */
static int64_t share_bytes(const group *g, int64_t piece) {
    return round_up((piece + g->size - 1) / g->size, LINE);
}

static void write_shared(const group *g, const call *c, char *slot) {
    int64_t index = g->step / 2;
    int64_t piece = piece_bytes(index, g->slot_bytes, c->in_bytes[0]);
    if (g->step % 2 == 0) {
        memcpy(slot, c->in + index * g->slot_bytes, piece);
        return;
    }
    int64_t share = share_bytes(g, piece);
    sum_slots(g, c->dtype, g->rank * share, slot, piece_bytes(g->rank, share, piece));
}

static int read_shared(group *g, const call *c) {
    if (g->step % 2 == 0) return DONE;
    int64_t index = g->step / 2;
    int64_t piece = piece_bytes(index, g->slot_bytes, c->in_bytes[0]);
    int64_t share = share_bytes(g, piece);
    for (int32_t rank = 0; rank < g->size; ++rank)
        memcpy(c->out + index * g->slot_bytes + rank * share, slot_of(g, rank, g->round),
               piece_bytes(rank, share, piece));
    return DONE;
}

EXPORT int isthmus_group_all_reduce(group *g, int dtype, void *x, int64_t num_bytes,
                                    int64_t timeout_ns, int is_brief) {
    int is_shared = g->size > 2 && num_bytes > TWO_PHASE_BYTES;
    int64_t num_pieces = steps_of(g->slot_bytes, num_bytes);
    call c = {.operation = ALL_REDUCE | (uint32_t)dtype << 8, .num_bytes = (uint64_t)num_bytes,
              .num_steps = is_shared ? 2 * num_pieces : num_pieces, .source = -1, .dtype = dtype,
              .in = x, .out = x, .in_bytes = &num_bytes,
              .write = is_shared ? write_shared : write_whole,
              .read = is_shared ? read_shared : read_sum};
    return run(g, &c, timeout_ns, is_brief);
}

/* ---- all-gather */

static void write_own(const group *g, const call *c, char *slot) {
    memcpy(slot, c->in + g->step * g->slot_bytes,
           piece_bytes(g->step, g->slot_bytes, c->out_bytes[g->rank]));
}

static int read_gathered(group *g, const call *c) {
    char *out = c->out + g->step * g->slot_bytes;
    for (int32_t rank = 0; rank < g->size; out += c->out_bytes[rank++])
        memcpy(out, slot_of(g, rank, g->round),
               piece_bytes(g->step, g->slot_bytes, c->out_bytes[rank]));
    return DONE;
}

EXPORT int isthmus_group_all_gather(group *g, const void *x, void *out, const int64_t *bytes,
                                    int64_t timeout_ns, int is_brief) {
    call c = {.operation = ALL_GATHER, .num_bytes = (uint64_t)total(g, bytes),
              .num_steps = steps_of(g->slot_bytes, longest(g, bytes)), .source = -1, .in = x,
              .out = out, .out_bytes = bytes, .write = write_own, .read = read_gathered};
    return run(g, &c, timeout_ns, is_brief);
}

/* ---- reduce-scatter and all-to-all */

static void write_parts(const group *g, const call *c, char *slot) {
    int64_t room = part_room(g);
    const char *in = c->in + g->step * room;
    memcpy(slot, c->in_bytes, g->size * 8);
    for (int32_t rank = 0; rank < g->size; in += c->in_bytes[rank++])
        memcpy(slot + part_offset(g, rank), in, piece_bytes(g->step, room, c->in_bytes[rank]));
}

static int read_scattered(group *g, const call *c) {
    int64_t room = part_room(g);
    sum_slots(g, c->dtype, part_offset(g, g->rank), c->out + g->step * room,
              piece_bytes(g->step, room, c->in_bytes[g->rank]));
    return DONE;
}

EXPORT int isthmus_group_reduce_scatter(group *g, int dtype, const void *x, void *out,
                                        const int64_t *bytes, int64_t timeout_ns, int is_brief) {
    call c = {.operation = REDUCE_SCATTER | (uint32_t)dtype << 8,
              .num_bytes = (uint64_t)total(g, bytes),
              .num_steps = steps_of(part_room(g), longest(g, bytes)), .source = -1,
              .dtype = dtype, .in = x, .out = out, .in_bytes = bytes, .write = write_parts,
              .read = read_scattered};
    return run(g, &c, timeout_ns, is_brief);
}

static int read_parts(group *g, const call *c) {
    int64_t room = part_room(g);
    char *out = c->out + g->step * room;
    for (int32_t rank = 0; rank < g->size; out += c->out_bytes[rank++]) {
        char *slot = slot_of(g, rank, g->round);
        if (((const int64_t *)slot)[g->rank] != c->out_bytes[rank]) {
            g->other = rank;
            return MISMATCH;
        }
        /* No rank knows beforehand how much the others send to each other. */
        g->num_steps = larger(g->num_steps, g->lines[rank].num_rounds[g->round & 1]);
        memcpy(out, slot + part_offset(g, g->rank), piece_bytes(g->step, room, c->out_bytes[rank]));
    }
    return DONE;
}

EXPORT int isthmus_group_all_to_all(group *g, const void *x, void *out, const int64_t *in_bytes,
                                    const int64_t *out_bytes, int64_t timeout_ns, int is_brief) {
    call c = {.operation = ALL_TO_ALL,
              .num_steps = larger(1, steps_of(part_room(g), longest(g, in_bytes))), .source = -1,
              .in = x, .out = out, .in_bytes = in_bytes, .out_bytes = out_bytes,
              .write = write_parts, .read = read_parts};
    return run(g, &c, timeout_ns, is_brief);
}

/* ---- broadcast and barrier */

static int read_broadcast(group *g, const call *c) {
    if (g->rank != c->source)
        memcpy(c->out + g->step * g->slot_bytes, slot_of(g, c->source, g->round),
               piece_bytes(g->step, g->slot_bytes, c->in_bytes[0]));
    return DONE;
}

EXPORT int isthmus_group_broadcast(group *g, void *x, int64_t num_bytes, int32_t source,
                                   int64_t timeout_ns, int is_brief) {
    call c = {.operation = BROADCAST | (uint32_t)source << 8, .num_bytes = (uint64_t)num_bytes,
              .num_steps = steps_of(g->slot_bytes, num_bytes), .source = source, .in = x, .out = x,
              .in_bytes = &num_bytes, .write = write_whole, .read = read_broadcast};
    return run(g, &c, timeout_ns, is_brief);
}

static void write_nothing(const group *g, const call *c, char *slot) {
    (void)g, (void)c, (void)slot;
}
static int read_nothing(group *g, const call *c) {
    (void)g, (void)c;
    return DONE;
}

EXPORT int isthmus_group_barrier(group *g, int64_t timeout_ns, int is_brief) {
    call c = {.operation = BARRIER, .num_steps = 1, .source = -1, .write = write_nothing,
              .read = read_nothing};
    return run(g, &c, timeout_ns, is_brief);
}

/* ---- between two */

static int64_t mailbox_bytes(int64_t num_cells) {
    return (int64_t)sizeof(mailbox) + num_cells * (int64_t)sizeof(cell);
}

static mailbox *mailbox_of(const group *g, int32_t from, int32_t to) {
    return (mailbox *)(g->mail + ((int64_t)from * g->size + to) * mailbox_bytes(g->num_cells));
}

static cell *cell_of(const group *g, mailbox *box, uint32_t index) {
    return (cell *)((char *)box + sizeof(mailbox)) + index % g->num_cells;
}

EXPORT int isthmus_group_send(group *g, const void *x, int64_t num_bytes, int32_t to,
                              int64_t timeout_ns, int is_brief) {
    mailbox *box = mailbox_of(g, g->rank, to);
    g->timeout_ns = timeout_ns;
    if (atomic_load(&g->board->verdict)) return GIVEN_UP;
    for (; g->step < steps_of(CELL_BYTES, num_bytes); ++g->step) {
        uint32_t head = atomic_load(&box->head.value);
        int answer = wait_for(g, to, &box->tail, head - (uint32_t)g->num_cells + 1, is_brief);
        if (answer == AGAIN) return AGAIN;
        if (answer != DONE) {
            g->step = 0;
            return answer;
        }
        cell *cell = cell_of(g, box, head);
        cell->message_bytes = (uint64_t)num_bytes;
        memcpy(cell->data, (const char *)x + g->step * CELL_BYTES,
               piece_bytes(g->step, CELL_BYTES, num_bytes));
        advance(&box->head, head + 1);
    }
    g->step = 0;
    return DONE;
}

EXPORT int isthmus_group_receive(group *g, void *x, int64_t num_bytes, int32_t source,
                                 int64_t timeout_ns, int is_brief) {
    mailbox *box = mailbox_of(g, source, g->rank);
    g->timeout_ns = timeout_ns;
    if (atomic_load(&g->board->verdict)) return GIVEN_UP;
    for (; g->step < steps_of(CELL_BYTES, num_bytes); ++g->step) {
        uint32_t tail = atomic_load(&box->tail.value);
        int answer = wait_for(g, source, &box->head, tail + 1, is_brief);
        if (answer == AGAIN) return AGAIN;
        const cell *cell = cell_of(g, box, tail);
        if (answer == DONE && cell->message_bytes != (uint64_t)num_bytes) {
            g->other = source;
            answer = MISMATCH;
        }
        if (answer != DONE) {
            g->step = 0;
            return answer;
        }
        memcpy((char *)x + g->step * CELL_BYTES, cell->data,
               piece_bytes(g->step, CELL_BYTES, num_bytes));
        advance(&box->tail, tail + 1);
    }
    g->step = 0;
    return DONE;
}

/* ---- the group and the board */

EXPORT int64_t isthmus_board_bytes(int32_t num_places) {
    return (int64_t)sizeof(board) + num_places * (int64_t)sizeof(board_place);
}

EXPORT int64_t isthmus_group_bytes(int32_t size, int64_t slot_bytes, int64_t num_mail_bytes) {
    return size * ((int64_t)sizeof(rank_line) + 2 * slot_bytes) +
           (int64_t)size * size * mailbox_bytes(num_mail_bytes / CELL_BYTES);
}

/* `memory` is a multiple of 64, as slot_bytes must be; pidfds[rank] is not looked at. */
EXPORT group *isthmus_group_open(void *the_board, void *memory, int32_t rank, int32_t size,
                                 int64_t slot_bytes, int64_t num_mail_bytes, int64_t spin_ns,
                                 const int32_t *places, const int32_t *pidfds) {
    group *g = calloc(1, sizeof *g + 2 * (size_t)size * sizeof(int32_t));
    if (!g) return NULL;
    char *start = memory;
    g->board = the_board;
    g->lines = memory;
    g->slots = start + size * sizeof(rank_line);
    g->mail = g->slots + 2 * size * slot_bytes;
    g->rank = rank;
    g->size = size;
    g->slot_bytes = slot_bytes;
    g->num_cells = num_mail_bytes / CELL_BYTES;
    g->spin_ns = spin_ns;
    g->places = (int32_t *)(g + 1);
    g->pidfds = g->places + size;
    memcpy(g->places, places, size * sizeof(int32_t));
    memcpy(g->pidfds, pidfds, size * sizeof(int32_t));
    return g;
}

EXPORT void isthmus_group_close(group *g) { free(g); }

/* Whom the last MISMATCH was with: rank << 32 | operation there; its bytes in *num_bytes. */
EXPORT int64_t isthmus_group_mismatch(const group *g, uint64_t *num_bytes) {
    const rank_line *line = &g->lines[g->other];
    *num_bytes = line->num_bytes[g->round & 1];
    return (int64_t)g->other << 32 | (line->operation[g->round & 1] & 0xff);
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
