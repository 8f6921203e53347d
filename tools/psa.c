/* psa - pyramid sparse attention on .npy files: attend, score, mask, order, bench, info.
 *
 *     cc -std=c99 -O2 -I. tools/psa.c -o psa -lcjson -lm -pthread
 */
#define _POSIX_C_SOURCE 200809L
#define PSA_IMPLEMENTATION
#include "psa.h"

#include <cjson/cJSON.h>

#include "npy.h"
#include "options.h"
#include "run.h"
#include "level_map_png.h"
#include "bench.h"

/* ================================================================================================================= */
/* Output files: all of them are finished under temporary names before the first one gets its own.                   */
/* ================================================================================================================= */

enum { MOST_OUTPUTS = 8 };

typedef struct outputs {
    int n;
    const char *path[MOST_OUTPUTS];
    char *temp[MOST_OUTPUTS];
} outputs;

static int check_writable(const options *o, const char *path) {
    struct stat there;
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/');
    if (strlen(path) + 64 > sizeof folder) /* leaves room for a temporary name */
        return fail(o, "%.64s...: cannot write: %s", path, strerror(ENAMETOOLONG));
    snprintf(folder, sizeof folder, "%.*s", slash ? (int)(slash - path + 1) : 1, slash ? path : ".");
    if (stat(path, &there) == 0 && !S_ISREG(there.st_mode))
        return fail(o, "%s: cannot write: not a regular file", path);
    if (access(folder, W_OK) != 0)
        return fail(o, "%s: cannot write: %s", path, strerror(errno));
    return 0;
}

/* The file name in path, and in *dir what is known of the directory before it. */
static const char *file_name(const char *path, struct stat *dir) {
    char name[PATH_MAX];
    const char *slash = strrchr(path, '/'), *base = slash ? slash + 1 : path;
    snprintf(name, sizeof name, "%.*s.", (int)(base - path), path);
    if (stat(name, dir) != 0)
        memset(dir, 0, sizeof *dir);
    return base;
}

static int same_file(const char *a, const char *b) {
    struct stat dir_a, dir_b;
    return strcmp(file_name(a, &dir_a), file_name(b, &dir_b)) == 0 && dir_a.st_dev == dir_b.st_dev &&
           dir_a.st_ino == dir_b.st_ino;
}

/* Before the work starts. path NULL: not wanted. */
static int outputs_add(outputs *u, const options *o, const char *path) {
    if (!path)
        return 0;
    for (int i = 0; i < u->n; i++)
        if (same_file(u->path[i], path))
            return fail(o, "%s: two outputs have this name", path);
    if (check_writable(o, path))
        return 2;
    size_t size = strlen(path) + 32;
    char *temp = (char *)malloc(size);
    if (!temp)
        return fail(o, "not enough memory");
    snprintf(temp, size, "%s.%ld", path, (long)getpid());
    u->path[u->n] = path;
    u->temp[u->n++] = temp;
    return 0;
}

static const char *outputs_temp(const outputs *u, const char *path) {
    for (int i = 0; i < u->n; i++)
        if (u->path[i] == path)
            return u->temp[i];
    return NULL;
}

static int outputs_npy(const outputs *u, const options *o, const char *path, const char *descr, int ndim,
                       const int64_t *shape, const void *data) {
    char err[PATH_MAX + 256];
    const char *temp = path ? outputs_temp(u, path) : NULL;
    if (temp && npy_write(temp, descr, ndim, shape, data, err, sizeof err) != 0)
        return fail(o, "%s%s", path, err + strlen(temp)); /* the error begins with the name */
    return 0;
}

/* Gives the files their names; if that fails for one, takes the earlier ones back. */
static int outputs_commit(outputs *u, const options *o) {
    for (int i = 0; i < u->n; i++)
        if (rename(u->temp[i], u->path[i]) != 0) {
            fail(o, "%s: cannot write: %s", u->path[i], strerror(errno));
            while (i-- > 0)
                remove(u->path[i]);
            return 2;
        }
    return 0;
}

/* What was not committed disappears. */
static void outputs_free(outputs *u) {
    for (int i = 0; i < u->n; i++) {
        remove(u->temp[i]);
        free(u->temp[i]);
    }
}

/* ================================================================================================================= */
/* Input files                                                                                                       */
/* ================================================================================================================= */

/* rank: that of a full shape. Missing outer axes are 1. */
static int read_array(const options *o, const char *flag, const char *path, int rank, npy *a, int64_t shape[4]) {
    char err[PATH_MAX + 256];
    if (!path)
        return fail(o, "%s FILE is required (%s --help)", flag, o->syntax->name);
    if (npy_read(path, a, err, sizeof err) != 0)
        return fail(o, "%s", err);
    if (a->ndim < 2 || a->ndim > rank)
        return fail(o, "%s: %d axes; expected 2 to %d", path, a->ndim, rank);
    for (int i = 0; i < rank; i++)
        shape[i] = i < rank - a->ndim ? 1 : a->shape[i - (rank - a->ndim)];
    if (a->count == 0)
        return fail(o, "%s: an axis of length 0", path);
    return 0;
}

static int read_tensor(const options *o, const char *flag, const char *path, npy *a, psa_tensor *t) {
    int64_t shape[4];
    psa_type type = PSA_F32;
    if (read_array(o, flag, path, 4, a, shape))
        return 2;
    if (strcmp(a->descr, "<f2") == 0)
        type = PSA_F16;
    else if (strcmp(a->descr, "<u2") == 0)
        type = PSA_BF16;
    else if (strcmp(a->descr, "<f4") != 0)
        return fail(o, "%s: element type '%s'; expected float32, float16, or bfloat16 as uint16", path, a->descr);
    *t = psa_tensor_4d(a->data, type, shape[3], shape[2], shape[1], shape[0]);
    return 0;
}

static const char *type_descr(psa_type type) {
    return type == PSA_F32 ? "<f4" : type == PSA_F16 ? "<f2" : "<u2";
}

/* --type: a tensor and its array in another element type. */
static int convert_tensor(const options *o, npy *a, psa_tensor *t) {
    psa_type type = (psa_type)o->type;
    if (o->type < 0 || type == t->type)
        return 0;
    void *data = malloc(a->count * psa_type_size(type));
    if (!data)
        return fail(o, "not enough memory");
    for (size_t i = 0; i < a->count; i++)
        set_element(data, type, i, get_element(a->data, t->type, i));
    free(a->data);
    a->data = data;
    *t = psa_tensor_4d(data, type, t->ne[0], t->ne[1], t->ne[2], t->ne[3]);
    return 0;
}

/* A score or level map must have the plan's shape. */
static int check_map(const options *o, const char *path, const int64_t shape[4], const psa_plan *p) {
    if (shape[0] == p->B && shape[1] == p->Hq && shape[2] == p->nq && shape[3] == p->nk)
        return 0;
    return fail(o,
                "%s: shape [%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 "]; expected [B,Hq,nq,nk] = [%" PRId64
                ",%" PRId64 ",%" PRId64 ",%" PRId64 "] for blocks of %d queries and %d keys",
                path, shape[0], shape[1], shape[2], shape[3], p->B, p->Hq, p->nq, p->nk, p->desc.block_q,
                p->desc.block_k);
}

/* uint8 or int32 into levels, which holds a->count. */
static int copy_levels(const options *o, const char *path, const npy *a, uint8_t *levels) {
    if (strcmp(a->descr, "|u1") == 0) {
        memcpy(levels, a->data, a->count);
        return 0;
    }
    if (strcmp(a->descr, "<i4") != 0)
        return fail(o, "%s: element type '%s'; expected uint8 or int32", path, a->descr);
    for (size_t i = 0; i < a->count; i++) {
        int32_t level = ((const int32_t *)a->data)[i];
        if (level < 0 || level > PSA_MAX_BLOCK_K)
            return fail(o, "%s: level %d; expected 0 or a power of two up to block_k", path, (int)level);
        levels[i] = (uint8_t)level;
    }
    return 0;
}

/* ================================================================================================================= */
/* attend                                                                                                            */
/* ================================================================================================================= */

typedef struct attention {
    options o;
    npy q_file, k_file, v_file, levels_file;
    psa_tensor q, k, v, out;
    int32_t *order_q, *order_k;
    float *lse;
    void *out_data, *dense_data;
    crew crew;
    gpu gpu;
    run run, dense;
    psa_stats stats;
    double *density; /* [B][Hq] */
    double order_seconds;
    outputs files;
} attention;

static size_t tensor_count(const psa_tensor *t) {
    return (size_t)(t->ne[0] * t->ne[1] * t->ne[2] * t->ne[3]);
}

/* a and b, or their files, differ in the length of an axis. */
static int check_axis(const options *o, int axis, const char *path_a, const psa_tensor *a, const char *path_b,
                      const psa_tensor *b) {
    static const char *const names[] = {"head size D", "token count N", "head count H", "batch size B"};
    if (a->ne[axis] == b->ne[axis])
        return 0;
    return fail(o, "%s: %s is %" PRId64 "; expected %" PRId64 " as in %s", path_a, names[axis], a->ne[axis],
                b->ne[axis], path_b);
}

static int check_keys(const options *o, const psa_tensor *q, const psa_tensor *k) {
    return check_axis(o, 3, o->k, k, o->q, q) || check_axis(o, 0, o->k, k, o->q, q) ? 2 : 0;
}

static int check_values(const options *o, const psa_tensor *k, const psa_tensor *v) {
    for (int axis = 3; axis > 0; axis--)
        if (check_axis(o, axis, o->v, v, o->k, k))
            return 2;
    if (v->type != k->type && o->type < 0)
        return fail(o, "%s: element type %s; expected %s as in %s (or --type)", o->v, type_name((int)v->type),
                    type_name((int)k->type), o->k);
    return 0;
}

static int read_inputs(attention *a) {
    options *o = &a->o;
    if (read_tensor(o, "--q", o->q, &a->q_file, &a->q) || read_tensor(o, "--k", o->k, &a->k_file, &a->k) ||
        read_tensor(o, "--v", o->v, &a->v_file, &a->v) || check_keys(o, &a->q, &a->k) || check_values(o, &a->k, &a->v))
        return 2;
    return convert_tensor(o, &a->q_file, &a->q) || convert_tensor(o, &a->k_file, &a->k) ||
                   convert_tensor(o, &a->v_file, &a->v)
               ? 2
               : 0;
}

static int check_outputs(attention *a) {
    const options *o = &a->o;
    if (!o->out)
        return fail(o, "--out FILE is required (psa attend --help)");
    if (o->save_scores && (o->levels || o->desc.mask == PSA_MASK_DENSE))
        return fail(o, "--save-scores: nothing is scored with --levels or --mask dense");
    if (o->report && (o->levels || o->desc.mask != PSA_MASK_ERROR))
        return fail(o, "--report needs --mask error, which predicts errors, and no --levels");
    const char *paths[] = {o->out, o->lse, o->save_scores, o->save_levels, o->stats, o->png};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        if (outputs_add(&a->files, o, paths[i]))
            return 2;
    return 0;
}

/* ---- token orders ---- */

/* One order for all heads: prefix, grid, suffix. */
static int grid_order(attention *a, int kind, const psa_tensor *x, int32_t **index, psa_order *order) {
    options *o = &a->o;
    const int *g = o->grid, *tile = o->tile;
    int64_t video = (int64_t)g[0] * g[1], text = o->desc.n_prefix + o->desc.n_suffix;
    if (!o->n_grid)
        return fail(o, "order '%s'%s%s needs --grid T,H,W (or --order none)", order_name(o->order),
                    o->preset >= 0 ? " of preset " : "", o->preset >= 0 ? psa_preset_name(o->preset) : "");
    if (video > INT32_MAX || video * g[2] > INT32_MAX || text + video * g[2] != x->ne[1])
        return fail(o,
                    "--grid %d,%d,%d: with %" PRId64 " prefix and %" PRId64
                    " suffix tokens it does not make N = %" PRId64,
                    g[0], g[1], g[2], o->desc.n_prefix, o->desc.n_suffix, x->ne[1]);
    video *= g[2];
    *index = (int32_t *)malloc((size_t)x->ne[1] * sizeof **index);
    if (!*index)
        return fail(o, "not enough memory");
    int32_t *inside = *index + o->desc.n_prefix;
    psa_result result = kind == PSA_ORDER_TILE ? psa_order_tile(g[0], g[1], g[2], tile[0], tile[1], tile[2], inside)
                                               : psa_order_gilbert(g[0], g[1], g[2], inside);
    if (result != PSA_OK)
        return fail(o, "%s", psa_result_string(result));
    psa_order_embed(*index, o->desc.n_prefix, video, o->desc.n_suffix);
    order->index = *index;
    return 0;
}

typedef struct clustering {
    const psa_tensor *x;
    const psa_desc *desc;
    int n_clusters;
    float *centroids;
    int32_t *index;
    void *work;
    psa_result *results;
} clustering;

static void cluster_task(void *ctx, int ith, int nth) {
    clustering *s = (clustering *)ctx;
    const int iterations = 10; /* the order hardly changes after that */
    s->results[ith] = psa_order_semantic(s->x, s->desc->n_prefix, s->desc->n_suffix, s->n_clusters, iterations,
                                         s->centroids, 0, s->index, s->work, ith, nth);
}

/* An order of its own for every head. */
static int semantic_order(attention *a, const psa_tensor *x, int32_t **index, psa_order *order) {
    const options *o = &a->o;
    int64_t video = x->ne[1] - o->desc.n_prefix - o->desc.n_suffix, heads = x->ne[2] * x->ne[3];
    int nth = a->crew.n_threads, rc = 0;
    if (video < 1)
        return fail(o, "order '%s': prefix and suffix leave no video tokens", order_name(o->order));
    clustering s = {x, &o->desc, (int)(o->clusters < video ? o->clusters : video), NULL, NULL, NULL, NULL};
    size_t work = psa_order_semantic_work_size(x, s.n_clusters, nth);
    s.centroids = (float *)malloc((size_t)(heads * s.n_clusters * x->ne[0]) * sizeof *s.centroids);
    s.index = *index = (int32_t *)malloc((size_t)(heads * x->ne[1]) * sizeof **index);
    s.work = malloc(work + 1);
    s.results = (psa_result *)calloc((size_t)nth, sizeof *s.results);
    if (!s.centroids || !s.index || !s.work || !s.results)
        rc = fail(o, "not enough memory");
    else
        crew_run(&a->crew, nth, cluster_task, &s);
    for (int i = 0; i < nth && rc == 0; i++)
        if (s.results[i] != PSA_OK)
            rc = fail(o, "%s", psa_result_string(s.results[i]));
    free(s.centroids);
    free(s.work);
    free(s.results);
    order->index = *index;
    order->stride_h = x->ne[1];
    order->stride_b = x->ne[1] * x->ne[2];
    return rc;
}

static int make_order(attention *a, int kind, const psa_tensor *x, int32_t **index, psa_order *order) {
    if (kind == PSA_ORDER_SEMANTIC)
        return semantic_order(a, x, index, order);
    return grid_order(a, kind, x, index, order);
}

static int make_orders(attention *a) {
    int kind = a->o.order, hybrid = kind == PSA_ORDER_HYBRID;
    double start = now();
    if (kind == PSA_ORDER_NONE || kind == ORDER_TREE || (kind == ORDER_TREE_KV && !a->o.n_grid))
        return 0;
    if (kind == ORDER_TREE_KV)
        return grid_order(a, PSA_ORDER_GILBERT, &a->q, &a->order_q, &a->o.desc.order_q);
    if (make_order(a, hybrid ? PSA_ORDER_GILBERT : kind, &a->q, &a->order_q, &a->o.desc.order_q) ||
        make_order(a, hybrid ? PSA_ORDER_SEMANTIC : kind, &a->k, &a->order_k, &a->o.desc.order_k))
        return 2;
    a->order_seconds = now() - start;
    return 0;
}

/* ---- the work ---- */

/* Into levels, which is to be freed. */
static int read_levels(attention *a, uint8_t **levels, int64_t shape[4]) {
    const options *o = &a->o;
    if (read_array(o, "--levels", o->levels, 4, &a->levels_file, shape))
        return 2;
    *levels = (uint8_t *)malloc(a->levels_file.count);
    if (!*levels)
        return fail(o, "not enough memory");
    return copy_levels(o, o->levels, &a->levels_file, *levels);
}

/* Where --backend says. */
static int attend_run(attention *a, run *r, int levels_given) {
    r->gpu = a->o.backend == BACKEND_CUDA ? &a->gpu : NULL;
    return run_attention(r, &a->o, levels_given);
}

static int attend_given_levels(attention *a) {
    psa_desc desc = a->o.desc;
    uint8_t *levels = NULL;
    int64_t shape[4];
    int rc = read_levels(a, &levels, shape);
    desc.mask = PSA_MASK_TOPK; /* a dense plan would not pool */
    if (rc == 0)
        rc = run_init(&a->run, &a->o, &a->crew, &desc, tasks(&a->crew), &a->q, &a->k, &a->v, &a->out);
    if (rc == 0)
        rc = check_map(&a->o, a->o.levels, shape, &a->run.plan);
    if (rc == 0) {
        memcpy(a->run.levels, levels, a->levels_file.count);
        a->run.lse = a->lse;
        rc = attend_run(a, &a->run, 1);
    }
    free(levels);
    return rc;
}

static int attend_psa(attention *a) {
    if (a->o.levels)
        return attend_given_levels(a);
    if (run_init(&a->run, &a->o, &a->crew, &a->o.desc, tasks(&a->crew), &a->q, &a->k, &a->v, &a->out))
        return 2;
    a->run.lse = a->lse;
    return attend_run(a, &a->run, 0);
}

/* The same call without the mask, in the caller's token order. */
static int attend_dense(attention *a) {
    psa_desc desc = a->o.desc;
    psa_tensor out = a->out;
    desc.mask = PSA_MASK_DENSE;
    desc.tree = PSA_TREE_NONE;
    desc.lambda = 0;
    memset(desc.level_count, 0, sizeof desc.level_count);
    memset(&desc.order_q, 0, sizeof desc.order_q);
    memset(&desc.order_k, 0, sizeof desc.order_k);
    out.data = a->dense_data;
    if (run_init(&a->dense, &a->o, &a->crew, &desc, tasks(&a->crew), &a->q, &a->k, &a->v, &out))
        return 2;
    return attend_run(a, &a->dense, 0);
}

static int count_work(attention *a) {
    const psa_plan *p = &a->run.plan;
    psa_result result = psa_stats_from_levels(p, a->run.levels, -1, -1, &a->stats);
    a->density = (double *)calloc((size_t)(p->B * p->Hq), sizeof *a->density);
    if (!a->density)
        return fail(&a->o, "not enough memory");
    for (int64_t i = 0; i < p->B * p->Hq && result == PSA_OK; i++) {
        psa_stats one;
        result = psa_stats_from_levels(p, a->run.levels, i / p->Hq, i % p->Hq, &one);
        a->density[i] = one.density;
    }
    if (result != PSA_OK)
        return run_fail(&a->o, &a->run, result);
    a->stats.mul_adds = run_mul_adds(&a->run);
    return 0;
}

static int do_attention(attention *a) {
    size_t rows = (size_t)(a->q.ne[1] * a->q.ne[2] * a->q.ne[3]), count = rows * (size_t)a->v.ne[0];
    a->out_data = calloc(count, psa_type_size(a->q.type));
    a->lse = (float *)calloc(rows, sizeof *a->lse);
    if (a->o.compare)
        a->dense_data = calloc(count, psa_type_size(a->q.type));
    if (!a->out_data || !a->lse || (a->o.compare && !a->dense_data))
        return fail(&a->o, "not enough memory");
    a->out = psa_tensor_4d(a->out_data, a->q.type, a->v.ne[0], a->q.ne[1], a->q.ne[2], a->q.ne[3]);
    if (make_orders(a) || attend_psa(a) || count_work(a))
        return 2;
    return a->o.compare ? attend_dense(a) : 0;
}

/* ---- results ---- */

static double psa_seconds(const attention *a) {
    return a->order_seconds + run_seconds(&a->run);
}

static cJSON *stats_json(const attention *a) {
    const psa_plan *p = &a->run.plan;
    cJSON *json = cJSON_CreateObject(), *blocks, *seconds, *heads;
    const int64_t shape[] = {p->B, p->Hq, p->Hkv, p->Nq, p->Nk, p->D, p->Dv, p->nq, p->nk};
    static const char *const names[] = {"B", "Hq", "Hkv", "Nq", "Nk", "D", "Dv", "nq", "nk"};
    for (int i = 0; i < 9; i++)
        cJSON_AddNumberToObject(json, names[i], (double)shape[i]);
    cJSON_AddNumberToObject(json, "density", a->stats.density);
    cJSON_AddNumberToObject(json, "sparsity", a->stats.sparsity);
    cJSON_AddNumberToObject(json, "mul_adds", (double)a->stats.mul_adds);
    cJSON_AddNumberToObject(json, "dense_mul_adds", (double)a->stats.dense_mul_adds);
    cJSON_AddNumberToObject(json, "pairs", (double)a->stats.pairs);
    blocks = cJSON_AddObjectToObject(json, "level_blocks");
    for (int i = 0; i <= PSA_MAX_LEVELS; i++) {
        char level[8];
        snprintf(level, sizeof level, "%d", i ? 1 << (i - 1) : 0);
        cJSON_AddNumberToObject(blocks, level, (double)a->stats.level_blocks[i]);
    }
    heads = cJSON_AddArrayToObject(json, "head_density");
    for (int64_t b = 0; b < p->B; b++)
        cJSON_AddItemToArray(heads, cJSON_CreateDoubleArray(a->density + b * p->Hq, (int)p->Hq));
    seconds = cJSON_AddObjectToObject(json, "seconds");
    cJSON_AddNumberToObject(seconds, "order", a->order_seconds);
    for (int i = 0; i < STAGES; i++)
        cJSON_AddNumberToObject(seconds, stage_names[i], a->run.seconds[i]);
    cJSON_AddNumberToObject(seconds, "total", psa_seconds(a));
    if (a->o.compare)
        cJSON_AddNumberToObject(seconds, "dense", run_seconds(&a->dense));
    cJSON_AddStringToObject(json, "backend", backend_name(a->o.backend));
    if (a->run.gpu) {
        cJSON_AddNumberToObject(seconds, "copy", a->run.copy_seconds);
        cJSON_AddStringToObject(json, "device", a->gpu.name);
    } else {
        cJSON_AddNumberToObject(json, "threads", a->crew.n_threads);
        cJSON_AddStringToObject(json, "isa", psa_isa_name(p->desc.isa));
    }
    return json;
}

static int write_stats(attention *a) {
    const char *path = outputs_temp(&a->files, a->o.stats);
    cJSON *json = stats_json(a);
    char *text = cJSON_Print(json);
    FILE *f = text ? fopen(path, "w") : NULL;
    int bad = !f || fprintf(f, "%s\n", text) < 0;
    if (f && fclose(f) != 0)
        bad = 1;
    cJSON_free(text);
    cJSON_Delete(json);
    return bad ? fail(&a->o, "%s: cannot write: %s", a->o.stats, strerror(errno)) : 0;
}

static int write_picture(attention *a) {
    const psa_plan *p = &a->run.plan;
    level_maps m = {a->run.levels, a->density, p->B,  p->Hq,           p->Nq,
                    p->Nk,         p->nq,      p->nk, p->desc.block_q, p->desc.block_k};
    char err[PATH_MAX + 256];
    const char *temp = outputs_temp(&a->files, a->o.png);
    if (level_map_png(temp, &m, err, sizeof err) != 0)
        return fail(&a->o, "%s%s", a->o.png, err + strlen(temp));
    return 0;
}

static int write_results(attention *a) {
    const options *o = &a->o;
    const psa_plan *p = &a->run.plan;
    const outputs *u = &a->files;
    const int64_t out[] = {p->B, p->Hq, p->Nq, p->Dv}, map[] = {p->B, p->Hq, p->nq, p->nk};
    int rank = a->q_file.ndim;
    if (outputs_npy(u, o, o->out, type_descr(a->out.type), rank, out + 4 - rank, a->out_data) ||
        outputs_npy(u, o, o->lse, "<f4", rank - 1, out + 4 - rank, a->lse) ||
        outputs_npy(u, o, o->save_scores, "<f4", 4, map, a->run.scores) ||
        outputs_npy(u, o, o->save_levels, "|u1", 4, map, a->run.levels) || (o->stats && write_stats(a)) ||
        (o->png && write_picture(a)))
        return 2;
    return outputs_commit(&a->files, o);
}

static void print_blocks(const psa_stats *s) {
    printf("blocks ");
    for (int i = 1; i <= PSA_MAX_LEVELS; i++)
        if (s->level_blocks[i])
            printf(" level %d: %" PRId64 " ", 1 << (i - 1), s->level_blocks[i]);
    printf(" skip: %" PRId64 "\n", s->level_blocks[0]);
}

static void print_compare(const attention *a) {
    double relative, largest, dense = run_seconds(&a->dense), sparse = psa_seconds(a);
    difference(a->dense_data, a->out_data, a->out.type, tensor_count(&a->out), &relative, &largest);
    printf("\n                       dense          psa\n");
    printf("seconds         %12.4f %12.4f   %.2fx\n", dense, sparse, dense / sparse);
    printf("density         %12.4f %12.4f\n", 1.0, a->stats.density);
    printf("multiply-adds   %12.4g %12.4g\n", (double)run_mul_adds(&a->dense),
           (double)a->stats.mul_adds);
    printf("relative error  %12s %12.4g   L2, against dense\n", "", relative);
    printf("largest error   %12s %12.4g\n", "", largest);
    printf("(one run each; psa bench repeats and warms up)\n");
}

/* Total variance of the values of a KV head. */
static double value_variance(const attention *a, int64_t head) {
    int64_t n = a->v.ne[1], d = a->v.ne[0];
    double total = 0;
    for (int64_t x = 0; x < d; x++) {
        double sum = 0, square = 0;
        for (int64_t i = 0; i < n; i++) {
            double value = (double)get_element(a->v.data, a->v.type, (size_t)((head * n + i) * d + x));
            sum += value;
            square += value * value;
        }
        total += square / (double)n - sum / (double)n * (sum / (double)n);
    }
    return total;
}

/* Squared distance of out from the truth, and squared length of out, over the same rows. */
typedef struct row_error {
    double error, norm;
} row_error;

static row_error rows_error(const attention *a, const void *truth, size_t at, const void *out, size_t out_at) {
    row_error e = {0, 0};
    for (size_t x = 0; x < (size_t)a->v.ne[0]; x++) {
        double is = (double)get_element(out, a->out.type, out_at + x);
        double off = is - (double)get_element(truth, a->out.type, at + x);
        e.error += off * off;
        e.norm += is * is;
    }
    return e;
}

/* The i-th query of a sample: spread by the golden ratio, so that no grid of tokens falls in step with it. */
static int64_t sampled_query(int64_t i, int64_t N) {
    double whole;
    return (int64_t)(modf((double)i * 0.6180339887498949, &whole) * (double)N);
}

/* Dense attention of n of the queries of every head: [B][Hq][n][Dv], to be freed. NULL: it failed. */
static void *sample_dense(attention *a, int64_t n) {
    size_t size = psa_type_size(a->q.type), row = (size_t)a->q.ne[0] * size;
    int64_t N = a->q.ne[1], heads = a->q.ne[2] * a->q.ne[3];
    psa_desc desc = {0};
    psa_tensor q = psa_tensor_4d(malloc((size_t)(heads * n) * row), a->q.type, a->q.ne[0], n, a->q.ne[2], a->q.ne[3]);
    psa_tensor out = psa_tensor_4d(malloc((size_t)(heads * n * a->v.ne[0]) * size), a->q.type, a->v.ne[0], n,
                                   a->q.ne[2], a->q.ne[3]);
    desc.mask = PSA_MASK_DENSE;
    desc.scale = a->o.desc.scale;
    desc.isa = a->o.desc.isa;
    desc.n_threads = a->crew.n_threads;
    for (int64_t i = 0; q.data && i < heads * n; i++)
        memcpy((char *)q.data + (size_t)i * row,
               (char *)a->q.data + (size_t)(i / n * N + sampled_query(i % n, N)) * row, row);
    psa_result result = q.data && out.data ? psa_attention(&desc, &q, &a->k, &a->v, &out, NULL) : PSA_ERR_MEMORY;
    free(q.data);
    if (result == PSA_OK)
        return out.data;
    fail(&a->o, "--report: %s", psa_result_string(result));
    free(out.data);
    return NULL;
}

/* --report: what error the mask predicted for each head, what dense attention of a sample of the queries says of it,
 * and with --compare what it is; all relative. */
static int print_report(attention *a) {
    const psa_plan *p = &a->run.plan;
    int64_t n = p->Nq < 128 ? p->Nq : 128;
    void *truth = sample_dense(a, n);
    if (!truth)
        return 2;
    printf("\nerror of every head, relative to its output (sampled: %d queries against dense)\n", (int)n);
    printf("batch  head   density   predicted    sampled%s\n", a->o.compare ? "   measured" : "");
    for (int64_t i = 0; i < p->B * p->Hq; i++) {
        row_error sampled = {0, 0}, all = {0, 0};
        double predicted = 0;
        psa_predicted_error(p, a->run.work, a->run.levels, i / p->Hq, i % p->Hq, &predicted);
        for (int64_t x = 0; x < n; x++) {
            row_error e = rows_error(a, truth, (size_t)((i * n + x) * p->Dv), a->out_data,
                                     (size_t)((i * p->Nq + sampled_query(x, p->Nq)) * p->Dv));
            sampled.error += e.error, sampled.norm += e.norm;
        }
        for (int64_t x = 0; x < p->Nq; x++) {
            size_t at = (size_t)((i * p->Nq + x) * p->Dv);
            row_error e = rows_error(a, a->o.compare ? a->dense_data : a->out_data, at, a->out_data, at);
            all.error += e.error, all.norm += e.norm;
        }
        int64_t kv = i / p->Hq * p->Hkv + i % p->Hq / (p->Hq / p->Hkv);
        predicted *= value_variance(a, kv) * (double)p->Nq;
        printf("%5d %5d  %8.4f  %10.4g %10.4g", (int)(i / p->Hq), (int)(i % p->Hq), a->density[i],
               sqrt(predicted / all.norm), sqrt(sampled.error / sampled.norm));
        if (a->o.compare)
            printf(" %10.4g", sqrt(all.error / all.norm));
        printf("\n");
    }
    free(truth);
    return 0;
}

static void print_attention(const attention *a) {
    const psa_plan *p = &a->run.plan;
    printf("q [%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64 "] %s  k, v [%" PRId64 ",%" PRId64 ",%" PRId64 ",%" PRId64
           "|%" PRId64 "] %s  blocks %d x %d  ",
           p->B, p->Hq, p->Nq, p->D, type_name((int)a->q.type), p->B, p->Hkv, p->Nk, p->D, p->Dv,
           type_name((int)a->k.type), p->desc.block_q, p->desc.block_k);
    if (a->run.gpu)
        printf("%s\n", a->gpu.name);
    else
        printf("%s, %d threads\n", psa_isa_name(p->desc.isa), a->crew.n_threads);
    printf("density %.4f  sparsity %.4f  multiply-adds %.4g of %.4g\n", a->stats.density, a->stats.sparsity,
           (double)a->stats.mul_adds, (double)a->stats.dense_mul_adds);
    print_blocks(&a->stats);
    printf("seconds  order %.4f ", a->order_seconds);
    for (int i = 0; i < STAGES; i++)
        if (stage_needed(&a->run, i))
            printf(" %s %.4f ", stage_names[i], a->run.seconds[i]);
    printf(" total %.4f\n", psa_seconds(a));
    if (a->run.gpu)
        printf("         copies to the device and back %.4f\n", a->run.copy_seconds);
    if (a->o.compare)
        print_compare(a);
}

static void start_progress(crew *c) {
    c->started = now();
    c->label = isatty(2) ? "" : NULL;
}

static void end_progress(crew *c) {
    if (c->shown > 0)
        fprintf(stderr, "\r\033[K");
    c->label = NULL;
}

static int attend(attention *a) {
    const options *o = &a->o;
    const char *no_gpu = o->backend == BACKEND_CUDA ? gpu_open(&a->gpu) : NULL;
    if (no_gpu)
        return fail(o, "--backend cuda: %s", no_gpu);
    if (check_outputs(a) || read_inputs(a))
        return 2;
    start_progress(&a->crew);
    int rc = do_attention(a);
    end_progress(&a->crew);
    if (rc == 0)
        rc = write_results(a);
    if (rc == 0)
        print_attention(a);
    if (rc == 0 && o->report)
        rc = print_report(a);
    return rc;
}

static int cmd_attend(const options *o) {
    attention a;
    memset(&a, 0, sizeof a);
    a.o = *o;
    crew_start(&a.crew, o->threads);
    int rc = attend(&a);
    crew_stop(&a.crew);
    outputs_free(&a.files);
    run_free(&a.run);
    run_free(&a.dense);
    if (a.gpu.close)
        a.gpu.close(&a.gpu);
    npy *files[] = {&a.q_file, &a.k_file, &a.v_file, &a.levels_file};
    for (int i = 0; i < 4; i++)
        npy_free(files[i]);
    void *owned[] = {a.order_q, a.order_k, a.lse, a.out_data, a.dense_data, a.density};
    for (int i = 0; i < 6; i++)
        free(owned[i]);
    return rc;
}

/* ================================================================================================================= */
/* score, mask, order                                                                                                */
/* ================================================================================================================= */

static int write_one(const options *o, const char *descr, int ndim, const int64_t *shape, const void *data) {
    char err[PATH_MAX + 256];
    return npy_write(o->out, descr, ndim, shape, data, err, sizeof err) ? fail(o, "%s", err) : 0;
}

static int check_out(const options *o) {
    if (!o->out)
        return fail(o, "--out FILE is required (%s --help)", o->syntax->name);
    return check_writable(o, o->out);
}

static int score(const options *o, crew *c, run *r, npy *q_file, npy *k_file) {
    psa_tensor q, k;
    if (check_out(o) || read_tensor(o, "--q", o->q, q_file, &q) || read_tensor(o, "--k", o->k, k_file, &k) ||
        check_keys(o, &q, &k))
        return 2;
    if (run_init(r, o, c, &o->desc, tasks(c), &q, &k, NULL, NULL))
        return 2;
    int pooled = r->plan.desc.score == PSA_SCORE_POOLED;
    if ((pooled && stage_needed(r, PREPARE) && run_stage(r, o, PREPARE)) || (pooled && run_stage(r, o, POOL)) ||
        run_stage(r, o, SCORE))
        return 2;
    const int64_t shape[] = {r->plan.B, r->plan.Hq, r->plan.nq, r->plan.nk};
    return write_one(o, "<f4", 4, shape, r->scores);
}

/* Without queries their number is not known: as many as keys where that makes the map's nq blocks (self-attention),
 * else whole blocks. */
static int mask_shapes(const options *o, const npy *scores, const int64_t shape[4], npy *k_file, psa_tensor *q,
                       psa_tensor *k) {
    int64_t block_q = o->desc.block_q ? o->desc.block_q : 128, block_k = o->desc.block_k ? o->desc.block_k : 64;
    if (strcmp(scores->descr, "<f4") != 0)
        return fail(o, "%s: element type '%s'; expected float32", o->scores, scores->descr);
    *k = psa_tensor_4d(NULL, PSA_F32, 64, shape[3] * block_k, shape[1], shape[0]);
    if (o->k && read_tensor(o, "--k", o->k, k_file, k))
        return 2;
    if (o->desc.n_sim_min && !o->k)
        return fail(o, "--sim-min needs --k FILE");
    int64_t self = (k->ne[1] + block_q - 1) / block_q == shape[2];
    *q = psa_tensor_4d(NULL, PSA_F32, k->ne[0], self ? k->ne[1] : shape[2] * block_q, shape[1], shape[0]);
    return check_axis(o, 3, o->k, k, o->scores, q);
}

static int mask(const options *o, crew *c, run *r, npy *score_file, npy *k_file) {
    int64_t shape[4];
    psa_tensor q, k;
    if (o->desc.mask == PSA_MASK_ERROR)
        return fail(o, "--mask error looks at queries and keys, not at scores: psa attend --save-levels");
    if (check_out(o) || read_array(o, "--scores", o->scores, 4, score_file, shape) ||
        mask_shapes(o, score_file, shape, k_file, &q, &k) ||
        run_init(r, o, c, &o->desc, c->n_threads, &q, &k, NULL, NULL) || check_map(o, o->scores, shape, &r->plan))
        return 2;
    memcpy(r->scores, score_file->data, score_file->count * sizeof *r->scores);
    if ((o->desc.n_sim_min && run_stage(r, o, POOL)) || (stage_needed(r, BUDGET) && run_stage(r, o, BUDGET)) ||
        run_stage(r, o, MASK))
        return 2;
    return write_one(o, "|u1", 4, shape, r->levels);
}

static int score_or_mask(const options *o, int (*work)(const options *, crew *, run *, npy *, npy *)) {
    crew c;
    run r;
    npy first, second;
    memset(&r, 0, sizeof r);
    memset(&first, 0, sizeof first);
    memset(&second, 0, sizeof second);
    crew_start(&c, o->threads);
    start_progress(&c);
    int rc = work(o, &c, &r, &first, &second);
    end_progress(&c);
    crew_stop(&c);
    run_free(&r);
    npy_free(&first);
    npy_free(&second);
    return rc;
}

static int cmd_score(const options *o) {
    return score_or_mask(o, score);
}

static int cmd_mask(const options *o) {
    return score_or_mask(o, mask);
}

static int cmd_order(const options *o) {
    const int *g = o->grid, *tile = o->tile;
    int64_t n = (int64_t)g[0] * g[1];
    if (o->order != PSA_ORDER_GILBERT && o->order != PSA_ORDER_TILE)
        return fail(o, "--order gilbert or --order tile is required");
    if (!o->n_grid)
        return fail(o, "--grid T,H,W is required");
    if (check_out(o))
        return 2;
    if (n > INT32_MAX || n * g[2] > INT32_MAX)
        return fail(o, "--grid %d,%d,%d: too many tokens; expected at most %d", g[0], g[1], g[2], INT32_MAX);
    n *= g[2];
    int32_t *index = (int32_t *)malloc((size_t)n * sizeof *index);
    if (!index)
        return fail(o, "not enough memory");
    psa_result result = o->order == PSA_ORDER_TILE ? psa_order_tile(g[0], g[1], g[2], tile[0], tile[1], tile[2], index)
                                                   : psa_order_gilbert(g[0], g[1], g[2], index);
    int rc = result == PSA_OK ? write_one(o, "<i4", 1, &n, index) : fail(o, "%s", psa_result_string(result));
    free(index);
    return rc;
}

/* ================================================================================================================= */
/* info and usage                                                                                                    */
/* ================================================================================================================= */

static void print_preset(const char *name) {
    const psa_preset *p = psa_preset_find(name);
    psa_desc d;
    char warmup[32], blocks[32], levels[128] = "";
    psa_desc_preset(name, &d);
    if (p->warmup_share > 0)
        snprintf(warmup, sizeof warmup, "%.0f%%", 100 * p->warmup_share);
    else
        snprintf(warmup, sizeof warmup, "%d", p->warmup_steps);
    snprintf(blocks, sizeof blocks, "%d/%d", d.block_q ? d.block_q : 128, d.block_k ? d.block_k : 64);
    for (int i = 0; i < PSA_MAX_LEVELS && d.level_end[i] > 0; i++)
        snprintf(levels + strlen(levels), sizeof levels - strlen(levels), " %.2g", d.level_end[i]);
    if (d.mask == PSA_MASK_ERROR)
        snprintf(levels, sizeof levels, " density %.2g", d.density > 0 ? d.density : 0.15);
    printf("  %-20s %-9s %-8s %-9s %-8s%s%s\n", name, blocks, warmup, mask_name((int)d.mask),
           order_name(preset_order(p, &d)), levels, d.causal ? "  causal" : "");
}

static void print_gpu(void) {
    gpu g;
    const char *no_gpu = gpu_open(&g);
    printf("CUDA: %s\n", no_gpu ? no_gpu : g.name);
    if (!no_gpu)
        g.close(&g);
}

static int cmd_info(int argc, char **argv) {
    if (argc > 0 && strcmp(argv[0], "--help") == 0) {
        printf("psa info\n\nversion, instruction sets, presets\n");
        return 0;
    }
    if (argc > 0) {
        fprintf(stderr, "psa info: unknown option '%s'; known: --help\n", argv[0]);
        return 2;
    }
    printf("psa %s\n\ninstruction sets:", psa_version());
    for (int i = PSA_ISA_SCALAR; i < PSA_ISA_END; i++)
        if (psa_isa_supported((psa_isa)i))
            printf(" %s", psa_isa_name((psa_isa)i));
    printf(" (auto: %s)\n", psa_isa_name(psa_isa_detect()));
    print_gpu();
    printf("\npresets:\n");
    printf("  %-20s %-9s %-8s %-9s %-8s %s\n", "name", "blocks", "warm-up", "mask", "order", "ends of levels 1 2 4 8");
    for (int i = 0; psa_preset_name(i); i++)
        print_preset(psa_preset_name(i));
    return 0;
}

typedef struct command {
    syntax syntax;
    const char *line;
    int (*run)(const options *o);
} command;

static const command commands[] = {
    {{"psa attend", CMD_ATTEND, NULL, 0}, "--q q.npy --k k.npy --v v.npy --out out.npy [options]", cmd_attend},
    {{"psa score", CMD_SCORE, NULL, 0}, "--q q.npy --k k.npy --out scores.npy [options]", cmd_score},
    {{"psa mask", CMD_MASK, NULL, 0}, "--scores scores.npy --out levels.npy [options]", cmd_mask},
    {{"psa order", CMD_ORDER, NULL, 0}, "--order gilbert|tile --grid T,H,W --out perm.npy", cmd_order},
    {{"psa bench", CMD_BENCH, NULL, 0}, "[options]", cmd_bench},
};
enum { COMMAND_COUNT = sizeof commands / sizeof *commands };

static void usage(FILE *f) {
    fprintf(f, "psa %s: pyramid sparse attention on .npy files\n\n", PSA_VERSION);
    for (int i = 0; i < COMMAND_COUNT; i++)
        fprintf(f, "  %-11s %s\n", commands[i].syntax.name, commands[i].line);
    fprintf(f, "  psa info\n  psa COMMAND --help\n\n"
               "Tensors are C-order .npy files [B,H,N,D]; missing outer axes are 1 and stay missing in the output.\n"
               "A bad file, shape or option is one line on stderr and exit status 2; nothing is written then.\n"
               "Gradients are not there yet.\n");
}

static int run_command(const command *c, int argc, char **argv) {
    options o;
    memset(&o, 0, sizeof o);
    int rc = parse_options(&o, &c->syntax, argc, argv);
    if (rc != 0)
        return rc;
    if (!o.help)
        return c->run(&o);
    printf("%s %s\n\n", c->syntax.name, c->line);
    print_options(&c->syntax);
    return 0;
}

static int dispatch(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    for (int i = 0; i < COMMAND_COUNT; i++)
        if (strcmp(name, commands[i].syntax.name + strlen("psa ")) == 0)
            return run_command(&commands[i], argc - 2, argv + 2);
    if (strcmp(name, "info") == 0)
        return cmd_info(argc - 2, argv + 2);
    if (strcmp(name, "help") == 0 || strcmp(name, "--help") == 0) {
        usage(stdout);
        return 0;
    }
    if (argc == 1) {
        usage(stderr);
        return 2;
    }
    fprintf(stderr, "psa: unknown command '%s'; known: attend, score, mask, order, bench, info, help\n", name);
    return 2;
}

int main(int argc, char **argv) {
    int rc = dispatch(argc, argv);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fprintf(stderr, "psa: cannot write to standard output\n");
        rc = 2;
    }
    return rc;
}
