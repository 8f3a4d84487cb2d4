// From sums to y: scales, bias, outlier columns, one store. For any vector of floats V (see avx2.h, avx512.h).
#pragma once

#include "half.h"
#include "lanes.h"

namespace qpipe::outlier_matmul {
namespace {

// Element types of y beside float.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

template <class V>
void store_vector(float* y, typename V::Type value) {
    V::store(y, value);
}

template <class V>
void store_vector(Half* y, typename V::Type value) {
    V::store_half(&y->bits, value);
}

template <class V>
void store_vector(BFloat* y, typename V::Type value) {
    float lanes[V::kWidth];
    V::store(lanes, value);
    for (int i = 0; i < V::kWidth; ++i) y[i].bits = float_to_bfloat(lanes[i]);
}

// Up to a vector of elements of y.
template <class V, class T>
void store_some(T* y, typename V::Type value, int64_t count) {
    if (count >= V::kWidth) return store_vector<V>(y, value);
    T whole[V::kWidth];
    store_vector<V>(whole, value);
    for (int64_t i = 0; i < count; ++i) y[i] = whole[i];
}

// Rows x Strips of y, in registers until they are stored.
template <class V, class T, int Rows, int Strips>
void finish_block(const EpilogueTask& task, int64_t m, int64_t n) {
    constexpr int kParts = kStripColumns / V::kWidth, kVectors = Strips * kParts;
    typename V::Type value[Rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        const typename V::Type x_scale = V::set1(task.x_scale[m + r]);
        for (int v = 0; v < kVectors; ++v) {
            const int64_t column = n + v * V::kWidth;
            const typename V::Type sums = V::to_float(task.sums + (m + r) * task.sums_stride + column);
            value[r][v] = V::fma(V::mul(sums, x_scale), V::load(task.w_scale + column), V::load(task.bias + column));
        }
    }
    const float* x_outlier = task.x_outlier + m * task.outliers;
    const float* w_outlier = task.w_outlier + n * task.outliers;
    for (int64_t o = 0; o < task.outliers; ++o, w_outlier += kStripColumns) {
        typename V::Type weights[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            weights[v] = V::load(w_outlier + v / kParts * task.outliers * kStripColumns + v % kParts * V::kWidth);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const typename V::Type x = V::set1(x_outlier[r * task.outliers + o]);
            for (int v = 0; v < kVectors; ++v) value[r][v] = V::fma(x, weights[v], value[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
        T* y = static_cast<T*>(task.y) + (m + r) * task.y_stride + n;
        for (int v = 0; v < kVectors && n + v * V::kWidth < task.columns; ++v) {
            store_some<V>(y + v * V::kWidth, value[r][v], task.columns - n - v * V::kWidth);
        }
    }
}

template <class V, class T, int Strips>
void finish_strips(const EpilogueTask& task, int64_t n) {
    int64_t m = 0;
    for (; m + V::kRows <= task.rows; m += V::kRows) finish_block<V, T, V::kRows, Strips>(task, m, n);
    for (; m < task.rows; ++m) finish_block<V, T, 1, Strips>(task, m, n);
}

// Rows pass by the outlier weights of a few strips, which stay in the first-level cache.
template <class V, class T>
[[maybe_unused]] void epilogue(const EpilogueTask& task) {
    constexpr int64_t kColumns = V::kStrips * kStripColumns;
    int64_t n = 0;
    for (; n + kColumns <= task.columns; n += kColumns) finish_strips<V, T, V::kStrips>(task, n);
    for (; n < task.columns; n += kStripColumns) finish_strips<V, T, 1>(task, n);
}

}  // namespace
}  // namespace qpipe::outlier_matmul
