/* Optimisers with their state and schedule. */
#ifndef VD_OPTIMIZER_H
#define VD_OPTIMIZER_H

#include "model.h"

typedef struct vd_optimizer_config {
  double lr, eps, clip_step, clip_norm;
  int64_t warmup_updates;
} vd_optimizer_config;

typedef struct vd_optimizer vd_optimizer;

int vd_optimizer_create(vd_optimizer **o, const vd_optimizer_config *config, vd_model *m, vd_ops *ops, vd_error *err);
void vd_optimizer_destroy(vd_optimizer *o);
/* lr of update u, counted from 0: lr * min(1, (u + 1) / warmup_updates). */
double vd_optimizer_lr(const vd_optimizer *o, int64_t update);
/* Not collective: the gradients are already summed over ranks, so that every rank does the same. Updates the
 * parameters, clamps the spans. *grad_norm: global norm. A non-finite gradient changes nothing and is VD_FAILED naming
 * update, layer and tensor. */
int vd_optimizer_update(vd_optimizer *o, int64_t update, double *grad_norm, vd_error *err);
/* State arenas for checkpoints: name ("adagrad_sum"), same extents as the parameters. */
int vd_optimizer_n_state(const vd_optimizer *o);
const char *vd_optimizer_state_name(const vd_optimizer *o, int i);
real *vd_optimizer_state(vd_optimizer *o, int i);

#endif
