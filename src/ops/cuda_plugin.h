/* The table of functions that libviaduct_cuda.so exports as its only symbol, vd_cuda. src/comm/device.c loads the
 * library at run time, so the program starts on nodes without a driver or CUDA libraries. The library calls neither MPI
 * nor HDF5. */
#ifndef VD_CUDA_PLUGIN_H
#define VD_CUDA_PLUGIN_H

#include "src/ops/cuda_limits.h"
#include "src/ops/nccl_plugin.h"
#include "src/ops/ops.h"

typedef struct vd_gpu {
  char name[128];
  unsigned char uuid[16];
  size_t free_bytes, total_bytes;
  int major, minor;    /* compute capability */
  int driver, runtime; /* CUDA versions, as 1000 major + 10 minor */
  int multiprocessors;
  double peak; /* dense bf16 FLOP/s of the tensor cores, from NVIDIA's data sheet; 0: unknown */
} vd_gpu;

typedef struct vd_cuda_plugin {
  /* VD_CUDA_INTERFACE, a checksum of this file and the headers that it includes, from the Makefile: the library was
   * built from the same headers as the program. Stays the first member. */
  unsigned interface_version;
  /* Not collective. Number of GPUs visible to the process, at least 1. VD_FAILED, with the reason, where there is no
   * driver, the driver is too old or no GPU is visible. */
  int (*count)(int *n, vd_error *err);
  /* Not collective. Describes GPU `device`. Creates its CUDA context, since free_bytes depends on it. */
  int (*describe)(int device, vd_gpu *gpu, vd_error *err);
  /* Not collective. Makes the backend on GPU `device`. Free with o->destroy(o). VD_FAILED for a compute capability that
   * the kernels were not built for. */
  int (*ops)(vd_ops **o, int device, enum vd_precision precision, vd_error *err);
  /* Stream-ordered. Records timing event `i` (0 ..) in the backend's stream; replaces an earlier record. */
  void (*event_record)(vd_ops *o, int i);
  /* Not collective. Milliseconds from event i to event j, both recorded. Waits for j. */
  double (*event_elapsed)(vd_ops *o, int i, int j);
  /* Not collective. The NCCL table. Never NULL: its functions fail, with the reason, where NCCL cannot be loaded. */
  const vd_nccl_plugin *(*nccl)(void);
} vd_cuda_plugin;

#endif
