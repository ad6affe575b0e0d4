/* Reading checkpoints. */
#include "io/checkpoint_internal.h"
#include "io/digest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int vd_rows_open(vd_rows *r, hid_t id, const char *path, enum vd_dtype dtype, int64_t first, int64_t n, vd_error *err) {
  *r = (vd_rows){.id = id, .file_space = -1, .memory_space = -1};
  int rank;
  hsize_t shape[4], start[4] = {(hsize_t)first};
  if (id < 0 || vd_h5_check_type(r->id, path, dtype, err) || vd_h5_shape(r->id, path, &rank, shape, err))
    return err->status;
  if (rank < 1 || first < 0 || n < 0 || (hsize_t)(first + n) > shape[0])
    return vd_fail(err, VD_FAILED, "%s has %llu rows; there are none from %lld to %lld", path,
                   rank < 1 ? 0ULL : (unsigned long long)shape[0], (long long)first, (long long)(first + n));
  shape[0] = (hsize_t)n;
  r->file_space = H5Dget_space(r->id);
  r->memory_space = H5Screate_simple(rank, shape, NULL);
  if (n == 0) {
    H5Sselect_none(r->file_space);
    H5Sselect_none(r->memory_space);
  } else if (H5Sselect_hyperslab(r->file_space, H5S_SELECT_SET, start, NULL, shape, NULL) < 0) {
    vd_h5_fail(err, "cannot select rows of %s", path);
  }
  return err->status;
}

void vd_rows_close(vd_rows *r) {
  if (r->memory_space >= 0) H5Sclose(r->memory_space);
  if (r->file_space >= 0) H5Sclose(r->file_space);
  if (r->id >= 0) H5Dclose(r->id);
}

int vd_checkpoint_open(vd_checkpoint **c, vd_h5 *h5, const char *path, bool verify, vd_error *err) {
  *c = NULL;
  /* Before HDF5 parses it: its checksums do not cover everything, and its parser may crash on what they miss. */
  if (verify && vd_digest_check(path, NULL, err)) return err->status;
  vd_h5_lock(h5);
  hid_t file = -1;
  vd_h5_open(path, "checkpoint", &file, err);
  vd_h5_unlock(h5);
  if (err->status) return err->status;
  vd_checkpoint *opened = vd_calloc(1, sizeof *opened);
  opened->h5 = h5;
  opened->file = file;
  opened->out.file = -1;
  snprintf(opened->path, sizeof opened->path, "%s", path);
  *c = opened;
  return VD_OK;
}

int vd_checkpoint_shape(vd_checkpoint *c, const char *path, int *rank, hsize_t shape[4], vd_error *err) {
  vd_h5_lock(c->h5);
  hid_t id;
  if (vd_h5_open_dataset(c->file, path, &id, err) == VD_OK) {
    vd_h5_shape(id, path, rank, shape, err);
    H5Dclose(id);
  }
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

/* By its links alone: what is there and cannot be read is an error when it is read, and never absent. */
bool vd_checkpoint_has(vd_checkpoint *c, const char *path) {
  char part[256];
  bool has = true;
  vd_h5_lock(c->h5);
  for (const char *end = path; has && *end;) {
    end += 1 + strcspn(end + 1, "/");
    snprintf(part, sizeof part, "%.*s", (int)(end - path), path);
    has = H5Lexists(c->file, part, H5P_DEFAULT) > 0;
  }
  vd_h5_unlock(c->h5);
  return has;
}

int vd_checkpoint_get(vd_checkpoint *c, const char *path, enum vd_dtype dtype, int rank, const hsize_t *shape,
                      void *out, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_h5_read(c->file, path, dtype, rank, shape, out, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_get_rows(vd_checkpoint *c, const char *path, enum vd_dtype dtype, int64_t first, int64_t n, void *out,
                           vd_error *err) {
  vd_rows r;
  hid_t opened;
  vd_h5_lock(c->h5);
  vd_h5_open_dataset(c->file, path, &opened, err);
  if (vd_rows_open(&r, opened, path, dtype, first, n, err) == VD_OK &&
      H5Dread(r.id, vd_h5_type(dtype), r.memory_space, r.file_space, H5P_DEFAULT, out) < 0)
    vd_h5_fail(err, "cannot read %s", path);
  vd_rows_close(&r);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_get_vocabulary(vd_checkpoint *c, vd_vocabulary *v, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_vocabulary_read(c->file, v, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_get_text(vd_checkpoint *c, const char *attribute, char **value, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_h5_get_text(c->file, attribute, value, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_get_i64(vd_checkpoint *c, const char *attribute, int64_t *value, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_h5_get_i64(c->file, attribute, value, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_get_f64(vd_checkpoint *c, const char *attribute, double *value, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_h5_get_f64(c->file, attribute, value, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

hid_t vd_checkpoint_file(vd_checkpoint *c) {
  return c->file;
}

void vd_checkpoint_close(vd_checkpoint **c) {
  if (!*c) return;
  vd_h5_lock((*c)->h5);
  H5Fclose((*c)->file);
  vd_h5_unlock((*c)->h5);
  free(*c);
  *c = NULL;
}
