/* preprocess.h - from frames to a model's input: choose frames, resize, centre crop, normalise.
 * Settings come from the checkpoint's processor files. The resize is bit-exact with torchvision's on uint8 tensors. */
#ifndef PREPROCESS_H
#define PREPROCESS_H

#include "video.h"

typedef struct settings {
    int resize, crop, rescale, normalize; /* which steps are done */
    int shortest;                         /* resize: the shorter side; 0: to size_h x size_w */
    int size_h, size_w, crop_h, crop_w;
    int resample;                         /* 0 nearest, 2 bilinear, 3 bicubic */
    double factor;                        /* rescale */
    double mean[3], std[3];
} settings;

/* Frames of a video, resized. */
typedef struct film {
    int n, height, width;
    int64_t *number;                      /* [n]: in the video, ascending */
    uint8_t *rgb;                         /* [n, height, width, 3] */
} film;

typedef struct clip {
    int frames, height, width;
    float *pixels;                        /* [frames, 3, height, width] */
} clip;

/* Which clips are taken from a video, and which squares from a frame. */
typedef struct sampling {
    int frames;                           /* of a clip */
    int stride;                           /* frames from one to the next; 0: they are spread over the video */
    int clips, crops;
} sampling;

static void settings_read(settings *s, const char *dir, int is_vjepa2);

/* All frames that these clips take. 0, or -1 with a line in v->error. */
static int film_read(film *f, video *v, const sampling *how, const settings *s);
static void film_free(film *f);

/* One clip at one place of the frame; c->pixels are memory that was there already or NULL, and the caller's to free. */
static void clip_cut(clip *c, const film *f, int64_t n_frames, const sampling *how, int clip_number, int crop_number,
                     const settings *s);

/* ---- settings --------------------------------------------------------------------------------------------------- */

/* The object with the settings; *json is what to delete afterwards, *path the file. */
static const cJSON *settings_find(const char *dir, cJSON **json, char **path) {
    static const char *const names[] = {"processor_config.json", "video_preprocessor_config.json",
                                        "preprocessor_config.json"};
    for (int i = 0; i < 3; i++) {
        *path = join_path(dir, names[i]);
        if (file_exists(*path)) {
            *json = read_object(*path);
            const cJSON *found = i == 0 ? json_get(*json, "video_processor") : *json;
            if (found && !cJSON_IsObject(found)) die("%s: \"video_processor\": expected an object", *path);
            if (found) return found;
            cJSON_Delete(*json);
        }
        free(*path);
    }
    die("%s: found no video_preprocessor_config.json and no preprocessor_config.json", dir);
}

/* A size that may be a number, standing for a square, or {"height", "width"}. */
static void read_square(const cJSON *object, const char *where, const char *key, int *height, int *width) {
    const cJSON *item = json_get(object, key);
    if (cJSON_IsObject(item)) {
        *height = json_int(item, where, "height", 0, 1, FRAME_MAX_SIDE);
        *width = json_int(item, where, "width", 0, 1, FRAME_MAX_SIDE);
        if (!*height || !*width) die("%s: \"%s\": expected \"height\" and \"width\"", where, key);
    } else if (item) {
        *height = *width = json_int(object, where, key, 0, 1, FRAME_MAX_SIDE);
    }
}

static void read_size(settings *s, const cJSON *object, const char *where) {
    const cJSON *size = json_get(object, "size");
    if (!size) return;
    const cJSON *edge = cJSON_IsObject(size) ? json_get(size, "shortest_edge") : NULL;
    s->shortest = edge                    ? json_int(size, where, "shortest_edge", 0, 1, FRAME_MAX_SIDE)
                  : cJSON_IsObject(size) ? 0
                                         : json_int(object, where, "size", 0, 1, FRAME_MAX_SIDE);
    if (!s->shortest) read_square(object, where, "size", &s->size_h, &s->size_w);
}

static void read_channels(const cJSON *object, const char *where, const char *key, double lowest, double values[3]) {
    const cJSON *list = json_get(object, key), *item;
    int i = 0;
    if (!list) return;
    if (!cJSON_IsArray(list) || cJSON_GetArraySize(list) != 3) die("%s: \"%s\": expected three numbers", where, key);
    cJSON_ArrayForEach(item, list) {
        if (!cJSON_IsNumber(item) || !(item->valuedouble >= lowest) || !(item->valuedouble < 1e6))
            die("%s: \"%s\": expected three numbers from %g on", where, key, lowest);
        values[i++] = item->valuedouble;
    }
}

/* The values that the reference's processor classes have where a file says nothing. */
static void settings_default(settings *s, int is_vjepa2) {
    static const settings videomae = {1, 1, 1, 1, 224, 0, 0, 224, 224, 2, 1 / 255.0, {0.5, 0.5, 0.5}, {0.5, 0.5, 0.5}};
    static const settings vjepa2 = {1, 1, 1, 1, 0, 0, 0, 256, 256, 2, 1 / 255.0,
                                    {0.485, 0.456, 0.406}, {0.229, 0.224, 0.225}};
    *s = is_vjepa2 ? vjepa2 : videomae;
}

static void settings_read(settings *s, const char *dir, int is_vjepa2) {
    cJSON *json;
    char *path;
    const cJSON *object = settings_find(dir, &json, &path);
    settings_default(s, is_vjepa2);
    s->resize = json_bool(object, path, "do_resize", s->resize);
    s->crop = json_bool(object, path, "do_center_crop", s->crop);
    s->rescale = json_bool(object, path, "do_rescale", s->rescale);
    s->normalize = json_bool(object, path, "do_normalize", s->normalize);
    s->factor = json_positive(object, path, "rescale_factor", s->factor);
    s->resample = json_int(object, path, "resample", s->resample, 0, 3);
    if (s->resample == 1) die("%s: \"resample\": expected 0 (nearest), 2 (bilinear) or 3 (bicubic), found 1", path);
    read_square(object, path, "crop_size", &s->crop_h, &s->crop_w);
    read_channels(object, path, "image_mean", -1e6, s->mean);
    read_channels(object, path, "image_std", 1e-6, s->std);
    if (is_vjepa2)
        s->shortest = (int)(s->crop_h * 256.0 / 224); /* that processor recomputes it and ignores "size" */
    else
        read_size(s, object, path);
    cJSON_Delete(json);
    free(path);
}

/* ---- resize ----------------------------------------------------------------------------------------------------- */

/* Weights of one pass from n to m samples, as integers of a fixed number of fractional bits. */
typedef struct taps {
    int n, m, most, bits;
    int *first, *count;    /* [m]: input samples that output i reads */
    int *weight;           /* [m, most] */
} taps;

static double kernel(int resample, double x) {
    x = fabs(x);
    if (resample == 2) return x < 1 ? 1 - x : 0;
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1; /* bicubic, a = -0.5 */
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

/* Weights of output i as real numbers, w[0 .. count), adding up to 1. */
static void tap_weights(taps *t, int i, int resample, double *w) {
    double scale = (double)t->n / t->m, f = fmax(scale, 1), support = (resample == 2 ? 1 : 2) * f;
    double centre = (i + 0.5) * scale, sum = 0;
    if (resample == 0) {
        t->first[i] = (int)fmin(centre, t->n - 1);
        t->count[i] = 1;
        w[0] = 1;
        return;
    }
    int first = (int)fmax(centre - support + 0.5, 0), last = (int)fmin(centre + support + 0.5, t->n);
    for (int j = first; j < last; j++) sum += w[j - first] = kernel(resample, (j - centre + 0.5) / f);
    for (int j = first; j < last; j++) w[j - first] /= sum;
    t->first[i] = first;
    t->count[i] = last - first;
}

static void taps_make(taps *t, int n, int m, int resample) {
    double largest = 0;
    t->n = n;
    t->m = m;
    t->most = (int)(4 * fmax((double)n / m, 1)) + 3;
    t->first = alloc((size_t)m, sizeof *t->first);
    t->count = alloc((size_t)m, sizeof *t->count);
    t->weight = alloc((size_t)m * (size_t)t->most, sizeof *t->weight);
    double *w = alloc((size_t)m * (size_t)t->most, sizeof *w);
    for (int i = 0; i < m; i++) {
        tap_weights(t, i, resample, w + (size_t)i * (size_t)t->most);
        for (int j = 0; j < t->count[i]; j++) largest = fmax(largest, w[(size_t)i * (size_t)t->most + (size_t)j]);
    }
    /* Most fractional bits with which the weights still fit 16 bits: what the reference's SIMD code does. */
    for (t->bits = 22; largest * (1 << t->bits) + 0.5 >= 1 << 15;) t->bits--;
    for (size_t i = 0; i < (size_t)m * (size_t)t->most; i++)
        t->weight[i] = (int)(w[i] * (1 << t->bits) + (w[i] < 0 ? -0.5 : 0.5));
    free(w);
}

static void taps_free(taps *t) {
    free(t->first);
    free(t->count);
    free(t->weight);
}

/* One pass over rows of t->n samples, `step` bytes apart: out gets t->m samples, the same distance apart. */
static void taps_apply(const taps *t, const uint8_t *in, uint8_t *out, size_t step) {
    for (int i = 0; i < t->m; i++) {
        const int *w = t->weight + (size_t)i * (size_t)t->most;
        const uint8_t *sample = in + (size_t)t->first[i] * step;
        int sum = 1 << (t->bits - 1);
        for (int j = 0; j < t->count[i]; j++) sum += w[j] * sample[(size_t)j * step];
        sum = sum < 0 ? 0 : sum >> t->bits;
        out[(size_t)i * step] = (uint8_t)(sum > 255 ? 255 : sum);
    }
}

/* What frames of one size go through. */
typedef struct resizer {
    int from_h, from_w, to_h, to_w;
    taps x, y;
    uint8_t *wide;         /* [from_h, to_w, 3], after the first pass */
    uint8_t *rgb;          /* [to_h, to_w, 3] */
} resizer;

static void target_size(const settings *s, int h, int w, int *to_h, int *to_w) {
    double edge = s->shortest;
    *to_h = s->resize ? s->size_h : h;
    *to_w = s->resize ? s->size_w : w;
    if (!s->resize || !s->shortest) return;
    *to_h = (int)(h <= w ? edge : edge * h / w);
    *to_w = (int)(h <= w ? edge * w / h : edge);
}

static int resizer_make(resizer *r, const settings *s, video *v) {
    int h = r->from_h = v->height, w = r->from_w = v->width;
    target_size(s, h, w, &r->to_h, &r->to_w);
    if (r->to_h > FRAME_MAX_SIDE || r->to_w > FRAME_MAX_SIDE)
        return video_fail(v, "a frame of %d x %d becomes %d x %d; expected at most %d a side", w, h, r->to_w, r->to_h,
                          FRAME_MAX_SIDE);
    taps_make(&r->x, w, r->to_w, s->resample);
    taps_make(&r->y, h, r->to_h, s->resample);
    r->wide = alloc((size_t)h * (size_t)r->to_w, 3);
    r->rgb = alloc((size_t)r->to_h * (size_t)r->to_w, 3);
    return 0;
}

static void resizer_free(resizer *r) {
    taps_free(&r->x);
    taps_free(&r->y);
    free(r->wide);
    free(r->rgb);
}

/* Horizontal pass, then vertical, each rounded to bytes; a pass that changes nothing is left out. */
static const uint8_t *resizer_run(resizer *r, const uint8_t *rgb) {
    size_t from = 3 * (size_t)r->from_w, to = 3 * (size_t)r->to_w;
    if (r->from_w != r->to_w) {
        for (size_t y = 0; y < (size_t)r->from_h; y++)
            for (size_t c = 0; c < 3; c++) taps_apply(&r->x, rgb + y * from + c, r->wide + y * to + c, 3);
        rgb = r->wide;
    }
    if (r->from_h == r->to_h) return rgb;
    for (size_t x = 0; x < to; x++) taps_apply(&r->y, rgb + x, r->rgb + x, to);
    return r->rgb;
}

/* ---- frames ----------------------------------------------------------------------------------------------------- */

/* Frame i of clip j in a video of n frames. Without a stride the clips interleave: the frames of all of them are spread
 * evenly. With one the starts are, and a clip that is longer than the video repeats its last frame. */
static int64_t frame_number(const sampling *how, int64_t n, int i, int j) {
    if (!how->stride) return ((int64_t)i * how->clips + j) * n / ((int64_t)how->frames * how->clips);
    int64_t spare = n - ((int64_t)(how->frames - 1) * how->stride + 1), start = 0, number;
    if (spare > 0) start = how->clips > 1 ? j * spare / (how->clips - 1) : spare / 2;
    number = start + (int64_t)i * how->stride;
    return number < n ? number : n - 1;
}

static int by_number(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The frames of all clips, ascending, each once. */
static void film_plan(film *f, const sampling *how, int64_t n_frames) {
    int n = how->frames * how->clips;
    f->number = alloc((size_t)n, sizeof *f->number);
    for (int i = 0; i < n; i++) f->number[i] = frame_number(how, n_frames, i / how->clips, i % how->clips);
    qsort(f->number, (size_t)n, sizeof *f->number, by_number);
    for (int i = 0; i < n; i++)
        if (i == 0 || f->number[i] != f->number[f->n - 1]) f->number[f->n++] = f->number[i];
}

static size_t film_frame(const film *f) {
    return 3 * (size_t)f->height * (size_t)f->width;
}

static int film_fill(film *f, video *v, resizer *r, const settings *s) {
    for (int i = 0; i < f->n; i++) {
        while (v->next <= f->number[i])
            if (video_read(v) != 0) return -1;
        if (i == 0) {
            if (resizer_make(r, s, v) != 0) return -1;
            f->height = r->to_h;
            f->width = r->to_w;
            f->rgb = alloc((size_t)f->n, film_frame(f));
        }
        if (v->height != r->from_h || v->width != r->from_w)
            return video_fail(v, "the frame size changes from %d x %d to %d x %d", r->from_w, r->from_h, v->width,
                              v->height);
        memcpy(f->rgb + (size_t)i * film_frame(f), resizer_run(r, v->rgb), film_frame(f));
    }
    return 0;
}

static int film_read(film *f, video *v, const sampling *how, const settings *s) {
    resizer r;
    memset(&r, 0, sizeof r);
    memset(f, 0, sizeof *f);
    if (!how->stride && v->n_frames < how->frames)
        return video_fail(v, "expected at least %d frames, found %lld", how->frames, (long long)v->n_frames);
    if (v->n_frames < 1) return video_fail(v, "there are no frames");
    film_plan(f, how, v->n_frames);
    int result = film_fill(f, v, &r, s);
    resizer_free(&r);
    return result;
}

static void film_free(film *f) {
    free(f->number);
    free(f->rgb);
    memset(f, 0, sizeof *f);
}

/* ---- crop and normalise ----------------------------------------------------------------------------------------- */

/* First row or column of window number i of `windows` of `size` in n, spread evenly, one: in the middle. Negative: that
 * many zeros come first. */
static int crop_start(int n, int size, int i, int windows) {
    if (n < size) return -((size - n) / 2);
    return windows > 1 ? (int)((int64_t)i * (n - size) / (windows - 1)) : (n - size) / 2;
}

/* What a sample of a channel becomes: table[0..255] in float32, in the reference's order of operations. */
static void sample_table(const settings *s, int channel, float table[256]) {
    float unit = s->rescale ? (float)(1 / s->factor) : 1;
    float mean = (float)s->mean[channel] * unit, std = (float)s->std[channel] * unit;
    for (int v = 0; v < 256; v++)
        table[v] = s->normalize ? ((float)v - mean) / std : s->rescale ? (float)v * (float)s->factor : (float)v;
}

/* rgb [h, w, 3] to one frame of the clip [3, height, width]; top, left: its first pixel. */
static void crop_frame(const clip *c, const settings *s, const uint8_t *rgb, int h, int w, int top, int left,
                       float *out) {
    float table[256];
    for (int channel = 0; channel < 3; channel++) {
        sample_table(s, channel, table);
        for (int y = top; y < top + c->height; y++)
            for (int x = left; x < left + c->width; x++) {
                int inside = y >= 0 && y < h && x >= 0 && x < w;
                *out++ = table[inside ? rgb[3 * ((size_t)y * (size_t)w + (size_t)x) + (size_t)channel] : 0];
            }
    }
}

static void clip_cut(clip *c, const film *f, int64_t n_frames, const sampling *how, int clip_number, int crop_number,
                     const settings *s) {
    c->frames = how->frames;
    c->height = s->crop ? s->crop_h : f->height;
    c->width = s->crop ? s->crop_w : f->width;
    c->pixels = reallocate(c->pixels, 3 * (size_t)c->frames * (size_t)c->height * (size_t)c->width, sizeof *c->pixels);
    int top = crop_start(f->height, c->height, crop_number, f->height > f->width ? how->crops : 1);
    int left = crop_start(f->width, c->width, crop_number, f->height > f->width ? 1 : how->crops);
    for (int i = 0, at = 0; i < c->frames; i++) {
        int64_t number = frame_number(how, n_frames, i, clip_number);
        while (at > 0 && f->number[at] > number) at--;
        while (f->number[at] < number) at++;
        crop_frame(c, s, f->rgb + (size_t)at * film_frame(f), f->height, f->width, top, left,
                   c->pixels + 3 * (size_t)i * (size_t)c->height * (size_t)c->width);
    }
}

#endif
