// What each instruction set provides; `cpu_ops.cpp` picks one table at run time.
#pragma once
#include <cstdint>

namespace r1mega {

struct Bf16;
struct RowStats;
struct RowGradient;
struct LossOptions;

struct LossTensors {  // [tokens], or [sequences] where `sequence_ids` selects; nullptr where not given
    const float *log_probs, *old_log_probs, *reference_log_probs, *sampler_log_probs, *advantages, *weights;
    const int64_t* sequence_ids;
    const uint8_t* mask;
    bool weights_per_sequence;
    float* grad;
};

struct CpuKernels {
    const char* name;
    // target: the target's column, or -1 when it is not among these columns; the second of a pair has no entropy's terms
    RowStats (*row_stats_f32[2])(const float* logits, int64_t columns, int64_t target, float c);
    RowStats (*row_stats_bf16[2])(const Bf16* logits, int64_t columns, int64_t target, float c);
    void (*row_backward_f32)(const float* logits, float* out, int64_t columns, int64_t target, const RowStats& stats,
                             const RowGradient& gradient, float c);
    void (*row_backward_bf16)(const Bf16* logits, Bf16* out, int64_t columns, int64_t target, const RowStats& stats,
                              const RowGradient& gradient, float c);
    // adds up tokens [begin, end) into sums[kNumSums] and writes their gradients
    void (*token_loss)(const LossTensors& tensors, const LossOptions& options, int64_t begin, int64_t end,
                       double* sums);
};

extern const CpuKernels kernels_generic;
#if defined(__x86_64__)
extern const CpuKernels kernels_avx2, kernels_avx512;
#endif

}  // namespace r1mega
