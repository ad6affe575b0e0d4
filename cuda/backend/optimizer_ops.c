/* See optimizer_ops.h. The tensors' pieces are made once and cached on the device. */
#include "cuda/backend/optimizer_ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Pieces of the tensors that an optimiser or a norm processes, on the device. */
struct vd_pieces {
  const vd_extent *tensor; /* the extents that it was made for; owned */
  int n_tensor, n_piece;
  vd_cuda_piece *piece;
  int32_t *tensor_piece;
  double *partial, *norm2;
};

static void *take(vd_cuda_backend *c, size_t bytes) {
  void *p = NULL;
  vd_cuda_record_error(c, cudaMalloc(&p, bytes > 0 ? bytes : 1), "allocating the optimiser's tables");
  return p;
}

static void put(vd_cuda_backend *c, void *device, const void *host, size_t bytes) {
  if (device)
    vd_cuda_record_error(c, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, c->stream),
                         "copying the optimiser's tables");
}

void vd_cuda_optimizer_end(vd_cuda_backend *c) {
  struct vd_pieces *p = c->pieces;
  if (!p) return;
  void *mine[] = {p->piece, p->tensor_piece, p->partial, p->norm2};
  for (size_t i = 0; i < sizeof mine / sizeof *mine; i++) cudaFree(mine[i]);
  free((void *)p->tensor);
  free(p);
  c->pieces = NULL;
}

/* The pieces of these extents, from the cache of one set of extents. */
static const struct vd_pieces *pieces_of(vd_cuda_backend *c, const vd_extent *tensor, int n_tensor) {
  struct vd_pieces *p = c->pieces;
  size_t bytes = (size_t)n_tensor * sizeof *tensor;
  if (p && p->n_tensor == n_tensor && n_tensor > 0 && memcmp(p->tensor, tensor, bytes) == 0) return p;
  vd_cuda_optimizer_end(c);
  vd_extent *own = vd_calloc((size_t)n_tensor, sizeof *own);
  memcpy(own, tensor, bytes);
  size_t n = 0;
  for (int t = 0; t < n_tensor; t++) n += (tensor[t].size + VD_PIECE - 1) / VD_PIECE;
  vd_cuda_piece *piece = vd_calloc(n, sizeof *piece);
  int32_t *first = vd_calloc((size_t)n_tensor + 1, sizeof *first), at = 0;
  for (int t = 0; t < n_tensor; t++) {
    first[t] = at;
    for (size_t i = 0; i < tensor[t].size; i += VD_PIECE, at++) {
      size_t left = tensor[t].size - i;
      piece[at] = (vd_cuda_piece){tensor[t].offset + i, (int32_t)(left < VD_PIECE ? left : VD_PIECE), t};
    }
  }
  first[n_tensor] = at;
  c->pieces = p = vd_calloc(1, sizeof *p);
  *p = (struct vd_pieces){.tensor = own, .n_tensor = n_tensor, .n_piece = at};
  p->piece = take(c, n * sizeof *piece);
  p->tensor_piece = take(c, ((size_t)n_tensor + 1) * sizeof *first);
  p->partial = take(c, n * sizeof *p->partial);
  p->norm2 = take(c, (size_t)n_tensor * sizeof *p->norm2);
  put(c, p->piece, piece, n * sizeof *piece);
  put(c, p->tensor_piece, first, ((size_t)n_tensor + 1) * sizeof *first);
  vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting");
  free(piece);
  free(first);
  return p;
}

void vd_cuda_square_sums_op(vd_ops *o, const real *x, const vd_extent *tensor, int n_tensor, double *norm2) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const struct vd_pieces *p = pieces_of(c, tensor, n_tensor);
  for (int t = 0; t < n_tensor; t++) norm2[t] = NAN; /* stays NAN where the GPU fails */
  if (c->error.status != VD_OK) return;
  vd_cuda_record_error(
      c, vd_cuda_square_sums(x, p->piece, p->n_piece, p->tensor_piece, n_tensor, p->partial, p->norm2, c->stream),
      "norms");
  o->get_double(o, norm2, p->norm2, (size_t)n_tensor);
}

void vd_cuda_gradient_stats_op(vd_ops *o, const real *gradient, const vd_extent *tensor, int n_tensor, double scale,
                               double clip_norm, double *grad_stats) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const struct vd_pieces *p = pieces_of(c, tensor, n_tensor);
  vd_cuda_record_error(c,
                       vd_cuda_square_sums(gradient, p->piece, p->n_piece, p->tensor_piece, n_tensor, p->partial,
                                           grad_stats + VD_STATS_TENSORS, c->stream),
                       "norms");
  vd_cuda_record_error(c, vd_cuda_gradient_stats(n_tensor, scale, clip_norm, grad_stats, c->stream),
                       "gradient statistics");
}

/* The parameters' copy in the activations' type, which the optimiser's kernel writes with them: marks it fresh. */
static void *copy_of(vd_cuda_backend *c, const real *param) {
  vd_arena *arena = vd_cuda_arena_of(c, param);
  if (!arena) return NULL;
  arena->fresh = true;
  return arena->copy;
}

void vd_cuda_adagrad_op(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *tensor,
                        int n_tensor, const double *grad_stats, double lr, double eps, double clip_step) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const struct vd_pieces *p = pieces_of(c, tensor, n_tensor);
  vd_cuda_record_error(c,
                       vd_cuda_adagrad(c->type, param, gradient, accumulator, copy_of(c, param), p->piece, p->n_piece,
                                       grad_stats, lr, (float)eps, clip_step, c->stream),
                       "Adagrad");
}

void vd_cuda_adam_op(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *tensor,
                     int n_tensor, const double *grad_stats, const vd_adam *a) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const struct vd_pieces *p = pieces_of(c, tensor, n_tensor);
  vd_cuda_adam_step step = {.beta1 = (float)a->beta1,
                            .rest1 = (float)(1 - a->beta1),
                            .beta2 = (float)a->beta2,
                            .rest2 = (float)(1 - a->beta2),
                            .step = (float)(a->lr / (1 - pow(a->beta1, (double)a->t))),
                            .correct = (float)(1 / sqrt(1 - pow(a->beta2, (double)a->t))),
                            .eps = (float)a->eps};
  vd_cuda_record_error(c,
                       vd_cuda_adam(c->type, param, gradient, m, v, copy_of(c, param), p->piece, p->n_piece, grad_stats,
                                    &step, c->stream),
                       "Adam");
}
