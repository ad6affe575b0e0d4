/* An argument of vd_ops.memory_ring_push (ops.h), apart for the kernels. */
#ifndef VD_RING_PUSH_H
#define VD_RING_PUSH_H

#include <stdint.h>

/* A ring buffer [n_stream, rows, d] of activations, and the block that it takes. */
typedef struct vd_ring_push {
  void *memory;
  const void *hidden;
  int64_t rows, oldest;
} vd_ring_push;

#endif
