/* Taking over the rows of a trace that is there already. Nothing that the file says is believed before it is checked.
 */
#include "io/digest.h"
#include "io/trace_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A column of the old file: an open dataset and its rows. */
struct column {
  hid_t id;
  hsize_t rows;
};

/* Opens a dataset of `rank` dimensions, the last of which are `tail`, of numbers of class `kind`, kept in this file. */
static int open_column(hid_t file, const char *path, H5T_class_t kind, int rank, const hsize_t tail[2],
                       struct column *c, vd_error *err) {
  hsize_t shape[H5S_MAX_RANK] = {0};
  if (vd_h5_open_dataset(file, path, &c->id, err)) return err->status;
  hid_t space = H5Dget_space(c->id), type = H5Dget_type(c->id);
  bool right = H5Tget_class(type) == kind && H5Tget_size(type) <= 8 && H5Sget_simple_extent_ndims(space) == rank;
  if (right) H5Sget_simple_extent_dims(space, shape, NULL);
  H5Tclose(type);
  H5Sclose(space);
  c->rows = shape[0];
  if (!right) return vd_fail(err, VD_FAILED, "%s has another type or rank than a trace's", path);
  if (rank == 3 && (shape[1] != tail[0] || shape[2] != tail[1]))
    return vd_fail(err, VD_FAILED, "it is the trace of %llu layers and %llu heads; this run has %llu and %llu",
                   (unsigned long long)shape[1], (unsigned long long)shape[2], (unsigned long long)tail[0],
                   (unsigned long long)tail[1]);
  return VD_OK;
}

static int read_rows(const struct column *c, hid_t type, const hsize_t tail[2], int rank, hsize_t at, hsize_t n,
                     void *out, vd_error *err) {
  hsize_t start[3] = {at, 0, 0}, count[3] = {n, tail[0], tail[1]};
  hid_t memory = H5Screate_simple(rank, count, NULL), space = H5Dget_space(c->id);
  if (H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
      H5Dread(c->id, type, memory, space, H5P_DEFAULT, out) < 0)
    vd_h5_fail(err, "rows %llu to %llu cannot be read", (unsigned long long)at, (unsigned long long)(at + n));
  H5Sclose(space);
  H5Sclose(memory);
  return err->status;
}

enum { UPDATE, SPAN, FIRST_DOUBLE, N_COLUMN = FIRST_DOUBLE + VD_TRACE_DOUBLES };

/* Rows [at, at + n) into one block; *n becomes the rows that are whole and not after `update`. */
static int take_block(vd_trace *t, const struct column c[N_COLUMN], hsize_t at, hsize_t *n, int64_t update,
                      vd_trace_block *b, vd_error *err) {
  const hsize_t tail[2] = {t->n_layer, t->n_head};
  if (read_rows(&c[UPDATE], H5T_NATIVE_INT64, tail, 1, at, *n, b->update, err) ||
      read_rows(&c[SPAN], H5T_NATIVE_FLOAT, tail, 3, at, *n, b->span, err))
    return err->status;
  for (int k = 0; k < VD_TRACE_DOUBLES; k++) {
    const struct column *from = &c[FIRST_DOUBLE + k];
    for (hsize_t i = 0; from->id < 0 && i < *n; i++) b->value[k][i] = NAN;
    if (from->id >= 0 && read_rows(from, H5T_NATIVE_DOUBLE, tail, 1, at, *n, b->value[k], err)) return err->status;
  }
  int64_t before = t->n_row > 0 ? t->last->update[(t->n_row - 1) % VD_TRACE_BLOCK] : 0;
  hsize_t whole = 0;
  for (; whole < *n && b->update[whole] <= update; whole++) {
    if (b->update[whole] <= before)
      return vd_fail(err, VD_FAILED, "update %lld follows update %lld", (long long)b->update[whole], (long long)before);
    before = b->update[whole];
  }
  *n = whole;
  return VD_OK;
}

static int take_rows(vd_trace *t, const struct column c[N_COLUMN], int64_t update, vd_error *err) {
  hsize_t rows = c[UPDATE].rows, width = t->n_layer * t->n_head;
  for (int i = 0; i < N_COLUMN; i++)
    if (c[i].id >= 0 && c[i].rows < rows) rows = c[i].rows;
  vd_trace_block *b = vd_calloc(1, sizeof *b);
  b->span = vd_calloc(VD_TRACE_BLOCK * width, sizeof *b->span);
  for (hsize_t at = 0; at < rows; at += VD_TRACE_BLOCK) {
    hsize_t want = rows - at < VD_TRACE_BLOCK ? rows - at : VD_TRACE_BLOCK, n = want;
    if (take_block(t, c, at, &n, update, b, err)) break;
    for (hsize_t i = 0; i < n; i++) {
      const vd_trace_row row = {.update = b->update[i],
                                .span = b->span + i * width,
                                .train_bpc = b->value[VD_TRACE_BPC][i],
                                .learning_rate = b->value[VD_TRACE_RATE][i],
                                .grad_norm = b->value[VD_TRACE_NORM][i],
                                .tokens_per_second = b->value[VD_TRACE_SPEED][i],
                                .wall = b->value[VD_TRACE_WALL][i],
                                .time = b->value[VD_TRACE_TIME][i]};
      vd_trace_append(t, &row);
    }
    if (n < want) break;
  }
  free(b->span);
  free(b);
  return err->status;
}

static int take_valid(vd_trace *t, hid_t file, int64_t update, vd_error *err) {
  const hsize_t tail[2] = {0, 0};
  struct column c[2] = {{-1, 0}, {-1, 0}};
  int64_t before = 0;
  if (open_column(file, "/valid/update", H5T_INTEGER, 1, tail, &c[0], err) == VD_OK)
    open_column(file, "/valid/bpc", H5T_FLOAT, 1, tail, &c[1], err);
  for (hsize_t i = 0; err->status == VD_OK && i < c[0].rows && i < c[1].rows; i++) {
    int64_t at = 0;
    double bpc = 0;
    if (read_rows(&c[0], H5T_NATIVE_INT64, tail, 1, i, 1, &at, err) ||
        read_rows(&c[1], H5T_NATIVE_DOUBLE, tail, 1, i, 1, &bpc, err) || at > update)
      break;
    if (at <= before)
      vd_fail(err, VD_FAILED, "/valid: update %lld follows update %lld", (long long)at, (long long)before);
    if (at > before) vd_trace_append_valid(t, at, bpc);
    before = at;
  }
  for (int i = 0; i < 2; i++)
    if (c[i].id >= 0) H5Dclose(c[i].id);
  return err->status;
}

static int take_all(vd_trace *t, hid_t file, int64_t update, vd_error *err) {
  const hsize_t tail[2] = {t->n_layer, t->n_head};
  struct column c[N_COLUMN];
  for (int i = 0; i < N_COLUMN; i++) c[i] = (struct column){-1, 0};
  if (open_column(file, "/update", H5T_INTEGER, 1, tail, &c[UPDATE], err) == VD_OK)
    open_column(file, "/span", H5T_FLOAT, 3, tail, &c[SPAN], err);
  for (int k = 0; k < VD_TRACE_DOUBLES && err->status == VD_OK; k++) {
    const char *path = vd_trace_columns[k].path;
    bool newer = k == VD_TRACE_WALL || k == VD_TRACE_TIME; /* files of format version 1 do not have these */
    if (newer && H5Lexists(file, path, H5P_DEFAULT) <= 0) continue;
    open_column(file, path, H5T_FLOAT, 1, tail, &c[FIRST_DOUBLE + k], err);
  }
  if (err->status == VD_OK && take_rows(t, c, update, err) == VD_OK) take_valid(t, file, update, err);
  for (int i = 0; i < N_COLUMN; i++)
    if (c[i].id >= 0) H5Dclose(c[i].id);
  return err->status;
}

int vd_trace_read(vd_trace *t, int64_t update, vd_error *err) {
  bool sealed;
  vd_error seal = {0};
  hid_t file;
  /* A file with a wrong digest is not given to HDF5. One without a digest may be of format version 1. */
  if (vd_digest_check(t->path, &sealed, &seal) && sealed) return vd_fail(err, VD_FAILED, "%s", seal.message);
  vd_h5_lock(t->h5);
  if (vd_h5_open(t->path, "trace", &file, err) == VD_OK) {
    take_all(t, file, update, err);
    H5Fclose(file);
  }
  vd_h5_unlock(t->h5);
  return err->status;
}
