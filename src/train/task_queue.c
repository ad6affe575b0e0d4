#include "src/train/task_queue.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>

struct entry {
  vd_task *task;
  void *what;
  size_t bytes;
  struct entry *next;
};

/* What a buffer begins with; what is handed out lies behind it, aligned as malloc's is. */
union spare {
  struct {
    union spare *next;
    size_t bytes;
  } is;
  max_align_t align;
};

struct vd_task_queue {
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  struct entry *first, *last; /* the first is at work */
  size_t room, held;
  bool end;
  union spare *oldest, *newest; /* buffers that were given back */
  vd_error error;               /* of the first task that failed */
};

static void *work(void *argument) {
  vd_task_queue *w = argument;
  pthread_mutex_lock(&w->mutex);
  for (;;) {
    while (!w->first && !w->end) pthread_cond_wait(&w->changed, &w->mutex);
    struct entry *e = w->first;
    if (!e) break;
    vd_error err = w->error;
    pthread_mutex_unlock(&w->mutex);
    e->task(e->what, &err);
    pthread_mutex_lock(&w->mutex);
    w->error = err;
    w->held -= e->bytes;
    w->first = e->next;
    free(e);
    pthread_cond_broadcast(&w->changed);
  }
  pthread_mutex_unlock(&w->mutex);
  return NULL;
}

int vd_task_queue_create(vd_task_queue **out, size_t room, vd_error *err) {
  vd_task_queue *w = vd_calloc(1, sizeof *w);
  w->room = room;
  pthread_mutex_init(&w->mutex, NULL);
  pthread_cond_init(&w->changed, NULL);
  /* Signals are for the thread that looks at them. */
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int status = pthread_create(&w->thread, NULL, work, w);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (status == 0) {
    *out = w;
    return VD_OK;
  }
  pthread_cond_destroy(&w->changed);
  pthread_mutex_destroy(&w->mutex);
  free(w);
  return vd_fail(err, VD_FAILED, "cannot start the thread that writes checkpoints");
}

void vd_task_queue_destroy(vd_task_queue *w) {
  if (!w) return;
  pthread_mutex_lock(&w->mutex);
  w->end = true;
  pthread_cond_broadcast(&w->changed);
  pthread_mutex_unlock(&w->mutex);
  pthread_join(w->thread, NULL);
  pthread_cond_destroy(&w->changed);
  pthread_mutex_destroy(&w->mutex);
  while (w->oldest) {
    union spare *next = w->oldest->is.next;
    free(w->oldest);
    w->oldest = next;
  }
  free(w);
}

void vd_task_queue_add(vd_task_queue *w, vd_task *task, void *what, size_t bytes) {
  struct entry *e = vd_calloc(1, sizeof *e);
  *e = (struct entry){task, what, bytes, NULL};
  pthread_mutex_lock(&w->mutex);
  while (w->first && w->held + bytes > w->room) pthread_cond_wait(&w->changed, &w->mutex);
  w->held += bytes;
  if (w->first)
    w->last->next = e;
  else
    w->first = e;
  w->last = e;
  pthread_cond_broadcast(&w->changed);
  pthread_mutex_unlock(&w->mutex);
}

/* The oldest spare that has room for `bytes` and not much more, taken out of the list; NULL: none. */
static union spare *find_spare(vd_task_queue *w, size_t bytes) {
  union spare *before = NULL, *s = w->oldest;
  for (; s && (s->is.bytes < bytes || s->is.bytes / 2 > bytes); s = s->is.next) before = s;
  if (!s) return NULL;
  if (before)
    before->is.next = s->is.next;
  else
    w->oldest = s->is.next;
  if (w->newest == s) w->newest = before;
  return s;
}

void *vd_task_queue_buffer(vd_task_queue *w, size_t bytes) {
  union spare *unfit = NULL;
  pthread_mutex_lock(&w->mutex);
  union spare *s = find_spare(w, bytes);
  if (!s && w->oldest) { /* sizes have changed: for each new buffer an old one goes */
    unfit = w->oldest;
    w->oldest = unfit->is.next;
    if (!w->oldest) w->newest = NULL;
  }
  pthread_mutex_unlock(&w->mutex);
  free(unfit);
  if (!s) {
    s = vd_calloc(1, sizeof *s + bytes);
    s->is.bytes = bytes;
  }
  return s + 1;
}

void vd_task_queue_recycle(vd_task_queue *w, void *buffer) {
  if (!buffer) return;
  union spare *s = (union spare *)buffer - 1;
  s->is.next = NULL;
  pthread_mutex_lock(&w->mutex);
  if (w->newest)
    w->newest->is.next = s;
  else
    w->oldest = s;
  w->newest = s;
  pthread_mutex_unlock(&w->mutex);
}

int vd_task_queue_poll(vd_task_queue *w, vd_error *err) {
  pthread_mutex_lock(&w->mutex);
  if (w->error.status != VD_OK && err->status == VD_OK) *err = w->error;
  pthread_mutex_unlock(&w->mutex);
  return err->status;
}

int vd_task_queue_wait(vd_task_queue *w, vd_error *err) {
  pthread_mutex_lock(&w->mutex);
  while (w->first) pthread_cond_wait(&w->changed, &w->mutex);
  if (w->error.status != VD_OK && err->status == VD_OK) *err = w->error;
  w->error = (vd_error){0};
  pthread_mutex_unlock(&w->mutex);
  return err->status;
}
