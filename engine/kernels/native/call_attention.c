/* Attention as Python calls it: the units of a call, run, and merged where they were split. */
#include "call.h"

/* The plan of a call: prompts in blocks of queries, from the last, which sees most keys, to the
 * first; single queries whole, or cut along their context where there are too few of them for the
 * threads. */
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
    int64_t last = (num_queries - 1) / tokens_per_unit * tokens_per_unit;
    for (int64_t first = last, end = num_queries; first >= 0; end = first, first -= tokens_per_unit)
        for (int64_t head = 0; head < job->kv.num_heads; ++head)
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
    for (int64_t head = 0; head < job->kv.num_heads; ++head) {
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

/* Copies units, from the largest to the smallest, to where equal shares of them are equal work: in
 * turns to the first and the last thread first. */
static void deal_units(const attention_unit *units, int64_t num_units, int num_threads,
                       attention_unit *dealt) {
    int64_t num_rounds = num_units / num_threads, left = num_rounds * num_threads;
    for (int64_t thread = 0; thread < num_threads; ++thread) {
        int64_t slot = num_units * thread / num_threads;
        int64_t end = num_units * (thread + 1) / num_threads;
        for (int64_t round = 0; slot < end; ++slot, ++round) {
            int64_t place = round % 2 ? num_threads - 1 - thread : thread;
            dealt[slot] = units[round < num_rounds ? round * num_threads + place : left++];
        }
    }
}

void isthmus_run_attention(int dtype, attention_job job, int64_t num_sequences, int num_threads) {
    const int32_t *query_start = job.query_start;
    int64_t group = job.num_heads / job.kv.num_heads;
    int64_t wanted = num_threads > 1 ? 4 * num_threads : 1;
    int64_t tokens_per_unit = UNIT_ROWS / group > 0 ? UNIT_ROWS / group : 1;
    int64_t num_singles = 0, num_units, units_a_thread = 2;
    for (int64_t i = 0; i < num_sequences; ++i) {
        int64_t num_queries = query_start[i + 1] - query_start[i];
        num_singles += num_queries == 1;
        /* The start of a prompt makes units of uneven size: more of them share better. */
        if (num_queries > 1 && job.context_len[i] < 2 * num_queries) units_a_thread = 4;
    }
    int64_t fewest_units = num_threads > 1 ? units_a_thread * num_threads : 1;
    for (;; tokens_per_unit /= 2) { /* each unit packs the keys it sees: few, but enough to share */
        num_units = 0;
        for (int64_t i = 0; i < num_sequences; ++i)
            num_units += (query_start[i + 1] - query_start[i] + tokens_per_unit - 1) /
                         tokens_per_unit * job.kv.num_heads;
        if (num_units >= fewest_units || tokens_per_unit == 1 || tokens_per_unit * group <= 32)
            break;
    }
    int64_t num_parts = num_units > 0 ? (wanted + num_units - 1) / num_units : 1;
    if (group > MAX_SPLIT_ROWS || job.log_sum) num_parts = 1;
    int64_t max_merges = num_singles * job.kv.num_heads;
    int64_t max_units = num_units + max_merges * num_parts;
    attention_plan plan = {0};
    plan.units = isthmus_scratch(SCRATCH_UNITS,
                                 (size_t)(2 * max_units + max_merges) * sizeof(attention_unit));
    plan.merges = plan.units + 2 * max_units;
    for (int64_t i = 0; i < num_sequences; ++i) {
        int64_t num_queries = query_start[i + 1] - query_start[i];
        if (num_queries > 1) plan_prompt(&plan, &job, i, num_queries, tokens_per_unit);
    }
    for (int64_t i = 0; i < num_sequences; ++i)
        if (query_start[i + 1] - query_start[i] == 1) plan_single(&plan, &job, i, num_parts);
    deal_units(plan.units, plan.num_units, num_threads, plan.units + max_units);
    job.units = plan.units + max_units;
    if (plan.num_partial_chunks) {
        int64_t row = round_up(job.kv.head_dim, 32) + 2;
        job.partials = isthmus_scratch(SCRATCH_CALL,
                                       (size_t)(plan.num_partial_chunks * group * row) * 4);
    }
    isthmus_run(isthmus_kernels->attention[dtype], &job, plan.num_units, num_threads, 0);
    job.units = plan.merges;
    isthmus_run(isthmus_kernels->merge[dtype], &job, plan.num_merges, 1, 0);
}

/* A part of attention: to the positions in `spans` alone, `out` and `log_sum` in float32. Without
 * both: to the whole context, `out` in the step's type. */
EXPORT void isthmus_attention_part(int dtype, const void *q, void *out, float *log_sum,
                                   const void *kv, const kv_shape *shape, int64_t num_heads,
                                   const int32_t *block_table, int64_t table_stride,
                                   const int32_t *query_start, const int32_t *context_len,
                                   const key_span *spans, const int32_t *span_start,
                                   int64_t num_sequences, int64_t window, float scale,
                                   int num_threads) {
    attention_job job = {
        .q = q,
        .out = out,
        .log_sum = log_sum,
        .kv_memory = kv,
        .block_table = block_table,
        .query_start = query_start,
        .context_len = context_len,
        .spans = spans,
        .span_start = span_start,
        .table_stride = table_stride,
        .out_stride = num_heads * shape->head_dim,
        .num_heads = num_heads,
        .kv = *shape,
        .window = window,
        .scale = scale,
    };
    isthmus_run_attention(dtype, job, num_sequences, num_threads);
}

EXPORT void isthmus_attention(int dtype, const void *q, void *out, const void *kv,
                              const kv_shape *shape, int64_t num_heads,
                              const int32_t *block_table, int64_t table_stride,
                              const int32_t *query_start, const int32_t *context_len,
                              int64_t num_sequences, int64_t window, float scale,
                              int num_threads) {
    isthmus_attention_part(dtype, q, out, NULL, kv, shape, num_heads, block_table, table_stride,
                           query_start, context_len, NULL, NULL, num_sequences, window, scale,
                           num_threads);
}
