#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace qpipe::outlier_matmul {
namespace {

constexpr int64_t kDirectBytes = 192 * 1024;  // of w_q per task: stays in the second-level cache while X passes by
constexpr int64_t kDirectColumns = 128;
constexpr int64_t kDirectRows = 32;      // sums of a tile: at most 32 x 128 x 4 = 16 KiB
constexpr int64_t kFewRows = 24;         // up to here rearranging the weights does not pay
constexpr int64_t kStripTaskColumns = 64;
constexpr int64_t kStripRows = 256;    // sums: 256 x 16 x 4 = 16 KiB
constexpr int64_t kStripInputs = 512;  // weights: 16 x 512 x 2 = 16 KiB
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

}  // namespace

Weights prepare(const Tensor (&in)[6], const Extents& extents, ElementType type, const Lane& lane) {
    Weights weights;
    const int64_t columns = extents.outputs, outliers = extents.outliers;
    weights.stride = round_up(columns, 8);
    const auto* index = in[kOutlierIndex].as<int32_t>();
    weights.outlier_index.assign(index, index + outliers);
    weights.w_scale.assign(static_cast<size_t>(weights.stride), 0.0f);
    std::copy_n(in[kWScale].as<float>(), columns, weights.w_scale.begin());
    weights.no_bias.assign(static_cast<size_t>(weights.stride), 0.0f);
    weights.w_outlier.assign(static_cast<size_t>(outliers * weights.stride), 0.0f);
    std::vector<float> row(static_cast<size_t>(extents.outliers_padded));
    const auto* w_outlier = in[kWOutlier].as<char>();
    for (int64_t n = 0; n < columns && outliers > 0; ++n) {
        const size_t start = static_cast<size_t>(n * extents.outliers_padded) * element_size(type);
        lane.widen[type](w_outlier + start, outliers, row.data());
        for (int64_t o = 0; o < outliers; ++o) {
            weights.w_outlier[static_cast<size_t>((n / 8 * outliers + o) * 8 + n % 8)] = row[static_cast<size_t>(o)];
        }
    }
    if (lane.offset_codes) {
        weights.column_sum.resize(static_cast<size_t>(columns));
        for (int64_t n = 0; n < columns; ++n) {
            const int8_t* w = in[kWq].as<int8_t>() + n * extents.inputs_padded;
            int32_t sum = 0;
            for (int64_t k = 0; k < extents.inputs_padded; ++k) sum += w[k];
            weights.column_sum[static_cast<size_t>(n)] = sum;
        }
    }
    return weights;
}

// 64 bytes beyond a multiple of 64: rows of a power-of-two length would all fall on the same cache sets.
int64_t Run::q_stride() const { return round_up(extents.inputs_padded, 64) + 64; }

int64_t Run::quantize_tasks() const {
    const int64_t elements = extents.rows * extents.inputs;
    return std::clamp(divide_up(elements, kQuantizeElements), int64_t{1}, std::min(extents.rows, kMaxQuantizeTasks));
}

bool Run::uses_strips() const { return lane.dot_strip != nullptr && extents.rows > kFewRows; }

int64_t Run::task_columns() const {
    if (uses_strips()) return kStripTaskColumns;
    const int64_t fitting = kDirectBytes / std::max<int64_t>(extents.inputs_padded, 1) / 8 * 8;
    return std::clamp<int64_t>(fitting, 16, kDirectColumns);
}

int64_t Run::task_rows() const { return uses_strips() ? kStripRows : 2 * kDirectRows; }
int64_t Run::column_tasks() const { return divide_up(extents.outputs, task_columns()); }
int64_t Run::row_tasks() const { return divide_up(extents.rows, task_rows()); }

void Run::encode(const float* row, float inverse, char* codes) const {
    if (uses_strips()) {
        lane.encode_wide(row, extents.inputs, inverse, reinterpret_cast<int16_t*>(codes));
    } else {
        lane.encode(row, extents.inputs, inverse, reinterpret_cast<int8_t*>(codes));
    }
}

size_t Run::scratch_bytes() const {
    return 64 + aligned(extents.rows * q_stride() * code_bytes()) + aligned(extents.rows * 4) +
           aligned(extents.rows * extents.outliers * 4) + aligned(quantize_tasks() * extents.inputs * 4);
}

void Run::use_scratch(void* scratch) {
    auto* next = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    q = next;
    next += aligned(extents.rows * q_stride() * code_bytes());
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
    const int64_t inputs = extents.inputs;
    const size_t start = static_cast<size_t>(m * inputs) * element_size(type);
    lane.widen[type](static_cast<const char*>(x) + start, inputs, row);
    for (int64_t o = 0; o < extents.outliers; ++o) {
        float& value = row[weights.outlier_index[static_cast<size_t>(o)]];
        x_outlier[m * extents.outliers + o] = value;
        value = 0.0f;
    }
    const uint32_t bits = lane.amax_bits(row, inputs);
    char* codes = q + m * q_stride() * code_bytes();
    std::memset(codes + inputs * code_bytes(), 0,
                static_cast<size_t>((extents.inputs_padded - inputs) * code_bytes()));
    if (limit > 0 && from_bits(bits) > limit) {
        x_scale[m] = quantize_with_new_outliers(m, row, bits);
    } else {
        x_scale[m] = std::max(from_bits(bits) / kOneDigit, kSmallestScale);
        if (bits < kInfinityBits) encode(row, 1.0f / x_scale[m], codes);
    }
    if (bits >= kInfinityBits) {
        std::memset(codes, 0, static_cast<size_t>(inputs * code_bytes()));
        x_scale[m] = std::numeric_limits<float>::quiet_NaN();
    }
}

// The rare row: its new outliers are collected, left out of the scale, and written with two digits.
float Run::quantize_with_new_outliers(int64_t m, float* row, uint32_t amax_bits) {
    float regular = 0.0f;
    int64_t met = 0;
    for (int64_t k = 0; k < extents.inputs; ++k) {
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
    char* codes = q + m * q_stride() * code_bytes();
    if (met > kMaxNewOutliers) {
        const float scale = std::max(largest / kOneDigit, kSmallestScale);
        encode(row, 1.0f / scale, codes);
        return scale;
    }
    const float scale = std::max({regular / kOneDigit, largest / kTwoDigits, kSmallestScale});
    const float inverse = 1.0f / scale;
    std::vector<HighDigit>& digits = wide[static_cast<size_t>(m)];
    for (int64_t k = 0; k < extents.inputs; ++k) {
        if (!(std::fabs(row[k]) > limit)) continue;
        const float code = std::clamp(std::nearbyint(row[k] * inverse), -kTwoDigits, kTwoDigits);
        const float high = std::nearbyint(code / 128.0f);
        digits.push_back({k, static_cast<int32_t>(high)});
        // The low digit, -64..64, takes the value's place; scaled so that encoding gives exactly this digit.
        row[k] = (code - 128.0f * high) * scale;
    }
    encode(row, inverse, codes);
    return scale;
}

void Run::multiply_task(size_t task) {
    const int64_t index = static_cast<int64_t>(task);
    const int64_t n0 = index / row_tasks() * task_columns(), m0 = index % row_tasks() * task_rows();
    const int64_t columns = std::min(task_columns(), extents.outputs - n0);
    const int64_t rows = std::min(task_rows(), extents.rows - m0);
    uses_strips() ? multiply_strips(m0, rows, n0, columns) : multiply_direct(m0, rows, n0, columns);
}

void Run::multiply_direct(int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
    alignas(64) int32_t sums[kDirectRows * kDirectColumns];
    const int32_t* column_sum = lane.offset_codes ? weights.column_sum.data() + n0 : nullptr;
    for (int64_t m = m0; m < m0 + rows; m += kDirectRows) {
        const int64_t part = std::min(kDirectRows, m0 + rows - m);
        lane.dot({reinterpret_cast<const int8_t*>(q) + m * q_stride(), q_stride(), part,
                  w_q + n0 * extents.inputs_padded, columns, extents.inputs_padded, column_sum, sums, kDirectColumns});
        finish(m, part, n0, columns, sums, kDirectColumns);
    }
}

void Run::multiply_strips(int64_t m0, int64_t rows, int64_t n0, int64_t columns) {
    alignas(64) int16_t strip[kStripColumns * kStripInputs];
    alignas(64) int32_t sums[kStripRows * kStripColumns];
    const auto* codes = reinterpret_cast<const int16_t*>(q) + m0 * q_stride();
    for (int64_t n = n0; n < n0 + columns; n += kStripColumns) {
        const int64_t part = std::min(kStripColumns, n0 + columns - n);
        for (int64_t k = 0; k < extents.inputs_padded; k += kStripInputs) {
            const int64_t inputs = std::min(kStripInputs, extents.inputs_padded - k);
            lane.make_strip(w_q + n * extents.inputs_padded + k, extents.inputs_padded, part, inputs, strip);
            lane.dot_strip({codes + k, q_stride(), rows, strip, inputs, sums, k > 0});
        }
        finish(m0, rows, n, part, sums, kStripColumns);
    }
}

void Run::finish(int64_t m0, int64_t rows, int64_t n0, int64_t columns, int32_t* sums, int64_t sums_stride) {
    for (int64_t m = 0; m < rows && limit > 0; ++m) add_high_digits(m0 + m, n0, columns, sums + m * sums_stride);
    char* target = static_cast<char*>(y) + static_cast<size_t>(m0 * extents.outputs + n0) * element_size(type);
    lane.epilogue[type]({sums, sums_stride, rows, columns, x_scale + m0, weights.w_scale.data() + n0, bias + n0,
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
