/* test_score.c - the four ways to score a block pair, and the sampled offsets. */
#include "test.h"

static psa_desc desc_score(const shape *x, psa_score_kind kind) {
    psa_desc d = desc_random_blocks(x);
    d.score = kind;
    d.stride = 1 << rnd_int(0, 4);
    d.block_q = 16 * rnd_int(1, 8);
    if (kind == PSA_SCORE_POOLED && rnd_chance(70)) {
        d.score_group[0] = 1 << rnd_int(0, 4);
        d.score_group[1] = 1 << rnd_int(0, 4);
    }
    d.score_norm = rnd_chance(50);
    d.score_mean = rnd_chance(30);
    d.sample_q = rnd_chance(30) ? 0 : .02 + .98 * rnd_uniform();
    d.sample_k = rnd_chance(30) ? 0 : .02 + .98 * rnd_uniform();
    return d;
}

static void score_case(const psa_desc *desc, const shape *x) {
    setup s;
    if (!setup_init(&s, desc, x))
        return;
    if (desc->score == PSA_SCORE_POOLED)
        run_pool(&s, rnd_int(1, 3));
    run_score(&s, rnd_int(1, 3));
    CHECK_SCORES(&s);
    setup_free(&s);
}

static void random_scores(psa_score_kind kind, int rounds) {
    for (int r = 0; r < test_rounds(rounds); r++) {
        rnd_round(r);
        shape x = shape_random();
        psa_desc desc = desc_score(&x, kind);
        score_case(&desc, &x);
    }
}

static void score_sample(void) { random_scores(PSA_SCORE_SAMPLE, 200); }
static void score_antidiagonal(void) { random_scores(PSA_SCORE_ANTIDIAGONAL, 200); }
static void score_pooled(void) { random_scores(PSA_SCORE_POOLED, 150); }
static void score_exact(void) { random_scores(PSA_SCORE_EXACT, 150); }

/* With every token sampled nothing is left to chance. */
static void score_sample_all(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_score(&x, PSA_SCORE_SAMPLE);
        desc.sample_q = desc.sample_k = 1;
        if (!setup_init(&s, &desc, &x))
            continue;
        CHECK(s.plan.n_sample_q == desc.block_q && s.plan.n_sample_k == desc.block_k, "%d %d", s.plan.n_sample_q,
              s.plan.n_sample_k);
        run_score(&s, 1);
        CHECK_SCORES(&s);
        setup_free(&s);
    }
}

static void score_causal(void) {
    for (int r = 0; r < test_rounds(120); r++) {
        rnd_round(r);
        shape x = shape_random();
        psa_desc desc = desc_score(&x, (psa_score_kind)(r % 4));
        desc.causal = 1;
        desc.block_q = 16 * rnd_int(1, 3);
        x.D = 8;
        x.Nk = rnd_chance(40) ? x.Nq : x.Nk;
        score_case(&desc, &x);
    }
}

static void score_every_isa(void) {
    for (int r = 0; r < test_rounds(80); r++)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
            if (!psa_isa_supported((psa_isa)isa))
                continue;
            rnd_round(r);
            shape x = shape_random();
            psa_desc desc = desc_score(&x, (psa_score_kind)(r % 4));
            desc.isa = (psa_isa)isa;
            score_case(&desc, &x);
        }
}

/* Logits beyond what exp can hold, on either side. */
static void score_huge_logits(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_score(&x, (psa_score_kind)(r % 4));
        x.type_q = x.type_kv = PSA_F32;
        x.spread = pow(10, rnd_int(2, 14));
        if (!setup_init(&s, &desc, &x))
            continue;
        run_pool(&s, 1);
        run_score(&s, 1);
        for (size_t row = 0; row < psa_map_size(&s.plan); row += (size_t)s.plan.nk) {
            double sum = 0;
            int visible = 0;
            for (size_t J = 0; J < (size_t)s.plan.nk; J++) {
                sum += (double)setup_scores(&s)[row + J];
                visible |= oracle_pair(&s.o, (int64_t)(row / (size_t)s.plan.nk) % s.plan.nq, (int64_t)J) != HIDDEN;
            }
            CHECK(fabs(sum - visible) < 1e-5, "row sums to %g", sum);
        }
        setup_free(&s);
    }
}

/* ---- sampled offsets ---- */

static int ascending(const uint8_t *x, int n, int below) {
    for (int i = 0; i < n; i++)
        if (x[i] >= below || (i && x[i] <= x[i - 1]))
            return 0;
    return n > 0;
}

static psa_plan plan_of(const psa_desc *desc) {
    psa_plan plan;
    psa_tensor q = psa_tensor_4d(NULL, PSA_F32, 8, 500, 1, 1);
    memset(&plan, 0, sizeof plan);
    CHECK_RESULT(psa_plan_init(&plan, desc, &q, &q, NULL, NULL), PSA_OK);
    return plan;
}

static void score_offsets(void) {
    for (int r = 0; r < test_rounds(200); r++) {
        rnd_round(r);
        psa_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.block_q = rnd_int(16, 256), desc.block_k = 16 << rnd_int(0, 3);
        desc.sample_q = rnd_uniform() + 1e-3, desc.sample_k = rnd_uniform() + 1e-3;
        desc.sample_q = fmin(desc.sample_q, 1), desc.sample_k = fmin(desc.sample_k, 1);
        desc.seed = rnd_u64();
        psa_plan a = plan_of(&desc), b = plan_of(&desc);
        CHECK(ascending(a.sample_q, a.n_sample_q, desc.block_q), "%d query offsets", a.n_sample_q);
        CHECK(ascending(a.sample_k, a.n_sample_k, desc.block_k), "%d key offsets", a.n_sample_k);
        CHECK(fabs(a.n_sample_q - desc.sample_q * desc.block_q) < 1 || a.n_sample_q == 1, "%d of %g", a.n_sample_q,
              desc.sample_q);
        CHECK(fabs(a.n_sample_k - desc.sample_k * desc.block_k) < 1 || a.n_sample_k == 1, "%d of %g", a.n_sample_k,
              desc.sample_k);
        CHECK(!memcmp(a.sample_q, b.sample_q, (size_t)a.n_sample_q) &&
                  !memcmp(a.sample_k, b.sample_k, (size_t)a.n_sample_k),
              "the same seed gave other offsets");
    }
}

/* Over many seeds every offset is drawn about equally often, and the two sides are drawn separately. */
static void score_seeds(void) {
    enum { SEEDS = 2000 };
    int count[128] = {0}, equal = 0;
    psa_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.block_q = desc.block_k = 128;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        desc.seed = seed;
        psa_plan plan = plan_of(&desc);
        for (int i = 0; i < plan.n_sample_q; i++)
            count[plan.sample_q[i]]++;
        equal += !memcmp(plan.sample_q, plan.sample_k, (size_t)plan.n_sample_q);
    }
    CHECK(equal == 0, "queries and keys got the same offsets for %d seeds", equal);
    for (int i = 0; i < 128; i++) /* binomial, p = 1/4: 500 with deviation 19.4 */
        CHECK(abs(count[i] - SEEDS / 4) < 6 * 20, "offset %d was drawn %d times of %d", i, count[i], SEEDS);
}

/* ---- bad numbers ---- */

/* Sampled logits that are NaN are left out; the scores stay numbers. */
static void score_nan(void) {
    for (int r = 0; r < test_rounds(100); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_score(&x, PSA_SCORE_SAMPLE);
        desc.score_mean = 0;
        if (!setup_init(&s, &desc, &x))
            continue;
        for (int i = rnd_int(1, 20); i > 0; i--) {
            tensor *t = rnd_chance(50) ? &s.q : &s.k;
            tensor_set(t, rnd_int(0, (int)t->t.ne[0] - 1), rnd_int(0, (int)t->t.ne[1] - 1),
                       rnd_int(0, (int)t->t.ne[2] - 1), rnd_int(0, (int)t->t.ne[3] - 1), NAN);
        }
        run_score(&s, 1);
        CHECK_SCORES(&s);
        setup_free(&s);
    }
}

/* A head that reads no NaN or Inf has the scores it would have without it, bit for bit, with every scorer. */
static void score_nan_other_heads(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_score(&x, (psa_score_kind)(r % 4));
        x.B = 2;
        if (!setup_init(&s, &desc, &x))
            continue;
        size_t head = (size_t)(s.plan.nq * s.plan.nk), map = psa_map_size(&s.plan);
        float *clean = (float *)xmalloc(map * sizeof *clean);
        run_pool(&s, 1);
        run_score(&s, 1);
        memcpy(clean, setup_scores(&s), map * sizeof *clean);
        tensor_set(&s.k, 0, rnd_int(0, (int)x.Nk - 1), 0, 0, rnd_chance(50) ? NAN : INFINITY);
        tensor_set(&s.q, 0, rnd_int(0, (int)x.Nq - 1), 0, 0, rnd_chance(50) ? NAN : -INFINITY);
        run_pool(&s, 1);
        run_score(&s, 1);
        for (size_t i = 0; i < map / head; i++)
            if (i >= (size_t)(x.Hq / x.Hkv))
                CHECK(!memcmp(clean + i * head, setup_scores(&s) + i * head, head * sizeof *clean), "head %d changed",
                      (int)i);
        free(clean);
        setup_free(&s);
    }
}

/* Nothing but NaN to score with: uniform over the visible blocks. */
static void score_uniform(void) {
    for (int r = 0; r < test_rounds(20); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_score(&x, PSA_SCORE_SAMPLE);
        if (!setup_init(&s, &desc, &x))
            continue;
        for (int64_t i = 0; i < x.B * x.Hq * x.Nq; i++)
            tensor_set(&s.q, 0, i % x.Nq, i / x.Nq % x.Hq, i / x.Nq / x.Hq, NAN);
        run_score(&s, 1);
        CHECK_SCORES(&s);
        setup_free(&s);
    }
}

const test_case tests_score[] = {
    {"score/sample", score_sample},
    {"score/sample_all", score_sample_all},
    {"score/antidiagonal", score_antidiagonal},
    {"score/pooled", score_pooled},
    {"score/exact", score_exact},
    {"score/causal", score_causal},
    {"score/every_isa", score_every_isa},
    {"score/huge_logits", score_huge_logits},
    {"score/offsets", score_offsets},
    {"score/seeds", score_seeds},
    {"score/nan", score_nan},
    {"score/nan_other_heads", score_nan_other_heads},
    {"score/uniform", score_uniform},
    {NULL, NULL},
};
