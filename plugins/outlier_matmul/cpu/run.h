// One call of OutlierMatMul on the CPU: quantize the rows of X, then tiles of Y, each with its epilogue.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <vector>

#include "../contract.h"
#include "weights.h"

namespace qpipe::outlier_matmul {

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

    // Rows and strips of a task of the product.
    struct Cut {
        int64_t rows, strips;
    };
    Cut tasks{};
    int64_t first_row = 0, rows = 0;  // the block of rows at hand; rows below are counted from its first

    // Scratch, laid out by `scratch_bytes` and `use_scratch`.
    uint8_t* q = nullptr;          // codes [M, q_stride], in all forms where the lane wants them
    float* x_scale = nullptr;      // [M]
    float* x_outlier = nullptr;    // [M, O]
    float* row_buffer = nullptr;   // [quantize tasks, K padded]
    std::vector<std::vector<HighDigit>> wide{};  // per row, only with a limit
    std::atomic<int64_t> new_outliers{0};

    size_t scratch_bytes() const;
    void use_scratch(void* scratch);
    // Everything, on ONNX Runtime's thread pool.
    OrtStatus* execute(const OrtKernelContext* context);

  private:
    int64_t q_stride() const;
    int64_t most_rows() const;
    OrtStatus* execute_block(const OrtKernelContext* context);
    int64_t buffer_stride() const;
    int64_t quantize_tasks() const;
    Cut cut() const;
    void quantize_task(size_t task);
    void quantize_row(int64_t m, float* buffer);
    float quantize_with_new_outliers(int64_t m, float* row, int64_t count, uint32_t amax_bits, uint8_t* codes);
    void multiply_task(size_t task);
    void multiply_tile(int64_t strip, int64_t strips, int64_t m0, int64_t height);
    void add_high_digits(int64_t m, int64_t n0, int64_t columns, int32_t* sums) const;
};

}  // namespace qpipe::outlier_matmul
