// The part of PyTorch's stable C interface that an operation needs (torch/csrc/stable/c/shim.h, torch 2.11), by addresses that Python
// looks up: so the library is built without PyTorch's headers and loads next to any PyTorch.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace {

// A tensor, a list, a number or, where the schema allows None, the address of one of these on the heap.
using Value = uint64_t;
using Boxed = void (*)(Value *stack, uint64_t inputs, uint64_t outputs);
using Handle = void *;

constexpr uint64_t INTERFACE = 2ULL << 56 | 11ULL << 48;

// In the order of TORCH_FUNCTIONS, kernels/native.py. What gives an int32_t gives 0 where it succeeds, except for the kinds.
struct Torch {
    int32_t (*library_init)(const char *space, const char *key, const char *file, uint32_t line, Handle *library);
    int32_t (*library_impl)(Handle library, const char *name, Boxed operation, uint64_t interface);
    int32_t (*call)(const char *name, const char *overload, Value *stack, uint64_t interface);
    int32_t (*list_size)(Handle list, size_t *size);
    int32_t (*list_get)(Handle list, size_t index, Value *element);
    int32_t (*list_delete)(Handle list);
    int32_t (*tensor_delete)(Handle tensor);
    int32_t (*tensor_data)(Handle tensor, void **data);
    int32_t (*tensor_dim)(Handle tensor, int64_t *dim);
    int32_t (*tensor_sizes)(Handle tensor, const int64_t **sizes);
    int32_t (*tensor_strides)(Handle tensor, const int64_t **strides);
    int32_t (*tensor_dtype)(Handle tensor, int32_t *dtype);
    int32_t (*tensor_is_contiguous)(Handle tensor, bool *is_contiguous);
    int32_t (*tensor_empty)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device, int32_t index,
                            Handle *tensor);
    int32_t (*thread_count)(uint32_t *threads);
    int32_t (*float32)(), (*bfloat16)(), (*float16)(), (*uint8)(), (*boolean)(), (*int32)(), (*int64)(), (*cpu)();
    const char *(*last_error)();  // null before torch 2.13
};

inline Torch torch;

inline Handle handle_of(Value value) { return (Handle)value; }

// A tensor as it lies in memory, its owner elsewhere.
struct Tensor {
    void *data;
    const int64_t *sizes, *strides;
    int64_t dim;
    int32_t dtype;
    bool is_contiguous;

    bool is(int32_t kind, int64_t dimensions) const { return dtype == kind && dim == dimensions && is_contiguous; }
};

inline Tensor tensor_of(Value value) {
    Tensor x = {};
    Handle handle = handle_of(value);
    torch.tensor_data(handle, &x.data);
    torch.tensor_dim(handle, &x.dim);
    torch.tensor_sizes(handle, &x.sizes);
    torch.tensor_strides(handle, &x.strides);
    torch.tensor_dtype(handle, &x.dtype);
    torch.tensor_is_contiguous(handle, &x.is_contiguous);
    return x;
}

inline size_t size_of(Value list) {
    size_t size = 0;
    torch.list_size(handle_of(list), &size);
    return size;
}

inline Value at(Value list, size_t index) {
    Value element = 0;
    torch.list_get(handle_of(list), index, &element);
    return element;
}

inline void release_tensor(Value value) { torch.tensor_delete(handle_of(value)); }

inline void release_list(Value list) { torch.list_delete(handle_of(list)); }

inline void release_tensors(Value list) {
    for (size_t i = 0, n = size_of(list); i < n; ++i) release_tensor(at(list, i));
    release_list(list);
}

// Frees what holds an optional value, and gives the value; 0 for None.
inline Value unwrapped(Value optional) {
    if (!optional) return 0;
    Value *held = (Value *)optional, value = *held;
    delete held;
    return value;
}

}  // namespace
