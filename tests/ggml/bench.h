/* bench.h - test_ggml --bench: how long attention takes inside ggml, its own and psa's. Everything is static.
 *
 * All rows are graphs of one backend with the same inputs, timed in turn; median, minimum and maximum of the rounds.
 * ggml with a mask is its own block sparsity: tiles of 64 x 64 whose entries are all -inf are skipped. It gets a mask
 * of whole blocks at the same density, made by psa; "same blocks" is psa's attention on the same map, and "all stages"
 * is pool, score, mask and attend with levels 1 to 8. Include after psa_ggml.h and graph.h. */
#ifndef BENCH_H
#define BENCH_H

#include <time.h>

enum { BLOCK_Q = 128, BLOCK_K = 64, DENSITIES = 3, ROWS = 2 + 3 * DENSITIES, MAX_ROUNDS = 99 };

typedef struct bench_row {
    char name[64];
    graph g;
    qkv x;
    double seconds[MAX_ROUNDS];
} bench_row;

typedef struct bench {
    shape s;
    int threads, rounds, n_rows;
    bench_row row[ROWS];
} bench;

static const double densities[DENSITIES] = {.30, .15, .05};

static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- rows ------------------------------------------------------------------------------------------------------- */

static bench_row *row_new(bench *b, const char *name, double density) {
    bench_row *r = &b->row[b->n_rows++];
    snprintf(r->name, sizeof r->name, density < 1 ? "%s, density %.2f" : "%s", name, density);
    r->g = graph_new(b->threads);
    r->x = inputs(&r->g, &b->s);
    return r;
}

/* Memory for the row's graph, whose only output this is. */
static void row_finish(bench_row *r, struct ggml_tensor *out) {
    graph_output(&r->g, out);
    graph_allocate(&r->g);
    fill_inputs(&r->x);
}

/* Whole blocks of this density, the same for every head: [nq][nk]. */
static uint8_t *block_map(const bench *b, double density) {
    const psa_desc desc = {.level_end = {density}, .n_threads = b->threads};
    graph g = graph_new(b->threads);
    qkv x = inputs(&g, &b->s);
    struct ggml_tensor *out = psa_ggml_attention(g.ctx, x.q, x.k, x.v, &desc), *levels = psa_ggml_levels(out);
    size_t size = (size_t)(levels->ne[0] * levels->ne[1]);
    uint8_t *map = malloc(size);
    graph_output(&g, levels);
    graph_allocate(&g);
    fill_inputs(&x);
    graph_compute(&g);
    ggml_backend_tensor_get(levels, map, 0, size);
    graph_free(&g);
    return map;
}

static void add_masked(bench *b, double density, const uint8_t *map) {
    bench_row *r = row_new(b, "ggml with a mask", density);
    struct ggml_tensor *mask = ggml_new_tensor_2d(r->g.ctx, GGML_TYPE_F16, b->s.nk, b->s.nq);
    int64_t nk = (b->s.nk + BLOCK_K - 1) / BLOCK_K;
    const ggml_fp16_t open = ggml_fp32_to_fp16(0), closed = ggml_fp32_to_fp16(-INFINITY);
    ggml_set_input(mask);
    ggml_set_output(mask); /* graphs run many times: it keeps its memory */
    row_finish(r, flash_attention(&r->g, &r->x, mask));
    for (int64_t i = 0; i < b->s.nq; i++)
        for (int64_t j = 0; j < b->s.nk; j++)
            ((ggml_fp16_t *)mask->data)[i * b->s.nk + j] = map[i / BLOCK_Q * nk + j / BLOCK_K] ? open : closed;
}

static void add_same_blocks(bench *b, double density, const uint8_t *map) {
    const psa_desc desc = {.level_end = {density}, .n_threads = b->threads};
    bench_row *r = row_new(b, "psa, same blocks", density);
    int64_t nk = (b->s.nk + BLOCK_K - 1) / BLOCK_K, nq = (b->s.nq + BLOCK_Q - 1) / BLOCK_Q;
    struct ggml_tensor *levels = ggml_new_tensor_3d(r->g.ctx, GGML_TYPE_I8, nk, nq, b->s.heads);
    ggml_set_input(levels);
    ggml_set_output(levels);
    row_finish(r, psa_ggml_attend(r->g.ctx, r->x.q, r->x.k, r->x.v, levels, &desc));
    for (int64_t h = 0; h < b->s.heads; h++)
        memcpy((char *)levels->data + h * nq * nk, map, (size_t)(nq * nk));
}

/* The default levels make a density of .15; others are stretched to theirs. */
static void add_all_stages(bench *b, double density) {
    const double f = density / .15;
    const psa_desc desc = {.level_end = {.1 * f, .15 * f, .15 * f, .35 * f}, .n_threads = b->threads};
    bench_row *r = row_new(b, "psa, all stages", density);
    row_finish(r, psa_ggml_attention(r->g.ctx, r->x.q, r->x.k, r->x.v, &desc));
}

static void add_rows(bench *b) {
    const psa_desc dense = {.mask = PSA_MASK_DENSE, .n_threads = b->threads};
    bench_row *r = row_new(b, "ggml dense", 1);
    row_finish(r, flash_attention(&r->g, &r->x, NULL));
    r = row_new(b, "psa dense", 1);
    row_finish(r, psa_ggml_attention(r->g.ctx, r->x.q, r->x.k, r->x.v, &dense));
    for (int i = 0; i < DENSITIES; i++) {
        uint8_t *map = block_map(b, densities[i]);
        add_masked(b, densities[i], map);
        add_same_blocks(b, densities[i], map);
        add_all_stages(b, densities[i]);
        free(map);
    }
}

/* ---- timing and printing ---------------------------------------------------------------------------------------- */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const bench *b, int row) {
    const double *t = b->row[row].seconds;
    return 0.5 * (t[(b->rounds - 1) / 2] + t[b->rounds / 2]);
}

/* A round before the first one that counts warms up. */
static void time_rows(bench *b) {
    for (int round = -1; round < b->rounds; round++)
        for (int i = 0; i < b->n_rows; i++) {
            double start = seconds_now();
            graph_compute(&b->row[i].g);
            if (round >= 0)
                b->row[i].seconds[round] = seconds_now() - start;
        }
    for (int i = 0; i < b->n_rows; i++)
        qsort(b->row[i].seconds, (size_t)b->rounds, sizeof(double), by_value);
}

static void print_rows(const bench *b) {
    printf("\nN %lld, D %lld, K/V %s, %lld heads, %d threads, %d rounds%10s ms (min to max)    x ggml dense\n",
           (long long)b->s.nq, (long long)b->s.d, ggml_type_name(b->s.type), (long long)b->s.heads, b->threads,
           b->rounds, "");
    for (int i = 0; i < b->n_rows; i++) {
        const double *t = b->row[i].seconds;
        printf("  %-32s %9.1f (%.1f to %.1f)  %6.2f", b->row[i].name, 1e3 * median(b, i), 1e3 * t[0],
               1e3 * t[b->rounds - 1], median(b, 0) / median(b, i));
        if (i >= 2 && (i - 2) % 3 == 1)
            printf("   %.2f x ggml with the same mask", median(b, i - 1) / median(b, i));
        printf("\n");
    }
    fflush(stdout);
}

static void bench_shape(int64_t n, int64_t d, enum ggml_type type, int threads, int rounds) {
    int64_t heads = n > 8192 ? 1 : 2;
    bench b = {.s = {"bench", type, d, d, n, n, heads, heads, 1, 1}, .threads = threads, .rounds = rounds};
    add_rows(&b);
    time_rows(&b);
    print_rows(&b);
    for (int i = 0; i < b.n_rows; i++)
        graph_free(&b.row[i].g);
}

static void print_machine(void) {
    char line[256], date[32];
    time_t t = time(NULL);
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "model name", 10)) {
            printf("cpu       %s", strchr(line, ':') + 2);
            break;
        }
    if (f)
        fclose(f);
    strftime(date, sizeof date, "%Y-%m-%d", gmtime(&t));
    printf("date      %s\nversions  ggml %s, psa %s (%s), compiler " __VERSION__ "\n", date, ggml_version(),
           psa_version(), psa_isa_name(psa_isa_detect()));
}

/* n 0: 4096 and 16384 tokens. */
static void bench_all(int64_t n) {
    print_machine();
    for (int64_t tokens = n ? n : 4096; tokens <= (n ? n : 16384); tokens *= 4)
        for (int64_t d = 64; d <= 128; d += 64)
            for (int half = 0; half < 2; half++)
                for (int threads = 1; threads <= 2; threads++)
                    bench_shape(tokens, d, half ? GGML_TYPE_F16 : GGML_TYPE_F32, threads, tokens > 8192 ? 3 : 9);
}
#endif
