// qpipe::ptx for g++: the functions of ptx.cuh, ptx_hopper.cuh and wgmma.cuh as PTX ISA describes the instructions.
//
// Fragment maps, swizzles and descriptors are written here from the manual a second time, element by element and not
// through layout.cuh: a wrong map in the kernels cannot hide behind the same mistake.
#pragma once

#include <cmath>

#include "emulator.h"

namespace qpipe::ptx {

using emulator::grid;
using emulator::self;
using emulator::shared_at;

inline unsigned char* shared_memory() { return emulator::block().memory.data() + emulator::kWindowStart; }

inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulator::block().memory.data());
}

inline void copy_async16(uint32_t shared, const void* global, bool wanted) {
    unsigned char* target = shared_at(shared, 16);
    if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::stop("cp.async is not aligned");
    auto copy = [=] {
        if (wanted) std::memcpy(target, global, 16);
        else std::memset(target, 0, 16);
    };
    if (grid()->options.late_copies) self().open_copies.push_back(copy);
    else copy();
}

inline void copy_async_commit() {
    self().copies.push_back(std::move(self().open_copies));
    self().open_copies.clear();
}

template <int kPending>
void copy_async_wait() {
    while (self().copies.size() > kPending) {
        emulator::perform(self().copies.front());
        self().copies.pop_front();
    }
}

inline void load_matrices(uint32_t (&r)[4], uint32_t shared) {
    struct Lane {
        uint32_t* r;
        const unsigned char* row;
    } mine{r, shared_at(shared, 16)};
    if (shared % 16 != 0) emulator::stop("ldmatrix is not aligned");
    emulator::meet_warp("ldmatrix", &mine, [](const std::vector<void*>& lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const auto* source = static_cast<Lane*>(lanes[matrix * 8 + lane / 4]);
                std::memcpy(&static_cast<Lane*>(lanes[lane])->r[matrix], source->row + lane % 4 * 4, 4);
            }
        }
    });
}

inline float half_to_float(uint16_t bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
}

inline uint16_t float_to_half(float value) {
    const auto half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    if (std::isnan(value)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Element types of the products: how many bytes, and the value.
struct S8 {
    static constexpr int kBytes = 1;
    static double value(const unsigned char* p) { return static_cast<int8_t>(*p); }
};
struct F16 {
    static constexpr int kBytes = 2;
    static double value(const unsigned char* p) { return half_to_float(static_cast<uint16_t>(p[0] | p[1] << 8)); }
};
struct Bf16 {
    static constexpr int kBytes = 2;
    static double value(const unsigned char* p) {
        return bits_float(static_cast<uint32_t>(p[0] | p[1] << 8) << 16);
    }
};
struct Tf32 {  // the lowest 13 bits of a float32 are not looked at
    static constexpr int kBytes = 4;
    static double value(const unsigned char* p) {
        uint32_t bits;
        std::memcpy(&bits, p, 4);
        return bits_float(bits & 0xffffe000u);
    }
};

// c[16 x 8] += a[16 x 32 bytes] * b[8 x 32 bytes]^T. Registers 0 to 3 of A hold (row, K half): (g, 0), (g + 8, 0), (g, 1),
// (g + 8, 1) with g = lane / 4, each register 4 bytes at 4 * (lane % 4) of its 16-byte half; B: (column g, half 0 and 1).
template <class E, class C>
void multiply(const char* name, C* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Lane {
        C* c;
        uint32_t a[4], b[2];
    } mine{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulator::meet_warp(name, &mine, [](const std::vector<void*>& lanes) {
        unsigned char a_bytes[16][32], b_bytes[8][32];
        for (int lane = 0; lane < 32; ++lane) {
            const auto* l = static_cast<Lane*>(lanes[lane]);
            for (int half = 0; half < 2; ++half) {
                const int at = half * 16 + lane % 4 * 4;
                std::memcpy(&a_bytes[lane / 4][at], &l->a[half * 2], 4);
                std::memcpy(&a_bytes[lane / 4 + 8][at], &l->a[half * 2 + 1], 4);
                std::memcpy(&b_bytes[lane / 4][at], &l->b[half], 4);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int r = 0; r < 4; ++r) {
                const int row = lane / 4 + (r >= 2 ? 8 : 0), column = lane % 4 * 2 + r % 2;
                double sum = 0;
                for (int k = 0; k < 32; k += E::kBytes) {
                    sum += E::value(&a_bytes[row][k]) * E::value(&b_bytes[column][k]);
                }
                C& target = static_cast<Lane*>(lanes[lane])->c[r];
                target = static_cast<C>(static_cast<double>(target) + sum);
            }
        }
    });
}

inline void mma_s8(int32_t* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply<S8>("mma.s8", c, a, b0, b1);
}
inline void mma_f16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply<F16>("mma.f16", c, a, b0, b1);
}
inline void mma_bf16(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply<Bf16>("mma.bf16", c, a, b0, b1);
}
inline void mma_tf32(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply<Tf32>("mma.tf32", c, a, b0, b1);
}

inline uint32_t subtract_half2(uint32_t a, uint32_t b) {
    const uint16_t low = float_to_half(half_to_float(a & 0xffff) - half_to_float(b & 0xffff));
    const uint16_t high = float_to_half(half_to_float(a >> 16) - half_to_float(b >> 16));
    return low | static_cast<uint32_t>(high) << 16;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = a | static_cast<uint64_t>(b) << 32;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> ((selector >> 4 * i & 7) * 8) & 0xff) << 8 * i;
    return result;
}

inline float divide(float a, float b) { return a / b; }
inline float round_even(float value) { return std::nearbyint(value); }
inline int thread() { return self().thread; }
inline int threads() { return grid()->threads; }
inline int block() { return grid()->first_block + self().rank; }
inline int blocks() { return grid()->blocks; }

inline void sync_block() {
    emulator::Block* b = &emulator::block();
    emulator::pass(b->gate, [b] { return b->alive; });
}

inline void sync_warp() {
    emulator::meet_warp("syncwarp", nullptr, [](const std::vector<void*>&) {});
}

// All lanes learn what `combine` makes of the lanes' values.
template <class Combine>
uint32_t over_warp(const char* name, uint32_t value, Combine combine) {
    struct Lane {
        uint32_t value, result;
    } mine{value, 0};
    emulator::meet_warp(name, &mine, [&](const std::vector<void*>& lanes) {
        std::vector<uint32_t> values;
        for (void* lane : lanes) values.push_back(static_cast<Lane*>(lane)->value);
        for (int lane = 0; lane < 32; ++lane) static_cast<Lane*>(lanes[lane])->result = combine(values, lane);
    });
    return mine.result;
}

inline uint32_t shuffle_xor(uint32_t value, int mask) {
    return over_warp("shfl", value, [=](const std::vector<uint32_t>& v, int lane) { return v[lane ^ mask]; });
}

inline uint32_t warp_max(uint32_t value) {
    return over_warp("redux.max", value, [](const std::vector<uint32_t>& v, int) {
        uint32_t most = 0;
        for (uint32_t x : v) most = x > most ? x : most;
        return most;
    });
}

inline uint32_t warp_min(uint32_t value) { return ~warp_max(~value); }

inline uint32_t warp_or(uint32_t value) {
    return over_warp("redux.or", value, [](const std::vector<uint32_t>& v, int) {
        uint32_t all = 0;
        for (uint32_t x : v) all |= x;
        return all;
    });
}

inline uint32_t warp_sum(uint32_t value) {
    return over_warp("redux.add", value, [](const std::vector<uint32_t>& v, int) {
        uint32_t sum = 0;
        for (uint32_t x : v) sum += x;
        return sum;
    });
}

template <class I>
void atomic_max(I* address, I value) {
    if (value > *address) *address = value;
}
template <class I>
void atomic_min(I* address, I value) {
    if (value < *address) *address = value;
}
template <class I>
void atomic_or(I* address, I value) {
    *address |= value;
}
template <class I>
I atomic_add(I* address, I value) {
    const I old = *address;
    *address += value;
    return old;
}

inline Bytes16 load_streaming(const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::stop("a 16-byte load is not aligned");
    Bytes16 v;
    std::memcpy(&v, global, 16);
    return v;
}

inline void wait_for_previous_grid() {
    if (auto once = std::move(grid()->options.previous_grid)) {
        grid()->options.previous_grid = nullptr;
        once();
    }
}

inline void let_next_grid_start() {}

}  // namespace qpipe::ptx

#include "emulated_hopper.h"
