/* The ops of Transformer-XL (arXiv 1901.02860) other than attention: sinusoidal position encodings, the weight gradient
 * of relative keys, scaled dropout between the parts of a layer. */
#include "src/cpu/blas.h"
#include "src/cpu/cpu.h"

#include <math.h>

void vd_cpu_scale_dropout(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout, const vd_act *x,
                          vd_act *y) {
  (void)o;
  const real *from = x;
  real *to = y, factor = (real)scale;
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < n; r++) {
    for (int64_t c = r * width; c < (r + 1) * width; c++) to[c] = from[c] * factor;
    if (dropout->p > 0) vd_cpu_dropout_row(dropout, r, width, to + r * width);
  }
}

void vd_cpu_position_encodings(vd_ops *o, const vd_position_encoding *e, vd_act *out) {
  (void)o;
  real *to = out;
  int64_t half = e->d / 2;
#pragma omp parallel for schedule(static)
  for (int64_t x = 0; x < e->n; x++) {
    double y = (double)(e->clamp_len > 0 && x > e->clamp_len ? e->clamp_len : x);
    for (int64_t i = 0; i < half; i++) {
      double angle = y * pow(10000.0, -2.0 * (double)i / (double)e->d);
      to[x * e->d + i] = (real)sin(angle);
      to[x * e->d + half + i] = (real)cos(angle);
    }
    if (e->dropout.p > 0) vd_cpu_dropout_row(&e->dropout, x, e->d, to + x * e->d);
  }
}

void vd_cpu_weight_gradient(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                            real *dweight) {
  (void)o;
  vd_gemm(CblasTrans, CblasNoTrans, out, in, n, 1, dy, out, x, in, 1, dweight, in);
}
