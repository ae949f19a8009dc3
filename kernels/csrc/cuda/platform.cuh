// The words of CUDA that the kernels use; the emulator brings its own under the same names.
#pragma once
#if defined(R1_EMULATED)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>

#define R1_DEVICE __device__ __forceinline__
#define R1_GLOBAL __global__
#define R1_LAUNCH_BOUNDS(threads) __launch_bounds__(threads)
#define R1_SHARED __shared__
#define R1_SYNC() __syncthreads()
#define R1_SYNC_WARP() __syncwarp()
#define R1_FENCE() __threadfence()
#define R1_SHUFFLE_DOWN(value, offset) __shfl_down_sync(0xffffffffu, value, offset)
#define R1_SHUFFLE_XOR(value, offset) __shfl_xor_sync(0xffffffffu, value, offset)
#define R1_ATOMIC_ADD(address, value) atomicAdd(address, value)
#define R1_LOAD_STREAMING(address) \
    __ldcs(address)                             // evict first; coherent, since the gradient may overwrite the logits
// Of two bf16 in a word each, from sm_80; NAN: a NaN wins, otherwise it loses.
#define R1_MAX_BF16X2(a, b) r1mega::device::max_bf16x2(a, b)
#define R1_MAX_NAN_BF16X2(a, b) r1mega::device::max_nan_bf16x2(a, b)
#define R1_MAX_NAN(a, b) r1mega::device::max_nan(a, b)
#define R1_LOAD_FRESH(address) __ldcg(address)  // from L2: another block wrote it

namespace r1mega::device {
R1_DEVICE unsigned max_bf16x2(unsigned a, unsigned b) {
    unsigned result;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
R1_DEVICE unsigned max_nan_bf16x2(unsigned a, unsigned b) {
    unsigned result;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
R1_DEVICE float max_nan(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}
}  // namespace r1mega::device
#endif
