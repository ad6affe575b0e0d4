/* Fused relative-position attention on a GPU: the C entry points. struct vd_attention in src/ops/ops.h gives the
 * equations and conventions of adaptive span and of Transformer-XL. Spans, and the reaches and work lists that
 * follow from them, stay on the device, so that a captured graph stays valid while the spans change. The forward pass
 * stores no matrix of queries x keys; the backward pass stores the weights of one layer within its heads' reaches, or
 * of some of its streams at a time.
 *
 * Order of calls within one update, on one stream. Once: vd_cuda_attention_key_pe makes the key table [attn_span,
 * d_head] of the activation type. For each layer: vd_cuda_attention_make_schedule, vd_cuda_attention_forward, and
 * later vd_cuda_attention_backward, which adds to dtable. Once: vd_cuda_attention_key_pe_backward, dkey_pe +=
 * dtable^T. Evaluation that records weights calls vd_cuda_attention_record_weights after forward, and no backward.
 * Transformer-XL calls make_schedule, forward and backward only; one schedule and one bias_scores array
 * can serve all layers. */
#ifndef VD_CUDA_ATTENTION_H
#define VD_CUDA_ATTENTION_H

#include "src/base/choices.h"
#include "src/base/rng.h"
#include "src/ops/cuda_limits.h"

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One layer's attention. Pointers are device memory; d_head elements are a multiple of 16 bytes. With width = n_head
 * * d_head, queries, keys and values of the block, and their gradients, are [n_stream * block, 3, width]; keys and
 * values of the memory before it are [n_stream, kv_rows, 2, width]; outputs are [n_stream * block, width]. Head h
 * has columns h * d_head .. (h + 1) * d_head - 1 of each. */
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
  double dropout;         /* probability of dropping a weight; 0: no dropout */
  vd_rng rng;
  int64_t row0; /* global number of the first stream: dropout does not depend on the number of ranks */

  /* Transformer-XL: rel_key is not NULL. Queries see distances 0 .. reach with mask 1. Keys before row 0 of the
   * memory do not exist, so window may be 0 and reach may exceed it. span, ramp, trimmed, n_span and the key table
   * are not used; attn_span (>= window) numbers the positions of dropout. */
  const void *rel_key; /* [reach + 1, rel_stride] of `type`, row = distance; head h has columns h * d_head .. */
  int64_t rel_stride;  /* of rel_key and drel_key */
  int32_t reach;       /* of all heads, >= 0 */
  int32_t bounds;      /* adaptive spans; 1: the device derives the layer's window, at most `window`, from the spans
                        * (vd_model_window) */
  const float *content_bias, *position_bias; /* u, v [n_head * d_head]; both NULL: none */
  float *bias_scores; /* workspace of vd_cuda_attention_bias_scores_size() bytes, NULL where 0; forward and backward of
                       * the mma kernels write it */

  /* Workspace of vd_cuda_attention_splits_size() bytes, which forward and backward write; NULL: no query tile is split.
   * The same for the schedule, forward and backward. */
  void *splits;
  /* Bounds of dropout_mask and of the workspace of backward. key_tiles: tiles of 64 keys that a query tile sees at
   * most, its own included, the sum over heads (at least two each); the tile scheduler shortens heads that want more.
   * 0: as if all heads reached over the window. Not used with relative keys. stored_limit: bytes of the weights that
   * backward stores at once, for one stream at least; 0: VD_CUDA_WEIGHT_LIMIT. */
  int32_t key_tiles;
  size_t stored_limit;

  uint32_t
      *dropout_mask; /* vd_cuda_attention_dropout_mask_size() bytes: forward writes, backward reads; NULL: not stored */
} vd_cuda_attention;

/* Not collective. Bytes of a->schedule: the bands of the heads and the work list of one layer. */
size_t vd_cuda_attention_schedule_size(void);

/* Not collective. Bytes of the workspace of backward: row sums of out * dout, partial sums of the gradients of spans,
 * stored weights; for the mma kernels with relative keys also the queries with u added. `workspace` is aligned to 128
 * bytes. */
size_t vd_cuda_attention_workspace_size(const vd_cuda_attention *a);

/* Not collective. Bytes of a->dropout_mask: one bit for each pair of query and key, in tiles of 64 x 64 within the
 * heads' reaches. 0 without dropout and for the mma kernels, which draw the mask again in backward. */
size_t vd_cuda_attention_dropout_mask_size(const vd_cuda_attention *a);

/* Not collective. Bytes of a->splits: partial sums of query tiles whose key tiles several blocks share. 0 with relative
 * keys, where trimmed, and for the mma kernels, which do not split. */
size_t vd_cuda_attention_splits_size(const vd_cuda_attention *a);

/* Not collective. Bytes of a->bias_scores, (v - u).r(x) for each head and distance. 0 without relative keys and for the
 * wgmma kernels, which hold q + u and q + v. */
size_t vd_cuda_attention_bias_scores_size(const vd_cuda_attention *a);

/* Stream-ordered. The tile scheduler: fills a->schedule from a->span on the device with each head's reach, the heads
 * in order of decreasing reach, and the number of key tiles of each. Call it before forward, and again when spans or
 * window change. Returns cudaErrorInvalidValue for shapes that the kernels do not support. */
cudaError_t vd_cuda_attention_make_schedule(const vd_cuda_attention *a, cudaStream_t stream);

/* Stream-ordered. The same for a[0 .. n - 1], the layers of a model, each with a schedule of its own; one launch for
 * about 20 layers. `a` is host memory and is free again on return. If one shape is not supported, no schedule is
 * made. */
cudaError_t vd_cuda_attention_make_schedules(int32_t n, const vd_cuda_attention *a, cudaStream_t stream);

/* Stream-ordered. table [attn_span, d_head] (of `type`) = transpose of key_pe [d_head, attn_span]. Row attn_span - x
 * holds pe(x), so that rows ascend with the keys. */
cudaError_t vd_cuda_attention_key_pe(enum vd_precision type, int32_t d_head, int32_t attn_span, const float *key_pe,
                                     void *table, cudaStream_t stream);

/* Not collective. Bytes of dtable, the gradient of the key table (an fp32 array of at least [attn_span, d_head]), in an
 * order that suits the kernels of `type`. */
size_t vd_cuda_attention_dtable_size(enum vd_precision type, int32_t d_head, int32_t attn_span);

/* Stream-ordered. dkey_pe[d_head, attn_span] += transpose of dtable. */
cudaError_t vd_cuda_attention_key_pe_backward(enum vd_precision type, int32_t d_head, int32_t attn_span,
                                              const float *dtable, float *dkey_pe, cudaStream_t stream);

/* Stream-ordered. Writes out and lse [n_stream, n_head, block], the natural logarithm of the softmax denominator.
 * Head h reads keys of `memory` from row max(window - reach[h], 0) on; values, too, but where trimmed only within its
 * own span (vd_qkv in src/ops/ops.h). With relative keys table is NULL. Returns launch errors. */
cudaError_t vd_cuda_attention_forward(const vd_cuda_attention *a, const void *block, const void *memory,
                                      const void *table, void *out, float *lse, cudaStream_t stream);

/* Weights to record, as in vd_attention_record of src/ops/ops.h. `chosen` is host memory. */
typedef struct vd_cuda_attention_record {
  int32_t n_distance; /* more than every reach */
  double *sum;        /* [n_stream, n_head, n_distance], added to */
  const int32_t *target;
  int64_t n_chosen;
  const int64_t *chosen; /* [n_chosen] stream * block + query */
  float *weight;         /* [n_chosen, n_head, n_distance], written */
} vd_cuda_attention_record;

/* Stream-ordered. Records the weights of the vd_cuda_attention_forward that ran last with the same arguments and wrote
 * lse. `chosen` is free again on return. Returns launch errors, cudaErrorInvalidValue where there is dropout. */
cudaError_t vd_cuda_attention_record_weights(const vd_cuda_attention *a, const vd_cuda_attention_record *r,
                                             const void *block, const void *memory, const void *table, const float *lse,
                                             cudaStream_t stream);

/* Inputs and outputs of backward. dblock is written; dmemory is written in the rows that a head reads; dtable
 * (vd_cuda_attention_dtable_size() bytes) and dspan [n_span] are accumulated. With relative keys table, dtable and
 * dspan are NULL, and drel_key, dcontent_bias and dposition_bias (both NULL without biases) are accumulated. dtable and
 * these three are summed by fp32 atomics, so that their last bits can differ between runs; all other sums have a fixed
 * order. */
typedef struct vd_cuda_attention_gradient {
  const void *block, *memory, *table, *out;
  const float *lse;
  const void *dout;
  void *dblock, *dmemory;
  float *dtable, *dspan;
  void *workspace; /* vd_cuda_attention_workspace_size() bytes */
  /* For the mma kernels, a second stream for dK/dV, which fills the multiprocessors that the longest heads of dQ leave
   * idle, and two events (timing disabled) that order the streams. NULL: the kernels run one after the other. */
  cudaStream_t side;
  cudaEvent_t fork, join;
  float *drel_key;                       /* [reach + 1, rel_stride], as rel_key */
  float *dcontent_bias, *dposition_bias; /* [n_head * d_head] */
} vd_cuda_attention_gradient;

/* Stream-ordered. The gradients of vd_cuda_attention_forward, which must have run with the same schedule, spans and
 * dropout. Returns cudaErrorInvalidValue if the kernels need a dropout mask and a->dropout_mask is NULL. */
cudaError_t vd_cuda_attention_backward(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                       cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
