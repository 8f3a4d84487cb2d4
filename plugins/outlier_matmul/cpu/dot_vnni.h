// The product for VNNI: one instruction adds four products of unsigned and signed bytes to 32 bits, exactly, so that
// every quad is safe.
//
// Vector policy V: Type, kVectors per strip row, load(p), zero(), dot(sum, unsigned, signed), store(p, v), add(a, b),
// sub(a, b), broadcast(p).
#pragma once

#include "lanes.h"

namespace qpipe::outlier_matmul {
namespace {

// `Chains` sums per output, which take the quads in turn: with few rows one sum would wait for itself.
template <class V, int Rows, int Chains>
void vnni_block(const StripTask& t, int64_t m0) {
    constexpr int64_t kLanes = kStripColumns / V::kVectors;  // sums per vector
    const uint8_t* q = t.q + m0 * t.q_stride;
    typename V::Type sum[Chains][Rows][V::kVectors];
    for (int c = 0; c < Chains; ++c) {
#pragma GCC unroll 16
        for (int m = 0; m < Rows; ++m) {
            for (int v = 0; v < V::kVectors; ++v) {
                sum[c][m][v] = c == 0 ? V::sub(V::zero(), V::load(t.correction + v * kLanes)) : V::zero();
            }
        }
    }
    for (int64_t j = 0; j < t.quads; j += Chains) {  // K, and so quads, are padded to a multiple of 4
#pragma GCC unroll 4
        for (int c = 0; c < Chains; ++c) {
            typename V::Type weights[V::kVectors];
            for (int v = 0; v < V::kVectors; ++v) {
                weights[v] = V::load(t.strip + ((j + c) * V::kVectors + v) * kLanes * kQuad);
            }
#pragma GCC unroll 16
            for (int m = 0; m < Rows; ++m) {
                const typename V::Type a = V::broadcast(q + m * t.q_stride + t.order[j + c]);
                for (int v = 0; v < V::kVectors; ++v) sum[c][m][v] = V::dot(sum[c][m][v], a, weights[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < Rows; ++m) {
        for (int v = 0; v < V::kVectors; ++v) {
            typename V::Type total = sum[0][m][v];
            for (int c = 1; c < Chains; ++c) total = V::add(total, sum[c][m][v]);
            V::store(t.sums + (m0 + m) * t.sums_stride + v * kLanes, total);
        }
    }
}

template <class V>
void vnni_dot(const StripTask& t) {
    int64_t m = 0;
    for (; m + V::kRows <= t.rows; m += V::kRows) vnni_block<V, V::kRows, 1>(t, m);
    for (; m + 2 <= t.rows; m += 2) vnni_block<V, 2, 2>(t, m);
    if (m < t.rows) vnni_block<V, 1, 4>(t, m);
}

}  // namespace
}  // namespace qpipe::outlier_matmul
