/* Matrix products by cuBLASLt, whose algorithm for each shape is chosen by timing, once a process; where the contracted
 * size is small, by our own kernel (cuda/kernels/rows_product.h). */
#ifndef VD_CUDA_GEMM_H
#define VD_CUDA_GEMM_H

#include "cuda/backend/context.h"

/* A product of matrices: C = alpha * op(A) op(B) + beta C for row-major matrices of n_batch problems. op(A) [m, k],
 * op(B) [k, n], C [m, n]. */
typedef struct vd_matrix {
  const void *p;
  int64_t ld, stride; /* elements of a row, of a problem */
  bool transposed;
} vd_matrix;
typedef struct vd_gemm_call {
  int64_t m, n, k, n_batch;
  vd_matrix a, b;
  void *c;
  int64_t ldc, c_stride;
  bool c_float; /* C is fp32, else of the activations' type */
  float alpha, beta;
  const void *bias; /* [n] of the activations' type, or NULL */
  bool relu;
  bool gradient; /* on the gradient stream */
} vd_gemm_call;
/* Stream-ordered. Enqueues the product; errors are recorded. The first call of a shape that goes to cuBLASLt times
 * several of its algorithms on the operands, and waits. */
void vd_cuda_gemm(vd_cuda_backend *c, const vd_gemm_call *x);
/* Stream-ordered. On the gradient stream, which has been forked: dweight [out, in] += dy^T x; dy [rows, out] of leading
 * dimension ld, x [rows, in]. */
void vd_cuda_weight_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                             const void *x, real *dweight);
/* Stream-ordered. The same on the main stream. */
void vd_cuda_main_weight_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                                  const void *x, real *dweight);
/* Stream-ordered. dx [rows, in] = dy weight, or += where accumulate; dy as above, weight [out, in]. */
void vd_cuda_input_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                            const real *weight, void *dx, bool accumulate);
/* Not collective. Frees the cache of algorithms and the handle. */
void vd_cuda_gemm_end(vd_cuda_backend *c);

#endif
