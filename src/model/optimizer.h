/* Optimisers with their state and schedule. */
#ifndef VD_OPTIMIZER_H
#define VD_OPTIMIZER_H

#include "src/model/model.h"

/* Adagrad (Duchi et al., JMLR 12, 2011) with the step clip of the adaptive-span recipe (arXiv 1905.07799, section 3):
 * accumulator += g^2; p -= lr_t g / (sqrt(accumulator) + eps). */
/* Adam: arXiv 1412.6980 with bias correction (vd_adam in ops.h); clip_step does not apply to it. */
typedef struct vd_optimizer_config {
  enum vd_method method;
  enum vd_schedule schedule;
  double lr, min_lr, eps;
  double beta1, beta2; /* Adam */
  int64_t max_updates; /* cosine: the rate has fallen to min_lr by then */
  double clip_step;    /* 0: off. A tensor's step is scaled by clip_step / (|g| + 1e-10) where its gradient norm exceeds
                          it; the accumulator sees the gradient unscaled */
  double clip_norm;    /* 0: off. All gradients are scaled by clip_norm / (global norm + 1e-6) where that is below 1 */
  int64_t warmup_updates;
  double loss_scale;         /* the first one; 0: gradients are not scaled */
  int64_t loss_scale_window; /* updates without overflow after which it is doubled */
} vd_optimizer_config;

/* Where the scaling of losses stands. */
typedef struct vd_loss_scale {
  double scale;
  int64_t clean;   /* updates without overflow since it last changed */
  int64_t skipped; /* updates left out, in all */
} vd_loss_scale;

typedef struct vd_optimizer vd_optimizer;

/* Not collective. An optimiser for m, its state zeros in the backend's memory. m and ops must outlive it. VD_FAILED
 * when there is no memory. */
int vd_optimizer_create(vd_optimizer **o, const vd_optimizer_config *config, vd_model *m, vd_ops *ops, vd_error *err);
/* Not collective. NULL is allowed. */
void vd_optimizer_destroy(vd_optimizer *o);
/* Not collective. Learning rate of update u, counted from 0: with W = warmup_updates, lr * min(1, (u + 1) / W); with
 * VD_COSINE from update W on min_lr + (lr - min_lr) (1 + cos(pi (u - W) / (max_updates - W))) / 2, min_lr beyond
 * max_updates (arXiv 1608.03983, without restarts). */
double vd_optimizer_lr(const vd_optimizer *o, int64_t update);
/* What came of an update. */
typedef struct vd_update_stats {
  int64_t update;      /* as given to vd_optimizer_send */
  bool told;           /* the rest is known, though gradients may not be finite; else the backend failed */
  double nll;          /* vd_model_loss, this rank's; NaN where it was given up (vd_optimizer_skip_step) */
  double grad_norm;    /* global norm before any clip; NaN where the update was left out */
  double span_penalty; /* of the spans that it began with, as vd_model_span_penalty gives it */
} vd_update_stats;

/* Stream-ordered. One update of the model's parameters from its gradients, which are summed over the ranks already, so
 * that every rank does the same; then the spans are clamped to 0..1. What comes of it is for vd_optimizer_receive to
 * tell, once for each update, in their order; gradients that are not finite change nothing. At most
 * vd_optimizer_ahead() more may have been sent than were received. VD_FAILED without memory. */
int vd_optimizer_send(vd_optimizer *o, int64_t update, vd_error *err);
/* Not collective. Updates that may be under way when the next one is sent: 1 on a device beside the host; 0 on the CPU,
 * and where losses are scaled, since the next scale hangs on what came of the update. */
int vd_optimizer_ahead(const vd_optimizer *o);
/* Not collective. Updates that were sent and not received. */
int vd_optimizer_under_way(const vd_optimizer *o);
/* Not collective. Waits for the oldest update under way, fills *outcome and tells the model its spans. VD_FAILED where
 * a gradient was not finite, naming update (counted from 1, as in the log), layer and tensor; *outcome is filled then
 * too. */
int vd_optimizer_receive(vd_optimizer *o, vd_update_stats *outcome, vd_error *err);
/* Not collective. Both for one update, where none is under way: waits. */
int vd_optimizer_update(vd_optimizer *o, int64_t update, double *grad_norm, vd_error *err);
/* Not collective. What the gradients given to the next update are to be multiples of: of the loss times this, so that
 * small gradients are not lost in fp16. 1 where config->loss_scale is 0. Otherwise gradients that are not finite, or a
 * loss (vd_optimizer_skip_step), skip the update and halve it (VD_FAILED below 1e-4), and loss_scale_window updates
 * without any double it (Micikevicius et al., arXiv 1710.03740, section 3.2). */
double vd_optimizer_loss_scale(const vd_optimizer *o);
/* Not collective. Whether losses are scaled, and then how that stands: what a checkpoint keeps. */
bool vd_optimizer_scaling(const vd_optimizer *o, vd_loss_scale *scaling);
/* Not collective. The reverse; nothing where losses are not scaled. */
void vd_optimizer_set_scaling(vd_optimizer *o, const vd_loss_scale *scaling);
/* Not collective. The loss of the update to come is not finite: vd_optimizer_send will skip it, whatever the
 * gradients are. Only where losses are scaled. */
void vd_optimizer_skip_step(vd_optimizer *o);
/* Not collective. Number of state arenas (checkpoints store them). */
int vd_optimizer_n_state(const vd_optimizer *o);
/* Not collective. Name of state i: "adagrad_sum"; of Adam "adam_m" and "adam_v". */
const char *vd_optimizer_state_name(const vd_optimizer *o, int i);
/* Not collective. State i in the backend's memory, borrowed: vd_model_arena reals, extents as the parameters'. */
real *vd_optimizer_state(vd_optimizer *o, int i);

#endif
