/* A small thread pool. The caller works too and never waits for a helper to wake: whatever is unclaimed it does itself, and at the
 * end it waits only for helpers that have joined its job. So a busy core delays a step by the few chunks of one claim at most.
 *
 * Helpers are detached, sleep between jobs and block all signals. They live until the process ends, so nothing is joined at exit.
 * A forked child has none of its parent's threads: it starts with an empty pool and fills it when first needed.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>

#include "native.h"

typedef struct job {
    sba_task task;
    void *context;
    int64_t chunks;
    _Atomic int64_t next; /* first chunk that nobody has claimed */
    int threads;          /* at most, the caller among them */
    int places;           /* helpers that may still join; under the lock, like the rest */
    int active;           /* helpers that have joined and not left */
    struct job *following;
} job;

#define MAX_HELPERS 1023
#define MAX_AT_ONCE 8 /* chunks: about a tenth of a millisecond of a step */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t posted = PTHREAD_COND_INITIALIZER; /* a job has places */
static pthread_cond_t left = PTHREAD_COND_INITIALIZER;   /* a job has no active helper any more */
static job *jobs;
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

/* Several chunks at a time while many are left: they lie one after the other in memory, and what is prefetched at the end of one is
 * the beginning of the next (89 -> 95 % of the memory's speed with two threads at 64M elements). */
static void work(job *j) {
    for (;;) {
        int64_t rest = j->chunks - atomic_load_explicit(&j->next, memory_order_relaxed);
        int64_t some = rest / (4 * j->threads);
        some = some < 1 ? 1 : some > MAX_AT_ONCE ? MAX_AT_ONCE : some;
        int64_t i = atomic_fetch_add_explicit(&j->next, some, memory_order_relaxed);
        int64_t end = i + some < j->chunks ? i + some : j->chunks;
        if (i >= end) return;
        for (; i < end; i++) j->task(j->context, i);
    }
}

static void *helper(void *unused) {
    pthread_mutex_lock(&lock);
    for (;;) {
        job *j = jobs;
        while (j && !j->places) j = j->following;
        if (!j) {
            pthread_cond_wait(&posted, &lock);
            continue;
        }
        j->places--;
        j->active++;
        pthread_mutex_unlock(&lock);
        work(j);
        pthread_mutex_lock(&lock);
        if (--j->active == 0) pthread_cond_broadcast(&left);
    }
    return unused;
}

/* Under the lock. Fewer helpers than wanted is no error: the caller does their share. */
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
    job j = {.task = task, .context = context, .chunks = chunks, .threads = wanted + 1, .places = wanted};
    pthread_mutex_lock(&lock);
    ensure_helpers(wanted);
    j.following = jobs;
    jobs = &j;
    for (int i = 0; i < wanted; i++) pthread_cond_signal(&posted);
    pthread_mutex_unlock(&lock);
    work(&j);
    pthread_mutex_lock(&lock);
    job **link = &jobs;
    while (*link != &j) link = &(*link)->following;
    *link = j.following; /* nobody joins any more */
    while (j.active) pthread_cond_wait(&left, &lock);
    pthread_mutex_unlock(&lock);
}
