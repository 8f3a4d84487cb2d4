// wgmma for 64 x 128 and 64 x 256 tiles: 32 bytes of K, both operands in shared memory, accumulators in registers.
// The instruction names every accumulator, hence the lists.
#pragma once

#include "ptx.cuh"

namespace qpipe::ptx {

#define QPIPE_EACH_4(c, d, i) c(d[(i)]), c(d[(i) + 1]), c(d[(i) + 2]), c(d[(i) + 3])
#define QPIPE_EACH_16(c, d, i) \
    QPIPE_EACH_4(c, d, i), QPIPE_EACH_4(c, d, (i) + 4), QPIPE_EACH_4(c, d, (i) + 8), QPIPE_EACH_4(c, d, (i) + 12)
#define QPIPE_EACH_64(c, d, i) \
    QPIPE_EACH_16(c, d, i), QPIPE_EACH_16(c, d, (i) + 16), QPIPE_EACH_16(c, d, (i) + 32), QPIPE_EACH_16(c, d, (i) + 48)
#define QPIPE_EACH_128(c, d, i) QPIPE_EACH_64(c, d, i), QPIPE_EACH_64(c, d, (i) + 64)
#define QPIPE_INT(x) "+r"(x)
#define QPIPE_FLOAT(x) "+f"(x)

#define QPIPE_PLACES_64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
    "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define QPIPE_PLACES_128 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24," \
    "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70," \
    "%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93," \
    "%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112," \
    "%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d[64 x N] += x[64 x 32 bytes] * w[N x 32 bytes]^T, N = 2 * count; x and w are descriptors (tile_descriptor).
#define QPIPE_WGMMA(name, type, count, letter, shape, places, first, second, flags)              \
    QPIPE_DEVICE void name(type(&d)[count], uint64_t x, uint64_t w) {                            \
        asm volatile("wgmma.mma_async.sync.aligned." shape " {" places "}, " first ", " second ", 1" flags ";" \
                     : QPIPE_EACH_##count(letter, d, 0)                                          \
                     : "l"(x), "l"(w));                                                          \
    }
#define QPIPE_WGMMA_PAIR(name, type, letter, shape, flags)                                                          \
    QPIPE_WGMMA(name, type, 64, letter, "m64n128" shape, QPIPE_PLACES_64, "%64", "%65", flags)                      \
    QPIPE_WGMMA(name, type, 128, letter, "m64n256" shape, QPIPE_PLACES_128, "%128", "%129", flags)

QPIPE_WGMMA_PAIR(wgmma_s8, int32_t, QPIPE_INT, "k32.s32.s8.s8", "")
QPIPE_WGMMA_PAIR(wgmma_f16, float, QPIPE_FLOAT, "k16.f32.f16.f16", ", 1, 1, 0, 0")
QPIPE_WGMMA_PAIR(wgmma_bf16, float, QPIPE_FLOAT, "k16.f32.bf16.bf16", ", 1, 1, 0, 0")

#undef QPIPE_EACH_4
#undef QPIPE_EACH_16
#undef QPIPE_EACH_64
#undef QPIPE_EACH_128
#undef QPIPE_INT
#undef QPIPE_FLOAT
#undef QPIPE_PLACES_64
#undef QPIPE_PLACES_128
#undef QPIPE_WGMMA
#undef QPIPE_WGMMA_PAIR

}  // namespace qpipe::ptx
