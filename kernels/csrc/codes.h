// Codes of a packed stream (docs/format.md) as floats.
#pragma once

#include "arguments.h"
#include "levels.h"

namespace {

// Columns of a band are a multiple of this, and as many bytes past a row may be read. Of 2-bit codes a word, which integers take, has 16.
#if defined(APACK_VNNI)
constexpr int GRAIN = 16;
#else
constexpr int GRAIN = LANES;
#endif

// Where the components of a band lie in a tile: whole vectors of columns.
struct Band {
    int bits, count, columns, column, component;
    int64_t byte;
};

struct Columns {
    Band band[BANDS];
    int count;
    int64_t bytes;
};

inline Columns columns_of(const Source &s, int64_t components) {
    Columns c = {};
    int component = 0;
    int64_t byte = 0;
    for (int i = 0; i < BANDS; ++i) {
        int stored = (int)s.bands[i];
        int count = (int)(component + stored <= components ? stored : components > component ? components - component : 0);
        c.band[i] = Band{WIDTHS[i], count, round_up(count, GRAIN), c.count, component, byte};
        c.count += c.band[i].columns;
        component += stored;
        byte += band_bytes(stored, WIDTHS[i]);
    }
    c.bytes = byte;
    return c;
}

inline int components_of(const Source &s) {
    int64_t components = 0;
    for (int64_t count : s.bands) components += count;
    return (int)components;
}

inline bool is_packed(const Source &s) { return s.dtype == UINT8; }

// `columns` columns of a band, whole vectors, of which the leading `stored` hold a code; the others are zero.
template <int BITS>
inline void unpack_band(float *out, const uint8_t *codes, int columns, int stored) {
    int whole = !is_float(BITS) || columns <= stored ? columns : columns - LANES, c = 0;
#pragma GCC unroll 4
    for (; c < whole; c += LANES, codes += LANES * BITS / 8) store(out + c, levels_at<BITS>(codes));
    if (columns <= stored) return;
    for (; c < columns; ++c, codes += 2) {
        uint16_t h = 0;
        if (c < stored) memcpy(&h, codes, 2);
        out[c] = half_to_float(h);
    }
    for (c = stored; c < columns; ++c) out[c] = 0;
}

// A packed stream of one head group: its first code, the last address where a row may be read with a vector to spare.
struct Packed {
    const uint8_t *base, *last;
    int64_t stride, bytes;
};

inline Packed packed_of(const Source &s, int64_t batch, int64_t b, int64_t group, int64_t slots, int64_t bytes) {
    const uint8_t *data = (const uint8_t *)s.data;
    const uint8_t *end = data + (batch - 1) * s.batch_stride + (s.groups - 1) * s.group_stride + (slots - 1) * s.token_stride + bytes;
    return Packed{data + b * s.batch_stride + group * s.group_stride, end - bytes - GRAIN, s.token_stride, bytes};
}

// Asks for rows of codes to be in the nearest cache.
// As assembler where there is one: a compiler leaves out loops that do nothing but ask.
inline void prefetch_rows(const Packed &s, int token, int tokens) {
    const uint8_t *p = s.base + token * s.stride, *end = p + tokens * s.stride;
#if defined(__x86_64__)
    for (; p < end; p += 64) __asm__ volatile("prefetcht0 %0" : : "m"(*p));
#else
    for (; p < end; p += 64) __builtin_prefetch(p);
#endif
}

template <int BITS>
inline void unpack_rows(const Packed &s, const Band &band, int from, int columns, int token, int tokens, const float *holds, float *tile,
                        int64_t stride, uint8_t *row_copy) {
    const uint8_t *row = s.base + token * s.stride;
    const int64_t byte = band.byte + from * BITS / 8;
    const int stored = band.count - from;
    for (int t = 0; t < tokens; ++t, tile += stride, row += s.stride) {
        if (holds && holds[t] <= 0) {
            memset(tile, 0, columns * sizeof *tile);
        } else if (row > s.last) {
            memcpy(row_copy, row, s.bytes);
            unpack_band<BITS>(tile, row_copy + byte, columns, stored);
        } else {
            unpack_band<BITS>(tile, row + byte, columns, stored);
        }
    }
}

// Calls run(band, from, n, at) for each band's columns [from, from + n) among columns [first, first + count), `at` of which is the first.
template <typename Run>
inline void for_each_part(const Columns &columns, int first, int count, const Run &run) {
    for (const Band &band : columns.band) {
        int low = first > band.column ? first : band.column, end = band.column + band.columns;
        int n = (first + count < end ? first + count : end) - low;
        if (n > 0) run(band, low - band.column, n, low - first);
    }
}

// Columns [first, first + count) of tokens as floats, tile[token][column]; zeros where a slot is not held.
__attribute__((noinline)) void unpack_tile(const Packed &s, const Columns &columns, int first, int count, int token, int tokens,
                                           const float *holds, float *tile, uint8_t *row_copy) {
    for_each_part(columns, first, count, [&](const Band &band, int from, int n, int at) {
        with_width(band.bits, [&](auto width) {
            unpack_rows<width.bits>(s, band, from, n, token, tokens, holds, tile + at, count, row_copy);
        });
    });
}

}  // namespace
