/* Projection of memory to keys and values, and the gradient of its weights: products of 128 x 128 tiles by blocks of
 * eight warps of 64 x 32, operands by asynchronous copies, three stages deep. Keys and values of one head stand side by
 * side as 2 d_head columns, so that both share the memory rows that are read. */
#include "attention.cuh"
#include "project.h"

enum {
  VD_SIDE = 128,            /* of a tile of results */
  VD_PROJECT_THREADS = 256, /* of a block */
  VD_STAGES = 3,            /* of the pipeline */
  VD_BACKWARD_BLOCKS = 256, /* that share the rows in backward, about; a constant, to fix the order of sums */
  VD_LEAST_UNITS = 4        /* of rows in one partial sum */
};

/* Contracted in one stage: 128 bytes of a row, so that both operands and all types take 16 KiB each. */
template <typename T> struct vd_project_layout {
  static constexpr int depth = 128 / (int)sizeof(T), operand = VD_SIDE * depth;
  static constexpr int bytes = VD_STAGES * 2 * operand * (int)sizeof(T);
  static constexpr int blocks = sizeof(T) == 4 ? 1 : 2;
};

typedef struct vd_project_args {
  const void *memory;
  int64_t memory_rows;
  const void *wk, *wv; /* forward */
  void *kv;
  const void *dkv; /* backward */
  float *partial;  /* backward: [slots, 2 d_head, d] */
  int slots;
} vd_project_args;

/* Rows of memory that a head reaches. */
VD_DEV int vd_rows_reached(const vd_plan *plan, const vd_project_args &p, int head) {
  return (int)min((int64_t)plan->band[head].reach, p.memory_rows);
}

/* Where row 0 of the window would lie in a stream's memory. */
template <typename T> VD_DEV const T *vd_memory_of(const vd_cuda_attention &a, const vd_project_args &p, int stream) {
  int64_t d = (int64_t)a.n_head * a.d_head;
  return (const T *)p.memory + ((stream + 1) * p.memory_rows - a.window) * d;
}

/* c (this warp's 64 x 32 of the tile) = left right^T over `steps` stages. copy(s, left, right) starts the copies of
 * stage s: of operands [128, depth], or [depth, 128] where ACROSS. */
template <typename T, bool ACROSS, typename Copy>
VD_DEV void vd_multiply(int steps, T *shared, Copy copy, float c[4][4][4]) {
  constexpr int depth = vd_project_layout<T>::depth, operand = vd_project_layout<T>::operand;
  const int warp = (int)threadIdx.x >> 5, m0 = (warp & 1) * 64, n0 = (warp >> 1) * 32;
#pragma unroll
  for (int i = 0; i < 64; i++) c[i >> 4][(i >> 2) & 3][i & 3] = 0;
  __syncthreads(); /* the item before has been read */
  for (int s = 0; s < VD_STAGES - 1; s++) {
    if (s < steps) copy(s, shared + 2 * s * operand, shared + (2 * s + 1) * operand);
    vd_copy_commit();
  }
  for (int s = 0; s < steps; s++) {
    const T *left = shared + 2 * (s % VD_STAGES) * operand, *right = left + operand;
    vd_copy_wait_but<VD_STAGES - 2>();
    __syncthreads();
    int ahead = s + VD_STAGES - 1, slot = 2 * (ahead % VD_STAGES) * operand;
    if (ahead < steps) copy(ahead, shared + slot, shared + slot + operand);
    vd_copy_commit();
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      vd_frag_a<T> x[4];
      vd_frag_b<T> y[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if constexpr (ACROSS) {
          vd_load_a_trans<T, VD_SIDE>(x[i], left, k, m0 + 16 * i);
        } else {
          vd_load_a<T, depth>(x[i], left, m0 + 16 * i, k);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if constexpr (ACROSS) {
          vd_load_b_trans<T, VD_SIDE>(y + j, right, k, n0 + 8 * j);
        } else {
          vd_load_b<T, depth>(y + j, right, n0 + 8 * j, k);
        }
      }
#pragma unroll
      for (int i = 0; i < 16; i++) vd_mma(c[i >> 2][i & 3], x[i >> 2], y[i & 3]);
    }
  }
}

/* Starts the copy of a tile of ROWS x D elements; chunk(row, column) says where 16 bytes come from, NULL for zeros. */
template <typename T, int ROWS, int D, typename Chunk> VD_DEV void vd_copy_chunks(T *tile, const T *any, Chunk chunk) {
  constexpr int per_chunk = 16 / (int)sizeof(T), chunks = D / per_chunk;
#pragma unroll
  for (int i = 0; i < ROWS * chunks / VD_PROJECT_THREADS; i++) {
    int id = i * VD_PROJECT_THREADS + (int)threadIdx.x, row = id / chunks, c = id % chunks;
    const T *from = chunk(row, c * per_chunk);
    vd_copy16(tile + vd_chunk<T, D>(row, c), from ? from : any, from != NULL);
  }
}

/* A tile of forward: 128 rows of a head, counted from the window's end, by 128 of its 2 d_head columns. */
typedef struct vd_forward_tile {
  int head, stream, first, lowest, column0;
} vd_forward_tile;

VD_DEV bool vd_find_tile(const vd_cuda_attention &a, const vd_plan *plan, const vd_project_args &p, int item,
                         vd_forward_tile *t) {
  int parts = vd_ceil_div(2 * a.d_head, VD_SIDE);
  for (int h = 0; h < a.n_head; h++) {
    int rows = vd_rows_reached(plan, p, h), tiles = vd_ceil_div(rows, VD_SIDE), n = a.n_stream * tiles * parts;
    if (item < n) {
      int tile = item / parts % tiles;
      t->head = h, t->stream = item / parts / tiles, t->first = a.window - (tile + 1) * VD_SIDE;
      t->lowest = a.window - rows, t->column0 = item % parts * VD_SIDE;
      return true;
    }
    item -= n;
  }
  return false;
}

template <typename T>
VD_DEV void vd_write_tile(const vd_cuda_attention &a, const vd_project_args &p, const vd_forward_tile &t,
                          float c[4][4][4]) {
  int lane = threadIdx.x & 31, warp = (int)threadIdx.x >> 5, d = vd_width(a);
  int row0 = t.first + (warp & 1) * 64 + (lane >> 2), column0 = t.column0 + (warp >> 1) * 32 + 2 * (lane & 3);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int row = row0 + 8 * i, ih = i & 1;
    if (row < t.lowest) continue;
    T *keys = (T *)p.kv + ((int64_t)t.stream * a.kv_rows + row) * 2 * d + t.head * a.d_head;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int column = column0 + 8 * j;
      if (column >= 2 * a.d_head) continue;
      T *to = keys + (column < a.d_head ? column : d + column - a.d_head);
      float x = c[i >> 1][j][2 * ih], y = c[i >> 1][j][2 * ih + 1];
      if constexpr (sizeof(T) == 4) {
        *(float2 *)to = make_float2(x, y);
      } else {
        *(uint32_t *)to = vd_pack(x, y, T());
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(VD_PROJECT_THREADS, vd_project_layout<T>::blocks)
    vd_project_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_project_args p) {
  constexpr int depth = vd_project_layout<T>::depth;
  extern __shared__ __align__(1024) unsigned char shared[];
  const vd_plan *plan = (const vd_plan *)a.plan;
  const int d = a.n_head * a.d_head;
  vd_forward_tile t;
  for (int item = (int)blockIdx.x; vd_find_tile(a, plan, p, item, &t); item += (int)gridDim.x) {
    const T *memory = vd_memory_of<T>(a, p, t.stream), *any = (const T *)p.wk;
    float c[4][4][4];
    auto copy = [&](int s, T *left, T *right) {
      vd_copy_chunks<T, VD_SIDE, depth>(left, any, [&](int row, int column) -> const T * {
        int r = t.first + row, x = s * depth + column;
        return r >= t.lowest && x < d ? memory + (int64_t)r * d + x : NULL;
      });
      vd_copy_chunks<T, VD_SIDE, depth>(right, any, [&](int row, int column) -> const T * {
        int y = t.column0 + row, x = s * depth + column;
        if (y >= 2 * a.d_head || x >= d) return NULL;
        bool key = y < a.d_head;
        return (const T *)(key ? p.wk : p.wv) + (int64_t)(t.head * a.d_head + (key ? y : y - a.d_head)) * d + x;
      });
    };
    vd_multiply<T, false>(vd_ceil_div(d, depth), (T *)shared, copy, c);
    vd_write_tile<T>(a, p, t, c);
  }
}

/* How backward's rows are shared out: a unit is `depth` rows of one stream and head; a slot is `size` units of one
 * head, and has one partial sum. */
typedef struct vd_share {
  int size;              /* units of a slot */
  int head, slot, slots; /* of a head: its first slot and their number */
  int rows, units;       /* of the head: rows of a stream; units of all streams */
} vd_share;

/* The share of the slot's head, or of `head` where slot < 0. False: no such slot. */
VD_DEV bool vd_find_share(const vd_cuda_attention &a, const vd_plan *plan, const vd_project_args &p, int depth,
                          int slot, int head, vd_share *s) {
  int units = 0, first = 0;
  for (int h = 0; h < a.n_head; h++) units += a.n_stream * vd_ceil_div(vd_rows_reached(plan, p, h), depth);
  s->size = max((int)VD_LEAST_UNITS, vd_ceil_div(units, p.slots - a.n_head));
  for (int h = 0; h < a.n_head; h++) {
    int rows = vd_rows_reached(plan, p, h), mine = a.n_stream * vd_ceil_div(rows, depth);
    int slots = vd_ceil_div(mine, s->size);
    if (slot < 0 ? h == head : slot < first + slots) {
      s->head = h, s->slot = first, s->slots = slots, s->rows = rows, s->units = mine;
      return true;
    }
    first += slots;
  }
  return false;
}

/* Writes this warp's part of a partial sum: rows column0.. of 2 d_head, columns x0.. of d. */
VD_DEV void vd_write_partial(const vd_cuda_attention &a, float *partial, int column0, int x0, float c[4][4][4]) {
  int lane = threadIdx.x & 31, warp = (int)threadIdx.x >> 5, d = a.n_head * a.d_head;
  int row0 = column0 + (warp & 1) * 64 + (lane >> 2);
  x0 += (warp >> 1) * 32 + 2 * (lane & 3);
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int row = row0 + 8 * i, x = x0 + 8 * j, ih = i & 1;
      if (row < 2 * a.d_head && x < d)
        *(float2 *)(partial + (int64_t)row * d + x) = make_float2(c[i >> 1][j][2 * ih], c[i >> 1][j][2 * ih + 1]);
    }
}

template <typename T>
__global__ void __launch_bounds__(VD_PROJECT_THREADS, vd_project_layout<T>::blocks)
    vd_project_backward_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ vd_project_args p) {
  constexpr int depth = vd_project_layout<T>::depth;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int d = a.n_head * a.d_head, across = vd_ceil_div(d, VD_SIDE), parts = vd_ceil_div(2 * a.d_head, VD_SIDE);
  const int slot = (int)blockIdx.x / (across * parts), x0 = (int)blockIdx.x % across * VD_SIDE;
  const int column0 = (int)blockIdx.x / across % parts * VD_SIDE;
  vd_share share;
  if (!vd_find_share(a, (const vd_plan *)a.plan, p, depth, slot, 0, &share)) return;
  const int first_unit = (slot - share.slot) * share.size, per_stream = vd_ceil_div(share.rows, depth);
  const T *any = (const T *)p.memory;
  float c[4][4][4];
  auto copy = [&](int s, T *left, T *right) {
    int unit = first_unit + s, stream = unit / per_stream, lowest = a.window - share.rows;
    int first = a.window - (per_stream - unit % per_stream) * depth;
    const T *memory = vd_memory_of<T>(a, p, stream);
    const T *dkeys = (const T *)p.dkv + (int64_t)stream * a.kv_rows * 2 * d + share.head * a.d_head;
    vd_copy_chunks<T, depth, VD_SIDE>(left, any, [&](int row, int column) -> const T * {
      int r = first + row, y = column0 + column;
      if (r < lowest || y >= 2 * a.d_head) return NULL;
      return dkeys + (int64_t)r * 2 * d + (y < a.d_head ? y : d + y - a.d_head);
    });
    vd_copy_chunks<T, depth, VD_SIDE>(right, any, [&](int row, int column) -> const T * {
      int r = first + row, x = x0 + column;
      return r >= lowest && x < d ? memory + (int64_t)r * d + x : NULL;
    });
  };
  vd_multiply<T, true>(min(share.size, share.units - first_unit), (T *)shared, copy, c);
  vd_write_partial(a, p.partial + (int64_t)slot * 2 * a.d_head * d, column0, x0, c);
}

/* dwk, dwv += the partial sums, in the order of slots; four neighbouring elements a thread. */
static __global__ void vd_project_sum_kernel(const __grid_constant__ vd_cuda_attention a,
                                             const __grid_constant__ vd_project_args p, int depth, float *dwk,
                                             float *dwv) {
  const int d = a.n_head * a.d_head, per_head = 2 * a.d_head * d;
  int64_t id = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (id >= (int64_t)per_head * a.n_head) return;
  int head = (int)(id / per_head), in = (int)(id % per_head), row = in / d;
  vd_share share;
  if (!vd_find_share(a, (const vd_plan *)a.plan, p, depth, -1, head, &share)) return;
  const float *from = p.partial + (int64_t)share.slot * per_head + in;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int s = 0; s < share.slots; s++) {
    float4 x = *(const float4 *)(from + (int64_t)s * per_head);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  float *to = row < a.d_head ? dwk : dwv;
  to += (int64_t)(head * a.d_head + (row < a.d_head ? row : row - a.d_head)) * d + in % d;
  float4 old = *(float4 *)to;
  *(float4 *)to = make_float4(old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w);
}

static int vd_tiles_across(const vd_cuda_attention *a) {
  return vd_ceil_div(a->n_head * a->d_head, VD_SIDE) * vd_ceil_div(2 * a->d_head, VD_SIDE);
}
/* More than heads, as each head's last slot may be a partial one. */
static int vd_slots(const vd_cuda_attention *a) {
  int shared = VD_BACKWARD_BLOCKS / vd_tiles_across(a);
  return shared > 2 * a->n_head ? shared : 2 * a->n_head;
}

size_t vd_cuda_project_workspace_size(const vd_cuda_attention *a) {
  size_t d = (size_t)a->n_head * (size_t)a->d_head;
  return (size_t)vd_slots(a) * 2 * (size_t)a->d_head * d * sizeof(float);
}

template <typename T>
static cudaError_t vd_project(const vd_cuda_attention *a, const vd_project_args *p, cudaStream_t stream) {
  int blocks, threads = VD_PROJECT_THREADS, shared = vd_project_layout<T>::bytes;
  cudaError_t e = vd_fill_device((const void *)vd_project_kernel<T>, shared, &blocks, threads);
  if (e != cudaSuccess) return e;
  vd_project_kernel<T><<<blocks, threads, shared, stream>>>(*a, *p);
  return cudaGetLastError();
}

template <typename T>
static cudaError_t vd_project_backward(const vd_cuda_attention *a, const vd_project_args *p, float *dwk, float *dwv,
                                       cudaStream_t stream) {
  int shared = vd_project_layout<T>::bytes, threads = VD_PROJECT_THREADS;
  cudaError_t e =
      cudaFuncSetAttribute(vd_project_backward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e != cudaSuccess) return e;
  vd_project_backward_kernel<T><<<p->slots * vd_tiles_across(a), threads, shared, stream>>>(*a, *p);
  int64_t d = (int64_t)a->n_head * a->d_head, n = 2 * d * d / 4;
  vd_project_sum_kernel<<<(unsigned)((n + threads - 1) / threads), threads, 0, stream>>>(
      *a, *p, vd_project_layout<T>::depth, dwk, dwv);
  return cudaGetLastError();
}

static bool vd_project_fits(const vd_cuda_attention *a, int64_t memory_rows) {
  int chunk = a->type == VD_CUDA_FP32 ? 4 : 8;
  return a->n_stream > 0 && a->window > 0 && a->n_head > 0 && a->n_head <= VD_CUDA_MAX_HEADS && a->d_head > 0 &&
         a->d_head <= 128 && a->d_head % chunk == 0 && a->kv_rows >= a->window && memory_rows >= 0;
}

cudaError_t vd_cuda_project_memory(const vd_cuda_attention *a, const void *memory, int64_t memory_rows, const void *wk,
                                   const void *wv, void *kv, cudaStream_t stream) {
  if (!vd_project_fits(a, memory_rows)) return cudaErrorInvalidValue;
  const vd_project_args p = {memory, memory_rows, wk, wv, kv, NULL, NULL, 0};
  switch (a->type) {
  case VD_CUDA_FP32:
    return vd_project<float>(a, &p, stream);
  case VD_CUDA_BF16:
    return vd_project<__nv_bfloat16>(a, &p, stream);
  case VD_CUDA_FP16:
    return vd_project<__half>(a, &p, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t vd_cuda_project_memory_backward(const vd_cuda_attention *a, const void *memory, int64_t memory_rows,
                                            const void *dkv, float *dwk, float *dwv, void *workspace,
                                            cudaStream_t stream) {
  if (!vd_project_fits(a, memory_rows)) return cudaErrorInvalidValue;
  const vd_project_args p = {memory, memory_rows, NULL, NULL, NULL, dkv, (float *)workspace, vd_slots(a)};
  switch (a->type) {
  case VD_CUDA_FP32:
    return vd_project_backward<float>(a, &p, dwk, dwv, stream);
  case VD_CUDA_BF16:
    return vd_project_backward<__nv_bfloat16>(a, &p, dwk, dwv, stream);
  case VD_CUDA_FP16:
    return vd_project_backward<__half>(a, &p, dwk, dwv, stream);
  }
  return cudaErrorInvalidValue;
}
