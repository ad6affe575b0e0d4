#include "src/cpu/product.h"

#include "src/cpu/attention_tile.h"

#include <stdlib.h>
#include <string.h>

typedef real vd_vector __attribute__((vector_size(VD_VECTOR_BYTES), aligned(sizeof(real)), may_alias));

/* The tile of C that the micro-kernel holds in registers: ROWS x 2 vectors. */
#if defined(__AVX512F__)
enum { ROWS = 12 };
#else
enum { ROWS = 6 };
#endif
enum { COLUMNS = 2 * (int)VD_LANES };

static int64_t lesser(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* C [ROWS, COLUMNS] = A B or += A B. A's element (r, p) is a[r * a_row + p * a_col]; B is a panel [k, COLUMNS]. */
static inline __attribute__((always_inline)) void tile(int64_t k, const real *restrict a, int64_t a_row, int64_t a_col,
                                                       const real *restrict b, real *restrict c, int64_t ldc,
                                                       bool add) {
  vd_vector sum[ROWS][2];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < 2; v++) {
      sum[r][v] = (vd_vector){0};
      __builtin_prefetch(c + r * ldc + v * (COLUMNS - 1), 1); /* C is next needed after k steps */
    }
  for (int64_t p = 0; p < k; p++) {
    vd_vector b0 = *(const vd_vector *)(b + p * COLUMNS), b1 = *(const vd_vector *)(b + p * COLUMNS + VD_LANES);
    VD_KEEP(b0);
    VD_KEEP(b1);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      real x = a[r * a_row + p * a_col];
      sum[r][0] += x * b0;
      sum[r][1] += x * b1;
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < 2; v++) {
      vd_vector *to = (vd_vector *)(c + r * ldc + v * VD_LANES);
      if (add) sum[r][v] += *to;
      *to = sum[r][v];
    }
}

/* The two layouts of A: rows where they lie, and packed [k, ROWS]. */
static __attribute__((noinline)) void tile_of_rows(int64_t k, const real *a, int64_t lda, const real *b, real *c,
                                                   int64_t ldc, bool add) {
  tile(k, a, lda, 1, b, c, ldc, add);
}
static __attribute__((noinline)) void tile_packed(int64_t k, const real *a, const real *b, real *c, int64_t ldc,
                                                  bool add) {
  tile(k, a, 1, ROWS, b, c, ldc, add);
}

/* A tile of which only `rows` rows and `columns` columns exist. */
static void tile_edge(int64_t k, const real *a, const real *b, int64_t rows, int64_t columns, real *c, int64_t ldc,
                      bool add) {
  real whole[ROWS * COLUMNS];
  tile_packed(k, a, b, whole, COLUMNS, false);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < columns; j++)
      c[r * ldc + j] = add ? c[r * ldc + j] + whole[r * COLUMNS + j] : whole[r * COLUMNS + j];
}

/* Columns j .. j + COLUMNS - 1 of k rows of B, those beyond n zero. */
static void pack_panel(int64_t k, int64_t n, int64_t j, const real *b, int64_t ldb, bool transposed, real *to) {
  int64_t columns = lesser(COLUMNS, n - j);
  if (columns < COLUMNS) memset(to, 0, (size_t)(k * COLUMNS) * sizeof *to);
  if (transposed) {
    for (int64_t c = 0; c < columns; c++)
      for (int64_t p = 0; p < k; p++) to[p * COLUMNS + c] = b[(j + c) * ldb + p];
  } else if (columns == COLUMNS) {
    for (int64_t p = 0; p < k; p++) memcpy(to + p * COLUMNS, b + p * ldb + j, COLUMNS * sizeof *to);
  } else {
    for (int64_t p = 0; p < k; p++) memcpy(to + p * COLUMNS, b + p * ldb + j, (size_t)columns * sizeof *to);
  }
}

void vd_panels_new(vd_panels *panels, int64_t k, int64_t n, const real *b, int64_t ldb, bool transposed) {
  int64_t wide = vd_round_up(n, COLUMNS), count = wide / COLUMNS, blocks = (k + VD_PRODUCT_K - 1) / VD_PRODUCT_K;
  real *at = vd_aligned(k * wide);
  *panels = (vd_panels){k, n, at};
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < blocks * count; i++) {
    int64_t p = i / count * VD_PRODUCT_K, j = i % count * COLUMNS, rows = lesser(VD_PRODUCT_K, k - p);
    pack_panel(rows, n, j, transposed ? b + p : b + p * ldb, ldb, transposed, at + p * wide + j * rows);
  }
}

void vd_panels_free(vd_panels *panels) {
  free(panels->at);
}

/* The last rows of A, fewer than ROWS, as a packed tile [k, ROWS]. */
static void pack_rest(int64_t rows, int64_t k, const real *a, int64_t lda, real *to) {
  memset(to, 0, (size_t)(k * ROWS) * sizeof *to);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t p = 0; p < k; p++) to[p * ROWS + r] = a[r * lda + p];
}

void vd_product_rows(const vd_panels *b, int64_t m, const real *a, int64_t lda, real *c, int64_t ldc, bool add) {
  int64_t wide = vd_round_up(b->n, COLUMNS), whole = m / ROWS * ROWS;
  real rest[VD_PRODUCT_K * ROWS];
  for (int64_t p = 0; p < b->k; p += VD_PRODUCT_K) {
    int64_t k = lesser(VD_PRODUCT_K, b->k - p);
    bool more = add || p > 0;
    if (whole < m) pack_rest(m - whole, k, a + whole * lda + p, lda, rest);
    for (int64_t j = 0; j < b->n; j += COLUMNS) {
      const real *panel = b->at + p * wide + j * k;
      int64_t columns = lesser(COLUMNS, b->n - j);
      for (int64_t i = 0; i < whole; i += ROWS) {
        if (columns == COLUMNS) {
          tile_of_rows(k, a + i * lda + p, lda, panel, c + i * ldc + j, ldc, more);
          continue;
        }
        real packed[VD_PRODUCT_K * ROWS];
        pack_rest(ROWS, k, a + i * lda + p, lda, packed);
        tile_edge(k, packed, panel, ROWS, columns, c + i * ldc + j, ldc, more);
      }
      if (whole < m) tile_edge(k, rest, panel, m - whole, columns, c + whole * ldc + j, ldc, more);
    }
  }
}
