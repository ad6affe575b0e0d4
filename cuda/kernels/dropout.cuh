/* Dropout of row-major sites. Apart from element.cuh, because nvcc takes four seconds to read Random123's header. */
#ifndef VD_CUDA_DROPOUT_CUH
#define VD_CUDA_DROPOUT_CUH

#include "cuda/kernels/element.cuh"
#include "src/base/random.h"

/* The dropout of a row-major site, as a kernel argument. */
typedef struct vd_drop {
  vd_rng rng;
  int64_t first; /* global position of element 0 */
  uint32_t threshold;
  float scale;
} vd_drop;

/* Not collective. `width` elements a row. */
static inline vd_drop vd_make_drop(const vd_dropout *d, int64_t width) {
  vd_drop drop = {d->rng, d->row0 * width, vd_dropout_threshold(d->p), 1.0f};
  drop.scale = (float)vd_dropout_scale(drop.threshold);
  return drop;
}

/* Applies dropout to x[0..N-1], elements e .. e + N - 1 of the site. N is 1, or 8: e and d.first are then multiples of
 * 8, and one Philox call draws all of them. */
template <int N> VD_GPU void vd_apply_drop(const vd_drop &d, int64_t e, float x[N]) {
  int64_t global = d.first + e;
  philox4x32_ctr_t words = vd_philox(d.rng, (uint64_t)global / 8);
#pragma unroll
  for (int i = 0; i < N; i++) {
    int lane = N == 1 ? (int)(global % 8) : i;
    x[i] = vd_dropout_half(words, lane) < d.threshold ? 0.0f : x[i] * d.scale;
  }
}

#endif
