#include "contract.h"

namespace qpipe::outlier_matmul {
namespace {

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// One dimension of an inferred shape: a number, or a name (possibly empty) where it is not known.
struct Dimension {
    int64_t extent;
    const char* symbol;
};

OrtStatus* input_dimensions(const OrtShapeInferContext* context, size_t index, std::vector<Dimension>& out) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    QPIPE_RETURN_IF(api().ShapeInferContext_GetInputTypeShape(context, index, &info));
    size_t rank = 0;
    QPIPE_RETURN_IF(api().GetDimensionsCount(info, &rank));
    std::vector<int64_t> extents(rank);
    std::vector<const char*> symbols(rank);
    QPIPE_RETURN_IF(api().GetDimensions(info, extents.data(), rank));
    QPIPE_RETURN_IF(api().GetSymbolicDimensions(info, symbols.data(), rank));
    for (size_t i = 0; i < rank; ++i) out.push_back({extents[i], symbols[i]});
    return nullptr;
}

OrtStatus* set_output(OrtShapeInferContext* context, size_t index, ONNXTensorElementDataType type,
                      const std::vector<Dimension>& dimensions) {
    std::vector<int64_t> extents;
    std::vector<const char*> symbols;
    for (const Dimension& dimension : dimensions) {
        extents.push_back(dimension.extent);
        symbols.push_back(dimension.symbol == nullptr ? "" : dimension.symbol);
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    QPIPE_RETURN_IF(api().CreateTensorTypeAndShapeInfo(&info));
    std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
        info, [](OrtTensorTypeAndShapeInfo* p) { api().ReleaseTensorTypeAndShapeInfo(p); });
    QPIPE_RETURN_IF(api().SetTensorElementType(info, type));
    QPIPE_RETURN_IF(api().SetDimensions(info, extents.data(), extents.size()));
    QPIPE_RETURN_IF(api().SetSymbolicDimensions(info, symbols.data(), symbols.size()));
    return api().ShapeInferContext_SetOutputTypeShape(context, index, info);
}

ONNXTensorElementDataType input_type(const OrtShapeInferContext* context, size_t index) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (OrtStatus* status = api().ShapeInferContext_GetInputTypeShape(context, index, &info)) {
        api().ReleaseStatus(status);
    } else if (OrtStatus* failed = api().GetTensorElementType(info, &type)) {
        api().ReleaseStatus(failed);
    }
    return type;
}

}  // namespace

std::vector<Port> input_ports(ONNXTensorElementDataType x_type) {
    return {{x_type},
            {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
            {kFloat},
            {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
            {x_type},
            {kFloat, /*optional=*/true}};
}

std::vector<Port> output_ports(ONNXTensorElementDataType x_type) {
    return {{x_type}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, /*optional=*/true}};
}

OrtStatus* infer_output_shape(OrtShapeInferContext* context) {
    std::vector<Dimension> x, w;
    QPIPE_RETURN_IF(input_dimensions(context, kX, x));
    QPIPE_RETURN_IF(input_dimensions(context, kWq, w));
    // Nothing is known about X's rank, or the weight is malformed: compute will say so.
    if (x.empty() || w.size() != 2) return nullptr;
    x.back() = w[0];
    return set_output(context, kY, input_type(context, kX), x);
}

OrtStatus* read_attributes(const OrtKernelInfo* info, Attributes& attributes) {
    QPIPE_RETURN_IF(attribute(info, "limit", 0.0f, attributes.limit));
    QPIPE_RETURN_IF(attribute(info, "padding", static_cast<int64_t>(16), attributes.padding));
    if (!(attributes.limit >= 0)) return fail("OutlierMatMul: limit is %g, expected 0 or more", attributes.limit);
    if (attributes.padding < 16 || attributes.padding % 16 != 0) {
        return fail("OutlierMatMul: padding is %lld, expected a multiple of 16",
                    static_cast<long long>(attributes.padding));
    }
    return nullptr;
}

OrtStatus* read_inputs(const OrtKernelContext* context, const Attributes& attributes, Tensor (&in)[6],
                       Extents& extents) {
    for (size_t i = 0; i < 6; ++i) QPIPE_RETURN_IF(input(context, i, in[i]));
    if (in[kX].rank() < 1) return fail("OutlierMatMul: x is a scalar, expected [.., K]");
    if (in[kWq].rank() != 2 || in[kWOutlier].rank() != 2) return fail("OutlierMatMul: w_q and w_outlier need rank 2");
    extents.inputs = in[kX].shape.back();
    extents.rows = 1;
    for (size_t i = 0; i + 1 < in[kX].shape.size(); ++i) extents.rows *= in[kX].shape[i];
    extents.outputs = in[kWq].shape[0];
    extents.outliers = in[kOutlierIndex].size();
    extents.inputs_padded = in[kWq].shape[1];
    extents.outliers_padded = in[kWOutlier].shape[1];
    if (extents.inputs_padded != round_up(extents.inputs, attributes.padding)) {
        return fail("OutlierMatMul: x has %lld columns, w_q has %lld, expected %lld (padded to %lld)",
                    static_cast<long long>(extents.inputs), static_cast<long long>(extents.inputs_padded),
                    static_cast<long long>(round_up(extents.inputs, attributes.padding)),
                    static_cast<long long>(attributes.padding));
    }
    if (extents.outliers_padded != round_up(extents.outliers, attributes.padding)) {
        return fail("OutlierMatMul: outlier_index has %lld entries, w_outlier has %lld columns",
                    static_cast<long long>(extents.outliers), static_cast<long long>(extents.outliers_padded));
    }
    if (in[kWScale].size() != extents.outputs || in[kWOutlier].shape[0] != extents.outputs ||
        (in[kBias].data != nullptr && in[kBias].size() != extents.outputs)) {
        return fail("OutlierMatMul: w_scale, w_outlier and bias need %lld rows, as w_q has",
                    static_cast<long long>(extents.outputs));
    }
    return nullptr;
}

std::vector<int64_t> output_shape(const Tensor& x, const Extents& extents) {
    std::vector<int64_t> shape = x.shape;
    shape.back() = extents.outputs;
    return shape;
}

}  // namespace qpipe::outlier_matmul
