#include "src/model/optimizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* An update of which a slot tells, or one that was given up. */
struct sent {
  int64_t update;
  double scale; /* of its gradients */
  bool lost;
};

struct vd_optimizer {
  vd_optimizer_config config;
  vd_model *model;
  vd_ops *ops;
  int n_tensor;
  vd_extent *tensor;  /* [n_tensor] host */
  double *grad_stats; /* backend [VD_STATS_TENSORS + n_tensor] */
  real *state[2];     /* backend: Adagrad's sum of squared gradients; Adam's m and v */
  vd_loss_scale scaling;
  bool lost; /* the loss of the update to come */
  struct sent sent[VD_PINNED_SLOTS];
  int64_t n_sent, n_received; /* slot i % VD_PINNED_SLOTS is that of the i-th update */
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
  o->tensor = vd_calloc((size_t)o->n_tensor, sizeof *o->tensor);
  for (int i = 0; i < o->n_tensor; i++) o->tensor[i] = vd_model_param(m, i)->at;
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

void vd_optimizer_destroy(vd_optimizer *o) {
  if (!o) return;
  for (int i = 0; i < 2; i++)
    if (o->state[i]) o->ops->free(o->ops, o->state[i]);
  if (o->grad_stats) o->ops->free(o->ops, o->grad_stats);
  free(o->tensor);
  free(o);
}

double vd_optimizer_lr(const vd_optimizer *o, int64_t update) {
  const vd_optimizer_config *c = &o->config;
  double warm = c->warmup_updates > 0 ? (double)(update + 1) / (double)c->warmup_updates : 1.0;
  if (c->schedule == VD_CONSTANT || update < c->warmup_updates) return c->lr * fmin(1.0, warm);
  if (update >= c->max_updates) return c->min_lr;
  double turn = (double)(update - c->warmup_updates) / (double)(c->max_updates - c->warmup_updates);
  return c->min_lr + 0.5 * (c->lr - c->min_lr) * (1.0 + cos(acos(-1.0) * turn));
}

/* Parameters and state from the gradients, as the grad_stats says. */
static void step(vd_optimizer *o, int64_t update) {
  const vd_optimizer_config *c = &o->config;
  real *gradient = vd_model_gradients(o->model), *param = vd_model_params(o->model);
  double lr = vd_optimizer_lr(o, update);
  vd_adam adam = {lr, c->beta1, c->beta2, c->eps, update + 1};
  if (c->method == VD_ADAM)
    o->ops->adam(o->ops, param, gradient, o->state[0], o->state[1], o->tensor, o->n_tensor, o->grad_stats, &adam);
  else
    o->ops->adagrad(o->ops, param, gradient, o->state[0], o->tensor, o->n_tensor, o->grad_stats, lr, c->eps,
                    c->clip_step);
}

static int fail_at(const vd_optimizer *o, int i, int64_t update, vd_error *err) {
  const vd_param *p = vd_model_param(o->model, i);
  char layer[32] = "no layer";
  if (p->layer >= 0) snprintf(layer, sizeof layer, "layer %d", p->layer);
  return vd_fail(err, VD_FAILED, "update %lld: the gradient of %s (%s) is not finite", (long long)(update + 1), p->name,
                 layer);
}

/* Gradients that are not finite (of `tensor`), or a loss (-1): an error, or under a loss scale an update that is left
 * out. */
static int overflow(vd_optimizer *o, int tensor, int64_t update, vd_error *err) {
  if (o->config.loss_scale <= 0) return fail_at(o, tensor, update, err);
  o->scaling.scale /= 2;
  o->scaling.clean = 0;
  o->scaling.skipped++;
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
void vd_optimizer_skip_step(vd_optimizer *o) {
  if (o->config.loss_scale <= 0) vd_bug("without a loss scale a lost loss ends the run");
  o->lost = true;
}

static void count_clean(vd_optimizer *o) {
  if (o->config.loss_scale <= 0 || ++o->scaling.clean < o->config.loss_scale_window) return;
  o->scaling.scale *= 2;
  o->scaling.clean = 0;
}

int vd_optimizer_ahead(const vd_optimizer *o) {
  return o->ops->memory_is_remote && o->config.loss_scale <= 0 ? 1 : 0;
}

int vd_optimizer_under_way(const vd_optimizer *o) {
  return (int)(o->n_sent - o->n_received);
}

int vd_optimizer_send(vd_optimizer *o, int64_t update, vd_error *err) {
  vd_model *m = o->model;
  size_t spans = vd_model_span_extent(m);
  if (vd_optimizer_under_way(o) > vd_optimizer_ahead(o)) vd_bug("too many updates are under way");
  int slot = (int)(o->n_sent++ % VD_PINNED_SLOTS);
  o->sent[slot] = (struct sent){.update = update, .scale = 1 / o->scaling.scale, .lost = o->lost};
  if (o->lost) {
    o->lost = false;
    return VD_OK;
  }
  o->ops->gradient_stats(o->ops, vd_model_gradients(m), o->tensor, o->n_tensor, 1 / o->scaling.scale,
                         o->config.clip_norm, o->grad_stats);
  step(o, update);
  if (spans > 0) o->ops->clamp01(o->ops, vd_model_params(m), spans);
  vd_model_stepped(m);
  const vd_stats_part parts[] = {{vd_model_loss(m), sizeof(double)},
                                 {o->grad_stats, VD_STATS_TENSORS * sizeof *o->grad_stats},
                                 {vd_model_params(m), spans * sizeof(real)}};
  return o->ops->push_stats(o->ops, slot, 3, parts, err);
}

int vd_optimizer_receive(vd_optimizer *o, vd_update_stats *outcome, vd_error *err) {
  if (vd_optimizer_under_way(o) < 1) vd_bug("no update is under way");
  int slot = (int)(o->n_received++ % VD_PINNED_SLOTS);
  const struct sent *sent = &o->sent[slot];
  *outcome = (vd_update_stats){.update = sent->update, .nll = NAN, .grad_norm = NAN};
  outcome->span_penalty = vd_model_span_penalty(o->model, 0);
  outcome->told = sent->lost;
  if (sent->lost) return overflow(o, -1, sent->update, err);
  const double *told = o->ops->pull_stats(o->ops, slot, err);
  if (!told) return err->status;
  const double *grad_stats = told + 1;
  outcome->told = true;
  outcome->nll = told[0];
  vd_model_spans_are(o->model, (const real *)(grad_stats + VD_STATS_TENSORS), vd_optimizer_under_way(o));
  if (grad_stats[VD_STATS_NONFINITE] >= 0) return overflow(o, (int)grad_stats[VD_STATS_NONFINITE], sent->update, err);
  outcome->grad_norm = sqrt(grad_stats[VD_STATS_NORM2]) * sent->scale;
  count_clean(o);
  return VD_OK;
}

int vd_optimizer_update(vd_optimizer *o, int64_t update, double *grad_norm, vd_error *err) {
  vd_update_stats outcome = {.grad_norm = NAN};
  if (vd_optimizer_send(o, update, err) == VD_OK) vd_optimizer_receive(o, &outcome, err);
  *grad_norm = outcome.grad_norm;
  return err->status;
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
