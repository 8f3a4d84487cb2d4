#include "ort_op.h"

namespace qpipe {
namespace {

struct InfoRelease {
    void operator()(OrtTensorTypeAndShapeInfo* info) const { api().ReleaseTensorTypeAndShapeInfo(info); }
};

const CustomOp& self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }

OrtStatus* create_kernel(const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    try {
        std::unique_ptr<Kernel> made;
        QPIPE_RETURN_IF(self(op).create(info, made));
        *kernel = made.release();
        return nullptr;
    } catch (const std::exception& error) {
        return fail("%s: cannot be created: %s", self(op).name, error.what());
    }
}

OrtStatus* compute_kernel(void* kernel, OrtKernelContext* context) {
    try {
        return static_cast<Kernel*>(kernel)->compute(context);
    } catch (const std::exception& error) {
        return fail("qpipe kernel: %s", error.what());
    }
}

OrtStatus* infer_shape(const OrtCustomOp* op, OrtShapeInferContext* context) {
    try {
        return self(op).infer(context);
    } catch (const std::exception& error) {
        return fail("%s: shape inference: %s", self(op).name, error.what());
    }
}

OrtCustomOpInputOutputCharacteristic characteristic(const Port& port) {
    return port.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
}

}  // namespace

OrtStatus* fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return api().CreateStatus(ORT_INVALID_ARGUMENT, text);
}

CustomOp::CustomOp(const char* name_, const char* provider_, std::vector<Port> inputs_, std::vector<Port> outputs_,
                   Create create_, Infer infer_)
    : OrtCustomOp{},
      name(name_),
      provider(provider_),
      inputs(std::move(inputs_)),
      outputs(std::move(outputs_)),
      create(create_),
      infer(infer_) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).name; };
    GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op).provider; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).inputs.size(); };
    GetInputType = [](const OrtCustomOp* op, size_t i) { return self(op).inputs[i].type; };
    GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) { return characteristic(self(op).inputs[i]); };
    GetInputMemoryType = [](const OrtCustomOp* op, size_t i) { return self(op).inputs[i].memory; };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op).outputs.size(); };
    GetOutputType = [](const OrtCustomOp* op, size_t i) { return self(op).outputs[i].type; };
    GetOutputCharacteristic = [](const OrtCustomOp* op, size_t i) { return characteristic(self(op).outputs[i]); };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
    CreateKernelV2 = create_kernel;
    KernelComputeV2 = compute_kernel;
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = infer_shape;
}

int64_t Tensor::size() const {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    return count;
}

OrtStatus* describe(const OrtValue* value, Tensor& tensor) {
    tensor = {};
    if (value == nullptr) return nullptr;
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    QPIPE_RETURN_IF(api().GetTensorTypeAndShape(value, &raw));
    std::unique_ptr<OrtTensorTypeAndShapeInfo, InfoRelease> info(raw);
    size_t rank = 0;
    QPIPE_RETURN_IF(api().GetDimensionsCount(info.get(), &rank));
    tensor.shape.resize(rank);
    QPIPE_RETURN_IF(api().GetDimensions(info.get(), tensor.shape.data(), rank));
    void* data = nullptr;
    QPIPE_RETURN_IF(api().GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    tensor.value = value;
    tensor.data = data;
    return nullptr;
}

OrtStatus* input(const OrtKernelContext* context, size_t index, Tensor& tensor) {
    size_t count = 0;
    QPIPE_RETURN_IF(api().KernelContext_GetInputCount(context, &count));
    tensor = {};
    if (index >= count) return nullptr;
    const OrtValue* value = nullptr;
    QPIPE_RETURN_IF(api().KernelContext_GetInput(context, index, &value));
    return describe(value, tensor);
}

OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, Tensor& tensor) {
    size_t count = 0;
    QPIPE_RETURN_IF(api().KernelInfo_GetInputCount(info, &count));
    tensor = {};
    if (index >= count) return nullptr;
    const OrtValue* value = nullptr;
    int is_constant = 0;
    QPIPE_RETURN_IF(api().KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    return is_constant ? describe(value, tensor) : nullptr;
}

OrtStatus* output(OrtKernelContext* context, size_t index, const std::vector<int64_t>& shape, void*& data) {
    data = nullptr;
    size_t count = 0;
    QPIPE_RETURN_IF(api().KernelContext_GetOutputCount(context, &count));
    if (index >= count) return nullptr;
    OrtValue* value = nullptr;
    QPIPE_RETURN_IF(api().KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    return value == nullptr ? nullptr : api().GetTensorMutableData(value, &data);
}

OrtStatus* attribute(const OrtKernelInfo* info, const char* name, float fallback, float& value) {
    value = fallback;
    // Absent is not an error: the attribute has a default.
    if (OrtStatus* status = api().KernelInfoGetAttribute_float(info, name, &value)) {
        api().ReleaseStatus(status);
        value = fallback;
    }
    return nullptr;
}

OrtStatus* attribute(const OrtKernelInfo* info, const char* name, int64_t fallback, int64_t& value) {
    value = fallback;
    if (OrtStatus* status = api().KernelInfoGetAttribute_int64(info, name, &value)) {
        api().ReleaseStatus(status);
        value = fallback;
    }
    return nullptr;
}

}  // namespace qpipe
