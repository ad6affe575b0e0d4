/* Limits of the CUDA kernels, which the program checks before it chooses a GPU or makes a model, and sizes of what they
 * keep, which its memory estimate counts. Host and kernels include this file. */
#ifndef VD_CUDA_LIMITS_H
#define VD_CUDA_LIMITS_H

#include <stdint.h>

enum {
  VD_CUDA_MAX_HEADS = 128,    /* heads of a layer */
  VD_CUDA_MAX_D_HEAD = 128,   /* elements of a head */
  VD_CUDA_MAX_STREAMS = 65535 /* streams of a call: dimensions y and z of a grid */
};
/* Bytes that the 16-bit kernels keep for a pair of 64 queries and 64 keys, dropout mask and weights, and the most that
 * weights take unless one stream needs more. */
enum { VD_CUDA_MASK_BYTES = 64 * 64 / 8, VD_CUDA_WEIGHT_BYTES = 64 * 64 * 2, VD_CUDA_WEIGHT_LIMIT = 512 << 20 };

/* Not collective. The longest window of memory rows whose keys and values, 2 * width elements a row, have 32-bit
 * offsets; the kernels may form those of two tiles of 64 rows more. width > 0. */
static inline int64_t vd_cuda_max_window(int64_t width) {
  return INT32_MAX / (2 * width) - 2 * 64;
}
/* Not collective. The same of a block, whose queries, keys and values are 3 * width elements a row. */
static inline int64_t vd_cuda_max_block(int64_t width) {
  return INT32_MAX / (3 * width) - 2 * 64;
}

#endif
