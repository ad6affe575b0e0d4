/* Work done beside the training loop: tasks, one after the other in the order they came, on a thread of their own. */
#ifndef VD_TASK_QUEUE_H
#define VD_TASK_QUEUE_H

#include "src/base/error.h"

#include <stddef.h>

typedef struct vd_task_queue vd_task_queue;

/* A task does its work and frees `what`. Where *err holds an error, an earlier task has failed: it only frees. It makes
 * no MPI call. */
typedef void vd_task(void *what, vd_error *err);

/* Not collective. Starts the thread. room: bytes that waiting tasks may hold together. Free with
 * vd_task_queue_destroy(). VD_FAILED when there is no thread to be had. */
int vd_task_queue_create(vd_task_queue **out, size_t room, vd_error *err);
/* Not collective. Waits for what is still to be done and frees all, errors forgotten. NULL is allowed. */
void vd_task_queue_destroy(vd_task_queue *w);
/* Not collective. Adds a task, whose `what` holds `bytes`; waits while those before it leave no room. A task larger
 * than the room waits until it is alone. */
void vd_task_queue_add(vd_task_queue *w, vd_task *task, void *what, size_t bytes);
/* Not collective. A buffer of `bytes`, contents undefined: one that was given back, where there is one of about that
 * size, since memory that is new to the process is filled four times as slowly. Give it back with
 * vd_task_queue_recycle(), from any thread. */
void *vd_task_queue_buffer(vd_task_queue *w, size_t bytes);
/* Not collective. Gives a buffer back; it is kept until vd_task_queue_destroy(), or until others are asked for that it
 * is too small or too large for. NULL is allowed. */
void vd_task_queue_recycle(vd_task_queue *w, void *buffer);
/* Not collective. The error of a task that failed since the last vd_task_queue_wait(), without waiting. */
int vd_task_queue_poll(vd_task_queue *w, vd_error *err);
/* Not collective. Waits until every task is done; the first error of any since the last call, which is then forgotten.
 */
int vd_task_queue_wait(vd_task_queue *w, vd_error *err);

#endif
