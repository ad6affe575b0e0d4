/* Gradient all-reduces, and the exchange of a sharded optimizer, by NCCL, one rank per GPU: the part of
 * libviaduct_cuda.so's table that concerns NCCL. The names are those of NCCL's own functions. NCCL's library,
 * libnccl.so.2, is loaded when the first function here is called. `abort` and `async_error` may be called on a second
 * thread while another function runs; all others belong to one thread. */
#ifndef VD_NCCL_PLUGIN_H
#define VD_NCCL_PLUGIN_H

#include "src/ops/ops.h"

typedef struct vd_nccl vd_nccl; /* a communicator, its stream and its events */
typedef struct vd_nccl_id {
  char bytes[128];
} vd_nccl_id;

/* One all-reduce or reduce-scatter of gradients. Times in milliseconds since the update's last backward pass began, on
 * the GPU's clock. */
typedef struct vd_all_reduce_times {
  size_t first, n;   /* elements of the arena */
  bool scattered;    /* a reduce-scatter */
  double ready;      /* its gradients are final */
  double start, end; /* of the operation; includes the wait for other ranks */
} vd_all_reduce_times;

typedef struct vd_nccl_plugin {
  /* Not collective. NCCL's version, as 10000 major + 100 minor + patch. Turns NVLink multicast off for the process
   * (NCCL_NVLS_ENABLE=0) unless the environment sets it. VD_FAILED where libnccl.so.2 cannot be loaded or is too old.
   */
  int (*version)(int *version, vd_error *err);
  /* Not collective. A unique id for a communicator: one rank makes it and sends it to the others. */
  int (*unique_id)(vd_nccl_id *id, vd_error *err);
  /* Collective (ranks of the id). Makes the communicator of `size` ranks on the GPU of o, and checks one all-reduce. o
   * must outlive it. Waits for the other ranks without a limit. End with finalize or abort, then destroy. */
  int (*init)(vd_nccl **n, vd_ops *o, const vd_nccl_id *id, int rank, int size, vd_error *err);
  /* Not collective. From here on o->alloc_arena takes symmetric memory of NCCL: a GPU then reads and
   * writes the arenas of its peers in place, which is faster than through NCCL's buffers. For the ranks of one
   * node. To be called on all ranks of a communicator or on none, before the model is made and before init. Does
   * nothing where NCCL is older than 2.28. */
  int (*use_symmetric_memory)(vd_ops *o, vd_error *err);
  /* Collective (ranks of the communicator). Registers gradients [count] and what all_gather moves for params [count]
   * where use_symmetric_memory was called for their backend and NCCL has symmetric memory between these GPUs; else does
   * nothing. Waits for the other ranks; where it fails it aborts the communicator, in case they wait for this one. The
   * arenas must outlive n. */
  int (*register_arenas)(vd_nccl *n, real *gradients, real *params, size_t count, vd_error *err);
  /* Not collective. True where register_arenas has registered them. Then operations end on all ranks once each rank has
   * started them, but not by `abort`: NCCL 2.28's kernels for symmetric memory do not ask whether they are aborted. */
  bool (*is_registered)(const vd_nccl *n);
  /* Not collective. Begins an update: its operations are counted anew. Those of the previous update stay readable. */
  void (*begin_update)(vd_nccl *n);
  /* Stream-ordered. The update's last backward pass begins: times count from here. */
  void (*begin_backward)(vd_nccl *n);
  /* Collective (ranks of the communicator), stream-ordered. Adds arena[first .. first + count) over the ranks, in
   * place, on the communicator's own stream, after the work that the backend's stream holds now. */
  int (*all_reduce)(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err);
  /* Collective (ranks of the communicator), stream-ordered, as all_reduce. Adds arena[first .. first + ranks * chunk)
   * over the ranks; rank r gets the sums of elements first + r * chunk .. + chunk in place. The other chunks are then
   * undefined. */
  int (*reduce_scatter)(vd_nccl *n, real *arena, size_t first, size_t chunk, vd_error *err);
  /* Collective (ranks of the communicator), stream-ordered. Adds x [count], backend memory, over the ranks, in place.
   * The backend's stream waits for it; the host does not. */
  int (*all_reduce_doubles)(vd_nccl *n, double *x, size_t count, vd_error *err);
  /* Collective (ranks of the communicator), stream-ordered. Chunk r of arena[first .. first + ranks * chunk) comes from
   * rank r, in place, on the communicator's own stream, after the work that the backend's stream holds now. Where the
   * backend multiplies by a copy of these parameters in another type, the copy is gathered in their place, unless
   * `masters`. `slot` (0 ..) names the operation for wait_all_gather. */
  int (*all_gather)(vd_nccl *n, int slot, real *arena, size_t first, size_t chunk, bool masters, vd_error *err);
  /* Stream-ordered. Makes the backend's stream wait for the last all_gather of this slot. The host does not wait. */
  void (*wait_all_gather)(vd_nccl *n, int slot);
  /* Not collective. Milliseconds that the backend's stream waited for other ranks in that update besides gradients: in
   * all_reduce_doubles and wait_all_gather. `before` as in `count`; the backend has completed the update's work. */
  double (*waited)(const vd_nccl *n, int before);
  /* Stream-ordered. Makes the backend's stream wait for the update's all-reduces and reduce-scatters enqueued so far.
   * The host does not wait. */
  void (*wait_all_reduces)(vd_nccl *n);
  /* Not collective. Fills *err where NCCL reports an asynchronous error. Returns at once. Any thread. */
  void (*async_error)(vd_nccl *n, vd_error *err);
  /* Not collective. Number of all-reduces and reduce-scatters of the update `before` the current one (0 or 1). */
  int (*count)(const vd_nccl *n, int before);
  /* Not collective. Times of operation i of that update; false while it runs. Does not wait. */
  bool (*times)(const vd_nccl *n, int before, int i, vd_all_reduce_times *t);
  /* Not collective. Aborts the operations that run; the arenas' contents are then undefined. Any thread. May hang. Does
   * nothing once an operation has used registered arenas. */
  void (*abort)(vd_nccl *n);
  /* Collective (ranks of the communicator), but for one that is aborted. Waits for the operations that run and ends the
   * communicator. Only destroy may follow. */
  void (*finalize)(vd_nccl *n);
  /* Not collective. Frees n, after abort or finalize. NULL is allowed. */
  void (*destroy)(vd_nccl *n);
} vd_nccl_plugin;

#endif
