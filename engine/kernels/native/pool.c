/* A few helper threads that share one job at a time with the thread that calls.
 *
 * A helper spins for a short while after a job, because the next one follows within microseconds
 * during a forward pass, and then sleeps in the kernel, because the core belongs to another process
 * between passes.
 *
 * Each thread has a share of a job's items, the same part of the whole in every job: what a thread
 * wrote in one operation is mostly what it reads in the next, from its own cache. It takes from the
 * others' shares once its own is used up, so a thread that the scheduler has put aside costs at
 * most the items it holds.
 */
#define _GNU_SOURCE
#include "isthmus.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { MAX_HELPERS = 255, SPIN_NS = 50000, ITEM_BITS = 24 };
#define ITEM_MASK ((UINT64_C(1) << ITEM_BITS) - 1)

static struct {
    _Alignas(64) _Atomic int64_t num_done;
    _Alignas(64) _Atomic uint32_t epoch;
    _Atomic int limit;   /* helpers with a number below this may take items */
    _Atomic int num_shares;
    _Atomic int divisor; /* a take is 1 / divisor of what a share has left; 0: single items */
    chunk_fn *fn;
    const void *job;
    uint64_t generation;
    int num_helpers;
    pthread_mutex_t lock;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* generation << 48 | end << 24 | next item, for the caller and each helper. A take is a
 * compare-and-swap of the whole word, so it can only succeed for the job that it was read of. */
static struct {
    _Alignas(64) _Atomic uint64_t word;
} shares[MAX_HELPERS + 1];

/* One word a helper, 1 while it sleeps, so that only the helpers a job needs are woken. */
static struct {
    _Alignas(64) _Atomic uint32_t sleeping;
} helpers[MAX_HELPERS];

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void sleep_while_set(_Atomic uint32_t *word) {
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
#else
    sched_yield();
#endif
}

static void wake(_Atomic uint32_t *word) {
    if (!atomic_load(word) || !atomic_exchange(word, 0)) return;
#if defined(__linux__)
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
#endif
}

/* Takes and runs items of one share until none is left: its owner from the front, others from the
 * back, so that the owner's items follow one another. */
static void work_on(_Atomic uint64_t *share, int is_own) {
    uint64_t word = atomic_load_explicit(share, memory_order_acquire);
    for (;;) {
        int64_t next = (int64_t)(word & ITEM_MASK), end = (int64_t)(word >> ITEM_BITS & ITEM_MASK);
        if (next >= end) return;
        /* A stale divisor only changes the size of the take. */
        int divisor = atomic_load_explicit(&pool.divisor, memory_order_relaxed);
        int64_t take = divisor ? (end - next) / divisor : 1;
        if (take < 1) take = 1;
        uint64_t left = is_own ? word + (uint64_t)take : word - ((uint64_t)take << ITEM_BITS);
        if (!atomic_compare_exchange_weak_explicit(share, &word, left, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        if (!is_own) next = end - take;
        /* fn and job stay as they are until all items, these included, are done. */
        pool.fn(pool.job, next, next + take);
        atomic_fetch_add_explicit(&pool.num_done, take, memory_order_release);
        word = atomic_load_explicit(share, memory_order_acquire);
    }
}

/* Works on the thread's own share first. Shares of an earlier job are used up, and a stale count
 * only leaves more to the caller. */
static void work(int own) {
    int num_shares = atomic_load(&pool.num_shares);
    for (int i = 0; i < num_shares; ++i) work_on(&shares[(own + i) % num_shares].word, i == 0);
}

static int is_called(int number, uint32_t seen) {
    return atomic_load(&pool.epoch) != seen && number < atomic_load(&pool.limit);
}

/* Spins for a job, then sleeps for one. */
static void wait_for_call(int number, uint32_t seen) {
    int64_t stop_ns = now_ns() + SPIN_NS;
    for (int num_spins = 1; !is_called(number, seen); ++num_spins) {
        pause_cpu();
        if (num_spins % 64 || now_ns() < stop_ns) continue;
        atomic_store(&helpers[number].sleeping, 1);
        if (!is_called(number, seen)) /* else the caller may have looked before the store */
            while (atomic_load(&helpers[number].sleeping)) sleep_while_set(&helpers[number].sleeping);
        atomic_store(&helpers[number].sleeping, 0);
    }
}

static void *help(void *number_as_pointer) {
    int number = (int)(intptr_t)number_as_pointer;
    for (uint32_t seen = 0;;) {
        wait_for_call(number, seen);
        seen = atomic_load(&pool.epoch);
        work(number + 1);
    }
    return NULL;
}

/* Threads do not survive fork; a child starts its own when it first needs them. */
static void forget_helpers(void) {
    pool.num_helpers = 0;
    pthread_mutex_init(&pool.lock, NULL);
}

static void start_helpers(int num_wanted) {
    static int registered;
    if (!registered) {
        registered = 1;
        pthread_atfork(NULL, NULL, forget_helpers);
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the interpreter's threads */
    while (pool.num_helpers < num_wanted && pool.num_helpers < MAX_HELPERS) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, (void *)(intptr_t)pool.num_helpers)) break;
        pthread_detach(thread);
        ++pool.num_helpers;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void run_shared(chunk_fn *fn, const void *job, int64_t num_items, int num_threads,
                       int guided) {
    if (pool.num_helpers < num_threads - 1) start_helpers(num_threads - 1);
    pool.fn = fn;
    pool.job = job;
    atomic_store_explicit(&pool.divisor, guided ? 2 : 0, memory_order_relaxed);
    atomic_store_explicit(&pool.num_done, 0, memory_order_relaxed);
    atomic_store(&pool.limit, num_threads - 1);
    int num_shares = pool.num_helpers < num_threads ? pool.num_helpers + 1 : num_threads;
    atomic_store(&pool.num_shares, num_shares);
    uint64_t tag = ++pool.generation & 0xffff;
    for (int i = 0; i < num_shares; ++i) {
        uint64_t first = (uint64_t)(num_items * i / num_shares);
        uint64_t end = (uint64_t)(num_items * (i + 1) / num_shares);
        atomic_store_explicit(&shares[i].word, tag << (2 * ITEM_BITS) | end << ITEM_BITS | first,
                              memory_order_release);
    }
    atomic_fetch_add(&pool.epoch, 1);
    for (int i = 0; i < num_threads - 1 && i < pool.num_helpers; ++i) wake(&helpers[i].sleeping);
    work(0);
    for (int num_spins = 0;
         atomic_load_explicit(&pool.num_done, memory_order_acquire) < num_items; ++num_spins) {
        if (num_spins < 2000)
            pause_cpu();
        else
            sched_yield(); /* the helper that holds the last items may need this very core */
    }
}

void isthmus_run(chunk_fn *fn, const void *job, int64_t num_items, int num_threads, int guided) {
    if (num_items <= 0) return;
    if (num_threads > 1 && num_items > 1 && num_items <= (int64_t)ITEM_MASK &&
        pthread_mutex_trylock(&pool.lock) == 0) {
        run_shared(fn, job, num_items, num_threads, guided);
        pthread_mutex_unlock(&pool.lock);
        return;
    }
    fn(job, 0, num_items); /* one thread asked for, or another call has the helpers */
}

static __thread struct {
    void *memory;
    size_t bytes;
} scratch[NUM_SCRATCH];

void *isthmus_scratch(int slot, size_t bytes) {
    if (scratch[slot].bytes < bytes) {
        free(scratch[slot].memory);
        enum { PAGE = 4096, HUGE_PAGE = 2 << 20 };
        size_t page = bytes < HUGE_PAGE / 2 ? PAGE : HUGE_PAGE;
        size_t rounded = (bytes + page - 1) / page * page;
        scratch[slot].memory = aligned_alloc(page, rounded);
        if (!scratch[slot].memory) abort(); /* as the kernel would a moment later */
#if defined(__linux__)
        if (page == HUGE_PAGE) madvise(scratch[slot].memory, rounded, MADV_HUGEPAGE);
#endif
        scratch[slot].bytes = rounded;
    }
    return scratch[slot].memory;
}
