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
#define R1_FENCE() __threadfence()
#define R1_SHUFFLE_DOWN(value, offset) __shfl_down_sync(0xffffffffu, value, offset)
#define R1_SHUFFLE_XOR(value, offset) __shfl_xor_sync(0xffffffffu, value, offset)
#define R1_ATOMIC_ADD(address, value) atomicAdd(address, value)
#define R1_LOAD_STREAMING(address) \
    __ldcs(address)                             // evict first; coherent, since the gradient may overwrite the logits
#define R1_LOAD_FRESH(address) __ldcg(address)  // from L2: another block wrote it
#endif
