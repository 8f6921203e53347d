/* test_mask.c - from scores to levels. Levels are integers: every comparison is exact. */
#include <limits.h>

#include "test.h"

/* ---- by hand: what the definition says about one row, worked out on paper ---- */

enum { TOPK = PSA_MASK_TOPK, MASS = PSA_MASK_THRESHOLD, DENSE = PSA_MASK_DENSE };

typedef struct row_case {
    const char *what;
    int mask, inclusive;
    double min_full;
    double level_end[3];
    int level_count[4];
    int n;
    float score[10];
    uint8_t level[10];
} row_case;

static const row_case rows[] = {
    {"shares", TOPK, 0, 0, {.25, .5, .75}, {0}, 4, {.1f, .4f, .3f, .2f}, {0, 1, 2, 4}},
    {"shares round down", TOPK, 0, 0, {.35, .7}, {0}, 4, {.4f, .3f, .2f, .1f}, {1, 2, 0, 0}},
    {"ties go to the lower index", TOPK, 0, 0, {.5}, {0}, 4, {.25f, .25f, .25f, .25f}, {1, 1, 0, 0}},
    {"never nobody", TOPK, 0, 0, {.1}, {0}, 4, {.1f, .2f, .4f, .3f}, {0, 0, 1, 0}},
    {"never nobody at the finest level", TOPK, 0, 0, {.1, .5}, {0}, 4, {.1f, .2f, .4f, .3f}, {0, 0, 1, 2}},
    {"finest level 2", TOPK, 0, 0, {0, .1, 1}, {0}, 4, {.1f, .2f, .4f, .3f}, {4, 4, 2, 4}},
    {"0.7 of 10 is 7, as doubles multiply", TOPK, 0, 0, {.7}, {0}, 10,
     {.1f, .1f, .1f, .1f, .1f, .1f, .1f, .1f, .1f, .1f}, {1, 1, 1, 1, 1, 1, 1, 0, 0, 0}},
    {"counts are per level", TOPK, 0, 0, {0}, {1, 2, 0, 3}, 8,
     {.1f, .2f, .3f, .05f, .15f, .08f, .07f, .05f}, {8, 2, 1, 0, 2, 8, 8, 0}},
    {"counts beyond the row", TOPK, 0, 0, {0}, {1, INT_MAX, INT_MAX, 0}, 3, {.2f, .5f, .3f}, {2, 1, 2}},
    {"counts beside shares", TOPK, 0, 0, {1, 1}, {0, 1, 0, 0}, 3, {.2f, .5f, .3f}, {0, 2, 0}},
    {"mass ahead", MASS, 0, 0, {.4, .7, .9}, {0}, 5, {.3f, .3f, .2f, .15f, .05f}, {1, 1, 2, 4, 0}},
    {"crossing keeps the finer level", MASS, 0, 0, {.2}, {0}, 3, {.9f, .06f, .04f}, {1, 0, 0}},
    {"a bound met exactly is kept", MASS, 0, 0, {.5}, {0}, 3, {.5f, .25f, .25f}, {1, 1, 0}},
    {"floor of level 1", MASS, 0, .5, {.1, .2}, {0}, 4, {.7f, .1f, .15f, .05f}, {1, 1, 1, 0}},
    {"own mass", MASS, 1, 0, {.4, .7, .9}, {0}, 5, {.3f, .3f, .2f, .15f, .05f}, {1, 2, 4, 0, 0}},
    {"own mass, the top block stays", MASS, 1, 0, {.4, .7}, {0}, 3, {.8f, .1f, .1f}, {1, 0, 0}},
    {"own mass, the top block is not made coarser", MASS, 1, 0, {.4, .9}, {0}, 3, {.8f, .1f, .1f}, {1, 2, 0}},
    {"dense", DENSE, 0, 0, {0}, {0}, 3, {.8f, .1f, .1f}, {1, 1, 1}},
};

static void mask_by_hand(void) {
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const row_case *row = rows + i;
        psa_desc desc;
        psa_plan plan;
        uint8_t got[10], expected[10];
        oracle o;
        memset(&desc, 0, sizeof desc);
        desc.block_q = desc.block_k = 16;
        desc.mask = (psa_mask_kind)row->mask, desc.inclusive = row->inclusive, desc.min_full = row->min_full;
        memcpy(desc.level_end, row->level_end, sizeof row->level_end);
        memcpy(desc.level_count, row->level_count, sizeof row->level_count);
        psa_tensor q = psa_tensor_4d(NULL, PSA_F32, 8, 3, 1, 1), k = psa_tensor_4d(NULL, PSA_F32, 8, 16 * row->n, 1, 1);
        if (!CHECK_RESULT(psa_plan_init(&plan, &desc, &q, &k, NULL, NULL), PSA_OK))
            continue;
        void *work = xmalloc(psa_work_size(&plan));
        CHECK_RESULT(psa_mask(&plan, row->score, work, got, 0, 1), PSA_OK);
        oracle_init(&o, &desc, 1, 1, 1, 3, 16 * row->n, 8, 0, NULL, NULL, NULL);
        oracle_mask(&o, row->score, expected);
        for (int J = 0; J < row->n; J++) {
            CHECK(got[J] == row->level[J], "%s: block %d is %d, expected %d", row->what, J, got[J], row->level[J]);
            CHECK(expected[J] == row->level[J], "oracle, %s: block %d is %d, expected %d", row->what, J, expected[J],
                  row->level[J]);
        }
        free(work);
    }
}

/* ---- random ---- */

/* Rising shares; some levels empty, some rows of levels left unused at either end. */
static void random_level_end(psa_desc *d) {
    double end = 0;
    int most = 1;
    while (1 << most <= d->block_k)
        most++;
    int n = rnd_int(1, most);
    for (int i = 0; i < n; i++) {
        if (i == n - 1 || rnd_chance(70))
            end += (1 - end) * rnd_uniform() * .5 + 1e-3;
        d->level_end[i] = end;
    }
}

static void random_method(psa_desc *d) {
    d->mask = rnd_chance(50) ? PSA_MASK_TOPK : PSA_MASK_THRESHOLD;
    d->inclusive = rnd_chance(40);
    d->min_full = rnd_chance(40) ? rnd_uniform() * .3 : 0;
    if (rnd_chance(80))
        random_level_end(d);
    if (d->mask == PSA_MASK_TOPK && rnd_chance(30))
        for (int i = 0; 1 << i <= d->block_k; i++)
            d->level_count[i] = rnd_chance(60) ? rnd_int(0, 4) : 0;
}

static void random_extras(psa_desc *d, const shape *x) {
    if (rnd_chance(50))
        d->n_prefix = rnd_int(0, rnd_chance(90) ? 50 : (int)x->Nk + 20);
    if (rnd_chance(50))
        d->n_suffix = rnd_int(0, rnd_chance(90) ? 50 : (int)x->Nk + 20);
    d->sink = rnd_chance(30), d->diagonal = rnd_chance(30), d->skip_mean = rnd_chance(30);
    if (rnd_chance(50)) {
        int most = 1;
        while (2 << most <= d->block_k)
            most++;
        d->n_sim_min = rnd_int(1, most);
        for (int i = 0; i < d->n_sim_min; i++)
            d->sim_min[i] = rnd_uniform() * 1.2 - .2;
    }
}

/* Neighbouring keys resemble each other, more in some heads than in others; some are zero. */
static void correlate_keys(setup *s) {
    for (int64_t row = 0; row < s->o.B * s->o.Hkv; row++) {
        double carry = rnd_uniform();
        for (int64_t n = 1; n < s->o.Nk; n++)
            for (int64_t d = 0; d < s->o.D; d++) {
                int64_t at = (row * s->o.Nk + n) * s->o.D + d;
                tensor_set(&s->k, d, n, row % s->o.Hkv, row / s->o.Hkv,
                           carry * s->k.x[at - s->o.D] + (1 - carry) * s->k.x[at]);
            }
        if (rnd_chance(50))
            for (int64_t d = 0, n = rnd_int(0, (int)s->o.Nk - 1); d < s->o.D; d++)
                tensor_set(&s->k, d, n, row % s->o.Hkv, row / s->o.Hkv, 0);
    }
}

/* Rows that sum to 1 over what is visible, as psa_score makes them: sharp, flat, or with many ties. */
static void random_scores(setup *s) {
    double sharpness = 4 * rnd_uniform();
    int ties = rnd_chance(40);
    for (int64_t row = 0; row < s->o.B * s->o.Hq * s->o.nq; row++) {
        float *score = setup_scores(s) + row * s->o.nk;
        double sum = 0;
        for (int64_t J = 0; J < s->o.nk; J++) {
            double x = ties ? rnd_int(J > 0 ? 0 : 1, 3) : exp(sharpness * rnd_normal());
            score[J] = oracle_pair(&s->o, row % s->o.nq, J) == HIDDEN ? 0 : (float)x;
            sum += (double)score[J];
        }
        for (int64_t J = 0; J < s->o.nk; J++)
            score[J] = sum > 0 ? (float)((double)score[J] / sum) : 0;
    }
}

static void check_levels(setup *s) {
    size_t map = psa_map_size(&s->plan), wrong = 0, first = 0;
    uint8_t *want = (uint8_t *)xmalloc(map);
    oracle_mask(&s->o, setup_scores(s), want);
    for (size_t i = map; i-- > 0;)
        if (setup_levels(s)[i] != want[i])
            wrong++, first = i;
    CHECK(wrong == 0, "%d of %d levels differ; head %d, query block %d, KV block %d: %d, expected %d", (int)wrong,
          (int)map, (int)(first / (size_t)(s->o.nq * s->o.nk)), (int)(first / (size_t)s->o.nk % (size_t)s->o.nq),
          (int)(first % (size_t)s->o.nk), setup_levels(s)[first], want[first]);
    CHECK_GUARDS(s);
    free(want);
}

static void mask_case(const psa_desc *desc, const shape *x) {
    setup s;
    if (!setup_init(&s, desc, x))
        return;
    correlate_keys(&s);
    random_scores(&s);
    run_pool(&s, rnd_int(1, 3));
    run_mask(&s, rnd_int(1, 3));
    check_levels(&s);
    run_attend(&s, setup_levels(&s), 1); /* whatever a mask holds, the same plan can read */
    CHECK_ATTENTION(&s, setup_levels(&s));
    setup_free(&s);
}

static shape shape_mask(void) {
    shape x = shape_random();
    x.D = x.Dv = 8;
    x.Nk = rnd_chance(30) ? rnd_int(1, 60) : rnd_int(1, 600);
    return x;
}

static void mask_plain(void) {
    for (int r = 0; r < test_rounds(300); r++) {
        rnd_round(r);
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        random_method(&desc);
        mask_case(&desc, &x);
    }
}

static void mask_everything(void) {
    for (int r = 0; r < test_rounds(500); r++) {
        rnd_round(r);
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        random_method(&desc);
        random_extras(&desc, &x);
        mask_case(&desc, &x);
    }
}

static void mask_causal(void) {
    for (int r = 0; r < test_rounds(200); r++) {
        rnd_round(r);
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        desc.causal = 1;
        desc.block_q = rnd_int(16, 64);
        x.Nk = rnd_chance(40) ? x.Nq : x.Nk;
        random_method(&desc);
        random_extras(&desc, &x);
        mask_case(&desc, &x);
    }
}

/* The own blocks of a query block: also where queries go on behind the last key, and none of them is its own. */
static void mask_diagonal(void) {
    for (int r = 0; r < test_rounds(100); r++) {
        rnd_round(r);
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        desc.diagonal = 1;
        desc.causal = rnd_chance(30);
        desc.block_q = rnd_int(16, 40);
        x.Nk = rnd_int(1, (int)x.Nq + 50);
        mask_case(&desc, &x);
    }
}

/* A dense plan needs no scores; protection, caps and skip_mean change nothing in it. */
static void mask_dense(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        random_extras(&desc, &x);
        desc.mask = PSA_MASK_DENSE;
        if (!setup_init(&s, &desc, &x))
            continue;
        run_pool(&s, 1);
        CHECK_RESULT(psa_mask(&s.plan, NULL, guarded_data(&s.work), setup_levels(&s), 0, 1), PSA_OK);
        check_levels(&s);
        setup_free(&s);
    }
}

/* Everything is protected, by numbers that leave no room for sums. */
static void mask_protect_all(void) {
    for (int r = 0; r < test_rounds(20); r++) {
        rnd_round(r);
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        if (r % 2)
            desc.n_prefix = INT64_MAX;
        if (r % 3)
            desc.n_suffix = INT64_MAX;
        mask_case(&desc, &x);
    }
}

/* Scores that are not numbers: the levels are levels all the same, and other rows do not notice. */
static void mask_nan(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        random_method(&desc);
        if (!setup_init(&s, &desc, &x))
            continue;
        random_scores(&s);
        size_t nk = (size_t)s.plan.nk, map = psa_map_size(&s.plan), row = rnd_u64() % (map / nk) * nk;
        uint8_t *want = (uint8_t *)xmalloc(map);
        oracle_mask(&s.o, setup_scores(&s), want);
        for (size_t J = 0; J < nk; J++)
            if (rnd_chance(50))
                setup_scores(&s)[row + J] = rnd_chance(50) ? NAN : rnd_chance(50) ? INFINITY : -INFINITY;
        run_pool(&s, 1), run_mask(&s, 1);
        for (size_t i = 0; i < map; i++) {
            int level = setup_levels(&s)[i], valid = level <= desc.block_k && (level & (level - 1)) == 0;
            CHECK(i >= row && i < row + nk ? valid : level == want[i], "entry %d is %d", (int)i, level);
        }
        CHECK_GUARDS(&s);
        free(want);
        setup_free(&s);
    }
}

/* A plan without V scores and masks as one with it. */
static void mask_without_v(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        setup s;
        psa_plan plan;
        shape x = shape_mask();
        psa_desc desc = desc_random_blocks(&x);
        random_method(&desc);
        random_extras(&desc, &x);
        desc.score = (psa_score_kind)(r % 4);
        desc.block_q = 16 * rnd_int(1, 4);
        if (!setup_init(&s, &desc, &x))
            continue;
        run_pool(&s, 1), run_score(&s, 1), run_mask(&s, 1);
        if (CHECK_RESULT(psa_plan_init(&plan, &desc, &s.q.t, &s.k.t, NULL, NULL), PSA_OK)) {
            guarded work = guarded_new(psa_work_size(&plan), 3), levels = guarded_new(psa_map_size(&plan), 0);
            float *scores = (float *)xmalloc(psa_map_size(&plan) * sizeof *scores);
            uint8_t *at = (uint8_t *)guarded_data(&levels);
            CHECK_RESULT(psa_pool(&plan, s.k.t.data, NULL, guarded_data(&work), 0, 1), PSA_OK);
            CHECK_RESULT(psa_score(&plan, s.q.t.data, s.k.t.data, guarded_data(&work), scores, 0, 1), PSA_OK);
            CHECK_RESULT(psa_mask(&plan, scores, guarded_data(&work), at, 0, 1), PSA_OK);
            CHECK(!memcmp(scores, setup_scores(&s), psa_map_size(&plan) * sizeof *scores), "scores differ");
            CHECK(!memcmp(at, setup_levels(&s), psa_map_size(&plan)), "levels differ");
            CHECK(guarded_intact(&work) && guarded_intact(&levels), "guard bytes were written");
            guarded_free(&work), guarded_free(&levels);
            free(scores);
        }
        setup_free(&s);
    }
}

const test_case tests_mask[] = {
    {"mask/by_hand", mask_by_hand},
    {"mask/plain", mask_plain},
    {"mask/everything", mask_everything},
    {"mask/causal", mask_causal},
    {"mask/diagonal", mask_diagonal},
    {"mask/dense", mask_dense},
    {"mask/protect_all", mask_protect_all},
    {"mask/nan", mask_nan},
    {"mask/without_v", mask_without_v},
    {NULL, NULL},
};
