/* test_tree.c - orders found by trees: permutations whatever the tokens are, blocks that are tight, attention through
 * them. */
#include "test.h"

/* The order that psa_prepare found, as one that a caller might give; NULL where the tree leaves the tokens alone. */
static psa_order tree_order(const setup *s, int keys) {
    psa_order order = {NULL, keys ? s->o.Nk : s->o.Nq, keys ? s->o.Nk * s->o.Hkv : s->o.Nq * s->o.Hq};
    order.index = psa_tree_order(&s->plan, guarded_data(&s->work), keys, 0, 0);
    for (int64_t b = 0; b < s->o.B && order.index; b++)
        for (int64_t h = 0; h < (keys ? s->o.Hkv : s->o.Hq); h++)
            CHECK(psa_tree_order(&s->plan, guarded_data(&s->work), keys, b, h) ==
                      order.index + b * order.stride_b + h * order.stride_h,
                  "the order of batch %d, head %d is elsewhere", (int)b, (int)h);
    return order;
}

static size_t order_size(const setup *s, int keys) {
    return (size_t)(s->o.B * (keys ? s->o.Hkv * s->o.Nk : s->o.Hq * s->o.Nq)) * sizeof(int32_t);
}

static psa_desc desc_tree(const shape *x) {
    psa_desc d = desc_random_blocks(x);
    d.causal = 0;
    d.tree = (psa_tree_kind)rnd_int(PSA_TREE_KV, PSA_TREE_QKV);
    d.metric = (psa_metric_kind)rnd_int(PSA_METRIC_LOGIT, PSA_METRIC_EUCLID);
    return d;
}

/* ---- what an order is ---- */

enum { BAD, LONG, GOOD }; /* LONG: finite, but not its square in f32, so that it counts as either */

static int kind_of_row(const tensor *t, const double *x) {
    double sum = 0;
    for (int64_t d = 0; d < t->t.ne[0]; d++)
        sum += x[d] * x[d];
    return sum <= 3e38 ? GOOD : isfinite(sum) ? LONG : BAD;
}

/* Text in place, then the finite tokens in any order, then the others by index. */
static void check_head(const setup *s, const tensor *t, int64_t head, const int32_t *index) {
    int64_t N = t->t.ne[1], last = -1, moved = 0;
    int64_t first = s->desc.n_prefix < N ? s->desc.n_prefix : N;
    int64_t end = N - s->desc.n_suffix > first ? N - s->desc.n_suffix : first;
    if (!CHECK(is_permutation(index, N), "head %d of %d tokens: no permutation", (int)head, (int)N))
        return;
    for (int64_t p = 0; p < N; p++)
        moved += (p < first || p >= end) && index[p] != p;
    CHECK(moved == 0, "%d of the text tokens moved", (int)moved);
    for (int64_t p = first; p < end; p++) {
        int kind = kind_of_row(t, t->x + (head * N + index[p]) * t->t.ne[0]);
        if (kind == LONG && last < 0)
            continue;
        CHECK(kind == GOOD ? last < 0 : index[p] > last, "head %d: token %d is at %d", (int)head, index[p], (int)p);
        last = kind == GOOD ? last : index[p];
    }
}

static void check_orders(const setup *s) {
    for (int keys = 0; keys < 2; keys++) {
        psa_order order = tree_order(s, keys);
        const tensor *t = keys ? &s->k : &s->q;
        if (!CHECK((order.index != NULL) == (keys || s->desc.tree == PSA_TREE_QKV), "keys %d: no order", keys))
            continue;
        for (int64_t head = 0; order.index && head < t->t.ne[2] * t->t.ne[3]; head++)
            check_head(s, t, head, order.index + head * t->t.ne[1]);
    }
    CHECK(guarded_intact(&s->work), "guard bytes were written");
}

/* Tokens of the kinds that models, padding and accidents make. */
static void odd_tokens(tensor *t, int kind) {
    for (int64_t i = 0; i < t->t.ne[1] * t->t.ne[2] * t->t.ne[3]; i++) {
        int64_t n = i % t->t.ne[1], h = i / t->t.ne[1] % t->t.ne[2], b = i / t->t.ne[1] / t->t.ne[2];
        int bad = kind == 6 && rnd_chance(10), which = rnd_int(0, 3);
        for (int64_t d = 0; d < t->t.ne[0]; d++) {
            double x = t->x[i * t->t.ne[0] + d];
            x = kind == 1   ? 0
                : kind == 2 ? 3 + (double)d
                : kind == 3 ? (double)((n * 7 % 3) * (d + 1)) /* three different tokens */
                : kind == 4 ? x * 2e17
                : kind == 5 ? x * 1e-30
                : kind == 7 ? (rnd_chance(3) ? copysign(1e20, x) : x * pow(10, 43 * rnd_uniform() - 25))
                            : x; /* 1e20: finite, but too long for its square */
            if (bad && d == i % t->t.ne[0])
                x = which == 0 ? NAN : which == 1 ? INFINITY : which == 2 ? -INFINITY : 3e38;
            tensor_set(t, d, n, h, b, x);
        }
    }
}

static void tree_permutation(void) {
    static const int sizes[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 63, 64, 100, 127, 129, 200, 255, 257, 300};
    for (int r = 0; r < test_rounds(400); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        x.Nq = sizes[rnd_int(0, 17)], x.Nk = sizes[rnd_int(0, 17)];
        psa_desc desc = desc_tree(&x);
        if (rnd_chance(40))
            desc.n_prefix = rnd_int(0, 60), desc.n_suffix = rnd_int(0, 60);
        if (!setup_init(&s, &desc, &x))
            continue;
        odd_tokens(&s.q, rnd_chance(50) ? r % 8 : 0), odd_tokens(&s.k, r % 8);
        run_prepare(&s, 1);
        check_orders(&s);
        setup_free(&s);
    }
}

/* The orders do not depend on how the heads are split over threads, nor on what was in the workspace. */
static void tree_splits(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_tree(&x);
        if (!setup_init(&s, &desc, &x))
            continue;
        int32_t *first[2];
        for (int nth = 1; nth <= 7; nth++) {
            memset(guarded_data(&s.work), nth, s.work.size);
            run_prepare(&s, nth);
            for (int keys = 0; keys < 2; keys++) {
                psa_order order = tree_order(&s, keys);
                if (!order.index)
                    continue;
                if (nth == 1)
                    first[keys] = (int32_t *)xmalloc(order_size(&s, keys));
                if (nth == 1)
                    memcpy(first[keys], order.index, order_size(&s, keys));
                CHECK(!memcmp(first[keys], order.index, order_size(&s, keys)), "another split, another order");
            }
        }
        free(first[1]);
        if (desc.tree == PSA_TREE_QKV)
            free(first[0]);
        setup_free(&s);
    }
}

/* Long sequences of every instruction set: the parts of a tree that gather, sample and bisect. */
static void tree_long(void) {
    static const int sizes[] = {4096, 4097, 5000, 1023, 1025};
    for (int r = 0; r < test_rounds(10); r++)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
            setup s;
            shape x;
            if (!psa_isa_supported((psa_isa)isa))
                continue;
            rnd_round(r);
            memset(&x, 0, sizeof x);
            x.B = x.Hq = x.Hkv = 1, x.Nq = sizes[r % 5], x.Nk = sizes[(r + 2) % 5];
            x.D = x.Dv = 8 * rnd_int(1, 8);
            x.type_q = (psa_type)rnd_int(0, 2), x.type_kv = (psa_type)rnd_int(0, 2), x.layout = LAYOUT_RANDOM;
            psa_desc desc = desc_tree(&x);
            desc.isa = (psa_isa)isa;
            desc.n_prefix = r % 2 ? 77 : 0, desc.n_suffix = r % 2 ? 30 : 0;
            if (!setup_init(&s, &desc, &x))
                continue;
            odd_tokens(&s.k, r % 8);
            run_prepare(&s, 1);
            check_orders(&s);
            setup_free(&s);
        }
}

/* Equal heads have equal orders, whatever KV head or batch they are; heads that differ have their own. */
static void tree_heads(void) {
    for (int r = 0; r < test_rounds(30); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        x.Hkv = 2, x.Hq = 4, x.B = 2, x.Nq = x.Nk = rnd_int(40, 200), x.layout = LAYOUT_PLAIN;
        psa_desc desc = desc_tree(&x);
        desc.tree = PSA_TREE_QKV;
        if (!setup_init(&s, &desc, &x))
            continue;
        run_prepare(&s, 2);
        psa_order k = tree_order(&s, 1);
        CHECK(memcmp(k.index, k.index + x.Nk, (size_t)x.Nk * sizeof *k.index), "two heads have the same order");
        s.q.t.nb[2] = s.q.t.nb[3] = s.k.t.nb[2] = s.k.t.nb[3] = 0;
        if (CHECK_RESULT(psa_plan_init(&s.plan, &desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t), PSA_OK)) {
            run_prepare(&s, 3);
            for (int keys = 0; keys < 2; keys++) {
                psa_order order = tree_order(&s, keys);
                for (int64_t head = 1; head < (keys ? 4 : 8); head++)
                    CHECK(!memcmp(order.index, order.index + head * x.Nk, (size_t)x.Nk * sizeof *order.index),
                          "head %d of equal heads has an order of its own", (int)head);
            }
        }
        setup_free(&s);
    }
}

/* ---- blocks are tight ---- */

/* Sum over groups of L tokens in this order of the squared distances to their mean, weighted: sum_d m_d x_d^2; m NULL:
 * all 1. */
static double looseness(const double *x, const int32_t *index, int64_t N, int64_t D, const double *m, int64_t L) {
    double sum = 0;
    for (int64_t t = 0; t < N; t += L)
        for (int64_t d = 0; d < D; d++) {
            double mean = 0, square = 0, n = 0;
            for (int64_t p = t; p < t + L && p < N; p++, n++) {
                double value = x[(index ? index[p] : p) * D + d];
                mean += value, square += value * value;
            }
            sum += (m ? m[d] : 1) * (square - mean * mean / n);
        }
    return sum;
}

/* Tokens around a few centres that lie in all directions, drawn in any order. */
static void cluster_tokens(tensor *t, int clusters, double apart) {
    int64_t D = t->t.ne[0], N = t->t.ne[1];
    double *centre = (double *)xmalloc((size_t)(clusters * D) * sizeof *centre);
    for (int64_t i = 0; i < clusters * D; i++)
        centre[i] = apart * rnd_normal();
    for (int64_t n = 0; n < N; n++)
        for (int64_t d = 0, c = rnd_int(0, clusters - 1); d < D; d++)
            tensor_set(t, d, n, 0, 0, centre[c * D + d] + rnd_normal());
    free(centre);
}

static shape shape_one_head(void) {
    shape x = shape_random();
    x.B = x.Hq = x.Hkv = 1;
    x.type_q = x.type_kv = x.type_out = PSA_F32;
    x.Nq = rnd_int(500, 1500), x.Nk = rnd_int(500, 1500), x.D = x.Dv = 8 * rnd_int(2, 8);
    return x;
}

/* Clusters larger than a block: inside a block hardly more than the noise is left, in groups of 8 too. */
static void tree_tight(void) {
    for (int r = 0; r < test_rounds(30); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_one_head();
        psa_desc desc = desc_tree(&x);
        desc.tree = PSA_TREE_QKV, desc.block_k = 64;
        if (!setup_init(&s, &desc, &x))
            continue;
        cluster_tokens(&s.q, 6, 3), cluster_tokens(&s.k, 6, 3);
        run_prepare(&s, 1);
        for (int keys = 0; keys < 2; keys++)
            for (int L = 8; L <= 64; L *= 8) {
                const tensor *t = keys ? &s.k : &s.q;
                double before = looseness(t->x, NULL, t->t.ne[1], x.D, NULL, L);
                double after = looseness(t->x, tree_order(&s, keys).index, t->t.ne[1], x.D, NULL, L);
                CHECK(after < .5 * before, "keys %d, groups of %d: variance %g, before %g", keys, L, after, before);
            }
        setup_free(&s);
    }
}

typedef struct placed {
    double place;
    int32_t index;
} placed;

static int by_place(const void *a, const void *b) {
    const placed *x = (const placed *)a, *y = (const placed *)b;
    return x->place < y->place ? -1 : x->place > y->place;
}

/* Places of n tokens along their principal direction, found from all of them. */
static void principal_places(const double *x, int64_t D, placed *token, int64_t n) {
    double mean[PSA_MAX_D] = {0}, u[PSA_MAX_D], next[PSA_MAX_D], norm;
    for (int64_t i = 0; i < n * D; i++)
        mean[i % D] += x[token[i / D].index * D + i % D] / (double)n;
    for (int64_t d = 0; d < D; d++)
        u[d] = rnd_normal();
    for (int step = 0; step < 40; step++) {
        norm = 0;
        memset(next, 0, sizeof next);
        for (int64_t i = 0; i < n; i++) {
            const double *row = x + token[i].index * D;
            token[i].place = 0;
            for (int64_t d = 0; d < D; d++)
                token[i].place += u[d] * (row[d] - mean[d]);
            for (int64_t d = 0; d < D; d++)
                next[d] += token[i].place * (row[d] - mean[d]);
        }
        for (int64_t d = 0; d < D; d++)
            norm += next[d] * next[d];
        for (int64_t d = 0; d < D; d++)
            u[d] = norm > 0 ? next[d] / sqrt(norm) : 0;
    }
}

/* The tree of positions begin .. end-1 from exact directions; token: those at `begin`. */
static void exact_tree(const double *x, int64_t D, int64_t begin, int64_t end, placed *token) {
    int64_t step = 1;
    if (end - begin < 2)
        return;
    principal_places(x, D, token, end - begin);
    qsort(token, (size_t)(end - begin), sizeof *token, by_place);
    if (end - begin <= 16)
        return;
    while ((end - 1) / (2 * step) * (2 * step) > begin)
        step *= 2;
    int64_t cut = (end - 1) / step * step;
    exact_tree(x, D, begin, cut, token);
    exact_tree(x, D, cut, end, token + (cut - begin));
}

/* Sampled nodes, few power steps and moments by difference leave groups nearly as tight as exact directions do. */
static void tree_exact(void) {
    for (int r = 0; r < test_rounds(8); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_one_head();
        psa_desc desc = desc_tree(&x);
        x.Nk = rnd_int(500, 5000);
        desc.tree = PSA_TREE_KV, desc.metric = PSA_METRIC_EUCLID, desc.n_prefix = desc.n_suffix = 0;
        if (!setup_init(&s, &desc, &x))
            continue;
        placed *token = (placed *)xmalloc((size_t)x.Nk * sizeof *token);
        int32_t *index = (int32_t *)xmalloc((size_t)x.Nk * sizeof *index);
        for (int64_t i = 0; i < x.Nk * x.D; i++) /* elements that differ less and less */
            tensor_set(&s.k, i % x.D, i / x.D, 0, 0, rnd_normal() / (double)(1 + i % x.D));
        run_prepare(&s, 1);
        for (int64_t i = 0; i < x.Nk; i++)
            token[i].index = (int32_t)i;
        exact_tree(s.k.x, x.D, 0, x.Nk, token);
        for (int64_t i = 0; i < x.Nk; i++)
            index[i] = token[i].index;
        for (int L = 8; L <= 128; L *= 4) {
            double got = looseness(s.k.x, tree_order(&s, 1).index, x.Nk, x.D, NULL, L);
            double want = looseness(s.k.x, index, x.Nk, x.D, NULL, L);
            CHECK(got < 1.08 * want, "%d tokens, groups of %d: variance %g, with exact directions %g", (int)x.Nk, L,
                  got, want);
        }
        free(token), free(index);
        setup_free(&s);
    }
}

/* Queries that look at two elements only: the logit metric makes the logits of a block alike, Euclid's cannot know. */
static void tree_metric(void) {
    for (int r = 0; r < test_rounds(20); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_one_head();
        double m[PSA_MAX_D], after[2], before = 0;
        psa_desc desc = desc_tree(&x);
        desc.tree = PSA_TREE_KV, desc.block_k = 64;
        for (int metric = 0; metric < 2; metric++) {
            rnd_round(r);
            desc.metric = (psa_metric_kind)metric;
            if (!setup_init(&s, &desc, &x))
                return;
            for (int64_t i = 0; i < x.Nq * x.D; i++)
                tensor_set(&s.q, i % x.D, i / x.D, 0, 0, s.q.x[i] * (i % x.D == 1 || i % x.D == 5 ? 5 : .05));
            for (int64_t d = 0; d < x.D; d++) {
                m[d] = 0;
                for (int64_t n = 0; n < x.Nq; n++)
                    m[d] += s.q.x[n * x.D + d] * s.q.x[n * x.D + d] / (double)x.Nq;
            }
            run_prepare(&s, 1);
            before = looseness(s.k.x, NULL, x.Nk, x.D, m, 64);
            after[metric] = looseness(s.k.x, tree_order(&s, 1).index, x.Nk, x.D, m, 64);
            setup_free(&s);
        }
        CHECK(after[PSA_METRIC_LOGIT] < .3 * before, "variance of the logits %g, before %g", after[0], before);
        CHECK(after[PSA_METRIC_LOGIT] < .5 * after[PSA_METRIC_EUCLID], "variance of the logits %g, with Euclid's %g",
              after[0], after[1]);
    }
}

/* ---- attention through a tree ---- */

typedef struct results {
    double *out;
    float *scores, *lse;
    uint8_t *levels;
} results;

static results take_results(const setup *s) {
    results r = {tensor_values(&s->out.t), (float *)xmalloc(s->scores.size), (float *)xmalloc(s->lse.size),
                 (uint8_t *)xmalloc(s->levels.size)};
    memcpy(r.scores, setup_scores(s), s->scores.size);
    memcpy(r.lse, setup_lse(s), s->lse.size);
    memcpy(r.levels, setup_levels(s), s->levels.size);
    return r;
}

static void check_results(const setup *s, const results *want) {
    double *out = tensor_values(&s->out.t);
    CHECK(!memcmp(out, want->out, (size_t)tensor_count(&s->out.t) * sizeof *out), "out differs");
    CHECK(!memcmp(setup_scores(s), want->scores, s->scores.size), "scores differ");
    CHECK(!memcmp(setup_levels(s), want->levels, s->levels.size), "levels differ");
    CHECK(!memcmp(setup_lse(s), want->lse, s->lse.size), "lse differs");
    CHECK_GUARDS(s);
    free(out);
}

static void free_results(results *r) { free(r->out), free(r->scores), free(r->lse), free(r->levels); }

static int32_t *copy_order(const setup *s, int keys, psa_order *order) {
    *order = tree_order(s, keys);
    if (!order->index)
        return NULL;
    int32_t *index = (int32_t *)xmalloc(order_size(s, keys));
    memcpy(index, order->index, order_size(s, keys));
    order->index = index;
    return index;
}

/* The tree's orders given by hand: the same bits from every stage, with everything that a recipe may hold. */
static void tree_equals_order(void) {
    for (int r = 0; r < test_rounds(120); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc_random_recipe(&desc);
        desc.tree = (psa_tree_kind)rnd_int(PSA_TREE_KV, PSA_TREE_QKV);
        desc.n_prefix = rnd_chance(30) ? rnd_int(0, 40) : 0;
        if (!setup_init(&s, &desc, &x))
            continue;
        run_levels(&s, rnd_int(1, 3)), run_attend(&s, setup_levels(&s), rnd_int(1, 3));
        results want = take_results(&s);
        int32_t *index[2] = {copy_order(&s, 0, &desc.order_q), copy_order(&s, 1, &desc.order_k)};
        CHECK(desc.mask == PSA_MASK_DENSE || index[1] != NULL, "no order");
        desc.tree = PSA_TREE_NONE;
        if (CHECK_RESULT(psa_plan_init(&s.plan, &desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t), PSA_OK)) {
            guarded_free(&s.work);
            s.work = guarded_new(psa_work_size(&s.plan), 5);
            setup_poison_outputs(&s);
            memset(setup_scores(&s), 0xff, s.scores.size), memset(setup_levels(&s), 0xff, s.levels.size);
            run_levels(&s, rnd_int(1, 3)), run_attend(&s, setup_levels(&s), rnd_int(1, 3));
            check_results(&s, &want);
        }
        free_results(&want);
        free(index[0]), free(index[1]);
        setup_free(&s);
    }
}

/* The oracle on tensors that were really moved; out and lse come back in the caller's order. */
static void check_moved(setup *s, const psa_order *q, const psa_order *k) {
    int64_t rows = s->o.B * s->o.Hq * s->o.Nq, Dv = s->o.Dv;
    oracle o = s->o;
    double *moved[3] = {permuted(s->q.x, q, o.B, o.Hq, o.Nq, o.D, 0), permuted(s->k.x, k, o.B, o.Hkv, o.Nk, o.D, 0),
                        permuted(s->v.x, k, o.B, o.Hkv, o.Nk, Dv, 0)};
    double *out = (double *)xmalloc((size_t)(rows * Dv) * sizeof *out),
           *lse = (double *)xmalloc((size_t)rows * sizeof *lse);
    o.q = moved[0], o.k = moved[1], o.v = moved[2];
    oracle_attend(&o, setup_levels(s), out, lse);
    double *want = permuted(out, q, o.B, o.Hq, o.Nq, Dv, 1), *want_lse = permuted(lse, q, o.B, o.Hq, o.Nq, 1, 1);
    double *got = tensor_values(&s->out.t), *got_lse = doubles_of(setup_lse(s), (size_t)rows);
    COMPARE("out through a tree", got, want, rows * Dv, setup_tolerance(s, s->out.t.type));
    COMPARE("lse through a tree", got_lse, want_lse, rows, setup_tolerance(s, PSA_F32));
    for (int i = 0; i < 3; i++)
        free(moved[i]);
    free(out), free(lse), free(want), free(want_lse), free(got), free(got_lse);
}

static void tree_attention(void) {
    for (int r = 0; r < test_rounds(120); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_tree(&x);
        desc.tilt = rnd_chance(30);
        desc.level_end[0] = 1;
        if (!setup_init(&s, &desc, &x))
            continue;
        run_prepare(&s, rnd_int(1, 3)), run_pool(&s, rnd_int(1, 3));
        psa_order q = tree_order(&s, 0), k = tree_order(&s, 1);
        random_levels(&s.plan, desc.block_k, 30, setup_levels(&s));
        run_attend(&s, setup_levels(&s), rnd_int(1, 3));
        check_moved(&s, &q, &k);
        CHECK_GUARDS(&s);
        setup_free(&s);
    }
}

/* Level 1 everywhere: the order of the keys does not matter, and that of the queries is undone. */
static void tree_dense(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        psa_extra extra;
        shape x = shape_random();
        psa_desc desc = desc_tree(&x);
        desc.level_end[0] = 1;
        if (!setup_init(&s, &desc, &x))
            continue;
        memset(&extra, 0, sizeof extra);
        extra.lse = setup_lse(&s), extra.levels = setup_levels(&s);
        s.desc.n_threads = rnd_int(1, 3);
        CHECK_RESULT(psa_attention(&s.desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, &extra), PSA_OK);
        CHECK(extra.stats.density == 1, "density %g", extra.stats.density);
        CHECK_ATTENTION(&s, NULL);
        setup_free(&s);
    }
}

/* ---- bad numbers ---- */

/* Which query blocks of a head read a KV block that holds the token at this position. */
static int reads_at(const setup *s, int64_t b, int64_t h, int64_t I, int64_t position) {
    return oracle_level(&s->o, setup_levels(s), b, h, I, position / s->o.desc.block_k) > 0;
}

static int64_t position_of(const psa_order *order, int64_t b, int64_t h, int64_t N, int64_t token) {
    for (int64_t p = 0; p < N; p++)
        if (order_at(order, b, h, p) == token)
            return p;
    return -1;
}

/* Rows that do not read the key that is not finite are what the oracle says with a finite one in its place. */
static void check_key_local(setup *s, const psa_order *q, const psa_order *k, int64_t token) {
    int64_t Dv = s->o.Dv, rows = s->o.B * s->o.Hq * s->o.Nq;
    oracle o = s->o;
    double *moved[3] = {permuted(s->q.x, q, o.B, o.Hq, o.Nq, o.D, 0), permuted(s->k.x, k, o.B, o.Hkv, o.Nk, o.D, 0),
                        permuted(s->v.x, k, o.B, o.Hkv, o.Nk, Dv, 0)};
    double *out = (double *)xmalloc((size_t)(rows * Dv) * sizeof *out),
           *lse = (double *)xmalloc((size_t)rows * sizeof *lse), *got = tensor_values(&s->out.t);
    o.q = moved[0], o.k = moved[1], o.v = moved[2];
    oracle_attend(&o, setup_levels(s), out, lse);
    for (int64_t row = 0; row < rows; row++) {
        int64_t p = row % o.Nq, h = row / o.Nq % o.Hq, b = row / o.Nq / o.Hq;
        int here = b == 0 && h / (o.Hq / o.Hkv) == 0;
        if (!here || !reads_at(s, b, h, p / o.desc.block_q, position_of(k, 0, 0, o.Nk, token)))
            COMPARE("out of a row that does not read the key",
                    got + ((b * o.Hq + h) * o.Nq + order_at(q, b, h, p)) * Dv, out + row * Dv, Dv,
                    setup_tolerance(s, s->out.t.type));
    }
    for (int i = 0; i < 3; i++)
        free(moved[i]);
    free(out), free(lse), free(got);
}

static void tree_nan(void) {
    for (int r = 0; r < test_rounds(100); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_tree(&x);
        x.Nk = rnd_int(50, 250);
        desc.tilt = rnd_chance(50);
        desc.block_k = 16 << rnd_int(0, 1), desc.block_q = 16 * rnd_int(1, 3);
        if (!setup_init(&s, &desc, &x))
            continue;
        int64_t token = rnd_int(0, (int)x.Nk - 1), d = rnd_int(0, (int)x.D - 1);
        value_store(x.type_kv, tensor_at(&s.k.t, d, token, 0, 0), rnd_chance(50) ? NAN : INFINITY);
        run_prepare(&s, 1), run_pool(&s, 1);
        psa_order q = tree_order(&s, 0), k = tree_order(&s, 1);
        CHECK(order_at(&k, 0, 0, x.Nk - 1) == token, "token %d is not the last", (int)token);
        random_levels(&s.plan, desc.block_k, 50, setup_levels(&s));
        run_attend(&s, setup_levels(&s), 1);
        check_key_local(&s, &q, &k, token);
        CHECK_GUARDS(&s);
        setup_free(&s);
    }
}

const test_case tests_tree[] = {
    {"tree/permutation", tree_permutation},
    {"tree/splits", tree_splits},
    {"tree/long", tree_long},
    {"tree/heads", tree_heads},
    {"tree/tight", tree_tight},
    {"tree/exact", tree_exact},
    {"tree/metric", tree_metric},
    {"tree/equals_order", tree_equals_order},
    {"tree/attention", tree_attention},
    {"tree/dense", tree_dense},
    {"tree/nan", tree_nan},
    {NULL, NULL},
};
