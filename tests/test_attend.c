/* test_attend.c - pooling and attention against the oracle: shapes, types, strides, levels, causality, bad numbers. */
#include "test.h"

/* A desc whose plan pools every level up to block_k. */
static void all_levels(psa_desc *d) {
    memset(d->level_end, 0, sizeof d->level_end);
    for (int i = 0; 1 << i <= d->block_k; i++)
        d->level_end[i] = 1;
}

/* One random case: pool, attend with the caller's own random map, compare. */
static void random_case(const psa_desc *desc, const shape *x) {
    setup s;
    if (!setup_init(&s, desc, x))
        return;
    CHECK_RANDOM_LEVELS(&s, rnd_int(0, 80));
    setup_free(&s);
}

static void attend_random(void) {
    for (int r = 0; r < test_rounds(400); r++) {
        rnd_round(r);
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        all_levels(&desc);
        random_case(&desc, &x);
    }
}

static void attend_every_isa(void) {
    for (int r = 0; r < test_rounds(40); r++)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
            if (!psa_isa_supported((psa_isa)isa))
                continue;
            rnd_round(r);
            shape x = shape_random();
            psa_desc desc = desc_random_blocks(&x);
            all_levels(&desc);
            desc.isa = (psa_isa)isa;
            random_case(&desc, &x);
        }
}

/* Every head size, with every other block size beside it. */
static void attend_head_sizes(void) {
    for (int d = 8; d <= PSA_MAX_D; d += test_opt.quick ? 40 : 8)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
            if (!psa_isa_supported((psa_isa)isa))
                continue;
            rnd_round(d);
            shape x = shape_random();
            psa_desc desc = desc_random_blocks(&x);
            x.B = x.Hkv = x.Hq = 1;
            x.Nq = rnd_int(1, 40), x.Nk = rnd_int(1, 150);
            x.D = d, x.Dv = rnd_chance(50) ? d : PSA_MAX_D + 8 - d;
            desc.isa = (psa_isa)isa;
            all_levels(&desc);
            random_case(&desc, &x);
        }
}

/* Queries take different room in the workspace for scores of groups and for attention, most of it with small heads. */
static void attend_after_groups(void) {
    for (int type = PSA_F32; type <= PSA_BF16; type++) {
        rnd_round(type);
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.score = PSA_SCORE_ANTIDIAGONAL, desc.stride = 8, desc.isa = PSA_ISA_AUTO;
        desc.block_q = 64, desc.block_k = 32, desc.causal = 0;
        x.Nq = 64, x.Nk = 200, x.D = x.Dv = 8;
        x.type_q = PSA_F32, x.type_kv = (psa_type)type;
        all_levels(&desc);
        random_case(&desc, &x);
    }
}

static void attend_causal(void) {
    for (int r = 0; r < test_rounds(200); r++) {
        rnd_round(r);
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.causal = 1;
        desc.block_q = rnd_int(16, 48);
        x.D = x.Dv = 8;
        x.Nk = rnd_chance(40) ? x.Nq
                              : x.Nk; /* square, shorter and longer keys: decode, chunked prefill, rows with nothing */
        all_levels(&desc);
        random_case(&desc, &x);
    }
}

/* So few queries that lanes are elements of the head: every number of them, with and without levels. */
static void attend_few(void) {
    for (int n = 1; n <= 17; n++)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
            for (int type = PSA_F32; type <= PSA_BF16; type++) {
                if (!psa_isa_supported((psa_isa)isa))
                    continue;
                rnd_round(3 * n + type);
                setup s;
                shape x = shape_random();
                psa_desc desc = desc_random_blocks(&x);
                x.Nq = n, x.Nk = rnd_int(1, 300);
                x.D = 8 * rnd_int(1, 17), x.Dv = 8 * rnd_int(1, 32);
                x.type_kv = (psa_type)type;
                desc.isa = (psa_isa)isa;
                desc.causal = rnd_chance(30);
                all_levels(&desc);
                if (!setup_init(&s, &desc, &x))
                    continue;
                run_attend(&s, NULL, 1);
                CHECK_ATTENTION(&s, NULL);
                CHECK_RANDOM_LEVELS(&s, 20);
                setup_free(&s);
            }
}

/* Many blocks, tiles and rows at once. */
static void attend_large(void) {
    for (int r = 0; r < test_rounds(12); r++) {
        rnd_round(r);
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        x.B = 1, x.Hq = rnd_int(1, 2), x.Hkv = 1, x.D = 8 * rnd_int(1, 3), x.Dv = 8 * rnd_int(1, 3);
        x.Nq = rnd_int(400, 900), x.Nk = rnd_int(400, 1500);
        all_levels(&desc);
        random_case(&desc, &x);
    }
}

/* One query against many keys, the shape of decoding. */
static void attend_decode(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.causal = rnd_chance(50);
        x.Nq = rnd_int(1, 4);
        x.Nk = rnd_int(1, 1500);
        all_levels(&desc);
        random_case(&desc, &x);
    }
}

static void attend_dense(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.mask = rnd_chance(50) ? PSA_MASK_DENSE : PSA_MASK_TOPK;
        if (!setup_init(&s, &desc, &x))
            continue;
        run_attend(&s, NULL, rnd_int(1, 3)); /* no pooling needed */
        CHECK_ATTENTION(&s, NULL);
        setup_free(&s);
    }
}

/* Enough query blocks for a thread to copy a KV head whose rows lie apart, are gathered or are 16-bit. */
static void attend_head_copy(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        x.Nq = rnd_int(128, 200), x.Nk = x.Nq + rnd_int(0, 100);
        x.type_kv = (psa_type)((r + 2) % 3);
        psa_desc desc = desc_random_blocks(&x);
        desc.isa = r % 4 < 2 ? PSA_ISA_AUTO : desc.isa;
        desc.causal = r % 8 == 0, desc.block_k = 16;
        desc.block_q = r % 2 ? 16 : 32, desc.mask = PSA_MASK_DENSE, desc.n_threads = rnd_int(1, 2);
        if (!setup_init(&s, &desc, &x))
            continue;
        run_attend(&s, NULL, desc.n_threads);
        CHECK_ATTENTION(&s, NULL);
        random_levels(&s.plan, 1, 50, setup_levels(&s)); /* rows are not read in the order in which they are copied */
        run_attend(&s, setup_levels(&s), desc.n_threads);
        CHECK_ATTENTION(&s, setup_levels(&s));
        setup_free(&s);
    }
}

/* A map of ones and no map are the same thing, bit for bit where heads do not go together, which they do only without a
 * map; a lse that is not wanted changes nothing. */
static void attend_no_map(void) {
    for (int r = 0; r < test_rounds(30); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        x.Hq = x.Hkv;
        if (!setup_init(&s, &desc, &x))
            continue;
        memset(setup_levels(&s), 1, psa_map_size(&s.plan));
        run_attend(&s, setup_levels(&s), 1);
        double *ones = tensor_values(&s.out.t);
        setup_poison_outputs(&s);
        CHECK_RESULT(psa_attend(&s.plan, s.q.t.data, s.k.t.data, s.v.t.data, NULL, guarded_data(&s.work), s.out.t.data,
                                NULL, 0, 1),
                     PSA_OK);
        double *none = tensor_values(&s.out.t);
        CHECK(!memcmp(ones, none, (size_t)tensor_count(&s.out.t) * sizeof *ones), "out differs");
        CHECK(guarded_untouched(&s.lse), "lse was written though NULL was given");
        free(ones), free(none);
        setup_free(&s);
    }
}

static void attend_empty_rows(void) {
    for (int r = 0; r < test_rounds(30); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.causal = 0;
        if (!setup_init(&s, &desc, &x))
            continue;
        memset(setup_levels(&s), 0, psa_map_size(&s.plan));
        run_attend(&s, setup_levels(&s), 1);
        double *out = tensor_values(&s.out.t);
        for (int64_t i = 0; i < tensor_count(&s.out.t); i++)
            CHECK(out[i] == 0, "out[%d] is %g", (int)i, out[i]);
        for (int64_t i = 0; i < x.B * x.Hq * x.Nq; i++)
            CHECK(setup_lse(&s)[i] == -INFINITY, "lse[%d] is %g", (int)i, (double)setup_lse(&s)[i]);
        CHECK(psa_mul_adds(&s.plan, guarded_data(&s.work)) == 0, "work was counted");
        CHECK_GUARDS(&s);
        free(out);
        setup_free(&s);
    }
}

/* The work counted where it is done is the sum of the rows of the map, and so is what the statistics say. */
static void attend_mul_adds(void) {
    for (int r = 0; r < test_rounds(80); r++) {
        rnd_round(r);
        setup s;
        psa_stats want, got;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        all_levels(&desc);
        if (!setup_init(&s, &desc, &x))
            continue;
        random_levels(&s.plan, desc.block_k, 30, setup_levels(&s));
        run_pool(&s, 1);
        run_attend(&s, setup_levels(&s), rnd_int(1, 7));
        oracle_stats(&s.o, setup_levels(&s), -1, -1, &want);
        int64_t done = psa_mul_adds(&s.plan, guarded_data(&s.work));
        CHECK(done == want.mul_adds, "%.0f, expected %.0f", (double)done, (double)want.mul_adds);
        CHECK_RESULT(psa_stats_from_levels(&s.plan, setup_levels(&s), -1, -1, &got), PSA_OK);
        CHECK(got.mul_adds == done, "statistics say %.0f, done %.0f", (double)got.mul_adds, (double)done);
        run_attend(&s, NULL, 1);
        done = psa_mul_adds(&s.plan, guarded_data(&s.work));
        CHECK(done == want.dense_mul_adds, "dense: %.0f, expected %.0f", (double)done, (double)want.dense_mul_adds);
        setup_free(&s);
    }
}

/* ---- numbers at the edge ---- */

/* Does query row i of head h read key j of KV head kv in batch b? */
static int reads(const setup *s, int64_t b, int64_t h, int64_t i, int64_t j) {
    int64_t I = i / s->o.desc.block_q, J = j / s->o.desc.block_k;
    if (oracle_pair(&s->o, I, J) == STRADDLES)
        return j <= i + s->o.off;
    return oracle_level(&s->o, setup_levels(s), b, h, I, J) > 0;
}

typedef struct spot {
    int where; /* 0 q, 1 k, 2 v */
    int64_t d, n, h, b;
} spot;

/* Plants the value somewhere; the oracle keeps the finite value that was there. */
static spot plant(setup *s, double value) {
    spot at = {rnd_int(0, 2), 0, 0, 0, 0};
    tensor *t = at.where == 0 ? &s->q : at.where == 1 ? &s->k : &s->v;
    at.d = rnd_int(0, (int)t->t.ne[0] - 1), at.n = rnd_int(0, (int)t->t.ne[1] - 1);
    at.h = rnd_int(0, (int)t->t.ne[2] - 1), at.b = rnd_int(0, (int)t->t.ne[3] - 1);
    value_store(t->t.type, tensor_at(&t->t, at.d, at.n, at.h, at.b), value);
    return at;
}

static int touches(const setup *s, spot at, int64_t b, int64_t h, int64_t i) {
    if (at.b != b)
        return 0;
    if (at.where == 0)
        return at.h == h && at.n == i;
    return at.h == h / (s->o.Hq / s->o.Hkv) && reads(s, b, h, i, at.n);
}

/* Rows that do not read the spot are what they would be without it; a NaN that is read is seen in out. */
static void check_local(setup *s, spot at, int is_nan) {
    int64_t rows = s->o.B * s->o.Hq * s->o.Nq, Dv = s->o.Dv;
    double *out = (double *)xmalloc((size_t)(rows * Dv) * sizeof *out),
           *lse = (double *)xmalloc((size_t)rows * sizeof *lse);
    double *got = tensor_values(&s->out.t);
    oracle_attend(&s->o, setup_levels(s), out, lse);
    for (int64_t row = 0; row < rows; row++) {
        int64_t i = row % s->o.Nq, h = row / s->o.Nq % s->o.Hq, b = row / s->o.Nq / s->o.Hq;
        if (!touches(s, at, b, h, i)) {
            COMPARE("out of a row that does not read the spot", got + row * Dv, out + row * Dv, Dv,
                    tolerance_of(s->out.t.type));
        } else if (is_nan && (at.where == 2 || lse[row] != -INFINITY)) {
            double seen = got[row * Dv + (at.where == 2 ? at.d : 0)];
            CHECK(isnan(seen), "row %d reads a NaN in %c and is %g", (int)row, "qkv"[at.where], seen);
        }
    }
    free(out), free(lse), free(got);
}

static void attend_nan(void) {
    for (int r = 0; r < test_rounds(200); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        x.Nq = rnd_int(1, rnd_chance(40) ? 16 : 80), x.Nk = rnd_int(1, 120), x.D = x.Dv = 8 * rnd_int(1, 3);
        desc.causal = rnd_chance(60);
        desc.block_q = rnd_int(16, 40);
        all_levels(&desc);
        if (!setup_init(&s, &desc, &x))
            continue;
        int is_nan = rnd_chance(60);
        random_levels(&s.plan, desc.block_k, 50, setup_levels(&s));
        spot at = plant(&s, is_nan ? NAN : rnd_chance(50) ? INFINITY : -INFINITY);
        run_pool(&s, 1);
        run_attend(&s, setup_levels(&s), 1);
        check_local(&s, at, is_nan);
        CHECK_GUARDS(&s);
        setup_free(&s);
    }
}

/* Logits up to 1e30: f32 leaves no digits for the exponential, but the result stays a mean of the values, and where one
 * logit leads by far it is that key's value. */
static void check_huge(setup *s) {
    int64_t Dv = s->o.Dv;
    double *got = tensor_values(&s->out.t), *logit = (double *)xmalloc((size_t)s->o.Nk * sizeof *logit);
    for (int64_t i = 0; i < s->o.Nq; i++) {
        int64_t top = 0;
        double gap = INFINITY;
        for (int64_t j = 0; j < s->o.Nk; j++) {
            logit[j] = 0;
            for (int64_t d = 0; d < s->o.D; d++)
                logit[j] += s->o.scale * s->q.x[i * s->o.D + d] * s->k.x[j * s->o.D + d];
            top = logit[j] > logit[top] ? j : top;
        }
        for (int64_t j = 0; j < s->o.Nk; j++)
            gap = j != top ? fmin(gap, (logit[top] - logit[j]) / (fabs(logit[top]) + fabs(logit[j]))) : gap;
        for (int64_t d = 0; d < Dv; d++) {
            double x = got[i * Dv + d], v = s->v.x[top * Dv + d];
            CHECK(isfinite(x) && fabs(x) <= 10, "row %d: %g", (int)i, x);
            CHECK(gap < .01 || fabs(x - v) <= 1e-5, "row %d: %g, expected %g", (int)i, x, v);
        }
        CHECK(fabs((double)setup_lse(s)[i] - logit[top]) <= 1e-5 * fabs(logit[top]) + 10, "lse %g",
              (double)setup_lse(s)[i]);
    }
    free(got), free(logit);
}

static void attend_huge_logits(void) {
    for (int power = 4; power <= 30; power += 2)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
            setup s;
            shape x;
            psa_desc desc;
            rnd_round(power);
            if (!psa_isa_supported((psa_isa)isa))
                continue;
            memset(&x, 0, sizeof x);
            memset(&desc, 0, sizeof desc);
            x.B = x.Hq = x.Hkv = 1, x.Nq = 20, x.Nk = 90, x.D = x.Dv = 16;
            x.spread = sqrt(pow(10, power) / 16);
            desc.scale = 1;
            desc.isa = (psa_isa)isa;
            if (!setup_init(&s, &desc, &x))
                continue;
            run_attend(&s, NULL, 1);
            check_huge(&s);
            setup_free(&s);
        }
}

/* Long keys whose logits keep rising: every tile moves the running maximum. */
static void attend_rising_logits(void) {
    for (int r = 0; r < test_rounds(20); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        x.Nq = rnd_int(1, 40), x.Nk = 600, x.D = 8, x.type_q = x.type_kv = PSA_F32;
        all_levels(&desc);
        if (!setup_init(&s, &desc, &x))
            continue;
        for (int64_t n = 0; n < x.Nk; n++)
            for (int64_t row = 0; row < x.B * x.Hkv; row++)
                tensor_set(&s.k, 0, n, row % x.Hkv, row / x.Hkv,
                           rnd_chance(50) ? .02 * (double)n : 6 - .02 * (double)n);
        CHECK_RANDOM_LEVELS(&s, 20);
        setup_free(&s);
    }
}

/* Denormal queries and keys give logits near 0, denormal values a denormal mean. */
static void attend_denormal(void) {
    for (int r = 0; r < test_rounds(30); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        double tiny = r % 2 ? 1e-40 : 1e-7; /* denormal in f32 and bf16; in f16 */
        x.type_q = x.type_kv = r % 2 ? (rnd_chance(50) ? PSA_F32 : PSA_BF16) : PSA_F16;
        x.type_out = PSA_F32;
        x.spread = tiny;
        all_levels(&desc);
        if (!setup_init(&s, &desc, &x))
            continue;
        CHECK_RANDOM_LEVELS(&s, 20);
        setup_free(&s);
    }
}

/* ---- merging ---- */

/* The keys [from, to) of a tensor. */
static psa_tensor keys_slice(const psa_tensor *t, int64_t from, int64_t to) {
    psa_tensor part = *t;
    part.data = tensor_at(t, 0, from, 0, 0);
    part.ne[1] = to - from;
    return part;
}

static void attend_slice(const setup *s, int64_t from, int64_t to, const psa_tensor *out, float *lse) {
    psa_tensor k = keys_slice(&s->k.t, from, to), v = keys_slice(&s->v.t, from, to);
    psa_desc desc = s->desc;
    psa_extra extra;
    desc.mask = PSA_MASK_DENSE;
    memset(&extra, 0, sizeof extra);
    extra.lse = lse;
    CHECK_RESULT(psa_attention(&desc, &s->q.t, &k, &v, out, &extra), PSA_OK);
}

/* Dense attention over three slices of the keys, merged, is dense attention over all of them. */
static void merge_slices(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        desc.causal = 0;
        x.Nk = rnd_int(3, 200);
        x.type_out = PSA_F32;
        if (!setup_init(&s, &desc, &x))
            continue;
        int64_t cut[4] = {0, rnd_int(1, (int)x.Nk - 2), 0, x.Nk};
        cut[2] = rnd_int((int)cut[1] + 1, (int)x.Nk - 1);
        tensor part = tensor_output(PSA_F32, x.layout, x.Dv, x.Nq, x.Hq, x.B);
        float *part_lse = (float *)xmalloc(s.lse.size);
        attend_slice(&s, cut[0], cut[1], &s.out.t, setup_lse(&s));
        for (int i = 1; i < 3; i++) {
            attend_slice(&s, cut[i], cut[i + 1], &part.t, part_lse);
            for (int ith = 0, nth = rnd_int(1, 5); ith < nth; ith++)
                CHECK_RESULT(psa_merge(&s.out.t, setup_lse(&s), &part.t, part_lse, ith, nth), PSA_OK);
        }
        CHECK_ATTENTION(&s, NULL);
        free(part_lse);
        tensor_free(&part);
        setup_free(&s);
    }
}

/* exp of both lse, mixed in double; rows without keys on one side or on both. */
static void merge_reference(double *out, double *lse, const double *part, const double *part_lse, int64_t rows,
                            int64_t Dv) {
    for (int64_t i = 0; i < rows; i++) {
        double top = fmax(lse[i], part_lse[i]), a = exp(lse[i] - top), b = exp(part_lse[i] - top);
        for (int64_t d = 0; d < Dv; d++)
            out[i * Dv + d] = top == -INFINITY ? 0 : (a * out[i * Dv + d] + b * part[i * Dv + d]) / (a + b);
        lse[i] = top == -INFINITY ? top : top + log(a + b);
    }
}

static void merge_types(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        int64_t Dv = 8 * rnd_int(1, 8), N = rnd_int(1, 50), H = rnd_int(1, 3), B = rnd_int(1, 2), rows = N * H * B;
        psa_type type = (psa_type)(r % 3), part_type = (psa_type)rnd_int(0, 2);
        guarded lse = guarded_new((size_t)rows * sizeof(float), 0);
        float *at = (float *)guarded_data(&lse), *part_lse = (float *)xmalloc((size_t)rows * sizeof *part_lse);
        tensor source = tensor_input(type, LAYOUT_PLAIN, Dv, N, H, B, 1),
               out = tensor_output(type, LAYOUT_RANDOM, Dv, N, H, B);
        tensor part = tensor_input(part_type, LAYOUT_RANDOM, Dv, N, H, B, 1);
        for (int64_t i = 0; i < rows; i++) {
            at[i] = rnd_chance(20) ? -INFINITY : (float)(20 * rnd_normal());
            part_lse[i] = rnd_chance(20) ? -INFINITY : (float)((rnd_chance(50) ? at[i] : 0) + rnd_normal());
            for (int64_t d = 0; d < Dv; d++) {
                double value = at[i] == -INFINITY ? 0 : source.x[i * Dv + d];
                source.x[i * Dv + d] = value;
                value_store(type, tensor_at(&out.t, d, i % N, i / N % H, i / N / H), value);
                if (part_lse[i] == -INFINITY)
                    tensor_set(&part, d, i % N, i / N % H, i / N / H, 0);
            }
        }
        double *want_lse = doubles_of(at, (size_t)rows), *other = doubles_of(part_lse, (size_t)rows);
        for (int ith = 0, nth = rnd_int(1, 7); ith < nth; ith++)
            CHECK_RESULT(psa_merge(&out.t, at, &part.t, part_lse, ith, nth), PSA_OK);
        merge_reference(source.x, want_lse, part.x, other, rows, Dv);
        double *got = tensor_values(&out.t), *got_lse = doubles_of(at, (size_t)rows);
        COMPARE("merged out", got, source.x, rows * Dv, tolerance_of(type));
        COMPARE("merged lse", got_lse, want_lse, rows, tolerance_of(PSA_F32));
        CHECK(guarded_intact(&lse) && tensor_guards_intact(&out), "bytes outside the rows were written");
        free(part_lse), free(want_lse), free(other), free(got), free(got_lse);
        guarded_free(&lse);
        tensor_free(&source), tensor_free(&out), tensor_free(&part);
    }
}

/* ---- the one call ---- */

static psa_desc desc_any_method(const shape *x) {
    psa_desc d = desc_random_blocks(x);
    d.score = (psa_score_kind)rnd_int(PSA_SCORE_SAMPLE, PSA_SCORE_EXACT);
    d.mask = (psa_mask_kind)rnd_int(PSA_MASK_TOPK, PSA_MASK_DENSE);
    d.skip_mean = rnd_chance(30);
    d.sink = rnd_chance(30);
    d.block_q = 16 * rnd_int(1, 4);
    if (rnd_chance(30)) {
        d.n_sim_min = rnd_int(1, 3);
        for (int i = 0; i < d.n_sim_min; i++)
            d.sim_min[i] = rnd_uniform() - .5;
    }
    return d;
}

static void check_stats(const psa_stats *got, const psa_stats *want) {
    CHECK(fabs(got->density - want->density) < 1e-12 && fabs(got->sparsity - want->sparsity) < 1e-12,
          "density %g, expected %g", got->density, want->density);
    CHECK(got->mul_adds == want->mul_adds, "%.0f, expected %.0f", (double)got->mul_adds, (double)want->mul_adds);
    CHECK(got->dense_mul_adds == want->dense_mul_adds, "%.0f, expected %.0f", (double)got->dense_mul_adds,
          (double)want->dense_mul_adds);
    CHECK(got->pairs == want->pairs, "%d, expected %d", (int)got->pairs, (int)want->pairs);
    for (int i = 0; i <= PSA_MAX_LEVELS; i++)
        CHECK(got->level_blocks[i] == want->level_blocks[i], "slot %d: %d, expected %d", i, (int)got->level_blocks[i],
              (int)want->level_blocks[i]);
}

/* psa_attention with so many threads writes the out and lse that are there now, bit for bit. */
static void check_same_bits(setup *s, int n_threads, psa_extra *extra) {
    double *out = tensor_values(&s->out.t), *lse = doubles_of(setup_lse(s), s->lse.size / sizeof(float));
    setup_poison_outputs(s);
    s->desc.n_threads = n_threads;
    CHECK_RESULT(psa_attention(&s->desc, &s->q.t, &s->k.t, &s->v.t, &s->out.t, extra), PSA_OK);
    double *got = tensor_values(&s->out.t), *got_lse = doubles_of(setup_lse(s), s->lse.size / sizeof(float));
    CHECK(!memcmp(out, got, (size_t)tensor_count(&s->out.t) * sizeof *out), "out differs with %d threads", n_threads);
    CHECK(!memcmp(lse, got_lse, s->lse.size / sizeof(float) * sizeof *lse), "lse differs with %d threads", n_threads);
    free(out), free(lse), free(got), free(got_lse);
}

/* psa_attention with any threads gives the bits of the four stages. */
static void one_call_case(setup *s, int n_threads) {
    size_t map = psa_map_size(&s->plan);
    psa_stats want;
    psa_extra extra;
    guarded levels = guarded_new(map, 1), scores = guarded_new(map * sizeof(float), 0);
    memset(&extra, 0, sizeof extra);
    extra.lse = setup_lse(s), extra.levels = (uint8_t *)guarded_data(&levels),
    extra.scores = (float *)guarded_data(&scores);
    run_pool(s, 1);
    if (s->desc.mask != PSA_MASK_DENSE)
        run_score(s, 1);
    run_mask(s, 1);
    run_attend(s, setup_levels(s), 1);
    CHECK_ATTENTION(s, setup_levels(s));
    check_same_bits(s, n_threads, &extra);
    CHECK(!memcmp(guarded_data(&levels), setup_levels(s), map), "levels differ");
    if (s->desc.mask != PSA_MASK_DENSE)
        CHECK(!memcmp(guarded_data(&scores), setup_scores(s), map * sizeof(float)), "scores differ");
    else
        CHECK(guarded_untouched(&scores), "scores of a dense plan were written");
    oracle_stats(&s->o, setup_levels(s), -1, -1, &want);
    check_stats(&extra.stats, &want);
    CHECK(guarded_intact(&levels) && guarded_intact(&scores), "guard bytes were written");
    CHECK_GUARDS(s);
    guarded_free(&levels), guarded_free(&scores);
}

static void one_call_random(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_any_method(&x);
        if (!setup_init(&s, &desc, &x))
            continue;
        one_call_case(&s, rnd_int(1, 4));
        setup_free(&s);
    }
}

/* Inputs may repeat: strides of 0 over heads, batches and tokens. */
static void one_call_broadcast(void) {
    for (int r = 0; r < test_rounds(40); r++) {
        rnd_round(r);
        setup s;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        x.B = 2, x.layout = LAYOUT_PLAIN;
        all_levels(&desc);
        if (!setup_init(&s, &desc, &x))
            continue;
        tensor *in[3] = {&s.q, &s.k, &s.v};
        for (int i = 0; i < 3; i++) {
            in[i]->t.nb[rnd_int(1, 3)] = 0;
            free(in[i]->x);
            in[i]->x = tensor_values(&in[i]->t);
        }
        oracle_init(&s.o, &desc, x.B, x.Hq, x.Hkv, x.Nq, x.Nk, x.D, x.Dv, s.q.x, s.k.x, s.v.x);
        s.o.type = s.k.t.type;
        if (CHECK_RESULT(psa_plan_init(&s.plan, &desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t), PSA_OK)) {
            one_call_case(&s, 2);
            CHECK_RANDOM_LEVELS(&s, 30);
        }
        setup_free(&s);
    }
}

/* The caller's own map through psa_attention; also without extra. */
static void one_call_levels_given(void) {
    for (int r = 0; r < test_rounds(30); r++) {
        rnd_round(r);
        setup s;
        psa_extra extra;
        psa_stats want;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        all_levels(&desc);
        desc.n_threads = rnd_int(1, 3);
        if (!setup_init(&s, &desc, &x))
            continue;
        random_levels(&s.plan, desc.block_k, 40, setup_levels(&s));
        memset(&extra, 0, sizeof extra);
        extra.levels = setup_levels(&s), extra.levels_given = 1, extra.lse = setup_lse(&s),
        extra.scores = setup_scores(&s);
        CHECK_RESULT(psa_attention(&desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, &extra), PSA_OK);
        CHECK_ATTENTION(&s, setup_levels(&s));
        CHECK(guarded_untouched(&s.scores), "scores were written though levels were given");
        oracle_stats(&s.o, setup_levels(&s), -1, -1, &want);
        check_stats(&extra.stats, &want);
        desc.mask = PSA_MASK_DENSE;
        setup_poison_outputs(&s);
        CHECK_RESULT(psa_attention(&desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, NULL), PSA_OK);
        CHECK(guarded_untouched(&s.lse), "lse was written");
        run_attend(&s, NULL, 1);
        CHECK_ATTENTION(&s, NULL);
        setup_free(&s);
    }
}

/* Few queries against many keys, one dense call: heads go together, keys are split, any threads give the same bits. */
static void one_call_decode(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        psa_extra extra;
        psa_stats want;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        x.Nq = rnd_int(1, 12), x.Nk = rnd_chance(70) ? rnd_int(1, 5000) : rnd_int(1, 100);
        x.Hq = x.Hkv * rnd_int(1, 8);
        desc.mask = PSA_MASK_DENSE;
        if (!setup_init(&s, &desc, &x))
            continue;
        run_mask(&s, 1);
        oracle_stats(&s.o, setup_levels(&s), -1, -1, &want);
        memset(&extra, 0, sizeof extra);
        extra.lse = setup_lse(&s);
        s.desc.n_threads = 1;
        CHECK_RESULT(psa_attention(&s.desc, &s.q.t, &s.k.t, &s.v.t, &s.out.t, &extra), PSA_OK);
        CHECK_ATTENTION(&s, NULL);
        check_stats(&extra.stats, &want);
        check_same_bits(&s, rnd_int(2, 9), &extra);
        CHECK_GUARDS(&s);
        setup_free(&s);
    }
}

/* A zeroed desc works, and does what its defaults say. */
static void one_call_zero_desc(void) {
    setup s;
    psa_desc desc;
    shape x;
    memset(&desc, 0, sizeof desc);
    memset(&x, 0, sizeof x);
    x.B = 1, x.Hq = 2, x.Hkv = 1, x.Nq = 300, x.Nk = 700, x.D = x.Dv = 64;
    if (!setup_init(&s, &desc, &x))
        return;
    CHECK(s.plan.desc.block_q == 128 && s.plan.desc.block_k == 64, "%d/%d", s.plan.desc.block_q, s.plan.desc.block_k);
    CHECK(s.plan.nq == 3 && s.plan.nk == 11 && s.plan.n_levels == 7, "%d %d %d", (int)s.plan.nq, (int)s.plan.nk,
          s.plan.n_levels);
    CHECK(s.plan.n_sample_q == 32 && s.plan.n_sample_k == 16, "%d %d", s.plan.n_sample_q, s.plan.n_sample_k);
    CHECK(s.plan.desc.n_threads >= 1, "%d", s.plan.desc.n_threads);
    psa_isa best = psa_isa_detect();
    best = best == PSA_ISA_AMX ? PSA_ISA_AVX512 : best == PSA_ISA_NEON_BF16 ? PSA_ISA_NEON : best; /* of f32 */
    CHECK(s.plan.desc.isa == best, "%d", (int)s.plan.desc.isa);
    one_call_case(&s, 0);
    setup_free(&s);
}

static void attend_stats(void) {
    for (int r = 0; r < test_rounds(60); r++) {
        rnd_round(r);
        setup s;
        psa_stats got, want;
        shape x = shape_random();
        psa_desc desc = desc_random_blocks(&x);
        all_levels(&desc);
        if (!setup_init(&s, &desc, &x))
            continue;
        random_levels(&s.plan, desc.block_k, 40, setup_levels(&s));
        int64_t b = rnd_int(0, (int)x.B - 1), h = rnd_int(0, (int)x.Hq - 1);
        memset(&got, 0xa5, sizeof got);
        CHECK_RESULT(psa_stats_from_levels(&s.plan, setup_levels(&s), b, h, &got), PSA_OK);
        oracle_stats(&s.o, setup_levels(&s), b, h, &want);
        check_stats(&got, &want);
        CHECK_RESULT(psa_stats_from_levels(&s.plan, setup_levels(&s), -1, -1, &got), PSA_OK);
        oracle_stats(&s.o, setup_levels(&s), -1, -1, &want);
        check_stats(&got, &want);
        setup_free(&s);
    }
}

const test_case tests_attend[] = {
    {"attend/random", attend_random},
    {"attend/every_isa", attend_every_isa},
    {"attend/head_sizes", attend_head_sizes},
    {"attend/after_groups", attend_after_groups},
    {"attend/causal", attend_causal},
    {"attend/few", attend_few},
    {"attend/large", attend_large},
    {"attend/decode", attend_decode},
    {"attend/dense", attend_dense},
    {"attend/head_copy", attend_head_copy},
    {"attend/no_map", attend_no_map},
    {"attend/empty_rows", attend_empty_rows},
    {"attend/mul_adds", attend_mul_adds},
    {"attend/nan_stays_local", attend_nan},
    {"attend/huge_logits", attend_huge_logits},
    {"attend/rising_logits", attend_rising_logits},
    {"attend/denormal", attend_denormal},
    {"attend/stats", attend_stats},
    {"merge/slices", merge_slices},
    {"merge/types", merge_types},
    {"one_call/decode", one_call_decode},
    {"one_call/equals_stages", one_call_random},
    {"one_call/broadcast", one_call_broadcast},
    {"one_call/levels_given", one_call_levels_given},
    {"one_call/zero_desc", one_call_zero_desc},
    {NULL, NULL},
};
