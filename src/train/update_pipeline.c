#include "src/train/update_pipeline.h"

#include <math.h>
#include <stdlib.h>

/* An update between push and pull. */
struct pending {
  int64_t update;
  double targets, loss_scale;
  bool skipped; /* nothing was pushed to its slot */
};

struct vd_update_pipeline {
  vd_model *model;
  vd_optimizer *optimizer;
  vd_ops *ops;
  int lag;
  double nll; /* of the last block, with lag 0 */
  struct pending slot[VD_PINNED_SLOTS];
  int64_t n_pushed, n_pulled; /* the i-th update has slot i % VD_PINNED_SLOTS */
};

vd_update_pipeline *vd_update_pipeline_create(vd_model *m, vd_optimizer *o, vd_ops *ops) {
  vd_update_pipeline *p = vd_calloc(1, sizeof *p);
  vd_loss_scale scaling;
  *p = (vd_update_pipeline){.model = m, .optimizer = o, .ops = ops};
  p->lag = ops->memory_is_remote && !vd_optimizer_scaling(o, &scaling) ? 1 : 0;
  vd_model_set_span_margin(m, p->lag > 0 ? VD_WINDOW_STEP : 0);
  return p;
}

void vd_update_pipeline_destroy(vd_update_pipeline *p) {
  free(p);
}

int vd_update_pipeline_lag(const vd_update_pipeline *p) {
  return p->lag;
}

int vd_update_pipeline_pending(const vd_update_pipeline *p) {
  return (int)(p->n_pushed - p->n_pulled);
}

bool vd_update_pipeline_is_full(const vd_update_pipeline *p) {
  return vd_update_pipeline_pending(p) > p->lag;
}

int vd_update_pipeline_run(vd_update_pipeline *p, vd_step *step, vd_error *err) {
  if (vd_update_pipeline_is_full(p))
    vd_bug("a block is run while %d updates are pending", vd_update_pipeline_pending(p));
  step->nll_sum = p->lag > 0 ? NULL : &p->nll;
  return vd_model_run(p->model, step, err);
}

int vd_update_pipeline_push(vd_update_pipeline *p, int64_t update, double targets, bool skip, vd_error *err) {
  if (vd_update_pipeline_pending(p) > 0) vd_bug("update %lld is pushed while another is pending", (long long)update);
  int slot = (int)(p->n_pushed++ % VD_PINNED_SLOTS);
  double loss_scale = vd_optimizer_loss_scale(p->optimizer);
  p->slot[slot] = (struct pending){.update = update, .targets = targets, .loss_scale = loss_scale, .skipped = skip};
  if (skip) return VD_OK;
  vd_optimizer_step(p->optimizer, update, loss_scale);
  const vd_stats_part parts[] = {{vd_model_loss(p->model), sizeof(double)},
                                 {vd_optimizer_grad_stats(p->optimizer), VD_STATS_TENSORS * sizeof(double)},
                                 {vd_model_params(p->model), vd_model_span_extent(p->model) * sizeof(real)}};
  return p->ops->push_stats(p->ops, slot, 3, parts, err);
}

int vd_update_pipeline_pull(vd_update_pipeline *p, vd_update_stats *stats, vd_error *err) {
  if (vd_update_pipeline_pending(p) < 1) vd_bug("no update is pending");
  int slot = (int)(p->n_pulled++ % VD_PINNED_SLOTS);
  const struct pending *u = &p->slot[slot];
  *stats = (vd_update_stats){.update = u->update,
                             .known = u->skipped,
                             .nll = NAN,
                             .targets = u->targets,
                             .grad_norm = NAN,
                             .span_penalty = vd_model_span_penalty(p->model, 0)};
  if (u->skipped) return vd_optimizer_check_skipped(p->optimizer, u->update, err);
  const double *pushed = p->ops->pull_stats(p->ops, slot, err);
  if (!pushed) return err->status;
  const double *grad_stats = pushed + 1;
  stats->known = true;
  stats->nll = pushed[0];
  vd_model_set_spans(p->model, (const real *)(grad_stats + VD_STATS_TENSORS));
  return vd_optimizer_check(p->optimizer, u->update, u->loss_scale, grad_stats, &stats->grad_norm, err);
}
