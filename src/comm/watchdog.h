/* The watchdog of waits for other ranks: a thread that ends the run when one takes too long. Nothing else reports a
 * rank that has died or hangs: MPI, NCCL and CUDA wait without a limit. */
#ifndef VD_WATCHDOG_H
#define VD_WATCHDOG_H

#include "src/base/error.h"

#include <mpi.h>

typedef struct vd_watchdog vd_watchdog;

/* Callbacks of the transport that is waited for, run on threads of the watchdog; members may be NULL. They call no
 * function of the watchdog. */
typedef struct vd_watchdog_hooks {
  void *self;
  /* Ten times a second while the watchdog is armed: asks the transport for an error; fills *err when the wait cannot
   * end. Returns at once. */
  void (*poll)(void *self, vd_error *err);
  /* Aborts the operation that is waited for. May block: the run ends all the same. */
  void (*abort)(void *self);
} vd_watchdog_hooks;

/* Not collective. Starts a disarmed watchdog for waits of at most `seconds` (0: no limit). Messages name the rank in
 * `comm`. *hooks are copied; NULL: none. Free with vd_watchdog_stop(). VD_FAILED when the system starts no thread. */
int vd_watchdog_start(vd_watchdog **out, MPI_Comm comm, double seconds, const vd_watchdog_hooks *hooks, vd_error *err);
/* Not collective. Arms the watchdog for a wait that the text names ("the gradient all-reduce of update 7"), with the
 * full time; replaces the wait that it was armed for. When the time is over, or hooks->poll reports an error, the run
 * ends: a message on stderr that names rank and host, then hooks->abort, for at most 5 seconds, then MPI_Abort, for at
 * most 10, then SIGALRM. Only time during which the process runs counts: a process that was stopped (SIGSTOP) continues
 * with the time that was left. */
void vd_watchdog_arm(vd_watchdog *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Not collective. The wait is over. Does not return while the watchdog ends the run, so that nothing uses the results
 * of an aborted operation. */
void vd_watchdog_disarm(vd_watchdog *w);
/* Not collective. Ends the thread and frees. NULL is allowed. */
void vd_watchdog_stop(vd_watchdog *w);

#endif
