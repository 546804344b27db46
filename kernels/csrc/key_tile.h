// Codes of packed keys as floats, one row for each component: scores are then sums within lanes, one for each token.
#pragma once

#include "codes.h"
#include "segments.h"

namespace {

constexpr int TOKENS_AT_ONCE = 16;
constexpr int KEY_TILE_COLUMNS = 128;  // of BLOCK tokens: 32 KiB

#if defined(APACK_AVX512)
constexpr bool KEYS_BY_COMPONENT = true;

// words[j] = bytes 4 j to 4 j + 3 at `byte` of every row.
inline void load_words(const uint8_t *const rows[TOKENS_AT_ONCE], int64_t byte, __m512i words[4]) {
    __m512i x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[i] + byte)));
#pragma GCC unroll 3
        for (int lane = 1; lane < 4; ++lane)
            x[i] = _mm512_mask_broadcast_i32x4(x[i], (__mmask16)(15 << 4 * lane), _mm_loadu_si128((const __m128i *)(rows[4 * lane + i] + byte)));
    }
    __m512i low = _mm512_unpacklo_epi32(x[0], x[1]), later_low = _mm512_unpacklo_epi32(x[2], x[3]);
    __m512i high = _mm512_unpackhi_epi32(x[0], x[1]), later_high = _mm512_unpackhi_epi32(x[2], x[3]);
    words[0] = _mm512_unpacklo_epi64(low, later_low), words[1] = _mm512_unpackhi_epi64(low, later_low);
    words[2] = _mm512_unpacklo_epi64(high, later_high), words[3] = _mm512_unpackhi_epi64(high, later_high);
}

// Components of a band from the first one at `byte` of 16 rows, tile[component][token].
template <int BITS>
inline void unpack_components(const uint8_t *const rows[TOKENS_AT_ONCE], int64_t byte, int components, float *tile) {
    constexpr int EACH = 32 / BITS;
    for (int c = 0; c < components; byte += 16) {
        __m512i words[4];
        load_words(rows, byte, words);
        for (int j = 0; j < 4 && c < components; ++j, c += EACH, tile += EACH * BLOCK) {
            if (components - c >= EACH) {
#pragma GCC unroll 16
                for (int i = 0; i < EACH; ++i) store(tile + i * BLOCK, level_of<BITS>(words[j], i));
            } else {
                for (int i = 0; i < components - c; ++i) store(tile + i * BLOCK, level_of<BITS>(words[j], i));
            }
        }
    }
}

// Columns [first, first + count) of up to 16 tokens.
inline void unpack_group(const uint8_t *const rows[TOKENS_AT_ONCE], const Columns &columns, int first, int count, float *tile) {
    for (const Band &band : columns.band) {
        int low = first > band.column ? first : band.column, end = band.column + band.columns;
        int n = (first + count < end ? first + count : end) - low, from = low - band.column;
        if (n <= 0) continue;
        int stored = band.count - from < n ? band.count - from : n;
        int64_t byte = band.byte + from * band.bits / 8;
        float *out = tile + (int64_t)(low - first) * BLOCK;
        with_width(band.bits, [&](auto width) { unpack_components<width.bits>(rows, byte, stored, out); });
        for (int c = stored; c < n; ++c) store(out + c * BLOCK, zero());
    }
}
#else
constexpr bool KEYS_BY_COMPONENT = false;
inline void unpack_group(const uint8_t *const *, const Columns &, int, int, float *) {}
#endif

// Columns [first, first + count) of tokens as floats, tile[column][token]; what is written past the last token has no meaning.
__attribute__((noinline)) void unpack_key_tile(const Packed &s, const Columns &columns, int first, int count, int token, int tokens, float *tile,
                                               uint8_t *row_copy) {
    for (int t = 0; t < tokens; t += TOKENS_AT_ONCE) {
        int n = tokens - t < TOKENS_AT_ONCE ? tokens - t : TOKENS_AT_ONCE;
        const uint8_t *rows[TOKENS_AT_ONCE];
        for (int i = 0; i < TOKENS_AT_ONCE; ++i) rows[i] = s.base + (token + t + (i < n ? i : n - 1)) * s.stride;
        if (first == 0) prefetch_rows(s, token + t + TOKENS_AT_ONCE, TOKENS_AT_ONCE);
        if (rows[n - 1] <= s.last) {
            unpack_group(rows, columns, first, count, tile + t);
            continue;
        }
        float plain[TOKENS_AT_ONCE * KEY_TILE_COLUMNS];
        unpack_tile(s, columns, first, count, token + t, n, nullptr, plain, row_copy);
        for (int c = 0; c < count; ++c)
            for (int i = 0; i < n; ++i) tile[c * BLOCK + t + i] = plain[i * count + c];
    }
}

}  // namespace
