// One call of OutlierMatMul on the device, as every kernel sees it. Letters as in contract.py.
#pragma once

#include "numeric.cuh"

namespace qpipe {

// Operands, all on the device; the element type of x, w_outlier and y is the kernel's template argument.
struct Operands {
    const void* x;                 // [M, K]
    const int8_t* w_codes;         // [N, Kp]
    const float* w_scale;          // [N]
    const int32_t* outlier_index;  // [O]
    const void* w_outlier;         // [N, Op]
    const float* bias;             // [N] or null
    void* y;                       // [M, N]
    unsigned long long* new_outliers;  // one counter, or null
    int64_t m, n;
    int k, k_padded, o, o_padded;
    float limit;                   // 0: no search for new outliers
};

// What the row quantization leaves for the matrix product, in scratch memory.
struct QuantizedRows {
    int8_t* codes;         // [M, Kp], the low digits
    float* scale;          // [M]
    void* outliers;        // T [M, Op]
    int32_t* high_count;   // [M]; null when limit is 0, like the two below
    int32_t* high_column;  // [M, 64]
    int32_t* high_digit;   // [M, 64]
};

struct ScratchLayout {
    size_t scale, outliers, high_count, high_column, high_digit;  // offsets; codes are at 0
    size_t bytes;
};

inline ScratchLayout scratch_layout(const Operands& op, size_t element_bytes) {
    constexpr size_t kAlign = 256;
    const size_t rows = static_cast<size_t>(op.m);
    const size_t high_rows = op.limit > 0 ? rows : 0;
    ScratchLayout at{};
    at.scale = round_up(rows * op.k_padded, kAlign);
    at.outliers = round_up(at.scale + rows * sizeof(float), kAlign);
    at.high_count = round_up(at.outliers + rows * op.o_padded * element_bytes, kAlign);
    at.high_column = round_up(at.high_count + high_rows * sizeof(int32_t), kAlign);
    at.high_digit = at.high_column + high_rows * kMostNewOutliers * sizeof(int32_t);
    at.bytes = at.high_digit + high_rows * kMostNewOutliers * sizeof(int32_t);
    return at;
}

inline QuantizedRows place_rows(const Operands& op, const ScratchLayout& at, void* scratch) {
    char* base = static_cast<char*>(scratch);
    const bool high = op.limit > 0;
    auto ints = [&](size_t offset) { return high ? reinterpret_cast<int32_t*>(base + offset) : nullptr; };
    return {reinterpret_cast<int8_t*>(base), reinterpret_cast<float*>(base + at.scale), base + at.outliers,
            ints(at.high_count), ints(at.high_column), ints(at.high_digit)};
}

}  // namespace qpipe
