// From integer sums to Y: new-outlier digits, scales, bias, conversion, store. The outlier product is added between
// `scale_sums` and `add_bias` by the kernel's own tensor-core steps, into the same registers.
//
// A thread's accumulators are one flat array: register r of the 16 x 8 block (i, j) is number (i * kNt + j) * 4 + r.
#pragma once

#include "layout.cuh"
#include "args.cuh"
#include "steps.cuh"

namespace qpipe {

// Where the accumulators of one warp lie: 16 * kMt rows and 8 * kNt columns of Y from (row, column) on, of which the
// warp finishes the column groups [first_group, last_group).
struct WarpTile {
    int64_t row;
    int64_t column;
    int first_group;
    int last_group;

    QPIPE_DEVICE bool owns(int group) const { return group >= first_group && group < last_group; }
};

template <int kNt>
QPIPE_DEVICE constexpr int flat(int i, int j, int r) {
    return (i * kNt + j) * 4 + r;
}

// Add 128 * high digit * weight for every new outlier of the warp's rows. Rare, hence not fast: at most 64 of them per
// row, gathered from the weight, column pair by column pair so that it takes no registers from the main loop.
template <int kMt, int kNt, class A>
QPIPE_DEVICE void add_high_digits(A (&sums)[kMt * kNt * 4], const WarpTile& tile, const Operands& op,
                                  const QuantizedRows& rows) {
    const int lane = ptx::thread() % 32;
    QPIPE_UNROLL
    for (int j = 0; j < kNt; ++j) {
        const int64_t column = tile.column + j * 8 + accumulator_column(lane, 0);
        if (!tile.owns(j) || column >= op.n) continue;
        const int8_t* w = op.w_codes + column * op.k_padded;
        const int next = column + 1 < op.n ? op.k_padded : 0;  // an odd N's last pair reads the same column twice
        QPIPE_UNROLL
        for (int half = 0; half < kMt * 2; ++half) {
            const int64_t row = tile.row + accumulator_row(lane, (half & 1) * 2) + (half >> 1) * 16;
            const int count = row < op.m ? rows.high_count[row] : 0;
            const int32_t* at = rows.high_column + row * kMostNewOutliers;
            const int32_t* digit = rows.high_digit + row * kMostNewOutliers;
            A* pair = sums + flat<kNt>(half >> 1, j, (half & 1) * 2);
            QPIPE_NO_UNROLL
            for (int e = 0; e < count; ++e) {
                pair[0] += static_cast<A>(digit[e] * 128 * w[at[e]]);
                pair[1] += static_cast<A>(digit[e] * 128 * w[at[e] + next]);
            }
        }
    }
}

// y = float(sum) * column scale * row scale, register by register: sums and y may share registers. The column scale comes
// first, since a sum times a large row scale could overflow although the result does not.
template <int kMt, int kNt, class A>
QPIPE_DEVICE void scale_sums(float (&y)[kMt * kNt * 4], const A (&sums)[kMt * kNt * 4], const WarpTile& tile,
                             const Operands& op, const float* row_scales) {
    const int lane = ptx::thread() % 32;
    float of_row[kMt * 2];
    QPIPE_UNROLL
    for (int half = 0; half < kMt * 2; ++half) {
        const int64_t row = tile.row + accumulator_row(lane, (half & 1) * 2) + (half >> 1) * 16;
        of_row[half] = row < op.m ? row_scales[row] : 0.0f;
    }
    QPIPE_UNROLL
    for (int j = 0; j < kNt; ++j) {
        QPIPE_UNROLL
        for (int c = 0; c < 2; ++c) {
            const int64_t column = tile.column + j * 8 + accumulator_column(lane, c);
            const float of_column = column < op.n ? op.w_scale[column] : 0.0f;
            QPIPE_UNROLL
            for (int half = 0; half < kMt * 2; ++half) {
                const int at = flat<kNt>(half >> 1, j, (half & 1) * 2 + c);
                y[at] = static_cast<float>(sums[at]) * of_column * of_row[half];
            }
        }
    }
}

template <int kMt, int kNt>
QPIPE_DEVICE void add_bias(float (&y)[kMt * kNt * 4], const WarpTile& tile, const Operands& op) {
    if (op.bias == nullptr) return;
    const int lane = ptx::thread() % 32;
    QPIPE_UNROLL
    for (int j = 0; j < kNt; ++j) {
        QPIPE_UNROLL
        for (int c = 0; c < 2; ++c) {
            const int64_t column = tile.column + j * 8 + accumulator_column(lane, c);
            const float bias = column < op.n ? op.bias[column] : 0.0f;
            QPIPE_UNROLL
            for (int half = 0; half < kMt * 2; ++half) y[flat<kNt>(half >> 1, j, (half & 1) * 2 + c)] += bias;
        }
    }
}

// Transpose a 4 x 4 matrix of words over the four lanes of a quad: afterwards lane t holds word t of lanes 0 .. 3.
QPIPE_DEVICE void transpose_quad(uint32_t (&w)[4]) {
    const int lane = ptx::thread() % 32;
    QPIPE_UNROLL
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = lane & bit;
        QPIPE_UNROLL
        for (int low = 0; low < 4; ++low) {
            if (low & bit) continue;
            const uint32_t received = ptx::shuffle_xor(upper ? w[low] : w[low | bit], bit);
            w[low] = upper ? received : w[low];
            w[low | bit] = upper ? w[low | bit] : received;
        }
    }
}

// Whether rows of Y can be written `bytes` at a time from every multiple of 8 columns on; a caller may bind any memory.
template <class T>
QPIPE_DEVICE bool whole_stores(const Operands& op, int bytes) {
    return (op.n * static_cast<int64_t>(sizeof(T)) | static_cast<int64_t>(reinterpret_cast<uintptr_t>(op.y))) % bytes == 0;
}

// 16-bit types: four column groups at a time change places within a quad, so that each lane stores 16 bytes.
template <class T, int kNt>
QPIPE_DEVICE void store_half_rows(const float* y, int half, const WarpTile& tile, const Operands& op, int64_t row) {
    static_assert(kNt % 4 == 0, "column groups are stored four at a time");
    const int quad_lane = ptx::thread() % 4;
    T* line = static_cast<T*>(op.y) + row * op.n;
    QPIPE_UNROLL
    for (int block = 0; block < kNt; block += 4) {
        uint32_t words[4];
        QPIPE_UNROLL
        for (int g = 0; g < 4; ++g) {
            const float* pair = y + flat<kNt>(half >> 1, block + g, (half & 1) * 2);
            words[g] = pack_pair<T>(pair[0], pair[1]);
        }
        transpose_quad(words);
        const int64_t column = tile.column + (block + quad_lane) * 8;
        if (row >= op.m || !tile.owns(block + quad_lane)) continue;
        if (whole_stores<T>(op, 16)) {
            if (column < op.n) *reinterpret_cast<Bytes16*>(line + column) = {{words[0], words[1], words[2], words[3]}};
            continue;
        }
        QPIPE_UNROLL
        for (int e = 0; e < 8; ++e) {
            if (column + e < op.n) line[column + e] = T{static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16))};
        }
    }
}

// float32: a lane's two neighbouring columns at once; a quad fills one 32-byte sector.
template <int kNt>
QPIPE_DEVICE void store_float_rows(const float* y, int half, const WarpTile& tile, const Operands& op, int64_t row) {
    const int lane = ptx::thread() % 32;
    if (row >= op.m) return;
    float* line = static_cast<float*>(op.y) + row * op.n;
    QPIPE_UNROLL
    for (int j = 0; j < kNt; ++j) {
        if (!tile.owns(j)) continue;
        const float* pair = y + flat<kNt>(half >> 1, j, (half & 1) * 2);
        const int64_t column = tile.column + j * 8 + accumulator_column(lane, 0);
        if (whole_stores<float>(op, 8)) {
            if (column < op.n) *reinterpret_cast<Bytes8*>(line + column) = {{ptx::float_bits(pair[0]), ptx::float_bits(pair[1])}};
            continue;
        }
        if (column < op.n) line[column] = pair[0];
        if (column + 1 < op.n) line[column + 1] = pair[1];
    }
}

template <class T, int kMt, int kNt>
QPIPE_DEVICE void store_tile(const float (&y)[kMt * kNt * 4], const WarpTile& tile, const Operands& op) {
    const int lane = ptx::thread() % 32;
    QPIPE_UNROLL
    for (int half = 0; half < kMt * 2; ++half) {
        const int64_t row = tile.row + accumulator_row(lane, (half & 1) * 2) + (half >> 1) * 16;
        if constexpr (sizeof(T) == 2) {
            store_half_rows<T, kNt>(y, half, tile, op, row);
        } else {
            store_float_rows<kNt>(y, half, tile, op, row);
        }
    }
}

}  // namespace qpipe
