/* Tasks that run beside their owner (the training loop, prepare), in the order of their submission, on one worker
 * thread. */
#ifndef VD_TASK_QUEUE_H
#define VD_TASK_QUEUE_H

#include "src/base/error.h"

#include <stddef.h>

typedef struct vd_task_queue vd_task_queue;

/* A task does its work and frees `argument`. When *err holds an error, an earlier task has failed: this one then only
 * frees, and may put context before the message with vd_wrap(). It makes no MPI call. */
typedef void vd_task(void *argument, vd_error *err);

/* Not collective. Starts the worker. capacity: bytes that queued tasks may hold together. Free with
 * vd_task_queue_destroy(). VD_FAILED when the system starts no thread. */
int vd_task_queue_create(vd_task_queue **out, size_t capacity, vd_error *err);
/* Not collective. Runs the tasks that are still queued, then frees all; their errors are dropped. NULL is allowed. */
void vd_task_queue_destroy(vd_task_queue *q);
/* Not collective. Appends a task whose `argument` holds `bytes`. Blocks while the queued tasks and this one exceed the
 * capacity; a task larger than the capacity waits until the queue is empty. */
void vd_task_queue_add(vd_task_queue *q, vd_task *task, void *argument, size_t bytes);
/* Not collective. A buffer of `bytes`, contents undefined: a recycled one of `bytes` to twice that where there is one
 * (filling memory that is new to the process takes four times as long), else a new one. Owned by the caller, who
 * returns it with vd_task_queue_recycle(), from any thread. */
void *vd_task_queue_buffer(vd_task_queue *q, size_t bytes);
/* Not collective. Takes a buffer of vd_task_queue_buffer() back. The queue frees it in vd_task_queue_destroy(), or when
 * a request finds no recycled buffer that fits. NULL is allowed. */
void vd_task_queue_recycle(vd_task_queue *q, void *buffer);
/* Not collective. The first error of a task since the last vd_task_queue_wait(), without waiting. */
int vd_task_queue_poll(vd_task_queue *q, vd_error *err);
/* Not collective. Waits until the queue is empty. Returns the first error of a task since the last call and clears it.
 */
int vd_task_queue_wait(vd_task_queue *q, vd_error *err);

#endif
