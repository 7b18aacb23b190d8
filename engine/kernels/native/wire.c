/* Runs of a pool over a socket: as few system calls as it takes, and their checksum meanwhile. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "call.h"
#include "xxh3.h"

/* A piece goes through its checksum while it is in the cache. A receiver sleeps until there is so
 * much that its wake-up, which the sender pays for, is worth it. */
enum { PIECE_BYTES = 512 << 10, WAKE_BYTES = 256 << 10, MAX_BUFFERS = 1024 };
enum { TICK_MS = 200 /* as TICK_S of kv_transfer/stream.py */ };
enum { DONE = 1, TICK = 0, CLOSED = -1, OUTSIDE = -2, FAILED = -16 /* less errno */ };

/* One payload on its way; as `kv_transfer/wire.py` has it. */
typedef struct {
    char *pool;
    int64_t pool_bytes;
    const int64_t *offset, *num_bytes; /* of each run */
    int64_t num_runs;
    const char *head; /* goes before the payload; not part of its checksum */
    int64_t head_bytes;
    int64_t has_checksum;
    uint64_t checksum; /* valid once it is done */
    int64_t num_moved; /* in all, so that a peer that stands still is found out */
    int64_t run, place, num_left, has_begun, has_avx2;
    xxh3 hash;
} payload;

EXPORT int64_t isthmus_payload_bytes(void) { return (int64_t)sizeof(payload); }

static int has_avx2(void) {
#if defined(__x86_64__)
    return strcmp(isthmus_kernels->name, "portable") != 0;
#else
    return 0;
#endif
}

/* Every run is inside the pool and has a byte; the whole has enough for the checksum. */
static int begin(payload *it) {
    int64_t total = 0;
    for (int64_t i = 0; i < it->num_runs; ++i) {
        int64_t size = it->num_bytes[i], first = it->offset[i];
        if (size <= 0 || first < 0 || size > it->pool_bytes || first > it->pool_bytes - size)
            return 0;
        total += size;
    }
    if (it->has_checksum && total < XXH3_LEAST_BYTES) return 0;
    xxh3_begin(&it->hash, total);
    it->num_left = total;
    it->has_avx2 = has_avx2();
    it->has_begun = 1;
    return 1;
}

/* The next buffers, a piece of the payload at most. */
static int gather(const payload *it, struct iovec *buffers) {
    int count = 0;
    if (it->head_bytes) buffers[count++] = (struct iovec){(char *)it->head, (size_t)it->head_bytes};
    int64_t run = it->run, place = it->place, left = PIECE_BYTES;
    while (run < it->num_runs && left && count < MAX_BUFFERS) {
        int64_t some = it->num_bytes[run] - place;
        if (some > left) some = left;
        buffers[count++] = (struct iovec){it->pool + it->offset[run] + place, (size_t)some};
        left -= some;
        place = 0;
        ++run;
    }
    return count;
}

static void advance(payload *it, int64_t moved) {
    it->num_moved += moved;
    int64_t of_head = moved < it->head_bytes ? moved : it->head_bytes;
    it->head += of_head;
    it->head_bytes -= of_head;
    moved -= of_head;
    it->num_left -= moved;
    while (moved) {
        int64_t some = it->num_bytes[it->run] - it->place;
        if (some > moved) some = moved;
        const char *from = it->pool + it->offset[it->run] + it->place;
        if (it->has_checksum)
            xxh3_update(&it->hash, (const uint8_t *)from, some, (int)it->has_avx2);
        moved -= some;
        it->place += some;
        if (it->place == it->num_bytes[it->run]) {
            it->place = 0;
            ++it->run;
        }
    }
}

/* `poll` returns only once so many bytes are there, or at the end, or at the time-out. */
static void wake_at(int fd, int64_t num_bytes) {
    int least = (int)num_bytes;
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &least, sizeof least);
}

/* As recvmsg, which would first take what is there, and then sleep until as many bytes came after it
 * as were wanted with it: at the end of what a peer sends, until the time-out. */
static ssize_t receive_enough(int fd, struct msghdr *message) {
    struct pollfd wanted = {.fd = fd, .events = POLLIN};
    if (poll(&wanted, 1, TICK_MS) < 0) return -1;
    return recvmsg(fd, message, MSG_DONTWAIT); /* of a slow peer, what has come */
}

static int64_t outcome_of(ssize_t moved) {
    if (moved == 0) return CLOSED;
    int is_tick = errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    return is_tick ? TICK : FAILED - errno;
}

static int64_t end(payload *it) {
    if (it->has_checksum) it->checksum = xxh3_end(&it->hash);
    return DONE;
}

/* Both go on until all is moved, or nothing has moved for the socket's own time-out: then call
 * again. Bytes of the checksum are not sent and not received. */
EXPORT int64_t isthmus_send_payload(int fd, payload *it) {
    struct iovec buffers[MAX_BUFFERS];
    if (!it->has_begun && !begin(it)) return OUTSIDE;
    while (it->head_bytes || it->num_left) {
        struct msghdr message = {.msg_iov = buffers, .msg_iovlen = (size_t)gather(it, buffers)};
        ssize_t moved = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (moved <= 0) return outcome_of(moved);
        advance(it, moved);
    }
    return end(it);
}

EXPORT int64_t isthmus_receive_payload(int fd, payload *it) {
    struct iovec buffers[MAX_BUFFERS];
    if (!it->has_begun && !begin(it)) return OUTSIDE;
    int64_t least = 0, outcome = TICK;
    while (it->num_left) {
        int64_t wanted = it->num_left < WAKE_BYTES ? it->num_left : WAKE_BYTES;
        if (wanted != least) wake_at(fd, least = wanted);
        struct msghdr message = {.msg_iov = buffers, .msg_iovlen = (size_t)gather(it, buffers)};
        ssize_t moved = receive_enough(fd, &message);
        if (moved <= 0) {
            outcome = outcome_of(moved);
            break;
        }
        advance(it, moved);
    }
    wake_at(fd, 1); /* what follows is short */
    return it->num_left ? outcome : end(it);
}
