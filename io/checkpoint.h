/* Checkpoint files: datasets by name and shape; written whole or not at all; verified when read. Which tensors there
 * are is the caller's business. Layout: doc/FILES.md. */
#ifndef VD_CHECKPOINT_H
#define VD_CHECKPOINT_H

#include "h5.h"

typedef struct vd_checkpoint vd_checkpoint;

/* Writing: begin, put..., commit; after an error, abandon. Not collective: one rank writes. */
int vd_checkpoint_begin(vd_checkpoint **c, vd_h5 *h5, const char *path, vd_error *err);
int vd_checkpoint_put(vd_checkpoint *c, const vd_dataset *d, const void *data, vd_error *err);
/* A dataset [n, ...] written in parts along its first dimension (memories of many streams): create, then each part. */
int vd_checkpoint_create(vd_checkpoint *c, const vd_dataset *d, vd_error *err);
int vd_checkpoint_put_rows(vd_checkpoint *c, const char *path, int64_t first, int64_t n, const void *data,
                           vd_error *err);
int vd_checkpoint_put_text(vd_checkpoint *c, const char *attribute, const char *value, vd_error *err); /* on the root */
int vd_checkpoint_put_i64(vd_checkpoint *c, const char *attribute, int64_t value, vd_error *err);
int vd_checkpoint_put_f64(vd_checkpoint *c, const char *attribute, double value, vd_error *err);
int vd_checkpoint_commit(vd_checkpoint **c, vd_error *err); /* frees *c, also on error */
void vd_checkpoint_abandon(vd_checkpoint **c);

/* Reading. open also reads and so verifies every dataset once when `verify` is set. */
int vd_checkpoint_open(vd_checkpoint **c, vd_h5 *h5, const char *path, bool verify, vd_error *err);
int vd_checkpoint_shape(vd_checkpoint *c, const char *path, int *rank, hsize_t shape[4], vd_error *err);
bool vd_checkpoint_has(vd_checkpoint *c, const char *path);
/* Reads a whole dataset after checking that its shape is `shape` (a message names both otherwise). */
int vd_checkpoint_get(vd_checkpoint *c, const char *path, enum vd_dtype dtype, int rank, const hsize_t *shape,
                      void *out, vd_error *err);
int vd_checkpoint_get_rows(vd_checkpoint *c, const char *path, enum vd_dtype dtype, int64_t first, int64_t n, void *out,
                           vd_error *err);
int vd_checkpoint_get_text(vd_checkpoint *c, const char *attribute, char **value, vd_error *err); /* caller frees */
int vd_checkpoint_get_i64(vd_checkpoint *c, const char *attribute, int64_t *value, vd_error *err);
int vd_checkpoint_get_f64(vd_checkpoint *c, const char *attribute, double *value, vd_error *err);
void vd_checkpoint_close(vd_checkpoint **c);

/* The folder of checkpoints: DIRECTORY/checkpoints/update-00001000.h5 ..., links last.h5 and best.h5 (relative symbolic
 * links, replaced atomically). Not collective. */
void vd_checkpoint_path(const char *directory, int64_t update, char *path, size_t size);
int vd_checkpoint_link(const char *directory, const char *link, int64_t update, vd_error *err); /* "last" or "best" */
/* Removes all but the newest `keep` and those that last.h5 and best.h5 name, and temporaries that a killed run left. */
int vd_checkpoint_prune(const char *directory, int64_t keep, vd_error *err);
/* The newest checkpoint of DIRECTORY that opens and verifies. *path empty when there is none at all. A damaged one is
 * named in `warning` (one line each) and the one before it is taken; VD_FAILED when there are some and all are damaged.
 */
int vd_checkpoint_newest(vd_h5 *h5, const char *directory, char *path, size_t size, char *warning, size_t warning_size,
                         vd_error *err);

#endif
