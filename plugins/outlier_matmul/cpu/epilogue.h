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
        if (n + kVectors * V::kWidth <= task.columns) {
            for (int v = 0; v < kVectors; ++v) store_vector<V>(y + v * V::kWidth, value[r][v]);
            continue;
        }
        for (int v = 0; v < kVectors && n + v * V::kWidth < task.columns; ++v) {
            store_some<V>(y + v * V::kWidth, value[r][v], task.columns - n - v * V::kWidth);
        }
    }
}

// Rows first .. last - 1 pass by the outlier weights of a few strips, which stay in the first-level cache.
template <class V, class T, int Rows, int Strips>
void finish_rows(const EpilogueTask& task, int64_t first, int64_t last) {
    constexpr int64_t kColumns = Strips * kStripColumns;
    int64_t n = 0;
    for (; n + kColumns <= task.columns; n += kColumns) {
        for (int64_t m = first; m < last; m += Rows) finish_block<V, T, Rows, Strips>(task, m, n);
    }
    for (; n < task.columns; n += kStripColumns) {
        for (int64_t m = first; m < last; m += Rows) finish_block<V, T, Rows, 1>(task, m, n);
    }
}

template <class V, class T>
[[maybe_unused]] void epilogue(const EpilogueTask& task) {
    constexpr int kSingleRowStrips = 8 * V::kWidth / kStripColumns;  // 8 vectors: fewer would wait for each other
    const int64_t whole = task.rows / V::kRows * V::kRows;
    finish_rows<V, T, V::kRows, V::kStrips>(task, 0, whole);
    finish_rows<V, T, 1, kSingleRowStrips>(task, whole, task.rows);
}

}  // namespace
}  // namespace qpipe::outlier_matmul
