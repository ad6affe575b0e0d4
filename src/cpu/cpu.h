/* src/cpu is the CPU backend: it fills the table of src/ops/ops.h with OpenBLAS and OpenMP, in float and in double.
 *   cpu_ops.c    the table, memory and copies               dense.c     embedding, linear layers, layer norm, loss
 *   update.c     memories and optimiser steps               relative.c  position encodings, scaled dropout
 *   attention*.c attention by tiles, attention_tile.h       philox.c    dropout masks, 32 Philox counters at a time
 *   product.c    products of many rows with weights
 *   openblas_kernel.c  chooses OpenBLAS's kernel before main starts MPI
 * In: src/base and src/ops. Out: vd_ops_cpu (src/ops/ops.h) makes the backend; no other room calls the functions below
 * by name. A result depends neither on the number of threads nor on their timing: sums over rows run over columns in
 * parallel and over rows in order. The double build is the reference of the golden and CUDA tests.
 *
 * The prototypes below fill the members of vd_ops of the same names, which document shapes. attention.h has the
 * others. */
#ifndef VD_CPU_H
#define VD_CPU_H

#include "src/ops/ops.h"

/* Not collective. vd_ops.embed. */
void vd_cpu_embed(vd_ops *o, int64_t n, int64_t d, const int32_t *tokens, const real *weight, const vd_dropout *dropout,
                  vd_act *out);
/* Not collective. vd_ops.embed_backward. */
void vd_cpu_embed_backward(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                           const vd_dropout *dropout, vd_act *dout, real *dweight);
/* Not collective. vd_ops.linear. */
void vd_cpu_linear(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y);
/* Not collective. vd_ops.linear_backward. */
void vd_cpu_linear_backward(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                            vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                            real *dbefore);
/* Not collective. vd_ops.add_norm. */
void vd_cpu_add_norm(vd_ops *o, int64_t n, int64_t d, const vd_act *a, const vd_act *b, const vd_dropout *dropped,
                     const real *weight, const real *bias, vd_act *sum, real *mean, real *rstd, vd_act *y);
/* Not collective. vd_ops.add_norm_backward. */
void vd_cpu_add_norm_backward(vd_ops *o, int64_t n, int64_t d, const vd_act *sum, const real *mean, const real *rstd,
                              const real *weight, const vd_act *dy, vd_act *dsum, real *dweight, real *dbias,
                              real *dshift);
/* Not collective. vd_ops.cross_entropy. */
void vd_cpu_cross_entropy(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                          const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits);
/* Not collective. vd_ops.memory_push. */
void vd_cpu_memory_push(vd_ops *o, int64_t n_stream, int64_t d, const vd_act *old, int64_t rows_old, int64_t oldest,
                        const vd_act *hidden, int64_t block, vd_act *memory, int64_t rows_new);
/* Not collective. vd_ops.memory_ring_push. */
void vd_cpu_memory_ring_push(vd_ops *o, int64_t n_stream, int64_t d, int64_t stride, int64_t block, int n,
                             const vd_ring_push *push);
/* Not collective. vd_ops.square_sums. */
void vd_cpu_square_sums(vd_ops *o, const real *x, const vd_extent *extent, int n, double *norm2);
/* Not collective. vd_ops.gradient_norms. */
void vd_cpu_gradient_norms(vd_ops *o, const real *gradient, const vd_extent *extent, int n, int n_tensor,
                           double *norm2);
/* Not collective. vd_ops.gradient_stats. */
void vd_cpu_gradient_stats(vd_ops *o, int n_tensor, double scale, double clip_norm, double *grad_stats);
/* Not collective. vd_ops.adagrad. */
void vd_cpu_adagrad(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *extent, int n,
                    const double *grad_stats, double lr, double eps, double clip_step);
/* Not collective. vd_ops.adam. */
void vd_cpu_adam(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *extent, int n,
                 const double *grad_stats, const vd_adam *a);
/* Not collective. vd_ops.scale_dropout. */
void vd_cpu_scale_dropout(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout, const vd_act *x,
                          vd_act *y);
/* Not collective. vd_ops.position_encodings. */
void vd_cpu_position_encodings(vd_ops *o, const vd_position_encoding *e, vd_act *out);
/* Not collective. vd_ops.weight_gradient. */
void vd_cpu_weight_gradient(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                            real *dweight);

/* Not collective. Applies the dropout mask of row `row` (counted from dropout->row0; `width` elements a row, see
 * random.h) to x [width]; elements that are not dropped are scaled. */
void vd_cpu_dropout_row(const vd_dropout *dropout, int64_t row, int64_t width, real *x);

#endif
