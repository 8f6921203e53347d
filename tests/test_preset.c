/* test_preset.c - the settings of published models, line by line. */
#include "test.h"

enum { TOPK = PSA_MASK_TOPK, THRESHOLD = PSA_MASK_THRESHOLD, NONE = PSA_ORDER_NONE, GILBERT = PSA_ORDER_GILBERT };

typedef struct preset_row {
    const char *name;
    int block_q, block_k, mask;
    double level_end[4];
    int order, warmup_steps;
    double warmup_share;
    double sim_min[3]; /* 0: no cap */
    int n_text, is_qwen;
} preset_row;

static const preset_row rows[] = {
    {"wan2.1-14b", 128, 128, THRESHOLD, {.4, .5, .6, .8}, GILBERT, 15, 0, {0, 0, 0}, 0, 0},
    {"wan2.1-1.3b", 128, 128, THRESHOLD, {.5, .6, .7, .8}, GILBERT, 15, 0, {.7, .65, .6}, 0, 0},
    {"wan2.1-1.3b-topk", 128, 32, TOPK, {.05, .1, .15, .25}, GILBERT, 15, 0, {0, 0, 0}, 0, 0},
    {"wan2.2-a14b", 128, 32, THRESHOLD, {.5, .6, .6, .8}, GILBERT, 12, 0, {0, 0, 0}, 0, 0},
    {"wan2.2-5b", 128, 32, THRESHOLD, {.6, .7, .7, .8}, GILBERT, 15, 0, {0, 0, 0}, 0, 0},
    {"cogvideox1.5-5b", 128, 32, TOPK, {.1, .15, .15, .35}, GILBERT, 15, 0, {0, 0, 0}, 226, 0},
    {"cogvideox-5b", 128, 128, TOPK, {.1, .15, .15, .35}, NONE, 15, 0, {0, 0, 0}, 226, 0},
    {"cogvideox-5b-4step", 128, 128, TOPK, {.05, .15, .25, .5}, NONE, 0, 0, {0, 0, 0}, 226, 0},
    {"qwen2.5-vl", 128, 128, THRESHOLD, {.7, .8, .9, .9}, NONE, 0, 0, {.75, .7, .7}, 0, 1},
    {"default", 128, 64, TOPK, {.1, .15, .15, .35}, NONE, 0, 0, {0, 0, 0}, 0, 0},
    {"paper-25", 128, 64, TOPK, {.15, .25, .45, 0}, GILBERT, 0, .25, {0, 0, 0}, 0, 0},
    {"recipe", 128, 64, PSA_MASK_ERROR, {.1, .15, .15, .35}, NONE, 0, 0, {0, 0, 0}, 0, 0}, /* the ends go unused */
};

enum { N_ROWS = sizeof rows / sizeof *rows };

static void check_desc(const preset_row *row, const psa_desc *d) {
    const char *n = row->name;
    int qwen = row->is_qwen, recipe = row->mask == PSA_MASK_ERROR;
    /* rounded: x87 would compare in long double */
    double min_full = row->mask == THRESHOLD && !qwen ? .06 : 0, density = recipe ? .15 : 0;
    CHECK(d->block_q == row->block_q && d->block_k == row->block_k, "%s: %d/%d", n, d->block_q, d->block_k);
    CHECK((int)d->mask == row->mask, "%s: mask %d", n, (int)d->mask);
    for (int i = 0; i < PSA_MAX_LEVELS; i++) {
        CHECK(d->level_end[i] == (i < 4 ? row->level_end[i] : 0), "%s: level_end[%d] %.17g", n, i, d->level_end[i]);
        CHECK(d->level_count[i] == 0, "%s: level_count[%d]", n, i);
    }
    CHECK(d->min_full == min_full, "%s: min_full %g", n, d->min_full);
    CHECK(d->n_sim_min == (row->sim_min[0] > 0 ? 3 : 0), "%s: n_sim_min %d", n, d->n_sim_min);
    for (int i = 0; i < d->n_sim_min && i < 3; i++)
        CHECK(d->sim_min[i] == row->sim_min[i], "%s: sim_min[%d] is %g", n, i, d->sim_min[i]);
    CHECK(d->n_prefix == row->n_text && d->n_suffix == (qwen ? 512 : 0), "%s: protected tokens", n);
    CHECK(d->inclusive == qwen && d->causal == qwen, "%s: inclusive %d, causal %d", n, d->inclusive, d->causal);
    CHECK(d->sink == qwen && d->diagonal == qwen && !d->skip_mean, "%s: sink %d, diagonal %d", n, d->sink, d->diagonal);
    CHECK(d->score == (qwen ? PSA_SCORE_ANTIDIAGONAL : recipe ? PSA_SCORE_POOLED : PSA_SCORE_SAMPLE), "%s: score %d",
          n, (int)d->score);
    CHECK(d->tree == (recipe ? PSA_TREE_QKV : PSA_TREE_NONE) && d->tilt == recipe, "%s: tree %d, tilt %d", n,
          (int)d->tree, d->tilt);
    CHECK(!recipe || (d->score_group[0] == 16 && d->score_group[1] == 8), "%s: groups of %dx%d", n, d->score_group[0],
          d->score_group[1]);
    CHECK(d->density == density, "%s: density %g", n, d->density);
    CHECK(!qwen || d->stride == 8, "%s: stride %d", n, d->stride);
    CHECK(d->sample_q == .25 && d->sample_k == .25, "%s: samples %g %g", n, d->sample_q, d->sample_k);
    CHECK(!d->score_norm && !d->score_mean, "%s: score_norm %d, score_mean %d", n, d->score_norm, d->score_mean);
}

/* With defaults resolved every preset is the line of the table. */
static void preset_table(void) {
    for (int i = 0; i < N_ROWS; i++) {
        psa_desc desc;
        psa_plan plan;
        psa_tensor x = psa_tensor_4d(NULL, PSA_F32, 64, 1000, 2, 1);
        const psa_preset *p = psa_preset_find(rows[i].name);
        if (!CHECK(p != NULL, "%s is missing", rows[i].name))
            continue;
        CHECK(!strcmp(p->name, rows[i].name), "%s", p->name);
        CHECK((int)p->order == rows[i].order, "%s: order %d", p->name, (int)p->order);
        CHECK(p->warmup_steps == rows[i].warmup_steps && p->warmup_share == rows[i].warmup_share, "%s: warm-up %d %g",
              p->name, p->warmup_steps, p->warmup_share);
        CHECK(p->n_text == rows[i].n_text, "%s: %d text tokens", p->name, p->n_text);
        memset(&desc, 0xa5, sizeof desc);
        CHECK_RESULT(psa_desc_preset(rows[i].name, &desc), PSA_OK);
        if (CHECK_RESULT(psa_plan_init(&plan, &desc, &x, &x, &x, &x), PSA_OK))
            check_desc(&rows[i], &plan.desc);
    }
}

/* The names that are listed are the names of the table, once each. */
static void preset_names(void) {
    int n = 0, known = 0;
    for (; psa_preset_name(n); n++)
        for (int i = 0; i < N_ROWS; i++)
            known += !strcmp(psa_preset_name(n), rows[i].name);
    CHECK(n == N_ROWS && known == N_ROWS, "%d names, %d of them known, expected %d", n, known, (int)N_ROWS);
    CHECK(psa_preset_name(-1) == NULL, "a name for -1");
}

static void preset_grid(void) {
    static const struct {
        const char *name;
        int frames, height, width, grid[3];
    } cases[] = {{"wan2.1-14b", 81, 720, 1280, {21, 45, 80}},      {"wan2.1-1.3b", 81, 480, 832, {21, 30, 52}},
                 {"wan2.1-1.3b-topk", 81, 480, 832, {21, 30, 52}}, {"wan2.2-a14b", 81, 720, 1280, {21, 45, 80}},
                 {"wan2.2-5b", 121, 704, 1280, {31, 22, 40}},      {"cogvideox-5b", 49, 480, 720, {13, 30, 45}},
                 {"cogvideox1.5-5b", 81, 768, 1360, {11, 48, 85}}};
    int grid[3];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const psa_preset *p = psa_preset_find(cases[i].name);
        if (!CHECK(p != NULL, "%s is missing", cases[i].name))
            continue;
        CHECK_RESULT(psa_preset_grid(p, cases[i].frames, cases[i].height, cases[i].width, grid), PSA_OK);
        CHECK(!memcmp(grid, cases[i].grid, sizeof grid), "%s: %dx%dx%d", cases[i].name, grid[0], grid[1], grid[2]);
        CHECK(psa_preset_grid(p, cases[i].frames, 1, 1, grid) != PSA_OK, "%s: a grid for a single pixel",
              cases[i].name);
    }
    CHECK(psa_preset_grid(psa_preset_find("default"), 81, 480, 832, grid) != PSA_OK, "default has no grid rule");
}

const test_case tests_preset[] = {
    {"preset/table", preset_table},
    {"preset/names", preset_names},
    {"preset/grid", preset_grid},
    {NULL, NULL},
};
