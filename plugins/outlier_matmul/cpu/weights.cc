#include "weights.h"

#include <algorithm>
#include <cstring>

namespace qpipe::outlier_matmul {
namespace {

constexpr int64_t kFewUnsafe = 16;      // one quad in 16
constexpr int64_t kSampledStrips = 64;

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

    Quad(const Quad& quad, const Order& order) {
        for (int64_t i = 0; i < kStripColumns * kQuad; ++i) {
            const int8_t value = quad.w[i / kQuad * kQuad + order.input[i % kQuad]];
            w[i] = static_cast<int8_t>(order.flip[i % kQuad] != 0 ? -value : value);
        }
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

struct Placed {
    Quad quad;
    int64_t form;
    bool safe;
};

// The quad in the first order that is safe; as it is when none is.
Placed place(const Quad& quad, int64_t orders) {
    if (orders == 0) return {quad, 0, true};
    for (int64_t form = 0; form < orders; ++form) {
        const Quad ordered(quad, kOrders[form]);
        if (ordered.is_safe()) return {ordered, form, true};
    }
    return {quad, orders, false};
}

// The regular inputs of a strip's columns, [16][depth]; zeros in those beyond the last column, and in the padding.
class StripRows {
  public:
    StripRows(const int8_t* w_q, int64_t columns, int64_t inputs, const Weights& weights)
        : w_q_(w_q), columns_(columns), inputs_(inputs), weights_(weights),
          rows_(static_cast<size_t>(kStripColumns * weights.depth), 0) {}

    const int8_t* take(int64_t strip) {
        for (int64_t n = 0; n < kStripColumns; ++n) {
            const int64_t column = strip * kStripColumns + n;
            int8_t* row = rows_.data() + n * weights_.depth;
            for (size_t k = 0; k < weights_.regular.size(); ++k) {
                row[k] = column < columns_ ? w_q_[column * inputs_ + weights_.regular[k]] : int8_t{0};
            }
        }
        return rows_.data();
    }

  private:
    const int8_t* w_q_;
    int64_t columns_, inputs_;
    const Weights& weights_;
    std::vector<int8_t> rows_;
};

// As many orders as leave few unsafe quads: each one makes the codes longer.
int64_t enough_orders(StripRows& strips, const Weights& weights) {
    const int64_t total = weights.columns / kStripColumns, sampled = std::min(total, kSampledStrips);
    int64_t unsafe[kOrderCount] = {};
    for (int64_t i = 0; i < sampled; ++i) {
        const int8_t* rows = strips.take(i * total / sampled);
        for (int64_t k = 0; k < weights.depth; k += kQuad) {
            const int64_t form = place(Quad(rows, weights.depth, k), kOrderCount).form;
            for (int64_t order = 0; order < form; ++order) ++unsafe[order];
        }
    }
    int64_t orders = 1;
    while (orders < kOrderCount && unsafe[orders - 1] * kFewUnsafe > sampled * weights.depth / kQuad) ++orders;
    return orders;
}

// Where a row of codes has the form of input k.
int64_t code_offset(int64_t k, int64_t form, int64_t orders) {
    if (orders == 0) return k;
    return (k / kCodeBlock * (orders + kUnorderedForms) + form) * kCodeBlock + k % kCodeBlock;
}

void make_strips(StripRows& rows, Weights& weights) {
    const int64_t quads = weights.depth / kQuad, strips = weights.columns / kStripColumns;
    weights.strips.resize(static_cast<size_t>(weights.columns * weights.depth));
    weights.order.resize(static_cast<size_t>(strips * quads));
    weights.safe.resize(static_cast<size_t>(strips));
    weights.correction.assign(static_cast<size_t>(weights.columns), 0);
    for (int64_t strip = 0; strip < strips; ++strip) {
        const int8_t* given = rows.take(strip);
        int32_t* correction = weights.correction.data() + strip * kStripColumns;
        int8_t* packed = weights.strips.data() + strip * kStripColumns * weights.depth;
        int32_t* order = weights.order.data() + strip * quads;
        int64_t front = 0, back = quads;  // safe quads fill from the front, the others from the back
        for (int64_t k = 0; k < weights.depth; k += kQuad) {
            const Placed placed = place(Quad(given, weights.depth, k), weights.orders);
            const int64_t position = placed.safe ? front++ : --back;
            order[position] = static_cast<int32_t>(code_offset(k, placed.form, weights.orders));
            std::memcpy(packed + position * kStripColumns * kQuad, placed.quad.w, sizeof placed.quad.w);
            for (int64_t i = 0; i < kStripColumns * kQuad && placed.safe; ++i) {
                const int32_t offset = kOrders[placed.form].flip[i % kQuad] != 0 ? 127 : 128;
                correction[i / kQuad] += offset * placed.quad.w[i];
            }
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
    StripRows rows(in[kWq].as<int8_t>(), columns, extents.inputs_padded, weights);
    if (lane.expand != nullptr) weights.orders = enough_orders(rows, weights);
    make_strips(rows, weights);
    return weights;
}

}  // namespace qpipe::outlier_matmul
