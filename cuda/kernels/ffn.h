/* The two products of a feed-forward layer that produce hidden units or their gradient, with fused epilogues: bias,
 * ReLU and dropout forward; the derivative of both and the column sums for the bias backward. For 16-bit types and the
 * shapes that vd_cuda_ffn_supports accepts, arrays aligned to 16 bytes; other calls use cuBLASLt and elementwise
 * kernels. */
#ifndef VD_CUDA_FFN_H
#define VD_CUDA_FFN_H

#include "cuda/kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Not collective. True where the kernels support `width` hidden units and `d` contracted elements. */
bool vd_cuda_ffn_supports(enum vd_precision type, int64_t d, int64_t width);

/* Stream-ordered. out [n, width] = dropout(ReLU(x W^T + bias)); x [n, d], weight [width, d] of `type`, bias fp32. mask:
 * the dropout's, drawn before; NULL: the kernel draws it. */
cudaError_t vd_cuda_ffn(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *x, const void *weight,
                        const float *bias, const vd_dropout *dropout, const vd_unit_mask *mask, void *out,
                        cudaStream_t stream);

/* Not collective. Rows of partial sums that vd_cuda_ffn_backward writes. */
int64_t vd_cuda_ffn_partials(int64_t width);

/* Stream-ordered. dx [n, width] = y <= 0 ? 0 : scale * dy W; dy [n, d], weight [d, width], y [n, width]. partial
 * [vd_cuda_ffn_partials, width]: partial sums of dx's columns. */
cudaError_t vd_cuda_ffn_backward(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *dy,
                                 const void *weight, const void *y, float scale, void *dx, float *partial,
                                 cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
