// Group advantages: one block, a warp for each group in turn. Rewards are thousands, so the launch is what costs.
#pragma once
#include "r1mega_kernels/group_advantage.h"
#include "platform.cuh"

namespace r1mega::device {

constexpr int kAdvantageThreads = 512;

struct WarpLanes {
    int64_t index = threadIdx.x % 32;
    static constexpr int64_t count = 32;

    R1_DEVICE double sum(double x) const {
        for (int offset = 16; offset > 0; offset /= 2) x += R1_SHUFFLE_XOR(x, offset);
        return x;
    }
    R1_DEVICE double min(double x) const {
        for (int offset = 16; offset > 0; offset /= 2) x = fmin(x, R1_SHUFFLE_XOR(x, offset));
        return x;
    }
    R1_DEVICE double max(double x) const {
        for (int offset = 16; offset > 0; offset /= 2) x = fmax(x, R1_SHUFFLE_XOR(x, offset));
        return x;
    }
};

R1_GLOBAL R1_LAUNCH_BOUNDS(kAdvantageThreads) void group_advantages(const double* rewards, const int64_t* offsets,
                                                                    const uint8_t* mask, int64_t groups,
                                                                    int64_t responses, Baseline baseline, Scale scale,
                                                                    double epsilon, float* advantages) {
    const WarpLanes lanes;
    // every warp computes the batch's deviation by itself: cheaper than to wait for one that does
    const double batch_std = scale == Scale::kBatch ? moments(lanes, rewards, mask, 0, responses).std : 0.0;
    for (int64_t group = threadIdx.x / 32; group < groups; group += kAdvantageThreads / 32)
        group_advantage(lanes, rewards, mask, offsets[group], offsets[group + 1], baseline, scale, epsilon, batch_std,
                        advantages);
}

}  // namespace r1mega::device
