// Where bytes live: swizzled shared-memory tiles, fragments of the tensor-core instructions, the order of tiles.
//
// All operands are seen as rows of bytes along K. One pipeline stage holds 128 bytes of each row, one tensor-core step
// takes 32 of them: 32 int8 codes, 16 float16 or bfloat16 values, 8 float32 values. That every m16n8 instruction maps
// its fragments to the same bytes is what lets the float tail run through the int8 loop's addresses and into its
// accumulators. Source: PTX ISA, "Matrix fragments for mma.m16n8k32", ".m16n8k16" and ".m16n8k8".
#pragma once

#include "platform.cuh"

namespace qpipe {

constexpr int kStageBytes = 128;
constexpr int kStepBytes = 32;
constexpr int kStepsPerStage = kStageBytes / kStepBytes;
constexpr int kChunkBytes = 16;
constexpr int kChunksPerStage = kStageBytes / kChunkBytes;

// Offset of a 16-byte chunk in a tile of 128-byte rows. Eight rows at one chunk number fall into eight different bank
// groups; for tiles that begin at a multiple of 1024 it is also the pattern of TMA's and wgmma's 128-byte swizzle.
QPIPE_BOTH uint32_t swizzled(uint32_t row, uint32_t chunk) {
    return row * kStageBytes + ((chunk ^ (row & 7)) * kChunkBytes);
}

struct Spot {
    uint32_t row;
    uint32_t chunk;
};

// Row and chunk that `lane` names to ldmatrix.x4, for the 16 x 32-byte operand A of one step ...
QPIPE_BOTH Spot a_fragment_spot(uint32_t lane) { return {lane & 15, lane >> 4}; }

// ... and for the operands B of two neighbouring 8-column groups: registers 0, 1 are the first one's, 2, 3 the second's.
QPIPE_BOTH Spot b_fragment_spot(uint32_t lane) { return {(lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1}; }

// Row 0..15 and column 0..7 of accumulator register i of an m16n8 product; wgmma's m64nN has the same map per warp.
QPIPE_BOTH int accumulator_row(int lane, int i) { return (lane >> 2) + ((i >> 1) << 3); }
QPIPE_BOTH int accumulator_column(int lane, int i) { return ((lane & 3) << 1) + (i & 1); }

// Tiles (m, n) in the order in which blocks take them: columns of `kTileGroup` tiles along M, so that blocks which run
// at the same time share both X and W in L2.
constexpr int kTileGroup = 8;

struct TileSpot {
    int m;
    int n;
};

QPIPE_BOTH TileSpot tile_spot(int index, int tiles_m, int tiles_n) {
    const int per_group = kTileGroup * tiles_n;
    const int group = index / per_group;
    const int within = index - group * per_group;
    const int height = smaller(kTileGroup, tiles_m - group * kTileGroup);
    return {group * kTileGroup + within % height, within / height};
}

// What the blocks of a cluster have in common: nothing, the W or the X that they read, or one tile split along K.
enum class Share : int { kNothing, kW, kX, kK };

// Stages [first, last) of `total` that member `rank` of a split along K takes.
struct StageRange {
    int first;
    int last;
};

QPIPE_BOTH StageRange split_stages(int total, int rank, int parts) {
    return {total * rank / parts, total * (rank + 1) / parts};
}

}  // namespace qpipe
