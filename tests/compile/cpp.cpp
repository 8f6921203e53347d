// cpp.cpp - the implementation compiled as C++, and dense attention with it against a plain loop.
#define PSA_IMPLEMENTATION
#include "psa.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

static const int N = 100, D = 16;

static std::vector<float> numbers(int factor) {
    std::vector<float> x(static_cast<size_t>(N * D));
    for (int i = 0; i < N * D; i++)
        x[static_cast<size_t>(i)] = static_cast<float>(i * factor % 101) / 50 - 1;
    return x;
}

static double expected(const std::vector<float> &q, const std::vector<float> &k, const std::vector<float> &v, int row,
                       int d) {
    double sum = 0, out = 0;
    for (int j = 0; j < N; j++) {
        double logit = 0;
        for (int e = 0; e < D; e++)
            logit += static_cast<double>(q[static_cast<size_t>(row * D + e)]) *
                     static_cast<double>(k[static_cast<size_t>(j * D + e)]);
        const double p = std::exp(logit / std::sqrt(static_cast<double>(D)));
        sum += p;
        out += p * static_cast<double>(v[static_cast<size_t>(j * D + d)]);
    }
    return out / sum;
}

int main() {
    std::vector<float> q = numbers(37), k = numbers(53), v = numbers(71), out(q.size());
    psa_desc desc;
    std::memset(&desc, 0, sizeof desc);
    desc.mask = PSA_MASK_DENSE;
    const psa_tensor tq = psa_tensor_4d(q.data(), PSA_F32, D, N, 1, 1),
                     tk = psa_tensor_4d(k.data(), PSA_F32, D, N, 1, 1);
    const psa_tensor tv = psa_tensor_4d(v.data(), PSA_F32, D, N, 1, 1),
                     to = psa_tensor_4d(out.data(), PSA_F32, D, N, 1, 1);
    const psa_result result = psa_attention(&desc, &tq, &tk, &tv, &to, nullptr);
    double worst = 0;
    for (int i = 0; i < N * D; i++)
        worst = std::fmax(
            worst, std::fabs(static_cast<double>(out[static_cast<size_t>(i)]) - expected(q, k, v, i / D, i % D)));
    if (result != PSA_OK || !(worst < 1e-5)) {
        std::printf("cpp: %s, largest error %g\n", psa_result_string(result), worst);
        return 1;
    }
    return 0;
}
