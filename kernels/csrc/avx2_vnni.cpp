// Attention for processors with AVX2 and AVX-VNNI's integer dot products, without AVX-512; empty elsewhere.
#include "sets.h"

#if defined(APACK_BUILDS_VNNI)
#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define APACK_AVX2
#define APACK_VNNI
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#include "attend.h"

extern "C" int64_t apack_attend_avx2_vnni(const void *arguments, const void *state) {
    return run_attend(*(const Attend *)arguments, *(const State *)state);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
