// Inner loops that all AVX2 lanes share: conversion, quantization, epilogue. Needs AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "half.h"
#include "lanes.h"

namespace qpipe::outlier_matmul {
namespace {

[[maybe_unused]] void widen_float(const void* x, int64_t count, float* out) {
    std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
}

[[maybe_unused]] void widen_half(const void* x, int64_t count, float* out) {
    const auto* words = static_cast<const uint16_t*>(x);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
    }
    for (; i < count; ++i) out[i] = half_to_float(words[i]);
}

[[maybe_unused]] void widen_bfloat(const void* x, int64_t count, float* out) {
    const auto* words = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = bfloat_to_float(words[i]);
}

[[maybe_unused]] uint32_t amax_bits(const float* x, int64_t count) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    __m256i largest[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int part = 0; part < 2; ++part) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i + 8 * part));
            // Magnitudes are non-negative as signed integers, and order as the floats do.
            largest[part] = _mm256_max_epi32(largest[part], _mm256_and_si256(bits, mask));
        }
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_max_epi32(largest[0], largest[1]));
    uint32_t result = 0;
    for (uint32_t lane : lanes) result = lane > result ? lane : result;
    for (; i < count; ++i) {
        const uint32_t magnitude = as_bits(x[i]) & 0x7fffffffu;
        result = magnitude > result ? magnitude : result;
    }
    return result;
}

[[maybe_unused]] void encode(const float* x, int64_t count, float inverse, uint8_t* q) {
    const __m256 factor = _mm256_set1_ps(inverse);
    const __m256 high = _mm256_set1_ps(127.0f), low = _mm256_set1_ps(-127.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes the lane-wise packing
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));  // adds 128
    for (int64_t i = 0; i < count; i += 32) {
        alignas(32) float tail[32] = {};
        const float* from = x + i;
        if (i + 32 > count) {
            std::memcpy(tail, from, static_cast<size_t>(count - i) * sizeof(float));
            from = tail;
        }
        __m256i part[4];
        for (int j = 0; j < 4; ++j) {
            const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(from + 8 * j), factor);
            part[j] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(scaled, high), low));
        }
        const __m256i words = _mm256_packs_epi32(part[0], part[1]);
        const __m256i more = _mm256_packs_epi32(part[2], part[3]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), order);
        // q has room for a whole vector: its rows are padded.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_xor_si256(bytes, flip));
    }
}

struct Float32 {
    using Element = float;
    static void store(float* y, __m256 value) { _mm256_storeu_ps(y, value); }
};

struct Float16 {
    using Element = uint16_t;
    static void store(uint16_t* y, __m256 value) {
        const __m128i half = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(y), half);
    }
};

struct BFloat16 {
    using Element = uint16_t;
    static void store(uint16_t* y, __m256 value) {
        alignas(32) float lanes[8];
        _mm256_store_ps(lanes, value);
        for (int i = 0; i < 8; ++i) y[i] = float_to_bfloat(lanes[i]);
    }
};

// Up to 8 elements of y.
template <class T>
void store_some(typename T::Element* y, __m256 value, int64_t count) {
    if (count >= 8) return T::store(y, value);
    typename T::Element whole[8];
    T::store(whole, value);
    for (int64_t i = 0; i < count; ++i) y[i] = whole[i];
}

// Rows x 16 columns of y.
template <class T, int Rows>
void finish_block(const EpilogueTask& task, int64_t m, int64_t n) {
    __m256 value[Rows][2];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
        const __m256 x_scale = _mm256_set1_ps(task.x_scale[m + r]);
        for (int v = 0; v < 2; ++v) {
            const auto* sums = reinterpret_cast<const __m256i*>(task.sums + (m + r) * task.sums_stride + n + 8 * v);
            const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_loadu_si256(sums)), x_scale);
            const __m256 bias = _mm256_loadu_ps(task.bias + n + 8 * v);
            value[r][v] = _mm256_fmadd_ps(scaled, _mm256_loadu_ps(task.w_scale + n + 8 * v), bias);
        }
    }
    const float* x_outlier = task.x_outlier + m * task.outliers;
    const float* w_outlier = task.w_outlier + n * task.outliers;
    for (int64_t o = 0; o < task.outliers; ++o) {
        const __m256 left = _mm256_loadu_ps(w_outlier + o * 8);
        const __m256 right = _mm256_loadu_ps(w_outlier + (task.outliers + o) * 8);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const __m256 x = _mm256_broadcast_ss(x_outlier + r * task.outliers + o);
            value[r][0] = _mm256_fmadd_ps(x, left, value[r][0]);
            value[r][1] = _mm256_fmadd_ps(x, right, value[r][1]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
        auto* y = static_cast<typename T::Element*>(task.y) + (m + r) * task.y_stride + n;
        store_some<T>(y, value[r][0], task.columns - n);
        if (n + 8 < task.columns) store_some<T>(y + 8, value[r][1], task.columns - n - 8);
    }
}

template <class T>
[[maybe_unused]] void epilogue(const EpilogueTask& task) {
    int64_t m = 0;
    for (; m + 4 <= task.rows; m += 4) {
        for (int64_t n = 0; n < task.columns; n += 16) finish_block<T, 4>(task, m, n);
    }
    for (; m < task.rows; ++m) {
        for (int64_t n = 0; n < task.columns; n += 16) finish_block<T, 1>(task, m, n);
    }
}

}  // namespace
}  // namespace qpipe::outlier_matmul
