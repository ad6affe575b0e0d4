/* The loss, and the optimiser's steps. */
#include "src/ops/update_stats.h"
#include "tests/cuda/ops_case.h"

#include <math.h>
#include <stdio.h>

static void cross_entropy(ops_test *t, const char *name, int64_t n, int64_t vocab, int64_t stride, bool nll,
                          bool gradient, bool same, double missing) {
  side_call c = {
      .op = SIDE_CROSS_ENTROPY, .n = n, .vocab = vocab, .stride = stride, .scale = 1.0 / 16, .same_buffer = same};
  size_t all = (size_t)(n * stride);
  case_noise(t, &c, SIDE_ACT, all, 4, 60);
  int targets = case_fill(&c, SIDE_TOKEN, (size_t)n, 0);
  for (size_t i = 0; i < (size_t)n; i++)
    c.buffer[targets].x[i] = case_uniform(61, i) < missing ? -1 : floor(case_uniform(62, i) * (double)vocab);
  case_fill(&c, SIDE_SUM, 1, 0);
  case_fill(&c, SIDE_REAL, nll ? (size_t)n : 0, 9);
  case_fill(&c, SIDE_ACT, gradient && !same ? all : 0, 9);
  case_result results[3] = {{.buffer = 2, .name = "loss_sum"}};
  int k = 1;
  if (nll) results[k++] = (case_result){.buffer = 3, .name = "nll", .exact_zeros = true};
  if (gradient) results[k++] = (case_result){.buffer = same ? 0 : 4, .name = "dlogits"};
  case_check(t, name, &c, results, k);
}

static void simple(ops_test *t) {
  side_call c = {.op = SIDE_ADD_CONSTANT, .value = -0.37};
  case_noise(t, &c, SIDE_REAL, 1003, 1, 70);
  case_check(t, "add_constant", &c, &(case_result){.buffer = 0, .name = "x"}, 1);
  side_call clamp = {.op = SIDE_CLAMP};
  case_noise(t, &clamp, SIDE_PARAM, 1003, 2, 71);
  case_check(t, "clamp01", &clamp, &(case_result){.buffer = 0, .name = "x", .exact_zeros = true}, 1);
}

/* Tensors of many sizes with gaps between them, one smaller and some larger than what a thread block takes. */
static void tensors(side_call *c) {
  static const size_t size[] = {1, 8, 513, 16384, 16385, 70000};
  size_t at = 0;
  c->n_tensor = (int)(sizeof size / sizeof *size);
  for (int i = 0; i < c->n_tensor; i++) {
    c->offset[i] = at;
    c->size[i] = size[i];
    at += (size[i] + 31) / 32 * 32;
  }
  c->n = (int64_t)at;
}

static void square_sums(ops_test *t, bool infinite) {
  const char *name = infinite ? "square_sums not finite" : "square_sums";
  if (!case_selected(t, name)) return;
  side_call c = {.op = SIDE_SQUARE_SUMS};
  tensors(&c);
  case_noise(t, &c, SIDE_REAL, (size_t)c.n, 1, 80);
  if (infinite) c.buffer[0].x[c.offset[3] + 5] = NAN;
  side_call cpu = case_copy(&c);
  bool ran = side_cpu_run(t->cpu, &cpu) && side_gpu_run(t->gpu, &c);
  double worst = 0;
  for (int i = 0; i < c.n_tensor && ran; i++) {
    double e = fabs(c.norm2[i] / cpu.norm2[i] - 1);
    if (infinite && i == 3) e = isfinite(c.norm2[i]) ? INFINITY : 0;
    if (!(e <= worst) && !isnan(worst)) worst = e; /* a NaN stays */
  }
  case_report(t, name, "norm2", ran && worst <= 1e-5, worst, 1e-5);
  case_free(&cpu);
  case_free(&c);
}

/* Appends the gradient statistics that the optimisers read, as a buffer of their own. `bad`: a gradient is not finite.
 */
static int grad_stats(side_call *c, int gradient, bool bad) {
  if (bad) c->buffer[gradient].x[c->offset[3] + 5] = INFINITY;
  return case_fill(c, SIDE_SUM, (size_t)(VD_STATS_TENSORS + c->n_tensor), 0);
}
static bool but_for_norms(const side_call *c, size_t element) {
  (void)c;
  return element == VD_STATS_NONFINITE;
}

/* Parameters are fp32 in every precision, and so are the gradients. The step itself is compared, which is small beside
 * the parameter; so the parameters are small here. */
static void adagrad(ops_test *t, const char *name, const side_call *factors, bool bad) {
  side_call c = *factors;
  c.op = SIDE_ADAGRAD, c.lr = 0.07, c.eps = 1e-10;
  tensors(&c);
  int param = case_noise(t, &c, SIDE_PARAM, (size_t)c.n, 0.01, 90);
  int gradient = case_noise(t, &c, SIDE_REAL, (size_t)c.n, 0.01, 91);
  int sum = case_fill(&c, SIDE_REAL, (size_t)c.n, 0);
  for (size_t i = 0; i < (size_t)c.n; i++) c.buffer[sum].x[i] = (double)(float)(1e-4 * case_uniform(92, i));
  int says = grad_stats(&c, gradient, bad);
  case_result results[] = {{.buffer = param, .name = "param"},
                           {.buffer = sum, .name = "accumulator"},
                           {.buffer = says, .name = "grad_stats", .wanted = bad ? but_for_norms : NULL}};
  case_check(t, name, &c, results, 3);
}

/* The first updates, whose bias correction is large, and a late one; the gradients in a loss scale. */
static void adam(ops_test *t, const char *name, int64_t updates, double scale, double clip_norm, bool bad) {
  side_call c = {.op = SIDE_ADAM, .scale = scale, .clip_norm = clip_norm, .lr = 0.01, .eps = 1e-8, .t = updates};
  c.beta1 = 0.9, c.beta2 = 0.999;
  tensors(&c);
  int param = case_noise(t, &c, SIDE_PARAM, (size_t)c.n, 0.02, 95);
  int gradient = case_noise(t, &c, SIDE_REAL, (size_t)c.n, 0.01 / scale, 96);
  int m = case_noise(t, &c, SIDE_REAL, (size_t)c.n, updates > 1 ? 0.01 : 0, 97);
  int v = case_fill(&c, SIDE_REAL, (size_t)c.n, 0);
  for (size_t i = 0; i < (size_t)c.n && updates > 1; i++)
    c.buffer[v].x[i] = (double)(float)(1e-4 * (0.01 + case_uniform(98, i)));
  int says = grad_stats(&c, gradient, bad);
  case_result results[] = {{.buffer = param, .name = "param"},
                           {.buffer = m, .name = "m"},
                           {.buffer = v, .name = "v"},
                           {.buffer = says, .name = "grad_stats", .wanted = bad ? but_for_norms : NULL}};
  case_check(t, name, &c, results, 4);
}

void test_update(ops_test *t) {
  cross_entropy(t, "cross_entropy", 70, 205, 205, true, true, false, 0.2);
  cross_entropy(t, "cross_entropy in place", 33, 205, 205, false, true, true, 0.2);
  cross_entropy(t, "cross_entropy padded", 70, 205, 208, true, true, false, 0.2);
  cross_entropy(t, "cross_entropy padded, in place", 1031, 205, 208, false, true, true, 0.2);
  cross_entropy(t, "cross_entropy padded by more than a vector", 19, 27, 64, true, true, true, 0.2);
  cross_entropy(t, "cross_entropy of a byte", 41, 256, 256, true, true, true, 0.2);
  cross_entropy(t, "cross_entropy long, padded by more than a vector", 19, 27, 296, true, true, true, 0.2);
  cross_entropy(t, "cross_entropy loss only", 65, 205, 208, false, false, false, 0);
  cross_entropy(t, "cross_entropy nll only", 65, 51, 51, true, false, false, 0.1);
  cross_entropy(t, "cross_entropy two symbols", 17, 2, 2, true, true, false, 0.1);
  cross_entropy(t, "cross_entropy many symbols", 9, 5003, 5003, true, true, true, 0.1);
  cross_entropy(t, "cross_entropy many symbols, padded", 9, 5003, 5008, true, true, true, 0.1);
  simple(t);
  square_sums(t, false);
  square_sums(t, true);
  adagrad(t, "adagrad", &(side_call){.scale = 1}, false);
  adagrad(t, "adagrad clipped", &(side_call){.scale = 1, .clip_step = 0.03}, false);
  adagrad(t, "adagrad scaled", &(side_call){.scale = 1.0 / 1024, .clip_step = 1e-4}, false);
  adagrad(t, "adagrad clipped twice", &(side_call){.scale = 1, .clip_step = 0.03, .clip_norm = 0.5}, false);
  adagrad(t, "adagrad left out", &(side_call){.scale = 1, .clip_step = 0.03}, true);
  adam(t, "adam first", 1, 1, 0, false);
  adam(t, "adam scaled", 3, 1.0 / 1024, 0, false);
  adam(t, "adam late", 100000, 1, 0.25, false);
  adam(t, "adam left out", 5, 1, 0.25, true);
}
