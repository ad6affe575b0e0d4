/* Dropout of row-major sites. */
#ifndef VD_CUDA_DROPOUT_CUH
#define VD_CUDA_DROPOUT_CUH

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/philox.cuh"

/* The dropout of a row-major site, as a kernel argument. */
typedef struct vd_drop {
  vd_philox_keys keys;
  int64_t first; /* global position of element 0 */
  uint32_t threshold;
  float scale;
} vd_drop;

/* Not collective. `width` elements a row. */
static inline vd_drop vd_make_drop(const vd_dropout *d, int64_t width) {
  vd_drop drop = {vd_make_philox_keys(d->rng), d->row0 * width, vd_dropout_threshold(d->p), 1.0f};
  drop.scale = (float)vd_dropout_scale(drop.threshold);
  return drop;
}

/* Applies dropout to x[0..N-1], elements e .. e + N - 1 of the site. N is 1, or 8: e and d.first are then multiples of
 * 8, and one Philox call draws all of them. */
template <int N> VD_GPU void vd_apply_drop(const vd_drop &d, int64_t e, float x[N]) {
  int64_t global = d.first + e;
  const vd_philox_words words = vd_draw_words(d.keys, (uint64_t)global / 8);
#pragma unroll
  for (int i = 0; i < N; i++) {
    int lane = N == 1 ? (int)(global % 8) : i;
    x[i] = vd_dropout_bits(words, lane) < d.threshold ? 0.0f : x[i] * d.scale;
  }
}

#endif
