// Threads that share the tasks of one phase after another.
#pragma once

#include <sched.h>
#include <stdint.h>

namespace {

constexpr int PHASES = 8;
constexpr int SPINS = 1 << 12;

inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A phase waits for the tasks of the one before, not for all threads: one that the system has not woken yet holds up nobody.
struct Team {
    // A line of the processor's cache each: a thread that waits must not slow down those that work.
    struct alignas(64) Counter {
        int64_t value;
    };
    Counter next[PHASES], done[PHASES];

    template <typename Task>
    void share(int phase, int64_t tasks, const Task &task) {
        int64_t i, finished = 0;
        while ((i = __atomic_fetch_add(&next[phase].value, 1, __ATOMIC_RELAXED)) < tasks) task(i), ++finished;
        if (finished) __atomic_fetch_add(&done[phase].value, finished, __ATOMIC_RELEASE);
        for (int spins = 0; __atomic_load_n(&done[phase].value, __ATOMIC_ACQUIRE) < tasks;) {
            if (++spins < SPINS) pause_briefly();
            else sched_yield();
        }
    }
};

}  // namespace
