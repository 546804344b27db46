// Fours of 8-bit numbers, and their products with levels, which are bytes as they are (VNNI).
#pragma once

#include "codes.h"
#include "ints.h"
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
constexpr int PACKED = 4 * LANES;  // numbers that are made bytes at once

// Where a number is that was packed to 16 bits by twos of vectors: four numbers of the first, four of the second.
constexpr int packed_place(int i) { return i / (2 * LANES) * 2 * LANES + i % LANES / 4 * 8 + i / LANES % 2 * 4 + i % 4; }

// The places that low_bytes takes for the order in which shifts of words of codes give levels.
template <int BITS>
struct NumberOrder {
    uint8_t place[PACKED] = {};
    constexpr NumberOrder() {
        constexpr int EACH = is_float(BITS) ? 1 : 8 / BITS;  // levels of a byte
        for (int i = 0; i < PACKED; ++i) {
            int component = i / (4 * EACH) * 4 * EACH + i % 4 * EACH + i / 4 % EACH;
            place[i] = (uint8_t)(LANES == 16 ? 2 * packed_place(component) : component % 16);
        }
    }
};

// Sums of integers' lanes: of whole ones, and of what is left of them.
struct Total {
    Vec whole, rounded;
};

// The largest number of a row, which loses nothing without its low term.
constexpr float MOST = 127 * 256;

// Numbers as 16-bit integers, those past `left` zeros; in the order in which vectors are packed.
struct PackedNumbers {
    Ints first, second;
    PackedNumbers(const float *row, int left, float inverse) {
        Ints x[4];
        for (int j = 0; j < 4; ++j) x[j] = j * LANES < left ? APACK_MM(cvtps_epi32)(scaled(load(row + j * LANES), broadcast(inverse))) : Ints{};
        first = APACK_MM(packs_epi32)(x[0], x[1]), second = APACK_MM(packs_epi32)(x[2], x[3]);
    }
    Ints add_to(Ints total) const { return add_pairs(add_pairs(total, first), second); }
    Ints bytes(Ints order) const { return low_bytes(first, second, order); }
    // Each plus one of `add`, over 2**SHIFT.
    template <int SHIFT>
    Ints rounded(Ints order, Ints add_to_first, Ints add_to_second) const {
        const Ints a = APACK_MM(srai_epi16)(APACK_MM(add_epi16)(first, add_to_first), SHIFT);
        return low_bytes(a, APACK_MM(srai_epi16)(APACK_MM(add_epi16)(second, add_to_second), SHIFT), order);
    }
};

// Numbers as integers 256 high + low. n: a multiple of GRAIN.
template <int BITS>
inline Total quantize(const float *row, int n, float inverse, int8_t *high, int8_t *low) {
    static constexpr NumberOrder<BITS> order;
    const Ints in_order = load_ints(order.place), half = APACK_MM(set1_epi16)(128);
    Ints total = {}, total_high = {};
    for (int i = 0; i < n; i += PACKED) {
        const int left = n - i < PACKED ? n - i : PACKED;
        const PackedNumbers x(row + i, left, inverse);
        const Ints highs = x.rounded<8>(in_order, half, half);
        store_bytes(low + i, x.bytes(in_order), left);
        store_bytes(high + i, highs, left);
        total = x.add_to(total), total_high = dot_bytes(APACK_MM(set1_epi8)(1), highs, total_high);
    }
    return {APACK_MM(cvtepi32_ps)(total), APACK_MM(cvtepi32_ps)(APACK_MM(slli_epi32)(total_high, 8))};
}

// What is added to the weight of each of a block's tokens before the lowest seven bits are dropped, in the order in which vectors are
// packed: spread evenly over any run of tokens, so that weights that are small but many lose nothing on the whole.
struct Dither {
    int16_t of[BLOCK] = {};
    constexpr Dither() {
        for (int t = 0; t < BLOCK; ++t) {
            int reversed = 0;
            for (int bit = 0; bit < 6; ++bit) reversed |= (t >> bit & 1) << (5 - bit);
            of[t / PACKED * PACKED + packed_place(t % PACKED)] = (int16_t)(2 * reversed + 1);
        }
    }
};
static_assert(BLOCK == 64, "Dither reverses six bits");

// The weights of a block's tokens, none below zero: as integers 256 high + low, and as about 128 byte.
inline Total quantize_weights(const float *row, float inverse, int8_t *high, int8_t *low, uint8_t *byte) {
    static constexpr NumberOrder<8> order;
    static constexpr Dither dither;
    const Ints in_order = load_ints(order.place), half = APACK_MM(set1_epi16)(128);
    Ints total = {}, sums = {};
#pragma GCC unroll 2
    for (int t = 0; t < BLOCK; t += PACKED) {
        const PackedNumbers x(row + t, PACKED, inverse);
        const Ints bytes = x.rounded<7>(in_order, load_ints(dither.of + t), load_ints(dither.of + t + PACKED / 2));
        store_ints(low + t, x.bytes(in_order));
        store_ints(high + t, x.rounded<8>(in_order, half, half));
        store_ints(byte + t, bytes);
        total = x.add_to(total), sums = dot_bytes(bytes, APACK_MM(set1_epi8)(1), sums);
    }
    return {APACK_MM(cvtepi32_ps)(total), APACK_MM(cvtepi32_ps)(APACK_MM(slli_epi32)(sums, 7))};
}

// Variance of a band's levels where components are Gaussian (kernels/format.py: unit_step).
constexpr float level_variance(int bits) { return bits == 2 ? 0.83f : bits == 4 ? 6.2f : 540; }
// What rounding loses of a number, in squares of its step.
constexpr float ROUNDING = 1 / 12.0f;
// What leaving out low terms may add to the squared error of what the codes lost, in scores and in sums of values.
constexpr float MAY_ADD = 1 / 200.0f;

// What numbers up to `greatest` are multiplied with to be integers.
inline float inverse_of(float greatest) { return greatest > 1e-30f ? MOST / greatest : 0; }

// out[m][:] += sum over k of a[m][k] levels[k][:] - middles of the columns times masses of the rows.
struct Fours {
    typedef Word Number;
    typedef Ints Sums;
    const Scale *scale;    // of each row
    const float *middles;  // of each vector of columns

    static Ints begin(const float *, int) { return Ints{}; }
    static Ints row(const Word *levels, int n) { return in_register(n == LANES ? load_ints(levels) : load_some_ints(levels, n)); }
    static Ints each(const Word *a) { return APACK_MM(set1_epi32)(*a); }
    void end(Ints sums, float *out, int n, int m, int column) const {
        Vec total = fma(APACK_MM(cvtepi32_ps)(sums), broadcast(scale[m].factor), Floats::begin(out, n));
        Floats::end(fma(broadcast(-scale[m].mass), broadcast(middles[column / LANES]), total), out, n, m, column);
    }
};

// a in two terms, the high one first; the low one of the leading `low_words` alone.
struct TwoTerms : Fours {
    static constexpr int TERMS = 2;
    int64_t term_step;
    int low_words;
    static Ints multiply(Ints a, Ints levels, Ints sums) { return dot_bytes(levels, a, sums); }
    static Ints next_term(Ints sums) { return APACK_MM(slli_epi32)(sums, 8); }
};

// a of bytes that are not negative, levels of at most 127.
struct OneTerm : Fours {
    static constexpr int TERMS = 1, low_words = 0;
    static constexpr int64_t term_step = 0;
    static Ints multiply(Ints a, Ints levels, Ints sums) { return dot_bytes(a, levels, sums); }
    static Ints next_term(Ints sums) { return sums; }
};

// Columns that are multiplied at once: sums of two terms with 8-bit levels then stay below 2**31.
constexpr int FOURS_COLUMNS = 256;

inline float middle_of(int bits) { return ((1 << bits) - 1) / 2.0f; }
#else
constexpr bool INTEGERS = false;
#endif

}  // namespace
