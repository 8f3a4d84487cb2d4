#include "lanes.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qpipe::outlier_matmul {
namespace {

struct Cpu {
    bool avx2 = false, avx_vnni = false, avx512_vnni = false, amx = false;
};

#if defined(__x86_64__)
uint64_t enabled_state() {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives a process the tiles' 8 KiB of state only when it asks.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Cpu detect() {
    Cpu cpu;
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
    const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
    if (!osxsave) return cpu;
    // The operating system must save the wide registers: bits 1-2 for AVX, 5-7 for AVX-512, 17-18 for tiles.
    const uint64_t state = enabled_state();
    const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    const uint32_t subleaves = a;
    cpu.avx2 = ymm && fma && f16c && (b >> 5 & 1);
    cpu.avx512_vnni = cpu.avx2 && zmm && (b >> 16 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (c >> 11 & 1);
    const bool tiles = (state & 0x60000) == 0x60000 && (d >> 24 & 1) && (d >> 25 & 1);
    cpu.amx = cpu.avx512_vnni && tiles && may_use_tiles();
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx_vnni = cpu.avx2 && (a >> 4 & 1);
    return cpu;
}
#else
Cpu detect() { return {}; }
#endif

LaneList make_list() {
    const Cpu cpu = detect();
    LaneList list{};
    const auto add = [&list](const Lane* lane, bool runs) {
        if (lane != nullptr && runs) list.items[list.count++] = lane;
    };
    add(kAmxLane, cpu.amx);
    add(kAvx512VnniLane, cpu.avx512_vnni);
    add(kAvxVnniLane, cpu.avx_vnni);
    add(kAvx2Lane, cpu.avx2);
    add(kEmulatedVnniLane, cpu.avx2);
    add(kScalarLane, true);
    return list;
}

}  // namespace

const LaneList& available_lanes() {
    static const LaneList list = make_list();
    return list;
}

const Lane* choose_lane() {
    const LaneList& lanes = available_lanes();
    const char* wanted = std::getenv("QPIPE_LANE");
    if (wanted == nullptr || *wanted == 0) return lanes.items[0];
    for (const Lane* lane : lanes) {
        if (std::strcmp(lane->name, wanted) == 0) return lane;
    }
    return nullptr;
}

}  // namespace qpipe::outlier_matmul
