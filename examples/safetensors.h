/* safetensors.h - the weights of a Hugging Face folder: model.safetensors, or shards with an index.
 *
 * A file is a little-endian u64 n, n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the
 * data, offsets counted from byte 8 + n. Tensors fill the data without gaps, in any order and at any alignment.
 *
 * Files are mapped, not read: weights take memory when they are used, and all processes share it. Headers are checked
 * completely when the folder is opened, so that every tensor lies inside its file as it was then. A file must keep its
 * size while the checkpoint is open: reading what another program has cut off (or what the disk cannot deliver) ends
 * the program with SIGBUS, and bytes overwritten in place may be seen. Replacing a file by renaming is safe.
 *
 * For little-endian machines. Include after psa.h. */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include "common.h"
#include "elements.h"
#include <iconv.h>
#include <sys/mman.h>

#define TENSOR_MAX_DIMS 8
#define HEADER_MAX 100000000 /* bytes; the limit of the reference reader */

typedef struct shard {
    char *path;
    unsigned char *bytes;  /* the mapped file */
    int64_t size;
} shard;

typedef struct tensor_info {
    char *name;
    char dtype[16];
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t begin, end;    /* bytes of the shard's file */
    const unsigned char *data; /* byte `begin`; valid until the checkpoint is closed */
    const shard *shard;
} tensor_info;

typedef struct checkpoint {
    char *dir;
    shard *shards;
    size_t n_shards;
    tensor_info *tensors;  /* sorted by name */
    size_t n_tensors;
} checkpoint;

static void checkpoint_open(checkpoint *c, const char *dir);
static void checkpoint_close(checkpoint *c);
static void checkpoint_release(const checkpoint *c);  /* gives back memory: what is read again is mapped again */
static int64_t checkpoint_bytes(const checkpoint *c); /* of all tensors together */
static const tensor_info *checkpoint_find(const checkpoint *c, const char *name); /* NULL if there is none */

/* The tensor of this name; it is an error if there is none or if it has another shape or is not F32, F16 or BF16. */
static const tensor_info *checkpoint_need(const checkpoint *c, const char *name, int ndim, const int64_t *shape);

/* Of a tensor that checkpoint_need has returned: its values where they lie, NULL if they are not f32 or not aligned. */
static const float *tensor_floats(const tensor_info *t);

/* The same for any: values first .. first + count as f32. */
static void tensor_widen(const tensor_info *t, int64_t first, int64_t count, float *dst);

/* ---- headers ---------------------------------------------------------------------------------------------------- */

/* JSON is UTF-8, and the parser does not look; it also ends a string at an escaped NUL. text ends in a NUL. */
static void check_text(const char *text, size_t size, const char *where) {
    char sink[4096], *in = (char *)text;
    size_t left = size, converted;
    iconv_t utf8 = iconv_open("UTF-8", "UTF-8");
    if (utf8 == (iconv_t)-1) die("%s: cannot be checked: iconv: %s", where, strerror(errno));
    do {
        char *out = sink;
        size_t room = sizeof sink;
        converted = iconv(utf8, &in, &left, &out, &room);
    } while (converted == (size_t)-1 && errno == E2BIG);
    iconv_close(utf8);
    if (left) die("%s: not UTF-8 (at byte %zu)", where, size - left);
    const char *zero = strstr(text, "\\u0000");
    if (zero) die("%s: a NUL in a string (at byte %zu)", where, (size_t)(zero - text));
}

/* Bytes of an element; 0 for a type that this program does not know and that unused tensors may have. */
static int64_t dtype_size(const char *dtype) {
    static const struct {
        const char *name;
        int size;
    } types[] = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F64", 8}, {"I64", 8}, {"I32", 4},
                 {"I16", 2}, {"I8", 1},  {"U8", 1},   {"U16", 2}, {"U32", 4}, {"U64", 8}, {"BOOL", 1}};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(types[i].name, dtype) == 0) return types[i].size;
    return 0;
}

/* Reads the shape of an entry. Returns the bytes that a tensor of it has. */
static int64_t parse_shape(tensor_info *t, const cJSON *shape, const shard *s) {
    const double most = 9007199254740992.0; /* 2^53 */
    int64_t bytes = dtype_size(t->dtype);
    const cJSON *extent;
    if (!cJSON_IsArray(shape) || cJSON_GetArraySize(shape) > TENSOR_MAX_DIMS)
        die("%s: tensor %s: expected \"shape\", a list of at most %d extents", s->path, t->name, TENSOR_MAX_DIMS);
    cJSON_ArrayForEach(extent, shape) {
        if (!json_whole(extent, 0, most) || (double)bytes * extent->valuedouble > most)
            die("%s: tensor %s: an extent of its shape is not a sensible whole number", s->path, t->name);
        t->shape[t->ndim++] = (int64_t)extent->valuedouble;
        bytes *= (int64_t)extent->valuedouble;
    }
    return bytes;
}

/* Parses one entry of a header. data: first byte of the data. */
static void tensor_parse(tensor_info *t, const cJSON *entry, const shard *s, int64_t data) {
    const cJSON *dtype = json_get(entry, "dtype"), *offsets = json_get(entry, "data_offsets");
    const double most = 9007199254740992.0; /* 2^53 */
    memset(t, 0, sizeof *t);
    t->name = copy_text(entry->string);
    t->shard = s;
    if (!cJSON_IsString(dtype) || strlen(dtype->valuestring) >= sizeof t->dtype)
        die("%s: tensor %s: expected \"dtype\", a short string", s->path, t->name);
    snprintf(t->dtype, sizeof t->dtype, "%s", dtype->valuestring);
    int64_t bytes = parse_shape(t, json_get(entry, "shape"), s);
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !json_whole(offsets->child, 0, most) || !json_whole(offsets->child->next, 0, most))
        die("%s: tensor %s: expected \"data_offsets\": [begin, end]", s->path, t->name);
    t->begin = data + (int64_t)offsets->child->valuedouble;
    t->end = data + (int64_t)offsets->child->next->valuedouble;
    if (t->begin > t->end) die("%s: tensor %s: its data ends before it begins", s->path, t->name);
    if (t->end > s->size)
        die("%s: tensor %s ends at byte %lld, but the file has %lld (cut short?)", s->path, t->name, (long long)t->end,
            (long long)s->size);
    if (dtype_size(t->dtype) && t->end - t->begin != bytes)
        die("%s: tensor %s: expected %lld bytes for its shape, found %lld", s->path, t->name, (long long)bytes,
            (long long)(t->end - t->begin));
    t->data = s->bytes + t->begin;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const tensor_info *)a)->name, ((const tensor_info *)b)->name);
}

static int by_begin(const void *a, const void *b) {
    const tensor_info *s = a, *t = b;
    if (s->begin != t->begin) return s->begin < t->begin ? -1 : 1;
    return (s->end > t->end) - (s->end < t->end);
}

/* Every byte from `data` to the end of the file belongs to one tensor. */
static void check_layout(tensor_info *tensors, size_t n, const shard *s, int64_t data) {
    int64_t at = data;
    qsort(tensors, n, sizeof *tensors, by_begin);
    for (size_t i = 0; i <= n; i++) {
        int64_t begin = i < n ? tensors[i].begin : s->size;
        if (begin < at) die("%s: tensors %s and %s overlap", s->path, tensors[i - 1].name, tensors[i].name);
        if (begin > at)
            die("%s: bytes %lld to %lld belong to no tensor", s->path, (long long)at, (long long)begin - 1);
        at = i < n ? tensors[i].end : begin;
    }
}

static void shard_map(shard *s) {
    FILE *file = open_file(s->path);
    s->size = file_size(file, s->path);
    if (s->size < 8) die("%s: %lld bytes is too short for a safetensors file", s->path, (long long)s->size);
    if ((int64_t)(size_t)s->size != s->size) die("%s: %lld bytes is too long", s->path, (long long)s->size);
    void *bytes = mmap(NULL, (size_t)s->size, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    if (bytes == MAP_FAILED) die("%s: cannot be mapped: %s", s->path, strerror(errno));
    s->bytes = bytes;
    fclose(file);
}

/* Appends the tensors of a shard to the checkpoint's list. */
static void shard_open(checkpoint *c, shard *s) {
    uint64_t n = 0;
    shard_map(s);
    for (int i = 7; i >= 0; i--) n = n << 8 | s->bytes[i];
    if (n > HEADER_MAX || n > (uint64_t)s->size - 8)
        die("%s: expected a header of at most %d bytes inside the file's %lld, found %llu", s->path, HEADER_MAX,
            (long long)s->size, (unsigned long long)n);
    char *text = alloc((size_t)n + 1, 1);
    memcpy(text, s->bytes + 8, (size_t)n);
    check_text(text, (size_t)n, s->path);
    cJSON *header = parse_object(text, (size_t)n, s->path), *entry;
    free(text);
    size_t first = c->n_tensors, most = first + (size_t)cJSON_GetArraySize(header);
    c->tensors = reallocate(c->tensors, most + 1, sizeof *c->tensors);
    cJSON_ArrayForEach(entry, header) {
        if (strcmp(entry->string, "__metadata__") != 0)
            tensor_parse(&c->tensors[c->n_tensors++], entry, s, 8 + (int64_t)n);
    }
    cJSON_Delete(header);
    check_layout(c->tensors + first, c->n_tensors - first, s, 8 + (int64_t)n);
}

/* ---- folders ---------------------------------------------------------------------------------------------------- */

/* Lists the distinct file names of an index's weight_map. */
static void list_shards(checkpoint *c, const cJSON *map, const char *index) {
    size_t n = 0, most = (size_t)cJSON_GetArraySize(map);
    const char **names = alloc(most, sizeof *names);
    const cJSON *entry;
    c->shards = alloc(most, sizeof *c->shards);
    cJSON_ArrayForEach(entry, map) {
        const char *name = cJSON_IsString(entry) ? entry->valuestring : "";
        if (!*name || *name == '.' || strchr(name, '/'))
            die("%s: weight_map: %s: expected the name of a file beside the index", index, entry->string);
        names[n++] = name;
    }
    qsort(names, n, sizeof *names, by_text);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(names[i], names[i - 1]) != 0) c->shards[c->n_shards++].path = join_path(c->dir, names[i]);
    free(names);
}

/* Every tensor must be where the index says it is. */
static void check_index(const checkpoint *c, const cJSON *map, const char *index) {
    const cJSON *entry;
    cJSON_ArrayForEach(entry, map) {
        const tensor_info *t = checkpoint_find(c, entry->string);
        const char *file = t ? strrchr(t->shard->path, '/') + 1 : "";
        if (strcmp(file, entry->valuestring) != 0)
            die("%s: tensor %s is not in %s", index, entry->string, entry->valuestring);
    }
}

static void checkpoint_open(checkpoint *c, const char *dir) {
    char *single = join_path(dir, "model.safetensors"), *index = join_path(dir, "model.safetensors.index.json");
    cJSON *json = NULL;
    const cJSON *map = NULL;
    memset(c, 0, sizeof *c);
    c->dir = copy_text(dir);
    if (file_exists(single)) {
        c->shards = alloc(1, sizeof *c->shards);
        c->shards[c->n_shards++].path = copy_text(single);
    } else {
        if (!file_exists(index)) die("%s: found neither model.safetensors nor model.safetensors.index.json", dir);
        json = read_object(index);
        map = json_get(json, "weight_map");
        if (!cJSON_IsObject(map) || !map->child) die("%s: expected \"weight_map\", an object with tensors", index);
        list_shards(c, map, index);
    }
    for (size_t i = 0; i < c->n_shards; i++) shard_open(c, &c->shards[i]);
    qsort(c->tensors, c->n_tensors, sizeof *c->tensors, by_name);
    for (size_t i = 1; i < c->n_tensors; i++)
        if (strcmp(c->tensors[i].name, c->tensors[i - 1].name) == 0)
            die("%s: there are two tensors %s", c->tensors[i].shard->path, c->tensors[i].name);
    if (map) check_index(c, map, index);
    cJSON_Delete(json);
    free(index);
    free(single);
}

static void checkpoint_close(checkpoint *c) {
    for (size_t i = 0; i < c->n_tensors; i++) free(c->tensors[i].name);
    for (size_t i = 0; i < c->n_shards; i++) {
        munmap(c->shards[i].bytes, (size_t)c->shards[i].size);
        free(c->shards[i].path);
    }
    free(c->tensors);
    free(c->shards);
    free(c->dir);
}

static void checkpoint_release(const checkpoint *c) {
    for (size_t i = 0; i < c->n_shards; i++) madvise(c->shards[i].bytes, (size_t)c->shards[i].size, MADV_DONTNEED);
}

static int64_t checkpoint_bytes(const checkpoint *c) {
    int64_t bytes = 0;
    for (size_t i = 0; i < c->n_tensors; i++) bytes += c->tensors[i].end - c->tensors[i].begin;
    return bytes;
}

static const tensor_info *checkpoint_find(const checkpoint *c, const char *name) {
    size_t lo = 0, hi = c->n_tensors;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        int order = strcmp(name, c->tensors[mid].name);
        if (order == 0) return &c->tensors[mid];
        if (order < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return NULL;
}

/* ---- data ------------------------------------------------------------------------------------------------------- */

static void shape_text(char *text, size_t size, int ndim, const int64_t *shape) {
    size_t n = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < ndim; i++)
        n += (size_t)snprintf(text + n, size - n, "%s%lld", i ? ", " : "", (long long)shape[i]);
    snprintf(text + n, size - n, "]");
}

static const tensor_info *checkpoint_need(const checkpoint *c, const char *name, int ndim, const int64_t *shape) {
    char expected[32 * TENSOR_MAX_DIMS], found[32 * TENSOR_MAX_DIMS];
    const tensor_info *t = checkpoint_find(c, name);
    shape_text(expected, sizeof expected, ndim, shape);
    if (!t) die("%s: tensor %s is missing; expected one of shape %s", c->dir, name, expected);
    shape_text(found, sizeof found, t->ndim, t->shape);
    if (strcmp(expected, found) != 0)
        die("%s: tensor %s: expected shape %s, found %s", t->shard->path, name, expected, found);
    if (strcmp(t->dtype, "F32") != 0 && strcmp(t->dtype, "F16") != 0 && strcmp(t->dtype, "BF16") != 0)
        die("%s: tensor %s: expected type F32, F16 or BF16, found %s", t->shard->path, name, t->dtype);
    return t;
}

static const float *tensor_floats(const tensor_info *t) {
    int in_place = strcmp(t->dtype, "F32") == 0 && (uintptr_t)t->data % sizeof(float) == 0;
    return in_place ? (const float *)(const void *)t->data : NULL;
}

static void tensor_widen(const tensor_info *t, int64_t first, int64_t count, float *dst) {
    const unsigned char *src = t->data + first * dtype_size(t->dtype);
    int half = strcmp(t->dtype, "F16") == 0;
    if (strcmp(t->dtype, "F32") == 0) {
        memcpy(dst, src, (size_t)count * sizeof *dst);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, src + 2 * i, sizeof bits);
        dst[i] = half ? half_to_float(bits) : float_from_bits((uint32_t)bits << 16);
    }
}

#endif
