/* The trace: rows come back, a resumed run takes over those of a killed one up to its checkpoint, and what is damaged
 * or foreign is set aside with every byte. */
#include "io/trace.h"

#include "io/digest.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { LAYERS = 2, HEADS = 3 };

static void append_to(vd_trace *t, int64_t first, int64_t last) {
  for (int64_t u = first; u <= last; u++) {
    float span[LAYERS * HEADS];
    for (int i = 0; i < LAYERS * HEADS; i++) span[i] = (float)(100 * u + i);
    vd_trace_row row = {.update = u,
                        .span = span,
                        .train_bpc = 8.0 / (double)u,
                        .learning_rate = 0.07,
                        .grad_norm = 1.0,
                        .tokens_per_second = 1e4,
                        .wall = (double)u,
                        .time = 1e9 + (double)u};
    vd_trace_append(t, &row);
    if (u % 10 == 0) vd_trace_append_valid(t, u, 9.0 / (double)u);
  }
}

static void write_rows(vd_trace *t) {
  vd_error err = {0};
  vd_trace_write(vd_trace_capture(t), &err);
  assert_string_equal(err.message, "");
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

static void expect_sealed(const char *path) {
  vd_error err = {0};
  assert_int_equal(vd_digest_check(path, NULL, &err), VD_OK);
}

/* A killed writer leaves the rows of its last image, sealed; a resumed run takes those up to its checkpoint. */
static void test_resumes_after_a_kill(void **state) {
  vd_h5 *h5 = *state;
  vd_error err = {0};
  vd_trace *t;
  const char *path = "test_trace.h5";
  pid_t child = fork();
  if (child == 0) {
    if (vd_trace_open(&t, h5, path, LAYERS, HEADS, 0, NULL, &err) != VD_OK) _exit(1);
    append_to(t, 1, 47);
    write_rows(t);
    append_to(t, 48, 60);
    raise(SIGKILL);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFSIGNALED(status));
  expect_sealed(path);
  expect_rows(path, 47);
  assert_int_equal(vd_trace_open(&t, h5, path, LAYERS, HEADS, 30, NULL, &err), VD_OK);
  assert_string_equal(vd_trace_notice(t), "");
  expect_rows(path, 30);
  append_to(t, 31, 2600); /* over the ends of blocks */
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
  expect_rows(path, 2600);
  expect_sealed(path);
  assert_int_equal(vd_trace_open(&t, h5, path, LAYERS, HEADS, 1500, NULL, &err), VD_OK);
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
  expect_rows(path, 1500);
  unlink(path);
}

/* An image holds the rows of the moment at which it was captured. */
static void test_image_is_of_its_moment(void **state) {
  vd_error err = {0};
  vd_trace *t;
  const char *path = "test_trace_image.h5";
  assert_int_equal(vd_trace_open(&t, *state, path, LAYERS, HEADS, 0, NULL, &err), VD_OK);
  assert_false(vd_trace_is_due(t, 0));
  append_to(t, 1, 1020);
  assert_true(vd_trace_is_due(t, 0));
  assert_false(vd_trace_is_due(t, 1e6));
  void *image = vd_trace_capture(t);
  append_to(t, 1021, 1100);
  vd_trace_write(image, &err);
  expect_rows(path, 1020);
  assert_true(vd_trace_is_due(t, 0));
  vd_error earlier = {0};
  vd_fail(&earlier, VD_FAILED, "an earlier task failed");
  vd_trace_write(vd_trace_capture(t), &earlier); /* frees the image and writes nothing */
  expect_rows(path, 1020);
  append_to(t, 1101, 1110);
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
  expect_rows(path, 1110);
  unlink(path);
}

/* Opens a trace over `path`, which must be set aside with every byte; then the new trace holds nothing. */
static void expect_set_aside(vd_h5 *h5, const char *path, const char *aside, int layers, const char *why) {
  vd_error err = {0};
  vd_trace *t;
  struct stat before, after;
  assert_int_equal(stat(path, &before), 0);
  assert_int_equal(vd_trace_open(&t, h5, path, layers, HEADS, 20, NULL, &err), VD_OK);
  assert_non_null(strstr(vd_trace_notice(t), why));
  assert_non_null(strstr(vd_trace_notice(t), aside));
  assert_int_equal(stat(aside, &after), 0);
  assert_true(before.st_ino == after.st_ino && before.st_size == after.st_size);
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
  expect_sealed(path);
  unlink(path);
}

static void make_trace(vd_h5 *h5, const char *path) {
  vd_error err = {0};
  vd_trace *t;
  assert_int_equal(vd_trace_open(&t, h5, path, LAYERS, HEADS, 0, NULL, &err), VD_OK);
  append_to(t, 1, 20);
  assert_int_equal(vd_trace_close(&t, &err), VD_OK);
}

static void flip(const char *path, long at) {
  FILE *f = fopen(path, "r+b");
  assert_non_null(f);
  fseek(f, at, SEEK_SET);
  int c = fgetc(f);
  fseek(f, at, SEEK_SET);
  fputc(c ^ 1, f);
  fclose(f);
}

static void test_sets_aside_what_it_does_not_take_over(void **state) {
  const char *path = "trace.h5";
  make_trace(*state, path);
  expect_set_aside(*state, path, "trace-set-aside-1.h5", LAYERS + 1, "2 layers and 3 heads; this run has 3 and 3");
  make_trace(*state, path);
  flip(path, 900);
  expect_set_aside(*state, path, "trace-set-aside-2.h5", LAYERS, "damaged");
  FILE *f = fopen(path, "w");
  fputs("no HDF5 at all", f);
  fclose(f);
  expect_set_aside(*state, path, "trace-set-aside-3.h5", LAYERS, "not an HDF5 file");
  assert_int_equal(mkfifo(path, 0600), 0);
  expect_set_aside(*state, path, "trace-set-aside-4.h5", LAYERS, "a FIFO");
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

static void test_writes_beside_readers(void **state) {
  vd_h5 *h5 = *state;
  vd_error err = {0};
  vd_trace *t;
  const char *path = "test_trace_readers.h5";
  pid_t child = fork();
  if (child == 0) look_again_and_again(path);
  for (int i = 0; i < 20 && err.status == VD_OK; i++) {
    vd_trace_open(&t, h5, path, LAYERS, HEADS, i, NULL, &err);
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
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_resumes_after_a_kill), cmocka_unit_test(test_image_is_of_its_moment),
      cmocka_unit_test(test_writes_beside_readers), cmocka_unit_test(test_sets_aside_what_it_does_not_take_over)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
