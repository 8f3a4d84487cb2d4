// Kernel 2 for sm_80 and later: int8 product by mma.sync, fed by a cp.async pipeline, float tail and epilogue fused.
//
// A block makes one kBm x kBn tile of Y. Its stages are first the int8 operands, 128 codes of K each, then the outlier
// operands, 128 bytes each. Between the two the INT32 sums become FP32 in place; the tail adds to them. With kWarpsK > 1
// the warps of a block take different steps of each stage and their sums are added in shared memory.
#pragma once

#include "epilogue.cuh"

namespace qpipe {

template <int kBm_, int kBn_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_>
struct MmaTile {
    static constexpr int kBm = kBm_, kBn = kBn_;
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_;
    static constexpr int kStages = kStages_;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN * kWarpsK;
    static constexpr int kMt = kBm / kWarpsM / 16;  // 16-row blocks of one warp
    static constexpr int kNt = kBn / kWarpsN / 8;   // 8-column groups of one warp
    static constexpr int kSums = kMt * kNt * 4;
    static constexpr int kXBytes = kBm * kStageBytes;
    static constexpr int kRingBytes = kStages * (kBm + kBn) * kStageBytes;
    static constexpr int kExchangeBytes = (kWarpsK - 1) * kWarpsM * kWarpsN * 32 * kSums * 4;
    static constexpr int kSharedBytes = kRingBytes + kExchangeBytes + 1024;  // 1024: alignment of the swizzle
    static_assert(kMt >= 1 && kNt % 4 == 0 && kWarpsK <= kStepsPerStage, "a warp's tile must fit its fragments");
};

// One pair of operands along K: rows of `row_bytes` bytes, a multiple of 16.
struct OperandPair {
    const unsigned char* x;
    const unsigned char* w;
    int row_bytes;
};

QPIPE_DEVICE unsigned char* aligned_shared_memory() {
    unsigned char* memory = ptx::shared_memory();
    return memory + (0u - ptx::shared_address(memory)) % 1024;
}

// Copy 128 bytes of each of kRows rows into a swizzled tile; what lies outside the matrix becomes zero.
template <int kRows, int kThreads>
QPIPE_DEVICE void copy_rows(uint32_t tile, const unsigned char* matrix, int64_t first_row, int64_t rows, int row_bytes,
                            int first_byte) {
    static_assert(kRows * kChunksPerStage % kThreads == 0, "every thread copies the same number of chunks");
    QPIPE_UNROLL
    for (int i = 0; i < kRows * kChunksPerStage / kThreads; ++i) {
        const int at = i * kThreads + ptx::thread();
        const int row = at / kChunksPerStage, chunk = at % kChunksPerStage;
        const int byte = first_byte + chunk * kChunkBytes;
        const bool inside = first_row + row < rows && byte < row_bytes;
        const unsigned char* source = inside ? matrix + (first_row + row) * row_bytes + byte : matrix;
        ptx::copy_async16(tile + swizzled(row, chunk), source, inside);
    }
}

// sums[kMt x kNt] += one 32-byte step of the warp's rows of X and W.
template <class Step, int kMt, int kNt>
QPIPE_DEVICE void multiply_step(typename Step::Accumulator (&sums)[kMt * kNt * 4], uint32_t x_tile, uint32_t w_tile,
                                int x_row, int w_row, int step) {
    constexpr int kBlocks = smaller(kMt, Step::kRowBlocks);  // row blocks of X held in registers at once
    const uint32_t lane = ptx::thread() % 32;
    const Spot at_x = a_fragment_spot(lane), at_w = b_fragment_spot(lane);
    QPIPE_UNROLL
    for (int first = 0; first < kMt; first += kBlocks) {
        uint32_t x[kBlocks][4];
        QPIPE_UNROLL
        for (int i = 0; i < kBlocks; ++i) {
            const int row = x_row + (first + i) * 16 + at_x.row;
            ptx::load_matrices(x[i], x_tile + swizzled(row, step * 2 + at_x.chunk));
        }
        QPIPE_UNROLL
        for (int j = 0; j < kNt; j += 2) {
            uint32_t w[4];
            ptx::load_matrices(w, w_tile + swizzled(w_row + j * 8 + at_w.row, step * 2 + at_w.chunk));
            QPIPE_UNROLL
            for (int i = 0; i < kBlocks; ++i) {
                Step::multiply(sums + flat<kNt>(first + i, j, 0), x[i], w[0], w[1]);
                Step::multiply(sums + flat<kNt>(first + i, j + 1, 0), x[i], w[2], w[3]);
            }
        }
    }
}

// The block's pipeline: a ring of stages in shared memory, copies kStages - 1 ahead.
template <class Tile>
struct MmaPipeline {
    const Operands& op;
    OperandPair codes, outliers;
    int64_t row, column;  // first row and column of the tile
    int code_stages, stages;
    uint32_t ring;

    QPIPE_DEVICE uint32_t x_tile(int stage) const {
        return ring + stage % Tile::kStages * (Tile::kBm + Tile::kBn) * kStageBytes;
    }
    QPIPE_DEVICE uint32_t w_tile(int stage) const { return x_tile(stage) + Tile::kXBytes; }

    // Start the copies of a stage; past the last one an empty group keeps the count.
    QPIPE_DEVICE void start(int stage) const {
        if (stage < stages) {
            const bool main = stage < code_stages;
            // Field by field: choosing between the structures would put them into local memory.
            const unsigned char* x = main ? codes.x : outliers.x;
            const unsigned char* w = main ? codes.w : outliers.w;
            const int row_bytes = main ? codes.row_bytes : outliers.row_bytes;
            const int byte = (main ? stage : stage - code_stages) * kStageBytes;
            copy_rows<Tile::kBm, Tile::kThreads>(x_tile(stage), x, row, op.m, row_bytes, byte);
            copy_rows<Tile::kBn, Tile::kThreads>(w_tile(stage), w, column, op.n, row_bytes, byte);
        }
        ptx::copy_async_commit();
    }

    // Wait until `stage` has landed, and start the one whose slot has just been read by everybody.
    QPIPE_DEVICE void advance(int stage) const {
        ptx::copy_async_wait<Tile::kStages - 2>();
        ptx::sync_block();
        start(stage + Tile::kStages - 1);
    }
};

// Add the sums of the warps that took other steps of the same tile; warp_k 0 has the result.
template <class Tile, class A>
QPIPE_DEVICE void add_over_warps(A (&sums)[Tile::kSums], unsigned char* exchange, int warp_k, int warp_mn) {
    const int lane = ptx::thread() % 32;
    A* slots = reinterpret_cast<A*>(exchange) + (warp_mn * 32 + lane);
    constexpr int kStride = Tile::kWarpsM * Tile::kWarpsN * 32;
    if (warp_k > 0) {
        QPIPE_UNROLL
        for (int i = 0; i < Tile::kSums; ++i) slots[((warp_k - 1) * Tile::kSums + i) * kStride] = sums[i];
    }
    ptx::sync_block();
    if (warp_k > 0) return;
    QPIPE_UNROLL
    for (int other = 0; other < Tile::kWarpsK - 1; ++other) {
        QPIPE_UNROLL
        for (int i = 0; i < Tile::kSums; ++i) sums[i] += slots[(other * Tile::kSums + i) * kStride];
    }
}

// Y's tile: int8 main loop, conversion in place, float tail, bias, store.
template <class Tile, class Lane, class T>
QPIPE_DEVICE void multiply_tile(const MmaPipeline<Tile>& pipeline, const Operands& op, const QuantizedRows& rows,
                                unsigned char* exchange) {
    constexpr int kMt = Tile::kMt, kNt = Tile::kNt;
    const int warp = ptx::thread() / 32;
    const int warp_mn = warp % (Tile::kWarpsM * Tile::kWarpsN), warp_k = warp / (Tile::kWarpsM * Tile::kWarpsN);
    const int x_row = warp_mn / Tile::kWarpsN * (kMt * 16), w_row = warp_mn % Tile::kWarpsN * (kNt * 8);
    QPIPE_UNROLL
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) pipeline.start(stage);

    typename Lane::Accumulator sums[Tile::kSums] = {};
    QPIPE_NO_UNROLL
    for (int stage = 0; stage < pipeline.code_stages; ++stage) {
        pipeline.advance(stage);
        QPIPE_UNROLL
        for (int s = 0; s < kStepsPerStage / Tile::kWarpsK; ++s) {
            multiply_step<Lane, kMt, kNt>(sums, pipeline.x_tile(stage), pipeline.w_tile(stage), x_row, w_row,
                                          s * Tile::kWarpsK + warp_k);
        }
    }
    if constexpr (Tile::kWarpsK > 1) add_over_warps<Tile>(sums, exchange, warp_k, warp_mn);

    const WarpTile tile{pipeline.row + x_row, pipeline.column + w_row, 0, kNt};
    if (op.limit > 0) add_high_digits<kMt, kNt>(sums, tile, op, rows);
    float y[Tile::kSums];
    scale_sums<kMt, kNt>(y, sums, tile, op, rows.scale);

    int left = pipeline.outliers.row_bytes / kStepBytes;
    QPIPE_NO_UNROLL
    for (int stage = pipeline.code_stages; stage < pipeline.stages; ++stage, left -= kStepsPerStage) {
        pipeline.advance(stage);
        QPIPE_NO_UNROLL
        for (int s = 0; s < smaller(left, kStepsPerStage); ++s) {
            multiply_step<FloatStep<T>, kMt, kNt>(y, pipeline.x_tile(stage), pipeline.w_tile(stage), x_row, w_row, s);
        }
    }
    if (Tile::kWarpsK > 1 && warp_k > 0) return;
    add_bias<kMt, kNt>(y, tile, op);
    store_tile<T, kMt, kNt>(y, tile, op);
}

template <class Tile, class Lane, class T>
__global__ void __launch_bounds__(Tile::kThreads, 1) gemm_mma_kernel(const __grid_constant__ Operands op,
                                                                  const __grid_constant__ QuantizedRows rows) {
    const TileSpot spot = tile_spot(ptx::block(), static_cast<int>(ceil_div<int64_t>(op.m, Tile::kBm)),
                                    static_cast<int>(ceil_div<int64_t>(op.n, Tile::kBn)));
    const int outlier_bytes = op.o_padded * static_cast<int>(sizeof(T));
    const int code_stages = ceil_div(op.k_padded, kStageBytes);
    unsigned char* shared = aligned_shared_memory();
    const auto bytes = [](const void* matrix) { return static_cast<const unsigned char*>(matrix); };
    const MmaPipeline<Tile> pipeline{op,
                                     {bytes(rows.codes), bytes(op.w_codes), op.k_padded},
                                     {bytes(rows.outliers), bytes(op.w_outlier), outlier_bytes},
                                     static_cast<int64_t>(spot.m) * Tile::kBm,
                                     static_cast<int64_t>(spot.n) * Tile::kBn,
                                     code_stages,
                                     code_stages + ceil_div(outlier_bytes, kStageBytes),
                                     ptx::shared_address(shared)};
    ptx::wait_for_previous_grid();
    multiply_tile<Tile, Lane, T>(pipeline, op, rows, shared + Tile::kRingBytes);
}

}  // namespace qpipe
