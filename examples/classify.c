/* classify.c - what happens in a video: VideoMAE and V-JEPA 2 classifiers with pyramid sparse attention.
 *
 *     cc -std=c99 -O2 -I. -Itools examples/classify.c -lopenblas -lcjson -lm -lpthread -o build/classify
 *     build/classify MODEL VIDEO... [options]        --help lists them
 *
 * MODEL is a Hugging Face folder (config.json, preprocessor settings, safetensors). Linear layers run in OpenBLAS,
 * attention in psa.h, video is read through ffmpeg. In the order in which data flows: video.h, preprocess.h (frames to
 * pixels), safetensors.h, model.h (pixels to logits), and here the options and the report. */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#define PSA_IMPLEMENTATION
#include "psa.h"

#include "preprocess.h"

#include "model.h"

#include "options.h"

#define TOP 5

/* ---- options ---------------------------------------------------------------------------------------------------- */

typedef struct arguments {
    options psa; /* first: the rows of options.h point into it */
    const char *model, *pixels, *frames, *logits, *save_pixels, **videos;
    int n_videos, dense, num_frames;
} arguments;

static const char *grid_order_name(int i) {
    return i <= PSA_ORDER_GILBERT ? order_name(i) : NULL;
}

#define OWN(field) offsetof(arguments, field)

/* What the psa command does not have. */
static const option own_options[] = {
    {"--pixels", "FILE", "prepared input, no video: .npy, float32 [clips, frames, 3, height, width]", CMD_CLASSIFY,
     FILE_NAME, OWN(pixels), PLAIN},
    {"--frames", "FILE", "RGB frames, no video: .npy, uint8 [frames, height, width, 3]", CMD_CLASSIFY, FILE_NAME,
     OWN(frames), PLAIN},
    {"--num-frames", "N", "V-JEPA 2: frames to take from a video; default: the config's frames_per_clip", CMD_CLASSIFY,
     INTEGER, OWN(num_frames), NUMBER(1, 65536)},
    {"--logits", "FILE", "write the logits: .npy, float32 [clips, labels]", CMD_CLASSIFY, FILE_NAME, OWN(logits),
     PLAIN},
    {"--save-pixels", "FILE", "write the model's input for one video: .npy", CMD_CLASSIFY, FILE_NAME, OWN(save_pixels),
     PLAIN},
    {"--dense", NULL, "dense attention", CMD_CLASSIFY, FLAG, OWN(dense), PLAIN},
    {"--order", "NAME", "none or gilbert; default none", CMD_CLASSIFY, NAME, OWN(psa.order), NAMES(grid_order_name)},
};

static const syntax classify_syntax = {"classify", CMD_CLASSIFY, own_options, sizeof own_options / sizeof *own_options};

/* What presets say about text and causality does not fit here. */
static void check_preset(options *o) {
    if (o->desc.causal)
        die("--preset %s: is for causal attention, which these models do not have", psa_preset_name(o->preset));
    o->desc.n_prefix = o->desc.n_suffix = 0;
    if (o->order != PSA_ORDER_NONE) o->order = PSA_ORDER_GILBERT;
}

static int read_arguments(arguments *a, int argc, char **argv) {
    options *o = &a->psa;
    o->words = alloc((size_t)argc, sizeof *o->words);
    int rc = parse_options(o, &classify_syntax, argc - 1, argv + 1);
    if (rc != 0 || o->help) return rc;
    if (o->preset >= 0) check_preset(o);
    a->model = o->words[0];
    a->videos = o->words + 1;
    a->n_videos = o->n_words - 1;
    if (!a->model || !!a->pixels + !!a->frames + (a->n_videos > 0) != 1)
        die("expected MODEL and either videos, --pixels or --frames (--help says more)");
    if (a->dense && o->compare) die("--dense and --compare exclude each other");
    if (a->save_pixels && (a->pixels || a->n_videos > 1)) die("--save-pixels takes exactly one video, or --frames");
    if (a->num_frames && a->pixels) die("--num-frames has no use with --pixels");
    if (!o->threads) {
        long processors = sysconf(_SC_NPROCESSORS_ONLN);
        o->threads = processors < 1 ? 1 : processors > MAX_THREADS ? MAX_THREADS : (int)processors;
    }
    return 0;
}

static void print_help(void) {
    printf("classify MODEL VIDEO... [options]\n"
           "Labels of videos by a VideoMAE or V-JEPA 2 checkpoint (a Hugging Face folder) with PSA.\n\n");
    print_options(&classify_syntax);
}

/* ---- running ---------------------------------------------------------------------------------------------------- */

typedef struct outcome {
    float *logits;          /* [n_labels] */
    double *p;              /* their softmax */
    int top[TOP];           /* labels, most probable first */
    double density, attention_seconds, seconds;
} outcome;

typedef struct result {
    char *name;             /* of the clip */
    int64_t video_frames;   /* 0: the input was prepared */
    int frames, grid[3];
    double read_seconds;
    outcome main, dense;    /* dense: with --compare */
} result;

typedef struct job {
    arguments in;
    model m;
    settings settings;
    encoder encoder;
    clip clip;              /* of the last video */
    result *results;
    int n_results;
} job;

static void softmax(const float *logits, int n, double *p) {
    double most = (double)logits[0], sum = 0;
    for (int i = 0; i < n; i++) most = fmax(most, (double)logits[i]);
    for (int i = 0; i < n; i++) sum += p[i] = exp((double)logits[i] - most);
    for (int i = 0; i < n; i++) p[i] /= sum;
}

/* The most probable labels; -1 where there are fewer. Of equals the first counts. */
static void find_top(const double *p, int n, int top[TOP]) {
    for (int t = 0; t < TOP; t++) {
        top[t] = -1;
        for (int i = 0; i < n; i++) {
            int taken = 0;
            for (int j = 0; j < t; j++) taken |= top[j] == i;
            if (!taken && (top[t] < 0 || p[i] > p[top[t]])) top[t] = i;
        }
    }
}

static void run_model(job *j, const char *name, const psa_desc *desc, psa_order_kind order, const float *pixels,
                      outcome *r) {
    int n = j->m.n_labels;
    r->logits = alloc((size_t)n, sizeof *r->logits);
    r->p = alloc((size_t)n, sizeof *r->p);
    double start = seconds();
    encoder_run(&j->encoder, desc, order, pixels, r->logits);
    r->seconds = seconds() - start;
    r->attention_seconds = j->encoder.attention_seconds;
    r->density = (double)j->encoder.mul_adds / (double)j->encoder.dense_mul_adds;
    for (int i = 0; i < n; i++)
        if (!isfinite(r->logits[i])) die("%s: the logits are not finite; the weights or the input are not", name);
    softmax(r->logits, n, r->p);
    find_top(r->p, n, r->top);
}

static void run_clip(job *j, const clip *c, result *r) {
    psa_desc dense;
    memset(&dense, 0, sizeof dense);
    dense.mask = PSA_MASK_DENSE;
    dense.isa = j->in.psa.desc.isa;
    encoder_plan(&j->encoder, &j->m, c->frames, c->height, c->width, j->in.psa.threads);
    r->frames = c->frames;
    memcpy(r->grid, j->encoder.grid, sizeof r->grid);
    if (j->in.dense)
        run_model(j, r->name, &dense, PSA_ORDER_NONE, c->pixels, &r->main);
    else
        run_model(j, r->name, &j->in.psa.desc, (psa_order_kind)j->in.psa.order, c->pixels, &r->main);
    if (j->in.psa.compare) run_model(j, r->name, &dense, PSA_ORDER_NONE, c->pixels, &r->dense);
}

static void run_pixels(job *j) {
    char err[512];
    npy a;
    if (npy_read(j->in.pixels, &a, err, sizeof err) != 0) die("%s", err);
    if (strcmp(a.descr, "<f4") != 0 || a.ndim != 5 || a.shape[2] != 3 || a.count == 0)
        die("%s: expected float32 [clips, frames, 3, height, width]", j->in.pixels);
    for (int i = 1; i < 5; i++)
        if (a.shape[i] > 65536) die("%s: an extent of %lld is too long", j->in.pixels, (long long)a.shape[i]);
    j->results = alloc((size_t)a.shape[0], sizeof *j->results);
    for (int64_t i = 0; i < a.shape[0]; i++) {
        clip c = {(int)a.shape[1], (int)a.shape[3], (int)a.shape[4], NULL};
        result *r = &j->results[j->n_results++];
        c.pixels = (float *)a.data + (size_t)i * (a.count / (size_t)a.shape[0]);
        r->name = copy_text(j->in.pixels);
        run_clip(j, &c, r);
    }
    npy_free(&a);
}

static void run_video(job *j, const char *path, void (*open)(video *, const char *)) {
    result *r = &j->results[j->n_results++];
    int frames = j->in.num_frames ? j->in.num_frames : j->m.frames;
    video v;
    double start = seconds();
    free(j->clip.pixels);
    open(&v, path);
    clip_read(&j->clip, &v, frames, &j->settings);
    r->name = copy_text(path);
    r->video_frames = v.n_frames;
    video_close(&v);
    r->read_seconds = seconds() - start;
    run_clip(j, &j->clip, r);
}

static void run_videos(job *j) {
    int n = j->in.frames ? 1 : j->in.n_videos;
    settings_read(&j->settings, j->in.model, j->m.is_vjepa2);
    if (!j->m.is_vjepa2 && j->in.num_frames && j->in.num_frames != j->m.frames)
        die("--num-frames %d: this model takes exactly %d", j->in.num_frames, j->m.frames);
    j->results = alloc((size_t)n, sizeof *j->results);
    for (int i = 0; i < n; i++)
        run_video(j, j->in.frames ? j->in.frames : j->in.videos[i], j->in.frames ? video_open_npy : video_open);
}

/* ---- report ----------------------------------------------------------------------------------------------------- */

static void write_array(const char *path, int ndim, const int64_t *shape, const float *data) {
    char err[512];
    if (npy_write(path, "<f4", ndim, shape, data, err, sizeof err) != 0) die("%s", err);
}

static void write_files(const job *j) {
    const clip *c = &j->clip;
    int64_t pixels[5] = {1, c->frames, 3, c->height, c->width}, logits[2] = {j->n_results, j->m.n_labels};
    if (j->in.save_pixels) write_array(j->in.save_pixels, 5, pixels, c->pixels);
    if (!j->in.logits) return;
    float *all = alloc((size_t)(logits[0] * logits[1]), sizeof *all);
    for (int i = 0; i < j->n_results; i++)
        memcpy(all + i * logits[1], j->results[i].main.logits, (size_t)logits[1] * sizeof *all);
    write_array(j->in.logits, 2, logits, all);
    free(all);
}

/* KL(dense || main): what the sparse answer loses, in nats. */
static double divergence(const result *r, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        if (r->dense.p[i] > 0) sum += r->dense.p[i] * log(r->dense.p[i] / fmax(r->main.p[i], 1e-300));
    return fmax(sum, 0);
}

static void print_outcome(const job *j, const char *name, const outcome *r) {
    printf("  %-6s %8.3f %12.2f ms %9.2f ms   %.4f %s\n", name, r->density, 1e3 * r->attention_seconds,
           1e3 * r->seconds, r->p[r->top[0]], j->m.labels[r->top[0]]);
}

static void print_result(const job *j, const result *r) {
    printf("%s: %d frames", r->name, r->frames);
    if (r->video_frames)
        printf(", number i is floor(i * %lld / %d), read in %.0f ms", (long long)r->video_frames, r->frames,
               1e3 * r->read_seconds);
    printf("; %d x %d x %d tokens\n", r->grid[0], r->grid[1], r->grid[2]);
    for (int i = 0; i < TOP && r->main.top[i] >= 0; i++)
        printf("  %.4f  %s\n", r->main.p[r->main.top[i]], j->m.labels[r->main.top[i]]);
    printf("         density       attention         total   top-1\n");
    print_outcome(j, j->in.dense ? "dense" : "psa", &r->main);
    if (!j->in.psa.compare) return;
    print_outcome(j, "dense", &r->dense);
    printf("  top-1 %s; KL(dense || psa) %.3g nats; attention %.2f times as fast, all %.2f times\n",
           r->main.top[0] == r->dense.top[0] ? "agrees" : "differs", divergence(r, j->m.n_labels),
           r->dense.attention_seconds / r->main.attention_seconds, r->dense.seconds / r->main.seconds);
}

static int count_agreeing(const job *j) {
    int n = 0;
    for (int i = 0; i < j->n_results; i++) n += j->results[i].main.top[0] == j->results[i].dense.top[0];
    return n;
}

static void print_text(const job *j) {
    const model *m = &j->m;
    psa_isa isa = j->in.psa.desc.isa ? j->in.psa.desc.isa : psa_isa_detect();
    printf("%s: %s, %d layers, %d heads of %d, %d labels; %d threads, psa %s, OpenBLAS %s\n", j->in.model,
           m->is_vjepa2 ? "V-JEPA 2" : "VideoMAE", m->n_blocks + m->n_pooler, m->heads, m->C / m->heads, m->n_labels,
           j->in.psa.threads, psa_isa_name(isa), openblas_get_corename());
    for (int i = 0; i < j->n_results; i++) print_result(j, &j->results[i]);
    if (j->in.psa.compare && j->n_results > 1)
        printf("top-1 agrees on %d of %d clips\n", count_agreeing(j), j->n_results);
}

static void json_outcome(cJSON *parent, const char *name, const job *j, const outcome *r) {
    cJSON *object = cJSON_AddObjectToObject(parent, name), *labels = cJSON_CreateArray();
    cJSON_AddNumberToObject(object, "density", r->density);
    cJSON_AddNumberToObject(object, "attention_seconds", r->attention_seconds);
    cJSON_AddNumberToObject(object, "seconds", r->seconds);
    for (int i = 0; i < TOP && r->top[i] >= 0; i++) {
        cJSON *label = cJSON_CreateObject();
        cJSON_AddNumberToObject(label, "index", r->top[i]);
        cJSON_AddStringToObject(label, "label", j->m.labels[r->top[i]]);
        cJSON_AddNumberToObject(label, "probability", r->p[r->top[i]]);
        cJSON_AddItemToArray(labels, label);
    }
    cJSON_AddItemToObject(object, "labels", labels);
}

static void print_json(const job *j) {
    cJSON *root = cJSON_CreateObject(), *clips = cJSON_AddArrayToObject(root, "clips");
    cJSON_AddStringToObject(root, "model", j->in.model);
    cJSON_AddNumberToObject(root, "threads", j->in.psa.threads);
    for (int i = 0; i < j->n_results; i++) {
        const result *r = &j->results[i];
        cJSON *object = cJSON_CreateObject();
        cJSON_AddStringToObject(object, "clip", r->name);
        cJSON_AddNumberToObject(object, "frames", r->frames);
        cJSON_AddItemToObject(object, "grid", cJSON_CreateIntArray(r->grid, 3));
        cJSON_AddNumberToObject(object, "read_seconds", r->read_seconds);
        json_outcome(object, j->in.dense ? "dense" : "psa", j, &r->main);
        if (j->in.psa.compare) {
            json_outcome(object, "dense", j, &r->dense);
            cJSON_AddBoolToObject(object, "top1_agrees", r->main.top[0] == r->dense.top[0]);
            cJSON_AddNumberToObject(object, "kl", divergence(r, j->m.n_labels));
        }
        cJSON_AddItemToArray(clips, object);
    }
    char *text = cJSON_Print(root);
    if (!text) die("no memory for the report");
    puts(text);
    cJSON_free(text);
    cJSON_Delete(root);
}

static void job_free(job *j) {
    for (int i = 0; i < j->n_results; i++) {
        result *r = &j->results[i];
        free(r->name);
        free(r->main.logits);
        free(r->main.p);
        free(r->dense.logits);
        free(r->dense.p);
    }
    free(j->results);
    free(j->clip.pixels);
    free(j->in.psa.words);
    encoder_free(&j->encoder);
    model_free(&j->m);
}

/* A CPU newer than OpenBLAS gets kernels without AVX, several times slower. Kernels are chosen when the library is
 * loaded, from the environment if that says something: say it and start over. */
static void choose_blas_kernels(char **argv) {
    psa_isa isa = psa_isa_detect();
    const char *kernels = isa == PSA_ISA_AVX512 ? "SkylakeX" : isa == PSA_ISA_AVX2 ? "Haswell" : NULL;
    if (!kernels || strcmp(openblas_get_corename(), "Prescott") != 0 || getenv("OPENBLAS_CORETYPE")) return;
    if (setenv("OPENBLAS_CORETYPE", kernels, 1) == 0) execv("/proc/self/exe", argv);
}

int main(int argc, char **argv) {
    static job j;
    int rc = read_arguments(&j.in, argc, argv);
    if (rc == 0 && j.in.psa.help) print_help();
    if (rc != 0 || j.in.psa.help) return rc;
    choose_blas_kernels(argv);
    model_load(&j.m, j.in.model);
    if (j.in.pixels)
        run_pixels(&j);
    else
        run_videos(&j);
    write_files(&j);
    if (j.in.psa.json)
        print_json(&j);
    else
        print_text(&j);
    job_free(&j);
    return fflush(stdout) == 0 ? 0 : 2;
}
