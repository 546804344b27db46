// Queries projected into the components of packed keys.
#pragma once

#include "attend_layout.h"
#include "products.h"

namespace {

constexpr int NEAR_ROWS = 16;

// Rows of one head's queries, scaled, as floats.
inline void load_queries(const Work &w, int64_t b, int64_t head) {
    const Attend &a = *w.a;
    float *out = w.query + (b * a.heads + head) * w.R * a.head_dim;
    for (int i = 0; i < w.R; ++i) {
        int64_t at = b * a.query_strides[0] + (head * w.share + i / a.rows) * a.query_strides[1] + i % a.rows * a.query_strides[2];
        for (int64_t d = 0; d < a.head_dim; ++d) out[i * a.head_dim + d] = load_element(a.query, a.query_dtype, at + d) * (float)a.scale;
    }
}

// Scores are `latent . levels + offset` for queries projected into the key's components: `turns` times the rows of one head.
__attribute__((noinline)) void project_rows(const Work &w, int kind, int64_t b, int64_t head, const float *query, int turns, float *latent,
                                            int64_t latent_step, float *offset, int64_t offset_step, float *tile) {
    const Attend &a = *w.a;
    const Source &s = w.segments[kind].key;
    const Columns &columns = w.key[kind - 1];
    int D = (int)a.head_dim, per_group = heads_per_group(w, kind), r = components_of(s);
    int64_t group = head / per_group, W = per_group * D;
    int64_t at = basis_at(s, b, group), inside = head % per_group * D;
    // whether the latents of all turns follow one another at one distance
    const int64_t between = w.R == 1 ? latent_step : columns.count;
    const bool evenly = turns == 1 || latent_step == w.R * between;
    auto product = [&](const float *rows, int64_t stride, int n, float *out) {
        // a few rows of the decoder serve all turns while they are in the nearest cache
        for (int c = 0; c < n; c += NEAR_ROWS) {
            int now = n - c < NEAR_ROWS ? n - c : NEAR_ROWS;
            if (evenly) {
                dots(query, D, turns * w.R, rows + c * stride, stride, now, D, out + c, between, false);
                continue;
            }
            for (int k = 0; k < turns; ++k)
                dots(query + (int64_t)k * w.R * D, D, w.R, rows + c * stride, stride, now, D, out + k * latent_step + c, columns.count, false);
        }
    };
    const int most = TILE / round_up(D, LANES) & ~3;
    for (const Band &band : columns.band) {
        const float *step = s.step + at * r + band.component;
        for (int c = 0; c < band.count; c += most) {
            int n = band.count - c < most ? band.count - c : most;
            int64_t from = (at * r + band.component + c) * W + inside;
            float *out = latent + band.column + c;
            if (s.basis_dtype == FLOAT32) {
                product((const float *)s.decoder + from, W, n, out);
            } else {
                for (int i = 0; i < n; ++i) convert_row(tile + i * D, (const uint16_t *)s.decoder + from + i * W, s.basis_dtype, D);
                product(tile, D, n, out);
            }
        }
        for (int m = 0; m < turns * w.R; ++m)
            for (int c = 0; c < band.columns; ++c) {
                float *x = latent + m / w.R * latent_step + (int64_t)(m % w.R) * columns.count + band.column + c;
                *x = c < band.count ? *x * step[c] : 0.0f;
            }
    }
    const float *mean = basis_row(s, s.mean, at * W + inside, D, tile);
    for (int m = 0; m < turns * w.R; ++m) {
        Vec sums = zero();
        int d = 0;
        for (; d + LANES <= D; d += LANES) sums = fma(load(query + m * D + d), load(mean + d), sums);
        if (d < D) sums = fma(load_some(query + m * D + d, D - d), load_some(mean + d, D - d), sums);
        offset[m / w.R * offset_step + m % w.R] = sum(sums);
    }
}

inline void project_queries(const Work &w, int kind, int64_t b, int64_t head, float *tile) {
    int64_t row = (b * w.a->heads + head) * w.R;
    float *latent = w.latent[kind - 1] + row * w.key[kind - 1].count;
    project_rows(w, kind, b, head, w.query + row * w.a->head_dim, 1, latent, 0, w.offset[kind - 1] + row, 0, tile);
}

// The same where the decoder is transposed first, its rows times the steps: sums then stay in their lanes.
__attribute__((noinline)) void project_transposed(const Work &w, int kind, int64_t b, int64_t head, const float *query, int turns, float *latent,
                                                  int64_t latent_step, float *offset, int64_t offset_step, float *transposed) {
    const Source &s = w.segments[kind].key;
    const Columns &columns = w.key[kind - 1];
    int D = (int)w.a->head_dim, per_group = heads_per_group(w, kind), r = components_of(s);
    int64_t at = basis_at(s, b, head / per_group), W = (int64_t)per_group * D, inside = head % per_group * D;
    const float *decoder = (const float *)s.decoder, *mean = (const float *)s.mean + at * W + inside;
    for (const Band &band : columns.band)
        for (int c = 0; c < band.columns; c += LANES)
            for (int d = 0; d < D; d += LANES) {
                const float *rows[LANES];
                float step[LANES];
                for (int i = 0; i < LANES; ++i) {
                    int64_t component = at * r + band.component + c + i;
                    bool stored = c + i < band.count;
                    rows[i] = stored ? decoder + component * W + inside + d : nullptr;
                    step[i] = stored ? s.step[component] : 0;
                }
                transpose_square(rows, step, transposed + (int64_t)d * columns.count + band.column + c, columns.count);
            }
    for (int k = 0; k < turns; ++k) {
        const float *rows = query + (int64_t)k * w.R * D;
        float *out = latent + k * latent_step;
        memset(out, 0, (size_t)w.R * columns.count * sizeof *out);
        weigh(rows, D, w.R, transposed, columns.count, columns.count, D, out, columns.count);
        for (int m = 0; m < w.R; ++m) {
            Vec sums = zero();
            for (int d = 0; d < D; d += LANES) sums = fma(load(rows + m * D + d), load(mean + d), sums);
            offset[k * offset_step + m] = sum(sums);
        }
    }
}

// Latents of one head group's queries, turned back to the anchors of blocks [first, first + count) of relative keys.
__attribute__((noinline)) void project_turned(const Work &w, const Item &item, int segment, int64_t first, int count, const Local &local) {
    const Attend &a = *w.a;
    const Turns &turns = a.turns[segment - 1];
    int per_group = heads_per_group(w, segment), M = per_group * w.R, columns = w.key[segment - 1].count;
    int64_t size = w.R * a.head_dim;
    for (int h = 0; h < per_group; ++h) {
        int64_t head = item.group * per_group + h;
        for (int k = 0; k < count; ++k) {
            float *rows = local.turned + k * size;
            memcpy(rows, w.query + (item.b * a.heads + head) * size, size * sizeof(float));
            const float *turn = turn_of(turns, item.b, (first + k) * turns.block);
            for (int i = 0; i < w.R; ++i) turn_back(rows + i * a.head_dim, turn, turns.pairs);
        }
        bool transposes = w.transposes[segment - 1];
        auto project = transposes ? project_transposed : project_rows;
        project(w, segment, item.b, head, local.turned, count, local.latent + (int64_t)h * w.R * columns, (int64_t)M * columns,
                local.offset + h * w.R, M, transposes ? local.transposed : local.tile);
    }
}

}  // namespace
