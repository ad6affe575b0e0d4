/* Products of memory rows with the weights of the heads that reach them, on the tensor cores (nvcuda::wmma). Blocks of
 * 4 warps; tiles come in through a ring of shared-memory stages filled by cp.async. A tile takes VD_PIECE_OF_HEAD
 * columns of one head's keys or values: heads of more columns take several, heads of fewer leave some idle. */
#include "memory_rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

enum { VD_PIECE_OF_HEAD = 64, VD_WARPS = 4, VD_DEPTH = 32, VD_STAGES = 3 };
enum { VD_PAD = 8, VD_ROWS = 128, VD_COLUMNS = 128, VD_CHUNK = 1024 };

/* Where blocks begin: first[h] is the first item of head h. */
typedef struct vd_project_work {
  vd_cuda_projection p;
  int32_t first[VD_CUDA_MAX_HEADS + 1];
  int32_t pieces, columns; /* tiles along a head's columns; backward: along the inputs */
} vd_project_work;

static __device__ __forceinline__ int vd_head_of(const vd_project_work &w, int item) {
  int h = 0;
  while (item >= w.first[h + 1]) h++;
  return h;
}

/* 16 bytes from global to shared memory, or zeros. */
static __device__ __forceinline__ void vd_fetch(void *to, const void *from, bool there) {
  __pipeline_memcpy_async(to, from, 16, there ? 0 : 16);
}

/* Rows of one stream: [VD_ROWS memory rows] x [columns of one piece], summed over d in steps of VD_DEPTH. */
template <typename T>
__global__ void __launch_bounds__(VD_WARPS * 32)
    vd_project_kernel(const __grid_constant__ vd_project_work w, const T *memory, const T *wk, const T *wv, T *k,
                      T *v) {
  using namespace nvcuda;
  enum { LD = VD_DEPTH + VD_PAD, LDO = VD_PIECE_OF_HEAD + 4 };
  extern __shared__ __align__(128) char shared[];
  T *a = (T *)shared, *b = a + VD_STAGES * VD_ROWS * LD;
  const vd_cuda_projection &p = w.p;
  int h = vd_head_of(w, (int)blockIdx.x), item = (int)blockIdx.x - w.first[h], d = p.n_head * p.d_head;
  int tiles = (p.reach[h] + VD_ROWS - 1) / VD_ROWS;
  int tile = item % tiles, piece = item / tiles % w.pieces, is_value = item / tiles / w.pieces % 2;
  int stream = item / tiles / w.pieces / 2;
  int row0 = p.window - p.reach[h] + tile * VD_ROWS, column0 = h * p.d_head + piece * VD_PIECE_OF_HEAD;
  int width = min(VD_PIECE_OF_HEAD, p.d_head - piece * VD_PIECE_OF_HEAD);
  const T *x = memory + ((int64_t)stream * p.memory_rows + p.memory_rows - p.window + row0) * d;
  const T *weight = (is_value ? wv : wk) + (int64_t)column0 * d;
  int warp = (int)threadIdx.x / 32, steps = (d + VD_DEPTH - 1) / VD_DEPTH;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) wmma::fill_fragment(c[i][j], 0.0f);
  auto fetch = [&](int step) {
    int stage = step % VD_STAGES, e0 = step * VD_DEPTH;
    for (int i = (int)threadIdx.x; i < (VD_ROWS + VD_PIECE_OF_HEAD) * (VD_DEPTH / 8); i += VD_WARPS * 32) {
      int r = i / (VD_DEPTH / 8), e = i % (VD_DEPTH / 8) * 8;
      if (r < VD_ROWS) {
        bool there = row0 + r < p.window && e0 + e < d;
        vd_fetch(a + (stage * VD_ROWS + r) * LD + e, there ? x + (int64_t)r * d + e0 + e : x, there);
      } else {
        r -= VD_ROWS;
        bool there = r < width && e0 + e < d;
        vd_fetch(b + (stage * VD_PIECE_OF_HEAD + r) * LD + e, there ? weight + (int64_t)r * d + e0 + e : weight, there);
      }
    }
  };
  for (int s = 0; s < VD_STAGES - 1; s++) {
    if (s < steps) fetch(s);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; step++) {
    __pipeline_wait_prior(VD_STAGES - 2);
    __syncthreads();
    if (step + VD_STAGES - 1 < steps) fetch(step + VD_STAGES - 1);
    __pipeline_commit();
    const T *as = a + step % VD_STAGES * VD_ROWS * LD + warp * 32 * LD,
            *bs = b + step % VD_STAGES * VD_PIECE_OF_HEAD * LD;
#pragma unroll
    for (int e = 0; e < VD_DEPTH; e += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa[2];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb[4];
#pragma unroll
      for (int i = 0; i < 2; i++) wmma::load_matrix_sync(fa[i], as + i * 16 * LD + e, LD);
#pragma unroll
      for (int j = 0; j < 4; j++) wmma::load_matrix_sync(fb[j], bs + j * 16 * LD + e, LD);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) wmma::mma_sync(c[i][j], fa[i], fb[j], c[i][j]);
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  float *out = (float *)shared; /* the stages are done with */
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      wmma::store_matrix_sync(out + (warp * 32 + i * 16) * LDO + j * 16, c[i][j], LDO, wmma::mem_row_major);
  __syncthreads();
  T *to = (is_value ? v : k) + ((int64_t)stream * p.kv_rows + row0) * d + column0;
  for (int i = (int)threadIdx.x; i < VD_ROWS * (VD_PIECE_OF_HEAD / 8); i += VD_WARPS * 32) {
    int r = i / (VD_PIECE_OF_HEAD / 8), e = i % (VD_PIECE_OF_HEAD / 8) * 8;
    if (row0 + r >= p.window || e >= width) continue;
    __align__(16) T eight[8];
#pragma unroll
    for (int q = 0; q < 8; q++) eight[q] = (T)out[r * LDO + e + q];
    *(int4 *)(to + (int64_t)r * d + e) = *(const int4 *)eight;
  }
}

/* [columns of one piece] x [VD_COLUMNS inputs], summed over VD_CHUNK of the head's rows, counted over all streams. */
template <typename T>
__global__ void __launch_bounds__(VD_WARPS * 32)
    vd_project_backward_kernel(const __grid_constant__ vd_project_work w, const T *memory, const T *dk, const T *dv,
                               float *dwk, float *dwv) {
  using namespace nvcuda;
  enum { LDA = VD_PIECE_OF_HEAD + VD_PAD, LDB = VD_COLUMNS + VD_PAD, LDO = VD_COLUMNS + 4 };
  extern __shared__ __align__(128) char shared[];
  T *a = (T *)shared, *b = a + VD_STAGES * VD_DEPTH * LDA;
  const vd_cuda_projection &p = w.p;
  int h = vd_head_of(w, (int)blockIdx.x), item = (int)blockIdx.x - w.first[h], d = p.n_head * p.d_head;
  int column = item % w.columns, piece = item / w.columns % w.pieces, is_value = item / w.columns / w.pieces % 2;
  int chunk = item / w.columns / w.pieces / 2, reach = p.reach[h], total = p.n_stream * reach;
  int from = chunk * VD_CHUNK, end = min(from + VD_CHUNK, total), steps = (end - from + VD_DEPTH - 1) / VD_DEPTH;
  int column0 = h * p.d_head + piece * VD_PIECE_OF_HEAD, in0 = column * VD_COLUMNS;
  int width = min(VD_PIECE_OF_HEAD, p.d_head - piece * VD_PIECE_OF_HEAD);
  const T *gradient = (is_value ? dv : dk) + column0;
  int warp = (int)threadIdx.x / 32;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c[4][2];
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) wmma::fill_fragment(c[i][j], 0.0f);
  auto fetch = [&](int step) {
    int stage = step % VD_STAGES;
    enum { A = VD_PIECE_OF_HEAD / 8, B = VD_COLUMNS / 8 };
    for (int i = (int)threadIdx.x; i < VD_DEPTH * (A + B); i += VD_WARPS * 32) {
      bool first = i < VD_DEPTH * A;
      int at = first ? i : i - VD_DEPTH * A, r = first ? at / A : at / B, e = first ? at % A * 8 : at % B * 8;
      int row = from + step * VD_DEPTH + r, stream = row / reach, age = row % reach; /* age from the farthest */
      if (first) {
        bool there = row < end && e < width;
        int64_t key = (int64_t)stream * p.kv_rows + p.window - reach + age;
        vd_fetch(a + (stage * VD_DEPTH + r) * LDA + e, there ? gradient + key * d + e : gradient, there);
      } else {
        bool there = row < end && in0 + e < d;
        int64_t place = (int64_t)(stream + 1) * p.memory_rows - reach + age;
        vd_fetch(b + (stage * VD_DEPTH + r) * LDB + e, there ? memory + place * d + in0 + e : memory, there);
      }
    }
  };
  for (int s = 0; s < VD_STAGES - 1; s++) {
    if (s < steps) fetch(s);
    __pipeline_commit();
  }
  for (int step = 0; step < steps; step++) {
    __pipeline_wait_prior(VD_STAGES - 2);
    __syncthreads();
    if (step + VD_STAGES - 1 < steps) fetch(step + VD_STAGES - 1);
    __pipeline_commit();
    const T *as = a + step % VD_STAGES * VD_DEPTH * LDA, *bs = b + step % VD_STAGES * VD_DEPTH * LDB + warp * 32;
#pragma unroll
    for (int e = 0; e < VD_DEPTH; e += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major> fa[4];
      wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major> fb[2];
#pragma unroll
      for (int i = 0; i < 4; i++) wmma::load_matrix_sync(fa[i], as + e * LDA + i * 16, LDA);
#pragma unroll
      for (int j = 0; j < 2; j++) wmma::load_matrix_sync(fb[j], bs + e * LDB + j * 16, LDB);
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) wmma::mma_sync(c[i][j], fa[i], fb[j], c[i][j]);
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  float *out = (float *)shared;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      wmma::store_matrix_sync(out + i * 16 * LDO + warp * 32 + j * 16, c[i][j], LDO, wmma::mem_row_major);
  __syncthreads();
  float *to = (is_value ? dwv : dwk) + (int64_t)column0 * d + in0;
  for (int i = (int)threadIdx.x; i < VD_PIECE_OF_HEAD * VD_COLUMNS; i += VD_WARPS * 32) {
    int r = i / VD_COLUMNS, e = i % VD_COLUMNS;
    if (r < width && in0 + e < d) atomicAdd(to + (int64_t)r * d + e, out[r * LDO + e]);
  }
}

/* Fills the work list; returns the number of blocks, or 0 for shapes that the kernels do not take. */
static int vd_plan_projection(vd_project_work *w, const vd_cuda_projection *p, bool backward) {
  if (p->type == VD_CUDA_FP32 || p->n_head > VD_CUDA_MAX_HEADS || p->d_head % 8 != 0) return 0;
  int d = p->n_head * p->d_head;
  w->p = *p;
  w->pieces = (p->d_head + VD_PIECE_OF_HEAD - 1) / VD_PIECE_OF_HEAD;
  w->columns = (d + VD_COLUMNS - 1) / VD_COLUMNS;
  w->first[0] = 0;
  for (int h = 0; h < p->n_head; h++) {
    int tiles = backward ? (p->n_stream * p->reach[h] + VD_CHUNK - 1) / VD_CHUNK * w->columns
                         : (p->reach[h] + VD_ROWS - 1) / VD_ROWS * p->n_stream;
    w->first[h + 1] = w->first[h] + tiles * w->pieces * 2;
  }
  return w->first[p->n_head];
}

template <typename T>
static cudaError_t vd_project(const vd_project_work *w, int blocks, const void *memory, const void *wk, const void *wv,
                              void *k, void *v, cudaStream_t stream) {
  size_t stages = VD_STAGES * (VD_ROWS + VD_PIECE_OF_HEAD) * (VD_DEPTH + VD_PAD) * sizeof(T);
  size_t out = VD_ROWS * (VD_PIECE_OF_HEAD + 4) * sizeof(float), bytes = stages > out ? stages : out;
  cudaError_t e = cudaFuncSetAttribute(vd_project_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (e != cudaSuccess) return e;
  vd_project_kernel<T><<<(unsigned)blocks, VD_WARPS * 32, bytes, stream>>>(*w, (const T *)memory, (const T *)wk,
                                                                           (const T *)wv, (T *)k, (T *)v);
  return cudaGetLastError();
}

cudaError_t vd_cuda_memory_rows(const vd_cuda_projection *p, const void *memory, const void *wk, const void *wv,
                                void *k, void *v, cudaStream_t stream) {
  vd_project_work w;
  int blocks = vd_plan_projection(&w, p, false);
  if (blocks == 0) return cudaErrorInvalidValue;
  return p->type == VD_CUDA_BF16 ? vd_project<__nv_bfloat16>(&w, blocks, memory, wk, wv, k, v, stream)
                                 : vd_project<__half>(&w, blocks, memory, wk, wv, k, v, stream);
}

template <typename T>
static cudaError_t vd_project_backward(const vd_project_work *w, int blocks, const void *memory, const void *dk,
                                       const void *dv, float *dwk, float *dwv, cudaStream_t stream) {
  size_t stages = VD_STAGES * VD_DEPTH * (VD_PIECE_OF_HEAD + VD_COLUMNS + 2 * VD_PAD) * sizeof(T);
  size_t out = VD_PIECE_OF_HEAD * (VD_COLUMNS + 4) * sizeof(float), bytes = stages > out ? stages : out;
  cudaError_t e =
      cudaFuncSetAttribute(vd_project_backward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
  if (e != cudaSuccess) return e;
  vd_project_backward_kernel<T><<<(unsigned)blocks, VD_WARPS * 32, bytes, stream>>>(
      *w, (const T *)memory, (const T *)dk, (const T *)dv, dwk, dwv);
  return cudaGetLastError();
}

cudaError_t vd_cuda_memory_rows_backward(const vd_cuda_projection *p, const void *memory, const void *dk,
                                         const void *dv, float *dwk, float *dwv, cudaStream_t stream) {
  vd_project_work w;
  int blocks = vd_plan_projection(&w, p, true);
  if (blocks == 0) return cudaErrorInvalidValue;
  return p->type == VD_CUDA_BF16 ? vd_project_backward<__nv_bfloat16>(&w, blocks, memory, dk, dv, dwk, dwv, stream)
                                 : vd_project_backward<__half>(&w, blocks, memory, dk, dv, dwk, dwv, stream);
}
