// The rivals: cuBLAS FP16 and cuBLASLt int8 -> int32, the latter with the fastest of its proposed algorithms.
// Without their headers (nvcc alone) the columns stay empty.
#pragma once

#include <functional>

#include "gpu_data.cuh"

#if __has_include(<cublasLt.h>) && !defined(QPIPE_NO_CUBLAS)
#define GPU_CHECK_HAS_BLAS 1
#include <cublasLt.h>
#include <cublas_v2.h>
#endif

namespace gpu_check {

using Work = std::function<void(int copy, cudaStream_t stream)>;
using Timer = std::function<double(const Work&)>;  // microseconds of one call

#if defined(GPU_CHECK_HAS_BLAS)

#define BLAS_CHECK(expression)                                                            \
    do {                                                                                  \
        if (cublasStatus_t s_ = (expression); s_ != CUBLAS_STATUS_SUCCESS) {              \
            std::fprintf(stderr, "%s:%d: %s: status %d\n", __FILE__, __LINE__, #expression, s_); \
            std::exit(3);                                                                 \
        }                                                                                 \
    } while (0)

constexpr size_t kWorkspace = size_t{64} << 20;

// y[M, N] = x[M, K] * w[N, K]^T in float16 with float32 accumulation; several copies of w.
class Fp16Rival {
  public:
    Fp16Rival(const Extent& e, int copies) : extent_(e), x_(e.m * e.k * 2), y_(e.m * e.n * 2), workspace_(kWorkspace) {
        BLAS_CHECK(cublasCreate(&handle_));
        BLAS_CHECK(cublasSetWorkspace(handle_, workspace_.as<void>(), kWorkspace));
        fill_normal<<<blocks_for(e.m * e.k), 256>>>(x_.as<Half>(), e.m * e.k, 1.0f, 1);
        for (int copy = 0; copy < copies; ++copy) {
            w_.emplace_back(static_cast<size_t>(e.n) * e.k * 2);
            fill_normal<<<blocks_for(e.n * e.k), 256>>>(w_.back().as<Half>(), e.n * e.k, 0.02f, copy + 2);
        }
    }
    ~Fp16Rival() { cublasDestroy(handle_); }

    double time(const Timer& timer) {
        return timer([this](int copy, cudaStream_t stream) {
            const float one = 1.0f, zero = 0.0f;
            BLAS_CHECK(cublasSetStream(handle_, stream));
            BLAS_CHECK(cublasSetWorkspace(handle_, workspace_.as<void>(), kWorkspace));
            BLAS_CHECK(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, static_cast<int>(extent_.n),
                                    static_cast<int>(extent_.m), extent_.k, &one, w_[copy].as<void>(), CUDA_R_16F,
                                    extent_.k, x_.as<void>(), CUDA_R_16F, extent_.k, &zero, y_.as<void>(), CUDA_R_16F,
                                    static_cast<int>(extent_.n), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        });
    }

  private:
    Extent extent_;
    Buffer x_, y_, workspace_;
    std::vector<Buffer> w_;
    cublasHandle_t handle_ = nullptr;
};

// The bare int8 product: no quantization of x, no scales, 32-bit sums written out.
class Int8Rival {
  public:
    Int8Rival(const Extent& e, int copies)
        : x_(e.m * round_up(e.k, 16)), y_(e.m * e.n * 4), workspace_(kWorkspace) {
        const int k = round_up(e.k, 16);
        BLAS_CHECK(cublasLtCreate(&handle_));
        BLAS_CHECK(cublasLtMatmulDescCreate(&product_, CUBLAS_COMPUTE_32I, CUDA_R_32I));
        const cublasOperation_t transposed = CUBLAS_OP_T;
        BLAS_CHECK(cublasLtMatmulDescSetAttribute(product_, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                                  sizeof transposed));
        BLAS_CHECK(cublasLtMatrixLayoutCreate(&w_layout_, CUDA_R_8I, k, e.n, k));
        BLAS_CHECK(cublasLtMatrixLayoutCreate(&x_layout_, CUDA_R_8I, k, e.m, k));
        BLAS_CHECK(cublasLtMatrixLayoutCreate(&y_layout_, CUDA_R_32I, e.n, e.m, e.n));
        Buffer mask(k);
        mask.fill(0);
        fill_codes<<<blocks_for(e.m * k), 256>>>(x_.as<int8_t>(), e.m, k, k, mask.as<uint8_t>(), 1);
        for (int copy = 0; copy < copies; ++copy) {
            w_.emplace_back(static_cast<size_t>(e.n) * k);
            fill_codes<<<blocks_for(e.n * k), 256>>>(w_.back().as<int8_t>(), e.n, k, k, mask.as<uint8_t>(), copy + 2);
        }
        GPU_CHECK(cudaDeviceSynchronize());
    }
    ~Int8Rival() {
        cublasLtMatrixLayoutDestroy(w_layout_);
        cublasLtMatrixLayoutDestroy(x_layout_);
        cublasLtMatrixLayoutDestroy(y_layout_);
        cublasLtMatmulDescDestroy(product_);
        cublasLtDestroy(handle_);
    }

    // Time of the fastest algorithm; 0 when cuBLASLt has none for the shape.
    double time(const Timer& timer) {
        constexpr int kAsked = 8;
        cublasLtMatmulPreference_t preference = nullptr;
        const size_t limit = kWorkspace;
        BLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
        BLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &limit,
                                                        sizeof limit));
        cublasLtMatmulHeuristicResult_t found[kAsked];
        int count = 0;
        const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
            handle_, product_, w_layout_, x_layout_, y_layout_, y_layout_, preference, kAsked, found, &count);
        cublasLtMatmulPreferenceDestroy(preference);
        double best = 0;
        for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; ++i) {
            const double took = timer([&](int copy, cudaStream_t stream) {
                const int32_t one = 1, zero = 0;
                BLAS_CHECK(cublasLtMatmul(handle_, product_, &one, w_[copy].as<void>(), w_layout_, x_.as<void>(),
                                          x_layout_, &zero, y_.as<void>(), y_layout_, y_.as<void>(), y_layout_,
                                          &found[i].algo, workspace_.as<void>(), kWorkspace, stream));
            });
            best = best == 0 || took < best ? took : best;
        }
        return best;
    }

  private:
    Buffer x_, y_, workspace_;
    std::vector<Buffer> w_;
    cublasLtHandle_t handle_ = nullptr;
    cublasLtMatmulDesc_t product_ = nullptr;
    cublasLtMatrixLayout_t w_layout_ = nullptr, x_layout_ = nullptr, y_layout_ = nullptr;
};

#else

struct Fp16Rival {
    Fp16Rival(const Extent&, int) {}
    double time(const Timer&) { return 0; }
};
using Int8Rival = Fp16Rival;

#endif

}  // namespace gpu_check
