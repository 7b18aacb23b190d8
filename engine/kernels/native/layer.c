/* The two halves of a plain decoder layer, each in one call, and all layers in one: what the
 * separate calls do, in their order and with their bits. What passes between them lies in memory
 * that is kept. */
#include "call.h"

typedef struct {
    const void *packed;
    const float *bias; /* or NULL */
    int64_t inner, num_out;
} half_linear;

/* From here to the functions Python has the same structures. */
typedef struct {
    const void *norm, *q_norm, *k_norm; /* the latter two or NULL */
    half_linear qkv, output;
    int64_t num_heads, window;
    float eps, head_eps, scale;
} attention_half;

typedef struct {
    const void *norm;
    half_linear gate_up, down;
    float eps;
} mlp_half;

typedef struct {
    const attention_half *attention;
    const mlp_half *mlp;
    void *kv_memory;
} whole_layer;

typedef struct {
    const int64_t *slot;
    const int32_t *block_table, *query_start, *context_len;
    int64_t num_rows, num_sequences, table_stride;
    int dtype, num_threads;
} step_plan;

/* Rows are an odd number of cache lines apart, so that those of a tile fall into different sets. */
static int64_t stride_of(int64_t width, int dtype) {
    int64_t line = 64 / element_bytes(dtype);
    return (round_up(width, line) / line | 1) * line;
}

static void norm_into(const step_plan *step, const void *added, void *residual, const void *weight,
                      float eps, int64_t dim, void *out, int64_t out_stride) {
    norm_job job = {
        .x = added ? added : residual,
        .residual = added ? residual : NULL,
        .weight = weight,
        .out = out,
        .x_stride = dim,
        .out_stride = out_stride,
        .dim = dim,
        .eps = eps,
    };
    isthmus_run_norm(step->dtype, job, step->num_rows, step->num_threads);
}

static void linear_into(const step_plan *step, const half_linear *linear, const void *x,
                        int64_t x_stride, int is_gated, void *out, int64_t out_stride) {
    linear_job job = {
        .x = x,
        .packed = linear->packed,
        .bias = linear->bias,
        .out = out,
        .x_stride = x_stride,
        .out_stride = out_stride,
        .num_rows = step->num_rows,
        .inner = linear->inner,
        .num_out = is_gated ? linear->num_out / 2 : linear->num_out,
        .is_gated = is_gated,
    };
    isthmus_run_linear(step->dtype, job, step->num_threads);
}

/* `residual` += `added` unless that is NULL; `out` is what is to be added next. Rows of all three
 * follow one another without gaps. */
EXPORT void isthmus_attention_half(const attention_half *half, const step_plan *step,
                                   const void *added, void *residual, const float *cos,
                                   const float *sin, void *kv_memory, const kv_shape *shape,
                                   void *out) {
    int dtype = step->dtype;
    int64_t rows = step->num_rows, size = element_bytes(dtype);
    int64_t dim = half->qkv.inner, q_width = half->num_heads * shape->head_dim;
    int64_t x_stride = stride_of(dim, dtype), qkv_stride = stride_of(half->qkv.num_out, dtype);
    int64_t o_stride = stride_of(q_width, dtype);
    char *x = isthmus_scratch(SCRATCH_LAYER, (size_t)(rows * size) *
                                                 (size_t)(x_stride + qkv_stride + 2 * o_stride));
    char *qkv = x + rows * x_stride * size, *q = qkv + rows * qkv_stride * size;
    char *o = q + rows * o_stride * size;
    norm_into(step, added, residual, half->norm, half->eps, dim, x, x_stride);
    linear_into(step, &half->qkv, x, x_stride, 0, qkv, qkv_stride);
    rope_job rope = {
        .qkv = qkv,
        .q_out = q,
        .kv_memory = kv_memory,
        .cos = cos,
        .sin = sin,
        .q_norm = half->q_norm,
        .k_norm = half->k_norm,
        .slot = step->slot,
        .qkv_stride = qkv_stride,
        .num_heads = half->num_heads,
        .kv = *shape,
        .eps = half->head_eps,
    };
    isthmus_run_rope(dtype, rope, rows, step->num_threads);
    attention_job attention = {
        .q = q,
        .out = o,
        .kv_memory = kv_memory,
        .block_table = step->block_table,
        .query_start = step->query_start,
        .context_len = step->context_len,
        .table_stride = step->table_stride,
        .out_stride = o_stride,
        .num_heads = half->num_heads,
        .kv = *shape,
        .window = half->window,
        .scale = half->scale,
    };
    isthmus_run_attention(dtype, attention, step->num_sequences, step->num_threads);
    linear_into(step, &half->output, o, o_stride, 0, out, half->output.num_out);
}

EXPORT void isthmus_mlp_half(const mlp_half *half, const step_plan *step, const void *added,
                             void *residual, void *out) {
    int dtype = step->dtype;
    int64_t rows = step->num_rows, size = element_bytes(dtype);
    int64_t dim = half->gate_up.inner, width = half->gate_up.num_out / 2;
    int is_gated = isthmus_has_gated(dtype, width);
    int64_t x_stride = stride_of(dim, dtype), y_stride = is_gated ? stride_of(width, dtype) : width;
    int64_t gate_up_stride = is_gated ? 0 : 2 * width;
    char *x = isthmus_scratch(SCRATCH_LAYER, (size_t)(rows * size) *
                                                 (size_t)(x_stride + y_stride + gate_up_stride));
    char *y = x + rows * x_stride * size, *gate_up = y + rows * y_stride * size;
    norm_into(step, added, residual, half->norm, half->eps, dim, x, x_stride);
    if (is_gated) {
        linear_into(step, &half->gate_up, x, x_stride, 1, y, y_stride);
    } else {
        linear_into(step, &half->gate_up, x, x_stride, 0, gate_up, gate_up_stride);
        silu_job silu = {.gate_up = gate_up, .out = y, .dim = width};
        isthmus_run_silu(dtype, silu, rows, step->num_threads);
    }
    linear_into(step, &half->down, y, y_stride, 0, out, half->down.num_out);
}

/* Layers [first, end), one after the other. `attended` passes within a layer, `added` between
 * layers, so that a call goes on where the one before ended; what the last adds is left in it. */
EXPORT void isthmus_layers(const whole_layer *layers, int64_t first, int64_t end,
                           const step_plan *step, void *residual, const float *cos,
                           const float *sin, const kv_shape *shape, void *attended, void *added) {
    for (int64_t i = first; i < end; ++i) {
        const whole_layer *layer = &layers[i];
        isthmus_attention_half(layer->attention, step, i ? added : NULL, residual, cos, sin,
                               layer->kv_memory, shape, attended);
        isthmus_mlp_half(layer->mlp, step, attended, residual, added);
    }
}
