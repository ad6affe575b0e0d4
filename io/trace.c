#include "io/trace.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

/* The growing datasets. The coordinates come first, since the others attach to them, and are appended last, so that a
 * row that has its update is whole. */
enum { UPDATE, SPAN, BPC, RATE, NORM, SPEED, VALID_UPDATE, VALID_BPC, N_DATASET };
enum { NFS_MAGIC = 0x6969, COPY_ROWS = 256 };

typedef struct column {
  const char *path;
  enum vd_dtype dtype;
  const char *units, *long_name;
} column;

static const column columns[N_DATASET] = {
    [UPDATE] = {"/update", VD_I64, "1", "updates done"},
    [SPAN] = {"/span", VD_F32, "tokens", "attention span of each head"},
    [BPC] = {"/train_bpc", VD_F64, "bits", "training bits per symbol, mean since the row before"},
    [RATE] = {"/learning_rate", VD_F64, "1", "learning rate"},
    [NORM] = {"/grad_norm", VD_F64, "1", "norm of the gradient, before clipping"},
    [SPEED] = {"/tokens_per_second", VD_F64, "s-1", "training tokens per second, all ranks"},
    [VALID_UPDATE] = {"/valid/update", VD_I64, "1", "updates done"},
    [VALID_BPC] = {"/valid/bpc", VD_F64, "bits", "validation bits per symbol"},
};

struct vd_trace {
  vd_h5 *h5;
  hid_t file, id[N_DATASET];
  hsize_t rows[N_DATASET];
  hsize_t n_layer, n_head;
  char path[1024], notice[256];
};

static int create_indices(hid_t file, const char *path, hsize_t n, const char *name, const char *long_name,
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

/* The empty datasets of a new trace. */
static int create_all(hid_t file, hsize_t n_layer, hsize_t n_head, const char *echo, vd_error *err) {
  if (vd_h5_attr_text(file, "settings", echo, err) ||
      create_indices(file, "/layer", n_layer, "layer", "layer, counted from 0 at the input", err) ||
      create_indices(file, "/head", n_head, "head", "attention head", err))
    return err->status;
  for (int i = 0; i < N_DATASET && err->status == VD_OK; i++) {
    vd_dataset d = {.path = columns[i].path,
                    .dtype = columns[i].dtype,
                    .rank = i == SPAN ? 3 : 1,
                    .shape = {0, n_layer, n_head},
                    .max_shape = {H5S_UNLIMITED, 0, 0},
                    .chunk = {i == SPAN ? 16 : 512, n_layer, n_head},
                    .dimension = {"update", "layer", "head"},
                    .units = columns[i].units,
                    .long_name = columns[i].long_name,
                    .live = true};
    vd_h5_dataset(file, &d, NULL, NULL, err);
  }
  return err->status;
}

/* Moves n rows from row `first` on between an open dataset and memory. */
static int move_rows(const vd_trace *t, hid_t id, int i, bool write, hsize_t first, hsize_t n, void *data,
                     vd_error *err) {
  hsize_t start[3] = {first, 0, 0}, count[3] = {n, t->n_layer, t->n_head};
  hid_t memory = H5Screate_simple(i == SPAN ? 3 : 1, count, NULL), space = H5Dget_space(id);
  hid_t type = vd_h5_type(columns[i].dtype);
  if (H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) < 0 ||
      (write ? H5Dwrite(id, type, memory, space, H5P_DEFAULT, data)
             : H5Dread(id, type, memory, space, H5P_DEFAULT, data)) < 0)
    vd_h5_fail(err, "%s: cannot %s rows %llu to %llu of %s", t->path, write ? "write" : "read",
               (unsigned long long)first, (unsigned long long)(first + n), columns[i].path);
  H5Sclose(space);
  H5Sclose(memory);
  return err->status;
}

static int append(vd_trace *t, int i, const void *data, hsize_t n, vd_error *err) {
  hsize_t shape[3] = {t->rows[i] + n, t->n_layer, t->n_head};
  if (H5Dset_extent(t->id[i], shape) < 0) return vd_h5_fail(err, "%s: cannot extend %s", t->path, columns[i].path);
  /* H5Dwrite does not write to its buffer. */
  if (move_rows(t, t->id[i], i, true, t->rows[i], n, (void *)(uintptr_t)data, err)) return err->status;
  if (H5Dflush(t->id[i]) < 0) return vd_h5_fail(err, "%s: cannot flush %s", t->path, columns[i].path);
  t->rows[i] += n;
  return VD_OK;
}

static int open_all(vd_trace *t, hid_t file, vd_error *err) {
  for (int i = 0; i < N_DATASET; i++) {
    hsize_t shape[4] = {0};
    t->id[i] = H5Dopen2(file, columns[i].path, H5P_DEFAULT);
    if (t->id[i] < 0) return vd_h5_fail(err, "%s: there is no dataset %s", t->path, columns[i].path);
    hid_t space = H5Dget_space(t->id[i]);
    int rank = H5Sget_simple_extent_ndims(space);
    if (rank == (i == SPAN ? 3 : 1)) H5Sget_simple_extent_dims(space, shape, NULL);
    H5Sclose(space);
    if (rank != (i == SPAN ? 3 : 1))
      return vd_fail(err, VD_FAILED, "%s: %s has rank %d", t->path, columns[i].path, rank);
    if (i == SPAN && (shape[1] != t->n_layer || shape[2] != t->n_head))
      return vd_fail(err, VD_FAILED, "%s is the trace of %llu layers and %llu heads; this run has %llu and %llu",
                     t->path, (unsigned long long)shape[1], (unsigned long long)shape[2],
                     (unsigned long long)t->n_layer, (unsigned long long)t->n_head);
    t->rows[i] = shape[0];
  }
  return VD_OK;
}

static void close_all(vd_trace *t) {
  for (int i = 0; i < N_DATASET; i++)
    if (t->id[i] >= 0) H5Dclose(t->id[i]);
  for (int i = 0; i < N_DATASET; i++) t->id[i] = -1;
}

/* Rows of a group of columns, whose coordinate is `i`, that are whole and not after `update`. */
static int rows_until(const vd_trace *old, int i, int last, int64_t update, hsize_t *n, vd_error *err) {
  *n = old->rows[i];
  for (int k = i; k <= last; k++) *n = old->rows[k] < *n ? old->rows[k] : *n;
  for (; *n > 0; --*n) {
    int64_t at;
    if (move_rows(old, old->id[i], i, false, *n - 1, 1, &at, err)) return err->status;
    if (at <= update) break;
  }
  return VD_OK;
}

static int copy_rows(const vd_trace *old, vd_trace *new, int64_t update, vd_error *err) {
  hsize_t n[2];
  if (rows_until(old, UPDATE, SPEED, update, &n[0], err) ||
      rows_until(old, VALID_UPDATE, VALID_BPC, update, &n[1], err))
    return err->status;
  void *buffer = vd_calloc(COPY_ROWS * old->n_layer * old->n_head, sizeof(double));
  for (int i = 0; i < N_DATASET; i++) {
    hsize_t all = n[i >= VALID_UPDATE];
    for (hsize_t at = 0; at < all && err->status == VD_OK; at += COPY_ROWS) {
      hsize_t some = all - at < COPY_ROWS ? all - at : COPY_ROWS;
      if (move_rows(old, old->id[i], i, false, at, some, buffer, err) == VD_OK) append(new, i, buffer, some, err);
    }
  }
  free(buffer);
  return err->status;
}

int vd_trace_view(const char *path, hid_t *file, vd_error *err) {
  hid_t list = vd_h5_access(), opened = -1;
  char *kind = NULL;
  *file = -1;
  H5Pset_fclose_degree(list, H5F_CLOSE_STRONG);
  if (H5Fis_hdf5(path) > 0) {
    opened = H5Fopen(path, H5F_ACC_RDONLY | H5F_ACC_SWMR_READ, list);
    if (opened < 0) opened = H5Fopen(path, H5F_ACC_RDONLY, list);
  }
  vd_error foreign = {0};
  if (opened < 0)
    vd_h5_fail(err, "cannot open %s: it is truncated, damaged, or no HDF5 file", path);
  else if (vd_h5_get_text(opened, "viaduct_kind", &kind, &foreign) || strcmp(kind, "trace") != 0)
    vd_fail(err, VD_FAILED, "%s is not a trace of Viaduct's", path);
  free(kind);
  H5Pclose(list);
  if (err->status == VD_OK)
    *file = opened;
  else if (opened >= 0)
    H5Fclose(opened);
  return err->status;
}

/* Makes the file anew, with the rows of the old one up to `update` when there is one. */
static int make(vd_trace *t, int64_t update, const char *echo, vd_error *err) {
  vd_trace old = *t;
  for (int i = 0; i < N_DATASET; i++) old.id[i] = -1;
  bool there = access(t->path, F_OK) == 0;
  old.file = -1;
  if (there && vd_trace_view(t->path, &old.file, err)) return vd_wrap(err, "move it away to start a new trace");
  vd_h5_out out = {.file = -1};
  if ((!there || open_all(&old, old.file, err) == VD_OK) && vd_h5_begin(&out, t->path, "trace", err) == VD_OK &&
      create_all(out.file, t->n_layer, t->n_head, echo, err) == VD_OK && open_all(t, out.file, err) == VD_OK && there)
    copy_rows(&old, t, update, err);
  close_all(t);
  close_all(&old);
  if (old.file >= 0) H5Fclose(old.file);
  if (err->status) {
    vd_h5_abandon(&out);
    return err->status;
  }
  return vd_h5_commit(&out, err);
}

/* Room for new chunks of all datasets, and twice as much for their indices. */
static int room_for_row(const vd_trace *t, vd_error *err) {
  size_t chunks = 16 * t->n_layer * t->n_head * sizeof(float) + N_DATASET * 512 * sizeof(double);
  return vd_h5_room(t->file, t->path, 3 * chunks, err);
}

/* A reader may look into the file from the moment that it gets its name, and HDF5 locks it for that long. */
static hid_t open_patiently(const char *path, unsigned flags, hid_t list) {
  enum { TRIES = 60 };
  const struct timespec pause = {0, 50000000};
  for (int i = 1;; i++) {
    hid_t file = H5Fopen(path, flags, list);
    if (file >= 0 || i == TRIES) return file;
    nanosleep(&pause, NULL);
  }
}

/* Opens the finished, empty or copied file for appending; readers may open it from now on. */
static int open_live(vd_trace *t, vd_error *err) {
  struct statfs fs;
  bool nfs = statfs(t->path, &fs) == 0 && fs.f_type == NFS_MAGIC;
  hid_t list = vd_h5_access();
  t->file = nfs ? -1 : open_patiently(t->path, H5F_ACC_RDWR | H5F_ACC_SWMR_WRITE, list);
  if (t->file < 0) {
    snprintf(t->notice, sizeof t->notice, "the trace cannot be read while it is written here (%s)",
             nfs ? "NFS" : "the file system refuses SWMR");
    t->file = open_patiently(t->path, H5F_ACC_RDWR, list);
  }
  if (t->file < 0) vd_h5_fail(err, "cannot open %s for writing", t->path);
  H5Pclose(list);
  return err->status ? err->status : open_all(t, t->file, err);
}

int vd_trace_open(vd_trace **trace, vd_h5 *h5, const char *path, int n_layer, int n_head, int64_t update,
                  const char *echo, vd_error *err) {
  *trace = NULL;
  vd_trace *t = vd_calloc(1, sizeof *t);
  t->h5 = h5;
  t->file = -1;
  for (int i = 0; i < N_DATASET; i++) t->id[i] = -1;
  t->n_layer = (hsize_t)n_layer;
  t->n_head = (hsize_t)n_head;
  snprintf(t->path, sizeof t->path, "%s", path);
  vd_h5_lock(h5);
  if (make(t, update, echo, err) == VD_OK) open_live(t, err);
  vd_h5_unlock(h5);
  if (err->status) {
    vd_error none = {0};
    vd_trace_close(&t, &none);
  }
  *trace = t;
  return err->status;
}

int vd_trace_append(vd_trace *t, const vd_trace_row *row, vd_error *err) {
  const void *data[] = {[UPDATE] = &row->update,      [SPAN] = row->span,       [BPC] = &row->train_bpc,
                        [RATE] = &row->learning_rate, [NORM] = &row->grad_norm, [SPEED] = &row->tokens_per_second};
  vd_h5_lock(t->h5);
  room_for_row(t, err);
  for (int i = SPEED; i >= UPDATE && err->status == VD_OK; i--) append(t, i, data[i], 1, err);
  vd_h5_unlock(t->h5);
  return err->status;
}

int vd_trace_append_valid(vd_trace *t, int64_t update, double bpc, vd_error *err) {
  vd_h5_lock(t->h5);
  if (room_for_row(t, err) == VD_OK && append(t, VALID_BPC, &bpc, 1, err) == VD_OK)
    append(t, VALID_UPDATE, &update, 1, err);
  vd_h5_unlock(t->h5);
  return err->status;
}

const char *vd_trace_notice(const vd_trace *t) {
  return t->notice;
}

int vd_trace_close(vd_trace **trace, vd_error *err) {
  vd_trace *t = *trace;
  if (!t) return VD_OK;
  vd_h5_lock(t->h5);
  close_all(t);
  if (t->file >= 0 && H5Fclose(t->file) < 0) vd_h5_fail(err, "cannot close %s", t->path);
  vd_h5_unlock(t->h5);
  free(t);
  *trace = NULL;
  return err->status;
}
