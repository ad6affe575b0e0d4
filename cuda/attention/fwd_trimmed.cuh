/* Forward pass with a trimmed softmax: far tiles, which are beyond a head's own span, and the producer warpgroup.
 *
 * The weights of a far tile are 0, so that only the softmax's denominator is wanted: two products (position and content
 * scores), no values, no dropout. The products of a far tile run under the exponentials of the one before. */
#ifndef VD_ATTENTION_FORWARD_TRIMMED_CUH
#define VD_ATTENTION_FORWARD_TRIMMED_CUH

#include "cuda/attention/fwd_tiles.cuh"

namespace {

/* Starts the position and content scores of far tile c of the block. FIRST: of the work tile. */
template <typename T, bool FIRST>
VD_DEV void start_far(forward_smem<T> *m, vd_frag_a<T> left[VD_LEFTS], int c, float position[8][4], float s[8][4]) {
  vd_barrier_sync<VD_TILE_FULL>();
  if constexpr (FIRST) vd_load_lefts<T>(query_slot<true>(m, 0), left);
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
VD_DEV void far_tile(const vd_query_work &work, forward_smem<T> *m, forward_state &w, vd_frag_a<T> left[VD_LEFTS],
                     int t, int c, float factor, float position[8][4], float s[8][4], float next[8][4]) {
  const int warp = (int)(threadIdx.x >> 5), iw = work.i0 + 16 * warp, kappa0 = work.start + t * VD_TILE;
  __half *ring = m->ring[warp];
  __syncwarp();
  vd_end_scores(ring, c + 1, position, s);
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
VD_DEV void far_tiles(const vd_query_work &work, forward_smem<T> *m, forward_state &w, vd_frag_a<T> left[VD_LEFTS],
                      int c, float factor) {
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

/* Starts the copies of key tile t of a work tile, the c-th of the block, where trimmed: keys, the block of the table,
 * and with the first tile the queries. */
template <typename T>
VD_DEV void copy_trimmed(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m,
                         const vd_query_work &work, int t, int c) {
  const int kappa0 = work.start + t * VD_TILE;
  const vd_kv_view<const T> memories = vd_kv_view_of(a, task.block, task.memory, work.at.head, work.at.stream);
  const vd_row_view<const T> keys = memories.at(kappa0, VD_KEY);
  vd_copy_operand<T>(key_slot<true>(m, c), keys.row0, keys.stride, kappa0, vd_lowest<false>(work.band), a.block,
                     a.d_head);
  if (t + 1 < work.n)
    vd_copy_positions(m->table[table_slot<true>(c)], vd_position_keys_of<false, T>(a, task.table, work.at.head),
                      work.first_block + (t + 1) * VD_TILE, a.d_head);
  if (t > 0) return;
  const vd_row_view<const T> queries = vd_block_rows(a, task.block, VD_QUERY, work.at.head, work.at.stream);
  vd_copy_operand<T>(query_slot<true>(m, 0), queries.row0, queries.stride, work.i0, 0, a.block, a.d_head);
}

/* The producer warpgroup where trimmed. Copies of keys run two tiles ahead, also from one work tile to the next: each
 * has at least two key tiles, so that the queries of one are in registers when those of the next are copied. */
template <typename T, bool DROP>
VD_DEV void trimmed_producer(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m,
                             vd_dropout_draws drop) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = vd_query_items<false, true>(a, schedule);
  int tile_id = vd_announced_tile(&m->next[1]), c = 0;
  if (tile_id >= n_work_tile) return;
  vd_query_work work = vd_query_work_at<false, true>(a, schedule, tile_id);
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
        vd_copy_operand<T>(value_slot(m, c), values.row0, values.stride, kappa0, vd_lowest_value<false>(work.band),
                           a.block, a.d_head);
      }
      vd_cp_async_commit();
      int ahead = t + 1;
      if (t == last) {
        vd_producer_announce(requested, &m->next[i & 1]);
        vd_producer_sync();
        tile_id = vd_announced_tile(&m->next[i & 1]), ahead = 0;
        if (tile_id < n_work_tile) work = vd_query_work_at<false, true>(a, schedule, tile_id);
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

} // namespace

#endif
