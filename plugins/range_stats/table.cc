#include "table.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

// One version of a loop per instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define QPIPE_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define QPIPE_CLONES
#endif

namespace qpipe::range_stats {
namespace {

constexpr int64_t kChunk = 4096;  // values: they and their keys stay in the first-level cache
constexpr int64_t kLine = 16;    // values of one cache line
constexpr int64_t kFewRepeats = 2;  // one in so many
constexpr int64_t kFoldAt = int64_t{1} << 31;
constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kSignBin = 0x8000u;
constexpr uint32_t kSpare = kInfinity >> 16;  // first of the bins that nothing is counted in
constexpr uint32_t kTurns = 16;
constexpr int64_t kExponents = kPages / 2;

void prefetch([[maybe_unused]] const void* place) {
#if defined(__GNUC__)
    __builtin_prefetch(place);
#endif
}

uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Survey {
    uint32_t any_bits = 0;   // OR of all bits
    int32_t magnitude = 0;   // largest magnitude, as bits; magnitudes order as signed integers do
    uint32_t below = 0;      // bits of the smallest magnitude but zero, less 1
    float lo = 0, hi = 0;    // only meaningful without NaN
    uint16_t repeats = 0;    // keys that equal the one before
};

// Fills keys: the counter of each value. Zeros, of which a Relu makes many in a row, take turns among counters of bins
// that only NaN would be in: an increment has to wait for the one before where both are of the same counter.
// ordered: a float's bits as an integer that orders like the float: negative floats have their magnitude flipped.
QPIPE_CLONES Survey survey(const uint32_t* bits, int64_t size, uint16_t* keys) {
    uint32_t any = 0, below = std::numeric_limits<uint32_t>::max();
    int32_t magnitude = 0, lo = std::numeric_limits<int32_t>::max(), hi = std::numeric_limits<int32_t>::min();
    for (int64_t i = 0; i < size; ++i) {
        const int32_t value = static_cast<int32_t>(bits[i]);
        const int32_t absolute = value & static_cast<int32_t>(kMagnitude);
        const int32_t ordered = value ^ static_cast<int32_t>(static_cast<uint32_t>(value >> 31) >> 1);
        any |= bits[i];
        magnitude = std::max(magnitude, absolute);
        below = std::min(below, static_cast<uint32_t>(absolute) - 1);
        lo = std::min(lo, ordered);
        hi = std::max(hi, ordered);
        const uint32_t bin = bits[i] >> 16;
        const uint32_t turn = kSpare | (static_cast<uint32_t>(i) % kTurns);
        keys[i] = static_cast<uint16_t>((bin & ~kSignBin) == 0 ? bin | turn : bin);
    }
    uint16_t repeats = 0;
    for (int64_t i = 1; i < size; ++i) repeats = static_cast<uint16_t>(repeats + (keys[i] == keys[i - 1]));
    const auto back = [](int32_t ordered) {
        return as_float(static_cast<uint32_t>(ordered ^ static_cast<int32_t>(static_cast<uint32_t>(ordered >> 31) >> 1)));
    };
    return {any, magnitude, below, back(lo), back(hi), repeats};
}

// A strip of channels: its sums stay in registers while all tokens go by, a cache line of each at a time.
constexpr int64_t kStrip = 16;
using Bits = uint32_t __attribute__((vector_size(4 * kStrip)));
using Floats = float __attribute__((vector_size(4 * kStrip)));
using Doubles = double __attribute__((vector_size(8 * kStrip)));

template <typename Vector, typename Scalar>
void load(Vector& to, const Scalar* from, int64_t width) {
    if (width == kStrip) {  // the usual case: a size that is known is one move
        std::memcpy(&to, from, sizeof to);
        return;
    }
    to = Vector{};
    std::memcpy(&to, from, static_cast<size_t>(width) * sizeof(Scalar));
}

// bits: [tokens][channels], the strip's first channel foremost; width: its channels.
QPIPE_CLONES void add_strip(const uint32_t* bits, int64_t tokens, int64_t channels, int64_t width, uint32_t limit,
                            float* amax, double* total, double* energy) {
    Bits most, next;
    Doubles sum, squares;
    load(most, amax, width);  // magnitudes order the same way as floats and as bits
    load(sum, total, width);
    load(squares, energy, width);
    const Bits sign_off = Bits{} + kMagnitude, limits = Bits{} + limit;
    for (int64_t t = 0; t < tokens; ++t, bits += channels) {
        load(next, bits, width);
        prefetch(bits + 8 * channels);  // steps of a row are too wide for the processor to foresee
        next &= sign_off;
        next &= (Bits)(next < limits);
        most = most > next ? most : next;
        const Doubles wide = __builtin_convertvector((Floats)next, Doubles);
        sum += wide;
        squares += wide * wide;
    }
    std::memcpy(amax, &most, static_cast<size_t>(width) * sizeof(float));
    std::memcpy(total, &sum, static_cast<size_t>(width) * sizeof(double));
    std::memcpy(energy, &squares, static_cast<size_t>(width) * sizeof(double));
}

void* zero_pages(size_t bytes) {
    void* memory = std::calloc(bytes, 1);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

}  // namespace

void Extrema::merge(const Extrema& other) {
    if (other.finite > 0) {
        lo = finite > 0 ? std::min(lo, other.lo) : other.lo;
        hi = finite > 0 ? std::max(hi, other.hi) : other.hi;
    }
    finite += other.finite;
    nan += other.nan;
    pos_inf += other.pos_inf;
    neg_inf += other.neg_inf;
    sentinel += other.sentinel;
    low_bits |= other.low_bits;
}

void Channels::merge(const Channels& other) {
    if (amax.size() != other.amax.size()) {
        *this = other;
        return;
    }
    for (size_t c = 0; c < amax.size(); ++c) {
        amax[c] = std::max(amax[c], other.amax[c]);
        total[c] += other.total[c];
        energy[c] += other.energy[c];
    }
    tokens += other.tokens;
}

void Table::Free::operator()(void* memory) const { std::free(memory); }

Table::Table() : recent_(static_cast<uint32_t*>(zero_pages(kBins * sizeof(uint32_t)))) {}

void Table::count(const float* values, int64_t size, float sentinel) {
    for (int64_t first = 0; first < size; first += kChunk) {
        if (pending_ > kFoldAt) fold();
        count_chunk(values + first, std::min(kChunk, size - first), sentinel);
    }
}

void Table::count_chunk(const float* values, int64_t size, float sentinel) {
    uint16_t keys[kChunk];
    Survey seen = survey(reinterpret_cast<const uint32_t*>(values), size, keys);
    uint32_t kept[kChunk];  // touched only where something is left out
    if (static_cast<uint32_t>(seen.magnitude) >= as_bits(sentinel)) {
        size = keep_measurements(values, size, as_bits(sentinel), kept);
        if (size == 0) return;
        seen = survey(kept, size, keys);
    }
    Extrema chunk;
    chunk.finite = size;
    chunk.lo = seen.lo;
    chunk.hi = seen.hi;
    chunk.low_bits = seen.any_bits & 0xffffu;
    extrema_.merge(chunk);
    pending_ += size;
    first_ = std::min(first_, seen.below >> 23);
    last_ = std::max(last_, static_cast<uint32_t>(seen.magnitude) >> 23);
    has_negative_ |= seen.any_bits >> 31 != 0;
    uint32_t* counters = recent_.get();
    int64_t i = 0;
    if (seen.repeats > size / kFewRepeats) {
        for (int64_t end = 0; i < size; i = end) {
            while (end < size && keys[end] == keys[i]) ++end;
            counters[keys[i]] += static_cast<uint32_t>(end - i);
        }
    }
    for (; i + kLine <= size; i += kLine) {
        prefetch(values + i + kChunk);  // the next chunk comes while this one is counted
        for (int64_t j = 0; j < kLine; ++j) ++counters[keys[i + j]];
    }
    for (; i < size; ++i) ++counters[keys[i]];
}

int64_t Table::keep_measurements(const float* values, int64_t size, uint32_t limit, uint32_t* kept) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
        const uint32_t bits = as_bits(values[i]), magnitude = bits & kMagnitude;
        if (magnitude < limit) {
            kept[count++] = bits;
        } else if (magnitude > kInfinity) {
            ++extrema_.nan;
        } else if (magnitude == kInfinity) {
            ++(bits >> 31 ? extrema_.neg_inf : extrema_.pos_inf);
        } else {
            ++extrema_.sentinel;
        }
    }
    return count;
}

void Table::fold() {
    if (!folded_) folded_.reset(static_cast<int64_t*>(zero_pages(kBins * sizeof(int64_t))));
    for (int64_t page = 0; page < kPages; ++page) {
        int64_t sums[kPage] = {};  // what was folded before included
        if (add_page(page, sums)) std::memcpy(folded_.get() + page * kPage, sums, sizeof sums);
    }
    clear_recent();
}

bool Table::may_hold(int64_t page) const {
    const auto exponent = static_cast<uint32_t>(page % kExponents);
    return (page < kExponents || has_negative_) && (exponent == 0 || (first_ <= exponent && exponent <= last_));
}

bool Table::add_page(int64_t page, int64_t* sums) const {
    if (!may_hold(page)) return false;
    const uint32_t* counters = recent_.get() + page * kPage;
    for (int64_t bin = 0; bin < kPage; ++bin) {
        sums[bin] += counters[bin];
        if (folded_) sums[bin] += folded_[static_cast<size_t>(page * kPage + bin)];
    }
    if (page % kExponents == 0) {
        for (uint32_t turn = 0; turn < kTurns; ++turn) sums[0] += counters[kSpare + turn];
    }
    return true;
}

// Writes only where something may be: the other pages of memory stay the system's one page of zeros.
void Table::clear_recent() {
    for (int64_t page = 0; page < kPages; ++page) {
        if (!may_hold(page)) continue;
        uint32_t* counters = recent_.get() + page * kPage;
        std::memset(counters, 0, kPage * sizeof(uint32_t));
        if (page % kExponents == 0) std::memset(counters + kSpare, 0, kTurns * sizeof(uint32_t));
    }
    pending_ = 0;
}

void Table::clear() {
    clear_recent();
    folded_.reset();
    first_ = kPages;
    last_ = 0;
    has_negative_ = false;
    extrema_ = {};
}

std::vector<Table*> State::take(size_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Table*> taken;
    while (taken.size() < count) {
        if (idle_.empty()) {
            tables_.push_back(std::make_unique<Table>());
            idle_.push_back(tables_.back().get());
        }
        taken.push_back(idle_.back());
        idle_.pop_back();
    }
    return taken;
}

void State::give_back(const std::vector<Table*>& tables) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // In reverse: the next run takes them in the same order, and finds its counters in its cache.
    idle_.insert(idle_.end(), tables.rbegin(), tables.rend());
}

void State::add_channels(const Channels& run) {
    const std::lock_guard<std::mutex> lock(mutex_);
    channels_[std::this_thread::get_id()].merge(run);
}

int64_t State::read(uint16_t* ids, int64_t* counts, Extrema& extrema) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    extrema = {};
    for (const auto& table : tables_) extrema.merge(table->extrema());
    int64_t size = 0;
    for (int64_t page = 0; page < kPages; ++page) {
        int64_t sums[kPage] = {};
        bool holds = false;
        for (const auto& table : tables_) holds |= table->add_page(page, sums);
        for (int64_t bin = 0; holds && bin < kPage; ++bin) {
            if (sums[bin] == 0) continue;
            ids[size] = static_cast<uint16_t>(page * kPage + bin);
            counts[size++] = sums[bin];
        }
    }
    return size;
}

Channels State::channels() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    Channels all;
    for (const auto& [thread, channels] : channels_) all.merge(channels);
    return all;
}

Channels State::own_channels() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = channels_.find(std::this_thread::get_id());
    return found == channels_.end() ? Channels{} : found->second;
}

void State::clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& table : tables_) table->clear();
    channels_.clear();
}

void State::forget_own_channels() {
    const std::lock_guard<std::mutex> lock(mutex_);
    channels_.erase(std::this_thread::get_id());
}

Registry& Registry::instance() {
    static Registry registry;
    return registry;
}

std::shared_ptr<State> Registry::open(int64_t key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<State>& state = states_[key];
    if (!state) state = std::make_shared<State>();
    return state;
}

std::shared_ptr<State> Registry::find(int64_t key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = states_.find(key);
    return found == states_.end() ? nullptr : found->second;
}

void Registry::release(int64_t key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    states_.erase(key);
}

void add_tokens(const float* values, int64_t tokens, int64_t channels, int64_t first, int64_t last, float sentinel,
                Channels& run) {
    const auto* bits = reinterpret_cast<const uint32_t*>(values);
    for (int64_t c = first; c < last; c += kStrip) {
        add_strip(bits + c, tokens, channels, std::min(kStrip, last - c), as_bits(sentinel), run.amax.data() + c,
                  run.total.data() + c, run.energy.data() + c);
    }
}

}  // namespace qpipe::range_stats
