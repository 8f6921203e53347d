/* run.h - what the psa command does with the library: threads, progress, and the stages with their times.
 * Include after psa.h and options.h. Everything is static. */
#ifndef RUN_H
#define RUN_H

#include <pthread.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- threads that stay, so that short stages are not measured with their creation ---- */

typedef struct crew {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pthread_t *thread;
    int n_threads;     /* with the calling one */
    psa_task_fn *task; /* what the threads do now */
    void *ctx;
    int nth, next, running; /* tasks, the first one nobody took, those not finished */
    int stop;
    const char *label; /* of the progress line; NULL: none */
    double started, shown;
} crew;

/* Once a second of work has passed; label is set only where a person is looking. */
static void show_progress(crew *c) {
    double t = now();
    if (!c->label || t - c->started < 1 || t - c->shown < 0.1)
        return;
    c->shown = t;
    fprintf(stderr, "\r%-10s %3d%%  %.0f s\033[K", c->label, 100 * (c->nth - c->running) / c->nth, t - c->started);
    fflush(stderr);
}

/* Takes tasks until there are none. The lock is held on entry and on return. */
static void crew_take(crew *c) {
    while (c->next < c->nth) {
        int ith = c->next++;
        pthread_mutex_unlock(&c->lock);
        c->task(c->ctx, ith, c->nth);
        pthread_mutex_lock(&c->lock);
        if (--c->running == 0)
            pthread_cond_signal(&c->done);
        show_progress(c);
    }
}

static void *crew_thread(void *arg) {
    crew *c = (crew *)arg;
    pthread_mutex_lock(&c->lock);
    while (!c->stop) {
        crew_take(c);
        pthread_cond_wait(&c->work, &c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

static void crew_run(crew *c, int nth, psa_task_fn *task, void *ctx) {
    pthread_mutex_lock(&c->lock);
    c->task = task, c->ctx = ctx;
    c->next = 0, c->nth = c->running = nth;
    pthread_cond_broadcast(&c->work);
    crew_take(c);
    while (c->running)
        pthread_cond_wait(&c->done, &c->lock);
    pthread_mutex_unlock(&c->lock);
}

static void crew_stop(crew *c) {
    pthread_mutex_lock(&c->lock);
    c->stop = 1;
    pthread_cond_broadcast(&c->work);
    pthread_mutex_unlock(&c->lock);
    for (int i = 0; i < c->n_threads - 1; i++)
        pthread_join(c->thread[i], NULL);
    free(c->thread);
    pthread_cond_destroy(&c->work);
    pthread_cond_destroy(&c->done);
    pthread_mutex_destroy(&c->lock);
}

/* n_threads 0: all processors. Works with fewer threads if the system gives no more. */
static void crew_start(crew *c, int n_threads) {
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    int wanted = n_threads ? n_threads : processors > 0 ? (int)processors : 1;
    memset(c, 0, sizeof *c);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->work, NULL);
    pthread_cond_init(&c->done, NULL);
    c->n_threads = 1;
    c->thread = (pthread_t *)calloc((size_t)wanted, sizeof *c->thread);
    while (c->thread && c->n_threads < wanted &&
           pthread_create(&c->thread[c->n_threads - 1], NULL, crew_thread, c) == 0)
        c->n_threads++;
}

/* More pieces than threads, so that the progress line moves. */
static int tasks(const crew *c) {
    return c->n_threads < 16 ? 64 : 4 * c->n_threads;
}

/* ---- one attention: plan, memory, stages ---- */

enum { POOL, SCORE, MASK, ATTEND, STAGES };
static const char *const stage_names[STAGES] = {"pool", "score", "mask", "attend"};

typedef struct run {
    crew *crew;
    psa_plan plan;
    const void *q, *k, *v; /* the caller's, like out and lse */
    void *out;
    float *lse;
    float *scores;   /* owned */
    uint8_t *levels; /* owned */
    void *work;      /* owned */
    int stage;
    psa_result *results; /* owned, one per task */
    double seconds[STAGES];
    char detail[512]; /* the library's last line about an error */
} run;

static void keep_detail(void *user, const char *message) {
    run *r = (run *)user;
    pthread_mutex_lock(&r->crew->lock);
    snprintf(r->detail, sizeof r->detail, "%s", message);
    pthread_mutex_unlock(&r->crew->lock);
}

static void run_free(run *r) {
    free(r->scores);
    free(r->levels);
    free(r->work);
    free(r->results);
}

static int run_fail(const options *o, const run *r, psa_result result) {
    return fail(o, "%s", r->detail[0] ? r->detail : psa_result_string(result));
}

/* Plan and memory. v and out may be NULL. n_tasks: into how many pieces a stage is cut. */
static int run_init(run *r, const options *o, crew *c, const psa_desc *desc, int n_tasks, const psa_tensor *q,
                    const psa_tensor *k, const psa_tensor *v, const psa_tensor *out) {
    psa_desc d = *desc;
    memset(r, 0, sizeof *r);
    r->crew = c;
    d.n_threads = n_tasks;
    d.log_fn = keep_detail;
    d.log_user = r;
    psa_result result = psa_plan_init(&r->plan, &d, q, k, v, out);
    if (result != PSA_OK)
        return run_fail(o, r, result);
    r->q = q->data;
    r->k = k->data;
    r->v = v ? v->data : NULL;
    r->out = out ? out->data : NULL;
    r->work = malloc(psa_work_size(&r->plan) + 1);
    r->scores = (float *)calloc(psa_map_size(&r->plan), sizeof *r->scores);
    r->levels = (uint8_t *)calloc(psa_map_size(&r->plan), 1);
    r->results = (psa_result *)calloc((size_t)n_tasks, sizeof *r->results);
    if (r->work && r->scores && r->levels && r->results)
        return 0;
    return fail(o, "not enough memory: %zu bytes of workspace", psa_work_size(&r->plan));
}

static void stage_task(void *ctx, int ith, int nth) {
    run *r = (run *)ctx;
    psa_result *result = &r->results[ith];
    switch (r->stage) {
    case POOL:
        *result = psa_pool(&r->plan, r->k, r->v, r->work, ith, nth);
        break;
    case SCORE:
        *result = psa_score(&r->plan, r->q, r->k, r->work, r->scores, ith, nth);
        break;
    case MASK:
        *result = psa_mask(&r->plan, r->scores, r->work, r->levels, ith, nth);
        break;
    default:
        *result = psa_attend(&r->plan, r->q, r->k, r->v, r->levels, r->work, r->out, r->lse, ith, nth);
    }
}

/* One stage on all threads, timed. */
static int run_stage(run *r, const options *o, int stage) {
    int nth = r->plan.desc.n_threads;
    double start = now();
    r->stage = stage;
    if (r->crew->label)
        r->crew->label = stage_names[stage];
    crew_run(r->crew, nth, stage_task, r);
    r->seconds[stage] = now() - start;
    for (int i = 0; i < nth; i++)
        if (r->results[i] != PSA_OK)
            return run_fail(o, r, r->results[i]);
    return 0;
}

/* Everything up to the level map, unless the caller brings one, and attention. */
static int run_attention(run *r, const options *o, int levels_given) {
    int scored = !levels_given && r->plan.desc.mask != PSA_MASK_DENSE;
    if (run_stage(r, o, POOL) || (scored && run_stage(r, o, SCORE)) || (!levels_given && run_stage(r, o, MASK)))
        return 2;
    return run_stage(r, o, ATTEND);
}

static double run_seconds(const run *r) {
    double sum = 0;
    for (int i = 0; i < STAGES; i++)
        sum += r->seconds[i];
    return sum;
}

/* ---- elements ---- */

static float float_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31)
        return float_from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0)
        return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Keeps bits - drop of the low ones, to nearest, ties to even. */
static uint32_t round_bits(uint32_t bits, int drop) {
    return (bits + ((1u << (drop - 1)) - 1) + (bits >> drop & 1)) >> drop;
}

static uint16_t half_from_float(float f) {
    uint32_t bits, sign;
    memcpy(&bits, &f, sizeof bits);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) /* below the smallest normal half: let the addition round */
        return (uint16_t)(sign | (uint32_t)(rintf(float_from_bits(bits) * 0x1p24f)));
    return (uint16_t)(sign | round_bits(bits - 0x38000000, 13));
}

static uint16_t bf16_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* a quiet NaN, whatever its low bits are */
    return (uint16_t)round_bits(bits, 16);
}

static float get_element(const void *data, psa_type type, size_t i) {
    if (type == PSA_F32)
        return ((const float *)data)[i];
    uint16_t h = ((const uint16_t *)data)[i];
    return type == PSA_F16 ? half_to_float(h) : float_from_bits((uint32_t)h << 16);
}

static void set_element(void *data, psa_type type, size_t i, float value) {
    if (type == PSA_F32)
        ((float *)data)[i] = value;
    else
        ((uint16_t *)data)[i] = type == PSA_F16 ? half_from_float(value) : bf16_from_float(value);
}

/* The distance of b from a: relative in the L2 norm, and the largest of an element. */
static void difference(const void *a, const void *b, psa_type type, size_t n, double *relative, double *largest) {
    double error = 0, norm = 0, most = 0;
    for (size_t i = 0; i < n; i++) {
        double x = (double)get_element(a, type, i), e = (double)get_element(b, type, i) - x;
        error += e * e;
        norm += x * x;
        most = fabs(e) > most || isnan(e) ? fabs(e) : most;
    }
    *relative = norm > 0 ? sqrt(error / norm) : sqrt(error);
    *largest = most;
}
#endif
