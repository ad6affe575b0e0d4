/* The log of a run: DIRECTORY/log.jsonl for programs, lines on the terminal for people. Rank 0 owns the log; the other
 * ranks pass NULL, for which every function does nothing. Fields of a line: doc/FILES.md. */
#ifndef VD_LOG_H
#define VD_LOG_H

#include "src/base/error.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef struct vd_log vd_log;

/* The state of training after an update. Means are over the updates since the row before. */
typedef struct vd_log_row {
  int64_t update;           /* updates done */
  int64_t epoch;            /* counted from 1 */
  double bpc;               /* mean nll of the training targets, bits per symbol, without the span penalty */
  double span_penalty;      /* nats, as vd_model_span_penalty() gives it */
  double learning_rate;     /* of the last update */
  double grad_norm;         /* global, before clipping */
  double tokens_per_second; /* targets of all ranks */
  double mean_span;         /* tokens, mean over layers and heads */
  double max_span;          /* tokens, the longest of all heads */
  double sum_share;         /* share of the time since the row before that updates waited for other ranks; NAN: none */
  double data_wait;         /* seconds that updates waited for data since the row before, mean over ranks */
  double mfu;               /* model FLOP/s over the GPUs' peak; NAN: fp32, or no peak is known */
  double loss_scale;        /* fp16; NAN: gradients are not scaled */
  int64_t skipped;          /* updates skipped for overflow since the run was started or resumed */
} vd_log_row;

/* Not collective. Opens DIRECTORY/log.jsonl to continue after `update` (0: a new run). Drops lines of later updates,
 * which a run wrote that died after its last checkpoint, and a torn last line, so that no update is logged twice; the
 * file is replaced atomically. A line that cannot be read otherwise stays, and a message names it. "wall" continues
 * from the last line that stays. terminal (stdout or stderr; borrowed; NULL: none) gets the lines for people. live: it
 * is a terminal, and progress is one line that is rewritten; else it gets whole lines and no control characters.
 * max_updates serves the estimate of the time left. Errors: VD_FAILED naming the file. The
 * caller ends with vd_log_close(). */
int vd_log_open(vd_log **log, const char *directory, int64_t update, int64_t max_updates, FILE *terminal, bool live,
                vd_error *err);

/* Not collective. Appends one line to the file, durable on return (fdatasync), and shows it: the live line brought up
 * to date, or a plain line where 30 seconds have passed since the plain line before, at the first row and the last.
 * Non-finite numbers become null in the file. VD_FAILED when it cannot be written whole (what was written of it is cut
 * off again). */
int vd_log_update(vd_log *log, const vd_log_row *row, vd_error *err);

/* Not collective. Between two vd_log_update(): brings the live line up to date, at most ten times a second. Does
 * nothing where the terminal is none, and nothing to the file: call it after every update. */
void vd_log_live(vd_log *log, const vd_log_row *row);

/* Not collective. Appends {"valid_bpc", "num_updates", "epoch", "wall"} and says it on the terminal; `best`: it is the
 * lowest so far, and said so. Errors as vd_log_update(). */
int vd_log_valid(vd_log *log, int64_t update, int64_t epoch, double bpc, bool best, vd_error *err);

/* Not collective. A line for people only ("viaduct: MESSAGE"), without breaking the live line. */
void vd_log_message(vd_log *log, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Not collective. "2h05m", "4m10s" or "9s", into text. */
void vd_log_duration(double seconds, char text[24]);

/* Not collective. Seconds the run has taken so far, earlier parts of a resumed run included; 0 when log is NULL. */
double vd_log_wall(const vd_log *log);

/* Not collective. Ends the live line, closes, frees, sets *log to NULL. */
void vd_log_close(vd_log **log);

#endif
