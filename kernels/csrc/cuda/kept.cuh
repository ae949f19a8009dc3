// The same statistics and gradient where each token keeps some ids alone (top-p, top-k sampling): one block a row, which
// reads the kept logits and no others. What is added up depends on the list, never on the address or the grid.
#pragma once
#include "log_prob.cuh"

namespace r1mega::device {

struct KeptLists {
    const int32_t* ids;
    const int64_t* ranges;  // [tokens, 2]: where a token's list begins and ends; an empty one keeps every id

    R1_DEVICE int64_t begin(int64_t token) const { return ranges[2 * token]; }
    R1_DEVICE int64_t length(int64_t token) const { return ranges[2 * token + 1] - ranges[2 * token]; }
    // The column of this rank that a token keeps as its j-th, or -1 of another rank's.
    R1_DEVICE int64_t column(int64_t token, int64_t j, const RowSource& source) const {
        if (length(token) == 0) return j;
        const int64_t local = ids[begin(token) + j] - source.vocab_start;
        return local >= 0 && local < source.columns ? local : -1;
    }
};

template <class E, bool kEntropy>
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void kept_log_prob_stats(RowSource source, KeptLists lists, RowStats* out) {
    static_assert(kUnroll == kLanes<float>, "a thread fills one pack, element by element");
    R1_SHARED float target;
    const int64_t token = source.rows ? source.rows[blockIdx.x] : int64_t(blockIdx.x);
    const E* row = static_cast<const E*>(source.logits) + token * source.stride;
    const float c = source.inverse(token) * kLog2e;
    const int64_t of_target = source.column(token), length = lists.length(token);
    const int64_t count = length > 0 ? length : source.columns;
    if (threadIdx.x == 0) target = quiet_nan();
    R1_SYNC();
    Running<float, kEntropy> running(c);
    for (int64_t j = threadIdx.x; j < count; j += kUnroll * kThreads) {
        Pack<float> loaded[1] = {nothing<float>()};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t place = j + u * kThreads;
            const int64_t column = place < count ? lists.column(token, place, source) : -1;
            if (column < 0) continue;
            loaded[0].values[u] = to_float(row[column]);
            if (column == of_target) target = loaded[0].values[u];  // one thread finds it
        }
        running.add(loaded, c);
    }
    RowStats stats = row_merge<kThreads>(running.stats(c), c);  // waits for all threads
    if (threadIdx.x == 0) {
        stats.target = stats.sum == 0.f && target == target ? minus_infinity() : target;
        if (stats.sum == 0.f) stats.max = minus_infinity();
        out[blockIdx.x] = stats;
    }
}

// grad_logits may be the logits. scratch: one float a kept id, for what is computed before the row is cleared; the thread
// that wrote an element of it reads it.
template <class E, class G, bool kAligned>
R1_GLOBAL R1_LAUNCH_BOUNDS(kThreads) void kept_log_prob_backward(RowSource source, RowUpstream upstream,
                                                                 KeptLists lists, float* scratch, void* grad_logits,
                                                                 int64_t out_stride) {
    const int64_t token = blockIdx.x;
    const E* row = static_cast<const E*>(source.logits) + token * source.stride;
    G* out = static_cast<G*>(grad_logits) + token * out_stride;
    const int64_t i = upstream.positions ? upstream.positions[token] : token;
    const float inverse = source.inverse(token), c = inverse * kLog2e;
    RowGradient gradient{0.f, 0.f, 0.f, true};
    float base = 0.f;
    if (i >= 0) gradient = upstream.gradient_of_row(i, inverse, base);
    const int64_t of_target = source.column(token), length = gradient.is_zero ? 0 : lists.length(token);
    if (length == 0 && !gradient.is_zero) {
        gradient_of_row<E, G, kAligned, kThreads>(row, out, source.columns, of_target, base, gradient, c);
        return;
    }
    float* found = scratch + lists.begin(token);
    for (int64_t j = threadIdx.x; j < length; j += kThreads) {
        const int64_t column = lists.column(token, j, source);
        if (column < 0) continue;
        const float d = gradient_of(to_float(row[column]), base, gradient, c);
        found[j] = column == of_target ? d + gradient.target_gradient : d;
    }
    R1_SYNC();
    clear_row<G, kAligned, kThreads>(out, source.columns);
    R1_SYNC();
    for (int64_t j = threadIdx.x; j < length; j += kThreads) {
        const int64_t column = lists.column(token, j, source);
        if (column >= 0) from_float(found[j], out[column]);
    }
}

using KeptBackwardKernel = void (*)(RowSource, RowUpstream, KeptLists, float*, void*, int64_t);

// As backward_kernel; a row is always a block's.
template <class E, class G>
inline KeptBackwardKernel kept_backward_kernel(const RowSource& source, const void* grad_logits, int64_t out_stride) {
    const bool aligned = are_aligned<E, G>(source, grad_logits, out_stride);
    return aligned ? kept_log_prob_backward<E, G, true> : kept_log_prob_backward<E, G, false>;
}

}  // namespace r1mega::device
