// Whether the compiler can write code for AVX-512's integer dot products, and tell whether a processor has them: GCC from 11 on.
#pragma once

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define APACK_BUILDS_VNNI
#endif
