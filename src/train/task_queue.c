#include "src/train/task_queue.h"

#include "src/base/thread.h"

#include <stdlib.h>

struct entry {
  vd_task *task;
  void *argument;
  size_t bytes;
  struct entry *next;
};

/* Header of a buffer. The caller's bytes follow it, aligned as malloc aligns them. */
union buffer {
  struct {
    union buffer *next;
    size_t bytes;
  } is;
  max_align_t align;
};

struct vd_task_queue {
  vd_thread *thread;             /* its lock guards what follows */
  struct entry *first, *last;    /* the worker runs the first, which stays in the list until it is done */
  size_t capacity, held;         /* bytes */
  union buffer *oldest, *newest; /* recycled buffers */
};

static void run_tasks(vd_thread *thread, void *self) {
  vd_task_queue *q = self;
  for (;;) {
    while (!q->first && !vd_thread_is_stopping(thread)) vd_thread_wait(thread);
    struct entry *e = q->first;
    if (!e) return;
    vd_error err = {0};
    vd_thread_error(thread, &err);
    vd_thread_unlock(thread);
    e->task(e->argument, &err);
    vd_thread_lock(thread);
    vd_thread_clear(thread); /* the same error may have got context from this task */
    vd_thread_fail(thread, &err);
    q->held -= e->bytes;
    q->first = e->next;
    free(e);
    vd_thread_wake(thread);
  }
}

int vd_task_queue_create(vd_task_queue **out, size_t capacity, vd_error *err) {
  vd_task_queue *q = vd_calloc(1, sizeof *q);
  q->capacity = capacity;
  if (vd_thread_start(&q->thread, run_tasks, q, "the task queue", err))
    free(q);
  else
    *out = q;
  return err->status;
}

void vd_task_queue_destroy(vd_task_queue *q) {
  if (!q) return;
  vd_thread_stop(q->thread);
  while (q->oldest) {
    union buffer *next = q->oldest->is.next;
    free(q->oldest);
    q->oldest = next;
  }
  free(q);
}

void vd_task_queue_add(vd_task_queue *q, vd_task *task, void *argument, size_t bytes) {
  struct entry *e = vd_calloc(1, sizeof *e);
  *e = (struct entry){task, argument, bytes, NULL};
  vd_thread_lock(q->thread);
  while (q->first && q->held + bytes > q->capacity) vd_thread_wait(q->thread);
  q->held += bytes;
  if (q->first)
    q->last->next = e;
  else
    q->first = e;
  q->last = e;
  vd_thread_wake(q->thread);
  vd_thread_unlock(q->thread);
}

/* Takes the oldest recycled buffer of `bytes` to twice that out of the list; NULL: there is none. */
static union buffer *take_recycled(vd_task_queue *q, size_t bytes) {
  union buffer *before = NULL, *b = q->oldest;
  for (; b && (b->is.bytes < bytes || b->is.bytes / 2 > bytes); b = b->is.next) before = b;
  if (!b) return NULL;
  if (before)
    before->is.next = b->is.next;
  else
    q->oldest = b->is.next;
  if (q->newest == b) q->newest = before;
  return b;
}

void *vd_task_queue_buffer(vd_task_queue *q, size_t bytes) {
  union buffer *unfit = NULL;
  vd_thread_lock(q->thread);
  union buffer *b = take_recycled(q, bytes);
  if (!b && q->oldest) { /* sizes have changed: each new buffer replaces an old one, so that their number stays */
    unfit = q->oldest;
    q->oldest = unfit->is.next;
    if (!q->oldest) q->newest = NULL;
  }
  vd_thread_unlock(q->thread);
  free(unfit);
  if (!b) {
    b = vd_calloc(1, sizeof *b + bytes);
    b->is.bytes = bytes;
  }
  return b + 1;
}

void vd_task_queue_recycle(vd_task_queue *q, void *buffer) {
  if (!buffer) return;
  union buffer *b = (union buffer *)buffer - 1;
  b->is.next = NULL;
  vd_thread_lock(q->thread);
  if (q->newest)
    q->newest->is.next = b;
  else
    q->oldest = b;
  q->newest = b;
  vd_thread_unlock(q->thread);
}

int vd_task_queue_poll(vd_task_queue *q, vd_error *err) {
  vd_thread_lock(q->thread);
  vd_thread_error(q->thread, err);
  vd_thread_unlock(q->thread);
  return err->status;
}

int vd_task_queue_wait(vd_task_queue *q, vd_error *err) {
  vd_thread_lock(q->thread);
  while (q->first) vd_thread_wait(q->thread);
  vd_thread_error(q->thread, err);
  vd_thread_clear(q->thread);
  vd_thread_unlock(q->thread);
  return err->status;
}
