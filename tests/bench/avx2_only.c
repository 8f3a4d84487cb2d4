// Preloaded into a process, makes its processor look like one with AVX2 and nothing newer: CPUID traps into the handler
// below, which executes it and clears the bits of AVX-512, AVX-VNNI, AVX10 and AMX; /proc/cpuinfo is read from the file
// that AVX2_ONLY_CPUINFO names. Needs Linux on x86-64 and a processor that lets CPUID trap (`cpuid_fault` in
// /proc/cpuinfo); see arch_prctl(2).
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

static const uint8_t kCpuid[2] = {0x0f, 0xa2};

static long let_cpuid_run(int enabled) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, enabled); }

static uint32_t bits(const int* numbers, int count) {
    uint32_t mask = 0;
    for (int i = 0; i < count; ++i) mask |= UINT32_C(1) << numbers[i];
    return mask;
}
#define BITS(...) bits((const int[]){__VA_ARGS__}, sizeof((int[]){__VA_ARGS__}) / sizeof(int))

// Bit numbers: Intel's manual, volume 2, CPUID, leaf 7.
static void hide(uint32_t leaf, uint32_t subleaf, uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d) {
    if (leaf == 7 && subleaf == 0) {
        *b &= ~BITS(16, 17, 21, 26, 27, 28, 30, 31);  // AVX-512 F, DQ, IFMA, PF, ER, CD, BW, VL
        *c &= ~BITS(1, 6, 11, 12, 14);                // AVX-512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
        *d &= ~BITS(2, 3, 8, 22, 23, 24, 25);         // 4VNNIW, 4FMAPS, VP2INTERSECT, AMX, AVX-512 FP16
    } else if (leaf == 7 && subleaf == 1) {
        *a &= ~BITS(4, 5, 21, 23);      // AVX-VNNI, AVX-512 BF16, AMX-FP16, AVX-IFMA
        *d &= ~BITS(4, 5, 8, 10, 19);   // AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10
    } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) {
        *a = *b = *c = *d = 0;  // tiles, and AVX10
    }
}

// What the program itself wants to happen at SIGSEGV.
static struct sigaction theirs;
typedef int (*SetAction)(int, const struct sigaction*, struct sigaction*);

static SetAction set_action(void) { return (SetAction)dlsym(RTLD_NEXT, "sigaction"); }

static void on_fault(int signal_number, siginfo_t* info, void* context) {
    greg_t* regs = ((ucontext_t*)context)->uc_mcontext.gregs;
    if (memcmp((const void*)regs[REG_RIP], kCpuid, sizeof kCpuid) != 0) {
        if (theirs.sa_flags & SA_SIGINFO) {
            theirs.sa_sigaction(signal_number, info, context);
        } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
            theirs.sa_handler(signal_number);
        } else {
            set_action()(signal_number, &theirs, NULL);  // the fault happens again, and ends the program
        }
        return;
    }
    const uint32_t leaf = (uint32_t)regs[REG_RAX], subleaf = (uint32_t)regs[REG_RCX];
    uint32_t a, b, c, d;
    let_cpuid_run(1);
    __cpuid_count(leaf, subleaf, a, b, c, d);
    let_cpuid_run(0);
    hide(leaf, subleaf, &a, &b, &c, &d);
    regs[REG_RAX] = a, regs[REG_RBX] = b, regs[REG_RCX] = c, regs[REG_RDX] = d;
    regs[REG_RIP] += sizeof kCpuid;
}

// Python's faulthandler, compilers and others handle SIGSEGV too: theirs comes after ours.
int sigaction(int number, const struct sigaction* wanted, struct sigaction* before) {
    if (number != SIGSEGV) return set_action()(number, wanted, before);
    if (before != NULL) *before = theirs;
    if (wanted != NULL) theirs = *wanted;
    return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
    struct sigaction wanted = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
    return sigaction(number, &wanted, &before) == 0 ? before.sa_handler : SIG_ERR;
}

static int open_by(const char* function, const char* path, int flags, mode_t mode) {
    const char* cpuinfo = getenv("AVX2_ONLY_CPUINFO");
    if (cpuinfo != NULL && strcmp(path, "/proc/cpuinfo") == 0) path = cpuinfo;
    return ((int (*)(const char*, int, ...))dlsym(RTLD_NEXT, function))(path, flags, mode);
}

#define OPEN(function)                                            \
    int function(const char* path, int flags, ...) {              \
        va_list rest;                                             \
        va_start(rest, flags);                                    \
        const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                             \
        return open_by(#function, path, flags, mode);             \
    }
OPEN(open)
OPEN(open64)

// Threads and children inherit the trap; a program that is executed anew starts with it off, and comes here again.
__attribute__((constructor)) static void trap_cpuid(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    set_action()(SIGSEGV, &action, &theirs);
    if (let_cpuid_run(0) != 0) {
        static const char problem[] = "avx2_only: this processor or kernel does not let CPUID trap\n";
        if (write(2, problem, sizeof problem - 1) < 0) _exit(6);
        _exit(5);
    }
}
