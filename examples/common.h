/* common.h - errors, memory, files and JSON for the classifier. Everything is static; errors end the program. */
#ifndef COMMON_H
#define COMMON_H

#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One line on stderr, exit status 2. */
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...) {
    char line[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *c = line; *c; c++) /* names in files may hold any byte */
        if ((unsigned char)*c < 32 || *c == 127) *c = ' ';
    fprintf(stderr, "classify: %s\n", line);
    exit(2);
}

/* Zeroed memory for count * size bytes. */
static void *alloc(size_t count, size_t size) {
    void *p = calloc(count ? count : 1, size);
    if (!p) die("no memory for %zu x %zu bytes", count, size);
    return p;
}

static void *reallocate(void *p, size_t count, size_t size) {
    p = count <= SIZE_MAX / size ? realloc(p, count * size) : NULL;
    if (!p) die("no memory for %zu x %zu bytes", count, size);
    return p;
}

static char *copy_text(const char *text) {
    char *copy = alloc(strlen(text) + 1, 1);
    return strcpy(copy, text);
}

/* For qsort: strings by their bytes. */
static int by_text(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static char *join_path(const char *dir, const char *name) {
    size_t n = strlen(dir) + strlen(name) + 2;
    char *path = alloc(n, 1);
    snprintf(path, n, "%s/%s", dir, name);
    return path;
}

static int file_exists(const char *path) {
    FILE *f = fopen(path, "rb");
    if (f) fclose(f);
    return f != NULL;
}

static FILE *open_file(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) die("%s: %s", path, strerror(errno));
    return f;
}

static int64_t file_size(FILE *f, const char *path) {
    if (fseeko(f, 0, SEEK_END) != 0) die("%s: not a regular file", path);
    int64_t size = (int64_t)ftello(f);
    if (size < 0 || fseeko(f, 0, SEEK_SET) != 0) die("%s: not a regular file", path);
    return size;
}

/* ---- JSON ------------------------------------------------------------------------------------------------------- */

/* text holds size bytes and a NUL after them; an object is expected. where names the source in errors. */
static cJSON *parse_object(const char *text, size_t size, const char *where) {
    const char *end = NULL;
    cJSON *json = strlen(text) == size ? cJSON_ParseWithOpts(text, &end, 1) : NULL;
    if (!json) die("%s: not valid JSON (at byte %zu)", where, end ? (size_t)(end - text) : strlen(text));
    if (!cJSON_IsObject(json)) die("%s: expected a JSON object", where);
    return json;
}

static cJSON *read_object(const char *path) {
    FILE *f = open_file(path);
    int64_t size = file_size(f, path);
    if (size > 64 << 20) die("%s: %lld bytes is too long for a settings file", path, (long long)size);
    char *text = alloc((size_t)size + 1, 1);
    if (fread(text, 1, (size_t)size, f) != (size_t)size) die("%s: cannot read its %lld bytes", path, (long long)size);
    fclose(f);
    cJSON *json = parse_object(text, (size_t)size, path);
    free(text);
    return json;
}

/* The value of a key; NULL if it is absent or null, which means "the default" in these files. */
static const cJSON *json_get(const cJSON *object, const char *key) {
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    return cJSON_IsNull(item) ? NULL : item;
}

/* A whole number from lo to hi that a double holds exactly. */
static int json_whole(const cJSON *item, double lo, double hi) {
    return cJSON_IsNumber(item) && item->valuedouble >= lo && item->valuedouble <= hi &&
           item->valuedouble == floor(item->valuedouble);
}

static int json_int(const cJSON *object, const char *where, const char *key, int otherwise, int lo, int hi) {
    const cJSON *item = json_get(object, key);
    if (!item) return otherwise;
    if (!json_whole(item, lo, hi)) die("%s: \"%s\": expected a whole number from %d to %d", where, key, lo, hi);
    return (int)item->valuedouble;
}

static double json_positive(const cJSON *object, const char *where, const char *key, double otherwise) {
    const cJSON *item = json_get(object, key);
    if (!item) return otherwise;
    if (!cJSON_IsNumber(item) || !(item->valuedouble > 0) || !(item->valuedouble < 1e9))
        die("%s: \"%s\": expected a positive number", where, key);
    return item->valuedouble;
}

static int json_bool(const cJSON *object, const char *where, const char *key, int otherwise) {
    const cJSON *item = json_get(object, key);
    if (!item) return otherwise;
    if (!cJSON_IsBool(item)) die("%s: \"%s\": expected true or false", where, key);
    return cJSON_IsTrue(item);
}

static const char *json_text(const cJSON *object, const char *where, const char *key, const char *otherwise) {
    const cJSON *item = json_get(object, key);
    if (!item) return otherwise;
    if (!cJSON_IsString(item)) die("%s: \"%s\": expected a string", where, key);
    return item->valuestring;
}

#endif
