/* classify.c - what happens in a video: VideoMAE and V-JEPA 2 classifiers with pyramid sparse attention.
 *
 *     cc -std=c99 -O3 -I. -Itools examples/classify.c -lopenblas -lcjson -lm -lpthread -o build/classify
 *     build/classify MODEL VIDEO... [options]        --help lists them
 *
 * MODEL is a Hugging Face folder (config.json, preprocessor settings, safetensors). Linear layers run in OpenBLAS,
 * attention in psa.h, video is read through ffmpeg. In the order in which data flows: video.h, preprocess.h (frames to
 * pixels), safetensors.h, model.h, encoder.h (pixels to logits), job.h (inputs to results), pictures.h, report.h (what
 * came out and what it cost), evaluate.h (a list of labelled videos), and here the options. */
#define _DEFAULT_SOURCE
#define _FILE_OFFSET_BITS 64
#define PSA_IMPLEMENTATION
#include "psa.h"

#include "preprocess.h"

#include "encoder.h"

#include "options.h"

#include "pictures.h"

#include "job.h"

#include "report.h"

#include "evaluate.h"

#include <dirent.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <strings.h>
#include <sys/stat.h>

/* ---- options ---------------------------------------------------------------------------------------------------- */

#define OWN(field) offsetof(arguments, field)

/* What the psa command does not have. */
static const option own_options[] = {
    {"--pixels", "FILE", "prepared input, no video: .npy, float32 [clips, frames, 3, height, width]", CMD_CLASSIFY,
     FILE_NAME, OWN(pixels), PLAIN},
    {"--frames", "FILE", "RGB frames, no video: .npy, uint8 [frames, height, width, 3]", CMD_CLASSIFY, FILE_NAME,
     OWN(frames), PLAIN},
    {"--eval", "FILE", "accuracy on a list, no video: CSV lines of path,label (text or number)", CMD_CLASSIFY,
     FILE_NAME, OWN(eval), PLAIN},
    {"--root", "DIR", "eval: where its paths begin; default: the list's folder", CMD_CLASSIFY, FILE_NAME, OWN(root),
     PLAIN},
    {"--limit", "N", "eval: only the first N lines", CMD_CLASSIFY, INTEGER, OWN(limit), NUMBER(1, INT_MAX)},
    {"--num-frames", "N", "V-JEPA 2: frames of a clip; default: the config's frames_per_clip", CMD_CLASSIFY, INTEGER,
     OWN(how.frames), NUMBER(1, 65536)},
    {"--frame-stride", "N", "frames from one of a clip to the next; default: spread over the video", CMD_CLASSIFY,
     INTEGER, OWN(how.stride), NUMBER(1, 65536)},
    {"--clips", "N", "clips of a video, their probabilities averaged; default 1", CMD_CLASSIFY, INTEGER,
     OWN(how.clips), NUMBER(1, 1000)},
    {"--crops", "N", "squares of a frame along its longer side, averaged likewise; default 1", CMD_CLASSIFY, INTEGER,
     OWN(how.crops), NUMBER(1, 100)},
    {"--logits", "FILE", "write the logits, means over clips and crops: .npy, float32 [inputs, labels]", CMD_CLASSIFY,
     FILE_NAME, OWN(logits), PLAIN},
    {"--save-pixels", "FILE", "write the model's input for one video: .npy", CMD_CLASSIFY, FILE_NAME, OWN(save_pixels),
     PLAIN},
    {"--png", "DIR", "pictures of what attention read in one video", CMD_CLASSIFY, FILE_NAME, OWN(png), PLAIN},
    {"--query", "L,H,T,Y,X", "png: layer, head and token whose query block is followed; default: the middle ones",
     CMD_CLASSIFY, INTEGERS, OWN(query), LIST(OWN(n_query), 0, INT_MAX, 5, 5)},
    {"--dense", NULL, "dense attention", CMD_CLASSIFY, FLAG, OWN(dense), PLAIN},
    {"--type", "NAME", "f32, f16 or bf16: how q, k and v are kept; default f32", CMD_CLASSIFY, NAME, OWN(psa.type),
     NAMES(type_name)},
    {"--order", "NAME", "none, gilbert, tree, or tree_kv (gilbert for q); default none", CMD_CLASSIFY, NAME,
     OWN(psa.order), NAMES(order_name)},
};

static const syntax classify_syntax = {"classify", CMD_CLASSIFY, own_options, sizeof own_options / sizeof *own_options};

/* What presets say about text and causality does not fit here. */
static void check_preset(options *o) {
    if (o->desc.causal)
        die("--preset %s: is for causal attention, which these models do not have", psa_preset_name(o->preset));
    o->desc.n_prefix = o->desc.n_suffix = 0;
    if (o->order != PSA_ORDER_NONE && o->order < ORDER_TREE) o->order = PSA_ORDER_GILBERT;
}

/* Trees are the library's, the rest is a grid order. */
static void check_order(options *o) {
    if (o->order >= PSA_ORDER_TILE && o->order <= PSA_ORDER_HYBRID)
        die("--order '%s': expected one of none, gilbert, tree, tree_kv", order_name(o->order));
    if (o->order < ORDER_TREE) return;
    o->desc.tree = o->order == ORDER_TREE ? PSA_TREE_QKV : PSA_TREE_KV;
    o->order = o->order == ORDER_TREE ? PSA_ORDER_NONE : PSA_ORDER_GILBERT;
}

static void check_arguments(const arguments *a) {
    int sources = !!a->pixels + !!a->frames + !!a->eval + (a->n_videos > 0);
    if (!a->model || sources != 1)
        die("expected MODEL and either videos, --pixels, --frames or --eval (--help says more)");
    if (a->dense && a->psa.compare) die("--dense and --compare exclude each other");
    if (a->dense && a->png) die("--dense and --png exclude each other: dense attention reads everything");
    if (a->psa.desc.tree && a->png) die("--png: shows one order of all heads, and with trees every head has its own");
    int many = a->pixels || a->eval || a->n_videos > 1 || a->how.clips * a->how.crops > 1;
    if ((a->save_pixels || a->png) && many)
        die("%s takes exactly one video with one clip and one crop", a->png ? "--png" : "--save-pixels");
    if (a->pixels && (a->how.frames || a->how.stride || a->how.clips > 1 || a->how.crops > 1))
        die("--num-frames, --frame-stride, --clips and --crops have no use with --pixels");
    if (!a->eval && (a->root || a->limit)) die("--root and --limit have no use without --eval");
    if (!a->png && a->n_query) die("--query has no use without --png");
}

static int read_arguments(arguments *a, int argc, char **argv) {
    options *o = &a->psa;
    o->words = alloc((size_t)argc, sizeof *o->words);
    a->how.clips = a->how.crops = 1;
    int rc = parse_options(o, &classify_syntax, argc - 1, argv + 1);
    if (rc != 0 || o->help) return rc;
    if (o->preset >= 0) check_preset(o);
    check_order(o);
    if (o->type < 0) o->type = PSA_F32;
    a->model = o->words[0];
    a->videos = o->words + 1;
    a->n_videos = o->n_words - 1;
    check_arguments(a);
    return 0;
}

static void print_help(void) {
    printf("classify MODEL VIDEO... [options]\n"
           "Labels of videos by a VideoMAE or V-JEPA 2 checkpoint (a Hugging Face folder) with PSA.\n"
           "A folder in place of a video stands for the videos in it.\n\n");
    print_options(&classify_syntax);
}

/* ---- inputs ----------------------------------------------------------------------------------------------------- */

static void run_pixels(job *j) {
    char err[512];
    npy a;
    if (npy_read(j->in.pixels, &a, err, sizeof err) != 0) die("%s", err);
    if (strcmp(a.descr, "<f4") != 0 || a.ndim != 5 || a.shape[2] != 3 || a.count == 0)
        die("%s: expected float32 [clips, frames, 3, height, width]", j->in.pixels);
    for (int i = 1; i < 5; i++)
        if (a.shape[i] > 65536) die("%s: an extent of %lld is too long", j->in.pixels, (long long)a.shape[i]);
    for (int64_t i = 0; i < a.shape[0]; i++) {
        clip c = {(int)a.shape[1], (int)a.shape[3], (int)a.shape[4], NULL};
        c.pixels = (float *)a.data + (size_t)i * (a.count / (size_t)a.shape[0]);
        run_clip(j, &c, result_add(j, j->in.pixels));
    }
    npy_free(&a);
}

static void run_named(job *j, const char *path) {
    char error[512];
    result *r = result_add(j, path);
    if (run_video(j, path, r, error, sizeof error) != 0) die("%s", error);
}

static int is_video(const char *path) {
    static const char *const kinds[] = {"mp4", "m4v", "mov", "mkv", "webm", "avi",  "mpg",
                                        "mpeg", "ts", "wmv", "flv", "3gp",  "gif", "y4m"};
    const char *dot = strrchr(path, '.');
    struct stat s;
    for (size_t i = 0; dot && i < sizeof kinds / sizeof kinds[0]; i++)
        if (strcasecmp(dot + 1, kinds[i]) == 0) return stat(path, &s) == 0 && S_ISREG(s.st_mode);
    return 0;
}

/* The videos of a folder by name. */
static void run_folder(job *j, const char *path) {
    DIR *folder = opendir(path);
    struct dirent *entry;
    char **names = NULL;
    size_t n = 0;
    if (!folder) die("%s: %s", path, strerror(errno));
    while ((entry = readdir(folder))) {
        char *name = join_path(path, entry->d_name);
        if (!is_video(name)) {
            free(name);
            continue;
        }
        names = grow(names, n, sizeof *names);
        names[n++] = name;
    }
    closedir(folder);
    if (n == 0) die("%s: the folder holds no videos", path);
    qsort(names, n, sizeof *names, by_text);
    for (size_t i = 0; i < n; i++) {
        run_named(j, names[i]);
        free(names[i]);
    }
    free(names);
}

static void run_inputs(job *j) {
    struct stat s;
    if (j->in.pixels) run_pixels(j);
    if (j->in.frames) run_named(j, j->in.frames);
    for (int i = 0; i < j->in.n_videos; i++) {
        const char *path = j->in.videos[i];
        if (stat(path, &s) == 0 && S_ISDIR(s.st_mode))
            run_folder(j, path);
        else
            run_named(j, path);
    }
}

/* ---- main ------------------------------------------------------------------------------------------------------- */

/* A CPU newer than OpenBLAS gets kernels without AVX, several times slower. Kernels are chosen when the library is
 * loaded, from the environment if that says something: say it and start over. */
static void choose_blas_kernels(char **argv) {
    int avx512 = psa_isa_supported(PSA_ISA_AVX512), avx2 = psa_isa_supported(PSA_ISA_AVX2);
    const char *kernels = avx512 ? "SkylakeX" : avx2 ? "Haswell" : NULL;
    if (!kernels || strcmp(openblas_get_corename(), "Prescott") != 0 || getenv("OPENBLAS_CORETYPE")) return;
    if (setenv("OPENBLAS_CORETYPE", kernels, 1) == 0) execv("/proc/self/exe", argv);
}

/* What is freed goes back to the system. By itself glibc keeps pieces up to the size of the largest one ever freed. */
static void return_memory(void) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 18);
#endif
}

int main(int argc, char **argv) {
    static job j;
    int rc = read_arguments(&j.in, argc, argv);
    if (rc == 0 && j.in.psa.help) print_help();
    if (rc != 0 || j.in.psa.help) return rc;
    choose_blas_kernels(argv);
    return_memory();
    j.program = peak_memory();
    job_open(&j);
    if (j.in.eval) {
        rc = evaluate(&j);
    } else {
        run_inputs(&j);
        encoder_free(&j.encoder); /* pictures need room too */
        write_files(&j);
        if (j.in.psa.json)
            print_json(&j);
        else
            print_text(&j);
    }
    job_free(&j);
    return fflush(stdout) == 0 ? rc : 2;
}
