/* Sums over ranks, in rank order, so that every rank gets the same bits.
 *
 * 16-bit numbers are summed in float32 and rounded once, to nearest even, as torch rounds.
 */
#include "collectives.h"

#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

enum { SUM_BLOCK = 2048 };
enum dtype { F32 = 0, BF16 = 1, F16 = 2, F64 = 3, I32 = 4, I64 = 5 };

static inline __attribute__((always_inline)) float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline __attribute__((always_inline)) uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

static inline __attribute__((always_inline)) float from_f16(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    float f;
    memcpy(&f, &magnitude, 4);
    f *= 0x1p112f; /* rebias the exponent; subnormals come out right */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    bits = magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : bits;
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&f, &bits, 4);
    return f;
}

static inline __attribute__((always_inline)) uint16_t to_f16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    float small;
    memcpy(&small, &magnitude, 4);
    small += 0.5f; /* a subnormal's bits fall out of the addition's own rounding */
    uint32_t subnormal;
    memcpy(&subnormal, &small, 4);
    subnormal -= 0x3f000000;
    uint32_t h = magnitude < 0x38800000 ? subnormal : normal;
    h = magnitude >= 0x477ff000 ? 0x7c00 : h;
    h = magnitude > 0x7f800000 ? 0x7e00 : h;
    return (uint16_t)(sign | h);
}

#define SAME(x) (x)
#define DEFINE_SUM(NAME, TYPE, WIDE, LOAD, STORE)                                            \
    static inline __attribute__((always_inline)) void NAME##_body(                           \
        TYPE *out, const TYPE *const *parts, int num_parts, int64_t count) {                 \
        WIDE total[SUM_BLOCK];                                                               \
        for (int64_t start = 0; start < count; start += SUM_BLOCK) {                         \
            int64_t n = smaller(SUM_BLOCK, count - start);                                   \
            for (int64_t i = 0; i < n; ++i) total[i] = LOAD(parts[0][start + i]);            \
            for (int r = 1; r < num_parts; ++r) {                                            \
                const TYPE *part = parts[r] + start;                                         \
                for (int64_t i = 0; i < n; ++i) total[i] += LOAD(part[i]);                   \
            }                                                                                \
            for (int64_t i = 0; i < n; ++i) out[start + i] = STORE(total[i]);                \
        }                                                                                    \
    }
DEFINE_SUM(sum_f32, float, float, SAME, SAME)
DEFINE_SUM(sum_bf16, uint16_t, float, from_bf16, to_bf16)
DEFINE_SUM(sum_f16, uint16_t, float, from_f16, to_f16)
DEFINE_SUM(sum_f64, double, double, SAME, SAME)
DEFINE_SUM(sum_i32, uint32_t, uint32_t, SAME, SAME) /* unsigned: overflow wraps, as in torch */
DEFINE_SUM(sum_i64, uint64_t, uint64_t, SAME, SAME)

#define SUM_BODY                                                                             \
    switch (dtype) {                                                                         \
    case F32: sum_f32_body(out, (const float *const *)parts, num_parts, count); break;       \
    case BF16: sum_bf16_body(out, (const uint16_t *const *)parts, num_parts, count); break;  \
    case F16: sum_f16_body(out, (const uint16_t *const *)parts, num_parts, count); break;    \
    case F64: sum_f64_body(out, (const double *const *)parts, num_parts, count); break;      \
    case I32: sum_i32_body(out, (const uint32_t *const *)parts, num_parts, count); break;    \
    case I64: sum_i64_body(out, (const uint64_t *const *)parts, num_parts, count); break;    \
    }

typedef void sum_fn(int dtype, void *out, const void *const *parts, int num_parts, int64_t count);

static void sum_portable(int dtype, void *out, const void *const *parts, int num_parts,
                         int64_t count) {
    SUM_BODY
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void sum_avx2(int dtype, void *out,
                                                     const void *const *parts, int num_parts,
                                                     int64_t count) {
    SUM_BODY
}
#endif

static sum_fn *best_sum = sum_portable;

__attribute__((constructor)) static void choose_sum(void) {
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1 /* xsave */)) return;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 5 & 1 /* avx2 */)) return;
    uint32_t states, high;
    __asm__ volatile("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
    if ((states & 6) == 6) best_sum = sum_avx2;
#endif
}

void isthmus_rank_sum(int dtype, void *out, const void *const *parts, int num_parts,
                      int64_t count) {
    best_sum(dtype, out, parts, num_parts, count);
}

int64_t isthmus_item_bytes(int dtype) {
    static const int64_t bytes[] = {4, 2, 2, 8, 4, 8};
    return bytes[dtype];
}
