// One tensor-core step: 16 x 32 bytes of A times 8 x 32 bytes of B into four accumulators, by element type.
// `kRowBlocks`: how many 16-row blocks of A may wait in registers; one where a step needs many of its own.
#pragma once

#include "numeric.cuh"

namespace qpipe {

struct Int8Step {
    using Accumulator = int32_t;
    static constexpr int kRowBlocks = 4;
    QPIPE_DEVICE static void multiply(int32_t* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_s8(c, a, b0, b1);
    }
};

// The same product for chips whose int8 tensor rate was cut: codes are widened to float16, exactly. Sums are float32,
// exact below 2^24. The k16 instruction takes codes 0, 1 (then 2, 3) of each word: a permutation of K, the same for A
// and B.
struct Int8AsHalfStep {
    using Accumulator = float;
    static constexpr int kRowBlocks = 4;

    // Codes of bytes `selector` as two float16: 0x6400 + u is 1024 + u, and u is the code + 128.
    QPIPE_DEVICE static uint32_t widen(uint32_t codes, uint32_t selector) {
        return ptx::subtract_half2(ptx::permute_bytes(codes ^ 0x80808080u, 0x64646464u, selector), 0x64806480u);
    }

    QPIPE_DEVICE static void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        constexpr uint32_t kSelectors[2] = {0x4140u, 0x4342u};
        QPIPE_UNROLL
        for (uint32_t selector : kSelectors) {
            const uint32_t wide[4] = {widen(a[0], selector), widen(a[1], selector), widen(a[2], selector),
                                      widen(a[3], selector)};
            ptx::mma_f16(c, wide, widen(b0, selector), widen(b1, selector));
        }
    }
};

// The outlier product, float accumulators, by element type.
template <class T>
struct FloatStep;

template <>
struct FloatStep<Half> {
    using Accumulator = float;
    static constexpr int kRowBlocks = 4;
    QPIPE_DEVICE static void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_f16(c, a, b0, b1);
    }
};

template <>
struct FloatStep<BFloat16> {
    using Accumulator = float;
    static constexpr int kRowBlocks = 4;
    QPIPE_DEVICE static void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_bf16(c, a, b0, b1);
    }
};

// float32 as two tf32 parts, three products: about 21 bits instead of tf32's 11.
template <>
struct FloatStep<float> {
    using Accumulator = float;
    static constexpr int kRowBlocks = 1;

    struct Parts {
        uint32_t high;   // x rounded to tf32
        uint32_t low;    // the rest; 0 where x is not finite, so that an infinity stays one
        uint32_t cross;  // high, but 0 where x is not finite
    };

    QPIPE_DEVICE static uint32_t round_tf32(uint32_t bits) { return (bits + 0x1000u) & 0xffffe000u; }

    QPIPE_DEVICE static Parts split(uint32_t bits) {
        // Masks instead of a branch, which would cost registers.
        const uint32_t finite = (bits & kInfinityBits) == kInfinityBits ? 0 : ~0u;
        const uint32_t high = (round_tf32(bits) & finite) | (bits & ~finite);
        const float rest = ptx::bits_float(bits) - ptx::bits_float(high);
        return {high, round_tf32(ptx::float_bits(rest)) & finite, high & finite};
    }

    QPIPE_DEVICE static void multiply(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        uint32_t high[4], low[4], cross[4];
        QPIPE_UNROLL
        for (int i = 0; i < 4; ++i) {
            const Parts parts = split(a[i]);
            high[i] = parts.high;
            low[i] = parts.low;
            cross[i] = parts.cross;
        }
        const Parts first = split(b0), second = split(b1);
        ptx::mma_tf32(c, cross, first.low, second.low);
        ptx::mma_tf32(c, low, first.cross, second.cross);
        ptx::mma_tf32(c, high, first.high, second.high);
    }
};

}  // namespace qpipe
