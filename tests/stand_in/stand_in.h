/* Stand-ins for NCCL (a libnccl.so.2 in one process, as one rank sees it) and for CUDA's runtime, so that
 * cuda/backend/nccl.c runs where there is no GPU. They check the order of calls and keep a record. */
#ifndef VD_STAND_IN_H
#define VD_STAND_IN_H

#include <stdbool.h>
#include <stddef.h>

/* What the library does, and what was asked of it. The library's function stand_in_state() gives its only one. */
typedef struct stand_in {
  int version;
  bool symmetric;         /* GPUs have symmetric memory: a window is in device memory */
  int failing_alloc;      /* ncclMemAlloc fails when this number, counted down, is 0; negative: never */
  int failing_register;   /* the same for ncclCommWindowRegister */
  void *registered[2];    /* the last two */
  int n_alloc, n_free;    /* of ncclMemAlloc and ncclMemFree */
  char calls[64];         /* one mark for each: A all-reduce, R reduce-scatter, G all-gather, w register, u deregister,
                             f finalize, d destroy, x abort */
  void *(*alloc)(size_t); /* device memory of the CUDA stand-in */
  void (*free)(void *);
} stand_in;

/* Device memory of the CUDA stand-in, which cudaFree frees. */
void *stand_in_device_memory(size_t bytes);
/* Objects of the CUDA stand-in that were not freed: memory, streams, events. */
int stand_in_live(void);

#endif
