/* Work items of the dQ kernel (bwd_dq_wgmma.cu), and the producer warpgroup that copies their operands. */
#ifndef VD_ATTENTION_DQ_PRODUCER_CUH
#define VD_ATTENTION_DQ_PRODUCER_CUH

#include "cuda/attention/bwd_dq_scores.cuh"
#include "cuda/kernels/tma.cuh"

namespace {

/* Operands of the kernel. */
typedef struct dq_task {
  vd_cuda_attention_gradient g;
  vd_backward_workspace ws;
  vd_dropout_draws drop;
} dq_task;

/* Number of work items: pairs of query tiles, or their splits. */
template <bool REL, bool TRIM> VD_DEV int dq_items(const vd_cuda_attention &a, const vd_tile_schedule *schedule) {
  const int n_tile = vd_ceil_div(a.block, VD_TILE), n_pair = vd_ceil_div(n_tile, VD_DQ_TILES);
  if constexpr (vd_can_split<REL, TRIM>()) return a.n_stream * schedule->split_first[a.n_head] / n_tile * n_pair;
  return a.n_head * a.n_stream * n_pair;
}
/* The place of an item's first query tile, and of its splits' slots, which are numbered as in the forward pass. */
template <bool REL, bool TRIM>
VD_DEV void place_item(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int item, vd_query_work &w) {
  const int n_tile = vd_ceil_div(a.block, VD_TILE), n_pair = vd_ceil_div(n_tile, VD_DQ_TILES);
  const int row = item / n_pair, pair = item % n_pair;
  w.n_split = 1, w.split = 0, w.slot = 0;
  if constexpr (vd_can_split<REL, TRIM>()) {
    const int rank = vd_rank_of(schedule->split_first, a.n_head, a.n_stream, row * n_tile);
    const int first = a.n_stream * schedule->split_first[rank];
    w.n_split = schedule->n_split[rank];
    const int rest = row - first / n_tile;
    w.split = rest % w.n_split;
    w.at = {schedule->head[rank], rest / w.n_split, pair * VD_DQ_TILES};
    w.slot = first + (w.at.stream * n_tile + w.at.tile) * w.n_split;
  } else if constexpr (REL) { /* the longest tiles first */
    w.at = {row % a.n_head, row / a.n_head, (n_pair - 1 - pair) * VD_DQ_TILES};
  } else {
    w.at = {schedule->head[row / a.n_stream], row % a.n_stream, pair * VD_DQ_TILES};
  }
}
/* A work item. Closing iterations: of a split that is not the query tile's last, and with relative keys, which have a
 * distance 0. */
template <bool REL, bool TRIM>
VD_DEV dq_work dq_work_at(const vd_cuda_attention &a, const vd_backward_workspace &ws, int item) {
  const vd_tile_schedule *schedule = (const vd_tile_schedule *)a.schedule;
  dq_work w;
  place_item<REL, TRIM>(a, schedule, item, w.tile);
  vd_set_key_tiles<REL, TRIM>(a, schedule, w.tile,
                              min(w.tile.at.tile + VD_DQ_TILES, vd_ceil_div(a.block, VD_TILE)) - 1);
  const int before = vd_first_score_tile<REL>(a, schedule, w.tile.band, 0, ws.first_stream);
  for (int x = 0; x < VD_DQ_TILES; x++) {
    const int64_t score_tile = w.tile.score_tile + x * vd_tile_distances(w.tile.band);
    w.stored[x] = ws.stored + score_tile * VD_STORED_BYTES;
    w.dropout_mask[x] = ws.dropout_mask + (before + score_tile) * VD_WARPGROUP;
  }
  w.iterations = w.tile.n + (REL || w.tile.n < w.tile.left ? 1 : 0);
  return w;
}
/* The parity of a barrier of iteration c. */
VD_DEV int parity_of(int c) {
  return c >> 1 & 1;
}
/* Arrives at an mbarrier after all lanes' accesses. */
VD_DEV void arrive_warp(uint64_t *barrier) {
  __syncwarp();
  vd_mbarrier_arrive_warp(barrier);
}

/* Starts the copies of shift and delta of an item's query tiles. */
template <typename T>
VD_DEV void copy_row_sums(const vd_cuda_attention &a, const vd_backward_workspace &ws, const vd_work_tile &at,
                          dq_smem<T> *m) {
  const int thread = (int)threadIdx.x, x = thread / VD_TILE, row = thread % VD_TILE, i = at.tile * VD_TILE + thread;
  if (x >= VD_DQ_TILES || i >= a.block) return;
  const int64_t from = ((int64_t)at.stream * a.n_head + at.head) * a.block + i;
  vd_cp_async4(&m->shift[x][row], ws.shift + from, true);
  vd_cp_async4(&m->delta[x][row], ws.delta + from, true);
}

/* Starts the copies of the block of e number y of an item. */
template <typename T, bool REL>
VD_DEV void copy_block(const vd_cuda_attention &a, const dq_task &task, const dq_work &work, int y, int slot,
                       dq_smem<T> *m) {
  const vd_position_keys<T> positions = vd_position_keys_of<REL, T>(a, task.g.table, work.tile.at.head);
  vd_copy_positions(m->table[slot], positions, work.tile.first_block + y * VD_TILE, a.d_head);
}
/* Starts the copies of an item's key tile: keys, and values unless it is far for all query tiles. */
template <typename T, bool REL, bool TRIM>
VD_DEV void copy_keys(const vd_cuda_attention &a, const dq_task &task, const dq_work &work, int tile, int slot,
                      dq_smem<T> *m) {
  const vd_work_tile &at = work.tile.at;
  const vd_kv_view<const T> memories =
      vd_kv_view_of(a, (const T *)task.g.block, (const T *)task.g.memory, at.head, at.stream);
  const int kappa0 = work.tile.start + tile * VD_TILE;
  const vd_row_view<const T> keys = memories.at(kappa0, VD_KEY), values = memories.at(kappa0, VD_VALUE);
  vd_copy_operand<T>(m->k[slot], keys.row0, keys.stride, kappa0, vd_lowest<REL>(work.tile.band), a.block, a.d_head);
  if (TRIM && tile < work.tile.far) return;
  vd_copy_operand<T>(m->v[slot], values.row0, values.stride, kappa0, vd_lowest_value<REL>(work.tile.band), a.block,
                     a.d_head);
}
/* Starts the copies of an item's query tiles, to slot `slot` of q. */
template <typename T, bool REL>
VD_DEV void copy_queries(const vd_cuda_attention &a, const dq_task &task, const dq_work &work, int slot,
                         dq_smem<T> *m) {
  const vd_work_tile &at = work.tile.at;
  const vd_row_view<const T> queries = vd_block_rows(a, (const T *)task.g.block, VD_QUERY, at.head, at.stream);
  const vd_row_view<const T> douts = vd_output_rows(a, (const T *)task.g.dout, at.head, at.stream);
  for (int x = 0; x < VD_DQ_TILES; x++) {
    const int i0 = work.tile.i0 + x * VD_TILE;
    vd_copy_operand<T>(m->q[slot][x], queries.row0, queries.stride, i0, 0, a.block, a.d_head);
    vd_copy_operand<T>(m->dout[x], douts.row0, douts.stride, i0, 0, a.block, a.d_head);
  }
  if constexpr (REL) vd_copy_biases(a, at.head, &m->biases[slot]);
  copy_row_sums(a, task.ws, at, m);
}
/* Starts the copies of the dropout mask's bits for iteration t, to slot `slot`. */
template <typename T, bool TRIM>
VD_DEV void copy_dropout_mask(const vd_cuda_attention &a, const dq_work &work, int t, int slot, dq_smem<T> *m) {
  if (t == work.tile.n || (t == 0 && work.tile.lead) || (TRIM && t < work.tile.far)) return;
  for (int x = 0; x < VD_DQ_TILES && work.tile.at.tile + x < vd_ceil_div(a.block, VD_TILE); x++)
    vd_cp_async4(&m->dropout_mask[slot][x][threadIdx.x], work.dropout_mask[x] - t * VD_WARPGROUP + threadIdx.x, true);
}

/* Decodes a work item to m->work, and starts the copies of what it needs that is free before its first iteration:
 * queries, and of two query tiles the first one's key tile. */
template <typename T, bool REL, bool TRIM>
VD_DEV void start_item(const vd_cuda_attention &a, const dq_task &task, int item, int slot, int key, dq_smem<T> *m) {
  const dq_work decoded = dq_work_at<REL, TRIM>(a, task.ws, item);
  if (threadIdx.x == 0) m->work[slot] = decoded;
  vd_producer_sync();
  copy_queries<T, REL>(a, task, m->work[slot], slot, m);
  if (VD_DQ_TILES > 1 && !m->work[slot].tile.lead)
    copy_keys<T, REL, TRIM>(a, task, m->work[slot], 0, key & (VD_DQ_KEY_SLOTS - 1), m);
}
/* Starts the copies of iteration t, number c of the block. All its key tiles but the last are those of the iteration
 * before. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void copy_iteration(const vd_cuda_attention &a, const dq_task &task, const dq_work &work, int t, int c, int key,
                           dq_smem<T> *m) {
  const int tile = t + VD_DQ_TILES - 1;
  if (REL && t == 0) copy_block<T, REL>(a, task, work, 0, c % 3, m);
  if (t < work.tile.n && !(tile == 0 && work.tile.lead))
    copy_keys<T, REL, TRIM>(a, task, work, tile, (key + tile) & (VD_DQ_KEY_SLOTS - 1), m);
  if (t < work.tile.n && (REL || t + 1 < work.tile.left)) copy_block<T, REL>(a, task, work, t + 1, (c + 1) % 3, m);
  if constexpr (DROP) copy_dropout_mask<T, TRIM>(a, work, t, c & 1, m);
  vd_cp_async_commit();
}

/* The producer warpgroup: it decodes work items and copies their iterations. While the consumers take an item's last
 * iteration, it starts the next item: every item has at least two iterations, so that consumers and table warpgroup
 * have then left the slots of the item before. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dq_producer(const vd_cuda_attention &a, const dq_task &task, dq_smem<T> *m) {
  vd_tile_schedule *schedule = (vd_tile_schedule *)a.schedule;
  const int n_item = dq_items<REL, TRIM>(a, schedule);
  int item = (int)blockIdx.x, c = 0, key = 0;
  vd_pdl_wait_previous();
  for (int i = 0; item < n_item; i++) {
    const int requested = threadIdx.x == 0 ? (int)gridDim.x + atomicAdd(&schedule->next[VD_WORK_DQ], 1) : 0;
    const dq_work &work = m->work[i & 1];
    start_item<T, REL, TRIM>(a, task, item, i & 1, key, m);
    for (int t = 0; t < work.iterations; t++, c++) {
      if (c > 0) vd_mbarrier_wait(&m->empty[(c - 1) & 1], parity_of(c - 1));
      copy_iteration<T, DROP, REL, TRIM>(a, task, work, t, c, key, m);
      if (threadIdx.x == 0) {
        const bool last = t + 1 == work.iterations, more = !last || requested < n_item;
        m->table_iteration[c & 1] = {work.tile.first_block + t * VD_TILE, work.tile.at.head,
                                     (i & 1) | (REL || t > 0 ? (int)ADDS_BLOCK : 0) | (more ? 0 : (int)LAST_ITERATION)};
        if (last) m->more[i & 1] = more, m->next = requested;
      }
      vd_cp_async_wait_all();
      vd_fence_proxy_async();
      arrive_warp(&m->full[c & 1]);
    }
    key += work.iterations + VD_DQ_TILES - 1;
    vd_producer_sync();
    item = vd_announced_tile(&m->next);
  }
  vd_pdl_launch_next();
}

} // namespace

#endif
