// The operators on a CPU: threads over rows, the kernels of the best instruction set that the machine has.
// Shapes and types were checked by the Python side, values are here, where they are read anyway. A row is one thread's, so
// results do not depend on the number of threads.
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "r1mega_kernels/group_advantage.h"
#include "r1mega_kernels/row_stats.h"
#include "r1mega_kernels/token_loss.h"
#include "r1mega_kernels/torch_abi.h"

namespace r1mega {
namespace {

using abi::scalar;
using abi::Tensor;

const CpuKernels* const kTables[] = {
    &kernels_generic,
#if defined(__x86_64__)
    &kernels_avx2,
    &kernels_avx512,
#endif
};
constexpr int64_t kNumTables = sizeof kTables / sizeof *kTables;

int64_t best_table() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

std::atomic<int64_t> chosen_table{best_table()};

const CpuKernels& kernels() { return *kTables[chosen_table.load(std::memory_order_relaxed)]; }

template <class Function>
void parallel_for(int64_t count, int64_t grain, const Function& function) {
    auto call = [](int64_t begin, int64_t end, void* context) {
        const Function& body = *static_cast<const Function*>(context);
        for (int64_t i = begin; i < end; ++i) body(i);
    };
    abi::check(torch_parallel_for(0, count, grain < 1 ? 1 : grain, call, const_cast<Function*>(&function)),
               "parallel_for");
}

// instruction_set(int request) -> int: -1 asks which table is in use, another number chooses that one (tests do)
void op_instruction_set(StableIValue* stack, uint64_t, uint64_t) {
    const int64_t request = scalar<int64_t>(stack[0]);
    if (request >= kNumTables || request > best_table())
        throw std::runtime_error("r1mega_kernels: this processor has no instruction set number " +
                                 std::to_string(request));
    if (request >= 0) chosen_table = request;
    const int64_t current = chosen_table;
    memcpy(&stack[0], &current, sizeof current);
}

struct PerToken {  // [tokens], or one value for all
    const float* values;
    bool is_scalar;
    explicit PerToken(const Tensor& tensor) : values(tensor.data<float>()), is_scalar(tensor.numel() == 1) {}
    float operator[](int64_t token) const { return values[is_scalar ? 0 : token]; }
};

int64_t local_column(int64_t target, int64_t vocab_start, int64_t columns) {
    const int64_t column = target - vocab_start;
    return column >= 0 && column < columns ? column : -1;
}

// Becomes Python's ValueError.
[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string interval(int64_t end) { return "[0, " + std::to_string(end) + ")"; }

// Smallest and largest of the values that were added.
struct Extent {
    int64_t low = INT64_MAX, high = INT64_MIN;
    void add(int64_t value) {
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    void check(const char* name, int64_t end) const {
        if (low > high || (low >= 0 && high < end)) return;  // none, or all in range
        refuse(std::string(name) + " must be in " + interval(end) + ", found " + std::to_string(low) + " to " +
               std::to_string(high));
    }
};

// Of the chosen tokens alone: those of others may hold anything.
void check_tokens(const int64_t* target, const int64_t* row, int64_t count, int64_t tokens, int64_t vocab_size) {
    Extent found;
    for (int64_t i = 0; i < count; ++i) {
        if (row && (row[i] < 0 || row[i] >= tokens || (i > 0 && row[i] <= row[i - 1])))
            refuse("rows must be strictly increasing indices in " + interval(tokens));
        found.add(target[row ? row[i] : i]);
    }
    found.check("targets", vocab_size);
}

// offsets of `parts` parts rise from 0 to `end`
void check_offsets(const char* name, const int64_t* offsets, int64_t parts, int64_t end) {
    bool rising = offsets[0] == 0 && offsets[parts] == end;
    for (int64_t k = 0; k < parts; ++k) rising = rising && offsets[k] <= offsets[k + 1];
    if (rising) return;
    std::string first;
    for (int64_t k = 0; k <= parts && k < 8; ++k) first += (k ? ", " : "") + std::to_string(offsets[k]);
    refuse(std::string(name) + " must rise from 0 to " + std::to_string(end) + ", not [" + first + "]...");
}

// Lists of the ids that tokens keep. ranges: [tokens, 2] of any row stride, where a token's list begins and ends; an empty
// one keeps all.
struct KeptLists {
    const int32_t* ids;
    const int64_t* ranges;
    int64_t stride, total;
    KeptLists(const Tensor& all, const Tensor& of_tokens)
        : ids(all.data<int32_t>()), ranges(of_tokens.data<int64_t>()), stride(of_tokens.stride(0)), total(all.numel()) {}
    int64_t begin(int64_t token) const { return ranges[stride * token]; }
    int64_t end(int64_t token) const { return ranges[stride * token + 1]; }
    int64_t length(int64_t token) const { return end(token) - begin(token); }

    enum class Fault { kNone, kOffsets, kIds, kTarget };
    // floor: where the list of the chosen token before it ends; lists that overlap would share their scratch
    Fault fault(int64_t token, int64_t floor, int64_t target, int64_t vocab_size) const {
        if (begin(token) < floor || end(token) < begin(token) || end(token) > total) return Fault::kOffsets;
        const int32_t* list = ids + begin(token);
        bool has_target = length(token) == 0;
        for (int64_t j = 0; j < length(token); ++j) {
            if (list[j] < 0 || list[j] >= vocab_size || (j > 0 && list[j] <= list[j - 1])) return Fault::kIds;
            has_target = has_target || list[j] == target;
        }
        return has_target ? Fault::kNone : Fault::kTarget;
    }
    // Of the chosen tokens; says the first that is wrong.
    void check(const int64_t* target, const int64_t* row, int64_t count, int64_t vocab_size) const {
        std::atomic<int64_t> wrong{INT64_MAX};
        const auto token_of = [&](int64_t i) { return row ? row[i] : i; };
        const auto floor_of = [&](int64_t i) { return i > 0 ? end(token_of(i - 1)) : 0; };
        const auto fault_of = [&](int64_t i) {
            return fault(token_of(i), floor_of(i), target[token_of(i)], vocab_size);
        };
        parallel_for(count, 256, [&](int64_t i) {
            int64_t first = wrong;
            if (fault_of(i) == Fault::kNone) return;
            while (i < first && !wrong.compare_exchange_weak(first, i)) {
            }
        });
        if (wrong == INT64_MAX) return;
        const int64_t i = wrong, token = token_of(i);
        if (fault_of(i) == Fault::kOffsets)
            refuse("kept.offsets must rise from 0 to " + std::to_string(total) + ", not from " +
                   std::to_string(begin(token)) + " to " + std::to_string(end(token)) + " at token " +
                   std::to_string(token) + ", after a list that ends at " + std::to_string(floor_of(i)));
        if (fault_of(i) == Fault::kIds)
            refuse("each list of kept.ids must be strictly increasing ids in " + interval(vocab_size) +
                   "; that of token " + std::to_string(token) + " is not");
        refuse("the target of token " + std::to_string(token) + ", " + std::to_string(target[token]) +
               ", is not among the ids that it keeps");
    }
};

// A token's kept columns among this rank's, side by side, and which of them is the target's.
struct KeptRow {
    std::vector<int64_t> columns;
    int64_t target = -1;
    KeptRow(const KeptLists& lists, int64_t token, int64_t target_column, int64_t vocab_start, int64_t num_columns) {
        const int32_t* ids = lists.ids + lists.begin(token);
        columns.reserve(size_t(lists.length(token)));
        for (int64_t j = 0; j < lists.length(token); ++j) {
            const int64_t column = local_column(ids[j], vocab_start, num_columns);
            if (column < 0) continue;
            if (column == target_column) target = int64_t(columns.size());
            columns.push_back(column);
        }
    }
    int64_t count() const { return int64_t(columns.size()); }
    template <class E>
    void gather(const E* row, float* out) const {
        for (int64_t k = 0; k < count(); ++k) out[k] = to_float(row[columns[size_t(k)]]);
    }
    template <class E>
    void scatter(const float* values, E* row) const {
        for (int64_t k = 0; k < count(); ++k) from_float(values[k], row[columns[size_t(k)]]);
    }
};

template <class E>
RowStats kept_stats(const CpuKernels& table, const E* row, const KeptRow& kept, float c, bool entropy) {
    std::vector<float> values(size_t(kept.count()));
    kept.gather(row, values.data());
    return table.row_stats_f32[!entropy](values.data(), kept.count(), kept.target, c);
}

// stack: logits, targets, inverse_temperature, rows, bool has_rows, int vocab_start, int vocab_size, bool entropy, stats!
void stats_of_rows(StableIValue* stack, const KeptLists* lists) {
    const Tensor logits(stack[0]), targets(stack[1]), temperature(stack[2]), rows(stack[3]), stats(stack[8]);
    const bool has_rows = scalar<bool>(stack[4]), entropy = scalar<bool>(stack[7]), is_bf16 = logits.is_bf16();
    const int64_t vocab_start = scalar<int64_t>(stack[5]), vocab_size = scalar<int64_t>(stack[6]);
    const int64_t count = stats.size(0), columns = logits.size(1), stride = logits.stride(0);
    const int64_t *target = targets.data<int64_t>(), *row = has_rows ? rows.data<int64_t>() : nullptr;
    const PerToken inverse_temperature(temperature);
    const auto* halves = static_cast<const Bf16*>(logits.data<void>());
    const auto* floats = static_cast<const float*>(logits.data<void>());
    RowStats* out = stats.data<RowStats>();
    check_tokens(target, row, count, logits.size(0), vocab_size);
    if (lists) lists->check(target, row, count, vocab_size);
    const CpuKernels& table = kernels();
    parallel_for(count, 32768 / (columns + 1), [&](int64_t i) {
        const int64_t token = row ? row[i] : i;
        const float c = inverse_temperature[token] * kLog2e;
        const int64_t column = local_column(target[token], vocab_start, columns);
        if (lists && lists->length(token) > 0) {
            const KeptRow kept(*lists, token, column, vocab_start, columns);
            out[i] = is_bf16 ? kept_stats(table, halves + token * stride, kept, c, entropy)
                             : kept_stats(table, floats + token * stride, kept, c, entropy);
        } else {
            out[i] = is_bf16 ? table.row_stats_bf16[!entropy](halves + token * stride, columns, column, c)
                             : table.row_stats_f32[!entropy](floats + token * stride, columns, column, c);
        }
    });
}

// log_prob_stats(logits, targets, inverse_temperature, rows, bool has_rows, int vocab_start, int vocab_size, bool entropy,
//                stats!)
void op_log_prob_stats(StableIValue* stack, uint64_t, uint64_t) { stats_of_rows(stack, nullptr); }

// kept_log_prob_stats(the same, kept_ids, kept_ranges)
void op_kept_log_prob_stats(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor ids(stack[9]), ranges(stack[10]);
    const KeptLists lists(ids, ranges);
    stats_of_rows(stack, &lists);
}

// log_prob_merge(shards[ranks, N, 4], inverse_temperature, rows, bool has_rows, stats![N, 4], results![3, N])
void op_log_prob_merge(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor shards(stack[0]), temperature(stack[1]), rows(stack[2]), stats(stack[4]), results(stack[5]);
    const int64_t count = shards.size(1), ranks = shards.size(0);
    const int64_t* row = scalar<bool>(stack[3]) ? rows.data<int64_t>() : nullptr;
    const PerToken inverse_temperature(temperature);
    const RowStats* in = shards.data<RowStats>();
    RowStats* merged = stats.data<RowStats>();
    float* out = results.data<float>();
    parallel_for(count, 4096, [&](int64_t i) {
        const float inverse = inverse_temperature[row ? row[i] : i];
        merged[i] = merge_shards(in + i, ranks, count, inverse * kLog2e);
        const RowResult result = finalize(merged[i], inverse);
        out[i] = result.log_prob;
        out[count + i] = result.entropy;
        out[2 * count + i] = result.logsumexp;
    });
}

// `out` may be `x`. values: room for the kept gradients, which are found before the row is cleared.
template <class E>
void kept_backward(const CpuKernels& table, const E* x, E* out, int64_t columns, const KeptRow& kept, float* values,
                   const RowStats& stats, const RowGradient& gradient, float c) {
    kept.gather(x, values);
    table.row_backward_f32(values, values, kept.count(), kept.target, stats, gradient, c);
    memset(out, 0, size_t(columns) * sizeof(E));
    kept.scatter(values, out);
}

// stack: logits, targets, inverse_temperature, positions, bool has_positions, int vocab_start, stats, entropy,
// grads[3, N], grad_logits!; positions[token] is the token's row of stats, or -1. scratch: one float a kept id
void backward_of_rows(StableIValue* stack, const KeptLists* lists, float* scratch) {
    const Tensor logits(stack[0]), targets(stack[1]), temperature(stack[2]), positions(stack[3]), stats(stack[6]),
        entropies(stack[7]), grads(stack[8]), grad_logits(stack[9]);
    const bool has_positions = scalar<bool>(stack[4]), is_bf16 = logits.is_bf16();
    const int64_t vocab_start = scalar<int64_t>(stack[5]);
    const int64_t tokens = logits.size(0), columns = logits.size(1), count = stats.size(0);
    const int64_t stride = logits.stride(0), out_stride = grad_logits.stride(0);
    const int64_t* target = targets.data<int64_t>();
    const int32_t* position = has_positions ? positions.data<int32_t>() : nullptr;
    const PerToken inverse_temperature(temperature);
    const RowStats* row_stats = stats.data<RowStats>();
    const float *entropy = entropies.data<float>(), *grad = grads.data<float>();
    const void* data = logits.data<void>();
    void* result = grad_logits.data<void>();
    if (grad_logits.dtype() != logits.dtype())
        throw std::runtime_error("r1mega_kernels: on a CPU the gradient of logits has their type");
    const CpuKernels& table = kernels();
    parallel_for(tokens, 32768 / (columns + 1), [&](int64_t token) {
        const int64_t i = position ? position[token] : token;
        const float inverse = inverse_temperature[token];
        RowGradient gradient{0.f, 0.f, 0.f, true};
        RowStats of_row = empty_stats();
        if (i >= 0) {
            of_row = row_stats[i];
            gradient = row_gradient(of_row, entropy[i], grad[i], grad[count + i], grad[2 * count + i], inverse);
        }
        const int64_t column = i >= 0 ? local_column(target[token], vocab_start, columns) : -1;
        const auto run = [&](const auto* x, auto* out, auto row_backward) {
            if (lists && lists->length(token) > 0 && !gradient.is_zero)
                kept_backward(table, x, out, columns, KeptRow(*lists, token, column, vocab_start, columns),
                              scratch + lists->begin(token), of_row, gradient, inverse * kLog2e);
            else
                row_backward(x, out, columns, column, of_row, gradient, inverse * kLog2e);
        };
        if (is_bf16)
            run(static_cast<const Bf16*>(data) + token * stride, static_cast<Bf16*>(result) + token * out_stride,
                table.row_backward_bf16);
        else
            run(static_cast<const float*>(data) + token * stride, static_cast<float*>(result) + token * out_stride,
                table.row_backward_f32);
    });
}

// log_prob_backward(logits, targets, inverse_temperature, positions, bool has_positions, int vocab_start, stats,
//                   entropy, grads, grad_logits!)
void op_log_prob_backward(StableIValue* stack, uint64_t, uint64_t) { backward_of_rows(stack, nullptr, nullptr); }

// kept_log_prob_backward(the same, kept_ids, kept_ranges, scratch!)
void op_kept_log_prob_backward(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor ids(stack[10]), ranges(stack[11]), scratch(stack[12]);
    const KeptLists lists(ids, ranges);
    backward_of_rows(stack, &lists, scratch.room_for_floats(ids.numel()));
}

struct OneLane {
    static constexpr int64_t index = 0, count = 1;
    double sum(double x) const { return x; }
    double min(double x) const { return x; }
    double max(double x) const { return x; }
};

// group_advantage(rewards f64, offsets, mask, int baseline, int scale, float epsilon, advantages!)
void op_group_advantage(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor rewards(stack[0]), offsets(stack[1]), mask(stack[2]), advantages(stack[6]);
    const auto baseline = static_cast<Baseline>(scalar<int64_t>(stack[3]));
    const auto scale = static_cast<Scale>(scalar<int64_t>(stack[4]));
    const double epsilon = scalar<double>(stack[5]);
    const double* reward = rewards.data<double>();
    const uint8_t* counted = mask.data_or_null<uint8_t>();
    const int64_t* offset = offsets.data<int64_t>();
    float* out = advantages.data<float>();
    check_offsets("group_offsets", offset, offsets.numel() - 1, rewards.numel());
    const OneLane lane;
    const double batch_std = scale == Scale::kBatch ? moments(lane, reward, counted, 0, rewards.numel()).std : 0.0;
    parallel_for(offsets.numel() - 1, 256, [&](int64_t g) {
        group_advantage(lane, reward, counted, offset[g], offset[g + 1], baseline, scale, epsilon, batch_std, out);
    });
}

// Those of masked tokens may hold anything.
void check_sequences(const LossTensors& tensors, int64_t count, int64_t sequences) {
    if (!tensors.sequence_ids) return;
    Extent found;
    for (int64_t i = 0; i < count; ++i)
        if (!tensors.mask || tensors.mask[i]) found.add(tensors.sequence_ids[i]);
    found.check("sequence_ids", sequences);
}

constexpr int64_t kTokensPerPart = 4096;  // fixed: the order of the sum must not depend on the number of threads

// grpo_token_loss(log_probs, old, reference, sampler, advantages, weights, mask, sequence_ids, bool
// weights_per_sequence,
//                 float clip_low, clip_high, dual_clip, kl_coefficient, importance_cap, int surrogate,
//                 float sapo_positive, sapo_negative, bool kl_bias_correction, grad![N], sums![8] f64)
void op_grpo_token_loss(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor log_probs(stack[0]), old(stack[1]), reference(stack[2]), sampler(stack[3]), advantages(stack[4]),
        weights(stack[5]), mask(stack[6]), sequence_ids(stack[7]), grad(stack[18]), sums(stack[19]);
    const LossTensors tensors{log_probs.data<float>(),
                              old.data_or_null<float>(),
                              reference.data_or_null<float>(),
                              sampler.data_or_null<float>(),
                              advantages.data<float>(),
                              weights.data_or_null<float>(),
                              sequence_ids.data_or_null<int64_t>(),
                              mask.data_or_null<uint8_t>(),
                              scalar<bool>(stack[8]),
                              grad.data<float>()};
    const LossOptions options = loss_options(
        scalar<double>(stack[9]), scalar<double>(stack[10]), scalar<double>(stack[11]), scalar<double>(stack[12]),
        scalar<double>(stack[13]), scalar<int64_t>(stack[14]), scalar<double>(stack[15]), scalar<double>(stack[16]),
        scalar<bool>(stack[17]), tensors.old_log_probs, tensors.reference_log_probs, tensors.sampler_log_probs);
    const int64_t count = log_probs.numel(), parts = (count + kTokensPerPart - 1) / kTokensPerPart;
    check_sequences(tensors, count, advantages.numel());
    std::vector<double> partial(size_t(parts) * kNumSums, 0.0);
    const CpuKernels& table = kernels();
    parallel_for(parts, 1, [&](int64_t part) {
        const int64_t begin = part * kTokensPerPart;
        const int64_t end = begin + kTokensPerPart < count ? begin + kTokensPerPart : count;
        table.token_loss(tensors, options, begin, end, partial.data() + part * kNumSums);
    });
    double* out = sums.data<double>();
    for (int k = 0; k < kNumSums; ++k) out[k] = 0.0;
    for (int64_t part = 0; part < parts; ++part) add_sums(out, partial.data() + part * kNumSums);
}

const auto registration = abi::Registration("CPU", __FILE__)
                              .add("log_prob_stats", op_log_prob_stats)
                              .add("log_prob_merge", op_log_prob_merge)
                              .add("log_prob_backward", op_log_prob_backward)
                              .add("kept_log_prob_stats", op_kept_log_prob_stats)
                              .add("kept_log_prob_backward", op_kept_log_prob_backward)
                              .add("group_advantage", op_group_advantage)
                              .add("grpo_token_loss", op_grpo_token_loss);

const auto selection =
    abi::Registration("CompositeExplicitAutograd", __FILE__).add("instruction_set", op_instruction_set);

}  // namespace
}  // namespace r1mega
