/* bench_gpu.h - psa bench on a GPU (--backend cuda), and what a model of GPUs says of the same calls (--backend model).
 * Include after bench_rows.h and the mixes of bench.h. Everything is static. */
#ifndef BENCH_GPU_H
#define BENCH_GPU_H

enum { GPU_ROWS = 5 }; /* of a density */
static const struct {
    const char *name;
    int stage;
} gpu_rows[GPU_ROWS] = {
    {"pool", GPU_POOL}, {"score", GPU_SCORE}, {"mask", GPU_MASK}, {"attend", GPU_ATTEND}, {"whole call", GPU_CALL}};

static int gpu_type(const bench *b) { return b->o->type < 0 ? PSA_BF16 : b->o->type; }

/* The plan changes from one density to the next, the tensors stay where they are. */
static double measure_gpu(bench *b, const row *r) {
    const void *const nothing[4] = {NULL, NULL, NULL, NULL};
    double seconds = 0;
    psa_result result = PSA_OK;
    if (r->stage == GPU_POOL || r->stage == GPU_CALL)
        result = b->gpu.load(&b->gpu, &r->run->plan, nothing);
    if (result == PSA_OK)
        result = b->gpu.stage(&b->gpu, r->stage, &seconds);
    return result == PSA_OK ? seconds : bench_fail(b, r->run->detail[0] ? r->run->detail : psa_result_string(result));
}

/* *what: what takes the time of the last stage. */
static double model_row_seconds(const row *r, const char **what) {
    const psa_plan *p = &r->run->plan;
    double sum = 0;
    for (int stage = GPU_POOL; stage <= GPU_ATTEND; stage++) {
        int dense = p->desc.mask == PSA_MASK_DENSE && stage != GPU_ATTEND; /* attends at once */
        if (r->stage != stage && (r->stage != GPU_CALL || dense))
            continue;
        model_cost c = stage == GPU_POOL    ? model_pool(p)
                       : stage == GPU_SCORE ? model_score(p, r->model->shared)
                       : stage == GPU_MASK  ? model_mask(p)
                                            : model_attend_on(r->model, p, r->density * (double)p->Nk);
        sum += model_seconds(r->model, &c, what);
    }
    return sum;
}

static double measure_model(bench *b, const row *r) {
    const char *what;
    (void)b;
    return model_row_seconds(r, &what);
}

/* What top-k reads of every row, whatever q and k are. */
static double topk_density(const psa_desc *desc, int64_t nk) {
    double before = 0, density = 0;
    for (int i = 0; i < PSA_MAX_LEVELS && desc->level_end[i] > 0; i++) {
        double blocks = floor(desc->level_end[i] * (double)nk);
        density += (blocks - before) / (double)nk / (1 << i);
        before = blocks;
    }
    return density;
}

/* A row for each stage and for all at once; of a dense call, for that alone. */
static void add_gpu_rows(bench *b, bench_input *in, const model_gpu *model, double density, const row *dense) {
    psa_desc desc = mix_desc(b, &mixes[DEFAULT_MIX], density, b->block_k, in->n);
    run *stages = &b->runs[b->n_runs++];
    psa_tensor t[4];
    desc.mask = dense ? PSA_MASK_TOPK : PSA_MASK_DENSE;
    input_tensors(in, in->n_q, in->out[1], t);
    b->rc = run_plan(stages, b->o, b->crew, &desc, 1, &t[0], &t[1], &t[2], &t[3]);
    density = dense ? topk_density(&desc, stages->plan.nk) : 1;
    for (int i = dense ? 0 : GPU_ROWS - 1; i < GPU_ROWS; i++) {
        const char *what = NULL;
        row *r = add_row(b, in, 0, model ? measure_model : measure_gpu);
        r->model = model;
        r->run = stages;
        r->stage = gpu_rows[i].stage;
        r->density = density;
        r->work = 4.0 * density * (double)in->n_q * (double)in->n * (double)in->d * in->heads;
        r->unrated = r->stage < GPU_ATTEND;
        if (r->stage == GPU_CALL && dense) { /* for a dense call's worth of work */
            r->base[0] = dense;
            r->work = dense->work;
        }
        if (model && (!dense || r->stage != GPU_CALL))
            model_row_seconds(r, &what);
        name_row(r, "%s%s%s at %.3f%s%s", model ? model->name : "", model ? ": " : "",
                 dense ? gpu_rows[i].name : "dense", density, what ? ", " : "", what ? what : "");
    }
}

static void add_densities(bench *b, bench_input *in, const model_gpu *model) {
    static const double densities[] = {.3, .15, .05};
    const row *dense = &b->rows[b->n_rows];
    add_gpu_rows(b, in, model, 1, NULL);
    for (int i = 0; i < (b->o->density > 0 ? 1 : 3) && b->rc == 0; i++)
        add_gpu_rows(b, in, model, b->o->density > 0 ? b->density : densities[i], dense);
}

static void gpu_group(bench *b, int64_t n, int64_t d) {
    bench_input *in = add_input(b, gpu_type(b), n, n, d);
    if (b->rc != 0)
        return;
    add_densities(b, in, NULL);
    const void *const data[4] = {in->data[0], in->data[1], in->data[2], NULL};
    psa_result result = b->rc == 0 ? b->gpu.load(&b->gpu, &b->runs[0].plan, data) : PSA_OK;
    if (result != PSA_OK)
        bench_fail(b, b->runs[0].detail[0] ? b->runs[0].detail : psa_result_string(result));
    measure_rows(b);
    end_group(b);
}

static void model_group(bench *b, int64_t n, int64_t d) {
    bench_input *in = add_shape(b, gpu_type(b), n, n, d); /* a model only counts */
    for (int i = 0; i < MODEL_GPUS && b->rc == 0; i++)
        add_densities(b, in, &model_gpus[i]);
    measure_once(b);
    end_group(b);
}
#endif
