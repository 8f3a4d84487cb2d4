#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace qpipe::outlier_matmul {
namespace {

constexpr int64_t kTileStrips = 16;        // of a tile, at most
constexpr int64_t kMostTileRows = 32;
constexpr int64_t kTaskRows = 256;         // of a task, at most
constexpr int64_t kBlockRows = 256;        // quantized before they are multiplied, at least
constexpr int64_t kBlockBytes = 1 << 20;   // of codes, unless that is fewer rows: they stay in the second-level cache
constexpr int64_t kFewTaskRows = 64;       // a task of fewer rows would read weights too often
constexpr int64_t kPanelBytes = 1 << 20;   // weights of a task, at most: they stay in the second-level cache
constexpr int64_t kEnoughTasks = 8;        // below, tasks are made smaller
constexpr int64_t kTaskWork = 512 * 1024;  // multiply-adds per parallel task, at least
constexpr int64_t kQuantizeElements = 16 * 1024;  // per parallel task
constexpr int64_t kMaxQuantizeTasks = 64;
constexpr int64_t kSerialWork = 64 * 1024;  // multiply-adds below which waking threads costs more than it gains
constexpr uint32_t kInfinityBits = 0x7f800000u;

int64_t divide_up(int64_t size, int64_t part) { return (size + part - 1) / part; }

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

}  // namespace

// 64 bytes beyond a multiple of 64: rows of a power-of-two length would all fall on the same cache sets.
int64_t Run::q_stride() const {
    const int64_t forms = weights.orders > 0 ? weights.orders + kUnorderedForms : 1;
    return round_up(weights.depth, kCodeBlock) * forms + 64;
}

int64_t Run::most_rows() const { return std::min(extents.rows, std::max(kBlockRows, kBlockBytes / q_stride())); }

int64_t Run::buffer_stride() const { return round_up(extents.inputs, kCodeBlock); }

int64_t Run::quantize_tasks() const {
    const int64_t elements = rows * extents.inputs;
    return std::clamp(divide_up(elements, kQuantizeElements), int64_t{1}, std::min(rows, kMaxQuantizeTasks));
}

// Tasks are as large as the caches like them, unless that leaves threads without any.
Run::Cut Run::cut() const {
    const int64_t strips = weights.columns / kStripColumns;
    const int64_t strip_bytes = std::max(weights.depth, kQuad) * kStripColumns;
    Cut cut{std::min(rows, kTaskRows), std::min(strips, std::max(kTileStrips, kPanelBytes / strip_bytes / 2 * 2))};
    const auto tasks = [&] { return divide_up(rows, cut.rows) * divide_up(strips, cut.strips); };
    while (tasks() < kEnoughTasks && cut.rows > kFewTaskRows) cut.rows = round_up(cut.rows / 2, kFewTaskRows);
    while (tasks() < kEnoughTasks && cut.strips > 2 && cut.rows * cut.strips * strip_bytes > 2 * kTaskWork) {
        cut.strips = round_up(cut.strips / 2, 2);
    }
    return cut;
}

size_t Run::scratch_bytes() const {
    const int64_t most = most_rows();
    return 64 + aligned(most * q_stride()) + aligned(most * 4) + aligned(most * extents.outliers * 4) +
           aligned(kMaxQuantizeTasks * buffer_stride() * 4);
}

void Run::use_scratch(void* scratch) {
    auto* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    q = reinterpret_cast<uint8_t*>(next);
    next += aligned(most_rows() * q_stride());
    x_scale = reinterpret_cast<float*>(next);
    next += aligned(most_rows() * 4);
    x_outlier = reinterpret_cast<float*>(next);
    next += aligned(most_rows() * extents.outliers * 4);
    row_buffer = reinterpret_cast<float*>(next);
    if (limit > 0) wide.resize(static_cast<size_t>(most_rows()));
}

OrtStatus* Run::execute(const OrtKernelContext* context) {
    for (first_row = 0; first_row < extents.rows; first_row += rows) {
        rows = std::min(most_rows(), extents.rows - first_row);
        QPIPE_RETURN_IF(execute_block(context));
    }
    return nullptr;
}

OrtStatus* Run::execute_block(const OrtKernelContext* context) {
    const int64_t elements = rows * extents.inputs;
    const auto quantize = [](void* run, size_t task) { static_cast<Run*>(run)->quantize_task(task); };
    const auto multiply = [](void* run, size_t task) { static_cast<Run*>(run)->multiply_task(task); };
    const size_t quantizing = static_cast<size_t>(quantize_tasks());
    QPIPE_RETURN_IF(parallel(context, elements < kQuantizeElements, quantizing, quantize, this));
    tasks = cut();
    const int64_t multiplying = divide_up(weights.columns / kStripColumns, tasks.strips) * divide_up(rows, tasks.rows);
    const bool serial = elements * extents.outputs < kSerialWork;
    return parallel(context, serial, static_cast<size_t>(multiplying), multiply, this);
}

void Run::quantize_task(size_t task) {
    const int64_t tasks = quantize_tasks(), index = static_cast<int64_t>(task);
    const int64_t first = rows * index / tasks, last = rows * (index + 1) / tasks;
    for (int64_t m = first; m < last; ++m) quantize_row(m, row_buffer + index * buffer_stride());
}

void Run::quantize_row(int64_t m, float* row) {
    const char* given = static_cast<const char*>(x);
    given += static_cast<size_t>((first_row + m) * extents.inputs) * element_size(type);
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
    uint8_t* stored = q + m * q_stride();
    // Codes to be written out take the place of the values that they are made of.
    uint8_t* codes = lane.expand == nullptr ? stored : reinterpret_cast<uint8_t*>(row);
    if (limit > 0) wide[static_cast<size_t>(m)].clear();
    if (limit > 0 && from_bits(bits) > limit) {
        x_scale[m] = quantize_with_new_outliers(m, row, regular, bits, codes);
    } else {
        x_scale[m] = std::max(from_bits(bits) / kOneDigit, kSmallestScale);
        if (bits < kInfinityBits) lane.encode(row, regular, 1.0f / x_scale[m], codes);
    }
    if (bits >= kInfinityBits) {
        std::memset(codes, 128, static_cast<size_t>(regular));
        x_scale[m] = std::numeric_limits<float>::quiet_NaN();
    }
    std::memset(codes + regular, 0, static_cast<size_t>(weights.depth - regular));
    if (lane.expand != nullptr) lane.expand(codes, weights.depth, weights.orders, stored);
}

// The rare row: its new outliers are collected, left out of the scale, and written with two digits.
float Run::quantize_with_new_outliers(int64_t m, float* row, int64_t count, uint32_t amax_bits, uint8_t* codes) {
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
    const int64_t index = static_cast<int64_t>(task), row_tasks = divide_up(rows, tasks.rows);
    const int64_t first = index / row_tasks * tasks.strips, m0 = index % row_tasks * tasks.rows;
    const int64_t last = std::min(first + tasks.strips, weights.columns / kStripColumns);
    const int64_t end = std::min(m0 + tasks.rows, rows), height = std::min({lane.rows, kMostTileRows, end - m0});
    const int64_t strips = std::clamp(lane.sums / (height * kStripColumns), int64_t{1}, kTileStrips);
    for (int64_t m = m0; m < end; m += height) {
        for (int64_t strip = first; strip < last; strip += strips) {
            multiply_tile(strip, std::min(strips, last - strip), m, std::min(height, end - m));
        }
    }
}

void Run::multiply_tile(int64_t strip, int64_t strips, int64_t m0, int64_t height) {
    alignas(64) int32_t sums[kMostTileRows * kTileStrips * kStripColumns];
    const int64_t quads = weights.depth / kQuad, n0 = strip * kStripColumns;
    const int64_t sums_stride = strips * kStripColumns, columns = std::min(sums_stride, extents.outputs - n0);
    const size_t row_bytes = static_cast<size_t>(extents.outputs) * element_size(type);
    const size_t row_part = static_cast<size_t>(columns) * element_size(type);
    char* target = static_cast<char*>(y);
    target += static_cast<size_t>((first_row + m0) * extents.outputs + n0) * element_size(type);
    // The lines of y are on their way while the product runs.
    for (char* line = target; line < target + static_cast<size_t>(height) * row_bytes; line += row_bytes) {
        for (size_t at = 0; at < row_part; at += 64) __builtin_prefetch(line + at, 1);
    }
    lane.dot({q + m0 * q_stride(), q_stride(), height, strips, quads, weights.strips.data() + n0 * weights.depth,
              weights.order.data() + strip * quads, weights.safe.data() + strip, weights.correction.data() + n0, sums,
              sums_stride});
    for (int64_t m = 0; m < height && limit > 0; ++m) add_high_digits(m0 + m, n0, columns, sums + m * sums_stride);
    lane.epilogue[type]({sums, sums_stride, height, columns, x_scale + m0, weights.w_scale.data() + n0, bias + n0,
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
