// Threads that share the tasks of one phase after another.
#pragma once

#include <sched.h>
#include <stdint.h>

namespace {

constexpr int PHASES = 8;
constexpr int SPINS = 1 << 12;

// A phase waits for the tasks of the one before, not for all threads: one that the system has not woken yet holds up nobody.
struct Team {
    int64_t next[PHASES], done[PHASES];

    template <typename Task>
    void share(int phase, int64_t tasks, const Task &task) {
        int64_t i, finished = 0;
        while ((i = __atomic_fetch_add(&next[phase], 1, __ATOMIC_RELAXED)) < tasks) task(i), ++finished;
        if (finished) __atomic_fetch_add(&done[phase], finished, __ATOMIC_RELEASE);
        for (int spins = 0; __atomic_load_n(&done[phase], __ATOMIC_ACQUIRE) < tasks;)
            if (++spins > SPINS) sched_yield();
    }
};

}  // namespace
