// Log-prob statistics and their gradient: one block of threads a row, 16-byte loads, one read of the logits.
//
// The order in which a row is added up depends on its number of columns alone, never on its address, its neighbours or
// the grid: results are batch-invariant bit for bit.
#pragma once
#include "r1mega_kernels/row_stats.h"
#include "platform.cuh"

namespace r1mega::device {

constexpr int kThreads = 256;
constexpr int kUnroll = 4, kBackwardUnroll = 2;  // 16-byte loads in flight a thread

template <class E>
constexpr int kLanes = 16 / sizeof(E);  // elements of a 16-byte load

template <class E>
struct alignas(16) Pack {
    E values[kLanes<E>];
};

template <class E>
R1_DEVICE Pack<E> load_pack(const E* row, int64_t pack, bool aligned) {
    Pack<E> result;
    const E* source = row + pack * kLanes<E>;
    if (aligned) {
        const uint4 bits = R1_LOAD_STREAMING(reinterpret_cast<const uint4*>(source));
        memcpy(&result, &bits, sizeof result);
    } else {  // the same elements in the same order, so the same result
#pragma unroll
        for (int k = 0; k < kLanes<E>; ++k) result.values[k] = source[k];
    }
    return result;
}

template <class E>
R1_DEVICE void store_pack(E* row, int64_t pack, bool aligned, const Pack<E>& value) {
    E* target = row + pack * kLanes<E>;
    if (aligned) {
        uint4 bits;
        memcpy(&bits, &value, sizeof bits);
        *reinterpret_cast<uint4*>(target) = bits;
    } else {
#pragma unroll
        for (int k = 0; k < kLanes<E>; ++k) target[k] = value.values[k];
    }
}

template <class E>
R1_DEVICE bool is_aligned(const E* row) {
    return reinterpret_cast<uintptr_t>(row) % 16 == 0;
}

// A thread's running statistics; the maximum moves at most once per step.
template <int kCount>
R1_DEVICE void accumulate(RowStats& stats, const float (&x)[kCount], float c) {
    float max = stats.max;
#pragma unroll
    for (int k = 0; k < kCount; ++k) max = fmaxf(x[k], max);  // passes a NaN by; its power of two does not
    if (max > stats.max) {
        if (stats.sum != 0.f) {
            const float shift = (stats.max - max) * c, scale = fast_exp2(shift);
            stats.weighted = scale == 0.f ? 0.f : scale * (stats.weighted + stats.sum * shift);
            stats.sum *= scale;
        }
        stats.max = max;
    }
    const float base = safe_base(stats.max);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
        const float t = (x[k] - base) * c;
        const float power = fast_exp2(t);  // NaN stays NaN, -inf gives 0
        stats.sum += power;
        stats.weighted += power * fmaxf(t, -3e3f);  // finite, so that 0 * -inf does not arise
    }
}

R1_DEVICE RowStats shuffled(const RowStats& stats, int offset) {
    RowStats other = empty_stats();
    other.max = R1_SHUFFLE_DOWN(stats.max, offset);
    other.sum = R1_SHUFFLE_DOWN(stats.sum, offset);
    other.weighted = R1_SHUFFLE_DOWN(stats.weighted, offset);
    return other;
}

// Thread 0 gets the block's statistics, added up as a tree of fixed shape.
R1_DEVICE RowStats block_merge(RowStats stats, float c) {
    R1_SHARED RowStats of_warp[kThreads / 32];
    for (int offset = 16; offset > 0; offset /= 2) merge(stats, shuffled(stats, offset), c);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = stats;
    R1_SYNC();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kThreads / 32; ++warp) merge(stats, of_warp[warp], c);
    return stats;
}

struct RowSource {
    const void* logits;
    const int64_t* targets;
    const float* inverse_temperature;  // [tokens] or [1]
    const int64_t* rows;               // nullptr: all
    int64_t columns, stride, vocab_start;
    bool scalar_temperature;

    R1_DEVICE float inverse(int64_t token) const { return inverse_temperature[scalar_temperature ? 0 : token]; }
    R1_DEVICE int64_t column(int64_t token) const {
        const int64_t local = targets[token] - vocab_start;
        return local >= 0 && local < columns ? local : -1;
    }
};

template <class E>
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void log_prob_stats(RowSource source, RowStats* out) {
    const int64_t token = source.rows ? source.rows[blockIdx.x] : int64_t(blockIdx.x);
    const E* row = static_cast<const E*>(source.logits) + token * source.stride;
    const float c = source.inverse(token) * kLog2e;
    const bool aligned = is_aligned(row);
    const int64_t packs = source.columns / kLanes<E>;
    RowStats stats = empty_stats();
    int64_t i = threadIdx.x;
    for (; i + (kUnroll - 1) * kThreads < packs; i += kUnroll * kThreads) {
        Pack<E> loaded[kUnroll];  // all loads are in flight before the first is used
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) loaded[u] = load_pack(row, i + u * kThreads, aligned);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float x[kLanes<E>];
#pragma unroll
            for (int k = 0; k < kLanes<E>; ++k) x[k] = to_float(loaded[u].values[k]);
            accumulate(stats, x, c);
        }
    }
    for (; i < packs; i += kThreads) {
        const Pack<E> loaded = load_pack(row, i, aligned);
        float x[kLanes<E>];
#pragma unroll
        for (int k = 0; k < kLanes<E>; ++k) x[k] = to_float(loaded.values[k]);
        accumulate(stats, x, c);
    }
    for (int64_t j = packs * kLanes<E> + threadIdx.x; j < source.columns; j += kThreads) {
        const float x[1] = {to_float(row[j])};
        accumulate(stats, x, c);
    }
    stats = block_merge(stats, c);
    if (threadIdx.x == 0) {
        const int64_t column = source.column(token);
        stats.target = column < 0 ? quiet_nan() : to_float(row[column]);
        out[blockIdx.x] = stats;
    }
}

// shards: [ranks, count]; results: [3, count]
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void log_prob_merge(const RowStats* shards, RowSource source, int64_t ranks,
                                                         int64_t count, RowStats* merged, float* results) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count) return;
    const float inverse = source.inverse(source.rows ? source.rows[i] : i);
    const RowStats stats = merge_shards(shards + i, ranks, count, inverse * kLog2e);
    const RowResult result = finalize(stats, inverse);
    merged[i] = stats;
    results[i] = result.log_prob;
    results[count + i] = result.entropy;
    results[2 * count + i] = result.logsumexp;
}

R1_DEVICE float gradient_of(float x, float base, const RowGradient& gradient, float c) {
    const float t = (x - base) * c;
    return fast_exp2(t) * (gradient.scale + gradient.slope * fmaxf(t, -3e3f));
}

// The logits of one pack to their gradients; `target` is the target's place, outside [0, kLanes) if it is not in the
// pack.
template <class E>
R1_DEVICE void to_gradient(Pack<E>& value, int64_t target, float base, const RowGradient& gradient, float c) {
    float d[kLanes<E>];
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) d[k] = gradient_of(to_float(value.values[k]), base, gradient, c);
    if (target >= 0 && target < kLanes<E>) {  // one pack of the row
#pragma unroll
        for (int k = 0; k < kLanes<E>; ++k)
            if (target == k) d[k] += gradient.target_gradient;
    }
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) from_float(d[k], value.values[k]);
}

struct RowUpstream {
    const int32_t* positions;  // [tokens] row of stats or -1; nullptr: the identity
    const RowStats* stats;     // [count]
    const float* entropy;      // [count]
    const float* grads;        // [3, count]
    int64_t count;
};

// grad_logits may be the logits: a thread reads an element before it writes it, and no other thread reads it. The
// target's logit is the exception and needs none: its gradient is added where its element is computed.
template <class E>
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void log_prob_backward(RowSource source, RowUpstream upstream, void* grad_logits,
                                                            int64_t out_stride) {
    const int64_t token = blockIdx.x;
    const E* row = static_cast<const E*>(source.logits) + token * source.stride;
    E* out = static_cast<E*>(grad_logits) + token * out_stride;
    const int64_t i = upstream.positions ? upstream.positions[token] : token;
    const int64_t packs = source.columns / kLanes<E>;
    const bool aligned = is_aligned(row) && is_aligned(out);
    RowGradient gradient{0.f, 0.f, 0.f, true};
    const float inverse = source.inverse(token), c = inverse * kLog2e;
    float base = 0.f;
    if (i >= 0) {
        const RowStats stats = upstream.stats[i];
        base = safe_base(stats.max);
        gradient = row_gradient(stats, upstream.entropy[i], upstream.grads[i], upstream.grads[upstream.count + i],
                                upstream.grads[2 * upstream.count + i], inverse);
    }
    const int64_t column = gradient.is_zero ? -1 : source.column(token);
    int64_t pack = threadIdx.x;
    if (gradient.is_zero) {
        for (; pack < packs; pack += kThreads) store_pack(out, pack, aligned, Pack<E>{});
    }
    for (; pack + (kBackwardUnroll - 1) * kThreads < packs; pack += kBackwardUnroll * kThreads) {
        Pack<E> value[kBackwardUnroll];
#pragma unroll
        for (int u = 0; u < kBackwardUnroll; ++u) value[u] = load_pack(row, pack + u * kThreads, aligned);
#pragma unroll
        for (int u = 0; u < kBackwardUnroll; ++u) {
            to_gradient(value[u], column - (pack + u * kThreads) * kLanes<E>, base, gradient, c);
            store_pack(out, pack + u * kThreads, aligned, value[u]);
        }
    }
    for (; pack < packs; pack += kThreads) {
        Pack<E> value = load_pack(row, pack, aligned);
        to_gradient(value, column - pack * kLanes<E>, base, gradient, c);
        store_pack(out, pack, aligned, value);
    }
    for (int64_t j = packs * kLanes<E> + threadIdx.x; j < source.columns; j += kThreads) {
        float d = 0.f;
        if (!gradient.is_zero) {
            d = gradient_of(to_float(row[j]), base, gradient, c);
            if (j == column) d += gradient.target_gradient;
        }
        from_float(d, out[j]);
    }
}

}  // namespace r1mega::device
