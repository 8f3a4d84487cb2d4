// Inner loops that all AVX2 lanes share: conversion and quantization; and the epilogue's vector. Needs AVX2, FMA, F16C.
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

// Positions of the set bits of a byte, in order; then -1.
struct SetBits {
    int8_t position[256][8] = {};

    constexpr SetBits() {
        for (int byte = 0; byte < 256; ++byte) {
            int next = 0;
            for (int bit = 0; bit < 8; ++bit) {
                if (byte >> bit & 1) position[byte][next++] = static_cast<int8_t>(bit);
            }
            while (next < 8) position[byte][next++] = -1;
        }
    }
};
constexpr SetBits kSetBits;

[[maybe_unused]] Gathered gather(const float* x, const uint8_t* keep, int64_t count, float* out) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    Gathered found{0, 0};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const uint8_t bits = keep[i / 8];
        if (bits == 0xff) {  // by far the most frequent
            const __m256 kept = _mm256_loadu_ps(x + i);
            _mm256_storeu_ps(out + found.count, kept);
            largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(kept), magnitude));
            found.count += 8;
            continue;
        }
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.position[bits]));
        const __m256i positions = _mm256_cvtepi8_epi32(bytes);
        const __m256 kept = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + i), positions);
        // A whole vector: what it writes too many lies before x[i + 8], and so has been read.
        _mm256_storeu_ps(out + found.count, kept);
        // Magnitudes are non-negative as signed integers, and order as the floats do; the rest is negative.
        const __m256i sizes = _mm256_and_si256(_mm256_castps_si256(kept), magnitude);
        largest = _mm256_max_epi32(largest, _mm256_or_si256(sizes, _mm256_srai_epi32(positions, 31)));
        found.count += __builtin_popcount(bits);
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), largest);
    for (uint32_t lane : lanes) found.amax_bits = lane > found.amax_bits ? lane : found.amax_bits;
    for (; i < count; ++i) {
        if (!(keep[i / 8] >> i % 8 & 1)) continue;
        const uint32_t size = as_bits(x[i]) & 0x7fffffffu;
        found.amax_bits = size > found.amax_bits ? size : found.amax_bits;
        out[found.count++] = x[i];
    }
    return found;
}

[[maybe_unused]] void encode(const float* x, int64_t count, float inverse, uint8_t* q) {
    const __m256 factor = _mm256_set1_ps(inverse);
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
            part[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + 8 * j), factor));
        }
        const __m256i words = _mm256_packs_epi32(part[0], part[1]);
        const __m256i more = _mm256_packs_epi32(part[2], part[3]);
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words, more), order);
        // q has room for a whole vector: its rows are padded.
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm256_xor_si256(bytes, flip));
    }
}

struct Ymm {
    using Type = __m256;
    static constexpr int64_t kWidth = 8;
    static constexpr int kRows = 4, kStrips = 1;  // an epilogue block: 8 vectors, 2 weights and 1 activation
    static Type set1(float v) { return _mm256_set1_ps(v); }
    static Type load(const float* from) { return _mm256_loadu_ps(from); }
    static Type to_float(const int32_t* from) {
        return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static Type mul(Type a, Type b) { return _mm256_mul_ps(a, b); }
    static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* to, Type v) { _mm256_storeu_ps(to, v); }
    static void store_half(uint16_t* to, Type v) {
        const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
    }
};

}  // namespace
}  // namespace qpipe::outlier_matmul
