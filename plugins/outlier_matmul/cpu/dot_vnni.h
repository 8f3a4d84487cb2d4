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

// One row by several strips: as many streams through memory at a time, which one alone does not keep busy.
template <class V, int Strips>
void vnni_streams(const TileTask& t, int64_t strip) {
    constexpr int64_t kLanes = kStripColumns / V::kVectors;
    const int64_t length = t.quads * kStripColumns * kQuad;
    const int8_t* weights = t.weights + strip * length;
    typename V::Type sum[Strips][V::kVectors];
#pragma GCC unroll 8
    for (int s = 0; s < Strips; ++s) {
        for (int v = 0; v < V::kVectors; ++v) {
            sum[s][v] = V::sub(V::zero(), V::load(t.correction + (strip + s) * kStripColumns + v * kLanes));
        }
    }
    for (int64_t j = 0; j < t.quads; ++j) {
        const typename V::Type a = V::broadcast(t.q + j * kQuad);
#pragma GCC unroll 8
        for (int s = 0; s < Strips; ++s) {
            for (int v = 0; v < V::kVectors; ++v) {
                const int8_t* w = weights + s * length + (j * V::kVectors + v) * kLanes * kQuad;
                sum[s][v] = V::dot(sum[s][v], a, V::load(w));
            }
        }
    }
#pragma GCC unroll 8
    for (int s = 0; s < Strips; ++s) {
        for (int v = 0; v < V::kVectors; ++v) V::store(t.sums + (strip + s) * kStripColumns + v * kLanes, sum[s][v]);
    }
}

template <class V>
void vnni_row(const TileTask& t) {
    constexpr int kStreams = 4;
    int64_t strip = 0;
    for (; strip + kStreams <= t.strips; strip += kStreams) vnni_streams<V, kStreams>(t, strip);
    for (; strip < t.strips; ++strip) vnni_block<V, 1, 4>(strip_of(t, strip), 0);
}

template <class V>
void vnni_strip(const StripTask& t) {
    int64_t m = 0;
    for (; m + V::kRows <= t.rows; m += V::kRows) vnni_block<V, V::kRows, 1>(t, m);
    for (; m + 2 <= t.rows; m += 2) vnni_block<V, 2, 2>(t, m);
    if (m < t.rows) vnni_block<V, 1, 4>(t, m);
}

template <class V>
void vnni_dot(const TileTask& t) {
    t.rows == 1 ? vnni_row<V>(t) : each_strip<vnni_strip<V>>(t);
}

}  // namespace
}  // namespace qpipe::outlier_matmul
