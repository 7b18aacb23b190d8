/* Products of 32 x 32 blocks on AMX tiles. */
#ifndef AMX_TILE_H
#define AMX_TILE_H

#include "vector.h"

#include <immintrin.h>

enum { TILE_ROWS = 16, TILE_BYTES = 1024 };

/* Tiles 0-3 sums of a 32 x 32 block, 4-5 its rows, 6-7 its columns. `rows` is 1 to 32. */
INLINE void configure(int64_t rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    int64_t upper = min_i64(rows, TILE_ROWS), lower = max_i64(rows - TILE_ROWS, 1);
    for (int tile = 0; tile < 8; ++tile) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = (uint8_t)(tile >= 6 ? TILE_ROWS
                                      : tile == 2 || tile == 3 || tile == 5 ? lower
                                                                            : upper);
    }
    _tile_loadconfig(&config);
}

enum kept { KEEP_ROWS, KEEP_PANEL };
#define LOAD_TILE(is_kept, ...) \
    ((is_kept) ? _tile_loadd(__VA_ARGS__) : _tile_stream_loadd(__VA_ARGS__))

/* A block has 32 columns and up to 32 rows, whose lower 16 may be missing. */
INLINE void zero_block(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void load_block(const float *c, int64_t stride_bytes, int has_lower) {
    const char *upper = (const char *)c, *lower = upper + TILE_ROWS * stride_bytes;
    _tile_loadd(0, upper, stride_bytes);
    _tile_loadd(1, upper + 64, stride_bytes);
    if (has_lower) {
        _tile_loadd(2, lower, stride_bytes);
        _tile_loadd(3, lower + 64, stride_bytes);
    }
}

INLINE void store_block(float *c, int64_t stride_bytes, int has_lower) {
    char *upper = (char *)c, *lower = upper + TILE_ROWS * stride_bytes;
    _tile_stored(0, upper, stride_bytes);
    _tile_stored(1, upper + 64, stride_bytes);
    if (has_lower) {
        _tile_stored(2, lower, stride_bytes);
        _tile_stored(3, lower + 64, stride_bytes);
    }
}

/* Adds a[rows][32 of the inner dimension] @ one step of a panel, the upper 16 rows first. What is
 * not `kept` for the next block passes the first-level cache by. */
INLINE void multiply_upper(const enum kept kept, const char *a, int64_t a_stride_bytes,
                           const char *panel) {
    if (kept == KEEP_PANEL) _tile_stream_loadd(4, a, a_stride_bytes);
    LOAD_TILE(kept == KEEP_PANEL, 6, panel, 64);
    LOAD_TILE(kept == KEEP_PANEL, 7, panel + TILE_BYTES, 64);
    if (kept == KEEP_ROWS) _tile_loadd(4, a, a_stride_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
}

/* With the step of the panel that `multiply_upper` has loaded. */
INLINE void multiply_lower(const enum kept kept, const char *a, int64_t a_stride_bytes) {
    LOAD_TILE(kept == KEEP_ROWS, 5, a + TILE_ROWS * a_stride_bytes, a_stride_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

INLINE void multiply_step(const enum kept kept, const char *a, int64_t a_stride_bytes,
                          int has_lower, const char *panel) {
    multiply_upper(kept, a, a_stride_bytes, panel);
    if (has_lower) multiply_lower(kept, a, a_stride_bytes);
}

#endif
