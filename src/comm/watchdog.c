#include "src/comm/watchdog.h"

#include "src/base/clock.h"
#include "src/base/thread.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const double TICK = 0.1;                          /* seconds between two polls */
enum { ABORT_HOOK_SECONDS = 5, MPI_ABORT_SECONDS = 10 }; /* how long each step of ending the run may take */

struct vd_watchdog {
  int rank, size;
  double limit;
  vd_watchdog_hooks hooks;
  vd_thread *thread; /* its lock guards what follows */
  bool armed;
  double waited; /* seconds */
  char what[192];
};

static void run_abort_hook(vd_thread *thread, void *self) {
  const vd_watchdog *w = self;
  vd_thread_unlock(thread);
  w->hooks.abort(w->hooks.self);
  vd_thread_lock(thread);
}

/* The hook may block: it runs on a thread of its own, which nobody joins. */
static void abort_operation(vd_watchdog *w) {
  vd_thread *helper;
  vd_error none = {0};
  double deadline = vd_clock_seconds() + ABORT_HOOK_SECONDS;
  if (vd_thread_start(&helper, run_abort_hook, w, "an abort", &none)) return;
  vd_thread_lock(helper);
  while (!vd_thread_has_ended(helper) && vd_clock_seconds() < deadline) vd_thread_wait_until(helper, deadline);
  vd_thread_unlock(helper);
}

/* Ends the run. The lock of the watchdog stays held, so that the main thread does not get past its next call of the
 * watchdog. The kernel delivers the alarm: it works where every library hangs. */
static _Noreturn void end_run(vd_watchdog *w, const vd_error *why) {
  char host[64] = "?";
  gethostname(host, sizeof host - 1);
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
  if (w->hooks.abort) abort_operation(w);
  signal(SIGALRM, SIG_DFL);
  alarm(MPI_ABORT_SECONDS);
  MPI_Abort(MPI_COMM_WORLD, VD_FAILED);
  for (;;) pause();
}

static void watch(vd_thread *thread, void *self) {
  vd_watchdog *w = self;
  double before = vd_clock_seconds();
  while (!vd_thread_is_stopping(thread)) {
    if (!w->armed) {
      vd_thread_wait(thread);
      before = vd_clock_seconds();
      continue;
    }
    vd_thread_wait_until(thread, vd_clock_seconds() + TICK);
    if (!w->armed || vd_thread_is_stopping(thread)) continue;
    double now = vd_clock_seconds();
    w->waited += fmin(now - before, 10 * TICK); /* a longer tick means that the process was stopped */
    before = now;
    vd_error why = {0};
    if (w->hooks.poll) w->hooks.poll(w->hooks.self, &why);
    if (why.status != VD_OK || (w->limit > 0 && w->waited >= w->limit)) end_run(w, &why);
  }
}

int vd_watchdog_start(vd_watchdog **out, MPI_Comm comm, double seconds, const vd_watchdog_hooks *hooks, vd_error *err) {
  vd_watchdog *w = vd_calloc(1, sizeof *w);
  MPI_Comm_rank(comm, &w->rank);
  MPI_Comm_size(comm, &w->size);
  w->limit = seconds;
  if (hooks) w->hooks = *hooks;
  *out = NULL;
  if (vd_thread_start(&w->thread, watch, w, "the watchdog", err))
    free(w);
  else
    *out = w;
  return err->status;
}

void vd_watchdog_arm(vd_watchdog *w, const char *format, ...) {
  vd_thread_lock(w->thread);
  va_list args;
  va_start(args, format);
  vsnprintf(w->what, sizeof w->what, format, args);
  va_end(args);
  if (!w->armed) vd_thread_wake(w->thread);
  w->armed = true;
  w->waited = 0;
  vd_thread_unlock(w->thread);
}

void vd_watchdog_disarm(vd_watchdog *w) {
  vd_thread_lock(w->thread);
  w->armed = false;
  vd_thread_unlock(w->thread);
}

void vd_watchdog_stop(vd_watchdog *w) {
  if (!w) return;
  vd_thread_stop(w->thread);
  free(w);
}
