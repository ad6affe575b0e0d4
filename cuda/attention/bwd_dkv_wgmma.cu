/* Backward pass by keys of 16-bit types and heads up to 64 wide: as bwd_dkv_mma.cu, but a block's four warps multiply
 * as a group. Position scores, with distances as rows, change rows from warp to warp: they go through shared memory. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/pipeline.cuh"

/* Position scores of a query tile: row 64 + e - e0 for e0 - 64 .. e0 + 63, e0 that of the tiles' first key and query.
 */
enum { VD_EXCHANGE = 72 };

/* Query tiles of a block are counted through its items: tile c has queries, dout, `rows` and `kept` in place c & 1, and
 * the blocks c and c + 1 of the table in places c % 3 and (c + 1) % 3. Item i has keys and values in place i & 1. */
template <typename T> struct vd_key_memory {
  T k[2][VD_TILE * VD_WIDTH], v[2][VD_TILE * VD_WIDTH], q[2][VD_TILE * VD_WIDTH], dout[2][VD_TILE * VD_WIDTH];
  T table[3][VD_TILE * VD_WIDTH];
  __half exchange[2 * VD_TILE * VD_EXCHANGE];
  float rows[2][2][VD_TILE];    /* of a query tile: lse, delta */
  float begin[3][VD_TILE];      /* what scores with the table's rows begin with */
  uint32_t kept[2][VD_THREADS]; /* of a query tile, for each thread of the first group */
  int next[2];
};

static_assert(2 * (sizeof(vd_key_memory<__half>) + 1024) <= 228 * 1024, "two blocks for a multiprocessor");

/* A warp's 16 keys over the query tiles. */
struct vd_key_state {
  float dk[8][4], dv[8][4];
};

/* As vd_begin_scores, with position keys as rows. */
template <bool REL> VD_DEV void vd_begin_rows(float c[8][4], const float *score) {
  if constexpr (REL) {
    int row = 16 * (int)(threadIdx.x >> 5) + (int)((threadIdx.x & 31) >> 2);
    float x = score[row], y = score[row + 8];
#pragma unroll
    for (int i = 0; i < 32; i++) c[i >> 2][i & 3] = i & 2 ? y : x;
  }
}
/* Stores a block of 64 distances, from row `block_row` on, in half precision as vd_write_ring(). */
VD_DEV void vd_write_exchange(__half *exchange, int block_row, const float c[8][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  __half *to = exchange + (block_row + 16 * (int)(threadIdx.x >> 5) + g) * VD_EXCHANGE + 2 * t;
#pragma unroll
  for (int i = 0; i < 16; i++)
    *(uint32_t *)(to + (i & 1) * 8 * VD_EXCHANGE + 8 * (i >> 1)) =
        vd_half_pair(c[i >> 1][2 * (i & 1)], c[i >> 1][2 * (i & 1) + 1]);
}
/* s += position scores of this warp's keys and of the 16 queries from column 16 j on. */
VD_DEV void vd_add_exchange(float s[2][4], const __half *exchange, int j) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const __half *from = exchange + (64 + 16 * (int)(threadIdx.x >> 5) + g) * VD_EXCHANGE - 2 * t * (VD_EXCHANGE - 1);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, ih = i >> 1 & 1, jj = i & 1;
    s[jn][2 * ih + jj] += __half2float(from[ih * 8 * VD_EXCHANGE - (16 * j + 8 * jn + jj) * (VD_EXCHANGE - 1)]);
  }
}

/* Which elements of a lane (keys as rows) are kept, for 64 queries: element (jn, k) of the sub-tile j is bit
 * vd_kept_bit(j, jn, k). words: those of this lane for 16 queries each, of which this warp's keys are a sub-tile. */
VD_DEV uint32_t vd_turn_kept(const uint32_t words[4]) {
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
VD_DEV void vd_key_gradient(const vd_cuda_attention &a, const vd_band &band, float scale, const float *rows, int i0,
                            int kappa0, uint32_t kept, int j, float factor, float s[2][4], float ds[2][4]) {
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
      bool keep = !DROP || (kept >> vd_kept_bit(j, jn, e) & 1);
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
VD_DEV void vd_key_products(vd_key_memory<T> *m, int i, int c, bool near_alone, float s[8][4], float ds[8][4]) {
  float near_[8][4], far[8][4];
  const int near_slot = c % 3, far_slot = near_alone ? near_slot : (c + 1) % 3;
  vd_begin_rows<REL>(near_, m->begin[near_slot]), vd_begin_rows<REL>(far, m->begin[far_slot]);
  vd_wgmma_begin();
  vd_start_product<T, VD_BY_COLUMNS, VD_BY_COLUMNS>(near_, m->table[near_slot], m->q[c & 1], REL);
  vd_wgmma_commit();
  vd_start_product<T, VD_BY_COLUMNS, VD_BY_COLUMNS>(far, m->table[far_slot], m->q[c & 1], REL);
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_done<8>(near_);
  vd_write_exchange(m->exchange, 64, near_);
  vd_wgmma_begin();
  vd_start_product<T, VD_BY_COLUMNS, VD_BY_COLUMNS>(s, m->k[i & 1], m->q[c & 1], false);
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_done<8>(far);
  vd_write_exchange(m->exchange, 0, far);
  vd_wgmma_begin();
  vd_start_product<T, VD_BY_COLUMNS, VD_BY_COLUMNS>(ds, m->v[i & 1], m->dout[c & 1], false);
  vd_wgmma_commit();
}

/* A work item by keys: query tiles from `first` on. Query tile t needs blocks t (nearer keys) and t + 1 of the table.
 */
typedef struct vd_key_work {
  vd_item it;
  vd_band band;
  int kappa0, first, n;
} vd_key_work;
template <bool REL> VD_DEV vd_key_work vd_key_work_of(const vd_cuda_attention &a, const vd_plan *plan, int item) {
  vd_key_work w;
  w.it = vd_key_item<REL>(a, plan, item);
  w.band = vd_band_of<REL>(a, plan, w.it.head);
  w.kappa0 = w.it.tile * VD_TILE, w.first = max(w.kappa0, 0);
  w.n = min(a.block - 1, w.kappa0 + VD_TILE - 1 + w.band.reach) / VD_TILE - w.first / VD_TILE + 1;
  return w;
}
/* Whether the item ends with its reach, not with the block: the last query tile then sees nothing of its far block. */
VD_DEV bool vd_ends_near(const vd_key_work &w) {
  return w.first + (w.n - 1) * VD_TILE - w.kappa0 >= w.band.reach;
}
template <bool REL> VD_DEV int vd_key_items(const vd_cuda_attention &a, const vd_plan *plan) {
  return REL ? a.n_stream * a.n_head * (vd_far_tiles(a) + vd_ceil_div(a.block, VD_TILE)) : plan->key_first[a.n_head];
}

/* The i-th item's t-th query tile, the block's c-th, for this warp's keys. */
template <typename T, bool DROP, bool REL>
VD_DEV void vd_key_tile(const vd_cuda_attention &a, const vd_key_work &work, float scale, vd_key_memory<T> *m,
                        vd_key_state &w, int i, int t, int c, bool near_alone, uint32_t kept, float factor) {
  float s[8][4], ds[8][4];
  const int kw = work.kappa0 + 16 * (int)(threadIdx.x >> 5);
  vd_frag_a<T> weight[4], gradient[4];
  vd_key_products<T, REL>(m, i, c, near_alone, s, ds);
  vd_sync_group();
  vd_wgmma_wait<0>();
  vd_wgmma_done<8>(s), vd_wgmma_done<8>(ds);
  const int i0 = work.first + t * VD_TILE;
  const float *rows = m->rows[c & 1][0];
  if (vd_all_full<false>(work.band, i0 - kw, kw) && vd_all_full<false>(work.band, i0 - kw + 48, kw) &&
      i0 + VD_TILE <= a.block) {
#pragma unroll
    for (int j = 0; j < 4; j++) vd_add_exchange(s + 2 * j, m->exchange, j);
#pragma unroll
    for (int j = 0; j < 4; j++)
      vd_key_gradient<true, DROP, REL>(a, work.band, scale, rows, i0, kw, kept, j, factor, s + 2 * j, ds + 2 * j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int iq = i0 + 16 * j;
      if (vd_any_seen<false>(work.band, iq - kw, kw) && iq < a.block) {
        vd_add_exchange(s + 2 * j, m->exchange, j);
        vd_key_gradient<false, DROP, REL>(a, work.band, scale, rows, i0, kw, kept, j, factor, s + 2 * j, ds + 2 * j);
      } else {
        vd_clear(s + 2 * j), vd_clear(ds + 2 * j);
      }
    }
  }
  vd_hold(weight, s), vd_hold(gradient, ds);
  vd_wgmma_begin();
  vd_start_held<T, VD_BY_ROWS>(w.dv, weight, m->dout[c & 1], true);
  vd_start_held<T, VD_BY_ROWS>(w.dk, gradient, m->q[c & 1], true);
  vd_wgmma_commit();
  vd_wgmma_wait<0>();
  vd_wgmma_done<8>(w.dv), vd_wgmma_done<8>(w.dk);
}

/* What the kernel is told besides the shapes. */
typedef struct vd_key_task {
  vd_cuda_attention_gradient g;
  const void *query; /* of the room */
  const float *delta;
  const uint32_t *kept;
  vd_drop drop;
} vd_key_task;

/* The first group. */
template <typename T, bool DROP, bool REL>
VD_DEV void vd_key_multiply(const vd_cuda_attention &a, const vd_key_task &task, vd_key_memory<T> *m) {
  vd_plan *plan = (vd_plan *)a.plan;
  const int n_item = vd_key_items<REL>(a, plan);
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f;
  int item = (int)blockIdx.x, c = 0;
  for (int i = 0; item < n_item; i++) {
    const vd_key_work work = vd_key_work_of<REL>(a, plan, item);
    const bool ends_near = vd_ends_near(work);
    const int lowest = vd_lowest<REL>(work.band), kw = work.kappa0 + 16 * (int)(threadIdx.x >> 5);
    vd_key_state w;
    vd_clear_sums(w.dk), vd_clear_sums(w.dv);
    for (int t = 0; t < work.n; t++, c++) {
      const bool near_alone = t + 1 == work.n && ends_near, all = t + 1 == work.n && !ends_near;
      vd_barrier_wait<VD_BARRIER_THERE>();
      const uint32_t kept = DROP ? m->kept[c & 1][threadIdx.x] : 0;
      if (!all) vd_barrier_arrive<VD_BARRIER_NEXT>();
      vd_key_tile<T, DROP, REL>(a, work, task.drop.scale, m, w, i, t, c, near_alone, kept, factor);
      if (all) vd_barrier_arrive<VD_BARRIER_NEXT>(); /* the next item's block 0 comes in place of the far one */
    }
    item = vd_next_item(&m->next[i & 1]);
    const float scales[2] = {scale, scale}, dropped[2] = {task.drop.scale, task.drop.scale};
    const vd_key_lines<T> to = vd_keys_of(a, (T *)task.g.dblock, (T *)task.g.dmemory, work.it.head, work.it.stream);
    const vd_lines<T> keys = to.at(work.kappa0, VD_KEY), values = to.at(work.kappa0, VD_VALUE);
    vd_write_rows<T, VD_WIDTH>(keys.row0, keys.stride, kw, lowest, a.block, a.d_head, w.dk, scales);
    vd_write_rows<T, VD_WIDTH>(values.row0, values.stride, kw, lowest, a.block, a.d_head, w.dv, dropped);
  }
  vd_no_more_work(plan, VD_WORK_KEY);
}

/* The second group. */
template <typename T, bool DROP, bool REL>
VD_DEV void vd_key_bring(const vd_cuda_attention &a, const vd_key_task &task, vd_key_memory<T> *m) {
  vd_plan *plan = (vd_plan *)a.plan;
  const vd_cuda_attention_gradient &g = task.g;
  const int n_item = vd_key_items<REL>(a, plan), thread = (int)threadIdx.x - VD_THREADS;
  int item = (int)blockIdx.x, c = 0;
  for (int i = 0; item < n_item; i++) {
    const int asked = vd_ask_item(plan, VD_WORK_KEY);
    const vd_key_work work = vd_key_work_of<REL>(a, plan, item);
    const vd_positions<T> positions = vd_positions_of<REL, T>(a, g.table, work.it.head);
    const vd_lines<const T> queries = vd_queries<T, REL>(a, g, task.query, work.it.head, work.it.stream);
    const vd_lines<const T> douts = vd_plain_lines(a, (const T *)g.dout, work.it.head, work.it.stream);
    const int lowest = vd_lowest<REL>(work.band), n = work.n;
    const float *rows =
        (thread < VD_TILE ? g.lse : task.delta) + ((int64_t)work.it.stream * a.n_head + work.it.head) * a.block;
    auto copy_table = [&](int y, int slot) {
      vd_copy_positions<T, VD_WIDTH, REL>(m->table[slot], m->begin[slot], positions,
                                          work.kappa0 - work.first - y * VD_TILE, a.d_head);
    };
    const bool ends_near = vd_ends_near(work);
    const uint32_t *kept = nullptr; /* of the next query tile */
    uint32_t words[4] = {0, 0, 0, 0};
    if (DROP) {
      int tile = work.first / VD_TILE;
      kept = vd_kept_of(a, task.kept, work.it.stream, work.it.head, tile, tile - work.it.tile) + (thread & 31);
    }
    auto read_kept = [&]() {
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = kept[32 * j];
      kept += (vd_most_tiles(a) + 1) * VD_THREADS;
    };
    if (DROP) read_kept();
    for (int t = 0; t < n; t++, c++) {
      int i0 = work.first + t * VD_TILE, row = i0 + (thread & (VD_TILE - 1));
      if (c > 0) vd_barrier_wait<VD_BARRIER_NEXT>();
      if (t == 0) {
        const vd_key_lines<const T> memories =
            vd_keys_of(a, (const T *)g.block, (const T *)g.memory, work.it.head, work.it.stream);
        const vd_lines<const T> keys = memories.at(work.kappa0, VD_KEY), values = memories.at(work.kappa0, VD_VALUE);
        vd_copy_tile<T, VD_WIDTH>(m->k[i & 1], keys.row0, keys.stride, work.kappa0, lowest, a.block, a.d_head);
        vd_copy_tile<T, VD_WIDTH>(m->v[i & 1], values.row0, values.stride, work.kappa0, lowest, a.block, a.d_head);
        copy_table(0, c % 3);
      }
      vd_copy_tile<T, VD_WIDTH>(m->q[c & 1], queries.row0, queries.stride, i0, 0, a.block, a.d_head);
      vd_copy_tile<T, VD_WIDTH>(m->dout[c & 1], douts.row0, douts.stride, i0, 0, a.block, a.d_head);
      vd_copy4(m->rows[c & 1][0] + thread, row < a.block ? rows + row : rows, row < a.block);
      if (t + 1 < n || !ends_near) copy_table(t + 1, (c + 1) % 3);
      vd_copy_commit();
      if (DROP) m->kept[c & 1][thread] = vd_turn_kept(words);
      if (DROP && t + 1 < n) read_kept();
      if (t + 1 == n) vd_say_item(asked, &m->next[i & 1]);
      vd_copy_wait();
      vd_show_to_products();
      vd_barrier_arrive<VD_BARRIER_THERE>();
    }
    vd_sync_bring();
    item = vd_next_item(&m->next[i & 1]);
  }
  if (c > 0) vd_barrier_wait<VD_BARRIER_NEXT>();
}

template <typename T, bool DROP, bool REL>
__global__ void __launch_bounds__(VD_GROUPS, 2)
    vd_key_group_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_key_task task) {
  extern __shared__ __align__(1024) unsigned char memory[];
  vd_key_memory<T> *m = (vd_key_memory<T> *)memory;
  if (threadIdx.x < VD_THREADS) {
    vd_many_registers<200>();
    vd_key_multiply<T, DROP, REL>(a, task, m);
  } else {
    vd_few_registers<56>();
    vd_key_bring<T, DROP, REL>(a, task, m);
  }
}

template <typename T>
static cudaError_t vd_launch(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                             const vd_backward_room *room, cudaStream_t stream) {
  int blocks, shared = (int)sizeof(vd_key_memory<T>);
  const vd_key_task task = {*g, room->query, room->delta, room->kept, vd_make_drop(a)};
  auto kernel = task.drop.threshold ? vd_key_group_kernel<T, true, false> : vd_key_group_kernel<T, false, false>;
  if (a->rel_key)
    kernel = task.drop.threshold ? vd_key_group_kernel<T, true, true> : vd_key_group_kernel<T, false, true>;
  cudaError_t e = vd_fill_device((const void *)kernel, shared, &blocks, VD_GROUPS);
  if (e != cudaSuccess) return e;
  kernel<<<blocks, VD_GROUPS, shared, stream>>>(*a, task);
  return cudaGetLastError();
}

cudaError_t vd_group_by_key(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_room *room, cudaStream_t stream) {
  return a->type == VD_BF16 ? vd_launch<__nv_bfloat16>(a, g, room, stream) : vd_launch<__half>(a, g, room, stream);
}
