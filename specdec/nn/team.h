/* Threads that wait for each other between the parts of a pass, some of which take a microsecond. OpenMP's own barrier
 * calls the kernel each time, which takes as long. */
#pragma once
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>

#define SPINS 2000 /* that a thread waits before it lets others run: about a tenth of a millisecond */

typedef struct { /* one for every parallel region, shared by its threads; begins as zeros */
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int meetings;
    _Alignas(64) atomic_llong taken;
} Team;

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Wait for all threads of the region; what any of them wrote is then there for all. */
static void meet(Team *team) {
    int size = omp_get_num_threads(), meetings = atomic_load_explicit(&team->meetings, memory_order_relaxed);
    if (size == 1) {
        atomic_store_explicit(&team->taken, 0, memory_order_relaxed);
    } else if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == size - 1) {
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->taken, 0, memory_order_relaxed);
        atomic_store_explicit(&team->meetings, meetings + 1, memory_order_release);
    } else {
        for (int left = SPINS; atomic_load_explicit(&team->meetings, memory_order_acquire) == meetings;)
            if (left)
                left--, pause_briefly();
            else
                sched_yield();
    }
}

/* The next piece of work that nobody has taken since the last meeting: 0, 1, 2, ... */
static inline int64_t take_next(Team *team) { return atomic_fetch_add_explicit(&team->taken, 1, memory_order_relaxed); }
