// Device memory and random problems for gpu_check.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../outlier_matmul/cuda/launch.cuh"

#define GPU_CHECK(expression)                                                                        \
    do {                                                                                             \
        if (cudaError_t e_ = (expression); e_ != cudaSuccess) {                                      \
            std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #expression, cudaGetErrorString(e_)); \
            std::exit(3);                                                                            \
        }                                                                                            \
    } while (0)

namespace gpu_check {

using namespace qpipe;

class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t bytes) : bytes_(bytes) { GPU_CHECK(cudaMalloc(&data_, bytes == 0 ? 256 : bytes)); }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer() { cudaFree(data_); }

    void swap(Buffer& other) {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
    }

    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    size_t bytes() const { return bytes_; }
    void fill(int byte) const { GPU_CHECK(cudaMemset(data_, byte, bytes_)); }

    template <class T>
    void upload(const std::vector<T>& host) const {
        GPU_CHECK(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    }

  private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

__device__ inline uint32_t hashed(uint64_t i, uint32_t seed) {
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(z >> 32);
}

__device__ inline float normal(uint64_t i, uint32_t seed) {
    const float u = (hashed(2 * i, seed) + 1.0f) * 2.3283064e-10f, v = hashed(2 * i + 1, seed) * 2.3283064e-10f;
    return sqrtf(-2.0f * logf(fminf(u, 1.0f))) * cospif(2.0f * v);
}

template <class T>
__global__ void fill_normal(T* out, int64_t size, float scale, uint32_t seed) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
        out[i] = from_float<T>(normal(i, seed) * scale);
    }
}

// Codes in -127 .. 127, zero in padding columns and where `outlier` says so.
__global__ void fill_codes(int8_t* out, int64_t rows, int k, int k_padded, const uint8_t* outlier, uint32_t seed) {
    const int64_t size = rows * k_padded;
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
        const int column = static_cast<int>(i % k_padded);
        const bool regular = column < k && outlier[column] == 0;
        out[i] = regular ? static_cast<int8_t>(static_cast<int>(hashed(i, seed) % 255) - 127) : 0;
    }
}

__global__ void fill_scales(float* out, int64_t size, uint32_t seed) {
    const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    if (i < size) out[i] = 0.002f + 0.001f * (hashed(i, seed) >> 8) * 5.9604645e-8f;
}

template <class T>
__global__ void enlarge_columns(T* x, int64_t rows, int k, const int32_t* index, int count, float factor) {
    const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    if (i >= rows * count) return;
    T& value = x[i / count * k + index[i % count]];
    value = from_float<T>(to_float(value) * factor);
}

template <class T>
__global__ void clear_padding(T* w_outlier, int64_t rows, int o, int o_padded) {
    const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    if (i < rows * o_padded && i % o_padded >= o) w_outlier[i] = from_float<T>(0.0f);
}

inline unsigned blocks_for(int64_t size) { return static_cast<unsigned>(smaller<int64_t>(ceil_div<int64_t>(size, 256), 65536)); }

struct Extent {
    int64_t m, n;
    int k, o;
};

// One weight in device memory.
template <class T>
struct Weight {
    Buffer codes, scale, outliers;
};

// A random call. Rows past the end of y are a guard.
template <class T>
struct Problem {
    static constexpr int64_t kGuard = 1024;

    Extent extent;
    int k_padded, o_padded;
    Buffer x, index, mask, bias, y, counter, scratch;
    std::vector<Weight<T>> weights;
    std::vector<int32_t> outlier_columns;

    Problem(const Extent& e, int copies, uint32_t seed)
        : extent(e), k_padded(round_up(e.k, 16)), o_padded(round_up(e.o, 16)) {
        make_index(seed);
        x = Buffer(e.m * e.k * sizeof(T));
        bias = Buffer(e.n * sizeof(float));
        y = Buffer((e.m * e.n + kGuard) * sizeof(T));
        counter = Buffer(sizeof(unsigned long long));
        if (e.m > 0) fill_normal<<<blocks_for(e.m * e.k), 256>>>(x.as<T>(), e.m * e.k, 1.0f, seed);
        if (e.m * e.o > 0) {
            enlarge_columns<<<static_cast<unsigned>(ceil_div<int64_t>(e.m * e.o, 256)), 256>>>(
                x.as<T>(), e.m, e.k, index.as<int32_t>(), e.o, 40.0f);
        }
        fill_normal<<<blocks_for(e.n), 256>>>(bias.as<float>(), e.n, 1.0f, seed + 1);
        for (int copy = 0; copy < copies; ++copy) weights.push_back(make_weight(seed + 10 * (copy + 1)));
        GPU_CHECK(cudaDeviceSynchronize());
    }

    Operands operands(int copy, float limit) const {
        const Weight<T>& w = weights[copy];
        return {x.as<void>(), w.codes.template as<int8_t>(), w.scale.template as<float>(), index.as<int32_t>(),
                w.outliers.template as<void>(), bias.as<float>(), y.as<void>(),
                counter.as<unsigned long long>(), extent.m, extent.n, extent.k, k_padded, extent.o, o_padded, limit};
    }

    void need_scratch(size_t bytes) {
        if (scratch.bytes() < bytes) scratch = Buffer(bytes);
    }

  private:
    void make_index(uint32_t seed) {
        std::vector<uint8_t> chosen(extent.k, 0);
        srand(seed);
        for (int found = 0; found < extent.o;) {
            const int column = rand() % extent.k;
            if (chosen[column]) continue;
            chosen[column] = 1;
            ++found;
        }
        for (int k = 0; k < extent.k; ++k) {
            if (chosen[k]) outlier_columns.push_back(k);
        }
        index = Buffer(extent.o * sizeof(int32_t));
        mask = Buffer(extent.k);
        index.upload(outlier_columns);
        mask.upload(chosen);
    }

    Weight<T> make_weight(uint32_t seed) const {
        Weight<T> w{Buffer(extent.n * k_padded), Buffer(extent.n * sizeof(float)),
                    Buffer(extent.n * o_padded * sizeof(T))};
        fill_codes<<<blocks_for(extent.n * k_padded), 256>>>(w.codes.template as<int8_t>(), extent.n, extent.k, k_padded,
                                                            mask.as<uint8_t>(), seed);
        fill_scales<<<static_cast<unsigned>(ceil_div<int64_t>(extent.n, 256)), 256>>>(w.scale.template as<float>(),
                                                                                    extent.n, seed + 1);
        const int64_t size = extent.n * o_padded;
        if (size > 0) {
            fill_normal<<<blocks_for(size), 256>>>(w.outliers.template as<T>(), size, 0.2f, seed + 2);
            clear_padding<<<static_cast<unsigned>(ceil_div<int64_t>(size, 256)), 256>>>(w.outliers.template as<T>(),
                                                                                      extent.n, extent.o, o_padded);
        }
        return w;
    }
};

}  // namespace gpu_check
