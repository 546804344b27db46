// Attention for processors with AVX512's integer dot products, with those of bfloat16 and matrix registers or without; empty elsewhere.
#include "sets.h"

#if defined(APACK_BUILDS_VNNI)
#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define APACK_AVX512
#define APACK_VNNI
#define APACK_BFLOAT16
#define APACK_MATRIX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c")
#endif
#include "attend.h"

extern "C" int64_t apack_attend_avx512_vnni(const void *arguments, const void *state, bool bfloat16, bool matrices) {
    return run_attend(*(const Attend *)arguments, *(const State *)state, {bfloat16, matrices});
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
