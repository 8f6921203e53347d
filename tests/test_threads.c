/* test_threads.c - the same bits for any split, any order, any kind of threads; nothing shared, nothing left behind. */
#include <pthread.h>

#include "test.h"

typedef struct bits {
    float *scores, *lse;
    uint8_t *levels;
    double *out;
    int64_t mul_adds;
} bits;

static bits take_bits(const setup *s) {
    size_t map = psa_map_size(&s->plan);
    bits b;
    b.scores = (float *)xmalloc(map * sizeof(float)), b.lse = (float *)xmalloc(s->lse.size),
    b.levels = (uint8_t *)xmalloc(map);
    memcpy(b.scores, setup_scores(s), map * sizeof(float));
    memcpy(b.lse, setup_lse(s), s->lse.size);
    memcpy(b.levels, setup_levels(s), map);
    b.out = tensor_values(&s->out.t);
    b.mul_adds = psa_mul_adds(&s->plan, guarded_data(&s->work));
    return b;
}

static void free_bits(bits *b) { free(b->scores), free(b->lse), free(b->levels), free(b->out); }

static void check_bits(const setup *s, const bits *want, int nth) {
    bits got = take_bits(s);
    size_t map = psa_map_size(&s->plan);
    CHECK(!memcmp(got.scores, want->scores, map * sizeof(float)), "scores differ with %d threads", nth);
    CHECK(!memcmp(got.levels, want->levels, map), "levels differ with %d threads", nth);
    CHECK(!memcmp(got.out, want->out, (size_t)tensor_count(&s->out.t) * sizeof(double)), "out differs with %d threads",
          nth);
    CHECK(!memcmp(got.lse, want->lse, s->lse.size), "lse differs with %d threads", nth);
    CHECK(got.mul_adds == want->mul_adds, "%.0f multiply-adds with %d threads, %.0f with one", (double)got.mul_adds,
          nth, (double)want->mul_adds);
    CHECK_GUARDS(s);
    free_bits(&got);
}

static psa_desc desc_any(const shape *x) {
    psa_desc d = desc_random_blocks(x);
    d.score = (psa_score_kind)rnd_int(0, 3);
    d.block_q = 16 * rnd_int(1, 3);
    d.n_sim_min = rnd_chance(50) ? 2 : 0;
    d.skip_mean = rnd_chance(30);
    if (!d.causal && rnd_chance(50))
        desc_random_recipe(&d);
    d.mask = d.mask == PSA_MASK_DENSE ? PSA_MASK_TOPK : d.mask;
    return d;
}

static void run_stages(setup *s, int nth) { run_levels(s, nth), run_attend(s, setup_levels(s), nth); }

static void poison_everything(setup *s) {
    setup_poison_outputs(s);
    memset(guarded_data(&s->work), 0xff, s->work.size);
    memset(guarded_data(&s->scores), 0xff, s->scores.size);
    memset(guarded_data(&s->levels), 0xff, s->levels.size);
}

/* Every nth from 1 to 7, the shares done one after the other. */
static void threads_splits(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        bits one;
        shape x = shape_random();
        psa_desc desc = desc_any(&x);
        if (!setup_init(&s, &desc, &x))
            continue;
        run_stages(&s, 1);
        one = take_bits(&s);
        for (int nth = 2; nth <= 7; nth++) {
            poison_everything(&s);
            run_stages(&s, nth);
            check_bits(&s, &one, nth);
        }
        free_bits(&one);
        setup_free(&s);
    }
}

/* ---- real threads ---- */

enum { PREPARE, POOL, SCORE, BUDGET, MASK, ATTEND, STAGES };

typedef struct job {
    setup *s;
    int stage, ith, nth;
    psa_result result;
} job;

static void *run_job(void *argument) {
    job *j = (job *)argument;
    setup *s = j->s;
    void *work = guarded_data(&s->work);
    if (j->stage == PREPARE)
        j->result = psa_prepare(&s->plan, s->q.t.data, s->k.t.data, work, j->ith, j->nth);
    else if (j->stage == POOL)
        j->result = psa_pool(&s->plan, s->k.t.data, s->v.t.data, work, j->ith, j->nth);
    else if (j->stage == SCORE)
        j->result = psa_score(&s->plan, s->q.t.data, s->k.t.data, work, setup_scores(s), j->ith, j->nth);
    else if (j->stage == BUDGET)
        j->result = psa_budget(&s->plan, setup_scores(s), work, j->ith, j->nth);
    else if (j->stage == MASK)
        j->result = psa_mask(&s->plan, setup_scores(s), work, setup_levels(s), j->ith, j->nth);
    else
        j->result = psa_attend(&s->plan, s->q.t.data, s->k.t.data, s->v.t.data, setup_levels(s), work, s->out.t.data,
                               setup_lse(s), j->ith, j->nth);
    return NULL;
}

/* Each stage on nth threads at the same time; joining them is the barrier. */
static void threads_real(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        bits one;
        shape x = shape_random();
        psa_desc desc = desc_any(&x);
        int nth = rnd_int(2, 7);
        if (!setup_init(&s, &desc, &x))
            continue;
        run_stages(&s, 1);
        one = take_bits(&s);
        poison_everything(&s);
        for (int stage = PREPARE; stage < STAGES; stage++) {
            pthread_t thread[7];
            job jobs[7];
            for (int i = 0; i < nth; i++) {
                job j = {&s, stage, i, nth, PSA_ERR_THREADS};
                jobs[i] = j;
                if (pthread_create(&thread[i], NULL, run_job, &jobs[i]) != 0)
                    exit(2);
            }
            for (int i = 0; i < nth; i++) {
                pthread_join(thread[i], NULL);
                CHECK_RESULT(jobs[i].result, PSA_OK);
            }
        }
        check_bits(&s, &one, nth);
        free_bits(&one);
        setup_free(&s);
    }
}

/* A plan is a plain value: a copy works when the original, the desc and the tensors' descriptions are gone. */
static void threads_plan_copy(void) {
    for (int r = 0; r < test_rounds(10); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_any(&x);
        if (!setup_init(&s, &desc, &x))
            continue;
        run_stages(&s, 1);
        bits one = take_bits(&s);
        psa_plan *copy = (psa_plan *)xmalloc(sizeof *copy);
        memcpy(copy, &s.plan, sizeof *copy);
        memset(&s.plan, 0xff, sizeof s.plan), memset(&desc, 0xff, sizeof desc), memset(&s.desc, 0xff, sizeof s.desc);
        poison_everything(&s);
        void *work = guarded_data(&s.work);
        CHECK_RESULT(psa_prepare(copy, s.q.t.data, s.k.t.data, work, 0, 1), PSA_OK);
        CHECK_RESULT(psa_pool(copy, s.k.t.data, s.v.t.data, work, 0, 1), PSA_OK);
        CHECK_RESULT(psa_score(copy, s.q.t.data, s.k.t.data, work, setup_scores(&s), 0, 1), PSA_OK);
        CHECK_RESULT(psa_budget(copy, setup_scores(&s), work, 0, 1), PSA_OK);
        CHECK_RESULT(psa_mask(copy, setup_scores(&s), work, setup_levels(&s), 0, 1), PSA_OK);
        CHECK_RESULT(psa_attend(copy, s.q.t.data, s.k.t.data, s.v.t.data, setup_levels(&s), work, s.out.t.data,
                                setup_lse(&s), 0, 1),
                     PSA_OK);
        s.plan = *copy;
        check_bits(&s, &one, 1);
        free(copy);
        free_bits(&one);
        setup_free(&s);
    }
}

/* ---- the hook ---- */

typedef struct hook {
    int calls, backwards, most;
} hook;

static void one_after_the_other(void *user, int nth, psa_task_fn *task, void *ctx) {
    hook *h = (hook *)user;
    h->calls++;
    h->most = nth > h->most ? nth : h->most;
    for (int i = 0; i < nth; i++)
        task(ctx, h->backwards ? nth - 1 - i : i, nth);
}

static void threads_parallel_fn(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        psa_extra extra;
        shape x = shape_random();
        psa_desc desc = desc_any(&x);
        desc.n_threads = 1;
        if (!setup_init(&s, &desc, &x))
            continue;
        memset(&extra, 0, sizeof extra);
        extra.lse = setup_lse(&s), extra.scores = setup_scores(&s), extra.levels = setup_levels(&s);
        memset(guarded_data(&s.work), 0, s.work.size); /* psa_attention has its own: nothing is counted in this one */
        CHECK_RESULT(psa_attention(&desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, &extra), PSA_OK);
        bits one = take_bits(&s);
        for (int way = 0; way < 3; way++) {
            hook h = {0, way == 1, 0};
            memset(guarded_data(&s.scores), 0xff, s.scores.size), memset(guarded_data(&s.levels), 0xff, s.levels.size);
            setup_poison_outputs(&s);
            desc.n_threads = rnd_int(2, 7);
            desc.parallel_fn = way < 2 ? one_after_the_other : NULL; /* the third way: threads of its own */
            desc.parallel_user = &h;
            CHECK_RESULT(psa_attention(&desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, &extra), PSA_OK);
            check_bits(&s, &one, desc.n_threads);
            CHECK(way == 2 || (h.calls > 0 && h.most <= desc.n_threads), "%d calls, %d threads of %d", h.calls, h.most,
                  desc.n_threads);
        }
        free_bits(&one);
        setup_free(&s);
    }
}

/* ---- several callers at once ---- */

typedef struct caller {
    const setup *s;
    tensor out;
    psa_result result;
} caller;

static void *call_attention(void *argument) {
    caller *c = (caller *)argument;
    c->result = psa_attention(&c->s->desc, &c->s->q.t, &c->s->k.t, &c->s->v.t, &c->out.t, NULL);
    return NULL;
}

static void threads_callers(void) {
    for (int r = 0; r < test_rounds(20); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_any(&x);
        desc.n_threads = 2;
        desc.isa = PSA_ISA_AUTO;
        if (!setup_init(&s, &desc, &x))
            continue;
        pthread_t thread[4];
        caller callers[4];
        for (int i = 0; i < 4; i++) {
            callers[i].s = &s;
            callers[i].out = tensor_output(x.type_out, LAYOUT_PLAIN, x.Dv, x.Nq, x.Hq, x.B);
            if (pthread_create(&thread[i], NULL, call_attention, &callers[i]) != 0)
                exit(2);
        }
        for (int i = 0; i < 4; i++) {
            pthread_join(thread[i], NULL);
            CHECK_RESULT(callers[i].result, PSA_OK);
            CHECK(!memcmp(callers[i].out.memory, callers[0].out.memory, callers[0].out.size),
                  "caller %d got something else", i);
        }
        for (int i = 0; i < 4; i++)
            tensor_free(&callers[i].out);
        setup_free(&s);
    }
}

/* ---- the caller's floating point ---- */

/* Denormals still exist: the stages leave the processor's mode as it was. */
static int denormals_live(void) {
    volatile float smallest_normal = 1.17549435e-38f, small;
    small = smallest_normal / 16;
    return small * 16 == smallest_normal;
}

static void threads_float_mode(void) {
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
        setup s;
        psa_desc desc;
        shape x;
        memset(&desc, 0, sizeof desc);
        memset(&x, 0, sizeof x);
        x.B = 1, x.Hq = x.Hkv = 1, x.Nq = x.Nk = 200, x.D = x.Dv = 16;
        desc.isa = (psa_isa)isa;
        if (!psa_isa_supported(desc.isa) || !setup_init(&s, &desc, &x))
            continue;
        CHECK(denormals_live(), "before everything");
        run_pool(&s, 1);
        CHECK(denormals_live(), "after psa_pool, %s", psa_isa_name(desc.isa));
        run_score(&s, 1);
        CHECK(denormals_live(), "after psa_score, %s", psa_isa_name(desc.isa));
        run_mask(&s, 1);
        CHECK(denormals_live(), "after psa_mask, %s", psa_isa_name(desc.isa));
        run_attend(&s, setup_levels(&s), 1);
        CHECK(denormals_live(), "after psa_attend, %s", psa_isa_name(desc.isa));
        CHECK_RESULT(psa_attention(&desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, NULL), PSA_OK);
        CHECK(denormals_live(), "after psa_attention, %s", psa_isa_name(desc.isa));
        setup_free(&s);
    }
}

const test_case tests_threads[] = {
    {"threads/splits", threads_splits},
    {"threads/real", threads_real},
    {"threads/parallel_fn", threads_parallel_fn},
    {"threads/plan_copy", threads_plan_copy},
    {"threads/callers", threads_callers},
    {"threads/float_mode", threads_float_mode},
    {NULL, NULL},
};
