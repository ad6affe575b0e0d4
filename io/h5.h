/* The main header of io/: reading and writing files.
 *
 * Here live the lock of the HDF5 library, checked calls, self-describing datasets and files that appear whole or not at
 * all (this header, atomic_file.h), the digest at the end of a file (digest.h), corpora (corpus.h, corpus_write.h,
 * corpus_layout.h), the cut of a split into streams and blocks (streams.h), the reader that fetches tokens ahead of use
 * (reader.h), checkpoints (checkpoint.h), traces (trace.h), nll files and attention files (eval_file.h).
 *
 * Tensors come in and go out by name and shape; this folder knows nothing of the model and includes src/base/ alone. It
 * makes no MPI call: every function is serial, and callers decide which rank calls it. */
#ifndef VD_H5_H
#define VD_H5_H

#include "io/atomic_file.h"
#include "src/base/error.h"

#include <hdf5.h>
#include <stdbool.h>
#include <stdint.h>

/* The lock of the HDF5 library, which Debian builds without thread safety. A thread holds it while it calls HDF5 or a
 * function of this header that has no vd_h5 parameter. The functions of the other headers of io/ take it themselves. */
typedef struct vd_h5 vd_h5;

/* Not collective. Creates the lock and turns HDF5's own error printing off (its innermost message is put into vd_error
 * instead); external links of HDF5 files are not followed from now on. One per process. The caller frees *h5 with
 * vd_h5_destroy(). */
int vd_h5_create(vd_h5 **h5, vd_error *err);
/* Not collective. Frees the lock; nobody may hold it. NULL is allowed. */
void vd_h5_destroy(vd_h5 *h5);
/* Not collective. Takes the lock, waiting for it; recursive within a thread. */
void vd_h5_lock(vd_h5 *h5);
/* Not collective. Gives one vd_h5_lock() of this thread back. */
void vd_h5_unlock(vd_h5 *h5);

/* Not collective. vd_fail(err, VD_FAILED, ...) with HDF5's own innermost message appended in brackets. Call it while
 * holding the lock and before any other call to HDF5, which would forget the message. */
int vd_h5_fail(vd_error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

enum vd_dtype { VD_U8, VD_U16, VD_I32, VD_I64, VD_F32, VD_F64 };
/* Not collective. The native memory type of `dtype`; not to be closed. */
hid_t vd_h5_type(enum vd_dtype dtype);
/* Not collective. Bytes of one element. */
size_t vd_dtype_size(enum vd_dtype dtype);

/* Not collective. A new file access list: newest file format (checksummed metadata), best-effort file locking (the
 * environment variable HDF5_USE_FILE_LOCKING decides where it is set). The caller closes it with H5Pclose(). */
hid_t vd_h5_access(void);

/* What a dataset says of itself. Strings are borrowed for the call. */
typedef struct vd_dataset {
  const char *path; /* "/model/layers.0.norm1.weight"; missing groups are created, link order tracked */
  enum vd_dtype dtype;
  int rank; /* 0..4 */
  hsize_t shape[4];
  hsize_t max_shape[4];     /* H5S_UNLIMITED where it grows; 0: as shape */
  hsize_t chunk[4];         /* all 0: chosen, at most 512 KiB a chunk */
  const char *dimension[4]; /* names of the dimensions, none NULL. A dataset of rank 1 that has the name of its own
                               dimension is that dimension's scale (a coordinate): create it before others that use
                               it. Else a scale NAME, or NAME_LENGTH where NAME is taken by another length or a
                               dataset, is made once in the dataset's group and attached. A scale serves at most 4,000
                               datasets; see doc/FILES.md */
  const char *units;        /* "1", "tokens", "bits", ... */
  const char *long_name;
  int deflate;     /* by HDF5's filters. 0: off; 1..9 */
  bool compressed; /* shuffle and deflate, whose Adler-32 is the chunks' checksum in place of fletcher32; written with
                      vd_h5_put_chunks() alone. Has a size, and does not grow */
} vd_dataset;

/* Not collective. Creates the dataset (little-endian, chunked, fletcher32, scales attached; contiguous without a
 * checksum of its own where it is a scalar or empty) in an open file or group, and writes `data` [shape] (native
 * `dtype`); data NULL: left to be written later. Returns the dataset id in *id when id is not NULL (caller closes),
 * else closes it. Errors: HDF5's, with the path. */
int vd_h5_dataset(hid_t file, const vd_dataset *d, const void *data, hid_t *id, vd_error *err);

/* Not collective. Under the lock. Whether HDF5 can read what vd_h5_put_chunks() writes: it has both filters, and the
 * machine is little-endian. */
bool vd_h5_can_compress(void);
/* Not collective. Takes the lock itself, for each chunk anew, so that others read while a chunk is compressed. Writes
 * rows [first, first + n) along the first dimension of the compressed dataset `path`; data: n rows of its shape, native
 * `dtype`. Rows that are not whole chunks are a bug. VD_FAILED naming the dataset. */
int vd_h5_put_chunks(vd_h5 *h5, hid_t file, const char *path, enum vd_dtype dtype, int64_t first, int64_t n,
                     const void *data, vd_error *err);

/* Not collective. Attaches the scales of d->dimension to an open dataset that was made otherwise (a virtual one), and
 * writes its units and long_name; `id` lies in `file` at d->path. Errors: HDF5's. */
int vd_h5_describe(hid_t file, hid_t id, const vd_dataset *d, vd_error *err);

/* Not collective. A text attribute (fixed length, UTF-8) on an open object; an existing one is an error. */
int vd_h5_attr_text(hid_t object, const char *name, const char *value, vd_error *err);
/* Not collective. A scalar 64-bit integer attribute; an existing one is an error. */
int vd_h5_attr_i64(hid_t object, const char *name, int64_t value, vd_error *err);
/* Not collective. A scalar float64 attribute; an existing one is an error. */
int vd_h5_attr_f64(hid_t object, const char *name, double value, vd_error *err);
/* Not collective. Reads a text attribute of fixed length; the caller frees *value. Missing or mistyped: an error. */
int vd_h5_get_text(hid_t object, const char *name, char **value, vd_error *err);
/* Not collective. Reads a scalar integer attribute. Missing or mistyped: an error. */
int vd_h5_get_i64(hid_t object, const char *name, int64_t *value, vd_error *err);
/* Not collective. Reads a scalar float attribute. Missing or mistyped: an error. */
int vd_h5_get_f64(hid_t object, const char *name, double *value, vd_error *err);

/* The version of the file formats. A change after which an older program would misread a file raises it; files of all
 * earlier versions are read.
 *   1: files without the attribute
 *   2: the attribute itself; the trace has /time and /wall and ends with a digest
 *   3: /position, /statistics and /loss_scale of a checkpoint are groups of scalars (arrays before) */
enum { VD_FORMAT_VERSION = 3 };

/* Where a file is from: root attributes of the same names. Texts are borrowed; what is NULL, "" or 0 is left out. */
typedef struct vd_origin {
  const char *title;     /* run%title */
  const char *hosts;     /* "node1, node2" */
  const char *devices;   /* "8 x NVIDIA H100 80GB HBM3" */
  const char *precision; /* of activations: "bf16" */
  const char *settings;  /* the resolved deck */
  int64_t ranks, threads;
} vd_origin;

/* A file that is being written, whole or not at all (io/atomic_file.h). Root attributes written on creation:
 * "Conventions", "viaduct_kind" ("corpus", "shard", "checkpoint", "trace", "nll", "attention"), "format_version",
 * "viaduct_version", "git_version", "created" (UTC), and those of vd_origin. */
typedef struct vd_h5_out {
  hid_t file; /* -1: closed */
  vd_atomic_file at;
} vd_h5_out;
/* Not collective. Creates the temporary file; out->file is open for writing until commit or abandon. origin: NULL for
 * none. Errors: the folder is missing or not writable. */
int vd_h5_begin(vd_h5_out *out, const char *path, const char *kind, const vd_origin *origin, vd_error *err);
/* Not collective. Flushes and closes out->file, which is -1 then; the temporary stays, for what is to be done with it
 * before vd_h5_commit() (which does this itself otherwise). All objects must be closed before (a bug otherwise). */
int vd_h5_finish(vd_h5_out *out, vd_error *err);
/* Not collective. Reserves disk space for the data that HDF5 buffers for an open file and `more` bytes. Call it before
 * a flush: after a flush that fails HDF5 can never close the file, and crashes when the program ends. Does nothing on
 * file systems that cannot reserve space. VD_FAILED naming `path`. */
int vd_h5_reserve(hid_t file, const char *path, size_t more, vd_error *err);
/* Not collective. Puts the file in its place, replacing an older one; out->file is closed, also on error, when the
 * temporary is removed. All objects of the file must be closed before (a bug otherwise). */
int vd_h5_commit(vd_h5_out *out, vd_error *err);
/* Not collective. Closes and removes the temporary; harmless after commit or a failed begin. */
void vd_h5_abandon(vd_h5_out *out);
/* Not collective. Opens the dataset `path` for reading, its storage checked as below: *id, which the caller closes, or
 * -1 and VD_FAILED. */
int vd_h5_open_dataset(hid_t file, const char *path, hid_t *id, vd_error *err);

/* Not collective. VD_FAILED unless the element type of an open dataset is `dtype` in class, sign and size; `path` is
 * for the message, here and below. */
int vd_h5_check_type(hid_t dataset, const char *path, enum vd_dtype dtype, vd_error *err);
/* Not collective. Rank and shape of an open dataset; VD_FAILED when its rank is above 4. */
int vd_h5_shape(hid_t dataset, const char *path, int *rank, hsize_t shape[4], vd_error *err);
/* Not collective. Reads the whole dataset `path` into out [shape], native `dtype`, after checking its storage, and that
 * its type is `dtype` and its shape is shape [rank] (rank 0: a scalar). VD_FAILED naming what is there and what is
 * wanted. */
int vd_h5_read(hid_t file, const char *path, enum vd_dtype dtype, int rank, const hsize_t *shape, void *out,
               vd_error *err);

/* Not collective. VD_FAILED where an open dataset keeps its data in other files (external storage, a virtual dataset),
 * or in chunks of more than 64 MiB, which HDF5 would allocate whole, or where its shape claims values that the file
 * does not store. `path` is for the message. */
int vd_h5_check_storage(hid_t dataset, const char *path, vd_error *err);

/* Not collective. Opens a file of Viaduct's read-only and checks its kind and its format version; the caller closes
 * *file with H5Fclose() while holding the lock. kind NULL: any. Missing, truncated, foreign, of another kind, written
 * by a newer Viaduct: VD_FAILED with a message that says which; *file is -1 then. */
int vd_h5_open(const char *path, const char *kind, hid_t *file, vd_error *err);
/* Not collective. The format version of an open file of Viaduct's: 1 without the attribute. */
int vd_h5_format(hid_t file, int64_t *version, vd_error *err);

#endif
