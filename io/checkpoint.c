/* Writing checkpoints. */
#include "io/checkpoint_internal.h"
#include "io/digest.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int vd_checkpoint_begin(vd_checkpoint **c, vd_h5 *h5, const char *path, const vd_origin *origin, vd_error *err) {
  char folder[1024];
  *c = NULL;
  vd_split_path(path, folder, sizeof folder);
  if (vd_make_folder(folder, err)) return err->status;
  vd_checkpoint *made = vd_calloc(1, sizeof *made);
  made->h5 = h5;
  made->file = -1;
  snprintf(made->path, sizeof made->path, "%s", path);
  vd_h5_lock(h5);
  vd_h5_begin(&made->out, path, "checkpoint", origin, err);
  vd_h5_unlock(h5);
  if (err->status)
    free(made);
  else
    *c = made;
  return err->status;
}

void vd_checkpoint_compress(vd_checkpoint *c) {
  vd_h5_lock(c->h5);
  c->compress = vd_h5_can_compress();
  vd_h5_unlock(c->h5);
}

/* Small datasets would save little. */
static bool is_compressed(const vd_checkpoint *c, const vd_dataset *d) {
  enum { LEAST_BYTES = 16 * 1024 };
  hsize_t bytes = vd_dtype_size(d->dtype);
  for (int i = 0; i < d->rank; i++) bytes *= d->shape[i];
  return c->compress && d->rank > 0 && (d->dtype == VD_F32 || d->dtype == VD_F64) && bytes >= LEAST_BYTES;
}

int vd_checkpoint_put(vd_checkpoint *c, const vd_dataset *d, const void *data, vd_error *err) {
  vd_dataset made = *d;
  made.compressed = is_compressed(c, d);
  vd_h5_lock(c->h5);
  vd_h5_dataset(c->out.file, &made, made.compressed ? NULL : data, NULL, err);
  vd_h5_unlock(c->h5);
  if (made.compressed && err->status == VD_OK)
    vd_h5_put_chunks(c->h5, c->out.file, d->path, d->dtype, 0, (int64_t)d->shape[0], data, err);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_create(vd_checkpoint *c, const vd_dataset *d, vd_error *err) {
  if (d->rank < 1) vd_bug("%s has no rows", d->path);
  vd_dataset made = *d;
  made.compressed = is_compressed(c, d);
  if (made.compressed) made.chunk[0] = 1; /* rows come in any number, and in any order */
  vd_h5_lock(c->h5);
  vd_h5_dataset(c->out.file, &made, NULL, NULL, err);
  vd_h5_unlock(c->h5);
  if (err->status) return vd_wrap(err, "%s", c->path);
  vd_part *part = realloc(c->part, (size_t)(c->n_part + 1) * sizeof *part);
  if (!part) vd_bug("no memory for %d parts", c->n_part + 1);
  c->part = part;
  part += c->n_part++;
  if (snprintf(part->path, sizeof part->path, "%s", d->path) >= (int)sizeof part->path)
    vd_bug("the name of a dataset is too long: %s", d->path);
  part->rows = (int64_t)d->shape[0];
  part->dtype = d->dtype;
  part->compressed = made.compressed;
  part->written = 0;
  return VD_OK;
}

int vd_checkpoint_put_rows(vd_checkpoint *c, const char *path, int64_t first, int64_t n, const void *data,
                           vd_error *err) {
  vd_part *part = NULL;
  for (int i = 0; i < c->n_part; i++)
    if (strcmp(c->part[i].path, path) == 0) part = &c->part[i];
  if (!part) vd_bug("%s was not made by vd_checkpoint_create()", path);
  part->written += n;
  if (part->compressed) {
    vd_h5_put_chunks(c->h5, c->out.file, path, part->dtype, first, n, data, err);
    return vd_wrap(err, "%s", c->path);
  }
  vd_rows r;
  vd_h5_lock(c->h5);
  if (vd_rows_open(&r, H5Dopen2(c->out.file, path, H5P_DEFAULT), path, part->dtype, first, n, err) == VD_OK &&
      H5Dwrite(r.id, vd_h5_type(part->dtype), r.memory_space, r.file_space, H5P_DEFAULT, data) < 0)
    vd_h5_fail(err, "cannot write %s", path);
  vd_rows_close(&r);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_put_vocabulary(vd_checkpoint *c, const vd_vocabulary *v, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_vocabulary_write(c->out.file, v, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_put_text(vd_checkpoint *c, const char *attribute, const char *value, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_h5_attr_text(c->out.file, attribute, value, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_put_i64(vd_checkpoint *c, const char *attribute, int64_t value, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_h5_attr_i64(c->out.file, attribute, value, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_put_f64(vd_checkpoint *c, const char *attribute, double value, vd_error *err) {
  vd_h5_lock(c->h5);
  vd_h5_attr_f64(c->out.file, attribute, value, err);
  vd_h5_unlock(c->h5);
  return vd_wrap(err, "%s", c->path);
}

int vd_checkpoint_commit(vd_checkpoint **c, vd_error *err) {
  vd_checkpoint *done = *c;
  for (int i = 0; i < done->n_part; i++)
    if (done->part[i].written != done->part[i].rows)
      vd_bug("%s: %lld rows of %lld were written", done->part[i].path, (long long)done->part[i].written,
             (long long)done->part[i].rows);
  vd_h5_lock(done->h5);
  vd_h5_finish(&done->out, err);
  vd_h5_unlock(done->h5);
  /* The file is closed: HDF5 is free for others while it is read again and synced. */
  if (err->status == VD_OK && vd_digest_seal(done->out.at.temporary, err) == VD_OK) vd_h5_commit(&done->out, err);
  vd_wrap(err, "%s", done->path);
  vd_checkpoint_abandon(c); /* of a committed file there is nothing left to remove */
  return err->status;
}

void vd_checkpoint_abandon(vd_checkpoint **c) {
  if (!*c) return;
  vd_h5_lock((*c)->h5);
  vd_h5_abandon(&(*c)->out);
  vd_h5_unlock((*c)->h5);
  free((*c)->part);
  free(*c);
  *c = NULL;
}
