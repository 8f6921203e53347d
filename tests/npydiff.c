/* npydiff.c - are two .npy files equal within a bound?
 *
 *     cc -std=c99 -O2 -Itools tests/npydiff.c -lm -o build/npydiff
 *     build/npydiff EXPECTED FOUND BOUND
 *
 * Prints the largest |found - expected|, relative to the largest |expected|. Exit status 0 if it is at most BOUND,
 * 1 if not, 2 if the files cannot be compared. */
#define _POSIX_C_SOURCE 200809L
#include "npy.h"

#include <math.h>

static int fail(const char *what) {
    fprintf(stderr, "npydiff: %s\n", what);
    return 2;
}

static double element(const npy *a, size_t i) {
    if (a->descr[1] == 'u') return ((const uint8_t *)a->data)[i];
    return (double)((const float *)a->data)[i];
}

/* float32 and uint8 are compared; shapes and types must agree. */
static const char *mismatch(const npy *a, const npy *b) {
    if (strcmp(a->descr, "<f4") != 0 && strcmp(a->descr, "|u1") != 0) return "expected float32 or uint8";
    if (strcmp(a->descr, b->descr) != 0) return "the element types differ";
    if (a->ndim != b->ndim || memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof *a->shape) != 0)
        return "the shapes differ";
    return NULL;
}

/* NaN unless every difference is a number. */
static double largest_difference(const npy *a, const npy *b) {
    double most = 0, scale = 0;
    for (size_t i = 0; i < a->count; i++) {
        double difference = fabs(element(b, i) - element(a, i));
        if (!(difference <= most)) most = difference;
        if (isnan(most)) return most;
        scale = fmax(scale, fabs(element(a, i)));
    }
    return scale > 0 ? most / scale : most;
}

int main(int argc, char **argv) {
    char err[512], *end = NULL;
    npy a, b;
    double bound = argc == 4 ? strtod(argv[3], &end) : -1;
    if (!end || end == argv[3] || *end || !(bound >= 0)) return fail("expected EXPECTED.npy FOUND.npy BOUND");
    if (npy_read(argv[1], &a, err, sizeof err) != 0) return fail(err);
    if (npy_read(argv[2], &b, err, sizeof err) != 0) {
        npy_free(&a);
        return fail(err);
    }
    const char *why = mismatch(&a, &b);
    double difference = why ? 0 : largest_difference(&a, &b);
    npy_free(&a);
    npy_free(&b);
    if (why) return fail(why);
    printf("%.3g\n", difference);
    return difference <= bound ? 0 : 1;
}
