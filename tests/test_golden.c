/* test_golden.c - the official implementation's inputs and outputs (tests/data/golden) against the library, and against
 * the oracle, which shows that the oracle is what the official code computes. */
#include "test.h"

#include "../tools/npy.h"

/* Upstream's own f32 rounding against a float64 evaluation is up to 1.2e-6 for out and lse and 3.4e-7 for scores
 * (tests/data/golden/README.md). The oracle adds nothing to it; the library adds its own f32 rounding, about as much
 * again. */
static const tolerance upstream_out = {1.5e-6, 0}, upstream_score = {5e-7, 0}, library_out = {3e-6, 0},
                       library_map = {1e-6, 0};

static double max_error; /* of the current kind */

/* The line that a table of errors is made from. */
static void report(const char *engine, const char *kind, const char *what) {
    if (test_opt.verbose)
        printf("golden: %s%s max error %.2g (%s)\n", kind, what, max_error, engine);
    max_error = 0;
}

static void note(double error) { max_error = error > max_error ? error : max_error; }

static npy load(const char *descr, const char *format, const char *a, const char *b, const char *c) {
    npy x;
    char name[200], path[600], error[800] = "";
    snprintf(name, sizeof name, format, a, b, c);
    snprintf(path, sizeof path, "%s/golden/%s.npy", test_opt.data, name);
    memset(&x, 0, sizeof x);
    if (npy_read(path, &x, error, sizeof error) != 0 || strcmp(x.descr, descr) != 0) {
        fprintf(stderr, "test_psa: %s: expected type %s; --data DIR names the folder that holds golden/\n",
                error[0] ? error : path, descr);
        exit(2);
    }
    return x;
}

static npy load1(const char *descr, const char *name) { return load(descr, "%s%s%s", name, "", ""); }

static double *load_doubles(const char *name, npy *shape) {
    npy x = load1("<f4", name);
    double *to = doubles_of((const float *)x.data, x.count);
    if (shape)
        *shape = x;
    npy_free(&x);
    return to;
}

typedef struct input {
    double *q, *k, *v;
    int64_t H, N, D; /* batch 1 everywhere */
} input;

static input load_input(const char *prefix, int with_v) {
    input x;
    npy shape;
    char name[3][100];
    for (int i = 0; i < 3; i++)
        snprintf(name[i], sizeof name[i], "%s%c", prefix, "qkv"[i]);
    x.q = load_doubles(name[0], &shape);
    x.k = load_doubles(name[1], NULL);
    x.v = with_v ? load_doubles(name[2], NULL) : NULL;
    x.H = shape.shape[1], x.N = shape.shape[2], x.D = shape.shape[3];
    return x;
}

static void free_input(input *x) { free(x->q), free(x->k), free(x->v); }

static oracle oracle_of(const psa_desc *desc, const input *x) {
    oracle o;
    oracle_init(&o, desc, 1, x->H, x->H, x->N, x->N, x->D, x->v ? x->D : 0, x->q, x->k, x->v);
    return o;
}

static psa_desc desc_blocks(int block_q, int block_k, int causal) {
    psa_desc d;
    memset(&d, 0, sizeof d);
    d.block_q = block_q, d.block_k = block_k, d.causal = causal;
    return d;
}

/* ---- attention: out and lse ---- */

static void library_attend(const psa_desc *desc, const input *x, const uint8_t *levels, double *out, double *lse) {
    psa_plan plan;
    int64_t rows = x->H * x->N;
    tensor q = tensor_from(PSA_F32, LAYOUT_PLAIN, x->D, x->N, x->H, 1, x->q);
    tensor k = tensor_from(PSA_F32, LAYOUT_PLAIN, x->D, x->N, x->H, 1, x->k);
    tensor v = tensor_from(PSA_F32, LAYOUT_PLAIN, x->D, x->N, x->H, 1, x->v);
    tensor to = tensor_output(PSA_F32, LAYOUT_PLAIN, x->D, x->N, x->H, 1);
    float *to_lse = (float *)xmalloc((size_t)rows * sizeof *to_lse);
    if (CHECK_RESULT(psa_plan_init(&plan, desc, &q.t, &k.t, &v.t, &to.t), PSA_OK)) {
        void *work = xmalloc(psa_work_size(&plan));
        CHECK_RESULT(psa_pool(&plan, k.t.data, v.t.data, work, 0, 1), PSA_OK);
        CHECK_RESULT(psa_attend(&plan, q.t.data, k.t.data, v.t.data, levels, work, to.t.data, to_lse, 0, 1), PSA_OK);
        free(work);
    }
    for (int64_t i = 0; i < rows * x->D; i++)
        out[i] = (double)((const float *)to.t.data)[i];
    for (int64_t i = 0; i < rows; i++)
        lse[i] = (double)to_lse[i];
    tensor_free(&q), tensor_free(&k), tensor_free(&v), tensor_free(&to);
    free(to_lse);
}

typedef struct attention_files {
    const char *kind, *inputs, *results;
    int causal;
} attention_files;

static void attention_case(int library, const attention_files *files, psa_isa isa) {
    const char *engine = library ? psa_isa_name(isa) : "oracle", *results = files->results;
    psa_desc desc = desc_blocks(128, 128, files->causal);
    input x = load_input(files->inputs, 1);
    int64_t rows = x.H * x.N;
    npy levels = load("|u1", "%s%s%s", results, "levels", ""), want_out = load("<f4", "%s%s%s", results, "out", "");
    npy want_lse = load("<f4", "%s%s%s", results, "lse", "");
    double *out = (double *)xmalloc(want_out.count * sizeof *out),
           *lse = (double *)xmalloc(want_lse.count * sizeof *lse);
    double *golden_out = doubles_of((const float *)want_out.data, want_out.count);
    double *golden_lse = doubles_of((const float *)want_lse.data, want_lse.count);
    oracle o = oracle_of(&desc, &x);
    desc.isa = isa;
    if (library)
        library_attend(&desc, &x, (const uint8_t *)levels.data, out, lse);
    else
        oracle_attend(&o, (const uint8_t *)levels.data, out, lse);
    note(COMPARE("out", out, golden_out, rows * x.D, library ? library_out : upstream_out));
    report(engine, files->kind, " out");
    note(COMPARE("lse", lse, golden_lse, rows, library ? library_out : upstream_out));
    report(engine, files->kind, " lse");
    free(out), free(lse), free(golden_out), free(golden_lse);
    npy_free(&levels), npy_free(&want_out), npy_free(&want_lse);
    free_input(&x);
}

static const attention_files attention_cases[] = {{"attention d64", "attention/d64_", "attention/d64_", 0},
                                                  {"attention d128", "attention/d128_", "attention/d128_", 0},
                                                  {"causal d64", "attention/d64_", "causal/d64_", 1},
                                                  {"causal d128", "attention/d128_", "causal/d128_", 1},
                                                  {"backward bidir forward", "backward/", "backward/bidir_", 0},
                                                  {"backward causal forward", "backward/", "backward/causal_", 1}};

enum { N_ATTENTION = sizeof attention_cases / sizeof *attention_cases };

static void golden_attention(void) {
    for (int i = 0; i < N_ATTENTION; i++)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
            if (psa_isa_supported((psa_isa)isa))
                attention_case(1, &attention_cases[i], (psa_isa)isa);
}

static void oracle_attention(void) {
    for (int i = 0; i < N_ATTENTION; i++)
        attention_case(0, &attention_cases[i], PSA_ISA_AUTO);
}

/* ---- scores ---- */

static void library_score(const psa_desc *desc, const input *x, double *scores) {
    psa_plan plan;
    tensor q = tensor_from(PSA_F32, LAYOUT_PLAIN, x->D, x->N, x->H, 1, x->q);
    tensor k = tensor_from(PSA_F32, LAYOUT_PLAIN, x->D, x->N, x->H, 1, x->k);
    if (CHECK_RESULT(psa_plan_init(&plan, desc, &q.t, &k.t, NULL, NULL), PSA_OK)) {
        void *work = xmalloc(psa_work_size(&plan));
        float *to = (float *)xmalloc(psa_map_size(&plan) * sizeof *to);
        CHECK_RESULT(psa_score(&plan, q.t.data, k.t.data, work, to, 0, 1), PSA_OK);
        for (size_t i = 0; i < psa_map_size(&plan); i++)
            scores[i] = (double)to[i];
        free(work), free(to);
    }
    tensor_free(&q), tensor_free(&k);
}

static void oracle_score(const psa_desc *desc, const input *x, double *scores) {
    uint8_t all[128];
    oracle o = oracle_of(desc, x);
    for (int i = 0; i < 128; i++)
        all[i] = (uint8_t)i;
    if (desc->score == PSA_SCORE_SAMPLE)
        oracle_score_sample(&o, all, desc->block_q, all, desc->block_k, scores);
    else
        oracle_score_antidiagonal(&o, scores);
}

/* The golden map divided by `row_sum` is what both engines must give. */
static void score_case(int library, const psa_desc *desc, const char *inputs, const char *results, double row_sum) {
    input x = load_input(inputs, 0);
    npy shape;
    double *want = load_doubles(results, &shape), *got = (double *)xmalloc(shape.count * sizeof *got);
    for (size_t i = 0; i < shape.count; i++)
        want[i] /= row_sum;
    for (size_t i = 0; i < shape.count; i++)
        got[i] = -1;
    if (library)
        library_score(desc, &x, got);
    else
        oracle_score(desc, &x, got);
    note(COMPARE(results, got, want, (int64_t)shape.count, library ? library_map : upstream_score));
    free(want), free(got);
    free_input(&x);
}

static void score_sample(int library, psa_isa isa) {
    static const struct {
        const char *file;
        int block_q, block_k;
    } cases[] = {{"score_sample/score_128_128", 128, 128},
                 {"score_sample/score_128_64", 128, 64},
                 {"score_sample/score_64_64", 64, 64}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        psa_desc desc = desc_blocks(cases[i].block_q, cases[i].block_k, 0);
        desc.sample_q = desc.sample_k = 1;
        desc.isa = isa;
        score_case(library, &desc, "score_sample/", cases[i].file, 1);
    }
    report(library ? psa_isa_name(isa) : "oracle", "score_sample", "");
}

static void score_antidiagonal(int library, psa_isa isa) {
    static const struct {
        const char *file;
        int stride, causal;
    } cases[] = {{"score_antidiagonal/sum_s8_bidir", 8, 0},
                 {"score_antidiagonal/sum_s8_causal", 8, 1},
                 {"score_antidiagonal/sum_s16_bidir", 16, 0},
                 {"score_antidiagonal/sum_s16_causal", 16, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        psa_desc desc = desc_blocks(128, 128, cases[i].causal);
        desc.score = PSA_SCORE_ANTIDIAGONAL;
        desc.stride = cases[i].stride;
        desc.isa = isa;
        score_case(library, &desc, "score_antidiagonal/", cases[i].file, 128.0 / cases[i].stride);
    }
    report(library ? psa_isa_name(isa) : "oracle", "score_antidiagonal", "");
}

static void golden_score(void) {
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
        if (psa_isa_supported((psa_isa)isa)) {
            score_sample(1, (psa_isa)isa);
            score_antidiagonal(1, (psa_isa)isa);
        }
}

static void oracle_scores(void) {
    score_sample(0, PSA_ISA_AUTO);
    score_antidiagonal(0, PSA_ISA_AUTO);
}

/* ---- masks ---- */

/* The shares as the configuration wrote them: decimals, which f32 files only approximate. */
static void load_level_end(const char *name, double *level_end) {
    npy x = load1("<f4", name);
    for (size_t i = 0; i < x.count && i < PSA_MAX_LEVELS; i++) {
        char text[32];
        snprintf(text, sizeof text, "%.6g", (double)((const float *)x.data)[i]);
        level_end[i] = strtod(text, NULL);
    }
    npy_free(&x);
}

/* Levels for a score file [B,H,nq,nk], through shapes that have just these numbers of blocks. */
static void levels_of(int library, const psa_desc *desc, const npy *scores, uint8_t *levels) {
    int64_t B = scores->shape[0], H = scores->shape[1], Nq = scores->shape[2] * 16, Nk = scores->shape[3] * 16;
    psa_plan plan;
    psa_tensor q = psa_tensor_4d(NULL, PSA_F32, 8, Nq, H, B), k = psa_tensor_4d(NULL, PSA_F32, 8, Nk, H, B);
    memset(levels, 0xa5, scores->count);
    if (!library) {
        oracle o;
        oracle_init(&o, desc, B, H, H, Nq, Nk, 8, 0, NULL, NULL, NULL);
        oracle_mask(&o, (const float *)scores->data, levels);
    } else if (CHECK_RESULT(psa_plan_init(&plan, desc, &q, &k, NULL, NULL), PSA_OK)) {
        void *work = xmalloc(psa_work_size(&plan));
        CHECK_RESULT(psa_mask(&plan, (const float *)scores->data, work, levels, 0, 1), PSA_OK);
        free(work);
    }
}

static int is_top_of_row(const npy *scores, size_t at) {
    size_t n = (size_t)scores->shape[3];
    const float *row = (const float *)scores->data + at / n * n;
    for (size_t J = 0; J < n; J++)
        if (row[J] > row[at % n])
            return 0;
    return 1;
}

/* valid: one entry per `run` consecutive blocks. The inclusive mode is upstream's energybound everywhere, also where
 * the file says invalid (which is for the other mode), but for the top block of a row: upstream lets it get coarser or
 * lost. */
static void mask_case(int library, const psa_desc *desc, const npy *scores, const char *name, const char *valid_name,
                      int64_t run) {
    npy want = load("|u1", "mask/%s%s%s", name, "_levels", ""),
        valid = load("|u1", "mask/%s%s%s", name, valid_name, "");
    const uint8_t *expected = (const uint8_t *)want.data;
    uint8_t *got = (uint8_t *)xmalloc(want.count);
    int64_t wrong = 0, compared = 0;
    levels_of(library, desc, scores, got);
    for (size_t i = 0; i < want.count; i++)
        if (((const uint8_t *)valid.data)[i / (size_t)run] || desc->inclusive) {
            int kept = desc->inclusive && got[i] == 1 && is_top_of_row(scores, i);
            compared++;
            wrong += got[i] != expected[i] && !kept;
        }
    CHECK(wrong == 0 && compared > (int64_t)want.count * 8 / 10, "%s: %d of %d levels differ", name, (int)wrong,
          (int)compared);
    note((double)wrong);
    free(got);
    npy_free(&want), npy_free(&valid);
}

static void mask_modes(int library) {
    static const char *const configs[] = {"l124", "wan14b", "topk8", "empty4"};
    static const char *const modes[] = {"topk", "topk_newtype", "thresholdbound", "thresholdbound_newtype"};
    npy scores = load1("<f4", "mask/scores");
    for (size_t c = 0; c < sizeof configs / sizeof *configs; c++)
        for (int m = 0; m < 4; m++) {
            char name[100];
            psa_desc desc = desc_blocks(16, 16, 0);
            snprintf(name, sizeof name, "mask/%s_level_end", configs[c]);
            load_level_end(name, desc.level_end);
            desc.mask = m < 2 ? PSA_MASK_TOPK : PSA_MASK_THRESHOLD;
            desc.min_full = m < 2 ? 0 : .06;
            snprintf(name, sizeof name, "%s_%s", configs[c], modes[m]);
            mask_case(library, &desc, &scores, name, "_row_valid", scores.shape[3]);
        }
    npy_free(&scores);
    report(library ? "library" : "oracle", "mask", ", levels that differ,");
}

static void mask_qwen(int library) {
    static const char *const configs[] = {"topk_default", "topk_wan14b", "energybound_qwen", "energybound_wan14b"};
    for (int c = 0; c < 4; c++)
        for (int causal = 0; causal < 2; causal++) {
            const char *way = causal ? "causal" : "bidir";
            char name[100];
            npy scores = load("<f4", "mask/qwen_scores_%s%s%s", way, "", "");
            psa_desc desc = desc_blocks(16, 16, causal);
            snprintf(name, sizeof name, "mask/qwen_%s_level_end", configs[c]);
            load_level_end(name, desc.level_end);
            desc.mask = c < 2 ? PSA_MASK_TOPK : PSA_MASK_THRESHOLD;
            desc.inclusive = c >= 2;
            desc.sink = desc.diagonal = 1;
            snprintf(name, sizeof name, "qwen_%s_%s", configs[c], way);
            mask_case(library, &desc, &scores, name, "_block_valid", 1);
            npy_free(&scores);
        }
    report(library ? "library" : "oracle", "mask qwen", ", levels that differ,");
}

static void golden_mask(void) { mask_modes(1), mask_qwen(1); }
static void oracle_masks(void) { mask_modes(0), mask_qwen(0); }

/* ---- similarity ---- */

/* The cap shows in a mask that would give every block level 8. */
static psa_desc desc_similarity(int block, const double sim_min[3]) {
    psa_desc desc = desc_blocks(block, block, 0);
    desc.level_end[3] = 1;
    desc.n_sim_min = 3;
    memcpy(desc.sim_min, sim_min, 3 * sizeof *sim_min);
    return desc;
}

/* cap: [H][nk]. */
static void caps_of(int library, const psa_desc *desc, const input *x, uint8_t *cap) {
    oracle o = oracle_of(desc, x);
    psa_plan plan;
    tensor k = tensor_from(PSA_F32, LAYOUT_PLAIN, x->D, x->N, x->H, 1, x->k);
    psa_tensor q = psa_tensor_4d(NULL, PSA_F32, x->D, desc->block_q, x->H, 1);
    if (!library) {
        for (int64_t i = 0; i < x->H * o.nk; i++)
            cap[i] = (uint8_t)oracle_cap(&o, 0, i / o.nk, i % o.nk);
    } else if (CHECK_RESULT(psa_plan_init(&plan, desc, &q, &k.t, NULL, NULL), PSA_OK)) {
        void *work = xmalloc(psa_work_size(&plan));
        float *scores = (float *)xmalloc(psa_map_size(&plan) * sizeof *scores);
        for (size_t i = 0; i < psa_map_size(&plan); i++)
            scores[i] = 1 / (float)o.nk;
        CHECK_RESULT(psa_pool(&plan, k.t.data, NULL, work, 0, 1), PSA_OK);
        CHECK_RESULT(psa_mask(&plan, scores, work, cap, 0, 1), PSA_OK);
        free(work), free(scores);
    }
    tensor_free(&k);
}

static void cap_case(int library, const input *x, int block, const char *config) {
    char name[100];
    npy shape, want;
    snprintf(name, sizeof name, "similarity/threshold_%s", config);
    double *threshold = load_doubles(name, &shape);
    psa_desc desc = desc_similarity(block, threshold);
    snprintf(name, sizeof name, "similarity/cap_b%d_%s", block, config);
    want = load1("|u1", name);
    uint8_t *got = (uint8_t *)xmalloc(want.count);
    caps_of(library, &desc, x, got);
    for (size_t i = 0; i < want.count; i++)
        CHECK(got[i] == ((const uint8_t *)want.data)[i], "%s: block %d: %d, expected %d", name, (int)i, got[i],
              ((const uint8_t *)want.data)[i]);
    free(got), free(threshold);
    npy_free(&want);
}

/* A threshold just below the golden mean allows the level, one just above forbids it. */
static void mean_case(int library, const input *x, int block) {
    char name[100];
    npy shape;
    snprintf(name, sizeof name, "similarity/mean_b%d", block);
    double *mean = load_doubles(name, &shape);
    int64_t blocks = x->H * x->N / block;
    uint8_t *cap = (uint8_t *)xmalloc((size_t)blocks);
    for (int level = 0; level < 3; level++)
        for (int64_t i = 0; i < blocks; i++)
            for (int above = 0; above < 2; above++) {
                double sim_min[3] = {2, 2, 2}; /* no cosine exceeds 2 */
                sim_min[level] = mean[level * blocks + i] + (above ? 1e-5 : -1e-5);
                psa_desc desc = desc_similarity(block, sim_min);
                caps_of(library, &desc, x, cap);
                CHECK(cap[i] == (above ? 1 : 2 << level), "block %d of size %d, level %d: cap %d with threshold %.7f",
                      (int)i, block, 2 << level, cap[i], sim_min[level]);
            }
    free(cap), free(mean);
}

static void similarity(int library) {
    static const int blocks[] = {128, 64, 32};
    input x;
    npy shape;
    x.k = load_doubles("similarity/k", &shape);
    x.q = x.v = NULL;
    x.H = shape.shape[1], x.N = shape.shape[2], x.D = shape.shape[3];
    for (int i = 0; i < 3; i++) {
        cap_case(library, &x, blocks[i], "zero");
        cap_case(library, &x, blocks[i], "wan");
        cap_case(library, &x, blocks[i], "qwen");
        mean_case(library, &x, blocks[i]);
    }
    free_input(&x);
}

static void golden_similarity(void) { similarity(1); }

static void oracle_similarities(void) {
    similarity(0);
    psa_desc desc = desc_blocks(64, 64, 0);
    npy shape;
    double *k = load_doubles("similarity/k", &shape), *mean = load_doubles("similarity/mean_b64", NULL), got[3 * 2 * 8];
    oracle o;
    oracle_init(&o, &desc, 1, 2, 2, 512, 512, 16, 0, NULL, k, NULL);
    for (int i = 0; i < 3 * 2 * 8; i++)
        got[i] = oracle_similarity(&o, 0, i / 8 % 2, i % 8, 2 << (i / 16));
    note(COMPARE("mean cosine", got, mean, 3 * 2 * 8, upstream_score));
    report("oracle", "similarity", "");
    free(k), free(mean);
}

/* ---- token orders ---- */

static void golden_order(void) {
    static const struct {
        const char *file;
        int t, h, w, tile[3];
    } cases[] = {{"order/gilbert_13x30x45", 13, 30, 45, {0, 0, 0}}, {"order/gilbert_5x7x9", 5, 7, 9, {0, 0, 0}},
                 {"order/gilbert_1x16x16", 1, 16, 16, {0, 0, 0}},   {"order/gilbert_3x4x5", 3, 4, 5, {0, 0, 0}},
                 {"order/gilbert_21x30x52", 21, 30, 52, {0, 0, 0}}, {"order/tile_6x24x40_2x8x8", 6, 24, 40, {2, 8, 8}}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        npy want = load1("<i4", cases[i].file);
        guarded got = guarded_new(want.count * sizeof(int32_t), 0);
        const int *tile = cases[i].tile;
        int t = cases[i].t, h = cases[i].h, w = cases[i].w;
        int32_t *index = (int32_t *)guarded_data(&got);
        CHECK((size_t)(t * h * w) == want.count, "%d entries", (int)want.count);
        if (tile[0])
            CHECK_RESULT(psa_order_tile(t, h, w, tile[0], tile[1], tile[2], index), PSA_OK);
        else
            CHECK_RESULT(psa_order_gilbert(t, h, w, index), PSA_OK);
        CHECK(!memcmp(index, want.data, want.count * sizeof *index), "%s differs", cases[i].file);
        CHECK(guarded_intact(&got), "guard bytes were written");
        guarded_free(&got);
        npy_free(&want);
    }
}

const test_case tests_oracle[] = {
    {"oracle/golden_attention", oracle_attention},
    {"oracle/golden_score", oracle_scores},
    {"oracle/golden_mask", oracle_masks},
    {"oracle/golden_similarity", oracle_similarities},
    {NULL, NULL},
};

const test_case tests_golden[] = {
    {"golden/attention", golden_attention},   {"golden/score", golden_score}, {"golden/mask", golden_mask},
    {"golden/similarity", golden_similarity}, {"golden/order", golden_order}, {NULL, NULL},
};
