/* Weight-stationary products (weight_stationary.cuh): many rows, and a contracted size of 256 to 512, so that the
 * weights of 128 columns of results fit in shared memory. For 16-bit types. At d = 512 they are faster than cuBLASLt's
 * kernels. */
#ifndef VD_CUDA_ROWS_PRODUCT_H
#define VD_CUDA_ROWS_PRODUCT_H

#include "cuda/kernels/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* out [n, width] = x W^T with weight [width, d], or where `across` x W with weight [d, width]; x [n, d]. Rows of x and
 * of out are x_stride and out_stride elements apart; weight is contiguous. Device memory of `type`. */
typedef struct vd_rows_product {
  int64_t n, d, width;
  const void *x, *weight;
  int64_t x_stride;
  bool across;
  void *out;
  int64_t out_stride;
} vd_rows_product;

/* Not collective. Whether the kernel supports these shapes, and is worth it: at least 256 rows, d of 256 to 512 in
 * steps of 64, width up to 8192 in steps of 128, arrays and strides aligned to 16 bytes. */
bool vd_cuda_rows_product_supports(enum vd_precision type, const vd_rows_product *p);

/* Stream-ordered. Computes it. A row's result does not depend on the other rows, nor on their number. Returns
 * cudaErrorInvalidValue for what vd_cuda_rows_product_supports() refuses. */
cudaError_t vd_cuda_rows_product(enum vd_precision type, const vd_rows_product *p, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
