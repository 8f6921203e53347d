/* test_leaves.c - the leaves of trees, tilt and mask ERROR, every instruction set against plain loops in double. The
 * library is compiled into this file once more, all static: leaves have no other door. */
#define PSA_STATIC
#define PSA_IMPLEMENTATION
#include "psa.h"

#include "elements.h"
#include "test.h"

enum { MOST = 300, PAD = PSA__PAD_K }; /* elements of a vector; floats past its end */

/* Runs a check for every instruction set of this machine, with the same random numbers. */
static void every_isa(int rounds, void (*check)(const psa__leaves *f, int round)) {
    for (int r = 0; r < test_rounds(rounds); r++)
        for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
            if (!psa_isa_supported((psa_isa)isa))
                continue;
            rnd_round(r);
            check(psa__leaves_of((psa_isa)isa), r);
        }
}

static void fill(float *x, int64_t n, double spread) {
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(spread * rnd_normal());
}

/* A sum of n products in f32: each and every partial sum rounds. `size` is the sum of their magnitudes. */
static void check_sum(const psa__leaves *f, const char *what, double got, double want, double size) {
    CHECK(fabs(got - want) <= 4e-6 * size + 1e-37, "%s, %s: %.9g, expected %.9g", f->name, what, got, want);
}

/* ---- vectors ---- */

static void check_vectors(const psa__leaves *f, int round) {
    float a[MOST], b[MOST], m[MOST], sum[MOST], square[MOST], was[2][MOST];
    int64_t n = round < 70 ? round : rnd_int(1, MOST);
    double spread = 0, size = 0, wa = rnd_normal(), wb = rnd_normal();
    guarded memory = guarded_new((size_t)n * sizeof(float), 0);
    float *to = (float *)guarded_data(&memory);
    fill(a, n, 1), fill(b, n, 1), fill(sum, n, 3), fill(square, n, 3);
    for (int64_t i = 0; i < n; i++) {
        m[i] = (float)rnd_uniform();
        spread += (double)m[i] * ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)m[i] * (fabs((double)a[i]) + fabs((double)b[i])) * (fabs((double)a[i]) + fabs((double)b[i]));
    }
    memcpy(was[0], sum, sizeof sum), memcpy(was[1], square, sizeof square);
    f->blend(to, a, (float)wa, b, (float)wb, n);
    f->moments(sum, square, a, n);
    for (int64_t i = 0; i < n; i++) {
        double x = (double)a[i], y = (double)b[i];
        check_sum(f, "blend", (double)to[i], (double)(float)wa * x + (double)(float)wb * y,
                  fabs(wa * x) + fabs(wb * y));
        check_sum(f, "sum", (double)sum[i], (double)was[0][i] + x, fabs((double)was[0][i]) + fabs(x));
        check_sum(f, "square", (double)square[i], (double)was[1][i] + x * x, fabs((double)was[1][i]) + x * x);
    }
    check_sum(f, "spread", (double)f->spread(m, a, b, n), spread, size);
    memcpy(was[0], a, sizeof was[0]);
    f->blend(a, a, 1.0f, b, 0.0f, n); /* in place, as the metric is centred */
    CHECK(!memcmp(was[0], a, (size_t)n * sizeof *a), "%s: 1 a + 0 b is not a", f->name);
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
}

static void leaves_vectors(void) { every_isa(200, check_vectors); }

static float element_at(const char *data, psa_type type, int64_t i) {
    uint32_t bits = 0;
    memcpy(&bits, data + (size_t)i * psa_type_size(type), psa_type_size(type));
    return type == PSA_F16 ? half_to_float((uint16_t)bits) : float_from_bits(type == PSA_F32 ? bits : bits << 16);
}

/* Bits of every kind of number, to each type as element by element, and back. */
static void check_types(const psa__leaves *f, int round) {
    psa_type type = (psa_type)(round % 3);
    int64_t n = round < 70 ? round : rnd_int(1, MOST);
    float x[MOST], back[MOST], factor = rnd_chance(50) ? 1.0f : (float)rnd_normal();
    size_t size = psa_type_size(type);
    guarded memory = guarded_new((size_t)n * size, 0);
    char *got = (char *)guarded_data(&memory), expected[sizeof x];
    for (int64_t i = 0; i < n; i++) {
        uint32_t exponent = (uint32_t)(rnd_chance(60) ? rnd_int(100, 145) : rnd_int(0, 255)) << 23;
        x[i] = float_from_bits(exponent | (uint32_t)rnd_int(0, 0x7fffff) | (rnd_chance(50) ? 0x80000000u : 0));
        if (rnd_chance(20)) /* in the middle of two numbers, or near it */
            x[i] = float_from_bits((psa__bits(x[i]) & 0xffff0000u) | (uint32_t)rnd_int(0x7fff, 0x8001));
        set_element(expected, type, (size_t)i, x[i] * factor);
    }
    f->from_f32(got, type, x, factor, n);
    f->to_f32(back, expected, type, n);
    for (int64_t i = 0; i < n; i++) {
        double is = (double)element_at(got, type, i), should = (double)element_at(expected, type, i);
        CHECK(is == should || (isnan(is) && isnan(should)), "%s: %g is %g, expected %g", f->name,
              (double)(x[i] * factor), is, should);
        CHECK((double)back[i] == should || isnan(should), "%s: %g read as %g", f->name, should, (double)back[i]);
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
}

static void leaves_types(void) { every_isa(300, check_types); }

static void check_mean(const psa__leaves *f, int round) {
    (void)round;
    int64_t n = rnd_int(1, 140), d = 8 * rnd_int(1, 32);
    guarded memory = guarded_new((size_t)d * sizeof(float), 0);
    float *x = (float *)xmalloc((size_t)(n * d) * sizeof *x), *to = (float *)guarded_data(&memory);
    const float *row[140];
    fill(x, n * d, 1);
    for (int64_t i = 0; i < n; i++)
        row[i] = x + i * d;
    f->mean(to, row, n, d);
    for (int64_t c = 0; c < d; c++) {
        double want = 0, size = 0;
        for (int64_t i = 0; i < n; i++)
            want += (double)row[i][c] / (double)n, size += fabs((double)row[i][c]) / (double)n;
        check_sum(f, "mean", (double)to[c], want, size);
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    free(x);
}

static void leaves_mean(void) { every_isa(100, check_mean); }

/* ---- trees ---- */

static void check_squares(const psa__leaves *f, int round) {
    (void)round;
    int64_t n = rnd_int(1, 140), d = 8 * rnd_int(1, 32);
    guarded memory = guarded_new((size_t)(n + PAD - 1) / PAD * PAD * sizeof(float), 0);
    float *x = (float *)xmalloc((size_t)(n * d) * sizeof *x), *s = (float *)guarded_data(&memory);
    const float *row[160];
    fill(x, n * d, 1);
    for (int64_t i = 0; i < n + PAD; i++)
        row[i] = x + (i < n ? i : n - 1) * d;
    f->squares(row, n, d, s);
    for (int64_t i = 0; i < n; i++) {
        double want = 0;
        for (int64_t c = 0; c < d; c++)
            want += (double)row[i][c] * (double)row[i][c];
        check_sum(f, "squares", (double)s[i], want, want);
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    free(x);
}

static void leaves_squares(void) { every_isa(120, check_squares); }

enum { AXES = PSA__AXES };

static void check_along(const psa__leaves *f, int round) {
    (void)round;
    int64_t n = rnd_int(1, 140), padded = (n + PAD - 1) / PAD * PAD;
    guarded memory = guarded_new((size_t)padded * sizeof(float), 0);
    float u[AXES], x[160 * AXES], *s = (float *)guarded_data(&memory);
    fill(u, AXES, 1), fill(x, padded * AXES, 1);
    f->along(u, x, n, s);
    for (int64_t i = 0; i < n; i++) {
        double want = 0, size = 0;
        for (int c = 0; c < AXES; c++) {
            double part = (double)u[c] * (double)x[i * AXES + c];
            want += part, size += fabs(part);
        }
        check_sum(f, "along", (double)s[i], want, size);
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
}

static void leaves_along(void) { every_isa(120, check_along); }

/* Places along u, less their mean. */
static void places(const float *x, int64_t n, const double *u, double *place) {
    double mean = 0;
    for (int64_t i = 0; i < n; i++) {
        place[i] = 0;
        for (int c = 0; c < AXES; c++)
            place[i] += u[c] * (double)x[i * AXES + c];
        mean += place[i] / (double)n;
    }
    for (int64_t i = 0; i < n; i++)
        place[i] -= mean;
}

/* Power steps from the last point less the first: each is the covariance of n points times u, of length 1. */
static void power_steps(const float *x, int64_t n, int steps, double *u) {
    for (int c = 0; c < AXES; c++)
        u[c] = (double)x[(n - 1) * AXES + c] - (double)x[c];
    for (int step = 0; step <= steps; step++) {
        double next[AXES] = {0}, norm = 0, place[160];
        places(x, n, u, place);
        for (int64_t i = 0; i < n; i++)
            for (int c = 0; c < AXES; c++)
                next[c] += place[i] * (double)x[i * AXES + c];
        for (int c = 0; c < AXES; c++)
            next[c] = step ? next[c] : u[c], norm += next[c] * next[c];
        for (int c = 0; c < AXES; c++)
            u[c] = norm > 0 ? next[c] / sqrt(norm) : 0;
    }
}

/* Points that are spread out less and less from axis to axis; every eighth time all the same. Returns how far they are
 * from the origin. */
static double some_points(int round, float *x, int64_t n) {
    double mean = 5 * rnd_normal();
    for (int64_t i = 0; i < n * AXES; i++)
        x[i] = (float)(round % 8 == 0 ? 3 : mean + rnd_normal() / (double)(1 + i % AXES));
    return mean;
}

/* The sums that `second` gives of n points, and how much they add up from. */
static void second_moments(const float *x, int64_t n, const float *origin, double *want, double *size) {
    for (int i = 0; i < PSA__SECOND; i++)
        want[i] = size[i] = 0;
    for (int64_t i = 0; i < n * PSA__SECOND; i++) {
        const float *point = x + i / PSA__SECOND * AXES;
        int at = (int)(i % PSA__SECOND), row = at / AXES, c = at % AXES;
        double y = (double)point[c] - (double)origin[c], by = row < AXES ? (double)point[row] - (double)origin[row] : 1;
        want[at] += y * by, size[at] += fabs(y * by);
    }
}

static void check_second(const psa__leaves *f, int round) {
    int all = rnd_int(1, MOST), chosen = rnd_chance(50);
    int64_t n = chosen ? rnd_int(1, PSA__TREE_NODE) : rnd_int(1, all < PSA__TREE_NODE ? all : PSA__TREE_NODE);
    guarded memory = guarded_new(PSA__SECOND * sizeof(float), 0);
    float *x = (float *)xmalloc((size_t)(all * AXES) * sizeof *x), some[PSA__TREE_NODE * AXES];
    float *got = (float *)guarded_data(&memory);
    double want[PSA__SECOND], size[PSA__SECOND];
    int32_t which[PSA__TREE_NODE];
    some_points(round, x, all);
    for (int64_t i = 0; i < n; i++) {
        which[i] = (int32_t)(chosen ? rnd_int(0, all - 1) : i);
        memcpy(some + i * AXES, x + which[i] * AXES, AXES * sizeof *x);
    }
    f->second(x, chosen ? which : NULL, n, x, got);
    second_moments(some, n, x, want, size);
    for (int i = 0; i < PSA__SECOND; i++)
        check_sum(f, "second", (double)got[i], want[i], size[i]);
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    free(x);
}

static void leaves_second(void) { every_isa(200, check_second); }

/* Second moments as a leaf takes them, about the middle point. */
static void some_second(const float *x, int64_t n, float *second) {
    double exact[PSA__SECOND], size[PSA__SECOND];
    second_moments(x, n, x + n / 2 * AXES, exact, size);
    for (int i = 0; i < PSA__SECOND; i++)
        second[i] = (float)exact[i];
}

static void check_principal(const psa__leaves *f, int round) {
    int steps = rnd_int(0, 6);
    int64_t n = rnd_int(1, PSA__TREE_NODE);
    float x[PSA__TREE_NODE * AXES], second[PSA__SECOND], u[AXES];
    double want[AXES], mean = some_points(round, x, n);
    some_second(x, n, second);
    f->principal(second, n, x, x + (n - 1) * AXES, steps, u);
    power_steps(x, n, steps, want);
    for (int c = 0; c < AXES; c++)
        CHECK(fabs((double)u[c] - want[c]) < 4e-5, "%s, %d steps, mean %g: axis %d is %g, not %g", f->name, steps, mean,
              c, (double)u[c], want[c]);
}

static void leaves_principal(void) { every_isa(200, check_principal); }

/* Along the direction that power steps find; equal points keep their order. */
static void check_sort(const psa__leaves *f, int round) {
    int steps = rnd_int(0, 4);
    int64_t n = round % 2 ? AXES : rnd_int(1, AXES);
    guarded memory = guarded_new((size_t)n * sizeof(int32_t), 0);
    int32_t *index = (int32_t *)guarded_data(&memory), rank[AXES];
    float x[AXES * AXES] = {0}, second[PSA__SECOND];
    double u[AXES], place[AXES], mean = some_points(round, x, n);
    for (int64_t i = 1; i < n && round % 3 == 0; i++)
        if (rnd_chance(40))
            memcpy(x + i * AXES, x + rnd_int(0, (int)i - 1) * AXES, AXES * sizeof *x);
    for (int64_t i = 0; i < n; i++)
        index[i] = (int32_t)i;
    some_second(x, n, second);
    f->sort(second, x, n, steps, index);
    if (CHECK(is_permutation(index, n), "%s: indices are no permutation of %d", f->name, (int)n)) {
        for (int64_t i = 0; i < n; i++)
            rank[index[i]] = (int32_t)i;
        power_steps(x, n, steps, u), places(x, n, u, place);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < i; j++) {
                double apart = place[i] - place[j], close = 1e-4 * (1 + fabs(mean));
                int same = !memcmp(x + i * AXES, x + j * AXES, AXES * sizeof *x);
                CHECK(fabs(apart) < close ? !same || rank[i] > rank[j] : (rank[i] > rank[j]) == (apart > 0),
                      "%s, %d steps: point %d, %g further than %d, is number %d, that one %d", f->name, steps, (int)i,
                      apart, (int)j, rank[i], rank[j]);
            }
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
}

static void leaves_sort(void) { every_isa(400, check_sort); }

/* Values of the kinds a projection has: spread out, few different ones, all equal, far out, next to each other. */
static void projections(float *s, int64_t n, int kind) {
    float base = (float)rnd_normal();
    for (int64_t i = 0; i < n; i++) {
        double x = kind == 0   ? rnd_normal()
                   : kind == 1 ? rnd_int(-2, 2)
                   : kind == 2 ? 7
                   : kind == 3 ? pow(10, 76 * rnd_uniform() - 38) * (rnd_chance(50) ? 1 : -1)
                   : kind == 4 ? (rnd_chance(90) ? 0 : rnd_normal())
                               : 0;
        s[i] = kind < 5 ? (float)x : nextafterf(base, rnd_chance(50) ? 9 : base);
    }
}

static int64_t smaller(const float *s, int64_t n, int64_t i) {
    int64_t count = 0;
    for (int64_t j = 0; j < n; j++)
        count += s[j] < s[i] || (s[j] == s[i] && j < i);
    return count;
}

/* part with points and indices that say where they were */
static void part(const psa__leaves *f, const float *s, int64_t n, int64_t k, int32_t *index) {
    float *copy = (float *)xmalloc((size_t)(n + PAD) * sizeof *copy);
    guarded memory[2] = {guarded_new((size_t)(n * AXES) * sizeof(float), 0), guarded_new((size_t)(n + 16) * 4, 0)};
    float *points = (float *)guarded_data(&memory[0]);
    memcpy(copy, s, (size_t)n * sizeof *s);
    fill(copy + n, PAD, 1);
    for (int64_t i = 0; i < n * AXES; i++)
        points[i] = (float)(i / AXES), index[i / AXES] = (int32_t)(i / AXES);
    f->part(copy, n, k, (int32_t *)guarded_data(&memory[1]), points, index);
    for (int64_t i = 0; i < n * AXES; i++)
        CHECK((int32_t)points[i] == index[i / AXES], "%s: point %d is at %d, its index not", f->name, (int)points[i],
              (int)(i / AXES));
    CHECK(is_permutation(index, n), "%s: indices are no permutation of %d", f->name, (int)n);
    for (int i = 0; i < 2; i++) {
        CHECK(guarded_intact(&memory[i]), "%s: guard bytes were written", f->name);
        guarded_free(&memory[i]);
    }
    free(copy);
}

static void check_part(const psa__leaves *f, int round) {
    int64_t n = round % 2 ? rnd_int(2, 40) : rnd_int(2, MOST);
    int64_t some[4] = {1, n - 1, n / 2, rnd_int(1, (int)n - 1)}, k = some[rnd_int(0, 3)];
    float s[MOST];
    int32_t index[MOST];
    projections(s, n, round % 6);
    part(f, s, n, k, index);
    for (int64_t i = 0; i < n; i++)
        CHECK((smaller(s, n, index[i]) < k) == (i < k), "%s: %d of %d, kind %d: value %d, %g, is at %d", f->name,
              (int)k, (int)n, round % 6, index[i], (double)s[index[i]], (int)i);
}

static void leaves_part(void) { every_isa(1200, check_part); }

/* Projections of rows that are too long for f32: whatever is chosen, it ends, and nothing is lost. */
static void check_part_odd(const psa__leaves *f, int round) {
    int64_t n = round % 2 ? rnd_int(2, 16) : rnd_int(17, MOST);
    float s[MOST];
    int32_t index[MOST];
    fill(s, n, 1);
    for (int64_t i = 0; i < n; i++)
        if (rnd_chance(round % 5 * 25))
            s[i] = rnd_chance(50) ? NAN : rnd_chance(50) ? INFINITY : -INFINITY;
    part(f, s, n, rnd_int(1, (int)n - 1), index);
}

static void leaves_part_odd(void) { every_isa(300, check_part_odd); }

/* ---- predicted errors ---- */

typedef struct block {
    psa__errors e;
    int nv, lanes;
    float *s, *known; /* known: mass, noise, share, shift */
} block;

static block block_new(const psa__leaves *f) {
    block b;
    memset(&b, 0, sizeof b);
    b.nv = rnd_int(1, f->max_nv), b.lanes = b.nv * f->lanes;
    b.e.fine = rnd_int(1, 5), b.e.coarse = rnd_int(0, 3);
    b.e.rows = rnd_int(1, 20), b.e.groups = b.e.rows + rnd_int(0, 3);
    b.e.plane = b.lanes + rnd_int(0, 40);
    b.s = (float *)xmalloc((size_t)(b.e.rows * b.lanes) * sizeof *b.s);
    int known = b.e.groups * (2 * b.e.fine + 2 * b.e.coarse);
    b.known = (float *)xmalloc((size_t)known * sizeof *b.known);
    for (int i = 0; i < b.e.rows * b.lanes; i++)
        b.s[i] = rnd_chance(3) ? NAN : rnd_chance(2) ? -INFINITY : (float)(5 * rnd_normal());
    for (int i = 0; i < known; i++)
        b.known[i] = (float)(3 * rnd_uniform());
    for (int i = 0; i < b.e.fine + b.e.coarse; i++)
        b.e.value[i] = (float)rnd_uniform();
    b.e.mass = b.known, b.e.noise = b.e.mass + b.e.groups * b.e.fine;
    b.e.share = b.e.noise + b.e.groups * b.e.fine, b.e.shift = b.e.share + b.e.groups * b.e.coarse;
    for (int i = 0; i < b.e.groups * b.e.coarse; i++)
        b.known[2 * b.e.groups * b.e.fine + i] /= 6; /* shares: two groups make no logit that overflows */
    return b;
}

/* exp2 is good to 2e-7. */
static void check_exp(const psa__leaves *f, const char *what, double got, double want, double size, int power) {
    CHECK(fabs(got - want) <= power * 1e-6 * size + 1e-37, "%s, %s: %.9g, expected %.9g", f->name, what, got, want);
}

static void block_free(block *b) { free(b->s), free(b->known); }

static double logit_of(const block *b, int g, int lane) { return (double)b->s[g * b->lanes + lane]; }

/* exp2 of a logit that is seen, 0 of one that is not. */
static double mass_of(double s, double top) { return s >= -1e30 ? exp2(s - top) : 0; }

/* The error of the i-th level above the groups' that have all the mass; *size: what rounding may be measured by. */
static double coarse_error(const block *b, int i, int lane, double top, double all, double inside, double *size) {
    const float *share = b->e.share + i * b->e.groups, *shift = b->e.shift + i * b->e.groups;
    double sum = 0, off = 0, value = (double)b->e.value[b->e.fine + i];
    *size = 0;
    for (int t = 0; t << (i + 1) < b->e.rows; t++) {
        double logit = (double)shift[t], whole;
        int end = (t + 1) << (i + 1) < b->e.rows ? (t + 1) << (i + 1) : b->e.rows;
        for (int g = t << (i + 1); g < end; g++)
            logit += (double)share[g] * logit_of(b, g, lane);
        sum += whole = mass_of(logit, top);
        for (int g = t << (i + 1); g < end; g++) {
            double is = mass_of(logit_of(b, g, lane), top), given = whole * (double)share[g];
            off += (is - given) * (is - given), *size += (is + given) * (is + given);
        }
    }
    *size = (all + sum) * (all + sum) + *size * value + inside;
    return (all - sum) * (all - sum) + off * value + inside;
}

static void check_block_lane(const psa__leaves *f, const block *b, int lane, float bm, float bs, const float *x) {
    double top = -INFINITY, all = 0;
    for (int g = 0; g < b->e.rows; g++)
        top = fmax(top, logit_of(b, g, lane)); /* fmax leaves NaN out */
    if (!(top > -1e30)) {
        CHECK((double)bm < -1e30 && bs == (float)b->e.rows, "%s: nothing is seen: %g, %g", f->name, (double)bm,
              (double)bs);
        return;
    }
    for (int g = 0; g < b->e.rows; g++)
        all += mass_of(logit_of(b, g, lane), top);
    CHECK((double)bm == top, "%s: maximum %g, expected %g", f->name, (double)bm, top);
    check_exp(f, "bs", (double)bs, all, all, 1);
    double inside = 0, size;
    for (int i = 0; i < b->e.fine; i++) {
        double missed = 0, noise = 0;
        for (int g = 0; g < b->e.rows; g++) {
            double mass = mass_of(logit_of(b, g, lane), top);
            missed += mass * (double)b->e.mass[g * b->e.fine + i];
            noise += mass * mass * (double)b->e.noise[g * b->e.fine + i];
        }
        inside = noise * (double)b->e.value[i];
        double want = missed * missed + inside;
        check_exp(f, "fine", (double)x[i * b->e.plane + lane], want, want, 2);
    }
    for (int i = 0; i < b->e.coarse; i++) {
        double want = coarse_error(b, i, lane, top, all, inside, &size);
        check_exp(f, "coarse", (double)x[(b->e.fine + i) * b->e.plane + lane], want, size, 6);
    }
    check_exp(f, "skip", (double)x[(b->e.fine + b->e.coarse) * b->e.plane + lane], all * all, all * all, 2);
}

static void check_block_error(const psa__leaves *f, int round) {
    (void)round;
    block b = block_new(f);
    int64_t planes = b.e.fine + b.e.coarse + 1;
    guarded memory = guarded_new((size_t)((planes - 1) * b.e.plane + b.lanes) * sizeof(float), 0);
    float bm[64], bs[64], *x = (float *)guarded_data(&memory);
    f->block_error(b.nv, b.s, &b.e, bm, bs, x);
    for (int lane = 0; lane < b.lanes; lane++)
        check_block_lane(f, &b, lane, bm[lane], bs[lane], x);
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    block_free(&b);
}

static void leaves_block_error(void) { every_isa(200, check_block_error); }

static void check_row_error(const psa__leaves *f, int round) {
    int64_t lanes = 16 * rnd_int(1, round % 4 ? 2 : PSA_MAX_BLOCK_Q / 16), n = rnd_int(1, 40), n_row = n + 16;
    int64_t first = 16 * rnd_int(0, 2), all = first + lanes + 16 * rnd_int(0, 2);
    int n_x = rnd_int(1, 8);
    float *bm = (float *)xmalloc((size_t)(n * all) * sizeof *bm), z[PSA_MAX_BLOCK_Q];
    float *x = (float *)xmalloc((size_t)(n_x * n * all) * sizeof *x);
    guarded memory = guarded_new((size_t)(n_x * n_row) * sizeof(float), 0);
    float *error = (float *)guarded_data(&memory);
    fill(x, n_x * n * all, 1);
    for (int64_t i = 0; i < n_x * n * all; i++)
        x[i] = fabsf(x[i]);
    for (int64_t i = 0; i < n * all; i++)
        bm[i] = (float)exp2(-12 * rnd_uniform());
    for (int64_t i = 0; i < lanes; i++)
        z[i] = i >= lanes - 9 ? 0 : (float)rnd_uniform();
    f->row_error(lanes, all, n, n_x, bm + first, x + first, n * all, z, error, n_row);
    for (int at = 0; at < n_x; at++)
        for (int64_t j = 0; j < n; j++) {
            double want = 0;
            for (int64_t i = 0; i < lanes; i++) {
                double e = (double)z[i] * (double)bm[j * all + first + i];
                want += e * e * (double)x[(at * n + j) * all + first + i];
            }
            check_exp(f, "row_error", (double)error[at * n_row + j], want, want, 2);
        }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    free(bm), free(x);
}

static void leaves_row_error(void) { every_isa(100, check_row_error); }

/* The price at which the cheapest choice passes from the first i + 1 levels to the others: bisected. */
static double price_after(const double *error, int i, int last) {
    double low = -1e3, high = 1e9;
    for (int step = 0; step < 100; step++) {
        double price = (low + high) / 2, least[2] = {1e300, 1e300};
        for (int level = 0; level <= last; level++) {
            double total = error[level] + price * (double)psa__level_cost(level, last);
            least[level > i] = fmin(least[level > i], total);
        }
        if (least[0] < least[1])
            low = price;
        else
            high = price;
    }
    return low;
}

static void check_hull(const psa__leaves *f, int round) {
    int last = rnd_int(1, PSA_MAX_LEVELS);
    int64_t n = rnd_int(1, 60), n_row = n + 16;
    float per_cost[PSA_MAX_LEVELS][PSA_MAX_LEVELS + 1];
    guarded memory = guarded_new((size_t)(last * n_row) * sizeof(float), 0);
    float *error = (float *)guarded_data(&memory), *was = (float *)xmalloc((size_t)(last * n_row) * sizeof *was);
    for (int i = 0; i < last; i++)
        for (int j = i + 1; j <= last; j++)
            per_cost[i][j] = 1 / (psa__level_cost(i, last) - psa__level_cost(j, last));
    for (int64_t i = 0; i < last * n_row; i++) /* rises, mostly */
        was[i] = error[i] = (float)(rnd_uniform() * (round % 2 ? 1 : pow(4, (double)(i / n_row))));
    f->hull(error, n_row, n, last, per_cost);
    for (int64_t j = 0; j < n; j++) {
        double at[PSA_MAX_LEVELS + 1] = {0};
        for (int i = 0; i < last; i++)
            at[i + 1] = (double)was[i * n_row + j];
        for (int i = 0; i < last; i++) {
            double want = price_after(at, i, last), got = (double)error[i * n_row + j];
            CHECK(fabs(got - want) <= 1e-5 * (1 + fabs(want)), "%s: level %d of %d is left at %g, expected %g", f->name,
                  i, last, got, want);
        }
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    free(was);
}

static void leaves_hull(void) { every_isa(100, check_hull); }

/* ---- matrix tiles ---- */

/* n rows of d elements, and n pointers to them. */
static const float **rows_of(psa_type type, int64_t n, int64_t d, char **data) {
    const float **row = (const float **)xmalloc((size_t)n * sizeof *row);
    *data = (char *)xmalloc((size_t)(n * d) * psa_type_size(type));
    for (int64_t i = 0; i < n * d; i++)
        set_element(*data, type, (size_t)i, (float)rnd_normal());
    for (int64_t i = 0; i < n; i++)
        row[i] = (const float *)(const void *)(*data + (size_t)(i * d) * psa_type_size(type));
    return row;
}

/* scale * q . k + bias, for rows of any type. */
static void check_logit(const psa__leaves *f, float got, const float *q, psa_type type_q, const float *k, psa_type type,
                        int64_t d, float scale, float bias) {
    double want = (double)bias, size = fabs(want);
    for (int64_t x = 0; x < d; x++) {
        double product = (double)element_at((const char *)(const void *)q, type_q, x) *
                         (double)element_at((const char *)(const void *)k, type, x) * (double)scale;
        want += product, size += fabs(product);
    }
    check_sum(f, "logit", (double)got, want, size);
}

/* was + the sum of weights p[key * stride] times element x of n values; weights are in two parts of bf16. */
static void check_output(const psa__leaves *f, float got, double was, const double *p, int64_t stride,
                         const float *const *v, psa_type type, int64_t n, int64_t x) {
    double want = was, size = fabs(want);
    for (int64_t i = 0; i < n; i++) {
        double product = p[i * stride] * (double)element_at((const char *)(const void *)v[i], type, x);
        want += product, size += fabs(product);
    }
    CHECK(fabs((double)got - want) <= (0x1p-17 + 1e-6) * size, "%s: output %.9g, expected %.9g", f->name, (double)got,
          want);
}

/* Logits of 16 queries, their weights, and what they add to the output. Keys beyond n have rows, but no weight. */
static void check_matrix(const psa__leaves *f, int round) {
    psa_type type_q = (psa_type)(round % 3), type = round % 2 ? PSA_F16 : PSA_BF16;
    int64_t d = 8 * rnd_int(1, 32), dv = 8 * rnd_int(1, 32), n = rnd_int(1, PSA__TILE_MATRIX);
    int64_t keys = psa__up_to_32(n), rows = (n + 15) / 16 * 16, columns = psa__up_to_32(dv);
    int q_parts = psa__parts(type_q), parts = psa__parts(type), add = rnd_chance(50);
    float scale = (float)rnd_uniform(), bias[PSA__TILE_MATRIX], top[16], m[16], l[16];
    char *q_data, *k_data, *v_data;
    const float **q = rows_of(type_q, 16, d, &q_data), **k = rows_of(type, n, d, &k_data);
    const float **v = rows_of(type, keys, dv, &v_data);
    guarded memory[6] = {guarded_new((size_t)(psa__up_to_32(d) * 8 * q_parts) * sizeof(float), 0),
                         guarded_new((size_t)(psa__up_to_32(d) / 2 * parts * rows) * sizeof(float), 0),
                         guarded_new((size_t)(columns / 2 * parts * keys) * sizeof(float), 0),
                         guarded_new((size_t)(keys * 16) * sizeof(float), 0),
                         guarded_new((size_t)(keys * 16) * sizeof(float), 0),
                         guarded_new((size_t)(columns * 16) * sizeof(float), 0)};
    float *at[6];
    double *p = (double *)xmalloc((size_t)(n * 16) * sizeof *p);
    unsigned mode;
    for (int i = 0; i < 6; i++)
        at[i] = (float *)guarded_data(&memory[i]);
    fill(bias, n, 1), fill(at[5], columns * 16, 1);
    memset(at[1], 0, (size_t)(psa__up_to_32(d) / 2 * parts * rows) * sizeof(float));
    mode = f->enter();
    f->tile_queries(type_q, q_parts, at[0], q, d);
    f->tile_keys(type, at[1], k, n, d, NULL);
    f->tile_products(at[1], parts, at[0], q_parts, psa__up_to_32(d) / 32, 0, at[3], rows / 16);
    f->tile_logits(at[3], n, scale, round % 5 ? bias : NULL, top);
    for (int64_t lane = 0; lane < 16; lane++) {
        double most = -INFINITY;
        for (int64_t i = 0; i < n; i++) {
            check_logit(f, at[3][i * 16 + lane], q[lane], type_q, k[i], type, d, scale, round % 5 ? bias[i] : 0);
            p[i * 16 + lane] = (double)at[3][i * 16 + lane];
            most = fmax(most, p[i * 16 + lane]);
        }
        CHECK((double)top[lane] == most, "%s: top %g, expected %g", f->name, (double)top[lane], most);
        m[lane] = add ? top[lane] - 3 : top[lane] - 20; /* kept, or moved up to top while o shrinks */
        l[lane] = (float)rnd_uniform();
    }
    float was_l[16], *was = (float *)xmalloc((size_t)(columns * 16) * sizeof *was);
    memcpy(was_l, l, sizeof l), memcpy(was, at[5], (size_t)(columns * 16) * sizeof *was);
    f->tile_weights(at[3], n, keys, top, m, l, at[5], columns, at[4]);
    f->tile_values(type, at[2], v, n, dv, NULL);
    f->tile_products(at[2], parts, at[4], 2, keys / 32, 1, at[5], columns / 16);
    f->leave(mode);
    for (int64_t lane = 0; lane < 16; lane++) {
        double shrink = add ? 1 : exp2(-20), sum = (double)was_l[lane] * shrink;
        CHECK((double)m[lane] == (double)(add ? top[lane] - 3 : top[lane]), "%s: m %g", f->name, (double)m[lane]);
        for (int64_t i = 0; i < n; i++)
            sum += p[i * 16 + lane] = exp2(p[i * 16 + lane] - (double)m[lane]);
        check_sum(f, "denominator", (double)l[lane], sum, sum);
        for (int64_t x = 0; x < dv; x++)
            check_output(f, at[5][x * 16 + lane], (double)was[x * 16 + lane] * shrink, p + lane, 16, v, type, n, x);
    }
    for (int i = 0; i < 6; i++) {
        CHECK(guarded_intact(&memory[i]), "%s: guard bytes were written", f->name);
        guarded_free(&memory[i]);
    }
    free(p), free(was), free(q), free(k), free(v), free(q_data), free(k_data), free(v_data);
}

static void leaves_matrix(void) {
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++)
        if (psa_isa_supported((psa_isa)isa))
            CHECK(!psa__leaves_of((psa_isa)isa)->tile_products == (isa != PSA_ISA_AMX), "%s",
                  psa_isa_name((psa_isa)isa));
    if (psa_isa_supported(PSA_ISA_AMX) && psa__ask_for_tiles())
        for (int r = 0; r < test_rounds(300); r++) {
            rnd_round(r);
            check_matrix(psa__leaves_of(PSA_ISA_AMX), r);
        }
}

/* ---- bf16 in vectors ---- */

/* Logits of up to max_nv vectors of queries in so many parts, and weights times values of bf16. */
static void check_bf16(const psa__leaves *f, int round) {
    int nv = rnd_int(1, f->max_nv), parts = 1 + round % 3;
    psa_type type_q = parts == 1 ? PSA_BF16 : parts == 2 ? PSA_F16 : PSA_F32;
    int64_t d = 8 * rnd_int(1, 32), dv = 8 * rnd_int(1, 32), n = rnd_int(1, f->tile_k), lanes = nv * f->lanes;
    int64_t rows = n + PSA__PAD_K;
    float scale = (float)rnd_uniform(), *bias = (float *)xmalloc((size_t)rows * sizeof *bias);
    float top[PSA_MAX_BLOCK_Q], *q32 = (float *)xmalloc((size_t)(lanes * d) * sizeof *q32);
    char *q_data, *k_data, *v_data;
    const float **q = rows_of(type_q, lanes, d, &q_data), **k = rows_of(PSA_BF16, rows, d, &k_data);
    const float **v = rows_of(PSA_BF16, n, dv, &v_data), **row = (const float **)xmalloc((size_t)lanes * sizeof *row);
    guarded memory[3] = {guarded_new((size_t)(lanes * d * parts / 2) * sizeof(float), 0),
                         guarded_new((size_t)(rows * lanes) * sizeof(float), 0),
                         guarded_new((size_t)(dv * lanes) * sizeof(float), 0)};
    float *qt = (float *)guarded_data(&memory[0]), *s = (float *)guarded_data(&memory[1]);
    float *ot = (float *)guarded_data(&memory[2]), *was = (float *)xmalloc((size_t)(dv * lanes) * sizeof *was);
    double *p = (double *)xmalloc((size_t)(n * lanes) * sizeof *p);
    for (int64_t i = 0; i < lanes; i++) {
        row[i] = q32 + i * d;
        for (int64_t x = 0; x < d; x++)
            q32[i * d + x] = element_at((const char *)(const void *)q[i], type_q, x);
    }
    fill(bias, rows, 1), fill(ot, dv * lanes, 1);
    memcpy(was, ot, (size_t)(dv * lanes) * sizeof *was);
    for (int64_t i = n; i < rows; i++) /* as lists of rows are padded */
        k[i] = k[n - 1], bias[i] = bias[n - 1];
    unsigned mode = f->enter();
    f->pack_bf16(nv, qt, row, parts, d);
    f->qk_bf16(nv, qt, parts, scale, k, n, d, round % 5 ? bias : NULL, s, top, NULL);
    f->leave(mode);
    for (int64_t lane = 0; lane < lanes; lane++) {
        double most = -INFINITY;
        for (int64_t i = 0; i < n; i++) {
            check_logit(f, s[i * lanes + lane], q[lane], type_q, k[i], PSA_BF16, d, scale, round % 5 ? bias[i] : 0);
            most = fmax(most, (double)s[i * lanes + lane]);
        }
        CHECK((double)top[lane] == most, "%s: top %g, expected %g", f->name, (double)top[lane], most);
    }
    for (int64_t i = 0; i < n * lanes; i++)
        p[i] = (double)(s[i] = (float)rnd_uniform());
    mode = f->enter();
    f->pv_bf16(nv, s, v, n, dv, ot, NULL);
    f->leave(mode);
    for (int64_t i = 0; i < dv * lanes; i++)
        check_output(f, ot[i], (double)was[i], p + i % lanes, lanes, v, PSA_BF16, n, i / lanes);
    for (int i = 0; i < 3; i++) {
        CHECK(guarded_intact(&memory[i]), "%s: guard bytes were written", f->name);
        guarded_free(&memory[i]);
    }
    free(bias), free(q32), free(q), free(k), free(v), free(q_data), free(k_data), free(v_data), free(row), free(was);
    free(p);
}

static void leaves_bf16(void) {
    for (int isa = PSA_ISA_SCALAR; isa < PSA_ISA_END; isa++) {
        if (!psa_isa_supported((psa_isa)isa))
            continue;
        const psa__leaves *f = psa__leaves_of((psa_isa)isa);
        CHECK(!f->qk_bf16 == (isa != PSA_ISA_NEON_BF16), "%s", f->name);
        for (int r = 0; f->qk_bf16 && r < test_rounds(300); r++) {
            rnd_round(r);
            check_bf16(f, r);
        }
    }
}

const test_case tests_leaves[] = {
    {"leaves/vectors", leaves_vectors},
    {"leaves/types", leaves_types},
    {"leaves/mean", leaves_mean},
    {"leaves/squares", leaves_squares},
    {"leaves/along", leaves_along},
    {"leaves/second", leaves_second},
    {"leaves/principal", leaves_principal},
    {"leaves/sort", leaves_sort},
    {"leaves/part", leaves_part},
    {"leaves/part_odd", leaves_part_odd},
    {"leaves/block_error", leaves_block_error},
    {"leaves/row_error", leaves_row_error},
    {"leaves/hull", leaves_hull},
    {"leaves/matrix", leaves_matrix},
    {"leaves/bf16", leaves_bf16},
    {NULL, NULL},
};
