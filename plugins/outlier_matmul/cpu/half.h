// float16 and bfloat16 from and to float32 in plain integer arithmetic, round half to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace qpipe::outlier_matmul {
namespace {  // every lane gets its own copy: see lanes.h

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

[[maybe_unused]] inline float half_to_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 0x1fu;
    const uint32_t fraction = half & 0x3ffu;
    if (exponent == 0) return as_float(as_bits(static_cast<float>(fraction) * 0x1p-24f) | sign);
    if (exponent == 31) return as_float(sign | 0x7f800000u | (fraction << 13));
    return as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}

[[maybe_unused]] inline uint16_t float_to_half(float value) {
    const uint32_t bits = as_bits(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 puts the wanted bits at the end of the fraction, rounded by the addition itself.
        return sign | static_cast<uint16_t>(as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u);
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

[[maybe_unused]] inline float bfloat_to_float(uint16_t value) { return as_float(static_cast<uint32_t>(value) << 16); }

[[maybe_unused]] inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace qpipe::outlier_matmul
