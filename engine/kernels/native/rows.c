/* Norms, activation, rotation: memory-bound work on rows. Compiled once per instruction set; the
 * `dtype` arguments are constants in each instance, so the branches on them vanish. */
#include "scaled_row.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(base) PASTE(base, LEVEL)

/* Squares are summed in this many vectors, so that no addition waits for the one before. */
enum { NUM_SUMS = 4 };

#if defined(__AVX512BF16__)
/* norm_row for rows of whole pairs. */
INLINE void norm_pairs(const uint16_t *x, uint16_t *residual, const uint16_t *weight, float eps,
                       int64_t dim, uint16_t *out) {
    vf squares[NUM_SUMS] = {0};
    for (int64_t i = 0, sum = 0; i < dim; i += 32, sum = (sum + 2) % NUM_SUMS) {
        vf_pair v = load_pair(x + i);
        if (residual) {
            vf_pair kept = load_pair(residual + i);
            v.even += kept.even;
            v.odd += kept.odd;
            __m512i rounded = bf16_from_pair(v);
            _mm512_storeu_si512(residual + i, rounded);
            v = pair_from_bf16(rounded);
        }
        squares[sum] += v.even * v.even;
        squares[sum + 1] += v.odd * v.odd;
    }
    for (int sum = 1; sum < NUM_SUMS; ++sum) squares[0] += squares[sum];
    if (residual) x = residual;
    vf scale = splat(1.0f / sqrtf(sum_lanes(squares[0]) / (float)dim + eps));
    for (int64_t i = 0; i < dim; i += 32) {
        vf_pair v = load_pair(x + i), by = load_pair(weight + i);
        v.even *= scale;
        v.odd *= scale;
        v = pair_from_bf16(bf16_from_pair(v));
        v.even *= by.even;
        v.odd *= by.odd;
        _mm512_storeu_si512(out + i, bf16_from_pair(v));
    }
}
#endif

/* Writes norm(x + residual) * weight, and the sum, rounded, to the residual if there is one. Rows
 * of whole vectors, `is_whole`, need no masks. */
INLINE void norm_row(int dtype, const int is_whole, const void *x, int64_t x_at, void *residual,
                     int64_t residual_at, const void *weight, float eps, int64_t dim, void *out,
                     int64_t out_at) {
#if defined(__AVX512BF16__)
    if (dtype == DTYPE_BF16 && dim % 32 == 0) {
        norm_pairs((const uint16_t *)x + x_at, residual ? (uint16_t *)residual + residual_at : NULL,
                   weight, eps, dim, (uint16_t *)out + out_at);
        return;
    }
#endif
#define COUNT(i) (is_whole ? LANES : dim - (i))
    vf squares[NUM_SUMS] = {0};
    for (int64_t i = 0, sum = 0; i < dim; i += LANES, sum = (sum + 1) % NUM_SUMS) {
        vf v = load_any(dtype, x, x_at + i, COUNT(i));
        if (residual) {
            v = round_any(dtype, v + load_any(dtype, residual, residual_at + i, COUNT(i)));
            store_any(dtype, residual, residual_at + i, COUNT(i), v);
        }
        squares[sum] += v * v;
    }
    for (int sum = 1; sum < NUM_SUMS; ++sum) squares[0] += squares[sum];
    if (residual) x = residual, x_at = residual_at;
    vf scale = splat(1.0f / sqrtf(sum_lanes(squares[0]) / (float)dim + eps));
    for (int64_t i = 0; i < dim; i += LANES) {
        vf v = round_any(dtype, load_any(dtype, x, x_at + i, COUNT(i)) * scale);
        store_any(dtype, out, out_at + i, COUNT(i), v * load_any(dtype, weight, i, COUNT(i)));
    }
#undef COUNT
}

INLINE void norm_rows(int dtype, const norm_job *job, int64_t begin, int64_t end) {
    int64_t dim = job->dim;
    for (int64_t row = begin; row < end; ++row) {
        if (dim % LANES == 0)
            norm_row(dtype, 1, job->x, row * job->x_stride, job->residual, row * dim, job->weight,
                     job->eps, dim, job->out, row * job->out_stride);
        else
            norm_row(dtype, 0, job->x, row * job->x_stride, job->residual, row * dim, job->weight,
                     job->eps, dim, job->out, row * job->out_stride);
    }
}

INLINE void silu_rows(int dtype, const silu_job *job, int64_t begin, int64_t end) {
    int64_t dim = job->dim;
    for (int64_t row = begin; row < end; ++row) {
        int64_t at = row * 2 * dim;
        for (int64_t i = 0; i < dim; i += LANES) {
            vf gate = load_any(dtype, job->gate_up, at + i, dim - i);
            vf up = load_any(dtype, job->gate_up, at + dim + i, dim - i);
            vf silu = round_any(dtype, silu_any(dtype, gate));
            store_any(dtype, job->out, row * dim + i, dim - i, silu * up);
        }
    }
}

/* Rotates one head; `to` may not overlap `from`. */
INLINE void rotate_head(int dtype, const int is_whole, const void *from, int64_t from_at,
                        const float *cos, const float *sin, int64_t half, void *to,
                        int64_t to_at) {
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t count = is_whole ? LANES : half - i;
        vf low = load_any(dtype, from, from_at + i, count);
        vf high = load_any(dtype, from, from_at + half + i, count);
        vf c = load_any(DTYPE_F32, cos, i, count), s = load_any(DTYPE_F32, sin, i, count);
        store_any(dtype, to, to_at + i, count, low * c - high * s);
        store_any(dtype, to, to_at + half + i, count, high * c + low * s);
    }
}

INLINE void rope_rows(int dtype, const rope_job *job, int64_t begin, int64_t end) {
    int64_t num_heads = job->num_heads, num_kv_heads = job->kv.num_heads, dim = job->kv.head_dim;
    int64_t half = dim / 2;
    size_t width = dtype == DTYPE_F32 ? 4 : 2;
    char *normed = isthmus_scratch(SCRATCH_KERNEL, (size_t)dim * 8), *rotated = normed + dim * 4;
    char *pool = job->kv_memory;
    for (int64_t row = begin; row < end; ++row) {
        const float *cos = job->cos + row * half, *sin = job->sin + row * half;
        int64_t block = job->slot[row] / job->kv.block_size;
        int64_t offset = job->slot[row] % job->kv.block_size;
        for (int64_t head = 0; head < num_heads + num_kv_heads; ++head) {
            int is_query = head < num_heads;
            const void *from = job->qkv;
            int64_t from_at = row * job->qkv_stride + head * dim;
            const void *norm = is_query ? job->q_norm : job->k_norm;
            if (norm) {
                norm_row(dtype, 0, from, from_at, NULL, 0, norm, job->eps, dim, normed, 0);
                from = normed;
                from_at = 0;
            }
            int64_t pool_at = block * job->kv.block_stride +
                              (head - num_heads) * job->kv.head_stride +
                              offset * job->kv.slot_stride;
            int is_scaled = !is_query && job->kv.scaling;
            void *to = is_query ? job->q_out : is_scaled ? rotated : pool;
            int64_t to_at = is_query ? (row * num_heads + head) * dim : is_scaled ? 0 : pool_at;
            if (half % LANES == 0)
                rotate_head(dtype, 1, from, from_at, cos, sin, half, to, to_at);
            else
                rotate_head(dtype, 0, from, from_at, cos, sin, half, to, to_at);
            if (is_scaled) scale_row(dtype, job->kv.scaling, rotated, 0, dim, pool + pool_at);
        }
        for (int64_t head = 0; head < num_kv_heads; ++head) {
            int64_t from_at = row * job->qkv_stride + (num_heads + num_kv_heads + head) * dim;
            int64_t to_at = block * job->kv.block_stride + job->kv.side_stride +
                            head * job->kv.head_stride + offset * job->kv.slot_stride;
            if (job->kv.scaling)
                scale_row(dtype, job->kv.scaling, job->qkv, from_at, dim, pool + to_at);
            else
                memcpy(pool + to_at * (int64_t)width,
                       (const char *)job->qkv + from_at * (int64_t)width, (size_t)dim * width);
        }
    }
}

#define ROW_KERNEL(name, body, type, suffix, dtype)                               \
    static void name##_##suffix(const void *job, int64_t begin, int64_t end) {    \
        body(dtype, (const type *)job, begin, end);                               \
    }
#define ROW_KERNELS(name, body, type)              \
    ROW_KERNEL(name, body, type, f32, DTYPE_F32)   \
    ROW_KERNEL(name, body, type, bf16, DTYPE_BF16)

ROW_KERNELS(rms_norm, norm_rows, norm_job)
ROW_KERNELS(silu_mul, silu_rows, silu_job)
ROW_KERNELS(rope, rope_rows, rope_job)

void NAME(isthmus_fill_rows)(kernel_table *table);
void NAME(isthmus_fill_rows)(kernel_table *table) {
    table->rms_norm[DTYPE_F32] = rms_norm_f32;
    table->rms_norm[DTYPE_BF16] = rms_norm_bf16;
    table->silu_mul[DTYPE_F32] = silu_mul_f32;
    table->silu_mul[DTYPE_BF16] = silu_mul_bf16;
    table->rope[DTYPE_F32] = rope_f32;
    table->rope[DTYPE_BF16] = rope_bf16;
}
