/* The rows of a trace in memory, and writing them as a sealed file. */
#include "io/digest.h"
#include "io/trace_internal.h"
#include "src/base/clock.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const vd_trace_column vd_trace_columns[VD_TRACE_DOUBLES] = {
    [VD_TRACE_BPC] = {"/train_bpc", "bits", "training loss, bits per symbol (bpc), mean since the row before"},
    [VD_TRACE_RATE] = {"/learning_rate", "1", "learning rate"},
    [VD_TRACE_NORM] = {"/grad_norm", "1", "norm of the gradient, before clipping"},
    [VD_TRACE_SPEED] = {"/tokens_per_second", "s-1", "training tokens per second, all ranks"},
    [VD_TRACE_WALL] = {"/wall", "s", "seconds since the run began, earlier parts included, waits between them not"},
    [VD_TRACE_TIME] = {"/time", "seconds since 1970-01-01 00:00:00", "time of the row, UTC"},
};

struct image {
  const vd_trace *trace;
  hsize_t n_row, n_valid;
};

static hsize_t width(const vd_trace *t) {
  return t->n_layer * t->n_head;
}

void vd_trace_append(vd_trace *t, const vd_trace_row *row) {
  hsize_t i = t->n_row % VD_TRACE_BLOCK;
  if (t->n_row > 0 && row->update <= t->last->update[(t->n_row - 1) % VD_TRACE_BLOCK])
    vd_bug("update %lld is traced after update %lld", (long long)row->update,
           (long long)t->last->update[(t->n_row - 1) % VD_TRACE_BLOCK]);
  if (i == 0) {
    vd_trace_block *b = vd_calloc(1, sizeof *b);
    b->span = vd_calloc(VD_TRACE_BLOCK * width(t), sizeof *b->span);
    if (t->last)
      t->last->next = b;
    else
      t->first = b;
    t->last = b;
  }
  const double value[VD_TRACE_DOUBLES] = {
      [VD_TRACE_BPC] = row->train_bpc,           [VD_TRACE_RATE] = row->learning_rate, [VD_TRACE_NORM] = row->grad_norm,
      [VD_TRACE_SPEED] = row->tokens_per_second, [VD_TRACE_WALL] = row->wall,          [VD_TRACE_TIME] = row->time,
  };
  t->last->update[i] = row->update;
  for (int k = 0; k < VD_TRACE_DOUBLES; k++) t->last->value[k][i] = value[k];
  memcpy(t->last->span + i * width(t), row->span, width(t) * sizeof *row->span);
  t->n_row++;
}

void vd_trace_append_valid(vd_trace *t, int64_t update, double bpc) {
  hsize_t i = t->n_valid % VD_TRACE_BLOCK;
  if (i == 0) {
    vd_trace_valid *b = vd_calloc(1, sizeof *b);
    if (t->last_valid)
      t->last_valid->next = b;
    else
      t->first_valid = b;
    t->last_valid = b;
  }
  t->last_valid->update[i] = update;
  t->last_valid->bpc[i] = bpc;
  t->n_valid++;
}

bool vd_trace_is_due(const vd_trace *t, double seconds) {
  return (t->n_row > t->n_captured_row || t->n_valid > t->n_captured_valid) &&
         vd_clock_seconds() - t->captured >= seconds;
}

void *vd_trace_capture(vd_trace *t) {
  struct image *image = vd_calloc(1, sizeof *image);
  *image = (struct image){t, t->n_row, t->n_valid};
  t->n_captured_row = t->n_row;
  t->n_captured_valid = t->n_valid;
  t->captured = vd_clock_seconds();
  return image;
}

static int put_indices(hid_t file, const char *path, hsize_t n, const char *name, const char *long_name,
                       vd_error *err) {
  int32_t *index = vd_calloc(n, sizeof *index);
  for (hsize_t i = 0; i < n; i++) index[i] = (int32_t)i;
  vd_dataset d = {.path = path,
                  .dtype = VD_I32,
                  .rank = 1,
                  .shape = {n},
                  .dimension = {name},
                  .units = "1",
                  .long_name = long_name};
  vd_h5_dataset(file, &d, index, NULL, err);
  free(index);
  return err->status;
}

/* A dataset of n rows: [n], or of spans [n, layer, head]. The caller closes *id. */
static int create_rows(const vd_trace *t, hid_t file, enum vd_dtype dtype, const vd_trace_column *c, bool spans,
                       hsize_t n, hid_t *id, vd_error *err) {
  vd_dataset d = {.path = c->path,
                  .dtype = dtype,
                  .rank = spans ? 3 : 1,
                  .shape = {n, t->n_layer, t->n_head},
                  .max_shape = {H5S_UNLIMITED, 0, 0},
                  .chunk = {spans ? 64 : VD_TRACE_BLOCK, t->n_layer, t->n_head},
                  .dimension = {"update", "layer", "head"},
                  .units = c->units,
                  .long_name = c->long_name};
  return vd_h5_dataset(file, &d, NULL, id, err);
}

enum { COLUMN_UPDATE = -2, COLUMN_SPAN = -1 }; /* before the columns of doubles */

/* What CF conventions say of coordinates besides their units: /time is a date, and the columns of a row name /wall and
 * /time, which xarray then shows as coordinates along `update`. */
static int describe_axes(hid_t id, int column, vd_error *err) {
  if (column == VD_TRACE_TIME && vd_h5_attr_text(id, "standard_name", "time", err) == VD_OK)
    return vd_h5_attr_text(id, "calendar", "standard", err);
  bool is_axis = column == COLUMN_UPDATE || column == VD_TRACE_TIME || column == VD_TRACE_WALL;
  return is_axis ? err->status : vd_h5_attr_text(id, "coordinates", "wall time", err);
}

/* Writes rows [at, at + n) of a dataset. */
static int put_block(hid_t id, enum vd_dtype dtype, const hsize_t tail[2], hsize_t at, hsize_t n, const void *data,
                     vd_error *err) {
  hsize_t start[3] = {at, 0, 0}, count[3] = {n, tail[0], tail[1]};
  int rank = tail[0] > 0 ? 3 : 1;
  hid_t memory = H5Screate_simple(rank, count, NULL), space = H5Dget_space(id);
  if (H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
      H5Dwrite(id, vd_h5_type(dtype), memory, space, H5P_DEFAULT, data) < 0)
    vd_h5_fail(err, "cannot write rows %llu to %llu", (unsigned long long)at, (unsigned long long)(at + n));
  H5Sclose(space);
  H5Sclose(memory);
  return err->status;
}

static const void *block_data(const vd_trace_block *b, int column) {
  if (column == COLUMN_UPDATE) return b->update;
  return column == COLUMN_SPAN ? (const void *)b->span : b->value[column];
}

static int put_column(const struct image *image, hid_t file, int column, vd_error *err) {
  static const vd_trace_column update = {"/update", "1", "updates done"};
  static const vd_trace_column span = {"/span", "tokens", "attention span of each head"};
  const vd_trace *t = image->trace;
  const vd_trace_column *c = column == COLUMN_UPDATE ? &update
                             : column == COLUMN_SPAN ? &span
                                                     : &vd_trace_columns[column];
  enum vd_dtype dtype = column == COLUMN_UPDATE ? VD_I64 : column == COLUMN_SPAN ? VD_F32 : VD_F64;
  const hsize_t tail[2] = {column == COLUMN_SPAN ? t->n_layer : 0, column == COLUMN_SPAN ? t->n_head : 0};
  hid_t id = -1;
  const vd_trace_block *b = t->first;
  if (create_rows(t, file, dtype, c, column == COLUMN_SPAN, image->n_row, &id, err)) return err->status;
  describe_axes(id, column, err);
  for (hsize_t at = 0; at < image->n_row && err->status == VD_OK; at += VD_TRACE_BLOCK) {
    if (at > 0) b = b->next;
    hsize_t n = image->n_row - at < VD_TRACE_BLOCK ? image->n_row - at : VD_TRACE_BLOCK;
    put_block(id, dtype, tail, at, n, block_data(b, column), err);
  }
  H5Dclose(id);
  return vd_wrap(err, "%s", c->path);
}

static int put_valid(const struct image *image, hid_t file, vd_error *err) {
  static const vd_trace_column column[2] = {{"/valid/update", "1", "updates done"},
                                            {"/valid/bpc", "bits", "validation loss, bits per symbol (bpc)"}};
  const hsize_t tail[2] = {0, 0};
  for (int i = 0; i < 2 && err->status == VD_OK; i++) {
    hid_t id = -1;
    const vd_trace_valid *b = image->trace->first_valid;
    if (create_rows(image->trace, file, i == 0 ? VD_I64 : VD_F64, &column[i], false, image->n_valid, &id, err)) break;
    for (hsize_t at = 0; at < image->n_valid && err->status == VD_OK; at += VD_TRACE_BLOCK) {
      if (at > 0) b = b->next;
      hsize_t n = image->n_valid - at < VD_TRACE_BLOCK ? image->n_valid - at : VD_TRACE_BLOCK;
      put_block(id, i == 0 ? VD_I64 : VD_F64, tail, at, n, i == 0 ? (const void *)b->update : b->bpc, err);
    }
    H5Dclose(id);
  }
  return err->status;
}

/* The coordinates come before what attaches to them. */
static int put_all(const struct image *image, hid_t file, vd_error *err) {
  const vd_trace *t = image->trace;
  /* Rows that HDF5 holds back are as many as the image's at most; a flush that fails for want of space cannot be
   * undone. */
  size_t bytes = image->n_row * (width(t) * sizeof(float) + 64) + image->n_valid * 16;
  if (vd_h5_reserve(file, t->path, 2 * bytes + 65536, err) ||
      put_indices(file, "/layer", t->n_layer, "layer", "layer, counted from 0 at the input", err) ||
      put_indices(file, "/head", t->n_head, "head", "attention head", err))
    return err->status;
  for (int i = COLUMN_UPDATE; i < VD_TRACE_DOUBLES && err->status == VD_OK; i++) put_column(image, file, i, err);
  return put_valid(image, file, err);
}

void vd_trace_write(void *captured, vd_error *err) {
  struct image *image = captured;
  const vd_trace *t = image->trace;
  if (err->status == VD_OK) {
    vd_h5_out out = {.file = -1};
    vd_h5_lock(t->h5);
    if (vd_h5_begin(&out, t->path, "trace", t->origin, err) == VD_OK && put_all(image, out.file, err) == VD_OK)
      vd_h5_finish(&out, err);
    if (err->status) vd_h5_abandon(&out);
    vd_h5_unlock(t->h5);
    /* The file is closed: HDF5 is free for others while it is read again and synced. */
    if (err->status == VD_OK && vd_digest_seal(out.at.temporary, err) == VD_OK) vd_h5_commit(&out, err);
    if (err->status) {
      vd_h5_lock(t->h5);
      vd_h5_abandon(&out);
      vd_h5_unlock(t->h5);
      vd_wrap(err, "the trace %s", t->path);
    }
  }
  free(image);
}

static void free_rows(vd_trace *t) {
  while (t->first) {
    vd_trace_block *next = t->first->next;
    free(t->first->span);
    free(t->first);
    t->first = next;
  }
  while (t->first_valid) {
    vd_trace_valid *next = t->first_valid->next;
    free(t->first_valid);
    t->first_valid = next;
  }
  t->last = NULL;
  t->last_valid = NULL;
  t->n_row = t->n_valid = 0;
}

/* Moves a file that is not taken over to the first name that is free, so that nothing of it is lost. */
static int set_aside(vd_trace *t, const char *why, vd_error *err) {
  const char *slash = strrchr(t->path, '/');
  int folder = slash ? (int)(slash + 1 - t->path) : 0;
  char name[1088];
  for (int i = 1; i < 1000000; i++) {
    snprintf(name, sizeof name, "%.*strace-set-aside-%d.h5", folder, t->path, i);
    if (access(name, F_OK) != 0 && errno == ENOENT) break;
  }
  if (rename(t->path, name) != 0)
    return vd_fail(err, VD_FAILED, "cannot rename %s, which is not taken over (%s), to %s: %s", t->path, why, name,
                   strerror(errno));
  snprintf(t->notice, sizeof t->notice, "%s is renamed to %s and a new trace begins: %.1000s", t->path, name + folder,
           why);
  return VD_OK;
}

int vd_trace_open(vd_trace **trace, vd_h5 *h5, const char *path, int n_layer, int n_head, int64_t update,
                  const vd_origin *origin, vd_error *err) {
  *trace = NULL;
  vd_trace *t = vd_calloc(1, sizeof *t);
  t->h5 = h5;
  t->n_layer = (hsize_t)n_layer;
  t->n_head = (hsize_t)n_head;
  t->origin = origin;
  vd_error why = {0};
  if (snprintf(t->path, sizeof t->path, "%s", path) >= (int)sizeof t->path) {
    vd_fail(err, VD_FAILED, "the path is too long: %s", path);
  } else if (access(path, F_OK) == 0 && vd_trace_read(t, update, &why)) {
    free_rows(t);
    set_aside(t, why.message, err);
  }
  if (err->status == VD_OK) vd_trace_write(vd_trace_capture(t), err);
  if (err->status == VD_OK) {
    *trace = t;
    return VD_OK;
  }
  free_rows(t);
  free(t);
  return err->status;
}

const char *vd_trace_notice(const vd_trace *t) {
  return t->notice;
}

int vd_trace_close(vd_trace **trace, vd_error *err) {
  vd_trace *t = *trace;
  if (!t) return VD_OK;
  vd_error last = {0};
  if (t->n_row > t->n_captured_row || t->n_valid > t->n_captured_valid) vd_trace_write(vd_trace_capture(t), &last);
  if (last.status) vd_fail(err, last.status, "%s", last.message);
  free_rows(t);
  free(t);
  *trace = NULL;
  return err->status;
}
