// Queries projected into the components of packed keys.
#pragma once

#include "attend_layout.h"
#include "products.h"

namespace {

// Rows of one head's queries, scaled, as floats.
inline void load_queries(const Work &w, int64_t b, int64_t head) {
    const Attend &a = *w.a;
    float *out = queries_of(w, b, head);
    for (int i = 0; i < w.R; ++i) {
        int64_t at = b * a.query_strides[0] + (head * w.share + i / a.rows) * a.query_strides[1] + i % a.rows * a.query_strides[2];
        float *row = out + i * a.head_dim;
        convert_row(row, (const char *)a.query + at * element_bytes(a.query_dtype), a.query_dtype, (int)a.head_dim);
        for (int64_t d = 0; d < a.head_dim; ++d) row[d] *= (float)a.scale;
    }
}

// Components of a head that are the same in all rotated queries, and those that are not.
struct Rotating {
    Ranges still, moving;
};

// Which pairs rotate otherwise in one of the blocks [first, first + count) than in the one before it: a coordinate that stands still rotates none.
inline Rotating rotating_of(const Rotations &rotations, int64_t b, int64_t first, int count, int D) {
    int P = (int)rotations.pairs, low = P, high = 0;
    for (int k = 1; k < count; ++k) {
        const float *before = rotation_of(rotations, b, (first + k - 1) * rotations.block), *rotation = rotation_of(rotations, b, (first + k) * rotations.block);
        for (int i = 0; i < low; ++i)
            if (rotation[i] != before[i] || rotation[P + i] != before[P + i]) low = i;
        for (int i = P - 1; i >= high; --i)
            if (rotation[i] != before[i] || rotation[P + i] != before[P + i]) high = i + 1;
    }
    low &= ~1, high += high < P ? high & 1 : 0;  // pairs of numbers stay together
    Rotating found = {};
    if (low >= high) {
        add_range(found.still, 0, D);
        return found;
    }
    add_range(found.moving, low, high);
    add_range(found.moving, P + low, P + high);
    add_range(found.still, 0, low);
    add_range(found.still, high, P + low);
    add_range(found.still, P + high, D);
    return found;
}

// Latents of a band times its steps; zeros in the columns that hold none.
inline void scale_band(float *latent, const float *step, const Band &band) {
    for (int c = 0; c < band.columns; ++c) latent[c] = c < band.count ? latent[c] * step[c] : 0.0f;
}

// offset[m] = the score of the mean for rows `[n][D]`.
inline void mean_scores(const float *rows, int n, int D, const float *mean, float *offset) {
    for (int m = 0; m < n; ++m) {
        Vec sums = zero();
        int d = 0;
        for (; d + LANES <= D; d += LANES) sums = fma(load(rows + m * D + d), load(mean + d), sums);
        if (d < D) sums = fma(load_some(rows + m * D + d, D - d), load_some(mean + d, D - d), sums);
        offset[m] = sum(sums);
    }
}

// Scores are `latent . levels + offset` for queries projected into the key's components: the rows of one head.
__attribute__((noinline)) void project_queries(const Work &w, int kind, int64_t b, int64_t head, float *tile) {
    const Attend &a = *w.a;
    const Source &s = w.segments[kind].key;
    const Columns &columns = w.key[kind - 1];
    int D = (int)a.head_dim, per_group = heads_per_group(w, kind), r = components_of(s);
    int64_t group = head / per_group, W = per_group * D, row = row_of_all(w, kind, b, head);
    int64_t at = basis_at(s, b, group), inside = head % per_group * D;
    const float *query = queries_of(w, b, head);
    float *latent = w.latent[kind - 1] + row * columns.count, *offset = w.offset[kind - 1] + row;
    const int most = TILE / round_up(D, LANES) & ~3;
    for (const Band &band : columns.band) {
        const float *step = s.step + at * r + band.component;
        for (int c = 0; c < band.count; c += most) {
            int n = band.count - c < most ? band.count - c : most;
            int64_t from = (at * r + band.component + c) * W + inside;
            const FloatRows rows = float_rows(s.decoder, s.basis_dtype, from, W, n, D, tile);
            dots(query, D, w.R, rows.row, rows.stride, n, D, latent + band.column + c, columns.count, false);
        }
        for (int m = 0; m < w.R; ++m) scale_band(latent + (int64_t)m * columns.count + band.column, step, band);
    }
    mean_scores(query, w.R, D, basis_row(s, s.mean, at * W + inside, D, tile), offset);
}

// Latents of one head group's rotated queries, `[rotations][M][columns]`: each row of the decoder is read once, for all heads.
__attribute__((noinline)) void project_rotated_rows(const Work &w, const Item &item, int segment, int rotations, const Rotating &over, const Local &local) {
    const Source &s = w.segments[segment].key;
    const Columns &columns = w.key[segment - 1];
    int D = (int)w.a->head_dim, per_group = heads_per_group(w, segment), R = item.rows, M = per_group * R, r = components_of(s);
    int64_t W = (int64_t)per_group * D, basis = basis_at(s, item.b, item.group), step = (int64_t)M * columns.count;
    for (const Band &band : columns.band) {
        for (int c = 0; c < band.count; c += 4) {
            int n = band.count - c < 4 ? band.count - c : 4;
            for (int h = 0; h < per_group; ++h) {
                int64_t from = (basis * r + band.component + c) * W + h * D, bytes = element_bytes(s.basis_dtype);
                for (int i = AHEAD; i < AHEAD + 4 && c + i < band.count; ++i) prefetch((const char *)s.decoder + (from + i * W) * bytes, D * bytes);
                const FloatRows rows = float_rows(s.decoder, s.basis_dtype, from, W, n, D, local.tile);
                const float *queries = local.rotated + (int64_t)h * rotations * R * D, *at[4];
                four_rows(rows.row, rows.stride, n, 0, at);
                float *latent = local.latent + (int64_t)h * R * columns.count + band.column + c;
                auto place = [&](int m) { return latent + m / R * step + (int64_t)(m % R) * columns.count; };
                const bool still = over.still.count;
                if (still) dot_rows(queries, D, R, at, over.still, false, place);
                for (int m = R; still && m < rotations * R; ++m) memcpy(place(m), place(m % R), 4 * sizeof(float));
                dot_rows(queries, D, rotations * R, at, over.moving, still, place);
            }
        }
        for (int m = 0; m < rotations * M; ++m)
            scale_band(local.latent + (int64_t)m * columns.count + band.column, s.step + basis * r + band.component, band);
    }
}

// A head's part of a decoder, transposed, rows times the steps; all parts of the tokens read it.
template <typename Kind>
__attribute__((noinline)) void transpose_decoder(const Work &w, int kind, int64_t basis, int64_t head) {
    const Source &s = w.segments[kind].key;
    const Columns &columns = w.key[kind - 1];
    constexpr int WIDE = LANES * Kind::EACH;
    int D = (int)w.a->head_dim, per_group = heads_per_group(w, kind), r = components_of(s);
    int64_t at = basis * s.groups + head / per_group, W = (int64_t)per_group * D, inside = head % per_group * D;
    float *out = w.transposed[kind - 1] + (basis * w.a->heads + head) * D * columns.count;
    for (const Band &band : columns.band)
        for (int c = 0; c < band.columns; c += LANES)
            for (int d = 0; d < D; d += WIDE) {
                Vec x[LANES];
                float buffer[WIDE];
                for (int i = 0; i < LANES; ++i) {
                    int64_t component = at * r + band.component + c + i;
                    bool stored = c + i < band.count;
                    if (c + i + LANES < band.count && s.basis_dtype == FLOAT32)
                        prefetch((const float *)s.decoder + (component + LANES) * W + inside + d, WIDE * sizeof(float));
                    x[i] = stored ? Kind::numbers(basis_row(s, s.decoder, component * W + inside + d, WIDE, buffer), broadcast(s.step[component])) : zero();
                }
                transpose_square(x, out + (int64_t)(d / Kind::EACH) * columns.count + band.column + c, columns.count);
            }
}

// The same by transposed decoders: sums then stay in their lanes.
template <typename Kind>
__attribute__((noinline)) void project_transposed(const Work &w, const Item &item, int segment, int rotations, const Rotating &over, const Local &local) {
    typedef const typename Kind::Number *Numbers;
    const int columns = w.key[segment - 1].count, D = (int)w.a->head_dim, per_group = heads_per_group(w, segment), R = item.rows;
    const int64_t rotation_step = (int64_t)per_group * R * columns, basis = w.segments[segment].key.basis_batch == 1 ? 0 : item.b;
    const size_t size = (size_t)R * columns * sizeof(float);
    for (int h = 0; h < per_group; ++h) {
        Numbers query = (Numbers)(local.rotated + (int64_t)h * rotations * R * D);
        Numbers decoder = (Numbers)(w.transposed[segment - 1] + (basis * w.a->heads + item.group * per_group + h) * D * columns);
        float *latent = local.latent + (int64_t)h * R * columns;
        auto place = [=](int m) { return latent + m / R * rotation_step + m % R * (int64_t)columns; };
#if defined(APACK_MATRIX)
        if constexpr (Kind::EACH == 2)
            if (local.matrices) {
                weigh_matrices(*local.matrices, Kind{}, query, D, rotations * R, decoder, columns, columns, D / 2, place);
                continue;
            }
#endif
        auto add = [&](int rows, const Ranges &ranges) {
            for (int i = 0; i < ranges.count; ++i) {
                int begin = ranges.part[i].begin / Kind::EACH, count = ranges.part[i].end / Kind::EACH - begin;
                weigh(Kind{}, query + begin, D, rows, decoder + (int64_t)begin * columns, columns, columns, count, place);
            }
        };
        memset(latent, 0, size);
        add(R, over.still);
        for (int k = 1; k < rotations; ++k) memcpy(latent + k * rotation_step, latent, size);
        add(rotations * R, over.moving);
    }
}

// Latents of one head group's queries, rotated back to the anchors of blocks [first, first + count) of relative keys.
__attribute__((noinline)) void project_rotated(const Work &w, const Item &item, int segment, int64_t first, int count, const Local &local) {
    const Attend &a = *w.a;
    const Source &s = w.segments[segment].key;
    const Rotations &rotations = a.rotations[segment - 1];
    int D = (int)a.head_dim, per_group = heads_per_group(w, segment), R = item.rows, M = per_group * R;
    int64_t size = R * a.head_dim, at = basis_at(s, item.b, item.group);
    for (int h = 0; h < per_group; ++h) {
        const float *query = queries_of(w, item.b, item.group * per_group + h);
        const float *mean = basis_row(s, s.mean, (at * per_group + h) * D, D, local.tile);
        for (int k = 0; k < count; ++k) {
            float *rows = local.rotated + ((int64_t)h * count + k) * size;
            memcpy(rows, query, size * sizeof(float));
            const float *rotation = rotation_of(rotations, item.b, (first + k) * rotations.block);
            for (int i = 0; i < R; ++i) rotate_back(rows + i * D, rotation, rotations.pairs);
            mean_scores(rows, R, D, mean, local.offset + k * M + h * R);
#if defined(APACK_BFLOAT16)
            // in place: what is written was read
            for (int64_t d = 0; w.pairs[segment - 1] && d < size; d += 2 * LANES) store(rows + d / D * D + d % D / 2, Pairs::numbers(rows + d, broadcast(1.0f)));
#endif
        }
    }
    const Rotating over = rotating_of(rotations, item.b, first, count, D);
    auto project = w.transposes[segment - 1] ? project_transposed<Floats> : project_rotated_rows;
#if defined(APACK_BFLOAT16)
    if (w.pairs[segment - 1]) project = project_transposed<Pairs>;
#endif
    project(w, item, segment, count, over, local);
}

}  // namespace
