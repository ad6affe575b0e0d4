/* Fused relative-position attention on a GPU: the C entry points. struct vd_attention in src/ops/ops.h gives equations
 * and conventions, of adaptive span and of Transformer-XL; here the spans and what follows from them stay on the
 * device, so that a captured graph stays valid while the spans move. No matrix of queries x keys exists in device
 * memory.
 *
 * Order within one update, on one stream. Once: vd_cuda_attention_key_pe, the parameter [d_head, attn_span] to a table
 * [attn_span, d_head] of activation type. For each layer: vd_cuda_attention_make_schedule, vd_cuda_attention_forward,
 * and later vd_cuda_attention_backward, which adds to dtable. Once: vd_cuda_attention_key_pe_backward, dkey_pe +=
 * dtable^T. Transformer-XL: make_plan, forward and backward alone, with its own members of the structs below; one plan
 * and one room may serve all layers.
 */
#ifndef VD_CUDA_ATTENTION_H
#define VD_CUDA_ATTENTION_H

#include "src/base/choices.h"
#include "src/base/random.h"
#include "src/ops/cuda_limits.h"

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One layer's attention. Pointers are device memory; d_head is a multiple of 16 bytes. With width = n_head * d_head,
 * queries, keys and values of the block, and their gradients, are [n_stream * block, 3, width]; keys and values of the
 * memory before it are [n_stream, kv_rows, 2, width]; outputs are [n_stream * block, width]. Head h has the columns h *
 * d_head .. + d_head - 1 of each. */
typedef struct vd_cuda_attention {
  enum vd_precision type;
  int32_t n_stream, block, window;
  int32_t n_head, d_head, attn_span; /* at most VD_CUDA_MAX_HEADS, VD_CUDA_MAX_D_HEAD */
  int32_t ramp;
  int32_t first_distance; /* >= 1; 0 with relative keys */
  int32_t trimmed;        /* 0: VD_MASKED, 1: VD_TRIMMED */
  int32_t n_span;         /* n_head, or 1; 0 with relative keys */
  int64_t kv_rows;        /* rows of a stream's memory; rows 0 .. window - 1 are used */
  const float *span;      /* [n_span] z in 0..1 */
  void *schedule;         /* vd_cuda_attention_schedule_size() bytes, zeroed once when allocated */
  double dropout;         /* probability; 0 turns it off */
  vd_rng rng;
  int64_t row0; /* global number of the first stream */

  /* Transformer-XL, where rel_key is given. Distances 0 .. reach, in full; keys before row 0 of the memory do not
   * exist, so that window may be 0 and reach may go beyond it. span, ramp, trimmed, n_span and the key table have no
   * meaning; attn_span (>= window) counts places for dropout's numbers. */
  const void *rel_key; /* [reach + 1, rel_stride] of `type`, row = distance; head h has columns h * d_head .. */
  int64_t rel_stride;  /* of rel_key and drel_key */
  int32_t reach;       /* of all heads, >= 0 */
  const float *content_bias, *position_bias; /* u, v [n_head * d_head]; both NULL: none */
  float *bias_scores; /* vd_cuda_attention_bias_scores_size() bytes: scratch of forward and of backward */

  int32_t bounds; /* 1: the layer's window, at most `window`, follows from the spans (vd_model_window) */
  uint32_t
      *dropout_mask; /* vd_cuda_attention_dropout_mask_size() bytes that forward leaves for backward; NULL: both draw */
} vd_cuda_attention;

/* Not collective. Bytes of a plan: the layer's reaches and work list. */
size_t vd_cuda_attention_schedule_size(void);

/* Not collective. Bytes of scratch memory that backward needs: softmax row sums, partial sums of the gradients of spans
 * or biases; with relative keys the queries with u too; what a->kept holds where that is NULL. */
size_t vd_cuda_attention_workspace_size(const vd_cuda_attention *a);

/* Not collective. Bytes of a->kept, which weights dropout keeps, a bit each, in tiles of 64 x 64 up to the window for
 * every head; 0 where the kernels do not look at it. */
size_t vd_cuda_attention_dropout_mask_size(const vd_cuda_attention *a);

/* Not collective. Bytes of a->room, (v - u).r(x) of each head and distance; 0 without relative keys. */
size_t vd_cuda_attention_bias_scores_size(const vd_cuda_attention *a);

/* Stream-ordered. Fills a->plan from a->span on the device: each head's reach, the heads from the longest to the
 * shortest, and how many key tiles each has. To be called before forward and whenever spans or window change. Returns
 * cudaErrorInvalidValue for shapes that the kernels do not take. */
cudaError_t vd_cuda_attention_make_schedule(const vd_cuda_attention *a, cudaStream_t stream);

/* Stream-ordered. The same for a[0 .. n - 1], the layers of a model, each with a plan of its own: one launch for up to
 * 24 layers. `a` is host memory, free again on return. Where any shape does not fit, no plan is made. */
cudaError_t vd_cuda_attention_make_schedules(int32_t n, const vd_cuda_attention *a, cudaStream_t stream);

/* Stream-ordered. table[attn_span, d_head] (of `type`) = transpose of key_pe[d_head, attn_span]: row attn_span - x
 * holds pe(x), so that rows follow key order. */
cudaError_t vd_cuda_attention_key_pe(enum vd_precision type, int32_t d_head, int32_t attn_span, const float *key_pe,
                                     void *table, cudaStream_t stream);

/* Stream-ordered. dkey_pe[d_head, attn_span] += transpose of dtable[attn_span, d_head]. */
cudaError_t vd_cuda_attention_key_pe_backward(int32_t d_head, int32_t attn_span, const float *dtable, float *dkey_pe,
                                              cudaStream_t stream);

/* Stream-ordered. out and lse [n_stream, n_head, block] (natural log of the softmax's denominator) are written. Of
 * `memory` head h is read from row max(window - reach[h], 0) on. With relative keys table is NULL. */
cudaError_t vd_cuda_attention_forward(const vd_cuda_attention *a, const void *block, const void *memory,
                                      const void *table, void *out, float *lse, cudaStream_t stream);

/* What backward reads and writes. dblock is written, dmemory in the rows that the head reaches; dtable
 * [attn_span, d_head] and dspan [n_span] are added to; with relative keys table, dtable and dspan are NULL, and
 * drel_key, dcontent_bias and dposition_bias (both NULL where there are no biases) are added to. All sums have a fixed
 * order but those into dtable and drel_key, which are fp32 atomics: these alone may differ in their last bits from run
 * to run. */
typedef struct vd_cuda_attention_gradient {
  const void *block, *memory, *table, *out;
  const float *lse;
  const void *dout;
  void *dblock, *dmemory;
  float *dtable, *dspan;
  void *workspace; /* vd_cuda_attention_workspace_size() bytes */
  /* A second stream, on which the kernel by keys fills the multiprocessors that the longest heads of the kernel by
   * queries leave idle, and two events for the streams to wait for (timing disabled). NULL: one kernel after the other.
   */
  cudaStream_t side;
  cudaEvent_t fork, join;
  float *drel_key;                       /* [reach + 1, rel_stride], as rel_key */
  float *dcontent_bias, *dposition_bias; /* [n_head * d_head] */
} vd_cuda_attention_gradient;

/* Stream-ordered. The gradients of vd_cuda_attention_forward; same plan, dropout and spans as it had. */
cudaError_t vd_cuda_attention_backward(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                       cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
