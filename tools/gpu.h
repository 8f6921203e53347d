/* gpu.h - attention on a CUDA device (psa_cuda.cu) for tensors in host memory: there, stage by stage, and back.
 * With PSA_CUDA it needs the CUDA runtime; without it gpu_open says that there is none. Include after psa.h. Everything
 * is static. */
#ifndef GPU_H
#define GPU_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GPU_POOL, GPU_SCORE, GPU_MASK, GPU_ATTEND, GPU_LIST, GPU_CALL, GPU_STAGES };
enum { GPU_Q, GPU_K, GPU_V, GPU_OUT, GPU_ORDER_Q, GPU_ORDER_K, GPU_LSE, GPU_SCORES, GPU_LEVELS, GPU_WORK, GPU_BUFFERS };

/* All but open return a psa_result and give the log_fn of the plan a line about an error. */
typedef struct gpu gpu;
struct gpu {
    char name[256];                                          /* of the device */
    psa_result (*load)(gpu *g, const psa_plan *plan, const void *const data[4]); /* q, k, v, out; room for the rest */
    psa_result (*stage)(gpu *g, int stage, double *seconds); /* runs one and waits for it */
    psa_result (*put)(gpu *g, int buffer, const void *from);
    psa_result (*get)(gpu *g, int buffer, void *to);
    void (*close)(gpu *g);
    psa_plan plan;                                           /* with its token orders in device memory */
    void *at[GPU_BUFFERS];
    size_t size[GPU_BUFFERS], room[GPU_BUFFERS];             /* room: they stay from one load to the next, and grow */
    void *begin, *end;                                       /* events */
};

#ifdef PSA_CUDA
#include <cuda_runtime_api.h>

static psa_result gpu_error(const gpu *g, psa_result result, const char *message) {
    if (result != PSA_OK && g->plan.desc.log_fn)
        g->plan.desc.log_fn(g->plan.desc.log_user, message);
    return result;
}

static psa_result gpu_check(const gpu *g, cudaError_t error, psa_result result) {
    return gpu_error(g, error == cudaSuccess ? PSA_OK : result, cudaGetErrorString(error));
}

static psa_result gpu_put(gpu *g, int buffer, const void *from) {
    return gpu_check(g, cudaMemcpy(g->at[buffer], from, g->size[buffer], cudaMemcpyHostToDevice), PSA_ERR_CUDA_LAUNCH);
}

static psa_result gpu_get(gpu *g, int buffer, void *to) {
    return gpu_check(g, cudaMemcpy(to, g->at[buffer], g->size[buffer], cudaMemcpyDeviceToHost), PSA_ERR_CUDA_LAUNCH);
}

/* Bytes from the first element to the last. */
static size_t gpu_span(const psa_tensor *t) {
    size_t span = (size_t)t->ne[0] * t->nb[0];
    for (int i = 1; i < 4; i++)
        span += (size_t)(t->ne[i] - 1) * t->nb[i];
    return span;
}

static size_t gpu_order_span(const psa_order *o, int64_t n, int64_t heads, int64_t batch) {
    return o->index ? (size_t)(n + (heads - 1) * o->stride_h + (batch - 1) * o->stride_b) * sizeof *o->index : 0;
}

static psa_result gpu_make_room(gpu *g, int buffer, size_t size) {
    g->size[buffer] = size;
    if (size <= g->room[buffer])
        return PSA_OK;
    cudaFree(g->at[buffer]);
    g->at[buffer] = NULL;
    g->room[buffer] = 0;
    psa_result result = gpu_check(g, cudaMalloc(&g->at[buffer], size), PSA_ERR_MEMORY);
    if (result == PSA_OK)
        g->room[buffer] = size;
    return result;
}

static psa_result gpu_load(gpu *g, const psa_plan *plan, const void *const data[4]) {
    const psa_plan *p = plan;
    size_t map = psa_map_size(p), rows = (size_t)(p->B * p->Hq * p->Nq);
    const void *from[GPU_BUFFERS] = {data[0], data[1], data[2], data[3], p->desc.order_q.index, p->desc.order_k.index};
    const size_t size[GPU_BUFFERS] = {gpu_span(&p->q),
                                      gpu_span(&p->k),
                                      gpu_span(&p->v),
                                      gpu_span(&p->out),
                                      gpu_order_span(&p->desc.order_q, p->Nq, p->Hq, p->B),
                                      gpu_order_span(&p->desc.order_k, p->Nk, p->Hkv, p->B),
                                      rows * sizeof(float),
                                      map * sizeof(float),
                                      map,
                                      psa_cuda_work_size(p)};
    g->plan = *p;
    for (int i = 0; i < GPU_BUFFERS; i++) {
        psa_result result = gpu_make_room(g, i, size[i]);
        if (result == PSA_OK && from[i])
            result = gpu_put(g, i, from[i]); /* out too: its rows may have gaps, which come back as they were */
        if (result != PSA_OK)
            return result;
    }
    g->plan.desc.order_q.index = (const int32_t *)(from[GPU_ORDER_Q] ? g->at[GPU_ORDER_Q] : NULL);
    g->plan.desc.order_k.index = (const int32_t *)(from[GPU_ORDER_K] ? g->at[GPU_ORDER_K] : NULL);
    return PSA_OK;
}

static psa_result gpu_enqueue(gpu *g, int stage) {
    const psa_plan *p = &g->plan;
    void *work = g->at[GPU_WORK];
    float *scores = (float *)g->at[GPU_SCORES], *lse = (float *)g->at[GPU_LSE];
    uint8_t *levels = (uint8_t *)g->at[GPU_LEVELS];
    switch (stage) {
    case GPU_POOL:
        return psa_cuda_pool(p, g->at[GPU_K], g->at[GPU_V], work, NULL);
    case GPU_SCORE:
        return psa_cuda_score(p, g->at[GPU_Q], g->at[GPU_K], work, scores, NULL);
    case GPU_MASK:
        return psa_cuda_mask(p, scores, work, levels, NULL);
    case GPU_LIST:
        return psa_cuda_list(p, levels, work, NULL);
    case GPU_ATTEND:
        return psa_cuda_attend(p, g->at[GPU_Q], g->at[GPU_K], g->at[GPU_V], work, g->at[GPU_OUT], lse, NULL);
    default:
        return psa_cuda_attention(p, g->at[GPU_Q], g->at[GPU_K], g->at[GPU_V], g->at[GPU_OUT], NULL, work,
                                  g->size[GPU_WORK], NULL);
    }
}

static psa_result gpu_stage(gpu *g, int stage, double *seconds) {
    float milliseconds = 0;
    cudaEventRecord((cudaEvent_t)g->begin, NULL);
    psa_result result = gpu_enqueue(g, stage);
    cudaEventRecord((cudaEvent_t)g->end, NULL);
    if (result == PSA_OK)
        result = gpu_check(g, cudaEventSynchronize((cudaEvent_t)g->end), PSA_ERR_CUDA_LAUNCH);
    if (result == PSA_OK)
        result = gpu_check(g, cudaEventElapsedTime(&milliseconds, (cudaEvent_t)g->begin, (cudaEvent_t)g->end),
                           PSA_ERR_CUDA_LAUNCH);
    *seconds = 1e-3 * (double)milliseconds;
    return result;
}

static void gpu_close(gpu *g) {
    for (int i = 0; i < GPU_BUFFERS; i++)
        cudaFree(g->at[i]);
    cudaEventDestroy((cudaEvent_t)g->begin);
    cudaEventDestroy((cudaEvent_t)g->end);
    memset(g, 0, sizeof *g);
}

/* NULL, or what is in the way. */
static const char *gpu_open(gpu *g) {
    struct cudaDeviceProp device;
    cudaEvent_t begin, end;
    int i = 0;
    memset(g, 0, sizeof *g);
    cudaError_t error = cudaGetDevice(&i);
    if (error == cudaSuccess)
        error = cudaGetDeviceProperties(&device, i);
    if (error != cudaSuccess)
        return cudaGetErrorString(error);
    if (device.major < 8)
        return psa_result_string(PSA_ERR_CUDA_DEVICE);
    if (cudaEventCreate(&begin) != cudaSuccess || cudaEventCreate(&end) != cudaSuccess)
        return "the device takes no work";
    snprintf(g->name, sizeof g->name, "%.200s, compute capability %d.%d", device.name, device.major, device.minor);
    g->begin = begin;
    g->end = end;
    g->load = gpu_load;
    g->stage = gpu_stage;
    g->put = gpu_put;
    g->get = gpu_get;
    g->close = gpu_close;
    return NULL;
}
#else
static const char *gpu_open(gpu *g) {
    memset(g, 0, sizeof *g);
    return "built without CUDA";
}
#endif
#endif
