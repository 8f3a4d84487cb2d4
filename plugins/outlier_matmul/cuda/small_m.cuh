// Few rows (M <= 8): one launch that streams W once from global memory into registers.
//
// Tensor cores are used with their operands exchanged: sixteen rows of W are operand A, the rows of X operand B. A
// thread reads 16 contiguous bytes of each of its two rows of W, which are two steps' fragments when X is permuted along
// K alike. The warps of a block share a tile's K and add their sums in shared memory; blocks are persistent, so that X is
// quantized once per block while the first weights are on their way.
#pragma once

#include "epilogue.cuh"
#include "row_codes.cuh"

namespace qpipe {

constexpr int kSmallRows = 8;
constexpr int kSmallColumns = 16;   // columns of Y that a block makes at a time
constexpr int kSmallWarps = 8;
constexpr int kSmallThreads = 32 * kSmallWarps;
constexpr int kRunChunks = 4;       // 64-byte chunks of a row that a warp reads in one go
constexpr int kRunBytes = 64 * kRunChunks;

// Shared memory of a block, in bytes from its start.
struct SmallLayout {
    int pitch;  // of a row of codes; an odd multiple of 64, so that two rows fall into different banks
    int outliers, mask, facts, scale, high_count, high_column, high_digit, partials, bytes;
};

QPIPE_BOTH SmallLayout small_layout(int m, int k_padded, int o_padded, int element_bytes) {
    SmallLayout at{};
    at.pitch = round_up(k_padded, kRunBytes) + 64;
    at.outliers = m * at.pitch;
    at.mask = at.outliers + kSmallRows * o_padded * element_bytes;
    at.facts = at.mask + round_up(k_padded, 128) / 8;
    at.scale = at.facts + kSmallRows * static_cast<int>(sizeof(RowFacts));
    at.high_count = at.scale + kSmallRows * 4;
    at.high_column = at.high_count + kSmallRows * 4;
    at.high_digit = at.high_column + kSmallRows * kMostNewOutliers * 4;
    at.partials = round_up(at.high_digit + kSmallRows * kMostNewOutliers * 4, 16);
    at.bytes = at.partials + 2 * kSmallThreads * static_cast<int>(sizeof(Bytes16));
    return at;
}

template <class T>
struct SmallBlock {
    const Operands& op;
    SmallLayout at;
    unsigned char* shared;
    int rows;

    template <class P>
    QPIPE_DEVICE P* part(int offset) const {
        return reinterpret_cast<P*>(shared + offset);
    }

    // Outlier columns as a bit mask; X's values in them, zero-padded to eight rows.
    QPIPE_DEVICE void gather_outliers() const {
        const int words = (at.high_column - at.mask) / 4;  // mask, facts, scales and counts begin as zero
        for (int i = ptx::thread(); i < words; i += kSmallThreads) part<uint32_t>(at.mask)[i] = 0;
        for (int i = ptx::thread(); i < kSmallRows * op.o_padded; i += kSmallThreads) {
            const int row = i / op.o_padded, o = i % op.o_padded;
            const int column = row < rows && o < op.o ? op.outlier_index[o] : -1;
            const bool inside = column >= 0 && column < op.k;
            part<T>(at.outliers)[i] =
                inside ? static_cast<const T*>(op.x)[static_cast<int64_t>(row) * op.k + column] : T{};
        }
        ptx::sync_block();
        for (int o = ptx::thread(); o < op.o; o += kSmallThreads) {
            const int column = op.outlier_index[o];
            if (column < 0 || column >= op.k) continue;
            ptx::atomic_or(part<uint32_t>(at.mask) + column / 32, 1u << (column % 32));
        }
        ptx::sync_block();
    }

    // Sixteen elements of X with the outlier columns zero.
    QPIPE_DEVICE Sixteen load(int row, int column) const {
        const T* line = static_cast<const T*>(op.x) + static_cast<int64_t>(row) * op.k;
        Sixteen e = load_sixteen(line, column, op.k, reinterpret_cast<uintptr_t>(line) % 16 == 0);
        const uint32_t masked = part<uint32_t>(at.mask)[column / 32] >> (column % 32);
        QPIPE_UNROLL
        for (int i = 0; i < kElements; ++i) e.v[i] = (masked >> i & 1) ? 0.0f : e.v[i];
        return e;
    }

    // Codes and scales of all rows; every warp works on one row, or on a part of one.
    QPIPE_DEVICE void quantize() const {
        const int warp = ptx::thread() / 32, lane = ptx::thread() % 32;
        const int parts = kSmallWarps / rows, row = warp % rows;
        const int start = warp < parts * rows ? (warp / rows * 32 + lane) * kElements : op.k_padded;
        const int step = parts * 32 * kElements;
        RowFacts* facts = part<RowFacts>(at.facts) + row;
        RowFacts mine{0, 0, 0};
        for (int c = start; c < op.k_padded; c += step) observe(mine, load(row, c), op.limit);
        fold_facts(facts, mine, op.limit);
        ptx::sync_block();
        const RowRule rule = row_rule(*facts, op.limit);
        const HighDigits high{part<uint32_t>(at.high_count) + row,
                              part<int32_t>(at.high_column) + row * kMostNewOutliers,
                              part<int32_t>(at.high_digit) + row * kMostNewOutliers};
        for (int c = start; c < op.k_padded; c += step) {
            *part<Bytes16>(row * at.pitch + c) = encode(load(row, c), c, rule, high);
        }
        if (warp < rows && lane == 0) {
            part<float>(at.scale)[row] = rule.scale.scale;
            if (ptx::block() == 0 && op.new_outliers != nullptr && facts->met != 0) {
                ptx::atomic_add<unsigned long long>(op.new_outliers, facts->met);
            }
        }
        ptx::sync_block();
    }
};

// A warp's share of the weight stream: runs of 256 bytes of sixteen rows, tile after tile.
struct WeightStream {
    const Operands& op;
    int runs;  // per warp and tile

    struct Run {
        Bytes16 low[kRunChunks], high[kRunChunks];  // rows g and g + 8 of the tile
    };

    QPIPE_DEVICE int byte(int run, int chunk) const {
        return (run * kSmallWarps + ptx::thread() / 32) * kRunBytes + chunk * 64 + ptx::thread() % 4 * kChunkBytes;
    }

    QPIPE_DEVICE Run load(int64_t tile, int run) const {
        const int64_t row = tile * kSmallColumns + ptx::thread() % 32 / 4;
        Run w;
        QPIPE_UNROLL
        for (int c = 0; c < kRunChunks; ++c) {
            const bool inside = byte(run, c) < op.k_padded;
            const int8_t* source = op.w_codes + row * op.k_padded + byte(run, c);
            w.low[c] = inside && row < op.n ? ptx::load_streaming(source) : Bytes16{};
            w.high[c] = inside && row + 8 < op.n ? ptx::load_streaming(source + int64_t{8} * op.k_padded) : Bytes16{};
        }
        return w;
    }
};

// sums[16 columns x 8 rows] += one run of W times the codes of X.
template <class T>
QPIPE_DEVICE void multiply_run(int32_t (&sums)[4], const WeightStream::Run& w, const WeightStream& stream, int run,
                               const SmallBlock<T>& block) {
    const int row = ptx::thread() % 32 / 4;
    QPIPE_UNROLL
    for (int c = 0; c < kRunChunks; ++c) {
        const int byte = stream.byte(run, c);
        const bool inside = row < block.rows && byte < block.op.k_padded;
        const Bytes16 x = inside ? *block.template part<Bytes16>(row * block.at.pitch + byte) : Bytes16{};
        QPIPE_UNROLL
        for (int s = 0; s < 4; s += 2) {
            const uint32_t a[4] = {w.low[c].word[s], w.high[c].word[s], w.low[c].word[s + 1], w.high[c].word[s + 1]};
            Int8Step::multiply(sums, a, x.word[s], x.word[s + 1]);
        }
    }
}

// One warp: the outlier product of sixteen columns, 8 bytes of K per thread and step.
template <class T>
QPIPE_DEVICE void multiply_small_outliers(float (&y)[4], int64_t first_column, const SmallBlock<T>& block) {
    const Operands& op = block.op;
    const int lane = ptx::thread() % 32, line = op.o_padded * static_cast<int>(sizeof(T));
    const int64_t column = first_column + lane / 4;
    const auto* w = static_cast<const unsigned char*>(op.w_outlier) + column * line + lane % 4 * 8;
    const unsigned char* x = block.shared + block.at.outliers + lane / 4 * line + lane % 4 * 8;
    for (int byte = 0; byte < line; byte += kStepBytes) {
        const Bytes8 low = column < op.n ? *reinterpret_cast<const Bytes8*>(w + byte) : Bytes8{};
        const Bytes8 high = column + 8 < op.n ? *reinterpret_cast<const Bytes8*>(w + 8 * line + byte) : Bytes8{};
        const auto* b = reinterpret_cast<const Bytes8*>(x + byte);
        const uint32_t a[4] = {low.word[0], high.word[0], low.word[1], high.word[1]};
        FloatStep<T>::multiply(y, a, b->word[0], b->word[1]);
    }
}

// One warp finishes a tile: sums of all warps, new outliers, scales, outlier product, bias, store.
template <class T>
QPIPE_DEVICE void finish_small_tile(int64_t tile, const Bytes16* partials, const SmallBlock<T>& block) {
    const Operands& op = block.op;
    const int lane = ptx::thread() % 32;
    int32_t sums[4] = {};
    QPIPE_UNROLL
    for (int warp = 0; warp < kSmallWarps; ++warp) {
        const Bytes16 v = partials[warp * 32 + lane];
        QPIPE_UNROLL
        for (int r = 0; r < 4; ++r) sums[r] += static_cast<int32_t>(v.word[r]);
    }
    float y[4];
    QPIPE_UNROLL
    for (int r = 0; r < 4; ++r) {
        const int64_t column = tile * kSmallColumns + accumulator_row(lane, r);
        const int row = accumulator_column(lane, r);
        const bool inside = column < op.n && row < block.rows;
        const uint32_t digits = inside ? block.template part<uint32_t>(block.at.high_count)[row] : 0;
        for (uint32_t e = 0; e < digits; ++e) {
            const int at = row * kMostNewOutliers + static_cast<int>(e);
            sums[r] += block.template part<int32_t>(block.at.high_digit)[at] * 128 *
                       op.w_codes[column * op.k_padded + block.template part<int32_t>(block.at.high_column)[at]];
        }
        y[r] = static_cast<float>(sums[r]) * (inside ? op.w_scale[column] : 0.0f) *
               block.template part<float>(block.at.scale)[row];
    }
    multiply_small_outliers(y, tile * kSmallColumns, block);
    QPIPE_UNROLL
    for (int r = 0; r < 4; ++r) {
        const int64_t column = tile * kSmallColumns + accumulator_row(lane, r);
        const int64_t row = accumulator_column(lane, r);
        if (column >= op.n || row >= block.rows) continue;
        if (op.bias != nullptr) y[r] += op.bias[column];
        static_cast<T*>(op.y)[row * op.n + column] = from_float<T>(y[r]);
    }
}

template <class T>
__global__ void __launch_bounds__(kSmallThreads, 2) small_m_kernel(const __grid_constant__ Operands op) {
    const int rows = static_cast<int>(op.m);
    const SmallBlock<T> block{op, small_layout(rows, op.k_padded, op.o_padded, static_cast<int>(sizeof(T))),
                              ptx::shared_memory(), rows};
    const int64_t tiles = ceil_div<int64_t>(op.n, kSmallColumns);
    const WeightStream stream{op, ceil_div(ceil_div(op.k_padded, kRunBytes), kSmallWarps)};
    WeightStream::Run next = stream.load(ptx::block(), 0);
    block.gather_outliers();
    block.quantize();

    int turn = 0;
    for (int64_t tile = ptx::block(); tile < tiles; tile += ptx::blocks(), ++turn) {
        int32_t sums[4] = {};
        for (int run = 0; run < stream.runs; ++run) {
            const WeightStream::Run w = next;
            const bool last = run + 1 == stream.runs;
            next = stream.load(last ? tile + ptx::blocks() : tile, last ? 0 : run + 1);
            multiply_run(sums, w, stream, run, block);
        }
        // Two sets of slots in turn: a warp may write the next tile's sums while another still reads this one's.
        Bytes16* partials = block.template part<Bytes16>(block.at.partials) + turn % 2 * kSmallThreads;
        Bytes16 v;
        QPIPE_UNROLL
        for (int r = 0; r < 4; ++r) v.word[r] = static_cast<uint32_t>(sums[r]);
        partials[ptx::thread()] = v;
        ptx::sync_block();
        if (ptx::thread() / 32 == turn % kSmallWarps) finish_small_tile(tile, partials, block);
    }
}

}  // namespace qpipe
