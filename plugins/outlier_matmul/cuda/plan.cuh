// Which kernel, tile, sharing and grid for a shape: an estimate of the time of every candidate, the smallest wins.
//
// Plain host code. The constants are architectural figures and estimates; gpu_check measures every candidate by force
// and so says where they are wrong.
#pragma once

#include "device.cuh"
#include "small_m.cuh"

namespace qpipe {

enum class Path : int { kNothing, kSmall, kMma, kWgmma };

struct Shape {
    int64_t m, n;
    int k_padded, o_padded;
    int element_bytes;
};

struct Plan {
    Path path = Path::kNothing;
    int tile = 0;
    Share share = Share::kNothing;
    int cluster = 1;
    int blocks = 0;
    double cost = 0;  // estimated clocks
};

struct TileFacts {
    int bm, bn;
    int blocks_per_sm;
    double rate;  // int8 multiply-adds per clock and multiprocessor that its main loop is expected to reach
    bool splits;
    bool for_float32;
};

constexpr TileFacts kMmaTiles[] = {
    {16, 32, 3, 500, false, true},
    {64, 64, 2, 1100, false, true},
    {128, 128, 1, 1500, false, true},
};
constexpr TileFacts kWgmmaTiles[] = {
    {64, 128, 1, 2600, true, true},
    {128, 128, 1, 3000, true, true},
    {128, 256, 1, 3500, false, false},
};
constexpr int kMmaTileCount = 3, kWgmmaTileCount = 3;

constexpr double kDramBytesPerClock = 2300;  // whole device
constexpr double kL2BytesPerClock = 3200;    // whole device
constexpr double kSmBytesPerClock = 56;      // from L2 into one multiprocessor
constexpr double kLaunchClocks = 2500;       // launch, first loads
constexpr double kTileClocks = 700;          // pipeline drain, scales, latency of the stores
constexpr double kExchangeClocks = 1500;     // cluster barrier, sums of the other blocks

// int8 tensor rates were cut from compute capability 10.3 on; 12.x has them. What is not known yet counts as cut.
QPIPE_BOTH bool has_int8_rate(int capability) {
    return (capability >= 80 && capability < 103) || (capability >= 120 && capability < 130);
}

// Estimated clocks of one candidate.
inline double estimate(const Shape& s, const Device& d, const TileFacts& tile, Share share, int cluster) {
    const double tiles_m = static_cast<double>(ceil_div<int64_t>(s.m, tile.bm));
    const double tiles_n = static_cast<double>(ceil_div<int64_t>(s.n, tile.bn));
    const int split = share == Share::kK ? cluster : 1;
    const double stages = static_cast<double>(ceil_div(ceil_div(s.k_padded, kStageBytes), split) +
                                              ceil_div(s.o_padded * s.element_bytes, kStageBytes));
    const double slots = static_cast<double>(d.multiprocessors / cluster * cluster * tile.blocks_per_sm);
    const double blocks = tiles_m * tiles_n * split;
    const double waves = static_cast<double>(static_cast<int64_t>((blocks + slots - 1) / slots));
    const double x_rows = static_cast<double>(smaller<int64_t>(s.m, tile.bm)) / (share == Share::kX ? cluster : 1);
    const double w_rows = static_cast<double>(tile.bn) / (share == Share::kW ? cluster : 1);
    const double bytes = (x_rows + w_rows) * kStageBytes;  // that one block brings from L2 per stage
    const double resident = blocks < slots ? blocks : slots;
    const double multiply = static_cast<double>(tile.bm) * tile.bn * kStageBytes / tile.rate * tile.blocks_per_sm;
    const double per_sm = bytes * tile.blocks_per_sm / kSmBytesPerClock;
    const double shared_l2 = bytes * resident / kL2BytesPerClock;
    const double load = per_sm > shared_l2 ? per_sm : shared_l2;
    const double store = static_cast<double>(tile.bm) * tile.bn * s.element_bytes * tile.blocks_per_sm / kSmBytesPerClock;
    const double per_wave = stages * (multiply > load ? multiply : load) + kTileClocks + store / split;
    const double on_chip = waves * per_wave + (split > 1 ? kExchangeClocks : 0);
    const double dram = (static_cast<double>(s.n) * (s.k_padded + s.o_padded * s.element_bytes) +
                         static_cast<double>(s.m) * s.n * s.element_bytes) / kDramBytesPerClock;
    return kLaunchClocks + (on_chip > dram ? on_chip : dram);
}

struct Candidates {
    Plan plan[32];
    int count = 0;

    void add(Path path, int tile, Share share, int cluster, const Shape& s, const Device& d, const TileFacts& facts) {
        const int tiles_m = static_cast<int>(ceil_div<int64_t>(s.m, facts.bm));
        const int tiles_n = static_cast<int>(ceil_div<int64_t>(s.n, facts.bn));
        const int units = ceil_div(tiles_m, share == Share::kW ? cluster : 1) *
                          ceil_div(tiles_n, share == Share::kX ? cluster : 1);
        // mma.sync blocks make one tile, and so do blocks that split one; the others are persistent.
        const bool persistent = path == Path::kWgmma && share != Share::kK;
        const int clusters = persistent ? smaller(units, d.multiprocessors / cluster) : units;
        plan[count++] = {path, tile, share, cluster, clusters * cluster, estimate(s, d, facts, share, cluster)};
    }
};

// Everything that could run this shape with M > 8 rows (or fewer, when X does not fit into shared memory).
inline Candidates candidates(const Shape& s, const Device& d) {
    Candidates all;
    if (d.wgmma == 0) {
        for (int t = 0; t < kMmaTileCount; ++t) all.add(Path::kMma, t, Share::kNothing, 1, s, d, kMmaTiles[t]);
        return all;
    }
    const int stages = ceil_div(s.k_padded, kStageBytes);
    for (int t = 0; t < kWgmmaTileCount; ++t) {
        const TileFacts& facts = kWgmmaTiles[t];
        if (s.element_bytes == 4 && !facts.for_float32) continue;
        all.add(Path::kWgmma, t, Share::kNothing, 1, s, d, facts);
        if (s.m > facts.bm) all.add(Path::kWgmma, t, Share::kW, 2, s, d, facts);
        if (s.n > facts.bn) all.add(Path::kWgmma, t, Share::kX, 2, s, d, facts);
        for (int split = 2; facts.splits && split <= 4 && split <= stages; split *= 2) {
            all.add(Path::kWgmma, t, Share::kK, split, s, d, facts);
        }
    }
    return all;
}

inline bool small_fits(const Shape& s, const Device& d) {
    return s.m >= 1 && s.m <= kSmallRows &&
           small_layout(static_cast<int>(s.m), s.k_padded, s.o_padded, s.element_bytes).bytes <= d.shared_bytes;
}

inline Plan choose_plan(const Shape& s, const Device& d) {
    Plan best;
    if (s.m == 0 || s.n == 0) return best;
    if (small_fits(s, d)) {
        best.path = Path::kSmall;
        best.blocks = static_cast<int>(
            smaller<int64_t>(ceil_div<int64_t>(s.n, kSmallColumns), int64_t{2} * d.multiprocessors));
        return best;
    }
    const Candidates all = candidates(s, d);
    best = all.plan[0];
    for (int i = 1; i < all.count; ++i) {
        if (all.plan[i].cost < best.cost) best = all.plan[i];
    }
    return best;
}

}  // namespace qpipe
