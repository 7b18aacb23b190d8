/* What the files of the native library share: work descriptions, the kernel table, the pool.
 *
 * Letters as in the Python code: T tokens of a step, D model dim (inner), F output features,
 * H query heads, G KV heads, A head dim, C slots in a block.
 */
#ifndef ISTHMUS_H
#define ISTHMUS_H

#include <stddef.h>
#include <stdint.h>

enum dtype { DTYPE_F32 = 0, DTYPE_BF16 = 1 };

/* Output features are packed in panels of 32; bf16 panels hold 32 inner elements a step, as pairs
 * of neighbours for 16 features, twice: the layout that AMX tiles and VDPBF16PS both read. */
enum { PANEL = 32, INNER_STEP = 32, PANEL_STEP_BYTES = PANEL * INNER_STEP * 2 };

/* Keys are attended in chunks that start at multiples of this absolute position, each with its own
 * maximum, merged in order: a token's result then depends neither on how its prompt was cut nor on
 * what else is in the batch. */
enum { KEY_CHUNK = 256 };

typedef struct {
    const void *x;
    const void *packed;
    const float *bias; /* or NULL */
    void *out;
    int64_t x_stride, out_stride; /* elements */
    int64_t num_rows, inner, num_out;
    int64_t rows_per_range, num_panels; /* filled in by isthmus_run_linear */
    int out_f32;
    int is_gated; /* out = silu(features [0, num_out)) * features [num_out, 2 * num_out) */
} linear_job;

typedef struct {
    const void *x;
    void *residual; /* or NULL */
    const void *weight;
    void *out;
    int64_t x_stride, out_stride, dim;
    float eps;
} norm_job;

typedef struct {
    const void *gate_up;
    void *out;
    int64_t dim;
} silu_job;

/* How the rows of a pool hold their values: as the step's dtype, or a byte each, with a float32
 * scale behind them. */
enum scaling { SCALING_NONE = 0, SCALING_INT8 = 1, SCALING_FP8 = 2 };

/* How a layer's keys and values lie in the pool: kv[block][side][head][slot][dim]. Strides are in
 * elements: bytes where rows are scaled. Python has the same structure. */
typedef struct {
    int64_t num_heads, block_size, head_dim;
    int64_t block_stride, side_stride, head_stride, slot_stride;
    int64_t scaling;
} kv_shape;

typedef struct {
    const void *qkv;
    void *q_out;
    void *kv_memory;
    const float *cos, *sin;
    const void *q_norm, *k_norm; /* or NULL */
    const int64_t *slot;
    int64_t qkv_stride, num_heads;
    kv_shape kv;
    float eps;
} rope_job;

typedef struct {
    int32_t sequence, kv_head;
    int32_t first_query, num_queries; /* within the sequence */
    int32_t first_chunk, end_chunk;
    int64_t partial; /* index of the first chunk's partial result, or -1: merge in place */
} attention_unit;

typedef struct {
    int32_t first, end;
} key_span;

typedef struct {
    const void *q;
    void *out;      /* float32 where `log_sum` is given */
    float *log_sum; /* of the weights, [T][H]; NULL where the result is no part */
    const void *kv_memory;
    const int32_t *block_table, *query_start, *context_len;
    const key_span *spans;     /* positions that are attended to, ascending */
    const int32_t *span_start; /* of each sequence in spans, and their end; NULL: all positions */
    const attention_unit *units;
    float *partials;
    int64_t table_stride, out_stride, num_heads;
    kv_shape kv;
    int64_t window; /* 0: none */
    float scale;
} attention_job;

/* Rows of one attention unit; a unit has at least one token, so at most max(this, H / G) rows. */
enum { UNIT_ROWS = 768 };
/* Rows of a unit that may be split along its context. */
enum { MAX_SPLIT_ROWS = 32 };

/* Each entry handles items [begin, end) of its job, on any thread. */
typedef void chunk_fn(const void *job, int64_t begin, int64_t end);

/* Takes `count` stripes of XXH3 into its sums, the `first` of a block and those after it; fetches as
 * many from `ahead` into the cache meanwhile. */
typedef void hash_stripes_fn(uint64_t *sums, const uint8_t *from, int64_t count, int first,
                             const uint8_t *ahead);

typedef struct {
    const char *name;
    chunk_fn *linear[2]; /* by dtype; items are range * num_panels + panel */
    int has_gated[2];    /* whether linear can do `is_gated` */
    chunk_fn *rms_norm[2];
    chunk_fn *silu_mul[2];
    chunk_fn *rope[2];
    chunk_fn *attention[2];
    chunk_fn *merge[2]; /* partial results into the output; items are units */
    hash_stripes_fn *hash_stripes;
} kernel_table;

/* Fill a table from the lowest level up; each overwrites what it does better. */
void isthmus_fill_portable(kernel_table *table);
#if defined(__x86_64__)
void isthmus_fill_avx2(kernel_table *table);
void isthmus_fill_avx512(kernel_table *table);
void isthmus_fill_avx512_bf16(kernel_table *table);
void isthmus_fill_dot(kernel_table *table);
void isthmus_fill_amx_linear(kernel_table *table);
void isthmus_fill_amx_attention(kernel_table *table);
#endif

/* Runs `fn` over [0, num_items) on at most `num_threads` threads, the caller's included.
 * Takes are shrinking runs when `guided`, single items otherwise. */
void isthmus_run(chunk_fn *fn, const void *job, int64_t num_items, int num_threads, int guided);

/* Memory of this thread, kept between calls; slots are independent; contents are undefined. */
enum { SCRATCH_KERNEL = 0, SCRATCH_CALL, SCRATCH_UNITS, SCRATCH_LAYER, NUM_SCRATCH };
void *isthmus_scratch(int slot, size_t bytes);

#endif
