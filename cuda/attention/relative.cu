/* Relative keys and query biases around the attention kernels: those multiply queries with u added and start
 * position scores with (v - u).r(x), which gives (q + u).k + (q + v).r. All kernels here are bound by memory bandwidth;
 * their indices have 32 bits where they are divided, since a division of 64 bits takes longer than the memory. */
#include "cuda/attention/bwd_common.cuh"

/* bias_scores[h, x] = (v - u).r(x), zero without biases. Eight lanes share a distance of a head. */
template <typename T> __global__ void bias_scores_kernel(const __grid_constant__ vd_cuda_attention a) {
  const unsigned id = (blockIdx.x * blockDim.x + threadIdx.x) / 8;
  const int head = (int)(id % (unsigned)a.n_head), x = (int)(id / (unsigned)a.n_head), lane = (int)threadIdx.x % 8;
  float sum = 0;
  vd_pdl_wait();
  for (int c = head * a.d_head + lane; a.content_bias && x <= a.reach && c < (head + 1) * a.d_head; c += 8)
    sum += (a.position_bias[c] - a.content_bias[c]) * (float)((const T *)a.rel_key)[(int64_t)x * a.rel_stride + c];
  for (int m = 4; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffU, sum, m);
  if (x <= a.reach && lane == 0) a.bias_scores[(int64_t)head * (a.reach + 1) + x] = sum;
}

cudaError_t vd_fill_bias_scores(const vd_cuda_attention *a, cudaStream_t stream) {
  const int64_t lanes = (int64_t)a->n_head * (a->reach + 1) * 8;
  auto kernel = a->type == VD_FP32   ? bias_scores_kernel<float>
                : a->type == VD_BF16 ? bias_scores_kernel<__nv_bfloat16>
                                     : bias_scores_kernel<__half>;
  return vd_launch_pdl(kernel, (unsigned)((lanes + 255) / 256), 256, 0, stream, *a);
}

/* to = q + u for the queries of the block, 16 bytes a thread; block (x, y) has rows of stream y. Zeros sum [n_sum]. */
template <typename T>
__global__ void add_content_bias_kernel(const __grid_constant__ vd_cuda_attention a, const T *block, T *to, float *sum,
                                        int n_sum) {
  constexpr int chunk = 16 / (int)sizeof(T);
  const unsigned id = blockIdx.x * blockDim.x + threadIdx.x, chunks = (unsigned)(a.n_head * a.d_head / chunk);
  const int row = (int)(id / chunks), column = (int)(id % chunks) * chunk;
  vd_pdl_wait();
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = blockIdx.y * threads + id; i < n_sum; i += threads * gridDim.y) sum[i] = 0;
  if (row >= a.block) return;
  const int64_t first = ((int64_t)blockIdx.y * a.block + row) * vd_width(a);
  uint4 x = *(const uint4 *)(block + 3 * first + column);
  T *e = (T *)&x;
#pragma unroll
  for (int i = 0; i < chunk; i++) e[i] = (T)((float)e[i] + (a.content_bias ? a.content_bias[column + i] : 0));
  *(uint4 *)(to + first + column) = x;
}

template <typename T>
static cudaError_t launch_add_content_bias(const vd_cuda_attention *a, const void *block,
                                           const vd_backward_workspace *ws, cudaStream_t stream) {
  const int chunks = a->block * a->n_head * a->d_head / (16 / (int)sizeof(T));
  int n_sum = a->n_head * (a->reach + 1);
  if (ws->dtable) /* which follows dsum */
    n_sum = (int)(ws->dtable - ws->dsum) + a->n_head * vd_table_blocks(a->reach) * VD_TILE * VD_TILE;
  const dim3 blocks((unsigned)vd_ceil_div(chunks, 256), (unsigned)a->n_stream);
  return vd_launch_pdl(add_content_bias_kernel<T>, blocks, 256, 0, stream, *a, (const T *)block, (T *)ws->query,
                       ws->dsum, n_sum);
}

cudaError_t vd_relative_begin(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_workspace *ws, cudaStream_t stream) {
  cudaError_t e = vd_fill_bias_scores(a, stream);
  if (e != cudaSuccess) return e;
  if (a->type == VD_FP32) return launch_add_content_bias<float>(a, g->block, ws, stream);
  if (a->type == VD_BF16) return launch_add_content_bias<__nv_bfloat16>(a, g->block, ws, stream);
  return launch_add_content_bias<__half>(a, g->block, ws, stream);
}

/* The element of distance x and column c of a head, 0 <= c < 64, in the order of vd_add_table_block(). */
VD_DEV float table_element(const float *dtable, int x, int c) {
  const int b = vd_ceil_div(x, VD_TILE), row = b * VD_TILE - x;
  const int lane = 4 * (row & 7) + (c & 7) / 2, k = 2 * (row >> 3 & 1) + (c & 1);
  return dtable[(((int64_t)b * 8 + c / 8) * VD_WARPGROUP + 32 * (row / 16) + lane) * 4 + k];
}
/* drel[x, h] += sum[h, x] (v - u) and, where dtable is not NULL, the share of q + u; else the dQ kernel has added it.
 * Block (x, y) has 256 columns of distance x. */
__global__ void drel_key_kernel(const __grid_constant__ vd_cuda_attention a, const float *sum, const float *dtable,
                                float *drel) {
  const int x = (int)blockIdx.x, c = (int)(blockIdx.y * blockDim.x + threadIdx.x), head = c / a.d_head;
  float add = 0;
  vd_pdl_wait();
  if (c >= vd_width(a)) return;
  if (a.content_bias) add = sum[head * (int64_t)(a.reach + 1) + x] * (a.position_bias[c] - a.content_bias[c]);
  if (dtable)
    add += table_element(dtable + (int64_t)head * vd_table_blocks(a.reach) * VD_TILE * VD_TILE, x, c % a.d_head);
  drel[x * a.rel_stride + c] += add;
}

/* dcontent_bias and dposition_bias += sums over streams and query tiles, in a fixed order. A block has 32 of a
 * head's 2 d_head columns; each of its 32 warps adds every 32nd query tile of the head. */
enum { DBIAS_WARPS = 32 };
__global__ void dbias_kernel(const __grid_constant__ vd_cuda_attention a, int n_tile, const float *tile_id,
                             float *dcontent, float *dposition) {
  __shared__ float sums[DBIAS_WARPS][32];
  const int head = (int)blockIdx.x, column = (int)(blockIdx.y * 32 + threadIdx.x), width = 2 * a.d_head;
  const unsigned n = (unsigned)(a.n_stream * n_tile), tiles = (unsigned)n_tile;
  float sum = 0;
  vd_pdl_wait();
#pragma unroll 8
  for (unsigned i = threadIdx.y; i < n; i += DBIAS_WARPS)
    if (column < width)
      sum +=
          tile_id[((int64_t)(i / tiles * (unsigned)a.n_head + (unsigned)head) * n_tile + i % tiles) * width + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= width) return;
  for (int i = 1; i < DBIAS_WARPS; i++) sum += sums[i][threadIdx.x];
  float *to = column < a.d_head ? dcontent + column : dposition + column - a.d_head;
  to[head * a.d_head] += sum;
}

cudaError_t vd_relative_end(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_workspace *ws, cudaStream_t stream) {
  if (!a->content_bias && !ws->dtable) return cudaSuccess;
  const dim3 distances((unsigned)a->reach + 1, (unsigned)vd_ceil_div(a->n_head * a->d_head, 256));
  const dim3 columns((unsigned)a->n_head, (unsigned)vd_ceil_div(2 * a->d_head, 32)), threads(32, DBIAS_WARPS);
  cudaError_t e = vd_launch_pdl(drel_key_kernel, distances, 256, 0, stream, *a, (const float *)ws->dsum,
                                (const float *)ws->dtable, g->drel_key);
  if (e != cudaSuccess || !a->content_bias || !g->dcontent_bias) return e;
  return vd_launch_pdl(dbias_kernel, columns, threads, 0, stream, *a, vd_ceil_div(a->block, VD_TILE),
                       (const float *)ws->dbias, g->dcontent_bias, g->dposition_bias);
}
