/* Sums over GPUs by NCCL, one rank a GPU: what libviaduct_cuda.so offers of it. NCCL's own library, libnccl.so.2, is
 * loaded when it is asked for. The functions may be called on two threads at once. */
#ifndef VD_NCCL_PLUGIN_H
#define VD_NCCL_PLUGIN_H

#include "src/ops/ops.h"

typedef struct vd_nccl vd_nccl;
typedef struct vd_nccl_id {
  char bytes[128];
} vd_nccl_id;

/* One sum of an update, milliseconds since its last backward pass began, on the GPU's clock. */
typedef struct vd_all_reduce_times {
  size_t first, n;   /* elements of the arena */
  double ready;      /* its gradients were final */
  double start, end; /* of the sum, the wait for other ranks included */
} vd_all_reduce_times;

typedef struct vd_nccl_plugin {
  /* Not collective. NCCL's version, as 10000 major + 100 minor + patch. Turns NVLink multicast off for the process
   * (NCCL_NVLS_ENABLE=0), unless the environment says something else. VD_FAILED where libnccl.so.2 cannot be loaded or
   * is too old. */
  int (*version)(int *version, vd_error *err);
  /* Not collective. A name for a group of ranks that none other has. */
  int (*new_id)(vd_nccl_id *id, vd_error *err);
  /* Collective (ranks of the id). Joins the group as `rank` of `size` on the GPU of o, and tries a sum. o must outlive
   * it. Waits for the others as long as it takes. Free with close, or abort and close. */
  int (*open)(vd_nccl **n, vd_ops *o, const vd_nccl_id *id, int rank, int size, vd_error *err);
  /* Stream-ordered. An update's last backward pass begins: its times count from here. Those of the update before it are
   * kept. */
  void (*begin)(vd_nccl *n);
  /* Collective (ranks of the group), stream-ordered. Sums arena[first .. first + count) over the ranks, in place, on a
   * stream of its own after what is enqueued on the backend's now. */
  int (*sum)(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err);
  /* Stream-ordered. What is enqueued on the backend from now on waits for the sums so far. */
  void (*join)(vd_nccl *n);
  /* Not collective. Has something gone wrong in a sum? Also on another thread. */
  void (*look)(vd_nccl *n, vd_error *err);
  /* Not collective. Sums of the update `before` the last that began (0 or 1). */
  int (*count)(const vd_nccl *n, int before);
  /* Not collective. Times of its sum i; false where it is not over. Does not wait. */
  bool (*times)(const vd_nccl *n, int before, int i, vd_all_reduce_times *t);
  /* Not collective. Gives up all sums under way, which leave anything in the arena. Also on another thread. May hang.
   */
  void (*abort)(vd_nccl *n);
  /* Collective (ranks of the group), unless aborted. Waits for the sums under way; NULL is allowed. */
  void (*close)(vd_nccl *n);
} vd_nccl_plugin;

#endif
