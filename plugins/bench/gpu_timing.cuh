// gpu_check, second half: GPU time of one call inside a captured CUDA graph, random data, rotating weights, medians of
// interleaved replays, beside cuBLAS FP16, cuBLASLt int8 and the floor of the data sheet.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "gpu_blas.cuh"
#include "gpu_correctness.cuh"

namespace gpu_check {

constexpr int kReplays = 15;
constexpr int kFewestCopies = 4;
constexpr double kScratchInCache = 25e6;  // bytes of quantized rows that stay in L2 between the two kernels

// Data sheet figures; all zero where the chip is not in the table.
struct Peaks {
    double bytes = 0, half_flops = 0, int8_ops = 0;
};

inline Peaks peaks_of(const std::string& name) {
    if (name.find("H200") != std::string::npos) return {4.8e12, 989e12, 1979e12};
    if (name.find("H100") != std::string::npos) return {3.35e12, 989e12, 1979e12};
    if (name.find("A100") != std::string::npos) return {2.04e12, 312e12, 624e12};
    return {};
}

// Least time in microseconds: reading x for its quantization, then the longer of bytes and arithmetic.
inline double floor_us(const Extent& e, const Peaks& peaks) {
    if (peaks.bytes == 0) return 0;
    const double m = static_cast<double>(e.m), n = static_cast<double>(e.n), k = e.k, o = round_up(e.o, 16);
    const bool two_kernels = e.m > kSmallRows;
    double quantize = 0;
    if (two_kernels) quantize = (2 * m * k + (m * (k + 2 * o) > kScratchInCache ? m * k : 0)) / peaks.bytes;
    const double bytes = n * k + 2 * m * n + 2 * o * n + (two_kernels ? 0 : 2 * m * k);
    const double arithmetic = 2 * m * n * k / peaks.int8_ops + 2 * m * n * o / peaks.half_flops;
    return 1e6 * (quantize + std::max(bytes / peaks.bytes, arithmetic));
}

inline double fp16_floor_us(const Extent& e, const Peaks& peaks) {
    if (peaks.bytes == 0) return 0;
    const double m = static_cast<double>(e.m), n = static_cast<double>(e.n), k = e.k;
    return 1e6 * std::max(2 * (m * k + n * k + m * n) / peaks.bytes, 2 * m * n * k / peaks.half_flops);
}

// A graph that makes `copies` calls, each with its own weights.
class Recording {
  public:
    Recording(const Work& work, int copies, cudaStream_t stream) : copies_(copies), stream_(stream) {
        for (int copy = 0; copy < copies; ++copy) work(copy, stream);  // warm up: nothing is loaded while capturing
        GPU_CHECK(cudaStreamSynchronize(stream));
        cudaGraph_t graph = nullptr;
        GPU_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int copy = 0; copy < copies; ++copy) work(copy, stream);
        GPU_CHECK(cudaStreamEndCapture(stream, &graph));
        GPU_CHECK(cudaGraphInstantiate(&run_, graph, 0));
        GPU_CHECK(cudaGraphDestroy(graph));
        GPU_CHECK(cudaEventCreate(&start_));
        GPU_CHECK(cudaEventCreate(&stop_));
        replay();
    }
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;
    ~Recording() {
        cudaGraphExecDestroy(run_);
        cudaEventDestroy(start_);
        cudaEventDestroy(stop_);
    }

    // Microseconds per call of one replay.
    double replay() {
        GPU_CHECK(cudaEventRecord(start_, stream_));
        GPU_CHECK(cudaGraphLaunch(run_, stream_));
        GPU_CHECK(cudaEventRecord(stop_, stream_));
        GPU_CHECK(cudaEventSynchronize(stop_));
        float milliseconds = 0;
        GPU_CHECK(cudaEventElapsedTime(&milliseconds, start_, stop_));
        return 1e3 * milliseconds / copies_;
    }

  private:
    int copies_;
    cudaStream_t stream_;
    cudaGraphExec_t run_ = nullptr;
    cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

inline double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
}

// One line of the table.
struct Row {
    Extent extent;
    Plan plan;
    double ours, fp16, int8, floor, fp16_floor;
};

class Bench {
  public:
    Bench(const Device& device, const cudaDeviceProp& facts)
        : device_(device), peaks_(peaks_of(facts.name)), cache_bytes_(static_cast<size_t>(facts.l2CacheSize)) {
        GPU_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    }
    Bench(const Bench&) = delete;
    Bench& operator=(const Bench&) = delete;
    ~Bench() { cudaStreamDestroy(stream_); }

    // Ours with the chosen plan, or with a forced one, beside the rivals.
    Row measure(const Extent& e, const Plan* forced = nullptr, bool rivals = true) {
        const int copies = copies_for(e);
        Problem<Half> p(e, copies, 7);
        const Operands first = p.operands(0, 0.0f);
        const Plan plan = forced ? *forced : choose_plan(shape_of(first, sizeof(Half)), device_);
        p.need_scratch(scratch_bytes(first, plan, sizeof(Half)));
        Row row{e, plan, 0, 0, 0, floor_us(e, peaks_), fp16_floor_us(e, peaks_)};
        const Work work = [&](int copy, cudaStream_t stream) {
            Operands op = p.operands(copy, 0.0f);
            op.new_outliers = nullptr;
            GPU_CHECK(launch<Half>(op, plan, device_, p.scratch.template as<void>(), stream));
        };
        const Timer timer = [&](const Work& w) { return median_of(w, copies); };
        if (rivals) {
            // Before and after: a clock that sinks while the table is made would favour whoever comes first.
            Fp16Rival fp16(e, copies);
            Int8Rival int8(e, copies);
            const double before = fp16.time(timer);
            row.ours = timer(work);
            row.int8 = int8.time(timer);
            const double after = fp16.time(timer), again = timer(work);
            row.fp16 = (before + after) / 2;
            row.ours = (row.ours + again) / 2;
        } else {
            row.ours = timer(work);
        }
        return row;
    }

  private:
    int copies_for(const Extent& e) const {
        const size_t weight = static_cast<size_t>(e.n) * e.k;
        return std::max(kFewestCopies, static_cast<int>(3 * cache_bytes_ / weight) + 1);
    }

    double median_of(const Work& work, int copies) {
        Recording recording(work, copies, stream_);
        std::vector<double> times;
        for (int i = 0; i < kReplays; ++i) times.push_back(recording.replay());
        return median(times);
    }

    const Device& device_;
    Peaks peaks_;
    size_t cache_bytes_;
    cudaStream_t stream_ = nullptr;
};

inline void print_head() {
    std::printf("%6s %6s %6s %3s  %-12s %9s %9s %9s %9s %7s %7s\n", "M", "K", "N", "O", "plan", "ours us", "fp16 us",
                "int8 us", "floor us", "x fp16", "x floor");
}

inline std::string plan_text(const Plan& plan) {
    std::string text = path_name(plan.path);
    if (plan.path != Path::kSmall) text += std::to_string(plan.tile);
    if (plan.cluster > 1) text += std::string("/") + share_name(plan.share) + std::to_string(plan.cluster);
    return text;
}

inline void print_row(const Row& r) {
    std::printf("%6lld %6d %6lld %3d  %-12s %9.2f %9.2f %9.2f %9.2f %7.2f %7.2f\n", static_cast<long long>(r.extent.m),
                r.extent.k, static_cast<long long>(r.extent.n), r.extent.o, plan_text(r.plan).c_str(), r.ours, r.fp16,
                r.int8, r.floor, r.fp16 / r.ours, r.floor > 0 ? r.ours / r.floor : 0.0);
    std::fflush(stdout);
}

}  // namespace gpu_check
