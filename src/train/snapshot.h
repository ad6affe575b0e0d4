/* A run in a checkpoint: parameters, optimiser state, memories and the place in the data, by global stream, so that a
 * checkpoint written by any number of ranks is read by any other. Layout: doc/FILES.md. */
#ifndef VD_SNAPSHOT_H
#define VD_SNAPSHOT_H

#include "io/corpus.h"
#include "src/comm/context.h"
#include "src/comm/grad_reducer.h"
#include "src/deck/settings.h"
#include "src/model/model.h"
#include "src/model/optimizer.h"
#include "src/train/task_queue.h"

/* Sums since the last row of a log. */
typedef struct vd_meter {
  double nll;     /* nats */
  double targets; /* counted predictions, all ranks */
  double seconds; /* of training steps */
} vd_meter;

/* Where a run stands, besides the tensors. */
typedef struct vd_progress {
  int64_t update;       /* updates done; each reads one block of the training split */
  int64_t valid_update; /* of the last validation; 0: none yet */
  int64_t best_update;  /* with the lowest valid bpc; 0: none yet */
  double best_bpc;
  vd_meter log, trace;
} vd_progress;

/* The numbers of a checkpoint besides its tensors: /position, /statistics and /loss_scale. */
typedef struct vd_snapshot_numbers {
  vd_progress progress;
  int64_t epoch, block; /* of the next update, counted from 1 and from 0 */
  bool is_scaled;       /* losses are scaled (fp16), and the checkpoint has /loss_scale */
  vd_loss_scale scaling;
} vd_snapshot_numbers;

/* What is written or read. All borrowed. */
typedef struct vd_snapshot {
  vd_context *ctx;
  vd_ops *ops;
  vd_model *model;
  vd_optimizer *optimizer;
  int64_t n_stream; /* global */
  int64_t n_block;  /* blocks in an epoch of the training split */
  /* To write alone: */
  vd_task_queue *writer;    /* rank 0; else NULL */
  const vd_corpus *corpus;  /* its id and the vocabulary */
  const vd_origin *origin;  /* with the resolved deck, which a resumed run reads */
  bool compress;            /* checkpoint%compress */
  vd_grad_reducer *reducer; /* its watchdog ends rank 0's waits for memory rows that do not come; NULL: none */
} vd_snapshot;

/* Collective(ctx->comm). Writes a checkpoint to `path`, whole or not at all. When it returns the run is copied, and may
 * continue; the file is there once rank 0's s->writer has done its tasks, whose error is that of the file. Rank 0
 * writes, the others send their memories in bounded pieces; the model's shape must outlive the tasks. The error, of
 * the file's beginning, is agreed. */
int vd_snapshot_write(const vd_snapshot *s, const char *path, const vd_progress *progress, vd_error *err);

/* Collective(ctx->comm). The reverse: rank 0 reads parameters and optimiser state and broadcasts them, every rank reads
 * the memories of its own streams. The model and the number of streams must be those of the checkpoint: VD_FAILED
 * naming the tensor and both shapes otherwise, or where update, epoch and block in the file contradict each other. The
 * error is agreed. */
int vd_snapshot_read(const vd_snapshot *s, const char *path, vd_progress *progress, vd_error *err);

/* Not collective. The caller holds the HDF5 lock. Reads the numbers of an open checkpoint of any format version and
 * checks type, shape and range of each. VD_FAILED naming the dataset and the value. */
int vd_snapshot_read_numbers(hid_t file, vd_snapshot_numbers *numbers, vd_error *err);

/* Collective(ctx->comm). Only the parameters, into `model`. The error is agreed. */
int vd_snapshot_read_parameters(vd_context *ctx, vd_ops *ops, vd_model *model, const char *path, vd_error *err);

/* Collective(ctx->comm). Reads a checkpoint's attributes: the settings it was written with, the id of its corpus, the
 * updates done. verify: first compares its digest, which every command does once, before it reads more of the file.
 * Rank 0 reads and broadcasts. The error is agreed. */
int vd_snapshot_describe(vd_context *ctx, const char *path, bool verify, vd_settings *settings, char corpus_id[64],
                         int64_t *update, vd_error *err);

/* Collective(ctx->comm). The vocabulary of the checkpoint at `path` into *v, which the caller frees, also on error;
 * *has is false where there is none (a file of format version 1). Rank 0 reads. The error is agreed. */
int vd_snapshot_read_vocabulary(vd_context *ctx, const char *path, vd_vocabulary *v, bool *has, vd_error *err);

/* Collective(ctx->comm). The corpus adopts the vocabulary of the checkpoint at `path` (vd_corpus_adopt), so that ids
 * are the model's. Rank 0 reads. A file of format version 1 holds none: then the corpus must be the one of trained_id.
 * VD_USAGE naming symbols that the model lacks. The error is agreed. */
int vd_snapshot_adopt_vocabulary(vd_context *ctx, const char *path, const char *trained_id, vd_corpus *corpus,
                                 vd_error *err);

#endif
