/* What the files of the trace share; nobody else includes this. */
#ifndef VD_TRACE_INTERNAL_H
#define VD_TRACE_INTERNAL_H

#include "io/trace.h"

enum { VD_TRACE_BLOCK = 1024 };

/* The columns of doubles, beside update and span. */
enum { VD_TRACE_BPC, VD_TRACE_RATE, VD_TRACE_NORM, VD_TRACE_SPEED, VD_TRACE_WALL, VD_TRACE_TIME, VD_TRACE_DOUBLES };

typedef struct vd_trace_column {
  const char *path, *units, *long_name;
} vd_trace_column;
extern const vd_trace_column vd_trace_columns[VD_TRACE_DOUBLES];

/* Rows never move once they are appended: a thread that writes an image reads them while others are appended. */
typedef struct vd_trace_block {
  struct vd_trace_block *next;
  int64_t update[VD_TRACE_BLOCK];
  double value[VD_TRACE_DOUBLES][VD_TRACE_BLOCK];
  float *span; /* [VD_TRACE_BLOCK, n_layer * n_head] */
} vd_trace_block;

typedef struct vd_trace_valid {
  struct vd_trace_valid *next;
  int64_t update[VD_TRACE_BLOCK];
  double bpc[VD_TRACE_BLOCK];
} vd_trace_valid;

struct vd_trace {
  vd_h5 *h5;
  char path[1024], notice[2400];
  const vd_origin *origin;
  hsize_t n_layer, n_head;
  vd_trace_block *first, *last;
  vd_trace_valid *first_valid, *last_valid;
  hsize_t n_row, n_valid;                   /* appended */
  hsize_t n_captured_row, n_captured_valid; /* of these, in the last image */
  double captured;                          /* when, on the monotonic clock */
};

/* Not collective. Reads the rows of the file at t->path up to `update` into t, which has none. VD_FAILED, and t may
 * hold some rows, where the file is damaged, of another shape or no trace. */
int vd_trace_read(vd_trace *t, int64_t update, vd_error *err);

#endif
