/* The watchdog: a wait that is disarmed in time, one that is too long, one that the transport reports as failed. A
 * watchdog that fires ends its process, so each of these runs in a child, whose output and status the test reads. */
#include "src/base/clock.h"
#include "src/comm/watchdog.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static atomic_int polls;

static void poll_well(void *self, vd_error *err) {
  (void)self, (void)err;
  atomic_fetch_add(&polls, 1);
}

static void poll_failure(void *self, vd_error *err) {
  (void)self;
  vd_fail(err, VD_FAILED, "the peer's connection is closed");
}

static void print_abort(void *self) {
  fprintf(stderr, "aborted %s\n", (const char *)self);
}

static void hang(void *self) {
  (void)self;
  for (;;) pause();
}

static vd_watchdog *start(double seconds, const vd_watchdog_hooks *hooks) {
  vd_watchdog *w;
  vd_error err = {0};
  if (vd_watchdog_start(&w, MPI_COMM_WORLD, seconds, hooks, &err)) abort();
  return w;
}

static void disarms_in_time(void **unused) {
  (void)unused;
  const vd_watchdog_hooks hooks = {.poll = poll_well};
  vd_watchdog *w = start(60, &hooks);
  for (int i = 0; i < 1000; i++) {
    vd_watchdog_arm(w, "wait %d", i);
    vd_watchdog_disarm(w);
  }
  atomic_store(&polls, 0);
  vd_clock_sleep(0.3);
  assert_int_equal(atomic_load(&polls), 0); /* not while it is disarmed */
  vd_watchdog_arm(w, "a wait of a second");
  for (int i = 0; i < 300 && atomic_load(&polls) < 3; i++) vd_clock_sleep(0.1);
  assert_true(atomic_load(&polls) >= 3);
  vd_watchdog_arm(w, "another wait, while it is armed");
  vd_watchdog_disarm(w);
  vd_watchdog_stop(w);
}

/* Arming again gives the full time: waits of 2.5 s in all do not exceed a limit of 2 s. */
static void gives_each_wait_the_full_time(void **unused) {
  (void)unused;
  vd_watchdog *w = start(2, NULL);
  for (int i = 0; i < 5; i++) {
    vd_watchdog_arm(w, "wait %d", i);
    vd_clock_sleep(0.5);
  }
  vd_watchdog_disarm(w);
  vd_watchdog_stop(w);
}

static void stops_while_armed(void **unused) {
  (void)unused;
  vd_watchdog *w = start(60, NULL);
  vd_watchdog_arm(w, "a wait that the program gives up itself");
  vd_watchdog_stop(w);
  vd_watchdog_stop(NULL);
}

/* Runs this program again with `mode`, its stderr into text [size]; returns how it ended, as waitpid() says it. */
static int run_child(const char *mode, char *text, size_t size, double *seconds) {
  int pipes[2], status = 0;
  assert_int_equal(pipe(pipes), 0);
  double began = vd_clock_seconds();
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    dup2(pipes[1], STDERR_FILENO);
    close(pipes[0]);
    close(pipes[1]);
    for (char **v = environ; *v; v++) /* an MPI program of its own */
      while (*v && (strncmp(*v, "OMPI_", 5) == 0 || strncmp(*v, "PMIX_", 5) == 0) && strncmp(*v, "OMPI_MCA_", 9) != 0)
        for (char **u = v; *u; u++) u[0] = u[1];
    execl("/proc/self/exe", "test_watchdog", mode, (char *)NULL);
    _exit(99);
  }
  close(pipes[1]);
  size_t used = 0;
  for (ssize_t n; used + 1 < size && (n = read(pipes[0], text + used, size - 1 - used)) > 0;) used += (size_t)n;
  text[used] = '\0';
  close(pipes[0]);
  assert_int_equal(waitpid(child, &status, 0), child);
  *seconds = vd_clock_seconds() - began;
  return status;
}

/* What the child does: a wait that never ends. */
static int child_main(const char *mode) {
  static char name[] = "the all-reduce";
  vd_watchdog_hooks hooks = {.self = name, .abort = print_abort};
  if (strcmp(mode, "failure") == 0) hooks.poll = poll_failure;
  if (strcmp(mode, "hang") == 0) hooks.abort = hang;
  vd_watchdog *w = start(strcmp(mode, "failure") == 0 ? 0 : 0.5, &hooks);
  vd_watchdog_arm(w, "%s of update %d", name, 7);
  vd_clock_sleep(strcmp(mode, "late") == 0 ? 1 : 60);
  vd_watchdog_disarm(w); /* never returns: the watchdog has fired */
  fprintf(stderr, "the wait ended\n");
  return 0;
}

static void ends_the_run(const char *mode, const char *message) {
  char text[16384];
  double seconds;
  int status = run_child(mode, text, sizeof text, &seconds);
  if (!strstr(text, message)) fail_msg("no '%s' in: %s", message, text);
  assert_non_null(strstr(text, "viaduct: error: rank 0 of 1 (host "));
  assert_null(strstr(text, "the wait ended"));
  assert_false(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  assert_true(seconds < 30);
  if (strcmp(mode, "hang") != 0) assert_non_null(strstr(text, "aborted the all-reduce"));
}

static void fires_on_a_wait_without_end(void **unused) {
  (void)unused;
  ends_the_run("hung", "s (device%timeout) for the all-reduce of update 7: another rank hangs or has died");
}

static void fires_on_a_failed_transport(void **unused) {
  (void)unused;
  ends_the_run("failure", "waiting for the all-reduce of update 7: the peer's connection is closed");
}

static void ends_the_run_although_the_abort_hangs(void **unused) {
  (void)unused;
  ends_the_run("hang", "s (device%timeout) for the all-reduce of update 7");
}

static void does_not_return_once_it_has_fired(void **unused) {
  (void)unused;
  ends_the_run("late", "s (device%timeout) for the all-reduce of update 7");
}

int main(int argc, char **argv) {
  MPI_Init(NULL, NULL);
  if (argc > 1) return child_main(argv[1]);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(disarms_in_time),
      cmocka_unit_test(gives_each_wait_the_full_time),
      cmocka_unit_test(stops_while_armed),
      cmocka_unit_test(fires_on_a_wait_without_end),
      cmocka_unit_test(fires_on_a_failed_transport),
      cmocka_unit_test(ends_the_run_although_the_abort_hangs),
      cmocka_unit_test(does_not_return_once_it_has_fired),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
