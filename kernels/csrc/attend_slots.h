// Which slots an attend reads, and what is added to their scores.
#pragma once

#include "attend_layout.h"

namespace {

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

// Slots [begin, begin + BLOCK) of a segment: which are read, and what the mask adds to all heads' scores.
__attribute__((noinline)) void find_slots(const Work &w, int segment, int64_t b, int begin) {
    const Attend &a = *w.a;
    int64_t at = b * round_up(w.used[segment], BLOCK) + begin;
    int32_t *position = w.position[segment] + at;
    float *holds = w.holds[segment] + at, *added = w.added[segment] + at;
    const Segment &s = w.segments[segment];
    int end = w.used[segment] - begin < BLOCK ? w.used[segment] - begin : BLOCK;
    if (segment == TAIL || segment == NEW) {
        for (int t = 0; t < end; ++t) position[t] = (int32_t)position_of(w, segment, b, begin + t);
    } else {
        const int32_t *stored = s.positions + stored_row(s, b) * s.slots + begin, most = (int32_t)stored_end(a.cursor, a.new_tokens);
        int read = segment == VISION && a.tiers ? a.tiers[2 * b + 1] - begin : BLOCK;
        for (int t = 0; t < end; ++t) position[t] = stored[t] < most && t < read ? stored[t] : -1;
    }
    for (int t = end; t < BLOCK; ++t) position[t] = -1;
    for (int t = 0; t < BLOCK; ++t) {
        holds[t] = position[t] >= 0 ? 1.0f : 0.0f;
        added[t] = 0;
    }
    if (!a.mask || !mask_is_shared(a)) return;
    for (int t = 0; t < end; ++t) {
        if (position[t] < 0) continue;
        bool hidden = false;
        added[t] = mask_at(a, b, 0, 0, position[t], hidden);
        if (hidden) holds[t] = 0;
    }
}

// False where none of the block's slots is read.
__attribute__((noinline)) bool read_slots(const Work &w, const Item &item, int segment, int token, int tokens, Slots *of, BlockSlots &slots) {
    const Segment &s = w.segments[segment];
    memset(slots.holds, 0, sizeof slots.holds);
    for (int c = 0; c < item.sequences; ++c) {
        Slots &own = of[c];
        int64_t at = (int64_t)(item.b + c) * round_up(w.used[segment], BLOCK) + token;
        memset(own.holds, 0, sizeof own.holds);
        memcpy(own.holds, w.holds[segment] + at, tokens * sizeof(float));
        memcpy(own.added, w.added[segment] + at, tokens * sizeof(float));
        memset(own.added + tokens, 0, (BLOCK - tokens) * sizeof(float));
        own.position = w.position[segment] + at;
        for (int t = 0; t < BLOCK; t += LANES) store(slots.holds + t, maximum(load(slots.holds + t), load(own.holds + t)));
    }
    slots.of = of;
    Vec ones = zero();
    for (int t = 0; t < BLOCK; t += LANES) ones = add(ones, load(slots.holds + t));
    float held = sum(ones);
    slots.all = held == BLOCK;
    if (held == 0) return false;
    const Source *sources[2] = {&s.key, &s.value};
    float *scales[2] = {slots.key_scale, slots.value_scale};
    for (int i = 0; i < 2; ++i) {
        const Source &source = *sources[i];
        bool scaled = is_packed(source) && source.scale;
        if (scaled) convert_row(scales[i], source.scale + (stored_row(s, item.b) * source.groups + item.group) * s.slots + token, FLOAT16, tokens);
        for (int t = scaled ? tokens : 0; t < BLOCK; ++t) scales[i][t] = 1;
    }
    return true;
}

}  // namespace
