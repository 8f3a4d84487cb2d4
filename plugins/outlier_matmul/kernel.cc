// OutlierMatMul on the CPU: one operator per element type, one Kernel per node.
#include <algorithm>
#include <cstdlib>

#include "contract.h"
#include "cpu/lanes.h"
#include "cpu/run.h"

namespace qpipe::outlier_matmul {
namespace {

constexpr const char* kProvider = "CPUExecutionProvider";

// Memory of one run, from ONNX Runtime's arena.
class Scratch {
  public:
    OrtStatus* take(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes) {
        QPIPE_RETURN_IF(api().KernelContext_GetAllocator(context, memory, &allocator_));
        return api().AllocatorAlloc(allocator_, bytes, &data_);
    }
    ~Scratch() {
        if (data_ != nullptr) api().ReleaseStatus(api().AllocatorFree(allocator_, data_));
        if (allocator_ != nullptr) api().ReleaseAllocator(allocator_);
    }
    void* data() const { return data_; }

  private:
    OrtAllocator* allocator_ = nullptr;
    void* data_ = nullptr;
};

class CpuKernel : public Kernel {
  public:
    explicit CpuKernel(ElementType type) : type_(type) {}
    ~CpuKernel() override {
        if (memory_ != nullptr) api().ReleaseMemoryInfo(memory_);
    }

    OrtStatus* initialize(const OrtKernelInfo* info) {
        QPIPE_RETURN_IF(read_attributes(info, attributes_));
        lane_ = choose_lane();
        if (lane_ == nullptr) return fail("QPIPE_LANE=%s: this CPU or build has no such lane", std::getenv("QPIPE_LANE"));
        QPIPE_RETURN_IF(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
        return prepare_constants(info);
    }

    OrtStatus* compute(OrtKernelContext* context) override {
        Tensor in[6];
        Extents extents{};
        QPIPE_RETURN_IF(read_inputs(context, attributes_, in, extents));
        void* y = nullptr;
        void* counter = nullptr;
        QPIPE_RETURN_IF(output(context, kY, output_shape(in[kX], extents), y));
        QPIPE_RETURN_IF(output(context, kNewOutliers, {}, counter));
        int64_t met = 0;
        if (extents.rows > 0 && extents.outputs > 0) QPIPE_RETURN_IF(run(context, in, extents, y, met));
        if (counter != nullptr) *static_cast<int64_t*>(counter) = met;
        return nullptr;
    }

  private:
    OrtStatus* prepare_constants(const OrtKernelInfo* info) {
        Tensor in[6];
        for (size_t i = kWq; i <= kWOutlier; ++i) QPIPE_RETURN_IF(constant_input(info, i, in[i]));
        for (size_t i = kWq; i <= kWOutlier; ++i) {
            if (in[i].value == nullptr) return nullptr;
        }
        // Malformed constants are left for compute, which knows X too and says what is wrong.
        if (in[kWq].rank() != 2 || in[kWOutlier].rank() != 2) return nullptr;
        Extents extents{};
        extents.outputs = in[kWq].shape[0];
        extents.inputs_padded = in[kWq].shape[1];
        extents.outliers = in[kOutlierIndex].size();
        extents.outliers_padded = in[kWOutlier].shape[1];
        if (in[kWScale].size() != extents.outputs || in[kWOutlier].shape[0] != extents.outputs ||
            extents.outliers > extents.outliers_padded) {
            return nullptr;
        }
        constants_ = std::make_unique<Weights>(prepare(in, extents, type_, *lane_));
        return nullptr;
    }

    OrtStatus* run(OrtKernelContext* context, const Tensor (&in)[6], const Extents& extents, void* y, int64_t& met) {
        Weights varying;
        if (!constants_) varying = prepare(in, extents, type_, *lane_);
        const Weights& weights = constants_ ? *constants_ : varying;
        for (const int32_t index : weights.outlier_index) {
            if (index < 0 || index >= extents.inputs) return fail("OutlierMatMul: outlier_index holds %d", index);
        }
        Lines<float> padded_bias;
        const float* bias = weights.no_bias.data();
        if (in[kBias].data != nullptr) {
            padded_bias.assign(static_cast<size_t>(weights.columns), 0.0f);
            std::copy_n(in[kBias].as<float>(), extents.outputs, padded_bias.begin());
            bias = padded_bias.data();
        }
        Run call{*lane_,  type_, attributes_.limit, extents, weights, in[kX].data, in[kWq].as<int8_t>(), bias, y};
        Scratch scratch;
        QPIPE_RETURN_IF(scratch.take(context, memory_, call.scratch_bytes()));
        call.use_scratch(scratch.data());
        QPIPE_RETURN_IF(call.execute(context));
        met = call.new_outliers;
        return nullptr;
    }

    ElementType type_;
    Attributes attributes_{};
    const Lane* lane_ = nullptr;
    OrtMemoryInfo* memory_ = nullptr;
    std::unique_ptr<Weights> constants_;
};

template <ElementType Type>
OrtStatus* create(const OrtKernelInfo* info, std::unique_ptr<Kernel>& kernel) {
    auto made = std::make_unique<CpuKernel>(Type);
    QPIPE_RETURN_IF(made->initialize(info));
    kernel = std::move(made);
    return nullptr;
}

template <ElementType Type, ONNXTensorElementDataType X>
const OrtCustomOp* make_op() {
    static const CustomOp op(kName, kProvider, input_ports(X), output_ports(X), create<Type>, infer_output_shape);
    return &op;
}

}  // namespace
}  // namespace qpipe::outlier_matmul

namespace qpipe {

std::vector<const OrtCustomOp*> outlier_matmul_cpu_ops() {
    using namespace outlier_matmul;
    return {make_op<kFloat32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(),
            make_op<kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(),
            make_op<kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>()};
}

}  // namespace qpipe
