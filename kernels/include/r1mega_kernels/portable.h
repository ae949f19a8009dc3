// What one source needs to be compiled by nvcc for a GPU, by g++ for the CPU and by g++ for the emulator.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define R1_FN static __host__ __device__ __forceinline__
#define R1_FN_MEMBER __host__ __device__ __forceinline__
#else
// Internal linkage: the CPU file is compiled once per instruction set, and the linker must never merge those copies.
#define R1_FN [[maybe_unused]] static inline __attribute__((always_inline))
#define R1_FN_MEMBER inline __attribute__((always_inline))
#endif

namespace r1mega {

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;

struct Bf16 {
    uint16_t bits;
};
struct Half {  // of gradients alone
    uint16_t bits;
};

R1_FN float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

R1_FN uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

R1_FN float minus_infinity() { return as_float(0xff800000u); }
R1_FN float quiet_nan() { return as_float(0x7fc00000u); }

R1_FN float to_float(float value) { return value; }
R1_FN float to_float(Bf16 value) { return as_float(uint32_t(value.bits) << 16); }

R1_FN void from_float(float value, float& out) { out = value; }
// Round to nearest, ties to even; a NaN stays a NaN.
R1_FN void from_float(float value, Bf16& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = as_bits(value);
    out.bits = value != value ? uint16_t(0x7fc0u) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// The same; what is beyond 65504 becomes infinite.
R1_FN void from_float(float value, Half& out) {
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t half = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) - 0x38000000u) >> 13;
    if (magnitude < 0x38800000u) half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // a multiple of 2^-24, as a sum is
    if (magnitude >= 0x477ff000u) half = 0x7c00u;
    if (value != value) half = 0x7e00u;
    out.bits = uint16_t(sign | half);
#endif
}

// 2^t for t <= 0. -inf gives 0 and NaN stays NaN.
R1_FN float fast_exp2(float t) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(t));
    return result;
#else
    return exp2f(t);
#endif
}

}  // namespace r1mega
