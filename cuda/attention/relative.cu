/* Relative keys and query biases around the attention kernels: those multiply queries with u added and start
 * position scores with (v - u).r(x), which gives (q + u).k + (q + v).r. All kernels here are bound by memory
 * bandwidth. */
#include "cuda/attention/bwd_common.cuh"

/* bias_scores[h, x] = (v - u).r(x), zero without biases. Eight lanes share a distance of a head. */
template <typename T> __global__ void bias_scores_kernel(const __grid_constant__ vd_cuda_attention a) {
  int64_t id = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 8;
  int head = (int)(id % a.n_head), x = (int)(id / a.n_head), lane = (int)threadIdx.x % 8;
  float sum = 0;
  for (int c = head * a.d_head + lane; a.content_bias && x <= a.reach && c < (head + 1) * a.d_head; c += 8)
    sum += (a.position_bias[c] - a.content_bias[c]) * (float)((const T *)a.rel_key)[(int64_t)x * a.rel_stride + c];
  for (int m = 4; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffU, sum, m);
  if (x <= a.reach && lane == 0) a.bias_scores[(int64_t)head * (a.reach + 1) + x] = sum;
}

template <typename T> static void launch_bias_scores(const vd_cuda_attention *a, cudaStream_t stream) {
  int64_t lanes = (int64_t)a->n_head * (a->reach + 1) * 8;
  bias_scores_kernel<T><<<(unsigned)((lanes + 255) / 256), 256, 0, stream>>>(*a);
}

cudaError_t vd_fill_bias_scores(const vd_cuda_attention *a, cudaStream_t stream) {
  if (a->type == VD_FP32) {
    launch_bias_scores<float>(a, stream);
  } else if (a->type == VD_BF16) {
    launch_bias_scores<__nv_bfloat16>(a, stream);
  } else {
    launch_bias_scores<__half>(a, stream);
  }
  return cudaGetLastError();
}

/* to = q + u for the queries of the block, 16 bytes a thread; sum[0 .. n_sum - 1] = 0. */
template <typename T>
__global__ void add_content_bias_kernel(const __grid_constant__ vd_cuda_attention a, const T *block, T *to, float *sum,
                                        int n_sum) {
  constexpr int chunk = 16 / (int)sizeof(T);
  int64_t id = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  int chunks = a.n_head * a.d_head / chunk, column = (int)(id % chunks) * chunk;
  if (id < n_sum) sum[id] = 0;
  if (id / chunks >= (int64_t)a.n_stream * a.block) return;
  int64_t row = id / chunks * vd_width(a);
  uint4 x = *(const uint4 *)(block + 3 * row + column);
  T *e = (T *)&x;
#pragma unroll
  for (int i = 0; i < chunk; i++) e[i] = (T)((float)e[i] + (a.content_bias ? a.content_bias[column + i] : 0));
  *(uint4 *)(to + row + column) = x;
}

template <typename T>
static void launch_add_content_bias(const vd_cuda_attention *a, const void *block, const vd_backward_workspace *ws,
                                    cudaStream_t stream) {
  int64_t n = (int64_t)a->n_stream * a->block * a->n_head * a->d_head * (int64_t)sizeof(T) / 16;
  int n_sum = a->n_head * (a->reach + 1);
  if (ws->dtable) /* which follows dsum */
    n_sum = (int)(ws->dtable - ws->dsum) + a->n_head * vd_table_blocks(a->reach) * VD_TILE * VD_TILE;
  n = n < n_sum ? n_sum : n;
  add_content_bias_kernel<T>
      <<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(*a, (const T *)block, (T *)ws->query, ws->dsum, n_sum);
}

cudaError_t vd_relative_begin(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_workspace *ws, cudaStream_t stream) {
  cudaError_t e = vd_fill_bias_scores(a, stream);
  if (e != cudaSuccess) return e;
  if (a->type == VD_FP32) {
    launch_add_content_bias<float>(a, g->block, ws, stream);
  } else if (a->type == VD_BF16) {
    launch_add_content_bias<__nv_bfloat16>(a, g->block, ws, stream);
  } else {
    launch_add_content_bias<__half>(a, g->block, ws, stream);
  }
  return cudaGetLastError();
}

/* The element of distance x and column c of a head, 0 <= c < 64, in the order of vd_add_table_block(). */
VD_DEV float table_element(const float *dtable, int x, int c) {
  const int b = vd_ceil_div(x, VD_TILE), row = b * VD_TILE - x;
  const int lane = 4 * (row & 7) + (c & 7) / 2, k = 2 * (row >> 3 & 1) + (c & 1);
  return dtable[(((int64_t)b * 8 + c / 8) * VD_WARPGROUP + 32 * (row / 16) + lane) * 4 + k];
}
/* drel[x, h] += sum[h, x] (v - u) and, where dtable is not NULL, the share of q + u; else the dQ kernel has added it.
 */
__global__ void drel_key_kernel(const __grid_constant__ vd_cuda_attention a, const float *sum, const float *dtable,
                                float *drel) {
  int width = a.n_head * a.d_head;
  int64_t id = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, x = id / width;
  int c = (int)(id % width), head = c / a.d_head;
  if (x > a.reach) return;
  float add = 0;
  if (a.content_bias) add = sum[head * (int64_t)(a.reach + 1) + x] * (a.position_bias[c] - a.content_bias[c]);
  if (dtable)
    add += table_element(dtable + (int64_t)head * vd_table_blocks(a.reach) * VD_TILE * VD_TILE, (int)x, c % a.d_head);
  drel[x * a.rel_stride + c] += add;
}

/* dcontent_bias and dposition_bias += sums over streams and query tiles, in a fixed order. A block has 32 of a
 * head's 2 d_head columns; each of its eight warps adds every eighth query tile of the head. */
__global__ void dbias_kernel(const __grid_constant__ vd_cuda_attention a, int n_tile, const float *tile_id,
                             float *dcontent, float *dposition) {
  __shared__ float sums[8][32];
  int head = (int)blockIdx.x, column = (int)(blockIdx.y * 32 + threadIdx.x), width = 2 * a.d_head;
  int64_t n = (int64_t)a.n_stream * n_tile;
  float sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.y; i < n; i += 8)
    if (column < width) sum += tile_id[((i / n_tile * a.n_head + head) * n_tile + i % n_tile) * width + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
  float *to = column < a.d_head ? dcontent + column : dposition + column - a.d_head;
  to[head * a.d_head] += sum;
}

cudaError_t vd_relative_end(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_workspace *ws, cudaStream_t stream) {
  if (!a->content_bias && !ws->dtable) return cudaSuccess;
  int64_t n = (int64_t)(a->reach + 1) * a->n_head * a->d_head;
  dim3 blocks((unsigned)a->n_head, (unsigned)vd_ceil_div(2 * a->d_head, 32)), threads(32, 8);
  drel_key_kernel<<<(unsigned)((n + 255) / 256), 256, 0, stream>>>(*a, ws->dsum, ws->dtable, g->drel_key);
  if (a->content_bias && g->dcontent_bias)
    dbias_kernel<<<blocks, threads, 0, stream>>>(*a, vd_ceil_div(a->block, VD_TILE), ws->dbias, g->dcontent_bias,
                                                 g->dposition_bias);
  return cudaGetLastError();
}
