/* The trace: rows come back, a killed writer's file goes on, later rows are cut off, other shapes are refused. */
#include "io/trace.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { LAYERS = 2, HEADS = 3 };

static void append_to(vd_trace *t, int64_t first, int64_t last) {
  vd_error err = {0};
  for (int64_t u = first; u <= last; u++) {
    float span[LAYERS * HEADS];
    for (int i = 0; i < LAYERS * HEADS; i++) span[i] = (float)(100 * u + i);
    vd_trace_row row = {.update = u,
                        .span = span,
                        .train_bpc = 8.0 / (double)u,
                        .learning_rate = 0.07,
                        .grad_norm = 1.0,
                        .tokens_per_second = 1e4};
    assert_int_equal(vd_trace_append(t, &row, &err), VD_OK);
    if (u % 10 == 0) assert_int_equal(vd_trace_append_valid(t, u, 9.0 / (double)u, &err), VD_OK);
  }
}

/* Asserts that the trace holds the updates 1 .. n, with their spans, and n / 10 validations. */
static void expect_rows(const char *path, hsize_t n) {
  hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
  assert_true(file >= 0);
  const char *name[] = {"/update", "/span", "/valid/update"};
  for (int i = 0; i < 3; i++) {
    hsize_t shape[3], want = i == 2 ? n / 10 : n;
    hid_t id = H5Dopen2(file, name[i], H5P_DEFAULT), space = H5Dget_space(id);
    H5Sget_simple_extent_dims(space, shape, NULL);
    assert_int_equal(shape[0], want);
    double *x = vd_calloc(want * LAYERS * HEADS, sizeof *x);
    assert_true(H5Dread(id, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, x) >= 0);
    for (hsize_t r = 0; r < want; r++) {
      if (i == 0) assert_true(x[r] == (double)(r + 1));
      if (i == 1) assert_true(x[r * LAYERS * HEADS + 4] == (double)(100 * (r + 1) + 4));
      if (i == 2) assert_true(x[r] == (double)(10 * (r + 1)));
    }
    free(x);
    H5Sclose(space);
    H5Dclose(id);
  }
  H5Fclose(file);
}

static void test_goes_on_after_a_kill(void **state) {
  vd_h5 *h5 = *state;
  vd_error err = {0};
  vd_trace *t;
  const char *path = "test_trace.h5";
  unlink(path);
  pid_t child = fork();
  if (child == 0) {
    if (vd_trace_open(&t, h5, path, LAYERS, HEADS, 0, "&run /", &err) == VD_OK) append_to(t, 1, 47);
    raise(SIGKILL);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(vd_trace_open(&t, h5, path, LAYERS, HEADS, 30, "&run /", &err), VD_OK);
  assert_string_equal(vd_trace_notice(t), "");
  append_to(t, 31, 600);
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
  expect_rows(path, 600);
  assert_int_equal(vd_trace_open(&t, h5, path, LAYERS, HEADS, 512, "&run /", &err), VD_OK);
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
  expect_rows(path, 512);
  unlink(path);
}

static void test_refuses_another_shape(void **state) {
  vd_error err = {0};
  vd_trace *t;
  const char *path = "test_trace_shape.h5";
  unlink(path);
  assert_int_equal(vd_trace_open(&t, *state, path, LAYERS, HEADS, 0, "&run /", &err), VD_OK);
  append_to(t, 1, 20);
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
  assert_int_equal(vd_trace_open(&t, *state, path, LAYERS + 1, HEADS, 20, "&run /", &err), VD_FAILED);
  assert_non_null(strstr(err.message, "2 layers and 3 heads; this run has 3 and 3"));
  assert_null(t);
  expect_rows(path, 20);
  unlink(path);
}

/* A folder of its own: another build of the same test may run beside this one. */
static int setup(void **state) {
  vd_error err = {0};
  const char *base = getenv("TMPDIR");
  char folder[256];
  snprintf(folder, sizeof folder, "%s/test-trace-XXXXXX", base ? base : "/tmp");
  if (!mkdtemp(folder) || chdir(folder) != 0) return -1;
  return vd_h5_create((vd_h5 **)state, &err);
}

static int teardown(void **state) {
  vd_h5_destroy(*state);
  return system("rm -rf \"$PWD\"");
}

/* Takes and gives back a reader's lock on whatever has the name, until it is killed. */
static void look_again_and_again(const char *path) {
  for (;;) {
    int fd = open(path, O_RDONLY);
    if (fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) == 0) usleep(3000);
    if (fd >= 0) close(fd);
    usleep(1000);
  }
}

static void test_opens_under_readers(void **state) {
  vd_h5 *h5 = *state;
  vd_error err = {0};
  vd_trace *t;
  const char *path = "test_trace_readers.h5";
  unlink(path);
  pid_t child = fork();
  if (child == 0) look_again_and_again(path);
  for (int i = 0; i < 20 && err.status == VD_OK; i++) {
    vd_trace_open(&t, h5, path, LAYERS, HEADS, i, "&run /", &err);
    if (err.status == VD_OK) append_to(t, i + 1, i + 1);
    if (err.status == VD_OK) vd_trace_close(&t, &err);
  }
  kill(child, SIGKILL);
  waitpid(child, NULL, 0);
  assert_string_equal(err.message, "");
  expect_rows(path, 20);
  unlink(path);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_goes_on_after_a_kill),
                                     cmocka_unit_test(test_opens_under_readers),
                                     cmocka_unit_test(test_refuses_another_shape)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
