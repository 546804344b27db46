// `apack::unpack` (kernels/unpack/reference.py is the specification).
//
// A task decodes one head of one stream for a piece of a segment: the head's columns of the decoder, times the steps, are laid out as
// panels once; then, for blocks of tokens, codes to floats, times the panels, rotated forward, interleaved, to the tokens' positions.
#pragma once

#include "codes.h"
#include "products.h"
#include "scratch.h"
#include "segments.h"
#include "team.h"
#include "threads.h"

namespace {

constexpr int PANEL = VECTORS * LANES;  // columns of a decoder that a product keeps in registers
constexpr int COMPONENTS_AT_ONCE = 64;
constexpr int DECODED_PIECE = 512;      // slots of a task

struct Unpacking {
    const Unpack *u;
    const Segment *segments;     // of a State
    Columns columns[2][MAX_PACKED];  // of K and V
    int used[TAIL + 1];          // slots up to the last one that holds a token, by segment
    uint8_t *stored;             // [B][tokens]: whether a slot holds the position
};

// What a thread works on.
struct Decoding {
    float *panels, *tile;       // [D / PANEL][columns][PANEL], [BLOCK][COMPONENTS_AT_ONCE]
    float *rows, *row, *mean;   // [BLOCK][D, rounded up to vectors], [D], [D]
    float *halves;              // [D]
    uint8_t *codes;             // one token's, and a vector
};

inline const Source &source_of(const Unpacking &w, int stream, int segment) {
    return stream ? w.segments[segment].value : w.segments[segment].key;
}

inline void *restored_row(const Unpacking &w, int stream, int64_t b, int64_t head, int64_t position) {
    const Restored &side = w.u->sides[stream];
    int64_t row = (b * w.u->heads + head) * w.u->tokens + position;
    return (char *)side.out + row * side.width * element_bytes(side.dtype);
}

// Position of a slot, or -1 where it holds no token.
inline int64_t held_position(const Unpacking &w, int segment, int64_t b, int64_t slot) {
    const Unpack &u = *w.u;
    const Segment &s = w.segments[segment];
    if (segment == TAIL) return tail_position(u.cursor, u.new_tokens, s.slots, slot);
    int32_t position = s.positions[stored_row(s, b) * s.slots + slot];
    return position < stored_end(u.cursor, u.new_tokens) ? position : -1;
}

// Marks the positions that slots hold.
inline void find_stored(Unpacking &w) {
    const Unpack &u = *w.u;
    memset(w.stored, 0, u.batch * u.tokens);
    for (int segment = FIRST; segment <= TAIL; ++segment)
        for (int64_t b = 0; b < u.batch; ++b)
            for (int64_t slot = 0; slot < w.segments[segment].slots; ++slot) {
                int64_t position = held_position(w, segment, b, slot);
                if (position < 0) continue;
                w.stored[b * u.tokens + position] = 1;
                if (slot >= w.used[segment]) w.used[segment] = (int)slot + 1;
            }
}

// A head's columns of the decoder, each row times its step; zeros where a tile's columns and vectors are padded.
inline void lay_out_panels(const Source &s, const Columns &columns, int64_t basis, int64_t W, int64_t inside, int D, const Decoding &d) {
    int r = components_of(s);
    for (const Band &band : columns.band)
        for (int c = 0; c < band.columns; ++c) {
            float *to = d.panels + (int64_t)(band.column + c) * PANEL;
            int64_t component = basis * r + band.component + c;
            const float *row = c < band.count ? basis_row(s, s.decoder, component * W + inside, D, d.row) : nullptr;
            Vec step = broadcast(row ? s.step[component] : 0);
            for (int j = 0; j < D; j += LANES) {
                int n = D - j < LANES ? D - j : LANES;
                Vec x = !row ? zero() : n == LANES ? load(row + j) : load_some(row + j, n);
                store(to + (int64_t)(j / PANEL) * columns.count * PANEL + j % PANEL, scaled(x, step));
            }
        }
}

inline int pairs_to_interleave(const Unpacking &w, int stream) {
    return stream ? 0 : (int)w.u->interleaved_pairs;
}

// Components i and i + pairs go to 2 i and 2 i + 1.
inline void interleave(float *row, int pairs, float *halves) {
    memcpy(halves, row, 2 * pairs * sizeof(float));
    for (int i = 0; i < pairs; ++i) {
        row[2 * i] = halves[i];
        row[2 * i + 1] = halves[pairs + i];
    }
}

// A row of floats, which is changed, as a token of the result, or a row as it is stored.
inline void write_row(const Unpacking &w, int stream, int64_t b, int64_t head, int64_t position, float *row, const Decoding &d) {
    const Restored &side = w.u->sides[stream];
    if (int pairs = pairs_to_interleave(w, stream)) interleave(row, pairs, d.halves);
    store_row(restored_row(w, stream, b, head, position), side.dtype, row, (int)side.width);
}

inline void copy_row(const Unpacking &w, int stream, int64_t b, int64_t head, int64_t position, const void *from, int64_t dtype, const Decoding &d) {
    const Restored &side = w.u->sides[stream];
    if (dtype == side.dtype && !pairs_to_interleave(w, stream)) {
        memcpy(restored_row(w, stream, b, head, position), from, side.width * element_bytes(dtype));
        return;
    }
    convert_row(d.row, from, dtype, (int)side.width);
    write_row(w, stream, b, head, position, d.row, d);
}

// Slots [begin, end) of a packed stream, one head.
inline void decode_slots(const Unpacking &w, int stream, int segment, int64_t b, int64_t head, int begin, int end, const Decoding &d) {
    const Unpack &u = *w.u;
    int64_t slots = w.segments[segment].slots;
    const Source &s = source_of(w, stream, segment);
    const Columns &columns = w.columns[stream][segment - 1];
    const Rotations &rotations = u.rotations[segment - 1];
    int D = (int)u.sides[stream].width, padded = round_up(D, LANES), per_group = (int)(u.heads / s.groups);
    int64_t group = head / per_group, inside = head % per_group * D, W = (int64_t)per_group * D;
    int64_t basis = basis_at(s, b, group);
    bool rotated = stream == 0 && rotations.data;
    Packed codes = packed_of(s, u.batch, b, group, slots, columns.bytes);
    lay_out_panels(s, columns, basis, W, inside, D, d);
    const float *mean = basis_row(s, s.mean, basis * W + inside, D, d.mean);
    for (int token = begin; token < end; token += BLOCK) {
        int tokens = end - token < BLOCK ? end - token : BLOCK;
        int64_t positions[BLOCK], last = -1;
        for (int t = 0; t < tokens; ++t) {
            positions[t] = held_position(w, segment, b, token + t);
            if (positions[t] >= 0) last = t;
        }
        if (last < 0) continue;
        memset(d.rows, 0, (size_t)tokens * padded * sizeof(float));
        for (int c = 0; c < columns.count; c += COMPONENTS_AT_ONCE) {
            int n = columns.count - c < COMPONENTS_AT_ONCE ? columns.count - c : COMPONENTS_AT_ONCE;
            unpack_tile(codes, columns, c, n, token, tokens, nullptr, d.tile, d.codes);
            for (int j = 0; j < padded; j += PANEL) {
                const float *panel = d.panels + ((int64_t)j / PANEL * columns.count + c) * PANEL;
                weigh(d.tile, n, tokens, panel, PANEL, padded - j < PANEL ? padded - j : PANEL, n, d.rows + j, padded);
            }
        }
        for (int t = 0; t <= last; ++t) {
            if (positions[t] < 0) continue;
            float *row = d.rows + (int64_t)t * padded;
            float scale = s.scale ? half_to_float(s.scale[(stored_row(w.segments[segment], b) * s.groups + group) * slots + token + t]) : 1;
            for (int i = 0; i < D; ++i) row[i] = row[i] * scale + mean[i];
            if (rotated) rotation_forward(row, rotation_of(rotations, b, token + t), rotations.pairs);
            write_row(w, stream, b, head, positions[t], row, d);
        }
    }
}

// Slots [begin, end) of a stream that is kept as it is, one head.
inline void copy_slots(const Unpacking &w, int stream, int segment, int64_t b, int64_t head, int begin, int end, const Decoding &d) {
    const Unpack &u = *w.u;
    const Source &s = source_of(w, stream, segment);
    int64_t width = u.sides[stream].width;
    const Rotations *rotations = stream == 0 && segment >= FIRST_PACKED && segment < TAIL ? &u.rotations[segment - 1] : nullptr;
    for (int slot = begin; slot < end; ++slot) {
        int64_t position = held_position(w, segment, b, slot);
        if (position < 0) continue;
        const void *from = dense_row(s, b, head, slot, u.heads / s.groups, width);
        if (!rotations || !rotations->data) {
            copy_row(w, stream, b, head, position, from, s.dtype, d);
            continue;
        }
        convert_row(d.row, from, s.dtype, (int)width);
        rotation_forward(d.row, rotation_of(*rotations, b, slot), rotations->pairs);
        write_row(w, stream, b, head, position, d.row, d);
    }
}

// One head's new tokens, and zeros at positions that nothing holds.
inline void fill_rest(const Unpacking &w, int stream, int64_t b, int64_t head, const Decoding &d) {
    const Unpack &u = *w.u;
    const Restored &side = u.sides[stream];
    int64_t before = u.cursor[0] - u.new_tokens;
    for (int64_t position = 0; position < u.tokens; ++position)
        if (!w.stored[b * u.tokens + position])
            memset(restored_row(w, stream, b, head, position), 0, side.width * element_bytes(side.dtype));
    for (int64_t i = 0; i < u.new_tokens; ++i) {
        int64_t at = b * side.strides[0] + head * side.strides[1] + i * side.strides[2];
        copy_row(w, stream, b, head, before + i, (const char *)side.fresh + at * element_bytes(side.dtype), side.dtype, d);
    }
}

// 0; 1 where memory ran out, 2 where more tokens are held than are wanted.
inline int run_unpack(const Unpack &u, const State &state) {
    if (u.cursor[0] > u.tokens) return 2;
    Unpacking w = {&u, state.segments, {}, {}, nullptr};
    int64_t panels = 0, widest = 0, bytes = 0;
    for (int stream = 0; stream < 2; ++stream) {
        int64_t padded = round_up(u.sides[stream].width, PANEL);
        widest = padded > widest ? padded : widest;
        for (int segment = FIRST_PACKED; segment < TAIL; ++segment) {
            const Source &s = source_of(w, stream, segment);
            if (!is_packed(s)) continue;
            Columns &columns = w.columns[stream][segment - 1] = columns_of(s, components_of(s));
            panels = columns.count * padded > panels ? columns.count * padded : panels;
            bytes = columns.bytes > bytes ? columns.bytes : bytes;
        }
    }
    auto lay_out = [&](Arena &arena) {
        Decoding d;
        d.panels = arena.floats(panels);
        d.tile = arena.floats(BLOCK * COMPONENTS_AT_ONCE);
        d.rows = arena.floats(BLOCK * widest);
        d.row = arena.floats(widest);
        d.mean = arena.floats(widest);
        d.halves = arena.floats(widest);
        d.codes = (uint8_t *)arena.take(bytes + GRAIN);
        return d;
    };
    Arena count = {};
    lay_out(count);
    size_t counters = Team::bytes(u.threads), shared = counters + (u.batch * u.tokens + 63) / 64 * 64;
    char *memory = scratch(shared + count.size * u.threads);
    if (!memory) return 1;
    Team team = {(int)u.threads, (Counter *)memory, {}};
    memset((void *)team.next, 0, counters);
    w.stored = (uint8_t *)memory + counters;
    find_stored(w);
    int64_t pieces[TAIL + 1], of_head = 1;
    for (int segment = FIRST; segment <= TAIL; ++segment)
        of_head += pieces[segment] = (w.used[segment] + DECODED_PIECE - 1) / DECODED_PIECE;
    on_threads(u.threads, [&](int thread) {
        Arena arena = {memory + shared + count.size * thread, 0};
        Decoding d = lay_out(arena);
        team.share(0, thread, 2 * u.batch * u.heads * of_head, [&](int64_t i) {
            int64_t piece = i % of_head, head = i / of_head % u.heads, b = i / of_head / u.heads % u.batch;
            int stream = (int)(i / of_head / u.heads / u.batch), segment = FIRST;
            while (segment <= TAIL && piece >= pieces[segment]) piece -= pieces[segment++];
            if (segment > TAIL) return fill_rest(w, stream, b, head, d);
            int begin = (int)piece * DECODED_PIECE, end = begin + DECODED_PIECE;
            auto run = is_packed(source_of(w, stream, segment)) ? decode_slots : copy_slots;
            run(w, stream, segment, b, head, begin, end < w.used[segment] ? end : w.used[segment], d);
        });
    });
    return 0;
}

}  // namespace
