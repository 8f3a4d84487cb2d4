// Host side of a call: device facts, kernel attributes, tensor maps, launches. Never waits, never allocates.
#pragma once

#include <cuda.h>

#include "quantize.cuh"
#include "tiles.cuh"

namespace qpipe {

// A compiled kernel.
struct Compiled {
    const void* function;
    int threads;
    int shared_bytes;
    int x_rows, w_rows;
};

template <class Tile, class Lane, class T>
Compiled compiled_mma() {
    return {reinterpret_cast<const void*>(&gemm_mma_kernel<Tile, Lane, T>), Tile::kThreads, Tile::kSharedBytes,
            Tile::kBm, Tile::kBn};
}

template <class Tile, class T>
Compiled compiled_wgmma() {
    return {reinterpret_cast<const void*>(&gemm_wgmma_kernel<Tile, T>), Tile::kThreads, Tile::kSharedBytes, Tile::kBm,
            Tile::kBn};
}

template <class T>
Compiled mma_kernel(int tile, bool int8) {
    const Compiled with_int8[] = {compiled_mma<MmaTile0, Int8Step, T>(), compiled_mma<MmaTile1, Int8Step, T>(),
                                  compiled_mma<MmaTile2, Int8Step, T>()};
    const Compiled widened[] = {compiled_mma<MmaTile0, Int8AsHalfStep, T>(), compiled_mma<MmaTile1, Int8AsHalfStep, T>(),
                                compiled_mma<MmaTile2, Int8AsHalfStep, T>()};
    return int8 ? with_int8[tile] : widened[tile];
}

template <class T>
Compiled wgmma_kernel(int tile) {
    if (tile == 0) return compiled_wgmma<WgmmaTile0, T>();
    if constexpr (sizeof(T) == 2) {
        if (tile == 2) return compiled_wgmma<WgmmaTile2, T>();
    }
    return compiled_wgmma<WgmmaTile1, T>();
}

// Let every kernel of an element type use the shared memory that it may ask for.
template <class T>
cudaError_t allow_shared_memory(const Device& d) {
    QPIPE_RETURN_IF_CUDA(allow_shared(reinterpret_cast<const void*>(&quantize_rows_kernel<T>), d.shared_bytes));
    QPIPE_RETURN_IF_CUDA(allow_shared(reinterpret_cast<const void*>(&small_m_kernel<T>), d.shared_bytes));
    for (int tile = 0; tile < kMmaTileCount; ++tile) {
        const Compiled kernel = mma_kernel<T>(tile, has_int8_rate(d.capability));
        QPIPE_RETURN_IF_CUDA(allow_shared(kernel.function, kernel.shared_bytes));
    }
    for (int tile = 0; d.wgmma != 0 && tile < kWgmmaTileCount; ++tile) {
        const Compiled kernel = wgmma_kernel<T>(tile);
        QPIPE_RETURN_IF_CUDA(allow_shared(kernel.function, kernel.shared_bytes));
    }
    return cudaSuccess;
}

// Empty but for its shared memory, which is there in code made for sm_90a only: so the host sees which code runs here.
// Version numbers would not do: PTX of sm_80 that the driver compiled for sm_90 counts as sm_90.
constexpr int kHopperMark = 4096;

template <int kBytes>
__global__ void hopper_mark() {
#if defined(QPIPE_HOPPER) && defined(__CUDA_ARCH__)
    __shared__ unsigned char mark[kBytes];
    *static_cast<volatile unsigned char*>(mark) = 1;
#endif
}

// `prepare` of current_device: kernel attributes are set there, never in a run.
inline cudaError_t prepare_kernels(Device& d) {
    cudaFuncAttributes facts{};
    QPIPE_RETURN_IF_CUDA(cudaFuncGetAttributes(&facts, reinterpret_cast<const void*>(&hopper_mark<kHopperMark>)));
    // In code for other chips the wgmma kernels are empty, and no kernel waits for an early launch's forerunner.
    d.wgmma = d.capability == 90 && facts.sharedSizeBytes >= kHopperMark;
    QPIPE_RETURN_IF_CUDA(allow_shared_memory<Half>(d));
    QPIPE_RETURN_IF_CUDA(allow_shared_memory<BFloat16>(d));
    return allow_shared_memory<float>(d);
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's encoder, found through the runtime so that the library needs no libcuda to load.
inline EncodeTiled tensor_map_encoder() {
    static const EncodeTiled encoder = []() -> EncodeTiled {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found)
                                                                             : nullptr;
    }();
    return encoder;
}

// Map of a byte matrix: boxes of 128 bytes x `box_rows` rows, swizzled, zero outside.
inline cudaError_t encode_map(CUtensorMap& map, const void* matrix, int64_t rows, int row_bytes, int box_rows) {
    if (row_bytes == 0) return cudaSuccess;  // no outlier columns: the map is never read
    const EncodeTiled encode = tensor_map_encoder();
    if (encode == nullptr) return cudaErrorNotSupported;
    const cuuint64_t extent[2] = {static_cast<cuuint64_t>(row_bytes), static_cast<cuuint64_t>(rows)};
    const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(row_bytes)};
    const cuuint32_t box[2] = {kStageBytes, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(matrix), extent, pitch,
                                   box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Launch with a cluster size and, on sm_90 and later, permission to start before the previous kernel has ended.
inline cudaError_t launch_after(const Compiled& kernel, int blocks, int cluster, bool early, void** arguments,
                                cudaStream_t stream) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(kernel.threads));
    config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (early) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    return cudaLaunchKernelExC(&config, kernel.function, arguments);
}

template <class T>
cudaError_t launch_wgmma(const Operands& op, const QuantizedRows& rows, const Plan& plan, cudaStream_t stream) {
    const Compiled kernel = wgmma_kernel<T>(plan.tile);
    HopperCall call{op, rows, {}, {}, {}, {}, plan.share, plan.cluster};
    const int x_box = kernel.x_rows / (plan.share == Share::kX ? plan.cluster : 1);
    const int w_box = kernel.w_rows / (plan.share == Share::kW ? plan.cluster : 1);
    const int outlier_bytes = op.o_padded * static_cast<int>(sizeof(T));
    QPIPE_RETURN_IF_CUDA(encode_map(call.x, rows.codes, op.m, op.k_padded, x_box));
    QPIPE_RETURN_IF_CUDA(encode_map(call.w, op.w_codes, op.n, op.k_padded, w_box));
    QPIPE_RETURN_IF_CUDA(encode_map(call.x_outlier, rows.outliers, op.m, outlier_bytes, x_box));
    QPIPE_RETURN_IF_CUDA(encode_map(call.w_outlier, op.w_outlier, op.n, outlier_bytes, w_box));
    void* arguments[] = {&call};
    return launch_after(kernel, plan.blocks, plan.cluster, true, arguments, stream);
}

template <class T>
cudaError_t launch_mma(Operands op, QuantizedRows rows, const Plan& plan, const Device& d, cudaStream_t stream) {
    void* arguments[] = {&op, &rows};
    return launch_after(mma_kernel<T>(plan.tile, has_int8_rate(d.capability)), plan.blocks, 1, d.wgmma != 0, arguments,
                        stream);
}

// Scratch memory that a plan needs.
inline size_t scratch_bytes(const Operands& op, const Plan& plan, size_t element_bytes) {
    const bool none = plan.path == Path::kNothing || plan.path == Path::kSmall;
    return none ? 0 : scratch_layout(op, element_bytes).bytes;
}

// Run one call; `scratch` holds `scratch_bytes`. Errors are those of launching: the work itself is asynchronous.
template <class T>
cudaError_t launch(const Operands& op, const Plan& plan, const Device& d, void* scratch, cudaStream_t stream) {
    if (op.new_outliers != nullptr) {
        QPIPE_RETURN_IF_CUDA(cudaMemsetAsync(op.new_outliers, 0, sizeof(*op.new_outliers), stream));
    }
    if (plan.path == Path::kNothing) return cudaSuccess;
    if (plan.path == Path::kSmall) {
        const int shared = small_layout(static_cast<int>(op.m), op.k_padded, op.o_padded, sizeof(T)).bytes;
        small_m_kernel<T><<<plan.blocks, kSmallThreads, shared, stream>>>(op);
        return cudaGetLastError();
    }
    const QuantizedRows rows = place_rows(op, scratch_layout(op, sizeof(T)), scratch);
    const size_t shared = quantize_shared_bytes<T>(op.k_padded);
    if (shared > static_cast<size_t>(d.shared_bytes) || op.m > 0x7fffffff) return cudaErrorInvalidValue;
    quantize_rows_kernel<T><<<static_cast<unsigned>(op.m), kQuantizeThreads, shared, stream>>>(op, rows);
    QPIPE_RETURN_IF_CUDA(cudaGetLastError());
    if (plan.path == Path::kWgmma) return launch_wgmma<T>(op, rows, plan, stream);
    return launch_mma<T>(op, rows, plan, d, stream);
}

inline Shape shape_of(const Operands& op, int element_bytes) {
    return {op.m, op.n, op.k_padded, op.o_padded, element_bytes};
}

}  // namespace qpipe
