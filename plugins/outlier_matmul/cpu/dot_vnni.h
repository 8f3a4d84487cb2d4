// The product for VNNI: one instruction adds four products of unsigned and signed bytes to 32 bits, exactly, so that
// every quad is safe.
//
// Vector policy V: Type, kVectors per strip row, load(p), zero(), dot(sum, unsigned, signed), store(p, v), sub(a, b),
// broadcast(p).
#pragma once

#include "lanes.h"

namespace qpipe::outlier_matmul {
namespace {

template <class V, int Rows>
void vnni_block(const StripTask& t, int64_t m0) {
    constexpr int64_t kLanes = kStripColumns / V::kVectors;  // sums per vector
    const uint8_t* q = t.q + m0 * t.q_stride;
    typename V::Type sum[Rows][V::kVectors];
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
        for (int v = 0; v < V::kVectors; ++v) sum[m][v] = V::sub(V::zero(), V::load(t.correction + v * kLanes));
    }
    for (int64_t j = 0; j < t.quads; ++j) {
        typename V::Type weights[V::kVectors];
        for (int v = 0; v < V::kVectors; ++v) weights[v] = V::load(t.strip + (j * V::kVectors + v) * kLanes * kQuad);
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
            const typename V::Type a = V::broadcast(q + m * t.q_stride + t.order[j]);
            for (int v = 0; v < V::kVectors; ++v) sum[m][v] = V::dot(sum[m][v], a, weights[v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
        for (int v = 0; v < V::kVectors; ++v) V::store(t.sums + (m0 + m) * t.sums_stride + v * kLanes, sum[m][v]);
    }
}

template <class V>
void vnni_dot(const StripTask& t) {
    int64_t m = 0;
    for (; m + V::kRows <= t.rows; m += V::kRows) vnni_block<V, V::kRows>(t, m);
    for (; m + 2 <= t.rows; m += 2) vnni_block<V, 2>(t, m);
    if (m < t.rows) vnni_block<V, 1>(t, m);
}

}  // namespace
}  // namespace qpipe::outlier_matmul
