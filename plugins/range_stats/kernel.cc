// RangeStatsHost: counts its input into the state that its `key` names; the output is the number of values.
// Also the functions by which Python reads the counters (ctypes).
#include <algorithm>
#include <cstring>
#include <thread>

#include "../common/ort_op.h"
#include "../outlier_matmul/cpu/lanes.h"
#include "table.h"

namespace qpipe::range_stats {
namespace {

using outlier_matmul::ElementType;
using outlier_matmul::Lane;

constexpr int64_t kTaskValues = 16 * 1024;  // below, waking a thread costs more than counting
constexpr int64_t kMaxTasks = 8;  // each may need a table of some 100 KB, in models of a thousand tensors
constexpr int64_t kTaskChannels = 256;

struct Call {
    const Lane* lane;
    ElementType type;
    float sentinel;
    const char* values;
    int64_t size, channels;
    std::vector<Table*> tables;  // one per part
    std::vector<float> widened;  // 16-bit input as float32, only when channels are wanted
    Channels run;
};

size_t element_size(ElementType type) { return type == outlier_matmul::kFloat32 ? 4 : 2; }

void count_part(Call& call, int64_t part) {
    constexpr int64_t kChunk = 4096;
    const auto parts = static_cast<int64_t>(call.tables.size());
    const int64_t first = call.size * part / parts, last = call.size * (part + 1) / parts;
    Table& table = *call.tables[static_cast<size_t>(part)];
    if (call.type == outlier_matmul::kFloat32) {
        table.count(reinterpret_cast<const float*>(call.values) + first, last - first, call.sentinel);
        return;
    }
    float chunk[kChunk];
    for (int64_t i = first; i < last; i += kChunk) {
        const int64_t size = std::min(kChunk, last - i);
        call.lane->widen[call.type](call.values + static_cast<size_t>(i) * element_size(call.type), size, chunk);
        table.count(chunk, size, call.sentinel);
    }
}

void sum_part(Call& call, int64_t part) {
    const auto* values = call.type == outlier_matmul::kFloat32 ? reinterpret_cast<const float*>(call.values)
                                                               : call.widened.data();
    const int64_t first = part * kTaskChannels, last = std::min(first + kTaskChannels, call.channels);
    add_tokens(values, call.size / call.channels, call.channels, first, last, call.sentinel, call.run);
}

OrtStatus* parallel(const OrtKernelContext* context, int64_t total, Call& call, void (*fn)(void*, size_t)) {
    if (total == 1) {
        fn(&call, 0);
        return nullptr;
    }
    return api().KernelContext_ParallelFor(context, fn, static_cast<size_t>(total), 0, &call);
}

class CpuKernel : public Kernel {
  public:
    explicit CpuKernel(ElementType type) : type_(type) {}

    OrtStatus* initialize(const OrtKernelInfo* info) {
        int64_t key = 0;
        QPIPE_RETURN_IF(attribute(info, "key", int64_t{0}, key));
        QPIPE_RETURN_IF(attribute(info, "channels", int64_t{0}, channels_));
        QPIPE_RETURN_IF(attribute(info, "threads", int64_t{std::thread::hardware_concurrency()}, threads_));
        QPIPE_RETURN_IF(attribute(info, "sentinel", 1e30f, sentinel_));
        lane_ = outlier_matmul::available_lanes().items[0];
        state_ = Registry::instance().open(key);
        return nullptr;
    }

    OrtStatus* compute(OrtKernelContext* context) override {
        Tensor x;
        QPIPE_RETURN_IF(input(context, 0, x));
        void* counted = nullptr;
        QPIPE_RETURN_IF(output(context, 0, {}, counted));
        if (counted != nullptr) *static_cast<int64_t*>(counted) = x.size();
        if (x.size() == 0) return nullptr;
        const int64_t channels = channels_ != 0 && x.rank() > 0 ? x.shape.back() : 0;
        Call call{lane_, type_, sentinel_, x.as<char>(), x.size(), channels, {}, {}, {}};
        QPIPE_RETURN_IF(count(context, call));
        return call.channels > 0 ? sum(context, call) : nullptr;
    }

  private:
    OrtStatus* count(const OrtKernelContext* context, Call& call) {
        // No more parts than threads, and their tables at once: what a tensor takes does not depend on the scheduler.
        const int64_t parts = std::clamp(call.size / kTaskValues, int64_t{1}, std::clamp(threads_, int64_t{1}, kMaxTasks));
        call.tables = state_->take(static_cast<size_t>(parts));
        OrtStatus* status = parallel(context, parts, call, [](void* data, size_t part) {
            count_part(*static_cast<Call*>(data), static_cast<int64_t>(part));
        });
        state_->give_back(call.tables);
        return status;
    }

    OrtStatus* sum(const OrtKernelContext* context, Call& call) {
        if (call.type != outlier_matmul::kFloat32) {
            call.widened.resize(static_cast<size_t>(call.size));
            call.lane->widen[call.type](call.values, call.size, call.widened.data());
        }
        const auto channels = static_cast<size_t>(call.channels);
        call.run.amax.assign(channels, 0.0f);
        call.run.total.assign(channels, 0.0);
        call.run.energy.assign(channels, 0.0);
        call.run.tokens = call.size / call.channels;
        const int64_t tasks = (call.channels + kTaskChannels - 1) / kTaskChannels;
        QPIPE_RETURN_IF(parallel(context, tasks, call, [](void* data, size_t part) {
            sum_part(*static_cast<Call*>(data), static_cast<int64_t>(part));
        }));
        state_->add_channels(call.run);
        return nullptr;
    }

    ElementType type_;
    const Lane* lane_ = nullptr;
    float sentinel_ = 0;
    int64_t channels_ = 0, threads_ = 1;
    std::shared_ptr<State> state_;
};

template <ElementType Type>
OrtStatus* create(const OrtKernelInfo* info, std::unique_ptr<Kernel>& kernel) {
    auto made = std::make_unique<CpuKernel>(Type);
    QPIPE_RETURN_IF(made->initialize(info));
    kernel = std::move(made);
    return nullptr;
}

OrtStatus* no_inference(OrtShapeInferContext*) { return nullptr; }

template <ElementType Type, ONNXTensorElementDataType X>
const OrtCustomOp* make_op() {
    static const CustomOp op("RangeStatsHost", "CPUExecutionProvider", {{X}}, {{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}},
                             create<Type>, no_inference);
    return &op;
}

}  // namespace
}  // namespace qpipe::range_stats

namespace qpipe {

std::vector<const OrtCustomOp*> range_stats_cpu_ops() {
    using namespace range_stats;
    return {make_op<outlier_matmul::kFloat32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>(),
            make_op<outlier_matmul::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>(),
            make_op<outlier_matmul::kBFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>()};
}

}  // namespace qpipe

namespace {

int64_t copy_channels(const qpipe::range_stats::Channels& channels, int64_t capacity, float* amax, double* total,
                      double* energy, int64_t* tokens) {
    const auto count = static_cast<int64_t>(channels.amax.size());
    if (count <= capacity) {
        std::copy(channels.amax.begin(), channels.amax.end(), amax);
        std::copy(channels.total.begin(), channels.total.end(), total);
        std::copy(channels.energy.begin(), channels.energy.end(), energy);
        *tokens = channels.tokens;
    }
    return count;
}

}  // namespace

#define QPIPE_EXPORT __attribute__((visibility("default")))

extern "C" {

// Fills ids: uint16 [65536] and counts: int64 [65536] of the bins that are not empty, ascending, and sets
// facts: int64 [6] = finite, nan, +inf, -inf, sentinel, low_bits; range: float [2] = lo, hi.
// Returns the number of bins, or -1 when no node and no reader ever used the key.
QPIPE_EXPORT int64_t qpipe_range_stats_histogram(int64_t key, uint16_t* ids, int64_t* counts, int64_t* facts,
                                                 float* range) {
    const auto state = qpipe::range_stats::Registry::instance().find(key);
    if (!state) return -1;
    qpipe::range_stats::Extrema extrema;
    const int64_t bins = state->read(ids, counts, extrema);
    const int64_t all[6] = {extrema.finite,  extrema.nan,      extrema.pos_inf,
                            extrema.neg_inf, extrema.sentinel, extrema.low_bits};
    std::memcpy(facts, all, sizeof all);
    range[0] = extrema.lo;
    range[1] = extrema.hi;
    return bins;
}

// Returns the number of channels, 0 when none were summed, and fills the arrays when `capacity` is enough.
QPIPE_EXPORT int64_t qpipe_range_stats_channels(int64_t key, int64_t capacity, float* amax, double* total,
                                                double* energy, int64_t* tokens) {
    const auto state = qpipe::range_stats::Registry::instance().find(key);
    return state ? copy_channels(state->channels(), capacity, amax, total, energy, tokens) : 0;
}

// The same of runs that the calling thread started; what was copied is forgotten.
QPIPE_EXPORT int64_t qpipe_range_stats_take_channels(int64_t key, int64_t capacity, float* amax, double* total,
                                                     double* energy, int64_t* tokens) {
    const auto state = qpipe::range_stats::Registry::instance().find(key);
    if (!state) return 0;
    const int64_t count = copy_channels(state->own_channels(), capacity, amax, total, energy, tokens);
    if (count <= capacity) state->forget_own_channels();
    return count;
}

QPIPE_EXPORT void qpipe_range_stats_clear(int64_t key) {
    if (const auto state = qpipe::range_stats::Registry::instance().find(key)) state->clear();
}

// Forget the key; a session that still uses it keeps its counters to itself.
QPIPE_EXPORT void qpipe_range_stats_release(int64_t key) { qpipe::range_stats::Registry::instance().release(key); }

}  // extern "C"
