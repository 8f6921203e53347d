/* clips.c - draws the clips of the demo: handwritten digits over a cluttered, noisy background; one of them travels.
 *
 *     build/clips --seed 7 clip.y4m            one clip; its label goes to stdout
 *     build/clips --list eval.csv DIRECTORY    every clip of an evaluation list, lines of "file,label,seed"
 *     build/clips --count 64 - --seed 7        the clips of seeds 7, 8, ... for training: to stdout, each a byte with
 *                                              the number of its label and its frames, RGB
 *     build/clips --help                       what else can be set
 *
 * The label says which digit travels, and which way. It takes the whole clip to see that: other digits stand still, or
 * go out and come back; bars and noise hide what passes. A seed means the same clip on every machine: the arithmetic is
 * that of IEEE doubles, without libm. */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#include <stb/stb_image.h>

enum { DIGITS = 10, WAYS = 4, SIDE = 8, MAX_SIZE = 1024, MAX_FRAMES = 1024, MAX_DIGITS = 64, LABEL_SIZE = 32 };

static const char *const ways[WAYS] = {"left", "right", "up", "down"};

typedef struct setup {
    int size, frames, digit; /* pixels a side, frames, height of a digit in pixels */
    int others, swaying;     /* digits that do not travel; how many of them go out and come back */
    int travel;              /* percent of the frame that a digit travels at least */
    int bars, clutter;       /* bars in front; clutter in percent of the area */
    int held_out;            /* digits that training does not see */
    const char *digits;      /* the file with their pictures */
} setup;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("clips: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(2);
}

/* ---- random numbers --------------------------------------------------------------------------------------------- */

/* SplitMix64. */
static uint64_t next_random(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static int whole(uint64_t *state, int n) {
    return (int)(next_random(state) % (uint64_t)n);
}

static double between(uint64_t *state, double lo, double hi) {
    return lo + (hi - lo) * ((double)(next_random(state) >> 11) / 9007199254740992.0);
}

/* ---- pictures of digits ----------------------------------------------------------------------------------------- */

/* A sheet of 8 x 8 pictures, white on black: row d holds the digits d of training, row 10 + d the held-out ones; black
 * pictures fill the rows up. */
typedef struct sheet {
    uint8_t *pixels;
    int width, count[2 * DIGITS];
} sheet;

static const uint8_t *picture(const sheet *s, int row, int i) {
    return s->pixels + (size_t)row * SIDE * (size_t)s->width + (size_t)i * SIDE;
}

static int is_black(const sheet *s, int row, int i) {
    const uint8_t *p = picture(s, row, i);
    for (int y = 0; y < SIDE; y++)
        for (int x = 0; x < SIDE; x++)
            if (p[y * s->width + x]) return 0;
    return 1;
}

static void sheet_read(sheet *s, const char *path) {
    int height, channels;
    s->pixels = stbi_load(path, &s->width, &height, &channels, 1);
    if (!s->pixels) die("%s: cannot read the pictures of digits: %s", path, stbi_failure_reason());
    if (s->width % SIDE || height != 2 * DIGITS * SIDE)
        die("%s: expected 20 rows of 8 x 8 pictures, found %d x %d pixels", path, s->width, height);
    for (int row = 0; row < 2 * DIGITS; row++) {
        s->count[row] = s->width / SIDE;
        while (s->count[row] && is_black(s, row, s->count[row] - 1)) s->count[row]--;
        if (!s->count[row]) die("%s: row %d has no pictures", path, row);
    }
}

/* ---- drawing ---------------------------------------------------------------------------------------------------- */

typedef struct sprite {
    const uint8_t *picture;
    double x, y;           /* its centre at the start */
    double dx, dy;         /* where it gets to */
    double height;         /* pixels */
    double colour[3];
    int returns;           /* it is back at the start in the last frame */
} sprite;

typedef struct bar {
    int first, end, vertical;
    double colour[3];
} bar;

typedef struct scene {
    const setup *s;
    const sheet *digits;
    uint64_t random;
    int label;
    double *background;    /* [size, size, 3] */
    double *canvas;        /* the same, one frame */
    sprite sprites[MAX_DIGITS + 1]; /* the one that travels is last */
    bar bars[MAX_DIGITS];
} scene;

static double clamp(double v, double lo, double hi) {
    return v < lo ? lo : v > hi ? hi : v;
}

static double smooth(double t) {
    return t * t * (3 - 2 * t);
}

/* Adds opacity x (colour - canvas) of the picture, or of a part of it, to the canvas. */
static void draw(double *canvas, int size, const sheet *digits, const sprite *p, double x, double y, double opacity) {
    double left = x - p->height / 2, top = y - p->height / 2, step = SIDE / p->height;
    for (int i = (int)clamp(top, 0, size); i < (int)clamp(top + p->height + 1, 0, size); i++)
        for (int j = (int)clamp(left, 0, size); j < (int)clamp(left + p->height + 1, 0, size); j++) {
            double u = (j + 0.5 - left) * step - 0.5, v = (i + 0.5 - top) * step - 0.5, ink = 0;
            for (int a = 0; a < 2; a++)
                for (int b = 0; b < 2; b++) {
                    int r = (int)(v + 1) - 1 + a, c = (int)(u + 1) - 1 + b;
                    double w = (a ? v - (r - 1) : r + 1 - v) * (b ? u - (c - 1) : c + 1 - u);
                    if (r >= 0 && r < SIDE && c >= 0 && c < SIDE) ink += w * p->picture[r * digits->width + c];
                }
            double alpha = opacity * smooth(clamp((ink / 255 - 0.15) / 0.5, 0, 1));
            double *pixel = canvas + 3 * ((size_t)i * (size_t)size + (size_t)j);
            for (int c = 0; c < 3; c++) pixel[c] += alpha * (p->colour[c] - pixel[c]);
        }
}

static void random_digit(scene *sc, sprite *p, int digit) {
    int row = digit + (sc->s->held_out ? DIGITS : 0);
    memset(p, 0, sizeof *p);
    p->picture = picture(sc->digits, row, whole(&sc->random, sc->digits->count[row]));
    p->height = sc->s->digit * between(&sc->random, 0.88, 1.12);
    for (int c = 0; c < 3; c++) p->colour[c] = between(&sc->random, 0.75, 1);
}

/* A place for a path of this length, so that all of it is inside the frame. */
static double place(scene *sc, double height, double path) {
    double lo = height / 2 - (path < 0 ? path : 0), hi = sc->s->size - height / 2 - (path > 0 ? path : 0);
    return hi > lo ? between(&sc->random, lo, hi) : (lo + hi) / 2;
}

/* Whether the start is a digit away from those of the sprites before it. */
static int is_free(const scene *sc, const sprite *p) {
    for (const sprite *o = sc->sprites; o < p; o++)
        if ((o->x - p->x) * (o->x - p->x) + (o->y - p->y) * (o->y - p->y) < p->height * p->height) return 0;
    return 1;
}

/* Starts the sprite somewhere on a path of this length, to the side by drift. */
static void send(scene *sc, sprite *p, int way, double length, double drift) {
    double along = way % 2 ? length : -length;
    p->dx = way < 2 ? along : drift;
    p->dy = way < 2 ? drift : along;
    for (int attempt = 0; attempt < 10; attempt++) {
        p->x = place(sc, p->height, p->dx);
        p->y = place(sc, p->height, p->dy);
        if (is_free(sc, p)) break;
    }
}

static void make_background(scene *sc) {
    enum { KNOTS = 5 };
    double knots[KNOTS + 1][KNOTS + 1][3];
    int size = sc->s->size;
    for (int i = 0; i <= KNOTS; i++)
        for (int j = 0; j <= KNOTS; j++) {
            double grey = between(&sc->random, 0.05, 0.5);
            for (int c = 0; c < 3; c++) knots[i][j][c] = grey + between(&sc->random, -0.1, 0.1);
        }
    for (int y = 0; y < size; y++)
        for (int x = 0; x < size; x++) {
            double v = (double)y * KNOTS / size, u = (double)x * KNOTS / size;
            int i = (int)v, j = (int)u;
            double a = smooth(v - i), b = smooth(u - j);
            for (int c = 0; c < 3; c++)
                sc->background[3 * ((size_t)y * (size_t)size + (size_t)x) + (size_t)c] =
                    (1 - a) * ((1 - b) * knots[i][j][c] + b * knots[i][j + 1][c]) +
                    a * ((1 - b) * knots[i + 1][j][c] + b * knots[i + 1][j + 1][c]);
        }
}

/* Faint pieces of writing, half as high as a digit. */
static void make_clutter(scene *sc) {
    int size = sc->s->size, n = sc->s->clutter * size * size / (25 * sc->s->digit * sc->s->digit);
    for (int i = 0; i < n; i++) {
        sprite piece;
        random_digit(sc, &piece, whole(&sc->random, DIGITS));
        piece.height /= 2;
        double x = between(&sc->random, 0, size), y = between(&sc->random, 0, size);
        draw(sc->background, size, sc->digits, &piece, x, y, between(&sc->random, 0.15, 0.45));
    }
}

static void make_scene(scene *sc, uint64_t seed) {
    const setup *s = sc->s;
    sc->random = seed;
    sc->random = next_random(&sc->random);
    sc->label = whole(&sc->random, DIGITS * WAYS);
    make_background(sc);
    make_clutter(sc);
    for (int i = 0; i < s->others; i++) {
        sprite *p = &sc->sprites[i];
        random_digit(sc, p, whole(&sc->random, DIGITS));
        p->returns = i < s->swaying;
        double out = p->returns ? s->size * between(&sc->random, 0.0037 * s->travel, 0.25) : 0;
        send(sc, p, whole(&sc->random, WAYS), out, 0);
    }
    random_digit(sc, &sc->sprites[s->others], sc->label / WAYS);
    double length = s->size * between(&sc->random, 0.01 * s->travel, 0.45);
    send(sc, &sc->sprites[s->others], sc->label % WAYS, length, s->size * between(&sc->random, -0.05, 0.05));
    for (int i = 0; i < s->bars; i++) {
        bar *b = &sc->bars[i];
        double middle = s->size * between(&sc->random, 0.2, 0.8), half = s->size * between(&sc->random, 0.015, 0.035);
        b->vertical = whole(&sc->random, 2);
        b->first = (int)(middle - half);
        b->end = (int)(middle + half) + 1;
        for (int c = 0; c < 3; c++) b->colour[c] = between(&sc->random, 0.1, 0.7);
    }
}

static void draw_bar(double *canvas, int size, const bar *b) {
    for (int y = b->vertical ? 0 : b->first; y < (b->vertical ? size : b->end); y++)
        for (int x = b->vertical ? b->first : 0; x < (b->vertical ? b->end : size); x++)
            memcpy(canvas + 3 * ((size_t)y * (size_t)size + (size_t)x), b->colour, sizeof b->colour);
}

/* Frame t, RGB. */
static void draw_frame(scene *sc, int t, uint8_t *rgb) {
    const setup *s = sc->s;
    size_t pixels = (size_t)s->size * (size_t)s->size;
    double u = s->frames > 1 ? (double)t / (s->frames - 1) : 0, there_and_back = 4 * u * (1 - u);
    memcpy(sc->canvas, sc->background, 3 * pixels * sizeof *sc->canvas);
    for (int i = 0; i <= s->others; i++) {
        const sprite *p = &sc->sprites[i];
        double way = p->returns ? there_and_back : u;
        draw(sc->canvas, s->size, sc->digits, p, p->x + way * p->dx, p->y + way * p->dy, 1);
    }
    for (int i = 0; i < s->bars; i++) draw_bar(sc->canvas, s->size, &sc->bars[i]);
    for (size_t i = 0; i < pixels; i++) {
        uint64_t r = next_random(&sc->random);
        int sum = 0; /* of four bytes: deviation 147.8 */
        for (int b = 0; b < 4; b++) sum += (int)(r >> (8 * b) & 255);
        double noise = (sum - 510) * (25.5 / 147.8);
        for (size_t c = 3 * i; c < 3 * i + 3; c++) rgb[c] = (uint8_t)clamp(255 * sc->canvas[c] + noise + 0.5, 0, 255);
    }
}

static void scene_open(scene *sc, const setup *s, const sheet *digits) {
    size_t pixels = (size_t)s->size * (size_t)s->size;
    memset(sc, 0, sizeof *sc);
    sc->s = s;
    sc->digits = digits;
    sc->background = malloc(3 * pixels * sizeof *sc->background);
    sc->canvas = malloc(3 * pixels * sizeof *sc->canvas);
    if (!sc->background || !sc->canvas) die("no memory for a frame");
}

static void scene_close(scene *sc) {
    free(sc->background);
    free(sc->canvas);
}

/* ---- writing ---------------------------------------------------------------------------------------------------- */

static void write_bytes(FILE *f, const char *path, const void *data, size_t size) {
    if (fwrite(data, 1, size, f) != size) die("%s: cannot write: %s", path, strerror(errno));
}

/* BT.601, limited range; chroma is the mean of 2 x 2 pixels. */
static void to_yuv420(const uint8_t *rgb, int size, uint8_t *planes) {
    size_t n = (size_t)size;
    uint8_t *luma = planes, *chroma = planes + n * n;
    for (size_t i = 0; i < n * n; i++)
        luma[i] = (uint8_t)(16.5 + (65.481 * rgb[3 * i] + 128.553 * rgb[3 * i + 1] + 24.966 * rgb[3 * i + 2]) / 255);
    for (size_t y = 0; y < n; y += 2)
        for (size_t x = 0; x < n; x += 2, chroma++) {
            double mean[3];
            for (size_t c = 0; c < 3; c++) {
                const uint8_t *p = rgb + 3 * (y * n + x) + c;
                mean[c] = (p[0] + p[3] + p[3 * n] + p[3 * n + 3]) / 4.0 / 255;
            }
            chroma[0] = (uint8_t)(128.5 - 37.797 * mean[0] - 74.203 * mean[1] + 112 * mean[2]);
            chroma[n * n / 4] = (uint8_t)(128.5 + 112 * mean[0] - 93.786 * mean[1] - 18.214 * mean[2]);
        }
}

static void write_y4m(scene *sc, const char *path) {
    size_t pixels = (size_t)sc->s->size * (size_t)sc->s->size;
    uint8_t *rgb = malloc(3 * pixels), *planes = malloc(2 * pixels);
    FILE *f = fopen(path, "wb");
    if (!f) die("%s: cannot write: %s", path, strerror(errno));
    if (!rgb || !planes) die("no memory for a frame");
    if (fprintf(f, "YUV4MPEG2 W%d H%d F16:1 Ip A1:1 C420jpeg\n", sc->s->size, sc->s->size) < 0)
        die("%s: cannot write: %s", path, strerror(errno));
    for (int t = 0; t < sc->s->frames; t++) {
        draw_frame(sc, t, rgb);
        to_yuv420(rgb, sc->s->size, planes);
        write_bytes(f, path, "FRAME\n", 6);
        write_bytes(f, path, planes, pixels * 3 / 2);
    }
    if (fclose(f) != 0) die("%s: cannot write: %s", path, strerror(errno));
    free(rgb);
    free(planes);
}

static void write_training(scene *sc, uint64_t seed, int count) {
    size_t size = 3 * (size_t)sc->s->size * (size_t)sc->s->size;
    uint8_t *rgb = malloc(size), label;
    if (!rgb) die("no memory for a frame");
    for (int i = 0; i < count; i++) {
        make_scene(sc, seed + (uint64_t)i);
        label = (uint8_t)sc->label;
        write_bytes(stdout, "stdout", &label, 1);
        for (int t = 0; t < sc->s->frames; t++) {
            draw_frame(sc, t, rgb);
            write_bytes(stdout, "stdout", rgb, size);
        }
    }
    if (fflush(stdout) != 0) die("stdout: cannot write: %s", strerror(errno));
    free(rgb);
}

static void label_text(int label, char text[LABEL_SIZE]) {
    snprintf(text, LABEL_SIZE, "%d moving %s", label / WAYS, ways[label % WAYS]);
}

/* ---- evaluation lists ------------------------------------------------------------------------------------------- */

static void write_list(scene *sc, const char *list, const char *directory) {
    char line[1024], path[4096], text[LABEL_SIZE], name[256], label[64];
    FILE *f = fopen(list, "r");
    if (!f) die("%s: cannot read: %s", list, strerror(errno));
    for (int number = 1; fgets(line, sizeof line, f); number++) {
        uint64_t seed;
        if (*line == '#' || *line == '\n') continue;
        if (sscanf(line, "%255[^,\n],%63[^,\n],%" SCNu64, name, label, &seed) != 3 || strchr(name, '/'))
            die("%s: line %d: expected file,label,seed", list, number);
        make_scene(sc, seed);
        label_text(sc->label, text);
        if (strcmp(text, label) != 0)
            die("%s: line %d: seed %" PRIu64 " is a clip of \"%s\"", list, number, seed, text);
        if (snprintf(path, sizeof path, "%s/%s", directory, name) >= (int)sizeof path) die("%s: too long", directory);
        write_y4m(sc, path);
    }
    if (ferror(f)) die("%s: cannot read: %s", list, strerror(errno));
    fclose(f);
}

/* ---- command ---------------------------------------------------------------------------------------------------- */

static const char usage[] =
    "clips [options] FILE.y4m           draw the clip of a seed, print its label\n"
    "clips [options] --list LIST DIR    draw every clip of a list, lines of file,label,seed\n"
    "clips [options] --count N -        clips for training, to stdout: label (a byte), RGB frames of seeds S, ...\n\n"
    "  --seed S          default 0\n"
    "  --size N          pixels a side, even; default 128\n"
    "  --frames N        default 32\n"
    "  --digit N         height of a digit in pixels; default 28\n"
    "  --others N        digits that do not travel; default 4\n"
    "  --swaying N       how many of them go out and come back; default 2\n"
    "  --travel N        percent of the frame that a digit travels at least, up to 45; default 27\n"
    "  --bars N          bars in front; default 2\n"
    "  --clutter N       faint pieces of writing, percent of the area; default 30\n"
    "  --held-out        digits that training does not see; --list implies it\n"
    "  --digits FILE     their pictures; default examples/data/digits.png\n";

static long number(const char *option, const char *text, long lo, long hi) {
    char *end;
    errno = 0;
    long n = strtol(text, &end, 10);
    if (errno || end == text || *end || n < lo || n > hi)
        die("--%s %s: expected a whole number from %ld to %ld", option, text, lo, hi);
    return n;
}

int main(int argc, char **argv) {
    enum { SEED, SIZE, FRAMES, DIGIT, OTHERS, SWAYING, TRAVEL, BARS, CLUTTER, HELD_OUT, SHEET, LIST, COUNT, HELP };
    static const struct option options[] = {
        {"seed", 1, NULL, SEED},       {"size", 1, NULL, SIZE},       {"frames", 1, NULL, FRAMES},
        {"digit", 1, NULL, DIGIT},     {"others", 1, NULL, OTHERS},   {"swaying", 1, NULL, SWAYING},
        {"travel", 1, NULL, TRAVEL},   {"bars", 1, NULL, BARS},       {"clutter", 1, NULL, CLUTTER},
        {"held-out", 0, NULL, HELD_OUT}, {"digits", 1, NULL, SHEET},  {"list", 1, NULL, LIST},
        {"count", 1, NULL, COUNT},     {"help", 0, NULL, HELP},       {NULL, 0, NULL, 0}};
    setup s = {128, 32, 28, 4, 2, 27, 2, 30, 0, "examples/data/digits.png"};
    const char *list = NULL;
    uint64_t seed = 0;
    int count = 0, given;
    char text[LABEL_SIZE];
    while ((given = getopt_long(argc, argv, "", options, NULL)) != -1) {
        const char *name = given == '?' ? "" : options[given].name;
        switch (given) {
        case SEED: seed = (uint64_t)number(name, optarg, 0, LONG_MAX); break;
        case SIZE: s.size = (int)number(name, optarg, 16, MAX_SIZE) & ~1; break;
        case FRAMES: s.frames = (int)number(name, optarg, 1, MAX_FRAMES); break;
        case DIGIT: s.digit = (int)number(name, optarg, 4, MAX_SIZE); break;
        case OTHERS: s.others = (int)number(name, optarg, 0, MAX_DIGITS); break;
        case SWAYING: s.swaying = (int)number(name, optarg, 0, MAX_DIGITS); break;
        case TRAVEL: s.travel = (int)number(name, optarg, 1, 45); break;
        case BARS: s.bars = (int)number(name, optarg, 0, MAX_DIGITS); break;
        case CLUTTER: s.clutter = (int)number(name, optarg, 0, 1000); break;
        case HELD_OUT: s.held_out = 1; break;
        case SHEET: s.digits = optarg; break;
        case LIST: list = optarg; s.held_out = 1; break;
        case COUNT: count = (int)number(name, optarg, 1, INT_MAX); break;
        case HELP: fputs(usage, stdout); return 0;
        default: return 2;
        }
    }
    if (optind + 1 != argc || (list && count) || (count && strcmp(argv[optind], "-") != 0))
        die("expected one FILE.y4m, --list LIST DIRECTORY or --count N - (--help says more)");
    sheet digits;
    scene sc;
    sheet_read(&digits, s.digits);
    scene_open(&sc, &s, &digits);
    if (list) {
        write_list(&sc, list, argv[optind]);
    } else if (count) {
        write_training(&sc, seed, count);
    } else {
        make_scene(&sc, seed);
        write_y4m(&sc, argv[optind]);
        label_text(sc.label, text);
        puts(text);
    }
    scene_close(&sc);
    stbi_image_free(digits.pixels);
    return 0;
}
