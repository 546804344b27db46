// `apack::attend` on CPUs, called by PyTorch's dispatcher itself: with Python in between, a call costs 8 microseconds more.
//
// Tensors as a cache has them are served here. Everything else is handed on, as it came, to `apack::attend_any` (kernels/attend/cpu.py).
#include <string.h>

#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

#include "arguments.h"
#include "torch_abi.h"

extern "C" int64_t apack_attend(const void *arguments, const void *state, int64_t set);
extern "C" int64_t apack_instruction_set();

namespace {

constexpr int64_t MAX_HEAD_DIM = 2048;  // kernels/attend/cpu.py
constexpr Source NO_SOURCE = {nullptr, 0, 0, 0, 0, 1, nullptr, nullptr, nullptr, nullptr, 0, 0, {}};

// Where the arguments are on the stack.
enum { QUERY, KEY, VALUE, MASK, BIAS, DENSE, CODES, BASES, BANDS, POSITIONS, CURSOR, SCALE, TURNS, KEY_BLOCK, INPUTS };

inline bool find_dtype(int32_t dtype, int64_t &found) {
    const int32_t kinds[3] = {torch.float32(), torch.bfloat16(), torch.float16()};
    for (found = 0; found < 3; ++found)
        if (kinds[found] == dtype) return true;
    return false;
}

// Tokens as they are, `[B, G, slots, W_g]`.
inline bool read_tokens(const Tensor &x, Source &s) {
    s = NO_SOURCE;
    if (x.dim != 4 || (x.sizes[3] > 1 && x.strides[3] != 1) || !find_dtype(x.dtype, s.dtype)) return false;
    s.data = x.data;
    s.batch_stride = x.strides[0], s.group_stride = x.strides[1], s.token_stride = x.strides[2];
    s.groups = x.sizes[1];
    return true;
}

inline bool read_stream(const Value *stack, size_t stream, Source &s) {
    Tensor codes = tensor_of(at(stack[CODES], 2 * stream));
    if (codes.dtype != torch.uint8()) return read_tokens(codes, s);
    Tensor scale = tensor_of(at(stack[CODES], 2 * stream + 1)), mean = tensor_of(at(stack[BASES], 3 * stream));
    Tensor decoder = tensor_of(at(stack[BASES], 3 * stream + 1)), step = tensor_of(at(stack[BASES], 3 * stream + 2));
    int64_t scales = 1;
    for (int64_t i = 0; i < scale.dim; ++i) scales *= scale.sizes[i];
    s = NO_SOURCE;
    if (!codes.is(torch.uint8(), 4) || !find_dtype(mean.dtype, s.basis_dtype) || !mean.is(mean.dtype, 3) || !decoder.is(mean.dtype, 4) ||
        !step.is(torch.float32(), 3) || (scales && !scale.is(torch.float16(), 3)))
        return false;
    s.data = codes.data;
    s.dtype = UINT8;
    s.batch_stride = codes.strides[0], s.group_stride = codes.strides[1], s.token_stride = codes.strides[2];
    s.groups = codes.sizes[1];
    s.scale = scales ? (const uint16_t *)scale.data : nullptr;
    s.mean = mean.data, s.decoder = decoder.data, s.step = (const float *)step.data;
    s.basis_batch = mean.sizes[0];
    for (size_t i = 0; i < 4; ++i) s.bands[i] = (int64_t)at(stack[BANDS], 4 * stream + i);
    return true;
}

// As check_segments of kernels/layout.py; what is wrong, or nothing.
std::string error_of(const Value *stack) {
    size_t positions = size_of(stack[POSITIONS]), packed = positions - 1;
    if (positions < 2 || packed > MAX_PACKED)
        return "positions: " + std::to_string(positions) + " tensors must be 2 to 4, of first and the packed segments";
    if (size_t n = size_of(stack[DENSE]); n != 4) return "dense: " + std::to_string(n) + " tensors must be 4";
    const std::string of = " for each of " + std::to_string(packed) + " packed segments";
    const char *names[3] = {"codes", "bases", "bands"};
    const int lists[3] = {CODES, BASES, BANDS};
    const size_t each[3] = {4, 6, 8};
    for (int i = 0; i < 3; ++i)
        if (size_t n = size_of(stack[lists[i]]); n != each[i] * packed)
            return std::string(names[i]) + ": " + std::to_string(n) + " entries must be " + std::to_string(each[i]) + of;
    size_t turns = stack[TURNS] ? size_of(*(const Value *)stack[TURNS]) : 0;
    if (turns && turns != packed) return "turns: " + std::to_string(turns) + " entries must be one" + of + ", or none";
    return "";
}

inline bool read_state(const Value *stack, State &state) {
    size_t packed = size_of(stack[POSITIONS]) - 1;
    for (int i = 0; i <= TAIL; ++i) state.segments[i] = Segment{0, nullptr, NO_SOURCE, NO_SOURCE};
    for (size_t i = 0; i <= packed; ++i) {
        Tensor positions = tensor_of(at(stack[POSITIONS], i));
        if (!positions.is(torch.int32(), 2)) return false;
        state.segments[i].positions = (const int32_t *)positions.data;
    }
    for (size_t i = 0; i < 2; ++i) {
        Segment &s = state.segments[i ? TAIL : FIRST];
        Tensor key = tensor_of(at(stack[DENSE], 2 * i)), value = tensor_of(at(stack[DENSE], 2 * i + 1));
        if (!read_tokens(key, s.key) || !read_tokens(value, s.value)) return false;
        s.slots = key.sizes[2];
    }
    for (size_t i = 0; i < packed; ++i) {
        Segment &s = state.segments[FIRST_PACKED + i];
        if (!read_stream(stack, 2 * i, s.key) || !read_stream(stack, 2 * i + 1, s.value)) return false;
        s.slots = tensor_of(at(stack[CODES], 4 * i)).sizes[2];
    }
    return true;
}

inline bool read_turns(const Value *stack, const State &state, Attend &a) {
    if (!stack[TURNS]) return true;
    Value list = *(const Value *)stack[TURNS];
    for (size_t i = 0, n = size_of(list); i < n; ++i) {
        Tensor turns = tensor_of(at(list, i));
        if (!turns.is(torch.float32(), 4) || state.segments[FIRST_PACKED + i].key.dtype != UINT8) return false;
        a.turns[i] = Turns{(const float *)turns.data, turns.sizes[1], turns.sizes[3], (int64_t)stack[KEY_BLOCK]};
    }
    return true;
}

inline bool read_mask(const Value *stack, Attend &a) {
    if (!stack[MASK]) return true;
    Tensor mask = tensor_of(*(const Value *)stack[MASK]);
    a.mask_is_bool = mask.dtype == torch.boolean();
    if (!mask.is(a.mask_is_bool ? mask.dtype : torch.float32(), 4)) return false;
    a.mask = mask.data;
    for (int i = 0; i < 3; ++i) a.mask_strides[i] = mask.sizes[i] > 1 ? mask.strides[i] : 0;
    a.mask_length = mask.sizes[3];
    return true;
}

inline bool read_attend(const Value *stack, Attend &a, State &state) {
    Tensor query = tensor_of(stack[QUERY]), key = tensor_of(stack[KEY]), value = tensor_of(stack[VALUE]), cursor = tensor_of(stack[CURSOR]);
    Source q, k, v;
    if (stack[BIAS] || !cursor.is(torch.int64(), 1) || !read_tokens(query, q) || !read_tokens(key, k) || !read_tokens(value, v)) return false;
    if (key.sizes[3] > MAX_HEAD_DIM || value.sizes[3] > MAX_HEAD_DIM || !read_state(stack, state)) return false;
    uint32_t threads = 1;
    torch.thread_count(&threads);
    a.threads = threads;
    a.batch = key.sizes[0], a.heads = key.sizes[1], a.new_tokens = key.sizes[2], a.head_dim = key.sizes[3];
    a.query_heads = query.sizes[1], a.rows = query.sizes[2], a.value_dim = value.sizes[3];
    a.query = q.data, a.query_dtype = q.dtype;
    a.key = k.data, a.key_dtype = k.dtype;
    a.value = v.data, a.value_dtype = v.dtype;
    memcpy(a.query_strides, query.strides, sizeof a.query_strides);
    memcpy(a.key_strides, key.strides, sizeof a.key_strides);
    memcpy(a.value_strides, value.strides, sizeof a.value_strides);
    a.cursor = (const int64_t *)cursor.data;
    if (stack[SCALE]) memcpy(&a.scale, (const void *)stack[SCALE], sizeof a.scale);
    else a.scale = 1 / __builtin_sqrt((double)a.head_dim);
    return read_mask(stack, a) && read_turns(stack, state, a);
}

inline Value new_output(const Attend &a, int32_t dtype) {
    int64_t sizes[4] = {a.batch, a.query_heads, a.rows, a.value_dim}, strides[4] = {0, 0, a.value_dim, 1};
    strides[1] = a.rows * strides[2], strides[0] = a.query_heads * strides[1];
    Handle out = nullptr;
    return torch.tensor_empty(4, sizes, strides, dtype, torch.cpu(), -1, &out) ? 0 : (Value)out;
}

void release(const Value *stack) {
    for (int i : {QUERY, KEY, VALUE, CURSOR}) release_tensor(stack[i]);
    for (int i : {DENSE, CODES, BASES, POSITIONS}) release_tensors(stack[i]);
    release_list(stack[BANDS]);
    unwrapped(stack[SCALE]);
    for (int i : {MASK, BIAS})
        if (Value tensor = unwrapped(stack[i])) release_tensor(tensor);
    if (Value turns = unwrapped(stack[TURNS])) release_tensors(turns);
}

void attend(Value *stack, uint64_t, uint64_t) {
    Attend a = {};
    State state;
    if (std::string error = error_of(stack); !error.empty()) {
        release(stack);
        // ValueError or, with torch 2.15, RuntimeError: a type of PyTorch's own would need its headers
        throw std::invalid_argument(error);
    }
    if (!read_attend(stack, a, state)) {
        if (!torch.call("apack::attend_any", "", stack, INTERFACE)) return;
        throw std::runtime_error(torch.last_error ? torch.last_error() : "apack::attend_any failed");
    }
    Value out = new_output(a, tensor_of(stack[QUERY]).dtype);
    bool attended = out && (a.out = tensor_of(out).data, !apack_attend(&a, &state, apack_instruction_set()));
    release(stack);
    if (!attended) throw std::bad_alloc();
    stack[0] = out;
}

}  // namespace

// Registers the operations; 0, or the error of PyTorch that hindered it.
extern "C" int64_t apack_register(const Torch *functions) {
    torch = *functions;
    Handle library;
    if (int32_t error = torch.library_init("apack", "CPU", __FILE__, __LINE__, &library)) return error;
    return torch.library_impl(library, "attend", attend, INTERFACE);
}
