// `apack::attend` and `apack::attend_tiers` in one pass over the codes (kernels/attend/reference.py is the specification).
//
// Queries are projected into each packed stream's components once. Then, for blocks of tokens that stay in the first-level cache:
// codes to floats, scores of all query heads of a head group, online softmax, weights times components. Parts of the token range
// run in parallel and merge by their maxima; only then are the sums decoded.
#pragma once

#include "attend_block.h"
#include "attend_project.h"
#include "team.h"
#include "threads.h"

namespace {

constexpr int PIECE = 512;  // slots of a task that does little for each

inline void run_part(const Work &w, const Item &item, int segment, int begin, int end, const Local &local) {
    const Attend &a = *w.a;
    int kind = kind_of(segment), M = heads_per_group(w, kind) * item.rows;
    bool packed = is_packed(w.segments[segment].key);
    int columns = packed ? w.key[kind - 1].count : 0, ahead = packed ? w.ahead[kind - 1] : 0;
    Latents latents = {}, rotated = {};
    if (packed && !ahead) {
        int64_t row = row_of_all(w, kind, item.b, item.group * heads_per_group(w, kind));
        latents = latents_of(w, kind, w.latent[kind - 1] + row * columns, w.offset[kind - 1] + row, M, local);
    }
    const int64_t key_block = ahead ? a.rotations[segment - 1].block : 0;
    int64_t known = 0, end_known = 0;  // blocks of relative keys whose latents are there
    BlockSlots slots;
    int tokens;
    for (int token = begin; token < end; token += tokens) {
        tokens = end - token < BLOCK ? end - token : BLOCK;
        if (segment == VISION && a.tiers && token < a.tiers[2 * item.b] && a.tiers[2 * item.b] < token + tokens)
            tokens = a.tiers[2 * item.b] - token;
        if (ahead && token % key_block + tokens > key_block) tokens = (int)(key_block - token % key_block);
        if (!read_slots(w, item, segment, token, tokens, local.slots, slots)) {
            hide_block(w, item, segment, token, tokens);
            continue;
        }
        if (ahead) {
            int64_t block = token / key_block, last = (end - 1) / key_block;
            if (block >= end_known) {
                known = block;
                end_known = block + ahead < last + 1 ? block + ahead : last + 1;
                project_rotated(w, item, segment, known, (int)(end_known - known), local);
                rotated = latents_of(w, kind, local.latent, local.offset, (int)(end_known - known) * M, local);
            }
            latents = rotated.from_row((block - known) * M, columns);
        }
        prefetch_codes(w, item, segment, token + tokens, 0);
        score_block(w, item, segment, token, tokens, latents, local);
        prefetch_codes(w, item, segment, token + tokens, 1);
        weigh_scores(w, item, segment, M, local, slots, token, tokens, latents.offset, w.width[kind]);
        prefetch_codes(w, item, segment, token + tokens, 2);
        sum_values(w, item, segment, token, tokens, slots, local);
        prefetch_codes(w, item, segment, token + tokens, 3);
    }
}

inline void run_item(const Work &w, const Item &item, const Local &local) {
    int M = heads_per_group(w, item.segment) * item.rows;
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
    const Item *items[KINDS];
    int at[KINDS];
    for (int kind = 0; kind < KINDS; ++kind) {
        int per_group = heads_per_group(w, kind), groups = (int)a.heads / per_group;
        items[kind] = w.items + w.first_item[kind] + (b / w.together[kind] * groups + head / per_group) * w.parts[kind];
        at[kind] = row_in_item(w, kind, b, head);
    }
    for (int m = 0; m < R; ++m) {
        top[m] = -INFINITY;
        for (int kind = 0; kind < KINDS; ++kind)
            for (int i = 0; i < w.parts[kind]; ++i) {
                float other = items[kind][i].top[at[kind] + m];
                if (!(other <= top[m])) top[m] = other;
            }
        float total = 0;
        for (int kind = 0; kind < KINDS; ++kind)
            for (int i = 0; i < w.parts[kind]; ++i) {
                float other = items[kind][i].top[at[kind] + m];
                if (other > -INFINITY) total += items[kind][i].total[at[kind] + m] * exp_of(other - top[m]);
            }
        inverse[m] = total > 0 || total != total ? 1 / total : 0;
    }
    memset(out, 0, (size_t)R * D * sizeof *out);
    for (int kind = 0; kind < KINDS; ++kind) {
        if (!w.parts[kind]) continue;
        const Source &s = w.segments[kind].value;
        bool packed = kind && is_packed(s);
        int width = w.width[kind];
        float *to = packed ? latent : out;
        if (packed) memset(latent, 0, (size_t)R * width * sizeof *latent);
        int per_group = heads_per_group(w, kind);
        int64_t basis = packed ? basis_at(s, b, head / per_group) : 0;
        int64_t W = (int64_t)per_group * D, inside = head % per_group * D;
        const float *mean = packed ? basis_row(s, s.mean, basis * W + inside, D, tile) : nullptr;
        for (int i = 0; i < w.parts[kind]; ++i)
            for (int m = 0; m < R; ++m) {
                const Item &item = items[kind][i];
                float other = item.top[at[kind] + m];
                if (other == -INFINITY) continue;
                float share = exp_of(other - top[m]) * inverse[m];
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
            for (int c = 0; c < band.count; c += most) {
                int n = band.count - c < most ? band.count - c : most;
                const FloatRows rows = float_rows(s.decoder, s.basis_dtype, from + c * W, W, n, D, tile);
                weigh(latent + band.column + c, width, R, rows.row, rows.stride, D, n, out, D);
            }
        }
    }
    for (int m = 0; m < R; ++m) {
        int64_t to = ((b * a.query_heads + head * w.share + m / a.rows) * a.rows + m % a.rows) * D;
        store_row((char *)a.out + to * element_bytes(a.query_dtype), a.query_dtype, out + m * D, D);
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

// Items of all kinds by how far on their heads are, so that a thread's part of the items has the heads of its part of the queries.
inline void order_items(const Work &w) {
    int64_t at[KINDS] = {}, count[KINDS];
    for (int kind = 0; kind < KINDS; ++kind)
        count[kind] = sets_of(w, kind) * (w.a->heads / heads_per_group(w, kind)) * w.parts[kind];
    for (int i = 0; i < w.item_count; ++i) {
        int next = -1;
        for (int kind = 0; kind < KINDS; ++kind)
            if (at[kind] < count[kind] && (next < 0 || (2 * at[kind] + 1) * count[next] < (2 * at[next] + 1) * count[kind])) next = kind;
        w.order[i] = w.first_item[next] + (int)at[next]++;
    }
}

// 0, or 1 where memory ran out.
inline int run_attend(const Attend &a, const State &state, const Extras &extras = {}) {
    Work w = work_of(a, state, extras);
    Arena count = {};
    lay_out(w, count);
    Arena own = {};
    lay_out_local(w, own);
    char *memory = scratch(count.size + own.size * a.threads + Team::bytes(a.threads));
    if (!memory) return 1;
    Arena arena = {memory, 0};
    lay_out(w, arena);
    int64_t pairs = a.batch * a.heads, slot_tasks = 0, transposed = 0;
    for (int kind = 1; kind < KINDS; ++kind) transposed += transposed_heads(w, kind);
    for (int segment = 0; segment < SEGMENTS; ++segment) slot_tasks += a.batch * pieces_of(w.used[segment]);
    Team team = {(int)a.threads, (Counter *)(memory + count.size + own.size * a.threads), {}};
    memset((void *)team.next, 0, Team::bytes(a.threads));
    order_items(w);
    on_threads(a.threads, [&](int thread) {
        Arena part = {memory + count.size + own.size * thread, 0};
        const Local local = lay_out_local(w, part);
        if (local.matrices) *local.matrices = {};
        auto prepare = [&](int64_t i) {
            for (int kind = 1; kind < KINDS; ++kind) {
                int64_t heads = transposed_heads(w, kind);
                auto transpose = transpose_decoder<Floats>;
#if defined(APACK_BFLOAT16)
                if (w.pairs[kind - 1]) transpose = transpose_decoder<Pairs>;
#endif
                if (i < heads) return transpose(w, kind, i / a.heads, i % a.heads);
                i -= heads;
            }
            if (i < pairs) {
                load_queries(w, i / a.heads, i % a.heads);
                for (int kind = 1; kind < KINDS; ++kind)
                    if (w.used[kind] && is_packed(w.segments[kind].key) && !w.ahead[kind - 1]) project_queries(w, kind, i / a.heads, i % a.heads, local.tile);
                return;
            }
            i -= pairs;
            for (int segment = 0; segment < SEGMENTS; ++segment) {
                int64_t pieces = pieces_of(w.used[segment]);
                if (i < a.batch * pieces) {
                    int begin = (int)(i % pieces) * PIECE, used = round_up(w.used[segment], BLOCK);
                    for (int t = begin; t < begin + PIECE && t < used; t += BLOCK) find_slots(w, segment, i / pieces, t);
                    return;
                }
                i -= a.batch * pieces;
            }
        };
        team.share(0, thread, transposed + pairs + slot_tasks, prepare);
        team.share(1, thread, w.item_count, [&](int64_t i) { run_item(w, w.items[w.order[i]], local); });
        team.share(2, thread, pairs, [&](int64_t i) { finish_head(w, i / a.heads, i % a.heads, local.out, local.merged, local.tile); });
        for (int segment = VISION; segment <= TEXT; ++segment) {
            if (!known_importance(w, segment)) continue;
            int64_t pieces = pieces_of(w.used[segment]);
            team.share(2 + segment, thread, a.batch * pieces, [&](int64_t i) {
                int begin = (int)(i % pieces) * PIECE, end = begin + PIECE < w.used[segment] ? begin + PIECE : w.used[segment];
                update_importance(w, segment, i / pieces, begin, end);
            });
        }
        if (local.matrices) release(*local.matrices);
    });
    return 0;
}

}  // namespace
