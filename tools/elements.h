/* elements.h - f16 and bf16 numbers, one by one. Everything is static. Include after psa.h. */
#ifndef ELEMENTS_H
#define ELEMENTS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static float float_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31)
        return float_from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0)
        return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Keeps bits - drop of the low ones, to nearest, ties to even. */
static uint32_t round_bits(uint32_t bits, int drop) {
    return (bits + ((1u << (drop - 1)) - 1) + (bits >> drop & 1)) >> drop;
}

static uint16_t half_from_float(float f) {
    uint32_t bits, sign;
    memcpy(&bits, &f, sizeof bits);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000) /* rounds to 65536 or more */
        return (uint16_t)(sign | 0x7c00);
    if (bits < 0x38800000) /* below the smallest normal half: let the addition round */
        return (uint16_t)(sign | (uint32_t)(rintf(float_from_bits(bits) * 0x1p24f)));
    return (uint16_t)(sign | round_bits(bits - 0x38000000, 13));
}

static uint16_t bf16_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40); /* a quiet NaN, whatever its low bits are */
    return (uint16_t)round_bits(bits, 16);
}

static void set_element(void *data, psa_type type, size_t i, float value) {
    if (type == PSA_F32)
        ((float *)data)[i] = value;
    else
        ((uint16_t *)data)[i] = type == PSA_F16 ? half_from_float(value) : bf16_from_float(value);
}
#endif
