/* test_errors.c - every error code is reached; a failure says so once and leaves everything as it was. */
#include "test.h"

enum {
#define COUNT(name, text) COUNT_##name,
    PSA_RESULTS(COUNT)
#undef COUNT
        N_RESULTS
};

static int reached[N_RESULTS]; /* filled by errors/ tests, read by errors/every_code, the last of them */

static psa_result seen(psa_result r) {
    if ((int)r >= 0 && (int)r < N_RESULTS)
        reached[r] = 1;
    return r;
}

#define FAILS(call, want) CHECK_RESULT(seen(call), want)

/* ---- refused descs and shapes ---- */

typedef struct log_lines {
    int n, bad;
    char last[400];
} log_lines;

static void count_line(void *user, const char *message) {
    log_lines *log = (log_lines *)user;
    log->n++;
    log->bad += strlen(message) < 5 || strchr(message, '\n') != NULL;
    snprintf(log->last, sizeof log->last, "%s", message);
}

typedef struct call {
    psa_desc desc;
    tensor in_q, in_k, in_v, to;
    psa_tensor q, k, v, out;
    log_lines log;
    int32_t order[2 * 50];
} call;

static void call_init(call *c) {
    memset(c, 0, sizeof *c);
    c->in_q = tensor_input(PSA_F32, LAYOUT_PLAIN, 16, 40, 4, 1, 1);
    c->in_k = tensor_input(PSA_F32, LAYOUT_PLAIN, 16, 50, 2, 1, 1);
    c->in_v = tensor_input(PSA_F32, LAYOUT_PLAIN, 24, 50, 2, 1, 1);
    c->to = tensor_output(PSA_F32, LAYOUT_PLAIN, 24, 40, 4, 1);
    c->q = c->in_q.t, c->k = c->in_k.t, c->v = c->in_v.t, c->out = c->to.t;
    c->desc.block_q = c->desc.block_k = 16;
    c->desc.n_threads = 3;
    c->desc.log_fn = count_line;
    c->desc.log_user = &c->log;
    for (int i = 0; i < 100; i++)
        c->order[i] = i % 50;
}

static void call_free(call *c) {
    tensor_free(&c->in_q), tensor_free(&c->in_k), tensor_free(&c->in_v), tensor_free(&c->to);
}

static void check_refused(call *c, psa_result want, const char *file, int line, const char *change) {
    psa_plan plan, before;
    psa_extra extra;
    memset(&plan, 0xa5, sizeof plan);
    memset(&before, 0xa5, sizeof before);
    memset(&extra, 0, sizeof extra);
    test_result(seen(psa_plan_init(&plan, &c->desc, &c->q, &c->k, &c->v, &c->out)), want, file, line, change);
    test_check(!memcmp(&plan, &before, sizeof plan), file, line, change, "the plan was written");
    test_check(c->log.n == 1 && c->log.bad == 0, file, line, change, "%d log lines, the last \"%s\"", c->log.n,
               c->log.last);
    test_result(psa_attention(&c->desc, &c->q, &c->k, &c->v, &c->out, &extra), want, file, line, change);
    test_check(tensor_untouched(&c->to), file, line, change, "out was written");
}

#define REFUSED(want, change)                                 \
    do {                                                      \
        call c;                                               \
        call_init(&c);                                        \
        change;                                               \
        check_refused(&c, want, __FILE__, __LINE__, #change); \
        call_free(&c);                                        \
    } while (0)

static void errors_accepted(void) {
    call c;
    psa_plan plan;
    call_init(&c);
    CHECK_RESULT(psa_plan_init(&plan, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_OK);
    CHECK_RESULT(psa_attention(&c.desc, &c.q, &c.k, &c.v, &c.out, NULL), PSA_OK);
    CHECK(c.log.n == 0, "%d log lines without an error: %s", c.log.n, c.log.last);
    c.desc.log_fn = NULL;
    c.desc.block_q = 1;
    FAILS(psa_plan_init(&plan, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_ERR_BLOCK); /* silence is fine too */
    call_free(&c);
}

static void errors_shapes(void) {
    REFUSED(PSA_ERR_TYPE, c.q.type = (psa_type)99);
    REFUSED(PSA_ERR_TYPE, c.k.type = (psa_type)3);
    REFUSED(PSA_ERR_TYPE, c.v.type = PSA_F16; c.v.nb[0] = 2);
    REFUSED(PSA_ERR_TYPE, c.out.type = (psa_type)7);
    REFUSED(PSA_ERR_SHAPE, c.q.ne[1] = 0);
    REFUSED(PSA_ERR_SHAPE, c.q.ne[1] = -40);
    REFUSED(PSA_ERR_SHAPE, c.k.ne[1] = 0);
    REFUSED(PSA_ERR_SHAPE, c.q.ne[3] = c.k.ne[3] = c.v.ne[3] = c.out.ne[3] = 0);
    REFUSED(PSA_ERR_SHAPE, c.k.ne[2] = c.v.ne[2] = 0);
    REFUSED(PSA_ERR_SHAPE, c.k.ne[0] = 8);
    REFUSED(PSA_ERR_SHAPE, c.k.ne[3] = 2);
    REFUSED(PSA_ERR_SHAPE, c.v.ne[1] = 49);
    REFUSED(PSA_ERR_SHAPE, c.v.ne[2] = 1);
    REFUSED(PSA_ERR_SHAPE, c.v.ne[3] = 2);
    REFUSED(PSA_ERR_SHAPE, c.out.ne[0] = 16);
    REFUSED(PSA_ERR_SHAPE, c.out.ne[1] = 39);
    REFUSED(PSA_ERR_SHAPE, c.out.ne[2] = 2);
    REFUSED(PSA_ERR_SHAPE, c.out.ne[3] = 2);
    REFUSED(PSA_ERR_HEAD_DIM, c.q.ne[0] = c.k.ne[0] = 12);
    REFUSED(PSA_ERR_HEAD_DIM, c.q.ne[0] = c.k.ne[0] = 264);
    REFUSED(PSA_ERR_HEAD_DIM, c.v.ne[0] = c.out.ne[0] = 20);
    REFUSED(PSA_ERR_HEAD_DIM, c.v.ne[0] = c.out.ne[0] = 512);
    REFUSED(PSA_ERR_HEADS, c.q.ne[2] = c.out.ne[2] = 3);
    REFUSED(PSA_ERR_HEADS, c.q.ne[2] = c.out.ne[2] = 1);
    REFUSED(PSA_ERR_STRIDE, c.q.nb[0] = 8);
    REFUSED(PSA_ERR_STRIDE, c.k.nb[0] = 0);
    REFUSED(PSA_ERR_STRIDE, c.v.nb[0] = 2);
    REFUSED(PSA_ERR_STRIDE, c.out.nb[0] = 8);
    REFUSED(PSA_ERR_STRIDE, c.out.nb[1] = 0);
    REFUSED(PSA_ERR_STRIDE, c.out.nb[2] = 0);
    REFUSED(PSA_ERR_STRIDE, c.out.nb[1] = 24 * 4 - 1);
    REFUSED(PSA_ERR_STRIDE, c.out.nb[2] = c.out.nb[1] * 39);
}

/* Trees, tilt, mask ERROR and density. */
static void errors_recipe(void) {
    REFUSED(PSA_ERR_ORDER, c.desc.tree = (psa_tree_kind)3);
    REFUSED(PSA_ERR_ORDER, c.desc.tree = (psa_tree_kind)-1);
    REFUSED(PSA_ERR_ORDER, c.desc.metric = (psa_metric_kind)2);
    REFUSED(PSA_ERR_ORDER, c.desc.metric = (psa_metric_kind)-1);
    REFUSED(PSA_ERR_ORDER, c.desc.tree = PSA_TREE_KV; c.desc.causal = 1);
    REFUSED(PSA_ERR_ORDER, c.desc.tree = PSA_TREE_QKV; c.desc.causal = 1);
    REFUSED(PSA_ERR_ORDER, c.desc.tree = PSA_TREE_KV; c.desc.order_k.index = c.order);
    REFUSED(PSA_ERR_ORDER, c.desc.tree = PSA_TREE_QKV; c.desc.order_k.index = c.order);
    REFUSED(PSA_ERR_ORDER, c.desc.tree = PSA_TREE_QKV; c.desc.order_q.index = c.order);
    REFUSED(PSA_ERR_MASK, c.desc.tilt = 1; c.desc.causal = 1);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_ERROR; c.desc.causal = 1);
    REFUSED(PSA_ERR_MASK, c.desc.density = -.1);
    REFUSED(PSA_ERR_MASK, c.desc.density = 1.01);
    REFUSED(PSA_ERR_MASK, c.desc.density = NAN);
    REFUSED(PSA_ERR_MASK, c.desc.density = .2; c.desc.level_count[0] = 1);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_ERROR; c.desc.level_count[0] = 1);
    REFUSED(PSA_ERR_MASK, c.desc.lambda = .1);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_THRESHOLD; c.desc.lambda = .1);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_ERROR; c.desc.lambda = .1; c.desc.density = .2);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_ERROR; c.desc.lambda = -.1);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_ERROR; c.desc.lambda = NAN);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_ERROR; c.desc.lambda = INFINITY);
    REFUSED(PSA_ERR_SCORE, c.desc.mask = PSA_MASK_ERROR; c.desc.score = PSA_SCORE_EXACT);
    REFUSED(PSA_ERR_SCORE, c.desc.mask = PSA_MASK_ERROR; c.desc.score = PSA_SCORE_ANTIDIAGONAL);
    REFUSED(PSA_ERR_SCORE, c.desc.mask = PSA_MASK_ERROR; c.desc.score_group[1] = 1);
    REFUSED(PSA_ERR_SCORE, c.desc.mask = PSA_MASK_ERROR; c.desc.score_group[0] = 3);
    REFUSED(PSA_ERR_SCORE, c.desc.mask = PSA_MASK_ERROR; c.desc.score_group[1] = 32);
}

static void errors_desc(void) {
    REFUSED(PSA_ERR_BLOCK, c.desc.block_q = 15);
    REFUSED(PSA_ERR_BLOCK, c.desc.block_q = 257);
    REFUSED(PSA_ERR_BLOCK, c.desc.block_q = -16);
    REFUSED(PSA_ERR_BLOCK, c.desc.block_k = 8);
    REFUSED(PSA_ERR_BLOCK, c.desc.block_k = 48);
    REFUSED(PSA_ERR_BLOCK, c.desc.block_k = 256);
    REFUSED(PSA_ERR_SCALE, c.desc.scale = NAN);
    REFUSED(PSA_ERR_SCALE, c.desc.scale = -INFINITY);
    REFUSED(PSA_ERR_SCORE, c.desc.score = (psa_score_kind)4);
    REFUSED(PSA_ERR_SCORE, c.desc.score = (psa_score_kind)-1);
    REFUSED(PSA_ERR_SCORE, c.desc.sample_q = 1.01);
    REFUSED(PSA_ERR_SCORE, c.desc.sample_q = -.1);
    REFUSED(PSA_ERR_SCORE, c.desc.sample_k = NAN);
    REFUSED(PSA_ERR_SCORE, c.desc.score = PSA_SCORE_ANTIDIAGONAL; c.desc.stride = 3);
    REFUSED(PSA_ERR_SCORE, c.desc.score = PSA_SCORE_ANTIDIAGONAL; c.desc.stride = -8);
    REFUSED(PSA_ERR_SCORE, c.desc.score = PSA_SCORE_POOLED; c.desc.score_group[0] = 3);
    REFUSED(PSA_ERR_SCORE, c.desc.score = PSA_SCORE_POOLED; c.desc.score_group[1] = 128);
    REFUSED(PSA_ERR_SCORE, c.desc.score = PSA_SCORE_POOLED; c.desc.score_group[1] = -1);
    REFUSED(PSA_ERR_SCORE, c.desc.score = PSA_SCORE_ANTIDIAGONAL; c.desc.block_q = 20);
    REFUSED(PSA_ERR_MASK, c.desc.mask = (psa_mask_kind)4);
    REFUSED(PSA_ERR_MASK, c.desc.mask = (psa_mask_kind)-1);
    REFUSED(PSA_ERR_MASK, c.desc.mask = PSA_MASK_THRESHOLD; c.desc.level_count[1] = 2);
    REFUSED(PSA_ERR_LEVELS, c.desc.level_end[0] = .5; c.desc.level_end[1] = .4);
    REFUSED(PSA_ERR_LEVELS, c.desc.level_end[0] = .5; c.desc.level_end[2] = .6); /* 0 between: it falls */
    REFUSED(PSA_ERR_LEVELS, c.desc.level_end[0] = 1.5);
    REFUSED(PSA_ERR_LEVELS, c.desc.level_end[0] = -.5);
    REFUSED(PSA_ERR_LEVELS, c.desc.level_end[0] = NAN);
    REFUSED(PSA_ERR_LEVELS, c.desc.level_end[5] = 1); /* level 32 of blocks of 16 */
    REFUSED(PSA_ERR_LEVELS, c.desc.level_count[0] = -1);
    REFUSED(PSA_ERR_LEVELS, c.desc.level_count[5] = 1);
    REFUSED(PSA_ERR_SIMILARITY, c.desc.n_sim_min = -1);
    REFUSED(PSA_ERR_SIMILARITY, c.desc.n_sim_min = 5); /* 2, 4, 8, 16 */
    REFUSED(PSA_ERR_SIMILARITY, c.desc.block_k = 128; c.desc.n_sim_min = 8);
    REFUSED(PSA_ERR_SIMILARITY, c.desc.n_sim_min = 2; c.desc.sim_min[1] = NAN);
    REFUSED(PSA_ERR_SIMILARITY, c.desc.n_sim_min = 2; c.desc.sim_min[0] = INFINITY);
    REFUSED(PSA_ERR_PROTECT, c.desc.n_prefix = -1);
    REFUSED(PSA_ERR_PROTECT, c.desc.n_suffix = -1);
    REFUSED(PSA_ERR_PROTECT, c.desc.min_full = -.1);
    REFUSED(PSA_ERR_PROTECT, c.desc.min_full = 1.1);
    REFUSED(PSA_ERR_PROTECT, c.desc.min_full = NAN);
    REFUSED(PSA_ERR_ORDER, c.desc.order_k.index = c.order; c.order[3] = 4);
    REFUSED(PSA_ERR_ORDER, c.desc.order_k.index = c.order; c.order[3] = -1);
    REFUSED(PSA_ERR_ORDER, c.desc.order_k.index = c.order; c.order[3] = 50);
    REFUSED(PSA_ERR_ORDER, c.desc.order_k.index = c.order; c.desc.order_k.stride_h = 50; c.order[99] = 0);
    REFUSED(PSA_ERR_ORDER, c.desc.order_q.index = c.order; c.order[39] = 40);
    REFUSED(PSA_ERR_ORDER, c.desc.order_q.index = c.order; c.desc.causal = 1);
    REFUSED(PSA_ERR_ORDER, c.desc.order_k.index = c.order; c.desc.causal = 1);
    REFUSED(PSA_ERR_ISA, c.desc.isa = (psa_isa)-1);
    REFUSED(PSA_ERR_ISA, c.desc.isa = PSA_ISA_END);
    REFUSED(PSA_ERR_THREADS, c.desc.n_threads = -1);
    for (int isa = PSA_ISA_AUTO; isa < PSA_ISA_END; isa++)
        if (!psa_isa_supported((psa_isa)isa))
            REFUSED(PSA_ERR_ISA, c.desc.isa = (psa_isa)isa);
}

/* Sizes that do not fit: strides of 0 make the tensors themselves small. */
static void huge(call *c, int64_t Nq, int64_t Nk, int64_t H, int64_t B) {
    psa_tensor *all[4] = {&c->q, &c->k, &c->v, &c->out};
    for (int i = 0; i < 4; i++) {
        all[i]->ne[1] = i % 3 ? Nk : Nq, all[i]->ne[2] = H, all[i]->ne[3] = B;
        all[i]->nb[1] = all[i]->nb[2] = all[i]->nb[3] = 0;
    }
}

static void errors_overflow(void) {
    static const int64_t big = INT64_MAX;
    psa_plan plan;
    REFUSED(PSA_ERR_OVERFLOW, c.q.nb[1] = SIZE_MAX / 2);
    REFUSED(PSA_ERR_OVERFLOW, c.k.nb[2] = SIZE_MAX - 4);
    REFUSED(PSA_ERR_OVERFLOW, c.v.nb[1] = SIZE_MAX / 4);
    REFUSED(PSA_ERR_OVERFLOW, c.out.nb[2] = SIZE_MAX / 2);
    for (int i = 0; i < 6; i++) {
        const int64_t extents[6][4] = {{big, 64, 1, 1},  {64, big, 1, 1},
                                       {big, big, 1, 1}, {64, 64, big, 1},
                                       {64, 64, 1, big}, {INT64_C(1) << 40, INT64_C(1) << 40, 4096, 4096}};
        call c;
        call_init(&c);
        huge(&c, extents[i][0], extents[i][1], extents[i][2], extents[i][3]);
        FAILS(psa_plan_init(&plan, &c.desc, &c.q, &c.k, NULL, NULL), PSA_ERR_OVERFLOW);
        call_free(&c);
    }
    psa_tensor x = psa_tensor_4d(NULL, PSA_F32, 16, 100, 1, 1);
    CHECK(psa_order_semantic_work_size(&x, 4, 1) > 0, "no size for a small tensor");
    x.ne[1] = big;
    CHECK(psa_order_semantic_work_size(&x, 1 << 30, 1 << 30) == 0, "a size for what cannot be");
}

/* Token numbers are int32 in orders: 2^31 - 1 tokens are the most, and every size is right up to there. */
static void errors_large_extents(void) {
    call c;
    psa_plan plan;
    int64_t N = INT32_MAX;
    call_init(&c);
    huge(&c, 100, N + 1, 1, 1);
    FAILS(psa_plan_init(&plan, &c.desc, &c.q, &c.k, NULL, NULL), PSA_ERR_OVERFLOW);
    huge(&c, 100, N, 5, 1);
    psa_result r = psa_plan_init(&plan, &c.desc, &c.q, &c.k, NULL, NULL);
    if (sizeof(size_t) < 8) {
        CHECK_RESULT(r, PSA_ERR_OVERFLOW);
    } else if (CHECK_RESULT(r, PSA_OK)) {
        CHECK(plan.nk == N / 16 + 1, "nk %.0f", (double)plan.nk);
        CHECK(psa_map_size(&plan) == (size_t)(5 * 7 * plan.nk), "map %.0f", (double)psa_map_size(&plan));
        CHECK((double)psa_work_size(&plan) > 5 * 16 * 4 * .9 * (double)N, "work %.0f", (double)psa_work_size(&plan));
    }
    call_free(&c);
}

/* ---- pointers, threads, level maps ---- */

static void errors_null(void) {
    call c;
    psa_plan plan;
    call_init(&c);
    FAILS(psa_plan_init(NULL, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_ERR_NULL);
    FAILS(psa_plan_init(&plan, NULL, &c.q, &c.k, &c.v, &c.out), PSA_ERR_NULL);
    FAILS(psa_plan_init(&plan, &c.desc, NULL, &c.k, &c.v, &c.out), PSA_ERR_NULL);
    FAILS(psa_plan_init(&plan, &c.desc, &c.q, NULL, &c.v, &c.out), PSA_ERR_NULL);
    FAILS(psa_attention(NULL, &c.q, &c.k, &c.v, &c.out, NULL), PSA_ERR_NULL);
    FAILS(psa_attention(&c.desc, NULL, &c.k, &c.v, &c.out, NULL), PSA_ERR_NULL);
    FAILS(psa_attention(&c.desc, &c.q, NULL, &c.v, &c.out, NULL), PSA_ERR_NULL);
    FAILS(psa_attention(&c.desc, &c.q, &c.k, NULL, &c.out, NULL), PSA_ERR_NULL);
    FAILS(psa_attention(&c.desc, &c.q, &c.k, &c.v, NULL, NULL), PSA_ERR_NULL);
    psa_tensor *all[4] = {&c.q, &c.k, &c.v, &c.out};
    for (int i = 0; i < 4; i++) {
        void *data = all[i]->data;
        all[i]->data = NULL;
        FAILS(psa_attention(&c.desc, &c.q, &c.k, &c.v, &c.out, NULL), PSA_ERR_NULL);
        all[i]->data = data;
    }
    psa_extra extra;
    memset(&extra, 0, sizeof extra);
    extra.levels_given = 1;
    FAILS(psa_attention(&c.desc, &c.q, &c.k, &c.v, &c.out, &extra), PSA_ERR_NULL);
    CHECK(tensor_untouched(&c.to), "out was written");
    call_free(&c);
}

static void errors_null_stages(void) {
    call c;
    psa_plan plan;
    call_init(&c);
    if (CHECK_RESULT(psa_plan_init(&plan, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_OK)) {
        void *work = xmalloc(psa_work_size(&plan));
        float *scores = (float *)xmalloc(psa_map_size(&plan) * sizeof *scores);
        uint8_t *levels = (uint8_t *)xmalloc(psa_map_size(&plan));
        psa_stats stats;
        memset(levels, 1, psa_map_size(&plan));
        FAILS(psa_pool(NULL, c.k.data, c.v.data, work, 0, 1), PSA_ERR_NULL);
        FAILS(psa_pool(&plan, NULL, c.v.data, work, 0, 1), PSA_ERR_NULL);
        FAILS(psa_pool(&plan, c.k.data, c.v.data, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_score(NULL, c.q.data, c.k.data, work, scores, 0, 1), PSA_ERR_NULL);
        FAILS(psa_score(&plan, NULL, c.k.data, work, scores, 0, 1), PSA_ERR_NULL);
        FAILS(psa_score(&plan, c.q.data, NULL, work, scores, 0, 1), PSA_ERR_NULL);
        FAILS(psa_score(&plan, c.q.data, c.k.data, NULL, scores, 0, 1), PSA_ERR_NULL);
        FAILS(psa_score(&plan, c.q.data, c.k.data, work, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_mask(NULL, scores, work, levels, 0, 1), PSA_ERR_NULL);
        FAILS(psa_mask(&plan, NULL, work, levels, 0, 1), PSA_ERR_NULL);
        FAILS(psa_mask(&plan, scores, NULL, levels, 0, 1), PSA_ERR_NULL);
        FAILS(psa_mask(&plan, scores, work, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_attend(NULL, c.q.data, c.k.data, c.v.data, levels, work, c.out.data, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_attend(&plan, NULL, c.k.data, c.v.data, levels, work, c.out.data, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_attend(&plan, c.q.data, NULL, c.v.data, levels, work, c.out.data, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_attend(&plan, c.q.data, c.k.data, NULL, levels, work, c.out.data, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_attend(&plan, c.q.data, c.k.data, c.v.data, levels, NULL, c.out.data, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_attend(&plan, c.q.data, c.k.data, c.v.data, levels, work, NULL, NULL, 0, 1), PSA_ERR_NULL);
        FAILS(psa_stats_from_levels(NULL, levels, -1, -1, &stats), PSA_ERR_NULL);
        FAILS(psa_stats_from_levels(&plan, levels, -1, -1, NULL), PSA_ERR_NULL);
        CHECK(psa_stats_from_levels(&plan, levels, 1, 0, &stats) != PSA_OK, "batch 1 of 1");
        CHECK(psa_stats_from_levels(&plan, levels, 0, 4, &stats) != PSA_OK, "head 4 of 4");
        CHECK(tensor_untouched(&c.to), "out was written");
        free(work), free(scores), free(levels);
    }
    /* A plan without v cannot attend. */
    if (CHECK_RESULT(psa_plan_init(&plan, &c.desc, &c.q, &c.k, NULL, NULL), PSA_OK)) {
        void *work = xmalloc(psa_work_size(&plan));
        CHECK(psa_attend(&plan, c.q.data, c.k.data, c.v.data, NULL, work, c.out.data, NULL, 0, 1) != PSA_OK,
              "attended without v");
        CHECK(tensor_untouched(&c.to), "out was written");
        free(work);
    }
    call_free(&c);
}

/* The stages and results of the recipe: what may be NULL and what not. */
static void errors_null_recipe(void) {
    call c;
    psa_plan plan, plain, dense;
    double error = -1;
    call_init(&c);
    CHECK_RESULT(psa_plan_init(&plain, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_OK);
    c.desc.mask = PSA_MASK_DENSE;
    CHECK_RESULT(psa_plan_init(&dense, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_OK);
    c.desc.mask = PSA_MASK_TOPK, c.desc.density = .2, c.desc.tree = PSA_TREE_KV;
    CHECK_RESULT(psa_plan_init(&plan, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_OK);
    void *work = xmalloc(psa_work_size(&plan) + psa_work_size(&plain));
    float *scores = (float *)xmalloc(psa_map_size(&plan) * sizeof *scores);
    uint8_t *levels = (uint8_t *)xmalloc(psa_map_size(&plan));
    memset(levels, 1, psa_map_size(&plan));
    FAILS(psa_prepare(NULL, c.q.data, c.k.data, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_prepare(&plan, NULL, c.k.data, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_prepare(&plan, c.q.data, NULL, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_prepare(&plan, c.q.data, c.k.data, NULL, 0, 1), PSA_ERR_NULL);
    FAILS(psa_prepare(&plan, c.q.data, c.k.data, work, 3, 3), PSA_ERR_THREADS);
    FAILS(psa_budget(NULL, scores, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_budget(&plan, NULL, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_budget(&plan, scores, NULL, 0, 1), PSA_ERR_NULL);
    FAILS(psa_budget(&plan, scores, work, 0, 4), PSA_ERR_THREADS);
    CHECK_RESULT(psa_budget(&plain, NULL, work, 0, 1), PSA_OK); /* nothing to meet */
    CHECK_RESULT(psa_budget(&dense, NULL, work, 0, 1), PSA_OK);
    CHECK_RESULT(psa_prepare(&plan, c.q.data, c.k.data, work, 0, 1), PSA_OK);
    CHECK(psa_tree_order(&plan, work, 1, 0, 1) != NULL, "no order of the keys");
    CHECK(!psa_tree_order(&plan, work, 0, 0, 0), "tree KV orders queries");
    CHECK(!psa_tree_order(NULL, work, 1, 0, 0) && !psa_tree_order(&plan, NULL, 1, 0, 0), "an order from nowhere");
    CHECK(!psa_tree_order(&plan, work, 1, 0, 2) && !psa_tree_order(&plan, work, 1, 1, 0), "KV head 2, batch 1");
    CHECK(!psa_tree_order(&plan, work, 1, -1, 0) && !psa_tree_order(&plan, work, 1, 0, -1), "negative");
    CHECK(!psa_tree_order(&plain, work, 1, 0, 0), "an order without a tree");
    FAILS(psa_predicted_error(&plan, work, levels, 0, 0, &error), PSA_ERR_MASK);
    c.desc.mask = PSA_MASK_ERROR;
    if (CHECK_RESULT(psa_plan_init(&plan, &c.desc, &c.q, &c.k, &c.v, &c.out), PSA_OK)) {
        FAILS(psa_predicted_error(NULL, work, levels, 0, 0, &error), PSA_ERR_NULL);
        FAILS(psa_predicted_error(&plan, NULL, levels, 0, 0, &error), PSA_ERR_NULL);
        FAILS(psa_predicted_error(&plan, work, NULL, 0, 0, &error), PSA_ERR_NULL);
        FAILS(psa_predicted_error(&plan, work, levels, 0, 0, NULL), PSA_ERR_NULL);
        FAILS(psa_predicted_error(&plan, work, levels, 1, 0, &error), PSA_ERR_SHAPE);
        FAILS(psa_predicted_error(&plan, work, levels, 0, 4, &error), PSA_ERR_SHAPE);
        FAILS(psa_predicted_error(&plan, work, levels, -2, 0, &error), PSA_ERR_SHAPE);
    }
    CHECK(error == -1, "the error was written");
    free(work), free(scores), free(levels);
    call_free(&c);
}

static void errors_threads(void) {
    static const int bad[][2] = {{-1, 2}, {2, 2}, {0, 0}, {0, 4}, {0, -1}, {3, 2}};
    setup s;
    psa_desc desc;
    shape x;
    memset(&desc, 0, sizeof desc);
    memset(&x, 0, sizeof x);
    x.B = 1, x.Hq = x.Hkv = 1, x.Nq = x.Nk = 100, x.D = x.Dv = 16;
    desc.n_threads = 3;
    if (!setup_init(&s, &desc, &x))
        return;
    void *work = guarded_data(&s.work);
    memset(setup_levels(&s), 1, psa_map_size(&s.plan));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        int ith = bad[i][0], nth = bad[i][1];
        FAILS(psa_pool(&s.plan, s.k.t.data, s.v.t.data, work, ith, nth), PSA_ERR_THREADS);
        FAILS(psa_score(&s.plan, s.q.t.data, s.k.t.data, work, setup_scores(&s), ith, nth), PSA_ERR_THREADS);
        FAILS(psa_mask(&s.plan, setup_scores(&s), work, setup_levels(&s), ith, nth), PSA_ERR_THREADS);
        FAILS(psa_attend(&s.plan, s.q.t.data, s.k.t.data, s.v.t.data, setup_levels(&s), work, s.out.t.data,
                         setup_lse(&s), ith, nth),
              PSA_ERR_THREADS);
        if (ith < 0 || ith >= nth)
            FAILS(psa_merge(&s.out.t, setup_lse(&s), &s.v.t, setup_lse(&s), ith, nth), PSA_ERR_THREADS);
    }
    CHECK(tensor_untouched(&s.out) && guarded_untouched(&s.lse) && guarded_untouched(&s.work), "something was written");
    setup_free(&s);
}

/* One bad entry anywhere: no thread writes anything. */
static void errors_level_map(void) {
    static const uint8_t bad[] = {3, 5, 6, 7, 9, 64, 128, 255};
    for (int r = 0; r < test_rounds(100); r++) {
        rnd_round(r);
        setup s;
        psa_extra extra;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.causal = 0, desc.block_k = 16 << rnd_int(0, 1);
        desc.mask = rnd_chance(30) ? PSA_MASK_DENSE : PSA_MASK_TOPK;
        if (!setup_init(&s, &desc, &x))
            continue;
        size_t map = psa_map_size(&s.plan);
        random_levels(&s.plan, 1 << (s.plan.n_levels - 1), 30, setup_levels(&s));
        setup_levels(&s)[rnd_u64() % map] = desc.mask == PSA_MASK_DENSE && rnd_chance(50) ? 2 : bad[rnd_int(0, 7)];
        run_pool(&s, 1);
        for (int ith = 0, nth = rnd_int(1, 4); ith < nth; ith++)
            FAILS(psa_attend(&s.plan, s.q.t.data, s.k.t.data, s.v.t.data, setup_levels(&s), guarded_data(&s.work),
                             s.out.t.data, setup_lse(&s), ith, nth),
                  PSA_ERR_LEVEL_MAP);
        memset(&extra, 0, sizeof extra);
        extra.levels = setup_levels(&s), extra.levels_given = 1, extra.lse = setup_lse(&s);
        FAILS(psa_attention(&desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, &extra), PSA_ERR_LEVEL_MAP);
        CHECK(tensor_untouched(&s.out) && guarded_untouched(&s.lse), "out or lse was written");
        setup_free(&s);
    }
}

/* ---- memory ---- */

typedef struct budget {
    int calls, live, fail_at; /* the call that gets NULL; -1: none */
} budget;

static void *budget_alloc(void *user, size_t size) {
    budget *b = (budget *)user;
    if (b->calls++ == b->fail_at)
        return NULL;
    b->live++;
    return (char *)xmalloc(size + 3) + 3; /* "any alignment will do" */
}

static void budget_free(void *user, void *p) {
    ((budget *)user)->live--;
    free((char *)p - 3);
}

/* Allocation i fails for i = 0, 1, ... until the call succeeds without reaching it. */
static void fail_each_allocation(setup *s, psa_extra *extra) {
    budget b = {0, 0, 0};
    psa_desc desc = s->desc;
    desc.alloc_fn = budget_alloc, desc.free_fn = budget_free, desc.alloc_user = &b;
    for (;; b.fail_at++) {
        b.calls = 0;
        psa_result r = seen(psa_attention(&desc, &s->q.t, &s->k.t, &s->v.t, &s->out.t, extra));
        CHECK(b.live == 0, "%d blocks were not freed", b.live);
        if (b.calls <= b.fail_at) {
            CHECK_RESULT(r, PSA_OK);
            break;
        }
        CHECK_RESULT(r, PSA_ERR_MEMORY);
        CHECK(tensor_untouched(&s->out) && guarded_untouched(&s->lse), "out or lse was written");
        if (!CHECK(b.fail_at < 20, "allocation after allocation"))
            break;
    }
    CHECK(b.fail_at > 0, "the hooks were not used");
}

static void errors_memory(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        setup s;
        psa_extra extra;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.score = (psa_score_kind)(r % 4), desc.block_q = 16 * rnd_int(1, 4);
        desc.mask = (psa_mask_kind)rnd_int(0, 2);
        if (r % 3 == 0 && !desc.causal) {
            desc.tree = (psa_tree_kind)rnd_int(0, 2), desc.tilt = rnd_chance(50), desc.density = .3;
            if (rnd_chance(50))
                desc.mask = PSA_MASK_ERROR, desc.score = PSA_SCORE_POOLED;
        }
        desc.n_threads = rnd_int(1, 3);
        if (!setup_init(&s, &desc, &x))
            continue;
        memset(&extra, 0, sizeof extra);
        extra.lse = setup_lse(&s);
        if (rnd_chance(50))
            extra.levels = setup_levels(&s);
        if (rnd_chance(50))
            extra.scores = setup_scores(&s);
        fail_each_allocation(&s, rnd_chance(80) ? &extra : NULL);
        CHECK_GUARDS(&s);
        setup_free(&s);
    }
}

/* ---- around ---- */

static void errors_orders(void) {
    int32_t index[100];
    int grid[3];
    psa_order order = {index, 0, 0};
    memset(index, 0, sizeof index);
    FAILS(psa_order_gilbert(0, 2, 2, index), PSA_ERR_GRID);
    FAILS(psa_order_gilbert(2, -1, 2, index), PSA_ERR_GRID);
    FAILS(psa_order_gilbert(1 << 16, 1 << 16, 1, index), PSA_ERR_GRID);
    FAILS(psa_order_gilbert(1 << 11, 1 << 10, 1 << 10, index), PSA_ERR_GRID);
    FAILS(psa_order_gilbert(2, 2, 2, NULL), PSA_ERR_NULL);
    FAILS(psa_order_tile(2, 0, 2, 1, 1, 1, index), PSA_ERR_GRID);
    FAILS(psa_order_tile(2, 2, 2, 0, 1, 1, index), PSA_ERR_GRID);
    FAILS(psa_order_tile(2, 2, 2, 1, 1, -1, index), PSA_ERR_GRID);
    FAILS(psa_order_tile(1 << 16, 1 << 16, 1, 1, 1, 1, index), PSA_ERR_GRID);
    FAILS(psa_order_tile(2, 2, 2, 1, 1, 1, NULL), PSA_ERR_NULL);
    tensor in = tensor_input(PSA_F32, LAYOUT_PLAIN, 8, 10, 2, 1, 1),
           out = tensor_output(PSA_F32, LAYOUT_PLAIN, 8, 10, 2, 1);
    psa_tensor other = out.t;
    FAILS(psa_permute(NULL, &order, &out.t, 0, 1), PSA_ERR_NULL);
    FAILS(psa_permute(&in.t, NULL, &out.t, 0, 1), PSA_ERR_NULL);
    FAILS(psa_unpermute(&in.t, &order, NULL, 0, 1), PSA_ERR_NULL);
    FAILS(psa_permute(&in.t, &order, &out.t, 0, 1), PSA_ERR_ORDER); /* all zero */
    FAILS(psa_unpermute(&in.t, &order, &out.t, 0, 1), PSA_ERR_ORDER);
    for (int i = 0; i < 10; i++)
        index[i] = i;
    FAILS(psa_permute(&in.t, &order, &out.t, 1, 1), PSA_ERR_THREADS);
    other.ne[1] = 9;
    FAILS(psa_permute(&in.t, &order, &other, 0, 1), PSA_ERR_SHAPE);
    other = out.t, other.type = PSA_F16, other.nb[0] = 2;
    FAILS(psa_permute(&in.t, &order, &other, 0, 1), PSA_ERR_TYPE);
    other = out.t, other.nb[1] = 0;
    FAILS(psa_permute(&in.t, &order, &other, 0, 1), PSA_ERR_STRIDE);
    CHECK(tensor_untouched(&out), "out was written");
    FAILS(psa_preset_grid(NULL, 1, 1, 1, grid), PSA_ERR_NULL);
    FAILS(psa_preset_grid(psa_preset_find("wan2.1-14b"), 0, 480, 832, grid), PSA_ERR_GRID);
    FAILS(psa_preset_grid(psa_preset_find("wan2.1-14b"), 81, -480, 832, grid), PSA_ERR_GRID);
    tensor_free(&in), tensor_free(&out);
}

static void errors_semantic(void) {
    tensor x = tensor_input(PSA_F32, LAYOUT_PLAIN, 8, 20, 1, 1, 1);
    float centroids[4 * 8];
    int32_t index[20];
    void *work = xmalloc(psa_order_semantic_work_size(&x.t, 4, 1));
    memset(index, 0xa5, sizeof index);
    FAILS(psa_order_semantic(NULL, 0, 0, 4, 1, centroids, 0, index, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_order_semantic(&x.t, 0, 0, 4, 1, NULL, 0, index, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_order_semantic(&x.t, 0, 0, 4, 1, centroids, 0, NULL, work, 0, 1), PSA_ERR_NULL);
    FAILS(psa_order_semantic(&x.t, 0, 0, 4, 1, centroids, 0, index, NULL, 0, 1), PSA_ERR_NULL);
    FAILS(psa_order_semantic(&x.t, 0, 0, 4, 1, centroids, 0, index, work, 1, 1), PSA_ERR_THREADS);
    CHECK(psa_order_semantic(&x.t, 0, 0, 0, 1, centroids, 0, index, work, 0, 1) != PSA_OK, "0 clusters");
    CHECK(psa_order_semantic(&x.t, 8, 9, 4, 1, centroids, 0, index, work, 0, 1) != PSA_OK, "4 clusters of 3 tokens");
    CHECK(psa_order_semantic(&x.t, 0, 0, 4, 0, centroids, 0, index, work, 0, 1) != PSA_OK, "0 iterations");
    FAILS(psa_order_semantic(&x.t, -1, 0, 4, 1, centroids, 0, index, work, 0, 1), PSA_ERR_PROTECT);
    FAILS(psa_order_semantic(&x.t, 0, -1, 4, 1, centroids, 0, index, work, 0, 1), PSA_ERR_PROTECT);
    FAILS(psa_order_semantic(&x.t, 15, 15, 4, 1, centroids, 0, index, work, 0, 1), PSA_ERR_PROTECT);
    CHECK(index[0] == (int32_t)0xa5a5a5a5, "index was written");
    free(work);
    tensor_free(&x);
}

static void errors_merge(void) {
    tensor out = tensor_output(PSA_F32, LAYOUT_PLAIN, 8, 10, 2, 1),
           part = tensor_input(PSA_F32, LAYOUT_PLAIN, 8, 10, 2, 1, 1);
    float lse[20] = {0}, part_lse[20] = {0};
    FAILS(psa_merge(NULL, lse, &part.t, part_lse, 0, 1), PSA_ERR_NULL);
    FAILS(psa_merge(&out.t, NULL, &part.t, part_lse, 0, 1), PSA_ERR_NULL);
    FAILS(psa_merge(&out.t, lse, NULL, part_lse, 0, 1), PSA_ERR_NULL);
    FAILS(psa_merge(&out.t, lse, &part.t, NULL, 0, 1), PSA_ERR_NULL);
    for (int axis = 0; axis < 4; axis++) {
        psa_tensor other = part.t;
        other.ne[axis]++;
        FAILS(psa_merge(&out.t, lse, &other, part_lse, 0, 1), PSA_ERR_SHAPE);
    }
    psa_tensor other = part.t;
    other.type = (psa_type)3;
    FAILS(psa_merge(&out.t, lse, &other, part_lse, 0, 1), PSA_ERR_TYPE);
    other = out.t, other.nb[1] = 0;
    FAILS(psa_merge(&other, lse, &part.t, part_lse, 0, 1), PSA_ERR_STRIDE);
    CHECK(tensor_untouched(&out), "out was written");
    tensor_free(&out), tensor_free(&part);
}

static void errors_names(void) {
    psa_desc desc, before;
    memset(&desc, 0xa5, sizeof desc);
    memset(&before, 0xa5, sizeof before);
    FAILS(psa_desc_preset("no such model", &desc), PSA_ERR_PRESET);
    CHECK(!memcmp(&desc, &before, sizeof desc), "the desc was written");
    FAILS(psa_desc_preset(NULL, &desc), PSA_ERR_PRESET);
    FAILS(psa_desc_preset("default", NULL), PSA_ERR_NULL);
    CHECK(psa_preset_find("no such model") == NULL, "found");
    CHECK(psa_type_size(PSA_F32) == 4 && psa_type_size(PSA_F16) == 2 && psa_type_size(PSA_BF16) == 2, "sizes");
    CHECK(psa_type_size((psa_type)3) == 0 && psa_type_size((psa_type)-1) == 0, "a size for an unknown type");
    CHECK(!strcmp(psa_version(), PSA_VERSION), "%s", psa_version());
    for (int i = 0; i < N_RESULTS; i++)
        for (int j = 0; j < i; j++)
            CHECK(strcmp(psa_result_string((psa_result)i), psa_result_string((psa_result)j)), "%d and %d say the same",
                  i, j);
    CHECK(psa_result_string((psa_result)N_RESULTS) != NULL && psa_result_string((psa_result)-1) != NULL,
          "no text for unknown results");
    CHECK(psa_isa_supported(psa_isa_detect()) && psa_isa_supported(PSA_ISA_SCALAR) && psa_isa_supported(PSA_ISA_AUTO),
          "isa");
    CHECK(!psa_isa_supported(PSA_ISA_END) && !psa_isa_supported((psa_isa)-1), "isa");
    CHECK(psa_isa_name(PSA_ISA_END) == NULL && psa_isa_name((psa_isa)-1) == NULL, "isa");
    for (int i = 0; i < PSA_ISA_END; i++)
        CHECK(psa_isa_name((psa_isa)i) != NULL, "%d has no name", i);
}

/* Alone in a --filter this runs what it depends on. */
static void errors_every_code(void) {
    static const char *const names[] = {
#define NAME(name, text) #name,
        PSA_RESULTS(NAME)
#undef NAME
    };
    errors_accepted(), errors_shapes(), errors_desc(), errors_recipe(), errors_overflow(), errors_null();
    errors_threads(), errors_level_map();
    errors_memory(), errors_orders(), errors_names();
    for (int i = 1; i < PSA_ERR_CUDA_DEVICE; i++) /* from there on they are psa_cuda.cu's */
        CHECK(reached[i], "%s was never returned", names[i]);
}

const test_case tests_errors[] = {
    {"errors/accepted", errors_accepted},
    {"errors/shapes", errors_shapes},
    {"errors/desc", errors_desc},
    {"errors/recipe", errors_recipe},
    {"errors/overflow", errors_overflow},
    {"errors/large_extents", errors_large_extents},
    {"errors/null", errors_null},
    {"errors/null_stages", errors_null_stages},
    {"errors/null_recipe", errors_null_recipe},
    {"errors/threads", errors_threads},
    {"errors/level_map", errors_level_map},
    {"errors/memory", errors_memory},
    {"errors/orders", errors_orders},
    {"errors/semantic", errors_semantic},
    {"errors/merge", errors_merge},
    {"errors/names", errors_names},
    {"errors/every_code", errors_every_code},
    {NULL, NULL},
};
