/* Backward pass, two kernels that both compute the weights again from lse:
 * by queries: a block takes 64 queries and goes over the key tiles in reach: dq, the table's and the span's gradient.
 *   The gradient of position scores is turned from key order to columns of e; what four warps have of one 64-wide block
 *   of e meets in shared memory, where one product with the queries sums over them before it is added to the table.
 * by keys: a block takes 64 keys and goes over the query tiles that see them, with keys as rows, so that weights and
 *   their gradients are left operands as they stand: dk and dv. */
#include "attention.cuh"

template <typename T, int D> struct vd_backward_layout {
  static constexpr bool small = sizeof(T) * D <= 128;
  static constexpr bool hold_query = small, hold_key = small;
  static constexpr int query_blocks = small ? 2 : 1, key_blocks = small ? 2 : 1;
  static constexpr int stages = sizeof(T) * D <= 256 ? 2 : 1;
  static constexpr int tile = VD_TILE * D, turned = VD_TILE * 2 * VD_TILE;
  static constexpr int query_bytes = ((2 + 2 * stages + stages + 1) * tile + turned) * (int)sizeof(T);
  static constexpr int key_bytes = (2 + 2 * stages + stages + 1) * tile * (int)sizeof(T) + stages * 512;
};

/* A warp's state over the key tiles. */
template <typename T, int D> struct vd_query_warp {
  vd_rows<T, D, vd_backward_layout<T, D>::hold_query> q, dout;
  float dq[D / 8][4];
  float lse[2], delta[2]; /* of rows g and g + 8; lse in units of log 2 */
  float before[2][4];     /* position scores of the block of e before the next one */
  float turned[2][4];     /* turned gradient of the sub-tile before the next one */
  bool have_before, have_turned;
  float dspan;
};

/* delta [n_stream, n_head, block] = sum over a head's columns of out * dout. Eight lanes share a row of a head. */
template <typename T>
__global__ void vd_delta_kernel(const __grid_constant__ vd_cuda_attention a, const T *out, const T *dout,
                                float *delta) {
  constexpr int chunk = 16 / (int)sizeof(T);
  int64_t id = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 8, row = id / a.n_head;
  int head = (int)(id % a.n_head), lane = (int)threadIdx.x % 8;
  bool valid = row < (int64_t)a.n_stream * a.block;
  float sum = 0;
  for (int c = lane * chunk; valid && c < a.d_head; c += 8 * chunk) {
    int64_t at = row * a.q_stride + head * a.d_head + c;
    uint4 x = *(const uint4 *)(out + at), y = *(const uint4 *)(dout + at);
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(T) == 4) {
        sum += __uint_as_float(xs[i]) * __uint_as_float(ys[i]);
      } else {
        float2 u = vd_unpack(xs[i], T()), v = vd_unpack(ys[i], T());
        sum += u.x * v.x + u.y * v.y;
      }
    }
  }
  for (int m = 4; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffU, sum, m);
  if (valid && lane == 0) delta[(row / a.block * a.n_head + head) * a.block + row % a.block] = sum;
}

/* From score s (units of log 2, less lse) and gradient dp of the dropped-out weight: the gradient of the score,
 * returned; the weight after mask, *weight; what goes to the span, added to *dspan. x is the distance. FULL: seen, with
 * mask 1. */
template <bool FULL>
VD_DEV float vd_score_gradient(const vd_band &band, bool trimmed, int x, float s, float dp, float delta, float *weight,
                               float *dspan) {
  float p = vd_exp2(s);
  if constexpr (FULL) {
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

/* Gradient of the scores of one 16 x 16 sub-tile, queries as rows. */
template <typename T, int D, bool FULL, bool DROP>
VD_DEV void vd_query_tile(const vd_cuda_attention &a, const vd_band &band, const vd_drop &drop, vd_query_warp<T, D> &w,
                          const T *k, const T *v, const T *table, int ring, int unit, int row, int iw, int kappa0,
                          float factor, float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, x0 = iw - kappa0;
  float next[2][4], position[2][4], s[2][4];
  if (!w.have_before) vd_dots<T, D>(w.before, w.q, table, vd_ring_row(unit, ring));
  w.have_before = true;
  vd_dots<T, D>(next, w.q, table, vd_ring_row(unit + 1, ring));
  vd_dots<T, D>(s, w.q, k, row);
  vd_skew(position, w.before, next);
#pragma unroll
  for (int i = 0; i < 8; i++) w.before[i >> 2][i & 3] = next[i >> 2][i & 3];
  vd_dots<T, D>(ds, w.dout, v, row);
  philox4x32_ctr_t words;
  if constexpr (DROP) words = vd_drop_words(a, drop, iw, kappa0);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, x = x0 + g + 8 * (e >> 1) - (8 * jn + 2 * t + (e & 1));
    float dp = ds[jn][e] * drop.scale, weight;
    if (DROP && !vd_kept(words, drop.threshold, jn, e)) dp = 0;
    ds[jn][e] = vd_score_gradient<FULL>(band, a.trimmed, x, (s[jn][e] + position[jn][e]) * factor - w.lse[e >> 1], dp,
                                        w.delta[e >> 1], &weight, &w.dspan);
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

/* dtable rows attn_span + e0 .. + 15 += factor * (columns col0.. of the exchange tile)^T q. */
template <typename T, int D>
VD_DEV void vd_add_to_table(const vd_cuda_attention &a, const vd_band &band, const T *turned, const T *q, int col0,
                            int e0, float factor, float *dtable) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float sum[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8 * 4; i++) sum[i >> 2][i & 3] = 0;
#pragma unroll
  for (int i = 0; i < VD_TILE; i += 16) {
    vd_frag_a<T> x;
    vd_load_a_trans<T, 2 * VD_TILE>(x, turned, i, col0);
    vd_accumulate<T, D>(sum, x, q, i);
  }
  /* Even lanes take row g, odd lanes row g + 8, so that each adds four neighbours at once. */
  int e = e0 + g + 8 * (t & 1);
  bool valid = vd_seen(band, -e) && -e <= a.attn_span;
  float *to = dtable + (int64_t)(a.attn_span + e) * a.d_head;
#pragma unroll
  for (int n = 0; n < D / 8; n++) {
    float give0 = (t & 1) ? sum[n][0] : sum[n][2], give1 = (t & 1) ? sum[n][1] : sum[n][3];
    float own0 = (t & 1) ? sum[n][2] : sum[n][0], own1 = (t & 1) ? sum[n][3] : sum[n][1];
    float got0 = __shfl_xor_sync(0xffffffffU, give0, 1), got1 = __shfl_xor_sync(0xffffffffU, give1, 1);
    float4 r = (t & 1) ? make_float4(got0, got1, own0, own1) : make_float4(own0, own1, got0, got1);
    int column = 8 * n + 4 * (t >> 1);
    r.x *= factor, r.y *= factor, r.z *= factor, r.w *= factor;
    if (valid && column < a.d_head) atomicAdd((float4 *)(to + column), r);
  }
}

/* One key tile for this warp: dq, and its blocks of e into the exchange tile. */
template <typename T, int D, bool DROP>
VD_DEV void vd_query_step(const vd_cuda_attention &a, const vd_band &band, const vd_drop &drop, vd_query_warp<T, D> &w,
                          const T *k, const T *v, const T *table, T *turned, int ring, int unit, int n_unit, int iw,
                          int kappa0, float factor) {
  int row0 = (threadIdx.x >> 5) * 16, base = unit % ring;
  /* Not unrolled: warps are at different places of the code, which must fit the instruction cache. */
#pragma unroll 1
  for (int b = 0; b < 4; b++) {
    float ds[2][4], here[2][4], block[2][4];
    bool active = iw < a.block && vd_any_seen(band, iw - kappa0 - 16 * b);
    vd_frag_a<T> x;
    vd_clear(here);
    if (active) {
      if (vd_all_full(band, iw - kappa0 - 16 * b)) {
        vd_query_tile<T, D, true, DROP>(a, band, drop, w, k, v, table, ring, base + b, 16 * b, iw, kappa0 + 16 * b,
                                        factor, ds);
      } else {
        vd_query_tile<T, D, false, DROP>(a, band, drop, w, k, v, table, ring, base + b, 16 * b, iw, kappa0 + 16 * b,
                                         factor, ds);
      }
      vd_as_a(x, ds);
      vd_accumulate<T, D>(w.dq, x, k, 16 * b);
      vd_unskew(here, ds);
    }
    vd_join(block, w.turned, here);
    vd_store_turned(turned, row0, (unit + b) % 8 * 16, block);
    if ((active || w.have_turned) && unit + b >= 4 && unit + b < n_unit) {
      vd_as_a(x, block);
      vd_accumulate<T, D>(w.dq, x, table, vd_ring_row(base + b, ring));
    }
    w.have_turned = active;
#pragma unroll
    for (int i = 0; i < 8; i++) w.turned[i >> 2][i & 3] = here[i >> 2][i & 3];
  }
}

/* Sum of the block's span gradient, into this item's place. */
VD_DEV void vd_store_dspan(float dspan, float *shared, float *place) {
  for (int m = 16; m; m >>= 1) dspan += __shfl_xor_sync(0xffffffffU, dspan, m);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = dspan;
  __syncthreads();
  if (threadIdx.x == 0) *place = shared[0] + shared[1] + shared[2] + shared[3];
}

template <typename T, int D>
VD_DEV void vd_query_begin(const vd_cuda_attention &a, const float *lse, const float *delta, vd_item it, int iw,
                           const T *qs, const T *dos, vd_query_warp<T, D> &w) {
  int lane = threadIdx.x & 31, row0 = (threadIdx.x >> 5) * 16;
  int64_t rows = ((int64_t)it.stream * a.n_head + it.head) * a.block;
  w.q.set(qs, row0), w.dout.set(dos, row0);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int i = iw + (lane >> 2) + 8 * ih;
    w.lse[ih] = i < a.block ? lse[rows + i] * 1.44269504088896341f : 0;
    w.delta[ih] = i < a.block ? delta[rows + i] : 0;
  }
#pragma unroll
  for (int i = 0; i < D / 8 * 4; i++) w.dq[i >> 2][i & 3] = 0;
  vd_clear(w.turned);
  w.have_before = w.have_turned = false, w.dspan = 0;
}

template <typename T, int D, bool DROP>
__global__ void __launch_bounds__(VD_THREADS, vd_backward_layout<T, D>::query_blocks)
    vd_query_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_cuda_attention_gradient g,
                    vd_drop drop, const float *delta, float *dspan) {
  typedef vd_backward_layout<T, D> layout;
  constexpr int stages = layout::stages, tile = layout::tile, ring = (stages + 1) * 4;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ int next;
  __shared__ float sums[4];
  T *qs = (T *)memory, *dos = qs + tile, *ks = dos + tile, *vs = ks + stages * tile, *ts = vs + stages * tile;
  T *turned = ts + (stages + 1) * tile;
  vd_plan *plan = (vd_plan *)a.plan;
  const T *table = (const T *)g.table;
  const int n_tile = vd_ceil_div(a.block, VD_TILE), n_item = a.n_head * a.n_stream * n_tile;
  const int warp = (int)threadIdx.x >> 5;
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f, scales[2] = {scale, scale};
  for (int item = (int)blockIdx.x; item < n_item;) {
    const int asked = vd_ask_next(plan, VD_WORK_QUERY);
    const vd_item it = vd_query_item(a, plan, item);
    const vd_band band = plan->band[it.head];
    vd_set_drop(&drop, a, it.head, it.stream);
    const int i0 = it.tile * VD_TILE, iw = i0 + 16 * warp, n = vd_ceil_div(band.reach, VD_TILE) + 1;
    const int start = i0 - (n - 1) * VD_TILE;
    const int64_t q0 = (int64_t)it.stream * a.block * a.q_stride + it.head * a.d_head;
    const int64_t k0 = ((int64_t)it.stream * a.kv_rows + a.window) * a.kv_stride + it.head * a.d_head;
    auto copy = [&](int t) { /* as in the forward pass */
                             int kappa0 = start + t * VD_TILE, slot = t % stages;
                             vd_copy_tile<T, D>(ks + slot * tile, (const T *)g.k + k0, a.kv_stride, kappa0, -band.reach,
                                                a.block, a.d_head);
                             vd_copy_tile<T, D>(vs + slot * tile, (const T *)g.v + k0, a.kv_stride, kappa0, -band.reach,
                                                a.block, a.d_head);
                             if (t + 1 < n)
                               vd_copy_tile<T, D>(ts + (t + 1) % (stages + 1) * tile, table, a.d_head,
                                                  a.attn_span + kappa0 - i0, 0, a.attn_span, a.d_head);
                             vd_copy_commit();
    };
    vd_query_warp<T, D> w;
    vd_copy_tile<T, D>(qs, (const T *)g.q + q0, a.q_stride, i0, 0, a.block, a.d_head);
    vd_copy_tile<T, D>(dos, (const T *)g.dout + q0, a.q_stride, i0, 0, a.block, a.d_head);
    copy(0);
    vd_copy_wait();
    __syncthreads();
    vd_query_begin<T, D>(a, g.lse, delta, it, iw, qs, dos, w);
    for (int t = 0; t < n; t++) {
      if (t > 0) vd_copy_wait();
      __syncthreads();
      if (stages == 2 && t + 1 < n) copy(t + 1);
      const T *kt = ks + t % stages * tile, *vt = vs + t % stages * tile;
      int kappa0 = start + t * VD_TILE, unit = 4 * t + 3 - warp;
      vd_query_step<T, D, DROP>(a, band, drop, w, kt, vt, ts, turned, ring, unit, 4 * n, iw, kappa0, factor);
      __syncthreads();
      if (stages == 1 && t + 1 < n) copy(t + 1);
      if (t > 0) {
        int e0 = start - i0 + (t - 1) * VD_TILE + 16 * warp;
        vd_add_to_table<T, D>(a, band, turned, qs, (4 * t + warp) % 8 * 16, e0, scale, g.dtable);
      }
    }
    vd_write_rows<T, D>((T *)g.dq + q0, a.q_stride, iw, 0, a.block, a.d_head, w.dq, scales);
    vd_store_dspan(w.dspan, sums, dspan + ((int64_t)it.head * a.n_stream + it.stream) * n_tile + it.tile);
    item = vd_take_next(asked, &next);
  }
  vd_no_more_work(plan, VD_WORK_QUERY);
}

/* dspan[s] += attn_span / ramp * the sum of its items, in a fixed order. */
__global__ void vd_dspan_kernel(int n, float factor, const float *item, float *dspan) {
  __shared__ float sums[VD_THREADS];
  float sum = 0;
  for (int i = (int)threadIdx.x; i < n; i += VD_THREADS) sum += item[(int64_t)blockIdx.x * n + i];
  sums[threadIdx.x] = sum;
  for (int m = VD_THREADS / 2; m; m >>= 1) {
    __syncthreads();
    if ((int)threadIdx.x < m) sums[threadIdx.x] += sums[threadIdx.x + m];
  }
  if (threadIdx.x == 0) dspan[blockIdx.x] += sums[0] * factor;
}

/* A warp's 16 keys over the query tiles. */
template <typename T, int D> struct vd_key_warp {
  vd_rows<T, D, vd_backward_layout<T, D>::hold_key> k, v;
  float dk[D / 8][4], dv[D / 8][4];
};

/* Scores of 16 keys (rows) and 16 queries: products with the keys and with two blocks of the table share the queries.
 */
template <typename T, int D>
VD_DEV void vd_key_scores(const vd_key_warp<T, D> &w, const T *q, int query, const T *table, int row0, int row1,
                          float s[2][4]) {
  float block0[2][4], block1[2][4], position[2][4];
  vd_clear(s), vd_clear(block0), vd_clear(block1);
#pragma unroll
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

/* Which of this lane's eight elements (keys as rows) are kept: bytes of the two lanes that hold its queries. */
VD_DEV void vd_key_drop(const vd_cuda_attention &a, const vd_drop &drop, int i0, int kappa0, unsigned kept[2]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  philox4x32_ctr_t words = vd_drop_words(a, drop, i0, kappa0);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) bits |= (vd_dropout_half(words, i) >= drop.threshold ? 1U : 0U) << i;
  kept[0] = __shfl_sync(0xffffffffU, bits, 8 * t + (g >> 1)) >> (g & 1);
  kept[1] = __shfl_sync(0xffffffffU, bits, 8 * t + 4 + (g >> 1)) >> (g & 1);
}

/* One 16 x 16 sub-tile: keys kappa0.. of this warp, queries i0.. which are rows `query`.. of the tiles. rows: lse and
 * delta of the tile's 64 queries. */
template <typename T, int D, bool FULL, bool DROP>
VD_DEV void vd_key_tile(const vd_cuda_attention &a, const vd_band &band, const vd_drop &drop, vd_key_warp<T, D> &w,
                        const T *q, const T *dout, const T *table, const float *rows, int query, int row0, int row1,
                        int i0, int kappa0, float factor) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float s[2][4], ds[2][4], unused = 0;
  unsigned kept[2] = {0xff, 0xff};
  vd_key_scores<T, D>(w, q, query, table, row0, row1, s);
  vd_dots<T, D>(ds, w.v, dout, query);
  if constexpr (DROP) vd_key_drop(a, drop, i0, kappa0, kept);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, column = 8 * jn + 2 * t + (e & 1), x = i0 + column - kappa0 - g - 8 * (e >> 1);
    bool keep = kept[e & 1] >> (2 * (e >> 1) + 4 * jn) & 1;
    float dp = keep ? ds[jn][e] * drop.scale : 0, weight;
    float score = s[jn][e] * factor - rows[query + column] * 1.44269504088896341f;
    ds[jn][e] =
        vd_score_gradient<FULL>(band, a.trimmed, x, score, dp, rows[VD_TILE + query + column], &weight, &unused);
    s[jn][e] = keep ? weight : 0;
  }
  vd_frag_a<T> x;
  vd_as_a(x, s);
  vd_accumulate<T, D>(w.dv, x, dout, query);
  vd_as_a(x, ds);
  vd_accumulate<T, D>(w.dk, x, q, query);
}

VD_DEV vd_item vd_key_item(const vd_cuda_attention &a, const vd_plan *plan, int item) {
  int rank = 0;
  while (item >= plan->key_first[rank + 1]) rank++;
  int head = plan->head[rank], far = vd_ceil_div(plan->band[head].reach, VD_TILE);
  int n_tile = far + vd_ceil_div(a.block, VD_TILE), rest = item - plan->key_first[rank];
  vd_item it = {head, rest / n_tile, rest % n_tile - far};
  return it;
}

template <typename T, int D, bool DROP>
__global__ void __launch_bounds__(VD_THREADS, vd_backward_layout<T, D>::key_blocks)
    vd_key_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_cuda_attention_gradient g,
                  vd_drop drop, const float *delta) {
  typedef vd_backward_layout<T, D> layout;
  constexpr int stages = layout::stages, tile = layout::tile, ring = stages + 1;
  extern __shared__ __align__(256) unsigned char memory[];
  __shared__ int next;
  T *ks = (T *)memory, *vs = ks + tile, *qs = vs + tile, *dos = qs + stages * tile, *ts = dos + stages * tile;
  float *rows = (float *)(ts + ring * tile);
  vd_plan *plan = (vd_plan *)a.plan;
  const int warp = (int)threadIdx.x >> 5, n_item = plan->key_first[a.n_head];
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f;
  for (int item = (int)blockIdx.x; item < n_item;) {
    const int asked = vd_ask_next(plan, VD_WORK_KEY);
    const vd_item it = vd_key_item(a, plan, item);
    const vd_band band = plan->band[it.head];
    vd_set_drop(&drop, a, it.head, it.stream);
    const int kappa0 = it.tile * VD_TILE, kw = kappa0 + 16 * warp, first = kappa0 > 0 ? kappa0 : 0;
    const int last = min(a.block - 1, kappa0 + VD_TILE - 1 + band.reach), n = last / VD_TILE - first / VD_TILE + 1;
    const int64_t q0 = (int64_t)it.stream * a.block * a.q_stride + it.head * a.d_head;
    const int64_t k0 = ((int64_t)it.stream * a.kv_rows + a.window) * a.kv_stride + it.head * a.d_head;
    const int64_t r0 = ((int64_t)it.stream * a.n_head + it.head) * a.block;
    /* Query tile t needs blocks t (nearer keys) and t + 1 of the table. */
    auto copy_table = [&](int y) {
      vd_copy_tile<T, D>(ts + y % ring * tile, (const T *)g.table, a.d_head, a.attn_span + kappa0 - first - y * VD_TILE,
                         0, a.attn_span, a.d_head);
    };
    auto copy = [&](int t) {
      int i0 = first + t * VD_TILE, slot = t % stages, i = (int)threadIdx.x & (VD_TILE - 1);
      vd_copy_tile<T, D>(qs + slot * tile, (const T *)g.q + q0, a.q_stride, i0, 0, a.block, a.d_head);
      vd_copy_tile<T, D>(dos + slot * tile, (const T *)g.dout + q0, a.q_stride, i0, 0, a.block, a.d_head);
      const float *from = ((int)threadIdx.x < VD_TILE ? g.lse : delta) + r0;
      bool valid = i0 + i < a.block;
      vd_copy4(rows + slot * VD_THREADS + threadIdx.x, valid ? from + i0 + i : from, valid);
      copy_table(t + 1);
      vd_copy_commit();
    };
    vd_key_warp<T, D> w;
#pragma unroll
    for (int i = 0; i < D / 8 * 4; i++) w.dk[i >> 2][i & 3] = w.dv[i >> 2][i & 3] = 0;
    vd_copy_tile<T, D>(ks, (const T *)g.k + k0, a.kv_stride, kappa0, -band.reach, a.block, a.d_head);
    vd_copy_tile<T, D>(vs, (const T *)g.v + k0, a.kv_stride, kappa0, -band.reach, a.block, a.d_head);
    copy_table(0);
    copy(0);
    for (int t = 0; t < n; t++) {
      vd_copy_wait();
      __syncthreads();
      if (t == 0) w.k.set(ks, 16 * warp), w.v.set(vs, 16 * warp);
      if (stages == 2 && t + 1 < n) copy(t + 1);
      const int slot = t % stages, i0 = first + t * VD_TILE;
#pragma unroll 1
      for (int b = 0; b < 4; b++) {
        int iq = i0 + 16 * b, unit = 3 + warp - b;
        if (iq >= a.block || !vd_any_seen(band, iq - kw)) continue;
        int row0 = (unit < 4 ? (t + 1) % ring * 4 + unit : t % ring * 4 + unit - 4) * 16;
        int row1 = (unit < 3 ? (t + 1) % ring * 4 + unit + 1 : t % ring * 4 + unit - 3) * 16;
        if (vd_all_full(band, iq - kw)) {
          vd_key_tile<T, D, true, DROP>(a, band, drop, w, qs + slot * tile, dos + slot * tile, ts,
                                        rows + slot * VD_THREADS, 16 * b, row0, row1, iq, kw, factor);
        } else {
          vd_key_tile<T, D, false, DROP>(a, band, drop, w, qs + slot * tile, dos + slot * tile, ts,
                                         rows + slot * VD_THREADS, 16 * b, row0, row1, iq, kw, factor);
        }
      }
      if (stages == 1 && t + 1 < n) {
        __syncthreads();
        copy(t + 1);
      }
    }
    const float scales[2] = {scale, scale}, kept[2] = {drop.scale, drop.scale};
    vd_write_rows<T, D>((T *)g.dk + k0, a.kv_stride, kw, -band.reach, a.block, a.d_head, w.dk, scales);
    vd_write_rows<T, D>((T *)g.dv + k0, a.kv_stride, kw, -band.reach, a.block, a.d_head, w.dv, kept);
    item = vd_take_next(asked, &next);
  }
  vd_no_more_work(plan, VD_WORK_KEY);
}

size_t vd_cuda_attention_workspace_size(const vd_cuda_attention *a) {
  size_t rows = (size_t)a->n_stream * (size_t)a->n_head;
  return rows * ((size_t)a->block + (size_t)vd_ceil_div(a->block, VD_TILE)) * sizeof(float);
}

template <typename T, int D>
static cudaError_t vd_backward(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, cudaStream_t stream) {
  typedef vd_backward_layout<T, D> layout;
  int n_row = a->n_stream * a->n_head, items = n_row * vd_ceil_div(a->block, VD_TILE), blocks = 0;
  float *delta = (float *)g->workspace, *dspan = delta + (int64_t)n_row * a->block;
  const vd_drop drop = vd_make_drop(a);
  auto query = drop.threshold ? vd_query_kernel<T, D, true> : vd_query_kernel<T, D, false>;
  auto key = drop.threshold ? vd_key_kernel<T, D, true> : vd_key_kernel<T, D, false>;
  cudaStream_t side = g->side ? g->side : stream;
  int64_t lanes = (int64_t)n_row * a->block * 8;
  vd_delta_kernel<T>
      <<<(unsigned)((lanes + 255) / 256), 256, 0, stream>>>(*a, (const T *)g->out, (const T *)g->dout, delta);
  cudaError_t e = vd_fill_device((const void *)query, layout::query_bytes, &blocks);
  if (e == cudaSuccess && side != stream) e = cudaEventRecord(g->fork, stream);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(side, g->fork, 0);
  if (e != cudaSuccess) return e;
  query<<<blocks, VD_THREADS, layout::query_bytes, stream>>>(*a, *g, drop, delta, dspan);
  e = vd_fill_device((const void *)key, layout::key_bytes, &blocks);
  if (e != cudaSuccess) return e;
  key<<<blocks, VD_THREADS, layout::key_bytes, side>>>(*a, *g, drop, delta);
  vd_dspan_kernel<<<a->n_span, VD_THREADS, 0, stream>>>(items / a->n_span, (float)a->attn_span / (float)a->ramp, dspan,
                                                        g->dspan);
  if (side != stream) e = cudaEventRecord(g->join, side);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(stream, g->join, 0);
  return e == cudaSuccess ? cudaGetLastError() : e;
}

template <typename T>
static cudaError_t vd_backward_width(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                     cudaStream_t stream) {
  if (a->d_head <= 32) return vd_backward<T, 32>(a, g, stream);
  if (a->d_head <= 64) return vd_backward<T, 64>(a, g, stream);
  return vd_backward<T, 128>(a, g, stream);
}

cudaError_t vd_cuda_attention_backward(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                       cudaStream_t stream) {
  switch (a->type) {
  case VD_CUDA_FP32:
    return vd_backward_width<float>(a, g, stream);
  case VD_CUDA_BF16:
    return vd_backward_width<__nv_bfloat16>(a, g, stream);
  case VD_CUDA_FP16:
    return vd_backward_width<__half>(a, g, stream);
  }
  return cudaErrorInvalidValue;
}
