/* Shared by the dQ and dK/dV kernels: the workspace, the gradient of a score, and the reductions of the gradients of
 * position keys, biases and spans. */
#ifndef VD_ATTENTION_BACKWARD_CUH
#define VD_ATTENTION_BACKWARD_CUH

#include "cuda/attention/common.cuh"

template <typename T, int D> struct vd_backward_layout {
  static constexpr bool small = sizeof(T) * D <= 128;
  static constexpr bool hold_query = small, hold_key = small;
  static constexpr int query_blocks = small ? 2 : 1, key_blocks = small ? 2 : 1;
  static constexpr int stages = sizeof(T) * D <= 256 ? 2 : 1;
  static constexpr int tile = VD_TILE * D, skewed = VD_TILE * 2 * VD_TILE;
  static constexpr int bias_bytes = (stages + 1) * VD_TILE * 4; /* bias scores of the table ring */
  static constexpr int query_bytes = ((2 + 2 * stages + stages + 1) * tile + skewed) * (int)sizeof(T) + bias_bytes;
  static constexpr int key_bytes = (2 + 2 * stages + stages + 1) * tile * (int)sizeof(T) + bias_bytes + stages * 512;
};

/* Arrays of the backward pass; all but dropout_mask are in g->workspace. */
typedef struct vd_backward_workspace {
  /* The wgmma kernels run once for each group of streams (bwd.cu): those of the layer, and the group's first one. */
  int32_t n_stream, first_stream;
  /* [n_stream, n_head, block]: sum over a head's columns of out * dout. The wgmma kernels multiply weights by dropout's
   * scale in the exponent, by adding `shift` = log2(scale) - lse / ln 2 to scores; for them delta is divided by it. */
  float *delta, *shift;
  float *dspan;  /* [n_head, n_stream, query tiles] */
  void *query;   /* mma kernels with relative keys: q + u [n_stream * block, width] */
  float *dsum;   /* [n_head, reach + 1]: score gradients summed over all queries at one distance */
  float *dtable; /* with relative keys, wgmma kernels: [n_head, vd_table_blocks(a->reach), 64, 64], the gradient of
                  * relative keys in the order of vd_add_table_block(), but for the share of dsum */
  char *stored;  /* wgmma kernels: stored tiles of a group of streams, one for each score tile (vd_first_score_tile) */
  uint32_t *dropout_mask; /* wgmma kernels with dropout: a->dropout_mask, of all streams */
} vd_backward_workspace;

/* A stored tile: what the dQ kernel leaves for the dK/dV kernel of a query tile and a key tile, in 16-bit elements. Of
 * a far tile (bwd_dq_wgmma.cu) the score gradients; else the weights in units of 1 / dropout's scale, negative where
 * dropped, with a trimmed softmax before the mask. Rows are queries, 128 bytes each, swizzled as in wgmma.cuh. Chunk c
 * of a row has the keys 8 (4 (c >> 2) + i) + 2 (c & 3) + b at 2 i + b: what a thread of the dQ kernel holds of a row is
 * two chunks. */
enum { VD_STORED_BYTES = VD_CUDA_WEIGHT_BYTES };
static_assert(VD_STORED_BYTES == VD_TILE * VD_TILE * 2, "a tile of weights");

/* The queries that the mma kernels multiply, u added with relative keys. */
template <typename T, bool REL>
VD_DEV vd_row_view<const T> vd_query_rows(const vd_cuda_attention &a, const vd_cuda_attention_gradient &g,
                                          const void *with_u, int head, int stream) {
  if constexpr (REL) return vd_output_rows(a, (const T *)with_u, head, stream);
  return vd_block_rows(a, (const T *)g.block, VD_QUERY, head, stream);
}

/* Stream-ordered. The dQ kernel for fp32 and for 16-bit heads wider than 64; bwd_dq_mma.cu. */
cudaError_t vd_dq_mma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                      cudaStream_t stream);
/* Stream-ordered. The dK/dV kernel for the same types and widths; bwd_dkv_mma.cu. */
cudaError_t vd_dkv_mma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                       cudaStream_t stream);

/* Stream-ordered. The dQ kernel where vd_uses_wgmma(a), which also fills ws->stored; bwd_dq_wgmma.cu. */
cudaError_t vd_dq_wgmma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                        const vd_backward_workspace *ws, cudaStream_t stream);
/* Stream-ordered. The dK/dV kernel where vd_uses_wgmma(a), after vd_dq_wgmma; bwd_dkv_wgmma.cu. */
cudaError_t vd_dkv_wgmma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                         const vd_backward_workspace *ws, cudaStream_t stream);
/* Stream-ordered. vd_dq_wgmma for bf16 heads of 65 to 96 without relative keys; bwd_dq_wgmma_96.cu. */
cudaError_t vd_dq_wgmma_96(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                           const vd_backward_workspace *ws, cudaStream_t stream);
/* Stream-ordered. vd_dkv_wgmma for the same; bwd_dkv_wgmma_96.cu. */
cudaError_t vd_dkv_wgmma_96(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_workspace *ws, cudaStream_t stream);

/* Stream-ordered. Before the mma kernels: bias scores, and ws->query = q + u; relative.cu. */
cudaError_t vd_relative_begin(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_workspace *ws, cudaStream_t stream);
/* Stream-ordered. After the kernels: the gradients of the biases, and the share of drel_key that dsum gives. */
cudaError_t vd_relative_end(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_workspace *ws, cudaStream_t stream);

/* The gradient of a score: from score s (units of log 2, less lse) and the gradient dp of the weight after dropout.
 * Also gives the masked weight and adds to the gradient of the span. x is the distance, kappa the key. FULL: the
 * pair is seen with mask 1. */
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
  if (!trimmed && m == 0 && p > (float)band.ramp) p = (float)band.ramp; /* bounded: see src/ops/ops.h */
  *weight = m * p;
  if (vd_mask_moves(band, x)) *dspan += p * (trimmed ? dp : dp - delta);
  return trimmed ? p * (m * dp - delta) : m * p * (dp - delta);
}

/* Where the gradients of a head's position keys are accumulated; members as in struct vd_position_keys. */
typedef struct vd_position_gradients {
  float *row0, *sum; /* sum: of distance 0, or NULL */
  int64_t stride;
  int lowest, end, width;
} vd_position_gradients;

/* The accumulators of head `head`: drel_key and dsum with relative keys, else the table's gradient. */
template <bool REL>
VD_DEV vd_position_gradients vd_position_gradients_of(const vd_cuda_attention &a, const vd_cuda_attention_gradient &g,
                                                      float *dsum, int head, const vd_band &band) {
  if constexpr (REL) {
    vd_position_gradients p = {
        g.drel_key + head * a.d_head, dsum + (int64_t)head * (a.reach + 1), -a.rel_stride, -a.reach, 1, a.d_head};
    return p;
  }
  vd_position_gradients p = {g.dtable + (int64_t)a.attn_span * a.d_head,
                             nullptr,
                             a.d_head,
                             max(-band.reach, -a.attn_span),
                             1 - band.first,
                             a.d_head};
  return p;
}

/* to[0], to[1] += x, y. `red` returns nothing. atomicAdd(float2 *) compiles to an atomic with an unused result, for
 * which the warp waits when it next needs a scoreboard. */
VD_DEV void vd_add_pair(float *to, float x, float y) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(x), "f"(y)
               : "memory");
}

/* p.sum += factor * rows, whose columns are equal, for e0 .. e0 + 15. */
VD_DEV void vd_add_row_sums(const vd_position_gradients &p, const float rows[4], int e0, float factor) {
  int lane = threadIdx.x & 31, e = e0 + (lane >> 2);
#pragma unroll
  for (int ih = 0; ih < 2; ih++, e += 8)
    if ((lane & 3) == 0 && e >= p.lowest && e < p.end) atomicAdd(p.sum - e, rows[2 * ih] * factor);
}

/* Gradients of position keys e0 .. e0 + 15 += factor * sum. With relative keys p.sum += factor * rows, whose columns
 * are equal. */
template <int D, bool REL>
VD_DEV void vd_add_rows(const vd_position_gradients &p, const float sum[D / 8][4], const float rows[4], int e0,
                        float factor) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const bool whole = e0 >= p.lowest && e0 + 16 <= p.end && p.width == D;
  if constexpr (REL) vd_add_row_sums(p, rows, e0, factor);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int e = e0 + g + 8 * ih;
    bool valid = e >= p.lowest && e < p.end;
    float *to = p.row0 + e * p.stride + 2 * t;
    if (whole) {
#pragma unroll
      for (int n = 0; n < D / 8; n++) vd_add_pair(to + 8 * n, sum[n][2 * ih] * factor, sum[n][2 * ih + 1] * factor);
    } else {
#pragma unroll
      for (int n = 0; n < D / 8; n++)
        if (valid && 8 * n + 2 * t < p.width)
          vd_add_pair(to + 8 * n, sum[n][2 * ih] * factor, sum[n][2 * ih + 1] * factor);
    }
  }
}

/* Blocks of 64 distances that a query tile can add to, with relative keys. */
static inline __host__ __device__ int vd_table_blocks(int reach) {
  return vd_ceil_div(reach, VD_TILE) + 2;
}
/* The key table's gradient as the wgmma kernels add to it: 64 rows of e after another, e0 = -64, -128 ..., each 64 x 8
 * N in the order in which the threads of a warpgroup hold a result, so that a warp adds 512 contiguous bytes. */
template <int N> VD_DEV void vd_add_table_block(float *dtable, int e0, const float sum[N][4], float factor) {
  float *to = dtable + (int64_t)(-e0 / VD_TILE - 1) * VD_TILE * 8 * N + 4 * threadIdx.x;
#pragma unroll
  for (int n = 0; n < N; n++)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(
                     __cvta_generic_to_global(to + 4 * VD_WARPGROUP * n)),
                 "f"(sum[n][0] * factor), "f"(sum[n][1] * factor), "f"(sum[n][2] * factor), "f"(sum[n][3] * factor)
                 : "memory");
}

/* Adds the sums of dq over the tile's queries to the gradient of a head's content bias, from which that of position
 * scores is taken later (relative.cu). shared [4 D], which other warps may still read. */
template <int D>
VD_DEV void vd_add_dbias(const float dq[D / 8][4], float *shared, float scale, int d_head, float *to,
                         int consumer = 0) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  vd_consumer_sync(consumer);
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    float x = dq[n][0] + dq[n][2], y = dq[n][1] + dq[n][3];
    for (int m = 4; m < 32; m *= 2) x += __shfl_xor_sync(0xffffffffU, x, m), y += __shfl_xor_sync(0xffffffffU, y, m);
    if (lane < 4) *(float2 *)(shared + warp * D + 8 * n + 2 * lane) = make_float2(x, y);
  }
  vd_consumer_sync(consumer);
  for (int i = (int)threadIdx.x; i < d_head; i += VD_WARPGROUP)
    atomicAdd(to + i, (shared[i] + shared[D + i] + shared[2 * D + i] + shared[3 * D + i]) * scale);
}

/* Sum of the tile's span gradient, to `place`. */
VD_DEV void vd_store_dspan(float dspan, float *shared, float *place, int consumer = 0) {
  for (int m = 16; m; m >>= 1) dspan += __shfl_xor_sync(0xffffffffU, dspan, m);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = dspan;
  vd_consumer_sync(consumer);
  if (threadIdx.x == 0) *place = shared[0] + shared[1] + shared[2] + shared[3];
}

/* Key tiles of the memory that the block's first query sees. */
VD_DEV int vd_far_tiles(const vd_cuda_attention &a) {
  return vd_ceil_div(min(a.reach, a.window), VD_TILE);
}
template <bool REL>
VD_DEV vd_work_tile vd_key_tile_at(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int tile_id) {
  if constexpr (REL) {
    int before = vd_far_tiles(a), tiles = before + vd_ceil_div(a.block, VD_TILE), row = tile_id / tiles;
    vd_work_tile at = {row % a.n_head, row / a.n_head, tile_id % tiles - before};
    return at;
  }
  const int rank = vd_rank_of(schedule->key_tile_first, a.n_head, a.n_stream, tile_id);
  int head = schedule->head[rank], far = vd_ceil_div(schedule->band[head].reach, VD_TILE);
  int n_tile = far + vd_ceil_div(a.block, VD_TILE), rest = tile_id - a.n_stream * schedule->key_tile_first[rank];
  vd_work_tile at = {head, rest / n_tile, rest % n_tile - far};
  return at;
}

#endif
