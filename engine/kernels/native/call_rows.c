/* Norms, activation and rotation as Python calls them. */
#include "call.h"

enum { SMALL_CALL = 16384 /* elements of a row operation that one thread does sooner alone */ };

static int threads_for(int64_t num_elements, int num_threads) {
    return num_elements < SMALL_CALL ? 1 : num_threads;
}

void isthmus_run_norm(int dtype, norm_job job, int64_t num_rows, int num_threads) {
    isthmus_run(isthmus_kernels->rms_norm[dtype], &job, num_rows,
                threads_for(num_rows * job.dim, num_threads), 1);
}

void isthmus_run_silu(int dtype, silu_job job, int64_t num_rows, int num_threads) {
    isthmus_run(isthmus_kernels->silu_mul[dtype], &job, num_rows,
                threads_for(num_rows * job.dim, num_threads), 1);
}

void isthmus_run_rope(int dtype, rope_job job, int64_t num_rows, int num_threads) {
    int64_t elements = num_rows * (job.num_heads + 2 * job.kv.num_heads) * job.kv.head_dim;
    isthmus_run(isthmus_kernels->rope[dtype], &job, num_rows, threads_for(elements, num_threads),
                1);
}

EXPORT void isthmus_rms_norm(int dtype, const void *x, int64_t x_stride, void *residual,
                             const void *weight, float eps, void *out, int64_t num_rows,
                             int64_t dim, int num_threads) {
    norm_job job = {
        .x = x,
        .residual = residual,
        .weight = weight,
        .out = out,
        .x_stride = x_stride,
        .out_stride = dim,
        .dim = dim,
        .eps = eps,
    };
    isthmus_run_norm(dtype, job, num_rows, num_threads);
}

EXPORT void isthmus_silu_mul(int dtype, const void *gate_up, void *out, int64_t num_rows,
                             int64_t dim, int num_threads) {
    silu_job job = {.gate_up = gate_up, .out = out, .dim = dim};
    isthmus_run_silu(dtype, job, num_rows, num_threads);
}

EXPORT void isthmus_rope(int dtype, const void *qkv, int64_t qkv_stride, const float *cos,
                         const float *sin, const void *q_norm, const void *k_norm, float eps,
                         const int64_t *slot, void *kv, const kv_shape *shape,
                         int64_t num_heads, void *q_out, int64_t num_rows, int num_threads) {
    rope_job job = {
        .qkv = qkv,
        .q_out = q_out,
        .kv_memory = kv,
        .cos = cos,
        .sin = sin,
        .q_norm = q_norm,
        .k_norm = k_norm,
        .slot = slot,
        .qkv_stride = qkv_stride,
        .num_heads = num_heads,
        .kv = *shape,
        .eps = eps,
    };
    isthmus_run_rope(dtype, job, num_rows, num_threads);
}
