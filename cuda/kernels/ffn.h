/* The two products whose results are hidden units of a feed-forward layer, with what else happens to these: bias, ReLU
 * and dropout on the way out; on the way back the derivative of both and the sums for the bias. In 16 bits and for
 * shapes that a block can hold the weights of; other calls go through cuBLASLt and passes of their own. */
#ifndef VD_CUDA_HIDDEN_H
#define VD_CUDA_HIDDEN_H

#include "cuda/kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Not collective. Are there kernels for `width` hidden units and `d` inputs or gradients that each is made of? */
bool vd_cuda_ffn_supports(enum vd_precision type, int64_t d, int64_t width);

/* Stream-ordered. out [n, width] = dropout(ReLU(x W^T + bias)); x [n, d], weight [width, d] of `type`, bias fp32. */
cudaError_t vd_cuda_ffn(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *x, const void *weight,
                        const float *bias, const vd_dropout *dropout, void *out, cudaStream_t stream);

/* Not collective. Rows of partial sums that vd_cuda_ffn_backward leaves. */
int64_t vd_cuda_ffn_partials(int64_t width);

/* Stream-ordered. dx [n, width] = y <= 0 ? 0 : scale * dy W; dy [n, d], weight [d, width], y [n, width]. partial
 * [vd_cuda_ffn_partials, width]: sums over rows of dx, which together are its columns' sums. */
cudaError_t vd_cuda_ffn_backward(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *dy,
                                 const void *weight, const void *y, float scale, void *dx, float *partial,
                                 cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
