/* Gradient statistics of an update, and the parts of an async copy that brings them to the host. Host and kernels
 * include this file. */
#ifndef VD_UPDATE_STATS_H
#define VD_UPDATE_STATS_H

#include <stddef.h>

/* Layout of what vd_ops.gradient_stats writes: double [VD_STATS_TENSORS + n_tensor] in the backend's memory. The
 * optimiser's ops read it there, so the host need not wait for it. */
enum {
  VD_STATS_NORM2,     /* squared global norm of the gradients, before scaling */
  VD_STATS_SCALE,     /* the optimiser's factor of the gradients: the caller's scale and the clip of the global norm */
  VD_STATS_NONFINITE, /* -1, or the index of the first tensor with a non-finite gradient: the step is then skipped */
  VD_STATS_TENSORS    /* from here on: for each tensor, the squared norm of its gradient times the factor */
};

/* A contiguous part of the backend's memory that push_stats copies to a pinned slot. bytes is a multiple of 4. */
typedef struct vd_stats_part {
  const void *p;
  size_t bytes;
} vd_stats_part;
enum { VD_PINNED_SLOTS = 4, VD_STATS_PARTS = 4 };

#endif
