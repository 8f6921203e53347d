/* level_map_png.h - a picture of the level maps of all heads: one panel per head, one colour per level, a legend, and
 * axes in tokens. Everything is static. */
#ifndef LEVEL_MAP_PNG_H
#define LEVEL_MAP_PNG_H

#include "draw.h"
#include <math.h>

typedef struct level_maps {
    const uint8_t *levels; /* [B][H][nq][nk] */
    const double *density; /* [B][H] */
    int64_t B, H, Nq, Nk, nq, nk;
    int block_q, block_k;
} level_maps;

/* Where the panels stand, in pixels. */
typedef struct layout {
    int n, columns, rows; /* panels */
    int text;
    int map_w, map_h;     /* a level map */
    int panel_w, panel_h; /* the same with its title and axes */
    int width, height;
} layout;

/* Margins in pixels of the font. */
enum { LEFT = 46, TOP = 32, BOTTOM = 32 };
enum { SMALLEST_MAP = 320, MOST_HEADS = 1024 };
static const double most_pixels = 4e7;

/* Half-transparent, so that the blocks under a grid line can still be told apart. */
static void shade(picture *p, int x, int y, int w, int h) {
    for (int j = y; j < y + h; j++)
        for (int i = 3 * x; i < 3 * (x + w); i++) {
            unsigned char *c = p->rgb + 3 * (size_t)j * (size_t)p->width + i;
            *c = (unsigned char)((*c + 128) / 2);
        }
}

/* Blocks are drawn to scale in tokens, at least two pixels each way, larger where the map is small. Maps of which all
 * heads would not fit into most_pixels are drawn smaller. */
static void map_size(const level_maps *m, double shrink, int *w, int *h) {
    double longest = fmax((double)m->nq * m->block_q, (double)m->nk * m->block_k);
    double scale = fmax(2.0 / fmin(m->block_q, m->block_k), SMALLEST_MAP / longest); /* pixels per token */
    double cell_w = fmax(2, round(scale * m->block_k)), cell_h = fmax(2, round(scale * m->block_q));
    *w = (int)fmax(1, fmin(30000, (double)m->nk * cell_w * shrink));
    *h = (int)fmax(1, fmin(30000, (double)m->nq * cell_h * shrink));
}

static layout lay_out(const level_maps *m, double shrink) {
    layout l;
    memset(&l, 0, sizeof l);
    l.n = (int)(m->B * m->H);
    map_size(m, shrink, &l.map_w, &l.map_h);
    l.text = l.map_w < 640 ? 2 : l.map_w < 960 ? 3 : 4;
    int least_w = 130 * l.text; /* the title needs it */
    l.panel_w = (LEFT + GAP) * l.text + (l.map_w > least_w ? l.map_w : least_w);
    l.panel_h = 4 * LINE * l.text + l.map_h;
    l.columns = (int)ceil(sqrt(l.n * 1.5 * l.panel_h / l.panel_w));
    l.columns = l.columns > l.n ? l.n : l.columns;
    l.rows = (l.n + l.columns - 1) / l.columns;
    l.columns = (l.n + l.rows - 1) / l.rows; /* no emptier than it must be */
    l.width = l.columns * l.panel_w + GAP * l.text;
    l.width = l.width > 480 * l.text ? l.width : 480 * l.text; /* the legend needs it */
    l.height = (TOP + BOTTOM) * l.text + l.rows * l.panel_h;
    return l;
}

/* Tokens between two grid lines: 1, 2, 4, ... blocks, such that labels of this width do not touch. */
static int64_t tick_step(int64_t tokens, int block, int pixels, int label) {
    int64_t step = block;
    while ((double)step * pixels < 1.5 * label * (double)tokens)
        step *= 2;
    return step;
}

static void draw_x_axis(picture *p, const level_maps *m, const layout *l, int x, int y) {
    char label[32];
    int64_t tokens = m->nk * m->block_k;
    snprintf(label, sizeof label, "%lld", (long long)tokens);
    int64_t step = tick_step(tokens, m->block_k, l->map_w, text_width(p, label));
    for (int64_t t = 0; t < m->Nk; t += step) {
        int at = x + (int)(t * l->map_w / tokens);
        snprintf(label, sizeof label, "%lld", (long long)t);
        if (t)
            shade(p, at, y, 1, l->map_h);
        fill(p, at, y + l->map_h, 1, 3 * p->text, ink);
        draw_text(p, at - (t ? text_width(p, label) / 2 : 0), y + l->map_h + 4 * p->text, label, ink);
    }
}

static void draw_y_axis(picture *p, const level_maps *m, const layout *l, int x, int y) {
    char label[32];
    int64_t tokens = m->nq * m->block_q, step = tick_step(tokens, m->block_q, l->map_h, 2 * LINE * p->text);
    for (int64_t t = 0; t < m->Nq; t += step) {
        int at = y + (int)(t * l->map_h / tokens);
        snprintf(label, sizeof label, "%lld", (long long)t);
        if (t)
            shade(p, x, at, l->map_w, 1);
        fill(p, x - 3 * p->text, at, 3 * p->text, 1, ink);
        draw_text(p, x - 4 * p->text - text_width(p, label), at - (t ? 3 * p->text : 0), label, ink);
    }
}

static void draw_panel(picture *p, const level_maps *m, const layout *l, int head, int x, int y) {
    const uint8_t *levels = m->levels + (int64_t)head * m->nq * m->nk;
    char title[64];
    snprintf(title, sizeof title, "b%d h%d  density %.3f", (int)(head / m->H), (int)(head % m->H), m->density[head]);
    draw_text(p, x, y, title, ink);
    y += LINE * p->text;
    draw_levels(p, levels, m->nq, m->nk, x, y, l->map_w, l->map_h);
    draw_x_axis(p, m, l, x, y);
    draw_y_axis(p, m, l, x, y);
}

/* The levels that occur, finest first. */
static void draw_legend(picture *p, const level_maps *m, int x, int y) {
    int seen[LEVELS] = {0};
    for (int64_t i = 0; i < m->B * m->H * m->nq * m->nk; i++)
        seen[level_index(m->levels[i])] = 1;
    for (int i = 1; i <= LEVELS; i++) {
        char label[32];
        if (!seen[i % LEVELS]) /* skip comes last */
            continue;
        level_name(label, sizeof label, i % LEVELS);
        x = draw_key(p, x, y, level_colours[i % LEVELS], label);
    }
}

static void draw_all(picture *p, const level_maps *m, const layout *l) {
    char title[128];
    int s = p->text;
    snprintf(title, sizeof title, "level maps: %lld queries down, %lld keys across, blocks %d x %d", (long long)m->Nq,
             (long long)m->Nk, m->block_q, m->block_k);
    draw_text(p, GAP * s, GAP * s, title, ink);
    for (int i = 0; i < l->n; i++)
        draw_panel(p, m, l, i, LEFT * s + i % l->columns * l->panel_w, TOP * s + i / l->columns * l->panel_h);
    draw_legend(p, m, GAP * s, l->height - (BOTTOM - GAP) * s);
}

/* 0, or -1 with one line in err. */
static int level_map_png(const char *path, const level_maps *m, char *err, size_t err_size) {
    if (m->B * m->H > MOST_HEADS) {
        snprintf(err, err_size, "%s: %lld heads are too many for one picture; expected at most %d", path,
                 (long long)(m->B * m->H), MOST_HEADS);
        return -1;
    }
    layout l = lay_out(m, 1);
    double pixels = (double)l.width * l.height;
    if (pixels > most_pixels)
        l = lay_out(m, sqrt(most_pixels / pixels));
    picture p;
    int bad = !picture_init(&p, l.width, l.height, l.text);
    if (!bad) {
        draw_all(&p, m, &l);
        bad = picture_write(&p, path) != 0;
    }
    free(p.rgb);
    if (bad)
        snprintf(err, err_size, "%s: cannot write the picture", path);
    return bad ? -1 : 0;
}
#endif
