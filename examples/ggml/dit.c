/* dit.c - a small video diffusion transformer in ggml, denoising with dense and with pyramid sparse attention.
 *
 *     cc -std=c99 -O2 -I. -I$GGML/include examples/ggml/dit.c -L$GGML/lib -lggml -lggml-cpu -lggml-base -lm -o dit
 *     dit --png strip.png                          --help lists the options
 *
 * The shape is Wan's: joint space-time self-attention with RMS-normed q and k and rotary positions in three axes,
 * cross-attention to a text (short, left dense), adaLN from the time step. The weights are random: speed and numerical
 * error are real, the pictures mean nothing. The first steps are dense, the others use top-k levels in Gilbert order;
 * with --keep the level maps of one step serve the next ones too. In the order in which data flows: model, graph,
 * denoising, what is printed, options. */
#define _POSIX_C_SOURCE 200809L
#define PSA_IMPLEMENTATION
#include "psa_ggml.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <time.h>

#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h> /* Debian: libstb-dev */

enum { HEAD = 128, CHANNELS = 16, PATCH = 2, TOKEN = CHANNELS * PATCH * PATCH, TIME = 256, TEXT = 77 };
enum { MAX_LAYERS = 40 };

typedef struct settings {
    int grid[3]; /* tokens: t, h, w */
    int layers, heads, steps, warmup, keep, threads;
    const char *png;
} settings;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "dit: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    exit(2);
}

static void *alloc(size_t count, size_t size) {
    void *p = calloc(count, size);
    if (!p)
        die("no memory for %zu x %zu bytes", count, size);
    return p;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- model: random weights -------------------------------------------------------------------------------------- */

typedef struct block {
    struct ggml_tensor *q, *k, *v, *out, *q_gain, *k_gain;
    struct ggml_tensor *text_q, *text_k, *text_v, *text_out;
    struct ggml_tensor *up, *down, *modulation; /* shift, scale, gate of attention, and of the MLP */
} block;

typedef struct model {
    struct ggml_context *ctx;
    ggml_backend_buffer_t memory;
    int64_t dim;
    int n_blocks;
    struct ggml_tensor *embed, *head, *time_in, *time_out, *text, *positions;
    block blocks[MAX_LAYERS];
} model;

/* Uniform in [-sqrt 3, sqrt 3): the standard deviation is 1. */
static float random_value(uint64_t seed, int64_t i) {
    return ((float)(psa__random(seed, (uint64_t)i) >> 40) / 16777216.0f - 0.5f) * 3.4641016f;
}

/* Matrices keep the size of their input; vectors are gains. tied: the seed of a matrix that this one resembles. */
static void fill_weight(struct ggml_tensor *t, uint64_t seed, uint64_t tied) {
    int64_t n = ggml_nelements(t);
    float *x = alloc((size_t)n, sizeof *x), scale = 1 / sqrtf((float)t->ne[0]);
    for (int64_t i = 0; i < n; i++) {
        float own = random_value(seed, i);
        x[i] = t->ne[1] == 1 ? 1 : scale * (tied ? 0.8f * random_value(tied, i) + 0.6f * own : own);
    }
    ggml_backend_tensor_set(t, x, 0, ggml_nbytes(t));
    free(x);
}

static void fill_positions(struct ggml_tensor *positions, const int grid[3]) {
    int64_t n = positions->ne[0] / 4;
    int32_t *p = alloc((size_t)n * 4, sizeof *p);
    for (int64_t i = 0; i < n; i++) {
        p[i] = (int32_t)(i / grid[2] / grid[1]);
        p[n + i] = (int32_t)(i / grid[2] % grid[1]);
        p[2 * n + i] = (int32_t)(i % grid[2]);
    }
    ggml_backend_tensor_set(positions, p, 0, ggml_nbytes(positions));
    free(p);
}

static struct ggml_tensor *matrix(model *m, int64_t in, int64_t out) {
    return ggml_new_tensor_2d(m->ctx, GGML_TYPE_F32, in, out);
}

static block block_new(model *m) {
    int64_t d = m->dim;
    block b;
    b.q = matrix(m, d, d), b.k = matrix(m, d, d), b.v = matrix(m, d, d), b.out = matrix(m, d, d);
    b.text_q = matrix(m, d, d), b.text_k = matrix(m, d, d), b.text_v = matrix(m, d, d), b.text_out = matrix(m, d, d);
    b.up = matrix(m, d, 4 * d), b.down = matrix(m, 4 * d, d), b.modulation = matrix(m, d, 6 * d);
    b.q_gain = matrix(m, d, 1), b.k_gain = matrix(m, d, 1);
    return b;
}

/* Keys resemble queries, so that tokens attend to their like, as in trained models. */
static void fill_model(model *m, const int grid[3]) {
    uint64_t seed = 1;
    for (struct ggml_tensor *t = ggml_get_first_tensor(m->ctx); t; t = ggml_get_next_tensor(m->ctx, t), seed++) {
        uint64_t tied = 0;
        for (int i = 0; i < m->n_blocks; i++)
            if (t == m->blocks[i].k)
                tied = seed - 1; /* q came before k */
        if (t != m->positions)
            fill_weight(t, seed, tied);
    }
    fill_positions(m->positions, grid);
}

static void model_init(model *m, const settings *s, ggml_backend_t backend) {
    struct ggml_init_params p = {ggml_tensor_overhead() * (size_t)(16 * s->layers + 16), NULL, true};
    m->ctx = ggml_init(p);
    m->dim = s->heads * HEAD;
    m->n_blocks = s->layers;
    m->embed = matrix(m, TOKEN, m->dim);
    m->head = matrix(m, m->dim, TOKEN);
    m->time_in = matrix(m, TIME, m->dim);
    m->time_out = matrix(m, m->dim, m->dim);
    m->text = matrix(m, m->dim, TEXT);
    m->positions = ggml_new_tensor_1d(m->ctx, GGML_TYPE_I32, 4 * (int64_t)s->grid[0] * s->grid[1] * s->grid[2]);
    for (int i = 0; i < s->layers; i++)
        m->blocks[i] = block_new(m);
    m->memory = ggml_backend_alloc_ctx_tensors(m->ctx, backend);
    if (!m->memory)
        die("no memory for the weights");
    fill_model(m, s->grid);
}

/* ---- graph: one step -------------------------------------------------------------------------------------------- */

typedef enum attention { DENSE, SPARSE, KEPT } attention;

typedef struct step_graph {
    struct ggml_context *ctx;
    struct ggml_cgraph *nodes;
    const model *m;
    const psa_desc *desc;
    attention kind;
    int64_t heads;
    struct ggml_tensor *latent, *time, *velocity;
    struct ggml_tensor *levels[MAX_LAYERS]; /* made by SPARSE, read by KEPT */
} step_graph;

static struct ggml_tensor *heads_of(step_graph *g, struct ggml_tensor *x) {
    return ggml_reshape_3d(g->ctx, x, HEAD, g->heads, x->ne[1]);
}

/* [D, H, N] to [D, N, H], a view. */
static struct ggml_tensor *tokens_of(step_graph *g, struct ggml_tensor *x) {
    return ggml_permute(g->ctx, x, 0, 2, 1, 3);
}

static struct ggml_tensor *rotated(step_graph *g, struct ggml_tensor *x, struct ggml_tensor *gain) {
    int sections[4] = {22, 21, 21, 0}; /* pairs of t, h, w */
    x = ggml_mul(g->ctx, ggml_rms_norm(g->ctx, x, 1e-6f), gain);
    return ggml_rope_multi(g->ctx, heads_of(g, x), g->m->positions, NULL, HEAD, sections, GGML_ROPE_TYPE_IMROPE, 0,
                           10000, 1, 0, 1, 0, 0);
}

/* Attention as an engine has it, then PSA in its place. */
static struct ggml_tensor *attend(step_graph *g, int layer, struct ggml_tensor *q, struct ggml_tensor *k,
                                  struct ggml_tensor *v) {
    struct ggml_tensor *dense = ggml_flash_attn_ext(g->ctx, q, k, v, NULL, 1 / sqrtf(HEAD), 0, 0), *out = dense;
    if (g->kind == SPARSE) {
        out = psa_ggml_replace(g->ctx, dense, g->desc);
        g->levels[layer] = out ? psa_ggml_levels(out) : NULL;
    }
    if (g->kind == KEPT)
        out = psa_ggml_attend(g->ctx, q, k, v, g->levels[layer], g->desc);
    if (!out)
        die("PSA refused this attention");
    return ggml_reshape_2d(g->ctx, out, g->m->dim, q->ne[1]);
}

static struct ggml_tensor *self_attention(step_graph *g, int layer, struct ggml_tensor *x) {
    const block *b = &g->m->blocks[layer];
    struct ggml_tensor *q = rotated(g, ggml_mul_mat(g->ctx, b->q, x), b->q_gain);
    struct ggml_tensor *k = rotated(g, ggml_mul_mat(g->ctx, b->k, x), b->k_gain);
    struct ggml_tensor *v = heads_of(g, ggml_mul_mat(g->ctx, b->v, x));
    x = attend(g, layer, tokens_of(g, q), tokens_of(g, k), tokens_of(g, v));
    return ggml_mul_mat(g->ctx, b->out, x);
}

static struct ggml_tensor *cross_attention(step_graph *g, const block *b, struct ggml_tensor *x) {
    struct ggml_tensor *q = heads_of(g, ggml_mul_mat(g->ctx, b->text_q, x));
    struct ggml_tensor *k = heads_of(g, ggml_mul_mat(g->ctx, b->text_k, g->m->text));
    struct ggml_tensor *v = heads_of(g, ggml_mul_mat(g->ctx, b->text_v, g->m->text));
    struct ggml_tensor *out = ggml_flash_attn_ext(g->ctx, tokens_of(g, q), tokens_of(g, k), tokens_of(g, v), NULL,
                                                  1 / sqrtf(HEAD), 0, 0);
    return ggml_mul_mat(g->ctx, b->text_out, ggml_reshape_2d(g->ctx, out, g->m->dim, x->ne[1]));
}

/* norm(x) * (1 + scale) + shift, with parts i and i + 1 of the modulation. */
static struct ggml_tensor *modulated(step_graph *g, struct ggml_tensor *x, struct ggml_tensor *parts, int i) {
    size_t part = (size_t)g->m->dim * sizeof(float);
    struct ggml_tensor *shift = ggml_view_1d(g->ctx, parts, g->m->dim, (size_t)i * part);
    struct ggml_tensor *scale = ggml_view_1d(g->ctx, parts, g->m->dim, (size_t)(i + 1) * part);
    x = ggml_norm(g->ctx, x, 1e-6f);
    return ggml_add(g->ctx, ggml_add(g->ctx, x, ggml_mul(g->ctx, x, scale)), shift);
}

static struct ggml_tensor *gated(step_graph *g, struct ggml_tensor *x, struct ggml_tensor *parts, int i) {
    return ggml_mul(g->ctx, x, ggml_view_1d(g->ctx, parts, g->m->dim, (size_t)i * (size_t)g->m->dim * sizeof(float)));
}

static struct ggml_tensor *run_block(step_graph *g, int layer, struct ggml_tensor *x, struct ggml_tensor *time) {
    const block *b = &g->m->blocks[layer];
    struct ggml_tensor *parts = ggml_mul_mat(g->ctx, b->modulation, time);
    x = ggml_add(g->ctx, x, gated(g, self_attention(g, layer, modulated(g, x, parts, 0)), parts, 2));
    x = ggml_add(g->ctx, x, cross_attention(g, b, ggml_norm(g->ctx, x, 1e-6f)));
    struct ggml_tensor *up = ggml_gelu(g->ctx, ggml_mul_mat(g->ctx, b->up, modulated(g, x, parts, 3)));
    return ggml_add(g->ctx, x, gated(g, ggml_mul_mat(g->ctx, b->down, up), parts, 5));
}

static void input(struct ggml_tensor **t, struct ggml_context *ctx, enum ggml_type type, const int64_t ne[4]) {
    *t = ggml_new_tensor(ctx, type, 4, ne);
    ggml_set_input(*t);
}

static void build_network(step_graph *g, int64_t n) {
    const int64_t latent[4] = {TOKEN, n, 1, 1}, one[4] = {1, 1, 1, 1};
    const model *m = g->m;
    input(&g->latent, g->ctx, GGML_TYPE_F32, latent);
    input(&g->time, g->ctx, GGML_TYPE_F32, one);
    struct ggml_tensor *time = ggml_timestep_embedding(g->ctx, g->time, TIME, 10000);
    time = ggml_mul_mat(g->ctx, m->time_out, ggml_silu(g->ctx, ggml_mul_mat(g->ctx, m->time_in, time)));
    struct ggml_tensor *x = ggml_mul_mat(g->ctx, m->embed, g->latent);
    for (int i = 0; i < m->n_blocks; i++)
        x = run_block(g, i, x, ggml_silu(g->ctx, time));
    g->velocity = ggml_mul_mat(g->ctx, m->head, ggml_norm(g->ctx, x, 1e-6f));
}

static void build(step_graph *g, const settings *s) {
    int64_t n = (int64_t)s->grid[0] * s->grid[1] * s->grid[2];
    const int64_t map[4] = {(n + 63) / 64, (n + 127) / 128, s->heads, 1}; /* of psa.h's default blocks */
    size_t nodes = (size_t)(64 * s->layers + 64);
    struct ggml_init_params p = {nodes * ggml_tensor_overhead() + (size_t)s->layers * psa_ggml_overhead() +
                                     ggml_graph_overhead_custom(nodes, false), NULL, true};
    g->ctx = ggml_init(p);
    g->heads = s->heads;
    for (int i = 0; g->kind == KEPT && i < s->layers; i++)
        input(&g->levels[i], g->ctx, GGML_TYPE_I8, map);
    build_network(g, n);
    g->nodes = ggml_new_graph_custom(g->ctx, nodes, false);
    for (int i = 0; g->kind == SPARSE && i < s->layers; i++)
        ggml_set_output(g->levels[i]);
    ggml_set_output(g->velocity);
    ggml_build_forward_expand(g->nodes, g->velocity);
}

/* ---- denoising -------------------------------------------------------------------------------------------------- */

typedef struct run {
    const char *name;
    float **latents; /* after each step */
    double *seconds, *density;
    attention *kind;
} run;

typedef struct job {
    settings s;
    model m;
    psa_desc desc;
    ggml_backend_t backend;
    ggml_gallocr_t memory;
    int64_t n, size;             /* tokens; values of a latent */
    float *start, *velocity;
    uint8_t *levels[MAX_LAYERS]; /* of the last step that was scored */
    size_t map_size;
} job;

/* Moving blobs under noise, where an image-to-video run would start. The tokens' patches are [C, y, x]. */
static void first_latent(job *j) {
    const int *grid = j->s.grid;
    for (int64_t i = 0; i < j->size; i++) {
        int64_t token = i / TOKEN, c = i % TOKEN / (PATCH * PATCH), inner = i % (PATCH * PATCH);
        float t = (float)(token / grid[2] / grid[1]) / (float)grid[0];
        float y = ((float)(token / grid[2] % grid[1]) + 0.5f * (float)(inner / PATCH)) / (float)grid[1];
        float x = ((float)(token % grid[2]) + 0.5f * (float)(inner % PATCH)) / (float)grid[2];
        float phase = 1.7f * (float)c;
        j->start[i] = 1.2f * sinf(6.3f * (x + 0.5f * t) + phase) * sinf(6.3f * (y - 0.3f * t) + 0.6f * phase) +
                      0.4f * random_value(12345, i);
    }
}

static double keep_levels(job *j, const step_graph *g) {
    double reads = 0;
    for (int l = 0; l < j->s.layers; l++) {
        ggml_backend_tensor_get(g->levels[l], j->levels[l], 0, j->map_size);
        for (size_t i = 0; i < j->map_size; i++)
            reads += j->levels[l][i] ? 1.0 / j->levels[l][i] : 0;
    }
    return reads / (double)j->map_size / j->s.layers;
}

/* The network's velocity at this latent; returns the seconds that the graph took, and the density of its level maps. */
static double velocity(job *j, attention kind, const float *latent, float time, double *density) {
    step_graph g = {.m = &j->m, .desc = &j->desc, .kind = kind};
    build(&g, &j->s);
    if (!ggml_gallocr_alloc_graph(j->memory, g.nodes))
        die("no memory for the graph");
    ggml_backend_tensor_set(g.latent, latent, 0, ggml_nbytes(g.latent));
    ggml_backend_tensor_set(g.time, &time, 0, sizeof time);
    for (int i = 0; kind == KEPT && i < j->s.layers; i++)
        ggml_backend_tensor_set(g.levels[i], j->levels[i], 0, j->map_size);
    double start = now();
    if (ggml_backend_graph_compute(j->backend, g.nodes) != GGML_STATUS_SUCCESS)
        die("the graph failed");
    start = now() - start;
    ggml_backend_tensor_get(g.velocity, j->velocity, 0, ggml_nbytes(g.velocity));
    *density = kind == DENSE ? 1 : kind == SPARSE ? keep_levels(j, &g) : *density;
    ggml_free(g.ctx);
    return start;
}

static attention kind_of(const settings *s, int step, int sparse, int keep) {
    if (!sparse || step < s->warmup)
        return DENSE;
    return (step - s->warmup) % keep == 0 ? SPARSE : KEPT;
}

static run denoise(job *j, const char *name, int sparse, int keep) {
    size_t steps = (size_t)j->s.steps;
    run r = {name, alloc(steps, sizeof *r.latents), alloc(steps, sizeof *r.seconds), alloc(steps, sizeof *r.density),
             alloc(steps, sizeof *r.kind)};
    const float *latent = j->start;
    double density = 1;
    for (int i = 0; i < j->s.steps; i++) {
        r.kind[i] = kind_of(&j->s, i, sparse, keep);
        r.latents[i] = alloc((size_t)j->size, sizeof **r.latents);
        r.seconds[i] = velocity(j, r.kind[i], latent, 1000 * (1 - (float)i / (float)j->s.steps), &density);
        r.density[i] = density;
        for (int64_t e = 0; e < j->size; e++)
            r.latents[i][e] = latent[e] + j->velocity[e] / (float)j->s.steps;
        latent = r.latents[i];
    }
    return r;
}

static void run_free(run *r, int steps) {
    for (int i = 0; i < steps; i++)
        free(r->latents[i]);
    free(r->latents);
    free(r->seconds);
    free(r->density);
    free(r->kind);
}

/* ---- what is printed -------------------------------------------------------------------------------------------- */

static double relative_error(const float *got, const float *want, int64_t n) {
    double error = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        error += ((double)got[i] - (double)want[i]) * ((double)got[i] - (double)want[i]);
        size += (double)want[i] * (double)want[i];
    }
    return sqrt(error / size);
}

static const char *const kinds[] = {"dense", "sparse", "kept map"};

/* fresh: the run that scores in every step; the drift is the distance from it. */
static void print_run(const job *j, const run *r, const run *dense, const run *fresh) {
    printf("\n%-20s attention   seconds  density  error%s\n", r->name, fresh ? "   drift" : "");
    for (int i = 0; i < j->s.steps; i++) {
        printf("  step %-13d %-10s %8.2f %8.3f %6.4f", i + 1, kinds[r->kind[i]], r->seconds[i], r->density[i],
               relative_error(r->latents[i], dense->latents[i], j->size));
        if (fresh)
            printf("  %6.4f", relative_error(r->latents[i], fresh->latents[i], j->size));
        printf("\n");
    }
    fflush(stdout);
}

/* Value of channel c at a pixel of a frame. */
static float latent_at(const job *j, const float *latent, int c, int frame, int y, int x) {
    const int *grid = j->s.grid;
    int64_t token = ((int64_t)frame * grid[1] + y / PATCH) * grid[2] + x / PATCH;
    return latent[token * TOKEN + (c * PATCH + y % PATCH) * PATCH + x % PATCH];
}

static unsigned char shade(float value) {
    float v = 128 + 48 * value;
    return (unsigned char)(v < 0 ? 0 : v > 255 ? 255 : v);
}

typedef struct strip {
    unsigned char *rgb;
    int frames, rows, scale, w, h, width, height; /* w and h of a frame */
} strip;

enum { GAP = 6 };

static strip strip_new(const settings *s, int rows) {
    strip p = {NULL, s->grid[0] < 7 ? s->grid[0] : 7, rows, 1 + 60 / (PATCH * s->grid[1]), 0, 0, 0, 0};
    p.w = PATCH * s->grid[2] * p.scale;
    p.h = PATCH * s->grid[1] * p.scale;
    p.width = GAP + p.frames * (p.w + GAP);
    p.height = GAP + rows * (p.h + GAP);
    p.rgb = alloc((size_t)p.width * (size_t)p.height, 3);
    memset(p.rgb, 255, (size_t)p.width * (size_t)p.height * 3);
    return p;
}

/* Three channels as red, green and blue; with base its tenfold distance from there. */
static void draw_frame(const job *j, const strip *p, int row, int i, const float *latent, const float *base) {
    int frame = p->frames > 1 ? i * (j->s.grid[0] - 1) / (p->frames - 1) : 0;
    for (int y = 0; y < p->h; y++)
        for (int x = 0; x < p->w; x++) {
            int at = (GAP + row * (p->h + GAP) + y) * p->width + GAP + i * (p->w + GAP) + x;
            for (int c = 0; c < 3; c++) {
                float v = latent_at(j, latent, c, frame, y / p->scale, x / p->scale);
                if (base)
                    v = 10 * (v - latent_at(j, base, c, frame, y / p->scale, x / p->scale));
                p->rgb[3 * at + c] = shade(v);
            }
        }
}

/* The last latents: a row of frames for each run, and one of its distance from the dense run. */
static void write_strip(const job *j, const run *runs, int n_runs) {
    int last = j->s.steps - 1;
    strip p = strip_new(&j->s, 2 * n_runs - 1);
    for (int row = 0; row < p.rows; row++)
        for (int i = 0; i < p.frames; i++)
            draw_frame(j, &p, row, i, runs[(row + 1) / 2].latents[last],
                       row && row % 2 == 0 ? runs[0].latents[last] : NULL);
    if (!stbi_write_png(j->s.png, p.width, p.height, 3, p.rgb, 3 * p.width))
        die("%s: cannot write", j->s.png);
    free(p.rgb);
}

/* ---- options and main ------------------------------------------------------------------------------------------- */

static const char help[] = "dit: a small video diffusion transformer with random weights, dense and sparse\n"
                           "--grid T,H,W    tokens; default 13,30,45\n"
                           "--layers N      default 2\n"
                           "--heads N       of 128; default 12\n"
                           "--steps N       default 6\n"
                           "--warmup N      dense steps at the start; default 1\n"
                           "--keep N        also a run whose level maps serve N steps; default 1: no such run\n"
                           "--threads N     default 2\n"
                           "--png FILE      the last latents as pictures\n";

static void read_grid(const char *text, int grid[3]) {
    char rest;
    if (sscanf(text, "%d,%d,%d%c", &grid[0], &grid[1], &grid[2], &rest) != 3 || grid[0] < 1 || grid[1] < 1 ||
        grid[2] < 1 || grid[0] > 999 || grid[1] > 999 || grid[2] > 999)
        die("--grid %s: expected three extents from 1 to 999, such as 13,30,45", text);
}

static int read_number(const char *option, const char *text, int most) {
    char *end;
    long n = strtol(text, &end, 10);
    if (end == text || *end || n < (strcmp(option, "--warmup") ? 1 : 0) || n > most)
        die("%s %s: expected a whole number up to %d", option, text, most);
    return (int)n;
}

static settings read_options(int argc, char **argv) {
    settings s = {{13, 30, 45}, 2, 12, 6, 1, 1, 2, NULL};
    const struct {
        const char *name;
        int *value, most;
    } numbers[] = {{"--layers", &s.layers, MAX_LAYERS}, {"--heads", &s.heads, 64},     {"--steps", &s.steps, 1000},
                   {"--warmup", &s.warmup, 1000},       {"--keep", &s.keep, 1000},     {"--threads", &s.threads, 512}};
    for (int i = 1; i < argc; i += 2) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        size_t n = 0, all = sizeof numbers / sizeof *numbers;
        if (!strcmp(name, "--help")) {
            printf("%s", help);
            exit(0);
        }
        while (n < all && strcmp(name, numbers[n].name))
            n++;
        if (!value || (n == all && strcmp(name, "--grid") && strcmp(name, "--png")))
            die("%s: expected an option with its value; --help lists them", name);
        if (n < all)
            *numbers[n].value = read_number(name, value, numbers[n].most);
        else if (!strcmp(name, "--grid"))
            read_grid(value, s.grid);
        else
            s.png = value;
    }
    return s;
}

static void log_line(void *user, const char *line) {
    (void)user;
    fprintf(stderr, "dit: %s\n", line);
}

static void job_init(job *j) {
    const settings *s = &j->s;
    j->n = (int64_t)s->grid[0] * s->grid[1] * s->grid[2];
    j->size = j->n * TOKEN;
    j->map_size = (size_t)(((j->n + 63) / 64) * ((j->n + 127) / 128) * s->heads);
    int32_t *order = alloc((size_t)j->n, sizeof *order);
    psa_order_gilbert(s->grid[0], s->grid[1], s->grid[2], order);
    j->desc.order_q.index = j->desc.order_k.index = order;
    j->desc.score_norm = 1;
    j->desc.density = 0.15;
    j->desc.n_threads = s->threads;
    j->desc.log_fn = log_line;
    j->backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(j->backend, s->threads);
    j->memory = ggml_gallocr_new(ggml_backend_get_default_buffer_type(j->backend));
    for (int i = 0; i < s->layers; i++)
        j->levels[i] = alloc(j->map_size, 1);
    j->start = alloc((size_t)j->size, sizeof *j->start);
    j->velocity = alloc((size_t)j->size, sizeof *j->velocity);
    model_init(&j->m, s, j->backend);
    first_latent(j);
}

static void job_free(job *j) {
    for (int i = 0; i < j->s.layers; i++)
        free(j->levels[i]);
    free(j->start);
    free(j->velocity);
    free((void *)(uintptr_t)j->desc.order_q.index);
    ggml_gallocr_free(j->memory);
    ggml_backend_buffer_free(j->m.memory);
    ggml_free(j->m.ctx);
    ggml_backend_free(j->backend);
}

int main(int argc, char **argv) {
    static job j;
    char kept[64];
    j.s = read_options(argc, argv);
    job_init(&j);
    printf("%d x %d x %d = %lld tokens, %d layers, %d heads of %d, %d threads, ggml %s, %s\n", j.s.grid[0], j.s.grid[1],
           j.s.grid[2], (long long)j.n, j.s.layers, j.s.heads, HEAD, j.s.threads, ggml_version(),
           psa_isa_name(psa_isa_detect()));
    printf("error: of the latent, against the dense run\n");
    snprintf(kept, sizeof kept, "psa, map kept for %d", j.s.keep);
    const char *names[3] = {"ggml", "psa", kept};
    run runs[3];
    int n_runs = j.s.keep > 1 ? 3 : 2;
    for (int i = 0; i < n_runs; i++) {
        runs[i] = denoise(&j, names[i], i > 0, i == 2 ? j.s.keep : 1);
        print_run(&j, &runs[i], &runs[0], i == 2 ? &runs[1] : NULL);
    }
    if (j.s.png)
        write_strip(&j, runs, n_runs);
    for (int i = 0; i < n_runs; i++)
        run_free(&runs[i], j.s.steps);
    job_free(&j);
    return 0;
}
