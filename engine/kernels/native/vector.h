/* Sixteen floats at a time in the compiler's vector extension: one source for every CPU.
 * Included by files that are compiled once per instruction set. */
#ifndef VECTOR_H
#define VECTOR_H

#include "isthmus.h"

#include <math.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { LANES = 16 };
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

/* Inlining keeps vectors out of calls, whose convention depends on the instruction set. */
#define INLINE static inline __attribute__((always_inline))

INLINE vf load_f32(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_f32(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf vf_from_bf16(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

/* Round to nearest even; NaN stays NaN. */
INLINE vh bf16_from_vf(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#endif
    vu u = (vu)v;
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vu is_nan = (vu)(v != v);
    rounded = (rounded & ~is_nan) | (0x7fc0 & is_nan);
    return __builtin_convertvector(rounded, vh);
}

INLINE float f32_from_bf16(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE uint16_t bf16_from_f32(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f != f) return 0x7fc0;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* Sixteen elements of either dtype, the first `count` of them real. */
INLINE vf load_any(int dtype, const void *base, int64_t index, int64_t count) {
    if (dtype == DTYPE_F32) {
        const float *p = (const float *)base + index;
        if (count >= LANES) return load_f32(p);
        vf v = {0};
        memcpy(&v, p, (size_t)count * 4);
        return v;
    }
    vh h = {0};
    const uint16_t *p = (const uint16_t *)base + index;
    if (count >= LANES)
        memcpy(&h, p, sizeof h);
    else
        memcpy(&h, p, (size_t)count * 2);
    return vf_from_bf16(h);
}
INLINE void store_any(int dtype, void *base, int64_t index, int64_t count, vf v) {
    if (count > LANES) count = LANES;
    if (dtype == DTYPE_F32) {
        float *p = (float *)base + index;
        if (count == LANES)
            memcpy(p, &v, sizeof v);
        else
            memcpy(p, &v, (size_t)count * 4);
        return;
    }
    vh h = bf16_from_vf(v);
    uint16_t *p = (uint16_t *)base + index;
    if (count == LANES)
        memcpy(p, &h, sizeof h);
    else
        memcpy(p, &h, (size_t)count * 2);
}
/* What the value becomes once stored: transformers rounds after each operation. */
INLINE vf round_any(int dtype, vf v) {
    return dtype == DTYPE_F32 ? v : vf_from_bf16(bf16_from_vf(v));
}

#if defined(__AVX512BF16__)
/* Thirty-two bf16 as the floats of even and of odd index: taking them apart so, and rounding them
 * together, costs a third of what two halves of sixteen cost. */
typedef struct {
    vf even, odd;
} vf_pair;

INLINE vf_pair pair_from_bf16(__m512i h) {
    return (vf_pair){(vf)_mm512_slli_epi32(h, 16),
                     (vf)_mm512_and_si512(h, _mm512_set1_epi32((int)0xffff0000))};
}
INLINE vf_pair load_pair(const uint16_t *p) { return pair_from_bf16(_mm512_loadu_si512(p)); }

INLINE __m512i bf16_from_pair(vf_pair v) {
    const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                              24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
                                              1, 16, 0);
    __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.odd, (__m512)v.even);
    return _mm512_permutexvar_epi16(in_turns, halves);
}
#endif

INLINE float sum_lanes(vf v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) s[i] += s[i + width];
    return s[0];
}
INLINE float max_lanes(vf v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) s[i] = s[i] > s[i + width] ? s[i] : s[i + width];
    return s[0];
}
INLINE vf select_f32(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf max_f32(vf a, vf b) { return select_f32(a > b, a, b); }

/* 2^x within 2 units in the last place; 0 far below -126, inf above 128; NaN stays NaN.
 * Minimax polynomial of 2^f on [-0.5, 0.5]; the integer part goes straight into the exponent. */
INLINE vf exp2_polynomial(vf f) {
    vf p = splat(1.535336188319500e-4f);
    p = p * f + splat(1.339887440266574e-3f);
    p = p * f + splat(9.618437357674640e-3f);
    p = p * f + splat(5.550332471162809e-2f);
    p = p * f + splat(2.402264791363012e-1f);
    p = p * f + splat(6.931472028550421e-1f);
    return p * f + splat(1.0f);
}
INLINE vf exp2_f32(vf x) {
#if defined(__AVX512F__)
    __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-160.0f), (__m512)x); /* NaN stays NaN */
    bounded = _mm512_min_ps(_mm512_set1_ps(160.0f), bounded);
    __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm512_scalef_ps((__m512)exp2_polynomial((vf)bounded - (vf)whole), whole);
#else
    vf clamped = select_f32(x < splat(-126.0f), splat(-126.0f), x);
    clamped = select_f32(clamped > splat(127.99f), splat(127.99f), clamped);
    vf shifted = clamped + splat(12582912.0f); /* 1.5 * 2^23: rounds to an integer */
    vi exponent = (vi)shifted << 23;
    vf p = exp2_polynomial(clamped - (shifted - splat(12582912.0f)));
    vf y = (vf)((vi)p + exponent);
    y = select_f32(x < splat(-126.0f), splat(0.0f), y);
    y = select_f32(x > splat(127.99f), splat(INFINITY), y);
    return select_f32(x != x, x, y);
#endif
}

#define LOG2_E 1.44269504088896341f

#if defined(__AVX512F__)
/* 2^x within 2^-18, for what is rounded to 2^-9 soon after; 0 far below -126 and at -inf, inf from
 * 128 on, NaN stays NaN. Minimax polynomial of 2^f on [0, 1); the integer part goes straight into
 * the exponent. */
INLINE __m512 exp2_rough(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(1.35341678e-2f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.20114601e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.41442755e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93003833e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.00000262f));
    return _mm512_scalef_ps(p, x); /* times 2^floor(x) */
}
#endif

/* gate * sigmoid(gate). For bf16 the quotient is an approximation far below its rounding. */
INLINE vf silu_any(int dtype, vf gate) {
#if defined(__AVX512F__)
    if (dtype == DTYPE_BF16) {
        __m512 x = _mm512_mul_ps((__m512)gate, _mm512_set1_ps(-LOG2_E));
        /* 2^126 at most: the reciprocal of more would be lost, and inf * 0 below be NaN. */
        __m512 d = _mm512_add_ps(exp2_rough(x), _mm512_set1_ps(1.0f));
        d = _mm512_min_ps(_mm512_set1_ps(0x1p126f), d);
        __m512 r = _mm512_rcp14_ps(d);
        r = _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f)));
        return gate * (vf)r;
    }
#endif
    (void)dtype;
    return gate / (splat(1.0f) + exp2_f32(gate * splat(-LOG2_E)));
}

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

#endif
