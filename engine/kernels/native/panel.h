/* The inner product of a few rows with one panel of 32 output features, in float32 vectors. */
#ifndef PANEL_H
#define PANEL_H

#include "vector.h"

#if defined(__AVX512F__)
enum { ROW_BLOCK = 8 };
#else
enum { ROW_BLOCK = 2 };
#endif

/* c[row][0..32) = sum over k of x[row][k] * panel[k][0..32), always in the order of k, so that a
 * row's result does not depend on the rows beside it. */
INLINE void panel_f32(const int rows, const float *x, int64_t x_stride, const float *panel,
                      int64_t inner, float *c, int64_t c_stride) {
    vf sum[ROW_BLOCK][2];
    for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = (vf){0};
    for (int64_t k = 0; k < inner; ++k, panel += PANEL) {
        vf low = load_f32(panel), high = load_f32(panel + LANES);
        __builtin_prefetch(panel + 1024);
        __builtin_prefetch(panel + 1024 + LANES);
        for (int row = 0; row < rows; ++row) {
            vf v = splat(x[row * x_stride + k]);
            sum[row][0] += low * v;
            sum[row][1] += high * v;
        }
    }
    for (int row = 0; row < rows; ++row) {
        store_f32(c + row * c_stride, sum[row][0]);
        store_f32(c + row * c_stride + LANES, sum[row][1]);
    }
}

/* The same with a bf16 panel in pairs; x is float32 and `inner` a multiple of 32. */
INLINE void panel_bf16(const int rows, const float *x, int64_t x_stride, const char *panel,
                       int64_t inner, float *c, int64_t c_stride) {
    vf sum[ROW_BLOCK][2];
    for (int row = 0; row < rows; ++row) sum[row][0] = sum[row][1] = (vf){0};
    for (int64_t k = 0; k < inner; k += INNER_STEP, panel += PANEL_STEP_BYTES) {
        for (int64_t pair = 0; pair < INNER_STEP / 2; ++pair) {
            vu low, high;
            memcpy(&low, panel + pair * 64, 64);
            memcpy(&high, panel + PANEL_STEP_BYTES / 2 + pair * 64, 64);
            __builtin_prefetch(panel + 4096 + pair * 64);
            __builtin_prefetch(panel + 4096 + PANEL_STEP_BYTES / 2 + pair * 64);
            for (int row = 0; row < rows; ++row) {
                const float *at = x + row * x_stride + k + 2 * pair;
                vf even = splat(at[0]), odd = splat(at[1]);
                sum[row][0] += (vf)(low << 16) * even;
                sum[row][1] += (vf)(high << 16) * even;
                sum[row][0] += (vf)(low & 0xffff0000u) * odd;
                sum[row][1] += (vf)(high & 0xffff0000u) * odd;
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        store_f32(c + row * c_stride, sum[row][0]);
        store_f32(c + row * c_stride + LANES, sum[row][1]);
    }
}

/* Any number of rows, in blocks whose size the compiler knows. */
INLINE void panel_rows(int dtype, int64_t rows, const float *x, int64_t x_stride,
                       const void *panel, int64_t inner, float *c, int64_t c_stride) {
#define PANEL_BLOCK(size)                                                                   \
    for (; (size) <= ROW_BLOCK && rows >= (size); rows -= (size)) {                         \
        if (dtype == DTYPE_F32)                                                             \
            panel_f32(size, x, x_stride, (const float *)panel, inner, c, c_stride);         \
        else                                                                                \
            panel_bf16(size, x, x_stride, (const char *)panel, inner, c, c_stride);         \
        x += (size) * x_stride;                                                             \
        c += (size) * c_stride;                                                             \
    }
#if defined(__AVX512F__)
    PANEL_BLOCK(8)
    PANEL_BLOCK(4)
#endif
    PANEL_BLOCK(2)
    PANEL_BLOCK(1)
#undef PANEL_BLOCK
}

/* Adds the bias and stores one row's share of a panel; features past the last are dropped. */
INLINE void store_panel_row(int dtype, const float *c, const float *bias, void *out, int64_t at,
                            int64_t count) {
    for (int64_t i = 0; i < PANEL && i < count; i += LANES) {
        vf v = load_f32(c + i);
        if (bias) v += load_any(DTYPE_F32, bias, i, count - i);
        store_any(dtype, out, at + i, count - i, v);
    }
}

#endif
