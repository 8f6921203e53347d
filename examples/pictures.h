/* pictures.h - what pyramid sparse attention read of a video, as PNG files. Everything is static; errors end the
 * program.
 *
 *     frames.png    frames of the clip, tinted by the level at which one query block read each of their tokens
 *     levels.png    the level map of every layer and head
 *     density.png   density of every layer
 *     summary.png   some of all that on one sheet, with the labels that were found */
#ifndef PICTURES_H
#define PICTURES_H

#include "draw.h"
#include "encoder.h"
#include <sys/stat.h>
#include <unistd.h>

/* The frames that the model saw: grid[0] * tubelet of them. */
typedef struct seen {
    int frames, height, width, tubelet;
    const uint8_t *rgb; /* [frames][height][width][3] */
} seen;

/* Text that the caller makes. What is too long is cut: of the title beyond 50 characters, of a line beyond 42. */
typedef struct caption {
    const char *title; /* model and clip */
    const char *lines[8];
    int n_lines;
    int n_bars, has_dense; /* the most probable labels */
    struct {
        const char *label;
        double psa, dense;
    } bars[5];
} caption;

/* Writes the four pictures into the folder dir, which is made if it is missing. The query block followed is that of the
 * token query (t, y, x) in this layer and head. */
static void pictures_write(const char *dir, const trace *t, const seen *f, const caption *c, const int query[3],
                           int layer, int head);

/* Pixels. */
enum { MARGIN = 24, TEXT_HEIGHT = 18, BAR_PITCH = 48 };
enum { FRAME_WIDTH = 384, FRAME_GAP = 8, FRAME_LABEL = 28, LEGEND_WIDTH = 1060, MAPS_WIDTH = 640 };
enum { LEAST_MAP = 8, MOST_MAP = 260 };
static const double most_map_pixels = 3e6;

/* ---- text ------------------------------------------------------------------------------------------------------- */

static const unsigned char pale_ink[3] = {115, 115, 120}, rule[3] = {225, 225, 228}, outline[3] = {0, 225, 235};
static const unsigned char psa_colour[3] = {86, 20, 125}, pooler_colour[3] = {240, 100, 92};
static const unsigned char dense_colour[3] = {176, 178, 186};

/* Cuts text that is wider than w pixels. */
static void draw_text_in(picture *p, int x, int y, int w, const char *text, const unsigned char rgb[3]) {
    char cut[128];
    font_text(cut, sizeof cut, text);
    size_t n = strlen(cut);
    while (n > 3 && text_width(p, cut) > w) memcpy(cut + --n - 3, "...", 4);
    draw_text(p, x, y, cut, rgb);
}

static void draw_text_right(picture *p, int x, int y, const char *text, const unsigned char rgb[3]) {
    draw_text(p, x - text_width(p, text), y, text, rgb);
}

static void draw_text_centred(picture *p, int x, int y, const char *text, const unsigned char rgb[3]) {
    draw_text(p, x - text_width(p, text) / 2, y, text, rgb);
}

/* Text is two pixels per pixel of the font. */
static picture new_picture(int width, int height) {
    picture p;
    if (!picture_init(&p, width, height, 2)) die("no memory for a picture of %d x %d pixels", width, height);
    return p;
}

static void draw_title(picture *p, const char *title) {
    int room = p->width - 2 * MARGIN;
    p->text = 3;
    if (text_width(p, title) > room) p->text = 2;
    draw_text_in(p, MARGIN, MARGIN, room, title, ink);
    p->text = 2;
}

/* How a legend names a level; the higher forms are shorter. */
static void key_label(char *label, size_t size, int index, double share, int form) {
    char name[32];
    level_name(name, sizeof name, index);
    const char *text = form && index ? name + strlen("level ") : name;
    if (form == 2)
        snprintf(label, size, "%s", text);
    else
        snprintf(label, size, share < 0.0995 ? "%s: %.1f%%" : "%s: %.0f%%", text, 100 * share);
}

/* The levels that occur, finest first and skip last. Draws them at (x, y), or measures them where y is negative.
 * Returns where they end. */
static int draw_keys(picture *p, const double share[LEVELS], int x, int y, int form) {
    for (int i = 1; i <= LEVELS; i++) {
        char label[64];
        int index = i % LEVELS;
        if (!(share[index] > 0)) continue;
        key_label(label, sizeof label, index, share[index], form);
        x = y < 0 ? x + key_width(p, label) : draw_key(p, x, y, level_colours[index], label);
    }
    return x;
}

/* In the longest form that fits into w pixels. */
static int draw_legend(picture *p, const double share[LEVELS], int x, int y, int w) {
    int form = 0;
    while (form < 2 && draw_keys(p, share, 0, -1, form) > w) form++;
    return draw_keys(p, share, x, y, form);
}

/* ---- frames ----------------------------------------------------------------------------------------------------- */

enum { SAMPLES = 8 };

/* What one query block read. */
typedef struct gaze {
    const trace *t;
    const seen *f;
    int layer, head;
    int64_t block;
    uint8_t *level;         /* [n]: index of the level at which the block read each token */
    uint8_t *own;           /* [n]: the token is one of the block's queries */
    double share[LEVELS];   /* of the tokens */
    int times[SAMPLES], n_times;
} gaze;

static void layer_name(char *name, size_t size, const trace *t, int layer) {
    int n_encoder = t->layers - t->pooler;
    if (layer < n_encoder)
        snprintf(name, size, "layer %d", layer);
    else
        snprintf(name, size, "pooler %d", layer - n_encoder);
}

static const uint8_t *head_levels(const trace *t, int layer, int head) {
    return trace_levels(t, layer) + head * t->nq * t->nk;
}

static int64_t token_of_row(const trace *t, int64_t row) {
    return t->order ? t->order[row] : row;
}

/* Evenly over the clip, such that the time of the query is among them. */
static void choose_times(gaze *g, int query_time) {
    int T = g->t->grid[0], n = T < SAMPLES ? T : SAMPLES, part = n - 1;
    while (part * T / n > query_time) part--;
    g->n_times = n;
    for (int i = 0; i < n; i++) {
        int time = i * T / n + query_time - part * T / n;
        g->times[i] = time < T ? time : T - 1;
    }
}

static void gaze_init(gaze *g, const trace *t, const seen *f, const int query[3], int layer, int head) {
    memset(g, 0, sizeof *g);
    g->t = t;
    g->f = f;
    g->layer = layer;
    g->head = head;
    g->level = alloc((size_t)t->n, 1);
    g->own = alloc((size_t)t->n, 1);
    int64_t token = ((int64_t)query[0] * t->grid[1] + query[1]) * t->grid[2] + query[2], row = 0;
    while (token_of_row(t, row) != token) row++;
    g->block = row / t->block_q;
    const uint8_t *levels = head_levels(t, layer, head) + g->block * t->nk;
    for (row = 0; row < t->n; row++) {
        token = token_of_row(t, row);
        g->level[token] = (uint8_t)level_index(levels[row / t->block_k]);
        g->own[token] = row / t->block_q == g->block;
        g->share[g->level[token]] += 1.0 / (double)t->n;
    }
    choose_times(g, query[0]);
}

/* How much of pixel i lies in [begin, end). */
static double overlap(int i, double begin, double end) {
    return fmin(i + 1, end) - fmax(i, begin);
}

/* The mean of what is under pixel (x, y) of frame number time * tubelet drawn with size w x h. */
static void film_pixel(const seen *f, int time, int x, int y, int w, int h, double rgb[3]) {
    const uint8_t *frame = f->rgb + 3 * (size_t)time * (size_t)f->tubelet * (size_t)f->height * (size_t)f->width;
    double step_x = (double)f->width / w, step_y = (double)f->height / h, x0 = x * step_x, y0 = y * step_y;
    rgb[0] = rgb[1] = rgb[2] = 0;
    for (int j = (int)y0; j < f->height && j < y0 + step_y; j++)
        for (int i = (int)x0; i < f->width && i < x0 + step_x; i++) {
            const uint8_t *from = frame + 3 * ((size_t)j * (size_t)f->width + (size_t)i);
            double part = overlap(i, x0, x0 + step_x) * overlap(j, y0, y0 + step_y) / (step_x * step_y);
            for (int c = 0; c < 3; c++) rgb[c] += part * from[c];
        }
}

/* Level 1 keeps the colours of the video, coarser levels put theirs in place of most of them, skipped tokens fade to a
 * light grey. The last bits are noise, which PNG cannot compress. */
static void tint(const double from[3], int index, unsigned char *to) {
    double light = 0.299 * from[0] + 0.587 * from[1] + 0.114 * from[2];
    for (int c = 0; c < 3; c++) {
        double coarse = 0.2 * from[c] + 0.38 * light + 0.42 * level_colours[index][c];
        double fine = 0.8 * from[c] + 0.2 * level_colours[index][c], skipped = 189 + 0.22 * light;
        to[c] = 0xFC & (unsigned char)(index > 1 ? coarse : index ? fine : skipped);
    }
}

static int is_own(const gaze *g, int time, int y, int x) {
    const int *grid = g->t->grid;
    return x >= 0 && y >= 0 && x < grid[2] && y < grid[1] && g->own[((int64_t)time * grid[1] + y) * grid[2] + x];
}

/* Lines of this width around the tokens of the query block. */
static void draw_outline(picture *p, const gaze *g, int time, int x, int y, int w, int h, int width) {
    const int *grid = g->t->grid;
    for (int j = 0; j < grid[1]; j++)
        for (int i = 0; i < grid[2]; i++) {
            int x0 = x + i * w / grid[2], x1 = x + (i + 1) * w / grid[2];
            int y0 = y + j * h / grid[1], y1 = y + (j + 1) * h / grid[1];
            if (!is_own(g, time, j, i)) continue;
            if (!is_own(g, time, j - 1, i)) fill(p, x0, y0, x1 - x0, width, outline);
            if (!is_own(g, time, j + 1, i)) fill(p, x0, y1 - width, x1 - x0, width, outline);
            if (!is_own(g, time, j, i - 1)) fill(p, x0, y0, width, y1 - y0, outline);
            if (!is_own(g, time, j, i + 1)) fill(p, x1 - width, y0, width, y1 - y0, outline);
        }
}

static void draw_frame(picture *p, const gaze *g, int time, int x, int y, int w, int h) {
    const int *grid = g->t->grid;
    for (int j = 0; j < h; j++)
        for (int i = 0; i < w; i++) {
            double from[3];
            int64_t token = ((int64_t)time * grid[1] + j * grid[1] / h) * grid[2] + i * grid[2] / w;
            film_pixel(g->f, time, i, j, w, h, from);
            tint(from, g->level[token], pixel(p, x + i, y + j));
        }
    draw_outline(p, g, time, x, y, w, h, w < 200 ? 2 : 3);
}

/* The frames of the chosen times under one another in rows of this many, with their numbers below. */
static void draw_frames(picture *p, const gaze *g, int x, int y, int columns, int w, int h, int gap) {
    for (int i = 0; i < g->n_times; i++) {
        int left = x + i % columns * (w + gap), top = y + i / columns * (h + FRAME_LABEL);
        char label[32];
        snprintf(label, sizeof label, "frame %d", g->times[i] * g->f->tubelet);
        draw_frame(p, g, g->times[i], left, top, w, h);
        draw_text_in(p, left, top + h + 5, w, label, pale_ink);
    }
}

static void draw_gaze_legend(picture *p, const gaze *g, int y) {
    int x = draw_legend(p, g->share, MARGIN, y, p->width - 2 * MARGIN - key_width(p, "query block"));
    draw_key(p, x, y, outline, "query block");
}

static void gaze_text(char *text, size_t size, const gaze *g) {
    char layer[32];
    layer_name(layer, sizeof layer, g->t, g->layer);
    snprintf(text, size, "At which level query block %lld reads the clip (%s, head %d)", (long long)g->block, layer,
             g->head);
}

static picture draw_frames_picture(const gaze *g, const caption *c) {
    const seen *f = g->f;
    int columns = g->n_times < 4 ? g->n_times : 4, rows = (g->n_times + columns - 1) / columns;
    int w = FRAME_WIDTH, h = w * f->height / f->width, inner = columns * (w + FRAME_GAP) - FRAME_GAP;
    int wide = inner > LEGEND_WIDTH ? inner : LEGEND_WIDTH;
    char text[128];
    picture p = new_picture(wide + 2 * MARGIN, 2 * MARGIN + 64 + rows * (h + FRAME_LABEL) + 8 + TEXT_HEIGHT);
    gaze_text(text, sizeof text, g);
    draw_title(&p, c->title);
    draw_text_in(&p, MARGIN, MARGIN + 34, wide, text, pale_ink);
    draw_frames(&p, g, MARGIN, MARGIN + 64, columns, w, h, FRAME_GAP);
    draw_gaze_legend(&p, g, p.height - MARGIN - TEXT_HEIGHT);
    return p;
}

/* ---- level maps ------------------------------------------------------------------------------------------------- */

/* The side of a level map: whole pixels per KV block where there is room for them. */
static int map_side(const trace *t, int room) {
    return t->nk <= room ? (int)(room / t->nk * t->nk) : room;
}

/* Where the maps stand, in pixels. */
typedef struct atlas {
    int side, text, label, gap, x, y, pitch_x, pitch_y;
} atlas;

static atlas lay_out_maps(const trace *t) {
    atlas a;
    double room = sqrt(most_map_pixels / ((double)t->layers * t->heads));
    a.side = map_side(t, room > MOST_MAP ? MOST_MAP : room < LEAST_MAP ? LEAST_MAP : (int)room);
    a.text = a.side < 100 ? 1 : 2;
    a.gap = 4 + 4 * a.text;
    a.label = 52 * a.text;
    a.pitch_x = a.side + a.gap;
    a.pitch_y = a.side + a.gap + LINE * a.text;
    a.x = MARGIN + a.label;
    a.y = MARGIN + 90 + LINE * a.text;
    return a;
}

static void draw_map_labels(picture *p, const trace *t, const atlas *a) {
    char label[32];
    for (int i = 0; i < t->heads; i++) {
        snprintf(label, sizeof label, a->side < 40 * a->text ? "%d" : "head %d", i);
        draw_text_centred(p, a->x + i * a->pitch_x + a->side / 2, a->y - LINE * a->text - 2, label, pale_ink);
    }
    for (int i = 0; i < t->layers; i++) {
        layer_name(label, sizeof label, t, i);
        int y = a->y + i * a->pitch_y + (a->side - 8 * a->text) / 2;
        draw_text_in(p, a->x - a->label, y, a->label, label, pale_ink);
    }
}

static void draw_maps(picture *p, const trace *t, const atlas *a) {
    for (int i = 0; i < t->layers * t->heads; i++) {
        int x = a->x + i % t->heads * a->pitch_x, y = a->y + i / t->heads * a->pitch_y;
        char label[32];
        draw_levels(p, head_levels(t, 0, i), t->nq, t->nk, x, y, a->side, a->side);
        snprintf(label, sizeof label, a->side < 80 * a->text ? "%.3f" : "density %.3f", t->density[i]);
        if (text_width(p, label) <= a->side)
            draw_text_centred(p, x + a->side / 2, y + a->side + 2 + a->text, label, ink);
    }
}

static void share_of_levels(const trace *t, double share[LEVELS]) {
    int64_t count[LEVELS] = {0}, n = t->layers * t->heads * t->nq * t->nk;
    for (int64_t i = 0; i < n; i++) count[level_index(t->levels[i])]++;
    for (int i = 0; i < LEVELS; i++) share[i] = (double)count[i] / (double)n;
}

static picture draw_levels_picture(const trace *t, const caption *c) {
    atlas a = lay_out_maps(t);
    int inner = a.label + t->heads * a.pitch_x - a.gap, wide = inner > MAPS_WIDTH ? inner : MAPS_WIDTH;
    double share[LEVELS];
    char text[128];
    picture p = new_picture(wide + 2 * MARGIN, a.y + t->layers * a.pitch_y + 12 + TEXT_HEIGHT + MARGIN);
    draw_title(&p, c->title);
    snprintf(text, sizeof text, "Level maps, down: %lld query blocks of %d tokens", (long long)t->nq, t->block_q);
    draw_text_in(&p, MARGIN, MARGIN + 34, wide, text, pale_ink);
    snprintf(text, sizeof text, "across: %lld KV blocks of %d tokens", (long long)t->nk, t->block_k);
    draw_text_in(&p, MARGIN, MARGIN + 56, wide, text, pale_ink);
    share_of_levels(t, share);
    draw_legend(&p, share, MARGIN, p.height - MARGIN - TEXT_HEIGHT, wide);
    p.text = a.text;
    draw_map_labels(&p, t, &a);
    draw_maps(&p, t, &a);
    return p;
}

/* ---- density ---------------------------------------------------------------------------------------------------- */

typedef struct spread {
    double least, mean, most;
} spread;

static spread spread_of(const double *x, int n) {
    spread s = {x[0], 0, x[0]};
    for (int i = 0; i < n; i++) {
        s.least = fmin(s.least, x[i]);
        s.most = fmax(s.most, x[i]);
        s.mean += x[i] / n;
    }
    return s;
}

static void draw_density_axis(picture *p, int x, int y, int w, int h, double top) {
    for (int i = 0; i <= 4; i++) {
        char label[32];
        int at = y + h - (int)(0.25 * i / top * h);
        snprintf(label, sizeof label, i < 4 ? "%.2f" : "dense", 0.25 * i);
        fill(p, x, at, w, i % 4 ? 1 : 2, i % 4 ? rule : pale_ink);
        draw_text_right(p, x - 8, at - 7, label, pale_ink);
    }
}

/* A bar to the mean of the heads, a line from the least to the most. */
static void draw_density_bar(picture *p, const spread *s, int x, int y, int w, int h, double top,
                             const unsigned char rgb[3]) {
    int mean = (int)(s->mean / top * h), least = (int)(s->least / top * h), most = (int)(s->most / top * h);
    int middle = x + w / 2, cap = w > 24 ? 6 : w / 4;
    fill(p, x, y + h - mean, w, mean, rgb);
    if (most == least) return;
    fill(p, middle - 1, y + h - most, 2, most - least, ink);
    fill(p, middle - cap, y + h - most - 1, 2 * cap, 2, ink);
    fill(p, middle - cap, y + h - least - 1, 2 * cap, 2, ink);
}

/* Bars of all layers, in the rectangle with its labels. */
static void draw_density(picture *p, const trace *t, int x, int y, int w, int h) {
    char label[32];
    int left = 72, n_encoder = t->layers - t->pooler, every = 1;
    double top = fmax(1, spread_of(t->density, t->layers * t->heads).most) * 1.1;
    x += left;
    w -= left;
    h -= 2 * TEXT_HEIGHT + 6;
    draw_density_axis(p, x, y, w, h, top);
    while ((double)every * w / t->layers < 40) every++;
    for (int i = 0; i < t->layers; i++) {
        spread s = spread_of(t->density + i * t->heads, t->heads);
        int begin = x + i * w / t->layers, room = x + (i + 1) * w / t->layers - begin;
        int bar = room * 3 / 5 > 56 ? 56 : room * 3 / 5 < 2 ? 2 : room * 3 / 5;
        snprintf(label, sizeof label, "%.2f", s.mean);
        if (text_width(p, label) < room)
            draw_text_centred(p, begin + room / 2, y + h - (int)(s.most / top * h) - TEXT_HEIGHT, label, ink);
        draw_density_bar(p, &s, begin + (room - bar) / 2, y, bar, h, top, i < n_encoder ? psa_colour : pooler_colour);
        int number = i < n_encoder ? i : i - n_encoder;
        snprintf(label, sizeof label, "%d", number);
        if (number % every == 0 && (i + every <= n_encoder || i >= n_encoder || !t->pooler))
            draw_text_centred(p, begin + room / 2, y + h + 8, label, pale_ink);
    }
    int split = x + n_encoder * w / t->layers;
    draw_text_in(p, x, y + h + 8 + TEXT_HEIGHT, split - x, "layer", pale_ink);
    if (t->pooler) draw_text_right(p, x + w, y + h + 8 + TEXT_HEIGHT, "pooler", pale_ink);
}

static picture draw_density_picture(const trace *t, const caption *c) {
    char text[128];
    int inner = 960, chart = 360;
    spread s = spread_of(t->density, t->layers * t->heads);
    picture p = new_picture(inner + 2 * MARGIN, MARGIN + 76 + chart + 16 + TEXT_HEIGHT + MARGIN);
    snprintf(text, sizeof text, "Density of attention by layer: mean %.3f, heads from %.3f to %.3f", s.mean, s.least,
             s.most);
    draw_title(&p, c->title);
    draw_text_in(&p, MARGIN, MARGIN + 34, inner, text, pale_ink);
    draw_density(&p, t, MARGIN, MARGIN + 76, inner, chart);
    draw_text(&p, MARGIN, p.height - MARGIN - TEXT_HEIGHT,
              "Bars: mean of the heads. Lines: from the least to the most.", pale_ink);
    return p;
}

/* ---- summary ---------------------------------------------------------------------------------------------------- */

static void draw_heading(picture *p, int x, int y, int w, const char *text) {
    fill(p, x, y - 10, w, 1, rule);
    draw_text_in(p, x, y, w, text, ink);
}

/* The labels, under each the bar of its probability with PSA and, below that, with dense attention. */
static void draw_bars(picture *p, const caption *c, int x, int y, int w) {
    int most = w - 12 - text_width(p, c->has_dense ? "0.000 / 0.000" : "0.000"), height = c->has_dense ? 8 : 14;
    for (int i = 0; i < c->n_bars; i++, y += BAR_PITCH) {
        char text[64];
        snprintf(text, sizeof text, c->has_dense ? "%.3f / %.3f" : "%.3f", c->bars[i].psa, c->bars[i].dense);
        draw_text_in(p, x, y, w, c->bars[i].label, ink);
        fill(p, x, y + 21, 1 + (int)(c->bars[i].psa * (most - 1)), height, psa_colour);
        if (c->has_dense)
            fill(p, x, y + 22 + height, 1 + (int)(c->bars[i].dense * (most - 1)), height, dense_colour);
        draw_text_right(p, x + w, y + 22, text, pale_ink);
    }
}

static void draw_bars_heading(picture *p, const caption *c, int x, int y, int w) {
    draw_heading(p, x, y, w, "Probability");
    if (!c->has_dense) return;
    x = draw_key(p, x + w - key_width(p, "PSA") - key_width(p, "dense") + GAP * p->text, y, psa_colour, "PSA");
    draw_key(p, x, y, dense_colour, "dense");
}

/* Level maps of the first, the middle and the last layer, of those there are. */
static void draw_three_maps(picture *p, const trace *t, int head, int x, int y, int room) {
    int side = map_side(t, room), layers[3] = {0, t->layers / 2, t->layers - 1};
    for (int i = 0; i < 3 && i < t->layers; i++) {
        char name[32], text[64];
        layer_name(name, sizeof name, t, layers[i]);
        snprintf(text, sizeof text, "%s: %.3f", name, t->density[layers[i] * t->heads + head]);
        draw_levels(p, head_levels(t, layers[i], head), t->nq, t->nk, x, y, side, side);
        draw_text_in(p, x, y + side + 6, room, text, pale_ink);
        x += room + 16;
    }
}

static picture draw_summary_picture(const gaze *g, const caption *c) {
    const trace *t = g->t;
    enum { INNER = 1066, ROOM = 192, RIGHT = MARGIN + 3 * (ROOM + 16) + 16, MIDDLE = MARGIN + INNER / 2 + 16 };
    int room = (INNER - 6 * (g->n_times - 1)) / g->n_times, w = room < 256 ? room : 256;
    int h = w * g->f->height / g->f->width;
    int frames = MARGIN + 72, maps = frames + h + FRAME_LABEL + TEXT_HEIGHT + 36, bars = maps + 32 + ROOM + 56;
    int rows = c->n_bars * BAR_PITCH, lines = c->n_lines * (TEXT_HEIGHT + 6);
    char text[128];
    picture p = new_picture(INNER + 2 * MARGIN, bars + 32 + (rows > lines ? rows : lines) + MARGIN - 12);
    draw_title(&p, c->title);
    gaze_text(text, sizeof text, g);
    draw_heading(&p, MARGIN, MARGIN + 44, INNER, text);
    draw_frames(&p, g, MARGIN, frames, g->n_times, w, h, 6);
    draw_gaze_legend(&p, g, frames + h + FRAME_LABEL + 4);
    snprintf(text, sizeof text, "Level maps of head %d, with density", g->head);
    draw_heading(&p, MARGIN, maps, RIGHT - MARGIN - 32, text);
    draw_three_maps(&p, t, g->head, MARGIN, maps + 32, ROOM);
    snprintf(text, sizeof text, "Density by layer, mean %.3f", spread_of(t->density, t->layers * t->heads).mean);
    draw_heading(&p, RIGHT, maps, MARGIN + INNER - RIGHT, text);
    draw_density(&p, t, RIGHT, maps + 32, MARGIN + INNER - RIGHT, ROOM + 26);
    draw_bars_heading(&p, c, MARGIN, bars, INNER / 2 - 16);
    draw_bars(&p, c, MARGIN, bars + 32, INNER / 2 - 16);
    draw_heading(&p, MIDDLE, bars, MARGIN + INNER - MIDDLE, "Run");
    for (int i = 0; i < c->n_lines; i++)
        draw_text_in(&p, MIDDLE, bars + 32 + i * (TEXT_HEIGHT + 6), MARGIN + INNER - MIDDLE, c->lines[i], ink);
    return p;
}

/* ---- files ------------------------------------------------------------------------------------------------------ */

static void save(const char *dir, const char *name, picture p) {
    char *path = join_path(dir, name);
    if (picture_write(&p, path) != 0) die("%s: cannot write the picture: %s", path, strerror(errno));
    free(p.rgb);
    free(path);
}

static void pictures_write(const char *dir, const trace *t, const seen *f, const caption *c, const int query[3],
                           int layer, int head) {
    gaze g;
    if (mkdir(dir, 0777) != 0 && errno != EEXIST) die("%s: cannot make the folder: %s", dir, strerror(errno));
    gaze_init(&g, t, f, query, layer, head);
    save(dir, "frames.png", draw_frames_picture(&g, c));
    save(dir, "levels.png", draw_levels_picture(t, c));
    save(dir, "density.png", draw_density_picture(t, c));
    save(dir, "summary.png", draw_summary_picture(&g, c));
    free(g.level);
    free(g.own);
}
#endif
