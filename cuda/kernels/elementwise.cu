/* Elementwise kernels: conversions, embedding, dropout, backward of ReLU, column sums, memories.
 *
 * - The elementwise kernels run blocks of 256 threads. A thread moves 8 neighbouring elements (N = 8) where the width
 *   is a multiple of 8, else one; conversions to the activations' type move 4. No shared memory. They are bound by the
 *   bandwidth of device memory (3.35 TB/s on an H100), since they do few operations per element.
 * - embed_backward: a block per symbol and 64 N columns; 64 column lanes x 16 row lanes. Shared memory: the list of the
 *   symbol's rows (16 KB), sums of the row lanes (4 KB). A block scans all tokens, which lie in the L2 cache, and then
 *   reads only its symbol's rows of dout. It serves where one-hot rows and a product would cost more (linear.c).
 * - relu_backward: 32 x 8 threads, a block per 128 rows of 32 N columns. Shared memory: 8 rows of sums. Bound by memory
 *   bandwidth.
 *
 * Every sum has a fixed order. Measured times: doc/PERFORMANCE.md, rows "embedding" and "memories". */
#include "cuda/kernels/dropout.cuh"
#include "cuda/kernels/pdl.cuh"

enum { BLOCK = 256 };

/* to = from rounded to T; a thread converts four elements. */
template <typename T> static __global__ void from_float_kernel(size_t n, const float *from, T *to) {
  size_t i = ((size_t)blockIdx.x * BLOCK + threadIdx.x) * 4;
  if (i + 4 <= n) {
    float x[4];
    vd_read<float, 4>(from + i, x);
    vd_write<T, 4>(to + i, x);
  } else {
    for (; i < n; i++) vd_set(&to[i], from[i]);
  }
}

cudaError_t vd_cuda_from_float(enum vd_precision type, size_t n, const float *from, void *to, cudaStream_t stream) {
#define CALL(T) from_float_kernel<T><<<vd_blocks((int64_t)n, BLOCK * 4), BLOCK, 0, stream>>>(n, from, (T *)to)
  if (n > 0) VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* to = from in fp32; a thread converts one element. */
template <typename T> static __global__ void to_float_kernel(size_t n, const T *from, float *to) {
  size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
  if (i < n) to[i] = vd_load(from[i]);
}

cudaError_t vd_cuda_to_float(enum vd_precision type, size_t n, const void *from, float *to, cudaStream_t stream) {
#define CALL(T) to_float_kernel<T><<<vd_blocks((int64_t)n, BLOCK), BLOCK, 0, stream>>>(n, (const T *)from, to)
  if (n > 0) VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* out[i] = dropout(weight[tokens[i]]), rows of d; a thread computes N adjacent elements. */
template <typename T, int N>
static __global__ void embed_kernel(int64_t n, int64_t d, const int32_t *tokens, const float *weight, vd_drop drop,
                                    T *out) {
  int64_t e = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
  if (e >= n * d) return;
  int64_t r = e / d, c = e % d;
  float x[N];
  vd_read<float, N>(weight + (int64_t)tokens[r] * d + c, x);
  if (drop.threshold > 0) vd_apply_drop<N>(drop, e, x);
  vd_write<T, N>(out + e, x);
}

cudaError_t vd_cuda_embed(enum vd_precision type, int64_t n, int64_t d, const int32_t *tokens, const float *weight,
                          const vd_dropout *dropout, void *out, cudaStream_t stream) {
  vd_drop drop = vd_make_drop(dropout, d);
  int64_t total = n * d;
#define CALL(T)                                                                                                        \
  if (d % 8 == 0)                                                                                                      \
    embed_kernel<T, 8><<<vd_blocks(total, BLOCK * 8), BLOCK, 0, stream>>>(n, d, tokens, weight, drop, (T *)out);       \
  else                                                                                                                 \
    embed_kernel<T, 1><<<vd_blocks(total, BLOCK), BLOCK, 0, stream>>>(n, d, tokens, weight, drop, (T *)out)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* Block v sums the rows of symbol v. It first lists them in ascending order, LIST tokens at a time; then each of
 * ROW_LANES lanes adds every ROW_LANES-th row of the list, N columns a thread, and the lanes are added in order. So the
 * sum does not depend on timing. */
enum { ROW_LANES = 16, LIST = 4096 };

/* Lists in row[] the rows from .. end - 1 (at most LIST) whose token is v, in ascending order; returns their number. */
VD_GPU int list_rows(int32_t v, int64_t from, int64_t end, const int32_t *tokens, int32_t *row, int32_t *count) {
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, n_warp = (int)blockDim.x / 32, before = 0, total = 0;
  int64_t per_warp = LIST / n_warp, first = from + warp * per_warp;
  int mine = 0;
  for (int64_t r = first + lane; r < first + per_warp; r += 32)
    mine += __popc(__ballot_sync(0xffffffffU, r < end && tokens[r] == v));
  if (lane == 0) count[warp] = mine;
  __syncthreads();
  for (int w = 0; w < n_warp; w++) {
    before += w < warp ? count[w] : 0;
    total += count[w];
  }
  for (int64_t r = first + lane; r < first + per_warp; r += 32) {
    bool hit = r < end && tokens[r] == v;
    unsigned hits = __ballot_sync(0xffffffffU, hit);
    if (hit) row[before + __popc(hits & ((1U << lane) - 1))] = (int32_t)r;
    before += __popc(hits);
  }
  __syncthreads();
  return total;
}

/* dweight[s] += the sum of dout over the rows whose token is s; a block per symbol and range of columns. */
template <typename T, int N>
static __global__ void embed_backward_kernel(int64_t n, int64_t d, const int32_t *tokens, const T *dout,
                                             float *dweight) {
  __shared__ int32_t row[LIST], count[32];
  __shared__ float sum[ROW_LANES][64];
  int32_t v = (int32_t)blockIdx.x;
  int group = (int)threadIdx.x % 64, lane = (int)threadIdx.x / 64;
  int64_t c = ((int64_t)blockIdx.y * 64 + group) * N;
  float mine[N] = {0};
  for (int64_t from = 0; from < n; from += LIST) {
    int listed = list_rows(v, from, from + LIST < n ? from + LIST : n, tokens, row, count);
    if (c < d) {
#pragma unroll 4
      for (int i = lane; i < listed; i += ROW_LANES) {
        float x[N];
        vd_read<T, N>(dout + (int64_t)row[i] * d + c, x);
#pragma unroll
        for (int k = 0; k < N; k++) mine[k] += x[k];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < N; k++) {
    sum[lane][group] = mine[k];
    __syncthreads();
    if (lane == 0 && c < d) {
      float total = 0;
      for (int i = 0; i < ROW_LANES; i++) total += sum[i][group];
      dweight[(int64_t)v * d + c + k] += total;
    }
    __syncthreads();
  }
}

cudaError_t vd_cuda_embed_backward(enum vd_precision type, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                                   const void *dout, float *dweight, cudaStream_t stream) {
#define CALL(T)                                                                                                        \
  if (d % 8 == 0)                                                                                                      \
    embed_backward_kernel<T, 8><<<dim3((unsigned)vocab, vd_blocks(d, 512)), 64 * ROW_LANES, 0, stream>>>(              \
        n, d, tokens, (const T *)dout, dweight);                                                                       \
  else                                                                                                                 \
    embed_backward_kernel<T, 1><<<dim3((unsigned)vocab, vd_blocks(d, 64)), 64 * ROW_LANES, 0, stream>>>(               \
        n, d, tokens, (const T *)dout, dweight)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* to[r][c] = 1 where tokens[r] is c, else 0; a thread writes 8 columns. */
template <typename T> static __global__ void one_hot_kernel(int64_t n, int64_t width, const int32_t *tokens, T *to) {
  int64_t e = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * 8;
  if (e >= n * width) return;
  int64_t r = e / width, at = tokens[r] - e % width;
  float x[8];
#pragma unroll
  for (int k = 0; k < 8; k++) x[k] = at == k ? 1.0f : 0.0f;
  vd_write<T, 8>(to + e, x);
}

cudaError_t vd_cuda_one_hot(enum vd_precision type, int64_t n, int64_t width, const int32_t *tokens, void *to,
                            cudaStream_t stream) {
  if (width % 8 != 0) return cudaErrorInvalidValue;
  int64_t total = n * width;
#define CALL(T) one_hot_kernel<T><<<vd_blocks(total, BLOCK * 8), BLOCK, 0, stream>>>(n, width, tokens, (T *)to)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* x = dropout(x) in place; a thread computes N adjacent elements. */
template <typename T, int N> static __global__ void dropout_kernel(int64_t total, vd_drop drop, T *x) {
  int64_t e = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
  if (e >= total) return;
  float v[N];
  vd_read<T, N>(x + e, v);
  vd_apply_drop<N>(drop, e, v);
  vd_write<T, N>(x + e, v);
}

cudaError_t vd_cuda_drop_rows(enum vd_precision type, int64_t n, int64_t width, const vd_dropout *dropout, void *x,
                              cudaStream_t stream) {
  vd_drop drop = vd_make_drop(dropout, width);
  if (drop.threshold == 0) return cudaSuccess;
  int64_t total = n * width;
#define CALL(T)                                                                                                        \
  if (width % 8 == 0)                                                                                                  \
    dropout_kernel<T, 8><<<vd_blocks(total, BLOCK * 8), BLOCK, 0, stream>>>(total, drop, (T *)x);                      \
  else                                                                                                                 \
    dropout_kernel<T, 1><<<vd_blocks(total, BLOCK), BLOCK, 0, stream>>>(total, drop, (T *)x)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* Sums over rows in two steps: blocks of 32 x 8 threads add ROWS_PER_BLOCK rows of 32 N columns to one partial row
 * each, which row_sums.cu adds up. */
enum { ROWS_PER_BLOCK = 128 };

size_t vd_cuda_rows_workspace(int64_t n, int64_t width) {
  return (size_t)vd_cuda_partial_rows(n) * (size_t)width * sizeof(float);
}

/* dy = y <= 0 ? 0 : dy * scale (y NULL: dy unchanged), and the partial row of dy's column sums. A thread loads AHEAD
 * rows before it stores any: the compiler cannot reorder them, since dy is overwritten. */
template <typename T, int N>
static __global__ void relu_backward_kernel(int64_t n, int64_t width, const T *y, float scale, T *dy, float *partial) {
  enum { AHEAD = 4 };
  __shared__ float sum[8][32 * N + 1];
  int64_t c = ((int64_t)blockIdx.y * 32 + threadIdx.x) * N;
  int64_t r0 = (int64_t)blockIdx.x * ROWS_PER_BLOCK, end = r0 + ROWS_PER_BLOCK < n ? r0 + ROWS_PER_BLOCK : n;
  float mine[N] = {0};
  for (int64_t first = r0 + threadIdx.y; first < end && c < width; first += 8 * AHEAD) {
    vd_pack<T, N> row[AHEAD], unit[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      int64_t r = first + 8 * k;
      if (r >= end) continue;
      row[k] = *(const vd_pack<T, N> *)(dy + r * width + c);
      if (y) unit[k] = *(const vd_pack<T, N> *)(y + r * width + c);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      int64_t r = first + 8 * k;
      if (r >= end) continue;
      float g[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        g[i] = vd_load(row[k].at[i]);
        if (y) g[i] = vd_load(unit[k].at[i]) <= 0 ? 0.0f : g[i] * scale;
        mine[i] += g[i];
      }
      if (y) vd_write<T, N>(dy + r * width + c, g);
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) sum[threadIdx.y][threadIdx.x * N + i] = mine[i];
  __syncthreads();
  for (int k = (int)(threadIdx.y * 32 + threadIdx.x); k < 32 * N; k += 256) {
    int64_t column = (int64_t)blockIdx.y * 32 * N + k;
    if (column >= width) continue;
    float total = 0;
    for (int i = 0; i < 8; i++) total += sum[i][k];
    partial[(int64_t)blockIdx.x * width + column] = total;
  }
}

int64_t vd_cuda_partial_rows(int64_t n) {
  return vd_blocks(n, ROWS_PER_BLOCK);
}

/* y NULL: dy is only summed. */
static cudaError_t launch_relu_backward(enum vd_precision type, int64_t n, int64_t width, const void *y, float scale,
                                        void *dy, float *partial, cudaStream_t stream) {
  unsigned chunks = vd_blocks(n, ROWS_PER_BLOCK);
  dim3 threads(32, 8);
#define CALL(T)                                                                                                        \
  if (width % 8 == 0)                                                                                                  \
    relu_backward_kernel<T, 8><<<dim3(chunks, vd_blocks(width, 256)), threads, 0, stream>>>(n, width, (const T *)y,    \
                                                                                            scale, (T *)dy, partial);  \
  else                                                                                                                 \
    relu_backward_kernel<T, 1>                                                                                         \
        <<<dim3(chunks, vd_blocks(width, 32)), threads, 0, stream>>>(n, width, (const T *)y, scale, (T *)dy, partial)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

cudaError_t vd_cuda_relu_backward(enum vd_precision type, int64_t n, int64_t width, const void *y, float scale,
                                  void *dy, float *partial, cudaStream_t stream) {
  return launch_relu_backward(type, n, width, y, scale, dy, partial, stream);
}

cudaError_t vd_cuda_column_sums(enum vd_precision type, int64_t n, int64_t width, const void *x, float *workspace,
                                float *sum, cudaStream_t stream) {
  cudaError_t e = launch_relu_backward(type, n, width, NULL, 1, (void *)x, workspace, stream);
  const vd_row_sum rows = {workspace, {sum}, (int32_t)vd_cuda_partial_rows(n), (int32_t)width, (int32_t)width, 1};
  return e == cudaSuccess ? vd_cuda_add_row_sums(1, &rows, stream) : e;
}

/* A thread moves N columns from c on of rows offset, offset + step, ... of one stream, in ascending order. Where
 * rows_old == rows_new and oldest is 0, each row that it reads is the one that it overwrites next, so old and new may
 * be one buffer. */
template <typename T, int N>
static __global__ void memory_push_kernel(int64_t n_stream, int64_t d, const T *old, int64_t rows_old, int64_t oldest,
                                          const T *hidden, int64_t block, T *memory, int64_t rows_new, int64_t step) {
  int64_t e = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
  if (e >= n_stream * step * d) return;
  int64_t c = e % d, offset = e / d % step, s = e / d / step;
  for (int64_t r = offset; r < rows_new; r += step) {
    int64_t from = r + block - rows_new; /* row of the block, negative: of the old memory, counted from its end */
    float x[N] = {0};
    if (from >= 0) {
      vd_read<T, N>(hidden + (s * block + from) * d + c, x);
    } else if (from + rows_old >= 0) {
      vd_read<T, N>(old + (s * rows_old + (oldest + from + rows_old) % rows_old) * d + c, x);
    }
    vd_write<T, N>(memory + (s * rows_new + r) * d + c, x);
  }
}

cudaError_t vd_cuda_memory_push(enum vd_precision type, int64_t n_stream, int64_t d, const void *old, int64_t rows_old,
                                int64_t oldest, const void *hidden, int64_t block, void *memory, int64_t rows_new,
                                cudaStream_t stream) {
  int64_t step = block > 0 && block < rows_new ? block : rows_new;
  int64_t total = n_stream * step * d;
  if (total == 0) return cudaSuccess;
#define CALL(T)                                                                                                        \
  if (d % 8 == 0)                                                                                                      \
    memory_push_kernel<T, 8><<<vd_blocks(total, BLOCK * 8), BLOCK, 0, stream>>>(                                       \
        n_stream, d, (const T *)old, rows_old, oldest, (const T *)hidden, block, (T *)memory, rows_new, step);         \
  else                                                                                                                 \
    memory_push_kernel<T, 1><<<vd_blocks(total, BLOCK), BLOCK, 0, stream>>>(                                           \
        n_stream, d, (const T *)old, rows_old, oldest, (const T *)hidden, block, (T *)memory, rows_new, step)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* The rings of one launch, as a kernel argument. */
enum { RINGS = 64 };
typedef struct ring_pushes {
  vd_ring_push at[RINGS];
} ring_pushes;

/* Copies the last rows of each stream's block to their slots in a ring buffer; blockIdx.y is the stream, z the ring. */
template <typename T, int N>
static __global__ void memory_ring_push_kernel(int d, int64_t stride, int64_t block,
                                               const __grid_constant__ ring_pushes rings) {
  vd_pdl_wait();
  const vd_ring_push &p = rings.at[blockIdx.z];
  const int taken = (int)(block < p.rows ? block : p.rows);
  int e = (int)(blockIdx.x * BLOCK + threadIdx.x) * N, c = e % d, s = (int)blockIdx.y;
  if (e >= taken * d) return;
  int64_t r = block - taken + e / d, place = p.oldest + r % p.rows;
  *(vd_pack<T, N> *)((T *)p.memory + (s * p.rows + (place < p.rows ? place : place - p.rows)) * d + c) =
      *(const vd_pack<T, N> *)((const T *)p.hidden + (s * block + r) * stride + c);
}

/* n rings, at most RINGS. */
static cudaError_t push_rings(enum vd_precision type, int64_t n_stream, int64_t d, int64_t stride, int64_t block, int n,
                              const vd_ring_push *push, cudaStream_t stream) {
  ring_pushes rings = {};
  int64_t taken = 0;
  for (int i = 0; i < n; i++) {
    const int64_t mine = block < push[i].rows ? block : push[i].rows;
    if (mine > taken) taken = mine;
    rings.at[i] = push[i];
  }
  if (n_stream * taken * d == 0) return cudaSuccess;
  if (n_stream > VD_CUDA_MAX_STREAMS || taken * d > INT32_MAX - 8 * BLOCK) return cudaErrorInvalidValue;
  const bool packed = d % 8 == 0 && stride % 8 == 0;
  const dim3 blocks(vd_blocks(taken * d, BLOCK * (packed ? 8 : 1)), (unsigned)n_stream, (unsigned)n);
#define CALL(T)                                                                                                        \
  return vd_launch_pdl(packed ? memory_ring_push_kernel<T, 8> : memory_ring_push_kernel<T, 1>, blocks, BLOCK, 0,       \
                       stream, (int)d, stride, block, rings)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaErrorInvalidValue;
}

cudaError_t vd_cuda_memory_ring_push(enum vd_precision type, int64_t n_stream, int64_t d, int64_t stride, int64_t block,
                                     int n, const vd_ring_push *push, cudaStream_t stream) {
  cudaError_t e = cudaSuccess;
  for (int i = 0; i < n && e == cudaSuccess; i += RINGS)
    e = push_rings(type, n_stream, d, stride, block, n - i < RINGS ? n - i : RINGS, push + i, stream);
  return e;
}
