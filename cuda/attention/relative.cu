/* Relative keys and query biases around the attention kernels. The mma kernels multiply queries with u added and start
 * position scores with (v - u).r(x), which gives (q + u).k + (q + v).r; the wgmma kernels hold both q + u and q + v.
 * All kernels here are bound by memory bandwidth; their indices have 32 bits where they are divided, since a division
 * of 64 bits takes longer than the memory. */
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

/* to = q + u for the queries of the block, 16 bytes a thread; block (x, y) has rows of stream y. */
template <typename T>
__global__ void add_content_bias_kernel(const __grid_constant__ vd_cuda_attention a, const T *block, T *to) {
  constexpr int chunk = 16 / (int)sizeof(T);
  const unsigned id = blockIdx.x * blockDim.x + threadIdx.x, chunks = (unsigned)(a.n_head * a.d_head / chunk);
  const int row = (int)(id / chunks), column = (int)(id % chunks) * chunk;
  vd_pdl_wait();
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
  const dim3 blocks((unsigned)vd_ceil_div(chunks, 256), (unsigned)a->n_stream);
  return vd_launch_pdl(add_content_bias_kernel<T>, blocks, 256, 0, stream, *a, (const T *)block, (T *)ws->query);
}

cudaError_t vd_relative_begin(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_workspace *ws, cudaStream_t stream) {
  cudaError_t e = vd_fill_bias_scores(a, stream);
  if (e != cudaSuccess) return e;
  if (a->type == VD_FP32) return launch_add_content_bias<float>(a, g->block, ws, stream);
  if (a->type == VD_BF16) return launch_add_content_bias<__nv_bfloat16>(a, g->block, ws, stream);
  return launch_add_content_bias<__half>(a, g->block, ws, stream);
}

/* Operands of drel_key_kernel: score gradients by distance, the table's gradient, and what they are added to; dcontent
 * NULL: not to biases. */
typedef struct relative_sums {
  const float *dsum, *dtable;
  float *drel, *dcontent, *dposition;
} relative_sums;

/* The element of distance x and column c of a head, 0 <= c < 64, in the order of vd_add_table_block(). */
VD_DEV float table_element(const float *dtable, int x, int c) {
  const int b = vd_ceil_div(x, VD_TILE), row = b * VD_TILE - x;
  const int lane = 4 * (row & 7) + (c & 7) / 2, k = 2 * (row >> 3 & 1) + (c & 1);
  return dtable[(((int64_t)b * 8 + c / 8) * VD_WARPGROUP + 32 * (row / 16) + lane) * 4 + k];
}
/* drel[x, h] += the sum over pairs at distance x of ds (q + v). dtable: the share of q, and dsum[h, x] v is added;
 * NULL: the mma kernel has added that of q + u, and dsum[h, x] (v - u) is. The sums over x of dsum[h, x] r(x) are dq's
 * share of position scores: dposition_bias += them, dcontent_bias -= them. Block (x, y) has 256 columns of DISTANCES
 * distances. */
enum { DISTANCES = 8 };
template <typename T>
__global__ void drel_key_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ relative_sums to) {
  const int x0 = (int)blockIdx.x * DISTANCES, c = (int)(blockIdx.y * blockDim.x + threadIdx.x), head = c / a.d_head;
  const int64_t place = (int64_t)head * vd_table_blocks(a.reach) * VD_TILE * VD_TILE;
  float bias = 0, position = 0, drel[DISTANCES];
  vd_pdl_wait();
  if (c >= vd_width(a)) return;
  if (a.content_bias) bias = a.position_bias[c] - (to.dtable ? 0 : a.content_bias[c]);
#pragma unroll
  for (int k = 0; k < DISTANCES; k++) { /* stores come later, so that all loads are in flight together */
    const int x = x0 + k;
    if (x > a.reach) continue;
    const float sum = to.dsum[head * (int64_t)(a.reach + 1) + x];
    position += sum * (float)((const T *)a.rel_key)[x * a.rel_stride + c];
    drel[k] = to.drel[x * a.rel_stride + c] + sum * bias +
              (to.dtable ? table_element(to.dtable + place, x, c % a.d_head) : 0);
  }
#pragma unroll
  for (int k = 0; k < DISTANCES; k++)
    if (x0 + k <= a.reach) to.drel[(x0 + k) * a.rel_stride + c] = drel[k];
  if (!to.dcontent) return;
  atomicAdd(to.dposition + c, position);
  atomicAdd(to.dcontent + c, -position);
}

/* The gradients of relative keys and biases from the sums of the dQ kernel. */
template <typename T>
static cudaError_t launch_drel_key(const vd_cuda_attention *a, const relative_sums *to, cudaStream_t stream) {
  const dim3 blocks((unsigned)vd_ceil_div(a->reach + 1, DISTANCES), (unsigned)vd_ceil_div(a->n_head * a->d_head, 256));
  return vd_launch_pdl(drel_key_kernel<T>, blocks, 256, 0, stream, *a, *to);
}
cudaError_t vd_relative_end(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_workspace *ws, cudaStream_t stream) {
  const bool biases = a->content_bias && g->dcontent_bias;
  if (!a->content_bias && !ws->dtable) return cudaSuccess;
  const relative_sums to = {ws->dsum, ws->dtable, g->drel_key, biases ? g->dcontent_bias : NULL, g->dposition_bias};
  if (a->type == VD_FP32) return launch_drel_key<float>(a, &to, stream);
  if (a->type == VD_BF16) return launch_drel_key<__nv_bfloat16>(a, &to, stream);
  return launch_drel_key<__half>(a, &to, stream);
}
