/* Exchange among the ranks of one host through a memory file that all of them map.
 *
 * Ranks of a group go in lock-step rounds. In round s each rank writes its piece into its own slot
 * (two slots a rank, taken in turn), then its `round` becomes s; whoever needs the piece waits for
 * that and copies. A rank enters round s only when all have entered s - 1, that is, are done with
 * reading s - 2, whose slots it is about to overwrite. One wait a round is therefore enough.
 *
 * Two ranks send to each other through mailboxes (mailbox.c). How a wait goes is in rank_wait.c.
 */
#include "collectives.h"

#include <stdlib.h>
#include <string.h>

enum { TWO_PHASE_BYTES = 16 * 1024 /* an all-reduce of more, by more than two, is shared out */ };

enum operation { ALL_REDUCE = 1, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, BROADCAST, BARRIER };

/* ---- rounds */

static char *slot_of(const group *g, int32_t rank, uint32_t round) {
    return g->slots + ((int64_t)rank * 2 + (round & 1)) * g->slot_bytes;
}

static int wait_for_all(group *g, uint32_t round, int is_brief) {
    for (int32_t rank = 0; rank < g->size; ++rank) {
        if (rank == g->rank) continue;
        int answer = isthmus_rank_wait(g, rank, &g->lines[rank].round, round, is_brief);
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
    isthmus_rank_advance(&own->round, g->round);
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
            if (c->source < 0 || c->source == g->rank)
                c->write(g, c, slot_of(g, g->rank, g->round + 1));
            enter(g, c->operation, c->num_bytes, c->num_steps);
            g->is_waiting = 1;
        }
        if (c->source < 0)
            answer = wait_for_all(g, g->round, is_brief);
        else if (c->source != g->rank)
            answer = isthmus_rank_wait(g, c->source, &g->lines[c->source].round, g->round,
                                       is_brief);
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
    isthmus_rank_sum(dtype, out, parts, g->size, num_bytes / isthmus_item_bytes(dtype));
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

/* ---- the group */

/* A power of two: cells are counted modulo 2^32. */
static int64_t num_cells_of(int64_t num_mail_bytes) {
    int64_t num_cells = 1;
    while (2 * num_cells * CELL_BYTES <= num_mail_bytes) num_cells *= 2;
    return num_cells;
}

EXPORT int64_t isthmus_group_bytes(int32_t size, int64_t slot_bytes, int64_t num_mail_bytes) {
    return size * ((int64_t)sizeof(rank_line) + 2 * slot_bytes) +
           (int64_t)size * size * isthmus_mailbox_bytes(num_cells_of(num_mail_bytes));
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
    g->num_cells = num_cells_of(num_mail_bytes);
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
