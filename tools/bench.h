/* bench.h - psa bench: dense attention, PSA stage by stage, and this machine's peak, interleaved in one run.
 * Include after run.h. Everything is static. Needs gcc or clang. */
#ifndef BENCH_H
#define BENCH_H

#if defined(__x86_64__) || defined(__i386__)
#define BENCH_X86 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define BENCH_NEON 1
#include <arm_neon.h>
#endif

#ifndef PSA_CFLAGS
#define PSA_CFLAGS "unknown"
#endif

enum { MOST_REPEATS = 15, LEAST_REPEATS = 3 };
static const double enough_seconds = 2; /* of repeats, once there are LEAST_REPEATS */

/* ---- peak: chains of multiply-adds that do not wait for one another ---- */

enum { CHAINS = 10, PEAK_ROUNDS = 3000000 };

/* Every chain tends to 1: no overflow, no denormals. They start apart, or the compiler would keep only one. */
#define PEAK_LOOP(name, target, vec, set1, fma, add, first) \
    target static float name(void) { \
        vec x = set1(0.75f), y = set1(0.25f); \
        vec a = set1(.0f), b = set1(.1f), c = set1(.2f), d = set1(.3f), e = set1(.4f); \
        vec f = set1(.5f), g = set1(.6f), h = set1(.7f), i = set1(.8f), j = set1(.9f); \
        for (int n = 0; n < PEAK_ROUNDS; n++) { \
            a = fma(a, x, y), b = fma(b, x, y), c = fma(c, x, y), d = fma(d, x, y), e = fma(e, x, y); \
            f = fma(f, x, y), g = fma(g, x, y), h = fma(h, x, y), i = fma(i, x, y), j = fma(j, x, y); \
        } \
        a = add(add(add(a, b), add(c, d)), add(add(e, f), add(add(g, h), add(i, j)))); \
        return first(a); \
    }

/* What a compiler can make of plain C: the vectors that every machine of this kind has. */
enum { BASE_LANES = 4 };
typedef float base_vec __attribute__((vector_size(16)));
#define BASE_SET1(x) ((base_vec){x, x, x, x})
#define BASE_FMA(a, x, y) ((a) * (x) + (y))
#define BASE_ADD(a, b) ((a) + (b))
#define BASE_FIRST(a) ((a)[0])
PEAK_LOOP(peak_base, , base_vec, BASE_SET1, BASE_FMA, BASE_ADD, BASE_FIRST)
#ifdef BENCH_X86
PEAK_LOOP(peak_avx2, __attribute__((target("avx2,fma"))), __m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps,
          _mm256_cvtss_f32)
PEAK_LOOP(peak_avx512, __attribute__((target("avx512f"))), __m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps,
          _mm512_cvtss_f32)
#endif

#ifdef BENCH_NEON
#define NEON_FMA(a, x, y) vfmaq_f32(y, a, x)
#define NEON_FIRST(a) vgetq_lane_f32(a, 0)
PEAK_LOOP(peak_neon, , float32x4_t, vdupq_n_f32, NEON_FMA, vaddq_f32, NEON_FIRST)
#endif

typedef struct peak {
    psa_isa isa;
    volatile float sink;
} peak;

static float peak_loop(psa_isa isa) {
#ifdef BENCH_X86
    if (isa == PSA_ISA_AVX512)
        return peak_avx512();
    if (isa == PSA_ISA_AVX2)
        return peak_avx2();
#endif
#ifdef BENCH_NEON
    if (isa == PSA_ISA_NEON)
        return peak_neon();
#endif
    (void)isa;
    return peak_base();
}

static void peak_task(void *ctx, int ith, int nth) {
    peak *p = (peak *)ctx;
    float sum = peak_loop(p->isa);
    if (sum < 0) /* never, but the compiler cannot know */
        p->sink = sum + (float)(ith + nth);
}

/* GFLOP/s of f32 multiply-adds on all threads at once. */
static double measure_peak(crew *c, psa_isa isa) {
    int lanes = isa == PSA_ISA_AVX512 ? 16 : isa == PSA_ISA_AVX2 ? 8 : BASE_LANES;
    peak p = {isa, 0};
    double start = now();
    crew_run(c, c->n_threads, peak_task, &p);
    return 2e-9 * lanes * CHAINS * PEAK_ROUNDS * c->n_threads / (now() - start);
}

/* ---- inputs: waves along the tokens plus noise, so that neighbours are alike and a query has keys that matter ---- */

typedef struct bench_input {
    void *data[3]; /* q, k, v: [heads][n][d] */
    psa_type type;
    int64_t n, d;
} bench_input;

/* splitmix64: the i-th number of a stream, in [0,1). */
static double random_at(uint64_t stream, uint64_t i) {
    uint64_t z = (stream << 40) + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

static void fill_head(const bench_input *in, int tensor, int64_t head) {
    uint64_t waves = (uint64_t)(2 * head + (tensor == 2)), noise = (uint64_t)(1000 + 3 * head + tensor);
    double gain = tensor == 0 ? 1.5 : 1, tau = 6.283185307179586;
    for (int64_t c = 0; c < in->d; c++) {
        double frequency = 0.5 * pow((double)in->n / 32 + 1, random_at(waves, (uint64_t)(2 * c)));
        double phase = tau * random_at(waves, (uint64_t)(2 * c + 1));
        for (int64_t t = 0; t < in->n; t++) {
            int64_t at = (head * in->n + t) * in->d + c;
            double wave = cos(tau * frequency * (double)t / (double)in->n + phase);
            double value = gain * (wave + random_at(noise, (uint64_t)at) - 0.5);
            set_element(in->data[tensor], in->type, (size_t)at, (float)value);
        }
    }
}

static void fill_task(void *ctx, int ith, int nth) {
    (void)nth;
    for (int tensor = 0; tensor < 3; tensor++)
        fill_head((const bench_input *)ctx, tensor, ith);
}

/* ---- one case: N and D ---- */

typedef struct sample {
    double median, least, most;
} sample;

enum { DENSE = STAGES, WHOLE, PEAK, SERIES }; /* after the stages */

typedef struct bench_case {
    bench_input in;
    void *out, *dense_out;
    run psa, dense;
    int repeats;
    double raw[SERIES][MOST_REPEATS];
    sample at[SERIES]; /* seconds; PEAK: GFLOP/s */
    double density, dense_flop, psa_flop, error, largest_error;
} bench_case;

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static sample summarise(const double *raw, int n) {
    double sorted[MOST_REPEATS];
    sample s;
    memcpy(sorted, raw, (size_t)n * sizeof *raw);
    qsort(sorted, (size_t)n, sizeof *sorted, compare_doubles);
    s.least = sorted[0];
    s.most = sorted[n - 1];
    s.median = 0.5 * (sorted[(n - 1) / 2] + sorted[n / 2]);
    return s;
}

static int bench_block_k(const options *o) { return o->desc.block_k ? o->desc.block_k : 64; }

/* Level ends for the default top-k shape stretched by factor, in whole blocks of nk; the density they make. */
static double stretch(double factor, int64_t nk, double *end) {
    static const double shape[] = {.1, .15, .15, .35};
    double density = 0, before = 0;
    for (int i = 0; i < 4; i++) {
        double blocks = fmax(1, floor(fmin(1, factor * shape[i]) * (double)nk));
        end[i] = fmin(1, (blocks + 0.5) / (double)nk); /* psa_mask rounds down again */
        density += (blocks - before) / (double)nk / (1 << i);
        before = blocks;
    }
    return density;
}

/* The least stretch that has this density or more. */
static void level_end_for(double density, int64_t nk, double *end) {
    double low = 0, high = 10.001; /* every block at level 1 */
    for (int i = 0; i < 60; i++) {
        double middle = 0.5 * (low + high);
        if (stretch(middle, nk, end) < density)
            low = middle;
        else
            high = middle;
    }
    stretch(high, nk, end);
}

static int bench_memory(bench_case *b, const options *o, crew *c) {
    size_t count = (size_t)(o->heads * b->in.n * b->in.d), size = psa_type_size(b->in.type);
    void **all[] = {&b->in.data[0], &b->in.data[1], &b->in.data[2], &b->out, &b->dense_out};
    for (int i = 0; i < 5; i++)
        if (!(*all[i] = calloc(count, size)))
            return fail(o, "not enough memory for %zu elements", count);
    crew_run(c, o->heads, fill_task, &b->in);
    psa_tensor t[5];
    for (int i = 0; i < 5; i++)
        t[i] = psa_tensor_4d(*all[i], b->in.type, b->in.d, b->in.n, o->heads, 1);
    psa_desc desc = o->desc;
    desc.block_k = bench_block_k(o);
    level_end_for(o->density, (b->in.n + desc.block_k - 1) / desc.block_k, desc.level_end);
    if (run_init(&b->psa, o, c, &desc, c->n_threads, &t[0], &t[1], &t[2], &t[3]))
        return 2;
    desc.mask = PSA_MASK_DENSE;
    return run_init(&b->dense, o, c, &desc, c->n_threads, &t[0], &t[1], &t[2], &t[4]);
}

static int bench_repeat(bench_case *b, const options *o, crew *c) {
    int r = b->repeats;
    b->raw[PEAK][r] = measure_peak(c, b->psa.plan.desc.isa);
    if (run_attention(&b->dense, o, 0) || run_attention(&b->psa, o, 0))
        return 2;
    b->raw[DENSE][r] = run_seconds(&b->dense);
    b->raw[WHOLE][r] = run_seconds(&b->psa);
    for (int i = 0; i < STAGES; i++)
        b->raw[i][r] = b->psa.seconds[i];
    return 0;
}

static int bench_measure(bench_case *b, const options *o, crew *c) {
    if (bench_repeat(b, o, c)) /* the warm-up: overwritten by the first repeat */
        return 2;
    double start = now();
    while (b->repeats < LEAST_REPEATS || (b->repeats < MOST_REPEATS && now() - start < enough_seconds)) {
        if (bench_repeat(b, o, c))
            return 2;
        b->repeats++;
    }
    for (int i = 0; i < SERIES; i++)
        b->at[i] = summarise(b->raw[i], b->repeats);
    psa_stats stats;
    psa_result result = psa_stats_from_levels(&b->psa.plan, b->psa.levels, -1, -1, &stats);
    if (result != PSA_OK)
        return run_fail(o, &b->psa, result);
    b->density = stats.density;
    b->dense_flop = 4.0 * (double)b->in.n * (double)b->in.n * (double)b->in.d * o->heads;
    b->psa_flop = 2.0 * (double)psa_mul_adds(&b->psa.plan, b->psa.work);
    difference(b->dense_out, b->out, b->in.type, (size_t)(o->heads * b->in.n * b->in.d), &b->error, &b->largest_error);
    return 0;
}

static void bench_free(bench_case *b) {
    void *owned[] = {b->in.data[0], b->in.data[1], b->in.data[2], b->out, b->dense_out};
    for (int i = 0; i < 5; i++)
        free(owned[i]);
    run_free(&b->psa);
    run_free(&b->dense);
}

/* ---- results ---- */

/* Attention at this density would take density * dense if nothing were lost. */
static double attend_ratio(const bench_case *b) {
    return b->at[ATTEND].median / (b->density * b->at[DENSE].median);
}

static void print_row(const char *name, const sample *s, double flop, double peak_gflops) {
    double gflops = 1e-9 * flop / s->median;
    printf("%15s%-12s %10.3f %10.3f %10.3f", "", name, 1e3 * s->median, 1e3 * s->least, 1e3 * s->most);
    if (flop > 0)
        printf(" %10.1f %7.1f", gflops, 100 * gflops / peak_gflops);
    printf("\n");
}

static void print_case(const bench_case *b) {
    const sample *at = b->at;
    printf("%7" PRId64 " %5" PRId64 "  %-12s %10s %10s %10s %10.1f %7s  (%.1f to %.1f)\n", b->in.n, b->in.d, "peak", "",
           "", "", at[PEAK].median, "100.0", at[PEAK].least, at[PEAK].most);
    print_row("dense", &at[DENSE], b->dense_flop, at[PEAK].median);
    print_row("pool", &at[POOL], 0, 1);
    print_row("score", &at[SCORE], 0, 1);
    print_row("mask", &at[MASK], 0, 1);
    print_row("attend", &at[ATTEND], b->psa_flop, at[PEAK].median);
    print_row("whole call", &at[WHOLE], 0, 1);
    printf(
        "%15s%.2fx dense; density %.4f, attend / (density * dense) %.3f, error %.3g (L2), %.3g (max); %d repeats\n\n",
        "", at[DENSE].median / at[WHOLE].median, b->density, attend_ratio(b), b->error, b->largest_error, b->repeats);
    fflush(stdout);
}

static void add_sample(cJSON *json, const char *name, const sample *s) {
    cJSON *item = cJSON_AddObjectToObject(json, name);
    cJSON_AddNumberToObject(item, "median", s->median);
    cJSON_AddNumberToObject(item, "min", s->least);
    cJSON_AddNumberToObject(item, "max", s->most);
}

static cJSON *case_json(const bench_case *b) {
    static const char *const names[] = {"pool", "score", "mask", "attend", "dense", "whole_call"};
    cJSON *json = cJSON_CreateObject();
    cJSON_AddNumberToObject(json, "n", (double)b->in.n);
    cJSON_AddNumberToObject(json, "d", (double)b->in.d);
    cJSON_AddNumberToObject(json, "repeats", b->repeats);
    add_sample(json, "peak_gflops", &b->at[PEAK]);
    cJSON *seconds = cJSON_AddObjectToObject(json, "seconds");
    for (int i = 0; i < PEAK; i++)
        add_sample(seconds, names[i], &b->at[i]);
    cJSON_AddNumberToObject(json, "dense_gflops", 1e-9 * b->dense_flop / b->at[DENSE].median);
    cJSON_AddNumberToObject(json, "attend_gflops", 1e-9 * b->psa_flop / b->at[ATTEND].median);
    cJSON_AddNumberToObject(json, "density", b->density);
    cJSON_AddNumberToObject(json, "attend_over_density_dense", attend_ratio(b));
    cJSON_AddNumberToObject(json, "speedup", b->at[DENSE].median / b->at[WHOLE].median);
    cJSON_AddNumberToObject(json, "relative_error", b->error);
    cJSON_AddNumberToObject(json, "largest_error", b->largest_error);
    return json;
}

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

static void print_machine(const options *o, const char *cpu, psa_isa isa, int threads) {
    printf("cpu       %s\ncompiler  %s, flags %s\n", cpu, bench_compiler, PSA_CFLAGS);
    printf("run       %d threads, %s, %s, %d heads, one batch, blocks 128 x %d, top-k near density %.3g\n", threads,
           psa_isa_name(isa), type_name(o->type), o->heads, bench_block_k(o), o->density);
    printf("GFLOP/s   4*N*N*D*heads for dense, 2 * multiply-adds done for attend; peak: f32 multiply-add chains\n\n");
    printf("%7s %5s  %-12s %10s %10s %10s %10s %7s\n", "N", "D", "", "median ms", "min", "max", "GFLOP/s", "% peak");
    fflush(stdout);
}

static cJSON *machine_json(const options *o, const char *cpu, psa_isa isa, int threads) {
    cJSON *json = cJSON_CreateObject();
    cJSON_AddStringToObject(json, "cpu", cpu);
    cJSON_AddStringToObject(json, "compiler", bench_compiler);
    cJSON_AddStringToObject(json, "flags", PSA_CFLAGS);
    cJSON_AddNumberToObject(json, "threads", threads);
    cJSON_AddStringToObject(json, "isa", psa_isa_name(isa));
    cJSON_AddStringToObject(json, "type", type_name(o->type));
    cJSON_AddNumberToObject(json, "heads", o->heads);
    cJSON_AddNumberToObject(json, "block_k", bench_block_k(o));
    cJSON_AddNumberToObject(json, "density_asked", o->density);
    return json;
}

static int bench_one(const options *o, crew *c, int n, int d, cJSON *cases) {
    bench_case b;
    memset(&b, 0, sizeof b);
    b.in.type = (psa_type)o->type;
    b.in.n = n;
    b.in.d = d;
    int rc = bench_memory(&b, o, c);
    if (rc == 0)
        rc = bench_measure(&b, o, c);
    if (rc == 0 && o->json)
        cJSON_AddItemToArray(cases, case_json(&b));
    else if (rc == 0)
        print_case(&b);
    bench_free(&b);
    return rc;
}

static int bench(const options *o, crew *c) {
    char cpu[128];
    psa_isa isa = o->desc.isa ? o->desc.isa : psa_isa_detect();
    int rc = 0;
    if (!psa_isa_supported(isa))
        return fail(o, "--isa %s: this CPU does not have it", psa_isa_name(isa));
    for (int i = 0; i < o->n_d; i++)
        if (o->d[i] % 8)
            return fail(o, "--d %d: expected a multiple of 8", o->d[i]);
    if (bench_block_k(o) & (bench_block_k(o) - 1) || bench_block_k(o) < 16 || bench_block_k(o) > 128)
        return fail(o, "--block-k %d: expected 16, 32, 64 or 128", bench_block_k(o));
    cpu_name(cpu, sizeof cpu);
    cJSON *json = machine_json(o, cpu, isa, c->n_threads), *cases = cJSON_AddArrayToObject(json, "cases");
    if (!o->json)
        print_machine(o, cpu, isa, c->n_threads);
    for (int i = 0; i < o->n_n && rc == 0; i++)
        for (int j = 0; j < o->n_d && rc == 0; j++)
            rc = bench_one(o, c, o->n[i], o->d[j], cases);
    if (rc == 0 && o->json) {
        char *text = cJSON_Print(json);
        printf("%s\n", text ? text : "{}");
        cJSON_free(text);
    }
    cJSON_Delete(json);
    return rc;
}

static int cmd_bench(const options *given) {
    options o = *given;
    crew c;
    if (o.type < 0)
        o.type = PSA_F32;
    crew_start(&c, o.threads);
    int rc = bench(&o, &c);
    crew_stop(&c);
    return rc;
}
#endif
