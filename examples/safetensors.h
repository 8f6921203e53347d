/* safetensors.h - the weights of a Hugging Face folder: model.safetensors, or shards with an index.
 *
 * A file is a little-endian u64 n, n bytes of JSON {name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the
 * data, offsets counted from byte 8 + n. Headers are checked completely when the folder is opened; tensors are read
 * one by one, when they are asked for, straight to where they stay. */
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include "common.h"

#define TENSOR_MAX_DIMS 8
#define HEADER_MAX 100000000 /* bytes; the limit of the reference reader */

typedef struct shard {
    char *path;
    FILE *file;
} shard;

typedef struct tensor_info {
    char *name;
    char dtype[8];
    int ndim;
    int64_t shape[TENSOR_MAX_DIMS];
    int64_t begin, end;    /* bytes of the shard's file */
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
static const tensor_info *checkpoint_find(const checkpoint *c, const char *name); /* NULL if there is none */

/* The tensor of this name; it is an error if there is none or if its shape is another. */
static const tensor_info *checkpoint_need(const checkpoint *c, const char *name, int ndim, const int64_t *shape);

static void tensor_read(const tensor_info *t, float *dst); /* the whole tensor, widened to f32 */

/* ---- headers ---------------------------------------------------------------------------------------------------- */

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

/* Parses one entry of a header. data: first byte of the data, size: bytes of the file. */
static void tensor_parse(tensor_info *t, const cJSON *entry, const shard *s, int64_t data, int64_t size) {
    const cJSON *dtype = json_get(entry, "dtype"), *shape = json_get(entry, "shape");
    const cJSON *offsets = json_get(entry, "data_offsets"), *extent;
    const double most = 9007199254740992.0; /* 2^53 */
    t->name = copy_text(entry->string);
    t->shard = s;
    if (!cJSON_IsString(dtype) || strlen(dtype->valuestring) >= sizeof t->dtype)
        die("%s: tensor %s: expected \"dtype\", a short string", s->path, t->name);
    snprintf(t->dtype, sizeof t->dtype, "%s", dtype->valuestring);
    if (!cJSON_IsArray(shape) || cJSON_GetArraySize(shape) > TENSOR_MAX_DIMS)
        die("%s: tensor %s: expected \"shape\", a list of at most %d extents", s->path, t->name, TENSOR_MAX_DIMS);
    int64_t bytes = dtype_size(t->dtype);
    cJSON_ArrayForEach(extent, shape) {
        if (!json_whole(extent, 0, most) || (double)bytes * extent->valuedouble > most)
            die("%s: tensor %s: an extent of its shape is not a sensible whole number", s->path, t->name);
        t->shape[t->ndim++] = (int64_t)extent->valuedouble;
        bytes *= (int64_t)extent->valuedouble;
    }
    if (!cJSON_IsArray(offsets) || cJSON_GetArraySize(offsets) != 2 ||
        !json_whole(offsets->child, 0, most) || !json_whole(offsets->child->next, 0, most))
        die("%s: tensor %s: expected \"data_offsets\": [begin, end]", s->path, t->name);
    t->begin = data + (int64_t)offsets->child->valuedouble;
    t->end = data + (int64_t)offsets->child->next->valuedouble;
    if (t->begin > t->end) die("%s: tensor %s: its data ends before it begins", s->path, t->name);
    if (t->end > size)
        die("%s: tensor %s ends at byte %lld, but the file has %lld (cut short?)", s->path, t->name, (long long)t->end,
            (long long)size);
    if (dtype_size(t->dtype) && t->end - t->begin != bytes)
        die("%s: tensor %s: expected %lld bytes for its shape, found %lld", s->path, t->name, (long long)bytes,
            (long long)(t->end - t->begin));
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const tensor_info *)a)->name, ((const tensor_info *)b)->name);
}

static int by_begin(const void *a, const void *b) {
    const tensor_info *s = a, *t = b;
    if (s->begin != t->begin) return s->begin < t->begin ? -1 : 1;
    return (s->end > t->end) - (s->end < t->end);
}

static void check_overlap(tensor_info *tensors, size_t n) {
    qsort(tensors, n, sizeof *tensors, by_begin);
    for (size_t i = 1; i < n; i++)
        if (tensors[i].begin < tensors[i - 1].end)
            die("%s: tensors %s and %s overlap", tensors[i].shard->path, tensors[i - 1].name, tensors[i].name);
}

/* Appends the tensors of a shard to the checkpoint's list. */
static void shard_open(checkpoint *c, shard *s) {
    unsigned char head[8];
    s->file = open_file(s->path);
    int64_t size = file_size(s->file, s->path);
    uint64_t n = 0;
    if (size < 8) die("%s: %lld bytes is too short for a safetensors file", s->path, (long long)size);
    read_at(s->file, s->path, 0, head, sizeof head);
    for (int i = 7; i >= 0; i--) n = n << 8 | head[i];
    if (n > HEADER_MAX || n > (uint64_t)size - 8)
        die("%s: expected a header of at most %d bytes inside the file's %lld, found %llu", s->path, HEADER_MAX,
            (long long)size, (unsigned long long)n);
    char *text = alloc((size_t)n + 1, 1);
    read_at(s->file, s->path, 8, text, (size_t)n);
    cJSON *header = parse_object(text, (size_t)n, s->path), *entry;
    free(text);
    size_t first = c->n_tensors, most = first + (size_t)cJSON_GetArraySize(header);
    c->tensors = realloc(c->tensors, (most + 1) * sizeof *c->tensors);
    if (!c->tensors) die("no memory for a list of %zu tensors", most);
    cJSON_ArrayForEach(entry, header) {
        if (strcmp(entry->string, "__metadata__") == 0) continue;
        memset(&c->tensors[c->n_tensors], 0, sizeof *c->tensors);
        tensor_parse(&c->tensors[c->n_tensors++], entry, s, 8 + (int64_t)n, size);
    }
    cJSON_Delete(header);
    check_overlap(c->tensors + first, c->n_tensors - first);
}

/* ---- folders ---------------------------------------------------------------------------------------------------- */

/* Lists the distinct file names of an index's weight_map. */
static void list_shards(checkpoint *c, const cJSON *map, const char *index) {
    const cJSON *entry;
    c->shards = alloc((size_t)cJSON_GetArraySize(map), sizeof *c->shards);
    cJSON_ArrayForEach(entry, map) {
        const char *name = cJSON_IsString(entry) ? entry->valuestring : "";
        if (!*name || *name == '.' || strchr(name, '/'))
            die("%s: weight_map: %s: expected the name of a file beside the index", index, entry->string);
        char *path = join_path(c->dir, name);
        size_t i = 0;
        while (i < c->n_shards && strcmp(c->shards[i].path, path) != 0) i++;
        if (i == c->n_shards)
            c->shards[c->n_shards++].path = path;
        else
            free(path);
    }
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
        if (!cJSON_IsObject(map)) die("%s: expected \"weight_map\", an object", index);
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
        fclose(c->shards[i].file);
        free(c->shards[i].path);
    }
    free(c->tensors);
    free(c->shards);
    free(c->dir);
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

static float float_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    if (rest >= 0x0f800000) return float_from_bits(sign | 0x70000000 | rest); /* infinity or NaN */
    return float_from_bits(sign | 0x3f800000) * float_from_bits(rest) * 0x1p112f; /* the exponents' biases differ */
}

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
    return t;
}

static void tensor_read(const tensor_info *t, float *dst) {
    size_t bytes = (size_t)(t->end - t->begin);
    int half = strcmp(t->dtype, "F16") == 0;
    if (strcmp(t->dtype, "F32") == 0) {
        read_at(t->shard->file, t->shard->path, t->begin, dst, bytes);
        return;
    }
    if (!half && strcmp(t->dtype, "BF16") != 0)
        die("%s: tensor %s: expected type F32, F16 or BF16, found %s", t->shard->path, t->name, t->dtype);
    /* 16-bit values go to the second half of dst and are widened upwards: each is read before its bytes are reused. */
    char *narrow = (char *)dst + bytes;
    read_at(t->shard->file, t->shard->path, t->begin, narrow, bytes);
    for (size_t i = 0; i < bytes / 2; i++) {
        uint16_t bits;
        memcpy(&bits, narrow + 2 * i, sizeof bits);
        dst[i] = half ? half_to_float(bits) : float_from_bits((uint32_t)bits << 16);
    }
}

#endif
