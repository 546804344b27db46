// Fours of 8-bit numbers, and their products with levels, which are bytes as they are (AVX-512 VNNI).
#pragma once

#include "codes.h"
#include "products.h"
#include "segments.h"

namespace {

// row[i] ~ factor * (256 high[i] + low[i]); mass: what products with levels less their middles lack of those with levels, by middle.
struct Scale {
    float factor, mass;
};

#if defined(APACK_VNNI)
constexpr bool INTEGERS = true;

// Numbers in the order in which shifts of words of codes give their levels.
template <int BITS>
inline __m128i in_order_of_words(__m128i numbers) {
    if constexpr (BITS == 4) return _mm_shuffle_epi8(numbers, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    if constexpr (BITS == 2) return _mm_shuffle_epi8(numbers, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return numbers;
}

// Numbers as 16-bit integers, high and low bytes apart: with one term of 8 bits, products would lose weights that are small but many, and
// as much as 8-bit codes do. n: a multiple of LANES. Returns the integers' sum.
constexpr float MOST = 127 * 256 + 127;
template <int BITS>
inline int quantize(const float *row, int n, float inverse, int8_t *high, int8_t *low) {
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < n; i += LANES) {
        __m512i number = _mm512_cvtps_epi32(scaled(load(row + i), broadcast(inverse)));
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
        total = _mm512_add_epi32(total, number);
        _mm_storeu_si128((__m128i *)(high + i), in_order_of_words<BITS>(_mm512_cvtepi32_epi8(upper)));
        _mm_storeu_si128((__m128i *)(low + i), in_order_of_words<BITS>(_mm512_cvtepi32_epi8(number)));
    }
    return _mm512_reduce_add_epi32(total);
}

// What numbers up to `greatest` are multiplied with to be integers.
inline float inverse_of(float greatest) { return greatest > 1e-30f ? MOST / greatest : 0; }

// out[m][:] += sum over k of a[m][k] levels[k][:] - middles of the columns times masses of the rows; a in two terms, the high one first.
struct Fours {
    typedef Word Number;
    typedef __m512i Sums;
    static constexpr int TERMS = 2;
    int64_t term_step;
    const Scale *scale;    // of each row
    const float *middles;  // of each vector of columns

    static __m512i begin(const float *, int) { return _mm512_setzero_si512(); }
    static __m512i row(const Word *levels, int n) {
        __m512i x = n == LANES ? _mm512_loadu_si512(levels) : _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), levels);
        __asm__("" : "+v"(x));
        return x;
    }
    static __m512i each(const Word *a) { return _mm512_set1_epi32(*a); }
    // GCC 12 copies the sums around the intrinsic
    static __m512i multiply(__m512i a, __m512i levels, __m512i sums) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(levels), "v"(a));
        return sums;
    }
    static __m512i next_term(__m512i sums) { return _mm512_slli_epi32(sums, 8); }
    void end(__m512i sums, float *out, int n, int m, int column) const {
        Vec total = fma(_mm512_cvtepi32_ps(sums), broadcast(scale[m].factor), Floats::begin(out, n));
        Floats::end(fma(broadcast(-scale[m].mass), broadcast(middles[column / LANES]), total), out, n, m, column);
    }
};

// Columns that are multiplied at once: sums of two terms with 8-bit levels then stay below 2**31.
constexpr int FOURS_COLUMNS = 256;

inline float middle_of(int bits) { return ((1 << bits) - 1) / 2.0f; }
#else
constexpr bool INTEGERS = false;
#endif

}  // namespace
