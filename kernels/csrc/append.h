// `apack::append`: new tokens into the tail ring, those that it pushes out encoded (kernels/append/reference.py is the specification).
#pragma once

#include "encode.h"

namespace {

constexpr int64_t WORTH_THREADS = 1 << 18;  // products

struct Leaving {
    const Append *a;
    int64_t first, count;    // positions that are pushed out
    float *centered[2];      // [B][G][count][W_g]
    float *coefficients[2];  // [B][G][count][r, rounded up to fours]
};

inline const void *row_of(const void *data, int64_t dtype, const int64_t strides[3], int64_t b, int64_t head, int64_t token) {
    return (const char *)data + (b * strides[0] + head * strides[1] + token * strides[2]) * element_bytes(dtype);
}

// A leaving token of one head, as floats.
inline void load_leaving(const Append &a, const Side &side, int64_t b, int64_t head, int64_t position, float *out) {
    int64_t held = a.cursor[0];
    const void *row = position < held
        ? row_of(side.tail, side.tail_dtype, side.tail_strides, b, head, position % a.tail_slots)
        : row_of(side.fresh, side.dtype, side.strides, b, head, position - held);
    convert_row(out, row, position < held ? side.tail_dtype : side.dtype, (int)side.width);
}

// Tokens of one head group less the mean; tokens kept as they are go straight to their slots.
inline void center(const Leaving &l, int stream, int64_t b, int64_t group) {
    const Append &a = *l.a;
    const Side &side = a.sides[stream];
    const Source &s = side.packed;
    int64_t per_group = a.heads / s.groups, W = per_group * side.width;
    float *rows = l.centered[stream] + (b * s.groups + group) * l.count * W;
    for (int64_t i = 0; i < l.count; ++i)
        for (int64_t h = 0; h < per_group; ++h) {
            float *row = rows + i * W + h * side.width;
            load_leaving(a, side, b, group * per_group + h, l.first + i, row);
            if (stream == 0 && a.rotations.data) rotate_back(row, rotation_of(a.rotations, b, l.first + i - a.cursor[2]), a.rotations.pairs);
        }
    if (!is_packed(s)) {
        for (int64_t i = 0; i < l.count; ++i) {
            int64_t to = b * s.batch_stride + group * s.group_stride + (l.first + i - a.cursor[2]) * s.token_stride;
            for (int64_t w = 0; w < W; ++w) store_element((void *)s.data, s.dtype, to + w, rows[i * W + w]);
        }
        return;
    }
    center(s, basis_at(s, b, group), rows, l.count, W);
}

// Coefficients [begin, begin + COMPONENTS) of one head group's tokens.
inline void project(const Leaving &l, int stream, int64_t b, int64_t group, int64_t begin, float *row) {
    const Source &s = l.a->sides[stream].packed;
    int r = components_of(s);
    int64_t at = b * s.groups + group, W = l.a->heads / s.groups * l.a->sides[stream].width;
    project(s, basis_at(s, b, group), l.centered[stream] + at * l.count * W, l.count, W, begin, (int)(r - begin < COMPONENTS ? r - begin : COMPONENTS),
            l.coefficients[stream] + at * l.count * stored_components(s), row);
}

// Coefficients of one head group's tokens to codes and token scales, in their slots.
inline void quantize(const Leaving &l, int stream, int64_t b, int64_t group) {
    const Append &a = *l.a;
    const Source &s = a.sides[stream].packed;
    int64_t at = b * s.groups + group;
    for (int64_t i = 0; i < l.count; ++i) {
        int64_t slot = l.first + i - a.cursor[2];
        uint8_t *codes = (uint8_t *)s.data + b * s.batch_stride + group * s.group_stride + slot * s.token_stride;
        uint16_t *scale = s.scale && components_of(s) ? (uint16_t *)s.scale + at * a.capacity + slot : nullptr;
        quantize(s, a.quantizer, basis_at(s, b, group), l.coefficients[stream] + (at * l.count + i) * stored_components(s), codes, scale);
    }
}

inline void write_tail(const Append &a, const Side &side, int64_t kept) {
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t h = 0; h < a.heads; ++h)
            for (int64_t i = a.new_tokens - kept; i < a.new_tokens; ++i) {
                const void *from = row_of(side.fresh, side.dtype, side.strides, b, h, i);
                void *to = (void *)row_of(side.tail, side.tail_dtype, side.tail_strides, b, h, (a.cursor[0] + i) % a.tail_slots);
                if (side.dtype == side.tail_dtype) memcpy(to, from, side.width * element_bytes(side.dtype));
                else for (int64_t d = 0; d < side.width; ++d) store_element(to, side.tail_dtype, d, load_element(from, side.dtype, d));
            }
}

// 0; 1 where memory ran out, 2 where there is no free slot: then nothing has changed.
inline int run_append(const Append &a) {
    int64_t held = a.cursor[0], start = a.cursor[1], pushed = held + a.new_tokens - a.tail_slots;
    Leaving l = {&a, start, pushed > start ? pushed - start : 0, {}, {}};
    if (l.count && pushed - 1 - a.cursor[2] >= a.capacity) return 2;
    if (l.count && a.capacity) {
        int64_t products = 0, widest = 0, sizes[2][2];
        for (int i = 0; i < 2; ++i) {
            const Source &s = a.sides[i].packed;
            int64_t W = a.heads / s.groups * a.sides[i].width, r = is_packed(s) ? components_of(s) : 0;
            sizes[i][0] = a.batch * s.groups * l.count * round_up(W, LANES);
            sizes[i][1] = is_packed(s) ? a.batch * s.groups * l.count * stored_components(s) : 0;
            products += a.batch * s.groups * l.count * W * r;
            widest = W > widest ? W : widest;
        }
        int threads = products > WORTH_THREADS ? (int)a.threads : 1;
        int64_t rows = Team::bytes(threads) / sizeof(float) + sizes[0][0] + sizes[0][1] + sizes[1][0] + sizes[1][1], each = round_up(widest, LANES);
        float *memory = (float *)scratch((size_t)round_up((rows + each * threads) * (int64_t)sizeof(float), 64));
        if (!memory) return 1;
        float *at = memory + each * threads + Team::bytes(threads) / sizeof(float);
        for (int i = 0; i < 2; ++i) {
            l.centered[i] = at;
            l.coefficients[i] = at + sizes[i][0];
            at += sizes[i][0] + sizes[i][1];
        }
        Team team = {threads, (Counter *)memory, {}};
        memset((void *)team.next, 0, Team::bytes(threads));
        on_threads(threads, [&](int thread) {
            float *row = memory + Team::bytes(threads) / sizeof(float) + each * thread;
            for (int i = 0; i < 2; ++i) {
                const Source &s = a.sides[i].packed;
                int64_t groups = a.batch * s.groups, pieces = is_packed(s) ? (components_of(s) + COMPONENTS - 1) / COMPONENTS : 0;
                team.share(3 * i, thread, groups, [&](int64_t g) { center(l, i, g / s.groups, g % s.groups); });
                team.share(3 * i + 1, thread, groups * pieces, [&](int64_t j) {
                    project(l, i, j / pieces / s.groups, j / pieces % s.groups, j % pieces * COMPONENTS, row);
                });
                team.share(3 * i + 2, thread, pieces ? groups : 0, [&](int64_t g) { quantize(l, i, g / s.groups, g % s.groups); });
            }
        });
    }
    int64_t kept = a.new_tokens < a.tail_slots ? a.new_tokens : a.tail_slots;
    for (int i = 0; i < 2; ++i) write_tail(a, a.sides[i], kept);
    if (l.count) a.cursor[1] = pushed;
    a.cursor[0] = held + a.new_tokens;
    return 0;
}

}  // namespace
