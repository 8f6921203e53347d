/* psa_cuda.cu - Pyramid Sparse Attention on NVIDIA GPUs: the stages of psa.h as CUDA kernels. MIT licence, as psa.h.
 *
 * STATE. This has not run on hardware yet. It compiles for sm_80 to sm_120 without spills, and every kernel is compared
 * with the CPU library on an emulator of CUDA threads (tests/cuda). Speed has not been measured at all.
 *
 * BUILD
 *
 *     nvcc -O3 -std=c++17 -gencode arch=compute_80,code=[sm_80,compute_80] -c psa_cuda.cu    (or: make cuda)
 *
 *     One object for a program that compiles psa.h with PSA_IMPLEMENTATION somewhere. Needs the CUDA runtime, 12.0 or
 *     later. C declarations: psa.h with PSA_CUDA defined, section >>cuda; in use: examples/cuda_attention.c.
 *
 * DATA FLOW
 *
 *     k, v -> pool -> pyramid of means -----------------------------+
 *     q, k -> score -> importance of block pairs -> mask -> list -> attend -> out, lse
 *                                       the caller's map -> list ->    |
 *                                                                      +-> parts -> combine, where queries are few
 *
 *     The list of a query block: how many KV blocks it reads at levels 1, 2, 4, ..., then their indices, level by
 *     level. Read one after the other, a block at level L as block_k/L rows, they are one stream of rows; attend cuts
 *     it into tiles. A tile mixes blocks and levels, and a block costs what its level says.
 *
 *     Hopper has an attend of its own, by wgmma and TMA. Until it has run on hardware it is taken only where the
 *     environment says PSA_SM90=1; what it does not do (head dimensions other than 64 and 128, or two of them; query
 *     blocks of up to 64 rows; split streams) goes to the other one. It needs the code for sm_90a:
 *     -gencode arch=compute_90a,code=sm_90a.
 *
 * CONTENTS   >>device  >>job  >>pool  >>score  >>mask  >>attend  >>hopper  >>combine  >>host
 *
 * LIMITS
 *
 *     Compute capability 8.0 or later. K and V are read as f16 if k is f16, else as bf16, with f32 sums: f32 inputs are
 *     converted on the way (k and v into work, by pool). Means are stored in that type too. Data pointers and the
 *     strides of out are multiples of 16 bytes. At most 65535 KV blocks; ANTIDIAGONAL needs stride * D, D rounded up to
 *     64, 128 or 256, up to 1024; up to 4096 where a block may have 227 KB of shared memory. Otherwise as psa.h, but
 *     that an entry of a caller's map that is no level counts as level 1 (the device cannot report it).
 */

#define PSA_CUDA
#include "psa.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ================================================================================================================= */
/* >>device: everything that only a GPU has. tests/cuda/emu.h has the same functions for the CPU.                    */
/* ================================================================================================================= */

#define PSA__DEVICE [[maybe_unused]] static __device__ __forceinline__ /* but sm_90a none needs what is Hopper's */

#ifdef PSA_CUDA_EMULATED
#include "emu.h"
#else
#include <cuda.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

struct psa__bf16 { static constexpr uint32_t EXPONENT = 0x7f80; };
struct psa__f16 { static constexpr uint32_t EXPONENT = 0x7c00; };

/* Shared memory is one dynamic block; addresses in it are offsets from here. */
extern __shared__ __align__(1024) unsigned char psa__shared[];

PSA__DEVICE uint32_t psa__address(uint32_t offset) { return (uint32_t)__cvta_generic_to_shared(psa__shared) + offset; }

template <class V> PSA__DEVICE V psa__lds(uint32_t from) { return *reinterpret_cast<const V *>(psa__shared + from); }
template <class V> PSA__DEVICE void psa__sts(uint32_t to, const V &v) { *reinterpret_cast<V *>(psa__shared + to) = v; }

PSA__DEVICE void psa__barrier() { __syncthreads(); }
PSA__DEVICE void psa__sync_warp() { __syncwarp(); }

/* 16 bytes from global to shared memory, or zeros; they are there after commit and wait<N>, which leaves the last N
 * groups under way, and for other threads after a barrier too. */
PSA__DEVICE void psa__cp_async(uint32_t to, const void *from, bool exists)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(psa__address(to)), "l"(from),
                 "r"(exists ? 16 : 0)
                 : "memory");
}
PSA__DEVICE void psa__cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> PSA__DEVICE void psa__cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

/* Four 8x8 matrices of 16-bit elements; lane 8i+j gives the address of row j of matrix i. _t: transposed. */
#define PSA__LDMATRIX(kind)                                                                                            \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" kind ".shared.b16 {%0,%1,%2,%3}, [%4];"                               \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                                      \
                 : "r"(psa__address(offset))                                                                           \
                 : "memory")
PSA__DEVICE void psa__ldmatrix(uint32_t (&r)[4], uint32_t offset) { PSA__LDMATRIX(""); }
PSA__DEVICE void psa__ldmatrix_t(uint32_t (&r)[4], uint32_t offset) { PSA__LDMATRIX(".trans"); }

/* c[16][8] += a[16][16] b[16][8]. Lane 4g+t holds rows g and g+8, columns 2t and 2t+1 of c. */
#define PSA__MMA(type)                                                                                                 \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
                 "{%0,%1,%2,%3};"                                                                                      \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
typedef const uint32_t (&psa__a)[4];
PSA__DEVICE void psa__mma(psa__bf16, float (&c)[4], psa__a a, uint32_t b0, uint32_t b1) { PSA__MMA("bf16"); }
PSA__DEVICE void psa__mma(psa__f16, float (&c)[4], psa__a a, uint32_t b0, uint32_t b1) { PSA__MMA("f16"); }

#define PSA__PACK(type)                                                                                                \
    uint32_t x;                                                                                                        \
    asm("cvt.rn." type "x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));                                          \
    return x
PSA__DEVICE uint32_t psa__pack(psa__bf16, float low, float high) { PSA__PACK("bf16"); }
PSA__DEVICE uint32_t psa__pack(psa__f16, float low, float high) { PSA__PACK("f16"); }
PSA__DEVICE float psa__to_float(psa__bf16, uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
PSA__DEVICE float psa__to_float(psa__f16, uint16_t h) { return __half2float(__ushort_as_half(h)); }
PSA__DEVICE float psa__as_float(uint32_t u) { return __uint_as_float(u); }
PSA__DEVICE uint32_t psa__as_bits(float x) { return __float_as_uint(x); }

template <class V> PSA__DEVICE V psa__shuffle(V v, int from) { return __shfl_sync(~0u, v, from); }
template <class V> PSA__DEVICE V psa__shuffle_xor(V v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
PSA__DEVICE uint32_t psa__ballot(bool x) { return __ballot_sync(~0u, x); }
PSA__DEVICE uint32_t psa__draw(uint32_t *ticket) { return atomicAdd(ticket, 1u); }

/* One MUFU; denormal results are 0. ex2 of two 16-bit numbers is two MUFUs as well, and less accurate. */
PSA__DEVICE float psa__exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Hides from the compiler what x is: it would compute the addresses of all steps before the loop and spill them. */
PSA__DEVICE uint32_t psa__opaque(uint32_t x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* ---- of Hopper; sm_90a alone has it ---- */

/* The threads of some warps wait for each other. take_turn and give_turn: those that take wait for those that give;
 * for speed alone, nothing depends on it. */
PSA__DEVICE void psa__group_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PSA__DEVICE void psa__take_turn(int id, int threads) { psa__group_sync(id, threads); }
PSA__DEVICE void psa__give_turn(int id, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Barriers in shared memory, 8 bytes each. A phase ends when all have arrived and all bytes that they expect are there;
 * wait returns when the current phase has the other parity. A warp arrives as one, after all that its lanes read and
 * wrote. */
PSA__DEVICE void psa__bar_init(uint32_t at, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(psa__address(at)), "r"(arrivals) : "memory");
}
PSA__DEVICE void psa__bar_arrive(uint32_t at)
{
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(psa__address(at)) : "memory");
}
PSA__DEVICE void psa__bar_expect(uint32_t at, uint32_t bytes)
{
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(psa__address(at)), "r"(bytes)
                 : "memory");
}
PSA__DEVICE void psa__bar_wait(uint32_t at, uint32_t parity)
{
    uint32_t over = 0;
    while (!over) {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(over)
                     : "r"(psa__address(at)), "r"(parity)
                     : "memory");
    }
}

/* What this thread wrote to shared memory, barriers too, is there for TMA and wgmma. */
PSA__DEVICE void psa__fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Registers of a thread of the warpgroup, from now on. */
template <int N> PSA__DEVICE void psa__more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> PSA__DEVICE void psa__fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* A box of a tensor [batch][head][half][row][64 columns], with zeros for what is outside of it, goes to shared memory,
 * swizzled; its bytes are then counted by the barrier. */
typedef CUtensorMap psa__map;
PSA__DEVICE void psa__box(uint32_t to, const psa__map &map, int row, int half, int head, int batch, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(psa__address(to)), "l"(&map), "r"(0), "r"(row), "r"(half),
                 "r"(head), "r"(batch), "r"(psa__address(bar))
                 : "memory");
}

/* false: the driver does not know or refuses it. */
static bool psa__make_map(psa__map *map, const void *data, const uint64_t *size, const uint64_t *stride,
                          const uint32_t *box)
{
    typedef CUresult encode(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                            const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
    void *f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
#else
    cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found);
#endif
    if (e != cudaSuccess || found != cudaDriverEntryPointSuccess) return false;
    return reinterpret_cast<encode *>(f)(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, (void *)(uintptr_t)data,
                                         (const cuuint64_t *)size, (const cuuint64_t *)stride, box, ones,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* Whether there is code of the kernel for sm_90a. For others it is empty and takes next to no registers. */
template <class J> static bool psa__has_code(void (*kernel)(J))
{
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, reinterpret_cast<const void *>(kernel)) == cudaSuccess && a.numRegs > 64;
}

/* An operand of wgmma in shared memory with the 128-byte swizzle. K-major: `stride` bytes from 8 rows to the next 8.
 * MN-major: that for k, and `leading` from 64 columns to the next 64. */
PSA__DEVICE uint64_t psa__descriptor(uint32_t at, uint32_t leading, uint32_t stride)
{
    return (psa__address(at) & 0x3ffff) >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 |
           (uint64_t)1 << 62;
}

/* The accumulators d and the registers of A belong to wgmma from here to the wait. */
PSA__DEVICE void psa__wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PSA__DEVICE void psa__wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/* All but the last N groups are done; d, which one of them made, is not read before. */
template <int N, int C> PSA__DEVICE void psa__wgmma_wait(float (&d)[C][4])
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#pragma unroll
    for (int i = 0; i < C; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}

/* d[64][8C] (+)= a[64][16] b[16][8C] by a warpgroup; of its 64 rows warp w holds 16 as in psa__mma. */
#define PSA__D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define PSA__D32 PSA__D4(0), PSA__D4(1), PSA__D4(2), PSA__D4(3), PSA__D4(4), PSA__D4(5), PSA__D4(6), PSA__D4(7)
#define PSA__D64                                                                                                       \
    PSA__D32, PSA__D4(8), PSA__D4(9), PSA__D4(10), PSA__D4(11), PSA__D4(12), PSA__D4(13), PSA__D4(14), PSA__D4(15)
#define PSA__TEN(t)                                                                                                    \
    "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define PSA__32 "{" PSA__TEN() PSA__TEN(1) PSA__TEN(2) "%30, %31}, "
#define PSA__64 "{" PSA__TEN() PSA__TEN(1) PSA__TEN(2) PSA__TEN(3) PSA__TEN(4) PSA__TEN(5) "%60, %61, %62, %63}, "
#define PSA__WGMMA(n, type) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " "
#define PSA__WGMMA_QK(type)                                                                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" PSA__WGMMA("128", type) PSA__64                         \
                 "%64, %65, p, 1, 1, 0, 0;\n}"                                                                         \
                 : PSA__D64                                                                                            \
                 : "l"(a), "l"(b), "r"((int)add))
#define PSA__WGMMA_PV(type)                                                                                            \
    asm volatile(PSA__WGMMA("128", type) PSA__64 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                              \
                 : PSA__D64                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define PSA__WGMMA_PV64(type)                                                                                          \
    asm volatile(PSA__WGMMA("64", type) PSA__32 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                               \
                 : PSA__D32                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
typedef float (&psa__d128)[16][4];
typedef float (&psa__d64)[8][4];
PSA__DEVICE void psa__wgmma(psa__bf16, psa__d128 d, uint64_t a, uint64_t b, bool add) { PSA__WGMMA_QK("bf16"); }
PSA__DEVICE void psa__wgmma(psa__f16, psa__d128 d, uint64_t a, uint64_t b, bool add) { PSA__WGMMA_QK("f16"); }
PSA__DEVICE void psa__wgmma(psa__bf16, psa__d128 d, psa__a a, uint64_t b) { PSA__WGMMA_PV("bf16"); }
PSA__DEVICE void psa__wgmma(psa__f16, psa__d128 d, psa__a a, uint64_t b) { PSA__WGMMA_PV("f16"); }
PSA__DEVICE void psa__wgmma(psa__bf16, psa__d64 d, psa__a a, uint64_t b) { PSA__WGMMA_PV64("bf16"); }
PSA__DEVICE void psa__wgmma(psa__f16, psa__d64 d, psa__a a, uint64_t b) { PSA__WGMMA_PV64("f16"); }

template <class J>
static cudaError_t psa__enqueue(void (*kernel)(J), unsigned x, unsigned y, int threads, size_t shared, void *stream,
                                const J &job)
{
    J copy = job;
    void *args[1] = {&copy};
    const void *f = reinterpret_cast<const void *>(kernel);
    cudaError_t e = cudaFuncSetAttribute(f, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
    if (e != cudaSuccess) return e;
    return cudaLaunchKernel(f, dim3(x, y), dim3((unsigned)threads), args, shared, (cudaStream_t)stream);
}
#endif

#define PSA__INF (__builtin_huge_valf())

/* ================================================================================================================= */
/* >>job: what a kernel is told                                                                                      */
/* ================================================================================================================= */

constexpr int PSA__THREADS = 128;              /* of every kernel: four warps */
constexpr int PSA__WARPS = PSA__THREADS / 32;
constexpr int PSA__CTAS = 6;                   /* of small kernels on an SM: left to itself ptxas spills to have more */
constexpr uint32_t PSA__NONE = 0xffffffffu;    /* a stream row that does not exist */
constexpr uint32_t PSA__POOLED = 0x80000000u;  /* a stream row that is a pooled one; the rest is its number */
constexpr uint32_t PSA__MIXED = 0xffffffffu;   /* in place of a bias: 32 rows have more than one, ... */
constexpr uint32_t PSA__STRADDLE = 0xfffffffeu; /* ... and some queries do not see some of them */
constexpr int PSA__NEAR_KEYS = 8192;           /* blocks that mask sorts in shared memory: 64 KB of keys */
constexpr int PSA__MASK_CTAS = 1024;           /* of mask at most: each sorts more than that in memory of its own */
constexpr float PSA__LOWEST = -3.402823466e+38f;         /* a finite stand-in for -inf as a running maximum */
constexpr float PSA__BIG = 10633823966279326983230456482242756608.0f; /* 2^123: scoring clamps its logits to +-BIG */
constexpr float PSA__RESCALE = 8.0f;           /* accumulators are rescaled when a maximum grew by more than 2^8 */
constexpr float PSA__LOG2E = 1.44269504088896340736f, PSA__LN2 = 0.69314718055994530942f;

struct psa__job {
    psa_plan plan;            /* what follows is derived from it, and int where kernels compute with it */
    psa_tensor q, k, v, out;  /* as in the plan, with data */
    psa_tensor read_k, read_v; /* what score and attend read: k and v, or pool's copies in the right order and type */
    int shared_max;           /* bytes that a block may have */
    int capability, sms;      /* of the device: 10 * major + minor, multiprocessors */
    int B, Hq, Hkv, group, Nq, Nk, D, Dv, nq, nk, block_q, block_k, log2_block_k;
    int causal, shift;        /* query i stands at token i + shift and sees the tokens up to that one */
    float scale;              /* positive, includes log2(e): logits are in units of log2 */
    uint32_t flip;            /* 0x80008000 if the caller's scale is negative: the sign moves to q */
    float *lse;

    char *pooled_k, *pooled_v; /* T [B][Hkv][pooled_rows][D], [Dv] */
    uint8_t *cap;              /* [B][Hkv][nk] coarsest level that the similarity cap allows */

    float *scores;             /* [B][Hq][nq][nk] */
    int lanes, keys;           /* queries that score a query block, keys of a KV block */
    int columns, units;        /* a block's keys in the MMA, padded: 8 or a multiple of 16; in sixteens */
    int lane_rows, key_rows;   /* rows that a lane and a key stand for; SAMPLE: 1 */
    int parts;                 /* a lane is this many rows of D side by side: `stride` for ANTIDIAGONAL, else 1 */
    int key_level;             /* POOLED: keys are the pooled rows of level 1 << key_level; 0: keys are tokens */
    int biased;                /* POOLED: logits of keys that stand for c tokens have the bias ln c */
    int lane_tiles;            /* m16 tiles of lanes that are done together */
    int strip;                 /* KV blocks whose maxima fit into shared memory */
    int use_max, norm;

    int n_ends, finest;        /* levels in use, and the finest that has blocks */
    int64_t count_end[PSA_MAX_LEVELS]; /* TOPK: ends by level_count; all 0: level_end is used */
    uint64_t *far_keys;        /* [MASK_CTAS][n_keys] for mask to sort in; NULL: shared memory holds them */
    int n_keys;                /* nk rounded up to a power of two */
    uint8_t *levels;           /* [B][Hq][nq][nk], NULL for the list of a dense map */

    uint16_t *count;           /* [B][Hq][nq][PSA_MAX_LEVELS] the list: KV blocks at levels 1, 2, 4, ... */
    uint16_t *index;           /* [B][Hq][nq][nk] and which */
    int q_tiles;               /* attend: tiles of query rows in a query block */
    int section;               /* attend: KV heads whose K and V fit into the L2 cache together */
    uint32_t *ticket;          /* attend: query tiles that were drawn, by CTAs that go through several */
    int splits;                /* attend: parts of the stream, each its own CTA */
    psa_tensor part;            /* combine: part 0 of the results; the next one lies part_bytes behind it */
    int64_t part_bytes;
    float *part_lse;           /* [splits][B][Hq][Nq] */
    int merges;                /* combine: part 0 is out with its lse, part 1 is `part` */
};

struct alignas(16) psa__u4 { /* 16 bytes, moved by one instruction */
    uint32_t x[4];
};
struct alignas(8) psa__f2 {
    float x, y;
};

PSA__DEVICE int psa__imin(int a, int b) { return a < b ? a : b; }

PSA__DEVICE char *psa__row(const psa_tensor &t, int b, int h, int64_t i)
{
    return (char *)t.data + b * (int64_t)t.nb[3] + h * (int64_t)t.nb[2] + i * (int64_t)t.nb[1];
}

PSA__DEVICE int64_t psa__token(const psa_order &o, int b, int h, int i)
{
    return o.index ? o.index[b * o.stride_b + h * o.stride_h + i] : i;
}

PSA__DEVICE int psa__block_q_rows(const psa__job &job, int iq)
{
    return psa__imin(job.block_q, job.Nq - iq * job.block_q);
}

PSA__DEVICE int psa__block_k_rows(const psa__job &job, int jk)
{
    return psa__imin(job.block_k, job.Nk - jk * job.block_k);
}

/* KV blocks that some row of query block iq sees: the first n. */
PSA__DEVICE int psa__n_visible(const psa__job &job, int iq)
{
    int last = iq * job.block_q + psa__block_q_rows(job, iq) - 1 + job.shift;
    if (!job.causal) return job.nk;
    return last < 0 ? 0 : psa__imin(last / job.block_k + 1, job.nk);
}

/* KV blocks that every row sees in full; those between this and n_visible straddle the diagonal. */
PSA__DEVICE int psa__n_whole(const psa__job &job, int iq)
{
    int seen = iq * job.block_q + job.shift + 1;
    if (!job.causal || seen >= job.Nk) return job.nk;
    return seen < 0 ? 0 : seen / job.block_k;
}

PSA__DEVICE float psa__load(const char *row, int type, int i)
{
    if (type == PSA_F32) return reinterpret_cast<const float *>(row)[i];
    uint16_t h = reinterpret_cast<const uint16_t *>(row)[i];
    return type == PSA_F16 ? psa__to_float(psa__f16(), h) : psa__to_float(psa__bf16(), h);
}

/* Columns 8c .. 8c+7 of a row, as f32. */
PSA__DEVICE void psa__load8(float (&x)[8], const char *row, int type, int c)
{
    const psa__u4 *chunk = reinterpret_cast<const psa__u4 *>(row) + (type == PSA_F32 ? 2 * c : c);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
        for (int i = 0; i < 8; i++) x[i] = psa__load(row, type, 8 * c + i);
    } else if (type == PSA_F32) {
        psa__u4 low = chunk[0], high = chunk[1];
        for (int i = 0; i < 4; i++) x[i] = psa__as_float(low.x[i]), x[4 + i] = psa__as_float(high.x[i]);
    } else {
        psa__u4 u = chunk[0];
        for (int i = 0; i < 8; i++) {
            uint16_t h = (uint16_t)(u.x[i / 2] >> i % 2 * 16);
            x[i] = type == PSA_F16 ? psa__to_float(psa__f16(), h) : psa__to_float(psa__bf16(), h);
        }
    }
}

template <class T> PSA__DEVICE psa__u4 psa__pack8(const float (&x)[8])
{
    psa__u4 u;
    for (int i = 0; i < 4; i++) u.x[i] = psa__pack(T(), x[2 * i], x[2 * i + 1]);
    return u;
}

/* The mean of n query rows from position `first` on, columns 8c .. 8c+7; zeros if n <= 0 or beyond D. */
template <class T> PSA__DEVICE psa__u4 psa__query(const psa__job &job, int b, int h, int first, int n, int c)
{
    float x[8] = {}, y[8];
    if (c >= job.D / 8) n = 0;
    for (int i = first; i < first + n; i++) {
        psa__load8(y, psa__row(job.q, b, h, psa__token(job.plan.desc.order_q, b, h, i)), job.q.type, c);
        for (int e = 0; e < 8; e++) x[e] += y[e];
    }
    for (int e = 0; n > 1 && e < 8; e++) x[e] *= 1.0f / (float)n;
    psa__u4 u = psa__pack8<T>(x);
    for (int e = 0; e < 4; e++) u.x[e] ^= job.flip;
    return u;
}

/* Two elements of any type. */
PSA__DEVICE void psa__store2(char *to, int type, const psa__f2 &x)
{
    if (type == PSA_F32) *reinterpret_cast<psa__f2 *>(to) = x;
    else if (type == PSA_F16) *reinterpret_cast<uint32_t *>(to) = psa__pack(psa__f16(), x.x, x.y);
    else *reinterpret_cast<uint32_t *>(to) = psa__pack(psa__bf16(), x.x, x.y);
}

/* Rows of DP 16-bit elements in shared memory lie in chunks of 16 bytes, in groups of 8 rows x 64 columns. There a row
 * has 128 bytes, all banks, so without the XOR the eight rows that ldmatrix reads at one chunk would be eight deep in
 * the same four banks. It is the 128-byte swizzle of TMA and wgmma. Tiles begin at multiples of 8 rows, so
 * at(row, c + 2*k) is at(row, c) ^ step16(k) for c 0 or 1. */
template <int DP> PSA__DEVICE uint32_t psa__at(int row, int chunk)
{
    return (uint32_t)((row >> 3) * DP * 16 + (chunk >> 3) * 1024 + (row & 7) * 128 + (((chunk ^ row) & 7) << 4));
}
PSA__DEVICE uint32_t psa__step16(int k) { return (uint32_t)((k & 3) * 32 + (k >> 2) * 1024); }

/* Sum over the block of what the threads before this one gave, in thread order; total: over all. Uses the first 8
 * bytes of shared memory for each warp. */
template <class V> PSA__DEVICE V psa__scan(V v, V *total)
{
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    V before = 0, sum = 0;
    for (int d = 1; d < 32; d *= 2) {
        V x = psa__shuffle(v, lane - d);
        if (lane >= d) v += x;
    }
    if (lane == 31) psa__sts((uint32_t)warp * 8, v);
    psa__barrier();
    for (int w = 0; w < PSA__WARPS; w++) {
        V x = psa__lds<V>((uint32_t)w * 8);
        if (w < warp) before += x;
        sum += x;
    }
    psa__barrier();
    *total = sum;
    v = psa__shuffle(v, lane - 1);
    return lane > 0 ? before + v : before;
}

/* ================================================================================================================= */
/* >>pool: every level of a block in one pass, the similarity cap, copies in the order and type that attend reads    */
/* ================================================================================================================= */

/* One CTA per KV block and tensor (grid.y: 0 K, 1 V). A thread takes 8 rows x 8 columns at a time:
 *
 *        columns 0..7   8..15  ...  D       level 2, 4, 8: sums of pairs in registers, mean = sum / count
 *   rows +-------------+------------
 *   0..7 | one thread  |                   level 16, 32, ...: the sums of 8 rows go to shared memory,
 *        +-------------+------------         column by column, and are added in pairs, group 2t+1 to group 2t
 *   8..  |             |
 *
 * Sums of pairs of sums, divided at the end: the order of psa.h. Rows beyond the end are zero and not counted. */

constexpr uint32_t PSA__POOL_BYTES = PSA_MAX_BLOCK_K / 8 * PSA_MAX_D * 4; /* of sums */

struct psa__pool_block {
    int D, b, hkv, jk, n; /* n: rows that exist */
    const char *in;       /* the head's rows: K or V, ... */
    int64_t stride;
    int type;
    char *copy, *pooled;  /* ... their copies (NULL: none are made), the means */
};

PSA__DEVICE const char *psa__pool_in(const psa__job &job, const psa__pool_block &w, int position)
{
    return w.in + psa__token(job.plan.desc.order_k, w.b, w.hkv, position) * w.stride;
}

/* Group t of level 1 << i, of which x is the sum, at columns 8c. */
template <class T>
PSA__DEVICE void psa__pool_emit(const psa__job &job, const psa__pool_block &w, int i, int t, int c, const float (&x)[8])
{
    int count = psa__imin(1 << i, w.n - (t << i));
    if (i >= job.plan.n_levels || count <= 0) return;
    float mean[8], factor = 1.0f / (float)count;
    int64_t row = job.plan.level_row[i] + w.jk * (job.block_k >> i) + t;
    for (int e = 0; e < 8; e++) mean[e] = x[e] * factor;
    *reinterpret_cast<psa__u4 *>(w.pooled + (row * w.D + 8 * c) * 2) = psa__pack8<T>(mean);
}

/* From rows [8 >> (I-1)] of level 1 << (I-1) those of level 1 << I, in place. */
template <class T, int I>
PSA__DEVICE void psa__pool_pairs(const psa__job &job, const psa__pool_block &w, int g, int c, float (&rows)[8][8])
{
#pragma unroll
    for (int t = 0; t < 8 >> I; t++) {
#pragma unroll
        for (int e = 0; e < 8; e++) rows[t][e] = rows[2 * t][e] + rows[2 * t + 1][e];
        psa__pool_emit<T>(job, w, I, (g << (3 - I)) + t, c, rows[t]);
    }
}

/* Rows 8g .. 8g+7 at columns 8c: copies them, emits levels 2, 4, 8 and leaves the sum of all in rows[0]. */
template <class T>
PSA__DEVICE void psa__pool_rows(const psa__job &job, const psa__pool_block &w, int g, int c, float (&rows)[8][8])
{
#pragma unroll
    for (int r = 0; r < 8; r++) {
        int at = 8 * g + r, position = w.jk * job.block_k + at;
#pragma unroll
        for (int e = 0; e < 8; e++) rows[r][e] = 0.0f;
        if (at < w.n) {
            psa__load8(rows[r], psa__pool_in(job, w, position), w.type, c);
        }
        if (w.copy && at < w.n) {
            *reinterpret_cast<psa__u4 *>(w.copy + ((int64_t)position * w.D + 8 * c) * 2) = psa__pack8<T>(rows[r]);
        }
    }
    psa__pool_pairs<T, 1>(job, w, g, c, rows);
    psa__pool_pairs<T, 2>(job, w, g, c, rows);
    psa__pool_pairs<T, 3>(job, w, g, c, rows);
}

/* Cosine of two rows; 0 if one of them is zero. */
PSA__DEVICE float psa__cosine(const char *a, const char *b, int type, int D)
{
    float aa = 0, bb = 0, ab = 0;
    for (int c = 0; c < D / 8; c++) {
        float x[8], y[8];
        psa__load8(x, a, type, c);
        psa__load8(y, b, type, c);
        for (int e = 0; e < 8; e++) {
            aa += x[e] * x[e];
            bb += y[e] * y[e];
            ab += x[e] * y[e];
        }
    }
    return aa > 0 && bb > 0 ? ab / (sqrtf(aa) * sqrtf(bb)) : aa == aa && bb == bb ? 0.0f : ab;
}

/* Groups of level 1 << i with two tokens at least. */
PSA__DEVICE int psa__groups(int n, int i) { return (n >> i) + ((n & ((1 << i) - 1)) > 1); }

/* The coarsest level whose groups' first and last tokens have a mean cosine above the level's threshold. */
PSA__DEVICE void psa__similarity_cap(const psa__job &job, const psa__pool_block &w)
{
    int cap = 0;
    psa__barrier(); /* all are done with the sums */
    for (int i = 1; i <= job.plan.desc.n_sim_min; i++) {
        int groups = psa__groups(w.n, i);
        double sum = 0, total;
        for (int t = (int)threadIdx.x; t < groups; t += PSA__THREADS) {
            int first = w.jk * job.block_k + (t << i), last = first + psa__imin(1 << i, w.n - (t << i)) - 1;
            sum += psa__cosine(psa__pool_in(job, w, first), psa__pool_in(job, w, last), w.type, w.D);
        }
        psa__scan(sum, &total);
        if (groups && total / groups > job.plan.desc.sim_min[i - 1]) cap = i;
    }
    if (threadIdx.x == 0) job.cap[(int64_t)(w.b * job.Hkv + w.hkv) * job.nk + w.jk] = (uint8_t)(1 << cap);
}

template <class T> __global__ void __launch_bounds__(PSA__THREADS) psa__pool(const __grid_constant__ psa__job job)
{
    int is_v = (int)blockIdx.y, head = (int)blockIdx.x / job.nk;
    psa__pool_block w;
    w.D = is_v ? job.Dv : job.D;
    w.b = head / job.Hkv;
    w.hkv = head % job.Hkv;
    w.jk = (int)blockIdx.x % job.nk;
    w.n = psa__block_k_rows(job, w.jk);
    w.in = is_v ? psa__row(job.v, w.b, w.hkv, 0) : psa__row(job.k, w.b, w.hkv, 0);
    w.stride = (int64_t)(is_v ? job.v.nb[1] : job.k.nb[1]);
    w.type = job.k.type;
    w.copy = is_v ? psa__row(job.read_v, w.b, w.hkv, 0) : psa__row(job.read_k, w.b, w.hkv, 0);
    if (w.copy == w.in) w.copy = nullptr;
    w.pooled = (is_v ? job.pooled_v : job.pooled_k) + (int64_t)head * job.plan.pooled_rows * w.D * 2;

    int chunks = w.D / 8, all = job.block_k / 8 * chunks;
    for (int item = (int)threadIdx.x; item < all; item += PSA__THREADS) {
        float rows[8][8];
        psa__pool_rows<T>(job, w, item / chunks, item % chunks, rows);
#pragma unroll
        for (int e = 0; e < 8; e++) psa__sts((uint32_t)(e * all + item) * 4, rows[0][e]);
    }
    for (int i = 4; i < job.plan.n_levels; i++) { /* the sum of group t lies where its first 8 rows lay */
        psa__barrier();
        for (int item = (int)threadIdx.x; item < (job.block_k >> i) * chunks; item += PSA__THREADS) {
            int t = item / chunks, c = item % chunks, at = (t << (i - 3)) * chunks + c;
            float x[8];
            for (int e = 0; e < 8; e++) {
                uint32_t a = (uint32_t)(e * all + at) * 4, b = a + (uint32_t)(chunks << (i - 4)) * 4;
                x[e] = psa__lds<float>(a) + psa__lds<float>(b);
                psa__sts(a, x[e]);
            }
            psa__pool_emit<T>(job, w, i, t, c, x);
        }
    }
    if (!is_v && job.plan.desc.n_sim_min) psa__similarity_cap(job, w);
}

/* ================================================================================================================= */
/* >>score: how important is a block pair                                                                            */
/* ================================================================================================================= */

/* One CTA per query block and head. `lanes` are the query vectors that stand for the block, `keys` those of a KV block:
 * sampled tokens, groups of tokens side by side, block means, or all tokens. With s = q k in units of log2:
 *
 *   shared memory:  A [parts][lanes][DP] | B [4 warps][STAGES][16 keys][DP] | strip f32 [lanes][KV blocks]
 *
 *   warp w takes KV blocks w, w+4, ... (pairs of blocks where a block has only 8 columns) and brings their keys in by
 *   itself, 16 at a time, STAGES - 1 ahead: no barrier in the loop. A stays in registers (if parts == 1).
 *   Per lane and block: bm = max s, bs = sum exp2(s - bm); the strip keeps bm, or bm + log2 bs where masses are wanted.
 *   Per lane: m = max bm, z = sum of bs exp2(bm - m), over the warps.
 *   Then score[J] = max or sum over lanes of exp2(strip[lane][J] - m) / z, and the row is scaled to sum 1.
 *
 * Where the strip does not hold all KV blocks, they are gone through twice: for m and z, then strip by strip. */

template <int DP_> struct psa__score_shape {
    static constexpr int DP = DP_, STAGES = DP > 128 ? 2 : 3, KS = DP / 16; /* B: 48 KB at D 128, 64 KB at D 256 */
    static constexpr int TILES = DP > 128 ? 1 : 2; /* m16 tiles of lanes at most: 64 registers for A */
    static constexpr uint32_t STAGE = 16 * DP * 2, B_BYTES = PSA__WARPS * STAGES * STAGE;
    static constexpr uint32_t LANE_BYTES = 16 * TILES * (4 + 8 + PSA__WARPS * 8); /* token; m, z; the warps' m, z */
};

/* What a CTA scores, and the offsets of the parts of shared memory. */
struct psa__score_block {
    int b, h, hkv, iq, n, whole; /* KV blocks seen, and seen in full */
    int lanes, first;            /* lanes of the query block, and the first of those in A */
    uint32_t at_b, at_token, at_mz, at_warp_mz, at_strip, strip_row; /* strip_row: bytes of a lane */
};

/* Offset of the i-th sampled token in a block of n tokens, or -1; see psa__sample in psa.h. */
PSA__DEVICE int psa__sampled(const uint8_t *offset, int i, int n)
{
    if (offset[i] < n) return offset[i];
    return i == 0 ? offset[0] % n : -1;
}

/* Lanes of query block iq: the last one may have fewer. */
PSA__DEVICE int psa__n_lanes(const psa__job &job, int iq)
{
    int n = psa__block_q_rows(job, iq), lanes = 0;
    if (job.plan.desc.score != PSA_SCORE_SAMPLE) return (n + job.lane_rows - 1) / job.lane_rows;
    while (lanes < job.lanes && psa__sampled(job.plan.sample_q, lanes, n) >= 0) lanes++;
    return lanes;
}

/* First row of part `part` of lane i among the n of a query block; n or more: there is none, zeros stand for it. */
PSA__DEVICE int psa__lane_row(const psa__job &job, int n, int i, int part)
{
    if (job.plan.desc.score == PSA_SCORE_SAMPLE) return psa__sampled(job.plan.sample_q, i, n);
    return i * job.lane_rows + job.parts - 1 - part;
}

/* The last token that lane i stands for. */
PSA__DEVICE int psa__lane_token(const psa__job &job, int iq, int i)
{
    int n = psa__block_q_rows(job, iq), row = (i + 1) * job.lane_rows - 1;
    if (job.plan.desc.score == PSA_SCORE_SAMPLE) row = psa__lane_row(job, n, i, 0);
    return iq * job.block_q + psa__imin(row, n - 1) + job.shift;
}

/* The first token of key c of block jk; -1: there is no such key. */
PSA__DEVICE int psa__key_token(const psa__job &job, int jk, int c)
{
    int n = psa__block_k_rows(job, jk), at = c * job.key_rows;
    if (c >= job.keys || jk >= job.nk) return -1;
    if (job.plan.desc.score == PSA_SCORE_SAMPLE) at = psa__sampled(job.plan.sample_k, c, n);
    return at >= 0 && at < n ? jk * job.block_k + at : -1;
}

/* 16 columns of the product: a warp's item (a KV block, or two), the unit of 16 columns in it, the part. */
struct psa__step {
    int item, unit, part;
};

PSA__DEVICE psa__step psa__step_of(const psa__job &job, int first_item, int step)
{
    return {first_item + step / (job.parts * job.units) * PSA__WARPS, step / job.parts % job.units, step % job.parts};
}

/* KV block and key in it of column x (0..15) of a step. */
PSA__DEVICE void psa__column(const psa__job &job, const psa__step &s, int x, int *jk, int *key)
{
    bool pair = job.columns == 8; /* two blocks share a step */
    *jk = pair ? 2 * s.item + x / 8 : s.item;
    *key = pair ? x % 8 : s.unit * 16 + x;
}

/* The keys of a step go to shared memory at `to`. */
template <class S>
PSA__DEVICE void psa__score_load(const psa__job &job, const psa__score_block &w, const psa__step &s, uint32_t to)
{
    constexpr int CHUNKS = S::DP / 8;
    int lane = (int)threadIdx.x % 32, jk, key;
    psa__column(job, s, lane % 16, &jk, &key);
    int row = psa__key_token(job, jk, key);
    if (row >= 0 && job.plan.desc.score == PSA_SCORE_ANTIDIAGONAL) row = row + s.part < job.Nk ? row + s.part : -1;
    const char *base = psa__row(job.read_k, w.b, w.hkv, 0);
    int64_t stride = (int64_t)job.read_k.nb[1];
    if (job.key_level > 0) {
        stride = (int64_t)job.D * 2;
        int64_t first = (int64_t)(w.b * job.Hkv + w.hkv) * job.plan.pooled_rows + job.plan.level_row[job.key_level];
        base = job.pooled_k + first * stride;
        if (row >= 0) row >>= job.key_level;
    }
#pragma unroll
    for (int i = 0; i < CHUNKS / 2; i++) {
        int r = (lane + 32 * i) / CHUNKS, c = (lane + 32 * i) % CHUNKS, from = psa__shuffle(row, r);
        const char *at = base + (from < 0 ? 0 : from) * stride + (c < job.D / 8 ? c * 16 : 0);
        psa__cp_async(to + psa__at<S::DP>(r, c), at, from >= 0 && c < job.D / 8);
    }
}

/* The lanes from w.first on, all parts, into A. */
template <class T, class S> PSA__DEVICE void psa__score_lanes(const psa__job &job, const psa__score_block &w)
{
    constexpr int CHUNKS = S::DP / 8;
    int rows = 16 * job.lane_tiles, n = psa__block_q_rows(job, w.iq);
    for (int item = (int)threadIdx.x; item < job.parts * rows * CHUNKS; item += PSA__THREADS) {
        int c = item % CHUNKS, r = item / CHUNKS % rows, part = item / (CHUNKS * rows), lane = w.first + r;
        int from = lane < w.lanes ? psa__lane_row(job, n, lane, part) : n;
        psa__u4 u = psa__query<T>(job, w.b, w.h, w.iq * job.block_q + from,
                                  psa__imin(job.parts > 1 ? 1 : job.lane_rows, n - from), c);
        psa__sts((uint32_t)(part * rows * S::DP * 2) + psa__at<S::DP>(r, c), u);
    }
    for (int r = (int)threadIdx.x; r < rows; r += PSA__THREADS) {
        psa__sts(w.at_token + (uint32_t)r * 4, w.first + r < w.lanes ? psa__lane_token(job, w.iq, w.first + r) : 0);
    }
}

/* Maximum and sum of exp2(s - maximum) of two sets of logits together. */
PSA__DEVICE void psa__join(float *bm, float *bs, float other_bm, float other_bs)
{
    float top = fmaxf(*bm, other_bm);
    *bs = *bs * psa__exp2(*bm - top) + other_bs * psa__exp2(other_bm - top);
    *bm = top;
}

/* A step's logits (scaled by factor) into bm and bs of this thread's rows; a finished block into m and z, and, as
 * number jk - begin, into the strip if there is to be one. */
template <class S>
PSA__DEVICE void psa__score_reduce(const psa__job &job, const psa__score_block &w, const psa__step &now, int begin,
                                   bool keep, const float (&s)[S::TILES][2][4], float (&bm)[S::TILES][2],
                                   float (&bs)[S::TILES][2], float (&m)[S::TILES][2], float (&z)[S::TILES][2])
{
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    bool pair = job.columns == 8;
    float factor = job.scale / (float)job.parts;
#pragma unroll
    for (int i = 0; i < S::TILES * 4; i++) { /* tile, half, n8 tile */
        int half = i / 2 % 2, j = i % 2, row = 16 * (i / 4) + 8 * half + g, jk = 0, key;
        float x[2], &row_bm = bm[i / 4][half], &row_bs = bs[i / 4][half];
        if (i / 4 >= job.lane_tiles) continue;
        if (pair || (now.unit == 0 && j == 0)) row_bm = -PSA__BIG, row_bs = 0.0f;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            psa__column(job, now, 8 * j + 2 * t + e, &jk, &key);
            int token = psa__key_token(job, jk, key);
            float bias = job.biased ? log2f((float)psa__imin(job.key_rows, job.Nk - token)) : 0.0f;
            x[e] = s[i / 4][j][2 * half + e] * factor + bias;
            x[e] = fminf(fmaxf(x[e], -PSA__BIG), PSA__BIG); /* NaN becomes -BIG */
            bool hidden = token < 0 || (jk >= w.whole && psa__lds<int>(w.at_token + (uint32_t)row * 4) < token);
            if (hidden) x[e] = -PSA__INF;
        }
        float top = fmaxf(fmaxf(x[0], x[1]), -PSA__BIG);
        top = fmaxf(top, psa__shuffle_xor(top, 1));
        top = fmaxf(top, psa__shuffle_xor(top, 2));
        float sum = psa__exp2(x[0] - top) + psa__exp2(x[1] - top);
        sum += psa__shuffle_xor(sum, 1);
        sum += psa__shuffle_xor(sum, 2);
        psa__join(&row_bm, &row_bs, top, sum);
        if (jk >= w.n || (!pair && (j == 0 || now.unit < job.units - 1))) continue; /* the block goes on */
        psa__join(&m[i / 4][half], &z[i / 4][half], row_bm, row_bs);
        if (!keep || t != 0) continue;
        float value = job.use_max ? row_bm : row_bm + log2f(row_bs);
        psa__sts(w.at_strip + (uint32_t)row * w.strip_row + (uint32_t)(jk - begin) * 4, value);
    }
}

/* Maxima and sums of KV blocks begin .. end-1 for the lanes in A. keep: into the strip. m, z: of this thread's rows
 * [tile][half], over the blocks of its warp. */
template <class T, class S>
PSA__DEVICE void psa__score_blocks(const psa__job &job, const psa__score_block &w, int begin, int end, bool keep,
                                   float (&m)[S::TILES][2], float (&z)[S::TILES][2])
{
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, per_item = job.columns == 8 ? 2 : 1;
    int first = begin / per_item + warp, last = (end + per_item - 1) / per_item;
    int steps = first < last ? (last - first + PSA__WARPS - 1) / PSA__WARPS * job.units * job.parts : 0;
    uint32_t stage = w.at_b + (uint32_t)(warp * S::STAGES) * S::STAGE;
    uint32_t a[S::TILES][S::KS][4];
    float s[S::TILES][2][4], bm[S::TILES][2], bs[S::TILES][2];

    for (int i = 0; i < S::STAGES - 1; i++) {
        if (i < steps) psa__score_load<S>(job, w, psa__step_of(job, first, i), stage + (uint32_t)i * S::STAGE);
        psa__cp_commit();
    }
    for (int step = 0; step < steps; step++) {
        psa__step now = psa__step_of(job, first, step);
        int ahead = step + S::STAGES - 1;
        psa__cp_wait<S::STAGES - 2>();
        psa__sync_warp(); /* the other lanes' copies have landed, and all are done with the stage to be filled */
        uint32_t to = stage + (uint32_t)(ahead % S::STAGES) * S::STAGE;
        if (ahead < steps) psa__score_load<S>(job, w, psa__step_of(job, first, ahead), to);
        psa__cp_commit();
#pragma unroll
        for (int i = 0; i < S::TILES * S::KS; i++) {
            uint32_t part = (uint32_t)(now.part * 16 * job.lane_tiles * S::DP * 2);
            int row = (i / S::KS < job.lane_tiles ? i / S::KS * 16 : 0) + lane % 16;
            if (step > 0 && job.parts == 1) break; /* A stays */
            psa__ldmatrix(a[i / S::KS][i % S::KS], part + psa__at<S::DP>(row, i % S::KS * 2 + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < S::TILES * 8; i++) {
            if (now.part == 0) s[i / 8][i / 4 % 2][i % 4] = 0.0f;
        }
        uint32_t keys = psa__opaque(psa__at<S::DP>(lane % 8 + lane / 16 * 8, lane / 8 % 2));
        keys += stage + (uint32_t)(step % S::STAGES) * S::STAGE;
#pragma unroll
        for (int k = 0; k < S::KS; k++) {
            uint32_t x[4];
            psa__ldmatrix(x, keys ^ psa__step16(k));
#pragma unroll
            for (int i = 0; i < S::TILES; i++) {
                psa__mma(T(), s[i][0], a[i][k], x[0], x[1]);
                psa__mma(T(), s[i][1], a[i][k], x[2], x[3]);
            }
        }
        if (now.part == job.parts - 1) psa__score_reduce<S>(job, w, now, begin, keep, s, bm, bs, m, z);
    }
}

/* m and 1/z of every lane over all warps; 1/z is 0 for a lane that sees nothing. */
template <class S>
PSA__DEVICE void psa__score_lane_sums(const psa__job &job, const psa__score_block &w, const float (&m)[S::TILES][2],
                                      const float (&z)[S::TILES][2])
{
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < S::TILES * 2; i++) {
        psa__f2 mz = {m[i / 2][i % 2], z[i / 2][i % 2]};
        int row = warp * 16 * S::TILES + 8 * i + lane / 4;
        if (lane % 4 == 0) psa__sts(w.at_warp_mz + (uint32_t)row * 8, mz);
    }
    psa__barrier();
    for (int r = (int)threadIdx.x; r < 16 * job.lane_tiles; r += PSA__THREADS) {
        psa__f2 all = {-PSA__BIG, 0.0f};
        for (int i = 0; i < PSA__WARPS; i++) {
            psa__f2 mz = psa__lds<psa__f2>(w.at_warp_mz + (uint32_t)(i * 16 * S::TILES + r) * 8);
            psa__join(&all.x, &all.y, mz.x, mz.y);
        }
        all.y = w.first + r >= w.lanes || all.x <= -PSA__BIG ? 0.0f : job.norm ? 1.0f / all.y : 1.0f;
        psa__sts(w.at_mz + (uint32_t)r * 8, all);
    }
    psa__barrier();
}

/* The strip of KV blocks begin .. end-1 into the row of scores, which holds the lanes done before. */
PSA__DEVICE void psa__score_emit(const psa__job &job, const psa__score_block &w, int begin, int end, float *score)
{
    int rows = psa__imin(16 * job.lane_tiles, w.lanes - w.first);
    for (int jk = begin + (int)threadIdx.x; jk < end; jk += PSA__THREADS) {
        float sum = w.first == 0 ? 0.0f : score[jk];
        for (int r = 0; r < rows; r++) {
            psa__f2 mz = psa__lds<psa__f2>(w.at_mz + (uint32_t)r * 8);
            float x = psa__lds<float>(w.at_strip + (uint32_t)r * w.strip_row + (uint32_t)(jk - begin) * 4);
            float e = mz.y == 0.0f ? 0.0f : psa__exp2(x - mz.x) * mz.y;
            sum = job.use_max ? fmaxf(sum, e) : sum + e;
        }
        score[jk] = sum;
    }
}

/* (lane, key) pairs of block jk that are seen; 1 at least. */
PSA__DEVICE int psa__score_pairs(const psa__job &job, const psa__score_block &w, int jk)
{
    int pairs = 0;
    for (int c = 0; c < job.keys; c++) {
        int token = psa__key_token(job, jk, c), hidden = 0;
        if (token < 0) continue;
        while (jk >= w.whole && hidden < w.lanes && psa__lane_token(job, w.iq, hidden) < token) hidden++;
        pairs += w.lanes - hidden;
    }
    return pairs > 0 ? pairs : 1;
}

/* The row, of which n blocks are seen, to sum 1; one without mass becomes uniform. */
PSA__DEVICE void psa__score_finish(const psa__job &job, const psa__score_block &w, float *score)
{
    double sum = 0, total;
    for (int jk = (int)threadIdx.x; jk < w.n; jk += PSA__THREADS) {
        if (!job.use_max && job.plan.desc.score == PSA_SCORE_SAMPLE) score[jk] /= (float)psa__score_pairs(job, w, jk);
        sum += score[jk];
    }
    psa__scan(sum, &total);
    for (int jk = (int)threadIdx.x; jk < job.nk; jk += PSA__THREADS) {
        score[jk] = jk >= w.n ? 0.0f : total > 0 ? (float)(score[jk] / total) : 1.0f / (float)w.n;
    }
}

template <class T, class S>
__global__ void __launch_bounds__(PSA__THREADS) psa__score(const __grid_constant__ psa__job job)
{
    int head = (int)blockIdx.x / job.nq, rows = 16 * job.lane_tiles;
    float *score = job.scores + (int64_t)blockIdx.x * job.nk, m[S::TILES][2], z[S::TILES][2];
    psa__score_block w;
    w.iq = (int)blockIdx.x % job.nq;
    w.h = head % job.Hq;
    w.b = head / job.Hq;
    w.hkv = w.h / job.group;
    w.n = psa__n_visible(job, w.iq);
    w.whole = psa__n_whole(job, w.iq);
    w.lanes = psa__n_lanes(job, w.iq);
    w.at_b = (uint32_t)(job.parts * rows * S::DP * 2);
    w.at_token = w.at_b + S::B_BYTES;
    w.at_mz = w.at_token + (uint32_t)rows * 4;
    w.at_warp_mz = w.at_mz + (uint32_t)rows * 8;
    w.at_strip = w.at_b + S::B_BYTES + S::LANE_BYTES;
    w.strip_row = (uint32_t)(job.strip | 1) * 4; /* odd: the lanes of a KV block lie in different banks */
    bool one_strip = w.n <= job.strip;

    for (w.first = 0; w.first < w.lanes; w.first += rows) {
        psa__score_lanes<T, S>(job, w);
#pragma unroll
        for (int i = 0; i < S::TILES * 2; i++) m[i / 2][i % 2] = -PSA__BIG, z[i / 2][i % 2] = 0.0f;
        psa__barrier();
        psa__score_blocks<T, S>(job, w, 0, w.n, one_strip, m, z);
        psa__score_lane_sums<S>(job, w, m, z);
        for (int begin = 0; begin < w.n; begin += job.strip) {
            int end = psa__imin(w.n, begin + job.strip);
            if (!one_strip) {
                psa__score_blocks<T, S>(job, w, begin, end, true, m, z);
                psa__barrier();
            }
            psa__score_emit(job, w, begin, end, score);
            psa__barrier();
        }
    }
    psa__score_finish(job, w, score);
}

/* ================================================================================================================= */
/* >>mask: from scores to levels, from levels to the list                                                            */
/* ================================================================================================================= */

/* One CTA per query block and head, or for several in turn.
 *
 *   shared memory:  scan scratch 64 B | keys u64 [n rounded up to a power of two]
 *
 *   1. keys: score descending in the upper half, block in the lower: one bitonic sort ranks them, ties by index.
 *   2. position in rank order (TOPK) or mass ahead of it (THRESHOLD, a prefix sum in f64) -> level, into the map.
 *   3. similarity cap, protected tokens, causality, skip_mean: each a rule for one block, in this order.
 *   4. every thread counts its own range of blocks per level; prefix sums say where its entries of the list go. */

constexpr uint32_t PSA__KEYS = 64; /* offset of the keys */

/* Sorts ascending where x descends; NaN comes last. */
PSA__DEVICE uint32_t psa__sort_key(float x)
{
    uint32_t u = psa__as_bits(x + 0.0f); /* -0 becomes +0 */
    if (x != x) return 0xffffffffu;
    return (u & 0x80000000u) != 0 ? u : ~(u | 0x80000000u);
}

PSA__DEVICE uint64_t psa__key(const psa__job &job, int i)
{
    if (job.far_keys) return job.far_keys[(int64_t)blockIdx.x * job.n_keys + i];
    return psa__lds<uint64_t>(PSA__KEYS + (uint32_t)i * 8);
}

PSA__DEVICE void psa__set_key(const psa__job &job, int i, uint64_t key)
{
    if (job.far_keys) job.far_keys[(int64_t)blockIdx.x * job.n_keys + i] = key;
    else psa__sts(PSA__KEYS + (uint32_t)i * 8, key);
}

/* Keys of scores [n], sorted. */
PSA__DEVICE void psa__rank(const psa__job &job, const float *score, int n)
{
    int size = 2;
    while (size < n) size *= 2;
    for (int j = (int)threadIdx.x; j < size; j += PSA__THREADS) {
        psa__set_key(job, j, j < n ? (uint64_t)psa__sort_key(score[j]) << 32 | (uint32_t)j : ~(uint64_t)0);
    }
    for (int run = 2; run <= size; run *= 2) {
        for (int d = run / 2; d > 0; d /= 2) {
            psa__barrier();
            for (int i = (int)threadIdx.x; i < size / 2; i += PSA__THREADS) {
                int low = 2 * i - (i & (d - 1));
                uint64_t x = psa__key(job, low), y = psa__key(job, low + d);
                if ((x > y) != ((low & run) == 0)) continue;
                psa__set_key(job, low, y);
                psa__set_key(job, low + d, x);
            }
        }
    }
    psa__barrier();
}

PSA__DEVICE int psa__ranked(const psa__job &job, int position) { return (int)(uint32_t)psa__key(job, position); }

PSA__DEVICE void psa__mask_topk(const psa__job &job, int n, uint8_t *level)
{
    for (int position = (int)threadIdx.x; position < n; position += PSA__THREADS) {
        int i = 0;
        for (; i < job.n_ends; i++) {
            int64_t end = (int64_t)floor(job.plan.desc.level_end[i] * (double)n);
            if (job.count_end[PSA_MAX_LEVELS - 1] > 0) end = job.count_end[i];
            if (i >= job.finest && end < 1) end = 1;
            if (position < end) break;
        }
        level[psa__ranked(job, position)] = (uint8_t)(i < job.n_ends ? 1 << i : 0);
    }
}

PSA__DEVICE void psa__mask_threshold(const psa__job &job, int n, const float *score, uint8_t *level)
{
    const psa_desc &d = job.plan.desc;
    int each = (n + PSA__THREADS - 1) / PSA__THREADS, begin = psa__imin(n, (int)threadIdx.x * each);
    int end = psa__imin(n, begin + each), full = d.min_full > 0 ? (int)floor(d.min_full * (double)n) + 1 : 0;
    double mass = 0, total, ahead;
    for (int i = begin; i < end; i++) mass += fmaxf(score[psa__ranked(job, i)], 0.0f);
    ahead = psa__scan(mass, &total);
    double factor = 1.0 / (total > 0 ? total : (double)n); /* without mass all have the same share */
    ahead = (total > 0 ? ahead : (double)begin) * factor;
    for (int position = begin, i = 0; position < end; position++) {
        int j = psa__ranked(job, position);
        double own = (total > 0 ? fmaxf(score[j], 0.0f) : 1.0) * factor;
        while (i < job.n_ends && d.level_end[i] + 1e-6 < ahead + (d.inclusive ? own : 0)) i++;
        int l = i < job.n_ends ? 1 << i : 0;
        if (d.inclusive && position == 0) l = 1 << job.finest;
        if (position < full) l = 1;
        level[j] = (uint8_t)l;
        ahead += own;
    }
}

/* Whether block jk holds any of the tokens [from,to). */
PSA__DEVICE bool psa__holds(const psa__job &job, int jk, int64_t from, int64_t to)
{
    int64_t begin = (int64_t)jk * job.block_k, end = begin + psa__block_k_rows(job, jk);
    return begin < to && from < end;
}

/* The rules of step 3. */
PSA__DEVICE int psa__mask_rules(const psa__job &job, int iq, int jk, int whole, const uint8_t *cap, int level)
{
    const psa_desc &d = job.plan.desc;
    int64_t row = (int64_t)iq * job.block_q, end_row = row + psa__block_q_rows(job, iq);
    int64_t token = row + job.shift, end_token = end_row + job.shift;
    if (d.n_sim_min && level > cap[jk]) level = cap[jk];
    bool full = psa__holds(job, jk, 0, d.n_prefix) || psa__holds(job, jk, job.Nk - d.n_suffix, job.Nk);
    full |= d.sink && jk == 0;
    full |= d.diagonal && psa__holds(job, jk, token, end_token);
    full |= d.n_prefix > 0 && token < d.n_prefix && end_token > 0;
    full |= d.n_suffix > 0 && end_row > job.Nq - d.n_suffix;
    if (full || jk >= whole) level = 1;
    return d.skip_mean && level == 0 ? job.block_k : level;
}

/* The list of query block `task` from its row of the level map (NULL: dense). What is no level of the plan is 1. */
PSA__DEVICE void psa__make_list(const psa__job &job, int64_t task, int iq, const uint8_t *level)
{
    int n = psa__n_visible(job, iq), whole = psa__n_whole(job, iq);
    int each = (n + PSA__THREADS - 1) / PSA__THREADS, begin = psa__imin(n, (int)threadIdx.x * each);
    int end = psa__imin(n, begin + each), at[PSA_MAX_LEVELS] = {}, base = 0;
    for (int pass = 0; pass < 2; pass++) { /* first how many, then which */
        for (int j = begin; j < end; j++) {
            int l = level && j < whole ? level[j] : 1;
            if ((l & (l - 1)) != 0 || l > 1 << (job.plan.n_levels - 1)) l = 1;
#pragma unroll
            for (int i = 0; i < PSA_MAX_LEVELS; i++) {
                if (l != 1 << i) continue;
                if (pass == 1) job.index[task * job.nk + at[i]] = (uint16_t)j;
                at[i]++;
            }
        }
        if (pass == 1) return;
#pragma unroll
        for (int i = 0; i < PSA_MAX_LEVELS; i++) {
            int total;
            at[i] = base + psa__scan(at[i], &total);
            base += total;
            if (threadIdx.x == 0) job.count[task * PSA_MAX_LEVELS + i] = (uint16_t)total;
        }
    }
}

static __global__ void __launch_bounds__(PSA__THREADS, PSA__CTAS) psa__mask(const __grid_constant__ psa__job job)
{
    for (int task = (int)blockIdx.x; task < job.B * job.Hq * job.nq; task += (int)gridDim.x) {
        int iq = task % job.nq, head = task / job.nq, h = head % job.Hq, b = head / job.Hq;
        int n = psa__n_visible(job, iq), whole = psa__n_whole(job, iq), mask = job.plan.desc.mask;
        uint8_t *level = job.levels + (int64_t)task * job.nk;
        const float *score = job.scores + (int64_t)task * job.nk;
        const uint8_t *cap = job.cap + (int64_t)(b * job.Hkv + h / job.group) * job.nk;
        if (mask != PSA_MASK_DENSE) psa__rank(job, score, n);
        if (mask == PSA_MASK_TOPK) psa__mask_topk(job, n, level);
        if (mask == PSA_MASK_THRESHOLD) psa__mask_threshold(job, n, score, level);
        psa__barrier(); /* until here the map was written in rank order */
        for (int j = (int)threadIdx.x; j < job.nk; j += PSA__THREADS) {
            int l = j < n ? 1 : 0;
            if (l && mask != PSA_MASK_DENSE) l = psa__mask_rules(job, iq, j, whole, cap, level[j]);
            level[j] = (uint8_t)l;
        }
        psa__barrier();
        psa__make_list(job, task, iq, level);
    }
}

static __global__ void __launch_bounds__(PSA__THREADS, PSA__CTAS) psa__list(const __grid_constant__ psa__job job)
{
    int64_t task = blockIdx.x;
    psa__make_list(job, task, (int)blockIdx.x % job.nq, job.levels ? job.levels + task * job.nk : nullptr);
}

/* ================================================================================================================= */
/* >>attend: softmax(q k + bias) v over the rows that the list names                                                 */
/* ================================================================================================================= */

/* One CTA per BM query rows of a head (and part of the stream, grid.y). Warp w owns 16*MT rows of queries; the stream
 * of K/V rows goes by in tiles of BN.
 *
 *   shared memory                              a tile of K, V: 16-byte chunks, XORed with row & 7
 *   +----------------+ 0
 *   | Q  [BM][DP]    |                          m16n8k16 fragments, lane 4g+t: rows g, g+8; columns 2t, 2t+1
 *   +----------------+                          QK: S[16*MT][BN] = Q K^T, both by ldmatrix; S stays in registers,
 *   | stage 0: K, V  |  [BN][DP] each           softmax on it, P = S packed to 16 bits is the A operand of
 *   | ...            |                          PV: O[16*MT][DP] += P V, V by ldmatrix.trans
 *   | stage S-1      |
 *   +----------------+                          what the rows of a tile i are: a ring of STAGES + 1 tiles, looked up
 *   | rows, biases   |                          during tile i - STAGES, copied from tile i - STAGES + 1 on, used at i
 *   +----------------+
 *
 * One barrier per tile: it says that tile i has landed for all, that all are done with tile i-1, whose stage is filled
 * next, and that the rows of tile i + STAGES - 1 are known. */

/* What a CTA has to do. It stays in shared memory: in the inner loop registers are for O and S. */
struct psa__attend_block {
    int b, h, hkv;
    int row0, rows; /* its query rows */
    int task;       /* the query block, as the list counts them */
    int n;          /* rows of its stream */
    const char *k, *v, *pooled_k, *pooled_v; /* row 0 of the head */
};

template <int BM_, int BN_, int DP_, int STAGES_, int WARPS_ = PSA__WARPS> struct psa__tiles {
    static constexpr int BM = BM_, BN = BN_, DP = DP_, STAGES = STAGES_;
    static constexpr int THREADS = WARPS_ * 32;                           /* that multiply */
    static constexpr int MT = BM / 16 / WARPS_;                           /* m16 tiles of a warp */
    static constexpr int COPIES = WARPS_ == PSA__WARPS ? 1 : 2;           /* of psa__attend_block */
    static constexpr int RING = STAGES + 1;
    static constexpr uint32_t KV = BN * DP * 2;                           /* bytes of a tile of K or V */
    static constexpr uint32_t AT_KV = BM * DP * 2;
    static constexpr uint32_t AT_ROWS = AT_KV + STAGES * 2 * KV;          /* u32 [RING][BN] */
    static constexpr uint32_t AT_BIAS = AT_ROWS + RING * BN * 4;          /* f32 [RING][BN] */
    static constexpr uint32_t AT_KIND = AT_BIAS + RING * BN * 4;          /* u32 [RING][BN/32]: bias of 32, or MIXED */
    static constexpr uint32_t AT_COUNT = AT_KIND + RING * (BN / 32) * 4;  /* u32 [levels] of the list */
    static constexpr uint32_t AT_BLOCK = (AT_COUNT + PSA_MAX_LEVELS * 4 + 15) / 16 * 16; /* psa__attend_block */
    static constexpr uint32_t BYTES = AT_BLOCK + COPIES * sizeof(psa__attend_block);
    static_assert(BYTES <= (COPIES == 1 ? 99 : 226) * 1024, "what sm_86, 89 and 120 have, and sm_90 with barriers");
    static_assert(BM % (16 * WARPS_) == 0 && BN % 32 == 0 && DP % 64 == 0 && STAGES >= 2, "");
};

/* O[MT*16][DP] and S[MT*16][BN] in f32 take MT*(DP/2 + BN/2) registers of a thread: 192 at D 128. At D 256 MT = 1 and
 * BN = 32 leave two stages room in 99 KB. Where blocks have at most 64 queries, MT = 1 wastes none. */
using psa__tiles_64 = psa__tiles<128, 64, 64, 3>;
using psa__tiles_64_few = psa__tiles<64, 64, 64, 3>;
using psa__tiles_128 = psa__tiles<128, 64, 128, 2>;
using psa__tiles_128_few = psa__tiles<64, 64, 128, 2>;
using psa__tiles_256 = psa__tiles<64, 32, 256, 2>;

/* The block's offset; where others than the threads that multiply bring the rows in, they have their own. */
template <class S> PSA__DEVICE uint32_t psa__at_block()
{
    bool own = S::COPIES > 1 && (int)threadIdx.x >= S::THREADS;
    return S::AT_BLOCK + (own ? (uint32_t)sizeof(psa__attend_block) : 0u);
}
template <class S> PSA__DEVICE psa__attend_block psa__here() { return psa__lds<psa__attend_block>(psa__at_block<S>()); }

struct psa__pending { /* a stream row whose block is being fetched from the list */
    int level, within, block;
};

/* Finds stream row p in the list. */
template <class S> PSA__DEVICE psa__pending psa__find_row(const psa__job &job, int p)
{
    psa__attend_block w = psa__here<S>();
    psa__pending x = {0, 0, -1};
    int entry = 0;
    if (p >= w.n) return x;
    for (; x.level < job.plan.n_levels - 1; x.level++) {
        int blocks = psa__lds<int>(S::AT_COUNT + (uint32_t)x.level * 4);
        int rows = blocks << (job.log2_block_k - x.level);
        if (p < rows) break;
        p -= rows;
        entry += blocks;
    }
    x.within = p & ((job.block_k >> x.level) - 1);
    entry += p >> (job.log2_block_k - x.level);
    x.block = job.index[(int64_t)w.task * job.nk + entry];
    return x;
}

/* Writes row r of slot `slot` of the ring; returns it. Called by whole warps, a lane for each of 32 rows. */
template <class S> PSA__DEVICE uint32_t psa__publish_row(const psa__job &job, const psa__pending &x, int slot, int r)
{
    int token = x.block * job.block_k + (x.within << x.level), count = psa__imin(1 << x.level, job.Nk - token);
    uint32_t row = PSA__NONE;
    float bias = -PSA__INF;
    if (x.block >= 0 && count > 0) {
        row = (uint32_t)token;
        bias = count == 1 << x.level ? (float)x.level : log2f((float)count);
        if (x.level > 0) {
            row = PSA__POOLED | (uint32_t)(job.plan.level_row[x.level] + x.block * (job.block_k >> x.level) + x.within);
        }
    }
    uint32_t kind = psa__as_bits(psa__shuffle(bias, 0)); /* below: pooled rows are negative, hidden from none */
    if (psa__ballot(psa__as_bits(bias) != kind)) kind = PSA__MIXED;
    if (psa__ballot(job.causal && (int)row > psa__here<S>().row0 + job.shift)) kind = PSA__STRADDLE;
    psa__sts(S::AT_ROWS + (uint32_t)(slot * S::BN + r) * 4, row);
    psa__sts(S::AT_BIAS + (uint32_t)(slot * S::BN + r) * 4, bias);
    if (r % 32 == 0) psa__sts(S::AT_KIND + (uint32_t)(slot * (S::BN / 32) + r / 32) * 4, kind);
    return row;
}

/* The rows of ring slot `slot` of K and V to stage `stage`. */
template <class S> PSA__DEVICE void psa__copy_tile(const psa__job &job, int slot, int stage)
{
    constexpr int CHUNKS = S::DP / 8, ROWS = PSA__THREADS / CHUNKS;
    psa__attend_block w = psa__here<S>();
    int c = (int)threadIdx.x % CHUNKS, r0 = (int)threadIdx.x / CHUNKS;
    uint32_t to = S::AT_KV + (uint32_t)stage * 2 * S::KV;
#pragma unroll
    for (int i = 0; i < S::BN / ROWS; i++) {
        int r = r0 + i * ROWS;
        uint32_t row = psa__lds<uint32_t>(S::AT_ROWS + (uint32_t)(slot * S::BN + r) * 4), at = psa__at<S::DP>(r, c);
        bool exists = row != PSA__NONE, pooled = row >= PSA__POOLED;
        int64_t n = exists ? (int64_t)(row & ~PSA__POOLED) : 0;
        const char *k = pooled ? w.pooled_k + n * job.D * 2 : w.k + n * (int64_t)job.read_k.nb[1];
        const char *v = pooled ? w.pooled_v + n * job.Dv * 2 : w.v + n * (int64_t)job.read_v.nb[1];
        if (c < job.D / 8) psa__cp_async(to + at, k + c * 16, exists);
        if (c < job.Dv / 8) psa__cp_async(to + S::KV + at, v + c * 16, exists);
    }
}

/* Q to shared memory, as T; and the chunk beyond D zero in Q and every K, where D ends in the middle of a k16 step. */
template <class T, class S> PSA__DEVICE void psa__load_queries(const psa__job &job)
{
    constexpr int CHUNKS = S::DP / 8;
    psa__attend_block w = psa__here<S>();
    psa__u4 zero = {};
    for (int item = (int)threadIdx.x; item < S::BM * CHUNKS; item += S::THREADS) {
        int r = item / CHUNKS, c = item % CHUNKS;
        psa__sts(psa__at<S::DP>(r, c), psa__query<T>(job, w.b, w.h, w.row0 + r, r < w.rows ? 1 : 0, c));
    }
    for (int item = (int)threadIdx.x; job.D % 16 != 0 && item < S::STAGES * S::BN; item += PSA__THREADS) {
        uint32_t stage = S::AT_KV + (uint32_t)(item / S::BN) * 2 * S::KV;
        psa__sts(stage + psa__at<S::DP>(item % S::BN, job.D / 8), zero);
    }
}

/* S = Q K^T for the warp's rows. */
template <class T, class S>
PSA__DEVICE void psa__qk(const psa__job &job, int stage, float (&s)[S::MT][S::BN / 8][4])
{
    int lane = (int)threadIdx.x % 32, row0 = (int)threadIdx.x / 32 * 16 * S::MT;
    uint32_t queries = psa__opaque(psa__at<S::DP>(row0 + lane % 16, lane / 16));
    uint32_t keys = psa__opaque(psa__at<S::DP>(lane % 8 + lane / 16 * 8, lane / 8 % 2));
    keys += S::AT_KV + (uint32_t)stage * 2 * S::KV;
#pragma unroll
    for (int i = 0; i < S::MT * S::BN / 2; i++) s[i / (S::BN / 2)][i / 4 % (S::BN / 8)][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < S::DP / 16; k++) {
        if (k * 16 >= job.D) break;
        uint32_t a[S::MT][4];
#pragma unroll
        for (int i = 0; i < S::MT; i++) {
            psa__ldmatrix(a[i], (queries ^ psa__step16(k)) + (uint32_t)(i * 16 * S::DP * 2));
        }
#pragma unroll
        for (int j = 0; j < S::BN / 16; j++) {
            uint32_t x[4];
            psa__ldmatrix(x, (keys ^ psa__step16(k)) + (uint32_t)(j * 16 * S::DP * 2));
#pragma unroll
            for (int i = 0; i < S::MT; i++) {
                psa__mma(T(), s[i][2 * j], a[i], x[0], x[1]);
                psa__mma(T(), s[i][2 * j + 1], a[i], x[2], x[3]);
            }
        }
    }
}

/* Scales S and adds each column's own bias; hides what the rows do not see. */
template <class S> PSA__DEVICE void psa__add_biases(const psa__job &job, int slot, float (&s)[S::MT][S::BN / 8][4])
{
    int lane = (int)threadIdx.x % 32;
    int first = psa__here<S>().row0 + job.shift + (int)threadIdx.x / 32 * 16 * S::MT + lane / 4;
#pragma unroll
    for (int j = 0; j < S::BN / 8; j++) {
        uint32_t at = (uint32_t)(slot * S::BN + j * 8 + lane % 4 * 2) * 4;
        psa__f2 bias = psa__lds<psa__f2>(S::AT_BIAS + at);
        uint64_t rows = job.causal ? psa__lds<uint64_t>(S::AT_ROWS + at) : ~(uint64_t)0;
#pragma unroll
        for (int i = 0; i < S::MT * 2; i++) {
            float &x = s[i / 2][j][i % 2 * 2], &y = s[i / 2][j][i % 2 * 2 + 1];
            x = (int)(uint32_t)rows > first + 8 * i ? -PSA__INF : x * job.scale + bias.x;
            y = (int)(uint32_t)(rows >> 32) > first + 8 * i ? -PSA__INF : y * job.scale + bias.y;
        }
    }
}

/* What makes a tile's logits of S: the same scale and bias for all, or, where they are their own, 1 and 0 and they are
 * applied. Returns whether some rows of the tile are hidden from some queries. */
template <class S>
PSA__DEVICE bool psa__biases(const psa__job &job, int slot, float (&s)[S::MT][S::BN / 8][4], float *scale, float *bias)
{
    uint32_t at = S::AT_KIND + (uint32_t)(slot * (S::BN / 32)) * 4, first = psa__lds<uint32_t>(at);
    bool mixed = first == PSA__MIXED, straddles = false;
    for (uint32_t x = 0; x < S::BN / 32; x++) {
        uint32_t kind = psa__lds<uint32_t>(at + x * 4);
        mixed |= kind != first;
        straddles |= kind == PSA__STRADDLE;
    }
    *scale = job.scale;
    *bias = psa__as_float(first);
    if (!mixed && !straddles) return false;
    psa__add_biases<S>(job, slot, s);
    *scale = 1.0f;
    *bias = 0.0f;
    return straddles;
}

/* Online softmax in base 2, first part: m and l of the rows with this tile's logits, S*scale + bias. They change only
 * if a maximum grew by more than RESCALE; returns whether, and then O is to shrink. l is this thread's share of the
 * sum. */
template <class S>
PSA__DEVICE bool psa__maxima(float scale, float bias, const float (&s)[S::MT][S::BN / 8][4], float (&m)[S::MT * 2],
                             float (&l)[S::MT * 2], float (&shrink)[S::MT * 2])
{
    float top[S::MT * 2];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < S::MT * 2; i++) {
        top[i] = -PSA__INF;
#pragma unroll
        for (int j = 0; j < S::BN / 8 * 2; j++) top[i] = fmaxf(top[i], s[i / 2][j / 2][i % 2 * 2 + j % 2]);
        top[i] = fmaxf(top[i], psa__shuffle_xor(top[i], 1));
        top[i] = fmaxf(top[i], psa__shuffle_xor(top[i], 2)) * scale + bias;
        grew |= top[i] > m[i] + PSA__RESCALE;
    }
    if (!psa__ballot(grew)) return false;
#pragma unroll
    for (int i = 0; i < S::MT * 2; i++) {
        float now = fmaxf(m[i], top[i]);
        shrink[i] = psa__exp2(m[i] - now);
        m[i] = now;
        l[i] *= shrink[i];
    }
    return true;
}

template <class S> PSA__DEVICE void psa__rescale(const float (&shrink)[S::MT * 2], float (&o)[S::MT][S::DP / 8][4])
{
#pragma unroll
    for (int i = 0; i < S::MT * S::DP / 2; i++) {
        int tile = i / (S::DP / 2);
        o[tile][i / 4 % (S::DP / 8)][i % 4] *= shrink[tile * 2 + i / 2 % 2];
    }
}

/* Second part: S becomes exp2(S*scale + bias - m). */
template <class S>
PSA__DEVICE void psa__weights(float scale, float bias, float (&s)[S::MT][S::BN / 8][4], const float (&m)[S::MT * 2],
                              float (&l)[S::MT * 2])
{
#pragma unroll
    for (int i = 0; i < S::MT * 2; i++) {
        float offset = bias - m[i];
#pragma unroll
        for (int j = 0; j < S::BN / 8 * 2; j++) {
            float &x = s[i / 2][j / 2][i % 2 * 2 + j % 2];
            x = psa__exp2(x * scale + offset);
            l[i] += x;
        }
    }
}

/* Two elements, those that are Inf or NaN replaced by 0. */
template <class T> PSA__DEVICE uint32_t psa__finite(uint32_t x)
{
    constexpr uint32_t E = T::EXPONENT;
    return x & ((x & E) == E ? 0xffff0000u : ~0u) & ((x & E << 16) == E << 16 ? 0x0000ffffu : ~0u);
}

/* O += P V: the accumulators of two n8 tiles of S are the A fragment of one k16 step. guarded: Inf and NaN in V count
 * as 0, since 0 * Inf would reach the rows that they are hidden from; returns whether there were any. */
template <class T, class S, bool guarded>
PSA__DEVICE bool psa__pv(const psa__job &job, int stage, const float (&s)[S::MT][S::BN / 8][4],
                         float (&o)[S::MT][S::DP / 8][4])
{
    int lane = (int)threadIdx.x % 32;
    uint32_t values = psa__opaque(psa__at<S::DP>(lane % 16, lane / 16)) + S::AT_KV + (uint32_t)(2 * stage + 1) * S::KV;
    bool odd = false;
#pragma unroll
    for (int k = 0; k < S::BN / 16; k++) {
        uint32_t p[S::MT][4];
#pragma unroll
        for (int i = 0; i < S::MT * 4; i++) {
            const float(&x)[4] = s[i / 4][2 * k + i % 4 / 2];
            p[i / 4][i % 4] = psa__pack(T(), x[i % 2 * 2], x[i % 2 * 2 + 1]);
        }
#pragma unroll
        for (int j = 0; j < S::DP / 16; j++) {
            if (j * 16 >= job.Dv) break;
            uint32_t x[4];
            psa__ldmatrix_t(x, (values ^ psa__step16(j)) + (uint32_t)(k * 16 * S::DP * 2));
#pragma unroll
            for (int e = 0; guarded && e < 4; e++) {
                uint32_t finite = psa__finite<T>(x[e]);
                odd |= finite != x[e];
                x[e] = finite;
            }
#pragma unroll
            for (int i = 0; i < S::MT; i++) {
                psa__mma(T(), o[i][2 * j], p[i], x[0], x[1]);
                psa__mma(T(), o[i][2 * j + 1], p[i], x[2], x[3]);
            }
        }
    }
    return odd;
}

/* Adds what psa__pv left out of V to the rows that see it. */
template <class T, class S>
PSA__DEVICE void psa__add_odd(const psa__job &job, int stage, int slot, float (&o)[S::MT][S::DP / 8][4])
{
    int lane = (int)threadIdx.x % 32;
    int first = psa__here<S>().row0 + job.shift + (int)threadIdx.x / 32 * 16 * S::MT + lane / 4;
    for (int r = 0; r < S::BN; r++) {
        int row = psa__lds<int>(S::AT_ROWS + (uint32_t)(slot * S::BN + r) * 4); /* as in psa__add_biases */
        uint32_t at = S::AT_KV + (uint32_t)(2 * stage + 1) * S::KV;
#pragma unroll
        for (int j = 0; j < S::DP / 8; j++) {
            uint32_t x = psa__lds<uint32_t>(at + psa__at<S::DP>(r, j) + (uint32_t)(lane % 4 * 4));
            uint32_t odd = x & ~psa__finite<T>(x);
            if (odd == 0 || j >= job.Dv / 8) continue;
#pragma unroll
            for (int i = 0; i < S::MT * 2; i++) {
                if (row > first + 8 * i) continue;
                o[i / 2][j][i % 2 * 2] += psa__to_float(T(), (uint16_t)odd);
                o[i / 2][j][i % 2 * 2 + 1] += psa__to_float(T(), (uint16_t)(odd >> 16));
            }
        }
    }
}

/* Where row r of this CTA begins in out, or in its part. */
PSA__DEVICE char *psa__out_row(const psa__job &job, const psa__attend_block &w, int r)
{
    int row = w.row0 + r;
    if (job.splits > 1) return psa__row(job.part, w.b, w.h, row) + blockIdx.y * job.part_bytes;
    return psa__row(job.out, w.b, w.h, psa__token(job.plan.desc.order_q, w.b, w.h, row));
}

/* A lane writes pairs of columns; four of them fill 16 or 32 bytes of a row. */
template <class S> PSA__DEVICE void psa__write(const psa__job &job, const float (&o)[S::MT][S::DP / 8][4])
{
    psa__attend_block w = psa__here<S>();
    int lane = (int)threadIdx.x % 32, first = (int)threadIdx.x / 32 * 16 * S::MT + lane / 4;
    int type = job.splits > 1 ? PSA_F32 : job.out.type, pair = type == PSA_F32 ? 8 : 4;
#pragma unroll
    for (int i = 0; i < S::MT * 2; i++) {
        if (first + 8 * i >= w.rows) continue;
        char *to = psa__out_row(job, w, first + 8 * i) + lane % 4 * pair;
#pragma unroll
        for (int j = 0; j < S::DP / 8; j++) {
            psa__f2 x = {o[i / 2][j][i % 2 * 2], o[i / 2][j][i % 2 * 2 + 1]};
            if (j < job.Dv / 8) psa__store2(to + j * 4 * pair, type, x);
        }
    }
}

/* Divides by the row sums and writes out and lse. A row that saw nothing has l = 0. */
template <class S>
PSA__DEVICE void psa__finish(const psa__job &job, float (&o)[S::MT][S::DP / 8][4], const float (&m)[S::MT * 2],
                             float (&l)[S::MT * 2])
{
    psa__attend_block w = psa__here<S>();
    int lane = (int)threadIdx.x % 32, first = (int)threadIdx.x / 32 * 16 * S::MT + lane / 4;
#pragma unroll
    for (int i = 0; i < S::MT * 2; i++) {
        l[i] += psa__shuffle_xor(l[i], 1);
        l[i] += psa__shuffle_xor(l[i], 2);
        float inverse = l[i] == 0.0f ? 0.0f : 1.0f / l[i];
        float lse = l[i] == 0.0f ? -PSA__INF : (m[i] + log2f(l[i])) * PSA__LN2;
#pragma unroll
        for (int j = 0; j < S::DP / 8 * 2; j++) o[i / 2][j / 2][i % 2 * 2 + j % 2] *= inverse;
        int row = w.row0 + first + 8 * i;
        int64_t head = (int64_t)w.b * job.Hq + w.h;
        if (lane % 4 != 0 || first + 8 * i >= w.rows) continue;
        if (job.splits > 1) job.part_lse[((int64_t)blockIdx.y * job.B * job.Hq + head) * job.Nq + row] = lse;
        else if (job.lse) job.lse[head * job.Nq + psa__token(job.plan.desc.order_q, w.b, w.h, row)] = lse;
    }
    psa__write<S>(job, o);
}

/* The query rows that come x-th. Section by section of KV heads, so that their rows are found in the L2 cache; in it
 * every head's tile side by side, with causality the long ones first. */
PSA__DEVICE psa__attend_block psa__attend_block_of(const psa__job &job, int BM, int x)
{
    psa__attend_block w;
    int tiles = job.nq * job.q_tiles, size = tiles * job.group * job.section, first = x / size * job.section;
    int heads = psa__imin(job.section, job.B * job.Hkv - first) * job.group, at = x % size % heads;
    int tile = x % size / heads, g = at % job.group, head = first + at / job.group;
    if (job.causal) tile = tiles - 1 - tile;
    int iq = tile / job.q_tiles, within = tile % job.q_tiles * BM;
    int64_t pooled = (int64_t)head * job.plan.pooled_rows;
    w.b = head / job.Hkv;
    w.hkv = head % job.Hkv;
    w.h = w.hkv * job.group + g;
    w.row0 = iq * job.block_q + within;
    w.rows = psa__imin(BM, psa__block_q_rows(job, iq) - within);
    w.task = (w.b * job.Hq + w.h) * job.nq + iq;
    w.k = psa__row(job.read_k, w.b, w.hkv, 0);
    w.v = psa__row(job.read_v, w.b, w.hkv, 0);
    w.pooled_k = job.pooled_k + pooled * job.D * 2;
    w.pooled_v = job.pooled_v + pooled * job.Dv * 2;
    w.n = 0;
    for (int i = 0; i < job.plan.n_levels; i++) {
        w.n += job.count[(int64_t)w.task * PSA_MAX_LEVELS + i] << (job.log2_block_k - i);
    }
    return w;
}

template <class T, class S>
__global__ void __launch_bounds__(PSA__THREADS) psa__attend(const __grid_constant__ psa__job job)
{
    psa__attend_block w = psa__attend_block_of(job, S::BM, (int)blockIdx.x);
    int r = (int)threadIdx.x, tiles = (w.n + S::BN - 1) / S::BN;
    int begin = (int)((int64_t)tiles * blockIdx.y / job.splits);
    int end = (int)((int64_t)tiles * (blockIdx.y + 1) / job.splits);
    float o[S::MT][S::DP / 8][4] = {}, m[S::MT * 2], l[S::MT * 2] = {};
#pragma unroll
    for (int i = 0; i < S::MT * 2; i++) m[i] = PSA__LOWEST;
    if (w.rows <= 0) return;

    if (r == 0) psa__sts(S::AT_BLOCK, w);
    if (r < PSA_MAX_LEVELS) {
        psa__sts(S::AT_COUNT + (uint32_t)r * 4, (int)job.count[(int64_t)w.task * PSA_MAX_LEVELS + r]);
    }
    psa__barrier();
    for (int i = 0; i < S::STAGES && r < S::BN; i++) {
        psa__publish_row<S>(job, psa__find_row<S>(job, (begin + i) * S::BN + r), (begin + i) % S::RING, r);
    }
    psa__barrier();
    for (int i = begin; i < begin + S::STAGES - 1; i++) {
        if (i < end) psa__copy_tile<S>(job, i % S::RING, i % S::STAGES);
        psa__cp_commit();
    }
    psa__load_queries<T, S>(job);

    for (int i = begin; i < end; i++) { /* the inner loop */
        float s[S::MT][S::BN / 8][4], scale, bias, shrink[S::MT * 2];
        psa__pending next = {0, 0, -1};
        int slot = i % S::RING, ahead = i + S::STAGES - 1;
        psa__cp_wait<S::STAGES - 2>();
        psa__barrier();
        if (ahead < end) psa__copy_tile<S>(job, ahead % S::RING, ahead % S::STAGES);
        psa__cp_commit();
        if (r < S::BN) next = psa__find_row<S>(job, (ahead + 1) * S::BN + r);

        psa__qk<T, S>(job, i % S::STAGES, s);
        bool straddles = psa__biases<S>(job, slot, s, &scale, &bias);
        if (psa__maxima<S>(scale, bias, s, m, l, shrink)) psa__rescale<S>(shrink, o);
        psa__weights<S>(scale, bias, s, m, l);
        if (!straddles) {
            psa__pv<T, S, false>(job, i % S::STAGES, s, o);
        } else if (psa__ballot(psa__pv<T, S, true>(job, i % S::STAGES, s, o))) {
            psa__add_odd<T, S>(job, i % S::STAGES, slot, o);
        }
        if (r < S::BN) psa__publish_row<S>(job, next, (ahead + 1) % S::RING, r);
    }
    psa__finish<S>(job, o, m, l);
}

/* ================================================================================================================= */
/* >>hopper: attend by wgmma and TMA                                                                                 */
/* ================================================================================================================= */

/* As psa__attend, with other means: three warpgroups on an SM draw one query tile after the other.
 *
 *   The last one brings rows in: each of its threads has row r of every tile, and TMA copies boxes: 8 rows of a block,
 *   or 4, or, where these are rows of several blocks, one. Rows that do not exist are boxes outside of the tensor:
 *   zeros. So every stage takes the same number of bytes, whatever it holds.
 *   The other two multiply, each for 64 rows of queries: QK from shared memory, PV with P in registers, V MN-major. QK
 *   of a tile is under way with PV of the tile before; and while one warpgroup computes weights the other multiplies.
 *
 * K and V of a stage each have two barriers: full, when their boxes have landed and their rows are published, and
 * empty, when every warp that multiplies is done with them. Phase t / STAGES of both is that of tile t, counted over
 * all query tiles. The ring of rows is one longer than that of stages: when K of tile t - STAGES is empty, tile
 * t - STAGES - 1 is past. */

enum { PSA__PRODUCERS = 128, PSA__PRODUCER_REGISTERS = 40, PSA__CONSUMER_REGISTERS = 232 }; /* threads, of a thread */
enum { PSA__TURN = 1, PSA__CONSUME = 3, PSA__PRODUCE = 4 }; /* named barriers; TURN and the next: whose turn */

struct psa__hopper_job : psa__job {
    psa__map map[2][2][3]; /* K, V; tokens, means; boxes of 1, 4 and 8 rows */
    int tiles;             /* of queries */
};
static_assert(sizeof(psa__hopper_job) <= 4096, "what a kernel's parameters may take");

using psa__hopper_64 = psa__tiles<128, 128, 64, 4, 8>;
using psa__hopper_128 = psa__tiles<128, 128, 128, 2, 8>;

template <class S> struct psa__hopper_shape {
    static constexpr uint32_t AT_FULL = (S::BYTES + 15) / 16 * 16; /* K, V, K, V, ... */
    static constexpr uint32_t AT_EMPTY = AT_FULL + S::STAGES * 16;
    static constexpr uint32_t AT_TOLD = AT_EMPTY + S::STAGES * 16, AT_HEARD = AT_TOLD + 8; /* the block */
    static constexpr uint32_t AT_DRAWN = AT_HEARD + 8;             /* its number */
    static constexpr uint32_t BYTES = AT_DRAWN + 16;
    static_assert(BYTES <= 227 * 1024, "what sm_90 has");
};

/* Tile t of K (0) or V (1): its offset, its barriers, the parity of its phase. */
template <class S> PSA__DEVICE uint32_t psa__stage(uint32_t t, int is_v)
{
    return S::AT_KV + (t % S::STAGES * 2 + (uint32_t)is_v) * S::KV;
}
template <class S> PSA__DEVICE uint32_t psa__full(uint32_t t, int is_v)
{
    return psa__hopper_shape<S>::AT_FULL + (t % S::STAGES * 2 + (uint32_t)is_v) * 8;
}
template <class S> PSA__DEVICE uint32_t psa__empty(uint32_t t, int is_v)
{
    return psa__hopper_shape<S>::AT_EMPTY + (t % S::STAGES * 2 + (uint32_t)is_v) * 8;
}
template <class S> PSA__DEVICE uint32_t psa__parity(uint32_t t) { return t / S::STAGES & 1; }

/* The threads that bring rows in begin their n-th query tile, which is tile x of thread 0, and tell the others. */
template <class S> PSA__DEVICE void psa__tell(const psa__hopper_job &job, int x, uint32_t n)
{
    using H = psa__hopper_shape<S>;
    int r = (int)threadIdx.x - S::THREADS;
    psa__bar_wait(H::AT_HEARD, (n & 1) ^ 1); /* of the one before */
    if (r == 0) psa__sts(H::AT_DRAWN, x);
    psa__group_sync(PSA__PRODUCE, PSA__PRODUCERS);
    x = psa__lds<int>(H::AT_DRAWN);
    psa__attend_block w = {};
    w.n = -1;
    if (x < job.tiles) w = psa__attend_block_of(job, S::BM, x);
    if (r == 0) psa__sts(psa__at_block<S>(), w);
    if (r < PSA_MAX_LEVELS && x < job.tiles) {
        psa__sts(S::AT_COUNT + (uint32_t)r * 4, (int)job.count[(int64_t)w.task * PSA_MAX_LEVELS + r]);
    }
    psa__bar_arrive(H::AT_TOLD);
    psa__bar_wait(H::AT_TOLD, n & 1);
}

/* Those that multiply take it over. */
template <class S> PSA__DEVICE void psa__hear(uint32_t n)
{
    using H = psa__hopper_shape<S>;
    psa__bar_wait(H::AT_TOLD, n & 1);
    psa__group_sync(PSA__CONSUME, S::THREADS); /* all are done with the one before */
    if (threadIdx.x == 0) psa__sts(S::AT_BLOCK, psa__lds<psa__attend_block>(S::AT_BLOCK + sizeof(psa__attend_block)));
    psa__bar_arrive(H::AT_HEARD);
    psa__group_sync(PSA__CONSUME, S::THREADS);
}

/* Tiles of the stream, the same for all; -1 after the last query tile. */
template <class S> PSA__DEVICE int psa__stream_tiles()
{
    psa__attend_block w = psa__here<S>();
    return w.n < 0 ? -1 : w.rows <= 0 ? 0 : (w.n + S::BN - 1) / S::BN;
}

/* Lanes whose row comes after that of the lane before, or does not exist as that one. */
PSA__DEVICE uint32_t psa__follow(uint32_t row)
{
    uint32_t before = psa__shuffle(row, (int)threadIdx.x % 32 - 1);
    return psa__ballot(row == PSA__NONE ? before == PSA__NONE : before != PSA__NONE && row == before + 1);
}

/* Row r of the tile and those of the other lanes to tile t of K or V. A box of 8 rows has all columns, others 64. */
template <class S>
PSA__DEVICE void psa__boxes(const psa__hopper_job &job, uint32_t row, uint32_t follow, int r, uint32_t t, int is_v)
{
    psa__attend_block w = psa__here<S>();
    int rows = (follow >> (r & 24) & 0xfe) == 0xfe ? 8 : (follow >> (r & 28) & 0xe) == 0xe ? 4 : 1;
    int at = row == PSA__NONE ? job.Nk : (int)(row & ~PSA__POOLED), pooled = row != PSA__NONE && row >= PSA__POOLED;
    const psa__map &map = job.map[is_v][pooled][rows / 4];
    uint32_t to = psa__stage<S>(t, is_v) + (uint32_t)((r >> 3) * S::DP * 16 + (r & 7) * 128);
    uint32_t bar = psa__full<S>(t, is_v);
    psa__bar_expect(bar, 32 * S::DP * 2);
    if (r % rows != 0) return;
    for (int half = 0; half < (rows == 8 ? 1 : S::DP / 64); half++) {
        psa__box(to + (uint32_t)half * 1024, map, at, half, w.hkv, w.b, bar);
    }
}

template <class S> PSA__DEVICE void psa__produce(const psa__hopper_job &job)
{
    int r = (int)threadIdx.x - S::THREADS, x = (int)blockIdx.x;
    uint32_t t = 0;
    for (uint32_t n = 0;; n++) {
        psa__tell<S>(job, x, n);
        int tiles = psa__stream_tiles<S>();
        if (tiles < 0) return;
        if (r == 0) x = (int)(gridDim.x + psa__draw(job.ticket));
        psa__pending next = psa__find_row<S>(job, r);
        for (int i = 0; i < tiles; i++, t++) {
            psa__pending found = next;
            next = psa__find_row<S>(job, (i + 1) * S::BN + r);
            psa__bar_wait(psa__empty<S>(t, 0), psa__parity<S>(t) ^ 1);
            uint32_t row = psa__publish_row<S>(job, found, (int)(t % S::RING), r), follow = psa__follow(row);
            psa__boxes<S>(job, row, follow, r, t, 0);
            psa__bar_wait(psa__empty<S>(t, 1), psa__parity<S>(t) ^ 1);
            psa__boxes<S>(job, row, follow, r, t, 1);
        }
    }
}

/* Puts S = Q K^T under way. */
template <class T, class S> PSA__DEVICE void psa__start_qk(uint32_t t, float (&s)[1][S::BN / 8][4])
{
    uint64_t a = psa__descriptor(psa__at<S::DP>((int)threadIdx.x / 128 * 64, 0), 0, S::DP * 16);
    uint64_t b = psa__descriptor(psa__stage<S>(t, 0), 0, S::DP * 16);
#pragma unroll
    for (int k = 0; k < S::DP / 16; k++) psa__wgmma(T(), s[0], a + psa__step16(k) / 16, b + psa__step16(k) / 16, k > 0);
    psa__wgmma_commit();
}

/* Puts O += P V under way. */
template <class T, class S>
PSA__DEVICE void psa__start_pv(uint32_t t, const uint32_t (&p)[S::BN / 16][4], float (&o)[1][S::DP / 8][4])
{
    uint64_t b = psa__descriptor(psa__stage<S>(t, 1), 1024, S::DP * 16);
#pragma unroll
    for (int k = 0; k < S::BN / 16; k++) psa__wgmma(T(), o[0], p[k], b + (uint64_t)(k * S::DP * 2));
    psa__wgmma_commit();
}

/* P = S in 16 bits, as psa__pv does it. */
template <class T, class S>
PSA__DEVICE void psa__pack_weights(const float (&s)[1][S::BN / 8][4], uint32_t (&p)[S::BN / 16][4])
{
#pragma unroll
    for (int i = 0; i < S::BN / 4; i++) {
        const float(&x)[4] = s[0][i / 4 * 2 + i % 4 / 2];
        p[i / 4][i % 4] = psa__pack(T(), x[i % 2 * 2], x[i % 2 * 2 + 1]);
    }
}

/* O += P V by mma.sync, where V may have what must not reach rows that do not see it; as in psa__attend. */
template <class T, class S>
PSA__DEVICE void psa__guarded_pv(const psa__job &job, uint32_t t, const float (&s)[1][S::BN / 8][4],
                                 float (&o)[1][S::DP / 8][4])
{
    int stage = (int)(t % S::STAGES);
    bool odd = psa__ballot(psa__pv<T, S, true>(job, stage, s, o)) != 0;
    if (odd) psa__add_odd<T, S>(job, stage, (int)(t % S::RING), o);
    psa__bar_arrive(psa__empty<S>(t, 1));
}

/* What a thread has of its query rows. */
template <class S> struct psa__state {
    float s[1][S::BN / 8][4], o[1][S::DP / 8][4], m[2], l[2];
    uint32_t p[S::BN / 16][4];
    bool guarded; /* the tile that s and p are of */
};

/* Weights of tile t, whose QK is done; O is to shrink if it returns so. */
template <class T, class S>
PSA__DEVICE bool psa__tile_weights(const psa__job &job, uint32_t t, psa__state<S> &x, float (&shrink)[2])
{
    float scale, bias;
    psa__bar_arrive(psa__empty<S>(t, 0));
    bool straddles = psa__biases<S>(job, (int)(t % S::RING), x.s, &scale, &bias);
    x.guarded = psa__ballot(straddles) != 0; /* the compiler knows that lanes agree on a ballot */
    bool grew = psa__maxima<S>(scale, bias, x.s, x.m, x.l, shrink);
    psa__weights<S>(scale, bias, x.s, x.m, x.l);
    return grew;
}

/* PV of tile t and QK of the next, then that one's weights. The warpgroups take turns in giving work to the tensor
 * cores, so that one multiplies while the other has weights to compute. */
template <class T, class S> PSA__DEVICE void psa__step_tiles(const psa__job &job, uint32_t t, psa__state<S> &x)
{
    int turn = PSA__TURN + (int)threadIdx.x / 128;
    float shrink[2];
    bool grew;
    psa__bar_wait(psa__full<S>(t, 1), psa__parity<S>(t));
    psa__bar_wait(psa__full<S>(t + 1, 0), psa__parity<S>(t + 1));
    psa__take_turn(turn, S::THREADS);
    if (x.guarded) {
        psa__guarded_pv<T, S>(job, t, x.s, x.o);
        psa__wgmma_fence();
        psa__start_qk<T, S>(t + 1, x.s);
        psa__give_turn(PSA__TURN * 2 + 1 - turn, S::THREADS);
        psa__wgmma_wait<0>(x.s[0]);
        grew = psa__tile_weights<T, S>(job, t + 1, x, shrink);
    } else {
        psa__wgmma_fence();
        psa__start_qk<T, S>(t + 1, x.s);
        psa__start_pv<T, S>(t, x.p, x.o);
        psa__give_turn(PSA__TURN * 2 + 1 - turn, S::THREADS);
        psa__wgmma_wait<1>(x.s[0]);
        grew = psa__tile_weights<T, S>(job, t + 1, x, shrink);
        psa__wgmma_wait<0>(x.o[0]);
        psa__bar_arrive(psa__empty<S>(t, 1));
    }
    if (grew) psa__rescale<S>(shrink, x.o);
    psa__pack_weights<T, S>(x.s, x.p);
}

template <class T, class S> PSA__DEVICE void psa__consume(const psa__hopper_job &job)
{
    uint32_t t = 0;
    float shrink[2];
    if ((int)threadIdx.x >= 128) psa__give_turn(PSA__TURN, S::THREADS);
    for (uint32_t n = 0;; n++) {
        psa__hear<S>(n);
        int tiles = psa__stream_tiles<S>();
        if (tiles < 0) return;
        psa__state<S> x = {{}, {}, {PSA__LOWEST, PSA__LOWEST}, {}, {}, false};
        psa__load_queries<T, S>(job);
        psa__fence_async();
        psa__group_sync(PSA__CONSUME, S::THREADS);
        if (tiles > 0) {
            psa__bar_wait(psa__full<S>(t, 0), psa__parity<S>(t));
            psa__wgmma_fence();
            psa__start_qk<T, S>(t, x.s);
            psa__wgmma_wait<0>(x.s[0]);
            psa__tile_weights<T, S>(job, t, x, shrink); /* O is 0 */
            psa__pack_weights<T, S>(x.s, x.p);
            for (int i = 1; i < tiles; i++, t++) psa__step_tiles<T, S>(job, t, x); /* the inner loop */
            psa__bar_wait(psa__full<S>(t, 1), psa__parity<S>(t));
            if (x.guarded) {
                psa__guarded_pv<T, S>(job, t, x.s, x.o);
            } else {
                psa__wgmma_fence();
                psa__start_pv<T, S>(t, x.p, x.o);
                psa__wgmma_wait<0>(x.o[0]);
                psa__bar_arrive(psa__empty<S>(t, 1));
            }
            t++;
        }
        psa__finish<S>(job, x.o, x.m, x.l);
    }
}

template <class T, class S>
__global__ void __launch_bounds__(S::THREADS + PSA__PRODUCERS, 1)
    psa__attend_hopper(const __grid_constant__ psa__hopper_job job)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PSA_CUDA_EMULATED)
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < 2 * S::STAGES; i++) {
            psa__bar_init(psa__hopper_shape<S>::AT_FULL + i * 8, PSA__PRODUCERS / 32);
            psa__bar_init(psa__hopper_shape<S>::AT_EMPTY + i * 8, S::THREADS / 32);
        }
        psa__bar_init(psa__hopper_shape<S>::AT_TOLD, PSA__PRODUCERS / 32);
        psa__bar_init(psa__hopper_shape<S>::AT_HEARD, S::THREADS / 32);
        psa__fence_async();
    }
    psa__barrier();
    if ((int)threadIdx.x >= S::THREADS) {
        psa__fewer_registers<PSA__PRODUCER_REGISTERS>();
        psa__produce<S>(job);
    } else {
        psa__more_registers<PSA__CONSUMER_REGISTERS>();
        psa__consume<T, S>(job);
    }
#endif
}

/* ================================================================================================================= */
/* >>combine: parts of a softmax over disjoint keys become one                                                       */
/* ================================================================================================================= */

/* One warp per row: its lanes go over pairs of columns. With top = max lse and weight = exp(lse - top), out = sum of
 * weight * part / sum of weights. The parts are those of a split stream; in merge they are out, with its lse, and the
 * caller's other result. */

PSA__DEVICE float psa__part_lse(const psa__job &job, int i, int64_t row)
{
    if (job.merges) return i == 0 ? job.lse[row] : job.part_lse[row];
    return job.part_lse[(int64_t)i * job.B * job.Hq * job.Nq + row];
}

/* exp(lse - top); equal infinities give 1. */
PSA__DEVICE float psa__weight(float lse, float top) { return lse == top ? 1.0f : expf(lse - top); }

static __global__ void __launch_bounds__(PSA__THREADS, PSA__CTAS) psa__combine(const __grid_constant__ psa__job job)
{
    int row = (int)(blockIdx.x * PSA__WARPS + threadIdx.x / 32), head = row / job.Nq, n = row % job.Nq;
    int b = head / job.Hq, h = head % job.Hq;
    float top = -PSA__INF, sum = 0;
    if (b >= job.B) return;
    for (int i = 0; i < job.splits; i++) {
        float lse = psa__part_lse(job, i, row);
        top = lse > top || lse != lse ? lse : top;
    }
    if (job.merges && top == -PSA__INF) return;
    for (int i = 0; i < job.splits; i++) sum += psa__weight(psa__part_lse(job, i, row), top);
    float factor = 1.0f / sum;
    int64_t token = psa__token(job.plan.desc.order_q, b, h, n);
    for (int c = (int)threadIdx.x % 32 * 2; c < job.Dv; c += 64) {
        psa__f2 x = {0, 0};
        for (int i = 0; i < job.splits; i++) {
            bool own = job.merges && i == 0;
            const char *from = own ? psa__row(job.out, b, h, n) : psa__row(job.part, b, h, n) + i * job.part_bytes;
            int type = own ? job.out.type : job.part.type;
            float weight = psa__weight(psa__part_lse(job, i, row), top);
            if (weight == 0) continue;
            x.x += weight * psa__load(from, type, c);
            x.y += weight * psa__load(from, type, c + 1);
        }
        char *to = psa__row(job.out, b, h, token) + c * (job.out.type == PSA_F32 ? 4 : 2);
        psa__store2(to, job.out.type, {x.x * factor, x.y * factor});
    }
    psa__sync_warp(); /* all have read lse */
    if (threadIdx.x % 32 == 0 && job.lse) job.lse[(int64_t)head * job.Nq + token] = top + logf(sum);
}

/* ================================================================================================================= */
/* >>host: arguments are checked, kernels chosen and enqueued                                                        */
/* ================================================================================================================= */

constexpr int PSA__FEW_CTAS = 128; /* with fewer, about the SMs of a GPU, streams are split */
constexpr int PSA__MAX_SPLITS = 16;
constexpr int64_t PSA__L2 = 32 << 20; /* of the 40 to 128 MB that data-centre GPUs have */
constexpr const char *PSA__NO_LAUNCH = "a kernel could not be launched";
constexpr const char *PSA__TOO_LARGE = "stride * D is too large for scores on this device";

static psa_result psa__refuse(const psa_plan *p, psa_result result, const char *message)
{
    if (p && p->desc.log_fn) p->desc.log_fn(p->desc.log_user, message);
    return result;
}

static int psa__padded_dim(const psa_plan *p)
{
    int64_t d = p->D > p->Dv ? p->D : p->Dv;
    return d <= 64 ? 64 : d <= 128 ? 128 : 256;
}

static int psa__tile_rows(const psa_plan *p) { return p->desc.block_q <= 64 || psa__padded_dim(p) == 256 ? 64 : 128; }
static int psa__q_tiles(const psa_plan *p) { return (p->desc.block_q + psa__tile_rows(p) - 1) / psa__tile_rows(p); }
static int64_t psa__map_rows(const psa_plan *p) { return p->B * p->Hq * p->nq; }
static int64_t psa__mask_ctas(const psa_plan *p)
{
    return psa__map_rows(p) < PSA__MASK_CTAS ? psa__map_rows(p) : PSA__MASK_CTAS;
}
static bool psa__in_chunks(const psa_tensor *t) { return (t->nb[1] | t->nb[2] | t->nb[3]) % 16 == 0; }

/* Whether attention cannot read the caller's K and V where they lie. */
static bool psa__copies(const psa_plan *p)
{
    return p->k.type == PSA_F32 || p->desc.order_k.index || !psa__in_chunks(&p->k) || !psa__in_chunks(&p->v);
}

/* Depends on the plan alone, so that results do not depend on the device. */
static int psa__splits(const psa_plan *p)
{
    int64_t ctas = psa__map_rows(p) * psa__q_tiles(p), most = p->nk * p->desc.block_k / 256; /* 4 tiles at least */
    int64_t splits = PSA__FEW_CTAS / ctas < PSA__MAX_SPLITS ? PSA__FEW_CTAS / ctas : PSA__MAX_SPLITS;
    if (splits > most) splits = most;
    return splits > 1 ? (int)splits : 1;
}

/* KV heads whose K and V, with means, have PSA__L2 bytes. */
static int psa__section(const psa_plan *p)
{
    int64_t n = PSA__L2 / ((p->Nk + p->pooled_rows) * (p->D + p->Dv) * 2), heads = p->B * p->Hkv;
    return n < 1 ? 1 : (int)(n < heads ? n : heads);
}

/* Takes n bytes at the cursor, which moves on to the next multiple of 256. */
static char *psa__take(char *work, size_t *cursor, int64_t n)
{
    char *at = work + *cursor;
    *cursor += ((size_t)n + 255) & ~(size_t)255;
    return at;
}

/* Lays out the workspace; returns its size. */
static size_t psa__layout(const psa_plan *p, char *work, psa__job *job)
{
    size_t at = 0;
    int64_t heads = p->B * p->Hkv, rows = psa__map_rows(p), map = rows * p->nk, splits = psa__splits(p);
    int64_t copied = psa__copies(p) ? heads * p->Nk * 2 : 0, outs = splits > 1 ? p->B * p->Hq * p->Nq * 4 : 0;
    char *copy_k = psa__take(work, &at, copied * p->D), *copy_v = psa__take(work, &at, copied * p->Dv);
    if (copied) {
        job->read_k = psa_tensor_4d(copy_k, PSA_BF16, p->D, p->Nk, p->Hkv, p->B);
        job->read_v = psa_tensor_4d(copy_v, PSA_BF16, p->Dv, p->Nk, p->Hkv, p->B);
    }
    job->pooled_k = psa__take(work, &at, heads * p->pooled_rows * p->D * 2);
    job->pooled_v = psa__take(work, &at, heads * p->pooled_rows * p->Dv * 2);
    job->cap = (uint8_t *)psa__take(work, &at, p->desc.n_sim_min ? heads * p->nk : 0);
    job->scores = (float *)psa__take(work, &at, p->desc.mask == PSA_MASK_DENSE ? 0 : map * 4);
    job->n_keys = 2;
    while (job->n_keys < p->nk) job->n_keys *= 2;
    bool far = p->desc.mask != PSA_MASK_DENSE && job->n_keys > PSA__NEAR_KEYS;
    char *far_keys = psa__take(work, &at, far ? psa__mask_ctas(p) * job->n_keys * 8 : 0);
    job->far_keys = far ? (uint64_t *)(void *)far_keys : nullptr;
    job->levels = (uint8_t *)psa__take(work, &at, map);
    job->count = (uint16_t *)psa__take(work, &at, rows * PSA_MAX_LEVELS * 2);
    job->index = (uint16_t *)psa__take(work, &at, map * 2);
    job->ticket = (uint32_t *)(void *)psa__take(work, &at, 4);
    job->part_bytes = outs * p->Dv;
    job->part = psa_tensor_4d(psa__take(work, &at, splits * outs * p->Dv), PSA_F32, p->Dv, p->Nq, p->Hq, p->B);
    job->part_lse = (float *)psa__take(work, &at, splits * outs);
    return at + 255; /* so that work may begin anywhere */
}

static psa_tensor psa__with_data(psa_tensor t, const void *data)
{
    t.data = (void *)(uintptr_t)data;
    return t;
}

static void psa__job_mask(const psa_desc *d, psa__job *job)
{
    int64_t end = 0;
    for (int i = 0; i < PSA_MAX_LEVELS; i++) job->count_end[i] = end += d->level_count[i];
    auto is_empty = [&](int i) { return end > 0 ? d->level_count[i] == 0 : d->level_end[i] == 0; };
    job->n_ends = PSA_MAX_LEVELS;
    while (end == 0 && job->n_ends > 1 && is_empty(job->n_ends - 1)) job->n_ends--;
    while (job->finest < job->n_ends - 1 && is_empty(job->finest)) job->finest++;
}

static void psa__job_score(const psa_plan *p, psa__job *job)
{
    const psa_desc *d = &p->desc;
    bool sample = d->score == PSA_SCORE_SAMPLE, pooled = d->score == PSA_SCORE_POOLED;
    job->parts = d->score == PSA_SCORE_ANTIDIAGONAL ? d->stride : 1;
    job->lane_rows = pooled ? d->score_group[0] : job->parts;
    job->key_rows = pooled ? d->score_group[1] : job->parts;
    while (pooled && 1 << job->key_level < job->key_rows) job->key_level++;
    job->biased = pooled && job->key_rows < d->block_k;
    job->lanes = sample ? p->n_sample_q : d->block_q / job->lane_rows;
    job->keys = sample ? p->n_sample_k : d->block_k / job->key_rows;
    job->columns = job->keys <= 8 ? 8 : (job->keys + 15) / 16 * 16;
    job->units = (job->keys + 15) / 16;
    job->use_max = sample && !d->score_mean;
    job->norm = !sample || d->score_norm;
}

struct psa__choice { /* a kernel and its shared memory; 0: it does not fit */
    void (*kernel)(psa__job);
    size_t shared;
};

/* How many lanes and KV blocks of psa__score fit into shared memory; returns the bytes. */
template <class S> static size_t psa__score_fit(psa__job *job)
{
    int64_t lane_tiles = (job->lanes + 15) / 16 < S::TILES ? (job->lanes + 15) / 16 : S::TILES;
    for (; lane_tiles > 0; lane_tiles--) {
        int64_t row = 16 * lane_tiles * 4, a = job->parts * 16 * lane_tiles * S::DP * 2;
        int64_t fixed = a + S::B_BYTES + S::LANE_BYTES, strip = (job->shared_max - fixed) / row - 1;
        int64_t all = (job->nk + 1) / 2 * 2;
        if (strip > all) strip = all;
        if (strip < 32 && strip < all) continue;
        job->lane_tiles = (int)lane_tiles;
        job->strip = (int)(strip & ~(int64_t)1); /* blocks may come in pairs */
        return (size_t)(fixed + (job->strip + 1) * row);
    }
    return 0;
}

template <class T> static psa__choice psa__choose_score(psa__job *job)
{
    if (job->D <= 64) return {psa__score<T, psa__score_shape<64>>, psa__score_fit<psa__score_shape<64>>(job)};
    if (job->D <= 128) return {psa__score<T, psa__score_shape<128>>, psa__score_fit<psa__score_shape<128>>(job)};
    return {psa__score<T, psa__score_shape<256>>, psa__score_fit<psa__score_shape<256>>(job)};
}

template <class T> static psa__choice psa__choose_attend(const psa_plan *p)
{
    int dim = psa__padded_dim(p), few = p->desc.block_q <= 64;
    if (dim == 256) return {psa__attend<T, psa__tiles_256>, psa__tiles_256::BYTES};
    if (dim == 128 && few) return {psa__attend<T, psa__tiles_128_few>, psa__tiles_128_few::BYTES};
    if (dim == 128) return {psa__attend<T, psa__tiles_128>, psa__tiles_128::BYTES};
    if (few) return {psa__attend<T, psa__tiles_64_few>, psa__tiles_64_few::BYTES};
    return {psa__attend<T, psa__tiles_64>, psa__tiles_64::BYTES};
}

/* Boxes of 1, 4 and 8 rows of a tensor [B][heads][rows][D]. */
static bool psa__make_maps(psa__map (&map)[3], const psa_tensor *t)
{
    const uint64_t size[5] = {64, (uint64_t)t->ne[1], (uint64_t)t->ne[0] / 64, (uint64_t)t->ne[2], (uint64_t)t->ne[3]};
    const uint64_t stride[4] = {t->nb[1], 128, t->nb[2], t->nb[3]};
    const uint32_t box[3][5] = {{64, 1, 1, 1, 1}, {64, 4, 1, 1, 1}, {64, 8, (uint32_t)size[2], 1, 1}};
    bool good = true;
    for (int i = 0; i < 3; i++) good = good && psa__make_map(&map[i], t->data, size, stride, box[i]);
    return good;
}

typedef void (*psa__hopper_kernel)(psa__hopper_job);

template <class T> static psa__hopper_kernel psa__choose_hopper(const psa_plan *p)
{
    return p->D == 128 ? psa__attend_hopper<T, psa__hopper_128> : psa__attend_hopper<T, psa__hopper_64>;
}

/* Whether psa__attend_hopper can do it and is asked to; its job then. */
static bool psa__hopper_init(psa__hopper_job *h, const psa__job *job, psa__hopper_kernel kernel)
{
    const psa_plan *p = &job->plan;
    const char *wanted = getenv("PSA_SM90");
    int64_t rows = p->pooled_rows > 0 ? p->pooled_rows : 1; /* dense: nothing is read from there */
    if (job->capability != 90 || !wanted || strcmp(wanted, "1") != 0 || !psa__has_code(kernel)) return false;
    if (p->D != p->Dv || (p->D != 64 && p->D != 128) || p->desc.block_q <= 64 || job->splits > 1) return false;
    static_cast<psa__job &>(*h) = *job;
    h->tiles = (int)psa__map_rows(p) * job->q_tiles;
    psa_tensor pooled = psa_tensor_4d(job->pooled_k, PSA_BF16, p->D, rows, p->Hkv, p->B);
    psa_tensor pooled_v = psa__with_data(pooled, job->pooled_v);
    return psa__make_maps(h->map[0][0], &job->read_k) && psa__make_maps(h->map[1][0], &job->read_v) &&
           psa__make_maps(h->map[0][1], &pooled) && psa__make_maps(h->map[1][1], &pooled_v);
}

static psa_result psa__run_hopper(const psa__hopper_job &h, psa__hopper_kernel kernel, void *stream)
{
    unsigned ctas = (unsigned)(h.tiles < h.sms ? h.tiles : h.sms);
    int threads = psa__hopper_64::THREADS + PSA__PRODUCERS;
    size_t shared = h.D == 128 ? psa__hopper_shape<psa__hopper_128>::BYTES : psa__hopper_shape<psa__hopper_64>::BYTES;
    cudaError_t e = cudaMemsetAsync(h.ticket, 0, 4, (cudaStream_t)stream);
    if (e == cudaSuccess) e = psa__enqueue(kernel, ctas, 1, threads, shared, stream, h);
    return e == cudaSuccess ? PSA_OK : psa__refuse(&h.plan, PSA_ERR_CUDA_LAUNCH, PSA__NO_LAUNCH);
}

/* What every stage begins with: the device, the limits, the job. Pointers may be NULL where a stage has none. */
static psa_result psa__job_init(psa__job *job, const psa_plan *p, const void *q, const void *k, const void *v,
                                const void *out, void *work)
{
    int device = 0, major = 0, minor = 0, sms = 0, shared_max = 0;
    if (!p) return PSA_ERR_NULL;
    if (!work) return psa__refuse(p, PSA_ERR_NULL, "work must not be NULL");
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        major < 8 || shared_max < 99 * 1024) {
        return psa__refuse(p, PSA_ERR_CUDA_DEVICE, "expected a device of compute capability 8.0 or later");
    }
    if (p->n_levels > 1 && (p->desc.tree || p->desc.tilt || p->desc.mask == PSA_MASK_ERROR || p->desc.density > 0)) {
        return psa__refuse(p, PSA_ERR_CUDA_RECIPE, "expected no tree, tilt, mask ERROR or density");
    }
    if (((uintptr_t)q | (uintptr_t)k | (uintptr_t)v | (uintptr_t)out) % 16 != 0 || (out && !psa__in_chunks(&p->out))) {
        return psa__refuse(p, PSA_ERR_CUDA_ALIGN, "expected data, and strides of out, in multiples of 16 bytes");
    }
    if (p->nk > 65535 || psa__map_rows(p) * psa__q_tiles(p) > INT32_MAX || p->B * p->Hkv * p->nk > INT32_MAX) {
        return psa__refuse(p, PSA_ERR_CUDA_SIZE, "expected at most 65535 KV blocks");
    }
    memset(job, 0, sizeof *job);
    job->plan = *p;
    job->shared_max = shared_max;
    job->capability = 10 * major + minor;
    job->sms = sms;
    job->B = (int)p->B, job->Hq = (int)p->Hq, job->Hkv = (int)p->Hkv, job->group = (int)(p->Hq / p->Hkv);
    job->Nq = (int)p->Nq, job->Nk = (int)p->Nk, job->D = (int)p->D, job->Dv = (int)p->Dv;
    job->nq = (int)p->nq, job->nk = (int)p->nk, job->block_q = p->desc.block_q, job->block_k = p->desc.block_k;
    while (1 << job->log2_block_k < job->block_k) job->log2_block_k++;
    job->causal = p->desc.causal != 0;
    job->shift = job->causal ? (int)(p->Nk - p->Nq) : 0;
    job->scale = fabsf(p->desc.scale) * PSA__LOG2E;
    job->flip = p->desc.scale < 0 ? 0x80008000u : 0;
    job->q = psa__with_data(p->q, q);
    job->k = job->read_k = psa__with_data(p->k, k);
    job->v = job->read_v = psa__with_data(p->v, v);
    job->out = psa__with_data(p->out, out);
    job->q_tiles = psa__q_tiles(p);
    job->section = psa__section(p);
    job->splits = psa__splits(p);
    psa__job_score(p, job);
    psa__job_mask(&p->desc, job);
    psa__layout(p, (char *)(((uintptr_t)work + 255) & ~(uintptr_t)255), job);
    return PSA_OK;
}

static psa_result psa__run(const psa_plan *p, void (*kernel)(psa__job), int64_t x, int y, size_t shared, void *stream,
                           const psa__job &job)
{
    cudaError_t e = psa__enqueue(kernel, (unsigned)x, (unsigned)y, PSA__THREADS, shared, stream, job);
    return e == cudaSuccess ? PSA_OK : psa__refuse(p, PSA_ERR_CUDA_LAUNCH, PSA__NO_LAUNCH);
}

extern "C" size_t psa_cuda_work_size(const psa_plan *plan)
{
    psa__job job;
    return psa__layout(plan, nullptr, &job);
}

extern "C" psa_result psa_cuda_pool(const psa_plan *plan, const void *k, const void *v, void *work, void *stream)
{
    psa__job job;
    psa_result r = psa__job_init(&job, plan, nullptr, k, v, nullptr, work);
    if (r != PSA_OK) return r;
    if (!k) return psa__refuse(plan, PSA_ERR_NULL, "k must not be NULL");
    if (plan->desc.mask == PSA_MASK_DENSE && !psa__copies(plan)) return PSA_OK;
    return psa__run(plan, plan->k.type == PSA_F16 ? psa__pool<psa__f16> : psa__pool<psa__bf16>,
                    plan->B * plan->Hkv * plan->nk, v ? 2 : 1, PSA__POOL_BYTES, stream, job);
}

extern "C" psa_result psa_cuda_score(const psa_plan *plan, const void *q, const void *k, void *work, float *scores,
                                     void *stream)
{
    psa__job job;
    psa__choice choice;
    psa_result r = psa__job_init(&job, plan, q, k, nullptr, nullptr, work);
    if (r != PSA_OK || plan->desc.mask == PSA_MASK_DENSE) return r;
    if (!q || !k) return psa__refuse(plan, PSA_ERR_NULL, "q and k must not be NULL");
    if (scores) job.scores = scores;
    choice = plan->k.type == PSA_F16 ? psa__choose_score<psa__f16>(&job) : psa__choose_score<psa__bf16>(&job);
    if (choice.shared == 0) return psa__refuse(plan, PSA_ERR_CUDA_SIZE, PSA__TOO_LARGE);
    return psa__run(plan, choice.kernel, psa__map_rows(plan), 1, choice.shared, stream, job);
}

extern "C" psa_result psa_cuda_mask(const psa_plan *plan, const float *scores, void *work, uint8_t *levels,
                                    void *stream)
{
    psa__job job;
    psa_result r = psa__job_init(&job, plan, nullptr, nullptr, nullptr, nullptr, work);
    if (r != PSA_OK) return r;
    if (scores) job.scores = (float *)(uintptr_t)scores;
    if (levels) job.levels = levels;
    size_t near_keys = plan->desc.mask == PSA_MASK_DENSE || job.far_keys ? 0 : (size_t)job.n_keys;
    return psa__run(plan, psa__mask, psa__mask_ctas(plan), 1, PSA__KEYS + near_keys * 8, stream, job);
}

extern "C" psa_result psa_cuda_list(const psa_plan *plan, const uint8_t *levels, void *work, void *stream)
{
    psa__job job;
    psa_result r = psa__job_init(&job, plan, nullptr, nullptr, nullptr, nullptr, work);
    if (r != PSA_OK) return r;
    job.levels = (uint8_t *)(uintptr_t)levels;
    return psa__run(plan, psa__list, psa__map_rows(plan), 1, PSA__KEYS, stream, job);
}

extern "C" psa_result psa_cuda_attend(const psa_plan *plan, const void *q, const void *k, const void *v, void *work,
                                      void *out, float *lse, void *stream)
{
    psa__job job;
    psa__hopper_job hopper_job;
    psa__hopper_kernel hopper;
    psa__choice choice;
    psa_result r = psa__job_init(&job, plan, q, k, v, out, work);
    if (r != PSA_OK) return r;
    if (!q || !k || !v || !out || plan->Dv == 0 || plan->out.ne[0] == 0) {
        return psa__refuse(plan, PSA_ERR_NULL, "q, k, v and out must not be NULL, in the plan neither");
    }
    job.lse = lse;
    hopper = plan->k.type == PSA_F16 ? psa__choose_hopper<psa__f16>(plan) : psa__choose_hopper<psa__bf16>(plan);
    if (psa__hopper_init(&hopper_job, &job, hopper)) return psa__run_hopper(hopper_job, hopper, stream);
    choice = plan->k.type == PSA_F16 ? psa__choose_attend<psa__f16>(plan) : psa__choose_attend<psa__bf16>(plan);
    r = psa__run(plan, choice.kernel, psa__map_rows(plan) * job.q_tiles, job.splits, choice.shared, stream, job);
    if (r != PSA_OK || job.splits == 1) return r;
    int64_t rows = plan->B * plan->Hq * plan->Nq;
    return psa__run(plan, psa__combine, (rows + PSA__WARPS - 1) / PSA__WARPS, 1, 0, stream, job);
}

extern "C" psa_result psa_cuda_attention(const psa_plan *plan, const void *q, const void *k, const void *v, void *out,
                                         const psa_extra *extra, void *work, size_t work_size, void *stream)
{
    psa__job job;
    psa_extra none = {}, x = extra ? *extra : none;
    bool dense;
    psa_result r = psa__job_init(&job, plan, q, k, v, out, work);
    if (r != PSA_OK) return r;
    if (!q || !k || !v || !out) return psa__refuse(plan, PSA_ERR_NULL, "q, k, v and out must not be NULL");
    if (x.levels_given && !x.levels) return psa__refuse(plan, PSA_ERR_NULL, "levels_given without levels");
    if (work_size < psa_cuda_work_size(plan)) {
        return psa__refuse(plan, PSA_ERR_CUDA_WORK, "work is smaller than psa_cuda_work_size says");
    }
    dense = plan->desc.mask == PSA_MASK_DENSE;
    if (!dense && !x.levels_given && psa__choose_score<psa__bf16>(&job).shared == 0) {
        return psa__refuse(plan, PSA_ERR_CUDA_SIZE, PSA__TOO_LARGE);
    }
    if ((r = psa_cuda_pool(plan, k, v, work, stream)) != PSA_OK) return r;
    if (x.levels_given || (dense && !x.levels)) {
        r = psa_cuda_list(plan, x.levels_given ? x.levels : nullptr, work, stream);
    } else {
        if ((r = psa_cuda_score(plan, q, k, work, x.scores, stream)) != PSA_OK) return r;
        r = psa_cuda_mask(plan, x.scores, work, x.levels, stream);
    }
    if (r != PSA_OK) return r;
    return psa_cuda_attend(plan, q, k, v, work, out, x.lse, stream);
}

extern "C" psa_result psa_cuda_merge(const psa_tensor *out, float *lse, const psa_tensor *part, const float *part_lse,
                                     void *stream)
{
    psa__job job;
    if (!out || !lse || !part || !part_lse || !out->data || !part->data) return PSA_ERR_NULL;
    for (int i = 0; i < 4; i++) {
        if (out->ne[i] < 1 || out->ne[i] != part->ne[i]) return PSA_ERR_SHAPE;
    }
    if (out->ne[0] > PSA_MAX_D || out->ne[0] % 8 != 0) return PSA_ERR_HEAD_DIM;
    if ((uintptr_t)out->data % 16 != 0 || !psa__in_chunks(out)) return PSA_ERR_CUDA_ALIGN;
    int64_t rows = out->ne[1] * out->ne[2] * out->ne[3];
    if (rows > INT32_MAX) return PSA_ERR_CUDA_SIZE;
    memset(&job, 0, sizeof job);
    job.Dv = (int)out->ne[0], job.Nq = (int)out->ne[1], job.Hq = (int)out->ne[2], job.B = (int)out->ne[3];
    job.out = *out;
    job.part = *part;
    job.part_lse = (float *)(uintptr_t)part_lse;
    job.lse = lse;
    job.splits = 2;
    job.merges = 1;
    return psa__run(nullptr, psa__combine, (rows + PSA__WARPS - 1) / PSA__WARPS, 1, 0, stream, job);
}
