/* Forward pass of attention by wgmma, for 16-bit types and heads up to 64 wide; the equations are in fwd_mma.cu.
 *
 * Tiles: a persistent block takes 64 queries of one head and stream and goes over key tiles of 64, from the farthest
 * to the nearest, with an on-line softmax. Three products of 64 x 64 x 64 for each key tile: position scores q p^T,
 * scores q k^T (in flight together), and out += weights v.
 *
 * Warps: the consumer warpgroup (threads 0 .. 127, 192 registers) has 16 queries a warp. The producer warpgroup
 * (threads 128 .. 255, 64 registers) copies q, k, v, position keys and bias scores, draws the dropout mask one tile
 * ahead of the copies, and stores it for the backward pass.
 *
 * Shared memory, 112 KiB, two blocks for a multiprocessor: q, k, v in two slots each (48 KiB), position keys in
 * three (24 KiB), a ring buffer of position scores for each consumer warp (38 KiB, fp32), bias scores, three slots
 * of mask bits.
 *
 * Barriers: VD_TILE_FULL and VD_TILE_EMPTY for each key tile (pipeline.cuh). The consumer releases a tile as soon as
 * it has read the mask: with two slots the producer then fills the other one.
 *
 * Bound: instruction issue and waiting between few warps, 35 to 50 % of the issue slots are used. Layer 11 of 12, 16
 * streams of 512, dropout 0.3 on one H100: 0.122 ms (doc/PERFORMANCE.md). */
#include "cuda/attention/pipeline.cuh"

namespace {

template <typename T> struct forward_smem {
  T tile[6][VD_TILE * VD_HEAD_WIDTH]; /* queries, keys, values: query_slot() and so on */
  T table[3]
         [VD_TILE * VD_HEAD_WIDTH]; /* with relative keys the last one: the block before a work tile's first key tile */
  float ring[VD_WARPGROUP / 32][VD_RING_BYTES / 4];
  float bias_scores[3][VD_TILE]; /* bias scores: initial accumulators of position scores */
  /* Mask bits of a key tile for each consumer thread, drawn one tile ahead of the copies. With three slots the
   * producer overwrites one only after a barrier that the consumer reached after reading it. */
  uint32_t dropout_mask[3][VD_WARPGROUP];
  int next[2];
};

/* Slots of the block's i-th work tile and c-th key tile. Where trimmed, queries pass to registers at once, and keys
 * have three slots, as has the table: with far tiles, copies of one tile ahead would arrive too late. */
template <bool TRIM, typename T> VD_DEV T *query_slot(forward_smem<T> *m, int i) {
  return m->tile[TRIM ? 0 : i & 1];
}
template <bool TRIM, typename T> VD_DEV T *key_slot(forward_smem<T> *m, int c) {
  return m->tile[TRIM ? 1 + c % 3 : 2 + (c & 1)];
}
template <typename T> VD_DEV T *value_slot(forward_smem<T> *m, int c) {
  return m->tile[4 + (c & 1)];
}
template <bool TRIM> VD_DEV int table_slot(int c) {
  return TRIM ? c % 3 : c & 1;
}

static_assert(2 * (sizeof(forward_smem<__half>) + 1024) <= 228 * 1024, "two blocks for a multiprocessor");

/* Operands of the kernel. */
template <typename T> struct forward_task {
  const T *block, *memory, *table;
  T *out;
  float *lse;
};

/* A warp's 16 queries over the key tiles. Scores are multiplied by sqrt(d_head); `factor` brings them to units of
 * log 2. */
struct forward_state {
  float sum[8][4];
  float highest[2], total[2]; /* of rows g and g + 8; total: only of this lane's columns */
};

/* Masks the scores of a partly seen sub-tile. */
template <bool REL, bool TRIM>
VD_DEV void mask_scores(const vd_band &band, int x0, int kappa0, float unit, float s[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  vd_masks m = vd_masks_of(band, x0 + g - 2 * t);
  if (!REL && !TRIM) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      s[i >> 2][i & 3] += __log2f(vd_masks_at(m, 8 * (i >> 2) + (i & 1) - 8 * (i >> 1 & 1))) * unit;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, k = i & 3;
    bool seen =
        vd_masks_seen(m, 8 * jn + (k & 1) - 8 * (k >> 1)) && (!REL || kappa0 + 8 * jn + 2 * t + (k & 1) >= band.oldest);
    s[jn][k] = seen ? s[jn][k] : -INFINITY;
  }
}

/* Adds position scores to the scores of 64 keys, and masks pairs that are not seen in full. */
template <bool REL, bool TRIM>
VD_DEV void finish_scores(const vd_band &band, const float *ring, int unit, int iw, int kappa0, float factor,
                          float s[8][4]) {
  if (vd_row_full<REL>(band, iw, kappa0)) {
#pragma unroll
    for (int j = 0; j < 4; j++) vd_add_ring(s + 2 * j, ring, unit + j);
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int kappa = kappa0 + 16 * j;
    if (vd_any_seen<REL>(band, iw - kappa, kappa)) {
      vd_add_ring(s + 2 * j, ring, unit + j);
      mask_scores<REL, TRIM>(band, iw - kappa, kappa, 1 / factor, s + 2 * j);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) s[2 * j + (i >> 2)][i & 3] = -INFINITY;
    }
  }
}

/* One step of the on-line softmax with 64 keys: scores become weights (not yet divided by the sum), sums are
 * rescaled. */
VD_DEV void softmax_tile(forward_state &w, float factor, float s[8][4]) {
  float rescale[2];
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    float highest = w.highest[ih], total = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) highest = fmaxf(highest, fmaxf(s[n][2 * ih], s[n][2 * ih + 1]));
    highest = vd_quad_max(highest);
    float base = highest == -INFINITY ? 0 : highest * factor; /* no key seen so far */
    rescale[ih] = vd_exp2(w.highest[ih] * factor - base);
    w.highest[ih] = highest;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int jj = 0; jj < 2; jj++) {
        float p = vd_exp2(fmaf(s[n][2 * ih + jj], factor, -base));
        s[n][2 * ih + jj] = p;
        total += p;
      }
    w.total[ih] = w.total[ih] * rescale[ih] + total;
  }
  if (__all_sync(0xffffffffU, rescale[0] == 1 && rescale[1] == 1)) return;
#pragma unroll
  for (int i = 0; i < 32; i++) w.sum[i >> 2][i & 3] *= rescale[i >> 1 & 1];
}

/* Multiplies weights by the soft mask ('trimmed'). */
VD_DEV void apply_soft_mask(const vd_band &band, int x0, float s[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  vd_masks m = vd_masks_of(band, x0 + g - 2 * t);
#pragma unroll
  for (int i = 0; i < 8; i++) s[i >> 2][i & 3] *= vd_masks_at(m, 8 * (i >> 2) + (i & 1) - 8 * (i >> 1 & 1));
}

/* Dropout of weights that are left operands; `bits` as vd_draw_dropout_mask() makes them. */
template <typename T> VD_DEV void drop_weights(vd_frag_a<T> p[4], uint32_t bits) {
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint32_t mask;
      asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(bits << (2 * j + (i >> 1))), "r"((i & 1) ? 0xbbaa : 0x9988));
      p[j].x[i] &= mask;
    }
}

/* Content scores of the c-th key tile of the block, and its position scores in the ring buffer. Where trimmed, the
 * queries are `left`, in registers. */
template <typename T, bool REL, bool TRIM>
VD_DEV void multiply_scores(forward_smem<T> *m, const T *q, const vd_frag_a<T> *left, int c, float s[8][4]) {
  float position[8][4];
  float *ring = m->ring[threadIdx.x >> 5];
  if constexpr (REL) vd_init_position_tile(position, m->bias_scores[c & 1]);
  vd_wgmma_fence();
  if constexpr (TRIM) {
    vd_tile_product_rs<T, VD_K_MAJOR>(position, left, m->table[table_slot<TRIM>(c)], false);
    vd_wgmma_commit();
    vd_tile_product_rs<T, VD_K_MAJOR>(s, left, key_slot<TRIM>(m, c), false);
  } else {
    vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(position, q, m->table[table_slot<TRIM>(c)], REL);
    vd_wgmma_commit();
    vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(s, q, key_slot<TRIM>(m, c), false);
  }
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_fence_operand<8>(position);
  vd_write_ring(ring, c + 1, position);
  __syncwarp();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(s);
}

/* The t-th key tile of the work tile, the c-th of the block, whose copies have landed. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void forward_tile(const vd_query_work &work, forward_smem<T> *m, forward_state &w, const T *q,
                         const vd_frag_a<T> *left, int t, int c, uint32_t dropout_mask, float factor) {
  float s[8][4];
  const int warp = (int)(threadIdx.x >> 5), iw = work.i0 + 16 * warp, kappa0 = work.start + t * VD_TILE;
  vd_frag_a<T> p[4];
  multiply_scores<T, REL, TRIM>(m, q, left, c, s);
  finish_scores<REL, TRIM>(work.band, m->ring[warp], 4 * (c + 1) + 7 - warp, iw, kappa0, factor, s);
  softmax_tile(w, factor, s);
  if (TRIM && !vd_row_full<REL>(work.band, iw, kappa0)) {
#pragma unroll
    for (int j = 0; j < 4; j++) apply_soft_mask(work.band, iw - kappa0 - 16 * j, s + 2 * j);
  }
  vd_results_to_a(p, s);
  if constexpr (DROP) drop_weights(p, dropout_mask);
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_MN_MAJOR>(w.sum, p, value_slot(m, c), true);
  vd_wgmma_commit();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(w.sum);
}

/* This warp's queries as left operands. */
template <typename T> VD_DEV void load_queries(forward_smem<T> *m, vd_frag_a<T> left[4]) {
#pragma unroll
  for (int k = 0; k < 4; k++)
    vd_load_a<T, VD_HEAD_WIDTH>(left[k], query_slot<true>(m, 0), 16 * (int)(threadIdx.x >> 5), 16 * k);
}
/* Starts the position and content scores of far tile c of the block. FIRST: of the work tile. */
template <typename T, bool FIRST>
VD_DEV void start_far(forward_smem<T> *m, vd_frag_a<T> left[4], int c, float position[8][4], float s[8][4]) {
  vd_barrier_sync<VD_TILE_FULL>();
  if constexpr (FIRST) load_queries(m, left);
  vd_barrier_arrive<VD_TILE_EMPTY>();
  vd_wgmma_fence();
  vd_tile_product_rs<T, VD_K_MAJOR>(position, left, m->table[table_slot<true>(c)], false);
  vd_wgmma_commit();
  vd_tile_product_rs<T, VD_K_MAJOR>(s, left, key_slot<true>(m, c), false);
  vd_wgmma_commit();
}

/* Adds the exponentials of a far tile's scores to the sums. They are taken against the maximum of the tiles before,
 * until a sum nears the end of the range or a row has seen no key yet. */
VD_DEV void sum_far(forward_state &w, float factor, float s[8][4]) {
  constexpr float most = 0x1p64f;
  float total[2];
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    float base = w.highest[ih] * factor, even = w.total[ih], odd = 0;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      even += vd_exp2(fmaf(s[n][2 * ih], factor, -base));
      odd += vd_exp2(fmaf(s[n][2 * ih + 1], factor, -base));
    }
    total[ih] = even + odd;
  }
  /* Without a key so far the base is -infinity, and the sum infinite or NaN. */
  if (__all_sync(0xffffffffU, total[0] < most && total[1] < most)) {
    w.total[0] = total[0], w.total[1] = total[1];
  } else {
    softmax_tile(w, factor, s);
  }
}

/* The t-th key tile of the work tile, a far one: all weights are 0, and the softmax's denominator is all that is
 * wanted. Its products have been started, with scores `s`; those of the next far tile, with scores `next`, run while
 * exponentials are taken. */
template <typename T, bool MORE>
VD_DEV void far_tile(const vd_query_work &work, forward_smem<T> *m, forward_state &w, vd_frag_a<T> left[4], int t,
                     int c, float factor, float position[8][4], float s[8][4], float next[8][4]) {
  const int warp = (int)(threadIdx.x >> 5), iw = work.i0 + 16 * warp, kappa0 = work.start + t * VD_TILE;
  float *ring = m->ring[warp];
  __syncwarp();
  vd_wgmma_wait<1>();
  vd_wgmma_fence_operand<8>(position);
  vd_write_ring(ring, c + 1, position);
  __syncwarp();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(s);
  if constexpr (MORE) start_far<T, false>(m, left, c + 1, position, next);
#pragma unroll
  for (int j = 0; j < 4; j++) vd_add_ring(s + 2 * j, ring, 4 * (c + 1) + 7 - warp + j);
  if (!vd_far_row_seen(work.band, iw, kappa0)) {
#pragma unroll
    for (int j = 0; j < 4; j++) mask_scores<false, true>(work.band, iw - kappa0 - 16 * j, kappa0, 0, s + 2 * j);
  }
  sum_far(w, factor, s);
}
/* All far tiles of the work tile, from the block's c-th on. */
template <typename T>
VD_DEV void far_tiles(const vd_query_work &work, forward_smem<T> *m, forward_state &w, vd_frag_a<T> left[4], int c,
                      float factor) {
  float position[8][4], even[8][4], odd[8][4];
  int t = 0;
  start_far<T, true>(m, left, c, position, even);
  for (; t + 2 < work.far; t += 2) {
    far_tile<T, true>(work, m, w, left, t, c + t, factor, position, even, odd);
    far_tile<T, true>(work, m, w, left, t + 1, c + t + 1, factor, position, odd, even);
  }
  if (t + 1 < work.far) {
    far_tile<T, true>(work, m, w, left, t, c + t, factor, position, even, odd);
    far_tile<T, false>(work, m, w, left, t + 1, c + t + 1, factor, position, odd, even);
  } else {
    far_tile<T, false>(work, m, w, left, t, c + t, factor, position, even, odd);
  }
}

/* With relative keys, before the first key tile: adds the content bias to q, and computes the scores of the block of
 * e before it. */
template <typename T>
VD_DEV void forward_begin(const vd_cuda_attention &a, forward_smem<T> *m, const vd_query_work &work, T *q, int c) {
  float position[8][4];
  if (a.content_bias) vd_add_content_bias<T, VD_HEAD_WIDTH>(a, q, work.at.head, work.i0 + 16 * (int)(threadIdx.x >> 5));
  vd_init_position_tile(position, m->bias_scores[2]);
  vd_fence_proxy_async();
  vd_consumer_sync();
  vd_wgmma_fence();
  vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(position, q, m->table[2], true);
  vd_wgmma_commit();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<8>(position);
  vd_write_ring(m->ring[threadIdx.x >> 5], c, position);
}

/* Divides by the softmax denominator; writes out and lse. */
template <typename T>
VD_DEV void forward_end(const vd_cuda_attention &a, float scale, const vd_query_work &work, forward_state &w,
                        float to_log2, T *out, float *lse) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, iw = work.i0 + 16 * (int)(threadIdx.x >> 5);
  float factor[2];
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    float total = vd_quad_sum(w.total[ih]);
    int i = iw + g + 8 * ih;
    factor[ih] = scale / total;
    if (t == 0 && i < a.block)
      lse[((int64_t)work.at.stream * a.n_head + work.at.head) * a.block + i] =
          w.highest[ih] * to_log2 * 0.69314718055994531f + logf(total);
  }
  const vd_row_view<T> to = vd_output_rows(a, out, work.at.head, work.at.stream);
  vd_write_rows<T, VD_HEAD_WIDTH>(to.row0, to.stride, iw, 0, a.block, a.d_head, w.sum, factor);
}

/* Work tiles are sorted by length. Each multiprocessor runs two blocks: the first to start there takes one of the
 * longest tiles, the second takes a later tile, so that no two of the longest tiles share a multiprocessor. */
VD_DEV int longest_tiles(int n_work_tile) {
  return min((int)gridDim.x / 2, n_work_tile);
}
VD_DEV int pop_tile(vd_tile_schedule *schedule, int n_longest) {
  int tile_id = atomicAdd(&schedule->next[VD_WORK_FORWARD], 1);
  return tile_id < n_longest ? tile_id : n_longest + atomicAdd(&schedule->next_rest, 1);
}
VD_DEV int first_tile(vd_tile_schedule *schedule, int n_longest) {
  unsigned place;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(place));
  return atomicAdd(&schedule->sm_blocks[place % VD_MAX_SM], 1) == 0 ? pop_tile(schedule, n_longest)
                                                                    : n_longest + atomicAdd(&schedule->next_rest, 1);
}
/* vd_finish_work for the counters of this kernel. */
VD_DEV void finish_work(vd_tile_schedule *schedule) {
  if (threadIdx.x > 0) return;
  __threadfence();
  if (atomicAdd(&schedule->done[VD_WORK_FORWARD], 1) < (int)gridDim.x - 1) return;
  schedule->next[VD_WORK_FORWARD] = schedule->done[VD_WORK_FORWARD] = schedule->next_rest = 0;
  for (int i = 0; i < VD_MAX_SM / 4; i++) ((int4 *)schedule->sm_blocks)[i] = make_int4(0, 0, 0, 0);
}

/* The consumer warpgroup. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void forward_consumer(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m, float scale) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE);
  const float factor = rsqrtf((float)a.d_head) * 1.44269504088896341f;
  int tile_id = vd_announced_tile(&m->next[1]), c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const vd_query_work work = vd_query_work_at<REL>(a, schedule, tile_id);
    forward_state w;
    w.highest[0] = w.highest[1] = -INFINITY, w.total[0] = w.total[1] = 0;
    vd_clear_sums(w.sum);
    const T *q = query_slot<TRIM>(m, i);
    vd_frag_a<T> left[4] = {}; /* where trimmed, the queries */
    if constexpr (TRIM) {
      if (work.far > 0) far_tiles<T>(work, m, w, left, c, factor);
      c += work.far;
    }
    for (int t = TRIM ? work.far : 0; t < work.n; t++, c++) {
      vd_barrier_sync<VD_TILE_FULL>();
      if constexpr (TRIM) {
        if (t == 0) load_queries(m, left);
      }
      const uint32_t dropout_mask = DROP ? m->dropout_mask[c % 3][threadIdx.x] : 0;
      if (REL && t == 0) forward_begin<T>(a, m, work, query_slot<TRIM>(m, i), c);
      vd_barrier_arrive<VD_TILE_EMPTY>();
      forward_tile<T, DROP, REL, TRIM>(work, m, w, q, left, t, c, dropout_mask, factor);
    }
    tile_id = vd_announced_tile(&m->next[i & 1]);
    forward_end<T>(a, scale, work, w, factor, task.out, task.lse);
  }
  finish_work(schedule);
}

/* Draws the dropout mask of key tile t of the work tile, the c-th of the block, and stores it for the backward pass. */
template <typename T>
VD_DEV void draw_mask(const vd_cuda_attention &a, const vd_dropout_draws &drop, const vd_query_work &work,
                      forward_smem<T> *m, int t, int c) {
  const int thread = (int)threadIdx.x - VD_WARPGROUP;
  uint32_t bits = vd_draw_dropout_mask(a, drop, work.i0 + 16 * (thread >> 5), work.start + t * VD_TILE);
  m->dropout_mask[c % 3][thread] = bits;
  if (a.dropout_mask)
    vd_dropout_mask_tile(a, a.dropout_mask, work.at.stream, work.at.head, work.at.tile, work.n - 1 - t)[thread] = bits;
}

/* Starts the copies of key tile t of a work tile, the c-th of the block, where trimmed: keys, the block of the table,
 * and with the first tile the queries. */
template <typename T>
VD_DEV void copy_trimmed(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m,
                         const vd_query_work &work, int t, int c) {
  const int kappa0 = work.start + t * VD_TILE;
  const vd_kv_view<const T> memories = vd_kv_view_of(a, task.block, task.memory, work.at.head, work.at.stream);
  const vd_row_view<const T> keys = memories.at(kappa0, VD_KEY);
  vd_copy_tile<T, VD_HEAD_WIDTH>(key_slot<true>(m, c), keys.row0, keys.stride, kappa0, vd_lowest<false>(work.band),
                                 a.block, a.d_head);
  if (t + 1 < work.n)
    vd_copy_position_keys<T, VD_HEAD_WIDTH, false>(m->table[table_slot<true>(c)], nullptr,
                                                   vd_position_keys_of<false, T>(a, task.table, work.at.head),
                                                   work.first_block + (t + 1) * VD_TILE, a.d_head);
  if (t > 0) return;
  const vd_row_view<const T> queries = vd_block_rows(a, task.block, VD_QUERY, work.at.head, work.at.stream);
  vd_copy_tile<T, VD_HEAD_WIDTH>(query_slot<true>(m, 0), queries.row0, queries.stride, work.i0, 0, a.block, a.d_head);
}

/* The producer warpgroup where trimmed. Copies of keys run two tiles ahead, also from one work tile to the next: each
 * has at least two key tiles, so that the queries of one are in registers when those of the next are copied. */
template <typename T, bool DROP>
VD_DEV void trimmed_producer(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m,
                             vd_dropout_draws drop) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE);
  int tile_id = vd_announced_tile(&m->next[1]), c = 0;
  if (tile_id >= n_work_tile) return;
  vd_query_work work = vd_query_work_at<false>(a, schedule, tile_id);
  auto draw = [&](int t) {
    if (!DROP || t < work.far) return;
    vd_seek_dropout(&drop, a, work.at.head, work.at.stream);
    draw_mask(a, drop, work, m, t, c);
  };
  copy_trimmed(a, task, m, work, 0, 0);
  vd_cp_async_commit();
  draw(0);
  for (int i = 0; tile_id < n_work_tile; i++) {
    const int requested = threadIdx.x == VD_WARPGROUP ? pop_tile(schedule, longest_tiles(n_work_tile)) : 0;
    for (int t = 0, last = work.n - 1; t <= last; t++) {
      if (c > 0) vd_barrier_sync<VD_TILE_EMPTY>();
      if (t >= work.far) {
        const int kappa0 = work.start + t * VD_TILE;
        const vd_kv_view<const T> memories = vd_kv_view_of(a, task.block, task.memory, work.at.head, work.at.stream);
        const vd_row_view<const T> values = memories.at(kappa0, VD_VALUE);
        vd_copy_tile<T, VD_HEAD_WIDTH>(value_slot(m, c), values.row0, values.stride, kappa0,
                                       vd_lowest_value<false>(work.band), a.block, a.d_head);
      }
      vd_cp_async_commit();
      int ahead = t + 1;
      if (t == last) {
        vd_producer_announce(requested, &m->next[i & 1]);
        vd_producer_sync();
        tile_id = vd_announced_tile(&m->next[i & 1]), ahead = 0;
        if (tile_id < n_work_tile) work = vd_query_work_at<false>(a, schedule, tile_id);
      }
      c++;
      if (tile_id < n_work_tile) copy_trimmed(a, task, m, work, ahead, c);
      vd_cp_async_commit();
      if (tile_id < n_work_tile) draw(ahead);
      vd_cp_async_wait<1>();
      vd_fence_proxy_async();
      vd_barrier_arrive<VD_TILE_FULL>();
    }
  }
  vd_barrier_sync<VD_TILE_EMPTY>();
}

/* The producer warpgroup. */
template <typename T, bool DROP, bool REL>
VD_DEV void forward_producer(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m,
                             vd_dropout_draws drop) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE);
  int tile_id = vd_announced_tile(&m->next[1]), c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const int requested = threadIdx.x == VD_WARPGROUP ? pop_tile(schedule, longest_tiles(n_work_tile)) : 0;
    const vd_query_work work = vd_query_work_at<REL>(a, schedule, tile_id);
    const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, task.table, work.at.head);
    const int lowest = vd_lowest<REL>(work.band), n = work.n;
    auto copy_table = [&](int y, int slot) {
      vd_copy_position_keys<T, VD_HEAD_WIDTH, REL>(m->table[slot], m->bias_scores[slot], positions,
                                                   work.first_block + y * VD_TILE, a.d_head);
    };
    vd_seek_dropout(&drop, a, work.at.head, work.at.stream);
    for (int t = -1; t < n; t++) { /* copies tile t and draws the mask of tile t + 1; t = -1: copies and draws tile 0 */
      if (t > 0 || (t < 0 && i > 0)) vd_barrier_sync<VD_TILE_EMPTY>();
      if (t < 0) {
        const vd_row_view<const T> queries = vd_block_rows(a, task.block, VD_QUERY, work.at.head, work.at.stream);
        vd_copy_tile<T, VD_HEAD_WIDTH>(query_slot<false>(m, i), queries.row0, queries.stride, work.i0, 0, a.block,
                                       a.d_head);
        if constexpr (REL) copy_table(0, 2);
      }
      if (t != 0) {
        int tile = max(t, 0), slot = (c + tile) & 1, kappa0 = work.start + tile * VD_TILE;
        const vd_kv_view<const T> memories = vd_kv_view_of(a, task.block, task.memory, work.at.head, work.at.stream);
        const vd_row_view<const T> keys = memories.at(kappa0, VD_KEY), values = memories.at(kappa0, VD_VALUE);
        vd_copy_tile<T, VD_HEAD_WIDTH>(key_slot<false>(m, slot), keys.row0, keys.stride, kappa0, lowest, a.block,
                                       a.d_head);
        vd_copy_tile<T, VD_HEAD_WIDTH>(value_slot(m, slot), values.row0, values.stride, kappa0, lowest, a.block,
                                       a.d_head);
        if (REL || tile + 1 < n) copy_table(tile + 1, slot);
        vd_cp_async_commit();
      }
      if (DROP && t + 1 < n) draw_mask(a, drop, work, m, t + 1, c + t + 1);
      if (t < 0) continue;
      if (t + 1 == n) vd_producer_announce(requested, &m->next[i & 1]);
      vd_cp_async_wait_all();
      vd_fence_proxy_async();
      vd_barrier_arrive<VD_TILE_FULL>();
    }
    c += n;
    vd_producer_sync();
    tile_id = vd_announced_tile(&m->next[i & 1]);
  }
  if (c > 0) vd_barrier_sync<VD_TILE_EMPTY>();
}

template <typename T, bool DROP, bool REL, bool TRIM>
__global__ void __launch_bounds__(VD_SPECIALIZED_THREADS, 2)
    forward_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ forward_task<T> task,
                         const __grid_constant__ vd_dropout_draws drop) {
  extern __shared__ __align__(1024) unsigned char smem[];
  forward_smem<T> *m = (forward_smem<T> *)smem;
  const int n_work_tile = a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE);
  vd_pdl_wait();
  if (threadIdx.x == 0) m->next[1] = first_tile((vd_tile_schedule *)a.schedule, longest_tiles(n_work_tile));
  __syncthreads();
  if (threadIdx.x < VD_WARPGROUP) {
    vd_setmaxnreg_inc<192>();
    forward_consumer<T, DROP, REL, TRIM>(a, task, m, drop.scale);
  } else {
    vd_setmaxnreg_dec<64>();
    if constexpr (TRIM) {
      trimmed_producer<T, DROP>(a, task, m, drop);
    } else {
      forward_producer<T, DROP, REL>(a, task, m, drop);
    }
  }
}

template <typename T>
cudaError_t launch_forward(const vd_cuda_attention *a, const void *block, const void *memory, const void *table,
                           void *out, float *lse, cudaStream_t stream) {
  const forward_task<T> task = {(const T *)block, (const T *)memory, (const T *)table, (T *)out, lse};
  cudaLaunchAttribute early = vd_pdl_attribute();
  auto kernel = vd_variant(a, forward_wgmma_kernel<T, false, false, false>, forward_wgmma_kernel<T, true, false, false>,
                           forward_wgmma_kernel<T, false, false, true>, forward_wgmma_kernel<T, true, false, true>,
                           forward_wgmma_kernel<T, false, true, false>, forward_wgmma_kernel<T, true, true, false>);
  return vd_launch_persistent(kernel, VD_SPECIALIZED_THREADS, (int)sizeof(forward_smem<T>), stream, &early, 1, *a, task,
                              vd_make_dropout_draws(a));
}

} // namespace

cudaError_t vd_forward_wgmma(const vd_cuda_attention *a, const void *block, const void *memory, const void *table,
                             void *out, float *lse, cudaStream_t stream) {
  return a->type == VD_BF16 ? launch_forward<__nv_bfloat16>(a, block, memory, table, out, lse, stream)
                            : launch_forward<__half>(a, block, memory, table, out, lse, stream);
}

size_t vd_cuda_attention_dropout_mask_size(const vd_cuda_attention *a) {
  if (!vd_uses_wgmma(a) || !vd_make_dropout_draws(a).threshold) return 0;
  size_t query_tiles = (size_t)a->n_stream * (size_t)a->n_head * (size_t)vd_ceil_div(a->block, VD_TILE);
  return query_tiles * (size_t)vd_max_key_tiles(*a) * VD_WARPGROUP * sizeof(uint32_t);
}
