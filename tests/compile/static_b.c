/* static_b.c - the other copy, see static_a.c. */
#define PSA_STATIC
#define PSA_IMPLEMENTATION
#include "psa.h"

#include <string.h>

psa_result attention_b(const psa_tensor *q, const psa_tensor *k, const psa_tensor *v, const psa_tensor *out);

psa_result attention_b(const psa_tensor *q, const psa_tensor *k, const psa_tensor *v, const psa_tensor *out) {
    psa_desc desc;
    memset(&desc, 0, sizeof desc);
    return psa_attention(&desc, q, k, v, out, NULL);
}
