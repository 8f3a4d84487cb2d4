// A GPU's thread blocks on one CPU thread: every CUDA thread is a fiber, switched when it waits for others.
//
// Asynchronous work (copies, warpgroup products) can be done at once or as late as the program allows. Early copies show
// a buffer that is refilled while somebody still reads it; late ones show a read before a wait; late products show a
// buffer given back too soon. A state in which nothing can go on is reported as a deadlock.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr uint32_t kWindowStart = 0x410;  // where a block's dynamic shared memory begins: 16-byte aligned, no better
constexpr unsigned char kPoison = 0xcd;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kStackBytes = 128 * 1024;

struct Options {
    bool late_copies = false;
    bool late_products = false;
    std::function<void()> previous_grid;  // run when a thread first waits for the previous kernel
};

struct Barrier {
    uint32_t count = 0, pending = 0;
    int64_t bytes = 0;
    uint64_t phase = 0;

    void settle() {
        if (pending != 0 || bytes != 0) return;
        pending = count;
        ++phase;
    }
};

// Threads that act together (warp, warpgroup): the last one to arrive does the work for all.
struct Meeting {
    std::vector<void*> slots;
    const char* operation = nullptr;
    size_t arrived = 0;
    uint64_t generation = 0;
};

struct Gate {
    size_t arrived = 0;
    uint64_t generation = 0;
};

struct Block {
    std::vector<unsigned char> memory;  // [0, kWindowStart) unused, then the block's bytes, then a guard
    size_t bytes = 0;
    std::map<uint32_t, Barrier> barriers;
    std::vector<Meeting> warps, warpgroups;
    std::vector<std::deque<std::vector<std::function<void()>>>> products;  // committed groups, per warpgroup
    std::vector<std::vector<std::function<void()>>> open_products;
    Gate gate;
    size_t alive = 0;
};

struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    int thread = 0;
    int rank = 0;  // of its block in the cluster
    bool done = false;
    std::function<bool()> ready;
    std::deque<std::vector<std::function<void()>>> copies;  // committed groups of this thread
    std::vector<std::function<void()>> open_copies;
};

struct Grid {
    Options options;
    int threads = 0, blocks = 0, cluster = 1, first_block = 0;
    std::vector<Block> cluster_blocks;
    std::vector<Fiber> fibers;
    std::deque<std::function<void()>> bulk_copies;  // late ones, in order of issue
    Gate cluster_gate;
    Fiber* current = nullptr;
    ucontext_t scheduler{};
    std::function<void()> body;
    std::string error;
    bool in_fiber = false;
    uint64_t random = 1;  // for the order of warps
};

inline Grid*& grid() {
    static Grid* current = nullptr;
    return current;
}

inline Fiber& self() { return *grid()->current; }
inline Block& block() { return grid()->cluster_blocks[self().rank]; }

// Stop the whole emulation. No exception can leave a fiber's first frame, so there the scheduler is told instead.
[[noreturn]] inline void stop(const std::string& what) {
    if (!grid()->in_fiber) throw std::runtime_error(what);
    grid()->error = what;
    swapcontext(&self().context, &grid()->scheduler);
    std::abort();
}

inline void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    self().ready = std::move(ready);
    swapcontext(&self().context, &grid()->scheduler);
}

inline void meet(Meeting& at, size_t members, size_t place, const char* operation, void* mine,
                 const std::function<void(const std::vector<void*>&)>& work) {
    if (at.slots.size() != members) at.slots.resize(members);
    if (at.arrived != 0 && std::strcmp(at.operation, operation) != 0) {
        stop(std::string("threads of one warp differ: ") + at.operation + " and " + operation);
    }
    at.operation = operation;
    at.slots[place] = mine;
    const uint64_t generation = at.generation;
    if (++at.arrived == members) {
        work(at.slots);
        at.arrived = 0;
        ++at.generation;
        return;
    }
    Meeting* meeting = &at;
    wait_until([=] { return meeting->generation != generation; });
}

inline void meet_warp(const char* operation, void* mine, const std::function<void(const std::vector<void*>&)>& work) {
    const int thread = self().thread;
    meet(block().warps[thread / 32], 32, thread % 32, operation, mine, work);
}

inline void meet_warpgroup(const char* operation, void* mine,
                           const std::function<void(const std::vector<void*>&)>& work) {
    const int thread = self().thread;
    meet(block().warpgroups[thread / 128], 128, thread % 128, operation, mine, work);
}

inline size_t alive_in_cluster() {
    size_t alive = 0;
    for (const Block& b : grid()->cluster_blocks) alive += b.alive;
    return alive;
}

// A barrier of all threads that have not ended; `alive` is asked again as threads end.
inline void pass(Gate& gate, const std::function<size_t()>& alive) {
    const uint64_t generation = gate.generation;
    ++gate.arrived;
    Gate* g = &gate;
    wait_until([=] {
        if (g->generation == generation && g->arrived == alive()) {
            g->arrived = 0;
            ++g->generation;
        }
        return g->generation != generation;
    });
}

// Bytes at a shared address of block `rank`, checked against what the launch asked for.
inline unsigned char* shared_at(uint32_t address, size_t bytes, int rank) {
    Block& b = grid()->cluster_blocks[rank];
    if (b.alive == 0) stop("the shared memory of a block that has ended is used");
    if (address < kWindowStart || address + bytes > kWindowStart + b.bytes) {
        stop("shared memory address " + std::to_string(address) + " is outside the block's " +
             std::to_string(b.bytes) + " bytes");
    }
    return b.memory.data() + address;
}

inline unsigned char* shared_at(uint32_t address, size_t bytes) { return shared_at(address, bytes, self().rank); }

inline void perform(std::vector<std::function<void()>>& actions) {
    for (auto& action : actions) action();
    actions.clear();
}

inline void fiber_main() {
    grid()->body();
    self().done = true;
    --block().alive;
    swapcontext(&self().context, &grid()->scheduler);
}

inline void start_cluster(Grid& g, size_t shared_bytes) {
    g.cluster_blocks = std::vector<Block>(g.cluster);
    for (Block& b : g.cluster_blocks) {
        b.memory.assign(kWindowStart + shared_bytes + kGuardBytes, kPoison);
        b.bytes = shared_bytes;
        b.warps.resize((g.threads + 31) / 32);
        b.warpgroups.resize((g.threads + 127) / 128);
        b.products.resize(b.warpgroups.size());
        b.open_products.resize(b.warpgroups.size());
        b.alive = g.threads;
    }
    g.fibers = std::vector<Fiber>(static_cast<size_t>(g.cluster) * g.threads);
    g.cluster_gate = {};
    for (size_t i = 0; i < g.fibers.size(); ++i) {
        Fiber& f = g.fibers[i];
        f.thread = static_cast<int>(i) % g.threads;
        f.rank = static_cast<int>(i) / g.threads;
        f.stack.reset(new char[kStackBytes]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStackBytes;
        f.context.uc_link = &g.scheduler;
        makecontext(&f.context, fiber_main, 0);
    }
}

// Run one fiber if it can go on.
inline bool step_fiber(Grid& g, Fiber& f) {
    g.current = &f;
    if (f.done || (f.ready && !f.ready())) return false;
    f.ready = nullptr;
    g.in_fiber = true;
    swapcontext(&g.scheduler, &f.context);
    g.in_fiber = false;
    if (!g.error.empty()) throw std::runtime_error(g.error);
    return true;
}

// Let every warp, in an order drawn anew, run ahead of the others as far as it can; false when none could move. That
// shows what a barrier is missing for sooner than equal turns would.
inline bool step_fibers(Grid& g) {
    const size_t warps = g.fibers.size() / 32;
    std::vector<size_t> order(warps);
    for (size_t i = 0; i < warps; ++i) order[i] = i;
    for (size_t i = warps; i > 1; --i) {
        g.random = g.random * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(order[i - 1], order[(g.random >> 33) % i]);
    }
    bool moved = false;
    for (size_t warp : order) {
        for (bool again = true; again;) {
            again = false;
            for (size_t lane = 0; lane < 32; ++lane) again |= step_fiber(g, g.fibers[warp * 32 + lane]);
            moved |= again;
        }
    }
    return moved;
}

inline void check_guards(const Grid& g) {
    for (const Block& b : g.cluster_blocks) {
        for (size_t i = kWindowStart + b.bytes; i < b.memory.size(); ++i) {
            if (b.memory[i] != kPoison) throw std::runtime_error("a kernel wrote past its shared memory");
        }
    }
}

// Run a kernel: `body` once per thread, cluster by cluster.
inline void launch(int blocks, int threads, int cluster, size_t shared_bytes, const Options& options,
                   std::function<void()> body) {
    Grid g;
    grid() = &g;
    g.options = options;
    g.threads = threads;
    g.blocks = blocks;
    g.cluster = cluster;
    g.body = std::move(body);
    for (g.first_block = 0; g.first_block < blocks; g.first_block += cluster) {
        start_cluster(g, shared_bytes);
        while (alive_in_cluster() > 0) {
            if (step_fibers(g)) continue;
            if (g.bulk_copies.empty()) throw std::runtime_error("deadlock: no thread can go on");
            g.current = &g.fibers[0];
            auto copy = std::move(g.bulk_copies.front());
            g.bulk_copies.pop_front();
            copy();
            if (!g.error.empty()) throw std::runtime_error(g.error);
        }
        if (!g.bulk_copies.empty()) throw std::runtime_error("a block ended before its copies had landed");
        check_guards(g);
    }
    grid() = nullptr;
}

}  // namespace emulator
