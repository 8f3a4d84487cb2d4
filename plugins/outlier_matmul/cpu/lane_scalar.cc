// The lane for every CPU, and the one that the others are compared with.
#include "half.h"
#include "lanes.h"

namespace qpipe::outlier_matmul {
namespace {

void widen_float(const void* x, int64_t count, float* out) {
    std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
}

template <float (*Convert)(uint16_t)>
void widen_words(const void* x, int64_t count, float* out) {
    const auto* words = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < count; ++i) out[i] = Convert(words[i]);
}

Gathered gather(const float* x, const uint8_t* keep, int64_t count, float* out) {
    Gathered found{0, 0};
    for (int64_t i = 0; i < count; ++i) {
        if (!(keep[i / 8] >> i % 8 & 1)) continue;
        const uint32_t magnitude = as_bits(x[i]) & 0x7fffffffu;
        found.amax_bits = magnitude > found.amax_bits ? magnitude : found.amax_bits;
        out[found.count++] = x[i];
    }
    return found;
}

void encode(const float* x, int64_t count, float inverse, uint8_t* q) {
    for (int64_t i = 0; i < count; ++i) {
        // Adding 1.5 * 2^23 leaves no fraction bits, so that the addition itself rounds half to even.
        const float rounded = (x[i] * inverse + 12582912.0f) - 12582912.0f;
        q[i] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + 128);
    }
}

void dot(const StripTask& t) {
    for (int64_t m = 0; m < t.rows; ++m) {
        int32_t* sums = t.sums + m * t.sums_stride;
        std::memset(sums, 0, kStripColumns * sizeof *sums);
        for (int64_t j = 0; j < t.quads; ++j) {
            const uint8_t* q = t.q + m * t.q_stride + t.order[j];
            const int8_t* w = t.strip + j * kStripColumns * kQuad;
            for (int64_t n = 0; n < kStripColumns; ++n) {
                for (int64_t k = 0; k < kQuad; ++k) sums[n] += (q[k] - 128) * w[n * kQuad + k];
            }
        }
    }
}

void store(float value, float* y) { *y = value; }
template <uint16_t (*Convert)(float)>
struct Word {
    uint16_t bits;
};
template <uint16_t (*Convert)(float)>
void store(float value, Word<Convert>* y) {
    y->bits = Convert(value);
}

template <class T>
void epilogue(const EpilogueTask& task) {
    for (int64_t m = 0; m < task.rows; ++m) {
        T* y = static_cast<T*>(task.y) + m * task.y_stride;
        const float* x_outlier = task.x_outlier + m * task.outliers;
        for (int64_t n = 0; n < task.columns; ++n) {
            float value = static_cast<float>(task.sums[m * task.sums_stride + n]) * task.x_scale[m] * task.w_scale[n];
            for (int64_t o = 0; o < task.outliers; ++o) {
                value += x_outlier[o] * task.w_outlier[(n / kStripColumns * task.outliers + o) * kStripColumns + n % kStripColumns];
            }
            store(value + task.bias[n], y + n);
        }
    }
}

constexpr Lane kLane{"scalar",
                     /*rows=*/16,
                     /*sums=*/1024,
                     /*depth=*/16,
                     {widen_float, widen_words<half_to_float>, widen_words<bfloat_to_float>},
                     gather,
                     encode,
                     /*expand=*/nullptr,
                     each_strip<dot>,
                     {epilogue<float>, epilogue<Word<float_to_half>>, epilogue<Word<float_to_bfloat>>}};

}  // namespace

const Lane* const kScalarLane = &kLane;

}  // namespace qpipe::outlier_matmul
