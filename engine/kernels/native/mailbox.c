/* From one rank to another: a ring of cells with one writer and one reader. */
#include "collectives.h"

#include <string.h>

int64_t isthmus_mailbox_bytes(int64_t num_cells) {
    return (int64_t)sizeof(mailbox) + num_cells * (int64_t)sizeof(cell);
}

static mailbox *mailbox_of(const group *g, int32_t from, int32_t to) {
    int64_t index = (int64_t)from * g->size + to;
    return (mailbox *)(g->mail + index * isthmus_mailbox_bytes(g->num_cells));
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
        uint32_t needed = head - (uint32_t)g->num_cells + 1;
        int answer = isthmus_rank_wait(g, to, &box->tail, needed, is_brief);
        if (answer == AGAIN) return AGAIN;
        if (answer != DONE) {
            g->step = 0;
            return answer;
        }
        cell *cell = cell_of(g, box, head);
        cell->message_bytes = (uint64_t)num_bytes;
        memcpy(cell->data, (const char *)x + g->step * CELL_BYTES,
               piece_bytes(g->step, CELL_BYTES, num_bytes));
        isthmus_rank_advance(&box->head, head + 1);
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
        int answer = isthmus_rank_wait(g, source, &box->head, tail + 1, is_brief);
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
        isthmus_rank_advance(&box->tail, tail + 1);
    }
    g->step = 0;
    return DONE;
}
