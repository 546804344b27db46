// Scratch memory.
#pragma once

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

}  // namespace
