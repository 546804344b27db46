// `apack::attend` and `apack::attend_tiers` in one pass over the codes (kernels/attend/reference.py is the specification).
//
// Queries are projected into each packed stream's components once. Then, for blocks of tokens that stay in the first-level cache:
// codes to floats, scores of all query heads of a head group, online softmax, weights times components. Parts of the token range
// run in parallel and merge by their maxima; only then are the sums decoded.
#pragma once

#include "arguments.h"
#include "codes.h"
#include "products.h"
#include "scratch.h"
#include "team.h"

namespace {

constexpr int BLOCK = 64;            // tokens whose scores are held at once
constexpr int TILE = 8192;           // floats of unpacked codes held at once: 32 KiB
constexpr int KEY_COLUMNS = 512;     // columns of a tile of keys
constexpr int VALUE_COLUMNS = 128;   // of values
constexpr int MIN_PART = 256;        // tokens that are worth a part of their own
constexpr int PIECE = 512;           // slots of a task that does little for each

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

struct Work {
    const Attend *a;
    Segment segments[5];
    int share, R, per_head_newest;            // query heads of a KV head, their rows, and how many of these are the newest token
    int used[5];                              // slots that any sequence reads, by segment
    Columns key[2], value[2], partial[2];     // of vision and text
    int width[3];                             // columns of an item's sums: dense, vision, text
    float *query;                             // [B][H][R][D], scaled
    float *latent[2], *offset[2];             // [B][H][R][columns], [B][H][R]
    float *top, *inverse;                     // [B][H][R]
    float *newest[2];                         // [B][H][per_head_newest][used], scores of the newest token
    float *holds[5], *added[5];               // [B][used]: 1 where a slot is read, else 0; what is added to its score
    int32_t *position[5];                     // [B][used], -1 where a slot is not read
    Item *items;
    int item_count, first_item[3], parts[3];  // of dense, vision, text
};

inline float *known_importance(const Work &w, int segment) {
    return segment == VISION || segment == TEXT ? w.a->importance[segment - 1].known : nullptr;
}

inline int kind_of(int segment) { return segment == VISION ? 1 : segment == TEXT ? 2 : 0; }

inline int heads_per_group(const Work &w, int kind) { return kind == 0 ? 1 : (int)(w.a->heads / w.segments[kind].key.groups); }

// Position of a slot, or -1 where it holds no token that is read.
inline int64_t position_of(const Work &w, int segment, int64_t b, int64_t slot) {
    const Attend &a = *w.a;
    int64_t before = a.cursor[0] - a.new_tokens, packed = a.cursor[1];
    if (segment == NEW) return before + slot;
    const Segment &s = w.segments[segment];
    if (segment == TAIL) {
        int64_t offset = (slot - packed) % s.slots, position = packed + (offset < 0 ? offset + s.slots : offset);
        return position < before ? position : -1;
    }
    if (segment == VISION && a.tiers && slot >= a.tiers[2 * b + 1]) return -1;
    int64_t position = s.positions[b * s.slots + slot];
    return position < (packed < before ? packed : before) ? position : -1;
}

inline int used_slots(const Work &w, int segment) {
    const Attend &a = *w.a;
    int64_t n = w.segments[segment].slots;
    if (segment == TAIL || segment == NEW) return (int)n;
    int64_t used = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
        int64_t last = n;
        if (segment == VISION && a.tiers && a.tiers[2 * b + 1] < last) last = a.tiers[2 * b + 1];
        while (last > used && position_of(w, segment, b, last - 1) < 0) --last;
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
inline void lay_out(Work &w, Arena &arena) {
    const Attend &a = *w.a;
    int64_t rows = a.batch * a.heads * w.R;
    w.query = arena.floats(rows * a.head_dim);
    for (int i = 0; i < 2; ++i) {
        const Source &key = w.segments[VISION + i].key;
        bool reads = w.used[VISION + i] && is_packed(key);
        w.latent[i] = arena.floats(reads ? rows * w.key[i].count : 0);
        w.offset[i] = arena.floats(reads ? rows : 0);
        w.newest[i] = arena.floats(
            a.importance[i].known ? a.batch * a.heads * w.per_head_newest * w.used[VISION + i] : 0);
    }
    for (int i = 0; i < 5; ++i) {
        int64_t slots = a.batch * round_up(w.used[i], BLOCK);
        w.holds[i] = arena.floats(slots);
        w.added[i] = arena.floats(slots);
        w.position[i] = (int32_t *)arena.take(slots * sizeof(int32_t));
    }
    w.top = arena.floats(rows);
    w.inverse = arena.floats(rows);
    w.items = (Item *)arena.take(w.item_count * sizeof(Item));
    int at = 0;
    for (int kind = 0; kind < 3; ++kind) {
        w.first_item[kind] = at;
        int per_group = heads_per_group(w, kind), groups = (int)a.heads / per_group, M = per_group * w.R;
        for (int b = 0; b < a.batch; ++b)
            for (int g = 0; g < groups; ++g)
                for (int i = 0; i < w.parts[kind]; ++i, ++at) {
                    float *floats = arena.floats(2 * M + (int64_t)M * w.width[kind]);
                    if (!arena.at) continue;
                    int64_t used = w.used[kind];
                    int begin = round_up(used * i / w.parts[kind], BLOCK), end = round_up(used * (i + 1) / w.parts[kind], BLOCK);
                    w.items[at] = Item{kind, b, g, begin, end < used ? end : (int)used, floats, floats + M, floats + 2 * M};
                }
    }
}

inline Work work_of(const Attend &a, const State &state) {
    Work w = {};
    w.a = &a;
    memcpy(w.segments, state.segments, sizeof state);
    Segment &fresh = w.segments[NEW];
    fresh.slots = a.new_tokens;
    fresh.key = Source{a.key, a.key_dtype, a.key_strides[0], a.key_strides[1], a.key_strides[2], a.heads, 0, 0, 0, 0, 0, 0, {}};
    fresh.value = Source{a.value, a.value_dtype, a.value_strides[0], a.value_strides[1], a.value_strides[2], a.heads, 0, 0, 0, 0, 0, 0, {}};
    w.share = (int)(a.query_heads / a.heads);
    w.R = (int)(w.share * a.rows);
    w.per_head_newest = a.new_tokens ? w.R / (int)a.new_tokens : 0;
    for (int i = 0; i < 5; ++i) w.used[i] = w.segments[i].slots ? used_slots(w, i) : 0;
    w.width[0] = (int)a.value_dim;
    w.parts[0] = 1;
    for (int i = 0; i < 2; ++i) {
        const Segment &s = w.segments[VISION + i];
        int groups = s.slots ? (int)s.key.groups : 1;
        if (s.slots) {
            w.key[i] = columns_of(s.key, components_of(s.key));
            w.value[i] = columns_of(s.value, components_of(s.value));
            w.partial[i] = columns_of(s.value, i == 0 && a.tiers ? a.partial : components_of(s.value));
        }
        w.width[1 + i] = is_packed(s.value) ? w.value[i].count : heads_per_group(w, 1 + i) ? (int)a.value_dim : 0;
        int wanted = (int)(a.threads == 1 ? 1 : (4 * a.threads + a.batch * groups - 1) / (a.batch * groups));
        int most = (w.used[VISION + i] + MIN_PART - 1) / MIN_PART;
        w.parts[1 + i] = wanted < most ? wanted : most;
    }
    for (int kind = 0; kind < 3; ++kind)
        w.item_count += (int)(a.batch * (a.heads / heads_per_group(w, kind)) * w.parts[kind]);
    return w;
}

// Rows of one head's queries, scaled, as floats.
inline void load_queries(const Work &w, int64_t b, int64_t head) {
    const Attend &a = *w.a;
    float *out = w.query + (b * a.heads + head) * w.R * a.head_dim;
    for (int i = 0; i < w.R; ++i) {
        int64_t at = b * a.query_strides[0] + (head * w.share + i / a.rows) * a.query_strides[1] + i % a.rows * a.query_strides[2];
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
__attribute__((noinline)) void project_queries(const Work &w, int kind, int64_t b, int64_t head, float *tile) {
    const Attend &a = *w.a;
    const Source &s = w.segments[kind].key;
    const Columns &columns = w.key[kind - 1];
    int D = (int)a.head_dim, per_group = heads_per_group(w, kind), r = components_of(s);
    int64_t group = head / per_group, W = per_group * D, row = b * a.heads + head;
    int64_t at = (s.basis_batch == 1 ? 0 : b) * s.groups + group, inside = head % per_group * D;
    const float *query = w.query + row * w.R * D;
    float *latent = w.latent[kind - 1] + row * w.R * columns.count;
    const int most = TILE / round_up(D, LANES) & ~3;
    for (const Band &band : columns.band) {
        const float *step = s.step + at * r + band.component;
        for (int c = 0; c < band.count; c += most) {
            int n = band.count - c < most ? band.count - c : most;
            int64_t from = (at * r + band.component + c) * W + inside;
            float *out = latent + band.column + c;
            if (s.basis_dtype == FLOAT32) {
                dots(query, D, w.R, (const float *)s.decoder + from, W, n, D, out, columns.count, false);
            } else {
                for (int i = 0; i < n; ++i) convert_row(tile + i * D, (const uint16_t *)s.decoder + from + i * W, s.basis_dtype, D);
                dots(query, D, w.R, tile, D, n, D, out, columns.count, false);
            }
        }
        for (int m = 0; m < w.R; ++m)
            for (int c = 0; c < band.columns; ++c) {
                float *x = latent + (int64_t)m * columns.count + band.column + c;
                *x = c < band.count ? *x * step[c] : 0.0f;
            }
    }
    const float *mean = basis_row(s, s.mean, at * W + inside, D, tile);
    for (int m = 0; m < w.R; ++m) {
        float offset = 0;
        for (int d = 0; d < D; ++d) offset += query[m * D + d] * mean[d];
        w.offset[kind - 1][row * w.R + m] = offset;
    }
}

struct Local {
    float *tile, *score;      // [TILE], [M][BLOCK]
    uint8_t *row;             // one token's codes and a vector
};

// Scores of one block against keys.
__attribute__((noinline)) void score_block(const Work &w, const Item &item, int segment, int token, int tokens, const Local &local) {
    const Attend &a = *w.a;
    const Segment &s = w.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(w, kind), M = per_group * w.R, D = (int)a.head_dim;
    int64_t first_head = (int64_t)item.b * a.heads + item.group * per_group;
    if (is_packed(s.key)) {
        const Columns &columns = w.key[kind - 1];
        Packed packed = packed_of(s.key, a.batch, item.b, item.group, s.slots, columns.bytes);
        const float *latent = w.latent[kind - 1] + first_head * w.R * columns.count;
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
        const float *query = w.query + (first_head + h) * w.R * D;
        float *score = local.score + (int64_t)h * w.R * BLOCK;
        int head = item.group * per_group + h, source_heads = (int)(a.heads / s.key.groups), step = TILE / D & ~3;
        if (s.key.dtype == FLOAT32) {
            const float *row = (const float *)dense_row(s.key, item.b, head, token, source_heads, D);
            dots(query, D, w.R, row, s.key.token_stride, tokens, D, score, BLOCK, false);
            continue;
        }
        for (int t = 0; t < tokens; t += step) {
            int n = tokens - t < step ? tokens - t : step;
            for (int i = 0; i < n; ++i)
                convert_row(local.tile + i * D, dense_row(s.key, item.b, head, token + t + i, source_heads, D), s.key.dtype, D);
            dots(query, D, w.R, local.tile, D, n, D, score + t, BLOCK, false);
        }
    }
}

// What all heads of a block share: whether a slot is read, what is added to its score, the scales of its key and value.
struct Slots {
    float holds[BLOCK], added[BLOCK], key_scale[BLOCK], value_scale[BLOCK];
    const int32_t *position;
    bool all;
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

// Slots [begin, begin + BLOCK) of a segment: which are read, and what mask and bias add to all heads' scores.
__attribute__((noinline)) void find_slots(const Work &w, int segment, int64_t b, int begin) {
    const Attend &a = *w.a;
    int64_t at = b * round_up(w.used[segment], BLOCK) + begin;
    for (int t = 0; t < BLOCK; ++t) {
        int64_t position = begin + t < w.used[segment] ? position_of(w, segment, b, begin + t) : -1;
        bool hidden = position < 0;
        float added = 0;
        if (!hidden && a.mask && mask_is_shared(a)) added = mask_at(a, b, 0, 0, position, hidden);
        if (!hidden && a.bias) added += a.bias[b * a.bias_length + (position < a.bias_length ? position : a.bias_length - 1)];
        w.position[segment][at + t] = (int32_t)position;
        w.holds[segment][at + t] = !hidden;
        w.added[segment][at + t] = added;
    }
}

// False where none of the block's slots is read.
__attribute__((noinline)) bool read_slots(const Work &w, const Item &item, int segment, int token, int tokens, Slots &slots) {
    const Segment &s = w.segments[segment];
    int64_t at = (int64_t)item.b * round_up(w.used[segment], BLOCK) + token;
    memset(slots.holds, 0, sizeof slots.holds);
    memcpy(slots.holds, w.holds[segment] + at, tokens * sizeof(float));
    memcpy(slots.added, w.added[segment] + at, tokens * sizeof(float));
    memset(slots.added + tokens, 0, (BLOCK - tokens) * sizeof(float));
    slots.position = w.position[segment] + at;
    float held = 0;
    for (int t = 0; t < BLOCK; ++t) held += slots.holds[t];
    slots.all = held == BLOCK;
    if (held == 0) return false;
    const Source *sources[2] = {&s.key, &s.value};
    float *scales[2] = {slots.key_scale, slots.value_scale};
    for (int i = 0; i < 2; ++i) {
        const Source &source = *sources[i];
        bool scaled = is_packed(source) && source.scale;
        if (scaled) convert_row(scales[i], source.scale + (item.b * source.groups + item.group) * s.slots + token, FLOAT16, tokens);
        for (int t = scaled ? tokens : 0; t < BLOCK; ++t) scales[i][t] = 1;
    }
    return true;
}

// Scores of one row become weights relative to its maximum so far; what the sums held before is scaled to it.
__attribute__((noinline)) void weigh_scores(const Work &w, const Item &item, int segment, int m, float *score, const Slots &slots, int token, int tokens,
                         int width) {
    const Attend &a = *w.a;
    int kind = kind_of(segment), per_group = heads_per_group(w, kind), i = m % w.R, row = i % (int)a.rows;
    int64_t head = (int64_t)item.b * a.heads + item.group * per_group + m / w.R;
    bool causal = segment == NEW && !a.mask && a.rows == a.new_tokens;
    bool own_mask = a.mask && !mask_is_shared(a);
    Vec offset = broadcast(is_packed(w.segments[segment].key) ? w.offset[kind - 1][head * w.R + i] : 0.0f);
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
                    more = mask_at(a, item.b, (item.group * per_group + m / w.R) * w.share + i / a.rows, row, slots.position[j], out);
                score[j] = out ? -INFINITY : score[j] + more;
            }
            x = load(score + t);
        }
        x = select_positive(load(slots.holds + t), x, hidden);
        store(score + t, x);
        top = maximum(top, x);
        nan |= any_nan(x);
    }
    if (known_importance(w, segment) && i % a.new_tokens == a.new_tokens - 1) {
        float *newest = w.newest[kind - 1] + (head * w.per_head_newest + i / a.new_tokens) * w.used[segment];
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

__attribute__((noinline)) void sum_values(const Work &w, const Item &item, int segment, int token, int tokens, const Slots &slots, const Local &local) {
    const Attend &a = *w.a;
    const Segment &s = w.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(w, kind), M = per_group * w.R, D = (int)a.value_dim;
    if (is_packed(s.value)) {
        if (s.value.scale)
            for (int m = 0; m < M; ++m)
                for (int t = 0; t < BLOCK; t += LANES) {
                    float *weight = local.score + m * BLOCK + t;
                    store(weight, select_positive(load(slots.holds + t), scaled(load(weight), load(slots.value_scale + t)), zero()));
                }
        bool partial = segment == VISION && a.tiers && token >= a.tiers[2 * item.b];
        const Columns &columns = partial ? w.partial[kind - 1] : w.value[kind - 1];
        const float *holds = slots.all ? nullptr : slots.holds;
        Packed packed = packed_of(s.value, a.batch, item.b, item.group, s.slots, columns.bytes);
        // The leading components are in the same columns, whatever their number, unless a band ends inside of a vector.
        for (int i = 0; i < 4; ++i) {
            Band band = columns.band[i];
            int full = w.value[kind - 1].band[i].column;
            for (int c = 0; c < band.columns; c += VALUE_COLUMNS) {
                int width = band.columns - c < VALUE_COLUMNS ? band.columns - c : VALUE_COLUMNS;
                unpack_tile(packed, columns, band.column + c, width, token, tokens, holds, local.tile, local.row);
                weigh(local.score, BLOCK, M, local.tile, width, width, tokens, item.sums + full + c, w.width[kind]);
            }
        }
        return;
    }
    for (int h = 0; h < per_group; ++h) {
        int head = item.group * per_group + h, source_heads = (int)(a.heads / s.value.groups), step = TILE / D;
        const float *weight = local.score + (int64_t)h * w.R * BLOCK;
        float *sums = item.sums + (int64_t)h * w.R * D;
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
            weigh(weight + t, BLOCK, w.R, rows, stride, D, n, sums, D);
        }
    }
}

// No attention of the newest token to a block.
inline void hide_block(const Work &w, const Item &item, int segment, int token, int tokens) {
    if (!known_importance(w, segment)) return;
    int rows = heads_per_group(w, segment) * w.per_head_newest;
    float *newest = w.newest[segment - 1] + ((int64_t)item.b * w.a->heads * w.per_head_newest + item.group * rows) * w.used[segment];
    for (int i = 0; i < rows; ++i)
        for (int t = 0; t < tokens; ++t) newest[(int64_t)i * w.used[segment] + token + t] = -INFINITY;
}

inline void run_part(const Work &w, const Item &item, int segment, int begin, int end, const Local &local) {
    const Attend &a = *w.a;
    int kind = kind_of(segment), M = heads_per_group(w, kind) * w.R;
    Slots slots;
    int tokens;
    for (int token = begin; token < end; token += tokens) {
        tokens = end - token < BLOCK ? end - token : BLOCK;
        if (segment == VISION && a.tiers && token < a.tiers[2 * item.b] && a.tiers[2 * item.b] < token + tokens)
            tokens = a.tiers[2 * item.b] - token;
        if (!read_slots(w, item, segment, token, tokens, slots)) {
            hide_block(w, item, segment, token, tokens);
            continue;
        }
        score_block(w, item, segment, token, tokens, local);
        for (int m = 0; m < M; ++m) weigh_scores(w, item, segment, m, local.score + m * BLOCK, slots, token, tokens, w.width[kind]);
        sum_values(w, item, segment, token, tokens, slots, local);
    }
}

inline void run_item(const Work &w, const Item &item, const Local &local) {
    int M = heads_per_group(w, item.segment) * w.R;
    for (int m = 0; m < M; ++m) item.top[m] = -INFINITY, item.total[m] = 0;
    memset(item.sums, 0, (size_t)M * w.width[item.segment] * sizeof(float));
    if (item.segment != 0) return run_part(w, item, item.segment, item.begin, item.end, local);
    const int dense[3] = {FIRST, TAIL, NEW};
    for (int segment : dense) run_part(w, item, segment, 0, w.used[segment], local);
}

// Merge the parts of one head's rows, decode, and write the output.
__attribute__((noinline)) void finish_head(const Work &w, int64_t b, int64_t head, float *out, float *latent, float *tile) {
    const Attend &a = *w.a;
    int R = w.R, D = (int)a.value_dim;
    int64_t row = (b * a.heads + head) * R;
    float *top = w.top + row, *inverse = w.inverse + row;
    const Item *items[3];
    int at[3];
    for (int kind = 0; kind < 3; ++kind) {
        int per_group = heads_per_group(w, kind), groups = (int)a.heads / per_group;
        items[kind] = w.items + w.first_item[kind] + (b * groups + head / per_group) * w.parts[kind];
        at[kind] = (int)(head % per_group) * R;
    }
    for (int m = 0; m < R; ++m) {
        top[m] = -INFINITY;
        for (int kind = 0; kind < 3; ++kind)
            for (int i = 0; i < w.parts[kind]; ++i) {
                float other = items[kind][i].top[at[kind] + m];
                if (!(other <= top[m])) top[m] = other;
            }
        float total = 0;
        for (int kind = 0; kind < 3; ++kind)
            for (int i = 0; i < w.parts[kind]; ++i) {
                float other = items[kind][i].top[at[kind] + m];
                if (other > -INFINITY) total += items[kind][i].total[at[kind] + m] * expf(other - top[m]);
            }
        inverse[m] = total > 0 || total != total ? 1 / total : 0;
    }
    memset(out, 0, (size_t)R * D * sizeof *out);
    for (int kind = 0; kind < 3; ++kind) {
        if (!w.parts[kind]) continue;
        const Source &s = w.segments[kind].value;
        bool packed = kind && is_packed(s);
        int width = w.width[kind];
        float *to = packed ? latent : out;
        if (packed) memset(latent, 0, (size_t)R * width * sizeof *latent);
        int per_group = heads_per_group(w, kind);
        int64_t basis = packed ? (s.basis_batch == 1 ? 0 : b) * s.groups + head / per_group : 0;
        int64_t W = (int64_t)per_group * D, inside = head % per_group * D;
        const float *mean = packed ? basis_row(s, s.mean, basis * W + inside, D, tile) : nullptr;
        for (int i = 0; i < w.parts[kind]; ++i)
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
        const Columns &columns = w.value[kind - 1];
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
        int64_t to = ((b * a.query_heads + head * w.share + m / a.rows) * a.rows + m % a.rows) * D;
        for (int d = 0; d < D; ++d) store_element(a.out, a.query_dtype, to + d, out[m * D + d]);
    }
}

// The newest token's attention, averaged over heads, into the importance of slots [begin, end).
__attribute__((noinline)) void update_importance(const Work &w, int segment, int64_t b, int begin, int end) {
    const Attend &a = *w.a;
    const Importance &importance = a.importance[segment - 1];
    int rows = (int)a.heads * w.per_head_newest;
    for (int token = begin; token < end; token += LANES) {
        int n = end - token < LANES ? end - token : LANES;
        Vec attention = zero();
        for (int i = 0; i < rows; ++i) {
            int64_t row = b * rows + i, at = (b * a.heads + i / w.per_head_newest) * w.R + i % w.per_head_newest * a.new_tokens + a.new_tokens - 1;
            if (w.top[at] == -INFINITY) continue;
            Vec score = load_some(w.newest[segment - 1] + row * w.used[segment] + token, n);
            attention = fma(exp_of(add(score, broadcast(-w.top[at]))), broadcast(w.inverse[at]), attention);
        }
        float found[LANES];
        store(found, attention);
        for (int t = 0; t < n; ++t) {
            float *known = importance.known + b * w.segments[segment].slots + token + t;
            if (position_of(w, segment, b, token + t) >= 0) *known = (float)(importance.keep * *known + importance.add * (found[t] / rows));
        }
    }
}

inline int64_t pieces_of(int used) { return (used + PIECE - 1) / PIECE; }

// 0, or 1 where memory ran out.
inline int run_attend(const Attend &a, const State &state) {
    Work w = work_of(a, state);
    Arena count = {};
    lay_out(w, count);
    int most_rows = w.R, most_width = (int)a.value_dim;
    int64_t most_bytes = 0;
    for (int kind = 1; kind < 3; ++kind) {
        if (!w.parts[kind]) continue;
        int M = heads_per_group(w, kind) * w.R;
        most_rows = M > most_rows ? M : most_rows;
        most_width = w.width[kind] > most_width ? w.width[kind] : most_width;
        int64_t key = w.key[kind - 1].bytes, value = w.value[kind - 1].bytes, more = key > value ? key : value;
        most_bytes = more > most_bytes ? more : most_bytes;
    }
    int64_t score = (int64_t)most_rows * BLOCK, merged = (int64_t)w.R * (most_width + a.value_dim);
    int64_t local = TILE + LANES + score + merged + most_bytes / 4 + 32;
    size_t each = (size_t)(local * sizeof(float) + 63) / 64 * 64;
    char *memory = scratch(count.size + each * a.threads);
    if (!memory) return 1;
    Arena arena = {memory, 0};
    lay_out(w, arena);
    int64_t pairs = a.batch * a.heads, slot_tasks = 0;
    for (int segment = 0; segment < 5; ++segment) slot_tasks += a.batch * pieces_of(w.used[segment]);
    Team team = {};
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        float *own = (float *)(memory + count.size + each * omp_get_thread_num());
        Local local = {own, own + TILE + LANES, nullptr};
        float *latent = local.score + score, *out = latent + (int64_t)w.R * most_width;
        local.row = (uint8_t *)(out + w.R * a.value_dim);
        auto prepare = [&](int64_t i) {
            if (i < pairs) {
                load_queries(w, i / a.heads, i % a.heads);
                for (int kind = 1; kind < 3; ++kind)
                    if (w.used[kind] && is_packed(w.segments[kind].key)) project_queries(w, kind, i / a.heads, i % a.heads, local.tile);
                return;
            }
            i -= pairs;
            for (int segment = 0; segment < 5; ++segment) {
                int64_t pieces = pieces_of(w.used[segment]);
                if (i < a.batch * pieces) {
                    int begin = (int)(i % pieces) * PIECE, used = round_up(w.used[segment], BLOCK);
                    for (int t = begin; t < begin + PIECE && t < used; t += BLOCK) find_slots(w, segment, i / pieces, t);
                    return;
                }
                i -= a.batch * pieces;
            }
        };
        team.share(0, pairs + slot_tasks, prepare);
        team.share(1, w.item_count, [&](int64_t i) { run_item(w, w.items[w.item_count - 1 - i], local); });
        team.share(2, pairs, [&](int64_t i) { finish_head(w, i / a.heads, i % a.heads, out, latent, local.tile); });
        for (int segment = VISION; segment <= TEXT; ++segment) {
            if (!known_importance(w, segment)) continue;
            int64_t pieces = pieces_of(w.used[segment]);
            team.share(2 + segment, a.batch * pieces, [&](int64_t i) {
                int begin = (int)(i % pieces) * PIECE, end = begin + PIECE < w.used[segment] ? begin + PIECE : w.used[segment];
                update_importance(w, segment, i / pieces, begin, end);
            });
        }
    }
    return 0;
}

}  // namespace
