// Fours of 8-bit numbers, and their products with levels, which are bytes as they are (AVX-512 VNNI).
#pragma once

#include "codes.h"
#include "products.h"
#include "segments.h"

namespace {

// row[i] ~ factor * (256 high[i] + low[i]); mass: their sum, of latents times the middles of their levels: what products with levels have
// too much.
struct Scale {
    float factor, mass;
};

#if defined(APACK_VNNI)
constexpr bool INTEGERS = true;

// Where the low bytes of 64 numbers are, packed to 16 bits by twos of vectors; in the order in which shifts of words of codes give levels.
template <int BITS>
struct NumberOrder {
    uint8_t byte[64] = {};
    constexpr NumberOrder() {
        constexpr int EACH = is_float(BITS) ? 1 : 8 / BITS;  // levels of a byte
        for (int i = 0; i < 64; ++i) {
            int component = i / (4 * EACH) * 4 * EACH + i % 4 * EACH + i / 4 % EACH;
            // packing works on quarters of vectors: four numbers of the first, four of the second
            int vector = component / 16, quarter = component % 16 / 4, place = quarter * 8 + vector % 2 * 4 + component % 4;
            byte[i] = (uint8_t)(vector / 2 * 64 + 2 * place);
        }
    }
};

// Numbers as 16-bit integers, high and low bytes apart: with one term of 8 bits, products would lose weights that are small but many, and
// as much as 8-bit codes do. n: a multiple of LANES. Returns the sums of the integers' lanes.
constexpr float MOST = 127 * 256 + 127;
template <int BITS>
inline Vec quantize(const float *row, int n, float inverse, int8_t *high, int8_t *low) {
    static constexpr NumberOrder<BITS> order;
    const __m512i bytes = _mm512_loadu_si512(order.byte), upper = _mm512_add_epi8(bytes, _mm512_set1_epi8(1));
    const __m512i half = _mm512_set1_epi16(128), ones = _mm512_set1_epi16(1);
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 64) {
        const int left = n - i < 64 ? n - i : 64;
        __m512i x[4];
        for (int j = 0; j < 4; ++j)
            x[j] = j * LANES < left ? _mm512_cvtps_epi32(scaled(load(row + i + j * LANES), broadcast(inverse))) : _mm512_setzero_si512();
        __m512i a = _mm512_packs_epi32(x[0], x[1]), b = _mm512_packs_epi32(x[2], x[3]);
        total = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(total, a, ones), b, ones);
        const __mmask64 there = ~0ull >> (64 - left);
        _mm512_mask_storeu_epi8(low + i, there, _mm512_permutex2var_epi8(a, bytes, b));
        a = _mm512_add_epi16(a, half), b = _mm512_add_epi16(b, half);
        _mm512_mask_storeu_epi8(high + i, there, _mm512_permutex2var_epi8(a, upper, b));
    }
    return _mm512_cvtepi32_ps(total);
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
