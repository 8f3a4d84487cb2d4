// The CUDA kernels of OutlierMatMul as a library for ctypes, run by the emulator.
#include <algorithm>

#include "quantize.cuh"
#include "range_stats.cuh"
#include "tiles.cuh"

namespace {

using namespace qpipe;

std::string g_error;

template <class F>
int guarded(F work) {
    try {
        work();
        return 0;
    } catch (const std::exception& error) {
        emulator::grid() = nullptr;
        g_error = error.what();
        return 1;
    }
}

// Everything a call needs, mirrored by the test's ctypes structure.
struct Call {
    Operands op;
    int32_t type;  // 0 float32, 1 float16, 2 bfloat16
    Plan plan;
    int32_t int8;  // 0: the widened lane of mma.sync
    int32_t late_copies, late_products;
    unsigned char* scratch;  // scratch_bytes(call); afterwards the quantized rows
};

template <class F>
auto with_type(int type, F work) {
    if (type == 0) return work(float{});
    if (type == 1) return work(Half{});
    return work(BFloat16{});
}

template <class Tile, class Lane, class T>
void run_mma(const Operands& op, const QuantizedRows& rows, const Plan& plan, const emulator::Options& options) {
    emulator::launch(plan.blocks, Tile::kThreads, 1, Tile::kSharedBytes, options,
                     [&] { gemm_mma_kernel<Tile, Lane, T>(op, rows); });
}

template <class Lane, class T>
void run_mma(const Operands& op, const QuantizedRows& rows, const Plan& plan, const emulator::Options& options) {
    if (plan.tile == 0) run_mma<MmaTile0, Lane, T>(op, rows, plan, options);
    if (plan.tile == 1) run_mma<MmaTile1, Lane, T>(op, rows, plan, options);
    if (plan.tile == 2) run_mma<MmaTile2, Lane, T>(op, rows, plan, options);
}

template <class Tile, class T>
void run_wgmma(const Operands& op, const QuantizedRows& rows, const Plan& plan, const emulator::Options& options) {
    const auto map = [](const void* matrix, int64_t height, int row_bytes, int box_rows) {
        return CUtensorMap{static_cast<const unsigned char*>(matrix), height, row_bytes, box_rows};
    };
    const int x_box = Tile::kBm / (plan.share == Share::kX ? plan.cluster : 1);
    const int w_box = Tile::kBn / (plan.share == Share::kW ? plan.cluster : 1);
    const int outlier_bytes = op.o_padded * static_cast<int>(sizeof(T));
    const HopperCall call{op,
                          rows,
                          map(rows.codes, op.m, op.k_padded, x_box),
                          map(op.w_codes, op.n, op.k_padded, w_box),
                          map(rows.outliers, op.m, outlier_bytes, x_box),
                          map(op.w_outlier, op.n, outlier_bytes, w_box),
                          plan.share,
                          plan.cluster};
    emulator::launch(plan.blocks, Tile::kThreads, plan.cluster, Tile::kSharedBytes, options,
                     [&] { gemm_wgmma_kernel<Tile, T>(call); });
}

template <class T>
void run_wgmma(const Operands& op, const QuantizedRows& rows, const Plan& plan, const emulator::Options& options) {
    if (plan.tile == 0) run_wgmma<WgmmaTile0, T>(op, rows, plan, options);
    if (plan.tile == 1) run_wgmma<WgmmaTile1, T>(op, rows, plan, options);
    if constexpr (sizeof(T) == 2) {
        if (plan.tile == 2) run_wgmma<WgmmaTile2, T>(op, rows, plan, options);
    }
}

template <class T>
void run(const Call& call) {
    const Operands& op = call.op;
    emulator::Options options{call.late_copies != 0, call.late_products != 0, {}};
    if (call.plan.path == Path::kNothing) return;
    if (call.plan.path == Path::kSmall) {
        const int shared = small_layout(static_cast<int>(op.m), op.k_padded, op.o_padded, sizeof(T)).bytes;
        return emulator::launch(call.plan.blocks, kSmallThreads, 1, shared, options, [&] { small_m_kernel<T>(op); });
    }
    const ScratchLayout layout = scratch_layout(op, sizeof(T));
    // The second kernel may start before the first has ended: its rows appear when it waits for them.
    std::vector<unsigned char> rows_memory(layout.bytes, emulator::kPoison);
    const QuantizedRows rows = place_rows(op, layout, rows_memory.data());
    emulator::launch(static_cast<int>(op.m), kQuantizeThreads, 1, quantize_shared_bytes<T>(op.k_padded), options,
                     [&] { quantize_rows_kernel<T>(op, rows); });
    options.previous_grid = [&] { std::memcpy(call.scratch, rows_memory.data(), layout.bytes); };
    const QuantizedRows visible = place_rows(op, layout, call.scratch);
    if (call.plan.path == Path::kWgmma) return run_wgmma<T>(op, visible, call.plan, options);
    if (call.int8) return run_mma<Int8Step, T>(op, visible, call.plan, options);
    run_mma<Int8AsHalfStep, T>(op, visible, call.plan, options);
}

}  // namespace

extern "C" {

const char* emulation_error() { return g_error.c_str(); }

int64_t emulation_call_bytes() { return sizeof(Call); }

int emulate(const Call* call) {
    return guarded([&] { with_type(call->type, [&](auto t) { run<decltype(t)>(*call); }); });
}

int count_values(const void* x, int type, int64_t size, float sentinel, int blocks, unsigned long long* state) {
    return guarded([&] {
        with_type(type, [&](auto t) {
            emulator::launch(blocks, kCountThreads, 1, kCountSharedBytes, {}, [&] {
                count_kernel(static_cast<const decltype(t)*>(x), size, sentinel, state);
            });
        });
    });
}

// Offsets of scale, outliers, high_count, high_column, high_digit and the size of the scratch memory.
void scratch_offsets(const Operands* op, int64_t element_bytes, int64_t* offsets) {
    const ScratchLayout at = scratch_layout(*op, static_cast<size_t>(element_bytes));
    const size_t all[] = {at.scale, at.outliers, at.high_count, at.high_column, at.high_digit, at.bytes};
    for (int i = 0; i < 6; ++i) offsets[i] = static_cast<int64_t>(all[i]);
}

void plan(const Shape* shape, const Device* device, Plan* chosen) { *chosen = choose_plan(*shape, *device); }

int plan_candidates(const Shape* shape, const Device* device, Plan* out) {
    const Candidates all = candidates(*shape, *device);
    std::copy(all.plan, all.plan + all.count, out);
    return all.count;
}

void tile_order(int tiles_m, int tiles_n, int32_t* m, int32_t* n) {
    for (int i = 0; i < tiles_m * tiles_n; ++i) {
        const TileSpot spot = tile_spot(i, tiles_m, tiles_n);
        m[i] = spot.m;
        n[i] = spot.n;
    }
}

uint32_t swizzle(uint32_t row, uint32_t chunk) { return swizzled(row, chunk); }

}  // extern "C"
