/* What comes of an update where its gradients are, and how it comes to the host. Host programs and kernels share it. */
#ifndef VD_OUTCOME_H
#define VD_OUTCOME_H

#include <stddef.h>

/* What `judge` finds of an update's gradients: double [VD_NORMS + n_tensor] in the backend's memory, from where the
 * optimiser's ops read it, so that the host need not wait. */
enum {
  VD_TOTAL,    /* sum of the squares of all gradients */
  VD_FACTOR,   /* what gradients are to be multiplied by: the scale, and the clip of the global norm */
  VD_LEFT_OUT, /* -1; or the first tensor with gradients that are not finite: then the update changes nothing */
  VD_NORMS     /* of each tensor from here on: sum of the squares of its gradients times the factor */
};

/* A piece of the backend's memory that a letter to the host encloses; bytes: a multiple of 4. */
typedef struct vd_enclosure {
  const void *p;
  size_t bytes;
} vd_enclosure;
enum { VD_LETTERS = 4, VD_ENCLOSURES = 4 };

#endif
