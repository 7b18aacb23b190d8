/* What the files of calls share: each cuts a job into items and runs them on the pool. */
#ifndef CALL_H
#define CALL_H

#include "isthmus.h"

#define EXPORT __attribute__((visibility("default")))

/* Of the instruction set in use. */
extern const kernel_table *isthmus_kernels;

static inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
static inline int64_t element_bytes(int dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

void isthmus_run_linear(int dtype, linear_job job, int num_threads);
int isthmus_has_gated(int dtype, int64_t num_out);
void isthmus_run_norm(int dtype, norm_job job, int64_t num_rows, int num_threads);
void isthmus_run_silu(int dtype, silu_job job, int64_t num_rows, int num_threads);
void isthmus_run_rope(int dtype, rope_job job, int64_t num_rows, int num_threads);
void isthmus_run_attention(int dtype, attention_job job, int64_t num_sequences, int num_threads);

#endif
