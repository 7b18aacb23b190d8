/* Attention in float32 vectors, for either dtype. Compiled once per instruction set. */
typedef float operand;
#include "attention.h"
#include "panel.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(base) PASTE(base, LEVEL)

INLINE void pack_query(int dtype, const attention_job *job, const attention_unit *unit,
                       unit_memory *memory) {
    int64_t group = job->num_heads / job->kv.num_heads, dim = job->kv.head_dim;
    int64_t token = job->query_start[unit->sequence] + unit->first_query;
    for (int64_t row = 0; row < memory->rows; ++row) {
        int64_t at = ((token + row / group) * job->num_heads + unit->kv_head * group +
                      row % group) * dim;
        for (int64_t i = 0; i < memory->padded_dim; i += LANES)
            store_f32(memory->q + row * memory->padded_dim + i,
                      load_any(dtype, job->q, at + min_i64(i, dim), max_i64(dim - i, 0)));
    }
}

/* Panels of 32 keys: [key / 32][dim][key % 32]. */
INLINE void pack_keys(int dtype, const attention_job *job, unit_memory *memory, int64_t count) {
    int64_t dim = memory->padded_dim;
    for (int64_t key = 0; key < count; ++key) {
        float *to = memory->keys + key / PANEL * PANEL * dim + key % PANEL;
        const char *from = memory->key_rows[key];
        for (int64_t i = 0; i < job->kv.head_dim; ++i)
            to[i * PANEL] = dtype == DTYPE_F32 ? ((const float *)from)[i]
                                               : f32_from_bf16(((const uint16_t *)from)[i]);
        for (int64_t i = job->kv.head_dim; i < dim; ++i) to[i * PANEL] = 0;
    }
}

/* Panels of 32 dims: [dim / 32][key][dim % 32]. */
INLINE void pack_values(int dtype, const attention_job *job, unit_memory *memory, int64_t count) {
    for (int64_t key = 0; key < count; ++key)
        for (int64_t i = 0; i < memory->padded_dim; i += LANES) {
            int64_t left = job->kv.head_dim - i;
            vf v = {0};
            if (left > 0) v = load_any(dtype, memory->value_rows[key], i, left);
            store_f32(memory->values + i / PANEL * PANEL * KEY_CHUNK + key * PANEL + i % PANEL, v);
        }
}

/* Leaves the scores scaled, -inf where nothing is seen. */
INLINE void find_max(const unit_memory *memory, int64_t row, seen_span span, float scale) {
    float *scores = memory->scores + row * SCORE_STRIDE;
    static const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vf largest = splat(-INFINITY);
    for (int64_t i = span.first / LANES * LANES; i < span.end; i += LANES) {
        vf v = load_f32(scores + i) * splat(scale);
        if (i < span.first || i + LANES > span.end) {
            vi at = lane + (int32_t)i;
            v = select_f32((at >= (int32_t)span.first) & (at < (int32_t)span.end), v,
                           splat(-INFINITY));
        }
        store_f32(scores + i, v);
        largest = max_f32(largest, v);
    }
    memory->chunk_max[row] = span.first < span.end ? max_lanes(largest) : -INFINITY;
}

INLINE void weigh_row(const unit_memory *memory, int64_t row, seen_span span, float scale) {
    (void)scale;
    const float *scores = memory->scores + row * SCORE_STRIDE;
    float *weights = memory->weights + row * WEIGHT_STRIDE;
    vf max = splat(memory->chunk_max[row]), total = {0};
    for (int64_t i = span.block_first; i < span.block_end; i += LANES) {
        vf v = {0};
        if (i + LANES > span.first && i < span.end) {
            v = exp2_f32(load_f32(scores + i) - max);
            total += v;
        }
        store_f32(weights + i, v);
    }
    memory->chunk_weight[row] = sum_lanes(total);
}

INLINE void multiply_scores(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end) {
    for (int64_t key = first; key < end; key += PANEL)
        panel_rows(DTYPE_F32, rows, memory->q + row * memory->padded_dim, memory->padded_dim,
                   memory->keys + key * memory->padded_dim, memory->padded_dim,
                   memory->scores + key, SCORE_STRIDE);
}

INLINE void multiply_values(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end) {
    (void)row;
    for (int64_t i = 0; i < memory->padded_dim; i += PANEL)
        panel_rows(DTYPE_F32, rows, memory->weights + first, WEIGHT_STRIDE,
                   memory->values + i * KEY_CHUNK + first * PANEL, end - first,
                   memory->product + i, memory->padded_dim);
}

INLINE void finish_unit(void) {}

static void attend_f32(const void *job, int64_t begin, int64_t end) {
    attend_units(DTYPE_F32, (const attention_job *)job, begin, end);
}
static void attend_bf16(const void *job, int64_t begin, int64_t end) {
    attend_units(DTYPE_BF16, (const attention_job *)job, begin, end);
}
static void merge_f32(const void *job, int64_t begin, int64_t end) {
    merge_units(DTYPE_F32, (const attention_job *)job, begin, end);
}
static void merge_bf16(const void *job, int64_t begin, int64_t end) {
    merge_units(DTYPE_BF16, (const attention_job *)job, begin, end);
}

void NAME(isthmus_fill_attention)(kernel_table *table);
void NAME(isthmus_fill_attention)(kernel_table *table) {
    table->attention[DTYPE_F32] = attend_f32;
    table->attention[DTYPE_BF16] = attend_bf16;
    table->merge[DTYPE_F32] = merge_f32;
    table->merge[DTYPE_BF16] = merge_bf16;
}
