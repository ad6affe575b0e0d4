/* Backward pass by queries of 16-bit types and heads up to 64 wide: as bwd_dq_mma.cu, but a block's four warps
 * multiply as a group. The gradients of position scores lie in shared memory as one tile for each 64-wide block of e,
 * which is whole when two key tiles have been seen, and then serves both the queries' and the table's gradient. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/pipeline.cuh"
#include "cuda/kernels/pdl.cuh"

/* Key tiles of a block are counted through its items: tile c has keys, values and `kept` in place c & 1, and the block
 * of e that it ends with is number c + 1, in place (c + 1) & 1 of `turned` and (c + 1) % 3 of the table. */
template <typename T> struct vd_query_memory {
  T turned[2][VD_TILE * VD_WIDTH]; /* gradients of scores by e */
  T q[2][VD_TILE * VD_WIDTH], k[2][VD_TILE * VD_WIDTH], v[2][VD_TILE * VD_WIDTH], table[3][VD_TILE * VD_WIDTH];
  __half ring[VD_THREADS / 32][16 * VD_RING];
  T ones[8 * VD_WIDTH];
  float begin[3][VD_TILE];      /* what scores with the table's rows begin with */
  uint32_t kept[2][VD_THREADS]; /* of a key tile, for each thread of the first group */
  float sums[4];
  int next[2];
};

static_assert(2 * (sizeof(vd_query_memory<__half>) + 1024) <= 228 * 1024, "two blocks for a multiprocessor");

/* A warp's state over the key tiles. */
template <typename T, bool REL> struct vd_query_state {
  vd_frag_a<T> dout[4];
  float dq[8][4];
  float dq_position[REL ? 8 : 1][4]; /* with relative keys kept apart: its sum is the gradient of v */
  float lse[2], delta[2];            /* of rows g and g + 8; lse in units of log 2 */
  float dspan;
};

/* Gradients of scores in place of those of weights, the sub-tile j of 16 queries from i0 on and 64 keys. */
template <typename T, bool FULL, bool DROP, bool REL>
VD_DEV void vd_query_gradient(const vd_cuda_attention &a, const vd_band &band, float scale, vd_query_state<T, REL> &w,
                              uint32_t kept, int j, int i0, int kappa0, float factor, const float s[2][4],
                              float ds[2][4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  vd_masks m = vd_masks_of(band, i0 - kappa0 - 16 * j + g - 2 * t);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int jn = i >> 2, e = i & 3, nearer = 8 * jn + (e & 1) - 8 * (e >> 1);
    float score = fmaf(s[jn][e], factor, -w.lse[e >> 1]), delta = w.delta[e >> 1], weight;
    const bool keep = !DROP || (kept >> vd_kept_bit(j, jn, e) & 1);
    if (REL && !FULL)
      score = vd_masks_seen(m, nearer) && kappa0 + 16 * j + 8 * jn + 2 * t + (e & 1) >= band.oldest ? score : -INFINITY;
    if constexpr (FULL || REL) {
      ds[jn][e] = vd_exp2(score) * (keep ? fmaf(ds[jn][e], scale, -delta) : -delta);
    } else {
      ds[jn][e] =
          vd_masked_gradient(m, a.trimmed, nearer, score, keep ? ds[jn][e] * scale : 0, delta, &weight, &w.dspan);
    }
  }
}

/* The gradients of this warp's scores with the item's t-th key tile, the block's c-th, whose copies are there, as left
 * operands. Without relative keys the last tile's block of e has no distances above 0 and is not in the table: what
 * stands in for it is masked. */
template <typename T, bool DROP, bool REL>
VD_DEV void vd_query_scores(const vd_cuda_attention &a, float scale, const vd_query_work &work, vd_query_memory<T> *m,
                            vd_query_state<T, REL> &w, const T *q, int t, int c, uint32_t kept, float factor,
                            vd_frag_a<T> gradient[4]) {
  float s[8][4], position[8][4], ds[8][4];
  __half *ring = m->ring[threadIdx.x >> 5];
  const int warp = (int)(threadIdx.x >> 5), unit = 4 * (c + 1) + 7 - warp,
            slot = (REL || t + 1 < work.n ? c + 1 : c) % 3;
  if constexpr (REL) vd_begin_positions(position, m->begin[slot]);
  vd_wgmma_begin();
  vd_start_product<T, VD_BY_COLUMNS, VD_BY_COLUMNS>(position, q, m->table[slot], REL);
  vd_wgmma_commit();
  vd_start_product<T, VD_BY_COLUMNS, VD_BY_COLUMNS>(s, q, m->k[c & 1], false);
  vd_wgmma_commit();
  vd_start_held<T, VD_BY_COLUMNS>(ds, w.dout, m->v[c & 1], false);
  vd_wgmma_commit();
  vd_wgmma_wait<2>();
  vd_wgmma_done<8>(position);
  vd_write_ring(ring, c + 1, position);
  __syncwarp();
  vd_wgmma_wait<0>();
  vd_wgmma_done<8>(s), vd_wgmma_done<8>(ds);
  const int iw = work.i0 + 16 * warp, kappa0 = work.start + t * VD_TILE;
  if (vd_row_full<REL>(work.band, iw, kappa0)) {
#pragma unroll
    for (int j = 0; j < 4; j++) vd_add_ring(s + 2 * j, ring, unit + j);
#pragma unroll
    for (int j = 0; j < 4; j++)
      vd_query_gradient<T, true, DROP, REL>(a, work.band, scale, w, kept, j, iw, kappa0, factor, s + 2 * j, ds + 2 * j);
  } else {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (vd_any_seen<REL>(work.band, iw - kappa0 - 16 * j, kappa0 + 16 * j)) {
        vd_add_ring(s + 2 * j, ring, unit + j);
        vd_query_gradient<T, false, DROP, REL>(a, work.band, scale, w, kept, j, iw, kappa0, factor, s + 2 * j,
                                               ds + 2 * j);
      } else {
        vd_clear(ds + 2 * j);
      }
    }
  }
  vd_hold(gradient, ds);
}

/* Where a pair of columns of the two turned tiles side by side is, in bytes, for row g of a warp's 16: `chunk` counts
 * 16 bytes, modulo those of both tiles. */
VD_DEV int vd_turned_chunk(int chunk, int g) {
  return ((chunk & 7) ^ g) * 16 + (chunk & 8) * (VD_TILE_BYTES / 8);
}
/* Stores gradients of scores by e: element (r, c) belongs to column c - r of block `block`, where that is below 0 to
 * the block before it. Odd rows are shifted by one against pairs of columns, and pair with the lane of the next
 * columns. */
template <typename T>
VD_DEV void vd_write_turned(T turned[2][VD_TILE * VD_WIDTH], int block, const vd_frag_a<T> gradient[4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, odd = g & 1, r = 16 * (int)(threadIdx.x >> 5) + g;
  int first = 64 * (block & 1) + 128 + 2 * t + odd - r; /* the column of this lane's first pair, modulo 128 */
  char *to = (char *)turned[0] + r * 128 + (first & 6) * 2;
#pragma unroll
  for (int n = -1; n < 8; n++) { /* row g + 8 has in its columns 8 (n + 1) what row g has in 8 n */
    char *at = to + vd_turned_chunk((first >> 3) + n, g);
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      int c = n + ih;
      if (c < 0 || c > 7) continue;
      uint32_t mine = gradient[c >> 1].x[2 * (c & 1) + ih];
      uint32_t after = c < 7 ? gradient[(c + 1) >> 1].x[2 * ((c + 1) & 1) + ih] : 0;
      uint32_t got = __shfl_sync(0xffffffffU, t == 0 ? after : mine, (lane & 28) | ((t + 1) & 3));
      if (c == 7 && odd && t == 3) {
        *(uint16_t *)(at + ih * 1024) = (uint16_t)(mine >> 16); /* its neighbour is the next key tile's first */
      } else {
        *(uint32_t *)(at + ih * 1024) = __byte_perm(mine, got, odd ? 0x5432 : 0x3210);
      }
    }
  }
  if (!odd || t > 0) return;
  to = (char *)turned[0] + r * 128 + ((first - 2) & 6) * 2 + 2;
  *(uint16_t *)(to + vd_turned_chunk((first - 2) >> 3, g)) = (uint16_t)gradient[0].x[0];
  *(uint16_t *)(to + 1024 + vd_turned_chunk(((first - 2) >> 3) - 1, g)) = (uint16_t)gradient[0].x[1];
}

/* Column sums of a turned tile: rows g (0, 1) and g + 8 (2, 3) of this warp's 16 distances. */
VD_DEV void vd_start_ones(float c[4], uint64_t a, uint64_t b, bool add, __nv_bfloat16) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, p, 1, 1, 1, 0;\n}"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "l"(a), "l"(b), "r"((int)add));
}
VD_DEV void vd_start_ones(float c[4], uint64_t a, uint64_t b, bool add, __half) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %5, p, 1, 1, 1, 0;\n}"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "l"(a), "l"(b), "r"((int)add));
}

/* Block c of e, whole, which begins with e0: its rows of the table's gradient, and meanwhile dq, the position part from
 * this block and the other from key tile c. With relative keys and LAST it is the block that begins with distance 0,
 * and ends there. */
template <typename T, bool REL, bool LAST>
VD_DEV void vd_add_block(vd_query_memory<T> *m, vd_query_state<T, REL> &w, const vd_position_gradients &p,
                         const vd_frag_a<T> *gradient, const T *q, int c, int e0, float factor) {
  float sum[8][4], rows[4] = {0, 0, 0, 0};
  float(*dq)[4] = REL ? w.dq_position : w.dq;
  const T *turned = m->turned[c & 1], *table = m->table[c % 3];
  vd_wgmma_begin();
  vd_start_product<T, VD_BY_ROWS, VD_BY_ROWS>(sum, turned, q, false);
#pragma unroll
  for (int i = 0; REL && i < 4; i++)
    vd_start_ones(rows, vd_tile_of(turned) + i * VD_BY_ROWS, vd_tile_of(m->ones), i > 0, T());
  vd_wgmma_commit();
  if constexpr (LAST) {
    vd_tile_step<VD_BY_COLUMNS, VD_BY_ROWS>(dq, vd_tile_of(turned), vd_tile_of(table), true, T());
  } else {
    vd_start_held<T, VD_BY_ROWS>(w.dq, gradient, m->k[c & 1], true);
    vd_start_product<T, VD_BY_COLUMNS, VD_BY_ROWS>(dq, turned, table, true);
  }
  vd_wgmma_commit();
  vd_wgmma_wait<1>();
  vd_wgmma_done<8>(sum);
  if constexpr (REL) {
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(rows[i])::"memory");
  }
  e0 += 16 * (int)(threadIdx.x >> 5);
  if (e0 + 15 >= p.lowest && e0 < p.end) vd_add_rows<VD_WIDTH, REL>(p, sum, rows, e0, factor);
  vd_wgmma_wait<0>();
  vd_wgmma_done<8>(w.dq);
  if constexpr (REL) vd_wgmma_done<8>(w.dq_position);
}

/* Where dout comes before an item whose first tile is the block's c-th, in place of what is wanted later: with relative
 * keys, whose items begin when the one before has ended, of a turned tile; else of the table's block 0. */
template <typename T, bool REL> VD_DEV T *vd_query_dout(vd_query_memory<T> *m, int c) {
  return REL ? m->turned[(c + 1) & 1] : m->table[c % 3];
}

/* The start of an item, whose first copies are there: dout to registers; with relative keys, zeros for what the other
 * turned tile has of keys before the first, and scores of the block of e before them. */
template <typename T, bool REL>
VD_DEV void vd_query_start(const vd_cuda_attention &a, const float *lse, const float *delta, vd_item it, int iw,
                           vd_query_memory<T> *m, vd_query_state<T, REL> &w, const T *q, int c) {
  int lane = threadIdx.x & 31;
  int64_t rows = ((int64_t)it.stream * a.n_head + it.head) * a.block;
  for (int i = (int)threadIdx.x; REL && i < VD_TILE_BYTES / 16; i += VD_THREADS)
    ((uint4 *)m->turned[c & 1])[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 4; i++) vd_load_a<T, VD_WIDTH>(w.dout[i], vd_query_dout<T, REL>(m, c), iw & 63, 16 * i);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int i = iw + (lane >> 2) + 8 * ih;
    w.lse[ih] = i < a.block ? lse[rows + i] * 1.44269504088896341f : INFINITY;
    w.delta[ih] = i < a.block ? delta[rows + i] : 0;
  }
  vd_clear_sums(w.dq);
  w.dspan = 0;
  if constexpr (REL) {
    float position[8][4];
    vd_clear_sums(w.dq_position);
    vd_begin_positions(position, m->begin[c % 3]);
    vd_wgmma_begin();
    vd_start_product<T, VD_BY_COLUMNS, VD_BY_COLUMNS>(position, q, m->table[c % 3], true);
    vd_wgmma_commit();
    vd_wgmma_wait<0>();
    vd_wgmma_done<8>(position);
    vd_write_ring(m->ring[threadIdx.x >> 5], c, position);
  }
  vd_sync_group();
}

/* What the kernel is told besides the shapes. */
typedef struct vd_query_task {
  vd_cuda_attention_gradient g;
  vd_backward_room room;
  vd_drop drop;
} vd_query_task;

/* The end of an item whose key tiles are done. */
template <typename T, bool REL>
VD_DEV void vd_query_end(const vd_cuda_attention &a, const vd_query_task &task, const vd_query_work &work, int item,
                         const vd_position_gradients &p, vd_query_memory<T> *m, vd_query_state<T, REL> &w, const T *q,
                         int c, float scale) {
  const float scales[2] = {scale, scale};
  if constexpr (REL) {
    vd_add_block<T, REL, true>(m, w, p, nullptr, q, c, work.first_block + work.n * VD_TILE, scale);
    vd_barrier_arrive<VD_BARRIER_NEXT>();
    vd_store_dbias<VD_WIDTH>(w.dq, w.dq_position, (float *)m->ring[0], scale, a.d_head,
                             task.room.dbias + (int64_t)item * 2 * a.d_head);
#pragma unroll
    for (int i = 0; i < 32; i++) w.dq[i >> 2][i & 3] += w.dq_position[i >> 2][i & 3];
  } else {
    int n_tile = vd_ceil_div(a.block, VD_TILE);
    vd_store_dspan(w.dspan, m->sums,
                   task.room.dspan + ((int64_t)work.it.head * a.n_stream + work.it.stream) * n_tile + work.it.tile);
  }
  const vd_lines<T> to = vd_block_lines(a, (T *)task.g.dblock, VD_QUERY, work.it.head, work.it.stream);
  vd_write_rows<T, VD_WIDTH>(to.row0, to.stride, work.i0 + 16 * (int)(threadIdx.x >> 5), 0, a.block, a.d_head, w.dq,
                             scales);
}

/* The first group. */
template <typename T, bool DROP, bool REL>
VD_DEV void vd_query_multiply(const vd_cuda_attention &a, const vd_query_task &task, vd_query_memory<T> *m) {
  vd_plan *plan = (vd_plan *)a.plan;
  const int n_item = a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE);
  const float scale = rsqrtf((float)a.d_head), factor = scale * 1.44269504088896341f;
  for (int i = (int)threadIdx.x; REL && i < 8 * VD_WIDTH; i += VD_THREADS) m->ones[i] = (T)1.0f;
  int item = (int)blockIdx.x, c = 0;
  for (int i = 0; item < n_item; i++) {
    const vd_query_work work = vd_query_work_of<REL>(a, plan, item);
    const vd_position_gradients p = vd_position_gradients_of<REL>(a, task.g, task.room.dsum, work.it.head, work.band);
    const T *q = m->q[i & 1];
    vd_query_state<T, REL> w;
    for (int t = 0; t < work.n; t++, c++) {
      vd_frag_a<T> gradient[4];
      vd_barrier_wait<VD_BARRIER_THERE>();
      if (t == 0)
        vd_query_start<T, REL>(a, task.g.lse, task.room.delta, work.it, work.i0 + 16 * (int)(threadIdx.x >> 5), m, w, q,
                               c);
      const uint32_t kept = DROP ? m->kept[c & 1][threadIdx.x] : 0;
      if (!REL || t + 1 < work.n) vd_barrier_arrive<VD_BARRIER_NEXT>();
      vd_query_scores<T, DROP, REL>(a, task.drop.scale, work, m, w, q, t, c, kept, factor, gradient);
      vd_write_turned<T>(m->turned, c + 1, gradient);
      vd_show_to_products();
      vd_sync_group();
      if (REL || t > 0) {
        vd_add_block<T, REL, false>(m, w, p, gradient, q, c, work.first_block + t * VD_TILE, scale);
      } else { /* block 0 is beyond the reach, and there is another tile */
        vd_wgmma_begin();
        vd_start_held<T, VD_BY_ROWS>(w.dq, gradient, m->k[c & 1], true);
        vd_wgmma_commit();
        vd_wgmma_wait<0>();
        vd_wgmma_done<8>(w.dq);
      }
    }
    const int next = vd_next_item(&m->next[i & 1]);
    vd_query_end<T, REL>(a, task, work, item, p, m, w, q, c, scale);
    item = next;
  }
  vd_no_more_work(plan, VD_WORK_QUERY);
}

/* The second group. */
template <typename T, bool DROP, bool REL>
VD_DEV void vd_query_bring(const vd_cuda_attention &a, const vd_query_task &task, vd_query_memory<T> *m) {
  vd_plan *plan = (vd_plan *)a.plan;
  const vd_cuda_attention_gradient &g = task.g;
  const int n_item = a.n_head * a.n_stream * vd_ceil_div(a.block, VD_TILE), thread = (int)threadIdx.x - VD_THREADS;
  int item = (int)blockIdx.x, c = 0;
  for (int i = 0; item < n_item; i++) {
    const int asked = vd_ask_item(plan, VD_WORK_QUERY);
    const vd_query_work work = vd_query_work_of<REL>(a, plan, item);
    const vd_positions<T> positions = vd_positions_of<REL, T>(a, g.table, work.it.head);
    const vd_key_lines<const T> memories =
        vd_keys_of(a, (const T *)g.block, (const T *)g.memory, work.it.head, work.it.stream);
    const int lowest = vd_lowest<REL>(work.band), n = work.n;
    const uint32_t *kept =
        vd_kept_of(a, task.room.kept, work.it.stream, work.it.head, work.it.tile, n - 1); /* of the first key tile */
    auto copy_table = [&](int y, int slot) {
      vd_copy_positions<T, VD_WIDTH, REL>(m->table[slot], m->begin[slot], positions, work.first_block + y * VD_TILE,
                                          a.d_head);
    };
    for (int t = 0; t < n; t++, c++) {
      int kappa0 = work.start + t * VD_TILE;
      if (c > 0) vd_barrier_wait<VD_BARRIER_NEXT>();
      if (t == 0) {
        const vd_lines<const T> queries = vd_queries<T, REL>(a, g, task.room.query, work.it.head, work.it.stream);
        const vd_lines<const T> douts = vd_plain_lines(a, (const T *)g.dout, work.it.head, work.it.stream);
        vd_copy_tile<T, VD_WIDTH>(m->q[i & 1], queries.row0, queries.stride, work.i0, 0, a.block, a.d_head);
        vd_copy_tile<T, VD_WIDTH>(vd_query_dout<T, REL>(m, c), douts.row0, douts.stride, work.i0, 0, a.block, a.d_head);
        if constexpr (REL) copy_table(0, c % 3);
      }
      const vd_lines<const T> keys = memories.at(kappa0, VD_KEY), values = memories.at(kappa0, VD_VALUE);
      vd_copy_tile<T, VD_WIDTH>(m->k[c & 1], keys.row0, keys.stride, kappa0, lowest, a.block, a.d_head);
      vd_copy_tile<T, VD_WIDTH>(m->v[c & 1], values.row0, values.stride, kappa0, lowest, a.block, a.d_head);
      if (REL || t + 1 < n) copy_table(t + 1, (c + 1) % 3);
      if (DROP) vd_copy4(&m->kept[c & 1][thread], kept - t * VD_THREADS + thread, true);
      vd_copy_commit();
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
    vd_query_group_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_query_task task) {
  extern __shared__ __align__(1024) unsigned char memory[];
  vd_query_memory<T> *m = (vd_query_memory<T> *)memory;
  if (threadIdx.x < VD_THREADS) {
    vd_many_registers<208>();
    vd_query_multiply<T, DROP, REL>(a, task, m);
  } else {
    vd_few_registers<48>();
    vd_query_bring<T, DROP, REL>(a, task, m);
  }
}

template <typename T>
static cudaError_t vd_launch(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                             const vd_backward_room *room, cudaStream_t stream) {
  int blocks, shared = (int)sizeof(vd_query_memory<T>);
  const vd_query_task task = {*g, *room, vd_make_drop(a)};
  auto kernel = task.drop.threshold ? vd_query_group_kernel<T, true, false> : vd_query_group_kernel<T, false, false>;
  if (a->rel_key)
    kernel = task.drop.threshold ? vd_query_group_kernel<T, true, true> : vd_query_group_kernel<T, false, true>;
  cudaError_t e = vd_fill_device((const void *)kernel, shared, &blocks, VD_GROUPS);
  if (e != cudaSuccess) return e;
  cudaLaunchAttribute begun = {};
  begun.id = cudaLaunchAttributeLaunchCompletionEvent, begun.val.launchCompletionEvent.event = g->join;
  return vd_launch_with(&begun, g->side ? 1 : 0, kernel, (unsigned)blocks, VD_GROUPS, (size_t)shared, stream, *a, task);
}

cudaError_t vd_group_by_query(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_room *room, cudaStream_t stream) {
  return a->type == VD_BF16 ? vd_launch<__nv_bfloat16>(a, g, room, stream) : vd_launch<__half>(a, g, room, stream);
}
