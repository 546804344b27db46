// Attention of one block of tokens: scores, weights, sums of values.
#pragma once

#include "attend_packed.h"
#include "attend_slots.h"

namespace {

// Asks for a quarter of a block's codes of keys and values. Between the steps of the block before it: a processor fetches few lines at once.
inline void prefetch_codes(const Work &w, const Item &item, int segment, int token, int quarter) {
    const Segment &s = w.segments[segment];
    const int kind = kind_of(segment), rows = BLOCK / 4;
    if (kind == 0) return;
    auto ask = [&](const Source &source, const Columns &columns) {
        if (is_packed(source)) prefetch_rows(packed_of(source, w.a->batch, item.b, item.group, s.slots, columns.bytes), token + quarter * rows, rows);
    };
    ask(s.key, w.key[kind - 1]);
    ask(s.value, w.value[kind - 1]);
}

// Scores of one block against keys; packed ones by the group's latents.
__attribute__((noinline)) void score_block(const Work &w, const Item &item, int segment, int token, int tokens,
                                           const Latents &latents, const Local &local) {
    const Attend &a = *w.a;
    const Segment &s = w.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(w, kind), M = per_group * item.rows, D = (int)a.head_dim;
    if (is_packed(s.key)) {
        Packed keys = packed_of(s.key, a.batch, item.b, item.group, s.slots, w.key[kind - 1].bytes);
        score_packed(keys, w.key[kind - 1], latents, M, token, tokens, local);
        return;
    }
    for (int h = 0; h < per_group; ++h) {
        int head = item.group * per_group + h, source_heads = (int)(a.heads / s.key.groups), step = TILE / D & ~3;
        const float *query = queries_of(w, item.b, head);
        float *score = local.score + (int64_t)h * item.rows * BLOCK;
        for (int t = 0; t < tokens; t += step) {
            int n = tokens - t < step ? tokens - t : step;
            const void *first = dense_row(s.key, item.b, head, token + t, source_heads, D);
            const FloatRows keys = float_rows(first, s.key.dtype, 0, s.key.token_stride, n, D, local.tile);
            dots(query, D, item.rows, keys.row, keys.stride, n, D, score + t, BLOCK, false);
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

// Adds what a mask has for one row to its scores; -inf where it hides a slot, or where one comes later.
inline void mask_row(const Work &w, const Item &item, int segment, int m, float *score, const Slots &slots, int tokens, bool causal) {
    const Attend &a = *w.a;
    const int head = item.group * heads_per_group(w, kind_of(segment)) + m / item.rows, i = m % w.R, row = i % (int)a.rows;
    const int64_t b = item.b + m / w.R % item.sequences;
    for (int t = 0; t < tokens; ++t) {
        bool out = causal && t > row;
        if (!causal && slots.holds[t] > 0) score[t] += mask_at(a, b, head * w.share + i / a.rows, row, slots.position[t], out);
        if (out) score[t] = -INFINITY;
    }
}

// Scores of one row with its offset and mask, -inf where a slot is not read; returns the largest score so far.
inline float complete_scores(const Work &w, const Item &item, int segment, int m, float *score, const BlockSlots &block, int token, int tokens,
                             float offset_of_row) {
    const Attend &a = *w.a;
    const Slots &slots = block.of[m / w.R % item.sequences];
    const bool causal = segment == NEW && !a.mask && a.rows == a.new_tokens;
    const Vec offset = broadcast(offset_of_row), hidden = broadcast(-INFINITY);
    for (int t = 0; t < BLOCK; t += LANES) {
        Vec x = fma(load(score + t), load(block.key_scale + t), add(offset, load(slots.added + t)));
        store(score + t, select_positive(load(slots.holds + t), x, hidden));
    }
    if (causal || (a.mask && !mask_is_shared(a))) mask_row(w, item, segment, m, score, slots, tokens, causal);
    if (known_importance(w, segment)) keep_newest(w, item, segment, m, score, token, tokens);
    Vec top = load(score);
    for (int t = LANES; t < BLOCK; t += LANES) top = maximum(top, load(score + t));
    const float best = largest(top);
    return best > item.top[m] ? best : item.top[m];
}

// Scores become weights relative to the largest so far, times the values' scales; what was summed before is scaled to it. Row by row in
// each step, so that rows do not wait for one another's reductions.
__attribute__((noinline)) void weigh_scores(const Work &w, const Item &item, int segment, int M, const Local &local, const BlockSlots &slots, int token,
                                            int tokens, const float *offsets, int width) {
    for (int m = 0; m < M; ++m)
        local.best[m] = complete_scores(w, item, segment, m, local.score + m * BLOCK, slots, token, tokens, offsets ? offsets[m] : 0);
    for (int m = 0; m < M; ++m) {
        float *score = local.score + m * BLOCK;
        const float *holds = slots.of[m / w.R % item.sequences].holds;
        Vec minus = broadcast(local.best[m] == -INFINITY ? 0 : -local.best[m]), total = zero(), most = zero();
        for (int t = 0; t < BLOCK; t += LANES) {
            Vec weight = exp_of(add(load(score + t), minus));
            total = add(total, weight);
            weight = select_positive(load(holds + t), scaled(weight, load(slots.value_scale + t)), zero());
            most = maximum(most, weight);
            store(score + t, weight);
        }
        local.total[m] = sum(total);
        local.most[m] = INTEGERS ? largest(most) : 0;
    }
    for (int m = 0; m < M; ++m) {
        // NaN shows in the sum, and must be seen where nothing else was
        const float best = local.best[m] == -INFINITY && local.total[m] != local.total[m] ? 0 : local.best[m], before = item.top[m];
        if (best > before && before > -INFINITY) {
            float shrink = exp_of(before - best), *sums = item.sums + (int64_t)m * width;
            item.total[m] *= shrink;
            for (int c = 0; c < width; ++c) sums[c] *= shrink;
        }
        item.top[m] = best;
        item.total[m] += local.total[m];
    }
#if defined(APACK_VNNI)
    for (int m = 0; m < M && is_packed(w.segments[segment].value); ++m) {
        const int at = m * BLOCK;
        const Vec mass = quantize<8>(local.score + at, BLOCK, inverse_of(local.most[m]), local.weight_terms[0] + at, local.weight_terms[1] + at);
        local.weight_scale[m] = {local.most[m] / MOST, local.most[m] / MOST * sum(mass)};
    }
#endif
}

__attribute__((noinline)) void sum_values(const Work &w, const Item &item, int segment, int token, int tokens, const BlockSlots &slots, const Local &local) {
    const Attend &a = *w.a;
    const Segment &s = w.segments[segment];
    int kind = kind_of(segment), per_group = heads_per_group(w, kind), M = per_group * item.rows, D = (int)a.value_dim;
    if (is_packed(s.value)) {
        bool partial = segment == VISION && a.tiers && token >= a.tiers[2 * item.b];
        // The leading components are in the same columns, whatever their number, unless a band ends inside of a vector.
        const Columns &all = w.value[kind - 1], &columns = partial ? w.partial[kind - 1] : all;
        Packed values = packed_of(s.value, a.batch, item.b, item.group, s.slots, columns.bytes);
        return sum_packed(values, columns, all, M, token, tokens, slots.all ? nullptr : slots.holds, item.sums, local);
    }
    for (int h = 0; h < per_group; ++h) {
        int head = item.group * per_group + h, source_heads = (int)(a.heads / s.value.groups), step = TILE / D;
        const float *weight = local.score + (int64_t)h * item.rows * BLOCK;
        float *sums = item.sums + (int64_t)h * item.rows * D;
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
            weigh(weight + t, BLOCK, item.rows, rows, stride, D, n, sums, D);
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
