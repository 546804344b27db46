// Whether the compiler can write code for integer dot products, of AVX-512 and of AVX-VNNI: GCC from 11 on, clang from 12 on.
#pragma once

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define APACK_BUILDS_VNNI
#endif
