// AVX-512 with VNNI: a strip's row is one vector.
#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "avx2.h"
#include "dot_vnni.h"

namespace qpipe::outlier_matmul {
namespace {

struct Vector {
    using Type = __m512i;
    static constexpr int kVectors = 1;
    static constexpr int kRows = 12;
    static Type zero() { return _mm512_setzero_si512(); }
    static Type load(const void* from) { return _mm512_loadu_si512(from); }
    static void store(void* to, Type v) { _mm512_storeu_si512(to, v); }
    static Type sub(Type a, Type b) { return _mm512_sub_epi32(a, b); }
    static Type broadcast(const uint8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return _mm512_set1_epi32(quad);
    }
    static Type dot(Type sum, Type a, Type w) { return _mm512_dpbusd_epi32(sum, a, w); }
};

constexpr Lane kLane{"avx512vnni",
                     /*saturates=*/false,
                     {widen_float, widen_half, widen_bfloat},
                     amax_bits,
                     encode,
                     vnni_dot<Vector>,
                     {epilogue<Float32>, epilogue<Float16>, epilogue<BFloat16>}};

}  // namespace

const Lane* const kAvx512VnniLane = &kLane;

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
const Lane* const kAvx512VnniLane = nullptr;
}
#endif
