/* test.h - the test framework, the tensors of the tests and how they are compared. Definitions are in test_util.c. */
#ifndef TEST_H
#define TEST_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "oracle.h"
#include "psa.h"

/* ---- framework ----------------------------------------------------------------------------------------------------
 */

typedef struct test_case {
    const char *name; /* "subject/what"; NULL ends a table */
    void (*run)(void);
} test_case;

extern const test_case tests_oracle[], tests_golden[], tests_attend[], tests_score[], tests_mask[], tests_order[];
extern const test_case tests_convert[], tests_errors[], tests_threads[], tests_preset[], tests_leaves[];
extern const test_case tests_tree[], tests_recipe[];

typedef struct test_options {
    int quick;        /* a tenth of the random rounds */
    int verbose;      /* print the errors that were measured */
    const char *data; /* folder of the golden files */
    uint64_t seed;
} test_options;

extern test_options test_opt;

#if defined(__GNUC__)
#define TEST_PRINTF(text, first) __attribute__((format(printf, text, first)))
#else
#define TEST_PRINTF(text, first)
#endif

/* Counts a check; a failed one prints file, line, expression and the values. Returns ok. */
int test_check(int ok, const char *file, int line, const char *expression, const char *format, ...) TEST_PRINTF(5, 6);

#define CHECK(ok, ...) test_check((ok) ? 1 : 0, __FILE__, __LINE__, #ok, __VA_ARGS__)

/* Checks the result of a call of the library. Returns whether it was the expected one. */
int test_result(psa_result got, psa_result want, const char *file, int line, const char *call);

#define CHECK_RESULT(call, want) test_result((call), (want), __FILE__, __LINE__, #call)

/* How often a loop of random cases runs: n, or a tenth of it with --quick. */
int test_rounds(int n);

/* ---- random numbers: every round of every test has its own seed, printed when it fails -----------------------------
 */

void rnd_round(int round);
uint64_t rnd_u64(void);
int rnd_int(int low, int high); /* both ends included */
int rnd_chance(int percent);
double rnd_uniform(void); /* [0,1) */
double rnd_normal(void);

/* ---- memory -------------------------------------------------------------------------------------------------------
 */

void *xmalloc(size_t size);

/* Memory with guard bytes on both sides, filled with a poison pattern, `shift` bytes off alignment. */
typedef struct guarded {
    unsigned char *base;
    size_t size, shift;
} guarded;

guarded guarded_new(size_t size, size_t shift);
void *guarded_data(const guarded *g);
int guarded_intact(const guarded *g);    /* the guards are whole */
int guarded_untouched(const guarded *g); /* nor was anything written between them */
void guarded_free(guarded *g);

/* ---- element types: the tests' own conversions
 * ----------------------------------------------------------------------- */

double value_round(psa_type type, double x);         /* nearest value of the type, ties to even */
void value_store(psa_type type, void *at, double x); /* rounds */
double value_load(psa_type type, const void *at);

/* ---- tensors --------------------------------------------------------------------------------------------------------
 */

typedef enum layout {
    LAYOUT_PLAIN = 0, /* contiguous and aligned */
    LAYOUT_RANDOM     /* random order of the outer axes, gaps between rows, unaligned data */
} layout;

typedef struct tensor {
    psa_tensor t;
    double *x;             /* inputs: the values, contiguous [B][H][N][D] */
    unsigned char *memory; /* outputs are poisoned, and nothing but elements may be written */
    size_t size, start;
} tensor;

/* Normally distributed values of the given spread. The data ends where its allocation ends. */
tensor tensor_input(psa_type type, layout layout, int64_t D, int64_t N, int64_t H, int64_t B, double spread);
/* The same with given values, [B][H][N][D]; they are rounded to the type. */
tensor tensor_from(psa_type type, layout layout, int64_t D, int64_t N, int64_t H, int64_t B, const double *values);
tensor tensor_output(psa_type type, layout layout, int64_t D, int64_t N, int64_t H, int64_t B);
void tensor_free(tensor *a);
int64_t tensor_count(const psa_tensor *t);
void *tensor_at(const psa_tensor *t, int64_t d, int64_t n, int64_t h, int64_t b);
void tensor_set(tensor *a, int64_t d, int64_t n, int64_t h, int64_t b, double value); /* data and x */
double *tensor_values(const psa_tensor *t); /* contiguous [B][H][N][D], caller frees */
int tensor_guards_intact(const tensor *a);  /* no byte outside the elements was written */
int tensor_untouched(const tensor *a);      /* no byte at all was written */

/* ---- comparisons
 * ----------------------------------------------------------------------------------------------------- */

/* What an output of this type may differ from the exact value: f32 arithmetic, then rounding to the type. */
typedef struct tolerance {
    double absolute, relative;
} tolerance;

tolerance tolerance_of(psa_type type);

/* Checks |got - want| <= absolute + relative*|want| everywhere; equal infinities pass. Returns the largest error. */
double compare(const char *file, int line, const char *what, const double *got, const double *want, int64_t n,
               tolerance t);

#define COMPARE(what, got, want, n, t) compare(__FILE__, __LINE__, what, got, want, n, t)

double *doubles_of(const float *x, size_t n); /* caller frees */

/* ---- orders ------------------------------------------------------------------------------------------------------ */

int is_permutation(const int32_t *index, int64_t n);
int64_t order_at(const psa_order *order, int64_t b, int64_t h, int64_t p);
/* x [B][H][N][D] permuted (or put back) into a new array. */
double *permuted(const double *x, const psa_order *order, int64_t B, int64_t H, int64_t N, int64_t D, int back);

/* ---- one attention call with everything around it ---------------------------------------------------------------- */

typedef struct shape {
    int64_t B, Hq, Hkv, Nq, Nk, D, Dv;
    psa_type type_q, type_kv, type_out;
    layout layout;
    double spread; /* of q and k; 0: 1 */
} shape;

typedef struct setup {
    psa_desc desc;
    psa_plan plan;
    tensor q, k, v, out;
    guarded work, scores, levels, lse;
    oracle o;
} setup;

shape shape_random(void);                    /* small; D and Dv any multiple of 8, mostly small */
psa_desc desc_random_blocks(const shape *s); /* blocks, scale, causality */
/* Trees, tilt, mask ERROR and density, in any company; no causality. */
void desc_random_recipe(psa_desc *d);
psa_isa isa_random(void);                    /* one that this machine has */

/* What an output of this type may differ from the oracle's. Weighted means are computed in f32: of those that are kept
 * in 16 bits, one in a few thousand lies so near the middle of two numbers that it is rounded the other way, which
 * moves it by up to 1/2048 (f16) or 1/256 (bf16) of itself. */
tolerance setup_tolerance(const setup *s, psa_type type);

/* Tensors, plan, workspace, maps and oracle. Returns 0 (after a failed check) if the plan was refused. */
int setup_init(setup *s, const psa_desc *desc, const shape *shape);
void setup_free(setup *s);
void setup_poison_outputs(setup *s);
float *setup_scores(const setup *s);
uint8_t *setup_levels(const setup *s);
float *setup_lse(const setup *s);

/* The stages, each for all ith one after the other. */
int run_prepare(setup *s, int nth);
int run_pool(setup *s, int nth);
int run_score(setup *s, int nth);
int run_budget(setup *s, int nth);
int run_mask(setup *s, int nth);
void run_levels(setup *s, int nth); /* all of these */
int run_attend(setup *s, const uint8_t *levels, int nth);
void check_guards(const char *file, int line, const setup *s);

#define CHECK_GUARDS(s) check_guards(__FILE__, __LINE__, s)

/* Compares out and lse of the setup with the oracle for these levels (NULL: dense). Returns the largest error of out.
 */
double check_attention(const char *file, int line, setup *s, const uint8_t *levels);

#define CHECK_ATTENTION(s, levels) check_attention(__FILE__, __LINE__, s, levels)

/* Compares the score map of the setup with the oracle, for the plan's own sampled offsets. */
void check_scores(const char *file, int line, const setup *s);

#define CHECK_SCORES(s) check_scores(__FILE__, __LINE__, s)

/* A map with random levels up to `coarsest`; about `skip` percent of 0. [B][Hq][nq][nk] of the plan. */
void random_levels(const psa_plan *plan, int coarsest, int skip, uint8_t *levels);

/* Pools and attends by such a map, and compares with the oracle. */
void check_random_levels(const char *file, int line, setup *s, int skip);

#define CHECK_RANDOM_LEVELS(s, skip) check_random_levels(__FILE__, __LINE__, s, skip)

#endif
