/* dQ kernel of the backward pass by wgmma, for 16-bit types and heads up to 64 wide:
 *
 *      dq_i = sum_j ds_ij (k_j + p(i - j)) / sqrt(d_head),  dp(x) = sum over pairs at distance x of ds_ij q_i /
 * sqrt(d_head)
 *
 * and partial sums of the gradients of spans, or the sum of dq, which is that of the gradients of the biases u and v;
 * ds_ij as in bwd_dkv_wgmma.cu. Weights, or of far tiles score gradients, go to device memory, where the dK/dV kernel
 * reads them (stored tiles in bwd_common.cuh).
 *
 * Tiles: a persistent block takes two adjacent query tiles of 64 of one head and stream and goes over the key tiles of
 * 64 in reach, or over a split of them (splits.cuh), one an iteration. In one iteration both query tiles have the same
 * distances, so that the second one's key tile is the one after the first one's; each key tile and each block of 64
 * distances is copied once for both. Six products of 64 x 64 x 64 for a query tile and a key tile: position scores,
 * scores, dout v^T, dq += ds k, dq += skewed ds p, dp = skewed ds^T q, which is the sum over both query tiles. Far
 * tiles, which are beyond the own span of a head with a trimmed softmax, need no dout v^T. dp is added by atomics of 16
 * bytes to an array in the order of the accumulators (vd_add_table_block).
 *
 * Warps: two consumer warpgroups (208 registers), one for each query tile, have 16 queries a warp. The producer
 * warpgroup (32 registers) decodes work items and copies tiles, biases and the dropout mask, one iteration ahead. The
 * table warpgroup (64 registers) multiplies and adds dp. Thread x of warpgroup y is thread (x, y) of the block.
 *
 * Shared memory, 210 KiB, one block for a multiprocessor: skewed score gradients by columns of e, two tiles for each
 * consumer (32 KiB), q in two slots (32 KiB), dout (16 KiB), k and v in four slots each (64 KiB), position keys in
 * three (24 KiB), a ring buffer of position scores for each consumer warp (38 KiB, half), ones, biases, mask bits.
 * A skewed tile is complete after two key tiles; it is then an operand of both the gradient of the queries and that of
 * the table.
 *
 * Barriers: mbarriers. full[c & 1]: the copies of iteration c have landed. empty[c & 1]: the consumers have begun
 * iteration c, so that what only iterations before it read is free, and the table warpgroup has read what precedes
 * iteration c. skewed_full[x][c & 1]: consumer x has completed its tile of block c; skewed_empty: the table warpgroup
 * has read it. Consumers stay within an iteration of each other, by way of the copies and the table warpgroup. Named
 * barriers 1 and 2: each consumer by itself.
 *
 * Heads of 65 to 96 (bwd_dq_wgmma_96.cu): one query tile and one consumer a block.
 *
 * Bound: the data path of shared memory and L1, instruction issue and waits between few warps: without its stores an
 * iteration takes 4,300 cycles, of which the products alone take 1,540 (doc/notes/2026-11-29-query-tile-pairs.md); with
 * them 8 % more (doc/notes/2026-11-29-stored-weights.md). */
#include "cuda/attention/bwd_dq_producer.cuh"

namespace {

enum { WARPGROUPS = VD_DQ_TILES + 2, PRODUCER = VD_DQ_TILES, TABLE = VD_DQ_TILES + 1 };
/* Registers of a thread. A block of four warpgroups starts with 128 each. */
enum {
  CONSUMER_REGISTERS = VD_DQ_TILES == 2 ? 208 : 240,
  PRODUCER_REGISTERS = VD_DQ_TILES == 2 ? 32 : 56,
  TABLE_REGISTERS = VD_DQ_TILES == 2 ? 64 : 104
};

/* Place and splits of query tile x of an item whose first one is `tile`. */
VD_DEV vd_query_work tile_of(const vd_query_work &tile, int x) {
  vd_query_work w = tile;
  w.at.tile += x, w.slot += x * w.n_split;
  return w;
}
/* The iterations of an item before the first key tile of query tile x: with relative keys the next query tile can see
 * one more. */
template <bool REL> VD_DEV int first_iteration(const vd_cuda_attention &a, const vd_query_work &tile, int x) {
  if constexpr (REL) return tile.n - vd_key_tiles<REL>(vd_band_of<REL>(a, nullptr, tile.at.head), tile.at.tile + x);
  return 0;
}

/* Starts a query tile whose first copies have landed: loads queries, dout, shift and delta to registers. */
template <typename T, bool REL>
VD_DEV void dq_begin(const vd_cuda_attention &a, const dq_smem<T> *m, int item, int x, dq_state<T> &w) {
  const int i0 = m->work[item].tile.i0 + x * VD_TILE;
  vd_load_lefts<T>(m->q[item][x], w.queries);
  if constexpr (REL) vd_add_biases(&m->biases[item], w.queries, w.positions);
  vd_load_lefts<T>(m->dout[x], w.dout);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    const int row = 16 * (int)(threadIdx.x >> 5) + (int)(threadIdx.x & 31) / 4 + 8 * ih;
    w.shift[ih] = i0 + row < a.block ? m->shift[x][row] : -INFINITY;
    w.delta[ih] = i0 + row < a.block ? m->delta[x][row] : 0;
  }
  vd_clear_sums(w.dq);
  w.dspan = 0;
}

/* dq += skewed table alone, the part of a complete block of e. */
template <typename T> VD_DEV void add_block(dq_state<T> &w, const T *skewed, const T *table) {
  vd_wgmma_fence();
  vd_tile_product<T, VD_K_MAJOR>(w.dq, skewed, table, true);
  vd_wgmma_commit();
  vd_wgmma_wait<0>();
  vd_wgmma_fence_operand<VD_SUMS>(w.dq);
}

/* Stores the sums of this split. True where all others are stored: then `w` has the joint sums. */
template <typename T>
VD_DEV bool join_splits(const vd_cuda_attention &a, const vd_query_work &work, int *last_split, int x, dq_state<T> &w) {
  const float all[2] = {1, 1};
  vd_store_split(a, work, w.dq, make_float4(w.dspan, 0, 0, 0));
  if (!vd_is_last_split(a, work, last_split, x)) return false;
  vd_clear_sums(w.dq);
  w.dspan = 0;
  for (int split = 0; split < work.n_split; split++) {
    w.dspan += vd_split_rest(a, work, split).x;
    vd_add_split(a, work, split, all, all, w.dq);
  }
  return true;
}

/* Ends a query tile: the partial sum of the span's gradient, or the sum of dq, and dq. */
template <typename T, bool REL>
VD_DEV void dq_end(const vd_cuda_attention &a, const dq_task &task, vd_work_tile at, dq_smem<T> *m, int x,
                   dq_state<T> &w, float scale) {
  const float scales[2] = {scale, scale};
  const int n_tile = vd_ceil_div(a.block, VD_TILE);
  if constexpr (REL) {
    if (a.content_bias && task.g.dcontent_bias) {
      vd_add_dbias<64>(w.dq, (float *)m->ring[x][0], scale, a.d_head, task.g.dcontent_bias + at.head * a.d_head, x);
      vd_consumer_sync(x); /* the ring, which held the sums, is free again */
    }
  } else {
    vd_store_dspan(w.dspan, m->sums[x],
                   task.ws.dspan + ((int64_t)at.head * task.ws.n_stream + at.stream) * n_tile + at.tile, x);
  }
  const vd_row_view<T> to = vd_block_rows(a, (T *)task.g.dblock, VD_QUERY, at.head, at.stream);
  vd_write_rows<T, VD_HEAD_WIDTH>(to.row0, to.stride, at.tile * VD_TILE + 16 * (int)(threadIdx.x >> 5), 0, a.block,
                                  a.d_head, w.dq, scales);
}

/* A consumer: its number x, the slot of the work item, and the iteration: number t of the query tile, c of the block;
 * slots of its key tile and of the block of e that it completes. */
typedef struct dq_place {
  int x, item, t, c, key, block;
} dq_place;
VD_DEV void next_iteration(dq_place &at) {
  at.t++, at.c++;
  at.key = (at.key + 1) & (VD_DQ_KEY_SLOTS - 1), at.block = at.block == 2 ? 0 : at.block + 1;
}
/* Operands of the iteration. The query tile's last key tile ends with a block of e that has no distances above 0 and no
 * place in the table; the scores of the block that is read instead are masked. */
template <bool REL, typename T> VD_DEV dq_iteration<T> iteration_of(dq_smem<T> *m, const dq_place &at) {
  const vd_query_work &tile = m->work[at.item].tile;
  const int lane = (int)threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  char *stored = m->work[at.item].stored[at.x] - at.t * (int)VD_STORED_BYTES +
                 ((16 * (int)(threadIdx.x >> 5) + g) * 128 + (t ^ g) * 16);
  const int block = !REL && at.t + 1 == tile.left ? at.block : at.block == 2 ? 0 : at.block + 1;
  const dq_iteration<T> iteration = {m->k[at.key],
                                     m->v[at.key],
                                     m->table[block],
                                     m->ring[at.x][threadIdx.x >> 5],
                                     stored,
                                     at.c + 1,
                                     tile.start + (at.x + at.t) * VD_TILE};
  return iteration;
}

/* Writes an iteration's score gradients to the skewed tiles, for this warpgroup and the table warpgroup. */
template <typename T> VD_DEV void pass_gradients(dq_smem<T> *m, const dq_place &at, const vd_frag_a<T> gradient[4]) {
  const int c = at.c;
  if (c > 0) vd_mbarrier_wait(&m->skewed_empty[at.x][(c - 1) & 1], parity_of(c - 1));
  vd_write_skewed<T>(m->skewed[at.x], c + 1, gradient);
  vd_fence_proxy_async();
  vd_consumer_sync(at.x);
  if (threadIdx.x == 0) vd_mbarrier_arrive(&m->skewed_full[at.x][c & 1]);
}

/* Waits for the copies of an iteration. In the query tile's first iteration begins it. */
template <typename T, bool REL>
VD_DEV void open_iteration(const vd_cuda_attention &a, dq_smem<T> *m, const dq_place &at, int first, dq_state<T> &w) {
  vd_mbarrier_wait(&m->full[at.c & 1], parity_of(at.c));
  if (at.t != first) return;
  dq_begin<T, REL>(a, m, at.item, at.x, w);
  if constexpr (REL) vd_write_positions(w.positions, m->table[at.block], m->ring[at.x][threadIdx.x >> 5], at.c);
}

/* The iterations of a consumer whose query tile is beyond the block. */
template <typename T> VD_DEV void absent_iterations(dq_smem<T> *m, dq_place &at) {
  for (const int iterations = m->work[at.item].iterations; at.t < iterations; next_iteration(at)) {
    const int c = at.c;
    vd_mbarrier_wait(&m->full[c & 1], parity_of(c));
    arrive_warp(&m->empty[c & 1]);
    if (c > 0) vd_mbarrier_wait(&m->skewed_empty[at.x][(c - 1) & 1], parity_of(c - 1));
    for (int i = (int)threadIdx.x; i < 2 * VD_TILE_BYTES / 16; i += VD_WARPGROUP)
      ((uint4 *)m->skewed[at.x][0])[i] = make_uint4(0, 0, 0, 0);
    vd_fence_proxy_async();
    vd_consumer_sync(at.x);
    if (threadIdx.x == 0) vd_mbarrier_arrive(&m->skewed_full[at.x][c & 1]);
  }
}

/* An iteration without a key tile: a split's lead, whose position scores the next iteration needs; with relative keys
 * one before the first key tile; a closing iteration. */
template <typename T, bool REL>
VD_DEV void bare_iteration(const vd_cuda_attention &a, dq_smem<T> *m, dq_place &at, int first, dq_state<T> &w) {
  const vd_frag_a<T> none[4] = {};
  open_iteration<T, REL>(a, m, at, first, w);
  if (!REL && at.t == 0) {
    const dq_iteration<T> iteration = iteration_of<REL>(m, at);
    vd_write_positions(w.queries, iteration.table, iteration.ring, iteration.block);
  }
  arrive_warp(&m->empty[at.c & 1]);
  pass_gradients<T>(m, at, none);
  if (at.t == m->work[at.item].tile.n) add_block(w, m->skewed[at.x][at.c & 1], m->table[at.block]);
  next_iteration(at);
}

/* Iterations at.t .. end - 1, all with a key tile, FAR: far ones. Without relative keys block 0 of e is beyond the
 * reach and not in the table: its score gradients are 0 (as long as all are finite), and so are those of an item's last
 * block, which the next item's block 0 begins with. */
template <typename T, bool DROP, bool REL, bool TRIM, bool FAR>
VD_DEV void run_iterations(const vd_cuda_attention &a, const dq_task &task, dq_smem<T> *m, dq_place &at, int end,
                           int first, dq_state<T> &w) {
  const float factor = rsqrtf((float)a.d_head) * 1.44269504088896341f;
  for (; at.t < end; next_iteration(at)) {
    dq_scores y;
    vd_frag_a<T> gradient[4];
    open_iteration<T, REL>(a, m, at, first, w);
    if (DROP && !FAR) y.dropout_mask = m->dropout_mask[at.c & 1][at.x][threadIdx.x];
    arrive_warp(&m->empty[at.c & 1]);
    const dq_iteration<T> iteration = iteration_of<REL>(m, at);
    multiply_scores<FAR, REL>(iteration, w, y);
    const vd_query_work &tile = m->work[at.item].tile;
    const vd_band band = vd_band_of<REL>(a, (const vd_tile_schedule *)a.schedule, tile.at.head);
    const int i0 = tile.i0 + at.x * VD_TILE + 16 * (int)(threadIdx.x >> 5);
    if constexpr (FAR) {
      far_gradients<T>(band, iteration, w, i0, factor, y, gradient);
    } else {
      near_gradients<DROP, REL, TRIM>(band, task.drop.scale, iteration, w, i0, factor, y, gradient);
    }
    pass_gradients<T>(m, at, gradient);
    vd_wgmma_fence();
    vd_tile_product<T, VD_K_MAJOR>(w.dq, m->skewed[at.x][at.c & 1], m->table[at.block], true);
    vd_tile_product_rs<T, VD_MN_MAJOR>(w.dq, gradient, iteration.k, true);
    vd_wgmma_commit();
    vd_wgmma_wait<0>();
    vd_wgmma_fence_operand<VD_SUMS>(w.dq);
  }
}

/* Consumer warpgroup x: query tile x of each work item. */
template <typename T, bool DROP, bool REL, bool TRIM>
VD_DEV void dq_consumer(const vd_cuda_attention &a, const dq_task &task, dq_smem<T> *m, int x) {
  const int n_item = dq_items<REL, TRIM>(a, (const vd_tile_schedule *)a.schedule);
  dq_place at = {x, 0, 0, 0, x, 0};
  for (int more = (int)blockIdx.x < n_item; more; at.item ^= 1) {
    vd_mbarrier_wait(&m->full[at.c & 1], parity_of(at.c));
    const dq_work &work = m->work[at.item];
    const int first = first_iteration<REL>(a, work.tile, x), n = work.tile.n;
    dq_state<T> w;
    bool done = work.tile.at.tile + x < vd_ceil_div(a.block, VD_TILE);
    at.t = 0;
    if (!done) {
      absent_iterations(m, at);
    } else {
      const int bare = first + (work.tile.lead ? 1 : 0);
      if constexpr (!TRIM)
        while (at.t < bare) bare_iteration<T, REL>(a, m, at, first, w);
      if constexpr (TRIM) run_iterations<T, DROP, REL, TRIM, true>(a, task, m, at, work.tile.far, first, w);
      run_iterations<T, DROP, REL, TRIM, false>(a, task, m, at, n, first, w);
      if constexpr (!TRIM)
        if (work.iterations > n) bare_iteration<T, REL>(a, m, at, first, w);
    }
    if (VD_DQ_TILES > 1) at.key = (at.key + 1) & (VD_DQ_KEY_SLOTS - 1);
    const vd_query_work tile = tile_of(work.tile, x);
    more = vd_announced_tile(&m->more[at.item]);
    if constexpr (vd_can_split<REL, TRIM>()) {
      if (done && tile.n_split > 1) done = join_splits<T>(a, tile, &m->last_split[x], x, w);
    }
    if (done) dq_end<T, REL>(a, task, tile.at, m, x, w, rsqrtf((float)a.d_head));
  }
}

/* The table warpgroup: the table's gradient, dp, from all query tiles of a work item, in the iterations that the
 * producer announces. */
template <typename T, bool REL>
VD_DEV void dq_table(const vd_cuda_attention &a, const dq_task &task, dq_smem<T> *m, int n_item) {
  const float scale = rsqrtf((float)a.d_head);
  arrive_warp(&m->empty[0]);
  int more = (int)blockIdx.x < n_item;
  for (int c = 0; more; c++) {
    float sum[VD_SUMS][4], rows[1][4]; /* rows: column sums of the skewed tiles, with relative keys */
    for (int x = 0; x < VD_DQ_TILES; x++) vd_mbarrier_wait(&m->skewed_full[x][c & 1], parity_of(c));
    const dq_table_iteration iteration = m->table_iteration[c & 1];
    const int flags = __shfl_sync(0xffffffffU, iteration.flags, 0);
    more = !(flags & LAST_ITERATION);
    if (flags & ADDS_BLOCK) {
      vd_wgmma_fence();
#pragma unroll
      for (int x = 0; x < VD_DQ_TILES; x++) {
        const T *skewed = m->skewed[x][c & 1];
        vd_tile_product<T, VD_MN_MAJOR>(sum, skewed, m->q[flags & 1][x], x > 0);
#pragma unroll
        for (int k = 0; REL && k < 4; k++)
          vd_wgmma_ss<T, 8, VD_MN_MAJOR, VD_K_MAJOR>(rows, vd_smem_descriptor(skewed) + k * VD_MN_MAJOR,
                                                     vd_smem_descriptor(m->ones), x > 0 || k > 0);
      }
      vd_wgmma_commit();
      vd_wgmma_wait<0>();
      vd_wgmma_fence_operand<VD_SUMS>(sum);
      if constexpr (REL) vd_wgmma_fence_operand<1>(rows);
    }
#pragma unroll
    for (int x = 0; x < VD_DQ_TILES; x++) arrive_warp(&m->skewed_empty[x][c & 1]);
    arrive_warp(&m->empty[(c + 1) & 1]);
    if (!(flags & ADDS_BLOCK)) continue;
    if constexpr (REL) { /* relative keys have a distance 0 */
      const vd_position_gradients p =
          vd_position_gradients_of<true>(a, task.g, task.ws.dsum, iteration.head, vd_band());
      vd_add_row_sums(p, rows[0], iteration.e0 + 16 * (int)(threadIdx.x >> 5), scale);
      vd_add_table_block<VD_SUMS>(task.ws.dtable +
                                      (int64_t)iteration.head * vd_table_blocks(a.reach) * VD_TILE * VD_TILE,
                                  iteration.e0 - VD_TILE, sum, scale);
    } else {
      vd_add_table_block<VD_SUMS>(task.g.dtable, iteration.e0, sum, scale);
    }
  }
  vd_finish_work((vd_tile_schedule *)a.schedule, VD_WORK_DQ);
}

/* Initializes the barriers and the ones; zeros the score gradients before the first block of e, and the table, whose
 * slots are multiplied by zeros before they are filled. */
template <typename T, bool REL> VD_DEV void dq_start(dq_smem<T> *m) {
  const int thread = (int)(threadIdx.y * VD_WARPGROUP + threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < 2; i++) {
      vd_mbarrier_init(&m->full[i], VD_WARPGROUP / 32);
      vd_mbarrier_init(&m->empty[i], (VD_DQ_TILES + 1) * VD_WARPGROUP / 32);
      for (int x = 0; x < VD_DQ_TILES; x++) {
        vd_mbarrier_init(&m->skewed_full[x][i], 1);
        vd_mbarrier_init(&m->skewed_empty[x][i], VD_WARPGROUP / 32);
      }
    }
    vd_mbarrier_init_fence();
  }
  for (int i = thread; REL && i < 8 * 64; i += WARPGROUPS * VD_WARPGROUP) m->ones[i] = (T)1.0f;
  for (int x = 0; x < VD_DQ_TILES; x++)
    for (int i = thread; i < VD_TILE_BYTES / 16; i += WARPGROUPS * VD_WARPGROUP)
      ((uint4 *)m->skewed[x][0])[i] = make_uint4(0, 0, 0, 0);
  for (int i = thread; !REL && i < (int)sizeof(m->table) / 16; i += WARPGROUPS * VD_WARPGROUP)
    ((uint4 *)m->table)[i] = make_uint4(0, 0, 0, 0);
  vd_fence_proxy_async();
  __syncthreads();
}

template <typename T, bool DROP, bool REL, bool TRIM>
__global__ void __launch_bounds__(WARPGROUPS *VD_WARPGROUP, 1)
    dq_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ dq_task task) {
  extern __shared__ __align__(1024) unsigned char smem[];
  dq_smem<T> *m = (dq_smem<T> *)smem;
  /* The shuffle tells the compiler that the number is uniform in a warp. */
  const int warpgroup = __shfl_sync(0xffffffffU, (int)threadIdx.y, 0);
  dq_start<T, REL>(m);
  if (warpgroup < VD_DQ_TILES) {
    vd_setmaxnreg_inc<CONSUMER_REGISTERS, true>();
    dq_consumer<T, DROP, REL, TRIM>(a, task, m, warpgroup);
  } else if (warpgroup == PRODUCER) {
    vd_setmaxnreg_dec<PRODUCER_REGISTERS, true>();
    dq_producer<T, DROP, REL, TRIM>(a, task, m);
  } else {
    vd_setmaxnreg_dec<TABLE_REGISTERS, true>();
    dq_table<T, REL>(a, task, m, dq_items<REL, TRIM>(a, (const vd_tile_schedule *)a.schedule));
  }
}

template <typename T>
cudaError_t launch_dq(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                      cudaStream_t stream) {
  constexpr bool REL = VD_HEAD_WIDTH == 64;
  const dq_task task = {*g, *ws, vd_make_dropout_draws(a)};
  cudaLaunchAttribute early = vd_pdl_attribute();
  auto kernel = vd_variant(a, dq_wgmma_kernel<T, false, false, false>, dq_wgmma_kernel<T, true, false, false>,
                           dq_wgmma_kernel<T, false, false, true>, dq_wgmma_kernel<T, true, false, true>,
                           dq_wgmma_kernel<T, false, REL, false>, dq_wgmma_kernel<T, true, REL, false>);
  return vd_launch_persistent(kernel, dim3(VD_WARPGROUP, WARPGROUPS), (int)sizeof(dq_smem<T>), stream, &early, 1, *a,
                              task);
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
