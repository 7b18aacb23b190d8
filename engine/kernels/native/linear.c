/* Linear layers in float32 vectors. Compiled once per instruction set. */
#include "panel.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(base) PASTE(base, LEVEL)

enum { LINEAR_ROWS = 32 };

INLINE void linear_panels(int dtype, const linear_job *job, int64_t begin, int64_t end) {
    int64_t inner = job->inner;
    size_t panel_bytes = (size_t)inner * PANEL * (dtype == DTYPE_F32 ? 4 : 2);
    float *x_f32 = isthmus_scratch(SCRATCH_KERNEL, (size_t)inner * LINEAR_ROWS * 4);
    float c[LINEAR_ROWS * PANEL];
    for (int64_t item = begin; item < end; ++item) {
        int64_t range = item / job->num_panels, panel = item % job->num_panels;
        int64_t last_row = min_i64((range + 1) * job->rows_per_range, job->num_rows);
        int64_t feature = panel * PANEL;
        const float *bias = job->bias ? job->bias + feature : NULL;
        for (int64_t row = range * job->rows_per_range; row < last_row; row += LINEAR_ROWS) {
            int64_t rows = min_i64(LINEAR_ROWS, last_row - row);
            const float *x = (const float *)job->x + row * job->x_stride;
            int64_t x_stride = job->x_stride;
            if (dtype == DTYPE_BF16) {
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t k = 0; k < inner; k += LANES)
                        store_f32(x_f32 + i * inner + k,
                                  load_any(dtype, job->x, (row + i) * job->x_stride + k, LANES));
                x = x_f32;
                x_stride = inner;
            }
            panel_rows(dtype, rows, x, x_stride,
                       (const char *)job->packed + (size_t)panel * panel_bytes, inner, c, PANEL);
            for (int64_t i = 0; i < rows; ++i) {
                int64_t at = (row + i) * job->out_stride + feature;
                int64_t count = job->num_out - feature;
                if (dtype == DTYPE_F32 || job->out_f32)
                    store_panel_row(DTYPE_F32, c + i * PANEL, bias, job->out, at, count);
                else
                    store_panel_row(DTYPE_BF16, c + i * PANEL, bias, job->out, at, count);
            }
        }
    }
}

static void linear_f32(const void *job, int64_t begin, int64_t end) {
    linear_panels(DTYPE_F32, (const linear_job *)job, begin, end);
}
static void linear_bf16(const void *job, int64_t begin, int64_t end) {
    linear_panels(DTYPE_BF16, (const linear_job *)job, begin, end);
}

void NAME(isthmus_fill_linear)(kernel_table *table);
void NAME(isthmus_fill_linear)(kernel_table *table) {
    table->linear[DTYPE_F32] = linear_f32;
    table->linear[DTYPE_BF16] = linear_bf16;
}
