/* Linear layers with VDPBF16PS, for CPUs that have it and no AMX. */
#if defined(__x86_64__)
#include "vector.h"

#include <immintrin.h>

enum { BLOCK_ROWS = 8 };

INLINE void block(const int rows, const uint16_t *x, int64_t x_stride, const char *panel,
                  int64_t inner, float *c) {
    __m512 sum[BLOCK_ROWS][2];
    for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inner; k += INNER_STEP, panel += PANEL_STEP_BYTES) {
        for (int64_t pair = 0; pair < INNER_STEP / 2; ++pair) {
            __m512bh low = (__m512bh)_mm512_load_si512(panel + pair * 64);
            __m512bh high = (__m512bh)_mm512_load_si512(panel + PANEL_STEP_BYTES / 2 + pair * 64);
            _mm_prefetch(panel + 4096 + pair * 64, _MM_HINT_T0);
            _mm_prefetch(panel + 4096 + PANEL_STEP_BYTES / 2 + pair * 64, _MM_HINT_T0);
            for (int row = 0; row < rows; ++row) {
                int32_t both;
                memcpy(&both, x + row * x_stride + k + 2 * pair, 4);
                __m512bh v = (__m512bh)_mm512_set1_epi32(both);
                sum[row][0] = _mm512_dpbf16_ps(sum[row][0], low, v);
                sum[row][1] = _mm512_dpbf16_ps(sum[row][1], high, v);
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        _mm512_storeu_ps(c + row * PANEL, sum[row][0]);
        _mm512_storeu_ps(c + row * PANEL + 16, sum[row][1]);
    }
}

static void linear_avx512_bf16(const void *opaque, int64_t begin, int64_t end) {
    const linear_job *job = opaque;
    int64_t panel_bytes = job->inner * PANEL * 2;
    float c[BLOCK_ROWS * PANEL];
    for (int64_t item = begin; item < end; ++item) {
        int64_t range = item / job->num_panels, feature = item % job->num_panels * PANEL;
        int64_t last_row = min_i64((range + 1) * job->rows_per_range, job->num_rows);
        const char *panel = (const char *)job->packed + item % job->num_panels * panel_bytes;
        int64_t rows;
        for (int64_t row = range * job->rows_per_range; row < last_row; row += rows) {
            const uint16_t *x = (const uint16_t *)job->x + row * job->x_stride;
            rows = last_row - row >= 8 ? 8 : last_row - row >= 4 ? 4 : last_row - row >= 2 ? 2 : 1;
            if (rows == 8)
                block(8, x, job->x_stride, panel, job->inner, c);
            else if (rows == 4)
                block(4, x, job->x_stride, panel, job->inner, c);
            else if (rows == 2)
                block(2, x, job->x_stride, panel, job->inner, c);
            else
                block(1, x, job->x_stride, panel, job->inner, c);
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t k = 0; k < PANEL && feature + k < job->num_out; k += LANES) {
                    int64_t count = job->num_out - feature - k;
                    vf v = load_f32(c + i * PANEL + k);
                    if (job->bias) v += load_any(DTYPE_F32, job->bias, feature + k, count);
                    store_any(job->out_f32 ? DTYPE_F32 : DTYPE_BF16, job->out,
                              (row + i) * job->out_stride + feature + k, count, v);
                }
        }
    }
}

void isthmus_fill_dot(kernel_table *table) {
    table->linear[DTYPE_BF16] = linear_avx512_bf16;
}
#endif
