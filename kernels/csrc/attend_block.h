// Attention of one block of tokens: scores, weights, sums of values.
#pragma once

#include "attend_slots.h"
#include "key_tile.h"
#include "products.h"

namespace {

// Scores of one block against keys; packed ones by the group's latents.
__attribute__((noinline)) void score_block(const Work &w, const Item &item, int segment, int token, int tokens, const float *latent,
                                           const Local &local) {
    const Attend &a = *w.a;
    const Segment &s = w.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(w, kind), M = per_group * w.R, D = (int)a.head_dim;
    int64_t first_head = (int64_t)item.b * a.heads + item.group * per_group;
    if (is_packed(s.key)) {
        const Columns &columns = w.key[kind - 1];
        Packed packed = packed_of(s.key, a.batch, item.b, item.group, s.slots, columns.bytes);
        if (KEYS_BY_COMPONENT) {
            memset(local.score, 0, (size_t)M * BLOCK * sizeof(float));
            for (int c = 0; c < columns.count; c += KEY_TILE_COLUMNS) {
                int width = columns.count - c < KEY_TILE_COLUMNS ? columns.count - c : KEY_TILE_COLUMNS;
                unpack_key_tile(packed, columns, c, width, token, tokens, local.tile, local.row);
                weigh(latent + c, columns.count, M, local.tile, BLOCK, round_up(tokens, LANES), width, local.score, BLOCK);
            }
            if (is_packed(s.value)) prefetch_rows(packed_of(s.value, a.batch, item.b, item.group, s.slots, w.value[kind - 1].bytes), token, tokens);
            return;
        }
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

// Keeps a row's scores for the importance of its tokens, where it is one of the newest token.
inline void keep_newest(const Work &w, const Item &item, int segment, int m, const float *score, int token, int tokens) {
    const Attend &a = *w.a;
    int kind = kind_of(segment), i = m % w.R;
    if (i % a.new_tokens != a.new_tokens - 1) return;
    int64_t head = (int64_t)item.b * a.heads + item.group * heads_per_group(w, kind) + m / w.R;
    float *newest = w.newest[kind - 1] + (head * w.per_head_newest + i / a.new_tokens) * w.used[segment];
    memcpy(newest + token, score, tokens * sizeof *score);
}

// Scores of one row become weights relative to its maximum so far, times the values' scales; what the sums held before is scaled to it.
__attribute__((noinline)) void weigh_scores(const Work &w, const Item &item, int segment, int m, float *score, const Slots &slots, int token, int tokens,
                         const float *offsets, int width) {
    const Attend &a = *w.a;
    bool causal = segment == NEW && !a.mask && a.rows == a.new_tokens;
    bool own_mask = a.mask && !mask_is_shared(a);
    Vec offset = broadcast(offsets ? offsets[m] : 0.0f);
    Vec top = broadcast(-INFINITY), hidden = broadcast(-INFINITY);
    bool nan = false;
    for (int t = 0; t < BLOCK; t += LANES) {
        Vec x = fma(load(score + t), load(slots.key_scale + t), add(offset, load(slots.added + t)));
        if (own_mask || causal) {
            const int head = item.group * heads_per_group(w, kind_of(segment)) + m / w.R, i = m % w.R, row = i % (int)a.rows;
            store(score + t, x);
            for (int j = t; j < t + LANES && j < tokens; ++j) {
                bool out = causal && j > row;
                float more = 0;
                if (own_mask && slots.holds[j] > 0)
                    more = mask_at(a, item.b, head * w.share + i / a.rows, row, slots.position[j], out);
                score[j] = out ? -INFINITY : score[j] + more;
            }
            x = load(score + t);
        }
        x = select_positive(load(slots.holds + t), x, hidden);
        store(score + t, x);
        top = maximum(top, x);
        nan |= any_nan(x);
    }
    if (known_importance(w, segment)) keep_newest(w, item, segment, m, score, token, tokens);
    float best = largest(top);
    if (nan) item.total[m] = NAN;
    if (nan || best == INFINITY) best = best > item.top[m] ? best : item.top[m] > -INFINITY ? item.top[m] : 0;
    const float before = item.top[m];
    if (!(best > before)) best = before;
    if (best == -INFINITY) {
        memset(score, 0, BLOCK * sizeof *score);
        return;
    }
    Vec minus = broadcast(-best), total = zero();
    for (int t = 0; t < BLOCK; t += LANES) {
        Vec weight = exp_of(add(load(score + t), minus));
        total = add(total, weight);
        store(score + t, select_positive(load(slots.holds + t), scaled(weight, load(slots.value_scale + t)), zero()));
    }
    // after the weights, which then need not wait for a branch that nobody can foresee
    if (best > before && before > -INFINITY) {
        float shrink = expf(before - best), *sums = item.sums + (int64_t)m * width;
        item.total[m] *= shrink;
        for (int c = 0; c < width; ++c) sums[c] *= shrink;
    }
    item.top[m] = best;
    item.total[m] += sum(total);
}

__attribute__((noinline)) void sum_values(const Work &w, const Item &item, int segment, int token, int tokens, const Slots &slots, const Local &local) {
    const Attend &a = *w.a;
    const Segment &s = w.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(w, kind), M = per_group * w.R, D = (int)a.value_dim;
    if (is_packed(s.value)) {
        bool partial = segment == VISION && a.tiers && token >= a.tiers[2 * item.b];
        const Columns &columns = partial ? w.partial[kind - 1] : w.value[kind - 1];
        const float *holds = slots.all ? nullptr : slots.holds;
        Packed packed = packed_of(s.value, a.batch, item.b, item.group, s.slots, columns.bytes);
        auto sum_columns = [&](int first, int count, int to) {
            for (int c = 0, tiles = (count + VALUE_COLUMNS - 1) / VALUE_COLUMNS; c < count; --tiles) {
                int width = round_up((count - c + tiles - 1) / tiles, LANES);
                if (width > count - c) width = count - c;
                unpack_tile(packed, columns, first + c, width, token, tokens, holds, local.tile, local.row);
                weigh(local.score, BLOCK, M, local.tile, width, width, tokens, item.sums + to + c, w.width[kind]);
                c += width;
            }
        };
        if (!partial) {
            sum_columns(0, columns.count, 0);
            return;
        }
        // The leading components are in the same columns, whatever their number, unless a band ends inside of a vector.
        for (int i = 0; i < BANDS; ++i) sum_columns(columns.band[i].column, columns.band[i].columns, w.value[kind - 1].band[i].column);
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

}  // namespace
