// The instructions of sm_80 and later that the kernels use, one function each. Source: PTX ISA, sections named below.
#pragma once

#include "platform.cuh"

#if !defined(__CUDACC__)
#include "emulated_ptx.h"
#else

namespace qpipe::ptx {

// Shared memory: the block's dynamic allocation, and addresses in the shared window.

QPIPE_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char qpipe_shared_memory[];
    return qpipe_shared_memory;
}

QPIPE_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Asynchronous 16-byte copies, global to shared ("cp.async"); a copy that is not `wanted` writes zeros.

QPIPE_DEVICE void copy_async16(uint32_t shared, const void* global, bool wanted) {
    const int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

QPIPE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
QPIPE_DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements ("ldmatrix"): lane i names row i % 8 of matrix i / 8.

QPIPE_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// Tensor-core products of 32 bytes of K ("mma.sync"): c[16x8] += a[16xK] * b[8xK]^T.

QPIPE_DEVICE void mma_s8(int32_t* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#define QPIPE_MMA_FLOAT(name, shape)                                                                              \
    QPIPE_DEVICE void name(float* c, const uint32_t(&a)[4], uint32_t b0, uint32_t b1) {                           \
        asm volatile("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"           \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
    }
QPIPE_MMA_FLOAT(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
QPIPE_MMA_FLOAT(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
QPIPE_MMA_FLOAT(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef QPIPE_MMA_FLOAT

// Conversions, rounding to nearest even.

QPIPE_DEVICE float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

QPIPE_DEVICE uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

QPIPE_DEVICE uint16_t float_to_bfloat16(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

QPIPE_DEVICE uint32_t subtract_half2(uint32_t a, uint32_t b) {
    uint32_t difference;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

QPIPE_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
QPIPE_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
QPIPE_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
QPIPE_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
QPIPE_DEVICE float round_even(float value) { return rintf(value); }

// Threads of a block and of a warp.

QPIPE_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
QPIPE_DEVICE int threads() { return static_cast<int>(blockDim.x); }
QPIPE_DEVICE int block() { return static_cast<int>(blockIdx.x); }
QPIPE_DEVICE int blocks() { return static_cast<int>(gridDim.x); }
QPIPE_DEVICE void sync_block() { __syncthreads(); }
QPIPE_DEVICE void sync_warp() { __syncwarp(); }
QPIPE_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
QPIPE_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }
QPIPE_DEVICE uint32_t warp_sum(uint32_t value) { return __reduce_add_sync(0xffffffffu, value); }
QPIPE_DEVICE uint32_t warp_min(uint32_t value) { return __reduce_min_sync(0xffffffffu, value); }
QPIPE_DEVICE uint32_t warp_or(uint32_t value) { return __reduce_or_sync(0xffffffffu, value); }

template <class I>
QPIPE_DEVICE void atomic_max(I* address, I value) {
    atomicMax(address, value);
}
template <class I>
QPIPE_DEVICE void atomic_min(I* address, I value) {
    atomicMin(address, value);
}
template <class I>
QPIPE_DEVICE void atomic_or(I* address, I value) {
    atomicOr(address, value);
}
template <class I>
QPIPE_DEVICE I atomic_add(I* address, I value) {
    return atomicAdd(address, value);
}

// 16 bytes of a weight that is read once: not kept in L1.
QPIPE_DEVICE Bytes16 load_streaming(const void* global) {
    Bytes16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(global));
    return v;
}

// Programmatic dependent launch (sm_90 "griddepcontrol"); nothing on older chips, where launches stay serial.

QPIPE_DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

QPIPE_DEVICE void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace qpipe::ptx

#endif
