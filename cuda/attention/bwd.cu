/* Backward pass: two kernels that both compute the weights again from lse, by queries (bwd_dq_mma.cu) and by keys
 * (bwd_dkv_mma.cu), what they need beforehand, and sums of what they leave behind. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/kernels/pdl.cuh"

/* delta [n_stream, n_head, block] = sum over a head's columns of out * dout. Eight lanes share a row of a head. */
template <typename T>
__global__ void vd_delta_kernel(const __grid_constant__ vd_cuda_attention a, const T *out, const T *dout,
                                float *delta) {
  constexpr int chunk = 16 / (int)sizeof(T);
  vd_await_before();
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
  if (valid && lane == 0) delta[(row / a.block * a.n_head + head) * a.block + row % a.block] = sum;
}

/* dspan[s] += attn_span / ramp * the sum of its items, in a fixed order. */
__global__ void vd_dspan_kernel(int n, float factor, const float *item, float *dspan) {
  __shared__ float sums[VD_THREADS];
  vd_await_before();
  float sum = 0;
  for (int i = (int)threadIdx.x; i < n; i += VD_THREADS) sum += item[(int64_t)blockIdx.x * n + i];
  sums[threadIdx.x] = sum;
  for (int m = VD_THREADS / 2; m; m >>= 1) {
    __syncthreads();
    if ((int)threadIdx.x < m) sums[threadIdx.x] += sums[threadIdx.x + m];
  }
  if (threadIdx.x == 0) dspan[blockIdx.x] += sums[0] * factor;
}

/* Bytes that end at a multiple of 16. */
static size_t vd_round_16(size_t bytes) {
  return (bytes + 15) / 16 * 16;
}

/* Lays the room out from `base` on; returns its bytes. */
static size_t vd_lay_out(const vd_cuda_attention *a, void *base, vd_backward_room *room) {
  size_t pairs = (size_t)a->n_stream * (size_t)a->n_head, items = pairs * (size_t)vd_ceil_div(a->block, VD_TILE);
  size_t rows = (size_t)a->n_stream * (size_t)a->block, element = a->type == VD_FP32 ? 4 : 2;
  size_t kept = a->kept ? 0 : vd_cuda_attention_kept_size(a);
  size_t delta = kept + vd_round_16(pairs * (size_t)a->block * 4);
  room->kept = a->kept ? a->kept : (uint32_t *)base, room->delta = (float *)((char *)base + kept);
  if (a->rel_key) {
    size_t bias = delta + vd_round_16(rows * (size_t)a->n_head * (size_t)a->d_head * element);
    size_t sum = bias + vd_round_16(items * 2 * (size_t)a->d_head * 4);
    room->query = (char *)base + delta, room->dbias = (float *)((char *)base + bias);
    room->dsum = (float *)((char *)base + sum);
    return sum + (size_t)a->n_head * ((size_t)a->reach + 1) * 4;
  }
  room->dspan = (float *)((char *)base + delta);
  return delta + items * 4;
}

size_t vd_cuda_attention_workspace_size(const vd_cuda_attention *a) {
  vd_backward_room room = {};
  return vd_lay_out(a, NULL, &room);
}

static cudaError_t vd_fill_delta(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g, float *delta,
                                 cudaStream_t stream) {
  int64_t lanes = (int64_t)a->n_stream * a->n_head * a->block * 8;
  unsigned blocks = (unsigned)((lanes + 255) / 256);
  if (a->type == VD_FP32) {
    return vd_launch_ready(vd_delta_kernel<float>, blocks, 256, 0, stream, *a, (const float *)g->out,
                           (const float *)g->dout, delta);
  } else if (a->type == VD_BF16) {
    return vd_launch_ready(vd_delta_kernel<__nv_bfloat16>, blocks, 256, 0, stream, *a, (const __nv_bfloat16 *)g->out,
                           (const __nv_bfloat16 *)g->dout, delta);
  } else {
    return vd_launch_ready(vd_delta_kernel<__half>, blocks, 256, 0, stream, *a, (const __half *)g->out,
                           (const __half *)g->dout, delta);
  }
}

/* What the kernel by queries left behind: span or bias gradients. */
static cudaError_t vd_sum_up(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                             const vd_backward_room *room, cudaStream_t stream) {
  if (a->rel_key) return vd_relative_end(a, g, room, stream);
  int items = a->n_stream * a->n_head * vd_ceil_div(a->block, VD_TILE);
  float factor = (float)a->attn_span / (float)a->ramp;
  return vd_launch_ready(vd_dspan_kernel, (unsigned)a->n_span, VD_THREADS, 0, stream, items / a->n_span, factor,
                         room->dspan, g->dspan);
}

/* What comes before the two kernels. Where draws are wanted, the side stream makes them. */
static cudaError_t vd_prepare(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                              const vd_backward_room *room, cudaStream_t stream, cudaStream_t side) {
  const bool draws = vd_by_group(a) && !a->kept && a->dropout > 0, forks = side != stream;
  cudaError_t e = cudaSuccess;
  if (draws && forks) e = cudaEventRecord(g->fork, stream);
  if (e == cudaSuccess && draws && forks) e = cudaStreamWaitEvent(side, g->fork, 0);
  if (e == cudaSuccess && draws) e = vd_draw_kept(a, room->kept, side);
  if (e == cudaSuccess && draws && forks) e = cudaEventRecord(g->join, side);
  if (e == cudaSuccess) e = vd_fill_delta(a, g, room->delta, stream);
  if (e == cudaSuccess && a->rel_key) e = vd_relative_begin(a, g, room, stream);
  if (e == cudaSuccess && draws && forks) e = cudaStreamWaitEvent(stream, g->join, 0);
  return e;
}

/* The two kernels, which both come after what was prepared. The one by queries has the longest items: that by keys,
 * which fills what they leave, must not take the multiprocessors before it. */
static cudaError_t vd_run_both(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                               const vd_backward_room *room, cudaStream_t stream, cudaStream_t side) {
  const bool group = vd_by_group(a);
  cudaError_t e = cudaSuccess;
  if (side != stream) e = cudaEventRecord(g->fork, stream);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(side, g->fork, 0);
  if (e == cudaSuccess) e = (group ? vd_group_by_query : vd_backward_by_query)(a, g, room, stream);
  if (e == cudaSuccess && group && side != stream) e = cudaStreamWaitEvent(side, g->join, 0);
  if (e == cudaSuccess) e = (group ? vd_group_by_key : vd_backward_by_key)(a, g, room, side);
  return e;
}

cudaError_t vd_cuda_attention_backward(const vd_cuda_attention *a, const vd_cuda_attention_gradient *g,
                                       cudaStream_t stream) {
  vd_backward_room room = {};
  cudaStream_t side = g->side ? g->side : stream;
  vd_lay_out(a, g->workspace, &room);
  cudaError_t e = vd_prepare(a, g, &room, stream, side);
  if (e == cudaSuccess) e = vd_run_both(a, g, &room, stream, side);
  if (e == cudaSuccess) e = vd_sum_up(a, g, &room, stream);
  if (e == cudaSuccess && side != stream) e = cudaEventRecord(g->join, side);
  if (e == cudaSuccess && side != stream) e = cudaStreamWaitEvent(stream, g->join, 0);
  return e;
}
