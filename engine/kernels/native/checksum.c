/* The stripes of XXH3 at one level of instructions. */
#include "vector.h"
#include "xxh3.h"

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(base) PASTE(base, LEVEL)

typedef uint64_t vl __attribute__((vector_size(64)));

INLINE vl load_lanes(const void *from) {
    vl lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static void hash_stripes(uint64_t *acc, const uint8_t *from, int64_t count, int first,
                         const uint8_t *ahead) {
    vl sum = load_lanes(acc);
    const vl last_key = load_lanes(xxh3_secret + SECRET_BYTES - STRIPE_BYTES);
    while (count) {
        int some = STRIPES_OF_BLOCK - first;
        if (some > count) some = (int)count;
        for (int i = 0; i < some; ++i, from += STRIPE_BYTES, ahead += STRIPE_BYTES) {
            __builtin_prefetch(ahead, 0, 2); /* not into the first cache: there is much of it */
            vl value = load_lanes(from), swapped;
            vl keyed = value ^ load_lanes(xxh3_secret + 8 * (first + i));
            for (int lane = 0; lane < 8; ++lane) swapped[lane] = value[lane ^ 1];
            sum += swapped + (keyed & 0xffffffffu) * (keyed >> 32);
        }
        count -= some;
        first += some;
        if (first == STRIPES_OF_BLOCK) {
            sum = (sum ^ sum >> 47 ^ last_key) * P32_1;
            first = 0;
        }
    }
    memcpy(acc, &sum, sizeof sum);
}

void NAME(isthmus_fill_checksum)(kernel_table *table);
void NAME(isthmus_fill_checksum)(kernel_table *table) { table->hash_stripes = hash_stripes; }
