// 256-bit lanes for VNNI. Compiled once with AVX-VNNI (the lane "avxvnni"), and once with AVX2 alone, where
// wider arithmetic stands in for the one instruction (the lane "emulated-vnni", for tests).
#include "lanes.h"

#if defined(__AVX2__) && (defined(__AVXVNNI__) || defined(QPIPE_EMULATE_VNNI))
#include "avx2.h"
#include "dot_vnni.h"
#include "epilogue.h"

namespace qpipe::outlier_matmul {
namespace {

struct Vector {
    using Type = __m256i;
    static constexpr int kVectors = 2;
    static constexpr int kRows = 6;
    static Type zero() { return _mm256_setzero_si256(); }
    static Type load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
    static void store(void* to, Type v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
    static Type add(Type a, Type b) { return _mm256_add_epi32(a, b); }
    static Type sub(Type a, Type b) { return _mm256_sub_epi32(a, b); }
    static Type broadcast(const uint8_t* from) {
        int32_t quad;
        std::memcpy(&quad, from, sizeof quad);
        return _mm256_set1_epi32(quad);
    }
    static Type dot(Type sum, Type a, Type w) {
#ifdef QPIPE_EMULATE_VNNI
        // Even and odd bytes of each operand as 16-bit numbers: the pairs (0, 2) and (1, 3) of every quad.
        const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(0xff)), a_odd = _mm256_srli_epi16(a, 8);
        const __m256i w_even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), w_odd = _mm256_srai_epi16(w, 8);
        const __m256i pairs = _mm256_add_epi32(_mm256_madd_epi16(a_even, w_even), _mm256_madd_epi16(a_odd, w_odd));
        return _mm256_add_epi32(sum, pairs);
#else
        return _mm256_dpbusd_avx_epi32(sum, a, w);
#endif
    }
};

#ifdef QPIPE_EMULATE_VNNI
constexpr const char* kName = "emulated-vnni";
#else
constexpr const char* kName = "avxvnni";
#endif

constexpr Lane kLane{kName,
                     /*rows=*/24,
                     /*sums=*/1024,
                     /*depth=*/16,
                     {widen_float, widen_half, widen_bfloat},
                     gather,
                     encode,
                     /*expand=*/nullptr,
                     vnni_dot<Vector>,
                     {epilogue<Ymm, float>, epilogue<Ymm, Half>, epilogue<Ymm, BFloat>}};

}  // namespace

#ifdef QPIPE_EMULATE_VNNI
const Lane* const kEmulatedVnniLane = &kLane;
#else
const Lane* const kAvxVnniLane = &kLane;
#endif

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
#ifdef QPIPE_EMULATE_VNNI
const Lane* const kEmulatedVnniLane = nullptr;
#else
const Lane* const kAvxVnniLane = nullptr;
#endif
}  // namespace qpipe::outlier_matmul
#endif
