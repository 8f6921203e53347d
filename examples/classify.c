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

#define TOP 5
#define MAX_VIDEOS 4096

/* ---- options ---------------------------------------------------------------------------------------------------- */

typedef struct options {
    const char *model, *pixels, *frames, *logits, *save_pixels, *preset;
    const char *videos[MAX_VIDEOS];
    int n_videos, dense, compare, json, num_frames, threads, help;
    int order;              /* psa_order_kind: NONE or GILBERT */
    double sample;          /* share of queries and keys; 0: not given */
    psa_desc desc;
} options;

typedef enum option_kind { FLAG, TEXT, NAME, ISA, INTEGER, SEED, REAL, INTEGERS, REALS } option_kind;

typedef struct option {
    const char *name, *value, *help; /* value: what --help calls it; a NAME's alternatives */
    option_kind kind;
    size_t at;                       /* offset into options */
    double lo, hi;
    int most;                        /* entries of a list */
} option;

#define AT(field) offsetof(options, field)

static const option option_table[] = {
    {"--dense", "", "dense attention", FLAG, AT(dense), 0, 0, 0},
    {"--compare", "", "run dense attention too and print both side by side", FLAG, AT(compare), 0, 0, 0},
    {"--pixels", "FILE", "prepared input, no video: .npy, float32 [clips, frames, 3, height, width]", TEXT, AT(pixels),
     0, 0, 0},
    {"--frames", "FILE", "RGB frames, no video: .npy, uint8 [frames, height, width, 3]", TEXT, AT(frames), 0, 0, 0},
    {"--num-frames", "N", "V-JEPA 2: frames to take from a video; default: the config's frames_per_clip", INTEGER,
     AT(num_frames), 1, 65536, 0},
    {"--logits", "FILE", "write the logits: .npy, float32 [clips, labels]", TEXT, AT(logits), 0, 0, 0},
    {"--save-pixels", "FILE", "write the model's input for one video: .npy", TEXT, AT(save_pixels), 0, 0, 0},
    {"--json", "", "print the results as JSON", FLAG, AT(json), 0, 0, 0},
    {"--threads", "N", "default: all processors", INTEGER, AT(threads), 1, MAX_THREADS, 0},
    {"--preset", "NAME", "settings of a published model (psa info); other options override them", TEXT, AT(preset),
     0, 0, 0},
    {"--block-q", "N", "query rows in a block", INTEGER, AT(desc.block_q), 1, PSA_MAX_BLOCK_Q, 0},
    {"--block-k", "N", "keys in a block", INTEGER, AT(desc.block_k), 1, PSA_MAX_BLOCK_K, 0},
    {"--score", "sample|antidiagonal|pooled|exact", "how the importance of blocks is estimated", NAME, AT(desc.score),
     0, 0, 0},
    {"--score-norm", "", "sample: divide by the row's softmax denominator", FLAG, AT(desc.score_norm), 0, 0, 0},
    {"--sample", "F", "sample: share of the tokens of each block", REAL, AT(sample), 1e-9, 1, 0},
    {"--seed", "N", "sample: of the sampled offsets", SEED, AT(desc.seed), 0, 0, 0},
    {"--stride", "N", "antidiagonal: tokens in a group", INTEGER, AT(desc.stride), 1, PSA_MAX_BLOCK_Q, 0},
    {"--mask", "topk|threshold|dense", "how scores become levels", NAME, AT(desc.mask), 0, 0, 0},
    {"--level-end", "F,F,...", "cumulative ends of levels 1, 2, 4, ...", REALS, AT(desc.level_end), 0, 1,
     PSA_MAX_LEVELS},
    {"--level-count", "N,N,...", "topk: numbers of blocks at levels 1, 2, 4, ...", INTEGERS, AT(desc.level_count), 0,
     1 << 30, PSA_MAX_LEVELS},
    {"--inclusive", "", "threshold: count the block's own mass too", FLAG, AT(desc.inclusive), 0, 0, 0},
    {"--min-full", "F", "threshold: share of blocks that are level 1 at least", REAL, AT(desc.min_full), 0, 1, 0},
    {"--sim-min", "F,F,...", "mean cosine that levels 2, 4, ... must exceed", REALS, AT(desc.sim_min), -1e9, 1e9,
     PSA_MAX_LEVELS - 1},
    {"--sink", "", "the first KV block is level 1 for everyone", FLAG, AT(desc.sink), 0, 0, 0},
    {"--diagonal", "", "a query block's own KV blocks are level 1", FLAG, AT(desc.diagonal), 0, 0, 0},
    {"--skip-mean", "", "a skipped block is read as one mean token", FLAG, AT(desc.skip_mean), 0, 0, 0},
    {"--order", "none|gilbert", "order of the tokens in blocks", NAME, AT(order), 0, 0, 0},
    {"--isa", "NAME", "instruction set of the attention (psa info lists them)", ISA, AT(desc.isa), 0, 0, 0},
    {"--help", "", "this text", FLAG, AT(help), 0, 0, 0},
};
enum { OPTION_COUNT = sizeof option_table / sizeof *option_table };

/* Number of `text` among the alternatives a|b|c, -1 if it is none of them. */
static int parse_name(const char *alternatives, const char *text) {
    size_t n = strlen(text);
    for (int i = 0;; i++) {
        size_t size = strcspn(alternatives, "|");
        if (n == size && memcmp(alternatives, text, n) == 0) return i;
        if (!alternatives[size]) return -1;
        alternatives += size + 1;
    }
}

/* The instruction set of this name, PSA_ISA_END if there is none. */
static psa_isa parse_isa(const char *text) {
    int i = 0;
    while (i < PSA_ISA_END && strcmp(psa_isa_name((psa_isa)i), text) != 0) i++;
    return (psa_isa)i;
}

/* A number at the start of text, a whole one unless the option takes a real. Returns what follows it, NULL: invalid. */
static const char *parse_number(const option *p, const char *text, double *value) {
    char *end;
    *value = strtod(text, &end);
    if (end == text || strspn(text, "0123456789.e-") < (size_t)(end - text)) return NULL; /* 0x10, nan, spaces */
    if (!(*value >= p->lo && *value <= p->hi)) return NULL;
    return p->kind == REAL || p->kind == REALS || *value == floor(*value) ? end : NULL;
}

/* Replaces a whole list; entries that are not given become 0. Returns the number of entries, 0 if it is invalid. Levels
 * that are all 0 are: the library would take them for the default. */
static int parse_list(const option *p, const char *text, void *at) {
    double values[PSA_MAX_LEVELS] = {0};
    int n = 0, more = 1, useful = p->lo < 0;
    while (more) {
        const char *end = n < p->most ? parse_number(p, text, &values[n]) : NULL;
        if (!end || (*end && *end != ',')) return 0;
        useful |= values[n++] != 0;
        more = *end == ',';
        text = end + 1;
    }
    for (int i = 0; i < p->most; i++) {
        if (p->kind == REALS)
            ((double *)at)[i] = values[i];
        else
            ((int *)at)[i] = (int)values[i];
    }
    return useful ? n : 0;
}

/* Stores an option's value; 0 if the text is not one. */
static int parse_value(const option *p, const char *text, options *o) {
    void *at = (char *)o + p->at;
    double number;
    int name;
    char *end;
    const char *rest;
    switch (p->kind) {
    case FLAG:
        return *(int *)at = 1;
    case TEXT:
        *(const char **)at = text;
        return *text != 0;
    case NAME:
        name = parse_name(p->value, text);
        memcpy(at, &name, sizeof name);
        return name >= 0;
    case ISA:
        return (*(psa_isa *)at = parse_isa(text)) != PSA_ISA_END;
    case SEED:
        errno = 0;
        *(uint64_t *)at = strtoull(text, &end, 10);
        return isdigit((unsigned char)*text) && !*end && !errno;
    case INTEGER:
    case REAL:
        rest = parse_number(p, text, &number);
        if (!rest || *rest) return 0;
        if (p->kind == REAL)
            *(double *)at = number;
        else
            *(int *)at = (int)number;
        return 1;
    default:
        name = parse_list(p, text, at);
        if (p->at == AT(desc.sim_min)) o->desc.n_sim_min = name;
        return name > 0;
    }
}

static void parse_arguments(options *o, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const option *p = option_table, *end = option_table + OPTION_COUNT;
        if (strncmp(argv[i], "--", 2) != 0) {
            if (o->n_videos == MAX_VIDEOS) die("expected at most %d videos", MAX_VIDEOS);
            if (o->model)
                o->videos[o->n_videos++] = argv[i];
            else
                o->model = argv[i];
            continue;
        }
        while (p < end && strcmp(p->name, argv[i]) != 0) p++;
        if (p == end) die("unknown option %s (--help lists them)", argv[i]);
        if (p->kind != FLAG && ++i == argc) die("%s needs a value: %s (%s)", p->name, p->value, p->help);
        if (!parse_value(p, argv[i], o)) die("%s %s: expected %s (%s)", p->name, argv[i], p->value, p->help);
    }
}

/* A preset comes first, wherever it stands, so that the other options override it. */
static void apply_preset(options *o, int argc, char **argv) {
    const psa_preset *preset = psa_preset_find(o->preset);
    if (!preset) die("--preset %s: there is no such preset (psa info lists them)", o->preset);
    memset(o, 0, sizeof *o);
    psa_desc_preset(preset->name, &o->desc);
    if (o->desc.causal) die("--preset %s: is for causal attention, which these models do not have", preset->name);
    o->desc.n_prefix = o->desc.n_suffix = 0; /* no text here */
    o->order = preset->order == PSA_ORDER_NONE ? PSA_ORDER_NONE : PSA_ORDER_GILBERT;
    parse_arguments(o, argc, argv);
}

static void parse_options(options *o, int argc, char **argv) {
    memset(o, 0, sizeof *o);
    parse_arguments(o, argc, argv);
    if (o->help) return;
    if (o->preset) apply_preset(o, argc, argv);
    if (!o->model || !!o->pixels + !!o->frames + (o->n_videos > 0) != 1)
        die("expected MODEL and either videos, --pixels or --frames (--help says more)");
    if (o->dense && o->compare) die("--dense and --compare exclude each other");
    if (o->save_pixels && (o->pixels || o->n_videos > 1)) die("--save-pixels takes exactly one video, or --frames");
    if (o->num_frames && o->pixels) die("--num-frames has no use with --pixels");
    if (o->sample > 0) o->desc.sample_q = o->desc.sample_k = o->sample;
    if (!o->threads) {
        long processors = sysconf(_SC_NPROCESSORS_ONLN);
        o->threads = processors < 1 ? 1 : processors > MAX_THREADS ? MAX_THREADS : (int)processors;
    }
}

static void print_help(void) {
    printf("classify MODEL VIDEO... [options]\n"
           "Labels of videos by a VideoMAE or V-JEPA 2 checkpoint (a Hugging Face folder) with PSA.\n");
    for (int i = 0; i < OPTION_COUNT; i++) {
        char left[64];
        snprintf(left, sizeof left, "%s %s", option_table[i].name, option_table[i].value);
        printf("  %-42s %s\n", left, option_table[i].help);
    }
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
    options o;
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
    dense.isa = j->o.desc.isa;
    encoder_plan(&j->encoder, &j->m, c->frames, c->height, c->width, j->o.threads);
    r->frames = c->frames;
    memcpy(r->grid, j->encoder.grid, sizeof r->grid);
    if (j->o.dense)
        run_model(j, r->name, &dense, PSA_ORDER_NONE, c->pixels, &r->main);
    else
        run_model(j, r->name, &j->o.desc, (psa_order_kind)j->o.order, c->pixels, &r->main);
    if (j->o.compare) run_model(j, r->name, &dense, PSA_ORDER_NONE, c->pixels, &r->dense);
}

static void run_pixels(job *j) {
    char err[512];
    npy a;
    if (npy_read(j->o.pixels, &a, err, sizeof err) != 0) die("%s", err);
    if (strcmp(a.descr, "<f4") != 0 || a.ndim != 5 || a.shape[2] != 3 || a.count == 0)
        die("%s: expected float32 [clips, frames, 3, height, width]", j->o.pixels);
    for (int i = 1; i < 5; i++)
        if (a.shape[i] > 65536) die("%s: an extent of %lld is too long", j->o.pixels, (long long)a.shape[i]);
    j->results = alloc((size_t)a.shape[0], sizeof *j->results);
    for (int64_t i = 0; i < a.shape[0]; i++) {
        clip c = {(int)a.shape[1], (int)a.shape[3], (int)a.shape[4], NULL};
        result *r = &j->results[j->n_results++];
        c.pixels = (float *)a.data + (size_t)i * (a.count / (size_t)a.shape[0]);
        r->name = copy_text(j->o.pixels);
        run_clip(j, &c, r);
    }
    npy_free(&a);
}

static void run_video(job *j, const char *path, void (*open)(video *, const char *)) {
    result *r = &j->results[j->n_results++];
    int frames = j->o.num_frames ? j->o.num_frames : j->m.frames;
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
    int n = j->o.frames ? 1 : j->o.n_videos;
    settings_read(&j->settings, j->o.model, j->m.is_vjepa2);
    if (!j->m.is_vjepa2 && j->o.num_frames && j->o.num_frames != j->m.frames)
        die("--num-frames %d: this model takes exactly %d", j->o.num_frames, j->m.frames);
    j->results = alloc((size_t)n, sizeof *j->results);
    for (int i = 0; i < n; i++)
        run_video(j, j->o.frames ? j->o.frames : j->o.videos[i], j->o.frames ? video_open_npy : video_open);
}

/* ---- report ----------------------------------------------------------------------------------------------------- */

static void write_array(const char *path, int ndim, const int64_t *shape, const float *data) {
    char err[512];
    if (npy_write(path, "<f4", ndim, shape, data, err, sizeof err) != 0) die("%s", err);
}

static void write_files(const job *j) {
    const clip *c = &j->clip;
    int64_t pixels[5] = {1, c->frames, 3, c->height, c->width}, logits[2] = {j->n_results, j->m.n_labels};
    if (j->o.save_pixels) write_array(j->o.save_pixels, 5, pixels, c->pixels);
    if (!j->o.logits) return;
    float *all = alloc((size_t)(logits[0] * logits[1]), sizeof *all);
    for (int i = 0; i < j->n_results; i++)
        memcpy(all + i * logits[1], j->results[i].main.logits, (size_t)logits[1] * sizeof *all);
    write_array(j->o.logits, 2, logits, all);
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
    print_outcome(j, j->o.dense ? "dense" : "psa", &r->main);
    if (!j->o.compare) return;
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
    psa_isa isa = j->o.desc.isa ? j->o.desc.isa : psa_isa_detect();
    printf("%s: %s, %d layers, %d heads of %d, %d labels; %d threads, psa %s, OpenBLAS %s\n", j->o.model,
           m->is_vjepa2 ? "V-JEPA 2" : "VideoMAE", m->n_blocks + m->n_pooler, m->heads, m->C / m->heads, m->n_labels,
           j->o.threads, psa_isa_name(isa), openblas_get_corename());
    for (int i = 0; i < j->n_results; i++) print_result(j, &j->results[i]);
    if (j->o.compare && j->n_results > 1) printf("top-1 agrees on %d of %d clips\n", count_agreeing(j), j->n_results);
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
    cJSON_AddStringToObject(root, "model", j->o.model);
    cJSON_AddNumberToObject(root, "threads", j->o.threads);
    for (int i = 0; i < j->n_results; i++) {
        const result *r = &j->results[i];
        cJSON *object = cJSON_CreateObject();
        cJSON_AddStringToObject(object, "clip", r->name);
        cJSON_AddNumberToObject(object, "frames", r->frames);
        cJSON_AddItemToObject(object, "grid", cJSON_CreateIntArray(r->grid, 3));
        cJSON_AddNumberToObject(object, "read_seconds", r->read_seconds);
        json_outcome(object, j->o.dense ? "dense" : "psa", j, &r->main);
        if (j->o.compare) {
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
    parse_options(&j.o, argc, argv);
    if (j.o.help) {
        print_help();
        return 0;
    }
    choose_blas_kernels(argv);
    model_load(&j.m, j.o.model);
    if (j.o.pixels)
        run_pixels(&j);
    else
        run_videos(&j);
    write_files(&j);
    if (j.o.json)
        print_json(&j);
    else
        print_text(&j);
    job_free(&j);
    return fflush(stdout) == 0 ? 0 : 2;
}
