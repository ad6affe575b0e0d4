/* A worker thread: the frame that the reader, the task queue and the watchdog share. A worker has one lock, one
 * condition and one error. The lock guards the state that the worker and its owner share; both change that state, and
 * call all functions below but start, stop, lock and unlock, with the lock held. */
#ifndef VD_THREAD_H
#define VD_THREAD_H

#include "src/base/error.h"

#include <stdbool.h>

typedef struct vd_thread vd_thread;

/* What the worker runs, once. It is called with the lock held and returns with the lock held; it releases the lock
 * around long work. Once vd_thread_is_stopping() is true it starts no wait and returns. It makes no MPI call. */
typedef void vd_thread_body(vd_thread *thread, void *self);

/* Not collective. Starts a worker that runs body(*out, self). All signals are blocked in it: they are for the program's
 * main thread. `name` says in error messages what the thread does; borrowed for the call. *out is set before the body
 * runs. Free with vd_thread_stop(). VD_FAILED when the system starts no thread; *out is NULL then. */
int vd_thread_start(vd_thread **out, vd_thread_body *body, void *self, const char *name, vd_error *err);
/* Not collective. Asks the body to return, wakes all that wait, waits for the body's end, frees. The caller does not
 * hold the lock. NULL is allowed. Errors that nobody has taken are dropped. */
void vd_thread_stop(vd_thread *thread);

/* Not collective. Takes the lock; not recursive. */
void vd_thread_lock(vd_thread *thread);
/* Not collective. Releases the lock. */
void vd_thread_unlock(vd_thread *thread);

/* Not collective. Releases the lock, waits for a vd_thread_wake(), takes the lock again. May return without one: check
 * the state in a loop. */
void vd_thread_wait(vd_thread *thread);
/* Not collective. As vd_thread_wait(), until `deadline` (of vd_clock_seconds()) at the latest. */
void vd_thread_wait_until(vd_thread *thread, double deadline);
/* Not collective. Wakes all that wait. */
void vd_thread_wake(vd_thread *thread);

/* Not collective. True once vd_thread_stop() was called. */
bool vd_thread_is_stopping(const vd_thread *thread);
/* Not collective. True once the body has returned. */
bool vd_thread_has_ended(const vd_thread *thread);

/* Not collective. Records the error of the worker; the first one stays until it is cleared. No-op for VD_OK. */
void vd_thread_fail(vd_thread *thread, const vd_error *why);
/* Not collective. Copies the recorded error into *err, unless *err holds one already; returns err->status. */
int vd_thread_error(const vd_thread *thread, vd_error *err);
/* Not collective. Forgets the recorded error. */
void vd_thread_clear(vd_thread *thread);

#endif
