// 256-bit lanes with offset codes. Compiled once with AVX-VNNI (the lane "avxvnni"), and once with AVX2 alone, where
// wider arithmetic stands in for the one instruction (the lane "avx2-offset", for tests).
#include "lanes.h"

#if defined(__AVX2__) && (defined(__AVXVNNI__) || defined(QPIPE_EMULATE_VNNI))
#include "avx2.h"
#include "dot_offset.h"

namespace qpipe::outlier_matmul {
namespace {

struct Vector {
    using Type = __m256i;
    static constexpr int64_t kBytes = 32;
    static constexpr int kColumns = 3;
    static Type zero() { return _mm256_setzero_si256(); }
    static Type load(const int8_t* from, int64_t bytes) {
        if (bytes == kBytes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static Type dot(Type sum, Type a, Type w) {
#ifdef QPIPE_EMULATE_VNNI
        const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(a)),
                                              _mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)));
        const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(a, 1)),
                                               _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1)));
        return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
#else
        return _mm256_dpbusd_avx_epi32(sum, a, w);
#endif
    }
    static int32_t sum_of(Type v) {
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
    }
};

#ifdef QPIPE_EMULATE_VNNI
constexpr const char* kName = "avx2-offset";
#else
constexpr const char* kName = "avxvnni";
#endif

constexpr Lane kLane{kName,
                     /*offset_codes=*/true,
                     {widen_float, widen_half, widen_bfloat},
                     amax_bits,
                     encode<true>,
                     /*encode_wide=*/nullptr,
                     offset_dot<Vector>,
                     /*make_strip=*/nullptr,
                     /*dot_strip=*/nullptr,
                     {epilogue<Float32>, epilogue<Float16>, epilogue<BFloat16>}};

}  // namespace

#ifdef QPIPE_EMULATE_VNNI
const Lane* const kAvx2OffsetLane = &kLane;
#else
const Lane* const kAvxVnniLane = &kLane;
#endif

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
#ifdef QPIPE_EMULATE_VNNI
const Lane* const kAvx2OffsetLane = nullptr;
#else
const Lane* const kAvxVnniLane = nullptr;
#endif
}  // namespace qpipe::outlier_matmul
#endif
