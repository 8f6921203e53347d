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
 *   - Boxes of TMA land at once or when nothing else can run, wgmma is carried out at once or at its wait: registers
 *     and shared memory that are touched in between show. Barriers in shared memory have phases, arrivals and bytes to
 *     come; what threads write there is for wgmma and TMA to read only after a fence of the writer's.
 *   - A barrier or a wait can be left out by its source line, an address, a parity or a number of bytes made wrong: the
 *     tests prove that they would notice. */
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
enum landing { LATE, EARLY, COIN }; /* when a cp.async or a box copies, and wgmma multiplies */

struct options {
    schedule order = IN_ORDER;
    landing copies = LATE;
    int warp = 0;           /* the one ahead or behind */
    uint64_t seed = 1;
    int skip_line = 0;      /* the barrier, fence or wait on this line does nothing */
    int shift_line = 0;     /* the ldmatrix, box or wgmma on this line has the chunk beside the right one */
    int spoil_line = 0;     /* the wait on this line has the other parity, the expect on it some bytes too few */
    bool quiet = false;     /* errors are not printed */
    bool count = false;     /* wavefronts per line */
    int capability = 80;    /* what cudaDeviceGetAttribute says */
    int shared_max = 99 * 1024;
    int sms = 2;
};

struct line_count { /* of one access in the source */
    uint64_t accesses = 0, wavefronts = 0, ideal = 0;
};

enum { MAX_THREADS = 1024, STACK = 64 * 1024, SHARED = 256 * 1024 };
enum state : uint8_t { RUNNABLE, AT_WARP, AT_BLOCK, AT_EVENT, DONE };

struct copy {
    uint32_t to;
    const void *from; /* NULL: zeros */
};

struct fiber {
    jmp_buf at;
    ucontext_t start;
    std::vector<char> stack;
    std::vector<std::vector<copy>> groups; /* cp.async; the last one is open */
    std::vector<uint32_t> written;         /* chunks that wgmma and TMA may not see yet */
    bool started;
    state now;
};

/* wgmma of one warp: 16 of the 64 rows. */
struct product {
    void (*run)(const product &);
    float *d[32];        /* each lane's accumulators, four for every eight columns */
    const uint32_t *a[32]; /* NULL: desc_a says where they lie */
    uint64_t desc_a, desc_b;
    int n, row0;
    bool add;
};

struct warp {
    int arrived, line, registers;
    uint32_t in[32][12];
    uint32_t out[32][4];
    bool fenced;                                /* since the last wait */
    std::vector<std::vector<product>> products; /* groups; the last one is open */
};

/* An mbarrier: a phase ends when nobody is to arrive any more and no bytes are to come. */
struct barrier {
    int arrivals, pending;
    int64_t bytes;
    uint32_t phase;
};

struct group { /* a named barrier */
    int arrived;
    uint32_t phase;
};

/* What cuTensorMapEncodeTiled makes: 16-bit elements, dimension 0 without gaps. */
struct tensor_map {
    const char *data;
    int64_t size[5], stride[5]; /* in elements and bytes */
    int box[5];
    uint32_t span;              /* of the swizzle, in bytes: 16 (none), 32, 64, 128 */
};

struct box { /* under way */
    tensor_map map;
    uint32_t to, barrier, shift;
    int64_t from[5];
};

struct machine {
    options opt;
    std::map<int, line_count> lines;
    std::set<int> syncs, matrices, phases; /* lines for skip_line, shift_line and spoil_line that were met */
    uint64_t mmas = 0, exps = 0, copied = 0, random = 1; /* copied: bytes that exist; mmas: m16n8k16 */
    int most_threads = 0; /* of a block */
    bool failed = false; /* the launch */

    alignas(1024) unsigned char shared[SHARED];
    uint16_t writer[SHARED / 16]; /* 1 + the thread whose fence a chunk waits for */
    uint32_t shared_size = 0;
    int threads = 0, current = 0, at_block = 0, left = 0, free_registers = 0;
    std::map<uint32_t, barrier> barriers;
    std::map<int, group> groups;
    std::vector<box> boxes;
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

inline int pick_runnable()
{
    switch (m.opt.order) {
    case RANDOM: return runnable_from((int)(next_random() % (uint64_t)m.threads), -1);
    case AHEAD: return runnable_from(m.opt.warp * 32 % m.threads, -1);
    case BEHIND: return runnable_from(0, m.opt.warp % (m.threads / 32));
    case IN_ORDER: break;
    }
    return runnable_from(0, -1);
}

void land_box();

/* Where no thread can run, boxes land one by one until one can. */
__attribute__((noinline)) inline int pick()
{
    int i = pick_runnable();
    while (i < 0 && !m.boxes.empty()) {
        land_box();
        i = pick_runnable();
    }
    return i;
}

inline void entry()
{
    m.body(m.arg);
    set_state(m.current, DONE);
    if (--m.left == 0) {
        if (!m.boxes.empty()) fail("%ld boxes are under way when the block ends", (long)m.boxes.size());
        _longjmp(m.home, 1);
    }
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

/* Until ready() says so; it is asked again after every wake. */
template <class F> void wait_until(F ready)
{
    while (!ready()) block_as(AT_EVENT);
}

inline void wake()
{
    for (int i = 0; i < m.threads; i++) {
        if (m.fibers[i].now == AT_EVENT) set_state(i, RUNNABLE);
    }
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
    if (threads > m.most_threads) m.most_threads = threads;
    m.shared_size = (uint32_t)shared;
    m.at_block = 0;
    m.body = body;
    m.arg = arg;
    memset(m.shared, 0xff, shared);
    memset(m.writer, 0, sizeof m.writer);
    memset(m.runnable, 0, sizeof m.runnable);
    m.barriers.clear();
    m.groups.clear();
    m.boxes.clear();
    m.free_registers = 0;
    for (int i = 0; i < threads; i++) {
        fiber &f = m.fibers[i];
        if (f.stack.empty()) f.stack.resize(STACK);
        f.groups.assign(1, {});
        f.written.clear();
        f.started = false;
        set_state(i, RUNNABLE);
    }
    for (warp &w : m.warps) {
        w.arrived = 0;
        w.fenced = false;
        w.registers = 65536 / threads / 8 * 8;
        w.products.assign(1, {});
    }
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

/* What a thread has written is for others to read after a barrier, for wgmma and TMA after a fence. */
inline void mark_written(uint32_t address, uint32_t bytes)
{
    for (uint32_t c = address / 16; c < (address + bytes + 15) / 16; c++) {
        if (m.writer[c] == m.current + 1) continue;
        m.writer[c] = (uint16_t)(m.current + 1);
        m.fibers[m.current].written.push_back(c);
    }
}

/* ---- TMA and barriers in shared memory ---- */

inline barrier &barrier_at(uint32_t address)
{
    at(address, 8, 8);
    auto found = m.barriers.find(address);
    if (found == m.barriers.end()) fail("there is no barrier at %ld", address);
    return found->second;
}

inline void settle(barrier &b)
{
    if (b.pending < 0) fail("more threads arrive than the barrier has");
    if (b.bytes < -(1 << 20) || b.bytes >= 1 << 20) fail("%ld bytes to come", (long)b.bytes);
    if (b.pending > 0 || b.bytes != 0) return;
    b.pending = b.arrivals;
    b.phase++;
    wake();
}

/* Chunks of 16 bytes change places inside 8 rows of 128 bytes, by the bits of the address. */
inline uint32_t swizzled(uint32_t address, uint32_t span)
{
    return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
}

/* The box to shared memory, dimension 0 fastest; what lies outside of the tensor is zero. */
inline void copy_box(const box &b)
{
    const tensor_map &t = b.map;
    uint32_t to = b.to;
    int64_t i[5];
    for (i[4] = 0; i[4] < t.box[4]; i[4]++) {
        for (i[3] = 0; i[3] < t.box[3]; i[3]++) {
            for (i[2] = 0; i[2] < t.box[2]; i[2]++) {
                for (i[1] = 0; i[1] < t.box[1]; i[1]++) {
                    for (i[0] = 0; i[0] < t.box[0]; i[0] += 8, to += 16) {
                        int64_t offset = 0;
                        bool inside = true;
                        for (int d = 0; d < 5; d++) {
                            inside &= b.from[d] + i[d] >= 0 && b.from[d] + i[d] < t.size[d];
                            offset += (b.from[d] + i[d]) * t.stride[d];
                        }
                        unsigned char *chunk = at(swizzled(to, t.span) ^ b.shift, 16, 16);
                        if (inside) memcpy(chunk, t.data + offset, 16);
                        else memset(chunk, 0, 16);
                        m.writer[(chunk - m.shared) / 16] = 0;
                        m.copied += inside ? 16 : 0;
                    }
                }
            }
        }
    }
    barrier &bar = barrier_at(b.barrier);
    if (m.writer[b.barrier / 16]) fail("TMA counts at %ld, a barrier made without a fence", b.barrier);
    bar.bytes -= to - b.to;
    settle(bar);
}

inline void land_box()
{
    size_t i = m.opt.order == RANDOM ? next_random() % m.boxes.size() : 0;
    box b = m.boxes[i];
    m.boxes.erase(m.boxes.begin() + (long)i);
    copy_box(b);
}

inline bool at_once()
{
    return m.opt.copies == EARLY || (m.opt.copies == COIN && (next_random() & 1));
}

/* ---- wgmma ---- */

/* Offset of element (row, k) of an operand: the 128-byte swizzle of the PTX manual. K-major: rows of 128 bytes, groups
 * of 8 at the descriptor's stride. MN-major: 64 elements of a column in 128 bytes, 8 columns to a group at the stride,
 * the next 64 elements at the leading stride. */
inline uint32_t operand(uint64_t desc, bool mn_major, int row, int k)
{
    uint32_t start = (uint32_t)(desc & 0x3fff) << 4, leading = (uint32_t)(desc >> 16 & 0x3fff) << 4;
    uint32_t stride = (uint32_t)(desc >> 32 & 0x3fff) << 4, r = (uint32_t)row, c = (uint32_t)k;
    if (desc >> 62 != 1 || (desc >> 49 & 7) != 0) fail("a descriptor without the 128-byte swizzle, or with an offset");
    uint32_t to = mn_major ? r / 64 * leading + r % 64 * 2 + c / 8 * stride + c % 8 * 128
                           : r / 8 * stride + r % 8 * 128 + c * 2;
    return swizzled(start + to, 128);
}

inline uint16_t element(uint64_t desc, bool mn_major, int row, int k)
{
    uint16_t x;
    uint32_t address = operand(desc, mn_major, row, k);
    unsigned char *from = at(address, 2, 2);
    if (m.writer[address / 16]) {
        fail("wgmma reads %ld, which thread %ld wrote without a fence", address, m.writer[address / 16] - 1);
    }
    memcpy(&x, from, 2);
    return x;
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
             : attribute == cudaDevAttrMultiProcessorCount        ? emu::m.opt.sms
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
    emu::mark_written(address, sizeof(V));
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
    if (emu::at_once()) emu::land(c);
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

static inline uint32_t psa__draw(uint32_t *ticket) { return (*ticket)++; }

static inline float psa__exp2(float x)
{
    emu::m.exps++;
    return exp2f(x);
}

static inline uint32_t psa__opaque(uint32_t x) { return x; }

/* ---- of Hopper ---- */

static inline bool psa__skipped(int line)
{
    emu::m.syncs.insert(line);
    return line == emu::m.opt.skip_line;
}

static inline uint32_t psa__group_join(int id, int threads)
{
    emu::group &g = emu::m.groups[id];
    uint32_t phase = g.phase;
    if (++g.arrived < threads) return phase;
    g.arrived = 0;
    g.phase++;
    emu::wake();
    return phase;
}

static inline void psa__group_sync(int id, int threads, PSA__LINE)
{
    if (psa__skipped(line)) return;
    uint32_t phase = psa__group_join(id, threads);
    emu::wait_until([=] { return emu::m.groups[id].phase != phase; });
}

/* Not to be left out: only time would show it. */
static inline void psa__give_turn(int id, int threads) { psa__group_join(id, threads); }
static inline void psa__take_turn(int id, int threads)
{
    uint32_t phase = psa__group_join(id, threads);
    emu::wait_until([=] { return emu::m.groups[id].phase != phase; });
}

static inline void psa__bar_init(uint32_t at, int arrivals)
{
    emu::at(at, 8, 8);
    emu::mark_written(at, 8);
    emu::m.barriers[at] = {arrivals, arrivals, 0, 0};
}

static inline void psa__bar_join(uint32_t at, uint32_t bytes, int line)
{
    if (psa__skipped(line)) return;
    emu::collective(line, [=](emu::warp &) {
        emu::barrier &b = emu::barrier_at(at);
        b.bytes += bytes;
        b.pending--;
        emu::settle(b);
    });
}

static inline void psa__bar_arrive(uint32_t at, PSA__LINE) { psa__bar_join(at, 0, line); }

static inline void psa__bar_expect(uint32_t at, uint32_t bytes, PSA__LINE)
{
    emu::m.phases.insert(line);
    psa__bar_join(at, line == emu::m.opt.spoil_line ? bytes - 1024 : bytes, line);
}

static inline void psa__bar_wait(uint32_t at, uint32_t parity, PSA__LINE)
{
    emu::barrier &b = emu::barrier_at(at);
    emu::m.phases.insert(line);
    if (psa__skipped(line)) return;
    uint32_t past = (line == emu::m.opt.spoil_line ? ~parity : parity) & 1;
    emu::wait_until([&] { return (b.phase & 1) != past; });
}

static inline void psa__fence_async(PSA__LINE)
{
    emu::fiber &f = emu::m.fibers[emu::m.current];
    if (psa__skipped(line)) return;
    for (uint32_t c : f.written) {
        if (emu::m.writer[c] == emu::m.current + 1) emu::m.writer[c] = 0;
    }
    f.written.clear();
}

/* More: when others have given up enough of theirs. */
template <int N> void psa__registers(PSA__LINE)
{
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "what setmaxnreg takes");
    emu::collective(line, [](emu::warp &) {});
    if (emu::m.current % 32 == 0) {
        emu::warp &w = emu::m.warps[emu::m.current / 32];
        int more = 32 * (N - w.registers);
        emu::wait_until([=] { return more <= emu::m.free_registers; });
        w.registers = N;
        emu::m.free_registers -= more;
        emu::wake();
    }
    emu::collective(line, [](emu::warp &) {});
}
template <int N> void psa__more_registers(PSA__LINE) { psa__registers<N>(line); }
template <int N> void psa__fewer_registers(PSA__LINE) { psa__registers<N>(line); }

template <class J> static bool psa__has_code(void (*)(J)) { return true; }

typedef emu::tensor_map psa__map;

/* As the driver: false if it would refuse. */
static inline bool psa__make_map(psa__map *map, const void *data, const uint64_t *size, const uint64_t *stride,
                                 const uint32_t *box)
{
    bool good = (uintptr_t)data % 16 == 0 && box[0] * 2 <= 128;
    *map = {(const char *)data, {}, {2}, {}, 128};
    for (int i = 0; i < 5; i++) {
        good &= size[i] > 0 && size[i] <= UINT64_C(1) << 32 && box[i] > 0 && box[i] <= 256;
        good &= i == 0 || (stride[i - 1] % 16 == 0 && stride[i - 1] < UINT64_C(1) << 40);
        map->size[i] = (int64_t)size[i];
        map->box[i] = (int)box[i];
        if (i > 0) map->stride[i] = (int64_t)stride[i - 1];
    }
    return good;
}

static inline void psa__box(uint32_t to, const psa__map &map, int row, int half, int head, int batch, uint32_t bar,
                            PSA__LINE)
{
    emu::box b = {map, to, bar, line == emu::m.opt.shift_line ? 16u : 0u, {0, row, half, head, batch}};
    emu::m.matrices.insert(line);
    emu::at(to, 16, 128);
    if (emu::at_once()) emu::copy_box(b);
    else emu::m.boxes.push_back(b);
}

static inline void psa__wgmma_fence(PSA__LINE)
{
    if (!psa__skipped(line)) emu::collective(line, [](emu::warp &w) { w.fenced = true; });
}

static inline void psa__wgmma_commit(PSA__LINE)
{
    emu::collective(line, [](emu::warp &w) { w.products.emplace_back(); });
}

template <int N> void psa__wgmma_wait_at(int line)
{
    if (psa__skipped(line)) return;
    emu::collective(line, [](emu::warp &w) {
        while (w.products.size() > N + 1) { /* the open group does not count */
            for (const emu::product &p : w.products.front()) p.run(p);
            w.products.erase(w.products.begin());
        }
        w.fenced = false;
    });
}
template <int N, size_t C> void psa__wgmma_wait(float (&)[C][4], PSA__LINE) { psa__wgmma_wait_at<N>(line); }

/* d[16][n] += a[16][16] b[16][n] for a warp's rows; b is MN-major where a lies in registers. */
template <class T> void psa__multiply(const emu::product &p)
{
    static float b[16][256];
    float a[16][16];
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 16; i++) {
            int lane = i % 8 * 4 + k % 8 / 2, word = k / 8 * 2 + i / 8;
            uint16_t h = p.a[0] ? (uint16_t)(p.a[lane][word] >> k % 2 * 16)
                                : emu::element(p.desc_a, false, p.row0 + i, k);
            a[i][k] = psa__to_float(T(), h);
        }
        for (int j = 0; j < p.n; j++) b[k][j] = psa__to_float(T(), emu::element(p.desc_b, p.a[0] != nullptr, j, k));
    }
    emu::m.mmas += (uint64_t)p.n / 8;
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < p.n; j++) {
            float &d = p.d[i % 8 * 4 + j % 8 / 2][j / 8 * 4 + i / 8 * 2 + j % 2], sum = p.add ? d : 0;
            for (int k = 0; k < 16; k++) sum += a[i][k] * b[k][j];
            d = sum;
        }
    }
}

template <class T, size_t C>
void psa__wgmma_any(float (&d)[C][4], const uint32_t *a, uint64_t desc_a, uint64_t desc_b, bool add, int line)
{
    uint32_t *in = emu::lane_in();
    float *to = &d[0][0];
    emu::m.matrices.insert(line);
    if (line == emu::m.opt.shift_line) desc_b ^= 1;
    memcpy(in, &to, 8);
    memcpy(in + 2, &a, 8);
    memcpy(in + 4, &desc_a, 8);
    memcpy(in + 6, &desc_b, 8);
    emu::collective(line, [=](emu::warp &w) {
        emu::product p = {};
        p.run = psa__multiply<T>;
        p.n = 8 * (int)C;
        p.row0 = emu::m.current / 32 % 4 * 16;
        p.add = add;
        if (!w.fenced) emu::fail("wgmma without a fence since the last wait");
        for (int i = 0; i < 32; i++) {
            memcpy(&p.d[i], w.in[i], 8);
            memcpy(&p.a[i], w.in[i] + 2, 8);
            if (memcmp(w.in[i] + 4, w.in[0] + 4, 16)) emu::fail("the descriptors of a warp differ");
        }
        p.desc_a = desc_a;
        p.desc_b = desc_b;
        bool first = w.products.size() == 1 && w.products.back().empty(); /* they are done in order */
        if (first && emu::at_once()) p.run(p);
        else w.products.back().push_back(p);
    });
}

static inline uint64_t psa__descriptor(uint32_t at, uint32_t leading, uint32_t stride)
{
    return at >> 4 | (uint64_t)(leading >> 4) << 16 | (uint64_t)(stride >> 4) << 32 | (uint64_t)1 << 62;
}

template <class T, size_t C>
void psa__wgmma(T, float (&d)[C][4], uint64_t a, uint64_t b, bool add, PSA__LINE)
{
    psa__wgmma_any<T>(d, nullptr, a, b, add, line);
}

template <class T, size_t C> void psa__wgmma(T, float (&d)[C][4], const uint32_t (&a)[4], uint64_t b, PSA__LINE)
{
    psa__wgmma_any<T>(d, a, 0, b, true, line);
}

#endif
