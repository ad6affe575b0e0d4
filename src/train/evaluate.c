#include "src/train/evaluate.h"

#include "io/reader.h"
#include "src/base/clock.h"
#include "src/base/signals.h"
#include "src/comm/collectives.h"

#include <math.h>
#include <stdlib.h>

struct vd_evaluator {
  vd_evaluate_plan plan;
  vd_streams geometry;
  int64_t n_block;        /* that are run */
  int64_t stream0, n_own; /* of this rank; n_own may be 0 */
  vd_model *model;
};

static void set_geometry(vd_evaluator *e, vd_error *err) {
  const vd_evaluate_plan *p = &e->plan;
  int64_t n, last;
  if (vd_corpus_length(p->corpus, p->split, &n, err)) return;
  e->geometry = (vd_streams){.n_token = n, .n_stream = p->streams, .block = p->block};
  if (n - 1 < p->streams) {
    vd_fail(err, VD_USAGE, "the split '%s' has %lld tokens: too few for %lld streams", p->split, (long long)n,
            (long long)p->streams);
    return;
  }
  e->n_block = vd_stream_blocks(&e->geometry);
  if (p->max_blocks > 0 && p->max_blocks < e->n_block) e->n_block = p->max_blocks;
  vd_stream_share(p->streams, p->ctx->rank, p->ctx->size, &e->stream0, &last);
  e->n_own = last - e->stream0;
}

int vd_evaluator_create(vd_evaluator **out, const vd_evaluate_plan *plan, const vd_model *trained,
                        const vd_model_config *config, vd_ops *ops, vd_error *err) {
  vd_evaluator *e = vd_calloc(1, sizeof *e);
  e->plan = *plan;
  set_geometry(e, err);
  /* A rank without streams has a model of one stream, so that every rank takes part in the broadcast of parameters. */
  int64_t n = e->n_own > 0 ? e->n_own : 1;
  if (err->status == VD_OK && trained)
    vd_model_create_shared(&e->model, trained, e->stream0, n, plan->micro_streams, plan->block, err);
  else if (err->status == VD_OK)
    vd_model_create(&e->model, config, ops, e->stream0, n, plan->micro_streams, plan->block, false, err);
  if (vd_agree(plan->ctx->comm, err)) {
    vd_evaluator_destroy(e);
    return err->status;
  }
  *out = e;
  return VD_OK;
}

void vd_evaluator_destroy(vd_evaluator *e) {
  if (!e) return;
  if (e->model) vd_model_destroy(e->model);
  free(e);
}

vd_model *vd_evaluator_model(vd_evaluator *e) {
  return e->model;
}

const vd_streams *vd_evaluator_streams(const vd_evaluator *e) {
  return &e->geometry;
}

/* Puts the nll of one block where its targets stand. */
static void store_nll(const vd_evaluator *e, int64_t b, const real *nll, const int32_t *y, vd_evaluation *out) {
  int64_t block = e->geometry.block;
  for (int64_t s = 0; s < e->n_own; s++) {
    int64_t target = vd_stream_first(&e->geometry, e->stream0 + s) + b * block;
    for (int64_t i = 0; i < block; i++)
      if (y[s * block + i] >= 0) out->token_nll[target + i - out->first_target] = (float)nll[s * block + i];
  }
}

static void run_block(vd_evaluator *e, vd_reader *reader, real *nll, vd_evaluation *out, vd_error *err) {
  const int32_t *x, *y;
  int64_t b;
  if (vd_reader_next(reader, &b, &x, &y, err)) return;
  double sum;
  vd_step step = {.x = x, .y = y, .block = e->geometry.block, .nll_sum = &sum, .nll = nll};
  if (vd_model_run(e->model, &step, err)) return;
  out->nll += sum;
  out->n_target += step.n_target;
  if (nll) store_nll(e, b, nll, y, out);
}

/* A wait for the other ranks begins; it ends at disarm. */
static void arm(const vd_evaluator *e, const char *what) {
  if (e->plan.reducer) vd_grad_reducer_arm_watchdog(e->plan.reducer, what);
}
static void disarm(const vd_evaluator *e) {
  if (e->plan.reducer) vd_grad_reducer_disarm_watchdog(e->plan.reducer);
}

/* False on all ranks where one has failed, or was sent a signal: none may wait for a rank that has stopped. */
static bool all_continue(const vd_evaluator *e, vd_evaluation *out, const vd_error *err) {
  int mine[2] = {err->status != VD_OK, e->plan.stoppable && vd_signals_noted()}, any[2];
  arm(e, "a block of the validation");
  MPI_Allreduce(mine, any, 2, MPI_INT, MPI_MAX, e->plan.ctx->comm);
  disarm(e);
  out->stopped = any[1] != 0;
  return !any[0] && !any[1];
}

static void make_nll(const vd_evaluator *e, vd_evaluation *out) {
  out->first_target = vd_stream_first(&e->geometry, e->stream0);
  out->last_target = vd_stream_first(&e->geometry, e->stream0 + e->n_own);
  int64_t n = out->last_target - out->first_target;
  out->token_nll = vd_calloc((size_t)n, sizeof *out->token_nll);
  for (int64_t i = 0; i < n; i++) out->token_nll[i] = NAN;
}

int vd_evaluator_run(vd_evaluator *e, bool want_nll, vd_evaluation *out, vd_error *err) {
  const vd_evaluate_plan *p = &e->plan;
  double start = vd_clock_seconds();
  *out = (vd_evaluation){.n_token = e->geometry.n_token};
  real *nll = NULL;
  vd_reader *reader = NULL;
  if (want_nll) {
    make_nll(e, out);
    nll = vd_calloc((size_t)((e->n_own > 0 ? e->n_own : 1) * p->block), sizeof *nll);
  }
  vd_model_params_changed(e->model);
  vd_model_reset_memory(e->model, err);
  if (e->n_own > 0 && err->status == VD_OK)
    vd_reader_start(&reader, p->corpus, p->split, &e->geometry, e->stream0, e->stream0 + e->n_own, 0, e->n_block,
                    p->read_ahead, err);
  for (int64_t b = 0; b < e->n_block && all_continue(e, out, err); b++)
    if (e->n_own > 0) run_block(e, reader, nll, out, err);
  vd_reader_stop(reader);
  free(nll);
  double sum[2] = {out->nll, (double)out->n_target};
  arm(e, "the end of the validation");
  if (vd_agree(p->ctx->comm, err) == VD_OK) vd_all_reduce_doubles(p->ctx->comm, sum, 2);
  disarm(e);
  if (err->status != VD_OK) return err->status;
  out->nll = sum[0];
  out->n_target = (int64_t)sum[1];
  out->seconds = vd_clock_seconds() - start;
  return VD_OK;
}
