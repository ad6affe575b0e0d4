/* The dropout mask of a layer's hidden units [n, width] as bits, 1 = kept, which the layer norm before the layer draws
 * while it waits for memory, and the layer's epilogue reads: drawn beside wgmma, Philox slows the products
 * (doc/notes/2026-11-29-query-tile-pairs.md).
 *
 * Words [n, width / 128, 4]: word t of 128 units has the units 32 b + 8 t + 2 u + e with b, u < 4, e < 2, each as bit
 * 7 - 2 b - u / 2 of byte 2 (u % 2) + e. A left shift then brings the bits of two adjacent pairs to the sign bits of
 * bytes. */
#ifndef VD_UNIT_MASK_CUH
#define VD_UNIT_MASK_CUH

#include "cuda/kernels/kernels.h"
#include "cuda/kernels/philox.cuh"

/* What a kernel draws; words NULL: nothing. */
typedef struct vd_unit_draws {
  vd_philox_keys keys;
  int64_t first; /* dropout's position of element 0, a multiple of 8 */
  uint32_t threshold;
  int width; /* a multiple of 128 */
  uint32_t *words;
} vd_unit_draws;

/* Not collective. */
static inline vd_unit_draws vd_make_unit_draws(const vd_unit_mask *mask) {
  vd_unit_draws d = {};
  if (!mask) return d;
  d.keys = vd_make_philox_keys(mask->dropout.rng), d.first = mask->dropout.row0 * mask->width;
  d.threshold = vd_dropout_threshold(mask->dropout.p), d.width = (int)mask->width, d.words = mask->words;
  return d;
}

/* Draws word w, 0 .. width / 32 - 1, of a row. */
static __device__ __forceinline__ void vd_draw_unit_word(const vd_unit_draws &d, int64_t row, int w) {
  const uint64_t call = (uint64_t)(d.first + row * d.width) / 8 + (uint64_t)(w / 4 * 16 + w % 4);
  uint32_t bits[2] = {0, 0}; /* of pairs u % 2: elements 0 from bit 0 on, 1 from bit 16 on */
#pragma unroll
  for (int b = 0; b < 4; b++) {
    const vd_philox_words words = vd_draw_words(d.keys, call + (uint64_t)(4 * b));
#pragma unroll
    for (int u = 0; u < 4; u++) bits[u % 2] = 2 * bits[u % 2] + vd_kept_halves(words.v[u], d.threshold);
  }
  d.words[row * (d.width / 32) + w] = __byte_perm(bits[0], bits[1], 0x6420);
}

/* The mask of the pair u of block b: all bits of each half that is kept. */
static __device__ __forceinline__ uint32_t vd_unit_pair_mask(uint32_t word, int b, int u) {
  return vd_sign_mask(word << (2 * b + u / 2), u % 2);
}

#endif
