// Where the fields of what Python passes are, so that it can tell whether it lays them out alike (kernels/structs.py).
#include <stddef.h>
#include <string.h>

#include "arguments.h"

namespace {

struct Place {
    const char *name;
    size_t bytes;
};

#define SIZE(kind) {#kind, sizeof(kind)}
#define AT(kind, field) {#kind "." #field, offsetof(kind, field)}

constexpr Place PLACES[] = {
    SIZE(Source), AT(Source, data), AT(Source, dtype), AT(Source, batch_stride), AT(Source, group_stride), AT(Source, token_stride),
    AT(Source, groups), AT(Source, scale), AT(Source, mean), AT(Source, decoder), AT(Source, step), AT(Source, basis_dtype),
    AT(Source, basis_batch), AT(Source, bands),
    SIZE(Segment), AT(Segment, slots), AT(Segment, batch), AT(Segment, positions), AT(Segment, key), AT(Segment, value),
    SIZE(State), AT(State, segments),
    SIZE(Importance), AT(Importance, known), AT(Importance, keep), AT(Importance, add),
    SIZE(Rotations), AT(Rotations, data), AT(Rotations, batch), AT(Rotations, blocks), AT(Rotations, pairs),
    AT(Rotations, block),
    SIZE(Attend), AT(Attend, threads), AT(Attend, batch), AT(Attend, heads), AT(Attend, query_heads), AT(Attend, rows),
    AT(Attend, new_tokens), AT(Attend, head_dim), AT(Attend, value_dim), AT(Attend, query), AT(Attend, query_dtype),
    AT(Attend, query_strides), AT(Attend, scale), AT(Attend, out), AT(Attend, cursor), AT(Attend, mask), AT(Attend, mask_is_bool),
    AT(Attend, mask_strides), AT(Attend, mask_length), AT(Attend, tiers), AT(Attend, partial), AT(Attend, importance),
    AT(Attend, key), AT(Attend, value), AT(Attend, key_dtype), AT(Attend, key_strides), AT(Attend, value_dtype),
    AT(Attend, value_strides), AT(Attend, rotations),
    SIZE(Side), AT(Side, fresh), AT(Side, dtype), AT(Side, strides), AT(Side, width), AT(Side, tail), AT(Side, tail_dtype),
    AT(Side, tail_strides), AT(Side, packed),
    SIZE(Quantizer), AT(Quantizer, unit), AT(Quantizer, least_scale), AT(Quantizer, greatest_half),
    SIZE(Append), AT(Append, threads), AT(Append, batch), AT(Append, heads), AT(Append, new_tokens), AT(Append, tail_slots),
    AT(Append, capacity), AT(Append, cursor), AT(Append, quantizer), AT(Append, sides), AT(Append, rotations),
    SIZE(Encode), AT(Encode, threads), AT(Encode, batch), AT(Encode, tokens), AT(Encode, width), AT(Encode, data),
    AT(Encode, dtype), AT(Encode, strides), AT(Encode, quantizer), AT(Encode, to),
    SIZE(Restored), AT(Restored, fresh), AT(Restored, dtype), AT(Restored, strides), AT(Restored, width), AT(Restored, out),
    SIZE(Unpack), AT(Unpack, threads), AT(Unpack, batch), AT(Unpack, heads), AT(Unpack, new_tokens), AT(Unpack, tokens),
    AT(Unpack, cursor), AT(Unpack, sides), AT(Unpack, rotations), AT(Unpack, interleaved_pairs),
};

}  // namespace

// Bits of a band, 0 past the last one.
extern "C" int64_t apack_bits(int64_t band) { return band < BANDS ? WIDTHS[band] : 0; }

// Offset of `Kind.field`, or size of `Kind`, in bytes; -1 for what there is not.
extern "C" int64_t apack_place(const char *name) {
    for (const Place &place : PLACES)
        if (!strcmp(place.name, name)) return (int64_t)place.bytes;
    return -1;
}
