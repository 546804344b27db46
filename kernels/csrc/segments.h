// Where tokens and bases lie, and which slots hold a token.
#pragma once

#include "arguments.h"
#include "vector.h"

namespace {

constexpr int BLOCK = 64;  // tokens that are worked on at once

inline int64_t element_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

// A dense source's row of one token and head; `width` values a head.
inline const void *dense_row(const Source &s, int64_t b, int64_t head, int64_t token, int64_t per_group, int64_t width) {
    int64_t at = b * s.batch_stride + head / per_group * s.group_stride + token * s.token_stride + head % per_group * width;
    return (const char *)s.data + at * element_bytes(s.dtype);
}

// The row of a sequence's positions and token scales.
inline int64_t stored_row(const Segment &s, int64_t b) { return s.batch == 1 ? 0 : b; }

// The basis of a sequence's head group.
inline int64_t basis_at(const Source &s, int64_t b, int64_t group) { return (s.basis_batch == 1 ? 0 : b) * s.groups + group; }

struct FloatRows {
    const float *row;
    int64_t stride;
};

// Rows of `width` numbers as floats, the first at `at`: where they are, or converted to `tile`.
inline FloatRows float_rows(const void *data, int64_t dtype, int64_t at, int64_t stride, int rows, int width, float *tile) {
    if (dtype == FLOAT32) return {(const float *)data + at, stride};
    for (int i = 0; i < rows; ++i) convert_row(tile + i * width, (const uint16_t *)data + at + i * stride, dtype, width);
    return {tile, width};
}

// A basis row of one head as floats: `row` of the decoder, or the mean.
inline const float *basis_row(const Source &s, const void *data, int64_t at, int n, float *buffer) {
    return float_rows(data, s.basis_dtype, at, n, 1, n, buffer).row;
}

// Positions below this are in packed segments; those of the newest tokens are not.
inline int64_t stored_end(const int64_t *cursor, int64_t new_tokens) {
    int64_t before = cursor[0] - new_tokens;
    return cursor[1] < before ? cursor[1] : before;
}

// Position that a slot of the tail ring holds, or -1 where it is empty.
inline int64_t tail_position(const int64_t *cursor, int64_t new_tokens, int64_t slots, int64_t slot) {
    int64_t offset = (slot - cursor[1]) % slots, position = cursor[1] + (offset < 0 ? offset + slots : offset);
    return position < cursor[0] - new_tokens ? position : -1;
}

}  // namespace
