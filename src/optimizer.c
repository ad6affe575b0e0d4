#include "optimizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

struct vd_optimizer {
  vd_optimizer_config config;
  vd_model *model;
  vd_ops *ops;
  int n_tensor;
  vd_extent *tensor; /* [n_tensor] host */
  double *norm2;     /* [n_tensor] host */
  real *state[2];    /* backend: Adagrad's sum of squared gradients; Adam's m and v */
  vd_loss_scale scaling;
  bool lost; /* the loss of the update to come */
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
  o->norm2 = vd_calloc((size_t)o->n_tensor, sizeof *o->norm2);
  for (int i = 0; i < o->n_tensor; i++) o->tensor[i] = vd_model_param(m, i)->at;
  for (int i = 0; i < vd_optimizer_n_state(o); i++) {
    void *state = NULL;
    if (ops->alloc(ops, vd_model_arena(m) * sizeof(real), &state, err)) {
      vd_wrap(err, "optimiser state");
      vd_optimizer_destroy(o);
      return err->status;
    }
    o->state[i] = state;
  }
  *out = o;
  return VD_OK;
}

void vd_optimizer_destroy(vd_optimizer *o) {
  if (!o) return;
  for (int i = 0; i < 2; i++)
    if (o->state[i]) o->ops->free(o->ops, o->state[i]);
  free(o->tensor);
  free(o->norm2);
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

/* Parameters and state from the gradients times `scale`. */
static void step(vd_optimizer *o, int64_t update, double scale) {
  const vd_optimizer_config *c = &o->config;
  real *gradient = vd_model_gradients(o->model), *param = vd_model_params(o->model);
  double lr = vd_optimizer_lr(o, update);
  vd_adam adam = {lr, c->beta1, c->beta2, c->eps, scale, update + 1};
  if (c->method == VD_ADAM)
    o->ops->adam(o->ops, param, gradient, o->state[0], o->state[1], o->tensor, o->n_tensor, &adam);
  else
    o->ops->adagrad(o->ops, param, gradient, o->state[0], o->tensor, o->n_tensor, o->norm2, scale, lr, c->eps,
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
static int overflow(vd_optimizer *o, int tensor, int64_t update, double *grad_norm, vd_error *err) {
  o->lost = false;
  if (o->config.loss_scale <= 0) return fail_at(o, tensor, update, err);
  o->scaling.scale /= 2;
  o->scaling.clean = 0;
  o->scaling.skipped++;
  *grad_norm = NAN;
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
void vd_optimizer_lose(vd_optimizer *o) {
  if (o->config.loss_scale <= 0) vd_bug("without a loss scale a lost loss ends the run");
  o->lost = true;
}

static void count_clean(vd_optimizer *o) {
  if (o->config.loss_scale <= 0 || ++o->scaling.clean < o->config.loss_scale_window) return;
  o->scaling.scale *= 2;
  o->scaling.clean = 0;
}

int vd_optimizer_update(vd_optimizer *o, int64_t update, double *grad_norm, vd_error *err) {
  vd_model *m = o->model;
  if (o->lost) return overflow(o, -1, update, grad_norm, err);
  o->ops->square_sums(o->ops, vd_model_gradients(m), o->tensor, o->n_tensor, o->norm2);
  double total = 0, scale = 1 / o->scaling.scale;
  for (int i = 0; i < o->n_tensor; i++) {
    if (!isfinite(o->norm2[i])) return overflow(o, i, update, grad_norm, err);
    total += o->norm2[i];
  }
  *grad_norm = sqrt(total) * scale;
  if (o->config.clip_norm > 0) scale *= fmin(1.0, o->config.clip_norm / (*grad_norm + 1e-6));
  for (int i = 0; i < o->n_tensor; i++) o->norm2[i] *= scale * scale;
  step(o, update, scale);
  if (vd_model_span_room(m) > 0) o->ops->clamp01(o->ops, vd_model_params(m), vd_model_span_room(m));
  vd_model_params_changed(m);
  count_clean(o);
  return VD_OK;
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
