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
  int64_t max_updates; /* cosine: the update at which the rate reaches min_lr */
  double clip_step;    /* 0: off. A tensor's step is scaled by clip_step / (|g| + 1e-10) where its gradient norm exceeds
                          it; the accumulator sees the gradient unscaled */
  double clip_norm;    /* 0: off. All gradients are scaled by clip_norm / (global norm + 1e-6) where that is below 1 */
  int64_t warmup_updates;
  double loss_scale;         /* the first one; 0: gradients are not scaled */
  int64_t loss_scale_window; /* updates without overflow after which it is doubled */
} vd_optimizer_config;

/* State of the loss scale. */
typedef struct vd_loss_scale {
  double scale;
  int64_t clean;   /* updates without overflow since it last changed */
  int64_t skipped; /* skipped steps in all */
} vd_loss_scale;

/* What one rank steps where the optimizer is sharded over ranks. Extents are sorted by tensor. */
typedef struct vd_optimizer_shard {
  int n_step, n_norm;
  const vd_extent *step; /* [n_step] host: the parameters that this rank steps */
  const vd_extent *norm; /* [n_norm] host: the gradients whose squares it sums; each gradient is in one rank's list */
  void *receiver;        /* first argument of both: */
  /* Stream-ordered, collective. Sums norm2 [n], in the backend's memory, over the ranks, in place. */
  void (*all_reduce_norms)(void *receiver, double *norm2, int n);
  /* Stream-ordered, collective. The step of this rank's parameters is enqueued: gathers those of the other ranks. */
  void (*all_gather_weights)(void *receiver);
} vd_optimizer_shard;

typedef struct vd_optimizer vd_optimizer;

/* Not collective. An optimiser for m, its state zeros in the backend's memory. m and ops must outlive it. VD_FAILED
 * when there is no memory. */
int vd_optimizer_create(vd_optimizer **o, const vd_optimizer_config *config, vd_model *m, vd_ops *ops, vd_error *err);
/* Not collective. From now on steps are sharded over the ranks: each step is collective, in the order of calls, over
 * those that the shard's functions know. Copies the extents; the receiver must outlive o. */
void vd_optimizer_set_shard(vd_optimizer *o, const vd_optimizer_shard *shard);
/* Not collective. NULL is allowed. */
void vd_optimizer_destroy(vd_optimizer *o);
/* Not collective. Learning rate of update u, counted from 0: with W = warmup_updates, lr * min(1, (u + 1) / W); with
 * VD_COSINE from update W on min_lr + (lr - min_lr) (1 + cos(pi (u - W) / (max_updates - W))) / 2, min_lr beyond
 * max_updates (arXiv 1608.03983, without restarts). */
double vd_optimizer_lr(const vd_optimizer *o, int64_t update);
/* Stream-ordered. Also collective where the steps are sharded. One update of the model's parameters from its gradients,
 * which are `loss_scale` times those of the loss and already summed over the ranks; then clamps the spans to 0..1.
 * `update` counts from 0. Writes the gradient statistics to vd_optimizer_grad_stats; where a gradient is not finite
 * neither parameters nor state change. */
void vd_optimizer_step(vd_optimizer *o, int64_t update, double loss_scale);
/* Not collective. In the backend's memory: the gradient statistics of the last step, double [VD_STATS_TENSORS +
 * vd_model_n_param] (src/ops/update_stats.h). Borrowed. */
const double *vd_optimizer_grad_stats(const vd_optimizer *o);
/* Not collective. Reads the first VD_STATS_TENSORS statistics of an update, in host memory: *grad_norm becomes the
 * global norm before any clip (NaN where a gradient is not finite), and the loss scale follows (vd_loss_scale_next).
 * loss_scale: as given to the step. VD_FAILED where a gradient is not finite and losses are not scaled, or the loss
 * scale falls below 1e-4; names update (counted from 1, as in the log), layer and tensor. */
int vd_optimizer_check(vd_optimizer *o, int64_t update, double loss_scale, const double *grad_stats, double *grad_norm,
                       vd_error *err);
/* Not collective. An update whose step is skipped because its loss is not finite: halves the loss scale. VD_FAILED
 * where that falls below 1e-4. Only where losses are scaled. */
int vd_optimizer_check_skipped(vd_optimizer *o, int64_t update, vd_error *err);
/* Not collective. A step, a wait for its statistics and their check, for programs that schedule updates one by one. */
int vd_optimizer_update(vd_optimizer *o, int64_t update, double *grad_norm, vd_error *err);
/* Not collective. The factor by which to multiply the loss of the next update, so that small gradients are not lost in
 * fp16 (Micikevicius et al., arXiv 1710.03740, section 3.2); 1 where config->loss_scale is 0. */
double vd_optimizer_loss_scale(const vd_optimizer *o);
/* Not collective. The loss scale after an update: overflow (a loss or a gradient that is not finite) halves it and
 * counts a skipped step; `window` updates without one double it. */
vd_loss_scale vd_loss_scale_next(vd_loss_scale before, int64_t window, bool overflow);
/* Not collective. True where losses are scaled. *scaling: the state of the loss scale, which checkpoints store. */
bool vd_optimizer_scaling(const vd_optimizer *o, vd_loss_scale *scaling);
/* Not collective. The reverse; does nothing where losses are not scaled. */
void vd_optimizer_set_scaling(vd_optimizer *o, const vd_loss_scale *scaling);
/* Not collective. Number of state arenas (checkpoints store them). */
int vd_optimizer_n_state(const vd_optimizer *o);
/* Not collective. Name of state i: "adagrad_sum"; of Adam "adam_m" and "adam_v". */
const char *vd_optimizer_state_name(const vd_optimizer *o, int i);
/* Not collective. State i in the backend's memory, borrowed: vd_model_arena reals, extents as the parameters'. Where
 * the steps are sharded only the extents that this rank steps are up to date. */
real *vd_optimizer_state(vd_optimizer *o, int i);

#endif
