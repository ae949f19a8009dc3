// The statistics of one row of logits from which log-prob, entropy, logsumexp and all their gradients follow.
//
// With c = log2(e) / temperature and t_j = (x_j - max) * c (so t_j <= 0, in units of log2):
//     sum = Sum_j 2^t_j        weighted = Sum_j 2^t_j t_j
// Differences are taken before scaling: x_j - max is nearly exact, so the error does not grow with the size of the
// logits.
#pragma once
#include "portable.h"

namespace r1mega {

struct RowStats {
    float max;       // largest logit, unscaled; -inf when every column is masked
    float sum;       // 0 when every column is masked
    float weighted;  // <= 0; NaN where the entropy is not asked for
    float target;    // the target's logit, unscaled; NaN when the target is not among these columns
};

struct RowResult {
    float log_prob, entropy, logsumexp;
};

R1_FN RowStats empty_stats() { return RowStats{minus_infinity(), 0.f, 0.f, quiet_nan()}; }

// A base that keeps x - base defined when all columns seen so far are -inf.
R1_FN float safe_base(float max) { return max == minus_infinity() ? 0.f : max; }

// Adds b to a (targets excepted). The order of merges is the caller's and must be fixed for results to be reproducible.
R1_FN void merge(RowStats& a, const RowStats& b, float c) {
    if (b.sum == 0.f) return;
    if (a.sum == 0.f) {
        a.max = b.max, a.sum = b.sum, a.weighted = b.weighted;
        return;
    }
    const float max = b.max > a.max ? b.max : a.max;
    const float shift_a = (a.max - max) * c, shift_b = (b.max - max) * c;
    const float scale_a = fast_exp2(shift_a), scale_b = fast_exp2(shift_b);
    // 0 * -inf: a part that vanishes beside the other one must add 0, not NaN
    const float weighted_a = scale_a == 0.f ? 0.f : scale_a * (a.weighted + a.sum * shift_a);
    const float weighted_b = scale_b == 0.f ? 0.f : scale_b * (b.weighted + b.sum * shift_b);
    a.sum = scale_a * a.sum + scale_b * b.sum;
    a.weighted = weighted_a + weighted_b;
    a.max = max;
}

// Merges the shards of a vocabulary in the order of their ranks: deterministic, the same on every rank.
R1_FN RowStats merge_shards(const RowStats* shards, int64_t num_shards, int64_t stride, float c) {
    RowStats total = empty_stats();
    for (int64_t rank = 0; rank < num_shards; ++rank) {
        const RowStats shard = shards[rank * stride];
        merge(total, shard, c);
        if (shard.target == shard.target) total.target = shard.target;
    }
    return total;
}

// In double: once a row, and log-probs near 0 keep their digits.
R1_FN RowResult finalize(const RowStats& stats, float inverse_temperature) {
    const double log_sum = log(double(stats.sum));
    const double scaled_target = (double(stats.target) - double(stats.max)) * inverse_temperature;
    RowResult result;
    result.log_prob = float(scaled_target - log_sum);
    const double entropy = log_sum - kLn2 * double(stats.weighted) / double(stats.sum);
    result.entropy = float(entropy < 0.0 ? 0.0 : entropy);  // rounding alone can make it negative
    result.logsumexp = float(double(stats.max) * inverse_temperature + log_sum);
    return result;
}

// dL/dx_j = 2^t_j * (scale + slope * t_j) + (j == target) * target_gradient
struct RowGradient {
    float scale, slope, target_gradient;
    bool is_zero;  // no gradient reaches the row: its logits need not be read
};

R1_FN RowGradient row_gradient(const RowStats& stats, float entropy, float grad_log_prob, float grad_entropy,
                               float grad_logsumexp, float inverse_temperature) {
    RowGradient gradient;
    gradient.is_zero = grad_log_prob == 0.f && grad_entropy == 0.f && grad_logsumexp == 0.f;
    const double per_prob = double(inverse_temperature) / double(stats.sum);
    double scale = double(grad_logsumexp) - double(grad_log_prob);
    // an entropy that was not asked for is NaN, and matters to those alone who have a gradient for it
    if (grad_entropy != 0.f) scale -= double(grad_entropy) * (double(entropy) - log(double(stats.sum)));
    gradient.scale = float(per_prob * scale);
    gradient.slope = float(-per_prob * double(grad_entropy) * kLn2);
    gradient.target_gradient = grad_log_prob * inverse_temperature;
    return gradient;
}

}  // namespace r1mega
