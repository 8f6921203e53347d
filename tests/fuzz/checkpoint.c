/* checkpoint.c - libFuzzer over everything that reads a checkpoint: safetensors, the index of shards, config.json and
 * the processor's settings.
 *
 *     clang -std=c99 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -I. -Itools -Iexamples
 *         tests/fuzz/checkpoint.c -lcjson -o build/fuzz
 *     mkdir -p build/corpus
 *     build/fuzz -max_total_time=600 -max_len=8192 -dict=tests/fuzz/words.dict build/corpus tests/fuzz/seeds
 *
 * `make fuzz` does that; TMPDIR=/dev/shm makes it several times as fast. An input is a letter, which chooses what is
 * run, and the files of a folder, a ~ between them; an empty one is absent:
 *
 *     w  model.safetensors, as it stands             t  model.safetensors, only its header
 *     i  the index, headers of a.safetensors and b.safetensors
 *     c  config.json                                 m  config.json, header of model.safetensors
 *     p  processor_config.json, video_preprocessor_config.json, preprocessor_config.json
 *
 * A header is given its length and its data, so that inputs are text. The programs' headers are included with a few
 * functions replaced: exit returns to the fuzzer, which takes back what the run held; memory is limited; mmap copies
 * the file, so that reading one byte past its end is seen. Checked besides: errors are one line and status 2, what is
 * accepted is in order, and nothing is left behind. */
#define _DEFAULT_SOURCE
#define _FILE_OFFSET_BITS 64
#include <cjson/cJSON.h>
#include <iconv.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MOST_MEMORY ((size_t)64 << 20) /* of one run; model_load sizes memory by numbers in the files */
#define MOST_DATA 65536
#define MOST_FILES 4

static jmp_buf back;
static char folder[4096];
static char said[1 << 16];
static FILE *messages; /* takes the place of stderr */

static void must(int holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "%s; the message is: %s\n", what, said);
    abort();
}

/* ---- functions replaced ----------------------------------------------------------------------------------------- */

typedef struct piece {
    struct piece *next, *previous;
} piece;

static piece pieces = {&pieces, &pieces};
static size_t held;
static FILE *files[MOST_FILES];

static void *piece_link(piece *p) {
    if (!p) return NULL;
    p->next = pieces.next;
    p->previous = &pieces;
    p->next->previous = pieces.next = p;
    return p + 1;
}

static void piece_unlink(piece *p) {
    p->next->previous = p->previous;
    p->previous->next = p->next;
}

static int is_too_much(size_t size) {
    if (size > MOST_MEMORY - held) return 1;
    held += size;
    return 0;
}

static void *fuzz_calloc(size_t count, size_t size) {
    if (size && count > MOST_MEMORY / size) return NULL;
    return is_too_much(count * size) ? NULL : piece_link(calloc(1, sizeof(piece) + count * size));
}

static void *fuzz_malloc(size_t size) {
    return is_too_much(size) ? NULL : piece_link(malloc(sizeof(piece) + size));
}

static void *fuzz_realloc(void *p, size_t size) {
    piece *old = p ? (piece *)p - 1 : NULL;
    if (is_too_much(size)) return NULL;
    if (old) piece_unlink(old);
    return piece_link(realloc(old, sizeof(piece) + size));
}

static void fuzz_free(void *p) {
    if (!p) return;
    piece_unlink((piece *)p - 1);
    free((piece *)p - 1);
}

static FILE *fuzz_fopen(const char *path, const char *mode) {
    FILE *f = fopen(path, mode);
    for (int i = 0; f && i < MOST_FILES; i++)
        if (!files[i]) return files[i] = f;
    must(!f, "too many open files");
    return NULL;
}

static int fuzz_fclose(FILE *f) {
    for (int i = 0; i < MOST_FILES; i++)
        if (files[i] == f) files[i] = NULL;
    return fclose(f);
}

static void *fuzz_mmap(size_t size, int file) {
    char *copy = fuzz_malloc(size);
    must(copy && pread(file, copy, size, 0) == (ssize_t)size, "mmap of something else than the whole file");
    return copy;
}

/* One line, and nothing in it that a terminal or a log would take for more. */
__attribute__((noreturn)) static void fuzz_exit(int status) {
    char *end;
    fflush(messages);
    end = strchr(said, '\n');
    must(status == 2, "the status is not 2");
    must(end && !end[1] && strncmp(said, "classify: ", 10) == 0, "not one line");
    for (const char *c = said; c < end; c++) must((unsigned char)*c >= 32 && *c != 127, "a control character");
    longjmp(back, 1);
}

#define calloc(count, size) fuzz_calloc(count, size)
#define malloc(size) fuzz_malloc(size)
#define realloc(p, size) fuzz_realloc(p, size)
#define free(p) fuzz_free(p)
#define fopen(path, mode) fuzz_fopen(path, mode)
#define fclose(f) fuzz_fclose(f)
#define mmap(address, size, protection, flags, file, offset) fuzz_mmap(size, file)
#define munmap(p, size) fuzz_free(p)
#define exit(status) fuzz_exit(status)
#undef stderr
#define stderr messages

#include "psa.h"

#include "preprocess.h"

#include "model.h"

/* ---- what is run ------------------------------------------------------------------------------------------------ */

static void check_tensor(const checkpoint *c, const tensor_info *t) {
    int64_t size = dtype_size(t->dtype), count = size ? (t->end - t->begin) / size : 0;
    const float *floats;
    float *values;
    must(checkpoint_find(c, t->name) == t, "a tensor is not found by its name");
    must(t->data >= t->shard->bytes + 8 && t->data + (t->end - t->begin) <= t->shard->bytes + t->shard->size,
         "a tensor lies outside its file");
    if (strcmp(t->dtype, "F32") != 0 && strcmp(t->dtype, "F16") != 0 && strcmp(t->dtype, "BF16") != 0) return;
    must(checkpoint_need(c, t->name, t->ndim, t->shape) == t, "another tensor of that name");
    values = alloc((size_t)count, sizeof *values);
    tensor_widen(t, 0, count / 2, values);
    tensor_widen(t, count / 2, count - count / 2, values + count / 2);
    floats = tensor_floats(t);
    must(!floats || memcmp(floats, values, (size_t)count * sizeof *values) == 0, "floats differ from widened ones");
    free(values);
}

static void run_weights(void) {
    checkpoint c;
    int64_t bytes = 0;
    checkpoint_open(&c, folder);
    for (size_t i = 0; i < c.n_tensors; i++) {
        bytes += c.tensors[i].end - c.tensors[i].begin;
        check_tensor(&c, &c.tensors[i]);
    }
    must(bytes == checkpoint_bytes(&c), "the sum of the bytes");
    checkpoint_close(&c);
}

static void run_config(void) {
    char *path = join_path(folder, "config.json");
    cJSON *json = read_object(path);
    model m;
    memset(&m, 0, sizeof m);
    read_config(&m, json, path);
    must(m.n_labels > 0 && m.eps > 0 && m.frames > 0 && m.tubelet > 0 && m.n_blocks > 0 && m.n_pooler >= 0, "config");
    must(m.side_h % m.patch == 0 && m.side_w % m.patch == 0 && m.C % (8 * m.heads) == 0, "config: sides and heads");
    for (int i = 0; i < m.n_labels; i++) {
        must(m.labels[i] != NULL, "config: a label is missing");
        free(m.labels[i]);
    }
    free(m.labels);
    cJSON_Delete(json);
    free(path);
}

static void run_model(void) {
    model m;
    model_load(&m, folder);
    must(m.classifier.out == m.n_labels && m.classifier.in == m.C, "the classifier's shape");
    model_free(&m);
}

static void run_settings(void) {
    settings s;
    for (int is_vjepa2 = 0; is_vjepa2 < 2; is_vjepa2++) {
        settings_read(&s, folder, is_vjepa2);
        must(s.shortest > 0 || (s.size_h > 0 && s.size_w > 0), "settings: no size to resize to");
        must(s.crop_h > 0 && s.crop_w > 0 && s.factor > 0 && s.resample >= 0 && s.resample != 1, "settings");
        for (int i = 0; i < 3; i++) must(s.std[i] > 0 && isfinite(s.mean[i]), "settings: mean and std");
    }
}

typedef struct reader {
    char letter;
    void (*run)(void);
    const char *files[3];
} reader;

static const reader readers[] = {
    {'w', run_weights, {"model.safetensors"}},
    {'t', run_weights, {"model.safetensors"}},
    {'i', run_weights, {"model.safetensors.index.json", "a.safetensors", "b.safetensors"}},
    {'c', run_config, {"config.json"}},
    {'m', run_model, {"config.json", "model.safetensors"}},
    {'p', run_settings, {"processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"}},
};
enum { N_READERS = sizeof readers / sizeof *readers };

/* ---- the folder ------------------------------------------------------------------------------------------------- */

static unsigned char tensor_data[MOST_DATA]; /* the f16 numbers from 0 through infinity to the last NaN */

static const char *path_of(const char *name) {
    static char path[sizeof folder + 64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void empty_folder(void) {
    for (int i = 0; i < N_READERS; i++)
        for (int j = 0; j < 3; j++)
            if (readers[i].files[j]) unlink(path_of(readers[i].files[j]));
}

static void remove_folder(void) {
    empty_folder();
    rmdir(folder);
}

static void write_all(FILE *f, const void *data, size_t size) {
    must(fwrite(data, 1, size, f) == size, "cannot write the input");
}

/* The largest number before a ]: in a valid header, where the last tensor ends. */
static size_t data_size(const char *text, size_t size) {
    size_t largest = 0, number = 0;
    for (size_t i = 0; i < size; i++) {
        if (text[i] == ']' && number > largest) largest = number;
        number = text[i] >= '0' && text[i] <= '9' && number < MOST_DATA ? 10 * number + (size_t)(text[i] - '0') : 0;
    }
    return largest < MOST_DATA ? largest : MOST_DATA;
}

static void write_file(const char *name, const char *text, size_t size, int is_whole) {
    FILE *f = fopen(path_of(name), "wb");
    must(f != NULL, "cannot write the input");
    if (!is_whole && strstr(name, ".safetensors") && !strstr(name, ".json")) {
        for (int i = 0; i < 8; i++) fputc((int)(size >> 8 * i & 255), f);
        write_all(f, text, size);
        write_all(f, tensor_data, data_size(text, size));
    } else {
        write_all(f, text, size);
    }
    fclose(f);
}

static void write_files(const reader *r, const char *text, size_t size) {
    empty_folder();
    for (int i = 0; i < 3 && r->files[i]; i++) {
        int is_last = i == 2 || !r->files[i + 1];
        const char *end = is_last ? NULL : memchr(text, '~', size);
        size_t n = end ? (size_t)(end - text) : size;
        if (n) write_file(r->files[i], text, n, r->letter == 'w');
        text += end ? n + 1 : n;
        size -= end ? n + 1 : n;
    }
}

static void take_back(void) {
    while (pieces.next != &pieces) free(pieces.next + 1);
    for (int i = 0; i < MOST_FILES; i++)
        if (files[i]) fclose(files[i]);
    held = 0;
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    cJSON_Hooks hooks = {fuzz_malloc, fuzz_free};
    const char *tmp = getenv("TMPDIR");
    (void)argc, (void)argv;
    snprintf(folder, sizeof folder, "%s/fuzz-XXXXXX", tmp ? tmp : "/tmp");
    must(mkdtemp(folder) != NULL, "no folder for the inputs");
    atexit(remove_folder);
    cJSON_InitHooks(&hooks);
    for (int i = 0; i < MOST_DATA; i++) tensor_data[i] = (unsigned char)(i & 1 ? i >> 9 : i >> 1);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const reader *r = readers;
    while (size && r < readers + N_READERS && r->letter != *data) r++;
    if (!size || r == readers + N_READERS) return 0;
    write_files(r, (const char *)data + 1, size - 1);
    take_back();
    said[0] = 0;
    messages = fmemopen(said, sizeof said, "w");
    if (setjmp(back) == 0) {
        r->run();
        must(pieces.next == &pieces, "memory is left behind");
        for (int i = 0; i < MOST_FILES; i++) must(!files[i], "a file is left open");
    }
    take_back();
    (fclose)(messages);
    return 0;
}
