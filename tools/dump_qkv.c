/* dump_qkv - the classifier, and every self-attention's q, k and v as files for fidelity.
 *
 *     DUMP=qkv build/dump_qkv MODEL VIDEO --dense      writes qkv_l0_16x16x16.npy [3,H,N,D] (float16), qkv_l1_..., ...
 */
#define _DEFAULT_SOURCE
#define PSA_IMPLEMENTATION
#include "psa.h"

#include "elements.h"
#include "npy.h"

static psa_result dump_attention(const psa_desc *desc, const psa_tensor *q, const psa_tensor *k, const psa_tensor *v,
                                 const psa_tensor *out, psa_extra *extra);
#define psa_attention dump_attention
#undef _DEFAULT_SOURCE /* as the C library left it, which classify.c defines differently */
#include "../examples/classify.c"
#undef psa_attention

/* The f32 rows of all heads, packed. */
static uint16_t *pack(uint16_t *to, const psa_tensor *t) {
    for (int64_t h = 0; h < t->ne[2]; h++)
        for (int64_t n = 0; n < t->ne[1]; n++) {
            const float *row = (const float *)(const void *)((char *)t->data + (size_t)h * t->nb[2] +
                                                             (size_t)n * t->nb[1]);
            for (int64_t i = 0; i < t->ne[0]; i++) *to++ = half_from_float(row[i]);
        }
    return to;
}

static void dump(const encoder *e, const psa_tensor *q, const psa_tensor *k, const psa_tensor *v) {
    char path[PATH_MAX], err[PATH_MAX + 256];
    const int64_t shape[] = {3, q->ne[2], q->ne[1], q->ne[0]};
    uint16_t *data = alloc((size_t)(3 * q->ne[2] * q->ne[1] * q->ne[0]), sizeof *data);
    snprintf(path, sizeof path, "%s_l%d_%dx%dx%d.npy", getenv("DUMP"), e->layer, e->grid[0], e->grid[1], e->grid[2]);
    pack(pack(pack(data, q), k), v);
    if (npy_write(path, "<f2", 4, shape, data, err, sizeof err) != 0) die("%s", err);
    free(data);
}

/* In place of psa_attention; alloc_user is the encoder. The pooler's one query is no self-attention. */
static psa_result dump_attention(const psa_desc *desc, const psa_tensor *q, const psa_tensor *k, const psa_tensor *v,
                                 const psa_tensor *out, psa_extra *extra) {
    if (q->ne[1] == k->ne[1] && q->type == PSA_F32) {
        if (!getenv("DUMP")) die("DUMP is not set; expected the beginning of the files' names");
        dump(desc->alloc_user, q, k, v);
    }
    return psa_attention(desc, q, k, v, out, extra);
}
