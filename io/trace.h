/* The trace of a run, DIRECTORY/trace.h5: spans and figures by update. The rows of the whole run are held in memory (4
 * bytes a head and 64 a row; 60,000 rows of 96 heads take 27 MB). The file is always sealed: it is written beside
 * `path`, ends with the SHA-256 of what it holds and takes its place by a rename, so that any reader may open it at any
 * moment, on any file system, and after a kill. Layout: doc/FILES.md. */
#ifndef VD_TRACE_H
#define VD_TRACE_H

#include "io/h5.h"

typedef struct vd_trace vd_trace;

typedef struct vd_trace_row {
  int64_t update;    /* updates done */
  const float *span; /* [n_layer * n_head] tokens; copied */
  double train_bpc;  /* bits per symbol */
  double learning_rate, grad_norm, tokens_per_second;
  double wall; /* seconds that the run has taken, earlier parts included; NaN: not known */
  double time; /* seconds since 1970-01-01T00:00:00Z; NaN: not known */
} vd_trace_row;

/* Not collective. One rank owns the file. Takes over the rows of the trace at `path` up to `update` (0: a new run),
 * which must be of n_layer layers and n_head heads; later rows, of a run that died after its last checkpoint, are left
 * out. A file that is damaged, of another shape or no trace is renamed to trace-set-aside-N.h5 beside it, and the
 * notice says so. Then writes the file once, so that a folder without permission or space is known now. origin: NULL
 * for none; borrowed, with its texts, until vd_trace_close(). VD_FAILED when the file cannot be written. The caller
 * ends with vd_trace_close(). */
int vd_trace_open(vd_trace **trace, vd_h5 *h5, const char *path, int n_layer, int n_head, int64_t update,
                  const vd_origin *origin, vd_error *err);
/* Not collective. Adds a row in memory; `update` must be larger than the last one. */
void vd_trace_append(vd_trace *trace, const vd_trace_row *row);
/* Not collective. Adds a validation (bpc: bits per symbol) in memory. */
void vd_trace_append_valid(vd_trace *trace, int64_t update, double bpc);
/* Not collective. True when there are rows that no file or image holds, and the last one was captured at least
 * `seconds` ago. */
bool vd_trace_is_due(const vd_trace *trace, double seconds);
/* Not collective. An image of the rows so far, for vd_trace_write(). The trace must outlive it; rows may be appended
 * meanwhile. */
void *vd_trace_capture(vd_trace *trace);
/* Not collective. Writes a captured image as the file and frees it; may run on another thread than the one that
 * appends, images in their order. Where *err holds an error already it only frees. VD_FAILED naming the file. */
void vd_trace_write(void *captured, vd_error *err);
/* Not collective. One line on what was set aside, or ""; borrowed. */
const char *vd_trace_notice(const vd_trace *trace);
/* Not collective. Writes the rows that no image holds, frees and sets *trace to NULL, also on error. NULL is allowed.
 */
int vd_trace_close(vd_trace **trace, vd_error *err);

#endif
