/* cuda/backend fills the table of src/ops/ops.h for a GPU, in C:
 *   - device.c: the exported table vd_cuda; plugin.c: vd_ops with memory, copies and the simple ops
 *   - context.c: this header's functions: errors, workspaces, arenas of parameters
 *   - gemm.c: cuBLASLt; linear.c: linear layers
 *   - attention_ops.c: attention and its projections; transformer_xl_ops.c: the other ops of Transformer-XL
 *   - gradient_stream.c: the stream of weight gradients, beside the main stream; row_sums.c: gradients of norms and
 *     biases, summed for several layers at once
 *   - optimizer_ops.c: gradient statistics, optimisers; pinned.c: async copies to and from the host
 *   - timing.c: timing events
 *   - nccl.c: gradient all-reduces; nccl_library.c: the functions of libnccl.so.2
 *   - symmetric_memory.c: memory of arenas that NCCL exchanges
 * In: src/ops, and the kernels behind attention.h, memory_projection.h, kernels.h, ffn.h and rows_product.h. Out: the
 * symbol vd_cuda. All files include this header; only plugin.c and device.c include all others, so there is no circle.
 * Work is enqueued on the main stream, weight gradients beside it on the gradient stream, copies of tokens to the GPU
 * on a third; errors are recorded here and reported by vd_ops.check and synchronize. */
#ifndef VD_CUDA_CONTEXT_H
#define VD_CUDA_CONTEXT_H

#include "cuda/kernels/kernels.h"
#include "src/ops/cuda_plugin.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

enum { VD_MAX_ARENAS = 16 };

/* A parameter arena and its copy in the activations' type, made by weights_changed; none in fp32. */
typedef struct vd_arena {
  const float *params;
  size_t n;
  void *copy;
  bool fresh; /* the optimiser's kernel has written the copy together with the parameters */
} vd_arena;

/* Device or pinned host memory that grows on demand. Its contents are valid within one op, unless the owner says
 * otherwise. */
typedef struct vd_workspace {
  void *p;
  size_t bytes;
} vd_workspace;

/* The gradient stream (gradient_stream.h): its jobs that the main stream has not waited for yet, from `first` on. */
enum { VD_GRADIENT_JOBS = 4 };
typedef struct vd_gradient_job {
  const void *reads; /* NULL: every op of a backward pass waits for the job */
  cudaEvent_t done;
} vd_gradient_job;
typedef struct vd_gradient_stream {
  cudaStream_t stream;
  cudaEvent_t fork;
  vd_gradient_job job[VD_GRADIENT_JOBS];
  int first, n;
  vd_workspace blas_workspace, scratch;
} vd_gradient_stream;

/* Sums over rows that are not completed yet (row_sums.h), and their partial rows, one after the other. */
typedef struct vd_row_sums {
  vd_row_sum sum[VD_ROW_SUMS];
  int n;
  size_t used; /* bytes of partial */
  vd_workspace partial;
} vd_row_sums;

typedef struct vd_cuda_backend {
  int device;
  enum vd_precision type;
  size_t act_size;
  bool pooled; /* the GPU supports memory pools */
  bool freed;  /* memory was freed since the last synchronize */
  cudaMemPool_t pool;
  cudaStream_t stream, side;
  cudaEvent_t fork, join;
  vd_gradient_stream gradient;
  bool one_stream; /* timing events are used: an op's events then enclose its work, but for the copy of tokens */
  cublasLtHandle_t blas;
  struct vd_gemm_algo *product; /* [n_product] the cuBLASLt algorithm of each shape so far */
  int n_product;
  bool in_phase;      /* an NVTX range is open */
  cudaEvent_t *event; /* [n_event] for timing */
  int n_event;
  vd_error error; /* the first since the last synchronize */
  vd_arena arena[VD_MAX_ARENAS];
  int n_arena;
  struct vd_attention_state *attention;  /* of attention_ops.c; this and the next three are NULL until they are used */
  struct vd_pieces *pieces;              /* of optimizer_ops.c */
  struct vd_pinned_slots *slots;         /* of pinned.c */
  struct vd_symmetric_memory *symmetric; /* of symmetric_memory.c */
  vd_workspace scratch, blas_workspace, pinned;
  vd_workspace partial; /* sums over rows; workspace of attention's backward */
  vd_row_sums row_sums;
  vd_workspace mask; /* words of unit_mask */
  /* The dropout mask of the layer that reads the next add_norm's y: wanted, add_norm draws it; drawn, the layer reads
   * it. */
  vd_unit_mask unit_mask;
  enum { VD_NO_MASK, VD_MASK_WANTED, VD_MASK_DRAWN } mask_state;
} vd_cuda_backend;

/* Not collective. The backend behind a table of ops. */
static inline vd_cuda_backend *vd_cuda_of(vd_ops *o) {
  return (vd_cuda_backend *)o->self;
}

/* Not collective. Records e unless it is cudaSuccess or an earlier error is recorded; `what` names the work. */
void vd_cuda_record_error(vd_cuda_backend *c, cudaError_t e, const char *what);
/* Not collective. Grows s to at least `bytes` (device memory; pinned host memory for c->pinned) and returns it; NULL
 * and a recorded error where there is none. May wait for the stream. */
void *vd_cuda_workspace(vd_cuda_backend *c, vd_workspace *s, size_t bytes);
/* Not collective. The copy of the parameters at `weight` in the activations' type. */
const void *vd_cuda_weight(vd_cuda_backend *c, const real *weight);
/* Not collective. The arena that holds `p`, or NULL. */
vd_arena *vd_cuda_arena_of(vd_cuda_backend *c, const real *p);

/* Not collective. True where n tensors of `size` elements each are contiguous, so that one product can take all. */
bool vd_cuda_are_contiguous(int n, const real *const tensor[], int64_t size);
/* Not collective. Returns the pool's unused memory to the driver after a failed allocation. True where a second attempt
 * may succeed. Waits for the stream. */
bool vd_cuda_trim_pool(vd_cuda_backend *c);

#endif
