/* crew.h - threads that stay: a short stage does not pay for their creation. Everything is static.
 * Include after psa.h. */
#ifndef CREW_H
#define CREW_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct crew {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pthread_t *thread;
    int n_threads;     /* with the calling one */
    psa_task_fn *task; /* what the threads do now */
    void *ctx;
    int nth, next, running; /* tasks, the first one nobody took, those not finished */
    int stop;
    const char *label; /* of the progress line; NULL: none */
    double started, shown;
} crew;

/* Once a second of work has passed; label is set only where a person is looking. */
static void show_progress(crew *c) {
    double t = now();
    if (!c->label || t - c->started < 1 || t - c->shown < 0.1)
        return;
    c->shown = t;
    fprintf(stderr, "\r%-10s %3d%%  %.0f s\033[K", c->label, 100 * (c->nth - c->running) / c->nth, t - c->started);
    fflush(stderr);
}

/* Takes tasks until there are none. The lock is held on entry and on return. */
static void crew_take(crew *c) {
    while (c->next < c->nth) {
        int ith = c->next++;
        pthread_mutex_unlock(&c->lock);
        c->task(c->ctx, ith, c->nth);
        pthread_mutex_lock(&c->lock);
        if (--c->running == 0)
            pthread_cond_signal(&c->done);
        show_progress(c);
    }
}

static void *crew_thread(void *arg) {
    crew *c = (crew *)arg;
    pthread_mutex_lock(&c->lock);
    while (!c->stop) {
        crew_take(c);
        pthread_cond_wait(&c->work, &c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

static void crew_run(crew *c, int nth, psa_task_fn *task, void *ctx) {
    pthread_mutex_lock(&c->lock);
    c->task = task, c->ctx = ctx;
    c->next = 0, c->nth = c->running = nth;
    pthread_cond_broadcast(&c->work);
    crew_take(c);
    while (c->running)
        pthread_cond_wait(&c->done, &c->lock);
    pthread_mutex_unlock(&c->lock);
}

static void crew_stop(crew *c) {
    pthread_mutex_lock(&c->lock);
    c->stop = 1;
    pthread_cond_broadcast(&c->work);
    pthread_mutex_unlock(&c->lock);
    for (int i = 0; i < c->n_threads - 1; i++)
        pthread_join(c->thread[i], NULL);
    free(c->thread);
    pthread_cond_destroy(&c->work);
    pthread_cond_destroy(&c->done);
    pthread_mutex_destroy(&c->lock);
}

/* n_threads 0: all processors. Works with fewer threads if the system gives no more. */
static void crew_start(crew *c, int n_threads) {
    long processors = sysconf(_SC_NPROCESSORS_ONLN);
    int wanted = n_threads ? n_threads : processors > 0 ? (int)processors : 1;
    memset(c, 0, sizeof *c);
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->work, NULL);
    pthread_cond_init(&c->done, NULL);
    c->n_threads = 1;
    c->thread = (pthread_t *)calloc((size_t)wanted, sizeof *c->thread);
    while (c->thread && c->n_threads < wanted &&
           pthread_create(&c->thread[c->n_threads - 1], NULL, crew_thread, c) == 0)
        c->n_threads++;
}
#endif
