// Scratch memory.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace {

// Memory that the calling thread keeps for its next call: fresh pages would cost more than a short attention.
inline char *scratch(size_t bytes) {
    struct Kept {
        char *memory = nullptr;
        size_t bytes = 0;
        ~Kept() { free(memory); }
    };
    static thread_local Kept kept;
    if (bytes > kept.bytes) {
        free(kept.memory);
        kept.memory = (char *)aligned_alloc(64, bytes);
        kept.bytes = kept.memory ? bytes : 0;
    }
    return kept.memory;
}

// Parts of scratch memory, one after another; with a null address only their size is counted.
struct Arena {
    char *at;
    size_t size;
    void *take(size_t bytes) {
        void *p = at ? at + size : nullptr;
        size += (bytes + 63) / 64 * 64;
        return p;
    }
    float *floats(int64_t n) { return (float *)take((size_t)n * sizeof(float)); }
};

}  // namespace
