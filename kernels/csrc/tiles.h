// Codes of blocks of tokens as tiles that products read: keys by component, so that scores are sums within lanes, one for each token;
// values by token, or by fours of tokens where they are multiplied as integers.
#pragma once

#include "fours.h"

namespace {

constexpr int TOKENS_AT_ONCE = 16;
constexpr int KEY_TILE_COLUMNS = 128;  // of BLOCK tokens as floats: 32 KiB

// Rows of codes of a block, the last of its tokens in the place of those that are not there; copies near the tensor's end, past which a
// vector would reach.
inline void rows_of(const Packed &s, int token, int tokens, const uint8_t *rows[BLOCK], uint8_t *copies) {
    const uint8_t *row = s.base + token * s.stride;
    for (int i = 0; i < BLOCK; ++i) rows[i] = row + (i < tokens ? i : tokens - 1) * s.stride;
    if (rows[tokens - 1] <= s.last) return;
    for (int i = 0; i < BLOCK; ++i, copies += s.bytes + LANES) rows[i] = (const uint8_t *)memcpy(copies, rows[i], s.bytes);
}

#if defined(APACK_AVX512)
// A float for each component, less its band's middle.
struct FloatLevels {
    typedef float Number;
    static constexpr int COMPONENTS = 1;
    template <int BITS>
    static __m512i of_word(__m512i word, int i) { return _mm512_castps_si512(level_of<BITS>(word, i)); }
};

// x[lane] = 16 bytes of row `step * lane`.
inline __m512i load_rows(const uint8_t *const *rows, int step, int64_t byte) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[0] + byte)));
#pragma GCC unroll 3
    for (int lane = 1; lane < 4; ++lane)
        x = _mm512_mask_broadcast_i32x4(x, (__mmask16)(15 << 4 * lane), _mm_loadu_si128((const __m128i *)(rows[step * lane] + byte)));
    return x;
}

// words[j] = bytes 4 j to 4 j + 3 at `byte` of every row.
inline void load_words(const uint8_t *const rows[TOKENS_AT_ONCE], int64_t byte, __m512i words[4]) {
    __m512i x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = load_rows(rows + i, 4, byte);
    __m512i low = _mm512_unpacklo_epi32(x[0], x[1]), later_low = _mm512_unpacklo_epi32(x[2], x[3]);
    __m512i high = _mm512_unpackhi_epi32(x[0], x[1]), later_high = _mm512_unpackhi_epi32(x[2], x[3]);
    words[0] = _mm512_unpacklo_epi64(low, later_low), words[1] = _mm512_unpackhi_epi64(low, later_low);
    words[2] = _mm512_unpacklo_epi64(high, later_high), words[3] = _mm512_unpackhi_epi64(high, later_high);
}

// Rows [0, count) of a tile from the codes at `byte` of 16 tokens.
template <typename Levels, int BITS>
inline void unpack_components(const uint8_t *const rows[TOKENS_AT_ONCE], int64_t byte, int count, typename Levels::Number *tile) {
    constexpr int EACH = 32 / BITS / Levels::COMPONENTS;
    for (int c = 0; EACH && c < count; byte += 16) {
        __m512i words[4];
        load_words(rows, byte, words);
        for (int j = 0; j < 4 && c < count; ++j, c += EACH, tile += EACH * BLOCK) {
            if (count - c >= EACH) {
#pragma GCC unroll 16
                for (int i = 0; i < EACH; ++i) _mm512_storeu_si512(tile + i * BLOCK, Levels::template of_word<BITS>(words[j], i));
            } else {
                for (int i = 0; i < count - c; ++i) _mm512_storeu_si512(tile + i * BLOCK, Levels::template of_word<BITS>(words[j], i));
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
    static __m512i of_word(__m512i word, int i) {
        if constexpr (BITS >= 8) return word;
        else return _mm512_and_si512(_mm512_srli_epi32(word, BITS * i), _mm512_set1_epi8((1 << BITS) - 1));
    }
};

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
