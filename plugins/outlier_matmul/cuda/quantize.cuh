// Kernel 1: quantize the rows of X, one block per row, one read of X.
//
// The row is copied into shared memory as it is. There the outlier columns are gathered and set to zero, which both
// keeps them out of the amplitude and makes their codes 0.
#pragma once

#include "row_codes.cuh"

namespace qpipe {

constexpr int kQuantizeThreads = 256;

template <class T>
constexpr size_t quantize_shared_bytes(int k_padded) {
    return round_up(k_padded * sizeof(T), sizeof(Bytes16)) + 2 * sizeof(Bytes16);
}

// Copy a row of `k` elements to `row`, padded with zeros to `k_padded`.
template <class T>
QPIPE_DEVICE void stash_row(T* row, const T* x, int k, int k_padded) {
    constexpr int kPerCopy = 16 / static_cast<int>(sizeof(T));
    const bool vectors = reinterpret_cast<uintptr_t>(x) % 16 == 0;
    const int copied = vectors ? k / kPerCopy * kPerCopy : 0;
    for (int i = ptx::thread() * kPerCopy; i < copied; i += ptx::threads() * kPerCopy) {
        ptx::copy_async16(ptx::shared_address(row + i), x + i, true);
    }
    ptx::copy_async_commit();
    for (int i = copied + ptx::thread(); i < k_padded; i += ptx::threads()) row[i] = i < k ? x[i] : T{};
    ptx::copy_async_wait<0>();
}

// Write the outlier columns of the row to `outliers` [Op] and set them to zero in the row.
template <class T>
QPIPE_DEVICE void move_outliers(T* row, T* outliers, const Operands& op) {
    for (int i = ptx::thread(); i < op.o_padded; i += ptx::threads()) {
        T value{};
        const int column = i < op.o ? op.outlier_index[i] : -1;
        if (column >= 0 && column < op.k) {
            value = row[column];
            row[column] = T{};
        }
        outliers[i] = value;
    }
}

template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows_kernel(const __grid_constant__ Operands op,
                                                                         const __grid_constant__ QuantizedRows out) {
    ptx::let_next_grid_start();
    const int64_t row_number = ptx::block();
    T* row = reinterpret_cast<T*>(ptx::shared_memory());
    auto* facts = reinterpret_cast<RowFacts*>(ptx::shared_memory() +
                                              round_up(op.k_padded * sizeof(T), sizeof(Bytes16)));
    auto* high_count = reinterpret_cast<uint32_t*>(facts + 1);
    if (ptx::thread() == 0) {
        *facts = {0, 0, 0};
        *high_count = 0;
    }
    stash_row(row, static_cast<const T*>(op.x) + row_number * op.k, op.k, op.k_padded);
    ptx::sync_block();
    move_outliers(row, static_cast<T*>(out.outliers) + row_number * op.o_padded, op);
    ptx::sync_block();

    RowFacts mine{0, 0, 0};
    for (int c = ptx::thread() * kElements; c < op.k_padded; c += ptx::threads() * kElements) {
        observe(mine, load_sixteen(row, c, op.k_padded, true), op.limit);
    }
    fold_facts(facts, mine, op.limit);
    ptx::sync_block();

    const RowRule rule = row_rule(*facts, op.limit);
    HighDigits high{high_count, nullptr, nullptr};
    if (op.limit > 0) {
        high.column = out.high_column + row_number * kMostNewOutliers;
        high.digit = out.high_digit + row_number * kMostNewOutliers;
    }
    auto* codes = reinterpret_cast<Bytes16*>(out.codes + row_number * op.k_padded);
    for (int c = ptx::thread() * kElements; c < op.k_padded; c += ptx::threads() * kElements) {
        codes[c / kElements] = encode(load_sixteen(row, c, op.k_padded, true), c, rule, high);
    }
    if (ptx::thread() == 0) {
        out.scale[row_number] = rule.scale.scale;
        if (op.new_outliers != nullptr && facts->met != 0) ptx::atomic_add<unsigned long long>(op.new_outliers, facts->met);
    }
    if (op.limit > 0) {
        ptx::sync_block();
        if (ptx::thread() == 0) out.high_count[row_number] = static_cast<int32_t>(*high_count);
    }
}

}  // namespace qpipe
