/* dK/dV kernel of the backward pass by warp-level mma.sync, for fp32 (as three TF32 products) and for 16-bit heads
 * wider than 64; the equations are in bwd_dkv_wgmma.cu.
 *
 * Tiles: a persistent block of four warps takes 64 keys of one head and stream, 16 a warp, and goes over the query
 * tiles that see them. Keys are the rows of the results, so that weights and score gradients are left operands as
 * they are. The dropout mask is drawn again.
 *
 * Shared memory: k and v; one or two stages of q, dout, lse and delta; a ring of stages + 1 blocks of 64 position
 * keys; their bias scores. Barriers: __syncthreads() once for each query tile, when its cp.async copies have landed.
 *
 * Bound: instruction issue. Whether all pairs are seen, and dropout, are decided at run time, after the products, so
 * that these exist once: they are nearly all of the code and of the time that it takes to compile. */
#include "cuda/attention/bwd_common.cuh"

namespace {

/* A warp's 16 keys over the query tiles. */
template <typename T, int D> struct dkv_warp {
  vd_left_rows<T, D, vd_backward_layout<T, D>::hold_key> k, v;
  float dk[D / 8][4], dv[D / 8][4];
};

/* vd_init_position_scores with position keys as rows. */
template <bool REL> VD_DEV void init_position_rows(float c[2][4], const float *score) {
  vd_clear(c);
  if constexpr (REL) {
    int g = (threadIdx.x & 31) >> 2;
    float x = score[g], y = score[g + 8];
    c[0][0] = c[0][1] = c[1][0] = c[1][1] = x;
    c[0][2] = c[0][3] = c[1][2] = c[1][3] = y;
  }
}

/* Scores of 16 keys (rows) and 16 queries: the products with keys and with two blocks of the table share the
 * queries. */
template <typename T, int D, bool REL>
VD_DEV void dkv_scores(const dkv_warp<T, D> &w, const T *q, int query, const T *table, const float *bias_scores,
                       int row0, int row1, float s[2][4]) {
  float block0[2][4], block1[2][4], position[2][4];
  vd_clear(s), init_position_rows<REL>(block0, bias_scores + row0), init_position_rows<REL>(block1, bias_scores + row1);
#pragma unroll(vd_left_rows <T, D, vd_backward_layout <T, D>::hold_key>::unroll)
  for (int i = 0; i < D / 16; i++) {
    vd_frag_a<T> x;
    vd_frag_b<T> b[2];
    vd_load_b<T, D>(b, q, query, 16 * i);
    w.k.get(x, i);
    vd_mma(s[0], x, b[0]), vd_mma(s[1], x, b[1]);
    vd_load_a<T, D>(x, table, row0, 16 * i);
    vd_mma(block0[0], x, b[0]), vd_mma(block0[1], x, b[1]);
    vd_load_a<T, D>(x, table, row1, 16 * i);
    vd_mma(block1[0], x, b[0]), vd_mma(block1[1], x, b[1]);
  }
  vd_skew_keys(position, block0, block1);
#pragma unroll
  for (int i = 0; i < 8; i++) s[i >> 2][i & 3] += position[i >> 2][i & 3];
}

/* Dropout mask of this lane's eight elements (keys as rows): bytes of the two lanes that have its queries. */
VD_DEV void dropout_by_key(const vd_dropout_draws &drop, int i0, int kappa0, unsigned dropout_mask[2]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  vd_philox_words words = vd_dropout_words(drop, i0, kappa0);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) bits |= (vd_dropout_bits(words, i) >= drop.threshold ? 1U : 0U) << i;
  dropout_mask[0] = __shfl_sync(0xffffffffU, bits, 8 * t + (g >> 1)) >> (g & 1);
  dropout_mask[1] = __shfl_sync(0xffffffffU, bits, 8 * t + 4 + (g >> 1)) >> (g & 1);
}

/* Scores s of 16 keys and 16 queries become the weights that multiply values, gradients of weights ds become gradients
 * of scores. FULL: all pairs are seen with mask 1. rows: lse of the queries; delta follows after 64. */
template <bool FULL, bool REL>
VD_DEV void score_gradients(const vd_cuda_attention &a, const vd_band &band, float scale, const float *rows,
                            const unsigned dropout_mask[2], int x0, float factor, float s[2][4], float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float unused = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, column = 8 * jn + 2 * t + (e & 1), x = x0 + column - g - 8 * (e >> 1);
    bool keep = dropout_mask[e & 1] >> (2 * (e >> 1) + 4 * jn) & 1;
    float dp = keep ? ds[jn][e] * scale : 0, weight;
    float score = s[jn][e] * factor - rows[column] * 1.44269504088896341f;
    /* Keys that do not exist have result rows of their own, which are not written. */
    ds[jn][e] = vd_score_gradient<FULL, REL>(band, a.trimmed, x, band.oldest, score, dp, rows[VD_TILE + column],
                                             &weight, &unused);
    s[jn][e] = keep ? weight : 0;
  }
}

/* One 16 x 16 sub-tile: this warp's keys from kappa0 on, queries from i0 on, which are rows `query`.. of the tiles.
 * rows: lse and delta of the tile's 64 queries. */
template <typename T, int D, bool REL>
VD_DEV void dkv_tile(const vd_cuda_attention &a, const vd_band &band, const vd_dropout_draws &drop, dkv_warp<T, D> &w,
                     const T *q, const T *dout, const T *table, const float *bias_scores, const float *rows, int query,
                     int row0, int row1, int i0, int kappa0, float factor) {
  float s[2][4], ds[2][4];
  unsigned dropout_mask[2] = {0xff, 0xff};
  dkv_scores<T, D, REL>(w, q, query, table, bias_scores, row0, row1, s);
  vd_dots<T, D>(ds, w.v, dout, query);
  if (drop.threshold) dropout_by_key(drop, i0, kappa0, dropout_mask);
  if (vd_all_full<false>(band, i0 - kappa0, kappa0)) {
    score_gradients<true, REL>(a, band, drop.scale, rows + query, dropout_mask, i0 - kappa0, factor, s, ds);
  } else {
    score_gradients<false, REL>(a, band, drop.scale, rows + query, dropout_mask, i0 - kappa0, factor, s, ds);
  }
  vd_frag_a<T> x;
  vd_result_to_a(x, s);
  vd_accumulate<T, D>(w.dv, x, dout, query);
  vd_result_to_a(x, ds);
  vd_accumulate<T, D>(w.dk, x, q, query);
}

/* The t-th query tile of a key tile, from query i0 on, for this warp's 16 keys from kw on. Blocks t and t + 1 of the
 * table are in the ring. */
template <typename T, int D, bool REL>
VD_DEV void dkv_query_tile(const vd_cuda_attention &a, const vd_band &band, const vd_dropout_draws &drop,
                           dkv_warp<T, D> &w, const T *q, const T *dout, const T *ts, const float *bias_scores,
                           const float *rows, int t, int i0, int kw, float factor) {
  constexpr int ring = vd_backward_layout<T, D>::stages + 1;
  const int warp = (int)threadIdx.x >> 5;
#pragma unroll 1
  for (int b = 0; b < 4; b++) {
    int iq = i0 + 16 * b, unit = 3 + warp - b;
    if (iq >= a.block || !vd_any_seen<false>(band, iq - kw, kw)) continue;
    int row0 = (unit < 4 ? (t + 1) % ring * 4 + unit : t % ring * 4 + unit - 4) * 16;
    int row1 = (unit < 3 ? (t + 1) % ring * 4 + unit + 1 : t % ring * 4 + unit - 3) * 16;
    dkv_tile<T, D, REL>(a, band, drop, w, q, dout, ts, bias_scores, rows, 16 * b, row0, row1, iq, kw, factor);
  }
}

/* Writes dk and dv of this warp's keys. */
template <typename T, int D, bool REL>
VD_DEV void dkv_end(const vd_cuda_attention &a, const vd_cuda_attention_gradient &g, vd_work_tile at,
                    const vd_band &band, int kw, dkv_warp<T, D> &w, float scale, float dropout_scale) {
  const int lowest = vd_lowest<REL>(band), lowest_value = vd_lowest_value<REL>(band);
  const float scales[2] = {scale, scale}, dropped[2] = {dropout_scale, dropout_scale};
  const vd_kv_view<T> gradients = vd_kv_view_of(a, (T *)g.dblock, (T *)g.dmemory, at.head, at.stream);
  const vd_row_view<T> dkeys = gradients.at(at.tile * VD_TILE, VD_KEY);
  const vd_row_view<T> dvalues = gradients.at(at.tile * VD_TILE, VD_VALUE);
  vd_write_rows<T, D>(dkeys.row0, dkeys.stride, kw, lowest, a.block, a.d_head, w.dk, scales);
  vd_write_rows<T, D>(dvalues.row0, dvalues.stride, kw, lowest_value, a.block, a.d_head, w.dv, dropped);
}

template <typename T, int D, bool REL>
__global__ void __launch_bounds__(VD_WARPGROUP, vd_backward_layout<T, D>::key_blocks)
    dkv_mma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_cuda_attention_gradient g,
                   const __grid_constant__ vd_backward_workspace ws, vd_dropout_draws drop) {
  typedef vd_backward_layout<T, D> layout;
  constexpr int stages = layout::stages, tile = layout::tile, ring = stages + 1;
  extern __shared__ __align__(256) unsigned char smem[];
  __shared__ int next;
  T *ks = (T *)smem, *vs = ks + tile, *qs = vs + tile, *dos = qs + stages * tile, *ts = dos + stages * tile;
  float *bias_scores = (float *)(ts + ring * tile), *rows = bias_scores + ring * VD_TILE;
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int warp = (int)threadIdx.x >> 5, n_near = vd_ceil_div(a.block, VD_TILE);
  const int n_work_tile =
      REL ? a.n_stream * a.n_head * (vd_far_tiles(a) + n_near) : a.n_stream * schedule->key_tile_first[a.n_head];
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f;
  for (int tile_id = (int)blockIdx.x; tile_id < n_work_tile;) {
    const int requested = vd_request_tile(schedule, VD_WORK_DKV);
    const vd_work_tile at = vd_key_tile_at<REL>(a, schedule, tile_id);
    const vd_band band = vd_band_of<REL>(a, schedule, at.head);
    const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, g.table, at.head);
    vd_seek_dropout(&drop, a, at.head, at.stream);
    const int kappa0 = at.tile * VD_TILE, kw = kappa0 + 16 * warp, first = kappa0 > 0 ? kappa0 : 0;
    const int last = min(a.block - 1, kappa0 + VD_TILE - 1 + band.reach), n = last / VD_TILE - first / VD_TILE + 1;
    const vd_row_view<const T> queries = vd_query_rows<T, REL>(a, g, ws.query, at.head, at.stream);
    const vd_row_view<const T> douts = vd_output_rows(a, (const T *)g.dout, at.head, at.stream);
    const int64_t r0 = ((int64_t)at.stream * a.n_head + at.head) * a.block;
    /* Query tile t needs blocks t (nearer keys) and t + 1 of the table. */
    auto copy_table = [&](int y) {
      vd_copy_position_keys<T, D, REL>(ts + y % ring * tile, bias_scores + y % ring * VD_TILE, positions,
                                       kappa0 - first - y * VD_TILE, a.d_head);
    };
    auto copy = [&](int t) {
      int i0 = first + t * VD_TILE, slot = t % stages, i = (int)threadIdx.x & (VD_TILE - 1);
      vd_copy_tile<T, D>(qs + slot * tile, queries.row0, queries.stride, i0, 0, a.block, a.d_head);
      vd_copy_tile<T, D>(dos + slot * tile, douts.row0, douts.stride, i0, 0, a.block, a.d_head);
      const float *from = ((int)threadIdx.x < VD_TILE ? g.lse : ws.delta) + r0;
      bool valid = i0 + i < a.block;
      vd_cp_async4(rows + slot * VD_WARPGROUP + threadIdx.x, valid ? from + i0 + i : from, valid);
      copy_table(t + 1);
      vd_cp_async_commit();
    };
    dkv_warp<T, D> w;
#pragma unroll
    for (int i = 0; i < D / 8 * 4; i++) w.dk[i >> 2][i & 3] = w.dv[i >> 2][i & 3] = 0;
    const vd_kv_view<const T> memories = vd_kv_view_of(a, (const T *)g.block, (const T *)g.memory, at.head, at.stream);
    vd_copy_kv_tile<T, D, REL>(ks, vs, a, memories, kappa0, band);
    copy_table(0);
    copy(0);
    for (int t = 0; t < n; t++) {
      vd_cp_async_wait_all();
      __syncthreads();
      if (t == 0) w.k.set(ks, 16 * warp), w.v.set(vs, 16 * warp);
      if (stages == 2 && t + 1 < n) copy(t + 1);
      const int slot = t % stages, i0 = first + t * VD_TILE;
      dkv_query_tile<T, D, REL>(a, band, drop, w, qs + slot * tile, dos + slot * tile, ts, bias_scores,
                                rows + slot * VD_WARPGROUP, t, i0, kw, factor);
      if (stages == 1 && t + 1 < n) {
        __syncthreads();
        copy(t + 1);
      }
    }
    dkv_end<T, D, REL>(a, g, at, band, kw, w, scale, drop.scale);
    tile_id = vd_receive_tile(requested, &next);
  }
  vd_finish_work(schedule, VD_WORK_DKV);
}

template <typename T, int D> struct launch_dkv {
  static cudaError_t run(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                         const vd_backward_workspace *ws, cudaStream_t stream) {
    auto kernel = a->rel_key ? dkv_mma_kernel<T, D, true> : dkv_mma_kernel<T, D, false>;
    return vd_launch_persistent(kernel, VD_WARPGROUP, vd_backward_layout<T, D>::key_bytes, stream, NULL, 0, *a, *g, *ws,
                                vd_make_dropout_draws(a));
  }
};

} // namespace

cudaError_t vd_dkv_mma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                       cudaStream_t stream) {
  return vd_dispatch<launch_dkv>(a, g, ws, stream);
}
