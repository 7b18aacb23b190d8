/* Linear layers and attention on AMX tiles: bf16 operands, float32 sums. */
#if defined(__x86_64__)
typedef unsigned short operand;
#include "attention.h"

#include <immintrin.h>

enum { TILE_ROWS = 16, TILE_BYTES = 1024 };

/* Tiles 0-3 sums of a 32 x 32 block, 4-5 its rows, 6-7 its columns. `rows` is 1 to 32. */
INLINE void configure(int64_t rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    int64_t upper = min_i64(rows, TILE_ROWS), lower = max_i64(rows - TILE_ROWS, 1);
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = (uint8_t)(tile >= 6 ? TILE_ROWS
                                      : tile == 2 || tile == 3 || tile == 5 ? lower
                                                                            : upper);
    }
    _tile_loadconfig(&config);
}

/* What goes on beside the multiplications of a block, a little each step: see `beside_step`. */
typedef struct beside beside;
INLINE void beside_step(const int task, beside *work);
enum { NOTHING = -1 };

enum kept { KEEP_ROWS, KEEP_PANEL };
#define LOAD_TILE(is_kept, ...) \
    ((is_kept) ? _tile_loadd(__VA_ARGS__) : _tile_stream_loadd(__VA_ARGS__))

/* c[rows][0..32) = a[rows][0..32 * steps) @ panel, or that added to c; strides in bytes.
 * `configure(rows)` went before. The sums run in the order of the inner dimension whatever `rows`
 * is. What is not `kept` for the next block passes the first-level cache by. */
INLINE void tile_block(const enum kept kept, int64_t rows, const void *a, int64_t a_stride, const char *panel,
                       int64_t steps, int is_added, void *c, int64_t c_stride, const int task,
                       beside *work) {
    const char *upper = a, *lower = upper + TILE_ROWS * a_stride;
    char *out = c, *lower_out = out + TILE_ROWS * c_stride;
    int has_lower = rows > TILE_ROWS;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (is_added) {
        _tile_loadd(0, out, c_stride);
        _tile_loadd(1, out + 64, c_stride);
        if (has_lower) {
            _tile_loadd(2, lower_out, c_stride);
            _tile_loadd(3, lower_out + 64, c_stride);
        }
    }
    for (int64_t step = 0; step < steps; ++step) {
        if (task != NOTHING) beside_step(task, work);
        LOAD_TILE(kept == KEEP_ROWS, 4, upper, a_stride);
        LOAD_TILE(kept == KEEP_PANEL, 6, panel, 64);
        LOAD_TILE(kept == KEEP_PANEL, 7, panel + TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (has_lower) {
            LOAD_TILE(kept == KEEP_ROWS, 5, lower, a_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        upper += INNER_STEP * 2;
        lower += INNER_STEP * 2;
        panel += PANEL_STEP_BYTES;
    }
    _tile_stored(0, out, c_stride);
    _tile_stored(1, out + 64, c_stride);
    if (has_lower) {
        _tile_stored(2, lower_out, c_stride);
        _tile_stored(3, lower_out + 64, c_stride);
    }
}

/* ---- linear */

/* Where the bias of a feature is, or NULL. */
INLINE const float *bias_at(const linear_job *job, int64_t feature) {
    return job->bias ? job->bias + feature : NULL;
}

INLINE __m512 with_bias(__m512 v, __mmask16 wanted, const float *bias) {
    return bias ? _mm512_add_ps(v, _mm512_maskz_loadu_ps(wanted, bias)) : v;
}

/* What becomes of a row's 32 sums. The output of a gated layer takes silu(gate) first and is then
 * multiplied by up; all is rounded as the separate kernels round. */
enum task { STORE = 0, STORE_SILU, MULTIPLY };

INLINE void finish_row(const int task, const linear_job *job, int64_t row, int64_t feature,
                       const float *c) {
    int64_t count = min_i64(job->num_out - feature, PANEL);
    __mmask32 wanted = count == PANEL ? ~(__mmask32)0 : ((__mmask32)1 << count) - 1;
    __mmask16 first = (__mmask16)wanted, second = (__mmask16)(wanted >> 16);
    const float *bias = bias_at(job, task == MULTIPLY ? job->num_out + feature : feature);
    __m512 low = with_bias(_mm512_load_ps(c), first, bias);
    __m512 high = with_bias(_mm512_load_ps(c + 16), second, bias ? bias + 16 : NULL);
    int64_t at = row * job->out_stride + feature;
    if (task == STORE && job->out_f32) {
        float *out = (float *)job->out + at;
        _mm512_mask_storeu_ps(out, first, low);
        _mm512_mask_storeu_ps(out + 16, second, high);
        return;
    }
    uint16_t *out = (uint16_t *)job->out + at;
    if (task != STORE) { /* all 32 are real: isthmus_has_gated */
        vf a = round_any(DTYPE_BF16, (vf)low), b = round_any(DTYPE_BF16, (vf)high);
        if (task == STORE_SILU) {
            low = (__m512)silu_any(DTYPE_BF16, a);
            high = (__m512)silu_any(DTYPE_BF16, b);
        } else {
            low = (__m512)(a * load_any(DTYPE_BF16, out, 0, LANES));
            high = (__m512)(b * load_any(DTYPE_BF16, out, LANES, LANES));
        }
    }
    _mm512_mask_storeu_epi16(out, wanted, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* Few rows: the weights are read once, straight from memory, some distance ahead of their use.
 * `last` is the last address from which reading ahead stays within this thread's share. */
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

INLINE void few_panels(const int task, const linear_job *job, const char *packed, int64_t begin,
                       int64_t end) {
    int64_t panel_bytes = job->inner * PANEL * 2;
    _Alignas(64) float c[TILE_ROWS * PANEL];
    for (int64_t item = begin; item < end; ++item) {
        few_panel(job, packed + item * panel_bytes, packed + end * panel_bytes, c);
        for (int64_t row = 0; row < job->num_rows; ++row)
            finish_row(task, job, row, item * PANEL, c + row * PANEL);
    }
}

INLINE void linear_few(const linear_job *job, int64_t begin, int64_t end) {
    const char *packed = job->packed, *ups = packed + job->num_panels * job->inner * PANEL * 2;
    configure(job->num_rows);
    if (job->is_gated) {
        few_panels(STORE_SILU, job, packed, begin, end);
        few_panels(MULTIPLY, job, ups, begin, end);
    } else {
        few_panels(STORE, job, packed, begin, end);
    }
    _tile_release();
}

/* Beside the multiplications of a block, which leave the vector units idle, the block before goes
 * to the output, and the panel after this one into the second-level cache. */
struct beside {
    const linear_job *job;
    const float *c;
    int64_t row, end_row, rows_a_step, feature; /* of the block before */
    const char *next, *next_end;                /* the panel after this one */
    int64_t lines_a_step;
};

INLINE void finish_rows(const int task, beside *work, int64_t count) {
    for (; count > 0 && work->row < work->end_row; --count, ++work->row, work->c += PANEL)
        finish_row(task, work->job, work->row, work->feature, work->c);
}

INLINE void beside_step(const int task, beside *work) {
    for (int64_t i = 0; i < work->lines_a_step && work->next < work->next_end; ++i) {
        _mm_prefetch(work->next, _MM_HINT_T1);
        work->next += 64;
    }
    finish_rows(task, work, work->rows_a_step);
}

/* Steps of a panel that stay in a first-level cache of 48 KiB, beside sums and output, while rows
 * pass by. A longer panel is cut into such parts, and the sums wait in memory in between. */
enum { PART_STEPS = 20 };

INLINE void pass_panel(const int task, const linear_job *job, const char *panel, int64_t first_row,
                       int64_t last_row, int64_t feature, const char *next, const char *next_end,
                       float *sums) {
    int64_t steps = job->inner / INNER_STEP, num_parts = (steps + PART_STEPS - 1) / PART_STEPS;
    int64_t num_blocks = (last_row - first_row + BLOCK_ROWS - 1) / BLOCK_ROWS;
    beside work = {
        .job = job,
        .feature = feature,
        .next = next,
        .next_end = next_end,
        .lines_a_step = (PANEL_STEP_BYTES / 64 + num_blocks - 1) / num_blocks,
    };
    int64_t configured = 0;
    for (int64_t part = 0; part < num_parts; ++part) {
        int64_t first = steps * part / num_parts, part_steps = steps * (part + 1) / num_parts - first;
        int is_last = part + 1 == num_parts;
        work.rows_a_step = (BLOCK_ROWS + part_steps - 1) / part_steps;
        for (int64_t block = 0; block < num_blocks; ++block) {
            int64_t row = first_row + block * BLOCK_ROWS;
            int64_t rows = min_i64(BLOCK_ROWS, last_row - row);
            if (rows != configured) configure(configured = rows);
            const uint16_t *x = (const uint16_t *)job->x + row * job->x_stride + first * INNER_STEP;
            float *c = sums + (num_parts > 1 ? block : block % 2) * BLOCK_ROWS * PANEL;
            tile_block(KEEP_PANEL, rows, x, job->x_stride * 2, panel + first * PANEL_STEP_BYTES,
                       part_steps, part > 0, c, PANEL * 4, task, &work);
            if (!is_last) continue;
            finish_rows(task, &work, BLOCK_ROWS);
            work.c = c;
            work.row = row;
            work.end_row = row + rows;
        }
    }
    finish_rows(task, &work, BLOCK_ROWS);
}

/* Many rows: a panel stays in the first-level cache while the rows of the range pass by. */
INLINE void linear_many(const linear_job *job, int64_t begin, int64_t end) {
    int64_t panel_bytes = job->inner * PANEL * 2, half = job->num_panels * panel_bytes;
    const char *packed = job->packed;
    int64_t num_sums = (job->rows_per_range + BLOCK_ROWS) * PANEL;
    float *sums = isthmus_scratch(SCRATCH_KERNEL, (size_t)num_sums * 4);
    for (int64_t item = begin; item < end; ++item) {
        int64_t range = item / job->num_panels, index = item % job->num_panels;
        int64_t row = range * job->rows_per_range;
        int64_t last_row = min_i64(row + job->rows_per_range, job->num_rows);
        const char *panel = packed + index * panel_bytes, *end_panel = packed + half;
        const char *next = panel + panel_bytes;
        if (job->is_gated) {
            pass_panel(STORE_SILU, job, panel, row, last_row, index * PANEL, panel + half,
                       panel + half + panel_bytes, sums);
            pass_panel(MULTIPLY, job, panel + half, row, last_row, index * PANEL, next, end_panel,
                       sums);
        } else {
            pass_panel(STORE, job, panel, row, last_row, index * PANEL, next, end_panel, sums);
        }
    }
    _tile_release();
}

static void linear_amx(const void *opaque, int64_t begin, int64_t end) {
    const linear_job *job = opaque;
    if (job->num_rows <= TILE_ROWS)
        linear_few(job, begin, end);
    else
        linear_many(job, begin, end);
}

/* ---- attention */

INLINE void pack_query(int dtype, const attention_job *job, const attention_unit *unit,
                       unit_memory *memory) {
    (void)dtype;
    int64_t group = job->num_heads / job->num_kv_heads, dim = job->head_dim;
    int64_t token = job->query_start[unit->sequence] + unit->first_query;
    for (int64_t row = 0; row < memory->rows; ++row) {
        int64_t at = ((token + row / group) * job->num_heads + unit->kv_head * group +
                      row % group) * dim;
        operand *to = memory->q + row * memory->padded_dim;
        memcpy(to, (const operand *)job->q + at, (size_t)dim * 2);
        if (memory->padded_dim > dim)
            memset(to + dim, 0, (size_t)(memory->padded_dim - dim) * 2);
    }
}

/* 16 x 16 transposition of 32-bit elements, rows to columns. */
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

INLINE __mmask32 dims_from(const attention_job *job, int64_t i) {
    int64_t count = job->head_dim - i;
    return count >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << count) - 1;
}

enum { ROWS_AHEAD = 32 };

INLINE void prefetch_row(const char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(row + i, _MM_HINT_T0);
}

/* Keys are the columns of the scores: [key / 32][dim / 32][2 of 16 keys][pair of dims][key]. */
INLINE void pack_keys(int dtype, const attention_job *job, unit_memory *memory, int64_t count) {
    (void)dtype;
    int64_t dim = memory->padded_dim;
    for (int64_t key = 0; key < count; key += 16) {
        const char *const *from = memory->key_rows + key;
        const char *const *ahead =
            key + ROWS_AHEAD < count ? from + ROWS_AHEAD : memory->value_rows + key % ROWS_AHEAD;
        for (int row = 0; row < 16; ++row) prefetch_row(ahead[row], job->head_dim * 2);
        char *panel = (char *)memory->keys + key / PANEL * PANEL * dim * 2;
        for (int64_t i = 0; i < dim; i += INNER_STEP) {
            __mmask32 wanted = dims_from(job, i);
            __m512i r[16];
            for (int row = 0; row < 16; ++row)
                r[row] = _mm512_maskz_loadu_epi16(wanted, from[row] + i * 2);
            transpose(r);
            char *to = panel + i / INNER_STEP * PANEL_STEP_BYTES + key % PANEL / 16 * TILE_BYTES;
            for (int row = 0; row < 16; ++row) _mm512_store_si512(to + row * 64, r[row]);
        }
    }
}

/* Dims are the columns of the product: [dim / 32][key / 32][2 of 16 dims][pair of keys][dim]. */
INLINE void pack_values(int dtype, const attention_job *job, unit_memory *memory, int64_t count) {
    (void)dtype;
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t key = 0; key < count; key += 2) {
        const char *even = memory->value_rows[key], *odd = memory->value_rows[key + 1];
        if (key + ROWS_AHEAD < count) {
            prefetch_row(memory->value_rows[key + ROWS_AHEAD], job->head_dim * 2);
            prefetch_row(memory->value_rows[key + ROWS_AHEAD + 1], job->head_dim * 2);
        }
        char *to = (char *)memory->values + key / 32 * PANEL_STEP_BYTES + key % 32 / 2 * 64;
        for (int64_t i = 0; i < memory->padded_dim; i += PANEL) {
            __mmask32 wanted = dims_from(job, i);
            __m512i a = _mm512_maskz_loadu_epi16(wanted, even + i * 2);
            __m512i b = _mm512_maskz_loadu_epi16(wanted, odd + i * 2);
            char *pair = to + i * KEY_CHUNK * 2;
            _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(pair + TILE_BYTES, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

/* 2^x for x <= 0, within 2^-17: weights are rounded to 2^-9. */
INLINE __m512 exp2_weight(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(9.618437e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503324e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022648e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* Of the 32 lanes from `i` on, those in [first, end). */
INLINE __mmask32 lanes_between(int64_t i, int64_t first, int64_t end) {
    uint64_t below_end = ((uint64_t)1 << max_i64(min_i64(end - i, 32), 0)) - 1;
    uint64_t below_first = ((uint64_t)1 << max_i64(min_i64(first - i, 32), 0)) - 1;
    return (__mmask32)(below_end & ~below_first);
}

INLINE int sees_whole(seen_span span) {
    return span.first <= span.block_first && span.end >= span.block_end;
}

INLINE __mmask32 seen_lanes(const int is_whole, seen_span span, int64_t i) {
    return is_whole ? ~(__mmask32)0 : lanes_between(i, span.first, span.end);
}

INLINE void find_max_of(const int is_whole, const unit_memory *memory, int64_t row, seen_span span,
                        float scale) {
    const float *scores = memory->scores + row * SCORE_STRIDE;
    __m512 largest = _mm512_set1_ps(-INFINITY), other = largest;
    for (int64_t i = span.block_first; i < span.block_end; i += 32) {
        __mmask32 seen = seen_lanes(is_whole, span, i);
        __m512 a = _mm512_load_ps(scores + i), b = _mm512_load_ps(scores + i + 16);
        largest = _mm512_mask_max_ps(largest, (__mmask16)seen, largest, a);
        other = _mm512_mask_max_ps(other, (__mmask16)(seen >> 16), other, b);
    }
    memory->chunk_max[row] = _mm512_reduce_max_ps(_mm512_max_ps(largest, other)) * scale;
}

INLINE void weigh_row_of(const int is_whole, const unit_memory *memory, int64_t row,
                         seen_span span, float scale) {
    const float *scores = memory->scores + row * SCORE_STRIDE;
    operand *weights = memory->weights + row * WEIGHT_STRIDE;
    __m512 factor = _mm512_set1_ps(scale), base = _mm512_set1_ps(memory->chunk_max[row]);
    __m512 total = _mm512_setzero_ps(), other_total = total;
    for (int64_t i = span.block_first; i < span.block_end; i += 32) {
        __mmask32 seen = seen_lanes(is_whole, span, i);
        __m512 a = _mm512_fmsub_ps(_mm512_load_ps(scores + i), factor, base);
        __m512 b = _mm512_fmsub_ps(_mm512_load_ps(scores + i + 16), factor, base);
        a = _mm512_maskz_mov_ps((__mmask16)seen, exp2_weight(a));
        b = _mm512_maskz_mov_ps((__mmask16)(seen >> 16), exp2_weight(b));
        total = _mm512_add_ps(total, a);
        other_total = _mm512_add_ps(other_total, b);
        _mm512_store_si512(weights + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    memory->chunk_weight[row] = _mm512_reduce_add_ps(_mm512_add_ps(total, other_total));
}

INLINE void find_max(const unit_memory *memory, int64_t row, seen_span span, float scale) {
    if (sees_whole(span))
        find_max_of(1, memory, row, span, scale);
    else
        find_max_of(0, memory, row, span, scale);
}

INLINE void weigh_row(const unit_memory *memory, int64_t row, seen_span span, float scale) {
    if (sees_whole(span))
        weigh_row_of(1, memory, row, span, scale);
    else
        weigh_row_of(0, memory, row, span, scale);
}

INLINE void multiply_scores(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end) {
    int64_t dim = memory->padded_dim;
    configure(rows);
    for (int64_t key = first; key < end; key += PANEL)
        tile_block(KEEP_ROWS, rows, memory->q + row * dim, dim * 2, (const char *)(memory->keys + key * dim),
                   dim / INNER_STEP, 0, memory->scores + key, SCORE_STRIDE * 4, NOTHING, NULL);
}

INLINE void multiply_values(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end) {
    (void)row;
    int64_t dim = memory->padded_dim;
    for (int64_t i = 0; i < dim; i += PANEL)
        tile_block(KEEP_ROWS, rows, memory->weights + first, WEIGHT_STRIDE * 2,
                   (const char *)(memory->values + i * KEY_CHUNK + first * PANEL),
                   (end - first) / 32, 0, memory->product + i, dim * 4, NOTHING, NULL);
}

INLINE void finish_unit(void) { _tile_release(); }

static void attend_amx(const void *job, int64_t begin, int64_t end) {
    attend_units(DTYPE_BF16, (const attention_job *)job, begin, end);
}
static void merge_amx(const void *job, int64_t begin, int64_t end) {
    merge_units(DTYPE_BF16, (const attention_job *)job, begin, end);
}

void isthmus_fill_amx(kernel_table *table) {
    table->name = "amx-bf16";
    table->linear[DTYPE_BF16] = linear_amx;
    table->has_gated[DTYPE_BF16] = 1;
    table->attention[DTYPE_BF16] = attend_amx;
    table->merge[DTYPE_BF16] = merge_amx;
}
#endif
