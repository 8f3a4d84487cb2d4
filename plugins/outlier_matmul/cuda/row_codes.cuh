// Rows of X as int8 codes, sixteen elements at a time: what the row kernel and the small-M kernel share.
//
// A thread sees sixteen neighbouring elements as floats, outlier and padding columns already zero. Two passes: `RowFacts`
// collects amplitudes, `encode` turns the elements into codes.
#pragma once

#include "args.cuh"

namespace qpipe {

constexpr int kElements = 16;

struct Sixteen {
    float v[kElements];
};

// Sixteen elements from `column` on, zero from column `k` on. `vectors`: every row begins at a multiple of 16 bytes.
template <class T>
QPIPE_DEVICE Sixteen load_sixteen(const T* row, int column, int k, bool vectors) {
    Sixteen e;
    alignas(16) T raw[kElements];
    if (vectors && column + kElements <= k) {
        QPIPE_UNROLL
        for (int i = 0; i < static_cast<int>(sizeof raw) / 16; ++i) {
            reinterpret_cast<Bytes16*>(raw)[i] = reinterpret_cast<const Bytes16*>(row + column)[i];
        }
        QPIPE_UNROLL
        for (int i = 0; i < kElements; ++i) e.v[i] = to_float(raw[i]);
    } else {
        QPIPE_UNROLL
        for (int i = 0; i < kElements; ++i) e.v[i] = column + i < k ? to_float(row[column + i]) : 0.0f;
    }
    return e;
}

// Amplitudes of a row, as bits. `met` counts the elements beyond the limit, whose amplitude is `wide`.
struct RowFacts {
    uint32_t amax;
    uint32_t wide;
    uint32_t met;
};

QPIPE_DEVICE void observe(RowFacts& facts, const Sixteen& e, float limit) {
    QPIPE_UNROLL
    for (int i = 0; i < kElements; ++i) {
        const uint32_t bits = magnitude_bits(e.v[i]);
        const bool beyond = limit > 0 && ptx::bits_float(bits) > limit;  // false for a NaN, as in the contract
        if (beyond) {
            facts.wide = bits > facts.wide ? bits : facts.wide;
            ++facts.met;
        } else {
            facts.amax = bits > facts.amax ? bits : facts.amax;
        }
    }
}

// Fold the facts of the threads of a warp into `shared`; every lane calls it.
QPIPE_DEVICE void fold_facts(RowFacts* shared, const RowFacts& facts, float limit) {
    const bool first = ptx::thread() % 32 == 0;
    const uint32_t amax = ptx::warp_max(facts.amax);
    if (first) ptx::atomic_max(&shared->amax, amax);
    if (limit > 0) {
        const uint32_t wide = ptx::warp_max(facts.wide);
        const uint32_t met = ptx::warp_sum(facts.met);
        if (first && met != 0) {
            ptx::atomic_max(&shared->wide, wide);
            ptx::atomic_add(&shared->met, met);
        }
    }
}

// How a row is encoded.
struct RowRule {
    RowScale scale;
    float limit;  // elements beyond it get two digits; 0: none does
};

QPIPE_DEVICE RowRule row_rule(const RowFacts& facts, float limit) {
    const bool loud = facts.met > kMostNewOutliers;
    if (!loud) return {row_scale(facts.amax, facts.wide), facts.met != 0 ? limit : 0.0f};
    return {row_scale(facts.amax > facts.wide ? facts.amax : facts.wide, 0), 0.0f};
}

// High digits of one row: at most 64 (column, digit) pairs.
struct HighDigits {
    uint32_t* count;
    int32_t* column;
    int32_t* digit;
};

// Codes (low digits) of sixteen elements; high digits that are not zero go to `high`.
QPIPE_DEVICE Bytes16 encode(const Sixteen& e, int column, const RowRule& rule, const HighDigits& high) {
    Bytes16 packed{};
    QPIPE_UNROLL
    for (int i = 0; i < kElements; ++i) {
        int32_t code;
        if (rule.limit > 0 && ptx::bits_float(magnitude_bits(e.v[i])) > rule.limit) {
            code = code_of(e.v[i], rule.scale.inverse, kTwoDigitCode);
            const int32_t digit = high_digit(code);
            if (digit != 0) {
                const uint32_t slot = ptx::atomic_add(high.count, 1u);
                high.column[slot] = column + i;
                high.digit[slot] = digit;
            }
            code -= digit * 128;
        } else {
            code = code_of(e.v[i], rule.scale.inverse, kOneDigitCode);
        }
        packed.word[i / 4] |= (static_cast<uint32_t>(code) & 0xffu) << (i % 4 * 8);
    }
    return packed;
}

}  // namespace qpipe
