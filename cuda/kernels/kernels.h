/* cuda/kernels holds the kernels other than attention, and what kernels share:
 *   elementwise.cu     conversions, embedding, dropout, ReLU's backward, column sums, memories
 *   norm.cu            residual sum and layer norm
 *   row_sums.cu        sums of the partial rows of other kernels
 *   ffn.cu, ffn.h      feed-forward products with their epilogues
 *   rows_product.cu, rows_product.h    other products with a small contracted size
 *   weight_stationary.cuh, tma.cuh     the pipeline of both; TMA and mbarriers
 *   optimizer.cu       loss, gradient statistics, optimisers
 *   transformer_xl.cu  scaled dropout, position encodings
 *   element.cuh, dropout.cuh, philox.cuh   activation types, vectors; dropout of row-major sites; its draws
 *   unit_mask.cuh      the dropout mask of hidden units, which norm.cu draws and ffn.cu reads
 *   mma.cuh, wgmma.cuh, pdl.cuh   tensor cores, launches
 * In: src/base and src/ops (enums, Philox, layout of the statistics). Out: the plain C functions below, which
 * cuda/backend calls; they check no error but that of the launch, which they return.
 *
 * Arrays are device memory; `void *` arrays hold elements of `type`. Equations and shapes are those of the members of
 * vd_ops (src/ops/ops.h) of the same names. Every sum has a fixed order. */
#ifndef VD_CUDA_KERNELS_H
#define VD_CUDA_KERNELS_H

#include "src/base/choices.h"
#include "src/base/rng.h"
#include "src/ops/cuda_limits.h"
#include "src/ops/ring_push.h"
#include "src/ops/update_stats.h"

#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Stream-ordered. to[i] (of type) = from[i]. */
cudaError_t vd_cuda_from_float(enum vd_precision type, size_t n, const float *from, void *to, cudaStream_t stream);
/* Stream-ordered. to[i] = from[i] (of type). */
cudaError_t vd_cuda_to_float(enum vd_precision type, size_t n, const void *from, float *to, cudaStream_t stream);

/* Stream-ordered. out[r, :] = dropout(weight[tokens[r], :]); out [n, d]. */
cudaError_t vd_cuda_embed(enum vd_precision type, int64_t n, int64_t d, const int32_t *tokens, const float *weight,
                          const vd_dropout *dropout, void *out, cudaStream_t stream);
/* Stream-ordered. dweight[v, :] += sum over rows r with tokens[r] = v of dout[r, :]. */
cudaError_t vd_cuda_embed_backward(enum vd_precision type, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                                   const void *dout, float *dweight, cudaStream_t stream);
/* Stream-ordered. to [n, width]: 1 in column tokens[r] of row r, else 0; width a multiple of 8. */
cudaError_t vd_cuda_one_hot(enum vd_precision type, int64_t n, int64_t width, const int32_t *tokens, void *to,
                            cudaStream_t stream);
/* Stream-ordered. x [n, width] = dropout(x). */
cudaError_t vd_cuda_drop_rows(enum vd_precision type, int64_t n, int64_t width, const vd_dropout *dropout, void *x,
                              cudaStream_t stream);

/* A sum of partial rows [rows, stride]: to[v][c] += the sum of their columns v * d + c, v < n_vector, c < d. */
typedef struct vd_row_sum {
  const float *partial;
  float *to[3];
  int32_t rows, stride, d, n_vector;
} vd_row_sum;
enum { VD_ROW_SUMS = 48 };
/* Stream-ordered. n of them, at most VD_ROW_SUMS, in one launch. */
cudaError_t vd_cuda_add_row_sums(int n, const vd_row_sum *sum, cudaStream_t stream);

/* Not collective. Bytes of workspace for column_sums of [n, width]. */
size_t vd_cuda_rows_workspace(int64_t n, int64_t width);
/* Not collective. Rows of partial sums for n rows. */
int64_t vd_cuda_partial_rows(int64_t n);
/* Stream-ordered. dy [n, width] = y <= 0 ? 0 : dy * scale; partial [vd_cuda_partial_rows(n), width] = partial sums of
 * its columns. */
cudaError_t vd_cuda_relu_backward(enum vd_precision type, int64_t n, int64_t width, const void *y, float scale,
                                  void *dy, float *partial, cudaStream_t stream);
/* Stream-ordered. sum [width] += the sums of x's columns. */
cudaError_t vd_cuda_column_sums(enum vd_precision type, int64_t n, int64_t width, const void *x, float *workspace,
                                float *sum, cudaStream_t stream);

/* The dropout mask of hidden units [n, width], width a multiple of 128: words [n, width / 32] in device memory, in the
 * order of unit_mask.cuh. */
typedef struct vd_unit_mask {
  vd_dropout dropout; /* p > 0 */
  int64_t n, width;
  uint32_t *words;
} vd_unit_mask;

/* Stream-ordered. vd_ops.add_norm. mask: draws and writes it, too, which the kernel's waits for memory hide; n rows,
 * 16-bit types and d a multiple of 8, or cudaErrorInvalidValue; NULL: none. */
cudaError_t vd_cuda_add_norm(enum vd_precision type, int64_t n, int64_t d, const void *a, const void *b,
                             const vd_dropout *dropped, const float *weight, const float *bias, void *sum, float *mean,
                             float *rstd, void *y, const vd_unit_mask *mask, cudaStream_t stream);
/* Not collective. Partial rows of add_norm_backward for n rows. */
int64_t vd_cuda_norm_partials(int64_t n);
/* Stream-ordered. vd_ops.add_norm_backward. partial [vd_cuda_norm_partials(n), 3 d], aligned to 32
 * bytes: partial sums of dweight, dbias and dshift. */
cudaError_t vd_cuda_add_norm_backward(enum vd_precision type, int64_t n, int64_t d, const void *sum, const float *mean,
                                      const float *rstd, const float *weight, const void *dy, void *dsum,
                                      float *partial, cudaStream_t stream);

/* Stream-ordered. vd_ops.memory_push. */
cudaError_t vd_cuda_memory_push(enum vd_precision type, int64_t n_stream, int64_t d, const void *old, int64_t rows_old,
                                int64_t oldest, const void *hidden, int64_t block, void *memory, int64_t rows_new,
                                cudaStream_t stream);
/* Stream-ordered. vd_ops.memory_ring_push. */
cudaError_t vd_cuda_memory_ring_push(enum vd_precision type, int64_t n_stream, int64_t d, int64_t stride, int64_t block,
                                     int n, const vd_ring_push *push, cudaStream_t stream);
/* Stream-ordered. vd_ops.cross_entropy; row_nll [n] is required. */
cudaError_t vd_cuda_cross_entropy(enum vd_precision type, int64_t n, int64_t vocab, int64_t stride, const void *logits,
                                  const int32_t *targets, float scale, double *loss_sum, float *row_nll, void *dlogits,
                                  cudaStream_t stream);

/* One piece of an extent, for kernels that process all tensors in one launch. */
typedef struct vd_cuda_piece {
  size_t first; /* element of the arena */
  int32_t n;    /* at most VD_PIECE */
  int32_t tensor;
} vd_cuda_piece;
enum { VD_PIECE = 16384 };

/* Stream-ordered. norm2[t] = sum of squares of tensor t: first [n_piece] sums into partial, then per tensor;
 * tensor_piece [n_tensor + 1]: first piece of each tensor. */
cudaError_t vd_cuda_square_sums(const float *x, const vd_cuda_piece *piece, int n_piece, const int32_t *tensor_piece,
                                int n_tensor, double *partial, double *norm2, cudaStream_t stream);
/* Stream-ordered. vd_ops.gradient_stats. */
cudaError_t vd_cuda_gradient_stats(int n_tensor, double scale, double clip_norm, double *grad_stats,
                                   cudaStream_t stream);
/* Stream-ordered. Adagrad over all pieces, as vd_ops.adagrad. copy (NULL: none) = the new parameters in `type`. */
cudaError_t vd_cuda_adagrad(enum vd_precision type, float *param, const float *gradient, float *accumulator, void *copy,
                            const vd_cuda_piece *piece, int n_piece, const double *grad_stats, double lr, float eps,
                            double clip_step, cudaStream_t stream);
/* Adam's factors as fp32, computed on the host: m = beta1 m + rest1 g, v = beta2 v + rest2 g^2 with g =
 * VD_STATS_SCALE times the gradient, p -= step m / (correct sqrt(v) + eps). */
typedef struct vd_cuda_adam_step {
  float beta1, rest1, beta2, rest2, step, correct, eps;
} vd_cuda_adam_step;
/* Stream-ordered. Adam over all pieces; copy as in vd_cuda_adagrad. */
cudaError_t vd_cuda_adam(enum vd_precision type, float *param, const float *gradient, float *m, float *v, void *copy,
                         const vd_cuda_piece *piece, int n_piece, const double *grad_stats,
                         const vd_cuda_adam_step *step, cudaStream_t stream);
/* Stream-ordered. Copies n words from device or pinned host memory by a kernel, which for few words ends before a copy
 * would start. */
cudaError_t vd_cuda_copy_words(size_t n, const uint32_t *from, uint32_t *to, cudaStream_t stream);
/* Stream-ordered. Copies the parts, one after the other, to `to`, which may be pinned host memory; n <= VD_STATS_PARTS.
 */
cudaError_t vd_cuda_copy_parts(int n, const vd_stats_part *part, void *to, cudaStream_t stream);
/* Stream-ordered. x[i] += value. */
cudaError_t vd_cuda_add_constant(float *x, size_t n, float value, cudaStream_t stream);
/* Stream-ordered. x[i] = clamp(x[i], 0, 1). */
cudaError_t vd_cuda_clamp01(float *x, size_t n, cudaStream_t stream);

/* Stream-ordered. vd_ops.scale_dropout. */
cudaError_t vd_cuda_scale_dropout(enum vd_precision type, int64_t n, int64_t width, float scale,
                                  const vd_dropout *dropout, const void *x, void *y, cudaStream_t stream);
/* Stream-ordered. vd_ops.position_encodings, computed in double. */
cudaError_t vd_cuda_position_encodings(enum vd_precision type, int64_t n, int64_t d, int64_t clamp_len,
                                       const vd_dropout *dropout, void *out, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
