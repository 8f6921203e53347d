/* static_a.c, static_b.c - two private copies of the library in one program give the same bits.
 *
 *     cc -I. tests/compile/static_a.c tests/compile/static_b.c -lm -pthread -o build/static && build/static */
#define PSA_STATIC
#define PSA_IMPLEMENTATION
#include "psa.h"

#include <stdio.h>
#include <string.h>

enum { N = 300, D = 16 };

psa_result attention_b(const psa_tensor *q, const psa_tensor *k, const psa_tensor *v, const psa_tensor *out);

int main(void) {
    static float q[N * D], k[N * D], v[N * D], a[N * D], b[N * D];
    psa_desc desc;
    for (int i = 0; i < N * D; i++) {
        q[i] = (float)(i * 37 % 101) / 50 - 1;
        k[i] = (float)(i * 53 % 103) / 50 - 1;
        v[i] = (float)(i * 71 % 107) / 50 - 1;
    }
    psa_tensor tq = psa_tensor_4d(q, PSA_F32, D, N, 1, 1), tk = psa_tensor_4d(k, PSA_F32, D, N, 1, 1);
    psa_tensor tv = psa_tensor_4d(v, PSA_F32, D, N, 1, 1), ta = psa_tensor_4d(a, PSA_F32, D, N, 1, 1);
    psa_tensor tb = psa_tensor_4d(b, PSA_F32, D, N, 1, 1);
    memset(&desc, 0, sizeof desc);
    if (psa_attention(&desc, &tq, &tk, &tv, &ta, NULL) != PSA_OK || attention_b(&tq, &tk, &tv, &tb) != PSA_OK) {
        printf("static: attention failed\n");
        return 1;
    }
    if (a[0] == 0 || memcmp(a, b, sizeof a) != 0) {
        printf("static: the copies differ\n");
        return 1;
    }
    return 0;
}
