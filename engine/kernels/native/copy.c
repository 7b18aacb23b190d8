/* Copies of many runs of bytes in one call. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

/* What is copied of blocks: num_bytes[r] bytes at from_offset[r] of a block of one pool, to to_offset[r]
 * of a block of another. */
struct block_copy {
    char *to;
    const char *from;
    int64_t to_size, from_size;
    int64_t to_block_bytes, from_block_bytes;
    const int64_t *to_offset, *from_offset, *num_bytes;
    int64_t num_runs;
};

/* Columns of a row: block and first slot here, block and first slot there, number of slots. */
enum { ROW = 5, FROM_BLOCK = 0, FROM_SLOT = 1, TO_BLOCK = 2, TO_SLOT = 3, NUM_SLOTS = 4 };

struct chunk {
    char *to;
    const char *from;
    int64_t num_bytes;
};

#if defined(__x86_64__)
enum { LINE_BYTES = 64, CHUNK_BYTES = 4096, WIDTH = 4 };

static inline void stream_line(char *to, const char *from) {
    const __m128i *source = (const __m128i *)from;
    __m128i *target = (__m128i *)to;
    __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
}

static void stream_one(struct chunk now, const char *next) {
    int64_t place = -(intptr_t)now.to & (LINE_BYTES - 1);
    if (place > now.num_bytes) place = now.num_bytes;
    memcpy(now.to, now.from, (size_t)place);
    for (; place + LINE_BYTES <= now.num_bytes; place += LINE_BYTES) {
        _mm_prefetch(next + place, _MM_HINT_T0);
        stream_line(now.to + place, now.from + place);
    }
    memcpy(now.to + place, now.from + place, (size_t)(now.num_bytes - place));
}

static int is_whole(const struct chunk *some) {
    return some->num_bytes == CHUNK_BYTES && ((intptr_t)some->to & (LINE_BYTES - 1)) == 0;
}

/* Stores past the cache: without them each line of the target is read before it is written. Four
 * pages side by side keep more of memory's channels busy than one, and the next four are fetched
 * meanwhile, where the hardware, which stops at the end of a page, does not look.
 * queue: the chunks that come next, at least one; the others may be empty. Returns how many were
 * copied. */
static int stream(const struct chunk *queue) {
    int num_whole = 0;
    while (num_whole < WIDTH && is_whole(queue + num_whole)) ++num_whole;
    if (num_whole < WIDTH) {
        stream_one(queue[0], queue[1].num_bytes ? queue[1].from : queue[0].from);
        return 1;
    }
    struct chunk now[WIDTH];
    const char *next[WIDTH];
    for (int i = 0; i < WIDTH; ++i) {
        now[i] = queue[i];
        next[i] = queue[WIDTH + i].num_bytes == CHUNK_BYTES ? queue[WIDTH + i].from : now[i].from;
    }
    for (int64_t place = 0; place < CHUNK_BYTES; place += LINE_BYTES) {
        for (int i = 0; i < WIDTH; ++i) _mm_prefetch(next[i] + place, _MM_HINT_T0);
        for (int i = 0; i < WIDTH; ++i) stream_line(now[i].to + place, now[i].from + place);
    }
    return WIDTH;
}
#endif

static int is_inside(int64_t offset, int64_t num_bytes, int64_t size) {
    return offset >= 0 && num_bytes >= 0 && num_bytes <= size && offset <= size - num_bytes;
}

/* Every block within its pool; that the runs are inside the blocks was seen to. */
static int are_inside(const struct block_copy *all, const int64_t *rows, int64_t first,
                      int64_t count) {
    int64_t most_to = all->to_size / all->to_block_bytes;
    int64_t most_from = all->from_size / all->from_block_bytes;
    int64_t last = (first + count - 1) / all->num_runs;
    for (int64_t block = first / all->num_runs; block <= last; ++block) {
        int64_t to = rows[block * ROW + TO_BLOCK], from = rows[block * ROW + FROM_BLOCK];
        if (to < 0 || to >= most_to || from < 0 || from >= most_from) return 0;
    }
    return 1;
}

static struct chunk run_at(const struct block_copy *all, const int64_t *row, int64_t run) {
    int64_t to = row[TO_BLOCK] * all->to_block_bytes;
    int64_t from = row[FROM_BLOCK] * all->from_block_bytes;
    return (struct chunk){all->to + to + all->to_offset[run],
                          all->from + from + all->from_offset[run], all->num_bytes[run]};
}

#if defined(__x86_64__)
static void copy_all(const struct block_copy *all, const int64_t *rows, int64_t first,
                       int64_t count) {
    struct chunk queue[2 * WIDTH] = {{0}}, rest = {0};
    const int64_t *row = rows + first / all->num_runs * ROW;
    int64_t run = first % all->num_runs;
    int filled = 0;
    for (;;) {
        while (filled < 2 * WIDTH && (rest.num_bytes || count)) {
            if (!rest.num_bytes) {
                rest = run_at(all, row, run);
                --count;
                if (++run == all->num_runs) run = 0, row += ROW;
                continue;
            }
            int64_t num_bytes = rest.num_bytes < CHUNK_BYTES ? rest.num_bytes : CHUNK_BYTES;
            queue[filled++] = (struct chunk){rest.to, rest.from, num_bytes};
            rest.to += num_bytes, rest.from += num_bytes, rest.num_bytes -= num_bytes;
        }
        if (!filled) break;
        int done = stream(queue);
        filled -= done;
        memmove(queue, queue + done, (size_t)filled * sizeof *queue);
        memset(queue + filled, 0, (size_t)done * sizeof *queue);
    }
    _mm_sfence();
}
#else
static void copy_all(const struct block_copy *all, const int64_t *rows, int64_t first,
                     int64_t count) {
    const int64_t *row = rows + first / all->num_runs * ROW;
    int64_t run = first % all->num_runs;
    for (; count; --count) {
        struct chunk some = run_at(all, row, run);
        memcpy(some.to, some.from, (size_t)some.num_bytes);
        if (++run == all->num_runs) run = 0, row += ROW;
    }
}
#endif

/* Runs [first, first + count) of the blocks that `rows` name, numbered block by block; count > 0.
 * Nothing overlaps. Returns 0, or -1 when a block is not inside its pool; then nothing was copied. */
EXPORT int isthmus_copy_blocks(const struct block_copy *all, const int64_t *rows, int64_t first,
                               int64_t count) {
    if (!are_inside(all, rows, first, count)) return -1;
    copy_all(all, rows, first, count);
    return 0;
}

/* How many of the first rows have the same slots as the first. */
EXPORT int64_t isthmus_num_alike(const int64_t *rows, int64_t num_rows) {
    int64_t row = 0;
    for (; row < num_rows; ++row) {
        const int64_t *some = rows + row * ROW;
        if (some[FROM_SLOT] != rows[FROM_SLOT] || some[TO_SLOT] != rows[TO_SLOT] ||
            some[NUM_SLOTS] != rows[NUM_SLOTS])
            break;
    }
    return row;
}

/* Run i: num_bytes[i] bytes from from[from_offset[i]] to to[to_offset[i]]. Nothing overlaps.
 * Returns 0, or -1 when a run is not inside both buffers; then nothing was copied. */
EXPORT int isthmus_copy_inside(char *to, int64_t to_size, const char *from, int64_t from_size,
                             const int64_t *to_offset, const int64_t *from_offset,
                             const int64_t *num_bytes, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (!is_inside(to_offset[i], num_bytes[i], to_size) ||
            !is_inside(from_offset[i], num_bytes[i], from_size))
            return -1;
    for (int64_t i = 0; i < count; ++i)
        memcpy(to + to_offset[i], from + from_offset[i], (size_t)num_bytes[i]);
    return 0;
}
