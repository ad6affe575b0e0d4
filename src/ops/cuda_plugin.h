/* The CUDA part of the program: a shared library, libviaduct_cuda.so, that is loaded while the program runs, so that a
 * binary starts on nodes without driver or CUDA libraries. It exports one symbol, vd_cuda, a table of functions.
 * Nothing in it includes MPI calls or HDF5. */
#ifndef VD_CUDA_PLUGIN_H
#define VD_CUDA_PLUGIN_H

#include "src/ops/nccl_plugin.h"
#include "src/ops/ops.h"

typedef struct vd_gpu {
  char name[128];
  unsigned char uuid[16];
  size_t free_bytes, total_bytes;
  int major, minor;    /* compute capability */
  int driver, runtime; /* CUDA versions, as 1000 major + 10 minor */
  int multiprocessors;
  double peak; /* dense FLOP/s of the tensor cores in bf16 and fp16 by the maker's figures; 0: not known */
} vd_gpu;

/* Heads that the kernels take: so many, and so wide. */
enum { VD_CUDA_MOST_HEADS = 128, VD_CUDA_WIDEST_HEAD = 128 };

enum { VD_CUDA_INTERFACE = 4 };

typedef struct vd_cuda_plugin {
  int interface_version; /* VD_CUDA_INTERFACE: program and library were built together */
  /* Number of GPUs that the process sees, at least 1. VD_FAILED where there is no driver, it is too old or it shows no
   * GPU, saying which. */
  int (*count)(int *n, vd_error *err);
  /* Describes GPU `device`. Makes its context, which the free memory needs. */
  int (*describe)(int device, vd_gpu *gpu, vd_error *err);
  /* The backend on GPU `device`. Free with o->destroy(o). VD_FAILED for devices that the kernels were not built for. */
  int (*ops)(vd_ops **o, int device, enum vd_precision precision, vd_error *err);
  /* Stream-ordered. For those who time ops: mark `i` (0 ..) is set, again if it was set before. */
  void (*event_record)(vd_ops *o, int i);
  /* ms from mark i to mark j, which have been set. Waits for j. */
  double (*event_elapsed)(vd_ops *o, int i, int j);
  /* Sums over GPUs. The functions are there also where NCCL is not: they say so. */
  const vd_nccl_plugin *(*nccl)(void);
} vd_cuda_plugin;

#endif
