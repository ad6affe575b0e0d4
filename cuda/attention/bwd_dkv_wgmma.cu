/* dK/dV kernel of the backward pass by wgmma, for 16-bit types and heads up to 64 wide:
 *
 *     dv_j = sum_i dropout(a_ij) dout_i
 *     dk_j = sum_i ds_ij (q_i + u) / sqrt(d_head),  ds_ij = a_ij (dropout(dout_i . v_j) - delta_i)
 *
 * with the weights a_ij recomputed from lse (soft mask: vd_score_gradient).
 *
 * Tiles: a persistent block takes 64 keys of one head and stream and goes over the query tiles of 64 that see them.
 * Keys are the rows of the results, so that weights and score gradients are left operands from registers. Six
 * products of 64 x 64 x 64 for each query tile: two blocks of position scores, scores k q^T, v dout^T, dv += weights
 * dout, dk += gradients q. Far tiles (bwd_dq_wgmma.cu) need no values and give no dv: four products.
 *
 * Warps: the consumer warpgroup (200 registers) has 16 keys a warp. The producer warpgroup (56 registers) copies the
 * tiles, shift and delta, and transposes the stored dropout mask to keys as rows.
 *
 * Shared memory, 109 KiB, two blocks for a multiprocessor: k, v, q, dout in two slots each (64 KiB), position keys
 * in three (24 KiB), the exchange of position scores (18 KiB, half), shift, delta, bias scores, mask bits. Skewing
 * position scores with keys as rows moves rows from warp to warp, hence the exchange through shared memory.
 *
 * Barriers: VD_TILE_FULL and VD_TILE_EMPTY for each query tile, vd_consumer_sync() after the exchange is written.
 *
 * Bound: instruction issue, as many instructions as the dQ kernel. Layer 11 of 12, 16 streams of 512, dropout 0.3 on
 * one H100: 0.139 ms alone (doc/PERFORMANCE.md). */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/pipeline.cuh"

namespace {

/* Row stride of the exchange: row 64 + e - e0 has position scores of e0 - 64 .. e0 + 63, e0 that of the tiles' first
 * key and query. */
enum { EXCHANGE_STRIDE = 72 };

/* Query tiles are counted through the work tiles of a block: tile c has queries, dout, `rows` and mask bits in slot
 * c & 1, and blocks c and c + 1 of the table in slots c % 3 and (c + 1) % 3. Work tile i has keys and values in slot
 * i & 1. */
template <typename T> struct dkv_smem {
  T k[2][VD_OPERAND], v[2][VD_OPERAND], q[2][VD_OPERAND], dout[2][VD_OPERAND];
  T table[3][VD_OPERAND];
  __half exchange[2 * VD_TILE * EXCHANGE_STRIDE];
  float rows[2][2][VD_TILE];              /* of a query tile: shift, delta */
  float bias_scores[3][VD_TILE];          /* bias scores: initial accumulators of position scores */
  uint32_t dropout_mask[2][VD_WARPGROUP]; /* mask bits of a query tile for each consumer thread */
  int next[2];
};

static_assert(VD_BLOCKS * (sizeof(dkv_smem<__half>) + 1024) <= 228 * 1024, "blocks of a multiprocessor");

/* Accumulators of a warp's 16 keys over the query tiles. */
struct dkv_state {
  float dk[VD_SUMS][4], dv[VD_SUMS][4];
};

/* vd_init_position_scores with position keys as rows. */
template <bool REL> VD_DEV void init_position_rows(float c[8][4], const float *score) {
  if constexpr (REL) {
    int row = 16 * (int)(threadIdx.x >> 5) + (int)((threadIdx.x & 31) >> 2);
    float x = score[row], y = score[row + 8];
#pragma unroll
    for (int i = 0; i < 32; i++) c[i >> 2][i & 3] = i & 2 ? y : x;
  }
}
/* Stores position scores of 64 distances, from row `block_row` on, in half precision (as vd_write_ring()). */
VD_DEV void write_exchange(__half *exchange, int block_row, const float c[8][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  __half *to = exchange + (block_row + 16 * (int)(threadIdx.x >> 5) + g) * EXCHANGE_STRIDE + 2 * t;
#pragma unroll
  for (int i = 0; i < 16; i++)
    *(uint32_t *)(to + (i & 1) * 8 * EXCHANGE_STRIDE + 8 * (i >> 1)) =
        vd_half_pair(c[i >> 1][2 * (i & 1)], c[i >> 1][2 * (i & 1) + 1]);
}
/* s += position scores of this warp's keys and the 16 queries from column 16 j on. */
VD_DEV void add_exchange(float s[2][4], const __half *exchange, int j) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const __half *from =
      exchange + (64 + 16 * (int)(threadIdx.x >> 5) + g) * EXCHANGE_STRIDE - 2 * t * (EXCHANGE_STRIDE - 1);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, ih = i >> 1 & 1, jj = i & 1;
    s[jn][2 * ih + jj] += __half2float(from[ih * 8 * EXCHANGE_STRIDE - (16 * j + 8 * jn + jj) * (EXCHANGE_STRIDE - 1)]);
  }
}

/* Transposes the dropout mask to keys as rows: element (jn, k) of sub-tile j is bit vd_mask_bit(j, jn, k). words:
 * the mask of 16 queries each, of which this warp's keys are one sub-tile. */
VD_DEV uint32_t transpose_mask(const uint32_t words[4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, sub_tile = (int)(threadIdx.x >> 5) & 3;
  uint32_t x = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) x |= ((words[j] << (2 * sub_tile)) & 0xc0c0c0c0U) >> (2 * j);
  /* Swap the halves of queries and of keys. Then lane 4 g' + t' has queries g' and g' + 8 and keys 2 t' + jj; wanted
   * are keys g and queries 2 t + jj. */
  x = (x & 0x5555aaaaU) | (x & 0x00005555U) << 17 | (x & 0xaaaa0000U) >> 17;
  uint32_t even = __shfl_sync(0xffffffffU, x, 8 * t + (g >> 1)),
           odd = __shfl_sync(0xffffffffU, x, 8 * t + 4 + (g >> 1));
  if (g & 1) even >>= 8, odd >>= 8;
  return (even & 0x00ff00ffU) | (odd & 0x00ff00ffU) << 8;
}

/* Sub-tile j of this warp's keys and 64 queries from i0 on: scores s become the weights that multiply values,
 * gradients of weights ds become gradients of scores. rows: shift of the queries; delta follows after 64. */
template <bool FULL, bool DROP, bool REL, bool TRIM>
VD_DEV void score_gradients(const vd_cuda_attention &a, const vd_band &band, float scale, const float *rows, int i0,
                            int kappa0, uint32_t dropout_mask, int j, float factor, float s[2][4], float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float unused = 0;
  rows += 16 * j, i0 += 16 * j;
  vd_masks m = vd_masks_of(band, i0 + 2 * t - kappa0 - g, scale);
#pragma unroll
  for (int jn = 0; jn < 2; jn++) {
    float2 shift = *(const float2 *)(rows + 8 * jn + 2 * t), delta = *(const float2 *)(rows + VD_TILE + 8 * jn + 2 * t);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int nearer = 8 * (e >> 1) - 8 * jn - (e & 1);
      bool keep = !DROP || (dropout_mask >> vd_mask_bit(j, jn, e) & 1);
      float own = (e & 1) ? delta.y : delta.x, weight;
      float score = fmaf(s[jn][e], factor, (e & 1) ? shift.y : shift.x);
      /* Keys that do not exist have result rows of their own, which are not written. */
      if (!FULL && (i0 + 8 * jn + 2 * t + (e & 1) >= a.block || (REL && !vd_masks_seen(m, nearer)))) score = -INFINITY;
      if constexpr (FULL || REL) {
        ds[jn][e] = vd_kept_gradient(score, keep, ds[jn][e], own, &weight);
      } else {
        ds[jn][e] = vd_masked_gradient<TRIM>(m, nearer, score, keep ? ds[jn][e] : 0, own, &weight, &unused);
        weight = keep ? weight : 0;
      }
      s[jn][e] = weight;
    }
  }
}

/* Starts the product s = k q^T of work tile i and query tile c, whose copies have landed, and writes the position
 * scores to the exchange. `keys`: this warp's keys in registers, or NULL. `near_alone`: the far block is not in shared
 * memory; its scores are masked. */
template <typename T, bool REL>
VD_DEV void start_scores(dkv_smem<T> *m, const vd_frag_a<T> *keys, int i, int c, bool near_alone, float s[8][4]) {
  float near_[8][4], far[8][4];
  const int near_slot = c % 3, far_slot = near_alone ? near_slot : (c + 1) % 3;
  init_position_rows<REL>(near_, m->bias_scores[near_slot]), init_position_rows<REL>(far, m->bias_scores[far_slot]);
  vd_wgmma_fence();
  vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(near_, m->table[near_slot], m->q[c & 1], REL);
  vd_wgmma_commit();
  vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(far, m->table[far_slot], m->q[c & 1], REL);
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_fence_operand<8>(near_);
  write_exchange(m->exchange, 64, near_);
  vd_wgmma_fence();
  if (keys) {
    vd_tile_product_rs<T, VD_K_MAJOR>(s, keys, m->q[c & 1], false);
  } else {
    vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(s, m->k[i & 1], m->q[c & 1], false);
  }
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_fence_operand<8>(far);
  write_exchange(m->exchange, 0, far);
}

/* A work tile of 64 keys: n query tiles from `first` on. Query tile t needs blocks t (nearer keys) and t + 1 of the
 * table. Of them the first `near_tiles` are within the head's own span. */
typedef struct dkv_work {
  vd_work_tile at;
  vd_band band;
  int kappa0, first, n, near_tiles;
} dkv_work;
template <bool REL>
VD_DEV dkv_work dkv_work_at(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int tile_id) {
  dkv_work w;
  w.at = vd_key_tile_at<REL>(a, schedule, tile_id);
  w.band = vd_band_of<REL>(a, schedule, w.at.head);
  w.kappa0 = w.at.tile * VD_TILE, w.first = max(w.kappa0, 0);
  w.n = min(a.block - 1, w.kappa0 + VD_TILE - 1 + w.band.reach) / VD_TILE - w.first / VD_TILE + 1;
  w.near_tiles = REL ? w.n : max(0, min(w.n, (w.band.own + 2 * VD_TILE - 1 + w.kappa0 - w.first) / VD_TILE));
  return w;
}
/* Whether the reach ends the work tile, not the block: the last query tile then sees nothing of its far block. */
VD_DEV bool ends_near_block(const dkv_work &w) {
  return w.first + (w.n - 1) * VD_TILE - w.kappa0 >= w.band.reach;
}
template <bool REL> VD_DEV int dkv_tiles(const vd_cuda_attention &a, const vd_tile_schedule *schedule) {
  return REL ? a.n_stream * a.n_head * (vd_far_tiles(a) + vd_ceil_div(a.block, VD_TILE))
             : schedule->dkv_first[a.n_head];
}

/* The t-th query tile of work tile i, the c-th of the block, for this warp's keys. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dkv_tile(const vd_cuda_attention &a, const dkv_work &work, float scale, dkv_smem<T> *m, dkv_state &w, int i,
                     int t, int c, bool near_alone, uint32_t dropout_mask, float factor) {
  float s[8][4], ds[8][4];
  const int kw = work.kappa0 + 16 * (int)(threadIdx.x >> 5);
  vd_frag_a<T> weight[4], gradient[4];
  start_scores<T, REL>(m, nullptr, i, c, near_alone, s);
  vd_wgmma_fence();
  vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(ds, m->v[i & 1], m->dout[c & 1], false);
  vd_wgmma_commit();
  vd_consumer_sync();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(s), vd_wgmma_fence_operand<8>(ds);
  const int i0 = work.first + t * VD_TILE;
  const float *rows = m->rows[c & 1][0];
  if (vd_all_full<false>(work.band, i0 - kw, kw) && vd_all_full<false>(work.band, i0 - kw + 48, kw) &&
      i0 + VD_TILE <= a.block) {
#pragma unroll
    for (int j = 0; j < 4; j++) add_exchange(s + 2 * j, m->exchange, j);
#pragma unroll
    for (int j = 0; j < 4; j++)
      score_gradients<true, DROP, REL, TRIM>(a, work.band, scale, rows, i0, kw, dropout_mask, j, factor, s + 2 * j,
                                             ds + 2 * j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int iq = i0 + 16 * j;
      if (vd_any_seen<false>(work.band, iq - kw, kw) && iq < a.block) {
        add_exchange(s + 2 * j, m->exchange, j);
        score_gradients<false, DROP, REL, TRIM>(a, work.band, scale, rows, i0, kw, dropout_mask, j, factor, s + 2 * j,
                                                ds + 2 * j);
      } else {
        vd_clear(s + 2 * j), vd_clear(ds + 2 * j);
      }
    }
  }
  vd_results_to_a(weight, s), vd_results_to_a(gradient, ds);
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_MN_MAJOR>(w.dv, weight, m->dout[c & 1], true);
  vd_tile_product_rs<T, VD_MN_MAJOR>(w.dk, gradient, m->q[c & 1], true);
  vd_wgmma_commit();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<VD_SUMS>(w.dv), vd_wgmma_fence_operand<VD_SUMS>(w.dk);
}

/* The same for a far tile, whose weights are 0: ds = -p delta. */
template <typename T>
VD_DEV void far_tile(const vd_cuda_attention &a, const dkv_work &work, dkv_smem<T> *m, dkv_state &w,
                     const vd_frag_a<T> keys[VD_LEFTS], int i, int t, int c, bool near_alone, float factor) {
  float s[8][4];
  const int column = 2 * (int)(threadIdx.x & 3);
  const int kw = work.kappa0 + 16 * (int)(threadIdx.x >> 5), i0 = work.first + t * VD_TILE;
  vd_frag_a<T> gradient[4];
  start_scores<T, false>(m, keys, i, c, near_alone, s);
  vd_consumer_sync();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(s);
  const float *rows = m->rows[c & 1][0] + column;
#pragma unroll
  for (int j = 0; j < 4; j++) add_exchange(s + 2 * j, m->exchange, j);
#pragma unroll
  for (int n = 0; n < 8; n++) {
    float2 shift = *(const float2 *)(rows + 8 * n), delta = *(const float2 *)(rows + VD_TILE + 8 * n);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      float p = vd_exp2(fmaf(s[n][e], factor, (e & 1) ? shift.y : shift.x));
      s[n][e] = p * -((e & 1) ? delta.y : delta.x);
    }
  }
  if (!vd_seen(work.band, i0 - kw - 15) || !vd_seen(work.band, i0 + 63 - kw) || i0 + VD_TILE > a.block) {
    const int query = i0 + column, x = query - kw - (int)(threadIdx.x & 31) / 4;
#pragma unroll
    for (int e = 0; e < 32; e++) {
      int later = 8 * (e >> 2) + (e & 1);
      bool seen = query + later < a.block && vd_seen(work.band, x + later - 8 * (e >> 1 & 1));
      s[e >> 2][e & 3] = seen ? s[e >> 2][e & 3] : 0;
    }
  }
  vd_results_to_a(gradient, s);
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_MN_MAJOR>(w.dk, gradient, m->q[c & 1], true);
  vd_wgmma_commit();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<VD_SUMS>(w.dk);
}

/* Operands of the kernel. */
typedef struct dkv_task {
  vd_cuda_attention_gradient g;
  const void *query; /* q + u, from the workspace */
  const float *shift, *delta;
  const uint32_t *dropout_mask;
  vd_dropout_draws drop;
} dkv_task;

/* The consumer warpgroup. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dkv_consumer(const vd_cuda_attention &a, const dkv_task &task, dkv_smem<T> *m) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = dkv_tiles<REL>(a, schedule);
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f;
  int tile_id = (int)blockIdx.x, c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const dkv_work work = dkv_work_at<REL>(a, schedule, tile_id);
    const bool ends_near = ends_near_block(work);
    const int lowest = vd_lowest<REL>(work.band), kw = work.kappa0 + 16 * (int)(threadIdx.x >> 5);
    dkv_state w;
    vd_frag_a<T> keys_left[VD_LEFTS] = {}; /* of far tiles: this warp's keys as left operands */
    vd_clear_sums(w.dk), vd_clear_sums(w.dv);
    for (int t = 0; t < work.n; t++, c++) {
      const bool near_alone = t + 1 == work.n && ends_near, all = t + 1 == work.n && !ends_near;
      vd_barrier_sync<VD_TILE_FULL>();
      const bool far = TRIM && t >= work.near_tiles;
      if (TRIM && t == 0) vd_load_lefts<T>(m->k[i & 1], keys_left);
      const uint32_t dropout_mask = DROP && !far ? m->dropout_mask[c & 1][threadIdx.x] : 0;
      if (!all) vd_barrier_arrive<VD_TILE_EMPTY>();
      if (far) {
        far_tile<T>(a, work, m, w, keys_left, i, t, c, near_alone, factor);
      } else {
        dkv_tile<T, DROP, REL, TRIM>(a, work, task.drop.scale, m, w, i, t, c, near_alone, dropout_mask, factor);
      }
      if (all) vd_barrier_arrive<VD_TILE_EMPTY>(); /* the next work tile's block 0 takes the slot of the far block */
    }
    tile_id = vd_announced_tile(&m->next[i & 1]);
    const float scales[2] = {scale, scale}, whole[2] = {1, 1};
    const vd_kv_view<T> to = vd_kv_view_of(a, (T *)task.g.dblock, (T *)task.g.dmemory, work.at.head, work.at.stream);
    const vd_row_view<T> keys = to.at(work.kappa0, VD_KEY), values = to.at(work.kappa0, VD_VALUE);
    vd_write_rows<T, VD_HEAD_WIDTH>(keys.row0, keys.stride, kw, lowest, a.block, a.d_head, w.dk, scales);
    if (!TRIM || work.near_tiles > 0)
      vd_write_rows<T, VD_HEAD_WIDTH>(values.row0, values.stride, kw, vd_lowest_value<REL>(work.band), a.block,
                                      a.d_head, w.dv, whole);
  }
  vd_finish_work(schedule, VD_WORK_DKV);
}

/* The producer warpgroup. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dkv_producer(const vd_cuda_attention &a, const dkv_task &task, dkv_smem<T> *m) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const vd_cuda_attention_gradient &g = task.g;
  const int n_work_tile = dkv_tiles<REL>(a, schedule), thread = (int)threadIdx.x - VD_WARPGROUP;
  int tile_id = (int)blockIdx.x, c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const int requested = vd_producer_request(schedule, VD_WORK_DKV);
    const dkv_work work = dkv_work_at<REL>(a, schedule, tile_id);
    const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, g.table, work.at.head);
    const vd_row_view<const T> queries = vd_query_rows<T, REL>(a, g, task.query, work.at.head, work.at.stream);
    const vd_row_view<const T> douts = vd_output_rows(a, (const T *)g.dout, work.at.head, work.at.stream);
    const int lowest = vd_lowest<REL>(work.band), n = work.n, near_tiles = TRIM ? work.near_tiles : n;
    const float *rows =
        (thread < VD_TILE ? task.shift : task.delta) + ((int64_t)work.at.stream * a.n_head + work.at.head) * a.block;
    auto copy_table = [&](int y, int slot) {
      vd_copy_positions<T, REL>(m->table[slot], m->bias_scores[slot], positions, work.kappa0 - work.first - y * VD_TILE,
                                a.d_head);
    };
    const bool ends_near = ends_near_block(work);
    const uint32_t *dropout_mask = nullptr; /* the mask of the next query tile */
    uint32_t words[4] = {0, 0, 0, 0};
    if (DROP) {
      int tile = work.first / VD_TILE;
      dropout_mask =
          vd_dropout_mask_tile(a, task.dropout_mask, work.at.stream, work.at.head, tile, tile - work.at.tile) +
          (thread & 31);
    }
    auto read_kept = [&]() {
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = dropout_mask[32 * j];
      dropout_mask += (vd_max_key_tiles(a) + 1) * VD_WARPGROUP;
    };
    if (DROP && near_tiles > 0) read_kept();
    for (int t = 0; t < n; t++, c++) {
      int i0 = work.first + t * VD_TILE, row = i0 + (thread & (VD_TILE - 1));
      if (c > 0) vd_barrier_sync<VD_TILE_EMPTY>();
      if (t == 0) {
        const vd_kv_view<const T> memories =
            vd_kv_view_of(a, (const T *)g.block, (const T *)g.memory, work.at.head, work.at.stream);
        const vd_row_view<const T> keys = memories.at(work.kappa0, VD_KEY), values = memories.at(work.kappa0, VD_VALUE);
        vd_copy_operand<T>(m->k[i & 1], keys.row0, keys.stride, work.kappa0, lowest, a.block, a.d_head);
        if (near_tiles > 0)
          vd_copy_operand<T>(m->v[i & 1], values.row0, values.stride, work.kappa0, vd_lowest_value<REL>(work.band),
                             a.block, a.d_head);
        copy_table(0, c % 3);
      }
      vd_copy_operand<T>(m->q[c & 1], queries.row0, queries.stride, i0, 0, a.block, a.d_head);
      if (t < near_tiles) vd_copy_operand<T>(m->dout[c & 1], douts.row0, douts.stride, i0, 0, a.block, a.d_head);
      vd_cp_async4(m->rows[c & 1][0] + thread, row < a.block ? rows + row : rows, row < a.block);
      if (t + 1 < n || !ends_near) copy_table(t + 1, (c + 1) % 3);
      vd_cp_async_commit();
      if (DROP && t < near_tiles) m->dropout_mask[c & 1][thread] = transpose_mask(words);
      if (DROP && t + 1 < near_tiles) read_kept();
      if (t + 1 == n) vd_producer_announce(requested, &m->next[i & 1]);
      vd_cp_async_wait_all();
      vd_fence_proxy_async();
      vd_barrier_arrive<VD_TILE_FULL>();
    }
    vd_producer_sync();
    tile_id = vd_announced_tile(&m->next[i & 1]);
  }
  if (c > 0) vd_barrier_sync<VD_TILE_EMPTY>();
}

template <typename T, bool DROP, bool REL, bool TRIM>
__global__ void __launch_bounds__(VD_SPECIALIZED_THREADS, VD_BLOCKS)
    dkv_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ dkv_task task) {
  extern __shared__ __align__(1024) unsigned char smem[];
  dkv_smem<T> *m = (dkv_smem<T> *)smem;
  if (threadIdx.x < VD_WARPGROUP) {
    vd_setmaxnreg_inc<200>();
    dkv_consumer<T, DROP, REL, TRIM>(a, task, m);
  } else {
    vd_setmaxnreg_dec<56>();
    dkv_producer<T, DROP, REL, TRIM>(a, task, m);
  }
}

template <typename T>
cudaError_t launch_dkv(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                       cudaStream_t stream) {
  constexpr bool REL = VD_HEAD_WIDTH == 64;
  const dkv_task task = {*g, ws->query, ws->shift, ws->delta, ws->dropout_mask, vd_make_dropout_draws(a)};
  auto kernel = vd_variant(a, dkv_wgmma_kernel<T, false, false, false>, dkv_wgmma_kernel<T, true, false, false>,
                           dkv_wgmma_kernel<T, false, false, true>, dkv_wgmma_kernel<T, true, false, true>,
                           dkv_wgmma_kernel<T, false, REL, false>, dkv_wgmma_kernel<T, true, REL, false>);
  return vd_launch_persistent(kernel, VD_SPECIALIZED_THREADS, (int)sizeof(dkv_smem<T>), stream, NULL, 0, *a, task);
}

} // namespace

#if VD_HEAD_WIDTH > 64
cudaError_t vd_dkv_wgmma_96(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_workspace *ws, cudaStream_t stream) {
  return launch_dkv<__nv_bfloat16>(a, g, ws, stream);
}
#else
cudaError_t vd_dkv_wgmma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                         const vd_backward_workspace *ws, cudaStream_t stream) {
  if (a->d_head > 64) return vd_dkv_wgmma_96(a, g, ws, stream);
  return a->type == VD_BF16 ? launch_dkv<__nv_bfloat16>(a, g, ws, stream) : launch_dkv<__half>(a, g, ws, stream);
}
#endif
