/* psa.h - Pyramid Sparse Attention on the CPU. Version 0.1.0. MIT licence (at the end of the file).
 *
 * Attention for long video sequences: every (query block, KV block) pair is read at a pooling level: important blocks
 * token by token, less important ones as means of 2, 4, 8, ... tokens, the rest not at all, all in one softmax.
 *
 * SYNOPSIS
 *
 *     #define PSA_IMPLEMENTATION                    // in one .c or .cpp file
 *     #include "psa.h"
 *
 *     psa_desc desc = {0};                          // zero means default everywhere
 *     psa_tensor q = psa_tensor_4d(qdata, PSA_F32, D, N, H, B);      // contiguous [B][H][N][D]
 *     psa_tensor k = psa_tensor_4d(kdata, PSA_F32, D, N, Hkv, B);    // or fill ne and nb for any strides
 *     psa_tensor v = psa_tensor_4d(vdata, PSA_F32, D, N, Hkv, B);
 *     psa_tensor out = psa_tensor_4d(odata, PSA_F32, D, N, H, B);
 *     psa_result r = psa_attention(&desc, &q, &k, &v, &out, NULL);   // pool, score, mask, attend
 *     if (r != PSA_OK) fprintf(stderr, "%s\n", psa_result_string(r));
 *
 *     The zeroed desc is the paper's recipe. Nearer to dense at the same cost, without causality (manual, "Recipe"):
 *
 *     psa_desc_preset("recipe", &desc);
 *     desc.density = 0.15;                          // the one knob: share of dense attention's multiply-adds
 *
 * CONTENTS (search for the mark)
 *
 *     Manual            OPTIONS  CONCEPTS  SCORES  MASKS  ORDERS  RECIPE  MEMORY  THREADS  NUMERICS  GGML  SOURCES
 *     Declarations      >>config  >>types  >>desc  >>plan  >>stages  >>one-call  >>around  >>cuda
 *     Implementation    >>util  >>convert  >>dispatch  >>leaves  >>validate  >>prepare  >>pool  >>score  >>mask
 *                       >>attend  >>order  >>threads  >>stats  >>presets
 *
 * OPTIONS (define before including)
 *
 *     PSA_IMPLEMENTATION   compile the implementation here
 *     PSA_STATIC           everything static: a private copy in this file
 *     PSA_NO_THREADS       no threads of its own; parallel_fn and (ith, nth) still work
 *     PSA_CUDA             declare the GPU's functions, which are in psa_cuda.cu
 *     PSA_FILENAME         what this file is called, if not "psa.h": it includes itself once per instruction set
 *     PSA_SIMD_EMULATED    for tests: intrinsics are macros of an emulation (SIMDe), every instruction set is "there"
 *
 *     No compiler flag is needed: SIMD code carries target attributes and is chosen at run time. Needs libc, libm and,
 *     without PSA_NO_THREADS, pthreads or Windows threads. C99 or C++11. Do not build with -ffast-math: masks rely on
 *     infinities.
 *
 * CONCEPTS
 *
 *     q, out [B, Hq, Nq, D or Dv]; k [B, Hkv, Nk, D]; v [B, Hkv, Nk, Dv]. Hq is a multiple of Hkv (GQA, MQA): query
 *     head h reads KV head h / (Hq/Hkv). f32, f16 or bf16 (k and v the same type); D and Dv multiples of 8 up to 256.
 *     Outer strides are free, so ggml's, PyTorch's and interleaved layouts need no copies.
 *
 *     Blocks: nq = ceil(Nq/block_q) query blocks, nk = ceil(Nk/block_k) KV blocks. The last ones may be ragged.
 *
 *     Level: a pooling factor, 1, 2, 4, ... block_k; 0 means the block is skipped. Pooled token t of level L stands for
 *     the real tokens [L*t, L*t + L) that exist, c of them: its key and value are their means, its logit gets ln c:
 *
 *         s(i,t) = scale * q_i . mean k_t + ln c_t
 *         out_i  = sum_t exp(s(i,t)) mean v_t / sum_t exp(s(i,t)),     lse_i = ln sum_t exp(s(i,t))
 *
 *     over the pooled tokens of every KV block at the level that the level map [B][Hq][nq][nk] says. A row with nothing
 *     to see has out = 0, lse = -inf.
 *
 *     Tiles: the map's block size does not dictate the compute tile. What a query block reads, level 1 first, then 2,
 *     4, ..., is one stream of rows, cut into tiles of 64 rows, so a tile mixes blocks and levels, and a block at level
 *     8 costs block_k/8 rows and no more (paper: decoupled block-tile).
 *
 *     Causal: query i sees key j iff j <= i + (Nk - Nq). KV blocks that straddle the diagonal of a query block are
 *     always read at level 1, hidden blocks never, whatever a map says: causality is exact.
 *
 *     Density: sum of 1/level over visible block pairs / their number, the share of dense attention's multiply-adds.
 *
 * SCORES (how important is a block pair? each row of the score map sums to 1)
 *
 *     SAMPLE        sampled queries r and keys c (the same random offsets in every block): with a = scale * q_r . k_c
 *                   and m_r = max a over the sampled keys r sees, S = max of exp(a - m_r). score_norm also divides by
 *                   the row's softmax denominator, score_mean takes the mean for the maximum. Offsets beyond a ragged
 *                   block's end are left out. Costs sample_q * sample_k / 2 of dense attention.
 *     ANTIDIAGONAL  XAttention: groups of `stride` queries, reversed, against groups of keys; S = softmax mass. Costs
 *                   1/(2 stride) of dense attention.
 *     POOLED        means of groups of queries against means of groups of keys: softmax mass, the logits as in
 *                   attention. With whole blocks for groups (the default) a mean against a mean, without ln c. Costs
 *                   1/(2 score_group[0] score_group[1]) of dense attention.
 *     EXACT         the true softmax mass. Costs half of dense attention and nk * block_q floats a thread.
 *
 *     NaN among sampled logits is ignored; a row without any mass is uniform.
 *
 * MASKS (from scores to levels; n visible blocks of a row, sorted by score, ties by index)
 *
 *     TOPK          position p gets the first level with p < floor(level_end[i] * n): the ends are cumulative, what is
 *                   beyond the last is skipped. Or level_count[i] blocks at each level.
 *     THRESHOLD     P = the mass ahead of a block: it gets the first level with P <= level_end[i] (within 1e-6). With
 *                   inclusive, P counts the block itself; the top block stays at the finest level in use.
 *     ERROR         the level L that makes e(L) + lambda / L least, skipping (cost 0) among them, where e(L) is the
 *                   squared error that the pair is predicted to make at level L: see RECIPE. The block
 *                   of a row that is dearest to skip stays.
 *     DENSE         everything at level 1.
 *
 *     density says what the map is to cost, over the whole call or in each head: level_end is then scaled, or lambda
 *     found, so that it is met within 1 % (by the shares of many rows: a handful of blocks cannot meet anything).
 *
 *     Then, in this order: the similarity cap (a block may not be coarser than its keys are alike), protected tokens
 *     (prefix, suffix, sink, diagonal), the causal rule, skip_mean. Prefix and suffix are tokens of both axes: query
 *     row i stands for token i + (Nk - Nq) if causal, else i; the suffix are the last rows of each.
 *
 *     Early denoising steps are best left dense: set mask to PSA_MASK_DENSE for them (see psa_preset.warmup_steps). A
 *     level map may be kept over several steps: run psa_pool and psa_attend only.
 *
 * ORDERS
 *
 *     Blocks should hold tokens that are alike. order_q and order_k say which token stands at which position; q, k and
 *     v are read and out is written through them, nothing is copied. psa_order_gilbert follows a space-filling curve
 *     through the video grid, psa_order_tile cuts it into boxes, psa_order_semantic sorts the tokens of each head by
 *     k-means (own orders for q and for k); hybrid is Gilbert for q and semantic for k. Not with causal attention.
 *
 *     desc.tree makes an order of its own for every head from the tokens themselves, in psa_prepare: they are bisected
 *     along their principal direction, the halves again, down to groups of 8, so that every block, and every group of
 *     8, 16, ... in it, holds tokens that are alike. Prefix and suffix stay in place. In the LOGIT metric keys are as
 *     far apart as their logits under the queries, queries as far as theirs under the keys. A tree looks only at the 16
 *     axes along which the tokens of its head differ most.
 *
 * RECIPE (what lowers the error at equal cost; each part is optional and goes with every other one)
 *
 *     tree QKV, tilt, mask ERROR with groups of 16 x 8, and a density: psa_desc_preset("recipe"). Without causality.
 *
 *     tilt          pools around the mean query mu of the KV head instead of evenly: with w the softmax over a group of
 *                   scale * mu . k_j, its key and value are sum w k and sum w v, and in place of ln c its logit gets
 *                   ln sum exp(scale mu.k_j) - scale mu.(sum w k) + ln cosh sqrt(2 h),
 *                   h = scale^2 / 2 * sum_j w_j sum_d var(q_d) (k_jd - (sum w k)_d)^2. mu = 0 and h = 0 give ln c.
 *     mask ERROR    P(r,g) is the attention of a group's mean query r to a pooled key g of G keys (score_group),
 *                   M_L(r) the mass of a KV block at level L under the same denominator, W_L(r,g) what of it falls to
 *                   g, tau_L the mean variance of v inside the block's groups of L over that of the head. The squared
 *                   error of the pair, in units of the variance of v, mean over r:
 *                       e(L) = (sum_g P ln cosh sqrt(2 h_L))^2 + sum_g P^2 2 h_L tau_L / G           up to level G,
 *                       e(L) = (M_G - M_L)^2 + sum_g (P - W_L)^2 (tau_L - tau_G)
 *                              + sum_g P^2 2 h_G tau_G / G                                           above it,
 *                       e(skip) = M_G^2,
 *                   with h_L averaged over the groups of L in g. These errors rank levels well; as a forecast their sum
 *                   is too low (2 to 10 times in length), because errors of many blocks add up.
 *
 * MEMORY
 *
 *     Only psa_attention allocates: the workspace and a level map, or one piece if it splits the keys; freed before it
 *     returns. The stages use the caller's buffer of psa_work_size bytes: pooled K and V in their own type (less than a
 *     copy of each), and per thread about block_q * (2 D + Dv) floats plus 2 * nk * (sampled rows of the query blocks
 *     that are scored together, up to 128, or 64 for POOLED) floats. Linear in N for each of them but the maps, which
 *     have nq * nk entries. A tree takes 4 bytes a token and head, and 73 bytes a token and thread; mask ERROR 2 bytes
 *     a pair and level; a density 256 KiB a thread, or a head if each is to meet it; dense attention D + Dv floats a
 *     key and thread where K or V are not f32 rows one after the other.
 *
 * THREADS
 *
 *     Every stage takes (ith, nth) and does its share; a barrier between stages is all that is needed, and ggml's
 *     custom ops or any thread pool can provide it. The same inputs give the same bits for any nth. psa_attention runs
 *     the stages through desc.parallel_fn if given, else on desc.n_threads threads that it starts itself. There is no
 *     global state, but one: for AMX psa_plan_init asks Linux whether this process may use tiles (arch_prctl), which
 *     makes its signal frames 8 KiB larger. Where they are refused the plan uses AVX512; so it does if told to.
 *
 * NUMERICS
 *
 *     f32 arithmetic, online softmax in base 2 with exp2 accurate to 2e-7; means and scores in f32, pooled K and V
 *     then rounded to their type; results of different instruction sets agree within tolerance, not in bits. AMX and
 *     NEON_BF16 multiply bf16 numbers whose sums are q, k and v exactly and the weights within 2^-17. Denormals are
 *     treated as zero inside psa_score and psa_attend (the caller's mode comes back). NaN and Inf in q, k or v reach
 *     only the rows that read them.
 *
 * GGML
 *
 *     psa_tensor has ggml's ne and nb: copy data, ne, nb and the type. Each stage is one ggml_custom_4d node whose
 *     callback passes ith and nth on; workspace and level map are tensors of the graph; set n_threads to the graph's
 *     threads. examples/ggml/psa_ggml.h does all of it.
 *
 * SOURCES
 *
 *     Pyramid Sparse Attention, arXiv 2512.04025 ("the paper"); trees, tilt and mask ERROR go beyond it. XAttention,
 *     arXiv 2503.16428 (antidiagonal scores).
 *     FlashAttention, arXiv 2205.14135 and 2307.08691 (online softmax, tiling). Cerveny, "gilbert" (space-filling
 *     curve).
 */

/* ================================================================================================================= */
/* >>config                                                                                                          */
/* ================================================================================================================= */

#ifndef PSA_H
#define PSA_H

#include <stddef.h>
#include <stdint.h>

#define PSA_VERSION "0.1.0"

#ifdef PSA_STATIC
#if defined(__GNUC__) || defined(__clang__)
#define PSA_API static __attribute__((unused))
#else
#define PSA_API static
#endif
#else
#define PSA_API extern
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ================================================================================================================= */
/* >>types                                                                                                           */
/* ================================================================================================================= */

#define PSA_MAX_BLOCK_Q 256
#define PSA_MAX_BLOCK_K 128
#define PSA_MAX_LEVELS 8 /* 1, 2, 4, ... 128 */
#define PSA_MAX_D 256

/* Every result code with its message: X(name, message). */
#define PSA_RESULTS(X)                                                                                                 \
    X(PSA_OK, "no error")                                                                                              \
    X(PSA_ERR_NULL, "a required pointer is NULL")                                                                      \
    X(PSA_ERR_TYPE, "element type: expected f32, f16 or bf16, the same for k and v")                                   \
    X(PSA_ERR_SHAPE, "shape: extents must be positive and agree between q, k, v and out")                              \
    X(PSA_ERR_HEAD_DIM, "head size: D and Dv must be multiples of 8 from 8 to 256")                                    \
    X(PSA_ERR_HEADS, "heads: the query heads must be a multiple of the KV heads")                                      \
    X(PSA_ERR_STRIDE, "strides: a row must be contiguous, and rows of out must not overlap")                           \
    X(PSA_ERR_OVERFLOW, "a size does not fit into size_t, or N into 31 bits")                                          \
    X(PSA_ERR_BLOCK, "blocks: block_q must be 16 to 256, block_k 16, 32, 64 or 128")                                   \
    X(PSA_ERR_SCALE, "scale must be finite")                                                                           \
    X(PSA_ERR_SCORE, "score: unknown kind, sample share outside (0,1], or a stride or group that does not fit blocks") \
    X(PSA_ERR_MASK, "mask: unknown kind, or level_count with another kind than top-k")                                 \
    X(PSA_ERR_LEVELS, "level_end must rise within [0,1], level_count must not be negative, no level above block_k")    \
    X(PSA_ERR_LEVEL_MAP, "level map: an entry is neither 0 nor a power of two up to block_k that the plan can read")   \
    X(PSA_ERR_SIMILARITY, "sim_min: thresholds must be finite, at most one for each of 2, 4, ... block_k")             \
    X(PSA_ERR_PROTECT, "n_prefix and n_suffix must not be negative; min_full must be in [0,1]")                        \
    X(PSA_ERR_ORDER, "token order: not a permutation, with causal attention, or more clusters than tokens")            \
    X(PSA_ERR_GRID, "grid: every extent must be positive and t*h*w fit into 31 bits")                                  \
    X(PSA_ERR_ISA, "the instruction set is unknown or this CPU does not have it")                                      \
    X(PSA_ERR_THREADS, "threads: need 0 <= ith < nth <= the plan's n_threads")                                         \
    X(PSA_ERR_MEMORY, "the allocator returned NULL")                                                                   \
    X(PSA_ERR_PRESET, "no preset has this name")                                                                       \
    X(PSA_ERR_CUDA_DEVICE, "CUDA: there is no device, or its compute capability is below 8.0")                         \
    X(PSA_ERR_CUDA_ALIGN, "CUDA: data and the strides of out must be multiples of 16 bytes")                           \
    X(PSA_ERR_CUDA_SIZE, "CUDA: too many blocks, or more shared memory than the device has (psa_cuda.cu, LIMITS)")     \
    X(PSA_ERR_CUDA_WORK, "CUDA: the workspace is smaller than psa_cuda_work_size says")                                \
    X(PSA_ERR_CUDA_RECIPE, "CUDA: trees, tilt, mask ERROR and density are for the CPU")                               \
    X(PSA_ERR_CUDA_LAUNCH, "CUDA: a launch failed; cudaGetLastError has the reason")

typedef enum psa_result {
#define PSA__X(name, text) name,
    PSA_RESULTS(PSA__X)
#undef PSA__X
} psa_result;

typedef enum psa_type { PSA_F32 = 0, PSA_F16, PSA_BF16 } psa_type;

/* Instruction sets. AUTO takes the best one that CPU and operating system support. AVX2 includes FMA and F16C,
 * AVX512 is F and DQ. A plan's desc has the one that it uses: AVX512 or NEON where the types are not those of AMX or
 * NEON_BF16. */
typedef enum psa_isa {
    PSA_ISA_AUTO = 0,
    PSA_ISA_SCALAR,
    PSA_ISA_AVX2,
    PSA_ISA_AVX512,
    PSA_ISA_NEON, /* AArch64 */
    PSA_ISA_AMX,  /* AVX512 and, where k and v are f16 or bf16, matrix tiles (AMX-BF16): Linux, gcc 11 or clang 12 */
    PSA_ISA_NEON_BF16, /* NEON and, where k and v are bf16, bfmmla: Linux and gcc 10, or any if compiled for it */
    PSA_ISA_END
} psa_isa;

/* How the importance of a block pair is estimated (manual, "Scores"). */
typedef enum psa_score_kind {
    PSA_SCORE_SAMPLE = 0,   /* sampled queries against sampled keys, maximum of exp(logit - row maximum) */
    PSA_SCORE_ANTIDIAGONAL, /* strided antidiagonal sums, as in XAttention (arXiv 2503.16428) */
    PSA_SCORE_POOLED,       /* means of groups of queries against pooled keys */
    PSA_SCORE_EXACT         /* true softmax mass, costs as much as attention: tests, calibration, pictures */
} psa_score_kind;

/* How scores become levels (manual, "Masks"). */
typedef enum psa_mask_kind {
    PSA_MASK_TOPK = 0,  /* level_end are shares of the blocks in rank order, or level_count numbers of blocks */
    PSA_MASK_THRESHOLD, /* level_end bound the score mass ahead of a block in rank order */
    PSA_MASK_DENSE,     /* every block at level 1; nothing is pooled or scored */
    PSA_MASK_ERROR      /* the level with the least predicted error + lambda * cost; scores are POOLED */
} psa_mask_kind;

/* Which tokens are sorted by what they are (manual, "Orders"). */
typedef enum psa_tree_kind {
    PSA_TREE_NONE = 0,
    PSA_TREE_KV,        /* keys and values of each KV head */
    PSA_TREE_QKV        /* and the queries of each head */
} psa_tree_kind;

/* How far apart two tokens are. */
typedef enum psa_metric_kind {
    PSA_METRIC_LOGIT = 0, /* by the logits they make: keys through E[q q^T], queries through Cov(k) */
    PSA_METRIC_EUCLID     /* as they lie; cheaper to sort by */
} psa_metric_kind;

typedef enum psa_order_kind {
    PSA_ORDER_NONE = 0,
    PSA_ORDER_GILBERT,
    PSA_ORDER_TILE,
    PSA_ORDER_SEMANTIC,
    PSA_ORDER_HYBRID
} psa_order_kind;

/* A view of a 4-D tensor. ne: extents, innermost first: D (head size), N (tokens), H (heads), B (batch).
 * nb: byte strides of the same axes; nb[0] is the element size, the others are free (0 repeats an input).
 * These are ggml's ne and nb; a PyTorch tensor [B,H,N,D] maps by reversing shape and strides. Data may be unaligned.
 * N is below 2^31 (orders hold 32-bit indices). */
typedef struct psa_tensor {
    void *data;
    psa_type type;
    int64_t ne[4];
    size_t nb[4];
} psa_tensor;

/* A token order: position p of head h in batch b holds token index[b * stride_b + h * stride_h + p].
 * Strides are in elements; 0 shares one order between heads or batches. index NULL: tokens stay where they are. */
typedef struct psa_order {
    const int32_t *index;
    int64_t stride_h, stride_b;
} psa_order;

/* Runs task(ctx, ith, nth) for every ith in [0,nth), in any order, together or not; returns when all are done. */
typedef void psa_task_fn(void *ctx, int ith, int nth);
typedef void psa_parallel_fn(void *user, int nth, psa_task_fn *task, void *ctx);

typedef void *psa_alloc_fn(void *user, size_t size);        /* NULL when there is no memory; any alignment will do */
typedef void psa_free_fn(void *user, void *ptr);            /* ptr came from alloc_fn and is not NULL */
typedef void psa_log_fn(void *user, const char *message);   /* one line: what, where, what was expected */

/* ================================================================================================================= */
/* >>desc                                                                                                            */
/* ================================================================================================================= */

/* Everything the caller may choose. Zero means the default everywhere: memset, set what you want, call. */
typedef struct psa_desc {
    float scale;             /* logit = scale * q.k; 0: 1/sqrt(D) */
    int causal;              /* query i sees key j iff j <= i + (Nk - Nq) */
    int block_q;             /* 16..256 query rows; 0: 128 */
    int block_k;             /* 16, 32, 64 or 128 keys; 0: 64 */
    psa_order order_q;       /* order in which queries form blocks; out and lse keep the caller's order */
    psa_order order_k;       /* the same for keys and values (per KV head) */
    psa_tree_kind tree;      /* orders that psa_prepare finds, in place of order_k, or of both */
    psa_metric_kind metric;  /* of the tree */

    psa_score_kind score;
    double sample_q;         /* share of each query block that is sampled, (0,1]; 0: 0.25 */
    double sample_k;         /* share of each KV block, likewise */
    uint64_t seed;           /* of the sampled offsets */
    int score_norm;          /* SAMPLE: also divide by the row's softmax denominator, as in the paper */
    int score_mean;          /* SAMPLE: mean instead of maximum over the sampled pairs (the paper's ablation) */
    int stride;              /* ANTIDIAGONAL: tokens in a group, divides block_q and block_k; 0: 8 */
    int score_group[2];      /* POOLED: queries and keys in a group, dividing block_q and block_k; 0: the whole block,
                                and 8 for mask ERROR, whose groups have at least 2 keys */
    int tilt;                /* pool around the mean query instead of plainly (manual, "Concepts") */

    psa_mask_kind mask;
    double level_end[PSA_MAX_LEVELS]; /* cumulative end of levels 1, 2, 4, ...; entries after the last non-zero one are
                                         unused; all 0: .1 .15 .15 .35 for TOPK, .4 .5 .6 .8 for THRESHOLD */
    int level_count[PSA_MAX_LEVELS];  /* TOPK: number of blocks at levels 1, 2, 4, ... in place of level_end: the cost
                                         of a query block does not grow with N; all 0: level_end is used */
    int inclusive;           /* THRESHOLD: count the block's own mass too (paper's Algorithm 2) */
    double min_full;         /* THRESHOLD: if > 0, at least floor(min_full*n)+1 of n visible blocks are level 1 */
    int n_sim_min;           /* similarity cap: entries of sim_min in use; 0: no cap */
    double sim_min[PSA_MAX_LEVELS - 1]; /* mean cosine that levels 2, 4, 8, ... must exceed */
    int64_t n_prefix, n_suffix; /* first and last tokens that are always read, and always read, at level 1 */
    int sink;                /* the first KV block is level 1 for everyone */
    int diagonal;            /* a query block's own KV blocks are level 1 */
    int skip_mean;           /* a block that would be skipped is read as one mean token instead */
    double density;          /* (0,1]: what the mask is to cost: TOPK and THRESHOLD scale level_end to meet it, ERROR
                                finds lambda; 0: as level_end says, and 0.15 for ERROR without lambda */
    int density_per_head;    /* the density of each head, not of the call */
    double lambda;           /* ERROR: price of a whole block, in units of squared error, in place of density */

    psa_isa isa;
    int n_threads;           /* most threads that may work on the plan; 0: all processors */
    psa_parallel_fn *parallel_fn; /* psa_attention: runs the stages' threads; NULL: threads of its own */
    void *parallel_user;
    psa_alloc_fn *alloc_fn;  /* psa_attention: memory; NULL: malloc and free. Give both or neither */
    psa_free_fn *free_fn;
    void *alloc_user;
    psa_log_fn *log_fn;      /* receives one line with the details of an error; NULL: silence */
    void *log_user;
} psa_desc;

/* ================================================================================================================= */
/* >>plan                                                                                                            */
/* ================================================================================================================= */

/* A desc and shapes, validated, with defaults resolved and the workspace laid out. A plain value: copy it, keep it, let
 * it go. It holds no memory and no tensor data; only the order index arrays of the desc must outlive it.
 * Read it freely, change nothing in it. */
typedef struct psa_plan {
    psa_desc desc;             /* with the defaults filled in */
    psa_tensor q, k, v, out;   /* shapes and strides; data is NULL */
    int64_t B, Hq, Hkv, Nq, Nk, D, Dv;
    int64_t nq, nk;            /* blocks: ceil(Nq/block_q), ceil(Nk/block_k) */
    int n_levels;              /* levels the plan pools: 1, 2, ... 1 << (n_levels - 1); 1 for a dense plan */
    int n_sample_q, n_sample_k;
    uint8_t sample_q[PSA_MAX_BLOCK_Q]; /* sampled offsets inside a block, ascending */
    uint8_t sample_k[PSA_MAX_BLOCK_K];
    int64_t level_row[PSA_MAX_LEVELS]; /* first row of level 1 << i among a head's pooled rows; [0] is unused */
    int64_t pooled_rows;               /* pooled rows of one KV head */
    size_t work_size;                  /* bytes of workspace; the offsets below are into it, 64-byte aligned */
    size_t at_order_q, at_order_k;     /* i32 [B][Hq][Nq], [B][Hkv][Nk]: orders of the trees */
    size_t at_query;                   /* f32 [B][Hkv][2][D]: mean and variance of a KV head's queries */
    size_t at_pooled_k, at_pooled_v;   /* of K's type: [B][Hkv][pooled_rows][D], [Dv] */
    size_t at_bias;                    /* f32 [B][Hkv][pooled_rows]: added to the logit, in units of log2 */
    size_t at_cap;                     /* u8  [B][Hkv][nk]: coarsest level the similarity cap allows */
    size_t at_spread;                  /* f32 [B][Hkv][nk][psa__spread_size]: what mask ERROR knows of a KV block */
    size_t at_steps;                   /* u16 [B][Hq][nq][nk][n_levels]: mask ERROR's prices of leaving a level */
    size_t at_prices;                  /* u64 [heads or threads][PSA__PRICES + 2]: what the map costs at which price */
    size_t at_rows;                    /* i64 [B][Hq][nq]: K/V rows read by psa_attend, per query block */
    size_t at_scratch, scratch_size;   /* one per thread */
    const struct psa__leaves *leaves;
} psa_plan;

/* Validates desc and shapes and fills *plan. The tensors' data pointers are not looked at. v and out may be NULL for a
 * plan that only scores and masks. Fails with any code of PSA_RESULTS that names what is wrong; *plan is then
 * untouched. Reads the order index arrays (to check that they are permutations). */
PSA_API psa_result psa_plan_init(psa_plan *plan, const psa_desc *desc, const psa_tensor *q, const psa_tensor *k,
                                 const psa_tensor *v, const psa_tensor *out);

/* Bytes of workspace that the stages need, any alignment. The caller owns it; contents matter between stages only. */
PSA_API size_t psa_work_size(const psa_plan *plan);

/* Entries of a level map or score map: B * Hq * nq * nk. */
PSA_API size_t psa_map_size(const psa_plan *plan);

/* ================================================================================================================= */
/* >>stages                                                                                                          */
/* ================================================================================================================= */

/* All stages: pure functions of their inputs; they never allocate, block, or touch what belongs to another thread.
 * Call each one for every ith in [0,nth), from nth threads or one after the other, and let all of them return before
 * the next stage starts. The results do not depend on nth. Data pointers are those of the tensors given to
 * psa_plan_init, with the plan's shapes and strides. Outputs must not overlap inputs. */

/* What is known of the tokens before they are pooled: trees, and for tilt and mask ERROR the mean and variance of the
 * queries, into work. A plan with none of them returns at once. Heads are split over threads. A tree may be kept while
 * the tokens change slowly (denoising steps, frames): run this again when they have drifted. */
PSA_API psa_result psa_prepare(const psa_plan *plan, const void *q, const void *k, void *work, int ith, int nth);

/* The order that psa_prepare found for the queries of a query head, or (keys != 0) for the keys of a KV head; NULL
 * without a tree. */
PSA_API const int32_t *psa_tree_order(const psa_plan *plan, const void *work, int keys, int64_t b, int64_t h);

/* Means of K and V at levels 2, 4, ... and the similarity cap, into work. v NULL: K only (for scoring and masks).
 * A dense plan needs no pooling and returns at once. Source: paper, "multi-level pooled KV". */
PSA_API psa_result psa_pool(const psa_plan *plan, const void *k, const void *v, void *work, int ith, int nth);

/* scores: f32 [B][Hq][nq][nk], each row sums to 1; pairs that causality hides are 0. Needs psa_pool before it if
 * desc.score is POOLED. A dense plan needs no scores and returns at once; mask ERROR leaves what it needs in work, its
 * scores may be NULL.
 * Source: paper (sampled importance); XAttention for ANTIDIAGONAL. */
PSA_API psa_result psa_score(const psa_plan *plan, const void *q, const void *k, void *work, float *scores, int ith,
                             int nth);

/* What the map would cost at every price of a multiply-add, into work, for psa_mask to meet desc.density. A plan
 * without density returns at once. scores as for psa_mask. Heads are split over threads. */
PSA_API psa_result psa_budget(const psa_plan *plan, const float *scores, void *work, int ith, int nth);

/* levels: u8 [B][Hq][nq][nk], pooling factor of each pair, 0 = skipped. Needs psa_pool before it if n_sim_min > 0,
 * psa_score on the same workspace for mask ERROR, psa_budget with density. scores may be NULL for a dense plan and for
 * mask ERROR. Source: paper Algorithm 2. */
PSA_API psa_result psa_mask(const psa_plan *plan, const float *scores, void *work, uint8_t *levels, int ith, int nth);

/* out (and lse, natural log, f32 [B][Hq][Nq], NULL: not wanted) from q, k, v and a level map: the one psa_mask made, an
 * edited one, one kept from an earlier step, or the caller's own. Causality overrides the map: pairs on the
 * diagonal are read at level 1, hidden pairs not at all. levels NULL: dense. Needs psa_pool before it unless every
 * level is 0 or 1. A row with nothing to see gives out = 0, lse = -inf. A bad map gives PSA_ERR_LEVEL_MAP and
 * nothing is written. Source: paper, "decoupled block-tile". */
PSA_API psa_result psa_attend(const psa_plan *plan, const void *q, const void *k, const void *v, const uint8_t *levels,
                              void *work, void *out, float *lse, int ith, int nth);

/* Mask ERROR: the squared error that the map is predicted to make, mean over the queries of a head (b, h as for
 * psa_stats_from_levels), in units of the total variance of v. */
PSA_API psa_result psa_predicted_error(const psa_plan *plan, const void *work, const uint8_t *levels, int64_t b,
                                       int64_t h, double *error);

/* Multiply-adds that the last psa_attend on this workspace really did: rows read x queries x (D + Dv). */
PSA_API int64_t psa_mul_adds(const psa_plan *plan, const void *work);

/* Merges two partial results over disjoint keys: (out, lse) becomes the result over the union of their keys with
 * (part, part_lse). Both pairs: [B,H,N,Dv] of any type and strides, lse f32 [B][H][N]. Rows are split over threads.
 * For context parallelism and for split-KV decoding. */
PSA_API psa_result psa_merge(const psa_tensor *out, float *lse, const psa_tensor *part, const float *part_lse, int ith,
                             int nth);

/* ================================================================================================================= */
/* >>one-call                                                                                                        */
/* ================================================================================================================= */

typedef struct psa_stats {
    double density;          /* sum of 1/level over visible block pairs / their number: share of dense multiply-adds */
    double sparsity;         /* 1 - density */
    int64_t mul_adds;        /* rows read x queries x (D + Dv) */
    int64_t dense_mul_adds;  /* the same with every visible block pair at level 1 */
    int64_t pairs;           /* visible block pairs */
    int64_t level_blocks[PSA_MAX_LEVELS + 1]; /* pairs skipped, at level 1, 2, 4, ... */
} psa_stats;

/* What a level map costs, for one batch and head, or with b = -1 and h = -1 over all of them. levels NULL: dense. */
PSA_API psa_result psa_stats_from_levels(const psa_plan *plan, const uint8_t *levels, int64_t b, int64_t h,
                                         psa_stats *stats);

/* What psa_attention gives and takes besides its tensors; zero it, then set what is wanted. */
typedef struct psa_extra {
    float *lse;              /* out: f32 [B][Hq][Nq] */
    float *scores;           /* out: f32 [B][Hq][nq][nk]; untouched where levels are given or the plan is dense */
    uint8_t *levels;         /* out: u8 [B][Hq][nq][nk], or in: the caller's own map, see levels_given */
    int levels_given;        /* levels is read, not written; nothing is scored */
    psa_stats stats;         /* out, always; mul_adds is counted where it is done */
} psa_extra;

/* Pool, score, mask and attend: out = attention(q, k, v). extra may be NULL.
 * Thread-safe; runs desc.n_threads threads. On failure nothing is written to out. The mask asked for is the mask
 * computed, however short the sequence. A dense call with one query block per head and many keys (decoding) takes the
 * keys in parts, so that all threads have work, and merges.
 *
 * Memory comes through alloc_fn in one block, after all arguments have been checked, and goes back before the return:
 * the workspace, and the maps that are needed and not given. Calls with the same desc, shapes and strides ask for the
 * same size, so alloc_fn may hand out the block of the last call again. That pays: pages that malloc gets from the
 * system are mapped one by one as they are first written. Where that or making a plan for each call is too much, keep a
 * psa_plan and a workspace and call the stages. */
PSA_API psa_result psa_attention(const psa_desc *desc, const psa_tensor *q, const psa_tensor *k, const psa_tensor *v,
                                 const psa_tensor *out, psa_extra *extra);

/* ================================================================================================================= */
/* >>around                                                                                                          */
/* ================================================================================================================= */

/* A contiguous tensor [b][h][n][d]. */
PSA_API psa_tensor psa_tensor_4d(const void *data, psa_type type, int64_t d, int64_t n, int64_t h, int64_t b);
PSA_API size_t psa_type_size(psa_type type); /* bytes; 0 for an unknown type */
PSA_API const char *psa_result_string(psa_result result);
PSA_API const char *psa_version(void);
PSA_API psa_isa psa_isa_detect(void);          /* the best instruction set of this machine */
PSA_API int psa_isa_supported(psa_isa isa);
PSA_API const char *psa_isa_name(psa_isa isa); /* "auto", "scalar", "avx2", ...; NULL past the end */

/* Orders of a video grid of t x h x w tokens, token index (t*h_extent + h)*w_extent + w: position p of the order holds
 * token index[p]. index: int32 [t*h*w]. */
PSA_API psa_result psa_order_gilbert(int t, int h, int w, int32_t *index); /* generalised Hilbert curve */
PSA_API psa_result psa_order_tile(int t, int h, int w, int tile_t, int tile_h, int tile_w, int32_t *index);

/* Puts text around a grid order: index[n_prefix .. n_prefix+n_video) holds an order of 0..n_video-1 and becomes one of
 * the video tokens; the n_prefix entries before and n_suffix after it become the tokens that stay in place. */
PSA_API void psa_order_embed(int32_t *index, int64_t n_prefix, int64_t n_video, int64_t n_suffix);

/* Semantic order: k-means on the tokens of every head of x [B,H,N,D]; tokens sorted by cluster, then by index. The
 * first n_prefix and last n_suffix tokens stay in place. index: int32 [B][H][N] (a psa_order with stride_h N, stride_b
 * H*N). n_clusters: 1 to the number of the other tokens; n_iter: 1 or more. centroids: f32 [B][H][n_clusters][D]; with
 * carried they are the start (an earlier step's result) and n_iter 1 or 2 will do, otherwise the start is taken from x;
 * in both cases they hold the result. Heads are split over threads. work: psa_order_semantic_work_size bytes (0 if a
 * size does not fit). */
PSA_API size_t psa_order_semantic_work_size(const psa_tensor *x, int n_clusters, int nth);
PSA_API psa_result psa_order_semantic(const psa_tensor *x, int64_t n_prefix, int64_t n_suffix, int n_clusters,
                                      int n_iter, float *centroids, int carried, int32_t *index, void *work, int ith,
                                      int nth);

/* out[p] = in[order[p]], and back: out[order[p]] = in[p]. in and out: same type and extents, must not overlap. For
 * callers who reorder activations once for a whole model; desc.order_q and order_k need no copy. */
PSA_API psa_result psa_permute(const psa_tensor *in, const psa_order *order, const psa_tensor *out, int ith, int nth);
PSA_API psa_result psa_unpermute(const psa_tensor *in, const psa_order *order, const psa_tensor *out, int ith, int nth);

/* Settings of published models. What a desc cannot say is here: the token order, how many of the first denoising steps
 * stay dense (PSA_MASK_DENSE), and how video extents become a token grid. */
typedef struct psa_preset {
    const char *name;
    psa_order_kind order;
    int warmup_steps;        /* dense steps at the start */
    double warmup_share;     /* if > 0: this share of all steps instead */
    int n_text;              /* text tokens, before the video tokens (also in desc.n_prefix) */
    int frame_step;          /* video frames per latent frame; 0: no grid rule */
    int patch_t;             /* latent frames per token */
    int patch_hw;            /* pixels per token side */
} psa_preset;

PSA_API const char *psa_preset_name(int i);                          /* NULL past the end */
PSA_API const psa_preset *psa_preset_find(const char *name);         /* NULL if there is none */
PSA_API psa_result psa_desc_preset(const char *name, psa_desc *desc); /* overwrites *desc */
PSA_API psa_result psa_preset_grid(const psa_preset *preset, int frames, int height, int width, int grid[3]);

/* ================================================================================================================= */
/* >>cuda                                                                                                            */
/* ================================================================================================================= */

/* The same stages on a GPU, in psa_cuda.cu. Plans are those of psa_plan_init; all data pointers and work are device
 * memory; stream is a cudaStream_t. A call checks its arguments, enqueues kernels and returns: it neither allocates nor
 * synchronises, and may be captured in a CUDA graph. Token orders: psa_plan_init reads the index arrays on the host;
 * before the first call point plan.desc.order_q.index and order_k.index at copies in device memory.
 * Pool comes first, always: it also converts and reorders K and V where that is needed. Then score and mask, or list:
 * either leaves in work the list of blocks that attend reads. */
#ifdef PSA_CUDA
extern size_t psa_cuda_work_size(const psa_plan *plan); /* bytes of work, any alignment */
extern psa_result psa_cuda_pool(const psa_plan *plan, const void *k, const void *v, void *work, void *stream);
/* scores and levels may be NULL: they then stay in work. */
extern psa_result psa_cuda_score(const psa_plan *plan, const void *q, const void *k, void *work, float *scores,
                                 void *stream);
extern psa_result psa_cuda_mask(const psa_plan *plan, const float *scores, void *work, uint8_t *levels, void *stream);
/* The list of the caller's own map; NULL: dense. An entry that is no level of the plan is read at level 1. */
extern psa_result psa_cuda_list(const psa_plan *plan, const uint8_t *levels, void *work, void *stream);
extern psa_result psa_cuda_attend(const psa_plan *plan, const void *q, const void *k, const void *v, void *work,
                                  void *out, float *lse, void *stream);
/* All of them. extra as for psa_attention, with device pointers; stats are not filled in. */
extern psa_result psa_cuda_attention(const psa_plan *plan, const void *q, const void *k, const void *v, void *out,
                                     const psa_extra *extra, void *work, size_t work_size, void *stream);
/* psa_merge on the device; out: data and strides in multiples of 16 bytes. */
extern psa_result psa_cuda_merge(const psa_tensor *out, float *lse, const psa_tensor *part, const float *part_lse,
                                 void *stream);
#endif

#ifdef __cplusplus
}
#endif
#endif /* PSA_H */

/* "Stop here if you only want the API." */

/* ================================================================================================================= */
/* >>util                                                                                                            */
/* ================================================================================================================= */

#if defined(PSA_IMPLEMENTATION) && !defined(PSA_IMPLEMENTATION_DONE)
#ifndef PSA__PASS /* the file includes itself once per instruction set, for the section >>leaves only */

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef PSA_FILENAME
#define PSA_FILENAME "psa.h" /* the name under which this file finds itself */
#endif

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define PSA__X86 1
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#define PSA__NEON 1
#include <arm_neon.h>
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define PSA__BFMMLA 1
#define PSA__TARGET_BF16
#elif defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#define PSA__BFMMLA 1
#define PSA__TARGET_BF16 __attribute__((target("arch=armv8.2-a+bf16")))
#include <sys/auxv.h>
#endif
#endif

#ifndef PSA_NO_THREADS
#ifdef _WIN32
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <pthread.h>
#include <unistd.h>
#endif
#endif

#ifdef PSA_STATIC
#define PSA__DEF PSA_API
#else
#define PSA__DEF
#endif

#if defined(__GNUC__) || defined(__clang__)
#define PSA__RESTRICT __restrict__
#define PSA__ALWAYS_INLINE static inline __attribute__((always_inline))
#define PSA__PREFETCH(p) __builtin_prefetch(p, 0, 2) /* into the second-level cache */
#elif defined(_MSC_VER)
#define PSA__RESTRICT __restrict
#define PSA__ALWAYS_INLINE static __forceinline
#define PSA__PREFETCH(p) ((void)(p))
#else
#define PSA__RESTRICT
#define PSA__ALWAYS_INLINE static inline
#define PSA__PREFETCH(p) ((void)(p))
#endif

#if defined(__clang__)
#define PSA__UNROLL _Pragma("clang loop unroll(full)")
#define PSA__UNROLL_BY_4 _Pragma("clang loop unroll_count(4)")
#elif defined(__GNUC__)
#define PSA__UNROLL _Pragma("GCC unroll 16")
#define PSA__UNROLL_BY_4 _Pragma("GCC unroll 4")
#else
#define PSA__UNROLL
#define PSA__UNROLL_BY_4
#endif

#define PSA__LOG2E 1.44269504088896340736
#define PSA__LN2 0.69314718055994530942
#define PSA__LOWEST (-3.402823466e+38f) /* a finite stand-in for -inf as a running maximum */
#define PSA__BIG 10633823966279326983230456482242756608.0f /* 2^123: scoring clamps its logits to +-BIG */
#define PSA__TILE_K 48                  /* keys in an attention tile: whole register tiles of any kind */
#define PSA__TILE_MATRIX 64             /* the same with matrix tiles */
#define PSA__AXES 16                    /* coordinates that a tree has of its tokens */
#define PSA__TREE_SAMPLE 256            /* tokens that say which ones */
#define PSA__TREE_NODE 128              /* tokens that say how a node is split */
#define PSA__SECOND ((PSA__AXES + 1) * PSA__AXES) /* their second moments and sums */
#define PSA__FEW_PLACES 64              /* so many are compared each with each */
#define PSA__PRICES 32768               /* steps of a price: 512 for each power of two from 2^-48 to 2^16 */
#define PSA__PAD_K 16                   /* row pointer lists are padded to a multiple of this */
#define PSA__RESCALE 8.0f               /* accumulators are rescaled when a maximum grew by more than 2^8 */

#ifdef __cplusplus
extern "C" {
#endif

static int64_t psa__min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t psa__max(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t psa__ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t psa__up_to_32(int64_t n) { return (n + 31) / 32 * 32; }

static int psa__log2(int64_t power_of_two)
{
    int n = 0;
    while ((power_of_two >> n) > 1) n++;
    return n;
}

/* a * b, or SIZE_MAX once anything overflowed: products and sums stay SIZE_MAX from then on. */
static size_t psa__mul(size_t a, size_t b)
{
    if (a == SIZE_MAX || b == SIZE_MAX) return SIZE_MAX;
    return b != 0 && a > (SIZE_MAX - 1) / b ? SIZE_MAX : a * b;
}

static size_t psa__add(size_t a, size_t b) { return a >= SIZE_MAX - 1 - b || b == SIZE_MAX ? SIZE_MAX : a + b; }

/* Reserves n * size bytes at the cursor, which moves on to the next multiple of 64, and returns where they begin. */
static size_t psa__take(size_t *cursor, size_t n, size_t size)
{
    size_t at = *cursor, end = psa__add(psa__add(at, psa__mul(n, size)), 63);
    *cursor = end == SIZE_MAX ? SIZE_MAX : end & ~(size_t)63;
    return at;
}

static char *psa__align(void *p)
{
    return (char *)(((uintptr_t)p + 63) & ~(uintptr_t)63);
}

static const char *psa__align_const(const void *p)
{
    return (const char *)(((uintptr_t)p + 63) & ~(uintptr_t)63);
}

/* Items [*begin,*end) of n for thread ith of nth: contiguous, as even as it goes. */
static void psa__share(int64_t n, int ith, int nth, int64_t *begin, int64_t *end)
{
    int64_t each = n / nth, rest = n % nth;
    *begin = each * ith + psa__min(ith, rest);
    *end = *begin + each + (ith < rest);
}

static uint32_t psa__bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static float psa__float(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static int psa__finite(float x) { return (psa__bits(x) & 0x7f800000u) != 0x7f800000u; }

/* 2^x within 2e-7; 0 below -126; NaN stays NaN. */
static float psa__exp2(float x)
{
    float r, f, p;
    if (!(x >= -126.0f)) return x < -126.0f ? 0.0f : x;
    if (x > 126.0f) return x >= 128.0f ? psa__float(0x7f800000u) : 4.0f * psa__exp2(x - 2.0f);
    r = (float)(int)(x < 0.0f ? x - 0.5f : x + 0.5f);
    f = x - r;
    p = 1.3264727e-3f;
    p = p * f + 9.6715127e-3f;
    p = p * f + 5.5507337e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.9314698e-1f;
    p = p * f + 1.0f;
    return p * psa__float((uint32_t)((int)r + 127) << 23);
}

/* A counter-based generator (splitmix64): the same number for the same seed and counter on every machine. */
static uint64_t psa__random(uint64_t seed, uint64_t counter)
{
    uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

#if defined(__GNUC__) || defined(__clang__)
__attribute__((format(printf, 3, 4)))
#endif
static psa_result psa__fail(const psa_desc *desc, psa_result result, const char *format, ...)
{
    if (desc && desc->log_fn) {
        char line[256];
        va_list args;
        va_start(args, format);
        vsnprintf(line, sizeof line, format, args);
        va_end(args);
        desc->log_fn(desc->log_user, line);
    }
    return result;
}

/* ================================================================================================================= */
/* >>convert                                                                                                         */
/* ================================================================================================================= */

static float psa__from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
    if (exponent == 31) return psa__float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return psa__float(sign | (exponent + 112) << 23 | fraction << 13);
    return psa__float(sign | psa__bits((float)fraction * 5.9604644775390625e-8f)); /* 2^-24 */
}

/* Round to nearest even; NaN keeps the top of its payload and is made quiet. */
static uint16_t psa__to_f16(float x)
{
    uint32_t u = psa__bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | (a >> 13 & 0x3ffu));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to 65536 or beyond */
    if (a < 0x38800000u) {                                   /* below 2^-14: adding 0.5 rounds at 2^-24 */
        return (uint16_t)(sign | (psa__bits(psa__float(a) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13));
}

static float psa__from_bf16(uint16_t h) { return psa__float((uint32_t)h << 16); }

static uint16_t psa__to_bf16(float x)
{
    uint32_t u = psa__bits(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(u >> 16 | 0x40u);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* Element i at any alignment. */
static float psa__element(psa_type type, const void *p, int64_t i)
{
    float x;
    uint16_t h;
    if (type == PSA_F32) {
        memcpy(&x, (const char *)p + 4 * i, sizeof x);
        return x;
    }
    memcpy(&h, (const char *)p + 2 * i, sizeof h);
    return type == PSA_F16 ? psa__from_f16(h) : psa__from_bf16(h);
}

/* n elements at any alignment, to and from f32. */
static void psa__to_f32(float *dst, const void *src, psa_type type, int64_t n)
{
    for (int64_t i = 0; i < n; i++) dst[i] = psa__element(type, src, i);
}

static void psa__from_f32(void *dst, psa_type type, const float *src, int64_t n)
{
    char *p = (char *)dst;
    if (type == PSA_F32) {
        memcpy(dst, src, (size_t)n * sizeof *src);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = type == PSA_F16 ? psa__to_f16(src[i]) : psa__to_bf16(src[i]);
        memcpy(p + 2 * i, &h, 2);
    }
}

/* ================================================================================================================= */
/* >>dispatch                                                                                                        */
/* ================================================================================================================= */

/* n rows that are read next, `bytes` of each: they are prefetched into the second-level cache under the arithmetic. */
typedef struct psa__ahead {
    const float *const *rows;
    int64_t n;
    size_t bytes;
} psa__ahead;

/* Few queries against a tile of n keys; K and V rows are of any type. `width` queries, a power of two up to the lanes.
 * Keys with first[key] > query are hidden; bias and first may be NULL. */
typedef struct psa__few {
    psa_type type;
    int width;
    const float *q;             /* for every `lanes` elements of the head, or the 8 that are left: [width][elements] */
    const float *const *k, *const *v; /* n rows, padded with valid pointers to a multiple of PSA__PAD_K */
    const float *bias;          /* padded as k */
    const int32_t *first;
    const float *const *next_k; /* n rows of the next tile, which are prefetched */
    int64_t n, d, dv;
    float *s;                   /* [keys][width], with room for the padding */
    float *m, *l, *o;           /* [width], [width], [width][dv]: brought up to date as by softmax and pv */
    int weights_only;           /* o is left to the caller */
} psa__few;

/* What the predicted errors of a block need beside the logits of its groups of keys. A coarser level's logit is that of
 * its groups, each times its share, plus a shift. */
typedef struct psa__errors {
    int groups, rows;           /* of a whole block, and those that there are */
    int fine, coarse;           /* levels up to that of the groups (without level 1), and above it */
    const float *mass, *noise;  /* [groups][fine]: ln cosh sqrt(2 h), 2 h */
    const float *share, *shift; /* [coarse][groups]: of a group in its coarser one; of the coarser ones */
    float value[PSA_MAX_LEVELS]; /* [fine + coarse]: variance of v inside a level's groups, over that of the head */
    int64_t plane;              /* floats between two results of a lane */
} psa__errors;

/* The functions that every instruction set provides. SIMD lanes are queries: a query tile holds nv vectors of `lanes`
 * queries, transposed: qt[D][nv * lanes], s[keys][nv * lanes], ot[Dv][nv * lanes]. K and V are read as they lie in
 * memory, row by row through pointers, so a tile gathers tokens and pooled tokens alike. Row pointer lists hold n rows
 * and are padded with valid pointers to a multiple of PSA__PAD_K; s has room for the padding. */
typedef struct psa__leaves {
    const char *name;
    int lanes;  /* queries in a vector */
    int max_nv; /* vectors in a query tile */
    int tile_k; /* keys in an attention tile */

    /* f32 from and to any type: dst = src; dst = factor * src */
    void (*to_f32)(float *dst, const void *src, psa_type type, int64_t n);
    void (*from_f32)(void *dst, psa_type type, const float *src, float factor, int64_t n);

    /* pooling: dst = a + b; x *= factor; dst = mean of n rows; a.b; dst = wa * a + wb * b; sum of m * (a - b)^2 */
    void (*sum)(float *dst, const float *a, const float *b, int64_t n);
    void (*scale)(float *x, float factor, int64_t n);
    void (*mean)(float *dst, const float *const *rows, int64_t n, int64_t d);
    float (*dot)(const float *a, const float *b, int64_t n);
    void (*blend)(float *dst, const float *a, float wa, const float *b, float wb, int64_t n);
    float (*spread)(const float *m, const float *a, const float *b, int64_t n);
    void (*moments)(float *sum, float *square, const float *x, int64_t n); /* sum += x, square += x * x */

    /* Trees. s[i] = row i . row i, for row pointers as in a tile. Points have PSA__AXES coordinates.
     * second[PSA__SECOND]: the sums of y y^T and of y, y being a point less the origin, over n points (at most
     * PSA__TREE_NODE): those in `which` or, if that is NULL, the first. u = their principal direction, after so many
     * power steps from the last less the first. s[i] = u . point i. sort: n indices (at most PSA__AXES) along the
     * principal direction, ties as they are. For along and sort there are points, and there is s, up to a multiple of
     * 16. */
    void (*squares)(const float *const *rows, int64_t n, int64_t d, float *s);
    void (*second)(const float *points, const int32_t *which, int64_t n, const float *origin, float *second);
    void (*principal)(const float *second, int64_t n, const float *first, const float *last, int steps, float *u);
    void (*along)(const float *u, const float *points, int64_t n, float *s);
    void (*sort)(const float *second, const float *points, int64_t n, int steps, int32_t *index);
    /* Brings those of n points and indices before the others whose s are the k smallest, ties by index. s is
     * overwritten; move: scratch of n + 16. */
    void (*part)(float *s, int64_t n, int64_t k, int32_t *move, float *points, int32_t *index);

    /* qt = scale * rows^T, nv * lanes rows of d; rows = ot^T with lane i scaled by scale[i] */
    void (*pack)(int nv, float *qt, const float *const *rows, int64_t d, float scale);
    void (*unpack)(int nv, float *const *rows, const float *ot, int64_t dv, const float *scale);

    /* s = K Q^T + bias, top[nv * lanes] = its maxima over the keys. bias (padded as k) may be NULL: 0. Here and in pv
     * ahead may be NULL. */
    void (*qk)(int nv, const float *qt, const float *const *k, int64_t n, int64_t d, const float *bias, float *s,
               float *top, const psa__ahead *ahead);
    /* Keys are hidden from lanes below first[key]: their logits become -inf, top the maxima of what is left. */
    void (*hide)(int nv, float *s, int64_t n, const int32_t *first, float *top);
    /* Online softmax, base 2: s becomes exp2(s - m); m, l[nv * lanes] and ot are brought up to date. */
    void (*softmax)(int nv, float *s, int64_t n, const float *top, float *m, float *l, float *ot, int64_t dv);
    /* ot += V^T s */
    void (*pv)(int nv, const float *s, const float *const *v, int64_t n, int64_t dv, float *ot,
               const psa__ahead *ahead);
    /* All of that for no more queries than a vector has lanes; lanes are elements of the head. */
    void (*few)(const psa__few *x);

    /* Scoring. Over n keys, for every lane: bm = max s and, if bs is not NULL, bs = sum of exp2(s - bm).
     * NaN counts as not seen; bm of a lane that sees nothing is -BIG. */
    void (*block_max)(int nv, const float *s, int64_t n, const int32_t *first, float *bm, float *bs);
    /* From bm and bs [n][lanes]: with m a lane's maximum over all j < n, bm becomes exp2(bm - m), and score[j] is the
     * maximum of bm or the sum of bs * bm over `each` lanes, with norm divided by the lane's softmax denominator, 1/z;
     * the next `each` lanes make the next row of scores, n_row further on, up to n_lanes, beyond which z is 0. bs may
     * be NULL for a maximum without norm. each: all lanes, a power of two up to 16, or a multiple of 16. */
    void (*row_mass)(int64_t lanes, int64_t n_lanes, int64_t each, int64_t n, float *bm, const float *bs, int use_max,
                     int norm, float *z, float *score, int64_t n_row);

    /* Predicted errors. For every lane: bm and bs as block_max over the groups; x[i * plane]: the squared error of the
     * i-th level after 1, and last of skipping, relative to (exp2(bm) * z)^2. */
    void (*block_error)(int nv, const float *s, const psa__errors *e, float *bm, float *bs, float *x);
    /* error[i][j] = sum over `lanes` of the lanes of (z * bm)^2 * x[i] for the n_x planes x[n][stride] of block_error
     * and bm[n][stride] of row_mass; rows of error have room for n + 16. lanes: at most PSA_MAX_BLOCK_Q. */
    void (*row_error)(int64_t lanes, int64_t stride, int64_t n, int n_x, const float *bm, const float *x, int64_t plane,
                      const float *z, float *error, int64_t n_row);
    /* error[i][j], i < last, becomes the price from which on a level coarser than the i-th makes error + price * cost
     * of block j least: the slope of the lower convex hull of (cost, error). error[i] is that of the level after the
     * i-th; level 1 has none. per_cost[i][k] is 1 / (what level k saves over i). */
    void (*hull)(float *error, int64_t n_row, int64_t n, int last, float per_cost[PSA_MAX_LEVELS][PSA_MAX_LEVELS + 1]);

    /* pack, qk, softmax and pv for K and V of f16 or bf16 where there are matrix tiles, else NULL. One vector of
     * queries at a time: s[keys][lanes], ot[dv][lanes]. d and dv are filled up with zeros to a multiple of 32, n keys
     * to `keys`, one of 32, with weights of 0; v has valid pointers for them. qt, kt, vt and weight are tiles of
     * numbers in parts (>>leaves). tile_products: n tiles of c = a b or, to add, c += a b, over `steps` times 32
     * columns of a; products of parts below 2^-24 are left out. tile_logits: s = scale * s + bias, and its maxima.
     * ahead may be NULL. */
    void (*tile_queries)(psa_type type, int parts, float *qt, const float *const *rows, int64_t d);
    void (*tile_keys)(psa_type type, float *kt, const float *const *k, int64_t n, int64_t d, const psa__ahead *ahead);
    void (*tile_values)(psa_type type, float *vt, const float *const *v, int64_t n, int64_t dv,
                        const psa__ahead *ahead);
    void (*tile_products)(const float *a, int a_parts, const float *b, int b_parts, int64_t steps, int add,
                          float *c, int64_t n);
    void (*tile_logits)(float *s, int64_t n, float scale, const float *bias, float *top);
    void (*tile_weights)(float *s, int64_t n, int64_t keys, const float *top, float *m, float *l, float *ot, int64_t dv,
                         float *weight);

    /* pack, qk and pv for K and V of bf16, which are read as they are, or NULL. qt: the queries in so many parts, not
     * scaled, for s = scale * K Q^T + bias; nv * lanes * d * parts / 2 floats. */
    void (*pack_bf16)(int nv, float *qt, const float *const *rows, int parts, int64_t d);
    void (*qk_bf16)(int nv, const float *qt, int parts, float scale, const float *const *k, int64_t n, int64_t d,
                    const float *bias, float *s, float *top, const psa__ahead *ahead);
    void (*pv_bf16)(int nv, const float *s, const float *const *v, int64_t n, int64_t dv, float *ot,
                    const psa__ahead *ahead);

    /* Denormals off on this thread, matrix tiles on; the return value brings the caller's mode back. */
    unsigned (*enter)(void);
    void (*leave)(unsigned mode);
} psa__leaves;

#if defined(PSA_SIMD_EMULATED) /* the tests' build with intrinsics from SIMDe: every instruction set "is there" */
#define PSA__SIMD 1
#define PSA__TARGET_AVX2
#define PSA__TARGET_AVX512
#define PSA__TARGET_AMX
#define PSA__HOLD(x)
#define PSA__AMX 1
#define PSA__AMX_FENCE()
#elif defined(PSA__X86) && (defined(__GNUC__) || defined(__clang__))
#define PSA__SIMD 1
#define PSA__TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define PSA__TARGET_AVX512 __attribute__((target("avx512f,avx512dq,avx2,fma,f16c")))
/* Keeps gcc from folding a load into each of its uses, which makes the tiles bound by the load ports. */
#define PSA__HOLD(x) __asm__("" : "+v"(x))
#if defined(__x86_64__) && defined(__linux__) && !defined(__ILP32__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define PSA__AMX 1
#define PSA__TARGET_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512dq,avx2,fma,f16c")))
#define PSA__AMX_FENCE() __asm__ volatile("" ::: "memory") /* gcc's intrinsics do not say that they touch memory */
#endif
#elif defined(PSA__X86) && defined(_MSC_VER)
#define PSA__SIMD 1
#define PSA__TARGET_AVX2
#define PSA__TARGET_AVX512
#define PSA__HOLD(x)
#endif

#define PSA__PASS 1
#include PSA_FILENAME
#undef PSA__PASS
#ifdef PSA__SIMD
#define PSA__PASS 2
#include PSA_FILENAME
#undef PSA__PASS
#define PSA__PASS 3
#include PSA_FILENAME
#undef PSA__PASS
#endif
#ifdef PSA__NEON
#define PSA__PASS 4
#include PSA_FILENAME
#undef PSA__PASS
#endif

#else /* PSA__PASS */

/* ================================================================================================================= */
/* >>leaves: this section is compiled once per instruction set, through PSA__(name) and a vector type PSA__V         */
/* ================================================================================================================= */

#if defined(__GNUC__) && !defined(__clang__) /* g++ 12 warns inside its own AVX-512 header */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if PSA__PASS == 1 /* scalar: one lane per vector */

#define PSA__(name) psa__scalar_##name
#define PSA__TARGET
#define PSA__V float
#define PSA__W 1
#define PSA__NV 4
#define PSA__ROWS(nv) ((nv) > 2 ? 2 : 4) /* keys (QK) or output rows (PV) in a register tile */
#define PSA__FEW 4                       /* accumulators of a few queries' register tile */
#define PSA__HELD(x)

PSA__ALWAYS_INLINE float PSA__(load)(const float *p) { return *p; }
PSA__ALWAYS_INLINE void PSA__(store)(float *p, float x) { *p = x; }
PSA__ALWAYS_INLINE float PSA__(splat)(float x) { return x; }
PSA__ALWAYS_INLINE float PSA__(add)(float a, float b) { return a + b; }
PSA__ALWAYS_INLINE float PSA__(sub)(float a, float b) { return a - b; }
PSA__ALWAYS_INLINE float PSA__(mul)(float a, float b) { return a * b; }
PSA__ALWAYS_INLINE float PSA__(fma)(float a, float b, float c) { return a * b + c; }
PSA__ALWAYS_INLINE float PSA__(max)(float a, float b) { return a > b ? a : b; } /* b if one is NaN */
PSA__ALWAYS_INLINE float PSA__(min)(float a, float b) { return a < b ? a : b; }
PSA__ALWAYS_INLINE int PSA__(any_greater)(float a, float b) { return a > b; }
PSA__ALWAYS_INLINE float PSA__(tally)(float n, float a, float b) { return n + (a < b ? 1.0f : 0.0f); }
PSA__ALWAYS_INLINE float PSA__(total)(float x) { return x; }
PSA__ALWAYS_INLINE float PSA__(from_lane)(int first, float x, float other) { return first > 0 ? other : x; }
PSA__ALWAYS_INLINE float PSA__(exp2)(float x) { return psa__exp2(x); }
PSA__ALWAYS_INLINE void PSA__(transpose)(float *r) { (void)r; }
PSA__ALWAYS_INLINE float PSA__(sums)(float *r) { return r[0]; } /* lane i: the sum of r[i]'s lanes */

PSA__ALWAYS_INLINE float PSA__(load_as)(psa_type type, const void *p, int64_t i) { return psa__element(type, p, i); }

PSA__ALWAYS_INLINE void PSA__(store_as)(psa_type type, void *p, int64_t i, float x)
{
    psa__from_f32((char *)p + i * (type == PSA_F32 ? 4 : 2), type, &x, 1);
}

static unsigned PSA__(enter)(void) { return 0; }
static void PSA__(leave)(unsigned mode) { (void)mode; }

#elif PSA__PASS == 2 /* AVX2, FMA, F16C */

#define PSA__(name) psa__avx2_##name
#define PSA__TARGET PSA__TARGET_AVX2
#define PSA__V __m256
#define PSA__W 8
#define PSA__NV 3
#define PSA__ROWS(nv) ((nv) > 1 ? 4 : 8)
#define PSA__FEW 8
#define PSA__HELD(x)

PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(load)(const float *p) { return _mm256_loadu_ps(p); }
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(store)(float *p, __m256 x) { _mm256_storeu_ps(p, x); }
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(splat)(float x) { return _mm256_set1_ps(x); }
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(add)(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(sub)(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(mul)(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(fma)(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(max)(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(min)(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }

PSA__ALWAYS_INLINE PSA__TARGET int PSA__(any_greater)(__m256 a, __m256 b)
{
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

/* The sum of the lanes */
PSA__ALWAYS_INLINE PSA__TARGET float PSA__(total)(__m256 x)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

/* n, and 1 more where a < b */
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(tally)(__m256 n, __m256 a, __m256 b)
{
    return _mm256_add_ps(n, _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ), _mm256_set1_ps(1.0f)));
}

/* x in lanes >= first, other below */
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(from_lane)(int first, __m256 x, __m256 other)
{
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(below));
}

PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(exp2)(__m256 x)
{
    const __m256 low = _mm256_set1_ps(-126.0f), round = _mm256_set1_ps(12583039.0f); /* 1.5 * 2^23 + 127 */
    __m256 keep = _mm256_cmp_ps(x, low, _CMP_NLT_UQ), c = _mm256_max_ps(low, x); /* NaN passes through both */
    __m256 t = _mm256_add_ps(c, round), f = _mm256_sub_ps(c, _mm256_sub_ps(t, round));
    __m256 p = _mm256_set1_ps(1.3264727e-3f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(9.6715127e-3f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(5.5507337e-2f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(2.4022242e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(6.9314698e-1f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t), 23)));
    return _mm256_and_ps(p, keep);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(transpose)(__m256 *r)
{
    __m256 t[8];
    PSA__UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    PSA__UNROLL for (int i = 0; i < 2; i++) {
        r[4 * i + 0] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    PSA__UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    PSA__UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

/* Lane i: the sum of r[i]'s lanes */
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(sums)(__m256 *r)
{
    PSA__UNROLL for (int i = 0; i < 4; i++) {
        __m256 halves = _mm256_permute2f128_ps(r[i], r[i + 4], 0x21);
        r[i] = _mm256_add_ps(_mm256_blend_ps(r[i], r[i + 4], 0xf0), halves);
    }
    PSA__UNROLL for (int i = 0; i < 2; i++) {
        __m256 pairs = _mm256_shuffle_ps(r[i], r[i + 2], 0x4e);
        r[i] = _mm256_add_ps(_mm256_blend_ps(r[i], r[i + 2], 0xcc), pairs);
    }
    return _mm256_add_ps(_mm256_blend_ps(r[0], r[1], 0xaa), _mm256_permute_ps(_mm256_blend_ps(r[1], r[0], 0xaa), 0xb1));
}

/* Elements i, i + 1, ... of a row of any type */
PSA__ALWAYS_INLINE PSA__TARGET __m256 PSA__(load_as)(psa_type type, const void *p, int64_t i)
{
    const __m128i *half = (const __m128i *)(const void *)((const char *)p + 2 * i);
    if (type == PSA_F16) return _mm256_cvtph_ps(_mm_loadu_si128(half));
    if (type == PSA_F32) return _mm256_loadu_ps((const float *)p + i);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(half)), 16));
}

/* To bf16, in the upper halves: nearest even; NaN keeps the top of its payload and is made quiet. */
PSA__ALWAYS_INLINE PSA__TARGET __m256i PSA__(round_bf16)(__m256 x)
{
    const __m256i quiet = _mm256_set1_epi32(0x400000), half = _mm256_set1_epi32(0x7fff);
    __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256 nan = _mm256_castsi256_ps(_mm256_or_si256(u, quiet));
    __m256 number = _mm256_castsi256_ps(_mm256_add_epi32(u, _mm256_add_epi32(half, odd)));
    return _mm256_castps_si256(_mm256_blendv_ps(number, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(store_as)(psa_type type, void *p, int64_t i, __m256 x)
{
    __m128i *half = (__m128i *)(void *)((char *)p + 2 * i);
    __m256i u;
    if (type == PSA_F32) _mm256_storeu_ps((float *)p + i, x);
    if (type == PSA_F16) _mm_storeu_si128(half, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    if (type != PSA_BF16) return;
    u = _mm256_srli_epi32(PSA__(round_bf16)(x), 16);
    _mm_storeu_si128(half, _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1)));
}

static PSA__TARGET unsigned PSA__(enter)(void)
{
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040u); /* flush to zero, denormals are zero */
    return mode;
}

static PSA__TARGET void PSA__(leave)(unsigned mode) { _mm_setcsr(mode); }

#elif PSA__PASS == 3 /* AVX-512 F and DQ */

#define PSA__(name) psa__avx512_##name
#define PSA__TARGET PSA__TARGET_AVX512
#define PSA__V __m512
#define PSA__W 16
#define PSA__NV 4
#define PSA__ROWS(nv) ((nv) > 3 ? 6 : 8)
#define PSA__FEW 16
#define PSA__HELD(x) PSA__HOLD(x)

PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(load)(const float *p) { return _mm512_loadu_ps(p); }
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(store)(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(splat)(float x) { return _mm512_set1_ps(x); }
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(add)(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(sub)(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(mul)(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(fma)(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(max)(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(min)(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }

PSA__ALWAYS_INLINE PSA__TARGET int PSA__(any_greater)(__m512 a, __m512 b)
{
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
}

PSA__ALWAYS_INLINE PSA__TARGET float PSA__(total)(__m512 x)
{
    float lane[16]; /* g++ 12 warns inside its own header of what takes halves */
    _mm512_storeu_ps(lane, x);
    return psa__avx2_total(_mm256_add_ps(_mm256_loadu_ps(lane), _mm256_loadu_ps(lane + 8)));
}

PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(tally)(__m512 n, __m512 a, __m512 b)
{
    return _mm512_mask_add_ps(n, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), n, _mm512_set1_ps(1.0f));
}

PSA__ALWAYS_INLINE PSA__TARGET int64_t PSA__(pick)(__m512 x, float limit, int below, int64_t first, int32_t *to)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const unsigned mask = _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ) ^ (below ? 0 : 0xffffu);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32((int)first));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)mask, index));
    return _mm_popcnt_u32(mask);
}

/* x in lanes >= first, other below */
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(from_lane)(int first, __m512 x, __m512 other)
{
    unsigned below = first <= 0 ? 0 : first >= 16 ? 0xffffu : (1u << first) - 1;
    return _mm512_mask_mov_ps(x, (__mmask16)below, other);
}

PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(exp2)(__m512 x)
{
    const __m512 f = _mm512_reduce_ps(x, 0x09); /* x - floor(x), of infinities 0; scalef rounds down too */
    __m512 p = _mm512_set1_ps(1.86713017e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.01702978e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.57999127e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40164444e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93151295e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(transpose)(__m512 *r)
{
    __m512 t[16];
    PSA__UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    PSA__UNROLL for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
        __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i + 0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
    PSA__UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    PSA__UNROLL for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Lane i: the sum of r[i]'s lanes */
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(sums)(__m512 *r)
{
    __m512 a, b;
    PSA__UNROLL for (int i = 0; i < 8; i++) {
        b = _mm512_shuffle_f32x4(r[i], r[i + 8], 0x4e);
        r[i] = _mm512_add_ps(_mm512_mask_mov_ps(r[i], 0xff00, r[i + 8]), b);
    }
    PSA__UNROLL for (int i = 0; i < 4; i++) {
        b = _mm512_mask_mov_ps(r[i + 4], 0xf0f0, r[i]);
        r[i] = _mm512_add_ps(_mm512_mask_mov_ps(r[i], 0xf0f0, r[i + 4]), _mm512_shuffle_f32x4(b, b, 0xb1));
    }
    PSA__UNROLL for (int i = 0; i < 2; i++) {
        b = _mm512_shuffle_ps(r[i], r[i + 2], 0x4e);
        r[i] = _mm512_add_ps(_mm512_mask_mov_ps(r[i], 0xcccc, r[i + 2]), b);
    }
    a = _mm512_mask_mov_ps(r[0], 0xaaaa, r[1]);
    b = _mm512_mask_mov_ps(r[1], 0xaaaa, r[0]);
    return _mm512_add_ps(a, _mm512_permute_ps(b, 0xb1));
}

PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(load_as)(psa_type type, const void *p, int64_t i)
{
    const __m256i *half = (const __m256i *)(const void *)((const char *)p + 2 * i);
    if (type == PSA_F16) return _mm512_cvtph_ps(_mm256_loadu_si256(half));
    if (type == PSA_F32) return _mm512_loadu_ps((const float *)p + i);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(half)), 16));
}

/* To bf16, in the upper halves, as with AVX2 */
PSA__ALWAYS_INLINE PSA__TARGET __m512i PSA__(round_bf16)(__m512 x)
{
    const __m512i quiet = _mm512_set1_epi32(0x400000), half = _mm512_set1_epi32(0x7fff);
    __m512i u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i number = _mm512_add_epi32(u, _mm512_add_epi32(half, odd));
    return _mm512_mask_or_epi32(number, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, quiet);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(store_as)(psa_type type, void *p, int64_t i, __m512 x)
{
    __m256i *half = (__m256i *)(void *)((char *)p + 2 * i);
    if (type == PSA_F32) _mm512_storeu_ps((float *)p + i, x);
    if (type == PSA_F16) _mm256_storeu_si256(half, _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT));
    if (type == PSA_BF16) _mm256_storeu_si256(half, _mm512_cvtepi32_epi16(_mm512_srli_epi32(PSA__(round_bf16)(x), 16)));
}

/* Elements of a row, 16 or 8 and zeros */
PSA__ALWAYS_INLINE PSA__TARGET __m512 PSA__(load_lanes)(int lanes, psa_type type, const void *p, int64_t i)
{
    __m256d half;
    if (lanes == 16) return PSA__(load_as)(type, p, i);
    half = _mm256_castps_pd(psa__avx2_load_as(type, p, i));
    return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_setzero_pd(), half, 0));
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(store_lanes)(int lanes, float *p, __m512 x)
{
    if (lanes == 16) _mm512_storeu_ps(p, x);
    else _mm256_storeu_ps(p, _mm512_castps512_ps256(x));
}

static PSA__TARGET unsigned PSA__(enter)(void) { return psa__avx2_enter(); }
static PSA__TARGET void PSA__(leave)(unsigned mode) { psa__avx2_leave(mode); }

#elif PSA__PASS == 4 /* AArch64 */

#define PSA__(name) psa__neon_##name
#define PSA__TARGET
#define PSA__V float32x4_t
#define PSA__W 4
#define PSA__NV 4
#define PSA__ROWS(nv) ((nv) > 2 ? 4 : 8)
#define PSA__FEW 16
#define PSA__HELD(x)

PSA__ALWAYS_INLINE float32x4_t PSA__(load)(const float *p) { return vld1q_f32(p); }
PSA__ALWAYS_INLINE void PSA__(store)(float *p, float32x4_t x) { vst1q_f32(p, x); }
PSA__ALWAYS_INLINE float32x4_t PSA__(splat)(float x) { return vdupq_n_f32(x); }
PSA__ALWAYS_INLINE float32x4_t PSA__(add)(float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }
PSA__ALWAYS_INLINE float32x4_t PSA__(sub)(float32x4_t a, float32x4_t b) { return vsubq_f32(a, b); }
PSA__ALWAYS_INLINE float32x4_t PSA__(mul)(float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }
PSA__ALWAYS_INLINE float32x4_t PSA__(fma)(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }

PSA__ALWAYS_INLINE float32x4_t PSA__(max)(float32x4_t a, float32x4_t b) /* b if one is NaN */
{
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}

PSA__ALWAYS_INLINE float32x4_t PSA__(min)(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
PSA__ALWAYS_INLINE int PSA__(any_greater)(float32x4_t a, float32x4_t b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }

PSA__ALWAYS_INLINE float PSA__(total)(float32x4_t x) { return vaddvq_f32(x); }

/* n, and 1 more where a < b */
PSA__ALWAYS_INLINE float32x4_t PSA__(tally)(float32x4_t n, float32x4_t a, float32x4_t b)
{
    uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    return vaddq_f32(n, vreinterpretq_f32_u32(vandq_u32(vcltq_f32(a, b), one)));
}

/* x in lanes >= first, other below */
PSA__ALWAYS_INLINE float32x4_t PSA__(from_lane)(int first, float32x4_t x, float32x4_t other)
{
    static const int32_t lane[4] = {0, 1, 2, 3};
    return vbslq_f32(vcgtq_s32(vdupq_n_s32(first), vld1q_s32(lane)), other, x);
}

PSA__ALWAYS_INLINE float32x4_t PSA__(exp2)(float32x4_t x)
{
    const float32x4_t low = vdupq_n_f32(-126.0f);
    uint32x4_t below = vcltq_f32(x, low);
    float32x4_t c = vbslq_f32(below, low, x), r = vrndnq_f32(c), f = vsubq_f32(c, r); /* NaN passes */
    int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(r), vdupq_n_s32(127)), 23);
    float32x4_t p = vdupq_n_f32(1.3264727e-3f);
    p = vfmaq_f32(vdupq_n_f32(9.6715127e-3f), p, f);
    p = vfmaq_f32(vdupq_n_f32(5.5507337e-2f), p, f);
    p = vfmaq_f32(vdupq_n_f32(2.4022242e-1f), p, f);
    p = vfmaq_f32(vdupq_n_f32(6.9314698e-1f), p, f);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, f);
    return vbslq_f32(below, vdupq_n_f32(0.0f), vmulq_f32(p, vreinterpretq_f32_s32(power)));
}

PSA__ALWAYS_INLINE void PSA__(transpose)(float32x4_t *r)
{
    float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0], r[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(r[0], r[1]));
    float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2], r[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(r[2], r[3]));
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

/* Lane i: the sum of r[i]'s lanes */
PSA__ALWAYS_INLINE float32x4_t PSA__(sums)(float32x4_t *r)
{
    return vpaddq_f32(vpaddq_f32(r[0], r[1]), vpaddq_f32(r[2], r[3]));
}

PSA__ALWAYS_INLINE float32x4_t PSA__(load_as)(psa_type type, const void *p, int64_t i)
{
    uint16x4_t half;
    if (type == PSA_F32) return vld1q_f32((const float *)p + i);
    memcpy(&half, (const char *)p + 2 * i, sizeof half);
    return type == PSA_F16 ? vcvt_f32_f16(vreinterpret_f16_u16(half)) : vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}

PSA__ALWAYS_INLINE void PSA__(store_as)(psa_type type, void *p, int64_t i, float32x4_t x)
{
    uint32x4_t u = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    uint32x4_t number = vaddq_u32(u, vaddq_u32(vdupq_n_u32(0x7fff), odd)), nan = vorrq_u32(u, vdupq_n_u32(0x400000));
    uint16x4_t half = vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), number, nan), 16); /* bf16 */
    if (type == PSA_F16) half = vreinterpret_u16_f16(vcvt_f16_f32(x));
    if (type == PSA_F32) vst1q_f32((float *)p + i, x);
    else memcpy((char *)p + 2 * i, &half, sizeof half);
}

#ifdef _MSC_VER
static unsigned PSA__(enter)(void) { return 0; }
static void PSA__(leave)(unsigned mode) { (void)mode; }
#else
static unsigned PSA__(enter)(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode | (uint64_t)1 << 24)); /* flush to zero */
    return (unsigned)mode;
}

static void PSA__(leave)(unsigned mode) { __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)mode)); }
#endif

#endif

/* ---- from here on: one text for every instruction set ---- */

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(widen)(float *dst, const void *src, psa_type type, int64_t n)
{
    int64_t i = 0;
    for (; i + PSA__W <= n; i += PSA__W) PSA__(store)(dst + i, PSA__(load_as)(type, src, i));
    for (; i < n; i++) dst[i] = psa__element(type, src, i);
}

static PSA__TARGET void PSA__(to_f32)(float *dst, const void *src, psa_type type, int64_t n)
{
    if (type == PSA_F16) PSA__(widen)(dst, src, PSA_F16, n);
    else if (type == PSA_BF16) PSA__(widen)(dst, src, PSA_BF16, n);
    else memcpy(dst, src, (size_t)n * sizeof *dst);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(narrow)(void *dst, psa_type type, const float *src, float factor, int64_t n)
{
    const PSA__V by = PSA__(splat)(factor);
    int64_t i = 0;
    for (; i + PSA__W <= n; i += PSA__W) PSA__(store_as)(type, dst, i, PSA__(mul)(PSA__(load)(src + i), by));
    for (; i < n; i++) {
        float x = src[i] * factor;
        psa__from_f32((char *)dst + i * (type == PSA_F32 ? 4 : 2), type, &x, 1);
    }
}

static PSA__TARGET void PSA__(from_f32)(void *dst, psa_type type, const float *src, float factor, int64_t n)
{
    if (type == PSA_F16) PSA__(narrow)(dst, PSA_F16, src, factor, n);
    else if (type == PSA_BF16) PSA__(narrow)(dst, PSA_BF16, src, factor, n);
    else PSA__(narrow)(dst, PSA_F32, src, factor, n);
}

/* Rows begin .. end-1 of those ahead */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(prefetch)(const psa__ahead *ahead, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end && i < ahead->n; i++) {
        for (size_t at = 0; at < ahead->bytes; at += 64) PSA__PREFETCH((const char *)(const void *)ahead->rows[i] + at);
    }
}

static PSA__TARGET void PSA__(sum)(float *dst, const float *a, const float *b, int64_t n)
{
    int64_t i = 0;
    for (; i + PSA__W <= n; i += PSA__W) PSA__(store)(dst + i, PSA__(add)(PSA__(load)(a + i), PSA__(load)(b + i)));
    for (; i < n; i++) dst[i] = a[i] + b[i];
}

static PSA__TARGET void PSA__(scale)(float *x, float factor, int64_t n)
{
    int64_t i = 0;
    for (; i + PSA__W <= n; i += PSA__W) PSA__(store)(x + i, PSA__(mul)(PSA__(load)(x + i), PSA__(splat)(factor)));
    for (; i < n; i++) x[i] *= factor;
}

/* `cols` vectors of the mean of n rows */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(mean_cols)(int cols, float *dst, const float *const *rows, int64_t n,
                                                     int64_t at)
{
    const PSA__V share = PSA__(splat)(1.0f / (float)n);
    PSA__V sum[4];
    PSA__UNROLL for (int x = 0; x < cols; x++) sum[x] = PSA__(load)(rows[0] + at + x * PSA__W);
    for (int64_t i = 1; i < n; i++) {
        PSA__UNROLL for (int x = 0; x < cols; x++) sum[x] = PSA__(add)(sum[x], PSA__(load)(rows[i] + at + x * PSA__W));
    }
    PSA__UNROLL for (int x = 0; x < cols; x++) PSA__(store)(dst + at + x * PSA__W, PSA__(mul)(sum[x], share));
}

static PSA__TARGET void PSA__(mean)(float *dst, const float *const *rows, int64_t n, int64_t d)
{
    int64_t at = 0;
    for (; at + 4 * PSA__W <= d; at += 4 * PSA__W) PSA__(mean_cols)(4, dst, rows, n, at);
    for (; at + PSA__W <= d; at += PSA__W) PSA__(mean_cols)(1, dst, rows, n, at);
    for (; at < d; at++) {
        dst[at] = 0.0f;
        for (int64_t i = 0; i < n; i++) dst[at] += rows[i][at] / (float)n;
    }
}

static PSA__TARGET float PSA__(dot)(const float *a, const float *b, int64_t n)
{
    float total;
    PSA__V sum[4];
    int64_t i = 0;
    PSA__UNROLL for (int x = 0; x < 4; x++) sum[x] = PSA__(splat)(0.0f);
    for (; i + 4 * PSA__W <= n; i += 4 * PSA__W) {
        PSA__UNROLL for (int x = 0; x < 4; x++) {
            sum[x] = PSA__(fma)(PSA__(load)(a + i + x * PSA__W), PSA__(load)(b + i + x * PSA__W), sum[x]);
        }
    }
    for (; i + PSA__W <= n; i += PSA__W) sum[0] = PSA__(fma)(PSA__(load)(a + i), PSA__(load)(b + i), sum[0]);
    total = PSA__(total)(PSA__(add)(PSA__(add)(sum[0], sum[1]), PSA__(add)(sum[2], sum[3])));
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

static PSA__TARGET void PSA__(blend)(float *dst, const float *a, float wa, const float *b, float wb, int64_t n)
{
    const PSA__V va = PSA__(splat)(wa), vb = PSA__(splat)(wb);
    int64_t i = 0;
    for (; i + PSA__W <= n; i += PSA__W) {
        PSA__V x = PSA__(mul)(PSA__(load)(a + i), va);
        PSA__(store)(dst + i, PSA__(fma)(PSA__(load)(b + i), vb, x));
    }
    for (; i < n; i++) dst[i] = a[i] * wa + b[i] * wb;
}

static PSA__TARGET float PSA__(spread)(const float *m, const float *a, const float *b, int64_t n)
{
    float total;
    PSA__V sum = PSA__(splat)(0.0f);
    int64_t i = 0;
    for (; i + PSA__W <= n; i += PSA__W) {
        PSA__V x = PSA__(sub)(PSA__(load)(a + i), PSA__(load)(b + i));
        sum = PSA__(fma)(PSA__(mul)(PSA__(load)(m + i), x), x, sum);
    }
    total = PSA__(total)(sum);
    for (; i < n; i++) total += m[i] * (a[i] - b[i]) * (a[i] - b[i]);
    return total;
}

static PSA__TARGET void PSA__(moments)(float *sum, float *square, const float *x, int64_t n)
{
    int64_t i = 0;
    for (; i + PSA__W <= n; i += PSA__W) {
        const PSA__V v = PSA__(load)(x + i);
        PSA__(store)(sum + i, PSA__(add)(PSA__(load)(sum + i), v));
        PSA__(store)(square + i, PSA__(fma)(v, v, PSA__(load)(square + i)));
    }
    for (; i < n; i++) sum[i] += x[i], square[i] += x[i] * x[i];
}

static PSA__TARGET void PSA__(pack)(int nv, float *qt, const float *const *rows, int64_t d, float scale)
{
    const PSA__V factor = PSA__(splat)(scale);
    for (int j = 0; j < nv; j++) {
        const float *const *from = rows + j * PSA__W;
        int64_t x = 0;
        for (; x + PSA__W <= d; x += PSA__W) {
            PSA__V r[PSA__W];
            PSA__UNROLL for (int i = 0; i < PSA__W; i++) r[i] = PSA__(mul)(PSA__(load)(from[i] + x), factor);
            PSA__(transpose)(r);
            PSA__UNROLL for (int i = 0; i < PSA__W; i++) PSA__(store)(qt + ((x + i) * nv + j) * PSA__W, r[i]);
        }
        for (; x < d; x++) {
            for (int i = 0; i < PSA__W; i++) qt[(x * nv + j) * PSA__W + i] = from[i][x] * scale;
        }
    }
}

static PSA__TARGET void PSA__(unpack)(int nv, float *const *rows, const float *ot, int64_t dv, const float *scale)
{
    for (int j = 0; j < nv; j++) {
        const PSA__V factor = PSA__(load)(scale + j * PSA__W);
        float *const *to = rows + j * PSA__W;
        int64_t x = 0;
        for (; x + PSA__W <= dv; x += PSA__W) {
            PSA__V r[PSA__W];
            PSA__UNROLL for (int i = 0; i < PSA__W; i++) {
                r[i] = PSA__(mul)(PSA__(load)(ot + ((x + i) * nv + j) * PSA__W), factor);
            }
            PSA__(transpose)(r);
            PSA__UNROLL for (int i = 0; i < PSA__W; i++) PSA__(store)(to[i] + x, r[i]);
        }
        for (; x < dv; x++) {
            for (int i = 0; i < PSA__W; i++) {
                to[i][x] = ot[(x * nv + j) * PSA__W + i] * scale[j * PSA__W + i];
            }
        }
    }
}

/* The hot tiles. nv and rows are constants after inlining, so the accumulators live in registers. */

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(qk_tile)(int nv, int rows, const float *PSA__RESTRICT qt,
                                                   const float *const *k, int64_t n, int64_t d, const float *bias,
                                                   float *PSA__RESTRICT s, float *PSA__RESTRICT top,
                                                   const psa__ahead *ahead)
{
    PSA__V most[PSA__NV];
    PSA__UNROLL for (int j = 0; j < nv; j++) most[j] = PSA__(splat)(-INFINITY);
    for (int64_t key = 0; key < n; key += rows) {
        PSA__V acc[8][PSA__NV];
        const float *row[8];
        if (ahead) PSA__(prefetch)(ahead, key * ahead->n / n, (key + rows) * ahead->n / n);
        PSA__UNROLL for (int i = 0; i < rows; i++) {
            row[i] = k[key + i];
            PSA__UNROLL for (int j = 0; j < nv; j++) acc[i][j] = PSA__(splat)(bias ? bias[key + i] : 0.0f);
        }
        PSA__UNROLL_BY_4 for (int64_t x = 0; x < d; x++) {
            PSA__V q[PSA__NV];
            PSA__UNROLL for (int j = 0; j < nv; j++) {
                q[j] = PSA__(load)(qt + (x * nv + j) * PSA__W);
                PSA__HELD(q[j]);
            }
            PSA__UNROLL for (int i = 0; i < rows; i++) {
                PSA__V kx = PSA__(splat)(row[i][x]);
                PSA__HELD(kx);
                PSA__UNROLL for (int j = 0; j < nv; j++) acc[i][j] = PSA__(fma)(kx, q[j], acc[i][j]);
            }
        }
        PSA__UNROLL for (int i = 0; i < rows; i++) {
            PSA__UNROLL for (int j = 0; j < nv; j++) {
                PSA__(store)(s + ((key + i) * nv + j) * PSA__W, acc[i][j]);
                most[j] = PSA__(max)(acc[i][j], most[j]);
            }
        }
    }
    PSA__UNROLL for (int j = 0; j < nv; j++) PSA__(store)(top + j * PSA__W, most[j]);
}

/* Columns begin .. end-1 of the output, some tiles of `rows`. */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(pv_tile)(int nv, int rows, const float *PSA__RESTRICT s,
                                                   const float *const *v, int64_t n, int64_t begin, int64_t end,
                                                   int64_t dv, float *PSA__RESTRICT ot, const psa__ahead *ahead)
{
    for (int64_t x = begin; x < end; x += rows) {
        PSA__V acc[8][PSA__NV];
        float *o = ot + x * nv * PSA__W;
        if (ahead) PSA__(prefetch)(ahead, x * ahead->n / dv, (x + rows) * ahead->n / dv);
        PSA__UNROLL for (int i = 0; i < rows; i++) {
            PSA__UNROLL for (int j = 0; j < nv; j++) acc[i][j] = PSA__(load)(o + (i * nv + j) * PSA__W);
        }
        PSA__UNROLL_BY_4 for (int64_t key = 0; key < n; key++) {
            const float *row = v[key] + x;
            PSA__V p[PSA__NV];
            PSA__UNROLL for (int j = 0; j < nv; j++) {
                p[j] = PSA__(load)(s + (key * nv + j) * PSA__W);
                PSA__HELD(p[j]);
            }
            PSA__UNROLL for (int i = 0; i < rows; i++) {
                PSA__V vx = PSA__(splat)(row[i]);
                PSA__HELD(vx);
                PSA__UNROLL for (int j = 0; j < nv; j++) acc[i][j] = PSA__(fma)(vx, p[j], acc[i][j]);
            }
        }
        PSA__UNROLL for (int i = 0; i < rows; i++) {
            PSA__UNROLL for (int j = 0; j < nv; j++) PSA__(store)(o + (i * nv + j) * PSA__W, acc[i][j]);
        }
    }
}

/* Where rows are 6, the last 4 or 8 columns go by fours: dv is a multiple of 8. */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(pv_tiles)(int nv, const float *s, const float *const *v, int64_t n,
                                                    int64_t dv, float *ot, const psa__ahead *ahead)
{
    const int rows = PSA__ROWS(nv);
    const int64_t end = rows == 6 ? dv - dv % 12 : dv;
    PSA__(pv_tile)(nv, rows, s, v, n, 0, end, dv, ot, ahead);
    if (rows == 6) PSA__(pv_tile)(nv, 4, s, v, n, end, dv, dv, ot, ahead);
}

static PSA__TARGET void PSA__(qk)(int nv, const float *qt, const float *const *k, int64_t n, int64_t d,
                                  const float *bias, float *s, float *top, const psa__ahead *ahead)
{
    switch (nv) {
    case 1: PSA__(qk_tile)(1, PSA__ROWS(1), qt, k, n, d, bias, s, top, ahead); break;
    case 2: PSA__(qk_tile)(2, PSA__ROWS(2), qt, k, n, d, bias, s, top, ahead); break;
    case 3: PSA__(qk_tile)(3, PSA__ROWS(3), qt, k, n, d, bias, s, top, ahead); break;
    default: PSA__(qk_tile)(PSA__NV, PSA__ROWS(PSA__NV), qt, k, n, d, bias, s, top, ahead); break;
    }
}

static PSA__TARGET void PSA__(pv)(int nv, const float *s, const float *const *v, int64_t n, int64_t dv, float *ot,
                                  const psa__ahead *ahead)
{
    switch (nv) {
    case 1: PSA__(pv_tiles)(1, s, v, n, dv, ot, ahead); break;
    case 2: PSA__(pv_tiles)(2, s, v, n, dv, ot, ahead); break;
    case 3: PSA__(pv_tiles)(3, s, v, n, dv, ot, ahead); break;
    default: PSA__(pv_tiles)(PSA__NV, s, v, n, dv, ot, ahead); break;
    }
}

static PSA__TARGET void PSA__(hide)(int nv, float *s, int64_t n, const int32_t *first, float *top)
{
    const PSA__V hidden = PSA__(splat)(-INFINITY);
    for (int j = 0; j < nv; j++) {
        PSA__V most = hidden;
        for (int64_t key = 0; key < n; key++) {
            float *at = s + (key * nv + j) * PSA__W;
            PSA__V x = PSA__(from_lane)(first[key] - j * PSA__W, PSA__(load)(at), hidden);
            PSA__(store)(at, x);
            most = PSA__(max)(x, most);
        }
        PSA__(store)(top + j * PSA__W, most);
    }
}

/* Moves the running maxima up where one of them is far below. */
static PSA__TARGET void PSA__(rescale)(int nv, const float *top, float *m, float *l, float *ot, int64_t dv)
{
    int grew = 0;
    for (int j = 0; j < nv; j++) {
        PSA__V limit = PSA__(add)(PSA__(load)(m + j * PSA__W), PSA__(splat)(PSA__RESCALE));
        grew |= PSA__(any_greater)(PSA__(load)(top + j * PSA__W), limit);
    }
    for (int j = 0; grew && j < nv; j++) {
        PSA__V old = PSA__(load)(m + j * PSA__W), now = PSA__(max)(PSA__(load)(top + j * PSA__W), old);
        PSA__V shrink = PSA__(exp2)(PSA__(sub)(old, now));
        PSA__(store)(m + j * PSA__W, now);
        PSA__(store)(l + j * PSA__W, PSA__(mul)(PSA__(load)(l + j * PSA__W), shrink));
        for (int64_t x = 0; x < dv; x++) {
            float *o = ot + (x * nv + j) * PSA__W;
            PSA__(store)(o, PSA__(mul)(PSA__(load)(o), shrink));
        }
    }
}

static PSA__TARGET void PSA__(softmax)(int nv, float *s, int64_t n, const float *top, float *m, float *l, float *ot,
                                       int64_t dv)
{
    PSA__(rescale)(nv, top, m, l, ot, dv);
    for (int j = 0; j < nv; j++) {
        const PSA__V mj = PSA__(load)(m + j * PSA__W);
        PSA__V sum = PSA__(load)(l + j * PSA__W);
        for (int64_t key = 0; key < n; key++) {
            float *at = s + (key * nv + j) * PSA__W;
            PSA__V p = PSA__(exp2)(PSA__(sub)(PSA__(load)(at), mj));
            PSA__(store)(at, p);
            sum = PSA__(add)(sum, p);
        }
        PSA__(store)(l + j * PSA__W, sum);
    }
}

/* Few queries: lanes are elements of the head. Logits lie as [keys][width]: lane i of a vector of them is of query
 * i % width. A register tile holds as many keys as have a vector full of logits, or as many columns of the output. */

#if PSA__W <= 8 /* heads are whole vectors */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(load_lanes)(int lanes, psa_type type, const void *p, int64_t i)
{
    (void)lanes;
    return PSA__(load_as)(type, p, i);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(store_lanes)(int lanes, float *p, PSA__V x)
{
    (void)lanes;
    PSA__(store)(p, x);
}
#endif

/* acc[key * width + query] += the products of `lanes` elements from `at` on; V, which is next, is prefetched. */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(few_products)(psa_type type, int width, int keys, int lanes,
                                                        const float *q, const float *const *k,
                                                        const float *const *v, int64_t at, PSA__V *acc)
{
    const uintptr_t offset = (uintptr_t)at * (type == PSA_F32 ? 4 : 2);
    const int new_line = offset % 64 == 0;
    PSA__V kx[PSA__W];
    PSA__UNROLL for (int i = 0; i < keys; i++) {
        kx[i] = PSA__(load_lanes)(lanes, type, k[i], at);
        if (new_line) PSA__PREFETCH((const char *)((uintptr_t)v[i] + offset));
    }
    PSA__UNROLL for (int query = 0; query < width; query++) {
        const PSA__V qx = PSA__(load_lanes)(lanes, PSA_F32, q + at * width, query * lanes);
        PSA__UNROLL for (int i = 0; i < keys; i++) {
            acc[i * width + query] = PSA__(fma)(kx[i], qx, acc[i * width + query]);
        }
    }
}

/* q . k of PSA__W / width keys, of up to 8 at a time: their row pointers stay in registers. */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(few_dots)(psa_type type, int width, const float *q, const float *const *k,
                                                      const float *const *v, int64_t d)
{
    enum { W = PSA__W };
    const int keys = W / width < 8 ? W / width : 8;
    PSA__V acc[W];
    PSA__UNROLL for (int i = 0; i < W; i++) acc[i] = PSA__(splat)(0.0f);
    PSA__UNROLL for (int i = 0; i < W; i += keys * width) {
        const float *ki[8], *vi[8];
        int64_t at = 0;
        PSA__UNROLL for (int key = 0; key < keys; key++) {
            ki[key] = k[i / width + key];
            vi[key] = v[i / width + key];
        }
        for (; at + W <= d; at += W) PSA__(few_products)(type, width, keys, W, q, ki, vi, at, acc + i);
        if (W > 8 && at < d) PSA__(few_products)(type, width, keys, 8, q, ki, vi, at, acc + i);
    }
    return PSA__(sums)(acc);
}

/* s = logits, padded with -inf to whole vectors */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(few_logits)(psa_type type, int width, const psa__few *x)
{
    enum { W = PSA__W };
    int64_t end = x->n * width;
    for (int64_t key = 0; key < x->n; key += W / width) {
        PSA__(store)(x->s + key * width, PSA__(few_dots)(type, width, x->q, x->k + key, x->v + key, x->d));
    }
    for (int64_t i = 0; x->bias && i < end; i++) x->s[i] += x->bias[i / width];
    for (int64_t i = 0; x->first && i < end; i++) {
        if (x->first[i / width] > i % width) x->s[i] = -INFINITY;
    }
    for (int64_t i = end; i % W != 0; i++) x->s[i] = -INFINITY;
}

/* A query's maximum over the tile is in its lanes of `most`: moves its running maximum up if that is far below. */
static PSA__TARGET void PSA__(few_rescale)(const psa__few *x, PSA__V most)
{
    float lane[PSA__W];
    PSA__(store)(lane, most);
    for (int i = 0; i < x->width; i++) {
        float top = lane[i], shrink;
        for (int j = i + x->width; j < PSA__W; j += x->width) top = lane[j] > top ? lane[j] : top;
        if (!(top > x->m[i] + PSA__RESCALE)) continue;
        shrink = psa__exp2(x->m[i] - top);
        x->m[i] = top;
        x->l[i] *= shrink;
        PSA__(scale)(x->o + i * x->dv, shrink, x->dv);
    }
}

static PSA__TARGET void PSA__(few_softmax)(const psa__few *x)
{
    PSA__V m, most = PSA__(splat)(-INFINITY), sum = PSA__(splat)(0.0f);
    float lane[PSA__W];
    for (int64_t i = 0; i < x->n * x->width; i += PSA__W) most = PSA__(max)(PSA__(load)(x->s + i), most);
    PSA__(few_rescale)(x, most);
    for (int i = 0; i < PSA__W; i++) lane[i] = x->m[i & (x->width - 1)];
    m = PSA__(load)(lane);
    for (int64_t i = 0; i < x->n * x->width; i += PSA__W) {
        PSA__V p = PSA__(exp2)(PSA__(sub)(PSA__(load)(x->s + i), m));
        PSA__(store)(x->s + i, p);
        sum = PSA__(add)(sum, p);
    }
    PSA__(store)(lane, sum);
    for (int i = 0; i < PSA__W; i++) x->l[i & (x->width - 1)] += lane[i];
}

/* cols vectors of each output from element `at` on; the next tile's keys are prefetched */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(few_pv)(psa_type type, int n, int cols, int lanes, const psa__few *x,
                                                  int64_t at)
{
    PSA__V acc[PSA__FEW];
    float *o = x->o + at;
    const float *p = x->s;
    const int64_t size = type == PSA_F32 ? 4 : 2;
    PSA__UNROLL for (int i = 0; i < n * cols; i++) {
        acc[i] = PSA__(load_lanes)(lanes, PSA_F32, o + i / cols * x->dv, i % cols * PSA__W);
    }
    PSA__UNROLL_BY_4 for (int64_t key = 0; key < x->n; key++, p += n) {
        const char *v = (const char *)(const void *)x->v[key] + at * size;
        const char *next = (const char *)(const void *)x->next_k[key] + at * size;
        PSA__V vx[8];
        PSA__UNROLL for (int c = 0; c < cols; c++) {
            vx[c] = PSA__(load_lanes)(lanes, type, v, c * PSA__W);
            if ((at + c * PSA__W) * size % 64 == 0) PSA__PREFETCH(next + c * PSA__W * size);
        }
        PSA__UNROLL for (int i = 0; i < n; i++) {
            const PSA__V pi = PSA__(splat)(p[i]);
            PSA__UNROLL for (int c = 0; c < cols; c++) acc[i * cols + c] = PSA__(fma)(vx[c], pi, acc[i * cols + c]);
        }
    }
    PSA__UNROLL for (int i = 0; i < n * cols; i++) {
        PSA__(store_lanes)(lanes, o + i / cols * x->dv + i % cols * PSA__W, acc[i]);
    }
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(few_outputs)(psa_type type, int n, const psa__few *x)
{
    enum { W = PSA__W };
    const int cols = PSA__FEW / n < 8 ? PSA__FEW / n : 8, fewer = cols > 2 ? cols / 2 : 1;
    int64_t at = 0;
    for (; at + cols * W <= x->dv; at += cols * W) PSA__(few_pv)(type, n, cols, W, x, at);
    for (; fewer > 1 && at + fewer * W <= x->dv; at += fewer * W) PSA__(few_pv)(type, n, fewer, W, x, at);
    for (; cols > 1 && at + W <= x->dv; at += W) PSA__(few_pv)(type, n, 1, W, x, at);
    if (W > 8 && at < x->dv) PSA__(few_pv)(type, n, 1, 8, x, at);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(few_as)(psa_type type, int width, const psa__few *x)
{
    PSA__(few_logits)(type, width, x);
    PSA__(few_softmax)(x);
    if (!x->weights_only) PSA__(few_outputs)(type, width, x);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(few_of)(psa_type type, const psa__few *x)
{
    switch (x->width) {
    case 1: PSA__(few_as)(type, 1, x); break;
#if PSA__W > 1
    case 2: PSA__(few_as)(type, 2, x); break;
    case 4: PSA__(few_as)(type, 4, x); break;
#endif
#if PSA__W > 4
    case 8: PSA__(few_as)(type, 8, x); break;
#endif
#if PSA__W > 8
    case 16: PSA__(few_as)(type, 16, x); break;
#endif
    }
}

static PSA__TARGET void PSA__(few)(const psa__few *x)
{
    switch (x->type) {
    case PSA_F16: PSA__(few_of)(PSA_F16, x); break;
    case PSA_BF16: PSA__(few_of)(PSA_BF16, x); break;
    default: PSA__(few_of)(PSA_F32, x); break;
    }
}

/* acc[i] += the squares of `lanes` elements of row i from `at` on */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(add_squares)(int lanes, const float *const *rows, int64_t at, PSA__V *acc)
{
    PSA__UNROLL for (int i = 0; i < PSA__W; i++) {
        const PSA__V x = PSA__(load_lanes)(lanes, PSA_F32, rows[i], at);
        acc[i] = PSA__(fma)(x, x, acc[i]);
    }
}

static PSA__TARGET void PSA__(squares)(const float *const *rows, int64_t n, int64_t d, float *s)
{
    enum { W = PSA__W };
    for (int64_t i = 0; i < n; i += W) {
        PSA__V acc[W];
        int64_t at = 0;
        PSA__UNROLL for (int r = 0; r < W; r++) acc[r] = PSA__(splat)(0.0f);
        for (; at + W <= d; at += W) PSA__(add_squares)(W, rows + i, at, acc);
        if (W > 8 && at < d) PSA__(add_squares)(8, rows + i, at, acc);
        PSA__(store)(s + i, PSA__(sums)(acc));
    }
}

/* u . point of PSA__W points */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(dots)(const PSA__V *u, const float *point)
{
    PSA__V acc[PSA__W];
    PSA__UNROLL for (int i = 0; i < PSA__W; i++, point += PSA__AXES) {
        acc[i] = PSA__(mul)(PSA__(load)(point), u[0]);
        PSA__UNROLL for (int c = 1; c < PSA__AXES / PSA__W; c++) {
            acc[i] = PSA__(fma)(PSA__(load)(point + c * PSA__W), u[c], acc[i]);
        }
    }
    return PSA__(sums)(acc);
}

static PSA__TARGET void PSA__(along)(const float *u, const float *points, int64_t n, float *s)
{
    PSA__V direction[PSA__AXES / PSA__W];
    PSA__UNROLL for (int c = 0; c < PSA__AXES / PSA__W; c++) direction[c] = PSA__(load)(u + c * PSA__W);
    for (int64_t i = 0; i < n; i += PSA__W) PSA__(store)(s + i, PSA__(dots)(direction, points + i * PSA__AXES));
}

/* to = n points, of those the ones in `which` or, if that is NULL, the first, less the origin; total = their sum */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(less_origin)(const float *points, const int32_t *which, int64_t n,
                                                       const float *origin, float *to, float *total)
{
    enum { VECTORS = PSA__AXES / PSA__W };
    PSA__V zero[VECTORS], sum[4 * VECTORS];
    PSA__UNROLL for (int c = 0; c < VECTORS; c++) zero[c] = PSA__(load)(origin + c * PSA__W);
    PSA__UNROLL for (int x = 0; x < 4 * VECTORS; x++) sum[x] = PSA__(splat)(0.0f);
    for (int64_t i = 0; i < n; i += 4) {
        PSA__UNROLL for (int x = 0; x < 4 * VECTORS; x++) {
            const int64_t row = i + x / VECTORS, c = x % VECTORS * PSA__W;
            if (row < n) {
                const float *point = points + (which ? which[row] : row) * PSA__AXES;
                const PSA__V y = PSA__(sub)(PSA__(load)(point + c), zero[c / PSA__W]);
                PSA__(store)(to + row * PSA__AXES + c, y);
                sum[x] = PSA__(add)(sum[x], y);
            }
        }
    }
    PSA__UNROLL for (int x = VECTORS; x < 4 * VECTORS; x++) {
        sum[x % VECTORS] = PSA__(add)(sum[x % VECTORS], sum[x]);
    }
    PSA__UNROLL for (int c = 0; c < VECTORS; c++) PSA__(store)(total + c * PSA__W, sum[c]);
}

/* matrix = the sum over n rows y of y y^T; PSA__AXES is the rows' length */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(products)(const float *rows, int64_t n, float *matrix)
{
    enum { W = PSA__W, VECTORS = PSA__AXES / W, TILE = W == 16 ? 16 : W == 1 ? 1 : 4 };
    for (int first = 0; first < PSA__AXES; first += TILE) {
        PSA__V sum[TILE * VECTORS];
        PSA__UNROLL for (int x = 0; x < TILE * VECTORS; x++) sum[x] = PSA__(splat)(0.0f);
        for (int64_t i = 0; i < n; i++) {
            const float *y = rows + i * PSA__AXES;
            PSA__UNROLL for (int x = 0; x < TILE * VECTORS; x++) {
                const PSA__V row = PSA__(load)(y + x % VECTORS * W);
                sum[x] = PSA__(fma)(row, PSA__(splat)(y[first + x / VECTORS]), sum[x]);
            }
        }
        PSA__UNROLL for (int x = 0; x < TILE * VECTORS; x++) {
            PSA__(store)(matrix + first * PSA__AXES + x * W, sum[x]);
        }
    }
}

static PSA__TARGET void PSA__(second)(const float *points, const int32_t *which, int64_t n, const float *origin,
                                      float *second)
{
    float rows[PSA__TREE_NODE * PSA__AXES];
    PSA__(less_origin)(points, which, n, origin, rows, second + PSA__AXES * PSA__AXES);
    PSA__(products)(rows, n, second);
}

/* u = (covariance / its trace, which no eigenvalue exceeds)^steps times the last point less the first, of length 1, or
 * 0 if that is not finite */
static PSA__TARGET void PSA__(principal)(const float *second, int64_t n, const float *first, const float *last,
                                         int steps, float *u)
{
    enum { W = PSA__W, VECTORS = PSA__AXES / W, SUMS = VECTORS > 4 ? VECTORS : 4 };
    const float *sum = second + PSA__AXES * PSA__AXES;
    PSA__V row[PSA__AXES * VECTORS], squares = PSA__(splat)(0.0f);
    float less[PSA__AXES], trace[4] = {0, 0, 0, 0}, unit, square;
    PSA__UNROLL for (int c = 0; c < PSA__AXES; c += W) {
        PSA__(store)(less + c, PSA__(mul)(PSA__(load)(sum + c), PSA__(splat)(-1.0f / (float)n)));
        PSA__(store)(u + c, PSA__(sub)(PSA__(load)(last + c), PSA__(load)(first + c)));
    }
    PSA__UNROLL for (int i = 0; i < PSA__AXES; i++) trace[i % 4] += second[i * (PSA__AXES + 1)] + sum[i] * less[i];
    unit = 1.0f / (trace[0] + trace[1] + (trace[2] + trace[3]));
    PSA__UNROLL for (int x = 0; x < PSA__AXES * VECTORS; x++) {
        row[x] = PSA__(fma)(PSA__(load)(sum + x % VECTORS * W), PSA__(splat)(less[x / VECTORS]),
                            PSA__(load)(second + x * W));
    }
    for (int step = 0; step < steps; step++) {
        PSA__V to[SUMS];
        PSA__UNROLL for (int i = 0; i < SUMS; i++) to[i] = PSA__(splat)(0.0f);
        PSA__UNROLL for (int x = 0; x < PSA__AXES * VECTORS; x++) {
            to[x % SUMS] = PSA__(fma)(row[x], PSA__(splat)(u[x / VECTORS]), to[x % SUMS]);
        }
        PSA__UNROLL for (int i = VECTORS; i < SUMS; i++) to[i % VECTORS] = PSA__(add)(to[i % VECTORS], to[i]);
        PSA__UNROLL for (int c = 0; c < VECTORS; c++) PSA__(store)(u + c * W, PSA__(mul)(to[c], PSA__(splat)(unit)));
    }
    PSA__UNROLL for (int c = 0; c < VECTORS; c++) {
        const PSA__V v = PSA__(load)(u + c * W);
        squares = PSA__(fma)(v, v, squares);
    }
    square = PSA__(total)(squares);
    unit = square > 0 ? 1.0f / sqrtf(square) : 0.0f;
    PSA__UNROLL for (int c = 0; c < PSA__AXES; c += W) {
        PSA__(store)(u + c, psa__finite(square) ? PSA__(mul)(PSA__(load)(u + c), PSA__(splat)(unit))
                                                : PSA__(splat)(0.0f));
    }
}

/* rank[i] = how many of a few values are below the i-th */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(rank_few)(const float *s, int64_t n, float *rank)
{
    for (int64_t i = 0; i < n; i += PSA__W) {
        const PSA__V own = PSA__(load)(s + i);
        PSA__V less[4];
        int64_t j = 0;
        PSA__UNROLL for (int x = 0; x < 4; x++) less[x] = PSA__(splat)(0.0f);
        for (; j + 4 <= n; j += 4) {
            PSA__UNROLL for (int x = 0; x < 4; x++) less[x] = PSA__(tally)(less[x], PSA__(splat)(s[j + x]), own);
        }
        for (; j < n; j++) less[0] = PSA__(tally)(less[0], PSA__(splat)(s[j]), own);
        less[0] = PSA__(add)(PSA__(add)(less[0], less[1]), PSA__(add)(less[2], less[3]));
        PSA__(store)(rank + i, less[0]);
    }
}

static PSA__TARGET void PSA__(sort)(const float *second, const float *points, int64_t n, int steps, int32_t *index)
{
    float u[PSA__AXES], place[PSA__AXES], less[PSA__AXES];
    int32_t was[PSA__AXES], rank[PSA__AXES];
    int64_t sum = 0;
    PSA__(principal)(second, n, points, points + (n - 1) * PSA__AXES, steps, u);
    PSA__(along)(u, points, n, place);
    PSA__(rank_few)(place, n, less);
    for (int64_t i = 0; i < n; i++) {
        was[i] = index[i];
        sum += rank[i] = (int32_t)less[i];
    }
    for (int64_t i = 1; sum < n * (n - 1) / 2 && i < n; i++) { /* ties */
        for (int64_t j = 0; j < i; j++) rank[i] += place[j] == place[i];
    }
    for (int64_t i = 0; i < n; i++) index[rank[i]] = was[i];
}

static PSA__TARGET int64_t PSA__(count_below)(const float *s, int64_t n, float x)
{
    const PSA__V limit = PSA__(splat)(x);
    PSA__V sum[4];
    int64_t i = 0, count;
    PSA__UNROLL for (int j = 0; j < 4; j++) sum[j] = PSA__(splat)(0.0f);
    for (; i + 4 * PSA__W <= n; i += 4 * PSA__W) {
        PSA__UNROLL for (int j = 0; j < 4; j++) {
            sum[j] = PSA__(tally)(sum[j], PSA__(load)(s + i + j * PSA__W), limit);
        }
    }
    PSA__UNROLL for (int j = 1; j < 4; j++) sum[0] = PSA__(add)(sum[0], sum[j]);
    count = (int64_t)PSA__(total)(sum[0]);
    for (; i < n; i++) count += s[i] < x;
    return count;
}

#if PSA__W < 16
/* To `to`: first + i for every lane i that is below the limit, or not. There is room for all; returns how many. */
PSA__ALWAYS_INLINE PSA__TARGET int64_t PSA__(pick)(PSA__V x, float limit, int below, int64_t first, int32_t *to)
{
    float lane[PSA__W];
    int64_t n = 0;
    PSA__(store)(lane, x);
    for (int i = 0; i < PSA__W; i++) {
        to[n] = (int32_t)(first + i);
        n += (lane[i] < limit) == below;
    }
    return n;
}
#endif

/* The same for all of s[begin] ... s[end-1] */
PSA__ALWAYS_INLINE PSA__TARGET int64_t PSA__(pick_all)(const float *s, int64_t begin, int64_t end, float limit,
                                                       int below, int32_t *to)
{
    int64_t n = 0;
    for (; begin + PSA__W <= end; begin += PSA__W) {
        n += PSA__(pick)(PSA__(load)(s + begin), limit, below, begin, to + n);
    }
    for (; begin < end; begin++) {
        to[n] = (int32_t)begin;
        n += (s[begin] < limit) == below;
    }
    return n;
}

/* Bisects for a value that k are below. Where ties leave none, s becomes 0 for those that count as below, else 1. */
static PSA__TARGET float PSA__(bisect)(float *s, int64_t n, int64_t k, int32_t *chosen)
{
    float low = s[0], high = s[0], lane[PSA__W];
    PSA__V least = PSA__(splat)(s[0]), most = least;
    int64_t count = 0;
    for (int64_t i = 0; i + PSA__W <= n; i += PSA__W) {
        least = PSA__(min)(PSA__(load)(s + i), least);
        most = PSA__(max)(PSA__(load)(s + i), most);
    }
    PSA__(store)(lane, least);
    for (int j = 0; j < PSA__W; j++) low = lane[j] < low ? lane[j] : low;
    PSA__(store)(lane, most);
    for (int j = 0; j < PSA__W; j++) high = lane[j] > high ? lane[j] : high;
    for (int64_t i = n - n % PSA__W; i < n; i++) {
        low = s[i] < low ? s[i] : low;
        high = s[i] > high ? s[i] : high;
    }
    for (int64_t round = 0, above = n; count != k; round++) { /* count are below low, `above` below high or at it */
        float share = round % 3 == 2 ? 0.5f : ((float)(k - count) + 0.5f) / (float)(above - count + 1);
        float middle = low + share * (high - low);
        int64_t there;
        if (!(middle > low && middle < high)) middle = low + 0.5f * (high - low);
        if (!(middle > low && middle < high)) break;
        there = PSA__(count_below)(s, n, middle);
        if (there > k) {
            high = middle;
            above = there;
        } else {
            low = middle;
            count = there;
        }
    }
    if (count == k) return low;
    for (int64_t i = 0; i < n; i++) chosen[i] = s[i] < low;
    for (float tie = low; count < k; tie = tie < high ? high : INFINITY) {
        for (int64_t i = 0; i < n && count < k; i++) {
            if (!chosen[i] && !(s[i] > tie)) count += chosen[i] = 1; /* NaN too: it ends */
        }
    }
    for (int64_t i = 0; i < n; i++) s[i] = chosen[i] ? 0.0f : 1.0f;
    return 0.5f;
}

static PSA__TARGET void PSA__(part)(float *s, int64_t n, int64_t k, int32_t *move, float *points, int32_t *index)
{
    float rank[PSA__FEW_PLACES + PSA__W];
    float limit = (float)k;
    int64_t wrong;
    int few = n <= PSA__FEW_PLACES;
    if (few) PSA__(rank_few)(s, n, rank);
    few = few && PSA__(count_below)(rank, n, limit) == k; /* not with ties there */
    if (!few) limit = PSA__(bisect)(s, n, k, move);
    wrong = PSA__(pick_all)(few ? rank : s, 0, k, limit, 0, move);
    PSA__(pick_all)(few ? rank : s, k, n, limit, 1, move + wrong);
    for (int64_t i = 0; i < wrong; i++) {
        const int32_t x = move[i], y = move[wrong + i], kept = index[x];
        float *px = points + (int64_t)x * PSA__AXES, *py = points + (int64_t)y * PSA__AXES;
        index[x] = index[y];
        index[y] = kept;
        PSA__UNROLL for (int c = 0; c < PSA__AXES; c += PSA__W) {
            const PSA__V at_x = PSA__(load)(px + c), at_y = PSA__(load)(py + c);
            PSA__(store)(px + c, at_y);
            PSA__(store)(py + c, at_x);
        }
    }
}

/* A logit as scoring takes it: NaN is -BIG, the rest lies within +-BIG. */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(tamed)(PSA__V x)
{
    return PSA__(min)(PSA__(max)(x, PSA__(splat)(-PSA__BIG)), PSA__(splat)(PSA__BIG));
}

/* The same, and -BIG in the lanes below first, which do not see it. */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(seen)(const float *s, int first)
{
    return PSA__(from_lane)(first, PSA__(tamed)(PSA__(load)(s)), PSA__(splat)(-PSA__BIG));
}

static PSA__TARGET void PSA__(block_max)(int nv, const float *s, int64_t n, const int32_t *first, float *bm, float *bs)
{
    for (int j = 0; j < nv; j++) {
        PSA__V top = PSA__(splat)(-PSA__BIG), sum = PSA__(splat)(0.0f);
        for (int64_t key = 0; key < n; key++) {
            const float *at = s + (key * nv + j) * PSA__W;
            top = PSA__(max)(PSA__(seen)(at, first ? first[key] - j * PSA__W : 0), top);
        }
        PSA__(store)(bm + j * PSA__W, top);
        for (int64_t key = 0; bs && key < n; key++) {
            const float *at = s + (key * nv + j) * PSA__W;
            PSA__V x = PSA__(seen)(at, first ? first[key] - j * PSA__W : 0);
            sum = PSA__(add)(sum, PSA__(exp2)(PSA__(sub)(x, top)));
        }
        if (bs) PSA__(store)(bs + j * PSA__W, sum);
    }
}

/* For W blocks from j on: the maximum or sum of their masses, over the vectors of up to `span` lanes from `first` on.
 * Lane x of the result's vector i belongs to block x and to the lanes first + i, first + i + W, ... */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(mass)(int64_t lanes, int64_t first, int64_t span, int64_t j, int64_t n,
                                                const float *bm, const float *bs, int use_max, const float *z,
                                                PSA__V *total)
{
    for (int x = 0; x < PSA__W; x++) {
        int64_t row = psa__min(j + x, n - 1) * lanes;
        PSA__V sum = PSA__(splat)(0.0f);
        for (int64_t i = first; i < psa__min(first + span, lanes); i += PSA__W) {
            PSA__V e = PSA__(mul)(PSA__(load)(bm + row + i), PSA__(load)(z + i));
            if (!use_max) e = PSA__(mul)(e, PSA__(load)(bs + row + i));
            sum = use_max ? PSA__(max)(e, sum) : PSA__(add)(e, sum);
        }
        total[x] = sum;
    }
    PSA__(transpose)(total);
}

static PSA__TARGET void PSA__(row_mass)(int64_t lanes, int64_t n_lanes, int64_t each, int64_t n, float *bm,
                                        const float *bs, int use_max, int norm, float *z, float *score, int64_t n_row)
{
    int64_t span = psa__max(each, PSA__W), side = psa__min(each, PSA__W); /* lanes, vectors of a row */
    for (int64_t i = 0; i < lanes; i += PSA__W) {
        PSA__V top = PSA__(splat)(-PSA__BIG), sum = PSA__(splat)(0.0f);
        float m[PSA__W];
        for (int64_t j = 0; j < n; j++) top = PSA__(max)(PSA__(load)(bm + j * lanes + i), top);
        for (int64_t j = 0; j < n; j++) {
            const PSA__V e = PSA__(exp2)(PSA__(sub)(PSA__(load)(bm + j * lanes + i), top));
            PSA__(store)(bm + j * lanes + i, e);
            if (norm) sum = PSA__(fma)(e, PSA__(load)(bs + j * lanes + i), sum);
        }
        PSA__(store)(m, top);
        PSA__(store)(z + i, sum);
        for (int64_t x = i; x < i + PSA__W; x++) {
            z[x] = x >= n_lanes || m[x - i] <= -PSA__BIG ? 0.0f : norm ? 1.0f / z[x] : 1.0f;
        }
    }
    for (int64_t j = 0; j < n; j += PSA__W) {
        for (int64_t first = 0; first < lanes; first += span) {
            PSA__V total[PSA__W];
            float block[PSA__W];
            PSA__(mass)(lanes, first, span, j, n, bm, bs, use_max, z, total);
            for (int64_t v = 0; v < PSA__W && first + v < n_lanes; v += side) {
                float *row = score + (first + v) / each * n_row + j;
                for (int64_t i = v + 1; i < v + side; i++) {
                    total[v] = use_max ? PSA__(max)(total[i], total[v]) : PSA__(add)(total[i], total[v]);
                }
                PSA__(store)(block, total[v]);
                for (int64_t x = 0; x < psa__min(PSA__W, n - j); x++) row[x] = block[x];
            }
        }
    }
}

/* The errors of the levels after that of the groups, whose logits are s: what a level leaves out, and what it gives to
 * the wrong group; then that of skipping. */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(coarse_errors)(int nv, const float *s, const psa__errors *e,
                                                         PSA__V (*mass)[PSA__NV], const PSA__V *top, const PSA__V *all,
                                                         const PSA__V *inside, float *x)
{
    for (int i = 0; i < e->coarse; i++, x += e->plane) {
        const float *share = e->share + i * e->groups, *shift = e->shift + i * e->groups;
        PSA__V off[PSA__NV], missed[PSA__NV];
        PSA__UNROLL for (int j = 0; j < nv; j++) {
            off[j] = PSA__(splat)(0.0f);
            missed[j] = all[j];
        }
        for (int begin = 0, end; begin < e->rows; begin = end, shift++) {
            PSA__V logit[PSA__NV], less[PSA__NV];
            end = begin + (2 << i) < e->rows ? begin + (2 << i) : e->rows;
            PSA__UNROLL for (int j = 0; j < nv; j++) logit[j] = PSA__(splat)(*shift);
            for (int g = begin; g < end; g++) {
                const PSA__V own = PSA__(splat)(share[g]);
                PSA__UNROLL for (int j = 0; j < nv; j++) {
                    logit[j] = PSA__(fma)(PSA__(load)(s + (g * nv + j) * PSA__W), own, logit[j]);
                }
            }
            PSA__UNROLL for (int j = 0; j < nv; j++) {
                less[j] = PSA__(sub)(PSA__(splat)(0.0f), PSA__(exp2)(PSA__(sub)(PSA__(tamed)(logit[j]), top[j])));
                missed[j] = PSA__(add)(missed[j], less[j]);
            }
            for (int g = begin; g < end; g++) {
                const PSA__V own = PSA__(splat)(share[g]);
                PSA__UNROLL for (int j = 0; j < nv; j++) {
                    const PSA__V apart = PSA__(fma)(less[j], own, mass[g][j]);
                    off[j] = PSA__(fma)(apart, apart, off[j]);
                }
            }
        }
        PSA__UNROLL for (int j = 0; j < nv; j++) {
            const PSA__V mixed = PSA__(fma)(off[j], PSA__(splat)(e->value[e->fine + i]), inside[j]);
            PSA__(store)(x + j * PSA__W, PSA__(fma)(missed[j], missed[j], mixed));
        }
    }
    PSA__UNROLL for (int j = 0; j < nv; j++) PSA__(store)(x + j * PSA__W, PSA__(mul)(all[j], all[j]));
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(error_tile)(int nv, const float *s, const psa__errors *e, float *bm,
                                                      float *bs, float *x)
{
    PSA__V mass[PSA_MAX_BLOCK_K / 2][PSA__NV], top[PSA__NV], all[PSA__NV], inside[PSA__NV];
    PSA__UNROLL for (int j = 0; j < nv; j++) {
        top[j] = PSA__(splat)(-PSA__BIG);
        inside[j] = all[j] = PSA__(splat)(0.0f);
    }
    for (int g = 0; g < e->rows; g++) {
        PSA__UNROLL for (int j = 0; j < nv; j++) {
            mass[g][j] = PSA__(tamed)(PSA__(load)(s + (g * nv + j) * PSA__W));
            top[j] = PSA__(max)(mass[g][j], top[j]);
        }
    }
    for (int g = 0; g < e->rows; g++) {
        PSA__UNROLL for (int j = 0; j < nv; j++) {
            mass[g][j] = PSA__(exp2)(PSA__(sub)(mass[g][j], top[j]));
            all[j] = PSA__(add)(all[j], mass[g][j]);
        }
    }
    PSA__UNROLL for (int j = 0; j < nv; j++) {
        PSA__(store)(bm + j * PSA__W, top[j]);
        PSA__(store)(bs + j * PSA__W, all[j]);
    }
    for (int i = 0; i < e->fine; i++, x += e->plane) { /* mass that a group misses, and values that it mixes up */
        PSA__V missed[PSA__NV];
        PSA__UNROLL for (int j = 0; j < nv; j++) missed[j] = inside[j] = PSA__(splat)(0.0f);
        for (int g = 0; g < e->rows; g++) {
            const PSA__V miss = PSA__(splat)(e->mass[g * e->fine + i]), mix = PSA__(splat)(e->noise[g * e->fine + i]);
            PSA__UNROLL for (int j = 0; j < nv; j++) {
                missed[j] = PSA__(fma)(mass[g][j], miss, missed[j]);
                inside[j] = PSA__(fma)(PSA__(mul)(mass[g][j], mass[g][j]), mix, inside[j]);
            }
        }
        PSA__UNROLL for (int j = 0; j < nv; j++) {
            inside[j] = PSA__(mul)(inside[j], PSA__(splat)(e->value[i]));
            PSA__(store)(x + j * PSA__W, PSA__(fma)(missed[j], missed[j], inside[j]));
        }
    }
    PSA__(coarse_errors)(nv, s, e, mass, top, all, inside, x);
}

static PSA__TARGET void PSA__(block_error)(int nv, const float *s, const psa__errors *e, float *bm, float *bs, float *x)
{
    switch (nv) {
    case 1: PSA__(error_tile)(1, s, e, bm, bs, x); break;
    case 2: PSA__(error_tile)(2, s, e, bm, bs, x); break;
    case 3: PSA__(error_tile)(3, s, e, bm, bs, x); break;
    default: PSA__(error_tile)(PSA__NV, s, e, bm, bs, x); break;
    }
}

static PSA__TARGET void PSA__(row_error)(int64_t lanes, int64_t stride, int64_t n, int n_x, const float *bm,
                                         const float *x, int64_t plane, const float *z, float *error, int64_t n_row)
{
    float factor[PSA__W * PSA_MAX_BLOCK_Q];
    for (int64_t j = 0; j < n; j += PSA__W) {
        for (int y = 0; y < PSA__W; y++) {
            const float *own = bm + psa__min(j + y, n - 1) * stride;
            for (int64_t i = 0; i < lanes; i += PSA__W) {
                const PSA__V e = PSA__(mul)(PSA__(load)(own + i), PSA__(load)(z + i));
                PSA__(store)(factor + y * lanes + i, PSA__(mul)(e, e));
            }
        }
        for (int at = 0; at < n_x; at++) {
            PSA__V total[PSA__W];
            for (int y = 0; y < PSA__W; y++) {
                const float *row = x + at * plane + psa__min(j + y, n - 1) * stride;
                total[y] = PSA__(splat)(0.0f);
                for (int64_t i = 0; i < lanes; i += PSA__W) {
                    total[y] = PSA__(fma)(PSA__(load)(factor + y * lanes + i), PSA__(load)(row + i), total[y]);
                }
            }
            PSA__(store)(error + at * n_row + j, PSA__(sums)(total));
        }
    }
}

/* The slope between levels i and i + 1: the largest of those that rise least from a level up to i to one after. */
static PSA__TARGET void PSA__(hull)(float *error, int64_t n_row, int64_t n, int last,
                                    float per_cost[PSA_MAX_LEVELS][PSA_MAX_LEVELS + 1])
{
    for (int64_t j = 0; j < n; j += PSA__W, error += PSA__W) {
        PSA__V at[PSA_MAX_LEVELS + 1], slope[PSA_MAX_LEVELS];
        at[0] = PSA__(splat)(0.0f);
        for (int i = 0; i < last; i++) {
            at[i + 1] = PSA__(load)(error + i * n_row);
            slope[i] = at[0];
        }
        for (int from = 0; from < last; from++) {
            PSA__V least = PSA__(splat)(INFINITY);
            for (int to = last; to > from; to--) {
                PSA__V x = PSA__(mul)(PSA__(sub)(at[to], at[from]), PSA__(splat)(per_cost[from][to]));
                least = PSA__(min)(x, least);
                slope[to - 1] = PSA__(max)(least, slope[to - 1]);
            }
        }
        for (int i = 0; i < last; i++) PSA__(store)(error + i * n_row, slope[i]);
    }
}

#if PSA__PASS == 3 && defined(PSA__AMX)

/* Matrix tiles (AMX): 16 rows of 64 bytes. C[16][16] += A[16][32] B[32][16], where A and B are bf16, B in pairs as
 * [16][16][2], and C is f32: S^T = K Q^T and O^T = V^T P^T, so lanes are queries as everywhere. A number is the sum of
 * its parts in bf16: one if it is of that type, two if of f16, three if of f32; weights have two, which are them within
 * 2^-17. Tiles lie as [rows / 16][parts][columns / 32] in A and as [columns / 32][parts] in B. */

/* The part'th part of x, in the upper halves: what the parts before leave of it, cut off or rounded */
PSA__ALWAYS_INLINE PSA__TARGET __m512i PSA__(part_of)(int part, int rounded, PSA__V x)
{
    const __m512i high = _mm512_set1_epi32(-0x10000), half = _mm512_set1_epi32(rounded ? 0x8000 : 0);
    for (int i = 0; i < part; i++) {
        __m512i above = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), high);
        x = PSA__(sub)(x, _mm512_castsi512_ps(above));
    }
    return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), high);
}

/* Two such parts side by side, the first in the lower halves */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(pair)(__m512i first, __m512i second)
{
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(first, 16), second));
}

/* Elements i, i + 1, ... of a row of n, and zeros */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(load_up_to)(psa_type type, const void *row, int64_t i, int64_t n)
{
    if (i >= n) return PSA__(splat)(0.0f);
    return PSA__(load_lanes)(i + 16 <= n ? 16 : 8, type, row, i);
}

/* 32 elements of bf16 from the i-th on, and zeros, as they are */
PSA__ALWAYS_INLINE PSA__TARGET __m512i PSA__(load_bf16)(const void *row, int64_t i, int64_t n)
{
    const uint16_t *from = (const uint16_t *)row + i;
    if (i + 32 <= n) return _mm512_loadu_si512(from);
    return i < n ? _mm512_maskz_loadu_epi32((__mmask16)((1u << (n - i) / 2) - 1), from) : _mm512_setzero_si512();
}

/* The part'th parts of 32 elements of a row from the i-th on */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(row_of)(psa_type type, int part, const void *row, int64_t i, int64_t n)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    PSA__V a, b, first, second;
    if (type == PSA_BF16) return _mm512_castsi512_ps(PSA__(load_bf16)(row, i, n));
    a = PSA__(load_up_to)(type, row, i, n);
    b = PSA__(load_up_to)(type, row, i + 16, n);
    first = _mm512_permutex2var_ps(a, even, b);
    second = _mm512_permutex2var_ps(a, odd, b);
    return PSA__(pair)(PSA__(part_of)(part, 0, first), PSA__(part_of)(part, 0, second));
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(tile_queries_of)(psa_type type, int parts, float *qt,
                                                           const float *const *rows, int64_t d)
{
    for (int64_t x = 0; x < d; x += 32) {
        for (int part = 0; part < parts; part++, qt += 256) {
            PSA__V r[16];
            PSA__UNROLL for (int i = 0; i < 16; i++) r[i] = PSA__(row_of)(type, part, rows[i], x, d);
            PSA__(transpose)(r);
            PSA__UNROLL for (int i = 0; i < 16; i++) PSA__(store)(qt + i * 16, r[i]);
        }
    }
}

static PSA__TARGET void PSA__(tile_queries)(psa_type type, int parts, float *qt, const float *const *rows, int64_t d)
{
    switch (type) {
    case PSA_BF16: PSA__(tile_queries_of)(PSA_BF16, parts, qt, rows, d); break;
    case PSA_F16: PSA__(tile_queries_of)(PSA_F16, parts, qt, rows, d); break;
    default: PSA__(tile_queries_of)(PSA_F32, parts, qt, rows, d); break;
    }
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(tile_keys_of)(psa_type type, int parts, float *kt, const float *const *k,
                                                        int64_t n, int64_t d, const psa__ahead *ahead)
{
    const int64_t steps = psa__up_to_32(d) / 32;
    for (int64_t i = 0; i < n; i++) {
        float *to = kt + i / 16 * parts * steps * 256 + i % 16 * 16;
        if (ahead) PSA__(prefetch)(ahead, i, i + 1);
        for (int part = 0; part < parts; part++) {
            for (int64_t x = 0; x < d; x += 32, to += 256) PSA__(store)(to, PSA__(row_of)(type, part, k[i], x, d));
        }
    }
}

static PSA__TARGET void PSA__(tile_keys)(psa_type type, float *kt, const float *const *k, int64_t n, int64_t d,
                                         const psa__ahead *ahead)
{
    if (type == PSA_BF16) PSA__(tile_keys_of)(PSA_BF16, 1, kt, k, n, d, ahead);
    else PSA__(tile_keys_of)(PSA_F16, 2, kt, k, n, d, ahead);
}

/* 16 columns of 32 keys: of 32 columns of bf16 those at even places, or at odd ones. */
PSA__ALWAYS_INLINE PSA__TARGET void PSA__(columns_of)(psa_type type, int part, int odd, const float *const *v,
                                                      int64_t x, int64_t dv, PSA__V *r)
{
    const __m512i high = _mm512_set1_epi32(-0x10000);
    PSA__UNROLL for (int i = 0; i < 16; i++) {
        __m512i a, b;
        if (type == PSA_BF16) {
            a = PSA__(load_bf16)(v[2 * i], x, dv);
            b = PSA__(load_bf16)(v[2 * i + 1], x, dv);
            a = odd ? a : _mm512_slli_epi32(a, 16);
            b = odd ? _mm512_and_si512(b, high) : _mm512_slli_epi32(b, 16);
        } else {
            a = PSA__(part_of)(part, 0, PSA__(load_up_to)(type, v[2 * i], x, dv));
            b = PSA__(part_of)(part, 0, PSA__(load_up_to)(type, v[2 * i + 1], x, dv));
        }
        r[i] = PSA__(pair)(a, b);
    }
    PSA__(transpose)(r);
}

PSA__ALWAYS_INLINE PSA__TARGET void PSA__(tile_values_of)(psa_type type, int parts, float *vt, const float *const *v,
                                                          int64_t n, int64_t dv, const psa__ahead *ahead)
{
    const int64_t steps = psa__up_to_32(n) / 32, next = parts * steps * 256;
    if (ahead) PSA__(prefetch)(ahead, 0, ahead->n);
    for (int64_t x = 0; x < dv; x += 32, vt += 2 * next) {
        for (int64_t tile = 0; tile < parts * steps; tile++) {
            const float *const *rows = v + tile % steps * 32;
            PSA__UNROLL for (int half = 0; half < 2; half++) {
                const int is_bf16 = type == PSA_BF16;
                PSA__V r[16];
                PSA__(columns_of)(type, (int)(tile / steps), half, rows, is_bf16 ? x : x + 16 * half, dv, r);
                PSA__UNROLL for (int i = 0; i < 16; i++) {
                    const int column = is_bf16 ? 2 * i + half : 16 * half + i;
                    PSA__(store)(vt + column / 16 * next + tile * 256 + column % 16 * 16, r[i]);
                }
            }
        }
    }
}

static PSA__TARGET void PSA__(tile_values)(psa_type type, float *vt, const float *const *v, int64_t n, int64_t dv,
                                           const psa__ahead *ahead)
{
    if (type == PSA_BF16) PSA__(tile_values_of)(PSA_BF16, 1, vt, v, n, dv, ahead);
    else PSA__(tile_values_of)(PSA_F16, 2, vt, v, n, dv, ahead);
}

/* Six tiles of B, those of some steps, stay in registers. The product of parts i and j counts if i + j < 3. */
PSA__ALWAYS_INLINE PSA__TARGET_AMX void PSA__(tile_products_of)(int b_parts, const float *a, int a_parts,
                                                                const float *b, int64_t steps, int add, float *c,
                                                                int64_t n)
{
    const int64_t size = a_parts * steps * 256, held = 6 / b_parts;
    PSA__AMX_FENCE();
    for (int64_t first = 0; first < steps; first += held, a += held * 256, b += 1536) {
        const int64_t count = psa__min(steps - first, held);
#define PSA__LOAD(i, tile)                                                                                             \
    if (count * b_parts > i) _tile_loadd(tile, b + i * 256, 64);
        PSA__LOAD(0, 2)
        PSA__LOAD(1, 3)
        PSA__LOAD(2, 4)
        PSA__LOAD(3, 5)
        PSA__LOAD(4, 6)
        PSA__LOAD(5, 7)
#undef PSA__LOAD
        for (int64_t m = 0; m < n; m++) {
            if (add || first) _tile_loadd(0, c + m * 256, 64);
            else _tile_zero(0);
#define PSA__STEP(i, tile_0, tile_1, tile_2)                                                                           \
    for (int part = 0; count > i && part < a_parts; part++) {                                                          \
        _tile_loadd(1, a + m * size + (part * steps + i) * 256, 64);                                                   \
        _tile_dpbf16ps(0, 1, tile_0);                                                                                  \
        if (b_parts > 1 && part + 1 < 3) _tile_dpbf16ps(0, 1, tile_1);                                              \
        if (b_parts > 2 && part + 2 < 3) _tile_dpbf16ps(0, 1, tile_2);                                              \
    }
            if (b_parts == 1) {
                PSA__STEP(0, 2, 2, 2)
                PSA__STEP(1, 3, 3, 3)
                PSA__STEP(2, 4, 4, 4)
                PSA__STEP(3, 5, 5, 5)
                PSA__STEP(4, 6, 6, 6)
                PSA__STEP(5, 7, 7, 7)
            } else if (b_parts == 2) {
                PSA__STEP(0, 2, 3, 3)
                PSA__STEP(1, 4, 5, 5)
                PSA__STEP(2, 6, 7, 7)
            } else {
                PSA__STEP(0, 2, 3, 4)
                PSA__STEP(1, 5, 6, 7)
            }
#undef PSA__STEP
            _tile_stored(0, c + m * 256, 64);
        }
    }
    PSA__AMX_FENCE();
}

static PSA__TARGET_AMX void PSA__(tile_products)(const float *a, int a_parts, const float *b, int b_parts,
                                                 int64_t steps, int add, float *c, int64_t n)
{
    switch (b_parts) {
    case 1: PSA__(tile_products_of)(1, a, a_parts, b, steps, add, c, n); break;
    case 2: PSA__(tile_products_of)(2, a, a_parts, b, steps, add, c, n); break;
    default: PSA__(tile_products_of)(3, a, a_parts, b, steps, add, c, n); break;
    }
}

/* s = scale * s + bias of a key; returns the larger of it and `most`. */
PSA__ALWAYS_INLINE PSA__TARGET PSA__V PSA__(tile_logit)(float *s, PSA__V scale, const float *bias, PSA__V most)
{
    const PSA__V x = PSA__(fma)(PSA__(load)(s), scale, PSA__(splat)(bias ? *bias : 0.0f));
    PSA__(store)(s, x);
    return PSA__(max)(x, most);
}

static PSA__TARGET void PSA__(tile_logits)(float *s, int64_t n, float scale, const float *bias, float *top)
{
    const PSA__V by = PSA__(splat)(scale);
    PSA__V a = PSA__(splat)(-INFINITY), b = a;
    int64_t key = 0;
    for (; key + 2 <= n; key += 2) {
        a = PSA__(tile_logit)(s + key * 16, by, bias ? bias + key : NULL, a);
        b = PSA__(tile_logit)(s + key * 16 + 16, by, bias ? bias + key + 1 : NULL, b);
    }
    if (key < n) a = PSA__(tile_logit)(s + key * 16, by, bias ? bias + key : NULL, a);
    PSA__(store)(top, PSA__(max)(a, b));
}

static PSA__TARGET void PSA__(tile_weights)(float *s, int64_t n, int64_t keys, const float *top, float *m, float *l,
                                            float *ot, int64_t dv, float *weight)
{
    PSA__V mj, sum;
    PSA__(rescale)(1, top, m, l, ot, dv);
    mj = PSA__(load)(m);
    sum = PSA__(load)(l);
    for (int64_t key = n; key < keys; key++) PSA__(store)(s + key * 16, PSA__(splat)(-INFINITY));
    for (int64_t key = 0; key < keys; weight += 256) {
        for (int64_t end = key + 32; key < end; key += 2, weight += 16) {
            const PSA__V a = PSA__(exp2)(PSA__(sub)(PSA__(load)(s + key * 16), mj));
            const PSA__V b = PSA__(exp2)(PSA__(sub)(PSA__(load)(s + key * 16 + 16), mj));
            PSA__(store)(weight, PSA__(pair)(PSA__(part_of)(0, 1, a), PSA__(part_of)(0, 1, b)));
            PSA__(store)(weight + 256, PSA__(pair)(PSA__(part_of)(1, 1, a), PSA__(part_of)(1, 1, b)));
            sum = PSA__(add)(sum, PSA__(add)(a, b));
        }
    }
    PSA__(store)(l, sum);
}

static PSA__TARGET_AMX unsigned PSA__(enter_tiles)(void)
{
    /* palette 1; of each of 8 tiles the bytes in a row, and the rows */
    static const struct {
        uint8_t palette[16];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {{1}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&tiles);
    return PSA__(enter)();
}

static PSA__TARGET_AMX void PSA__(leave_tiles)(unsigned mode)
{
    PSA__(leave)(mode);
    _tile_release();
}
#endif

#if PSA__PASS == 4 && defined(PSA__BFMMLA)

/* bf16 by bfmmla: c[2][2] += a[2][4] b[2][4]^T in vectors. K and V are a, read as they lie: two keys, or columns of V
 * under two numbers; b are two lanes. Lanes lie as [elements or keys / 4][parts][lanes / 2][2][4]. Parts are those of
 * matrix tiles, above: cut off in queries, two rounded ones in weights. */

PSA__ALWAYS_INLINE PSA__TARGET_BF16 float32x4_t PSA__(mmla)(float32x4_t c, uint16x8_t a, uint16x8_t b)
{
    return vbfmmlaq_f32(c, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
}

/* The lower, or upper, halves of both */
PSA__ALWAYS_INLINE uint16x8_t PSA__(halves)(int upper, uint16x8_t a, uint16x8_t b)
{
    const uint64x2_t x = vreinterpretq_u64_u16(a), y = vreinterpretq_u64_u16(b);
    return vreinterpretq_u16_u64(upper ? vtrn2q_u64(x, y) : vtrn1q_u64(x, y));
}

PSA__ALWAYS_INLINE float32x4_t PSA__(halves_f32)(int upper, float32x4_t a, float32x4_t b)
{
    return vreinterpretq_f32_u16(PSA__(halves)(upper, vreinterpretq_u16_f32(a), vreinterpretq_u16_f32(b)));
}

PSA__ALWAYS_INLINE uint16x8_t PSA__(load_bf16)(const void *row, int64_t i)
{
    return vreinterpretq_u16_u8(vld1q_u8((const uint8_t *)row + 2 * i));
}

/* Two lanes, in so many parts, each after `stride` numbers */
PSA__ALWAYS_INLINE void PSA__(store_parts)(uint16_t *to, int64_t stride, int parts, int rounded, float32x4_t a,
                                           float32x4_t b)
{
    const uint32x4_t half = vdupq_n_u32(rounded ? 0x8000 : 0), high = vdupq_n_u32(0xffff0000u);
    for (int part = 0; part < parts; part++, to += stride) {
        uint32x4_t x = vandq_u32(vaddq_u32(vreinterpretq_u32_f32(a), half), high);
        uint32x4_t y = vandq_u32(vaddq_u32(vreinterpretq_u32_f32(b), half), high);
        vst1q_u16(to, vcombine_u16(vshrn_n_u32(x, 16), vshrn_n_u32(y, 16)));
        a = vsubq_f32(a, vreinterpretq_f32_u32(x));
        b = vsubq_f32(b, vreinterpretq_f32_u32(y));
    }
}

static void PSA__(pack_bf16)(int nv, float *qt, const float *const *rows, int parts, int64_t d)
{
    uint16_t *to = (uint16_t *)(void *)qt;
    for (int64_t x = 0; x < d; x += 4, to += parts * nv * 16) {
        for (int i = 0; i < 2 * nv; i++) {
            const float *const *row = rows + 2 * i;
            PSA__(store_parts)(to + i * 8, nv * 16, parts, 0, vld1q_f32(row[0] + x), vld1q_f32(row[1] + x));
        }
    }
}

PSA__ALWAYS_INLINE PSA__TARGET_BF16 void PSA__(qk_bf16_tile)(int nv, const float *PSA__RESTRICT qt, int parts,
                                                             float scale, const float *const *k, int64_t n, int64_t d,
                                                             const float *bias, float *PSA__RESTRICT s,
                                                             float *PSA__RESTRICT top, const psa__ahead *ahead)
{
    const float32x4_t by = vdupq_n_f32(scale);
    float32x4_t most[PSA__NV];
    PSA__UNROLL for (int j = 0; j < nv; j++) most[j] = vdupq_n_f32(-INFINITY);
    for (int64_t key = 0; key < n; key += 4) {
        const uint16_t *q = (const uint16_t *)(const void *)qt;
        float32x4_t acc[2][2 * PSA__NV];
        if (ahead) PSA__(prefetch)(ahead, key * ahead->n / n, (key + 4) * ahead->n / n);
        PSA__UNROLL for (int i = 0; i < 4 * nv; i++) acc[i % 2][i / 2] = vdupq_n_f32(0.0f);
        for (int64_t x = 0; x < d; x += 8) {
            uint16x8_t kx[4];
            PSA__UNROLL for (int i = 0; i < 4; i++) kx[i] = PSA__(load_bf16)(k[key + i], x);
            PSA__UNROLL for (int half = 0; half < 2; half++) {
                const uint16x8_t a = PSA__(halves)(half, kx[0], kx[1]), b = PSA__(halves)(half, kx[2], kx[3]);
                for (int part = 0; part < parts; part++) {
                    PSA__UNROLL for (int i = 0; i < 2 * nv; i++, q += 8) {
                        const uint16x8_t qx = vld1q_u16(q);
                        acc[0][i] = PSA__(mmla)(acc[0][i], a, qx);
                        acc[1][i] = PSA__(mmla)(acc[1][i], b, qx);
                    }
                }
            }
        }
        PSA__UNROLL for (int i = 0; i < 4; i++) {
            const float32x4_t to = vdupq_n_f32(bias ? bias[key + i] : 0.0f);
            PSA__UNROLL for (int j = 0; j < nv; j++) {
                const float32x4_t dots = PSA__(halves_f32)(i % 2, acc[i / 2][2 * j], acc[i / 2][2 * j + 1]);
                const float32x4_t logit = vfmaq_f32(to, dots, by);
                vst1q_f32(s + ((key + i) * nv + j) * 4, logit);
                most[j] = PSA__(max)(logit, most[j]);
            }
        }
    }
    PSA__UNROLL for (int j = 0; j < nv; j++) vst1q_f32(top + j * 4, most[j]);
}

static PSA__TARGET_BF16 void PSA__(qk_bf16)(int nv, const float *qt, int parts, float scale, const float *const *k,
                                            int64_t n, int64_t d, const float *bias, float *s, float *top,
                                            const psa__ahead *ahead)
{
    switch (nv) {
    case 1: PSA__(qk_bf16_tile)(1, qt, parts, scale, k, n, d, bias, s, top, ahead); break;
    case 2: PSA__(qk_bf16_tile)(2, qt, parts, scale, k, n, d, bias, s, top, ahead); break;
    case 3: PSA__(qk_bf16_tile)(3, qt, parts, scale, k, n, d, bias, s, top, ahead); break;
    default: PSA__(qk_bf16_tile)(4, qt, parts, scale, k, n, d, bias, s, top, ahead); break;
    }
}

/* 4 columns of a row, and zeros */
PSA__ALWAYS_INLINE uint16x8_t PSA__(load_columns)(const void *row, int64_t x)
{
    return vreinterpretq_u16_u8(vcombine_u8(vld1_u8((const uint8_t *)row + 2 * x), vdup_n_u8(0)));
}

/* 4 columns of the output. p: the weights. */
PSA__ALWAYS_INLINE PSA__TARGET_BF16 void PSA__(pv_bf16_tile)(int nv, const uint16_t *p, const void *const *v, int64_t n,
                                                             int64_t x, float *ot)
{
    float32x4_t acc[2][2 * PSA__NV];
    PSA__UNROLL for (int i = 0; i < 2; i++) {
        PSA__UNROLL for (int j = 0; j < 2 * nv; j++) {
            const float *o = ot + (2 * i * nv + j / 2) * 4;
            acc[i][j] = PSA__(halves_f32)(j % 2, vld1q_f32(o), vld1q_f32(o + nv * 4));
        }
    }
    for (int64_t key = 0; key < n; key += 4) {
        const uint16x8_t first = vzip1q_u16(PSA__(load_columns)(v[key], x), PSA__(load_columns)(v[key + 1], x));
        const uint16x8_t second = vzip1q_u16(PSA__(load_columns)(v[key + 2], x), PSA__(load_columns)(v[key + 3], x));
        const uint32x4_t ab = vreinterpretq_u32_u16(first), cd = vreinterpretq_u32_u16(second);
        const uint16x8_t a[2] = {vreinterpretq_u16_u32(vzip1q_u32(ab, cd)), vreinterpretq_u16_u32(vzip2q_u32(ab, cd))};
        for (int part = 0; part < 2; part++) {
            PSA__UNROLL for (int i = 0; i < 2 * nv; i++, p += 8) {
                const uint16x8_t pi = vld1q_u16(p);
                acc[0][i] = PSA__(mmla)(acc[0][i], a[0], pi);
                acc[1][i] = PSA__(mmla)(acc[1][i], a[1], pi);
            }
        }
    }
    PSA__UNROLL for (int i = 0; i < 4; i++) {
        PSA__UNROLL for (int j = 0; j < nv; j++) {
            vst1q_f32(ot + (i * nv + j) * 4, PSA__(halves_f32)(i % 2, acc[i / 2][2 * j], acc[i / 2][2 * j + 1]));
        }
    }
}

static PSA__TARGET_BF16 void PSA__(pv_bf16)(int nv, const float *s, const float *const *v, int64_t n, int64_t dv,
                                            float *ot, const psa__ahead *ahead)
{
    static const uint16_t none[PSA_MAX_D] = {0};
    uint16_t weight[PSA__TILE_K * 4 * PSA__NV * 2], *to = weight;
    const void *row[PSA__TILE_K + 3];
    float last[4 * 4 * PSA__NV] = {0}; /* weights of the last keys, up to 3, and zeros */
    const int width = nv * 4;
    memcpy(last, s + n / 4 * 4 * width, (size_t)(n % 4 * width) * sizeof *s);
    memcpy(row, v, (size_t)n * sizeof *row);
    for (int i = 0; i < 3; i++) row[n + i] = none;
    for (int64_t key = 0; key < n; key += 4, to += width * 8) {
        const float *from = key + 4 <= n ? s + key * width : last;
        for (int j = 0; j < nv; j++) {
            float32x4_t r[4];
            PSA__UNROLL for (int i = 0; i < 4; i++) r[i] = vld1q_f32(from + i * width + j * 4);
            PSA__(transpose)(r);
            PSA__(store_parts)(to + j * 16, nv * 16, 2, 1, r[0], r[1]);
            PSA__(store_parts)(to + j * 16 + 8, nv * 16, 2, 1, r[2], r[3]);
        }
    }
    for (int64_t x = 0; x < dv; x += 4, ot += nv * 16) {
        if (ahead) PSA__(prefetch)(ahead, x * ahead->n / dv, (x + 4) * ahead->n / dv);
        switch (nv) {
        case 1: PSA__(pv_bf16_tile)(1, weight, row, n, x, ot); break;
        case 2: PSA__(pv_bf16_tile)(2, weight, row, n, x, ot); break;
        case 3: PSA__(pv_bf16_tile)(3, weight, row, n, x, ot); break;
        default: PSA__(pv_bf16_tile)(4, weight, row, n, x, ot); break;
        }
    }
}
#endif

#define PSA__SHARED                                                                                                    \
    PSA__(to_f32), PSA__(from_f32), PSA__(sum), PSA__(scale), PSA__(mean), PSA__(dot), PSA__(blend), PSA__(spread),    \
        PSA__(moments), PSA__(squares), PSA__(second), PSA__(principal), PSA__(along), PSA__(sort), PSA__(part),       \
        PSA__(pack), PSA__(unpack), PSA__(qk), PSA__(hide), PSA__(softmax), PSA__(pv), PSA__(few), PSA__(block_max),   \
        PSA__(row_mass), PSA__(block_error), PSA__(row_error), PSA__(hull)

static const psa__leaves PSA__(leaves) = {
#if PSA__PASS == 1
    "scalar",
#elif PSA__PASS == 2
    "avx2",
#elif PSA__PASS == 3
    "avx512",
#else
    "neon",
#endif
    PSA__W, PSA__NV, PSA__TILE_K, PSA__SHARED, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, PSA__(enter),
    PSA__(leave)};

#if PSA__PASS == 3 && defined(PSA__AMX)
static const psa__leaves psa__amx_leaves = {
    "amx", PSA__W, PSA__NV, PSA__TILE_MATRIX, PSA__SHARED, PSA__(tile_queries), PSA__(tile_keys), PSA__(tile_values),
    PSA__(tile_products), PSA__(tile_logits), PSA__(tile_weights), NULL, NULL, NULL, PSA__(enter_tiles),
    PSA__(leave_tiles)};
#endif

#if PSA__PASS == 4 && defined(PSA__BFMMLA)
static const psa__leaves psa__neon_bf16_leaves = {
    "neon_bf16", PSA__W, PSA__NV, PSA__TILE_K, PSA__SHARED, NULL, NULL, NULL, NULL, NULL, NULL, PSA__(pack_bf16),
    PSA__(qk_bf16), PSA__(pv_bf16), PSA__(enter), PSA__(leave)};
#endif

#undef PSA__SHARED
#undef PSA__
#undef PSA__TARGET
#undef PSA__V
#undef PSA__W
#undef PSA__NV
#undef PSA__ROWS
#undef PSA__FEW
#undef PSA__HELD

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif /* PSA__PASS */

#ifndef PSA__PASS

/* The leaves of an instruction set that this machine has */
static const psa__leaves *psa__leaves_of(psa_isa isa)
{
    switch (isa) {
#ifdef PSA__SIMD
    case PSA_ISA_AVX2: return &psa__avx2_leaves;
    case PSA_ISA_AVX512: return &psa__avx512_leaves;
#endif
#ifdef PSA__AMX
    case PSA_ISA_AMX: return &psa__amx_leaves;
#endif
#ifdef PSA__NEON
    case PSA_ISA_NEON: return &psa__neon_leaves;
#endif
#ifdef PSA__BFMMLA
    case PSA_ISA_NEON_BF16: return &psa__neon_bf16_leaves;
#endif
    default: return &psa__scalar_leaves;
    }
}

#if defined(PSA__SIMD) && !defined(PSA_SIMD_EMULATED)
static void psa__cpuid(uint32_t leaf, uint32_t r[4])
{
#ifdef _MSC_VER
    int out[4];
    __cpuidex(out, (int)leaf, 0);
    memcpy(r, out, sizeof out);
#elif defined(__i386__) && defined(__PIC__)
    __asm__ volatile("xchgl %%ebx, %1\n\tcpuid\n\txchgl %%ebx, %1"
                     : "=a"(r[0]), "=&r"(r[1]), "=c"(r[2]), "=d"(r[3])
                     : "0"(leaf), "2"(0));
#else
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "0"(leaf), "2"(0));
#endif
}

/* The register state that the operating system saves (XCR0). */
static uint64_t psa__xgetbv(void)
{
#ifdef _MSC_VER
    return _xgetbv(0);
#else
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
#endif
}
#endif

#if defined(PSA__AMX) && !defined(PSA_SIMD_EMULATED)
static long psa__arch_prctl(long code, long value)
{
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "0"(158L), "D"(code), "S"(value) : "rcx", "r11", "memory");
    return r;
}

/* Processor and operating system have bf16 tiles. */
static int psa__has_tiles(uint64_t saved, uint32_t features)
{
    uint64_t kernel = 0;
    if (~saved & 3u << 17 || ~features & (1u << 22 | 1u << 24)) return 0; /* XTILE state; AMX-BF16, AMX-TILE */
    return psa__arch_prctl(0x1021, (long)(uintptr_t)&kernel) == 0 && kernel >> 18 & 1; /* ARCH_GET_XCOMP_SUPP */
}
#endif

/* Asks Linux for the tiles, which make the process's signal frames larger: 1 if they may be used. */
static int psa__ask_for_tiles(void)
{
#if defined(PSA__AMX) && !defined(PSA_SIMD_EMULATED)
    return psa__arch_prctl(0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM */
#else
    return 1;
#endif
}

PSA__DEF psa_isa psa_isa_detect(void)
{
#if defined(PSA_SIMD_EMULATED)
    return PSA_ISA_AMX;
#elif defined(PSA__SIMD)
    uint32_t r[4];
    uint64_t saved;
    psa__cpuid(0, r);
    if (r[0] < 7) return PSA_ISA_SCALAR;
    psa__cpuid(1, r);
    if (~r[2] & (1u << 12 | 1u << 27 | 1u << 29)) return PSA_ISA_SCALAR; /* FMA, OSXSAVE, F16C */
    saved = psa__xgetbv();
    psa__cpuid(7, r);
    if ((saved & 0x06) != 0x06 || !(r[1] & 1u << 5)) return PSA_ISA_SCALAR; /* YMM state, AVX2 */
    if ((saved & 0xe6) != 0xe6 || ~r[1] & (1u << 16 | 1u << 17)) return PSA_ISA_AVX2; /* ZMM state; AVX512F, DQ */
#ifdef PSA__AMX
    if (psa__has_tiles(saved, r[3])) return PSA_ISA_AMX;
#endif
    return PSA_ISA_AVX512;
#elif defined(PSA__BFMMLA) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return PSA_ISA_NEON_BF16;
#elif defined(PSA__BFMMLA)
    return getauxval(26) >> 14 & 1 ? PSA_ISA_NEON_BF16 : PSA_ISA_NEON; /* AT_HWCAP2, HWCAP2_BF16 */
#elif defined(PSA__NEON)
    return PSA_ISA_NEON;
#else
    return PSA_ISA_SCALAR;
#endif
}

/* The instruction set itself, the best one for AUTO, or END if it is unknown or this machine lacks it. Asks the
 * processor once: in a virtual machine each CPUID is a call of the hypervisor, some 8 us. */
static psa_isa psa__isa_of(psa_isa isa)
{
    psa_isa best = isa == PSA_ISA_SCALAR ? isa : psa_isa_detect();
    if (isa == PSA_ISA_AUTO) return best;
    if (isa == PSA_ISA_AVX512 && best == PSA_ISA_AMX) return isa;
    if (isa == PSA_ISA_AVX2 && (best == PSA_ISA_AVX512 || best == PSA_ISA_AMX)) return isa;
    if (isa == PSA_ISA_NEON && best == PSA_ISA_NEON_BF16) return isa;
    return isa == best ? isa : PSA_ISA_END;
}

PSA__DEF int psa_isa_supported(psa_isa isa) { return psa__isa_of(isa) != PSA_ISA_END; }

PSA__DEF const char *psa_isa_name(psa_isa isa)
{
    static const char *const name[] = {"auto", "scalar", "avx2", "avx512", "neon", "amx", "neon_bf16"};
    return isa >= PSA_ISA_AUTO && isa < PSA_ISA_END ? name[isa] : NULL;
}

PSA__DEF const char *psa_version(void) { return PSA_VERSION; }

PSA__DEF const char *psa_result_string(psa_result result)
{
    switch (result) {
#define PSA__X(name, text)                                                                                             \
    case name: return text;
        PSA_RESULTS(PSA__X)
#undef PSA__X
    }
    return "unknown result code";
}

/* ================================================================================================================= */
/* >>validate                                                                                                        */
/* ================================================================================================================= */

PSA__DEF size_t psa_type_size(psa_type type)
{
    return type == PSA_F32 ? 4 : type == PSA_F16 || type == PSA_BF16 ? 2 : 0;
}

PSA__DEF psa_tensor psa_tensor_4d(const void *data, psa_type type, int64_t d, int64_t n, int64_t h, int64_t b)
{
    psa_tensor t;
    memset(&t, 0, sizeof t);
    memcpy(&t.data, &data, sizeof data); /* one view type serves inputs and outputs */
    t.type = type;
    t.ne[0] = d;
    t.ne[1] = n;
    t.ne[2] = h;
    t.ne[3] = b;
    t.nb[0] = psa_type_size(type);
    for (int i = 1; i < 4; i++) t.nb[i] = psa__mul(t.nb[i - 1], t.ne[i - 1] > 0 ? (size_t)t.ne[i - 1] : 0);
    return t;
}

/* Type, extents and strides of one tensor; the bytes it spans must fit into half the address space. */
static psa_result psa__check_tensor(const psa_desc *desc, const psa_tensor *t, const char *name)
{
    size_t span = psa_type_size(t->type);
    if (span == 0) return psa__fail(desc, PSA_ERR_TYPE, "%s: unknown element type %d", name, (int)t->type);
    for (int i = 0; i < 4; i++) {
        if (t->ne[i] < 1) {
            return psa__fail(desc, PSA_ERR_SHAPE, "%s: ne[%d] is %lld, expected at least 1", name, i,
                             (long long)t->ne[i]);
        }
        if ((uint64_t)t->ne[i] > (i < 2 ? (uint64_t)INT32_MAX : (uint64_t)SIZE_MAX / 2)) {
            return psa__fail(desc, PSA_ERR_OVERFLOW, "%s: ne[%d] is %lld, too large", name, i, (long long)t->ne[i]);
        }
        span = psa__add(span, psa__mul(t->nb[i], (size_t)t->ne[i] - 1));
    }
    if (span > SIZE_MAX / 2) return psa__fail(desc, PSA_ERR_OVERFLOW, "%s: its bytes overflow size_t", name);
    if (t->nb[0] != psa_type_size(t->type)) {
        return psa__fail(desc, PSA_ERR_STRIDE, "%s: nb[0] is %llu, expected the element size %d", name,
                         (unsigned long long)t->nb[0], (int)psa_type_size(t->type));
    }
    return PSA_OK;
}

/* Rows of an output must not overlap: each outer axis has to step over all that the shorter strides span. */
static psa_result psa__check_output(const psa_desc *desc, const psa_tensor *t, const char *name)
{
    size_t span = psa_type_size(t->type) * (size_t)t->ne[0];
    int done[4] = {1, 0, 0, 0};
    for (int round = 0; round < 3; round++) {
        int next = 0;
        for (int i = 1; i < 4; i++) {
            if (!done[i] && (next == 0 || t->nb[i] < t->nb[next])) next = i;
        }
        done[next] = 1;
        if (t->ne[next] == 1) continue;
        if (t->nb[next] < span) return psa__fail(desc, PSA_ERR_STRIDE, "%s: rows overlap along axis %d", name, next);
        span += t->nb[next] * ((size_t)t->ne[next] - 1);
    }
    return PSA_OK;
}

/* Two views of the same extents, one to be read and one to be written. */
static psa_result psa__check_pair(const psa_tensor *in, const psa_tensor *out)
{
    psa_result r;
    if ((r = psa__check_tensor(NULL, in, "in")) != PSA_OK) return r;
    if ((r = psa__check_tensor(NULL, out, "out")) != PSA_OK) return r;
    for (int i = 0; i < 4; i++) {
        if (in->ne[i] != out->ne[i]) return PSA_ERR_SHAPE;
    }
    return psa__check_output(NULL, out, "out");
}

static psa_result psa__check_extent(const psa_desc *desc, const char *name, int axis, int64_t is, int64_t expected)
{
    if (is == expected) return PSA_OK;
    return psa__fail(desc, PSA_ERR_SHAPE, "%s: ne[%d] is %lld, expected %lld", name, axis, (long long)is,
                     (long long)expected);
}

static psa_result psa__check_head_dim(const psa_desc *desc, const char *name, int64_t d)
{
    if (d >= 8 && d <= PSA_MAX_D && d % 8 == 0) return PSA_OK;
    return psa__fail(desc, PSA_ERR_HEAD_DIM, "%s: head size is %lld, expected a multiple of 8 up to %d", name,
                     (long long)d, PSA_MAX_D);
}

/* Shapes against each other; fills the plan's tensors and extents. */
static psa_result psa__plan_shapes(psa_plan *p, const psa_tensor *q, const psa_tensor *k, const psa_tensor *v,
                                   const psa_tensor *out)
{
    const psa_desc *desc = &p->desc;
    psa_result r;
    if ((r = psa__check_tensor(desc, q, "q")) != PSA_OK) return r;
    if ((r = psa__check_tensor(desc, k, "k")) != PSA_OK) return r;
    if ((r = psa__check_head_dim(desc, "q", q->ne[0])) != PSA_OK) return r;
    if ((r = psa__check_extent(desc, "k", 0, k->ne[0], q->ne[0])) != PSA_OK) return r;
    if ((r = psa__check_extent(desc, "k", 3, k->ne[3], q->ne[3])) != PSA_OK) return r;
    if (q->ne[2] % k->ne[2] != 0) {
        return psa__fail(desc, PSA_ERR_HEADS, "q has %lld heads, k has %lld: expected a multiple", (long long)q->ne[2],
                         (long long)k->ne[2]);
    }
    if (v) {
        if ((r = psa__check_tensor(desc, v, "v")) != PSA_OK) return r;
        if ((r = psa__check_head_dim(desc, "v", v->ne[0])) != PSA_OK) return r;
        for (int i = 1; i < 4; i++) {
            if ((r = psa__check_extent(desc, "v", i, v->ne[i], k->ne[i])) != PSA_OK) return r;
        }
        if (v->type != k->type) {
            return psa__fail(desc, PSA_ERR_TYPE, "v has type %d, k has %d: expected the same", (int)v->type,
                             (int)k->type);
        }
    }
    if (out) {
        if ((r = psa__check_tensor(desc, out, "out")) != PSA_OK) return r;
        if ((r = psa__check_extent(desc, "out", 0, out->ne[0], v ? v->ne[0] : q->ne[0])) != PSA_OK) return r;
        for (int i = 1; i < 4; i++) {
            if ((r = psa__check_extent(desc, "out", i, out->ne[i], q->ne[i])) != PSA_OK) return r;
        }
        if ((r = psa__check_output(desc, out, "out")) != PSA_OK) return r;
    }
    p->q = *q;
    p->k = *k;
    if (v) p->v = *v;
    if (out) p->out = *out;
    p->q.data = p->k.data = p->v.data = p->out.data = NULL;
    p->B = q->ne[3];
    p->Hq = q->ne[2];
    p->Hkv = k->ne[2];
    p->Nq = q->ne[1];
    p->Nk = k->ne[1];
    p->D = q->ne[0];
    p->Dv = v ? v->ne[0] : 0;
    return PSA_OK;
}

static psa_result psa__plan_blocks(psa_plan *p)
{
    psa_desc *d = &p->desc;
    if (d->block_q == 0) d->block_q = 128;
    if (d->block_k == 0) d->block_k = 64;
    if (d->block_q < 16 || d->block_q > PSA_MAX_BLOCK_Q) {
        return psa__fail(d, PSA_ERR_BLOCK, "block_q is %d, expected 16 to %d", d->block_q, PSA_MAX_BLOCK_Q);
    }
    if (d->block_k < 16 || d->block_k > PSA_MAX_BLOCK_K || (d->block_k & (d->block_k - 1)) != 0) {
        return psa__fail(d, PSA_ERR_BLOCK, "block_k is %d, expected 16, 32, 64 or 128", d->block_k);
    }
    if (!(fabsf(d->scale) <= 3.402823466e+38f)) return psa__fail(d, PSA_ERR_SCALE, "scale is not finite");
    if (d->scale == 0.0f) d->scale = 1.0f / sqrtf((float)p->D);
    p->nq = psa__ceil_div(p->Nq, d->block_q);
    p->nk = psa__ceil_div(p->Nk, d->block_k);
    return PSA_OK;
}

/* n of the offsets 0..block-1 without repetition, ascending: a partial Fisher-Yates shuffle, then a sort by marking. */
static void psa__draw_offsets(uint64_t seed, int block, int n, uint8_t *offset)
{
    uint8_t deck[PSA_MAX_BLOCK_Q], chosen[PSA_MAX_BLOCK_Q];
    int found = 0;
    memset(chosen, 0, sizeof chosen);
    for (int i = 0; i < block; i++) deck[i] = (uint8_t)i;
    for (int i = 0; i < n; i++) {
        int j = i + (int)(psa__random(seed, (uint64_t)i) % (uint64_t)(block - i));
        uint8_t card = deck[j];
        deck[j] = deck[i];
        chosen[card] = 1;
    }
    for (int i = 0; i < block; i++) {
        if (chosen[i]) offset[found++] = (uint8_t)i;
    }
}

static int psa__sample_count(double share, int block)
{
    int n = (int)(share * block + 0.5);
    return n < 1 ? 1 : n;
}

static psa_result psa__plan_score(psa_plan *p)
{
    psa_desc *d = &p->desc;
    if (d->sample_q == 0) d->sample_q = 0.25;
    if (d->sample_k == 0) d->sample_k = 0.25;
    if (d->stride == 0) d->stride = 8;
    if (d->score < PSA_SCORE_SAMPLE || d->score > PSA_SCORE_EXACT) {
        return psa__fail(d, PSA_ERR_SCORE, "unknown score kind %d", (int)d->score);
    }
    if (!(d->sample_q > 0 && d->sample_q <= 1 && d->sample_k > 0 && d->sample_k <= 1)) {
        return psa__fail(d, PSA_ERR_SCORE, "sample shares are %g and %g, expected (0,1]", d->sample_q, d->sample_k);
    }
    if (d->score == PSA_SCORE_ANTIDIAGONAL &&
        (d->stride < 1 || d->block_q % d->stride != 0 || d->block_k % d->stride != 0)) {
        return psa__fail(d, PSA_ERR_SCORE, "stride %d does not divide block_q %d and block_k %d", d->stride, d->block_q,
                         d->block_k);
    }
    if (d->mask == PSA_MASK_ERROR && d->score == PSA_SCORE_SAMPLE) d->score = PSA_SCORE_POOLED;
    if (d->score_group[0] == 0) d->score_group[0] = d->mask == PSA_MASK_ERROR ? 8 : d->block_q;
    if (d->score_group[1] == 0) d->score_group[1] = d->mask == PSA_MASK_ERROR ? 8 : d->block_k;
    if (d->score == PSA_SCORE_POOLED &&
        (d->score_group[0] < 1 || d->block_q % d->score_group[0] != 0 || d->score_group[1] < 1 ||
         d->block_k % d->score_group[1] != 0)) {
        return psa__fail(d, PSA_ERR_SCORE, "groups of %d queries and %d keys do not divide block_q %d and block_k %d",
                         d->score_group[0], d->score_group[1], d->block_q, d->block_k);
    }
    if (d->mask == PSA_MASK_ERROR && (d->score != PSA_SCORE_POOLED || d->score_group[1] < 2)) {
        return psa__fail(d, PSA_ERR_SCORE, "mask ERROR needs POOLED scores of groups of at least 2 keys");
    }
    p->n_sample_q = psa__sample_count(d->sample_q, d->block_q);
    p->n_sample_k = psa__sample_count(d->sample_k, d->block_k);
    psa__draw_offsets(psa__random(d->seed, 0), d->block_q, p->n_sample_q, p->sample_q);
    psa__draw_offsets(psa__random(d->seed, 1), d->block_k, p->n_sample_k, p->sample_k);
    return PSA_OK;
}

/* Entries of level_end in use. */
static int psa__n_ends(const psa_desc *d)
{
    int n = PSA_MAX_LEVELS;
    while (n > 1 && d->level_end[n - 1] == 0) n--;
    return n;
}

/* level_end and level_count: defaults, range, and no blocks for levels that block_k does not have. */
static psa_result psa__plan_levels(psa_plan *p)
{
    static const double topk[4] = {.10, .15, .15, .35}, threshold[4] = {.4, .5, .6, .8};
    psa_desc *d = &p->desc;
    int most = psa__log2(d->block_k) + 1, counted = 0, ended = 0;
    double last = 0;
    for (int i = 0; i < PSA_MAX_LEVELS; i++) {
        if (d->level_count[i] < 0) return psa__fail(d, PSA_ERR_LEVELS, "level_count[%d] is negative", i);
        counted |= d->level_count[i] > 0;
        ended |= d->level_end[i] != 0;
        if (i >= most && d->level_count[i] > 0) {
            return psa__fail(d, PSA_ERR_LEVELS, "level_count[%d]: level %d is above block_k %d", i, 1 << i, d->block_k);
        }
    }
    if (counted && d->mask != PSA_MASK_DENSE && (d->mask != PSA_MASK_TOPK || d->density > 0)) {
        return psa__fail(d, PSA_ERR_MASK, "level_count needs top-k, without density");
    }
    if (!ended) memcpy(d->level_end, d->mask == PSA_MASK_THRESHOLD ? threshold : topk, sizeof topk);
    for (int i = 0; i < psa__n_ends(d); i++) {
        double end = d->level_end[i];
        if (!(end >= last && end <= 1)) {
            return psa__fail(d, PSA_ERR_LEVELS, "level_end[%d] is %g, expected %g to 1", i, end, last);
        }
        if (i >= most && end > last) {
            return psa__fail(d, PSA_ERR_LEVELS, "level_end[%d]: level %d is above block_k %d", i, 1 << i, d->block_k);
        }
        last = end;
    }
    return PSA_OK;
}

static psa_result psa__plan_density(psa_plan *p)
{
    psa_desc *d = &p->desc;
    if (!(d->density >= 0 && d->density <= 1)) {
        return psa__fail(d, PSA_ERR_MASK, "density is %g, expected (0,1], or 0 for none", d->density);
    }
    if (!(d->lambda >= 0 && d->lambda <= 1e30) ||
        (d->lambda > 0 && d->mask != PSA_MASK_DENSE && (d->mask != PSA_MASK_ERROR || d->density > 0))) {
        return psa__fail(d, PSA_ERR_MASK, "lambda %g: expected a price for mask ERROR without density", d->lambda);
    }
    if (d->causal && (d->mask == PSA_MASK_ERROR || d->tilt)) {
        return psa__fail(d, PSA_ERR_MASK, "mask ERROR and tilt are for attention without causality");
    }
    if (d->mask == PSA_MASK_ERROR && d->lambda == 0 && d->density == 0) d->density = 0.15;
    return PSA_OK;
}

static psa_result psa__plan_mask(psa_plan *p)
{
    psa_desc *d = &p->desc;
    psa_result r;
    int most = psa__log2(d->block_k);
    if (d->mask < PSA_MASK_TOPK || d->mask > PSA_MASK_ERROR) {
        return psa__fail(d, PSA_ERR_MASK, "unknown mask kind %d", (int)d->mask);
    }
    if ((r = psa__plan_levels(p)) != PSA_OK || (r = psa__plan_density(p)) != PSA_OK) return r;
    if (d->n_sim_min < 0 || d->n_sim_min > most) {
        return psa__fail(d, PSA_ERR_SIMILARITY, "n_sim_min is %d, expected 0 to %d", d->n_sim_min, most);
    }
    for (int i = 0; i < d->n_sim_min; i++) {
        if (!(fabs(d->sim_min[i]) <= 1e30)) return psa__fail(d, PSA_ERR_SIMILARITY, "sim_min[%d] is not finite", i);
    }
    if (d->n_prefix < 0 || d->n_suffix < 0) {
        return psa__fail(d, PSA_ERR_PROTECT, "n_prefix is %lld, n_suffix %lld: expected 0 or more",
                         (long long)d->n_prefix, (long long)d->n_suffix);
    }
    if (!(d->min_full >= 0 && d->min_full <= 1)) {
        return psa__fail(d, PSA_ERR_PROTECT, "min_full is %g, expected 0 to 1", d->min_full);
    }
    p->n_levels = d->mask == PSA_MASK_DENSE ? 1 : most + 1;
    return PSA_OK;
}

/* In range, and sums of index and of a hash of it are those of 0..n-1: each token once, without memory to mark them. */
static int psa__is_permutation(const int32_t *index, int64_t n)
{
    uint64_t sum = 0, hash = 0;
    for (int64_t i = 0; i < n; i++) {
        if (index[i] < 0 || index[i] >= n) return 0;
        sum += (uint64_t)i - (uint64_t)(int64_t)index[i];
        hash += psa__random(0, (uint64_t)i) - psa__random(0, (uint64_t)index[i]);
    }
    return sum == 0 && hash == 0;
}

static psa_result psa__check_order(const psa_desc *desc, const psa_order *o, const psa_tensor *t, const char *name)
{
    if (!o->index) return PSA_OK;
    for (int64_t b = 0; b < (o->stride_b ? t->ne[3] : 1); b++) {
        for (int64_t h = 0; h < (o->stride_h ? t->ne[2] : 1); h++) {
            if (!psa__is_permutation(o->index + b * o->stride_b + h * o->stride_h, t->ne[1])) {
                return psa__fail(desc, PSA_ERR_ORDER, "%s: batch %lld, head %lld is not a permutation of %lld tokens",
                                 name, (long long)b, (long long)h, (long long)t->ne[1]);
            }
        }
    }
    return PSA_OK;
}

static psa_result psa__plan_orders(psa_plan *p)
{
    const psa_desc *d = &p->desc;
    psa_result r;
    if (d->causal && (d->order_q.index || d->order_k.index || d->tree)) {
        return psa__fail(d, PSA_ERR_ORDER, "a token order cannot be causal");
    }
    if (d->tree < PSA_TREE_NONE || d->tree > PSA_TREE_QKV || d->metric < PSA_METRIC_LOGIT ||
        d->metric > PSA_METRIC_EUCLID) {
        return psa__fail(d, PSA_ERR_ORDER, "unknown tree %d or metric %d", (int)d->tree, (int)d->metric);
    }
    if ((d->tree && d->order_k.index) || (d->tree == PSA_TREE_QKV && d->order_q.index)) {
        return psa__fail(d, PSA_ERR_ORDER, "order_q and order_k must be empty where the tree makes the order");
    }
    if ((r = psa__check_order(d, &d->order_q, &p->q, "order_q")) != PSA_OK) return r;
    return psa__check_order(d, &d->order_k, &p->k, "order_k");
}

#if defined(PSA_NO_THREADS)
static int psa__processors(void) { return 1; }
#elif defined(_WIN32)
static int psa__processors(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
}
#else
static int psa__processors(void)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n > 1024 ? 1024 : (int)n;
}
#endif

/* Query lanes are padded to whole vectors; 16 is a multiple of every instruction set's vector. */
static int64_t psa__pad_lanes(int64_t n) { return psa__ceil_div(n, 16) * 16; }

/* Query vectors that score a query block. */
static int64_t psa__score_each(const psa_plan *p)
{
    switch (p->desc.score) {
    case PSA_SCORE_SAMPLE: return p->n_sample_q;
    case PSA_SCORE_ANTIDIAGONAL: return p->desc.block_q / p->desc.stride;
    case PSA_SCORE_POOLED: return p->desc.block_q / p->desc.score_group[0];
    case PSA_SCORE_EXACT: break;
    }
    return p->desc.block_q;
}

/* Query blocks that are scored together, so that keys are read once for all of them: as many as fill some vectors, if
 * their lanes end where vectors or equal parts of one do. Blocks that go together are one task: with pooled groups, of
 * which a block has few, there would soon be too few tasks. Means of samples divide by the pairs that are seen, which
 * are counted for one block. */
static int64_t psa__score_together(const psa_plan *p)
{
    int sample = p->desc.score == PSA_SCORE_SAMPLE, pooled = p->desc.score == PSA_SCORE_POOLED;
    int64_t each = psa__score_each(p), lanes = psa__min(psa__pad_lanes(p->desc.block_q), sample ? 128 : 64);
    if (!pooled && !(sample && !p->desc.score_mean)) return 1;
    return lanes % each == 0 && (each % 16 == 0 || 16 % each == 0) ? lanes / each : 1;
}

/* Query vectors that score the query blocks that go together, padded. */
static int64_t psa__score_lanes(const psa_plan *p)
{
    return psa__pad_lanes(psa__score_each(p) * psa__score_together(p));
}

/* Scratch of one thread. Attention uses the first group, scoring the first three and the second, masking the third. */
typedef struct psa__scratch {
    float *qt;           /* query tiles, [D][lanes] each */
    float *s;            /* logits, [keys][lanes of one tile] */
    float *m, *l;        /* per lane: running maximum and denominator */
    float *top;          /* per lane of one tile: maximum over the tile */
    float *ot;           /* output tiles, [Dv][lanes] each */
    float *rows;         /* query rows before packing, output rows after unpacking */
    float *k, *v;        /* converted rows */
    const float **kp, **vp; /* row pointers of two tiles, or of a block */
    float *bias;         /* per key of them */
    int32_t *first;      /* per key of them: first lane that sees it */
    float *head_k, *head_v; /* a KV head in its order, if the plan copies it: [Nk][D] and [Nk][Dv], or matrix tiles */

    int64_t *lane_token; /* per lane: the last token it stands for */
    float *bm, *bs;      /* [nk][lanes]: maximum and sum of a block */

    float *x;            /* [n_levels][nk][lanes]: mask ERROR, results of block_error */
    psa__errors *errors; /* [nk] of the KV head that is scored */
    float *shift;        /* [nk][psa__shift_size] theirs */
    float *error;        /* [n_levels][nk+16]: predicted error of every block at levels 2, 4, ... and skipped */
    uint16_t *steps;     /* [nk][PSA_MAX_LEVELS]: prices at which a block leaves a level */
    uint8_t *full;       /* [nk]: blocks that are level 1 whatever they cost */

    float *sample[2];    /* [PSA__TREE_SAMPLE][D]: of a tree's tokens, and of those that see them */
    float *axes[2];      /* [PSA__AXES][D] */
    float *point;        /* [N][PSA__AXES]: a tree's tokens, in its order */
    float *place;        /* [N] along a direction */
    int32_t *move;       /* [N] */

    float *score;        /* [nk] rows of the score map that are made together */
    uint32_t *rank[2];   /* [nk] blocks in rank order, and sorting space */
    uint32_t *key[2];    /* [nk] sort keys */
} psa__scratch;

/* What mask ERROR keeps of a KV block, in floats: the arrays of psa__errors, but value as the variances themselves. */
static int64_t psa__spread_size(const psa_plan *p)
{
    int64_t groups = p->desc.block_k / p->desc.score_group[1], fine = psa__log2(p->desc.score_group[1]);
    return groups * (2 * fine + p->n_levels - 1 - fine) + p->n_levels - 1;
}

static psa__errors psa__errors_layout(const psa_plan *p, float *at)
{
    psa__errors e;
    memset(&e, 0, sizeof e);
    e.groups = (int)(p->desc.block_k / p->desc.score_group[1]);
    e.fine = psa__log2(p->desc.score_group[1]);
    e.coarse = p->n_levels - 1 - e.fine;
    e.mass = at;
    e.noise = at + e.groups * e.fine;
    e.share = at + e.groups * 2 * e.fine;
    return e;
}

/* Shifts of a KV block. */
static int64_t psa__shift_size(const psa_plan *p)
{
    int64_t fine = psa__log2(p->desc.score_group[1]);
    return (p->desc.block_k >> fine) * (p->n_levels - 1 - fine);
}

/* Rows of an output tile. */
static int64_t psa__ot_rows(const psa_plan *p) { return p->leaves->tile_products ? psa__up_to_32(p->Dv) : p->Dv; }

/* Numbers of a type are the sum of so many in bf16. */
static int psa__parts(psa_type type) { return type == PSA_BF16 ? 1 : type == PSA_F16 ? 2 : 3; }

/* Of the queries in tiles for keys of bf16; 0: tiles are f32. */
static int psa__bf16_parts(const psa_plan *p) { return p->leaves->qk_bf16 ? psa__parts(p->q.type) : 0; }

/* Floats that a row of K or V takes in matrix tiles. */
static int64_t psa__tile_row(const psa_plan *p, int64_t d) { return psa__up_to_32(d) / 2 * psa__parts(p->k.type); }

/* Whether dense attention reads a thread's own copy of a KV head, in f32 or in matrix tiles: rows that lie apart or are
 * converted cost more every time that they are read, and a copy about as much as reading them for one query block. */
static int psa__copies_head(const psa_plan *p)
{
    size_t f = sizeof(float);
    int apart = p->k.type != PSA_F32 || p->desc.order_k.index || p->k.nb[1] != (size_t)p->D * f ||
                p->v.nb[1] != (size_t)p->Dv * f;
    size_t blocks = psa__mul(psa__mul((size_t)p->B, (size_t)p->Hq), (size_t)p->nq) / (size_t)p->desc.n_threads;
    if (p->leaves->qk_bf16) return 0; /* rows are read as they are */
    return p->desc.mask == PSA_MASK_DENSE && apart && p->nq >= 4 && blocks >= 4; /* of a head, in one thread */
}

/* Lays the scratch out from base (NULL: only counts) and returns its size. */
static size_t psa__scratch_layout(const psa_plan *p, char *base, psa__scratch *w)
{
    size_t at = 0, f = sizeof(float), lanes = (size_t)psa__pad_lanes(p->desc.block_q), nk = (size_t)p->nk;
    const size_t tiles = 2 * ((size_t)p->leaves->tile_k + PSA__PAD_K), block = PSA_MAX_BLOCK_K + PSA__PAD_K;
    size_t d = (size_t)p->D, dv = (size_t)p->Dv, keys = tiles > block ? tiles : block, ot = (size_t)psa__ot_rows(p);
    int scored = p->desc.mask != PSA_MASK_DENSE, groups = scored && p->desc.score == PSA_SCORE_ANTIDIAGONAL;
    size_t score_lanes = (size_t)psa__score_lanes(p), pairs = scored ? psa__mul(nk, score_lanes) : 0;
    size_t query = groups ? score_lanes * (size_t)p->desc.stride * d : 0; /* a lane is a whole group */
    size_t rows = lanes * (d > dv ? d : dv), tokens = (size_t)psa__max(p->Nq, p->Nk);
    int errors = p->desc.mask == PSA_MASK_ERROR, priced = scored && p->desc.density > 0;
    int tree = scored && p->desc.tree != PSA_TREE_NONE;
    size_t copied = psa__copies_head(p) ? (size_t)p->Nk : 0, copied_d = d, copied_dv = dv;
    uintptr_t b = (uintptr_t)base;
    int in_parts = p->leaves->tile_products || p->leaves->qk_bf16; /* up to three of them */
    size_t qt = lanes * (in_parts ? (size_t)psa__up_to_32(p->D) / 2 * 3 : d);
    psa__scratch s;
    if (copied && p->leaves->tile_products) {
        copied = psa__add(copied, PSA__TILE_MATRIX);
        copied_d = (size_t)psa__tile_row(p, p->D);
        copied_dv = (size_t)psa__tile_row(p, p->Dv);
    }
    s.qt = (float *)(b + psa__take(&at, query > qt ? query : qt, f));
    s.s = (float *)(b + psa__take(&at, keys * 64, f));
    s.m = (float *)(b + psa__take(&at, lanes, f));
    s.l = (float *)(b + psa__take(&at, lanes, f));
    s.top = (float *)(b + psa__take(&at, 64, f));
    s.ot = (float *)(b + psa__take(&at, (tree && d > ot ? d : ot) * lanes, f));
    s.rows = (float *)(b + psa__take(&at, query > rows ? query : rows, f));
    s.k = (float *)(b + psa__take(&at, (size_t)psa__up_to_32(p->D) * PSA_MAX_BLOCK_K, f));
    s.v = (float *)(b + psa__take(&at, (size_t)psa__up_to_32(p->Dv) * PSA_MAX_BLOCK_K, f));
    s.kp = (const float **)(b + psa__take(&at, keys, sizeof(float *)));
    s.vp = (const float **)(b + psa__take(&at, keys, sizeof(float *)));
    s.bias = (float *)(b + psa__take(&at, keys, f));
    s.first = (int32_t *)(b + psa__take(&at, keys, sizeof(int32_t)));
    s.head_k = (float *)(b + psa__take(&at, psa__mul(copied, copied_d), f));
    s.head_v = (float *)(b + psa__take(&at, psa__mul(copied, copied_dv), f));
    s.lane_token = (int64_t *)(b + psa__take(&at, lanes, sizeof(int64_t)));
    s.bm = (float *)(b + psa__take(&at, pairs, f));
    s.bs = (float *)(b + psa__take(&at, pairs, f));
    s.x = (float *)(b + psa__take(&at, errors ? psa__mul(pairs, (size_t)p->n_levels) : 0, f));
    s.errors = (psa__errors *)(b + psa__take(&at, errors ? nk : 0, sizeof(psa__errors)));
    s.shift = (float *)(b + psa__take(&at, errors ? psa__mul(nk, (size_t)psa__shift_size(p)) : 0, f));
    s.error = (float *)(b + psa__take(&at, errors ? psa__mul(nk + 16, (size_t)p->n_levels) : 0, f));
    s.steps = (uint16_t *)(b + psa__take(&at, priced ? psa__mul(nk, PSA_MAX_LEVELS) : 0, sizeof(uint16_t)));
    s.full = (uint8_t *)(b + psa__take(&at, priced ? nk : 0, 1));
    for (int i = 0; i < 2; i++) {
        s.sample[i] = (float *)(b + psa__take(&at, tree ? PSA__TREE_SAMPLE * d : 0, f));
        s.axes[i] = (float *)(b + psa__take(&at, tree ? PSA__AXES * d : 0, f));
    }
    s.point = (float *)(b + psa__take(&at, tree ? psa__mul(tokens + PSA__PAD_K, PSA__AXES) : 0, f));
    s.place = (float *)(b + psa__take(&at, tree ? tokens + PSA__PAD_K : 0, f));
    s.move = (int32_t *)(b + psa__take(&at, tree ? tokens + PSA__PAD_K : 0, sizeof(int32_t)));
    s.score = (float *)(b + psa__take(&at, scored ? psa__mul(nk, (size_t)psa__score_together(p)) : 0, f));
    for (int i = 0; i < 2; i++) {
        s.rank[i] = (uint32_t *)(b + psa__take(&at, scored ? nk : 0, sizeof(uint32_t)));
        s.key[i] = (uint32_t *)(b + psa__take(&at, scored ? nk : 0, sizeof(uint32_t)));
    }
    if (w) *w = s;
    return at;
}

/* Whether tokens are pooled with weights and spreads, for which the queries' mean and variance are needed. */
static int psa__weighted(const psa_plan *p)
{
    return p->n_levels > 1 && (p->desc.tilt || p->desc.mask == PSA_MASK_ERROR);
}

/* Tables of prices: of every head, or of every thread and the heads that it takes. */
static int64_t psa__budgets(const psa_plan *p) { return p->desc.density_per_head ? p->B * p->Hq : p->desc.n_threads; }

static psa_result psa__plan_work(psa_plan *p)
{
    const psa_desc *d = &p->desc;
    size_t heads = psa__mul((size_t)p->B, (size_t)p->Hkv), at = 0, pooled, heads_q, priced;
    int scored = p->n_levels > 1, errors = d->mask == PSA_MASK_ERROR;
    psa_tree_kind tree = scored ? d->tree : PSA_TREE_NONE;
    p->pooled_rows = 0;
    for (int i = 1; i < p->n_levels; i++) {
        p->level_row[i] = p->pooled_rows;
        p->pooled_rows += p->nk * (d->block_k >> i);
    }
    pooled = psa__mul(heads, (size_t)p->pooled_rows);
    heads_q = psa__mul((size_t)p->B, (size_t)p->Hq);
    p->at_order_q = psa__take(&at, tree == PSA_TREE_QKV ? psa__mul(heads_q, (size_t)p->Nq) : 0, sizeof(int32_t));
    p->at_order_k = psa__take(&at, tree ? psa__mul(heads, (size_t)p->Nk) : 0, sizeof(int32_t));
    p->at_query = psa__take(&at, psa__weighted(p) ? psa__mul(heads, 2 * (size_t)p->D) : 0, sizeof(float));
    p->at_pooled_k = psa__take(&at, psa__mul(pooled, (size_t)p->D), psa_type_size(p->k.type));
    p->at_pooled_v = psa__take(&at, psa__mul(pooled, (size_t)p->Dv), psa_type_size(p->k.type));
    p->at_bias = psa__take(&at, pooled, sizeof(float));
    p->at_cap = psa__take(&at, d->n_sim_min ? psa__mul(heads, (size_t)p->nk) : 0, 1);
    p->at_spread = psa__take(&at, errors ? psa__mul(heads, (size_t)(p->nk * psa__spread_size(p))) : 0, sizeof(float));
    p->at_steps = psa__take(&at, errors ? psa__mul(psa_map_size(p), (size_t)p->n_levels) : 0, sizeof(uint16_t));
    priced = scored && d->density > 0 ? (size_t)psa__budgets(p) : 0;
    p->at_prices = psa__take(&at, psa__mul(priced, PSA__PRICES + 2), sizeof(uint64_t));
    p->at_rows = psa__take(&at, psa__mul(psa__mul((size_t)p->B, (size_t)p->Hq), (size_t)p->nq), sizeof(int64_t));
    p->scratch_size = psa__scratch_layout(p, NULL, NULL);
    p->at_scratch = psa__take(&at, p->scratch_size, (size_t)d->n_threads);
    p->work_size = psa__add(at, 63);
    if (p->work_size > SIZE_MAX / 2 || psa__mul(psa_map_size(p), sizeof(float)) > SIZE_MAX / 2) {
        return psa__fail(d, PSA_ERR_OVERFLOW, "the workspace or the maps do not fit into the address space");
    }
    return PSA_OK;
}

/* Everything in a plan that has its desc and leaves. */
static psa_result psa__plan_fill(psa_plan *p, const psa_tensor *q, const psa_tensor *k, const psa_tensor *v,
                                 const psa_tensor *out)
{
    psa_result r;
    if ((r = psa__plan_shapes(p, q, k, v, out)) != PSA_OK) return r;
    if ((r = psa__plan_blocks(p)) != PSA_OK) return r;
    if ((r = psa__plan_score(p)) != PSA_OK) return r;
    if ((r = psa__plan_mask(p)) != PSA_OK) return r;
    if ((r = psa__plan_orders(p)) != PSA_OK) return r;
    return psa__plan_work(p);
}

PSA__DEF psa_result psa_plan_init(psa_plan *plan, const psa_desc *desc, const psa_tensor *q, const psa_tensor *k,
                                  const psa_tensor *v, const psa_tensor *out)
{
    psa_plan p;
    psa_result r;
    if (!plan || !desc || !q || !k) return psa__fail(desc, PSA_ERR_NULL, "plan, desc, q and k must not be NULL");
    memset(&p, 0, sizeof p);
    p.desc = *desc;
    p.desc.isa = psa__isa_of(desc->isa);
    if (p.desc.isa == PSA_ISA_END) {
        return psa__fail(desc, PSA_ERR_ISA, "instruction set %d is not available", (int)desc->isa);
    }
    if (p.desc.isa == PSA_ISA_AMX && (k->type == PSA_F32 || !psa__ask_for_tiles())) p.desc.isa = PSA_ISA_AVX512;
    if (p.desc.isa == PSA_ISA_NEON_BF16 && k->type != PSA_BF16) p.desc.isa = PSA_ISA_NEON;
    p.leaves = psa__leaves_of(p.desc.isa);
    if (desc->n_threads < 0) return psa__fail(desc, PSA_ERR_THREADS, "n_threads is %d", desc->n_threads);
    if (desc->n_threads == 0) p.desc.n_threads = psa__processors();
    if (!desc->alloc_fn != !desc->free_fn) return psa__fail(desc, PSA_ERR_NULL, "alloc_fn and free_fn go together");
    if ((r = psa__plan_fill(&p, q, k, v, out)) != PSA_OK) return r;
    *plan = p;
    return PSA_OK;
}

PSA__DEF size_t psa_work_size(const psa_plan *plan) { return plan->work_size; }

PSA__DEF size_t psa_map_size(const psa_plan *plan)
{
    size_t rows = psa__mul(psa__mul((size_t)plan->B, (size_t)plan->Hq), (size_t)plan->nq);
    return psa__mul(rows, (size_t)plan->nk);
}

/* What every stage checks first. *p becomes the plan with the orders of its trees, which are in work. */
static psa_result psa__enter(const psa_plan *plan, const void *work, int ith, int nth, psa_plan *p)
{
    const char *base = psa__align_const(work);
    if (!plan) return PSA_ERR_NULL;
    if (!work) return psa__fail(&plan->desc, PSA_ERR_NULL, "work must not be NULL");
    if (ith < 0 || ith >= nth || nth > plan->desc.n_threads) {
        return psa__fail(&plan->desc, PSA_ERR_THREADS, "ith %d of nth %d, expected 0 <= ith < nth <= %d", ith, nth,
                         plan->desc.n_threads);
    }
    *p = *plan;
    if (p->n_levels == 1 || !p->desc.tree) return PSA_OK;
    p->desc.order_k.index = (const int32_t *)(const void *)(base + p->at_order_k);
    p->desc.order_k.stride_h = p->Nk;
    p->desc.order_k.stride_b = p->Nk * p->Hkv;
    if (p->desc.tree != PSA_TREE_QKV) return PSA_OK;
    p->desc.order_q.index = (const int32_t *)(const void *)(base + p->at_order_q);
    p->desc.order_q.stride_h = p->Nq;
    p->desc.order_q.stride_b = p->Nq * p->Hq;
    return PSA_OK;
}

static psa__scratch psa__scratch_of(const psa_plan *p, void *work, int ith)
{
    psa__scratch w;
    psa__scratch_layout(p, psa__align(work) + p->at_scratch + (size_t)ith * p->scratch_size, &w);
    return w;
}

/* ---- rows, blocks and causality ---- */

/* The token at position i of head h, batch b. */
static int64_t psa__token_at(const psa_order *o, int64_t b, int64_t h, int64_t i)
{
    return o->index ? o->index[b * o->stride_b + h * o->stride_h + i] : i;
}

/* Where the row of token i lies, in bytes from the tensor's data. */
static size_t psa__offset(const psa_tensor *t, int64_t b, int64_t h, int64_t i)
{
    return (size_t)b * t->nb[3] + (size_t)h * t->nb[2] + (size_t)i * t->nb[1];
}

/* The row at position i of head h, batch b, in the order given. */
static const char *psa__row(const psa_tensor *t, const psa_order *o, const void *data, int64_t b, int64_t h, int64_t i)
{
    return (const char *)data + psa__offset(t, b, h, psa__token_at(o, b, h, i));
}

static int psa__f32_in_place(const psa_tensor *t, const void *row)
{
    return t->type == PSA_F32 && (uintptr_t)row % sizeof(float) == 0;
}

/* The row as f32: where it lies if it can be read there, else converted into space. */
static const float *psa__row_f32(const psa_plan *p, const psa_tensor *t, const char *row, float *space)
{
    if (psa__f32_in_place(t, row)) return (const float *)(const void *)row;
    p->leaves->to_f32(space, row, t->type, t->ne[0]);
    return space;
}

/* The last of n keys again where a tile reads past the end; bias may be NULL. */
static void psa__pad_keys(const float **kp, float *bias, int64_t n)
{
    for (int64_t i = n; i < n + PSA__PAD_K; i++) kp[i] = kp[n - 1];
    for (int64_t i = n; bias && i < n + PSA__PAD_K; i++) bias[i] = bias[n - 1];
}

/* The n rows of a head from token i on as f32: w->kp, padded as a tile. n: at most PSA_MAX_BLOCK_K. */
static void psa__head_rows(const psa_plan *p, const psa_tensor *t, const char *head, int64_t i, int64_t n,
                           psa__scratch *w)
{
    for (int64_t x = 0; x < n; x++) {
        w->kp[x] = psa__row_f32(p, t, head + (size_t)(i + x) * t->nb[1], w->k + x * t->ne[0]);
    }
    psa__pad_keys(w->kp, NULL, n);
}

/* Whether every row of f32 begins at a multiple of 4 bytes. */
static int psa__is_aligned(const psa_tensor *t, const void *data)
{
    return ((uintptr_t)data | t->nb[1] | t->nb[2] | t->nb[3]) % sizeof(float) == 0;
}

/* rows[n]: pointers to rows begin, begin + 1, ... that lie `bytes` apart */
static void psa__spaced_rows(const char *first, size_t bytes, int64_t begin, int64_t n, const float **rows)
{
    first += (size_t)begin * bytes;
    for (int64_t i = 0; i < n; i++, first += bytes) rows[i] = (const float *)(const void *)first;
}

/* The rows at positions begin .. begin+n-1 of a head of K or V as f32 pointers: rows[n], space[n][width]. space NULL:
 * pointers to the rows as they are. */
static void psa__kv_rows(const psa_plan *p, const psa_tensor *t, const void *data, int64_t b, int64_t hkv,
                         int64_t begin, int64_t n, float *space, const float **rows)
{
    const psa_order *o = &p->desc.order_k;
    const int32_t *index = o->index ? o->index + b * o->stride_b + hkv * o->stride_h + begin : NULL;
    const char *head = (const char *)data + psa__offset(t, b, hkv, 0);
    if (!index) psa__spaced_rows(head, t->nb[1], begin, n, rows);
    for (int64_t i = 0; index && i < n; i++) {
        rows[i] = (const float *)(const void *)(head + (size_t)index[i] * t->nb[1]);
    }
    for (int64_t i = 0; space && i < n; i++) {
        rows[i] = psa__row_f32(p, t, (const char *)(const void *)rows[i], space + i * t->ne[0]);
    }
}

static int64_t psa__block_q_rows(const psa_plan *p, int64_t iq)
{
    return psa__min(p->desc.block_q, p->Nq - iq * p->desc.block_q);
}

static int64_t psa__block_k_rows(const psa_plan *p, int64_t jk)
{
    return psa__min(p->desc.block_k, p->Nk - jk * p->desc.block_k);
}

/* The token that query row i stands for: causal attention aligns the ends of q and k. */
static int64_t psa__query_token(const psa_plan *p, int64_t i) { return p->desc.causal ? i + p->Nk - p->Nq : i; }

/* KV blocks that some row of query block iq sees: the first n. */
static int64_t psa__n_visible(const psa_plan *p, int64_t iq)
{
    int64_t last;
    if (!p->desc.causal) return p->nk;
    last = psa__query_token(p, iq * p->desc.block_q + psa__block_q_rows(p, iq) - 1);
    return last < 0 ? 0 : psa__min(last / p->desc.block_k + 1, p->nk);
}

/* KV blocks that every row sees in full: the first n; those between this and n_visible straddle the diagonal. */
static int64_t psa__n_whole(const psa_plan *p, int64_t iq)
{
    int64_t seen;
    if (!p->desc.causal) return p->nk;
    seen = psa__query_token(p, iq * p->desc.block_q) + 1;
    if (seen >= p->Nk) return p->nk;
    return seen < 0 ? 0 : seen / p->desc.block_k;
}

/* ================================================================================================================= */
/* >>prepare                                                                                                         */
/* ================================================================================================================= */

/* ---- the queries of a KV head: mean and variance ---- */

/* The n rows of a head from token i on: w->kp, as f32; finite[i] whether a row is without NaN and Inf (and not too long
 * for its square). n: at most PSA_MAX_BLOCK_K. */
static void psa__finite_rows(const psa_plan *p, const psa_tensor *t, const char *head, int64_t i, int64_t n,
                             psa__scratch *w, uint8_t *finite)
{
    float square[PSA_MAX_BLOCK_K + PSA__PAD_K];
    psa__head_rows(p, t, head, i, n, w);
    p->leaves->squares(w->kp, n, t->ne[0], square);
    for (int64_t x = 0; x < n; x++) finite[x] = (uint8_t)psa__finite(square[x]);
}

/* moment[2][D]: mean and variance of every element of the queries that read a KV head. */
static void psa__query_moments(const psa_plan *p, const void *q, int64_t b, int64_t hkv, psa__scratch *w, float *moment)
{
    double sum[PSA_MAX_D] = {0}, square[PSA_MAX_D] = {0}, n = 0;
    float some[2][PSA_MAX_D];
    uint8_t finite[PSA_MAX_BLOCK_K];
    int64_t group = p->Hq / p->Hkv;
    int64_t pieces = psa__ceil_div(p->Nq, PSA_MAX_BLOCK_K); /* so many rows are summed in single precision */
    for (int64_t task = 0; task < group * pieces; task++) {
        int64_t i = task % pieces * PSA_MAX_BLOCK_K, m = psa__min(PSA_MAX_BLOCK_K, p->Nq - i);
        const char *head = (const char *)q + psa__offset(&p->q, b, hkv * group + task / pieces, 0);
        psa__finite_rows(p, &p->q, head, i, m, w, finite);
        memset(some, 0, sizeof some);
        for (int64_t x = 0; x < m; x++) {
            if (!finite[x]) continue;
            p->leaves->moments(some[0], some[1], w->kp[x], p->D);
            n++;
        }
        for (int64_t j = 0; j < p->D; j++) sum[j] += some[0][j], square[j] += some[1][j];
    }
    for (int64_t j = 0; j < p->D; j++) {
        double mean = n > 0 ? sum[j] / n : 0, variance = n > 0 ? square[j] / n - mean * mean : 0;
        moment[j] = (float)mean;
        moment[p->D + j] = variance > 0 ? (float)variance : 0.0f;
    }
}

/* ---- trees: balanced bisection along the principal direction, down to groups of 8 ---- */

/* The i-th of n out of `size`: one from each n-th part, where multiples of the golden ratio fall, so that no grid of
 * tokens is in step. */
static int64_t psa__tree_sample(int64_t i, int64_t n, int64_t size)
{
    int64_t first = i * size / n, end = (i + 1) * size / n;
    uint32_t place = (uint32_t)i * 0x9e3779b9u;
    return first + (int64_t)(place * (uint64_t)(end - first) >> 32);
}

/* A sample of tokens first, ..., first + size - 1 of n_heads heads from h on, as f32, without those that are not
 * finite, less their mean if centred, of length 1 on the average: rows[n][D]. Returns n. */
static int64_t psa__tree_gather(const psa_plan *p, const psa_tensor *t, const void *data, int64_t b, int64_t h,
                                int64_t n_heads, int64_t first, int64_t size, int centred, float *rows)
{
    const psa__leaves *f = p->leaves;
    int64_t d = p->D, samples = psa__min(n_heads * size, PSA__TREE_SAMPLE), n = 0;
    float mean[PSA_MAX_D] = {0};
    double squares = 0;
    for (int64_t i = 0; i < samples; i++) {
        int64_t at = psa__tree_sample(i, samples, n_heads * size);
        float *row = rows + n * d;
        f->to_f32(row, (const char *)data + psa__offset(t, b, h + at / size, first + at % size), t->type, d);
        if (!psa__finite(f->dot(row, row, d))) continue;
        f->sum(mean, mean, row, d);
        n++;
    }
    f->scale(mean, 1.0f / (float)psa__max(n, 1), d);
    for (int64_t i = 0; i < n; i++) {
        if (centred) f->blend(rows + i * d, rows + i * d, 1.0f, mean, -1.0f, d);
        squares += f->dot(rows + i * d, rows + i * d, d);
    }
    if (squares > 0) f->scale(rows, (float)sqrt((double)n / squares), n * d);
    return n;
}

/* Vectors of a tile whose lanes are axes; all tiles are as wide. */
static int psa__axes_nv(const psa__leaves *f) { return (int)psa__min(PSA__AXES / f->lanes, f->max_nv); }

/* to[PSA__AXES][D] = from[PSA__AXES][D] times the second moments of n rows */
static void psa__tree_spread(const psa_plan *p, psa__scratch *w, const float *rows, int64_t n, const float *from,
                             float *to)
{
    const psa__leaves *f = p->leaves;
    int nv = psa__axes_nv(f);
    int64_t d = p->D, width = nv * f->lanes;
    float one[PSA__AXES], *to_row[PSA__AXES];
    const float *row[PSA__AXES];
    for (int i = 0; i < PSA__AXES; i++) one[i] = 1.0f, row[i] = from + i * d, to_row[i] = to + i * d;
    for (int64_t axis = 0; axis < PSA__AXES; axis += width) {
        f->pack(nv, w->qt, row + axis, d, 1.0f);
        memset(w->ot, 0, (size_t)(width * d) * sizeof(float));
        for (int64_t i = 0; i < n; i += PSA__TILE_K) {
            int64_t m = psa__min(PSA__TILE_K, n - i);
            for (int64_t x = 0; x < m + PSA__PAD_K; x++) w->kp[x] = rows + (i + psa__min(x, m - 1)) * d;
            f->qk(nv, w->qt, w->kp, m, d, NULL, w->s, w->top, NULL);
            f->pv(nv, w->s, w->kp, m, d, w->ot, NULL);
        }
        f->unpack(nv, to_row + axis, w->ot, d, one);
    }
}

/* Makes axes b = C a orthonormal in the metric C^-1, by Gram and Schmidt; one that depends on others becomes 0. b may
 * be a: Euclid's metric. */
static void psa__tree_orthonormal(const psa__leaves *f, float *a, float *b, int64_t d)
{
    for (int i = 0; i < PSA__AXES; i++) {
        float *ai = a + i * d, *bi = b + i * d, was = f->dot(ai, bi, d), norm, unit;
        for (int j = 0; j < i; j++) {
            float common = f->dot(ai, b + j * d, d);
            f->blend(ai, ai, 1.0f, a + j * d, -common, d);
            if (b != a) f->blend(bi, bi, 1.0f, b + j * d, -common, d);
        }
        norm = f->dot(ai, bi, d);
        unit = norm > 1e-6f * was && psa__finite(norm) ? 1.0f / sqrtf(norm) : 0.0f;
        if (unit == 0) memset(ai, 0, (size_t)d * sizeof *ai), memset(bi, 0, (size_t)d * sizeof *bi);
        f->scale(ai, unit, d);
        if (b != a) f->scale(bi, unit, d);
    }
}

/* Where positions begin .. end-1 are cut: at the multiple of the largest power of two between them. */
static int64_t psa__tree_cut(int64_t begin, int64_t end)
{
    int64_t step = begin ^ (end - 1); /* its highest bit is where they part */
    while ((step & (step - 1)) != 0) step &= step - 1;
    return (end - 1) & -step;
}

/* Parts positions begin .. end-1 at their cut along u; point and index are those at `begin`. Returns how many are
 * before the cut. */
static int64_t psa__tree_part(const psa__leaves *f, psa__scratch *w, int64_t begin, int64_t end, const float *u,
                              float *point, int32_t *index)
{
    int64_t left = psa__tree_cut(begin, end) - begin;
    f->along(u, point, end - begin, w->place);
    f->part(w->place, end - begin, left, w->move, point, index);
    return left;
}

/* Splits at most PSA__TREE_NODE positions whose second moments are known: one half's are summed, the other half's are
 * the rest. */
static void psa__tree_split_few(const psa__leaves *f, psa__scratch *w, int64_t begin, int64_t end,
                                const float *origin, const float *second, float *point, int32_t *index)
{
    float u[PSA__AXES], half[2][PSA__SECOND];
    int64_t n = end - begin, left;
    if (n <= PSA__AXES) {
        f->sort(second, point, n, 2, index); /* the points stay, nobody needs them any more */
        return;
    }
    f->principal(second, n, point, point + (n - 1) * PSA__AXES, 4, u);
    left = psa__tree_part(f, w, begin, end, u, point, index);
    f->second(point + left * PSA__AXES, NULL, n - left, origin, half[1]);
    f->blend(half[0], second, 1.0f, half[1], -1.0f, PSA__SECOND);
    psa__tree_split_few(f, w, begin, begin + left, origin, half[0], point, index);
    psa__tree_split_few(f, w, begin + left, end, origin, half[1], point + left * PSA__AXES, index + left);
}

/* Splits positions begin .. end-1. */
static void psa__tree_split(const psa__leaves *f, psa__scratch *w, int64_t begin, int64_t end, float *point,
                            int32_t *index)
{
    float u[PSA__AXES], origin[PSA__AXES], second[PSA__SECOND];
    int32_t some[PSA__TREE_NODE];
    int64_t n = end - begin, left;
    if (n < 2) return;
    if (n <= PSA__TREE_NODE) {
        memcpy(origin, point, sizeof origin);
        f->second(point, NULL, n, origin, second);
        psa__tree_split_few(f, w, begin, end, origin, second, point, index);
        return;
    }
    for (int64_t i = 0; i < PSA__TREE_NODE; i++) some[i] = (int32_t)psa__tree_sample(i, PSA__TREE_NODE, n);
    f->second(point, some, PSA__TREE_NODE, point, second);
    f->principal(second, PSA__TREE_NODE, point + some[0] * PSA__AXES, point + some[PSA__TREE_NODE - 1] * PSA__AXES, 6,
                 u);
    left = psa__tree_part(f, w, begin, end, u, point, index);
    psa__tree_split(f, w, begin, begin + left, point, index);
    psa__tree_split(f, w, begin + left, end, point + left * PSA__AXES, index + left);
}

/* Tokens first, ..., first + n - 1 of a head as points on the axes that are packed in w->qt; the n that follow are
 * prefetched. */
static void psa__tree_points(const psa_plan *p, psa__scratch *w, const psa_tensor *t, const char *head, int64_t first,
                             int64_t n, float *point)
{
    int nv = psa__axes_nv(p->leaves);
    int64_t width = nv * p->leaves->lanes, d = t->ne[0];
    float *to = width == PSA__AXES ? point : w->s;
    const float *next[PSA_MAX_BLOCK_K];
    psa__ahead ahead = {next, n, (size_t)d * t->nb[0]};
    psa__head_rows(p, t, head, first, n, w);
    for (int64_t x = 0; x < n; x++) {
        next[x] = (const float *)(const void *)(head + (size_t)psa__min(first + n + x, t->ne[1] - 1) * t->nb[1]);
    }
    for (int64_t axis = 0; axis < PSA__AXES; axis += width) {
        p->leaves->qk(nv, w->qt + axis * d, w->kp, n, d, NULL, to, w->top, axis == 0 ? &ahead : NULL);
        for (int64_t i = 0; to != point && i < n; i++) {
            memcpy(point + i * PSA__AXES + axis, to + i * width, (size_t)width * sizeof *point);
        }
    }
}

/* Drops those of n points that are not finite, tokens first, first + 1, ..., to the end of w->move; the others go to
 * index. Returns how many they are. */
static int64_t psa__tree_finite(const psa__leaves *f, psa__scratch *w, int64_t first, int64_t n, float *point,
                                int32_t *index, int64_t *bad)
{
    int64_t good = 0;
    int all = psa__finite(f->dot(point, point, n * PSA__AXES));
    for (int64_t i = 0; i < n; i++) {
        const float *from = point + i * PSA__AXES;
        if (!all && !psa__finite(f->dot(from, from, PSA__AXES))) {
            w->move[(*bad)++] = (int32_t)(first + i);
            continue;
        }
        if (!all) memmove(point + good * PSA__AXES, from, PSA__AXES * sizeof *point);
        index[good++] = (int32_t)(first + i);
    }
    return good;
}

/* The order of one head: prefix and suffix stay, tokens that are not finite go behind the others. */
static void psa__tree_head(const psa_plan *p, psa__scratch *w, const psa_tensor *t, const char *head, int64_t first,
                           int64_t end, int32_t *index)
{
    int64_t good = first, bad = 0;
    for (int64_t i = 0; i < first; i++) index[i] = (int32_t)i;
    for (int64_t i = end; i < t->ne[1]; i++) index[i] = (int32_t)i;
    for (int64_t i = first; i < end; i += PSA_MAX_BLOCK_K) {
        int64_t n = psa__min(PSA_MAX_BLOCK_K, end - i);
        float *point = w->point + (good - first) * PSA__AXES;
        psa__tree_points(p, w, t, head, i, n, point);
        good += psa__tree_finite(p->leaves, w, i, n, point, index + good, &bad);
    }
    memcpy(index + good, w->move, (size_t)bad * sizeof *index);
    psa__tree_split(p->leaves, w, first, good, w->point, index + first);
}

/* Axes of a head of the keys or of the queries, packed into w->qt: the directions in which tokens first .. end-1 differ
 * most. S being their second moments and C those of the tokens that see them, the first eigenvectors of C S: subspace
 * iteration from 16 tokens, of which one step will do. */
static void psa__tree_axes(const psa_plan *p, const void *q, const void *k, int keys, int64_t b, int64_t h,
                           int64_t first, int64_t end, psa__scratch *w)
{
    const psa__leaves *f = p->leaves;
    int64_t d = p->D, group = p->Hq / p->Hkv, n, seen = 0;
    int logit = p->desc.metric == PSA_METRIC_LOGIT, nv = psa__axes_nv(f);
    float *axes = w->axes[logit], size;
    const float *row[PSA__AXES];
    n = psa__tree_gather(p, keys ? &p->k : &p->q, keys ? k : q, b, h, 1, first, end - first, 1, w->sample[0]);
    if (logit && keys) seen = psa__tree_gather(p, &p->q, q, b, h * group, group, 0, p->Nq, 0, w->sample[1]);
    else if (logit) seen = psa__tree_gather(p, &p->k, k, b, h / group, 1, 0, p->Nk, 1, w->sample[1]);
    memset(w->axes[0], 0, (size_t)(PSA__AXES * d) * sizeof *axes);
    for (int64_t i = 0; i < psa__min(PSA__AXES, n); i++) {
        memcpy(w->axes[0] + i * d, w->sample[0] + i * n / PSA__AXES * d, (size_t)d * sizeof *axes);
    }
    for (int step = 0; step < 2; step++) {
        if (step > 0) psa__tree_spread(p, w, w->sample[0], n, axes, w->axes[0]);
        if (logit) psa__tree_spread(p, w, w->sample[1], seen, w->axes[0], axes);
        psa__tree_orthonormal(f, w->axes[0], axes, d);
    }
    size = sqrtf(f->dot(axes, axes, PSA__AXES * d));
    f->scale(axes, size > 0 ? 1.0f / size : 0.0f, PSA__AXES * d); /* no point is longer than its row */
    for (int i = 0; i < PSA__AXES; i++) row[i] = axes + i * d;
    for (int64_t i = 0; i < PSA__AXES; i += nv * f->lanes) f->pack(nv, w->qt + i * d, row + i, d, 1.0f);
}

/* The tree of a head of the keys or of the queries. */
static void psa__tree_make(const psa_plan *p, const void *q, const void *k, int keys, int64_t head, psa__scratch *w,
                           int32_t *index)
{
    const psa_tensor *t = keys ? &p->k : &p->q;
    int64_t b = head / t->ne[2], h = head % t->ne[2], N = t->ne[1];
    int64_t first = psa__min(p->desc.n_prefix, N), end = psa__max(N - p->desc.n_suffix, first);
    psa__tree_axes(p, q, k, keys, b, h, first, end, w);
    psa__tree_head(p, w, t, (const char *)(keys ? k : q) + psa__offset(t, b, h, 0), first, end, index + head * N);
}

PSA__DEF psa_result psa_prepare(const psa_plan *plan, const void *q, const void *k, void *work, int ith, int nth)
{
    psa_plan plan_here;
    const psa_plan *p = &plan_here;
    psa_result r = psa__enter(plan, work, ith, nth, &plan_here);
    char *base = psa__align(work);
    int64_t begin, end, keys, queries;
    psa__scratch w;
    if (r != PSA_OK) return r;
    if (!q || !k) return psa__fail(&p->desc, PSA_ERR_NULL, "q and k must not be NULL");
    keys = p->n_levels > 1 && (p->desc.tree || psa__weighted(p)) ? p->B * p->Hkv : 0;
    queries = p->n_levels > 1 && p->desc.tree == PSA_TREE_QKV ? p->B * p->Hq : 0;
    w = psa__scratch_of(p, work, ith);
    psa__share(keys + queries, ith, nth, &begin, &end);
    for (int64_t task = begin; task < end; task++) {
        if (task >= keys) {
            psa__tree_make(p, q, k, 0, task - keys, &w, (int32_t *)(void *)(base + p->at_order_q));
            continue;
        }
        if (psa__weighted(p)) {
            psa__query_moments(p, q, task / p->Hkv, task % p->Hkv, &w,
                               (float *)(void *)(base + p->at_query) + task * 2 * p->D);
        }
        if (p->desc.tree) psa__tree_make(p, q, k, 1, task, &w, (int32_t *)(void *)(base + p->at_order_k));
    }
    return PSA_OK;
}

PSA__DEF const int32_t *psa_tree_order(const psa_plan *plan, const void *work, int keys, int64_t b, int64_t h)
{
    psa_plan p;
    const psa_order *o = keys ? &p.desc.order_k : &p.desc.order_q;
    memset(&p, 0, sizeof p); /* gcc -O3 does not see that psa__enter fills it */
    if (psa__enter(plan, work, 0, 1, &p) != PSA_OK || p.n_levels == 1 || !p.desc.tree) return NULL;
    if (!keys && p.desc.tree != PSA_TREE_QKV) return NULL;
    if (b < 0 || b >= p.B || h < 0 || h >= (keys ? p.Hkv : p.Hq)) return NULL;
    return o->index + b * o->stride_b + h * o->stride_h;
}

/* ================================================================================================================= */
/* >>pool                                                                                                            */
/* ================================================================================================================= */

/* Pooled rows of level 1 << i that block jk has, by the tokens that exist. */
static int64_t psa__level_rows(const psa_plan *p, int64_t jk, int i)
{
    return psa__ceil_div(psa__block_k_rows(p, jk), (int64_t)1 << i);
}

/* Tokens under pooled row t of level 1 << i in block jk. */
static int64_t psa__group_count(const psa_plan *p, int64_t jk, int i, int64_t t)
{
    return psa__min((int64_t)1 << i, psa__block_k_rows(p, jk) - (t << i));
}

/* First pooled row of level 1 << i of block jk among all pooled rows of the workspace. */
static int64_t psa__pooled_row(const psa_plan *p, int64_t b, int64_t hkv, int64_t jk, int i)
{
    return (b * p->Hkv + hkv) * p->pooled_rows + p->level_row[i] + jk * (p->desc.block_k >> i);
}

/* Bytes of n pooled rows of width d: they have the type of K and V. */
static size_t psa__pooled_bytes(const psa_plan *p, int64_t n, int64_t d)
{
    return (size_t)(n * d) * psa_type_size(p->k.type);
}

/* Means of one block of K or V (rows[n] of width d) at every level, from sums of pairs of sums: sum[n][d], which may
 * hold the rows themselves. */
static void psa__pool_block(const psa_plan *p, const float *const *rows, int64_t d, char *pooled, int64_t b,
                            int64_t hkv, int64_t jk, float *sum)
{
    const psa__leaves *f = p->leaves;
    float ragged[PSA_MAX_D]; /* the mean of a group whose count has no exact reciprocal */
    for (int i = 1; i < p->n_levels; i++) {
        int64_t n = psa__level_rows(p, jk, i), finer = psa__level_rows(p, jk, i - 1);
        char *to = pooled + psa__pooled_bytes(p, psa__pooled_row(p, b, hkv, jk, i), d);
        for (int64_t t = 0; t < n; t++) {
            const float *x = i > 1 ? sum + 2 * t * d : rows[2 * t];
            const float *y = 2 * t + 1 == finer ? NULL : i > 1 ? x + d : rows[2 * t + 1];
            int64_t c = psa__group_count(p, jk, i, t);
            int full = c == (int64_t)1 << i;
            if (y) f->sum(sum + t * d, x, y, d);
            else memmove(sum + t * d, x, (size_t)d * sizeof(float));
            for (int64_t j = 0; !full && j < d; j++) ragged[j] = sum[t * d + j] / (float)c;
            f->from_f32(to + psa__pooled_bytes(p, t, d), p->k.type, full ? sum + t * d : ragged,
                        full ? 1.0f / (float)c : 1.0f, d);
        }
    }
}

static void psa__pool_bias(const psa_plan *p, float *bias, int64_t b, int64_t hkv, int64_t jk)
{
    for (int i = 1; i < p->n_levels; i++) {
        int64_t n = psa__level_rows(p, jk, i);
        float *to = bias + psa__pooled_row(p, b, hkv, jk, i);
        for (int64_t t = 0; t < n; t++) to[t] = log2f((float)psa__group_count(p, jk, i, t));
    }
}

/* ln cosh x, also for large x */
static float psa__ln_cosh(float x) { return x + log1pf(expf(-2.0f * x)) - (float)PSA__LN2; }

/* What merging weighs by: base 2 log of a group's mass under the mean query, the entropy of the weights inside, and
 * half the variance that the queries' spread gives its logits. */
typedef struct psa__weights {
    float mass[PSA_MAX_BLOCK_K], entropy[PSA_MAX_BLOCK_K], half[PSA_MAX_BLOCK_K];
    float value[PSA_MAX_BLOCK_K]; /* variance of v inside the group */
} psa__weights;

/* Two groups x and x + 1 become group t; share[2] are their weights. */
static void psa__merge_weights(psa__weights *g, int64_t x, int64_t t, float half_apart, float v_apart, float share[2])
{
    int64_t more = g->mass[x + 1] > g->mass[x], less = x + 1 - more;
    float ratio, gain;
    more += x;
    ratio = exp2f(g->mass[less] - g->mass[more]);
    gain = log2f(1.0f + ratio); /* base 2 log of 1 / share of the heavier one */
    share[more - x] = 1.0f / (1.0f + ratio);
    share[less - x] = 1.0f - share[more - x];
    g->entropy[t] = gain + share[more - x] * g->entropy[more] +
                    share[less - x] * (g->entropy[less] + (g->mass[more] - g->mass[less]));
    g->half[t] = share[0] * g->half[x] + share[1] * g->half[x + 1] + share[0] * share[1] * half_apart;
    g->value[t] = share[0] * g->value[x] + share[1] * g->value[x + 1] + share[0] * share[1] * v_apart;
    g->mass[t] = g->mass[more] + gain;
}

/* What mask ERROR keeps of level i of a block of `keys` keys, which has n rows. */
static void psa__pool_spread(const psa_plan *p, const psa__weights *g, int i, int64_t n, int64_t keys, float *spread)
{
    psa__errors e = psa__errors_layout(p, spread);
    float *mass = spread, *noise = mass + e.groups * e.fine, *value = spread + psa__spread_size(p) - (p->n_levels - 1);
    int64_t each = ((int64_t)1 << e.fine) >> i;
    float sum = 0;
    for (int64_t t = 0; t < n; t++) sum += g->value[t];
    value[i - 1] = sum < 1e30f ? sum / (float)n : 0.0f;
    for (int64_t t = 0; each > 0 && t < psa__ceil_div(keys, (int64_t)1 << e.fine); t++) {
        float half = 0, m = (float)psa__min(each, n - t * each);
        for (int64_t x = t * each; x < psa__min((t + 1) * each, n); x++) half += g->half[x] / m;
        half = fminf(half, 1e6f); /* squares are taken of it; not NaN */
        mass[t * e.fine + i - 1] = psa__ln_cosh(sqrtf(2.0f * half));
        noise[t * e.fine + i - 1] = 2.0f * half;
    }
}

/* Pooled keys, values (unless w->vp is NULL) and biases of a block by pairs of pairs, each weighted by the mass that
 * the mean query gives it (tilt), or evenly; and the spreads that mask ERROR wants. */
static void psa__pool_weighted(const psa_plan *p, char *base, int64_t b, int64_t hkv, int64_t jk, int values,
                               psa__scratch *w)
{
    const psa__leaves *f = p->leaves;
    int64_t d = p->D, dv = p->Dv, head = b * p->Hkv + hkv, group = p->desc.score_group[1];
    const float *mean = (const float *)(void *)(base + p->at_query) + head * 2 * d, *variance = mean + d;
    float *bias = (float *)(void *)(base + p->at_bias), *spread = NULL, scale = p->desc.scale;
    float one[PSA_MAX_D], group_mass[PSA_MAX_BLOCK_K] = {0}, *share_of = NULL;
    int errors = p->desc.mask == PSA_MASK_ERROR, level = psa__log2(group);
    psa__weights g;
    memset(&g, 0, sizeof g);
    for (int64_t i = 0; i < dv; i++) one[i] = 1.0f;
    if (errors) spread = (float *)(void *)(base + p->at_spread) + (head * p->nk + jk) * psa__spread_size(p);
    if (errors) share_of = spread + p->desc.block_k / group * 2 * level;
    for (int64_t i = 0; p->desc.tilt && i < psa__block_k_rows(p, jk); i++) {
        g.mass[i] = scale * (float)PSA__LOG2E * f->dot(mean, w->kp[i], d);
    }
    for (int i = 1; i < p->n_levels; i++) {
        int64_t n = psa__level_rows(p, jk, i), finer = psa__level_rows(p, jk, i - 1);
        int64_t row = psa__pooled_row(p, b, hkv, jk, i);
        for (int64_t t = 0; t < n; t++) {
            float *k = w->k + t * d, *v = w->v + t * dv, share[2] = {1, 0}; /* these rows have been read */
            const float *const *rows = w->kp + 2 * t, *const *rows_v = w->vp + 2 * t;
            int pair = 2 * t + 1 < finer;
            if (pair) {
                float apart = 0.5f * scale * scale * f->spread(variance, rows[0], rows[1], d);
                float v_apart = errors && values ? f->spread(one, rows_v[0], rows_v[1], dv) : 0.0f;
                apart = fminf(apart, 1e30f); /* finite: 0 of it may be asked for */
                psa__merge_weights(&g, 2 * t, t, apart, v_apart, share);
            } else {
                g.mass[t] = g.mass[2 * t];
                g.entropy[t] = g.entropy[2 * t];
                g.half[t] = g.half[2 * t];
                g.value[t] = g.value[2 * t];
            }
            f->blend(k, rows[0], share[0], rows[pair], share[1], d);
            if (values) f->blend(v, rows_v[0], share[0], rows_v[pair], share[1], dv);
            f->from_f32(base + p->at_pooled_k + psa__pooled_bytes(p, row + t, d), p->k.type, k, 1.0f, d);
            if (values) f->from_f32(base + p->at_pooled_v + psa__pooled_bytes(p, row + t, dv), p->k.type, v, 1.0f, dv);
            w->kp[t] = k;
            w->vp[t] = v;
            bias[row + t] = g.entropy[t];
            if (p->desc.tilt) bias[row + t] += (float)PSA__LOG2E * psa__ln_cosh(sqrtf(2.0f * g.half[t]));
        }
        if (!errors) continue;
        psa__pool_spread(p, &g, i, n, psa__block_k_rows(p, jk), spread);
        for (int64_t t = 0; i == level && t < n; t++) group_mass[t] = g.mass[t];
        for (int64_t t = 0; i > level && t < psa__ceil_div(psa__block_k_rows(p, jk), group); t++) {
            share_of[(i - level - 1) * (p->desc.block_k / group) + t] = exp2f(group_mass[t] - g.mass[t >> (i - level)]);
        }
    }
}

/* The similarity cap of a block of keys: the coarsest level whose groups' first and last tokens have a mean cosine
 * above the level's threshold; 1 if none has. */
static uint8_t psa__similarity_cap(const psa_plan *p, const float *const *rows, int64_t jk)
{
    int64_t n = psa__block_k_rows(p, jk), d = p->D;
    float norm[PSA_MAX_BLOCK_K];
    int cap = 0;
    for (int64_t i = 0; i < n; i++) norm[i] = sqrtf(p->leaves->dot(rows[i], rows[i], d));
    for (int i = 1; i <= p->desc.n_sim_min; i++) {
        double sum = 0;
        int64_t groups = 0;
        for (int64_t t = 0; t < psa__level_rows(p, jk, i); t++) {
            int64_t c = psa__group_count(p, jk, i, t), x = t << i, y = x + c - 1;
            if (c == 1) continue;
            groups++;
            if (norm[x] > 0 && norm[y] > 0) sum += p->leaves->dot(rows[x], rows[y], d) / (norm[x] * norm[y]);
        }
        if (groups && sum / (double)groups > p->desc.sim_min[i - 1]) cap = i;
    }
    return (uint8_t)(1 << cap);
}

PSA__DEF psa_result psa_pool(const psa_plan *plan, const void *k, const void *v, void *work, int ith, int nth)
{
    psa_plan plan_here;
    const psa_plan *p = &plan_here;
    psa_result r = psa__enter(plan, work, ith, nth, &plan_here);
    char *base = psa__align(work);
    int64_t begin, end;
    psa__scratch w;
    if (r != PSA_OK) return r;
    if (!k) return psa__fail(&p->desc, PSA_ERR_NULL, "k must not be NULL");
    if (p->desc.mask == PSA_MASK_DENSE) return PSA_OK;
    w = psa__scratch_of(p, work, ith);
    psa__share(p->B * p->Hkv * p->nk, ith, nth, &begin, &end);
    for (int64_t task = begin; task < end; task++) {
        int64_t jk = task % p->nk, head = task / p->nk, hkv = head % p->Hkv, b = head / p->Hkv;
        int64_t first = jk * p->desc.block_k, n = psa__block_k_rows(p, jk);
        psa__kv_rows(p, &p->k, k, b, hkv, first, n, w.k, w.kp);
        if (v) psa__kv_rows(p, &p->v, v, b, hkv, first, n, w.v, w.vp);
        if (p->desc.n_sim_min) ((uint8_t *)base)[p->at_cap + (size_t)task] = psa__similarity_cap(p, w.kp, jk);
        if (psa__weighted(p)) {
            psa__pool_weighted(p, base, b, hkv, jk, v != NULL, &w);
            continue;
        }
        psa__pool_block(p, w.kp, p->D, base + p->at_pooled_k, b, hkv, jk, w.k);
        psa__pool_bias(p, (float *)(void *)(base + p->at_bias), b, hkv, jk);
        if (v) psa__pool_block(p, w.vp, p->Dv, base + p->at_pooled_v, b, hkv, jk, w.v);
    }
    return PSA_OK;
}

/* ================================================================================================================= */
/* >>score                                                                                                           */
/* ================================================================================================================= */

/* Query vectors come in lanes: n lanes in tiles of at most max_nv vectors, as even as it goes. */
typedef struct psa__tiles {
    int n;                  /* tiles */
    int nv[PSA_MAX_BLOCK_Q / 4]; /* vectors in each */
} psa__tiles;

static psa__tiles psa__tiles_of(const psa__leaves *f, int64_t lanes)
{
    psa__tiles t;
    int vectors = (int)psa__ceil_div(lanes, f->lanes);
    t.n = (vectors + f->max_nv - 1) / f->max_nv;
    for (int i = 0; i < t.n; i++) t.nv[i] = vectors / t.n + (i < vectors % t.n);
    return t;
}

/* Packs n rows (width d) into query tiles, f32 and scaled, or in so many parts of bf16 and not. The lanes beyond n are
 * zero, their rows those of the scratch. row has room for all lanes. Returns how many there are. */
static int64_t psa__pack_queries(const psa_plan *p, psa__scratch *w, const psa__tiles *tiles, const float **row,
                                 int64_t n, int64_t d, float scale, int parts)
{
    int64_t lanes = psa__ceil_div(n, p->leaves->lanes) * p->leaves->lanes, lane = 0;
    memset(w->rows + n * d, 0, (size_t)((lanes - n) * d) * sizeof(float));
    for (int64_t i = n; i < lanes; i++) row[i] = w->rows + i * d;
    for (int t = 0; t < tiles->n; t++) {
        if (parts) p->leaves->pack_bf16(tiles->nv[t], w->qt + lane * d * parts / 2, row + lane, parts, d);
        else p->leaves->pack(tiles->nv[t], w->qt + lane * d, row + lane, d, scale);
        lane += tiles->nv[t] * p->leaves->lanes;
    }
    return lanes;
}

/* Parts of the queries that are scored: means are f32. */
static int psa__score_parts(const psa_plan *p)
{
    return p->desc.score == PSA_SCORE_POOLED ? 3 : psa__parts(p->q.type);
}

/* Whether scores are products of matrix tiles: keys are read as they are. */
static int psa__scores_matrix(const psa_plan *p)
{
    return p->leaves->tile_products && p->desc.score != PSA_SCORE_ANTIDIAGONAL;
}

/* psa__pack_queries in matrix tiles, unscaled, for n rows of a type and width p->D. */
static int64_t psa__tile_queries(const psa_plan *p, psa__scratch *w, psa__tiles *tiles, psa_type type, int parts,
                                 const float **row, int64_t n)
{
    int64_t each = p->leaves->lanes, size = psa__up_to_32(p->D) / 2 * parts;
    float *none = w->rows + n * p->D;
    tiles->n = (int)psa__ceil_div(n, each);
    if (n % each) memset(none, 0, (size_t)p->D * sizeof(float));
    for (int64_t i = n; i < tiles->n * each; i++) row[i] = none;
    for (int t = 0; t < tiles->n; t++) {
        tiles->nv[t] = 1;
        p->leaves->tile_queries(type, parts, w->qt + t * each * size, row + t * each, p->D);
    }
    return tiles->n * each;
}

/* Offset of the i-th sampled token in a block of n tokens, or -1 if there is none. A ragged block leaves out offsets
 * beyond its end; if that is all of them, the first stands for a token that exists. */
static int64_t psa__sample(const uint8_t *offset, int64_t i, int64_t n)
{
    if (offset[i] < n) return offset[i];
    return i == 0 ? offset[0] % n : -1;
}

static void psa__load_query(const psa_plan *p, const void *q, int64_t b, int64_t h, int64_t i, float *to)
{
    p->leaves->to_f32(to, psa__row(&p->q, &p->desc.order_q, q, b, h, i), p->q.type, p->D);
}

/* mean[D] of the n queries at positions first, first + 1, ... */
static void psa__mean_query(const psa_plan *p, const void *q, int64_t b, int64_t h, int64_t first, int64_t n,
                            psa__scratch *w, float *mean)
{
    float part[PSA_MAX_D];
    for (int64_t i = 0, m; i < n; i += m) {
        m = psa__min(n - i, PSA_MAX_BLOCK_K);
        for (int64_t x = 0; x < m; x++) {
            const char *row = psa__row(&p->q, &p->desc.order_q, q, b, h, first + i + x);
            w->kp[x] = psa__row_f32(p, &p->q, row, w->k + x * p->D);
        }
        p->leaves->mean(i ? part : mean, w->kp, m, p->D);
        if (i) p->leaves->blend(mean, mean, (float)i / (float)(i + m), part, (float)m / (float)(i + m), p->D);
    }
}

/* The query vectors that score block iq go to w->rows from `lanes` on, the token each stands for to w->lane_token.
 * Returns the lanes in use. ANTIDIAGONAL: vectors are groups of stride tokens, reversed, side by side; missing tokens
 * are zero. */
static int64_t psa__score_queries(const psa_plan *p, const void *q, int64_t b, int64_t h, int64_t iq, int64_t lanes,
                                  psa__scratch *w)
{
    int64_t first = iq * p->desc.block_q, n = psa__block_q_rows(p, iq), d = p->D;
    switch (p->desc.score) {
    case PSA_SCORE_SAMPLE:
        for (int64_t i = 0; i < p->n_sample_q; i++) {
            int64_t at = psa__sample(p->sample_q, i, n);
            if (at < 0) break;
            psa__load_query(p, q, b, h, first + at, w->rows + lanes * d);
            w->lane_token[lanes++] = psa__query_token(p, first + at);
        }
        return lanes;
    case PSA_SCORE_ANTIDIAGONAL:
        for (int64_t g = 0; g < n; g += p->desc.stride) {
            for (int64_t i = 0; i < p->desc.stride; i++) {
                int64_t at = g + p->desc.stride - 1 - i;
                float *to = w->rows + (lanes * p->desc.stride + i) * d;
                if (at < n) psa__load_query(p, q, b, h, first + at, to);
                else memset(to, 0, (size_t)d * sizeof(float));
            }
            w->lane_token[lanes++] = psa__query_token(p, first + psa__min(g + p->desc.stride, n) - 1);
        }
        return lanes;
    case PSA_SCORE_POOLED:
        for (int64_t g = 0; g < n; g += p->desc.score_group[0]) {
            int64_t size = psa__min(p->desc.score_group[0], n - g);
            psa__mean_query(p, q, b, h, first + g, size, w, w->rows + lanes * d);
            w->lane_token[lanes++] = psa__query_token(p, first + g + size - 1);
        }
        return lanes;
    case PSA_SCORE_EXACT: break;
    }
    for (int64_t i = 0; i < n; i++) {
        psa__load_query(p, q, b, h, first + i, w->rows + i * d);
        w->lane_token[i] = psa__query_token(p, first + i);
    }
    return n;
}

static const float *psa__score_row(const psa_plan *p, const char *row, float *space)
{
    return psa__scores_matrix(p) ? (const float *)(const void *)row : psa__row_f32(p, &p->k, row, space);
}

/* The key vectors of block jk go to w->kp from `at` on, their biases to w->bias; the first token that each needs to be
 * seen to token[]. Returns their number. */
static int64_t psa__score_keys(const psa_plan *p, const void *k, const char *base, int64_t b, int64_t hkv, int64_t jk,
                               int64_t at, psa__scratch *w, int64_t *token)
{
    int64_t first = jk * p->desc.block_k, n = psa__block_k_rows(p, jk), d = p->D, keys = 0;
    int level = psa__log2(p->desc.score_group[1]);
    const psa_order *o = &p->desc.order_k;
    const float **kp = w->kp + at;
    switch (p->desc.score) {
    case PSA_SCORE_SAMPLE:
        for (int64_t i = 0; i < p->n_sample_k; i++) {
            int64_t offset = psa__sample(p->sample_k, i, n);
            if (offset < 0) break;
            kp[keys] = psa__score_row(p, psa__row(&p->k, o, k, b, hkv, first + offset), w->k + (at + keys) * d);
            token[keys++] = first + offset;
        }
        return keys;
    case PSA_SCORE_ANTIDIAGONAL:
        for (int64_t g = 0; g < n; g += p->desc.stride) {
            float *to = w->k + g * d;
            for (int64_t i = 0; i < p->desc.stride; i++) {
                if (g + i >= n) memset(to + i * d, 0, (size_t)d * sizeof(float));
                else p->leaves->to_f32(to + i * d, psa__row(&p->k, o, k, b, hkv, first + g + i), p->k.type, d);
            }
            kp[keys] = to;
            token[keys++] = first + g;
        }
        return keys;
    case PSA_SCORE_POOLED:
        if (p->desc.score_group[1] == 1) break;
        keys = psa__level_rows(p, jk, level);
        for (int64_t t = 0, row = psa__pooled_row(p, b, hkv, jk, level); t < keys; t++, row++) {
            kp[t] = psa__score_row(p, base + p->at_pooled_k + psa__pooled_bytes(p, row, d), w->k + (at + t) * d);
            w->bias[at + t] = ((const float *)(const void *)(base + p->at_bias))[row];
            token[t] = first + (t << level);
        }
        return keys;
    case PSA_SCORE_EXACT: break;
    }
    psa__kv_rows(p, &p->k, k, b, hkv, first, n, psa__scores_matrix(p) ? NULL : w->k + at * d, kp);
    for (int64_t i = 0; i < n; i++) {
        w->bias[at + i] = 0.0f;
        token[i] = first + i;
    }
    return n;
}

/* Blocks whose keys are scored together: as many as fill a tile. Antidiagonal keys are a block long. */
static int64_t psa__score_batch(const psa_plan *p)
{
    switch (p->desc.score) {
    case PSA_SCORE_SAMPLE: return psa__max(PSA__TILE_K / p->n_sample_k, 1);
    case PSA_SCORE_POOLED: return psa__max(PSA__TILE_K / (p->desc.block_k / p->desc.score_group[1]), 1);
    case PSA_SCORE_ANTIDIAGONAL:
    case PSA_SCORE_EXACT: break;
    }
    return 1;
}

/* first[i] = number of lanes that do not see key i, and the number of (lane, key) pairs that are seen. */
static int64_t psa__score_visible(const psa__scratch *w, int64_t lanes, const int64_t *token, int64_t keys,
                                  int32_t *first)
{
    int64_t pairs = 0, lane = 0;
    for (int64_t i = 0; i < keys; i++) {
        while (lane < lanes && w->lane_token[lane] < token[i]) lane++;
        first[i] = (int32_t)lane;
        pairs += lanes - lane;
    }
    return pairs;
}

/* Total variance of the values of a KV head: inside the blocks, and of their means. */
static float psa__value_variance(const psa_plan *p, const char *base, int64_t head)
{
    const float *spread = (const float *)(const void *)(base + p->at_spread) + head * p->nk * psa__spread_size(p);
    const char *mean = base + p->at_pooled_v +
                       psa__pooled_bytes(p, head * p->pooled_rows + p->level_row[p->n_levels - 1], p->Dv);
    double inside = 0, between = 0, n = (double)p->nk;
    for (int64_t jk = 0; jk < p->nk; jk++) inside += spread[(jk + 1) * psa__spread_size(p) - 1];
    for (int64_t x = 0; x < p->Dv; x++) {
        double sum = 0, square = 0;
        for (int64_t jk = 0; jk < p->nk; jk++) {
            double m = psa__element(p->k.type, mean, jk * p->Dv + x);
            sum += m;
            square += m * m;
        }
        between += square / n - sum / n * (sum / n);
    }
    return (float)(inside / n + between);
}

/* What predicts the errors of the blocks of a KV head: w->errors, but for plane. */
static void psa__score_errors(const psa_plan *p, const char *base, int64_t head, psa__scratch *w)
{
    float *spread = (float *)(uintptr_t)(base + p->at_spread), *shift = w->shift;
    const float *bias = (const float *)(const void *)(base + p->at_bias);
    float group = (float)p->desc.score_group[1], total = p->Dv > 0 ? psa__value_variance(p, base, head) : 0.0f;
    float unit = total > 0 ? 1.0f / total : 0.0f;
    for (int64_t jk = 0; jk < p->nk; jk++, shift += psa__shift_size(p)) {
        psa__errors *e = w->errors + jk;
        const float *variance = spread + (head * p->nk + jk + 1) * psa__spread_size(p) - (p->n_levels - 1);
        *e = psa__errors_layout(p, spread + (head * p->nk + jk) * psa__spread_size(p));
        e->rows = (int)psa__level_rows(p, jk, e->fine);
        e->shift = shift;
        for (int i = 0; i < e->fine; i++) e->value[i] = variance[i] * unit / group;
        for (int i = 0; i < e->coarse; i++) {
            float more = variance[e->fine + i] - variance[e->fine - 1], *to = shift + i * e->groups;
            const float *own = bias + psa__pooled_row(p, 0, head, jk, e->fine);
            memcpy(to, bias + psa__pooled_row(p, 0, head, jk, e->fine + 1 + i),
                   (size_t)psa__level_rows(p, jk, e->fine + 1 + i) * sizeof *to);
            for (int g = 0; g < e->rows; g++) to[g >> (i + 1)] -= own[g] * e->share[i * e->groups + g];
            e->value[e->fine + i] = more > 0 ? more * unit : 0.0f;
        }
    }
}

/* Products of n keys in matrix tiles with the t-th vector of queries in w->qt. */
static void psa__matrix_logits(const psa_plan *p, const psa__scratch *w, const float *kt, int q_parts, int64_t t,
                               int64_t n, float *s)
{
    int64_t d = psa__up_to_32(p->D), lanes = p->leaves->lanes;
    p->leaves->tile_products(kt, psa__parts(p->k.type), w->qt + t * lanes * q_parts * d / 2, q_parts, d / 32, 0, s,
                             psa__ceil_div(n, 16));
}

/* Maximum, and sum if wanted, of every lane over each of n blocks from jk on: their rows of w->bm and w->bs; the pairs
 * seen to w->rank[0]. */
static void psa__score_blocks(const psa_plan *p, const void *k, const char *base, int64_t b, int64_t hkv, int64_t jk,
                              int64_t n, int64_t whole, const psa__tiles *tiles, int64_t lanes, int64_t padded,
                              int sums, psa__scratch *w)
{
    int64_t token[PSA_MAX_BLOCK_K], start[PSA__TILE_K + 1], lane = 0, d = p->D, keys = 0;
    int matrix = psa__scores_matrix(p);
    const psa__leaves *f = p->leaves;
    int biased = p->desc.mask == PSA_MASK_ERROR ||
                 (p->desc.score == PSA_SCORE_POOLED && p->desc.score_group[1] < p->desc.block_k);
    float *bias = biased ? w->bias : NULL;
    if (p->desc.score == PSA_SCORE_ANTIDIAGONAL) d *= p->desc.stride;
    for (int64_t i = 0; i < n; i++) {
        start[i] = keys;
        keys += psa__score_keys(p, k, base, b, hkv, jk + i, keys, w, token + keys);
        w->rank[0][jk + i] = (uint32_t)(lanes * (keys - start[i]));
        if (jk + i < whole) continue;
        w->rank[0][jk + i] = (uint32_t)psa__score_visible(w, lanes, token + start[i], keys - start[i],
                                                          w->first + start[i]);
    }
    start[n] = keys;
    if (matrix) f->tile_keys(p->k.type, w->k, w->kp, keys, d, NULL);
    else psa__pad_keys(w->kp, bias, keys);
    for (int t = 0; t < tiles->n; t++) {
        int64_t width = tiles->nv[t] * f->lanes;
        if (matrix) {
            psa__matrix_logits(p, w, w->k, psa__score_parts(p), t, keys, w->s);
            f->tile_logits(w->s, keys, (float)(p->desc.scale * PSA__LOG2E), bias, w->top);
        } else {
            f->qk(tiles->nv[t], w->qt + lane * d, w->kp, keys, d, bias, w->s, w->top, NULL);
        }
        for (int64_t i = 0; i < n; i++) {
            int64_t row = (jk + i) * padded + lane, from = start[i], m = start[i + 1] - from;
            int32_t first[PSA_MAX_BLOCK_K];
            if (p->desc.mask == PSA_MASK_ERROR) {
                w->errors[jk + i].plane = p->nk * padded;
                f->block_error(tiles->nv[t], w->s + from * width, &w->errors[jk + i], w->bm + row, w->bs + row,
                               w->x + row);
                continue;
            }
            for (int64_t x = 0; jk + i >= whole && x < m; x++) first[x] = w->first[from + x] - (int32_t)lane;
            f->block_max(tiles->nv[t], w->s + from * width, m, jk + i >= whole ? first : NULL, w->bm + row,
                         sums ? w->bs + row : NULL);
        }
        lane += width;
    }
}

/* Scales a row to sum 1; a row without mass becomes uniform. */
static void psa__normalise(const psa__leaves *f, float *row, int64_t n)
{
    double sum = 0, part[4] = {0, 0, 0, 0};
    for (int64_t j = 0; j < n; j++) part[j % 4] += row[j];
    for (int i = 0; i < 4; i++) sum += part[i];
    for (int64_t j = 0; !(sum > 0) && j < n; j++) row[j] = 1.0f;
    f->scale(row, (float)(1 / (sum > 0 ? sum : (double)n)), n);
}

/* A price as one of PSA__PRICES steps. */
static int psa__price(float x)
{
    enum { LOWEST = (127 - 48) << 9 }; /* 2^-48, in the exponent and the first 9 bits of the mantissa */
    int price = x > 0 ? (int)(psa__bits(x) >> 14) - LOWEST : 0;
    return price < 0 ? 0 : price >= PSA__PRICES ? PSA__PRICES - 1 : price;
}

/* In the middle of the step. */
static float psa__price_of(int price) { return psa__float(((uint32_t)price + ((127 - 48) << 9)) << 14 | 0x2000u); }

/* The multiply-adds of a level, as a share of those of level 1: the i-th level is 1 << i, the last, `skip`, nothing. */
static float psa__level_cost(int i, int skip) { return i == skip ? 0.0f : 1.0f / (float)(1 << i); }

/* From what block_error left of a row's lanes: the steps of its n blocks. The one that is dearest to skip is never
 * skipped, so that no row is empty: it stays at the level that saves most for what it costs. */
static void psa__row_steps(const psa_plan *p, int64_t lane, int64_t lanes, int64_t padded, int64_t n, psa__scratch *w,
                           uint16_t *steps)
{
    float per_cost[PSA_MAX_LEVELS][PSA_MAX_LEVELS + 1], z[PSA_MAX_BLOCK_Q];
    int levels = p->n_levels, last = p->desc.skip_mean ? levels - 1 : levels;
    int64_t stride = p->nk + 16, dearest = 0, width = p->leaves->lanes; /* whole vectors, with others' lanes at 0 */
    int64_t first = lane / width * width, end = psa__ceil_div(lane + lanes, width) * width;
    uint16_t *kept, price;
    for (int i = 0; i < levels; i++) {
        for (int j = i + 1; j <= levels; j++) {
            float saved = psa__level_cost(i, levels) - psa__level_cost(j, levels);
            per_cost[i][j] = 1.0f / (saved * (float)lanes);
        }
    }
    for (int64_t i = first; i < end; i++) z[i - first] = i >= lane && i < lane + lanes ? w->l[i] : 0.0f;
    p->leaves->row_error(end - first, padded, n, levels, w->bm + first, w->x + first, p->nk * padded, z, w->error,
                         stride);
    p->leaves->hull(w->error, stride, n, last, per_cost);
    for (int64_t jk = 0; jk < n; jk++) {
        uint16_t *step = steps + jk * levels;
        for (int i = 0; i < last; i++) step[i] = (uint16_t)psa__price(w->error[i * stride + jk]);
        for (int i = last; i < levels; i++) step[i] = PSA__PRICES; /* never */
        if (step[levels - 1] > steps[dearest * levels + levels - 1]) dearest = jk;
    }
    kept = steps + dearest * levels;
    price = kept[levels - 1];
    for (int i = levels - 1; i >= 0 && kept[i] == price; i--) kept[i] = PSA__PRICES;
}

/* Rows iq .. iq+m-1 of a head's score map, which go together. */
static void psa__score_rows(const psa_plan *p, const void *q, const void *k, char *base, int64_t b, int64_t h,
                            int64_t iq, int64_t m, psa__scratch *w, float *row)
{
    const psa_desc *desc = &p->desc;
    int64_t n = psa__n_visible(p, iq + m - 1), whole = psa__n_whole(p, iq), hkv = h / (p->Hq / p->Hkv), d = p->D;
    int64_t lanes = 0, padded, batch = psa__score_batch(p), together = psa__score_together(p);
    int sample = desc->score == PSA_SCORE_SAMPLE, use_max = sample && !desc->score_mean;
    int norm = !sample || desc->score_norm, sums = norm || !use_max;
    float scale = (float)(desc->scale * PSA__LOG2E);
    psa__tiles tiles;
    const float *queries[PSA_MAX_BLOCK_Q];
    for (int64_t x = 0; x < m; x++) lanes = psa__score_queries(p, q, b, h, iq + x, lanes, w);
    tiles = psa__tiles_of(p->leaves, lanes);
    if (desc->score == PSA_SCORE_ANTIDIAGONAL) {
        d *= desc->stride;
        scale /= (float)desc->stride;
    }
    for (int64_t i = 0; i < lanes; i++) queries[i] = w->rows + i * d;
    padded = psa__scores_matrix(p)
                 ? psa__tile_queries(p, w, &tiles, PSA_F32, psa__score_parts(p), queries, lanes)
                 : psa__pack_queries(p, w, &tiles, queries, lanes, d, scale, 0);
    for (int64_t jk = 0; jk < n; jk += batch) {
        psa__score_blocks(p, k, base, b, hkv, jk, psa__min(batch, n - jk), whole, &tiles, lanes, padded, sums, w);
    }
    p->leaves->row_mass(padded, lanes, together > 1 ? psa__score_each(p) : padded, n, w->bm,
                        sums ? w->bs : NULL, use_max, norm, w->l, row, p->nk);
    if (desc->mask == PSA_MASK_ERROR) {
        uint16_t *steps = (uint16_t *)(void *)(base + p->at_steps) +
                          ((b * p->Hq + h) * p->nq + iq) * p->nk * p->n_levels;
        int64_t each = together > 1 ? psa__score_each(p) : lanes;
        for (int64_t x = 0; x < m; x++, steps += p->nk * p->n_levels) {
            psa__row_steps(p, x * each, psa__min(each, lanes - x * each), padded, n, w, steps);
        }
    }
    for (int64_t jk = 0; sample && !use_max && jk < n; jk++) row[jk] /= (float)psa__max(w->rank[0][jk], 1);
    for (int64_t x = 0; x < m; x++, row += p->nk) {
        int64_t seen = psa__n_visible(p, iq + x);
        psa__normalise(p->leaves, row, seen);
        for (int64_t jk = seen; jk < p->nk; jk++) row[jk] = 0.0f;
    }
}

PSA__DEF psa_result psa_score(const psa_plan *plan, const void *q, const void *k, void *work, float *scores, int ith,
                              int nth)
{
    psa_plan plan_here;
    const psa_plan *p = &plan_here;
    psa_result r = psa__enter(plan, work, ith, nth, &plan_here);
    int64_t begin, end, together, tasks;
    unsigned mode;
    psa__scratch w;
    if (r != PSA_OK) return r;
    if (p->desc.mask == PSA_MASK_DENSE) return PSA_OK;
    if (!q || !k || (!scores && p->desc.mask != PSA_MASK_ERROR)) {
        return psa__fail(&p->desc, PSA_ERR_NULL, "q, k and scores must not be NULL");
    }
    w = psa__scratch_of(p, work, ith);
    together = psa__score_together(p);
    tasks = psa__ceil_div(p->nq, together);
    psa__share(p->B * p->Hq * tasks, ith, nth, &begin, &end);
    mode = p->leaves->enter();
    for (int64_t task = begin; task < end; task++) {
        int64_t iq = task % tasks * together, head = task / tasks;
        if (p->desc.mask == PSA_MASK_ERROR && (iq == 0 || task == begin)) {
            int64_t kv = head / p->Hq * p->Hkv + head % p->Hq / (p->Hq / p->Hkv);
            psa__score_errors(p, psa__align(work), kv, &w);
        }
        psa__score_rows(p, q, k, psa__align(work), head / p->Hq, head % p->Hq, iq, psa__min(together, p->nq - iq), &w,
                        scores ? scores + (head * p->nq + iq) * p->nk : w.score);
    }
    p->leaves->leave(mode);
    return PSA_OK;
}

/* ================================================================================================================= */
/* >>mask                                                                                                            */
/* ================================================================================================================= */

/* A key that sorts ascending where x descends; NaN comes last. */
static uint32_t psa__sort_key(float x)
{
    uint32_t u = psa__bits(x + 0.0f); /* -0 becomes +0 */
    if (x != x) return UINT32_MAX;
    return (u & 0x80000000u) != 0 ? u : ~(u | 0x80000000u);
}

/* Of blocks 0..n-1, whose keys are in key[1], those that share a part of the keys' range with the first `need`: to
 * rank[0] and key[0], in order. Returns how many they are. */
static int64_t psa__rank_select(psa__scratch *w, int64_t n, int64_t need)
{
    enum { PARTS = 2048 };
    uint32_t count[PARTS] = {0}, least = UINT32_MAX, most = 0, end = 0;
    int64_t m = 0;
    int shift = 0;
    for (int64_t j = 0; j < n; j++) {
        least = w->key[1][j] < least ? w->key[1][j] : least;
        most = w->key[1][j] > most ? w->key[1][j] : most;
    }
    while ((most - least) >> shift >= PARTS) shift++;
    for (int64_t j = 0; j < n; j++) count[(w->key[1][j] - least) >> shift]++;
    for (int64_t seen = 0; seen < need; end++) seen += count[end];
    for (int64_t j = 0; j < n; j++) {
        uint32_t key = w->key[1][j];
        w->rank[0][m] = (uint32_t)j;
        w->key[0][m] = key;
        m += (key - least) >> shift < end;
    }
    return m;
}

/* The first `need` of blocks 0..n-1 by descending score, ties by index. What cannot be among them is left out, the rest
 * goes through a stable radix sort, a byte at a time. The result is w->rank[0]. */
static const uint32_t *psa__rank(psa__scratch *w, const float *score, int64_t n, int64_t need)
{
    int64_t m = n;
    for (int64_t j = 0; j < n; j++) {
        w->rank[0][j] = (uint32_t)j;
        w->key[need < n][j] = psa__sort_key(score[j]);
    }
    if (need < n) m = psa__rank_select(w, n, need);
    for (int shift = 0; shift < 32; shift += 8) {
        int from = shift / 8 % 2, to = 1 - from;
        uint32_t start[257] = {0};
        for (int64_t j = 0; j < m; j++) start[(w->key[from][j] >> shift & 255u) + 1]++;
        for (int i = 0; i < 256; i++) start[i + 1] += start[i];
        for (int64_t j = 0; j < m; j++) {
            uint32_t at = start[w->key[from][j] >> shift & 255u]++;
            w->key[to][at] = w->key[from][j];
            w->rank[to][at] = w->rank[from][j];
        }
    }
    return w->rank[0];
}

/* Index of the finest level that gets any share. */
static int psa__finest(const psa_desc *d, int n_ends)
{
    int i = 0;
    while (i < n_ends - 1 && d->level_end[i] == 0) i++;
    return i;
}

/* Where levels 1, 2, 4, ... end in rank order, from shares or numbers of blocks. Returns how many levels there are. */
static int psa__topk_ends(const psa_plan *p, int64_t n, int64_t end[PSA_MAX_LEVELS])
{
    const psa_desc *d = &p->desc;
    int64_t blocks = 0;
    int counted = 0, ends = psa__n_ends(d), finest = psa__finest(d, ends);
    for (int i = 0; i < PSA_MAX_LEVELS; i++) {
        if (d->level_count[i] > 0 && !counted++) finest = i;
    }
    if (counted) ends = PSA_MAX_LEVELS;
    for (int i = 0; i < ends; i++) {
        blocks = counted ? blocks + d->level_count[i] : psa__max((int64_t)floor(d->level_end[i] * (double)n), blocks);
        if (i == finest) blocks = psa__max(blocks, 1);
        end[i] = psa__min(blocks, n);
    }
    return ends;
}

/* Position in rank order to level. */
static void psa__mask_topk(const psa_plan *p, psa__scratch *w, const float *score, int64_t n, uint8_t *level)
{
    int64_t end[PSA_MAX_LEVELS] = {0}, position = 0;
    int ends = psa__topk_ends(p, n, end);
    const uint32_t *rank = psa__rank(w, score, n, end[ends - 1]);
    memset(level, 0, (size_t)n);
    for (int i = 0; i < ends; i++) {
        for (; position < end[i]; position++) level[rank[position]] = (uint8_t)(1 << i);
    }
}

/* Score mass ahead (or with inclusive, up to and including the block) to level. */
static void psa__mask_threshold(const psa_plan *p, psa__scratch *w, const float *score, int64_t n, uint8_t *level)
{
    const psa_desc *d = &p->desc;
    const uint32_t *rank = psa__rank(w, score, n, n);
    int ends = psa__n_ends(d), finest = psa__finest(d, ends), i = 0;
    int64_t full = d->min_full > 0 ? (int64_t)floor(d->min_full * (double)n) + 1 : 0;
    double total = 0, ahead = 0;
    for (int64_t j = 0; j < n; j++) total += score[j] > 0 ? score[j] : 0;
    for (int64_t position = 0; position < n; position++) {
        uint32_t j = rank[position];
        double own = total > 0 ? (score[j] > 0 ? score[j] / total : 0) : 1.0 / (double)n;
        while (i < ends && d->level_end[i] + 1e-6 < ahead + (d->inclusive ? own : 0)) i++;
        level[j] = (uint8_t)(i < ends ? 1 << i : 0);
        if (d->inclusive && position == 0) level[j] = (uint8_t)(1 << finest);
        if (position < full) level[j] = 1;
        ahead += own;
    }
}

static void psa__mask_cap(const uint8_t *cap, int64_t n, uint8_t *level)
{
    for (int64_t j = 0; j < n; j++) {
        if (level[j] > cap[j]) level[j] = cap[j];
    }
}

/* Level 1 for KV blocks holding tokens [from,to), as far as they are among the first n. */
static void psa__mask_full(const psa_plan *p, int64_t from, int64_t to, int64_t n, uint8_t *level)
{
    from = psa__max(from, 0);
    to = psa__min(to, p->Nk);
    if (from >= to) return;
    n = psa__min(n, psa__ceil_div(to, p->desc.block_k));
    for (int64_t j = from / p->desc.block_k; j < n; j++) level[j] = 1;
}

static void psa__mask_protect(const psa_plan *p, int64_t iq, int64_t n, uint8_t *level)
{
    const psa_desc *d = &p->desc;
    int64_t row = iq * d->block_q, end_row = row + psa__block_q_rows(p, iq);
    int64_t token = psa__query_token(p, row), end_token = token + (end_row - row);
    int protected_q = (d->n_prefix > 0 && token < d->n_prefix && end_token > 0) ||
                      (d->n_suffix > 0 && end_row > p->Nq - d->n_suffix);
    psa__mask_full(p, 0, d->n_prefix, n, level);
    psa__mask_full(p, p->Nk - psa__min(d->n_suffix, p->Nk), p->Nk, n, level);
    if (d->sink) psa__mask_full(p, 0, 1, n, level);
    if (d->diagonal) psa__mask_full(p, token, end_token, n, level);
    if (protected_q) memset(level, 1, (size_t)n);
}

static const uint8_t *psa__cap_of(const psa_plan *p, const void *work, int64_t b, int64_t h)
{
    if (!p->desc.n_sim_min) return NULL;
    return (const uint8_t *)psa__align_const(work) + p->at_cap +
           (size_t)((b * p->Hkv + h / (p->Hq / p->Hkv)) * p->nk);
}

/* ---- density: every block has its prices, and one price for the call or the head meets the budget ---- */

/* Levels that a block goes through as the price rises, before it is skipped. */
static int psa__n_steps(const psa_plan *p)
{
    return p->desc.mask == PSA_MASK_ERROR ? p->n_levels : psa__n_ends(&p->desc);
}

/* TOPK and THRESHOLD with level_end scaled by 1 / price: a block with share or mass P ahead leaves level i when
 * price > level_end[i] / P. The shares of TOPK are dithered over the rows, since a row can only end at whole blocks. */
static void psa__mask_steps(const psa_plan *p, psa__scratch *w, const float *score, int64_t iq, int64_t n)
{
    const psa_desc *d = &p->desc;
    const uint32_t *rank = psa__rank(w, score, n, n);
    int ends = psa__n_ends(d), finest = psa__finest(d, ends), topk = d->mask == PSA_MASK_TOPK;
    int64_t full = !topk && d->min_full > 0 ? (int64_t)floor(d->min_full * (double)n) + 1 : 0;
    double total = 0, ahead = 0, whole, phase = modf((double)iq * 0.6180339887498949, &whole);
    for (int64_t j = 0; j < n; j++) total += score[j] > 0 ? score[j] : 0;
    for (int64_t position = 0; position < n; position++) {
        uint32_t j = rank[position];
        double own = total > 0 ? (score[j] > 0 ? score[j] / total : 0) : 1.0 / (double)n;
        double P = topk ? ((double)position + 1 - phase) / (double)n : ahead + (d->inclusive ? own : 0);
        int keeps = position < full ? 0 : position == 0 && (topk || d->inclusive) ? finest : P > 1e-6 ? ends : 0;
        for (int i = 0; i < ends; i++) {
            w->steps[j * (uint32_t)ends + (uint32_t)i] =
                (uint16_t)(i >= keeps ? PSA__PRICES : psa__price((float)(d->level_end[i] / P)));
        }
        ahead += own;
    }
}

/* Blocks of a row that are level 1 at any price. */
static void psa__mask_fixed(const psa_plan *p, int64_t iq, int64_t n, uint8_t *full)
{
    memset(full, 0, (size_t)n);
    psa__mask_protect(p, iq, n, full);
    for (int64_t j = psa__n_whole(p, iq); j < n; j++) full[j] = 1;
}

/* What the i-th level of `n_steps` costs in the end, in parts of PSA_MAX_BLOCK_K; cap: the coarsest level, or 0. */
static uint64_t psa__final_cost(const psa_plan *p, int i, int n_steps, int cap)
{
    int level = i < n_steps ? 1 << i : p->desc.skip_mean ? p->desc.block_k : 0;
    if (i < n_steps && cap && level > cap) level = cap;
    return level ? (uint64_t)(PSA_MAX_BLOCK_K / level) : 0;
}

/* A row's blocks into a table: what leaving a level saves at each price; then what all cost at price 0, and how many
 * they are. */
static void psa__price_row(const psa_plan *p, const uint16_t *steps, const uint8_t *cap, int64_t iq, psa__scratch *w,
                           uint64_t *prices)
{
    int64_t n = psa__n_visible(p, iq);
    int n_steps = psa__n_steps(p);
    psa__mask_fixed(p, iq, n, w->full);
    for (int64_t j = 0; j < n; j++, steps += n_steps) {
        uint64_t cost = w->full[j] ? PSA_MAX_BLOCK_K : psa__final_cost(p, 0, n_steps, cap ? cap[j] : 0);
        prices[PSA__PRICES] += cost;
        for (int i = 0; !w->full[j] && i < n_steps && steps[i] < PSA__PRICES; i++) {
            uint64_t next = psa__final_cost(p, i + 1, n_steps, cap ? cap[j] : 0);
            prices[steps[i]] += cost - next;
            cost = next;
        }
    }
    prices[PSA__PRICES + 1] += (uint64_t)n;
}

/* Levels are left whose price is below this, in this head. */
static int psa__cut(const psa_plan *p, const void *work, int64_t head)
{
    const uint64_t *prices = (const uint64_t *)(const void *)(psa__align_const(work) + p->at_prices);
    int64_t first = p->desc.density_per_head ? head : 0, end = p->desc.density_per_head ? head + 1 : psa__budgets(p);
    double cost = 0, pairs = 0, off, next;
    int cut = 0;
    if (p->desc.density == 0) return psa__price((float)p->desc.lambda);
    for (int64_t i = first; i < end; i++) {
        cost += (double)prices[i * (PSA__PRICES + 2) + PSA__PRICES];
        pairs += (double)prices[i * (PSA__PRICES + 2) + PSA__PRICES + 1];
    }
    off = cost - p->desc.density * PSA_MAX_BLOCK_K * pairs;
    for (; cut < PSA__PRICES && off > 0; cut++, off = next) {
        next = off;
        for (int64_t i = first; i < end; i++) next -= (double)prices[i * (PSA__PRICES + 2) + cut];
        if (-next > off) break; /* it was closer before */
    }
    return cut;
}

static void psa__mask_priced(const psa_plan *p, const uint16_t *steps, int cut, int64_t n, uint8_t *level)
{
    int n_steps = psa__n_steps(p);
    for (int64_t j = 0; j < n; j++, steps += n_steps) {
        int i = 0;
        while (i < n_steps && steps[i] < cut) i++;
        level[j] = (uint8_t)(i < n_steps ? 1 << i : 0);
    }
}

/* The steps of a row: mask ERROR's are in work, the others are made from its scores. */
static const uint16_t *psa__steps_of(const psa_plan *p, const float *scores, const void *work, int64_t row,
                                     psa__scratch *w)
{
    int64_t iq = row % p->nq;
    if (p->desc.mask == PSA_MASK_ERROR) {
        return (const uint16_t *)(const void *)(psa__align_const(work) + p->at_steps) + row * p->nk * p->n_levels;
    }
    psa__mask_steps(p, w, scores + row * p->nk, iq, psa__n_visible(p, iq));
    return w->steps;
}

/* Are levels chosen by a common price? */
static int psa__priced(const psa_plan *p)
{
    return p->desc.mask != PSA_MASK_DENSE && (p->desc.density > 0 || p->desc.mask == PSA_MASK_ERROR);
}

PSA__DEF psa_result psa_budget(const psa_plan *plan, const float *scores, void *work, int ith, int nth)
{
    psa_plan plan_here;
    const psa_plan *p = &plan_here;
    psa_result r = psa__enter(plan, work, ith, nth, &plan_here);
    const size_t size = PSA__PRICES + 2;
    uint64_t *prices;
    int64_t begin, end, first, last;
    psa__scratch w;
    if (r != PSA_OK) return r;
    if (p->desc.mask == PSA_MASK_DENSE || p->desc.density == 0) return PSA_OK;
    if (!scores && p->desc.mask != PSA_MASK_ERROR) {
        return psa__fail(&p->desc, PSA_ERR_NULL, "scores must not be NULL");
    }
    w = psa__scratch_of(p, work, ith);
    prices = (uint64_t *)(void *)(psa__align(work) + p->at_prices);
    psa__share(psa__budgets(p), ith, nth, &first, &last);
    memset(prices + (size_t)first * size, 0, (size_t)(last - first) * size * sizeof *prices);
    psa__share(p->B * p->Hq, ith, nth, &begin, &end);
    for (int64_t head = begin; head < end; head++) {
        uint64_t *own = prices + (size_t)(p->desc.density_per_head ? head : first) * size;
        const uint8_t *cap = psa__cap_of(p, work, head / p->Hq, head % p->Hq);
        for (int64_t iq = 0; iq < p->nq; iq++) {
            psa__price_row(p, psa__steps_of(p, scores, work, head * p->nq + iq, &w), cap, iq, &w, own);
        }
    }
    return PSA_OK;
}

PSA__DEF psa_result psa_predicted_error(const psa_plan *plan, const void *work, const uint8_t *levels, int64_t b,
                                        int64_t h, double *error)
{
    const uint16_t *steps;
    double sum = 0, rows = 0;
    if (!plan || !work || !levels || !error) return PSA_ERR_NULL;
    if (plan->desc.mask != PSA_MASK_ERROR) return psa__fail(&plan->desc, PSA_ERR_MASK, "only mask ERROR predicts");
    if (b < -1 || b >= plan->B || h < -1 || h >= plan->Hq) return PSA_ERR_SHAPE;
    steps = (const uint16_t *)(const void *)(psa__align_const(work) + plan->at_steps);
    for (int64_t row = 0; row < plan->B * plan->Hq * plan->nq; row++) {
        int64_t head = row / plan->nq, n = psa__block_q_rows(plan, row % plan->nq);
        if ((b >= 0 && head / plan->Hq != b) || (h >= 0 && head % plan->Hq != h)) continue;
        for (int64_t pair = row * plan->nk; pair < (row + 1) * plan->nk; pair++) {
            int level = levels[pair] ? psa__log2(levels[pair]) : plan->n_levels;
            for (int i = 0; i < level && i < plan->n_levels; i++) {
                float saved = psa__level_cost(i, plan->n_levels) - psa__level_cost(i + 1, plan->n_levels);
                sum += (double)(psa__price_of(steps[pair * plan->n_levels + i]) * saved) * (double)n;
            }
        }
        rows += (double)n;
    }
    *error = sum / rows;
    return PSA_OK;
}

/* ---- a row of the level map ---- */

/* From one row of scores, or with steps from those. cap is the head's, or NULL. */
static void psa__mask_row(const psa_plan *p, const float *score, const uint16_t *steps, int cut, const uint8_t *cap,
                          int64_t iq, psa__scratch *w, uint8_t *level)
{
    const psa_desc *d = &p->desc;
    int64_t n = psa__n_visible(p, iq), whole = psa__n_whole(p, iq);
    if (d->mask == PSA_MASK_DENSE) {
        memset(level, 1, (size_t)n);
    } else {
        if (steps) psa__mask_priced(p, steps, cut, n, level);
        else if (d->mask == PSA_MASK_TOPK) psa__mask_topk(p, w, score, n, level);
        else psa__mask_threshold(p, w, score, n, level);
        if (cap) psa__mask_cap(cap, n, level);
        psa__mask_protect(p, iq, n, level);
    }
    memset(level + n, 0, (size_t)(p->nk - n));
    for (int64_t j = whole; j < n; j++) level[j] = 1;
    for (int64_t j = 0; d->skip_mean && j < n; j++) {
        if (level[j] == 0) level[j] = (uint8_t)d->block_k;
    }
}

PSA__DEF psa_result psa_mask(const psa_plan *plan, const float *scores, void *work, uint8_t *levels, int ith, int nth)
{
    psa_plan plan_here;
    const psa_plan *p = &plan_here;
    psa_result r = psa__enter(plan, work, ith, nth, &plan_here);
    int64_t begin, end;
    int priced, cut = 0;
    psa__scratch w;
    if (r != PSA_OK) return r;
    if (!levels || (!scores && p->desc.mask != PSA_MASK_DENSE && p->desc.mask != PSA_MASK_ERROR)) {
        return psa__fail(&p->desc, PSA_ERR_NULL, "scores and levels must not be NULL");
    }
    w = psa__scratch_of(p, work, ith);
    priced = psa__priced(p);
    psa__share(p->B * p->Hq * p->nq, ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        int64_t iq = row % p->nq, head = row / p->nq;
        const uint8_t *cap = psa__cap_of(p, work, head / p->Hq, head % p->Hq);
        const uint16_t *steps = priced ? psa__steps_of(p, scores, work, row, &w) : NULL;
        if (priced && (row == begin || (iq == 0 && p->desc.density_per_head))) {
            cut = psa__cut(p, work, head);
        }
        psa__mask_row(p, scores ? scores + row * p->nk : NULL, steps, cut, cap, iq, &w, levels + row * p->nk);
    }
    return PSA_OK;
}

/* ================================================================================================================= */
/* >>attend                                                                                                          */
/* ================================================================================================================= */

/* Keys that are attended to at once: rows in stream order, any mix of levels. */
typedef struct psa__tile {
    const float **k, **v;    /* the rows as they are in memory, of K's type */
    float *bias;
    int32_t *first;          /* first lane that sees the key */
    int64_t n;
    int pooled, straddles;   /* whether any of them has a bias, or is hidden from some lane */
} psa__tile;

/* What a query block reads: a tile that is filled while the one before it waits, so that its rows are known, and
 * prefetched, before they are needed. */
typedef struct psa__stream {
    const psa_plan *p;
    const void *k, *v;
    const char *base;        /* aligned workspace */
    psa__scratch w;
    psa__tiles tiles;
    int64_t b, hkv, iq;
    int64_t heads;           /* query heads of the block: row i is query i / heads of head i % heads */
    int width;               /* of psa__few, if the query rows are few enough for it; else 0 */
    int64_t copied;          /* the KV head whose rows are in w.head_k and w.head_v; -1: none is copied */
    psa_type type;           /* of the rows that are read */
    int in_place;            /* they are read where they are */
    psa__tile tile[2];
    psa__tile *full, *next;  /* what waits, and what is filled */
    int64_t rows;            /* rows read so far by this query block */
    int64_t n, next_n;       /* query rows of the block and of the one after it, and where they are */
    const float *q[PSA_MAX_BLOCK_Q], *next_q[PSA_MAX_BLOCK_Q];
    const float *out[PSA_MAX_BLOCK_Q];
} psa__stream;

/* o += V^T s for a tile that some lanes do not see in full and whose V holds Inf or NaN: a hidden key has weight 0,
 * but 0 * Inf is NaN, so it must not be touched at all. Element x of a lane's output is
 * o[x * next_x + lane * next_lane]; the first lane is the block's `begin`. */
static void psa__pv_hidden(psa__stream *st, const psa__tile *tile, const float *s, psa_type type, int64_t begin,
                           int64_t width, float *o, int64_t next_x, int64_t next_lane)
{
    for (int64_t key = 0; key < tile->n; key++) {
        for (int64_t x = 0; x < st->p->Dv; x++) {
            float v = psa__element(type, tile->v[key], x);
            for (int64_t lane = psa__max(tile->first[key] - begin, 0); lane < width; lane++) {
                o[x * next_x + lane * next_lane] += s[key * width + lane] * v;
            }
        }
    }
}

static int psa__v_finite(const psa__stream *st, const psa__tile *tile, psa_type type)
{
    for (int64_t key = 0; key < tile->n; key++) {
        for (int64_t x = 0; x < st->p->Dv; x++) {
            if (!psa__finite(psa__element(type, tile->v[key], x))) return 0;
        }
    }
    return 1;
}

/* n rows of width d as f32: where they are, or in space. */
static void psa__widen_rows(const psa__stream *st, const float **rows, int64_t n, int64_t d, float *space)
{
    for (int64_t i = 0; i < n && !st->in_place; i++, space += d) {
        st->p->leaves->to_f32(space, rows[i], st->type, d);
        rows[i] = space;
    }
}

/* What is prefetched under Q K^T or P V of the t-th query tile: first of all V of the tile, last K of the next one,
 * and under the first tile of keys the rows of out and of the next query block. */
static psa__ahead psa__ahead_of(const psa__stream *st, const psa__tile *tile, int t, int is_pv)
{
    const psa_plan *p = st->p;
    psa__ahead v = {tile->v, tile->n, (size_t)p->Dv * psa_type_size(st->type)};
    psa__ahead k = {st->next->k, psa__min(tile->n, st->next->n), (size_t)p->D * psa_type_size(st->type)};
    psa__ahead q = {st->next_q, st->next_n, (size_t)p->D * psa_type_size(p->q.type)};
    psa__ahead out = {st->out, st->n, (size_t)p->Dv * psa_type_size(p->out.type)};
    if (t == 0 && !is_pv) return v;
    if (t == st->tiles.n - 1 && is_pv) return k;
    if (st->rows > 0 || t > 1) q.n = out.n = 0;
    return is_pv ? q : out;
}

/* While a block has read nothing there is nothing to rescale: running maxima begin as those of its first tile. */
static void psa__first_maxima(psa__stream *st, int64_t lane, int64_t n)
{
    const psa__scratch *w = &st->w;
    for (int64_t i = 0; st->rows == 0 && i < n; i++) {
        if (w->top[i] > PSA__LOWEST) w->m[lane + i] = w->top[i];
    }
}

/* All query tiles of the block against the tile of keys. */
static void psa__attend_tiles(psa__stream *st, psa__tile *tile)
{
    const psa__leaves *f = st->p->leaves;
    psa__scratch *w = &st->w;
    int64_t lane = 0, d = st->p->D, dv = st->p->Dv, n = tile->n;
    int finite = 1, parts = psa__bf16_parts(st->p);
    psa_type type = parts ? PSA_BF16 : PSA_F32;
    float scale = (float)(st->p->desc.scale * PSA__LOG2E);
    psa__widen_rows(st, tile->k, n, d, w->k);
    psa__pad_keys(tile->k, tile->bias, n);
    for (int t = 0; t < st->tiles.n; t++) {
        int nv = st->tiles.nv[t];
        int64_t width = nv * f->lanes;
        float *ot = w->ot + lane * dv;
        const float *bias = tile->pooled ? tile->bias : NULL;
        int32_t first[PSA__TILE_K];
        psa__ahead ahead = psa__ahead_of(st, tile, t, 0);
        for (int64_t i = 0; tile->straddles && i < n; i++) first[i] = tile->first[i] - (int32_t)lane;
        if (parts) {
            f->qk_bf16(nv, w->qt + lane * d * parts / 2, parts, scale, tile->k, n, d, bias, w->s, w->top, &ahead);
        } else {
            f->qk(nv, w->qt + lane * d, tile->k, n, d, bias, w->s, w->top, &ahead);
        }
        if (tile->straddles) f->hide(nv, w->s, n, first, w->top);
        psa__first_maxima(st, lane, width);
        f->softmax(nv, w->s, n, w->top, w->m + lane, w->l + lane, ot, dv);
        if (t == 0) {
            psa__widen_rows(st, tile->v, n, dv, w->v);
            finite = !tile->straddles || psa__v_finite(st, tile, type);
        }
        ahead = psa__ahead_of(st, tile, t, 1);
        if (!finite) psa__pv_hidden(st, tile, w->s, type, lane, width, ot, width, 1);
        else (parts ? f->pv_bf16 : f->pv)(nv, w->s, tile->v, n, dv, ot, &ahead);
        lane += width;
    }
}

/* n rows of K and V as matrix tiles. */
static void psa__tile_rows(const psa_plan *p, const float *const *k, const float **v, int64_t n, float *kt, float *vt,
                           const psa__ahead *ahead_k, const psa__ahead *ahead_v)
{
    for (int64_t i = n; i < psa__up_to_32(n); i++) v[i] = v[n - 1];
    p->leaves->tile_keys(p->k.type, kt, k, n, p->D, ahead_k);
    p->leaves->tile_values(p->k.type, vt, v, n, p->Dv, ahead_v);
}

/* The same with matrix tiles. Logits of the next vector of queries are computed before the weights of this one are
 * used: a tile cannot be loaded while what it holds is still on its way to the cache. */
static void psa__attend_matrix(psa__stream *st, psa__tile *tile)
{
    enum { SIZE = PSA__TILE_MATRIX * 16 };
    const psa_plan *p = st->p;
    const psa__leaves *f = p->leaves;
    psa__scratch *w = &st->w;
    int64_t n = tile->n, dv = psa__ot_rows(p);
    int64_t keys = psa__up_to_32(st->copied < 0 ? n : psa__min(p->Nk - st->rows, PSA__TILE_MATRIX));
    int q_parts = psa__parts(p->q.type), parts = psa__parts(st->type);
    psa__ahead k = {st->next->k, st->next->n, (size_t)p->D * 2}, v = {st->next->v, st->next->n, (size_t)p->Dv * 2};
    float scale = (float)(p->desc.scale * PSA__LOG2E), *weight = w->s + 2 * SIZE;
    int finite = !tile->straddles || psa__v_finite(st, tile, st->type);
    const float *kt = w->k, *vt = w->v;
    if (st->copied >= 0) { /* dense: all keys in order, of which causal attention may see fewer than a tile has */
        kt = w->head_k + st->rows * psa__tile_row(p, p->D);
        vt = w->head_v + st->rows * psa__tile_row(p, p->Dv);
    } else {
        psa__tile_rows(p, tile->k, tile->v, n, w->k, w->v, &k, &v);
    }
    psa__matrix_logits(p, w, kt, q_parts, 0, n, w->s);
    for (int t = 0; t < st->tiles.n; t++) {
        int64_t lane = t * f->lanes;
        float *ot = w->ot + lane * dv, *s = w->s + t % 2 * SIZE, *next_s = w->s + (t + 1) % 2 * SIZE;
        int32_t first[PSA__TILE_MATRIX];
        f->tile_logits(s, n, scale, tile->pooled ? tile->bias : NULL, w->top);
        for (int64_t i = 0; tile->straddles && i < n; i++) first[i] = tile->first[i] - (int32_t)lane;
        if (tile->straddles) f->hide(1, s, n, first, w->top);
        psa__first_maxima(st, lane, f->lanes);
        if (finite) f->tile_weights(s, n, keys, w->top, w->m + lane, w->l + lane, ot, dv, weight);
        else f->softmax(1, s, n, w->top, w->m + lane, w->l + lane, ot, dv);
        if (t + 1 < st->tiles.n) psa__matrix_logits(p, w, kt, q_parts, t + 1, n, next_s);
        if (finite) f->tile_products(vt, parts, weight, 2, keys / 32, 1, ot, dv / 16);
        else psa__pv_hidden(st, tile, s, st->type, lane, f->lanes, ot, f->lanes, 1);
    }
}

/* The same for few queries, which convert K and V as they read them. */
static void psa__attend_few(psa__stream *st, psa__tile *tile)
{
    const psa_plan *p = st->p;
    psa__scratch *w = &st->w;
    psa__few x;
    psa__pad_keys(tile->k, NULL, tile->n);
    psa__pad_keys(tile->v, NULL, tile->n);
    x.type = st->type;
    x.width = st->width;
    x.q = w->qt;
    x.k = tile->k;
    x.v = tile->v;
    x.next_k = st->next->n < tile->n ? tile->k : st->next->k;
    x.bias = tile->pooled ? tile->bias : NULL;
    x.first = tile->straddles ? tile->first : NULL;
    x.n = tile->n;
    x.d = p->D;
    x.dv = p->Dv;
    x.s = w->s;
    x.m = w->m;
    x.l = w->l;
    x.o = w->ot;
    x.weights_only = tile->straddles && !psa__v_finite(st, tile, x.type);
    p->leaves->few(&x);
    if (x.weights_only) psa__pv_hidden(st, tile, w->s, x.type, 0, x.width, w->ot, 1, p->Dv);
}

/* Attends to the tile that waits; the one that was filled waits in its place. */
static void psa__stream_turn(psa__stream *st)
{
    psa__tile *tile = st->full;
    if (tile->n && st->width) psa__attend_few(st, tile);
    else if (tile->n && st->p->leaves->tile_products) psa__attend_matrix(st, tile);
    else if (tile->n) psa__attend_tiles(st, tile);
    st->rows += tile->n;
    tile->n = 0;
    tile->pooled = tile->straddles = 0;
    st->full = st->next;
    st->next = tile;
}

/* Rows begin .. begin+n-1 of the KV head, in their order. */
static void psa__stream_rows(const psa__stream *st, int64_t begin, int64_t n, const float **k, const float **v)
{
    const psa_plan *p = st->p;
    if (st->copied < 0 || p->leaves->tile_products) {
        psa__kv_rows(p, &p->k, st->k, st->b, st->hkv, begin, n, NULL, k);
        psa__kv_rows(p, &p->v, st->v, st->b, st->hkv, begin, n, NULL, v);
    } else {
        psa__spaced_rows((const char *)st->w.head_k, (size_t)p->D * sizeof(float), begin, n, k);
        psa__spaced_rows((const char *)st->w.head_v, (size_t)p->Dv * sizeof(float), begin, n, v);
    }
}

/* Copies the KV head, unless it is there already. */
static void psa__stream_copy(psa__stream *st)
{
    const psa_plan *p = st->p;
    int64_t head = st->b * p->Hkv + st->hkv, n;
    if (st->copied == head || !psa__copies_head(p)) return;
    st->copied = -1;
    for (int64_t at = 0; at < p->Nk; at += n) {
        const float **k = st->tile[0].k, **v = st->tile[0].v;
        n = psa__min(p->Nk - at, p->leaves->tile_k);
        psa__stream_rows(st, at, n, k, v);
        if (p->leaves->tile_products) {
            psa__tile_rows(p, k, v, n, st->w.head_k + at * psa__tile_row(p, p->D),
                           st->w.head_v + at * psa__tile_row(p, p->Dv), NULL, NULL);
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            p->leaves->to_f32(st->w.head_k + (at + i) * p->D, k[i], p->k.type, p->D);
            p->leaves->to_f32(st->w.head_v + (at + i) * p->Dv, v[i], p->v.type, p->Dv);
        }
    }
    st->copied = head;
    if (p->leaves->tile_products) return;
    st->type = PSA_F32;
    st->in_place = 1;
}

/* The tokens of block jk themselves. Lane i stands for query token `token + i / heads`. */
static void psa__stream_tokens(psa__stream *st, int64_t jk, int64_t token, int straddles)
{
    const psa_plan *p = st->p;
    int64_t at = jk * p->desc.block_k, end = at + psa__block_k_rows(p, jk);
    while (at < end) {
        psa__tile *t = st->next;
        int64_t to = t->n, n = psa__min(end - at, p->leaves->tile_k - to);
        psa__stream_rows(st, at, n, t->k + to, t->v + to);
        memset(t->bias + to, 0, (size_t)n * sizeof *t->bias);
        memset(t->first + to, 0, (size_t)n * sizeof *t->first);
        for (int64_t i = 0; straddles && i < n; i++) {
            t->first[to + i] = (int32_t)psa__max(psa__min((at + i - token) * st->heads, INT16_MAX), 0);
        }
        t->straddles |= straddles;
        t->n += n;
        if (t->n == p->leaves->tile_k) psa__stream_turn(st);
        at += n;
    }
}

/* The pooled tokens of block jk at level 1 << i. */
static void psa__stream_pooled(psa__stream *st, int64_t jk, int i)
{
    const psa_plan *p = st->p;
    int64_t at = psa__pooled_row(p, st->b, st->hkv, jk, i), end = at + psa__level_rows(p, jk, i);
    const float *bias = (const float *)(const void *)(st->base + p->at_bias);
    while (at < end) {
        psa__tile *t = st->next;
        int64_t to = t->n, n = psa__min(end - at, p->leaves->tile_k - to);
        psa__spaced_rows(st->base + p->at_pooled_k, psa__pooled_bytes(p, 1, p->D), at, n, t->k + to);
        psa__spaced_rows(st->base + p->at_pooled_v, psa__pooled_bytes(p, 1, p->Dv), at, n, t->v + to);
        memcpy(t->bias + to, bias + at, (size_t)n * sizeof *bias);
        memset(t->first + to, 0, (size_t)n * sizeof *t->first);
        t->pooled = 1;
        t->n += n;
        if (t->n == p->leaves->tile_k) psa__stream_turn(st);
        at += n;
    }
}

/* Everything query block iq reads, level 1 first, then 2, 4, ..., inside a level by index: one stream of rows, cut into
 * tiles wherever one is full. level NULL: dense. */
static void psa__stream_blocks(psa__stream *st, const uint8_t *level)
{
    const psa_plan *p = st->p;
    int64_t n = psa__n_visible(p, st->iq), whole = psa__n_whole(p, st->iq);
    int64_t token = psa__query_token(p, st->iq * p->desc.block_q);
    for (int64_t j = 0; j < n; j++) {
        if (!level || level[j] == 1 || j >= whole) psa__stream_tokens(st, j, token, j >= whole);
    }
    for (int i = 1; level && i < p->n_levels; i++) {
        for (int64_t j = 0; j < whole; j++) {
            if (level[j] == 1 << i) psa__stream_pooled(st, j, i);
        }
    }
    psa__stream_turn(st);
    psa__stream_turn(st);
}

/* The rows of q or out that belong to a query block: their number. Row i is token i / heads of head h + i % heads. */
static int64_t psa__task_rows(const psa__stream *st, const psa_tensor *t, const void *data, int64_t task,
                              const float **rows)
{
    const psa_plan *p = st->p;
    int64_t iq = task % p->nq, head = task / p->nq * st->heads, h = head % p->Hq, n = psa__block_q_rows(p, iq);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t g = 0; g < st->heads; g++) {
            *rows++ = (const float *)(const void *)psa__row(t, &p->desc.order_q, data, head / p->Hq, h + g,
                                                            iq * p->desc.block_q + i);
        }
    }
    return n * st->heads;
}

static void psa__write_lse(psa__stream *st, int64_t h, float *lse)
{
    const psa_plan *p = st->p;
    for (int64_t i = 0; i < st->n; i++) {
        int64_t head = h + i % st->heads, at = st->iq * p->desc.block_q + i / st->heads;
        float *to = lse + (st->b * p->Hq + head) * p->Nq + psa__token_at(&p->desc.order_q, st->b, head, at);
        *to = st->w.l[i] == 0.0f ? -INFINITY : (float)((st->w.m[i] + log2f(st->w.l[i])) * PSA__LN2);
    }
}

/* Writes out: w.l has the softmax denominators of the lanes. Tiles are unpacked to out itself if it is f32. */
static void psa__write_out(psa__stream *st, int64_t lanes)
{
    const psa__leaves *f = st->p->leaves;
    const psa_tensor *out = &st->p->out;
    psa__scratch *w = &st->w;
    int64_t dv = st->p->Dv;
    float *row[PSA_MAX_BLOCK_Q];
    for (int64_t i = 0; i < lanes; i++) {
        int in_place = !st->width && i < st->n && psa__f32_in_place(out, st->out[i]);
        row[i] = in_place ? (float *)(uintptr_t)st->out[i] : (st->width ? w->ot : w->rows) + i * dv;
        w->l[i] = w->l[i] == 0.0f ? 0.0f : 1.0f / w->l[i];
        if (st->width) f->scale(row[i], w->l[i], dv);
    }
    for (int64_t t = 0, lane = 0; t < st->tiles.n; t++) {
        f->unpack(st->tiles.nv[t], row + lane, w->ot + lane * psa__ot_rows(st->p), dv, w->l + lane);
        lane += st->tiles.nv[t] * f->lanes;
    }
    for (int64_t i = 0; i < st->n; i++) {
        if (row[i] != st->out[i]) f->from_f32((void *)(uintptr_t)st->out[i], out->type, row[i], 1.0f, dv);
    }
}

/* The query rows, scaled, to w.qt, as psa__few reads them; those beyond the last are 0. */
static void psa__place_few(psa__stream *st, const float *const *row, float scale)
{
    const psa_plan *p = st->p;
    float *to = st->w.qt;
    for (int64_t at = 0, lanes = 0; at < p->D; at += lanes) {
        lanes = psa__min(p->leaves->lanes, p->D - at);
        for (int64_t i = 0; i < st->width; i++, to += lanes) {
            for (int64_t x = 0; x < lanes; x++) to[x] = i < st->n ? scale * row[i][at + x] : 0.0f;
        }
    }
}

/* The block's query rows to w.qt, in tiles or for psa__few. Returns the lanes that they take. */
static int64_t psa__place_queries(psa__stream *st)
{
    const psa_plan *p = st->p;
    float scale = (float)(p->desc.scale * PSA__LOG2E);
    const float *row[PSA_MAX_BLOCK_Q];
    /* Tiles of bf16, one part a number, are worth it from half a vector of queries on. */
    const int lanes = p->leaves->lanes, most_few = p->k.type == PSA_BF16 ? lanes / 2 : lanes;
    st->tiles = psa__tiles_of(p->leaves, st->n);
    st->width = 0;
    if (p->leaves->tile_products && st->n > most_few) {
        memcpy(row, st->q, (size_t)st->n * sizeof *row);
        return psa__tile_queries(p, &st->w, &st->tiles, p->q.type, psa__parts(p->q.type), row, st->n);
    }
    for (int64_t i = 0; i < st->n; i++) {
        row[i] = psa__row_f32(p, &p->q, (const char *)(const void *)st->q[i], st->w.rows + i * p->D);
    }
    if (st->n > lanes) {
        return psa__pack_queries(p, &st->w, &st->tiles, row, st->n, p->D, scale, psa__bf16_parts(p));
    }
    st->tiles.n = 0;
    for (st->width = 1; st->width < st->n;) st->width *= 2;
    psa__place_few(st, row, scale);
    return st->width;
}

/* One query block, of st->heads heads from h on. */
static void psa__attend_block(psa__stream *st, const uint8_t *level, int64_t h, float *lse)
{
    const psa_plan *p = st->p;
    psa__scratch *w = &st->w;
    int64_t lanes = psa__place_queries(st);
    for (int64_t i = 0; i < lanes; i++) {
        w->m[i] = PSA__LOWEST;
        w->l[i] = 0.0f;
    }
    memset(w->ot, 0, (size_t)(lanes * psa__ot_rows(p)) * sizeof(float));
    st->rows = 0;
    psa__stream_blocks(st, level);
    if (lse) psa__write_lse(st, h, lse);
    psa__write_out(st, lanes);
}

static void psa__stream_init(psa__stream *st, const psa_plan *p, const void *k, const void *v, void *work, int ith)
{
    memset(st, 0, sizeof *st);
    st->p = p;
    st->k = k;
    st->v = v;
    st->base = psa__align(work);
    st->w = psa__scratch_of(p, work, ith);
    st->copied = -1;
    st->type = p->k.type;
    st->in_place = p->leaves->qk_bf16 ||
                   (p->k.type == PSA_F32 && psa__is_aligned(&p->k, k) && psa__is_aligned(&p->v, v));
    for (int i = 0; i < 2; i++) {
        int at = i * (p->leaves->tile_k + PSA__PAD_K);
        st->tile[i].k = st->w.kp + at;
        st->tile[i].v = st->w.vp + at;
        st->tile[i].bias = st->w.bias + at;
        st->tile[i].first = st->w.first + at;
    }
    st->full = &st->tile[0];
    st->next = &st->tile[1];
}

/* Query heads that go together, so that K and V are read once for all of them: those of a KV head if their rows fit
 * into one query block and read the same, else each alone. */
static int64_t psa__heads_together(const psa_plan *p, const uint8_t *levels)
{
    int64_t group = p->Hq / p->Hkv;
    return !levels && p->Nq <= p->desc.block_q / group ? group : 1;
}

/* Rows of K/V that each level of a whole block reads; -1 for levels the plan does not have. */
static void psa__rows_of_levels(const psa_plan *p, int rows[256])
{
    for (int i = 0; i < 256; i++) rows[i] = -1;
    rows[0] = 0;
    for (int i = 0; i < p->n_levels; i++) rows[1 << i] = p->desc.block_k >> i;
}

/* The rows that query block iq will read, roughly (ragged tails count in full); -1 if the map holds an invalid
 * level. */
static int64_t psa__block_cost(const psa_plan *p, const int rows[256], const uint8_t *level, int64_t iq)
{
    int64_t n = psa__n_visible(p, iq), whole = psa__n_whole(p, iq), cost = 0;
    if (!level) return n * p->desc.block_k;
    for (int64_t j = 0; j < p->nk; j++) {
        if (rows[level[j]] < 0) return -1;
        if (j < n) cost += j < whole ? rows[level[j]] : p->desc.block_k;
    }
    return cost;
}

/* The query blocks of thread ith: contiguous, about equal in rows read. Every thread comes to the same cuts by itself.
 * Checks the whole level map on the way. */
static psa_result psa__attend_share(const psa_plan *p, const uint8_t *levels, int ith, int nth, int64_t *begin,
                                    int64_t *end)
{
    int64_t tasks = p->B * p->Hq / psa__heads_together(p, levels) * p->nq, total = 0, done = 0;
    int rows[256];
    psa__rows_of_levels(p, rows);
    for (int64_t task = 0; task < tasks; task++) {
        int64_t cost = psa__block_cost(p, rows, levels ? levels + task * p->nk : NULL, task % p->nq);
        if (cost < 0) {
            return psa__fail(&p->desc, PSA_ERR_LEVEL_MAP,
                             "level map: an entry of query block %lld is neither 0 nor a power of two up to %d",
                             (long long)task, 1 << (p->n_levels - 1));
        }
        total += cost + p->desc.block_k;
    }
    *begin = *end = ith == 0 ? 0 : tasks;
    for (int64_t task = 0; task < tasks; task++) {
        int64_t cost = psa__block_cost(p, rows, levels ? levels + task * p->nk : NULL, task % p->nq) + p->desc.block_k;
        int owner = (int)((double)(2 * done + cost) * nth / (double)(2 * total));
        if (owner == ith && *begin == tasks) *begin = task;
        if (owner <= ith) *end = task + 1;
        done += cost;
    }
    *begin = psa__min(*begin, *end);
    return PSA_OK;
}

PSA__DEF psa_result psa_attend(const psa_plan *plan, const void *q, const void *k, const void *v, const uint8_t *levels,
                               void *work, void *out, float *lse, int ith, int nth)
{
    psa_plan plan_here;
    const psa_plan *p = &plan_here;
    psa_result r = psa__enter(plan, work, ith, nth, &plan_here);
    int64_t begin = 0, end = 0, *rows;
    unsigned mode;
    psa__stream st;
    if (r != PSA_OK) return r;
    if (!q || !k || !v || !out) return psa__fail(&p->desc, PSA_ERR_NULL, "q, k, v and out must not be NULL");
    if (p->Dv == 0 || p->out.ne[0] == 0) {
        return psa__fail(&p->desc, PSA_ERR_NULL, "the plan was made without v or out");
    }
    if ((r = psa__attend_share(p, levels, ith, nth, &begin, &end)) != PSA_OK) return r;
    psa__stream_init(&st, p, k, v, work, ith);
    rows = (int64_t *)(void *)(psa__align(work) + p->at_rows);
    mode = p->leaves->enter();
    st.heads = psa__heads_together(p, levels);
    if (begin < end) st.next_n = psa__task_rows(&st, &p->q, q, begin, st.next_q);
    for (int64_t task = begin; task < end; task++) {
        int64_t head = task / p->nq * st.heads, h = head % p->Hq;
        st.iq = task % p->nq;
        st.b = head / p->Hq;
        st.hkv = h / (p->Hq / p->Hkv);
        memcpy(st.q, st.next_q, sizeof st.q);
        st.n = psa__task_rows(&st, &p->out, out, task, st.out);
        st.next_n = task + 1 < end ? psa__task_rows(&st, &p->q, q, task + 1, st.next_q) : 0;
        if (!levels || !p->leaves->tile_products) psa__stream_copy(&st); /* tiles hold all keys in order */
        psa__attend_block(&st, levels ? levels + task * p->nk : NULL, h, lse);
        for (int64_t i = 0; i < st.heads; i++) rows[(head + i) * p->nq + st.iq] = st.rows;
    }
    p->leaves->leave(mode);
    return PSA_OK;
}

PSA__DEF int64_t psa_mul_adds(const psa_plan *plan, const void *work)
{
    const int64_t *rows = (const int64_t *)(const void *)(psa__align_const(work) + plan->at_rows);
    int64_t tasks = plan->B * plan->Hq * plan->nq, sum = 0;
    for (int64_t task = 0; task < tasks; task++) sum += rows[task] * psa__block_q_rows(plan, task % plan->nq);
    return sum * (plan->D + plan->Dv);
}

/* Weight of a partial result whose denominator is exp(lse) in a sum whose largest one is exp(top). */
static double psa__merge_weight(float lse, float top)
{
    return lse == top ? 1.0 : exp((double)lse - (double)top);
}

static void psa__merge_row(const psa_tensor *out, char *to, float *lse, const psa_tensor *part, const char *from,
                           float part_lse)
{
    float a[PSA_MAX_D], b[PSA_MAX_D], top = *lse > part_lse || *lse != *lse ? *lse : part_lse;
    double wa, wb;
    if (top == -INFINITY) return;
    wa = psa__merge_weight(*lse, top);
    wb = psa__merge_weight(part_lse, top);
    psa__to_f32(a, to, out->type, out->ne[0]);
    psa__to_f32(b, from, part->type, out->ne[0]);
    for (int64_t x = 0; x < out->ne[0]; x++) {
        double sum = (wa != 0 ? wa * a[x] : 0) + (wb != 0 ? wb * b[x] : 0);
        a[x] = (float)(sum / (wa + wb));
    }
    psa__from_f32(to, out->type, a, out->ne[0]);
    *lse = (float)(top + log(wa + wb));
}

PSA__DEF psa_result psa_merge(const psa_tensor *out, float *lse, const psa_tensor *part, const float *part_lse, int ith,
                              int nth)
{
    int64_t begin, end;
    psa_result r;
    if (!out || !lse || !part || !part_lse || !out->data || !part->data) return PSA_ERR_NULL;
    if (ith < 0 || ith >= nth) return PSA_ERR_THREADS;
    if ((r = psa__check_pair(part, out)) != PSA_OK) return r;
    if ((r = psa__check_head_dim(NULL, "out", out->ne[0])) != PSA_OK) return r;
    psa__share(out->ne[1] * out->ne[2] * out->ne[3], ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        int64_t i = row % out->ne[1], head = row / out->ne[1], h = head % out->ne[2], b = head / out->ne[2];
        char *to = (char *)out->data + psa__offset(out, b, h, i);
        psa__merge_row(out, to, lse + row, part, (char *)part->data + psa__offset(part, b, h, i), part_lse[row]);
    }
    return PSA_OK;
}

/* ================================================================================================================= */
/* >>order                                                                                                           */
/* ================================================================================================================= */

static int psa__grid_ok(int t, int h, int w)
{
    return t >= 1 && h >= 1 && w >= 1 && (int64_t)t * h <= INT32_MAX && (int64_t)t * h * w <= INT32_MAX;
}

typedef struct psa__vec {
    int x[3]; /* w, h, t */
} psa__vec;

/* a + i * b */
static psa__vec psa__vec_add(psa__vec a, int i, psa__vec b)
{
    for (int k = 0; k < 3; k++) a.x[k] += i * b.x[k];
    return a;
}

static int psa__vec_sum(psa__vec a) { return a.x[0] + a.x[1] + a.x[2]; }

static psa__vec psa__vec_sign(psa__vec a)
{
    for (int k = 0; k < 3; k++) a.x[k] = (a.x[k] > 0) - (a.x[k] < 0);
    return a;
}

/* Half of a, rounded down (for negatives too), made even in length where a is long enough. */
static psa__vec psa__vec_half(psa__vec a)
{
    psa__vec half = a;
    for (int k = 0; k < 3; k++) half.x[k] = (a.x[k] - (a.x[k] < 0 && a.x[k] % 2 != 0)) / 2;
    if (psa__vec_sum(half) % 2 != 0 && abs(psa__vec_sum(a)) > 2) half = psa__vec_add(half, 1, psa__vec_sign(a));
    return half;
}

typedef struct psa__curve {
    int h, w;
    int32_t *next;
} psa__curve;

/* Walks the box at p spanned by a (the main direction), b and c, from corner to corner along a. Recursion depth is
 * about 2 log2 of the longest side. Source: Cerveny, generalized Hilbert ("Gilbert") space-filling curve for 3-D
 * boxes. */
static void psa__gilbert(psa__curve *out, psa__vec p, psa__vec a, psa__vec b, psa__vec c)
{
    int w = abs(psa__vec_sum(a)), h = abs(psa__vec_sum(b)), d = abs(psa__vec_sum(c));
    psa__vec da = psa__vec_sign(a), db = psa__vec_sign(b), dc = psa__vec_sign(c), zero = {{0, 0, 0}};
    psa__vec a2 = psa__vec_half(a), b2 = psa__vec_half(b), c2 = psa__vec_half(c);
    psa__vec a1 = psa__vec_add(a, -1, a2), b1 = psa__vec_add(b, -1, b2), c1 = psa__vec_add(c, -1, c2);
    psa__vec end = psa__vec_add(psa__vec_add(p, 1, a), -1, da); /* last cell along a */
    if ((w == 1) + (h == 1) + (d == 1) >= 2) {
        psa__vec step = h == 1 && d == 1 ? da : w == 1 && d == 1 ? db : dc;
        for (int i = 0; i < w * h * d; i++, p = psa__vec_add(p, 1, step)) {
            *out->next++ = (p.x[2] * out->h + p.x[1]) * out->w + p.x[0];
        }
    } else if (2 * w > 3 * h && 2 * w > 3 * d) { /* long: split along a only */
        psa__gilbert(out, p, a2, b, c);
        psa__gilbert(out, psa__vec_add(p, 1, a2), a1, b, c);
    } else if (3 * h > 4 * d) { /* flat: do not split c */
        psa__gilbert(out, p, b2, c, a2);
        psa__gilbert(out, psa__vec_add(p, 1, b2), a, b1, c);
        psa__gilbert(out, psa__vec_add(psa__vec_add(end, 1, b2), -1, db), psa__vec_add(zero, -1, b2), c,
                     psa__vec_add(zero, -1, a1));
    } else if (3 * d > 4 * h) { /* deep: do not split b */
        psa__gilbert(out, p, c2, a2, b);
        psa__gilbert(out, psa__vec_add(p, 1, c2), a, b, c1);
        psa__gilbert(out, psa__vec_add(psa__vec_add(end, 1, c2), -1, dc), psa__vec_add(zero, -1, c2),
                     psa__vec_add(zero, -1, a1), b);
    } else {
        psa__vec deep = psa__vec_add(psa__vec_add(p, 1, c), -1, dc);
        psa__vec up = psa__vec_add(psa__vec_add(zero, 1, b2), -1, db);
        psa__vec end_deep = psa__vec_add(psa__vec_add(end, 1, c), -1, dc);
        psa__gilbert(out, p, b2, c2, a2);
        psa__gilbert(out, psa__vec_add(p, 1, b2), c, a2, b1);
        psa__gilbert(out, psa__vec_add(deep, 1, up), a, psa__vec_add(zero, -1, b2), psa__vec_add(zero, -1, c1));
        psa__gilbert(out, psa__vec_add(end_deep, 1, b2), psa__vec_add(zero, -1, c), psa__vec_add(zero, -1, a1), b1);
        psa__gilbert(out, psa__vec_add(end, 1, up), psa__vec_add(zero, -1, b2), c2, psa__vec_add(zero, -1, a1));
    }
}

PSA__DEF psa_result psa_order_gilbert(int t, int h, int w, int32_t *index)
{
    psa__vec origin = {{0, 0, 0}}, x = {{0, 0, 0}}, y = {{0, 0, 0}}, z = {{0, 0, 0}};
    psa__curve out;
    if (!index) return PSA_ERR_NULL;
    if (!psa__grid_ok(t, h, w)) return PSA_ERR_GRID;
    x.x[0] = w;
    y.x[1] = h;
    z.x[2] = t;
    out.h = h;
    out.w = w;
    out.next = index;
    if (w >= h && w >= t) psa__gilbert(&out, origin, x, y, z);
    else if (h >= w && h >= t) psa__gilbert(&out, origin, y, x, z);
    else psa__gilbert(&out, origin, z, x, y);
    return PSA_OK;
}

/* One tile of the grid, in raster order. */
static int32_t *psa__order_tile(int32_t *next, const int begin[3], const int end[3], int h, int w)
{
    for (int t = begin[0]; t < end[0]; t++) {
        for (int y = begin[1]; y < end[1]; y++) {
            for (int x = begin[2]; x < end[2]; x++) *next++ = (t * h + y) * w + x;
        }
    }
    return next;
}

PSA__DEF psa_result psa_order_tile(int t, int h, int w, int tile_t, int tile_h, int tile_w, int32_t *index)
{
    if (!index) return PSA_ERR_NULL;
    if (!psa__grid_ok(t, h, w) || tile_t < 1 || tile_h < 1 || tile_w < 1) return PSA_ERR_GRID;
    tile_t = (int)psa__min(tile_t, t);
    tile_h = (int)psa__min(tile_h, h);
    tile_w = (int)psa__min(tile_w, w);
    for (int a = 0; a < t; a += tile_t) {
        for (int b = 0; b < h; b += tile_h) {
            for (int c = 0; c < w; c += tile_w) {
                int begin[3], end[3];
                begin[0] = a;
                begin[1] = b;
                begin[2] = c;
                end[0] = (int)psa__min((int64_t)a + tile_t, t);
                end[1] = (int)psa__min((int64_t)b + tile_h, h);
                end[2] = (int)psa__min((int64_t)c + tile_w, w);
                index = psa__order_tile(index, begin, end, h, w);
            }
        }
    }
    return PSA_OK;
}

PSA__DEF void psa_order_embed(int32_t *index, int64_t n_prefix, int64_t n_video, int64_t n_suffix)
{
    int64_t n = n_prefix + n_video + n_suffix;
    for (int64_t i = 0; i < n_prefix; i++) index[i] = (int32_t)i;
    for (int64_t i = 0; i < n_video; i++) index[n_prefix + i] += (int32_t)n_prefix;
    for (int64_t i = n_prefix + n_video; i < n; i++) index[i] = (int32_t)i;
}

/* Scratch of one thread of the k-means: the tokens' clusters, cluster sums and sizes, and one row. */
typedef struct psa__kmeans {
    const psa_tensor *x;
    int64_t b, h, first, n; /* the head, and the tokens that take part */
    int clusters;
    float *centroid;        /* [clusters][D] */
    int32_t *label;         /* [n] */
    float *sum, *half_norm; /* [clusters][D], [clusters] */
    int64_t *size;          /* [clusters] */
    float *row;             /* [D] */
} psa__kmeans;

static size_t psa__kmeans_layout(const psa_tensor *x, int clusters, char *base, psa__kmeans *w)
{
    size_t at = 0, c = (size_t)clusters, d = (size_t)x->ne[0];
    uintptr_t b = (uintptr_t)base;
    size_t label = psa__take(&at, (size_t)x->ne[1], sizeof(int32_t));
    size_t sum = psa__take(&at, psa__mul(c, d), sizeof(float));
    size_t half = psa__take(&at, c, sizeof(float)), size = psa__take(&at, c, sizeof(int64_t));
    size_t row = psa__take(&at, d, sizeof(float));
    if (w) {
        w->label = (int32_t *)(b + label);
        w->sum = (float *)(b + sum);
        w->half_norm = (float *)(b + half);
        w->size = (int64_t *)(b + size);
        w->row = (float *)(b + row);
    }
    return at;
}

PSA__DEF size_t psa_order_semantic_work_size(const psa_tensor *x, int n_clusters, int nth)
{
    size_t size;
    if (!x || n_clusters < 1 || nth < 1 || psa__check_tensor(NULL, x, "x") != PSA_OK) return 0;
    size = psa__add(psa__mul(psa__kmeans_layout(x, n_clusters, NULL, NULL), (size_t)nth), 63);
    return size > SIZE_MAX / 2 ? 0 : size;
}

static const float *psa__kmeans_row(psa__kmeans *w, int64_t i)
{
    const char *row = (const char *)w->x->data + psa__offset(w->x, w->b, w->h, w->first + i);
    psa__to_f32(w->row, row, w->x->type, w->x->ne[0]);
    return w->row;
}

/* Labels every token with its nearest centroid (ties: the lower one) and collects sums and sizes. */
static void psa__kmeans_assign(const psa__leaves *f, psa__kmeans *w)
{
    int64_t d = w->x->ne[0];
    memset(w->sum, 0, (size_t)(w->clusters * d) * sizeof(float));
    memset(w->size, 0, (size_t)w->clusters * sizeof(int64_t));
    for (int c = 0; c < w->clusters; c++) {
        w->half_norm[c] = 0.5f * f->dot(w->centroid + c * d, w->centroid + c * d, d);
    }
    for (int64_t i = 0; i < w->n; i++) {
        const float *row = psa__kmeans_row(w, i);
        float best = 0;
        int label = -1;
        for (int c = 0; c < w->clusters; c++) {
            float closeness = f->dot(row, w->centroid + c * d, d) - w->half_norm[c];
            if (label < 0 || closeness > best) {
                best = closeness;
                label = c;
            }
        }
        w->label[i] = label;
        w->size[label]++;
        f->sum(w->sum + label * d, w->sum + label * d, row, d);
    }
}

/* Centroids become means; an empty cluster stays where it is. */
static void psa__kmeans_update(const psa__leaves *f, psa__kmeans *w)
{
    int64_t d = w->x->ne[0];
    for (int c = 0; c < w->clusters; c++) {
        if (w->size[c] == 0) continue;
        memcpy(w->centroid + c * d, w->sum + c * d, (size_t)d * sizeof(float));
        f->scale(w->centroid + c * d, 1.0f / (float)w->size[c], d);
    }
}

/* Tokens by cluster, then by index; those outside [first, first + n) stay in place. */
static void psa__kmeans_order(psa__kmeans *w, int32_t *index)
{
    int64_t start = w->first;
    for (int64_t i = 0; i < w->x->ne[1]; i++) index[i] = (int32_t)i;
    for (int c = 0; c < w->clusters; c++) {
        int64_t size = w->size[c];
        w->size[c] = start;
        start += size;
    }
    for (int64_t i = 0; i < w->n; i++) index[w->size[w->label[i]]++] = (int32_t)(w->first + i);
}

PSA__DEF psa_result psa_order_semantic(const psa_tensor *x, int64_t n_prefix, int64_t n_suffix, int n_clusters,
                                       int n_iter, float *centroids, int carried, int32_t *index, void *work, int ith,
                                       int nth)
{
    const psa__leaves *f = psa__leaves_of(psa_isa_detect());
    psa__kmeans w;
    int64_t begin, end, d;
    size_t scratch_size;
    psa_result r;
    if (!x || !x->data || !centroids || !index || !work) return PSA_ERR_NULL;
    if ((r = psa__check_tensor(NULL, x, "x")) != PSA_OK) return r;
    if (n_prefix < 0 || n_suffix < 0 || n_prefix > x->ne[1] || n_suffix >= x->ne[1] - n_prefix) return PSA_ERR_PROTECT;
    if (n_clusters < 1 || n_clusters > x->ne[1] - n_prefix - n_suffix || n_iter < 1) return PSA_ERR_ORDER;
    if (ith < 0 || ith >= nth) return PSA_ERR_THREADS;
    d = x->ne[0];
    memset(&w, 0, sizeof w);
    w.x = x;
    w.first = n_prefix;
    w.n = x->ne[1] - n_prefix - n_suffix;
    w.clusters = n_clusters;
    scratch_size = psa__kmeans_layout(x, n_clusters, NULL, NULL);
    psa__kmeans_layout(x, n_clusters, psa__align(work) + (size_t)ith * scratch_size, &w);
    psa__share(x->ne[2] * x->ne[3], ith, nth, &begin, &end);
    for (int64_t head = begin; head < end; head++) {
        w.b = head / x->ne[2];
        w.h = head % x->ne[2];
        w.centroid = centroids + head * n_clusters * d;
        for (int c = 0; !carried && c < n_clusters; c++) { /* start from tokens spread evenly over the sequence */
            memcpy(w.centroid + c * d, psa__kmeans_row(&w, (2 * c + 1) * w.n / (2 * n_clusters)), (size_t)d * 4);
        }
        for (int i = 0; i < n_iter; i++) {
            psa__kmeans_assign(f, &w);
            psa__kmeans_update(f, &w);
        }
        psa__kmeans_order(&w, index + head * x->ne[1]);
    }
    return PSA_OK;
}

/* Copies rows from `in` to `out`; position p of one side is token order[p] of the other. */
static psa_result psa__reorder(const psa_tensor *in, const psa_order *order, const psa_tensor *out, int back, int ith,
                               int nth)
{
    int64_t begin, end;
    psa_result r;
    if (!in || !order || !out || !in->data || !out->data) return PSA_ERR_NULL;
    if (ith < 0 || ith >= nth) return PSA_ERR_THREADS;
    if ((r = psa__check_pair(in, out)) != PSA_OK) return r;
    if (in->type != out->type) return PSA_ERR_TYPE;
    if ((r = psa__check_order(NULL, order, in, "order")) != PSA_OK) return r;
    psa__share(in->ne[1] * in->ne[2] * in->ne[3], ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        int64_t i = row % in->ne[1], head = row / in->ne[1], h = head % in->ne[2], b = head / in->ne[2];
        int64_t token = psa__token_at(order, b, h, i);
        memcpy((char *)out->data + psa__offset(out, b, h, back ? token : i),
               (const char *)in->data + psa__offset(in, b, h, back ? i : token), (size_t)in->ne[0] * in->nb[0]);
    }
    return PSA_OK;
}

PSA__DEF psa_result psa_permute(const psa_tensor *in, const psa_order *order, const psa_tensor *out, int ith, int nth)
{
    return psa__reorder(in, order, out, 0, ith, nth);
}

PSA__DEF psa_result psa_unpermute(const psa_tensor *in, const psa_order *order, const psa_tensor *out, int ith, int nth)
{
    return psa__reorder(in, order, out, 1, ith, nth);
}

/* ================================================================================================================= */
/* >>threads                                                                                                         */
/* ================================================================================================================= */

#ifndef PSA_NO_THREADS

typedef struct psa__thread {
    psa_task_fn *task;
    void *ctx;
    int ith, nth;
} psa__thread;

#ifdef _WIN32
typedef HANDLE psa__handle;

static DWORD WINAPI psa__thread_main(LPVOID arg)
{
    psa__thread *t = (psa__thread *)arg;
    t->task(t->ctx, t->ith, t->nth);
    return 0;
}

static int psa__thread_start(psa__handle *h, psa__thread *t)
{
    *h = CreateThread(NULL, 0, psa__thread_main, t, 0, NULL);
    return *h != NULL;
}

static void psa__thread_join(psa__handle h)
{
    WaitForSingleObject(h, INFINITE);
    CloseHandle(h);
}
#else
typedef pthread_t psa__handle;

static void *psa__thread_main(void *arg)
{
    psa__thread *t = (psa__thread *)arg;
    t->task(t->ctx, t->ith, t->nth);
    return NULL;
}

static int psa__thread_start(psa__handle *h, psa__thread *t)
{
    return pthread_create(h, NULL, psa__thread_main, t) == 0;
}

static void psa__thread_join(psa__handle h) { pthread_join(h, NULL); }
#endif

/* Up to 64 threads at a time: the caller's and new ones. A part whose thread cannot be had runs on the caller's. */
static void psa__run_threads(int nth, psa_task_fn *task, void *ctx)
{
    enum { BATCH = 64 };
    for (int first = 0; first < nth; first += BATCH) {
        psa__handle handle[BATCH];
        psa__thread thread[BATCH];
        int started[BATCH], n = (int)psa__min(BATCH, nth - first);
        for (int i = 1; i < n; i++) {
            thread[i].task = task;
            thread[i].ctx = ctx;
            thread[i].ith = first + i;
            thread[i].nth = nth;
            started[i] = psa__thread_start(&handle[i], &thread[i]);
        }
        task(ctx, first, nth);
        for (int i = 1; i < n; i++) {
            if (started[i]) psa__thread_join(handle[i]);
            else task(ctx, first + i, nth);
        }
    }
}
#endif

static void psa__parallel(const psa_plan *p, psa_task_fn *task, void *ctx)
{
    int nth = p->desc.n_threads;
    if (p->desc.parallel_fn) {
        p->desc.parallel_fn(p->desc.parallel_user, nth, task, ctx);
        return;
    }
#ifndef PSA_NO_THREADS
    psa__run_threads(nth, task, ctx);
#else
    for (int ith = 0; ith < nth; ith++) task(ctx, ith, nth);
#endif
}

/* ---- the one call ---- */

typedef struct psa__call {
    const psa_plan *plan;
    const void *q, *k, *v;
    void *out, *work;
    float *lse, *scores;
    uint8_t *levels;
} psa__call;

static void psa__call_prepare(void *ctx, int ith, int nth)
{
    psa__call *c = (psa__call *)ctx;
    psa_prepare(c->plan, c->q, c->k, c->work, ith, nth);
}

static void psa__call_pool(void *ctx, int ith, int nth)
{
    psa__call *c = (psa__call *)ctx;
    psa_pool(c->plan, c->k, c->v, c->work, ith, nth);
}

static void psa__call_score(void *ctx, int ith, int nth)
{
    psa__call *c = (psa__call *)ctx;
    psa_score(c->plan, c->q, c->k, c->work, c->scores, ith, nth);
}

static void psa__call_budget(void *ctx, int ith, int nth)
{
    psa__call *c = (psa__call *)ctx;
    psa_budget(c->plan, c->scores, c->work, ith, nth);
}

static void psa__call_mask(void *ctx, int ith, int nth)
{
    psa__call *c = (psa__call *)ctx;
    psa_mask(c->plan, c->scores, c->work, c->levels, ith, nth);
}

/* psa_score and psa_mask in one pass, so that only a few rows of scores per thread are ever held. */
static void psa__call_levels(void *ctx, int ith, int nth)
{
    psa__call *c = (psa__call *)ctx;
    psa_plan plan_here;
    const psa_plan *p = &plan_here;
    psa__scratch w = psa__scratch_of(c->plan, c->work, ith);
    unsigned mode = c->plan->leaves->enter();
    int64_t together = psa__score_together(c->plan), tasks = psa__ceil_div(c->plan->nq, together), begin, end;
    psa__enter(c->plan, c->work, ith, nth, &plan_here);
    psa__share(p->B * p->Hq * tasks, ith, nth, &begin, &end);
    for (int64_t task = begin; task < end; task++) {
        int64_t iq = task % tasks * together, m = psa__min(together, p->nq - iq), head = task / tasks;
        int64_t b = head / p->Hq, h = head % p->Hq, at = (head * p->nq + iq) * p->nk;
        float *row = c->scores ? c->scores + at : w.score;
        psa__score_rows(p, c->q, c->k, psa__align(c->work), b, h, iq, m, &w, row);
        for (int64_t x = 0; x < m; x++) {
            psa__mask_row(p, row + x * p->nk, NULL, 0, psa__cap_of(p, c->work, b, h), iq + x, &w,
                          c->levels + at + x * p->nk);
        }
    }
    p->leaves->leave(mode);
}

static void psa__call_attend(void *ctx, int ith, int nth)
{
    psa__call *c = (psa__call *)ctx;
    psa_attend(c->plan, c->q, c->k, c->v, c->levels, c->work, c->out, c->lse, ith, nth);
}

/* ---- few queries: the keys are split ---- */

/* Parts of the keys for a dense call whose queries alone are too few tasks, or 1. It does not depend on the number of
 * threads, so that the results do not either. */
static int64_t psa__key_parts(const psa_plan *p)
{
    enum { TASKS = 64, FEWEST_KEYS = 1024 };
    int64_t tasks = p->B * p->Hq / psa__heads_together(p, NULL);
    if (p->desc.mask != PSA_MASK_DENSE || p->nq > 1 || tasks >= TASKS) return 1;
    return psa__max(psa__min(TASKS / tasks, (p->Nk - p->Nq) / FEWEST_KEYS), 1);
}

/* Attention over each part of the keys by itself, then the merge. */
typedef struct psa__split {
    const psa__call *call;
    psa_plan plan[2];        /* of a part, and of the last one, which holds what is left and the causal diagonal */
    int64_t parts, keys;     /* keys of a part */
    int64_t tasks;           /* independent query blocks of a part */
    psa_tensor out;          /* f32, of a part */
    char *memory;            /* per part: out, lse, workspace */
    size_t at_lse, at_work, size;
} psa__split;

static psa_result psa__split_init(psa__split *s, const psa__call *c, int64_t parts)
{
    const psa_plan *p = c->plan;
    psa_desc desc = p->desc;
    size_t rows = (size_t)(p->B * p->Hq * p->Nq), work = 0;
    memset(s, 0, sizeof *s);
    s->call = c;
    s->parts = parts;
    s->keys = (p->Nk - p->Nq) / parts;
    s->tasks = p->B * p->Hq / psa__heads_together(p, NULL);
    s->out = psa_tensor_4d(NULL, PSA_F32, p->Dv, p->Nq, p->Hq, p->B);
    desc.n_threads = (int)s->tasks;
    desc.order_k.index = NULL; /* the order of the keys makes no difference */
    for (int i = 0; i < 2; i++) {
        psa_tensor k = p->k, v = p->v;
        psa_result r;
        k.ne[1] = v.ne[1] = i ? p->Nk - (parts - 1) * s->keys : s->keys;
        desc.causal = i && p->desc.causal;
        s->plan[i].desc = desc;
        s->plan[i].leaves = p->leaves;
        if ((r = psa__plan_fill(&s->plan[i], &p->q, &k, &v, &s->out)) != PSA_OK) return r;
        if (s->plan[i].work_size > work) work = s->plan[i].work_size;
    }
    psa__take(&s->size, psa__mul(rows, (size_t)p->Dv), sizeof(float));
    s->at_lse = psa__take(&s->size, rows, sizeof(float));
    s->at_work = psa__take(&s->size, work, 1);
    return PSA_OK;
}

static void psa__split_attend(void *ctx, int ith, int nth)
{
    psa__split *s = (psa__split *)ctx;
    const psa__call *c = s->call;
    int64_t begin, end;
    psa__share(s->parts * s->tasks, ith, nth, &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        int64_t part = i / s->tasks;
        char *at = s->memory + (size_t)part * s->size;
        size_t k = (size_t)(part * s->keys) * c->plan->k.nb[1], v = (size_t)(part * s->keys) * c->plan->v.nb[1];
        psa_attend(&s->plan[part == s->parts - 1], c->q, (const char *)c->k + k, (const char *)c->v + v, NULL,
                   at + s->at_work, at, (float *)(void *)(at + s->at_lse), (int)(i % s->tasks), (int)s->tasks);
    }
}

static void psa__split_merge(void *ctx, int ith, int nth)
{
    psa__split *s = (psa__split *)ctx;
    const psa__call *c = s->call;
    const psa_plan *p = c->plan;
    float *lse = (float *)(void *)(s->memory + s->at_lse);
    int64_t begin, end;
    psa__share(p->B * p->Hq * p->Nq, ith, nth, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        size_t at = (size_t)(row * p->Dv) * sizeof(float), head = (size_t)(row / p->Nq);
        char *to = (char *)c->out + psa__offset(&p->out, (int64_t)head / p->Hq, (int64_t)head % p->Hq, row % p->Nq);
        for (int64_t part = 1; part < s->parts; part++) {
            const char *from = s->memory + (size_t)part * s->size;
            psa__merge_row(&s->out, s->memory + at, lse + row, &s->out, from + at,
                           ((const float *)(const void *)(from + s->at_lse))[row]);
        }
        psa__from_f32(to, p->out.type, (const float *)(const void *)(s->memory + at), p->Dv);
        if (c->lse) c->lse[row] = lse[row];
    }
}

/* ---- memory ---- */

/* A block that psa__align makes `size` bytes, in *memory. */
static psa_result psa__call_alloc(const psa_desc *d, size_t size, void **memory)
{
    size = psa__add(size, 63);
    *memory = size > SIZE_MAX / 2 ? NULL : d->alloc_fn ? d->alloc_fn(d->alloc_user, size) : malloc(size);
    if (*memory) return PSA_OK;
    return psa__fail(d, PSA_ERR_MEMORY, "no memory for %llu bytes of workspace", (unsigned long long)size);
}

static void psa__call_free(const psa_desc *d, void *memory)
{
    if (d->free_fn) {
        d->free_fn(d->alloc_user, memory);
    } else {
        free(memory);
    }
}

/* ---- the call ---- */

/* A dense call in parts. stats may be NULL. */
static psa_result psa__call_split(const psa__call *c, int64_t parts, psa_stats *stats)
{
    const psa_desc *desc = &c->plan->desc;
    psa__split s;
    void *memory;
    psa_result r = psa__split_init(&s, c, parts);
    if (r != PSA_OK) return r;
    if ((r = psa__call_alloc(desc, psa__mul(s.size, (size_t)parts), &memory)) != PSA_OK) return r;
    s.memory = psa__align(memory);
    psa__parallel(c->plan, psa__split_attend, &s);
    psa__parallel(c->plan, psa__split_merge, &s);
    if (stats) {
        psa_stats_from_levels(c->plan, NULL, -1, -1, stats);
        stats->mul_adds = 0;
        for (int64_t part = 0; part < parts; part++) {
            stats->mul_adds += psa_mul_adds(&s.plan[part == parts - 1], s.memory + (size_t)part * s.size + s.at_work);
        }
    }
    psa__call_free(desc, memory);
    return PSA_OK;
}

/* Everything before attend. given: the map is the caller's. */
static void psa__call_map(psa__call *c, int given)
{
    const psa_plan *p = c->plan;
    if (p->desc.mask == PSA_MASK_DENSE) {
        if (c->levels && !given) psa_mask(p, NULL, c->work, c->levels, 0, 1);
        return;
    }
    if (p->desc.tree || psa__weighted(p)) psa__parallel(p, psa__call_prepare, c);
    psa__parallel(p, psa__call_pool, c);
    if (given) return;
    if (psa__priced(p)) {
        psa__parallel(p, psa__call_score, c);
        psa__parallel(p, psa__call_budget, c);
        psa__parallel(p, psa__call_mask, c);
    } else {
        psa__parallel(p, psa__call_levels, c);
    }
}

/* A call in one part, with the maps that the caller does not give: of scores only where a density is to be met. */
static psa_result psa__call_whole(psa__call *c, int given, psa_stats *stats)
{
    const psa_plan *p = c->plan;
    int no_levels = p->desc.mask != PSA_MASK_DENSE && !c->levels;
    int no_scores = p->desc.mask != PSA_MASK_ERROR && psa__priced(p) && !given && !c->scores;
    size_t size = 0, map = psa_map_size(p), at_levels, at_scores;
    void *memory;
    psa_result r;
    psa__take(&size, p->work_size, 1);
    at_levels = psa__take(&size, no_levels ? map : 0, 1);
    at_scores = psa__take(&size, no_scores ? map : 0, sizeof(float));
    if ((r = psa__call_alloc(&p->desc, size, &memory)) != PSA_OK) return r;
    c->work = psa__align(memory);
    if (no_levels) c->levels = (uint8_t *)c->work + at_levels;
    if (no_scores) c->scores = (float *)(void *)((char *)c->work + at_scores);
    psa__call_map(c, given);
    psa__parallel(p, psa__call_attend, c);
    if (stats) {
        psa_stats_from_levels(p, c->levels, -1, -1, stats);
        stats->mul_adds = psa_mul_adds(p, c->work);
    }
    psa__call_free(&p->desc, memory);
    return PSA_OK;
}

/* The caller's own map, before anything is computed from it. */
static psa_result psa__check_levels(const psa_plan *p, const uint8_t *levels)
{
    int64_t begin, end;
    return psa__attend_share(p, levels, 0, 1, &begin, &end);
}

PSA__DEF psa_result psa_attention(const psa_desc *desc, const psa_tensor *q, const psa_tensor *k, const psa_tensor *v,
                                  const psa_tensor *out, psa_extra *extra)
{
    psa__call c;
    psa_plan plan;
    psa_result r;
    psa_stats *stats = extra ? &extra->stats : NULL;
    int64_t parts;
    int given = extra && extra->levels_given;
    if (!v || !out) return psa__fail(desc, PSA_ERR_NULL, "v and out must not be NULL");
    if ((r = psa_plan_init(&plan, desc, q, k, v, out)) != PSA_OK) return r;
    if (!q->data || !k->data || !v->data || !out->data) return psa__fail(desc, PSA_ERR_NULL, "a tensor has no data");
    memset(&c, 0, sizeof c);
    c.plan = &plan;
    c.q = q->data;
    c.k = k->data;
    c.v = v->data;
    c.out = out->data;
    if (extra) {
        c.lse = extra->lse;
        c.scores = extra->scores;
        c.levels = extra->levels;
    }
    if (given && !c.levels) return psa__fail(desc, PSA_ERR_NULL, "levels_given without levels");
    if (given && (r = psa__check_levels(&plan, c.levels)) != PSA_OK) return r;
    parts = c.levels ? 1 : psa__key_parts(&plan);
    return parts > 1 ? psa__call_split(&c, parts, stats) : psa__call_whole(&c, given, stats);
}

/* ================================================================================================================= */
/* >>stats                                                                                                           */
/* ================================================================================================================= */

static void psa__stats_row(const psa_plan *p, const uint8_t *level, int64_t iq, psa_stats *s)
{
    int64_t n = psa__n_visible(p, iq), whole = psa__n_whole(p, iq);
    int64_t each = psa__block_q_rows(p, iq) * (p->D + p->Dv);
    for (int64_t j = 0; j < n; j++) {
        int factor = !level || j >= whole ? 1 : level[j], i = psa__log2(factor);
        s->pairs++;
        s->dense_mul_adds += psa__block_k_rows(p, j) * each;
        s->level_blocks[factor ? i + 1 : 0]++;
        if (factor == 0) continue;
        s->density += 1.0 / factor;
        s->mul_adds += psa__level_rows(p, j, i) * each;
    }
}

PSA__DEF psa_result psa_stats_from_levels(const psa_plan *plan, const uint8_t *levels, int64_t b, int64_t h,
                                          psa_stats *stats)
{
    psa_stats s;
    int rows[256];
    if (!plan || !stats) return PSA_ERR_NULL;
    if (b < -1 || b >= plan->B || h < -1 || h >= plan->Hq) return PSA_ERR_SHAPE;
    memset(&s, 0, sizeof s);
    psa__rows_of_levels(plan, rows);
    for (int64_t task = 0; task < plan->B * plan->Hq * plan->nq; task++) {
        int64_t head = task / plan->nq;
        const uint8_t *level = levels ? levels + task * plan->nk : NULL;
        if ((b >= 0 && head / plan->Hq != b) || (h >= 0 && head % plan->Hq != h)) continue;
        if (psa__block_cost(plan, rows, level, task % plan->nq) < 0) return PSA_ERR_LEVEL_MAP;
        psa__stats_row(plan, level, task % plan->nq, &s);
    }
    if (s.pairs) s.density /= (double)s.pairs;
    s.sparsity = 1.0 - s.density;
    *stats = s;
    return PSA_OK;
}

/* ================================================================================================================= */
/* >>presets                                                                                                         */
/* ================================================================================================================= */

/* Source: the official repository's settings. Grids: Wan's video autoencoder takes 4 frames and 8x8 pixels (2.2-5b:
 * 16x16) to a latent, CogVideoX's 4 frames and 8x8; both pool 2x2 latents to a token, CogVideoX 1.5 two in time too. */
typedef struct psa__preset {
    psa_preset info;
    int block_k;
    psa_mask_kind mask;
    double level_end[4];
    double min_full;
    int n_sim_min;
    double sim_min[3];
} psa__preset;

#define PSA__T PSA_MASK_THRESHOLD
#define PSA__K PSA_MASK_TOPK
#define PSA__G PSA_ORDER_GILBERT
#define PSA__N PSA_ORDER_NONE
static const psa__preset psa__presets[] = {
    {{"wan2.1-14b", PSA__G, 15, 0, 0, 4, 1, 16}, 128, PSA__T, {.4, .5, .6, .8}, .06, 0, {0, 0, 0}},
    {{"wan2.1-1.3b", PSA__G, 15, 0, 0, 4, 1, 16}, 128, PSA__T, {.5, .6, .7, .8}, .06, 3, {.7, .65, .6}},
    {{"wan2.1-1.3b-topk", PSA__G, 15, 0, 0, 4, 1, 16}, 32, PSA__K, {.05, .1, .15, .25}, 0, 0, {0, 0, 0}},
    {{"wan2.2-a14b", PSA__G, 12, 0, 0, 4, 1, 16}, 32, PSA__T, {.5, .6, .6, .8}, .06, 0, {0, 0, 0}},
    {{"wan2.2-5b", PSA__G, 15, 0, 0, 4, 1, 32}, 32, PSA__T, {.6, .7, .7, .8}, .06, 0, {0, 0, 0}},
    {{"cogvideox1.5-5b", PSA__G, 15, 0, 226, 4, 2, 16}, 32, PSA__K, {.1, .15, .15, .35}, 0, 0, {0, 0, 0}},
    {{"cogvideox-5b", PSA__N, 15, 0, 226, 4, 1, 16}, 128, PSA__K, {.1, .15, .15, .35}, 0, 0, {0, 0, 0}},
    {{"cogvideox-5b-4step", PSA__N, 0, 0, 226, 4, 1, 16}, 128, PSA__K, {.05, .15, .25, .5}, 0, 0, {0, 0, 0}},
    {{"qwen2.5-vl", PSA__N, 0, 0, 0, 0, 0, 0}, 128, PSA__T, {.7, .8, .9, .9}, 0, 3, {.75, .7, .7}},
    {{"default", PSA__N, 0, 0, 0, 0, 0, 0}, 64, PSA__K, {.1, .15, .15, .35}, 0, 0, {0, 0, 0}},
    {{"paper-25", PSA__G, 0, .25, 0, 0, 0, 0}, 64, PSA__K, {.15, .25, .45, 0}, 0, 0, {0, 0, 0}},
    {{"recipe", PSA__N, 0, 0, 0, 0, 0, 0}, 64, PSA_MASK_ERROR, {0, 0, 0, 0}, 0, 0, {0, 0, 0}},
};
#undef PSA__T
#undef PSA__K
#undef PSA__G
#undef PSA__N

PSA__DEF const char *psa_preset_name(int i)
{
    return i >= 0 && i < (int)(sizeof psa__presets / sizeof *psa__presets) ? psa__presets[i].info.name : NULL;
}

static const psa__preset *psa__preset_find(const char *name)
{
    for (int i = 0; name && psa_preset_name(i); i++) {
        if (strcmp(name, psa_preset_name(i)) == 0) return &psa__presets[i];
    }
    return NULL;
}

PSA__DEF const psa_preset *psa_preset_find(const char *name)
{
    const psa__preset *p = psa__preset_find(name);
    return p ? &p->info : NULL;
}

PSA__DEF psa_result psa_desc_preset(const char *name, psa_desc *desc)
{
    const psa__preset *p = psa__preset_find(name);
    if (!desc) return PSA_ERR_NULL;
    if (!p) return PSA_ERR_PRESET;
    memset(desc, 0, sizeof *desc);
    desc->block_q = 128;
    desc->block_k = p->block_k;
    desc->mask = p->mask;
    memcpy(desc->level_end, p->level_end, sizeof p->level_end);
    desc->min_full = p->min_full;
    desc->n_sim_min = p->n_sim_min;
    memcpy(desc->sim_min, p->sim_min, sizeof p->sim_min);
    desc->n_prefix = p->info.n_text;
    if (strcmp(name, "qwen2.5-vl") == 0) {
        desc->causal = desc->inclusive = desc->sink = desc->diagonal = 1;
        desc->score = PSA_SCORE_ANTIDIAGONAL;
        desc->stride = 8;
        desc->n_suffix = 512;
    }
    if (p->mask == PSA_MASK_ERROR) {
        desc->tree = PSA_TREE_QKV;
        desc->tilt = 1;
        desc->score_group[0] = 16;
    }
    return PSA_OK;
}

PSA__DEF psa_result psa_preset_grid(const psa_preset *preset, int frames, int height, int width, int grid[3])
{
    int latent;
    if (!preset || !grid) return PSA_ERR_NULL;
    if (preset->frame_step == 0 || frames < 1) return PSA_ERR_GRID;
    if (height < preset->patch_hw || width < preset->patch_hw) return PSA_ERR_GRID;
    latent = (frames - 1) / preset->frame_step + 1; /* the first frame stands alone */
    grid[0] = (latent + preset->patch_t - 1) / preset->patch_t;
    grid[1] = height / preset->patch_hw;
    grid[2] = width / preset->patch_hw;
    return PSA_OK;
}

#ifdef __cplusplus
}
#endif
#define PSA_IMPLEMENTATION_DONE
#endif /* !PSA__PASS */
#endif /* PSA_IMPLEMENTATION */

/* MIT licence
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
 * Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS
 * OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
