/* The functions that Python calls: pick the instruction set, cut a call into items, run them. */
#include "isthmus.h"

#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#define EXPORT __attribute__((visibility("default")))

enum { VERSION = 2, NUM_LEVELS = 5 };
enum { SMALL_CALL = 16384 /* elements of a row operation that one thread does sooner alone */ };

static kernel_table tables[NUM_LEVELS];
static int num_levels;
static const kernel_table *kernels;

#if defined(__x86_64__)
static uint64_t enabled_states(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

/* AMX state is off for a process until it asks. */
static int may_use_tiles(void) {
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}

static int count_levels(void) {
    uint32_t a, b, c, d, b7, c7, d7, a71 = 0, unused;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 1;
    int has_fma = c >> 12 & 1, has_xsave = c >> 27 & 1, has_f16c = c >> 29 & 1;
    if (!has_xsave || !__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return 1;
    __get_cpuid_count(7, 1, &a71, &unused, &unused, &unused);
    uint64_t states = enabled_states();
    int has_avx2 = has_fma && has_f16c && b7 >> 5 & 1 && (states & 0x6) == 0x6;
    const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* f dq cd bw vl */
    int has_avx512 = has_avx2 && (b7 & avx512) == avx512 && (states & 0xe6) == 0xe6;
    int has_bf16 = has_avx512 && a71 >> 5 & 1;
    int has_amx = has_bf16 && (d7 >> 22 & 5) == 5 /* amx-bf16 and amx-tile */ &&
                  (states & 0x60000) == 0x60000 && may_use_tiles();
    return has_amx ? 5 : has_bf16 ? 4 : has_avx512 ? 3 : has_avx2 ? 2 : 1;
}
#else
static int count_levels(void) { return 1; }
#endif

__attribute__((constructor)) static void detect(void) {
    num_levels = count_levels();
    for (int level = 0; level < num_levels; ++level) {
        kernel_table *table = &tables[level];
        table->name = "portable";
        isthmus_fill_portable(table);
#if defined(__x86_64__)
        if (level >= 1) table->name = "avx2", isthmus_fill_avx2(table);
        if (level >= 2) table->name = "avx512", isthmus_fill_avx512(table);
        if (level >= 3) {
            table->name = "avx512-bf16";
            isthmus_fill_avx512_bf16(table);
            isthmus_fill_dot(table);
        }
        if (level >= 4) isthmus_fill_amx(table);
#endif
    }
    kernels = &tables[num_levels - 1];
}

EXPORT int isthmus_version(void) { return VERSION; }
EXPORT int isthmus_num_levels(void) { return num_levels; }
EXPORT const char *isthmus_level_name(int level) {
    return level >= 0 && level < num_levels ? tables[level].name : "";
}
/* For tests: packed weights fit every level. */
EXPORT int isthmus_use_level(int level) {
    if (level < 0 || level >= num_levels) return -1;
    kernels = &tables[level];
    return 0;
}

static int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

/* ---- linear */

EXPORT int64_t isthmus_packed_bytes(int dtype, int64_t num_out, int64_t inner) {
    int64_t features = round_up(num_out, PANEL);
    return dtype == DTYPE_F32 ? features * inner * 4 : features * round_up(inner, INNER_STEP) * 2;
}

/* Copies weight[num_out][inner] into panels; `packed` is zeroed memory. */
EXPORT void isthmus_pack(int dtype, const void *weight, int64_t stride, int64_t num_out,
                         int64_t inner, void *packed) {
    int64_t padded = dtype == DTYPE_F32 ? inner : round_up(inner, INNER_STEP);
    for (int64_t n = 0; n < num_out; ++n) {
        int64_t panel = n / PANEL * PANEL * padded, column = n % PANEL;
        if (dtype == DTYPE_F32) {
            const float *from = (const float *)weight + n * stride;
            float *to = (float *)packed + panel + column;
            for (int64_t k = 0; k < inner; ++k) to[k * PANEL] = from[k];
        } else {
            const uint16_t *from = (const uint16_t *)weight + n * stride;
            uint16_t *to = (uint16_t *)packed + panel + column / 16 * 512 + column % 16 * 2;
            for (int64_t k = 0; k < inner; ++k)
                to[k / INNER_STEP * 1024 + k % INNER_STEP / 2 * 32 + k % 2] = from[k];
        }
    }
}

/* Whether isthmus_linear takes `is_gated` for this many outputs, gates not counted. */
EXPORT int isthmus_has_gated(int dtype, int64_t num_out) {
    return kernels->has_gated[dtype] && num_out % PANEL == 0;
}

/* `num_out` counts what is written: half the weight's rows if `is_gated`. */
EXPORT void isthmus_linear(int dtype, const void *x, int64_t x_stride, const void *packed,
                           const float *bias, void *out, int out_f32, int is_gated,
                           int64_t num_rows, int64_t inner, int64_t num_out, int num_threads) {
    linear_job job = {
        .x = x,
        .packed = packed,
        .bias = bias,
        .out = out,
        .x_stride = x_stride,
        .out_stride = num_out,
        .num_rows = num_rows,
        .inner = inner,
        .num_out = num_out,
        .num_panels = (num_out + PANEL - 1) / PANEL,
        .out_f32 = out_f32,
        .is_gated = is_gated,
    };
    if (dtype == DTYPE_BF16 && inner % INNER_STEP) { /* the packed weight has zeros there */
        job.inner = job.x_stride = round_up(inner, INNER_STEP);
        uint16_t *padded = isthmus_scratch(SCRATCH_CALL, (size_t)(num_rows * job.inner) * 2);
        for (int64_t row = 0; row < num_rows; ++row) {
            uint16_t *to = padded + row * job.inner;
            memcpy(to, (const uint16_t *)x + row * x_stride, (size_t)inner * 2);
            memset(to + inner, 0, (size_t)(job.inner - inner) * 2);
        }
        job.x = padded;
    }
    /* A range of rows stays in the second-level cache while all panels pass. */
    enum { RANGE_BYTES = 1 << 20, KEPT_ROWS = 128 };
    int64_t most_rows = RANGE_BYTES / (job.inner * (dtype == DTYPE_F32 ? 4 : 2)) / 32 * 32;
    if (most_rows < 64) most_rows = 64;
    int64_t num_ranges = (num_rows + most_rows - 1) / most_rows;
    /* Where a panel is used often enough to be read by each thread, a thread keeps its rows. */
    if (num_threads > 1 && num_rows >= KEPT_ROWS * num_threads)
        num_ranges = round_up(num_ranges, num_threads);
    job.rows_per_range = round_up((num_rows + num_ranges - 1) / num_ranges, 32);
    isthmus_run(kernels->linear[dtype], &job, num_ranges * job.num_panels, num_threads, 1);
}

/* ---- row operations */

static int threads_for(int64_t num_elements, int num_threads) {
    return num_elements < SMALL_CALL ? 1 : num_threads;
}

EXPORT void isthmus_rms_norm(int dtype, const void *x, int64_t x_stride, void *residual,
                             const void *weight, float eps, void *out, int64_t num_rows,
                             int64_t dim, int num_threads) {
    norm_job job = {
        .x = x,
        .residual = residual,
        .weight = weight,
        .out = out,
        .x_stride = x_stride,
        .out_stride = dim,
        .dim = dim,
        .eps = eps,
    };
    isthmus_run(kernels->rms_norm[dtype], &job, num_rows, threads_for(num_rows * dim, num_threads),
                1);
}

EXPORT void isthmus_silu_mul(int dtype, const void *gate_up, void *out, int64_t num_rows,
                             int64_t dim, int num_threads) {
    silu_job job = {.gate_up = gate_up, .out = out, .dim = dim};
    isthmus_run(kernels->silu_mul[dtype], &job, num_rows, threads_for(num_rows * dim, num_threads),
                1);
}

EXPORT void isthmus_rope(int dtype, const void *qkv, int64_t qkv_stride, const float *cos,
                         const float *sin, const void *q_norm, const void *k_norm, float eps,
                         const int64_t *slot, void *kv, const int64_t *kv_shape, int64_t num_heads,
                         void *q_out, int64_t num_rows, int num_threads) {
    rope_job job = {
        .qkv = qkv,
        .q_out = q_out,
        .kv = kv,
        .cos = cos,
        .sin = sin,
        .q_norm = q_norm,
        .k_norm = k_norm,
        .slot = slot,
        .qkv_stride = qkv_stride,
        .num_heads = num_heads,
        .num_kv_heads = kv_shape[0],
        .block_size = kv_shape[1],
        .head_dim = kv_shape[2],
        .block_stride = kv_shape[3],
        .side_stride = kv_shape[4],
        .head_stride = kv_shape[5],
        .eps = eps,
    };
    int64_t elements = num_rows * (num_heads + 2 * job.num_kv_heads) * job.head_dim;
    isthmus_run(kernels->rope[dtype], &job, num_rows, threads_for(elements, num_threads), 1);
}

/* ---- attention */

/* The plan of a call: prompts in blocks of queries, in the order of their rows; single queries
 * whole, or cut along their context where there are too few of them for the threads. */
typedef struct {
    attention_unit *units;
    attention_unit *merges;
    int64_t num_units, num_merges, num_partial_chunks;
} attention_plan;

static int64_t first_chunk(int64_t window, int64_t position) {
    int64_t lowest = window ? position - window + 1 : 0;
    return lowest > 0 ? lowest / KEY_CHUNK : 0;
}

static void plan_prompt(attention_plan *plan, const attention_job *job, int64_t sequence,
                        int64_t num_queries, int64_t tokens_per_unit) {
    int64_t start = job->context_len[sequence] - num_queries;
    for (int64_t first = 0; first < num_queries; first += tokens_per_unit) {
        int64_t end = first + tokens_per_unit < num_queries ? first + tokens_per_unit : num_queries;
        for (int64_t head = 0; head < job->num_kv_heads; ++head)
            plan->units[plan->num_units++] = (attention_unit){
                .sequence = (int32_t)sequence,
                .kv_head = (int32_t)head,
                .first_query = (int32_t)first,
                .num_queries = (int32_t)(end - first),
                .first_chunk = (int32_t)first_chunk(job->window, start + first),
                .end_chunk = (int32_t)((start + end - 1) / KEY_CHUNK + 1),
                .partial = -1,
            };
    }
}

static void plan_single(attention_plan *plan, const attention_job *job, int64_t sequence,
                        int64_t num_parts) {
    int64_t position = job->context_len[sequence] - 1;
    attention_unit whole = {
        .sequence = (int32_t)sequence,
        .num_queries = 1,
        .first_chunk = (int32_t)first_chunk(job->window, position),
        .end_chunk = (int32_t)(position / KEY_CHUNK + 1),
        .partial = -1,
    };
    int64_t num_chunks = whole.end_chunk - whole.first_chunk;
    if (num_parts > num_chunks) num_parts = num_chunks;
    for (int64_t head = 0; head < job->num_kv_heads; ++head) {
        whole.kv_head = (int32_t)head;
        if (num_parts > 1) {
            whole.partial = plan->num_partial_chunks;
            plan->num_partial_chunks += num_chunks;
            plan->merges[plan->num_merges++] = whole;
        }
        for (int64_t part = 0; part < num_parts; ++part) {
            attention_unit unit = whole;
            unit.first_chunk += (int32_t)(num_chunks * part / num_parts);
            unit.end_chunk = whole.first_chunk + (int32_t)(num_chunks * (part + 1) / num_parts);
            if (num_parts > 1) unit.partial += unit.first_chunk - whole.first_chunk;
            plan->units[plan->num_units++] = unit;
        }
    }
}

/* kv_shape: KV heads, slots in a block, head dim, then the strides of block, side and head. */
EXPORT void isthmus_attention(int dtype, const void *q, void *out, const void *kv,
                              const int64_t *kv_shape, int64_t num_heads,
                              const int32_t *block_table, int64_t table_stride,
                              const int32_t *query_start, const int32_t *context_len,
                              int64_t num_sequences, int64_t window, float scale,
                              int num_threads) {
    attention_job job = {
        .q = q,
        .out = out,
        .kv = kv,
        .block_table = block_table,
        .query_start = query_start,
        .context_len = context_len,
        .table_stride = table_stride,
        .num_heads = num_heads,
        .num_kv_heads = kv_shape[0],
        .block_size = kv_shape[1],
        .head_dim = kv_shape[2],
        .block_stride = kv_shape[3],
        .side_stride = kv_shape[4],
        .head_stride = kv_shape[5],
        .window = window,
        .scale = scale,
    };
    int64_t group = num_heads / job.num_kv_heads;
    int64_t wanted = num_threads > 1 ? 4 * num_threads : 1;
    int64_t tokens_per_unit = UNIT_ROWS / group > 0 ? UNIT_ROWS / group : 1;
    int64_t num_singles = 0, num_units;
    for (int64_t i = 0; i < num_sequences; ++i)
        num_singles += query_start[i + 1] - query_start[i] == 1;
    for (;; tokens_per_unit /= 2) { /* each unit packs the keys it sees: few, but enough to share */
        num_units = 0;
        for (int64_t i = 0; i < num_sequences; ++i)
            num_units += (query_start[i + 1] - query_start[i] + tokens_per_unit - 1) /
                         tokens_per_unit * job.num_kv_heads;
        if (num_units >= wanted || tokens_per_unit == 1 || tokens_per_unit * group <= 32) break;
    }
    int64_t num_parts = num_units > 0 ? (wanted + num_units - 1) / num_units : 1;
    if (group > MAX_SPLIT_ROWS) num_parts = 1;
    int64_t max_units = num_units + num_singles * job.num_kv_heads * (num_parts + 1);
    attention_plan plan = {0};
    plan.units = isthmus_scratch(SCRATCH_UNITS, (size_t)max_units * sizeof(attention_unit));
    plan.merges = plan.units + num_units + num_singles * job.num_kv_heads * num_parts;
    for (int64_t i = 0; i < num_sequences; ++i) {
        int64_t num_queries = query_start[i + 1] - query_start[i];
        if (num_queries > 1) plan_prompt(&plan, &job, i, num_queries, tokens_per_unit);
    }
    for (int64_t i = 0; i < num_sequences; ++i)
        if (query_start[i + 1] - query_start[i] == 1) plan_single(&plan, &job, i, num_parts);
    job.units = plan.units;
    if (plan.num_partial_chunks) {
        int64_t row = round_up(job.head_dim, 32) + 2;
        job.partials = isthmus_scratch(SCRATCH_CALL,
                                       (size_t)(plan.num_partial_chunks * group * row) * 4);
    }
    isthmus_run(kernels->attention[dtype], &job, plan.num_units, num_threads, 0);
    job.units = plan.merges;
    isthmus_run(kernels->merge[dtype], &job, plan.num_merges, 1, 0);
}
