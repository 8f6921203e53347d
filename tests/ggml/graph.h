/* graph.h - a ggml graph with q, k and v for the tests and the benchmark. Everything is static; errors end the
 * program. */
#ifndef GRAPH_H
#define GRAPH_H

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct shape {
    const char *name;
    enum ggml_type type; /* of k and v; q is f32 */
    int64_t d, dv, nq, nk, heads, kv_heads, batch;
    int permuted; /* stored as [D, H, N] and seen through ggml_permute, as engines do */
} shape;

typedef struct qkv {
    struct ggml_tensor *q, *k, *v;
    struct ggml_tensor *leaf[3]; /* where they are stored */
} qkv;

typedef struct graph {
    struct ggml_context *ctx;
    struct ggml_cgraph *nodes;
    ggml_backend_t backend;
    ggml_gallocr_t allocator;
} graph;

static graph graph_new(int threads) {
    struct ggml_init_params p = {ggml_tensor_overhead() * 128 + ggml_graph_overhead(), NULL, true};
    graph g = {ggml_init(p), NULL, ggml_backend_cpu_init(), NULL};
    g.nodes = ggml_new_graph(g.ctx);
    g.allocator = ggml_gallocr_new(ggml_backend_get_default_buffer_type(g.backend));
    ggml_backend_cpu_set_n_threads(g.backend, threads);
    return g;
}

static void graph_free(graph *g) {
    ggml_gallocr_free(g->allocator);
    ggml_backend_free(g->backend);
    ggml_free(g->ctx);
}

static void graph_output(graph *g, struct ggml_tensor *t) {
    ggml_set_output(t);
    ggml_build_forward_expand(g->nodes, t);
}

static struct ggml_tensor *leaf(graph *g, const shape *s, enum ggml_type type, int64_t d, int64_t n, int64_t heads) {
    struct ggml_tensor *t = s->permuted ? ggml_new_tensor_4d(g->ctx, type, d, heads, n, s->batch)
                                        : ggml_new_tensor_4d(g->ctx, type, d, n, heads, s->batch);
    ggml_set_input(t);
    ggml_set_output(t); /* what comes later does not take its place: tests read it again */
    return t;
}

static qkv inputs(graph *g, const shape *s) {
    qkv x = {0};
    x.leaf[0] = leaf(g, s, GGML_TYPE_F32, s->d, s->nq, s->heads);
    x.leaf[1] = leaf(g, s, s->type, s->d, s->nk, s->kv_heads);
    x.leaf[2] = leaf(g, s, s->type, s->dv, s->nk, s->kv_heads);
    x.q = s->permuted ? ggml_permute(g->ctx, x.leaf[0], 0, 2, 1, 3) : x.leaf[0];
    x.k = s->permuted ? ggml_permute(g->ctx, x.leaf[1], 0, 2, 1, 3) : x.leaf[1];
    x.v = s->permuted ? ggml_permute(g->ctx, x.leaf[2], 0, 2, 1, 3) : x.leaf[2];
    return x;
}

/* Not the default of psa.h. */
static float scale_of(const qkv *x) {
    return 1.3f / sqrtf((float)x->q->ne[0]);
}

static struct ggml_tensor *flash_attention(graph *g, const qkv *x, struct ggml_tensor *mask) {
    return ggml_flash_attn_ext(g->ctx, x->q, x->k, x->v, mask, scale_of(x), 0, 0);
}

/* Values that vary smoothly along the tokens, as those of videos do, with noise: blocks differ in importance. */
static void fill(struct ggml_tensor *t, unsigned seed) {
    int64_t n = ggml_nelements(t);
    float *x = malloc((size_t)n * sizeof *x);
    void *stored = malloc(ggml_nbytes(t));
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = 1.5f * sinf((float)(i % t->ne[0]) + (float)(i / t->ne[0]) * 0.03f) + (float)(seed >> 8) / 16777216.0f;
    }
    if (t->type == GGML_TYPE_F32)
        memcpy(stored, x, ggml_nbytes(t));
    else if (t->type == GGML_TYPE_F16)
        ggml_fp32_to_fp16_row(x, stored, n);
    else
        ggml_fp32_to_bf16_row(x, stored, n);
    ggml_backend_tensor_set(t, stored, 0, ggml_nbytes(t));
    free(stored);
    free(x);
}

static float *values(const struct ggml_tensor *t) {
    float *x = malloc(ggml_nbytes(t));
    ggml_backend_tensor_get(t, x, 0, ggml_nbytes(t));
    return x;
}

static void graph_allocate(graph *g) {
    if (!ggml_gallocr_alloc_graph(g->allocator, g->nodes)) {
        fprintf(stderr, "no memory for the graph\n");
        exit(2);
    }
}

static void fill_inputs(const qkv *x) {
    for (unsigned i = 0; i < 3; i++)
        if (x->leaf[i]->data) /* part of the graph */
            fill(x->leaf[i], i + 1);
}

static void graph_compute(graph *g) {
    if (ggml_backend_graph_compute(g->backend, g->nodes) != GGML_STATUS_SUCCESS) {
        fprintf(stderr, "the graph failed\n");
        exit(2);
    }
}
#endif
