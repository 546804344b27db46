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

// Numbers as 16-bit integers, high and low bytes apart: with one term of 8 bits, products would lose weights that are small but many, and
// as much as 8-bit codes do. n: a multiple of GRAIN. Returns the sums of the integers' lanes.
constexpr float MOST = 127 * 256 + 127;
template <int BITS>
inline Vec quantize(const float *row, int n, float inverse, int8_t *high, int8_t *low) {
    static constexpr NumberOrder<BITS> order;
    const Ints places = load_ints(order.place), half = APACK_MM(set1_epi16)(128);
    Ints total = {};
    for (int i = 0; i < n; i += PACKED) {
        const int left = n - i < PACKED ? n - i : PACKED;
        Ints x[4];
        for (int j = 0; j < 4; ++j) x[j] = j * LANES < left ? APACK_MM(cvtps_epi32)(scaled(load(row + i + j * LANES), broadcast(inverse))) : Ints{};
        const Ints a = APACK_MM(packs_epi32)(x[0], x[1]), b = APACK_MM(packs_epi32)(x[2], x[3]);
        total = add_pairs(add_pairs(total, a), b);
        store_bytes(low + i, low_bytes(a, b, places), left);
        store_bytes(high + i, high_bytes(APACK_MM(add_epi16)(a, half), APACK_MM(add_epi16)(b, half), places), left);
    }
    return APACK_MM(cvtepi32_ps)(total);
}

// What numbers up to `greatest` are multiplied with to be integers.
inline float inverse_of(float greatest) { return greatest > 1e-30f ? MOST / greatest : 0; }

// out[m][:] += sum over k of a[m][k] levels[k][:] - middles of the columns times masses of the rows; a in two terms, the high one first.
struct Fours {
    typedef Word Number;
    typedef Ints Sums;
    static constexpr int TERMS = 2;
    int64_t term_step;
    const Scale *scale;    // of each row
    const float *middles;  // of each vector of columns

    static Ints begin(const float *, int) { return Ints{}; }
    static Ints row(const Word *levels, int n) { return in_register(n == LANES ? load_ints(levels) : load_some_ints(levels, n)); }
    static Ints multiply(Ints a, Ints levels, Ints sums) { return dot_bytes(levels, a, sums); }
    static Ints next_term(Ints sums) { return APACK_MM(slli_epi32)(sums, 8); }
    static Ints joined(const Word *high, const Word *low) { return APACK_MM(add_epi32)(next_term(load_ints(high)), load_ints(low)); }
    static Ints each(const Word *a) { return APACK_MM(set1_epi32)(*a); }
    void end(Ints sums, float *out, int n, int m, int column) const {
        Vec total = fma(APACK_MM(cvtepi32_ps)(sums), broadcast(scale[m].factor), Floats::begin(out, n));
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
