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

/* ---- trees ---- */

static void check_project(const psa__leaves *f, int round) {
    psa_type type = (psa_type)(round % 3);
    int64_t n = rnd_int(1, 140), d = 8 * rnd_int(1, 32);
    tensor rows = tensor_input(type, LAYOUT_RANDOM, d, n, 1, 1, 1);
    guarded memory = guarded_new((size_t)(n + PAD - 1) / PAD * PAD * sizeof(float), 0);
    float u[PSA_MAX_D], *s = (float *)guarded_data(&memory);
    const float *row[160];
    fill(u, d, 1);
    for (int64_t i = 0; i < n + PAD; i++)
        row[i] = (const float *)tensor_at(&rows.t, 0, i < n ? i : n - 1, 0, 0);
    f->project(type, u, row, n, d, s);
    for (int64_t i = 0; i < n; i++) {
        double want = 0, size = 0;
        for (int64_t x = 0; x < d; x++)
            want += (double)u[x] * rows.x[i * d + x], size += fabs((double)u[x] * rows.x[i * d + x]);
        check_sum(f, "project", (double)s[i], want, size);
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    tensor_free(&rows);
}

static void leaves_project(void) { every_isa(120, check_project); }

static void check_combine(const psa__leaves *f, int round) {
    int64_t n = round == 0 ? 0 : rnd_int(1, 140), d = 8 * rnd_int(1, 32);
    guarded memory = guarded_new((size_t)d * sizeof(float), 0);
    float *x = (float *)xmalloc((size_t)((n + 1) * d) * sizeof *x), s[140], *to = (float *)guarded_data(&memory);
    const float *row[160];
    fill(x, (n + 1) * d, 1), fill(s, n, 1);
    for (int64_t i = 0; i < 160; i++)
        row[i] = x + (i < n ? i : n) * d;
    f->combine(s, row, n, d, to);
    for (int64_t c = 0; c < d; c++) {
        double want = 0, size = 0;
        for (int64_t i = 0; i < n; i++)
            want += (double)s[i] * (double)row[i][c], size += fabs((double)s[i] * (double)row[i][c]);
        check_sum(f, "combine", (double)to[c], want, size);
    }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    free(x);
}

static void leaves_combine(void) { every_isa(100, check_combine); }

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

static void check_smallest(const psa__leaves *f, int round) {
    int64_t n = round % 2 ? rnd_int(2, 40) : rnd_int(2, MOST);
    int64_t some[4] = {1, n - 1, n / 2, rnd_int(1, (int)n - 1)}, k = some[rnd_int(0, 3)];
    float s[MOST];
    guarded memory = guarded_new((size_t)n, 0);
    uint8_t *below = (uint8_t *)guarded_data(&memory);
    projections(s, n, round % 6);
    f->smallest(s, n, k, below);
    for (int64_t i = 0; i < n; i++)
        CHECK(below[i] == (smaller(s, n, i) < k), "%s: %d of %d, kind %d: value %d, %g, is %d", f->name, (int)k, (int)n,
              round % 6, (int)i, (double)s[i], below[i]);
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
}

static void leaves_smallest(void) { every_isa(1200, check_smallest); }

/* Projections of rows that are too long for f32: whatever is chosen, it ends, and it is k of them. */
static void check_smallest_odd(const psa__leaves *f, int round) {
    int64_t n = round % 2 ? rnd_int(2, 16) : rnd_int(17, MOST), k = rnd_int(1, (int)n - 1), count = 0;
    float s[MOST];
    uint8_t below[MOST];
    fill(s, n, 1);
    for (int64_t i = 0; i < n; i++)
        if (rnd_chance(round % 5 * 25))
            s[i] = rnd_chance(50) ? NAN : rnd_chance(50) ? INFINITY : -INFINITY;
    f->smallest(s, n, k, below);
    for (int64_t i = 0; i < n; i++)
        count += below[i];
    CHECK(count == k, "%s: %d instead of %d of %d", f->name, (int)count, (int)k, (int)n);
}

static void leaves_smallest_odd(void) { every_isa(300, check_smallest_odd); }

/* ---- predicted errors ---- */

typedef struct block {
    psa__errors e;
    int nv, lanes, rows; /* lanes of a tile, rows of s */
    float *s, *known; /* known: mass, noise, share */
    double *kept;     /* s as it was */
} block;

static block block_new(const psa__leaves *f) {
    block b;
    memset(&b, 0, sizeof b);
    b.nv = rnd_int(1, f->max_nv), b.lanes = b.nv * f->lanes;
    b.e.fine = rnd_int(1, 5), b.e.coarse = rnd_int(0, 3);
    b.e.rows[0] = rnd_int(1, 20), b.e.groups = b.e.rows[0] + rnd_int(0, 3);
    b.rows = b.e.rows[0];
    for (int i = 1; i <= b.e.coarse; i++)
        b.rows += b.e.rows[i] = (b.e.rows[i - 1] + 1) / 2;
    b.e.plane = b.lanes + rnd_int(0, 40);
    b.s = (float *)xmalloc((size_t)(b.rows * b.lanes) * sizeof *b.s);
    int known = b.e.groups * (2 * b.e.fine + b.e.coarse);
    b.known = (float *)xmalloc((size_t)known * sizeof *b.known);
    for (int i = 0; i < b.rows * b.lanes; i++)
        b.s[i] = rnd_chance(3) ? NAN : rnd_chance(2) ? -INFINITY : (float)(5 * rnd_normal());
    for (int i = 0; i < known; i++)
        b.known[i] = (float)(3 * rnd_uniform());
    for (int i = 0; i < b.e.fine + b.e.coarse; i++)
        b.e.value[i] = (float)rnd_uniform();
    b.kept = doubles_of(b.s, (size_t)(b.rows * b.lanes));
    b.e.mass = b.known, b.e.noise = b.e.mass + b.e.groups * b.e.fine, b.e.share = b.e.noise + b.e.groups * b.e.fine;
    return b;
}

/* exp2 is good to 2e-7. */
static void check_exp(const psa__leaves *f, const char *what, double got, double want, double size, int power) {
    CHECK(fabs(got - want) <= power * 1e-6 * size + 1e-37, "%s, %s: %.9g, expected %.9g", f->name, what, got, want);
}

static void block_free(block *b) { free(b->s), free(b->known), free(b->kept); }

/* exp2 of a logit that is seen, 0 of one that is not. */
static double mass_of(const block *b, int row, int lane, double top) {
    double s = b->kept[row * b->lanes + lane];
    return s >= -1e30 ? exp2(s - top) : 0;
}

static void check_block_lane(const psa__leaves *f, const block *b, int lane, float bm, float bs, const float *x) {
    double top = -INFINITY, all = 0;
    int row = b->e.rows[0];
    for (int g = 0; g < b->e.rows[0]; g++)
        top = fmax(top, b->kept[g * b->lanes + lane]); /* fmax leaves NaN out */
    if (!(top > -1e30)) {
        CHECK((double)bm < -1e30 && bs == (float)b->e.rows[0], "%s: nothing is seen: %g, %g", f->name, (double)bm,
              (double)bs);
        return;
    }
    for (int g = 0; g < b->e.rows[0]; g++)
        all += mass_of(b, g, lane, top);
    CHECK((double)bm == top, "%s: maximum %g, expected %g", f->name, (double)bm, top);
    check_exp(f, "bs", (double)bs, all, all, 1);
    double inside = 0;
    for (int i = 0; i < b->e.fine; i++) {
        double missed = 0, noise = 0;
        for (int g = 0; g < b->e.rows[0]; g++) {
            double mass = mass_of(b, g, lane, top);
            missed += mass * (double)b->e.mass[g * b->e.fine + i];
            noise += mass * mass * (double)b->e.noise[g * b->e.fine + i];
        }
        inside = noise * (double)b->e.value[i];
        double want = missed * missed + inside;
        check_exp(f, "fine", (double)x[i * b->e.plane + lane], want, want, 2);
    }
    for (int i = 0; i < b->e.coarse; i++) {
        double sum = 0, off = 0, size = 0;
        for (int t = 0; t < b->e.rows[1 + i]; t++, row++) {
            double mass = mass_of(b, row, lane, top);
            sum += mass;
            for (int g = t << (i + 1); g < (t + 1) << (i + 1) && g < b->e.rows[0]; g++) {
                double is = mass_of(b, g, lane, top), share = mass * (double)b->e.share[i * b->e.groups + g];
                off += (is - share) * (is - share);
                size += (is + share) * (is + share);
            }
        }
        double value = (double)b->e.value[b->e.fine + i];
        check_exp(f, "coarse", (double)x[(b->e.fine + i) * b->e.plane + lane],
                  (all - sum) * (all - sum) + off * value + inside,
                  (all + sum) * (all + sum) + size * value + inside, 2);
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
    int n_x = rnd_int(1, 8);
    float *bm = (float *)xmalloc((size_t)(n * lanes) * sizeof *bm), m[PSA_MAX_BLOCK_Q], z[PSA_MAX_BLOCK_Q];
    float *x = (float *)xmalloc((size_t)(n_x * n * lanes) * sizeof *x);
    guarded memory = guarded_new((size_t)(n_x * n_row) * sizeof(float), 0);
    float *error = (float *)guarded_data(&memory);
    fill(bm, n * lanes, 4), fill(x, n_x * n * lanes, 1);
    for (int64_t i = 0; i < n_x * n * lanes; i++)
        x[i] = fabsf(x[i]);
    for (int64_t i = 0; i < lanes; i++) {
        m[i] = (float)(5 + rnd_uniform()), z[i] = i >= lanes - 9 ? 0 : (float)rnd_uniform();
        for (int64_t j = 0; j < n; j++) /* no block is above the maximum of its lane */
            bm[j * lanes + i] = fminf(bm[j * lanes + i], m[i]);
    }
    f->row_error(lanes, n, n_x, bm, x, n * lanes, m, z, error, n_row);
    for (int at = 0; at < n_x; at++)
        for (int64_t j = 0; j < n; j++) {
            double want = 0;
            for (int64_t i = 0; i < lanes; i++) {
                double e = (double)z[i] * exp2((double)bm[j * lanes + i] - (double)m[i]);
                want += e * e * (double)x[(at * n + j) * lanes + i];
            }
            check_exp(f, "row_error", (double)error[at * n_row + j], want, want, 2);
        }
    CHECK(guarded_intact(&memory), "%s: guard bytes were written", f->name);
    guarded_free(&memory);
    free(bm), free(x);
}

static void leaves_row_error(void) { every_isa(100, check_row_error); }

const test_case tests_leaves[] = {
    {"leaves/vectors", leaves_vectors},
    {"leaves/types", leaves_types},
    {"leaves/project", leaves_project},
    {"leaves/combine", leaves_combine},
    {"leaves/smallest", leaves_smallest},
    {"leaves/smallest_odd", leaves_smallest_odd},
    {"leaves/block_error", leaves_block_error},
    {"leaves/row_error", leaves_row_error},
    {NULL, NULL},
};
