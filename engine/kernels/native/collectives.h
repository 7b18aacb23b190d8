/* What the files of the collectives share. How they work is told in collectives.c. */
#ifndef ISTHMUS_COLLECTIVES_H
#define ISTHMUS_COLLECTIVES_H

#include <stdatomic.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum { CELL_BYTES = 64 * 1024, LINE = 64 };

enum answer { DONE = 0, AGAIN = 1, GIVEN_UP = 2, MISMATCH = 3 };

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

/* ---- sizes */

static inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* What the step covers of a part that goes `most` bytes at a time. */
static inline int64_t piece_bytes(int64_t step, int64_t most, int64_t part_bytes) {
    return larger(0, smaller(most, part_bytes - step * most));
}

static inline int64_t steps_of(int64_t most, int64_t part_bytes) {
    return (part_bytes + most - 1) / most;
}

/* ---- waiting (rank_wait.c) */

/* With `is_brief` the answer may be AGAIN: the caller holds a lock that others want. */
int isthmus_rank_wait(group *g, int32_t rank, counter *counter, uint32_t target, int is_brief);

/* Sets the value and wakes who waits for it. */
void isthmus_rank_advance(counter *counter, uint32_t value);

/* ---- sums (rank_sum.c) */

/* out = the sum of `parts`, in their order. */
void isthmus_rank_sum(int dtype, void *out, const void *const *parts, int num_parts, int64_t count);
int64_t isthmus_item_bytes(int dtype);

/* ---- mailboxes (mailbox.c) */

int64_t isthmus_mailbox_bytes(int64_t num_cells);

#endif
