// The functions that Python calls, for the processor at hand.
#include <stdint.h>

#include "sets.h"
#include "threads.h"

#if defined(__x86_64__)
#define FOR_SET(operation, set, ...)                                \
    (set >= 2   ? operation##_avx512(__VA_ARGS__)                   \
     : set == 1 ? operation##_avx2(__VA_ARGS__)                     \
                : operation##_baseline(__VA_ARGS__))
#else
#define FOR_SET(operation, set, ...) ((void)set, operation##_baseline(__VA_ARGS__))
#endif

extern "C" {

int64_t apack_attend_baseline(const void *, const void *);
int64_t apack_attend_avx2(const void *, const void *);
int64_t apack_attend_avx512(const void *, const void *);
int64_t apack_attend_avx512_vnni(const void *, const void *, bool bfloat16);
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

// 0: any processor, 1: AVX2, 2: AVX-512, 3: with integer dot products, 4: and those of bfloat16; attention alone uses 3 and 4.
int64_t apack_instruction_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!avx2 || !__builtin_cpu_supports("avx512f")) return avx2;
#if defined(APACK_BUILDS_VNNI)
    bool vnni = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    if (vnni) return __builtin_cpu_supports("avx512bf16") ? 4 : 3;
#endif
    return 2;
#endif
    return 0;
}

// 0, or 1 where memory ran out.
int64_t apack_attend(const void *arguments, const void *state, int64_t set) {
#if defined(APACK_BUILDS_VNNI)
    if (set >= 3) return apack_attend_avx512_vnni(arguments, state, set >= 4);
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
