/* model.h - VideoMAEForVideoClassification and VJEPA2ForVideoClassification: what config.json and the weights say.
 * Weights stay in the mapped files, but for biases and norms. Include after psa.h. */
#ifndef MODEL_H
#define MODEL_H

#include "safetensors.h"

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

static void model_load(model *m, const char *dir);
static void model_free(model *m);

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
    checkpoint_release(c);
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

#endif
