/* peak.h - what this machine can do at best: f32 multiply-adds and reading memory. Include after crew.h. Everything is
 * static. Needs gcc or clang. */
#ifndef PEAK_H
#define PEAK_H

#if defined(__x86_64__) || defined(__i386__)
#define PEAK_X86 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define PEAK_NEON 1
#include <arm_neon.h>
#endif

/* ---- multiply-adds: chains that do not wait for one another ---- */

enum { CHAINS = 10, PEAK_ROUNDS = 3000000 };

/* Every chain tends to 1: no overflow, no denormals. They start apart, or the compiler would keep only one. */
#define PEAK_LOOP(name, target, vec, set1, fma, add, first) \
    target static float name(void) { \
        vec x = set1(0.75f), y = set1(0.25f); \
        vec a = set1(.0f), b = set1(.1f), c = set1(.2f), d = set1(.3f), e = set1(.4f); \
        vec f = set1(.5f), g = set1(.6f), h = set1(.7f), i = set1(.8f), j = set1(.9f); \
        for (int n = 0; n < PEAK_ROUNDS; n++) { \
            a = fma(a, x, y), b = fma(b, x, y), c = fma(c, x, y), d = fma(d, x, y), e = fma(e, x, y); \
            f = fma(f, x, y), g = fma(g, x, y), h = fma(h, x, y), i = fma(i, x, y), j = fma(j, x, y); \
        } \
        a = add(add(add(a, b), add(c, d)), add(add(e, f), add(add(g, h), add(i, j)))); \
        return first(a); \
    }

/* What a compiler can make of plain C: the vectors that every machine of this kind has. */
enum { BASE_LANES = 4 };
typedef float base_vec __attribute__((vector_size(16)));
#define BASE_SET1(x) ((base_vec){x, x, x, x})
#define BASE_FMA(a, x, y) ((a) * (x) + (y))
#define BASE_ADD(a, b) ((a) + (b))
#define BASE_FIRST(a) ((a)[0])
PEAK_LOOP(peak_base, , base_vec, BASE_SET1, BASE_FMA, BASE_ADD, BASE_FIRST)
#ifdef PEAK_X86
PEAK_LOOP(peak_avx2, __attribute__((target("avx2,fma"))), __m256, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps,
          _mm256_cvtss_f32)
PEAK_LOOP(peak_avx512, __attribute__((target("avx512f"))), __m512, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps,
          _mm512_cvtss_f32)
/* vdpbf16ps: two bf16 products into each f32. The elements are those of f32 numbers, of which every other one is 0. */
#define BF16_FMA(a, x, y) _mm512_dpbf16_ps(a, (__m512bh)(x), (__m512bh)(y))
PEAK_LOOP(peak_avx512_bf16, __attribute__((target("avx512f,avx512bf16"))), __m512, _mm512_set1_ps, BF16_FMA,
          _mm512_add_ps, _mm512_cvtss_f32)
#endif

static int peak_is_avx512(psa_isa isa) { return isa == PSA_ISA_AVX512 || isa == PSA_ISA_AMX; }

/* Whether the CPU multiplies bf16 in vectors of this instruction set. */
static int peak_has_bf16(psa_isa isa) {
#ifdef PEAK_X86
    return isa == PSA_ISA_AVX512 && __builtin_cpu_supports("avx512bf16");
#else
    (void)isa;
    return 0;
#endif
}

#ifdef PEAK_NEON
#define NEON_FMA(a, x, y) vfmaq_f32(y, a, x)
#define NEON_FIRST(a) vgetq_lane_f32(a, 0)
PEAK_LOOP(peak_neon, , float32x4_t, vdupq_n_f32, NEON_FMA, vaddq_f32, NEON_FIRST)
#endif

static float peak_loop(psa_isa isa, psa_type type) {
#ifdef PEAK_X86
    if (isa == PSA_ISA_AVX512 && type == PSA_BF16)
        return peak_avx512_bf16();
    if (peak_is_avx512(isa))
        return peak_avx512();
    if (isa == PSA_ISA_AVX2)
        return peak_avx2();
#endif
#ifdef PEAK_NEON
    if (isa == PSA_ISA_NEON || isa == PSA_ISA_NEON_BF16)
        return peak_neon();
#endif
    (void)isa, (void)type;
    return peak_base();
}

typedef struct chains {
    psa_isa isa;
    psa_type type;
    volatile float sink;
} chains;

static void peak_task(void *ctx, int ith, int nth) {
    chains *c = (chains *)ctx;
    float sum = peak_loop(c->isa, c->type);
    if (sum < 0) /* never, but the compiler cannot know */
        c->sink = sum + (float)(ith + nth);
}

/* Floating-point operations of peak_seconds. */
static double peak_flop(psa_isa isa, psa_type type, int threads) {
    int lanes = peak_is_avx512(isa) ? 16 : isa == PSA_ISA_AVX2 ? 8 : BASE_LANES;
    return (type == PSA_BF16 ? 4.0 : 2.0) * lanes * CHAINS * PEAK_ROUNDS * threads;
}

/* The same loop on every thread at once. type: F32, or BF16 where peak_has_bf16. */
static double peak_seconds(crew *c, psa_isa isa, psa_type type, int threads) {
    chains all = {isa, type, 0};
    double start = now();
    crew_run(c, threads, peak_task, &all);
    return now() - start;
}

/* ---- memory: a sum in wide loads ---- */

enum { READ_BYTES = 256 }; /* a multiple of every loop's step */

/* data is aligned to a vector; bytes that do not fill a step are left out. */
#define READ_LOOP(name, target, size) \
    target static uint64_t name(const char *data, size_t bytes) { \
        typedef uint64_t vec __attribute__((vector_size(size))); \
        const vec *x = (const vec *)(const void *)data, *end = x + bytes / (4 * size) * 4; \
        vec a = {0}, b = a, c = a, d = a; \
        uint64_t sum = 0; \
        for (; x < end; x += 4) \
            a += x[0], b += x[1], c += x[2], d += x[3]; \
        a += b + c + d; \
        for (size_t lane = 0; lane < size / sizeof sum; lane++) \
            sum += a[lane]; \
        return sum; \
    }

READ_LOOP(read_base, , 16)
#ifdef PEAK_X86
READ_LOOP(read_avx2, __attribute__((target("avx2"))), 32)
READ_LOOP(read_avx512, __attribute__((target("avx512f"))), 64)
#endif

static uint64_t read_loop(psa_isa isa, const char *data, size_t bytes) {
#ifdef PEAK_X86
    if (peak_is_avx512(isa))
        return read_avx512(data, bytes);
    if (isa == PSA_ISA_AVX2)
        return read_avx2(data, bytes);
#endif
    (void)isa;
    return read_base(data, bytes);
}

typedef struct reading {
    psa_isa isa;
    const char *data; /* aligned to 64 bytes */
    size_t bytes;
    volatile uint64_t sink;
} reading;

static void read_task(void *ctx, int ith, int nth) {
    reading *r = (reading *)ctx;
    size_t each = r->bytes / (size_t)nth / READ_BYTES * READ_BYTES, begin = (size_t)ith * each;
    uint64_t sum = read_loop(r->isa, r->data + begin, ith == nth - 1 ? r->bytes - begin : each);
    if (sum == 1) /* as good as never */
        r->sink = sum;
}

static double read_seconds(crew *c, psa_isa isa, int threads, const void *data, size_t bytes) {
    reading r = {isa, (const char *)data, bytes, 0};
    double start = now();
    crew_run(c, threads, read_task, &r);
    return now() - start;
}
#endif
