/* Frames over a socket: as few system calls as it takes, and the payload's checksum meanwhile. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#include "call.h"
#include "xxh3.h"

/* A piece goes through its checksum while it is in the cache, and the other end has the one before.
 * A receiver sleeps until there is so much that its wake-up, which the sender pays for, is worth
 * it. */
enum { PIECE_BYTES = 256 << 10, WAKE_BYTES = 128 << 10, CHECKSUM_BYTES = 8 };
/* So far ahead the cache is filled; during a short run with the next one, since the hardware stops at
 * the end of a page, and a few before that is asked for, so that its page is known by then. */
enum { AHEAD_BYTES = 4096, SHORT_BYTES = 16 << 10, AHEAD_RUNS = 4 };
enum { MAX_BUFFERS = 1023 /* in one system call, and one for the checksum */ };
/* An answer, or the next push, often comes so soon; of a payload, the next part. */
enum { SOON_NS = 100000, NEXT_NS = 30000 };
enum { TICK_MS = 200 /* as TICK_S of kv_transfer/stream.py */ };
enum { DONE = 1, TICK = 0, CLOSED = -1, OUTSIDE = -2, FAILED = -16 /* less errno */ };

/* One frame on its way; as `kv_transfer/wire.py` has it. */
typedef struct {
    char *pool;
    int64_t pool_bytes, block_bytes;
    const int64_t *offset, *num_bytes; /* of each run in a block */
    int64_t num_runs;
    const int64_t *block; /* in the order of the payload */
    int64_t num_blocks;
    const char *head; /* goes before the payload; not part of its checksum */
    int64_t head_bytes;
    int64_t has_checksum; /* behind the payload */
    char *answer;         /* waited for when all is sent */
    int64_t answer_bytes;
    int64_t has_begun;
    int64_t num_moved; /* in all, so that a peer that stands still is found out */
    int64_t is_sound;  /* what came is what its checksum says; valid once it is done */
    /* What follows is known here only. */
    int64_t num_left; /* of the payload */
    int64_t checksum_left;
    uint8_t checksum[CHECKSUM_BYTES];
    int64_t at, place; /* of what comes next: which run of all, which byte of it */
    struct iovec buffers[MAX_BUFFERS + 1];
    int first_buffer, end_buffer; /* that are still to be sent */
    xxh3 hash;
} frame;

EXPORT int64_t isthmus_frame_bytes(void) { return (int64_t)sizeof(frame); }

/* Every block is inside the pool, every run inside its block and not empty; the payload has enough
 * for the checksum. */
static int begin(frame *it) {
    int64_t of_block = 0, most = it->block_bytes > 0 ? it->pool_bytes / it->block_bytes : 0;
    for (int64_t i = 0; i < it->num_runs; ++i) {
        int64_t size = it->num_bytes[i], first = it->offset[i];
        if (size <= 0 || first < 0 || size > it->block_bytes || first > it->block_bytes - size)
            return 0;
        of_block += size;
    }
    for (int64_t i = 0; i < it->num_blocks; ++i)
        if (it->block[i] < 0 || it->block[i] >= most) return 0;
    it->num_left = of_block * it->num_blocks;
    if (it->has_checksum && it->num_left < XXH3_LEAST_BYTES) return 0;
    it->checksum_left = it->has_checksum ? CHECKSUM_BYTES : 0;
    xxh3_begin(&it->hash, it->num_left, isthmus_kernels->hash_stripes);
    it->at = it->place = 0;
    it->first_buffer = it->end_buffer = 0;
    it->num_moved = it->is_sound = 0;
    it->has_begun = 1;
    return 1;
}

/* Byte `place` of the run `at` of all. */
static char *byte_at(const frame *it, int64_t at, int64_t place) {
    int64_t block = at / it->num_runs, run = at % it->num_runs;
    return it->pool + it->block[block] * it->block_bytes + it->offset[run] + place;
}

static int64_t bytes_of(const frame *it, int64_t at) { return it->num_bytes[at % it->num_runs]; }

static void hash_run(frame *it, int64_t num_bytes) {
    const char *from = byte_at(it, it->at, it->place), *ahead = from + AHEAD_BYTES;
    int64_t end = it->num_blocks * it->num_runs;
    if (num_bytes <= SHORT_BYTES) {
        if (it->at + AHEAD_RUNS < end) __builtin_prefetch(byte_at(it, it->at + AHEAD_RUNS, 0));
        if (it->at + 1 < end) ahead = byte_at(it, it->at + 1, 0);
    }
    xxh3_update(&it->hash, (const uint8_t *)from, num_bytes, (const uint8_t *)ahead);
}

/* `moved` bytes of the payload are there, or are about to go: on to those behind them. */
static void pass(frame *it, int64_t moved) {
    it->num_left -= moved;
    while (moved) {
        int64_t some = bytes_of(it, it->at) - it->place;
        if (some > moved) some = moved;
        if (it->has_checksum) hash_run(it, some);
        moved -= some;
        it->place += some;
        if (it->place == bytes_of(it, it->at)) it->place = 0, ++it->at;
    }
}

/* Add the next piece of the payload to the buffers, as runs of neighbours; returns its bytes. */
static int64_t add_piece(frame *it) {
    int64_t most = it->num_left < PIECE_BYTES ? it->num_left : PIECE_BYTES, total = 0;
    const char *end = NULL;
    for (int64_t at = it->at, place = it->place; total < most; ++at, place = 0) {
        char *from = byte_at(it, at, place);
        int64_t some = bytes_of(it, at) - place;
        if (some > most - total) some = most - total;
        if (from == end)
            it->buffers[it->end_buffer - 1].iov_len += (size_t)some;
        else if (it->end_buffer < MAX_BUFFERS)
            it->buffers[it->end_buffer++] = (struct iovec){from, (size_t)some};
        else
            break;
        end = from + some;
        total += some;
    }
    return total;
}

/* There is room for it beside what `add_piece` adds. */
static void add_checksum(frame *it) {
    uint8_t *rest = it->checksum + CHECKSUM_BYTES - it->checksum_left;
    it->buffers[it->end_buffer++] = (struct iovec){rest, (size_t)it->checksum_left};
}

/* As it travels. */
static void end_checksum(frame *it, uint8_t *checksum) {
    uint64_t sum = xxh3_end(&it->hash);
    for (int i = 0; i < CHECKSUM_BYTES; ++i) checksum[i] = (uint8_t)(sum >> (56 - 8 * i));
}

static int64_t outcome_of(ssize_t moved) {
    if (moved == 0) return CLOSED;
    int is_tick = errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
    return is_tick ? TICK : FAILED - errno;
}

/* What is to go next: the head alone, so that the receiver, which sleeps, looks at it while the first
 * piece is made ready; then piece by piece, the last one with the checksum. */
static void load(frame *it) {
    it->first_buffer = it->end_buffer = 0;
    if (it->head_bytes) {
        it->buffers[it->end_buffer++] = (struct iovec){(char *)it->head, (size_t)it->head_bytes};
        it->head_bytes = 0;
        return;
    }
    pass(it, add_piece(it));
    if (!it->num_left && it->checksum_left) {
        end_checksum(it, it->checksum);
        add_checksum(it);
    }
}

static int64_t send_loaded(int fd, frame *it) {
    while (it->first_buffer < it->end_buffer) {
        struct iovec *buffer = it->buffers + it->first_buffer;
        size_t count = (size_t)(it->end_buffer - it->first_buffer);
        struct msghdr message = {.msg_iov = buffer, .msg_iovlen = count};
        ssize_t moved = sendmsg(fd, &message, MSG_NOSIGNAL);
        if (moved <= 0) return outcome_of(moved);
        it->num_moved += moved;
        size_t left = (size_t)moved;
        for (; left && left >= buffer->iov_len; ++buffer, ++it->first_buffer)
            left -= buffer->iov_len;
        if (left) *buffer = (struct iovec){(char *)buffer->iov_base + left, buffer->iov_len - left};
    }
    return DONE;
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * (int64_t)1000000000 + time.tv_nsec;
}

/* As poll for what SO_RCVLOWAT says; for a while it asks again and again, whenever nobody else wants
 * the core: to be put to sleep and woken takes longer than what it waits for, and the other end pays
 * for the waking. It takes no lock of the socket, which the other end needs. */
static int wait_readable(int fd, int64_t soon_ns, int timeout_ms) {
    struct pollfd wanted = {.fd = fd, .events = POLLIN};
    int64_t end_ns = 0;
    for (;;) {
        int count = poll(&wanted, 1, 0);
        if (count) return count;
        int64_t time_ns = now_ns();
        if (!end_ns) end_ns = time_ns + soon_ns;
        if (time_ns >= end_ns) return timeout_ms ? poll(&wanted, 1, timeout_ms) : 0;
        sched_yield();
    }
}

/* Returns once a byte is there, or the connection has ended, or after that while. */
EXPORT void isthmus_wait_soon(int fd) { (void)wait_readable(fd, SOON_NS, 0); }

static int64_t receive_answer(int fd, frame *it) {
    while (it->answer_bytes) {
        if (wait_readable(fd, SOON_NS, TICK_MS) < 0) return outcome_of(-1);
        ssize_t moved = recv(fd, it->answer, (size_t)it->answer_bytes, MSG_DONTWAIT);
        if (moved <= 0) return outcome_of(moved);
        it->num_moved += moved;
        it->answer += moved;
        it->answer_bytes -= moved;
    }
    return DONE;
}

/* Head, payload and checksum, and then the answer where one is waited for. Both calls go on until
 * all is moved, or nothing has moved for the socket's own time-out: then call again. */
EXPORT int64_t isthmus_send_frame(int fd, frame *it) {
    if (!it->has_begun && !begin(it)) return OUTSIDE;
    int64_t outcome;
    do {
        if (it->num_left && it->first_buffer == it->end_buffer) load(it);
        outcome = send_loaded(fd, it);
    } while (outcome == DONE && it->num_left);
    return outcome == DONE ? receive_answer(fd, it) : outcome;
}

/* `poll` returns only once so many bytes are there, or at the end, or at the time-out. */
static void wake_at(int fd, int64_t num_bytes) {
    int least = (int)num_bytes;
    (void)setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &least, sizeof least);
}

static int64_t receive_rest(int fd, frame *it) {
    int64_t least = 0, left;
    while ((left = it->num_left + it->checksum_left) != 0) {
        int64_t wanted = left < WAKE_BYTES ? left : WAKE_BYTES;
        if (wanted != least) wake_at(fd, least = wanted);
        it->end_buffer = 0;
        if (add_piece(it) == it->num_left && it->checksum_left) add_checksum(it);
        struct msghdr message = {.msg_iov = it->buffers, .msg_iovlen = (size_t)it->end_buffer};
        if (wait_readable(fd, NEXT_NS, TICK_MS) < 0) return outcome_of(-1);
        ssize_t moved = recvmsg(fd, &message, MSG_DONTWAIT); /* of a slow peer, what has come */
        if (moved <= 0) return outcome_of(moved);
        it->num_moved += moved;
        int64_t of_payload = moved < it->num_left ? moved : it->num_left;
        pass(it, of_payload);
        it->checksum_left -= moved - of_payload;
    }
    return DONE;
}

/* Payload and checksum. */
EXPORT int64_t isthmus_receive_frame(int fd, frame *it) {
    if (!it->has_begun && !begin(it)) return OUTSIDE;
    int64_t outcome = receive_rest(fd, it);
    wake_at(fd, 1); /* what follows is short */
    if (outcome == DONE) {
        uint8_t found[CHECKSUM_BYTES];
        if (it->has_checksum) end_checksum(it, found);
        it->is_sound = !it->has_checksum || memcmp(found, it->checksum, sizeof found) == 0;
    }
    return outcome;
}
