/* Which random numbers a site of a layer draws, and the threshold of dropout: the types of random.h without Random123,
 * whose header takes nvcc four seconds to read. */
#ifndef VD_RNG_H
#define VD_RNG_H

#include <stdint.h>

#ifdef __CUDACC__
#define VD_HOST_DEVICE __host__ __device__
#else
#define VD_HOST_DEVICE
#endif

/* Where in a layer a number is used. */
enum vd_site {
  VD_SITE_INIT = 1,
  VD_SITE_EMBED = 2,
  VD_SITE_ATTENTION = 3,
  VD_SITE_HIDDEN = 4,
  VD_SITE_SAMPLE = 5,
  VD_SITE_POSITION = 6,    /* sinusoidal position encodings: row = distance, the same for all streams and layers */
  VD_SITE_ATTENDED = 7,    /* attention's branch before the residual sum */
  VD_SITE_FED_FORWARD = 8, /* the feed-forward branch */
  VD_SITE_OUTPUT = 9       /* output of the last layer */
};

/* The key of all numbers of one site of one layer in one update. */
typedef struct vd_rng {
  uint64_t seed;
  uint32_t update;
  uint16_t layer;
  uint16_t site;
} vd_rng;

/* Dropout of one site: p = 0 turns it off. row0 = global number of the first row (row-major sites) or of the
 * first stream (attention). */
typedef struct vd_dropout {
  double p;
  vd_rng rng;
  int64_t row0;
} vd_dropout;

/* Not collective. The threshold of dropout with probability p: round(p * 65536).
 *
 * One call of vd_philox serves 8 elements, 16 bits each: element `lane` (0..7) of a call uses the low (even lane) or
 * high (odd lane) half of word lane/2, and is dropped when that half is below the threshold. Kept elements are scaled
 * by 65536 / (65536 - threshold), so that the expectation is exact.
 *
 * Row-major sites (embedding, hidden units): element e = row * width + column, row = global stream * block + position;
 * call = e / 8, lane = e % 8.
 *
 * Attention weights: query i of the block (0..M-1), key j >= 0 counted from attn_span (rounded up to 16)
 * before the block's first token. Calls cover 16 x 16 tiles as tensor cores hold them: tile = ((stream * H + head) *
 * ceil(M/16) + i/16) * ((Lr + Mr)/16) + j/16, with Lr, Mr rounded up to 16; call = tile * 32 + (i%8) * 4 + (j%8)/2;
 * lane = (j%2) + 2 * ((j/8)%2) + 4 * ((i/8)%2). */
VD_HOST_DEVICE static inline uint32_t vd_dropout_threshold(double p) {
  return (uint32_t)(p * 65536.0 + 0.5);
}
/* Not collective. The scale of kept elements, 65536 / (65536 - threshold). */
VD_HOST_DEVICE static inline double vd_dropout_scale(uint32_t threshold) {
  return 65536.0 / (65536.0 - (double)threshold);
}

#endif
