/* Which backend computes, and on which GPU: the CUDA part is a library that is loaded at run time. */
#ifndef VD_BACKEND_H
#define VD_BACKEND_H

#include "context.h"
#include "cuda_table.h"
#include "model.h"

/* What a rank computes on. */
typedef struct vd_device {
  bool is_gpu;
  int local_rank, local_size; /* ranks of this node */
  int number, count;          /* the GPU, and how many this node shows */
  bool shared;                /* some rank shares a GPU with another */
  int n_gpu;                  /* different GPUs of all ranks */
  int gpus;                   /* different ones of all ranks */
  enum vd_precision precision;
  vd_gpu gpu;
  int threads;       /* OpenMP threads of the rank */
  char notice[1200]; /* what the user should know of the choice; "": nothing */
} vd_device;

/* Collective(ctx->comm). Chooses the backend of device%backend and device%precision and makes its ops: *ops, to be
 * freed with (*ops)->destroy(*ops). Fills *d. All ranks compute on the same kind of device. Local ranks take the node's
 * GPUs in turn and share them where there are more ranks than GPUs; d->notice then says so, or why 'auto' takes the
 * CPU. VD_FAILED where 'cuda' is asked for and cannot be had, with the reason; VD_USAGE for a precision that the CPU
 * does not compute in. The error is agreed. */
int vd_backend_open(vd_context *ctx, const vd_settings *s, vd_ops **ops, vd_device *d, vd_error *err);

#endif
