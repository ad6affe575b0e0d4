/* What comes of an update where its gradients are, and how it comes to the host. Host programs and kernels share it. */
#ifndef VD_UPDATE_STATS_H
#define VD_UPDATE_STATS_H

#include <stddef.h>

/* What `gradient_stats` finds of an update's gradients: double [VD_STATS_TENSORS + n_tensor] in the backend's memory,
 * from where the optimiser's ops read it, so that the host need not wait. */
enum {
  VD_STATS_NORM2,     /* sum of the squares of all gradients */
  VD_STATS_SCALE,     /* what gradients are to be multiplied by: the scale, and the clip of the global norm */
  VD_STATS_NONFINITE, /* -1; or the first tensor with gradients that are not finite: then the update changes nothing */
  VD_STATS_TENSORS    /* of each tensor from here on: sum of the squares of its gradients times the factor */
};

/* A piece of the backend's memory that a slot to the host encloses; bytes: a multiple of 4. */
typedef struct vd_stats_part {
  const void *p;
  size_t bytes;
} vd_stats_part;
enum { VD_PINNED_SLOTS = 4, VD_STATS_PARTS = 4 };

#endif
