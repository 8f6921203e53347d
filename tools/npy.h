/* npy.h - strict reading and writing of NumPy .npy files (format 1.0 and 2.0, C order, little endian).
 * Shared by the psa command, the classifier and the tests; everything is static. */
#ifndef NPY_H
#define NPY_H

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

#if defined(__GNUC__) || defined(__clang__)
#define NPY_DEF static __attribute__((unused))
#else
#define NPY_DEF static
#endif

#define NPY_MAX_DIMS 8

typedef struct npy {
    char descr[8];                /* "<f4" "<f2" "<u2" "<f8" "<i4" "<i8" "|u1" */
    int ndim;
    int64_t shape[NPY_MAX_DIMS];  /* outer to inner */
    size_t count;                 /* product of shape */
    size_t item;                  /* bytes per element */
    void *data;                   /* malloc'ed, count * item bytes */
} npy;

/* 0, or -1 with one line in err: what, where, what was expected. Nothing is left behind on failure. */
NPY_DEF int npy_read(const char *path, npy *a, char *err, size_t err_size);
/* Writes to a temporary name beside path, then renames: path is either whole or untouched. */
NPY_DEF int npy_write(const char *path, const char *descr, int ndim, const int64_t *shape, const void *data, char *err,
                      size_t err_size);
NPY_DEF void npy_free(npy *a);

/* Bytes per element, 0 for a type that is not supported. */
static size_t npy__item(const char *descr) {
    static const char *const known[] = {"<f4", "<f2", "<u2", "<f8", "<i4", "<i8", "|u1"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(descr, known[i]) == 0)
            return (size_t)(descr[2] - '0');
    return 0;
}

static int npy__fail(char *err, size_t err_size, const char *path, const char *what) {
    snprintf(err, err_size, "%s: %s", path, what);
    return -1;
}

/* count and the data size in bytes must both fit, the latter into a long, which is what ftell returns. */
static int npy__count(int ndim, const int64_t *shape, size_t item, size_t *count) {
    size_t most = (size_t)LONG_MAX / 2 / item, n = 1;
    int empty = 0;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0)
            return -1;
        if (shape[i] == 0)
            empty = 1;
        else if ((uint64_t)shape[i] > most / n)
            return -1;
        else
            n *= (size_t)shape[i];
    }
    *count = empty ? 0 : n;
    return 0;
}

static const char *npy__space(const char *s) {
    while (*s == ' ' || *s == '\n' || *s == '\t')
        s++;
    return s;
}

/* A quoted string into text; the position after it, or NULL. */
static const char *npy__quoted(const char *s, char *text, size_t size) {
    char quote = *s;
    if (quote != '\'' && quote != '"')
        return NULL;
    const char *end = strchr(s + 1, quote);
    if (!end || (size_t)(end - s) > size)
        return NULL;
    memcpy(text, s + 1, (size_t)(end - s - 1));
    text[end - s - 1] = 0;
    return end + 1;
}

/* "(3, 4)", "(3,)" or "()"; the position after it, or NULL. */
static const char *npy__shape(const char *s, npy *a) {
    if (*s++ != '(')
        return NULL;
    for (s = npy__space(s); *s != ')'; s = npy__space(s)) {
        char *end;
        if (a->ndim == NPY_MAX_DIMS || *s < '0' || *s > '9')
            return NULL;
        errno = 0;
        a->shape[a->ndim++] = strtoll(s, &end, 10);
        if (errno)
            return NULL;
        s = npy__space(end);
        if (*s == ',')
            s++;
        else if (*s != ')' || a->ndim == 1) /* "(3)" is a number, not a shape */
            return NULL;
    }
    return s + 1;
}

/* One value of the header's dictionary; the position after it, or NULL. */
static const char *npy__value(const char *s, const char *key, npy *a, int *fortran) {
    if (strcmp(key, "descr") == 0)
        return npy__quoted(s, a->descr, sizeof a->descr - 1);
    if (strcmp(key, "shape") == 0)
        return npy__shape(s, a);
    *fortran = strncmp(s, "True", 4) == 0;
    if (*fortran)
        return s + 4;
    return strncmp(s, "False", 5) == 0 ? s + 5 : NULL;
}

/* The header is a Python dictionary with exactly three keys, in any order. NULL, or what is wrong with it. */
static const char *npy__header(const char *s, npy *a) {
    static const char *const keys[] = {"descr", "fortran_order", "shape"};
    const char *bad = "damaged .npy header";
    int seen = 0, fortran = 0;
    s = npy__space(s);
    if (*s++ != '{')
        return bad;
    for (s = npy__space(s); *s != '}'; s = npy__space(s)) {
        char key[16];
        int i = 0;
        s = npy__quoted(s, key, sizeof key);
        while (i < 3 && s && strcmp(key, keys[i]) != 0)
            i++;
        if (!s || i == 3 || (seen & 1 << i) || *(s = npy__space(s)) != ':')
            return bad;
        seen |= 1 << i;
        s = npy__value(npy__space(s + 1), key, a, &fortran);
        if (!s)
            return bad;
        s = npy__space(s);
        if (*s == ',')
            s++;
        else if (*s != '}')
            return bad;
    }
    if (seen != 7 || *npy__space(s + 1))
        return bad;
    return fortran ? "Fortran order; expected C order (numpy.ascontiguousarray)" : NULL;
}

/* Magic, version and header; the file is then at its first element. NULL, or what is wrong. */
static const char *npy__read_header(FILE *f, npy *a) {
    unsigned char b[12];
    char text[4096];
    size_t size;
    if (fread(b, 1, 8, f) != 8 || memcmp(b, "\x93NUMPY", 6) != 0)
        return ferror(f) ? strerror(errno) : "not a .npy file";
    if ((b[6] != 1 && b[6] != 2) || b[7] != 0)
        return "unknown .npy version; expected 1.0 or 2.0";
    if (fread(b + 8, 1, b[6] == 1 ? 2 : 4, f) != (b[6] == 1 ? 2u : 4u))
        return "truncated .npy header";
    size = b[8] | (size_t)b[9] << 8;
    if (b[6] == 2)
        size |= (size_t)b[10] << 16 | (size_t)b[11] << 24;
    if (size >= sizeof text)
        return "damaged .npy header";
    if (fread(text, 1, size, f) != size)
        return "truncated .npy header";
    text[size] = 0;
    if (strlen(text) != size)
        return "damaged .npy header";
    return npy__header(text, a);
}

static int npy__read_data(FILE *f, const char *path, npy *a, char *err, size_t err_size) {
    long at = ftell(f), end;
    a->item = npy__item(a->descr);
    if (!a->item) {
        snprintf(err, err_size, "%s: element type '%s'; expected little-endian f2, f4, f8, u2, i4, i8 or u1", path,
                 a->descr);
        return -1;
    }
    if (npy__count(a->ndim, a->shape, a->item, &a->count) != 0)
        return npy__fail(err, err_size, path, "the shape is too large");
    if (at < 0 || fseek(f, 0, SEEK_END) != 0 || (end = ftell(f)) < at || fseek(f, at, SEEK_SET) != 0)
        return npy__fail(err, err_size, path, "cannot seek; expected a regular file");
    if ((size_t)(end - at) != a->count * a->item) {
        snprintf(err, err_size, "%s: %s, %ld bytes of data where the shape needs %" PRIu64, path,
                 (size_t)(end - at) < a->count * a->item ? "truncated" : "trailing bytes", end - at,
                 (uint64_t)(a->count * a->item));
        return -1;
    }
    a->data = malloc(a->count * a->item + 1); /* never malloc(0), which may be NULL */
    if (!a->data)
        return npy__fail(err, err_size, path, "not enough memory");
    if (fread(a->data, a->item, a->count, f) != a->count)
        return npy__fail(err, err_size, path, ferror(f) ? strerror(errno) : "truncated while it was read");
    return 0;
}

NPY_DEF int npy_read(const char *path, npy *a, char *err, size_t err_size) {
    FILE *f = fopen(path, "rb");
    const char *bad;
    int rc;
    memset(a, 0, sizeof *a);
    if (!f)
        return npy__fail(err, err_size, path, strerror(errno));
    bad = npy__read_header(f, a);
    rc = bad ? npy__fail(err, err_size, path, bad) : npy__read_data(f, path, a, err, err_size);
    fclose(f);
    if (rc != 0)
        npy_free(a);
    return rc;
}

/* The 1.0 header, padded so that the data starts at a multiple of 64 bytes. Bytes written to b. */
static size_t npy__make_header(char *b, size_t size, const char *descr, int ndim, const int64_t *shape) {
    size_t n = 10, end;
    n += (size_t)snprintf(b + n, size - n, "{'descr': '%s', 'fortran_order': False, 'shape': (", descr);
    for (int i = 0; i < ndim; i++)
        n += (size_t)snprintf(b + n, size - n, i == 0 ? "%" PRId64 "," : i == 1 ? " %" PRId64 : ", %" PRId64, shape[i]);
    n += (size_t)snprintf(b + n, size - n, "), }");
    end = (n + 1 + 63) / 64 * 64;
    memset(b + n, ' ', end - n);
    b[end - 1] = '\n';
    memcpy(b, "\x93NUMPY\x01\x00", 8);
    b[8] = (char)((end - 10) & 255);
    b[9] = (char)((end - 10) >> 8);
    return end;
}

/* Moves a finished file to its place. Windows does not replace an existing file by itself. */
static int npy__rename(const char *from, const char *to) {
#ifdef _WIN32
    remove(to);
#endif
    return rename(from, to);
}

static int npy__write_file(const char *temp, const char *path, const char *header, size_t header_size, const void *data,
                           size_t item, size_t count) {
    FILE *f = fopen(temp, "wb");
    int bad;
    if (!f)
        return -1;
    bad = fwrite(header, 1, header_size, f) != header_size || fwrite(data, item, count, f) != count;
    bad |= fclose(f) != 0;
    if (bad || npy__rename(temp, path) != 0) {
        int why = errno;
        remove(temp);
        errno = why;
        return -1;
    }
    return 0;
}

NPY_DEF int npy_write(const char *path, const char *descr, int ndim, const int64_t *shape, const void *data, char *err,
                      size_t err_size) {
    char header[512];
    struct stat there;
    size_t item = npy__item(descr), count, temp_size = strlen(path) + 32;
    char *temp;
    int rc;
    if (!item || ndim < 0 || ndim > NPY_MAX_DIMS || npy__count(ndim, shape, item, &count) != 0)
        return npy__fail(err, err_size, path, "cannot write this element type and shape");
    if (stat(path, &there) == 0 && !S_ISREG(there.st_mode)) /* a rename would replace a device */
        return npy__fail(err, err_size, path, "cannot write: not a regular file");
    temp = (char *)malloc(temp_size);
    if (!temp)
        return npy__fail(err, err_size, path, "not enough memory");
    snprintf(temp, temp_size, "%s.%ld.tmp", path, (long)getpid());
    rc = npy__write_file(temp, path, header, npy__make_header(header, sizeof header, descr, ndim, shape), data, item,
                         count);
    if (rc != 0)
        snprintf(err, err_size, "%s: cannot write: %s", path, strerror(errno));
    free(temp);
    return rc;
}

NPY_DEF void npy_free(npy *a) {
    free(a->data);
    memset(a, 0, sizeof *a);
}
#endif
