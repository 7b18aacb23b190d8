/* Copies of many runs of bytes in one call. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__)
enum { LINE_BYTES = 64 };

/* Stores past the cache: without them each line of the target is read before it is written. */
static void stream(char *to, const char *from, int64_t num_bytes) {
    int64_t head = -(intptr_t)to & (LINE_BYTES - 1);
    if (head > num_bytes) head = num_bytes;
    memcpy(to, from, (size_t)head);
    int64_t place = head;
    for (; place + LINE_BYTES <= num_bytes; place += LINE_BYTES) {
        const __m128i *source = (const __m128i *)(from + place);
        __m128i *target = (__m128i *)(to + place);
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
    memcpy(to + place, from + place, (size_t)(num_bytes - place));
}
#endif

/* Run i: num_bytes[i] bytes from from[from_offset[i]] to to[to_offset[i]]. Nothing overlaps.
 * is_streaming: they are more than the caches hold, or nobody here reads them soon. */
EXPORT void isthmus_copy_runs(char *to, const char *from, const int64_t *to_offset,
                              const int64_t *from_offset, const int64_t *num_bytes, int64_t count,
                              int is_streaming) {
#if defined(__x86_64__)
    if (is_streaming) {
        for (int64_t i = 0; i < count; ++i)
            stream(to + to_offset[i], from + from_offset[i], num_bytes[i]);
        _mm_sfence();
        return;
    }
#endif
    (void)is_streaming;
    for (int64_t i = 0; i < count; ++i)
        memcpy(to + to_offset[i], from + from_offset[i], (size_t)num_bytes[i]);
}
