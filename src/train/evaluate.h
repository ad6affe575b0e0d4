/* Bits per symbol of a split: validation while training, and `viaduct eval`. */
#ifndef VD_EVALUATE_H
#define VD_EVALUATE_H

#include "io/corpus.h"
#include "io/streams.h"
#include "src/comm/context.h"
#include "src/comm/grad_reducer.h"
#include "src/model/model.h"

/* The split and its division into streams and blocks. Borrowed. */
typedef struct vd_evaluate_plan {
  vd_context *ctx;
  vd_corpus *corpus;
  const char *split;
  int64_t streams, block, max_blocks; /* max_blocks 0: the whole split */
  int64_t micro_streams;              /* of a rank at once; 0: all */
  int read_ahead;
  bool stoppable;          /* give up when a signal is noted on any rank */
  bool attention;          /* record attention weights: vd_evaluator_gather_mean and what follows it */
  const int64_t *position; /* [n_position] ascending: predicted tokens whose weights are recorded; NULL: n_position
                              evenly spread ones, fewer where fewer are predicted */
  int64_t n_position;
  vd_grad_reducer *reducer; /* its watchdog ends waits for other ranks that take too long; NULL: none */
} vd_evaluate_plan;

typedef struct vd_evaluation {
  double nll;       /* nats, sum over the predicted tokens */
  int64_t n_target; /* predicted tokens */
  int64_t n_token;  /* of the split */
  double seconds;
  bool stopped;     /* a signal came, and the sums cover a part of the split */
  float *token_nll; /* of the rank's streams where wanted: targets [first_target, last_target); NaN where not
                       predicted; caller frees */
  int64_t first_target, last_target;
} vd_evaluation;

/* A predicted token whose attention weights are recorded. It is target `row` of block `block` of its stream. */
typedef struct vd_evaluator_position {
  int64_t token; /* counted from the start of the split */
  int64_t stream, block, row;
} vd_evaluator_position;

typedef struct vd_evaluator vd_evaluator;

/* Collective(plan->ctx->comm). Geometry and a model without gradients for the rank's streams. Ranks beyond the number
 * of streams idle. trained: the model whose parameters are evaluated, as they are at each run; it must outlive the
 * evaluator. NULL: a model of `config` on `ops` with parameters of its own, which the caller fills
 * (vd_evaluator_model). VD_USAGE for an unknown or too short split, and for a position that is not predicted. The error
 * is agreed. */
int vd_evaluator_create(vd_evaluator **out, const vd_evaluate_plan *plan, const vd_model *trained,
                        const vd_model_config *config, vd_ops *ops, vd_error *err);
/* Not collective. NULL is allowed. */
void vd_evaluator_destroy(vd_evaluator *e);
/* Not collective. The evaluator's model, borrowed. */
vd_model *vd_evaluator_model(vd_evaluator *e);
/* Not collective. The geometry of the split. Borrowed. */
const vd_streams *vd_evaluator_streams(const vd_evaluator *e);
/* Collective(plan->ctx->comm). Predicts every target of the split once, from memories that are zeros or empty. *out is
 * the same on all ranks but for token_nll, which is made where want_nll (4 bytes for each target of the rank). The
 * error is agreed. */
int vd_evaluator_run(vd_evaluator *e, bool want_nll, vd_evaluation *out, vd_error *err);

/* The attention that the last complete vd_evaluator_run recorded, where plan->attention is set: */

/* Not collective. The positions, ascending; *n: their number. The same on all ranks. Borrowed. */
const vd_evaluator_position *vd_evaluator_positions(const vd_evaluator *e, int64_t *n);
/* Not collective. Distances that weights are recorded for, the same on all ranks. */
int64_t vd_evaluator_distances(const vd_evaluator *e);
/* Collective(plan->ctx->comm). On rank 0, nll [positions] becomes what each position cost, in nats. */
void vd_evaluator_gather_nll(const vd_evaluator *e, float *nll);
/* Collective(plan->ctx->comm). On rank 0, mean [n_head][distances] becomes a layer's mean weights over the n_target
 * predicted tokens of all ranks. Streams are added in their global order: the same bits on any number of ranks. */
void vd_evaluator_gather_mean(vd_evaluator *e, int layer, int64_t n_target, double *mean);
/* Collective(plan->ctx->comm). On rank 0, weight [n_head][distances] becomes the weights of position k in a layer. */
void vd_evaluator_gather_weight(vd_evaluator *e, int64_t k, int layer, float *weight);

#endif
