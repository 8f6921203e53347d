/* report.h - what came out: text, JSON, arrays and pictures. */
#ifndef REPORT_H
#define REPORT_H

#include <sys/resource.h>

/* Bytes that the process has had in memory at most, mapped weights included. */
static double peak_memory(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return 1024.0 * (double)usage.ru_maxrss;
}

/* ---- text ------------------------------------------------------------------------------------------------------- */

static void print_header(const job *j) {
    const model *m = &j->m;
    psa_isa isa = isa_of(j->in.psa.desc.isa ? j->in.psa.desc.isa : psa_isa_detect(), j->in.psa.type);
    const char *where = j->in.psa.backend == BACKEND_CUDA ? j->gpu.name : psa_isa_name(isa);
    printf("%s: %s, %d layers, %d heads of %d, %d labels; %d threads, psa %s %s, OpenBLAS %s\n", j->in.model,
           m->is_vjepa2 ? "V-JEPA 2" : "VideoMAE", m->n_blocks + m->n_pooler, m->heads, m->C / m->heads, m->n_labels,
           j->crew.n_threads, where, type_name(j->in.psa.type), openblas_get_corename());
}

static void print_labels(const model *m, const outcome *o) {
    enum { BAR = 24 };
    for (int i = 0; i < TOP && o->top[i] >= 0; i++) {
        char bar[BAR + 1] = "";
        memset(bar, '#', (size_t)(BAR * o->p[o->top[i]] + 0.5));
        printf("  %.4f  %-*s  %s\n", o->p[o->top[i]], BAR, bar, m->labels[o->top[i]]);
    }
}

static void print_outcome(const job *j, const char *name, const outcome *o) {
    printf("  %-6s %7.3f", name, o->density);
    for (int i = 0; i < PARTS; i++) printf(" %9.1f", 1e3 * o->parts[i]);
    printf(" %9.1f   %.4f %s\n", 1e3 * o->seconds, o->p[o->top[0]], j->m.labels[o->top[0]]);
}

static void print_result(const job *j, const result *r) {
    const sampling *how = &j->in.how;
    printf("\n%s: %d frames", r->name, r->frames);
    if (r->video_frames) printf(" of %lld", (long long)r->video_frames);
    if (r->main.views > 1) printf(", %d clips x %d crops", how->clips, how->crops);
    printf(", %d x %d x %d = %lld tokens", r->grid[0], r->grid[1], r->grid[2],
           (long long)r->grid[0] * r->grid[1] * r->grid[2]);
    if (r->video_frames) printf(", decoded in %.1f ms", 1e3 * r->read_seconds);
    printf("\n");
    print_labels(&j->m, &r->main);
    printf("  ms     density     embed attention    linear      head     total   top-1\n");
    print_outcome(j, main_name(j), &r->main);
    if (r->main.is_dense && !j->in.dense)
        printf("  so few tokens that attention is dense: fewer than %d blocks of keys leave nothing to choose from\n",
               FEWEST_KV_BLOCKS);
    if (!j->in.psa.compare) return;
    print_outcome(j, "dense", &r->dense);
    printf("  top-1 %s; KL(dense || psa) %.3g nats; attention %.2f times as fast, all %.2f times\n",
           r->main.top[0] == r->dense.top[0] ? "agrees" : "differs", divergence(r, j->m.n_labels),
           r->dense.parts[ATTENTION] / r->main.parts[ATTENTION], r->dense.seconds / r->main.seconds);
}

static int count_agreeing(const job *j) {
    int n = 0;
    for (size_t i = 0; i < j->n_results; i++) n += j->results[i].main.top[0] == j->results[i].dense.top[0];
    return n;
}

static void print_text(const job *j) {
    print_header(j);
    for (size_t i = 0; i < j->n_results; i++) print_result(j, &j->results[i]);
    if (j->in.psa.compare && j->n_results > 1)
        printf("\ntop-1 agrees on %d of %zu inputs\n", count_agreeing(j), j->n_results);
    printf("\nmemory: %.1f MB at most; program %.1f MB, weights %.1f MB, activations %.1f MB\n", 1e-6 * peak_memory(),
           1e-6 * j->program, 1e-6 * (double)checkpoint_bytes(&j->m.weights), 1e-6 * (double)j->activations);
}

/* ---- JSON ------------------------------------------------------------------------------------------------------- */

static void json_outcome(cJSON *parent, const char *name, const job *j, const outcome *o) {
    cJSON *object = cJSON_AddObjectToObject(parent, name), *labels = cJSON_CreateArray();
    cJSON_AddNumberToObject(object, "density", o->density);
    for (int i = 0; i < PARTS; i++) {
        char key[32];
        snprintf(key, sizeof key, "%s_seconds", part_names[i]);
        cJSON_AddNumberToObject(object, key, o->parts[i]);
    }
    cJSON_AddNumberToObject(object, "seconds", o->seconds);
    for (int i = 0; i < TOP && o->top[i] >= 0; i++) {
        cJSON *label = cJSON_CreateObject();
        cJSON_AddNumberToObject(label, "index", o->top[i]);
        cJSON_AddStringToObject(label, "label", j->m.labels[o->top[i]]);
        cJSON_AddNumberToObject(label, "probability", o->p[o->top[i]]);
        cJSON_AddItemToArray(labels, label);
    }
    cJSON_AddItemToObject(object, "labels", labels);
}

static void json_result(cJSON *parent, const job *j, const result *r) {
    cJSON *object = cJSON_CreateObject();
    cJSON_AddItemToArray(parent, object);
    cJSON_AddStringToObject(object, "clip", r->name);
    cJSON_AddNumberToObject(object, "frames", r->frames);
    cJSON_AddNumberToObject(object, "views", r->main.views);
    cJSON_AddItemToObject(object, "grid", cJSON_CreateIntArray(r->grid, 3));
    cJSON_AddNumberToObject(object, "read_seconds", r->read_seconds);
    cJSON_AddBoolToObject(object, "short_and_dense", r->main.is_dense && !j->in.dense);
    json_outcome(object, main_name(j), j, &r->main);
    if (!j->in.psa.compare) return;
    json_outcome(object, "dense", j, &r->dense);
    cJSON_AddBoolToObject(object, "top1_agrees", r->main.top[0] == r->dense.top[0]);
    cJSON_AddNumberToObject(object, "kl", divergence(r, j->m.n_labels));
}

static void print_and_delete(cJSON *root) {
    char *text = cJSON_Print(root);
    if (!text) die("no memory for the report");
    puts(text);
    cJSON_free(text);
    cJSON_Delete(root);
}

static void json_memory(cJSON *parent, const job *j) {
    cJSON *object = cJSON_AddObjectToObject(parent, "memory");
    cJSON_AddNumberToObject(object, "peak_bytes", peak_memory());
    cJSON_AddNumberToObject(object, "program_bytes", j->program);
    cJSON_AddNumberToObject(object, "weights_bytes", (double)checkpoint_bytes(&j->m.weights));
    cJSON_AddNumberToObject(object, "activations_bytes", (double)j->activations);
}

static void print_json(const job *j) {
    cJSON *root = cJSON_CreateObject(), *clips;
    cJSON_AddStringToObject(root, "model", j->in.model);
    cJSON_AddNumberToObject(root, "threads", j->crew.n_threads);
    cJSON_AddStringToObject(root, "backend", backend_name(j->in.psa.backend));
    json_memory(root, j);
    clips = cJSON_AddArrayToObject(root, "clips");
    for (size_t i = 0; i < j->n_results; i++) json_result(clips, j, &j->results[i]);
    print_and_delete(root);
}

/* ---- arrays ----------------------------------------------------------------------------------------------------- */

static void write_npy(const char *path, int ndim, const int64_t *shape, const float *data) {
    char err[512];
    if (npy_write(path, "<f4", ndim, shape, data, err, sizeof err) != 0) die("%s", err);
}

static void write_logits(const char *path, int64_t rows, int64_t labels, const float *logits) {
    int64_t shape[2] = {rows, labels};
    write_npy(path, 2, shape, logits);
}

static void write_pixels(const char *path, const clip *c) {
    int64_t shape[5] = {1, c->frames, 3, c->height, c->width};
    write_npy(path, 5, shape, c->pixels);
}

/* ---- pictures --------------------------------------------------------------------------------------------------- */

/* What the model saw, back in RGB: [frames, height, width, 3]. */
static uint8_t *seen_frames(const clip *c, const settings *s) {
    size_t plane = (size_t)c->height * (size_t)c->width;
    uint8_t *rgb = alloc((size_t)c->frames * plane, 3);
    for (size_t channel = 0; channel < 3; channel++) {
        float table[256];
        sample_table(s, (int)channel, table);
        for (size_t frame = 0; frame < (size_t)c->frames; frame++)
            for (size_t i = 0; i < plane; i++) {
                float v = c->pixels[(3 * frame + channel) * plane + i];
                rgb[3 * (frame * plane + i) + channel] =
                    (uint8_t)(255 * (v - table[0]) / (table[255] - table[0]) + 0.5f);
            }
    }
    return rgb;
}

static void caption_bars(caption *c, const job *j, const result *r) {
    c->has_dense = j->in.psa.compare;
    for (int i = 0; i < TOP && r->main.top[i] >= 0; i++, c->n_bars++) {
        int label = r->main.top[i];
        c->bars[i].label = j->m.labels[label];
        c->bars[i].psa = r->main.p[label];
        c->bars[i].dense = c->has_dense ? r->dense.p[label] : 0;
    }
}

/* Where nothing else was asked for: the middle of everything. */
static void choose_query(const job *j, int query[5]) {
    const trace *t = &j->trace;
    const int most[5] = {t->layers, t->heads, t->grid[0], t->grid[1], t->grid[2]};
    for (int i = 0; i < 5; i++) {
        query[i] = j->in.n_query ? j->in.query[i] : most[i] / 2;
        if (query[i] >= most[i])
            die("--query: expected a layer, head and token (time, row, column) below %d,%d,%d,%d,%d", most[0], most[1],
                most[2], most[3], most[4]);
    }
}

static void write_pictures(const job *j) {
    const result *r = &j->results[0];
    char title[256], lines[3][128];
    int query[5];
    caption c;
    if (r->main.is_dense) die("--png: so few tokens are read densely; there is nothing to show");
    memset(&c, 0, sizeof c);
    choose_query(j, query);
    snprintf(title, sizeof title, "%s: %s", r->name, j->m.labels[r->main.top[0]]);
    snprintf(lines[0], sizeof lines[0], "%d x %d x %d = %lld tokens, density %.3f", r->grid[0], r->grid[1], r->grid[2],
             (long long)j->trace.n, r->main.density);
    snprintf(lines[1], sizeof lines[1], "attention %.1f ms, all %.1f ms, %d threads", 1e3 * r->main.parts[ATTENTION],
             1e3 * r->main.seconds, j->crew.n_threads);
    if (j->in.psa.compare)
        snprintf(lines[2], sizeof lines[2], "dense attention %.1f ms, all %.1f ms", 1e3 * r->dense.parts[ATTENTION],
                 1e3 * r->dense.seconds);
    c.title = title;
    c.n_lines = j->in.psa.compare ? 3 : 2;
    for (int i = 0; i < c.n_lines; i++) c.lines[i] = lines[i];
    caption_bars(&c, j, r);
    uint8_t *rgb = seen_frames(&j->clip, &j->settings);
    seen s = {j->clip.frames, j->clip.height, j->clip.width, j->m.tubelet, rgb};
    pictures_write(j->in.png, &j->trace, &s, &c, query + 2, query[0], query[1]);
    free(rgb);
}

/* ---- all of it -------------------------------------------------------------------------------------------------- */

static void write_files(const job *j) {
    int64_t labels = j->m.n_labels;
    if (j->in.save_pixels) write_pixels(j->in.save_pixels, &j->clip);
    if (j->in.png) write_pictures(j);
    if (!j->in.logits) return;
    float *all = alloc(j->n_results * (size_t)labels, sizeof *all);
    for (size_t i = 0; i < j->n_results; i++)
        memcpy(all + i * (size_t)labels, j->results[i].main.logits, (size_t)labels * sizeof *all);
    write_logits(j->in.logits, (int64_t)j->n_results, labels, all);
    free(all);
}

#endif
