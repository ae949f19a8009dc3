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

// The largest element; passes a NaN by (its power of two does not).
template <int kPacks>
R1_DEVICE float largest(const Pack<Bf16> (&packs)[kPacks]) {
    uint32_t most = 0xff80ff80u;  // -inf, twice
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
        uint32_t words[4];
        memcpy(words, &packs[u], sizeof words);
        const uint32_t low = R1_MAX_BF16X2(words[0], words[1]), high = R1_MAX_BF16X2(words[2], words[3]);
        most = R1_MAX_BF16X2(most, R1_MAX_BF16X2(low, high));
    }
    return fmaxf(as_float(most << 16), as_float(most & 0xffff0000u));
}
template <int kPacks>
R1_DEVICE float largest(const Pack<float> (&packs)[kPacks]) {
    float max = minus_infinity();
#pragma unroll
    for (int k = 0; k < kPacks * kLanes<float>; ++k) max = fmaxf(packs[k / kLanes<float>].values[k % kLanes<float>], max);
    return max;
}

// x <- the elements, raised to the floor (its bits, of bf16 twice in a word); a NaN stays a NaN.
R1_DEVICE void raised(const Pack<Bf16>& pack, uint32_t floor, float (&x)[kLanes<Bf16>]) {
    uint32_t words[4];
    memcpy(words, &pack, sizeof words);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t word = R1_MAX_NAN_BF16X2(words[k], floor);
        x[2 * k] = as_float(word << 16);
        x[2 * k + 1] = as_float(word & 0xffff0000u);
    }
}
R1_DEVICE void raised(const Pack<float>& pack, uint32_t floor, float (&x)[kLanes<float>]) {
#pragma unroll
    for (int k = 0; k < kLanes<float>; ++k) x[k] = R1_MAX_NAN(pack.values[k], as_float(floor));
}
R1_DEVICE uint32_t floor_of(Bf16, float below) { return (as_bits(below) & 0xffff0000u) | as_bits(below) >> 16; }
R1_DEVICE uint32_t floor_of(float, float below) { return as_bits(below); }

// A thread's running statistics, with t = x c - base: one fused multiply-add an element. The base is max * c as fp32 has
// it; `stats` takes that rounding back, once. What lies 2000 below the base (powers of two that are 0) counts as if it
// lay there, so that no -inf meets a 0.
template <class E>
struct Running {
    float max = minus_infinity(), base = 0.f, sum = 0.f, weighted = 0.f;
    uint32_t floor = 0;

    R1_DEVICE explicit Running(float c) { rebase(max, c); }

    // Of masked columns alone there is none, whether the mask is -inf or the least finite number.
    R1_DEVICE static float usable(float max) { return max < -1e30f ? 0.f : max; }

    R1_DEVICE void rebase(float new_max, float c) {
        const float of_max = usable(new_max), new_base = of_max * c;
        // bounded: from the first base, with a sum of 0, to one below it; and where the scale is 0
        const float shift = fminf(fmaxf(base - new_base, -2000.f), 0.f), scale = fast_exp2(shift);
        weighted = scale * (weighted + sum * shift);
        sum *= scale;
        max = new_max;
        base = new_base;
        // the last term: what a cut to bf16 may raise it by
        floor = floor_of(E{}, of_max - fminf(2000.f / c, 1e38f) - fabsf(of_max) * 0.0078125f);
    }

    template <int kPacks>
    R1_DEVICE void add(const Pack<E> (&packs)[kPacks], float c) {
        const float found = largest(packs);
        if (found > max) rebase(found, c);
#pragma unroll
        for (int u = 0; u < kPacks; ++u) {
            float x[kLanes<E>];
            raised(packs[u], floor, x);
#pragma unroll
            for (int k = 0; k < kLanes<E>; ++k) {
                const float t = fmaf(x[k], c, -base);
                const float power = fast_exp2(t);
                sum += power;
                weighted = fmaf(power, t, weighted);
            }
        }
    }

    R1_DEVICE RowStats stats(float c) const {
        const float rounded_off = -fmaf(usable(max), c, -base), scale = 1.f + rounded_off * float(kLn2);
        return RowStats{max, sum * scale, scale * (weighted + rounded_off * sum), quiet_nan()};
    }
};

template <class E>
R1_DEVICE Pack<E> nothing() {
    Pack<E> pack;
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) from_float(minus_infinity(), pack.values[k]);
    return pack;
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

// Whether every row begins at a 16-byte boundary.
template <class E>
inline bool rows_aligned(const RowSource& source) {
    return reinterpret_cast<uintptr_t>(source.logits) % 16 == 0 && source.stride % kLanes<E> == 0;
}

// kAligned: see rows_aligned. All loads of a step are in flight before the first is used; the last step of a thread and
// the elements after the last whole pack are filled up with -inf.
template <class E, bool kAligned>
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void log_prob_stats(RowSource source, RowStats* out) {
    const int64_t token = source.rows ? source.rows[blockIdx.x] : int64_t(blockIdx.x);
    const E* row = static_cast<const E*>(source.logits) + token * source.stride;
    const float c = source.inverse(token) * kLog2e;
    float target = quiet_nan();
    if (threadIdx.x == 0) {  // early: it arrives while the row is read
        const int64_t column = source.column(token);
        if (column >= 0) target = to_float(row[column]);
    }
    const int packs = int(source.columns / kLanes<E>);
    Running<E> running(c);
    int i = int(threadIdx.x);
    const E* next = row + i * kLanes<E>;
    for (; i < packs - (kUnroll - 1) * kThreads; i += kUnroll * kThreads, next += kUnroll * kThreads * kLanes<E>) {
        Pack<E> loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) loaded[u] = load_pack(next, u * kThreads, kAligned);
        running.add(loaded, c);
    }
    if (i < packs) {
        Pack<E> loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            loaded[u] = i + u * kThreads < packs ? load_pack(next, u * kThreads, kAligned) : nothing<E>();
        running.add(loaded, c);
    }
    const int64_t rest = int64_t(packs) * kLanes<E> + threadIdx.x;
    if (rest < source.columns) {
        Pack<E> loaded[1] = {nothing<E>()};
        loaded[0].values[0] = row[rest];
        running.add(loaded, c);
    }
    RowStats stats = block_merge(running.stats(c), c);
    if (threadIdx.x == 0) {
        stats.target = stats.sum == 0.f && target == target ? minus_infinity() : target;  // every column is masked
        if (stats.sum == 0.f) stats.max = minus_infinity();
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

    R1_DEVICE RowGradient gradient_of_row(int64_t i, float inverse, float& base) const {
        base = safe_base(stats[i].max);
        return row_gradient(stats[i], entropy[i], grads[i], grads[count + i], grads[2 * count + i], inverse);
    }
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
    if (i >= 0) gradient = upstream.gradient_of_row(i, inverse, base);
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
