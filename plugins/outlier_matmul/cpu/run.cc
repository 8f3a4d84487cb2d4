#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace qpipe::outlier_matmul {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kTileStrips = 16;        // sums of a tile: 32 x 256 x 4 = 32 KiB; y is written 1 KiB at a time
constexpr int64_t kTaskStrips = 4;         // strips of a task, at least
constexpr int64_t kEnoughTasks = 8;        // from here on a task takes whole tiles: narrow ones write y in small pieces
constexpr int64_t kTileColumns = kTileStrips * kStripColumns;
constexpr int64_t kTaskRows = 256;         // rows that pass by a strip while it stays in the second-level cache
constexpr int64_t kTaskWork = 512 * 1024;  // multiply-adds per parallel task, at least
constexpr int64_t kQuantizeElements = 16 * 1024;  // per parallel task
constexpr int64_t kMaxQuantizeTasks = 64;
constexpr int64_t kSerialWork = 64 * 1024;  // multiply-adds below which waking threads costs more than it gains
constexpr uint32_t kInfinityBits = 0x7f800000u;

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t size, int64_t part) { return (size + part - 1) / part; }
size_t element_size(ElementType type) { return type == kFloat32 ? 4 : 2; }

float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

size_t aligned(int64_t bytes) { return static_cast<size_t>(round_up(bytes, 64)); }

OrtStatus* parallel(const OrtKernelContext* context, bool serial, size_t total, void (*fn)(void*, size_t), void* data) {
    if (serial || total == 1) {
        for (size_t i = 0; i < total; ++i) fn(data, i);
        return nullptr;
    }
    return api().KernelContext_ParallelFor(context, fn, total, 0, data);
}

void find_regular(int64_t inputs, Weights& weights) {
    weights.keep.assign(static_cast<size_t>(round_up(inputs, 64) / 8), 0xff);
    for (const int32_t index : weights.outlier_index) {
        if (index < 0 || index >= inputs) continue;  // refused when X is known
        weights.keep[static_cast<size_t>(index / 8)] &= static_cast<uint8_t>(~(1u << index % 8));
    }
    for (int64_t k = 0; k < inputs; ++k) {
        if (weights.keep[static_cast<size_t>(k / 8)] >> k % 8 & 1) weights.regular.push_back(static_cast<int32_t>(k));
    }
}

// Four inputs of the columns of a strip, [16][4], from the strip's rows [16][depth].
struct Quad {
    int8_t w[kStripColumns * kQuad];

    Quad(const int8_t* rows, int64_t depth, int64_t k) {
        for (int64_t n = 0; n < kStripColumns; ++n) std::memcpy(w + n * kQuad, rows + n * depth + k, kQuad);
    }

    bool is_safe() const {
        int largest = 0;
        for (int64_t i = 0; i < kStripColumns * kQuad; i += 2) {
            const int positive = std::max<int>(w[i], 0) + std::max<int>(w[i + 1], 0);
            const int negative = std::max<int>(-w[i], 0) + std::max<int>(-w[i + 1], 0);
            largest = std::max({largest, positive, negative});
        }
        return largest <= kSafeSum;
    }
};

void make_strips(const int8_t* w_q, int64_t columns, int64_t inputs, bool saturates, Weights& weights) {
    const int64_t quads = weights.depth / kQuad, strips = weights.columns / kStripColumns;
    weights.strips.resize(static_cast<size_t>(weights.columns * weights.depth));
    weights.order.resize(static_cast<size_t>(strips * quads));
    weights.safe.resize(static_cast<size_t>(strips));
    weights.correction.assign(static_cast<size_t>(weights.columns), 0);
    std::vector<int8_t> rows(static_cast<size_t>(kStripColumns * weights.depth), 0);
    for (int64_t strip = 0; strip < strips; ++strip) {
        for (int64_t n = 0; n < kStripColumns; ++n) {
            const int64_t column = strip * kStripColumns + n;  // those beyond the last column are zeros
            int8_t* row = rows.data() + n * weights.depth;
            for (size_t k = 0; k < weights.regular.size(); ++k) {
                row[k] = column < columns ? w_q[column * inputs + weights.regular[k]] : int8_t{0};
            }
        }
        int32_t* correction = weights.correction.data() + strip * kStripColumns;
        int8_t* packed = weights.strips.data() + strip * kStripColumns * weights.depth;
        int32_t* order = weights.order.data() + strip * quads;
        int64_t front = 0, back = quads;  // safe quads fill from the front, the others from the back
        for (int64_t k = 0; k < weights.depth; k += kQuad) {
            const Quad quad(rows.data(), weights.depth, k);
            const bool safe = !saturates || quad.is_safe();
            const int64_t place = safe ? front++ : --back;
            order[place] = static_cast<int32_t>(k);
            std::memcpy(packed + place * kStripColumns * kQuad, quad.w, sizeof quad.w);
            for (int64_t i = 0; i < kStripColumns * kQuad && safe; ++i) correction[i / kQuad] += 128 * quad.w[i];
        }
        weights.safe[static_cast<size_t>(strip)] = static_cast<int32_t>(front);
    }
}

}  // namespace

Weights prepare(const Tensor (&in)[6], const Extents& extents, ElementType type, const Lane& lane) {
    Weights weights;
    const int64_t columns = extents.outputs, outliers = extents.outliers;
    weights.columns = round_up(columns, kStripColumns);
    const auto padded = static_cast<size_t>(weights.columns);
    const auto* index = in[kOutlierIndex].as<int32_t>();
    weights.outlier_index.assign(index, index + outliers);
    find_regular(extents.inputs_padded, weights);
    weights.depth = round_up(static_cast<int64_t>(weights.regular.size()), lane.depth);
    weights.w_scale.assign(padded, 0.0f);
    std::copy_n(in[kWScale].as<float>(), columns, weights.w_scale.begin());
    weights.no_bias.assign(padded, 0.0f);
    weights.w_outlier.assign(padded * static_cast<size_t>(outliers), 0.0f);
    std::vector<float> row(static_cast<size_t>(extents.outliers_padded));
    const auto* w_outlier = in[kWOutlier].as<char>();
    for (int64_t n = 0; n < columns && outliers > 0; ++n) {
        const size_t start = static_cast<size_t>(n * extents.outliers_padded) * element_size(type);
        lane.widen[type](w_outlier + start, outliers, row.data());
        for (int64_t o = 0; o < outliers; ++o) {
            const int64_t place = (n / kStripColumns * outliers + o) * kStripColumns + n % kStripColumns;
            weights.w_outlier[static_cast<size_t>(place)] = row[static_cast<size_t>(o)];
        }
    }
    make_strips(in[kWq].as<int8_t>(), columns, extents.inputs_padded, lane.saturates, weights);
    return weights;
}

// 64 bytes beyond a multiple of 64: rows of a power-of-two length would all fall on the same cache sets.
int64_t Run::q_stride() const { return round_up(weights.depth, 64) + 64; }

int64_t Run::quantize_tasks() const {
    const int64_t elements = extents.rows * extents.inputs;
    return std::clamp(divide_up(elements, kQuantizeElements), int64_t{1}, std::min(extents.rows, kMaxQuantizeTasks));
}

int64_t Run::strips_per_task() const {
    const int64_t work = kStripColumns * extents.inputs_padded * std::min(extents.rows, kTaskRows);
    const int64_t strips = weights.columns / kStripColumns;
    const bool whole_tiles = divide_up(strips, kTileStrips) * row_tasks() >= kEnoughTasks;
    const int64_t least = whole_tiles ? kTileStrips : kTaskStrips;
    return std::clamp(round_up(kTaskWork / std::max<int64_t>(work, 1), least), least, strips + least);
}

int64_t Run::column_tasks() const { return divide_up(weights.columns / kStripColumns, strips_per_task()); }
int64_t Run::row_tasks() const { return divide_up(extents.rows, kTaskRows); }

size_t Run::scratch_bytes() const {
    return 64 + aligned(extents.rows * q_stride()) + aligned(extents.rows * 4) +
           aligned(extents.rows * extents.outliers * 4) + aligned(quantize_tasks() * extents.inputs * 4);
}

void Run::use_scratch(void* scratch) {
    auto* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    q = reinterpret_cast<uint8_t*>(next);
    next += aligned(extents.rows * q_stride());
    x_scale = reinterpret_cast<float*>(next);
    next += aligned(extents.rows * 4);
    x_outlier = reinterpret_cast<float*>(next);
    next += aligned(extents.rows * extents.outliers * 4);
    row_buffer = reinterpret_cast<float*>(next);
    if (limit > 0) wide.resize(static_cast<size_t>(extents.rows));
}

OrtStatus* Run::execute(const OrtKernelContext* context) {
    const int64_t elements = extents.rows * extents.inputs;
    const auto quantize = [](void* run, size_t task) { static_cast<Run*>(run)->quantize_task(task); };
    const auto multiply = [](void* run, size_t task) { static_cast<Run*>(run)->multiply_task(task); };
    const size_t quantizing = static_cast<size_t>(quantize_tasks());
    QPIPE_RETURN_IF(parallel(context, elements < kQuantizeElements, quantizing, quantize, this));
    const size_t multiplying = static_cast<size_t>(column_tasks() * row_tasks());
    return parallel(context, elements * extents.outputs < kSerialWork, multiplying, multiply, this);
}

void Run::quantize_task(size_t task) {
    const int64_t tasks = quantize_tasks(), index = static_cast<int64_t>(task);
    const int64_t first = extents.rows * index / tasks, last = extents.rows * (index + 1) / tasks;
    for (int64_t m = first; m < last; ++m) quantize_row(m, row_buffer + index * extents.inputs);
}

void Run::quantize_row(int64_t m, float* row) {
    const char* given = static_cast<const char*>(x) + static_cast<size_t>(m * extents.inputs) * element_size(type);
    const float* values = row;
    if (type == kFloat32) {
        values = reinterpret_cast<const float*>(given);
    } else {
        lane.widen[type](given, extents.inputs, row);
    }
    for (int64_t o = 0; o < extents.outliers; ++o) {
        x_outlier[m * extents.outliers + o] = values[weights.outlier_index[static_cast<size_t>(o)]];
    }
    const auto [regular, bits] = lane.gather(values, weights.keep.data(), extents.inputs, row);
    uint8_t* codes = q + m * q_stride();
    std::memset(codes + regular, 0, static_cast<size_t>(weights.depth - regular));
    if (limit > 0 && from_bits(bits) > limit) {
        x_scale[m] = quantize_with_new_outliers(m, row, regular, bits);
    } else {
        x_scale[m] = std::max(from_bits(bits) / kOneDigit, kSmallestScale);
        if (bits < kInfinityBits) lane.encode(row, regular, 1.0f / x_scale[m], codes);
    }
    if (bits >= kInfinityBits) {
        std::memset(codes, 128, static_cast<size_t>(regular));
        x_scale[m] = std::numeric_limits<float>::quiet_NaN();
    }
}

// The rare row: its new outliers are collected, left out of the scale, and written with two digits.
float Run::quantize_with_new_outliers(int64_t m, float* row, int64_t count, uint32_t amax_bits) {
    float regular = 0.0f;
    int64_t met = 0;
    for (int64_t k = 0; k < count; ++k) {
        const float magnitude = std::fabs(row[k]);
        if (magnitude > limit) {
            ++met;
        } else if (magnitude > regular) {
            regular = magnitude;
        }
    }
    new_outliers += met;
    if (amax_bits >= kInfinityBits) return 0.0f;
    const float largest = from_bits(amax_bits);
    uint8_t* codes = q + m * q_stride();
    if (met > kMaxNewOutliers) {
        const float scale = std::max(largest / kOneDigit, kSmallestScale);
        lane.encode(row, count, 1.0f / scale, codes);
        return scale;
    }
    const float scale = std::max({regular / kOneDigit, largest / kTwoDigits, kSmallestScale});
    const float inverse = 1.0f / scale;
    std::vector<HighDigit>& digits = wide[static_cast<size_t>(m)];
    for (int64_t k = 0; k < count; ++k) {
        if (!(std::fabs(row[k]) > limit)) continue;
        const float code = std::clamp(std::nearbyint(row[k] * inverse), -kTwoDigits, kTwoDigits);
        const float high = std::nearbyint(code / 128.0f);
        digits.push_back({weights.regular[static_cast<size_t>(k)], static_cast<int32_t>(high)});
        // The low digit, -64..64, takes the value's place; scaled so that encoding gives exactly this digit.
        row[k] = (code - 128.0f * high) * scale;
    }
    lane.encode(row, count, inverse, codes);
    return scale;
}

void Run::multiply_task(size_t task) {
    const int64_t index = static_cast<int64_t>(task);
    const int64_t first = index / row_tasks() * strips_per_task(), m0 = index % row_tasks() * kTaskRows;
    const int64_t last = std::min(first + strips_per_task(), weights.columns / kStripColumns);
    const int64_t rows = std::min(kTaskRows, extents.rows - m0);
    for (int64_t strip = first; strip < last; strip += kTileStrips) {
        for (int64_t m = m0; m < m0 + rows; m += kTileRows) {
            multiply_tile(strip, std::min(kTileStrips, last - strip), m, std::min(kTileRows, m0 + rows - m));
        }
    }
}

void Run::multiply_tile(int64_t strip, int64_t strips, int64_t m0, int64_t rows) {
    alignas(64) int32_t sums[kTileRows * kTileColumns];
    const int64_t quads = weights.depth / kQuad, n0 = strip * kStripColumns;
    const int64_t columns = std::min(strips * kStripColumns, extents.outputs - n0);
    lane.dot({q + m0 * q_stride(), q_stride(), rows, strips, quads, weights.strips.data() + n0 * weights.depth,
              weights.order.data() + strip * quads, weights.safe.data() + strip, weights.correction.data() + n0, sums,
              kTileColumns});
    for (int64_t m = 0; m < rows && limit > 0; ++m) add_high_digits(m0 + m, n0, columns, sums + m * kTileColumns);
    char* target = static_cast<char*>(y) + static_cast<size_t>(m0 * extents.outputs + n0) * element_size(type);
    lane.epilogue[type]({sums, kTileColumns, rows, columns, x_scale + m0, weights.w_scale.data() + n0, bias + n0,
                         x_outlier + m0 * extents.outliers, weights.w_outlier.data() + n0 * extents.outliers,
                         extents.outliers, target, extents.outputs});
}

void Run::add_high_digits(int64_t m, int64_t n0, int64_t columns, int32_t* sums) const {
    for (const HighDigit& digit : wide[static_cast<size_t>(m)]) {
        for (int64_t n = 0; n < columns; ++n) {
            sums[n] += 128 * digit.high * w_q[(n0 + n) * extents.inputs_padded + digit.k];
        }
    }
}

}  // namespace qpipe::outlier_matmul
