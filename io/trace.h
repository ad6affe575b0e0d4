/* The trace of a run: DIRECTORY/trace.h5, appended while running and readable meanwhile (SWMR where the file system
 * allows; else flushed after every row, with a notice). Layout: doc/FILES.md. */
#ifndef VD_TRACE_H
#define VD_TRACE_H

#include "io/h5.h"

typedef struct vd_trace vd_trace;

typedef struct vd_trace_row {
  int64_t update;    /* updates done */
  const float *span; /* [n_layer * n_head] tokens */
  double train_bpc, learning_rate, grad_norm, tokens_per_second;
} vd_trace_row;

/* Not collective. One rank owns the file. Creates the trace, or goes on with the one at `path` after `update`: its
 * rows up to there are copied into a new file that takes its place at once, so that rows of later updates, which a run
 * that died wrote after its last checkpoint, are cut off, and so is the SWMR mark of a killed writer; a reader that has
 * the old file open must open it anew. A trace of another shape, a damaged or foreign file: VD_FAILED that says so, and
 * the file is left as it is. `echo`: the resolved deck. The caller ends with vd_trace_close(). */
int vd_trace_open(vd_trace **trace, vd_h5 *h5, const char *path, int n_layer, int n_head, int64_t update,
                  const char *echo, vd_error *err);
/* Not collective. Appends a row and flushes it, so that readers see it; `update` must be larger than the last one. */
int vd_trace_append(vd_trace *trace, const vd_trace_row *row, vd_error *err);
/* Not collective. Appends a row of the group valid (bpc: bits per symbol), likewise. */
int vd_trace_append_valid(vd_trace *trace, int64_t update, double bpc, vd_error *err);
/* Not collective. What could not be had (no SWMR here), or ""; borrowed. */
const char *vd_trace_notice(const vd_trace *trace);
/* Not collective. Under the lock. Opens a trace for reading, also one that is being written or that a killed writer
 * left marked so; *file is closed by the caller with H5Fclose(). VD_FAILED naming the file when it is damaged or no
 * trace.
 */
int vd_trace_view(const char *path, hid_t *file, vd_error *err);
/* Not collective. Closes, frees and sets *trace to NULL, also on error. NULL is allowed. */
int vd_trace_close(vd_trace **trace, vd_error *err);

#endif
