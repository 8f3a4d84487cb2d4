// AMX: a tile instruction multiplies 16 rows of 64 codes by 64 inputs of 16 columns, exactly. A strip of the weights,
// [K / 4][16][4], is a stack of such tiles as it lies in memory.
#include "lanes.h"

#if defined(__AMX_INT8__) && defined(__AVX512VNNI__)
#include "avx2.h"
#include "avx512.h"
#include "dot_vnni.h"
#include "epilogue.h"

namespace qpipe::outlier_matmul {
namespace {

constexpr int64_t kTileHeight = 16;
constexpr int64_t kTileDepth = 64;
constexpr int64_t kFewRows = 4;  // up to which tiles stay too empty: VNNI is faster

// Sums are tiles 0..3 (2 blocks of rows x 2 strips), codes 4 and 5, weights 6 and 7.
struct alignas(64) Configuration {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};

    Configuration(int64_t first, int64_t second) {
        const auto above = static_cast<uint8_t>(first), below = static_cast<uint8_t>(second > 0 ? second : 1);
        rows[0] = rows[1] = rows[4] = above;
        rows[2] = rows[3] = rows[5] = below;
        rows[6] = rows[7] = kTileDepth / kQuad;
    }
};
static_assert(sizeof(Configuration) == 64);

// The intrinsics do not tell the compiler what memory they read: it would leave out stores that only they see.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

// Up to 2 blocks of rows x up to 2 strips. The sums start from what makes good for the 128 added to the codes.
template <bool SecondRows, bool SecondStrip>
void product(const TileTask& t, int64_t m0, int64_t strip) {
    const uint8_t* codes = t.q + m0 * t.q_stride;
    const uint8_t* more_codes = codes + kTileHeight * t.q_stride;
    const int64_t stack = t.quads * kStripColumns * kQuad;
    const int8_t* weights = t.weights + strip * stack;
    alignas(64) int32_t start[2][kStripColumns];
    for (int64_t n = 0; n < (SecondStrip ? 2 : 1) * kStripColumns; ++n) {
        start[n / kStripColumns][n % kStripColumns] = -t.correction[strip * kStripColumns + n];
    }
    settle_memory();
    _tile_loadd(0, start[0], 0);
    if (SecondStrip) _tile_loadd(1, start[1], 0);
    if (SecondRows) _tile_loadd(2, start[0], 0);
    if (SecondRows && SecondStrip) _tile_loadd(3, start[1], 0);
    for (int64_t k = 0; k < t.quads * kQuad; k += kTileDepth) {
        _tile_loadd(4, codes + k, t.q_stride);
        _tile_loadd(6, weights + k * kStripColumns, kTileDepth);
        _tile_dpbusd(0, 4, 6);
        if (SecondStrip) {
            _tile_loadd(7, weights + stack + k * kStripColumns, kTileDepth);
            _tile_dpbusd(1, 4, 7);
        }
        if (SecondRows) {
            _tile_loadd(5, more_codes + k, t.q_stride);
            _tile_dpbusd(2, 5, 6);
            if (SecondStrip) _tile_dpbusd(3, 5, 7);
        }
    }
    int32_t* sums = t.sums + m0 * t.sums_stride + strip * kStripColumns;
    int32_t* more_sums = sums + kTileHeight * t.sums_stride;
    const auto stride = static_cast<int64_t>(sizeof *sums) * t.sums_stride;
    _tile_stored(0, sums, stride);
    if (SecondStrip) _tile_stored(1, sums + kStripColumns, stride);
    if (SecondRows) _tile_stored(2, more_sums, stride);
    if (SecondRows && SecondStrip) _tile_stored(3, more_sums + kStripColumns, stride);
}

template <bool SecondRows>
void rows_of_strips(const TileTask& t, int64_t m0) {
    int64_t strip = 0;
    for (; strip + 2 <= t.strips; strip += 2) product<SecondRows, true>(t, m0, strip);
    if (strip < t.strips) product<SecondRows, false>(t, m0, strip);
}

void dot(const TileTask& t) {
    if (t.rows <= kFewRows) return vnni_dot<ZmmSums>(t);
    for (int64_t m = 0; m < t.rows; m += 2 * kTileHeight) {
        const int64_t left = t.rows - m;
        const int64_t first = left < kTileHeight ? left : kTileHeight;
        const int64_t second = left - first < kTileHeight ? left - first : kTileHeight;
        const Configuration configuration(first, second);
        settle_memory();
        _tile_loadconfig(&configuration);
        second > 0 ? rows_of_strips<true>(t, m) : rows_of_strips<false>(t, m);
    }
    _tile_release();
}

constexpr Lane kLane{"amx",
                     /*rows=*/32,
                     /*sums=*/8192,
                     kTileDepth,
                     {widen_float, widen_half, widen_bfloat},
                     gather_wide,
                     encode,
                     /*expand=*/nullptr,
                     dot,
                     {epilogue<Zmm, float>, epilogue<Zmm, Half>, epilogue<Zmm, BFloat>}};

}  // namespace

const Lane* const kAmxLane = &kLane;

}  // namespace qpipe::outlier_matmul

#else
namespace qpipe::outlier_matmul {
const Lane* const kAmxLane = nullptr;
}
#endif
