#include "parallel.h"
#include "signals.h"
#include "train.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* What the ranks tell each other at every update, in one small reduction. */
enum { NLL, TARGETS, FAILED, SIGNALLED, N_SHARED };

/* One block through the model: gradients and sums of this rank. */
static void run_block(vd_train *t, double shared[N_SHARED], vd_error *err) {
  const int32_t *x, *y;
  int64_t number, update = t->progress.update;
  vd_ops *o = t->ops;
  if (vd_reader_next(t->reader, &number, &x, &y, err)) return;
  if (!x || number != update) vd_bug("block %lld came for update %lld", (long long)number, (long long)update);
  if (number % t->blocks == 0 && vd_model_reset_memory(t->model, err)) return;
  o->zero(o, vd_model_gradients(t->model), vd_model_arena(t->model) * sizeof(real));
  vd_step step = {.x = x,
                  .y = y,
                  .block = t->geometry.block,
                  .update = update,
                  .train = true,
                  .ready = vd_reducer_ready,
                  .receiver = t->reducer,
                  .scale = vd_optimizer_loss_scale(t->optimizer) /
                           (double)vd_stream_targets(&t->geometry, number % t->blocks)};
  vd_reducer_begin(t->reducer, update + 1);
  if (vd_model_run(t->model, &step, err) || o->synchronize(o, err) || vd_reducer_check(t->reducer, err)) return;
  vd_monitor_count(t->monitor, y, t->n_own * t->geometry.block);
  shared[NLL] = step.nll_sum;
  shared[TARGETS] = (double)step.n_target;
}

static int wrap_last_good(vd_train *t, vd_error *err) {
  vd_error other = {0}; /* less than what ends the run */
  vd_train_await(t, &other);
  size_t used = strlen(err->message);
  if (t->last_good[0])
    snprintf(err->message + used, sizeof err->message - used, "; the last good checkpoint is %s", t->last_good);
  else
    snprintf(err->message + used, sizeof err->message - used, "; there is no checkpoint yet");
  return err->status;
}

/* The loss is not a number. Under a loss scale the update will be left out, its sums are, and the memories, which hold
 * what overflowed, begin anew. Else: where did it come from? Parameters are the same on all ranks, and so is the
 * answer.
 */
static int fail_loss(vd_train *t, double shared[N_SHARED], vd_error *err) {
  double nll = shared[NLL];
  vd_loss_scale scaling;
  if (vd_optimizer_scaling(t->optimizer, &scaling)) {
    vd_log_message(t->log, "update %lld is skipped: the loss is not finite; the loss scale was %g",
                   (long long)(t->progress.update + 1), scaling.scale);
    vd_optimizer_lose(t->optimizer);
    shared[NLL] = shared[TARGETS] = 0;
    vd_model_reset_memory(t->model, err);
    return vd_agree(t->ctx->comm, err);
  }
  const vd_param *p = vd_monitor_not_finite(t->model, t->ops, vd_model_params(t->model));
  char where[192] = "all parameters are finite";
  if (p && p->layer >= 0)
    snprintf(where, sizeof where, "the first tensor with values that are not finite is %s (layer %d)", p->name,
             p->layer);
  else if (p)
    snprintf(where, sizeof where, "the first tensor with values that are not finite is %s (no layer)", p->name);
  vd_fail(err, VD_FAILED, "update %lld: the loss is not finite (%g); %s", (long long)(t->progress.update + 1), nll,
          where);
  return wrap_last_good(t, err);
}

/* Gradients are summed over the ranks, parameters follow them. */
static int sum_and_step(vd_train *t, vd_error *err) {
  vd_ops *o = t->ops;
  if (o->phase) o->phase(o, "gradient sum");
  vd_reducer_finish(t->reducer);
  if (o->phase) o->phase(o, "update");
  t->span_penalty = vd_model_span_penalty(t->model, vd_optimizer_loss_scale(t->optimizer));
  vd_optimizer_update(t->optimizer, t->progress.update, &t->grad_norm, err);
  vd_reducer_end(t->reducer);
  t->sum_seconds += vd_reducer_exposed(t->reducer);
  return err->status;
}

/* One update. *signalled: a signal was noted on some rank. */
static int update(vd_train *t, bool *signalled, vd_error *err) {
  double shared[N_SHARED] = {0}, start = MPI_Wtime();
  run_block(t, shared, err);
  shared[FAILED] = err->status != VD_OK;
  shared[SIGNALLED] = vd_signals_noted() != 0;
  vd_reducer_share(t->reducer, shared, N_SHARED);
  if (shared[FAILED] > 0) {
    vd_reducer_abandon(t->reducer); /* the failed rank may not have begun sums that others wait for */
    return vd_agree(t->ctx->comm, err);
  }
  if (!isfinite(shared[NLL]) && fail_loss(t, shared, err)) return err->status;
  if (sum_and_step(t, err)) return wrap_last_good(t, err);
  if (isfinite(t->grad_norm)) vd_same_on_all(t->ctx->comm, (int64_t)(t->grad_norm * 1e9), "the gradient norm");
  *signalled = shared[SIGNALLED] > 0;
  vd_progress *p = &t->progress;
  p->update++;
  p->epoch = 1 + p->update / t->blocks;
  p->block = p->update % t->blocks;
  vd_meter *meters[2] = {&p->log, &p->trace};
  double seconds = MPI_Wtime() - start;
  for (int i = 0; i < 2; i++) {
    meters[i]->nll += shared[NLL];
    meters[i]->targets += shared[TARGETS];
    meters[i]->seconds += seconds;
  }
  return VD_OK;
}

static double bpc_of(const vd_meter *m) {
  return m->nll / m->targets / log(2.0);
}

/* Model FLOP/s over the peak of all GPUs. */
static double utilisation(const vd_train *t, double tokens_per_second) {
  double per_token = vd_model_flops(t->model), peak = t->device.gpu.peak * (double)t->device.n_gpu;
  return t->device.is_gpu && t->device.precision != VD_FP32 && peak > 0 ? per_token * tokens_per_second / peak : NAN;
}

static void fill_row(vd_train *t, vd_log_row *row) {
  const vd_meter *m = &t->progress.log;
  int64_t n = t->config.n_layer * t->config.n_head;
  vd_model_spans(t->model, t->span);
  vd_loss_scale scaling;
  bool scaled = vd_optimizer_scaling(t->optimizer, &scaling);
  double sum = 0, most = 0;
  for (int64_t i = 0; i < n; i++) {
    sum += t->span[i];
    most = fmax(most, t->span[i]);
  }
  *row = (vd_log_row){.update = t->progress.update,
                      .epoch = 1 + (t->progress.update - 1) / t->blocks,
                      .bpc = bpc_of(m),
                      .span_penalty = t->span_penalty,
                      .learning_rate = vd_optimizer_lr(t->optimizer, t->progress.update - 1),
                      .grad_norm = t->grad_norm,
                      .tokens_per_second = m->targets / m->seconds,
                      .mean_span = sum / (double)n,
                      .max_span = most,
                      .sum_share = t->ctx->size > 1 ? t->sum_seconds / (m->seconds - t->seconds_before) : NAN,
                      .mfu = utilisation(t, m->targets / m->seconds),
                      .loss_scale = scaled ? scaling.scale : NAN,
                      .skipped = scaling.skipped};
}

static void append_trace(vd_train *t, const vd_log_row *log_row, vd_error *err) {
  const vd_meter *m = &t->progress.trace;
  vd_trace_row row = {.update = t->progress.update,
                      .span = t->span,
                      .train_bpc = bpc_of(m),
                      .learning_rate = log_row->learning_rate,
                      .grad_norm = t->grad_norm,
                      .tokens_per_second = m->targets / m->seconds};
  if (t->trace) vd_trace_append(t->trace, &row, err);
}

static bool due(int64_t update, int64_t interval) {
  return interval > 0 && update % interval == 0;
}

/* Log, live line, trace and monitor after an update. */
static int tell(vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  int64_t u = t->progress.update;
  bool end = u == s->run.max_updates;
  vd_log_row row;
  char warning[512] = "";
  fill_row(t, &row);
  if (due(u, s->run.log_interval) || end) {
    vd_reducer_expect(t->reducer, "the other ranks' counts of symbols");
    vd_monitor_judge(t->monitor, t->ctx->comm, u, row.bpc, warning, sizeof warning);
    vd_reducer_over(t->reducer);
    if (t->log) vd_log_update(t->log, &row, err);
    t->progress.log = (vd_meter){0};
    t->sum_seconds = t->seconds_before = 0;
  } else {
    vd_log_live(t->log, &row);
  }
  if (warning[0] && t->log) vd_log_message(t->log, "%s", warning);
  if (due(u, s->trace.interval) || end) {
    if (err->status == VD_OK) append_trace(t, &row, err);
    t->progress.trace = (vd_meter){0};
  }
  vd_train_poll(t, err);
  return vd_train_share_log(t, err);
}

/* Validation and checkpoint where they are due after an update, or at the end. */
static int keep(vd_train *t, bool *signalled, vd_error *err) {
  const vd_settings *s = t->settings;
  int64_t u = t->progress.update;
  bool end = u == s->run.max_updates, stopped = false;
  bool valid = s->valid.interval > 0 && u > 0 && (due(u, s->valid.interval) || end) && t->progress.valid_update != u;
  if (valid && !(*signalled && !end) && vd_train_validate(t, &stopped, err)) return err->status;
  if (stopped) *signalled = true;
  if ((due(u, s->checkpoint.interval) || end || *signalled) && t->saved_update != u)
    return vd_train_checkpoint(t, false, err);
  return VD_OK;
}

int vd_train_loop(vd_train *t, vd_error *err) {
  const int64_t last = t->settings->run.max_updates;
  bool signalled = false;
  if (t->progress.update >= last) {
    if (t->log)
      vd_log_message(t->log, "nothing to do: %lld updates are done, run%%max_updates = %lld",
                     (long long)t->progress.update, (long long)last);
    return VD_OK;
  }
  /* A run that was stopped while it validated does that first. */
  if (keep(t, &signalled, err)) return err->status;
  while (t->progress.update < last && !signalled) {
    if (update(t, &signalled, err) || tell(t, err) || keep(t, &signalled, err)) return err->status;
  }
  if (vd_train_settle(t, err)) return err->status;
  if (!signalled || t->progress.update >= last) return VD_OK;
  if (t->log)
    vd_log_message(t->log, "stopped by a signal after update %lld of %lld; %s is written: run again to go on",
                   (long long)t->progress.update, (long long)last, t->last_good);
  return VD_STOPPED;
}
