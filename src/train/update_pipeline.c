/* One update of a training run. On a device beside the host an update is enqueued before it is known what came of the
 * one before it, so that neither waits for the other: `late` below. What the run is told of comes from
 * vd_optimizer_receive then. */
#include "src/base/signals.h"
#include "src/comm/collectives.h"
#include "src/train/train.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* What the ranks tell each other at every update, in one small reduction. */
enum { NLL, TARGETS, FAILED, SIGNALLED, N_SHARED };

static bool is_late(const vd_train *t) {
  return vd_optimizer_ahead(t->optimizer) > 0;
}

/* One block through the model: gradients and sums of this rank. */
static void run_block(vd_train *t, vd_step *step, vd_error *err) {
  const int32_t *x, *y;
  int64_t number, update = t->progress.update;
  vd_ops *o = t->ops;
  if (vd_reader_next(t->reader, &number, &x, &y, err)) return;
  if (!x || number != update) vd_bug("block %lld came for update %lld", (long long)number, (long long)update);
  if (number % t->blocks == 0 && vd_model_reset_memory(t->model, err)) return;
  o->zero(o, vd_model_gradients(t->model), vd_model_arena(t->model) * sizeof(real));
  *step = (vd_step){.x = x,
                    .y = y,
                    .block = t->geometry.block,
                    .update = update,
                    .train = true,
                    .deferred = is_late(t),
                    .ready = vd_grad_reducer_ready,
                    .receiver = t->reducer,
                    .scale = vd_optimizer_loss_scale(t->optimizer) /
                             (double)vd_stream_targets(&t->geometry, number % t->blocks)};
  /* What is enqueued may have to wait for the GPU, and it for the sum of the update before (counted from 1). */
  if (vd_optimizer_under_way(t->optimizer) > 0) vd_grad_reducer_arm_all_reduce(t->reducer, update);
  vd_grad_reducer_begin(t->reducer, update + 1);
  if (vd_model_run(t->model, step, err) || vd_grad_reducer_check(t->reducer, err)) return;
  vd_monitor_count(t->monitor, y, t->n_own * t->geometry.block);
}

static int wrap_last_good(vd_train *t, vd_error *err) {
  vd_error other = {0}; /* less than what ends the run */
  vd_train_wait_checkpoint_local(t, &other);
  size_t used = strlen(err->message);
  if (t->last_good[0])
    snprintf(err->message + used, sizeof err->message - used, "; the last good checkpoint is %s", t->last_good);
  else
    snprintf(err->message + used, sizeof err->message - used, "; there is no checkpoint yet");
  return err->status;
}

/* The loss of an update (counted from 0) is not a number: where did it come from? Parameters are the same on all ranks,
 * and so is the answer. */
static int fail_loss(vd_train *t, int64_t update, double nll, vd_error *err) {
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

/* Under a loss scale the update is left out, its sums are, and the memories, which hold what overflowed, begin anew. */
static int lose(vd_train *t, double shared[N_SHARED], vd_error *err) {
  vd_loss_scale scaling;
  if (!vd_optimizer_scaling(t->optimizer, &scaling)) return fail_loss(t, t->progress.update, shared[NLL], err);
  vd_log_message(t->log, "update %lld is skipped: the loss is not finite; the loss scale was %g",
                 (long long)(t->progress.update + 1), scaling.scale);
  vd_optimizer_skip_step(t->optimizer);
  shared[NLL] = shared[TARGETS] = 0;
  vd_model_reset_memory(t->model, err);
  return vd_agree(t->ctx->comm, err);
}

/* The GPU of this rank has failed, and the others may wait in a sum that it never ends, where nothing that this rank
 * says reaches them: it says why and ends the run. Alone it returns. */
static void end_run(const vd_train *t, vd_error *err) {
  if (t->ctx->size == 1) return;
  vd_wrap(err, "rank %d, whose sums the other ranks wait for", t->ctx->rank);
  vd_error_print(err);
  MPI_Abort(t->ctx->comm, VD_FAILED);
}

/* What came of update `number` (counted from 1), the oldest under way. */
static void receive(vd_train *t, int64_t number, vd_update_stats *outcome, vd_error *err) {
  vd_grad_reducer_arm_all_reduce(t->reducer, number);
  vd_optimizer_receive(t->optimizer, outcome, err);
  vd_grad_reducer_disarm_watchdog(t->reducer);
  t->grad_norm = outcome->grad_norm;
  t->span_penalty = outcome->span_penalty;
  vd_grad_reducer_end(t->reducer, number);
  t->sum_seconds += vd_grad_reducer_exposed_seconds(t->reducer);
}

/* Gradients are summed over the ranks, parameters follow them. */
static int sum_and_step(vd_train *t, vd_error *err) {
  vd_ops *o = t->ops;
  vd_update_stats outcome;
  int64_t update = t->progress.update;
  if (o->phase) o->phase(o, "gradient sum");
  vd_grad_reducer_finish(t->reducer);
  if (o->phase) o->phase(o, "update");
  vd_model_span_penalty(t->model, vd_optimizer_loss_scale(t->optimizer));
  vd_grad_reducer_arm_all_reduce(t->reducer, update + 1); /* the first update makes tables, and waits */
  vd_optimizer_send(t->optimizer, update, err);
  vd_grad_reducer_disarm_watchdog(t->reducer);
  if (err->status != VD_OK && is_late(t)) end_run(t, err);
  if (err->status == VD_OK && !is_late(t)) receive(t, update + 1, &outcome, err);
  return err->status;
}

/* Sums of an update, which may be the one before, into the meters of log and trace, and the seconds of this call: from
 * one catching-up to the next both add up. */
static void count(vd_train *t, double nll, double targets, double seconds) {
  vd_meter *meters[2] = {&t->progress.log, &t->progress.trace};
  for (int i = 0; i < 2; i++) {
    meters[i]->nll += nll;
    meters[i]->targets += targets;
    meters[i]->seconds += seconds;
  }
}

/* The update before this one, while the device works on this one. A gradient that is not finite is kept in *bad, the
 * same on all ranks; what else went wrong, on this rank alone perhaps, in *err. */
static void receive_before(vd_train *t, double shared[N_SHARED], vd_error *bad, vd_error *err) {
  vd_update_stats before;
  receive(t, t->progress.update, &before, bad);
  if (!before.told) end_run(t, bad);
  if (!before.told) vd_fail(err, bad->status, "%s", bad->message);
  shared[NLL] = before.nll;
  shared[TARGETS] = t->late_targets;
}

/* After the ranks told each other of `update` (counted from 0): does the run go on? */
static int judge(vd_train *t, int64_t update, const double shared[N_SHARED], vd_error *bad, vd_error *err) {
  if (!isfinite(shared[NLL])) return fail_loss(t, update, shared[NLL], err);
  if (bad->status != VD_OK) {
    vd_fail(err, bad->status, "%s", bad->message);
    return wrap_last_good(t, err);
  }
  if (isfinite(t->grad_norm)) vd_same_on_all(t->ctx->comm, (int64_t)(t->grad_norm * 1e9), "the gradient norm");
  return VD_OK;
}

int vd_train_update(vd_train *t, bool *signalled, vd_error *err) {
  double shared[N_SHARED] = {0}, start = MPI_Wtime();
  vd_error bad = {0};
  vd_step step = {0};
  bool late = is_late(t), before = vd_optimizer_under_way(t->optimizer) > 0;
  run_block(t, &step, err);
  if (!late && err->status == VD_OK) {
    shared[NLL] = step.nll_sum;
    shared[TARGETS] = (double)step.n_target;
  }
  if (before) receive_before(t, shared, &bad, err); /* also where the block failed: is the GPU there? */
  shared[FAILED] = err->status != VD_OK;
  shared[SIGNALLED] = vd_signals_noted() != 0;
  vd_grad_reducer_all_reduce_scalars(t->reducer, shared, N_SHARED);
  if (shared[FAILED] > 0) {
    vd_grad_reducer_abort(t->reducer); /* the failed rank may not have begun sums that others wait for */
    return vd_agree(t->ctx->comm, err);
  }
  if (before && judge(t, t->progress.update - 1, shared, &bad, err)) return err->status;
  if (!late && !isfinite(shared[NLL]) && lose(t, shared, err)) return err->status;
  if (sum_and_step(t, err)) return wrap_last_good(t, err);
  if (!late && isfinite(t->grad_norm)) vd_same_on_all(t->ctx->comm, (int64_t)(t->grad_norm * 1e9), "the gradient norm");
  t->late_targets = (double)step.n_target;
  *signalled = shared[SIGNALLED] > 0;
  vd_progress *p = &t->progress;
  p->update++;
  p->epoch = 1 + p->update / t->blocks;
  p->block = p->update % t->blocks;
  count(t, shared[NLL], shared[TARGETS], MPI_Wtime() - start);
  return VD_OK;
}

int vd_train_catch_up(vd_train *t, vd_error *err) {
  if (vd_optimizer_under_way(t->optimizer) == 0) return VD_OK;
  double shared[N_SHARED] = {0}, start = MPI_Wtime();
  vd_error bad = {0};
  receive_before(t, shared, &bad, err);
  shared[FAILED] = err->status != VD_OK;
  vd_grad_reducer_all_reduce_scalars(t->reducer, shared, N_SHARED);
  if (shared[FAILED] > 0) {
    vd_grad_reducer_abort(t->reducer);
    return vd_agree(t->ctx->comm, err);
  }
  if (judge(t, t->progress.update - 1, shared, &bad, err)) return err->status;
  count(t, shared[NLL], shared[TARGETS], MPI_Wtime() - start);
  return VD_OK;
}
