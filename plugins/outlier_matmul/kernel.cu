// OutlierMatMul on CUDA: one operator per element type. Nothing here waits for the device or allocates outside ONNX
// Runtime's arena, so that a run can be captured into a CUDA graph. The kernels: cuda/.
#include "contract.h"

#include "cuda/launch.cuh"

namespace qpipe::outlier_matmul {
namespace {

constexpr const char* kProvider = "CUDAExecutionProvider";

OrtStatus* check(cudaError_t error) {
    return error == cudaSuccess ? nullptr : fail("OutlierMatMul on CUDA: %s", cudaGetErrorString(error));
}

// Device memory of one run. The arena notes the run's stream, so that giving the memory back right after the launches is
// safe: only work that comes later in the same stream can get it.
class Scratch {
  public:
    ~Scratch() {
        if (data_ != nullptr) {
            if (OrtStatus* status = api().AllocatorFree(allocator_, data_)) api().ReleaseStatus(status);
        }
        if (allocator_ != nullptr) api().ReleaseAllocator(allocator_);
    }

    OrtStatus* take(const OrtKernelContext* context, const Tensor& beside, size_t bytes) {
        if (bytes == 0) return nullptr;
        const OrtMemoryInfo* memory = nullptr;
        QPIPE_RETURN_IF(api().GetTensorMemoryInfo(beside.value, &memory));
        QPIPE_RETURN_IF(api().KernelContext_GetAllocator(context, memory, &allocator_));
        return api().KernelContext_GetScratchBuffer(context, memory, bytes, &data_);
    }

    void* data() const { return data_; }

  private:
    OrtAllocator* allocator_ = nullptr;
    void* data_ = nullptr;
};

// Extents whose products the kernels take as 32-bit numbers.
OrtStatus* check_extents(const Extents& e) {
    constexpr int64_t kMost = 1 << 20;
    if (e.inputs_padded > kMost || e.outliers_padded > kMost || e.rows > 0x7fffffff || e.outputs > 0x7fffffff) {
        return fail("OutlierMatMul on CUDA: K = %lld, O = %lld, M = %lld, N = %lld; K and O may be 2^20, M and N 2^31",
                    static_cast<long long>(e.inputs), static_cast<long long>(e.outliers),
                    static_cast<long long>(e.rows), static_cast<long long>(e.outputs));
    }
    return nullptr;
}

// The kernels copy weights 16 bytes at a time; what ONNX Runtime allocates is aligned, what a caller binds may not be.
OrtStatus* check_alignment(const Tensor (&in)[6]) {
    for (const Input i : {kWq, kWOutlier}) {
        if (reinterpret_cast<uintptr_t>(in[i].data) % 16 != 0) {
            return fail("OutlierMatMul on CUDA: %s has to begin at a multiple of 16 bytes", i == kWq ? "w_q" : "w_outlier");
        }
    }
    return nullptr;
}

Operands operands(const Tensor (&in)[6], const Extents& e, float limit, void* y, void* counter) {
    Operands op{};
    op.x = in[kX].data;
    op.w_codes = in[kWq].as<int8_t>();
    op.w_scale = in[kWScale].as<float>();
    op.outlier_index = in[kOutlierIndex].as<int32_t>();
    op.w_outlier = in[kWOutlier].data;
    op.bias = in[kBias].as<float>();
    op.y = y;
    op.new_outliers = static_cast<unsigned long long*>(counter);
    op.m = e.rows;
    op.n = e.outputs;
    op.k = static_cast<int>(e.inputs);
    op.k_padded = static_cast<int>(e.inputs_padded);
    op.o = static_cast<int>(e.outliers);
    op.o_padded = static_cast<int>(e.outliers_padded);
    op.limit = limit;
    return op;
}

template <class T>
class CudaKernel : public Kernel {
  public:
    explicit CudaKernel(const Attributes& attributes) : attributes_(attributes) {}

    OrtStatus* compute(OrtKernelContext* context) override {
        Tensor in[6];
        Extents extents{};
        QPIPE_RETURN_IF(read_inputs(context, attributes_, in, extents));
        QPIPE_RETURN_IF(check_extents(extents));
        QPIPE_RETURN_IF(check_alignment(in));
        void* y = nullptr;
        void* counter = nullptr;
        QPIPE_RETURN_IF(output(context, kY, output_shape(in[kX], extents), y));
        QPIPE_RETURN_IF(output(context, kNewOutliers, {}, counter));
        void* stream = nullptr;
        QPIPE_RETURN_IF(api().KernelContext_GetGPUComputeStream(context, &stream));
        const Device* device = nullptr;
        QPIPE_RETURN_IF(check(current_device<prepare_kernels>(device)));
        const Operands op = operands(in, extents, attributes_.limit, y, counter);
        const Plan plan = choose_plan(shape_of(op, sizeof(T)), *device);
        Scratch scratch;
        QPIPE_RETURN_IF(scratch.take(context, in[kX], scratch_bytes(op, plan, sizeof(T))));
        return check(launch<T>(op, plan, *device, scratch.data(), static_cast<cudaStream_t>(stream)));
    }

  private:
    Attributes attributes_;
};

template <class T>
OrtStatus* create(const OrtKernelInfo* info, std::unique_ptr<Kernel>& kernel) {
    Attributes attributes{};
    QPIPE_RETURN_IF(read_attributes(info, attributes));
    const Device* device = nullptr;
    QPIPE_RETURN_IF(check(current_device<prepare_kernels>(device)));  // kernel attributes are set here, not in a run
    kernel = std::make_unique<CudaKernel<T>>(attributes);
    return nullptr;
}

template <class T, ONNXTensorElementDataType X>
const OrtCustomOp* make_op() {
    static const CustomOp op(kName, kProvider, input_ports(X), output_ports(X), create<T>, infer_output_shape);
    return &op;
}

}  // namespace
}  // namespace qpipe::outlier_matmul

namespace qpipe {

std::vector<const OrtCustomOp*> outlier_matmul_cuda_ops() {
    using namespace outlier_matmul;
    return {make_op<float, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(),
            make_op<Half, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(),
            make_op<BFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>()};
}

}  // namespace qpipe
