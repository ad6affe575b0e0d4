/* Gradient all-reduces by NCCL, one rank per GPU: the part of libviaduct_cuda.so's table that concerns NCCL. The names
 * are those of NCCL's own functions. NCCL's library, libnccl.so.2, is loaded when the first function here is called.
 * `abort` and `async_error` may be called on a second thread while another function runs; all others belong to one
 * thread. */
#ifndef VD_NCCL_PLUGIN_H
#define VD_NCCL_PLUGIN_H

#include "src/ops/ops.h"

typedef struct vd_nccl vd_nccl; /* a communicator, its stream and its events */
typedef struct vd_nccl_id {
  char bytes[128];
} vd_nccl_id;

/* One all-reduce of an update. Times in milliseconds since the update's last backward pass began, on the GPU's clock.
 */
typedef struct vd_all_reduce_times {
  size_t first, n;   /* elements of the arena */
  double ready;      /* its gradients are final */
  double start, end; /* of the all-reduce; includes the wait for other ranks */
} vd_all_reduce_times;

typedef struct vd_nccl_plugin {
  /* Not collective. NCCL's version, as 10000 major + 100 minor + patch. Turns NVLink multicast off for the process
   * (NCCL_NVLS_ENABLE=0) unless the environment sets it. VD_FAILED where libnccl.so.2 cannot be loaded or is too old.
   */
  int (*version)(int *version, vd_error *err);
  /* Not collective. A unique id for a communicator: one rank makes it and sends it to the others. */
  int (*unique_id)(vd_nccl_id *id, vd_error *err);
  /* Collective (ranks of the id). Makes the communicator of `size` ranks on the GPU of o, and checks one all-reduce. o
   * must outlive it. Waits for the other ranks without a limit. Free with destroy, or with abort and then destroy. */
  int (*init)(vd_nccl **n, vd_ops *o, const vd_nccl_id *id, int rank, int size, vd_error *err);
  /* Stream-ordered. Begins an update: the times of its all-reduces count from here. Those of the previous update stay
   * readable. */
  void (*begin_update)(vd_nccl *n);
  /* Collective (ranks of the communicator), stream-ordered. Adds arena[first .. first + count) over the ranks, in
   * place, on the communicator's own stream, after the work that the backend's stream holds now. */
  int (*all_reduce)(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err);
  /* Stream-ordered. Makes the backend's stream wait for the update's all-reduces enqueued so far. The host does not
   * wait. */
  void (*wait_all_reduces)(vd_nccl *n);
  /* Not collective. Fills *err where NCCL reports an asynchronous error. Returns at once. Any thread. */
  void (*async_error)(vd_nccl *n, vd_error *err);
  /* Not collective. Number of all-reduces of the update `before` the current one (0 or 1). */
  int (*count)(const vd_nccl *n, int before);
  /* Not collective. Times of all-reduce i of that update; false while it runs. Does not wait. */
  bool (*times)(const vd_nccl *n, int before, int i, vd_all_reduce_times *t);
  /* Not collective. Aborts the all-reduces that run; the arena's contents are then undefined. Any thread. May hang. */
  void (*abort)(vd_nccl *n);
  /* Collective (ranks of the communicator), unless aborted. Waits for the all-reduces that run, then frees. NULL is
   * allowed. */
  void (*destroy)(vd_nccl *n);
} vd_nccl_plugin;

#endif
