/* test_cuda.cpp - psa_cuda.cu on the emulator (emu.h) against the CPU library, and the emulator against itself.
 *
 * build/test_cuda [--filter TEXT] [--rounds N] [--seed N]
 * Inputs end where a page ends that cannot be read; outputs and workspace are poisoned. */
#define PSA_CUDA
#include "psa.h"

#include "emu.h"
#include "tools/gpu_model.h"

#include <stdarg.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <functional>
#include <string>

static int checks, failures, rounds = 1;
static bool hopper; /* the attend of sm_90a */
static uint64_t seed = 1, state;
static std::string current;

static bool check(bool ok, int line, const char *format, ...) __attribute__((format(printf, 3, 4)));
static bool check(bool ok, int line, const char *format, ...)
{
    va_list args;
    checks++;
    if (ok) return true;
    failures++;
    printf("  test_cuda.cpp:%d: %s: ", line, current.c_str());
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    return false;
}
#define CHECK(ok, ...) check(ok, __LINE__, __VA_ARGS__)

/* ---- random numbers: splitmix64 ---- */

static uint64_t rnd()
{
    uint64_t z = state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}
static int rnd_int(int low, int high) { return low + (int)(rnd() % (uint64_t)(high - low + 1)); }
static bool rnd_chance(int percent) { return rnd_int(0, 99) < percent; }
static double rnd_uniform() { return (double)(rnd() >> 11) / 9007199254740992.0; }
static double rnd_normal() { return sqrt(-2 * log(1 - rnd_uniform())) * cos(6.283185307179586 * rnd_uniform()); }

/* ---- memory that stands for the device's ---- */

/* Ends at a page that cannot be touched; filled with 0xff, NaN in every type. */
struct buffer {
    size_t size = 0, mapped = 0;
    char *base = nullptr;

    explicit buffer(size_t bytes = 0) { reset(bytes); }
    buffer(const buffer &) = delete;
    buffer &operator=(const buffer &) = delete;
    ~buffer() { reset(0); }
    void reset(size_t bytes)
    {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        if (base) munmap(base, mapped);
        base = nullptr;
        size = bytes;
        if (!bytes) return;
        mapped = (bytes + page - 1) / page * page + page;
        base = (char *)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) abort();
        mprotect(base + mapped - page, page, PROT_NONE);
        memset(base, 0xff, mapped - page);
    }
    char *data() const { return base + mapped - (size_t)sysconf(_SC_PAGESIZE) - size; }
    template <class V> V *as() const { return (V *)(void *)data(); }
    bool intact() const /* nothing before the data was written */
    {
        for (char *p = base; p < data(); p++) {
            if (*p != (char)0xff) return false;
        }
        return true;
    }
};

/* ---- tensors ---- */

struct tensor {
    psa_tensor t = {};
    buffer memory;
};

static void store(psa_type type, void *at, double x)
{
    float f = (float)x;
    uint16_t h = type == PSA_F16 ? psa__from_float(psa__f16(), f) : psa__from_float(psa__bf16(), f);
    if (type == PSA_F32) memcpy(at, &f, 4);
    else memcpy(at, &h, 2);
}

static double load(psa_type type, const void *at)
{
    float f;
    uint16_t h;
    if (type == PSA_F32) {
        memcpy(&f, at, 4);
        return f;
    }
    memcpy(&h, at, 2);
    return type == PSA_F16 ? psa__to_float(psa__f16(), h) : psa__to_float(psa__bf16(), h);
}

static char *element(const psa_tensor &t, int64_t d, int64_t n, int64_t h, int64_t b)
{
    return (char *)t.data + (size_t)d * t.nb[0] + (size_t)n * t.nb[1] + (size_t)h * t.nb[2] + (size_t)b * t.nb[3];
}

/* [B,H,N,D], or [B,N,H,D] with `gap` unused bytes after each row. */
static void tensor_make(tensor *a, psa_type type, bool swapped, size_t gap, int64_t D, int64_t N, int64_t H, int64_t B)
{
    a->t = psa_tensor_4d(nullptr, type, D, N, H, B);
    size_t row = (size_t)D * a->t.nb[0] + gap;
    a->t.nb[1] = swapped ? row * (size_t)H : row;
    a->t.nb[2] = swapped ? row : row * (size_t)N;
    a->t.nb[3] = row * (size_t)(N * H);
    size_t size = row * (size_t)(N * H * B);
    a->memory.reset((size + 15) & ~(size_t)15);
    a->t.data = a->memory.data();
}

static void tensor_fill(tensor *a, std::function<double(int64_t, int64_t, int64_t, int64_t)> value)
{
    for (int64_t b = 0; b < a->t.ne[3]; b++) {
        for (int64_t h = 0; h < a->t.ne[2]; h++) {
            for (int64_t n = 0; n < a->t.ne[1]; n++) {
                for (int64_t d = 0; d < a->t.ne[0]; d++) {
                    store(a->t.type, element(a->t, d, n, h, b), value(d, n, h, b));
                }
            }
        }
    }
}

/* ---- one call on both sides ---- */

struct shape {
    int B = 1, Hq = 1, Hkv = 1, Nq = 100, Nk = 150, D = 64, Dv = 64;
    psa_type q = PSA_BF16, kv = PSA_BF16, out = PSA_F32;
    bool swapped = false;
    size_t gap = 0;
    double spread = 1;
};

struct call {
    shape s;
    psa_desc desc;
    psa_plan plan;
    tensor q, k, v, out, expected;
    buffer work, lse, scores, levels, order_q, order_k;
    std::vector<float> cpu_scores, cpu_lse;
    std::vector<uint8_t> cpu_levels;
    std::vector<char> cpu_work;
};

static bool call_make(call *c, const shape &s, const psa_desc &desc, bool ordered = false)
{
    c->s = s;
    c->desc = desc;
    c->desc.n_threads = 1;
    tensor_make(&c->q, s.q, s.swapped, s.gap, s.D, s.Nq, s.Hq, s.B);
    tensor_make(&c->k, s.kv, s.swapped, s.gap, s.D, s.Nk, s.Hkv, s.B);
    tensor_make(&c->v, s.kv, s.swapped, s.gap, s.Dv, s.Nk, s.Hkv, s.B);
    tensor_make(&c->out, s.out, s.swapped, s.gap / 16 * 16, s.Dv, s.Nq, s.Hq, s.B);
    tensor_make(&c->expected, PSA_F32, false, 0, s.Dv, s.Nq, s.Hq, s.B);
    auto normal = [&](int64_t, int64_t, int64_t, int64_t) { return s.spread * rnd_normal(); };
    double run = 0; /* keys that change slowly, so that the similarity cap has something to find */
    tensor_fill(&c->q, normal);
    tensor_fill(&c->k, [&](int64_t d, int64_t n, int64_t, int64_t) {
        if (n % 24 == 0 || d == 0) run = rnd_normal();
        return s.spread * (0.5 * run + 0.8 * rnd_normal());
    });
    tensor_fill(&c->v, [](int64_t, int64_t, int64_t, int64_t) { return rnd_normal(); });
    if (ordered) {
        auto permute = [](buffer *b, int n, int heads) {
            b->reset((size_t)(n * heads) * 4);
            for (int h = 0; h < heads; h++) {
                int32_t *p = b->as<int32_t>() + h * n;
                for (int i = 0; i < n; i++) {
                    int j = rnd_int(0, i);
                    p[i] = p[j];
                    p[j] = i;
                }
            }
        };
        permute(&c->order_q, s.Nq, s.Hq);
        permute(&c->order_k, s.Nk, s.Hkv);
        c->desc.order_q = {c->order_q.as<int32_t>(), s.Nq, 0};
        c->desc.order_k = {c->order_k.as<int32_t>(), s.Nk, 0};
    }
    psa_result r = psa_plan_init(&c->plan, &c->desc, &c->q.t, &c->k.t, &c->v.t, &c->out.t);
    if (!CHECK(r == PSA_OK, "plan: %s", psa_result_string(r))) return false;
    size_t map = psa_map_size(&c->plan);
    c->work.reset(psa_cuda_work_size(&c->plan));
    c->lse.reset((size_t)(s.B * s.Hq * s.Nq) * 4);
    c->scores.reset(map * 4);
    c->levels.reset(map);
    return true;
}

/* Scores and levels of the CPU library. */
static void cpu_map(call *c)
{
    psa_plan *p = &c->plan;
    c->cpu_scores.assign(psa_map_size(p), 0);
    c->cpu_levels.assign(psa_map_size(p), 0);
    c->cpu_work.assign(psa_work_size(p), 0);
    psa_pool(p, c->k.t.data, c->v.t.data, c->cpu_work.data(), 0, 1);
    psa_score(p, c->q.t.data, c->k.t.data, c->cpu_work.data(), c->cpu_scores.data(), 0, 1);
    psa_mask(p, c->cpu_scores.data(), c->cpu_work.data(), c->cpu_levels.data(), 0, 1);
}

/* out and lse of the CPU library for a map, in f32. */
static void cpu_attend(call *c, const uint8_t *levels)
{
    psa_plan plan;
    psa_plan_init(&plan, &c->desc, &c->q.t, &c->k.t, &c->v.t, &c->expected.t);
    c->cpu_lse.assign((size_t)(c->s.B * c->s.Hq * c->s.Nq), 0);
    c->cpu_work.assign(psa_work_size(&plan), 0);
    psa_pool(&plan, c->k.t.data, c->v.t.data, c->cpu_work.data(), 0, 1);
    psa_result r = psa_attend(&plan, c->q.t.data, c->k.t.data, c->v.t.data, levels, c->cpu_work.data(),
                              c->expected.t.data, c->cpu_lse.data(), 0, 1);
    CHECK(r == PSA_OK, "psa_attend: %s", psa_result_string(r));
}

/* What rounding to 16 bits may cost, as a share of a row of out, of 1 in lse and of a score: that of v and the weights,
 * that of q, k and the means, which grows with the logits, and that of out. */
static double rounding_of(const call &c)
{
    double logit = c.s.spread * c.s.spread * fabs(c.plan.desc.scale) * sqrt((double)c.s.D);
    return (c.s.kv == PSA_F16 ? 1e-3 : 8e-3) * (1 + logit) + (c.s.out == PSA_BF16 ? 2e-3 : 0);
}

/* The case that a message is about. */
static std::string text_of(const call &c)
{
    char text[200];
    const psa_desc &d = c.plan.desc;
    snprintf(text, sizeof text, "B %d, heads %d/%d, N %d/%d, D %d/%d, types %d %d %d, blocks %d/%d%s, scale %g%s",
             c.s.B, c.s.Hq, c.s.Hkv, c.s.Nq, c.s.Nk, c.s.D, c.s.Dv, c.s.q, c.s.kv, c.s.out, d.block_q, d.block_k,
             d.causal ? ", causal" : "", (double)d.scale, d.order_q.index ? ", ordered" : "");
    return text;
}

static void compare_out(const call &c)
{
    double limit = rounding_of(c), worst = 0, worst_lse = 0;
    for (int64_t b = 0; b < c.s.B; b++) {
        for (int64_t h = 0; h < c.s.Hq; h++) {
            for (int64_t n = 0; n < c.s.Nq; n++) {
                double error = 0, size = 0;
                for (int64_t d = 0; d < c.s.Dv; d++) {
                    double want = load(PSA_F32, element(c.expected.t, d, n, h, b));
                    double got = load(c.s.out, element(c.out.t, d, n, h, b));
                    error += (got - want) * (got - want);
                    size += want * want;
                }
                size_t row = (size_t)((b * c.s.Hq + h) * c.s.Nq + n);
                float lse = c.lse.as<float>()[row], want = c.cpu_lse[row];
                double off = lse == want ? 0 : fabs((double)lse - want);
                error = sqrt(error / (size + 1e-3 * c.s.Dv));
                if (!(error <= worst)) worst = error;
                if (!(off <= worst_lse)) worst_lse = off;
            }
        }
    }
    CHECK(worst <= limit, "out is off by %g of a row, expected %g: %s", worst, limit, text_of(c).c_str());
    CHECK(worst_lse <= 2 * limit, "lse is off by %g: %s", worst_lse, text_of(c).c_str());
    CHECK(c.out.memory.intact() && c.lse.intact() && c.work.intact(), "bytes before a buffer were written");
}

static void compare_scores(const call &c)
{
    double worst = 0;
    const float *got = c.scores.as<float>();
    for (size_t i = 0; i < c.cpu_scores.size(); i++) {
        double want = c.cpu_scores[i], off = fabs(got[i] - want) / (want + 0.1 / (double)c.plan.nk);
        if (!(off <= worst)) worst = off;
    }
    /* a logit's error is a relative error of a score */
    CHECK(worst <= 3 * rounding_of(c), "scores are off by %g of themselves: %s", worst, text_of(c).c_str());
}

static bool ok(psa_result r, int line) { return check(r == PSA_OK, line, "got \"%s\"", psa_result_string(r)); }
#define OK(call) ok(call, __LINE__)

static emu::options on_this_gpu(emu::options o)
{
    if (hopper) o.capability = 90, o.shared_max = 227 * 1024;
    return o;
}

static void random_schedule()
{
    emu::m.opt.order = (emu::schedule)rnd_int(0, 3);
    emu::m.opt.copies = (emu::landing)rnd_int(0, 2);
    emu::m.opt.warp = rnd_int(0, hopper ? 11 : 3);
    emu::m.opt.sms = rnd_int(1, 3);
    emu::m.opt.seed = rnd();
}

static void random_levels(const call &c, int skip, uint8_t *levels)
{
    for (size_t i = 0; i < psa_map_size(&c.plan); i++) {
        levels[i] = (uint8_t)(rnd_chance(skip) ? 0 : 1 << rnd_int(0, c.plan.n_levels - 1));
    }
}

/* ---- attend ---- */

static void attend_case(const shape &s, const psa_desc &desc, int skip, bool ordered = false)
{
    call c;
    random_schedule();
    if (!call_make(&c, s, desc, ordered)) return;
    random_levels(c, skip, c.levels.as<uint8_t>());
    cpu_attend(&c, c.levels.as<uint8_t>());
    bool done = OK(psa_cuda_pool(&c.plan, c.k.t.data, c.v.t.data, c.work.data(), nullptr)) &&
                OK(psa_cuda_list(&c.plan, c.levels.as<uint8_t>(), c.work.data(), nullptr)) &&
                OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data,
                                   c.lse.as<float>(), nullptr));
    if (done) compare_out(c);
}

static void test_attend_sizes()
{
    static const int dims[][2] = {{64, 64}, {128, 128}, {32, 32},   {80, 80},
                                  {96, 40}, {72, 128},  {256, 256}, {200, 136}};
    for (auto &d : dims) {
        for (psa_type type : {PSA_BF16, PSA_F16}) {
            shape s;
            psa_desc desc = {};
            s.D = d[0];
            s.Dv = d[1];
            s.q = s.kv = s.out = type;
            s.Nq = 130;
            s.Nk = 200;
            desc.block_q = type == PSA_F16 && !hopper ? 64 : 128;
            desc.block_k = 32;
            attend_case(s, desc, 30);
        }
    }
}

static void test_attend_random()
{
    static const int dims[] = {8, 16, 40, 64, 64, 72, 80, 128};
    for (int i = 0; i < 30 * rounds; i++) {
        shape s;
        psa_desc desc = {};
        s.B = rnd_int(1, 2);
        s.Hkv = rnd_int(1, 2);
        s.Hq = s.Hkv * rnd_int(1, 2);
        s.Nq = rnd_chance(20) ? rnd_int(1, 8) : rnd_int(9, 200);
        s.Nk = rnd_chance(20) ? rnd_int(1, 30) : rnd_int(31, 300);
        s.D = dims[rnd_int(0, 7)];
        s.Dv = dims[rnd_int(0, 7)];
        if (hopper && rnd_chance(90)) s.D = s.Dv = 64 << rnd_int(0, 1);
        s.q = (psa_type)rnd_int(0, 2);
        s.kv = (psa_type)rnd_int(0, 2);
        s.out = (psa_type)rnd_int(0, 2);
        s.swapped = rnd_chance(40);
        s.gap = rnd_chance(30) ? (s.q == PSA_F32 || s.kv == PSA_F32 ? 4u : 2u) * (unsigned)rnd_int(1, 8) : 0;
        s.gap = s.gap && s.swapped ? 16 : s.gap;
        s.spread = rnd_chance(20) ? 3 : 1;
        desc.block_q = rnd_chance(50) ? 16 << rnd_int(hopper ? 3 : 0, 4) : rnd_int(hopper ? 65 : 16, 256);
        desc.block_k = 16 << rnd_int(0, 3);
        desc.causal = rnd_chance(40);
        desc.scale = rnd_chance(20) ? -0.3f : 0;
        attend_case(s, desc, rnd_chance(20) ? 97 : 40, !desc.causal && rnd_chance(30));
    }
}

static void test_attend_dense()
{
    for (int causal = 0; causal < 2; causal++) {
        shape s;
        call c;
        psa_desc desc = {};
        s.Nq = 200;
        s.Nk = causal ? 150 : 230; /* the first causal rows see nothing */
        s.kv = s.q = PSA_F16;
        desc.mask = PSA_MASK_DENSE;
        desc.causal = causal;
        random_schedule();
        if (!call_make(&c, s, desc)) return;
        cpu_attend(&c, nullptr);
        psa_extra extra = {};
        extra.lse = c.lse.as<float>();
        if (OK(psa_cuda_attention(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.out.t.data, &extra, c.work.data(),
                                  c.work.size, nullptr))) {
            compare_out(c);
        }
    }
}

/* Query blocks that read nothing: zeros, whatever order the warps come in. */
static void test_attend_nothing()
{
    for (const emu::landing copies : {emu::LATE, emu::EARLY}) {
        for (int order = emu::IN_ORDER; order <= emu::BEHIND; order++) {
            shape s;
            call c;
            psa_desc desc = {};
            s.out = PSA_F16;
            if (!call_make(&c, s, desc)) return;
            emu::m.opt.order = (emu::schedule)order;
            emu::m.opt.copies = copies;
            memset(c.levels.data(), 0, c.levels.size);
            OK(psa_cuda_list(&c.plan, c.levels.as<uint8_t>(), c.work.data(), nullptr));
            OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data,
                               c.lse.as<float>(), nullptr));
            tensor_make(&c.expected, PSA_F32, false, 0, s.Dv, s.Nq, s.Hq, s.B);
            tensor_fill(&c.expected, [](int64_t, int64_t, int64_t, int64_t) { return 0.0; });
            c.cpu_lse.assign((size_t)s.Nq, -INFINITY);
            compare_out(c);
        }
    }
}

/* Few queries and many keys: the stream is split and its parts are combined. */
static void test_attend_split()
{
    for (int i = 0; i < 4; i++) {
        shape s;
        psa_desc desc = {};
        s.Hq = 2;
        s.Nq = rnd_int(1, 20);
        s.Nk = rnd_int(1000, 1400);
        s.out = (psa_type)(i % 3);
        desc.block_q = 16;
        attend_case(s, desc, 20, i == 1);
    }
}

/* Two of three KV heads have K and V in the L2 cache together; every tile of queries is somebody's. */
static void test_attend_sections()
{
    shape s;
    call c;
    psa_desc desc = {};
    s.Hq = 6;
    s.Hkv = 3;
    s.Nq = 1300; /* enough for streams not to be split */
    s.Nk = 32000;
    desc.causal = 1;
    if (!call_make(&c, s, desc)) return;
    for (size_t i = 0; i < psa_map_size(&c.plan); i++) c.levels.as<uint8_t>()[i] = rnd_chance(1);
    cpu_attend(&c, c.levels.as<uint8_t>());
    OK(psa_cuda_list(&c.plan, c.levels.as<uint8_t>(), c.work.data(), nullptr));
    OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data, c.lse.as<float>(),
                       nullptr));
    compare_out(c);
}

/* CTAs draw their tiles: again, and with any number of CTAs, gives the same bits. */
static void test_attend_ctas()
{
    shape s;
    call c;
    psa_desc desc = {};
    std::vector<char> first;
    s.Nq = 500;
    s.Hq = 4;
    s.Hkv = 2;
    s.Nk = 300;
    desc.causal = 1;
    desc.block_k = 16;
    if (!call_make(&c, s, desc)) return;
    random_levels(c, 20, c.levels.as<uint8_t>());
    OK(psa_cuda_pool(&c.plan, c.k.t.data, c.v.t.data, c.work.data(), nullptr));
    OK(psa_cuda_list(&c.plan, c.levels.as<uint8_t>(), c.work.data(), nullptr));
    for (int sms : {1, 1, 2, 5, 200}) {
        emu::m.opt.sms = sms;
        memset(c.out.memory.data(), 0xff, c.out.memory.size);
        OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data, c.lse.as<float>(),
                           nullptr));
        std::vector<char> now(c.out.memory.data(), c.out.memory.data() + c.out.memory.size);
        if (first.empty()) first = now;
        CHECK(now == first, "%d CTAs give other bits", sms);
    }
    cpu_attend(&c, c.levels.as<uint8_t>());
    compare_out(c);
}

static void test_nan_stays_in_its_row()
{
    shape s;
    call c;
    psa_desc desc = {};
    s.Nq = s.Nk = 140;
    desc.block_k = 32;
    if (!call_make(&c, s, desc)) return;
    random_levels(c, 40, c.levels.as<uint8_t>());
    for (int64_t i = 0; i < (int64_t)psa_map_size(&c.plan); i++) {
        if (i % c.plan.nk == 2) c.levels.as<uint8_t>()[i] = (uint8_t)(i / c.plan.nk == 0 ? 0 : 4);
    }
    store(s.q, element(c.q.t, 5, 7, 0, 0), NAN);          /* query 7 */
    store(s.kv, element(c.k.t, 5, 70, 0, 0), INFINITY);   /* KV block 2, which query block 0 skips */
    cpu_attend(&c, c.levels.as<uint8_t>());
    OK(psa_cuda_pool(&c.plan, c.k.t.data, c.v.t.data, c.work.data(), nullptr));
    OK(psa_cuda_list(&c.plan, c.levels.as<uint8_t>(), c.work.data(), nullptr));
    OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data, nullptr, nullptr));
    for (int64_t n = 0; n < s.Nq; n++) {
        bool want = std::isnan(load(PSA_F32, element(c.expected.t, 0, n, 0, 0)));
        bool got = std::isnan(load(s.out, element(c.out.t, 0, n, 0, 0)));
        CHECK(want == got, "row %d: NaN is %d, expected %d", (int)n, got, want);
    }
}

/* Inf and NaN in V reach the rows that see them, and none that causality hides them from. */
static void test_odd_values_behind_the_diagonal()
{
    for (int i = 0; i < 6 * rounds; i++) {
        shape s;
        call c;
        psa_desc desc = {};
        s.Nq = s.Nk = 150;
        s.D = s.Dv = i % 2 ? 128 : hopper ? 64 : 40;
        s.q = s.kv = i % 3 ? PSA_BF16 : PSA_F16;
        desc.block_k = 32;
        desc.causal = 1;
        random_schedule();
        if (!call_make(&c, s, desc)) return;
        random_levels(c, 30, c.levels.as<uint8_t>());
        for (int64_t n : {3, 70, 71, 149}) {
            store(s.kv, element(c.v.t, n % s.Dv, n, 0, 0), n % 2 ? NAN : n == 70 ? INFINITY : -INFINITY);
        }
        cpu_attend(&c, c.levels.as<uint8_t>());
        OK(psa_cuda_pool(&c.plan, c.k.t.data, c.v.t.data, c.work.data(), nullptr));
        OK(psa_cuda_list(&c.plan, c.levels.as<uint8_t>(), c.work.data(), nullptr));
        OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data, nullptr, nullptr));
        int odd = 0, wrong = 0;
        for (int64_t n = 0; n < s.Nq * s.Dv; n++) {
            bool want = std::isfinite(load(PSA_F32, element(c.expected.t, n % s.Dv, n / s.Dv, 0, 0)));
            odd += !want;
            wrong += want != std::isfinite(load(s.out, element(c.out.t, n % s.Dv, n / s.Dv, 0, 0)));
        }
        CHECK(odd > 0 && wrong == 0, "%d elements wrong, %d are not finite: %s", wrong, odd, text_of(c).c_str());
    }
}

/* ---- pool, score, mask ---- */

static psa_desc random_scores()
{
    psa_desc d = {};
    d.score = (psa_score_kind)rnd_int(0, 3);
    d.sample_q = rnd_chance(50) ? 0 : rnd_int(1, 10) / 10.0;
    d.sample_k = rnd_chance(50) ? 0 : rnd_int(1, 10) / 10.0;
    d.score_norm = rnd_chance(30);
    d.score_mean = rnd_chance(30);
    d.stride = 2 << rnd_int(0, 1);
    d.seed = rnd();
    d.block_q = 16 << rnd_int(0, 3);
    d.block_k = 16 << rnd_int(0, 3);
    d.causal = rnd_chance(40);
    if (rnd_chance(60)) { /* else whole blocks */
        d.score_group[0] = d.block_q >> rnd_int(0, 4);
        d.score_group[1] = d.block_k >> rnd_int(0, 4);
    }
    return d;
}

static shape random_shape()
{
    static const int dims[] = {8, 40, 64, 72, 128, 136};
    shape s;
    s.Hkv = rnd_int(1, 2);
    s.Hq = s.Hkv * rnd_int(1, 2);
    s.Nq = rnd_int(1, 150);
    s.Nk = rnd_int(1, 300);
    s.D = dims[rnd_int(0, 5)];
    s.Dv = 16;
    s.q = (psa_type)rnd_int(0, 2);
    s.kv = (psa_type)rnd_int(0, 2);
    s.swapped = rnd_chance(30);
    return s;
}

static void test_score_random()
{
    for (int i = 0; i < 40 * rounds; i++) {
        call c;
        psa_desc desc = random_scores();
        bool ordered = !desc.causal && rnd_chance(30);
        random_schedule();
        if (!call_make(&c, random_shape(), desc, ordered)) return;
        cpu_map(&c);
        bool done = OK(psa_cuda_pool(&c.plan, c.k.t.data, c.v.t.data, c.work.data(), nullptr)) &&
                    OK(psa_cuda_score(&c.plan, c.q.t.data, c.k.t.data, c.work.data(), c.scores.as<float>(), nullptr));
        if (done) compare_scores(c);
        CHECK(c.scores.intact() && c.work.intact(), "bytes before a buffer were written");
    }
}

/* More KV blocks than the strip in shared memory holds. */
static void test_score_two_passes()
{
    for (int kind = PSA_SCORE_SAMPLE; kind <= PSA_SCORE_ANTIDIAGONAL; kind++) {
        call c;
        shape s;
        psa_desc desc = {};
        s.Nq = 100;
        s.Nk = 16 * 700;
        desc.block_k = 16;
        desc.score = (psa_score_kind)kind;
        desc.score_norm = 1;
        random_schedule();
        if (!call_make(&c, s, desc)) return;
        cpu_map(&c);
        OK(psa_cuda_score(&c.plan, c.q.t.data, c.k.t.data, c.work.data(), c.scores.as<float>(), nullptr));
        compare_scores(c);
    }
}

static void random_mask(psa_desc *d)
{
    int most = 0;
    while (16 << most < d->block_k) most++;
    most += 5; /* levels that block_k has */
    d->mask = (psa_mask_kind)rnd_int(0, 1);
    if (d->mask == PSA_MASK_TOPK && rnd_chance(30)) {
        for (int i = 0; i < 3; i++) d->level_count[i] = rnd_int(0, 3);
    } else if (rnd_chance(70)) {
        double end = 0;
        for (int i = 0; i < rnd_int(1, most); i++) {
            d->level_end[i] = end += rnd_chance(30) ? 0 : (1 - end) * rnd_uniform();
        }
    }
    d->inclusive = rnd_chance(30);
    d->min_full = rnd_chance(30) ? 0.1 : 0;
    d->n_sim_min = rnd_chance(50) ? rnd_int(1, 4) : 0;
    for (int i = 0; i < d->n_sim_min; i++) d->sim_min[i] = 0.2 + 0.3 * rnd_uniform();
    d->n_prefix = rnd_chance(20) ? rnd_int(1, 60) : 0;
    d->n_suffix = rnd_chance(20) ? rnd_int(1, 60) : 0;
    d->sink = rnd_chance(20);
    d->diagonal = rnd_chance(20);
    d->skip_mean = rnd_chance(20);
}

/* From the CPU's scores the same map, bit for bit. */
static void test_mask_random()
{
    for (int i = 0; i < 60 * rounds; i++) {
        call c;
        psa_desc desc = random_scores();
        random_mask(&desc);
        desc.score = PSA_SCORE_SAMPLE;
        bool ordered = !desc.causal && rnd_chance(30);
        random_schedule();
        shape s = random_shape();
        s.D = 16;
        s.Nk = rnd_chance(20) ? rnd_int(1000, 3000) : rnd_int(1, 300);
        if (!call_make(&c, s, desc, ordered)) return;
        cpu_map(&c);
        if (rnd_chance(30)) { /* ties, zeros and what is no number */
            for (float &x : c.cpu_scores) x = rnd_chance(5) ? NAN : rnd_chance(50) ? 0.25f * (float)rnd_int(-1, 2) : x;
            psa_mask(&c.plan, c.cpu_scores.data(), c.cpu_work.data(), c.cpu_levels.data(), 0, 1);
        }
        OK(psa_cuda_pool(&c.plan, c.k.t.data, c.v.t.data, c.work.data(), nullptr));
        OK(psa_cuda_mask(&c.plan, c.cpu_scores.data(), c.work.data(), c.levels.as<uint8_t>(), nullptr));
        size_t wrong = 0;
        for (size_t j = 0; j < c.cpu_levels.size(); j++) wrong += c.cpu_levels[j] != c.levels.as<uint8_t>()[j];
        CHECK(wrong == 0, "%zu of %zu levels differ", wrong, c.cpu_levels.size());
        CHECK(c.levels.intact() && c.work.intact(), "bytes before a buffer were written");
    }
}

/* More blocks than keys fit into shared memory; more query blocks than CTAs. */
static void test_mask_sizes()
{
    static const int n[][2] = {{40, 16 * 8200}, {1100 * 16, 100}};
    for (auto &size : n) {
        shape s;
        call c;
        psa_desc desc = {};
        s.Nq = size[0];
        s.Nk = size[1];
        s.D = s.Dv = 8;
        desc.block_q = desc.block_k = 16;
        desc.mask = PSA_MASK_THRESHOLD;
        random_schedule();
        if (!call_make(&c, s, desc)) return;
        c.cpu_scores.resize(psa_map_size(&c.plan));
        c.cpu_levels.resize(psa_map_size(&c.plan));
        c.cpu_work.resize(psa_work_size(&c.plan));
        for (float &x : c.cpu_scores) x = (float)rnd_int(0, 999);
        psa_mask(&c.plan, c.cpu_scores.data(), c.cpu_work.data(), c.cpu_levels.data(), 0, 1);
        OK(psa_cuda_mask(&c.plan, c.cpu_scores.data(), c.work.data(), c.levels.as<uint8_t>(), nullptr));
        CHECK(!memcmp(c.levels.data(), c.cpu_levels.data(), c.cpu_levels.size()), "levels differ");
        CHECK(c.levels.intact() && c.work.intact(), "bytes before a buffer were written");
    }
}

/* ---- everything at once ---- */

static void test_one_call()
{
    for (int i = 0; i < 12 * rounds; i++) {
        call c;
        psa_desc desc = random_scores();
        random_mask(&desc);
        bool ordered = !desc.causal && rnd_chance(30);
        random_schedule();
        shape s = random_shape();
        s.Dv = 64;
        if (hopper) s.D = 64, desc.block_q = 128;
        if (!call_make(&c, s, desc, ordered)) return;
        psa_extra extra = {};
        extra.lse = c.lse.as<float>();
        extra.scores = c.scores.as<float>();
        extra.levels = c.levels.as<uint8_t>();
        cpu_map(&c);
        if (!OK(psa_cuda_attention(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.out.t.data, &extra, c.work.data(),
                                   c.work.size, nullptr))) {
            continue;
        }
        compare_scores(c);
        cpu_attend(&c, extra.levels); /* of the device's own map: near ties may have gone the other way */
        compare_out(c);
    }
}

static void test_merge()
{
    tensor a, b, got, want;
    buffer lse_a(40 * 4), lse_b(40 * 4);
    float lse[40];
    for (tensor *t : {&a, &b, &got, &want}) tensor_make(t, PSA_F32, false, 0, 24, 10, 2, 2);
    auto normal = [](int64_t, int64_t, int64_t, int64_t) { return rnd_normal(); };
    tensor_fill(&a, normal);
    tensor_fill(&b, normal);
    memcpy(want.t.data, a.t.data, a.memory.size);
    memcpy(got.t.data, a.t.data, a.memory.size);
    for (int i = 0; i < 40; i++) {
        lse_a.as<float>()[i] = lse[i] = i % 7 == 0 ? -INFINITY : (float)rnd_normal();
        lse_b.as<float>()[i] = i % 5 == 0 ? -INFINITY : (float)rnd_normal();
    }
    psa_merge(&want.t, lse, &b.t, lse_b.as<float>(), 0, 1);
    OK(psa_cuda_merge(&got.t, lse_a.as<float>(), &b.t, lse_b.as<float>(), nullptr));
    double worst = 0;
    for (size_t i = 0; i < a.memory.size / 4; i++) {
        worst = fmax(worst, fabs((double)((float *)got.t.data)[i] - ((float *)want.t.data)[i]));
    }
    for (int i = 0; i < 40; i++) {
        float now = lse_a.as<float>()[i];
        worst = fmax(worst, lse[i] == now ? 0 : fabs(lse[i] - now));
    }
    CHECK(worst < 1e-5, "merge is off by %g", worst);
}

static void test_errors()
{
    shape s;
    call c;
    psa_desc desc = {};
    if (!call_make(&c, s, desc)) return;
    char *work = c.work.data();
    void *q = c.q.t.data, *k = c.k.t.data, *v = c.v.t.data, *out = c.out.t.data;
    auto attention = [&](size_t size) {
        return psa_cuda_attention(&c.plan, q, k, v, out, nullptr, work, size, nullptr);
    };
    CHECK(attention(c.work.size - 1) == PSA_ERR_CUDA_WORK, "a workspace that is too small");
    q = (char *)q + 2;
    CHECK(attention(c.work.size) == PSA_ERR_CUDA_ALIGN, "q at an odd address");
    q = nullptr;
    CHECK(attention(c.work.size) == PSA_ERR_NULL, "no q");
    q = c.q.t.data;
    emu::m.opt.capability = 75;
    CHECK(attention(c.work.size) == PSA_ERR_CUDA_DEVICE, "compute capability 7.5");
    emu::m.opt.capability = 0;
    CHECK(attention(c.work.size) == PSA_ERR_CUDA_DEVICE, "no device");
    emu::m.opt.capability = 80;
    c.desc.score = PSA_SCORE_ANTIDIAGONAL;
    c.desc.stride = 64;
    psa_plan_init(&c.plan, &c.desc, &c.q.t, &c.k.t, &c.v.t, &c.out.t);
    CHECK(attention(c.work.size) == PSA_ERR_CUDA_SIZE, "a stride that does not fit into shared memory");
    for (char *p = c.out.memory.data(); p < c.out.memory.data() + c.out.memory.size; p++) {
        if (*p != (char)0xff && CHECK(false, "out was written")) break;
    }
    CHECK(psa_cuda_pool(nullptr, k, v, work, nullptr) == PSA_ERR_NULL, "no plan");
    CHECK(psa_cuda_pool(&c.plan, k, v, nullptr, nullptr) == PSA_ERR_NULL, "no workspace");
}

/* ---- what the emulator would notice ---- */

/* All bytes that a call leaves behind. */
static std::vector<char> outputs_of(const call &c)
{
    std::vector<char> all;
    for (const buffer *b : {&c.out.memory, &c.lse, &c.scores, &c.levels}) {
        all.insert(all.end(), b->data(), b->data() + b->size);
    }
    return all;
}

static std::vector<char> run_quietly(call *c)
{
    psa_extra extra = {};
    extra.lse = c->lse.as<float>();
    extra.scores = c->scores.as<float>();
    extra.levels = c->levels.as<uint8_t>();
    for (const buffer *b : {&c->out.memory, &c->lse, &c->scores, &c->levels, &c->work}) {
        memset(b->data(), 0xff, b->size);
    }
    emu::m.opt.quiet = true;
    psa_result r = psa_cuda_attention(&c->plan, c->q.t.data, c->k.t.data, c->v.t.data, c->out.t.data, &extra,
                                      c->work.data(), c->work.size, nullptr);
    if (r == PSA_OK && !hopper) { /* any numbers will do */
        psa_cuda_merge(&c->out.t, extra.lse, &c->q.t, extra.scores, nullptr);
    }
    return outputs_of(*c);
}

static const emu::options schedules[] = {
    {emu::IN_ORDER, emu::LATE, 0}, {emu::AHEAD, emu::EARLY, 3}, {emu::BEHIND, emu::EARLY, 0},
    {emu::BEHIND, emu::LATE, 1},   {emu::AHEAD, emu::LATE, 2},  {emu::RANDOM, emu::COIN, 0},
    {emu::RANDOM, emu::EARLY, 0},  {emu::RANDOM, emu::LATE, 0},
};

/* The same for the attend of sm_90a: more tiles than stages, over several tiles of queries in a CTA; blocks of fewer
 * than 8 rows; causal, with values behind the diagonal that are not finite. */
static bool hopper_call(call *c, bool second)
{
    shape s;
    psa_desc desc = {};
    s.Hq = 2;
    s.Nq = second ? 300 : 200;
    s.Nk = second ? 300 : 490; /* from 512 on streams are split */
    s.D = s.Dv = second ? 64 : 128;
    s.out = s.q = s.kv = PSA_F16;
    desc.block_k = second ? 64 : 16;
    desc.causal = second;
    desc.skip_mean = 1;
    for (int i = 0; i < 4; i++) desc.level_end[i] = 0.6 + 0.1 * i;
    if (!call_make(c, s, desc)) return false;
    for (int64_t n = 0; second && n < s.Nk; n += 70) store(s.kv, element(c->v.t, n % s.D, n, 0, 0), INFINITY);
    return true;
}

/* Two calls that go through everything: more tiles than stages, more steps than warps; THRESHOLD and
 * TOPK, one strip of scores and two. */
static bool call_of_everything(call *c, bool second)
{
    shape s;
    psa_desc desc = {};
    if (hopper) return hopper_call(c, second);
    s.Nq = second ? 48 : 128;
    s.Nk = second ? 16 * 600 : 2500;
    s.out = s.q = s.kv = PSA_F16;
    desc.block_q = s.Nq;
    desc.block_k = 16;
    desc.mask = second ? PSA_MASK_TOPK : PSA_MASK_THRESHOLD;
    desc.n_sim_min = 2;
    desc.sim_min[0] = desc.sim_min[1] = 0.2;
    desc.skip_mean = 1;
    desc.score_norm = 1;
    desc.sample_q = second ? 1 : 0.5;
    return call_make(c, s, desc);
}

static void test_same_bits_under_every_schedule()
{
    for (int second = 0; second < 2; second++) {
        call c;
        if (!call_of_everything(&c, second)) return;
        std::vector<char> first;
        for (const emu::options &o : schedules) {
            emu::m.opt = on_this_gpu(o);
            std::vector<char> now = run_quietly(&c);
            CHECK(!emu::m.failed, "the launch failed");
            if (first.empty()) first = now;
            CHECK(now == first, "schedule %d gives other bits", (int)(&o - schedules));
        }
    }
}

/* Whether a schedule shows that the source line is broken, as skip_line, shift_line or spoil_line. */
static bool caught(call (&c)[2], int emu::options::*fault, int line, const std::vector<char> (&right)[2])
{
    for (int i = 0; i < 2; i++) {
        for (const emu::options &o : schedules) {
            emu::m.opt = on_this_gpu(o);
            emu::m.opt.*fault = line;
            if (run_quietly(&c[i]) != right[i] || emu::m.failed) return true;
        }
    }
    return false;
}

/* Leaves out every barrier and wait in turn, and shifts every ldmatrix: some schedule must show it. */
static void test_every_barrier_is_needed()
{
    call c[2];
    std::vector<char> right[2];
    std::set<int> syncs, matrices, phases;
    emu::m.syncs.clear();
    emu::m.matrices.clear();
    emu::m.phases.clear();
    for (int i = 0; i < 2; i++) {
        if (!call_of_everything(&c[i], i)) return;
        right[i] = run_quietly(&c[i]);
        if (hopper) { /* the lines of attend alone */
            emu::m.syncs.clear();
            emu::m.matrices.clear();
            OK(psa_cuda_attend(&c[i].plan, c[i].q.t.data, c[i].k.t.data, c[i].v.t.data, c[i].work.data(),
                               c[i].out.t.data, nullptr, nullptr));
        }
        syncs.insert(emu::m.syncs.begin(), emu::m.syncs.end());
        matrices.insert(emu::m.matrices.begin(), emu::m.matrices.end());
    }
    phases = emu::m.phases;
    CHECK(syncs.size() > 10 && matrices.size() >= (hopper ? 4 : 5), "found %zu and %zu", syncs.size(), matrices.size());
    CHECK(phases.size() == (hopper ? 10 : 0), "found %zu", phases.size());
    for (int line : syncs) {
        bool found = caught(c, &emu::options::skip_line, line, right);
        CHECK(found, "psa_cuda.cu:%d: nothing changes without this barrier or wait", line);
    }
    for (int line : matrices) {
        bool found = caught(c, &emu::options::shift_line, line, right);
        CHECK(found, "psa_cuda.cu:%d: nothing changes with a wrong swizzle", line);
    }
    for (int line : phases) {
        bool found = caught(c, &emu::options::spoil_line, line, right);
        CHECK(found, "psa_cuda.cu:%d: nothing changes with another phase or number of bytes", line);
    }
}

/* Rows of 256 bytes: eight at the same chunk collide, and do not with the XOR of psa__at. */
static void test_wavefronts_are_counted()
{
    uint32_t plain[8], swizzled[8];
    for (uint32_t r = 0; r < 8; r++) plain[r] = r * 256 + 48, swizzled[r] = r * 256 + ((3 ^ r) << 4);
    emu::m.lines.clear();
    emu::count_wavefronts(1, plain, 8, 16);
    emu::count_wavefronts(2, swizzled, 8, 16);
    CHECK(emu::m.lines[1].wavefronts == 8, "without swizzle: %d", (int)emu::m.lines[1].wavefronts);
    CHECK(emu::m.lines[2].wavefronts == 1, "with it: %d", (int)emu::m.lines[2].wavefronts);
}

/* In score and attend; pool is bound by global memory, and each CTA adds its few sums once. */
static void test_no_bank_conflicts()
{
    for (int d : {64, 128, 256}) {
        shape s;
        call c;
        psa_desc desc = {};
        s.D = s.Dv = d;
        s.q = s.kv = s.out = PSA_F16;
        s.Nq = 128;
        s.Nk = 400;
        if (!call_make(&c, s, desc)) return;
        OK(psa_cuda_pool(&c.plan, c.k.t.data, c.v.t.data, c.work.data(), nullptr));
        emu::m.opt.count = true;
        emu::m.lines.clear();
        OK(psa_cuda_score(&c.plan, c.q.t.data, c.k.t.data, c.work.data(), nullptr, nullptr));
        emu::m.opt.count = false;
        OK(psa_cuda_mask(&c.plan, nullptr, c.work.data(), nullptr, nullptr));
        emu::m.opt.count = true;
        OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data, nullptr, nullptr));
        emu::m.opt.count = false;
        CHECK(!emu::m.lines.empty(), "nothing was counted");
        for (auto &l : emu::m.lines) {
            CHECK(l.second.wavefronts == l.second.ideal, "psa_cuda.cu:%d: %d wavefronts where %d would do, D %d",
                  l.first, (int)l.second.wavefronts, (int)l.second.ideal, d);
        }
    }
}

/* attend takes the shared memory that its design says: Q and the stages of K and V, and little more. */
static void test_shared_memory()
{
    static const struct {
        int D, block_q;
        uint32_t KB;
    } design[] = {{64, 128, 64}, {64, 64, 56}, {128, 128, 96}, {128, 64, 80}, {256, 128, 96}};
    for (auto &d : design) {
        shape s;
        call c;
        psa_desc desc = {};
        s.D = s.Dv = d.D;
        s.Nk = 64;
        desc.block_q = d.block_q;
        desc.mask = PSA_MASK_DENSE;
        if (!call_make(&c, s, desc)) return;
        OK(psa_cuda_list(&c.plan, nullptr, c.work.data(), nullptr));
        OK(psa_cuda_attend(&c.plan, c.q.t.data, c.k.t.data, c.v.t.data, c.work.data(), c.out.t.data, nullptr, nullptr));
        uint32_t size = emu::m.shared_size, least = d.KB * 1024;
        printf("  attend, D %d, block_q %d: %u bytes of shared memory\n", d.D, d.block_q, size);
        CHECK(size >= least && size < least + 3 * 1024, "expected %u KB and at most 3 more", d.KB);
    }
}

/* The counts of tools/gpu_model.h are those of the kernels. */
static void test_model()
{
    for (int i = 0; i < 6; i++) {
        static const int dims[] = {64, 128, 256};
        shape s;
        call c;
        psa_desc desc = {};
        s.D = s.Dv = dims[i % 3];
        s.q = s.kv = s.out = PSA_F16;
        s.Nq = 256;
        s.Nk = hopper ? 384 : 1024; /* else streams are split */
        s.Hq = 2;
        desc.block_q = i < 3 ? 128 : 64;
        desc.block_k = i < 3 ? 64 : 32;
        desc.score_norm = 1;
        if (hopper && (s.D == 256 || desc.block_q == 64)) continue;
        if (!call_make(&c, s, desc)) return;
        psa_tensor kv[] = {c.k.t, c.v.t};
        OK(psa_cuda_pool(&c.plan, kv[0].data, kv[1].data, c.work.data(), nullptr));
        for (int attend = hopper; attend < 2; attend++) {
            model_cost want = hopper   ? model_attend_wgmma(&c.plan, s.Nk)
                              : attend ? model_attend(&c.plan, s.Nk) : model_score(&c.plan, emu::m.opt.shared_max);
            uint64_t wavefronts = 0;
            emu::m.lines.clear();
            emu::m.mmas = emu::m.exps = emu::m.copied = 0;
            if (attend) OK(psa_cuda_list(&c.plan, nullptr, c.work.data(), nullptr));
            emu::m.opt.count = true;
            if (attend) {
                OK(psa_cuda_attend(&c.plan, c.q.t.data, kv[0].data, kv[1].data, c.work.data(), c.out.t.data, nullptr,
                                   nullptr));
            } else {
                OK(psa_cuda_score(&c.plan, c.q.t.data, kv[0].data, c.work.data(), nullptr, nullptr));
            }
            emu::m.opt.count = false;
            for (auto &l : emu::m.lines) wavefronts += l.second.wavefronts;
            auto like = [&](const char *what, double model, double counted, double share) {
                CHECK(fabs(model - counted) <= share * counted,
                      "%s, D %d, block_q %d: %s: the model has %g, counted %g",
                      attend ? "attend" : "score", s.D, desc.block_q, what, model, counted);
            };
            like("MMAs", want.mmas, (double)emu::m.mmas, 0);
            if (!hopper) like("wavefronts", want.wavefronts, (double)wavefronts, 0.1); /* wgmma's are not counted */
            like("exp2", want.exps, (double)emu::m.exps, 0.1);
            if (attend) like("bytes", want.l2_bytes - 4.0 * s.Hq * s.Nq * s.D, (double)emu::m.copied, 0);
            else like("bytes", want.l2_bytes, (double)emu::m.copied, 0);
        }
    }
}

/* Its times lie between what FlashAttention 2 and 3 reach on an H100 and what the tensor cores give at best. What attend
 * is to reach on an H200 lies within them. The whole call is to be 4 times as fast as dense, and here is not: scores
 * have to wait for the L2 cache. */
static void test_model_times()
{
    const model_gpu &h200 = model_gpus[MODEL_GPUS - 2], &wgmma = model_gpus[MODEL_GPUS - 1];
    const double N = 32768, heads = 40, density = 0.15;
    for (int D : {64, 128}) {
        psa_desc desc = {};
        psa_plan p;
        const char *what = "";
        psa_tensor t = psa_tensor_4d(nullptr, PSA_BF16, D, (int64_t)N, (int64_t)heads, 1);
        OK(psa_plan_init(&p, &desc, &t, &t, &t, &t));
        model_cost dense = model_attend_on(&wgmma, &p, N), sparse = model_attend_on(&wgmma, &p, density * N);
        model_cost attend = model_attend(&p, N), pool = model_pool(&p), mask = model_mask(&p);
        model_cost score = model_score(&p, wgmma.shared);
        double work = 4 * N * N * D * heads, rate = work / model_seconds(&h200, &attend, &what);
        CHECK(rate > 370e12 && rate < 615e12, "attend: %g TFLOP/s, bound by %s", rate * 1e-12, what);
        double dense_time = model_seconds(&wgmma, &dense, &what);
        CHECK(work / dense_time > 648e12 && work / dense_time < 990e12, "dense by wgmma: %g ms", dense_time * 1e3);
        double attend_time = model_seconds(&wgmma, &sparse, &what), target = D == 64 ? 430e12 : 580e12;
        rate = density * work / attend_time;
        CHECK(rate > target && rate < 990e12, "attend by wgmma: %g TFLOP/s, bound by %s", rate * 1e-12, what);
        double call = attend_time + model_seconds(&wgmma, &pool, &what) + model_seconds(&wgmma, &mask, &what) +
                      model_seconds(&wgmma, &score, &what);
        printf("  H200, wgmma, D %d, N 32768, density .15: %.0f TFLOP/s at best; the call %.2f x dense\n", D,
               rate * 1e-12, dense_time / call);
        CHECK(model_seconds(&h200, &pool, &what) < 0.5e-3 && !strcmp(what, "DRAM"), "pool is bound by %s", what);
        CHECK(model_seconds(&h200, &mask, &what) < 0.5e-3, "mask is bound by %s", what);
    }
}

static void test_deadlock_and_bounds()
{
    struct nothing {};
    emu::m.opt.quiet = true;
    bool went = emu::launch<nothing>([](nothing) { if (threadIdx.x < 64) psa__barrier(); }, {1, 1, 1}, 128, 64, {});
    CHECK(!went, "a barrier that half of the block does not reach");
    went = emu::launch<nothing>([](nothing) { psa__sts(threadIdx.x * 4, 1); }, {1, 1, 1}, 32, 64, {});
    CHECK(!went, "a store beyond shared memory");
    went = emu::launch<nothing>([](nothing) { psa__sts(threadIdx.x * 4 + 2, 1); }, {1, 1, 1}, 32, 256, {});
    CHECK(!went, "a store that is not aligned");
}

/* ---- the emulator's Hopper ---- */

/* A box of 8 rows x 64 columns is where psa__at's layout has it, and zero outside of the tensor; a row alone too. */
struct box_job {
    psa__map map[2];
    uint32_t bytes;   /* expected */
    uint32_t parity;  /* waited for */
    float *seen;      /* [16][64] */
    bool fence;       /* after the barrier was made */
};

static void box_kernel(box_job job)
{
    if (threadIdx.x == 0) psa__bar_init(4096, 1);
    if (job.fence) psa__fence_async();
    psa__bar_expect(4096, job.bytes);
    if (threadIdx.x == 0) {
        psa__box(1024, job.map[1], 4, 0, 0, 0, 4096);
        for (int r = 0; r < 8; r++) psa__box(2048 + (uint32_t)r * 128, job.map[0], r < 4 ? r : 10, 0, 0, 0, 4096);
    }
    psa__barrier();
    psa__bar_wait(4096, job.parity);
    for (int i = (int)threadIdx.x; i < 16 * 64; i += 32) {
        int r = i / 64, c = i % 64;
        uint32_t at = 1024 + (uint32_t)(r * 128 + (((c / 8) ^ (r % 8)) << 4) + c % 8 * 2);
        job.seen[i] = psa__lds<uint16_t>(at);
    }
}

static void test_boxes()
{
    buffer data(10 * 128), seen(16 * 64 * 4);
    const uint64_t size[5] = {64, 10, 1, 1, 1}, stride[4] = {128, 128, 1280, 1280};
    const uint32_t one[5] = {64, 1, 1, 1, 1}, eight[5] = {64, 8, 1, 1, 1};
    for (int i = 0; i < 640; i++) data.as<uint16_t>()[i] = (uint16_t)(i + 1);
    box_job job = {{}, 2048, 0, seen.as<float>(), true};
    CHECK(psa__make_map(&job.map[0], data.data(), size, stride, one), "a map of rows");
    CHECK(psa__make_map(&job.map[1], data.data(), size, stride, eight), "a map of 8 rows");
    const uint64_t odd[4] = {136, 128, 1280, 1280};
    psa__map bad;
    CHECK(!psa__make_map(&bad, data.data(), size, odd, one), "a stride that is no multiple of 16");
    auto right = [&] {
        int wrong = 0;
        for (int i = 0; i < 16 * 64; i++) {
            int row = i / 64 < 8 ? 4 + i / 64 : i / 64 < 12 ? i / 64 - 8 : 10;
            wrong += job.seen[i] != (row < 10 ? (float)(row * 64 + i % 64 + 1) : 0.0f);
        }
        return wrong == 0;
    };
    emu::m.opt.quiet = true;
    for (const emu::landing copies : {emu::LATE, emu::EARLY, emu::COIN}) {
        emu::m.opt.copies = copies;
        CHECK(emu::launch(box_kernel, {1, 1, 1}, 32, 8192, job) && right(), "boxes land elsewhere");
    }
    emu::m.opt.copies = emu::LATE;
    for (int off : {-1024, -16, 16}) { /* a phase that ends too early, and ones that never end */
        job.bytes = (uint32_t)(2048 + off);
        CHECK(!emu::launch(box_kernel, {1, 1, 1}, 32, 8192, job) || !right(), "expected %d bytes too many", off);
    }
    job.bytes = 2048;
    job.parity = 1;
    CHECK(!emu::launch(box_kernel, {1, 1, 1}, 32, 8192, job) || !right(), "a wait for the wrong phase");
    job.parity = 0;
    job.fence = false;
    CHECK(!emu::launch(box_kernel, {1, 1, 1}, 32, 8192, job), "a barrier without a fence");
    job.fence = true;
    job.map[1].span = 64;
    CHECK(emu::launch(box_kernel, {1, 1, 1}, 32, 8192, job) && !right(), "the swizzle of 64 bytes");
}

/* One wgmma of each kind, with operands that threads write: C = A B^T from shared memory, D = P V. */
struct wgmma_job {
    bool fence, ready, touch; /* fences are there; a register of P is written before the wait */
    uint32_t stride;          /* from 8 rows to the next */
    float *seen;              /* [64][128], [64][64] */
};

static float wgmma_a(int i, int k) { return (float)((i * 7 + k * 3) % 11 - 5); }
static float wgmma_b(int j, int k) { return (float)((j * 5 + k * 2) % 13 - 6); }

static void wgmma_kernel(wgmma_job job)
{
    int thread = (int)threadIdx.x, lane = thread % 32, row0 = thread / 32 * 16 + lane / 4;
    float s[16][4], o[8][4] = {};
    uint32_t p[4];
    for (int i = thread; i < 192 * 16; i += 128) { /* A [64][64], B [128][64], columns 32..47 of which are used */
        int r = i / 16, k = i % 16, c = 4 + k / 8;
        float x = r < 64 ? wgmma_a(r, k) : wgmma_b(r - 64, k);
        psa__sts((uint32_t)(r * 128 + ((c ^ r % 8) << 4) + k % 8 * 2), psa__from_float(psa__bf16(), x));
    }
    for (int i = thread; i < 16 * 64; i += 128) { /* V [16][64]: V[k][j] is B[j][k] */
        int k = i / 64, j = i % 64;
        psa__sts((uint32_t)(24576 + k * 128 + (((j / 8) ^ k % 8) << 4) + j % 8 * 2),
                 psa__from_float(psa__bf16(), wgmma_b(j, k)));
    }
    for (int i = 0; i < 4; i++) {
        int k = lane % 4 * 2 + i / 2 * 8;
        p[i] = psa__pack(psa__bf16(), wgmma_a(row0 + i % 2 * 8, k), wgmma_a(row0 + i % 2 * 8, k + 1));
    }
    if (job.fence) psa__fence_async();
    psa__barrier();
    if (job.ready) psa__wgmma_fence();
    psa__wgmma(psa__bf16(), s, psa__descriptor(64, 0, 1024), psa__descriptor(8192 + 64, 0, job.stride), false);
    psa__wgmma(psa__bf16(), o, p, psa__descriptor(24576, 0, 1024));
    psa__wgmma_commit();
    if (job.touch) p[1] = 0;
    psa__wgmma_wait<0>(o);
    for (int i = 0; i < 64; i++) {
        job.seen[(row0 + i % 4 / 2 * 8) * 128 + i / 4 * 8 + lane % 4 * 2 + i % 2] = s[i / 4][i % 4];
    }
    for (int i = 0; i < 32; i++) {
        job.seen[64 * 128 + (row0 + i % 4 / 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2] = o[i / 4][i % 4];
    }
}

static void test_wgmma()
{
    buffer seen(64 * 192 * 4);
    emu::m.opt.quiet = true;
    auto right = [&](wgmma_job job) {
        int wrong = 0;
        job.seen = seen.as<float>();
        if (!emu::launch(wgmma_kernel, {1, 1, 1}, 128, 32768, job)) return false;
        for (int i = 0; i < 64; i++) {
            for (int j = 0; j < 128; j++) {
                float want = 0;
                for (int k = 0; k < 16; k++) want += wgmma_a(i, k) * wgmma_b(j, k);
                wrong += job.seen[i * 128 + j] != want;
                wrong += j < 64 && job.seen[64 * 128 + i * 64 + j] != want;
            }
        }
        return wrong == 0;
    };
    for (const emu::landing copies : {emu::EARLY, emu::LATE}) {
        emu::m.opt.copies = copies;
        CHECK(right({true, true, false, 1024, nullptr}), "a product is wrong");
        CHECK(!right({false, true, false, 1024, nullptr}), "no fence after writing an operand");
        CHECK(!right({true, false, false, 1024, nullptr}), "no fence before the first wgmma");
        CHECK(!right({true, true, false, 2048, nullptr}), "a descriptor with the wrong stride");
    }
    CHECK(!right({true, true, true, 1024, nullptr}), "a register that changes before the wait");
}

/* 384 threads begin with 168 registers each. */
template <int FEWER, int MORE> static void registers_kernel(int)
{
    if (threadIdx.x >= 256) psa__fewer_registers<FEWER>();
    else psa__more_registers<MORE>();
}

/* One warp waits for the other at each of 3 steps, which it thinks are `more` more: as a row that is empty for one. */
static void trips_kernel(int more)
{
    if (threadIdx.x == 0) {
        psa__bar_init(0, 1);
        psa__bar_init(8, 1);
    }
    psa__barrier();
    for (uint32_t i = 0; i < (uint32_t)(threadIdx.x < 32 ? 3 + more : 3); i++) {
        if (threadIdx.x < 32) psa__bar_wait(0, i & 1);
        else psa__bar_arrive(0);
        if (threadIdx.x < 32) psa__bar_arrive(8);
        else psa__bar_wait(8, i & 1);
    }
}

static void test_registers_and_trips()
{
    emu::m.opt.quiet = true;
    CHECK(emu::launch(registers_kernel<40, 232>, {1, 1, 1}, 384, 64, 0), "40 and 232 registers are 65536 together");
    CHECK(!emu::launch(registers_kernel<40, 240>, {1, 1, 1}, 384, 64, 0), "40 and 240 registers are too many");
    CHECK(emu::launch(trips_kernel, {1, 1, 1}, 64, 64, 0), "two warps that agree");
    CHECK(!emu::launch(trips_kernel, {1, 1, 1}, 64, 64, 1), "a warp that waits once more than the other arrives");
    CHECK(!emu::launch(trips_kernel, {1, 1, 1}, 64, 64, -1), "a warp that the other waits for once more");
    CHECK(!emu::launch(trips_kernel, {1, 1, 1}, 64, 64, -3), "a warp that thinks there is nothing to do");
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)();
    } tests[] = {
        {"emulator/wavefronts", test_wavefronts_are_counted}, {"emulator/deadlock", test_deadlock_and_bounds},
        {"emulator/boxes", test_boxes},                       {"emulator/wgmma", test_wgmma},
        {"emulator/registers", test_registers_and_trips},
        {"attend/sizes", test_attend_sizes},                  {"attend/random", test_attend_random},
        {"attend/dense", test_attend_dense},                  {"attend/split", test_attend_split},
        {"attend/nothing", test_attend_nothing},              {"attend/sections", test_attend_sections},
        {"attend/nan", test_nan_stays_in_its_row},            {"attend/odd-v", test_odd_values_behind_the_diagonal},
        {"score/random", test_score_random},                  {"score/two-passes", test_score_two_passes},
        {"mask/random", test_mask_random},                    {"mask/sizes", test_mask_sizes},
        {"call/random", test_one_call},                       {"call/merge", test_merge},
        {"call/errors", test_errors},
        {"hopper/sizes", test_attend_sizes},                  {"hopper/random", test_attend_random},
        {"hopper/dense", test_attend_dense},                  {"hopper/nothing", test_attend_nothing},
        {"hopper/nan", test_nan_stays_in_its_row},            {"hopper/odd-v", test_odd_values_behind_the_diagonal},
        {"hopper/call", test_one_call},                       {"hopper/same-bits", test_same_bits_under_every_schedule},
        {"hopper/barriers", test_every_barrier_is_needed},    {"hopper/conflicts", test_no_bank_conflicts},
        {"hopper/counts", test_model},
        {"hopper/ctas", test_attend_ctas},                    {"hopper/sections", test_attend_sections},
        {"schedule/same-bits", test_same_bits_under_every_schedule},
        {"schedule/barriers", test_every_barrier_is_needed},  {"schedule/conflicts", test_no_bank_conflicts},
        {"schedule/shared", test_shared_memory},
        {"model/counts", test_model},                         {"model/times", test_model_times},
    };
    std::string filter;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--filter")) filter = argv[i + 1];
        else if (!strcmp(argv[i], "--rounds")) rounds = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--seed")) seed = strtoull(argv[i + 1], nullptr, 10);
        else return fprintf(stderr, "usage: test_cuda [--filter TEXT] [--rounds N] [--seed N]\n"), 2;
    }
    for (auto &t : tests) {
        if (!strstr(t.name, filter.c_str())) continue;
        clock_t start = clock();
        int before = failures;
        current = t.name;
        state = seed;
        hopper = !strncmp(t.name, "hopper", 6);
        setenv("PSA_SM90", hopper ? "1" : "0", 1);
        emu::m.opt = on_this_gpu(emu::options());
        emu::m.most_threads = 0;
        t.run();
        if (strncmp(t.name, "emulator", 8)) {
            CHECK(hopper == (emu::m.most_threads > 128), "blocks had %d threads", emu::m.most_threads);
        }
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        printf("%-24s %s %5.1f s\n", t.name, failures == before ? "ok" : "FAILED", seconds);
        fflush(stdout);
    }
    printf("%d passed, %d failed\n", checks - failures, failures);
    return failures != 0;
}
