// Codes of blocks of tokens as tiles that products read: keys by component, so that scores are sums within lanes, one for each token;
// values by token, or by fours of tokens where they are multiplied as integers.
#pragma once

#include "fours.h"

namespace {

constexpr int TOKENS_AT_ONCE = LANES;
constexpr int KEY_TILE_COLUMNS = 128;  // of BLOCK tokens as floats: 32 KiB

// Rows of codes of a block, the last of its tokens in the place of those that are not there; copies near the tensor's end, past which a
// vector would reach.
inline void rows_of(const Packed &s, int token, int tokens, const uint8_t *rows[BLOCK], uint8_t *copies) {
    const uint8_t *row = s.base + token * s.stride;
    for (int i = 0; i < BLOCK; ++i) rows[i] = row + (i < tokens ? i : tokens - 1) * s.stride;
    if (rows[tokens - 1] <= s.last) return;
    for (int i = 0; i < BLOCK; ++i, copies += s.bytes + GRAIN) rows[i] = (const uint8_t *)memcpy(copies, rows[i], s.bytes);
}

#if defined(APACK_AVX512)
// A float for each component, less its band's middle.
struct FloatLevels {
    typedef float Number;
    static constexpr int COMPONENTS = 1;
    template <int BITS>
    static Ints of_word(Ints word, int i) { return _mm512_castps_si512(level_of<BITS>(word, i)); }
};

// Sixteen bytes of rows that are `step` apart, one after another.
inline Ints load_rows(const uint8_t *const *rows, int step, int64_t byte) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + byte)));
#pragma GCC unroll 3
    for (int lane = 1; lane < 4; ++lane)
        x = _mm512_mask_broadcast_i32x4(x, (__mmask16)(15 << 4 * lane), _mm_loadu_si128((const __m128i *)(rows[step * lane] + byte)));
    return x;
}
#elif defined(APACK_VNNI)
inline Ints load_rows(const uint8_t *const *rows, int step, int64_t byte) {
    return _mm256_loadu2_m128i((const __m128i *)(rows[step] + byte), (const __m128i *)(rows[0] + byte));
}
#endif

#if defined(APACK_AVX512) || defined(APACK_VNNI)
// words[j] = bytes 4 j to 4 j + 3 at `byte` of every row.
inline void load_words(const uint8_t *const rows[TOKENS_AT_ONCE], int64_t byte, Ints words[4]) {
    Ints x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = load_rows(rows + i, 4, byte);
    Ints low = APACK_MM(unpacklo_epi32)(x[0], x[1]), later_low = APACK_MM(unpacklo_epi32)(x[2], x[3]);
    Ints high = APACK_MM(unpackhi_epi32)(x[0], x[1]), later_high = APACK_MM(unpackhi_epi32)(x[2], x[3]);
    words[0] = APACK_MM(unpacklo_epi64)(low, later_low), words[1] = APACK_MM(unpackhi_epi64)(low, later_low);
    words[2] = APACK_MM(unpacklo_epi64)(high, later_high), words[3] = APACK_MM(unpackhi_epi64)(high, later_high);
}

// Rows [0, count) of a tile from the codes at `byte` of some tokens.
template <typename Levels, int BITS>
inline void unpack_components(const uint8_t *const rows[TOKENS_AT_ONCE], int64_t byte, int count, typename Levels::Number *tile) {
    constexpr int EACH = 32 / BITS / Levels::COMPONENTS;
    for (int c = 0; EACH && c < count; byte += 16) {
        Ints words[4];
        load_words(rows, byte, words);
        for (int j = 0; j < 4 && c < count; ++j, c += EACH, tile += EACH * BLOCK) {
            if (count - c >= EACH) {
#pragma GCC unroll 16
                for (int i = 0; i < EACH; ++i) store_ints(tile + i * BLOCK, Levels::template of_word<BITS>(words[j], i));
            } else {
                for (int i = 0; i < count - c; ++i) store_ints(tile + i * BLOCK, Levels::template of_word<BITS>(words[j], i));
            }
        }
    }
}

// Columns [first, first + count) of tokens, tile[row][token]; what is written past the last token has no meaning.
template <typename Levels>
__attribute__((noinline)) void unpack_key_tile(const Packed &s, const Columns &columns, int first, int count, int token, int tokens,
                                               typename Levels::Number *tile, uint8_t *copies) {
    const uint8_t *rows[BLOCK];
    rows_of(s, token, tokens, rows, copies);
    for_each_part(columns, first, count, [&](const Band &band, int from, int n, int at) {
        // columns that hold no component are multiplied with zeros, but a float there may be none
        int stored = Levels::COMPONENTS == 1 && band.count - from < n ? band.count - from : n;
        int64_t byte = band.byte + from * band.bits / 8;
        auto *out = tile + (int64_t)at / Levels::COMPONENTS * BLOCK;
        with_width(band.bits, [&](auto width) {
            for (int t = 0; t < tokens; t += TOKENS_AT_ONCE)
                unpack_components<Levels, width.bits>(rows + t, byte, stored / Levels::COMPONENTS, out + t);
        });
        memset(out + stored * BLOCK, 0, (n - stored) * BLOCK * sizeof *out);
    });
}
#endif

#if defined(APACK_VNNI)
// A word for four components.
struct FourLevels {
    typedef Word Number;
    static constexpr int COMPONENTS = 4;
    template <int BITS>
    static Ints of_word(Ints word, int i) {
        if constexpr (BITS >= 8) return word;
        else return APACK_MM(srli_epi32)(word, BITS * i) & APACK_MM(set1_epi8)((1 << BITS) - 1);
    }
};

#if defined(APACK_AVX512)
// Where the codes of 16 components of four tokens are in 16 bytes of each, and by how much a word of them is shifted.
template <int BITS>
struct QuadOrder {
    uint8_t byte[64] = {};
    uint32_t shift[16] = {};
    constexpr QuadOrder() {
        for (int c = 0; c < 16; ++c) {
            for (int t = 0; t < 4; ++t) byte[4 * c + t] = (uint8_t)(16 * t + c * BITS / 8);
            shift[c] = c * BITS % 8;
        }
    }
};

// Words of a component of four tokens, `columns` of a band, a multiple of 16, from the codes at `byte` on.
template <int BITS>
inline void unpack_quads(const uint8_t *const rows[BLOCK], int tokens, int64_t byte, int columns, Word *tile, int64_t stride) {
    static constexpr QuadOrder<BITS> order;
    const __m512i index = _mm512_loadu_si512(order.byte), shift = _mm512_loadu_si512(order.shift);
    for (int t = 0; t < tokens; t += 4, tile += stride)
        for (int c = 0; !is_float(BITS) && c < columns; c += 128 / BITS) {
            const __m512i codes = load_rows(rows + t, 1, byte + c * BITS / 8);
#pragma GCC unroll 4
            for (int i = 0; i < 8 / BITS; ++i) {
                if (c + i * LANES >= columns) break;
                __m512i x = _mm512_permutexvar_epi8(_mm512_add_epi8(index, _mm512_set1_epi8(2 * BITS * i)), codes);
                if constexpr (BITS < 8) x = _mm512_and_si512(_mm512_srlv_epi32(x, shift), _mm512_set1_epi8((1 << BITS) - 1));
                _mm512_storeu_si512(tile + c + i * LANES, x);
            }
        }
}
#else
// Where the codes of four components of four tokens are in four bytes of each, and by how much a word of them is shifted; in both halves.
template <int BITS>
struct QuadOrder {
    uint8_t byte[32] = {};
    uint32_t shift[8] = {};
    constexpr QuadOrder() {
        for (int i = 0; i < 32; ++i) byte[i] = (uint8_t)(i % 4 * 4 + i / 4 % 4 * BITS / 8);
        for (int i = 0; i < 8; ++i) shift[i] = i % 4 * BITS % 8;
    }
};

template <int BITS>
inline void unpack_quads(const uint8_t *const rows[BLOCK], int tokens, int64_t byte, int columns, Word *tile, int64_t stride) {
    static constexpr QuadOrder<BITS> order;
    constexpr int EACH = is_float(BITS) ? 1 : 8 / BITS;  // fours of components in a word
    const Ints index = load_ints(order.byte), shift = load_ints(order.shift);
    // components `4 i` to `4 i + 3` of words, four tokens in each half
    auto level = [&](Ints word, int i) {
        Ints x = _mm256_shuffle_epi8(word, _mm256_add_epi8(index, _mm256_set1_epi8((char)(BITS / 2 * i))));
        if constexpr (BITS < 8) x = _mm256_srlv_epi32(x, shift) & _mm256_set1_epi8((1 << BITS) - 1);
        return x;
    };
    for (int t = 0; t < tokens; t += TOKENS_AT_ONCE, tile += 2 * stride)
        for (int c = 0; !is_float(BITS) && c < columns; c += 128 / BITS) {
            Ints words[4];
            load_words(rows + t, byte + c * BITS / 8, words);
#pragma GCC unroll 8
            for (int i = 0; i < 32 / BITS; i += 2) {
                if (c + 4 * i >= columns) break;
                const Ints x = level(words[i * BITS / 8], i % EACH), y = level(words[(i + 1) * BITS / 8], (i + 1) % EACH);
                store_ints(tile + c + 4 * i, _mm256_permute2x128_si256(x, y, 0x20));
                store_ints(tile + stride + c + 4 * i, _mm256_permute2x128_si256(x, y, 0x31));
            }
        }
}
#endif

// Columns [first, first + count) of tokens, tile[quad][column], and the middles of the levels, by vector of columns.
__attribute__((noinline)) void unpack_value_fours(const Packed &s, const Columns &columns, int first, int count, int token, int tokens, Word *tile,
                                                  float *middles, uint8_t *copies) {
    const uint8_t *rows[BLOCK];
    rows_of(s, token, tokens, rows, copies);
    for_each_part(columns, first, count, [&](const Band &band, int from, int n, int at) {
        for (int c = 0; c < n; c += LANES) middles[(at + c) / LANES] = middle_of(band.bits);
        with_width(band.bits, [&](auto width) { unpack_quads<width.bits>(rows, tokens, band.byte + from * width.bits / 8, n, tile + at, count); });
    });
}
#endif

}  // namespace
