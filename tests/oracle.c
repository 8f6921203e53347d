/* oracle.c - the definition, loop by loop. Slow and obvious on purpose. */
#include "oracle.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static double *zeros(int64_t n) {
    double *x = (double *)calloc((size_t)(n > 0 ? n : 1), sizeof *x);
    if (!x)
        abort();
    return x;
}

static double dot(const double *a, const double *b, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++)
        s += a[i] * b[i];
    return s;
}

/* ---- shapes, defaults, causality ----------------------------------------------------------------------------------
 */

static void default_levels(psa_desc *desc) {
    static const double topk[] = {.1, .15, .15, .35}, threshold[] = {.4, .5, .6, .8};
    for (int i = 0; i < PSA_MAX_LEVELS; i++)
        if (desc->level_end[i] != 0 || desc->level_count[i] != 0)
            return;
    memcpy(desc->level_end, desc->mask == PSA_MASK_THRESHOLD ? threshold : topk, sizeof topk);
}

void oracle_init(oracle *o, const psa_desc *desc, int64_t B, int64_t Hq, int64_t Hkv, int64_t Nq, int64_t Nk, int64_t D,
                 int64_t Dv, const double *q, const double *k, const double *v) {
    memset(o, 0, sizeof *o);
    o->desc = *desc;
    o->B = B, o->Hq = Hq, o->Hkv = Hkv, o->Nq = Nq, o->Nk = Nk, o->D = D, o->Dv = Dv;
    o->q = q, o->k = k, o->v = v;
    if (!o->desc.block_q)
        o->desc.block_q = 128;
    if (!o->desc.block_k)
        o->desc.block_k = 64;
    if (!o->desc.stride)
        o->desc.stride = 8;
    for (int i = 0; i < 2; i++)
        if (!o->desc.score_group[i])
            o->desc.score_group[i] = desc->mask == PSA_MASK_ERROR ? 8 : i ? o->desc.block_k : o->desc.block_q;
    default_levels(&o->desc);
    o->scale = desc->scale != 0 ? (double)desc->scale : 1 / sqrt((double)D);
    o->nq = (Nq + o->desc.block_q - 1) / o->desc.block_q;
    o->nk = (Nk + o->desc.block_k - 1) / o->desc.block_k;
    o->off = desc->causal ? Nk - Nq : 0;
}

typedef struct range {
    int64_t begin, end;
} range;

static range rows_of(const oracle *o, int64_t I) {
    range r = {I * o->desc.block_q, least((I + 1) * o->desc.block_q, o->Nq)};
    return r;
}

static range keys_of(const oracle *o, int64_t J) {
    range r = {J * o->desc.block_k, least((J + 1) * o->desc.block_k, o->Nk)};
    return r;
}

static int sees(const oracle *o, int64_t i, int64_t j) { return !o->desc.causal || j <= i + o->off; }

visibility oracle_pair(const oracle *o, int64_t I, int64_t J) {
    range r = rows_of(o, I), c = keys_of(o, J);
    int some = sees(o, r.end - 1, c.begin), all = sees(o, r.begin, c.end - 1);
    return all ? VISIBLE : some ? STRADDLES : HIDDEN;
}

int64_t oracle_map_size(const oracle *o) { return o->B * o->Hq * o->nq * o->nk; }

static int64_t pair_at(const oracle *o, int64_t b, int64_t h, int64_t I, int64_t J) {
    return ((b * o->Hq + h) * o->nq + I) * o->nk + J;
}

int oracle_level(const oracle *o, const uint8_t *levels, int64_t b, int64_t h, int64_t I, int64_t J) {
    visibility seen = oracle_pair(o, I, J);
    if (seen != VISIBLE)
        return seen == STRADDLES;
    return levels ? levels[pair_at(o, b, h, I, J)] : 1;
}

static int64_t kv_head(const oracle *o, int64_t h) { return h / (o->Hq / o->Hkv); }
static const double *q_row(const oracle *o, int64_t b, int64_t h, int64_t i) {
    return o->q + ((b * o->Hq + h) * o->Nq + i) * o->D;
}
static const double *k_row(const oracle *o, int64_t b, int64_t h, int64_t j) {
    return o->k + ((b * o->Hkv + kv_head(o, h)) * o->Nk + j) * o->D;
}
static const double *v_row(const oracle *o, int64_t b, int64_t h, int64_t j) {
    return o->v + ((b * o->Hkv + kv_head(o, h)) * o->Nk + j) * o->Dv;
}

/* ---- attention
 * -------------------------------------------------------------------------------------------------------- */

/* The pooled tokens one query block reads. */
typedef struct stream {
    double *k, *v, *bias;
    int64_t *last; /* last key that a pooled token covers */
    int64_t n;
} stream;

/* Mean and variance of every element of the queries that read a KV head; rows that are not finite are left out. */
static void moments(const oracle *o, int64_t b, int64_t h, double *mean, double *variance) {
    int64_t group = o->Hq / o->Hkv, first = kv_head(o, h) * group;
    double n = 0, square[PSA_MAX_D] = {0};
    memset(mean, 0, (size_t)o->D * sizeof *mean);
    for (int64_t row = 0; row < group * o->Nq; row++) {
        const double *q = q_row(o, b, first + row / o->Nq, row % o->Nq);
        if (!(dot(q, q, o->D) <= (double)FLT_MAX))
            continue;
        n++;
        for (int64_t d = 0; d < o->D; d++)
            mean[d] += q[d], square[d] += q[d] * q[d];
    }
    for (int64_t d = 0; d < o->D; d++) {
        mean[d] = n > 0 ? mean[d] / n : 0;
        variance[d] = n > 0 ? fmax(square[d] / n - mean[d] * mean[d], 0) : 0;
    }
}

/* The f32 nearest to x as a number of the type, the nearest one, ties to even. */
static double rounded(double x, psa_type type) {
    int exponent, bits = type == PSA_F16 ? 11 : 8, least_bit = type == PSA_F16 ? -24 : -133;
    if (type == PSA_F32 || !isfinite(x))
        return x;
    x = (double)(float)x;
    frexp(x, &exponent);
    double step = ldexp(1, exponent - bits > least_bit ? exponent - bits : least_bit);
    return rint(x / step) * step;
}

static double ln_cosh(double x) { return x + log1p(exp(-2 * x)) - log(2); }

/* A group of keys as one token: k[D], v[Dv] if not NULL; returns h of SPEC section 10, half the variance that the
 * queries' spread gives its logits. */
static double pool_group(const oracle *o, int64_t b, int64_t h, range c, const double *mean, const double *variance,
                         double *k, double *v, double *bias) {
    double w[PSA_MAX_BLOCK_K], top = -INFINITY, sum = 0, half = 0, inside = 0;
    int64_t n = c.end - c.begin;
    for (int64_t j = 0; j < n; j++) {
        w[j] = o->desc.tilt ? o->scale * dot(mean, k_row(o, b, h, c.begin + j), o->D) : 0;
        top = fmax(top, w[j]);
    }
    for (int64_t j = 0; j < n; j++)
        sum += exp(w[j] - top);
    memset(k, 0, (size_t)o->D * sizeof *k);
    if (v)
        memset(v, 0, (size_t)o->Dv * sizeof *v);
    for (int64_t j = 0; j < n; j++) {
        double p = exp(w[j] - top) / sum;
        inside += p * w[j];
        w[j] = p;
        for (int64_t d = 0; d < o->D; d++)
            k[d] += p * k_row(o, b, h, c.begin + j)[d];
        for (int64_t d = 0; v && d < o->Dv; d++)
            v[d] += p * v_row(o, b, h, c.begin + j)[d];
    }
    for (int64_t j = 0; j < n; j++)
        for (int64_t d = 0; d < o->D; d++)
            half += .5 * o->scale * o->scale * w[j] * variance[d] * pow(k_row(o, b, h, c.begin + j)[d] - k[d], 2);
    for (int64_t d = 0; d < o->D; d++)
        k[d] = rounded(k[d], o->type);
    for (int64_t d = 0; v && d < o->Dv; d++)
        v[d] = rounded(v[d], o->type);
    *bias = top + log(sum) - inside + (o->desc.tilt ? ln_cosh(sqrt(2 * half)) : 0);
    return half;
}

static void stream_build(const oracle *o, const uint8_t *levels, int64_t b, int64_t h, int64_t I, stream *s) {
    double mean[PSA_MAX_D], variance[PSA_MAX_D];
    moments(o, b, h, mean, variance);
    s->n = 0;
    for (int64_t J = 0; J < o->nk; J++) {
        int64_t L = oracle_level(o, levels, b, h, I, J);
        range keys = keys_of(o, J);
        for (int64_t t = keys.begin; L > 0 && t < keys.end; t += L, s->n++) {
            range group = {t, least(t + L, keys.end)};
            pool_group(o, b, h, group, mean, variance, s->k + s->n * o->D, s->v + s->n * o->Dv, s->bias + s->n);
            s->last[s->n] = group.end - 1;
        }
    }
}

static double attend_row(const oracle *o, const stream *s, const double *q, int64_t i, double *logit, double *out) {
    double top = -INFINITY, sum = 0;
    memset(out, 0, (size_t)o->Dv * sizeof *out);
    for (int64_t t = 0; t < s->n; t++) {
        logit[t] = sees(o, i, s->last[t]) ? o->scale * dot(q, s->k + t * o->D, o->D) + s->bias[t] : -INFINITY;
        if (!(logit[t] <= top))
            top = logit[t];
    }
    if (top == -INFINITY)
        return -INFINITY;
    for (int64_t t = 0; t < s->n; t++) {
        if (!sees(o, i, s->last[t]))
            continue;
        double p = exp(logit[t] - top);
        sum += p;
        for (int64_t d = 0; d < o->Dv; d++)
            out[d] += p * s->v[t * o->Dv + d];
    }
    for (int64_t d = 0; d < o->Dv; d++)
        out[d] /= sum;
    return top + log(sum);
}

void oracle_attend(const oracle *o, const uint8_t *levels, double *out, double *lse) {
    stream s = {zeros(o->Nk * o->D), zeros(o->Nk * o->Dv), zeros(o->Nk), NULL, 0};
    double *logit = zeros(o->Nk);
    s.last = (int64_t *)malloc((size_t)o->Nk * sizeof *s.last);
    for (int64_t b = 0; s.last && b < o->B; b++)
        for (int64_t h = 0; h < o->Hq; h++)
            for (int64_t I = 0; I < o->nq; I++) {
                range r = rows_of(o, I);
                stream_build(o, levels, b, h, I, &s);
                for (int64_t i = r.begin; i < r.end; i++) {
                    int64_t row = (b * o->Hq + h) * o->Nq + i;
                    lse[row] = attend_row(o, &s, q_row(o, b, h, i), i, logit, out + row * o->Dv);
                }
            }
    free(s.k), free(s.v), free(s.bias), free(s.last), free(logit);
}

/* ---- scores
 * --------------------------------------------------------------------------------------------------------------- */

/* Rows sum to 1; a row without mass is uniform over the visible blocks. */
static void normalise(const oracle *o, double *scores) {
    for (int64_t row = 0; row < o->B * o->Hq * o->nq; row++) {
        double sum = 0, visible = 0, *s = scores + row * o->nk;
        for (int64_t J = 0; J < o->nk; J++) {
            sum += s[J];
            visible += oracle_pair(o, row % o->nq, J) != HIDDEN;
        }
        for (int64_t J = 0; J < o->nk; J++)
            s[J] = oracle_pair(o, row % o->nq, J) == HIDDEN ? 0 : sum > 0 ? s[J] / sum : 1 / visible;
    }
}

/* The tokens of a block that a sample picks: offsets beyond a ragged end are left out, but never all of them. */
static int pick(range block, const uint8_t *sample, int n, int64_t *tokens) {
    int picked = 0;
    for (int i = 0; i < n; i++)
        if (block.begin + sample[i] < block.end)
            tokens[picked++] = block.begin + sample[i];
    if (!picked)
        tokens[picked++] = block.begin + sample[0] % (block.end - block.begin);
    return picked;
}

typedef struct sampled {
    int64_t *token, *block;
    int64_t n;
} sampled;

static sampled sample_keys(const oracle *o, const uint8_t *sample_k, int n_k) {
    sampled s = {NULL, NULL, 0};
    s.token = (int64_t *)malloc((size_t)(o->nk * n_k) * sizeof *s.token);
    s.block = (int64_t *)malloc((size_t)(o->nk * n_k) * sizeof *s.block);
    if (!s.token || !s.block)
        abort();
    for (int64_t J = 0; J < o->nk; J++)
        for (int n = pick(keys_of(o, J), sample_k, n_k, s.token + s.n); n > 0; n--)
            s.block[s.n++] = J;
    return s;
}

/* One sampled query row's share of its row of the score map: maximum, or sum and count for the mean. */
static void sample_row(const oracle *o, int64_t b, int64_t h, int64_t i, const sampled *keys, double *logit,
                       double *score, double *count) {
    double top = -INFINITY, sum = 0;
    for (int64_t t = 0; t < keys->n; t++) {
        logit[t] =
            sees(o, i, keys->token[t]) ? o->scale * dot(q_row(o, b, h, i), k_row(o, b, h, keys->token[t]), o->D) : NAN;
        if (logit[t] > top)
            top = logit[t];
    }
    for (int64_t t = 0; t < keys->n; t++)
        sum += isnan(logit[t]) ? 0 : exp(logit[t] - top);
    for (int64_t t = 0; t < keys->n; t++) {
        double p = exp(logit[t] - top) / (o->desc.score_norm ? sum : 1), *s = score + keys->block[t];
        if (isnan(logit[t]))
            continue;
        *s = o->desc.score_mean ? *s + p : p > *s ? p : *s;
        count[keys->block[t]]++;
    }
}

void oracle_score_sample(const oracle *o, const uint8_t *sample_q, int n_q, const uint8_t *sample_k, int n_k,
                         double *scores) {
    sampled keys = sample_keys(o, sample_k, n_k);
    double *logit = zeros(keys.n), *count = zeros(o->nk);
    int64_t rows[PSA_MAX_BLOCK_Q];
    memset(scores, 0, (size_t)oracle_map_size(o) * sizeof *scores);
    for (int64_t row = 0; row < o->B * o->Hq * o->nq; row++) {
        int64_t I = row % o->nq, h = row / o->nq % o->Hq, b = row / o->nq / o->Hq;
        double *s = scores + row * o->nk;
        memset(count, 0, (size_t)o->nk * sizeof *count);
        for (int n = pick(rows_of(o, I), sample_q, n_q, rows); n > 0; n--)
            sample_row(o, b, h, rows[n - 1], &keys, logit, s, count);
        for (int64_t J = 0; o->desc.score_mean && J < o->nk; J++)
            s[J] /= count[J] > 0 ? count[J] : 1;
    }
    normalise(o, scores);
    free(keys.token), free(keys.block), free(logit), free(count);
}

/* Logit of query group g and key group h_: queries reversed, over the tokens that exist on both sides. */
static double antidiagonal(const oracle *o, int64_t b, int64_t h, int64_t g, int64_t group_k) {
    int64_t S = o->desc.stride;
    double sum = 0;
    for (int64_t i = 0; i < S; i++) {
        int64_t query = g * S + S - 1 - i, key = group_k * S + i;
        if (query < o->Nq && key < o->Nk)
            sum += dot(q_row(o, b, h, query), k_row(o, b, h, key), o->D);
    }
    return o->scale / (double)S * sum;
}

void oracle_score_antidiagonal(const oracle *o, double *scores) {
    int64_t S = o->desc.stride, n_g = (o->Nq + S - 1) / S, n_h = (o->Nk + S - 1) / S;
    double *logit = zeros(n_h);
    memset(scores, 0, (size_t)oracle_map_size(o) * sizeof *scores);
    for (int64_t bh = 0; bh < o->B * o->Hq; bh++)
        for (int64_t g = 0; g < n_g; g++) {
            double top = -INFINITY, sum = 0;
            int64_t n = 0, last_query = least(g * S + S, o->Nq) - 1;
            while (n < n_h && sees(o, last_query, n * S)) {
                logit[n] = antidiagonal(o, bh / o->Hq, bh % o->Hq, g, n);
                top = fmax(top, logit[n++]);
            }
            for (int64_t c = 0; c < n; c++)
                sum += exp(logit[c] - top);
            for (int64_t c = 0; c < n; c++)
                scores[(bh * o->nq + g * S / o->desc.block_q) * o->nk + c * S / o->desc.block_k] +=
                    exp(logit[c] - top) / sum;
        }
    normalise(o, scores);
    free(logit);
}

static void mean_rows(const double *x, range r, int64_t D, double *mean) {
    for (int64_t d = 0; d < D; d++) {
        mean[d] = 0;
        for (int64_t i = r.begin; i < r.end; i++)
            mean[d] += x[i * D + d];
        mean[d] /= (double)(r.end - r.begin);
    }
}

/* Logits of the mean of rows against the groups of L keys of the sequence, one for every L keys, and the log of their
 * sum. Groups the last of the rows does not see are -inf. */
static double group_logits(const oracle *o, int64_t b, int64_t h, range rows, int64_t L, int biased, double *logit) {
    double mean[PSA_MAX_D], variance[PSA_MAX_D], q[PSA_MAX_D], k[PSA_MAX_D], bias, top = -INFINITY, sum = 0;
    moments(o, b, h, mean, variance);
    mean_rows(q_row(o, b, h, 0), rows, o->D, q);
    for (int64_t j = 0; j < o->Nk; j += L) {
        range keys = {j, least(j + L, o->Nk)};
        pool_group(o, b, h, keys, mean, variance, k, NULL, &bias);
        logit[j / L] = sees(o, rows.end - 1, j) ? o->scale * dot(q, k, o->D) + (biased ? bias : 0) : -INFINITY;
        top = fmax(top, logit[j / L]);
    }
    for (int64_t j = 0; j < o->Nk; j += L)
        sum += logit[j / L] == -INFINITY ? 0 : exp(logit[j / L] - top);
    return top + log(sum);
}

/* Means of groups, with their biases where a group is less than a block, and always for mask ERROR. */
void oracle_score_pooled(const oracle *o, double *scores) {
    int64_t gq = o->desc.score_group[0], gk = o->desc.score_group[1];
    int biased = gk < o->desc.block_k || o->desc.mask == PSA_MASK_ERROR;
    double *logit = zeros(o->Nk);
    memset(scores, 0, (size_t)oracle_map_size(o) * sizeof *scores);
    for (int64_t row = 0; row < o->B * o->Hq * o->nq; row++) {
        int64_t I = row % o->nq, h = row / o->nq % o->Hq, b = row / o->nq / o->Hq;
        for (int64_t first = rows_of(o, I).begin; first < rows_of(o, I).end; first += gq) {
            range rows = {first, least(first + gq, rows_of(o, I).end)};
            double total = group_logits(o, b, h, rows, gk, biased, logit);
            for (int64_t j = 0; j < o->Nk; j += gk)
                if (logit[j / gk] > -INFINITY)
                    scores[pair_at(o, b, h, I, j / o->desc.block_k)] += exp(logit[j / gk] - total);
        }
    }
    normalise(o, scores);
    free(logit);
}

void oracle_score_exact(const oracle *o, double *scores) {
    double *p = zeros(o->Nk);
    memset(scores, 0, (size_t)oracle_map_size(o) * sizeof *scores);
    for (int64_t row = 0; row < o->B * o->Hq * o->Nq; row++) {
        int64_t i = row % o->Nq, h = row / o->Nq % o->Hq, b = row / o->Nq / o->Hq, n = 0;
        double top = -INFINITY, sum = 0;
        while (n < o->Nk && sees(o, i, n)) {
            p[n] = o->scale * dot(q_row(o, b, h, i), k_row(o, b, h, n), o->D);
            top = fmax(top, p[n++]);
        }
        for (int64_t j = 0; j < n; j++)
            sum += exp(p[j] - top);
        for (int64_t j = 0; j < n; j++)
            scores[pair_at(o, b, h, i / o->desc.block_q, j / o->desc.block_k)] += exp(p[j] - top) / sum;
    }
    normalise(o, scores);
    free(p);
}

/* ---- masks
 * ---------------------------------------------------------------------------------------------------------------- */

static double cosine(const double *a, const double *b, int64_t n) {
    double norm = sqrt(dot(a, a, n)) * sqrt(dot(b, b, n));
    return norm > 0 ? dot(a, b, n) / norm : 0;
}

double oracle_similarity(const oracle *o, int64_t b, int64_t h, int64_t J, int L) {
    range keys = keys_of(o, J);
    double sum = 0, n = 0;
    for (int64_t t = keys.begin; t + 1 < keys.end; t += L) {
        sum += cosine(k_row(o, b, h, t), k_row(o, b, h, least(t + L, keys.end) - 1), o->D);
        n++;
    }
    return n > 0 ? sum / n : -2;
}

int oracle_cap(const oracle *o, int64_t b, int64_t h, int64_t J) {
    for (int i = o->desc.n_sim_min; i > 0; i--) {
        double mean = oracle_similarity(o, b, h, J, 1 << i);
        if (mean != -2 && mean > o->desc.sim_min[i - 1])
            return 1 << i;
    }
    return 1;
}

static int levels_in_use(const psa_desc *d) {
    int n = 0;
    for (int i = 0; i < PSA_MAX_LEVELS; i++)
        if (d->level_end[i] > 0)
            n = i + 1;
    return n;
}

static int finest_in_use(const psa_desc *d) {
    int i = 0;
    while (i < PSA_MAX_LEVELS - 1 && !(d->level_end[i] > 0))
        i++;
    return 1 << i;
}

static int level_by_count(const psa_desc *d, int64_t p) {
    int64_t end = 0;
    for (int i = 0; i < PSA_MAX_LEVELS; i++) {
        end += d->level_count[i];
        if (p < end)
            return 1 << i;
    }
    return 0;
}

static int level_by_share(const psa_desc *d, int64_t p, int64_t n) {
    if (p == 0)
        return finest_in_use(d);
    for (int i = 0; i < levels_in_use(d); i++)
        if (p < (int64_t)floor(d->level_end[i] * (double)n))
            return 1 << i;
    return 0;
}

/* mass: of the blocks ahead. */
static int level_by_mass(const psa_desc *d, int64_t p, int64_t n, double mass, double own) {
    int level = 0;
    for (int i = levels_in_use(d) - 1; i >= 0; i--)
        if (mass + (d->inclusive ? own : 0) <= d->level_end[i] + 1e-6)
            level = 1 << i;
    if (d->inclusive && p == 0 && (!level || level > finest_in_use(d)))
        level = finest_in_use(d);
    if (d->min_full > 0 && p < (int64_t)floor(d->min_full * (double)n) + 1)
        level = 1;
    return level;
}

static int has_counts(const psa_desc *d) {
    for (int i = 0; i < PSA_MAX_LEVELS; i++)
        if (d->level_count[i])
            return 1;
    return 0;
}

/* Levels by rank: descending score, ties by lower index; hidden blocks stay 0. */
static void rank_levels(const oracle *o, int64_t I, const float *score, uint8_t *level, int64_t *order) {
    const psa_desc *d = &o->desc;
    int64_t n = 0;
    double mass = 0;
    for (int64_t J = 0; J < o->nk; J++) {
        if (oracle_pair(o, I, J) == HIDDEN)
            continue;
        int64_t p = n++;
        for (; p > 0 && score[order[p - 1]] < score[J]; p--)
            order[p] = order[p - 1];
        order[p] = J;
    }
    for (int64_t p = 0; p < n; p++) {
        double own = (double)score[order[p]];
        level[order[p]] = (uint8_t)(d->mask == PSA_MASK_THRESHOLD ? level_by_mass(d, p, n, mass, own)
                                    : has_counts(d)               ? level_by_count(d, p)
                                                                  : level_by_share(d, p, n));
        mass += own;
    }
}

static int protected_pair(const oracle *o, int64_t I, int64_t J) {
    const psa_desc *d = &o->desc;
    range r = rows_of(o, I), c = keys_of(o, J), at = {r.begin + o->off, r.end + o->off};
    int key_side = c.begin < d->n_prefix || c.end > o->Nk - d->n_suffix;
    int64_t first = at.begin > 0 ? at.begin : 0; /* tokens before the first key are nobody's prefix */
    int query_side = first < least(at.end, d->n_prefix) || r.end > o->Nq - d->n_suffix;
    int own = d->diagonal && c.begin < at.end && at.begin < c.end;
    return key_side || query_side || (d->sink && J == 0) || own;
}

void oracle_protect(const oracle *o, uint8_t *levels) {
    for (int64_t row = 0; row < o->B * o->Hq * o->nq; row++) {
        int64_t I = row % o->nq, h = row / o->nq % o->Hq, b = row / o->nq / o->Hq;
        uint8_t *level = levels + row * o->nk;
        for (int64_t J = 0; J < o->nk; J++) {
            visibility seen = oracle_pair(o, I, J);
            int cap = o->desc.n_sim_min > 0 ? oracle_cap(o, b, h, J) : o->desc.block_k;
            if (level[J] > cap)
                level[J] = (uint8_t)cap;
            if (o->desc.mask == PSA_MASK_DENSE || protected_pair(o, I, J) || seen == STRADDLES)
                level[J] = 1;
            if (level[J] == 0 && o->desc.skip_mean)
                level[J] = (uint8_t)o->desc.block_k;
            if (seen == HIDDEN)
                level[J] = 0;
        }
    }
}

void oracle_mask(const oracle *o, const float *scores, uint8_t *levels) {
    int64_t *order = (int64_t *)malloc((size_t)o->nk * sizeof *order);
    memset(levels, 0, (size_t)oracle_map_size(o));
    for (int64_t row = 0; order && o->desc.mask != PSA_MASK_DENSE && row < o->B * o->Hq * o->nq; row++)
        rank_levels(o, row % o->nq, scores + row * o->nk, levels + row * o->nk, order);
    oracle_protect(o, levels);
    free(order);
}

/* ---- predicted errors
 * --------------------------------------------------------------------------------------------------- */

/* What is known of the keys at level i, of 1 << i keys. */
typedef struct known {
    double *half[PSA_MAX_LEVELS];  /* h, mean over the groups of L in each group of the score */
    double *value[PSA_MAX_LEVELS]; /* tau, mean over those in each block */
    double *mass;                  /* of every key, as a logit: scale * mean . k with tilt */
} known;

/* ln of the sum of exp over the keys of a group. */
static double log_mass(const double *mass, range c) {
    double sum = 0;
    for (int64_t j = c.begin; j < c.end; j++)
        sum += exp(mass[j] - mass[c.begin]);
    return mass[c.begin] + log(sum);
}

/* mean[Dv] of the values of a group, weighted by the keys' masses; returns their variance around it. */
static double value_spread(const oracle *o, int64_t b, int64_t h, range c, const double *mass, double *mean) {
    double square = 0, total = log_mass(mass, c);
    for (int64_t d = 0; d < o->Dv; d++) {
        mean[d] = 0;
        for (int64_t j = c.begin; j < c.end; j++)
            mean[d] += exp(mass[j] - total) * v_row(o, b, h, j)[d];
        for (int64_t j = c.begin; j < c.end; j++)
            square += exp(mass[j] - total) * pow(v_row(o, b, h, j)[d] - mean[d], 2);
    }
    return square;
}

/* Variance of the values of a head: inside its blocks, and of their means. */
static double head_variance(const oracle *o, int64_t b, int64_t h, const double *mass) {
    double v[PSA_MAX_D], sum[PSA_MAX_D] = {0}, square[PSA_MAX_D] = {0}, inside = 0, between = 0, n = (double)o->nk;
    for (int64_t J = 0; J < o->nk; J++) {
        inside += value_spread(o, b, h, keys_of(o, J), mass, v);
        for (int64_t d = 0; d < o->Dv; d++)
            sum[d] += v[d], square[d] += v[d] * v[d];
    }
    for (int64_t d = 0; d < o->Dv; d++)
        between += square[d] / n - sum[d] / n * (sum[d] / n);
    return inside / n + between;
}

static void known_level(const oracle *o, int64_t b, int64_t h, int i, double variance_v, known *x) {
    double mean[PSA_MAX_D], variance[PSA_MAX_D], k[PSA_MAX_D], v[PSA_MAX_D], bias;
    double *groups = zeros(o->Nk), *blocks = zeros(o->nk);
    int64_t L = INT64_C(1) << i, gk = o->desc.score_group[1];
    moments(o, b, h, mean, variance);
    x->half[i] = zeros(o->Nk), x->value[i] = zeros(o->nk);
    for (int64_t t = 0; L <= o->desc.block_k && t < o->Nk; t += L) {
        range c = {t, least(t + L, o->Nk)};
        x->half[i][t / gk] += pool_group(o, b, h, c, mean, variance, k, NULL, &bias);
        x->value[i][t / o->desc.block_k] += variance_v > 0 ? value_spread(o, b, h, c, x->mass, v) / variance_v : 0;
        groups[t / gk]++, blocks[t / o->desc.block_k]++;
    }
    for (int64_t g = 0; g < o->Nk; g++)
        x->half[i][g] /= groups[g] > 0 ? groups[g] : 1;
    for (int64_t J = 0; J < o->nk; J++)
        x->value[i][J] /= blocks[J] > 0 ? blocks[J] : 1;
    free(groups), free(blocks);
}

static known known_of(const oracle *o, int64_t b, int64_t h) {
    double mean[PSA_MAX_D], variance[PSA_MAX_D];
    known x;
    moments(o, b, h, mean, variance);
    x.mass = zeros(o->Nk);
    for (int64_t j = 0; j < o->Nk; j++)
        x.mass[j] = o->desc.tilt ? o->scale * dot(mean, k_row(o, b, h, j), o->D) : 0;
    double variance_v = head_variance(o, b, h, x.mass);
    for (int i = 0; i < PSA_MAX_LEVELS; i++)
        known_level(o, b, h, i, variance_v, &x);
    return x;
}

static void known_free(known *x) {
    for (int i = 0; i < PSA_MAX_LEVELS; i++)
        free(x->half[i]), free(x->value[i]);
    free(x->mass);
}

/* e of some rows for block J at level 1 << i, as psa.h's manual has it; P and coarse: the rows' attention to the groups
 * of the score and to those of the level. */
static double pair_error(const oracle *o, const known *x, int64_t J, int i, const double *P, const double *coarse) {
    int64_t G = o->desc.score_group[1], L = INT64_C(1) << i, last = keys_of(o, J).end;
    double missed = 0, off = 0, noise = 0;
    int fine = 0;
    while (1 << fine < G)
        fine++;
    int inner = L < G ? i : fine;
    for (int64_t j = keys_of(o, J).begin; j < last; j += G) {
        range group = {j, least(j + G, o->Nk)}, over = {j / L * L, least(j / L * L + L, o->Nk)};
        double p = P[j / G], half = x->half[inner][j / G];
        noise += p * p * 2 * half * x->value[inner][J] / (double)G;
        missed += L <= G ? p * ln_cosh(sqrt(2 * half)) : p;
        if (L > G)
            off += pow(p - coarse[j / L] * exp(log_mass(x->mass, group) - log_mass(x->mass, over)), 2);
    }
    for (int64_t j = keys_of(o, J).begin; L > G && j < last; j += L)
        missed -= coarse[j / L];
    return missed * missed + noise + off * fmax(x->value[i][J] - x->value[fine][J], 0);
}

/* The logits of the rows' mean at a level above the groups' are those of its groups, each times its share, as if the
 * coarser keys were not rounded to their type; with the level's own bias. */
static void coarse_logits(const oracle *o, int64_t b, int64_t h, range rows, int64_t L, const double *mass,
                          double *logit) {
    int64_t G = o->desc.score_group[1];
    double *group = zeros(o->Nk), *rounded_key = zeros(o->Nk);
    group_logits(o, b, h, rows, L, 1, logit);
    group_logits(o, b, h, rows, L, 0, rounded_key);
    group_logits(o, b, h, rows, G, 0, group);
    for (int64_t j = 0; L > G && j < o->Nk; j += L)
        logit[j / L] -= rounded_key[j / L];
    for (int64_t j = 0; L > G && j < o->Nk; j += G) {
        range own = {j, least(j + G, o->Nk)}, over = {j / L * L, least(j / L * L + L, o->Nk)};
        logit[j / L] += group[j / G] * exp(log_mass(mass, own) - log_mass(mass, over));
    }
    free(group), free(rounded_key);
}

/* Adds what the rows' mean loses in each block at level i, and at PSA_MAX_LEVELS where it is skipped. */
static void add_errors(const oracle *o, int64_t b, int64_t h, range rows, const known *x, double *e) {
    int64_t G = o->desc.score_group[1];
    double *P = zeros(o->Nk), *coarse = zeros(o->Nk), total = group_logits(o, b, h, rows, G, 1, P);
    for (int64_t g = 0; g < o->Nk; g++)
        P[g] = exp(P[g] - total);
    for (int i = 1; 1 << i <= o->desc.block_k; i++) {
        coarse_logits(o, b, h, rows, INT64_C(1) << i, x->mass, coarse);
        for (int64_t g = 0; g < o->Nk; g++)
            coarse[g] = exp(coarse[g] - total);
        for (int64_t J = 0; J < o->nk; J++)
            e[J * (PSA_MAX_LEVELS + 1) + i] += pair_error(o, x, J, i, P, coarse);
    }
    for (int64_t J = 0; J < o->nk; J++) {
        double mass = 0;
        for (int64_t j = keys_of(o, J).begin; j < keys_of(o, J).end; j += G)
            mass += P[j / G];
        e[J * (PSA_MAX_LEVELS + 1) + PSA_MAX_LEVELS] += mass * mass;
    }
    free(P), free(coarse);
}

void oracle_errors(const oracle *o, int64_t b, int64_t h, int64_t I, double *e) {
    int64_t gq = o->desc.score_group[0], size = o->nk * (PSA_MAX_LEVELS + 1);
    known x = known_of(o, b, h);
    double n = 0;
    memset(e, 0, (size_t)size * sizeof *e);
    for (int64_t first = rows_of(o, I).begin; first < rows_of(o, I).end; first += gq, n++) {
        range rows = {first, least(first + gq, rows_of(o, I).end)};
        add_errors(o, b, h, rows, &x, e);
    }
    for (int64_t i = 0; i < size; i++)
        e[i] /= n;
    known_free(&x);
}

/* ---- statistics
 * --------------------------------------------------------------------------------------------------------- */

static int level_slot(int level) {
    int slot = 0;
    for (; level; level >>= 1)
        slot++;
    return slot;
}

static void stats_head(const oracle *o, const uint8_t *levels, int64_t b, int64_t h, psa_stats *s, double *work) {
    for (int64_t I = 0; I < o->nq; I++)
        for (int64_t J = 0; J < o->nk; J++) {
            range r = rows_of(o, I), c = keys_of(o, J);
            int level = oracle_level(o, levels, b, h, I, J);
            int64_t area = (r.end - r.begin) * (o->D + o->Dv), tokens = c.end - c.begin;
            if (oracle_pair(o, I, J) == HIDDEN)
                continue;
            s->pairs++;
            s->level_blocks[level_slot(level)]++;
            s->dense_mul_adds += tokens * area;
            s->mul_adds += level ? (tokens + level - 1) / level * area : 0;
            *work += level ? 1.0 / level : 0;
        }
}

void oracle_stats(const oracle *o, const uint8_t *levels, int64_t b, int64_t h, psa_stats *stats) {
    double work = 0;
    memset(stats, 0, sizeof *stats);
    for (int64_t x = 0; x < o->B; x++)
        for (int64_t y = 0; y < o->Hq; y++)
            if ((b < 0 || b == x) && (h < 0 || h == y))
                stats_head(o, levels, x, y, stats, &work);
    stats->density = stats->pairs ? work / (double)stats->pairs : 0;
    stats->sparsity = 1 - stats->density;
}
