// Runs one kernel on arrays from stdin and writes its results to stdout; tests/unit/kernels/test_emulator.py drives it.
//
// stdin: the kernel's name and a newline; then arrays, each as int64 byte count and that many bytes, in the order in
// which the case below takes them. Scalars are an array of int64 or double.
#include <iostream>
#include <memory>
#include <string>

#include "../csrc/cuda/kept.cuh"
#include "../csrc/cuda/log_prob.cuh"
#include "../csrc/cuda/token_loss.cuh"
#include "../csrc/cuda/group_advantage.cuh"

using namespace r1mega;

namespace {

// An array that ends where its allocation ends, so that the sanitizer sees an access past it. `misalignment` bytes
// before it take it off a 16-byte boundary.
template <class T>
class Array {
  public:
    explicit Array(int64_t bytes, int64_t misalignment = 0) : bytes_(bytes) {
        void* allocated = nullptr;
        if (posix_memalign(&allocated, 16, size_t(bytes + misalignment))) abort();
        storage_ = static_cast<char*>(allocated);
        data_ = storage_ + misalignment;
    }
    ~Array() { free(storage_); }
    Array(const Array&) = delete;
    T* get() { return reinterpret_cast<T*>(data_); }
    T* or_null() { return bytes_ ? get() : nullptr; }
    int64_t size() const { return bytes_ / int64_t(sizeof(T)); }
    char* raw() { return data_; }
    int64_t bytes() const { return bytes_; }

  private:
    int64_t bytes_;
    char *storage_, *data_;
};

template <class T>
struct Input : Array<T> {
    explicit Input(int64_t misalignment = 0) : Array<T>(read_size(), misalignment) {
        std::cin.read(this->raw(), this->bytes());
    }
    static int64_t read_size() {
        int64_t bytes = 0;
        std::cin.read(reinterpret_cast<char*>(&bytes), sizeof bytes);
        return bytes;
    }
};

template <class T>
void write(Array<T>& array) {
    std::cout.write(array.raw(), array.bytes());
}

// After a launch over rows: a thread reads its share in as few rounds of four loads as there are, the last step's too, and a
// short row is a warp's, which waits for no other.
template <class E>
void check_rounds(int64_t columns) {
    const bool is_short = columns <= 1024;
    const int64_t step = (is_short ? 32 : 256) * 4, packs = columns / (16 / int64_t(sizeof(E)));
    const int64_t share = (packs + step - 1) / step;
    if (emulator::most_rounds > share || (is_short && emulator::block_barriers)) {
        fprintf(stderr, "emulator: a thread reads %lld columns in %u rounds of loads, its share takes %lld; %u waits at barriers\n",
                static_cast<long long>(columns), emulator::most_rounds, static_cast<long long>(share),
                emulator::block_barriers);
        abort();
    }
}

// scalars: tokens, columns, stride, vocab_start, count, order, misalignment, in_place, entropy; a gradient of the logits'
// size has their stride, one of half of it their rows, in place. is_kept: after them come lists of kept ids
template <class E, class G = E>
void run_log_prob(bool is_kept) {
    Input<int64_t> s;
    const int64_t tokens = s.get()[0], columns = s.get()[1], stride = s.get()[2], vocab_start = s.get()[3];
    const int64_t count = s.get()[4], misalignment = s.get()[6];
    const int order = int(s.get()[5]);
    const bool in_place = s.get()[7] != 0, entropy = s.get()[8] != 0;
    Input<E> logits(misalignment);
    Input<int64_t> targets, rows;
    Input<float> inverse;
    Input<int32_t> positions;
    Input<float> grads;
    std::unique_ptr<Input<int32_t>> ids(is_kept ? new Input<int32_t> : nullptr);
    std::unique_ptr<Input<int64_t>> ranges(is_kept ? new Input<int64_t> : nullptr);
    const device::KeptLists lists{is_kept ? ids->get() : nullptr, is_kept ? ranges->get() : nullptr};
    Array<float> scratch(is_kept ? ids->size() * int64_t(sizeof(float)) : 0);
    device::RowSource source{logits.get(), targets.get(), inverse.get(), rows.or_null(),
                             columns,      stride,        vocab_start,   inverse.size() == 1};
    Array<RowStats> stats(count * int64_t(sizeof(RowStats))), merged(count * int64_t(sizeof(RowStats)));
    Array<float> results(3 * count * int64_t(sizeof(float)));
    const auto kept_kernel = entropy ? device::kept_log_prob_stats<E, true> : device::kept_log_prob_stats<E, false>;
    const auto kernel = device::stats_kernel<E>(source, entropy);
    emulator::launch(is_kept ? unsigned(count) : device::row_blocks(count, columns), device::kThreads, order, [&] {
        is_kept ? kept_kernel(source, lists, stats.get()) : kernel(source, count, stats.get());
    });
    if (!is_kept && entropy) check_rounds<E>(columns);
    const auto blocks = unsigned((count + device::kThreads - 1) / device::kThreads);
    emulator::launch(blocks, device::kThreads, order,
                     [&] { device::log_prob_merge(stats.get(), source, 1, count, merged.get(), results.get()); });
    source.rows = nullptr;
    const device::RowUpstream upstream{positions.or_null(), merged.get(), results.get() + count, grads.get(), count};
    Array<E> separate(logits.bytes(), misalignment);
    if (!in_place) memset(separate.raw(), 0, size_t(separate.bytes()));
    void* out = in_place ? logits.get() : separate.get();
    const int64_t out_stride = stride * int64_t(sizeof(E) / sizeof(G));
    const auto backward = device::backward_kernel<E, G>(source, out, out_stride);
    const auto kept_backward = device::kept_backward_kernel<E, G>(source, out, out_stride);
    emulator::launch(is_kept ? unsigned(tokens) : device::row_blocks(tokens, columns), device::kThreads, order, [&] {
        is_kept ? kept_backward(source, upstream, lists, scratch.get(), out, out_stride)
                : backward(source, upstream, tokens, out, out_stride);
    });
    write(results);
    in_place ? write(logits) : write(separate);
}

void run_token_loss() {
    Input<int64_t> s;  // order, weights_per_sequence, surrogate, kl_bias_correction
    Input<double> options;
    Input<float> log_probs, old, reference, sampler, advantages, weights;
    Input<uint8_t> mask;
    Input<int64_t> sequence_ids;
    const double* o = options.get();
    const LossOptions chosen =
        loss_options(o[0], o[1], o[2], o[3], o[4], s.get()[2], o[5], o[6], s.get()[3] != 0, old.or_null(),
                     reference.or_null(), sampler.or_null());
    const int64_t count = log_probs.size();
    const auto blocks = unsigned((count + device::kTokensPerBlock - 1) / device::kTokensPerBlock);
    Array<float> grad(log_probs.bytes());
    Array<double> partial(int64_t(blocks) * kNumSums * 8), sums(kNumSums * 8);
    const device::LossTensors tensors{log_probs.get(),  old.or_null(),     reference.or_null(),    sampler.or_null(),
                                      advantages.get(), weights.or_null(), sequence_ids.or_null(), mask.or_null(),
                                      s.get()[1] != 0,  grad.get()};
    unsigned finished = 0;
    emulator::launch(blocks, device::kLossThreads, int(s.get()[0]),
                     [&] { device::token_loss(tensors, chosen, count, partial.get(), &finished, sums.get()); });
    if (finished != 0) abort();
    const unsigned share = (blocks + device::kLossThreads - 1) / device::kLossThreads * kNumSums;
    if (emulator::most_fresh_loads() > share) {
        fprintf(stderr, "emulator: a thread adds %u sums of other blocks, its share is %u\n",
                emulator::most_fresh_loads(), share);
        abort();
    }
    write(grad);
    write(sums);
}

void run_group_advantage() {
    Input<int64_t> s;  // order, baseline, scale
    Input<double> epsilon, rewards;
    Input<int64_t> offsets;
    Input<uint8_t> mask;
    Array<float> advantages(rewards.size() * 4);
    emulator::launch(1, device::kAdvantageThreads, int(s.get()[0]), [&] {
        device::group_advantages(rewards.get(), offsets.get(), mask.or_null(), offsets.size() - 1, rewards.size(),
                                 static_cast<Baseline>(s.get()[1]), static_cast<Scale>(s.get()[2]), epsilon.get()[0],
                                 advantages.get());
    });
    write(advantages);
}

}  // namespace

int main() {
    std::string name;
    std::getline(std::cin, name);
    const bool is_kept = name.rfind("kept_", 0) == 0;
    const std::string rows = is_kept ? name.substr(5) : name;
    if (rows == "log_prob_f32")
        run_log_prob<float>(is_kept);
    else if (rows == "log_prob_bf16")
        run_log_prob<Bf16>(is_kept);
    else if (rows == "log_prob_f32_to_bf16")
        run_log_prob<float, Bf16>(is_kept);
    else if (rows == "log_prob_f32_to_f16")
        run_log_prob<float, Half>(is_kept);
    else if (name == "token_loss")
        run_token_loss();
    else if (name == "group_advantage")
        run_group_advantage();
    else if (name == "divergent_barrier")
        emulator::launch(1, 64, 0, [] {
            if (threadIdx.x < 40) R1_SYNC();
        });
    else if (name == "out_of_bounds") {
        Array<float> small(16 * 4);
        emulator::launch(1, 32, 0, [&] { small.get()[threadIdx.x] = 1.f; });
    } else {
        std::cerr << "unknown kernel " << name << "\n";
        return 2;
    }
}
