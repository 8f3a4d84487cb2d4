"""A library with one operator, ``cust::Twice``, as users of custom operators have them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from qpipe import plugins
from qpipe.calibrate.errors import PluginError

SOURCE = r"""
#include <onnxruntime_c_api.h>
static const OrtApi* api;
static const char* ORT_API_CALL name(const OrtCustomOp*) { return "Twice"; }
static const char* ORT_API_CALL provider(const OrtCustomOp*) { return "CPUExecutionProvider"; }
static size_t ORT_API_CALL one(const OrtCustomOp*) { return 1; }
static ONNXTensorElementDataType ORT_API_CALL type(const OrtCustomOp*, size_t) {
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic ORT_API_CALL must(const OrtCustomOp*, size_t) {
    return INPUT_OUTPUT_REQUIRED;
}
static void* ORT_API_CALL create(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*) { return (void*)&api; }
static void ORT_API_CALL destroy(void*) {}
static void ORT_API_CALL compute(void*, OrtKernelContext* context) {
    const OrtValue* x; OrtValue* y; OrtTensorTypeAndShapeInfo* info; size_t rank, count; void *from, *to;
    api->KernelContext_GetInput(context, 0, &x);
    api->GetTensorTypeAndShape(x, &info);
    api->GetDimensionsCount(info, &rank);
    int64_t dims[8];
    api->GetDimensions(info, dims, rank);
    api->GetTensorShapeElementCount(info, &count);
    api->ReleaseTensorTypeAndShapeInfo(info);
    api->KernelContext_GetOutput(context, 0, dims, rank, &y);
    api->GetTensorMutableData((OrtValue*)x, &from);
    api->GetTensorMutableData(y, &to);
    for (size_t i = 0; i < count; ++i) ((float*)to)[i] = 2 * ((float*)from)[i];
}
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    static OrtCustomOp op = {};
    static OrtCustomOpDomain* domain = nullptr;
    api = base->GetApi(16);
    if (domain == nullptr) {
        op.version = 12;  // what later versions added is then not asked for
        op.GetName = name; op.GetExecutionProviderType = provider; op.CreateKernel = create; op.KernelDestroy = destroy;
        op.KernelCompute = compute; op.GetInputTypeCount = op.GetOutputTypeCount = one;
        op.GetInputType = op.GetOutputType = type; op.GetInputCharacteristic = op.GetOutputCharacteristic = must;
        if (OrtStatus* bad = api->CreateCustomOpDomain("cust", &domain)) return bad;
        if (OrtStatus* bad = api->CustomOpDomain_Add(domain, &op)) return bad;
    }
    return api->AddCustomOpDomain(options, domain);
}
"""


def build(folder: Path) -> Path:
    """Compile the library; the test that asks is skipped where there is no compiler, or no headers."""
    if shutil.which("c++") is None:
        pytest.skip("a custom operator needs a C++ compiler")
    try:
        headers = plugins.headers_path(fetch=True)
    except PluginError as error:
        pytest.skip(f"ONNX Runtime's C headers cannot be had: {error.found}")
    source, library = folder / "twice.cc", folder / "libtwice.so"
    source.write_text(SOURCE)
    command = ["c++", "-std=c++17", "-shared", "-fPIC", "-I", str(headers), str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library
