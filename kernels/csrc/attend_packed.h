// Products of packed codes: scores of a block of keys by latents, sums of a block of values by weights.
#pragma once

#include "attend_layout.h"

namespace {

// A group's rows of queries, projected into the key's components; as 16-bit numbers too where levels are multiplied as integers.
struct Latents {
    const float *row, *offset;  // [M][columns], [M]
    const int8_t *terms[2];
    const Scale *scale;         // [M]
    int exact;                  // columns that need the low terms

    Latents from_row(int64_t m, int columns) const {
        return {row + m * columns, offset + m, {terms[0] + m * columns, terms[1] + m * columns}, scale + m, exact};
    }
};

// Columns whose levels are multiplied as floats; the others follow.
inline int float_columns(const Columns &columns) { return INTEGERS ? columns.band[0].columns : columns.count; }

#if defined(APACK_VNNI)
// Leading columns whose low terms are needed, when the squared error of others, from the narrowest band up, may be `allowed` times that
// of a level of one column.
inline int exact_columns(const Columns &columns, float allowed) {
    for (int i = BANDS - 1; i > 0; --i) {
        allowed -= columns.band[i].count * level_variance(columns.band[i].bits);
        if (!(allowed >= 0)) return columns.band[i].column + columns.band[i].columns;
    }
    return columns.band[0].columns;
}

// Whether values in codes shorter than a byte may be multiplied with weights of 8 bits: what rounding these adds, also where one token
// has nearly all of the weight, is then a tenth of what the codes lost.
inline bool takes_bytes(const Source &s, const Columns &columns, int64_t basis) {
    const float *step = s.step + basis * components_of(s);
    float lost = 0, added = 0;
    for (const Band &band : columns.band)
        for (int c = 0; c < band.count && !is_float(band.bits); ++c) {
            const float square = step[band.component + c] * step[band.component + c];
            lost += square * ROUNDING;
            added += band.bits < 8 ? square * level_variance(band.bits) * BLOCK * 2 * ROUNDING / (254 * 254) : 0;
        }
    return added <= MAY_ADD * lost;
}
#endif

inline Latents latents_of(const Work &w, int kind, const float *row, const float *offset, int rows, const Local &local) {
    int exact = 0;
#if defined(APACK_VNNI)
    const Columns &columns = w.key[kind - 1];
    const int floats = float_columns(columns);
    for (int m = 0; m < rows; ++m) {
        Vec most = zero(), squares = zero();
        for (int c = floats; c < columns.count; c += LANES) {
            const Vec x = load(row + (int64_t)m * columns.count + c);
            most = maximum(most, magnitude(x)), squares = fma(x, x, squares);
        }
        const float greatest = largest(most), rounded = 256 / inverse_of(greatest);
        const int needed = exact_columns(columns, MAY_ADD * sum(squares) / (rounded * rounded));
        exact = needed > exact ? needed : exact;
        local.latent_scale[m].factor = greatest;
    }
    for (int m = 0; m < rows; ++m) {
        const int64_t at = (int64_t)m * columns.count;
        const float greatest = local.latent_scale[m].factor, inverse = inverse_of(greatest), factor = greatest / MOST;
        Vec mass = zero();
        for_each_part(columns, floats, columns.count - floats, [&](const Band &band, int, int n, int) {
            int8_t *high = local.latent_terms[0] + at + band.column, *low = local.latent_terms[1] + at + band.column;
            with_width(band.bits, [&](auto width) {
                const Total total = quantize<width.bits>(row + at + band.column, n, inverse, high, low);
                mass = fma(band.column < exact ? total.whole : total.rounded, broadcast(middle_of(width.bits)), mass);
            });
        });
        local.latent_scale[m] = {factor, factor * sum(mass)};
    }
#endif
    return {row, offset, {local.latent_terms[0], local.latent_terms[1]}, local.latent_scale, exact};
}

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
        const int exact = latents.exact < c ? 0 : latents.exact < c + width ? latents.exact - c : width;
        TwoTerms terms = {{latents.scale, c == floats ? ONCE : AGAIN}, (latents.terms[1] - latents.terms[0]) / 4, exact / 4};
        weigh(terms, (const Word *)(latents.terms[0] + c), columns.count / 4, M, tile, BLOCK, round_up(tokens, LANES), width / 4, Rows{local.score, BLOCK});
    }
#endif
}

// sums[m][:] += weights of M rows times a block of values; to: where each band of the columns goes. as_bytes: takes_bytes.
inline void sum_packed(const Packed &values, const Columns &columns, const Columns &to, int M, int token, int tokens, const float *holds, float *sums,
                       bool as_bytes, const Local &local) {
    auto sum_floats = [&](int first, int count, int at) {
        for (int c = 0, tiles = (count + VALUE_COLUMNS - 1) / VALUE_COLUMNS; c < count; --tiles) {
            int width = round_up((count - c + tiles - 1) / tiles, LANES);
            if (width > count - c) width = count - c;
            unpack_tile(values, columns, first + c, width, token, tokens, holds, local.tile, local.codes);
            weigh(local.score, BLOCK, M, local.tile, width, width, tokens, sums + at + c, to.count);
            c += width;
        }
    };
#if defined(APACK_VNNI)
    auto sum_integers = [&](int first, int count, int at, bool one_term) {
        for (int c = 0; c < count; c += FOURS_COLUMNS) {
            int n = count - c < FOURS_COLUMNS ? count - c : FOURS_COLUMNS, width = round_up(n, GRAIN), k = (tokens + 3) / 4;
            Word *tile = (Word *)local.tile;
            float middles[FOURS_COLUMNS / LANES];
            unpack_value_fours(values, columns, first + c, width, token, tokens, tile, middles, local.codes);
            auto sum_terms = [&](const auto &terms, const void *weights) {
                weigh(terms, (const Word *)weights, BLOCK / 4, M, tile, width, n, k, Rows{sums + at + c, to.count});
            };
            if (one_term) sum_terms(OneTerm{{local.byte_scale, middles}}, local.weight_bytes);
            else sum_terms(TwoTerms{{local.weight_scale, middles}, (local.weight_terms[1] - local.weight_terms[0]) / 4, k}, local.weight_terms[0]);
        }
    };
    auto sum = [&](int band, int last, int at) {
        const int first = columns.band[band].column, count = columns.band[last].column + columns.band[last].columns - first;
        if (is_float(columns.band[band].bits)) sum_floats(first, count, at);
        else sum_integers(first, &columns == &to ? count : columns.band[band].count, at, as_bytes && columns.band[band].bits < 8);
    };
    if (&columns == &to && !as_bytes) return sum(0, 0, 0), sum(1, BANDS - 1, to.band[1].column);
    if (&columns == &to) return sum(0, 0, 0), sum(1, 1, to.band[1].column), sum(2, BANDS - 1, to.band[2].column);
    for (int i = 0; i < BANDS; ++i) sum(i, i, to.band[i].column);
#else
    if (&columns == &to) return sum_floats(0, columns.count, 0);
    for (int i = 0; i < BANDS; ++i) sum_floats(columns.band[i].column, round_up(columns.band[i].count, LANES), to.band[i].column);
#endif
}

}  // namespace
