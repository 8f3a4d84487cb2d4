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

// A quad's pattern for all eight quads of a vector; `step` is added from one quad of 128 bits to the next.
__attribute__((always_inline)) inline __m256i all_quads(const uint8_t (&pattern)[kQuad], int step) {
    int32_t quad;
    std::memcpy(&quad, pattern, sizeof quad);
    const __m256i steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3), _mm256_set1_epi32(step));
    return _mm256_add_epi32(_mm256_set1_epi32(quad), steps);
}

void expand(const uint8_t* q, int64_t depth, int64_t orders, uint8_t* forms) {
    const int64_t block = (orders + kUnorderedForms) * kCodeBlock;
    const auto store = [](uint8_t* to, __m256i bytes) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes); };
    for (int64_t form = 0; form < orders; ++form) {
        const __m256i inputs = all_quads(kOrders[form].input, 0x04040404), flip = all_quads(kOrders[form].flip, 0);
        for (int64_t k = 0; k < depth; k += 32) {
            uint8_t* to = forms + k / kCodeBlock * block + form * kCodeBlock + k % kCodeBlock;
            store(to, _mm256_xor_si256(_mm256_shuffle_epi8(load(q + k), inputs), flip));
        }
    }
    for (int64_t k = 0; k < depth; k += 32) {
        uint8_t* to = forms + k / kCodeBlock * block + orders * kCodeBlock + k % kCodeBlock;
        const __m256i centered = _mm256_xor_si256(load(q + k), _mm256_set1_epi8(static_cast<char>(0x80)));
        store(to, centered);
        store(to + kCodeBlock, _mm256_abs_epi8(centered));
    }
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
    const uint8_t* row[Rows];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) row[m] = q + m * t.q_stride;
    const auto add_quad = [&](const int8_t* weights, int64_t place) __attribute__((always_inline)) {
        const __m256i left = load(weights), right = load(weights + 32);
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
            const __m256i a = broadcast_quad(row[m] + place);
            add_pairs(sum[m][0], _mm256_maddubs_epi16(a, left));
            add_pairs(sum[m][1], _mm256_maddubs_epi16(a, right));
            keep(sum[m][0], sum[m][1]);
        }
    };
    int64_t j = 0;
    for (; j + 4 <= t.safe; j += 4, w += 4 * kStripColumns * kQuad) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) add_quad(w + i * kStripColumns * kQuad, t.order[j + i]);
    }
    for (; j < t.safe; ++j, w += kStripColumns * kQuad) add_quad(w, t.order[j]);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) keep(sum[m][0], sum[m][1]);
    for (j = t.safe; j < t.quads; ++j, w += kStripColumns * kQuad) {
        const __m256i left = load(w), right = load(w + 32);
        const uint8_t* quad = q + t.order[j];
#pragma GCC unroll 4
        for (int m = 0; m < Rows; ++m) {
            const __m256i a = broadcast_quad(quad + m * t.q_stride);
            const __m256i magnitude = broadcast_quad(quad + kCodeBlock + m * t.q_stride);
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
                     /*rows=*/8,
                     /*sums=*/1024,
                     /*depth=*/4,
                     {widen_float, widen_half, widen_bfloat},
                     gather,
                     encode,
                     expand,
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
