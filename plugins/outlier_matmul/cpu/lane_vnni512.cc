// AVX-512 with VNNI.
#include "lanes.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include "avx2.h"
#include "avx512.h"
#include "dot_vnni.h"
#include "epilogue.h"

namespace qpipe::outlier_matmul {
namespace {

constexpr Lane kLane{"avx512vnni",
                     /*rows=*/24,
                     /*sums=*/1024,
                     /*depth=*/16,
                     {widen_float, widen_half, widen_bfloat},
                     gather_wide,
                     encode,
                     /*expand=*/nullptr,
                     vnni_dot<ZmmSums>,
                     {epilogue<Zmm, float>, epilogue<Zmm, Half>, epilogue<Zmm, BFloat>}};

}  // namespace

const Lane* const kAvx512VnniLane = &kLane;

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
const Lane* const kAvx512VnniLane = nullptr;
}
#endif
