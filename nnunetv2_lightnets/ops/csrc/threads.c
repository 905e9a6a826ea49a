/* Threads: those of torch's own OpenMP runtime where native_library.py has found it, else POSIX threads made per call.
 *
 * Borrowing torch's pool matters: its idle threads spin for a while after each parallel operation of torch, and
 * threads of our own would have to share the processor with them. Nothing is linked: GOMP_parallel, which GNU's, LLVM's
 * and Intel's runtimes all offer, is handed over as a pointer. A forked child has lost the pool's threads, and OpenMP
 * would wait for them for ever; it falls back to threads per call.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "lightnets.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

enum { SPINS = 1000 }; /* some ten microseconds */

typedef void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel openmp;
static atomic_bool forked;

static void after_fork(void) { atomic_store(&forked, true); }

/* Called once, before the first scan; NULL: no OpenMP. */
LN_PUBLIC void ln_use_openmp(void *parallel) {
    static atomic_flag registered = ATOMIC_FLAG_INIT;
    if (!atomic_flag_test_and_set(&registered)) pthread_atfork(NULL, NULL, after_fork);
    openmp = (gomp_parallel)parallel;
}

typedef struct {
    atomic_llong next;
    atomic_int status;
    int64_t tasks;
    size_t scratch_bytes;
    ln_task task;
    const void *context;
} team;

static void work(void *argument) {
    team *t = argument;
    void *scratch = NULL;
#if defined(__SSE__)
    /* States that have faded away must not slow the loop down: numbers below 1e-38 count as zero. */
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);
#endif
    for (;;) {
        /* Before a task is taken: others may wait for it. */
        if (!scratch) scratch = ln_allocate(t->scratch_bytes);
        if (!scratch) {
            atomic_store(&t->status, LN_NO_MEMORY);
            break;
        }
        const int64_t task = atomic_fetch_add(&t->next, 1);
        if (task >= t->tasks) break;
        t->task(t->context, task, scratch);
    }
    free(scratch);
#if defined(__SSE__)
    _mm_setcsr(control);
#endif
}

static void *work_of_thread(void *argument) {
    work(argument);
    return NULL;
}

/* A thread that waits for long lets others have its processor: the one that it waits for may have none. */
void ln_wait(ln_count *count, int64_t target) {
    for (int64_t turn = 0; atomic_load_explicit(count, memory_order_acquire) < target; turn++) {
        if (turn > SPINS) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
#if defined(__SSE__)
        else _mm_pause();
#endif
    }
}

int ln_parallel(int64_t threads, int64_t tasks, size_t scratch_bytes, ln_task task, const void *context) {
    team t = {.tasks = tasks, .scratch_bytes = scratch_bytes, .task = task, .context = context};
    if (threads > tasks) threads = tasks;
    if (threads <= 1) {
        work(&t);
    } else if (openmp && !atomic_load(&forked)) {
        openmp(work, &t, (unsigned)threads, 0);
    } else {
        pthread_t *helpers = malloc(sizeof(pthread_t) * (size_t)(threads - 1));
        int64_t started = 0;
        /* A thread that cannot be had is no error: the others do its tasks. */
        if (helpers)
            while (started < threads - 1 && !pthread_create(&helpers[started], NULL, work_of_thread, &t)) started++;
        work(&t);
        for (int64_t i = 0; i < started; i++) pthread_join(helpers[i], NULL);
        free(helpers);
    }
    return atomic_load(&t.status);
}
