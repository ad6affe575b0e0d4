/* The CPU backend's simple operations: backward passes against central finite differences, in double, and known values.
 */
#include "src/ops/ops.h"
#include "tests/math/golden.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const double STEP = 1e-6, TOLERANCE = 1e-6;

static vd_ops *ops(void) {
  vd_ops *o;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  return o;
}

/* Caller frees. Uniform in +-1, other numbers for every `salt`. */
static real *noise(size_t n, uint64_t salt) {
  real *x = vd_calloc(n, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = 2 * vd_uniform(vd_philox((vd_rng){.seed = salt}, i).v[1]) - 1;
  return x;
}

/* A scalar function of x and whatever is in `with`. */
typedef double function(const real *x, void *with);

static void check_gradient(const char *what, function *f, real *x, size_t n, const real *gradient, void *with) {
  double error = 0, size = 0;
  for (size_t i = 0; i < n; i++) {
    real kept = x[i];
    x[i] = kept + STEP;
    double above = f(x, with);
    x[i] = kept - STEP;
    double below = f(x, with);
    x[i] = kept;
    double numeric = (above - below) / (2 * STEP);
    error += (numeric - gradient[i]) * (numeric - gradient[i]);
    size += gradient[i] * gradient[i];
  }
  assert_true(size > 0);
  if (!(sqrt(error) <= TOLERANCE * sqrt(size))) fail_msg("%s: off by %.2e of %.2e", what, sqrt(error), sqrt(size));
}

static double dot(const real *a, const real *b, size_t n) {
  double sum = 0;
  for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* y = second(first(x)). */
struct linear_case {
  vd_ops *o;
  vd_linear first, second;
  real *x, *weight[2], *bias[2], *hidden, *y, *dy;
};

static double linear_value(const real *unused, void *with) {
  struct linear_case *c = with;
  (void)unused; /* the perturbed element is one of x, weight, bias */
  c->o->linear(c->o, &c->first, c->x, c->weight[0], c->bias[0], c->hidden);
  c->o->linear(c->o, &c->second, c->hidden, c->weight[1], c->bias[1], c->y);
  return dot(c->y, c->dy, (size_t)(c->second.n * c->second.out));
}

static void linear_gradients(bool relu, double p) {
  enum { N = 7, IN = 5, HIDDEN = 11, OUT = 6 };
  struct linear_case c = {.o = ops(),
                          .first = {.n = N,
                                    .in = IN,
                                    .out = HIDDEN,
                                    .relu = relu,
                                    .dropout = {p, {.seed = 3, .update = 4, .layer = 1, .site = VD_SITE_HIDDEN}, 21}},
                          .second = {.n = N, .in = HIDDEN, .out = OUT},
                          .x = noise(N * IN, 1),
                          .weight = {noise(IN * HIDDEN, 2), noise(HIDDEN * OUT, 7)},
                          .bias = {noise(HIDDEN, 3), noise(OUT, 8)},
                          .hidden = noise(N * HIDDEN, 4),
                          .y = noise(N * OUT, 9),
                          .dy = noise(N * OUT, 5)};
  real *dx = noise(N * IN, 6), before[N * IN], dhidden[N * HIDDEN];
  real dw[2][HIDDEN * (IN > OUT ? IN : OUT)] = {0}, db[2][HIDDEN] = {0};
  memcpy(before, dx, sizeof before);
  linear_value(NULL, &c);
  c.o->linear_backward(c.o, &c.second, c.hidden, c.weight[1], c.dy, dhidden, false, dw[1], db[1],
                       relu ? &c.first : NULL, db[0]);
  c.o->linear_backward(c.o, &c.first, c.x, c.weight[0], dhidden, dx, true, dw[0], relu ? NULL : db[0], NULL, NULL);
  for (int i = 0; i < N * IN; i++) dx[i] -= before[i];
  check_gradient("x", linear_value, c.x, N * IN, dx, &c);
  for (int i = 0; i < 2; i++) {
    check_gradient("weight", linear_value, c.weight[i], i == 0 ? IN * HIDDEN : HIDDEN * OUT, dw[i], &c);
    check_gradient("bias", linear_value, c.bias[i], i == 0 ? HIDDEN : OUT, db[i], &c);
  }
  for (int i = 0; i < 2; i++) free(c.weight[i]), free(c.bias[i]);
  free(c.x), free(c.hidden), free(c.y), free(c.dy), free(dx);
  c.o->destroy(c.o);
}
static void linear_plain(void **state) {
  (void)state;
  linear_gradients(false, 0);
}
static void linear_relu_dropout(void **state) {
  (void)state;
  linear_gradients(true, 0.3);
}

struct norm_case {
  vd_ops *o;
  int64_t n, d;
  real *a, *b, *weight, *bias, *sum, *mean, *rstd, *y, *dy;
  vd_dropout dropped;
};

static double norm_value(const real *unused, void *with) {
  struct norm_case *c = with;
  (void)unused;
  c->o->add_norm(c->o, c->n, c->d, c->a, c->b, &c->dropped, c->weight, c->bias, c->sum, c->mean, c->rstd, c->y);
  return dot(c->y, c->dy, (size_t)(c->n * c->d));
}

/* With dropout of b: what scale_dropout of b gives, in every bit, and the same of dsum is the gradient of b. */
static void norm_drops(struct norm_case *c, real *dsum, real *dweight, real *dbias) {
  size_t nd = (size_t)(c->n * c->d);
  real *y = noise(nd, 11), *b = noise(nd, 12);
  c->dropped = (vd_dropout){.p = 0.4, .rng = {3, 4, 5, VD_SITE_ATTENDED}, .row0 = 77};
  norm_value(NULL, c);
  c->o->scale_dropout(c->o, c->n, c->d, 1, &c->dropped, c->b, b);
  c->o->add_norm(c->o, c->n, c->d, c->a, b, NULL, c->weight, c->bias, c->sum, c->mean, c->rstd, y);
  assert_memory_equal(y, c->y, nd * sizeof *y);
  c->o->add_norm_backward(c->o, c->n, c->d, c->sum, c->mean, c->rstd, c->weight, c->dy, dsum, dweight, dbias, NULL);
  check_gradient("a", norm_value, c->a, nd, dsum, c);
  c->o->scale_dropout(c->o, c->n, c->d, 1, &c->dropped, dsum, dsum);
  check_gradient("b", norm_value, c->b, nd, dsum, c);
  free(y), free(b);
}

static void add_norm_gradients(void **state) {
  (void)state;
  int64_t n = 5, d = 70; /* more than one column block */
  size_t nd = (size_t)(n * d), row = (size_t)d;
  struct norm_case c = {ops(),
                        n,
                        d,
                        noise(nd, 1),
                        noise(nd, 2),
                        noise(row, 3),
                        noise(row, 4),
                        noise(nd, 5),
                        noise((size_t)n, 6),
                        noise((size_t)n, 7),
                        noise(nd, 8),
                        noise(nd, 9),
                        {.p = 0}};
  real *dsum = noise(nd, 10), *dw = vd_calloc(row, sizeof *dw), *db = vd_calloc(row, sizeof *db);
  norm_value(NULL, &c);
  for (int64_t r = 0; r < n; r++) { /* normed rows have mean 0 and variance 1 */
    double mean = 0, square = 0;
    for (int64_t i = 0; i < d; i++) {
      double xhat = (c.y[r * d + i] - c.bias[i]) / c.weight[i];
      mean += xhat / (double)d;
      square += xhat * xhat / (double)d;
    }
    assert_true(fabs(mean) < 1e-10 && fabs(square - 1) < 1e-3);
  }
  real *shift = vd_calloc(row, sizeof *shift);
  c.o->add_norm_backward(c.o, n, d, c.sum, c.mean, c.rstd, c.weight, c.dy, dsum, dw, db, shift);
  for (int64_t i = 0; i < d; i++) {
    double total = 0;
    for (int64_t r = 0; r < n; r++) total += dsum[r * d + i];
    assert_true(fabs(total - shift[i]) < 1e-12);
  }
  check_gradient("a", norm_value, c.a, nd, dsum, &c);
  check_gradient("b", norm_value, c.b, nd, dsum, &c);
  check_gradient("weight", norm_value, c.weight, row, dw, &c);
  check_gradient("bias", norm_value, c.bias, row, db, &c);
  norm_drops(&c, dsum, dw, db);
  real *mine[] = {c.a, c.b, c.weight, c.bias, c.sum, c.mean, c.rstd, c.y, c.dy, dsum, dw, db, shift};
  for (size_t i = 0; i < sizeof mine / sizeof *mine; i++) free(mine[i]);
  c.o->destroy(c.o);
}

struct entropy_case {
  vd_ops *o;
  int64_t n, vocab, stride;
  const int32_t *targets;
  double scale;
};

static double entropy_value(const real *x, void *with) {
  struct entropy_case *c = with;
  double loss = 0;
  c->o->cross_entropy(c->o, c->n, c->vocab, c->stride, x, c->targets, c->scale, &loss, NULL, NULL);
  return loss * c->scale;
}

static void cross_entropy_gradients(void **state) {
  (void)state;
  int32_t targets[4] = {2, -1, 0, 6};
  struct entropy_case c = {ops(), 4, 7, 9, targets, 0.125};
  real *logits = noise(36, 1), *gradient = noise(36, 2), nll[4];
  double loss = 0, sum = 0;
  c.o->cross_entropy(c.o, 4, 7, 9, logits, targets, c.scale, &loss, nll, gradient);
  for (int r = 0; r < 4; r++) sum += nll[r];
  assert_true(nll[1] == 0 && fabs(sum - loss) < 1e-14);
  check_gradient("logits", entropy_value, logits, 36, gradient, &c); /* 0 beyond the vocabulary */
  real flat[7] = {5, 5, 5, 5, 5, 5, 5};
  loss = 0;
  c.o->cross_entropy(c.o, 1, 7, 7, flat, targets, 1, &loss, NULL, NULL);
  assert_true(fabs(loss - log(7)) < 1e-14);
  free(logits), free(gradient);
  c.o->destroy(c.o);
}

struct embed_case {
  vd_ops *o;
  const int32_t *tokens;
  vd_dropout dropout;
  real *y, *dy;
};

static double embed_value(const real *weight, void *with) {
  struct embed_case *c = with;
  c->o->embed(c->o, 6, 10, c->tokens, weight, &c->dropout, c->y);
  return dot(c->y, c->dy, 60);
}

static void embed_gradients(void **state) {
  (void)state;
  int32_t tokens[6] = {3, 0, 3, 2, 0, 3};
  struct embed_case c = {ops(), tokens, {0.25, {.seed = 5, .site = VD_SITE_EMBED}, 17}, noise(60, 1), noise(60, 2)};
  real *weight = noise(40, 3), *gradient = vd_calloc(40, sizeof *gradient), *dy = vd_calloc(60, sizeof *dy);
  memcpy(dy, c.dy, 60 * sizeof *dy);
  c.o->embed_backward(c.o, 6, 10, 4, tokens, &c.dropout, dy, gradient);
  check_gradient("weight", embed_value, weight, 40, gradient, &c);
  free(c.y), free(c.dy), free(weight), free(gradient), free(dy);
  c.o->destroy(c.o);
}

/* Dropout: the mask of a row does not depend on how rows are grouped; the share kept is 1 - p; kept values are scaled.
 */
static void dropout_mask(void **state) {
  (void)state;
  vd_ops *o = ops();
  enum { N = 400, D = 52 };
  int32_t *tokens = vd_calloc(N, sizeof *tokens);
  real *ones = vd_calloc(D, sizeof *ones), *all = vd_calloc(N * D, sizeof *all), *part = vd_calloc(N * D, sizeof *part);
  for (int i = 0; i < D; i++) ones[i] = 1;
  vd_dropout drop = {0.3, {.seed = 8, .update = 2, .layer = 0, .site = VD_SITE_EMBED}, 100};
  o->embed(o, N, D, tokens, ones, &drop, all);
  for (int r = 0; r < N; r += 40) {
    vd_dropout some = drop;
    some.row0 += r;
    o->embed(o, 40, D, tokens, ones, &some, part + r * D);
  }
  assert_memory_equal(all, part, sizeof(real) * N * D);
  double kept = 0, scale = 65536.0 / (65536.0 - 19661.0);
  for (int i = 0; i < N * D; i++) {
    assert_true(all[i] == 0 || fabs(all[i] - scale) < 1e-15);
    kept += all[i] != 0;
  }
  assert_true(fabs(kept / (N * D) - 0.7) < 4 * sqrt(0.21 / (N * D)));
  free(tokens), free(ones), free(all), free(part);
  o->destroy(o);
}

/* Of two tensors. */
static void statistics(vd_ops *o, const real *g, const vd_extent *t, double scale, double clip_norm,
                       double *grad_stats) {
  o->gradient_norms(o, g, t, 2, 2, grad_stats + VD_STATS_TENSORS);
  o->gradient_stats(o, 2, scale, clip_norm, grad_stats);
}

static void adagrad_step(void **state) {
  (void)state;
  vd_ops *o = ops();
  real p[4] = {1, 2, 3, 4}, g[4] = {6, 8, 0.02, 0}, acc[4] = {0, 0, 1, 0};
  const vd_extent t[2] = {{0, 2, 0}, {2, 2, 1}};
  double grad_stats[VD_STATS_TENSORS + 2];
  statistics(o, g, t, 0.5, 0, grad_stats);
  assert_true(fabs(grad_stats[VD_STATS_NORM2] - 100.0004) < 1e-12 && grad_stats[VD_STATS_SCALE] == 0.5 &&
              grad_stats[VD_STATS_NONFINITE] == -1);
  assert_true(fabs(grad_stats[VD_STATS_TENSORS] - 25) < 1e-12 && fabs(grad_stats[VD_STATS_TENSORS + 1] - 1e-4) < 1e-15);
  o->adagrad(o, p, g, acc, t, 2, grad_stats, 0.1, 1e-10, 0.03);
  assert_true(acc[0] == 9 && acc[1] == 16 && fabs(acc[2] - 1.0001) < 1e-15 && acc[3] == 0);
  double clipped = 0.1 * 0.03 / (5 + 1e-10);
  assert_true(fabs(p[0] - (1 - clipped)) < 1e-12 && fabs(p[1] - (2 - clipped)) < 1e-12);
  assert_true(fabs(p[2] - (3 - 0.1 * 0.01 / sqrt(1.0001))) < 1e-12 && p[3] == 4);
  double sums[2];
  o->square_sums(o, g, t, 2, sums);
  assert_true(fabs(sums[0] - 100) < 1e-12 && fabs(sums[1] - 4e-4) < 1e-15);
  real z[3] = {-0.5, 0.5, 1.5};
  o->clamp01(o, z, 3);
  assert_true(z[0] == 0 && z[1] == 0.5 && z[2] == 1);
  o->destroy(o);
}

/* The clip of the global norm, and gradients that are not finite, which change nothing. */
static void measures_gradients(void **state) {
  (void)state;
  vd_ops *o = ops();
  real p[4] = {1, 2, 3, 4}, g[4] = {6, 8, 0, 0}, acc[4] = {0}, m[4] = {0};
  const vd_extent t[2] = {{0, 2, 0}, {2, 2, 1}};
  vd_adam adam = {0.1, 0.9, 0.999, 1e-8, 1};
  double grad_stats[VD_STATS_TENSORS + 2];
  statistics(o, g, t, 0.5, 2, grad_stats); /* norm 5 */
  assert_true(fabs(grad_stats[VD_STATS_SCALE] - 0.5 * 2 / (5 + 1e-6)) < 1e-15);
  assert_true(fabs(grad_stats[VD_STATS_TENSORS] - 4) < 1e-5 && grad_stats[VD_STATS_TENSORS + 1] == 0);
  statistics(o, g, t, 0.5, 10, grad_stats);
  assert_true(grad_stats[VD_STATS_SCALE] == 0.5);
  for (int bad = 0; bad < 4; bad += 3) {
    real was = g[bad];
    g[bad] = bad ? (real)NAN : (real)INFINITY;
    statistics(o, g, t, 0.5, bad, grad_stats);
    assert_true(grad_stats[VD_STATS_NONFINITE] == (bad ? 1 : 0));
    o->adagrad(o, p, g, acc, t, 2, grad_stats, 0.1, 1e-10, 0);
    o->adam(o, p, g, m, acc, t, 2, grad_stats, &adam);
    for (int i = 0; i < 4; i++) assert_true(p[i] == 1 + i && acc[i] == 0 && m[i] == 0);
    g[bad] = was;
  }
  o->destroy(o);
}

/* A slot holds what its parts were when it was sent, also after others were sent. */
static void sends_update_stats(void **state) {
  (void)state;
  vd_ops *o = ops();
  vd_error err = {0};
  double a[2] = {1, 2};
  int32_t b[3] = {3, 4, 5};
  const vd_stats_part parts[] = {{a, sizeof a}, {b, sizeof b}};
  assert_int_equal(o->push_stats(o, 0, 2, parts, &err), VD_OK);
  a[0] = 7;
  assert_int_equal(o->push_stats(o, 3, 1, parts, &err), VD_OK);
  const char *first = o->pull_stats(o, 0, &err);
  const double *second = o->pull_stats(o, 3, &err);
  assert_true(((const double *)(const void *)first)[0] == 1 && second[0] == 7 && second[1] == 2);
  assert_memory_equal(first + sizeof a, b, sizeof b);
  o->destroy(o);
}

static void memory_push_rows(void **state) {
  (void)state;
  vd_ops *o = ops();
  for (int old = 0; old < 6; old++)
    for (int block = 0; block < 6; block++)
      for (int rows = 1; rows < 7; rows++) {
        real from[12], hidden[12], to[14];
        int oldest = old > 0 ? (block + rows) % old : 0;
        for (int s = 0; s < 2; s++) {
          for (int r = 0; r < old; r++) from[s * old + (oldest + r) % old] = 100 + r + 1000 * s;
          for (int r = 0; r < block; r++) hidden[s * block + r] = 100 + old + r + 1000 * s;
        }
        o->memory_push(o, 2, 1, from, old, oldest, hidden, block, to, rows);
        for (int s = 0; s < 2; s++)
          for (int r = 0; r < rows; r++) {
            int at = old + block - rows + r;
            assert_true(to[s * rows + r] == (at < 0 ? 0 : 100 + at + 1000 * s));
          }
      }
  o->destroy(o);
}

/* What golden files are compared with: a NaN among good values must not be lost. */
static void golden_comparison_keeps_nan(void **state) {
  (void)state;
  const double theirs[3] = {1, 2, 4};
  const real good[3] = {1, 2, 5}, first[3] = {NAN, 2, 4}, middle[3] = {1, NAN, 4}, last[3] = {1, 2, NAN};
  assert_true(vd_golden_difference(good, theirs, 3) == 0.25);
  assert_true(isnan(vd_golden_difference(first, theirs, 3)));
  assert_true(isnan(vd_golden_difference(middle, theirs, 3)));
  assert_true(isnan(vd_golden_difference(last, theirs, 3)));
  assert_true(isnan(vd_golden_worse(NAN, 1)) && isnan(vd_golden_worse(1, NAN)) && vd_golden_worse(1, 2) == 2);
}

/* A ring that is turned holds what the same memory holds when it is pushed. */
static void memory_ring_pushes(void **state) {
  (void)state;
  vd_ops *o = ops();
  for (int rows = 1; rows < 7; rows++)
    for (int block = 1; block < 9; block++) {
      real ring[12] = {0}, other[14] = {0}, straight[12] = {0}, longer[14] = {0}, hidden[16], spread[48];
      int other_oldest = 0;
      for (int step = 0, oldest = 0; step < 9; step++) {
        for (int i = 0; i < 2 * block; i++) hidden[i] = 100 * step + i;
        for (int i = 0; i < 48; i++) spread[i] = i % 3 ? -1 : hidden[i / 3 % (2 * block)];
        int stride = 1 + step % 2 * 2;
        const real *from = stride == 3 ? spread : hidden;
        const vd_ring_push push[] = {{ring, from, rows, oldest}, {other, from, rows + 1, other_oldest}};
        o->memory_ring_push(o, 2, 1, stride, block, 2, push);
        o->memory_push(o, 2, 1, straight, rows, 0, hidden, block, straight, rows);
        o->memory_push(o, 2, 1, longer, rows + 1, 0, hidden, block, longer, rows + 1);
        oldest = (oldest + block) % rows, other_oldest = (other_oldest + block) % (rows + 1);
        for (int i = 0; i < 2 * rows; i++)
          assert_true(straight[i] == ring[i / rows * rows + (oldest + i % rows) % rows]);
        for (int i = 0, r = rows + 1; i < 2 * r; i++)
          assert_true(longer[i] == other[i / r * r + (other_oldest + i % r) % r]);
      }
    }
  o->destroy(o);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_plain),
      cmocka_unit_test(linear_relu_dropout),
      cmocka_unit_test(add_norm_gradients),
      cmocka_unit_test(cross_entropy_gradients),
      cmocka_unit_test(embed_gradients),
      cmocka_unit_test(dropout_mask),
      cmocka_unit_test(adagrad_step),
      cmocka_unit_test(memory_push_rows),
      cmocka_unit_test(measures_gradients),
      cmocka_unit_test(sends_update_stats),
      cmocka_unit_test(golden_comparison_keeps_nan),
      cmocka_unit_test(memory_ring_pushes),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
