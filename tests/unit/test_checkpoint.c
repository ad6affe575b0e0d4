/* Checkpoints: what was put comes back; every damaged byte and every cut is refused with a named error; the newest
 * whole one is found. */
#include "io/checkpoint.h"
#include "io/digest.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define RUN "test_checkpoint_run"

static void write_one(vd_h5 *h5, int64_t update) {
  vd_error err = {0};
  vd_checkpoint *c;
  char path[256];
  float weight[15], memory[8];
  for (int i = 0; i < 15; i++) weight[i] = (float)update + 0.5f * (float)i;
  for (int i = 0; i < 8; i++) memory[i] = (float)i;
  vd_checkpoint_path(RUN, update, path, sizeof path);
  vd_dataset w = {.path = "/model/layers.0.weight",
                  .dtype = VD_F32,
                  .rank = 2,
                  .shape = {3, 5},
                  .dimension = {"out", "in"},
                  .units = "1",
                  .long_name = "weight"};
  vd_dataset m = {.path = "/memory/layer0",
                  .dtype = VD_F32,
                  .rank = 2,
                  .shape = {4, 2},
                  .dimension = {"stream", "d"},
                  .units = "1",
                  .long_name = "memory"};
  assert_int_equal(vd_checkpoint_begin(&c, h5, path, NULL, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put(c, &w, weight, &err), VD_OK);
  assert_int_equal(vd_checkpoint_create(c, &m, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put_rows(c, m.path, 2, 2, memory + 4, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put_rows(c, m.path, 0, 2, memory, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put_i64(c, "update", update, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put_text(c, "settings", "&run /", &err), VD_OK);
  assert_int_equal(vd_checkpoint_commit(&c, &err), VD_OK);
}

static void test_comes_back(void **state) {
  vd_error err = {0};
  vd_checkpoint *c;
  float x[15];
  int64_t update;
  write_one(*state, 7);
  assert_int_equal(vd_checkpoint_open(&c, *state, RUN "/checkpoints/update-00000007.h5", true, &err), VD_OK);
  assert_int_equal(vd_checkpoint_get(c, "/model/layers.0.weight", VD_F32, 2, (hsize_t[]){3, 5}, x, &err), VD_OK);
  assert_true(x[14] == 14.0f);
  assert_int_equal(vd_checkpoint_get_rows(c, "/memory/layer0", VD_F32, 1, 2, x, &err), VD_OK);
  assert_true(x[0] == 2.0f && x[3] == 5.0f);
  assert_int_equal(vd_checkpoint_get_i64(c, "update", &update, &err), VD_OK);
  assert_int_equal(update, 7);
  assert_int_equal(vd_checkpoint_get(c, "/model/layers.0.weight", VD_F32, 1, (hsize_t[]){15}, x, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "the shape of /model/layers.0.weight is [3, 5], but [15] is wanted"));
  err = (vd_error){0};
  assert_int_equal(vd_checkpoint_get(c, "/model/nothing", VD_F32, 1, (hsize_t[]){15}, x, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "there is no dataset /model/nothing"));
  err = (vd_error){0};
  assert_int_equal(vd_checkpoint_get(c, "/memory/layer0", VD_F64, 2, (hsize_t[]){4, 2}, x, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "holds float32, but float64 is wanted"));
  vd_checkpoint_close(&c);
}

/* Flips one bit in every 13th byte, and cuts the file at every 97th: all are refused. */
static void test_damage_is_named(void **state) {
  const char *path = RUN "/checkpoints/update-00000009.h5";
  write_one(*state, 9);
  struct stat info;
  assert_int_equal(stat(path, &info), 0);
  char *bytes = vd_calloc((size_t)info.st_size, 1);
  FILE *f = fopen(path, "rb");
  assert_int_equal(fread(bytes, 1, (size_t)info.st_size, f), info.st_size);
  fclose(f);
  for (long at = 0, step = 0; at < info.st_size; at += 13, step++) {
    bool cut = step % 7 == 0;
    bytes[at] ^= (char)(1 << (step % 8));
    f = fopen(path, "wb");
    fwrite(bytes, 1, cut ? (size_t)at : (size_t)info.st_size, f);
    fclose(f);
    bytes[at] ^= (char)(1 << (step % 8));
    vd_error err = {0};
    vd_checkpoint *c;
    assert_int_equal(vd_checkpoint_open(&c, *state, path, true, &err), VD_FAILED);
    assert_null(c);
    assert_non_null(strstr(err.message, path));
  }
  free(bytes);
  unlink(path);
}

static void test_newest_and_prune(void **state) {
  vd_error err = {0};
  char path[256], warning[1024];
  for (int64_t u = 10; u <= 50; u += 10) write_one(*state, u);
  assert_int_equal(vd_checkpoint_link(RUN, "best", 20, &err), VD_OK);
  assert_int_equal(vd_checkpoint_link(RUN, "last", 40, &err), VD_OK);
  assert_int_equal(vd_checkpoint_link(RUN, "last", 50, &err), VD_OK);
  fclose(fopen(RUN "/checkpoints/.update-00000060.h5.tmp-1", "w"));
  assert_int_equal(vd_checkpoint_prune(RUN, 2, &err), VD_OK);
  assert_int_equal(access(RUN "/checkpoints/.update-00000060.h5.tmp-1", F_OK), -1);
  assert_int_equal(access(RUN "/checkpoints/update-00000010.h5", F_OK), -1);
  assert_int_equal(access(RUN "/checkpoints/best.h5", F_OK), 0);
  assert_int_equal(access(RUN "/checkpoints/update-00000030.h5", F_OK), -1);
  assert_int_equal(truncate(RUN "/checkpoints/update-00000050.h5", 3000), 0);
  assert_int_equal(vd_checkpoint_newest(*state, RUN, path, sizeof path, warning, sizeof warning, &err), VD_OK);
  assert_string_equal(path, RUN "/checkpoints/update-00000040.h5");
  assert_non_null(strstr(warning, "update-00000050.h5"));
  assert_int_equal(vd_checkpoint_newest(*state, "no-such-run", path, sizeof path, warning, sizeof warning, &err),
                   VD_OK);
  assert_string_equal(path, "");
}

/* A whole checkpoint of a later format. */
static void write_newer(vd_h5 *h5, int64_t update) {
  vd_error err = {0};
  vd_h5_out out;
  char path[256];
  vd_checkpoint_path(RUN, update, path, sizeof path);
  vd_h5_lock(h5);
  assert_int_equal(vd_h5_begin(&out, path, "checkpoint", NULL, &err), VD_OK);
  assert_true(H5Adelete(out.file, "format_version") >= 0);
  assert_int_equal(vd_h5_attr_i64(out.file, "format_version", VD_FORMAT_VERSION + 1, &err), VD_OK);
  assert_int_equal(vd_h5_finish(&out, &err), VD_OK);
  assert_int_equal(vd_digest_seal(out.at.temporary, &err), VD_OK);
  assert_int_equal(vd_h5_commit(&out, &err), VD_OK);
  vd_h5_unlock(h5);
}

/* A run does not fall back to an older checkpoint when a newer program wrote the newest: it would overwrite its work.
 */
static void test_newer_format_is_no_damage(void **state) {
  vd_error err = {0};
  char path[256], warning[1024];
  write_one(*state, 70);
  write_newer(*state, 80);
  assert_int_equal(vd_checkpoint_newest(*state, RUN, path, sizeof path, warning, sizeof warning, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "update-00000080.h5 was written by a newer viaduct"));
  assert_string_equal(path, "");
  assert_int_equal(unlink(RUN "/checkpoints/update-00000080.h5"), 0);
}

/* A value for each element, as a memory in bfloat16 has it. */
static float value_of(size_t i) {
  return (float)((i * 2654435761u >> 24) % 256) * 0.0078125f;
}

/* Tensors whose chunks are cut along each dimension, with and without a rest. */
static const vd_dataset tensors[] = {
    {.path = "/model/line", .rank = 1, .shape = {300001}},
    {.path = "/model/flat", .rank = 2, .shape = {1, 200003}},
    {.path = "/model/table", .rank = 2, .shape = {777, 513}},
    {.path = "/model/cube", .rank = 3, .shape = {3, 5, 12345}},
    {.path = "/model/deep", .rank = 3, .shape = {2, 3, 150001}},
};
enum { N_TENSOR = sizeof tensors / sizeof *tensors, STREAMS = 6, ROWS = 301, WIDTH = 1024 };

static size_t size_of(const vd_dataset *d) {
  size_t n = 1;
  for (int i = 0; i < d->rank; i++) n *= (size_t)d->shape[i];
  return n;
}

static void write_compressed(vd_h5 *h5, const char *path, const float *x) {
  vd_error err = {0};
  vd_checkpoint *c;
  assert_int_equal(vd_checkpoint_begin(&c, h5, path, NULL, &err), VD_OK);
  vd_checkpoint_compress(c);
  for (int i = 0; i < N_TENSOR; i++) {
    vd_dataset d = tensors[i];
    d.dtype = VD_F32;
    for (int k = 0; k < 3; k++) d.dimension[k] = (const char *[]){"a", "b", "c"}[k];
    d.units = "1";
    d.long_name = "tensor";
    assert_int_equal(vd_checkpoint_put(c, &d, x, &err), VD_OK);
  }
  vd_dataset m = {.path = "/memory/layer0",
                  .dtype = VD_F32,
                  .rank = 3,
                  .shape = {STREAMS, ROWS, WIDTH},
                  .dimension = {"stream", "position", "feature"},
                  .units = "1",
                  .long_name = "memory"};
  const size_t stream = (size_t)ROWS * WIDTH;
  assert_int_equal(vd_checkpoint_create(c, &m, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put_rows(c, m.path, 3, 3, x + 3 * stream, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put_rows(c, m.path, 0, 1, x, &err), VD_OK);
  assert_int_equal(vd_checkpoint_put_rows(c, m.path, 1, 2, x + stream, &err), VD_OK);
  assert_int_equal(vd_checkpoint_commit(&c, &err), VD_OK);
}

/* Compressed tensors come back, and the file is less than half. */
static void test_compressed(void **state) {
  const char *path = RUN "/checkpoints/compressed.h5";
  const size_t n = (size_t)STREAMS * ROWS * WIDTH;
  float *x = vd_calloc(n, sizeof *x), *y = vd_calloc(n, sizeof *y);
  size_t all = n;
  vd_error err = {0};
  vd_checkpoint *c;
  struct stat info;
  for (size_t i = 0; i < n; i++) x[i] = value_of(i);
  write_compressed(*state, path, x);
  assert_int_equal(vd_checkpoint_open(&c, *state, path, true, &err), VD_OK);
  for (int i = 0; i < N_TENSOR; i++) {
    const vd_dataset *d = &tensors[i];
    assert_int_equal(vd_checkpoint_get(c, d->path, VD_F32, d->rank, d->shape, y, &err), VD_OK);
    assert_memory_equal(x, y, size_of(d) * sizeof *x);
    all += size_of(d);
  }
  assert_int_equal(vd_checkpoint_get_rows(c, "/memory/layer0", VD_F32, 1, 4, y, &err), VD_OK);
  assert_memory_equal(x + n / STREAMS, y, n / STREAMS * 4 * sizeof *x);
  vd_checkpoint_close(&c);
  assert_int_equal(stat(path, &info), 0);
  assert_true((size_t)info.st_size < all * sizeof *x / 2);
  free(x);
  free(y);
}

/* One wrong byte in a compressed chunk is an error that names the dataset, where the digest was not compared, too. */
static void test_damaged_chunk(void **state) {
  const char *path = RUN "/checkpoints/compressed.h5";
  const hsize_t *shape = tensors[2].shape;
  float *y = vd_calloc(777 * 513, sizeof *y);
  vd_error err = {0};
  vd_checkpoint *c;
  haddr_t address;
  hsize_t bytes;
  unsigned skipped;
  hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT), id = H5Dopen2(file, "/model/table", H5P_DEFAULT);
  assert_true(H5Dget_chunk_info_by_coord(id, (hsize_t[]){0, 0}, &skipped, &address, &bytes) >= 0);
  H5Dclose(id);
  H5Fclose(file);
  assert_int_equal(skipped, 0);
  for (hsize_t at = 5; at < bytes; at += bytes / 7) {
    FILE *f = fopen(path, "r+b");
    assert_int_equal(fseek(f, (long)(address + at), SEEK_SET), 0);
    int byte = fgetc(f);
    for (int turn = 0; turn < 2; turn++) { /* damaged, then whole again */
      assert_int_equal(fseek(f, (long)(address + at), SEEK_SET), 0);
      fputc(turn == 0 ? byte ^ 16 : byte, f);
      fflush(f);
      err = (vd_error){0};
      assert_int_equal(vd_checkpoint_open(&c, *state, path, true, &err), turn == 0 ? VD_FAILED : VD_OK);
      if (turn == 0) assert_non_null(strstr(err.message, "is damaged: its SHA-256"));
      vd_checkpoint_close(&c);
      err = (vd_error){0};
      assert_int_equal(vd_checkpoint_open(&c, *state, path, false, &err), VD_OK);
      assert_int_equal(vd_checkpoint_get(c, "/model/table", VD_F32, 2, shape, y, &err), turn == 0 ? VD_FAILED : VD_OK);
      if (turn == 0) assert_non_null(strstr(err.message, "compressed.h5: cannot read /model/table"));
      vd_checkpoint_close(&c);
    }
    fclose(f);
  }
  free(y);
}

/* A folder of its own: another build of the same test may run beside this one. */
static int setup(void **state) {
  vd_error err = {0};
  const char *base = getenv("TMPDIR");
  char folder[256];
  snprintf(folder, sizeof folder, "%s/test-checkpoint-XXXXXX", base ? base : "/tmp");
  if (!mkdtemp(folder) || chdir(folder) != 0 || mkdir(RUN, 0777) != 0) return -1;
  return vd_h5_create((vd_h5 **)state, &err);
}

static int teardown(void **state) {
  vd_h5_destroy(*state);
  return system("rm -rf \"$PWD\"");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_comes_back),       cmocka_unit_test(test_damage_is_named),
      cmocka_unit_test(test_newest_and_prune), cmocka_unit_test(test_newer_format_is_no_damage),
      cmocka_unit_test(test_compressed),       cmocka_unit_test(test_damaged_chunk)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
