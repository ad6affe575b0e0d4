/* What the C files of the CUDA backend share. Its kernels are behind attention.h, memory_projection.h and kernels.h. */
#ifndef VD_CUDA_INTERNAL_H
#define VD_CUDA_INTERNAL_H

#include "cuda/attention/attention.h"
#include "cuda/kernels/kernels.h"
#include "src/ops/cuda_plugin.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

enum { VD_MAX_ARENAS = 16, VD_MAX_LAYERS = 256, VD_MAX_GEMMS = 256 };

/* A parameter arena and its copy in the activations' type, made by weights_changed; fp32 needs none. */
typedef struct vd_arena {
  const float *params;
  size_t n;
  void *copy;
  bool fresh; /* the optimiser wrote it together with the parameters */
} vd_arena;

/* Device and pinned host memory that grows as asked; what it holds lives within one op, but for vd_layer_kept. */
typedef struct vd_workspace {
  void *p;
  size_t bytes;
} vd_workspace;

/* A layer's plan, found again in backward by the place of its spans. */
typedef struct vd_layer_plan {
  const float *span;
  void *plan;
  bool made;               /* since the parameters last changed */
  vd_cuda_attention shape; /* what it was made for */
} vd_layer_plan;

/* Which weights dropout keeps of a layer's attention, from forward to backward, and what they were drawn for. */
typedef struct vd_layer_kept {
  vd_workspace room;
  vd_cuda_attention shape;
} vd_layer_kept;

/* The table of relative keys in the activations' type, and its gradient until backward_end. */
typedef struct vd_key_table {
  const float *key_pe;
  int32_t d_head, attn_span;
  bool made;       /* since the parameters last changed */
  void *table;     /* [attn_span, d_head] of type */
  float *gradient; /* [attn_span, d_head] */
  float *dkey_pe;  /* where the gradient goes; NULL: none is kept */
} vd_key_table;

/* Pieces of the tensors of an optimiser or a norm, on the device. */
typedef struct vd_pieces {
  const vd_extent *tensor; /* what this was made for; owned */
  int n_tensor, n_piece;
  vd_cuda_piece *piece;
  int32_t *tensor_piece;
  double *partial, *norm2;
} vd_pieces;

/* Pinned memory that the host and the GPU hand to each other, and when the GPU is done with it. */
typedef struct vd_pinned_slot {
  void *p;
  size_t bytes;
  cudaEvent_t done; /* NULL: never used */
} vd_pinned_slot;
enum { VD_TOKEN_SLOTS = 16 };

typedef struct vd_cuda_backend {
  int device;
  enum vd_precision type;
  size_t act_size;
  bool pooled; /* the GPU has pools of memory */
  bool freed;  /* something, since the last synchronize */
  cudaMemPool_t pool;
  cudaStream_t stream, side;
  cudaEvent_t fork, join;
  cublasLtHandle_t blas;
  struct vd_gemm_algo *product; /* [n_product] cuBLASLt's choice for each shape met */
  int n_product;
  bool in_phase;
  cudaEvent_t *mark; /* [n_mark] */
  int n_mark;
  vd_error error; /* the first since the last synchronize */
  vd_arena arena[VD_MAX_ARENAS];
  int n_arena;
  vd_layer_plan layer[VD_MAX_LAYERS];
  int n_layer;
  vd_layer_kept kept[VD_MAX_LAYERS]; /* by the layer of the draws */
  vd_key_table key_table;
  vd_pieces pieces;
  vd_pinned_slot slot[VD_PINNED_SLOTS], tokens[VD_TOKEN_SLOTS];
  int next_tokens;
  vd_workspace scratch, partial, blas_workspace, pinned; /* partial: sums over rows, attention's workspace */
} vd_cuda_backend;

/* Not collective. The backend behind a table of ops. */
static inline vd_cuda_backend *vd_cuda_of(vd_ops *o) {
  return (vd_cuda_backend *)o->self;
}

/* Not collective. Notes a CUDA error with what was being done; the first one is kept. */
void vd_cuda_record_error(vd_cuda_backend *c, cudaError_t e, const char *what);
/* Not collective. At least `bytes` of scratch memory (device, or pinned host memory for c->pinned); NULL and a noted
 * error where there is none. May wait for the stream. */
void *vd_cuda_workspace(vd_cuda_backend *c, vd_workspace *s, size_t bytes);
/* Not collective. The copy of parameters at `weight` in the activations' type. */
const void *vd_cuda_weight(vd_cuda_backend *c, const real *weight);
/* Not collective. The arena that holds `p`, or NULL. */
vd_arena *vd_cuda_arena_of(vd_cuda_backend *c, const real *p);

/* Not collective. Do n tensors of `size` elements each follow one another, so that a product can take them as one? */
bool vd_cuda_are_contiguous(int n, const real *const tensor[], int64_t size);
/* Not collective. Gives back what the memory pool keeps, for a caller that found no memory: true where that may have
 * made room. Waits for the stream. */
bool vd_cuda_trim_pool(vd_cuda_backend *c);

#endif
