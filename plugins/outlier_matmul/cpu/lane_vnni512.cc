// AVX-512 with VNNI and BW, offset codes.
#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "avx2.h"
#include "dot_offset.h"

namespace qpipe::outlier_matmul {
namespace {

struct Vector {
    using Type = __m512i;
    static constexpr int64_t kBytes = 64;
    static constexpr int kColumns = 4;
    static Type zero() { return _mm512_setzero_si512(); }
    static Type load(const int8_t* from, int64_t bytes) {
        if (bytes == kBytes) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi8((1ull << bytes) - 1, from);
    }
    static Type dot(Type sum, Type a, Type w) { return _mm512_dpbusd_epi32(sum, a, w); }
    static int32_t sum_of(Type v) { return _mm512_reduce_add_epi32(v); }
};

constexpr Lane kLane{"avx512vnni",
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

const Lane* const kAvx512VnniLane = &kLane;

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
const Lane* const kAvx512VnniLane = nullptr;
}
#endif
