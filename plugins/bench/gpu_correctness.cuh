// gpu_check, first half: every plan of every shape class against a float64 reference on the device, fresh random inputs.
#pragma once

#include "gpu_data.cuh"

namespace gpu_check {

// What the reference knows of a row; written from the contract, not from the kernels.
struct ReferenceRow {
    double inverse;  // 1 / scale as float32 gives it
    double scale;
    int wide;  // 1: elements beyond the limit have two digits
    int poisoned;
};

template <class T>
__global__ void reference_rows(const T* x, int64_t rows, int k, const uint8_t* outlier, float limit, ReferenceRow* out,
                               unsigned long long* new_outliers) {
    const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
    if (row >= rows) return;
    float regular = 0, beyond = 0;
    int met = 0, poisoned = 0;
    for (int c = 0; c < k; ++c) {
        const float v = outlier[c] ? 0.0f : fabsf(to_float(x[row * k + c]));
        if (!isfinite(v)) poisoned = 1;
        if (limit > 0 && v > limit) {
            ++met;
            beyond = fmaxf(beyond, v);
        } else {
            regular = fmaxf(regular, v);
        }
    }
    const int wide = met > 0 && met <= 64;
    const float high = wide ? __fdiv_rn(beyond, 16319.0f) : __fdiv_rn(beyond, 127.0f);
    const float scale = fmaxf(fmaxf(__fdiv_rn(regular, 127.0f), high), 1.17549435e-38f);
    out[row] = {__fdiv_rn(1.0f, scale), scale, wide, poisoned};
    if (met) atomicAdd(new_outliers, static_cast<unsigned long long>(met));
}

struct Verdict {
    unsigned long long wrong;
    unsigned int worst;  // largest error / allowed error, as float bits
};

// Compare y [m, n] with the exact value; one thread per element.
template <class T>
__global__ void compare(Operands op, const ReferenceRow* rows, const uint8_t* outlier, Verdict* verdict) {
    const int64_t column = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, row = blockIdx.y;
    if (column >= op.n) return;
    const T* x = static_cast<const T*>(op.x) + row * op.k;
    const ReferenceRow r = rows[row];
    long long sum = 0;
    for (int k = 0; k < op.k && !r.poisoned; ++k) {
        if (outlier[k]) continue;
        const float v = to_float(x[k]);
        const float bound = r.wide && fabsf(v) > op.limit ? 16319.0f : 127.0f;
        const float code = fminf(fmaxf(rintf(v * static_cast<float>(r.inverse)), -bound), bound);
        sum += static_cast<long long>(code) * op.w_codes[column * op.k_padded + k];
    }
    const double main = static_cast<double>(sum) * r.scale * op.w_scale[column];
    double tail = 0, magnitude = 0;
    for (int o = 0; o < op.o; ++o) {
        const double term = static_cast<double>(to_float(x[op.outlier_index[o]])) *
                            to_float(static_cast<const T*>(op.w_outlier)[column * op.o_padded + o]);
        tail += term;
        magnitude += fabs(term);
    }
    const double bias = op.bias == nullptr ? 0 : op.bias[column];
    const double expected = r.poisoned ? nan("") : main + tail + bias;
    const float got = to_float(static_cast<const T*>(op.y)[row * op.n + column]);
    const float rounded = to_float(from_float<T>(static_cast<float>(expected)));
    bool right;
    float ratio = 0;
    if (!isfinite(rounded)) {
        right = isnan(rounded) ? isnan(got) : got == rounded;
    } else {
        const double unit = sizeof(T) == 4 ? 0x1p-23 : (std::is_same_v<T, Half> ? 0x1p-10 : 0x1p-7);
        const double allowed = fabs(main) * 0x1p-21 + magnitude * 0x1p-19 + fabs(bias) * 0x1p-22 +
                               unit * fabs(expected) + (std::is_same_v<T, Half> ? 0x1p-24 : 1e-37);
        ratio = static_cast<float>(fabs(got - expected) / allowed);
        right = ratio <= 1;  // false for a NaN
    }
    if (!right) atomicAdd(&verdict->wrong, 1ull);
    if (ratio > 0) atomicMax(&verdict->worst, __float_as_uint(ratio));
}

// Put a zero row, infinities and a NaN into rows 1 to 4.
template <class T>
__global__ void plant_special_rows(T* x, int k, const uint8_t* outlier, const int32_t* index, int o) {
    int regular = 0;
    while (regular < k && outlier[regular]) ++regular;
    for (int c = 0; c < k; ++c) x[k + c] = from_float<T>(0.0f);
    if (regular == k) return;
    x[2 * k + regular] = from_float<T>(INFINITY);
    x[3 * k + regular] = from_float<T>(NAN);
    if (o > 0) x[4 * k + index[0]] = from_float<T>(INFINITY);
}

struct Tally {
    int calls = 0, failed = 0;
    float worst = 0;
};

inline const char* path_name(Path path) {
    const char* names[] = {"nothing", "small", "mma", "wgmma"};
    return names[static_cast<int>(path)];
}

inline const char* share_name(Share share) {
    const char* names[] = {"-", "w", "x", "k"};
    return names[static_cast<int>(share)];
}

// The chosen plan, every candidate, and on sm_90 the mma.sync tiles too.
inline std::vector<Plan> plans_for(const Shape& shape, const Device& device) {
    std::vector<Plan> plans{choose_plan(shape, device)};
    if (shape.m == 0 || shape.n == 0) return plans;
    Device older = device;
    older.wgmma = 0;
    for (const Device& d : {device, older}) {
        const Candidates all = candidates(shape, d);
        plans.insert(plans.end(), all.plan, all.plan + all.count);
        if (device.wgmma == 0) break;
    }
    return plans;
}

template <class T>
void check_plan(Problem<T>& p, const Operands& op, const Plan& plan, const Device& device, const ReferenceRow* rows,
                unsigned long long expected_new, Tally& tally) {
    p.need_scratch(scratch_bytes(op, plan, sizeof(T)));
    p.y.fill(0xff);        // NaN: an element that is not written is wrong
    if (p.scratch.bytes()) p.scratch.fill(0x7f);
    GPU_CHECK(launch<T>(op, plan, device, p.scratch.template as<void>(), nullptr));
    GPU_CHECK(cudaDeviceSynchronize());
    Buffer verdict(sizeof(Verdict));
    verdict.fill(0);
    if (op.m > 0) {
        compare<T><<<dim3(static_cast<unsigned>(ceil_div<int64_t>(op.n, 128)), static_cast<unsigned>(op.m)), 128>>>(
            op, rows, p.mask.template as<uint8_t>(), verdict.as<Verdict>());
    }
    Verdict result{};
    unsigned long long met = 0;
    std::vector<unsigned char> guard(Problem<T>::kGuard * sizeof(T));
    GPU_CHECK(cudaMemcpy(&result, verdict.as<void>(), sizeof result, cudaMemcpyDeviceToHost));
    GPU_CHECK(cudaMemcpy(&met, op.new_outliers, sizeof met, cudaMemcpyDeviceToHost));
    GPU_CHECK(cudaMemcpy(guard.data(), static_cast<T*>(op.y) + op.m * op.n, guard.size(), cudaMemcpyDeviceToHost));
    bool past_the_end = false;
    for (unsigned char byte : guard) past_the_end |= byte != 0xff;
    float worst;
    std::memcpy(&worst, &result.worst, sizeof worst);
    ++tally.calls;
    tally.worst = worst > tally.worst ? worst : tally.worst;
    if (result.wrong == 0 && !past_the_end && met == expected_new) return;
    ++tally.failed;
    std::printf("WRONG M=%lld N=%lld K=%d O=%d bytes=%d limit=%g %s tile=%d share=%s/%d: %llu elements, worst %.2f, "
                "new outliers %llu (expected %llu)%s\n",
                static_cast<long long>(op.m), static_cast<long long>(op.n), op.k, op.o, static_cast<int>(sizeof(T)),
                op.limit, path_name(plan.path), plan.tile, share_name(plan.share), plan.cluster, result.wrong, worst,
                met, expected_new, past_the_end ? ", wrote past the end" : "");
}

template <class T>
void check_extent(const Extent& e, const Device& device, uint32_t seed, Tally& tally) {
    Problem<T> p(e, 1, seed);
    if (e.m >= 8) {
        plant_special_rows<<<1, 1>>>(p.x.template as<T>(), e.k, p.mask.template as<uint8_t>(),
                                     p.index.template as<int32_t>(), e.o);
    }
    for (const float limit : {0.0f, 3.0f}) {
        const Operands op = p.operands(0, limit);
        Buffer rows(e.m * sizeof(ReferenceRow)), counter(sizeof(unsigned long long));
        counter.fill(0);
        if (e.m > 0) {
            reference_rows<<<static_cast<unsigned>(ceil_div<int64_t>(e.m, 64)), 64>>>(
                p.x.template as<T>(), e.m, e.k, p.mask.template as<uint8_t>(), limit, rows.as<ReferenceRow>(),
                counter.as<unsigned long long>());
        }
        unsigned long long met = 0;
        GPU_CHECK(cudaMemcpy(&met, counter.as<void>(), sizeof met, cudaMemcpyDeviceToHost));
        for (const Plan& plan : plans_for(shape_of(op, sizeof(T)), device)) {
            check_plan(p, op, plan, device, rows.as<ReferenceRow>(), met, tally);
        }
    }
}

inline Tally check_everything(const Device& device, uint32_t seed) {
    const Extent extents[] = {{0, 64, 64, 0},       {1, 64, 64, 0},       {2, 37, 100, 0},      {3, 1001, 1000, 0},
                              {7, 4096, 4096, 0},   {8, 4096, 11008, 0},  {8, 520, 28672, 0},   {9, 64, 64, 0},
                              {16, 37, 100, 0},     {17, 1001, 1000, 0},  {31, 4096, 4096, 0},  {64, 4096, 4096, 0},
                              {65, 520, 1000, 0},   {100, 4096, 11008, 0}, {128, 1536, 384, 0}, {129, 1001, 1000, 0},
                              {200, 11008, 4096, 0}, {257, 37, 100, 0},   {512, 4096, 4096, 0}, {1025, 2000, 1040, 0}};
    Tally tally;
    for (Extent e : extents) {
        for (const int o : {0, 8, 64}) {
            e.o = smaller(o, e.k / 2);
            check_extent<Half>(e, device, ++seed, tally);
            check_extent<BFloat16>(e, device, ++seed, tally);
            check_extent<float>(e, device, ++seed, tally);
        }
    }
    std::printf("correctness: %d calls, %d wrong, worst error %.3f of what is allowed\n", tally.calls, tally.failed,
                tally.worst);
    return tally;
}

}  // namespace gpu_check
