// Product for instructions of VNNI's kind, unsigned x signed: codes are stored as q + 128, and what that adds,
// 128 * sum_k w[n, k], is taken off at the end. Four products are summed into 32 bits at once: exact.
//
// Vector policy V: Type, kBytes, zero(), load(p), load_tail(p, bytes), dot(sum, unsigned, signed), sum_of(v).
#pragma once

#include "lanes.h"

namespace qpipe::outlier_matmul {
namespace {

template <class V, int Rows, int Columns>
__attribute__((always_inline)) inline void offset_step(const DotTask& t, const int8_t* q, const int8_t* w, int64_t bytes,
                                                       typename V::Type (&sum)[Rows][Columns]) {
    typename V::Type weights[Columns];
#pragma GCC unroll 8
    for (int n = 0; n < Columns; ++n) weights[n] = V::load(w + n * t.inputs_padded, bytes);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
        const typename V::Type a = V::load(q + m * t.q_stride, bytes);
#pragma GCC unroll 8
        for (int n = 0; n < Columns; ++n) sum[m][n] = V::dot(sum[m][n], a, weights[n]);
    }
}

template <class V, int Rows, int Columns>
void offset_block(const DotTask& t, int64_t m0, int64_t n0) {
    const int8_t* q = t.q + m0 * t.q_stride;
    const int8_t* w = t.w + n0 * t.inputs_padded;
    typename V::Type sum[Rows][Columns];
    for (int m = 0; m < Rows; ++m) {
        for (int n = 0; n < Columns; ++n) sum[m][n] = V::zero();
    }
    int64_t k = 0;
    for (; k + V::kBytes <= t.inputs_padded; k += V::kBytes) {
        offset_step<V, Rows, Columns>(t, q + k, w + k, V::kBytes, sum);
    }
    if (k < t.inputs_padded) offset_step<V, Rows, Columns>(t, q + k, w + k, t.inputs_padded - k, sum);
    for (int m = 0; m < Rows; ++m) {
        for (int n = 0; n < Columns; ++n) {
            t.sums[(m0 + m) * t.sums_stride + n0 + n] = V::sum_of(sum[m][n]) - 128 * t.column_sum[n0 + n];
        }
    }
}

template <class V, int Rows, int Columns>
void offset_strip(const DotTask& t, int64_t m) {
    int64_t n = 0;
    for (; n + Columns <= t.columns; n += Columns) offset_block<V, Rows, Columns>(t, m, n);
    for (; n < t.columns; ++n) offset_block<V, Rows, 1>(t, m, n);
}

template <class V>
void offset_dot(const DotTask& t) {
    int64_t m = 0;
    for (; m + 4 <= t.rows; m += 4) offset_strip<V, 4, V::kColumns>(t, m);
    for (; m < t.rows; ++m) offset_strip<V, 1, V::kColumns>(t, m);
}

}  // namespace
}  // namespace qpipe::outlier_matmul
