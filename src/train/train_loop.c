#include "src/base/clock.h"
#include "src/comm/collectives.h"
#include "src/train/train.h"

#include <math.h>

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
                      .data_wait = t->data_seconds,
                      .mfu = utilisation(t, m->targets / m->seconds),
                      .loss_scale = scaled ? scaling.scale : NAN,
                      .skipped = scaling.skipped};
}

static void append_trace(vd_train *t, const vd_log_row *log_row) {
  const vd_meter *m = &t->progress.trace;
  vd_trace_row row = {.update = t->progress.update,
                      .span = t->span,
                      .train_bpc = bpc_of(m),
                      .learning_rate = log_row->learning_rate,
                      .grad_norm = t->grad_norm,
                      .tokens_per_second = m->targets / m->seconds,
                      .wall = vd_log_wall(t->log),
                      .time = vd_clock_date()};
  if (t->trace) vd_trace_append(t->trace, &row);
}

static bool is_due(int64_t update, int64_t interval) {
  return interval > 0 && update % interval == 0;
}

/* Log, live line, trace and monitor after an update. */
static int log_update(vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  int64_t u = t->progress.update;
  bool end = u == s->run.max_updates;
  vd_log_row row;
  char warning[512] = "";
  fill_row(t, &row);
  if (is_due(u, s->run.log_interval) || end) {
    vd_grad_reducer_arm_watchdog(t->reducer, "the other ranks' counts of symbols");
    vd_monitor_check(t->monitor, t->ctx->comm, u, row.bpc, warning, sizeof warning);
    vd_grad_reducer_disarm_watchdog(t->reducer);
    if (t->log) vd_log_update(t->log, &row, err);
    t->progress.log = (vd_meter){0};
    t->sum_seconds = t->seconds_before = t->data_seconds = 0;
  } else if (t->progress.log.targets > 0) { /* with a lag the first update is not known yet */
    vd_log_live(t->log, &row);
  }
  if (warning[0] && t->log) vd_log_message(t->log, "%s", warning);
  if (is_due(u, s->trace.interval) || end) {
    append_trace(t, &row);
    t->progress.trace = (vd_meter){0};
  }
  if (t->trace && vd_trace_is_due(t->trace, s->trace.max_age)) vd_train_write_trace(t);
  vd_train_poll_checkpoint(t, err);
  return vd_train_broadcast_log_error(t, err);
}

/* Does something after this update need the statistics of all updates: a log line, a trace row, a validation or a
 * checkpoint? */
static bool needs_drain(const vd_train *t, bool signalled) {
  const vd_settings *s = t->settings;
  int64_t u = t->progress.update;
  return signalled || u == s->run.max_updates || is_due(u, s->run.log_interval) || is_due(u, s->trace.interval) ||
         is_due(u, s->valid.interval) || is_due(u, s->checkpoint.interval);
}

/* Validation and checkpoint where they are due after an update, or at the end. */
static int save_if_due(vd_train *t, bool *signalled, vd_error *err) {
  const vd_settings *s = t->settings;
  int64_t u = t->progress.update;
  bool end = u == s->run.max_updates, stopped = false;
  bool valid = s->valid.interval > 0 && u > 0 && (is_due(u, s->valid.interval) || end) && t->progress.valid_update != u;
  if (valid && !(*signalled && !end) && vd_train_validate(t, &stopped, err)) return err->status;
  if (stopped) *signalled = true;
  if ((is_due(u, s->checkpoint.interval) || end || *signalled) && t->saved_update != u)
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
  if (save_if_due(t, &signalled, err)) return err->status;
  while (t->progress.update < last && !signalled) {
    if (vd_train_update(t, &signalled, err) || (needs_drain(t, signalled) && vd_train_drain(t, err)) ||
        log_update(t, err) || save_if_due(t, &signalled, err))
      return err->status;
  }
  if (vd_train_wait_checkpoint(t, err)) return err->status;
  vd_grad_reducer_check(t->reducer, err); /* of the last updates' timeline */
  if (vd_agree(t->ctx->comm, err)) return err->status;
  bool stopped = signalled && t->progress.update < last;
  if (t->log) vd_train_print_summary(t, stopped);
  return stopped ? VD_STOPPED : VD_OK;
}
