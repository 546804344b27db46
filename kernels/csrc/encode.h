// Tokens to codes and token scales (kernels/format.py, `quantize`, is the specification).
#pragma once

#include "codes.h"
#include "products.h"
#include "scratch.h"
#include "segments.h"
#include "team.h"
#include "threads.h"

namespace {

constexpr int COMPONENTS = 64;  // of a piece of a projection
constexpr int CENTERED = 512;   // columns of tokens that a product takes at once, so that a block of them stays in the second-level cache

inline int stored_components(const Source &s) { return round_up(components_of(s), 4); }

// Tokens `[count][W]` less the mean, in place.
inline void center(const Source &s, int64_t basis, float *rows, int64_t count, int64_t W) {
    for (int64_t i = 0; i < count; ++i)
        if (s.basis_dtype == FLOAT32)
            for (int64_t w = 0; w < W; ++w) rows[i * W + w] -= ((const float *)s.mean)[basis * W + w];
        else
            for (int64_t w = 0; w < W; ++w) rows[i * W + w] -= load_element(s.mean, s.basis_dtype, basis * W + w);
}

// Coefficients [begin, begin + n) of centered tokens, to columns of `out` `[count][stored_components]`; `row` holds W floats.
inline void project(const Source &s, int64_t basis, const float *rows, int64_t count, int64_t W, int64_t begin, int n, float *out, float *row) {
    int64_t from = (basis * components_of(s) + begin) * W, width = stored_components(s);
    out += begin;
    if (s.basis_dtype == FLOAT32) {
        for (int64_t w = 0; w < W; w += CENTERED)
            dots(rows + w, W, (int)count, (const float *)s.decoder + from + w, W, n, (int)(W - w < CENTERED ? W - w : CENTERED), out, width, w > 0);
        return;
    }
    for (int c = 0; c < n; ++c) {
        convert_row(row, (const uint16_t *)s.decoder + from + (int64_t)c * W, s.basis_dtype, (int)W);
        for (int64_t i = 0; i < count; ++i) {
            float found[4];
            dots(rows + i * W, W, 1, row, W, 1, (int)W, found, 4, false);
            out[i * width + c] = found[0];
        }
    }
}

inline float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// One token's scale: root mean square of its coefficients over their deviation, rounded to float16.
inline uint16_t token_scale(const Source &s, const Quantizer &q, const float *step, const float *x) {
    double squares = 0;
    for (int band = 0, c = 0; band < BANDS; ++band)
        for (int64_t j = 0; j < s.bands[band]; ++j, ++c) {
            float normalized = x[c] * ((float)q.unit[band] / step[c]);
            squares += (double)normalized * normalized;
        }
    return float_to_half(clamped((float)sqrt(squares / components_of(s)), (float)q.least_scale, (float)q.greatest_half));
}

// Levels `[count]` of BITS bits to units; the last one is filled up with zeros.
template <int BITS>
inline void pack_levels(const float *levels, int count, uint8_t *codes) {
    constexpr int EACH = per_unit(BITS), BYTES = unit_bytes(BITS);
    for (int j = 0; j < count; j += EACH) {
        int unit = 0;
        for (int i = 0; i < EACH && j + i < count; ++i) unit |= (int)levels[j + i] << (BITS * i);
        for (int i = 0; i < BYTES; ++i) codes[j / EACH * BYTES + i] = (uint8_t)(unit >> 8 * i);
    }
}

// One token's coefficients, which become levels on the way, to its codes and, where there is one, its scale.
inline void quantize(const Source &s, const Quantizer &q, int64_t basis, float *x, uint8_t *codes, uint16_t *scale) {
    const float *step = s.step + basis * components_of(s);
    float divisor = 1;
    if (scale) {
        *scale = token_scale(s, q, step, x);
        divisor = half_to_float(*scale);
    }
    for (int band = 0; band < BANDS; ++band) {
        int bits = WIDTHS[band], count = (int)s.bands[band];
        float top = (float)((1 << bits) - 1), half = (float)q.greatest_half;
        for (int j = 0; j < count; ++j) x[j] = x[j] / step[j] / divisor;
        if (is_float(bits)) {
            for (int j = 0; j < count; ++j) x[j] = clamped(x[j], -half, half);
            store_row(codes, FLOAT16, x, count);
        } else {
            // NaN becomes level 0
            for (int j = 0; j < count; ++j) x[j] = x[j] == x[j] ? clamped(nearbyintf(x[j] + top / 2), 0, top) : 0;
            with_width(bits, [&](auto width) { pack_levels<width.bits>(x, count, codes); });
        }
        codes += band_bytes(count, bits);
        x += count;
        step += count;
    }
}

// 0, or 1 where memory ran out.
inline int run_encode(const Encode &e) {
    const Source &s = e.to;
    int r = components_of(s), W = (int)e.width;
    int64_t blocks = (e.tokens + BLOCK - 1) / BLOCK;
    auto lay_out = [&](Arena &arena, float *&rows, float *&coefficients, float *&row) {
        rows = arena.floats((int64_t)BLOCK * W);
        coefficients = arena.floats((int64_t)BLOCK * stored_components(s));
        row = arena.floats(W);
    };
    Arena count = {};
    {
        float *rows, *coefficients, *row;
        lay_out(count, rows, coefficients, row);
    }
    size_t counters = Team::bytes(e.threads);
    char *memory = scratch(counters + count.size * e.threads);
    if (!memory) return 1;
    Team team = {(int)e.threads, (Counter *)memory, {}};
    memset((void *)team.next, 0, counters);
    on_threads(e.threads, [&](int thread) {
        float *rows, *coefficients, *row;
        Arena arena = {memory + counters + count.size * thread, 0};
        lay_out(arena, rows, coefficients, row);
        team.share(0, thread, e.batch * s.groups * blocks, [&](int64_t i) {
            int64_t token = i % blocks * BLOCK, group = i / blocks % s.groups, b = i / blocks / s.groups;
            int64_t basis = basis_at(s, b, group), tokens = e.tokens - token < BLOCK ? e.tokens - token : BLOCK;
            int64_t from = b * e.strides[0] + group * e.strides[1] + token * e.strides[2];
            for (int64_t t = 0; t < tokens; ++t)
                convert_row(rows + t * W, (const char *)e.data + (from + t * e.strides[2]) * element_bytes(e.dtype), e.dtype, W);
            center(s, basis, rows, tokens, W);
            for (int c = 0; c < r; c += COMPONENTS)
                project(s, basis, rows, tokens, W, c, r - c < COMPONENTS ? r - c : COMPONENTS, coefficients, row);
            for (int64_t t = 0; t < tokens; ++t) {
                uint8_t *codes = (uint8_t *)s.data + b * s.batch_stride + group * s.group_stride + (token + t) * s.token_stride;
                uint16_t *scale = s.scale ? (uint16_t *)s.scale + (b * s.groups + group) * e.tokens + token + t : nullptr;
                quantize(s, e.quantizer, basis, coefficients + t * stored_components(s), codes, scale);
            }
        });
    });
    return 0;
}

}  // namespace
