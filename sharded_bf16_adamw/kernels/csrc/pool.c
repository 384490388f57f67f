/* A small thread pool. The caller works too and never waits for a helper to wake up: it processes every chunk that no helper has claimed,
 * and then waits only for helpers that have joined its job. So a busy core delays a step by the few chunks of one claim at most.
 *
 * Helpers are detached and block all signals. Between jobs they spin for a moment and then block. They live until the process ends, so
 * nothing is joined at exit. A forked child has no threads of its parent: it starts with an empty pool and fills it on first use.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#include "native.h"

typedef struct job {
    sba_task task;
    void *context;
    int64_t chunks;
    _Atomic int64_t next_chunk; /* first unclaimed chunk */
    int threads;                /* maximum, including the caller */
    int open_slots;             /* helpers that may still join; protected by the lock, like next_job */
    _Atomic int active;         /* helpers that have joined and not left; changed only under the lock */
    struct job *next_job;
} job;

#define MAX_HELPERS 1023
#define MAX_CLAIM 8 /* chunks: about a tenth of a millisecond of a step */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t posted = PTHREAD_COND_INITIALIZER; /* a job has open slots */
static pthread_cond_t left = PTHREAD_COND_INITIALIZER;   /* a job has no active helper left */
static job *jobs;
static _Atomic unsigned posts; /* number of jobs posted so far; incremented under the lock */
static int helpers;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void before_fork(void) { pthread_mutex_lock(&lock); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&lock); }

static void after_fork_in_child(void) {
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    posted = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    left = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    jobs = NULL;
    helpers = 0;
}

static void watch_forks(void) { pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child); }

/* Claim several chunks at a time while many are left: they are adjacent in memory, so the data prefetched at the end of one is the start
 * of the next (89 % -> 95 % of the memory bandwidth with two threads at 64M elements). */
static void work(job *j) {
    for (;;) {
        int64_t unclaimed = j->chunks - atomic_load_explicit(&j->next_chunk, memory_order_relaxed);
        int64_t claim = unclaimed / (4 * j->threads);
        claim = claim < 1 ? 1 : claim > MAX_CLAIM ? MAX_CLAIM : claim;
        int64_t i = atomic_fetch_add_explicit(&j->next_chunk, claim, memory_order_relaxed);
        int64_t end = i + claim < j->chunks ? i + claim : j->chunks;
        if (i >= end) return;
        for (; i < end; i++) j->task(j->context, i);
    }
}

/* How long a thread spins before it blocks. Waking a blocked thread takes long, and the others work alone until then. In a benchmark,
 * short steps follow each other within this time (1M elements, two threads: 20 % less time per step, 27 % less with clipping). OpenMP's
 * threads spin for longer. */
#define SPIN_NS 200000

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#define SPIN_WHILE(condition) \
    do { \
        int64_t until = 0; \
        for (unsigned turn = 1; condition; turn++) { \
            relax(); \
            if (turn % 32) continue; \
            sched_yield(); /* in case the awaited thread is on this core */ \
            int64_t now = now_ns(); \
            if (!until) until = now + SPIN_NS; \
            if (now > until) break; \
        } \
    } while (0)

static void *helper(void *unused) {
    pthread_mutex_lock(&lock);
    for (;;) {
        job *j = jobs;
        while (j && !j->open_slots) j = j->next_job;
        if (!j) {
            unsigned seen = posts;
            pthread_mutex_unlock(&lock);
            SPIN_WHILE(posts == seen);
            pthread_mutex_lock(&lock);
            if (posts == seen) pthread_cond_wait(&posted, &lock);
            continue;
        }
        j->open_slots--;
        j->active++;
        pthread_mutex_unlock(&lock);
        work(j);
        pthread_mutex_lock(&lock);
        if (--j->active == 0) pthread_cond_broadcast(&left); /* the job may be gone after this */
    }
    return unused;
}

/* Start helpers up to `wanted`, with the lock held. A failure is no error: the caller does their share. */
static void ensure_helpers(int wanted) {
    if (helpers >= wanted) return;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_t id;
    while (helpers < wanted && !pthread_create(&id, &attributes, helper, NULL)) helpers++;
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
}

void sba_parallel(sba_task task, void *context, int64_t chunks, int threads) {
    int wanted = threads - 1 < MAX_HELPERS ? threads - 1 : MAX_HELPERS;
    if (wanted >= chunks) wanted = (int)chunks - 1;
    if (wanted <= 0) {
        for (int64_t i = 0; i < chunks; i++) task(context, i);
        return;
    }
    pthread_once(&once, watch_forks);
    job j = {.task = task, .context = context, .chunks = chunks, .threads = wanted + 1, .open_slots = wanted};
    pthread_mutex_lock(&lock);
    ensure_helpers(wanted);
    j.next_job = jobs;
    jobs = &j;
    posts++;
    for (int i = 0; i < wanted; i++) pthread_cond_signal(&posted);
    pthread_mutex_unlock(&lock);
    work(&j);
    pthread_mutex_lock(&lock);
    job **link = &jobs;
    while (*link != &j) link = &(*link)->next_job;
    *link = j.next_job; /* from here on no helper joins */
    pthread_mutex_unlock(&lock);
    SPIN_WHILE(j.active);
    pthread_mutex_lock(&lock);
    while (j.active) pthread_cond_wait(&left, &lock);
    pthread_mutex_unlock(&lock);
}
