/* psa_ggml.h - pyramid sparse attention as nodes of a ggml graph. MIT licence, as psa.h.
 *
 * For engines that build their graphs with ggml and run them on its CPU backend. Copy psa.h and this file; then
 *
 *     #define PSA_IMPLEMENTATION                    // in one .c or .cpp file
 *     #include "psa_ggml.h"                         // includes psa.h and ggml.h
 *
 *     struct ggml_tensor *out = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0, 0);
 *     struct ggml_tensor *sparse = psa_ggml_replace(ctx, out, &desc);
 *     if (sparse) out = sparse;                     // else ggml's own node stays; desc.log_fn was told why
 *
 * Each stage of psa.h (prepare, pool, score, budget, mask, attend) is one custom node: ggml's threads run it, ggml's
 * barrier stands between the stages, and ggml's allocator owns the workspace, the scores and the level map. Nothing is
 * allocated or locked in a callback. A scheduler keeps custom nodes on the CPU.
 *
 * q [D, Nq, Hq, B], k [D, Nk, Hkv, B], v [Dv, Nk, Hkv, B] as for ggml_flash_attn_ext: f32, f16 or bf16, k and v the
 * same, any strides but the first (permuted views need no ggml_cont), Hq a multiple of Hkv. The result is what
 * ggml_flash_attn_ext makes: f32 [Dv, Hq, Nq, B], contiguous. Token orders of the desc must outlive the graph; what
 * else belongs to a node lies in ctx.
 *
 * desc.n_threads bounds the threads of a node, and the workspace grows with it: set it to the threads of the backend
 * (0: as many as there are processors). Threads of the backend beyond it wait.
 *
 * Nothing here ends the program: what is not possible gives NULL and a line for desc.log_fn. */
#ifndef PSA_GGML_H
#define PSA_GGML_H

#include "ggml.h"
#include "psa.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out = attention(q, k, v), all stages. NULL if these tensors or this desc are not possible, or if ctx
 * has less than psa_ggml_overhead() bytes left. */
PSA_API struct ggml_tensor *psa_ggml_attention(struct ggml_context *ctx, struct ggml_tensor *q, struct ggml_tensor *k,
                                               struct ggml_tensor *v, const psa_desc *desc);

/* The same with a level map of the caller's, an i8 tensor [nk, nq, Hq, B] whose bytes are levels: nothing is scored. An
 * entry that is no level of the desc is found when the graph runs: the output is then NaN. NULL with a tree in the
 * desc: it is found anew in every graph, and a map of blocks of other tokens means nothing. */
PSA_API struct ggml_tensor *psa_ggml_attend(struct ggml_context *ctx, struct ggml_tensor *q, struct ggml_tensor *k,
                                            struct ggml_tensor *v, struct ggml_tensor *levels, const psa_desc *desc);

/* What a ggml_flash_attn_ext node computes, by PSA; the scale is the node's. NULL for nodes with a mask, ALiBi, a logit
 * softcap or sinks. The node itself is left as it is: leave it out of the graph. */
PSA_API struct ggml_tensor *psa_ggml_replace(struct ggml_context *ctx, const struct ggml_tensor *node,
                                             const psa_desc *desc);

/* The level map that an output of the above reads, i8 [nk, nq, Hq, B]; NULL if it is dense. To look at it or to keep it
 * after the graph has run, mark it with ggml_set_output before the graph is allocated. */
PSA_API struct ggml_tensor *psa_ggml_levels(const struct ggml_tensor *out);

/* Bytes that one attention takes from a context made with no_alloc; like ggml_tensor_overhead. */
PSA_API size_t psa_ggml_overhead(void);

/* The plan for a ggml_flash_attn_ext node, for those who run the stages themselves. The plan's data pointers are those
 * of the node and its sources. */
PSA_API psa_result psa_ggml_plan(psa_plan *plan, const psa_desc *desc, const struct ggml_tensor *node);

#ifdef __cplusplus
}
#endif

#endif /* PSA_GGML_H */

#if defined(PSA_IMPLEMENTATION) && !defined(PSA_GGML_IMPLEMENTATION_DONE)
#define PSA_GGML_IMPLEMENTATION_DONE

#ifdef __cplusplus
extern "C" {
#endif

static psa_result psa_ggml__fail(const psa_desc *desc, psa_result result, const char *line)
{
    if (desc->log_fn) desc->log_fn(desc->log_user, line);
    return result;
}

/* ---- tensors ---------------------------------------------------------------------------------------------------- */

static psa_result psa_ggml__view(psa_tensor *view, const psa_desc *desc, const struct ggml_tensor *x)
{
    if (!x) return psa_ggml__fail(desc, PSA_ERR_NULL, "psa_ggml: q, k and v must not be NULL");
    if (x->type != GGML_TYPE_F32 && x->type != GGML_TYPE_F16 && x->type != GGML_TYPE_BF16) {
        char line[128];
        snprintf(line, sizeof line, "psa_ggml: tensor \"%.40s\" is %s; expected f32, f16 or bf16", x->name,
                 ggml_type_name(x->type));
        return psa_ggml__fail(desc, PSA_ERR_TYPE, line);
    }
    view->data = x->data;
    view->type = x->type == GGML_TYPE_F32 ? PSA_F32 : x->type == GGML_TYPE_F16 ? PSA_F16 : PSA_BF16;
    for (int i = 0; i < 4; i++) {
        view->ne[i] = x->ne[i];
        view->nb[i] = x->nb[i];
    }
    return PSA_OK;
}

/* ggml's output is [Dv, H, N, B]: heads and tokens change places. */
static psa_tensor psa_ggml__out(const psa_tensor *q, const psa_tensor *v)
{
    psa_tensor t = psa_tensor_4d(NULL, PSA_F32, v->ne[0], q->ne[1], q->ne[2], q->ne[3]);
    t.nb[2] = t.nb[1];
    t.nb[1] = t.nb[2] * (size_t)q->ne[2];
    return t;
}

static psa_result psa_ggml__plan(psa_plan *plan, const psa_desc *desc, const struct ggml_tensor *q,
                                 const struct ggml_tensor *k, const struct ggml_tensor *v)
{
    psa_tensor tq, tk, tv, out;
    psa_result r;
    if ((r = psa_ggml__view(&tq, desc, q)) != PSA_OK) return r;
    if ((r = psa_ggml__view(&tk, desc, k)) != PSA_OK) return r;
    if ((r = psa_ggml__view(&tv, desc, v)) != PSA_OK) return r;
    out = psa_ggml__out(&tq, &tv);
    return psa_plan_init(plan, desc, &tq, &tk, &tv, &out);
}

/* The parameters of a ggml_flash_attn_ext node: scale, max_bias, logit_softcap. */
static psa_result psa_ggml__parameters(psa_desc *desc, const struct ggml_tensor *node)
{
    float p[3];
    if (!node || node->op != GGML_OP_FLASH_ATTN_EXT) {
        return psa_ggml__fail(desc, PSA_ERR_NULL, "psa_ggml: expected a node made by ggml_flash_attn_ext");
    }
    memcpy(p, node->op_params, sizeof p);
    if (node->src[3]) return psa_ggml__fail(desc, PSA_ERR_MASK, "psa_ggml: unsupported: an attention mask");
    if (node->src[4]) return psa_ggml__fail(desc, PSA_ERR_MASK, "psa_ggml: unsupported: attention sinks");
    if (p[1] != 0.0f) return psa_ggml__fail(desc, PSA_ERR_MASK, "psa_ggml: unsupported: ALiBi (max_bias)");
    if (p[2] != 0.0f) return psa_ggml__fail(desc, PSA_ERR_SCALE, "psa_ggml: unsupported: a logit softcap");
    if (p[0] == 0.0f) return psa_ggml__fail(desc, PSA_ERR_SCALE, "psa_ggml: unsupported: a scale of 0");
    desc->scale = p[0];
    return PSA_OK;
}

PSA__DEF psa_result psa_ggml_plan(psa_plan *plan, const psa_desc *desc, const struct ggml_tensor *node)
{
    psa_desc scaled = *desc;
    psa_result r = psa_ggml__parameters(&scaled, node);
    return r == PSA_OK ? psa_ggml__plan(plan, &scaled, node->src[0], node->src[1], node->src[2]) : r;
}

/* ---- stages: what ggml's threads call --------------------------------------------------------------------------- */

/* How many of ggml's threads work: the plan has scratch for so many. */
static int psa_ggml__threads(const psa_plan *plan, int nth)
{
    return nth < plan->desc.n_threads ? nth : plan->desc.n_threads;
}

/* src: q, k */
static void psa_ggml__prepare(struct ggml_tensor *work, int ith, int nth, void *user)
{
    const psa_plan *plan = (const psa_plan *)user;
    int n = psa_ggml__threads(plan, nth);
    if (ith < n) psa_prepare(plan, work->src[0]->data, work->src[1]->data, work->data, ith, n);
}

/* In place; src: work, k, v */
static void psa_ggml__pool(struct ggml_tensor *work, int ith, int nth, void *user)
{
    const psa_plan *plan = (const psa_plan *)user;
    int n = psa_ggml__threads(plan, nth);
    if (ith < n) psa_pool(plan, work->src[1]->data, work->src[2]->data, work->data, ith, n);
}

/* src: q, k, work */
static void psa_ggml__score(struct ggml_tensor *scores, int ith, int nth, void *user)
{
    const psa_plan *plan = (const psa_plan *)user;
    struct ggml_tensor *const *src = scores->src;
    int n = psa_ggml__threads(plan, nth);
    if (ith < n) psa_score(plan, src[0]->data, src[1]->data, src[2]->data, (float *)scores->data, ith, n);
}

/* In place; src: work, scores */
static void psa_ggml__budget(struct ggml_tensor *work, int ith, int nth, void *user)
{
    const psa_plan *plan = (const psa_plan *)user;
    int n = psa_ggml__threads(plan, nth);
    if (ith < n) psa_budget(plan, (const float *)work->src[1]->data, work->data, ith, n);
}

/* src: scores, work */
static void psa_ggml__mask(struct ggml_tensor *levels, int ith, int nth, void *user)
{
    const psa_plan *plan = (const psa_plan *)user;
    struct ggml_tensor *const *src = levels->src;
    int n = psa_ggml__threads(plan, nth);
    if (ith < n) psa_mask(plan, (const float *)src[0]->data, src[1]->data, (uint8_t *)levels->data, ith, n);
}

/* src: q, k, v, work, levels or none. A bad map is found by every thread before one of them writes. */
static void psa_ggml__attend(struct ggml_tensor *out, int ith, int nth, void *user)
{
    const psa_plan *plan = (const psa_plan *)user;
    struct ggml_tensor *const *src = out->src;
    const uint8_t *levels = src[4] ? (const uint8_t *)src[4]->data : NULL;
    int n = psa_ggml__threads(plan, nth);
    psa_result r = PSA_OK;
    if (ith < n) r = psa_attend(plan, src[0]->data, src[1]->data, src[2]->data, levels, src[3]->data, out->data, NULL,
                                ith, n);
    if (r != PSA_OK && ith == 0) memset(out->data, 0xff, ggml_nbytes(out));
}

/* ---- nodes ------------------------------------------------------------------------------------------------------ */

static struct ggml_tensor *psa_ggml__node(struct ggml_context *ctx, const char *name, enum ggml_type type,
                                          const int64_t ne[4], struct ggml_tensor **src, int n_src,
                                          ggml_custom_op_t stage, psa_plan *plan)
{
    struct ggml_tensor *node =
        ggml_custom_4d(ctx, type, ne[0], ne[1], ne[2], ne[3], src, n_src, stage, GGML_N_TASKS_MAX, plan);
    return ggml_set_name(node, name);
}

/* A stage that goes on with the workspace: the result is a view of it, so that later stages wait for this one. */
static struct ggml_tensor *psa_ggml__step(struct ggml_context *ctx, const char *name, struct ggml_tensor *work,
                                          struct ggml_tensor **src, int n_src, ggml_custom_op_t stage, psa_plan *plan)
{
    return ggml_set_name(ggml_custom_inplace(ctx, work, src, n_src, stage, GGML_N_TASKS_MAX, plan), name);
}

/* The workspace with pooled keys and values. */
static struct ggml_tensor *psa_ggml__work_nodes(struct ggml_context *ctx, psa_plan *plan, struct ggml_tensor *q,
                                                struct ggml_tensor *k, struct ggml_tensor *v)
{
    const int64_t bytes[4] = {(int64_t)psa_work_size(plan), 1, 1, 1};
    struct ggml_tensor *qk[2], *kv[2], *work;
    qk[0] = q, qk[1] = kv[0] = k, kv[1] = v;
    work = psa_ggml__node(ctx, "psa_prepare", GGML_TYPE_I8, bytes, qk, 2, psa_ggml__prepare, plan);
    return psa_ggml__step(ctx, "psa_pool", work, kv, 2, psa_ggml__pool, plan);
}

/* The level map; *work becomes the workspace after it. */
static struct ggml_tensor *psa_ggml__levels_nodes(struct ggml_context *ctx, psa_plan *plan, struct ggml_tensor *q,
                                                  struct ggml_tensor *k, struct ggml_tensor **work)
{
    const int64_t map[4] = {plan->nk, plan->nq, plan->Hq, plan->B};
    struct ggml_tensor *src[3], *scores;
    src[0] = q, src[1] = k, src[2] = *work;
    scores = psa_ggml__node(ctx, "psa_score", GGML_TYPE_F32, map, src, 3, psa_ggml__score, plan);
    *work = psa_ggml__step(ctx, "psa_budget", *work, &scores, 1, psa_ggml__budget, plan);
    src[0] = scores, src[1] = *work;
    return psa_ggml__node(ctx, "psa_mask", GGML_TYPE_I8, map, src, 2, psa_ggml__mask, plan);
}

/* NULL, or what is wrong with the caller's map. */
static const char *psa_ggml__bad_levels(const psa_plan *plan, const struct ggml_tensor *levels)
{
    int fits = levels->ne[0] == plan->nk && levels->ne[1] == plan->nq && levels->ne[2] == plan->Hq;
    if (!fits || levels->ne[3] != plan->B || levels->type != GGML_TYPE_I8 || !ggml_is_contiguous(levels)) {
        return "psa_ggml: levels: expected a contiguous i8 tensor [nk, nq, Hq, B]";
    }
    return plan->desc.tree ? "psa_ggml: levels: unsupported with a tree, which is found anew in every graph" : NULL;
}

/* Where a context owns its tensors' data they need room too: work, scores, levels and output. */
static size_t psa_ggml__room(struct ggml_context *ctx, const psa_plan *plan)
{
    size_t map = psa_map_size(plan), out = (size_t)(plan->B * plan->Hq * plan->Nq * plan->Dv) * sizeof(float);
    size_t data = psa_work_size(plan) + 5 * map + out + 4 * GGML_MEM_ALIGN;
    return psa_ggml_overhead() + (ggml_get_no_alloc(ctx) ? 0 : data);
}

static struct ggml_tensor *psa_ggml__refuse(const psa_desc *desc, psa_result result, const char *line)
{
    psa_ggml__fail(desc, result, line);
    return NULL;
}

/* levels NULL: scored and masked here, unless the desc is dense. */
static struct ggml_tensor *psa_ggml__build(struct ggml_context *ctx, struct ggml_tensor *q, struct ggml_tensor *k,
                                           struct ggml_tensor *v, struct ggml_tensor *levels, const psa_desc *desc)
{
    struct ggml_tensor *src[5];
    int64_t ne[4];
    psa_plan made, *plan;
    if (psa_ggml__plan(&made, desc, q, k, v) != PSA_OK) return NULL;
    if (levels && psa_ggml__bad_levels(&made, levels)) {
        return psa_ggml__refuse(desc, PSA_ERR_LEVEL_MAP, psa_ggml__bad_levels(&made, levels));
    }
    if (ggml_get_mem_size(ctx) - ggml_used_mem(ctx) < psa_ggml__room(ctx, &made)) {
        return psa_ggml__refuse(desc, PSA_ERR_MEMORY, "psa_ggml: the context has no room for psa_ggml_overhead()");
    }
    plan = (psa_plan *)ggml_new_buffer(ctx, sizeof *plan);
    *plan = made;
    ne[0] = plan->Dv, ne[1] = plan->Hq, ne[2] = plan->Nq, ne[3] = plan->B;
    src[0] = q, src[1] = k, src[2] = v;
    src[3] = psa_ggml__work_nodes(ctx, plan, q, k, v);
    if (!levels && desc->mask != PSA_MASK_DENSE) levels = psa_ggml__levels_nodes(ctx, plan, q, k, &src[3]);
    src[4] = levels;
    return psa_ggml__node(ctx, "psa_attend", GGML_TYPE_F32, ne, src, levels ? 5 : 4, psa_ggml__attend, plan);
}

PSA__DEF struct ggml_tensor *psa_ggml_attention(struct ggml_context *ctx, struct ggml_tensor *q, struct ggml_tensor *k,
                                                struct ggml_tensor *v, const psa_desc *desc)
{
    return psa_ggml__build(ctx, q, k, v, NULL, desc);
}

PSA__DEF struct ggml_tensor *psa_ggml_attend(struct ggml_context *ctx, struct ggml_tensor *q, struct ggml_tensor *k,
                                             struct ggml_tensor *v, struct ggml_tensor *levels, const psa_desc *desc)
{
    if (!levels) return psa_ggml__refuse(desc, PSA_ERR_NULL, "psa_ggml: levels must not be NULL");
    return psa_ggml__build(ctx, q, k, v, levels, desc);
}

PSA__DEF struct ggml_tensor *psa_ggml_replace(struct ggml_context *ctx, const struct ggml_tensor *node,
                                              const psa_desc *desc)
{
    psa_desc scaled = *desc;
    if (psa_ggml__parameters(&scaled, node) != PSA_OK) return NULL;
    return psa_ggml__build(ctx, node->src[0], node->src[1], node->src[2], NULL, &scaled);
}

PSA__DEF struct ggml_tensor *psa_ggml_levels(const struct ggml_tensor *out) { return out->src[4]; }

/* A plan and six nodes; a buffer's bookkeeping is that of a tensor at most. */
PSA__DEF size_t psa_ggml_overhead(void)
{
    return 7 * ggml_tensor_overhead() + sizeof(psa_plan) + GGML_MEM_ALIGN;
}

#ifdef __cplusplus
}
#endif

#endif /* PSA_IMPLEMENTATION */
