// The kernels of one instruction set. Compiled once for each; nothing here may have external linkage but the table.
#include "simd.h"  // before token_loss.h, whose templates use its vector functions

#include "kernels.h"
#include "r1mega_kernels/row_stats.h"
#include "r1mega_kernels/token_loss.h"

namespace r1mega {
namespace {

constexpr int kBlock = 1024;  // columns: read from memory for the maximum, then from L1 for the exponentials
constexpr int kUnroll = 4;
constexpr int kStep = kUnroll * kWidth;

template <class E>
struct Padded {  // the last columns of a row, filled up with -inf
    alignas(64) E values[kStep];
    Padded(const E* logits, int64_t count) {
        for (int i = 0; i < kStep; ++i) from_float(i < count ? to_float(logits[i]) : minus_infinity(), values[i]);
    }
};

template <class E>
R1_FN float block_max(const E* x, int64_t columns, float max) {
    Vec acc[kUnroll];
    for (int k = 0; k < kUnroll; ++k) acc[k] = splat(max);
    for (int64_t j = 0; j < columns; j += kStep)
        for (int k = 0; k < kUnroll; ++k) acc[k] = larger(load(x + j + k * kWidth), acc[k]);
    return lane_max(larger(larger(acc[0], acc[1]), larger(acc[2], acc[3])));
}

R1_FN Vec exponent(Vec x, Vec base, float c) {
    const Vec t = (x - base) * c;
    return t < -127.f ? splat(-127.f) : t;  // keeps a NaN
}

template <bool kEntropy>
struct Accumulator {
    Vec sum[kUnroll] = {}, weighted[kUnroll] = {};

    template <class E>
    R1_FN_MEMBER void add(const E* x, Vec base, float c) {
        for (int k = 0; k < kUnroll; ++k) {
            const Vec t = exponent(load(x + k * kWidth), base, c);
            const Vec e = exp2_negative(t);
            sum[k] += e;
            if (kEntropy) weighted[k] += e * t;
        }
    }
};

// `columns` is a multiple of kStep. fp32 within a block, double across blocks.
template <bool kEntropy, class E>
R1_FN void add_block(const E* x, int64_t columns, float c, float& max, double& sum, double& weighted) {
    const float new_max = block_max(x, columns, max);
    if (new_max > max) {
        if (sum != 0.0) {
            const double shift = (double(max) - double(new_max)) * c;
            const double scale = shift < -127.0 ? 0.0 : exp2(shift);
            weighted = scale == 0.0 ? 0.0 : scale * (weighted + sum * shift);
            sum *= scale;
        }
        max = new_max;
    }
    const Vec base = splat(safe_base(max));
    Accumulator<kEntropy> acc;
    for (int64_t j = 0; j < columns; j += kStep) acc.add(x + j, base, c);
    sum += lane_sum((acc.sum[0] + acc.sum[1]) + (acc.sum[2] + acc.sum[3]));
    weighted += lane_sum((acc.weighted[0] + acc.weighted[1]) + (acc.weighted[2] + acc.weighted[3]));
}

template <class E, bool kEntropy>
RowStats row_stats(const E* x, int64_t columns, int64_t target, float c) {
    float max = minus_infinity();
    double sum = 0, weighted = 0;
    const int64_t whole = columns / kStep * kStep;
    for (int64_t j = 0; j < whole; j += kBlock)
        add_block<kEntropy>(x + j, whole - j < kBlock ? whole - j : int64_t(kBlock), c, max, sum, weighted);
    if (whole < columns) {
        const Padded<E> tail(x + whole, columns - whole);
        add_block<kEntropy>(tail.values, kStep, c, max, sum, weighted);
    }
    RowStats stats;
    stats.max = max;
    stats.sum = float(sum);
    stats.weighted = kEntropy ? float(weighted) : quiet_nan();
    stats.target = target < 0 ? quiet_nan() : to_float(x[target]);
    return stats;
}

R1_FN Vec gradient_of(Vec x, Vec base, const RowGradient& gradient, float c) {
    const Vec t = exponent(x, base, c);
    return exp2_negative(t) * (gradient.scale + gradient.slope * t);
}

// `out` may be `x`: each vector is read before it is written.
template <class E>
void row_backward(const E* x, E* out, int64_t columns, int64_t target, const RowStats& stats,
                  const RowGradient& gradient, float c) {
    if (gradient.is_zero) {
        memset(out, 0, size_t(columns) * sizeof(E));
        return;
    }
    const Vec base = splat(safe_base(stats.max));
    float at_target = 0.f;
    if (target >= 0)
        at_target = gradient_of(splat(to_float(x[target])), base, gradient, c)[0] + gradient.target_gradient;
    const int64_t whole = columns / kStep * kStep;
    for (int64_t j = 0; j < whole; j += kStep)
        for (int k = 0; k < kUnroll; ++k)
            store(out + j + k * kWidth, gradient_of(load(x + j + k * kWidth), base, gradient, c));
    if (whole < columns) {
        Padded<E> tail(x + whole, columns - whole);
        for (int k = 0; k < kStep; k += kWidth)
            store(tail.values + k, gradient_of(load(tail.values + k), base, gradient, c));
        memcpy(out + whole, tail.values, size_t(columns - whole) * sizeof(E));
    }
    if (target >= 0) from_float(at_target, out[target]);
}

constexpr int kTokenBlock = 256;

// counts is 1 or 0; a token that does not count reads element 0, for its sequence number may be anything. Without a
// branch, since masks are irregular; not vectorized, since gather instructions are slower than the loads that they
// stand for.
__attribute__((noinline, optimize("no-tree-vectorize"))) void gather(const float* source, const int64_t* ids,
                                                                     const float* counts, float* target,
                                                                     int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t keep = -int64_t(as_bits(counts[i]) >> 29);  // 1.0f is 0x3f800000
        target[i] = source[ids[i] & keep];
    }
}

struct TokenBlock {  // one block of tokens in local arrays, gathered and padded; what does not count may be garbage
    alignas(64) float log_prob[kTokenBlock], old[kTokenBlock], reference[kTokenBlock], sampler[kTokenBlock],
        advantage[kTokenBlock], weight[kTokenBlock], counts[kTokenBlock];

    R1_FN_MEMBER void fill(const LossTensors& in, int64_t begin, int64_t count) {
        for (int64_t i = 0; i < kTokenBlock; ++i) counts[i] = i < count ? 1.f : 0.f;
        if (in.mask)
            for (int64_t i = 0; i < count; ++i) counts[i] = in.mask[begin + i] ? 1.f : 0.f;
        copy(in.log_probs, log_prob, begin, count);
        copy(in.old_log_probs, old, begin, count);
        copy(in.reference_log_probs, reference, begin, count);
        copy(in.sampler_log_probs, sampler, begin, count);
        if (in.sequence_ids) {
            gather(in.advantages, in.sequence_ids + begin, counts, advantage, count);
        } else {
            copy(in.advantages, advantage, begin, count);
        }
        if (in.weights_per_sequence) {
            gather(in.weights, in.sequence_ids + begin, counts, weight, count);
        } else if (in.weights) {
            copy(in.weights, weight, begin, count);
        } else {
            memcpy(weight, counts, sizeof weight);
        }
    }

    R1_FN_MEMBER void copy(const float* source, float* target, int64_t begin, int64_t count) {
        if (source) memcpy(target, source + begin, size_t(count) * sizeof(float));
    }
};

void token_loss(const LossTensors& in, const LossOptions& options, int64_t begin, int64_t end, double* sums) {
    TokenBlock block = {};  // what a tensor that is not given would fill stays 0
    alignas(64) float grad[kTokenBlock];
    for (int64_t start = begin; start < end; start += kTokenBlock) {
        const int64_t count = end - start < kTokenBlock ? end - start : int64_t(kTokenBlock);
        block.fill(in, start, count);
        Vec acc[kNumSums] = {};
        for (int i = 0; i < kTokenBlock; i += kWidth) {
            TokenInputs<Vec> token{load(block.log_prob + i), load(block.old + i),       load(block.reference + i),
                                   load(block.sampler + i),  load(block.advantage + i), load(block.weight + i)};
            const Vec counts = load(block.counts + i);
            const TokenTerms<Vec> terms = token_terms(token, options);
            const IntVec counted = counts > 0.f;
            const Vec zero = {};
            store(grad + i, select(counted, terms.grad, zero));
            acc[kLoss] += select(counted, terms.loss, zero);
            acc[kNumTokens] += counts;
            acc[kClipped] += select(counted, terms.clipped, zero);
            acc[kKl] += select(counted, terms.kl, zero);
            acc[kMismatchSum] += select(counted, terms.mismatch, zero);
            acc[kMismatchMax] = larger(select(counted, terms.mismatch, zero), acc[kMismatchMax]);
            acc[kTruncated] += select(counted, terms.truncated, zero);
            acc[kRatioSum] += select(counted, terms.ratio, zero);
        }
        memcpy(in.grad + start, grad, size_t(count) * sizeof(float));
        for (int k = 0; k < kNumSums; ++k) {
            if (k != kMismatchMax) sums[k] += lane_sum(acc[k]);
        }
        const double gap = lane_max(acc[kMismatchMax]);
        sums[kMismatchMax] = gap > sums[kMismatchMax] ? gap : sums[kMismatchMax];
    }
}

}  // namespace

#define R1_JOIN_(a, b) a##b
#define R1_JOIN(a, b) R1_JOIN_(a, b)
#define R1_TEXT_(a) #a
#define R1_TEXT(a) R1_TEXT_(a)

extern const CpuKernels R1_JOIN(kernels_, R1_ISA) = {
    R1_TEXT(R1_ISA),
    {row_stats<float, true>, row_stats<float, false>},
    {row_stats<Bf16, true>, row_stats<Bf16, false>},
    row_backward<float>,
    row_backward<Bf16>,
    token_loss,
};

}  // namespace r1mega
