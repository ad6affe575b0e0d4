/* Projection of a layer's memory to keys and values, and the gradient of its weights, each head only as far back as
 * it reaches:
 *
 *      kv = memory [W_k^T, W_v^T],   dW += dkv^T memory
 *
 * Tiles: 128 x 128 results by a block of two warpgroups (256 threads, 64 rows each). Columns of keys and values form
 * groups of up to 2 d_head that need the same memory rows: keys and values of a head, or where trimmed, keys of two
 * heads, and values of two. 16-bit operands are multiplied by wgmma from shared memory, fp32 by mma.sync. Forward is
 * persistent; backward gives a block a fixed share of the rows, and a second kernel adds the partial sums in a fixed
 * order.
 *
 * Warps: all copy and multiply. Operands pass through a pipeline of three stages of cp.async that runs on from tile
 * to tile.
 *
 * Shared memory, 96 KiB: three stages of two operands of 16 KiB (128 rows of 128 bytes, or panels of 64 rows,
 * wgmma.cuh). Barriers: __syncthreads() once a stage.
 *
 * Bound: L2, from which a stage reads 32 KiB for 512 cycles of the tensor cores.
 *
 * Up to 8 heads of 64 in 16-bit types (where trimmed, an even number) have kernels of their own:
 * memory_projection_wgmma.cu and memory_projection_bwd_wgmma.cu. */
#include "cuda/attention/memory_projection.cuh"
#include "cuda/kernels/pdl.cuh"
#include "cuda/kernels/wgmma.cuh"

enum {
  SIDE = 128,            /* rows and columns of a tile of results */
  BLOCK_THREADS = 256,   /* threads of a block */
  STAGES = 3,            /* stages of the pipeline */
  COPIES = 4,            /* 16-byte copies of a thread for one operand of a stage */
  BACKWARD_BLOCKS = 256, /* blocks of backward, about, or half of them in memory_projection_bwd_wgmma.cu; a constant,
                            which fixes the order of sums */
};

/* Elements contracted in one stage: 128 bytes of a row, so that an operand takes 16 KiB in all types. Where rows are
 * contracted (MN-major), an operand lies in panels of `depth` columns (wgmma.cuh). */
template <typename T> struct projection_layout {
  static constexpr int per_chunk = 16 / (int)sizeof(T), depth = 8 * per_chunk, operand = SIDE * depth;
  static constexpr int panel = depth * depth;
  static constexpr int bytes = STAGES * 2 * operand * (int)sizeof(T);
  static constexpr int blocks = sizeof(T) == 4 ? 1 : 2;
};
static_assert(SIDE * 128 == BLOCK_THREADS * COPIES * 16, "a stage's copies");

/* Row of the ring buffer that holds row r of the window. */
VD_DEV int ring_row(const vd_cuda_attention &a, const vd_projection_args &p, int r) {
  int rows = (int)p.memory.rows, at = (int)p.memory.oldest + rows - a.window + r;
  return at >= rows ? at - rows : at;
}

/* A thread's copies of a stage of 128 rows of 128 bytes, or (ACROSS, MN-major) of `depth` rows of 128 elements: its
 * first row, the rows from one copy to the next, its 16-byte chunk of a row; the offset of its first chunk in an
 * operand, and the step to the next. */
struct copier {
  int row, step, chunk, to, to_step;
};
template <typename T, bool ACROSS> VD_DEV copier copier_of() {
  typedef projection_layout<T> layout;
  constexpr int chunks = ACROSS ? SIDE / layout::per_chunk : 8, step = BLOCK_THREADS / chunks;
  int row = (int)threadIdx.x / chunks, chunk = (int)threadIdx.x % chunks;
  copier k = {row, step, chunk, chunk / 8 * layout::panel + vd_swizzled_chunk<T, layout::depth>(row, chunk % 8),
              step * layout::depth};
  return k;
}

/* The products of one stage by mma: this warp's 16 x 128 of the tile. */
template <typename T, bool ACROSS> VD_DEV void stage_mma(const T *left, const T *right, float c[16][4]) {
  constexpr int depth = projection_layout<T>::depth, panel = projection_layout<T>::panel;
  const int m0 = (int)(threadIdx.x >> 5) * 16;
#pragma unroll 1
  for (int k = 0; k < depth; k += 16) {
    vd_frag_a<T> x;
    if constexpr (ACROSS) {
      vd_load_a_trans<T, depth>(x, left + m0 / depth * panel, k, m0 % depth);
    } else {
      vd_load_a<T, depth>(x, left, m0, k);
    }
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      vd_frag_b<T> y[2];
      if constexpr (ACROSS) {
        vd_load_b_trans<T, depth>(y, right + 8 * j / depth * panel, k, 8 * j % depth);
      } else {
        vd_load_b<T, depth>(y, right, 8 * j, k);
      }
      vd_mma(c[j], x, y[0]), vd_mma(c[j + 1], x, y[1]);
    }
  }
}

/* The same by wgmma, started: this warpgroup's 64 x 128. */
template <typename T, bool ACROSS> VD_DEV void stage_wgmma(const T *left, const T *right, float c[16][4]) {
  constexpr int depth = projection_layout<T>::depth, panel = projection_layout<T>::panel * (int)sizeof(T);
  constexpr int major = ACROSS ? VD_MN_MAJOR : VD_K_MAJOR;
  static_assert(depth == 64, "contracted by one call");
  uint64_t x = vd_smem_descriptor<true>(left + (threadIdx.x >> 7) * (64 * depth), panel);
  uint64_t y = vd_smem_descriptor<true>(right, panel);
  vd_wgmma_fence();
  vd_wgmma_k64_ss<T, 128, major, major>(c, x, y, true);
  vd_wgmma_commit();
}

/* The pipeline of copies. copy(left, right) starts the copies of the next stage, if there is one. */
template <typename T> struct copy_pipeline {
  T *shared;
  int slot;
};
template <typename T, typename Copy> VD_DEV copy_pipeline<T> start_pipeline(T *shared, Copy copy) {
  constexpr int operand = projection_layout<T>::operand;
  for (int s = 0; s < STAGES - 1; s++) {
    copy(shared + 2 * s * operand, shared + (2 * s + 1) * operand);
    vd_cp_async_commit();
  }
  copy_pipeline<T> pipe = {shared, 0};
  return pipe;
}

/* c = left right^T over the next `steps` stages: row 16 warp + g + 8 ih of the tile, column 8 j + 2 t + jj is c[j][2
 * ih + jj]. */
template <typename T, bool ACROSS, typename Copy>
VD_DEV void multiply_stages(int steps, copy_pipeline<T> &pipe, Copy copy, float c[16][4]) {
  constexpr int operand = projection_layout<T>::operand;
#pragma unroll
  for (int i = 0; i < 64; i++) c[i >> 2][i & 3] = 0;
  if constexpr (sizeof(T) == 2) vd_wgmma_fence_operand<16>(c);
  for (int s = 0; s < steps; s++) {
    vd_cp_async_wait<STAGES - 2>();
    if constexpr (sizeof(T) == 2) vd_fence_proxy_async(), vd_wgmma_wait<0>();
    __syncthreads(); /* this stage has landed, and the previous one has been read */
    const T *left = pipe.shared + 2 * pipe.slot * operand, *right = left + operand;
    if constexpr (sizeof(T) == 2) {
      stage_wgmma<T, ACROSS>(left, right, c);
    } else {
      stage_mma<T, ACROSS>(left, right, c);
    }
    int ahead = pipe.slot == 0 ? STAGES - 1 : pipe.slot - 1;
    copy(pipe.shared + 2 * ahead * operand, pipe.shared + (2 * ahead + 1) * operand);
    vd_cp_async_commit();
    pipe.slot = pipe.slot == STAGES - 1 ? 0 : pipe.slot + 1;
  }
  if constexpr (sizeof(T) == 2) vd_wgmma_wait<0>(), vd_wgmma_fence_operand<16>(c);
}

/* A tile of forward: 128 rows of a group, counted from the window's end, by 128 of its columns. */
typedef struct projection_tile {
  int group, stream, first, lowest, column0;
} projection_tile;

/* The tile of a number. Groups of keys alone need the same rows: tiles of one place follow each other, so that the rows
 * are in L2. */
template <bool TRIM>
VD_DEV bool find_tile(const vd_cuda_attention &a, const vd_rows_needed *rows, int tile_id, projection_tile *t) {
  const int n_group = vd_group_count<TRIM>(a), parts = vd_ceil_div(2 * a.d_head, SIDE);
  for (int g = 0; g < n_group;) {
    const int together = vd_has_keys_alone<TRIM>(a, g) ? n_group / 2 : 1;
    int tiles = vd_ceil_div(rows->group[g], SIDE), n = a.n_stream * tiles * parts * together;
    if (tile_id < n) {
      int place = tile_id / parts / together, tile = place % tiles;
      t->group = g + tile_id / parts % together, t->stream = place / tiles, t->first = a.window - (tile + 1) * SIDE;
      t->lowest = a.window - rows->group[g], t->column0 = tile_id % parts * SIDE;
      return true;
    }
    tile_id -= n, g += together;
  }
  return false;
}

/* State of forward's copies: the tile, its stage, and the rows of this thread's copies; NULL: zeros. */
template <typename T> struct copy_cursor {
  int tile_id, stage;
  bool more;
  const T *row[COPIES], *weight[COPIES];
};
template <typename T, bool TRIM>
VD_DEV void aim(const vd_cuda_attention &a, const vd_rows_needed *rows, const vd_projection_args &p, const copier &k,
                copy_cursor<T> &at) {
  const int d = vd_width(a);
  projection_tile t;
  at.stage = 0, at.more = find_tile<TRIM>(a, rows, at.tile_id, &t);
  if (!at.more) return;
  const T *memory = (const T *)p.memory.at + (int64_t)t.stream * p.memory.rows * d;
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    int r = t.first + k.row + i * k.step, column = vd_group_column<TRIM>(a, t.group, t.column0 + k.row + i * k.step);
    const T *weight = (const T *)(column < d ? p.wk : p.wv) + (int64_t)(column < d ? column : column - d) * d;
    at.row[i] = r >= t.lowest ? memory + (int64_t)ring_row(a, p, r) * d : NULL;
    at.weight[i] = column >= 0 ? weight : NULL;
  }
}

template <typename T, bool TRIM>
VD_DEV void write_tile(const vd_cuda_attention &a, const vd_rows_needed *rows, const vd_projection_args &p,
                       const projection_tile &t, float c[16][4]) {
  int lane = threadIdx.x & 31, warp = (int)threadIdx.x >> 5, d = vd_width(a);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    int row = t.first + warp * 16 + (lane >> 2) + 8 * ih;
    if (row < t.lowest) continue;
    T *kv = (T *)p.kv + ((int64_t)t.stream * a.kv_rows + row) * 2 * d;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      int in_group = t.column0 + 8 * j + 2 * (lane & 3), column = vd_group_column<TRIM>(a, t.group, in_group);
      if (column < 0 || (TRIM && row < a.window - vd_rows_of_column<TRIM>(a, rows, t.group, in_group))) continue;
      T *to = kv + column;
      float x = c[j][2 * ih], y = c[j][2 * ih + 1];
      if constexpr (sizeof(T) == 4) {
        *(float2 *)to = make_float2(x, y);
      } else {
        *(uint32_t *)to = vd_pack(x, y, T());
      }
    }
  }
}

/* Forward: a persistent block takes tiles of 128 x 128 keys and values. */
template <typename T, bool TRIM>
__global__ void __launch_bounds__(BLOCK_THREADS, projection_layout<T>::blocks)
    project_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_projection_args p) {
  vd_pdl_wait();
  typedef projection_layout<T> layout;
  extern __shared__ __align__(1024) unsigned char shared[];
  const vd_rows_needed *rows = vd_find_rows<TRIM>(a, p);
  const int d = vd_width(a), stages = vd_ceil_div(d, layout::depth);
  const copier k = copier_of<T, false>();
  copy_cursor<T> at;
  at.tile_id = (int)blockIdx.x;
  aim<T, TRIM>(a, rows, p, k, at);
  auto copy = [&](T *left, T *right) {
    if (!at.more) return;
    int x = at.stage * layout::depth + k.chunk * layout::per_chunk;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      bool row = at.row[i] && x < d, weight = at.weight[i] && x < d;
      vd_cp_async16(left + k.to + i * k.to_step, row ? at.row[i] + x : (const T *)p.wk, row);
      vd_cp_async16(right + k.to + i * k.to_step, weight ? at.weight[i] + x : (const T *)p.wk, weight);
    }
    if (++at.stage < stages) return;
    at.tile_id += (int)gridDim.x;
    aim<T, TRIM>(a, rows, p, k, at);
  };
  copy_pipeline<T> pipe = start_pipeline((T *)shared, copy);
  projection_tile t;
  for (int tile_id = (int)blockIdx.x; find_tile<TRIM>(a, rows, tile_id, &t); tile_id += (int)gridDim.x) {
    float c[16][4];
    multiply_stages<T, false>(stages, pipe, copy, c);
    write_tile<T, TRIM>(a, rows, p, t, c);
  }
}

/* Backward: a block writes the partial sum of its share of the rows to one tile of dW. */
template <typename T, bool TRIM>
__global__ void __launch_bounds__(BLOCK_THREADS, projection_layout<T>::blocks)
    project_backward_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_projection_args p) {
  vd_pdl_wait();
  constexpr int depth = projection_layout<T>::depth, per_chunk = projection_layout<T>::per_chunk;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int d = vd_width(a), across = vd_ceil_div(d, SIDE), parts = vd_ceil_div(2 * a.d_head, SIDE);
  const int slot = (int)blockIdx.x / (across * parts), x0 = (int)blockIdx.x % across * SIDE;
  const int column0 = (int)blockIdx.x / across % parts * SIDE;
  vd_row_share share;
  const vd_rows_needed *needed = vd_find_rows<TRIM>(a, p);
  if (!vd_find_share<TRIM>(a, needed, p, depth, slot, 0, &share)) return;
  const int width = vd_group_width<TRIM>(a, share.group);
  if (column0 >= width) return;
  const int first_unit = (slot - share.slot) * share.size, per_stream = vd_ceil_div(share.rows, depth);
  const int steps = min(share.size, share.units - first_unit), lowest = a.window - share.rows;
  const copier k = copier_of<T, true>();
  const int y = column0 + k.chunk * per_chunk, x = x0 + k.chunk * per_chunk;
  const int column = vd_group_column<TRIM>(a, share.group, y);
  const int lowest_key = TRIM && column >= 0 ? a.window - vd_rows_of_column<TRIM>(a, needed, share.group, y) : lowest;
  const T *dkv = (const T *)p.dkv + column;
  const T *memory = (const T *)p.memory.at + x;
  int left_steps = steps, stream = first_unit / per_stream, unit = first_unit % per_stream;
  auto copy = [&](T *left, T *right) {
    if (left_steps-- <= 0) return;
    int first = a.window - (per_stream - unit) * depth + k.row;
    const T *dkeys = dkv + (int64_t)stream * a.kv_rows * 2 * d, *rows = memory + (int64_t)stream * p.memory.rows * d;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int r = first + i * k.step;
      bool key = r >= lowest_key && column >= 0, row = r >= lowest && x < d;
      vd_cp_async16(left + k.to + i * k.to_step, key ? dkeys + (int64_t)r * 2 * d : (const T *)p.dkv, key);
      vd_cp_async16(right + k.to + i * k.to_step, row ? rows + (int64_t)ring_row(a, p, r) * d : (const T *)p.dkv, row);
    }
    if (++unit == per_stream) unit = 0, stream++;
  };
  copy_pipeline<T> pipe = start_pipeline((T *)shared, copy);
  float c[16][4];
  multiply_stages<T, true>(steps, pipe, copy, c);
  vd_write_partial(a, p.partial + (int64_t)slot * 2 * a.d_head * d, width, column0 + 16 * ((int)threadIdx.x >> 5), x0,
                   c);
}

/* dwk, dwv += the partial sums, in the order of slots; a thread adds four adjacent elements. */
template <bool TRIM>
static __global__ void sum_partials_kernel(const __grid_constant__ vd_cuda_attention a,
                                           const __grid_constant__ vd_projection_args p, int depth, float *dwk,
                                           float *dwv) {
  vd_pdl_wait();
  const int d = a.n_head * a.d_head, per_group = 2 * a.d_head * d;
  const vd_rows_needed *needed = vd_find_rows<TRIM>(a, p);
  int64_t id = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (id >= (int64_t)per_group * vd_group_count<TRIM>(a)) return;
  int group = (int)(id / per_group), in = (int)(id % per_group), column = vd_group_column<TRIM>(a, group, in / d);
  vd_row_share share;
  if (column < 0 || !vd_find_share<TRIM>(a, needed, p, depth, -1, group, &share)) return;
  const float *from = p.partial + (int64_t)share.slot * per_group + in;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int s = 0; s < share.slots; s++) {
    float4 x = *(const float4 *)(from + (int64_t)s * per_group);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  float *to = (column < d ? dwk : dwv) + (int64_t)(column < d ? column : column - d) * d + in % d;
  float4 old = *(float4 *)to;
  *(float4 *)to = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
}

static int tiles_across(const vd_cuda_attention *a) {
  return vd_ceil_div(a->n_head * a->d_head, SIDE) * vd_ceil_div(2 * a->d_head, SIDE);
}
/* Number of slots: more than groups, since each group's last slot may be partly filled. */
static int slot_count(const vd_cuda_attention *a) {
  int shared = BACKWARD_BLOCKS / tiles_across(a);
  int groups = a->trimmed ? vd_group_count<true>(*a) : vd_group_count<false>(*a);
  return shared > 2 * groups ? shared : 2 * groups;
}

size_t vd_cuda_project_workspace_size(const vd_cuda_attention *a) {
  size_t d = (size_t)a->n_head * (size_t)a->d_head;
  return (size_t)slot_count(a) * 2 * (size_t)a->d_head * d * sizeof(float);
}

template <typename T, bool TRIM>
static cudaError_t launch_project(const vd_cuda_attention *a, const vd_projection_args *p, cudaStream_t stream) {
  int blocks, threads = BLOCK_THREADS, shared = projection_layout<T>::bytes;
  cudaError_t e = vd_persistent_blocks((const void *)project_kernel<T, TRIM>, shared, &blocks, threads);
  if (e != cudaSuccess) return e;
  return vd_launch_pdl(project_kernel<T, TRIM>, (unsigned)blocks, (unsigned)threads, (size_t)shared, stream, *a, *p);
}

template <typename T, bool TRIM>
static cudaError_t launch_project_backward(const vd_cuda_attention *a, const vd_projection_args *p, float *dwk,
                                           float *dwv, cudaStream_t stream) {
  int threads = BLOCK_THREADS;
  cudaError_t e = cudaSuccess;
  if (p->by_ring) {
    e = vd_project_backward_wgmma(a, p, stream);
  } else {
    const int shared = projection_layout<T>::bytes;
    auto kernel = project_backward_kernel<T, TRIM>;
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (e != cudaSuccess) return e;
    e = vd_launch_pdl(kernel, (unsigned)(p->slots * tiles_across(a)), (unsigned)threads, (size_t)shared, stream, *a,
                      *p);
  }
  if (e != cudaSuccess) return e;
  int64_t d = (int64_t)a->n_head * a->d_head, n = (int64_t)vd_group_count<TRIM>(*a) * 2 * a->d_head * d / 4;
  return vd_launch_pdl(sum_partials_kernel<TRIM>, (unsigned)((n + threads - 1) / threads), (unsigned)threads, 0, stream,
                       *a, *p, (int)projection_layout<T>::depth, dwk, dwv);
}

static bool shapes_fit(const vd_cuda_attention *a, const vd_cuda_ring *memory) {
  int chunk = a->type == VD_FP32 ? 4 : 8;
  return a->n_stream > 0 && a->window > 0 && a->n_head > 0 && a->n_head <= VD_CUDA_MAX_HEADS && a->d_head > 0 &&
         a->d_head <= VD_CUDA_MAX_D_HEAD && a->d_head % chunk == 0 && a->kv_rows >= a->window && memory->oldest >= 0 &&
         memory->oldest <= memory->rows;
}

cudaError_t vd_cuda_project_memory(const vd_cuda_attention *a, const vd_cuda_ring *memory, const void *wk,
                                   const void *wv, void *kv, cudaStream_t stream) {
  if (!shapes_fit(a, memory)) return cudaErrorInvalidValue;
  const vd_projection_args p = {*memory, wk, wv, kv, NULL, NULL, 0};
  if (vd_projects_by_wgmma(a)) return vd_project_wgmma(a, &p, stream);
  switch (a->type) {
  case VD_FP32:
    return (a->trimmed ? launch_project<float, true> : launch_project<float, false>)(a, &p, stream);
  case VD_BF16:
    return (a->trimmed ? launch_project<__nv_bfloat16, true> : launch_project<__nv_bfloat16, false>)(a, &p, stream);
  case VD_FP16:
    return (a->trimmed ? launch_project<__half, true> : launch_project<__half, false>)(a, &p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t vd_cuda_project_memory_backward(const vd_cuda_attention *a, const vd_cuda_ring *memory, const void *dkv,
                                            float *dwk, float *dwv, void *workspace, cudaStream_t stream) {
  if (!shapes_fit(a, memory)) return cudaErrorInvalidValue;
  vd_projection_args p = {*memory, NULL, NULL, NULL, dkv, (float *)workspace, slot_count(a)};
  p.by_ring = vd_projects_by_wgmma(a);
  switch (a->type) {
  case VD_FP32:
    return (a->trimmed ? launch_project_backward<float, true> : launch_project_backward<float, false>)(a, &p, dwk, dwv,
                                                                                                       stream);
  case VD_BF16:
    return (a->trimmed ? launch_project_backward<__nv_bfloat16, true>
                       : launch_project_backward<__nv_bfloat16, false>)(a, &p, dwk, dwv, stream);
  case VD_FP16:
    return (a->trimmed ? launch_project_backward<__half, true> : launch_project_backward<__half, false>)(a, &p, dwk,
                                                                                                         dwv, stream);
  }
  return cudaErrorInvalidValue;
}
