/* job.h - one run of the classifier: what was asked for, and what came out for every input. */
#ifndef JOB_H
#define JOB_H

#define TOP 5

typedef struct arguments {
    options psa; /* first: the rows of options.h point into it */
    const char *model, *pixels, *frames, *eval, *root, *logits, *save_pixels, *png, **videos;
    int n_videos, dense, limit, query[5], n_query;
    sampling how;
} arguments;

/* The means over the clips and crops of an input. */
typedef struct outcome {
    float *logits;          /* [n_labels] */
    double *p;              /* their softmax, averaged */
    int top[TOP];           /* labels, most probable first */
    int views, is_dense;    /* is_dense: the input was too short for anything else */
    double density, parts[PARTS], seconds;
} outcome;

typedef struct result {
    char *name;             /* of the input */
    int64_t video_frames;   /* 0: the input was prepared */
    int frames, grid[3];
    double read_seconds;
    outcome main, dense;    /* dense: with --compare */
} result;

typedef struct job {
    arguments in;
    crew crew;
    gpu gpu;                /* with --backend cuda */
    model m;
    settings settings;
    encoder encoder;
    result *results;
    size_t n_results;
    clip clip;              /* the last one of a video */
    trace trace;            /* with --png, of the last clip */
    size_t activations;     /* bytes: the most that a clip took, its pixels among them */
    double program;         /* bytes in memory before there was a model: code and libraries */
} job;

/* Room for one more item after n, doubled when n is a power of two. */
static void *grow(void *items, size_t n, size_t size) {
    return n & (n - 1) ? items : reallocate(items, n ? 2 * n : 1, size);
}

/* ---- outcomes --------------------------------------------------------------------------------------------------- */

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

/* KL(dense || main): what the sparse answer loses, in nats. */
static double divergence(const result *r, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++)
        if (r->dense.p[i] > 0) sum += r->dense.p[i] * log(r->dense.p[i] / fmax(r->main.p[i], 1e-300));
    return fmax(sum, 0);
}

/* Value number `views` (from 1) enters a mean. */
static double mean_add(double mean, double value, int views) {
    return mean + (value - mean) / views;
}

static void outcome_add(outcome *o, const encoder *e, const float *logits, const double *p, double elapsed) {
    int n = e->m->n_labels, views = ++o->views;
    if (!o->logits) o->logits = alloc((size_t)n, sizeof *o->logits);
    if (!o->p) o->p = alloc((size_t)n, sizeof *o->p);
    for (int i = 0; i < n; i++) {
        o->logits[i] = (float)mean_add((double)o->logits[i], (double)logits[i], views);
        o->p[i] = mean_add(o->p[i], p[i], views);
    }
    o->density = mean_add(o->density, (double)e->mul_adds / (double)e->dense_mul_adds, views);
    o->is_dense = e->is_dense;
    o->seconds += elapsed;
    for (int i = 0; i < PARTS; i++) o->parts[i] += e->seconds[i];
    find_top(o->p, n, o->top);
}

/* Runs the model on a clip and adds what comes out. */
static void run_model(job *j, const char *name, const psa_desc *desc, const float *pixels, trace *t, outcome *o) {
    int n = j->m.n_labels;
    float *logits = alloc((size_t)n, sizeof *logits);
    double *p = alloc((size_t)n, sizeof *p), start = now();
    encoder_run(&j->encoder, desc, (psa_order_kind)j->in.psa.order, pixels, logits, t);
    double elapsed = now() - start;
    for (int i = 0; i < n; i++)
        if (!isfinite(logits[i])) die("%s: the logits are not finite; the weights or the input are not", name);
    softmax(logits, n, p);
    outcome_add(o, &j->encoder, logits, p, elapsed);
    free(logits);
    free(p);
}

static void run_clip(job *j, const clip *c, result *r) {
    psa_desc dense;
    memset(&dense, 0, sizeof dense);
    dense.mask = PSA_MASK_DENSE;
    dense.isa = j->in.psa.desc.isa;
    encoder_plan(&j->encoder, &j->m, &j->crew, (psa_type)j->in.psa.type, c->frames, c->height, c->width);
    j->encoder.gpu = j->in.psa.backend == BACKEND_CUDA ? &j->gpu : NULL;
    r->frames = c->frames;
    memcpy(r->grid, j->encoder.grid, sizeof r->grid);
    run_model(j, r->name, j->in.dense ? &dense : &j->in.psa.desc, c->pixels, j->in.png ? &j->trace : NULL, &r->main);
    if (j->in.psa.compare) run_model(j, r->name, &dense, c->pixels, NULL, &r->dense);
    size_t pixels = 3 * (size_t)c->frames * (size_t)c->height * (size_t)c->width;
    j->activations = max_size(j->activations, j->encoder.bytes + pixels * sizeof *c->pixels);
}

/* What reports call the outcome that was asked for. */
static const char *main_name(const job *j) {
    return j->in.dense ? "dense" : "psa";
}

/* ---- inputs ----------------------------------------------------------------------------------------------------- */

static result *result_add(job *j, const char *name) {
    j->results = grow(j->results, j->n_results, sizeof *j->results);
    result *r = &j->results[j->n_results++];
    memset(r, 0, sizeof *r);
    r->name = copy_text(name);
    return r;
}

static void outcome_free(outcome *o) {
    free(o->logits);
    free(o->p);
}

static void result_free(result *r) {
    free(r->name);
    outcome_free(&r->main);
    outcome_free(&r->dense);
}

/* All clips and crops of a video. 0, or -1 with a line in error: it cannot be read. */
static int run_video(job *j, const char *path, result *r, char *error, size_t error_size) {
    sampling how = j->in.how;
    film f;
    video v;
    double start = now();
    if (!how.frames) how.frames = j->m.frames;
    memset(&f, 0, sizeof f);
    int opened = j->in.frames ? video_open_npy(&v, path) : video_open(&v, path);
    int status = opened != 0 ? opened : film_read(&f, &v, &how, &j->settings);
    snprintf(error, error_size, "%s", v.error);
    r->video_frames = v.n_frames;
    video_close(&v);
    for (int i = 0; status == 0 && i < how.clips * how.crops; i++) {
        clip_cut(&j->clip, &f, r->video_frames, &how, i / how.crops, i % how.crops, &j->settings);
        if (i == how.clips * how.crops - 1) film_free(&f);
        if (i == 0) r->read_seconds = now() - start;
        run_clip(j, &j->clip, r);
    }
    film_free(&f);
    return status;
}

static void job_open(job *j) {
    const arguments *in = &j->in;
    const char *no_gpu = in->psa.backend == BACKEND_CUDA ? gpu_open(&j->gpu) : NULL;
    if (no_gpu) die("--backend cuda: %s", no_gpu);
    model_load(&j->m, in->model);
    if (!in->pixels) settings_read(&j->settings, in->model, j->m.is_vjepa2);
    if (!j->m.is_vjepa2 && in->how.frames && in->how.frames != j->m.frames)
        die("--num-frames %d: this model takes exactly %d", in->how.frames, j->m.frames);
    crew_start(&j->crew, in->psa.threads);
}

static void job_free(job *j) {
    for (size_t i = 0; i < j->n_results; i++) result_free(&j->results[i]);
    free(j->results);
    free(j->clip.pixels);
    free(j->in.psa.words);
    trace_free(&j->trace);
    encoder_free(&j->encoder);
    crew_stop(&j->crew);
    if (j->gpu.close) j->gpu.close(&j->gpu);
    model_free(&j->m);
}

#endif
