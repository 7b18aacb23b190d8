/* Linear layers as Python calls them: a weight packed, a product cut into items. */
#include "call.h"

#include <string.h>

EXPORT int64_t isthmus_packed_bytes(int dtype, int64_t num_out, int64_t inner) {
    int64_t features = round_up(num_out, PANEL);
    return dtype == DTYPE_F32 ? features * inner * 4 : features * round_up(inner, INNER_STEP) * 2;
}

/* Copies weight[num_out][inner] into panels; `packed` is zeroed memory. */
EXPORT void isthmus_pack(int dtype, const void *weight, int64_t stride, int64_t num_out,
                         int64_t inner, void *packed) {
    int64_t padded = dtype == DTYPE_F32 ? inner : round_up(inner, INNER_STEP);
    for (int64_t n = 0; n < num_out; ++n) {
        int64_t panel = n / PANEL * PANEL * padded, column = n % PANEL;
        if (dtype == DTYPE_F32) {
            const float *from = (const float *)weight + n * stride;
            float *to = (float *)packed + panel + column;
            for (int64_t k = 0; k < inner; ++k) to[k * PANEL] = from[k];
        } else {
            const uint16_t *from = (const uint16_t *)weight + n * stride;
            uint16_t *to = (uint16_t *)packed + panel + column / 16 * 512 + column % 16 * 2;
            for (int64_t k = 0; k < inner; ++k)
                to[k / INNER_STEP * 1024 + k % INNER_STEP / 2 * 32 + k % 2] = from[k];
        }
    }
}

/* Whether isthmus_linear takes `is_gated` for this many outputs, gates not counted. */
EXPORT int isthmus_has_gated(int dtype, int64_t num_out) {
    return isthmus_kernels->has_gated[dtype] && num_out % PANEL == 0;
}

void isthmus_run_linear(int dtype, linear_job job, int num_threads) {
    job.num_panels = (job.num_out + PANEL - 1) / PANEL;
    if (dtype == DTYPE_BF16 && job.inner % INNER_STEP) { /* the packed weight has zeros there */
        int64_t inner = job.inner;
        job.inner = round_up(inner, INNER_STEP);
        uint16_t *padded = isthmus_scratch(SCRATCH_CALL, (size_t)(job.num_rows * job.inner) * 2);
        for (int64_t row = 0; row < job.num_rows; ++row) {
            uint16_t *to = padded + row * job.inner;
            memcpy(to, (const uint16_t *)job.x + row * job.x_stride, (size_t)inner * 2);
            memset(to + inner, 0, (size_t)(job.inner - inner) * 2);
        }
        job.x = padded;
        job.x_stride = job.inner;
    }
    /* A range of rows stays in the second-level cache while all panels pass. */
    enum { RANGE_BYTES = 1 << 20, KEPT_ROWS = 128 };
    int64_t most_rows = RANGE_BYTES / (job.inner * element_bytes(dtype)) / 32 * 32;
    if (most_rows < 64) most_rows = 64;
    int64_t num_ranges = (job.num_rows + most_rows - 1) / most_rows;
    /* Where a panel is used often enough to be read by each thread, a thread keeps its rows; but of
     * a weight much larger than one range of all rows each thread reads a part. */
    int64_t num_weights = job.num_panels * PANEL * (job.is_gated ? 2 : 1);
    int is_shared = num_ranges == 1 && num_weights >= 4 * job.num_rows;
    if (num_threads > 1 && !is_shared && job.num_rows >= KEPT_ROWS * num_threads)
        num_ranges = round_up(num_ranges, num_threads);
    job.rows_per_range = round_up((job.num_rows + num_ranges - 1) / num_ranges, 32);
    isthmus_run(isthmus_kernels->linear[dtype], &job, num_ranges * job.num_panels, num_threads, 1);
}

/* `num_out` counts what is written: half the weight's rows if `is_gated`. */
EXPORT void isthmus_linear(int dtype, const void *x, int64_t x_stride, const void *packed,
                           const float *bias, void *out, int out_f32, int is_gated,
                           int64_t num_rows, int64_t inner, int64_t num_out, int num_threads) {
    linear_job job = {
        .x = x,
        .packed = packed,
        .bias = bias,
        .out = out,
        .x_stride = x_stride,
        .out_stride = num_out,
        .num_rows = num_rows,
        .inner = inner,
        .num_out = num_out,
        .out_f32 = out_f32,
        .is_gated = is_gated,
    };
    isthmus_run_linear(dtype, job, num_threads);
}
