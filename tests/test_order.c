/* test_order.c - token orders: what they are, how they move tensors, and attention through them. */
#include "test.h"

static void shuffle(int32_t *index, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        index[i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--) {
        int64_t j = rnd_int(0, (int)i);
        int32_t swap = index[i];
        index[i] = index[j], index[j] = swap;
    }
}

/* A random order, its own for every head and batch or shared among them; index NULL now and then. */
typedef struct random_order {
    psa_order order;
    int32_t *memory;
} random_order;

static random_order order_new(int64_t N, int64_t H, int64_t B) {
    random_order r;
    memset(&r, 0, sizeof r);
    if (rnd_chance(15))
        return r;
    r.order.stride_h = rnd_chance(50) ? N : 0;
    r.order.stride_b = rnd_chance(50) ? (r.order.stride_h ? N * H : N) : 0;
    r.memory = (int32_t *)xmalloc((size_t)(N * H * B) * sizeof *r.memory);
    for (int64_t i = 0; i < H * B; i++)
        shuffle(r.memory + i * N, N);
    r.order.index = r.memory;
    return r;
}

/* ---- grids ---- */

static void order_gilbert(void) {
    for (int r = 0; r < test_rounds(200); r++) {
        rnd_round(r);
        int t = rnd_int(1, 9), h = rnd_int(1, 12), w = rnd_int(1, 12), n = t * h * w, jumps = 0;
        if (r % 2) /* even extents: neighbours in the order are neighbours in the grid */
            t *= 2, h *= 2, w *= 2, n = t * h * w;
        guarded index = guarded_new((size_t)n * sizeof(int32_t), 0);
        int32_t *at = (int32_t *)guarded_data(&index);
        CHECK_RESULT(psa_order_gilbert(t, h, w, at), PSA_OK);
        CHECK(is_permutation(at, n), "%dx%dx%d is no permutation", t, h, w);
        for (int p = 1; p < n; p++) {
            int a = at[p - 1], b = at[p];
            jumps += abs(a / (h * w) - b / (h * w)) + abs(a / w % h - b / w % h) + abs(a % w - b % w) != 1;
        }
        CHECK(r % 2 == 0 || jumps == 0, "%dx%dx%d has %d jumps", t, h, w, jumps);
        CHECK(guarded_intact(&index), "guard bytes were written");
        guarded_free(&index);
    }
}

static void order_tile(void) {
    for (int r = 0; r < test_rounds(200); r++) {
        rnd_round(r);
        int t = rnd_int(1, 9), h = rnd_int(1, 12), w = rnd_int(1, 12), n = 0, wrong = 0;
        int a = rnd_int(1, 5), b = rnd_int(1, 14), c = rnd_int(1, 14);
        guarded index = guarded_new((size_t)(t * h * w) * sizeof(int32_t), 0);
        const int32_t *at = (const int32_t *)guarded_data(&index);
        CHECK_RESULT(psa_order_tile(t, h, w, a, b, c, (int32_t *)guarded_data(&index)), PSA_OK);
        for (int i = 0; i < t; i += a)
            for (int j = 0; j < h; j += b)
                for (int k = 0; k < w; k += c)
                    for (int x = i; x < i + a && x < t; x++)
                        for (int y = j; y < j + b && y < h; y++)
                            for (int z = k; z < k + c && z < w; z++)
                                wrong += at[n++] != (x * h + y) * w + z;
        CHECK(wrong == 0 && n == t * h * w, "%dx%dx%d in tiles of %dx%dx%d: %d of %d differ", t, h, w, a, b, c, wrong,
              n);
        CHECK(guarded_intact(&index), "guard bytes were written");
        guarded_free(&index);
    }
}

static void order_embed(void) {
    for (int r = 0; r < test_rounds(50); r++) {
        rnd_round(r);
        int prefix = rnd_int(0, 20), video = rnd_int(1, 100), suffix = rnd_int(0, 20), n = prefix + video + suffix;
        int32_t index[140], before[140];
        memset(index, 0xa5, sizeof index);
        shuffle(index + prefix, video);
        memcpy(before, index, sizeof index);
        psa_order_embed(index, prefix, video, suffix);
        for (int p = 0; p < n; p++) {
            int want = p < prefix || p >= prefix + video ? p : before[p] + prefix;
            CHECK(index[p] == want, "position %d holds %d, expected %d", p, index[p], want);
        }
        CHECK(!memcmp(index + n, before + n, (size_t)(140 - n) * sizeof *index), "written past the end");
    }
}

/* ---- moving tensors ---- */

static void order_permute(void) {
    for (int r = 0; r < test_rounds(100); r++) {
        rnd_round(r);
        int64_t D = 8 * rnd_int(1, 8), N = rnd_int(1, 100), H = rnd_int(1, 4), B = rnd_int(1, 3);
        psa_type type = (psa_type)rnd_int(0, 2);
        random_order order = order_new(N, H, B);
        tensor in = tensor_input(type, LAYOUT_RANDOM, D, N, H, B, 1),
               out = tensor_output(type, LAYOUT_RANDOM, D, N, H, B);
        tensor back = tensor_output(type, LAYOUT_RANDOM, D, N, H, B);
        for (int ith = 0, nth = rnd_int(1, 7); ith < nth; ith++)
            CHECK_RESULT(psa_permute(&in.t, &order.order, &out.t, ith, nth), PSA_OK);
        for (int ith = 0, nth = rnd_int(1, 7); ith < nth; ith++)
            CHECK_RESULT(psa_unpermute(&out.t, &order.order, &back.t, ith, nth), PSA_OK);
        double *want = permuted(in.x, &order.order, B, H, N, D, 0), *got = tensor_values(&out.t),
               *again = tensor_values(&back.t);
        size_t size = (size_t)(D * N * H * B) * sizeof *want;
        CHECK(!memcmp(want, got, size), "the permuted tensor differs");
        CHECK(!memcmp(in.x, again, size), "permuting and back is not the identity");
        CHECK(tensor_guards_intact(&out) && tensor_guards_intact(&back), "bytes outside the rows were written");
        free(want), free(got), free(again), free(order.memory);
        tensor_free(&in), tensor_free(&out), tensor_free(&back);
    }
}

/* ---- attention through an order ---- */

typedef struct ordered {
    random_order q, k;
    double *moved_q, *moved_k, *moved_v; /* what the oracle sees */
} ordered;

static int ordered_init(setup *s, ordered *o, psa_desc *desc, const shape *x) {
    o->q = order_new(x->Nq, x->Hq, x->B);
    o->k = order_new(x->Nk, x->Hkv, x->B);
    desc->causal = 0;
    desc->order_q = o->q.order, desc->order_k = o->k.order;
    if (!setup_init(s, desc, x)) {
        free(o->q.memory), free(o->k.memory);
        return 0;
    }
    o->moved_q = permuted(s->q.x, &o->q.order, x->B, x->Hq, x->Nq, x->D, 0);
    o->moved_k = permuted(s->k.x, &o->k.order, x->B, x->Hkv, x->Nk, x->D, 0);
    o->moved_v = permuted(s->v.x, &o->k.order, x->B, x->Hkv, x->Nk, x->Dv, 0);
    s->o.q = o->moved_q, s->o.k = o->moved_k, s->o.v = o->moved_v;
    return 1;
}

static void ordered_free(setup *s, ordered *o) {
    free(o->moved_q), free(o->moved_k), free(o->moved_v), free(o->q.memory), free(o->k.memory);
    setup_free(s);
}

/* out and lse are in the caller's order again. */
static void check_ordered(setup *s, const ordered *o) {
    int64_t rows = s->o.B * s->o.Hq * s->o.Nq;
    double *out = (double *)xmalloc((size_t)(rows * s->o.Dv) * sizeof *out),
           *lse = (double *)xmalloc((size_t)rows * sizeof *lse);
    oracle_attend(&s->o, setup_levels(s), out, lse);
    double *want = permuted(out, &o->q.order, s->o.B, s->o.Hq, s->o.Nq, s->o.Dv, 1);
    double *want_lse = permuted(lse, &o->q.order, s->o.B, s->o.Hq, s->o.Nq, 1, 1);
    double *got = tensor_values(&s->out.t), *got_lse = doubles_of(setup_lse(s), (size_t)rows);
    COMPARE("out through an order", got, want, rows * s->o.Dv, tolerance_of(s->out.t.type));
    COMPARE("lse through an order", got_lse, want_lse, rows, tolerance_of(PSA_F32));
    CHECK_GUARDS(s);
    free(out), free(lse), free(want), free(want_lse), free(got), free(got_lse);
}

static void order_attention(void) {
    for (int r = 0; r < test_rounds(120); r++) {
        rnd_round(r);
        setup s;
        ordered o;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.score = (psa_score_kind)(r % 4);
        desc.block_q = 16 * rnd_int(1, 4);
        desc.n_sim_min = rnd_chance(40) ? 2 : 0;
        if (!ordered_init(&s, &o, &desc, &x))
            continue;
        size_t map = psa_map_size(&s.plan);
        uint8_t *want_levels = (uint8_t *)xmalloc(map);
        run_pool(&s, rnd_int(1, 3)), run_score(&s, rnd_int(1, 3)), run_mask(&s, 1);
        CHECK_SCORES(&s);
        oracle_mask(&s.o, setup_scores(&s), want_levels);
        CHECK(!memcmp(want_levels, setup_levels(&s), map), "levels through an order differ");
        if (rnd_chance(50))
            random_levels(&s.plan, desc.block_k, 30, setup_levels(&s));
        run_attend(&s, setup_levels(&s), rnd_int(1, 3));
        check_ordered(&s, &o);
        free(want_levels);
        ordered_free(&s, &o);
    }
}

/* The one call through an order: what psa_permute, psa_attention and psa_unpermute give together. */
static void order_equals_permute(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        ordered o;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        x.type_out = PSA_F32;
        if (!ordered_init(&s, &o, &desc, &x))
            continue;
        psa_extra extra;
        tensor q = tensor_output(x.type_q, LAYOUT_PLAIN, x.D, x.Nq, x.Hq, x.B),
               k = tensor_output(x.type_kv, LAYOUT_PLAIN, x.D, x.Nk, x.Hkv, x.B);
        tensor v = tensor_output(x.type_kv, LAYOUT_PLAIN, x.Dv, x.Nk, x.Hkv, x.B),
               out = tensor_output(PSA_F32, LAYOUT_PLAIN, x.Dv, x.Nq, x.Hq, x.B);
        tensor back = tensor_output(PSA_F32, LAYOUT_PLAIN, x.Dv, x.Nq, x.Hq, x.B);
        memset(&extra, 0, sizeof extra);
        extra.levels = setup_levels(&s);
        CHECK_RESULT(psa_attention(&desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, &extra), PSA_OK);
        CHECK_RESULT(psa_permute(&s.q.t, &desc.order_q, &q.t, 0, 1), PSA_OK);
        CHECK_RESULT(psa_permute(&s.k.t, &desc.order_k, &k.t, 0, 1), PSA_OK);
        CHECK_RESULT(psa_permute(&s.v.t, &desc.order_k, &v.t, 0, 1), PSA_OK);
        memset(&desc.order_q, 0, sizeof desc.order_q), memset(&desc.order_k, 0, sizeof desc.order_k);
        extra.levels_given = 1; /* the scores may differ in the last bit, and a rank with them */
        CHECK_RESULT(psa_attention(&desc, &q.t, &k.t, &v.t, &out.t, &extra), PSA_OK);
        CHECK_RESULT(psa_unpermute(&out.t, &s.desc.order_q, &back.t, 0, 1), PSA_OK);
        double *want = tensor_values(&back.t), *got = tensor_values(&s.out.t);
        COMPARE("out", got, want, tensor_count(&out.t), tolerance_of(PSA_F32));
        free(want), free(got);
        tensor_free(&q), tensor_free(&k), tensor_free(&v), tensor_free(&out), tensor_free(&back);
        ordered_free(&s, &o);
    }
}

/* ---- semantic order ---- */

typedef struct clusters {
    int64_t D, N, H, B, prefix, suffix;
    int n;
    tensor x;
    float *centroids, *truth; /* [B][H][n][D] */
    int *label;               /* [B][H][N] */
    guarded index, work;
} clusters;

/* Tokens around well separated centres; every centre has tokens. */
static clusters clusters_new(void) {
    clusters c;
    memset(&c, 0, sizeof c);
    c.D = 8 * rnd_int(1, 4), c.N = rnd_int(60, 200), c.H = rnd_int(1, 3), c.B = rnd_int(1, 2), c.n = rnd_int(2, 6);
    c.prefix = rnd_int(0, 10), c.suffix = rnd_int(0, 10);
    int64_t heads = c.H * c.B;
    double *x = (double *)xmalloc((size_t)(heads * c.N * c.D) * sizeof *x);
    c.truth = (float *)xmalloc((size_t)(heads * c.n * c.D) * sizeof *c.truth);
    c.centroids = (float *)xmalloc((size_t)(heads * c.n * c.D) * sizeof *c.centroids);
    c.label = (int *)xmalloc((size_t)(heads * c.N) * sizeof *c.label);
    for (int64_t i = 0; i < heads * c.n * c.D; i++)
        c.truth[i] = (i % c.D == i / c.D % c.n ? 40.f : 0.f) + (float)rnd_normal();
    for (int64_t i = 0; i < heads * c.N; i++) {
        int64_t token = i % c.N - c.prefix;
        c.label[i] = token >= 0 && token < c.n ? (int)token : rnd_int(0, c.n - 1);
        for (int64_t d = 0; d < c.D; d++)
            x[i * c.D + d] = (double)c.truth[(i / c.N * c.n + c.label[i]) * c.D + d] + rnd_normal();
    }
    c.x = tensor_from((psa_type)rnd_int(0, 2), LAYOUT_RANDOM, c.D, c.N, c.H, c.B, x);
    c.index = guarded_new((size_t)(heads * c.N) * sizeof(int32_t), 0);
    c.work = guarded_new(psa_order_semantic_work_size(&c.x.t, c.n, 3), 0);
    free(x);
    return c;
}

static void clusters_free(clusters *c) {
    tensor_free(&c->x);
    free(c->centroids), free(c->truth), free(c->label);
    guarded_free(&c->index), guarded_free(&c->work);
}

static void run_semantic(clusters *c, int n_iter, int carried) {
    for (int ith = 0, nth = rnd_int(1, 3); ith < nth; ith++)
        CHECK_RESULT(psa_order_semantic(&c->x.t, c->prefix, c->suffix, c->n, n_iter, c->centroids, carried,
                                        (int32_t *)guarded_data(&c->index), guarded_data(&c->work), ith, nth),
                     PSA_OK);
    CHECK(guarded_intact(&c->index) && guarded_intact(&c->work), "guard bytes were written");
}

static int nearest(const clusters *c, int64_t head, int64_t token) {
    int best = 0;
    double least = INFINITY;
    for (int i = 0; i < c->n; i++) {
        double sum = 0;
        for (int64_t d = 0; d < c->D; d++) {
            double e = c->x.x[(head * c->N + token) * c->D + d] - (double)c->centroids[(head * c->n + i) * c->D + d];
            sum += e * e;
        }
        if (sum < least)
            least = sum, best = i;
    }
    return best;
}

/* A permutation that leaves the text in place and sorts the rest by cluster, then by index. */
static void check_semantic(const clusters *c) {
    for (int64_t head = 0; head < c->H * c->B; head++) {
        const int32_t *index = (const int32_t *)guarded_data(&c->index) + head * c->N;
        int wrong = 0;
        if (!CHECK(is_permutation(index, c->N), "head %d: no permutation", (int)head))
            continue;
        for (int64_t p = 0; p < c->N; p++)
            if (p < c->prefix || p >= c->N - c->suffix)
                CHECK(index[p] == p, "text token %d moved to %d", (int)p, index[p]);
        for (int64_t p = c->prefix + 1; p < c->N - c->suffix; p++) {
            int a = nearest(c, head, index[p - 1]), b = nearest(c, head, index[p]);
            wrong += a > b || (a == b && index[p - 1] > index[p]);
        }
        CHECK(wrong == 0, "head %d: %d tokens out of order", (int)head, wrong);
    }
}

/* Started near the truth, two iterations find the clusters; the centroids are then the means of the tokens. */
static void semantic_carried(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        clusters c = clusters_new();
        size_t n = (size_t)(c.H * c.B * c.n * c.D);
        for (size_t i = 0; i < n; i++)
            c.centroids[i] = c.truth[i] + 3 * (float)rnd_normal();
        run_semantic(&c, 2, 1);
        check_semantic(&c);
        for (int64_t i = 0; i < c.H * c.B * c.N; i++)
            if (i % c.N >= c.prefix && i % c.N < c.N - c.suffix)
                CHECK(nearest(&c, i / c.N, i % c.N) == c.label[i], "token %d left its cluster", (int)i);
        double *mean = (double *)xmalloc(n * sizeof *mean), *got = doubles_of(c.centroids, n);
        tolerance t = {1e-4, 1e-5}; /* means of values near 40 in f32 */
        for (size_t i = 0; i < n; i++) {
            size_t D = (size_t)c.D, head = i / D / (size_t)c.n;
            double sum = 0, count = 0;
            for (int64_t token = c.prefix; token < c.N - c.suffix; token++)
                if (c.label[head * (size_t)c.N + (size_t)token] == (int)(i / D % (size_t)c.n))
                    sum += c.x.x[(head * (size_t)c.N + (size_t)token) * D + i % D], count++;
            mean[i] = sum / count;
        }
        COMPARE("centroids", got, mean, (int64_t)n, t);
        free(mean), free(got);
        clusters_free(&c);
    }
}

/* Started from the tokens: sorted by whatever clusters it found; carried on, nothing changes any more. */
static void semantic_converges(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        clusters c = clusters_new();
        size_t n = (size_t)(c.H * c.B * c.n * c.D);
        run_semantic(&c, 100, 0);
        check_semantic(&c);
        int32_t *before = (int32_t *)xmalloc(c.index.size);
        double *centroids = doubles_of(c.centroids, n);
        memcpy(before, guarded_data(&c.index), c.index.size);
        run_semantic(&c, 1, 1);
        double *again = doubles_of(c.centroids, n);
        tolerance t = {1e-4, 1e-5};
        CHECK(!memcmp(before, guarded_data(&c.index), c.index.size), "the order still changed");
        COMPARE("carried centroids", again, centroids, (int64_t)n, t);
        free(before), free(centroids), free(again);
        clusters_free(&c);
    }
}

/* The bits do not depend on how the heads are split. */
static void semantic_splits(void) {
    clusters c = clusters_new();
    int32_t *first = (int32_t *)xmalloc(c.index.size);
    for (int r = 0; r < 6; r++) {
        run_semantic(&c, 10, 0);
        if (r == 0)
            memcpy(first, guarded_data(&c.index), c.index.size);
        CHECK(!memcmp(first, guarded_data(&c.index), c.index.size), "another split, another order");
    }
    free(first);
    clusters_free(&c);
}

/* Whatever the tokens are, the order is a permutation: equal tokens, as many clusters as tokens, NaN and Inf. */
static void semantic_odd_tokens(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        int N = rnd_int(1, 40), prefix = rnd_int(0, N / 2), suffix = rnd_int(0, N - prefix - 1),
            n = rnd_int(1, N - prefix - suffix);
        tensor x = tensor_input((psa_type)(r % 3), LAYOUT_RANDOM, 8, N, 1, 1, r % 4 ? 1 : 0);
        guarded index = guarded_new((size_t)N * sizeof(int32_t), 0),
                work = guarded_new(psa_order_semantic_work_size(&x.t, n, 1), 1);
        guarded centroids = guarded_new((size_t)n * 8 * sizeof(float), 0);
        for (int i = r % 5; i > 0; i--)
            tensor_set(&x, rnd_int(0, 7), rnd_int(0, N - 1), 0, 0, i % 2 ? NAN : INFINITY);
        CHECK_RESULT(psa_order_semantic(&x.t, prefix, suffix, n, 5, (float *)guarded_data(&centroids), 0,
                                        (int32_t *)guarded_data(&index), guarded_data(&work), 0, 1),
                     PSA_OK);
        CHECK(is_permutation((int32_t *)guarded_data(&index), N), "no permutation: %d tokens, %d clusters", N, n);
        CHECK(guarded_intact(&index) && guarded_intact(&work) && guarded_intact(&centroids),
              "guard bytes were written");
        guarded_free(&index), guarded_free(&work), guarded_free(&centroids);
        tensor_free(&x);
    }
}

const test_case tests_order[] = {
    {"order/gilbert", order_gilbert},
    {"order/tile", order_tile},
    {"order/embed", order_embed},
    {"order/permute", order_permute},
    {"order/attention", order_attention},
    {"order/equals_permute", order_equals_permute},
    {"order/semantic_carried", semantic_carried},
    {"order/semantic_converges", semantic_converges},
    {"order/semantic_splits", semantic_splits},
    {"order/semantic_odd_tokens", semantic_odd_tokens},
    {NULL, NULL},
};
