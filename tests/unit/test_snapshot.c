/* Where a checkpoint says that a run stands: update, epoch and block of /position, and the attribute `update`. A file
 * in which they contradict each other is refused. */
#include "tests/unit/small_run.h"

#include <hdf5.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

enum { UPDATE = 253 }; /* 250 blocks in an epoch: block 3 of the second one is next */

static const char GROUPS[] = "&model n_layer=1, d_model=8, n_head=2, d_inner=16 /\n&span attn_span=16, ramp=4 /\n"
                             "&valid interval=0 /";

/* Reads or writes the numbers of /position. */
static void position_of(const char *path, bool put, int64_t position[3]) {
  static const char *const name[3] = {"/position/update", "/position/epoch", "/position/block"};
  hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
  for (int i = 0; i < 3; i++) {
    hid_t d = H5Dopen2(file, name[i], H5P_DEFAULT);
    assert_true(d >= 0);
    if (put)
      assert_true(H5Dwrite(d, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &position[i]) >= 0);
    else
      assert_true(H5Dread(d, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &position[i]) >= 0);
    H5Dclose(d);
  }
  H5Fclose(file);
}

static int load(vd_train *t, const char *path, vd_progress *progress, vd_error *err) {
  const vd_snapshot s = vd_train_snapshot(t);
  return vd_snapshot_read(&s, path, progress, err);
}

static void refuses_a_wrong_position(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  vd_progress progress;
  char path[400];
  int64_t position[3];
  small_run_open(f, "position", "max_updates=10", GROUPS);
  vd_train *t = &f->t;
  assert_int_equal(t->blocks, 250);
  t->progress.update = UPDATE;
  snprintf(path, sizeof path, "%s/position.h5", f->folder);
  const vd_snapshot s = vd_train_snapshot(t);
  vd_snapshot_write(&s, path, &t->progress, &err);
  vd_task_queue_wait(t->writer, &err);
  assert_string_equal(err.message, "");

  position_of(path, false, position);
  assert_true(position[0] == UPDATE && position[1] == 2 && position[2] == 3);
  assert_int_equal(load(t, path, &progress, &err), VD_OK);
  assert_int_equal(progress.update, UPDATE);

  static const int64_t wrong[][3] = {{UPDATE, 2, 0}, {UPDATE, 1, 3}, {UPDATE + 250, 3, 3}, {UPDATE + 1, 2, 3}};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    memcpy(position, wrong[i], sizeof position);
    position_of(path, true, position);
    err = (vd_error){0};
    assert_int_equal(load(t, path, &progress, &err), VD_FAILED);
    assert_non_null(strstr(err.message, "position.h5"));
    assert_non_null(strstr(err.message, wrong[i][0] == UPDATE ? "253 updates end at epoch 2, block 3"
                                                              : "and the attribute `update` 253"));
  }
  memcpy(position, (int64_t[]){-1, 1, -1}, sizeof position);
  position_of(path, true, position);
  err = (vd_error){0};
  assert_int_equal(load(t, path, &progress, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "/position: update is -1"));
  memcpy(position, (int64_t[]){UPDATE, 2, 3}, sizeof position);
  position_of(path, true, position);
  err = (vd_error){0};
  assert_int_equal(load(t, path, &progress, &err), VD_OK);
  vd_train_close(t, &err);
}

int main(int argc, char **argv) {
  int level;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(refuses_a_wrong_position, small_run_setup, small_run_teardown),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
