/* Tasks beside the loop: their order, the memory that they may hold, what an error does to those behind it; and the
 * lock of HDF5, which nobody may keep from others by taking it again and again. */
#include "io/h5.h"
#include "src/train/task_queue.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

enum { TASKS = 50, BYTES = 100 };

struct board {
  int done[TASKS], n_done, n_freed;
  atomic_int held, most;
  int failing; /* the task that fails; -1: none */
  bool slow;
};

struct job {
  struct board *board;
  int number;
};

static void run(void *what, vd_error *err) {
  struct job *j = what;
  struct board *b = j->board;
  if (b->slow) nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
  if (err->status == VD_OK) b->done[b->n_done++] = j->number;
  if (j->number == b->failing) vd_fail(err, VD_FAILED, "task %d has no luck", j->number);
  b->n_freed++;
  atomic_fetch_sub(&b->held, BYTES);
  free(j);
}

static void add(vd_task_queue *w, struct board *b, int number) {
  struct job *j = malloc(sizeof *j);
  *j = (struct job){b, number};
  vd_task_queue_add(w, run, j, BYTES);
  int held = atomic_fetch_add(&b->held, BYTES) + BYTES;
  if (held > atomic_load(&b->most)) atomic_store(&b->most, held);
}

static void keeps_order_and_limit(void **state) {
  (void)state;
  struct board b = {.failing = -1, .slow = true};
  vd_error err = {0};
  vd_task_queue *w = NULL;
  assert_int_equal(vd_task_queue_create(&w, 4 * BYTES, &err), VD_OK);
  for (int i = 0; i < TASKS; i++) add(w, &b, i);
  assert_int_equal(vd_task_queue_wait(w, &err), VD_OK);
  assert_int_equal(b.n_done, TASKS);
  for (int i = 0; i < TASKS; i++) assert_int_equal(b.done[i], i);
  assert_true(atomic_load(&b.most) > BYTES && atomic_load(&b.most) <= 4 * BYTES);
  vd_task_queue_destroy(w);
}

static void takes_a_task_beyond_the_limit_alone(void **state) {
  (void)state;
  struct board b = {.failing = -1, .slow = true};
  vd_error err = {0};
  vd_task_queue *w = NULL;
  assert_int_equal(vd_task_queue_create(&w, BYTES / 2, &err), VD_OK);
  for (int i = 0; i < 5; i++) add(w, &b, i);
  assert_int_equal(vd_task_queue_wait(w, &err), VD_OK);
  assert_int_equal(b.n_done, 5);
  assert_true(atomic_load(&b.most) <= BYTES);
  vd_task_queue_destroy(w);
}

static void fail_at_once(void *what, vd_error *err) {
  (void)what;
  vd_fail(err, VD_FAILED, "the disk is full");
}

static void add_context(void *what, vd_error *err) {
  vd_wrap(err, "%s", (const char *)what);
}

static void a_later_task_adds_context(void **state) {
  (void)state;
  vd_error err = {0};
  vd_task_queue *w = NULL;
  char context[] = "the checkpoint";
  assert_int_equal(vd_task_queue_create(&w, BYTES, &err), VD_OK);
  vd_task_queue_add(w, fail_at_once, NULL, 0);
  vd_task_queue_add(w, fail_at_once, NULL, 0);
  vd_task_queue_add(w, add_context, context, 0);
  assert_int_equal(vd_task_queue_wait(w, &err), VD_FAILED);
  assert_string_equal(err.message, "the checkpoint: the disk is full");
  vd_task_queue_destroy(w);
}

static void an_error_stops_what_comes_after(void **state) {
  (void)state;
  struct board b = {.failing = 2, .slow = true};
  vd_error err = {0};
  vd_task_queue *w = NULL;
  assert_int_equal(vd_task_queue_create(&w, TASKS * BYTES, &err), VD_OK);
  assert_int_equal(vd_task_queue_poll(w, &err), VD_OK);
  for (int i = 0; i < 6; i++) add(w, &b, i);
  while (vd_task_queue_poll(w, &err) == VD_OK) nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
  assert_string_equal(err.message, "task 2 has no luck");
  err = (vd_error){0};
  assert_int_equal(vd_task_queue_wait(w, &err), VD_FAILED);
  assert_string_equal(err.message, "task 2 has no luck");
  assert_int_equal(b.n_done, 3);
  assert_int_equal(b.n_freed, 6);
  /* reported once; the queue runs further tasks */
  err = (vd_error){0};
  add(w, &b, 7);
  assert_int_equal(vd_task_queue_wait(w, &err), VD_OK);
  assert_int_equal(b.n_done, 4);
  vd_task_queue_destroy(w);
}

static void ends_its_work_when_destroyed(void **state) {
  (void)state;
  struct board b = {.failing = -1, .slow = true};
  vd_error err = {0};
  vd_task_queue *w = NULL;
  assert_int_equal(vd_task_queue_create(&w, TASKS * BYTES, &err), VD_OK);
  for (int i = 0; i < TASKS; i++) add(w, &b, i);
  vd_task_queue_destroy(w);
  assert_int_equal(b.n_done, TASKS);
  vd_task_queue_destroy(NULL);
}

struct greedy {
  vd_h5 *h5;
  atomic_int taken, end;
};

static void *take_again_and_again(void *argument) {
  struct greedy *g = argument;
  while (!atomic_load(&g->end)) {
    vd_h5_lock(g->h5);
    vd_h5_lock(g->h5); /* within a thread it is recursive */
    atomic_fetch_add(&g->taken, 1);
    nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    vd_h5_unlock(g->h5);
    vd_h5_unlock(g->h5);
  }
  return NULL;
}

/* Who waits for the lock gets it when it is next given back. */
static void the_lock_is_fair(void **state) {
  (void)state;
  vd_error err = {0};
  struct greedy g = {0};
  pthread_t thread;
  assert_int_equal(vd_h5_create(&g.h5, &err), VD_OK);
  assert_int_equal(pthread_create(&thread, NULL, take_again_and_again, &g), 0);
  while (atomic_load(&g.taken) < 3) nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
  int missed = 0;
  for (int i = 0; i < 100; i++) {
    int before = atomic_load(&g.taken);
    vd_h5_lock(g.h5);
    if (atomic_load(&g.taken) > before + 1) missed++; /* before our ticket was drawn, at most */
    vd_h5_unlock(g.h5);
  }
  atomic_store(&g.end, 1);
  pthread_join(thread, NULL);
  vd_h5_destroy(g.h5);
  assert_true(missed <= 10);
}

/* Buffers come back for sizes that they fit, and make way for others. */
static void hands_buffers_out_again(void **state) {
  (void)state;
  vd_error err = {0};
  vd_task_queue *w = NULL;
  assert_int_equal(vd_task_queue_create(&w, BYTES, &err), VD_OK);
  char *large = vd_task_queue_buffer(w, 1000), *small = vd_task_queue_buffer(w, 100);
  assert_true(large != small && (size_t)large % _Alignof(max_align_t) == 0);
  memset(large, 1, 1000), memset(small, 2, 100);
  vd_task_queue_recycle(w, large), vd_task_queue_recycle(w, NULL), vd_task_queue_recycle(w, small);
  assert_ptr_equal(vd_task_queue_buffer(w, 90), small); /* not the large one, though that came first */
  assert_ptr_equal(vd_task_queue_buffer(w, 600), large);
  vd_task_queue_recycle(w, large);
  char *larger = vd_task_queue_buffer(w, 1001); /* `large` goes for it */
  memset(larger, 3, 1001);
  vd_task_queue_recycle(w, small), vd_task_queue_recycle(w, larger);
  assert_ptr_equal(vd_task_queue_buffer(w, 1000), larger);
  assert_ptr_equal(vd_task_queue_buffer(w, 100), small);
  vd_task_queue_recycle(w, larger), vd_task_queue_recycle(w, small);
  vd_task_queue_destroy(w);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(keeps_order_and_limit),
      cmocka_unit_test(takes_a_task_beyond_the_limit_alone),
      cmocka_unit_test(an_error_stops_what_comes_after),
      cmocka_unit_test(a_later_task_adds_context),
      cmocka_unit_test(ends_its_work_when_destroyed),
      cmocka_unit_test(hands_buffers_out_again),
      cmocka_unit_test(the_lock_is_fair),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
