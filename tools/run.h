/* run.h - what the psa command does with the library: the stages with their times, and how two results differ.
 * Include after psa.h and options.h. Everything is static. */
#ifndef RUN_H
#define RUN_H

#include "crew.h"
#include "elements.h"
#include "gpu.h"

/* More pieces than threads, so that the progress line moves. */
static int tasks(const crew *c) {
    return c->n_threads < 16 ? 64 : 4 * c->n_threads;
}

/* ---- one attention: plan, memory, stages ---- */

enum { PREPARE, POOL, SCORE, BUDGET, MASK, ATTEND, STAGES };
static const char *const stage_names[STAGES] = {"prepare", "pool", "score", "budget", "mask", "attend"};

typedef struct run {
    crew *crew;
    gpu *gpu; /* the caller's; NULL: the stages run on the crew */
    psa_plan plan;
    const void *q, *k, *v; /* the caller's, like out and lse */
    void *out;
    float *lse;
    float *scores;   /* owned */
    uint8_t *levels; /* owned */
    void *work;      /* owned */
    int stage;
    psa_result *results; /* owned, one per task */
    double seconds[STAGES], copy_seconds; /* copies: to the GPU and back */
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

/* The plan alone. v and out may be NULL. n_tasks: into how many pieces a stage is cut. */
static int run_plan(run *r, const options *o, crew *c, const psa_desc *desc, int n_tasks, const psa_tensor *q,
                    const psa_tensor *k, const psa_tensor *v, const psa_tensor *out) {
    psa_desc d = *desc;
    memset(r, 0, sizeof *r);
    r->crew = c;
    d.n_threads = n_tasks;
    d.log_fn = keep_detail;
    d.log_user = r;
    psa_result result = psa_plan_init(&r->plan, &d, q, k, v, out);
    return result == PSA_OK ? 0 : run_fail(o, r, result);
}

/* Plan and memory. */
static int run_init(run *r, const options *o, crew *c, const psa_desc *desc, int n_tasks, const psa_tensor *q,
                    const psa_tensor *k, const psa_tensor *v, const psa_tensor *out) {
    if (run_plan(r, o, c, desc, n_tasks, q, k, v, out))
        return 2;
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
    case PREPARE:
        *result = psa_prepare(&r->plan, r->q, r->k, r->work, ith, nth);
        break;
    case POOL:
        *result = psa_pool(&r->plan, r->k, r->v, r->work, ith, nth);
        break;
    case SCORE:
        *result = psa_score(&r->plan, r->q, r->k, r->work, r->scores, ith, nth);
        break;
    case BUDGET:
        *result = psa_budget(&r->plan, r->scores, r->work, ith, nth);
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

/* Whether a stage has anything to do. */
static int stage_needed(const run *r, int stage) {
    const psa_desc *d = &r->plan.desc;
    if (d->mask == PSA_MASK_DENSE)
        return stage == MASK || stage == ATTEND;
    if (stage == PREPARE)
        return d->tree || d->tilt || d->mask == PSA_MASK_ERROR;
    return stage != BUDGET || d->density > 0;
}

/* The stages on the GPU, their inputs copied there and their results back. */
static psa_result run_on_gpu(run *r, int levels_given, int scored) {
    gpu *g = r->gpu;
    const void *data[] = {r->q, r->k, r->v, r->out};
    static const int on_gpu[STAGES] = {-1, GPU_POOL, GPU_SCORE, -1, GPU_MASK, GPU_ATTEND};
    double start = now(), seconds = 0;
    psa_result result = g->load(g, &r->plan, data);
    if (result == PSA_OK && levels_given)
        result = g->put(g, GPU_LEVELS, r->levels);
    for (int stage = POOL; stage < STAGES && result == PSA_OK; stage++)
        if (on_gpu[stage] >= 0 && (stage != SCORE || scored)) {
            result = g->stage(g, stage == MASK && levels_given ? GPU_LIST : on_gpu[stage], &r->seconds[stage]);
            seconds += r->seconds[stage];
        }
    if (result == PSA_OK)
        result = g->get(g, GPU_OUT, r->out);
    if (result == PSA_OK)
        result = g->get(g, GPU_LEVELS, r->levels);
    if (result == PSA_OK && scored)
        result = g->get(g, GPU_SCORES, r->scores);
    if (result == PSA_OK && r->lse)
        result = g->get(g, GPU_LSE, r->lse);
    r->copy_seconds = now() - start - seconds;
    return result;
}

/* Everything up to the level map, unless the caller brings one, and attention. */
static int run_attention(run *r, const options *o, int levels_given) {
    int scored = !levels_given && r->plan.desc.mask != PSA_MASK_DENSE;
    if (r->gpu) {
        psa_result result = run_on_gpu(r, levels_given, scored);
        return result == PSA_OK ? 0 : run_fail(o, r, result);
    }
    for (int stage = PREPARE; stage <= ATTEND; stage++) {
        int choice = stage == SCORE || stage == BUDGET || stage == MASK;
        if (stage_needed(r, stage) && !(levels_given && choice) && run_stage(r, o, stage))
            return 2;
    }
    return 0;
}

/* Multiply-adds that attention did. */
static int64_t run_mul_adds(const run *r) {
    psa_stats stats = {0};
    if (!r->gpu)
        return psa_mul_adds(&r->plan, r->work);
    return psa_stats_from_levels(&r->plan, r->levels, -1, -1, &stats) == PSA_OK ? stats.mul_adds : 0;
}

static double run_seconds(const run *r) {
    double sum = 0;
    for (int i = 0; i < STAGES; i++)
        sum += r->seconds[i];
    return sum;
}

/* ---- comparison ---- */

static float get_element(const void *data, psa_type type, size_t i) {
    if (type == PSA_F32)
        return ((const float *)data)[i];
    uint16_t h = ((const uint16_t *)data)[i];
    return type == PSA_F16 ? half_to_float(h) : float_from_bits((uint32_t)h << 16);
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
