// Runs CUDA kernels on a CPU, one block after the other, each thread a fiber: the real kernel source under g++ with the
// address and undefined-behaviour sanitizers.
//
// A fiber runs until it waits for others (__syncthreads, a shuffle), so a missing barrier shows as a wrong result, and
// a barrier that not every thread reaches as a deadlock, which is reported. It does not model: blocks that run at the
// same time, memory order between threads, divergence within a warp, the speed or the rounding of the GPU's special
// functions.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define R1_DEVICE [[maybe_unused]] inline
#define R1_GLOBAL
#define R1_LAUNCH_BOUNDS(threads)
#define R1_SHARED static  // blocks run one after the other; filled with garbage is not modelled
#define R1_SYNC() emulator::block_barrier()
#define R1_SYNC_WARP() emulator::warp_barrier()
#define R1_FENCE()
#define R1_SHUFFLE_DOWN(value, offset) emulator::shuffle(value, emulator::lane() + (offset))
#define R1_SHUFFLE_XOR(value, offset) emulator::shuffle(value, emulator::lane() ^ (offset))
#define R1_ATOMIC_ADD(address, value) emulator::atomic_add(address, value)
#define R1_LOAD_STREAMING(address) emulator::load_aligned(address)
#define R1_LOAD_FRESH(address) emulator::load_fresh(address)
#define R1_MAX_NAN(a, b) emulator::max_nan(a, b)
#define R1_MAX_BF16X2(a, b) emulator::by_halves(a, b, [](float x, float y) { return fmaxf(x, y); })
#define R1_MAX_NAN_BF16X2(a, b) emulator::by_halves(a, b, emulator::larger_or_nan)

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulator {

inline unsigned current = 0, alive = 0;

// Counted, of a thread of a block: rounds of vector loads, which are in flight together until what one of them brought is used (by
// what follows it here, a maximum). On a GPU each round waits for memory once.
struct Rounds {
    unsigned begun = 0;
    bool is_open = false;
};
inline Rounds rounds[1024];
inline unsigned most_rounds = 0, block_barriers = 0;  // of the launch

inline float larger_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }
inline float max_nan(float a, float b) {
    rounds[current].is_open = false;
    return larger_or_nan(a, b);
}

// A function of bf16, on both of a word.
template <class F>
uint32_t by_halves(uint32_t a, uint32_t b, F function) {
    auto widened = [](uint32_t bits) {
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    };
    auto bits = [](float value) {
        uint32_t result;
        memcpy(&result, &value, sizeof result);
        return result;
    };
    rounds[current].is_open = false;
    const uint32_t low = bits(function(widened(a << 16), widened(b << 16))) >> 16;
    return low | (bits(function(widened(a & 0xffff0000u), widened(b & 0xffff0000u))) & 0xffff0000u);
}

struct Index {
    unsigned x;
};

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    void* fake_stack = nullptr;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_bottom = nullptr;
inline size_t scheduler_size = 0;
inline uint64_t progress = 0;
inline Barrier block, warps[32];
inline uint64_t exchange[1024];
inline std::function<void()> body;
inline Index block_index, grid_size;

// The sanitizer must be told of every change of stack.
inline void to_scheduler(bool for_ever) {
    Fiber& fiber = fibers[current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fiber.fake_stack, scheduler_bottom, scheduler_size);
#else
    (void)for_ever;
#endif
    swapcontext(&fiber.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fibers[current].fake_stack, &scheduler_bottom, &scheduler_size);
#endif
}

inline void run_fiber(unsigned index) {
    current = index;
    Fiber& fiber = fibers[index];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.data(), fiber.stack.size());
#endif
    swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    body();
    fibers[current].done = true;
    --alive;
    ++progress;
    to_scheduler(true);
}

inline void wait(Barrier& barrier, unsigned expected) {
    const unsigned generation = barrier.generation;
    ++progress;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) to_scheduler(false);
}

inline void block_barrier() {
    ++block_barriers;
    wait(block, unsigned(fibers.size()));
}

inline void warp_barrier() { wait(warps[current / 32], 32); }

inline unsigned lane() { return current % 32; }

// All 32 lanes must take part, as the full mask demands on the GPU. Lanes outside the warp give the caller's own value.
template <class T>
T shuffle(T value, unsigned source_lane) {
    static_assert(sizeof(T) <= 8);
    const unsigned warp = current / 32;
    memcpy(&exchange[current], &value, sizeof value);
    wait(warps[warp], 32);
    T result;
    memcpy(&result, &exchange[source_lane < 32 ? warp * 32 + source_lane : current], sizeof result);
    wait(warps[warp], 32);  // nobody overwrites what another has not read yet
    return result;
}

inline unsigned atomic_add(unsigned* address, unsigned value) {
    const unsigned before = *address;
    *address += value;
    return before;
}

template <class T>
T load_aligned(const T* address) {
    if (reinterpret_cast<uintptr_t>(address) % alignof(T)) {
        fprintf(stderr, "emulator: misaligned vector load\n");
        abort();
    }
    Rounds& of_thread = rounds[current];
    if (!of_thread.is_open) most_rounds = std::max(most_rounds, ++of_thread.begun);
    of_thread.is_open = true;
    T value;
    memcpy(&value, address, sizeof value);
    return value;
}

// Counted: what other blocks left is read by one thread after the other, or by many at once.
inline unsigned fresh_loads[1024];

template <class T>
T load_fresh(const T* address) {
    ++fresh_loads[current];
    return *address;
}

inline unsigned most_fresh_loads() { return *std::max_element(std::begin(fresh_loads), std::end(fresh_loads)); }

// order: 0 runs threads upwards, 1 downwards; a race shows as a difference. Blocks run in the same order.
inline void launch(unsigned blocks, unsigned threads, int order, std::function<void()> kernel) {
    grid_size = {blocks};
    body = std::move(kernel);
    std::fill(std::begin(fresh_loads), std::end(fresh_loads), 0u);
    most_rounds = block_barriers = 0;
    for (unsigned b = 0; b < blocks; ++b) {
        block_index = {order ? blocks - 1 - b : b};
        block = Barrier{};
        std::fill(std::begin(rounds), std::end(rounds), Rounds{});
        for (Barrier& warp : warps) warp = Barrier{};
        alive = threads;
        fibers = std::vector<Fiber>(threads);
        for (Fiber& fiber : fibers) {
            fiber.stack.resize(64 << 10);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &scheduler;
            makecontext(&fiber.context, entry, 0);
        }
        while (alive) {
            const uint64_t before = progress;
            for (unsigned i = 0; i < threads; ++i) {
                const unsigned index = order ? threads - 1 - i : i;
                if (!fibers[index].done) run_fiber(index);
            }
            if (progress == before) {
                fprintf(stderr, "emulator: deadlock, %u threads wait at a barrier that the others passed by\n", alive);
                abort();
            }
        }
    }
}

struct ThreadIndex {
    struct X {
        operator unsigned() const { return current; }
    } x;
};
struct BlockIndex {
    struct X {
        operator unsigned() const { return block_index.x; }
    } x;
};
struct GridSize {
    struct X {
        operator unsigned() const { return grid_size.x; }
    } x;
};

}  // namespace emulator

[[maybe_unused]] static emulator::ThreadIndex threadIdx;
[[maybe_unused]] static emulator::BlockIndex blockIdx;
[[maybe_unused]] static emulator::GridSize gridDim;
