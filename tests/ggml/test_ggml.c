/* test_ggml.c - psa_ggml.h inside ggml, against ggml's own flash attention and against psa_attention.
 *
 * build/ggml/test_ggml [--list] [--filter TEXT]    exit status: 0 all passed, 1 a check failed, 2 bad usage
 * build/ggml/test_ggml --bench [N]                 times at N tokens; default: 4096 and 16384
 * make test-ggml builds it against two versions of ggml and runs the tests. */
#define _POSIX_C_SOURCE 200809L
#define PSA_IMPLEMENTATION
#include "psa_ggml.h"

#include "graph.h"

#include "bench.h"

/* ---- checks ----------------------------------------------------------------------------------------------------- */

static int checks, failures;

#define CHECK(ok, ...) check((ok) ? 1 : 0, __LINE__, #ok, __VA_ARGS__)

__attribute__((format(printf, 4, 5))) static void check(int ok, int line, const char *what, const char *format, ...) {
    va_list args;
    checks++;
    if (ok || ++failures > 5)
        return;
    printf("  test_ggml.c:%d: %s: ", line, what);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

/* Normalised mean square error. */
static double nmse(const float *got, const float *want, int64_t n) {
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        size += (double)want[i] * (double)want[i];
    }
    return error / size;
}

static void graph_run(graph *g, const qkv *x) {
    graph_allocate(g);
    fill_inputs(x);
    graph_compute(g);
}

/* ---- dense: the same as ggml_flash_attn_ext --------------------------------------------------------------------- */

/* From 64 queries on ggml computes in f32, as psa does. Below, and with bf16, it rounds q to the type of k and, where v
 * is f16, sums in f16. */
static double tolerance(const shape *s) {
    int rounds = s->type == GGML_TYPE_BF16 || (s->type == GGML_TYPE_F16 && s->nq < 64);
    return rounds ? 1e-5 : 1e-12;
}

static void dense(const shape *s, int threads) {
    graph g = graph_new(threads);
    psa_desc desc = {.mask = PSA_MASK_DENSE, .n_threads = threads};
    qkv x = inputs(&g, s);
    struct ggml_tensor *flash = flash_attention(&g, &x, NULL);
    struct ggml_tensor *ours = psa_ggml_replace(g.ctx, flash, &desc);
    CHECK(ours != NULL, "%s: refused", s->name);
    if (ours) {
        CHECK(ggml_are_same_shape(flash, ours), "%s: shape", s->name);
        graph_output(&g, flash);
        graph_output(&g, ours);
        graph_run(&g, &x);
        float *want = values(flash), *got = values(ours);
        double error = nmse(got, want, ggml_nelements(flash));
        CHECK(error < tolerance(s), "%s, %d threads: NMSE %g", s->name, threads, error);
        free(want);
        free(got);
    }
    graph_free(&g);
}

static void test_dense(void) {
    static const shape shapes[] = {
        {"plain", GGML_TYPE_F32, 64, 64, 320, 320, 3, 3, 1, 0},
        {"permuted", GGML_TYPE_F32, 128, 128, 256, 256, 4, 4, 1, 1},
        {"gqa", GGML_TYPE_F32, 64, 64, 192, 320, 8, 2, 1, 0},
        {"mqa, permuted, batch", GGML_TYPE_F32, 64, 64, 130, 200, 4, 1, 2, 1},
        {"f16", GGML_TYPE_F16, 64, 64, 320, 320, 3, 3, 1, 0},
        {"f16, permuted, gqa", GGML_TYPE_F16, 128, 128, 257, 511, 6, 3, 1, 1},
        {"bf16", GGML_TYPE_BF16, 64, 64, 200, 200, 2, 2, 1, 0},
        {"odd lengths", GGML_TYPE_F32, 80, 80, 301, 333, 2, 2, 1, 1},
        {"head sizes that differ", GGML_TYPE_F32, 64, 128, 100, 301, 2, 2, 1, 0},
        {"one query", GGML_TYPE_F32, 64, 64, 1, 300, 4, 2, 1, 0},
        {"one query, f16", GGML_TYPE_F16, 64, 64, 1, 300, 4, 2, 1, 0},
        {"one key", GGML_TYPE_F32, 64, 64, 65, 1, 2, 2, 1, 0},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int threads = 1; threads <= 4; threads++)
            dense(&shapes[i], threads);
}

/* ---- whole blocks: the same as ggml with -inf in its mask ------------------------------------------------------- */

/* ggml's mask of a level map: f16 [Nk, Nq, H]. */
static void block_mask(const shape *s, const uint8_t *levels, int64_t nq, int64_t nk, ggml_fp16_t *mask) {
    const ggml_fp16_t open = ggml_fp32_to_fp16(0), closed = ggml_fp32_to_fp16(-INFINITY);
    for (int64_t h = 0; h < s->heads; h++)
        for (int64_t i = 0; i < s->nq; i++)
            for (int64_t j = 0; j < s->nk; j++)
                *mask++ = levels[(h * nq + i / 128) * nk + j / 64] ? open : closed;
}

/* psa makes the map in one graph; ggml reads it as a mask in the next. */
static void masked(const shape *s, int threads) {
    graph g = graph_new(threads), g2 = graph_new(threads);
    psa_desc desc = {.level_end = {.3}, .n_threads = threads};
    qkv x = inputs(&g, s), x2 = inputs(&g2, s);
    struct ggml_tensor *ours = psa_ggml_replace(g.ctx, flash_attention(&g, &x, NULL), &desc);
    struct ggml_tensor *mask = ggml_new_tensor_3d(g2.ctx, GGML_TYPE_F16, s->nk, s->nq, s->heads);
    struct ggml_tensor *flash = flash_attention(&g2, &x2, mask), *levels = psa_ggml_levels(ours);
    graph_output(&g, levels);
    graph_output(&g, ours);
    graph_run(&g, &x);

    size_t n = ggml_nbytes(levels), skipped = 0;
    uint8_t *map = malloc(n);
    ggml_fp16_t *bits = malloc(ggml_nbytes(mask));
    ggml_backend_tensor_get(levels, map, 0, n);
    for (size_t i = 0; i < n; i++) {
        CHECK(map[i] <= 1, "level %d", map[i]);
        skipped += map[i] == 0;
    }
    CHECK(skipped > n / 2 && skipped < n, "%zu of %zu blocks skipped", skipped, n);
    block_mask(s, map, levels->ne[1], levels->ne[0], bits);
    graph_output(&g2, flash);
    graph_allocate(&g2);
    fill_inputs(&x2);
    ggml_backend_tensor_set(mask, bits, 0, ggml_nbytes(mask));
    graph_compute(&g2);
    float *want = values(flash), *got = values(ours);
    double error = nmse(got, want, ggml_nelements(flash));
    CHECK(error < tolerance(s), "%s, %d threads: NMSE %g", s->name, threads, error);
    free(want);
    free(got);
    free(bits);
    free(map);
    graph_free(&g);
    graph_free(&g2);
}

static void test_masked(void) {
    static const shape shapes[] = {
        {"plain", GGML_TYPE_F32, 64, 64, 640, 640, 3, 3, 1, 0},
        {"gqa, odd lengths, permuted", GGML_TYPE_F32, 64, 64, 401, 777, 4, 2, 1, 1},
        {"f16", GGML_TYPE_F16, 128, 128, 512, 512, 2, 2, 1, 1},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int threads = 1; threads <= 4; threads += 3)
            masked(&shapes[i], threads);
}

/* ---- graphs: the allocator reuses memory around the nodes ------------------------------------------------------- */

static const shape graph_shape = {"graph", GGML_TYPE_F32, 64, 64, 640, 640, 2, 2, 1, 1};

/* psa_attention on the same views, in ggml's layout of the output. */
static void one_call(const psa_desc *desc, const qkv *x, float *out) {
    psa_plan plan;
    psa_tensor to;
    CHECK(psa_ggml__plan(&plan, desc, x->q, x->k, x->v) == PSA_OK, "plan");
    plan.q.data = x->q->data, plan.k.data = x->k->data, plan.v.data = x->v->data;
    to = plan.out;
    to.data = out;
    psa_result r = psa_attention(desc, &plan.q, &plan.k, &plan.v, &to, NULL);
    CHECK(r == PSA_OK, "%s", psa_result_string(r));
}

/* Three layers, each on the output of the one before, which the allocator lays out as tightly as it can. */
static void three_layers(const char *name, psa_desc desc, int threads) {
    const int64_t size = graph_shape.dv * graph_shape.heads * graph_shape.nq;
    float *want = malloc((size_t)size * sizeof *want);
    graph g = graph_new(threads);
    qkv x = inputs(&g, &graph_shape), layer = x;
    struct ggml_tensor *out[3];
    desc.n_threads = threads;
    for (int i = 0; i < 3; i++) {
        struct ggml_tensor *y = psa_ggml_attention(g.ctx, layer.q, layer.k, layer.v, &desc);
        out[i] = ggml_add(g.ctx, ggml_scale(g.ctx, y, 3), ggml_permute(g.ctx, layer.q, 0, 2, 1, 3));
        layer.q = layer.k = layer.v = ggml_permute(g.ctx, out[i], 0, 2, 1, 3);
        graph_output(&g, out[i]);
    }
    graph_run(&g, &x);
    for (int i = 0; i < 3; i++) {
        float *got = values(out[i]), *before = values(i ? out[i - 1] : x.leaf[0]);
        qkv from = x;
        if (i)
            from.q = from.k = from.v = ggml_permute(g.ctx, out[i - 1], 0, 2, 1, 3);
        one_call(&desc, &from, want);
        for (int64_t j = 0; j < size; j++)
            want[j] = want[j] * 3 + before[j];
        CHECK(memcmp(got, want, (size_t)size * sizeof *got) == 0, "%s, layer %d, %d threads: other bits", name, i,
              threads);
        free(got);
        free(before);
    }
    graph_free(&g);
    free(want);
}

static void test_graph(void) {
    psa_desc capped = {.level_end = {.2, .3, .4, .6}, .skip_mean = 1, .n_sim_min = 1, .sim_min = {.1}};
    psa_desc budget = {.density = .3}, dense = {.mask = PSA_MASK_DENSE}, recipe;
    CHECK(psa_desc_preset("recipe", &recipe) == PSA_OK, "preset");
    for (int threads = 1; threads <= 4; threads++) {
        three_layers("capped", capped, threads);
        three_layers("budget", budget, threads);
        three_layers("recipe", recipe, threads);
        three_layers("dense", dense, threads);
    }
}

/* More threads in the backend than the plan has scratch for. */
static void test_threads(void) {
    graph g = graph_new(4);
    psa_desc desc[2] = {{.n_threads = 1}, {.n_threads = 3}};
    qkv x = inputs(&g, &graph_shape);
    struct ggml_tensor *out[2];
    for (int i = 0; i < 2; i++) {
        out[i] = psa_ggml_attention(g.ctx, x.q, x.k, x.v, &desc[i]);
        graph_output(&g, out[i]);
    }
    graph_run(&g, &x);
    float *want = malloc(ggml_nbytes(out[0]));
    for (int i = 0; i < 2; i++) {
        float *got = values(out[i]);
        one_call(&desc[i], &x, want);
        CHECK(memcmp(got, want, ggml_nbytes(out[i])) == 0, "%d threads of 4: other bits", desc[i].n_threads);
        free(got);
    }
    free(want);
    graph_free(&g);
}

/* A kept map gives the same bits; a map that is none gives NaN. */
static void test_levels(void) {
    graph g = graph_new(2), g2 = graph_new(2);
    const psa_desc desc = {.n_threads = 2};
    qkv x = inputs(&g, &graph_shape), x2 = inputs(&g2, &graph_shape);
    struct ggml_tensor *scored = psa_ggml_attention(g.ctx, x.q, x.k, x.v, &desc), *levels = psa_ggml_levels(scored);
    struct ggml_tensor *kept = ggml_new_tensor(g2.ctx, GGML_TYPE_I8, 4, levels->ne);
    struct ggml_tensor *given = psa_ggml_attend(g2.ctx, x2.q, x2.k, x2.v, kept, &desc);
    graph_output(&g, levels);
    graph_output(&g, scored);
    ggml_set_input(kept);
    graph_output(&g2, given);
    graph_run(&g, &x);
    graph_allocate(&g2);
    fill_inputs(&x2);
    ggml_backend_tensor_copy(levels, kept);
    graph_compute(&g2);
    float *want = values(scored), *got = values(given);
    CHECK(memcmp(got, want, ggml_nbytes(given)) == 0, "the kept map gives other bits");
    free(got);
    uint8_t bad = 3;
    ggml_backend_tensor_set(kept, &bad, ggml_nbytes(kept) - 1, 1);
    graph_compute(&g2);
    got = values(given);
    for (int64_t i = 0; i < ggml_nelements(given); i++)
        CHECK(isnan(got[i]), "element %d is %g", (int)i, (double)got[i]);
    free(want);
    free(got);
    graph_free(&g);
    graph_free(&g2);
}

/* ---- refusals: NULL and a line that says why -------------------------------------------------------------------- */

static char logged[256];

static void log_line(void *user, const char *line) {
    snprintf((char *)user, sizeof logged, "%s", line);
}

static const psa_desc logging = {.log_fn = log_line, .log_user = logged};

#define REFUSED(call, message)                                                                                         \
    do {                                                                                                               \
        logged[0] = 0;                                                                                                 \
        CHECK((call) == NULL, "accepted");                                                                             \
        CHECK(strstr(logged, message) != NULL, "said \"%s\", expected \"%s\"", logged, message);                       \
    } while (0)

static void test_refused_nodes(void) {
    graph g = graph_new(1);
    qkv x = inputs(&g, &graph_shape);
    struct ggml_tensor *mask = ggml_new_tensor_2d(g.ctx, GGML_TYPE_F16, x.k->ne[1], x.q->ne[1]);
    struct ggml_tensor *sinks = ggml_new_tensor_1d(g.ctx, GGML_TYPE_F32, x.q->ne[2]);
    struct ggml_tensor *alibi = ggml_flash_attn_ext(g.ctx, x.q, x.k, x.v, mask, 1, 8, 0);
    struct ggml_tensor *with_sinks = flash_attention(&g, &x, NULL);
    alibi->src[3] = NULL;
    ggml_flash_attn_ext_add_sinks(with_sinks, sinks);
    REFUSED(psa_ggml_replace(g.ctx, flash_attention(&g, &x, mask), &logging), "an attention mask");
    REFUSED(psa_ggml_replace(g.ctx, with_sinks, &logging), "sinks");
    REFUSED(psa_ggml_replace(g.ctx, alibi, &logging), "ALiBi");
    REFUSED(psa_ggml_replace(g.ctx, ggml_flash_attn_ext(g.ctx, x.q, x.k, x.v, NULL, 1, 0, 30), &logging), "softcap");
    REFUSED(psa_ggml_replace(g.ctx, ggml_flash_attn_ext(g.ctx, x.q, x.k, x.v, NULL, 0, 0, 0), &logging), "scale of 0");
    REFUSED(psa_ggml_replace(g.ctx, x.q, &logging), "ggml_flash_attn_ext");
    REFUSED(psa_ggml_replace(g.ctx, NULL, &logging), "ggml_flash_attn_ext");
    graph_free(&g);
}

static void test_refused_tensors(void) {
    graph g = graph_new(1);
    qkv x = inputs(&g, &graph_shape);
    struct ggml_tensor *t = ggml_new_tensor_3d(g.ctx, GGML_TYPE_Q8_0, 64, 640, 2);
    struct ggml_tensor *wide = ggml_new_tensor_3d(g.ctx, GGML_TYPE_F32, 264, 640, 2);
    struct ggml_tensor *heads = ggml_new_tensor_3d(g.ctx, GGML_TYPE_F32, 64, 640, 3);
    struct ggml_tensor *turned = ggml_permute(g.ctx, ggml_new_tensor_3d(g.ctx, GGML_TYPE_F32, 640, 64, 2), 1, 0, 2, 3);
    const int64_t maps[][4] = {{9, 5, 2, 1}, {10, 4, 2, 1}, {10, 5, 1, 1}, {10, 5, 2, 2}}; /* expected: 10, 5, 2, 1 */
    const psa_desc tree = {.tree = PSA_TREE_QKV, .log_fn = log_line, .log_user = logged};
    const psa_desc unknown = {.block_q = 7, .log_fn = log_line, .log_user = logged};
    REFUSED(psa_ggml_attention(g.ctx, x.q, t, t, &logging), "q8_0");
    REFUSED(psa_ggml_attention(g.ctx, x.q, NULL, x.v, &logging), "NULL");
    REFUSED(psa_ggml_attention(g.ctx, wide, wide, wide, &logging), "264");
    REFUSED(psa_ggml_attention(g.ctx, heads, x.k, x.v, &logging), "head");
    REFUSED(psa_ggml_attention(g.ctx, x.q, turned, x.v, &logging), "k");
    REFUSED(psa_ggml_attention(g.ctx, x.q, x.k, x.v, &unknown), "block_q");
    for (int i = 0; i < 4; i++)
        REFUSED(psa_ggml_attend(g.ctx, x.q, x.k, x.v, ggml_new_tensor(g.ctx, GGML_TYPE_I8, 4, maps[i]), &logging),
                "levels");
    t = ggml_new_tensor_3d(g.ctx, GGML_TYPE_I8, 10, 5, 2);
    REFUSED(psa_ggml_attend(g.ctx, x.q, x.k, x.v, t, &tree), "tree");
    t = ggml_new_tensor_3d(g.ctx, GGML_TYPE_F16, 10, 5, 2);
    REFUSED(psa_ggml_attend(g.ctx, x.q, x.k, x.v, t, &logging), "levels");
    REFUSED(psa_ggml_attend(g.ctx, x.q, x.k, x.v, NULL, &logging), "levels");
    graph_free(&g);
}

/* A context has room for one attention more or it has not: either way nothing ends the program. */
static void test_room(void) {
    for (int no_alloc = 0; no_alloc < 2; no_alloc++) {
        struct ggml_init_params p = {4 << 20, NULL, no_alloc};
        struct ggml_context *ctx = ggml_init(p);
        struct ggml_tensor *x = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 64, 640, 2);
        int made = 0;
        while (made < 10000 && psa_ggml_attention(ctx, x, x, x, &logging))
            made++;
        CHECK(made > 0 && made < 10000, "%d attentions in 4 MiB", made);
        CHECK(strstr(logged, "no room") != NULL, "said \"%s\"", logged);
        CHECK(!no_alloc || ggml_get_mem_size(ctx) - ggml_used_mem(ctx) < psa_ggml_overhead(), "refused too early");
        ggml_free(ctx);
    }
}

/* ---- all of them ------------------------------------------------------------------------------------------------ */

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    {"dense", test_dense},
    {"masked", test_masked},
    {"graph", test_graph},
    {"threads", test_threads},
    {"levels", test_levels},
    {"refused/nodes", test_refused_nodes},
    {"refused/tensors", test_refused_tensors},
    {"refused/room", test_room},
};

static int run_all(const char *filter, int list) {
    int passed = 0, failed = 0;
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (filter && !strstr(tests[i].name, filter))
            continue;
        if (list) {
            printf("%s\n", tests[i].name);
            continue;
        }
        checks = failures = 0;
        tests[i].run();
        printf("%s %-16s %6d checks\n", failures || !checks ? "FAIL" : "ok  ", tests[i].name, checks);
        *(failures || !checks ? &failed : &passed) += 1;
    }
    if (!list)
        printf("ggml %s: %d passed, %d failed\n", ggml_version(), passed, failed);
    return !list && (failed || !passed);
}

static int usage(const char *argument) {
    fprintf(stderr, "test_ggml: %s: expected --list, --filter TEXT or --bench [N], N from 512 to 65536\n", argument);
    return 2;
}

int main(int argc, char **argv) {
    const char *filter = NULL;
    int list = 0;
    if (argc > 1 && !strcmp(argv[1], "--bench")) {
        int64_t n = argc > 2 ? atoi(argv[2]) : 0;
        if (argc > 3 || (argc == 3 && (n < 512 || n > 65536)))
            return usage(argv[argc - 1]);
        bench_all(n);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--list")) {
            list = 1;
        } else if (!strcmp(argv[i], "--filter") && i + 1 < argc) {
            filter = argv[++i];
        } else {
            return usage(argv[i]);
        }
    }
    return run_all(filter, list);
}
