/* Backward pass by keys of 16-bit types and heads up to 64 wide: as bwd_dkv_mma.cu, but a block's four warps multiply
 * as a group. Position scores, with distances as rows, change rows from warp to warp: they go through shared memory. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/pipeline.cuh"

namespace {

/* Position scores of a query tile: row 64 + e - e0 for e0 - 64 .. e0 + 63, e0 that of the tiles' first key and query.
 */
enum { EXCHANGE_STRIDE = 72 };

/* Query tiles of a block are counted through its items: tile c has queries, dout, `rows` and `kept` in place c & 1, and
 * the blocks c and c + 1 of the table in places c % 3 and (c + 1) % 3. Item i has keys and values in place i & 1. */
template <typename T> struct dkv_smem {
  T k[2][VD_TILE * VD_HEAD_WIDTH], v[2][VD_TILE * VD_HEAD_WIDTH], q[2][VD_TILE * VD_HEAD_WIDTH],
      dout[2][VD_TILE * VD_HEAD_WIDTH];
  T table[3][VD_TILE * VD_HEAD_WIDTH];
  __half exchange[2 * VD_TILE * EXCHANGE_STRIDE];
  float rows[2][2][VD_TILE];              /* of a query tile: lse, delta */
  float bias_scores[3][VD_TILE];          /* what scores with the table's rows begin with */
  uint32_t dropout_mask[2][VD_WARPGROUP]; /* of a query tile, for each thread of the first group */
  int next[2];
};

static_assert(2 * (sizeof(dkv_smem<__half>) + 1024) <= 228 * 1024, "two blocks for a multiprocessor");

/* A warp's 16 keys over the query tiles. */
struct dkv_state {
  float dk[8][4], dv[8][4];
};

/* As vd_init_position_scores, with position keys as rows. */
template <bool REL> VD_DEV void init_position_rows(float c[8][4], const float *score) {
  if constexpr (REL) {
    int row = 16 * (int)(threadIdx.x >> 5) + (int)((threadIdx.x & 31) >> 2);
    float x = score[row], y = score[row + 8];
#pragma unroll
    for (int i = 0; i < 32; i++) c[i >> 2][i & 3] = i & 2 ? y : x;
  }
}
/* Stores a block of 64 distances, from row `block_row` on, in half precision as vd_write_ring(). */
VD_DEV void write_exchange(__half *exchange, int block_row, const float c[8][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  __half *to = exchange + (block_row + 16 * (int)(threadIdx.x >> 5) + g) * EXCHANGE_STRIDE + 2 * t;
#pragma unroll
  for (int i = 0; i < 16; i++)
    *(uint32_t *)(to + (i & 1) * 8 * EXCHANGE_STRIDE + 8 * (i >> 1)) =
        vd_half_pair(c[i >> 1][2 * (i & 1)], c[i >> 1][2 * (i & 1) + 1]);
}
/* s += position scores of this warp's keys and of the 16 queries from column 16 j on. */
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

/* Which elements of a lane (keys as rows) are kept, for 64 queries: element (jn, k) of the sub-tile j is bit
 * vd_mask_bit(j, jn, k). words: those of this lane for 16 queries each, of which this warp's keys are a sub-tile. */
VD_DEV uint32_t transpose_mask(const uint32_t words[4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, sub_tile = (int)(threadIdx.x >> 5) & 3;
  uint32_t x = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) x |= ((words[j] << (2 * sub_tile)) & 0xc0c0c0c0U) >> (2 * j);
  /* Halves of queries and of keys change places. Then lane 4 g' + t' has queries g' and g' + 8, keys 2 t' + jj: here
   * keys g and queries 2 t + jj are wanted. */
  x = (x & 0x5555aaaaU) | (x & 0x00005555U) << 17 | (x & 0xaaaa0000U) >> 17;
  uint32_t even = __shfl_sync(0xffffffffU, x, 8 * t + (g >> 1)),
           odd = __shfl_sync(0xffffffffU, x, 8 * t + 4 + (g >> 1));
  if (g & 1) even >>= 8, odd >>= 8;
  return (even & 0x00ff00ffU) | (odd & 0x00ff00ffU) << 8;
}

/* The sub-tile j of this warp's keys and of 64 queries from i0 on: scores become weights as values have them, gradients
 * of weights become those of scores. rows: lse of the queries; delta is 64 further on. */
template <bool FULL, bool DROP, bool REL>
VD_DEV void score_gradients(const vd_cuda_attention &a, const vd_band &band, float scale, const float *rows, int i0,
                            int kappa0, uint32_t dropout_mask, int j, float factor, float s[2][4], float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float unused = 0;
  rows += 16 * j, i0 += 16 * j;
  vd_masks m = vd_masks_of(band, i0 + 2 * t - kappa0 - g);
#pragma unroll
  for (int jn = 0; jn < 2; jn++) {
    float2 lse = *(const float2 *)(rows + 8 * jn + 2 * t), delta = *(const float2 *)(rows + VD_TILE + 8 * jn + 2 * t);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int nearer = 8 * (e >> 1) - 8 * jn - (e & 1);
      bool keep = !DROP || (dropout_mask >> vd_mask_bit(j, jn, e) & 1);
      float own = (e & 1) ? delta.y : delta.x, weight;
      float score = fmaf(s[jn][e], factor, -1.44269504088896341f * ((e & 1) ? lse.y : lse.x));
      /* Keys that do not exist have rows of their own here, which are not written. */
      if (!FULL && (i0 + 8 * jn + 2 * t + (e & 1) >= a.block || (REL && !vd_masks_seen(m, nearer)))) score = -INFINITY;
      if constexpr (FULL || REL) {
        weight = vd_exp2(score);
        ds[jn][e] = weight * (keep ? fmaf(ds[jn][e], scale, -own) : -own);
      } else {
        ds[jn][e] =
            vd_masked_gradient(m, a.trimmed, nearer, score, keep ? ds[jn][e] * scale : 0, own, &weight, &unused);
      }
      s[jn][e] = keep ? weight : 0;
    }
  }
}

/* Starts scores and gradients of weights of the i-th item's query tile c, whose copies are there; brings position
 * scores to their keys. Where `near_alone`, what stands in for the far block is masked. */
template <typename T, bool REL>
VD_DEV void start_products(dkv_smem<T> *m, int i, int c, bool near_alone, float s[8][4], float ds[8][4]) {
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
  vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(s, m->k[i & 1], m->q[c & 1], false);
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_fence_operand<8>(far);
  write_exchange(m->exchange, 0, far);
  vd_wgmma_fence();
  vd_tile_product<T, VD_K_MAJOR, VD_K_MAJOR>(ds, m->v[i & 1], m->dout[c & 1], false);
  vd_wgmma_commit();
}

/* A work item by keys: query tiles from `first` on. Query tile t needs blocks t (nearer keys) and t + 1 of the table.
 */
typedef struct dkv_work {
  vd_work_tile at;
  vd_band band;
  int kappa0, first, n;
} dkv_work;
template <bool REL>
VD_DEV dkv_work dkv_work_at(const vd_cuda_attention &a, const vd_tile_schedule *schedule, int tile_id) {
  dkv_work w;
  w.at = vd_key_tile_at<REL>(a, schedule, tile_id);
  w.band = vd_band_of<REL>(a, schedule, w.at.head);
  w.kappa0 = w.at.tile * VD_TILE, w.first = max(w.kappa0, 0);
  w.n = min(a.block - 1, w.kappa0 + VD_TILE - 1 + w.band.reach) / VD_TILE - w.first / VD_TILE + 1;
  return w;
}
/* Whether the item ends with its reach, not with the block: the last query tile then sees nothing of its far block. */
VD_DEV bool ends_near_block(const dkv_work &w) {
  return w.first + (w.n - 1) * VD_TILE - w.kappa0 >= w.band.reach;
}
template <bool REL> VD_DEV int dkv_tiles(const vd_cuda_attention &a, const vd_tile_schedule *schedule) {
  return REL ? a.n_stream * a.n_head * (vd_far_tiles(a) + vd_ceil_div(a.block, VD_TILE))
             : schedule->dkv_first[a.n_head];
}

/* The i-th item's t-th query tile, the block's c-th, for this warp's keys. */
template <typename T, bool DROP, bool REL>
VD_DEV void dkv_tile(const vd_cuda_attention &a, const dkv_work &work, float scale, dkv_smem<T> *m, dkv_state &w, int i,
                     int t, int c, bool near_alone, uint32_t dropout_mask, float factor) {
  float s[8][4], ds[8][4];
  const int kw = work.kappa0 + 16 * (int)(threadIdx.x >> 5);
  vd_frag_a<T> weight[4], gradient[4];
  start_products<T, REL>(m, i, c, near_alone, s, ds);
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
      score_gradients<true, DROP, REL>(a, work.band, scale, rows, i0, kw, dropout_mask, j, factor, s + 2 * j,
                                       ds + 2 * j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int iq = i0 + 16 * j;
      if (vd_any_seen<false>(work.band, iq - kw, kw) && iq < a.block) {
        add_exchange(s + 2 * j, m->exchange, j);
        score_gradients<false, DROP, REL>(a, work.band, scale, rows, i0, kw, dropout_mask, j, factor, s + 2 * j,
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
  vd_wgmma_fence_operand<8>(w.dv), vd_wgmma_fence_operand<8>(w.dk);
}

/* What the kernel is told besides the shapes. */
typedef struct dkv_task {
  vd_cuda_attention_gradient g;
  const void *query; /* of the room */
  const float *delta;
  const uint32_t *dropout_mask;
  vd_dropout_draws drop;
} dkv_task;

/* The first group. */
template <typename T, bool DROP, bool REL>
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
    vd_clear_sums(w.dk), vd_clear_sums(w.dv);
    for (int t = 0; t < work.n; t++, c++) {
      const bool near_alone = t + 1 == work.n && ends_near, all = t + 1 == work.n && !ends_near;
      vd_barrier_sync<VD_TILE_FULL>();
      const uint32_t dropout_mask = DROP ? m->dropout_mask[c & 1][threadIdx.x] : 0;
      if (!all) vd_barrier_arrive<VD_TILE_EMPTY>();
      dkv_tile<T, DROP, REL>(a, work, task.drop.scale, m, w, i, t, c, near_alone, dropout_mask, factor);
      if (all) vd_barrier_arrive<VD_TILE_EMPTY>(); /* the next item's block 0 comes in place of the far one */
    }
    tile_id = vd_announced_tile(&m->next[i & 1]);
    const float scales[2] = {scale, scale}, dropped[2] = {task.drop.scale, task.drop.scale};
    const vd_kv_view<T> to = vd_kv_view_of(a, (T *)task.g.dblock, (T *)task.g.dmemory, work.at.head, work.at.stream);
    const vd_row_view<T> keys = to.at(work.kappa0, VD_KEY), values = to.at(work.kappa0, VD_VALUE);
    vd_write_rows<T, VD_HEAD_WIDTH>(keys.row0, keys.stride, kw, lowest, a.block, a.d_head, w.dk, scales);
    vd_write_rows<T, VD_HEAD_WIDTH>(values.row0, values.stride, kw, lowest, a.block, a.d_head, w.dv, dropped);
  }
  vd_finish_work(schedule, VD_WORK_DKV);
}

/* The second group. */
template <typename T, bool DROP, bool REL>
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
    const int lowest = vd_lowest<REL>(work.band), n = work.n;
    const float *rows =
        (thread < VD_TILE ? g.lse : task.delta) + ((int64_t)work.at.stream * a.n_head + work.at.head) * a.block;
    auto copy_table = [&](int y, int slot) {
      vd_copy_position_keys<T, VD_HEAD_WIDTH, REL>(m->table[slot], m->bias_scores[slot], positions,
                                                   work.kappa0 - work.first - y * VD_TILE, a.d_head);
    };
    const bool ends_near = ends_near_block(work);
    const uint32_t *dropout_mask = nullptr; /* of the next query tile */
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
    if (DROP) read_kept();
    for (int t = 0; t < n; t++, c++) {
      int i0 = work.first + t * VD_TILE, row = i0 + (thread & (VD_TILE - 1));
      if (c > 0) vd_barrier_sync<VD_TILE_EMPTY>();
      if (t == 0) {
        const vd_kv_view<const T> memories =
            vd_kv_view_of(a, (const T *)g.block, (const T *)g.memory, work.at.head, work.at.stream);
        const vd_row_view<const T> keys = memories.at(work.kappa0, VD_KEY), values = memories.at(work.kappa0, VD_VALUE);
        vd_copy_tile<T, VD_HEAD_WIDTH>(m->k[i & 1], keys.row0, keys.stride, work.kappa0, lowest, a.block, a.d_head);
        vd_copy_tile<T, VD_HEAD_WIDTH>(m->v[i & 1], values.row0, values.stride, work.kappa0, lowest, a.block, a.d_head);
        copy_table(0, c % 3);
      }
      vd_copy_tile<T, VD_HEAD_WIDTH>(m->q[c & 1], queries.row0, queries.stride, i0, 0, a.block, a.d_head);
      vd_copy_tile<T, VD_HEAD_WIDTH>(m->dout[c & 1], douts.row0, douts.stride, i0, 0, a.block, a.d_head);
      vd_cp_async4(m->rows[c & 1][0] + thread, row < a.block ? rows + row : rows, row < a.block);
      if (t + 1 < n || !ends_near) copy_table(t + 1, (c + 1) % 3);
      vd_cp_async_commit();
      if (DROP) m->dropout_mask[c & 1][thread] = transpose_mask(words);
      if (DROP && t + 1 < n) read_kept();
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

template <typename T, bool DROP, bool REL>
__global__ void __launch_bounds__(VD_SPECIALIZED_THREADS, 2)
    dkv_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ dkv_task task) {
  extern __shared__ __align__(1024) unsigned char smem[];
  dkv_smem<T> *m = (dkv_smem<T> *)smem;
  if (threadIdx.x < VD_WARPGROUP) {
    vd_setmaxnreg_inc<200>();
    dkv_consumer<T, DROP, REL>(a, task, m);
  } else {
    vd_setmaxnreg_dec<56>();
    dkv_producer<T, DROP, REL>(a, task, m);
  }
}

template <typename T>
cudaError_t launch_dkv(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, const vd_backward_workspace *ws,
                       cudaStream_t stream) {
  const dkv_task task = {*g, ws->query, ws->delta, ws->dropout_mask, vd_make_dropout_draws(a)};
  auto kernel = vd_variant(a, dkv_wgmma_kernel<T, false, false>, dkv_wgmma_kernel<T, true, false>,
                           dkv_wgmma_kernel<T, false, true>, dkv_wgmma_kernel<T, true, true>);
  return vd_launch_persistent(kernel, VD_SPECIALIZED_THREADS, (int)sizeof(dkv_smem<T>), stream, NULL, 0, *a, task);
}

} // namespace

cudaError_t vd_dkv_wgmma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                         const vd_backward_workspace *ws, cudaStream_t stream) {
  return a->type == VD_BF16 ? launch_dkv<__nv_bfloat16>(a, g, ws, stream) : launch_dkv<__half>(a, g, ws, stream);
}
