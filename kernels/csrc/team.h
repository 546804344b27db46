// Threads that share the tasks of one phase after another.
#pragma once

#include <sched.h>
#include <stddef.h>
#include <stdint.h>

namespace {

constexpr int PHASES = 8;
constexpr int SPINS = 1 << 12;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A line of the processor's cache: a thread that waits must not slow down those that work.
struct alignas(64) Counter {
    int64_t value;
};

// A phase waits for the tasks of the one before, not for all threads: one that the system has not woken yet holds up nobody.
// Each thread begins with its own part of the tasks, the same from call to call, so that it finds its data in its own cache, and
// then takes what others have not begun.
struct Team {
    int threads;
    Counter *next;  // [PHASES][threads], zeros
    Counter done[PHASES];

    static size_t bytes(int64_t threads) { return PHASES * (size_t)threads * sizeof(Counter); }

    template <typename Task>
    void share(int phase, int thread, int64_t tasks, const Task &task) {
        int64_t finished = 0;
        for (int i = 0; i < threads; ++i) {
            int owner = (thread + i) % threads;
            int64_t begin = tasks * owner / threads, end = tasks * (owner + 1) / threads, now;
            Counter &counter = next[phase * threads + owner];
            if (begin + __atomic_load_n(&counter.value, __ATOMIC_RELAXED) >= end) continue;
            while ((now = begin + __atomic_fetch_add(&counter.value, 1, __ATOMIC_RELAXED)) < end) task(now), ++finished;
        }
        if (finished) __atomic_fetch_add(&done[phase].value, finished, __ATOMIC_RELEASE);
        for (int spins = 0; __atomic_load_n(&done[phase].value, __ATOMIC_ACQUIRE) < tasks;) {
            if (++spins < SPINS) pause_briefly();
            else sched_yield();
        }
    }
};

}  // namespace
