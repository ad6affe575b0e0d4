/* dQ kernel of the backward pass by wgmma, for 16-bit types and heads up to 64 wide:
 *
 *      dq_i = sum_j ds_ij (k_j + p(i - j)) / sqrt(d_head),  dp(x) = sum over pairs at distance x of ds_ij q_i /
 * sqrt(d_head)
 *
 * and partial sums of the gradients of spans, or of the biases u and v; ds_ij as in bwd_dkv_wgmma.cu.
 *
 * Tiles: a persistent block takes 64 queries of one head and stream and goes over the key tiles of 64 in reach, or over
 * a split of them (splits.cuh). Six products of 64 x 64 x 64 for each key tile: position scores, scores, dout v^T, dq
 * += ds k, dq += skewed ds p, dp = skewed ds^T q. Far tiles, which are beyond the own span of a head with a trimmed
 * softmax, need no dout v^T. dp is added by atomics of 16 bytes to an array in the order of the accumulators
 * (vd_add_table_block).
 *
 * Warps: the consumer warpgroup (208 registers) has 16 queries a warp. The producer warpgroup (48 registers) copies
 * the tiles, bias scores and the dropout mask.
 *
 * Shared memory, 110 KiB, two blocks for a multiprocessor: q, k, v in two slots each (48 KiB), position keys in
 * three (24 KiB), two tiles of score gradients by columns of e ("skewed", 16 KiB), a ring buffer of position scores
 * for each warp (19 KiB, half), ones, bias scores, mask bits. A skewed tile is complete after two key tiles; it is
 * then an operand of both the gradient of the queries and that of the table.
 *
 * Barriers: VD_TILE_FULL and VD_TILE_EMPTY for each key tile, vd_consumer_sync() when a skewed tile is complete.
 *
 * Bound: the data path of shared memory and L1 (60 % busy) and waits between few warps. A key tile takes a
 * multiprocessor about 3,000 cycles with two blocks (doc/notes/2026-11-28-attention-splits.md). */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/bwd_skew.cuh"
#include "cuda/attention/splits.cuh"

namespace {

/* Key tiles are counted through the work tiles of a block: tile c has keys, values and mask bits in slot c & 1; the
 * block of e that it ends with is number c + 1, in slot (c + 1) & 1 of `skewed` and (c + 1) % 3 of the table. */
template <typename T> struct dq_smem {
  T skewed[2][VD_PANEL]; /* score gradients by columns of e */
  T q[2][VD_OPERAND], k[2][VD_OPERAND], v[2][VD_OPERAND], table[3][VD_OPERAND];
  __half ring[VD_WARPGROUP / 32][16 * VD_RING_STRIDE];
  T ones[8 * 64];
  float bias_scores[3][VD_TILE];          /* bias scores: initial accumulators of position scores */
  uint32_t dropout_mask[2][VD_WARPGROUP]; /* mask bits of a key tile for each consumer thread */
  float sums[4];
  int next[2], last_split;
};

static_assert(VD_BLOCKS * (sizeof(dq_smem<__half>) + 1024) <= 228 * 1024, "blocks of a multiprocessor");

/* A warp's state over the key tiles. */
template <typename T, bool REL> struct dq_state {
  vd_frag_a<T> dout[VD_LEFTS];
  float dq[VD_SUMS][4];
  float dq_position[REL ? 8 : 1][4]; /* with relative keys apart from dq: its sum is the gradient of v */
  float shift[2], delta[2];          /* of rows g and g + 8 */
  float dspan;
};

/* Sub-tile j of 16 queries from i0 on and 64 keys: gradients of weights ds become gradients of scores. */
template <typename T, bool FULL, bool DROP, bool REL, bool TRIM>
VD_DEV void score_gradients(const vd_band &band, float scale, dq_state<T, REL> &w, uint32_t dropout_mask, int j, int i0,
                            int kappa0, float factor, const float s[2][4], float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  vd_masks m = vd_masks_of(band, i0 - kappa0 - 16 * j + g - 2 * t, scale);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, nearer = 8 * jn + (e & 1) - 8 * (e >> 1);
    float score = fmaf(s[jn][e], factor, w.shift[e >> 1]), delta = w.delta[e >> 1], weight;
    const bool keep = !DROP || (dropout_mask >> vd_mask_bit(j, jn, e) & 1);
    if (REL && !FULL)
      score = vd_masks_seen(m, nearer) && kappa0 + 16 * j + 8 * jn + 2 * t + (e & 1) >= band.oldest ? score : -INFINITY;
    if constexpr (FULL || REL) {
      ds[jn][e] = vd_kept_gradient(score, keep, ds[jn][e], delta, &weight);
    } else {
      ds[jn][e] = vd_masked_gradient<TRIM>(m, nearer, score, keep ? ds[jn][e] : 0, delta, &weight, &w.dspan);
    }
  }
}

/* Score gradients, as left operands, of this warp's queries and the t-th key tile of the work tile, the c-th of the
 * block, whose copies have landed. Without relative keys the last tile's block of e has no distances above 0 and no
 * place in the table; the scores of the block that is read instead are masked. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dq_scores(float scale, const vd_query_work &work, dq_smem<T> *m, dq_state<T, REL> &w, const T *q,
                      const vd_frag_a<T> queries[VD_LEFTS], int t, int c, uint32_t dropout_mask, float factor,
                      vd_frag_a<T> gradient[4]) {
  float s[8][4], position[8][4], ds[8][4];
  __half *ring = m->ring[threadIdx.x >> 5];
  const int warp = (int)(threadIdx.x >> 5), unit = 4 * (c + 1) + 7 - warp,
            slot = (REL || t + 1 < work.left ? c + 1 : c) % 3;
  if constexpr (REL) vd_init_position_tile(position, m->bias_scores[slot]);
  vd_wgmma_fence();
  if constexpr (REL) {
    vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(position, q, m->table[slot], true);
    vd_wgmma_commit();
    vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(s, q, m->k[c & 1], false);
  } else {
    vd_tile_product_rs<T, VD_K_MAJOR>(position, queries, m->table[slot], false);
    vd_wgmma_commit();
    vd_tile_product_rs<T, VD_K_MAJOR>(s, queries, m->k[c & 1], false);
  }
  vd_wgmma_commit();
  vd_tile_product_rs<T, VD_K_MAJOR>(ds, w.dout, m->v[c & 1], false);
  vd_wgmma_commit();
  vd_end_scores<2>(ring, c + 1, position, s);
  vd_wgmma_fence_operand<8>(ds);
  const int iw = work.i0 + 16 * warp, kappa0 = work.start + t * VD_TILE;
  if (vd_row_full<REL>(work.band, iw, kappa0)) {
#pragma unroll
    for (int j = 0; j < 4; j++) vd_add_ring(s + 2 * j, ring, unit + j);
#pragma unroll
    for (int j = 0; j < 4; j++)
      score_gradients<T, true, DROP, REL, TRIM>(work.band, scale, w, dropout_mask, j, iw, kappa0, factor, s + 2 * j,
                                                ds + 2 * j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (vd_any_seen<REL>(work.band, iw - kappa0 - 16 * j, kappa0 + 16 * j)) {
        vd_add_ring(s + 2 * j, ring, unit + j);
        score_gradients<T, false, DROP, REL, TRIM>(work.band, scale, w, dropout_mask, j, iw, kappa0, factor, s + 2 * j,
                                                   ds + 2 * j);
      } else {
        vd_clear(ds + 2 * j);
      }
    }
  }
  vd_results_to_a(gradient, ds);
}

/* The same for a far tile, whose weights are 0: ds = -p delta. The size of delta is added to the exponent, and its sign
 * is set last. */
template <typename T>
VD_DEV void far_scores(const vd_query_work &work, dq_smem<T> *m, const dq_state<T, false> &w,
                       const vd_frag_a<T> q[VD_LEFTS], int t, int c, float factor, vd_frag_a<T> gradient[4]) {
  float s[8][4], position[8][4], shift[2];
  uint32_t sign[2];
  __half *ring = m->ring[threadIdx.x >> 5];
  const int warp = (int)(threadIdx.x >> 5), iw = work.i0 + 16 * warp, kappa0 = work.start + t * VD_TILE;
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_K_MAJOR>(position, q, m->table[(c + 1) % 3], false);
  vd_wgmma_commit();
  vd_tile_product_rs<T, VD_K_MAJOR>(s, q, m->k[c & 1], false);
  vd_wgmma_commit();
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    shift[ih] = __log2f(fabsf(w.delta[ih])) + w.shift[ih];
    sign[ih] = w.delta[ih] > 0 ? 0x80008000U : 0;
  }
  vd_end_scores<1>(ring, c + 1, position, s);
#pragma unroll
  for (int j = 0; j < 4; j++) vd_add_ring(s + 2 * j, ring, 4 * (c + 1) + 7 - warp + j);
#pragma unroll
  for (int i = 0; i < 32; i++) s[i >> 2][i & 3] = vd_exp2(fmaf(s[i >> 2][i & 3], factor, shift[i >> 1 & 1]));
  if (!vd_far_row_seen(work.band, iw, kappa0)) {
    const int x = iw - kappa0 + (int)(threadIdx.x & 31) / 4 - 2 * (int)(threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < 32; i++)
      s[i >> 2][i & 3] = vd_seen(work.band, x + 8 * (i >> 1 & 1) - 8 * (i >> 2) - (i & 1)) ? s[i >> 2][i & 3] : 0;
  }
  vd_results_to_a(gradient, s);
#pragma unroll
  for (int i = 0; i < 16; i++) gradient[i >> 2].x[i & 3] ^= sign[i & 1];
}

/* Adds the complete block c of e, which begins with e0, to the table's gradient by atomics, while the products of dq
 * run: the position part from this block, the other from key tile c. LAST: the block after the last key tile. With
 * relative keys it begins with distance 0, and only that distance exists; else it is the first block of the next split,
 * which adds its own part of it. */
template <typename T, bool REL, bool LAST>
VD_DEV void add_block(dq_smem<T> *m, dq_state<T, REL> &w, const vd_position_gradients &p, const vd_frag_a<T> *gradient,
                      const T *q, int c, int e0, float factor) {
  float sum[VD_SUMS][4], rows[1][4] = {{0, 0, 0, 0}}; /* rows: column sums of the skewed tile, with relative keys */
  float(*dq)[4] = REL ? w.dq_position : w.dq;
  const T *skewed = m->skewed[c & 1], *table = m->table[c % 3];
  vd_wgmma_fence();
  vd_tile_product<T, VD_MN_MAJOR, VD_MN_MAJOR>(sum, skewed, q, false);
#pragma unroll
  for (int i = 0; REL && i < 4; i++)
    vd_wgmma_ss<T, 8, VD_MN_MAJOR, VD_K_MAJOR>(rows, vd_smem_descriptor(skewed) + i * VD_MN_MAJOR,
                                               vd_smem_descriptor(m->ones), i > 0);
  vd_wgmma_commit();
  if constexpr (LAST && !REL) {
    vd_tile_product<T, VD_K_MAJOR, VD_MN_MAJOR>(dq, skewed, table, true);
  } else if constexpr (LAST) {
    vd_wgmma_ss<T, 64, VD_K_MAJOR, VD_MN_MAJOR>(dq, vd_smem_descriptor(skewed), vd_smem_descriptor(table), true);
  } else {
    vd_tile_product_rs<T, VD_MN_MAJOR>(w.dq, gradient, m->k[c & 1], true);
    vd_tile_product<T, VD_K_MAJOR, VD_MN_MAJOR>(dq, skewed, table, true);
  }
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_fence_operand<VD_SUMS>(sum);
  if constexpr (REL) vd_wgmma_fence_operand<1>(rows);
  if constexpr (REL) vd_add_row_sums(p, rows[0], e0 + 16 * (int)(threadIdx.x >> 5), factor);
  vd_add_table_block<VD_SUMS>(p.row0, REL ? e0 - VD_TILE : e0, sum, factor); /* relative keys have a distance 0 */
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<VD_SUMS>(w.dq);
  if constexpr (REL) vd_wgmma_fence_operand<8>(w.dq_position);
}

/* The slot of dout at the start of a work tile whose first key tile is the block's c-th. It shares the slot with
 * something needed later: with relative keys, where a work tile starts when the previous one has ended, a skewed
 * tile; else block 0 of the table. */
template <typename T, bool REL> VD_DEV T *dout_slot(dq_smem<T> *m, int c) {
  return REL ? m->skewed[(c + 1) & 1] : m->table[c % 3];
}

/* Starts a work tile whose first copies have landed: loads dout, shift and delta to registers. With relative keys also
 * zeros the other skewed tile, for keys before the first, and computes the position scores of the block of e before
 * them. */
template <typename T, bool REL>
VD_DEV void dq_begin(const vd_cuda_attention &a, const vd_backward_workspace &ws, vd_work_tile at, int iw,
                     dq_smem<T> *m, dq_state<T, REL> &w, const T *q, int c) {
  int lane = threadIdx.x & 31;
  int64_t rows = ((int64_t)at.stream * a.n_head + at.head) * a.block;
  for (int i = (int)threadIdx.x; REL && i < VD_TILE_BYTES / 16; i += VD_WARPGROUP)
    ((uint4 *)m->skewed[c & 1])[i] = make_uint4(0, 0, 0, 0);
  vd_load_lefts<T>(dout_slot<T, REL>(m, c), w.dout);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int i = iw + (lane >> 2) + 8 * ih;
    w.shift[ih] = i < a.block ? ws.shift[rows + i] : -INFINITY;
    w.delta[ih] = i < a.block ? ws.delta[rows + i] : 0;
  }
  vd_clear_sums(w.dq);
  w.dspan = 0;
  if constexpr (REL) {
    float position[8][4];
    vd_clear_sums(w.dq_position);
    vd_init_position_tile(position, m->bias_scores[c % 3]);
    vd_wgmma_fence();
    vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(position, q, m->table[c % 3], true);
    vd_wgmma_commit();
    vd_wgmma_wait<0>();
    vd_wgmma_fence_operand<8>(position);
    vd_write_ring(m->ring[threadIdx.x >> 5], c, position);
  }
  vd_consumer_sync();
}

/* The turn before a split's first key tile: position scores of the block of e that both have, and zeros where it would
 * hold score gradients of the key tile before. */
template <typename T> VD_DEV void begin_split(dq_smem<T> *m, const T *q, int c) {
  float position[8][4];
  const vd_frag_a<T> none[4] = {};
  vd_wgmma_fence();
  vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(position, q, m->table[(c + 1) % 3], false);
  vd_wgmma_commit();
  vd_write_skewed<T>(m->skewed, c + 1, none);
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(position);
  vd_write_ring(m->ring[threadIdx.x >> 5], c + 1, position);
}
/* After the last key tile of a split that is not the query tile's last: adds its part of the block of e that the next
 * split begins with. c: number of the key tile that would follow. */
template <typename T>
VD_DEV void end_split(dq_smem<T> *m, dq_state<T, false> &w, const vd_position_gradients &p, const vd_query_work &work,
                      const T *q, int c, float scale) {
  const vd_frag_a<T> none[4] = {};
  vd_write_skewed<T>(m->skewed, c + 1, none);
  vd_fence_proxy_async();
  vd_consumer_sync();
  add_block<T, false, true>(m, w, p, nullptr, q, c, work.first_block + work.n * VD_TILE, scale);
  vd_barrier_arrive<VD_TILE_EMPTY>();
}
/* Stores the sums of this split. True where all others are stored: then `w` has the joint sums. */
template <typename T>
VD_DEV bool join_splits(const vd_cuda_attention &a, const vd_query_work &work, dq_smem<T> *m, dq_state<T, false> &w) {
  const float all[2] = {1, 1};
  vd_store_split(a, work, w.dq, make_float4(w.dspan, 0, 0, 0));
  if (!vd_is_last_split(a, work, &m->last_split)) return false;
  vd_clear_sums(w.dq);
  w.dspan = 0;
  for (int split = 0; split < work.n_split; split++) {
    w.dspan += vd_split_rest(a, work, split).x;
    vd_add_split(a, work, split, all, all, w.dq);
  }
  return true;
}

/* Operands of the kernel. */
typedef struct dq_task {
  vd_cuda_attention_gradient g;
  vd_backward_workspace ws;
  vd_dropout_draws drop;
} dq_task;

/* Ends a work tile: partial sums of span or bias gradients, and dq. */
template <typename T, bool REL>
VD_DEV void dq_end(const vd_cuda_attention &a, const dq_task &task, const vd_query_work &work, int tile_id,
                   const vd_position_gradients &p, dq_smem<T> *m, dq_state<T, REL> &w, const T *q, int c, float scale) {
  const float scales[2] = {scale, scale};
  if constexpr (REL) {
    add_block<T, REL, true>(m, w, p, nullptr, q, c, work.first_block + work.n * VD_TILE, scale);
    vd_barrier_arrive<VD_TILE_EMPTY>();
    vd_store_dbias<64>(w.dq, w.dq_position, (float *)m->ring[0], scale, a.d_head,
                       task.ws.dbias + (int64_t)tile_id * 2 * a.d_head);
#pragma unroll
    for (int i = 0; i < 32; i++) w.dq[i >> 2][i & 3] += w.dq_position[i >> 2][i & 3];
  } else {
    int n_tile = vd_ceil_div(a.block, VD_TILE);
    vd_store_dspan(w.dspan, m->sums,
                   task.ws.dspan + ((int64_t)work.at.head * a.n_stream + work.at.stream) * n_tile + work.at.tile);
  }
  const vd_row_view<T> to = vd_block_rows(a, (T *)task.g.dblock, VD_QUERY, work.at.head, work.at.stream);
  vd_write_rows<T, VD_HEAD_WIDTH>(to.row0, to.stride, work.i0 + 16 * (int)(threadIdx.x >> 5), 0, a.block, a.d_head,
                                  w.dq, scales);
}

/* The consumer warpgroup. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dq_consumer(const vd_cuda_attention &a, const dq_task &task, dq_smem<T> *m) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = vd_query_items<REL, TRIM>(a, schedule);
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f;
  for (int i = (int)threadIdx.x; REL && i < 8 * 64; i += VD_WARPGROUP) m->ones[i] = (T)1.0f;
  int tile_id = (int)blockIdx.x, c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const vd_query_work work = vd_query_work_at<REL, TRIM>(a, schedule, tile_id);
    const bool splits = vd_can_split<REL, TRIM>() && work.n_split > 1, block_left = splits && work.n < work.left;
    vd_position_gradients p = {task.g.dtable};
    if constexpr (REL) {
      p = vd_position_gradients_of<true>(a, task.g, task.ws.dsum, work.at.head, work.band);
      p.row0 = task.ws.dtable + (int64_t)work.at.head * vd_table_blocks(a.reach) * VD_TILE * VD_TILE;
    }
    const T *q = m->q[i & 1];
    dq_state<T, REL> w;
    vd_frag_a<T> queries[VD_LEFTS] = {}; /* without relative keys, as left operands */
    for (int t = 0; t < work.n; t++, c++) {
      vd_frag_a<T> gradient[4];
      vd_barrier_sync<VD_TILE_FULL>();
      if (!REL && t == 0) vd_load_lefts<T>(q, queries);
      if (t == 0) dq_begin<T, REL>(a, task.ws, work.at, work.i0 + 16 * (int)(threadIdx.x >> 5), m, w, q, c);
      const bool far = TRIM && t < work.far;
      const uint32_t dropout_mask = DROP && !far ? m->dropout_mask[c & 1][threadIdx.x] : 0;
      if (!(REL || block_left) || t + 1 < work.n) vd_barrier_arrive<VD_TILE_EMPTY>();
      if constexpr (vd_can_split<REL, TRIM>()) {
        if (work.lead && t == 0) {
          begin_split<T>(m, q, c);
          continue;
        }
      }
      if constexpr (TRIM) {
        if (far) far_scores<T>(work, m, w, queries, t, c, factor, gradient);
      }
      if (!far)
        dq_scores<T, DROP, REL, TRIM>(task.drop.scale, work, m, w, q, queries, t, c, dropout_mask, factor, gradient);
      vd_write_skewed<T>(m->skewed, c + 1, gradient);
      vd_fence_proxy_async();
      vd_consumer_sync();
      if (REL || t > 0) {
        add_block<T, REL, false>(m, w, p, gradient, q, c, work.first_block + t * VD_TILE, scale);
      } else { /* block 0 is beyond the reach, and there is another tile */
        vd_wgmma_fence();
        vd_tile_product_rs<T, VD_MN_MAJOR>(w.dq, gradient, m->k[c & 1], true);
        vd_wgmma_commit();
        vd_wgmma_wait<0>();
        vd_wgmma_fence_operand<VD_SUMS>(w.dq);
      }
    }
    const int next = vd_announced_tile(&m->next[i & 1]);
    bool done = true;
    if constexpr (vd_can_split<REL, TRIM>()) {
      if (block_left) end_split<T>(m, w, p, work, q, c, scale);
      if (splits) done = join_splits<T>(a, work, m, w);
    }
    if (done) dq_end<T, REL>(a, task, work, tile_id, p, m, w, q, c, scale);
    tile_id = next;
  }
  vd_finish_work(schedule, VD_WORK_DQ);
}

/* The producer warpgroup. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dq_producer(const vd_cuda_attention &a, const dq_task &task, dq_smem<T> *m) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const vd_cuda_attention_gradient &g = task.g;
  const int n_work_tile = vd_query_items<REL, TRIM>(a, schedule), thread = (int)threadIdx.x - VD_WARPGROUP;
  int tile_id = (int)blockIdx.x, c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const int requested = vd_producer_request(schedule, VD_WORK_DQ);
    const vd_query_work work = vd_query_work_at<REL, TRIM>(a, schedule, tile_id);
    const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, g.table, work.at.head);
    const vd_kv_view<const T> memories =
        vd_kv_view_of(a, (const T *)g.block, (const T *)g.memory, work.at.head, work.at.stream);
    const int lowest = vd_lowest<REL>(work.band), lowest_value = vd_lowest_value<REL>(work.band), n = work.n;
    const bool lead = vd_can_split<REL, TRIM>() && work.lead;
    const uint32_t *dropout_mask =
        vd_dropout_mask_tile(a, task.ws.dropout_mask, work.at.stream, work.at.head, work.at.tile,
                             work.left - 1); /* the mask of the first key tile */
    auto copy_table = [&](int y, int slot) {
      vd_copy_positions<T, REL>(m->table[slot], m->bias_scores[slot], positions, work.first_block + y * VD_TILE,
                                a.d_head);
    };
    for (int t = 0; t < n; t++, c++) {
      const bool far = TRIM && t < work.far, keys_too = !lead || t > 0;
      int kappa0 = work.start + t * VD_TILE;
      if (c > 0) vd_barrier_sync<VD_TILE_EMPTY>();
      if (t == 0) {
        const vd_row_view<const T> queries = vd_query_rows<T, REL>(a, g, task.ws.query, work.at.head, work.at.stream);
        const vd_row_view<const T> douts = vd_output_rows(a, (const T *)g.dout, work.at.head, work.at.stream);
        vd_copy_operand<T>(m->q[i & 1], queries.row0, queries.stride, work.i0, 0, a.block, a.d_head);
        vd_copy_operand<T>(dout_slot<T, REL>(m, c), douts.row0, douts.stride, work.i0, 0, a.block, a.d_head);
        if constexpr (REL) copy_table(0, c % 3);
      }
      const vd_row_view<const T> keys = memories.at(kappa0, VD_KEY), values = memories.at(kappa0, VD_VALUE);
      if (keys_too) vd_copy_operand<T>(m->k[c & 1], keys.row0, keys.stride, kappa0, lowest, a.block, a.d_head);
      if (keys_too && !far)
        vd_copy_operand<T>(m->v[c & 1], values.row0, values.stride, kappa0, lowest_value, a.block, a.d_head);
      if (REL || t + 1 < work.left) copy_table(t + 1, (c + 1) % 3);
      if (DROP && keys_too && !far)
        vd_cp_async4(&m->dropout_mask[c & 1][thread], dropout_mask - t * VD_WARPGROUP + thread, true);
      vd_cp_async_commit();
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
    dq_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ dq_task task) {
  extern __shared__ __align__(1024) unsigned char smem[];
  dq_smem<T> *m = (dq_smem<T> *)smem;
  if (threadIdx.x < VD_WARPGROUP) {
    vd_setmaxnreg_inc<208>();
    dq_consumer<T, DROP, REL, TRIM>(a, task, m);
  } else {
    vd_setmaxnreg_dec<48>();
    dq_producer<T, DROP, REL, TRIM>(a, task, m);
  }
}

template <typename T>
cudaError_t launch_dq(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                      cudaStream_t stream) {
  constexpr bool REL = VD_HEAD_WIDTH == 64;
  const dq_task task = {*g, *ws, vd_make_dropout_draws(a)};
  cudaLaunchAttribute launched = {};
  launched.id = cudaLaunchAttributeLaunchCompletionEvent, launched.val.launchCompletionEvent.event = g->join;
  auto kernel = vd_variant(a, dq_wgmma_kernel<T, false, false, false>, dq_wgmma_kernel<T, true, false, false>,
                           dq_wgmma_kernel<T, false, false, true>, dq_wgmma_kernel<T, true, false, true>,
                           dq_wgmma_kernel<T, false, REL, false>, dq_wgmma_kernel<T, true, REL, false>);
  return vd_launch_persistent(kernel, VD_SPECIALIZED_THREADS, (int)sizeof(dq_smem<T>), stream, &launched,
                              g->side ? 1 : 0, *a, task);
}

} // namespace

#if VD_HEAD_WIDTH > 64
cudaError_t vd_dq_wgmma_96(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                           const vd_backward_workspace *ws, cudaStream_t stream) {
  return launch_dq<__nv_bfloat16>(a, g, ws, stream);
}
#else
cudaError_t vd_dq_wgmma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                        const vd_backward_workspace *ws, cudaStream_t stream) {
  if (a->d_head > 64) return vd_dq_wgmma_96(a, g, ws, stream);
  return a->type == VD_BF16 ? launch_dq<__nv_bfloat16>(a, g, ws, stream) : launch_dq<__half>(a, g, ws, stream);
}
#endif
