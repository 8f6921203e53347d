/* gpu_model.h - what the kernels of psa_cuda.cu do, counted from their tiles, and the time that a GPU needs for it if
 * no part ever waits for another: a bound, not a measurement. tests/cuda/test_cuda.cpp compares the counts of score and
 * attend with the emulator's; instructions are estimates from machine code for sm_90a. Include after psa.h. C99 and
 * C++. */
#ifndef GPU_MODEL_H
#define GPU_MODEL_H

#include <math.h>

typedef struct model_gpu {
    const char *name;
    double sms, clock;  /* Hz under load */
    double mma_cycles;  /* of an SM for one m16n8k16 with f32 sums */
    double dram, l2;    /* bytes a second */
    double shared;      /* bytes of shared memory that a CTA may have */
    int wgmma;          /* attend is the kernel for sm_90a, where that can do it */
} model_gpu;

/* Data sheets; L2 as others measured it. On Hopper mma.sync reaches 0.62 of what wgmma does (arXiv 2402.13499); score
 * and what else is not attend has mma.sync there. */
static const model_gpu model_gpus[] = {
    {"A100", 108, 1.41e9, 2, 2.04e12, 5e12, 163 * 1024, 0},
    {"RTX 4090", 128, 2.52e9, 8, 1.01e12, 5e12, 99 * 1024, 0},
    {"H200", 132, 1.83e9, 1 / 0.62, 4.8e12, 5.5e12, 227 * 1024, 0},
    {"H200, wgmma", 132, 1.83e9, 1 / 0.62, 4.8e12, 5.5e12, 227 * 1024, 1},
};
enum { MODEL_GPUS = sizeof model_gpus / sizeof *model_gpus };

typedef struct model_cost {
    double mmas;         /* m16n8k16 */
    double wavefronts;   /* 128 bytes to or from shared memory, one a cycle */
    double exps;         /* exp2 of a lane, 16 a cycle */
    double instructions; /* of a warp, 4 a cycle */
    double l2_bytes, dram_bytes;
} model_cost;

static double model_max(double a, double b) { return a > b ? a : b; }
static double model_min(double a, double b) { return a < b ? a : b; }
static double model_padded(const psa_plan *p) {
    double d = model_max((double)p->D, (double)p->Dv);
    return d <= 64 ? 64 : d <= 128 ? 128 : 256;
}

/* Bytes of every row of K and V and of their means, once. */
static double model_kv_bytes(const psa_plan *p) {
    return 2.0 * (double)(p->B * p->Hkv * (p->Nk + p->pooled_rows) * (p->D + p->Dv));
}

/* Whether the attend for sm_90a can do it. */
static int model_has_wgmma(const psa_plan *p) {
    return p->D == p->Dv && (p->D == 64 || p->D == 128) && p->desc.block_q > 64;
}

/* That kernel: tiles of 128 queries and 128 rows by two warpgroups; wgmma takes 1 cycle for an m16n8k16. A warpgroup
 * reads all of K and V from shared memory, and its queries; TMA writes K and V there. Instructions of a tile: those of
 * the inner loop (make cuda prints them) of 8 warps, about 350 of each of the 4 that bring rows in. */
static model_cost model_attend_wgmma(const psa_plan *p, double rows) {
    double d = (double)p->D, blocks = (double)(p->B * p->Hq * p->nq) * ceil(p->desc.block_q / 128.0);
    double tiles = blocks * ceil(rows / 128), q_bytes = (double)(p->B * p->Hq * p->Nq) * 2 * d * 2;
    model_cost c;
    c.mmas = tiles * 8 * 16 * d / 16 * 2;
    c.wavefronts = tiles * (2 * (64 + 128 + 128) + 2 * 128) * d * 2 / 128;
    c.exps = tiles * 128 * 128;
    c.instructions = tiles * (8 * (d == 64 ? 429 : 462) + 4 * 350);
    c.l2_bytes = tiles * 128 * 2 * d * 2 + q_bytes;
    c.dram_bytes = model_kv_bytes(p) + q_bytes;
    return c;
}

/* attend, for query blocks whose streams have `rows` rows. Per tile of bm queries and bn rows, by 4 warps. */
static model_cost model_attend(const psa_plan *p, double rows) {
    double padded = model_padded(p), bn = padded == 256 ? 32 : 64;
    double bm = p->desc.block_q <= 64 || padded == 256 ? 64 : 128;
    double mt = bm / 64, kd = ceil((double)p->D / 16), jd = ceil((double)p->Dv / 16);
    double copies = bn * (padded / 8) / 128; /* of 16 bytes of K and of V, per thread */
    double blocks = (double)(p->B * p->Hq * p->nq) * ceil(p->desc.block_q / bm), tiles = blocks * ceil(rows / bn);
    double q_bytes = (double)(p->B * p->Hq * p->Nq * (p->D + p->Dv)) * 2;
    double mmas = bm / 16 * bn / 8 * (kd + jd), matrices = 4 * (kd * (mt + bn / 16) + bn / 16 * jd);
    model_cost c;
    c.mmas = tiles * mmas;
    c.wavefronts = tiles * (4 * matrices + bn * (double)(p->D + p->Dv) / 64 + 4 * copies + 40);
    c.exps = tiles * bm * bn;
    /* per logit: maximum, scaling, exp2, sum, half a conversion */
    c.instructions = tiles * (mmas + matrices + 4.5 * bm * bn / 32 + 4 * (22 * copies + 170));
    c.l2_bytes = tiles * bn * (double)(p->D + p->Dv) * 2 + q_bytes;
    c.dram_bytes = model_kv_bytes(p) + q_bytes;
    return c;
}

/* score: steps of 16 columns by one warp, for each group of lanes. */
static model_cost model_score(const psa_plan *p, double shared) {
    const psa_desc *d = &p->desc;
    int sample = d->score == PSA_SCORE_SAMPLE, pooled = d->score == PSA_SCORE_POOLED;
    double padded = (double)p->D <= 64 ? 64 : (double)p->D <= 128 ? 128 : 256, most = padded > 128 ? 1 : 2;
    double parts = d->score == PSA_SCORE_ANTIDIAGONAL ? d->stride : 1, n = (double)p->nk;
    double lanes = sample ? p->n_sample_q : d->block_q / (pooled ? d->score_group[0] : parts);
    double keys = sample ? p->n_sample_k : d->block_k / (pooled ? d->score_group[1] : parts);
    double tiles = model_min(ceil(lanes / 16), most), groups = ceil(lanes / (16 * tiles));
    double items = keys <= 8 ? n / 2 : n * ceil(keys / 16);
    double fixed = 16 * tiles * (parts * padded * 2 + 44) + 4 * (padded > 128 ? 2 : 3) * 32 * padded;
    double passes = (shared - fixed) / (64 * tiles) - 2 < n ? 2 : 1; /* does the strip hold all blocks? */
    double rows = (double)(p->B * p->Hq * p->nq) * groups, steps = rows * items * parts * passes;
    double ends = rows * n * passes, reduces = steps / parts; /* of blocks; of logits */
    double first = parts == 1 ? rows * 4 * passes : steps;    /* loads of A */
    model_cost c;
    c.mmas = steps * padded / 16 * 2 * most;
    c.wavefronts = steps * padded / 16 * 4 * 2 + first * padded / 16 * 4 * most + ends * tiles * 16 / 8 +
                   rows * n / 32 * tiles * 16 * 2;
    c.exps = reduces * 32 * tiles * 16 + ends * 32 * tiles * 4 + rows * n * tiles * 16;
    c.instructions = steps * (padded / 16 * (2 * most + 1 + 8) + 60) + reduces * tiles * 4 * 45;
    c.l2_bytes = steps * 16 * (double)p->D * 2;
    c.dram_bytes = (double)(p->B * p->Hkv * p->Nk * p->D) * 2 + (double)(p->B * p->Hq * p->nq * p->nk) * 4;
    return c;
}

/* mask: bitonic sort, every exchange by 24 instructions of which 4 move 8 bytes. */
static model_cost model_mask(const psa_plan *p) {
    double rows = (double)(p->B * p->Hq * p->nq), bits = ceil(log2(model_max(2, (double)p->nk)));
    double exchanges = rows * bits * (bits + 1) / 2 * exp2(bits - 1) / 32;
    model_cost c = {0, 0, 0, 0, 0, 0};
    c.wavefronts = exchanges * 8;
    c.instructions = exchanges * 24;
    c.dram_bytes = rows * (double)p->nk * 7; /* scores, levels, list */
    return c;
}

/* pool: patches of 8 x 8 elements, about 375 instructions of a thread each. */
static model_cost model_pool(const psa_plan *p) {
    double elements = (double)(p->B * p->Hkv * p->Nk * (p->D + p->Dv));
    model_cost c = {0, 0, 0, 0, 0, 0};
    c.instructions = elements / 64 / 32 * 375;
    c.dram_bytes = model_kv_bytes(p) + elements * ((double)psa_type_size(p->k.type) - 2);
    return c;
}

/* attend on a GPU. */
static model_cost model_attend_on(const model_gpu *g, const psa_plan *p, double rows) {
    model_cost c = g->wgmma && model_has_wgmma(p) ? model_attend_wgmma(p, rows) : model_attend(p, rows);
    if (g->wgmma && model_has_wgmma(p))
        c.mmas /= g->mma_cycles; /* 1 cycle */
    return c;
}

/* Seconds, and what takes them. */
static double model_seconds(const model_gpu *g, const model_cost *c, const char **what) {
    static const char *const names[] = {"tensor", "shared", "exp2", "issue", "L2", "DRAM"};
    double cycles = 1 / (g->sms * g->clock), most = 0, launch = 3e-6;
    const double seconds[] = {c->mmas * g->mma_cycles * cycles, c->wavefronts * cycles,   c->exps / 16 * cycles,
                              c->instructions / 4 * cycles,     c->l2_bytes / g->l2,      c->dram_bytes / g->dram};
    for (int i = 0; i < 6; i++)
        if (seconds[i] > most) {
            most = seconds[i];
            *what = names[i];
        }
    return most + launch;
}
#endif
