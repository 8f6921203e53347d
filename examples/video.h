/* video.h - RGB frames of a video, one after the other: any video through ffmpeg, .y4m without it, frames in a .npy.
 * A video is read twice: to count its frames, and for the frames themselves. One frame is in memory.
 * Compressed video needs ffmpeg 5.1 or newer in PATH. Functions that return int: 0, or -1 with a line in error. */
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
    char error[512];
} video;

static int video_open(video *v, const char *path);      /* y4m, or whatever ffmpeg understands */
static int video_open_npy(video *v, const char *path);  /* u8 [frames, height, width, 3] */
static int video_read(video *v);                        /* the next frame into v->rgb, width, height */
static void video_close(video *v);                      /* also after a failed open */

typedef struct video_format {
    int (*read)(video *v);
    void (*close)(video *v);
} video_format;

__attribute__((format(printf, 2, 3))) static int video_fail(video *v, const char *format, ...) {
    va_list args;
    int n = snprintf(v->error, sizeof v->error, "%.400s: ", v->path);
    va_start(args, format);
    vsnprintf(v->error + n, sizeof v->error - (size_t)n, format, args);
    va_end(args);
    return -1;
}

/* Makes room for a frame of this size. */
static int frame_size(video *v, int width, int height) {
    if (width < 1 || height < 1 || width > FRAME_MAX_SIDE || height > FRAME_MAX_SIDE)
        return video_fail(v, "expected frames of 1 to %d pixels a side, found %d x %d", FRAME_MAX_SIDE, width, height);
    if (width != v->width || height != v->height) {
        free(v->rgb);
        v->rgb = alloc((size_t)width * (size_t)height, 3);
        v->width = width;
        v->height = height;
    }
    return 0;
}

/* ---- .npy ------------------------------------------------------------------------------------------------------- */

static int npy_next(video *v) {
    size_t size = 3 * (size_t)v->width * (size_t)v->height;
    memcpy(v->rgb, (const uint8_t *)v->frames.data + (size_t)v->next * size, size);
    return 0;
}

static void npy_close(video *v) {
    npy_free(&v->frames);
}

static const video_format npy_format = {npy_next, npy_close};

static int video_open_npy(video *v, const char *path) {
    memset(v, 0, sizeof *v);
    v->path = path;
    if (npy_read(path, &v->frames, v->error, sizeof v->error) != 0) return -1;
    v->format = &npy_format;
    const int64_t *shape = v->frames.shape;
    if (strcmp(v->frames.descr, "|u1") != 0 || v->frames.ndim != 4 || shape[3] != 3)
        return video_fail(v, "expected uint8 frames [frames, height, width, 3]");
    if (shape[1] > FRAME_MAX_SIDE || shape[2] > FRAME_MAX_SIDE)
        return video_fail(v, "a frame is larger than %d pixels a side", FRAME_MAX_SIDE);
    v->n_frames = shape[0];
    return frame_size(v, (int)shape[2], (int)shape[1]);
}

/* ---- y4m -------------------------------------------------------------------------------------------------------- */

/* Reads a line of at most size - 1 bytes and cuts the newline off. 1: read, 0: the file has ended, -1: an error. */
static int read_line(video *v, char *line, size_t size) {
    if (!fgets(line, (int)size, v->file)) return 0;
    size_t n = strlen(line);
    if (!n || line[n - 1] != '\n') return video_fail(v, "expected a header line of text, found \"%.20s\"", line);
    line[n - 1] = 0;
    return 1;
}

static int y4m_colour(video *v, const char *name) {
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
            return 0;
        }
    return video_fail(v, "expected 8-bit y4m colour 420, 422, 444 or mono, found %s", name);
}

/* Parses the stream header and leaves the file at the first frame. */
static int y4m_header(video *v) {
    char line[1024], *field;
    int width = 0, height = 0, bad = y4m_colour(v, "420");
    int got = read_line(v, line, sizeof line);
    if (got <= 0) return got < 0 ? -1 : video_fail(v, "the file is empty");
    for (field = strtok(line, " "); field; field = strtok(NULL, " ")) {
        if (*field == 'W') width = atoi(field + 1);
        if (*field == 'H') height = atoi(field + 1);
        if (*field == 'C') bad |= y4m_colour(v, field + 1);
        if (strcmp(field, "XCOLORRANGE=FULL") == 0) v->full = 1;
    }
    return bad ? -1 : frame_size(v, width, height);
}

static int ceil_shift(int n, int shift) {
    return (n + (1 << shift) - 1) >> shift;
}

static size_t y4m_frame_bytes(const video *v) {
    size_t chroma = (size_t)ceil_shift(v->width, v->sub_x) * (size_t)ceil_shift(v->height, v->sub_y);
    return (size_t)v->width * (size_t)v->height + (v->mono ? 0 : 2 * chroma);
}

/* Reads the planes of the next frame. 1: read, 0: the file has ended, -1: an error. */
static int y4m_planes(video *v) {
    char line[1024];
    int got = read_line(v, line, sizeof line);
    if (got <= 0) return got;
    if (strncmp(line, "FRAME", 5) != 0) return video_fail(v, "expected FRAME, found \"%.20s\"", line);
    size_t size = y4m_frame_bytes(v);
    if (fread(v->planes, 1, size, v->file) != size) return video_fail(v, "the last frame is cut short");
    return 1;
}

static uint8_t to_byte(double v) {
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v + 0.5);
}

/* BT.601, chroma replicated. */
static int y4m_next(video *v) {
    int got = y4m_planes(v);
    if (got <= 0) return got < 0 ? -1 : video_fail(v, "the file ends before frame %lld", (long long)v->next);
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
    return 0;
}

static void y4m_close(video *v) {
    fclose(v->file);
    free(v->planes);
}

static const video_format y4m_format = {y4m_next, y4m_close};

static int y4m_open(video *v) {
    int got;
    v->format = &y4m_format;
    if (y4m_header(v) != 0) return -1;
    v->planes = alloc(y4m_frame_bytes(v), 1);
    off_t first = ftello(v->file);
    while ((got = y4m_planes(v)) > 0) v->n_frames++;
    if (got == 0 && v->n_frames == 0) return video_fail(v, "there are no frames");
    return got == 0 && fseeko(v->file, first, SEEK_SET) != 0 ? video_fail(v, "%s", strerror(errno)) : got;
}

/* ---- ffmpeg ----------------------------------------------------------------------------------------------------- */

#define FFMPEG_MAX_ARGS 24

/* Starts ffmpeg on the video with these output options; v->file is its output. Every decoded frame comes out once. */
static int ffmpeg_start(video *v, const char *const *output) {
    char *url = alloc(strlen(v->path) + 6, 1);
    const char *args[FFMPEG_MAX_ARGS] = {"ffmpeg", "-nostdin", "-v",    "error",     "-i",
                                         url,      "-map",     "0:v:0", "-fps_mode", "passthrough"};
    int n = 10, ends[2] = {-1, -1};
    sprintf(url, "file:%s", v->path); /* a plain file, whatever its name looks like */
    while (*output) args[n++] = *output++;
    v->messages = tmpfile();
    if (!v->messages || pipe(ends) != 0 || (v->ffmpeg = fork()) < 0) {
        free(url);
        return video_fail(v, "cannot start ffmpeg: %s", strerror(errno));
    }
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
    return v->file ? 0 : video_fail(v, "cannot read from ffmpeg: %s", strerror(errno));
}

/* Lets ffmpeg end (a closed pipe stops it) and returns its exit status, -1 if a signal ended it or it never ran. */
static int ffmpeg_stop(video *v) {
    int status = -1;
    if (v->file) fclose(v->file);
    v->file = NULL;
    if (v->ffmpeg > 0 && waitpid(v->ffmpeg, &status, 0) < 0) status = -1;
    v->ffmpeg = 0;
    return status >= 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* What ffmpeg said becomes the error. */
static int ffmpeg_fail(video *v) {
    char line[300] = "";
    int status = ffmpeg_stop(v);
    if (status == 127) return video_fail(v, "reading it needs ffmpeg in PATH (.y4m files and --frames do not)");
    rewind(v->messages);
    if (!fgets(line, sizeof line, v->messages)) snprintf(line, sizeof line, "exit status %d", status);
    line[strcspn(line, "\n")] = 0;
    char *text = *line == '[' ? strstr(line, "] ") : NULL; /* "[mov @ 0x55fb9e2c1bc0] text" */
    return video_fail(v, "ffmpeg stopped after %lld frames: %s", (long long)v->next, text ? text + 2 : line);
}

/* A number of a PPM header and the one white-space byte after it; -1: that is not what came. */
static int ppm_number(video *v) {
    int n = 0, c;
    while (isdigit(c = fgetc(v->file)) && n <= FRAME_MAX_SIDE) n = 10 * n + (c - '0');
    return isspace(c) ? n : -1;
}

static int ffmpeg_next(video *v) {
    if (fgetc(v->file) != 'P' || fgetc(v->file) != '6' || !isspace(fgetc(v->file))) return ffmpeg_fail(v);
    int width = ppm_number(v), height = ppm_number(v), most = ppm_number(v);
    if (most != 255) return ffmpeg_fail(v);
    if (frame_size(v, width, height) != 0) return -1;
    size_t size = 3 * (size_t)width * (size_t)height;
    return fread(v->rgb, 1, size, v->file) == size ? 0 : ffmpeg_fail(v);
}

static void ffmpeg_close(video *v) {
    ffmpeg_stop(v);
    if (v->messages) fclose(v->messages);
}

static const video_format ffmpeg_format = {ffmpeg_next, ffmpeg_close};

/* Counts the frames (as one grey pixel each), then starts over for the pictures. */
static int ffmpeg_open(video *v) {
    static const char *const count[] = {"-vf", "scale=1:1", "-f", "rawvideo", "-pix_fmt", "gray", "pipe:1", NULL};
    static const char *const pictures[] = {"-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1", NULL};
    v->format = &ffmpeg_format;
    if (ffmpeg_start(v, count) != 0) return -1;
    while (fgetc(v->file) != EOF) v->n_frames++;
    if (v->n_frames == 0) return ffmpeg_fail(v);
    ffmpeg_close(v);
    v->messages = NULL;
    return ffmpeg_start(v, pictures);
}

/* ---- all formats ------------------------------------------------------------------------------------------------ */

static int video_open(video *v, const char *path) {
    static const char y4m[] = "YUV4MPEG2 ";
    char magic[sizeof y4m] = "";
    memset(v, 0, sizeof *v);
    v->path = path;
    v->file = fopen(path, "rb");
    if (!v->file) return video_fail(v, "%s", strerror(errno));
    size_t n = fread(magic, 1, sizeof y4m - 1, v->file);
    rewind(v->file);
    if (n == sizeof y4m - 1 && memcmp(magic, y4m, n) == 0) return y4m_open(v);
    fclose(v->file);
    v->file = NULL;
    return ffmpeg_open(v);
}

static int video_read(video *v) {
    if (v->format->read(v) != 0) return -1;
    v->next++;
    return 0;
}

static void video_close(video *v) {
    if (v->format) v->format->close(v);
    free(v->rgb);
}

#endif
