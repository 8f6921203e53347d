/* instructions.c - one of three fixed calls on AVX2, for counting its instructions:
 *
 *     cc -O2 -I. tests/compile/instructions.c -o build/instructions -lm -pthread
 *     valgrind --tool=callgrind --toggle-collect=psa_attention build/instructions dense|sparse|decode */
#define PSA_IMPLEMENTATION
#include "psa.h"

#include <stdio.h>
#include <string.h>

enum { N = 512, LONG = 4096, D = 64 };

static float kv[2 * LONG * D], q[N * D], out[N * D];

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : "";
    int decode = !strcmp(name, "decode");
    int64_t n_q = decode ? 4 : N, n_k = decode ? LONG : N;
    psa_desc desc;
    if (!decode && strcmp(name, "dense") && strcmp(name, "sparse")) {
        fprintf(stderr, "instructions: expected dense, sparse or decode\n");
        return 2;
    }
    for (int i = 0; i < 2 * LONG * D; i++)
        kv[i] = (float)(i * 53 % 103) / 50 - 1;
    for (int i = 0; i < N * D; i++)
        q[i] = (float)(i * 37 % 101) / 50 - 1;
    psa_tensor tq = psa_tensor_4d(q, PSA_F32, D, n_q, 1, 1), tk = psa_tensor_4d(kv, PSA_F32, D, n_k, 1, 1);
    psa_tensor tv = psa_tensor_4d(kv + LONG * D, PSA_F32, D, n_k, 1, 1), to = psa_tensor_4d(out, PSA_F32, D, n_q, 1, 1);
    memset(&desc, 0, sizeof desc);
    desc.isa = PSA_ISA_AVX2; /* valgrind knows no AVX-512 */
    desc.n_threads = 1;
    desc.mask = strcmp(name, "sparse") ? PSA_MASK_DENSE : PSA_MASK_TOPK;
    psa_result r = psa_attention(&desc, &tq, &tk, &tv, &to, NULL);
    if (r != PSA_OK)
        fprintf(stderr, "instructions: %s\n", psa_result_string(r));
    return r != PSA_OK;
}
