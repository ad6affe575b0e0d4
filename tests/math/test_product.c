/* Dense products by panels: against plain sums, at shapes that cut tiles, panels and blocks; whole linear layers of
 * many rows against the same layers of few rows, which take another way. */
#include "src/base/random.h"
#include "src/cpu/cpu.h"
#include "src/cpu/product.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const double TOLERANCE = 1e-12;

/* Caller frees. Uniform in +-1, other numbers for every `salt`. */
static real *noise(int64_t n, uint64_t salt) {
  real *x = vd_calloc((size_t)n, sizeof *x);
  for (int64_t i = 0; i < n; i++) x[i] = 2 * vd_uniform(vd_philox((vd_rng){.seed = salt}, (uint64_t)i).v[1]) - 1;
  return x;
}

/* Leading dimensions exceed the widths, and nothing beyond the widths is written. */
static void check_product(int64_t m, int64_t n, int64_t k, bool transposed, bool add) {
  int64_t lda = k + 3, ldb = (transposed ? k : n) + 5, ldc = n + 2;
  real *a = noise(m * lda, 1), *b = noise((transposed ? n : k) * ldb, 2), *c = noise(m * ldc, 3);
  real *before = noise(m * ldc, 3);
  vd_panels panels;
  vd_panels_new(&panels, k, n, b, ldb, transposed);
  vd_product_rows(&panels, m, a, lda, c, ldc, add);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < ldc; j++) {
      double sum = j >= n || add ? before[i * ldc + j] : 0;
      for (int64_t p = 0; p < k && j < n; p++) sum += a[i * lda + p] * (transposed ? b[j * ldb + p] : b[p * ldb + j]);
      if (!(fabs((double)c[i * ldc + j] - sum) <= TOLERANCE * (double)k))
        fail_msg("m %d n %d k %d, element %d %d: %.17g, not %.17g", (int)m, (int)n, (int)k, (int)i, (int)j,
                 c[i * ldc + j], sum);
    }
  vd_panels_free(&panels);
  free(before);
  free(c);
  free(b);
  free(a);
}

static void test_shapes(void **state) {
  (void)state;
  const int64_t rows[] = {1, 12, 31, VD_PRODUCT_BLOCK}, columns[] = {1, 16, 37}, depth[] = {1, 256, 300, 513};
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
    for (size_t j = 0; j < sizeof columns / sizeof *columns; j++)
      for (size_t p = 0; p < sizeof depth / sizeof *depth; p++)
        for (int kind = 0; kind < 4; kind++) check_product(rows[i], columns[j], depth[p], kind & 1, kind & 2);
}

/* A row's result depends on the row alone. */
static void test_rows_are_independent(void **state) {
  (void)state;
  enum { M = 41, N = 29, K = 270 };
  real *a = noise(M * K, 1), *b = noise(N * K, 2), *all = noise(M * N, 3), *one = noise(N, 4);
  vd_panels panels;
  vd_panels_new(&panels, K, N, b, K, true);
  vd_product_rows(&panels, M, a, K, all, N, false);
  for (int64_t i = 0; i < M; i++) {
    vd_product_rows(&panels, 1, a + i * K, K, one, N, false);
    assert_memory_equal(one, all + i * N, N * sizeof *one);
  }
  vd_panels_free(&panels);
  free(one);
  free(all);
  free(b);
  free(a);
}

/* y and the gradients of rows first .. first + n - 1 of x and dy. */
struct layer {
  real *y, *dx, *dweight, *dbias, *dbefore;
};

enum { IN = 21, OUT = 35, N = VD_PRODUCT_FEW + 77 };

static void run_layer(vd_ops *o, int64_t first, int64_t n, const struct layer *to) {
  vd_linear l = {.n = n, .in = IN, .out = OUT, .relu = true, .dropout = {.p = 0.25, .row0 = first}};
  vd_linear before = {.n = n, .in = OUT, .out = IN, .relu = true};
  real *x = noise(N * IN, 1), *weight = noise(IN * OUT, 2), *bias = noise(OUT, 3), *dy = noise(N * OUT, 4);
  for (int64_t i = 0; i < N * IN; i++) x[i] = x[i] < 0 ? 0 : x[i]; /* the output of the layer before */
  vd_cpu_linear(o, &l, x + first * IN, weight, bias, to->y + first * OUT);
  vd_cpu_linear_backward(o, &l, x + first * IN, weight, dy + first * OUT, to->dx + first * IN, false, to->dweight,
                         to->dbias, &before, to->dbefore);
  free(dy);
  free(bias);
  free(weight);
  free(x);
}

static struct layer layer_new(void) {
  return (struct layer){vd_calloc(N * OUT, sizeof(real)), vd_calloc(N * IN, sizeof(real)),
                        vd_calloc(IN * OUT, sizeof(real)), vd_calloc(OUT, sizeof(real)), vd_calloc(IN, sizeof(real))};
}
static void layer_free(const struct layer *l) {
  real *const parts[] = {l->y, l->dx, l->dweight, l->dbias, l->dbefore};
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) free(parts[i]);
}

static void assert_near(const char *what, const real *a, const real *b, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (!(fabs((double)a[i] - (double)b[i]) <= 1e-10)) fail_msg("%s %d: %.17g, not %.17g", what, (int)i, a[i], b[i]);
}

static void test_many_rows_as_few(void **state) {
  (void)state;
  vd_ops *o;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  struct layer many = layer_new(), few = layer_new();
  run_layer(o, 0, N, &many);
  for (int64_t r = 0; r < N; r += 50) run_layer(o, r, N - r < 50 ? N - r : 50, &few);
  assert_near("y", many.y, few.y, N * OUT);
  assert_near("dx", many.dx, few.dx, N * IN);
  assert_near("dweight", many.dweight, few.dweight, IN * OUT);
  assert_near("dbias", many.dbias, few.dbias, OUT);
  assert_near("dbefore", many.dbefore, few.dbefore, IN);
  layer_free(&few);
  layer_free(&many);
  o->destroy(o);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_shapes), cmocka_unit_test(test_rows_are_independent),
                                     cmocka_unit_test(test_many_rows_as_few)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
