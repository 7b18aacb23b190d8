/* XXH3 of 64 bits with seed 0, of more than 240 bytes that come in parts.
 * Source: xxHash's specification and its BSD-licensed reference, 0.8. */
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { STRIPE_BYTES = 64, STRIPES_OF_BLOCK = 16, SECRET_BYTES = 192, XXH3_LEAST_BYTES = 241 };

static const uint8_t secret[SECRET_BYTES] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static const uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
static const uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu;
static const uint64_t P64_3 = 0x165667B19E3779F9u, P64_4 = 0x85EBCA77C2B2AE63u;
static const uint64_t P64_5 = 0x27D4EB2F165667C5u;

typedef struct {
    uint64_t acc[8];
    uint8_t part[STRIPE_BYTES]; /* of a stripe that is not whole yet */
    uint8_t last[STRIPE_BYTES]; /* what came last */
    int64_t num_bytes;          /* in all */
    int64_t stripes_left;       /* of those that are taken in turn */
    int num_part, stripe_of_block;
} xxh3;

static inline uint64_t load64(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

static void xxh3_begin(xxh3 *hash, int64_t num_bytes) {
    const uint64_t begin[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    memset(hash, 0, sizeof *hash);
    memcpy(hash->acc, begin, sizeof begin);
    hash->num_bytes = num_bytes;
    hash->stripes_left = (num_bytes - 1) / STRIPE_BYTES;
}

static void accumulate(uint64_t *acc, const uint8_t *from, const uint8_t *key) {
    for (int i = 0; i < 8; ++i) {
        uint64_t value = load64(from + 8 * i), keyed = value ^ load64(key + 8 * i);
        acc[i ^ 1] += value;
        acc[i] += (keyed & 0xffffffffu) * (keyed >> 32);
    }
}

static void scramble(uint64_t *acc) {
    for (int i = 0; i < 8; ++i) {
        acc[i] ^= acc[i] >> 47;
        acc[i] ^= load64(secret + SECRET_BYTES - STRIPE_BYTES + 8 * i);
        acc[i] *= P32_1;
    }
}

static void stripes_portable(uint64_t *acc, const uint8_t *from, int count, int first) {
    for (int i = 0; i < count; ++i)
        accumulate(acc, from + i * STRIPE_BYTES, secret + 8 * (first + i));
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void stripes_avx2(uint64_t *acc, const uint8_t *from,
                                                         int count, int first) {
    enum { AHEAD_BYTES = 1024, HALVES = 2 };
    __m256i sum[HALVES];
    for (int half = 0; half < HALVES; ++half)
        sum[half] = _mm256_loadu_si256((const __m256i *)acc + half);
    for (int i = 0; i < count; ++i) {
        const uint8_t *stripe = from + i * STRIPE_BYTES, *key = secret + 8 * (first + i);
        _mm_prefetch((const char *)stripe + AHEAD_BYTES, _MM_HINT_T0);
        for (int half = 0; half < HALVES; ++half) {
            __m256i value = _mm256_loadu_si256((const __m256i *)stripe + half);
            __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)key + half));
            __m256i high = _mm256_srli_epi64(keyed, 32);
            __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
            __m256i product = _mm256_mul_epu32(keyed, high);
            sum[half] = _mm256_add_epi64(sum[half], _mm256_add_epi64(swapped, product));
        }
    }
    for (int half = 0; half < HALVES; ++half)
        _mm256_storeu_si256((__m256i *)acc + half, sum[half]);
}
#endif

/* Whole stripes; those of a block are followed by a scramble. */
static void xxh3_stripes(xxh3 *hash, const uint8_t *from, int64_t count, int has_avx2) {
    hash->stripes_left -= count;
    while (count) {
        int some = STRIPES_OF_BLOCK - hash->stripe_of_block;
        if (some > count) some = (int)count;
#if defined(__x86_64__)
        if (has_avx2)
            stripes_avx2(hash->acc, from, some, hash->stripe_of_block);
        else
#endif
            stripes_portable(hash->acc, from, some, hash->stripe_of_block);
        from += some * STRIPE_BYTES;
        count -= some;
        hash->stripe_of_block += some;
        if (hash->stripe_of_block == STRIPES_OF_BLOCK) {
            scramble(hash->acc);
            hash->stripe_of_block = 0;
        }
    }
}

static void xxh3_update(xxh3 *hash, const uint8_t *from, int64_t num_bytes, int has_avx2) {
    if (num_bytes >= STRIPE_BYTES) {
        memcpy(hash->last, from + num_bytes - STRIPE_BYTES, STRIPE_BYTES);
    } else {
        memmove(hash->last, hash->last + num_bytes, (size_t)(STRIPE_BYTES - num_bytes));
        memcpy(hash->last + STRIPE_BYTES - num_bytes, from, (size_t)num_bytes);
    }
    if (hash->num_part) {
        int64_t some = STRIPE_BYTES - hash->num_part;
        if (some > num_bytes) some = num_bytes;
        memcpy(hash->part + hash->num_part, from, (size_t)some);
        hash->num_part += (int)some;
        from += some;
        num_bytes -= some;
        if (hash->num_part == STRIPE_BYTES) {
            if (hash->stripes_left) xxh3_stripes(hash, hash->part, 1, has_avx2);
            hash->num_part = 0;
        }
    }
    int64_t count = num_bytes / STRIPE_BYTES;
    if (count > hash->stripes_left) count = hash->stripes_left;
    xxh3_stripes(hash, from, count, has_avx2);
    from += count * STRIPE_BYTES;
    num_bytes -= count * STRIPE_BYTES;
    if (num_bytes && hash->stripes_left) {
        memcpy(hash->part, from, (size_t)num_bytes);
        hash->num_part = (int)num_bytes;
    }
}

static uint64_t xxh3_end(xxh3 *hash) {
    accumulate(hash->acc, hash->last, secret + SECRET_BYTES - STRIPE_BYTES - 7);
    uint64_t sum = (uint64_t)hash->num_bytes * P64_1;
    for (int i = 0; i < 4; ++i) {
        uint64_t low = hash->acc[2 * i] ^ load64(secret + 11 + 16 * i);
        uint64_t high = hash->acc[2 * i + 1] ^ load64(secret + 19 + 16 * i);
        unsigned __int128 product = (unsigned __int128)low * high;
        sum += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9u;
    return sum ^ sum >> 32;
}
