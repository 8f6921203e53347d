/* bench.h - psa bench: how near attention comes to what it is measured against in the same run, topic by topic.
 * Include after run.h. Everything is static. Needs gcc or clang. */
#ifndef BENCH_H
#define BENCH_H

#include "peak.h"

#ifndef PSA_CFLAGS
#define PSA_CFLAGS "unknown"
#endif

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
    int threads;
    double work;        /* what is done, in units that the row has in common with its base */
    int unrated;        /* work is the base's, not its own: no rate is shown */
    int is_cost;        /* the ratio is time per unit of work over the base's; else speed over the base's */
    const row *base[2]; /* what the row is measured against: the one in which it looks worse; NULL: nothing */
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
    double value[MOST_REPEATS];
};

/* What a topic measures: time or bytes, and a rate or none. */
typedef struct unit {
    const char *value, *value_key; /* column and JSON key */
    double scale;                  /* from seconds or bytes to the column's unit */
    const char *rate, *rate_key;
    int rate_is_time; /* ns for a unit of work; else 1e9 units of work per second */
} unit;

static const unit gflops = {"median ms", "seconds", 1e3, "GFLOP/s", "gflops", 0};
static const unit gbytes = {"median ms", "seconds", 1e3, "GB/s", "gbytes_per_second", 0};
static const unit per_token = {"median ms", "seconds", 1e3, "ns/token", "ns_per_token", 1};
static const unit memory = {"MiB", "bytes", 1.0 / 1048576, NULL, NULL, 0};

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

/* Attention of n_q queries with n keys; NULL once anything failed, as in all that follows. */
static bench_input *add_input(bench *b, int type, int64_t n_q, int64_t n, int64_t d) {
    if (b->rc != 0)
        return NULL;
    bench_input *in = &b->inputs[b->n_inputs++];
    memset(in, 0, sizeof *in);
    in->type = (psa_type)type;
    in->heads = b->heads;
    in->n_q = n_q, in->n = n, in->d = d;
    size_t q = (input_bytes(in, n_q) + 63) / 64 * 64, kv = input_bytes(in, n);
    in->memory = malloc(3 * q + 2 * kv + 128);
    if (!in->memory) {
        bench_fail(b, "not enough memory for the tensors");
        return NULL;
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
    r->isa = b->isa;
    if (in)
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
    return peak_seconds(b->crew, r->isa, r->threads);
}

static row *add_peak(bench *b, const bench_input *in, psa_isa isa, int threads) {
    row *r = add_row(b, in, threads, measure_peak);
    r->type = PSA_F32;
    r->isa = isa;
    r->work = peak_flop(isa, threads);
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
    if (in) {
        r->work = 4.0 * (double)n_q * (double)in->n * (double)in->d * in->heads;
        r->out = in->out[desc->mask != PSA_MASK_DENSE];
    }
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
    run *stages = &b->runs[b->n_runs];
    if (b->rc != 0)
        return NULL;
    b->n_runs++;
    input_tensors(in, in->n_q, in->out[1], t);
    b->rc = run_init(stages, b->o, b->crew, desc, b->crew->n_threads, &t[0], &t[1], &t[2], &t[3]);
    for (int stage = POOL; stage < ATTEND && b->rc == 0; stage++)
        b->rc = run_stage(stages, b->o, stage);
    return stages;
}

static double measure_stage(bench *b, const row *r) {
    b->rc = run_stage(r->run, b->o, r->stage);
    return b->rc == 0 ? r->run->seconds[r->stage] : -1;
}

static double measure_choice(bench *b, const row *r) {
    int i = b->repeats;
    return r[-3].value[i] + r[-2].value[i] + r[-1].value[i];
}

enum { CHOICE_ROWS = STAGES }; /* pool, score, mask, and their sum */

/* The stages up to the level map. Their work is what the caller says it is. */
static row *add_choice(bench *b, const bench_input *in, run *stages) {
    row *first = &b->rows[b->n_rows];
    for (int stage = POOL; stage <= ATTEND; stage++) {
        row *r = add_row(b, in, b->crew->n_threads, stage < ATTEND ? measure_stage : measure_choice);
        name_row(r, "%s", stage < ATTEND ? stage_names[stage] : "pool + score + mask");
        r->run = stages;
        r->stage = stage;
    }
    return first;
}

/* Attention on the run's level map. */
static row *add_attend(bench *b, const bench_input *in, run *stages) {
    row *r = add_row(b, in, b->crew->n_threads, measure_stage);
    name_row(r, "attend");
    r->run = stages;
    r->stage = ATTEND;
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

/* Of each repeat by itself: row and base were measured close to one another. */
static sample row_ratio(const row *r, int repeats) {
    double ratio[MOST_REPEATS];
    for (int i = 0; i < repeats; i++) {
        double speed = INFINITY;
        for (int k = 0; k < 2; k++) {
            const row *base = r->base[k];
            if (base)
                speed = fmin(speed, r->work / r->value[i] / (base->work / base->value[i]));
        }
        ratio[i] = r->is_cost ? 1 / speed : speed;
    }
    return summarise(ratio, repeats);
}

static int goal_met(const row *r, double ratio) {
    return r->is_cost ? ratio <= r->goal : ratio >= r->goal;
}

static double row_rate(const bench *b, const row *r, double value) {
    return b->topic->unit->rate_is_time ? 1e9 * value / r->work : 1e-9 * r->work / value;
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
    cJSON_AddStringToObject(json, "isa", psa_isa_name(r->isa));
    cJSON_AddNumberToObject(json, "threads", r->threads);
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

/* ---- level maps of a given density ---- */

typedef struct mix {
    const char *name;
    double end[PSA_MAX_LEVELS]; /* of levels 1, 2, 4, ..., before they are stretched */
} mix;

enum { DEFAULT_MIX, MIXES = 3 };
static const mix mixes[MIXES] = {
    {"default levels", {.1, .15, .15, .35}},
    {"level 1 or none", {.1}},
    {"all levels", {.1, .2, .3, .4, .5, .6, .7, .8}}, /* as many blocks at each, as far as block_k goes */
};

/* Level ends of the mix stretched by factor, in whole blocks of nk; the density they make. */
static double stretch(const mix *m, double factor, int block_k, int64_t nk, double *end) {
    double density = 0, before = 0;
    for (int i = 0; i < PSA_MAX_LEVELS && m->end[i] > 0 && 1 << i <= block_k; i++) {
        double blocks = fmax(1, floor(fmin(1, factor * m->end[i]) * (double)nk));
        end[i] = fmin(1, (blocks + 0.5) / (double)nk); /* psa_mask rounds down again */
        density += (blocks - before) / (double)nk / (1 << i);
        before = blocks;
    }
    return density;
}

/* Top-k with the least stretch that has this density or more. */
static psa_desc mix_desc(const bench *b, const mix *m, double density, int block_k, int64_t n) {
    psa_desc desc = b->o->desc;
    double low = 0, high = 10.001; /* every block at level 1 */
    int64_t nk = (n + block_k - 1) / block_k;
    desc.block_k = block_k;
    for (int i = 0; i < 60; i++) {
        double middle = 0.5 * (low + high);
        if (stretch(m, middle, block_k, nk, desc.level_end) < density)
            low = middle;
        else
            high = middle;
    }
    stretch(m, high, block_k, nk, desc.level_end);
    return desc;
}

/* ---- topics ---- */

static int one_type(const bench *b) { return b->o->type < 0 ? PSA_F32 : b->o->type; }

/* Without --type: all of them. */
static int type_wanted(const bench *b, int type) { return b->o->type < 0 || b->o->type == type; }

/* Without --isa: all that there are, but scalar code only where there is nothing else. */
static int isa_wanted(const bench *b, psa_isa isa) {
    if (b->o->desc.isa || isa == PSA_ISA_SCALAR)
        return b->isa == isa;
    return psa_isa_supported(isa);
}

/* 1, 2, 4, ... and all of them; 0 ends it. */
static int next_threads(const bench *b, int threads) {
    int all = b->crew->n_threads;
    return threads == all ? 0 : threads > all / 2 ? all : 2 * threads;
}

static double dense_goal(psa_isa isa, int64_t d) {
    double avx512 = d == 64 ? 0.84 : d == 128 ? 0.88 : 0, avx2 = d == 64 ? 0.80 : d == 128 ? 0.82 : 0;
    return isa == PSA_ISA_AVX512 ? avx512 : isa == PSA_ISA_AVX2 ? avx2 : 0;
}

static void dense_group(bench *b, int64_t n, int64_t d) {
    bench_input *in[3] = {0};
    int threads = b->crew->n_threads;
    for (int type = PSA_F32; type <= PSA_BF16; type++)
        if (type == PSA_F32 || type_wanted(b, type))
            in[type] = add_input(b, type, n, n, d);
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
        if (!isa_wanted(b, (psa_isa)isa))
            continue;
        row *base = add_peak(b, in[PSA_F32], (psa_isa)isa, threads);
        name_row(base, "%s peak", psa_isa_name((psa_isa)isa));
        for (int type = PSA_F32; type <= PSA_BF16; type++) {
            if (!in[type])
                continue;
            row *r = add_dense(b, in[type], (psa_isa)isa, n, threads);
            set_base(r, base, 0, type == PSA_F32 ? dense_goal((psa_isa)isa, d) : 0.9);
            name_row(r, "%s %s", psa_isa_name((psa_isa)isa), type_name(type));
            if (type == PSA_F32)
                base = r;
        }
    }
    measure_rows(b);
    end_group(b);
}

static void call_group(bench *b, int64_t n, int64_t d) {
    int threads = b->crew->n_threads;
    psa_desc desc = mix_desc(b, &mixes[DEFAULT_MIX], b->density, b->block_k, n);
    bench_input *in = add_input(b, one_type(b), n, n, d);
    run *stages = add_run(b, in, &desc);
    const row *most = add_peak(b, in, b->isa, threads);
    row *dense = add_dense(b, in, b->isa, n, threads);
    set_base(dense, most, 0, 0);
    row *choice = add_choice(b, in, stages);
    for (int i = 0; i < CHOICE_ROWS; i++) { /* all of it for a dense call's worth of work */
        choice[i].work = dense->work;
        choice[i].unrated = 1;
        set_base(&choice[i], dense, 1, 0);
    }
    choice[CHOICE_ROWS - 1].goal = n >= 16384 ? 0.05 : n >= 4096 ? 0.08 : 0;
    row *attend = add_attend(b, in, stages);
    attend_against(attend, dense);
    row *call = add_call(b, in, &desc, n, threads);
    set_base(call, dense, 0, n >= 16384 && b->density == 0.15 ? 5.5 : 0);
    call->density = attend->density;
    measure_rows(b);
    if (b->rc == 0) {
        call->compared = 1;
        difference(dense->out, call->out, in->type, (size_t)(in->heads * n * d), &call->error, &call->largest_error);
    }
    end_group(b);
}

static void density_group(bench *b, int64_t n, int64_t d, int block_k) {
    static const double densities[] = {.05, .1, .15, .25, .5};
    bench_input *in = add_input(b, one_type(b), n, n, d);
    const row *dense = add_dense(b, in, b->isa, n, b->crew->n_threads);
    for (int m = 0; m < MIXES; m++)
        for (int i = 0; i < (b->o->density > 0 ? 1 : 5); i++) {
            psa_desc desc = mix_desc(b, &mixes[m], b->o->density > 0 ? b->density : densities[i], block_k, n);
            row *r = add_attend(b, in, add_run(b, in, &desc));
            attend_against(r, dense);
            name_row(r, "block %d, %s, %.3f", block_k, mixes[m].name, r->density);
        }
    measure_rows(b);
    end_group(b);
}

static void density_groups(bench *b, int64_t n, int64_t d) {
    for (int block_k = 32; block_k <= 128 && !b->o->desc.block_k; block_k *= 2)
        density_group(b, n, d, block_k);
    if (b->o->desc.block_k)
        density_group(b, n, d, b->block_k);
}

static void decode_group(bench *b, int64_t n, int64_t d, int type) {
    static const int n_q[] = {1, 2, 4, 8, 16};
    bench_input *in = add_input(b, type, 16, n, d);
    for (int threads = 1; threads; threads = threads == b->crew->n_threads ? 0 : b->crew->n_threads) {
        row *read = add_row(b, in, threads, measure_read);
        read->work = in ? 2.0 * (double)input_bytes(in, n) : 0;
        name_row(read, "%s, threads %d: reading", type_name(type), threads);
        for (int i = 0; i < 5; i++) {
            row *r = add_dense(b, in, b->isa, n_q[i], threads);
            r->work = read->work;
            set_base(r, read, 0, 0.8);
            name_row(r, "%s, threads %d: queries %d", type_name(type), threads, n_q[i]);
        }
    }
    measure_rows(b);
    end_group(b);
}

static void decode_groups(bench *b, int64_t n, int64_t d) {
    for (int type = PSA_F32; type <= PSA_BF16; type++)
        if (type_wanted(b, type))
            decode_group(b, n, d, type);
}

/* The default levels as numbers of blocks, which are as many for every N: those of the density at n tokens. */
static psa_desc count_desc(const bench *b, int64_t n) {
    psa_desc desc = mix_desc(b, &mixes[DEFAULT_MIX], b->density, b->block_k, n);
    int64_t nk = (n + b->block_k - 1) / b->block_k;
    int before = 0;
    for (int i = 0; i < PSA_MAX_LEVELS && desc.level_end[i] > 0; i++) {
        int blocks = (int)(desc.level_end[i] * (double)nk);
        desc.level_count[i] = blocks - before;
        before = blocks;
    }
    memset(desc.level_end, 0, sizeof desc.level_end);
    desc.score = PSA_SCORE_POOLED;
    return desc;
}

/* Every row against its like at the first N from 16384 on, or at the first one of all. */
static void linear_group(bench *b, int64_t n, int64_t d) {
    (void)n; /* all of them, side by side */
    enum { EACH = CHOICE_ROWS + 2 };
    psa_desc desc = count_desc(b, b->n[0]);
    int base = 0;
    while (base < b->n_n - 1 && b->n[base] < 16384)
        base++;
    base = b->n[base] < 16384 ? 0 : base;
    for (int i = 0; i < b->n_n; i++) {
        bench_input *in = add_input(b, one_type(b), b->n[i], b->n[i], d);
        run *stages = add_run(b, in, &desc);
        row *first = add_choice(b, in, stages);
        add_attend(b, in, stages);
        row *call = add_call(b, in, &desc, b->n[i], b->crew->n_threads);
        for (int k = 0; k < EACH; k++) {
            first[k].work = (double)b->n[i] * b->heads;
            set_base(&first[k], i == base ? NULL : &b->rows[base * EACH + k], 1, 0);
        }
        call->goal = i > base ? 1.2 : 0;
    }
    measure_rows(b);
    end_group(b);
}

/* Against the neighbours that are multiples of 64. */
static void head_size_group(bench *b, int64_t n, int64_t d) {
    (void)d; /* all of them, side by side */
    for (int i = 0; i < b->n_d; i++)
        add_dense(b, add_input(b, one_type(b), n, n, b->d[i]), b->isa, n, b->crew->n_threads);
    for (int i = 0; i < b->n_d; i++)
        for (int k = 0, found = 0; k < b->n_d && found < 2; k++)
            if (b->d[i] % 64 != 0 && b->d[k] % 64 == 0 && abs(b->d[k] - b->d[i]) < 64) {
                b->rows[i].base[found++] = &b->rows[k];
                b->rows[i].goal = 0.7;
            }
    measure_rows(b);
    end_group(b);
}

static void threads_group(bench *b, int64_t n, int64_t d) {
    enum { EACH = 3 };
    bench_input *in = add_input(b, one_type(b), n, n, d);
    psa_desc desc = mix_desc(b, &mixes[DEFAULT_MIX], b->density, b->block_k, n);
    for (int threads = 1; threads; threads = next_threads(b, threads)) {
        row *first = add_peak(b, in, b->isa, threads);
        add_dense(b, in, b->isa, n, threads);
        add_call(b, in, &desc, n, threads);
        for (int k = 0; k < EACH; k++) {
            char name[sizeof first->name];
            snprintf(name, sizeof name, "%s", first[k].name);
            name_row(&first[k], "threads %d: %s", threads, name);
            if (threads > 1)
                set_base(&first[k], &b->rows[k], 0, k > 0 ? 0.95 * threads : 0);
        }
    }
    measure_rows(b);
    end_group(b);
}

/* ---- topic memory: what a call asks for ---- */

enum { COUNT_HEADER = 64 }; /* bytes ahead of a block, for its size */

typedef struct counter {
    size_t now, most;
} counter;

static void *counting_alloc(void *user, size_t size) {
    counter *c = (counter *)user;
    char *block = (char *)malloc(COUNT_HEADER + size);
    if (!block)
        return NULL;
    memcpy(block, &size, sizeof size);
    c->now += size;
    c->most = c->now > c->most ? c->now : c->most;
    return block + COUNT_HEADER;
}

static void counting_free(void *user, void *ptr) {
    char *block = (char *)ptr - COUNT_HEADER;
    size_t size;
    memcpy(&size, block, sizeof size);
    ((counter *)user)->now -= size;
    free(block);
}

static double measure_memory(bench *b, const row *r) {
    counter c = {0, 0};
    row counted = *r;
    counted.desc.alloc_fn = counting_alloc;
    counted.desc.free_fn = counting_free;
    counted.desc.alloc_user = &c;
    return measure_call(b, &counted) < 0 ? -1 : (double)c.most;
}

/* A copy of K and of V, a byte for each block pair, 1 MiB for each thread. */
static double measure_allowance(bench *b, const row *r) {
    int64_t nq = (r->n + BLOCK_Q - 1) / BLOCK_Q, nk = (r->n + b->block_k - 1) / b->block_k;
    return 2.0 * (double)input_bytes(r->in, r->n) + (double)(b->heads * nq * nk) + 1048576.0 * r->threads;
}

static void memory_group(bench *b, int64_t n, int64_t d) {
    psa_desc desc = mix_desc(b, &mixes[DEFAULT_MIX], b->density, b->block_k, n);
    for (int type = PSA_F32; type <= PSA_BF16; type++) {
        if (!type_wanted(b, type))
            continue;
        bench_input *in = add_input(b, type, n, n, d);
        row *allowance = add_row(b, in, b->crew->n_threads, measure_allowance);
        row *call = add_call(b, in, &desc, n, b->crew->n_threads);
        name_row(allowance, "%s, allowance", type_name(type));
        name_row(call, "%s, whole call", type_name(type));
        call->measure = measure_memory;
        call->work = allowance->work = 1;
        set_base(call, allowance, 1, 1);
    }
    measure_once(b);
    end_group(b);
}

/* ---- the command ---- */

/* In the order of topic_name. */
static const topic topics[] = {
    {dense_group, &gflops, {4096}, {64, 128}, 4, 0, 0,
     "exact attention; speed: f32 over the measured f32 multiply-add peak, f16 and bf16 over f32"},
    {call_group, &gflops, {4096, 16384}, {64, 128}, 4, 0, 0,
     "dense: speed over the peak's; pool to mask: share of the dense time;\n"
     "attend: time / (density * dense time); whole call: dense time / its time"},
    {density_groups, &gflops, {4096}, {64, 128}, 4, 0, 0,
     "attention on level maps; time / (density * dense time). The number after the levels is the density"},
    {decode_groups, &gbytes, {131072}, {128}, 8, 0, 0,
     "few queries, dense; bytes of K and V a second over those of a sum that reads the same memory"},
    {linear_group, &per_token, {4096, 16384, 65536, 262144}, {64}, 1, 1, 0,
     "pooled scores, a fixed number of blocks for each query block;\n"
     "time per token over that at the first N from 16384 on"},
    {head_size_group, &gflops, {2048}, {32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256}, 4, 0, 1,
     "dense; speed over that of the faster neighbour among the multiples of 64"},
    {threads_group, &gflops, {4096}, {64, 128}, 4, 0, 0,
     "speed over that of one thread; whole call: GFLOP/s as if it were dense"},
    {memory_group, &memory, {4096, 16384}, {64, 128}, 4, 0, 0,
     "what a call allocates over what it may: a copy of K and V, a byte for each block pair, 1 MiB a thread"},
};
enum { TOPICS = sizeof topics / sizeof *topics };

static void cpu_name(char *name, size_t size) {
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    snprintf(name, size, "unknown");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(name, size, "%s", strchr(line, ':') + 2);
            name[strcspn(name, "\n")] = 0;
            break;
        }
    if (f)
        fclose(f);
}

#ifdef __clang__
static const char bench_compiler[] = "clang " __clang_version__;
#elif defined(__GNUC__)
static const char bench_compiler[] = "gcc " __VERSION__;
#else
static const char bench_compiler[] = "unknown";
#endif

static void print_machine(const bench *b, const char *cpu) {
    printf("cpu       %s\ncompiler  %s, flags %s\n", cpu, bench_compiler, PSA_CFLAGS);
    printf("run       %d threads, %s, one batch, blocks %d x %d, top-k near density %.3g\n", b->crew->n_threads,
           psa_isa_name(b->isa), BLOCK_Q, b->block_k, b->density);
    printf("rows      of a group in turns, %d to %d times; ratio of each turn, its median, minimum and maximum\n\n",
           LEAST_REPEATS, MOST_REPEATS);
    fflush(stdout);
}

static cJSON *machine_json(const bench *b, const char *cpu) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "cpu", cpu);
    cJSON_AddStringToObject(json, "compiler", bench_compiler);
    cJSON_AddStringToObject(json, "flags", PSA_CFLAGS);
    cJSON_AddNumberToObject(json, "threads", b->crew->n_threads);
    cJSON_AddStringToObject(json, "isa", psa_isa_name(b->isa));
    cJSON_AddNumberToObject(json, "block_k", b->block_k);
    cJSON_AddNumberToObject(json, "density_asked", b->density);
    return json;
}

/* The caller's list, or else the topic's. */
static int choose_list(int *list, const int *given, int n_given, const int *usual) {
    int n = n_given;
    while (!n_given && n < BENCH_CASES && usual[n])
        n++;
    memcpy(list, n_given ? given : usual, (size_t)n * sizeof *list);
    return n;
}

static void run_topic(bench *b, int i) {
    const options *o = b->o;
    const topic *t = b->topic = &topics[i];
    b->topic_name = topic_name(i);
    b->heads = o->heads ? o->heads : t->heads;
    b->n_n = choose_list(b->n, o->n, o->n_n, t->n);
    b->n_d = choose_list(b->d, o->d, o->n_d, t->d);
    if (!o->json)
        print_header(b);
    for (int n = 0; n < (t->all_n ? 1 : b->n_n); n++)
        for (int d = 0; d < (t->all_d ? 1 : b->n_d) && b->rc == 0; d++)
            t->group(b, b->n[n], b->d[d]);
}

static void run_topics(bench *b) {
    char cpu[128];
    cpu_name(cpu, sizeof cpu);
    cJSON *json = machine_json(b, cpu);
    b->json = cJSON_AddArrayToObject(json, "rows");
    if (!b->o->json)
        print_machine(b, cpu);
    for (int i = 0; i < TOPICS && b->rc == 0; i++)
        if (!b->o->topics || b->o->topics >> i & 1)
            run_topic(b, i);
    if (b->rc == 0 && b->o->json) {
        char *text = cJSON_Print(json);
        printf("%s\n", text ? text : "{}");
        cJSON_free(text);
    }
    cJSON_Delete(json);
}

static int check_bench(const options *o, const bench *b) {
    if (!psa_isa_supported(b->isa))
        return fail(o, "--isa %s: this CPU does not have it", psa_isa_name(b->isa));
    for (int i = 0; i < o->n_d; i++)
        if (o->d[i] % 8)
            return fail(o, "--d %d: expected a multiple of 8", o->d[i]);
    if (b->block_k & (b->block_k - 1) || b->block_k < 16 || b->block_k > 128)
        return fail(o, "--block-k %d: expected 16, 32, 64 or 128", b->block_k);
    return 0;
}

static int cmd_bench(const options *o) {
    static bench b; /* too large for a stack */
    crew c;
    b.o = o;
    b.crew = &c;
    b.isa = o->desc.isa ? o->desc.isa : psa_isa_detect();
    b.block_k = o->desc.block_k ? o->desc.block_k : 64;
    b.density = o->density > 0 ? o->density : 0.15;
    if (check_bench(o, &b))
        return 2;
    crew_start(&c, o->threads);
    run_topics(&b);
    crew_stop(&c);
    return b.rc;
}
#endif
