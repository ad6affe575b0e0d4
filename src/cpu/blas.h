/* The BLAS calls of the CPU backend, in the precision of `real`. */
#ifndef VD_CPU_BLAS_H
#define VD_CPU_BLAS_H

#include "src/base/real.h"

#include <cblas.h>
#include <stdint.h>

/* Not collective. C[m, n] = alpha op(A) op(B) + beta C, all row-major with leading dimensions lda, ldb, ldc; op(A) is
 * [m, k], op(B) [k, n]; a transposed operand is stored as [k, m] or [n, k]. Nothing is done where m or n is 0. */
static inline void vd_gemm(CBLAS_TRANSPOSE trans_a, CBLAS_TRANSPOSE trans_b, int64_t m, int64_t n, int64_t k,
                           double alpha, const real *a, int64_t lda, const real *b, int64_t ldb, double beta, real *c,
                           int64_t ldc) {
  if (m == 0 || n == 0) return;
#ifdef VD_DOUBLE
  cblas_dgemm(CblasRowMajor, trans_a, trans_b, (blasint)m, (blasint)n, (blasint)k, alpha, a, (blasint)lda, b,
              (blasint)ldb, beta, c, (blasint)ldc);
#else
  cblas_sgemm(CblasRowMajor, trans_a, trans_b, (blasint)m, (blasint)n, (blasint)k, (real)alpha, a, (blasint)lda, b,
              (blasint)ldb, (real)beta, c, (blasint)ldc);
#endif
}

#endif
