// A lane is one instruction set's version of the few inner loops; which one runs is decided when a node is created.
//
// Files that implement a lane are compiled with that instruction set switched on, so they must not define or
// instantiate anything that another file could share (no standard library templates): the linker may keep either copy.
#pragma once

#include <cstdint>

namespace qpipe::outlier_matmul {

enum ElementType { kFloat32, kFloat16, kBFloat16, kElementTypes };

// One product of codes: sums[m * sums_stride + n] = sum_k q[m, k] * w[n, k], exactly.
struct DotTask {
    const int8_t* q;  // [rows, inputs_padded]; q + 128 as unsigned when the lane says offset_codes
    int64_t q_stride;
    int64_t rows;
    const int8_t* w;  // [columns, inputs_padded], row stride = inputs_padded
    int64_t columns;
    int64_t inputs_padded;      // multiple of 16
    const int32_t* column_sum;  // sum_k w[n, k]; read only by lanes with offset_codes
    int32_t* sums;
    int64_t sums_stride;
};

// A strip is 16 columns of w, rearranged so that a vector holds the same two inputs of eight columns:
// int16 [inputs / 2][16][2]. Its product needs no sums across a vector.
constexpr int64_t kStripColumns = 16;

struct StripTask {
    const int16_t* q;  // [rows, inputs]
    int64_t q_stride;
    int64_t rows;
    const int16_t* strip;
    int64_t inputs;   // multiple of 16
    int32_t* sums;    // [rows, 16]
    bool accumulate;  // add to sums
};

// From sums to y. All arrays over columns are readable up to the next multiple of 8.
struct EpilogueTask {
    const int32_t* sums;
    int64_t sums_stride;
    int64_t rows;
    int64_t columns;
    const float* x_scale;        // [rows]
    const float* w_scale;        // [columns]
    const float* bias;           // [columns]
    const float* x_outlier;      // [rows, outliers]
    const float* w_outlier;      // [blocks of 8 columns][outliers][8]
    int64_t outliers;
    void* y;  // [rows, columns], row stride y_stride, in elements of the lane function's type
    int64_t y_stride;
};

struct Lane {
    const char* name;
    bool offset_codes;
    // Elements to float32, without loss.
    void (*widen[kElementTypes])(const void* x, int64_t count, float* out);
    // Largest magnitude as float bits; infinities and NaN are 0x7f800000 and more.
    uint32_t (*amax_bits)(const float* x, int64_t count);
    // clip(rint(x * inverse), -127, 127); rint rounds half to even. Offset lanes store code + 128.
    void (*encode)(const float* x, int64_t count, float inverse, int8_t* q);
    // The same as int16; null in a lane that does not rearrange weights.
    void (*encode_wide)(const float* x, int64_t count, float inverse, int16_t* q);
    void (*dot)(const DotTask& task);
    // Rearrange w [columns <= 16, inputs]; columns beyond repeat the last one.
    void (*make_strip)(const int8_t* w, int64_t w_stride, int64_t columns, int64_t inputs, int16_t* strip);
    void (*dot_strip)(const StripTask& task);
    void (*epilogue[kElementTypes])(const EpilogueTask& task);
};

// Null where the compiler or the architecture has no such lane.
extern const Lane* const kScalarLane;
extern const Lane* const kAvx2Lane;
extern const Lane* const kAvx2OffsetLane;  // VNNI's arithmetic on AVX2: tests run the offset path where VNNI is missing
extern const Lane* const kAvxVnniLane;
extern const Lane* const kAvx512VnniLane;

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
