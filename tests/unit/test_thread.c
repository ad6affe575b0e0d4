/* The frame of worker threads: waits and deadlines, stopping, hand-over of errors, signals; and the clocks. */
#include "src/base/clock.h"
#include "src/base/thread.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

struct state {
  int asked, answered; /* under the lock */
  int blocked;         /* signals that the worker has blocked, of TERM, USR1 and INT */
  vd_error failure;
};

/* Answers questions until it is stopped. */
static void answer(vd_thread *t, void *self) {
  struct state *s = self;
  while (!vd_thread_is_stopping(t)) {
    if (s->asked == s->answered) {
      vd_thread_wait(t);
      continue;
    }
    s->answered++;
    vd_thread_wake(t);
  }
}

static void fail_twice(vd_thread *t, void *self) {
  struct state *s = self;
  vd_error second = {0};
  vd_thread_fail(t, &s->failure);
  vd_fail(&second, VD_USAGE, "a later error");
  vd_thread_fail(t, &second);
}

static void read_signal_mask(vd_thread *t, void *self) {
  (void)t;
  struct state *s = self;
  sigset_t set;
  pthread_sigmask(SIG_SETMASK, NULL, &set);
  s->blocked = sigismember(&set, SIGTERM) + sigismember(&set, SIGUSR1) + sigismember(&set, SIGINT);
}

static void answers_and_stops(void **unused) {
  (void)unused;
  struct state s = {0};
  vd_error err = {0};
  vd_thread *t;
  assert_int_equal(vd_thread_start(&t, answer, &s, "a test", &err), VD_OK);
  for (int i = 1; i <= 1000; i++) {
    vd_thread_lock(t);
    s.asked++;
    vd_thread_wake(t);
    while (s.answered < i) vd_thread_wait(t);
    assert_int_equal(s.answered, i);
    assert_false(vd_thread_has_ended(t));
    vd_thread_unlock(t);
  }
  vd_thread_stop(t); /* while the worker waits */
  vd_thread_stop(NULL);
}

static void waits_until_the_deadline(void **unused) {
  (void)unused;
  struct state s = {0};
  vd_error err = {0};
  vd_thread *t;
  assert_int_equal(vd_thread_start(&t, answer, &s, "a test", &err), VD_OK);
  double start = vd_clock_seconds(), deadline = start + 0.15;
  vd_thread_lock(t);
  while (vd_clock_seconds() < deadline) vd_thread_wait_until(t, deadline);
  vd_thread_wait_until(t, start); /* a deadline that has passed: returns at once */
  vd_thread_unlock(t);
  double waited = vd_clock_seconds() - start;
  assert_true(waited >= 0.15 && waited < 5);
  vd_thread_stop(t);
}

static void hands_the_first_error_over(void **unused) {
  (void)unused;
  struct state s = {0};
  vd_error err = {0};
  vd_thread *t;
  vd_fail(&s.failure, VD_FAILED, "the first error");
  assert_int_equal(vd_thread_start(&t, fail_twice, &s, "a test", &err), VD_OK);
  vd_thread_lock(t);
  while (!vd_thread_has_ended(t)) vd_thread_wait(t);
  assert_int_equal(vd_thread_error(t, &err), VD_FAILED);
  assert_string_equal(err.message, "the first error");
  vd_error other = {0};
  vd_fail(&other, VD_USAGE, "an error of the caller");
  assert_int_equal(vd_thread_error(t, &other), VD_USAGE);
  assert_string_equal(other.message, "an error of the caller");
  vd_thread_clear(t);
  err = (vd_error){0};
  assert_int_equal(vd_thread_error(t, &err), VD_OK);
  vd_thread_unlock(t);
  vd_thread_stop(t);
}

static void blocks_signals_in_the_worker_alone(void **unused) {
  (void)unused;
  struct state s = {0};
  vd_error err = {0};
  vd_thread *t;
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, NULL, &before);
  assert_int_equal(vd_thread_start(&t, read_signal_mask, &s, "a test", &err), VD_OK);
  pthread_sigmask(SIG_SETMASK, NULL, &after);
  vd_thread_stop(t);
  assert_int_equal(s.blocked, 3);
  for (int i = 1; i < 32; i++) assert_int_equal(sigismember(&before, i), sigismember(&after, i));
}

static void reads_the_clocks(void **unused) {
  (void)unused;
  char text[VD_UTC_BYTES];
  struct tm utc = {0};
  double date = vd_clock_date(), start = vd_clock_seconds();
  vd_clock_utc(text);
  assert_int_equal(strlen(text), 20);
  assert_ptr_equal(strptime(text, "%Y-%m-%dT%H:%M:%SZ", &utc), text + 20);
  double parsed = (double)timegm(&utc);
  assert_true(parsed > date - 1 && parsed < date + 60);
  vd_clock_sleep(0.02);
  double slept = vd_clock_seconds() - start;
  assert_true(slept >= 0.02 && slept < 60);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(answers_and_stops),          cmocka_unit_test(waits_until_the_deadline),
      cmocka_unit_test(hands_the_first_error_over), cmocka_unit_test(blocks_signals_in_the_worker_alone),
      cmocka_unit_test(reads_the_clocks),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
