// The functions that Python calls, for the processor at hand.
#include <stdint.h>

#include "sets.h"
#include "threads.h"

// Instruction sets, in the order of INSTRUCTION_SETS (kernels/native.py); attention alone uses those with integer dot products.
enum Set { BASELINE, AVX2, AVX2_VNNI, AVX512, AVX512_VNNI, AVX512_VNNI_BF16, AVX512_AMX };

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define FOR_SET(operation, set, ...)                                \
    (set >= AVX512 ? operation##_avx512(__VA_ARGS__)                \
     : set >= AVX2 ? operation##_avx2(__VA_ARGS__)                  \
                   : operation##_baseline(__VA_ARGS__))
#else
#define FOR_SET(operation, set, ...) ((void)set, operation##_baseline(__VA_ARGS__))
#endif

extern "C" {

int64_t apack_attend_baseline(const void *, const void *);
int64_t apack_attend_avx2(const void *, const void *);
int64_t apack_attend_avx2_vnni(const void *, const void *);
int64_t apack_attend_avx512(const void *, const void *);
int64_t apack_attend_avx512_vnni(const void *, const void *, bool bfloat16, bool matrices);
int64_t apack_append_baseline(const void *);
int64_t apack_append_avx2(const void *);
int64_t apack_append_avx512(const void *);
int64_t apack_encode_baseline(const void *);
int64_t apack_encode_avx2(const void *);
int64_t apack_encode_avx512(const void *);
int64_t apack_unpack_baseline(const void *, const void *);
int64_t apack_unpack_avx2(const void *, const void *);
int64_t apack_unpack_avx512(const void *, const void *);

OpenMp apack_openmp = {};

// The functions of an OpenMP that all operations use from now on; null ones where there is none.
void apack_use_openmp(decltype(OpenMp::parallel) parallel, decltype(OpenMp::thread_number) thread_number) {
    apack_openmp = parallel && thread_number ? OpenMp{parallel, thread_number} : OpenMp{};
}

// Whether the processor has matrix registers for bytes and bfloat16, and the system lets this process use them.
static bool may_use_matrices() {
#if defined(APACK_BUILDS_VNNI) && defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long ASK = 0x1023, REGISTERS = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned BFLOAT16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25, ALL = BFLOAT16 | AMX_TILE | AMX_INT8;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & ALL) == ALL && syscall(SYS_arch_prctl, ASK, REGISTERS) == 0;
#else
    return false;
#endif
}

// Whether the processor at hand has a set, and this library code for it.
int64_t apack_has_instruction_set(int64_t set) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
    if (set == AVX2) return avx2;
    if (set == AVX512) return avx512;
#if defined(APACK_BUILDS_VNNI)
    // by its bit: not every compiler that writes AVX-VNNI knows the name here
    unsigned a, b, c, d;
    if (set == AVX2_VNNI) return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    const bool vnni = avx512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    if (set == AVX512_VNNI) return vnni;
    const bool bfloat16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (set == AVX512_VNNI_BF16) return bfloat16;
    if (set == AVX512_AMX) return bfloat16 && may_use_matrices();
#endif
#endif
    return set == BASELINE;
}

// 1 on an x86 that Intel did not make, else 0.
int64_t apack_is_other_x86() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return !__builtin_cpu_is("intel");
#else
    return 0;
#endif
}

// 0, or 1 where memory ran out.
int64_t apack_attend(const void *arguments, const void *state, int64_t set) {
#if defined(APACK_BUILDS_VNNI)
    if (set >= AVX512_VNNI) return apack_attend_avx512_vnni(arguments, state, set >= AVX512_VNNI_BF16, set == AVX512_AMX);
    if (set == AVX2_VNNI) return apack_attend_avx2_vnni(arguments, state);
#endif
    return FOR_SET(apack_attend, set, arguments, state);
}

// 0; 1 where memory ran out, 2 where there is no free slot.
int64_t apack_append(const void *arguments, int64_t set) { return FOR_SET(apack_append, set, arguments); }

// 0, or 1 where memory ran out.
int64_t apack_encode(const void *arguments, int64_t set) { return FOR_SET(apack_encode, set, arguments); }

// 0; 1 where memory ran out, 2 where more tokens are held than are wanted.
int64_t apack_unpack(const void *arguments, const void *state, int64_t set) { return FOR_SET(apack_unpack, set, arguments, state); }
}
