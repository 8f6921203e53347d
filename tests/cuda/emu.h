/* emu.h - runs the kernels of psa_cuda.cu on the CPU, one fiber per CUDA thread. C++17, gcc or clang, glibc.
 *
 * psa_cuda.cu reaches everything that only a GPU has through thin psa__ wrappers; this file is their second
 * implementation. What it shows that a plain loop would not:
 *   - Threads run until they block, in the order of a schedule (in order, random, one warp far ahead of or behind
 *     the others), so a missing barrier reads too early or writes too late under one of them.
 *   - cp.async lands at once, at the last moment (the wait of the thread that issued it), or by the toss of a coin.
 *   - Shared memory starts as NaN in each type; every access is checked for bounds and alignment.
 *   - Lanes that meet at different collectives, and blocks in which nothing can run any more, are errors.
 *   - Shared-memory wavefronts are counted per source line.
 *   - A barrier or a wait can be left out by its source line: the tests prove that they would notice. */
#ifndef EMU_H
#define EMU_H

#include "cuda_runtime_api.h"

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <vector>

namespace emu {

enum schedule { IN_ORDER, RANDOM, AHEAD, BEHIND };
enum landing { LATE, EARLY, COIN }; /* when a cp.async copies */

struct options {
    schedule order = IN_ORDER;
    landing copies = LATE;
    int warp = 0;           /* the one ahead or behind */
    uint64_t seed = 1;
    int skip_line = 0;      /* the barrier or wait on this line does nothing */
    int shift_line = 0;     /* the ldmatrix on this line reads the chunk beside the right one */
    bool quiet = false;     /* errors are not printed */
    bool count = false;     /* wavefronts per line */
    int capability = 80;    /* what cudaDeviceGetAttribute says */
    int shared_max = 99 * 1024;
};

struct line_count { /* of one access in the source */
    uint64_t accesses = 0, wavefronts = 0, ideal = 0;
};

enum { MAX_THREADS = 1024, STACK = 64 * 1024, SHARED = 256 * 1024 };
enum state : uint8_t { RUNNABLE, AT_WARP, AT_BLOCK, DONE };

struct copy {
    uint32_t to;
    const void *from; /* NULL: zeros */
};

struct fiber {
    jmp_buf at;
    ucontext_t start;
    std::vector<char> stack;
    std::vector<std::vector<copy>> groups; /* cp.async; the last one is open */
    bool started;
    state now;
};

struct warp {
    int arrived, line;
    uint32_t in[32][12];
    uint32_t out[32][4];
};

struct machine {
    options opt;
    std::map<int, line_count> lines;
    std::set<int> syncs, matrices; /* lines of the barriers and waits, and of the ldmatrix, that were met */
    uint64_t mmas = 0, exps = 0, copied = 0, random = 1; /* copied: bytes of cp.async that exist */
    bool failed = false; /* the launch */

    alignas(1024) unsigned char shared[SHARED];
    uint32_t shared_size = 0;
    int threads = 0, current = 0, at_block = 0, left = 0;
    uint64_t runnable[MAX_THREADS / 64];
    fiber fibers[MAX_THREADS];
    warp warps[MAX_THREADS / 32];
    jmp_buf home;
    ucontext_t home_start;
    void (*body)(void *);
    void *arg;
    using access = std::tuple<int, int, uint64_t>; /* warp, line, how many times the lane was there before */
    struct partial {
        int lanes = 0;
        uint32_t address[32];
    };
    std::map<access, partial> open;
    std::map<std::pair<int, int>, uint64_t> visits; /* thread, line */
};

inline machine m;

struct index3 {
    unsigned x, y, z;
};
inline index3 thread_index, block_index, block_dim, grid_dim;

/* Ends the launch. */
[[noreturn]] inline void fail(const char *what, long a = 0, long b = 0)
{
    m.failed = true;
    if (!m.opt.quiet) {
        printf("  emulator: block %u,%u thread %d: ", block_index.x, block_index.y, m.current);
        printf(what, a, b);
        printf("\n");
    }
    _longjmp(m.home, 1);
}

inline uint64_t next_random()
{
    m.random ^= m.random << 13;
    m.random ^= m.random >> 7;
    return m.random ^= m.random << 17;
}

/* ---- fibers ---- */

inline void set_state(int i, state s)
{
    m.fibers[i].now = s;
    uint64_t bit = UINT64_C(1) << (i & 63);
    m.runnable[i >> 6] = s == RUNNABLE ? m.runnable[i >> 6] | bit : m.runnable[i >> 6] & ~bit;
}

/* The first runnable thread at or after `from`, going round; a warp to avoid (-1: none) only if there is no other. */
inline int runnable_from(int from, int avoid)
{
    int words = (m.threads + 63) / 64, spare = -1;
    for (int n = 0; n <= words; n++) {
        int word = (from / 64 + n) % words;
        uint64_t set = m.runnable[word];
        if (n == 0) set &= ~UINT64_C(0) << (from & 63);
        while (set) {
            int i = word * 64 + __builtin_ctzll(set);
            if (i / 32 != avoid) return i;
            spare = i;
            set &= ~(UINT64_C(0xffffffff) << (avoid & 1 ? 32 : 0));
        }
    }
    return spare;
}

inline int pick()
{
    switch (m.opt.order) {
    case RANDOM: return runnable_from((int)(next_random() % (uint64_t)m.threads), -1);
    case AHEAD: return runnable_from(m.opt.warp * 32 % m.threads, -1);
    case BEHIND: return runnable_from(0, m.opt.warp % (m.threads / 32));
    case IN_ORDER: break;
    }
    return runnable_from(0, -1);
}

inline void entry()
{
    m.body(m.arg);
    set_state(m.current, DONE);
    if (--m.left == 0) _longjmp(m.home, 1);
    int i = pick();
    if (i < 0) fail("the others wait for a thread that has returned");
    void resume(int);
    resume(i);
}

inline void resume(int i)
{
    m.current = i;
    thread_index = {(unsigned)i, 0, 0};
    fiber &f = m.fibers[i];
    if (f.started) _longjmp(f.at, 1);
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.data();
    f.start.uc_stack.ss_size = f.stack.size();
    f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
    setcontext(&f.start);
}

inline void block_as(state s)
{
    set_state(m.current, s);
    int i = pick();
    if (i < 0) fail("deadlock: no thread of the block can run");
    if (_setjmp(m.fibers[m.current].at) == 0) resume(i);
}

/* Buffers that end at a page that cannot be read turn a bad global address into this. */
inline void bad_address(int)
{
    if (m.left > 0) fail("a read or write outside of global memory");
    signal(SIGSEGV, SIG_DFL);
}

/* One CUDA block: body(arg) on every thread. */
inline void run_block(int threads, size_t shared, void (*body)(void *), void *arg)
{
    m.threads = m.left = threads;
    m.shared_size = (uint32_t)shared;
    m.at_block = 0;
    m.body = body;
    m.arg = arg;
    memset(m.shared, 0xff, shared);
    memset(m.runnable, 0, sizeof m.runnable);
    for (int i = 0; i < threads; i++) {
        fiber &f = m.fibers[i];
        if (f.stack.empty()) f.stack.resize(STACK);
        f.groups.assign(1, {});
        f.started = false;
        set_state(i, RUNNABLE);
    }
    for (warp &w : m.warps) w.arrived = 0;
    struct sigaction action = {};
    action.sa_handler = bad_address;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, nullptr);
    if (_setjmp(m.home) == 0) resume(pick());
    m.left = 0;
    m.open.clear();
    m.visits.clear();
}

/* ---- collectives ---- */

inline uint32_t *lane_in() { return m.warps[m.current / 32].in[m.current % 32]; }
inline uint32_t *lane_out() { return m.warps[m.current / 32].out[m.current % 32]; }

/* The last lane to arrive runs f(warp); then all go on. */
template <class F> void collective(int line, F f)
{
    int first = m.current / 32 * 32;
    warp &w = m.warps[m.current / 32];
    if (w.arrived++ == 0) w.line = line;
    if (w.line != line) fail("lanes of a warp meet at lines %ld and %ld", w.line, line);
    if (w.arrived < 32) {
        block_as(AT_WARP);
        return;
    }
    w.arrived = 0;
    f(w);
    for (int i = first; i < first + 32; i++) set_state(i, RUNNABLE);
}

inline void block_barrier(int line)
{
    m.syncs.insert(line);
    if (line == m.opt.skip_line) return;
    if (++m.at_block < m.threads) {
        block_as(AT_BLOCK);
        return;
    }
    m.at_block = 0;
    for (int i = 0; i < m.threads; i++) set_state(i, RUNNABLE);
}

/* ---- shared memory ---- */

/* Wavefronts of one access of a warp: lanes are served in groups of 128 bytes; in each, a bank gives one word at a
 * time. */
inline void count_wavefronts(int line, const uint32_t *address, int lanes, int bytes)
{
    line_count &c = m.lines[line];
    int together = 128 / bytes < lanes ? 128 / bytes : lanes;
    c.accesses++;
    for (int first = 0; first < lanes; first += together) {
        std::vector<uint32_t> words[32];
        size_t most = 1;
        for (int i = first; i < first + together; i++) {
            for (int b = 0; b < bytes; b += 4) {
                uint32_t word = (address[i] + (uint32_t)b) / 4;
                std::vector<uint32_t> &bank = words[word % 32];
                bool known = false;
                for (uint32_t x : bank) known |= x == word;
                if (!known) bank.push_back(word);
                if (bank.size() > most) most = bank.size();
            }
        }
        c.wavefronts += most;
        c.ideal++;
    }
}

/* The same for accesses that lanes make on their own: the n-th visits of 32 lanes to a line are one access. */
inline void count_lane(int line, uint32_t address, int bytes)
{
    uint64_t n = m.visits[{m.current, line}]++;
    machine::access key(m.current / 32, line, n);
    machine::partial &warp = m.open[key];
    warp.address[m.current % 32] = address;
    if (++warp.lanes < 32) return;
    count_wavefronts(line, warp.address, 32, bytes);
    m.open.erase(key);
}

inline unsigned char *at(uint32_t address, uint32_t bytes, uint32_t align)
{
    if (address % align != 0) fail("shared address %ld is not a multiple of %ld", address, align);
    if (address + bytes > m.shared_size) fail("shared address %ld is beyond %ld", address, m.shared_size);
    return m.shared + address;
}

inline void land(const copy &c)
{
    if (c.from) memcpy(m.shared + c.to, c.from, 16);
    else memset(m.shared + c.to, 0, 16);
}

/* ---- launches ---- */

template <class J> struct launch_arg {
    void (*kernel)(J);
    const J *job;
};

template <class J> void launch_body(void *p)
{
    launch_arg<J> *a = (launch_arg<J> *)p;
    a->kernel(*a->job);
}

/* Returns whether it went well. */
template <class J> bool launch(void (*kernel)(J), index3 grid, int threads, size_t shared, const J &job)
{
    launch_arg<J> arg = {kernel, &job};
    m.failed = threads % 32 != 0 || threads > MAX_THREADS || shared > (size_t)m.opt.shared_max;
    grid_dim = grid;
    block_dim = {(unsigned)threads, 1, 1};
    m.random = m.opt.seed * 2 + 1;
    for (unsigned i = 0; i < grid.x * grid.y && !m.failed; i++) {
        block_index = {i % grid.x, i / grid.x, 0};
        run_block(threads, shared, launch_body<J>, &arg);
    }
    return !m.failed;
}

} // namespace emu

/* ---- what nvcc and the CUDA runtime provide; used: C calls them too ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define gridDim emu::grid_dim
#define blockDim emu::block_dim

extern "C" __attribute__((used)) inline cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return emu::m.opt.capability ? cudaSuccess : cudaErrorNoDevice;
}

extern "C" __attribute__((used)) inline cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int)
{
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emu::m.opt.shared_max
             : attribute == cudaDevAttrComputeCapabilityMajor     ? emu::m.opt.capability / 10
                                                                  : emu::m.opt.capability % 10;
    return cudaSuccess;
}

/* ---- the wrappers of psa_cuda.cu ---- */

template <class J>
static cudaError_t psa__enqueue(void (*kernel)(J), unsigned x, unsigned y, int threads, size_t shared, void *,
                                const J &job)
{
    return emu::launch(kernel, {x, y, 1}, threads, shared, job) ? cudaSuccess : cudaErrorLaunchFailure;
}

#define PSA__LINE int line = __builtin_LINE()

struct psa__bf16 { static constexpr uint32_t EXPONENT = 0x7f80; };
struct psa__f16 { static constexpr uint32_t EXPONENT = 0x7c00; };

static inline float psa__as_float(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

static inline uint32_t psa__as_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float psa__to_float(psa__bf16, uint16_t h) { return psa__as_float((uint32_t)h << 16); }

static inline float psa__to_float(psa__f16, uint16_t h)
{
    static const std::vector<float> values = [] {
        std::vector<float> x(65536);
        for (int i = 0; i < 65536; i++) {
            int e = i >> 10 & 31, f = i & 1023;
            float a = e == 31 ? (f ? NAN : INFINITY) : e ? ldexpf((float)(1024 + f), e - 25) : ldexpf((float)f, -24);
            x[(size_t)i] = i >> 15 ? -a : a;
        }
        return x;
    }();
    return values[h];
}

static inline uint16_t psa__from_float(psa__bf16, float x)
{
    uint32_t u = psa__as_bits(x);
    return x != x ? (uint16_t)0x7fff : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline uint16_t psa__from_float(psa__f16, float x)
{
    uint32_t sign = psa__as_bits(x) >> 16 & 0x8000;
    float a = fabsf(x);
    if (x != x) return 0x7fff;
    if (a >= 65520.0f) return (uint16_t)(sign | 0x7c00);
    int e = a < 6.103515625e-5f ? -14 : ilogbf(a);
    uint32_t n = (uint32_t)nearbyintf(ldexpf(a, 10 - e)); /* 1024..2048, below 1024 for denormals */
    return (uint16_t)(sign | (n < 1024 ? n : ((uint32_t)(e + 15) << 10) + (n - 1024)));
}

template <class T> uint32_t psa__pack(T t, float low, float high)
{
    return psa__from_float(t, low) | (uint32_t)psa__from_float(t, high) << 16;
}

template <class V> V psa__lds(uint32_t address, PSA__LINE)
{
    V v;
    if (emu::m.opt.count && sizeof(V) <= 16) emu::count_lane(line, address, sizeof(V));
    memcpy(&v, emu::at(address, sizeof(V), alignof(V)), sizeof(V));
    return v;
}

template <class V> void psa__sts(uint32_t address, const V &v, PSA__LINE)
{
    if (emu::m.opt.count && sizeof(V) <= 16) emu::count_lane(line, address, sizeof(V));
    memcpy(emu::at(address, sizeof(V), alignof(V)), &v, sizeof(V));
}

static inline void psa__barrier(PSA__LINE) { emu::block_barrier(line); }

static inline void psa__sync_warp(PSA__LINE)
{
    emu::m.syncs.insert(line);
    if (line != emu::m.opt.skip_line) emu::collective(line, [](emu::warp &) {});
}

static inline void psa__cp_async(uint32_t to, const void *from, bool exists, PSA__LINE)
{
    emu::copy c = {to, exists ? from : nullptr};
    emu::m.copied += exists ? 16 : 0;
    if (emu::m.opt.count) emu::count_lane(line, to, 16);
    emu::at(to, 16, 16);
    if ((uintptr_t)from % 16 != 0) emu::fail("cp.async from an address that is not a multiple of 16");
    bool now = emu::m.opt.copies == emu::EARLY || (emu::m.opt.copies == emu::COIN && (emu::next_random() & 1));
    if (now) emu::land(c);
    else emu::m.fibers[emu::m.current].groups.back().push_back(c);
}

static inline void psa__cp_commit() { emu::m.fibers[emu::m.current].groups.emplace_back(); }

template <int N> void psa__cp_wait(PSA__LINE)
{
    auto &groups = emu::m.fibers[emu::m.current].groups;
    emu::m.syncs.insert(line);
    if (line == emu::m.opt.skip_line) return;
    while (groups.size() > N + 1) { /* the open group does not count */
        for (const emu::copy &c : groups.front()) emu::land(c);
        groups.erase(groups.begin());
    }
}

/* A lane reads its row when it arrives: that lanes meet here does not make one's writes visible to another. */
static inline void psa__ldmatrix_any(uint32_t (&r)[4], uint32_t address, bool transposed, int line)
{
    uint32_t *in = emu::lane_in();
    emu::m.matrices.insert(line);
    in[4] = line == emu::m.opt.shift_line ? address ^ 16 : address;
    memcpy(in, emu::at(in[4], 16, 16), 16);
    emu::collective(line, [=](emu::warp &w) {
        for (int i = 0; i < 4; i++) { /* matrix i: 8 rows of 8 elements at the addresses of lanes 8i.. */
            uint16_t x[8][8];
            uint32_t rows[8];
            for (int j = 0; j < 8; j++) {
                rows[j] = w.in[8 * i + j][4];
                memcpy(x[j], w.in[8 * i + j], 16);
            }
            if (emu::m.opt.count) emu::count_wavefronts(line, rows, 8, 16);
            for (int lane = 0; lane < 32; lane++) {
                int row = lane / 4, column = lane % 4 * 2;
                uint16_t low = transposed ? x[column][row] : x[row][column];
                uint16_t high = transposed ? x[column + 1][row] : x[row][column + 1];
                w.out[lane][i] = low | (uint32_t)high << 16;
            }
        }
    });
    memcpy(r, emu::lane_out(), 16);
}

static inline void psa__ldmatrix(uint32_t (&r)[4], uint32_t address, PSA__LINE)
{
    psa__ldmatrix_any(r, address, false, line);
}

static inline void psa__ldmatrix_t(uint32_t (&r)[4], uint32_t address, PSA__LINE)
{
    psa__ldmatrix_any(r, address, true, line);
}

/* c[16][8] += a[16][16] b[16][8]: lane 4g+t holds rows g, g+8 and columns 2t, 2t+1 of c; see the PTX manual. */
template <class T>
void psa__mma(T type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, PSA__LINE)
{
    uint32_t *in = emu::lane_in();
    memcpy(in, a, 16);
    in[4] = b0;
    in[5] = b1;
    memcpy(in + 6, c, 16);
    emu::collective(line, [=](emu::warp &w) {
        float A[16][16], B[16][8], C[16][8];
        emu::m.mmas++;
        for (int lane = 0; lane < 32; lane++) {
            int g = lane / 4, t = lane % 4;
            for (int e = 0; e < 2; e++) {
                for (int i = 0; i < 4; i++) {
                    A[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = psa__to_float(type, (uint16_t)(w.in[lane][i] >> 16 * e));
                }
                for (int i = 0; i < 2; i++) {
                    B[2 * t + 8 * i + e][g] = psa__to_float(type, (uint16_t)(w.in[lane][4 + i] >> 16 * e));
                }
                C[g][2 * t + e] = psa__as_float(w.in[lane][6 + e]);
                C[g + 8][2 * t + e] = psa__as_float(w.in[lane][8 + e]);
            }
        }
        for (int i = 0; i < 16; i++) {
            for (int k = 0; k < 16; k++) {
                for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            for (int e = 0; e < 4; e++) {
                w.out[lane][e] = psa__as_bits(C[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2]);
            }
        }
    });
    memcpy(c, emu::lane_out(), 16);
}

template <class V> V psa__shuffle(V v, int from, PSA__LINE)
{
    static_assert(sizeof(V) <= 8, "one or two words");
    V r;
    memcpy(emu::lane_in(), &v, sizeof v);
    emu::lane_in()[2] = (uint32_t)from & 31;
    emu::collective(line, [](emu::warp &w) {
        for (int i = 0; i < 32; i++) memcpy(w.out[i], w.in[w.in[i][2]], 8);
    });
    memcpy(&r, emu::lane_out(), sizeof r);
    return r;
}

template <class V> V psa__shuffle_xor(V v, int mask, PSA__LINE)
{
    return psa__shuffle(v, (int)(threadIdx.x % 32) ^ mask, line);
}

static inline uint32_t psa__ballot(bool x, PSA__LINE)
{
    emu::lane_in()[0] = x;
    emu::collective(line, [](emu::warp &w) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; i++) bits |= (uint32_t)(w.in[i][0] != 0) << i;
        for (int i = 0; i < 32; i++) w.out[i][0] = bits;
    });
    return emu::lane_out()[0];
}

static inline float psa__exp2(float x)
{
    emu::m.exps++;
    return exp2f(x);
}

static inline uint32_t psa__opaque(uint32_t x) { return x; }

#endif
