#include "src/comm/watchdog.h"

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static const double TICK = 0.1;                   /* seconds between two looks */
enum { GIVE_UP_SECONDS = 5, ABORT_SECONDS = 10 }; /* what they may take before the run ends without them */

struct vd_watchdog {
  int rank, size;
  double limit;
  vd_watchdog_hooks hooks;
  pthread_t thread;
  pthread_mutex_t lock;
  pthread_cond_t changed, gave_up;
  bool expecting, stopping, ending; /* under lock, as all below */
  double waited;                    /* seconds */
  char what[192];
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void wait_until(pthread_cond_t *c, pthread_mutex_t *lock, double seconds) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  double at = (double)t.tv_nsec * 1e-9 + seconds, whole = floor(at);
  t.tv_sec += (time_t)whole;
  t.tv_nsec = (long)((at - whole) * 1e9);
  pthread_cond_timedwait(c, lock, &t);
}

static void *give_up(void *self) {
  vd_watchdog *w = self;
  w->hooks.give_up(w->hooks.self);
  pthread_mutex_lock(&w->lock);
  pthread_cond_signal(&w->gave_up);
  pthread_mutex_unlock(&w->lock);
  return NULL;
}

/* Ends the run; called with the lock held. The alarm is the kernel's: it works where everything else hangs. */
static void end_run(vd_watchdog *w, const vd_error *why) {
  char host[64] = "?";
  gethostname(host, sizeof host - 1);
  w->ending = true;
  if (why->status != VD_OK)
    fprintf(stderr, "viaduct: error: rank %d of %d (host %s): waiting for %s: %s\n", w->rank, w->size, host, w->what,
            why->message);
  else
    fprintf(
        stderr,
        "viaduct: error: rank %d of %d (host %s): waited %.1f s (device%%timeout) for %s: another rank hangs or has "
        "died\n",
        w->rank, w->size, host, w->waited, w->what);
  fflush(stderr);
  pthread_t helper;
  if (w->hooks.give_up && pthread_create(&helper, NULL, give_up, w) == 0) {
    pthread_detach(helper);
    wait_until(&w->gave_up, &w->lock, GIVE_UP_SECONDS);
  }
  signal(SIGALRM, SIG_DFL);
  alarm(ABORT_SECONDS);
  MPI_Abort(MPI_COMM_WORLD, VD_FAILED);
}

static void *run(void *self) {
  vd_watchdog *w = self;
  double before = now();
  pthread_mutex_lock(&w->lock);
  while (!w->stopping) {
    if (!w->expecting) {
      pthread_cond_wait(&w->changed, &w->lock);
      before = now();
      continue;
    }
    wait_until(&w->changed, &w->lock, TICK);
    if (!w->expecting || w->stopping) continue;
    double later = now();
    w->waited += fmin(later - before, 10 * TICK); /* a process that was stopped meanwhile did not wait */
    before = later;
    vd_error why = {0};
    if (w->hooks.look) w->hooks.look(w->hooks.self, &why);
    if (why.status != VD_OK || (w->limit > 0 && w->waited >= w->limit)) end_run(w, &why);
  }
  pthread_mutex_unlock(&w->lock);
  return NULL;
}

/* Signals are for the program's own thread. */
static int start_thread(vd_watchdog *w) {
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  int status = pthread_create(&w->thread, NULL, run, w);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  return status;
}

int vd_watchdog_start(vd_watchdog **out, MPI_Comm comm, double seconds, const vd_watchdog_hooks *hooks, vd_error *err) {
  vd_watchdog *w = vd_calloc(1, sizeof *w);
  MPI_Comm_rank(comm, &w->rank);
  MPI_Comm_size(comm, &w->size);
  w->limit = seconds;
  if (hooks) w->hooks = *hooks;
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_mutex_init(&w->lock, NULL);
  pthread_cond_init(&w->changed, &monotonic);
  pthread_cond_init(&w->gave_up, &monotonic);
  pthread_condattr_destroy(&monotonic);
  *out = w;
  if (start_thread(w) == 0) return VD_OK;
  free(w);
  *out = NULL;
  return vd_fail(err, VD_FAILED, "cannot start a thread that watches over waits for other ranks");
}

/* The run is being ended by the other thread: nothing shall happen any more in this one. */
static _Noreturn void never(vd_watchdog *w) {
  pthread_mutex_unlock(&w->lock);
  for (;;) pause();
}

void vd_watchdog_arm(vd_watchdog *w, const char *format, ...) {
  pthread_mutex_lock(&w->lock);
  if (w->ending) never(w);
  va_list args;
  va_start(args, format);
  vsnprintf(w->what, sizeof w->what, format, args);
  va_end(args);
  bool asleep = !w->expecting;
  w->expecting = true;
  w->waited = 0;
  if (asleep) pthread_cond_signal(&w->changed);
  pthread_mutex_unlock(&w->lock);
}

void vd_watchdog_disarm(vd_watchdog *w) {
  pthread_mutex_lock(&w->lock);
  if (w->ending) never(w);
  w->expecting = false;
  pthread_mutex_unlock(&w->lock);
}

void vd_watchdog_stop(vd_watchdog *w) {
  if (!w) return;
  pthread_mutex_lock(&w->lock);
  if (w->ending) never(w);
  w->stopping = true;
  pthread_cond_signal(&w->changed);
  pthread_mutex_unlock(&w->lock);
  pthread_join(w->thread, NULL);
  pthread_cond_destroy(&w->changed);
  pthread_cond_destroy(&w->gave_up);
  pthread_mutex_destroy(&w->lock);
  free(w);
}
