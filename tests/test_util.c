/* test_util.c - memory with guards, element types, tensors, comparisons, and one attention call with everything around
 * it. */
#include "test.h"

/* ---- memory ---- */

enum { GUARD = 64, POISON = 0xff }; /* NaN in every type, and no level */

void *xmalloc(size_t size) {
    void *p = malloc(size ? size : 1);
    if (!p) {
        fprintf(stderr, "test_psa: out of memory\n");
        exit(2);
    }
    return p;
}

static int all_poison(const unsigned char *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (p[i] != POISON)
            return 0;
    return 1;
}

guarded guarded_new(size_t size, size_t shift) {
    guarded g = {NULL, size, shift};
    g.base = (unsigned char *)xmalloc(size + shift + 2 * GUARD);
    memset(g.base, POISON, size + shift + 2 * GUARD);
    return g;
}

void *guarded_data(const guarded *g) { return g->base + GUARD + g->shift; }

int guarded_intact(const guarded *g) {
    return all_poison(g->base, GUARD + g->shift) && all_poison(g->base + GUARD + g->shift + g->size, GUARD);
}

int guarded_untouched(const guarded *g) { return all_poison(g->base, g->size + g->shift + 2 * GUARD); }

void guarded_free(guarded *g) {
    free(g->base);
    g->base = NULL;
}

/* ---- element types ---- */

typedef struct format {
    int bits, min_exponent;
    double max;
} format;

static format format_of(psa_type type) {
    static const format f32 = {24, -126, 3.4028234663852886e38}, f16 = {11, -14, 65504},
                        bf16 = {8, -126, 3.3895313892515355e38};
    return type == PSA_F32 ? f32 : type == PSA_F16 ? f16 : bf16;
}

double value_round(psa_type type, double x) {
    format f = format_of(type);
    int exponent;
    if (x == 0 || isnan(x) || isinf(x))
        return x;
    frexp(x, &exponent);
    exponent = exponent - 1 < f.min_exponent ? f.min_exponent : exponent - 1;
    double unit = ldexp(1, exponent - f.bits + 1), r = rint(x / unit) * unit;
    return fabs(r) > f.max ? copysign(INFINITY, x) : copysign(r, x);
}

/* The 16 bits of a value that the type holds exactly. */
static uint16_t half_bits(psa_type type, double x) {
    format f = format_of(type);
    int mantissa_bits = f.bits - 1, exponent, top = type == PSA_F16 ? 31 : 255;
    unsigned sign = signbit(x) ? 0x8000u : 0;
    double a = fabs(x);
    if (isnan(x) || isinf(x))
        return (uint16_t)(sign | (unsigned)(top << mantissa_bits) | (isnan(x) ? 1u << (mantissa_bits - 1) : 0));
    if (a < ldexp(1, f.min_exponent))
        return (uint16_t)(sign | (unsigned)ldexp(a, mantissa_bits - f.min_exponent));
    frexp(a, &exponent);
    unsigned mantissa = (unsigned)(ldexp(a, mantissa_bits - exponent + 1) - ldexp(1, mantissa_bits));
    return (uint16_t)(sign | (unsigned)((exponent - f.min_exponent) << mantissa_bits) | mantissa);
}

static double half_value(psa_type type, uint16_t bits) {
    format f = format_of(type);
    int mantissa_bits = f.bits - 1, top = type == PSA_F16 ? 31 : 255;
    int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
    double a;
    if (exponent == top)
        a = mantissa ? NAN : INFINITY;
    else if (exponent == 0)
        a = ldexp(mantissa, f.min_exponent - mantissa_bits);
    else
        a = ldexp(mantissa + (1 << mantissa_bits), exponent - 1 + f.min_exponent - mantissa_bits);
    return bits & 0x8000 ? -a : a;
}

void value_store(psa_type type, void *at, double x) {
    float wide = (float)x;
    uint16_t bits = type == PSA_F32 ? 0 : half_bits(type, value_round(type, x));
    memcpy(at, type == PSA_F32 ? (void *)&wide : (void *)&bits, type == PSA_F32 ? 4 : 2);
}

double value_load(psa_type type, const void *at) {
    float wide;
    uint16_t bits;
    if (type == PSA_F32) {
        memcpy(&wide, at, 4);
        return (double)wide;
    }
    memcpy(&bits, at, 2);
    return half_value(type, bits);
}

/* ---- tensors ---- */

static size_t element_size(psa_type type) { return type == PSA_F32 ? 4 : 2; }

int64_t tensor_count(const psa_tensor *t) { return t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]; }

void *tensor_at(const psa_tensor *t, int64_t d, int64_t n, int64_t h, int64_t b) {
    return (char *)t->data + (size_t)d * t->nb[0] + (size_t)n * t->nb[1] + (size_t)h * t->nb[2] + (size_t)b * t->nb[3];
}

/* Strides for a random order of the outer axes with gaps; returns the bytes from the first element to the end. */
static size_t random_strides(psa_tensor *t) {
    int axis[3] = {1, 2, 3};
    size_t stride = (size_t)t->ne[0] * t->nb[0];
    for (int i = 2; i > 0; i--) {
        int j = rnd_int(0, i), swap = axis[i];
        axis[i] = axis[j], axis[j] = swap;
    }
    for (int i = 0; i < 3; i++) {
        stride += rnd_chance(50) ? (size_t)rnd_int(0, 9) : 0;
        t->nb[axis[i]] = stride;
        stride *= (size_t)t->ne[axis[i]];
    }
    return stride;
}

static tensor tensor_new(psa_type type, layout layout, int64_t D, int64_t N, int64_t H, int64_t B) {
    tensor a;
    size_t span = (size_t)(D * N * H * B) * element_size(type);
    memset(&a, 0, sizeof a);
    a.t = psa_tensor_4d(NULL, type, D, N, H, B);
    if (layout == LAYOUT_RANDOM) {
        span = random_strides(&a.t);
        a.start = (size_t)rnd_int(0, 5);
    }
    a.start += GUARD;
    a.size = a.start + span;
    a.memory = (unsigned char *)xmalloc(a.size + GUARD);
    memset(a.memory, POISON, a.size + GUARD);
    a.t.data = a.memory + a.start;
    return a;
}

static void store_values(const psa_tensor *t, const double *x) {
    for (int64_t b = 0; b < t->ne[3]; b++)
        for (int64_t h = 0; h < t->ne[2]; h++)
            for (int64_t n = 0; n < t->ne[1]; n++)
                for (int64_t d = 0; d < t->ne[0]; d++)
                    value_store(t->type, tensor_at(t, d, n, h, b), *x++);
}

tensor tensor_from(psa_type type, layout layout, int64_t D, int64_t N, int64_t H, int64_t B, const double *values) {
    tensor a = tensor_new(type, layout, D, N, H, B);
    store_values(&a.t, values);
    a.x = tensor_values(&a.t);
    /* Only now cut the allocation to its last element, where a sanitizer sees reads past the end. */
    const unsigned char *last = (const unsigned char *)tensor_at(&a.t, D - 1, N - 1, H - 1, B - 1);
    size_t exact = (size_t)(last - a.memory) + element_size(type);
    unsigned char *cut = (unsigned char *)xmalloc(exact);
    memcpy(cut, a.memory, exact);
    free(a.memory);
    a.memory = cut;
    a.t.data = cut + a.start;
    a.size = exact;
    return a;
}

tensor tensor_input(psa_type type, layout layout, int64_t D, int64_t N, int64_t H, int64_t B, double spread) {
    double *x = (double *)xmalloc((size_t)(D * N * H * B) * sizeof *x);
    for (int64_t i = 0; i < D * N * H * B; i++)
        x[i] = spread * rnd_normal();
    tensor a = tensor_from(type, layout, D, N, H, B, x);
    free(x);
    return a;
}

tensor tensor_output(psa_type type, layout layout, int64_t D, int64_t N, int64_t H, int64_t B) {
    return tensor_new(type, layout, D, N, H, B);
}

void tensor_free(tensor *a) {
    free(a->x);
    free(a->memory);
    memset(a, 0, sizeof *a);
}

void tensor_set(tensor *a, int64_t d, int64_t n, int64_t h, int64_t b, double value) {
    const int64_t *ne = a->t.ne;
    value_store(a->t.type, tensor_at(&a->t, d, n, h, b), value);
    a->x[((b * ne[2] + h) * ne[1] + n) * ne[0] + d] = value_round(a->t.type, value);
}

double *tensor_values(const psa_tensor *t) {
    double *x = (double *)xmalloc((size_t)tensor_count(t) * sizeof *x), *to = x;
    for (int64_t b = 0; b < t->ne[3]; b++)
        for (int64_t h = 0; h < t->ne[2]; h++)
            for (int64_t n = 0; n < t->ne[1]; n++)
                for (int64_t d = 0; d < t->ne[0]; d++)
                    *to++ = value_load(t->type, tensor_at(t, d, n, h, b));
    return x;
}

int tensor_guards_intact(const tensor *a) {
    unsigned char *copy = (unsigned char *)xmalloc(a->size + GUARD);
    psa_tensor t = a->t;
    memcpy(copy, a->memory, a->size + GUARD);
    t.data = copy + a->start;
    for (int64_t b = 0; b < t.ne[3]; b++)
        for (int64_t h = 0; h < t.ne[2]; h++)
            for (int64_t n = 0; n < t.ne[1]; n++)
                memset(tensor_at(&t, 0, n, h, b), POISON, (size_t)t.ne[0] * t.nb[0]);
    int intact = all_poison(copy, a->size + GUARD);
    free(copy);
    return intact;
}

int tensor_untouched(const tensor *a) { return all_poison(a->memory, a->size + GUARD); }

/* ---- comparisons ---- */

/* Each f32 output is a weighted mean of values near 1, made of up to a few hundred products, each good to 2^-24, and of
 * weights exp(x) whose relative error is the error of the logit (a few 1e-6 where |logit| is 10): 2e-5 in the worst
 * case. f16 and bf16 add half a unit in the last place of their own, and half the smallest subnormal. */
tolerance tolerance_of(psa_type type) {
    static const tolerance f32 = {2e-5, 1e-5}, f16 = {2e-5 + 3e-8, 1e-5 + 1.0 / 2048}, bf16 = {2e-5, 1e-5 + 1.0 / 256};
    return type == PSA_F32 ? f32 : type == PSA_F16 ? f16 : bf16;
}

double compare(const char *file, int line, const char *what, const double *got, const double *want, int64_t n,
               tolerance t) {
    double worst_excess = 0, worst_error = 0, noise = 0, signal = 0;
    int64_t worst = -1;
    for (int64_t i = 0; i < n; i++) {
        if (got[i] == want[i] || (isnan(got[i]) && isnan(want[i])))
            continue;
        double error = fabs(got[i] - want[i]), excess = error / (t.absolute + t.relative * fabs(want[i]));
        if (!(excess <= worst_excess)) {
            worst = i;
            worst_excess = isnan(excess) ? INFINITY : excess;
        }
        if (!(error <= worst_error))
            worst_error = isnan(error) ? INFINITY : error;
        noise += error * error;
        signal += want[i] * want[i];
    }
    /* The mean is far below the worst case: a tenth of the tolerance, for the whole of the output. */
    double nmse = signal > 0 ? noise / signal : 0, limit = (t.absolute + t.relative) * (t.absolute + t.relative);
    test_check(worst_excess <= 1, file, line, what, "element %d of %d: got %.9g, expected %.9g, error %.3g", (int)worst,
               (int)n, worst < 0 ? 0 : got[worst], worst < 0 ? 0 : want[worst], worst_error);
    if (n >= 64 && signal > 1e-6 * (double)n && isfinite(signal))
        test_check(nmse <= limit, file, line, what, "NMSE %.3g over %d elements, expected at most %.3g", nmse, (int)n,
                   limit);
    return worst_error;
}

double *doubles_of(const float *x, size_t n) {
    double *to = (double *)xmalloc(n * sizeof *to);
    for (size_t i = 0; i < n; i++) {
        float value;
        memcpy(&value, (const char *)x + i * sizeof value, sizeof value);
        to[i] = (double)value;
    }
    return to;
}

/* ---- orders ---- */

int is_permutation(const int32_t *index, int64_t n) {
    char *seen = (char *)calloc((size_t)n, 1);
    int ok = seen != NULL;
    for (int64_t i = 0; ok && i < n; i++) {
        ok = index[i] >= 0 && index[i] < n && !seen[index[i]];
        if (ok)
            seen[index[i]] = 1;
    }
    free(seen);
    return ok;
}

int64_t order_at(const psa_order *order, int64_t b, int64_t h, int64_t p) {
    return order->index ? order->index[b * order->stride_b + h * order->stride_h + p] : p;
}

double *permuted(const double *x, const psa_order *order, int64_t B, int64_t H, int64_t N, int64_t D, int back) {
    double *to = (double *)xmalloc((size_t)(B * H * N * D) * sizeof *to);
    for (int64_t row = 0; row < B * H; row++)
        for (int64_t p = 0; p < N; p++) {
            int64_t token = order_at(order, row / H, row % H, p);
            memcpy(to + (row * N + (back ? token : p)) * D, x + (row * N + (back ? p : token)) * D,
                   (size_t)D * sizeof *to);
        }
    return to;
}

/* ---- one attention call ---- */

static psa_type random_type(void) { return (psa_type)rnd_int(PSA_F32, PSA_BF16); }

static int64_t random_head(void) {
    return 8 * (rnd_chance(15) ? rnd_int(1, 32) : rnd_chance(50) ? rnd_int(1, 4) : rnd_int(1, 10));
}

shape shape_random(void) {
    shape s;
    memset(&s, 0, sizeof s);
    s.Hkv = rnd_int(1, 2);
    s.Hq = s.Hkv * rnd_int(1, 3);
    s.B = rnd_chance(25) ? 2 : 1;
    s.Nq = rnd_chance(20) ? rnd_int(1, 8) : rnd_int(1, 200);
    s.Nk = rnd_chance(20) ? rnd_int(1, 40) : rnd_int(1, 300);
    s.D = random_head();
    s.Dv = rnd_chance(60) ? s.D : random_head();
    s.layout = rnd_chance(70) ? LAYOUT_RANDOM : LAYOUT_PLAIN;
    if (rnd_chance(60))
        s.type_q = random_type(), s.type_kv = random_type(), s.type_out = random_type();
    return s;
}

psa_desc desc_random_blocks(const shape *s) {
    psa_desc d;
    memset(&d, 0, sizeof d);
    d.block_q = rnd_chance(50) ? 16 * rnd_int(1, 4) : rnd_int(16, 256);
    d.block_k = 16 << rnd_int(0, 3);
    d.causal = rnd_chance(40);
    d.scale = rnd_chance(30) ? (float)((2 * rnd_uniform() - 1) / sqrt((double)s->D)) : 0;
    d.isa = isa_random();
    d.n_threads = 7;
    d.seed = rnd_u64();
    return d;
}

void desc_random_recipe(psa_desc *d) {
    d->causal = 0;
    d->block_q = 16 * rnd_int(1, 4);
    d->score = (psa_score_kind)rnd_int(PSA_SCORE_SAMPLE, PSA_SCORE_EXACT);
    d->mask = (psa_mask_kind)rnd_int(PSA_MASK_TOPK, PSA_MASK_ERROR);
    d->tree = (psa_tree_kind)rnd_int(PSA_TREE_NONE, PSA_TREE_QKV);
    d->metric = (psa_metric_kind)rnd_int(PSA_METRIC_LOGIT, PSA_METRIC_EUCLID);
    d->tilt = rnd_chance(50);
    d->skip_mean = rnd_chance(40);
    if (rnd_chance(60))
        d->density = rnd_chance(90) ? rnd_uniform() + 1e-6 : 1, d->density_per_head = rnd_chance(50);
    if (d->mask != PSA_MASK_ERROR)
        return;
    d->score = rnd_chance(50) ? PSA_SCORE_POOLED : PSA_SCORE_SAMPLE; /* which stands for it */
    d->lambda = d->density > 0 ? 0 : pow(10, -6 * rnd_uniform());
    if (rnd_chance(60)) {
        d->score_group[0] = 1 << rnd_int(0, 4);
        d->score_group[1] = 2 << rnd_int(0, 3);
    }
}

psa_isa isa_random(void) {
    int isa = PSA_ISA_AUTO;
    do
        isa = rnd_int(PSA_ISA_AUTO, PSA_ISA_END - 1);
    while (isa != PSA_ISA_AUTO && !psa_isa_supported((psa_isa)isa));
    return (psa_isa)isa;
}

int setup_init(setup *s, const psa_desc *desc, const shape *x) {
    double spread = x->spread != 0 ? x->spread : 1;
    memset(s, 0, sizeof *s);
    s->desc = *desc;
    s->q = tensor_input(x->type_q, x->layout, x->D, x->Nq, x->Hq, x->B, spread);
    s->k = tensor_input(x->type_kv, x->layout, x->D, x->Nk, x->Hkv, x->B, spread);
    s->v = tensor_input(x->type_kv, x->layout, x->Dv, x->Nk, x->Hkv, x->B, 1);
    s->out = tensor_output(x->type_out, x->layout, x->Dv, x->Nq, x->Hq, x->B);
    oracle_init(&s->o, desc, x->B, x->Hq, x->Hkv, x->Nq, x->Nk, x->D, x->Dv, s->q.x, s->k.x, s->v.x);
    s->o.type = s->k.t.type;
    int ok = CHECK_RESULT(psa_plan_init(&s->plan, desc, &s->q.t, &s->k.t, &s->v.t, &s->out.t), PSA_OK);
    if (!ok) {
        setup_free(s);
        return 0;
    }
    size_t shift = x->layout == LAYOUT_RANDOM ? (size_t)rnd_int(0, 9) : 0, map = psa_map_size(&s->plan);
    CHECK(map == (size_t)oracle_map_size(&s->o), "%d", (int)map);
    s->work = guarded_new(psa_work_size(&s->plan), shift);
    s->scores = guarded_new(map * sizeof(float), 0);
    s->levels = guarded_new(map, shift);
    s->lse = guarded_new((size_t)(x->B * x->Hq * x->Nq) * sizeof(float), 0);
    return 1;
}

void setup_free(setup *s) {
    tensor_free(&s->q);
    tensor_free(&s->k);
    tensor_free(&s->v);
    tensor_free(&s->out);
    guarded_free(&s->work);
    guarded_free(&s->scores);
    guarded_free(&s->levels);
    guarded_free(&s->lse);
}

void setup_poison_outputs(setup *s) {
    memset(s->out.memory, POISON, s->out.size + GUARD);
    memset(guarded_data(&s->lse), POISON, s->lse.size);
}

float *setup_scores(const setup *s) { return (float *)guarded_data(&s->scores); }
uint8_t *setup_levels(const setup *s) { return (uint8_t *)guarded_data(&s->levels); }
float *setup_lse(const setup *s) { return (float *)guarded_data(&s->lse); }

int run_prepare(setup *s, int nth) {
    int ok = 1;
    for (int i = 0; i < nth; i++)
        ok &= CHECK_RESULT(psa_prepare(&s->plan, s->q.t.data, s->k.t.data, guarded_data(&s->work), i, nth), PSA_OK);
    return ok;
}

int run_pool(setup *s, int nth) {
    int ok = 1;
    for (int i = 0; i < nth; i++)
        ok &= CHECK_RESULT(psa_pool(&s->plan, s->k.t.data, s->v.t.data, guarded_data(&s->work), i, nth), PSA_OK);
    return ok;
}

int run_score(setup *s, int nth) {
    int ok = 1;
    for (int i = 0; i < nth; i++)
        ok &= CHECK_RESULT(
            psa_score(&s->plan, s->q.t.data, s->k.t.data, guarded_data(&s->work), setup_scores(s), i, nth), PSA_OK);
    return ok;
}

int run_budget(setup *s, int nth) {
    int ok = 1;
    for (int i = 0; i < nth; i++)
        ok &= CHECK_RESULT(psa_budget(&s->plan, setup_scores(s), guarded_data(&s->work), i, nth), PSA_OK);
    return ok;
}

int run_mask(setup *s, int nth) {
    int ok = 1;
    for (int i = 0; i < nth; i++)
        ok &=
            CHECK_RESULT(psa_mask(&s->plan, setup_scores(s), guarded_data(&s->work), setup_levels(s), i, nth), PSA_OK);
    return ok;
}

void run_levels(setup *s, int nth) {
    run_prepare(s, nth), run_pool(s, nth), run_score(s, nth), run_budget(s, nth), run_mask(s, nth);
}

int run_attend(setup *s, const uint8_t *levels, int nth) {
    int ok = 1;
    for (int i = 0; i < nth; i++)
        ok &= CHECK_RESULT(psa_attend(&s->plan, s->q.t.data, s->k.t.data, s->v.t.data, levels, guarded_data(&s->work),
                                      s->out.t.data, setup_lse(s), i, nth),
                           PSA_OK);
    return ok;
}

void check_guards(const char *file, int line, const setup *s) {
    test_check(tensor_guards_intact(&s->out), file, line, "out", "bytes between or around its rows were written");
    test_check(guarded_intact(&s->work), file, line, "work", "guard bytes were written");
    test_check(guarded_intact(&s->scores), file, line, "scores", "guard bytes were written");
    test_check(guarded_intact(&s->levels), file, line, "levels", "guard bytes were written");
    test_check(guarded_intact(&s->lse), file, line, "lse", "guard bytes were written");
}

tolerance setup_tolerance(const setup *s, psa_type type) {
    tolerance t = tolerance_of(type);
    double largest = 1;
    if ((!s->desc.tilt && s->desc.mask != PSA_MASK_ERROR) || s->k.t.type == PSA_F32)
        return t;
    for (const tensor *x = &s->k; x; x = x == &s->k ? &s->v : NULL)
        for (int64_t i = 0; i < tensor_count(&x->t); i++)
            largest = isfinite(x->x[i]) ? fmax(largest, fabs(x->x[i])) : largest;
    t.absolute += largest / (s->k.t.type == PSA_F16 ? 2048 : 256);
    return t;
}

double check_attention(const char *file, int line, setup *s, const uint8_t *levels) {
    int64_t rows = s->o.B * s->o.Hq * s->o.Nq;
    double *out = (double *)xmalloc((size_t)(rows * s->o.Dv) * sizeof *out),
           *lse = (double *)xmalloc((size_t)rows * sizeof *lse);
    double *got = tensor_values(&s->out.t), *got_lse = doubles_of(setup_lse(s), (size_t)rows);
    oracle_attend(&s->o, levels, out, lse);
    double error = compare(file, line, "out", got, out, rows * s->o.Dv, setup_tolerance(s, s->out.t.type));
    compare(file, line, "lse", got_lse, lse, rows, setup_tolerance(s, PSA_F32));
    check_guards(file, line, s);
    free(out), free(lse), free(got), free(got_lse);
    return error;
}

static void expected_scores(const setup *s, double *want) {
    const psa_plan *p = &s->plan;
    switch (s->desc.score) {
    case PSA_SCORE_SAMPLE:
        oracle_score_sample(&s->o, p->sample_q, p->n_sample_q, p->sample_k, p->n_sample_k, want);
        break;
    case PSA_SCORE_ANTIDIAGONAL: oracle_score_antidiagonal(&s->o, want); break;
    case PSA_SCORE_POOLED: oracle_score_pooled(&s->o, want); break;
    case PSA_SCORE_EXACT: oracle_score_exact(&s->o, want); break;
    }
}

/* A score is at most 1 and a quotient of sums of exponentials; each is good to a few 1e-6 of itself. */
void check_scores(const char *file, int line, const setup *s) {
    tolerance t = {2e-6, 2e-5 + setup_tolerance(s, PSA_F32).absolute - tolerance_of(PSA_F32).absolute};
    size_t map = psa_map_size(&s->plan);
    double *want = (double *)xmalloc(map * sizeof *want), *got = doubles_of(setup_scores(s), map);
    expected_scores(s, want);
    compare(file, line, "scores", got, want, (int64_t)map, t);
    check_guards(file, line, s);
    free(want), free(got);
}

void random_levels(const psa_plan *plan, int coarsest, int skip, uint8_t *levels) {
    int n = 0;
    while (2 << n <= coarsest)
        n++;
    for (size_t i = 0; i < psa_map_size(plan); i++)
        levels[i] = (uint8_t)(rnd_chance(skip) ? 0 : 1 << rnd_int(0, n));
}

void check_random_levels(const char *file, int line, setup *s, int skip) {
    random_levels(&s->plan, s->o.desc.block_k, skip, setup_levels(s));
    run_pool(s, rnd_int(1, 3));
    run_attend(s, setup_levels(s), rnd_int(1, 3));
    check_attention(file, line, s, setup_levels(s));
}
