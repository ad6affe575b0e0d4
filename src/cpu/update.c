/* Memories and the optimiser's steps on the CPU. */
#include "src/cpu/cpu.h"

#include <stdlib.h>
#include <string.h>
#include <tgmath.h>

static void push_stream(int64_t d, const real *old, int64_t rows_old, int64_t oldest, const real *hidden, int64_t block,
                        real *memory, int64_t rows_new) {
  int64_t fresh = block < rows_new ? block : rows_new;                      /* rows taken from the block */
  int64_t kept = rows_new - fresh < rows_old ? rows_new - fresh : rows_old; /* rows taken from the old memory */
  int64_t zeros = rows_new - fresh - kept;
  size_t row = (size_t)d * sizeof(real);
  /* A pointer may be NULL where there are no rows: memcpy must not get it, not even with size 0. */
  int64_t at = rows_old > 0 ? (oldest + rows_old - kept) % rows_old : 0; /* the oldest row that is kept */
  int64_t straight = rows_old - at < kept ? rows_old - at : kept;
  if (straight > 0) memmove(memory + zeros * d, old + at * d, (size_t)straight * row);
  if (kept > straight) memcpy(memory + (zeros + straight) * d, old, (size_t)(kept - straight) * row);
  if (zeros > 0) memset(memory, 0, (size_t)zeros * row);
  if (fresh > 0) memcpy(memory + (zeros + kept) * d, hidden + (block - fresh) * d, (size_t)fresh * row);
}

void vd_cpu_memory_push(vd_ops *o, int64_t n_stream, int64_t d, const vd_act *old, int64_t rows_old, int64_t oldest,
                        const vd_act *hidden, int64_t block, vd_act *memory, int64_t rows_new) {
  (void)o;
  const real *from = old, *new_rows = hidden;
  real *to = memory;
#pragma omp parallel for schedule(static)
  for (int64_t s = 0; s < n_stream; s++)
    push_stream(d, from + s * rows_old * d, rows_old, oldest, block ? new_rows + s * block * d : NULL, block,
                to + s * rows_new * d, rows_new);
}

/* One ring buffer of one stream. */
static void push_ring(const vd_ring_push *p, int64_t stream, int64_t d, int64_t stride, int64_t block) {
  const real *from = (const real *)p->hidden + stream * block * stride;
  real *to = (real *)p->memory + stream * p->rows * d;
  int64_t first = block < p->rows ? 0 : block - p->rows; /* of the block's rows that stay */
  for (int64_t r = first; r < block; r++)
    memcpy(to + (p->oldest + r) % p->rows * d, from + r * stride, (size_t)d * sizeof *to);
}

void vd_cpu_memory_ring_push(vd_ops *o, int64_t n_stream, int64_t d, int64_t stride, int64_t block, int n,
                             const vd_ring_push *push) {
  (void)o;
#pragma omp parallel for schedule(static) collapse(2)
  for (int i = 0; i < n; i++)
    for (int64_t s = 0; s < n_stream; s++) push_ring(&push[i], s, d, stride, block);
}

void vd_cpu_square_sums(vd_ops *o, const real *x, const vd_extent *extent, int n, double *norm2) {
  (void)o;
#pragma omp parallel for schedule(dynamic, 1)
  for (int t = 0; t < n; t++) {
    const real *v = x + extent[t].offset;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < extent[t].size; i++) sum += (double)v[i] * (double)v[i];
    norm2[t] = sum;
  }
}

void vd_cpu_gradient_norms(vd_ops *o, const real *gradient, const vd_extent *extent, int n, int n_tensor,
                           double *norm2) {
  double *sum = vd_calloc((size_t)n + 1, sizeof *sum);
  vd_cpu_square_sums(o, gradient, extent, n, sum);
  memset(norm2, 0, (size_t)n_tensor * sizeof *norm2);
  for (int i = 0; i < n; i++) norm2[extent[i].tensor] += sum[i];
  free(sum);
}

void vd_cpu_gradient_stats(vd_ops *o, int n_tensor, double scale, double clip_norm, double *grad_stats) {
  (void)o;
  double *norm2 = grad_stats + VD_STATS_TENSORS, total = 0;
  grad_stats[VD_STATS_NONFINITE] = -1;
  for (int t = n_tensor - 1; t >= 0; t--)
    if (!isfinite(norm2[t])) grad_stats[VD_STATS_NONFINITE] = t;
  for (int t = 0; t < n_tensor; t++) total += norm2[t];
  if (clip_norm > 0) scale *= fmin(1.0, clip_norm / (sqrt(total) * scale + 1e-6));
  for (int t = 0; t < n_tensor; t++) norm2[t] *= scale * scale;
  grad_stats[VD_STATS_NORM2] = total;
  grad_stats[VD_STATS_SCALE] = scale;
}

void vd_cpu_adagrad(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *extent, int n,
                    const double *grad_stats, double lr, double eps, double clip_step) {
  (void)o;
  for (int t = 0; t < n && grad_stats[VD_STATS_NONFINITE] < 0; t++) {
    double norm = sqrt(grad_stats[VD_STATS_TENSORS + extent[t].tensor]), rate = lr;
    if (clip_step > 0 && norm > clip_step) rate *= clip_step / (norm + 1e-10);
    real step = (real)rate, factor = (real)grad_stats[VD_STATS_SCALE], small = (real)eps;
    real *p = param + extent[t].offset, *acc = accumulator + extent[t].offset;
    const real *g = gradient + extent[t].offset;
    int64_t size = (int64_t)extent[t].size;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < size; i++) {
      real v = g[i] * factor;
      acc[i] += v * v;
      p[i] -= step * v / (sqrt(acc[i]) + small);
    }
  }
}

void vd_cpu_adam(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *extent, int n,
                 const double *grad_stats, const vd_adam *a) {
  (void)o;
  real factor = (real)grad_stats[VD_STATS_SCALE], b1 = (real)a->beta1, b2 = (real)a->beta2, small = (real)a->eps;
  real rest1 = (real)(1 - a->beta1), rest2 = (real)(1 - a->beta2);
  real step = (real)(a->lr / (1 - pow(a->beta1, (double)a->t)));
  real correct = (real)(1 / sqrt(1 - pow(a->beta2, (double)a->t)));
  for (int t = 0; t < n && grad_stats[VD_STATS_NONFINITE] < 0; t++) {
    size_t at = extent[t].offset;
    int64_t size = (int64_t)extent[t].size;
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < size; i++) {
      real g = gradient[at + (size_t)i] * factor;
      real first = b1 * m[at + (size_t)i] + rest1 * g, second = b2 * v[at + (size_t)i] + rest2 * g * g;
      m[at + (size_t)i] = first;
      v[at + (size_t)i] = second;
      param[at + (size_t)i] -= step * first / (sqrt(second) * correct + small);
    }
  }
}
