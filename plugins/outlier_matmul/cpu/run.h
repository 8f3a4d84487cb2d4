// One call of OutlierMatMul on the CPU: quantize the rows of X, then tiles of Y, each with its epilogue.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "../contract.h"
#include "lanes.h"

namespace qpipe::outlier_matmul {

// Memory that begins with a cache line: a vector of 64 bytes, or a row of a tile, then never lies in two.
template <class T>
struct CacheLines {
    using value_type = T;
    static constexpr std::align_val_t kLine{64};

    CacheLines() = default;
    template <class U>
    CacheLines(const CacheLines<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
    void deallocate(T* data, size_t) { ::operator delete(data, kLine); }
    template <class U>
    bool operator==(const CacheLines<U>&) const { return true; }
    template <class U>
    bool operator!=(const CacheLines<U>&) const { return false; }
};
template <class T>
using Lines = std::vector<T, CacheLines<T>>;

// Constant inputs in the form that the lane reads. Arrays over columns are padded to a multiple of 16.
//
// Outlier columns take no part in the integer product: it has R regular inputs, which gains back a part of what the O
// columns cost in floating point.
struct Weights {
    std::vector<int32_t> outlier_index;  // [O]
    std::vector<int32_t> regular;        // [R] the other inputs, ascending; those of w_q's padding are among them
    std::vector<uint8_t> keep;           // a bit per input, set for the regular ones
    Lines<float> w_scale;                // [N]
    Lines<float> w_outlier;              // [N / 16][O][16], float32
    Lines<float> no_bias;                // [N] zeros
    Lines<int8_t> strips;                // [N / 16][quads][16][4]; see lanes.h
    Lines<int32_t> order;                // [N / 16][quads]
    Lines<int32_t> safe;                 // [N / 16]
    Lines<int32_t> correction;           // [N]
    int64_t columns = 0;                 // N padded
    int64_t depth = 0;                   // R padded as the lane wants it
};

Weights prepare(const Tensor (&in)[6], const Extents& extents, ElementType type, const Lane& lane);

// The second digit of a new outlier: x / scale = 128 * high + code.
struct HighDigit {
    int64_t k;
    int32_t high;
};

struct Run {
    const Lane& lane;
    ElementType type;
    float limit;
    Extents extents;
    const Weights& weights;
    const void* x;
    const int8_t* w_q;
    const float* bias;  // [N padded]
    void* y;

    // Scratch, laid out by `scratch_bytes` and `use_scratch`.
    uint8_t* q = nullptr;          // codes [M, q_stride]
    float* x_scale = nullptr;      // [M]
    float* x_outlier = nullptr;    // [M, O]
    float* row_buffer = nullptr;   // [quantize tasks, K]
    std::vector<std::vector<HighDigit>> wide{};  // per row, only with a limit
    std::atomic<int64_t> new_outliers{0};

    size_t scratch_bytes() const;
    void use_scratch(void* scratch);
    // Everything, on ONNX Runtime's thread pool.
    OrtStatus* execute(const OrtKernelContext* context);

  private:
    int64_t q_stride() const;
    int64_t quantize_tasks() const;
    int64_t strips_per_task() const;
    int64_t column_tasks() const;
    int64_t row_tasks() const;
    void quantize_task(size_t task);
    void quantize_row(int64_t m, float* buffer);
    float quantize_with_new_outliers(int64_t m, float* row, int64_t count, uint32_t amax_bits);
    void multiply_task(size_t task);
    void multiply_tile(int64_t strip, int64_t strips, int64_t m0, int64_t rows);
    void add_high_digits(int64_t m, int64_t n0, int64_t columns, int32_t* sums) const;
};

}  // namespace qpipe::outlier_matmul
