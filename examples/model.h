/* model.h - VideoMAEForVideoClassification and VJEPA2ForVideoClassification in f32.
 *
 * Both are the same thing: tubelets of the clip become tokens, pre-norm transformer blocks work on them, a head makes
 * one vector and from it the logits. They differ in positions (VideoMAE: a table is added; V-JEPA 2: rotary on q and k)
 * and in the head (VideoMAE: mean of the tokens; V-JEPA 2: more blocks and one query that attends to all tokens).
 *
 * Weights stay in the mapped files: f32 ones are used where they lie, 16-bit ones are widened layer by layer.
 * Memory for a clip of N tokens and width C, all of it planned once: 5 N C floats (3.5 N C with 16-bit q, k and v), a
 * chunk per thread, one widened layer, and what psa_attention takes. Include after psa.h. */
#ifndef MODEL_H
#define MODEL_H

#include "crew.h"
#include "elements.h"
#include "safetensors.h"
#include <cblas.h>

#define CHUNK_ROWS 256    /* tokens that a thread takes through the linear layers at a time */
#define FEWEST_KV_BLOCKS 8 /* with fewer there is nothing to choose from: attention is dense */
#define MAX_PARTS 3

/* Parts are tensors of the checkpoint whose results stand side by side: q, k and v. */
typedef struct linear {
    int out, in, n_parts;               /* out: of all parts */
    const tensor_info *part[MAX_PARTS]; /* [out / n_parts, in] */
    const float *w[MAX_PARTS];          /* the same as f32; NULL: part has to be widened */
    float *b;                           /* [out] */
} linear;

typedef struct norm {
    double eps;
    float *g, *b;           /* [C] */
} norm;

/* x += proj(attention(qkv(norm1(x)))), then x += fc2(gelu(fc1(norm2(x)))) */
typedef struct block {
    norm norm1, norm2;
    linear qkv, proj, fc1, fc2;
} block;

/* One query row that attends to all tokens; V-JEPA 2's last step. */
typedef struct cross {
    float *token;           /* [C] */
    norm norm_kv, norm_mlp;
    linear q, kv, fc1, fc2;
} cross;

typedef struct model {
    int is_vjepa2, side_h, side_w, patch, tubelet, frames; /* V-JEPA 2: of its training clips, others will do */
    int C, heads, n_blocks, n_pooler, mean_pooling, n_labels;
    double eps;
    char **labels;
    checkpoint weights;
    linear embed;           /* [C, 3 * tubelet * patch * patch] */
    block *blocks, *pooler;
    norm norm;              /* VideoMAE: fc_norm or videomae.layernorm; V-JEPA 2: at the encoder's end */
    cross cross;
    linear classifier;
} model;

/* What the self-attentions of one run read: the encoder's layers, then the pooler's. */
typedef struct trace {
    int layers, heads, pooler; /* pooler: the last so many layers */
    int64_t n, nq, nk;         /* tokens, query blocks, KV blocks */
    int block_q, block_k, grid[3];
    const int32_t *order;      /* [n]: the token in row i of the attention; NULL: token i */
    uint8_t *levels;           /* [layers][heads][nq][nk] */
    double *density;           /* [layers][heads] */
} trace;

enum { EMBED, ATTENTION, LINEAR, HEAD, PARTS }; /* of the run time */
static const char *const part_names[PARTS] = {"embed", "attention", "linear", "head"};

/* Memory that psa_attention asks for in every layer. */
typedef struct slot {
    void *memory;
    size_t size;
    int taken;
} slot;

/* What running the model on clips of one size needs, and what it measured. */
typedef struct encoder {
    const model *m;
    crew *crew;
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

static void model_load(model *m, const char *dir);
static void model_free(model *m);

/* Prepares for clips of this size; earlier preparations are dropped. *e must be zero at first. */
static void encoder_plan(encoder *e, const model *m, crew *c, psa_type type, int frames, int height, int width);
static void encoder_free(encoder *e);

/* pixels [frames, 3, height, width] to logits [n_labels]; counts attention work and time from zero. t may be NULL;
 * else what it held is freed, and it is filled unless the attention was dense. */
static void encoder_run(encoder *e, const psa_desc *desc, psa_order_kind order, const float *pixels, float *logits,
                        trace *t);
static void trace_free(trace *t);

/* ---- config ----------------------------------------------------------------------------------------------------- */

/* "key": a number or a list [height, width], each from 1 to most. */
static void read_sides(const cJSON *json, const char *where, const char *key, int otherwise, int most, int *h, int *w) {
    const cJSON *item = json_get(json, key);
    if (!cJSON_IsArray(item)) {
        *h = *w = json_int(json, where, key, otherwise, 1, most);
        return;
    }
    if (cJSON_GetArraySize(item) != 2 || !json_whole(item->child, 1, most) || !json_whole(item->child->next, 1, most))
        die("%s: \"%s\": expected a size up to %d or [height, width]", where, key, most);
    *h = (int)item->child->valuedouble;
    *w = (int)item->child->next->valuedouble;
}

/* id2label: {"0": text, "1": ...} in any order. Absent: LABEL_0 and LABEL_1. */
static void read_labels(model *m, const cJSON *json, const char *where) {
    const cJSON *map = json_get(json, "id2label"), *entry;
    if (map && (!cJSON_IsObject(map) || !map->child)) die("%s: \"id2label\": expected an object with labels", where);
    m->n_labels = map ? cJSON_GetArraySize(map) : 2;
    m->labels = alloc((size_t)m->n_labels, sizeof *m->labels);
    if (!map) {
        m->labels[0] = copy_text("LABEL_0");
        m->labels[1] = copy_text("LABEL_1");
    }
    cJSON_ArrayForEach(entry, map) {
        char *end;
        long i = strtol(entry->string, &end, 10);
        if (!*entry->string || *end || i < 0 || i >= m->n_labels || m->labels[i] || !cJSON_IsString(entry))
            die("%s: \"id2label\": expected the labels \"0\" to \"%d\" once each, found \"%s\"", where, m->n_labels - 1,
                entry->string);
        m->labels[i] = copy_text(entry->valuestring);
    }
}

static void read_config(model *m, const cJSON *json, const char *where) {
    const char *type = json_text(json, where, "model_type", ""), *act = json_text(json, where, "hidden_act", "gelu");
    int patch_w, v = m->is_vjepa2 = strcmp(type, "vjepa2") == 0;
    if (!v && strcmp(type, "videomae") != 0)
        die("%s: \"model_type\": expected videomae or vjepa2, found \"%s\"", where, type);
    if (strcmp(act, "gelu") != 0) die("%s: \"hidden_act\": expected gelu, found %s", where, act);
    if (json_int(json, where, v ? "in_chans" : "num_channels", 3, 1, 1000) != 3)
        die("%s: expected a model of 3 colour channels", where);
    read_sides(json, where, v ? "crop_size" : "image_size", v ? 256 : 224, 16384, &m->side_h, &m->side_w);
    read_sides(json, where, "patch_size", 16, 1024, &m->patch, &patch_w);
    m->tubelet = json_int(json, where, "tubelet_size", 2, 1, 64);
    m->frames = json_int(json, where, v ? "frames_per_clip" : "num_frames", v ? 64 : 16, 1, 65536);
    m->C = json_int(json, where, "hidden_size", v ? 1024 : 768, 8, 65536);
    m->heads = json_int(json, where, "num_attention_heads", v ? 16 : 12, 1, 8192);
    m->n_blocks = json_int(json, where, "num_hidden_layers", v ? 24 : 12, 1, 1024);
    m->n_pooler = v ? json_int(json, where, "num_pooler_layers", 3, 0, 1024) : 0;
    m->eps = json_positive(json, where, "layer_norm_eps", v ? 1e-6 : 1e-12);
    m->mean_pooling = json_bool(json, where, "use_mean_pooling", 1);
    if (m->patch != patch_w || m->side_h % m->patch || m->side_w % m->patch)
        die("%s: expected square patches that divide the image of %d x %d", where, m->side_w, m->side_h);
    if (v ? m->side_h != m->side_w : m->frames % m->tubelet != 0)
        die("%s: expected %s", where, v ? "a square \"crop_size\"" : "\"tubelet_size\" to divide \"num_frames\"");
    if (m->C % m->heads || m->C / m->heads % 8 || m->C / m->heads > PSA_MAX_D)
        die("%s: expected heads of a multiple of 8 up to %d, found hidden_size %d / num_attention_heads %d", where,
            PSA_MAX_D, m->C, m->heads);
    read_labels(m, json, where);
}

/* ---- weights ---------------------------------------------------------------------------------------------------- */

/* Formats a tensor name; the result lives until the next call. */
__attribute__((format(printf, 1, 2))) static const char *name_of(const char *format, ...) {
    static char name[512];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    return name;
}

static float *load_values(const tensor_info *t, int n) {
    float *values = alloc((size_t)n, sizeof *values);
    tensor_widen(t, 0, n, values);
    return values;
}

static float *load_vector(const checkpoint *c, const char *name, int n) {
    int64_t shape = n;
    return load_values(checkpoint_need(c, name, 1, &shape), n);
}

static norm load_norm(const checkpoint *c, const char *prefix, const char *name, int n, double eps) {
    norm result = {eps, NULL, NULL};
    result.g = load_vector(c, name_of("%s%s.weight", prefix, name), n);
    result.b = load_vector(c, name_of("%s%s.bias", prefix, name), n);
    return result;
}

static void set_part(linear *l, const tensor_info *t) {
    l->part[l->n_parts] = t;
    l->w[l->n_parts++] = tensor_floats(t);
}

/* n layers of [out, in] side by side. Without a bias it stays zero. */
static linear load_stacked(const checkpoint *c, const char *prefix, const char *const *names, int n, int out, int in,
                           int bias) {
    linear l;
    int64_t shape[2] = {out, in};
    memset(&l, 0, sizeof l);
    l.out = n * out;
    l.in = in;
    l.b = alloc((size_t)l.out, sizeof *l.b);
    for (int i = 0; i < n; i++) {
        set_part(&l, checkpoint_need(c, name_of("%s%s.weight", prefix, names[i]), 2, shape));
        if (!bias) continue;
        const tensor_info *b = checkpoint_need(c, name_of("%s%s.bias", prefix, names[i]), 1, shape);
        tensor_widen(b, 0, out, l.b + (size_t)i * (size_t)out);
    }
    return l;
}

static linear load_linear(const checkpoint *c, const char *prefix, const char *name, int out, int in) {
    return load_stacked(c, prefix, &name, 1, out, in, 1);
}

static linear load_embed(const checkpoint *c, const model *m, const char *prefix) {
    int64_t shape[5] = {m->C, 3, m->tubelet, m->patch, m->patch};
    linear l;
    memset(&l, 0, sizeof l);
    l.out = m->C;
    l.in = 3 * m->tubelet * m->patch * m->patch;
    set_part(&l, checkpoint_need(c, name_of("%s.weight", prefix), 5, shape));
    l.b = load_vector(c, name_of("%s.bias", prefix), m->C);
    return l;
}

/* VideoMAE's q or v bias, under its published name or the one that some versions wrote. */
static void load_videomae_bias(const checkpoint *c, const char *prefix, const char *published, const char *other, int n,
                               float *dst) {
    int64_t shape = n;
    static const char format[] = "%sattention.attention.%s";
    const char *name = checkpoint_find(c, name_of(format, prefix, published)) ? published : other;
    if (!checkpoint_find(c, name_of(format, prefix, name)))
        die("%s: tensor %s is missing, and so is %s; the config says that there is one", c->dir,
            name_of(format, prefix, published), other);
    tensor_widen(checkpoint_need(c, name_of(format, prefix, name), 1, &shape), 0, n, dst);
}

static void load_videomae(model *m, const checkpoint *c, const cJSON *json, const char *where) {
    static const char *const qkv[] = {"attention.attention.query", "attention.attention.key",
                                      "attention.attention.value"};
    int C = m->C, mlp = json_int(json, where, "intermediate_size", 3072, 1, 1 << 20);
    int bias = json_bool(json, where, "qv_bias", json_bool(json, where, "qkv_bias", 1));
    m->embed = load_embed(c, m, "videomae.embeddings.patch_embeddings.projection");
    for (int i = 0; i < m->n_blocks; i++) {
        char p[64];
        block *b = &m->blocks[i];
        snprintf(p, sizeof p, "videomae.encoder.layer.%d.", i);
        b->norm1 = load_norm(c, p, "layernorm_before", C, m->eps);
        b->norm2 = load_norm(c, p, "layernorm_after", C, m->eps);
        b->qkv = load_stacked(c, p, qkv, 3, C, C, 0);
        if (bias) {
            load_videomae_bias(c, p, "q_bias", "query.bias", C, b->qkv.b);
            load_videomae_bias(c, p, "v_bias", "value.bias", C, b->qkv.b + 2 * C);
        }
        b->proj = load_linear(c, p, "attention.output.dense", C, C);
        b->fc1 = load_linear(c, p, "intermediate.dense", mlp, C);
        b->fc2 = load_linear(c, p, "output.dense", C, mlp);
    }
    /* fc_norm has the framework's default eps, not the config's. */
    if (m->mean_pooling)
        m->norm = load_norm(c, "", "fc_norm", C, 1e-5);
    else
        m->norm = load_norm(c, "", "videomae.layernorm", C, m->eps);
}

/* An encoder or pooler block of V-JEPA 2; names: norm, norm, q, k, v, out. */
static void load_vjepa2_block(block *b, const checkpoint *c, const char *p, const char *const names[6], int C, int mlp,
                              int bias, double eps) {
    b->norm1 = load_norm(c, p, names[0], C, eps);
    b->norm2 = load_norm(c, p, names[1], C, eps);
    b->qkv = load_stacked(c, p, names + 2, 3, C, C, bias);
    b->proj = load_linear(c, p, names[5], C, C);
    b->fc1 = load_linear(c, p, "mlp.fc1", mlp, C);
    b->fc2 = load_linear(c, p, "mlp.fc2", C, mlp);
}

static void load_cross(model *m, const checkpoint *c) {
    static const char p[] = "pooler.cross_attention_layer.";
    static const char *const kv[] = {"cross_attn.k_proj", "cross_attn.v_proj"};
    cross *x = &m->cross;
    int64_t shape[3] = {1, 1, m->C};
    x->token = load_values(checkpoint_need(c, "pooler.query_tokens", 3, shape), m->C);
    x->norm_kv = load_norm(c, p, "layer_norm1", m->C, m->eps);
    x->norm_mlp = load_norm(c, p, "layer_norm2", m->C, m->eps);
    x->q = load_linear(c, p, "cross_attn.q_proj", m->C, m->C);
    x->kv = load_stacked(c, p, kv, 2, m->C, m->C, 1);
    x->fc1 = load_linear(c, p, "mlp.fc1", 4 * m->C, m->C);
    x->fc2 = load_linear(c, p, "mlp.fc2", m->C, 4 * m->C);
}

static void load_vjepa2(model *m, const checkpoint *c, const cJSON *json, const char *where) {
    static const char *const encoder_names[6] = {"norm1", "norm2", "attention.query", "attention.key",
                                                 "attention.value", "attention.proj"};
    static const char *const pooler_names[6] = {"layer_norm1", "layer_norm2", "self_attn.q_proj", "self_attn.k_proj",
                                                "self_attn.v_proj", "self_attn.out_proj"};
    /* The MLP's width is C * mlp_ratio, truncated; ratios like 48/11 do not survive that, so the tensor tells. */
    const tensor_info *fc1 = checkpoint_find(c, "vjepa2.encoder.layer.0.mlp.fc1.weight");
    int C = m->C, bias = json_bool(json, where, "qkv_bias", 1);
    int mlp = fc1 && fc1->ndim == 2 && fc1->shape[0] > 0 && fc1->shape[0] <= 1 << 20
                  ? (int)fc1->shape[0]
                  : (int)fmin(fmax(C * json_positive(json, where, "mlp_ratio", 4), 1), 1 << 20);
    char p[64];
    m->embed = load_embed(c, m, "vjepa2.encoder.embeddings.patch_embeddings.proj");
    for (int i = 0; i < m->n_blocks; i++) {
        snprintf(p, sizeof p, "vjepa2.encoder.layer.%d.", i);
        load_vjepa2_block(&m->blocks[i], c, p, encoder_names, C, mlp, bias, m->eps);
    }
    m->norm = load_norm(c, "", "vjepa2.encoder.layernorm", C, m->eps);
    for (int i = 0; i < m->n_pooler; i++) {
        snprintf(p, sizeof p, "pooler.self_attention_layers.%d.", i);
        load_vjepa2_block(&m->pooler[i], c, p, pooler_names, C, 4 * C, 1, m->eps);
    }
    load_cross(m, c);
}

static void model_load(model *m, const char *dir) {
    char *path = join_path(dir, "config.json");
    cJSON *json = read_object(path);
    checkpoint *c = &m->weights;
    memset(m, 0, sizeof *m);
    read_config(m, json, path);
    checkpoint_open(c, dir);
    m->blocks = alloc((size_t)m->n_blocks, sizeof *m->blocks);
    m->pooler = alloc((size_t)m->n_pooler, sizeof *m->pooler);
    if (m->is_vjepa2)
        load_vjepa2(m, c, json, path);
    else
        load_videomae(m, c, json, path);
    m->classifier = load_linear(c, "", "classifier", m->n_labels, m->C);
    cJSON_Delete(json);
    free(path);
}

static void norm_free(norm *n) {
    free(n->g);
    free(n->b);
}

static void blocks_free(block *blocks, int n) {
    for (block *b = blocks; b < blocks + n; b++) {
        norm_free(&b->norm1);
        norm_free(&b->norm2);
        free(b->qkv.b);
        free(b->proj.b);
        free(b->fc1.b);
        free(b->fc2.b);
    }
    free(blocks);
}

static void model_free(model *m) {
    for (int i = 0; i < m->n_labels; i++) free(m->labels[i]);
    free(m->labels);
    free(m->embed.b);
    blocks_free(m->blocks, m->n_blocks);
    blocks_free(m->pooler, m->n_pooler);
    norm_free(&m->norm);
    free(m->cross.token);
    norm_free(&m->cross.norm_kv);
    norm_free(&m->cross.norm_mlp);
    free(m->cross.q.b);
    free(m->cross.kv.b);
    free(m->cross.fc1.b);
    free(m->cross.fc2.b);
    free(m->classifier.b);
    checkpoint_close(&m->weights);
}

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

static void step_task(void *ctx, int ith, int nth) {
    const step *s = ctx;
    for (int64_t first = (int64_t)ith * CHUNK_ROWS; first < s->e->n; first += (int64_t)nth * CHUNK_ROWS) {
        int64_t left = s->e->n - first;
        s->fn(s, first, (int)(left < CHUNK_ROWS ? left : CHUNK_ROWS), s->e->chunks + (size_t)ith * s->e->chunk_floats);
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
    }
    e->seconds[LINEAR] += now() - start;
    return complete;
}

/* ---- layers ----------------------------------------------------------------------------------------------------- */

/* y [rows, out] += x [rows, in] w' */
static void multiply_add(const linear *l, const float *x, int rows, float *y) {
    int out = l->out / l->n_parts;
    for (int i = 0; i < l->n_parts; i++)
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, rows, out, l->in, 1, x, l->in, l->w[i], l->in, 1,
                    y + i * out, l->out);
}

static void linear_apply(const linear *l, const float *x, int rows, float *y) {
    for (int r = 0; r < rows; r++) memcpy(y + (size_t)r * (size_t)l->out, l->b, (size_t)l->out * sizeof *y);
    multiply_add(l, x, rows, y);
}

/* y += the layer's result */
static void linear_add(const linear *l, const float *x, int rows, float *y) {
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < l->out; o++) y[(size_t)r * (size_t)l->out + (size_t)o] += l->b[o];
    multiply_add(l, x, rows, y);
}

/* Loops over a row below keep one partial sum per lane, which is what lets compilers vectorise them. */
enum { LANES = 8 }; /* widths are multiples of it */

static double lane_sum(const double *lanes) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

static void norm_apply(const norm *n, const float *x, int rows, int C, float *y) {
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
static float erf_rational(float x) {
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

static void gelu(float *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1 + erf_rational(x[i] * 0.70710678f));
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

/* psa_attention's allocator: every layer gets the memory of the layer before. */
static void *slot_take(void *user, size_t size) {
    encoder *e = user;
    slot *s = e->slots[0].taken ? &e->slots[1] : &e->slots[0];
    if (s->taken) return NULL;
    if (s->size < size) {
        free(s->memory);
        e->bytes += size - s->size;
        s->memory = malloc(size);
        s->size = s->memory ? size : 0;
    }
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
    free(e->slots[0].memory);
    free(e->slots[1].memory);
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
static void apply_rotary(const encoder *e, int64_t n, float *row) {
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

static void mlp_add(const norm *before, const linear *fc1, const linear *fc2, float *x, int n, float *chunk) {
    float *hidden = chunk + (size_t)n * (size_t)fc1->in;
    norm_apply(before, x, n, fc1->in, chunk);
    linear_apply(fc1, chunk, n, hidden);
    gelu(hidden, (size_t)n * (size_t)fc1->out);
    linear_add(fc2, hidden, n, x);
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
    t->order = e->desc.order_k.index;
    t->levels = alloc((size_t)t->layers * (size_t)t->heads, (size_t)(t->nq * t->nk));
    t->density = alloc((size_t)t->layers * (size_t)t->heads, sizeof *t->density);
}

static void trace_free(trace *t) {
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
    double start = now();
    check_attention(e, psa_attention(desc, &q, &k, &v, &out, &extra));
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
    step s = {e, NULL, NULL, {ready(e, &x->kv)}, 0, NULL};
    step_run(&s, kv_step, HEAD);
    linear q = ready(e, &x->q);
    float *row = e->chunks;
    linear_apply(&q, x->token, 1, row);
    e->widened_used = 0;
    for (int i = 0; i < C; i++) set_element(e->mix, e->type, (size_t)i, row[i]);
    dense.mask = PSA_MASK_DENSE;
    dense.order_q.index = dense.order_k.index = NULL;
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
    size_t row = (size_t)e->n * (size_t)m->C, hidden = (size_t)max64(m->blocks->fc1.out, m->is_vjepa2 ? 4 * m->C : 0);
    e->x = planned(e, row, sizeof *e->x);
    e->qkv = planned(e, row, 3 * psa_type_size(type));
    e->mix = planned(e, row, sizeof *e->mix);
    e->chunk_floats = CHUNK_ROWS * max_size((size_t)m->C + max_size(hidden, 3 * (size_t)m->C), (size_t)m->embed.in);
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
    e->desc.order_q.index = e->desc.order_k.index = order == PSA_ORDER_GILBERT ? e->gilbert : NULL;
    if (e->n < FEWEST_KV_BLOCKS * (int64_t)block_k) e->desc.mask = PSA_MASK_DENSE;
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
    free(f);
}

#endif
