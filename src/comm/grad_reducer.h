/* The gradient all-reduce, one interface for MPI in host memory, MPI through host memory for GPUs, and NCCL between
 * GPUs while the backward pass still runs. In each update: begin, ready for each range of final gradients, finish; the
 * exposed time of an update can be read once its work is done, also after the next update has begun.
 *
 * With config->shard the optimizer is sharded over the ranks (shard.h; ZeRO stage 1, arXiv 1910.02054): gradients are
 * reduce-scattered, each rank steps its chunks, and the new weights are all-gathered. With NCCL the all-gather overlaps
 * with the next forward pass, and it moves the copy that products read: the fp32 parameters and the optimizer's state
 * are then up to date in each rank's own chunks alone, until vd_grad_reducer_gather. */
#ifndef VD_GRAD_REDUCER_H
#define VD_GRAD_REDUCER_H

#include "src/comm/device.h"
#include "src/comm/shard.h"
#include "src/comm/watchdog.h"
#include "src/model/optimizer.h"

typedef struct vd_grad_reducer_config {
  enum vd_comm comm;          /* VD_COMM_MPI or VD_COMM_NCCL */
  const vd_nccl_plugin *nccl; /* with VD_COMM_NCCL */
  size_t bucket;              /* bytes of a gradient bucket: NCCL at least, MPI through host memory at most */
  bool shard;                 /* with several ranks: shard the optimizer */
  double timeout;             /* seconds that a wait for other ranks may take; 0: no limit */
  const char *timeline; /* file for the times of rank 0 in the updates 11 to 20 of the reducer; "": none. Borrowed */
} vd_grad_reducer_config;

typedef struct vd_grad_reducer vd_grad_reducer;

/* Not collective. The bucket, in bytes, of device%bucket_bytes = 0. one_node: all ranks are on one node. */
size_t vd_grad_reducer_default_bucket(const vd_grad_reducer_config *config, bool one_node);

/* The arenas that are exchanged, in the backend's memory; borrowed. */
typedef struct vd_grad_reducer_arenas {
  real *gradients;      /* [n] zeros still; n = shape.n */
  real *params;         /* [n] the same on all ranks; used with config->shard alone, else NULL is allowed */
  vd_shard_arena shape; /* its other members are used with config->shard alone */
} vd_grad_reducer_arenas;

/* Collective(comm). A reducer for arenas in o's memory. comm, o and the arenas must outlive it. The error is agreed. A
 * rank that does not come within the timeout ends the run (watchdog.h). */
int vd_grad_reducer_create(vd_grad_reducer **out, MPI_Comm comm, const vd_grad_reducer_config *config, vd_ops *o,
                           const vd_grad_reducer_arenas *arenas, vd_error *err);
/* Not collective. The arenas of a model in training. */
vd_grad_reducer_arenas vd_grad_reducer_arenas_of(vd_model *m);
/* Not collective. True where the optimizer is sharded: config->shard, several ranks, and an arena that is large enough
 * (shard.h). */
bool vd_grad_reducer_is_sharded(const vd_grad_reducer *r);
/* Not collective. Gives o, the optimizer of m, this rank's shard; does nothing where it is not sharded. r must outlive
 * o's steps. */
void vd_grad_reducer_shard_optimizer(vd_grad_reducer *r, const vd_model *m, vd_optimizer *o);
/* Not collective. From here to vd_grad_reducer_disarm_watchdog this rank waits for other ranks, for `what` of the
 * update; the watchdog ends the run after the timeout. The functions below arm and disarm it themselves. */
void vd_grad_reducer_arm_watchdog(vd_grad_reducer *r, const char *what);
/* Not collective. The same around a wait for the GPU, which may itself wait for the all-reduce of update `update`. */
void vd_grad_reducer_arm_all_reduce(vd_grad_reducer *r, int64_t update);
/* Not collective. Ends the wait. */
void vd_grad_reducer_disarm_watchdog(vd_grad_reducer *r);
/* Not collective. Update `update`, counted from 1, begins: no gradient is final. */
void vd_grad_reducer_begin(vd_grad_reducer *r, int64_t update);
/* Stream-ordered. With NCCL also collective, in the order of calls. A vd_gradients_ready (model.h);
 * `reducer` is the vd_grad_reducer. Starts the all-reduce of each bucket that is full. Errors are kept for
 * vd_grad_reducer_check. */
void vd_grad_reducer_ready(void *reducer, size_t first, size_t n);
/* Stream-ordered. A vd_weights_needed (model.h); `reducer` is the vd_grad_reducer. With NCCL and a sharded optimizer
 * the backend's stream waits for the all-gathers of these weights. The host does not wait. */
void vd_grad_reducer_needed(void *reducer, size_t first, size_t n);
/* Stream-ordered. The same for all weights, before others than the training pass use them. */
void vd_grad_reducer_all_needed(vd_grad_reducer *r);
/* Collective(comm). Before a checkpoint: `arena`, the parameters or an optimizer state, becomes whole on all ranks.
 * Waits for the backend. Does nothing where the optimizer is not sharded. The error is agreed. */
int vd_grad_reducer_gather(vd_grad_reducer *r, real *arena, vd_error *err);
/* Not collective. The first error of an operation of this rank, else of its timeline, if any. */
int vd_grad_reducer_check(const vd_grad_reducer *r, vd_error *err);
/* Not collective. The first error of an operation, for which other ranks may wait, and not one of the timeline. */
int vd_grad_reducer_check_operations(const vd_grad_reducer *r, vd_error *err);
/* Collective(comm). Sums n doubles in place, all ranks get the same bits; a rank that does not come ends the run. */
void vd_grad_reducer_all_reduce_scalars(vd_grad_reducer *r, double *x, int n);
/* Collective(comm). Stream-ordered. To be called after vd_grad_reducer_ready for all gradients: ops that are enqueued
 * afterwards read the sums over the ranks; where the optimizer is sharded, in the common part and in this rank's chunks
 * alone. All ranks get the same bits, in a fixed order for a given number of ranks.
 * With NCCL the GPU waits, not the host: a later wait for the GPU is put under the watchdog by
 * vd_grad_reducer_arm_all_reduce. */
void vd_grad_reducer_finish(vd_grad_reducer *r);
/* Not collective. Seconds that update `update` waited for other ranks: with MPI all of its all-reduce, with NCCL from
 * the end of the backward pass to the end of the last bucket, by the GPU's clock. With a sharded optimizer the
 * all-reduce of the norms is added, and the all-gather of weights: with MPI all of it, with NCCL the waits in the
 * forward pass of `update`, for weights that the update before it made. `update` is the last that began or the one
 * before it, and the backend has completed its work. Call it once for each update, in their order: it also writes the
 * update's lines of the timeline; an error of that file is kept for vd_grad_reducer_check. */
double vd_grad_reducer_exposed_seconds(vd_grad_reducer *r, int64_t update);
/* Collective(comm). Some rank failed in update `update`, counted from 1 (0: before the first update): ends the sums
 * that are in flight. NCCL aborts them, but for those in symmetric memory, which complete once all ranks have started
 * them: this rank then starts the sums of the update that it has not started, and waits. Where it cannot, its GPU or
 * NCCL has failed: VD_FAILED on this rank alone, for which the others wait, so that the caller ends them. Only the
 * watchdog's functions and vd_grad_reducer_destroy may follow. */
int vd_grad_reducer_abort(vd_grad_reducer *r, int64_t update, vd_error *err);
/* Collective(comm). NULL is allowed. */
void vd_grad_reducer_destroy(vd_grad_reducer *r);

#endif
