/* Gradient statistics and optimiser steps of vd_ops. */
#ifndef VD_CUDA_OPTIMIZER_OPS_H
#define VD_CUDA_OPTIMIZER_OPS_H

#include "cuda/backend/context.h"

/* Stream-ordered. vd_ops.square_sums. */
void vd_cuda_square_sums_op(vd_ops *o, const real *x, const vd_extent *extent, int n, double *norm2);
/* Stream-ordered. vd_ops.gradient_norms. */
void vd_cuda_gradient_norms_op(vd_ops *o, const real *gradient, const vd_extent *extent, int n, int n_tensor,
                               double *norm2);
/* Stream-ordered. vd_ops.gradient_stats. */
void vd_cuda_gradient_stats_op(vd_ops *o, int n_tensor, double scale, double clip_norm, double *grad_stats);
/* Stream-ordered. vd_ops.adagrad. */
void vd_cuda_adagrad_op(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *extent, int n,
                        const double *grad_stats, double lr, double eps, double clip_step);
/* Stream-ordered. vd_ops.adam. */
void vd_cuda_adam_op(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *extent, int n,
                     const double *grad_stats, const vd_adam *a);
/* Not collective. Frees the tables of pieces. */
void vd_cuda_optimizer_end(vd_cuda_backend *c);

#endif
