// The operations for processors with AVX2; empty elsewhere.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define APACK_AVX2
#define APACK_NAME(operation) operation##_avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "entry.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
