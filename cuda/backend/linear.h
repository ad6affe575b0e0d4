/* The linear layers of vd_ops: products with bias, ReLU and dropout, by ffn.h's kernels where they support the shape,
 * else by cuBLASLt and elementwise kernels; and the gradient of the embedding, which is such a product. */
#ifndef VD_CUDA_LINEAR_H
#define VD_CUDA_LINEAR_H

#include "cuda/backend/context.h"

/* Not collective. vd_ops.draw_ahead: the next add_norm draws the dropout mask of hidden units where ffn.h's kernels
 * read it. */
void vd_cuda_draw_ahead(vd_ops *o, const vd_linear *l);
/* Stream-ordered. vd_ops.linear. */
void vd_cuda_linear(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y);
/* Stream-ordered. vd_ops.linear_backward. */
void vd_cuda_linear_backward(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                             vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                             real *dbefore);
/* Stream-ordered. vd_ops.embed_backward. */
void vd_cuda_embed_backward_op(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                               const vd_dropout *dropout, vd_act *dout, real *dweight);

#endif
