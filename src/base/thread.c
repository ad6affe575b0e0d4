#include "src/base/thread.h"

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct vd_thread {
  pthread_t id;
  pthread_mutex_t lock;
  pthread_cond_t changed; /* measures deadlines by the monotonic clock */
  vd_thread_body *body;
  void *self;
  bool stopping, ended;
  vd_error error;
};

static void *run(void *argument) {
  vd_thread *t = argument;
  pthread_mutex_lock(&t->lock);
  t->body(t, t->self);
  t->ended = true;
  pthread_cond_broadcast(&t->changed);
  pthread_mutex_unlock(&t->lock);
  return NULL;
}

static void release(vd_thread *t) {
  pthread_cond_destroy(&t->changed);
  pthread_mutex_destroy(&t->lock);
  free(t);
}

int vd_thread_start(vd_thread **out, vd_thread_body *body, void *self, const char *name, vd_error *err) {
  vd_thread *t = vd_calloc(1, sizeof *t);
  t->body = body;
  t->self = self;
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_cond_init(&t->changed, &monotonic);
  pthread_condattr_destroy(&monotonic);
  pthread_mutex_init(&t->lock, NULL);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_mutex_lock(&t->lock); /* the body waits until *out is set */
  int status = pthread_create(&t->id, NULL, run, t);
  *out = status == 0 ? t : NULL;
  pthread_mutex_unlock(&t->lock);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (status == 0) return VD_OK;
  release(t);
  return vd_fail(err, VD_FAILED, "cannot start the thread of %s: %s", name, strerror(status));
}

void vd_thread_stop(vd_thread *t) {
  if (!t) return;
  pthread_mutex_lock(&t->lock);
  t->stopping = true;
  pthread_cond_broadcast(&t->changed);
  pthread_mutex_unlock(&t->lock);
  pthread_join(t->id, NULL);
  release(t);
}

void vd_thread_lock(vd_thread *t) {
  pthread_mutex_lock(&t->lock);
}

void vd_thread_unlock(vd_thread *t) {
  pthread_mutex_unlock(&t->lock);
}

void vd_thread_wait(vd_thread *t) {
  pthread_cond_wait(&t->changed, &t->lock);
}

void vd_thread_wait_until(vd_thread *t, double deadline) {
  double whole = floor(deadline);
  struct timespec at = {.tv_sec = (time_t)whole, .tv_nsec = (long)((deadline - whole) * 1e9)};
  pthread_cond_timedwait(&t->changed, &t->lock, &at);
}

void vd_thread_wake(vd_thread *t) {
  pthread_cond_broadcast(&t->changed);
}

bool vd_thread_is_stopping(const vd_thread *t) {
  return t->stopping;
}

bool vd_thread_has_ended(const vd_thread *t) {
  return t->ended;
}

void vd_thread_fail(vd_thread *t, const vd_error *why) {
  if (t->error.status == VD_OK) t->error = *why;
}

int vd_thread_error(const vd_thread *t, vd_error *err) {
  if (err->status == VD_OK && t->error.status != VD_OK) *err = t->error;
  return err->status;
}

void vd_thread_clear(vd_thread *t) {
  t->error = (vd_error){0};
}
