/* Linear layers on AMX tiles: bf16 operands, float32 sums. */
#if defined(__x86_64__)
#include "amx_tile.h"

enum { BLOCK_ROWS = 2 * TILE_ROWS };

/* What becomes of a block's sums. A gated layer first leaves silu(gate) beside the output, and then
 * multiplies up with it; all is rounded as the separate kernels round. */
enum task { STORE, STORE_GATE, MULTIPLY };

/* Rows of one panel whose sums are ready: the next one, and how many there are. */
typedef struct {
    enum task task;
    int64_t rows;
    const float *c;
    char *out;
    uint16_t *gates;
    int64_t out_stride_bytes, gate_stride;
    const float *bias; /* of the panel, or NULL */
    __mmask32 wanted;  /* features of the panel that exist */
    int out_f32;
} ready_rows;

/* None yet; `gates` is where a gated layer leaves silu(gate) of its first row. */
INLINE ready_rows rows_of_panel(const linear_job *job, enum task task, int64_t row,
                                int64_t feature, uint16_t *gates, int64_t gate_stride) {
    int64_t count = min_i64(job->num_out - feature, PANEL), width = job->out_f32 ? 4 : 2;
    int64_t first_bias = task == MULTIPLY ? job->num_out + feature : feature;
    return (ready_rows){
        .task = task,
        .out = (char *)job->out + (row * job->out_stride + feature) * width,
        .gates = gates,
        .out_stride_bytes = job->out_stride * width,
        .gate_stride = gate_stride,
        .bias = job->bias ? job->bias + first_bias : NULL,
        .wanted = count == PANEL ? ~(__mmask32)0 : ((__mmask32)1 << count) - 1,
        .out_f32 = job->out_f32,
    };
}

INLINE void finish_row(const int task, ready_rows *ready) {
    __mmask16 first = (__mmask16)ready->wanted, second = (__mmask16)(ready->wanted >> 16);
    __m512 low = _mm512_load_ps(ready->c), high = _mm512_load_ps(ready->c + 16);
    if (ready->bias) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(first, ready->bias));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(second, ready->bias + 16));
    }
    if (task == STORE && ready->out_f32) {
        _mm512_mask_storeu_ps(ready->out, first, low);
        _mm512_mask_storeu_ps(ready->out + 64, second, high);
    } else if (task == STORE) {
        _mm512_mask_storeu_epi16(ready->out, ready->wanted,
                                 (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else { /* all 32 exist: isthmus_has_gated */
        vf_pair v = pair_from_bf16((__m512i)_mm512_cvtne2ps_pbh(high, low));
        void *to = ready->out;
        if (task == STORE_GATE) {
            v.even = silu_any(DTYPE_BF16, v.even);
            v.odd = silu_any(DTYPE_BF16, v.odd);
            to = ready->gates;
        } else {
            vf_pair gates = load_pair(ready->gates);
            v.even *= gates.even;
            v.odd *= gates.odd;
        }
        _mm512_storeu_si512(to, bf16_from_pair(v));
    }
    ready->c += PANEL;
    ready->out += ready->out_stride_bytes;
    ready->gates += ready->gate_stride;
    --ready->rows;
}

INLINE void finish_rows(const int task, ready_rows *ready, int64_t count) {
    for (; count > 0 && ready->rows > 0; --count) finish_row(task, ready);
}

static void finish_all(ready_rows *ready) {
    switch (ready->task) {
    case STORE: finish_rows(STORE, ready, ready->rows); break;
    case STORE_GATE: finish_rows(STORE_GATE, ready, ready->rows); break;
    case MULTIPLY: finish_rows(MULTIPLY, ready, ready->rows); break;
    }
}

/* ---- few rows */

/* The weights are read once, straight from memory, some distance ahead of their use. `last` is the
 * last address from which reading ahead stays within this thread's share. */
INLINE void few_panel(const linear_job *job, const char *panel, const char *last, float *c) {
    enum { AHEAD_BYTES = 8192 };
    const char *x = job->x;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < job->inner / INNER_STEP; ++step, panel += PANEL_STEP_BYTES) {
        if (panel <= last - AHEAD_BYTES)
            for (int line = 0; line < PANEL_STEP_BYTES; line += 64)
                _mm_prefetch(panel + AHEAD_BYTES + line, _MM_HINT_T0);
        _tile_loadd(4, x + step * INNER_STEP * 2, job->x_stride * 2);
        _tile_loadd(6, panel, 64);
        _tile_loadd(7, panel + TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, PANEL * 4);
    _tile_stored(1, c + 16, PANEL * 4);
}

/* A gated layer's gates wait in the output itself. */
INLINE void few_panels(const enum task task, const linear_job *job, const char *packed,
                       int64_t begin, int64_t end) {
    int64_t panel_bytes = job->inner * PANEL * 2;
    _Alignas(64) float c[TILE_ROWS * PANEL];
    for (int64_t item = begin; item < end; ++item) {
        few_panel(job, packed + item * panel_bytes, packed + end * panel_bytes, c);
        uint16_t *gates = (uint16_t *)job->out + item * PANEL;
        ready_rows ready = rows_of_panel(job, task, 0, item * PANEL, gates, job->out_stride);
        ready.c = c;
        ready.rows = job->num_rows;
        finish_rows(task, &ready, TILE_ROWS);
    }
}

static void linear_few(const linear_job *job, int64_t begin, int64_t end) {
    const char *packed = job->packed, *ups = packed + job->num_panels * job->inner * PANEL * 2;
    configure(job->num_rows);
    if (job->is_gated) {
        few_panels(STORE_GATE, job, packed, begin, end);
        few_panels(MULTIPLY, job, ups, begin, end);
    } else {
        few_panels(STORE, job, packed, begin, end);
    }
    _tile_release();
}

/* ---- many rows: a panel stays in the first-level cache while the rows of a range pass by */

/* Steps of a panel that stay in a first-level cache of 48 KiB, beside sums and output, while rows
 * pass by. A longer panel is cut into such parts, and the sums wait in memory in between. */
enum { PART_STEPS = 20 };

/* The panel after this one is fetched into the second-level cache beside the multiplications, some
 * lines with each step of all blocks: all at once they would hold up what the tiles wait for. */
typedef struct {
    const char *next, *end;
    int64_t lines_a_step;
} lines_ahead;

INLINE void fetch_lines(lines_ahead *ahead) {
    for (int64_t i = 0; i < ahead->lines_a_step && ahead->next < ahead->end; ++i, ahead->next += 64)
        _mm_prefetch(ahead->next, _MM_HINT_T1);
}

/* Steps that finish rows of the block before between their multiplications, which leave the vector
 * units idle: whole blocks only, so that nothing in the loop depends on how many rows there are. */
INLINE void finish_beside(const int task, const int rows_a_step, const char *a, int64_t a_stride,
                          const char *panel, ready_rows *ready, lines_ahead *ahead) {
    for (int step = 0; step < BLOCK_ROWS / rows_a_step; ++step) {
        multiply_upper(KEEP_PANEL, a, a_stride, panel);
        for (int row = 0; row < rows_a_step / 2; ++row) finish_row(task, ready);
        fetch_lines(ahead);
        multiply_lower(KEEP_PANEL, a, a_stride);
        for (int row = 0; row < rows_a_step / 2; ++row) finish_row(task, ready);
        a += INNER_STEP * 2;
        panel += PANEL_STEP_BYTES;
    }
}

/* c[rows][0..32) = a[rows][0..32 * steps) @ panel, or that added to c. All rows of the block before
 * are finished. */
INLINE void tile_block(const int task, int64_t rows, const char *a, int64_t a_stride,
                       const char *panel, int64_t steps, int is_added, float *c,
                       ready_rows *ready_before, lines_ahead *lines_after) {
    ready_rows ready = *ready_before;
    lines_ahead ahead = *lines_after;
    int has_lower = rows > TILE_ROWS;
    int64_t step = 0;
    if (is_added)
        load_block(c, PANEL * 4, has_lower);
    else
        zero_block();
    if (has_lower && ready.rows == BLOCK_ROWS && steps >= BLOCK_ROWS / 2) {
        finish_beside(task, 2, a, a_stride, panel, &ready, &ahead);
        step = BLOCK_ROWS / 2;
    } else if (has_lower && ready.rows == BLOCK_ROWS && steps >= BLOCK_ROWS / 4) {
        finish_beside(task, 4, a, a_stride, panel, &ready, &ahead);
        step = BLOCK_ROWS / 4;
    } else {
        finish_rows(task, &ready, ready.rows);
    }
    for (; step < steps; ++step) {
        multiply_step(KEEP_PANEL, a + step * INNER_STEP * 2, a_stride, has_lower,
                      panel + step * PANEL_STEP_BYTES);
        fetch_lines(&ahead);
    }
    store_block(c, PANEL * 4, has_lower);
    *ready_before = ready;
    *lines_after = ahead;
}

#define TILE_BLOCK(task)                                                                        \
    static void tile_block_##task(int64_t rows, const char *a, int64_t a_stride,                \
                                  const char *panel, int64_t steps, int is_added, float *c,     \
                                  ready_rows *ready, lines_ahead *ahead) {                      \
        tile_block(task, rows, a, a_stride, panel, steps, is_added, c, ready, ahead);           \
    }
TILE_BLOCK(STORE)
TILE_BLOCK(STORE_GATE)
TILE_BLOCK(MULTIPLY)
typedef void tile_block_fn(int64_t, const char *, int64_t, const char *, int64_t, int, float *,
                           ready_rows *, lines_ahead *);
static tile_block_fn *const tile_blocks[] = {tile_block_STORE, tile_block_STORE_GATE,
                                             tile_block_MULTIPLY};

/* Rows [first_row, last_row) of one panel; `of_panel` says what becomes of them. Those that were
 * ready before are finished, and those of the last block are left ready. `configured` is the number
 * of rows that the tiles have: changing it costs as much as two steps. */
static void pass_panel(const linear_job *job, const char *panel, int64_t first_row,
                       int64_t last_row, ready_rows of_panel, lines_ahead ahead, float *sums,
                       ready_rows *ready, int64_t *configured) {
    int64_t steps = job->inner / INNER_STEP, num_parts = (steps + PART_STEPS - 1) / PART_STEPS;
    int64_t num_blocks = (last_row - first_row + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t x_stride = job->x_stride * 2;
    ahead.lines_a_step = (PANEL_STEP_BYTES / 64 + num_blocks - 1) / num_blocks;
    for (int64_t part = 0; part < num_parts; ++part) {
        int64_t first = steps * part / num_parts, end = steps * (part + 1) / num_parts;
        for (int64_t block = 0; block < num_blocks; ++block) {
            int64_t row = block * BLOCK_ROWS;
            int64_t rows = min_i64(BLOCK_ROWS, last_row - first_row - row);
            if (rows != *configured) configure(*configured = rows);
            const char *x = (const char *)job->x + (first_row + row) * x_stride;
            float *c = num_parts > 1 ? sums + row * PANEL : sums;
            tile_blocks[ready->task](rows, x + first * INNER_STEP * 2, x_stride,
                                     panel + first * PANEL_STEP_BYTES, end - first, part > 0, c,
                                     ready, &ahead);
            if (part + 1 < num_parts) continue;
            *ready = of_panel;
            ready->rows = rows;
            ready->c = c;
            ready->out += row * ready->out_stride_bytes;
            ready->gates += row * ready->gate_stride;
        }
    }
}

static void linear_many(const linear_job *job, int64_t begin, int64_t end) {
    int64_t panel_bytes = job->inner * PANEL * 2, half = job->num_panels * panel_bytes;
    const char *packed = job->packed, *end_half = packed + half;
    size_t num_sums = (size_t)(job->rows_per_range * PANEL);
    float *sums = isthmus_scratch(SCRATCH_KERNEL, num_sums * 6);
    uint16_t *gates = (uint16_t *)(sums + num_sums);
    ready_rows ready = {.task = STORE};
    int64_t configured = 0;
    for (int64_t item = begin; item < end; ++item) {
        int64_t range = item / job->num_panels, index = item % job->num_panels;
        int64_t row = range * job->rows_per_range, feature = index * PANEL;
        int64_t last_row = min_i64(row + job->rows_per_range, job->num_rows);
        const char *panel = packed + index * panel_bytes, *next = panel + panel_bytes;
        lines_ahead ahead = {.next = next, .end = next < end_half ? next + panel_bytes : next};
        if (job->is_gated) {
            lines_ahead up = {.next = panel + half, .end = panel + half + panel_bytes};
            pass_panel(job, panel, row, last_row,
                       rows_of_panel(job, STORE_GATE, row, feature, gates, PANEL), up, sums,
                       &ready, &configured);
            pass_panel(job, panel + half, row, last_row,
                       rows_of_panel(job, MULTIPLY, row, feature, gates, PANEL), ahead, sums,
                       &ready, &configured);
        } else {
            pass_panel(job, panel, row, last_row,
                       rows_of_panel(job, STORE, row, feature, NULL, 0), ahead, sums, &ready,
                       &configured);
        }
    }
    finish_all(&ready);
    _tile_release();
}

static void linear_amx(const void *opaque, int64_t begin, int64_t end) {
    const linear_job *job = opaque;
    if (job->num_rows <= TILE_ROWS)
        linear_few(job, begin, end);
    else
        linear_many(job, begin, end);
}

void isthmus_fill_amx_linear(kernel_table *table) {
    table->linear[DTYPE_BF16] = linear_amx;
    table->has_gated[DTYPE_BF16] = 1;
}
#endif
