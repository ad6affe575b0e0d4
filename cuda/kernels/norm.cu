/* Residual sum and layer norm, forward and backward:
 *   sum = a + dropout(b), y = (sum - mean) rstd weight + bias;
 *   with g = dy weight and xhat = (sum - mean) rstd: dsum = rstd (g - mean(g) - xhat mean(g xhat)),
 *   dweight += sum over rows of dy xhat, dbias += sum of dy, dshift += sum of dsum.
 *
 * Blocks of 8 warps, at most 264 of them: two on each of an H100's 132 multiprocessors (one where a row has more than
 * 512 elements). A warp owns a row, in registers: K chunks of N neighbouring elements a lane. It takes every
 * (8 gridDim)-th row and loads the next one before it computes this one. Weights stay in registers where a row has at
 * most 512 elements: loading them for each row would cost more cycles of the L1 cache than the row itself.
 * Shared memory: none forward; backward weights [d] float, then per warp 4 stages (1 where they do not fit into 112 KB)
 * of [dy, sum][d] filled by cp.async; at the end [8][d] float of the warps' sums, in the same place. A lane reads only
 * what it fetched itself, so stages need no barrier, only the wait for its own copies.
 * Bound by memory bandwidth: with 64 streams forward of all norms takes 1.01 ms on an H200, 1.29 with the masks of
 * hidden units (unit_mask.cuh) that half of them draw, and backward 0.88; at 4.8 TB/s 0.67 and 0.50.
 *
 * Rows of more than 2048 elements, and of more than 128 that are no multiple of 8, do not fit into registers. There a
 * block of 256 threads owns a row (every gridDim-th), reads it again for each sum that must be known first, three times
 * forward and twice backward, and adds up columns in its partial row, in device memory; shared memory: 32
 * bytes. Neither measured nor tuned. */
#include "cuda/kernels/dropout.cuh"
#include "cuda/kernels/pdl.cuh"
#include "cuda/kernels/unit_mask.cuh"

#include <cuda_pipeline.h>

enum { WARPS = 8, IN_REGISTERS = 16 /* elements of a lane */, STAGES = 4, MAX_BLOCKS = 264 };
/* Shared memory of a block when two share a multiprocessor of an H100. */
enum { MAX_SHARED = 112 << 10 };

/* The elements of a row that a lane holds, in the type that memory holds. */
template <typename T, int N, int K> struct lane_row { vd_pack<T, N> at[K]; };
template <typename T, int N, int K> VD_GPU void read_row(const T *from, int lane, int d, lane_row<T, N, K> &row) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * 32 + lane) * N;
    if (c < d) row.at[k] = *(const vd_pack<T, N> *)(from + c);
  }
}

/* The elements of a vector of d weights that a lane needs: held in registers, or loaded at each use. */
template <int N, int K, bool HELD> struct lane_weights;
template <int N, int K> struct lane_weights<N, K, true> {
  float x[K][N];
  __device__ __forceinline__ lane_weights(const float *from, int lane, int d) {
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c < d) vd_read<float, N>(from + c, x[k]);
    }
  }
  __device__ __forceinline__ void get(int k, float out[N]) const {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = x[k][i];
  }
};
template <int N, int K> struct lane_weights<N, K, false> {
  const float *from;
  int lane;
  __device__ __forceinline__ lane_weights(const float *p, int l, int) : from(p), lane(l) {}
  __device__ __forceinline__ void get(int k, float out[N]) const { vd_read<float, N>(from + (k * 32 + lane) * N, out); }
};

/* Dropout of elements e .. e + N - 1, rounded. */
template <typename T, int N> VD_GPU void drop_pack(const vd_drop &drop, int64_t e, vd_pack<T, N> &x) {
  float v[N];
#pragma unroll
  for (int i = 0; i < N; i++) v[i] = vd_load(x.at[i]);
  vd_apply_drop<N>(drop, e, v);
#pragma unroll
  for (int i = 0; i < N; i++) vd_set(&x.at[i], v[i]);
}

/* sum = a + b, y = layer norm of sum; a warp computes a row at a time, N adjacent elements a lane in K chunks. DROP:
 * with dropout of b. DRAW: also the row's words of a mask. */
template <typename T, int N, int K, bool DROP, bool DRAW>
static __global__ void __launch_bounds__(WARPS * 32, K *N <= IN_REGISTERS ? 2 : 1)
    add_norm_kernel(int64_t n, int d, const T *a, const T *b, const float *weight, const float *bias, T *sum,
                    float *mean, float *rstd, T *y, const __grid_constant__ vd_drop drop,
                    const __grid_constant__ vd_unit_draws draws) {
  vd_pdl_wait();
  int lane = (int)threadIdx.x % 32;
  int64_t r = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, step = (int64_t)gridDim.x * WARPS;
  if (r >= n) return;
  lane_weights<N, K, (K * N <= IN_REGISTERS)> w(weight, lane, d), shift(bias, lane, d);
  lane_row<T, N, K> next_a, next_b;
  read_row<T, N, K>(a + r * d, lane, d, next_a);
  read_row<T, N, K>(b + r * d, lane, d, next_b);
  for (; r < n; r += step) {
    float x[K][N], total = 0, square = 0;
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c >= d) continue;
      if constexpr (DROP) drop_pack(drop, r * d + c, next_b.at[k]);
      vd_pack<T, N> rounded; /* backward reads the rounded sum, so mean and rstd are those of it */
#pragma unroll
      for (int i = 0; i < N; i++) {
        vd_set(&rounded.at[i], vd_load(next_a.at[k].at[i]) + vd_load(next_b.at[k].at[i]));
        x[k][i] = vd_load(rounded.at[i]);
        total += x[k][i];
      }
      *(vd_pack<T, N> *)(sum + r * d + c) = rounded;
    }
    if (r + step < n) {
      read_row<T, N, K>(a + (r + step) * d, lane, d, next_a);
      read_row<T, N, K>(b + (r + step) * d, lane, d, next_b);
    }
    for (int i = lane; DRAW && i < draws.width / 32; i += 32) vd_draw_unit_word(draws, r, i);
    float mu = vd_warp_sum(total) / (float)d;
#pragma unroll
    for (int k = 0; k < K; k++) {
      if ((k * 32 + lane) * N >= d) continue;
#pragma unroll
      for (int i = 0; i < N; i++) square += (x[k][i] - mu) * (x[k][i] - mu);
    }
    float scale = rsqrtf(vd_warp_sum(square) / (float)d + 1e-5f);
    if (lane == 0) {
      mean[r] = mu;
      rstd[r] = scale;
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c >= d) continue;
      float wk[N], bk[N];
      w.get(k, wk);
      shift.get(k, bk);
#pragma unroll
      for (int i = 0; i < N; i++) x[k][i] = (x[k][i] - mu) * scale * wk[i] + bk[i];
      vd_write<T, N>(y + r * d + c, x[k]);
    }
  }
}

/* Starts the async copy of a lane's elements of a row to shared memory, 16 bytes at a time; chunks shorter than that
 * are copied synchronously. */
template <typename T, int N, int K> VD_GPU void fetch_row(const T *from, int lane, int d, T *to) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * 32 + lane) * N;
    if (c >= d) continue;
    if constexpr (sizeof(T) * N >= 16) {
#pragma unroll
      for (int i = 0; i < N; i += 16 / (int)sizeof(T)) __pipeline_memcpy_async(to + c + i, from + c + i, 16);
    } else {
      *(vd_pack<T, N> *)(to + c) = *(const vd_pack<T, N> *)(from + c);
    }
  }
}

/* Starts the async copies of row r of dy and of sum to [dy, sum][d]. */
template <typename T, int N, int K>
VD_GPU void fetch_rows(const T *dy, const T *sum, int64_t r, int lane, int d, T *to) {
  fetch_row<T, N, K>(dy + r * d, lane, d, to);
  fetch_row<T, N, K>(sum + r * d, lane, d, to + d);
}

/* Adds the warps' column sums in order, through shared memory [WARPS][d], to the block's partial row. */
template <int N, int K> VD_GPU void write_partials(const float column[3][K][N], int d, float *sums, float *partial) {
  const int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
#pragma unroll
  for (int pass = 0; pass < 3; pass++) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c < d) vd_write<float, N>(sums + warp * d + c, column[pass][k]);
    }
    __syncthreads();
    for (int c = (int)threadIdx.x; c < d; c += WARPS * 32) {
      float total = 0;
      for (int i = 0; i < WARPS; i++) total += sums[i * d + c];
      partial[((int64_t)blockIdx.x * 3 + pass) * d + c] = total;
    }
  }
}

/* Each warp accumulates dweight, dbias and the column sums of dsum over its rows in registers; the block writes one
 * partial row of these three vectors. The sums fill the registers, so the next rows are prefetched to shared memory,
 * `stages` rows of [dy, sum][d] a warp. */
template <typename T, int N, int K>
static __global__ void __launch_bounds__(WARPS * 32, K *N <= IN_REGISTERS ? 2 : 1)
    add_norm_backward_kernel(int64_t n, int d, int stages, const T *sum, const float *mean, const float *rstd,
                             const float *weight, const T *dy, T *dsum, float *partial) {
  vd_pdl_wait();
  extern __shared__ __align__(128) char shared[]; /* weights [d]; then stages, at the end [WARPS][d] floats */
  float *held = (float *)shared, *sums = held + d;
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  int64_t first = (int64_t)blockIdx.x * WARPS + warp, step = (int64_t)gridDim.x * WARPS;
  T *stage = (T *)(held + d) + (int64_t)warp * stages * 2 * d;
  float column[3][K][N] = {}; /* dweight, dbias, column sums of dsum */
  for (int c = (int)threadIdx.x; c < d; c += WARPS * 32) held[c] = weight[c];
  for (int s = 0; s < stages; s++) {
    int64_t r = first + s * step;
    if (r < n) fetch_rows<T, N, K>(dy, sum, r, lane, d, stage + s * 2 * d);
    __pipeline_commit();
  }
  __syncthreads();
  int at = 0;
  float next_mu = first < n ? mean[first] : 0.0f, next_scale = first < n ? rstd[first] : 0.0f;
  for (int64_t r = first; r < n; r += step) {
    T *mine = stage + at * 2 * d;
    float g[K][N], xhat[K][N], m1 = 0, m2 = 0, mu = next_mu, scale = next_scale;
    if (r + step < n) {
      next_mu = mean[r + step];
      next_scale = rstd[r + step];
    }
    if (stages == STAGES) {
      __pipeline_wait_prior(STAGES - 1);
    } else {
      __pipeline_wait_prior(0);
    }
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c >= d) continue;
      float wk[N];
      vd_read<float, N>(held + c, wk);
      vd_read<T, N>(mine + c, g[k]);
      vd_read<T, N>(mine + d + c, xhat[k]);
#pragma unroll
      for (int i = 0; i < N; i++) {
        xhat[k][i] = (xhat[k][i] - mu) * scale;
        column[0][k][i] += g[k][i] * xhat[k][i];
        column[1][k][i] += g[k][i];
        g[k][i] *= wk[i];
        m1 += g[k][i];
        m2 += g[k][i] * xhat[k][i];
      }
    }
    int64_t next = r + stages * step;
    if (next < n) fetch_rows<T, N, K>(dy, sum, next, lane, d, mine);
    __pipeline_commit();
    at = at + 1 == stages ? 0 : at + 1;
    m1 = vd_warp_sum(m1) / (float)d;
    m2 = vd_warp_sum(m2) / (float)d;
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c >= d) continue;
#pragma unroll
      for (int i = 0; i < N; i++) {
        g[k][i] = scale * (g[k][i] - m1 - xhat[k][i] * m2);
        column[2][k][i] += g[k][i];
      }
      vd_write<T, N>(dsum + r * d + c, g[k]);
    }
  }
  write_partials<N, K>(column, d, sums, partial);
}

/* The sum of the x of a block's threads, in every thread. part: shared, [WARPS]. */
VD_GPU float block_sum(float x, float *part) {
  x = vd_warp_sum(x);
  __syncthreads(); /* the sums of the call before have been read */
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < WARPS; w++) total += part[w];
  return total;
}

/* As add_norm_kernel, with and without dropout; a block computes a row at a time, N adjacent elements a thread. */
template <typename T, int N>
static __global__ void __launch_bounds__(WARPS * 32)
    wide_add_norm_kernel(int64_t n, int d, const T *a, const T *b, const float *weight, const float *bias, T *sum,
                         float *mean, float *rstd, T *y, const __grid_constant__ vd_drop drop,
                         const __grid_constant__ vd_unit_draws draws) {
  vd_pdl_wait();
  __shared__ float part[WARPS];
  const int c0 = (int)threadIdx.x * N, step = WARPS * 32 * N;
  for (int64_t r = blockIdx.x; r < n; r += gridDim.x) {
    T *mine = sum + r * d;
    float x[N], w[N], shift[N], total = 0, square = 0;
    for (int c = c0; c < d; c += step) {
      vd_pack<T, N> other = *(const vd_pack<T, N> *)(b + r * d + c), rounded;
      if (drop.threshold > 0) drop_pack(drop, r * d + c, other);
      vd_read<T, N>(a + r * d + c, x);
#pragma unroll
      for (int i = 0; i < N; i++) {
        vd_set(&rounded.at[i], x[i] + vd_load(other.at[i]));
        total += vd_load(rounded.at[i]);
      }
      *(vd_pack<T, N> *)(mine + c) = rounded;
    }
    for (int i = (int)threadIdx.x; i < draws.width / 32; i += WARPS * 32) vd_draw_unit_word(draws, r, i);
    float mu = block_sum(total, part) / (float)d;
    for (int c = c0; c < d; c += step) {
      vd_read<T, N>(mine + c, x);
#pragma unroll
      for (int i = 0; i < N; i++) square += (x[i] - mu) * (x[i] - mu);
    }
    float scale = rsqrtf(block_sum(square, part) / (float)d + 1e-5f);
    if (threadIdx.x == 0) {
      mean[r] = mu;
      rstd[r] = scale;
    }
    for (int c = c0; c < d; c += step) {
      vd_read<T, N>(mine + c, x);
      vd_read<float, N>(weight + c, w);
      vd_read<float, N>(bias + c, shift);
#pragma unroll
      for (int i = 0; i < N; i++) x[i] = (x[i] - mu) * scale * w[i] + shift[i];
      vd_write<T, N>(y + r * d + c, x);
    }
  }
}

/* to[0 .. N - 1] += x, or = x where `first`. */
template <int N> VD_GPU void add_columns(float *to, bool first, const float x[N]) {
  float total[N] = {};
  if (!first) vd_read<float, N>(to, total);
#pragma unroll
  for (int i = 0; i < N; i++) total[i] += x[i];
  vd_write<float, N>(to, total);
}

/* As add_norm_backward_kernel; a block computes a row at a time. */
template <typename T, int N>
static __global__ void __launch_bounds__(WARPS * 32)
    wide_add_norm_backward_kernel(int64_t n, int d, const T *sum, const float *mean, const float *rstd,
                                  const float *weight, const T *dy, T *dsum, float *partial) {
  vd_pdl_wait();
  __shared__ float part[WARPS];
  const int c0 = (int)threadIdx.x * N, step = WARPS * 32 * N;
  float *column = partial + (int64_t)blockIdx.x * 3 * d;
  for (int64_t r = blockIdx.x; r < n; r += gridDim.x) {
    const bool first = r == blockIdx.x;
    const float mu = mean[r], scale = rstd[r];
    float g[N], x[N], w[N], m1 = 0, m2 = 0;
    for (int c = c0; c < d; c += step) {
      vd_read<T, N>(dy + r * d + c, g);
      vd_read<T, N>(sum + r * d + c, x);
      vd_read<float, N>(weight + c, w);
      add_columns<N>(column + d + c, first, g);
#pragma unroll
      for (int i = 0; i < N; i++) {
        x[i] = g[i] * ((x[i] - mu) * scale);
        m1 += g[i] * w[i];
        m2 += x[i] * w[i];
      }
      add_columns<N>(column + c, first, x);
    }
    m1 = block_sum(m1, part) / (float)d;
    m2 = block_sum(m2, part) / (float)d;
    for (int c = c0; c < d; c += step) {
      vd_read<T, N>(dy + r * d + c, g);
      vd_read<T, N>(sum + r * d + c, x);
      vd_read<float, N>(weight + c, w);
#pragma unroll
      for (int i = 0; i < N; i++) g[i] = scale * (g[i] * w[i] - m1 - (x[i] - mu) * scale * m2);
      add_columns<N>(column + 2 * d + c, first, g);
      vd_write<T, N>(dsum + r * d + c, g);
    }
  }
}

/* Selects the instance for a width: CALL(T, elements of a chunk, chunks of a lane), or WIDE(T, elements of a chunk). */
#define BY_WIDTH(T, d, CALL, WIDE)                                                                                     \
  if ((d) % 8 == 0 && (d) <= 256) {                                                                                    \
    CALL(T, 8, 1);                                                                                                     \
  } else if ((d) % 8 == 0 && (d) <= 512) {                                                                             \
    CALL(T, 8, 2);                                                                                                     \
  } else if ((d) % 8 == 0 && (d) <= 1024) {                                                                            \
    CALL(T, 8, 4);                                                                                                     \
  } else if ((d) % 8 == 0 && (d) <= 2048) {                                                                            \
    CALL(T, 8, 8);                                                                                                     \
  } else if ((d) % 8 == 0) {                                                                                           \
    WIDE(T, 8);                                                                                                        \
  } else if ((d) <= 128) {                                                                                             \
    CALL(T, 1, 4);                                                                                                     \
  } else {                                                                                                             \
    WIDE(T, 1);                                                                                                        \
  }

static unsigned norm_blocks(int64_t n) {
  unsigned blocks = vd_blocks(n, WARPS);
  return blocks < MAX_BLOCKS ? blocks : (unsigned)MAX_BLOCKS;
}

cudaError_t vd_cuda_add_norm(enum vd_precision type, int64_t n, int64_t d, const void *a, const void *b,
                             const vd_dropout *dropped, const float *weight, const float *bias, void *sum, float *mean,
                             float *rstd, void *y, const vd_unit_mask *mask, cudaStream_t stream) {
  unsigned blocks = norm_blocks(n);
  const bool drops = dropped && dropped->p > 0;
  const vd_drop drop = drops ? vd_make_drop(dropped, d) : (vd_drop){};
  const vd_unit_draws draws = vd_make_unit_draws(mask);
  cudaError_t e;
  if (mask && (type == VD_FP32 || d % 8 != 0 || mask->n != n)) return cudaErrorInvalidValue;
#define WIDTH(T, N, K)                                                                                                 \
  constexpr bool DRAWS = sizeof(T) == 2 && N == 8;                                                                     \
  auto kernel = drops  ? add_norm_kernel<T, N, K, true, DRAWS>                                                         \
                : mask ? add_norm_kernel<T, N, K, false, DRAWS>                                                        \
                       : add_norm_kernel<T, N, K, false, false>;                                                       \
  e = vd_launch_pdl(kernel, blocks, WARPS * 32, 0, stream, n, (int)d, (const T *)a, (const T *)b, weight, bias,        \
                    (T *)sum, mean, rstd, (T *)y, drop, draws)
#define WIDE(T, N)                                                                                                     \
  e = vd_launch_pdl(wide_add_norm_kernel<T, N>, blocks, WARPS * 32, 0, stream, n, (int)d, (const T *)a, (const T *)b,  \
                    weight, bias, (T *)sum, mean, rstd, (T *)y, drop, draws)
#define CALL(T) BY_WIDTH(T, d, WIDTH, WIDE)
  VD_BY_TYPE(type, CALL);
#undef CALL
#undef WIDE
#undef WIDTH
  return e;
}

int64_t vd_cuda_norm_partials(int64_t n) {
  return norm_blocks(n);
}

cudaError_t vd_cuda_add_norm_backward(enum vd_precision type, int64_t n, int64_t d, const void *sum, const float *mean,
                                      const float *rstd, const float *weight, const void *dy, void *dsum,
                                      float *partial, cudaStream_t stream) {
  unsigned blocks = norm_blocks(n);
  size_t size = type == VD_FP32 ? 4 : 2, row = 2 * (size_t)d * size * WARPS, weights = (size_t)d * sizeof(float);
  int stages = weights + row * STAGES <= MAX_SHARED ? STAGES : 1;
  cudaError_t e = cudaSuccess;
  size_t sums = WARPS * weights, shared = weights + (row * stages > sums ? row * stages : sums);
#define WIDTH(T, N, K)                                                                                                 \
  cudaFuncSetAttribute(add_norm_backward_kernel<T, N, K>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);   \
  e = vd_launch_pdl(add_norm_backward_kernel<T, N, K>, blocks, WARPS * 32, shared, stream, n, (int)d, stages,          \
                    (const T *)sum, mean, rstd, weight, (const T *)dy, (T *)dsum, partial)
#define WIDE(T, N)                                                                                                     \
  e = vd_launch_pdl(wide_add_norm_backward_kernel<T, N>, blocks, WARPS * 32, 0, stream, n, (int)d, (const T *)sum,     \
                    mean, rstd, weight, (const T *)dy, (T *)dsum, partial)
#define CALL(T) BY_WIDTH(T, d, WIDTH, WIDE)
  VD_BY_TYPE(type, CALL);
#undef CALL
#undef WIDE
#undef WIDTH
  return e;
}
