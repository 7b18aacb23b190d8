/* Rows of a pool at lower precision: a byte for each value, then their float32 scale. The same
 * bytes as engine/kv_cache/scaled_rows.py. */
#ifndef SCALED_ROW_H
#define SCALED_ROW_H

#include "vector.h"

typedef int8_t vb __attribute__((vector_size(16)));
typedef uint8_t vub __attribute__((vector_size(16)));

/* Keeps a rounded product from being fused with the addition that follows. */
INLINE vf rounded(vf v) {
    __asm__("" : "+m"(v));
    return v;
}

/* What `values_f32` gives is so many times too small. A power of two: nothing is rounded. */
INLINE float unit_of(const int64_t scaling) {
#if defined(__AVX512F__)
    if (scaling == SCALING_FP8) return 256.0f;
#endif
    (void)scaling;
    return 1.0f;
}

/* Sixteen values of a row, without their scale and unit. */
INLINE vf values_f32(const int64_t scaling, vub bytes) {
    if (scaling == SCALING_INT8) return __builtin_convertvector((vb)bytes, vf);
#if defined(__AVX512F__)
    /* Bits of a half, whose conversion knows what to do with exponent 0. */
    __m256i half = _mm256_slli_epi16(_mm256_cvtepu8_epi16((__m128i)bytes), 7);
    __m256i sign_half = _mm256_slli_epi16(_mm256_and_si256(half, _mm256_set1_epi16(0x4000)), 1);
    half = _mm256_or_si256(_mm256_and_si256(half, _mm256_set1_epi16(0x3f80)), sign_half);
    return (vf)_mm512_cvtph_ps(half);
#endif
    vu code = __builtin_convertvector(bytes, vu), magnitude = (code & 0x7f) << 20;
    vu sign = (code & 0x80) << 24;
    vf normal = (vf)(magnitude + (120u << 23)); /* biases are 7 and 127 */
    vf tiny = (vf)(magnitude + (121u << 23)) - splat(0x1p-6f); /* exponent 0: eighths of 2^-6 */
    vf v = select_f32((vi)(magnitude < (1u << 23)), tiny, normal);
    return (vf)((vu)v | sign);
}

/* Rows of whole vectors, `is_whole`, need no masks. */
INLINE void unscale_row(int dtype, const int64_t scaling, const int is_whole, const char *row,
                        int64_t dim, char *to) {
    float scale;
    memcpy(&scale, row + dim, sizeof scale);
    scale *= unit_of(scaling);
    for (int64_t i = 0; i < dim; i += LANES) {
        int64_t count = is_whole ? LANES : min_i64(dim - i, LANES);
        vub bytes = {0};
        memcpy(&bytes, row + i, (size_t)count);
        store_any(dtype, to, i, count, values_f32(scaling, bytes) * splat(scale));
    }
}

/* To the nearest whole number, ties to even; |v| is below 2^22. */
INLINE vub int8_from_f32(vf v) {
    const vf shift = splat(12582912.0f); /* 1.5 * 2^23 */
    vi whole = (vi)(rounded(v) + shift) - (vi)shift;
    return (vub)__builtin_convertvector(whole, vb);
}

/* To the nearest e4m3, ties to even. */
INLINE vub fp8_from_f32(vf v) {
    vu sign = ((vu)v >> 24) & 0x80, bits = (vu)v & 0x7fffffff;
    vf magnitude = select_f32((vi)(bits > 0x43e00000u), splat(448.0f), (vf)bits);
    bits = (vu)magnitude;
    vu normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120u << 3);
    vu tiny = (vu)(rounded(magnitude) + splat(16384.0f)) - (vu)splat(16384.0f); /* units of 2^-9 */
    vu is_tiny = (vu)(magnitude < splat(0x1p-6f));
    return __builtin_convertvector((tiny & is_tiny) | (normal & ~is_tiny) | sign, vub);
}

INLINE void scale_row(int dtype, int64_t scaling, const void *from, int64_t from_at, int64_t dim,
                      char *row) {
    vu largest = {0}; /* bits of a magnitude: in their order NaN comes after infinity */
    for (int64_t i = 0; i < dim; i += LANES) {
        vu bits = (vu)load_any(dtype, from, from_at + i, dim - i) & 0x7fffffff;
        vu is_larger = (vu)(bits > largest);
        largest = (bits & is_larger) | (largest & ~is_larger);
    }
    uint32_t most = 0;
    for (int lane = 0; lane < LANES; ++lane) most = largest[lane] > most ? largest[lane] : most;
    float amax;
    memcpy(&amax, &most, sizeof amax);
    float scale = most >= 0x7f800000u ? NAN : amax / (scaling == SCALING_INT8 ? 127.0f : 448.0f);
    if (scale < 0x1p-126f) scale = 0.0f;
    float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < dim; i += LANES) {
        vf v = load_any(dtype, from, from_at + i, dim - i) * splat(inverse);
        if (inverse == 0.0f) v = splat(0.0f); /* nothing is NaN, nor a zero with a sign */
        vub bytes = scaling == SCALING_INT8 ? int8_from_f32(v) : fp8_from_f32(v);
        memcpy(row + i, &bytes, (size_t)min_i64(dim - i, LANES));
    }
    memcpy(row + dim, &scale, sizeof scale);
}

#endif
