/* dQ kernel of the backward pass by warp-level mma.sync, for fp32 (as three TF32 products) and for 16-bit heads
 * wider than 64; the equations are in bwd_dq_wgmma.cu.
 *
 * Tiles: a persistent block of four warps takes 64 queries of one head and stream, 16 a warp, and goes over the key
 * tiles in reach. Score gradients are unskewed from key order to columns of e; the four warps write their part of a
 * 64-wide block of e to an exchange tile in shared memory, one product with the queries sums over all 64 of them,
 * and atomics add it to the table's gradient. The dropout mask is drawn again.
 *
 * Shared memory: q and dout; one or two stages of k and v; a ring of stages + 1 blocks of 64 position keys; the
 * exchange tile [64 queries, 128 columns of e]; bias scores. Barriers: two __syncthreads() for each key tile, before
 * and after the exchange tile is written.
 *
 * Bound: instruction issue, about 500 instructions for a 16 x 16 sub-tile in 16 bits. Whether all pairs are seen, and
 * dropout, are decided at run time, after the products, so that these exist once: they are nearly all of the code and
 * of the time that it takes to compile. */
#include "cuda/attention/bwd_common.cuh"

namespace {

/* A warp's state over the key tiles. */
template <typename T, int D, bool REL> struct dq_warp {
  vd_left_rows<T, D, vd_backward_layout<T, D>::hold_query> q, dout;
  float dq[D / 8][4];
  float lse[2], delta[2]; /* of rows g and g + 8; lse in units of log 2 */
  float before[2][4];     /* position scores of the previous block of e */
  float skewed[2][4];     /* unskewed gradient of the previous sub-tile */
  bool have_before, have_turned;
  float dspan;
};

/* Gradients of weights ds become gradients of scores s. FULL: all pairs are seen with mask 1. */
template <typename T, int D, bool FULL, bool REL>
VD_DEV void weight_gradients(const vd_cuda_attention &a, const vd_band &band, dq_warp<T, D, REL> &w, int x0, int kappa0,
                             const float s[2][4], float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float weight;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, column = 8 * jn + 2 * t + (e & 1), x = x0 + g + 8 * (e >> 1) - column;
    ds[jn][e] = vd_score_gradient<FULL, REL>(band, a.trimmed, x, kappa0 + column, s[jn][e], ds[jn][e], w.delta[e >> 1],
                                             &weight, &w.dspan);
  }
}

/* Score gradients of one 16 x 16 sub-tile, queries as rows. */
template <typename T, int D, bool REL>
VD_DEV void score_gradients(const vd_cuda_attention &a, const vd_band &band, const vd_dropout_draws &drop,
                            dq_warp<T, D, REL> &w, const T *k, const T *v, const T *table, const float *bias_scores,
                            int ring, int unit, int row, int iw, int kappa0, float factor, float ds[2][4]) {
  float next[2][4], position[2][4], s[2][4];
  int first = vd_ring_row(unit, ring), second = vd_ring_row(unit + 1, ring);
  if (!w.have_before) {
    vd_init_position_scores<REL>(w.before, bias_scores + first);
    vd_add_dots<T, D>(w.before, w.q, table, first);
  }
  w.have_before = true;
  vd_init_position_scores<REL>(next, bias_scores + second);
  vd_add_dots<T, D>(next, w.q, table, second);
  vd_dots<T, D>(s, w.q, k, row);
  vd_skew(position, w.before, next);
#pragma unroll
  for (int i = 0; i < 8; i++) w.before[i >> 2][i & 3] = next[i >> 2][i & 3];
  vd_dots<T, D>(ds, w.dout, v, row);
  if (drop.threshold) {
    vd_philox_words words = vd_dropout_words(drop, iw, kappa0);
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (!vd_dropout_keeps(words, drop.threshold, i >> 2, i & 3)) ds[i >> 2][i & 3] = 0;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3;
    s[jn][e] = (s[jn][e] + position[jn][e]) * factor - w.lse[e >> 1];
    ds[jn][e] *= drop.scale;
  }
  if (vd_all_full<REL>(band, iw - kappa0, kappa0)) {
    weight_gradients<T, D, true, REL>(a, band, w, iw - kappa0, kappa0, s, ds);
  } else {
    weight_gradients<T, D, false, REL>(a, band, w, iw - kappa0, kappa0, s, ds);
  }
}

/* Stores a 16-wide block of e of this warp's queries to the exchange tile [64 queries, 128 columns of e]. */
template <typename T> VD_DEV void store_skewed(T *tile, int row0, int col0, const float c[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int jn = i >> 1, ih = i & 1;
    T *to = tile + vd_swizzled<T, 2 * VD_TILE>(row0 + g + 8 * ih, col0 + 8 * jn + 2 * t);
    if constexpr (sizeof(T) == 4) {
      *(float2 *)to = make_float2(c[jn][2 * ih], c[jn][2 * ih + 1]);
    } else {
      *(uint32_t *)to = vd_pack(c[jn][2 * ih], c[jn][2 * ih + 1], T());
    }
  }
}

/* A right operand whose elements are all one: its product gives row sums. */
template <typename T> VD_DEV void fill_ones(vd_frag_b<T> &b) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; i++) b.x[i] = 1;
  } else {
    b.x[0] = b.x[1] = vd_pack(1, 1, T());
  }
}

/* Gradients of position keys e0 .. e0 + 15 += factor * (columns col0.. of the exchange tile)^T q. With relative keys
 * also p.sum += the sums of those columns: the share of v - u is added at the end (relative.cu). */
template <typename T, int D, bool REL>
VD_DEV void add_to_table(const vd_position_gradients &p, const T *skewed, const T *q, int col0, int e0, float factor) {
  float sum[D / 8][4], rows[4] = {0, 0, 0, 0};
  vd_frag_b<T> ones;
  if (e0 + 15 < p.lowest || e0 >= p.end) return;
  fill_ones(ones);
#pragma unroll
  for (int i = 0; i < D / 8 * 4; i++) sum[i >> 2][i & 3] = 0;
#pragma unroll(sizeof(T) == 2 ? VD_TILE / 16 : 1) /* see vd_left_rows */
  for (int i = 0; i < VD_TILE; i += 16) {
    vd_frag_a<T> x;
    vd_load_a_trans<T, 2 * VD_TILE>(x, skewed, i, col0);
    vd_accumulate<T, D>(sum, x, q, i);
    if constexpr (REL) vd_mma(rows, x, ones);
  }
  vd_add_rows<D, REL>(p, sum, rows, e0, factor);
}

/* One key tile for this warp: dq, and its blocks of e to the exchange tile. */
template <typename T, int D, bool REL>
VD_DEV void dq_step(const vd_cuda_attention &a, const vd_band &band, const vd_dropout_draws &drop,
                    dq_warp<T, D, REL> &w, const T *k, const T *v, const T *table, const float *bias_scores, T *skewed,
                    int ring, int unit, int n_unit, int iw, int kappa0, float factor) {
  int row0 = (threadIdx.x >> 5) * 16, base = unit % ring;
  /* not unrolled: warps run different parts of the code, which must fit the instruction cache */
#pragma unroll 1
  for (int b = 0; b < 4; b++) {
    float ds[2][4], here[2][4], block[2][4];
    bool active = iw < a.block && vd_any_seen<REL>(band, iw - kappa0 - 16 * b, kappa0 + 16 * b);
    vd_frag_a<T> x;
    vd_clear(here);
    if (active) {
      score_gradients<T, D, REL>(a, band, drop, w, k, v, table, bias_scores, ring, base + b, 16 * b, iw,
                                 kappa0 + 16 * b, factor, ds);
      vd_result_to_a(x, ds);
      vd_accumulate<T, D>(w.dq, x, k, 16 * b);
      vd_unskew(here, ds);
    }
    vd_join(block, w.skewed, here);
    store_skewed(skewed, row0, (unit + b) % 8 * 16, block);
    if ((active || w.have_turned) && (REL || (unit + b >= 4 && unit + b < n_unit))) {
      vd_result_to_a(x, block);
      vd_accumulate<T, D>(w.dq, x, table, vd_ring_row(base + b, ring));
    }
    w.have_turned = active;
#pragma unroll
    for (int i = 0; i < 8; i++) w.skewed[i >> 2][i & 3] = here[i >> 2][i & 3];
  }
}

/* With relative keys: the last block of e, which begins with distance 0. Only warp 3 has a part of it; it stores
 * zeros where its rows lie beyond the block, because shared memory may hold NaN. */
template <typename T, int D>
VD_DEV void last_block(dq_warp<T, D, true> &w, const T *table, T *skewed, int ring, int unit) {
  float block[2][4], none[2][4];
  vd_frag_a<T> x;
  if (threadIdx.x < 96) return;
  vd_clear(none);
  vd_join(block, w.skewed, none);
  store_skewed(skewed, 48, unit % 8 * 16, block);
  if (!w.have_turned) return;
  vd_result_to_a(x, block);
  vd_accumulate<T, D>(w.dq, x, table, vd_ring_row(unit % ring, ring));
}

/* With relative keys: zeros block 0 of e in the exchange tile, of which warps whose keys begin later write nothing. */
template <typename T> VD_DEV void clear_first_block(T *skewed) {
  int row0 = (threadIdx.x >> 5) * 16;
  float none[2][4];
  vd_clear(none);
  for (int unit = 0; unit < 3; unit++) store_skewed(skewed, row0, unit * 16, none);
}

template <typename T, int D, bool REL>
VD_DEV void dq_begin(const vd_cuda_attention &a, const float *lse, const float *delta, vd_work_tile at, int iw,
                     const T *qs, const T *dos, dq_warp<T, D, REL> &w) {
  int lane = threadIdx.x & 31, row0 = (threadIdx.x >> 5) * 16;
  int64_t rows = ((int64_t)at.stream * a.n_head + at.head) * a.block;
  w.q.set(qs, row0), w.dout.set(dos, row0);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int i = iw + (lane >> 2) + 8 * ih;
    w.lse[ih] = i < a.block ? lse[rows + i] * 1.44269504088896341f : INFINITY;
    w.delta[ih] = i < a.block ? delta[rows + i] : 0;
  }
#pragma unroll
  for (int i = 0; i < D / 8 * 4; i++) w.dq[i >> 2][i & 3] = 0;
  vd_clear(w.skewed);
  w.have_before = w.have_turned = false, w.dspan = 0;
}

/* Starts the copies of a tile's queries and of their rows of dout. */
template <typename T, int D, bool REL>
VD_DEV void copy_queries(const vd_cuda_attention &a, const vd_cuda_attention_gradient &g,
                         const vd_backward_workspace &ws, vd_work_tile at, T *qs, T *dos) {
  const vd_row_view<const T> queries = vd_query_rows<T, REL>(a, g, ws.query, at.head, at.stream);
  const vd_row_view<const T> douts = vd_output_rows(a, (const T *)g.dout, at.head, at.stream);
  vd_copy_tile<T, D>(qs, queries.row0, queries.stride, at.tile * VD_TILE, 0, a.block, a.d_head);
  vd_copy_tile<T, D>(dos, douts.row0, douts.stride, at.tile * VD_TILE, 0, a.block, a.d_head);
}

/* The end of a tile: the sum of dq, or the partial sum of the span's gradient, and dq. `exchange`: shared memory for 4
 * D floats. */
template <typename T, int D, bool REL>
VD_DEV void dq_end(const vd_cuda_attention &a, const vd_cuda_attention_gradient &g, const vd_backward_workspace &ws,
                   vd_work_tile at, dq_warp<T, D, REL> &w, float *exchange, float *sums, float scale) {
  const int iw = at.tile * VD_TILE + 16 * ((int)threadIdx.x >> 5);
  const float scales[2] = {scale, scale};
  if constexpr (REL) {
    if (a.content_bias && g.dcontent_bias)
      vd_add_dbias<D>(w.dq, exchange, scale, a.d_head, g.dcontent_bias + at.head * a.d_head);
  } else {
    int n_tile = vd_ceil_div(a.block, VD_TILE);
    vd_store_dspan(w.dspan, sums, ws.dspan + ((int64_t)at.head * ws.n_stream + at.stream) * n_tile + at.tile);
  }
  const vd_row_view<T> to = vd_block_rows(a, (T *)g.dblock, VD_QUERY, at.head, at.stream);
  vd_write_rows<T, D>(to.row0, to.stride, iw, 0, a.block, a.d_head, w.dq, scales);
}

template <typename T, int D, bool REL>
__global__ void __launch_bounds__(VD_WARPGROUP, vd_backward_layout<T, D>::query_blocks)
    dq_mma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_cuda_attention_gradient g,
                  const __grid_constant__ vd_backward_workspace ws, vd_dropout_draws drop) {
  typedef vd_backward_layout<T, D> layout;
  constexpr int stages = layout::stages, tile = layout::tile, ring = (stages + 1) * 4;
  extern __shared__ __align__(256) unsigned char smem[];
  __shared__ int next;
  __shared__ float sums[4];
  T *qs = (T *)smem, *dos = qs + tile, *ks = dos + tile, *vs = ks + stages * tile, *ts = vs + stages * tile;
  T *skewed = ts + (stages + 1) * tile;
  float *bias_scores = (float *)(skewed + layout::skewed);
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_tile = vd_ceil_div(a.block, VD_TILE), n_work_tile = a.n_head * a.n_stream * n_tile;
  const int warp = (int)threadIdx.x >> 5;
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f;
  for (int tile_id = (int)blockIdx.x; tile_id < n_work_tile;) {
    const int requested = vd_request_tile(schedule, VD_WORK_DQ);
    const vd_work_tile at = vd_query_tile_at<REL>(a, schedule, tile_id);
    const vd_band band = vd_band_of<REL>(a, schedule, at.head);
    const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, g.table, at.head);
    const vd_position_gradients dpositions = vd_position_gradients_of<REL>(a, g, ws.dsum, at.head, band);
    vd_seek_dropout(&drop, a, at.head, at.stream);
    const int i0 = at.tile * VD_TILE, iw = i0 + 16 * warp, n = vd_key_tiles<REL>(band, at.tile);
    const int start = i0 - (n - 1) * VD_TILE;
    const vd_kv_view<const T> memories = vd_kv_view_of(a, (const T *)g.block, (const T *)g.memory, at.head, at.stream);
    auto copy_positions = [&](int y) {
      vd_copy_position_keys<T, D, REL>(ts + y % (stages + 1) * tile, bias_scores + y % (stages + 1) * VD_TILE,
                                       positions, start - i0 + (y - 1) * VD_TILE, a.d_head);
    };
    auto copy = [&](int t) {
      int kappa0 = start + t * VD_TILE, slot = t % stages;
      vd_copy_kv_tile<T, D, REL>(ks + slot * tile, vs + slot * tile, a, memories, kappa0, band);
      if (REL && t == 0) copy_positions(0);
      if (REL || t + 1 < n) copy_positions(t + 1);
      vd_cp_async_commit();
    };
    auto add_block_to_table = [&](int y) {
      add_to_table<T, D, REL>(dpositions, skewed, qs, (4 * y + warp) % 8 * 16,
                              start - i0 + (y - 1) * VD_TILE + 16 * warp, scale);
    };
    dq_warp<T, D, REL> w;
    copy_queries<T, D, REL>(a, g, ws, at, qs, dos);
    copy(0);
    if constexpr (REL) clear_first_block(skewed);
    vd_cp_async_wait_all();
    __syncthreads();
    dq_begin<T, D, REL>(a, g.lse, ws.delta, at, iw, qs, dos, w);
    for (int t = 0; t < n; t++) {
      if (t > 0) vd_cp_async_wait_all();
      __syncthreads();
      if (stages == 2 && t + 1 < n) copy(t + 1);
      const T *kt = ks + t % stages * tile, *vt = vs + t % stages * tile;
      int kappa0 = start + t * VD_TILE, unit = 4 * t + 3 - warp;
      dq_step<T, D, REL>(a, band, drop, w, kt, vt, ts, bias_scores, skewed, ring, unit, 4 * n, iw, kappa0, factor);
      __syncthreads();
      if (stages == 1 && t + 1 < n) copy(t + 1);
      if (REL || t > 0) add_block_to_table(t);
    }
    if constexpr (REL) {
      last_block<T, D>(w, ts, skewed, ring, 4 * n);
      __syncthreads();
      if (warp == 0) add_block_to_table(n);
    }
    dq_end<T, D, REL>(a, g, ws, at, w, (float *)ks, sums, scale);
    tile_id = vd_receive_tile(requested, &next);
  }
  vd_finish_work(schedule, VD_WORK_DQ);
}

template <typename T, int D> struct launch_dq {
  static cudaError_t run(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                         const vd_backward_workspace *ws, cudaStream_t stream) {
    auto kernel = a->rel_key ? dq_mma_kernel<T, D, true> : dq_mma_kernel<T, D, false>;
    return vd_launch_persistent(kernel, VD_WARPGROUP, vd_backward_layout<T, D>::query_bytes, stream, NULL, 0, *a, *g,
                                *ws, vd_make_dropout_draws(a));
  }
};

} // namespace

cudaError_t vd_dq_mma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                      cudaStream_t stream) {
  return vd_dispatch<launch_dq>(a, g, ws, stream);
}
