/* immintrin.h of the tests' build that runs the AVX2, AVX-512 and AMX leaves on a CPU without them: SIMDe's portable
 * intrinsics under Intel's names, and what SIMDe 0.7.4 lacks. Put first by -Itests/simde, with PSA_SIMD_EMULATED. */
#ifndef TESTS_SIMDE_IMMINTRIN_H
#define TESTS_SIMDE_IMMINTRIN_H

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#include <math.h>
#include <string.h>

#undef I /* of complex.h, which SIMDe includes */

typedef simde__mmask16 __mmask16;

static inline __m512 _mm512_cvtph_ps(__m256i x) {
    return _mm512_castpd_ps(_mm512_insertf64x4(
        _mm512_castpd256_pd512(_mm256_castps_pd(_mm256_cvtph_ps(_mm256_castsi256_si128(x)))),
        _mm256_castps_pd(_mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))), 1));
}

static inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x))),
                              _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)), 1);
}

/* With all lanes in the mask */
static inline __m256i _mm512_maskz_cvtps_ph(__mmask16 mask, __m512 x, int round) {
    float from[16];
    uint16_t to[16];
    (void)mask;
    _mm512_storeu_ps(from, x);
    for (int i = 0; i < 2; i++)
        _mm_storeu_si128((__m128i *)(void *)(to + 8 * i), _mm256_cvtps_ph(_mm256_loadu_ps(from + 8 * i), round));
    return _mm256_loadu_si256((const __m256i *)(const void *)to);
}

static inline __m256i _mm512_cvtepi32_epi16(__m512i x) {
    uint32_t from[16];
    uint16_t to[16];
    _mm512_storeu_si512(from, x);
    for (int i = 0; i < 16; i++)
        to[i] = (uint16_t)from[i];
    return _mm256_loadu_si256((const __m256i *)(const void *)to);
}

/* Quarters 0 and 1 of the result are quarters of a, 2 and 3 of b; two bits of select name each. */
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int select) {
    float from[2][16], to[16];
    _mm512_storeu_ps(from[0], a);
    _mm512_storeu_ps(from[1], b);
    for (int i = 0; i < 4; i++)
        memcpy(to + 4 * i, from[i / 2] + 4 * (select >> 2 * i & 3), 4 * sizeof(float));
    return _mm512_loadu_ps(to);
}

/* Lane i of each quarter is the lane of a that two bits of select name. */
static inline __m512 _mm512_permute_ps(__m512 a, int select) {
    float from[16], to[16];
    _mm512_storeu_ps(from, a);
    for (int i = 0; i < 16; i++)
        to[i] = from[i / 4 * 4 + (select >> 2 * (i % 4) & 3)];
    return _mm512_loadu_ps(to);
}

/* x - floor(x), as select 9 asks for; of an infinity 0 */
static inline __m512 _mm512_reduce_ps(__m512 x, int select) {
    float lane[16];
    (void)select;
    _mm512_storeu_ps(lane, x);
    for (int i = 0; i < 16; i++)
        lane[i] = isinf(lane[i]) ? 0.0f : lane[i] - floorf(lane[i]);
    return _mm512_loadu_ps(lane);
}

/* Lanes that are in the mask, and zeros; the others are not touched. */
static inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void *from) {
    int32_t to[16] = {0};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1)
            memcpy(to + i, (const char *)from + 4 * i, sizeof *to);
    return _mm512_loadu_si512(to);
}

static inline int _mm_popcnt_u32(unsigned x) {
    return __builtin_popcount(x);
}

/* AMX: tiles of 16 rows of 64 bytes, each thread has its own */
static __thread unsigned char tiles[8][16][64];

static inline void _tile_loadconfig(const void *config) { (void)config; }
static inline void _tile_release(void) {}
static inline void _tile_zero(int t) { memset(tiles[t], 0, sizeof tiles[t]); }

static inline void _tile_loadd(int t, const void *base, int64_t stride) {
    for (int i = 0; i < 16; i++)
        memcpy(tiles[t][i], (const char *)base + i * stride, 64);
}

static inline void _tile_stored(int t, void *base, int64_t stride) {
    for (int i = 0; i < 16; i++)
        memcpy((char *)base + i * stride, tiles[t][i], 64);
}

static inline float tile_bf16(int t, int row, int column) {
    unsigned bits = (unsigned)tiles[t][row][2 * column + 1] << 24 | (unsigned)tiles[t][row][2 * column] << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline void _tile_dpbf16ps(int c, int a, int b) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float sum;
            memcpy(&sum, tiles[c][i] + 4 * j, sizeof sum);
            for (int k = 0; k < 32; k++)
                sum += tile_bf16(a, i, k) * tile_bf16(b, k / 2, 2 * j + k % 2);
            memcpy(tiles[c][i] + 4 * j, &sum, sizeof sum);
        }
}

#endif
