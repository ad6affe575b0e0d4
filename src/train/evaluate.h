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
  bool stoppable;           /* give up when a signal is noted on any rank */
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

typedef struct vd_evaluator vd_evaluator;

/* Collective(plan->ctx->comm). Geometry and a model without gradients for the rank's streams. Ranks beyond the number
 * of streams idle. trained: the model whose parameters are evaluated, as they are at each run; it must outlive the
 * evaluator. NULL: a model of `config` on `ops` with parameters of its own, which the caller fills
 * (vd_evaluator_model). VD_USAGE for an unknown or too short split. The error is agreed. */
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

#endif
