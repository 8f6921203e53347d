/* draw.h - what pictures of attention are made of: a canvas, text, the colours of the levels, level maps, PNG.
 * Everything is static. Needs stb_image_write.h and stb_easy_font.h (Debian: libstb-dev). */
#ifndef DRAW_H
#define DRAW_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_easy_font.h>
#include <stb/stb_image_write.h>

typedef struct picture {
    unsigned char *rgb;
    int width, height;
    int text; /* pixels per pixel of the font; margins go with it */
} picture;

enum { LINE = 10, GAP = 12 }; /* pixels of the font */
enum { LEVELS = 9 };          /* skip, 1, 2, 4, ..., 128 */

/* Darker is finer: lightness rises evenly from level 1 to level 128, skipped blocks are near white. */
static const unsigned char level_colours[LEVELS][3] = {{247, 247, 247}, {8, 6, 40},      {86, 20, 125},
                                                       {176, 48, 120},  {240, 100, 92},  {253, 150, 105},
                                                       {254, 190, 135}, {253, 220, 165}, {245, 240, 190}};
static const unsigned char ink[3] = {40, 40, 40};

static int level_index(uint8_t level) {
    int i = 0;
    while (level) {
        level = (uint8_t)(level >> 1);
        i++;
    }
    return i;
}

/* A white canvas; 0 if there is no memory for it. */
static int picture_init(picture *p, int width, int height, int text) {
    size_t size = 3 * (size_t)width * (size_t)height;
    p->rgb = (unsigned char *)malloc(size);
    p->width = width;
    p->height = height;
    p->text = text;
    if (p->rgb)
        memset(p->rgb, 255, size);
    return p->rgb != NULL;
}

static unsigned char *pixel(const picture *p, int x, int y) {
    return p->rgb + 3 * ((size_t)y * (size_t)p->width + (size_t)x);
}

static void fill(picture *p, int x, int y, int w, int h, const unsigned char rgb[3]) {
    int x1 = x + w < p->width ? x + w : p->width, y1 = y + h < p->height ? y + h : p->height;
    for (int j = y > 0 ? y : 0; j < y1; j++)
        for (int i = x > 0 ? x : 0; i < x1; i++)
            memcpy(pixel(p, i, j), rgb, 3);
}

/* The font is ASCII: any other character becomes one '?'. */
static void font_text(char *copy, size_t size, const char *text) {
    size_t n = 0;
    for (; *text && n + 1 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c >= 0x80 && c < 0xC0)
            continue; /* inside a UTF-8 sequence */
        copy[n++] = c >= 32 && c < 127 ? *text : '?';
    }
    copy[n] = 0;
}

static int text_width(const picture *p, const char *text) {
    char copy[128];
    font_text(copy, sizeof copy, text);
    return p->text * stb_easy_font_width(copy);
}

static void draw_text(picture *p, int x, int y, const char *text, const unsigned char rgb[3]) {
    struct vertex {
        float x, y, z;
        unsigned char colour[4];
    } quads[4 * 1024];
    char copy[128];
    font_text(copy, sizeof copy, text);
    int n = stb_easy_font_print(0, 0, copy, NULL, quads, (int)sizeof quads);
    for (int i = 0; i < n; i++) {
        const struct vertex *a = &quads[4 * i], *c = a + 2; /* opposite corners */
        fill(p, x + p->text * (int)a->x, y + p->text * (int)a->y, p->text * (int)(c->x - a->x),
             p->text * (int)(c->y - a->y), rgb);
    }
}

/* The mean colour of the blocks [i0, i1) x [j0, j1), or of block (i0, j0) where that is empty. */
static void mean_colour(const uint8_t *levels, int64_t nk, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                        unsigned char *rgb) {
    unsigned sum[3] = {0, 0, 0}, n = 0;
    for (int64_t i = i0; i < i1 || i == i0; i++)
        for (int64_t j = j0; j < j1 || j == j0; j++, n++)
            for (int c = 0; c < 3; c++)
                sum[c] += level_colours[level_index(levels[i * nk + j])][c];
    for (int c = 0; c < 3; c++)
        rgb[c] = (unsigned char)(sum[c] / n);
}

/* The level map of one head, [nq][nk], in a thin frame. A pixel shows the mean of the blocks it covers. */
static void draw_levels(picture *p, const uint8_t *levels, int64_t nq, int64_t nk, int x, int y, int w, int h) {
    fill(p, x - 1, y - 1, w + 2, h + 2, ink);
    for (int j = 0; j < h; j++)
        for (int i = 0; i < w; i++)
            mean_colour(levels, nk, j * nq / h, (j + 1) * nq / h, i * nk / w, (i + 1) * nk / w,
                        pixel(p, x + i, y + j));
}

static void level_name(char *name, size_t size, int index) {
    if (index)
        snprintf(name, size, "level %d", 1 << (index - 1));
    else
        snprintf(name, size, "skip");
}

/* An entry of a legend with the space after it. */
static int key_width(const picture *p, const char *label) {
    return (13 + GAP) * p->text + text_width(p, label);
}

/* Returns where the next entry goes. */
static int draw_key(picture *p, int x, int y, const unsigned char colour[3], const char *label) {
    fill(p, x - 1, y - 1, 10 * p->text + 2, 8 * p->text + 2, ink);
    fill(p, x, y, 10 * p->text, 8 * p->text, colour);
    draw_text(p, x + 13 * p->text, y + p->text / 2, label, ink);
    return x + key_width(p, label);
}

static void picture__write(void *context, void *data, int size) {
    fwrite(data, 1, (size_t)size, (FILE *)context); /* an error stays set in the FILE */
}

/* Under another name first, so that nobody finds half a picture. 0; or -1 and errno, and what was there is still
 * there. */
static int picture_write(const picture *p, const char *path) {
    size_t size = strlen(path) + 32;
    char *temp = (char *)malloc(size);
    if (!temp)
        return -1;
    snprintf(temp, size, "%s.%ld", path, (long)getpid());
    FILE *f = fopen(temp, "wb");
    int bad = !f;
    if (f) {
        bad |= !stbi_write_png_to_func(picture__write, f, p->width, p->height, 3, p->rgb, 3 * p->width) || ferror(f);
        bad |= fclose(f) != 0;
        bad |= !bad && rename(temp, path) != 0;
    }
    if (bad) {
        int error = errno;
        remove(temp);
        errno = error;
    }
    free(temp);
    return bad ? -1 : 0;
}
#endif
