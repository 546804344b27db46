// Vectors of integers, as wide as those of floats: of AVX-512, and of AVX2 where it has integer dot products.
#pragma once

#include "vector.h"

namespace {

#if defined(APACK_AVX512)
typedef __m512i Ints;
#define APACK_MM(intrinsic) _mm512_##intrinsic
inline Ints load_ints(const void *p) { return _mm512_loadu_si512(p); }
inline void store_ints(void *p, Ints x) { _mm512_storeu_si512(p, x); }
#elif defined(APACK_AVX2)
typedef __m256i Ints;
#define APACK_MM(intrinsic) _mm256_##intrinsic
inline Ints load_ints(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline void store_ints(void *p, Ints x) { _mm256_storeu_si256((__m256i *)p, x); }
#endif

#if defined(APACK_VNNI)
#if defined(APACK_AVX512)
#define APACK_REGISTER "v"
#define APACK_DOT_BYTES "vpdpbusd"
inline Ints load_some_ints(const void *p, int n) { return _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p); }
inline void store_bytes(void *p, Ints x, int n) { _mm512_mask_storeu_epi8(p, ~0ull >> (64 - n), x); }
inline Ints add_pairs(Ints sums, Ints x) { return _mm512_dpwssd_epi32(sums, x, _mm512_set1_epi16(1)); }
// Low and high bytes of the 16-bit numbers of two vectors, by the places of the low ones.
inline Ints low_bytes(Ints a, Ints b, Ints places) { return _mm512_permutex2var_epi8(a, places, b); }
inline Ints high_bytes(Ints a, Ints b, Ints places) { return low_bytes(a, b, _mm512_add_epi8(places, _mm512_set1_epi8(1))); }
#else
// One of the sixteen that AVX2 has, where the compiler is told of a processor that has more.
#define APACK_REGISTER "x"
#define APACK_DOT_BYTES "%{vex%} vpdpbusd"
inline Ints load_some_ints(const void *p, int n) { return _mm256_maskload_epi32((const int *)p, leading(n)); }
// n: 16 or 32.
inline void store_bytes(void *p, Ints x, int n) {
    if (n > 16) store_ints(p, x);
    else _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(x));
}
inline Ints add_pairs(Ints sums, Ints x) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, _mm256_set1_epi16(1))); }
// The same, in the order in which the numbers were before packing; places are those in 16 bytes.
inline Ints low_bytes(Ints a, Ints b, Ints places) {
    const Ints low = _mm256_set1_epi16(255), bytes = _mm256_packus_epi16(a & low, b & low);
    return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)), places);
}
inline Ints high_bytes(Ints a, Ints b, Ints places) { return low_bytes(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8), places); }
#endif

// Sums plus bytes from 0 to 255 times bytes from -128 to 127; GCC 12 copies the sums around the intrinsic.
inline Ints dot_bytes(Ints unsigned_bytes, Ints bytes, Ints sums) {
    __asm__(APACK_DOT_BYTES " %2, %1, %0" : "+" APACK_REGISTER(sums) : APACK_REGISTER(unsigned_bytes), APACK_REGISTER(bytes));
    return sums;
}

inline Ints in_register(Ints x) {
    __asm__("" : "+" APACK_REGISTER(x));
    return x;
}
#endif

}  // namespace
