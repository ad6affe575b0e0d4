/* Work done beside the training loop: tasks, one after the other in the order they came, on a thread of their own. */
#ifndef VD_WRITER_H
#define VD_WRITER_H

#include "src/base/error.h"

#include <stddef.h>

typedef struct vd_writer vd_writer;

/* A task does its work and frees `what`. Where *err holds an error, an earlier task has failed: it only frees. It makes
 * no MPI call. */
typedef void vd_task(void *what, vd_error *err);

/* Not collective. Starts the thread. room: bytes that waiting tasks may hold together. Free with vd_writer_destroy().
 * VD_FAILED when there is no thread to be had. */
int vd_writer_create(vd_writer **out, size_t room, vd_error *err);
/* Not collective. Waits for what is still to be done and frees all, errors forgotten. NULL is allowed. */
void vd_writer_destroy(vd_writer *w);
/* Not collective. Adds a task, whose `what` holds `bytes`; waits while those before it leave no room. A task larger
 * than the room waits until it is alone. */
void vd_writer_add(vd_writer *w, vd_task *task, void *what, size_t bytes);
/* Not collective. A buffer of `bytes`, contents undefined: one that was given back, where there is one of about that
 * size, since memory that is new to the process is filled four times as slowly. Give it back with vd_writer_keep(),
 * from any thread. */
void *vd_writer_buffer(vd_writer *w, size_t bytes);
/* Not collective. Gives a buffer back; it is kept until vd_writer_destroy(), or until others are asked for that it is
 * too small or too large for. NULL is allowed. */
void vd_writer_keep(vd_writer *w, void *buffer);
/* Not collective. The error of a task that failed since the last vd_writer_wait(), without waiting. */
int vd_writer_poll(vd_writer *w, vd_error *err);
/* Not collective. Waits until every task is done; the first error of any since the last call, which is then forgotten.
 */
int vd_writer_wait(vd_writer *w, vd_error *err);

#endif
