/* Attention on AMX tiles: bf16 operands, float32 sums. */
#if defined(__x86_64__)
typedef unsigned short operand;
#include "attention.h"
#include "amx_tile.h"

INLINE void pack_query(int dtype, const attention_job *job, const attention_unit *unit,
                       unit_memory *memory) {
    (void)dtype;
    int64_t group = job->num_heads / job->kv.num_heads, dim = job->kv.head_dim;
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
    int64_t count = job->kv.head_dim - i;
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
        for (int row = 0; row < 16; ++row) prefetch_row(ahead[row], job->kv.head_dim * 2);
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
            prefetch_row(memory->value_rows[key + ROWS_AHEAD], job->kv.head_dim * 2);
            prefetch_row(memory->value_rows[key + ROWS_AHEAD + 1], job->kv.head_dim * 2);
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

/* Of the 32 keys from `i` on, those in [first, end). */
INLINE __mmask32 lanes_between(int64_t i, int64_t first, int64_t end) {
    uint64_t below_end = ((uint64_t)1 << max_i64(min_i64(end - i, 32), 0)) - 1;
    uint64_t below_first = ((uint64_t)1 << max_i64(min_i64(first - i, 32), 0)) - 1;
    return (__mmask32)(below_end & ~below_first);
}

/* Runs `step(is_whole, i)` on each 32 keys from `i` of a row's span, those seen whole without masks;
 * `i` ends past the last. */
#define FOR_SEEN_KEYS(i, span, step)                                                   \
    do {                                                                               \
        int64_t first_whole_ = ((span).first + 31) / 32 * 32;                          \
        int64_t end_whole_ = (span).end / 32 * 32;                                     \
        for (; (i) < (span).end && (i) < first_whole_; (i) += 32) step(0, i);          \
        for (; (i) < end_whole_; (i) += 32) step(1, i);                                \
        for (; (i) < (span).end; (i) += 32) step(0, i);                                \
    } while (0)

INLINE void find_max(const unit_memory *memory, int64_t row, seen_span span, float scale) {
    const float *scores = memory->scores + row * SCORE_STRIDE;
    __m512 largest = _mm512_set1_ps(-INFINITY), other = largest;
#define STEP(is_whole, i)                                                                        \
    do {                                                                                         \
        __mmask32 seen = (is_whole) ? ~(__mmask32)0 : lanes_between(i, span.first, span.end);    \
        __m512 a = _mm512_load_ps(scores + (i)), b = _mm512_load_ps(scores + (i) + 16);          \
        largest = _mm512_mask_max_ps(largest, (__mmask16)seen, largest, a);                      \
        other = _mm512_mask_max_ps(other, (__mmask16)(seen >> 16), other, b);                    \
    } while (0)
    int64_t i = span.block_first;
    FOR_SEEN_KEYS(i, span, STEP);
#undef STEP
    memory->chunk_max[row] = _mm512_reduce_max_ps(_mm512_max_ps(largest, other)) * scale;
}

INLINE void weigh_row(const unit_memory *memory, int64_t row, seen_span span, float scale) {
    const float *scores = memory->scores + row * SCORE_STRIDE;
    operand *weights = memory->weights + row * WEIGHT_STRIDE;
    __m512 factor = _mm512_set1_ps(scale), base = _mm512_set1_ps(memory->chunk_max[row]);
    __m512 total = _mm512_setzero_ps(), other_total = total;
#define STEP(is_whole, i)                                                                        \
    do {                                                                                         \
        __m512 a = _mm512_fmsub_ps(_mm512_load_ps(scores + (i)), factor, base);                  \
        __m512 b = _mm512_fmsub_ps(_mm512_load_ps(scores + (i) + 16), factor, base);             \
        a = exp2_rough(a);                                                                       \
        b = exp2_rough(b);                                                                       \
        if (!(is_whole)) {                                                                       \
            __mmask32 seen = lanes_between(i, span.first, span.end);                             \
            a = _mm512_maskz_mov_ps((__mmask16)seen, a);                                         \
            b = _mm512_maskz_mov_ps((__mmask16)(seen >> 16), b);                                 \
        }                                                                                        \
        total = _mm512_add_ps(total, a);                                                         \
        other_total = _mm512_add_ps(other_total, b);                                             \
        _mm512_store_si512(weights + (i), (__m512i)_mm512_cvtne2ps_pbh(b, a));                   \
    } while (0)
    int64_t i = span.block_first;
    FOR_SEEN_KEYS(i, span, STEP);
#undef STEP
    for (; i < span.block_end; i += 32) _mm512_store_si512(weights + i, _mm512_setzero_si512());
    memory->chunk_weight[row] = _mm512_reduce_add_ps(_mm512_add_ps(total, other_total));
}

INLINE void configure_unit(unit_memory *memory, int64_t rows) {
    if (memory->configured != rows) configure(memory->configured = rows);
}

/* c[rows][0..32) = a[rows][0..32 * steps) @ panel. `configure_unit` went before. The sums run in
 * the order of the inner dimension whatever `rows` is. */
INLINE void multiply_block(int64_t rows, const operand *a, int64_t a_stride, const operand *panel,
                           int64_t steps, float *c, int64_t c_stride) {
    int has_lower = rows > TILE_ROWS;
    zero_block();
    for (int64_t step = 0; step < steps; ++step)
        multiply_step(KEEP_ROWS, (const char *)(a + step * INNER_STEP), a_stride * 2, has_lower,
                      (const char *)panel + step * PANEL_STEP_BYTES);
    store_block(c, c_stride * 4, has_lower);
}

INLINE void multiply_scores(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end) {
    int64_t dim = memory->padded_dim;
    configure_unit(memory, rows);
    for (int64_t key = first; key < end; key += PANEL)
        multiply_block(rows, memory->q + row * dim, dim, memory->keys + key * dim,
                       dim / INNER_STEP, memory->scores + key, SCORE_STRIDE);
}

INLINE void multiply_values(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end) {
    (void)row;
    int64_t dim = memory->padded_dim;
    for (int64_t i = 0; i < dim; i += PANEL)
        multiply_block(rows, memory->weights + first, WEIGHT_STRIDE,
                       memory->values + i * KEY_CHUNK + first * PANEL, (end - first) / 32,
                       memory->product + i, dim);
}

INLINE void finish_unit(void) { _tile_release(); }

static void attend_amx(const void *job, int64_t begin, int64_t end) {
    attend_units(DTYPE_BF16, (const attention_job *)job, begin, end);
}
static void merge_amx(const void *job, int64_t begin, int64_t end) {
    merge_units(DTYPE_BF16, (const attention_job *)job, begin, end);
}

void isthmus_fill_amx_attention(kernel_table *table) {
    table->attention[DTYPE_BF16] = attend_amx;
    table->merge[DTYPE_BF16] = merge_amx;
}
#endif
