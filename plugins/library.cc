// Entry points of libqpipe_ops.so: RegisterCustomOps for ONNX Runtime, qpipe_* for Python (ctypes).
#include <string>

#include "common/ort_op.h"
#include "outlier_matmul/cpu/lanes.h"

#ifndef QPIPE_VERSION
#define QPIPE_VERSION "0"
#endif

namespace qpipe {
namespace {

const OrtApi* g_api = nullptr;

// A session keeps a pointer to the domain it was given; one domain lives as long as the library.
OrtStatus* make_domain(OrtCustomOpDomain*& domain) {
    std::vector<const OrtCustomOp*> ops = outlier_matmul_cpu_ops();
    for (const OrtCustomOp* op : range_stats_cpu_ops()) ops.push_back(op);
#ifdef QPIPE_CUDA
    for (const OrtCustomOp* op : outlier_matmul_cuda_ops()) ops.push_back(op);
    for (const OrtCustomOp* op : range_stats_cuda_ops()) ops.push_back(op);
#endif
    QPIPE_RETURN_IF(api().CreateCustomOpDomain("qpipe", &domain));
    for (const OrtCustomOp* op : ops) QPIPE_RETURN_IF(api().CustomOpDomain_Add(domain, op));
    return nullptr;
}

}  // namespace

const OrtApi& api() { return *g_api; }

}  // namespace qpipe

extern "C" {

__attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                   const OrtApiBase* base) {
    const OrtApi* found = base->GetApi(qpipe::kApiVersion);
    if (found == nullptr) {
        // Version 1 exists in every ONNX Runtime and can make the status that says what is wrong.
        char text[160];
        std::snprintf(text, sizeof text, "qpipe's operators need ONNX Runtime 1.%u or newer, this is %s",
                      qpipe::kApiVersion, base->GetVersionString());
        return base->GetApi(1)->CreateStatus(ORT_FAIL, text);
    }
    static OrtCustomOpDomain* domain = nullptr;
    qpipe::g_api = found;
    try {
        static OrtStatus* const made = qpipe::make_domain(domain);
        if (made != nullptr) return found->CreateStatus(ORT_FAIL, "qpipe: the operator domain could not be made");
        return found->AddCustomOpDomain(options, domain);
    } catch (const std::exception& error) {
        return found->CreateStatus(ORT_FAIL, error.what());
    }
}

// Facts about this build as JSON; the string lives as long as the library.
__attribute__((visibility("default"))) const char* qpipe_info() {
    static const std::string text = [] {
        std::string lanes;
        for (const auto* lane : qpipe::outlier_matmul::available_lanes()) {
            lanes += std::string(lanes.empty() ? "" : ", ") + "\"" + lane->name + "\"";
        }
#ifdef QPIPE_CUDA
        const char* cuda = "\"" QPIPE_CUDA "\"";
#else
        const char* cuda = "null";
#endif
        return std::string("{\"version\": \"" QPIPE_VERSION "\", \"api_version\": ") +
               std::to_string(qpipe::kApiVersion) + ", \"compiler\": \"" __VERSION__ "\", \"cuda\": " + cuda +
               ", \"lanes\": [" + lanes + "]}";
    }();
    return text.c_str();
}

}  // extern "C"
