// Products of packed codes: scores of a block of keys by latents, sums of a block of values by weights.
#pragma once

#include "attend_layout.h"

namespace {

// A group's rows of queries, projected into the key's components; as 16-bit numbers too where levels are multiplied as integers.
struct Latents {
    const float *row, *offset;  // [M][columns], [M]
    const int8_t *terms[2];
    const Scale *scale;         // [M]

    Latents from_row(int64_t m, int columns) const {
        return {row + m * columns, offset + m, {terms[0] + m * columns, terms[1] + m * columns}, scale + m};
    }
};

// Columns whose levels are multiplied as floats; the others follow.
inline int float_columns(const Columns &columns) { return INTEGERS ? columns.band[0].columns : columns.count; }

inline Latents latents_of(const Work &w, int kind, const float *row, const float *offset, int rows, const Local &local) {
#if defined(APACK_VNNI)
    const Columns &columns = w.key[kind - 1];
    const int floats = float_columns(columns);
    for (int m = 0; m < rows; ++m) {
        const int64_t at = (int64_t)m * columns.count;
        Vec most = zero(), mass = zero();
        for (int c = floats; c < columns.count; c += LANES) most = maximum(most, magnitude(load(row + at + c)));
        const float greatest = largest(most), inverse = inverse_of(greatest);
        for_each_part(columns, floats, columns.count - floats, [&](const Band &band, int, int n, int) {
            int8_t *high = local.latent_terms[0] + at + band.column, *low = local.latent_terms[1] + at + band.column;
            with_width(band.bits, [&](auto width) {
                mass = fma(quantize<width.bits>(row + at + band.column, n, inverse, high, low), broadcast(middle_of(width.bits)), mass);
            });
        });
        local.latent_scale[m] = {greatest / MOST, greatest / MOST * sum(mass)};
    }
#endif
    return {row, offset, {local.latent_terms[0], local.latent_terms[1]}, local.latent_scale};
}

#if defined(APACK_VNNI)
// As `weigh`. Of b up to a multiple of 16 rows more is written.
inline void weigh_fours(const Local &local, const Fours &fours, const int8_t *a, int64_t lda, int rows, Word *b, int64_t ldb, int n, int k, const Rows &out) {
#if defined(APACK_MATRIX)
    if (local.matrices && (int64_t)rows * (n / SQUARE) * k >= WORTH_MATRICES) {
        memset(b + k * ldb, 0, (size_t)(round_up(k, SQUARE) - k) * ldb * sizeof *b);
        return weigh_matrices(*local.matrices, fours, (const Word *)a, lda, rows, b, ldb, n, k, out);
    }
#endif
    weigh(fours, (const Word *)a, lda, rows, b, ldb, n, k, out);
}
#endif

// local.score[m][token] of M rows, but for the offsets.
inline void score_packed(const Packed &keys, const Columns &columns, const Latents &latents, int M, int token, int tokens, const Local &local) {
    memset(local.score, 0, (size_t)M * BLOCK * sizeof(float));
    const int floats = float_columns(columns);
#if defined(APACK_AVX512)
    for (int c = 0; c < floats; c += KEY_TILE_COLUMNS) {
        int width = floats - c < KEY_TILE_COLUMNS ? floats - c : KEY_TILE_COLUMNS;
        unpack_key_tile<FloatLevels>(keys, columns, c, width, token, tokens, local.tile, local.codes);
        weigh(latents.row + c, columns.count, M, local.tile, BLOCK, round_up(tokens, LANES), width, local.score, BLOCK);
    }
#else
    int wide = floats < KEY_COLUMNS ? floats : KEY_COLUMNS, step = wide ? (TILE / wide & ~3) : BLOCK;
    if (step > BLOCK) step = BLOCK;
    for (int t = 0; t < tokens; t += step) {
        int n = tokens - t < step ? tokens - t : step;
        for (int c = 0; c < floats; c += wide) {
            int width = floats - c < wide ? floats - c : wide;
            unpack_tile(keys, columns, c, width, token + t, n, nullptr, local.tile, local.codes);
            dots(latents.row + c, columns.count, M, local.tile, width, n, width, local.score + t, BLOCK, c > 0);
        }
    }
#endif
#if defined(APACK_VNNI)
    static constexpr float ONCE[8] = {1, 1, 1, 1, 1, 1, 1, 1}, AGAIN[8] = {};
    for (int c = floats; c < columns.count; c += FOURS_COLUMNS) {
        int width = columns.count - c < FOURS_COLUMNS ? columns.count - c : FOURS_COLUMNS;
        Word *tile = (Word *)local.tile;
        unpack_key_tile<FourLevels>(keys, columns, c, width, token, tokens, tile, local.codes);
        Fours fours = {(latents.terms[1] - latents.terms[0]) / 4, latents.scale, c == floats ? ONCE : AGAIN};
        weigh_fours(local, fours, latents.terms[0] + c, columns.count / 4, M, tile, BLOCK, round_up(tokens, LANES), width / 4, Rows{local.score, BLOCK});
    }
#endif
}

// sums[m][:] += weights of M rows times a block of values; to: where each band of the columns goes.
inline void sum_packed(const Packed &values, const Columns &columns, const Columns &to, int M, int token, int tokens, const float *holds, float *sums,
                       const Local &local) {
    auto sum_columns = [&](int first, int count, int at) {
        for (int c = 0, tiles = (count + VALUE_COLUMNS - 1) / VALUE_COLUMNS; c < count; --tiles) {
            int width = round_up((count - c + tiles - 1) / tiles, LANES);
            if (width > count - c) width = count - c;
            unpack_tile(values, columns, first + c, width, token, tokens, holds, local.tile, local.codes);
            weigh(local.score, BLOCK, M, local.tile, width, width, tokens, sums + at + c, to.count);
            c += width;
        }
    };
    auto sum = [&](int first, int count, int at) {
#if defined(APACK_VNNI)
        if (first < float_columns(columns)) return sum_columns(first, round_up(count, LANES), at);
        for (int c = 0; c < count; c += FOURS_COLUMNS) {
            int n = count - c < FOURS_COLUMNS ? count - c : FOURS_COLUMNS, width = round_up(n, GRAIN);
            Word *tile = (Word *)local.tile;
            float middles[FOURS_COLUMNS / LANES];
            unpack_value_fours(values, columns, first + c, width, token, tokens, tile, middles, local.codes);
            Fours fours = {(local.weight_terms[1] - local.weight_terms[0]) / 4, local.weight_scale, middles};
            weigh_fours(local, fours, local.weight_terms[0], BLOCK / 4, M, tile, width, n, (tokens + 3) / 4, Rows{sums + at + c, to.count});
        }
#else
        sum_columns(first, round_up(count, LANES), at);
#endif
    };
    const int floats = float_columns(columns);
    if (&columns == &to) {
        sum(0, floats, 0);
        sum(floats, columns.count - floats, floats);
        return;
    }
    for (int i = 0; i < BANDS; ++i) sum(columns.band[i].column, columns.band[i].count, to.band[i].column);
}

}  // namespace
