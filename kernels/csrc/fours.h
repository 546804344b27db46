// Fours of 8-bit numbers, and their products with levels, which are bytes as they are (AVX-512 VNNI).
#pragma once

#include "codes.h"
#include "products.h"
#include "segments.h"

namespace {

// Numbers are `factor` times integers. mass: their sum, of latents times the middles of their levels: what products with levels have too
// much.
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

// Sums of integers' lanes: of whole ones, and of what is left of them.
struct Total {
    Vec whole, rounded;
};

// The largest number of a row, which loses nothing without its low term.
constexpr float MOST = 127 * 256;

// 64 numbers as 16-bit integers, those past `left` zeros; in the order in which vectors are packed.
struct Packed64 {
    __m512i first, second;
    Packed64(const float *row, int left, float inverse) {
        __m512i x[4];
        for (int j = 0; j < 4; ++j)
            x[j] = j * LANES < left ? _mm512_cvtps_epi32(scaled(load(row + j * LANES), broadcast(inverse))) : _mm512_setzero_si512();
        first = _mm512_packs_epi32(x[0], x[1]), second = _mm512_packs_epi32(x[2], x[3]);
    }
    __m512i add_to(__m512i total) const {
        const __m512i ones = _mm512_set1_epi16(1);
        return _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(total, first, ones), second, ones);
    }
    __m512i bytes(__m512i order) const { return _mm512_permutex2var_epi8(first, order, second); }
    // Each plus one of `add`, over 2**SHIFT.
    template <int SHIFT>
    __m512i rounded(__m512i order, __m512i add_to_first, __m512i add_to_second) const {
        const __m512i a = _mm512_srai_epi16(_mm512_add_epi16(first, add_to_first), SHIFT);
        return _mm512_permutex2var_epi8(a, order, _mm512_srai_epi16(_mm512_add_epi16(second, add_to_second), SHIFT));
    }
};

// Numbers as integers 256 high + low. n: a multiple of LANES.
template <int BITS>
inline Total quantize(const float *row, int n, float inverse, int8_t *high, int8_t *low) {
    static constexpr NumberOrder<BITS> order;
    const __m512i in_order = _mm512_loadu_si512(order.byte), half = _mm512_set1_epi16(128);
    __m512i total = _mm512_setzero_si512(), total_high = total;
    for (int i = 0; i < n; i += 64) {
        const int left = n - i < 64 ? n - i : 64;
        const Packed64 x(row + i, left, inverse);
        const __m512i highs = x.rounded<8>(in_order, half, half);
        const __mmask64 there = ~0ull >> (64 - left);
        _mm512_mask_storeu_epi8(low + i, there, x.bytes(in_order));
        _mm512_mask_storeu_epi8(high + i, there, highs);
        total = x.add_to(total), total_high = _mm512_dpbusd_epi32(total_high, _mm512_set1_epi8(1), highs);
    }
    return {_mm512_cvtepi32_ps(total), _mm512_cvtepi32_ps(_mm512_slli_epi32(total_high, 8))};
}

// What is added to the weight of each of a block's tokens before the lowest seven bits are dropped, in the order in which vectors are
// packed: spread evenly over any run of tokens, so that weights that are small but many lose nothing on the whole.
struct Dither {
    int16_t of[BLOCK] = {};
    constexpr Dither() {
        constexpr NumberOrder<8> order;
        for (int t = 0; t < BLOCK; ++t) {
            int reversed = 0;
            for (int bit = 0; bit < 6; ++bit) reversed |= (t >> bit & 1) << (5 - bit);
            of[order.byte[t] / 2] = (int16_t)(2 * reversed + 1);
        }
    }
};
static_assert(BLOCK == 64, "Dither has as many places as a vector has bytes");

// The weights of a block's tokens, none below zero: as integers 256 high + low, and as about 128 byte.
inline Total quantize_weights(const float *row, float inverse, int8_t *high, int8_t *low, uint8_t *byte) {
    static constexpr NumberOrder<8> order;
    static constexpr Dither dither;
    const __m512i in_order = _mm512_loadu_si512(order.byte), half = _mm512_set1_epi16(128);
    const Packed64 x(row, BLOCK, inverse);
    const __m512i bytes = x.rounded<7>(in_order, _mm512_loadu_si512(dither.of), _mm512_loadu_si512(dither.of + BLOCK / 2));
    _mm512_storeu_si512(low, x.bytes(in_order));
    _mm512_storeu_si512(high, x.rounded<8>(in_order, half, half));
    _mm512_storeu_si512(byte, bytes);
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bytes, _mm512_set1_epi8(1));
    return {_mm512_cvtepi32_ps(x.add_to(_mm512_setzero_si512())), _mm512_cvtepi32_ps(_mm512_slli_epi32(sums, 7))};
}

// Variance of a band's levels where components are Gaussian (kernels/format.py: unit_step).
constexpr float level_variance(int bits) { return bits == 2 ? 0.83f : bits == 4 ? 6.2f : 540; }
// What rounding loses of a number, in squares of its step.
constexpr float ROUNDING = 1 / 12.0f;
// What leaving out low terms may add to the squared error of what the codes lost, in scores and in sums of values.
constexpr float MAY_ADD = 1 / 100.0f;

// What numbers up to `greatest` are multiplied with to be integers.
inline float inverse_of(float greatest) { return greatest > 1e-30f ? MOST / greatest : 0; }

// out[m][:] += sum over k of a[m][k] levels[k][:] - middles of the columns times masses of the rows.
struct Fours {
    typedef Word Number;
    typedef __m512i Sums;
    const Scale *scale;    // of each row
    const float *middles;  // of each vector of columns

    static __m512i begin(const float *, int) { return _mm512_setzero_si512(); }
    static __m512i row(const Word *levels, int n) {
        __m512i x = n == LANES ? _mm512_loadu_si512(levels) : _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), levels);
        __asm__("" : "+v"(x));
        return x;
    }
    static __m512i each(const Word *a) { return _mm512_set1_epi32(*a); }
    void end(__m512i sums, float *out, int n, int m, int column) const {
        Vec total = fma(_mm512_cvtepi32_ps(sums), broadcast(scale[m].factor), Floats::begin(out, n));
        Floats::end(fma(broadcast(-scale[m].mass), broadcast(middles[column / LANES]), total), out, n, m, column);
    }
    // Sums plus bytes from 0 to 255 times bytes from -128 to 127; GCC 12 copies the sums around the intrinsic.
    static __m512i products(__m512i unsigned_bytes, __m512i bytes, __m512i sums) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(bytes));
        return sums;
    }
};

// a in two terms, the high one first; the low one of the leading `low_words` alone.
struct TwoTerms : Fours {
    static constexpr int TERMS = 2;
    int64_t term_step;
    int low_words;
    static __m512i multiply(__m512i a, __m512i levels, __m512i sums) { return products(levels, a, sums); }
    static __m512i next_term(__m512i sums) { return _mm512_slli_epi32(sums, 8); }
};

// a of bytes that are not negative, levels of at most 127.
struct OneTerm : Fours {
    static constexpr int TERMS = 1, low_words = 0;
    static constexpr int64_t term_step = 0;
    static __m512i multiply(__m512i a, __m512i levels, __m512i sums) { return products(a, levels, sums); }
    static __m512i next_term(__m512i sums) { return sums; }
};

// Columns that are multiplied at once: sums of two terms with 8-bit levels then stay below 2**31.
constexpr int FOURS_COLUMNS = 256;

inline float middle_of(int bits) { return ((1 << bits) - 1) / 2.0f; }
#else
constexpr bool INTEGERS = false;
#endif

}  // namespace
