// Counters of one activation tensor, in the layout of calibrate/stats/histogram.py: float32 values by their upper
// 16 bits, exact extrema, and what cannot take part in a range.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace qpipe::range_stats {

constexpr int64_t kBins = 65536;
constexpr int64_t kPage = 128;  // bins of one sign and exponent; most pages stay empty
constexpr int64_t kPages = kBins / kPage;

// What is known beside the bins. lo and hi are meaningful when finite > 0.
struct Extrema {
    int64_t finite = 0, nan = 0, pos_inf = 0, neg_inf = 0, sentinel = 0;
    uint32_t low_bits = 0;  // OR of the lower 16 bits of all counted values
    float lo = 0, hi = 0;

    void merge(const Extrema& other);
};

// Counters that one thread at a time writes. The memory is zero pages until a bin is first met.
class Table {
  public:
    Table();
    // float32 values; finite ones from `sentinel` on in magnitude are masks.
    void count(const float* values, int64_t size, float sentinel);
    // Adds a page to sums [kPage]; false when nothing can be in it.
    bool add_page(int64_t page, int64_t* sums) const;
    const Extrema& extrema() const { return extrema_; }
    void clear();

  private:
    void count_chunk(const float* values, int64_t size, float sentinel);
    // Copies the bits of magnitudes below `limit`, counts the others; returns how many were copied.
    int64_t keep_measurements(const float* values, int64_t size, uint32_t limit, uint32_t* kept);
    void fold();
    bool may_hold(int64_t page) const;
    void clear_recent();

    struct Free {
        void operator()(void* memory) const;
    };
    std::unique_ptr<uint32_t[], Free> recent_;  // [kBins]
    std::unique_ptr<int64_t[], Free> folded_;   // [kBins], null until recent_ had to make room
    int64_t pending_ = 0;                       // values in recent_
    // Exponents of what was counted, zeros aside: other pages need not be looked at.
    uint32_t first_ = kPages, last_ = 0;
    bool has_negative_ = false;
    Extrema extrema_;
};

// Magnitudes per channel (last dimension), summed over tokens in their order, in float64: the very additions that numpy
// makes, so that the bits are the same.
struct Channels {
    std::vector<float> amax;
    std::vector<double> total, energy;
    int64_t tokens = 0;

    void merge(const Channels& other);
};

// All that is known of one tensor. Runs take tables, fill them and give them back. Float sums depend on the order of
// runs, so that those of each thread that starts runs are kept apart: it can take them run by run.
class State {
  public:
    std::vector<Table*> take(size_t count);
    void give_back(const std::vector<Table*>& tables);
    void add_channels(const Channels& run);

    // Fills ids and counts [kBins] of the bins that hold something, in ascending order; returns their number.
    int64_t read(uint16_t* ids, int64_t* counts, Extrema& extrema) const;
    Channels channels() const;
    void clear();
    Channels own_channels() const;  // of runs that the calling thread started
    void forget_own_channels();

  private:
    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Table>> tables_;
    std::vector<Table*> idle_;
    std::map<std::thread::id, Channels> channels_;  // by the thread that starts runs: kernels are called in it
};

// States by key. A session's node and Python find each other here.
class Registry {
  public:
    static Registry& instance();
    std::shared_ptr<State> open(int64_t key);  // made when missing
    std::shared_ptr<State> find(int64_t key);  // null when missing
    void release(int64_t key);

  private:
    std::mutex mutex_;
    std::map<int64_t, std::shared_ptr<State>> states_;
};

// Add |values[t, c]| of one run for channels first..last-1; values from `sentinel` on, NaN and infinities count as 0.
void add_tokens(const float* values, int64_t tokens, int64_t channels, int64_t first, int64_t last, float sentinel,
                Channels& run);

}  // namespace qpipe::range_stats
