/* The forward projection of a layer's memory for up to 8 heads of 64 in 16-bit types (where trimmed, an even number),
 * by the pipeline of weight_stationary.cuh.
 *
 * - Tiles: 64 rows of the ring buffer x the 128 columns of a group (memory_projection.cuh). Rows of the window are one
 *   or two ranges of the ring; each has tiles of its own, counted from its end, so that a tile is one copy. Rows that a
 *   tile has beyond its range are not stored.
 * - Blocks: one a multiprocessor. Each takes an equal share of the list of tiles, which goes group by group, so that
 *   most blocks load the weights of one group.
 * - Bound by the tensor cores where spans are long; where they are short, by the weights' way to shared memory. */
#include "cuda/attention/memory_projection.cuh"
#include "cuda/kernels/weight_stationary.cuh"

static_assert((sizeof(vd_rows_needed) + 1023) / 1024 * 1024 + sizeof(vd_stationary<__half>) <= 227 * 1024,
              "static and dynamic shared memory of a block");

/* TMA's maps of the memory [stream, row, d] and of both weight matrices. */
typedef struct projection_maps {
  CUtensorMap memory, wk, wv;
} projection_maps;

/* A tile: its group, stream and rows. before: groups of this block before this one. */
typedef struct memory_tile {
  int group, stream;
  vd_ring_tile at;
  int before;
} memory_tile;

/* This block's share of the tiles: first .. end - 1. */
typedef struct tile_share {
  int first, end;
} tile_share;
template <bool TRIM>
VD_DEV tile_share share_of(const vd_cuda_attention &a, const vd_projection_args &p, const vd_rows_needed *rows) {
  int64_t n = 0;
  for (int g = 0; g < vd_group_count<TRIM>(a); g++) n += (int64_t)a.n_stream * vd_ring_tiles_of(p, rows->group[g]).all;
  tile_share s = {(int)(n * blockIdx.x / gridDim.x), (int)(n * (blockIdx.x + 1) / gridDim.x)};
  return s;
}
template <bool TRIM>
VD_DEV memory_tile tile_at(const vd_cuda_attention &a, const vd_projection_args &p, const vd_rows_needed *rows,
                           int first, int tile_id) {
  memory_tile t = {};
  for (int start = 0;; t.group++) {
    const vd_ring_tiles r = vd_ring_tiles_of(p, rows->group[t.group]);
    const int n = a.n_stream * r.all;
    if (tile_id < start + n) {
      t.stream = (tile_id - start) / r.all;
      t.at = vd_ring_tile_at(a, p, r, (tile_id - start) % r.all);
      return t;
    }
    start += n;
    if (n > 0 && start > first) t.before++;
  }
}

/* Starts the copy of a step of a group's weights. */
template <typename T, bool TRIM>
VD_DEV void copy_weights(const vd_cuda_attention &a, const projection_maps &maps, int group, int step,
                         vd_stationary<T> *m) {
  const int d = vd_width(a);
  uint64_t *full = &m->weights_full[step];
  vd_mbarrier_expect(full, VD_UNITS * VD_STEP * 2);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int column = vd_group_column<TRIM>(a, group, 64 * half);
    vd_copy_box_5d(m->weights[step] + half * 64 * VD_STEP, column < d ? &maps.wk : &maps.wv, step * VD_STEP,
                   (column < d ? column : column - d) / 32, full);
  }
}

/* The producer's thread. */
template <typename T, bool TRIM>
VD_DEV void produce(const vd_cuda_attention &a, const vd_projection_args &p, const projection_maps &maps,
                    const vd_rows_needed *rows, vd_stationary<T> *m) {
  const tile_share share = share_of<TRIM>(a, p, rows);
  const int steps = vd_width(a) / VD_STEP;
  vd_stage_cursor at = {0, 0};
  int group = -1;
  for (int tile_id = share.first; tile_id < share.end; tile_id++) {
    const memory_tile t = tile_at<TRIM>(a, p, rows, share.first, tile_id);
    const bool new_group = t.group != group;
    if (new_group) vd_drain_stages(m, at);
    group = t.group;
    for (int step = 0; step < steps; step++) {
      const int slot = vd_next_stage(m, at);
      if (new_group) copy_weights<T, TRIM>(a, maps, group, step, m);
      vd_copy_box_3d(m->rows[slot], &maps.memory, t.stream, t.at.row, step * VD_STEP, &m->full[slot]);
    }
  }
}

/* Stores a warp's 16 rows of a tile. This lane has rows g and g + 8, and of these eight of each 32 columns. */
template <typename T, bool TRIM>
VD_DEV void store_rows(const vd_cuda_attention &a, const vd_projection_args &p, const vd_rows_needed *rows,
                       const memory_tile &t, const float c[16][4]) {
  const int lane = threadIdx.x & 31, first = t.at.row + 16 * ((int)threadIdx.x >> 5 & 3) + (lane >> 2), d = vd_width(a);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int lowest = max(a.window - vd_rows_of_column<TRIM>(a, rows, t.group, 64 * half), t.at.shift);
    const int column = vd_group_column<TRIM>(a, t.group, 64 * half) + 8 * (lane & 3);
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      const int row = first + 8 * ih + t.at.shift;
      T *to = (T *)p.kv + ((int64_t)t.stream * a.kv_rows + row) * 2 * d + column;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float(*from)[4] = c + 8 * half + 4 * i;
        uint32_t w[4];
#pragma unroll
        for (int u = 0; u < 4; u++) w[u] = vd_pack(from[u][2 * ih], from[u][2 * ih + 1], T());
        if (row >= lowest) *(uint4 *)(to + 32 * i) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
}

/* A consumer warpgroup. */
template <typename T, bool TRIM, int STEPS>
VD_DEV void consume(const vd_cuda_attention &a, const vd_projection_args &p, const vd_rows_needed *rows,
                    vd_stationary<T> *m, int consumer) {
  const tile_share share = share_of<TRIM>(a, p, rows);
  int group = -1;
  for (int i = consumer; share.first + i < share.end; i += VD_CONSUMERS) {
    const memory_tile t = tile_at<TRIM>(a, p, rows, share.first, share.first + i);
    float c[16][4];
    vd_multiply_tile<T, VD_K_MAJOR, STEPS>(m, i, vd_width(a) / VD_STEP, t.group != group, t.before & 1,
                                           share.first + i + 1 < share.end, c);
    group = t.group;
    store_rows<T, TRIM>(a, p, rows, t, c);
  }
}

template <typename T, bool TRIM, int STEPS>
__global__ void __launch_bounds__(VD_STATIONARY_THREADS, 1)
    project_wgmma_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_projection_args p,
                         const __grid_constant__ projection_maps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  vd_stationary<T> *m = (vd_stationary<T> *)shared;
  vd_start_stationary(m);
  vd_pdl_wait();
  const vd_rows_needed *rows = vd_find_rows<TRIM>(a, p);
  const int consumer = vd_stationary_consumer();
  if (consumer < 0) {
    vd_producer_registers();
    if (threadIdx.x == 0) produce<T, TRIM>(a, p, maps, rows, m);
  } else {
    vd_consumer_registers();
    consume<T, TRIM, STEPS>(a, p, rows, m, consumer);
  }
}

bool vd_projects_by_wgmma(const vd_cuda_attention *a) {
  const int d = a->n_head * a->d_head;
  return a->type != VD_FP32 && a->d_head == 64 && d <= VD_MAX_STEPS * VD_STEP && (!a->trimmed || a->n_head % 2 == 0);
}

template <typename T, bool TRIM>
static cudaError_t launch(const vd_cuda_attention *a, const vd_projection_args *p, const projection_maps *maps,
                          cudaStream_t stream) {
  auto kernel = a->n_head * a->d_head == VD_MAX_STEPS * VD_STEP ? project_wgmma_kernel<T, TRIM, VD_MAX_STEPS>
                                                                : project_wgmma_kernel<T, TRIM, 0>;
  const int shared = (int)sizeof(vd_stationary<T>);
  int blocks;
  cudaError_t e = vd_persistent_blocks((const void *)kernel, shared, &blocks, VD_STATIONARY_THREADS);
  if (e != cudaSuccess) return e;
  return vd_launch_pdl(kernel, (unsigned)blocks, VD_STATIONARY_THREADS, (size_t)shared, stream, *a, *p, *maps);
}

cudaError_t vd_project_wgmma(const vd_cuda_attention *a, const vd_projection_args *p, cudaStream_t stream) {
  const int64_t d = (int64_t)a->n_head * a->d_head;
  projection_maps maps;
  if (p->memory.rows == 0) return cudaSuccess;
  cudaError_t e = vd_make_stream_map(&maps.memory, p->memory.at, a->n_stream, p->memory.rows, d);
  if (e == cudaSuccess) e = vd_make_weight_map(&maps.wk, p->wk, d, d, 64);
  if (e == cudaSuccess) e = vd_make_weight_map(&maps.wv, p->wv, d, d, 64);
  if (e != cudaSuccess) return e;
  if (a->type == VD_BF16)
    return (a->trimmed ? launch<__nv_bfloat16, true> : launch<__nv_bfloat16, false>)(a, p, &maps, stream);
  return (a->trimmed ? launch<__half, true> : launch<__half, false>)(a, p, &maps, stream);
}
