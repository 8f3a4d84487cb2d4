// Count float32 values by their upper 16 bits, on the device.
//
// The state is 65,536 + 8 64-bit integers; adding two states' counters (and joining the last eight as named below) is
// the same as having seen both streams. Values that cannot take part in a range (NaN, infinities, mask sentinels) are
// counted apart. The meaning is that of calibrate/stats/histogram.py.
//
// Most values of an activation lie within some tens of octaves, so a block counts magnitudes of 2^-63 .. 2^65 in shared
// memory, both signs of a magnitude in one word; the rest goes to global memory directly, zeros through registers.
#pragma once

#include "../../outlier_matmul/cuda/numeric.cuh"

namespace qpipe {

using StateWord = unsigned long long;

constexpr int kBins = 65536;
constexpr int kStateWords = kBins + 8;

// Words after the counters. Minimum and maximum are kept as keys that order as the values do; empty: ~0 and 0.
enum StateSlot { kLowBits = kBins, kMinimum, kMaximum, kNaNs, kPositiveInfinities, kNegativeInfinities, kSentinels };

constexpr int kCountThreads = 512;
constexpr int kCountPasses = 112;  // values of one thread between two flushes: a 16-bit counter cannot overflow
constexpr int kCountChunk = kCountThreads * kCountPasses;
static_assert(kCountChunk < 65536, "a block's counters are 16 bits wide");

constexpr uint32_t kWindowFirst = 0x2000;  // bin of 2^-63
constexpr uint32_t kWindowBins = 0x4000;
constexpr size_t kCountSharedBytes = kWindowBins * sizeof(uint32_t);

// Unsigned keys in the order of the float values.
QPIPE_DEVICE uint32_t ordered_key(uint32_t bits) { return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u); }

struct Tally {
    uint32_t low_bits = 0, minimum = 0xffffffffu, maximum = 0;
    uint32_t zeros = 0, negative_zeros = 0;
    uint32_t nans = 0, positive = 0, negative = 0, sentinels = 0;
};

// Count one value into the tally, the block's window or the state.
QPIPE_DEVICE void count_value(uint32_t bits, float sentinel, Tally& tally, uint32_t* window, StateWord* state) {
    const uint32_t magnitude = bits & 0x7fffffffu, sign = bits >> 31;
    if (!(ptx::bits_float(magnitude) < sentinel)) {
        if (magnitude > kInfinityBits) ++tally.nans;
        else if (magnitude < kInfinityBits) ++tally.sentinels;
        else if (sign) ++tally.negative;
        else ++tally.positive;
        return;
    }
    const uint32_t key = ordered_key(bits), bin = magnitude >> 16;
    tally.low_bits |= bits & 0xffffu;
    tally.minimum = key < tally.minimum ? key : tally.minimum;
    tally.maximum = key > tally.maximum ? key : tally.maximum;
    if (bin == 0) {
        if (sign) ++tally.negative_zeros;
        else ++tally.zeros;
    } else if (bin - kWindowFirst < kWindowBins) {
        ptx::atomic_add(&window[bin - kWindowFirst], sign ? 0x10000u : 1u);
    } else {
        ptx::atomic_add(&state[bits >> 16], StateWord{1});
    }
}

// Move the block's counters into the state and clear them.
QPIPE_DEVICE void flush_window(uint32_t* window, StateWord* state) {
    for (uint32_t bin = ptx::thread(); bin < kWindowBins; bin += kCountThreads) {
        const uint32_t counts = window[bin];
        if (counts == 0) continue;
        window[bin] = 0;
        if (counts & 0xffffu) ptx::atomic_add(&state[kWindowFirst + bin], StateWord{counts & 0xffffu});
        if (counts >> 16) ptx::atomic_add(&state[0x8000u + kWindowFirst + bin], StateWord{counts >> 16});
    }
}

QPIPE_DEVICE void add_to_state(StateWord* slot, uint32_t of_thread) {
    const uint32_t sum = ptx::warp_sum(of_thread);
    if (ptx::thread() % 32 == 0 && sum != 0) ptx::atomic_add(slot, StateWord{sum});
}

// Fold the tallies of a warp into the state; every lane calls it.
QPIPE_DEVICE void flush_tally(const Tally& tally, StateWord* state) {
    const uint32_t low_bits = ptx::warp_or(tally.low_bits);
    const uint32_t minimum = ptx::warp_min(tally.minimum), maximum = ptx::warp_max(tally.maximum);
    if (ptx::thread() % 32 == 0) {
        ptx::atomic_or(&state[kLowBits], StateWord{low_bits});
        ptx::atomic_min(&state[kMinimum], StateWord{minimum});
        ptx::atomic_max(&state[kMaximum], StateWord{maximum});
    }
    add_to_state(&state[0], tally.zeros);
    add_to_state(&state[0x8000], tally.negative_zeros);
    add_to_state(&state[kNaNs], tally.nans);
    add_to_state(&state[kPositiveInfinities], tally.positive);
    add_to_state(&state[kNegativeInfinities], tally.negative);
    add_to_state(&state[kSentinels], tally.sentinels);
}

// Values from `first` on, `kPerLoad` of them as one 16-byte load where that is possible.
template <class T>
QPIPE_DEVICE void count_vector(const T* x, int64_t first, int64_t size, bool vectors, float sentinel, Tally& tally,
                               uint32_t* window, StateWord* state) {
    constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));
    alignas(16) T raw[kPerLoad];
    int valid = kPerLoad;
    if (vectors && first + kPerLoad <= size) {
        *reinterpret_cast<Bytes16*>(raw) = *reinterpret_cast<const Bytes16*>(x + first);
    } else {
        valid = first < size ? static_cast<int>(smaller<int64_t>(size - first, kPerLoad)) : 0;
        QPIPE_UNROLL
        for (int i = 0; i < kPerLoad; ++i) raw[i] = i < valid ? x[first + i] : T{};
    }
    QPIPE_UNROLL
    for (int i = 0; i < kPerLoad; ++i) {
        if (i < valid) count_value(ptx::float_bits(to_float(raw[i])), sentinel, tally, window, state);
    }
}

// Add the values x[0 .. size) to `state`.
template <class T>
__global__ void __launch_bounds__(kCountThreads) count_kernel(const T* x, int64_t size, float sentinel,
                                                              StateWord* state) {
    constexpr int kPerLoad = 16 / static_cast<int>(sizeof(T));
    auto* window = reinterpret_cast<uint32_t*>(ptx::shared_memory());
    const bool vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0;
    for (uint32_t bin = ptx::thread(); bin < kWindowBins; bin += kCountThreads) window[bin] = 0;
    ptx::sync_block();
    Tally tally;
    const int64_t step = static_cast<int64_t>(ptx::blocks()) * kCountChunk;
    for (int64_t chunk = static_cast<int64_t>(ptx::block()) * kCountChunk; chunk < size; chunk += step) {
        for (int pass = 0; pass < kCountPasses / kPerLoad; ++pass) {
            const int64_t first = chunk + (static_cast<int64_t>(pass) * kCountThreads + ptx::thread()) * kPerLoad;
            count_vector(x, first, size, vectors, sentinel, tally, window, state);
        }
        ptx::sync_block();
        flush_window(window, state);
        ptx::sync_block();
    }
    flush_tally(tally, state);
}

}  // namespace qpipe
