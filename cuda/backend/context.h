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

/* Not collective. The backend on a GPU that the kernels were built for: vd_cuda_plugin.ops. */
int vd_cuda_ops(vd_ops **o, int device, enum vd_precision precision, vd_error *err);
/* Not collective. vd_cuda_plugin.nccl, in nccl.c. */
const vd_nccl_plugin *vd_cuda_nccl(void);
/* Not collective. Notes a CUDA error with what was being done; the first one is kept. */
void vd_cuda_record_error(vd_cuda_backend *c, cudaError_t e, const char *what);
/* Not collective. At least `bytes` of scratch memory (device, or pinned host memory for c->pinned); NULL and a noted
 * error where there is none. May wait for the stream. */
void *vd_cuda_workspace(vd_cuda_backend *c, vd_workspace *s, size_t bytes);
/* Not collective. The copy of parameters at `weight` in the activations' type. */
const void *vd_cuda_weight(vd_cuda_backend *c, const real *weight);
/* Not collective. The arena that holds `p`, or NULL. */
vd_arena *vd_cuda_arena_of(vd_cuda_backend *c, const real *p);

/* A product of matrices: C = alpha * op(A) op(B) + beta C for row-major matrices of n_batch problems. op(A) [m, k],
 * op(B) [k, n], C [m, n]. */
typedef struct vd_matrix {
  const void *p;
  int64_t ld, stride; /* elements of a row, of a problem */
  bool transposed;
} vd_matrix;
typedef struct vd_gemm_call {
  int64_t m, n, k, n_batch;
  vd_matrix a, b;
  void *c;
  int64_t ldc, c_stride;
  bool c_float; /* C is fp32, else of the activations' type */
  float alpha, beta;
  const void *bias; /* [n] of the activations' type, or NULL */
  bool relu;
} vd_gemm_call;
/* Stream-ordered. Enqueues the product through cuBLASLt; errors are noted. The first call of a shape tries several of
 * cuBLASLt's kernels on its operands, and waits. */
void vd_cuda_gemm(vd_cuda_backend *c, const vd_gemm_call *x);
/* Stream-ordered. dweight [out, in] += dy^T x; dy [rows, out] of leading dimension ld, x [rows, in]. */
void vd_cuda_weight_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                             const void *x, real *dweight);
/* Stream-ordered. dx [rows, in] = dy weight, or += where accumulate; dy as above, weight [out, in]. */
void vd_cuda_input_gradient(vd_cuda_backend *c, int64_t rows, int64_t out, int64_t in, const void *dy, int64_t ld,
                            const real *weight, void *dx, bool accumulate);
/* Not collective. Frees what the products keep. */
void vd_cuda_gemm_end(vd_cuda_backend *c);

/* Stream-ordered. vd_cuda_plugin.event_record. */
void vd_cuda_event_record(vd_ops *o, int i);
/* Not collective. vd_cuda_plugin.event_elapsed. */
double vd_cuda_event_elapsed(vd_ops *o, int i, int j);
/* Not collective. Frees the marks. */
void vd_cuda_timing_end(vd_cuda_backend *c);

/* Stream-ordered. Members of vd_ops of the same names, in linear.c; the products are in gemm.c. */
void vd_cuda_linear(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y);
/* Stream-ordered. vd_ops.linear_backward. */
void vd_cuda_linear_backward(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                             vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                             real *dbefore);

/* Stream-ordered. vd_ops.attention_plan; these are in attention_ops.c. */
void vd_cuda_attention_plan_op(vd_ops *o, int n, const vd_attention *a);
/* Not collective. Parameters have changed, or memory was freed: plans and tables are made anew when next wanted. */
void vd_cuda_attention_changed(vd_cuda_backend *c);
/* Stream-ordered. vd_ops.attention_project. */
void vd_cuda_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                               const real *wk, const real *wv, const vd_qkv *qkv);
/* Stream-ordered. vd_ops.attention_project_backward. */
void vd_cuda_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                        const real *wk, const real *wv, const vd_qkv *dqkv, vd_act *dhidden, real *dwq,
                                        real *dwk, real *dwv);
/* Stream-ordered. vd_ops.attention. */
void vd_cuda_attention_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, vd_act *out, real *lse);
/* Stream-ordered. vd_ops.attention_backward. */
void vd_cuda_attention_backward_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, const vd_act *out,
                                   const real *lse, const vd_act *dout, const vd_qkv *dqkv, real *dkey_pe, real *dspan);
/* Not collective. Do n tensors of `size` elements each follow one another, so that a product can take them as one? */
bool vd_cuda_are_contiguous(int n, const real *const tensor[], int64_t size);
/* Stream-ordered. vd_ops.backward_end. */
void vd_cuda_backward_end(vd_ops *o);
/* Not collective. Frees plans and tables. */
void vd_cuda_attention_end(vd_cuda_backend *c);

/* Stream-ordered. vd_ops.square_sums; these are in optimizer_ops.c. */
void vd_cuda_square_sums_op(vd_ops *o, const real *x, const vd_extent *tensor, int n_tensor, double *norm2);
/* Stream-ordered. vd_ops.gradient_stats. */
void vd_cuda_gradient_stats_op(vd_ops *o, const real *gradient, const vd_extent *tensor, int n_tensor, double scale,
                               double clip_norm, double *grad_stats);
/* Stream-ordered. vd_ops.adagrad. */
void vd_cuda_adagrad_op(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *tensor,
                        int n_tensor, const double *grad_stats, double lr, double eps, double clip_step);
/* Stream-ordered. vd_ops.adam. */
void vd_cuda_adam_op(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *tensor,
                     int n_tensor, const double *grad_stats, const vd_adam *a);
/* Not collective. Frees the pieces. */
void vd_cuda_optimizer_end(vd_cuda_backend *c);

/* Stream-ordered. vd_ops.push_stats; these are in pinned.c. */
int vd_cuda_push_stats(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err);
/* Not collective. vd_ops.pull_stats. */
const void *vd_cuda_pull_stats(vd_ops *o, int slot, vd_error *err);
/* Stream-ordered. vd_ops.put_tokens: waits only for the copy of VD_TOKEN_SLOTS calls before. */
void vd_cuda_put_tokens(vd_ops *o, int32_t *device, const int32_t *host, size_t n);
/* Not collective. Frees slots and tokens. */
void vd_cuda_pinned_end(vd_cuda_backend *c);

/* Stream-ordered. vd_ops.scale_dropout; what Transformer-XL alone needs is in transformer_xl_ops.c. */
void vd_cuda_scale_dropout_op(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout,
                              const vd_act *x, vd_act *y);
/* Stream-ordered. vd_ops.position_encodings. */
void vd_cuda_position_encodings_op(vd_ops *o, const vd_position_encoding *e, vd_act *out);
/* Stream-ordered. vd_ops.weight_gradient. */
void vd_cuda_weight_gradient_op(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                                real *dweight);
/* Stream-ordered. Keys and values of memory rows where there are relative keys, so that all heads reach the same rows:
 * memory as in vd_qkv, weight: those of keys and of values. */
void vd_cuda_relative_project(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                              const real *const weight[2], vd_act *memory);
/* Stream-ordered. Adds what memory rows give to the gradients of these weights; rows of dmemory out of reach become
 * zeros. */
void vd_cuda_relative_project_backward(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                                       vd_act *dmemory, real *const dweight[2]);

#endif
