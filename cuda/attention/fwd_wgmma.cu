/* Forward pass of attention by wgmma, for 16-bit types and heads up to 64 wide; the equations are in fwd_mma.cu.
 *
 * Tiles: a persistent block takes 64 queries of one head and stream and goes over key tiles of 64, from the farthest
 * to the nearest, with an on-line softmax. Far-reaching query tiles are split over blocks where there are few
 * (splits.cuh). Three products of 64 x 64 x 64 for each key tile: position scores q p^T, scores q k^T (in flight
 * together), and out += weights v. Queries are left operands from registers, with relative keys q + u and q + v.
 *
 * Warps: the consumer warpgroup (threads 0 .. 127, 192 registers) has 16 queries a warp. The producer warpgroup
 * (threads 128 .. 255, 64 registers) copies q, k, v, position keys and biases, draws the dropout mask one tile
 * ahead of the copies, and stores it for the backward pass.
 *
 * Shared memory, 93 KiB, two blocks for a multiprocessor: q, k, v in two slots each (48 KiB), position keys in
 * three (24 KiB), a ring buffer of position scores for each consumer warp (19 KiB, half), biases, three slots of mask
 * bits. Where trimmed, one slot of q and three of k.
 *
 * Barriers: VD_TILE_FULL and VD_TILE_EMPTY for each key tile (pipeline.cuh). The consumer releases a tile as soon as
 * it has read the mask: with two slots the producer then fills the other one.
 *
 * Bound: instruction issue and waiting between few warps, 35 to 50 % of the issue slots are used. Layer 11 of 12, 16
 * streams of 512, dropout 0.3 on one H100: 0.122 ms (doc/PERFORMANCE.md). */
#include "cuda/attention/fwd_trimmed.cuh"
#include "cuda/attention/splits.cuh"

namespace {

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
    for (int i = 0; i < 4; i++) p[j].x[i] &= vd_sign_mask(bits << (2 * j + (i >> 1)), i & 1);
}

/* The t-th key tile of the work tile, the c-th of the block, whose copies have landed. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void forward_tile(const vd_query_work &work, forward_smem<T> *m, forward_state &w, const vd_frag_a<T> *queries,
                         const vd_frag_a<T> *positions, int t, int c, uint32_t dropout_mask, float factor) {
  float s[8][4];
  const int warp = (int)(threadIdx.x >> 5), iw = work.i0 + 16 * warp, kappa0 = work.start + t * VD_TILE;
  vd_frag_a<T> p[4];
  multiply_scores<T, TRIM>(m, queries, positions, c, s);
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
  vd_wgmma_fence_operand<VD_SUMS>(w.sum);
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

/* Stores the sums of this split. True where all others are stored: then `w` has the joint sums. */
template <typename T>
VD_DEV bool join_splits(const vd_cuda_attention &a, const vd_query_work &work, float factor, forward_smem<T> *m,
                        forward_state &w) {
  vd_store_split(a, work, w.sum, make_float4(w.highest[0], w.highest[1], w.total[0], w.total[1]));
  if (!vd_is_last_split(a, work, &m->last_split)) return false;
  w.highest[0] = w.highest[1] = -INFINITY, w.total[0] = w.total[1] = 0;
  vd_clear_sums(w.sum);
  for (int split = 0; split < work.n_split; split++) {
    const float4 of = vd_split_rest(a, work, split);
    const float highest[2] = {of.x, of.y}, total[2] = {of.z, of.w};
    float keep[2], add[2];
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      const float both = fmaxf(w.highest[ih], highest[ih]), base = both == -INFINITY ? 0 : both * factor;
      keep[ih] = vd_exp2(w.highest[ih] * factor - base), add[ih] = vd_exp2(highest[ih] * factor - base);
      w.highest[ih] = both, w.total[ih] = w.total[ih] * keep[ih] + total[ih] * add[ih];
    }
    vd_add_split(a, work, split, keep, add, w.sum);
  }
  return true;
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
  const int n_work_tile = vd_query_items<REL, TRIM>(a, schedule);
  const float factor = rsqrtf((float)a.d_head) * 1.44269504088896341f;
  int tile_id = vd_announced_tile(&m->next[1]), c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const vd_query_work work = vd_query_work_at<REL, TRIM>(a, schedule, tile_id);
    forward_state w;
    w.highest[0] = w.highest[1] = -INFINITY, w.total[0] = w.total[1] = 0;
    vd_clear_sums(w.sum);
    const T *q = query_slot<TRIM>(m, i);
    vd_frag_a<T> left[VD_LEFTS] = {}, with_v[VD_LEFTS]; /* with_v: with relative keys; the others have u added */
    if constexpr (TRIM) {
      if (work.far > 0) far_tiles<T>(work, m, w, left, c, factor);
      c += work.far;
    }
    for (int t = TRIM ? work.far : 0; t < work.n; t++, c++) {
      vd_barrier_sync<VD_TILE_FULL>();
      if (t == 0) {
        vd_load_lefts<T>(q, left);
        if constexpr (REL) vd_add_biases(&m->biases, left, with_v);
      }
      if (vd_can_split<REL, TRIM>() && work.lead && t == 0) {
        vd_barrier_arrive<VD_TILE_EMPTY>();
        vd_write_positions(left, m->table[table_slot<false>(c)], m->ring[threadIdx.x >> 5], c + 1);
        continue;
      }
      const uint32_t dropout_mask = DROP ? m->dropout_mask[c % 3][threadIdx.x] : 0;
      if (REL && t == 0) vd_write_positions(with_v, m->table[2], m->ring[threadIdx.x >> 5], c);
      vd_barrier_arrive<VD_TILE_EMPTY>();
      forward_tile<T, DROP, REL, TRIM>(work, m, w, left, REL ? with_v : left, t, c, dropout_mask, factor);
    }
    tile_id = vd_announced_tile(&m->next[i & 1]);
    if (vd_can_split<REL, TRIM>() && work.n_split > 1 && !join_splits<T>(a, work, factor, m, w)) continue;
    forward_end<T>(a, scale, work, w, factor, task.out, task.lse);
  }
  finish_work(schedule);
}

/* Starts the copies of the keys and values of key tile t of a work tile. */
template <typename T>
VD_DEV void copy_keys_and_values(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m,
                                 const vd_query_work &work, int t, int slot, int lowest) {
  const int kappa0 = work.start + t * VD_TILE;
  const vd_kv_view<const T> memories = vd_kv_view_of(a, task.block, task.memory, work.at.head, work.at.stream);
  const vd_row_view<const T> keys = memories.at(kappa0, VD_KEY), values = memories.at(kappa0, VD_VALUE);
  vd_copy_operand<T>(key_slot<false>(m, slot), keys.row0, keys.stride, kappa0, lowest, a.block, a.d_head);
  vd_copy_operand<T>(value_slot(m, slot), values.row0, values.stride, kappa0, lowest, a.block, a.d_head);
}

/* The producer warpgroup. */
template <typename T, bool DROP, bool REL>
VD_DEV void forward_producer(const vd_cuda_attention &a, const forward_task<T> &task, forward_smem<T> *m,
                             vd_dropout_draws drop) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_work_tile = vd_query_items<REL, false>(a, schedule);
  int tile_id = vd_announced_tile(&m->next[1]), c = 0;
  for (int i = 0; tile_id < n_work_tile; i++) {
    const int requested = threadIdx.x == VD_WARPGROUP ? pop_tile(schedule, longest_tiles(n_work_tile)) : 0;
    const vd_query_work work = vd_query_work_at<REL, false>(a, schedule, tile_id);
    const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, task.table, work.at.head);
    const int lowest = vd_lowest<REL>(work.band), n = work.n;
    const bool lead = vd_can_split<REL, false>() && work.lead;
    auto copy_table = [&](int y, int slot) {
      vd_copy_positions(m->table[slot], positions, work.first_block + y * VD_TILE, a.d_head);
    };
    vd_seek_dropout(&drop, a, work.at.head, work.at.stream);
    /* Copies tile t and draws the mask of tile t + 1; t = -1: copies and draws tile 0. */
    for (int t = -1; t < n; t++) {
      if (t > 0 || (t < 0 && i > 0)) vd_barrier_sync<VD_TILE_EMPTY>();
      if (t < 0) {
        const vd_row_view<const T> queries = vd_block_rows(a, task.block, VD_QUERY, work.at.head, work.at.stream);
        vd_copy_operand<T>(query_slot<false>(m, i), queries.row0, queries.stride, work.i0, 0, a.block, a.d_head);
        if constexpr (REL) copy_table(0, 2), vd_copy_biases(a, work.at.head, &m->biases);
      }
      if (t != 0) {
        const int tile = max(t, 0), slot = (c + tile) & 1;
        if (!lead || t > 0) copy_keys_and_values(a, task, m, work, tile, slot, lowest);
        if (REL || tile + 1 < work.left) copy_table(tile + 1, slot);
        vd_cp_async_commit();
      }
      if (DROP && t + 1 < n && (!lead || t >= 0)) draw_mask(a, drop, work, m, t + 1, c + t + 1);
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
__global__ void __launch_bounds__(VD_SPECIALIZED_THREADS, VD_BLOCKS)
    forward_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ forward_task<T> task,
                         const __grid_constant__ vd_dropout_draws drop) {
  extern __shared__ __align__(1024) unsigned char smem[];
  forward_smem<T> *m = (forward_smem<T> *)smem;
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  vd_pdl_wait();
  if (threadIdx.x == 0) m->next[1] = first_tile(schedule, longest_tiles(vd_query_items<REL, TRIM>(a, schedule)));
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
  constexpr bool REL = VD_HEAD_WIDTH == 64;
  cudaLaunchAttribute early = vd_pdl_attribute();
  auto kernel = vd_variant(a, forward_wgmma_kernel<T, false, false, false>, forward_wgmma_kernel<T, true, false, false>,
                           forward_wgmma_kernel<T, false, false, true>, forward_wgmma_kernel<T, true, false, true>,
                           forward_wgmma_kernel<T, false, REL, false>, forward_wgmma_kernel<T, true, REL, false>);
  return vd_launch_persistent(kernel, VD_SPECIALIZED_THREADS, (int)sizeof(forward_smem<T>), stream, &early, 1, *a, task,
                              vd_make_dropout_draws(a));
}

} // namespace

#if VD_HEAD_WIDTH > 64
cudaError_t vd_forward_wgmma_96(const vd_cuda_attention *a, const void *block, const void *memory, const void *table,
                                void *out, float *lse, cudaStream_t stream) {
  return launch_forward<__nv_bfloat16>(a, block, memory, table, out, lse, stream);
}
#else
cudaError_t vd_forward_wgmma(const vd_cuda_attention *a, const void *block, const void *memory, const void *table,
                             void *out, float *lse, cudaStream_t stream) {
  if (a->d_head > 64) return vd_forward_wgmma_96(a, block, memory, table, out, lse, stream);
  return a->type == VD_BF16 ? launch_forward<__nv_bfloat16>(a, block, memory, table, out, lse, stream)
                            : launch_forward<__half>(a, block, memory, table, out, lse, stream);
}

static_assert(VD_CUDA_MASK_BYTES == VD_WARPGROUP * sizeof(uint32_t), "a word of each consumer thread");
size_t vd_cuda_attention_dropout_mask_size(const vd_cuda_attention *a) {
  if (!vd_uses_wgmma(a) || !vd_make_dropout_draws(a).threshold) return 0;
  return (size_t)a->n_stream * vd_stream_score_tiles(a) * VD_CUDA_MASK_BYTES;
}

size_t vd_cuda_attention_splits_size(const vd_cuda_attention *a) {
  if (!vd_uses_wgmma(a) || a->rel_key || a->trimmed) return 0;
  return (size_t)VD_SPLIT_SLOTS * (size_t)vd_split_float4(vd_wgmma_width(a->d_head)) * sizeof(float4);
}
#endif
