/* Limits of the CUDA attention kernels, which the program checks before it chooses a GPU. Host and kernels include this
 * file. */
#ifndef VD_CUDA_LIMITS_H
#define VD_CUDA_LIMITS_H

enum {
  VD_CUDA_MAX_HEADS = 128, /* heads of a layer */
  VD_CUDA_MAX_D_HEAD = 128 /* elements of a head */
};

#endif
