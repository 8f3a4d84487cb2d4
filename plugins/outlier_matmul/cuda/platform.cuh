// What a kernel source needs from its compiler: nvcc, or g++ with the emulator of tests/plugins/cuda_emulation.
//
// The kernels of this folder contain no inline assembly and no CUDA intrinsic of their own: all of that is behind
// `qpipe::ptx`, so that the same source runs thread by thread on a CPU under the emulator.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define QPIPE_DEVICE __device__ __forceinline__
#define QPIPE_BOTH __host__ __device__ __forceinline__
#define QPIPE_UNROLL _Pragma("unroll")
#define QPIPE_NO_UNROLL _Pragma("unroll 1")
#else
#include "emulated_cuda.h"
#define QPIPE_DEVICE inline
#define QPIPE_BOTH inline
#define QPIPE_UNROLL
#define QPIPE_NO_UNROLL
#endif

namespace qpipe {

// 8 and 16 bytes that move as one, whatever they are.
struct [[gnu::may_alias]] alignas(8) Bytes8 {
    uint32_t word[2];
};
struct [[gnu::may_alias]] alignas(16) Bytes16 {
    uint32_t word[4];
};

template <class I>
QPIPE_BOTH constexpr I ceil_div(I a, I b) {
    return (a + b - 1) / b;
}

template <class I>
QPIPE_BOTH constexpr I round_up(I a, I b) {
    return ceil_div(a, b) * b;
}

template <class I>
QPIPE_BOTH constexpr I smaller(I a, I b) {
    return a < b ? a : b;
}

}  // namespace qpipe
