/* The ops of Transformer-XL other than attention, and the projections of its memory rows. */
#ifndef VD_CUDA_TRANSFORMER_XL_OPS_H
#define VD_CUDA_TRANSFORMER_XL_OPS_H

#include "cuda/backend/context.h"

/* Stream-ordered. vd_ops.scale_dropout. */
void vd_cuda_scale_dropout_op(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout,
                              const vd_act *x, vd_act *y);
/* Stream-ordered. vd_ops.position_encodings. */
void vd_cuda_position_encodings_op(vd_ops *o, const vd_position_encoding *e, vd_act *out);
/* Stream-ordered. vd_ops.weight_gradient. */
void vd_cuda_weight_gradient_op(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                                real *dweight);
/* Stream-ordered. Projects memory rows to keys and values where there are relative keys: all heads then reach the same
 * rows. memory as in vd_qkv; weight: those of keys and of values. */
void vd_cuda_relative_project(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                              const real *const weight[2], const vd_qkv *qkv);
/* Stream-ordered. On the gradient stream, which is `stream` and has been forked: dweight[0], dweight[1] += gradients of
 * the weights of keys and of values from memory rows. Zeroes the rows of dmemory that are out of reach. */
void vd_cuda_relative_project_backward(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                                       vd_act *dmemory, real *const dweight[2], cudaStream_t stream);

#endif
