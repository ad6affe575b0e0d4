#include "writer.h"

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

struct vd_writer {
  pthread_t thread;
  pthread_mutex_t mutex;
  pthread_cond_t changed;
  struct entry *first, *last; /* the first is at work */
  size_t room, held;
  bool end;
  vd_error error; /* of the first task that failed */
};

static void *work(void *argument) {
  vd_writer *w = argument;
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

int vd_writer_create(vd_writer **out, size_t room, vd_error *err) {
  vd_writer *w = vd_calloc(1, sizeof *w);
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

void vd_writer_destroy(vd_writer *w) {
  if (!w) return;
  pthread_mutex_lock(&w->mutex);
  w->end = true;
  pthread_cond_broadcast(&w->changed);
  pthread_mutex_unlock(&w->mutex);
  pthread_join(w->thread, NULL);
  pthread_cond_destroy(&w->changed);
  pthread_mutex_destroy(&w->mutex);
  free(w);
}

void vd_writer_add(vd_writer *w, vd_task *task, void *what, size_t bytes) {
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

int vd_writer_poll(vd_writer *w, vd_error *err) {
  pthread_mutex_lock(&w->mutex);
  if (w->error.status != VD_OK && err->status == VD_OK) *err = w->error;
  pthread_mutex_unlock(&w->mutex);
  return err->status;
}

int vd_writer_wait(vd_writer *w, vd_error *err) {
  pthread_mutex_lock(&w->mutex);
  while (w->first) pthread_cond_wait(&w->changed, &w->mutex);
  if (w->error.status != VD_OK && err->status == VD_OK) *err = w->error;
  w->error = (vd_error){0};
  pthread_mutex_unlock(&w->mutex);
  return err->status;
}
