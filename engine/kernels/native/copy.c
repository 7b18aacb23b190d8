/* Copies of many runs of bytes in one call. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

#if defined(__x86_64__)
enum { LINE_BYTES = 64, AHEAD_BYTES = 2048 };

/* Stores past the cache: without them each line of the target is read before it is written. The
 * source is fetched ahead, across pages and into the next run, where the hardware does not look. */
static void stream(char *to, const char *from, int64_t num_bytes, const char *next) {
    int64_t head = -(intptr_t)to & (LINE_BYTES - 1);
    if (head > num_bytes) head = num_bytes;
    memcpy(to, from, (size_t)head);
    int64_t place = head;
    for (; place + LINE_BYTES <= num_bytes; place += LINE_BYTES) {
        int64_t ahead = place + AHEAD_BYTES;
        _mm_prefetch(ahead < num_bytes ? from + ahead : next + (ahead - num_bytes), _MM_HINT_T0);
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

static int is_inside(int64_t offset, int64_t num_bytes, int64_t size) {
    return offset >= 0 && num_bytes >= 0 && num_bytes <= size && offset <= size - num_bytes;
}

/* Run i: num_bytes[i] bytes from from[from_offset[i]] to to[to_offset[i]]. Nothing overlaps.
 * is_streaming: they are more than the caches hold, or nobody here reads them soon.
 * Returns 0, or -1 when a run is not inside both buffers; then nothing was copied. */
EXPORT int isthmus_copy_inside(char *to, int64_t to_size, const char *from, int64_t from_size,
                             const int64_t *to_offset, const int64_t *from_offset,
                             const int64_t *num_bytes, int64_t count, int is_streaming) {
    for (int64_t i = 0; i < count; ++i)
        if (!is_inside(to_offset[i], num_bytes[i], to_size) ||
            !is_inside(from_offset[i], num_bytes[i], from_size))
            return -1;
#if defined(__x86_64__)
    if (is_streaming) {
        for (int64_t i = 0; i < count; ++i)
            stream(to + to_offset[i], from + from_offset[i], num_bytes[i],
                   from + from_offset[i + 1 < count ? i + 1 : i]);
        _mm_sfence();
        return 0;
    }
#endif
    (void)is_streaming;
    for (int64_t i = 0; i < count; ++i)
        memcpy(to + to_offset[i], from + from_offset[i], (size_t)num_bytes[i]);
    return 0;
}
