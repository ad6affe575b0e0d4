/* The choice of the backend and of each rank's GPU. The CUDA part is a library that is loaded at run time. */
#ifndef VD_DEVICE_H
#define VD_DEVICE_H

#include "src/comm/context.h"
#include "src/deck/settings.h"
#include "src/model/model.h"
#include "src/ops/cuda_plugin.h"

/* What a rank computes on. */
typedef struct vd_device {
  bool is_gpu;
  int local_rank, local_size; /* ranks of this node */
  bool one_node;              /* all ranks are on it */
  int number, count;          /* the GPU, and how many this node shows */
  bool shared;                /* some rank shares a GPU with another */
  int n_gpu;                  /* different GPUs of all ranks */
  enum vd_precision precision;
  vd_gpu gpu;
  const vd_cuda_plugin *cuda; /* where is_gpu */
  int threads;                /* OpenMP threads of the rank */
  char notice[1200];          /* what the user should know of the choice; "": nothing */
  char sharing[512];          /* where `shared`: which ranks have which GPU together */
  enum vd_comm comm;          /* of vd_device_choose_comm */
  int nccl_version;           /* with VD_COMM_NCCL: 10000 major + 100 minor + patch */
  char comm_notice[1200];     /* why MPI and not NCCL all-reduces gradients although GPUs compute; "": no notice */
} vd_device;

/* Not collective. VD_FAILED, with the reason, where the GPU's kernels do not take the heads of this model,
 * or windows as long as its own may become. */
int vd_device_supports(enum vd_precision precision, const vd_model_config *c, vd_error *err);

/* Collective(ctx->comm). Chooses the backend of device%backend and device%precision for this model and makes its ops:
 * *ops, to be freed with (*ops)->destroy(*ops). Fills *d. All ranks compute on the same kind of device. Local ranks
 * take the node's GPUs in turn and share them where there are more ranks than GPUs; d->notice then says so, or why
 * 'auto' takes the CPU. VD_FAILED where 'cuda' is asked for and cannot be had, with the reason; VD_USAGE for a
 * precision that the CPU does not compute in. All ranks return the same error. */
int vd_device_open(vd_context *ctx, const vd_settings *s, const vd_model_config *model, vd_ops **ops, vd_device *d,
                   vd_error *err);

/* Collective(ctx->comm). After vd_device_open: chooses d->comm by device%comm. 'nccl' needs libnccl.so.2 and a GPU of
 * its own for every rank; VD_FAILED otherwise, with the reason, naming ranks and GPUs. 'auto' falls back to MPI and
 * puts the reason into d->comm_notice; with one rank, and on CPUs, it takes MPI without a notice. All ranks return the
 * same error.
 */
int vd_device_choose_comm(vd_context *ctx, const vd_settings *s, vd_device *d, vd_error *err);

#endif
