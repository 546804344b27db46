// What Python passes: every field takes eight bytes, in this order (kernels/structs.py, places.cpp).
#pragma once

#include <stdint.h>

#include "bands.h"

namespace {

constexpr int MAX_PACKED = 5;

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, UINT8 = 3 };

// Segments. Packed ones follow the first; where there are fewer than the most, those that are missing have no slots.
enum { FIRST = 0, FIRST_PACKED = 1, TAIL = FIRST_PACKED + MAX_PACKED, NEW, SEGMENTS };

// The packed segments of a cache with tiers.
enum { VISION = 1, TEXT = 2 };

// One stream of one segment: packed codes, or heads as they are. Strides in elements.
struct Source {
    const void *data;
    int64_t dtype, batch_stride, group_stride, token_stride, groups;
    const uint16_t *scale;
    const void *mean, *decoder;
    const float *step;
    int64_t basis_dtype, basis_batch, bands[BANDS];
};

// batch: rows of positions and of token scales; where it is 1, all sequences share them, and the strides of the batch are 0.
struct Segment {
    int64_t slots, batch;
    const int32_t *positions;
    Source key, value;
};

// What stays where it is from step to step.
struct State {
    Segment segments[TAIL + 1];
};

// Importance of a segment's slots, and how the newest token's attention goes into it; null where nothing needs it.
struct Importance {
    float *known;
    double keep, add;
};

// How the keys of each block of slots were rotated back: cosine and sine of every pair, [batch][blocks][2][pairs]; null for not rotated.
struct Rotations {
    const float *data;
    int64_t batch, blocks, pairs, block;
};

// Cosine and sine of a slot's block.
inline const float *rotation_of(const Rotations &t, int64_t b, int64_t slot) {
    return t.data + ((t.batch == 1 ? 0 : b) * t.blocks + slot / t.block) * 2 * t.pairs;
}

// A row's leading 2 pairs rotated by one block's cosine and sine.
inline void rotation_forward(float *row, const float *rotation, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
        float first = row[i], second = row[pairs + i], cosine = rotation[i], sine = rotation[pairs + i];
        row[i] = first * cosine - second * sine;
        row[pairs + i] = second * cosine + first * sine;
    }
}

inline void rotate_back(float *row, const float *rotation, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
        float first = row[i], second = row[pairs + i], cosine = rotation[i], sine = rotation[pairs + i];
        row[i] = first * cosine + second * sine;
        row[pairs + i] = second * cosine - first * sine;
    }
}

struct Attend {
    int64_t threads, batch, heads, query_heads, rows, new_tokens, head_dim, value_dim;
    const void *query;
    int64_t query_dtype, query_strides[3];
    double scale;
    void *out;
    const int64_t *cursor;
    const void *mask;
    int64_t mask_is_bool, mask_strides[3], mask_length;
    const int32_t *tiers;
    int64_t partial;
    Importance importance[2];
    const void *key, *value;
    int64_t key_dtype, key_strides[3], value_dtype, value_strides[3];
    Rotations rotations[MAX_PACKED];
};

// K or V of an append: the new tokens, the tail, and the text stream that takes what leaves it.
struct Side {
    const void *fresh;
    int64_t dtype, strides[3], width;
    const void *tail;
    int64_t tail_dtype, tail_strides[3];
    Source packed;
};

// unit: deviations that a step is of a Gaussian at a token scale of one, by band width (kernels/format.py, token_scales).
struct Quantizer {
    double unit[BANDS], least_scale, greatest_half;
};

struct Append {
    int64_t threads, batch, heads, new_tokens, tail_slots, capacity;
    int64_t *cursor;
    Quantizer quantizer;
    Side sides[2];
    Rotations rotations;
};

// Tokens [B][G][tokens][width] to a stream of as many slots.
struct Encode {
    int64_t threads, batch, tokens, width;
    const void *data;
    int64_t dtype, strides[3];
    Quantizer quantizer;
    Source to;
};

// K or V of an unpack: the new tokens, and where all of them go, [B][H][tokens][width] in the new ones' dtype.
struct Restored {
    const void *fresh;
    int64_t dtype, strides[3], width;
    void *out;
};

struct Unpack {
    int64_t threads, batch, heads, new_tokens, tokens;
    const int64_t *cursor;
    Restored sides[2];
    Rotations rotations[MAX_PACKED];
    int64_t interleaved_pairs;
};

}  // namespace
