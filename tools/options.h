/* options.h - options of the psa command and of the classifier: one table that parses them and writes the usage text.
 * Include after psa.h. Everything is static. */
#ifndef OPTIONS_H
#define OPTIONS_H

#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CMD_ATTEND = 1, CMD_SCORE = 2, CMD_MASK = 4, CMD_ORDER = 8, CMD_BENCH = 16, CMD_CLASSIFY = 32 };

enum { BENCH_CASES = 16 };

/* --order: the library's kinds, and the trees that it finds itself. */
enum { ORDER_TREE = PSA_ORDER_HYBRID + 1, ORDER_TREE_KV };

/* A command that takes options. */
typedef struct syntax {
    const char *name;         /* "psa attend": what errors begin with */
    unsigned command;         /* its bit in the table */
    const struct option *own; /* its own rows, into a struct that begins with options; they go first */
    int n_own;
} syntax;

typedef struct options {
    const syntax *syntax;
    const char **words; /* the caller's, one for each argument: those that are no options; NULL: there must be none */
    int n_words, help;
    psa_desc desc;
    int preset; /* index, -1: none */
    const char *q, *k, *v, *out, *lse, *levels, *scores, *save_scores, *save_levels, *stats, *png;
    int order, grid[3], tile[3], n_grid, n_tile, clusters;
    int threads, type, backend, report, compare, json; /* type -1: that of q */
    double sample, density;
    unsigned topics;                                     /* a bit for each, 0: all */
    int n[BENCH_CASES], d[BENCH_CASES], n_n, n_d, heads; /* 0: the topic's, like density */
} options;

static int fail(const options *o, const char *format, ...)
#if defined(__GNUC__) || defined(__clang__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

/* One line on stderr; the exit status for bad input. */
static int fail(const options *o, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s: ", o->syntax->name);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    return 2;
}

/* What a plan makes of an instruction set: AMX has tiles for f16 and bf16, NEON_BF16 instructions for bf16. */
static inline psa_isa isa_of(psa_isa isa, int type) {
    if (isa == PSA_ISA_AMX && type == PSA_F32)
        return PSA_ISA_AVX512;
    return isa == PSA_ISA_NEON_BF16 && type != PSA_BF16 ? PSA_ISA_NEON : isa;
}

/* ---- names: the i-th one, NULL past the end ---- */

static const char *nth_name(const char *const *names, int n, int i) {
    return i >= 0 && i < n ? names[i] : NULL;
}
static const char *type_name(int i) {
    static const char *const names[] = {"f32", "f16", "bf16"};
    return nth_name(names, 3, i);
}
static const char *score_name(int i) {
    static const char *const names[] = {"sample", "antidiagonal", "pooled", "exact"};
    return nth_name(names, 4, i);
}
static const char *mask_name(int i) {
    static const char *const names[] = {"topk", "threshold", "dense", "error"};
    return nth_name(names, 4, i);
}
static const char *order_name(int i) {
    static const char *const names[] = {"none", "gilbert", "tile", "semantic", "hybrid", "tree", "tree_kv"};
    return nth_name(names, 7, i);
}
static const char *metric_name(int i) {
    static const char *const names[] = {"logit", "euclid"};
    return nth_name(names, 2, i);
}
static const char *budget_name(int i) {
    static const char *const names[] = {"call", "head"};
    return nth_name(names, 2, i);
}
enum { BACKEND_CPU, BACKEND_CUDA, BACKEND_MODEL };
static const char *bench_backend_name(int i) {
    static const char *const names[] = {"cpu", "cuda", "model"};
    return nth_name(names, 3, i);
}
static const char *backend_name(int i) {
    return i < BACKEND_MODEL ? bench_backend_name(i) : NULL;
}
static const char *topic_name(int i) {
    static const char *const names[] = {"dense",  "call",      "recipe",  "density", "decode",
                                        "linear", "head-size", "threads", "memory"};
    return nth_name(names, 9, i);
}
static const char *isa_name(int i) {
    return i < PSA_ISA_END ? psa_isa_name((psa_isa)i) : NULL;
}

/* ---- the table ---- */

typedef enum option_kind {
    FLAG, FILE_NAME, NAME, NAME_SET, INTEGER, TOKENS, SEED, REAL, SCALE, INTEGERS, REALS
} option_kind;

typedef struct option {
    const char *name, *value, *help; /* value: what the usage calls it, NULL for a flag */
    unsigned commands;
    option_kind kind;
    size_t at, at_count; /* offsets into options; a list stores its length if at_count is not 0 */
    double least, most;
    int least_n, most_n; /* of a list */
    const char *(*names)(int);
} option;

#define AT(field) offsetof(options, field)
#define NUMBER(least, most) 0, least, most, 0, 0, NULL
#define LIST(count, least, most, least_n, most_n) count, least, most, least_n, most_n, NULL
#define NAMES(fn) 0, 0, 0, 0, 0, fn
#define PLAIN 0, 0, 0, 0, 0, NULL
#define TENSORS (CMD_ATTEND | CMD_SCORE)
#define SCORING (CMD_ATTEND | CMD_SCORE | CMD_CLASSIFY)
#define MASKING (CMD_ATTEND | CMD_MASK | CMD_CLASSIFY)
#define BLOCKS (CMD_ATTEND | CMD_SCORE | CMD_MASK | CMD_CLASSIFY)

static const option option_table[] = {
    {"--q", "FILE", "queries [B,Hq,N,D]: float32, float16, or bfloat16 as uint16", TENSORS, FILE_NAME, AT(q), PLAIN},
    {"--k", "FILE", "keys [B,Hkv,Nk,D]", TENSORS, FILE_NAME, AT(k), PLAIN},
    {"--v", "FILE", "values [B,Hkv,Nk,Dv]", CMD_ATTEND, FILE_NAME, AT(v), PLAIN},
    {"--scores", "FILE", "score map, float32 [B,Hq,nq,nk]; rows need not sum to 1", CMD_MASK, FILE_NAME, AT(scores),
     PLAIN},
    {"--k", "FILE", "keys [B,Hkv,Nk,D], for --sim-min", CMD_MASK, FILE_NAME, AT(k), PLAIN},
    {"--out", "FILE", "the result", CMD_ATTEND | CMD_SCORE | CMD_MASK | CMD_ORDER, FILE_NAME, AT(out), PLAIN},
    {"--lse", "FILE", "also write log-sum-exp of every row, float32 [B,Hq,N]", CMD_ATTEND, FILE_NAME, AT(lse), PLAIN},
    {"--levels", "FILE", "bring your own level map, uint8 or int32 [B,Hq,nq,nk], in place of score and mask",
     CMD_ATTEND, FILE_NAME, AT(levels), PLAIN},
    {"--preset", "NAME", "settings of a published model (psa info); other options override them",
     CMD_ATTEND | CMD_CLASSIFY, NAME, AT(preset), NAMES(psa_preset_name)},
    {"--block-q", "N", "query rows in a block, 16 to 256; default 128", BLOCKS, INTEGER, AT(desc.block_q),
     NUMBER(1, INT_MAX)},
    {"--block-k", "N", "keys in a block, 16, 32, 64 or 128; default 64", BLOCKS | CMD_BENCH, INTEGER, AT(desc.block_k),
     NUMBER(1, INT_MAX)},
    {"--causal", NULL, "query i sees key j iff j <= i + (Nk - Nq)", TENSORS | CMD_MASK, FLAG, AT(desc.causal), PLAIN},
    {"--scale", "F", "logit = F * q.k; default 1/sqrt(D)", TENSORS, SCALE, AT(desc.scale), NUMBER(-1e30, 1e30)},
    {"--score", "NAME", "sample, antidiagonal, pooled or exact; default sample", SCORING, NAME, AT(desc.score),
     NAMES(score_name)},
    {"--sample", "F", "sample: share of the tokens of each block, up to 1; default 0.25", SCORING, REAL, AT(sample),
     NUMBER(DBL_MIN, 1)},
    {"--score-norm", NULL, "sample: divide by the row's softmax denominator", SCORING, FLAG, AT(desc.score_norm),
     PLAIN},
    {"--stride", "N", "antidiagonal: tokens in a group; default 8", SCORING, INTEGER, AT(desc.stride),
     NUMBER(1, INT_MAX)},
    {"--score-group", "Q,K", "pooled: queries and keys in a group; default the whole block, 8,8 for mask error",
     SCORING, INTEGERS, AT(desc.score_group), LIST(0, 1, PSA_MAX_BLOCK_Q, 2, 2)},
    {"--seed", "N", "sample: of the sampled offsets", SCORING, SEED, AT(desc.seed), PLAIN},
    {"--mask", "NAME", "topk, threshold, dense or error (least predicted error); default topk", MASKING, NAME,
     AT(desc.mask), NAMES(mask_name)},
    {"--density", "F", "share of dense attention's multiply-adds that the mask is to cost; default: as the levels say",
     MASKING, REAL, AT(desc.density), NUMBER(DBL_MIN, 1)},
    {"--budget", "NAME", "call or head: whose density; default call", MASKING, NAME, AT(desc.density_per_head),
     NAMES(budget_name)},
    {"--lambda", "F", "mask error: price of a whole block in squared error, in place of --density",
     CMD_ATTEND | CMD_CLASSIFY, REAL, AT(desc.lambda), NUMBER(DBL_MIN, 1e30)},
    {"--tilt", NULL, "pool around the mean query", SCORING, FLAG, AT(desc.tilt), PLAIN},
    {"--inclusive", NULL, "threshold: count the block's own mass too", MASKING, FLAG, AT(desc.inclusive), PLAIN},
    {"--level-end", "F,F,...",
     "cumulative ends of levels 1, 2, 4, ...: shares (topk) or score mass (threshold), not all 0", MASKING, REALS,
     AT(desc.level_end), LIST(0, 0, 1, 1, PSA_MAX_LEVELS)},
    {"--level-count", "N,N,...", "topk: number of blocks at levels 1, 2, 4, ..., in place of shares, not all 0",
     MASKING, INTEGERS, AT(desc.level_count), LIST(0, 0, INT_MAX, 1, PSA_MAX_LEVELS)},
    {"--min-full", "F", "threshold: at least floor(F*n)+1 of n blocks are level 1", MASKING, REAL, AT(desc.min_full),
     NUMBER(0, 1)},
    {"--sim-min", "F,F,...", "mean cosine inside a block that levels 2, 4, ... must exceed", MASKING, REALS,
     AT(desc.sim_min), LIST(AT(desc.n_sim_min), -DBL_MAX, DBL_MAX, 1, PSA_MAX_LEVELS - 1)},
    {"--prefix", "N", "first tokens that stay at level 1 and in place (text)", CMD_ATTEND | CMD_MASK, TOKENS,
     AT(desc.n_prefix), NUMBER(0, 9e15)},
    {"--suffix", "N", "last tokens, likewise", CMD_ATTEND | CMD_MASK, TOKENS, AT(desc.n_suffix), NUMBER(0, 9e15)},
    {"--sink", NULL, "the first KV block is level 1 for everyone", MASKING, FLAG, AT(desc.sink), PLAIN},
    {"--diagonal", NULL, "a query block's own KV blocks are level 1", MASKING, FLAG, AT(desc.diagonal), PLAIN},
    {"--skip-mean", NULL, "a skipped block is read as one mean token", MASKING, FLAG, AT(desc.skip_mean), PLAIN},
    {"--order", "NAME",
     "none, gilbert, tile, semantic, hybrid (gilbert q, semantic k), tree, tree_kv (--grid: gilbert q); default none",
     CMD_ATTEND, NAME, AT(order), NAMES(order_name)},
    {"--metric", "NAME", "of trees: logit or euclid; default logit", CMD_ATTEND | CMD_CLASSIFY, NAME,
     AT(desc.metric), NAMES(metric_name)},
    {"--order", "NAME", "gilbert or tile", CMD_ORDER, NAME, AT(order), NAMES(order_name)},
    {"--grid", "T,H,W", "video tokens, w fastest; prefix + T*H*W + suffix must be N", CMD_ATTEND, INTEGERS, AT(grid),
     LIST(AT(n_grid), 1, INT_MAX, 3, 3)},
    {"--grid", "T,H,W", "video tokens, w fastest", CMD_ORDER, INTEGERS, AT(grid), LIST(AT(n_grid), 1, INT_MAX, 3, 3)},
    {"--tile", "T,H,W", "order tile: tokens in a tile; default 2,8,8", CMD_ATTEND | CMD_ORDER, INTEGERS, AT(tile),
     LIST(AT(n_tile), 1, INT_MAX, 3, 3)},
    {"--clusters", "N", "order semantic and hybrid: k-means clusters; default 64", CMD_ATTEND, INTEGER, AT(clusters),
     NUMBER(1, INT_MAX)},
    {"--topic", "NAME,...", "dense, call, recipe, density, decode, linear, head-size, threads or memory; default all",
     CMD_BENCH, NAME_SET, AT(topics), NAMES(topic_name)},
    {"--n", "N,...", "tokens; default 4096, of some topics others too", CMD_BENCH, INTEGERS, AT(n),
     LIST(AT(n_n), 1, 1 << 24, 1, BENCH_CASES)},
    {"--d", "D,...", "head sizes; default 64 or 128 or both; head-size: 32 to 256 by 16", CMD_BENCH, INTEGERS, AT(d),
     LIST(AT(n_d), 8, PSA_MAX_D, 1, BENCH_CASES)},
    {"--heads", "N", "default 4; decode: 8, linear: 1, GPUs: 16", CMD_BENCH, INTEGER, AT(heads), NUMBER(1, 4096)},
    {"--density", "F", "share of dense attention's multiply-adds, up to 1; default 0.15; density: 0.05 to 0.5",
     CMD_BENCH, REAL, AT(density), NUMBER(DBL_MIN, 1)},
    {"--threads", "N", "default: all processors", BLOCKS | CMD_BENCH, INTEGER, AT(threads), NUMBER(1, 4096)},
    {"--isa", "NAME", "instruction set (psa info); default auto", BLOCKS | CMD_BENCH, NAME, AT(desc.isa),
     NAMES(isa_name)},
    {"--type", "NAME", "f32, f16 or bf16: convert the inputs first, and write this type; default: that of each file",
     CMD_ATTEND, NAME, AT(type), NAMES(type_name)},
    {"--type", "NAME", "f32, f16 or bf16; default f32; dense, decode, memory: all", CMD_BENCH, NAME, AT(type),
     NAMES(type_name)},
    {"--backend", "NAME", "where attention runs: cpu or cuda; default cpu", CMD_ATTEND | CMD_CLASSIFY, NAME,
     AT(backend), NAMES(backend_name)},
    {"--backend", "NAME", "cpu, cuda, or model: what some GPUs need at best, by counting; default cpu", CMD_BENCH, NAME,
     AT(backend), NAMES(bench_backend_name)},
    {"--save-scores", "FILE", "float32 [B,Hq,nq,nk]", CMD_ATTEND, FILE_NAME, AT(save_scores), PLAIN},
    {"--save-levels", "FILE", "uint8 [B,Hq,nq,nk]", CMD_ATTEND, FILE_NAME, AT(save_levels), PLAIN},
    {"--stats", "FILE", "density, work and time as JSON", CMD_ATTEND, FILE_NAME, AT(stats), PLAIN},
    {"--png", "FILE", "picture of every head's level map", CMD_ATTEND, FILE_NAME, AT(png), PLAIN},
    {"--report", NULL, "mask error: error of every head, predicted and for some queries, with --compare for all",
     CMD_ATTEND, FLAG, AT(report), PLAIN},
    {"--compare", NULL, "also run dense attention; print both side by side", CMD_ATTEND | CMD_CLASSIFY, FLAG,
     AT(compare), PLAIN},
    {"--json", NULL, "print the results as JSON", CMD_BENCH | CMD_CLASSIFY, FLAG, AT(json), PLAIN},
};
enum { OPTION_COUNT = sizeof option_table / sizeof *option_table };

/* The i-th row that the command takes, NULL past the end. */
static const option *option_row(const syntax *s, int i) {
    if (i < s->n_own)
        return &s->own[i];
    i -= s->n_own;
    for (int row = 0; row < OPTION_COUNT; row++)
        if (option_table[row].commands & s->command && i-- == 0)
            return &option_table[row];
    return NULL;
}

static void print_options(const syntax *s) {
    const option *p;
    for (int i = 0; (p = option_row(s, i)); i++) {
        char left[64];
        snprintf(left, sizeof left, "%s %s", p->name, p->value ? p->value : "");
        printf("  %-22s %s\n", left, p->help);
    }
}

/* ---- values: 0, or -1 if the text is not one ---- */

static int parse_integer(const char *text, double least, double most, int64_t *value) {
    char *end;
    if (*text != '-' && (*text < '0' || *text > '9'))
        return -1;
    errno = 0;
    *value = strtoll(text, &end, 10);
    return errno || end == text || *end || (double)*value < least || (double)*value > most ? -1 : 0;
}

static int parse_seed(const char *text, uint64_t *value) {
    char *end;
    if (*text < '0' || *text > '9')
        return -1;
    errno = 0;
    *value = strtoull(text, &end, 10);
    return errno || *end ? -1 : 0;
}

static int parse_real(const char *text, double least, double most, double *value) {
    char *end;
    *value = strtod(text, &end);
    if (text[strspn(text, "0123456789.eE+-")] || *text == '+') /* spaces, nan, inf, 0x10 */
        return -1;
    return end == text || *end || !isfinite(*value) || *value < least || *value > most ? -1 : 0;
}

/* A list replaces all entries of its array: those it does not give become 0. Where 0 is allowed, all of them 0 is not:
 * the library would take it for the default. */
static int parse_list(const option *p, const char *text, options *o) {
    char part[64];
    int n = 0, some = p->least != 0;
    char *array = (char *)o + p->at;
    memset(array, 0, (size_t)p->most_n * (p->kind == REALS ? sizeof(double) : sizeof(int)));
    for (const char *end; text; text = end ? end + 1 : NULL, n++) {
        end = strchr(text, ',');
        size_t size = end ? (size_t)(end - text) : strlen(text);
        int64_t integer = 0;
        double real = 0;
        if (n == p->most_n || size >= sizeof part)
            return -1;
        memcpy(part, text, size);
        part[size] = 0;
        if (p->kind == REALS ? parse_real(part, p->least, p->most, &real)
                             : parse_integer(part, p->least, p->most, &integer))
            return -1;
        if (p->kind == REALS)
            ((double *)(void *)array)[n] = real;
        else
            ((int *)(void *)array)[n] = (int)integer;
        some |= p->kind == REALS ? real != 0 : integer != 0;
    }
    if (p->at_count)
        memcpy((char *)o + p->at_count, &n, sizeof n);
    return n < p->least_n || !some ? -1 : 0;
}

static int parse_name(const option *p, const char *text, int *value) {
    for (int i = 0; p->names(i); i++)
        if (strcmp(text, p->names(i)) == 0) {
            *value = i;
            return 0;
        }
    return -1;
}

/* A bit for each name of the list. */
static int parse_name_set(const option *p, const char *text, unsigned *set) {
    char part[64];
    *set = 0;
    for (const char *end; text; text = end ? end + 1 : NULL) {
        int name;
        end = strchr(text, ',');
        size_t size = end ? (size_t)(end - text) : strlen(text);
        snprintf(part, sizeof part, "%.*s", (int)size, text);
        if (size >= sizeof part || parse_name(p, part, &name))
            return -1;
        *set |= 1u << name;
    }
    return 0;
}

static int parse_value(const option *p, const char *text, options *o) {
    void *at = (char *)o + p->at;
    int64_t integer;
    double real;
    int name;
    switch (p->kind) {
    case FLAG:
        *(int *)at = 1;
        return 0;
    case FILE_NAME:
        *(const char **)at = text;
        return *text ? 0 : -1;
    case NAME: /* into an int or an enum of its size */
        if (parse_name(p, text, &name))
            return -1;
        memcpy(at, &name, sizeof name);
        return 0;
    case NAME_SET:
        return parse_name_set(p, text, (unsigned *)at);
    case INTEGER:
        if (parse_integer(text, p->least, p->most, &integer))
            return -1;
        *(int *)at = (int)integer;
        return 0;
    case TOKENS:
        return parse_integer(text, p->least, p->most, (int64_t *)at);
    case SEED:
        return parse_seed(text, (uint64_t *)at);
    case REAL:
        return parse_real(text, p->least, p->most, (double *)at);
    case SCALE: /* 0 would mean the default */
        if (parse_real(text, p->least, p->most, &real) || (float)real == 0)
            return -1;
        *(float *)at = (float)real;
        return 0;
    case INTEGERS:
    case REALS:
        return parse_list(p, text, o);
    }
    return -1;
}

static int bad_value(const options *o, const option *p, const char *text) {
    char known[512] = "";
    if (p->names)
        for (int i = 0; p->names(i); i++) {
            size_t n = strlen(known);
            snprintf(known + n, sizeof known - n, "%s%s", i ? ", " : "", p->names(i));
        }
    if (p->names)
        return fail(o, "%s '%s': expected %s of %s", p->name, text, p->kind == NAME_SET ? "some" : "one", known);
    int whole = p->kind == INTEGER || p->kind == TOKENS || p->kind == SEED;
    int number = p->kind == REAL || p->kind == SCALE;
    const char *what = whole ? "a whole number" : number ? "a number" : p->value;
    return fail(o, "%s '%s': expected %s (%s)", p->name, text, what, p->help);
}

static int unknown_option(const options *o, const char *text) {
    const option *p;
    fprintf(stderr, "%s: unknown option '%s'; known:", o->syntax->name, text);
    for (int i = 0; (p = option_row(o->syntax, i)); i++)
        fprintf(stderr, " %s", p->name);
    fprintf(stderr, " --help\n");
    return 2;
}

static const option *find_option(const syntax *s, const char *text) {
    const option *p;
    for (int i = 0; (p = option_row(s, i)); i++)
        if (strcmp(p->name, text) == 0)
            return p;
    return NULL;
}

/* One pass over the arguments, on top of what *o holds. */
static int parse_arguments(options *o, int argc, char **argv) {
    o->n_words = 0;
    for (int i = 0; i < argc; i++) {
        const option *p = find_option(o->syntax, argv[i]);
        const char *text = NULL;
        if (o->words && strncmp(argv[i], "--", 2) != 0) {
            o->words[o->n_words++] = argv[i];
            continue;
        }
        if (strcmp(argv[i], "--help") == 0) {
            o->help = 1;
            return 0;
        }
        if (!p)
            return unknown_option(o, argv[i]);
        if (p->kind != FLAG) {
            if (++i == argc)
                return fail(o, "%s needs a value: %s (%s)", p->name, p->value, p->help);
            text = argv[i];
        }
        if (parse_value(p, text, o))
            return bad_value(o, p, text);
    }
    return 0;
}

static void option_defaults(options *o) {
    o->preset = o->type = -1;
    o->tile[0] = 2, o->tile[1] = o->tile[2] = 8;
    o->clusters = 64;
}

static int preset_order(const psa_preset *p, const psa_desc *d) {
    return d->tree ? (int)ORDER_TREE : (int)p->order;
}

/* *o is zero but for words. The preset is applied first wherever it stands, so that every other option overrides it. */
static int parse_options(options *o, const syntax *s, int argc, char **argv) {
    o->syntax = s;
    option_defaults(o);
    int rc = parse_arguments(o, argc, argv);
    if (rc != 0 || o->help)
        return rc;
    if (o->preset >= 0) {
        const char *preset = psa_preset_name(o->preset);
        psa_desc_preset(preset, &o->desc);
        o->order = preset_order(psa_preset_find(preset), &o->desc);
        parse_arguments(o, argc, argv);
    }
    o->desc.tree = o->order == ORDER_TREE ? PSA_TREE_QKV : o->order == ORDER_TREE_KV ? PSA_TREE_KV : PSA_TREE_NONE;
    if (o->sample > 0)
        o->desc.sample_q = o->desc.sample_k = o->sample;
    return 0;
}
#endif
