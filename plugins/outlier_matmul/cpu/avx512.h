// What the AVX-512 lanes share: the vector of floats of the epilogue and VNNI's vector of sums.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "avx2.h"
#include "lanes.h"

namespace qpipe::outlier_matmul {
namespace {

Gathered gather_wide(const float* x, const uint8_t* keep, int64_t count, float* out) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    int64_t total = 0;
    for (int64_t i = 0; i < count; i += 16) {
        uint16_t bits;
        std::memcpy(&bits, keep + i / 8, sizeof bits);
        if (count - i < 16) bits &= static_cast<uint16_t>((1u << (count - i)) - 1);
        const __m512 kept = _mm512_maskz_compress_ps(bits, _mm512_maskz_loadu_ps(bits, x + i));
        const int number = __builtin_popcount(bits);
        _mm512_mask_storeu_ps(out + total, static_cast<__mmask16>((1u << number) - 1), kept);
        largest = _mm512_max_epi32(largest, _mm512_and_si512(_mm512_castps_si512(kept), magnitude));
        total += number;
    }
    return {total, static_cast<uint32_t>(_mm512_reduce_max_epi32(largest))};
}

struct Zmm {
    using Type = __m512;
    static constexpr int64_t kWidth = 16;
    static constexpr int kRows = 8, kStrips = 2;  // an epilogue block: 16 vectors
    static Type set1(float v) { return _mm512_set1_ps(v); }
    static Type load(const float* from) { return _mm512_loadu_ps(from); }
    static Type to_float(const int32_t* from) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(from)); }
    static Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
    static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* to, Type v) { _mm512_storeu_ps(to, v); }
    static void store_half(uint16_t* to, Type v) {
        const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
    }
};

struct ZmmSums {  // a strip's row is one vector
    using Type = __m512i;
    static constexpr int kVectors = 1;
    static constexpr int kRows = 12;
    static Type zero() { return _mm512_setzero_si512(); }
    static Type load(const void* from) { return _mm512_loadu_si512(from); }
    static void store(void* to, Type v) { _mm512_storeu_si512(to, v); }
    static Type add(Type a, Type b) { return _mm512_add_epi32(a, b); }
    static Type sub(Type a, Type b) { return _mm512_sub_epi32(a, b); }
    static Type broadcast(const uint8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return _mm512_set1_epi32(quad);
    }
    static Type dot(Type sum, Type a, Type w) { return _mm512_dpbusd_epi32(sum, a, w); }
};

}  // namespace
}  // namespace qpipe::outlier_matmul
