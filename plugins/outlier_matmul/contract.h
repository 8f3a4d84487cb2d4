// What every OutlierMatMul kernel, CPU or CUDA, shares: ports, checks, constants. The contract itself: contract.py.
#pragma once

#include "../common/ort_op.h"

namespace qpipe::outlier_matmul {

constexpr const char* kName = "OutlierMatMul";
constexpr float kOneDigit = 127.0f;
constexpr float kTwoDigits = 127.0f * 128.0f + 63.0f;
constexpr float kSmallestScale = 0x1p-126f;
constexpr int64_t kMaxNewOutliers = 64;

enum Input : size_t { kX, kWq, kWScale, kOutlierIndex, kWOutlier, kBias };
enum Output : size_t { kY, kNewOutliers };

struct Attributes {
    float limit;      // 0: new outliers are not looked for
    int64_t padding;  // K and O are padded to a multiple of it
};

// Extents of one call.
struct Extents {
    int64_t rows, inputs, outputs, outliers;  // M, K, N, O
    int64_t inputs_padded, outliers_padded;   // Kp, Op
};

std::vector<Port> input_ports(ONNXTensorElementDataType x_type);
std::vector<Port> output_ports(ONNXTensorElementDataType x_type);
OrtStatus* infer_output_shape(OrtShapeInferContext* context);
OrtStatus* read_attributes(const OrtKernelInfo* info, Attributes& attributes);
// Read all six inputs and check that their shapes fit together.
OrtStatus* read_inputs(const OrtKernelContext* context, const Attributes& attributes, Tensor (&in)[6], Extents& extents);
// Shape of y: x's, its last dimension replaced by N.
std::vector<int64_t> output_shape(const Tensor& x, const Extents& extents);

}  // namespace qpipe::outlier_matmul
