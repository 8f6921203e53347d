/* oracle.h - the definition of pyramid sparse attention in plain double-precision loops. It shares no code with the
 * library and takes from psa.h only the desc that says what is asked for. Everything is contiguous [B][H][N][D]. */
#ifndef ORACLE_H
#define ORACLE_H

#include <stdint.h>

#include "psa.h"

typedef struct oracle {
    psa_desc desc; /* defaults resolved by the oracle itself */
    double scale;
    int64_t B, Hq, Hkv, Nq, Nk, D, Dv;
    int64_t nq, nk;
    int64_t off; /* query i stands at token i + off */
    const double *q, *k, *v;
    psa_type type; /* of k and v, and so of their means; F32, the default: means are not rounded */
} oracle;

/* v may be NULL (and Dv 0) where only scores and masks are asked for. */
void oracle_init(oracle *o, const psa_desc *desc, int64_t B, int64_t Hq, int64_t Hkv, int64_t Nq, int64_t Nk, int64_t D,
                 int64_t Dv, const double *q, const double *k, const double *v);

typedef enum visibility { HIDDEN = 0, STRADDLES, VISIBLE } visibility;

visibility oracle_pair(const oracle *o, int64_t I, int64_t J);
int64_t oracle_map_size(const oracle *o);

/* The level a block pair is really read at: levels NULL means dense; causality has the last word. */
int oracle_level(const oracle *o, const uint8_t *levels, int64_t b, int64_t h, int64_t I, int64_t J);

/* out [B][Hq][Nq][Dv], lse [B][Hq][Nq]. */
void oracle_attend(const oracle *o, const uint8_t *levels, double *out, double *lse);

/* Score maps [B][Hq][nq][nk]. The sampled offsets are the caller's. */
void oracle_score_sample(const oracle *o, const uint8_t *sample_q, int n_q, const uint8_t *sample_k, int n_k,
                         double *scores);
void oracle_score_antidiagonal(const oracle *o, double *scores);
void oracle_score_pooled(const oracle *o, double *scores);
void oracle_score_exact(const oracle *o, double *scores);

/* Mean cosine of the first and last token of the groups of L in KV block J; -2 where no group has two tokens. */
double oracle_similarity(const oracle *o, int64_t b, int64_t h, int64_t J, int L);
int oracle_cap(const oracle *o, int64_t b, int64_t h, int64_t J); /* coarsest level allowed */

/* Levels from scores (f32, as the library's masks get them). */
void oracle_mask(const oracle *o, const float *scores, uint8_t *levels);

/* What is done to a map of levels afterwards: cap, protection, causality, skip_mean. */
void oracle_protect(const oracle *o, uint8_t *levels);

/* Mask ERROR: e[nk][PSA_MAX_LEVELS + 1], the squared errors predicted for query block I with each KV block at level
 * 1 << i; the last is that of skipping it. */
void oracle_errors(const oracle *o, int64_t b, int64_t h, int64_t I, double *e);

/* Over all batches and heads, or for one (b, h). */
void oracle_stats(const oracle *o, const uint8_t *levels, int64_t b, int64_t h, psa_stats *stats);

#endif
