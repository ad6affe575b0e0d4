/* Backward pass of attention: the dQ kernel (bwd_dq_*.cu), then the dK/dV kernel (bwd_dkv_*.cu). Both mma kernels
 * recompute the weights from lse. Of the wgmma kernels only dQ does, and stores them for dK/dV; so that they need no
 * more than a limit, streams are taken in groups. Before the kernels: delta_i = sum over a head's columns of out *
 * dout, zeros for the sums that they add to, and for the mma kernels with relative keys bias scores and q + u. After
 * them: the gradients of spans from partial sums, in a fixed order, or of relative keys and biases (relative.cu). The
 * kernels here are bound by memory bandwidth. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/kernels/pdl.cuh"

enum { DELTA_ROWS = 32 }; /* of a block of delta_kernel */
/* Operands of delta_kernel; `scale` is 1 for the mma kernels, and dropout's scale for the wgmma kernels; n_clear
 * elements of `clear` become 0. */
typedef struct row_sums {
  const void *out, *dout;
  const float *lse;
  float *delta, *shift, scale, *clear;
  int64_t n_clear;
} row_sums;

/* Zeros rows.clear, each block a part. */
VD_DEV void clear(const row_sums &rows) {
  const int64_t block = ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t threads = (int64_t)gridDim.x * gridDim.y * gridDim.z * blockDim.x;
  for (int64_t i = block * blockDim.x + threadIdx.x; i < rows.n_clear; i += threads) rows.clear[i] = 0;
}

/* delta [n_stream, n_head, block] = sum over a head's columns of out * dout, divided by scale, and shift = log2(scale)
 * - lse / ln 2. Eight lanes share a row of a head; block (x, y, z) has rows from 32 x on of head y of stream z, so that
 * no index needs a division. Also zeros rows.clear. */
template <typename T>
__global__ void delta_kernel(const __grid_constant__ vd_cuda_attention a, const __grid_constant__ row_sums rows) {
  const T *out = (const T *)rows.out, *dout = (const T *)rows.dout;
  constexpr int chunk = 16 / (int)sizeof(T);
  vd_pdl_wait();
  if (rows.n_clear > 0) clear(rows);
  const int lane = (int)threadIdx.x % 8, row = (int)(blockIdx.x * DELTA_ROWS + threadIdx.x / 8);
  const bool valid = row < a.block;
  const int64_t from = ((int64_t)blockIdx.z * a.block + row) * vd_width(a) + (int)blockIdx.y * a.d_head;
  float sum = 0;
  for (int c = lane * chunk; valid && c < a.d_head; c += 8 * chunk) {
    uint4 x = *(const uint4 *)(out + from + c), y = *(const uint4 *)(dout + from + c);
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
  const int64_t to = ((int64_t)blockIdx.z * a.n_head + blockIdx.y) * a.block + row;
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

/* Rounds bytes up to a multiple of 128, so that copies by TMA may begin there. */
static size_t round_up(size_t bytes) {
  return (bytes + 127) / 128 * 128;
}

/* Streams of a group: as many as keep its stored tiles within the limit, so that groups have about the same size. */
static int32_t group_of(const vd_cuda_attention *a) {
  const size_t limit = a->stored_limit > 0 ? a->stored_limit : VD_CUDA_WEIGHT_LIMIT;
  const size_t one = vd_stream_score_tiles(a) * VD_STORED_BYTES;
  const int32_t n = a->n_stream, most = limit / one < 1 ? 1 : limit / one < (size_t)n ? (int32_t)(limit / one) : n;
  return vd_ceil_div(n, vd_ceil_div(n, most));
}

/* Places the arrays of the workspace from `base` on; returns its size in bytes. */
static size_t lay_out(const vd_cuda_attention *a, void *base, vd_backward_workspace *ws) {
  size_t heads = (size_t)a->n_stream * (size_t)a->n_head, tiles = heads * (size_t)vd_ceil_div(a->block, VD_TILE);
  size_t rows = (size_t)a->n_stream * (size_t)a->block, element = a->type == VD_FP32 ? 4 : 2, size = 0;
  auto take = [&](size_t bytes) {
    char *at = (char *)base + size;
    size += round_up(bytes);
    return at;
  };
  ws->n_stream = a->n_stream, ws->dropout_mask = a->dropout_mask;
  ws->delta = (float *)take(heads * (size_t)a->block * 4), ws->shift = (float *)take(heads * (size_t)a->block * 4);
  if (a->rel_key) {
    if (!vd_uses_wgmma(a)) ws->query = take(rows * (size_t)a->n_head * (size_t)a->d_head * element);
    ws->dsum = (float *)take((size_t)a->n_head * ((size_t)a->reach + 1) * 4);
    if (vd_uses_wgmma(a))
      ws->dtable = (float *)take((size_t)a->n_head * (size_t)vd_table_blocks(a->reach) * VD_TILE * VD_TILE * 4);
  } else {
    ws->dspan = (float *)take(tiles * 4);
  }
  if (vd_uses_wgmma(a)) ws->stored = take((size_t)group_of(a) * vd_stream_score_tiles(a) * VD_STORED_BYTES);
  return size;
}

size_t vd_cuda_attention_workspace_size(const vd_cuda_attention *a) {
  vd_backward_workspace ws = {};
  return lay_out(a, NULL, &ws);
}

static cudaError_t fill_delta(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_workspace *ws, cudaStream_t stream) {
  const dim3 blocks((unsigned)vd_ceil_div(a->block, DELTA_ROWS), (unsigned)a->n_head, (unsigned)a->n_stream);
  const float scale = vd_uses_wgmma(a) ? vd_make_dropout_draws(a).scale : 1;
  int64_t n_sum = a->rel_key ? (int64_t)a->n_head * (a->reach + 1) : 0;
  if (ws->dtable) /* which follows dsum */
    n_sum = ws->dtable - ws->dsum + (int64_t)a->n_head * vd_table_blocks(a->reach) * VD_TILE * VD_TILE;
  const row_sums rows = {g->out, g->dout, g->lse, ws->delta, ws->shift, scale, ws->dsum, n_sum};
  auto kernel = a->type == VD_FP32   ? delta_kernel<float>
                : a->type == VD_BF16 ? delta_kernel<__nv_bfloat16>
                                     : delta_kernel<__half>;
  return vd_launch_pdl(kernel, blocks, 8 * DELTA_ROWS, 0, stream, *a, rows);
}

/* After the kernels: the gradients of spans from the dQ kernel's partial sums, or of relative keys and biases. */
static cudaError_t finish_gradients(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                    const vd_backward_workspace *ws, cudaStream_t stream) {
  if (a->rel_key) return vd_relative_end(a, g, ws, stream);
  int tiles = a->n_stream * a->n_head * vd_ceil_div(a->block, VD_TILE);
  float factor = (float)a->attn_span / (float)a->ramp;
  return vd_launch_pdl(dspan_kernel, (unsigned)a->n_span, VD_WARPGROUP, 0, stream, tiles / a->n_span, factor, ws->dspan,
                       g->dspan);
}

/* The two kernels, on two streams if there is a side stream. */
static cudaError_t run_mma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                           const vd_backward_workspace *ws, cudaStream_t stream) {
  const cudaStream_t side = g->side ? g->side : stream;
  cudaError_t e = cudaSuccess;
  if (side != stream) e = cudaEventRecord(g->fork, stream);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(side, g->fork, 0);
  if (e == cudaSuccess) e = vd_dq_mma(a, g, ws, stream);
  if (e == cudaSuccess) e = vd_dkv_mma(a, g, ws, side);
  if (e == cudaSuccess && side != stream) e = cudaEventRecord(g->join, side);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(stream, g->join, 0);
  return e;
}

/* p += bytes, unless it is NULL. */
template <typename T> static void skip(T *&p, int64_t bytes) {
  if (p) p = (T *)((uintptr_t)p + (uintptr_t)bytes);
}
/* The arguments for n streams from `first` on, of 16-bit elements. */
static void choose_streams(vd_cuda_attention *a, vd_cuda_attention_gradient *g, vd_backward_workspace *ws,
                           int32_t first, int32_t n) {
  const int64_t n_tile = vd_ceil_div(a->block, VD_TILE), heads = (int64_t)first * a->n_head;
  const int64_t width = (int64_t)a->n_head * a->d_head, rows = (int64_t)first * a->block, memory = first * a->kv_rows;
  skip(ws->delta, heads * a->block * 4), skip(ws->shift, heads * a->block * 4), skip(ws->dspan, first * n_tile * 4);
  skip(g->block, rows * 3 * width * 2), skip(g->dblock, rows * 3 * width * 2);
  skip(g->memory, memory * 2 * width * 2), skip(g->dmemory, memory * 2 * width * 2);
  skip(g->dout, rows * width * 2);
  ws->first_stream = first, a->n_stream = n;
}
/* The dQ and the dK/dV kernel, for one group of streams after another. */
static cudaError_t run_wgmma(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                             const vd_backward_workspace *ws, cudaStream_t stream) {
  const int32_t group = group_of(a);
  cudaError_t e = cudaSuccess;
  for (int32_t first = 0; first < a->n_stream && e == cudaSuccess; first += group) {
    vd_cuda_attention part = *a;
    vd_cuda_attention_gradient gradient = *g;
    vd_backward_workspace workspace = *ws;
    choose_streams(&part, &gradient, &workspace, first, a->n_stream - first < group ? a->n_stream - first : group);
    e = vd_dq_wgmma(&part, &gradient, &workspace, stream);
    if (e == cudaSuccess) e = vd_dkv_wgmma(&part, &gradient, &workspace, stream);
  }
  return e;
}

cudaError_t vd_cuda_attention_backward(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                       cudaStream_t stream) {
  vd_backward_workspace ws = {};
  lay_out(a, g->workspace, &ws);
  if (vd_cuda_attention_dropout_mask_size(a) > 0 && !a->dropout_mask) return cudaErrorInvalidValue;
  cudaError_t e = fill_delta(a, g, &ws, stream);
  if (e == cudaSuccess && a->rel_key && !vd_uses_wgmma(a)) e = vd_relative_begin(a, g, &ws, stream);
  if (e == cudaSuccess) e = vd_uses_wgmma(a) ? run_wgmma(a, g, &ws, stream) : run_mma(a, g, &ws, stream);
  return e == cudaSuccess ? finish_gradients(a, g, &ws, stream) : e;
}
