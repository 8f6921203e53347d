/* bench_rows.h - rows of psa bench: what is measured in turns, each against its base, and how that is printed.
 * Include after run.h. Everything is static. Needs gcc or clang. */
#ifndef BENCH_ROWS_H
#define BENCH_ROWS_H

#include "gpu_model.h"
#include "peak.h"

enum { MOST_REPEATS = 15, LEAST_REPEATS = 5 };
static const double enough_seconds = 2; /* of repeats, once there are LEAST_REPEATS */

/* ---- inputs: waves along the tokens plus noise, so that neighbours are alike and a query has keys that matter ---- */

typedef struct bench_input {
    void *memory;
    char *data[3]; /* q, k, v: [heads][n_q or n][d]; k and v without a gap between them */
    char *out[2];  /* [heads][n_q][d]; 0: dense */
    psa_type type;
    int heads;
    int64_t n_q, n, d;
} bench_input;

static size_t input_bytes(const bench_input *in, int64_t n) {
    return (size_t)(in->heads * n * in->d) * psa_type_size(in->type);
}

/* splitmix64: the i-th number of a stream, in [0,1). */
static double random_at(uint64_t stream, uint64_t i) {
    uint64_t z = (stream << 40) + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

/* One head of q, k or v. A wave is a point that turns by the same angle from token to token. */
static void fill_head(const bench_input *in, int tensor, int head) {
    uint64_t waves = (uint64_t)(2 * head + (tensor == 2)), noise = (uint64_t)(1000 + 3 * head + tensor);
    double gain = tensor == 0 ? 1.5 : 1, tau = 6.283185307179586;
    double x[PSA_MAX_D], y[PSA_MAX_D], turn_x[PSA_MAX_D], turn_y[PSA_MAX_D];
    for (int64_t c = 0; c < in->d; c++) {
        double frequency = 0.5 * pow((double)in->n / 32 + 1, random_at(waves, (uint64_t)(2 * c)));
        double phase = tau * random_at(waves, (uint64_t)(2 * c + 1)), turn = tau * frequency / (double)in->n;
        x[c] = cos(phase), y[c] = sin(phase);
        turn_x[c] = cos(turn), turn_y[c] = sin(turn);
    }
    int64_t n = tensor == 0 ? in->n_q : in->n;
    for (int64_t i = 0; i < n * in->d; i++) {
        int64_t c = i % in->d, at = head * n * in->d + i;
        double value = gain * (x[c] + random_at(noise, (uint64_t)at) - 0.5);
        double next = x[c] * turn_x[c] - y[c] * turn_y[c];
        y[c] = x[c] * turn_y[c] + y[c] * turn_x[c];
        x[c] = next;
        set_element(in->data[tensor], in->type, (size_t)at, (float)value);
    }
}

static void fill_task(void *ctx, int ith, int nth) {
    (void)nth;
    fill_head((const bench_input *)ctx, ith % 3, ith / 3);
}

/* ---- rows: what is measured, side by side ---- */

enum { MOST_ROWS = 96, BLOCK_Q = 128 };

typedef struct bench bench;
typedef struct row row;

typedef struct sample {
    double median, least, most;
} sample;

struct row {
    char name[40];
    int64_t n, d;
    psa_type type;
    psa_isa isa;
    int threads;        /* 0: a GPU */
    const model_gpu *model; /* of a GPU; NULL: the GPU itself */
    double work;        /* what is done, in units that the row has in common with its base */
    int unrated;        /* work is the base's, not its own: no rate is shown */
    int is_cost;        /* the ratio is time per unit of work over the base's; else speed over the base's */
    const row *base[2]; /* what the row is measured against: the one in which it looks worse; NULL: nothing */
    double flop;        /* if not 0, base[1] is a peak, and what counts is the base that limits the row */
    double goal;        /* at least this speed or at most this cost, 0: none */
    double density;     /* of a level map, 0: none */
    int compared;       /* with dense */
    double error, largest_error;

    double (*measure)(bench *b, const row *r); /* seconds or bytes; -1 after a message */
    const bench_input *in;
    char *out;
    int64_t n_q;
    psa_desc desc;
    run *run;
    int stage;
    const row *parts; /* rows next to each other that this one is the sum of */
    int n_parts;
    double value[MOST_REPEATS];
};

/* What a topic measures: time or bytes, and a rate or none. */
typedef struct unit {
    const char *value, *value_key; /* column and JSON key */
    double scale;                  /* from seconds or bytes to the column's unit */
    const char *rate, *rate_key;
    double many;      /* units of work per second that are 1 of the rate's */
    int rate_is_time; /* ns for a unit of work */
} unit;

static const unit gflops = {"median ms", "seconds", 1e3, "GFLOP/s", "gflops", 1e9, 0};
static const unit tflops = {"median ms", "seconds", 1e3, "TFLOP/s", "tflops", 1e12, 0};
static const unit gbytes = {"median ms", "seconds", 1e3, "GB/s", "gbytes_per_second", 1e9, 0};
static const unit per_token = {"median ms", "seconds", 1e3, "ns/token", "ns_per_token", 0, 1};
static const unit memory = {"MiB", "bytes", 1.0 / 1048576, NULL, NULL, 0, 0};

typedef struct topic {
    void (*group)(bench *b, int64_t n, int64_t d);
    const unit *unit;
    int n[BENCH_CASES], d[BENCH_CASES], heads; /* defaults; lists end with 0 */
    int all_n, all_d;                          /* a group holds them all */
    const char *what;
} topic;

/* Rows that are measured together, and the memory that they use. */
struct bench {
    const options *o;
    crew *crew;
    gpu gpu;
    const topic *topic;
    const char *topic_name;
    psa_isa isa; /* the one asked for, or the best */
    int block_k, heads, n[BENCH_CASES], d[BENCH_CASES], n_n, n_d;
    double density;
    cJSON *json;
    int rc;
    row rows[MOST_ROWS];
    bench_input inputs[BENCH_CASES];
    run runs[BENCH_CASES];
    int n_rows, n_inputs, n_runs, repeats;
};

static double bench_fail(bench *b, const char *message) {
    b->rc = fail(b->o, "%s", message);
    return -1;
}

/* Attention of n_q queries with n keys, without memory. */
static bench_input *add_shape(bench *b, int type, int64_t n_q, int64_t n, int64_t d) {
    bench_input *in = &b->inputs[b->n_inputs++];
    memset(in, 0, sizeof *in);
    in->type = (psa_type)type;
    in->heads = b->heads;
    in->n_q = n_q, in->n = n, in->d = d;
    return in;
}

/* With it; once anything failed there is none, and what follows adds rows, but does no work. */
static bench_input *add_input(bench *b, int type, int64_t n_q, int64_t n, int64_t d) {
    bench_input *in = add_shape(b, type, n_q, n, d);
    size_t q = (input_bytes(in, n_q) + 63) / 64 * 64, kv = input_bytes(in, n);
    if (b->rc != 0)
        return in;
    in->memory = malloc(3 * q + 2 * kv + 128);
    if (!in->memory) {
        bench_fail(b, "not enough memory for the tensors");
        return in;
    }
    in->data[1] = (char *)in->memory + (64 - (uintptr_t)in->memory % 64);
    in->data[2] = in->data[1] + kv;
    in->data[0] = in->data[1] + (2 * kv + 63) / 64 * 64;
    in->out[0] = in->data[0] + q;
    in->out[1] = in->out[0] + q;
    crew_run(b->crew, 3 * in->heads, fill_task, in);
    return in;
}

static row *add_row(bench *b, const bench_input *in, int threads, double (*measure)(bench *, const row *)) {
    row *r = &b->rows[b->n_rows++];
    memset(r, 0, sizeof *r);
    r->measure = measure;
    r->in = in;
    r->threads = threads;
    r->isa = isa_of(b->isa, (int)in->type);
    r->n = in->n, r->d = in->d, r->n_q = in->n_q, r->type = in->type;
    return r;
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void name_row(row *r, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(r->name, sizeof r->name, format, args);
    va_end(args);
}

static void set_base(row *r, const row *base, int is_cost, double goal) {
    r->base[0] = base;
    r->is_cost = is_cost;
    r->goal = goal;
}

static double measure_peak(bench *b, const row *r) {
    return peak_seconds(b->crew, r->isa, r->type, r->threads);
}

/* type: of peak_seconds */
static row *add_peak(bench *b, const bench_input *in, psa_isa isa, psa_type type, int threads) {
    row *r = add_row(b, in, threads, measure_peak);
    r->type = type;
    r->isa = isa;
    r->work = peak_flop(isa, type, threads);
    name_row(r, "peak");
    return r;
}

static double measure_read(bench *b, const row *r) {
    return read_seconds(b->crew, r->isa, r->threads, r->in->data[1], 2 * input_bytes(r->in, r->n));
}

static void on_crew(void *user, int nth, psa_task_fn *task, void *ctx) {
    crew_run((crew *)user, nth, task, ctx);
}

/* What psa_attention takes: q, k, v, out. */
static void input_tensors(const bench_input *in, int64_t n_q, char *out, psa_tensor t[4]) {
    for (int i = 0; i < 4; i++)
        t[i] = psa_tensor_4d(i < 3 ? in->data[i] : out, in->type, in->d, i % 3 ? in->n : n_q, in->heads, 1);
}

static double measure_call(bench *b, const row *r) {
    psa_tensor t[4];
    input_tensors(r->in, r->n_q, r->out, t);
    double start = now();
    psa_result result = psa_attention(&r->desc, &t[0], &t[1], &t[2], &t[3], NULL);
    double seconds = now() - start;
    return result == PSA_OK ? seconds : bench_fail(b, psa_result_string(result));
}

/* psa_attention, with the memory that it asks for. */
static row *add_call(bench *b, bench_input *in, const psa_desc *desc, int64_t n_q, int threads) {
    row *r = add_row(b, in, threads, measure_call);
    name_row(r, "whole call");
    r->n_q = n_q;
    r->desc = *desc;
    r->desc.n_threads = threads;
    r->desc.parallel_fn = on_crew;
    r->desc.parallel_user = b->crew;
    r->work = 4.0 * (double)n_q * (double)in->n * (double)in->d * in->heads;
    r->out = in->out[desc->mask != PSA_MASK_DENSE];
    return r;
}

static row *add_dense(bench *b, bench_input *in, psa_isa isa, int64_t n_q, int threads) {
    psa_desc desc = b->o->desc;
    desc.isa = isa;
    desc.mask = PSA_MASK_DENSE;
    row *r = add_call(b, in, &desc, n_q, threads);
    name_row(r, "dense");
    r->isa = isa;
    return r;
}

/* Plan, memory and level map for rows that are stages. */
static run *add_run(bench *b, const bench_input *in, const psa_desc *desc) {
    psa_tensor t[4];
    run *stages = &b->runs[b->n_runs++];
    memset(stages, 0, sizeof *stages);
    if (b->rc != 0)
        return stages;
    input_tensors(in, in->n_q, in->out[1], t);
    b->rc = run_init(stages, b->o, b->crew, desc, b->crew->n_threads, &t[0], &t[1], &t[2], &t[3]);
    for (int stage = PREPARE; stage < ATTEND && b->rc == 0; stage++)
        if (stage_needed(stages, stage))
            b->rc = run_stage(stages, b->o, stage);
    return stages;
}

static double measure_stage(bench *b, const row *r) {
    b->rc = run_stage(r->run, b->o, r->stage);
    return b->rc == 0 ? r->run->seconds[r->stage] : -1;
}

static double measure_sum(bench *b, const row *r) {
    double sum = 0;
    for (int i = 0; i < r->n_parts; i++)
        sum += r->parts[i].value[b->repeats];
    return sum;
}

/* What the second half of the parts takes more than the first. */
static double measure_more(bench *b, const row *r) {
    double sum = 0;
    for (int i = 0; i < r->n_parts; i++)
        sum += (i < r->n_parts / 2 ? -1 : 1) * r->parts[i].value[b->repeats];
    return fmax(sum, 0);
}

static row *add_sum(bench *b, const row *parts, int n_parts, double (*measure)(bench *, const row *)) {
    row *r = add_row(b, parts->in, b->crew->n_threads, measure);
    r->parts = parts;
    r->n_parts = n_parts;
    return r;
}

static row *add_stage(bench *b, const bench_input *in, run *stages, int stage) {
    row *r = add_row(b, in, b->crew->n_threads, measure_stage);
    name_row(r, "%s", stage_names[stage]);
    r->run = stages;
    r->stage = stage;
    return r;
}

enum { CHOICE_ROWS = 4, RECIPE_ROWS = 6 }; /* pool, score, mask; with prepare and budget; and their sum */

/* The stages up to the level map, then their sum. Their work is what the caller says it is. */
static row *add_choice(bench *b, const bench_input *in, run *stages) {
    row *first = &b->rows[b->n_rows];
    int n = 0;
    for (int stage = PREPARE; stage < ATTEND; stage++)
        if (stage_needed(stages, stage))
            add_stage(b, in, stages, stage), n++;
    name_row(add_sum(b, first, n, measure_sum), "until the map");
    return first;
}

/* Attention on the run's level map. */
static row *add_attend(bench *b, const bench_input *in, run *stages) {
    row *r = add_stage(b, in, stages, ATTEND);
    psa_stats stats = {0};
    if (b->rc == 0)
        psa_stats_from_levels(&stages->plan, stages->levels, -1, -1, &stats);
    r->density = stats.density;
    return r;
}

/* Its work is as much of the dense call's as the density says. */
static void attend_against(row *attend, const row *dense) {
    attend->work = attend->density * dense->work;
    set_base(attend, dense, 1, 1.10);
}

/* ---- results ---- */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static sample summarise(const double *values, int n) {
    double sorted[MOST_REPEATS];
    sample s;
    memcpy(sorted, values, (size_t)n * sizeof *values);
    qsort(sorted, (size_t)n, sizeof *sorted, compare_doubles);
    s.least = sorted[0];
    s.most = sorted[n - 1];
    s.median = 0.5 * (sorted[(n - 1) / 2] + sorted[n / 2]);
    return s;
}

/* Speed over that of a base in the i-th repeat. */
static double speed_over(const row *r, int k, int i) {
    const row *base = r->base[k];
    double work = k == 1 && r->flop > 0 ? r->flop : r->work;
    return work / r->value[i] / (base->work / base->value[i]);
}

/* Of each repeat by itself: row and base were measured close to one another. */
static sample row_ratio(const row *r, int repeats) {
    double ratio[MOST_REPEATS];
    for (int i = 0; i < repeats; i++) {
        double speed = speed_over(r, 0, i);
        if (r->base[1])
            speed = r->flop > 0 ? fmax(speed, speed_over(r, 1, i)) : fmin(speed, speed_over(r, 1, i));
        ratio[i] = r->is_cost ? 1 / speed : speed;
    }
    return summarise(ratio, repeats);
}

static int goal_met(const row *r, double ratio) {
    return r->is_cost ? ratio <= r->goal : ratio >= r->goal;
}

static double row_rate(const bench *b, const row *r, double value) {
    return b->topic->unit->rate_is_time ? 1e9 * value / r->work : r->work / value / b->topic->unit->many;
}

static void print_header(const bench *b) {
    const unit *u = b->topic->unit;
    printf("%s: %s\n%d heads\n\n%7s %5s  %-35s %10s %10s %10s %9s %10s %10s %10s  goal\n", b->topic_name,
           b->topic->what, b->heads, "N", "D", "", u->value, "min", "max", u->rate ? u->rate : "", "ratio", "min",
           "max");
    fflush(stdout);
}

/* Without a spread if it was measured once. */
static void print_sample(sample s, double scale, int repeats) {
    printf(" %10.3f", scale * s.median);
    if (repeats > 1)
        printf(" %10.3f %10.3f", scale * s.least, scale * s.most);
    else
        printf(" %10s %10s", "", "");
}

static void print_row(const bench *b, const row *r) {
    const unit *u = b->topic->unit;
    sample s = summarise(r->value, b->repeats);
    printf("%7" PRId64 " %5" PRId64 "  %-35s", r->n, r->d, r->name);
    print_sample(s, u->scale, b->repeats);
    if (u->rate && !r->unrated)
        printf(" %9.1f", row_rate(b, r, s.median));
    else
        printf(" %9s", "");
    if (r->base[0]) {
        sample ratio = row_ratio(r, b->repeats);
        print_sample(ratio, 1, b->repeats);
        if (r->goal > 0)
            printf("  %s %.3g%s", r->is_cost ? "<=" : ">=", r->goal, goal_met(r, ratio.median) ? "" : ", missed");
    }
    printf("\n");
    if (r->compared)
        printf("%15sdensity %.4f; error against dense %.3g (L2), %.3g (max)\n", "", r->density, r->error,
               r->largest_error);
}

static void add_sample(cJSON *json, const char *name, sample s) {
    cJSON *item = cJSON_AddObjectToObject(json, name);
    cJSON_AddNumberToObject(item, "median", s.median);
    cJSON_AddNumberToObject(item, "min", s.least);
    cJSON_AddNumberToObject(item, "max", s.most);
}

static cJSON *row_json(const bench *b, const row *r) {
    sample s = summarise(r->value, b->repeats);
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "topic", b->topic_name);
    cJSON_AddStringToObject(json, "name", r->name);
    cJSON_AddNumberToObject(json, "n", (double)r->n);
    cJSON_AddNumberToObject(json, "d", (double)r->d);
    cJSON_AddStringToObject(json, "type", type_name((int)r->type));
    if (r->threads > 0) {
        cJSON_AddStringToObject(json, "isa", psa_isa_name(r->isa));
        cJSON_AddNumberToObject(json, "threads", r->threads);
    } else {
        cJSON_AddStringToObject(json, "device", r->model ? r->model->name : b->gpu.name);
    }
    cJSON_AddNumberToObject(json, "repeats", b->repeats);
    add_sample(json, b->topic->unit->value_key, s);
    if (b->topic->unit->rate && !r->unrated)
        cJSON_AddNumberToObject(json, b->topic->unit->rate_key, row_rate(b, r, s.median));
    if (r->density > 0)
        cJSON_AddNumberToObject(json, "density", r->density);
    if (r->compared) {
        cJSON_AddNumberToObject(json, "relative_error", r->error);
        cJSON_AddNumberToObject(json, "largest_error", r->largest_error);
    }
    if (r->base[0]) {
        sample ratio = row_ratio(r, b->repeats);
        add_sample(json, "ratio", ratio);
        if (r->goal > 0) {
            cJSON_AddNumberToObject(json, r->is_cost ? "at_most" : "at_least", r->goal);
            cJSON_AddBoolToObject(json, "met", goal_met(r, ratio.median));
        }
    }
    return json;
}

/* ---- a group: rows measured in turns ---- */

static void measure_round(bench *b) {
    for (int i = 0; i < b->n_rows && b->rc == 0; i++)
        b->rows[i].value[b->repeats] = b->rows[i].measure(b, &b->rows[i]);
}

static void measure_rows(bench *b) {
    measure_round(b); /* the warm-up: overwritten by the first repeat */
    double start = now();
    while (b->rc == 0 &&
           (b->repeats < LEAST_REPEATS || (b->repeats < MOST_REPEATS && now() - start < enough_seconds))) {
        measure_round(b);
        b->repeats++;
    }
}

/* Sizes are the same in every repeat. */
static void measure_once(bench *b) {
    measure_round(b);
    b->repeats = 1;
}

/* Reports the rows and frees what they used. */
static void end_group(bench *b) {
    for (int i = 0; i < b->n_rows && b->rc == 0; i++)
        if (b->o->json)
            cJSON_AddItemToArray(b->json, row_json(b, &b->rows[i]));
        else
            print_row(b, &b->rows[i]);
    if (b->rc == 0 && !b->o->json)
        printf("\n");
    fflush(stdout);
    for (int i = 0; i < b->n_inputs; i++)
        free(b->inputs[i].memory);
    for (int i = 0; i < b->n_runs; i++)
        run_free(&b->runs[i]);
    b->n_rows = b->n_inputs = b->n_runs = b->repeats = 0;
}
#endif
