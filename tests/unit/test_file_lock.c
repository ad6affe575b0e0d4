/* One process at a time: the lock of a run's folder and of a corpus. */
#include "src/base/file_lock.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char path[256];

static int open_lock(void) {
  int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  assert_true(fd >= 0);
  return fd;
}

/* A child that holds the lock, signed, until it is killed. */
static pid_t start_holder(void) {
  int ready[2];
  char byte;
  assert_int_equal(pipe(ready), 0);
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    char owner[VD_LOCK_OWNER];
    int fd = open(path, O_RDWR | O_CREAT, 0600);
    if (vd_file_lock(fd, owner) != VD_LOCK_HELD) _exit(1);
    vd_file_lock_sign(fd);
    if (write(ready[1], "x", 1) != 1) _exit(1);
    for (;;) pause();
  }
  close(ready[1]);
  assert_int_equal(read(ready[0], &byte, 1), 1);
  close(ready[0]);
  return child;
}

static void end_holder(pid_t child) {
  kill(child, SIGKILL);
  waitpid(child, NULL, 0);
}

static void is_taken_and_signed(void **state) {
  (void)state;
  char owner[VD_LOCK_OWNER] = "", text[VD_LOCK_OWNER] = "", wanted[64];
  int fd = open_lock();
  assert_int_equal(write(fd, "what an earlier holder left, longer than a name and a number are together", 70), 70);
  assert_int_equal(vd_file_lock(fd, owner), VD_LOCK_HELD);
  vd_file_lock_sign(fd);
  ssize_t n = pread(fd, text, sizeof text - 1, 0);
  assert_true(n > 0);
  snprintf(wanted, sizeof wanted, ", process %ld\n", (long)getpid());
  assert_string_equal(strstr(text, ", process"), wanted);
  assert_int_equal(strncmp(text, "host ", 5), 0);
  close(fd);
}

static void is_busy_while_another_holds_it(void **state) {
  (void)state;
  char owner[VD_LOCK_OWNER] = "", wanted[64];
  pid_t child = start_holder();
  int fd = open_lock();
  assert_int_equal(vd_file_lock(fd, owner), VD_LOCK_BUSY);
  snprintf(wanted, sizeof wanted, "process %ld", (long)child);
  assert_non_null(strstr(owner, wanted));
  assert_null(strchr(owner, '\n'));
  end_holder(child);
  assert_int_equal(vd_file_lock(fd, owner), VD_LOCK_HELD);
  close(fd);
}

/* The lock ends with its holder while another waits for it. */
static void waits_for_a_holder_that_goes(void **state) {
  (void)state;
  char owner[VD_LOCK_OWNER] = "";
  pid_t child = start_holder();
  pid_t killer = fork();
  if (killer == 0) {
    usleep(300000);
    kill(child, SIGKILL);
    _exit(0);
  }
  int fd = open_lock();
  assert_int_equal(vd_file_lock(fd, owner), VD_LOCK_HELD);
  close(fd);
  waitpid(killer, NULL, 0);
  waitpid(child, NULL, 0);
}

/* A rank that the holder starts does not hold the lock with it. */
static void passes_to_no_child(void **state) {
  (void)state;
  char owner[VD_LOCK_OWNER] = "";
  int fd = open_lock(), status = 0;
  assert_int_equal(vd_file_lock(fd, owner), VD_LOCK_HELD);
  pid_t child = fork();
  if (child == 0) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    _exit(fcntl(fd, F_SETLK, &lock) == 0);
  }
  waitpid(child, &status, 0);
  assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  close(fd);
}

static void a_reader_cannot_lock(void **state) {
  (void)state;
  char owner[VD_LOCK_OWNER] = "";
  close(open_lock());
  int fd = open(path, O_RDONLY);
  assert_int_equal(vd_file_lock(fd, owner), VD_LOCK_UNSUPPORTED);
  close(fd);
}

static int remove_file(void **state) {
  (void)state;
  unlink(path);
  return 0;
}

int main(void) {
  const char *tmp = getenv("TMPDIR");
  snprintf(path, sizeof path, "%s/viaduct-lock-%ld", tmp ? tmp : "/tmp", (long)getpid());
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_teardown(is_taken_and_signed, remove_file),
      cmocka_unit_test_teardown(is_busy_while_another_holds_it, remove_file),
      cmocka_unit_test_teardown(waits_for_a_holder_that_goes, remove_file),
      cmocka_unit_test_teardown(passes_to_no_child, remove_file),
      cmocka_unit_test_teardown(a_reader_cannot_lock, remove_file),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
