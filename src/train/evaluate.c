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
  vd_evaluator_position *position; /* [n_position] */
  int64_t n_position;
  int64_t *slot; /* [n_position] of this rank's positions: which of its chosen queries */
  float *nll;    /* [n_position] of this rank's positions */
};

/* Predicted tokens of stream s in the blocks that are run. */
static int64_t targets_of(const vd_evaluator *e, int64_t s) {
  int64_t n = vd_stream_first(&e->geometry, s + 1) - vd_stream_first(&e->geometry, s);
  int64_t most = e->n_block * e->geometry.block;
  return n < most ? n : most;
}

/* Position k is target i of stream s. */
static void set_position(vd_evaluator *e, int64_t k, int64_t s, int64_t i) {
  int64_t block = e->geometry.block;
  e->position[k] = (vd_evaluator_position){vd_stream_first(&e->geometry, s) + i, s, i / block, i % block};
}

/* Of N predicted tokens, in order, position k of n is number (2 k + 1) N / (2 n): the middle of the k-th n-th part. */
static void spread_positions(vd_evaluator *e, int64_t total) {
  int64_t n = e->n_position, before = 0, s = 0;
  for (int64_t k = 0; k < n; k++) {
    int64_t number = ((2 * k + 1) * (total / n) + (2 * k + 1) * (total % n) / n) / 2;
    for (; number - before >= targets_of(e, s); s++) before += targets_of(e, s);
    set_position(e, k, s, number - before);
  }
}

static int find_positions(vd_evaluator *e, vd_error *err) {
  for (int64_t k = 0, s = 0; k < e->n_position; k++) {
    int64_t token = e->plan.position[k];
    while (s < e->geometry.n_stream - 1 && vd_stream_first(&e->geometry, s + 1) <= token) s++;
    int64_t i = token - vd_stream_first(&e->geometry, s);
    if (i < 0 || i >= targets_of(e, s))
      return vd_fail(err, VD_USAGE, "token %lld of the split '%s', counted from 0, is not predicted: %s",
                     (long long)token, e->plan.split,
                     token == 0                     ? "nothing precedes it"
                     : token >= e->geometry.n_token ? "the split is shorter"
                                                    : "the evaluation ends before it");
    set_position(e, k, s, i);
  }
  return VD_OK;
}

static void place_positions(vd_evaluator *e, vd_error *err) {
  int64_t total = 0, wanted = e->plan.n_position;
  for (int64_t i = 0; i < e->geometry.n_stream; i++) total += targets_of(e, i);
  size_t n = (size_t)(e->n_position = e->plan.position || wanted < total ? wanted : total);
  e->position = vd_calloc(n + 1, sizeof *e->position);
  e->slot = vd_calloc(n + 1, sizeof *e->slot);
  e->nll = vd_calloc(n + 1, sizeof *e->nll);
  if (e->plan.position)
    find_positions(e, err);
  else
    spread_positions(e, total);
}

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
  if (err->status == VD_OK && plan->attention) place_positions(e, err);
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
  free(e->position);
  free(e->slot);
  free(e->nll);
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

/* Whether position k is a query of this rank in block b; *query: which one. */
static bool is_query(const vd_evaluator *e, int64_t k, int64_t b, int64_t *query) {
  const vd_evaluator_position *p = &e->position[k];
  *query = (p->stream - e->stream0) * e->geometry.block + p->row;
  return p->block == b && p->stream >= e->stream0 && p->stream < e->stream0 + e->n_own;
}

/* The step's chosen queries; *n_chosen: of the rank so far. The caller frees. */
static int64_t *choose(vd_evaluator *e, int64_t b, int64_t *n_chosen, vd_step *step) {
  int64_t *chosen = vd_calloc((size_t)e->n_position + 1, sizeof *chosen);
  for (int64_t k = 0; k < e->n_position; k++)
    if (is_query(e, k, b, &chosen[step->n_chosen])) {
      e->slot[k] = (*n_chosen)++;
      step->n_chosen++;
    }
  step->chosen = chosen;
  return chosen;
}

static void run_block(vd_evaluator *e, vd_reader *reader, real *nll, int64_t *n_chosen, vd_evaluation *out,
                      vd_error *err) {
  const int32_t *x, *y;
  int64_t b, query;
  if (vd_reader_next(reader, &b, &x, &y, err)) return;
  double sum;
  vd_step step = {.x = x, .y = y, .block = e->geometry.block, .nll_sum = &sum, .nll = nll};
  int64_t *chosen = choose(e, b, n_chosen, &step);
  int status = vd_model_run(e->model, &step, err);
  free(chosen);
  if (status) return;
  out->nll += sum;
  out->n_target += step.n_target;
  if (out->token_nll) store_nll(e, b, nll, y, out);
  for (int64_t k = 0; k < e->n_position; k++)
    if (is_query(e, k, b, &query)) e->nll[k] = (float)nll[query];
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

/* Memories and records as they are before the first block. */
static int begin_run(vd_evaluator *e, vd_error *err) {
  vd_model_params_changed(e->model);
  if (vd_model_reset_memory(e->model, err) || !e->plan.attention || e->n_own == 0) return err->status;
  int64_t most = vd_evaluator_distances(e) * vd_model_config_of(e->model)->n_head, own = 0;
  if (most > INT32_MAX)
    return vd_fail(err, VD_FAILED, "attention weights of %lld distances and heads are too many to record",
                   (long long)most);
  for (int64_t k = 0; k < e->n_position; k++)
    own += e->position[k].stream >= e->stream0 && e->position[k].stream < e->stream0 + e->n_own;
  return vd_model_attention_begin(e->model, own, err);
}

int vd_evaluator_run(vd_evaluator *e, bool want_nll, vd_evaluation *out, vd_error *err) {
  const vd_evaluate_plan *p = &e->plan;
  double start = vd_clock_seconds();
  *out = (vd_evaluation){.n_token = e->geometry.n_token};
  real *nll = NULL;
  vd_reader *reader = NULL;
  int64_t n_chosen = 0;
  if (want_nll) make_nll(e, out);
  if (want_nll || e->n_position > 0) nll = vd_calloc((size_t)((e->n_own > 0 ? e->n_own : 1) * p->block), sizeof *nll);
  begin_run(e, err);
  if (e->n_own > 0 && err->status == VD_OK)
    vd_reader_start(&reader, p->corpus, p->split, &e->geometry, e->stream0, e->stream0 + e->n_own, 0, e->n_block,
                    p->read_ahead, err);
  for (int64_t b = 0; b < e->n_block && all_continue(e, out, err); b++)
    if (e->n_own > 0) run_block(e, reader, nll, &n_chosen, out, err);
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

const vd_evaluator_position *vd_evaluator_positions(const vd_evaluator *e, int64_t *n) {
  *n = e->n_position;
  return e->position;
}

int64_t vd_evaluator_distances(const vd_evaluator *e) {
  return vd_model_attention_distances(e->model);
}

static int owner_of(const vd_evaluator *e, int64_t stream) {
  int64_t first, last = 0;
  int rank = -1;
  while (stream >= last) vd_stream_share(e->geometry.n_stream, ++rank, e->plan.ctx->size, &first, &last);
  return rank;
}

/* Copies n values of the owner to rank 0, which may be the owner. */
static void send_to_first(const vd_evaluator *e, int owner, void *value, int64_t n, MPI_Datatype type) {
  const vd_context *ctx = e->plan.ctx;
  if (owner == 0) return;
  if (ctx->rank == owner) MPI_Send(value, (int)n, type, 0, 0, ctx->comm);
  if (ctx->rank == 0) MPI_Recv(value, (int)n, type, owner, 0, ctx->comm, MPI_STATUS_IGNORE);
}

void vd_evaluator_gather_nll(const vd_evaluator *e, float *nll) {
  for (int64_t k = 0; k < e->n_position; k++) {
    nll[k] = e->nll[k];
    send_to_first(e, owner_of(e, e->position[k].stream), &nll[k], 1, MPI_FLOAT);
  }
}

/* Elements of a layer's weights. */
static int64_t elements_of(const vd_evaluator *e) {
  return vd_evaluator_distances(e) * vd_model_config_of(e->model)->n_head;
}

void vd_evaluator_gather_mean(vd_evaluator *e, int layer, int64_t n_target, double *mean) {
  int64_t n = elements_of(e);
  double *sum = vd_calloc((size_t)n, sizeof *sum);
  for (int64_t i = 0; i < n; i++) mean[i] = 0;
  for (int64_t s = 0; s < e->geometry.n_stream; s++) {
    int owner = owner_of(e, s);
    if (e->plan.ctx->rank == owner) vd_model_attention_sum(e->model, layer, s - e->stream0, sum);
    send_to_first(e, owner, sum, n, MPI_DOUBLE);
    for (int64_t i = 0; i < n; i++) mean[i] += sum[i];
  }
  for (int64_t i = 0; i < n; i++) mean[i] /= (double)n_target;
  free(sum);
}

void vd_evaluator_gather_weight(vd_evaluator *e, int64_t k, int layer, float *weight) {
  int owner = owner_of(e, e->position[k].stream);
  int64_t n = elements_of(e);
  if (e->plan.ctx->rank == owner) {
    real *mine = vd_calloc((size_t)n, sizeof *mine);
    vd_model_attention_weight(e->model, layer, e->slot[k], mine);
    for (int64_t i = 0; i < n; i++) weight[i] = (float)mine[i];
    free(mine);
  }
  send_to_first(e, owner, weight, n, MPI_FLOAT);
}
