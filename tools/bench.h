/* bench.h - psa bench: how near attention comes to what it is measured against in the same run, topic by topic.
 * Include after run.h. Everything is static. Needs gcc or clang. */
#ifndef BENCH_H
#define BENCH_H

#include "bench_rows.h"

#ifndef PSA_CFLAGS
#define PSA_CFLAGS "unknown"
#endif

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

/* Top-k with the stretch whose density is nearest to this one. */
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
    double below = stretch(m, low, block_k, nk, desc.level_end);
    if (stretch(m, high, block_k, nk, desc.level_end) - density > density - below)
        stretch(m, low, block_k, nk, desc.level_end);
    return desc;
}

#include "bench_gpu.h"

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

/* Of the peak of bf16 products. */
static double bf16_goal(int64_t d) { return d == 64 ? 0.78 : d == 128 ? 0.84 : 0; }

static void dense_group(bench *b, int64_t n, int64_t d) {
    bench_input *in[3] = {0};
    row *f32 = NULL;
    int threads = b->crew->n_threads;
    for (int type = PSA_F32; type <= PSA_BF16; type++)
        if (type == PSA_F32 || type_wanted(b, type))
            in[type] = add_input(b, type, n, n, d);
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
        if (!isa_wanted(b, (psa_isa)isa))
            continue;
        for (int type = PSA_F32; type <= PSA_BF16; type++) {
            psa_isa is = isa_of((psa_isa)isa, type);
            row *peak = NULL;
            if (!in[type] || (type == PSA_F32 && f32 && f32->isa == is))
                continue;
            if (type == PSA_F32 || (type == PSA_BF16 && peak_has_bf16(is))) {
                peak = add_peak(b, in[type], is, (psa_type)type, threads);
                name_row(peak, "%s %s peak", psa_isa_name(is), type_name(type));
            }
            row *r = add_dense(b, in[type], is, n, threads);
            name_row(r, "%s %s", psa_isa_name(is), type_name(type));
            if (type == PSA_F32)
                f32 = r;
            else
                set_base(r, f32, 0, 0.9);
            if (peak)
                set_base(r, peak, 0, type == PSA_F32 ? dense_goal(is, d) : bf16_goal(d));
        }
    }
    measure_rows(b);
    end_group(b);
}

/* Of dense attention's time. */
static void share_of(row *r, const row *dense, double goal) {
    r->work = dense->work;
    r->unrated = 1;
    set_base(r, dense, 1, goal);
}

/* A call and its stages against dense attention, which is the row before that of the first stage. Returns that one. */
static row *add_stages(bench *b, bench_input *in, const psa_desc *desc) {
    int threads = b->crew->n_threads;
    run *stages = add_run(b, in, desc);
    const row *most = add_peak(b, in, b->isa, PSA_F32, threads);
    row *dense = add_dense(b, in, b->isa, in->n, threads);
    set_base(dense, most, 0, 0);
    row *choice = add_choice(b, in, stages);
    for (row *r = choice; r < &b->rows[b->n_rows]; r++)
        share_of(r, dense, 0);
    row *attend = add_attend(b, in, stages);
    attend_against(attend, dense);
    row *call = add_call(b, in, desc, in->n, threads);
    set_base(call, dense, 0, 0);
    call->density = attend->density;
    return choice;
}

static void measure_stages(bench *b, const row *dense, row *call) {
    const bench_input *in = dense->in;
    measure_rows(b);
    if (b->rc == 0) {
        call->compared = 1;
        difference(dense->out, call->out, in->type, (size_t)(in->heads * in->n * in->d), &call->error,
                   &call->largest_error);
    }
    end_group(b);
}

static void call_group(bench *b, int64_t n, int64_t d) {
    psa_desc desc = mix_desc(b, &mixes[DEFAULT_MIX], b->density, b->block_k, n);
    row *choice = add_stages(b, add_input(b, one_type(b), n, n, d), &desc);
    row *call = choice + CHOICE_ROWS + 1;
    choice[CHOICE_ROWS - 1].goal = n >= 16384 ? 0.05 : n >= 4096 ? 0.08 : 0;
    call->goal = n >= 16384 && b->density == 0.15 ? 5.5 : 0;
    measure_stages(b, choice - 1, call);
}

static void recipe_group(bench *b, int64_t n, int64_t d) {
    psa_desc desc;
    psa_desc_preset("recipe", &desc);
    desc.block_k = b->block_k;
    desc.density = b->density;
    desc.isa = b->isa;
    bench_input *in = add_input(b, one_type(b), n, n, d);
    row *choice = add_stages(b, in, &desc);
    const row *dense = choice - 1;
    row *levels = add_sum(b, choice + 2, 3, measure_sum);
    name_row(levels, "score, budget, mask");
    share_of(levels, dense, n >= 4096 ? 0.02 : 0);

    desc.mask = PSA_MASK_TOPK; /* trees and tilt by themselves */
    desc.density = 0;
    row *first = &b->rows[b->n_rows];
    for (desc.tilt = 0; desc.tilt < 2; desc.tilt++) {
        run *stages = add_run(b, in, &desc);
        for (int stage = PREPARE; stage <= POOL; stage++)
            name_row(add_stage(b, in, stages, stage), "logit trees%s: %s", desc.tilt ? ", tilt" : "",
                     stage_names[stage]);
    }
    row *tilt = add_sum(b, first, 4, measure_more);
    name_row(tilt, "tilt");
    for (row *r = first; r < tilt; r++)
        share_of(r, dense, 0);
    share_of(tilt, dense, n >= 4096 ? 0.01 : 0);
    desc.tilt = 0;
    desc.metric = PSA_METRIC_EUCLID;
    row *trees = add_stage(b, in, add_run(b, in, &desc), PREPARE);
    name_row(trees, "Euclidean trees: prepare");
    share_of(trees, dense, n >= 32768 ? 0.006 : n >= 4096 ? 0.025 : 0);
    measure_stages(b, dense, choice + RECIPE_ROWS + 1);
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
        read->work = 2.0 * (double)input_bytes(in, n);
        name_row(read, "%s, threads %d: reading", type_name(type), threads);
        row *peak = add_peak(b, in, b->isa, PSA_F32, threads);
        peak->type = (psa_type)type;
        peak->unrated = 1;
        name_row(peak, "%s, threads %d: multiply-adds", type_name(type), threads);
        for (int i = 0; i < 5; i++) {
            row *r = add_dense(b, in, b->isa, n_q[i], threads);
            r->flop = r->work;
            r->work = read->work;
            set_base(r, read, 0, 0.8);
            r->base[1] = peak;
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
    desc.score_group[0] = desc.score_group[1] = b->block_k < 32 ? b->block_k : 32;
    return desc;
}

/* Every row against its like at the first N from 16384 on, or at the first one of all. */
static void linear_group(bench *b, int64_t n, int64_t d) {
    (void)n; /* all of them, side by side */
    enum { EACH = CHOICE_ROWS + 2 };
    int base = 0;
    while (base < b->n_n - 1 && b->n[base] < 16384)
        base++;
    base = b->n[base] < 16384 ? 0 : base;
    psa_desc desc = count_desc(b, b->n[base]);
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
        row *first = add_peak(b, in, b->isa, PSA_F32, threads);
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
     "exact attention; speed: f32 over the measured f32 multiply-add peak, f16 and bf16 over f32,\n"
     "but bf16 over the peak of bf16 products where the CPU has them"},
    {call_group, &gflops, {4096, 16384}, {64, 128}, 4, 0, 0,
     "dense: speed over the peak's; pool to mask: share of the dense time;\n"
     "attend: time / (density * dense time); whole call: dense time / its time"},
    {recipe_group, &gflops, {4096, 16384}, {64, 128}, 4, 0, 0,
     "preset recipe: tree, tilt, levels by predicted error; ratios as for call"},
    {density_groups, &gflops, {4096}, {64, 128}, 4, 0, 0,
     "attention on level maps; time / (density * dense time). The number after the levels is the density"},
    {decode_groups, &gbytes, {131072}, {128}, 8, 0, 0,
     "few queries, dense; bytes of K and V a second over those of a sum that reads the same memory,\n"
     "or multiply-adds over their peak, whichever is the limit"},
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

/* In the order of bench_backend_name. */
static const topic gpu_topics[] = {
    {gpu_group, &tflops, {4096, 8192, 16384, 32768, 65536, 131072}, {64, 128}, 16, 0, 0,
     "attend: speed on the multiply-adds really done; whole call: as if it were dense, ratio: dense time / its time"},
    {model_group, &tflops, {4096, 8192, 16384, 32768, 65536, 131072}, {64, 128}, 16, 0, 0,
     "what the kernels need if no part ever waits for another, and what they then wait for: bounds, not\n"
     "measurements. attend: speed on the multiply-adds really done; whole call: as if it were dense"},
};

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
    if (b->o->backend != BACKEND_CPU) {
        printf("device    %s\nrun       one batch, %s, blocks %d x %d, top-k\n\n",
               b->o->backend == BACKEND_MODEL ? "none: counted by the rules of tools/gpu_model.h" : b->gpu.name,
               type_name(gpu_type(b)), BLOCK_Q, b->block_k);
        return;
    }
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

static void run_topic(bench *b, const topic *t, const char *name) {
    const options *o = b->o;
    b->topic = t;
    b->topic_name = name;
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
    if (b->o->backend != BACKEND_CPU)
        run_topic(b, &gpu_topics[b->o->backend - BACKEND_CUDA], bench_backend_name(b->o->backend));
    else
        for (int i = 0; i < TOPICS && b->rc == 0; i++)
            if (!b->o->topics || b->o->topics >> i & 1)
                run_topic(b, &topics[i], topic_name(i));
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
    if (o->topics && o->backend != BACKEND_CPU)
        return fail(o, "--topic has no use with --backend %s", bench_backend_name(o->backend));
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
    const char *no_gpu = o->backend == BACKEND_CUDA ? gpu_open(&b.gpu) : NULL;
    if (no_gpu)
        return fail(o, "--backend cuda: %s", no_gpu);
    crew_start(&c, o->threads);
    run_topics(&b);
    crew_stop(&c);
    if (b.gpu.close)
        b.gpu.close(&b.gpu);
    return b.rc;
}
#endif
