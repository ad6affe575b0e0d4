/* See optimizer_ops.h. The pieces of each list of extents are made once and cached on the device. */
#include "cuda/backend/optimizer_ops.h"

#include "cuda/backend/gradient_stream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Pieces of the extents that an optimiser or a norm processes, on the device. */
struct vd_pieces {
  const vd_extent *extent; /* the extents that it was made for; owned */
  int n, n_tensor, n_piece;
  vd_cuda_piece *piece;
  int32_t *tensor_piece;
  double *partial, *norm2;
  struct vd_pieces *next; /* used before this one */
};
/* Lists that are cached. A sharded optimizer has two, that of its step and that of its norms; a check of one arena has
 * one more. */
enum { VD_CACHED_PIECES = 3 };

static void *take(vd_cuda_backend *c, size_t bytes) {
  void *p = NULL;
  vd_cuda_record_error(c, cudaMalloc(&p, bytes > 0 ? bytes : 1), "allocating the optimiser's tables");
  return p;
}

static void put(vd_cuda_backend *c, void *device, const void *host, size_t bytes) {
  if (device && bytes > 0)
    vd_cuda_record_error(c, cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, c->stream),
                         "copying the optimiser's tables");
}

/* cudaFree waits for kernels that use the tables. */
static void free_pieces(struct vd_pieces *p) {
  while (p) {
    struct vd_pieces *next = p->next;
    void *mine[] = {p->piece, p->tensor_piece, p->partial, p->norm2};
    for (size_t i = 0; i < sizeof mine / sizeof *mine; i++) cudaFree(mine[i]);
    free((void *)p->extent);
    free(p);
    p = next;
  }
}

void vd_cuda_optimizer_end(vd_cuda_backend *c) {
  free_pieces(c->pieces);
  c->pieces = NULL;
}

static bool is_of(const struct vd_pieces *p, const vd_extent *extent, int n, int n_tensor) {
  if (p->n != n || p->n_tensor != n_tensor) return false;
  for (int i = 0; i < n; i++)
    if (p->extent[i].offset != extent[i].offset || p->extent[i].size != extent[i].size ||
        p->extent[i].tensor != extent[i].tensor)
      return false;
  return true;
}

/* Cuts the extents into pieces, host [*n_piece]; first [n_tensor + 1]: the first piece of each tensor. */
static vd_cuda_piece *cut(const vd_extent *extent, int n, int n_tensor, int32_t *first, int *n_piece) {
  size_t most = 0;
  for (int i = 0; i < n; i++) most += (extent[i].size + VD_PIECE - 1) / VD_PIECE;
  vd_cuda_piece *piece = vd_calloc(most + 1, sizeof *piece);
  int32_t at = 0;
  int tensor = 0; /* those below it have their first piece */
  for (int i = 0; i < n; i++) {
    if (extent[i].tensor < tensor - 1 || extent[i].tensor >= n_tensor) vd_bug("extents are not sorted by tensor");
    for (; tensor <= extent[i].tensor; tensor++) first[tensor] = at;
    for (size_t k = 0; k < extent[i].size; k += VD_PIECE, at++) {
      size_t left = extent[i].size - k;
      piece[at] = (vd_cuda_piece){extent[i].offset + k, (int32_t)(left < VD_PIECE ? left : VD_PIECE), extent[i].tensor};
    }
  }
  for (; tensor <= n_tensor; tensor++) first[tensor] = at;
  *n_piece = at;
  return piece;
}

static struct vd_pieces *make_pieces(vd_cuda_backend *c, const vd_extent *extent, int n, int n_tensor) {
  struct vd_pieces *p = vd_calloc(1, sizeof *p);
  vd_extent *own = vd_calloc((size_t)n + 1, sizeof *own);
  int32_t *first = vd_calloc((size_t)n_tensor + 1, sizeof *first);
  memcpy(own, extent, (size_t)n * sizeof *own);
  *p = (struct vd_pieces){.extent = own, .n = n, .n_tensor = n_tensor};
  vd_cuda_piece *piece = cut(extent, n, n_tensor, first, &p->n_piece);
  size_t n_piece = (size_t)p->n_piece;
  p->piece = take(c, n_piece * sizeof *piece);
  p->tensor_piece = take(c, ((size_t)n_tensor + 1) * sizeof *first);
  p->partial = take(c, n_piece * sizeof *p->partial);
  p->norm2 = take(c, (size_t)n_tensor * sizeof *p->norm2);
  put(c, p->piece, piece, n_piece * sizeof *piece);
  put(c, p->tensor_piece, first, ((size_t)n_tensor + 1) * sizeof *first);
  vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting");
  free(piece);
  free(first);
  return p;
}

/* The pieces of these extents, from the cache, which keeps the lists that were used last. */
static const struct vd_pieces *pieces_of(vd_cuda_backend *c, const vd_extent *extent, int n, int n_tensor) {
  struct vd_pieces **link = &c->pieces, *p;
  int kept = 0;
  while (*link && !is_of(*link, extent, n, n_tensor)) {
    if (++kept == VD_CACHED_PIECES) {
      free_pieces(*link);
      *link = NULL;
    } else {
      link = &(*link)->next;
    }
  }
  if (*link) {
    p = *link;
    *link = p->next;
  } else {
    p = make_pieces(c, extent, n, n_tensor);
  }
  p->next = c->pieces;
  c->pieces = p;
  return p;
}

/* Where the list has no extent there is nothing to launch: all sums are 0. */
static void sum_squares(vd_cuda_backend *c, const real *x, const struct vd_pieces *p, double *norm2) {
  vd_cuda_gradient_join(c);
  cudaError_t e = p->n_piece > 0 ? vd_cuda_square_sums(x, p->piece, p->n_piece, p->tensor_piece, p->n_tensor,
                                                       p->partial, norm2, c->stream)
                                 : cudaMemsetAsync(norm2, 0, (size_t)p->n_tensor * sizeof *norm2, c->stream);
  vd_cuda_record_error(c, e, "norms");
}

void vd_cuda_square_sums_op(vd_ops *o, const real *x, const vd_extent *extent, int n, double *norm2) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_extent *own = vd_calloc((size_t)n + 1, sizeof *own);
  for (int i = 0; i < n; i++) own[i] = (vd_extent){extent[i].offset, extent[i].size, i};
  const struct vd_pieces *p = pieces_of(c, own, n, n);
  free(own);
  for (int i = 0; i < n; i++) norm2[i] = NAN; /* stays NAN where the GPU fails */
  if (c->error.status != VD_OK) return;
  sum_squares(c, x, p, p->norm2);
  o->get_double(o, norm2, p->norm2, (size_t)n);
}

void vd_cuda_gradient_norms_op(vd_ops *o, const real *gradient, const vd_extent *extent, int n, int n_tensor,
                               double *norm2) {
  vd_cuda_backend *c = vd_cuda_of(o);
  sum_squares(c, gradient, pieces_of(c, extent, n, n_tensor), norm2);
}

void vd_cuda_gradient_stats_op(vd_ops *o, int n_tensor, double scale, double clip_norm, double *grad_stats) {
  vd_cuda_backend *c = vd_cuda_of(o);
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

/* The pieces that a step takes; its norms are found by each piece's tensor, whose number n_tensor only bounds. */
static const struct vd_pieces *stepped(vd_cuda_backend *c, const vd_extent *extent, int n) {
  int last = n > 0 ? extent[n - 1].tensor : 0;
  return pieces_of(c, extent, n, last + 1);
}

void vd_cuda_adagrad_op(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *extent, int n,
                        const double *grad_stats, double lr, double eps, double clip_step) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const struct vd_pieces *p = stepped(c, extent, n);
  void *copy = copy_of(c, param);
  if (p->n_piece > 0)
    vd_cuda_record_error(c,
                         vd_cuda_adagrad(c->type, param, gradient, accumulator, copy, p->piece, p->n_piece, grad_stats,
                                         lr, (float)eps, clip_step, c->stream),
                         "Adagrad");
}

void vd_cuda_adam_op(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *extent, int n,
                     const double *grad_stats, const vd_adam *a) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const struct vd_pieces *p = stepped(c, extent, n);
  void *copy = copy_of(c, param);
  vd_cuda_adam_step step = {.beta1 = (float)a->beta1,
                            .rest1 = (float)(1 - a->beta1),
                            .beta2 = (float)a->beta2,
                            .rest2 = (float)(1 - a->beta2),
                            .step = (float)(a->lr / (1 - pow(a->beta1, (double)a->t))),
                            .correct = (float)(1 / sqrt(1 - pow(a->beta2, (double)a->t))),
                            .eps = (float)a->eps};
  if (p->n_piece > 0)
    vd_cuda_record_error(
        c, vd_cuda_adam(c->type, param, gradient, m, v, copy, p->piece, p->n_piece, grad_stats, &step, c->stream),
        "Adam");
}
