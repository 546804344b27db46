// What the phases of an attend share, and where it lies in scratch memory.
#pragma once

#include "matrix.h"
#include "scratch.h"
#include "segments.h"
#include "tiles.h"

namespace {

constexpr int TILE = 8192;           // floats of unpacked codes held at once: 32 KiB
constexpr int KEY_COLUMNS = 512;     // columns of a tile of keys
constexpr int VALUE_COLUMNS = 128;   // of values
constexpr int KINDS = 1 + MAX_PACKED;  // of items: dense segments, each packed one
constexpr int MIN_PART = 256;        // tokens that are worth a part of their own
constexpr int SHARED_ROWS = 256;     // rows that read a block of shared tokens at once, at most
constexpr int ROTATED = 8;            // blocks of relative keys that queries are rotated to at once, at most
constexpr int ROTATED_LATENTS = 1 << 17;  // and floats of their latents: 512 KiB

// A sum over the lanes for each row and component costs more than transposing the decoder, where so many times the rows are a head's D.
constexpr int TRANSPOSED_ROWS = 6;

// As pairs of bfloat16 that is worth it where so many rows are multiplied with it in a call, by the decoder's floats: a large one has to
// come from further away, and is read once more.
constexpr int64_t LARGE_DECODER = 1 << 20;
constexpr int paired_rows(int64_t floats) { return floats > LARGE_DECODER ? 28 : 12; }

// Part of one head group's tokens in one segment (or in all dense ones, where `segment` is FIRST), for sequences from b on: one, or several
// that share them. Of its M rows, `[heads of a group][sequences][R]`, `rows` are of one head.
struct Item {
    int segment, b, sequences, group, begin, end, rows;
    float *top, *total, *sums;  // [M], [M], [M][width]
};

// What a processor has beside the instruction set that this was compiled for.
struct Extras {
    bool bfloat16, matrices;
};

struct Work {
    const Attend *a;
    Extras extras;
    Segment segments[SEGMENTS];
    int share, R, per_head_newest;            // query heads of a KV head, their rows, and how many of these are the newest token
    int used[SEGMENTS];                       // slots that any sequence reads, by segment
    Columns key[MAX_PACKED], value[MAX_PACKED], partial[MAX_PACKED];
    int width[KINDS];                         // columns of an item's sums
    int together[KINDS];                      // sequences of an item
    int ahead[MAX_PACKED];                    // blocks of relative keys that queries are rotated to at once; 0 for none
    bool transposes[MAX_PACKED];              // whether their decoders are transposed for that,
    bool pairs[MAX_PACKED];                   // and multiplied as bfloat16
    float *query;                             // [H][B][R][D], scaled
    float *latent[MAX_PACKED], *offset[MAX_PACKED];  // [B][H][R][columns], [B][H][R], an item's rows side by side
    float *transposed[MAX_PACKED];            // [1 or B][H][D][columns], decoders
    float *top, *inverse;                     // [B][H][R]
    float *newest[MAX_PACKED];                // [B][H][per_head_newest][used], scores of the newest token
    float *holds[SEGMENTS], *added[SEGMENTS];  // [B][used]: 1 where a slot is read, else 0; what is added to its score
    int32_t *position[SEGMENTS];              // [B][used], -1 where a slot is not read
    Item *items;
    int *order;                               // items, those of the same heads side by side
    int item_count, first_item[KINDS], parts[KINDS];
};

inline float *known_importance(const Work &w, int segment) {
    return segment == VISION || segment == TEXT ? w.a->importance[segment - 1].known : nullptr;
}

inline int kind_of(int segment) { return segment < TAIL ? segment : 0; }

inline int heads_per_group(const Work &w, int kind) { return kind == 0 ? 1 : (int)(w.a->heads / w.segments[kind].key.groups); }

// Items that a kind has for each part of a head group's tokens.
inline int64_t sets_of(const Work &w, int kind) { return (w.a->batch + w.together[kind] - 1) / w.together[kind]; }

// Sequences from b on that share an item.
inline int sequences_from(const Work &w, int kind, int64_t b) {
    int64_t left = w.a->batch - b;
    return (int)(left < w.together[kind] ? left : w.together[kind]);
}

// First row of a sequence's head among those of its item.
inline int row_in_item(const Work &w, int kind, int64_t b, int64_t head) {
    int64_t c = b % w.together[kind];
    return (int)((head % heads_per_group(w, kind) * sequences_from(w, kind, b - c) + c) * w.R);
}

// And among those of all items.
inline int64_t row_of_all(const Work &w, int kind, int64_t b, int64_t head) {
    int64_t c = b % w.together[kind], per_group = heads_per_group(w, kind);
    return ((b - c) * w.a->heads + head / per_group * per_group * sequences_from(w, kind, b - c)) * w.R + row_in_item(w, kind, b, head);
}

// Rows of a head's queries, of sequences from b on.
inline float *queries_of(const Work &w, int64_t b, int64_t head) { return w.query + (head * w.a->batch + b) * w.R * w.a->head_dim; }

// Position of a slot, or -1 where it holds no token that is read.
inline int64_t position_of(const Work &w, int segment, int64_t b, int64_t slot) {
    const Attend &a = *w.a;
    const Segment &s = w.segments[segment];
    if (segment == NEW) return a.cursor[0] - a.new_tokens + slot;
    if (segment == TAIL) return tail_position(a.cursor, a.new_tokens, s.slots, slot);
    if (segment == VISION && a.tiers && slot >= a.tiers[2 * b + 1]) return -1;
    int64_t position = s.positions[stored_row(s, b) * s.slots + slot];
    return position < stored_end(a.cursor, a.new_tokens) ? position : -1;
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

// Whether at least three quarters of the components have codes shorter than a byte: these lose far more than products of bfloat16 add.
inline bool mostly_short(const Source &s) {
    int64_t whole = 0;
    for (int i = 0; i < BANDS; ++i) whole += WIDTHS[i] < 8 ? 0 : s.bands[i];
    return 4 * whole <= components_of(s);
}

// Heads whose part of a packed segment's decoder is transposed.
inline int64_t transposed_heads(const Work &w, int kind) {
    return w.transposes[kind - 1] ? w.segments[kind].key.basis_batch * w.a->heads : 0;
}

// Lays out all scratch memory; with a null arena only its size is counted.
inline void lay_out(Work &w, Arena &arena) {
    const Attend &a = *w.a;
    int64_t rows = a.batch * a.heads * w.R;
    w.query = arena.floats(rows * a.head_dim);
    for (int i = 0; i < MAX_PACKED; ++i) {
        const Source &key = w.segments[FIRST_PACKED + i].key;
        bool reads = w.used[FIRST_PACKED + i] && is_packed(key) && !w.ahead[i];
        w.latent[i] = arena.floats(reads ? rows * w.key[i].count : 0);
        w.offset[i] = arena.floats(reads ? rows : 0);
        w.transposed[i] = arena.floats(transposed_heads(w, FIRST_PACKED + i) * a.head_dim * w.key[i].count);
        w.newest[i] = arena.floats(known_importance(w, FIRST_PACKED + i) ? a.batch * a.heads * w.per_head_newest * w.used[FIRST_PACKED + i] : 0);
    }
    for (int i = 0; i < SEGMENTS; ++i) {
        int64_t slots = a.batch * round_up(w.used[i], BLOCK);
        w.holds[i] = arena.floats(slots);
        w.added[i] = arena.floats(slots);
        w.position[i] = (int32_t *)arena.take(slots * sizeof(int32_t));
    }
    w.top = arena.floats(rows);
    w.inverse = arena.floats(rows);
    w.items = (Item *)arena.take(w.item_count * sizeof(Item));
    w.order = (int *)arena.take(w.item_count * sizeof(int));
    int at = 0;
    for (int kind = 0; kind < KINDS; ++kind) {
        w.first_item[kind] = at;
        int per_group = heads_per_group(w, kind), groups = (int)a.heads / per_group;
        for (int b = 0; b < a.batch; b += w.together[kind])
            for (int g = 0; g < groups; ++g)
                for (int i = 0; i < w.parts[kind]; ++i, ++at) {
                    int sequences = sequences_from(w, kind, b), rows_of_head = sequences * w.R, M = per_group * rows_of_head;
                    float *floats = arena.floats(2 * M + (int64_t)M * w.width[kind]);
                    if (!arena.at) continue;
                    int64_t used = w.used[kind];
                    int begin = round_up(used * i / w.parts[kind], BLOCK), end = round_up(used * (i + 1) / w.parts[kind], BLOCK);
                    end = end < used ? end : (int)used;
                    w.items[at] = Item{kind, b, sequences, g, begin, end, rows_of_head, floats, floats + M, floats + 2 * M};
                }
    }
}

inline Work work_of(const Attend &a, const State &state, const Extras &extras) {
    Work w = {};
    w.a = &a;
    w.extras = extras;
    memcpy(w.segments, state.segments, sizeof state);
    Segment &fresh = w.segments[NEW];
    fresh.slots = a.new_tokens;
    fresh.key = Source{a.key, a.key_dtype, a.key_strides[0], a.key_strides[1], a.key_strides[2], a.heads, 0, 0, 0, 0, 0, 0, {}};
    fresh.value = Source{a.value, a.value_dtype, a.value_strides[0], a.value_strides[1], a.value_strides[2], a.heads, 0, 0, 0, 0, 0, 0, {}};
    w.share = (int)(a.query_heads / a.heads);
    w.R = (int)(w.share * a.rows);
    w.per_head_newest = a.new_tokens ? w.R / (int)a.new_tokens : 0;
    for (int i = 0; i < SEGMENTS; ++i) w.used[i] = w.segments[i].slots ? used_slots(w, i) : 0;
    w.width[0] = (int)a.value_dim;
    w.parts[0] = w.together[0] = 1;
    for (int i = 0; i < MAX_PACKED; ++i) {
        const Segment &s = w.segments[FIRST_PACKED + i];
        int groups = s.slots ? (int)s.key.groups : 1;
        if (s.slots) {
            w.key[i] = columns_of(s.key, components_of(s.key));
            w.value[i] = columns_of(s.value, components_of(s.value));
            w.partial[i] = columns_of(s.value, i == 0 && a.tiers ? a.partial : components_of(s.value));
        }
        int rows_of_group = heads_per_group(w, 1 + i) * w.R, most_together = rows_of_group ? SHARED_ROWS / rows_of_group : 1;
        w.together[1 + i] = s.batch > 1 || a.tiers || most_together < 1 ? 1 : (int)(a.batch < most_together ? a.batch : most_together);
        int64_t units = sets_of(w, 1 + i) * groups, together = w.together[1 + i];
        int wanted = (int)(a.threads == 1 ? 1 : (4 * a.threads + units - 1) / units);
        int most_parts = (w.used[FIRST_PACKED + i] + MIN_PART - 1) / MIN_PART;
        // every part of relative keys reads the decoder anew
        bool rotated = is_packed(s.key) && a.rotations[i].data, even = units % a.threads == 0;
        if (most_parts > 1 && rotated && even && w.used[FIRST_PACKED + i] <= ROTATED * a.rotations[i].block) most_parts = 1;
        w.parts[1 + i] = wanted < most_parts ? wanted : most_parts;
        if (w.used[FIRST_PACKED + i] && is_packed(s.key) && a.rotations[i].data) {
            int64_t latents = rows_of_group * together * w.key[i].count, slots = w.parts[1 + i] * a.rotations[i].block;
            int64_t most = latents ? ROTATED_LATENTS / latents : ROTATED, there = (w.used[FIRST_PACKED + i] + slots - 1) / slots;
            if (most > there) most = there;
            w.ahead[i] = (int)(most < 1 ? 1 : most > ROTATED ? ROTATED : most);
            int64_t rows_of_head = together * w.R, rows = w.ahead[i] * rows_of_head, blocks = (w.used[FIRST_PACKED + i] + a.rotations[i].block - 1) / a.rotations[i].block;
            bool even = a.head_dim % (2 * LANES) == 0 && a.rotations[i].pairs % 2 == 0;
            w.pairs[i] = extras.bfloat16 && mostly_short(s.key) && even && blocks * rows_of_head >= paired_rows(a.heads * a.head_dim * w.key[i].count);
            w.transposes[i] = w.pairs[i] || (TRANSPOSES && a.head_dim % LANES == 0 && rows * TRANSPOSED_ROWS >= a.head_dim);
        }
        w.width[1 + i] = is_packed(s.value) ? w.value[i].count : heads_per_group(w, 1 + i) ? (int)a.value_dim : 0;
    }
    for (int kind = 0; kind < KINDS; ++kind)
        w.item_count += (int)(sets_of(w, kind) * (a.heads / heads_per_group(w, kind)) * w.parts[kind]);
    return w;
}

// What all heads of a sequence share in a block: whether a slot is read, what is added to its score.
struct Slots {
    float holds[BLOCK], added[BLOCK];
    const int32_t *position;
};

// What all rows of an item share: the scales of a slot's key and value, whether any sequence reads it, and whether one reads all of them.
struct BlockSlots {
    const Slots *of;  // [sequences]
    float holds[BLOCK], key_scale[BLOCK], value_scale[BLOCK];
    bool all;
};

// What a thread works on.
struct Local {
    float *tile, *score;      // [TILE], [M][BLOCK]
    float *best, *total, *most;  // [M]: of a block's rows
    Slots *slots;             // [sequences of an item]
    float *rotated;           // [heads of a group][ROTATED][rows of a head][D]
    float *latent, *offset;   // [ROTATED][M][columns], [ROTATED][M]
    int8_t *latent_terms[2], *weight_terms[2];  // [ROTATED][M][columns], [M][BLOCK], as 8-bit numbers
    Scale *latent_scale, *weight_scale;         // [ROTATED][M], [M]
    float *merged, *out;      // [R][columns], [R][D]
    uint8_t *codes;           // of a block's tokens, and a vector each
    Matrices *matrices;       // null where a processor has none
};

inline Local lay_out_local(const Work &w, Arena &arena) {
    const Attend &a = *w.a;
    int most_rows = w.R, width = (int)a.value_dim, together = 1;
    int64_t bytes = 0, rotated = 0, latents = 0, columns = 0, widest = 0;
    for (int kind = 1; kind < KINDS; ++kind) {
        if (!w.parts[kind]) continue;
        int64_t M = (int64_t)heads_per_group(w, kind) * w.together[kind] * w.R, ahead = w.ahead[kind - 1], rows = ahead ? ahead * M : M;
        auto raise = [](auto &most, int64_t n) { most = n > most ? n : most; };
        raise(most_rows, M), raise(width, w.width[kind]), raise(together, w.together[kind]);
        raise(bytes, w.key[kind - 1].bytes), raise(bytes, w.value[kind - 1].bytes);
        raise(rotated, ahead * M), raise(latents, rows), raise(columns, rows * w.key[kind - 1].count);
        raise(widest, w.key[kind - 1].count);
    }
    const int past = w.extras.matrices ? ROWS_PAST : 0;
    Local local;
    local.tile = arena.floats(TILE + LANES);
    local.score = arena.floats((int64_t)most_rows * BLOCK);
    local.best = arena.floats(most_rows);
    local.total = arena.floats(most_rows);
    local.most = arena.floats(most_rows);
    local.slots = (Slots *)arena.take(together * sizeof(Slots));
    local.rotated = arena.floats((rotated + past) * a.head_dim);
    local.latent = arena.floats(rotated ? columns : 0);
    local.offset = arena.floats(rotated);
    for (int term = 0; term < 2; ++term) {
        local.latent_terms[term] = (int8_t *)arena.take(INTEGERS ? columns + past * widest : 0);
        local.weight_terms[term] = (int8_t *)arena.take(INTEGERS ? (size_t)(most_rows + past) * BLOCK : 0);
    }
    local.latent_scale = (Scale *)arena.take(INTEGERS ? latents * sizeof(Scale) : 0);
    local.weight_scale = (Scale *)arena.take(INTEGERS ? most_rows * sizeof(Scale) : 0);
    local.merged = arena.floats((int64_t)w.R * width);
    local.out = arena.floats((int64_t)w.R * a.value_dim);
    local.codes = (uint8_t *)arena.take(BLOCK * (bytes + GRAIN));
    local.matrices = w.extras.matrices ? (Matrices *)arena.take(sizeof(Matrices)) : nullptr;
    return local;
}

}  // namespace
