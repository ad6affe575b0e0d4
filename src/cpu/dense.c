/* Embedding, linear layers, residual + layer norm, cross entropy on the CPU. Sums over rows run over columns in
 * parallel and over rows in order, so that a result does not depend on the number of threads. */
#include "src/cpu/blas.h"
#include "src/cpu/cpu.h"
#include "src/cpu/philox.h"
#include "src/cpu/product.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const double VD_NORM_EPS = 1e-5;

void vd_cpu_dropout_row(const vd_dropout *dropout, int64_t row, int64_t width, real *x) {
  enum { GROUP = 8 * VD_PHILOX_BATCH }; /* elements that a batch of calls serves */
  uint32_t threshold = vd_dropout_threshold(dropout->p);
  real scale = (real)vd_dropout_scale(threshold);
  int64_t first = (dropout->row0 + row) * width, end = first + width;
  for (int64_t group = first / GROUP * GROUP; group < end; group += GROUP) {
    uint32_t words[4][VD_PHILOX_BATCH];
    real keep[GROUP];
    vd_cpu_philox(&dropout->rng, (uint64_t)group / 8, words);
    for (int c = 0; c < VD_PHILOX_BATCH; c++)
      for (int w = 0; w < 4; w++) {
        keep[8 * c + 2 * w] = (words[w][c] & 0xffffU) < threshold ? 0 : scale;
        keep[8 * c + 2 * w + 1] = (words[w][c] >> 16) < threshold ? 0 : scale;
      }
    int64_t from = group > first ? group : first, to = group + GROUP < end ? group + GROUP : end;
    for (int64_t e = from; e < to; e++) x[e - first] *= keep[e - group];
  }
}

void vd_cpu_embed(vd_ops *o, int64_t n, int64_t d, const int32_t *tokens, const real *weight, const vd_dropout *dropout,
                  vd_act *out) {
  (void)o;
  real *y = out;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < n; r++) {
    const real *from = weight + tokens[r] * d;
    for (int64_t i = 0; i < d; i++) y[r * d + i] = from[i];
    if (dropout->p > 0) vd_cpu_dropout_row(dropout, r, d, y + r * d);
  }
}

void vd_cpu_embed_backward(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                           const vd_dropout *dropout, vd_act *dout, real *dweight) {
  (void)o;
  (void)vocab;
  real *dy = dout;
  if (dropout->p > 0) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < n; r++) vd_cpu_dropout_row(dropout, r, d, dy + r * d);
  }
  enum { COLUMNS = 64 };
#pragma omp parallel for schedule(static)
  for (int64_t c0 = 0; c0 < d; c0 += COLUMNS) {
    int64_t c1 = c0 + COLUMNS < d ? c0 + COLUMNS : d;
    for (int64_t r = 0; r < n; r++)
      for (int64_t c = c0; c < c1; c++) dweight[tokens[r] * d + c] += dy[r * d + c];
  }
}

/* Bias, ReLU and dropout of rows first .. first + n - 1 of y. */
static void finish_rows(const vd_linear *l, int64_t first, int64_t n, const real *restrict bias, real *restrict y) {
  for (int64_t r = first; r < first + n; r++) {
    real *restrict row = y + r * l->out;
    if (bias && l->relu) {
      for (int64_t c = 0; c < l->out; c++) row[c] = row[c] + bias[c] < 0 ? 0 : row[c] + bias[c];
    } else if (bias) {
      for (int64_t c = 0; c < l->out; c++) row[c] += bias[c];
    } else if (l->relu) {
      for (int64_t c = 0; c < l->out; c++) row[c] = row[c] < 0 ? 0 : row[c];
    }
    if (l->relu && l->dropout.p > 0) vd_cpu_dropout_row(&l->dropout, r, l->out, row);
  }
}

void vd_cpu_linear(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y) {
  (void)o;
  const real *in = x;
  real *out = y;
  if (l->n < VD_PRODUCT_FEW) {
    vd_gemm(CblasNoTrans, CblasTrans, l->n, l->out, l->in, 1, in, l->in, weight, l->in, 0, out, l->out);
    finish_rows(l, 0, l->n, bias, out);
    return;
  }
  vd_panels w;
  vd_panels_new(&w, l->in, l->out, weight, l->in, true);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < l->n; r += VD_PRODUCT_BLOCK) {
    int64_t n = l->n - r < VD_PRODUCT_BLOCK ? l->n - r : VD_PRODUCT_BLOCK;
    vd_product_rows(&w, n, in + r * l->in, l->in, out + r * l->out, l->out, false);
    finish_rows(l, r, n, bias, out);
  }
  vd_panels_free(&w);
}

/* n rows of dy become the gradient before ReLU and dropout: y > 0 exactly where the unit was active and kept. A NaN in
 * y propagates, so that the gradient statistics report it. */
static void relu_backward(const vd_linear *l, int64_t n, const real *restrict y, real *restrict dy) {
  real scale = l->dropout.p > 0 ? (real)vd_dropout_scale(vd_dropout_threshold(l->dropout.p)) : 1;
  for (int64_t i = 0; i < n * l->out; i++) dy[i] = y[i] <= 0 ? 0 : dy[i] * scale;
}

/* dx = dy weight, or += ; the gradient of `before`, whose output is x, follows while the rows are in the cache. */
static void input_gradient(const vd_linear *l, const real *x, const real *weight, const real *dy, real *dx,
                           bool accumulate, const vd_linear *before) {
  if (l->n < VD_PRODUCT_FEW) {
    vd_gemm(CblasNoTrans, CblasNoTrans, l->n, l->in, l->out, 1, dy, l->out, weight, l->in, accumulate ? 1 : 0, dx,
            l->in);
    if (before) relu_backward(before, l->n, x, dx);
    return;
  }
  vd_panels w;
  vd_panels_new(&w, l->out, l->in, weight, l->in, false);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < l->n; r += VD_PRODUCT_BLOCK) {
    int64_t n = l->n - r < VD_PRODUCT_BLOCK ? l->n - r : VD_PRODUCT_BLOCK;
    vd_product_rows(&w, n, dy + r * l->out, l->out, dx + r * l->in, l->in, accumulate);
    if (before) relu_backward(before, n, x + r * l->in, dx + r * l->in);
  }
  vd_panels_free(&w);
}

enum { COLUMNS = 64 }; /* columns that a thread sums at once: a few vectors, held in registers or the nearest cache */

static void sum_rows(int64_t n, int64_t width, const real *x, real *sum) {
#pragma omp parallel for schedule(static)
  for (int64_t c0 = 0; c0 < width; c0 += COLUMNS) {
    int64_t columns = c0 + COLUMNS < width ? COLUMNS : width - c0;
    real total[COLUMNS];
    memcpy(total, sum + c0, (size_t)columns * sizeof *sum);
    if (columns == COLUMNS)
      for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < COLUMNS; c++) total[c] += x[r * width + c0 + c];
    else
      for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < columns; c++) total[c] += x[r * width + c0 + c];
    memcpy(sum + c0, total, (size_t)columns * sizeof *sum);
  }
}

void vd_cpu_linear_backward(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                            vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                            real *dbefore) {
  (void)o;
  vd_gemm(CblasTrans, CblasNoTrans, l->out, l->in, l->n, 1, dy, l->out, x, l->in, 1, dweight, l->in);
  if (dbias) sum_rows(l->n, l->out, dy, dbias);
  if (dx) input_gradient(l, x, weight, dy, dx, accumulate, before);
  if (before) sum_rows(l->n, l->in, dx, dbefore);
}

void vd_cpu_add_norm(vd_ops *o, int64_t n, int64_t d, const vd_act *a, const vd_act *b, const vd_dropout *dropped,
                     const real *weight, const real *bias, vd_act *sum, real *mean, real *rstd, vd_act *y) {
  (void)o;
  const real *x1 = a, *x2 = b;
  real *s = sum, *out = y;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < n; r++) {
    real *row = s + r * d, total = 0, square = 0;
    memcpy(row, x2 + r * d, (size_t)d * sizeof *row);
    if (dropped && dropped->p > 0) vd_cpu_dropout_row(dropped, r, d, row);
#pragma omp simd reduction(+ : total)
    for (int64_t c = 0; c < d; c++) {
      row[c] += x1[r * d + c];
      total += row[c];
    }
    real mu = total / (real)d;
#pragma omp simd reduction(+ : square)
    for (int64_t c = 0; c < d; c++) square += (row[c] - mu) * (row[c] - mu);
    real scale = (real)(1.0 / sqrt((double)square / (double)d + VD_NORM_EPS));
    mean[r] = mu;
    rstd[r] = scale;
    for (int64_t c = 0; c < d; c++) out[r * d + c] = (row[c] - mu) * scale * weight[c] + bias[c];
  }
}

/* dweight += sum of dy xhat, dbias += sum of dy, over the rows. */
static void norm_parameters(int64_t n, int64_t d, const real *s, const real *mean, const real *rstd, const real *dy,
                            real *dweight, real *dbias) {
#pragma omp parallel for schedule(static)
  for (int64_t c0 = 0; c0 < d; c0 += COLUMNS) {
    int64_t columns = c0 + COLUMNS < d ? COLUMNS : d - c0;
    real weight[COLUMNS], bias[COLUMNS];
    memcpy(weight, dweight + c0, (size_t)columns * sizeof *weight);
    memcpy(bias, dbias + c0, (size_t)columns * sizeof *bias);
    for (int64_t r = 0; r < n; r++) {
      const real *g = dy + r * d + c0, *x = s + r * d + c0;
#pragma omp simd
      for (int64_t c = 0; c < columns; c++) {
        weight[c] += g[c] * (x[c] - mean[r]) * rstd[r];
        bias[c] += g[c];
      }
    }
    memcpy(dweight + c0, weight, (size_t)columns * sizeof *weight);
    memcpy(dbias + c0, bias, (size_t)columns * sizeof *bias);
  }
}

/* With g = dy * weight and xhat = (sum - mean) rstd: dsum = rstd (g - mean(g) - xhat mean(g xhat)). */
void vd_cpu_add_norm_backward(vd_ops *o, int64_t n, int64_t d, const vd_act *sum, const real *mean, const real *rstd,
                              const real *weight, const vd_act *dy, vd_act *dsum, real *dweight, real *dbias,
                              real *dshift) {
  (void)o;
  const real *s = sum, *g = dy;
  real *ds = dsum;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < n; r++) {
    const real *row = s + r * d, *gr = g + r * d;
    real m1 = 0, m2 = 0, mu = mean[r], scale = rstd[r];
#pragma omp simd reduction(+ : m1, m2)
    for (int64_t c = 0; c < d; c++) {
      m1 += gr[c] * weight[c];
      m2 += gr[c] * weight[c] * (row[c] - mu) * scale;
    }
    m1 /= (real)d;
    m2 /= (real)d;
    for (int64_t c = 0; c < d; c++) ds[r * d + c] = scale * (gr[c] * weight[c] - m1 - (row[c] - mu) * scale * m2);
  }
  norm_parameters(n, d, s, mean, rstd, g, dweight, dbias);
  if (dshift) sum_rows(n, d, ds, dshift);
}

/* One row: nll in nats; where dlogits is not NULL, scale * (softmax - onehot). */
static double entropy_row(int64_t vocab, const real *logits, int32_t target, double scale, real *dlogits) {
  real top = logits[0];
  for (int64_t c = 1; c < vocab; c++) top = logits[c] > top ? logits[c] : top;
  double total = 0, at_target = (double)logits[target] - (double)top;
  for (int64_t c = 0; c < vocab; c++) total += exp((double)logits[c] - (double)top);
  for (int64_t c = 0; dlogits && c < vocab; c++)
    dlogits[c] = (real)(scale * (exp((double)logits[c] - (double)top) / total - (c == target)));
  return log(total) - at_target;
}

void vd_cpu_cross_entropy(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                          const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits) {
  (void)o;
  const real *x = logits;
  real *dx = dlogits;
  double *row = vd_calloc((size_t)n, sizeof *row);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < n; r++) {
    real *g = dx ? dx + r * stride : NULL;
    const bool counts = targets[r] >= 0;
    if (counts) row[r] = entropy_row(vocab, x + r * stride, targets[r], scale, g);
    for (int64_t c = counts ? vocab : 0; g && c < stride; c++) g[c] = 0;
  }
  for (int64_t r = 0; r < n; r++) {
    *loss_sum += row[r];
    if (nll) nll[r] = (real)row[r];
  }
  free(row);
}
