// AVX2. Few rows read w as it lies: one factor's magnitude, unsigned, times the other with its sign. Both are within 127,
// so a pair of products is at most 2 * 127 * 127 = 32258 and vpmaddubsw never saturates: the sums are exact. Many rows
// use 16-bit strips and vpmaddwd, exact as well, without the sign step and without sums across a vector.
#include "lanes.h"

#if defined(__AVX2__)
#include "avx2.h"

namespace qpipe::outlier_matmul {
namespace {

__m256i load_step(const int8_t* from, bool whole) {
    if (whole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Code behind a loop that needs registers makes GCC keep sums in memory inside the loop; this ends their life there.
__attribute__((always_inline)) inline void keep(__m256i& a, __m256i& b) { __asm__("" : "+x"(a), "+x"(b)); }

// The four sums across a, b, c and d.
__m128i sums_of(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// Takes the magnitude of whichever factor has fewer vectors here.
template <int Rows, int Columns>
__attribute__((always_inline)) inline void step(const DotTask& t, const int8_t* q, const int8_t* w, bool whole,
                                                __m256i (&sum)[Rows * Columns]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i weights[Columns], magnitude[Columns];
#pragma GCC unroll 8
    for (int n = 0; n < Columns; ++n) {
        weights[n] = load_step(w + n * t.inputs_padded, whole);
        magnitude[n] = _mm256_abs_epi8(weights[n]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
        const __m256i a = load_step(q + m * t.q_stride, whole);
        const __m256i a_magnitude = _mm256_abs_epi8(a);
#pragma GCC unroll 8
        for (int n = 0; n < Columns; ++n) {
            const __m256i pairs = Rows < Columns
                                      ? _mm256_maddubs_epi16(a_magnitude, _mm256_sign_epi8(weights[n], a))
                                      : _mm256_maddubs_epi16(magnitude[n], _mm256_sign_epi8(a, weights[n]));
            __m256i& total = sum[m * Columns + n];
            total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, ones));
        }
    }
}

// Rows x Columns sums. Stream: each weight is read once, from memory; fetch the next block's rows meanwhile.
template <int Rows, int Columns, bool Stream>
void block(const DotTask& t, int64_t m0, int64_t n0) {
    const int8_t* q = t.q + m0 * t.q_stride;
    const int8_t* w = t.w + n0 * t.inputs_padded;
    __m256i sum[Rows * Columns] = {};
    int64_t k = t.inputs_padded % 32;
    // The half step comes first: code behind the loop would make the compiler keep the sums in memory.
    if (k != 0) step<Rows, Columns>(t, q, w, false, sum);
    for (; k < t.inputs_padded; k += 32) {
        if (Stream && k % 64 < 32) {
#pragma GCC unroll 8
            for (int n = 0; n < Columns; ++n) {
                _mm_prefetch(reinterpret_cast<const char*>(w + k + (n + Columns) * t.inputs_padded), _MM_HINT_T0);
            }
        }
        step<Rows, Columns>(t, q + k, w + k, true, sum);
    }
    alignas(16) int32_t total[(Rows * Columns + 3) / 4 * 4];
#pragma GCC unroll 8
    for (int i = 0; i < Rows * Columns; ++i) keep(sum[i], sum[i]);
#pragma GCC unroll 8
    for (int i = 0; i < Rows * Columns; i += 4) {
        const auto at = [&sum](int j) { return j < Rows * Columns ? sum[j] : _mm256_setzero_si256(); };
        _mm_store_si128(reinterpret_cast<__m128i*>(total + i), sums_of(at(i), at(i + 1), at(i + 2), at(i + 3)));
    }
    for (int m = 0; m < Rows; ++m) {
        int32_t* sums = t.sums + (m0 + m) * t.sums_stride + n0;
        for (int n = 0; n < Columns; ++n) sums[n] = total[m * Columns + n];
    }
}

template <int Rows, int Columns, bool Stream>
void strip(const DotTask& t, int64_t m) {
    int64_t n = 0;
    for (; n + Columns <= t.columns; n += Columns) block<Rows, Columns, Stream>(t, m, n);
    for (; n < t.columns; ++n) block<Rows, 1, Stream>(t, m, n);
}

void dot(const DotTask& t) {
    int64_t m = 0;
    if (t.rows > 4) {
        for (; m + 4 <= t.rows; m += 4) strip<4, 2, false>(t, m);
    }
    switch (t.rows - m) {
        case 4: return strip<4, 2, true>(t, m);
        case 3: return strip<3, 2, true>(t, m);
        case 2: return strip<2, 4, true>(t, m);
        case 1: return strip<1, 8, true>(t, m);
        default: return;
    }
}

void encode_wide(const float* x, int64_t count, float inverse, int16_t* q) {
    alignas(32) int8_t codes[32];
    for (int64_t i = 0; i < count; i += 32) {
        const int64_t part = count - i < 32 ? count - i : 32;
        encode<false>(x + i, part, inverse, codes);
        for (int64_t j = 0; j < part; j += 16) {
            const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(codes + j));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i + j), _mm256_cvtepi8_epi16(bytes));
        }
    }
}

// Eight rows of eight 16-bit units to eight columns: unit j of all rows.
void transpose(__m128i (&row)[8]) {
    __m128i pair[8], four[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        pair[2 * i] = _mm_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
        pair[2 * i + 1] = _mm_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        four[4 * i] = _mm_unpacklo_epi32(pair[4 * i], pair[4 * i + 2]);
        four[4 * i + 1] = _mm_unpackhi_epi32(pair[4 * i], pair[4 * i + 2]);
        four[4 * i + 2] = _mm_unpacklo_epi32(pair[4 * i + 1], pair[4 * i + 3]);
        four[4 * i + 3] = _mm_unpackhi_epi32(pair[4 * i + 1], pair[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        row[2 * i] = _mm_unpacklo_epi64(four[i], four[i + 4]);
        row[2 * i + 1] = _mm_unpackhi_epi64(four[i], four[i + 4]);
    }
}

void make_strip(const int8_t* w, int64_t w_stride, int64_t columns, int64_t inputs, int16_t* strip) {
    for (int64_t half = 0; half < 2; ++half) {
        const int8_t* from[8];
        for (int64_t i = 0; i < 8; ++i) {
            const int64_t column = 8 * half + i;
            from[i] = w + (column < columns ? column : columns - 1) * w_stride;
        }
        for (int64_t k = 0; k < inputs; k += 16) {
            __m128i unit[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) unit[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i] + k));
            transpose(unit);
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                auto* to = reinterpret_cast<__m256i*>(strip + (k / 2 + i) * 32 + 16 * half);
                _mm256_store_si256(to, _mm256_cvtepi8_epi16(unit[i]));
            }
        }
    }
}

template <int Rows>
void strip_block(const StripTask& t, int64_t m0) {
    const int16_t* q = t.q + m0 * t.q_stride;
    __m256i sum[Rows][2] = {};
    for (int64_t k = 0; k < t.inputs; k += 2) {
        const auto* strip = reinterpret_cast<const __m256i*>(t.strip + k * kStripColumns);
        const __m256i left = _mm256_load_si256(strip), right = _mm256_load_si256(strip + 1);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) {
            int32_t two;
            std::memcpy(&two, q + m * t.q_stride + k, sizeof two);
            const __m256i a = _mm256_set1_epi32(two);
            sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(a, left));
            sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(a, right));
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) keep(sum[m][0], sum[m][1]);
    auto* sums = reinterpret_cast<__m256i*>(t.sums + m0 * kStripColumns);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
        for (int half = 0; half < 2; ++half) {
            const __m256i before = t.accumulate ? _mm256_load_si256(sums + 2 * m + half) : _mm256_setzero_si256();
            _mm256_store_si256(sums + 2 * m + half, _mm256_add_epi32(before, sum[m][half]));
        }
    }
}

// The strip stays in the first-level cache while the rows pass by.
void dot_strip(const StripTask& t) {
    int64_t m = 0;
    for (; m + 6 <= t.rows; m += 6) strip_block<6>(t, m);
    switch (t.rows - m) {
        case 5: return strip_block<5>(t, m);
        case 4: return strip_block<4>(t, m);
        case 3: return strip_block<3>(t, m);
        case 2: return strip_block<2>(t, m);
        case 1: return strip_block<1>(t, m);
        default: return;
    }
}

constexpr Lane kLane{"avx2",
                     /*offset_codes=*/false,
                     {widen_float, widen_half, widen_bfloat},
                     amax_bits,
                     encode<false>,
                     encode_wide,
                     dot,
                     make_strip,
                     dot_strip,
                     {epilogue<Float32>, epilogue<Float16>, epilogue<BFloat16>}};

}  // namespace

const Lane* const kAvx2Lane = &kLane;

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
const Lane* const kAvx2Lane = nullptr;
}
#endif
