/* Dense products with many rows, C = A B: B is packed once, rows of A are read where they lie, and a micro-kernel holds
 * a tile of C in registers. A caller can finish a block of rows of C while it is in the cache, which a BLAS call does
 * not allow. An element of C depends on its row of A and its column of B alone, not on the number of rows, threads or
 * blocks: sums run over p in ascending order, in blocks of VD_PRODUCT_K. */
#ifndef VD_CPU_PRODUCT_H
#define VD_CPU_PRODUCT_H

#include "src/base/real.h"

#include <stdbool.h>
#include <stdint.h>

enum {
  VD_PRODUCT_K = 256,    /* rows of a panel of B that stay in the first-level cache */
  VD_PRODUCT_BLOCK = 48, /* rows of C that a thread computes at once: a multiple of the micro-kernel's rows */
  VD_PRODUCT_FEW = 128 /* with fewer rows, packing B would take longer than the product: OpenBLAS then serves better */
};

/* B [k, n] as panels of a few columns, blocks of VD_PRODUCT_K rows after one another. */
typedef struct vd_panels {
  int64_t k, n;
  real *at; /* owned */
} vd_panels;

/* Not collective. Packs B [k, n], of which element (p, j) is b[p * ldb + j], or b[j * ldb + p] where `transposed`.
 * vd_bug where there is no memory. Free with vd_panels_free. */
void vd_panels_new(vd_panels *panels, int64_t k, int64_t n, const real *b, int64_t ldb, bool transposed);

/* Not collective. Frees what the panels own. */
void vd_panels_free(vd_panels *panels);

/* Not collective. C [m, n] = A B, or += where `add`: A [m, k] and C have contiguous rows of leading dimensions lda and
 * ldc. Runs on the calling thread. */
void vd_product_rows(const vd_panels *b, int64_t m, const real *a, int64_t lda, real *c, int64_t ldc, bool add);

#endif
