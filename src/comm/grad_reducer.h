/* The gradient all-reduce, one interface for MPI in host memory, MPI through host memory for GPUs, and NCCL between
 * GPUs while the backward pass still runs. In each update: begin, ready for each range of final gradients, finish; the
 * exposed time of an update can be read once its work is done, also after the next update has begun. */
#ifndef VD_GRAD_REDUCER_H
#define VD_GRAD_REDUCER_H

#include "src/comm/device.h"
#include "src/comm/watchdog.h"

typedef struct vd_grad_reducer_config {
  enum vd_comm comm;          /* VD_COMM_MPI or VD_COMM_NCCL */
  const vd_nccl_plugin *nccl; /* with VD_COMM_NCCL */
  size_t bucket;        /* bytes of gradients that are summed at once, at least; in MPI through host memory at most */
  double timeout;       /* seconds that a wait for other ranks may take; 0: no limit */
  const char *timeline; /* file for the times of rank 0 in the updates 11 to 20 of the reducer; "": none. Borrowed */
} vd_grad_reducer_config;

typedef struct vd_grad_reducer vd_grad_reducer;

/* Collective(comm). A reducer of the gradients [n], in o's memory, zeros still. comm, o and gradients must outlive it.
 * The error is agreed. A rank that does not come within the timeout ends the run (watchdog.h). */
int vd_grad_reducer_create(vd_grad_reducer **out, MPI_Comm comm, const vd_grad_reducer_config *config, vd_ops *o,
                           real *gradients, size_t n, vd_error *err);
/* Not collective. From here to vd_grad_reducer_disarm_watchdog other ranks are waited for, for `what` of the update:
 * not longer than the timeout. The functions below do so themselves. */
void vd_grad_reducer_arm_watchdog(vd_grad_reducer *r, const char *what);
/* Not collective. The same for the gradient sum of update `update`, of which a GPU may be waited for. */
void vd_grad_reducer_arm_all_reduce(vd_grad_reducer *r, int64_t update);
/* Not collective. The wait is over. */
void vd_grad_reducer_disarm_watchdog(vd_grad_reducer *r);
/* Not collective. Update `update`, counted from 1, begins: no gradient is final. */
void vd_grad_reducer_begin(vd_grad_reducer *r, int64_t update);
/* Stream-ordered. With NCCL also collective, in the order of calls. A vd_gradients_ready (model.h);
 * `reducer` is the vd_grad_reducer. Whole buckets go on their way. Errors are kept for vd_grad_reducer_check. */
void vd_grad_reducer_ready(void *reducer, size_t first, size_t n);
/* Not collective. What has gone wrong so far on this rank. */
int vd_grad_reducer_check(const vd_grad_reducer *r, vd_error *err);
/* Collective(comm). Sums n doubles in place, all ranks get the same bits; a rank that does not come ends the run. */
void vd_grad_reducer_all_reduce_scalars(vd_grad_reducer *r, double *x, int n);
/* Collective(comm). Stream-ordered. After vd_grad_reducer_ready has told of all gradients: what is enqueued in o
 * afterwards finds their sums over the ranks. All ranks get the same bits, in a fixed order for a given number of
 * ranks. With NCCL the wait is the GPU's: who waits for the GPU says so by vd_grad_reducer_arm_all_reduce. */
void vd_grad_reducer_finish(vd_grad_reducer *r);
/* Not collective. Seconds that update `update` waited for its all-reduce: with MPI all of it, with NCCL from the end of
 * the backward pass to the end of the last bucket, by the GPU's clock. `update` is the last that began or the one
 * before it, and the backend has completed its work. Call it once for each update, in their order: it also writes the
 * update's lines of the timeline; an error of that file is kept for vd_grad_reducer_check. */
double vd_grad_reducer_exposed_seconds(vd_grad_reducer *r, int64_t update);
/* Not collective. Some rank failed: sums under way are given up, and the reducer is good for vd_grad_reducer_destroy
 * only.
 */
void vd_grad_reducer_abort(vd_grad_reducer *r);
/* Collective(comm). Not so after vd_grad_reducer_abort. NULL is allowed. */
void vd_grad_reducer_destroy(vd_grad_reducer *r);

#endif
