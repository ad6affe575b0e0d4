/* Backward pass by queries: a block takes 64 queries and goes over the key tiles in reach: dq, the gradients of
 * position keys and of spans or biases. The gradient of position scores is turned from key order to columns of e; what
 * four warps have of one 64-wide block of e meets in shared memory, where one product with the queries sums over them
 * before it is added to the table. */
#include "cuda/attention/bwd_common.cuh"

/* A warp's state over the key tiles. */
template <typename T, int D, bool REL> struct vd_query_warp {
  vd_rows<T, D, vd_backward_layout<T, D>::hold_query> q, dout;
  float dq[D / 8][4];
  float dq_position[REL ? D / 8 : 1][4]; /* with relative keys kept apart: its sum is the gradient of v */
  float lse[2], delta[2];                /* of rows g and g + 8; lse in units of log 2 */
  float before[2][4];                    /* position scores of the block of e before the next one */
  float turned[2][4];                    /* turned gradient of the sub-tile before the next one */
  bool have_before, have_turned;
  float dspan;
};

/* Gradient of the scores of one 16 x 16 sub-tile, queries as rows. */
template <typename T, int D, bool FULL, bool DROP, bool REL>
VD_DEV void vd_query_tile(const vd_cuda_attention &a, const vd_band &band, const vd_drop &drop,
                          vd_query_warp<T, D, REL> &w, const T *k, const T *v, const T *table, const float *begin,
                          int ring, int unit, int row, int iw, int kappa0, float factor, float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, x0 = iw - kappa0;
  float next[2][4], position[2][4], s[2][4];
  int first = vd_ring_row(unit, ring), second = vd_ring_row(unit + 1, ring);
  if (!w.have_before) {
    vd_begin_scores<REL>(w.before, begin + first);
    vd_add_dots<T, D>(w.before, w.q, table, first);
  }
  w.have_before = true;
  vd_begin_scores<REL>(next, begin + second);
  vd_add_dots<T, D>(next, w.q, table, second);
  vd_dots<T, D>(s, w.q, k, row);
  vd_skew(position, w.before, next);
#pragma unroll
  for (int i = 0; i < 8; i++) w.before[i >> 2][i & 3] = next[i >> 2][i & 3];
  vd_dots<T, D>(ds, w.dout, v, row);
  philox4x32_ctr_t words;
  if constexpr (DROP) words = vd_drop_words(a, drop, iw, kappa0);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, column = 8 * jn + 2 * t + (e & 1), x = x0 + g + 8 * (e >> 1) - column;
    float dp = ds[jn][e] * drop.scale, weight;
    if (DROP && !vd_kept(words, drop.threshold, jn, e)) dp = 0;
    float score = (s[jn][e] + position[jn][e]) * factor - w.lse[e >> 1];
    ds[jn][e] = vd_score_gradient<FULL, REL>(band, a.trimmed, x, kappa0 + column, score, dp, w.delta[e >> 1], &weight,
                                             &w.dspan);
  }
}

/* Stores a block of e of this warp's queries into the exchange tile [64 queries, 128 columns of e]. */
template <typename T> VD_DEV void vd_store_turned(T *tile, int row0, int col0, const float c[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int jn = i >> 1, ih = i & 1;
    T *to = tile + vd_at<T, 2 * VD_TILE>(row0 + g + 8 * ih, col0 + 8 * jn + 2 * t);
    if constexpr (sizeof(T) == 4) {
      *(float2 *)to = make_float2(c[jn][2 * ih], c[jn][2 * ih + 1]);
    } else {
      *(uint32_t *)to = vd_pack(c[jn][2 * ih], c[jn][2 * ih + 1], T());
    }
  }
}

/* Sixteen ones as each of eight columns of a right operand. */
template <typename T> VD_DEV void vd_ones(vd_frag_b<T> &b) {
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < 4; i++) b.x[i] = 1;
  } else {
    b.x[0] = b.x[1] = vd_pack(1, 1, T());
  }
}

/* Rows e0 .. e0 + 15 of the position keys' gradients += factor * (columns col0.. of the exchange tile)^T q; with
 * relative keys, sums of those columns into p.sum: what is missing for v in place of u is added in the end. */
template <typename T, int D, bool REL>
VD_DEV void vd_add_to_table(const vd_position_gradients &p, const T *turned, const T *q, int col0, int e0,
                            float factor) {
  float sum[D / 8][4], rows[4] = {0, 0, 0, 0};
  vd_frag_b<T> ones;
  if (e0 + 15 < p.lowest || e0 >= p.end) return;
  vd_ones(ones);
#pragma unroll
  for (int i = 0; i < D / 8 * 4; i++) sum[i >> 2][i & 3] = 0;
#pragma unroll
  for (int i = 0; i < VD_TILE; i += 16) {
    vd_frag_a<T> x;
    vd_load_a_trans<T, 2 * VD_TILE>(x, turned, i, col0);
    vd_accumulate<T, D>(sum, x, q, i);
    if constexpr (REL) vd_mma(rows, x, ones);
  }
  vd_add_rows<D, REL>(p, sum, rows, e0, factor);
}

/* One key tile for this warp: dq, and its blocks of e into the exchange tile. */
template <typename T, int D, bool DROP, bool REL>
VD_DEV void vd_query_step(const vd_cuda_attention &a, const vd_band &band, const vd_drop &drop,
                          vd_query_warp<T, D, REL> &w, const T *k, const T *v, const T *table, const float *begin,
                          T *turned, int ring, int unit, int n_unit, int iw, int kappa0, float factor) {
  int row0 = (threadIdx.x >> 5) * 16, base = unit % ring;
  /* Not unrolled: warps are at different places of the code, which must fit the instruction cache. */
#pragma unroll 1
  for (int b = 0; b < 4; b++) {
    float ds[2][4], here[2][4], block[2][4];
    bool active = iw < a.block && vd_any_seen<REL>(band, iw - kappa0 - 16 * b, kappa0 + 16 * b);
    vd_frag_a<T> x;
    vd_clear(here);
    if (active) {
      if (vd_all_full<REL>(band, iw - kappa0 - 16 * b, kappa0 + 16 * b)) {
        vd_query_tile<T, D, true, DROP, REL>(a, band, drop, w, k, v, table, begin, ring, base + b, 16 * b, iw,
                                             kappa0 + 16 * b, factor, ds);
      } else {
        vd_query_tile<T, D, false, DROP, REL>(a, band, drop, w, k, v, table, begin, ring, base + b, 16 * b, iw,
                                              kappa0 + 16 * b, factor, ds);
      }
      vd_as_a(x, ds);
      vd_accumulate<T, D>(w.dq, x, k, 16 * b);
      vd_unskew(here, ds);
    }
    vd_join(block, w.turned, here);
    vd_store_turned(turned, row0, (unit + b) % 8 * 16, block);
    if ((active || w.have_turned) && (REL || (unit + b >= 4 && unit + b < n_unit))) {
      vd_as_a(x, block);
      vd_accumulate<T, D>(REL ? w.dq_position : w.dq, x, table, vd_ring_row(base + b, ring));
    }
    w.have_turned = active;
#pragma unroll
    for (int i = 0; i < 8; i++) w.turned[i >> 2][i & 3] = here[i >> 2][i & 3];
  }
}

/* With relative keys: the last block of e, which starts with distance 0. Warp 3 alone still has its part of it, and
 * stores zeros where its rows lie beyond the block: what shared memory held before may be NaN. */
template <typename T, int D>
VD_DEV void vd_query_last(vd_query_warp<T, D, true> &w, const T *table, T *turned, int ring, int unit) {
  float block[2][4], none[2][4];
  vd_frag_a<T> x;
  if (threadIdx.x < 96) return;
  vd_clear(none);
  vd_join(block, w.turned, none);
  vd_store_turned(turned, 48, unit % 8 * 16, block);
  if (!w.have_turned) return;
  vd_as_a(x, block);
  vd_accumulate<T, D>(w.dq_position, x, table, vd_ring_row(unit % ring, ring));
}

/* With relative keys: what an item before may have left in the rows of warps whose keys begin later than block 0 of e.
 */
template <typename T> VD_DEV void vd_clear_first_block(T *turned) {
  int row0 = (threadIdx.x >> 5) * 16;
  float none[2][4];
  vd_clear(none);
  for (int unit = 0; unit < 3; unit++) vd_store_turned(turned, row0, unit * 16, none);
}

template <typename T, int D, bool REL>
VD_DEV void vd_query_begin(const vd_cuda_attention &a, const float *lse, const float *delta, vd_item it, int iw,
                           const T *qs, const T *dos, vd_query_warp<T, D, REL> &w) {
  int lane = threadIdx.x & 31, row0 = (threadIdx.x >> 5) * 16;
  int64_t rows = ((int64_t)it.stream * a.n_head + it.head) * a.block;
  w.q.set(qs, row0), w.dout.set(dos, row0);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int i = iw + (lane >> 2) + 8 * ih;
    w.lse[ih] = i < a.block ? lse[rows + i] * 1.44269504088896341f : INFINITY;
    w.delta[ih] = i < a.block ? delta[rows + i] : 0;
  }
#pragma unroll
  for (int i = 0; i < D / 8 * 4; i++) w.dq[i >> 2][i & 3] = 0;
#pragma unroll
  for (int i = 0; REL && i < D / 8 * 4; i++) w.dq_position[i >> 2][i & 3] = 0;
  vd_clear(w.turned);
  w.have_before = w.have_turned = false, w.dspan = 0;
}

template <typename T, int D, bool DROP, bool REL>
__global__ void __launch_bounds__(VD_THREADS, vd_backward_layout<T, D>::query_blocks)
    vd_query_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_cuda_attention_gradient g,
                    const __grid_constant__ vd_backward_room room, vd_drop drop) {
  typedef vd_backward_layout<T, D> layout;
  constexpr int stages = layout::stages, tile = layout::tile, ring = (stages + 1) * 4;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ int next;
  __shared__ float sums[4];
  T *qs = (T *)memory, *dos = qs + tile, *ks = dos + tile, *vs = ks + stages * tile, *ts = vs + stages * tile;
  T *turned = ts + (stages + 1) * tile;
  float *begin = (float *)(turned + layout::turned);
  vd_plan *plan = (vd_plan *)a.plan;
  const int n_tile = vd_ceil_div(a.block, VD_TILE), n_item = a.n_head * a.n_stream * n_tile;
  const int warp = (int)threadIdx.x >> 5;
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f, scales[2] = {scale, scale};
  for (int item = (int)blockIdx.x; item < n_item;) {
    const int asked = vd_ask_next(plan, VD_WORK_QUERY);
    const vd_item it = vd_query_item<REL>(a, plan, item);
    const vd_band band = vd_band_of<REL>(a, plan, it.head);
    const vd_positions<T> positions = vd_positions_of<REL, T>(a, g.table, it.head);
    const vd_position_gradients dpositions = vd_position_gradients_of<REL>(a, g, room.dsum, it.head, band);
    vd_set_drop(&drop, a, it.head, it.stream);
    const int i0 = it.tile * VD_TILE, iw = i0 + 16 * warp, n = vd_key_tiles<REL>(band, it.tile);
    const int start = i0 - (n - 1) * VD_TILE, lowest = vd_lowest<REL>(band);
    const vd_lines<const T> queries = vd_queries<T, REL>(a, g, room.query, it.head, it.stream);
    const vd_key_lines<const T> memories = vd_keys_of(a, (const T *)g.block, (const T *)g.memory, it.head, it.stream);
    const vd_lines<const T> douts = vd_plain_lines(a, (const T *)g.dout, it.head, it.stream);
    const vd_lines<T> dqueries = vd_block_lines(a, (T *)g.dblock, VD_QUERY, it.head, it.stream);
    auto copy_positions = [&](int y) {
      vd_copy_positions<T, D, REL>(ts + y % (stages + 1) * tile, begin + y % (stages + 1) * VD_TILE, positions,
                                   start - i0 + (y - 1) * VD_TILE, a.d_head);
    };
    auto copy = [&](int t) { /* as in the forward pass */
                             int kappa0 = start + t * VD_TILE, slot = t % stages;
                             const vd_lines<const T> keys = memories.at(kappa0, VD_KEY);
                             const vd_lines<const T> values = memories.at(kappa0, VD_VALUE);
                             vd_copy_tile<T, D>(ks + slot * tile, keys.row0, keys.stride, kappa0, lowest, a.block,
                                                a.d_head);
                             vd_copy_tile<T, D>(vs + slot * tile, values.row0, values.stride, kappa0, lowest, a.block,
                                                a.d_head);
                             if (REL && t == 0) copy_positions(0);
                             if (REL || t + 1 < n) copy_positions(t + 1);
                             vd_copy_commit();
    };
    auto add_to_table = [&](int y) {
      vd_add_to_table<T, D, REL>(dpositions, turned, qs, (4 * y + warp) % 8 * 16,
                                 start - i0 + (y - 1) * VD_TILE + 16 * warp, scale);
    };
    vd_query_warp<T, D, REL> w;
    vd_copy_tile<T, D>(qs, queries.row0, queries.stride, i0, 0, a.block, a.d_head);
    vd_copy_tile<T, D>(dos, douts.row0, douts.stride, i0, 0, a.block, a.d_head);
    copy(0);
    if constexpr (REL) vd_clear_first_block(turned);
    vd_copy_wait();
    __syncthreads();
    vd_query_begin<T, D, REL>(a, g.lse, room.delta, it, iw, qs, dos, w);
    for (int t = 0; t < n; t++) {
      if (t > 0) vd_copy_wait();
      __syncthreads();
      if (stages == 2 && t + 1 < n) copy(t + 1);
      const T *kt = ks + t % stages * tile, *vt = vs + t % stages * tile;
      int kappa0 = start + t * VD_TILE, unit = 4 * t + 3 - warp;
      vd_query_step<T, D, DROP, REL>(a, band, drop, w, kt, vt, ts, begin, turned, ring, unit, 4 * n, iw, kappa0,
                                     factor);
      __syncthreads();
      if (stages == 1 && t + 1 < n) copy(t + 1);
      if (REL || t > 0) add_to_table(t);
    }
    if constexpr (REL) {
      vd_query_last<T, D>(w, ts, turned, ring, 4 * n);
      __syncthreads();
      if (warp == 0) add_to_table(n);
      vd_store_dbias<D>(w.dq, w.dq_position, (float *)ks, scale, a.d_head, room.dbias + (int64_t)item * 2 * a.d_head);
#pragma unroll
      for (int i = 0; i < D / 8 * 4; i++) w.dq[i >> 2][i & 3] += w.dq_position[i >> 2][i & 3];
    } else {
      float *place = room.dspan + ((int64_t)it.head * a.n_stream + it.stream) * n_tile + it.tile;
      vd_store_dspan(w.dspan, sums, place);
    }
    vd_write_rows<T, D>(dqueries.row0, dqueries.stride, iw, 0, a.block, a.d_head, w.dq, scales);
    item = vd_take_next(asked, &next);
  }
  vd_no_more_work(plan, VD_WORK_QUERY);
}

template <typename T, int D> struct vd_launch_query {
  static cudaError_t run(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_room *room,
                         cudaStream_t stream) {
    int blocks, shared = vd_backward_layout<T, D>::query_bytes;
    const vd_drop drop = vd_make_drop(a);
    auto kernel = drop.threshold ? vd_query_kernel<T, D, true, false> : vd_query_kernel<T, D, false, false>;
    if (a->rel_key) kernel = drop.threshold ? vd_query_kernel<T, D, true, true> : vd_query_kernel<T, D, false, true>;
    cudaError_t e = vd_fill_device((const void *)kernel, shared, &blocks);
    if (e != cudaSuccess) return e;
    kernel<<<blocks, VD_THREADS, shared, stream>>>(*a, *g, *room, drop);
    return cudaGetLastError();
  }
};

cudaError_t vd_backward_by_query(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                 const vd_backward_room *room, cudaStream_t stream) {
  return vd_by_type_and_width<vd_launch_query>(a, g, room, stream);
}
