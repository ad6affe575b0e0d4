/* Checkpoint files: datasets by name and shape; written whole or not at all; verified when read. Which tensors there
 * are is the caller's business. Layout: doc/FILES.md. */
#ifndef VD_CHECKPOINT_H
#define VD_CHECKPOINT_H

#include "io/corpus_layout.h"
#include "io/h5.h"

typedef struct vd_checkpoint vd_checkpoint;

/* Writing: begin, put..., commit; after an error, abandon. One rank writes. Until commit has returned VD_OK nothing is
 * at `path`, or what was there before. Every error names the file. */

/* Not collective. Starts a checkpoint at `path` in a temporary file beside it; folders that are missing are made.
 * origin: as for vd_h5_begin(). The caller ends with vd_checkpoint_commit() or vd_checkpoint_abandon(); on error *c is
 * NULL. */
int vd_checkpoint_begin(vd_checkpoint **c, vd_h5 *h5, const char *path, const vd_origin *origin, vd_error *err);
/* Not collective. From now on datasets of floats of 16 KiB and more are compressed with HDF5's filters shuffle and
 * deflate. Does nothing where the HDF5 library lacks them. */
void vd_checkpoint_compress(vd_checkpoint *c);
/* Not collective. Writes a whole dataset; data [d->shape], native d->dtype. */
int vd_checkpoint_put(vd_checkpoint *c, const vd_dataset *d, const void *data, vd_error *err);
/* Not collective. Creates a dataset [n, ...] that is then written in parts along its first dimension with
 * vd_checkpoint_put_rows() (memories of many streams), every row once. */
int vd_checkpoint_create(vd_checkpoint *c, const vd_dataset *d, vd_error *err);
/* Not collective. Writes rows [first, first + n) of a dataset made by vd_checkpoint_create(); data: n rows of its shape
 * and type. */
int vd_checkpoint_put_rows(vd_checkpoint *c, const char *path, int64_t first, int64_t n, const void *data,
                           vd_error *err);
/* Not collective. Writes a text attribute on the root group. */
int vd_checkpoint_put_text(vd_checkpoint *c, const char *attribute, const char *value, vd_error *err);
/* Not collective. Writes an integer attribute on the root group. */
int vd_checkpoint_put_i64(vd_checkpoint *c, const char *attribute, int64_t value, vd_error *err);
/* Not collective. Writes a float64 attribute on the root group. */
int vd_checkpoint_put_f64(vd_checkpoint *c, const char *attribute, double value, vd_error *err);
/* Not collective. Closes, seals (io/digest.h), syncs and puts the file in its place. Frees *c and sets it to NULL, also
 * on error, when the temporary is removed and what was at `path` before is untouched. A dataset of
 * vd_checkpoint_create() that was not written whole is a bug. */
int vd_checkpoint_commit(vd_checkpoint **c, vd_error *err);
/* Not collective. Gives the checkpoint up: the temporary is removed, *c freed and set to NULL. *c NULL is allowed. */
void vd_checkpoint_abandon(vd_checkpoint **c);

/* Not collective. Opens a checkpoint for reading. `verify`: first reads the whole file and compares its SHA-256 with
 * the one at its end, so that HDF5 never sees a damaged file; ranks that open a file which another has just verified
 * need not. Missing, empty, truncated, damaged, foreign: VD_FAILED with a message that says which; *c is NULL then. The
 * caller ends with vd_checkpoint_close(). */
int vd_checkpoint_open(vd_checkpoint **c, vd_h5 *h5, const char *path, bool verify, vd_error *err);
/* Not collective. Rank and shape of a dataset; VD_FAILED when there is none or its rank is above 4. */
int vd_checkpoint_shape(vd_checkpoint *c, const char *path, int *rank, hsize_t shape[4], vd_error *err);
/* Not collective. True when something is at `path` (which begins with a slash), readable or not. */
bool vd_checkpoint_has(vd_checkpoint *c, const char *path);
/* Not collective. Reads a whole dataset into out [shape] after checking that its type is `dtype` and its shape is
 * shape [rank] (the message names both otherwise). */
int vd_checkpoint_get(vd_checkpoint *c, const char *path, enum vd_dtype dtype, int rank, const hsize_t *shape,
                      void *out, vd_error *err);
/* Not collective. Reads rows [first, first + n) along the first dimension into out [n, ...]; the type must be `dtype`.
 */
int vd_checkpoint_get_rows(vd_checkpoint *c, const char *path, enum vd_dtype dtype, int64_t first, int64_t n, void *out,
                           vd_error *err);
/* Not collective. Reads a text attribute of the root group; the caller frees *value. Missing or mistyped: VD_FAILED. */
int vd_checkpoint_get_text(vd_checkpoint *c, const char *attribute, char **value, vd_error *err);
/* Not collective. Reads an integer attribute of the root group. Missing or mistyped: VD_FAILED. */
int vd_checkpoint_get_i64(vd_checkpoint *c, const char *attribute, int64_t *value, vd_error *err);
/* Not collective. Reads a float attribute of the root group. Missing or mistyped: VD_FAILED. */
int vd_checkpoint_get_f64(vd_checkpoint *c, const char *attribute, double *value, vd_error *err);
/* Not collective. The open file, for listing what is in it (`viaduct info`); borrowed, to be used under the lock. */
hid_t vd_checkpoint_file(vd_checkpoint *c);
/* Not collective. Closes, frees, sets *c to NULL. *c NULL is allowed. */
void vd_checkpoint_close(vd_checkpoint **c);

/* Not collective. Writes the symbols that the model's ids stand for, as a corpus holds them. */
int vd_checkpoint_put_vocabulary(vd_checkpoint *c, const vd_vocabulary *v, vd_error *err);
/* Not collective. Reads them; the caller frees *v with vd_vocabulary_free(), also on error. VD_FAILED where there is no
 * group /vocabulary (files of format version 1). */
int vd_checkpoint_get_vocabulary(vd_checkpoint *c, vd_vocabulary *v, vd_error *err);

/* The folder of checkpoints: DIRECTORY/checkpoints/update-00001000.h5 ..., links last.h5 and best.h5. */

/* Not collective. The path of update's checkpoint, into path [size]; too long for it is a bug. */
void vd_checkpoint_path(const char *directory, int64_t update, char *path, size_t size);
/* Not collective. Points DIRECTORY/checkpoints/LINK.h5 (link: "last" or "best") at update's checkpoint, which must be
 * there: a relative symbolic link, replaced atomically. */
int vd_checkpoint_link(const char *directory, const char *link, int64_t update, vd_error *err);
/* Not collective. VD_USAGE where DIRECTORY/checkpoints holds checkpoints under names that a run would replace or not
 * find: last.h5 or best.h5 that is no link, or files *.h5 where there is no update-NNNNNNNN.h5. Nothing is opened. */
int vd_checkpoint_check_names(const char *directory, vd_error *err);
/* Not collective. Removes all but the newest `keep` (>= 1) and those that last.h5 and best.h5 name, and temporaries
 * that a killed run left; folders and other special files stay. Only the rank that writes may call it, and not while it
 * writes a checkpoint. */
int vd_checkpoint_prune(const char *directory, int64_t keep, vd_error *err);
/* Not collective. The newest checkpoint of DIRECTORY that verifies and opens, its path into path [size]; empty when
 * there is none at all. A damaged one is named in warning [warning_size] (a line each) and the one before it is taken.
 * VD_FAILED when there are some and all are damaged, or the newest whole one cannot be opened (a newer Viaduct wrote
 * it). */
int vd_checkpoint_newest(vd_h5 *h5, const char *directory, char *path, size_t size, char *warning, size_t warning_size,
                         vd_error *err);

#endif
