/* XXH3 of 64 bits with seed 0, of more than 240 bytes that come in parts.
 * Source: xxHash's specification and its BSD-licensed reference, 0.8. */
#ifndef XXH3_H
#define XXH3_H

#include <stdint.h>
#include <string.h>

#include "isthmus.h"

enum { STRIPE_BYTES = 64, STRIPES_OF_BLOCK = 16, SECRET_BYTES = 192, XXH3_LEAST_BYTES = 241 };

static const uint8_t xxh3_secret[SECRET_BYTES] __attribute__((aligned(64))) = {
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
    hash_stripes_fn *hash_stripes;
    uint64_t acc[8];
    uint8_t part[STRIPE_BYTES]; /* of a stripe that is not whole yet */
    uint8_t last[STRIPE_BYTES]; /* what came last */
    int64_t num_bytes;          /* in all */
    int64_t stripes_left;       /* of those that are taken in turn */
    int num_part, stripe_of_block;
} xxh3;

static inline uint64_t xxh3_load64(const uint8_t *from) {
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

static inline void xxh3_begin(xxh3 *hash, int64_t num_bytes, hash_stripes_fn *hash_stripes) {
    const uint64_t begin[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    memset(hash, 0, sizeof *hash);
    memcpy(hash->acc, begin, sizeof begin);
    hash->hash_stripes = hash_stripes;
    hash->num_bytes = num_bytes;
    hash->stripes_left = (num_bytes - 1) / STRIPE_BYTES;
}

static inline void xxh3_stripes(xxh3 *hash, const uint8_t *from, int64_t count,
                                const uint8_t *ahead) {
    hash->hash_stripes(hash->acc, from, count, hash->stripe_of_block, ahead);
    hash->stripes_left -= count;
    hash->stripe_of_block = (int)((hash->stripe_of_block + count) % STRIPES_OF_BLOCK);
}

/* `ahead`: as many bytes that will be wanted soon. */
static inline void xxh3_update(xxh3 *hash, const uint8_t *from, int64_t num_bytes,
                               const uint8_t *ahead) {
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
            if (hash->stripes_left) xxh3_stripes(hash, hash->part, 1, ahead);
            hash->num_part = 0;
        }
    }
    int64_t count = num_bytes / STRIPE_BYTES;
    if (count > hash->stripes_left) count = hash->stripes_left;
    xxh3_stripes(hash, from, count, ahead);
    from += count * STRIPE_BYTES;
    num_bytes -= count * STRIPE_BYTES;
    if (num_bytes && hash->stripes_left) {
        memcpy(hash->part, from, (size_t)num_bytes);
        hash->num_part = (int)num_bytes;
    }
}

static inline uint64_t xxh3_end(xxh3 *hash) {
    for (int i = 0; i < 8; ++i) {
        uint64_t value = xxh3_load64(hash->last + 8 * i);
        uint64_t key = xxh3_load64(xxh3_secret + SECRET_BYTES - STRIPE_BYTES - 7 + 8 * i);
        uint64_t keyed = value ^ key;
        hash->acc[i ^ 1] += value;
        hash->acc[i] += (keyed & 0xffffffffu) * (keyed >> 32);
    }
    uint64_t sum = (uint64_t)hash->num_bytes * P64_1;
    for (int i = 0; i < 4; ++i) {
        uint64_t low = hash->acc[2 * i] ^ xxh3_load64(xxh3_secret + 11 + 16 * i);
        uint64_t high = hash->acc[2 * i + 1] ^ xxh3_load64(xxh3_secret + 19 + 16 * i);
        unsigned __int128 product = (unsigned __int128)low * high;
        sum += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9u;
    return sum ^ sum >> 32;
}

#endif
