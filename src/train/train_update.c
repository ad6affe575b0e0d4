/* One update of a training run, over all ranks. src/train/update_pipeline.h describes when the host waits for the
 * statistics of which update. */
#include "src/base/signals.h"
#include "src/comm/collectives.h"
#include "src/train/train.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Summed over the ranks at every update, in one small all-reduce. */
enum { NLL, TARGETS, FAILED, SIGNALLED, DATA_SECONDS, N_SHARED };

/* The passes of one block: gradients and loss of this rank. */
static void run_block(vd_train *t, vd_step *step, vd_error *err) {
  const int32_t *x, *y;
  int64_t number, update = t->progress.update;
  vd_ops *o = t->ops;
  if (vd_reader_next(t->reader, &number, &x, &y, err)) return;
  if (!x || number != update) vd_bug("block %lld came for update %lld", (long long)number, (long long)update);
  if (number % t->blocks == 0 && vd_model_reset_memory(t->model, err)) return;
  o->zero_gradients(o, vd_model_gradients(t->model), vd_model_arena(t->model));
  *step = (vd_step){.x = x,
                    .y = y,
                    .block = t->geometry.block,
                    .update = update,
                    .train = true,
                    .ready = vd_grad_reducer_ready,
                    .needed = vd_grad_reducer_needed,
                    .receiver = t->reducer,
                    .scale = vd_optimizer_loss_scale(t->optimizer) /
                             (double)vd_stream_targets(&t->geometry, number % t->blocks)};
  /* The host may wait for room in the GPU's queue, and the GPU for the all-reduce of the pending update, whose number
   * counted from 1 is `update`. */
  if (vd_update_pipeline_pending(t->pipeline) > 0) vd_grad_reducer_arm_all_reduce(t->reducer, update);
  vd_grad_reducer_begin(t->reducer, update + 1);
  if (vd_update_pipeline_run(t->pipeline, step, err) || vd_grad_reducer_check(t->reducer, err)) return;
  vd_monitor_count(t->monitor, y, t->n_own * t->geometry.block);
}

static int wrap_last_good(vd_train *t, vd_error *err) {
  vd_error other = {0}; /* dropped: `err` ends the run */
  vd_train_wait_checkpoint_local(t, &other);
  size_t used = strlen(err->message);
  if (t->last_good[0])
    snprintf(err->message + used, sizeof err->message - used, "; the last good checkpoint is %s", t->last_good);
  else
    snprintf(err->message + used, sizeof err->message - used, "; there is no checkpoint yet");
  return err->status;
}

/* The loss of an update (counted from 0) is not finite: names the first tensor that is not. Parameters are the same on
 * all ranks once they are gathered, and so is the message. */
static int fail_loss(vd_train *t, int64_t update, double nll, vd_error *err) {
  if (vd_grad_reducer_gather(t->reducer, vd_model_params(t->model), err)) return err->status;
  const vd_param *p = vd_monitor_not_finite(t->model, t->ops, vd_model_params(t->model));
  char where[192] = "all parameters are finite";
  if (p && p->layer >= 0)
    snprintf(where, sizeof where, "the first tensor with values that are not finite is %s (layer %d)", p->name,
             p->layer);
  else if (p)
    snprintf(where, sizeof where, "the first tensor with values that are not finite is %s (no layer)", p->name);
  *err = (vd_error){0};
  vd_fail(err, VD_FAILED, "update %lld: the loss is not finite (%g); %s", (long long)(update + 1), nll, where);
  return wrap_last_good(t, err);
}

/* The loss of this update is not finite. Under a loss scale its step is skipped, its sums do not count, and the
 * memories, which hold what overflowed, are reset; otherwise the run ends. */
static int skip_step(vd_train *t, double shared[N_SHARED], vd_error *err) {
  vd_loss_scale scaling;
  if (!vd_optimizer_scaling(t->optimizer, &scaling)) return fail_loss(t, t->progress.update, shared[NLL], err);
  vd_log_message(t->log, "update %lld is skipped: the loss is not finite; the loss scale was %g",
                 (long long)(t->progress.update + 1), scaling.scale);
  shared[NLL] = shared[TARGETS] = 0;
  vd_model_reset_memory(t->model, err);
  return vd_agree(t->ctx->comm, err);
}

/* Some rank failed in update `update`, counted from 1. */
static int end_exchange(const vd_train *t, int64_t update, vd_error *err) {
  vd_error why = {0};
  /* The failed rank may not have begun all-reduces that others wait for. */
  if (vd_grad_reducer_abort(t->reducer, update, &why))
    vd_end_other_ranks(t->ctx->comm, err->status != VD_OK ? err : &why);
  vd_grad_reducer_arm_watchdog(t->reducer, "the other ranks' errors");
  vd_agree(t->ctx->comm, err);
  vd_grad_reducer_disarm_watchdog(t->reducer);
  return err->status;
}

/* Waits for the pending update, whose number counted from 1 is `number`. An error is the same on all ranks where
 * stats->known. */
static int pull(vd_train *t, int64_t number, vd_update_stats *stats, vd_error *err) {
  vd_grad_reducer_arm_all_reduce(t->reducer, number);
  vd_update_pipeline_pull(t->pipeline, stats, err);
  vd_grad_reducer_disarm_watchdog(t->reducer);
  t->grad_norm = stats->grad_norm;
  t->span_penalty = stats->span_penalty;
  t->sum_seconds += vd_grad_reducer_exposed_seconds(t->reducer, number);
  return err->status;
}

/* Completes the all-reduce of the gradients and enqueues the optimiser step. */
static int reduce_and_step(vd_train *t, double targets, bool skip, vd_error *err) {
  vd_ops *o = t->ops;
  vd_update_stats stats;
  int64_t update = t->progress.update;
  if (o->phase) o->phase(o, "gradient all-reduce");
  vd_grad_reducer_finish(t->reducer);
  if (o->phase) o->phase(o, "update");
  vd_model_span_penalty(t->model, vd_optimizer_loss_scale(t->optimizer));
  /* The first step builds the optimiser's tables and waits for the GPU. */
  vd_grad_reducer_arm_all_reduce(t->reducer, update + 1);
  vd_update_pipeline_push(t->pipeline, update, targets, skip, err);
  vd_grad_reducer_disarm_watchdog(t->reducer);
  /* Errors of this rank alone, in particular of the exchange of a shard. */
  if (err->status != VD_OK || vd_grad_reducer_check_operations(t->reducer, err)) {
    vd_end_other_ranks(t->ctx->comm, err);
    return err->status;
  }
  if (vd_update_pipeline_is_full(t->pipeline) && pull(t, update + 1, &stats, err) && !stats.known)
    vd_end_other_ranks(t->ctx->comm, err);
  return err->status;
}

/* Adds the sums of one update, and the seconds of this call, to the meters of log, trace and summary. With a lag the
 * sums are those of the update before: only between two drains do sums and seconds cover the same updates. */
static void count(vd_train *t, double nll, double targets, double seconds) {
  vd_meter *meters[] = {&t->progress.log, &t->progress.trace, &t->total};
  for (int i = 0; i < 3; i++) {
    meters[i]->nll += nll;
    meters[i]->targets += targets;
    meters[i]->seconds += seconds;
  }
}

/* Pulls the pending update, the one before progress.update. A gradient that is not finite goes to *bad, which is the
 * same on all ranks; a failed backend, on this rank alone perhaps, to *err. */
static void pull_pending(vd_train *t, double shared[N_SHARED], vd_error *bad, vd_error *err) {
  vd_update_stats stats;
  pull(t, t->progress.update, &stats, bad);
  if (!stats.known) vd_end_other_ranks(t->ctx->comm, bad);
  if (!stats.known) vd_fail(err, bad->status, "%s", bad->message);
  shared[NLL] = stats.nll;
  shared[TARGETS] = stats.targets;
}

static void compare_norms(const vd_train *t) {
  if (isfinite(t->grad_norm)) vd_same_on_all(t->ctx->comm, (int64_t)(t->grad_norm * 1e9), "the gradient norm");
}

/* After the all-reduce of `shared`: ends the run where loss or gradients of the pulled update are not finite. `update`
 * counts from 0. */
static int check_pulled(vd_train *t, int64_t update, const double shared[N_SHARED], vd_error *bad, vd_error *err) {
  if (!isfinite(shared[NLL])) return fail_loss(t, update, shared[NLL], err);
  if (bad->status != VD_OK) {
    vd_fail(err, bad->status, "%s", bad->message);
    return wrap_last_good(t, err);
  }
  compare_norms(t);
  return VD_OK;
}

int vd_train_update(vd_train *t, bool *signalled, vd_error *err) {
  double shared[N_SHARED] = {0}, start = MPI_Wtime();
  vd_error bad = {0};
  vd_step step = {0};
  bool pulled = vd_update_pipeline_pending(t->pipeline) > 0, skip = false;
  double waited = vd_reader_waited(t->reader);
  run_block(t, &step, err);
  shared[DATA_SECONDS] = vd_reader_waited(t->reader) - waited;
  if (step.nll_sum && err->status == VD_OK) {
    shared[NLL] = *step.nll_sum;
    shared[TARGETS] = (double)step.n_target;
  }
  if (pulled) pull_pending(t, shared, &bad, err); /* also where the block failed: it tells whether the GPU works */
  shared[FAILED] = err->status != VD_OK;
  shared[SIGNALLED] = vd_signals_noted() != 0;
  vd_grad_reducer_all_reduce_scalars(t->reducer, shared, N_SHARED);
  if (shared[FAILED] > 0) return end_exchange(t, t->progress.update + 1, err);
  if (pulled && check_pulled(t, t->progress.update - 1, shared, &bad, err)) return err->status;
  skip = !pulled && !isfinite(shared[NLL]);
  if (skip && skip_step(t, shared, err)) return err->status;
  if (reduce_and_step(t, (double)step.n_target, skip, err)) return wrap_last_good(t, err);
  if (vd_update_pipeline_pending(t->pipeline) == 0) compare_norms(t);
  *signalled = shared[SIGNALLED] > 0;
  t->data_seconds += shared[DATA_SECONDS] / t->ctx->size;
  t->progress.update++;
  count(t, shared[NLL], shared[TARGETS], MPI_Wtime() - start);
  return VD_OK;
}

int vd_train_drain(vd_train *t, vd_error *err) {
  if (vd_update_pipeline_pending(t->pipeline) == 0) return VD_OK;
  double shared[N_SHARED] = {0}, start = MPI_Wtime();
  vd_error bad = {0};
  pull_pending(t, shared, &bad, err);
  shared[FAILED] = err->status != VD_OK;
  vd_grad_reducer_all_reduce_scalars(t->reducer, shared, N_SHARED);
  if (shared[FAILED] > 0) return end_exchange(t, t->progress.update, err);
  if (check_pulled(t, t->progress.update - 1, shared, &bad, err)) return err->status;
  count(t, shared[NLL], shared[TARGETS], MPI_Wtime() - start);
  return VD_OK;
}
