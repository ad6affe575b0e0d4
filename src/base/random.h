/* Counter-based random numbers (Philox 4x32-10, Salmon et al., SC'11, from Random123). There is no generator state:
 * a number is a function of seed, update, layer, site and GLOBAL element position, never of a rank, so that
 * a run draws the same numbers on any number of ranks and on CPU and GPU. rng.h has the types. */
#ifndef VD_RANDOM_H
#define VD_RANDOM_H

#include "src/base/rng.h"

#include <Random123/philox.h>

/* Not collective. The four 32-bit words of counter `call`. */
R123_CUDA_DEVICE R123_STATIC_INLINE philox4x32_ctr_t vd_philox(vd_rng rng, uint64_t call) {
  philox4x32_ctr_t counter = {
      {(uint32_t)call, (uint32_t)(call >> 32), rng.update, (uint32_t)rng.layer | ((uint32_t)rng.site << 16)}};
  philox4x32_key_t key = {{(uint32_t)rng.seed, (uint32_t)(rng.seed >> 32)}};
  return philox4x32(counter, key);
}

/* Not collective. The 16 bits of lane 0..7 of a call. The element is dropped where they are below the threshold. */
R123_CUDA_DEVICE R123_STATIC_INLINE uint32_t vd_dropout_half(philox4x32_ctr_t words, int lane) {
  return (words.v[lane >> 1] >> ((lane & 1) * 16)) & 0xffffU;
}

/* Not collective. Uniform in (0,1), from 32 bits: never 0 nor 1. */
R123_CUDA_DEVICE R123_STATIC_INLINE double vd_uniform(uint32_t word) {
  return ((double)word + 0.5) / 4294967296.0;
}

#endif
