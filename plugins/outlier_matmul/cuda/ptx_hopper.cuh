// The instructions of sm_90a: transaction barriers, bulk tensor copies (TMA), clusters, wgmma. Source: PTX ISA, sections
// "mbarrier", "cp.async.bulk.tensor", "barrier.cluster", "Asynchronous warpgroup level matrix instructions".
#pragma once

#include "ptx.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
// Only code made for sm_90a may hold these instructions; elsewhere the kernels are empty and never launched.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define QPIPE_HOPPER 1
#endif
#else
#define QPIPE_HOPPER 1
#endif

#if defined(__CUDACC__) && defined(QPIPE_HOPPER)

namespace qpipe::ptx {

// Barriers in shared memory that count arrivals and bytes.

QPIPE_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make the barriers visible to the copy engine and to the other blocks of the cluster.
QPIPE_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

QPIPE_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

QPIPE_DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive at the barrier at the same place in block `rank` of the cluster.
QPIPE_DEVICE void barrier_arrive_remote(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier), "r"(rank) : "memory");
}

QPIPE_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    }
}

// Copy a box of a tensor map into shared memory, from byte `x` of row `y` on; bytes are counted at `barrier`.

QPIPE_DEVICE void tensor_copy(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared), "l"(map), "r"(barrier), "r"(x), "r"(y) : "memory");
}

// The same into every block of the cluster whose bit is set in `blocks`, at the same place in each.
QPIPE_DEVICE void tensor_copy_multicast(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x, int y,
                                        uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared), "l"(map), "r"(barrier), "h"(blocks), "r"(x), "r"(y)
        : "memory");
}

// Clusters.

QPIPE_DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// 16 bytes at the same place in the shared memory of block `rank` of the cluster.
QPIPE_DEVICE Bytes16 load_remote(uint32_t shared, uint32_t rank) {
    Bytes16 v;
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %4, %5;\n"
        "ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [remote];\n"
        "}" : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3]) : "r"(shared), "r"(rank) : "memory");
    return v;
}

QPIPE_DEVICE void store_shared(uint32_t shared, const Bytes16& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.word[0]), "r"(v.word[1]),
                 "r"(v.word[2]), "r"(v.word[3]) : "memory");
}

// Registers per thread of this warpgroup, out of the block's common stock.

template <int kRegisters>
QPIPE_DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
QPIPE_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Accumulators are whole at this place: without it the compiler, which knows nothing of products in flight, may move
// their initialization behind the fence, or their conversion before the wait.
QPIPE_DEVICE void wgmma_pin(int32_t& d) { asm volatile("" : "+r"(d)::"memory"); }
QPIPE_DEVICE void wgmma_pin(float& d) { asm volatile("" : "+f"(d)::"memory"); }

QPIPE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QPIPE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
QPIPE_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace qpipe::ptx

#include "wgmma.cuh"

#endif
