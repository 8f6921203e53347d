/* psa_preload.c - pyramid sparse attention in a program that runs ggml on the CPU and knows nothing of it.
 *
 *     cc -std=c99 -O2 -shared -fPIC -I. -I$GGML/include examples/ggml/psa_preload.c -o libpsa_preload.so -ldl -lm
 *     PSA_LOG=1 LD_PRELOAD=./libpsa_preload.so PROGRAM ...
 *
 *     PSA_PRESET=NAME       settings of a published model (build/psa info lists them); default: those of psa.h
 *     PSA_DENSITY=0.15      share of dense attention's multiply-adds; default: what the settings make
 *     PSA_GRID=T,H,W        tokens of the video: with them the Gilbert order is used for sequences of this length
 *     PSA_MIN_LENGTH=1024   shorter sequences of queries or keys are left to ggml
 *     PSA_LAYERS=2-5,8      which nodes of a graph, counted from 0; default: all
 *     PSA_LOG=1             a line on stderr for every flash attention node: density and time, or why it is ggml's
 *
 * ggml's CPU backend asks two C functions of its own about every node before it runs the node's kernel. They are meant
 * for weights in special layouts; this library has functions of the same names, which take flash attention nodes and
 * hand everything else on. A node that is not taken runs in ggml, bit for bit: short sequences, decoding, masks, ALiBi,
 * softcaps, sinks. Nodes are counted among those that PSA could take.
 *
 * Compile it against the headers of the very ggml it is loaded into. ELF systems with a libggml-cpu.so only. */
#define _GNU_SOURCE /* dladdr */
#define PSA_IMPLEMENTATION
#define PSA_STATIC
#include "psa_ggml.h"

#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <time.h>

/* ggml-cpu-impl.h, which ggml does not install; these members have kept their places from 0.15 to 0.25. */
struct ggml_compute_params {
    int ith, nth;
    size_t wsize;
    void *wdata;
    struct ggml_threadpool *threadpool;
};

bool ggml_cpu_extra_work_size(int nth, const struct ggml_tensor *node, size_t *size);
bool ggml_cpu_extra_compute_forward(struct ggml_compute_params *params, struct ggml_tensor *node);

/* ---- settings --------------------------------------------------------------------------------------------------- */

enum { MAX_RANGES = 64 };

static struct settings {
    psa_desc desc;
    psa_order order; /* of sequences of n_order tokens */
    int64_t n_order, min_length;
    long layers[MAX_RANGES][2];
    int n_ranges; /* 0: all layers */
    int log;
} settings;

__attribute__((noreturn)) static void refuse(const char *name, const char *expected) {
    fprintf(stderr, "libpsa_preload: %s=%s: expected %s\n", name, getenv(name), expected);
    exit(2);
}

/* A whole number at *text, which moves on behind it; -1 if there is none. */
static long number(const char **text) {
    char *end;
    errno = 0;
    long n = **text >= '0' && **text <= '9' ? strtol(*text, &end, 10) : -1;
    if (n < 0 || errno || n > INT32_MAX)
        return -1;
    *text = end;
    return n;
}

static void read_layers(const char *text) {
    for (;; text++) {
        long *range = settings.layers[settings.n_ranges];
        range[0] = range[1] = number(&text);
        if (*text == '-') {
            text++;
            range[1] = number(&text);
        }
        if (range[0] < 0 || range[1] < range[0] || ++settings.n_ranges == MAX_RANGES || (*text && *text != ','))
            refuse("PSA_LAYERS", "ranges such as 2-5,8");
        if (!*text)
            return;
    }
}

static void read_preset(const char *name) {
    if (psa_desc_preset(name, &settings.desc) != PSA_OK)
        refuse("PSA_PRESET", "a name that build/psa info lists");
    if (settings.desc.causal)
        refuse("PSA_PRESET", "one without causal attention: nodes with a mask are left to ggml");
}

static void read_density(const char *text) {
    char *end;
    settings.desc.density = strtod(text, &end);
    if (end == text || *end || !(settings.desc.density > 0 && settings.desc.density <= 1))
        refuse("PSA_DENSITY", "a number above 0, at most 1");
    if (settings.desc.density == 1)
        settings.desc.mask = PSA_MASK_DENSE;
}

/* The preset's text tokens, if any, come before the video's. */
static void read_grid(const char *text) {
    long grid[3];
    if (settings.desc.tree)
        refuse("PSA_GRID", "a preset without a tree, which orders the tokens itself");
    for (int i = 0; i < 3; i++) {
        grid[i] = number(&text);
        if (grid[i] < 1 || grid[i] > 65535 || *text != (i < 2 ? ',' : 0))
            refuse("PSA_GRID", "three extents such as 13,30,45");
        text++;
    }
    int64_t n = (int64_t)grid[0] * grid[1] * grid[2], n_text = settings.desc.n_prefix;
    int32_t *index = malloc((size_t)(n_text + n) * sizeof *index);
    if (!index || psa_order_gilbert((int)grid[0], (int)grid[1], (int)grid[2], index + n_text) != PSA_OK)
        refuse("PSA_GRID", "a grid that fits into memory and 31 bits");
    psa_order_embed(index, n_text, n, 0);
    settings.order.index = index;
    settings.n_order = n_text + n;
}

/* Why a node is not taken: from here, from psa_ggml.h or from psa.h. */
static void log_left(void *user, const char *why) {
    (void)user;
    fprintf(stderr, "psa: left to ggml: %s\n", why);
}

__attribute__((constructor)) static void read_settings(void) {
    const char *text;
    settings.min_length = 1024;
    if ((text = getenv("PSA_PRESET")))
        read_preset(text);
    if ((text = getenv("PSA_DENSITY")))
        read_density(text);
    if ((text = getenv("PSA_GRID")))
        read_grid(text);
    if ((text = getenv("PSA_MIN_LENGTH")) && ((settings.min_length = number(&text)) < 0 || *text))
        refuse("PSA_MIN_LENGTH", "a number of tokens");
    if ((text = getenv("PSA_LAYERS")))
        read_layers(text);
    if ((text = getenv("PSA_LOG")) && strcmp(text, "0") != 0)
        settings.log = 1, settings.desc.log_fn = log_left;
}

/* ---- which nodes ------------------------------------------------------------------------------------------------ */

enum { MAX_LAYERS = 4096 };

/* A graph is planned and then run by the same thread, which thus counts its nodes. */
static __thread int layer;
static __thread bool counting;

/* A node that was taken when its graph was planned points to its number here, with `extra`, which ggml does not use. */
static char taken[MAX_LAYERS];

/* -1 for nodes that are ggml's. */
static int taken_layer(const struct ggml_tensor *node) {
    uintptr_t i = (uintptr_t)node->extra - (uintptr_t)taken;
    return node->op == GGML_OP_FLASH_ATTN_EXT && i < MAX_LAYERS ? (int)i : -1;
}

static bool wanted(int l) {
    for (int i = 0; i < settings.n_ranges; i++)
        if (l >= settings.layers[i][0] && l <= settings.layers[i][1])
            return true;
    return settings.n_ranges == 0;
}

static bool plan_node(psa_plan *plan, const struct ggml_tensor *node, int n_threads) {
    psa_desc desc = settings.desc;
    desc.n_threads = n_threads;
    if (node->src[0]->ne[1] == settings.n_order && node->src[1]->ne[1] == settings.n_order)
        desc.order_q = desc.order_k = settings.order;
    return psa_ggml_plan(plan, &desc, node) == PSA_OK;
}

static bool is_long(const struct ggml_tensor *node) {
    return node->src[0]->ne[1] >= settings.min_length && node->src[1]->ne[1] >= settings.min_length;
}

/* Whether PSA computes this node; *plan is then its plan. */
static bool take(psa_plan *plan, const struct ggml_tensor *node, int n_threads) {
    char why[128];
    if (!is_long(node))
        snprintf(why, sizeof why, "%lld x %lld tokens; PSA_MIN_LENGTH is %lld", (long long)node->src[0]->ne[1],
                 (long long)node->src[1]->ne[1], (long long)settings.min_length);
    else if (!plan_node(plan, node, n_threads))
        return false; /* and psa has said why */
    else if (layer == MAX_LAYERS - 1 || !wanted(layer++))
        snprintf(why, sizeof why, "layer %d is not in PSA_LAYERS", layer - 1);
    else
        return true;
    if (settings.log)
        log_left(NULL, why);
    return false;
}

/* ---- one node --------------------------------------------------------------------------------------------------- */

/* What lies in ggml's work memory while a node runs. */
typedef struct workspace {
    psa_plan plan;
    float *scores;
    uint8_t *levels;
    void *work;
} workspace;

static size_t workspace_size(const psa_plan *plan) {
    return 64 + sizeof(workspace) + psa_map_size(plan) * (sizeof(float) + 1) + psa_work_size(plan);
}

static workspace *workspace_at(void *memory) { return (workspace *)(void *)psa__align(memory); }

static void workspace_init(workspace *w, const struct ggml_tensor *node, int n_threads) {
    plan_node(&w->plan, node, n_threads);
    w->scores = (float *)(w + 1);
    w->levels = (uint8_t *)(w->scores + psa_map_size(&w->plan));
    w->work = w->levels + psa_map_size(&w->plan);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void log_node(const workspace *w, const struct ggml_tensor *node, double seconds) {
    psa_stats stats = {0};
    const psa_plan *p = &w->plan;
    psa_stats_from_levels(p, w->levels, -1, -1, &stats);
    fprintf(stderr, "psa: layer %d: %lld heads, %lld x %lld tokens, D %lld, %s: density %.3f, %.1f ms\n",
            taken_layer(node), (long long)p->Hq, (long long)p->Nq, (long long)p->Nk, (long long)p->D,
            ggml_type_name(node->src[1]->type), stats.density, 1e3 * seconds);
}

typedef void barrier_fn(struct ggml_threadpool *pool);

static void run_node(const struct ggml_compute_params *params, struct ggml_tensor *node, barrier_fn *barrier) {
    workspace *w = workspace_at(params->wdata);
    const void *q = node->src[0]->data, *k = node->src[1]->data, *v = node->src[2]->data;
    int ith = params->ith, nth = params->nth;
    double start = now();
    if (ith == 0)
        workspace_init(w, node, nth);
    barrier(params->threadpool);
    psa_prepare(&w->plan, q, k, w->work, ith, nth);
    barrier(params->threadpool);
    psa_pool(&w->plan, k, v, w->work, ith, nth);
    barrier(params->threadpool);
    psa_score(&w->plan, q, k, w->work, w->scores, ith, nth);
    barrier(params->threadpool);
    psa_budget(&w->plan, w->scores, w->work, ith, nth);
    barrier(params->threadpool);
    psa_mask(&w->plan, w->scores, w->work, w->levels, ith, nth);
    barrier(params->threadpool);
    psa_attend(&w->plan, q, k, v, w->levels, w->work, node->data, NULL, ith, nth);
    if (settings.log)
        barrier(params->threadpool);
    if (settings.log && ith == 0)
        log_node(w, node, now() - start);
}

/* ---- what ggml calls -------------------------------------------------------------------------------------------- */

/* ggml's own functions, from the library that called: it may be one that was loaded with dlopen, for itself alone. */
static struct {
    bool (*work_size)(int nth, const struct ggml_tensor *node, size_t *size);
    bool (*compute)(struct ggml_compute_params *params, struct ggml_tensor *node);
    barrier_fn *barrier;
} ggml;

static void find(void *library, const char *name, void *function) {
    void *found = library ? dlsym(library, name) : NULL;
    if (!found) {
        fprintf(stderr, "libpsa_preload: this ggml has no %s\n", name);
        exit(2);
    }
    memcpy(function, &found, sizeof found);
}

static void find_ggml(void *caller) {
    Dl_info info;
    void *library = dladdr(caller, &info) ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : NULL;
    if (strcmp(ggml_op_name(GGML_OP_FLASH_ATTN_EXT), "FLASH_ATTN_EXT") != 0) {
        fprintf(stderr, "libpsa_preload: was compiled for another version of ggml than %s\n", ggml_version());
        exit(2);
    }
    find(library, "ggml_barrier", &ggml.barrier);
    find(library, "ggml_cpu_extra_compute_forward", &ggml.compute);
    find(library, "ggml_cpu_extra_work_size", &ggml.work_size);
}

/* Called for every node of a graph before it runs, by one thread. */
bool ggml_cpu_extra_work_size(int nth, const struct ggml_tensor *node, size_t *size) {
    psa_plan plan;
    if (!ggml.work_size)
        find_ggml(__builtin_return_address(0));
    if (node->op != GGML_OP_FLASH_ATTN_EXT)
        return ggml.work_size(nth, node, size);
    if (!counting)
        counting = true, layer = 0;
    bool ours = take(&plan, node, nth);
    if (ours || taken_layer(node) >= 0)
        ((struct ggml_tensor *)(uintptr_t)node)->extra = ours ? &taken[layer - 1] : NULL;
    if (!ours)
        return ggml.work_size(nth, node, size);
    *size = workspace_size(&plan);
    return true;
}

/* Called for every node by every thread. */
bool ggml_cpu_extra_compute_forward(struct ggml_compute_params *params, struct ggml_tensor *node) {
    if (params->ith == 0)
        counting = false;
    if (taken_layer(node) < 0)
        return ggml.compute(params, node);
    run_node(params, node, ggml.barrier);
    return true;
}
