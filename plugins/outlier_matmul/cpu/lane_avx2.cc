// AVX2: vpmaddubsw, vpmaddwd and an addition per 32 products of a safe quad. In the others |a| is multiplied by w with
// a's sign: both are within 127, so that a pair is at most 2 * 127 * 127 = 32258 and nothing saturates either.
#include "lanes.h"

#if defined(__AVX2__)
#include "avx2.h"
#include "epilogue.h"

namespace qpipe::outlier_matmul {
namespace {

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

__m256i broadcast_quad(const uint8_t* q) {
    int32_t quad;
    std::memcpy(&quad, q, sizeof quad);
    return _mm256_set1_epi32(quad);
}

// Code behind a loop that needs registers makes GCC keep sums in memory inside the loop; this ends their life there.
__attribute__((always_inline)) inline void keep(__m256i& a, __m256i& b) { __asm__("" : "+x"(a), "+x"(b)); }

__attribute__((always_inline)) inline void add_pairs(__m256i& sum, __m256i pairs) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

template <int Rows>
void block(const StripTask& t, int64_t m0) {
    const uint8_t* q = t.q + m0 * t.q_stride;
    const int8_t* w = t.strip;
    __m256i sum[Rows][2];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
        sum[m][0] = _mm256_sub_epi32(_mm256_setzero_si256(), load(t.correction));
        sum[m][1] = _mm256_sub_epi32(_mm256_setzero_si256(), load(t.correction + 8));
    }
    for (int64_t j = 0; j < t.safe; ++j, w += kStripColumns * kQuad) {
        const __m256i left = load(w), right = load(w + 32);
        const uint8_t* quad = q + t.order[j];
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
            const __m256i a = broadcast_quad(quad + m * t.q_stride);
            add_pairs(sum[m][0], _mm256_maddubs_epi16(a, left));
            add_pairs(sum[m][1], _mm256_maddubs_epi16(a, right));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) keep(sum[m][0], sum[m][1]);
    for (int64_t j = t.safe; j < t.quads; ++j, w += kStripColumns * kQuad) {
        const __m256i left = load(w), right = load(w + 32);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
            const __m256i code = broadcast_quad(q + m * t.q_stride + t.order[j]);
            const __m256i a = _mm256_xor_si256(code, _mm256_set1_epi8(static_cast<char>(0x80)));
            const __m256i magnitude = _mm256_abs_epi8(a);
            add_pairs(sum[m][0], _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(left, a)));
            add_pairs(sum[m][1], _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(right, a)));
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) {
        keep(sum[m][0], sum[m][1]);
        auto* sums = reinterpret_cast<__m256i*>(t.sums + (m0 + m) * t.sums_stride);
        _mm256_store_si256(sums, sum[m][0]);
        _mm256_store_si256(sums + 1, sum[m][1]);
    }
}

void dot(const StripTask& t) {
    int64_t m = 0;
    for (; m + 4 <= t.rows; m += 4) block<4>(t, m);
    switch (t.rows - m) {
        case 3: return block<3>(t, m);
        case 2: return block<2>(t, m);
        case 1: return block<1>(t, m);
        default: return;
    }
}

constexpr Lane kLane{"avx2",
                     /*saturates=*/true,
                     /*depth=*/16,
                     {widen_float, widen_half, widen_bfloat},
                     gather,
                     encode,
                     each_strip<dot>,
                     {epilogue<Ymm, float>, epilogue<Ymm, Half>, epilogue<Ymm, BFloat>}};

}  // namespace

const Lane* const kAvx2Lane = &kLane;

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
const Lane* const kAvx2Lane = nullptr;
}
#endif
