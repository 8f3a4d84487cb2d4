// Thin layer over ONNX Runtime's C API: an operator is a `CustomOp` (data), a node's state is a `Kernel`.
//
// The plain OrtCustomOp struct is filled by hand, API version 18: one library then runs on every ONNX Runtime from 1.18
// on. No exception crosses the C boundary: every callback returns a status.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <vector>

namespace qpipe {

constexpr uint32_t kApiVersion = 18;
static_assert(ORT_API_VERSION >= kApiVersion, "ONNX Runtime headers 1.18 or newer are needed");

// Set once by RegisterCustomOps; null before.
const OrtApi& api();

// A failed status with a printf-style message.
OrtStatus* fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

#define QPIPE_RETURN_IF(expression)                 \
    do {                                            \
        if (OrtStatus* status = (expression)) return status; \
    } while (0)

// State of one node; several runs may call compute at the same time.
struct Kernel {
    virtual ~Kernel() = default;
    virtual OrtStatus* compute(OrtKernelContext* context) = 0;
};

struct Port {
    ONNXTensorElementDataType type;  // ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED: any
    bool optional = false;
    OrtMemType memory = OrtMemTypeDefault;  // inputs only
};

// One operator for one element type and one execution provider ("CPUExecutionProvider", "CUDAExecutionProvider").
struct CustomOp : OrtCustomOp {
    using Create = OrtStatus* (*)(const OrtKernelInfo* info, std::unique_ptr<Kernel>& kernel);
    using Infer = OrtStatus* (*)(OrtShapeInferContext* context);

    CustomOp(const char* name, const char* provider, std::vector<Port> inputs, std::vector<Port> outputs, Create create,
             Infer infer);

    const char* name;
    const char* provider;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    Create create;
    Infer infer;
};

// What a kernel reads of a tensor. `data` is null for an omitted optional input.
struct Tensor {
    const OrtValue* value = nullptr;
    const void* data = nullptr;
    std::vector<int64_t> shape;

    int64_t size() const;
    int64_t rank() const { return static_cast<int64_t>(shape.size()); }
    template <class T>
    const T* as() const {
        return static_cast<const T*>(data);
    }
};

OrtStatus* describe(const OrtValue* value, Tensor& tensor);
OrtStatus* input(const OrtKernelContext* context, size_t index, Tensor& tensor);
// The input when it is a constant initializer, else an empty Tensor. On CUDA `data` is a device pointer.
OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, Tensor& tensor);
// `data` stays null when the optional output is not asked for.
OrtStatus* output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape, void*& data);
OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float fallback, float& value);
OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t fallback, int64_t& value);

// Operators of this library, by folder. CUDA operators are present when QPIPE_CUDA is defined.
std::vector<const OrtCustomOp*> outlier_matmul_cpu_ops();
std::vector<const OrtCustomOp*> range_stats_cpu_ops();
#ifdef QPIPE_CUDA
std::vector<const OrtCustomOp*> outlier_matmul_cuda_ops();
std::vector<const OrtCustomOp*> range_stats_cuda_ops();
#endif

}  // namespace qpipe
