#include "src/model/optimizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct vd_optimizer {
  vd_optimizer_config config;
  vd_model *model;
  vd_ops *ops;
  int n_tensor;
  vd_extent *step, *norm; /* host: of `shard`, which borrows them; all tensors where the steps are not sharded */
  vd_optimizer_shard shard;
  double *grad_stats; /* backend [VD_STATS_TENSORS + n_tensor] */
  real *state[2];     /* backend: Adagrad's sum of squared gradients; Adam's m and v */
  vd_loss_scale scaling;
};

int vd_optimizer_create(vd_optimizer **out, const vd_optimizer_config *config, vd_model *m, vd_ops *ops,
                        vd_error *err) {
  if (config->method == VD_ADAM && !ops->adam)
    return vd_fail(err, VD_FAILED, "the backend '%s' has no Adam", ops->name);
  vd_optimizer *o = vd_calloc(1, sizeof *o);
  o->config = *config;
  o->scaling.scale = config->loss_scale > 0 ? config->loss_scale : 1.0;
  o->model = m;
  o->ops = ops;
  o->n_tensor = vd_model_n_param(m);
  vd_extent *all = vd_calloc((size_t)o->n_tensor, sizeof *all);
  for (int i = 0; i < o->n_tensor; i++) all[i] = vd_model_param(m, i)->at;
  const vd_optimizer_shard whole = {.n_step = o->n_tensor, .n_norm = o->n_tensor, .step = all, .norm = all};
  vd_optimizer_set_shard(o, &whole);
  free(all);
  void *p = NULL;
  for (int i = 0; i < vd_optimizer_n_state(o) && err->status == VD_OK; i++)
    if (ops->alloc(ops, vd_model_arena(m) * sizeof(real), &p, err) == VD_OK) o->state[i] = p;
  if (err->status == VD_OK &&
      ops->alloc(ops, ((size_t)VD_STATS_TENSORS + (size_t)o->n_tensor) * sizeof *o->grad_stats, &p, err) == VD_OK) {
    o->grad_stats = p;
    *out = o;
    return VD_OK;
  }
  vd_wrap(err, "optimiser state");
  vd_optimizer_destroy(o);
  return err->status;
}

void vd_optimizer_set_shard(vd_optimizer *o, const vd_optimizer_shard *shard) {
  vd_extent *step = vd_calloc((size_t)shard->n_step + 1, sizeof *step);
  vd_extent *norm = vd_calloc((size_t)shard->n_norm + 1, sizeof *norm);
  memcpy(step, shard->step, (size_t)shard->n_step * sizeof *step);
  memcpy(norm, shard->norm, (size_t)shard->n_norm * sizeof *norm);
  free(o->step);
  free(o->norm);
  o->step = step;
  o->norm = norm;
  o->shard = *shard;
  o->shard.step = step;
  o->shard.norm = norm;
}

void vd_optimizer_destroy(vd_optimizer *o) {
  if (!o) return;
  for (int i = 0; i < 2; i++)
    if (o->state[i]) o->ops->free(o->ops, o->state[i]);
  if (o->grad_stats) o->ops->free(o->ops, o->grad_stats);
  free(o->step);
  free(o->norm);
  free(o);
}

double vd_optimizer_lr(const vd_optimizer *o, int64_t update) {
  const vd_optimizer_config *c = &o->config;
  double warm = c->warmup_updates > 0 ? (double)(update + 1) / (double)c->warmup_updates : 1.0;
  if (c->schedule == VD_CONSTANT || update < c->warmup_updates) return c->lr * fmin(1.0, warm);
  if (update >= c->max_updates) return c->min_lr;
  double passed = (double)(update - c->warmup_updates) / (double)(c->max_updates - c->warmup_updates);
  return c->min_lr + 0.5 * (c->lr - c->min_lr) * (1.0 + cos(acos(-1.0) * passed));
}

static int fail_at(const vd_optimizer *o, int i, int64_t update, vd_error *err) {
  const vd_param *p = vd_model_param(o->model, i);
  char layer[32] = "no layer";
  if (p->layer >= 0) snprintf(layer, sizeof layer, "layer %d", p->layer);
  return vd_fail(err, VD_FAILED, "update %lld: the gradient of %s (%s) is not finite", (long long)(update + 1), p->name,
                 layer);
}

vd_loss_scale vd_loss_scale_next(vd_loss_scale before, int64_t window, bool overflow) {
  if (overflow) return (vd_loss_scale){.scale = before.scale / 2, .skipped = before.skipped + 1};
  vd_loss_scale next = before;
  if (++next.clean < window) return next;
  next.scale *= 2;
  next.clean = 0;
  return next;
}

/* The gradients of `tensor`, or the loss (-1), are not finite. */
static int overflow(vd_optimizer *o, int tensor, int64_t update, vd_error *err) {
  if (o->config.loss_scale <= 0) return fail_at(o, tensor, update, err);
  o->scaling = vd_loss_scale_next(o->scaling, o->config.loss_scale_window, true);
  if (o->scaling.scale >= 1e-4) return VD_OK;
  if (tensor < 0)
    vd_fail(err, VD_FAILED, "update %lld: the loss is not finite", (long long)(update + 1));
  else
    fail_at(o, tensor, update, err);
  return vd_wrap(err, "the loss scale has fallen below 1e-4");
}

double vd_optimizer_loss_scale(const vd_optimizer *o) {
  return o->scaling.scale;
}
bool vd_optimizer_scaling(const vd_optimizer *o, vd_loss_scale *scaling) {
  *scaling = o->scaling;
  return o->config.loss_scale > 0;
}
void vd_optimizer_set_scaling(vd_optimizer *o, const vd_loss_scale *scaling) {
  if (o->config.loss_scale > 0) o->scaling = *scaling;
}

void vd_optimizer_step(vd_optimizer *o, int64_t update, double loss_scale) {
  const vd_optimizer_config *c = &o->config;
  vd_model *m = o->model;
  real *gradient = vd_model_gradients(m), *param = vd_model_params(m);
  size_t spans = vd_model_span_extent(m);
  double lr = vd_optimizer_lr(o, update);
  vd_adam adam = {lr, c->beta1, c->beta2, c->eps, update + 1};
  const vd_optimizer_shard *s = &o->shard;
  double *norm2 = o->grad_stats + VD_STATS_TENSORS;
  o->ops->gradient_norms(o->ops, gradient, s->norm, s->n_norm, o->n_tensor, norm2);
  if (s->all_reduce_norms) s->all_reduce_norms(s->receiver, norm2, o->n_tensor);
  o->ops->gradient_stats(o->ops, o->n_tensor, 1 / loss_scale, c->clip_norm, o->grad_stats);
  if (c->method == VD_ADAM)
    o->ops->adam(o->ops, param, gradient, o->state[0], o->state[1], s->step, s->n_step, o->grad_stats, &adam);
  else
    o->ops->adagrad(o->ops, param, gradient, o->state[0], s->step, s->n_step, o->grad_stats, lr, c->eps, c->clip_step);
  if (s->all_gather_weights) s->all_gather_weights(s->receiver);
  if (spans > 0) o->ops->clamp01(o->ops, param, spans);
  vd_model_params_moved(m);
}

const double *vd_optimizer_grad_stats(const vd_optimizer *o) {
  return o->grad_stats;
}

int vd_optimizer_check(vd_optimizer *o, int64_t update, double loss_scale, const double *grad_stats, double *grad_norm,
                       vd_error *err) {
  *grad_norm = NAN;
  if (grad_stats[VD_STATS_NONFINITE] >= 0) return overflow(o, (int)grad_stats[VD_STATS_NONFINITE], update, err);
  *grad_norm = sqrt(grad_stats[VD_STATS_NORM2]) * (1 / loss_scale);
  if (o->config.loss_scale > 0) o->scaling = vd_loss_scale_next(o->scaling, o->config.loss_scale_window, false);
  return VD_OK;
}

int vd_optimizer_check_skipped(vd_optimizer *o, int64_t update, vd_error *err) {
  if (o->config.loss_scale <= 0) vd_bug("without a loss scale a loss that is not finite ends the run");
  return overflow(o, -1, update, err);
}

int vd_optimizer_update(vd_optimizer *o, int64_t update, double *grad_norm, vd_error *err) {
  double scale = o->scaling.scale, grad_stats[VD_STATS_TENSORS];
  *grad_norm = NAN;
  vd_optimizer_step(o, update, scale);
  o->ops->get_double(o->ops, grad_stats, o->grad_stats, VD_STATS_TENSORS);
  vd_model_params_changed(o->model);
  if (o->ops->synchronize(o->ops, err)) return err->status;
  return vd_optimizer_check(o, update, scale, grad_stats, grad_norm, err);
}

int vd_optimizer_n_state(const vd_optimizer *o) {
  return o->config.method == VD_ADAM ? 2 : 1;
}

const char *vd_optimizer_state_name(const vd_optimizer *o, int i) {
  if (i < 0 || i >= vd_optimizer_n_state(o)) vd_bug("no optimiser state %d", i);
  if (o->config.method == VD_ADAM) return i == 0 ? "adam_m" : "adam_v";
  return "adagrad_sum";
}

real *vd_optimizer_state(vd_optimizer *o, int i) {
  if (i < 0 || i >= vd_optimizer_n_state(o)) vd_bug("no optimiser state %d", i);
  return o->state[i];
}
