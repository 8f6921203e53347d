/* encoder.h - from pixels to logits, in f32.
 *
 * VideoMAE and V-JEPA 2 are the same thing: tubelets of the clip become tokens, pre-norm transformer blocks work on
 * them, a head makes one vector and from it the logits. They differ in positions (VideoMAE: a table is added; V-JEPA 2:
 * rotary on q and k) and in the head (VideoMAE: mean of the tokens; V-JEPA 2: more blocks and one query that attends to
 * all tokens).
 *
 * f32 weights are used where they lie in the file, 16-bit ones are widened layer by layer. Memory for a clip of N
 * tokens and width C, all of it planned once: 5 N C floats (3.5 N C with 16-bit q, k and v), a chunk per thread, one
 * widened layer, and what psa_attention takes. Include after psa.h. */
#ifndef ENCODER_H
#define ENCODER_H

#include "crew.h"
#include "gpu.h"
#include "model.h"
#include <cblas.h>

#define CHUNK_ROWS 1024    /* most tokens that a thread takes through the linear layers at a time. OpenBLAS packs the
                            * weights once a chunk: with chunks of 512 these layers take 6 % longer */
#define FEWEST_KV_BLOCKS 8 /* with fewer attention is dense: at 4 PSA was .9 times as fast as dense, at 8 1.7 times */

/* What the self-attentions of one run read: the encoder's layers, then the pooler's. */
typedef struct trace {
    int layers, heads, pooler; /* pooler: the last so many layers */
    int64_t n, nq, nk;         /* tokens, query blocks, KV blocks */
    int block_q, block_k, grid[3];
    int32_t *order;            /* [n]: the token in row i of the attention; NULL: token i */
    uint8_t *levels;           /* [layers][heads][nq][nk] */
    double *density;           /* [layers][heads] */
} trace;

enum { EMBED, ATTENTION, LINEAR, HEAD, PARTS }; /* of the run time */
static const char *const part_names[PARTS] = {"embed", "attention", "linear", "head"};

/* Memory that psa_attention asks for in every layer. */
typedef struct slot {
    void *memory;
    size_t size;            /* the most that was asked for */
    int taken;
} slot;

/* What running the model on clips of one size needs, and what it measured. */
typedef struct encoder {
    const model *m;
    crew *crew;
    gpu *gpu;               /* where attention runs; NULL: on the crew */
    psa_desc desc;          /* of the self-attentions */
    psa_type type;          /* of q, k and v */
    int frames, height, width, grid[3];
    int64_t n;              /* tokens */
    float *x, *mix;         /* [n, C], [n, C] */
    void *qkv;              /* [n, 3C] of type */
    float *chunks;          /* per thread */
    size_t chunk_floats;
    float *widened;         /* weights of the layer at work; NULL: all are f32 */
    size_t widened_floats, widened_used;
    float *cos, *sin;       /* V-JEPA 2: [positions, rotary_size], one table for all three axes */
    int32_t *gilbert;       /* [n] */
    slot slots[2];
    size_t bytes;           /* of all of these */
    int layer;              /* self-attentions done */
    trace *trace;           /* NULL: nobody asked */
    int64_t mul_adds, dense_mul_adds;
    int is_dense;           /* no self-attention was sparse */
    double seconds[PARTS];
    char detail[256];       /* the attention's last error */
} encoder;

/* Prepares for clips of this size; earlier preparations are dropped. *e must be zero at first. */
static void encoder_plan(encoder *e, const model *m, crew *c, psa_type type, int frames, int height, int width);
static void encoder_free(encoder *e);

/* pixels [frames, 3, height, width] to logits [n_labels]; counts attention work and time from zero. t may be NULL;
 * else what it held is freed, and it is filled unless the attention was dense. */
static void encoder_run(encoder *e, const psa_desc *desc, psa_order_kind order, const float *pixels, float *logits,
                        trace *t);
static void trace_free(trace *t);

/* ---- steps over the tokens -------------------------------------------------------------------------------------- */

/* A step that works on tokens one by one: on n of them from `first` on, with a thread's own chunk of memory. */
typedef struct step step;
typedef void step_fn(const step *s, int64_t first, int n, float *chunk);

struct step {
    encoder *e;
    step_fn *fn;
    const block *block;
    linear l[3];            /* those of the step, w complete */
    int rotary;
    const float *pixels;
};

/* Every thread takes an equal share of the tokens, in equal chunks. */
static void step_task(void *ctx, int ith, int nth) {
    const step *s = ctx;
    float *chunk = s->e->chunks + (size_t)ith * s->e->chunk_floats;
    int64_t first = s->e->n * ith / nth, end = s->e->n * (ith + 1) / nth;
    for (int64_t left = (end - first + CHUNK_ROWS - 1) / CHUNK_ROWS; left > 0; left--) {
        int64_t rows = (end - first) / left;
        s->fn(s, first, (int)rows, chunk);
        first += rows;
    }
}

static void step_run(step *s, step_fn *fn, int part) {
    double start = now();
    s->fn = fn;
    crew_run(s->e->crew, s->e->crew->n_threads, step_task, s);
    s->e->seconds[part] += now() - start;
    s->e->widened_used = 0;
}

typedef struct widening {
    const tensor_info *tensor;
    int64_t n;
    float *to;
} widening;

static void widen_task(void *ctx, int ith, int nth) {
    const widening *w = ctx;
    int64_t first = w->n * ith / nth, end = w->n * (ith + 1) / nth;
    tensor_widen(w->tensor, first, end - first, w->to + first);
}

/* The layer with all of its weights as f32, until the next step has run. */
static linear ready(encoder *e, const linear *l) {
    linear complete = *l;
    double start = now();
    for (int i = 0; i < l->n_parts; i++) {
        if (l->w[i]) continue;
        widening w = {l->part[i], (int64_t)(l->out / l->n_parts) * l->in, e->widened + e->widened_used};
        crew_run(e->crew, e->crew->n_threads, widen_task, &w);
        complete.w[i] = w.to;
        e->widened_used += (size_t)w.n;
        checkpoint_release(&e->m->weights);
    }
    e->seconds[LINEAR] += now() - start;
    return complete;
}

/* ---- layers ----------------------------------------------------------------------------------------------------- */

/* y [rows, out] += x [rows, in] w', with w's rows `stride` apart, y's `width` */
static void multiply_add(const float *x, int rows, int in, const float *w, int stride, int out, float *y, int width) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, out, in, 1, x, in, w, stride, 1, y, width);
}

static void set_rows(float *y, int rows, const float *b, int width) {
    for (int r = 0; r < rows; r++) memcpy(y + (size_t)r * (size_t)width, b, (size_t)width * sizeof *y);
}

static void add_rows(float *y, int rows, const float *b, int width) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++) y[(size_t)r * (size_t)width + (size_t)i] += b[i];
}

/* y [rows, out] += the layer's weights times x, without its bias */
static void linear_product(const linear *l, const float *x, int rows, float *y) {
    int out = l->out / l->n_parts;
    for (int i = 0; i < l->n_parts; i++) multiply_add(x, rows, l->in, l->w[i], l->in, out, y + i * out, l->out);
}

static void linear_apply(const linear *l, const float *x, int rows, float *y) {
    set_rows(y, rows, l->b, l->out);
    linear_product(l, x, rows, y);
}

/* y += the layer's result */
static void linear_add(const linear *l, const float *x, int rows, float *y) {
    add_rows(y, rows, l->b, l->out);
    linear_product(l, x, rows, y);
}

/* Loops over a row below keep one partial sum per lane, which is what lets compilers vectorise them. */
enum { LANES = 8 }; /* widths are multiples of it */

/* Compiled for wider vectors too; the machine's are taken at run time. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDE __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define WIDE
#endif

static double lane_sum(const double *lanes) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

WIDE static void norm_apply(const norm *n, const float *x, int rows, int C, float *y) {
    for (int r = 0; r < rows; r++, x += C, y += C) {
        double sums[LANES] = {0}, squares[LANES] = {0};
        for (int i = 0; i < C; i += LANES)
            for (int l = 0; l < LANES; l++) sums[l] += (double)x[i + l];
        double mean = lane_sum(sums) / C;
        for (int i = 0; i < C; i += LANES)
            for (int l = 0; l < LANES; l++) squares[l] += ((double)x[i + l] - mean) * ((double)x[i + l] - mean);
        float unit = (float)(1 / sqrt(lane_sum(squares) / C + n->eps)), m = (float)mean;
        for (int i = 0; i < C; i++) y[i] = (x[i] - m) * unit * n->g[i] + n->b[i];
    }
}

/* erf to a few ulp: the rational approximation that Eigen uses. It has no branches, unlike libm's. */
static inline float erf_rational(float x) {
    x = x < -4 ? -4 : x > 4 ? 4 : x;
    float s = x * x, p = -2.72614225801306e-10f, q = -1.45660718464996e-05f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    q = q * s - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    return x * p / q;
}

WIDE static void gelu(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1 + erf_rational(x[i] * 0.70710678f));
}

/* Hidden units of an MLP that are worked on together: about as many as there are inputs. */
static int hidden_units(const linear *fc1) {
    int parts = fc1->out < fc1->in ? 1 : fc1->out / fc1->in;
    return (fc1->out - 1) / parts + 1;
}

/* ---- memory ----------------------------------------------------------------------------------------------------- */

static void *planned(encoder *e, size_t count, size_t size) {
    e->bytes += count * size;
    return alloc(count, size);
}

/* Floats that the layer's weights become when they are widened. */
static size_t narrow_floats(const linear *l) {
    size_t n = 0;
    for (int i = 0; i < l->n_parts; i++)
        if (!l->w[i]) n += (size_t)(l->out / l->n_parts) * (size_t)l->in;
    return n;
}

static size_t max_size(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t block_floats(const block *b) {
    return max_size(narrow_floats(&b->qkv), narrow_floats(&b->proj) + narrow_floats(&b->fc1) + narrow_floats(&b->fc2));
}

/* The most that is widened at a time. */
static size_t widened_most(const model *m) {
    const cross *x = &m->cross;
    size_t most = max_size(narrow_floats(&m->embed), narrow_floats(&m->classifier));
    for (int i = 0; i < m->n_blocks; i++) most = max_size(most, block_floats(&m->blocks[i]));
    for (int i = 0; i < m->n_pooler; i++) most = max_size(most, block_floats(&m->pooler[i]));
    most = max_size(most, max_size(narrow_floats(&x->q), narrow_floats(&x->kv)));
    return max_size(most, narrow_floats(&x->fc1) + narrow_floats(&x->fc2));
}

static void slot_free(slot *s) {
    free(s->memory);
    s->memory = NULL;
}

/* psa_attention's allocator: every layer gets the memory of the layer before. */
static void *slot_take(void *user, size_t size) {
    encoder *e = user;
    slot *s = e->slots[0].taken ? &e->slots[1] : &e->slots[0];
    if (s->taken) return NULL;
    if (s->size < size) {
        slot_free(s);
        e->bytes += size - s->size;
        s->size = size;
    }
    if (!s->memory) s->memory = malloc(s->size);
    s->taken = s->memory != NULL;
    return s->memory;
}

static void slot_return(void *user, void *memory) {
    encoder *e = user;
    for (slot *s = e->slots; s < e->slots + 2; s++)
        if (s->memory == memory) s->taken = 0;
}

static void encoder_free(encoder *e) {
    free(e->x);
    free(e->qkv);
    free(e->mix);
    free(e->chunks);
    free(e->widened);
    free(e->cos);
    free(e->sin);
    free(e->gilbert);
    for (int i = 0; i < 2; i++) slot_free(&e->slots[i]);
    memset(e, 0, sizeof *e);
}

/* ---- positions -------------------------------------------------------------------------------------------------- */

/* VideoMAE: sine and cosine of the flat token number, alternating. */
static void add_positions(float *x, int64_t first, int n, int C) {
    for (int j = 0; j < C; j++) {
        double period = pow(10000, 2.0 * (j / 2) / C);
        for (int r = 0; r < n; r++) {
            double angle = (double)(first + r) / period;
            x[(size_t)r * (size_t)C + (size_t)j] += (float)(j % 2 ? cos(angle) : sin(angle));
        }
    }
}

/* Elements of a head that turn with each of the three axes; what is left over stays. */
static int rotary_size(const model *m) {
    return m->C / m->heads / 3 / 2 * 2;
}

static int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static void make_rotary(encoder *e) {
    int size = rotary_size(e->m), side = e->m->side_h / e->m->patch;
    int64_t positions = max64(side, (e->n - 1) / ((int64_t)side * side) + 1);
    e->cos = planned(e, (size_t)positions * (size_t)size, sizeof *e->cos);
    e->sin = planned(e, (size_t)positions * (size_t)size, sizeof *e->sin);
    for (int64_t s = 0; s < positions; s++)
        for (int i = 0; i < size; i++) {
            /* The frequencies twice in a row, while partners are neighbours: not a rotation, but what was trained. */
            double angle = (double)s * pow(10000, -(double)(i % (size / 2)) / (size / 2.0));
            e->cos[s * size + i] = (float)cos(angle);
            e->sin[s * size + i] = (float)sin(angle);
        }
}

/* V-JEPA 2: rotary in place on one row of q or k, all heads, of token n. */
WIDE static void apply_rotary(const encoder *e, int64_t n, float *row) {
    int size = rotary_size(e->m), d = e->m->C / e->m->heads;
    int64_t side = e->m->side_h / e->m->patch;
    int64_t position[3] = {n / (side * side), n % (side * side) / side, n % side}; /* of the config's grid */
    for (int h = 0; h < e->m->heads; h++)
        for (int axis = 0; axis < 3; axis++) {
            float *a = row + h * d + axis * size;
            const float *c = e->cos + position[axis] * size, *s = e->sin + position[axis] * size;
            for (int i = 0; i < size; i += 2) {
                float even = a[i], odd = a[i + 1];
                a[i] = even * c[i] - odd * s[i];
                a[i + 1] = odd * c[i + 1] + even * s[i + 1];
            }
        }
}

/* ---- steps ------------------------------------------------------------------------------------------------------ */

/* The pixels under token n in the order of the embedding's kernel: channel, frame, row, column. */
static float *gather_tubelet(const encoder *e, const float *pixels, int64_t n, float *out) {
    int p = e->m->patch, u = e->m->tubelet;
    int x = (int)(n % e->grid[2]) * p, y = (int)(n / e->grid[2] % e->grid[1]) * p;
    int64_t t = n / e->grid[2] / e->grid[1] * u;
    for (int c = 0; c < 3; c++)
        for (int a = 0; a < u; a++)
            for (int i = 0; i < p; i++, out += p) {
                int64_t frame = (t + a) % e->frames; /* a clip shorter than a tubelet is repeated */
                memcpy(out, pixels + ((frame * 3 + c) * e->height + y + i) * e->width + x, (size_t)p * sizeof *out);
            }
    return out;
}

static void embed_step(const step *s, int64_t first, int n, float *chunk) {
    const model *m = s->e->m;
    float *out = chunk, *x = s->e->x + first * m->C;
    for (int r = 0; r < n; r++) out = gather_tubelet(s->e, s->pixels, first + r, out);
    linear_apply(&s->l[0], chunk, n, x);
    if (!m->is_vjepa2) add_positions(x, first, n, m->C);
}

/* Row `row` of qkv, whose rows have `width` elements. */
static void *qkv_row(const encoder *e, int64_t row, int width) {
    return (char *)e->qkv + (size_t)row * (size_t)width * psa_type_size(e->type);
}

/* Rows of f32 to where attention reads them. */
static void store_rows(const encoder *e, const float *rows, int64_t first, int n, int width) {
    void *to = qkv_row(e, first, width);
    for (size_t i = 0; i < (size_t)n * (size_t)width; i++) set_element(to, e->type, i, rows[i]);
}

static void qkv_step(const step *s, int64_t first, int n, float *chunk) {
    const encoder *e = s->e;
    int C = e->m->C, wide = e->type == PSA_F32;
    float *qkv = wide ? qkv_row(e, first, 3 * C) : chunk + (size_t)n * (size_t)C;
    norm_apply(&s->block->norm1, e->x + first * C, n, C, chunk);
    linear_apply(&s->l[0], chunk, n, qkv);
    for (int r = 0; s->rotary && r < n; r++) {
        apply_rotary(e, first + r, qkv + (int64_t)r * 3 * C);
        apply_rotary(e, first + r, qkv + (int64_t)r * 3 * C + C);
    }
    if (!wide) store_rows(e, qkv, first, n, 3 * C);
}

/* x [n, C] += fc2(gelu(fc1(norm(x)))), some hidden units at a time: their activations stay near, and with more of them
 * OpenBLAS's product of fc2 is slower too. */
static void mlp_add(const norm *before, const linear *fc1, const linear *fc2, float *x, int n, float *chunk) {
    int C = fc1->in;
    float *hidden = chunk + (size_t)n * (size_t)C;
    norm_apply(before, x, n, C, chunk);
    add_rows(x, n, fc2->b, C);
    for (int64_t first = 0, units; first < fc1->out; first += units) {
        units = min64(hidden_units(fc1), fc1->out - first);
        set_rows(hidden, n, fc1->b + first, (int)units);
        multiply_add(chunk, n, C, fc1->w[0] + first * C, C, (int)units, hidden, (int)units);
        gelu(hidden, (size_t)n * (size_t)units);
        multiply_add(hidden, n, (int)units, fc2->w[0] + first, fc1->out, C, x, C);
    }
}

static void mix_step(const step *s, int64_t first, int n, float *chunk) {
    float *x = s->e->x + first * s->e->m->C;
    linear_add(&s->l[0], s->e->mix + first * s->e->m->C, n, x);
    mlp_add(&s->block->norm2, &s->l[1], &s->l[2], x, n, chunk);
}

static void norm_step(const step *s, int64_t first, int n, float *chunk) {
    float *x = s->e->x + first * s->e->m->C;
    (void)chunk;
    norm_apply(&s->e->m->norm, x, n, s->e->m->C, x);
}

/* Keys and values of the cross-attention: [n, 2C] in the place of qkv. */
static void kv_step(const step *s, int64_t first, int n, float *chunk) {
    const encoder *e = s->e;
    int C = e->m->C, wide = e->type == PSA_F32;
    float *kv = wide ? qkv_row(e, first, 2 * C) : chunk + (size_t)n * (size_t)C;
    norm_apply(&e->m->cross.norm_kv, e->x + first * C, n, C, chunk);
    linear_apply(&s->l[0], chunk, n, kv);
    if (!wide) store_rows(e, kv, first, n, 2 * C);
}

/* ---- attention -------------------------------------------------------------------------------------------------- */

/* All heads side by side in rows of `stride` elements, as the linear layers leave them. */
static psa_tensor head_view(const model *m, void *data, psa_type type, int64_t rows, int stride) {
    psa_tensor t = psa_tensor_4d(data, type, m->C / m->heads, rows, m->heads, 1);
    t.nb[1] = (size_t)stride * t.nb[0];
    t.nb[2] = (size_t)(m->C / m->heads) * t.nb[0];
    t.nb[3] = (size_t)rows * t.nb[1];
    return t;
}

/* The i-th of q, k and v in rows of `width` elements. */
static psa_tensor qkv_view(const encoder *e, int i, int width) {
    void *data = (char *)e->qkv + (size_t)i * (size_t)e->m->C * psa_type_size(e->type);
    return head_view(e->m, data, e->type, e->n, width);
}

static void check_attention(const encoder *e, psa_result result) {
    if (result != PSA_OK) die("attention: %s", *e->detail ? e->detail : psa_result_string(result));
}

/* Room for the maps, once their size is known. */
static void trace_open(trace *t, const encoder *e, const psa_plan *p) {
    const model *m = e->m;
    trace_free(t);
    t->layers = m->n_blocks + m->n_pooler;
    t->pooler = m->n_pooler;
    t->heads = m->heads;
    t->n = e->n;
    t->nq = p->nq;
    t->nk = p->nk;
    t->block_q = p->desc.block_q;
    t->block_k = p->desc.block_k;
    memcpy(t->grid, e->grid, sizeof t->grid);
    if (e->desc.order_k.index) {
        t->order = alloc((size_t)t->n, sizeof *t->order);
        memcpy(t->order, e->gilbert, (size_t)t->n * sizeof *t->order);
    }
    t->levels = alloc((size_t)t->layers * (size_t)t->heads, (size_t)(t->nq * t->nk));
    t->density = alloc((size_t)t->layers * (size_t)t->heads, sizeof *t->density);
}

static void trace_free(trace *t) {
    free(t->order);
    free(t->levels);
    free(t->density);
    memset(t, 0, sizeof *t);
}

static uint8_t *trace_levels(const trace *t, int layer) {
    return t->levels + (size_t)layer * (size_t)t->heads * (size_t)(t->nq * t->nk);
}

static void trace_density(trace *t, const psa_plan *p, int layer) {
    for (int h = 0; h < t->heads; h++) {
        psa_stats stats;
        if (psa_stats_from_levels(p, trace_levels(t, layer), 0, h, &stats) == PSA_OK)
            t->density[layer * t->heads + h] = stats.density;
    }
}

/* psa_attention on the GPU: there and back. extra: levels and stats. */
static psa_result attend_on_gpu(gpu *g, const psa_desc *desc, const psa_tensor t[4], psa_extra *extra) {
    psa_plan plan;
    const void *const data[] = {t[0].data, t[1].data, t[2].data, t[3].data};
    double seconds;
    psa_result result = psa_plan_init(&plan, desc, &t[0], &t[1], &t[2], &t[3]);
    if (result == PSA_OK) result = g->load(g, &plan, data);
    for (int stage = GPU_POOL; stage <= GPU_ATTEND && result == PSA_OK; stage++) result = g->stage(g, stage, &seconds);
    if (result == PSA_OK) result = g->get(g, GPU_OUT, t[3].data);
    if (result != PSA_OK) return result;
    uint8_t *levels = extra->levels ? extra->levels : alloc(psa_map_size(&plan), 1);
    result = g->get(g, GPU_LEVELS, levels);
    if (result == PSA_OK) result = psa_stats_from_levels(&plan, levels, -1, -1, &extra->stats);
    if (!extra->levels) free(levels);
    return result;
}

/* Nothing stays that is for sparse attention alone. */
static void make_dense(psa_desc *desc) {
    desc->mask = PSA_MASK_DENSE;
    desc->tree = PSA_TREE_NONE;
    desc->lambda = 0;
    memset(desc->level_count, 0, sizeof desc->level_count);
}

static void attend(encoder *e, const psa_desc *desc, psa_tensor q, psa_tensor k, psa_tensor v, psa_tensor out) {
    psa_extra extra;
    psa_plan plan;
    memset(&extra, 0, sizeof extra);
    int traced = e->trace && desc->mask != PSA_MASK_DENSE;
    if (traced) {
        check_attention(e, psa_plan_init(&plan, desc, &q, &k, &v, &out));
        if (e->layer == 0) trace_open(e->trace, e, &plan);
        extra.levels = trace_levels(e->trace, e->layer);
    }
    const psa_tensor all[] = {q, k, v, out};
    double start = now();
    check_attention(e, e->gpu ? attend_on_gpu(e->gpu, desc, all, &extra)
                              : psa_attention(desc, &q, &k, &v, &out, &extra));
    e->seconds[ATTENTION] += now() - start;
    e->mul_adds += extra.stats.mul_adds;
    e->dense_mul_adds += extra.stats.dense_mul_adds;
    if (traced) trace_density(e->trace, &plan, e->layer);
}

static void run_block(encoder *e, const block *b, int rotary) {
    int C = e->m->C;
    step s = {e, NULL, b, {ready(e, &b->qkv)}, rotary, NULL};
    step_run(&s, qkv_step, LINEAR);
    attend(e, &e->desc, qkv_view(e, 0, 3 * C), qkv_view(e, 1, 3 * C), qkv_view(e, 2, 3 * C),
           head_view(e->m, e->mix, PSA_F32, e->n, C));
    e->layer++;
    s.l[0] = ready(e, &b->proj);
    s.l[1] = ready(e, &b->fc1);
    s.l[2] = ready(e, &b->fc2);
    step_run(&s, mix_step, LINEAR);
}

/* ---- heads ------------------------------------------------------------------------------------------------------ */

/* VideoMAE: the mean token, or the first one; f [C]. */
static void videomae_head(encoder *e, float *f) {
    int C = e->m->C;
    for (int i = 0; i < C; i++) {
        double sum = 0;
        for (int64_t n = 0; n < e->n; n++) sum += (double)e->x[n * C + i];
        f[i] = e->m->mean_pooling ? (float)(sum / (double)e->n) : e->x[i];
    }
    norm_apply(&e->m->norm, f, 1, C, f);
}

/* f [C] = the query token + what it gathers from all tokens. One query row has nothing to be sparse in. */
static void cross_attend(encoder *e, float *f) {
    const cross *x = &e->m->cross;
    int C = e->m->C;
    psa_desc dense = e->desc;
    make_dense(&dense);
    dense.order_q.index = dense.order_k.index = NULL;
    step s = {e, NULL, NULL, {ready(e, &x->kv)}, 0, NULL};
    step_run(&s, kv_step, HEAD);
    linear q = ready(e, &x->q);
    float *row = e->chunks;
    linear_apply(&q, x->token, 1, row);
    e->widened_used = 0;
    for (int i = 0; i < C; i++) set_element(e->mix, e->type, (size_t)i, row[i]);
    attend(e, &dense, head_view(e->m, e->mix, e->type, 1, C), qkv_view(e, 0, 2 * C), qkv_view(e, 1, 2 * C),
           head_view(e->m, f, PSA_F32, 1, C));
    for (int i = 0; i < C; i++) f[i] += x->token[i];
}

/* V-JEPA 2: the pooler's blocks, then its query; f [C]. */
static void vjepa2_head(encoder *e, float *f) {
    step s = {e, NULL, NULL, {{0, 0, 0, {NULL}, {NULL}, NULL}}, 0, NULL};
    step_run(&s, norm_step, HEAD);
    for (int i = 0; i < e->m->n_pooler; i++) run_block(e, &e->m->pooler[i], 0);
    cross_attend(e, f);
    linear fc1 = ready(e, &e->m->cross.fc1), fc2 = ready(e, &e->m->cross.fc2);
    mlp_add(&e->m->cross.norm_mlp, &fc1, &fc2, f, 1, e->chunks);
    e->widened_used = 0;
}

/* ---- running ---------------------------------------------------------------------------------------------------- */

static void check_clip(const model *m, int frames, int height, int width) {
    if (!m->is_vjepa2 && (frames != m->frames || height != m->side_h || width != m->side_w))
        die("the model takes %d frames of %d x %d, the clip has %d of %d x %d", m->frames, m->side_w, m->side_h, frames,
            width, height);
    if (height < m->patch || width < m->patch)
        die("the clip's frames of %d x %d are smaller than a patch of %d", width, height, m->patch);
}

static void keep_detail(void *user, const char *message) {
    encoder *e = user;
    snprintf(e->detail, sizeof e->detail, "%s", message);
}

static void run_crew(void *user, int nth, psa_task_fn *task, void *ctx) {
    crew_run(user, nth, task, ctx);
}

static void encoder_plan(encoder *e, const model *m, crew *c, psa_type type, int frames, int height, int width) {
    if (e->x && e->frames == frames && e->height == height && e->width == width) return;
    encoder_free(e);
    check_clip(m, frames, height, width);
    e->m = m;
    e->crew = c;
    e->type = type;
    e->frames = frames;
    e->height = height;
    e->width = width;
    e->grid[0] = frames < m->tubelet ? frames : frames / m->tubelet;
    e->grid[1] = height / m->patch;
    e->grid[2] = width / m->patch;
    e->n = (int64_t)e->grid[0] * e->grid[1] * e->grid[2];
    size_t row = (size_t)e->n * (size_t)m->C;
    e->x = planned(e, row, sizeof *e->x);
    e->qkv = planned(e, row, 3 * psa_type_size(type));
    e->mix = planned(e, row, sizeof *e->mix);
    int64_t hidden = max64(hidden_units(&m->blocks->fc1), m->is_vjepa2 ? hidden_units(&m->cross.fc1) : 0);
    int64_t widest = max64(m->C + max64(hidden, type == PSA_F32 ? 0 : 3 * m->C), m->embed.in);
    e->chunk_floats = (size_t)min64(CHUNK_ROWS, (e->n - 1) / c->n_threads + 1) * (size_t)widest;
    e->chunks = planned(e, (size_t)c->n_threads * e->chunk_floats, sizeof *e->chunks);
    e->widened = planned(e, widened_most(m), sizeof *e->widened);
    e->gilbert = planned(e, (size_t)e->n, sizeof *e->gilbert);
    psa_result result = psa_order_gilbert(e->grid[0], e->grid[1], e->grid[2], e->gilbert);
    if (result != PSA_OK)
        die("token grid %d x %d x %d: %s", e->grid[0], e->grid[1], e->grid[2], psa_result_string(result));
    if (m->is_vjepa2) make_rotary(e);
}

static void prepare_desc(encoder *e, const psa_desc *desc, psa_order_kind order) {
    int block_k = desc->block_k ? desc->block_k : 64;
    e->desc = *desc;
    e->desc.n_threads = e->crew->n_threads;
    e->desc.parallel_fn = run_crew;
    e->desc.parallel_user = e->crew;
    e->desc.alloc_fn = slot_take;
    e->desc.free_fn = slot_return;
    e->desc.alloc_user = e;
    e->desc.log_fn = keep_detail;
    e->desc.log_user = e;
    e->desc.order_q.index = order == PSA_ORDER_GILBERT ? e->gilbert : NULL;
    e->desc.order_k.index = desc->tree ? NULL : e->desc.order_q.index;
    if (e->n < FEWEST_KV_BLOCKS * (int64_t)block_k) make_dense(&e->desc);
    e->is_dense = e->desc.mask == PSA_MASK_DENSE;
}

static void encoder_run(encoder *e, const psa_desc *desc, psa_order_kind order, const float *pixels, float *logits,
                        trace *t) {
    const model *m = e->m;
    float *f = alloc((size_t)m->C, sizeof *f);
    prepare_desc(e, desc, order);
    e->trace = t;
    e->layer = 0;
    e->mul_adds = e->dense_mul_adds = 0;
    memset(e->seconds, 0, sizeof e->seconds);
    openblas_set_num_threads(1); /* the tokens are shared out to threads already */
    step embed = {e, NULL, NULL, {ready(e, &m->embed)}, 0, pixels};
    step_run(&embed, embed_step, EMBED);
    for (int i = 0; i < m->n_blocks; i++) run_block(e, &m->blocks[i], m->is_vjepa2);
    double start = now(), other = e->seconds[ATTENTION] + e->seconds[LINEAR];
    if (m->is_vjepa2)
        vjepa2_head(e, f);
    else
        videomae_head(e, f);
    linear classifier = ready(e, &m->classifier);
    linear_apply(&classifier, f, 1, logits);
    e->widened_used = 0;
    e->seconds[HEAD] = now() - start - (e->seconds[ATTENTION] + e->seconds[LINEAR] - other);
    for (int i = 0; i < 2; i++) slot_free(&e->slots[i]); /* the next clip's frames are read meanwhile */
    free(f);
}

#endif
