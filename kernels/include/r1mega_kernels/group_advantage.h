// Advantages of one group of rewards, in double. `Lanes` is who shares the work: one CPU thread, a warp or a block. It
// has index, count, and sum / min / max over the lanes.
#pragma once
#include "portable.h"

namespace r1mega {

enum class Baseline : int64_t { kGroup = 0, kLeaveOneOut = 1 };
enum class Scale : int64_t { kNone = 0, kGroup = 1, kBatch = 2 };

struct Moments {
    double count, mean, std;
    bool has_signal;  // two different rewards at least, compared exactly; or one that is not finite
};

template <class Lanes>
R1_FN Moments moments(const Lanes& lanes, const double* rewards, const uint8_t* mask, int64_t begin, int64_t end) {
    double total = 0, count = 0, low = INFINITY, high = -INFINITY;
    for (int64_t i = begin + lanes.index; i < end; i += lanes.count) {
        if (mask && !mask[i]) continue;
        total += rewards[i];
        count += 1;
        low = rewards[i] < low ? rewards[i] : low;
        high = rewards[i] > high ? rewards[i] : high;
    }
    Moments result;
    result.count = lanes.sum(count);
    result.mean = lanes.sum(total) / (result.count > 0 ? result.count : 1.0);
    result.has_signal = lanes.max(high) > lanes.min(low) || !(fabs(result.mean) < INFINITY);  // NaN must not turn into 0
    double squares = 0;
    for (int64_t i = begin + lanes.index; i < end; i += lanes.count) {
        if (mask && !mask[i]) continue;
        const double centred = rewards[i] - result.mean;
        squares += centred * centred;
    }
    result.std = sqrt(lanes.sum(squares) / (result.count > 0 ? result.count : 1.0));
    return result;
}

template <class Lanes>
R1_FN void group_advantage(const Lanes& lanes, const double* rewards, const uint8_t* mask, int64_t begin, int64_t end,
                           Baseline baseline, Scale scale, double epsilon, double batch_std, float* advantages) {
    const Moments group = moments(lanes, rewards, mask, begin, end);
    double factor = 1.0;
    if (baseline == Baseline::kLeaveOneOut) factor = group.count > 1 ? group.count / (group.count - 1) : 0.0;
    if (scale == Scale::kGroup) factor /= group.std + epsilon;
    if (scale == Scale::kBatch) factor /= batch_std + epsilon;
    for (int64_t i = begin + lanes.index; i < end; i += lanes.count) {
        const bool counts = group.has_signal && (!mask || mask[i]);
        advantages[i] = counts ? float((rewards[i] - group.mean) * factor) : 0.f;
    }
}

}  // namespace r1mega
