/* What the sources of checkpoints share. */
#ifndef VD_CHECKPOINT_INTERNAL_H
#define VD_CHECKPOINT_INTERNAL_H

#include "io/checkpoint.h"

/* A dataset that is written in parts: so that commit can tell one that was not written whole. */
typedef struct vd_part {
  char path[256];
  enum vd_dtype dtype;
  bool compressed;
  int64_t rows, written;
} vd_part;

struct vd_checkpoint {
  vd_h5 *h5;
  vd_h5_out out;   /* while writing */
  hid_t file;      /* while reading; -1 otherwise */
  char path[1024]; /* of the file, for messages */
  vd_part *part;   /* [n_part] */
  int n_part;
  bool compress; /* large datasets of floats, while writing */
};

/* Rows of an open dataset. */
typedef struct vd_rows {
  hid_t id, file_space, memory_space;
} vd_rows;
/* Not collective. Under the lock. Selects rows [first, first + n) of the first dimension of the open dataset `id` (or
 * -1, after an error that *err holds): file_space and memory_space. r owns them and id; the caller ends with
 * vd_rows_close(), also after an error. dtype must be the file's; `path` is for messages. */
int vd_rows_open(vd_rows *r, hid_t id, const char *path, enum vd_dtype dtype, int64_t first, int64_t n, vd_error *err);
/* Not collective. Under the lock. Closes what vd_rows_open() opened, also after its error. */
void vd_rows_close(vd_rows *r);

#endif
