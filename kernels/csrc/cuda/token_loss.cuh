// The GRPO token loss: terms, gradient, metrics and their reduction in one launch.
#pragma once
#include "r1mega_kernels/token_loss.h"
#include "platform.cuh"

namespace r1mega::device {

constexpr int kLossThreads = 256;
constexpr int kTokensPerBlock = 2048;

struct LossTensors {  // as on the CPU: nullptr where not given
    const float *log_probs, *old_log_probs, *reference_log_probs, *sampler_log_probs, *advantages, *weights;
    const int64_t* sequence_ids;
    const uint8_t* mask;
    bool weights_per_sequence;
    float* grad;
};

R1_DEVICE void add_token(const LossTensors& in, const LossOptions& options, int64_t token, double* sums) {
    if (in.mask && !in.mask[token]) {
        in.grad[token] = 0.f;
        return;
    }
    const int64_t sequence = in.sequence_ids ? in.sequence_ids[token] : token;
    TokenInputs<float> inputs;
    inputs.log_prob = in.log_probs[token];
    inputs.old_log_prob = in.old_log_probs ? in.old_log_probs[token] : 0.f;
    inputs.reference_log_prob = in.reference_log_probs ? in.reference_log_probs[token] : 0.f;
    inputs.sampler_log_prob = in.sampler_log_probs ? in.sampler_log_probs[token] : 0.f;
    inputs.advantage = in.advantages[sequence];
    inputs.weight = !in.weights ? 1.f : in.weights[in.weights_per_sequence ? sequence : token];
    const TokenTerms<float> terms = token_terms(inputs, options);
    in.grad[token] = terms.grad;
    const double values[kNumSums] = {
        terms.loss, 1.0, terms.clipped, terms.kl, terms.mismatch, terms.mismatch, terms.truncated, terms.ratio};
    add_sums(sums, values);
}

// Thread 0 of the block gets the sums, added up as a tree of fixed shape.
R1_DEVICE void block_sums(double (&sums)[kNumSums]) {
    R1_SHARED double of_warp[kLossThreads / 32][kNumSums];
    for (int offset = 16; offset > 0; offset /= 2) {
        double other[kNumSums];
#pragma unroll
        for (int k = 0; k < kNumSums; ++k) other[k] = R1_SHUFFLE_DOWN(sums[k], offset);
        add_sums(sums, other);
    }
    if (threadIdx.x % 32 == 0)
        for (int k = 0; k < kNumSums; ++k) of_warp[threadIdx.x / 32][k] = sums[k];
    R1_SYNC();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kLossThreads / 32; ++warp) add_sums(sums, of_warp[warp]);
}

// partial: [blocks, kNumSums]; finished: one counter, 0 before and after. The block that finishes last adds
// the partial sums as a tree of fixed shape, so the result does not depend on which block that is.
R1_GLOBAL R1_LAUNCH_BOUNDS(kLossThreads) void token_loss(LossTensors tensors, LossOptions options, int64_t count,
                                                         double* partial, unsigned* finished, double* out) {
    double sums[kNumSums] = {};
    const int64_t begin = int64_t(blockIdx.x) * kTokensPerBlock;
    const int64_t end = begin + kTokensPerBlock < count ? begin + kTokensPerBlock : count;
    for (int64_t token = begin + threadIdx.x; token < end; token += kLossThreads)
        add_token(tensors, options, token, sums);
    block_sums(sums);
    R1_SHARED bool is_last;
    if (threadIdx.x == 0) {
        for (int k = 0; k < kNumSums; ++k) partial[int64_t(blockIdx.x) * kNumSums + k] = sums[k];
        R1_FENCE();
        is_last = R1_ATOMIC_ADD(finished, 1u) == gridDim.x - 1;
    }
    R1_SYNC();
    if (!is_last) return;
    R1_FENCE();
    double total[kNumSums] = {};
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kLossThreads) {
        double part[kNumSums];
        for (int k = 0; k < kNumSums; ++k) part[k] = R1_LOAD_FRESH(partial + int64_t(block) * kNumSums + k);
        add_sums(total, part);
    }
    block_sums(total);
    if (threadIdx.x != 0) return;
    for (int k = 0; k < kNumSums; ++k) out[k] = total[k];
    *finished = 0;
}

}  // namespace r1mega::device
