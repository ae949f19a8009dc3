// The operators on a GPU: arguments were checked by the Python side, launches go to torch's current stream.
#include "group_advantage.cuh"
#include "kept.cuh"
#include "log_prob.cuh"
#include "r1mega_kernels/torch_abi.h"
#include "token_loss.cuh"

namespace r1mega {
namespace {

using abi::scalar;
using abi::Tensor;

class OnDevice {  // makes a tensor's device current while it lives
  public:
    explicit OnDevice(const Tensor& tensor) : device_(tensor.device_index()) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
        void* stream = nullptr;
        if (!aoti_torch_get_current_cuda_stream) throw std::runtime_error("r1mega_kernels: this torch has no CUDA");
        abi::check(aoti_torch_get_current_cuda_stream(device_, &stream), "get_current_cuda_stream");
        stream_ = static_cast<cudaStream_t>(stream);
    }
    ~OnDevice() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    cudaStream_t stream() const { return stream_; }
    static void check(cudaError_t error, const char* what) {
        if (error != cudaSuccess)
            throw std::runtime_error(std::string("r1mega_kernels: ") + what + ": " + cudaGetErrorString(error));
    }

  private:
    int before_ = 0, device_;
    cudaStream_t stream_ = nullptr;
};

device::RowSource row_source(const Tensor& logits, const Tensor& targets, const Tensor& temperature,
                             const int64_t* rows, int64_t vocab_start) {
    return device::RowSource{
        logits.data<void>(), targets.data<int64_t>(), temperature.data<float>(), rows, logits.size(1), logits.stride(0),
        vocab_start,         temperature.numel() == 1};
}

// stack: logits, targets, inverse_temperature, rows, bool has_rows, int vocab_start, int vocab_size (not looked
// at: targets are not checked here), bool entropy, stats!
void stats_of_rows(StableIValue* stack, const device::KeptLists* lists) {
    const Tensor logits(stack[0]), targets(stack[1]), temperature(stack[2]), rows(stack[3]), stats(stack[8]);
    const OnDevice device(logits);
    const int64_t* row = scalar<bool>(stack[4]) ? rows.data<int64_t>() : nullptr;
    const bool entropy = scalar<bool>(stack[7]);
    const auto source = row_source(logits, targets, temperature, row, scalar<int64_t>(stack[5]));
    const int64_t count = stats.size(0);
    RowStats* out = stats.data<RowStats>();
    const auto launch = [&](auto element) {
        using E = decltype(element);
        if (lists) {
            const auto kernel = entropy ? device::kept_log_prob_stats<E, true> : device::kept_log_prob_stats<E, false>;
            kernel<<<unsigned(count), device::kThreads, 0, device.stream()>>>(source, *lists, out);
        } else {
            const auto kernel = device::stats_kernel<E>(source, entropy);
            const auto blocks = device::row_blocks(count, source.columns);
            kernel<<<blocks, device::kThreads, 0, device.stream()>>>(source, count, out);
        }
    };
    if (!logits.is_bf16() && !logits.is_fp32())
        throw std::runtime_error("r1mega_kernels: log_prob_stats reads logits of float32 or bfloat16");
    logits.is_bf16() ? launch(Bf16{}) : launch(0.f);
    OnDevice::check(cudaGetLastError(), "log_prob_stats");
}

void op_log_prob_stats(StableIValue* stack, uint64_t, uint64_t) { stats_of_rows(stack, nullptr); }

void op_kept_log_prob_stats(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor ids(stack[9]), ranges(stack[10]);
    const device::KeptLists lists{ids.data<int32_t>(), ranges.data<int64_t>()};
    stats_of_rows(stack, &lists);
}

void op_log_prob_merge(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor shards(stack[0]), temperature(stack[1]), rows(stack[2]), stats(stack[4]), results(stack[5]);
    const OnDevice device(shards);
    device::RowSource source{};
    source.inverse_temperature = temperature.data<float>();
    source.scalar_temperature = temperature.numel() == 1;
    source.rows = scalar<bool>(stack[3]) ? rows.data<int64_t>() : nullptr;
    const int64_t count = shards.size(1);
    const auto blocks = unsigned((count + device::kThreads - 1) / device::kThreads);
    device::log_prob_merge<<<blocks, device::kThreads, 0, device.stream()>>>(
        shards.data<RowStats>(), source, shards.size(0), count, stats.data<RowStats>(), results.data<float>());
    OnDevice::check(cudaGetLastError(), "log_prob_merge");
}

// stack: logits, targets, inverse_temperature, positions, bool has_positions, int vocab_start, stats, entropy, grads,
// grad_logits!, of the logits' dtype or of 16 bits, then maybe in the logits' rows; scratch: one float a kept id
void backward_of_rows(StableIValue* stack, const device::KeptLists* lists, float* scratch) {
    const Tensor logits(stack[0]), targets(stack[1]), temperature(stack[2]), positions(stack[3]), stats(stack[6]),
        entropy(stack[7]), grads(stack[8]), grad_logits(stack[9]);
    const OnDevice device(logits);
    const auto source = row_source(logits, targets, temperature, nullptr, scalar<int64_t>(stack[5]));
    const device::RowUpstream upstream{scalar<bool>(stack[4]) ? positions.data<int32_t>() : nullptr,
                                       stats.data<RowStats>(), entropy.data<float>(), grads.data<float>(),
                                       stats.size(0)};
    const int64_t tokens = logits.size(0), out_stride = grad_logits.stride(0);
    void* out = grad_logits.data<void>();
    const auto launch = [&](auto element, auto of_gradient) {
        using E = decltype(element);
        using G = decltype(of_gradient);
        if (lists) {
            const auto kernel = device::kept_backward_kernel<E, G>(source, out, out_stride);
            kernel<<<unsigned(tokens), device::kThreads, 0, device.stream()>>>(source, upstream, *lists, scratch, out,
                                                                               out_stride);
        } else {
            const auto kernel = device::backward_kernel<E, G>(source, out, out_stride);
            const auto blocks = device::row_blocks(tokens, source.columns);
            kernel<<<blocks, device::kThreads, 0, device.stream()>>>(source, upstream, tokens, out, out_stride);
        }
    };
    if (logits.is_bf16() && grad_logits.is_bf16())
        launch(Bf16{}, Bf16{});
    else if (logits.is_fp32() && grad_logits.is_bf16())
        launch(0.f, Bf16{});
    else if (logits.is_fp32() && grad_logits.is_fp16())
        launch(0.f, Half{});
    else if (logits.is_fp32() && grad_logits.is_fp32())
        launch(0.f, 0.f);
    else
        throw std::runtime_error(
            "r1mega_kernels: log_prob_backward gives bfloat16 logits a gradient of bfloat16, and float32 ones one of "
            "float32, bfloat16 or float16");
    OnDevice::check(cudaGetLastError(), "log_prob_backward");
}

void op_log_prob_backward(StableIValue* stack, uint64_t, uint64_t) { backward_of_rows(stack, nullptr, nullptr); }

void op_kept_log_prob_backward(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor ids(stack[10]), ranges(stack[11]), scratch(stack[12]);
    const device::KeptLists lists{ids.data<int32_t>(), ranges.data<int64_t>()};
    backward_of_rows(stack, &lists, scratch.room_for_floats(ids.numel()));
}

void op_group_advantage(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor rewards(stack[0]), offsets(stack[1]), mask(stack[2]), advantages(stack[6]);
    const OnDevice device(rewards);
    device::group_advantages<<<1, device::kAdvantageThreads, 0, device.stream()>>>(
        rewards.data<double>(), offsets.data<int64_t>(), mask.data_or_null<uint8_t>(), offsets.numel() - 1,
        rewards.numel(), static_cast<Baseline>(scalar<int64_t>(stack[3])),
        static_cast<Scale>(scalar<int64_t>(stack[4])), scalar<double>(stack[5]), advantages.data<float>());
    OnDevice::check(cudaGetLastError(), "group_advantage");
}

void op_grpo_token_loss(StableIValue* stack, uint64_t, uint64_t) {
    const Tensor log_probs(stack[0]), old(stack[1]), reference(stack[2]), sampler(stack[3]), advantages(stack[4]),
        weights(stack[5]), mask(stack[6]), sequence_ids(stack[7]), grad(stack[18]), sums(stack[19]);
    const OnDevice device(log_probs);
    const device::LossTensors tensors{log_probs.data<float>(),
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
    const int64_t count = log_probs.numel();
    const auto blocks = unsigned((count + device::kTokensPerBlock - 1) / device::kTokensPerBlock);
    const int64_t partials = int64_t(blocks) * kNumSums;
    // torch's memory: the sums, then the blocks' partial sums and their counter, all zeros
    if (sums.numel() < kNumSums + partials + 1) throw std::runtime_error("r1mega_kernels: token_loss lacks scratch");
    double* totals = sums.data<double>();
    device::token_loss<<<blocks, device::kLossThreads, 0, device.stream()>>>(
        tensors, options, count, totals + kNumSums, reinterpret_cast<unsigned*>(totals + kNumSums + partials), totals);
    OnDevice::check(cudaGetLastError(), "token_loss");
}

const auto registration = abi::Registration("CUDA", __FILE__)
                              .add("log_prob_stats", op_log_prob_stats)
                              .add("log_prob_merge", op_log_prob_merge)
                              .add("log_prob_backward", op_log_prob_backward)
                              .add("kept_log_prob_stats", op_kept_log_prob_stats)
                              .add("kept_log_prob_backward", op_kept_log_prob_backward)
                              .add("group_advantage", op_group_advantage)
                              .add("grpo_token_loss", op_grpo_token_loss);

}  // namespace
}  // namespace r1mega
