// gpu_check: are the CUDA kernels of OutlierMatMul right, and how fast are they? Needs nvcc and a GPU, nothing else.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a plugins/bench/gpu_check.cu -o gpu_check
//
// cuBLAS is compared with where its headers are found (then add -lcublas -lcublasLt). What it prints:
//
//   gpu_check                 correctness, then the table: four shapes, M = 1 16 64 512 4096, O = 0 8 64
//   gpu_check --check         correctness only; exit code 1 when anything is wrong
//   gpu_check --sweep         M from 1 to 4096 on the smallest and the largest shape
//   gpu_check --plans K N M   every candidate plan of one shape, by force
//   ... --json FILE           the same as one JSON object
#include <string>

#include "gpu_timing.cuh"

namespace {

using namespace gpu_check;

struct Options {
    bool check = true, table = true, sweep = false;
    std::vector<long> plans;  // K, N, M
    std::string json;
};

Options parse(int count, char** words) {
    Options options;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word == "--check") {
            options.table = false;
        } else if (word == "--sweep") {
            options.check = options.table = false;
            options.sweep = true;
        } else if (word == "--plans" && i + 3 < count) {
            options.check = options.table = false;
            for (int j = 0; j < 3; ++j) options.plans.push_back(std::strtol(words[++i], nullptr, 10));
        } else if (word == "--json" && i + 1 < count) {
            options.json = words[++i];
        } else {
            std::fprintf(stderr, "unknown argument %s; see the head of gpu_check.cu\n", words[i]);
            std::exit(2);
        }
    }
    return options;
}

// Kernels first, floors last: what a reader compares is side by side.
void table(Bench& bench, std::vector<Row>& rows) {
    const int shapes[4][2] = {{4096, 4096}, {4096, 11008}, {11008, 4096}, {8192, 28672}};
    print_head();
    for (const auto& [k, n] : shapes) {
        for (const int m : {1, 16, 64, 512, 4096}) {
            for (const int o : {0, 8, 64}) {
                rows.push_back(bench.measure({m, n, k, o}));
                print_row(rows.back());
            }
        }
    }
}

// Every M up to 32, then in steps: edges between plans show as jumps.
void sweep(Bench& bench, std::vector<Row>& rows) {
    const int shapes[2][2] = {{4096, 4096}, {8192, 28672}};
    print_head();
    for (const auto& [k, n] : shapes) {
        double previous = 0;
        int previous_m = 1;
        for (int m = 1; m <= 4096; m += m < 32 ? 1 : m < 256 ? 16 : m < 1024 ? 64 : 256) {
            rows.push_back(bench.measure({m, n, k, 8}));
            print_row(rows.back());
            const Row& row = rows.back();
            if (row.fp16 > 0 && row.ours > row.fp16) std::printf("       slower than fp16\n");
            const double grown = previous * m / previous_m;  // what the added rows alone may cost
            if (previous > 0 && row.ours > 1.15 * grown) std::printf("       more than 15 %% above its neighbour\n");
            previous = row.ours;
            previous_m = m;
        }
    }
}

void all_plans(Bench& bench, const Device& device, const std::vector<long>& shape, std::vector<Row>& rows) {
    const Extent e{shape[2], shape[1], static_cast<int>(shape[0]), 8};
    print_head();
    rows.push_back(bench.measure(e));
    print_row(rows.back());
    const Shape s{e.m, e.n, round_up(e.k, 16), round_up(e.o, 16), sizeof(Half)};
    for (const Plan& plan : plans_for(s, device)) {
        rows.push_back(bench.measure(e, &plan, false));
        print_row(rows.back());
    }
}

void write_json(const std::string& path, const char* device, const Tally& tally, const std::vector<Row>& rows) {
    std::FILE* out = path == "-" ? stdout : std::fopen(path.c_str(), "w");
    if (out == nullptr) {
        std::fprintf(stderr, "cannot write %s\n", path.c_str());
        std::exit(6);
    }
    std::fprintf(out, "{\"device\": \"%s\", \"calls\": %d, \"wrong\": %d, \"worst\": %.4f, \"rows\": [", device,
                 tally.calls, tally.failed, tally.worst);
    for (size_t i = 0; i < rows.size(); ++i) {
        const Row& r = rows[i];
        std::fprintf(out,
                     "%s\n  {\"m\": %lld, \"k\": %d, \"n\": %lld, \"o\": %d, \"plan\": \"%s\", \"ours_us\": %.3f, "
                     "\"fp16_us\": %.3f, \"int8_us\": %.3f, \"floor_us\": %.3f, \"fp16_floor_us\": %.3f}",
                     i ? "," : "", static_cast<long long>(r.extent.m), r.extent.k, static_cast<long long>(r.extent.n),
                     r.extent.o, plan_text(r.plan).c_str(), r.ours, r.fp16, r.int8, r.floor, r.fp16_floor);
    }
    std::fprintf(out, "\n]}\n");
    if (out != stdout) std::fclose(out);
}

}  // namespace

int main(int count, char** words) {
    const Options options = parse(count, words);
    cudaDeviceProp facts{};
    GPU_CHECK(cudaGetDeviceProperties(&facts, 0));
    const Device* device = nullptr;
    GPU_CHECK(current_device<prepare_kernels>(device));
    std::printf("%s, compute capability %d.%d, %d multiprocessors, %d MB of L2, runtime %d\n", facts.name, facts.major,
                facts.minor, facts.multiProcessorCount, facts.l2CacheSize >> 20, CUDART_VERSION);
    Tally tally;
    if (options.check) tally = check_everything(*device, 1000);
    Bench bench(*device, facts);
    std::vector<Row> rows;
    if (options.table) table(bench, rows);
    if (options.sweep) sweep(bench, rows);
    if (!options.plans.empty()) all_plans(bench, *device, options.plans, rows);
    if (!options.json.empty()) write_json(options.json, facts.name, tally, rows);
    return tally.failed == 0 ? 0 : 1;
}
