/* src/train: a training run over all ranks.
 *
 * Here live the set-up of a run, the loop, the update with its pipeline, validation, logs, checkpoints, resuming and
 * the dry run. In:  a context (communicator, terminal) and the settings of a deck; the corpus, read through io/. Out: a
 * run's folder: deck.nml, log.jsonl, trace.h5 and checkpoints; lines on the terminal. Connects src/model (what is
 * computed) with src/comm (ranks and GPUs) and io (files). src/commands calls it. train_setup.c: plan, open, close;
 * train_loop.c: the loop and its log; train_update.c: one update over the ranks; update_pipeline.c: how far the host
 * runs ahead of the device; train_checkpoint.c: checkpoints and validation; train_memory.c: memory of a rank;
 * dry_run.c: `--check`; report.c: what a run says at its start and its end; snapshot*.c: a run as a file; resume.c:
 * where a run begins. */
#ifndef VD_TRAIN_H
#define VD_TRAIN_H

#include "io/reader.h"
#include "io/streams.h"
#include "io/trace.h"
#include "src/comm/grad_reducer.h"
#include "src/comm/run_facts.h"
#include "src/train/configure.h"
#include "src/train/evaluate.h"
#include "src/train/log.h"
#include "src/train/monitor.h"
#include "src/train/open_checkpoint.h"
#include "src/train/resume.h"
#include "src/train/run_folder.h"
#include "src/train/snapshot.h"
#include "src/train/update_pipeline.h"

/* What a checkpoint that is being written may hold in memory, besides one arena. Where the memories of all streams are
 * more, training waits for the disk. */
#define VD_TASK_QUEUE_BYTES ((size_t)2 << 30)

typedef struct vd_train {
  vd_context *ctx;
  const vd_settings *settings;
  char *echo; /* the resolved deck */
  vd_corpus *corpus;
  vd_streams geometry;    /* of the training split */
  int64_t blocks;         /* in an epoch */
  int64_t stream0, n_own; /* this rank's streams */
  vd_model_config config;
  vd_run_lock *lock; /* rank 0, once it is taken; else NULL */
  vd_resume resume;
  vd_open_checkpoint start; /* of run%start_from, where the run begins from its parameters; path "": none */
  vd_ops *ops;
  vd_device device;
  vd_run_facts facts; /* once the device is open */
  vd_origin origin;   /* the same for files, with title and deck */
  vd_model *model;
  vd_optimizer *optimizer;
  vd_update_pipeline *pipeline;
  vd_task_queue *writer;   /* of checkpoints, rank 0; else NULL */
  vd_evaluator *evaluator; /* of validations; NULL until the first */
  vd_grad_reducer *reducer;
  vd_reader *reader;
  vd_log *log;     /* rank 0; else NULL */
  vd_trace *trace; /* rank 0; else NULL */
  vd_monitor *monitor;
  float *span; /* [n_layer * n_head] tokens */
  vd_progress progress;
  vd_meter total;                 /* of this part of the run */
  double grad_norm, span_penalty; /* of the last update that was pulled */
  double sum_seconds;             /* exposed time of gradient all-reduces since the last line of the log */
  double data_seconds;            /* that updates waited for data since the last line of the log, mean over ranks */
  double seconds_before;          /* those seconds of progress.log that were spent before the run was resumed */
  int64_t saved_update;           /* of the last checkpoint, written or being written; 0: none */
  char writing[VD_PATH + 64];     /* path of the checkpoint that is being written; "": none. The same on all ranks */
  char last_good[VD_PATH + 64];   /* path of the last one that was written; "": none */
} vd_train;

/* Collective(ctx->comm). Reads only: corpus, geometry, model configuration, where to begin; takes the lock of the run's
 * folder where there is one, but for a dry run. ctx and s are borrowed until vd_train_close, which must be called also
 * on error. The error is agreed. */
int vd_train_plan(vd_train *t, vd_context *ctx, const vd_settings *s, vd_error *err);

/* Collective(t->ctx->comm). After the plan: creates the run's folder and locks it, creates model, optimiser, log and
 * trace, and restores the checkpoint. VD_FAILED where another run is at work in the folder. The error is agreed. */
int vd_train_open(vd_train *t, vd_error *err);

/* Collective(t->ctx->comm). After the plan: the dry run. Prints data, model, memory and the map of ranks on standard
 * output and writes nothing. VD_FAILED, with the reason, where the run could not start or does
 * not fit as it begins into the memory or onto the disk that there is. */
int vd_train_dry_run(vd_train *t, vd_error *err);

/* Bytes that a rank needs. */
typedef struct vd_train_need {
  vd_memory_estimate model; /* optimizer: all its states */
  double evaluator;         /* of validations */
  double backend;           /* what a GPU's backend allocates besides the model */
} vd_train_need;
/* Not collective. Fills *need for a rank of `streams` streams whose layers all have this window (tokens); t->ops and
 * t->device are there. The sum. */
double vd_train_memory(const vd_train *t, int64_t streams, int64_t window, vd_train_need *need);
/* Not collective. Window, in tokens, of a layer whose longest span is z times attn_span; in Transformer-XL that of full
 * memories. */
int64_t vd_train_window(const vd_model_config *c, double z);
/* Not collective. Window, in tokens, of every layer as a new run begins. */
int64_t vd_train_first_window(const vd_model_config *c);
/* Not collective. Bytes of host memory that this rank needs at this window of every layer, without the program and its
 * libraries: on a CPU the model; on rank 0 the copy of a checkpoint that is being written. */
double vd_train_host_memory(const vd_train *t, int64_t window);
/* Not collective. Bytes that the run writes at this window of every layer: the checkpoints that it keeps at once, trace
 * and log. *files: how many checkpoints that are. */
double vd_train_disk(const vd_train *t, int64_t window, int64_t *files);
/* Not collective. VD_FAILED where the backend does not compute blocks as long, or as many streams at a time, as the run
 * or a validation has on a rank. The same on all ranks. */
int vd_train_check_sizes(const vd_train *t, vd_error *err);
/* Collective(t->ctx->comm). Before anything is allocated: VD_FAILED where a GPU has less free memory than its ranks
 * need at this window of every layer. Spans that grow need more, which is not checked. The same on all ranks. */
int vd_train_check_memory(const vd_train *t, int64_t window, vd_error *err);

/* Collective(t->ctx->comm). Trains until run%max_updates (VD_OK), a signal (VD_STOPPED, after a checkpoint) or an error
 * (agreed). */
int vd_train_loop(vd_train *t, vd_error *err);

/* Collective(t->ctx->comm). One update, which may be pending on return (update_pipeline.h): log, meters and errors then
 * are those of the update before it. *signalled: some rank has noted a signal. The error is agreed; in a run of several
 * ranks a GPU that fails ends the run here. */
int vd_train_update(vd_train *t, bool *signalled, vd_error *err);
/* Collective(t->ctx->comm). Waits for the pending update, if any: to be called before a log line, a validation or a
 * checkpoint. The error is agreed. */
int vd_train_drain(vd_train *t, vd_error *err);

/* Not collective. The parts of the run that a checkpoint is written from and read into, borrowed from t. */
vd_snapshot vd_train_snapshot(const vd_train *t);
/* Collective(t->ctx->comm). Waits for the previous checkpoint. Then copies the run and returns; the task queue writes
 * the copy beside the loop, links last.h5 (where `best` best.h5 too) and removes old checkpoints. The error is agreed.
 */
int vd_train_checkpoint(vd_train *t, bool best, vd_error *err);
/* Collective(t->ctx->comm). Waits for the checkpoint that is being written, if any. The error is agreed. */
int vd_train_wait_checkpoint(vd_train *t, vd_error *err);
/* Not collective. Hands the rows of the trace so far to the writer, on the rank that has a trace. */
void vd_train_write_trace(vd_train *t);
/* Not collective. The same on the rank that writes alone, for a rank that fails where the others do not. */
int vd_train_wait_checkpoint_local(vd_train *t, vd_error *err);
/* Not collective. The error of the checkpoint that is being written, on the rank that writes it, without waiting. */
int vd_train_poll_checkpoint(vd_train *t, vd_error *err);

/* Collective(t->ctx->comm). Broadcasts rank 0's error of log and trace. Under the watchdog. */
int vd_train_broadcast_log_error(vd_train *t, vd_error *err);

/* Collective(t->ctx->comm). Validates, writes the result to log and trace, and a checkpoint where it is the best so
 * far. *stopped: a signal came before the end. The error is agreed. */
int vd_train_validate(vd_train *t, bool *stopped, vd_error *err);

/* Not collective. Rank 0, once the facts are gathered: prints on standard output what the run is, where it begins and
 * what it needs, in about ten rows. */
void vd_train_print_header(const vd_train *t);
/* Not collective. Rank 0, after the last update: prints what was done and how fast, the best checkpoint and what to do
 * next. stopped: by a signal. */
void vd_train_print_summary(const vd_train *t, bool stopped);

/* Not collective. Frees everything; keeps the first error. */
void vd_train_close(vd_train *t, vd_error *err);

#endif
