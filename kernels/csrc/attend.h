// `apack::attend` and `apack::attend_tiers` in one pass over the codes (kernels/attend/reference.py is the specification).
//
// Queries are projected into each packed stream's components once. Then, for blocks of tokens that stay in the first-level cache:
// codes to floats, scores of all query heads of a head group, online softmax, weights times components. Parts of the token range
// run in parallel and merge by their maxima; only then are the sums decoded.
#pragma once

#include <stdlib.h>

#include "arguments.h"
#include "vector.h"

namespace {

constexpr int BLOCK = 64;            // tokens whose scores are held at once
constexpr int TILE = 8192;           // floats of unpacked codes held at once: 32 KiB
constexpr int KEY_COLUMNS = 512;     // columns of a tile of keys
constexpr int VALUE_COLUMNS = 128;   // of values
constexpr int MIN_PART = 256;        // tokens that are worth a part of their own

// Where the components of a band lie in a tile: whole vectors of columns.
struct Band {
    int bits, count, columns, column, component;
    int64_t byte;
};

struct Columns {
    Band band[4];
    int count;
    int64_t bytes;
};

inline Columns columns_of(const Source &s, int64_t components) {
    static const int widths[4] = {16, 8, 4, 2};
    Columns c = {};
    int component = 0;
    int64_t byte = 0;
    for (int i = 0; i < 4; ++i) {
        int stored = (int)s.bands[i];
        int count = (int)(component + stored <= components ? stored : components > component ? components - component : 0);
        c.band[i] = Band{widths[i], count, round_up(count, LANES), c.count, component, byte};
        c.count += c.band[i].columns;
        component += stored;
        byte += ((int64_t)stored * widths[i] + 7) / 8;
    }
    c.bytes = byte;
    return c;
}

inline int components_of(const Source &s) { return (int)(s.bands[0] + s.bands[1] + s.bands[2] + s.bands[3]); }

inline bool is_packed(const Source &s) { return s.dtype == UINT8; }

// A dense source's row of one token and head; `width` values a head.
inline const void *dense_row(const Source &s, int64_t b, int64_t head, int64_t token, int64_t per_group, int64_t width) {
    int64_t at = b * s.batch_stride + head / per_group * s.group_stride + token * s.token_stride + head % per_group * width;
    return (const char *)s.data + at * (s.dtype == FLOAT32 ? 4 : 2);
}

// Part of one head group's tokens in one segment (or in all dense ones, where `segment` is FIRST).
struct Item {
    int segment, b, group, begin, end;
    float *top, *total, *sums;  // [M], [M], [M][width]
};

struct Plan {
    const Attend *a;
    int share, R, per_head_newest;            // query heads of a KV head, their rows, and how many of these are the newest token
    int used[5];                              // slots that any sequence reads, by segment
    Columns key[2], value[2], partial[2];     // of vision and text
    int width[3];                             // columns of an item's sums: dense, vision, text
    float *query;                             // [B][H][R][D], scaled
    float *latent[2], *offset[2];             // [B][H][R][columns], [B][H][R]
    float *top, *inverse;                     // [B][H][R]
    float *newest[2];                         // [B][H][per_head_newest][slots], scores of the newest token
    Item *items;
    int item_count, first_item[3], parts[3];  // of dense, vision, text
};

struct Scratch {
    float tile[TILE + LANES], score[1];
};

inline int kind_of(int segment) { return segment == VISION ? 1 : segment == TEXT ? 2 : 0; }

inline int heads_per_group(const Attend &a, int kind) { return kind == 0 ? 1 : (int)(a.heads / a.segments[kind].key.groups); }

inline int64_t end_of_packed(const Attend &a) {
    int64_t before = a.cursor[0] - a.new_tokens;
    return a.cursor[1] < before ? a.cursor[1] : before;
}

// Position of a slot, or -1 where it holds no token that is read.
inline int64_t position_of(const Attend &a, int segment, int64_t b, int64_t slot) {
    int64_t before = a.cursor[0] - a.new_tokens;
    if (segment == NEW) return before + slot;
    const Segment &s = a.segments[segment];
    if (segment == TAIL) {
        int64_t offset = (slot - a.cursor[1]) % s.slots, p = a.cursor[1] + (offset < 0 ? offset + s.slots : offset);
        return p < before ? p : -1;
    }
    if (segment == VISION && a.tiers && slot >= a.tiers[2 * b + 1]) return -1;
    int64_t p = s.positions[b * s.slots + slot];
    return p < end_of_packed(a) ? p : -1;
}

inline int used_slots(const Attend &a, int segment) {
    int64_t n = a.segments[segment].slots;
    if (segment == TAIL || segment == NEW) return (int)n;
    int64_t used = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
        int64_t last = n;
        if (segment == VISION && a.tiers && a.tiers[2 * b + 1] < last) last = a.tiers[2 * b + 1];
        while (last > used && position_of(a, segment, b, last - 1) < 0) --last;
        if (last > used) used = last;
    }
    return (int)used;
}

struct Arena {
    char *at;
    size_t size;
    void *take(size_t bytes) {
        void *p = at ? at + size : nullptr;
        size += (bytes + 63) / 64 * 64;
        return p;
    }
    float *floats(int64_t n) { return (float *)take((size_t)n * sizeof(float)); }
};

// Lays out all scratch memory; with a null arena only its size is counted.
inline void lay_out(Plan &p, Arena &arena) {
    const Attend &a = *p.a;
    int64_t rows = a.batch * a.heads * p.R;
    p.query = arena.floats(rows * a.head_dim);
    for (int i = 0; i < 2; ++i) {
        const Source &key = a.segments[VISION + i].key;
        bool reads = p.used[VISION + i] && is_packed(key);
        p.latent[i] = arena.floats(reads ? rows * p.key[i].count : 0);
        p.offset[i] = arena.floats(reads ? rows : 0);
        p.newest[i] = arena.floats(
            a.segments[VISION + i].importance ? a.batch * a.heads * p.per_head_newest * p.used[VISION + i] : 0);
    }
    p.top = arena.floats(rows);
    p.inverse = arena.floats(rows);
    p.items = (Item *)arena.take(p.item_count * sizeof(Item));
    int at = 0;
    for (int kind = 0; kind < 3; ++kind) {
        p.first_item[kind] = at;
        int per_group = heads_per_group(a, kind), groups = (int)a.heads / per_group, M = per_group * p.R;
        for (int b = 0; b < a.batch; ++b)
            for (int g = 0; g < groups; ++g)
                for (int i = 0; i < p.parts[kind]; ++i, ++at) {
                    float *floats = arena.floats(2 * M + (int64_t)M * p.width[kind]);
                    if (!arena.at) continue;
                    int64_t used = p.used[kind];
                    int begin = round_up(used * i / p.parts[kind], BLOCK), end = round_up(used * (i + 1) / p.parts[kind], BLOCK);
                    p.items[at] = Item{kind, b, g, begin, end < used ? end : (int)used, floats, floats + M, floats + 2 * M};
                }
    }
}

inline Plan plan_of(const Attend &a) {
    Plan p = {};
    p.a = &a;
    p.share = (int)(a.query_heads / a.heads);
    p.R = (int)(p.share * a.rows);
    p.per_head_newest = a.new_tokens ? p.R / (int)a.new_tokens : 0;
    for (int i = 0; i < 5; ++i) p.used[i] = a.segments[i].slots ? used_slots(a, i) : 0;
    p.width[0] = (int)a.value_dim;
    p.parts[0] = 1;
    for (int i = 0; i < 2; ++i) {
        const Segment &s = a.segments[VISION + i];
        int groups = s.slots ? (int)s.key.groups : 1;
        if (s.slots) {
            p.key[i] = columns_of(s.key, components_of(s.key));
            p.value[i] = columns_of(s.value, components_of(s.value));
            p.partial[i] = columns_of(s.value, i == 0 && a.tiers ? a.partial : components_of(s.value));
        }
        p.width[1 + i] = is_packed(s.value) ? p.value[i].count : heads_per_group(a, 1 + i) ? (int)a.value_dim : 0;
        int wanted = (int)(a.threads == 1 ? 1 : (4 * a.threads + a.batch * groups - 1) / (a.batch * groups));
        int most = (p.used[VISION + i] + MIN_PART - 1) / MIN_PART;
        p.parts[1 + i] = wanted < most ? wanted : most;
    }
    for (int kind = 0; kind < 3; ++kind)
        p.item_count += (int)(a.batch * (a.heads / heads_per_group(a, kind)) * p.parts[kind]);
    return p;
}

// Rows of one head's queries, scaled, as floats.
inline void load_queries(const Plan &p, int64_t b, int64_t head) {
    const Attend &a = *p.a;
    float *out = p.query + (b * a.heads + head) * p.R * a.head_dim;
    for (int i = 0; i < p.R; ++i) {
        int64_t at = b * a.query_strides[0] + (head * p.share + i / a.rows) * a.query_strides[1] + i % a.rows * a.query_strides[2];
        for (int64_t d = 0; d < a.head_dim; ++d) out[i * a.head_dim + d] = load_element(a.query, a.query_dtype, at + d) * (float)a.scale;
    }
}

// A basis row of one head as floats: `row` of the decoder, or the mean.
inline const float *basis_row(const Source &s, const void *data, int64_t at, int n, float *buffer) {
    if (s.basis_dtype == FLOAT32) return (const float *)data + at;
    convert_row(buffer, (const uint16_t *)data + at, s.basis_dtype, n);
    return buffer;
}

// Scores are `latent . levels + offset` for queries projected into the key's components.
inline void project_queries(const Plan &p, int kind, int64_t b, int64_t head, float *tile) {
    const Attend &a = *p.a;
    const Source &s = a.segments[kind].key;
    const Columns &columns = p.key[kind - 1];
    int D = (int)a.head_dim, per_group = heads_per_group(a, kind), r = components_of(s);
    int64_t group = head / per_group, W = per_group * D, row = b * a.heads + head;
    int64_t at = (s.basis_batch == 1 ? 0 : b) * s.groups + group, inside = head % per_group * D;
    const float *query = p.query + row * p.R * D;
    float *latent = p.latent[kind - 1] + row * p.R * columns.count;
    const int most = TILE / round_up(D, LANES) & ~3;
    for (const Band &band : columns.band) {
        const float *step = s.step + at * r + band.component;
        for (int c = 0; c < band.count; c += most) {
            int n = band.count - c < most ? band.count - c : most;
            int64_t from = (at * r + band.component + c) * W + inside;
            float *out = latent + band.column + c;
            if (s.basis_dtype == FLOAT32) {
                dots(query, D, p.R, (const float *)s.decoder + from, W, n, D, out, columns.count, false);
            } else {
                for (int i = 0; i < n; ++i) convert_row(tile + i * D, (const uint16_t *)s.decoder + from + i * W, s.basis_dtype, D);
                dots(query, D, p.R, tile, D, n, D, out, columns.count, false);
            }
        }
        for (int m = 0; m < p.R; ++m)
            for (int c = 0; c < band.columns; ++c) {
                float *x = latent + (int64_t)m * columns.count + band.column + c;
                *x = c < band.count ? *x * step[c] : 0.0f;
            }
    }
    const float *mean = basis_row(s, s.mean, at * W + inside, D, tile);
    for (int m = 0; m < p.R; ++m) {
        float offset = 0;
        for (int d = 0; d < D; ++d) offset += query[m * D + d] * mean[d];
        p.offset[kind - 1][row * p.R + m] = offset;
    }
}

// Tokens of a packed stream as floats, columns [first, first + count): tile[token][column].
struct Packed {
    const uint8_t *base, *last;  // the group's first code, and the last address where a row may be read with a vector to spare
    int64_t stride, bytes;
    const uint16_t *scale;
};

inline Packed packed_of(const Attend &a, const Source &s, int64_t b, int64_t group, int64_t slots, int64_t bytes) {
    const uint8_t *data = (const uint8_t *)s.data;
    const uint8_t *end = data + (a.batch - 1) * s.batch_stride + (s.groups - 1) * s.group_stride + (slots - 1) * s.token_stride + bytes;
    return Packed{data + b * s.batch_stride + group * s.group_stride, end - bytes - 16, s.token_stride, bytes,
                  s.scale ? s.scale + (b * s.groups + group) * slots : nullptr};
}

inline void unpack_tile(const Packed &s, const Columns &columns, int first, int count, int token, int tokens, const float *holds,
                        float *tile, uint8_t *row_copy) {
    for (int t = 0; t < tokens; ++t, tile += count) {
        if (holds && holds[t] <= 0) {
            memset(tile, 0, count * sizeof *tile);
            continue;
        }
        const uint8_t *row = s.base + (token + t) * s.stride;
        if (row > s.last) {
            memcpy(row_copy, row, s.bytes);
            row = row_copy;
        }
        for (const Band &band : columns.band) {
            int low = first > band.column ? first : band.column, end = band.column + band.columns;
            int n = (first + count < end ? first + count : end) - low;
            if (n <= 0) continue;
            float *out = tile + low - first;
            const uint8_t *codes = row + band.byte;
            int from = low - band.column;
            switch (band.bits) {
                case 16: unpack_band<16>(out, codes, from, n, band.count); break;
                case 8: unpack_band<8>(out, codes, from, n, band.count); break;
                case 4: unpack_band<4>(out, codes, from, n, band.count); break;
                case 2: unpack_band<2>(out, codes, from, n, band.count); break;
            }
            for (int c = band.count - from; c < n; ++c) out[c] = 0;
        }
    }
}

struct Local {
    float *tile, *score;      // [TILE], [M][BLOCK]
    uint8_t *row;             // one token's codes and a vector
};

// Scores of one block against keys.
inline void score_block(const Plan &p, const Item &item, int segment, int token, int tokens, const Local &local) {
    const Attend &a = *p.a;
    const Segment &s = a.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(a, kind), M = per_group * p.R, D = (int)a.head_dim;
    int64_t first_head = (int64_t)item.b * a.heads + item.group * per_group;
    if (is_packed(s.key)) {
        const Columns &columns = p.key[kind - 1];
        Packed packed = packed_of(a, s.key, item.b, item.group, s.slots, columns.bytes);
        const float *latent = p.latent[kind - 1] + first_head * p.R * columns.count;
        int wide = columns.count < KEY_COLUMNS ? columns.count : KEY_COLUMNS;
        int step = wide ? (TILE / wide & ~3) : BLOCK;
        if (step > BLOCK) step = BLOCK;
        if (!wide) memset(local.score, 0, (size_t)M * BLOCK * sizeof(float));
        for (int t = 0; t < tokens; t += step) {
            int n = tokens - t < step ? tokens - t : step;
            for (int c = 0; c < columns.count; c += wide) {
                int width = columns.count - c < wide ? columns.count - c : wide;
                unpack_tile(packed, columns, c, width, token + t, n, nullptr, local.tile, local.row);
                dots(latent + c, columns.count, M, local.tile, width, n, width, local.score + t, BLOCK, c > 0);
            }
        }
        return;
    }
    for (int h = 0; h < per_group; ++h) {
        const float *query = p.query + (first_head + h) * p.R * D;
        float *score = local.score + (int64_t)h * p.R * BLOCK;
        int head = item.group * per_group + h, source_heads = (int)(a.heads / s.key.groups), step = TILE / D & ~3;
        if (s.key.dtype == FLOAT32) {
            const float *row = (const float *)dense_row(s.key, item.b, head, token, source_heads, D);
            dots(query, D, p.R, row, s.key.token_stride, tokens, D, score, BLOCK, false);
            continue;
        }
        for (int t = 0; t < tokens; t += step) {
            int n = tokens - t < step ? tokens - t : step;
            for (int i = 0; i < n; ++i)
                convert_row(local.tile + i * D, dense_row(s.key, item.b, head, token + t + i, source_heads, D), s.key.dtype, D);
            dots(query, D, p.R, local.tile, D, n, D, score + t, BLOCK, false);
        }
    }
}

// What all heads of a block share: whether a slot is read, what is added to its score, the scales of its key and value.
struct Slots {
    float holds[BLOCK], added[BLOCK], key_scale[BLOCK], value_scale[BLOCK];
    int64_t position[BLOCK];
    bool any, all;
};

inline float mask_at(const Attend &a, int64_t b, int64_t head, int64_t row, int64_t position, bool &hidden) {
    int64_t column = position < a.mask_length ? position : a.mask_length - 1;
    int64_t at = b * a.mask_strides[0] + head * a.mask_strides[1] + row * a.mask_strides[2] + column;
    if (a.mask_is_bool) {
        hidden = !((const uint8_t *)a.mask)[at];
        return 0;
    }
    hidden = false;
    return ((const float *)a.mask)[at];
}

inline bool mask_is_shared(const Attend &a) { return !a.mask_strides[1] && !a.mask_strides[2]; }

inline void read_slots(const Plan &p, const Item &item, int segment, int token, int tokens, Slots &slots) {
    const Attend &a = *p.a;
    const Segment &s = a.segments[segment];
    slots.any = false;
    slots.all = tokens == BLOCK;
    for (int t = 0; t < BLOCK; ++t) {
        int64_t position = t < tokens ? position_of(a, segment, item.b, token + t) : -1;
        bool holds = position >= 0;
        float added = 0;
        if (holds && a.mask && mask_is_shared(a)) {
            bool hidden;
            added = mask_at(a, item.b, 0, 0, position, hidden);
            holds = !hidden;
        }
        if (holds && a.bias) added += a.bias[item.b * a.bias_length + (position < a.bias_length ? position : a.bias_length - 1)];
        slots.position[t] = position;
        slots.holds[t] = holds;
        slots.added[t] = added;
        slots.any |= holds;
        slots.all &= holds;
    }
    const Source *sources[2] = {&s.key, &s.value};
    float *scales[2] = {slots.key_scale, slots.value_scale};
    for (int i = 0; i < 2; ++i) {
        const Source &source = *sources[i];
        const uint16_t *scale = is_packed(source) && source.scale ? source.scale + (item.b * source.groups + item.group) * s.slots + token : nullptr;
        if (scale) convert_row(scales[i], scale, FLOAT16, tokens);
        for (int t = scale ? tokens : 0; t < BLOCK; ++t) scales[i][t] = 1;
        for (int t = 0; t < tokens; ++t)
            if (slots.holds[t] <= 0) scales[i][t] = 0;
    }
}

// Scores of one row become weights relative to its maximum so far; what the sums held before is scaled to it.
inline void weigh_scores(const Plan &p, const Item &item, int segment, int m, float *score, const Slots &slots, int token, int tokens,
                         int width) {
    const Attend &a = *p.a;
    int kind = kind_of(segment), per_group = heads_per_group(a, kind), i = m % p.R, row = i % (int)a.rows;
    int64_t head = (int64_t)item.b * a.heads + item.group * per_group + m / p.R;
    bool causal = segment == NEW && !a.mask && a.rows == a.new_tokens;
    bool own_mask = a.mask && !mask_is_shared(a);
    Vec offset = broadcast(is_packed(a.segments[segment].key) ? p.offset[kind - 1][head * p.R + i] : 0.0f);
    Vec top = broadcast(-INFINITY), hidden = broadcast(-INFINITY);
    bool nan = false;
    for (int t = 0; t < BLOCK; t += LANES) {
        Vec x = fma(load(score + t), load(slots.key_scale + t), add(offset, load(slots.added + t)));
        if (own_mask || causal) {
            store(score + t, x);
            for (int j = t; j < t + LANES && j < tokens; ++j) {
                bool out = causal && j > row;
                float more = 0;
                if (own_mask && slots.holds[j] > 0)
                    more = mask_at(a, item.b, (item.group * per_group + m / p.R) * p.share + i / a.rows, row, slots.position[j], out);
                score[j] = out ? -INFINITY : score[j] + more;
            }
            x = load(score + t);
        }
        x = select_positive(load(slots.holds + t), x, hidden);
        store(score + t, x);
        top = maximum(top, x);
        nan |= any_nan(x);
    }
    if (kind && a.segments[segment].importance && i % a.new_tokens == a.new_tokens - 1) {
        float *newest = p.newest[kind - 1] + (head * p.per_head_newest + i / a.new_tokens) * p.used[segment];
        memcpy(newest + token, score, tokens * sizeof *score);
    }
    float best = largest(top);
    if (nan) item.total[m] = NAN;
    if (nan || best == INFINITY) best = best > item.top[m] ? best : item.top[m] > -INFINITY ? item.top[m] : 0;
    if (best > item.top[m]) {
        float *sums = item.sums + (int64_t)m * width;
        if (item.top[m] > -INFINITY) {
            float shrink = expf(item.top[m] - best);
            item.total[m] *= shrink;
            for (int c = 0; c < width; ++c) sums[c] *= shrink;
        }
        item.top[m] = best;
    }
    if (item.top[m] == -INFINITY) {
        memset(score, 0, BLOCK * sizeof *score);
        return;
    }
    Vec minus = broadcast(-item.top[m]), total = zero();
    for (int t = 0; t < BLOCK; t += LANES) {
        Vec weight = exp_of(add(load(score + t), minus));
        total = add(total, weight);
        store(score + t, weight);
    }
    item.total[m] += sum(total);
}

inline void sum_values(const Plan &p, const Item &item, int segment, int token, int tokens, const Slots &slots, const Local &local) {
    const Attend &a = *p.a;
    const Segment &s = a.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(a, kind), M = per_group * p.R, D = (int)a.value_dim;
    if (is_packed(s.value)) {
        if (s.value.scale)
            for (int m = 0; m < M; ++m)
                for (int t = 0; t < BLOCK; t += LANES) {
                    float *weight = local.score + m * BLOCK + t;
                    store(weight, scaled(load(weight), load(slots.value_scale + t)));
                }
        bool partial = segment == VISION && a.tiers && token >= a.tiers[2 * item.b];
        const Columns &columns = partial ? p.partial[kind - 1] : p.value[kind - 1];
        const float *holds = slots.all ? nullptr : slots.holds;
        Packed packed = packed_of(a, s.value, item.b, item.group, s.slots, columns.bytes);
        // The leading components are in the same columns, whatever their number, unless a band ends inside of a vector.
        for (int i = 0; i < 4; ++i) {
            Band band = columns.band[i];
            int full = p.value[kind - 1].band[i].column;
            for (int c = 0; c < band.columns; c += VALUE_COLUMNS) {
                int width = band.columns - c < VALUE_COLUMNS ? band.columns - c : VALUE_COLUMNS;
                unpack_tile(packed, columns, band.column + c, width, token, tokens, holds, local.tile, local.row);
                weigh(local.score, BLOCK, M, local.tile, width, width, tokens, item.sums + full + c, p.width[kind]);
            }
        }
        return;
    }
    for (int h = 0; h < per_group; ++h) {
        int head = item.group * per_group + h, source_heads = (int)(a.heads / s.value.groups), step = TILE / D;
        const float *weight = local.score + (int64_t)h * p.R * BLOCK;
        float *sums = item.sums + (int64_t)h * p.R * D;
        bool direct = s.value.dtype == FLOAT32 && slots.all;
        for (int t = 0; t < tokens; t += direct ? tokens : step) {
            const float *rows = (const float *)dense_row(s.value, item.b, head, token + t, source_heads, D);
            int64_t stride = s.value.token_stride;
            int n = direct ? tokens : tokens - t < step ? tokens - t : step;
            if (!direct) {
                for (int i = 0; i < n; ++i)
                    if (slots.holds[t + i] > 0)
                        convert_row(local.tile + i * D, dense_row(s.value, item.b, head, token + t + i, source_heads, D), s.value.dtype, D);
                    else
                        memset(local.tile + i * D, 0, D * sizeof(float));
                rows = local.tile;
                stride = D;
            }
            weigh(weight + t, BLOCK, p.R, rows, stride, D, n, sums, D);
        }
    }
}

// No attention of the newest token to a block.
inline void hide_block(const Plan &p, const Item &item, int segment, int token, int tokens) {
    if (!p.a->segments[segment].importance) return;
    int rows = heads_per_group(*p.a, segment) * p.per_head_newest;
    float *newest = p.newest[segment - 1] + ((int64_t)item.b * p.a->heads * p.per_head_newest + item.group * rows) * p.used[segment];
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < tokens; ++t) newest[(int64_t)i * p.used[segment] + token + t] = -INFINITY;
}

inline void run_part(const Plan &p, const Item &item, int segment, int begin, int end, const Local &local) {
    const Attend &a = *p.a;
    int kind = kind_of(segment), M = heads_per_group(a, kind) * p.R;
    Slots slots;
    int tokens;
    for (int token = begin; token < end; token += tokens) {
        tokens = end - token < BLOCK ? end - token : BLOCK;
        if (segment == VISION && a.tiers && token < a.tiers[2 * item.b] && a.tiers[2 * item.b] < token + tokens)
            tokens = a.tiers[2 * item.b] - token;
        read_slots(p, item, segment, token, tokens, slots);
        if (!slots.any) {
            hide_block(p, item, segment, token, tokens);
            continue;
        }
        score_block(p, item, segment, token, tokens, local);
        for (int m = 0; m < M; ++m) weigh_scores(p, item, segment, m, local.score + m * BLOCK, slots, token, tokens, p.width[kind]);
        sum_values(p, item, segment, token, tokens, slots, local);
    }
}

inline void run_item(const Plan &p, const Item &item, const Local &local) {
    int M = heads_per_group(*p.a, item.segment) * p.R;
    for (int m = 0; m < M; ++m) item.top[m] = -INFINITY, item.total[m] = 0;
    memset(item.sums, 0, (size_t)M * p.width[item.segment] * sizeof(float));
    if (item.segment != 0) return run_part(p, item, item.segment, item.begin, item.end, local);
    const int dense[3] = {FIRST, TAIL, NEW};
    for (int segment : dense) run_part(p, item, segment, 0, p.used[segment], local);
}

// Merge the parts of one head's rows, decode, and write the output.
inline void finish_head(const Plan &p, int64_t b, int64_t head, float *out, float *latent, float *tile) {
    const Attend &a = *p.a;
    int R = p.R, D = (int)a.value_dim;
    int64_t row = (b * a.heads + head) * R;
    float *top = p.top + row, *inverse = p.inverse + row;
    const Item *items[3];
    int at[3];
    for (int kind = 0; kind < 3; ++kind) {
        int per_group = heads_per_group(a, kind), groups = (int)a.heads / per_group;
        items[kind] = p.items + p.first_item[kind] + (b * groups + head / per_group) * p.parts[kind];
        at[kind] = (int)(head % per_group) * R;
    }
    for (int m = 0; m < R; ++m) {
        top[m] = -INFINITY;
        for (int kind = 0; kind < 3; ++kind)
            for (int i = 0; i < p.parts[kind]; ++i) {
                float other = items[kind][i].top[at[kind] + m];
                if (!(other <= top[m])) top[m] = other;
            }
        float total = 0;
        for (int kind = 0; kind < 3; ++kind)
            for (int i = 0; i < p.parts[kind]; ++i) {
                float other = items[kind][i].top[at[kind] + m];
                if (other > -INFINITY) total += items[kind][i].total[at[kind] + m] * expf(other - top[m]);
            }
        inverse[m] = total > 0 || total != total ? 1 / total : 0;
    }
    memset(out, 0, (size_t)R * D * sizeof *out);
    for (int kind = 0; kind < 3; ++kind) {
        if (!p.parts[kind]) continue;
        const Source &s = a.segments[kind].value;
        bool packed = kind && is_packed(s);
        int width = p.width[kind];
        float *to = packed ? latent : out;
        if (packed) memset(latent, 0, (size_t)R * width * sizeof *latent);
        int per_group = heads_per_group(a, kind);
        int64_t basis = packed ? (s.basis_batch == 1 ? 0 : b) * s.groups + head / per_group : 0;
        int64_t W = (int64_t)per_group * D, inside = head % per_group * D;
        const float *mean = packed ? basis_row(s, s.mean, basis * W + inside, D, tile) : nullptr;
        for (int i = 0; i < p.parts[kind]; ++i)
            for (int m = 0; m < R; ++m) {
                const Item &item = items[kind][i];
                float other = item.top[at[kind] + m];
                if (other == -INFINITY) continue;
                float share = expf(other - top[m]) * inverse[m];
                const float *sums = item.sums + (int64_t)(at[kind] + m) * width;
                for (int c = 0; c < width; ++c) to[(int64_t)m * width + c] += share * sums[c];
                float part = share * item.total[at[kind] + m];
                for (int d = 0; packed && d < D; ++d) out[m * D + d] += part * mean[d];
            }
        if (!packed) continue;
        const Columns &columns = p.value[kind - 1];
        int r = components_of(s), most = TILE / D;
        for (const Band &band : columns.band) {
            const float *step = s.step + basis * r + band.component;
            for (int m = 0; m < R; ++m)
                for (int c = 0; c < band.count; ++c) latent[(int64_t)m * width + band.column + c] *= step[c];
            int64_t from = (basis * r + band.component) * W + inside;
            if (s.basis_dtype == FLOAT32) {
                weigh(latent + band.column, width, R, (const float *)s.decoder + from, W, D, band.count, out, D);
                continue;
            }
            for (int c = 0; c < band.count; c += most) {
                int n = band.count - c < most ? band.count - c : most;
                for (int i = 0; i < n; ++i)
                    convert_row(tile + i * D, (const uint16_t *)s.decoder + from + (c + i) * W, s.basis_dtype, D);
                weigh(latent + band.column + c, width, R, tile, D, D, n, out, D);
            }
        }
    }
    for (int m = 0; m < R; ++m) {
        int64_t to = ((b * a.query_heads + head * p.share + m / a.rows) * a.rows + m % a.rows) * D;
        for (int d = 0; d < D; ++d) store_element(a.out, a.query_dtype, to + d, out[m * D + d]);
    }
}

// The newest token's attention, averaged over heads, into the importance of slots [begin, end).
inline void update_importance(const Plan &p, int segment, int64_t b, int begin, int end) {
    const Attend &a = *p.a;
    const Segment &s = a.segments[segment];
    int rows = (int)a.heads * p.per_head_newest;
    for (int token = begin; token < end; token += LANES) {
        int n = end - token < LANES ? end - token : LANES;
        Vec attention = zero();
        for (int i = 0; i < rows; ++i) {
            int64_t row = b * rows + i, at = (b * a.heads + i / p.per_head_newest) * p.R + i % p.per_head_newest * a.new_tokens + a.new_tokens - 1;
            if (p.top[at] == -INFINITY) continue;
            Vec score = load_some(p.newest[segment - 1] + row * p.used[segment] + token, n);
            attention = fma(exp_of(add(score, broadcast(-p.top[at]))), broadcast(p.inverse[at]), attention);
        }
        float found[LANES];
        store(found, attention);
        for (int t = 0; t < n; ++t) {
            float *known = s.importance + b * s.slots + token + t;
            if (position_of(a, segment, b, token + t) >= 0) *known = s.keep * *known + s.add * (found[t] / rows);
        }
    }
}

// 0, or 1 where memory ran out.
inline int run_attend(const Attend &a) {
    Plan p = plan_of(a);
    Arena count = {};
    lay_out(p, count);
    int most_rows = p.R, most_width = (int)a.value_dim;
    int64_t most_bytes = 0;
    for (int kind = 1; kind < 3; ++kind) {
        if (!p.parts[kind]) continue;
        int M = heads_per_group(a, kind) * p.R;
        most_rows = M > most_rows ? M : most_rows;
        most_width = p.width[kind] > most_width ? p.width[kind] : most_width;
        int64_t key = p.key[kind - 1].bytes, value = p.value[kind - 1].bytes, more = key > value ? key : value;
        most_bytes = more > most_bytes ? more : most_bytes;
    }
    int64_t score = (int64_t)most_rows * BLOCK, merged = (int64_t)p.R * (most_width + a.value_dim);
    int64_t local = TILE + LANES + score + merged + most_bytes / 4 + 32;
    size_t each = (size_t)(local * sizeof(float) + 63) / 64 * 64;
    char *memory = (char *)aligned_alloc(64, count.size + each * a.threads);
    if (!memory) return 1;
    Arena arena = {memory, 0};
    lay_out(p, arena);
    int64_t pairs = a.batch * a.heads;
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        float *own = (float *)(memory + count.size + each * omp_get_thread_num());
        Local local = {own, own + TILE + LANES, nullptr};
        float *latent = local.score + score, *out = latent + (int64_t)p.R * most_width;
        local.row = (uint8_t *)(out + p.R * a.value_dim);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < pairs; ++i) {
            load_queries(p, i / a.heads, i % a.heads);
            for (int kind = 1; kind < 3; ++kind)
                if (p.used[kind] && is_packed(a.segments[kind].key)) project_queries(p, kind, i / a.heads, i % a.heads, local.tile);
        }
#pragma omp for schedule(dynamic, 1)
        for (int i = p.item_count - 1; i >= 0; --i) run_item(p, p.items[i], local);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < pairs; ++i) finish_head(p, i / a.heads, i % a.heads, out, latent, local.tile);
        for (int segment = VISION; segment <= TEXT; ++segment) {
            if (!a.segments[segment].importance) continue;
            int64_t pieces = (p.used[segment] + 255) / 256;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < a.batch * pieces; ++i) {
                int begin = (int)(i % pieces) * 256, end = begin + 256 < p.used[segment] ? begin + 256 : p.used[segment];
                update_importance(p, segment, i / pieces, begin, end);
            }
        }
    }
    free(memory);
    return 0;
}

}  // namespace
