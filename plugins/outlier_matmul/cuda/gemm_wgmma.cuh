// Kernel 2 for sm_90a: int8 product by wgmma, fed by TMA, one producer warpgroup, one or two consumer warpgroups.
//
// A block makes tiles of 64 rows per consumer times kBn columns of Y; blocks are persistent. As in gemm_mma.cuh the
// stages of a tile are first int8 operands, then outlier operands, and the INT32 sums become FP32 in place between them.
// The blocks of a cluster may share: W (neighbouring tiles along M), X (along N), each block copying a slice for all; or
// one tile, split along K, whose INT32 sums they then add through distributed shared memory, each block for its share
// of the columns. Integer sums make that exact and independent of order.
#pragma once

#include <type_traits>

#include "gemm_mma.cuh"
#include "ptx_hopper.cuh"

namespace qpipe {

template <int kConsumers_, int kBn_, int kStages_, bool kSplits_>
struct WgmmaTile {
    static constexpr int kConsumers = kConsumers_, kBn = kBn_, kStages = kStages_;
    static constexpr bool kSplits = kSplits_;  // room for a split along K
    static constexpr int kBm = 64 * kConsumers;
    static constexpr int kThreads = 128 * (kConsumers + 1);
    static constexpr int kNt = kBn / 8;
    static constexpr int kSums = kNt * 4;
    static constexpr int kXBytes = kBm * kStageBytes;
    static constexpr int kSlotBytes = (kBm + kBn) * kStageBytes;
    static constexpr int kPartialBytes = kSplits ? kBm * kBn * 4 : 0;
    static constexpr int kBarrierBytes = kStages * 2 * 8;
    static constexpr int kSharedBytes = kStages * kSlotBytes + kPartialBytes + kBarrierBytes + 1024;
    static_assert(kSharedBytes <= 227 * 1024, "a block has 227 KB of shared memory on sm_90");
};

struct HopperCall {
    Operands op;
    QuantizedRows rows;
    CUtensorMap x, w, x_outlier, w_outlier;  // bytes; boxes of 128 bytes x the rows that one copy brings
    Share share;
    int cluster;
};

// Slot of the ring and the parity that its barriers will have next.
struct RingPosition {
    int slot = 0;
    uint32_t parity = 0;

    QPIPE_DEVICE void advance(int slots) {
        if (++slot < slots) return;
        slot = 0;
        parity ^= 1;
    }
};

// What a block has to do: its units of work, and the stages of each.
template <class Tile>
struct HopperWork {
    const HopperCall& call;
    uint32_t shared;
    int rank;  // in the cluster
    int units_m, units_n;
    StageRange codes;  // this block's stages of the int8 operands
    int outlier_stages;

    QPIPE_DEVICE HopperWork(const HopperCall& c, uint32_t shared_, int element_bytes) : call(c), shared(shared_) {
        rank = ptx::block() % call.cluster;
        const int tiles_m = static_cast<int>(ceil_div<int64_t>(call.op.m, Tile::kBm));
        const int tiles_n = static_cast<int>(ceil_div<int64_t>(call.op.n, Tile::kBn));
        units_m = ceil_div(tiles_m, along(Share::kW));
        units_n = ceil_div(tiles_n, along(Share::kX));
        const bool split = call.share == Share::kK;
        codes = split_stages(ceil_div(call.op.k_padded, kStageBytes), split ? rank : 0, along(Share::kK));
        outlier_stages = ceil_div(call.op.o_padded * element_bytes, kStageBytes);
    }

    QPIPE_DEVICE int along(Share share) const { return call.share == share ? call.cluster : 1; }
    QPIPE_DEVICE bool multicasts() const { return call.share == Share::kW || call.share == Share::kX; }
    QPIPE_DEVICE int units() const { return units_m * units_n; }
    QPIPE_DEVICE int code_stages() const { return codes.last - codes.first; }
    QPIPE_DEVICE int stages() const { return code_stages() + outlier_stages; }

    QPIPE_DEVICE TileSpot tile(int unit) const {
        const TileSpot spot = tile_spot(unit, units_m, units_n);
        return {call.share == Share::kW ? spot.m * call.cluster + rank : spot.m,
                call.share == Share::kX ? spot.n * call.cluster + rank : spot.n};
    }

    QPIPE_DEVICE uint32_t x_tile(int slot) const { return shared + slot * Tile::kSlotBytes; }
    QPIPE_DEVICE uint32_t w_tile(int slot) const { return x_tile(slot) + Tile::kXBytes; }
    QPIPE_DEVICE uint32_t partials() const { return shared + Tile::kStages * Tile::kSlotBytes; }
    QPIPE_DEVICE uint32_t full(int slot) const { return partials() + Tile::kPartialBytes + slot * 8; }
    QPIPE_DEVICE uint32_t empty(int slot) const { return full(Tile::kStages + slot); }

    QPIPE_DEVICE void init_barriers() const {
        for (int slot = 0; slot < Tile::kStages; ++slot) {
            ptx::barrier_init(full(slot), 1);
            ptx::barrier_init(empty(slot), Tile::kConsumers * 4 * (multicasts() ? call.cluster : 1));
        }
        ptx::barrier_init_fence();
    }

    // Copy `rows` rows of one operand, or this block's slice of them to everybody when the operand is shared.
    QPIPE_DEVICE void load(const CUtensorMap* map, uint32_t tile, int slot, int byte, int row, int rows,
                           Share shared_by) const {
        if (call.share != shared_by) {
            ptx::tensor_copy(tile, map, full(slot), byte, row);
            return;
        }
        const int slice = rows / call.cluster;
        ptx::tensor_copy_multicast(tile + rank * slice * kStageBytes, map, full(slot), byte, row + rank * slice,
                                   static_cast<uint16_t>((1 << call.cluster) - 1));
    }

    QPIPE_DEVICE void load_x(TileSpot at, int stage, int slot) const {
        const bool main = stage < code_stages();
        const int byte = (main ? codes.first + stage : stage - code_stages()) * kStageBytes;
        load(main ? &call.x : &call.x_outlier, x_tile(slot), slot, byte, at.m * Tile::kBm, Tile::kBm, Share::kX);
    }

    QPIPE_DEVICE void load_w(TileSpot at, int stage, int slot) const {
        const bool main = stage < code_stages();
        const int byte = (main ? codes.first + stage : stage - code_stages()) * kStageBytes;
        load(main ? &call.w : &call.w_outlier, w_tile(slot), slot, byte, at.n * Tile::kBn, Tile::kBn, Share::kW);
    }
};

// One thread: start every copy. The first stages of W do not wait for the row quantization to end.
template <class Tile>
QPIPE_DEVICE void produce(const HopperWork<Tile>& work) {
    const int first_unit = ptx::block() / work.call.cluster, step = ptx::blocks() / work.call.cluster;
    const int early = first_unit < work.units() ? smaller(Tile::kStages, work.stages()) : 0;
    const TileSpot first = work.tile(first_unit);
    for (int stage = 0; stage < early; ++stage) {
        ptx::barrier_expect(work.full(stage), Tile::kSlotBytes);
        work.load_w(first, stage, stage);
    }
    ptx::wait_for_previous_grid();
    RingPosition at;
    for (int stage = 0; stage < early; ++stage) {
        work.load_x(first, stage, stage);
        at.advance(Tile::kStages);
    }
    int stage = early;
    for (int unit = first_unit; unit < work.units(); unit += step) {
        const TileSpot spot = work.tile(unit);
        for (; stage < work.stages(); ++stage) {
            ptx::barrier_wait(work.empty(at.slot), at.parity ^ 1);
            ptx::barrier_expect(work.full(at.slot), Tile::kSlotBytes);
            work.load_w(spot, stage, at.slot);
            work.load_x(spot, stage, at.slot);
            at.advance(Tile::kStages);
        }
        stage = 0;
    }
}

// Descriptor of a K-major tile with 128-byte rows and 128-byte swizzle: address, groups of eight rows 1024 bytes apart.
QPIPE_DEVICE uint64_t tile_descriptor(uint32_t shared) {
    return ((shared & 0x3ffffu) >> 4) | (uint64_t{1} << 16) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 62);
}

// Not also before the fence of the outlier steps: that costs spills in the widest tile, and y is computed by then.
template <class A, int kSums>
QPIPE_DEVICE void pin(A (&sums)[kSums]) {
    QPIPE_UNROLL
    for (int i = 0; i < kSums; ++i) ptx::wgmma_pin(sums[i]);
}

// y += kSteps steps of the outlier operands; straight-line, since a loop round wgmma makes the compiler serialize it.
template <class T, int kSteps, int kSums>
QPIPE_DEVICE void wgmma_float(float (&y)[kSums], uint64_t x, uint64_t w) {
    ptx::wgmma_fence();
    QPIPE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
        const uint64_t offset = s * (kStepBytes >> 4);
        if constexpr (std::is_same_v<T, Half>) {
            ptx::wgmma_f16(y, x + offset, w + offset);
        } else {
            ptx::wgmma_bf16(y, x + offset, w + offset);
        }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    pin(y);
}

template <class T, int kSums>
QPIPE_DEVICE void wgmma_float(float (&y)[kSums], uint64_t x, uint64_t w, int steps) {
    switch (steps) {
        case 1: return wgmma_float<T, 1>(y, x, w);
        case 2: return wgmma_float<T, 2>(y, x, w);
        case 3: return wgmma_float<T, 3>(y, x, w);
        default: return wgmma_float<T, kStepsPerStage>(y, x, w);
    }
}

// A consumer warpgroup: 64 rows of every tile.
template <class Tile, class T>
struct HopperConsumer {
    const HopperWork<Tile>& work;
    int group;  // which 64 rows
    RingPosition at{};

    QPIPE_DEVICE uint32_t x_rows() const { return work.x_tile(at.slot) + group * 64 * kStageBytes; }

    QPIPE_DEVICE void release(int slot) const {
        ptx::sync_warp();
        if (ptx::thread() % 32 != 0) return;
        if (!work.multicasts()) return ptx::barrier_arrive(work.empty(slot));
        for (int rank = 0; rank < work.call.cluster; ++rank) ptx::barrier_arrive_remote(work.empty(slot), rank);
    }

    // sums += codes of X times codes of W; one stage stays in flight while the next is waited for.
    QPIPE_DEVICE void multiply_codes(int32_t (&sums)[Tile::kSums]) {
        int previous = 0;
        pin(sums);
        QPIPE_NO_UNROLL
        for (int stage = 0; stage < work.code_stages(); ++stage) {
            ptx::barrier_wait(work.full(at.slot), at.parity);
            const uint64_t x = tile_descriptor(x_rows()), w = tile_descriptor(work.w_tile(at.slot));
            ptx::wgmma_fence();
            QPIPE_UNROLL
            for (int s = 0; s < kStepsPerStage; ++s) {
                ptx::wgmma_s8(sums, x + s * (kStepBytes >> 4), w + s * (kStepBytes >> 4));
            }
            ptx::wgmma_commit();
            if (stage > 0) {
                ptx::wgmma_wait<1>();
                release(previous);
            }
            previous = at.slot;
            at.advance(Tile::kStages);
        }
        ptx::wgmma_wait<0>();
        pin(sums);
        if (work.code_stages() > 0) release(previous);
    }

    QPIPE_DEVICE void multiply_outliers(float (&y)[Tile::kSums]) {
        int left = work.call.op.o_padded * static_cast<int>(sizeof(T)) / kStepBytes;
        QPIPE_NO_UNROLL
        for (; left > 0; left -= kStepsPerStage) {
            ptx::barrier_wait(work.full(at.slot), at.parity);
            const int steps = smaller(left, kStepsPerStage);
            if constexpr (sizeof(T) == 2) {
                wgmma_float<T>(y, tile_descriptor(x_rows()), tile_descriptor(work.w_tile(at.slot)), steps);
            } else {
                const int warp_row = ptx::thread() % 128 / 32 * 16;
                QPIPE_NO_UNROLL
                for (int s = 0; s < steps; ++s) {
                    multiply_step<FloatStep<T>, 1, Tile::kNt>(y, x_rows(), work.w_tile(at.slot), warp_row, 0, s);
                }
            }
            release(at.slot);
            at.advance(Tile::kStages);
        }
    }

    // Add the other blocks' sums of the column groups that this block finishes.
    QPIPE_DEVICE void add_over_cluster(int32_t (&sums)[Tile::kSums], const WarpTile& tile) const {
        const uint32_t place = work.partials() + (group * Tile::kNt * 128 + ptx::thread() % 128) * 16;
        QPIPE_UNROLL
        for (int j = 0; j < Tile::kNt; ++j) {
            if (tile.owns(j)) continue;
            Bytes16 v;
            QPIPE_UNROLL
            for (int r = 0; r < 4; ++r) v.word[r] = static_cast<uint32_t>(sums[j * 4 + r]);
            ptx::store_shared(place + j * 128 * 16, v);
        }
        ptx::cluster_sync();
        QPIPE_NO_UNROLL
        for (int other = 0; other < work.call.cluster; ++other) {
            if (other == work.rank) continue;
            QPIPE_UNROLL
            for (int j = 0; j < Tile::kNt; ++j) {
                if (!tile.owns(j)) continue;
                const Bytes16 v = ptx::load_remote(place + j * 128 * 16, other);
                QPIPE_UNROLL
                for (int r = 0; r < 4; ++r) sums[j * 4 + r] += static_cast<int32_t>(v.word[r]);
            }
        }
    }

    QPIPE_DEVICE void make_tile(TileSpot spot) {
        const int warp_row = ptx::thread() % 128 / 32 * 16;
        const int share = Tile::kNt / work.along(Share::kK);
        const int first = work.call.share == Share::kK ? work.rank * share : 0;
        const WarpTile tile{static_cast<int64_t>(spot.m) * Tile::kBm + group * 64 + warp_row,
                            static_cast<int64_t>(spot.n) * Tile::kBn, first, first + share};
        int32_t sums[Tile::kSums] = {};
        multiply_codes(sums);
        if constexpr (Tile::kSplits) {
            if (work.call.share == Share::kK) add_over_cluster(sums, tile);
        }
        if (work.call.op.limit > 0) add_high_digits<1, Tile::kNt>(sums, tile, work.call.op, work.call.rows);
        float y[Tile::kSums];
        scale_sums<1, Tile::kNt>(y, sums, tile, work.call.op, work.call.rows.scale);
        multiply_outliers(y);
        add_bias<1, Tile::kNt>(y, tile, work.call.op);
        store_tile<T, 1, Tile::kNt>(y, tile, work.call.op);
    }
};

template <class Tile, class T>
__global__ void __launch_bounds__(Tile::kThreads, 1) gemm_wgmma_kernel(const __grid_constant__ HopperCall call) {
#if defined(QPIPE_HOPPER)
    const HopperWork<Tile> work(call, ptx::shared_address(aligned_shared_memory()), static_cast<int>(sizeof(T)));
    const int group = ptx::thread() / 128;
    if (ptx::thread() == 0) work.init_barriers();
    ptx::sync_block();
    if (call.cluster > 1) ptx::cluster_sync();
    if (group == Tile::kConsumers) {
        if constexpr (Tile::kConsumers > 1) ptx::give_registers<56>();
        if (ptx::thread() % 128 == 0) produce(work);
        if (call.share == Share::kK) ptx::cluster_sync();  // the consumers' exchange counts every thread
    } else {
        if constexpr (Tile::kConsumers > 1) ptx::take_registers<224>();
        ptx::wait_for_previous_grid();
        HopperConsumer<Tile, T> consumer{work, group};
        for (int unit = ptx::block() / call.cluster; unit < work.units(); unit += ptx::blocks() / call.cluster) {
            consumer.make_tile(work.tile(unit));
        }
    }
    // Nobody leaves while a neighbour may still write to or read from its shared memory.
    if (call.cluster > 1) ptx::cluster_sync();
#endif
}

}  // namespace qpipe
