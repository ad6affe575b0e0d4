/* io/h5: the lock, attributes, datasets with scales, files that appear whole or not at all, messages of damage. */
#include "io/h5.h"

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>
#include <hdf5_hl.h>

typedef struct fixture {
  vd_h5 *h5;
  char folder[64], path[128];
} fixture;

static int setup(void **state) {
  fixture *f = vd_calloc(1, sizeof *f);
  vd_error err = {0};
  strcpy(f->folder, "/tmp/vd-test-h5-XXXXXX");
  if (!mkdtemp(f->folder) || vd_h5_create(&f->h5, &err)) return -1;
  snprintf(f->path, sizeof f->path, "%s/a.h5", f->folder);
  *state = f;
  return 0;
}

static int n_files(const char *folder, bool remove) {
  int n = 0;
  DIR *dir = opendir(folder);
  for (struct dirent *e; (e = readdir(dir)) != NULL;) {
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
    if (remove) unlink(path);
    n++;
  }
  closedir(dir);
  return n;
}

static int teardown(void **state) {
  fixture *f = *state;
  n_files(f->folder, true);
  rmdir(f->folder);
  vd_h5_destroy(f->h5);
  free(f);
  return 0;
}

static vd_dataset tensor(const char *path, hsize_t rows, hsize_t columns) {
  vd_dataset d = {.path = path,
                  .dtype = VD_F32,
                  .rank = 2,
                  .shape = {rows, columns},
                  .dimension = {"row", "d_model"},
                  .units = "1",
                  .long_name = "a tensor"};
  return d;
}

static void write_file(fixture *f, vd_error *err) {
  vd_h5_out out;
  float x[600];
  for (int i = 0; i < 600; i++) x[i] = (float)i;
  if (vd_h5_begin(&out, f->path, "checkpoint", NULL, err)) return;
  vd_dataset a = tensor("/model/a", 10, 20), b = tensor("/model/b", 30, 20), c = tensor("/other/deep/c", 5, 6);
  vd_dataset s = {.path = "/scalar", .dtype = VD_I64, .units = "updates", .long_name = "a scalar"};
  int64_t seven = 7;
  if (vd_h5_dataset(out.file, &a, x, NULL, err) || vd_h5_dataset(out.file, &b, x, NULL, err) ||
      vd_h5_dataset(out.file, &c, x, NULL, err) || vd_h5_dataset(out.file, &s, &seven, NULL, err))
    vd_h5_abandon(&out);
  else
    vd_h5_commit(&out, err);
}

static void test_lock_is_recursive(void **state) {
  fixture *f = *state;
  vd_h5_lock(f->h5);
  vd_h5_lock(f->h5);
  vd_h5_unlock(f->h5);
  vd_h5_unlock(f->h5);
}

struct counter {
  vd_h5 *h5;
  long n;
};

static void *count_up(void *p) {
  struct counter *c = p;
  for (int i = 0; i < 20000; i++) {
    vd_h5_lock(c->h5);
    c->n++;
    vd_h5_unlock(c->h5);
  }
  return NULL;
}

static void test_lock_excludes(void **state) {
  fixture *f = *state;
  struct counter c = {f->h5, 0};
  pthread_t a, b;
  pthread_create(&a, NULL, count_up, &c);
  pthread_create(&b, NULL, count_up, &c);
  pthread_join(a, NULL);
  pthread_join(b, NULL);
  assert_int_equal(c.n, 40000);
}

static void test_attributes(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_h5_out out;
  assert_int_equal(vd_h5_begin(&out, f->path, "trace", NULL, &err), VD_OK);
  vd_h5_attr_text(out.file, "text", "gr\xc3\xbc\xc3\x9f", &err);
  vd_h5_attr_text(out.file, "empty", "", &err);
  vd_h5_attr_i64(out.file, "large", INT64_MIN, &err);
  vd_h5_attr_f64(out.file, "third", 1.0 / 3, &err);
  assert_int_equal(err.status, VD_OK);
  char *text = NULL;
  int64_t i = 0;
  double x = 0;
  assert_int_equal(vd_h5_get_text(out.file, "text", &text, &err), VD_OK);
  assert_string_equal(text, "gr\xc3\xbc\xc3\x9f");
  free(text);
  assert_int_equal(vd_h5_get_text(out.file, "empty", &text, &err), VD_OK);
  assert_string_equal(text, "");
  free(text);
  assert_int_equal(vd_h5_get_i64(out.file, "large", &i, &err), VD_OK);
  assert_true(i == INT64_MIN);
  assert_int_equal(vd_h5_get_f64(out.file, "third", &x, &err), VD_OK);
  assert_true(x == 1.0 / 3);
  assert_int_equal(vd_h5_get_i64(out.file, "third", &i, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "third"));
  err = (vd_error){0};
  assert_int_equal(vd_h5_get_text(out.file, "absent", &text, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "absent"));
  err = (vd_error){0};
  assert_int_equal(vd_h5_attr_i64(out.file, "large", 1, &err), VD_FAILED);
  vd_h5_abandon(&out);
}

static void check_dimension(hid_t file, const char *path, unsigned axis, const char *scale) {
  hid_t data = H5Dopen2(file, path, H5P_DEFAULT), dim = H5Dopen2(file, scale, H5P_DEFAULT);
  assert_true(data >= 0 && dim >= 0);
  assert_int_equal(H5DSis_attached(data, dim, axis), 1);
  H5Dclose(data);
  H5Dclose(dim);
}

static void test_datasets_and_scales(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  write_file(f, &err);
  assert_string_equal(err.message, "");
  hid_t file;
  assert_int_equal(vd_h5_open(f->path, "checkpoint", &file, &err), VD_OK);
  check_dimension(file, "/model/a", 0, "/model/row");
  check_dimension(file, "/model/a", 1, "/model/d_model");
  check_dimension(file, "/model/b", 0, "/model/row_30");
  check_dimension(file, "/model/b", 1, "/model/d_model");
  check_dimension(file, "/other/deep/c", 1, "/other/deep/d_model");
  hid_t id = H5Dopen2(file, "/model/b", H5P_DEFAULT), list = H5Dget_create_plist(id);
  assert_int_equal(H5Pget_layout(list), H5D_CHUNKED);
  assert_int_equal(H5Pget_nfilters(list), 1);
  float x[600];
  assert_true(H5Dread(id, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, x) >= 0);
  for (int i = 0; i < 600; i++) assert_true(x[i] == (float)i);
  char *units = NULL;
  assert_int_equal(vd_h5_get_text(id, "units", &units, &err), VD_OK);
  assert_string_equal(units, "1");
  free(units);
  H5Pclose(list);
  H5Dclose(id);
  hid_t group = H5Gopen2(file, "/other/deep", H5P_DEFAULT), glist = H5Gget_create_plist(group);
  unsigned order = 0;
  H5Pget_link_creation_order(glist, &order);
  assert_true(order & H5P_CRT_ORDER_TRACKED);
  H5Pclose(glist);
  H5Gclose(group);
  H5Fclose(file);
}

/* One scale has room for some 4,000 users only: more datasets of one dimension must work all the same. */
static void test_many_users_of_a_scale(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_h5_out out;
  assert_int_equal(vd_h5_begin(&out, f->path, "checkpoint", NULL, &err), VD_OK);
  hsize_t n = 3;
  float x[3] = {1, 2, 3};
  for (int i = 0; i < 4100 && err.status == VD_OK; i++) {
    char path[32];
    snprintf(path, sizeof path, "/t%d", i);
    vd_dataset d = {.path = path,
                    .dtype = VD_F32,
                    .rank = 1,
                    .shape = {n},
                    .chunk = {3},
                    .dimension = {"x"},
                    .units = "1",
                    .long_name = "small"};
    vd_h5_dataset(out.file, &d, x, NULL, &err);
  }
  assert_string_equal(err.message, "");
  check_dimension(out.file, "/t0", 0, "/x");
  check_dimension(out.file, "/t4099", 0, "/x_3");
  vd_h5_abandon(&out);
}

static void test_empty_and_growing(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_h5_out out;
  assert_int_equal(vd_h5_begin(&out, f->path, "trace", NULL, &err), VD_OK);
  vd_dataset update = {.path = "/update",
                       .dtype = VD_I64,
                       .rank = 1,
                       .max_shape = {H5S_UNLIMITED},
                       .dimension = {"update"},
                       .units = "updates",
                       .long_name = "updates done"};
  vd_dataset span = {.path = "/span",
                     .dtype = VD_F32,
                     .rank = 2,
                     .shape = {0, 3},
                     .max_shape = {H5S_UNLIMITED, 0},
                     .dimension = {"update", "head"},
                     .units = "tokens",
                     .long_name = "span"};
  vd_dataset none = {.path = "/none",
                     .dtype = VD_U8,
                     .rank = 1,
                     .shape = {0},
                     .dimension = {"nothing"},
                     .units = "1",
                     .long_name = "an empty split"};
  hid_t id;
  assert_int_equal(vd_h5_dataset(out.file, &update, NULL, &id, &err), VD_OK);
  assert_int_equal(H5DSis_scale(id), 1);
  H5Dclose(id);
  assert_int_equal(vd_h5_dataset(out.file, &span, NULL, &id, &err), VD_OK);
  hsize_t grown[2] = {5, 3};
  assert_true(H5Dset_extent(id, grown) >= 0);
  H5Dclose(id);
  check_dimension(out.file, "/span", 0, "/update");
  assert_int_equal(vd_h5_dataset(out.file, &none, NULL, NULL, &err), VD_OK);
  assert_int_equal(vd_h5_commit(&out, &err), VD_OK);
}

static void test_whole_or_not_at_all(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  vd_h5_out out;
  assert_int_equal(vd_h5_begin(&out, f->path, "nll", NULL, &err), VD_OK);
  assert_int_equal(access(f->path, F_OK), -1);
  assert_true(vd_is_temporary(strrchr(out.at.temporary, '/') + 1, "a.h5"));
  assert_false(vd_is_temporary(strrchr(out.at.temporary, '/') + 1, "b.h5"));
  assert_false(vd_is_temporary(".a.h5.tmp-12x", "a.h5"));
  assert_false(vd_is_temporary("a.h5", NULL));
  vd_h5_abandon(&out);
  assert_int_equal(n_files(f->folder, false), 0);
  write_file(f, &err);
  assert_int_equal(err.status, VD_OK);
  assert_int_equal(n_files(f->folder, false), 1);
  assert_int_equal(vd_h5_begin(&out, "/nowhere/at/all.h5", "nll", NULL, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "No such file"));
}

/* In a namespace of its own: a file system of 8 KiB is mounted over the folder, too small for the file. The child ends
 * in the ordinary way, because HDF5 is known to crash at the end of a program that could not close a file. */
static void write_to_full_disk(fixture *f) {
  if (unshare(CLONE_NEWNS) != 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) exit(77);
  mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL);
  if (mount("none", f->folder, "tmpfs", 0, "size=8k") != 0) exit(77);
  vd_error err = {0};
  write_file(f, &err);
  if (err.status != VD_FAILED || !strstr(err.message, "No space left")) {
    fprintf(stderr, "status %d, '%s'\n", err.status, err.message);
    exit(3);
  }
  exit(n_files(f->folder, false) == 0 ? 0 : 4);
}

static void test_full_disk(void **state) {
  fixture *f = *state;
  pid_t child = fork();
  if (child == 0) write_to_full_disk(f);
  int status = 0;
  assert_int_equal(waitpid(child, &status, 0), child);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 77) skip();
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), 0);
}

static void open_fails(fixture *f, const char *kind, const char *word) {
  vd_error err = {0};
  hid_t file;
  assert_int_equal(vd_h5_open(f->path, kind, &file, &err), VD_FAILED);
  if (!strstr(err.message, word)) fail_msg("'%s' has no '%s'", err.message, word);
  assert_non_null(strstr(err.message, f->path));
}

static void test_open_says_what_is_wrong(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  open_fails(f, NULL, "No such file");
  write_file(f, &err);
  open_fails(f, "corpus", "kind 'checkpoint'");
  struct stat st;
  assert_int_equal(stat(f->path, &st), 0);
  assert_int_equal(truncate(f->path, st.st_size / 2), 0);
  open_fails(f, NULL, "truncated");
  assert_int_equal(truncate(f->path, 0), 0);
  open_fails(f, NULL, "empty");
  FILE *text = fopen(f->path, "w");
  fputs("just a text, longer than a signature", text);
  fclose(text);
  open_fails(f, NULL, "not an HDF5 file");
  hid_t foreign = H5Fcreate(f->path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  H5Fclose(foreign);
  open_fails(f, NULL, "not one of Viaduct's");
}

static void set_format(fixture *f, int64_t version) {
  vd_error err = {0};
  hid_t file = H5Fopen(f->path, H5F_ACC_RDWR, H5P_DEFAULT);
  assert_true(file >= 0);
  assert_true(H5Adelete(file, "format_version") >= 0);
  if (version != 0) assert_int_equal(vd_h5_attr_i64(file, "format_version", version, &err), VD_OK);
  H5Fclose(file);
}

static int64_t format_of(fixture *f) {
  vd_error err = {0};
  hid_t file;
  int64_t version = -1;
  assert_int_equal(vd_h5_open(f->path, "checkpoint", &file, &err), VD_OK);
  assert_int_equal(vd_h5_format(file, &version, &err), VD_OK);
  H5Fclose(file);
  return version;
}

static void test_format_version(void **state) {
  fixture *f = *state;
  vd_error err = {0};
  write_file(f, &err);
  assert_int_equal(format_of(f), VD_FORMAT_VERSION);
  set_format(f, VD_FORMAT_VERSION + 1);
  open_fails(f, "checkpoint", "written by a newer viaduct");
  open_fails(f, NULL, "written by a newer viaduct");
  set_format(f, -1);
  open_fails(f, NULL, "format_version is -1");
  set_format(f, 1);
  assert_int_equal(format_of(f), 1);
  set_format(f, 0); /* no attribute: a file from before there was one */
  assert_int_equal(format_of(f), 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_lock_is_recursive, setup, teardown),
      cmocka_unit_test_setup_teardown(test_lock_excludes, setup, teardown),
      cmocka_unit_test_setup_teardown(test_attributes, setup, teardown),
      cmocka_unit_test_setup_teardown(test_datasets_and_scales, setup, teardown),
      cmocka_unit_test_setup_teardown(test_many_users_of_a_scale, setup, teardown),
      cmocka_unit_test_setup_teardown(test_empty_and_growing, setup, teardown),
      cmocka_unit_test_setup_teardown(test_whole_or_not_at_all, setup, teardown),
      cmocka_unit_test_setup_teardown(test_full_disk, setup, teardown),
      cmocka_unit_test_setup_teardown(test_open_says_what_is_wrong, setup, teardown),
      cmocka_unit_test_setup_teardown(test_format_version, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
