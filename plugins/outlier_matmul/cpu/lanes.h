// A lane is one instruction set's version of the few inner loops; which one runs is decided when a node is created.
//
// Files that implement a lane are compiled with that instruction set switched on, so they must not define or
// instantiate anything that another file could share (no standard library templates): the linker may keep either copy.
#pragma once

#include <cstdint>

namespace qpipe::outlier_matmul {

enum ElementType { kFloat32, kFloat16, kBFloat16, kElementTypes };

// Codes are stored as q + 128, unsigned, because x86 multiplies unsigned by signed bytes. Weights lie in strips of 16
// columns, four inputs (a quad) at a time: int8 [quads][16][4]. A vector then holds the same quad of several columns,
// and no sum across a vector is needed.
//
// AVX2's vpmaddubsw adds two products in 16 bits and saturates. Codes being 0..255 it is exact where the weights of one
// sign in a pair add up to at most 128 in magnitude, because 255 * 128 < 2^15. Which inputs of a quad make a pair is
// free, and so is the sign of an input: 127 - q times -w gives the same product. A lane that saturates reads the codes
// in several such orders, and a quad takes the first one that is safe for its 16 columns. Quads without any come last,
// and take one more step.
constexpr int64_t kStripColumns = 16;
constexpr int64_t kQuad = 4;
constexpr int kSafeSum = 128;

// A quad's bytes: the inputs that they hold, and all bits where 127 - q is stored for q + 128, else 0.
struct Order {
    uint8_t input[kQuad];
    uint8_t flip[kQuad];
};
constexpr uint8_t kFlip = 0xff;
constexpr Order kOrders[] = {
    {{0, 1, 2, 3}, {}}, {{0, 1, 2, 3}, {0, kFlip, 0, kFlip}},
    {{0, 2, 1, 3}, {}}, {{0, 2, 1, 3}, {0, kFlip, 0, kFlip}},
    {{0, 3, 1, 2}, {}}, {{0, 3, 1, 2}, {0, kFlip, 0, kFlip}},
};
constexpr int64_t kOrderCount = sizeof kOrders / sizeof kOrders[0];

// For such a lane every block of 64 codes is written out in several forms: in the orders, as q, and as |q|.
constexpr int64_t kCodeBlock = 64;
constexpr int64_t kUnorderedForms = 2;  // q and |q|, behind the orders

// Sums of up to `rows` x `strips` * 16 products: sums[m][n] = sum_k q[m, k] * w[n, k], exactly.
struct TileTask {
    const uint8_t* q;  // [rows, q_stride], written out where the lane does that
    int64_t q_stride;
    int64_t rows;
    int64_t strips;
    int64_t quads;
    const int8_t* weights;      // [strips][quads][16][4]
    const int32_t* order;       // [strips][quads]: where a row has each quad's codes
    const int32_t* safe;        // [strips]: number of safe quads
    const int32_t* correction;  // [strips][16]: what the 128 or 127 in the codes of safe quads adds to the sums
    int32_t* sums;              // [rows, sums_stride], rows aligned to 64 bytes
    int64_t sums_stride;
};

// One strip of a tile.
struct StripTask {
    const uint8_t* q;
    int64_t q_stride;
    int64_t rows;
    const int8_t* strip;
    const int32_t* order;
    int64_t quads;
    int64_t safe;
    const int32_t* correction;
    int32_t* sums;
    int64_t sums_stride;
};

namespace {  // every lane gets its own copy

inline StripTask strip_of(const TileTask& t, int64_t i) {
    return {t.q,     t.q_stride, t.rows, t.weights + i * t.quads * kStripColumns * kQuad, t.order + i * t.quads,
            t.quads, t.safe[i],  t.correction + i * kStripColumns, t.sums + i * kStripColumns, t.sums_stride};
}

template <void (*Dot)(const StripTask&)>
[[maybe_unused]] void each_strip(const TileTask& t) {
    for (int64_t i = 0; i < t.strips; ++i) Dot(strip_of(t, i));
}

}  // namespace

// From sums to y. All arrays over columns are readable up to the next multiple of 16.
struct EpilogueTask {
    const int32_t* sums;
    int64_t sums_stride;
    int64_t rows;
    int64_t columns;
    const float* x_scale;        // [rows]
    const float* w_scale;        // [columns]
    const float* bias;           // [columns]
    const float* x_outlier;      // [rows, outliers]
    const float* w_outlier;      // [strips][outliers][16]
    int64_t outliers;
    void* y;  // [rows, columns], row stride y_stride, in elements of the lane function's type
    int64_t y_stride;
};

struct Gathered {
    int64_t count;
    uint32_t amax_bits;  // largest magnitude as float bits; infinities and NaN are 0x7f800000 and more
};

struct Lane {
    const char* name;
    int64_t rows;   // of a tile, at most 32
    int64_t sums;   // of a tile: few, and y is written while the next product runs; AMX itself wants many columns
    int64_t depth;  // a strip's inputs are padded to a multiple of it
    // Elements to float32, without loss.
    void (*widen[kElementTypes])(const void* x, int64_t count, float* out);
    // Moves the elements whose bit in `keep` is set together. `out` may be `x`; keep is padded to 64 bits.
    Gathered (*gather)(const float* x, const uint8_t* keep, int64_t count, float* out);
    // rint(x * inverse) + 128, rounding half to even; the caller sees to it that |x * inverse| < 127.5. Writes whole
    // vectors: q is padded to 64.
    void (*encode)(const float* x, int64_t count, float inverse, uint8_t* q);
    // Writes `depth` codes out in the first `orders` orders, as q and as |q|: [depth / 64][orders + 2][64]. Null: the
    // lane does not saturate, and reads codes as they are.
    void (*expand)(const uint8_t* q, int64_t depth, int64_t orders, uint8_t* forms);
    void (*dot)(const TileTask& task);
    void (*epilogue[kElementTypes])(const EpilogueTask& task);
};

// Null where the compiler or the architecture has no such lane.
extern const Lane* const kScalarLane;
extern const Lane* const kAvx2Lane;
extern const Lane* const kEmulatedVnniLane;  // VNNI's code on AVX2, for tests where VNNI is missing
extern const Lane* const kAvxVnniLane;
extern const Lane* const kAvx512VnniLane;
extern const Lane* const kAmxLane;

// Lanes that this CPU can run, best first. The last one is always "scalar".
struct LaneList {
    const Lane* items[8];
    int count;
    const Lane* const* begin() const { return items; }
    const Lane* const* end() const { return items + count; }
};
const LaneList& available_lanes();

// The lane that $QPIPE_LANE names, else the best; null when $QPIPE_LANE names one that cannot run here.
const Lane* choose_lane();

}  // namespace qpipe::outlier_matmul
