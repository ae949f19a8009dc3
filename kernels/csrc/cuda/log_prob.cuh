// Log-prob statistics and their gradient: a block of threads a row, or a warp of a short one; 16-byte loads, one read of
// the logits.
//
// The order in which a row is added up depends on its number of columns alone, never on its address, its neighbours or
// the grid: results are batch-invariant bit for bit.
#pragma once
#include "r1mega_kernels/row_stats.h"
#include "platform.cuh"

namespace r1mega::device {

constexpr int kThreads = 256, kWarp = 32;
constexpr int kUnroll = 4, kBackwardUnroll = 2;  // 16-byte loads (stores, backward) in flight a thread
constexpr int64_t kWarpColumns = 1024;           // rows of as many columns are a warp's

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

// x <- the elements; kRaise: raised to the floor (its bits, of bf16 twice in a word). A NaN stays a NaN.
template <bool kRaise>
R1_DEVICE void widened(const Pack<Bf16>& pack, uint32_t floor, float (&x)[kLanes<Bf16>]) {
    uint32_t words[4];
    memcpy(words, &pack, sizeof words);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t word = kRaise ? R1_MAX_NAN_BF16X2(words[k], floor) : words[k];
        x[2 * k] = as_float(word << 16);
        x[2 * k + 1] = as_float(word & 0xffff0000u);
    }
}
template <bool kRaise>
R1_DEVICE void widened(const Pack<float>& pack, uint32_t floor, float (&x)[kLanes<float>]) {
#pragma unroll
    for (int k = 0; k < kLanes<float>; ++k)
        x[k] = kRaise ? R1_MAX_NAN(pack.values[k], as_float(floor)) : pack.values[k];
}
R1_DEVICE uint32_t floor_of(Bf16, float below) { return (as_bits(below) & 0xffff0000u) | as_bits(below) >> 16; }
R1_DEVICE uint32_t floor_of(float, float below) { return as_bits(below); }

// A thread's running statistics, with t = x c - base: one fused multiply-add an element. The base is max * c as fp32 has
// it; `stats` takes that rounding back, once. Of the entropy's terms, what lies 2000 below the base (powers of two that
// are 0) counts as if it lay there, so that no -inf meets a 0; without them `weighted` is NaN.
template <class E, bool kEntropy>
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
        if constexpr (kEntropy) {
            weighted = scale * (weighted + sum * shift);
            // the last term: what a cut to bf16 may raise it by
            floor = floor_of(E{}, of_max - fminf(2000.f / c, 1e38f) - fabsf(of_max) * 0.0078125f);
        }
        sum *= scale;
        max = new_max;
        base = new_base;
    }

    template <int kPacks>
    R1_DEVICE void add(const Pack<E> (&packs)[kPacks], float c) {
        const float found = largest(packs);
        if (found > max) rebase(found, c);
#pragma unroll
        for (int u = 0; u < kPacks; ++u) {
            float x[kLanes<E>];
            widened<kEntropy>(packs[u], floor, x);
#pragma unroll
            for (int k = 0; k < kLanes<E>; ++k) {
                const float t = fmaf(x[k], c, -base);
                const float power = fast_exp2(t);
                sum += power;
                if constexpr (kEntropy) weighted = fmaf(power, t, weighted);
            }
        }
    }

    R1_DEVICE RowStats stats(float c) const {
        const float rounded_off = -fmaf(usable(max), c, -base), scale = 1.f + rounded_off * float(kLn2);
        const float of_entropy = kEntropy ? scale * (weighted + rounded_off * sum) : quiet_nan();
        return RowStats{max, sum * scale, of_entropy, quiet_nan()};
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

// The first of a row's threads gets the row's statistics, added up as a tree of fixed shape.
template <int kRowThreads>
R1_DEVICE RowStats row_merge(RowStats stats, float c) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) merge(stats, shuffled(stats, offset), c);
    if constexpr (kRowThreads > kWarp) {
        R1_SHARED RowStats of_warp[kThreads / kWarp];
        if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = stats;
        R1_SYNC();
        if (threadIdx.x == 0)
            for (int warp = 1; warp < kThreads / kWarp; ++warp) merge(stats, of_warp[warp], c);
    }
    return stats;
}

// Which of the launch's rows is a thread's, and the thread's place among those of the row.
template <int kRowThreads>
R1_DEVICE int64_t row_of_thread() {
    return int64_t(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
}
template <int kRowThreads>
R1_DEVICE int place_in_row() {
    return int(threadIdx.x % kRowThreads);
}
template <int kRowThreads>
R1_DEVICE void sync_row() {
    if constexpr (kRowThreads > kWarp)
        R1_SYNC();
    else
        R1_SYNC_WARP();
}

inline bool is_for_warps(int64_t columns) { return columns <= kWarpColumns; }
inline unsigned row_blocks(int64_t rows, int64_t columns) {
    const int64_t each = is_for_warps(columns) ? kThreads / kWarp : 1;
    return unsigned((rows + each - 1) / each);
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
R1_FN bool is_aligned(const void* first, int64_t stride) {
    return reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride % kLanes<E> == 0;
}

// kAligned: see is_aligned. All loads of a step are in flight before the first is used; the last step of a thread and
// the elements after the last whole pack are filled up with -inf.
template <class E, bool kAligned, bool kEntropy, int kRowThreads>
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void log_prob_stats(RowSource source, int64_t count, RowStats* out) {
    const int64_t of_launch = row_of_thread<kRowThreads>();
    const int place = place_in_row<kRowThreads>();
    if (of_launch >= count) return;
    const int64_t token = source.rows ? source.rows[of_launch] : of_launch;
    const E* row = static_cast<const E*>(source.logits) + token * source.stride;
    const float c = source.inverse(token) * kLog2e;
    float target = quiet_nan();
    if (place == 0) {  // early: it arrives while the row is read
        const int64_t column = source.column(token);
        if (column >= 0) target = to_float(row[column]);
    }
    const int packs = int(source.columns / kLanes<E>);
    Running<E, kEntropy> running(c);
    int i = place;
    const E* next = row + i * kLanes<E>;
#pragma unroll 1
    for (; i < packs - (kUnroll - 1) * kRowThreads; i += kUnroll * kRowThreads, next += kUnroll * kRowThreads * kLanes<E>) {
        Pack<E> loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) loaded[u] = load_pack(next, u * kRowThreads, kAligned);
        running.add(loaded, c);
    }
    if (i < packs) {
        Pack<E> loaded[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            loaded[u] = i + u * kRowThreads < packs ? load_pack(next, u * kRowThreads, kAligned) : nothing<E>();
        running.add(loaded, c);
    }
    const int64_t rest = int64_t(packs) * kLanes<E> + place;
    if (rest < source.columns) {
        Pack<E> loaded[1] = {nothing<E>()};
        loaded[0].values[0] = row[rest];
        running.add(loaded, c);
    }
    RowStats stats = row_merge<kRowThreads>(running.stats(c), c);
    if (place == 0) {
        stats.target = stats.sum == 0.f && target == target ? minus_infinity() : target;  // every column is masked
        if (stats.sum == 0.f) stats.max = minus_infinity();
        out[of_launch] = stats;
    }
}

using StatsKernel = void (*)(RowSource, int64_t, RowStats*);

template <class E, bool kEntropy>
inline StatsKernel stats_kernel(const RowSource& source) {
    const bool aligned = is_aligned<E>(source.logits, source.stride);
    if (is_for_warps(source.columns))
        return aligned ? log_prob_stats<E, true, kEntropy, kWarp> : log_prob_stats<E, false, kEntropy, kWarp>;
    return aligned ? log_prob_stats<E, true, kEntropy, kThreads> : log_prob_stats<E, false, kEntropy, kThreads>;
}

// By the width and the address of the rows; launched in row_blocks(count, columns) blocks.
template <class E>
inline StatsKernel stats_kernel(const RowSource& source, bool entropy) {
    return entropy ? stats_kernel<E, true>(source) : stats_kernel<E, false>(source);
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

// The gradient of one row. G is E or a narrower type; `out` may be the row, whose beginning a narrower gradient then takes:
// a step writes over what was read in earlier steps, or before the row's threads met in it.
template <class E, class G, bool kAligned, int kRowThreads>
R1_DEVICE void gradient_of_row(const E* row, G* out, int64_t columns, int64_t target, float base,
                               const RowGradient& gradient, float c) {
    constexpr int kGroup = kLanes<G>, kPacks = int(sizeof(E) / sizeof(G));  // elements of a 16-byte store; loads of it
    constexpr bool kMeets = sizeof(G) < sizeof(E);
    const int groups = int(columns / kGroup), place = place_in_row<kRowThreads>();
    for (int first = 0; first < groups; first += kBackwardUnroll * kRowThreads) {
        Pack<E> loaded[kBackwardUnroll][kPacks];
#pragma unroll
        for (int u = 0; u < kBackwardUnroll; ++u) {
            const int group = first + u * kRowThreads + place;
#pragma unroll
            for (int p = 0; p < kPacks; ++p)
                if (group < groups) loaded[u][p] = load_pack(row, int64_t(group) * kPacks + p, kAligned);
        }
        if constexpr (kMeets) sync_row<kRowThreads>();
#pragma unroll
        for (int u = 0; u < kBackwardUnroll; ++u) {
            const int group = first + u * kRowThreads + place;
            if (group >= groups) continue;
            float d[kGroup];
#pragma unroll
            for (int k = 0; k < kGroup; ++k)
                d[k] = gradient_of(to_float(loaded[u][k / kLanes<E>].values[k % kLanes<E>]), base, gradient, c);
            const int64_t in_group = target - int64_t(group) * kGroup;
            if (in_group >= 0 && in_group < kGroup) {  // one group of the row
#pragma unroll
                for (int k = 0; k < kGroup; ++k)
                    if (in_group == k) d[k] += gradient.target_gradient;
            }
            Pack<G> result;
#pragma unroll
            for (int k = 0; k < kGroup; ++k) from_float(d[k], result.values[k]);
            store_pack(out, group, kAligned, result);
        }
    }
    const int64_t rest = int64_t(groups) * kGroup + place;
    float d = 0.f;
    if (rest < columns) d = gradient_of(to_float(row[rest]), base, gradient, c);
    if constexpr (kMeets) sync_row<kRowThreads>();
    if (rest < columns) from_float(rest == target ? d + gradient.target_gradient : d, out[rest]);
}

template <class G, bool kAligned, int kRowThreads>
R1_DEVICE void clear_row(G* out, int64_t columns) {
    const int64_t packs = columns / kLanes<G>;
    const int place = place_in_row<kRowThreads>();
    for (int64_t pack = place; pack < packs; pack += kRowThreads) store_pack(out, pack, kAligned, Pack<G>{});
    for (int64_t j = packs * kLanes<G> + place; j < columns; j += kRowThreads) out[j] = G{};
}

// grad_logits [tokens, columns] of G may be the logits (see gradient_of_row); out_stride in elements of G.
template <class E, class G, bool kAligned, int kRowThreads>
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void log_prob_backward(RowSource source, RowUpstream upstream, int64_t tokens,
                                                            void* grad_logits, int64_t out_stride) {
    const int64_t token = row_of_thread<kRowThreads>();
    if (token >= tokens) return;
    const E* row = static_cast<const E*>(source.logits) + token * source.stride;
    G* out = static_cast<G*>(grad_logits) + token * out_stride;
    const int64_t i = upstream.positions ? upstream.positions[token] : token;
    const float inverse = source.inverse(token), c = inverse * kLog2e;
    RowGradient gradient{0.f, 0.f, 0.f, true};
    float base = 0.f;
    if (i >= 0) gradient = upstream.gradient_of_row(i, inverse, base);
    if (gradient.is_zero)
        clear_row<G, kAligned, kRowThreads>(out, source.columns);
    else
        gradient_of_row<E, G, kAligned, kRowThreads>(row, out, source.columns, source.column(token), base, gradient, c);
}

using BackwardKernel = void (*)(RowSource, RowUpstream, int64_t, void*, int64_t);

template <class E, class G>
inline bool are_aligned(const RowSource& source, const void* grad_logits, int64_t out_stride) {
    return is_aligned<E>(source.logits, source.stride) && is_aligned<G>(grad_logits, out_stride);
}

// As stats_kernel, of the logits' E to gradients of G.
template <class E, class G>
inline BackwardKernel backward_kernel(const RowSource& source, const void* grad_logits, int64_t out_stride) {
    const bool aligned = are_aligned<E, G>(source, grad_logits, out_stride);
    if (is_for_warps(source.columns))
        return aligned ? log_prob_backward<E, G, true, kWarp> : log_prob_backward<E, G, false, kWarp>;
    return aligned ? log_prob_backward<E, G, true, kThreads> : log_prob_backward<E, G, false, kThreads>;
}

}  // namespace r1mega::device
