/* cuda_runtime_api.h - of the CUDA runtime what this project's programs call, on the CPU: with it and the emulator
 * (emu.h) they run where there is no GPU. Device memory is the host's, poisoned; work is done when it is asked for.
 * C99 and C++. */
#ifndef CUDA_RUNTIME_API_H
#define CUDA_RUNTIME_API_H

#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNoDevice = 100,
    cudaErrorLaunchFailure = 719
} cudaError_t;
typedef void *cudaStream_t;
typedef struct timespec *cudaEvent_t;
typedef enum { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost } cudaMemcpyKind;
enum {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
struct cudaDeviceProp {
    char name[256];
    int major, minor;
};

#ifdef __cplusplus
extern "C" {
#endif
/* In psa_cuda.cu's object, by emu.h. */
extern cudaError_t cudaGetDevice(int *device);
extern cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device);
#ifdef __cplusplus
}
#endif

static inline const char *cudaGetErrorString(cudaError_t e) {
    return e == cudaSuccess                 ? "no error"
           : e == cudaErrorMemoryAllocation ? "out of memory"
           : e == cudaErrorNoDevice         ? "no CUDA-capable device is detected"
                                            : "unspecified launch failure";
}

static inline cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "emulator");
    cudaDeviceGetAttribute(&p->major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&p->minor, cudaDevAttrComputeCapabilityMinor, device);
    return cudaSuccess;
}

static inline cudaError_t cudaMalloc(void **p, size_t size) {
    if (posix_memalign(p, 256, size) != 0) return cudaErrorMemoryAllocation;
    memset(*p, 0xff, size);
    return cudaSuccess;
}

static inline cudaError_t cudaFree(void *p) {
    free(p);
    return cudaSuccess;
}

static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind) {
    (void)kind;
    memcpy(to, from, size);
    return cudaSuccess;
}

static inline cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    (void)stream;
    memset(to, value, size);
    return cudaSuccess;
}

static inline cudaError_t cudaEventCreate(cudaEvent_t *e) {
    *e = (cudaEvent_t)calloc(1, sizeof **e);
    return *e ? cudaSuccess : cudaErrorMemoryAllocation;
}

static inline cudaError_t cudaEventDestroy(cudaEvent_t e) {
    free(e);
    return cudaSuccess;
}

static inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t stream) {
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, e);
    return cudaSuccess;
}

static inline cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    (void)e;
    return cudaSuccess;
}

static inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = (float)((double)(b->tv_sec - a->tv_sec) * 1e3 + (double)(b->tv_nsec - a->tv_nsec) * 1e-6);
    return cudaSuccess;
}
#endif
