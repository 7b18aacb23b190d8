/* Attention over paged keys and values, chunk of keys by chunk of keys.
 *
 * The including file says how its unit multiplies, in these functions and types:
 *   operand                        element of packed queries and of weights (P)
 *   pack_query, pack_keys, pack_values
 *   multiply_scores                scores of a block of rows with keys [first, end) of a chunk
 *   multiply_values                weights of a block of rows times the values of the chunk
 *   find_max, weigh_row            scores of one row to weights
 *   finish_unit                    called once a unit is done
 *
 * Rows of a unit are (query token, head of the group) pairs, so that the heads of a group share
 * every read of the KV cache.
 */
#ifndef ATTENTION_H
#define ATTENTION_H

#include "scaled_row.h"

#include <assert.h>
#include <math.h>

enum {
    BLOCK_ROWS = MAX_SPLIT_ROWS,
    SCORE_STRIDE = KEY_CHUNK + LANES, /* off a power of two: rows fall into different cache sets */
    /* A row's weights take the place of its scores, which leaves the cache to keys and values. */
    WEIGHT_STRIDE = SCORE_STRIDE * (int)(sizeof(float) / sizeof(operand)),
};

typedef struct {
    int64_t rows, padded_dim;
    int64_t configured; /* rows that the multiplications are set up for; 0 before a unit */
    operand *q;          /* [rows, to a multiple of 32][padded_dim] */
    operand *keys;       /* packed chunk */
    operand *values;     /* packed chunk */
    float *scores;       /* [32][SCORE_STRIDE] */
    operand *weights;    /* [32][WEIGHT_STRIDE], the same memory */
    float *product;      /* [32][padded_dim] */
    float *sum;          /* [rows][padded_dim], the merged output so far */
    float *max, *weight; /* [rows], of the merged output */
    float *chunk_max, *chunk_weight; /* [32] */
    char *unscaled; /* [2][KEY_CHUNK][head_dim], of the job's dtype: rows of a pool with scales */
    const char *key_rows[KEY_CHUNK], *value_rows[KEY_CHUNK]; /* of the chunk */
    key_span span; /* positions that are attended to now */
} unit_memory;

/* Stands for the rows past a context; as long as the longest head. */
enum { MAX_HEAD_DIM = 1024 };
static const _Alignas(64) char zero_row[MAX_HEAD_DIM * 4];

/* Finds the rows of a chunk's keys and values in their blocks, `count` of them and zero rows up to
 * the next multiple of 32; zero rows too before the span, where nothing may have been written. */
INLINE void locate_rows(const attention_job *job, const attention_unit *unit, unit_memory *memory,
                        int64_t first, int64_t count, int64_t width) {
    const int32_t *table = job->block_table + unit->sequence * job->table_stride;
    int64_t block = first / job->kv.block_size, offset = first % job->kv.block_size;
    int64_t row_bytes = job->kv.slot_stride * width, side_bytes = job->kv.side_stride * width;
    for (int64_t key = 0; key < count; ++block, offset = 0) {
        const char *row = (const char *)job->kv_memory +
                          (table[block] * job->kv.block_stride + unit->kv_head * job->kv.head_stride +
                           offset * job->kv.slot_stride) * width;
        int64_t end = min_i64(count, key + job->kv.block_size - offset);
        for (; key < end; ++key, row += row_bytes) {
            memory->key_rows[key] = row;
            memory->value_rows[key] = row + side_bytes;
        }
    }
    for (int64_t key = count; key % 32; ++key)
        memory->key_rows[key] = memory->value_rows[key] = zero_row;
    for (int64_t key = min_i64(memory->span.first - first, count) - 1; key >= 0; --key)
        memory->key_rows[key] = memory->value_rows[key] = zero_row;
}

/* Reads rows with scales back, so that packing finds rows of the job's dtype. */
INLINE void unscale_chunk(int dtype, const int64_t scaling, const int is_whole, int64_t dim,
                          unit_memory *memory, int64_t count) {
    int64_t row_bytes = dim * (dtype == DTYPE_F32 ? 4 : 2);
    char *keys = memory->unscaled, *values = keys + KEY_CHUNK * row_bytes;
    for (int64_t key = 0; key < count; ++key, keys += row_bytes, values += row_bytes) {
        unscale_row(dtype, scaling, is_whole, memory->key_rows[key], dim, keys);
        unscale_row(dtype, scaling, is_whole, memory->value_rows[key], dim, values);
        memory->key_rows[key] = keys;
        memory->value_rows[key] = values;
    }
}
INLINE void unscale_rows(int dtype, const attention_job *job, unit_memory *memory, int64_t count) {
    int64_t dim = job->kv.head_dim;
    if (dim % LANES)
        unscale_chunk(dtype, job->kv.scaling, 0, dim, memory, count);
    else if (job->kv.scaling == SCALING_INT8)
        unscale_chunk(dtype, SCALING_INT8, 1, dim, memory, count);
    else
        unscale_chunk(dtype, SCALING_FP8, 1, dim, memory, count);
}

INLINE void pack_query(int dtype, const attention_job *job, const attention_unit *unit,
                       unit_memory *memory);
INLINE void pack_keys(int dtype, const attention_job *job, unit_memory *memory, int64_t count);
INLINE void pack_values(int dtype, const attention_job *job, unit_memory *memory, int64_t count);
INLINE void multiply_scores(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end);
INLINE void multiply_values(unit_memory *memory, int64_t row, int64_t rows, int64_t first,
                            int64_t end);
INLINE void finish_unit(void);

/* Keys of the chunk at `key` that the query at `position` sees of a span: [*first, *end), where
 * it sees any. */
INLINE void seen_keys(const attention_job *job, key_span span, int64_t position, int64_t key,
                      int64_t *first, int64_t *end) {
    int64_t lowest = job->window ? position - job->window + 1 : 0;
    *first = max_i64(max_i64(lowest, span.first) - key, 0);
    *end = max_i64(min_i64(min_i64(position + 1, span.end) - key, KEY_CHUNK), 0);
}

/* What one row of a block sees, [first, end), of the keys that some row of it sees. */
typedef struct {
    int64_t first, end, block_first, block_end;
} seen_span;

/* The largest score of one row, times scale, into chunk_max. */
INLINE void find_max(const unit_memory *memory, int64_t row, seen_span span, float scale);

/* Scores of one row to weights 2^(score * scale - chunk_max) in [block_first, block_end), zero
 * where it sees nothing, and their sum into chunk_weight. */
INLINE void weigh_row(const unit_memory *memory, int64_t row, seen_span span, float scale);

/* Adds a chunk's result of some rows to the merged one. Not inlined: each instance could fuse
 * another one of its multiplications, and a split unit must give the bits of a whole one. */
static __attribute__((noinline)) void merge_rows(int64_t rows, int64_t dim, float *sum, float *max,
                                                 float *weight, const float *product,
                                                 const float *chunk_max,
                                                 const float *chunk_weight) {
    for (int64_t first = 0; first < rows; first += LANES) {
        int64_t count = min_i64(rows - first, LANES);
        vf old_max = load_any(DTYPE_F32, max, first, count);
        vf its_max = load_any(DTYPE_F32, chunk_max, first, count);
        vf new_max = max_f32(old_max, its_max);
        /* Nothing seen so far or in this chunk: -inf - -inf must not become NaN. */
        vf base = select_f32(new_max == splat(-INFINITY), splat(0.0f), new_max);
        vf keep = exp2_f32(old_max - base), add = exp2_f32(its_max - base);
        vf new_weight = load_any(DTYPE_F32, weight, first, count) * keep;
        new_weight += load_any(DTYPE_F32, chunk_weight, first, count) * add;
        store_any(DTYPE_F32, max, first, count, new_max);
        store_any(DTYPE_F32, weight, first, count, new_weight);
        float keeps[LANES], adds[LANES];
        store_f32(keeps, keep);
        store_f32(adds, add);
        for (int64_t i = 0; i < count; ++i) {
            float *to = sum + (first + i) * dim;
            const float *from = product + (first + i) * dim;
            vf k = splat(keeps[i]), a = splat(adds[i]);
            for (int64_t at = 0; at < dim; at += LANES)
                store_f32(to + at, load_f32(to + at) * k + load_f32(from + at) * a);
        }
    }
}

INLINE void write_row(int dtype, const attention_job *job, const attention_unit *unit, int64_t row,
                      const float *sum, float max, float weight) {
    int64_t group = job->num_heads / job->kv.num_heads, dim = job->kv.head_dim;
    int64_t token = job->query_start[unit->sequence] + unit->first_query + row / group;
    int64_t at = token * job->out_stride + (unit->kv_head * group + row % group) * dim;
    /* A part may have nothing that the row sees. */
    vf inverse = splat(weight > 0 ? 1.0f / weight : 0.0f);
    if (job->log_sum) dtype = DTYPE_F32;
    for (int64_t i = 0; i < dim; i += LANES)
        store_any(dtype, job->out, at + i, dim - i, load_f32(sum + i) * inverse);
    if (job->log_sum)
        job->log_sum[token * job->num_heads + unit->kv_head * group + row % group] =
            weight > 0 ? max / LOG2_E + logf(weight) : -INFINITY;
}

/* A chunk's result of a split unit, which is one query: max and weight of each head, products. */
INLINE float *partial_at(const attention_job *job, int64_t chunk, int64_t dim) {
    int64_t group = job->num_heads / job->kv.num_heads;
    return job->partials + chunk * group * (dim + 2);
}

INLINE void attend_block(const attention_job *job, const attention_unit *unit,
                         unit_memory *memory, int64_t row, int64_t key, int64_t first_position,
                         int64_t chunk) {
    int64_t group = job->num_heads / job->kv.num_heads, dim = memory->padded_dim;
    int64_t rows = min_i64(BLOCK_ROWS, memory->rows - row);
    int64_t first, end, unused;
    seen_keys(job, memory->span, first_position + row / group, key, &first, &unused);
    seen_keys(job, memory->span, first_position + (row + rows - 1) / group, key, &unused, &end);
    first = first / 32 * 32;
    end = (end + 31) / 32 * 32;
    if (first >= end) {
        assert(unit->partial < 0);
        return;
    }
    multiply_scores(memory, row, rows, first, end);
    /* All maxima before any weight: each ends in a chain of shuffles, and rows overlap in it. */
    seen_span spans[BLOCK_ROWS];
    float scale = job->scale * LOG2_E;
    for (int64_t i = 0; i < rows; ++i) {
        spans[i] = (seen_span){.block_first = first, .block_end = end};
        seen_keys(job, memory->span, first_position + (row + i) / group, key, &spans[i].first,
                  &spans[i].end);
        if (spans[i].first >= spans[i].end) spans[i].first = spans[i].end = 0;
        find_max(memory, i, spans[i], scale);
    }
    for (int64_t i = 0; i < rows; ++i) weigh_row(memory, i, spans[i], scale);
    multiply_values(memory, row, rows, first, end);
    if (unit->partial < 0) {
        merge_rows(rows, dim, memory->sum + row * dim, memory->max + row, memory->weight + row,
                   memory->product, memory->chunk_max, memory->chunk_weight);
    } else {
        float *partial = partial_at(job, unit->partial + chunk, dim);
        memcpy(partial, memory->chunk_max, (size_t)rows * 4);
        memcpy(partial + group, memory->chunk_weight, (size_t)rows * 4);
        memcpy(partial + 2 * group, memory->product, (size_t)(rows * dim) * 4);
    }
}

INLINE void attend_unit(int dtype, const attention_job *job, const attention_unit *unit,
                        unit_memory *memory) {
    int64_t sequence = unit->sequence;
    int64_t num_queries = job->query_start[sequence + 1] - job->query_start[sequence];
    int64_t first_position = job->context_len[sequence] - num_queries + unit->first_query;
    int64_t end_position = first_position + unit->num_queries;
    memory->configured = 0;
    pack_query(dtype, job, unit, memory);
    for (int64_t row = 0; row < memory->rows; ++row) {
        memory->max[row] = -INFINITY;
        memory->weight[row] = 0;
    }
    memset(memory->sum, 0, (size_t)(memory->rows * memory->padded_dim) * 4);
    int64_t first_span = job->span_start ? job->span_start[sequence] : 0;
    int64_t end_span = job->span_start ? job->span_start[sequence + 1] : 1;
    for (int64_t i = first_span; i < end_span; ++i) {
        memory->span = job->span_start ? job->spans[i] : (key_span){0, INT32_MAX};
        int64_t span_end = min_i64(end_position, memory->span.end);
        int64_t chunk = max_i64(unit->first_chunk, memory->span.first / KEY_CHUNK);
        for (; chunk < unit->end_chunk && chunk * KEY_CHUNK < span_end; ++chunk) {
            int64_t key = chunk * KEY_CHUNK;
            int64_t count = min_i64(span_end - key, KEY_CHUNK);
            if (job->kv.scaling) {
                locate_rows(job, unit, memory, key, count, 1);
                unscale_rows(dtype, job, memory, count);
            } else {
                locate_rows(job, unit, memory, key, count, dtype == DTYPE_F32 ? 4 : 2);
            }
            pack_keys(dtype, job, memory, (count + 31) / 32 * 32);
            pack_values(dtype, job, memory, (count + 31) / 32 * 32);
            for (int64_t row = 0; row < memory->rows; row += BLOCK_ROWS)
                attend_block(job, unit, memory, row, key, first_position,
                             chunk - unit->first_chunk);
        }
    }
    if (unit->partial < 0)
        for (int64_t row = 0; row < memory->rows; ++row)
            write_row(dtype, job, unit, row, memory->sum + row * memory->padded_dim,
                      memory->max[row], memory->weight[row]);
    finish_unit();
}

INLINE void attend_units(int dtype, const attention_job *job, int64_t begin, int64_t end) {
    int64_t group = job->num_heads / job->kv.num_heads;
    int64_t dim = (job->kv.head_dim + 31) / 32 * 32;
    int64_t max_rows = max_i64(group, UNIT_ROWS);
    max_rows = (max_rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    size_t bytes[] = {
        (size_t)(max_rows * dim) * sizeof(operand),
        (size_t)(KEY_CHUNK * dim) * sizeof(operand),
        (size_t)(KEY_CHUNK * dim) * sizeof(operand),
        BLOCK_ROWS * SCORE_STRIDE * 4,
        (size_t)(BLOCK_ROWS * dim) * 4,
        (size_t)(max_rows * dim) * 4,
        (size_t)max_rows * 4,
        (size_t)max_rows * 4,
        BLOCK_ROWS * 4,
        BLOCK_ROWS * 4,
        job->kv.scaling ? (size_t)(2 * KEY_CHUNK * dim) * 4 : 0,
    };
    enum { NUM_PARTS = sizeof bytes / sizeof bytes[0] };
    size_t offset[NUM_PARTS], total = 0;
    for (int i = 0; i < NUM_PARTS; ++i) {
        offset[i] = total;
        total += (bytes[i] + 63) & ~(size_t)63;
    }
    char *base = isthmus_scratch(SCRATCH_KERNEL, total);
    unit_memory memory = {
        .padded_dim = dim,
        .q = (operand *)(base + offset[0]),
        .keys = (operand *)(base + offset[1]),
        .values = (operand *)(base + offset[2]),
        .scores = (float *)(base + offset[3]),
        .weights = (operand *)(base + offset[3]),
        .product = (float *)(base + offset[4]),
        .sum = (float *)(base + offset[5]),
        .max = (float *)(base + offset[6]),
        .weight = (float *)(base + offset[7]),
        .chunk_max = (float *)(base + offset[8]),
        .chunk_weight = (float *)(base + offset[9]),
        .unscaled = base + offset[10],
    };
    for (int64_t i = begin; i < end; ++i) {
        const attention_unit *unit = &job->units[i];
        memory.rows = unit->num_queries * group;
        attend_unit(dtype, job, unit, &memory);
    }
}

/* Partial results of a split unit into its output, in the order of the chunks. The units given
 * here span all chunks of their siblings. */
INLINE void merge_units(int dtype, const attention_job *job, int64_t begin, int64_t end) {
    int64_t group = job->num_heads / job->kv.num_heads;
    int64_t dim = (job->kv.head_dim + 31) / 32 * 32;
    float *sum = isthmus_scratch(SCRATCH_KERNEL, (size_t)(group * (dim + 2)) * 4);
    float *max = sum + group * dim, *weight = max + group;
    for (int64_t i = begin; i < end; ++i) {
        const attention_unit *unit = &job->units[i];
        memset(sum, 0, (size_t)(group * dim) * 4);
        for (int64_t row = 0; row < group; ++row) {
            max[row] = -INFINITY;
            weight[row] = 0;
        }
        for (int64_t chunk = 0; chunk < unit->end_chunk - unit->first_chunk; ++chunk) {
            const float *partial = partial_at(job, unit->partial + chunk, dim);
            merge_rows(group, dim, sum, max, weight, partial + 2 * group, partial, partial + group);
        }
        for (int64_t row = 0; row < group; ++row)
            write_row(dtype, job, unit, row, sum + row * dim, max[row], weight[row]);
    }
}

#endif
