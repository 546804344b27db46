// The threads of one operation: those of PyTorch's OpenMP, by addresses that Python looks up. So a process has one pool of threads, and
// the library needs no OpenMP of its own, neither when it is compiled nor when it is loaded.
#pragma once

#include <stdint.h>

// As GCC's libgomp and LLVM's libomp export them; zeros where there are none.
struct OpenMp {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);  // GOMP_parallel
    int (*thread_number)();                                                              // omp_get_thread_num
};

extern "C" OpenMp apack_openmp;

namespace {

// Calls `body(thread)` on up to so many threads at once, numbered from 0; on the calling one alone where there is no OpenMP.
template <typename Body>
inline void on_threads(int64_t threads, const Body &body) {
    if (threads <= 1 || !apack_openmp.parallel) return body(0);
    auto call = [](void *data) { (*(const Body *)data)(apack_openmp.thread_number()); };
    apack_openmp.parallel(call, (void *)&body, (unsigned)threads, 0);
}

}  // namespace
