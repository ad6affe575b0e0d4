/* Conversions, embedding, dropout, ReLU's gradient, memories. */
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/pdl.cuh"

enum { VD_BLOCK = 256 };

template <typename T> __global__ void vd_from_float_kernel(size_t n, const float *from, T *to) {
  size_t i = ((size_t)blockIdx.x * VD_BLOCK + threadIdx.x) * 4;
  if (i + 4 <= n) {
    float x[4];
    vd_read<float, 4>(from + i, x);
    vd_write<T, 4>(to + i, x);
  } else {
    for (; i < n; i++) vd_set(&to[i], from[i]);
  }
}

cudaError_t vd_cuda_from_float(enum vd_precision type, size_t n, const float *from, void *to, cudaStream_t stream) {
#define CALL(T) vd_from_float_kernel<T><<<vd_blocks((int64_t)n, VD_BLOCK * 4), VD_BLOCK, 0, stream>>>(n, from, (T *)to)
  if (n > 0) VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

template <typename T> __global__ void vd_to_float_kernel(size_t n, const T *from, float *to) {
  size_t i = (size_t)blockIdx.x * VD_BLOCK + threadIdx.x;
  if (i < n) to[i] = vd_load(from[i]);
}

cudaError_t vd_cuda_to_float(enum vd_precision type, size_t n, const void *from, float *to, cudaStream_t stream) {
#define CALL(T) vd_to_float_kernel<T><<<vd_blocks((int64_t)n, VD_BLOCK), VD_BLOCK, 0, stream>>>(n, (const T *)from, to)
  if (n > 0) VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

template <typename T, int N>
__global__ void vd_embed_kernel(int64_t n, int64_t d, const int32_t *tokens, const float *weight, vd_drop drop,
                                T *out) {
  int64_t e = ((int64_t)blockIdx.x * VD_BLOCK + threadIdx.x) * N;
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
    vd_embed_kernel<T, 8>                                                                                              \
        <<<vd_blocks(total, VD_BLOCK * 8), VD_BLOCK, 0, stream>>>(n, d, tokens, weight, drop, (T *)out);               \
  else                                                                                                                 \
    vd_embed_kernel<T, 1><<<vd_blocks(total, VD_BLOCK), VD_BLOCK, 0, stream>>>(n, d, tokens, weight, drop, (T *)out)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* Block v sums the rows of symbol v. It lists them first, a chunk of tokens at a time and in ascending order; then
 * VD_LANES lanes take every VD_LANES-th row of the list, each for N columns a thread, and are added in order: the sum
 * does not depend on timing. */
enum { VD_LANES = 16, VD_LISTED = 4096 };

VD_GPU int vd_list_rows(int32_t v, int64_t from, int64_t end, const int32_t *tokens, int32_t *row, int32_t *count) {
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, n_warp = (int)blockDim.x / 32, before = 0, total = 0;
  int64_t per_warp = VD_LISTED / n_warp, first = from + warp * per_warp;
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

template <typename T, int N>
__global__ void vd_embed_backward_kernel(int64_t n, int64_t d, const int32_t *tokens, const T *dout, float *dweight) {
  __shared__ int32_t row[VD_LISTED], count[32];
  __shared__ float sum[VD_LANES][64];
  int32_t v = (int32_t)blockIdx.x;
  int group = (int)threadIdx.x % 64, lane = (int)threadIdx.x / 64;
  int64_t c = ((int64_t)blockIdx.y * 64 + group) * N;
  float mine[N] = {0};
  for (int64_t from = 0; from < n; from += VD_LISTED) {
    int listed = vd_list_rows(v, from, from + VD_LISTED < n ? from + VD_LISTED : n, tokens, row, count);
    if (c < d) {
#pragma unroll 4
      for (int i = lane; i < listed; i += VD_LANES) {
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
      for (int i = 0; i < VD_LANES; i++) total += sum[i][group];
      dweight[(int64_t)v * d + c + k] += total;
    }
    __syncthreads();
  }
}

cudaError_t vd_cuda_embed_backward(enum vd_precision type, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                                   const void *dout, float *dweight, cudaStream_t stream) {
#define CALL(T)                                                                                                        \
  if (d % 8 == 0)                                                                                                      \
    vd_embed_backward_kernel<T, 8><<<dim3((unsigned)vocab, vd_blocks(d, 512)), 64 * VD_LANES, 0, stream>>>(            \
        n, d, tokens, (const T *)dout, dweight);                                                                       \
  else                                                                                                                 \
    vd_embed_backward_kernel<T, 1><<<dim3((unsigned)vocab, vd_blocks(d, 64)), 64 * VD_LANES, 0, stream>>>(             \
        n, d, tokens, (const T *)dout, dweight)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

template <typename T, int N> __global__ void vd_drop_kernel(int64_t total, vd_drop drop, T *x) {
  int64_t e = ((int64_t)blockIdx.x * VD_BLOCK + threadIdx.x) * N;
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
    vd_drop_kernel<T, 8><<<vd_blocks(total, VD_BLOCK * 8), VD_BLOCK, 0, stream>>>(total, drop, (T *)x);                \
  else                                                                                                                 \
    vd_drop_kernel<T, 1><<<vd_blocks(total, VD_BLOCK), VD_BLOCK, 0, stream>>>(total, drop, (T *)x)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* Sums over rows: blocks of 32 x 8 threads take VD_ROWS_EACH rows of 32 N columns and leave one partial row each. */
enum { VD_ROWS_EACH = 128 };

size_t vd_cuda_rows_workspace(int64_t n, int64_t width) {
  return (size_t)((n + VD_ROWS_EACH - 1) / VD_ROWS_EACH + 1024) * (size_t)width * 3 * sizeof(float);
}

/* A thread reads AHEAD rows before it writes any: dy is overwritten, so that the compiler cannot. */
template <typename T, int N>
__global__ void vd_relu_backward_kernel(int64_t n, int64_t width, const T *y, float scale, T *dy, float *partial) {
  enum { AHEAD = 4 };
  __shared__ float sum[8][32 * N + 1];
  int64_t c = ((int64_t)blockIdx.x * 32 + threadIdx.x) * N;
  int64_t r0 = (int64_t)blockIdx.y * VD_ROWS_EACH, end = r0 + VD_ROWS_EACH < n ? r0 + VD_ROWS_EACH : n;
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
    int64_t column = (int64_t)blockIdx.x * 32 * N + k;
    if (column >= width) continue;
    float total = 0;
    for (int i = 0; i < 8; i++) total += sum[i][k];
    partial[(int64_t)blockIdx.y * width + column] = total;
  }
}

/* sum[c] += the sum of partial's column c; 32 columns x 32 lanes of rows a block. */
static __global__ void vd_add_partials_kernel(int rows, int64_t width, const float *partial, float *sum) {
  vd_pdl_wait();
  __shared__ float lane[32][33];
  int64_t c = (int64_t)blockIdx.x * 32 + threadIdx.x;
  float mine = 0;
  if (c < width) {
#pragma unroll 4
    for (int r = (int)threadIdx.y; r < rows; r += 32) mine += partial[r * width + c];
  }
  lane[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  float total = lane[threadIdx.x][threadIdx.y];
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) total += __shfl_xor_sync(0xffffffffU, total, i);
  c = (int64_t)blockIdx.x * 32 + threadIdx.y;
  if (threadIdx.x == 0 && c < width) sum[c] += total;
}

int64_t vd_cuda_partial_rows(int64_t n) {
  return vd_blocks(n, VD_ROWS_EACH);
}

/* y NULL: dy is only summed. */
static cudaError_t vd_launch_relu_backward(enum vd_precision type, int64_t n, int64_t width, const void *y, float scale,
                                           void *dy, float *partial, cudaStream_t stream) {
  unsigned chunks = vd_blocks(n, VD_ROWS_EACH);
  dim3 threads(32, 8);
#define CALL(T)                                                                                                        \
  if (width % 8 == 0)                                                                                                  \
    vd_relu_backward_kernel<T, 8><<<dim3(vd_blocks(width, 256), chunks), threads, 0, stream>>>(                        \
        n, width, (const T *)y, scale, (T *)dy, partial);                                                              \
  else                                                                                                                 \
    vd_relu_backward_kernel<T, 1>                                                                                      \
        <<<dim3(vd_blocks(width, 32), chunks), threads, 0, stream>>>(n, width, (const T *)y, scale, (T *)dy, partial)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

cudaError_t vd_cuda_relu_backward(enum vd_precision type, int64_t n, int64_t width, const void *y, float scale,
                                  void *dy, float *partial, cudaStream_t stream) {
  return vd_launch_relu_backward(type, n, width, y, scale, dy, partial, stream);
}

cudaError_t vd_cuda_add_partials(int64_t rows, int64_t width, const float *partial, float *sum, cudaStream_t stream) {
  return vd_launch_pdl(vd_add_partials_kernel, vd_blocks(width, 32), dim3(32, 32), 0, stream, (int)rows, width, partial,
                       sum);
}

cudaError_t vd_cuda_column_sums(enum vd_precision type, int64_t n, int64_t width, const void *x, float *workspace,
                                float *sum, cudaStream_t stream) {
  cudaError_t e = vd_launch_relu_backward(type, n, width, NULL, 1, (void *)x, workspace, stream);
  return e == cudaSuccess ? vd_cuda_add_partials(vd_cuda_partial_rows(n), width, workspace, sum, stream) : e;
}

/* One thread moves the pieces of column c of rows offset, offset + block, ... of one stream, in ascending order. Where
 * rows_old == rows_new and oldest is 0 it reads the very rows that it overwrites next, so that old and new may be one
 * buffer. */
template <typename T, int N>
__global__ void vd_memory_push_kernel(int64_t n_stream, int64_t d, const T *old, int64_t rows_old, int64_t oldest,
                                      const T *hidden, int64_t block, T *memory, int64_t rows_new, int64_t step) {
  int64_t e = ((int64_t)blockIdx.x * VD_BLOCK + threadIdx.x) * N;
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
    vd_memory_push_kernel<T, 8><<<vd_blocks(total, VD_BLOCK * 8), VD_BLOCK, 0, stream>>>(                              \
        n_stream, d, (const T *)old, rows_old, oldest, (const T *)hidden, block, (T *)memory, rows_new, step);         \
  else                                                                                                                 \
    vd_memory_push_kernel<T, 1><<<vd_blocks(total, VD_BLOCK), VD_BLOCK, 0, stream>>>(                                  \
        n_stream, d, (const T *)old, rows_old, oldest, (const T *)hidden, block, (T *)memory, rows_new, step)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* The last `kept` rows of each stream's block to their places in the ring; blockIdx.y is the stream. */
template <typename T, int N>
__global__ void vd_memory_turn_kernel(int d, T *memory, int64_t rows, int64_t oldest, const T *hidden, int64_t block,
                                      int kept) {
  vd_pdl_wait();
  int e = (int)(blockIdx.x * VD_BLOCK + threadIdx.x) * N, c = e % d, s = (int)blockIdx.y;
  if (e >= kept * d) return;
  int64_t r = block - kept + e / d, place = oldest + r % rows;
  *(vd_pack<T, N> *)(memory + (s * rows + (place < rows ? place : place - rows)) * d + c) =
      *(const vd_pack<T, N> *)(hidden + (s * block + r) * d + c);
}

cudaError_t vd_cuda_memory_ring_push(enum vd_precision type, int64_t n_stream, int64_t d, void *memory, int64_t rows,
                                     int64_t oldest, const void *hidden, int64_t block, cudaStream_t stream) {
  int64_t kept = block < rows ? block : rows;
  if (n_stream * kept * d == 0) return cudaSuccess;
  if (n_stream > 65535 || kept * d > INT32_MAX - 8 * VD_BLOCK) return cudaErrorInvalidValue;
  const dim3 blocks(vd_blocks(kept * d, VD_BLOCK * (d % 8 == 0 ? 8 : 1)), (unsigned)n_stream);
#define CALL(T)                                                                                                        \
  return vd_launch_pdl(d % 8 == 0 ? vd_memory_turn_kernel<T, 8> : vd_memory_turn_kernel<T, 1>, blocks, VD_BLOCK, 0,    \
                       stream, (int)d, (T *)memory, rows, oldest, (const T *)hidden, block, (int)kept)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaErrorInvalidValue;
}
