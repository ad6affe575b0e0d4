/* Backward pass of attention. The dQ kernel (bwd_dq_*.cu) and the dK/dV kernel (bwd_dkv_*.cu) both recompute the
 * weights from lse. Before them: delta_i = sum over a head's columns of out * dout, and with relative keys q + u.
 * After them: the partial sums of the gradients of spans or biases are added up in a fixed order. The kernels here
 * are bound by memory bandwidth. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/kernels/pdl.cuh"

/* Operands of delta_kernel; `scale` is 1 for the mma kernels, and dropout's scale for the wgmma kernels. */
typedef struct row_sums {
  const void *out, *dout;
  const float *lse;
  float *delta, *shift, scale;
} row_sums;

/* delta [n_stream, n_head, block] = sum over a head's columns of out * dout, divided by scale, and shift = log2(scale)
 * - lse / ln 2. Eight lanes share a row of a head. */
template <typename T>
__global__ void delta_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ row_sums rows) {
  const T *out = (const T *)rows.out, *dout = (const T *)rows.dout;
  constexpr int chunk = 16 / (int)sizeof(T);
  vd_pdl_wait();
  int64_t id = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 8, row = id / a.n_head;
  int head = (int)(id % a.n_head), lane = (int)threadIdx.x % 8;
  bool valid = row < (int64_t)a.n_stream * a.block;
  float sum = 0;
  for (int c = lane * chunk; valid && c < a.d_head; c += 8 * chunk) {
    int64_t at = row * vd_width(a) + head * a.d_head + c;
    uint4 x = *(const uint4 *)(out + at), y = *(const uint4 *)(dout + at);
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(T) == 4) {
        sum += __uint_as_float(xs[i]) * __uint_as_float(ys[i]);
      } else {
        float2 u = vd_unpack(xs[i], T()), v = vd_unpack(ys[i], T());
        sum += u.x * v.x + u.y * v.y;
      }
    }
  }
  for (int m = 4; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffU, sum, m);
  if (!valid || lane > 0) return;
  const int64_t to = (row / a.block * a.n_head + head) * a.block + row % a.block;
  rows.delta[to] = sum / rows.scale;
  rows.shift[to] = fmaf(rows.lse[to], -1.44269504088896341f, log2f(rows.scale));
}

/* dspan[s] += attn_span / ramp * the sum of its query tiles' partial sums, in a fixed order. */
__global__ void dspan_kernel(int n, float factor, const float *tile_id, float *dspan) {
  __shared__ float sums[VD_WARPGROUP];
  vd_pdl_wait();
  float sum = 0;
  for (int i = (int)threadIdx.x; i < n; i += VD_WARPGROUP) sum += tile_id[(int64_t)blockIdx.x * n + i];
  sums[threadIdx.x] = sum;
  for (int m = VD_WARPGROUP / 2; m; m >>= 1) {
    __syncthreads();
    if ((int)threadIdx.x < m) sums[threadIdx.x] += sums[threadIdx.x + m];
  }
  if (threadIdx.x == 0) dspan[blockIdx.x] += sums[0] * factor;
}

/* Rounds bytes up to a multiple of 16. */
static size_t round_up_16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

/* Places the arrays of the workspace from `base` on; returns its size in bytes. */
static size_t lay_out(const vd_cuda_attention *a, void *base, vd_backward_workspace *ws) {
  size_t pairs = (size_t)a->n_stream * (size_t)a->n_head, tiles = pairs * (size_t)vd_ceil_div(a->block, VD_TILE);
  size_t rows = (size_t)a->n_stream * (size_t)a->block, element = a->type == VD_FP32 ? 4 : 2;
  size_t one = round_up_16(pairs * (size_t)a->block * 4), delta = 2 * one;
  ws->dropout_mask = a->dropout_mask, ws->delta = (float *)base, ws->shift = (float *)((char *)base + one);
  if (a->rel_key) {
    size_t bias = delta + round_up_16(rows * (size_t)a->n_head * (size_t)a->d_head * element);
    size_t sum = bias + round_up_16(tiles * 2 * (size_t)a->d_head * 4);
    ws->query = (char *)base + delta, ws->dbias = (float *)((char *)base + bias);
    ws->dsum = (float *)((char *)base + sum);
    size_t table = sum + round_up_16((size_t)a->n_head * ((size_t)a->reach + 1) * 4);
    if (!vd_uses_wgmma(a)) return table;
    ws->dtable = (float *)((char *)base + table);
    return table + (size_t)a->n_head * (size_t)vd_table_blocks(a->reach) * VD_TILE * VD_TILE * 4;
  }
  ws->dspan = (float *)((char *)base + delta);
  return delta + tiles * 4;
}

size_t vd_cuda_attention_workspace_size(const vd_cuda_attention *a) {
  vd_backward_workspace ws = {};
  return lay_out(a, NULL, &ws);
}

static cudaError_t fill_delta(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_workspace *ws, cudaStream_t stream) {
  int64_t lanes = (int64_t)a->n_stream * a->n_head * a->block * 8;
  unsigned blocks = (unsigned)((lanes + 255) / 256);
  const float scale = vd_uses_wgmma(a) ? vd_make_dropout_draws(a).scale : 1;
  const row_sums rows = {g->out, g->dout, g->lse, ws->delta, ws->shift, scale};
  auto kernel = a->type == VD_FP32   ? delta_kernel<float>
                : a->type == VD_BF16 ? delta_kernel<__nv_bfloat16>
                                     : delta_kernel<__half>;
  return vd_launch_pdl(kernel, blocks, 256, 0, stream, *a, rows);
}

/* Adds up the partial sums of the dQ kernel: gradients of spans or biases. */
static cudaError_t sum_partials(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                const vd_backward_workspace *ws, cudaStream_t stream) {
  if (a->rel_key) return vd_relative_end(a, g, ws, stream);
  int tiles = a->n_stream * a->n_head * vd_ceil_div(a->block, VD_TILE);
  float factor = (float)a->attn_span / (float)a->ramp;
  return vd_launch_pdl(dspan_kernel, (unsigned)a->n_span, VD_WARPGROUP, 0, stream, tiles / a->n_span, factor, ws->dspan,
                       g->dspan);
}

/* The two kernels, on two streams if there is a side stream. The dQ kernel has the longest tiles and goes first; the
 * dK/dV kernel, which fills the multiprocessors that it leaves idle, must not occupy them before. */
static cudaError_t run_both(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                            const vd_backward_workspace *ws, cudaStream_t stream, cudaStream_t side) {
  const bool wgmma = vd_uses_wgmma(a);
  cudaError_t e = cudaSuccess;
  if (side != stream) e = cudaEventRecord(g->fork, stream);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(side, g->fork, 0);
  if (e == cudaSuccess) e = (wgmma ? vd_dq_wgmma : vd_dq_mma)(a, g, ws, stream);
  if (e == cudaSuccess && wgmma && side != stream) e = cudaStreamWaitEvent(side, g->join, 0);
  if (e == cudaSuccess) e = (wgmma ? vd_dkv_wgmma : vd_dkv_mma)(a, g, ws, side);
  return e;
}

cudaError_t vd_cuda_attention_backward(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                       cudaStream_t stream) {
  vd_backward_workspace ws = {};
  cudaStream_t side = g->side ? g->side : stream;
  lay_out(a, g->workspace, &ws);
  if (vd_cuda_attention_dropout_mask_size(a) > 0 && !a->dropout_mask) return cudaErrorInvalidValue;
  cudaError_t e = fill_delta(a, g, &ws, stream);
  if (e == cudaSuccess && a->rel_key) e = vd_relative_begin(a, g, &ws, stream);
  if (e == cudaSuccess) e = run_both(a, g, &ws, stream, side);
  if (e == cudaSuccess) e = sum_partials(a, g, &ws, stream);
  if (e == cudaSuccess && side != stream) e = cudaEventRecord(g->join, side);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(stream, g->join, 0);
  return e;
}
