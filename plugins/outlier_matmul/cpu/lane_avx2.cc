// AVX2: |w| unsigned times a with w's sign. Both are within 127 (w may even be -128), so a pair of products is at most
// 2 * 128 * 127 = 32512 and vpmaddubsw never saturates: the sums are exact.
#include "lanes.h"

#if defined(__AVX2__)
#include "avx2.h"

namespace qpipe::outlier_matmul {
namespace {

__m256i load_step(const int8_t* from, bool whole) {
    if (whole) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

int32_t sum_of(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

template <int Rows, int Columns>
__attribute__((always_inline)) inline void step(const DotTask& t, const int8_t* q, const int8_t* w, bool whole,
                                                __m256i (&sum)[Rows][Columns]) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sign[Columns], magnitude[Columns];
#pragma GCC unroll 8
    for (int n = 0; n < Columns; ++n) {
        sign[n] = load_step(w + n * t.inputs_padded, whole);
        magnitude[n] = _mm256_abs_epi8(sign[n]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
        const __m256i a = load_step(q + m * t.q_stride, whole);
#pragma GCC unroll 8
        for (int n = 0; n < Columns; ++n) {
            const __m256i pairs = _mm256_maddubs_epi16(magnitude[n], _mm256_sign_epi8(a, sign[n]));
            sum[m][n] = _mm256_add_epi32(sum[m][n], _mm256_madd_epi16(pairs, ones));
        }
    }
}

// Rows x Columns sums. Stream: each weight is read once, from memory; fetch the next block's rows meanwhile.
template <int Rows, int Columns, bool Stream>
void block(const DotTask& t, int64_t m0, int64_t n0) {
    const int8_t* q = t.q + m0 * t.q_stride;
    const int8_t* w = t.w + n0 * t.inputs_padded;
    __m256i sum[Rows][Columns] = {};
    int64_t k = 0;
    for (; k + 32 <= t.inputs_padded; k += 32) {
        if (Stream && k % 64 == 0) {
#pragma GCC unroll 8
            for (int n = 0; n < Columns; ++n) {
                _mm_prefetch(reinterpret_cast<const char*>(w + k + (n + Columns) * t.inputs_padded), _MM_HINT_T0);
            }
        }
        step<Rows, Columns>(t, q + k, w + k, true, sum);
    }
    if (k < t.inputs_padded) step<Rows, Columns>(t, q + k, w + k, false, sum);
    for (int m = 0; m < Rows; ++m) {
        for (int n = 0; n < Columns; ++n) t.sums[(m0 + m) * t.sums_stride + n0 + n] = sum_of(sum[m][n]);
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
        case 1: return strip<1, 4, true>(t, m);
        default: return;
    }
}

constexpr Lane kLane{"avx2",
                     /*offset_codes=*/false,
                     {widen_float, widen_half, widen_bfloat},
                     amax_bits,
                     encode<false>,
                     dot,
                     {epilogue<Float32>, epilogue<Float16>, epilogue<BFloat16>}};

}  // namespace

const Lane* const kAvx2Lane = &kLane;

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
const Lane* const kAvx2Lane = nullptr;
}
#endif
