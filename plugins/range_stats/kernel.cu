// RangeStats on CUDA: count a tensor's values by the upper 16 bits of their float32, without a copy to the host.
//
//   new_state = RangeStats(x, state)      attribute sentinel (float, default 1e30)
//
// x: float32, float16 or bfloat16, any shape. state and new_state: int64 [65544], see cuda/range_stats.cuh; an empty
// state is all zeros but for word 65537 (minimum), which is 2^32 - 1. With the state bound to device memory through
// ONNX Runtime's IO binding it stays on the device from batch to batch and is copied to the host once.
#include "../common/ort_op.h"
#include "../outlier_matmul/cuda/device.cuh"
#include "cuda/range_stats.cuh"

namespace qpipe::range_stats {
namespace {

constexpr const char* kName = "RangeStats";
constexpr const char* kProvider = "CUDAExecutionProvider";
constexpr ONNXTensorElementDataType kState = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

OrtStatus* check(cudaError_t error) {
    return error == cudaSuccess ? nullptr : fail("RangeStats on CUDA: %s", cudaGetErrorString(error));
}

cudaError_t prepare_kernels(Device&) {
    constexpr int kBytes = static_cast<int>(kCountSharedBytes);
    QPIPE_RETURN_IF_CUDA(allow_shared(reinterpret_cast<const void*>(&count_kernel<float>), kBytes));
    QPIPE_RETURN_IF_CUDA(allow_shared(reinterpret_cast<const void*>(&count_kernel<Half>), kBytes));
    return allow_shared(reinterpret_cast<const void*>(&count_kernel<BFloat16>), kBytes);
}

// Add x's values to `after`, which begins as `before` (the two may be the same memory).
template <class T>
cudaError_t count(const T* x, int64_t size, float sentinel, const void* before, void* after, int multiprocessors,
                  cudaStream_t stream) {
    if (after != before) {
        QPIPE_RETURN_IF_CUDA(
            cudaMemcpyAsync(after, before, kStateWords * sizeof(StateWord), cudaMemcpyDeviceToDevice, stream));
    }
    if (size == 0) return cudaSuccess;
    const int64_t blocks = smaller<int64_t>(ceil_div<int64_t>(size, kCountChunk), int64_t{2} * multiprocessors);
    count_kernel<T><<<static_cast<unsigned>(blocks), kCountThreads, kCountSharedBytes, stream>>>(
        x, size, sentinel, static_cast<StateWord*>(after));
    return cudaGetLastError();
}

template <class T>
class CudaKernel : public Kernel {
  public:
    explicit CudaKernel(float sentinel) : sentinel_(sentinel) {}

    OrtStatus* compute(OrtKernelContext* context) override {
        Tensor x, state;
        QPIPE_RETURN_IF(input(context, 0, x));
        QPIPE_RETURN_IF(input(context, 1, state));
        if (state.size() != kStateWords) return fail("RangeStats: state needs %d words", kStateWords);
        void* after = nullptr;
        QPIPE_RETURN_IF(output(context, 0, state.shape, after));
        void* stream = nullptr;
        QPIPE_RETURN_IF(api().KernelContext_GetGPUComputeStream(context, &stream));
        const Device* device = nullptr;
        QPIPE_RETURN_IF(check(current_device<prepare_kernels>(device)));
        return check(count(x.as<T>(), x.size(), sentinel_, state.data, after, device->multiprocessors,
                           static_cast<cudaStream_t>(stream)));
    }

  private:
    float sentinel_;
};

template <class T>
OrtStatus* create(const OrtKernelInfo* info, std::unique_ptr<Kernel>& kernel) {
    float sentinel = 0;
    QPIPE_RETURN_IF(attribute(info, "sentinel", 1e30f, sentinel));
    const Device* device = nullptr;
    QPIPE_RETURN_IF(check(current_device<prepare_kernels>(device)));
    kernel = std::make_unique<CudaKernel<T>>(sentinel);
    return nullptr;
}

// new_state has the shape of state.
OrtStatus* infer(OrtShapeInferContext* context) {
    OrtTensorTypeAndShapeInfo* state = nullptr;
    QPIPE_RETURN_IF(api().ShapeInferContext_GetInputTypeShape(context, 1, &state));
    return api().ShapeInferContext_SetOutputTypeShape(context, 0, state);
}

template <class T, ONNXTensorElementDataType X>
const OrtCustomOp* make_op() {
    static const CustomOp op(kName, kProvider, {{X}, {kState}}, {{kState}}, create<T>, infer);
    return &op;
}

}  // namespace
}  // namespace qpipe::range_stats

namespace qpipe {

std::vector<const OrtCustomOp*> range_stats_cuda_ops() {
    using namespace range_stats;
    return {make_op<float, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(),
            make_op<Half, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(),
            make_op<BFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>()};
}

}  // namespace qpipe
