/* Residual sum and layer norm: a warp a row, the row in registers (K chunks of N elements a lane). */
#include "element.cuh"

enum { VD_WARPS = 8 };

VD_GPU float vd_warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffU, x, i);
  return x;
}

template <typename T, int N, int K>
__global__ void vd_add_norm_kernel(int64_t n, int d, const T *a, const T *b, const float *weight, const float *bias,
                                   T *sum, float *mean, float *rstd, T *y) {
  int lane = (int)threadIdx.x % 32;
  int64_t r = (int64_t)blockIdx.x * VD_WARPS + threadIdx.x / 32;
  if (r >= n) return;
  float x[K][N], total = 0, square = 0;
#pragma unroll
  for (int k = 0; k < K; k++) {
    int c = (k * 32 + lane) * N;
    if (c >= d) continue;
    float other[N];
    vd_read<T, N>(a + r * d + c, x[k]);
    vd_read<T, N>(b + r * d + c, other);
    T rounded[N]; /* backward reads the sum as it is stored: the statistics are of that too */
#pragma unroll
    for (int i = 0; i < N; i++) {
      vd_set(&rounded[i], x[k][i] + other[i]);
      x[k][i] = vd_load(rounded[i]);
      total += x[k][i];
    }
    vd_write<T, N>(sum + r * d + c, x[k]);
  }
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
#pragma unroll
    for (int i = 0; i < N; i++) x[k][i] = (x[k][i] - mu) * scale * weight[c + i] + bias[c + i];
    vd_write<T, N>(y + r * d + c, x[k]);
  }
}

/* With g = dy * weight and xhat = (sum - mean) rstd: dsum = rstd (g - mean(g) - xhat mean(g xhat)). Each warp keeps its
 * rows' share of dweight and dbias and the block leaves one partial row: [blocks, 2 d]. */
template <typename T, int N, int K>
__global__ void vd_add_norm_backward_kernel(int64_t n, int d, const T *sum, const float *mean, const float *rstd,
                                            const float *weight, const T *dy, T *dsum, float *partial) {
  extern __shared__ float shared[]; /* [VD_WARPS][d] */
  int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
  float dw[K][N] = {{0}}, db[K][N] = {{0}};
  for (int64_t r = (int64_t)blockIdx.x * VD_WARPS + warp; r < n; r += (int64_t)gridDim.x * VD_WARPS) {
    float g[K][N], xhat[K][N], m1 = 0, m2 = 0, mu = mean[r], scale = rstd[r];
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c >= d) continue;
      vd_read<T, N>(dy + r * d + c, g[k]);
      vd_read<T, N>(sum + r * d + c, xhat[k]);
#pragma unroll
      for (int i = 0; i < N; i++) {
        xhat[k][i] = (xhat[k][i] - mu) * scale;
        dw[k][i] += g[k][i] * xhat[k][i];
        db[k][i] += g[k][i];
        g[k][i] *= weight[c + i];
        m1 += g[k][i];
        m2 += g[k][i] * xhat[k][i];
      }
    }
    m1 = vd_warp_sum(m1) / (float)d;
    m2 = vd_warp_sum(m2) / (float)d;
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c >= d) continue;
#pragma unroll
      for (int i = 0; i < N; i++) g[k][i] = scale * (g[k][i] - m1 - xhat[k][i] * m2);
      vd_write<T, N>(dsum + r * d + c, g[k]);
    }
  }
  for (int pass = 0; pass < 2; pass++) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) {
      int c = (k * 32 + lane) * N;
      if (c >= d) continue;
#pragma unroll
      for (int i = 0; i < N; i++) shared[warp * d + c + i] = pass ? db[k][i] : dw[k][i];
    }
    __syncthreads();
    for (int c = (int)threadIdx.x; c < d; c += VD_WARPS * 32) {
      float total = 0;
      for (int w = 0; w < VD_WARPS; w++) total += shared[w * d + c];
      partial[(int64_t)blockIdx.x * 2 * d + pass * d + c] = total;
    }
  }
}

/* dweight, dbias [d] += the sums of partial's columns [rows, 2 d]. */
static __global__ void vd_norm_partials_kernel(int rows, int d, const float *partial, float *dweight, float *dbias) {
  __shared__ float lane[8][33];
  int c = (int)(blockIdx.x * 32 + threadIdx.x);
  float mine = 0;
  if (c < 2 * d)
    for (int r = (int)threadIdx.y; r < rows; r += 8) mine += partial[(int64_t)r * 2 * d + c];
  lane[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.y > 0 || c >= 2 * d) return;
  float total = 0;
  for (int i = 0; i < 8; i++) total += lane[i][threadIdx.x];
  if (c < d) {
    dweight[c] += total;
  } else {
    dbias[c - d] += total;
  }
}

/* Picks the number of chunks: CALL(T, elements of a chunk, chunks). */
#define VD_BY_WIDTH(T, d, CALL)                                                                                        \
  if ((d) % 8 == 0 && (d) <= 256) {                                                                                    \
    CALL(T, 8, 1);                                                                                                     \
  } else if ((d) % 8 == 0 && (d) <= 512) {                                                                             \
    CALL(T, 8, 2);                                                                                                     \
  } else if ((d) % 8 == 0 && (d) <= 1024) {                                                                            \
    CALL(T, 8, 4);                                                                                                     \
  } else if ((d) % 8 == 0 && (d) <= 2048) {                                                                            \
    CALL(T, 8, 8);                                                                                                     \
  } else if ((d) <= 128) {                                                                                             \
    CALL(T, 1, 4);                                                                                                     \
  } else if ((d) <= 1024) {                                                                                            \
    CALL(T, 1, 32);                                                                                                    \
  } else {                                                                                                             \
    return cudaErrorInvalidValue;                                                                                      \
  }

cudaError_t vd_cuda_add_norm(enum vd_cuda_type type, int64_t n, int64_t d, const void *a, const void *b,
                             const float *weight, const float *bias, void *sum, float *mean, float *rstd, void *y,
                             cudaStream_t stream) {
  unsigned blocks = vd_blocks(n, VD_WARPS);
#define WIDTH(T, N, K)                                                                                                 \
  vd_add_norm_kernel<T, N, K><<<blocks, VD_WARPS * 32, 0, stream>>>(n, (int)d, (const T *)a, (const T *)b, weight,     \
                                                                    bias, (T *)sum, mean, rstd, (T *)y)
#define CALL(T) VD_BY_WIDTH(T, d, WIDTH)
  VD_BY_TYPE(type, CALL);
#undef CALL
#undef WIDTH
  return cudaGetLastError();
}

cudaError_t vd_cuda_add_norm_backward(enum vd_cuda_type type, int64_t n, int64_t d, const void *sum, const float *mean,
                                      const float *rstd, const float *weight, const void *dy, void *dsum,
                                      float *dweight, float *dbias, float *workspace, cudaStream_t stream) {
  enum { MOST = 264 }; /* two blocks on each of an H100's multiprocessors */
  unsigned blocks = vd_blocks(n, VD_WARPS) < MOST ? vd_blocks(n, VD_WARPS) : MOST;
  size_t shared = VD_WARPS * (size_t)d * sizeof(float);
#define WIDTH(T, N, K)                                                                                                 \
  cudaFuncSetAttribute(vd_add_norm_backward_kernel<T, N, K>, cudaFuncAttributeMaxDynamicSharedMemorySize,              \
                       (int)shared);                                                                                   \
  vd_add_norm_backward_kernel<T, N, K><<<blocks, VD_WARPS * 32, shared, stream>>>(                                     \
      n, (int)d, (const T *)sum, mean, rstd, weight, (const T *)dy, (T *)dsum, workspace)
#define CALL(T) VD_BY_WIDTH(T, d, WIDTH)
  VD_BY_TYPE(type, CALL);
#undef CALL
#undef WIDTH
  vd_norm_partials_kernel<<<vd_blocks(2 * d, 32), dim3(32, 8), 0, stream>>>((int)blocks, (int)d, workspace, dweight,
                                                                            dbias);
  return cudaGetLastError();
}
