// The constant inputs of a node, rearranged once for its lane.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#include "../contract.h"
#include "lanes.h"

namespace qpipe::outlier_matmul {

inline size_t element_size(ElementType type) { return type == kFloat32 ? 4 : 2; }
inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Memory that begins with a cache line: a vector of 64 bytes, or a row of a tile, then never lies in two.
template <class T>
struct CacheLines {
    using value_type = T;
    static constexpr std::align_val_t kLine{64};

    CacheLines() = default;
    template <class U>
    CacheLines(const CacheLines<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
    void deallocate(T* data, size_t) { ::operator delete(data, kLine); }
    template <class U>
    bool operator==(const CacheLines<U>&) const { return true; }
    template <class U>
    bool operator!=(const CacheLines<U>&) const { return false; }
};
template <class T>
using Lines = std::vector<T, CacheLines<T>>;

// Constant inputs in the form that the lane reads. Arrays over columns are padded to a multiple of 16.
//
// Outlier columns take no part in the integer product: it has R regular inputs, which gains back a part of what the O
// columns cost in floating point.
struct Weights {
    std::vector<int32_t> outlier_index;  // [O]
    std::vector<int32_t> regular;        // [R] the other inputs, ascending; those of w_q's padding are among them
    std::vector<uint8_t> keep;           // a bit per input, set for the regular ones
    Lines<float> w_scale;                // [N]
    Lines<float> w_outlier;              // [N / 16][O][16], float32
    Lines<float> no_bias;                // [N] zeros
    Lines<int8_t> strips;                // [N / 16][quads][16][4]; see lanes.h
    Lines<int32_t> order;                // [N / 16][quads] where a row of codes has the quad
    Lines<int32_t> safe;                 // [N / 16]
    Lines<int32_t> correction;           // [N]
    int64_t orders = 0;                  // in which rows of codes are written out; 0: they are not
    int64_t columns = 0;                 // N padded
    int64_t depth = 0;                   // R padded as the lane wants it
};

Weights prepare(const Tensor (&in)[6], const Extents& extents, ElementType type, const Lane& lane);

}  // namespace qpipe::outlier_matmul
