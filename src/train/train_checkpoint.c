#include "io/checkpoint.h"
#include "io/corpus_write.h"
#include "src/comm/collectives.h"
#include "src/train/train.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* What is done once the file of a checkpoint is there. */
struct links {
  const vd_settings *settings;
  int64_t update;
  bool best;
};

static void link_checkpoint(void *what, vd_error *err) {
  struct links *l = what;
  const char *directory = l->settings->run.directory;
  if (err->status == VD_OK && vd_checkpoint_link(directory, "last", l->update, err) == VD_OK && l->best)
    vd_checkpoint_link(directory, "best", l->update, err);
  if (err->status == VD_OK) vd_checkpoint_prune(directory, l->settings->checkpoint.keep, err);
  free(l);
}

static int wrap_checkpoint(const vd_train *t, vd_error *err) {
  if (t->last_good[0])
    vd_wrap(err, "update %lld (the last good checkpoint is %s)", (long long)t->saved_update, t->last_good);
  return err->status;
}

void vd_train_write_trace(vd_train *t) {
  if (t->trace) vd_task_queue_add(t->writer, vd_trace_write, vd_trace_capture(t->trace), 0);
}

int vd_train_poll_checkpoint(vd_train *t, vd_error *err) {
  if (!t->writer || err->status != VD_OK) return err->status;
  vd_task_queue_poll(t->writer, err);
  return wrap_checkpoint(t, err);
}

int vd_train_wait_checkpoint_local(vd_train *t, vd_error *err) {
  if (t->writing[0] && t->writer && vd_task_queue_wait(t->writer, err) == VD_OK)
    snprintf(t->last_good, sizeof t->last_good, "%s", t->writing);
  return err->status;
}

int vd_train_wait_checkpoint(vd_train *t, vd_error *err) {
  if (!t->writing[0]) return VD_OK;
  vd_train_wait_checkpoint_local(t, err);
  if (vd_broadcast_error(t->ctx->comm, err) == VD_OK) snprintf(t->last_good, sizeof t->last_good, "%s", t->writing);
  t->writing[0] = '\0';
  return wrap_checkpoint(t, err);
}

vd_snapshot vd_train_snapshot(const vd_train *t) {
  return (vd_snapshot){.ctx = t->ctx,
                       .ops = t->ops,
                       .model = t->model,
                       .optimizer = t->optimizer,
                       .n_stream = t->geometry.n_stream,
                       .n_block = t->blocks,
                       .writer = t->writer,
                       .corpus = t->corpus,
                       .origin = &t->origin,
                       .compress = t->settings->checkpoint.compress,
                       .reducer = t->reducer};
}

/* Parameters and optimizer states that each rank has stepped in part become whole. */
static int gather_shards(vd_train *t, vd_error *err) {
  vd_grad_reducer_gather(t->reducer, vd_model_params(t->model), err);
  for (int i = 0; i < vd_optimizer_n_state(t->optimizer) && err->status == VD_OK; i++)
    vd_grad_reducer_gather(t->reducer, vd_optimizer_state(t->optimizer, i), err);
  return err->status;
}

int vd_train_checkpoint(vd_train *t, bool best, vd_error *err) {
  if (vd_train_wait_checkpoint(t, err)) return err->status;
  char path[VD_PATH + 64];
  vd_checkpoint_path(t->settings->run.directory, t->progress.update, path, sizeof path);
  const vd_snapshot snapshot = vd_train_snapshot(t);
  if (gather_shards(t, err)) return wrap_checkpoint(t, err);
  t->saved_update = t->progress.update;
  vd_train_write_trace(t); /* its rows up to the checkpoint are there once that is */
  if (vd_snapshot_write(&snapshot, path, &t->progress, err)) return wrap_checkpoint(t, err);
  if (t->writer) {
    struct links *l = vd_calloc(1, sizeof *l);
    *l = (struct links){t->settings, t->progress.update, best};
    vd_task_queue_add(t->writer, link_checkpoint, l, 0);
  }
  snprintf(t->writing, sizeof t->writing, "%s", path);
  return VD_OK;
}

int vd_train_broadcast_log_error(vd_train *t, vd_error *err) {
  vd_grad_reducer_arm_watchdog(t->reducer, "rank 0, which writes the log,");
  vd_broadcast_error(t->ctx->comm, err);
  vd_grad_reducer_disarm_watchdog(t->reducer);
  return err->status;
}

/* Made for the first validation and kept: what it allocates is needed at the next one again. */
static int make_evaluator(vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  vd_evaluate_plan plan = {.ctx = t->ctx,
                           .corpus = t->corpus,
                           .split = vd_split_name(s->valid.split),
                           .streams = s->valid.streams,
                           .block = s->data.tokens_per_sample,
                           .max_blocks = s->valid.max_blocks,
                           .micro_streams = s->data.micro_streams,
                           .read_ahead = (int)s->data.read_ahead,
                           .stoppable = true,
                           .reducer = t->reducer};
  return t->evaluator ? VD_OK : vd_evaluator_create(&t->evaluator, &plan, t->model, &t->config, t->ops, err);
}

int vd_train_validate(vd_train *t, bool *stopped, vd_error *err) {
  vd_evaluation result = {0};
  vd_grad_reducer_all_needed(t->reducer);
  if (make_evaluator(t, err) == VD_OK) vd_evaluator_run(t->evaluator, false, &result, err);
  *stopped = result.stopped;
  if (err->status) return vd_wrap(err, "validation");
  if (result.stopped) return VD_OK;
  vd_progress *p = &t->progress;
  double bpc = result.nll / (double)result.n_target / log(2.0);
  if (!isfinite(bpc))
    return vd_fail(err, VD_FAILED, "update %lld: the validation loss is not finite (%g)", (long long)p->update, bpc);
  bool best = p->best_update == 0 || bpc < p->best_bpc;
  p->valid_update = p->update;
  if (best) {
    p->best_update = p->update;
    p->best_bpc = bpc;
  }
  int64_t epoch = 1 + (p->update - 1) / t->blocks;
  if (t->ctx->rank == 0 && vd_log_valid(t->log, p->update, epoch, bpc, best, err) == VD_OK)
    vd_trace_append_valid(t->trace, p->update, bpc);
  if (vd_train_broadcast_log_error(t, err)) return err->status;
  return best ? vd_train_checkpoint(t, true, err) : VD_OK;
}
