// The sm_90a part of qpipe::ptx for g++: transaction barriers, TMA, clusters, wgmma.
#pragma once

#include "emulator.h"

namespace qpipe::ptx {

inline emulator::Barrier& barrier_at(uint32_t barrier, int rank) {
    shared_at(barrier, 8, rank);
    if (barrier % 8 != 0) emulator::stop("an mbarrier is not aligned");
    auto& all = grid()->cluster_blocks[rank].barriers;
    if (all.count(barrier) == 0) emulator::stop("an mbarrier is used before its initialization");
    return all[barrier];
}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
    shared_at(barrier, 8);
    emulator::block().barriers[barrier] = {arrivals, arrivals, 0, 0};
}

inline void barrier_init_fence() {}

inline void arrive_at(emulator::Barrier& b) {
    if (b.pending == 0) emulator::stop("too many arrivals at an mbarrier");
    --b.pending;
    b.settle();
}

inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    emulator::Barrier& b = barrier_at(barrier, self().rank);
    b.bytes += bytes;
    arrive_at(b);
}

inline void barrier_arrive(uint32_t barrier) { arrive_at(barrier_at(barrier, self().rank)); }

inline void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
    arrive_at(barrier_at(barrier, static_cast<int>(rank)));
}

// Returns when the phase of this parity has completed; the phase before the first counts as completed.
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    const emulator::Barrier* b = &barrier_at(barrier, self().rank);
    emulator::wait_until([=] { return (b->phase & 1) != parity; });
}

// The 128-byte swizzle of TMA and wgmma: address bits 4 to 6 are exchanged by bits 7 to 9.
inline uint32_t swizzled_address(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void copy_box(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int rank) {
    for (int row = 0; row < map.box_rows; ++row) {
        for (int byte = 0; byte < 128; ++byte) {
            const bool inside = y + row >= 0 && y + row < map.rows && x + byte >= 0 && x + byte < map.row_bytes;
            const uint32_t target = swizzled_address(shared + row * 128 + byte);
            *shared_at(target, 1, rank) =
                inside ? map.base[static_cast<int64_t>(y + row) * map.row_bytes + x + byte] : 0;
        }
    }
    emulator::Barrier& b = barrier_at(barrier, rank);
    b.bytes -= map.box_rows * 128;
    b.settle();
}

inline void tensor_copy_multicast(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x, int y,
                                  uint16_t blocks) {
    if (shared % 128 != 0) emulator::stop("a TMA target is not aligned");
    if (map->row_bytes % 16 != 0) emulator::stop("a TMA row pitch is not a multiple of 16");
    for (int rank = 0; rank < grid()->cluster; ++rank) {
        if ((blocks >> rank & 1) == 0) continue;
        auto copy = [=] { copy_box(shared, *map, barrier, x, y, rank); };
        if (grid()->options.late_copies) grid()->bulk_copies.push_back(copy);
        else copy();
    }
}

inline void tensor_copy(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x, int y) {
    tensor_copy_multicast(shared, map, barrier, x, y, static_cast<uint16_t>(1 << self().rank));
}

inline void cluster_sync() { emulator::pass(grid()->cluster_gate, emulator::alive_in_cluster); }

inline Bytes16 load_remote(uint32_t shared, uint32_t rank) {
    Bytes16 v;
    std::memcpy(&v, shared_at(shared, 16, static_cast<int>(rank)), 16);
    return v;
}

inline void store_shared(uint32_t shared, const Bytes16& v) { std::memcpy(shared_at(shared, 16), &v, 16); }

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}
template <class A>
void wgmma_pin(A&) {}
inline void wgmma_fence() {}

inline int warpgroup() { return self().thread / 128; }

inline void wgmma_commit() {
    emulator::meet_warpgroup("wgmma.commit", nullptr, [](const std::vector<void*>&) {
        emulator::Block& b = emulator::block();
        b.products[warpgroup()].push_back(std::move(b.open_products[warpgroup()]));
        b.open_products[warpgroup()].clear();
    });
}

template <int kPending>
void wgmma_wait() {
    emulator::meet_warpgroup("wgmma.wait", nullptr, [](const std::vector<void*>&) {
        auto& groups = emulator::block().products[warpgroup()];
        while (groups.size() > kPending) {
            emulator::perform(groups.front());
            groups.pop_front();
        }
    });
}

// Byte `byte` of row `row` of a K-major operand, as its descriptor says.
inline const unsigned char* operand_byte(uint64_t descriptor, int row, int byte, int rank) {
    if (descriptor >> 62 != 1) emulator::stop("a wgmma descriptor without the 128-byte swizzle");
    const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    const uint32_t group = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    return shared_at(swizzled_address(start + row / 8 * group + row % 8 * 128 + byte), 1, rank);
}

// d[64 x N] += x[64 x 32 bytes] * w[N x 32 bytes]^T; warp w of the group holds rows 16 w to 16 w + 15 as m16n8 tiles do.
template <class E, class D, int kCount>
void warpgroup_multiply(const char* name, D (&d)[kCount], uint64_t x, uint64_t w) {
    struct Lane {
        D* d;
        uint64_t x, w;
    } mine{d, x, w};
    emulator::meet_warpgroup(name, &mine, [=](const std::vector<void*>& lanes) {
        std::vector<D*> targets;
        for (void* lane : lanes) {
            if (static_cast<Lane*>(lane)->x != x || static_cast<Lane*>(lane)->w != w) {
                emulator::stop("the descriptors of a warpgroup differ");
            }
            targets.push_back(static_cast<Lane*>(lane)->d);
        }
        const int rank = self().rank;
        auto product = [=] {
            constexpr int kColumns = kCount * 2, kDepth = 32 / E::kBytes;
            std::vector<double> a(64 * kDepth), b(kColumns * kDepth);
            unsigned char raw[4];
            const auto element = [&](uint64_t operand, int row, int k) {
                for (int i = 0; i < E::kBytes; ++i) raw[i] = *operand_byte(operand, row, k * E::kBytes + i, rank);
                return E::value(raw);
            };
            for (int k = 0; k < kDepth; ++k) {
                for (int row = 0; row < 64; ++row) a[row * kDepth + k] = element(x, row, k);
                for (int row = 0; row < kColumns; ++row) b[row * kDepth + k] = element(w, row, k);
            }
            for (int thread = 0; thread < 128; ++thread) {
                for (int i = 0; i < kCount; ++i) {
                    const int row = thread / 32 * 16 + thread % 32 / 4 + (i % 4 >= 2 ? 8 : 0);
                    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
                    double sum = 0;
                    for (int k = 0; k < kDepth; ++k) sum += a[row * kDepth + k] * b[column * kDepth + k];
                    targets[thread][i] = static_cast<D>(static_cast<double>(targets[thread][i]) + sum);
                }
            }
        };
        if (grid()->options.late_products) emulator::block().open_products[warpgroup()].push_back(product);
        else product();
    });
}

template <int kCount>
void wgmma_s8(int32_t (&d)[kCount], uint64_t x, uint64_t w) {
    warpgroup_multiply<S8>("wgmma.s8", d, x, w);
}
template <int kCount>
void wgmma_f16(float (&d)[kCount], uint64_t x, uint64_t w) {
    warpgroup_multiply<F16>("wgmma.f16", d, x, w);
}
template <int kCount>
void wgmma_bf16(float (&d)[kCount], uint64_t x, uint64_t w) {
    warpgroup_multiply<Bf16>("wgmma.bf16", d, x, w);
}

}  // namespace qpipe::ptx
