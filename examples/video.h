/* video.h - RGB frames of a clip, one after the other: any video through ffmpeg, .y4m without it, frames in a .npy.
 * A clip is read twice: to count its frames, and for the frames themselves. One frame is in memory.
 * Compressed video needs ffmpeg 5.1 or newer in PATH. */
#ifndef VIDEO_H
#define VIDEO_H

#include "common.h"
#include "npy.h"
#include <ctype.h>
#include <fcntl.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define FRAME_MAX_SIDE 16384

typedef struct video {
    const char *path;
    int64_t n_frames, next;           /* next: number of the frame that video_read gives */
    int width, height;                /* of the frame in rgb */
    uint8_t *rgb;                     /* [height, width, 3] */
    const struct video_format *format;
    FILE *file;                       /* y4m: the file; ffmpeg: its output */
    pid_t ffmpeg;
    FILE *messages;                   /* ffmpeg: its stderr */
    int sub_x, sub_y, mono, full;     /* y4m: log2 of the chroma subsampling, no chroma, full range */
    uint8_t *planes;                  /* y4m: one frame as stored */
    npy frames;                       /* npy: [n_frames, height, width, 3] */
} video;

static void video_open(video *v, const char *path);      /* y4m, or whatever ffmpeg understands */
static void video_open_npy(video *v, const char *path);  /* u8 [frames, height, width, 3] */
static void video_read(video *v);                        /* the next frame into v->rgb, width, height */
static void video_close(video *v);

typedef struct video_format {
    void (*read)(video *v);
    void (*close)(video *v);
} video_format;

/* Makes room for a frame of this size. Returns bytes per plane. */
static size_t frame_size(video *v, int width, int height) {
    if (width < 1 || height < 1 || width > FRAME_MAX_SIDE || height > FRAME_MAX_SIDE)
        die("%s: expected frames of 1 to %d pixels a side, found %d x %d", v->path, FRAME_MAX_SIDE, width, height);
    if (width != v->width || height != v->height) {
        free(v->rgb);
        v->rgb = alloc((size_t)width * (size_t)height, 3);
        v->width = width;
        v->height = height;
    }
    return (size_t)width * (size_t)height;
}

/* ---- .npy ------------------------------------------------------------------------------------------------------- */

static void npy_next(video *v) {
    size_t size = 3 * (size_t)v->width * (size_t)v->height;
    memcpy(v->rgb, (const uint8_t *)v->frames.data + (size_t)v->next * size, size);
}

static void npy_close(video *v) {
    npy_free(&v->frames);
}

static const video_format npy_format = {npy_next, npy_close};

static void video_open_npy(video *v, const char *path) {
    char err[512];
    memset(v, 0, sizeof *v);
    v->path = path;
    v->format = &npy_format;
    if (npy_read(path, &v->frames, err, sizeof err) != 0) die("%s", err);
    const int64_t *shape = v->frames.shape;
    if (strcmp(v->frames.descr, "|u1") != 0 || v->frames.ndim != 4 || shape[3] != 3)
        die("%s: expected uint8 frames [frames, height, width, 3]", path);
    if (shape[1] > FRAME_MAX_SIDE || shape[2] > FRAME_MAX_SIDE)
        die("%s: a frame is larger than %d pixels a side", path, FRAME_MAX_SIDE);
    v->n_frames = shape[0];
    frame_size(v, (int)shape[2], (int)shape[1]);
}

/* ---- y4m -------------------------------------------------------------------------------------------------------- */

/* Reads a line of at most size - 1 bytes and cuts the newline off. 0 at the end of the file. */
static int read_line(FILE *f, char *line, size_t size, const char *path) {
    if (!fgets(line, (int)size, f)) return 0;
    size_t n = strlen(line);
    if (!n || line[n - 1] != '\n') die("%s: expected a header line of text, found \"%.20s\"", path, line);
    line[n - 1] = 0;
    return 1;
}

static void y4m_colour(video *v, const char *name) {
    static const struct {
        const char *name;
        int sub_x, sub_y, mono;
    } spaces[] = {{"420", 1, 1, 0}, {"420jpeg", 1, 1, 0}, {"420mpeg2", 1, 1, 0}, {"420paldv", 1, 1, 0},
                  {"422", 1, 0, 0}, {"444", 0, 0, 0},     {"mono", 0, 0, 1}};
    for (size_t i = 0; i < sizeof spaces / sizeof spaces[0]; i++)
        if (strcmp(spaces[i].name, name) == 0) {
            v->sub_x = spaces[i].sub_x;
            v->sub_y = spaces[i].sub_y;
            v->mono = spaces[i].mono;
            return;
        }
    die("%s: expected 8-bit y4m colour 420, 422, 444 or mono, found %s", v->path, name);
}

/* Parses the stream header and leaves the file at the first frame. */
static void y4m_header(video *v) {
    char line[1024], *field;
    int width = 0, height = 0;
    if (!read_line(v->file, line, sizeof line, v->path)) die("%s: the file is empty", v->path);
    y4m_colour(v, "420");
    for (field = strtok(line, " "); field; field = strtok(NULL, " ")) {
        if (*field == 'W') width = atoi(field + 1);
        if (*field == 'H') height = atoi(field + 1);
        if (*field == 'C') y4m_colour(v, field + 1);
        if (strcmp(field, "XCOLORRANGE=FULL") == 0) v->full = 1;
    }
    frame_size(v, width, height);
}

static int ceil_shift(int n, int shift) {
    return (n + (1 << shift) - 1) >> shift;
}

static size_t y4m_frame_bytes(const video *v) {
    size_t chroma = (size_t)ceil_shift(v->width, v->sub_x) * (size_t)ceil_shift(v->height, v->sub_y);
    return (size_t)v->width * (size_t)v->height + (v->mono ? 0 : 2 * chroma);
}

/* Reads the planes of the next frame. 0 at the end of the file. */
static int y4m_planes(video *v) {
    char line[1024];
    if (!read_line(v->file, line, sizeof line, v->path)) return 0;
    if (strncmp(line, "FRAME", 5) != 0) die("%s: expected FRAME, found \"%.20s\"", v->path, line);
    size_t size = y4m_frame_bytes(v);
    if (fread(v->planes, 1, size, v->file) != size) die("%s: the last frame is cut short", v->path);
    return 1;
}

static uint8_t to_byte(double v) {
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v + 0.5);
}

/* BT.601, chroma replicated. */
static void y4m_next(video *v) {
    if (!y4m_planes(v)) die("%s: the file ends before frame %lld", v->path, (long long)v->next);
    size_t stride = (size_t)ceil_shift(v->width, v->sub_x), luma = (size_t)v->width * (size_t)v->height;
    size_t chroma = stride * (size_t)ceil_shift(v->height, v->sub_y);
    double black = v->full ? 0 : 16, gain_y = v->full ? 1 : 255.0 / 219, gain_c = v->full ? 1 : 255.0 / 224;
    uint8_t *rgb = v->rgb;
    for (int y = 0; y < v->height; y++)
        for (int x = 0; x < v->width; x++, rgb += 3) {
            size_t at = luma + (size_t)(y >> v->sub_y) * stride + (size_t)(x >> v->sub_x);
            double grey = gain_y * (v->planes[(size_t)y * (size_t)v->width + (size_t)x] - black);
            double cb = v->mono ? 0 : gain_c * (v->planes[at] - 128);
            double cr = v->mono ? 0 : gain_c * (v->planes[at + chroma] - 128);
            rgb[0] = to_byte(grey + 1.402 * cr);
            rgb[1] = to_byte(grey - 0.344136 * cb - 0.714136 * cr);
            rgb[2] = to_byte(grey + 1.772 * cb);
        }
}

static void y4m_close(video *v) {
    fclose(v->file);
    free(v->planes);
}

static const video_format y4m_format = {y4m_next, y4m_close};

static void y4m_open(video *v) {
    v->format = &y4m_format;
    y4m_header(v);
    v->planes = alloc(y4m_frame_bytes(v), 1);
    off_t first = ftello(v->file);
    while (y4m_planes(v)) v->n_frames++;
    if (fseeko(v->file, first, SEEK_SET) != 0) die("%s: %s", v->path, strerror(errno));
}

/* ---- ffmpeg ----------------------------------------------------------------------------------------------------- */

#define FFMPEG_MAX_ARGS 24

/* Starts ffmpeg on the clip with these output options; v->file is its output. Every decoded frame comes out once. */
static void ffmpeg_start(video *v, const char *const *output) {
    char *url = alloc(strlen(v->path) + 6, 1);
    const char *args[FFMPEG_MAX_ARGS] = {"ffmpeg", "-nostdin", "-v",    "error",     "-i",
                                         url,      "-map",     "0:v:0", "-fps_mode", "passthrough"};
    int n = 10, ends[2];
    sprintf(url, "file:%s", v->path); /* a plain file, whatever its name looks like */
    while (*output) args[n++] = *output++;
    v->messages = tmpfile();
    if (!v->messages || pipe(ends) != 0 || (v->ffmpeg = fork()) < 0)
        die("%s: cannot start ffmpeg: %s", v->path, strerror(errno));
    if (v->ffmpeg == 0) {
        dup2(ends[1], STDOUT_FILENO);
        dup2(fileno(v->messages), STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        execvp(args[0], (char *const *)(uintptr_t)args);
        _exit(127);
    }
    free(url);
    close(ends[1]);
    v->file = fdopen(ends[0], "rb");
    if (!v->file) die("%s: cannot read from ffmpeg: %s", v->path, strerror(errno));
}

/* Lets ffmpeg end (a closed pipe stops it) and returns its exit status, -1 if a signal ended it. */
static int ffmpeg_stop(video *v) {
    int status = 0;
    fclose(v->file);
    if (waitpid(v->ffmpeg, &status, 0) < 0) die("%s: cannot wait for ffmpeg: %s", v->path, strerror(errno));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* Ends the program with what ffmpeg said. */
__attribute__((noreturn)) static void ffmpeg_fail(video *v) {
    char line[512] = "";
    int status = ffmpeg_stop(v);
    if (status == 127) die("%s: reading it needs ffmpeg in PATH (.y4m files and --frames do not)", v->path);
    rewind(v->messages);
    if (!fgets(line, sizeof line, v->messages)) snprintf(line, sizeof line, "exit status %d", status);
    line[strcspn(line, "\n")] = 0;
    char *text = *line == '[' ? strstr(line, "] ") : NULL; /* "[mov @ 0x55fb9e2c1bc0] text" */
    die("%s: ffmpeg stopped after %lld frames: %s", v->path, (long long)v->next, text ? text + 2 : line);
}

/* A number of a PPM header and the one white-space byte after it. */
static int ppm_number(video *v) {
    int n = 0, c;
    while (isdigit(c = fgetc(v->file)) && n <= FRAME_MAX_SIDE) n = 10 * n + (c - '0');
    if (!isspace(c)) ffmpeg_fail(v);
    return n;
}

static void ffmpeg_next(video *v) {
    if (fgetc(v->file) != 'P' || fgetc(v->file) != '6' || !isspace(fgetc(v->file))) ffmpeg_fail(v);
    int width = ppm_number(v), height = ppm_number(v);
    if (ppm_number(v) != 255) ffmpeg_fail(v);
    size_t size = 3 * frame_size(v, width, height);
    if (fread(v->rgb, 1, size, v->file) != size) ffmpeg_fail(v);
}

static void ffmpeg_close(video *v) {
    ffmpeg_stop(v);
    fclose(v->messages);
}

static const video_format ffmpeg_format = {ffmpeg_next, ffmpeg_close};

/* Counts the frames (as one grey pixel each), then starts over for the pictures. */
static void ffmpeg_open(video *v) {
    static const char *const count[] = {"-vf", "scale=1:1", "-f", "rawvideo", "-pix_fmt", "gray", "pipe:1", NULL};
    static const char *const pictures[] = {"-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1", NULL};
    v->format = &ffmpeg_format;
    ffmpeg_start(v, count);
    while (fgetc(v->file) != EOF) v->n_frames++;
    if (v->n_frames == 0) ffmpeg_fail(v);
    ffmpeg_close(v);
    ffmpeg_start(v, pictures);
}

/* ---- all formats ------------------------------------------------------------------------------------------------ */

static void video_open(video *v, const char *path) {
    static const char y4m[] = "YUV4MPEG2 ";
    char magic[sizeof y4m] = "";
    memset(v, 0, sizeof *v);
    v->path = path;
    v->file = open_file(path);
    size_t n = fread(magic, 1, sizeof y4m - 1, v->file);
    rewind(v->file);
    if (n == sizeof y4m - 1 && memcmp(magic, y4m, n) == 0) {
        y4m_open(v);
        return;
    }
    fclose(v->file);
    ffmpeg_open(v);
}

static void video_read(video *v) {
    v->format->read(v);
    v->next++;
}

static void video_close(video *v) {
    v->format->close(v);
    free(v->rgb);
}

#endif
