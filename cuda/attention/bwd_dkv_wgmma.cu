/* dK/dV kernel of the backward pass by wgmma, for 16-bit types and heads up to 64 wide:
 *
 *     dv_j = sum_i dropout(a_ij) dout_i
 *     dk_j = sum_i ds_ij (q_i + u) / sqrt(d_head),  ds_ij = a_ij (dropout(dout_i . v_j) - delta_i)
 *
 * The dQ kernel has stored the weights a_ij (stored tiles in bwd_common.cuh), so that no score and no exponential is
 * computed again. With a trimmed softmax they are stored before the mask m, and ds_ij = a_ij (m dropout(dout_i . v_j) -
 * delta_i).
 *
 * Tiles: a persistent block takes two adjacent key tiles of 64 of one head and stream and goes over the query tiles of
 * 64 that see them, in stages. Keys are the rows of the results. Three products of 64 x 64 x 64 for a query tile and a
 * key tile: v dout^T, dv += weights dout, dk += gradients q; u times the score gradients of a key is added at its end.
 * A far tile (bwd_dq_wgmma.cu) has its score gradients stored and gives no dv: one product.
 *
 * Warps: two consumer warpgroups (232 registers), one for each key tile, have 16 keys a warp. Of the producer warpgroup
 * one warp works: it decodes 32 work items at a time and starts the copies.
 *
 * Shared memory, 196 KiB, one block for a multiprocessor: five stages of q, dout, two stored tiles and delta (161 KiB),
 * the values of two work items (32 KiB), which later take the results on their way to whole rows, work items.
 *
 * Barriers: mbarriers. full[s], the copies of a stage have landed, with a work item's first one its values, too;
 * empty[s], the consumers have read it; values_empty[i], they have ended a work item. Named barriers 1 and 2: each
 * consumer by itself.
 *
 * Heads of 65 to 96 (bwd_dkv_wgmma_96.cu): three stages of 48 KiB.
 *
 * Bound: L2 (64 to 75 % busy) and device memory (50 to 60 %); doc/notes/2026-11-29-stored-weights.md. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/pipeline.cuh"
#include "cuda/kernels/tma.cuh"

namespace {

enum {
  CONSUMERS = VD_DKV_TILES,
  STAGES = VD_HEAD_WIDTH == 64 ? 5 : 3,
  DKV_THREADS = (CONSUMERS + 1) * VD_WARPGROUP,
  BATCH = 32 /* work items that are decoded at once */
};

/* A work item: n_key key tiles from `tile` on, the query tiles first .. end - 1 that see them; distances of tiles that
 * the head sees, and those within its own span; the number of the score tile of the first query tile and the key tile
 * at its place; the first key whose value the head needs. */
typedef struct dkv_work {
  int head, stream, tile, n_key, first, end, distances, near_distances, first_score_tile, lowest_value;
} dkv_work;

template <typename T> struct dkv_smem {
  T stored[STAGES][CONSUMERS][VD_PANEL];
  T q[STAGES][VD_OPERAND], dout[STAGES][VD_OPERAND];
  T values[2][CONSUMERS][VD_OPERAND]; /* of work item k in slot k & 1; later its results */
  float delta[STAGES][VD_TILE];
  dkv_work work[2][BATCH]; /* the block's work items in turn */
  uint64_t full[STAGES], empty[STAGES], values_empty[2];
};
static_assert(sizeof(dkv_smem<__half>) + 1024 <= 227 * 1024, "shared memory of a block");

/* A stage's slot, and the parity of its phase. */
typedef struct dkv_stage {
  int slot, parity;
} dkv_stage;
VD_DEV void next_stage(dkv_stage &at) {
  if (++at.slot == STAGES) at.slot = 0, at.parity ^= 1;
}

template <bool REL> VD_DEV int dkv_items(const vd_cuda_attention &a, const vd_tile_schedule *schedule) {
  if constexpr (REL)
    return a.n_stream * a.n_head * vd_ceil_div(vd_far_tiles(a) + vd_ceil_div(a.block, VD_TILE), CONSUMERS);
  return a.n_stream * schedule->dkv_first[a.n_head];
}
/* Work item number `item`. Each lane may have another one. */
template <bool REL>
VD_DEV dkv_work dkv_work_at(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int item) {
  const int n_tile = vd_ceil_div(a.block, VD_TILE);
  int rank = 0, rest = item, far = vd_far_tiles(a);
  if constexpr (!REL) {
    while (item >= a.n_stream * schedule->dkv_first[rank + 1]) rank++;
    rest = item - a.n_stream * schedule->dkv_first[rank];
    far = vd_ceil_div(schedule->band[schedule->head[rank]].reach, VD_TILE);
  }
  const int per_head = vd_ceil_div(far + n_tile, CONSUMERS), row = rest / per_head;
  if (REL) rank = row % a.n_head;
  const int head = REL ? rank : schedule->head[rank], stream = REL ? row / a.n_head : row;
  const vd_band band = vd_band_of<REL>(a, schedule, head);
  dkv_work w = {head, stream, rest % per_head * CONSUMERS - far};
  w.distances = vd_tile_distances(band), w.near_distances = REL ? w.distances : vd_ceil_div(band.own, VD_TILE) + 1;
  w.n_key = min((int)CONSUMERS, n_tile - w.tile);
  w.first = max(w.tile, 0), w.end = min(n_tile, w.tile + w.n_key - 1 + w.distances);
  w.first_score_tile = vd_first_score_tile<REL>(a, schedule, band, head, stream),
  w.lowest_value = vd_lowest_value<REL>(band);
  return w;
}
/* Number k of the block's work items. The dQ kernel stored the last ones' tiles most recently. */
VD_DEV int item_of(int n_item, int k) {
  return n_item - 1 - (int)blockIdx.x - k * (int)gridDim.x;
}

/* Operands of the kernel. */
typedef struct dkv_task {
  CUtensorMap dout, block, memory; /* [n_stream, rows, columns] */
  const char *stored;
  const float *delta;
  void *dblock, *dmemory;
} dkv_task;

/* Starts the copy of 64 rows of a head's columns, from `column` on, to an operand. One thread calls this. */
template <typename T>
VD_DEV void copy_rows(T *to, const CUtensorMap *map, int stream, int row, int column, uint64_t *full) {
#pragma unroll
  for (int panel = 0; panel < VD_PANELS; panel++)
    vd_copy_box_3d(to + panel * VD_PANEL, map, stream, row, column + 64 * panel, full);
}
/* Starts the copies of a work item's values. Rows that the head does not need hold anything. One thread calls this. */
template <typename T>
VD_DEV void copy_values(const vd_cuda_attention &a, const dkv_task &task, const dkv_work &w, T (*to)[VD_OPERAND],
                        uint64_t *full) {
  const int width = vd_width(a), column = w.head * a.d_head;
  for (int x = 0; x < w.n_key; x++) {
    const int kappa0 = (w.tile + x) * VD_TILE;
    if (kappa0 >= 0) {
      copy_rows(to[x], &task.block, w.stream, kappa0, 2 * width + column, full);
    } else {
      copy_rows(to[x], &task.memory, w.stream, a.window + kappa0, width + column, full);
    }
  }
}
/* Starts the copies of query tile i of work item k. The producer warp calls this. */
template <typename T, bool TRIM>
VD_DEV void copy_stage(const vd_cuda_attention &a, const dkv_task &task, const dkv_work &w, int k, int i, int slot,
                       dkv_smem<T> *m) {
  uint64_t *full = &m->full[slot];
  const int lane = (int)threadIdx.x & 31, row = i * VD_TILE + lane, column = w.head * a.d_head;
  const float *delta = task.delta + ((int64_t)w.stream * a.n_head + w.head) * a.block;
  for (int half = 0; half < 2; half++) {
    const bool valid = row + 32 * half < a.block;
    vd_cp_async4(&m->delta[slot][lane + 32 * half], valid ? delta + row + 32 * half : delta, valid);
  }
  vd_mbarrier_arrive_copies(full);
  if (lane > 0) return;
  const int d = i - w.tile, first = max(0, d - w.distances + 1), end = min(w.n_key, d + 1);
  const bool near = !TRIM || d - end + 1 < w.near_distances;
  const int operands = 1 + (near ? 1 : 0) + (i == w.first ? w.n_key : 0);
  vd_mbarrier_expect(full, (end - first) * VD_STORED_BYTES + operands * VD_PANELS * VD_TILE_BYTES);
  if (i == w.first) copy_values(a, task, w, m->values[k & 1], full);
  for (int x = first; x < end; x++)
    vd_copy_bytes(m->stored[slot][x],
                  task.stored + ((int64_t)w.first_score_tile + i * w.distances + d - x) * VD_STORED_BYTES,
                  VD_STORED_BYTES, full);
  copy_rows(m->q[slot], &task.block, w.stream, i * VD_TILE, column, full);
  if (near) copy_rows(m->dout[slot], &task.dout, w.stream, i * VD_TILE, column, full);
}

/* The producer warp. */
template <typename T, bool REL, bool TRIM>
VD_DEV void dkv_producer(const vd_cuda_attention &a, const dkv_task &task, dkv_smem<T> *m) {
  const vd_tile_schedule *schedule = (const vd_tile_schedule *)a.schedule;
  const int n_item = dkv_items<REL>(a, schedule), lane = (int)threadIdx.x & 31;
  dkv_stage at = {0, 0};
  for (int k = 0; item_of(n_item, k) >= 0; k++) {
    if (k % BATCH == 0) { /* the batch before the last one has been read: its items have ended */
      const int item = item_of(n_item, k + lane);
      if (item >= 0) m->work[k / BATCH & 1][lane] = dkv_work_at<REL>(a, schedule, item);
      __syncwarp();
      if (k == 0) vd_pdl_wait();
    }
    const dkv_work w = m->work[k / BATCH & 1][k % BATCH];
    vd_mbarrier_wait(&m->values_empty[k & 1], (k >> 1 & 1) ^ 1);
    for (int i = w.first; i < w.end; i++, next_stage(at)) {
      vd_mbarrier_wait(&m->empty[at.slot], at.parity ^ 1);
      copy_stage<T, TRIM>(a, task, w, k, i, at.slot, m);
      __syncwarp();
    }
  }
  vd_cp_async_wait_all(); /* no lane ends before its copies have landed */
}

/* The key, counted from the tile's first one, that row `row` of this warp's 16 rows of a result belongs to: the order
 * of stored tiles. */
VD_DEV int key_of_row(int row) {
  const int warp = (int)(threadIdx.x >> 5) & 3;
  return 32 * (warp >> 1) + 8 * ((row & 7) >> 1) + 4 * (warp & 1) + 2 * (row >> 3) + (row & 1);
}
/* This warp's rows of a key tile's values, as left operands; zeros for keys before `lowest` and for columns of the next
 * head, which were copied, too. */
template <typename T>
VD_DEV void load_values(const T *tile, int kappa0, int lowest, int width, vd_frag_a<T> values[VD_LEFTS]) {
  const int lane = (int)threadIdx.x & 31, row = key_of_row(lane & 15);
#pragma unroll
  for (int k = 0; k < VD_LEFTS; k++) {
    vd_ldmatrix(values[k].x,
                vd_smem_address(tile + k / 4 * VD_PANEL + vd_swizzled_chunk<T, 64>(row, 2 * (k % 4) + (lane >> 4))));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const bool needed = kappa0 + key_of_row((lane >> 2) + 8 * (i & 1)) >= lowest && 16 * k + 8 * (i >> 1) < width;
      values[k].x[i] = needed ? values[k].x[i] : 0;
    }
  }
}
/* Writes this warp's rows of a result, times `factor`, to the rows of a key tile, only rows lowest .. end - 1. `place`,
 * an operand in shared memory, takes them on their way to whole rows. */
template <typename T>
VD_DEV void write_keys(const vd_row_view<T> &to, T *place, int kappa0, int lowest, int end, int width,
                       const float sum[VD_SUMS][4], float factor) {
  const int lane = (int)threadIdx.x & 31, row0 = 16 * ((int)(threadIdx.x >> 5) & 3);
#pragma unroll
  for (int n = 0; n < VD_SUMS; n += 2) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      x[i] = vd_pack(sum[n + (i >> 1)][2 * (i & 1)] * factor, sum[n + (i >> 1)][2 * (i & 1) + 1] * factor, T());
    vd_stmatrix(
        vd_smem_address(place + n / 8 * VD_PANEL + vd_swizzled_chunk<T, 64>(row0 + (lane & 15), n % 8 + (lane >> 4))),
        x);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4 * VD_PANELS; i++) {
    const int row = 4 * (i & 3) + (lane >> 3), chunk = lane & 7, key = kappa0 + key_of_row(row);
    const int column = 64 * (i >> 2) + 8 * chunk;
    const uint4 x = *(const uint4 *)(place + (i >> 2) * VD_PANEL + vd_swizzled_chunk<T, 64>(row0 + row, chunk));
    if (key >= lowest && key < end && column < width) *(uint4 *)(to.row0 + (int64_t)key * to.stride + column) = x;
  }
  __syncwarp();
}

/* dk += the sums of score gradients of keys g and g + 8, of which each lane of a quad has a part, times u [width], in
 * device memory. */
VD_DEV void add_content_bias(const float *u, int width, const float sum[2], float dk[VD_SUMS][4]) {
  const float all[2] = {vd_quad_sum(sum[0]), vd_quad_sum(sum[1])};
#pragma unroll
  for (int i = 0; i < 2 * VD_SUMS; i++) {
    const int column = 8 * (i >> 1) + 2 * ((int)threadIdx.x & 3) + (i & 1);
    const float x = column < width ? __ldg(u + column) : 0;
    dk[i >> 1][i & 1] += all[0] * x, dk[i >> 1][2 + (i & 1)] += all[1] * x;
  }
}

/* Waits for a stage, or leaves it. */
template <typename T> VD_DEV void open_stage(dkv_smem<T> *m, const dkv_stage &at) {
  vd_mbarrier_wait(&m->full[at.slot], at.parity);
}
template <typename T> VD_DEV void close_stage(dkv_smem<T> *m, dkv_stage &at) {
  __syncwarp();
  vd_mbarrier_arrive_warp(&m->empty[at.slot]);
  next_stage(at);
}

/* Weights, as they are stored, and their gradients dp become left operands: weights after dropout, and score gradients.
 * delta: of the tile's queries. RAMP: with masks, of queries from i0 on and keys from kappa0 on. sum += score gradients
 * of keys g and g + 8. */
template <typename T, bool RAMP>
VD_DEV void score_gradients(const vd_band &band, int i0, int kappa0, const float *delta, const float dp[8][4],
                            vd_frag_a<T> weight[4], vd_frag_a<T> gradient[4], float sum[2]) {
  const int g = (int)(threadIdx.x & 31) >> 2, t = (int)threadIdx.x & 3;
#pragma unroll
  for (int n = 0; n < 8; n++) {
    const float2 own = *(const float2 *)(delta + 8 * n + 2 * t);
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      uint32_t &pair = weight[n >> 1].x[2 * (n & 1) + ih];
      const float2 p = vd_unpack(pair, T());
      float2 kept = make_float2(fmaxf(p.x, 0), fmaxf(p.y, 0));
      if constexpr (RAMP) {
        const int x = i0 + 8 * n + 2 * t - kappa0 - key_of_row(g + 8 * ih);
        kept.x *= vd_mask(band, x), kept.y *= vd_mask(band, x + 1);
      }
      pair = vd_pack(kept.x, kept.y, T());
      const float x = fmaf(kept.x, dp[n][2 * ih], -fabsf(p.x) * own.x);
      const float y = fmaf(kept.y, dp[n][2 * ih + 1], -fabsf(p.y) * own.y);
      gradient[n >> 1].x[2 * (n & 1) + ih] = vd_pack(x, y, T());
      sum[ih] += x + y;
    }
  }
}

/* Query tiles i .. end - 1 of key tile x of an item, from key kappa0 on: dv += weights^T dout, dk += gradients^T q, sum
 * += those of this lane's keys. */
template <typename T, bool TRIM>
VD_DEV void near_stages(dkv_smem<T> *m, dkv_stage &at, const vd_band &band, int x, int kappa0, int &i, int end,
                        const vd_frag_a<T> values[VD_LEFTS], float dk[VD_SUMS][4], float dv[VD_SUMS][4], float sum[2]) {
  for (; i < end; i++) {
    float dp[8][4];
    vd_frag_a<T> weight[4], gradient[4];
    open_stage(m, at);
    vd_wgmma_fence();
    vd_tile_product_rs<T, VD_K_MAJOR>(dp, values, m->dout[at.slot], false);
    vd_wgmma_commit();
#pragma unroll
    for (int k = 0; k < 4; k++)
      vd_load_a_trans<T, 64>(weight[k], m->stored[at.slot][x], 16 * k, 16 * ((int)(threadIdx.x >> 5) & 3));
    vd_wgmma_wait<0>();
    vd_wgmma_fence_operand<8>(dp);
    const int i0 = i * VD_TILE;
    if (!TRIM || i0 + VD_TILE - 1 - kappa0 <= band.full) {
      score_gradients<T, false>(band, i0, kappa0, m->delta[at.slot], dp, weight, gradient, sum);
    } else {
      score_gradients<T, true>(band, i0, kappa0, m->delta[at.slot], dp, weight, gradient, sum);
    }
    vd_wgmma_fence();
    vd_tile_product_rs<T, VD_MN_MAJOR>(dv, weight, m->dout[at.slot], true);
    vd_tile_product_rs<T, VD_MN_MAJOR>(dk, gradient, m->q[at.slot], true);
    vd_wgmma_commit();
    vd_wgmma_wait<0>();
    vd_wgmma_fence_operand<VD_SUMS>(dv), vd_wgmma_fence_operand<VD_SUMS>(dk);
    close_stage(m, at);
  }
}
/* The same for far tiles. */
template <typename T>
VD_DEV void far_stages(dkv_smem<T> *m, dkv_stage &at, int x, int &i, int end, float dk[VD_SUMS][4]) {
  for (; i < end; i++) {
    open_stage(m, at);
    vd_wgmma_fence();
    vd_tile_product<T, VD_MN_MAJOR>(dk, m->stored[at.slot][x], m->q[at.slot], true);
    vd_wgmma_commit();
    vd_wgmma_wait<0>();
    vd_wgmma_fence_operand<VD_SUMS>(dk);
    close_stage(m, at);
  }
}

/* Consumer warpgroup x: key tile x of each item. */
template <typename T, bool REL, bool TRIM>
VD_DEV void dkv_consumer(const vd_cuda_attention &a, const dkv_task &task, dkv_smem<T> *m, int x) {
  const vd_tile_schedule *schedule = (const vd_tile_schedule *)a.schedule;
  const int n_item = dkv_items<REL>(a, schedule);
  dkv_stage at = {0, 0};
  for (int k = 0; item_of(n_item, k) >= 0; k++) {
    open_stage(m, at);
    const dkv_work w = m->work[k / BATCH & 1][k % BATCH];
    const vd_band band = vd_band_of<REL>(a, schedule, w.head);
    const int tile = w.tile + x, kappa0 = tile * VD_TILE, first = x < w.n_key ? max(tile, 0) : w.end;
    const int end = x < w.n_key ? min(w.end, tile + w.distances) : w.end;
    const int far = TRIM ? max(min(end, tile + w.near_distances), first) : end;
    T *place = m->values[k & 1][x];
    float dk[VD_SUMS][4], dv[VD_SUMS][4], sum[2] = {0, 0};
    vd_frag_a<T> values[VD_LEFTS];
    load_values<T>(place, kappa0, w.lowest_value, a.d_head, values);
    vd_clear_sums(dk), vd_clear_sums(dv);
    int i = w.first;
    for (; i < first; i++) open_stage(m, at), close_stage(m, at);
    near_stages<T, TRIM>(m, at, band, x, kappa0, i, far, values, dk, dv, sum);
    if constexpr (TRIM) far_stages<T>(m, at, x, i, end, dk);
    if (REL && a.content_bias) add_content_bias(a.content_bias + w.head * a.d_head, a.d_head, sum, dk);
    for (; i < w.end; i++) open_stage(m, at), close_stage(m, at);
    vd_consumer_sync(x); /* all warps have read the values */
    if (x < w.n_key) {
      const vd_kv_view<T> to = vd_kv_view_of(a, (T *)task.dblock, (T *)task.dmemory, w.head, w.stream);
      write_keys(to.at(kappa0, VD_KEY), place, kappa0, vd_lowest<REL>(band), a.block, a.d_head, dk,
                 rsqrtf((float)a.d_head));
      write_keys(to.at(kappa0, VD_VALUE), place, kappa0, w.lowest_value, a.block, a.d_head, dv, 1);
    }
    vd_fence_proxy_async(); /* the next copies to `place` are by the async proxy */
    __syncwarp();
    vd_mbarrier_arrive_warp(&m->values_empty[k & 1]);
  }
}

template <typename T, bool REL, bool TRIM>
__global__ void __launch_bounds__(DKV_THREADS, 1)
    dkv_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ dkv_task task) {
  extern __shared__ __align__(1024) unsigned char smem[];
  dkv_smem<T> *m = (dkv_smem<T> *)smem;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      vd_mbarrier_init(&m->full[i], 33); /* the lanes of the producer, and the first one again */
      vd_mbarrier_init(&m->empty[i], CONSUMERS * VD_WARPGROUP / 32);
    }
    for (int i = 0; i < 2; i++) vd_mbarrier_init(&m->values_empty[i], CONSUMERS * VD_WARPGROUP / 32);
    vd_mbarrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(0xffffffffU, (int)threadIdx.x / VD_WARPGROUP, 0);
  if (warpgroup == CONSUMERS) {
    vd_setmaxnreg_dec<40, true>();
    if (threadIdx.x < CONSUMERS * VD_WARPGROUP + 32) dkv_producer<T, REL, TRIM>(a, task, m);
  } else {
    vd_setmaxnreg_inc<232, true>();
    dkv_consumer<T, REL, TRIM>(a, task, m, warpgroup);
  }
}

template <typename T>
cudaError_t launch_dkv(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                       cudaStream_t stream) {
  constexpr bool REL = VD_HEAD_WIDTH == 64;
  const int64_t width = (int64_t)a->n_head * a->d_head;
  dkv_task task = {};
  task.stored = ws->stored, task.delta = ws->delta, task.dblock = g->dblock, task.dmemory = g->dmemory;
  cudaError_t e = vd_make_stream_map(&task.block, g->block, a->n_stream, a->block, 3 * width);
  if (e == cudaSuccess) e = vd_make_stream_map(&task.dout, g->dout, a->n_stream, a->block, width);
  if (e == cudaSuccess && a->window > 0)
    e = vd_make_stream_map(&task.memory, g->memory, a->n_stream, a->kv_rows, 2 * width);
  if (e != cudaSuccess) return e;
  auto kernel = a->rel_key   ? dkv_wgmma_kernel<T, REL, false>
                : a->trimmed ? dkv_wgmma_kernel<T, false, true>
                             : dkv_wgmma_kernel<T, false, false>;
  cudaLaunchAttribute early = vd_pdl_attribute();
  return vd_launch_persistent(kernel, DKV_THREADS, (int)sizeof(dkv_smem<T>), stream, &early, 1, *a, task);
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
