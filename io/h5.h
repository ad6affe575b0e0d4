/* What all HDF5 files of Viaduct share: the library's lock, checked calls, self-describing datasets, files that appear
 * whole or not at all. This folder knows tensors by name and shape and nothing of the model, and makes no MPI call:
 * every function is serial, callers decide which rank does what. */
#ifndef VD_H5_H
#define VD_H5_H

#include "error.h"

#include <hdf5.h>
#include <stdbool.h>
#include <stdint.h>

/* Debian's HDF5 is not thread safe: whoever calls it holds this lock. Every public function of io/ takes it itself. */
typedef struct vd_h5 vd_h5;

/* Not collective. Creates the lock, turns HDF5's own error printing off (its innermost message is put into vd_error
 * instead), and asks for best-effort file locking. */
int vd_h5_create(vd_h5 **h5, vd_error *err);
void vd_h5_destroy(vd_h5 *h5);
/* Not collective. Lock and unlock, recursive within a thread. */
void vd_h5_lock(vd_h5 *h5);
void vd_h5_unlock(vd_h5 *h5);

/* Not collective. vd_fail() with HDF5's own innermost message appended. Call it while holding the lock. */
int vd_h5_fail(vd_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

enum vd_dtype { VD_U8, VD_U16, VD_I32, VD_I64, VD_F32, VD_F64 };
hid_t vd_h5_type(enum vd_dtype dtype); /* native memory type; not to be closed */
size_t vd_dtype_size(enum vd_dtype dtype);

/* What a dataset says of itself. Strings are borrowed for the call. */
typedef struct vd_dataset {
  const char *path; /* "/model/layers.0.norm1.weight"; missing groups are created, link order tracked */
  enum vd_dtype dtype;
  int rank; /* 0..4 */
  hsize_t shape[4];
  hsize_t max_shape[4];     /* H5S_UNLIMITED where it grows; 0: as shape */
  hsize_t chunk[4];         /* 0: chosen */
  const char *dimension[4]; /* names of the dimensions: scales of that name are made once per (group, name, length)
                               and attached; see doc/FILES.md */
  const char *units;        /* "1", "tokens", "bits", ... */
  const char *long_name;
  int deflate; /* 0: off */
} vd_dataset;

/* Not collective. Creates the dataset (chunked, fletcher32, scales attached) in an open file or group; data NULL: left
 * to be written later. Returns the dataset id in *id when id is not NULL (caller closes), else closes it. */
int vd_h5_dataset(hid_t file, const vd_dataset *d, const void *data, hid_t *id, vd_error *err);

/* Not collective. Attributes of fixed kinds on an open object; existing ones are not rewritten (an error). */
int vd_h5_attr_text(hid_t object, const char *name, const char *value, vd_error *err);
int vd_h5_attr_i64(hid_t object, const char *name, int64_t value, vd_error *err);
int vd_h5_attr_f64(hid_t object, const char *name, double value, vd_error *err);
/* Reading; a missing or mistyped attribute is an error. text: caller frees *value. */
int vd_h5_get_text(hid_t object, const char *name, char **value, vd_error *err);
int vd_h5_get_i64(hid_t object, const char *name, int64_t *value, vd_error *err);
int vd_h5_get_f64(hid_t object, const char *name, double *value, vd_error *err);

/* Files that appear whole or not at all: written under a temporary name beside `path`, then flushed, closed, fsynced,
 * renamed, and the folder fsynced. Newest file format (checksummed metadata). Root attributes written on creation:
 * "viaduct_kind" ("corpus", "shard", "checkpoint", "trace", "nll"), "viaduct_version", "git_version", "created" (UTC).
 */
typedef struct vd_h5_out {
  hid_t file;
  char path[1024], temporary[1088];
} vd_h5_out;
int vd_h5_begin(vd_h5_out *out, const char *path, const char *kind, vd_error *err);
int vd_h5_commit(vd_h5_out *out, vd_error *err); /* on error the temporary is removed */
void vd_h5_abandon(vd_h5_out *out);              /* closes and removes the temporary */

/* Not collective. Opens a file of Viaduct's read-only and checks its kind; *file is closed by the caller with
 * H5Fclose while holding the lock. kind NULL: any. Missing, truncated, foreign, other kind: VD_FAILED with a message
 * that says which. */
int vd_h5_open(const char *path, const char *kind, hid_t *file, vd_error *err);

#endif
