// The tiles that are compiled, in the order of the plan's tables.
#pragma once

#include "gemm_wgmma.cuh"
#include "plan.cuh"

namespace qpipe {

using MmaTile0 = MmaTile<16, 32, 1, 1, 4, 8>;
using MmaTile1 = MmaTile<64, 64, 2, 2, 1, 5>;
using MmaTile2 = MmaTile<128, 128, 2, 4, 1, 3>;
using WgmmaTile0 = WgmmaTile<1, 128, 6, true>;
using WgmmaTile1 = WgmmaTile<2, 128, 4, true>;
using WgmmaTile2 = WgmmaTile<2, 256, 4, false>;

template <class Tile>
constexpr bool fits(const TileFacts& facts) {
    return Tile::kBm == facts.bm && Tile::kBn == facts.bn;
}

static_assert(fits<MmaTile0>(kMmaTiles[0]) && fits<MmaTile1>(kMmaTiles[1]) && fits<MmaTile2>(kMmaTiles[2]),
              "the plan must know the tiles as they are");
static_assert(fits<WgmmaTile0>(kWgmmaTiles[0]) && fits<WgmmaTile1>(kWgmmaTiles[1]) && fits<WgmmaTile2>(kWgmmaTiles[2]),
              "the plan must know the tiles as they are");
static_assert(WgmmaTile0::kSplits == kWgmmaTiles[0].splits && WgmmaTile1::kSplits == kWgmmaTiles[1].splits &&
                  WgmmaTile2::kSplits == kWgmmaTiles[2].splits,
              "a tile can be split only where it has room for partial sums");
// sm_86 and sm_89 have 99 KB per block.
static_assert(MmaTile0::kSharedBytes <= 99 * 1024 && MmaTile1::kSharedBytes <= 99 * 1024 &&
                  MmaTile2::kSharedBytes <= 99 * 1024,
              "mma.sync tiles must fit every chip from sm_80 on");

}  // namespace qpipe
