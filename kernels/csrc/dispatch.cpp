// The functions that Python calls, for the processor at hand.
#include <stdint.h>

#include "arguments.h"

extern "C" {

int64_t apack_attend_baseline(const void *, const void *);
#if defined(__x86_64__)
int64_t apack_attend_avx2(const void *, const void *);
int64_t apack_attend_avx512(const void *, const void *);
#endif

// 0: any processor, 1: AVX2, 2: AVX-512.
int64_t apack_instruction_set() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
    return 0;
}

// Bytes of the arguments and of the state, so that Python can tell whether it lays them out alike.
int64_t apack_attend_bytes() { return sizeof(Attend); }
int64_t apack_state_bytes() { return sizeof(State); }

// Attention as `set` says; 0, or 1 where memory ran out.
int64_t apack_attend(const void *arguments, const void *state, int64_t set) {
#if defined(__x86_64__)
    if (set == 2) return apack_attend_avx512(arguments, state);
    if (set == 1) return apack_attend_avx2(arguments, state);
#endif
    return apack_attend_baseline(arguments, state);
}
}
