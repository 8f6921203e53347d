/* test_convert.c - f16 and bf16 as q, k, v and out: every bit pattern, every rounding case, on every instruction set.
 */
#include "test.h"

/* psa_attend treats f32 denormals as zero (psa.h, NUMERICS): values this small may come out as 0. */
static const double smallest_normal = 1.1754943508222875e-38;

static int same_value(double got, psa_type type, double exact) {
    double want = value_round(type, exact);
    if (isnan(want))
        return isnan(got);
    return got == want || (fabs(exact) < smallest_normal && got == 0);
}

/* All 65536 patterns of a 16-bit type as a tensor [1][256][1][256]. */
static tensor all_patterns(psa_type type) {
    tensor t = tensor_input(type, LAYOUT_PLAIN, 256, 1, 256, 1, 1);
    for (int i = 0; i < 65536; i++) {
        uint16_t bits = (uint16_t)i;
        memcpy((char *)t.t.data + 2 * i, &bits, 2);
    }
    free(t.x);
    t.x = tensor_values(&t.t);
    return t;
}

static psa_desc desc_plain(psa_isa isa) {
    psa_desc d;
    memset(&d, 0, sizeof d);
    d.isa = isa;
    d.n_threads = 1;
    return d;
}

/* One key: the weight is 1 and out is v. */
static void check_values(const tensor *v, psa_type out_type, psa_isa isa) {
    tensor q = tensor_input(PSA_F32, LAYOUT_PLAIN, 8, 1, v->t.ne[2], 1, 1),
           k = tensor_input(v->t.type, LAYOUT_PLAIN, 8, 1, v->t.ne[2], 1, 1);
    tensor out = tensor_output(out_type, LAYOUT_RANDOM, v->t.ne[0], 1, v->t.ne[2], 1);
    psa_desc desc = desc_plain(isa);
    int wrong = 0, first = 0;
    CHECK_RESULT(psa_attention(&desc, &q.t, &k.t, &v->t, &out.t, NULL), PSA_OK);
    double *got = tensor_values(&out.t);
    for (int i = (int)tensor_count(&v->t) - 1; i >= 0; i--)
        if (!same_value(got[i], out_type, v->x[i]))
            wrong++, first = i;
    CHECK(wrong == 0, "%s, type %d to %d: %d wrong, the first: %.12g became %.12g, expected %.12g", psa_isa_name(isa),
          (int)v->t.type, (int)out_type, wrong, v->x[first], got[first], value_round(out_type, v->x[first]));
    CHECK(tensor_guards_intact(&out), "bytes outside the rows were written");
    free(got);
    tensor_free(&q), tensor_free(&k), tensor_free(&out);
}

static void convert_patterns(void) {
    for (int type = PSA_F16; type <= PSA_BF16; type++) {
        tensor v = all_patterns((psa_type)type);
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
            for (int out = PSA_F32; psa_isa_supported((psa_isa)isa) && out <= PSA_BF16; out++)
                check_values(&v, (psa_type)out, (psa_isa)isa);
        tensor_free(&v);
    }
}

/* Every value of the type with its neighbours in f32 and the ties halfway to the next one. */
static void convert_rounding(void) {
    for (int type = PSA_F16; type <= PSA_BF16; type++) {
        tensor all = all_patterns((psa_type)type);
        for (int step = 0; step < 6; step++) {
            double *x = (double *)xmalloc(65536 * sizeof *x);
            for (int i = 0; i < 65536; i++) {
                double a = all.x[i], b = all.x[(i & 0x7fff) == 0x7fff ? i : i + 1], middle = (a + b) / 2;
                float f = (float)(isfinite(middle) ? middle : a);
                x[i] = (double)(step == 0   ? f
                                : step == 1 ? nextafterf(f, INFINITY)
                                : step == 2 ? nextafterf(f, -INFINITY)
                                : step == 3 ? nextafterf((float)a, INFINITY)
                                : step == 4 ? nextafterf((float)a, -INFINITY)
                                            : (float)(a * 1.25));
            }
            tensor v = tensor_from(PSA_F32, LAYOUT_PLAIN, 256, 1, 256, 1, x);
            for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
                if (psa_isa_supported((psa_isa)isa))
                    check_values(&v, (psa_type)type, (psa_isa)isa);
            tensor_free(&v);
            free(x);
        }
        tensor_free(&all);
    }
}

/* The finite patterns, so large that the logarithm's base still fits; 0 in place of the others. */
static double *moderate_patterns(psa_type type) {
    tensor all = all_patterns(type);
    double *x = all.x;
    for (int i = 0; i < 65536; i++)
        if (!(fabs(x[i]) < 1e38))
            x[i] = 0;
    all.x = NULL;
    tensor_free(&all);
    return x;
}

static tensor identity(psa_type type, int64_t D, int64_t N, int64_t H) {
    double *x = (double *)xmalloc((size_t)(D * N * H) * sizeof *x);
    for (int64_t i = 0; i < D * N * H; i++)
        x[i] = i % D == i / D % D;
    tensor t = tensor_from(type, LAYOUT_PLAIN, D, N, H, 1, x);
    free(x);
    return t;
}

/* One key, or several equal ones read as one: lse is the logit, and the logit is one number of q or k. */
static void check_lse(const psa_tensor *q, const psa_tensor *k, const double *want, psa_isa isa) {
    psa_plan plan;
    psa_desc desc = desc_plain(isa);
    int64_t rows = q->ne[1] * q->ne[2];
    int level = k->ne[1] > 1 ? 16 : 1, wrong = 0, first = 0;
    tensor v = tensor_input(k->type, LAYOUT_PLAIN, 8, k->ne[1], k->ne[2], 1, 1),
           out = tensor_output(PSA_F32, LAYOUT_PLAIN, 8, q->ne[1], q->ne[2], 1);
    float *lse = (float *)xmalloc((size_t)rows * sizeof *lse);
    desc.scale = 1, desc.block_k = 16;
    if (CHECK_RESULT(psa_plan_init(&plan, &desc, q, k, &v.t, &out.t), PSA_OK)) {
        void *work = xmalloc(psa_work_size(&plan));
        uint8_t *levels = (uint8_t *)xmalloc(psa_map_size(&plan));
        memset(levels, level, psa_map_size(&plan));
        CHECK_RESULT(psa_pool(&plan, k->data, v.t.data, work, 0, 1), PSA_OK);
        CHECK_RESULT(psa_attend(&plan, q->data, k->data, v.t.data, levels, work, out.t.data, lse, 0, 1), PSA_OK);
        free(work), free(levels);
        for (int64_t i = rows - 1; i >= 0; i--) {
            double expected = want[i] + log((double)k->ne[1]), error = fabs((double)lse[i] - expected);
            if (!(error <= 5e-7 * fabs(expected) + (level > 1 ? 5e-7 : 2 * smallest_normal)))
                wrong++, first = (int)i;
        }
        CHECK(wrong == 0, "%s: %d wrong, the first: %.9g, expected %.9g", psa_isa_name(isa), wrong, (double)lse[first],
              want[first]);
    }
    free(lse);
    tensor_free(&v), tensor_free(&out);
}

/* Keys hold the patterns, 256 to a head; query i is the i-th unit vector, the same for every head. */
static void key_patterns(psa_type type, psa_isa isa, int64_t repeats) {
    double *x = moderate_patterns(type);
    tensor k = tensor_from(type, LAYOUT_PLAIN, 256, 1, 256, 1, x), q = identity(PSA_F32, 256, 256, 1);
    k.t.ne[1] = repeats, k.t.nb[1] = 0;
    q.t.ne[2] = 256, q.t.nb[2] = 0;
    check_lse(&q.t, &k.t, x, isa);
    free(x);
    tensor_free(&k), tensor_free(&q);
}

/* Queries hold the patterns, 8 to a row; the key of head j is the j-th unit vector. */
static void query_patterns(psa_type type, psa_isa isa) {
    double *x = moderate_patterns(type), *want = (double *)xmalloc(65536 * sizeof *want);
    tensor q = tensor_from(type, LAYOUT_PLAIN, 8, 8192, 1, 1, x), k = identity(PSA_F32, 8, 8, 1);
    k.t.ne[1] = 1, k.t.ne[2] = 8, k.t.nb[2] = k.t.nb[1];
    q.t.ne[2] = 8, q.t.nb[2] = 0;
    for (int i = 0; i < 65536; i++)
        want[i] = x[i % 8192 * 8 + i / 8192];
    check_lse(&q.t, &k.t, want, isa);
    free(x), free(want);
    tensor_free(&k), tensor_free(&q);
}

static void convert_logits(void) {
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
        for (int type = PSA_F16; psa_isa_supported((psa_isa)isa) && type <= PSA_BF16; type++) {
            key_patterns((psa_type)type, (psa_isa)isa, 1);
            query_patterns((psa_type)type, (psa_isa)isa);
        }
}

static void convert_pooled(void) {
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
        for (int type = PSA_F16; psa_isa_supported((psa_isa)isa) && type <= PSA_BF16; type++)
            key_patterns((psa_type)type, (psa_isa)isa, type == PSA_F16 ? 16 : 2);
}

/* The tests' own conversion is the inverse of itself on every pattern. */
static void convert_own(void) {
    for (int type = PSA_F16; type <= PSA_BF16; type++)
        for (int i = 0; i < 65536; i++) {
            uint16_t bits = (uint16_t)i, back;
            double x = value_load((psa_type)type, &bits);
            value_store((psa_type)type, &back, x);
            CHECK(isnan(x) || back == bits, "%04x became %g and %04x", i, x, back);
        }
    uint16_t one_f16 = 0x3c00, one_bf16 = 0x3f80, third_f16 = 0x3555, third_bf16 = 0x3eab, got;
    CHECK(value_load(PSA_F16, &one_f16) == 1 && value_load(PSA_BF16, &one_bf16) == 1, "1");
    value_store(PSA_F16, &got, 1.0 / 3);
    CHECK(got == third_f16, "%04x", got);
    value_store(PSA_BF16, &got, 1.0 / 3);
    CHECK(got == third_bf16, "%04x", got);
}

const test_case tests_convert[] = {
    {"convert/own", convert_own},
    {"convert/patterns", convert_patterns},
    {"convert/rounding", convert_rounding},
    {"convert/logits", convert_logits},
    {"convert/pooled", convert_pooled},
    {NULL, NULL},
};
