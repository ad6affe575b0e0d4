/* Forward pass of attention by warp-level mma.sync, for fp32 (as three TF32 products) and for 16-bit heads wider
 * than 64:
 *
 *      s_ij = ((q_i + u) . k_j + (q_i + v) . p(i - j)) / sqrt(d_head),  out_i = sum_j dropout(m_ij e^s_ij / l_i) v_j
 *
 * with position keys p, soft mask m, and u, v only with relative keys; lse_i = log l_i is stored.
 *
 * Tiles: a persistent block of four warps takes 64 queries of one head and stream, 16 a warp, and goes over the key
 * tiles within the head's reach from the farthest to the nearest, with an on-line softmax. All warps copy and
 * multiply.
 *
 * Shared memory: q; one or two stages of k and v; a ring of stages + 1 blocks of 64 position keys; their bias
 * scores. A tile is 64 x D, D = 32, 64 or 128. Position scores are skewed in registers by shuffles (common.cuh).
 *
 * Barriers: __syncthreads() once for each key tile, when its cp.async copies have landed.
 *
 * Bound: instruction issue, about 400 instructions for a 16 x 16 sub-tile, a quarter of them for dropout. */
#include "cuda/attention/common.cuh"

namespace {

/* Sub-tiles of 16 keys in one step of a warp. In 16 bits unrolled code overlaps two of them; longer code misses the
 * instruction cache: 4 is 8 % slower. The code of one in fp32 is as long as that of six. */
template <typename T> constexpr int STEP = sizeof(T) == 2 ? 2 : 1;

template <typename T, int D> struct forward_layout {
  static constexpr bool hold = sizeof(T) * D <= 256;
  static constexpr int stages = sizeof(T) * D <= 256 ? 2 : 1;
  static constexpr int blocks = sizeof(T) * D <= 128 ? 2 : 1; /* resident on a multiprocessor, at least */
  static constexpr int tile = VD_TILE * D;
  static constexpr int elements = (1 + 2 * stages + stages + 1) * tile;                /* q, k, v, table */
  static constexpr int bytes = elements * (int)sizeof(T) + (stages + 1) * VD_TILE * 4; /* and bias scores */
};

/* A warp's state over the key tiles. */
template <typename T, int D> struct forward_warp {
  vd_left_rows<T, D, forward_layout<T, D>::hold> q;
  float sum[D / 8][4];
  float highest[2], total[2]; /* of rows g and g + 8; total: only of this lane's columns */
  float before[2][4];         /* position scores of the previous block of e */
  bool have_before;
};

/* Masks the scores (units of log 2) of a sub-tile that is partly seen or has mask < 1. */
VD_DEV void mask_scores(const vd_band &band, bool trimmed, int x0, float s[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, k = i & 3;
    int x = x0 + g + 8 * (k >> 1) - (8 * jn + 2 * t + (k & 1));
    bool seen = vd_seen(band, x);
    float v = s[jn][k];
    if (!trimmed) v += __log2f(vd_mask(band, x));
    s[jn][k] = seen ? v : -INFINITY;
  }
}

/* With relative keys: masks keys that are out of reach or do not exist. */
VD_DEV void hide_scores(const vd_band &band, int x0, int kappa0, float s[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, k = i & 3, column = 8 * jn + 2 * t + (k & 1), x = x0 + g + 8 * (k >> 1) - column;
    if (!vd_seen(band, x) || kappa0 + column < band.oldest) s[jn][k] = -INFINITY;
  }
}

/* Scores, in units of log 2, of a warp's 16 queries from iw on and STEP sub-tiles of keys from kappa0 on. `unit`:
 * the 16-row block of the table ring that is block 0 of the first sub-tile. Returns a bit for each sub-tile of which
 * any pair is seen; the scores of the others are not written. */
template <typename T, int D, bool FULL, bool REL>
VD_DEV unsigned compute_scores(const vd_cuda_attention &a, const vd_band &band, forward_warp<T, D> &w, const T *k,
                               const T *table, const float *bias_scores, int ring, int unit, int iw, int kappa0,
                               float factor, float s[STEP<T>][2][4]) {
  unsigned active = 0;
#pragma unroll
  for (int b = 0; b < STEP<T>; b++) {
    int x0 = iw - kappa0 - 16 * b;
    if (FULL || vd_any_seen<REL>(band, x0, kappa0 + 16 * b)) {
      float next[2][4], position[2][4];
      int row = vd_ring_row(unit + b, ring), row_next = vd_ring_row(unit + b + 1, ring);
      if ((!FULL || b == 0) && !w.have_before) {
        vd_init_position_scores<REL>(w.before, bias_scores + row);
        vd_add_dots<T, D>(w.before, w.q, table, row);
      }
      w.have_before = true;
      vd_init_position_scores<REL>(next, bias_scores + row_next);
      vd_add_dots<T, D>(next, w.q, table, row_next);
      vd_dots<T, D>(s[b], w.q, k, 16 * b);
      vd_skew(position, w.before, next);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        s[b][i >> 2][i & 3] = (s[b][i >> 2][i & 3] + position[i >> 2][i & 3]) * factor;
        w.before[i >> 2][i & 3] = next[i >> 2][i & 3];
      }
      if (!FULL && !vd_all_full<REL>(band, x0, kappa0 + 16 * b)) {
        if constexpr (REL) {
          hide_scores(band, x0, kappa0 + 16 * b, s[b]);
        } else {
          mask_scores(band, a.trimmed, x0, s[b]);
        }
      }
      active |= 1U << b;
    }
  }
  return active;
}

/* One step of the on-line softmax: scores become weights (not yet divided by the sum), earlier sums are rescaled. */
template <typename T, int D, bool FULL>
VD_DEV void softmax_step(forward_warp<T, D> &w, unsigned active, float s[STEP<T>][2][4]) {
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    float highest = w.highest[ih];
#pragma unroll
    for (int b = 0; b < STEP<T>; b++)
      if (FULL || (active >> b & 1)) {
        highest = fmaxf(highest, fmaxf(s[b][0][2 * ih], s[b][0][2 * ih + 1]));
        highest = fmaxf(highest, fmaxf(s[b][1][2 * ih], s[b][1][2 * ih + 1]));
      }
    highest = vd_quad_max(highest);
    float base = highest == -INFINITY ? 0 : highest; /* no key seen so far */
    float rescale = vd_exp2(w.highest[ih] - base), total = w.total[ih] * rescale;
    w.highest[ih] = highest;
#pragma unroll
    for (int b = 0; b < STEP<T>; b++)
      if (FULL || (active >> b & 1)) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float p = vd_exp2(s[b][i >> 1][2 * ih + (i & 1)] - base);
          s[b][i >> 1][2 * ih + (i & 1)] = p;
          total += p;
        }
      }
    w.total[ih] = total;
#pragma unroll
    for (int n = 0; n < D / 8; n++) w.sum[n][2 * ih] *= rescale, w.sum[n][2 * ih + 1] *= rescale;
  }
}

/* sum += dropout(weights) v. */
template <typename T, int D, bool FULL, bool REL>
VD_DEV void weigh_values(const vd_cuda_attention &a, const vd_band &band, const vd_dropout_draws &drop,
                         forward_warp<T, D> &w, const T *v, unsigned active, int iw, int kappa0,
                         float s[STEP<T>][2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int b = 0; b < STEP<T>; b++) {
    if (!FULL && !(active >> b & 1)) continue;
    int x0 = iw - kappa0 - 16 * b;
    if (!FULL && !REL && a.trimmed) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        s[b][i >> 2][i & 3] *= vd_mask(band, x0 + g + 8 * ((i >> 1) & 1) - (8 * (i >> 2) + 2 * t + (i & 1)));
    }
    if (drop.threshold) {
      vd_philox_words words = vd_dropout_words(drop, iw, kappa0 + 16 * b);
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (!vd_dropout_keeps(words, drop.threshold, i >> 2, i & 3)) s[b][i >> 2][i & 3] = 0;
    }
    vd_frag_a<T> p;
    vd_result_to_a(p, s[b]);
    vd_accumulate<T, D>(w.sum, p, v, 16 * b);
  }
}

/* STEP sub-tiles of keys for this warp: scores, softmax, values. */
template <typename T, int D, bool FULL, bool REL>
VD_DEV void forward_step(const vd_cuda_attention &a, const vd_band &band, const vd_dropout_draws &drop,
                         forward_warp<T, D> &w, const T *k, const T *v, const T *table, const float *bias_scores,
                         int ring, int unit, int iw, int kappa0, float factor) {
  float s[STEP<T>][2][4];
  unsigned active =
      compute_scores<T, D, FULL, REL>(a, band, w, k, table, bias_scores, ring, unit, iw, kappa0, factor, s);
  if (!FULL && !active) return;
  softmax_step<T, D, FULL>(w, active, s);
  weigh_values<T, D, FULL, REL>(a, band, drop, w, v, active, iw, kappa0, s);
}

/* One key tile, from key kappa0 on, for this warp's 16 queries: STEP sub-tiles at a time. */
template <typename T, int D, bool REL>
VD_DEV void forward_key_tile(const vd_cuda_attention &a, const vd_band &band, const vd_dropout_draws &drop,
                             forward_warp<T, D> &w, const T *kt, const T *vt, const T *ts, const float *bias_scores,
                             int ring, int unit, int iw, int kappa0, float factor) {
#pragma unroll 1
  for (int b = 0; b < 4; b += STEP<T>) {
    int kappa = kappa0 + 16 * b, x0 = iw - kappa;
    const T *kb = kt + 16 * b * D, *vb = vt + 16 * b * D;
    if (vd_all_full<REL>(band, x0, kappa) && vd_all_full<REL>(band, x0 - 16 * (STEP<T> - 1), kappa)) {
      forward_step<T, D, true, REL>(a, band, drop, w, kb, vb, ts, bias_scores, ring, unit + b, iw, kappa, factor);
    } else {
      forward_step<T, D, false, REL>(a, band, drop, w, kb, vb, ts, bias_scores, ring, unit + b, iw, kappa, factor);
    }
  }
}

/* Divides by the softmax denominator; writes out and lse. */
template <typename T, int D>
VD_DEV void forward_finish(const vd_cuda_attention &a, const vd_dropout_draws &drop, vd_work_tile at,
                           forward_warp<T, D> &w, int iw, T *out, float *lse) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float factor[2];
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    float total = vd_quad_sum(w.total[ih]);
    int i = iw + g + 8 * ih;
    factor[ih] = drop.scale / total;
    if (t == 0 && i < a.block)
      lse[((int64_t)at.stream * a.n_head + at.head) * a.block + i] = w.highest[ih] * 0.69314718055994531f + logf(total);
  }
  const vd_row_view<T> to = vd_output_rows(a, out, at.head, at.stream);
  vd_write_rows<T, D>(to.row0, to.stride, iw, 0, a.block, a.d_head, w.sum, factor);
}

template <typename T, int D, bool REL>
__global__ void __launch_bounds__(VD_WARPGROUP, forward_layout<T, D>::blocks)
    forward_mma_kernel(const __grid_constant__ vd_cuda_attention a, const T *block, const T *memory, const T *table,
                       T *out, float *lse, vd_dropout_draws drop) {
  typedef forward_layout<T, D> layout;
  constexpr int stages = layout::stages, tile = layout::tile, ring = (stages + 1) * 4;
  extern __shared__ __align__(256) unsigned char smem[];
  __shared__ int next;
  T *qs = (T *)smem, *ks = qs + tile, *vs = ks + stages * tile, *ts = vs + stages * tile;
  float *bias_scores = (float *)(ts + (stages + 1) * tile);
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE), warp = (int)threadIdx.x >> 5;
  const float factor = rsqrtf((float)a.d_head) * 1.44269504088896341f;
  for (int tile_id = (int)blockIdx.x; tile_id < n_work_tile;) {
    const int requested = vd_request_tile(schedule, VD_WORK_FORWARD);
    const vd_work_tile at = vd_query_tile_at<REL>(a, schedule, tile_id);
    const vd_band band = vd_band_of<REL>(a, schedule, at.head);
    const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, table, at.head);
    vd_seek_dropout(&drop, a, at.head, at.stream);
    const int i0 = at.tile * VD_TILE, iw = i0 + 16 * warp, n = vd_key_tiles<REL>(band, at.tile);
    const int start = i0 - (n - 1) * VD_TILE; /* first key of the tiles */
    const vd_row_view<const T> queries = vd_block_rows(a, block, VD_QUERY, at.head, at.stream);
    const vd_kv_view<const T> memories = vd_kv_view_of(a, block, memory, at.head, at.stream);
    /* Key tile t needs blocks t and t + 1 of the table. Block 0 is beyond a span's reach (with relative keys it may
     * be within), and block n has distances <= 0. */
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
    forward_warp<T, D> w;
    w.highest[0] = w.highest[1] = -INFINITY, w.total[0] = w.total[1] = 0, w.have_before = false;
#pragma unroll
    for (int i = 0; i < D / 8 * 4; i++) w.sum[i >> 2][i & 3] = 0;
    vd_copy_tile<T, D>(qs, queries.row0, queries.stride, i0, 0, a.block, a.d_head);
    if (stages == 2) copy(0);
    for (int t = 0; t < n; t++) {
      if (stages == 1) {
        __syncthreads();
        copy(t);
      }
      vd_cp_async_wait_all();
      __syncthreads();
      if (t == 0) {
        if (REL && a.content_bias) vd_add_content_bias<T, D>(a, qs, at.head, iw);
        w.q.set(qs, 16 * warp);
      }
      if (stages == 2 && t + 1 < n) copy(t + 1);
      int kappa0 = start + t * VD_TILE, unit = (4 * t + 3 - warp) % ring;
      const T *kt = ks + t % stages * tile, *vt = vs + t % stages * tile;
      if (iw >= a.block) continue;
      forward_key_tile<T, D, REL>(a, band, drop, w, kt, vt, ts, bias_scores, ring, unit, iw, kappa0, factor);
    }
    forward_finish(a, drop, at, w, iw, out, lse);
    tile_id = vd_receive_tile(requested, &next);
  }
  vd_finish_work(schedule, VD_WORK_FORWARD);
}

template <typename T, int D> struct launch_forward {
  static cudaError_t run(const vd_cuda_attention *a, const void *block, const void *memory, const void *table,
                         void *out, float *lse, cudaStream_t stream) {
    auto kernel = a->rel_key ? forward_mma_kernel<T, D, true> : forward_mma_kernel<T, D, false>;
    return vd_launch_persistent(kernel, VD_WARPGROUP, forward_layout<T, D>::bytes, stream, NULL, 0, *a,
                                (const T *)block, (const T *)memory, (const T *)table, (T *)out, lse,
                                vd_make_dropout_draws(a));
  }
};

} // namespace

cudaError_t vd_cuda_attention_forward(const vd_cuda_attention *a, const void *block, const void *memory,
                                      const void *table, void *out, float *lse, cudaStream_t stream) {
  if (vd_uses_wgmma(a)) return vd_forward_wgmma(a, block, memory, table, out, lse, stream);
  cudaError_t e = a->rel_key ? vd_fill_bias_scores(a, stream) : cudaSuccess;
  if (e != cudaSuccess) return e;
  return vd_dispatch<launch_forward>(a, block, memory, table, out, lse, stream);
}
