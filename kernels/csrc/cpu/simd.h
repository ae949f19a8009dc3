// Vectors of floats by GCC's vector extensions: one source for AVX512, AVX2 and 128-bit SSE2 or NEON, by compiler
// flags.
#pragma once
#include "r1mega_kernels/portable.h"

#ifndef R1_WIDTH
#error "compile with -DR1_WIDTH=<floats per vector> and -DR1_ISA=<name>"
#endif

namespace r1mega {

constexpr int kWidth = R1_WIDTH;
typedef float Vec __attribute__((vector_size(4 * R1_WIDTH)));
typedef int32_t IntVec __attribute__((vector_size(4 * R1_WIDTH)));
typedef uint32_t UintVec __attribute__((vector_size(4 * R1_WIDTH)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * R1_WIDTH)));

R1_FN Vec splat(float value, Vec) { return value - Vec{}; }
R1_FN Vec splat(float value) { return value - Vec{}; }
R1_FN Vec select(IntVec condition, Vec a, Vec b) { return condition ? a : b; }
R1_FN Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // a NaN in a gives b

R1_FN Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
R1_FN Vec load(const Bf16* p) {
    HalfVec half;
    memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, UintVec) << 16);
}
R1_FN void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
R1_FN void store(Bf16* p, Vec v) {
    const UintVec bits = (UintVec)v;
    const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const UintVec quiet_nan = 0x7fc0u - UintVec{};
    const HalfVec half = __builtin_convertvector((v != v) ? quiet_nan : rounded, HalfVec);
    memcpy(p, &half, sizeof half);
}

// Lanes are added pairwise in a fixed order, in double.
R1_FN double lane_sum(Vec v) {
    double lanes[kWidth];
    for (int i = 0; i < kWidth; ++i) lanes[i] = v[i];
    for (int half = kWidth / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
R1_FN float lane_max(Vec v) {
    float max = v[0];
    for (int i = 1; i < kWidth; ++i) max = v[i] > max ? v[i] : max;
    return max;
}

// 1.5 * 2^23 leaves the rounded integer in the low bits of the sum; + 127 makes them a float's exponent.
constexpr float kRound = 12582912.f + 127.f;

R1_FN Vec power_of_two(Vec rounded) { return (Vec)((IntVec)rounded << 23); }

// 2^t for t in [-127, 0]; exactly 0 below -126.5. Relative error 2e-9 of the polynomial and the rounding of 7
// operations.
R1_FN Vec exp2_negative(Vec t) {
    const Vec rounded = t + kRound;
    const Vec f = t - (rounded - kRound);
    Vec p = 1.5403530393e-4f * f + 1.3333558146e-3f;
    p = p * f + 9.6181291076e-3f;
    p = p * f + 5.5504108665e-2f;
    p = p * f + 2.4022650696e-1f;
    p = p * f + 6.9314718056e-1f;
    p = p * f + 1.0f;
    return p * power_of_two(rounded);
}

// e^x for any x: +inf beyond the range of fp32, 0 below it, NaN for NaN; within 2 units in the last place.
R1_FN Vec exp_accurate(Vec x) {
    x = x > 89.f ? splat(89.f) : x;
    x = x < -88.f ? splat(-88.f) : x;
    const Vec rounded = x * kLog2e + kRound;
    const Vec n = rounded - kRound;
    const Vec f = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts: the first has 9 bits
    Vec p = 1.0f / 5040 * f + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    return p * power_of_two(rounded);
}

}  // namespace r1mega
