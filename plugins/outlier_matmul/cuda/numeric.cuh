// Element types and the rounding rule of the contract (contract.py), all in float32.
#pragma once

#include "ptx.cuh"

namespace qpipe {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

QPIPE_DEVICE float to_float(float value) { return value; }
QPIPE_DEVICE float to_float(Half value) { return ptx::half_to_float(value.bits); }
QPIPE_DEVICE float to_float(BFloat16 value) { return ptx::bits_float(static_cast<uint32_t>(value.bits) << 16); }

template <class T>
QPIPE_DEVICE T from_float(float value);
template <>
QPIPE_DEVICE float from_float<float>(float value) {
    return value;
}
template <>
QPIPE_DEVICE Half from_float<Half>(float value) {
    return {ptx::float_to_half(value)};
}
template <>
QPIPE_DEVICE BFloat16 from_float<BFloat16>(float value) {
    return {ptx::float_to_bfloat16(value)};
}

// Two neighbouring 16-bit elements as one word, the first in the low half.
template <class T>
QPIPE_DEVICE uint32_t pack_pair(float first, float second) {
    return from_float<T>(first).bits | (static_cast<uint32_t>(from_float<T>(second).bits) << 16);
}

constexpr float kOneDigitCode = 127.0f;
constexpr float kTwoDigitCode = 127.0f * 128.0f + 63.0f;
constexpr float kSmallestRowScale = 1.17549435e-38f;  // 2^-126
constexpr int kMostNewOutliers = 64;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNaNBits = 0x7fc00000u;

// Magnitudes compare as unsigned integers, and an infinity or a NaN is larger than every number: one integer maximum
// finds both the amplitude of a row and whether the row is poisoned.
QPIPE_DEVICE uint32_t magnitude_bits(float value) { return ptx::float_bits(value) & 0x7fffffffu; }

struct RowScale {
    float scale;     // NaN: the row is poisoned
    float inverse;   // 0: every code of the row is 0
};

// Scale of a row from the largest magnitudes of its one-digit and of its two-digit elements.
QPIPE_DEVICE RowScale row_scale(uint32_t amax_bits, uint32_t wide_bits) {
    if (amax_bits >= kInfinityBits || wide_bits >= kInfinityBits) return {ptx::bits_float(kNaNBits), 0.0f};
    float scale = ptx::divide(ptx::bits_float(amax_bits), kOneDigitCode);
    const float wide = ptx::divide(ptx::bits_float(wide_bits), kTwoDigitCode);
    scale = wide > scale ? wide : scale;
    scale = scale > kSmallestRowScale ? scale : kSmallestRowScale;
    return {scale, ptx::divide(1.0f, scale)};
}

// Code of a value, within +-`bound`; 0 in a poisoned row, whatever the value.
QPIPE_DEVICE int32_t code_of(float value, float inverse, float bound) {
    if (inverse == 0.0f) return 0;
    const float code = ptx::round_even(value * inverse);
    return static_cast<int32_t>(code > bound ? bound : code < -bound ? -bound : code);
}

// Digits of a two-digit code q = 128 * high + low; -64 <= low <= 63.
QPIPE_DEVICE int32_t high_digit(int32_t code) { return (code + 64) >> 7; }

}  // namespace qpipe
