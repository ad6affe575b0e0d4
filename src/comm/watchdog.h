/* A watch over waits for other ranks: a thread that ends the run where one takes too long, because a peer that has died
 * or hangs is told by nothing else: MPI, NCCL and CUDA wait for ever. */
#ifndef VD_WATCHDOG_H
#define VD_WATCHDOG_H

#include "src/base/error.h"

#include <mpi.h>

typedef struct vd_watchdog vd_watchdog;

/* What a watch asks and does while something is waited for, on its own thread; members may be NULL. */
typedef struct vd_watchdog_hooks {
  void *self;
  /* Is the wait in vain? Fills *err where it is. */
  void (*look)(void *self, vd_error *err);
  /* Gives up what the other thread waits for. May hang: the run ends all the same. */
  void (*give_up)(void *self);
} vd_watchdog_hooks;

/* Not collective. A watch of the rank that comm says, for waits of at most `seconds` (0: as long as they take). hooks
 * are copied; NULL: none. Free with vd_watchdog_stop. VD_FAILED where there is no thread. */
int vd_watchdog_start(vd_watchdog **out, MPI_Comm comm, double seconds, const vd_watchdog_hooks *hooks, vd_error *err);
/* Not collective. From now on something is waited for, described by the text ("the gradient sum of update 7"); a wait
 * under way ends. Where it is not over in time, or hooks->look says that it is in vain, the run ends: a message on
 * stderr that names rank and host, then hooks->give_up, which gets 5 seconds, then MPI_Abort, which gets 10. The time
 * is counted while the process runs: one that was stopped goes on where it was. */
void vd_watchdog_arm(vd_watchdog *w, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Not collective. The wait is over. Does not return where the run is being ended, so that nothing is made of what was
 * given up. */
void vd_watchdog_disarm(vd_watchdog *w);
/* Not collective. Ends the thread; NULL is allowed. */
void vd_watchdog_stop(vd_watchdog *w);

#endif
