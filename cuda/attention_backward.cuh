/* What the two kernels of the backward pass share. */
#ifndef VD_ATTENTION_BACKWARD_CUH
#define VD_ATTENTION_BACKWARD_CUH

#include "attention.cuh"

template <typename T, int D> struct vd_backward_layout {
  static constexpr bool small = sizeof(T) * D <= 128;
  static constexpr bool hold_query = small, hold_key = small;
  static constexpr int query_blocks = small ? 2 : 1, key_blocks = small ? 2 : 1;
  static constexpr int stages = sizeof(T) * D <= 256 ? 2 : 1;
  static constexpr int tile = VD_TILE * D, turned = VD_TILE * 2 * VD_TILE;
  static constexpr int begin_bytes = (stages + 1) * VD_TILE * 4; /* what scores with position keys begin with */
  static constexpr int query_bytes = ((2 + 2 * stages + stages + 1) * tile + turned) * (int)sizeof(T) + begin_bytes;
  static constexpr int key_bytes = (2 + 2 * stages + stages + 1) * tile * (int)sizeof(T) + begin_bytes + stages * 512;
};

/* Places in the workspace. */
typedef struct vd_backward_room {
  float *delta; /* [n_stream, n_head, block]: sum over a head's columns of out * dout */
  float *dspan; /* [n_head, n_stream, query tiles] */
  void *query;  /* with relative keys: q + u [n_stream * block, width] */
  float *dbias; /* [query items, 2, d_head]: sums over an item's queries of the content and the position part of dq */
  float *dsum;  /* [n_head, reach + 1]: sums of the gradients of scores over all queries at one distance */
} vd_backward_room;

/* The queries that the kernels take, with u added where keys are relative. */
template <typename T, bool REL>
VD_DEV vd_lines<const T> vd_queries(const vd_cuda_attention &a, const vd_cuda_attention_gradient &g, const void *with_u,
                                    int head, int stream) {
  if constexpr (REL) return vd_plain_lines(a, (const T *)with_u, head, stream);
  return vd_block_lines(a, (const T *)g.block, VD_QUERY, head, stream);
}

/* Stream-ordered. The kernels by queries and by keys, with relative keys or without; attention_query.cu,
 * attention_key.cu. */
cudaError_t vd_backward_by_query(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                 const vd_backward_room *room, cudaStream_t stream);
cudaError_t vd_backward_by_key(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                               const vd_backward_room *room, cudaStream_t stream);

/* Stream-ordered. room->query = q + u, room->dsum = 0 before the kernels; the gradients of biases and, from dsum, the
 * rest of that of relative keys after them; attention_relative.cu. */
cudaError_t vd_relative_begin(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_room *room, cudaStream_t stream);
cudaError_t vd_relative_end(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_room *room, cudaStream_t stream);

/* From score s (units of log 2, less lse) and gradient dp of the dropped-out weight: the gradient of the score,
 * returned; the weight after mask, *weight; what goes to the span, added to *dspan. x is the distance, kappa the key.
 * FULL: seen, with mask 1. */
template <bool FULL, bool REL>
VD_DEV float vd_score_gradient(const vd_band &band, bool trimmed, int x, int kappa, float s, float dp, float delta,
                               float *weight, float *dspan) {
  float p = vd_exp2(s);
  if constexpr (REL && !FULL) p = vd_seen(band, x) && kappa >= band.oldest ? p : 0;
  if constexpr (FULL || REL) {
    *weight = p;
    return p * (dp - delta);
  }
  p = vd_seen(band, x) ? p : 0;
  float m = vd_mask(band, x);
  if (!trimmed && m == 0 && p > (float)band.ramp) p = (float)band.ramp; /* its pull is bounded: src/ops.h */
  *weight = m * p;
  if (vd_mask_moves(band, x)) *dspan += p * (trimmed ? dp : dp - delta);
  return trimmed ? p * (m * dp - delta) : m * p * (dp - delta);
}

/* Calls LAUNCH<type, width> for the type and width of a head. */
template <template <typename, int> class LAUNCH, typename T, typename... ARGS>
static cudaError_t vd_by_width(const vd_cuda_attention *a, ARGS... args) {
  if (a->d_head <= 32) return LAUNCH<T, 32>::run(a, args...);
  if (a->d_head <= 64) return LAUNCH<T, 64>::run(a, args...);
  return LAUNCH<T, 128>::run(a, args...);
}
template <template <typename, int> class LAUNCH, typename... ARGS>
static cudaError_t vd_by_type_and_width(const vd_cuda_attention *a, ARGS... args) {
  switch (a->type) {
  case VD_CUDA_FP32:
    return vd_by_width<LAUNCH, float>(a, args...);
  case VD_CUDA_BF16:
    return vd_by_width<LAUNCH, __nv_bfloat16>(a, args...);
  case VD_CUDA_FP16:
    return vd_by_width<LAUNCH, __half>(a, args...);
  }
  return cudaErrorInvalidValue;
}

#endif
