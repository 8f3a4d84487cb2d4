// What the host code needs to know of a device.
#pragma once

#include "platform.cuh"

#if defined(__CUDACC__)
#include <mutex>
#endif

namespace qpipe {

struct Device {
    int capability = 0;  // 10 * major + minor
    int multiprocessors = 0;
    int shared_bytes = 0;  // most that one block may ask for
    int wgmma = 0;         // 1: code made for sm_90a is there and runs
};

#if defined(__CUDACC__)

#define QPIPE_RETURN_IF_CUDA(expression)                                          \
    do {                                                                          \
        if (cudaError_t error = (expression); error != cudaSuccess) return error; \
    } while (0)

inline cudaError_t allow_shared(const void* function, int bytes) {
    return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

inline cudaError_t read_device(int id, Device& d) {
    int major = 0, minor = 0;
    QPIPE_RETURN_IF_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id));
    QPIPE_RETURN_IF_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id));
    QPIPE_RETURN_IF_CUDA(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, id));
    QPIPE_RETURN_IF_CUDA(cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
    d.capability = 10 * major + minor;
    return d.capability < 80 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

// Facts of the current device. Asked for once per device and `prepare`, which is called with them then; any thread.
template <cudaError_t (*prepare)(Device&)>
cudaError_t current_device(const Device*& device) {
    constexpr int kMostDevices = 64;
    static Device devices[kMostDevices];
    static cudaError_t results[kMostDevices];
    static std::once_flag once[kMostDevices];
    int id = 0;
    QPIPE_RETURN_IF_CUDA(cudaGetDevice(&id));
    if (id >= kMostDevices) return cudaErrorInvalidDevice;
    std::call_once(once[id], [id] {
        const cudaError_t read = read_device(id, devices[id]);
        results[id] = read == cudaSuccess ? prepare(devices[id]) : read;
    });
    device = &devices[id];
    return results[id];
}

#endif

}  // namespace qpipe
