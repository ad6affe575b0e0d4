/* The pipeline of updates: how far the host runs ahead of the device. Nothing else knows of this lag.
 *
 * An update is the passes of one block, the all-reduce of its gradients and an optimiser step. After the step the
 * device copies the update's statistics (loss, gradient statistics, spans) to a pinned slot; the host reads them there:
 *
 *     run u     enqueue the forward and backward passes of u
 *     push u    enqueue the step of u and the copy of its statistics to a pinned slot: u is pending
 *     pull u    wait for the copy, give the spans to the model and the overflow or its absence to the loss scale
 *
 * lag 0: the device is the host (CPU), or losses are scaled, so that the scale of u + 1 depends on the statistics of u.
 *
 *     host     run u, wait | reduce loss u | push u, pull u | run u+1, wait | reduce loss u+1 | ...
 *     pending       0                           1       0           0
 *
 * lag 1: a GPU. The passes of u are enqueued before the host waits for the statistics of u-1, so that the GPU always
 * has work, and the host's reductions and logs run beside it:
 *
 *     host     run u | pull u-1 | reduce loss u-1 | push u | run u+1 | pull u | reduce loss u | push u+1 | ...
 *     device   [step u-1][--- passes u ---][ all-reduce u ][step u][--- passes u+1 ---][ all-reduce u+1 ] ...
 *     pending    1         0                            1         1         0                     1
 *
 * Between push u and pull u the host's copy of the spans is one step old. The model plans windows VD_WINDOW_STEP tokens
 * longer for that time (vd_model_set_span_margin). Before a log line, a validation or a checkpoint the pipeline is
 * drained: the pending update is pulled and none is run. */
#ifndef VD_UPDATE_PIPELINE_H
#define VD_UPDATE_PIPELINE_H

#include "src/model/optimizer.h"

typedef struct vd_update_pipeline vd_update_pipeline;

/* Statistics of one update, of this rank. */
typedef struct vd_update_stats {
  int64_t update;      /* counted from 0 */
  bool known;          /* false: the backend failed, and the losses and norms below are NaN */
  double nll;          /* nats; NaN where the step was skipped */
  double targets;      /* counted predictions */
  double grad_norm;    /* global norm before any clip; NaN where a gradient is not finite or the step was skipped */
  double span_penalty; /* of the spans that the update began with, as vd_model_span_penalty gives it */
} vd_update_stats;

/* Not collective. A pipeline for the updates of m by o on ops, all borrowed. Chooses the lag and sets the model's span
 * margin. Free with vd_update_pipeline_destroy. */
vd_update_pipeline *vd_update_pipeline_create(vd_model *m, vd_optimizer *o, vd_ops *ops);
/* Not collective. Pending updates are dropped; NULL is allowed. */
void vd_update_pipeline_destroy(vd_update_pipeline *p);
/* Not collective. Updates that may be pending while the next one is run: 0 or 1. */
int vd_update_pipeline_lag(const vd_update_pipeline *p);
/* Not collective. Updates that were pushed and not pulled. */
int vd_update_pipeline_pending(const vd_update_pipeline *p);
/* Not collective. True where the host has to pull before it runs the next block: more updates are pending than the
 * lag. */
bool vd_update_pipeline_is_full(const vd_update_pipeline *p);
/* Not collective. vd_model_run for a training step. With lag 0 it waits and step->nll_sum points to the loss, borrowed
 * until the next call; with lag 1 it does not wait and step->nll_sum is NULL. Errors as vd_model_run. */
int vd_update_pipeline_run(vd_update_pipeline *p, vd_step *step, vd_error *err);
/* Stream-ordered. The gradients of `update` (counted from 0) are summed over the ranks: enqueues the optimiser step and
 * the copy of the statistics. targets: of this rank. skip: the loss is not finite, and the update changes nothing
 * (only where losses are scaled). No other update may be pending. VD_FAILED without memory for the slot. */
int vd_update_pipeline_push(vd_update_pipeline *p, int64_t update, double targets, bool skip, vd_error *err);
/* Not collective. Waits for the oldest pending update, fills *stats and gives the model its spans. VD_FAILED where the
 * backend failed (stats->known is false), and as vd_optimizer_check, with *stats filled. */
int vd_update_pipeline_pull(vd_update_pipeline *p, vd_update_stats *stats, vd_error *err);

#endif
