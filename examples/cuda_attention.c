/* cuda_attention.c - sparse attention on a GPU from plain C, next to the same on the CPU.
 *
 *     nvcc -O3 -std=c++17 -arch=native -c psa_cuda.cu
 *     cc -std=c99 -O2 -I. -I/usr/local/cuda/include examples/cuda_attention.c psa_cuda.o \
 *         -L/usr/local/cuda/lib64 -lcudart -lstdc++ -lm -pthread -o cuda_attention */
#define PSA_IMPLEMENTATION
#define PSA_CUDA
#include "psa.h"

#include <cuda_runtime_api.h>

enum { B = 1, H = 4, N = 4096, D = 64, COUNT = B * H * N * D };

static void *to_device(const void *data, size_t size)
{
    void *p = NULL;
    if (cudaMalloc(&p, size) != cudaSuccess) return NULL;
    if (data) cudaMemcpy(p, data, size, cudaMemcpyHostToDevice);
    return p;
}

static int fail(const char *what, psa_result r)
{
    fprintf(stderr, "cuda_attention: %s: %s\n", what, psa_result_string(r));
    return 1;
}

int main(void)
{
    static float x[4][COUNT], result[COUNT]; /* q, k, v, out */
    psa_desc desc = {0};
    psa_tensor t[4];
    psa_plan plan;
    void *d[4], *work;
    double error = 0, size = 0;
    psa_result r;
    for (int i = 0; i < 3 * COUNT; i++) x[i / COUNT][i % COUNT] = (float)rand() / (float)RAND_MAX * 4 - 2;
    for (int i = 0; i < 4; i++) t[i] = psa_tensor_4d(x[i], PSA_F32, D, N, H, B);
    if ((r = psa_attention(&desc, &t[0], &t[1], &t[2], &t[3], NULL)) != PSA_OK) return fail("CPU", r);

    /* The plan needs shapes and strides only. The workspace lasts for as many calls as you like. */
    if ((r = psa_plan_init(&plan, &desc, &t[0], &t[1], &t[2], &t[3])) != PSA_OK) return fail("plan", r);
    for (int i = 0; i < 4; i++) d[i] = to_device(i < 3 ? x[i] : NULL, sizeof x[i]);
    work = to_device(NULL, psa_cuda_work_size(&plan));
    if (!d[0] || !d[1] || !d[2] || !d[3] || !work) return fail("cudaMalloc", PSA_ERR_CUDA_DEVICE);
    r = psa_cuda_attention(&plan, d[0], d[1], d[2], d[3], NULL, work, psa_cuda_work_size(&plan), NULL);
    if (r != PSA_OK) return fail("GPU", r);
    if (cudaMemcpy(result, d[3], sizeof result, cudaMemcpyDeviceToHost) != cudaSuccess)
        return fail("GPU", PSA_ERR_CUDA_LAUNCH);

    for (int i = 0; i < COUNT; i++) {
        error += (result[i] - x[3][i]) * (result[i] - x[3][i]);
        size += x[3][i] * x[3][i];
    }
    printf("relative error against the CPU: %.4f\n", sqrt(error / size));
    return 0;
}
