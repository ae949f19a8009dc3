// The GRPO objective of one token (DeepSeekMath, eq. 3), its variants, and their derivative. F is float on a GPU and a
// vector of floats on a CPU; the type brings select(condition, a, b) and exp_accurate(x).
#pragma once
#include "portable.h"

namespace r1mega {

enum class Surrogate : int64_t { kClip, kCispo, kSapo };

struct LossOptions {
    float clip_low, clip_high, dual_clip, kl_coefficient, importance_cap, sapo_positive, sapo_negative;
    Surrogate surrogate;
    bool has_old, has_reference, has_sampler, has_dual_clip, has_importance_cap, kl_bias_correction;
};

template <class F>
struct TokenInputs {
    F log_prob, old_log_prob, reference_log_prob, sampler_log_prob, advantage, weight;
};

template <class F>
struct TokenTerms {
    F loss, grad, kl, clipped, truncated, mismatch, ratio;  // loss and grad carry the weight; the others do not
};

// Sums over tokens, in the order in which they are returned.
enum LossSum { kLoss, kNumTokens, kClipped, kKl, kMismatchSum, kMismatchMax, kTruncated, kRatioSum, kNumSums };

R1_FN LossOptions loss_options(double clip_low, double clip_high, double dual_clip, double kl_coefficient,
                               double importance_cap, int64_t surrogate, double sapo_positive, double sapo_negative,
                               bool kl_bias_correction, const float* old, const float* reference,
                               const float* sampler) {
    // a cap or dual clip of 0 stands for none: neither is a possible value
    return LossOptions{float(clip_low),
                       float(clip_high),
                       float(dual_clip),
                       float(kl_coefficient),
                       float(importance_cap),
                       float(sapo_positive),
                       float(sapo_negative),
                       static_cast<Surrogate>(surrogate),
                       old != nullptr,
                       reference != nullptr,
                       sampler != nullptr,
                       dual_clip > 0,
                       importance_cap > 0,
                       kl_bias_correction};
}

R1_FN void add_sums(double* total, const double* part) {
    for (int k = 0; k < kNumSums; ++k)
        total[k] = k != kMismatchMax ? total[k] + part[k] : (part[k] > total[k] ? part[k] : total[k]);
}

#if defined(__CUDACC__) || defined(R1_EMULATED)
R1_FN float select(bool condition, float a, float b) { return condition ? a : b; }
R1_FN float exp_accurate(float x) { return expf(x); }
R1_FN float splat(float value, float) { return value; }
#endif

// exp(d) - d - 1 without the cancellation that leaves fp32 no digits for |d| < 1e-3.
template <class F>
R1_FN F exp_minus_linear(F d, F exp_d) {
    const F series =
        d * d * (0.5f + d * (1.f / 6 + d * (1.f / 24 + d * (1.f / 120 + d * (1.f / 720 + d * (1.f / 5040))))));
    const F magnitude = select(d < 0.f, -d, d);
    return select(magnitude < 0.25f, series, exp_d - d - 1.f);
}

// SAPO: sigmoid(tau (r - 1)) 4 / tau A, tau by the sign of A. Its slope, 4 p (1 - p) r A, is r A at r = 1.
template <class F>
R1_FN void sapo_terms(F ratio, F advantage, const LossOptions& options, F& surrogate, F& slope) {
    const F zero = splat(0.f, ratio), one = splat(1.f, ratio);
    const F tau = select(advantage > zero, splat(options.sapo_positive, zero), splat(options.sapo_negative, zero));
    const F tail = exp_accurate(tau * (one - ratio)), p = one / (one + tail);
    surrogate = select(advantage == zero, zero, p * advantage * 4.f / tau);
    // where the tail is 0 the ratio may be infinite
    slope = select(advantage == zero, zero, select(tail == zero, zero, tail * ratio) * p * p * advantage * 4.f);
}

template <class F>
R1_FN TokenTerms<F> token_terms(const TokenInputs<F>& in, const LossOptions& options) {
    TokenTerms<F> out;
    const F zero = splat(0.f, in.log_prob), one = splat(1.f, in.log_prob);
    const F old = options.has_old ? in.old_log_prob : in.log_prob;
    const F advantage = in.advantage;
    out.ratio = exp_accurate(in.log_prob - old);
    const F low = splat(1.f - options.clip_low, zero), high = splat(1.f + options.clip_high, zero);
    const F bounded_ratio = select(out.ratio < low, low, select(out.ratio > high, high, out.ratio));
    // a ratio that overflowed times an advantage of 0 is 0: such a token says nothing
    const F plain = select(advantage == zero, zero, out.ratio * advantage);
    const F bounded = bounded_ratio * advantage;
    F surrogate = select(bounded < plain, bounded, plain);
    F slope = select(bounded < plain, zero, plain);
    out.clipped = select(bounded < plain, one, zero);
    if (options.has_dual_clip) {  // Ye et al. 2020: bounds the loss of a bad token from above too
        const F floor = advantage * options.dual_clip;
        const F dual = select(advantage < zero, select(surrogate < floor, one, zero), zero);
        surrogate = select(dual > zero, floor, surrogate);
        slope = select(dual > zero, zero, slope);
        out.clipped = select(dual > zero, one, out.clipped);
    }
    if (options.surrogate == Surrogate::kCispo) {  // MiniMax-M1: every token has a gradient, of a bounded weight
        slope = select(advantage == zero, zero, bounded);
        surrogate = select(advantage == zero, zero, bounded * in.log_prob);
        out.clipped = select(advantage == zero, zero, select(bounded_ratio == out.ratio, zero, one));
    } else if (options.surrogate == Surrogate::kSapo) {
        sapo_terms(out.ratio, advantage, options, surrogate, slope);
        out.clipped = zero;
    }
    out.truncated = zero;
    if (options.has_importance_cap) {
        const F cap = splat(options.importance_cap, zero);
        const F importance = exp_accurate(old - in.sampler_log_prob);
        const F truncated = select(importance > cap, cap, importance);
        out.truncated = select(importance > cap, one, zero);
        surrogate = surrogate * truncated;
        slope = slope * truncated;
    }
    F loss = -surrogate, grad = -slope;
    out.kl = zero;
    if (options.has_reference) {
        const F d = in.reference_log_prob - in.log_prob;
        out.kl = exp_minus_linear(d, exp_accurate(d));
        F penalty = out.kl, slope_down = out.kl + d;  // d(kl)/d(log_prob) = 1 - exp(d)
        if (options.kl_bias_correction) {  // DeepSeek-V3.2: d(w kl)/d(log_prob) = w (kl + 1 - exp(d)) = -w d
            const F importance = exp_accurate(in.log_prob - in.sampler_log_prob);
            // exp(d) may overflow where w exp(d) does not
            const F apart = exp_accurate(in.reference_log_prob - in.sampler_log_prob) - importance * (d + 1.f);
            penalty = select(d > 60.f, apart, importance * out.kl);
            slope_down = importance * d;
        }
        if (options.kl_coefficient != 0.f) {  // 0 times a KL that overflowed is not 0
            loss = loss + penalty * options.kl_coefficient;
            grad = grad - slope_down * options.kl_coefficient;
        }
    }
    const F gap = in.log_prob - in.sampler_log_prob;
    out.mismatch = options.has_sampler ? select(gap < zero, -gap, gap) : zero;
    // no weight, no term: not even of what overflowed
    out.loss = select(in.weight == zero, zero, loss * in.weight);
    out.grad = select(in.weight == zero, zero, grad * in.weight);
    return out;
}

}  // namespace r1mega
