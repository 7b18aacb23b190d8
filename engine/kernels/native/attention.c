/* Attention in float32 vectors, for either dtype. Compiled once per instruction set. */
typedef float operand;
#include "attention.h"
#include "panel.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(base) PASTE(base, LEVEL)

INLINE void pack_query(int dtype, const attention_job *job, const attention_unit *unit,
                       unit_memory *memory) {
    int64_t group = job->num_heads / job->num_kv_heads, dim = job->head_dim;
    int64_t token = job->query_start[unit->sequence] + unit->first_query;
    for (int64_t row = 0; row < memory->rows; ++row) {
        int64_t at = ((token + row / group) * job->num_heads + unit->kv_head * group +
                      row % group) * dim;
        for (int64_t i = 0; i < memory->padded_dim; i += LANES)
            store_f32(memory->q + row * memory->padded_dim + i,
                      load_any(dtype, job->q, at + min_i64(i, dim), max_i64(dim - i, 0)));
    }
}

/* Panels of 32 keys: [key / 32][dim][key % 32]; zeros past the last key. */
INLINE void pack_keys(int dtype, const attention_job *job, const attention_unit *unit,
                      unit_memory *memory, int64_t first, int64_t count) {
    size_t width = dtype == DTYPE_F32 ? 4 : 2;
    int64_t dim = memory->padded_dim;
    for (int64_t key = 0; key < (count + 31) / 32 * 32; ++key) {
        float *to = memory->keys + key / PANEL * PANEL * dim + key % PANEL;
        const char *from = key < count ? kv_row(job, unit, 0, first + key, width) : NULL;
        for (int64_t i = 0; i < dim; ++i) {
            float v = 0;
            if (from && i < job->head_dim)
                v = dtype == DTYPE_F32 ? ((const float *)from)[i]
                                       : f32_from_bf16(((const uint16_t *)from)[i]);
            to[i * PANEL] = v;
        }
    }
}

/* Panels of 32 dims: [dim / 32][key][dim % 32]; zeros past the last key. */
INLINE void pack_values(int dtype, const attention_job *job, const attention_unit *unit,
                        unit_memory *memory, int64_t first, int64_t count) {
    size_t width = dtype == DTYPE_F32 ? 4 : 2;
    for (int64_t key = 0; key < (count + 31) / 32 * 32; ++key) {
        const char *from = key < count ? kv_row(job, unit, 1, first + key, width) : NULL;
        for (int64_t i = 0; i < memory->padded_dim; i += LANES) {
            vf v = {0};
            if (from && i < job->head_dim) v = load_any(dtype, from, i, job->head_dim - i);
            store_f32(memory->values + i / PANEL * PANEL * KEY_CHUNK + key * PANEL + i % PANEL, v);
        }
    }
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
