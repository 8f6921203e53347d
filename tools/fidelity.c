/* fidelity - how far sparse attention is from dense, over density, on real q, k and v: a table and a picture.
 *
 *     cc -std=c99 -O2 -I. tools/fidelity.c -o build/fidelity -lcjson -lm -pthread
 *     build/fidelity q_k_v_16x16x16.npy ... [options]        --help lists them
 *
 * A file holds q, k and v of one head [3,N,D] or of several [3,H,N,D]. Every cell is the relative L2 error of out, the
 * geometric mean over all heads; all methods meet the density of their column head by head. */
#define _POSIX_C_SOURCE 200809L
#define PSA_IMPLEMENTATION
#include "psa.h"

#include <cjson/cJSON.h>

#include "npy.h"
#include "options.h"
#include "run.h"
#include "draw.h"

enum { MOST_DENSITIES = 16 };

/* One KV head and the queries that read it. */
typedef struct unit {
    char name[128];
    int grid[3];
    psa_tensor q, k, v; /* B = 1, Hkv = 1 */
} unit;

typedef struct study {
    options o; /* first: the rows of options.h point into it */
    const char *only, *trees;
    int group;            /* --heads-per-kv */
    double sharpness, densities[MOST_DENSITIES];
    int n_densities;
    unit *units, *old;    /* old: of --trees */
    int n_units, n_old;
    npy *files;           /* what the units point into */
    int n_files;
    crew crew;
    double *cells;        /* [methods][densities][units] relative error, then the same of densities */
} study;

/* ---- methods ---------------------------------------------------------------------------------------------------- */

typedef struct method {
    const char *name;
    int gilbert_q, gilbert_k;
    psa_desc desc;
    const char *plot; /* its name in the picture, NULL: not there */
    unsigned char colour[3];
} method;

#define GILBERT .gilbert_q = 1, .gilbert_k = 1
#define GROUPS(q, k) .score = PSA_SCORE_POOLED, .score_group = {q, k}
#define POOLED GROUPS(8, 8)
#define BINARY .level_end = {.15}
#define ERRORS(q, k) GROUPS(q, k), .mask = PSA_MASK_ERROR, .tilt = 1
#define TREE .tree = PSA_TREE_QKV
#define EUCLID TREE, .metric = PSA_METRIC_EUCLID

/* Each of a part's rows changes one thing of a row above. */
static const method methods[] = {
    {"upstream-like: Gilbert, top-k, sampled maxima", GILBERT, {0}, "upstream-like", {214, 96, 77}},
    {"  divided by the denominator (score_norm)", GILBERT, {.score_norm = 1}, NULL, {0}},
    {"  exact mass (bound)", GILBERT, {.score = PSA_SCORE_EXACT}, NULL, {0}},
    {"  pooled 8x8", GILBERT, {POOLED}, NULL, {0}},
    {"    skip_mean", GILBERT, {POOLED, .skip_mean = 1}, NULL, {0}},
    {"      tilt", GILBERT, {POOLED, .skip_mean = 1, .tilt = 1}, NULL, {0}},
    {"      tilt, mask ERROR", GILBERT, {ERRORS(8, 8)}, "recipe without trees", {120, 120, 120}},
    {"binary, Gilbert, score_norm", GILBERT, {BINARY, .score_norm = 1}, NULL, {0}},
    {"binary, Gilbert, exact mass (bound)", GILBERT, {BINARY, .score = PSA_SCORE_EXACT}, "binary, exact scores",
     {67, 147, 195}},
    {"binary, tree, exact mass (bound)", 0, 0, {BINARY, TREE, .score = PSA_SCORE_EXACT}, "the same with trees",
     {146, 197, 222}},
    {"tree (Euclid), top-k, pooled 8x8", 0, 0, {EUCLID, POOLED}, NULL, {0}},
    {"  skip_mean", 0, 0, {EUCLID, POOLED, .skip_mean = 1}, NULL, {0}},
    {"    tilt", 0, 0, {EUCLID, POOLED, .skip_mean = 1, .tilt = 1}, NULL, {0}},
    {"    tilt, mask ERROR", 0, 0, {EUCLID, ERRORS(8, 8)}, NULL, {0}},
    {"tree (logit), top-k, pooled 8x8", 0, 0, {TREE, POOLED}, NULL, {0}},
    {"  skip_mean, tilt", 0, 0, {TREE, POOLED, .skip_mean = 1, .tilt = 1}, NULL, {0}},
    {"  tilt, mask ERROR", 0, 0, {TREE, ERRORS(8, 8)}, NULL, {0}},
    {"    groups of 16x8 (recipe)", 0, 0, {TREE, ERRORS(16, 8)}, "recipe", {27, 120, 55}},
    {"    skip_mean", 0, 0, {TREE, ERRORS(8, 8), .skip_mean = 1}, NULL, {0}},
    {"    no tilt", 0, 0, {TREE, POOLED, .mask = PSA_MASK_ERROR}, NULL, {0}},
    {"    groups of 32x16", 0, 0, {TREE, ERRORS(32, 16)}, NULL, {0}},
    {"    tree of keys alone, Gilbert queries", 1, 0, {.tree = PSA_TREE_KV, ERRORS(8, 8)}, NULL, {0}},
};
enum { METHODS = sizeof methods / sizeof *methods };

static int wanted(const study *s, const method *m) {
    return !s->only || strstr(m->name, s->only);
}

static double *cell(const study *s, int density, int m, int d, int u) {
    return s->cells + (((density * METHODS + m) * s->n_densities + d) * s->n_units + u);
}

/* ---- options ---------------------------------------------------------------------------------------------------- */

#define OWN(field) offsetof(study, field)

static const option own_options[] = {
    {"--q", "FILE", "queries [H,N,D], in place of files with all three", 0, FILE_NAME, OWN(o.q), PLAIN},
    {"--k", "FILE", "keys [Hkv,N,D]", 0, FILE_NAME, OWN(o.k), PLAIN},
    {"--v", "FILE", "values [Hkv,N,D]", 0, FILE_NAME, OWN(o.v), PLAIN},
    {"--grid", "T,H,W", "video tokens, w fastest; default: the end of the file's name, as in x_16x10x24.npy", 0,
     INTEGERS, OWN(o.grid), LIST(OWN(o.n_grid), 1, 65536, 3, 3)},
    {"--heads-per-kv", "G", "the heads of a file in groups of G that read keys and values of the first", 0, INTEGER,
     OWN(group), NUMBER(1, 1024)},
    {"--density", "F,F,...", "default .05,.10,.15,.25", 0, REALS, OWN(densities),
     LIST(OWN(n_densities), DBL_MIN, 1, 1, MOST_DENSITIES)},
    {"--only", "TEXT", "methods whose name contains it", 0, FILE_NAME, OWN(only), PLAIN},
    {"--block-q", "N", "query rows in a block; default 128", 0, INTEGER, OWN(o.desc.block_q), NUMBER(1, INT_MAX)},
    {"--block-k", "N", "keys in a block; default 64", 0, INTEGER, OWN(o.desc.block_k), NUMBER(1, INT_MAX)},
    {"--sharpness", "F", "scale = F / sqrt(D); default 1", 0, REAL, OWN(sharpness), NUMBER(1e-6, 1e6)},
    {"--prefix", "N", "first tokens that stay at level 1 and in place", 0, TOKENS, OWN(o.desc.n_prefix),
     NUMBER(0, 9e15)},
    {"--suffix", "N", "last tokens, likewise", 0, TOKENS, OWN(o.desc.n_suffix), NUMBER(0, 9e15)},
    {"--sink", NULL, "the first KV block is level 1 for everyone", 0, FLAG, OWN(o.desc.sink), PLAIN},
    {"--trees", "FILE", "psa_prepare sees this file's q and k: trees of an earlier step or frame", 0, FILE_NAME,
     OWN(trees), PLAIN},
    {"--png", "FILE", "picture of error over density", 0, FILE_NAME, OWN(o.png), PLAIN},
    {"--json", NULL, "print every head's error and density as JSON", 0, FLAG, OWN(o.json), PLAIN},
    {"--threads", "N", "default: all processors", 0, INTEGER, OWN(o.threads), NUMBER(1, 4096)},
};

static const syntax fidelity_syntax = {"fidelity", 0, own_options, sizeof own_options / sizeof *own_options};

/* ---- inputs ----------------------------------------------------------------------------------------------------- */

static int read_file(study *s, const char *path, npy **file) {
    char err[PATH_MAX + 256];
    *file = &s->files[s->n_files];
    if (npy_read(path, *file, err, sizeof err) != 0)
        return fail(&s->o, "%s", err);
    s->n_files++;
    if (strcmp((*file)->descr, "<f4") != 0 && strcmp((*file)->descr, "<f2") != 0)
        return fail(&s->o, "%s: element type '%s'; expected float32 or float16", path, (*file)->descr);
    return (*file)->count ? 0 : fail(&s->o, "%s: an axis of length 0", path);
}

/* The grid of --grid, or else the last three numbers of the name. */
static int find_grid(const study *s, const char *path, int64_t n, int grid[3]) {
    const char *at = strrchr(path, '_');
    int64_t tokens = s->o.desc.n_prefix + s->o.desc.n_suffix;
    if (s->o.n_grid)
        memcpy(grid, s->o.grid, sizeof s->o.grid);
    else if (!at || sscanf(at, "_%5dx%5dx%5d.npy", &grid[0], &grid[1], &grid[2]) != 3 || grid[0] < 1 || grid[1] < 1 ||
             grid[2] < 1)
        return fail(&s->o, "%s: no grid in its name; expected NAME_TxHxW.npy or --grid T,H,W", path);
    tokens += (int64_t)grid[0] * grid[1] * grid[2];
    if (tokens == n)
        return 0;
    return fail(&s->o, "%s: %" PRId64 " tokens; the grid %dx%dx%d with prefix and suffix makes %" PRId64, path, n,
                grid[0], grid[1], grid[2], tokens);
}

/* Heads `first` .. `first` + heads - 1 of [.., H, N, D] in a. */
static psa_tensor head_view(const npy *a, int64_t first, int64_t heads) {
    int64_t n = a->shape[a->ndim - 2], d = a->shape[a->ndim - 1];
    psa_type type = a->item == 4 ? PSA_F32 : PSA_F16;
    return psa_tensor_4d((char *)a->data + (size_t)(first * n * d) * a->item, type, d, n, heads, 1);
}

static int add_units(study *s, const char *path, int64_t groups, int64_t per_kv, const npy *files[3],
                     const int64_t first[3], int64_t kv_step, unit **units, int *count) {
    const char *slash = strrchr(path, '/');
    unit *more = (unit *)realloc(*units, (size_t)(*count + groups) * sizeof **units);
    if (!more)
        return fail(&s->o, "not enough memory");
    *units = more;
    for (int64_t g = 0; g < groups; g++) {
        unit *u = &more[(*count)++];
        memset(u, 0, sizeof *u);
        snprintf(u->name, sizeof u->name, groups > 1 ? "%s h%" PRId64 : "%s", slash ? slash + 1 : path, g * per_kv);
        u->q = head_view(files[0], first[0] + g * per_kv, per_kv);
        u->k = head_view(files[1], first[1] + g * kv_step, 1);
        u->v = head_view(files[2], first[2] + g * kv_step, 1);
        if (find_grid(s, path, u->q.ne[1], u->grid))
            return 2;
    }
    return 0;
}

/* [3,N,D] or [3,H,N,D] */
static int read_stacked(study *s, const char *path, unit **units, int *count) {
    npy *a;
    if (read_file(s, path, &a))
        return 2;
    if ((a->ndim != 3 && a->ndim != 4) || a->shape[0] != 3)
        return fail(&s->o, "%s: expected [3,N,D] or [3,H,N,D]: q, k and v", path);
    int64_t heads = a->ndim == 4 ? a->shape[1] : 1;
    if (heads % s->group)
        return fail(&s->o, "%s: %" PRId64 " heads; expected a multiple of --heads-per-kv %d", path, heads, s->group);
    const npy *files[3] = {a, a, a};
    const int64_t first[3] = {0, heads, 2 * heads};
    return add_units(s, path, heads / s->group, s->group, files, first, s->group, units, count);
}

static int64_t heads_of(const npy *a) {
    int64_t heads = 1;
    for (int i = 0; i < a->ndim - 2; i++)
        heads *= a->shape[i];
    return heads;
}

/* --q, --k and --v */
static int read_separate(study *s) {
    const char *paths[3] = {s->o.q, s->o.k, s->o.v};
    const int64_t first[3] = {0, 0, 0};
    npy *a[3];
    for (int i = 0; i < 3; i++) {
        if (!paths[i])
            return fail(&s->o, "expected files, or --q, --k and --v (--help says more)");
        if (read_file(s, paths[i], &a[i]))
            return 2;
        if (a[i]->ndim < 2 || a[i]->ndim > 4)
            return fail(&s->o, "%s: %d axes; expected 2 to 4", paths[i], a[i]->ndim);
    }
    int64_t heads = heads_of(a[0]), kv = heads_of(a[1]);
    if (heads % kv || heads_of(a[2]) != kv)
        return fail(&s->o, "%s, %s, %s: %" PRId64 ", %" PRId64 " and %" PRId64 " heads do not go together", paths[0],
                    paths[1], paths[2], heads, kv, heads_of(a[2]));
    const npy *files[3] = {a[0], a[1], a[2]};
    return add_units(s, paths[0], kv, heads / kv, files, first, 1, &s->units, &s->n_units);
}

static int check_old(const study *s) {
    for (int i = 0; s->old && i < s->n_units; i++)
        for (int axis = 0; axis < 3; axis++)
            if (s->old[i % s->n_old].q.ne[axis] != s->units[i].q.ne[axis])
                return fail(&s->o, "%s: its shape differs from that of %s", s->trees, s->units[i].name);
    return 0;
}

static int read_inputs(study *s) {
    s->files = (npy *)calloc((size_t)s->o.n_words + 4, sizeof *s->files);
    if (!s->files)
        return fail(&s->o, "not enough memory");
    for (int i = 0; i < s->o.n_words; i++)
        if (read_stacked(s, s->o.words[i], &s->units, &s->n_units))
            return 2;
    if (!s->o.n_words && read_separate(s))
        return 2;
    if (s->trees && read_stacked(s, s->trees, &s->old, &s->n_old))
        return 2;
    return check_old(s);
}

/* ---- measuring -------------------------------------------------------------------------------------------------- */

/* Gilbert's curve through the grid, prefix and suffix in place; to be freed, NULL without memory. */
static int32_t *gilbert(const psa_desc *d, const unit *u) {
    const int *g = u->grid;
    int32_t *index = (int32_t *)malloc((size_t)u->q.ne[1] * sizeof *index);
    if (!index || psa_order_gilbert(g[0], g[1], g[2], index + d->n_prefix) != PSA_OK) {
        free(index);
        return NULL;
    }
    psa_order_embed(index, d->n_prefix, (int64_t)g[0] * g[1] * g[2], d->n_suffix);
    return index;
}

/* out of one attention, f32; density: of the map. old: whose q and k the trees are made of. */
static int attend(study *s, const psa_desc *desc, const unit *u, const unit *old, float *out, double *density) {
    psa_tensor to = psa_tensor_4d(out, PSA_F32, u->v.ne[0], u->q.ne[1], u->q.ne[2], 1);
    psa_stats stats;
    run r;
    int rc = run_init(&r, &s->o, &s->crew, desc, tasks(&s->crew), &u->q, &u->k, &u->v, &to);
    for (int stage = PREPARE; rc == 0 && stage < STAGES; stage++) {
        r.q = stage == PREPARE ? old->q.data : u->q.data;
        r.k = stage == PREPARE ? old->k.data : u->k.data;
        rc = run_stage(&r, &s->o, stage);
    }
    if (rc == 0) {
        psa_stats_from_levels(&r.plan, r.levels, -1, -1, &stats);
        *density = stats.density;
    }
    run_free(&r);
    return rc;
}

/* A method at every density of one unit. */
static int measure(study *s, int m, int n, const int32_t *curve, const float *dense, float *out) {
    const unit *u = &s->units[n], *old = s->old ? &s->old[n % s->n_old] : u;
    psa_desc desc = methods[m].desc;
    double largest;
    desc.scale = (float)(s->sharpness / sqrt((double)u->q.ne[0]));
    desc.block_q = s->o.desc.block_q;
    desc.block_k = s->o.desc.block_k;
    desc.n_prefix = s->o.desc.n_prefix;
    desc.n_suffix = s->o.desc.n_suffix;
    desc.sink = s->o.desc.sink;
    desc.order_q.index = methods[m].gilbert_q ? curve : NULL;
    desc.order_k.index = methods[m].gilbert_k ? curve : NULL;
    for (int d = 0; d < s->n_densities; d++) {
        desc.density = s->densities[d];
        if (attend(s, &desc, u, old, out, cell(s, 1, m, d, n)))
            return 2;
        difference(dense, out, PSA_F32, (size_t)(u->v.ne[0] * u->q.ne[1] * u->q.ne[2]), cell(s, 0, m, d, n), &largest);
    }
    return 0;
}

static int measure_unit(study *s, int n) {
    const unit *u = &s->units[n];
    size_t size = (size_t)(u->v.ne[0] * u->q.ne[1] * u->q.ne[2]);
    float *dense = (float *)malloc(size * sizeof *dense), *out = (float *)malloc(size * sizeof *out);
    int32_t *curve = gilbert(&s->o.desc, u);
    psa_desc desc = {.mask = PSA_MASK_DENSE, .scale = (float)(s->sharpness / sqrt((double)u->q.ne[0]))};
    double density;
    int rc = dense && out && curve ? 0 : fail(&s->o, "not enough memory");
    if (rc == 0)
        rc = attend(s, &desc, u, u, dense, &density);
    for (int m = 0; m < METHODS && rc == 0; m++)
        if (wanted(s, &methods[m]))
            rc = measure(s, m, n, curve, dense, out);
    free(dense);
    free(out);
    free(curve);
    return rc;
}

static int measure_all(study *s) {
    s->cells = (double *)calloc((size_t)(2 * METHODS * s->n_densities * s->n_units), sizeof *s->cells);
    if (!s->cells)
        return fail(&s->o, "not enough memory");
    s->crew.started = now();
    s->crew.label = isatty(2) ? "" : NULL;
    for (int n = 0; n < s->n_units; n++)
        if (measure_unit(s, n))
            return 2;
    if (s->crew.shown > 0)
        fprintf(stderr, "\r\033[K");
    return 0;
}

/* ---- text and JSON ---------------------------------------------------------------------------------------------- */

static double mean_error(const study *s, int m, int d) {
    double sum = 0;
    for (int n = 0; n < s->n_units; n++)
        sum += log(*cell(s, 0, m, d, n));
    return exp(sum / s->n_units);
}

static double mean_density(const study *s, int m, int d) {
    double sum = 0;
    for (int n = 0; n < s->n_units; n++)
        sum += *cell(s, 1, m, d, n);
    return sum / s->n_units;
}

static void print_table(const study *s) {
    printf("relative L2 error of out against dense, geometric mean of %d head%s; blocks %d x %d\n\n%-46s", s->n_units,
           s->n_units == 1 ? "" : "s", s->o.desc.block_q ? s->o.desc.block_q : 128,
           s->o.desc.block_k ? s->o.desc.block_k : 64, "density");
    for (int d = 0; d < s->n_densities; d++)
        printf("%9.3g", s->densities[d]);
    printf("\n");
    for (int m = 0; m < METHODS; m++) {
        if (!wanted(s, &methods[m]))
            continue;
        printf("%-46s", methods[m].name);
        for (int d = 0; d < s->n_densities; d++)
            printf("%9.3g", mean_error(s, m, d));
        for (int d = 0; d < s->n_densities; d++) /* a budget that protected blocks alone exceed */
            if (fabs(mean_density(s, m, d) / s->densities[d] - 1) > 0.01)
                printf("  (%.3g costs %.3g)", s->densities[d], mean_density(s, m, d));
        printf("\n");
    }
}

/* [densities][heads] */
static void json_cells(const study *s, cJSON *row, const char *name, int density, int m) {
    cJSON *rows = cJSON_AddArrayToObject(row, name);
    for (int d = 0; d < s->n_densities; d++)
        cJSON_AddItemToArray(rows, cJSON_CreateDoubleArray(cell(s, density, m, d, 0), s->n_units));
}

static int print_json(const study *s) {
    cJSON *root = cJSON_CreateObject(), *heads = cJSON_AddArrayToObject(root, "heads");
    cJSON_AddItemToObject(root, "densities", cJSON_CreateDoubleArray(s->densities, s->n_densities));
    for (int n = 0; n < s->n_units; n++)
        cJSON_AddItemToArray(heads, cJSON_CreateString(s->units[n].name));
    cJSON *rows = cJSON_AddArrayToObject(root, "methods");
    for (int m = 0; m < METHODS; m++) {
        if (!wanted(s, &methods[m]))
            continue;
        cJSON *row = cJSON_CreateObject();
        cJSON_AddItemToArray(rows, row);
        cJSON_AddStringToObject(row, "name", methods[m].name + strspn(methods[m].name, " "));
        json_cells(s, row, "error", 0, m);
        json_cells(s, row, "density", 1, m);
    }
    char *text = cJSON_Print(root);
    int rc = text ? 0 : fail(&s->o, "not enough memory");
    if (text)
        puts(text);
    cJSON_free(text);
    cJSON_Delete(root);
    return rc;
}

/* ---- the picture ------------------------------------------------------------------------------------------------ */

/* Error (logarithmic) over density; both axes in pixels of the picture. */
typedef struct chart {
    picture p;
    int x, y, w, h;
    double most_x, least, most; /* of the axes */
} chart;

static double chart_x(const chart *c, double density) {
    return c->x + c->w * density / c->most_x;
}

static double chart_y(const chart *c, double error) {
    return c->y + c->h * log(c->most / error) / log(c->most / c->least);
}

/* A line with round ends, its edge half covered. */
static void draw_line(const picture *p, double x0, double y0, double x1, double y1, double width,
                      const unsigned char rgb[3]) {
    double dx = x1 - x0, dy = y1 - y0, square = fmax(dx * dx + dy * dy, 1e-9), r = width / 2 + 1;
    for (int y = (int)fmax(0, fmin(y0, y1) - r); y < p->height && y <= fmax(y0, y1) + r; y++)
        for (int x = (int)fmax(0, fmin(x0, x1) - r); x < p->width && x <= fmax(x0, x1) + r; x++) {
            double t = fmax(0, fmin(1, ((x - x0) * dx + (y - y0) * dy) / square));
            double cover = width / 2 + 0.5 - hypot(x - x0 - t * dx, y - y0 - t * dy);
            unsigned char *to = pixel(p, x, y);
            cover = fmax(0, fmin(1, cover));
            for (int i = 0; i < 3; i++)
                to[i] = (unsigned char)(to[i] + cover * (rgb[i] - to[i]) + 0.5);
        }
}

static void draw_axes(chart *c, int heads) {
    static const double errors[] = {.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2};
    static const unsigned char grid[3] = {225, 225, 225};
    char label[64];
    int s = c->p.text;
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++) {
        int y = (int)chart_y(c, errors[i]);
        if (errors[i] < c->least || errors[i] > c->most)
            continue;
        fill(&c->p, c->x, y, c->w, 1, grid);
        snprintf(label, sizeof label, "%g", errors[i]);
        draw_text(&c->p, c->x - 4 * s - text_width(&c->p, label), y - 3 * s, label, ink);
    }
    for (double density = 0.05; density < c->most_x * 1.001; density += 0.05) {
        int x = (int)chart_x(c, density);
        fill(&c->p, x, c->y, 1, c->h, grid);
        snprintf(label, sizeof label, "%g", density);
        draw_text(&c->p, x - text_width(&c->p, label) / 2, c->y + c->h + 4 * s, label, ink);
    }
    fill(&c->p, c->x, c->y + c->h, c->w, s / 2, ink);
    fill(&c->p, c->x, c->y, s / 2, c->h, ink);
    snprintf(label, sizeof label, "relative error against dense, mean of %d head%s", heads, heads == 1 ? "" : "s");
    draw_text(&c->p, c->x, c->y - 14 * s, label, ink);
    draw_text(&c->p, c->x + c->w - text_width(&c->p, "density: share of dense multiply-adds"),
              c->y + c->h + 15 * s, "density: share of dense multiply-adds", ink);
}

static void draw_method(const study *s, chart *c, int m) {
    const unsigned char *colour = methods[m].colour;
    for (int d = 0; d < s->n_densities; d++) {
        double x = chart_x(c, s->densities[d]), y = chart_y(c, mean_error(s, m, d));
        draw_line(&c->p, x, y, x, y, 4.0 * c->p.text, colour);
        if (d > 0)
            draw_line(&c->p, chart_x(c, s->densities[d - 1]), chart_y(c, mean_error(s, m, d - 1)), x, y,
                      1.2 * c->p.text, colour);
    }
}

/* The axes' ends: what there is, and a little more. */
static void chart_range(const study *s, chart *c) {
    c->least = 1e9;
    for (int d = 0; d < s->n_densities; d++) {
        c->most_x = fmax(c->most_x, 1.06 * s->densities[d]);
        for (int m = 0; m < METHODS; m++) {
            double error = mean_error(s, m, d);
            if (!methods[m].plot || !wanted(s, &methods[m]))
                continue;
            c->least = fmin(c->least, error / 1.3);
            c->most = fmax(c->most, error * 1.2);
        }
    }
}

static int draw_chart(const study *s) {
    chart c;
    memset(&c, 0, sizeof c);
    chart_range(s, &c);
    if (!picture_init(&c.p, 1100, 640, 2))
        return fail(&s->o, "not enough memory");
    c.x = 70, c.y = 50, c.w = 720, c.h = 530;
    draw_axes(&c, s->n_units);
    for (int m = 0, y = c.y; m < METHODS; m++) {
        if (!methods[m].plot || !wanted(s, &methods[m]))
            continue;
        draw_method(s, &c, m);
        draw_key(&c.p, c.x + c.w + 20, y, methods[m].colour, methods[m].plot);
        y += 2 * LINE * c.p.text;
    }
    int bad = picture_write(&c.p, s->o.png) != 0;
    free(c.p.rgb);
    return bad ? fail(&s->o, "%s: cannot write the picture: %s", s->o.png, strerror(errno)) : 0;
}

/* ---- main ------------------------------------------------------------------------------------------------------- */

static int study_run(study *s) {
    if (read_inputs(s) || measure_all(s) || (s->o.png && draw_chart(s)))
        return 2;
    if (s->o.json)
        return print_json(s);
    print_table(s);
    return 0;
}

static int check_only(const study *s) {
    for (int m = 0; m < METHODS; m++)
        if (wanted(s, &methods[m]))
            return 0;
    return fail(&s->o, "--only '%s': no method's name contains it", s->only);
}

static int study_parse(study *s, int argc, char **argv) {
    static const double densities[] = {.05, .10, .15, .25};
    s->group = 1;
    s->sharpness = 1;
    s->o.words = (const char **)calloc((size_t)argc, sizeof *s->o.words);
    if (!s->o.words)
        return fail(&s->o, "not enough memory");
    int rc = parse_options(&s->o, &fidelity_syntax, argc - 1, argv + 1);
    if (rc == 0 && s->n_densities == 0) {
        memcpy(s->densities, densities, sizeof densities);
        s->n_densities = sizeof densities / sizeof *densities;
    }
    return rc == 0 && !s->o.help ? check_only(s) : rc;
}

static void print_help(void) {
    printf("fidelity FILE... [options]\n"
           "Error of many kinds of sparse attention against dense, at equal density, on q, k and v of real heads:\n"
           "files [3,N,D] or [3,H,N,D], q, k and v one after the other, named NAME_TxHxW.npy.\n\n");
    print_options(&fidelity_syntax);
}

int main(int argc, char **argv) {
    static study s;
    int rc = study_parse(&s, argc, argv);
    if (rc == 0 && s.o.help) {
        print_help();
    } else if (rc == 0) {
        crew_start(&s.crew, s.o.threads);
        rc = study_run(&s);
        crew_stop(&s.crew);
    }
    for (int i = 0; i < s.n_files; i++)
        npy_free(&s.files[i]);
    void *owned[] = {s.files, s.units, s.old, s.cells, s.o.words};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        free(owned[i]);
    return fflush(stdout) == 0 ? rc : 2;
}
