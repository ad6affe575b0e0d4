/* Kernels at the two ends of a backward pass: cross entropy; gradient norms and statistics, Adagrad, Adam, small copies
 * between host and device. Blocks of 256 threads.
 *
 * cross_entropy: a warp per row. Rows of at most 256 logits, as of bytes, stay in registers: each logit is read and its
 * exponential computed once. Longer rows take three passes (maximum, sum, gradient), of which the last two hit the
 * caches; no shared memory. sum_nll: one block, 8 KB of shared memory, a tree sum in double. A few hundred logits a row
 * are few bytes beside an update's activations.
 * Norms and optimisers walk over pieces of at most VD_PIECE elements, a block per piece, 4 elements a thread at a time,
 * so that tensors of all sizes take one launch. They are bound by memory bandwidth: norms read 4 bytes a parameter;
 * Adagrad reads 12 and writes 8, Adam 16 and 12, each 2 more for the 16-bit copy of the parameters. Zeroing, norms and
 * Adagrad together take 0.45 ms of an update against 0.35 ms at 3.35 TB/s (doc/PERFORMANCE.md).
 * Every sum has a fixed order. */
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/pdl.cuh"

enum { BLOCK = 256 };

/* A warp per row of at most 32 N columns, N adjacent columns a lane, in registers. dlogits may be logits. */
template <typename T, int N>
static __global__ void __launch_bounds__(BLOCK)
    short_cross_entropy_kernel(int64_t n, int vocab, int stride, const T *logits, const int32_t *targets, float scale,
                               float *row_nll, T *dlogits) {
  vd_pdl_wait();
  int lane = (int)threadIdx.x % 32, c = lane * N;
  int64_t r = (int64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
  if (r >= n) return;
  int32_t target = targets[r];
  float x[N] = {}, e[N], top = -INFINITY, total = 0, at_target = 0;
  if (c < vocab) vd_read<T, N>(logits + r * stride + c, x);
#pragma unroll
  for (int k = 0; k < N; k++) {
    top = c + k < vocab ? fmaxf(top, x[k]) : top;
    if (c + k == target) at_target = x[k];
  }
  top = vd_warp_max(top);
#pragma unroll
  for (int k = 0; k < N; k++) {
    e[k] = c + k < vocab ? expf(x[k] - top) : 0.0f;
    total += e[k];
  }
  total = vd_warp_sum(total);
  at_target = __shfl_sync(0xffffffffU, at_target, target < 0 ? 0 : target / N);
  if (lane == 0) row_nll[r] = target < 0 ? 0.0f : logf(total) - (at_target - top);
  if (!dlogits || c >= stride) return;
  float factor = scale / total;
#pragma unroll
  for (int k = 0; k < N; k++)
    x[k] = target < 0 || c + k >= vocab ? 0.0f : factor * e[k] - (c + k == target ? scale : 0.0f);
  vd_write<T, N>(dlogits + r * stride + c, x);
}

/* A warp per row, three passes over it, N columns a lane. dlogits may be logits: a lane overwrites only elements that
 * no other lane reads any more. */
template <typename T, int N>
static __global__ void cross_entropy_kernel(int64_t n, int vocab, int stride, const T *logits, const int32_t *targets,
                                            float scale, float *row_nll, T *dlogits) {
  vd_pdl_wait();
  int lane = (int)threadIdx.x % 32;
  int64_t r = (int64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
  if (r >= n) return;
  const T *row = logits + r * stride;
  int32_t target = targets[r];
  float top = -INFINITY, total = 0, x[N];
  for (int c = lane * N; c < vocab; c += 32 * N) {
    vd_read<T, N>(row + c, x);
#pragma unroll
    for (int k = 0; k < N; k++) top = c + k < vocab ? fmaxf(top, x[k]) : top;
  }
  top = vd_warp_max(top);
  for (int c = lane * N; c < vocab; c += 32 * N) {
    vd_read<T, N>(row + c, x);
#pragma unroll
    for (int k = 0; k < N; k++) total += c + k < vocab ? expf(x[k] - top) : 0.0f;
  }
  total = vd_warp_sum(total);
  if (lane == 0) row_nll[r] = target < 0 ? 0.0f : logf(total) - (vd_load(row[target]) - top);
  __syncwarp();
  if (!dlogits) return;
  for (int c = lane * N; c < stride; c += 32 * N) {
    vd_read<T, N>(row + c, x);
#pragma unroll
    for (int k = 0; k < N; k++) {
      float p = expf(x[k] - top) / total;
      x[k] = target < 0 || c + k >= vocab ? 0.0f : scale * (p - (c + k == target ? 1.0f : 0.0f));
    }
    vd_write<T, N>(dlogits + r * stride + c, x);
  }
}

/* *sum += row[0] + ... + row[n - 1], by one block. */
enum { SUM_BLOCK = 1024 };
static __global__ void sum_nll_kernel(int64_t n, const float *row, double *sum) {
  __shared__ double part[SUM_BLOCK];
  vd_pdl_wait();
  double mine = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += SUM_BLOCK) mine += (double)row[i];
  part[threadIdx.x] = mine;
  __syncthreads();
  for (int half = SUM_BLOCK / 2; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *sum += part[0];
}

cudaError_t vd_cuda_cross_entropy(enum vd_precision type, int64_t n, int64_t vocab, int64_t stride, const void *logits,
                                  const int32_t *targets, float scale, double *loss_sum, float *row_nll, void *dlogits,
                                  cudaStream_t stream) {
  cudaError_t e;
#define CALL(T)                                                                                                        \
  auto kernel = stride % 8 != 0    ? cross_entropy_kernel<T, 1>                                                        \
                : stride <= 8 * 32 ? short_cross_entropy_kernel<T, 8>                                                  \
                                   : cross_entropy_kernel<T, 8>;                                                       \
  e = vd_launch_pdl(kernel, vd_blocks(n, BLOCK / 32), BLOCK, 0, stream, n, (int)vocab, (int)stride, (const T *)logits, \
                    targets, scale, row_nll, (T *)dlogits)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return e == cudaSuccess ? vd_launch_pdl(sum_nll_kernel, 1, SUM_BLOCK, 0, stream, n, row_nll, loss_sum) : e;
}

/* partial[p] = sum of squares of piece p. */
static __global__ void square_pieces_kernel(const float *x, const vd_cuda_piece *piece, double *partial) {
  __shared__ double part[BLOCK / 32];
  vd_cuda_piece p = piece[blockIdx.x];
  const float *v = x + p.first;
  /* A thread adds 4 squares in float and the rest in double: the rounding of 4 float additions is below 4e-7. */
  double mine = 0;
  for (int i = (int)threadIdx.x * 4; i < p.n; i += BLOCK * 4) {
    float s = 0;
    if (i + 4 <= p.n) {
      float4 q = *(const float4 *)(v + i);
      s = (q.x * q.x + q.y * q.y) + (q.z * q.z + q.w * q.w);
    } else {
      for (int k = i; k < p.n; k++) s += v[k] * v[k];
    }
    mine += (double)s;
  }
  mine = vd_warp_sum(mine);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < BLOCK / 32; w++) part[0] += part[w];
  partial[blockIdx.x] = part[0];
}

/* norm2[t] = sum of the partial sums of tensor t's pieces, a warp per tensor. */
static __global__ void square_tensors_kernel(const double *partial, const int32_t *tensor_piece, int n_tensor,
                                             double *norm2) {
  int t = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = (int)threadIdx.x % 32;
  if (t >= n_tensor) return;
  double sum = 0;
  for (int i = tensor_piece[t] + lane; i < tensor_piece[t + 1]; i += 32) sum += partial[i];
  sum = vd_warp_sum(sum);
  if (lane == 0) norm2[t] = sum;
}

cudaError_t vd_cuda_square_sums(const float *x, const vd_cuda_piece *piece, int n_piece, const int32_t *tensor_piece,
                                int n_tensor, double *partial, double *norm2, cudaStream_t stream) {
  square_pieces_kernel<<<(unsigned)n_piece, BLOCK, 0, stream>>>(x, piece, partial);
  square_tensors_kernel<<<vd_blocks(n_tensor, BLOCK / 32), BLOCK, 0, stream>>>(partial, tensor_piece, n_tensor, norm2);
  return cudaGetLastError();
}

/* Gradient statistics by one warp, since there are few tensors: global norm, factor with the clip, first non-finite
 * tensor. The global norm is added in the order of the tensors, as on the CPU. */
static __global__ void gradient_stats_kernel(int n_tensor, double scale, double clip_norm, double *grad_stats) {
  int lane = (int)threadIdx.x, bad = n_tensor;
  double total = 0, *norm2 = grad_stats + VD_STATS_TENSORS;
  for (int first = 0; first < n_tensor; first += 32) {
    double mine = first + lane < n_tensor ? norm2[first + lane] : 0;
    if (!isfinite(mine)) bad = min(bad, first + lane);
    for (int i = 0; i < 32; i++) total += __shfl_sync(0xffffffffU, mine, i);
  }
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) bad = min(bad, __shfl_xor_sync(0xffffffffU, bad, i));
  if (clip_norm > 0) scale *= fmin(1.0, clip_norm / (sqrt(total) * scale + 1e-6));
  for (int t = lane; t < n_tensor; t += 32) norm2[t] *= scale * scale;
  if (lane > 0) return;
  grad_stats[VD_STATS_NORM2] = total;
  grad_stats[VD_STATS_SCALE] = scale;
  grad_stats[VD_STATS_NONFINITE] = bad < n_tensor ? bad : -1;
}

cudaError_t vd_cuda_gradient_stats(int n_tensor, double scale, double clip_norm, double *grad_stats,
                                   cudaStream_t stream) {
  gradient_stats_kernel<<<1, 32, 0, stream>>>(n_tensor, scale, clip_norm, grad_stats);
  return cudaGetLastError();
}

/* One parameter: adds the scaled gradient's square to *acc and returns the new parameter. */
VD_GPU float adagrad_step(float g, float scale, float rate, float eps, float *acc, float p) {
  g *= scale;
  *acc += g * g;
  return p - rate * g / (sqrtf(*acc) + eps);
}

/* Adagrad over one piece of a tensor a block; `copy`, where it is not NULL, gets the parameters rounded to T. */
template <typename T>
static __global__ void adagrad_kernel(float *param, const float *gradient, float *accumulator, T *copy,
                                      const vd_cuda_piece *piece, const double *grad_stats, double lr, float eps,
                                      double clip_step) {
  if (grad_stats[VD_STATS_NONFINITE] >= 0) return;
  vd_cuda_piece where = piece[blockIdx.x];
  double norm = sqrt(grad_stats[VD_STATS_TENSORS + where.tensor]);
  float step = (float)(clip_step > 0 && norm > clip_step ? lr * clip_step / (norm + 1e-10) : lr);
  float scale = (float)grad_stats[VD_STATS_SCALE];
  size_t first = where.first;
  for (int i = (int)threadIdx.x * 4; i < where.n; i += BLOCK * 4) {
    if (i + 4 <= where.n) {
      float4 g = *(const float4 *)(gradient + first + i), acc = *(float4 *)(accumulator + first + i);
      float4 p = *(float4 *)(param + first + i);
      p.x = adagrad_step(g.x, scale, step, eps, &acc.x, p.x);
      p.y = adagrad_step(g.y, scale, step, eps, &acc.y, p.y);
      p.z = adagrad_step(g.z, scale, step, eps, &acc.z, p.z);
      p.w = adagrad_step(g.w, scale, step, eps, &acc.w, p.w);
      *(float4 *)(accumulator + first + i) = acc;
      *(float4 *)(param + first + i) = p;
      float out[4] = {p.x, p.y, p.z, p.w};
      if (copy) vd_write<T, 4>(copy + first + i, out);
    } else {
      for (int k = i; k < where.n; k++) {
        float acc = accumulator[first + k];
        float p = adagrad_step(gradient[first + k], scale, step, eps, &acc, param[first + k]);
        accumulator[first + k] = acc;
        param[first + k] = p;
        if (copy) vd_set(&copy[first + k], p);
      }
    }
  }
}

cudaError_t vd_cuda_adagrad(enum vd_precision type, float *param, const float *gradient, float *accumulator, void *copy,
                            const vd_cuda_piece *piece, int n_piece, const double *grad_stats, double lr, float eps,
                            double clip_step, cudaStream_t stream) {
#define CALL(T)                                                                                                        \
  adagrad_kernel<T><<<(unsigned)n_piece, BLOCK, 0, stream>>>(param, gradient, accumulator, (T *)copy, piece,           \
                                                             grad_stats, lr, eps, clip_step)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* One parameter: updates both moments and returns the new parameter. */
VD_GPU float adam_step(float g, const vd_cuda_adam_step &a, float *m, float *v, float p) {
  *m = a.beta1 * *m + a.rest1 * g;
  *v = a.beta2 * *v + a.rest2 * g * g;
  return p - a.step * *m / (sqrtf(*v) * a.correct + a.eps);
}

/* Four neighbouring elements, or the `last` < 4 at the end of a piece. */
template <typename T>
VD_GPU void adam_four(const vd_cuda_adam_step &a, float scale, int last, float *param, const float *gradient, float *m,
                      float *v, T *copy) {
  float p[4], g[4], first[4], second[4];
  if (last >= 4) {
    vd_read<float, 4>(param, p);
    vd_read<float, 4>(gradient, g);
    vd_read<float, 4>(m, first);
    vd_read<float, 4>(v, second);
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = adam_step(g[i] * scale, a, &first[i], &second[i], p[i]);
    vd_write<float, 4>(m, first);
    vd_write<float, 4>(v, second);
    vd_write<float, 4>(param, p);
    if (copy) vd_write<T, 4>(copy, p);
    return;
  }
  for (int i = 0; i < last; i++) {
    param[i] = adam_step(gradient[i] * scale, a, &m[i], &v[i], param[i]);
    if (copy) vd_set(&copy[i], param[i]);
  }
}

/* Adam over one piece of a tensor a block; `copy`, where it is not NULL, gets the parameters rounded to T. */
template <typename T>
static __global__ void adam_kernel(float *param, const float *gradient, float *m, float *v, T *copy,
                                   const vd_cuda_piece *piece, const double *grad_stats, vd_cuda_adam_step a) {
  if (grad_stats[VD_STATS_NONFINITE] >= 0) return;
  vd_cuda_piece where = piece[blockIdx.x];
  float scale = (float)grad_stats[VD_STATS_SCALE];
  for (int i = (int)threadIdx.x * 4; i < where.n; i += BLOCK * 4) {
    size_t at = where.first + (size_t)i;
    adam_four<T>(a, scale, where.n - i, param + at, gradient + at, m + at, v + at, copy ? copy + at : NULL);
  }
}

cudaError_t vd_cuda_adam(enum vd_precision type, float *param, const float *gradient, float *m, float *v, void *copy,
                         const vd_cuda_piece *piece, int n_piece, const double *grad_stats,
                         const vd_cuda_adam_step *step, cudaStream_t stream) {
#define CALL(T)                                                                                                        \
  adam_kernel<T><<<(unsigned)n_piece, BLOCK, 0, stream>>>(param, gradient, m, v, (T *)copy, piece, grad_stats, *step)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* A thread copies one word. */
static __global__ void copy_words_kernel(size_t n, const uint32_t *from, uint32_t *to) {
  size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
  if (i < n) to[i] = from[i];
}

cudaError_t vd_cuda_copy_words(size_t n, const uint32_t *from, uint32_t *to, cudaStream_t stream) {
  copy_words_kernel<<<vd_blocks((int64_t)n, BLOCK), BLOCK, 0, stream>>>(n, from, to);
  return cudaGetLastError();
}

typedef struct stats_parts {
  const uint32_t *from[VD_STATS_PARTS];
  int n[VD_STATS_PARTS]; /* words */
} stats_parts;

/* One block writes the parts, one after the other, to pinned host memory. */
static __global__ void copy_parts_kernel(const __grid_constant__ stats_parts part, uint32_t *to) {
#pragma unroll
  for (int i = 0; i < VD_STATS_PARTS; i++) {
    for (int w = (int)threadIdx.x; w < part.n[i]; w += BLOCK) to[w] = part.from[i][w];
    to += part.n[i];
  }
}

cudaError_t vd_cuda_copy_parts(int n, const vd_stats_part *part, void *to, cudaStream_t stream) {
  stats_parts parts = {};
  for (int i = 0; i < n; i++) {
    parts.from[i] = (const uint32_t *)part[i].p;
    parts.n[i] = (int)(part[i].bytes / sizeof(uint32_t));
  }
  copy_parts_kernel<<<1, BLOCK, 0, stream>>>(parts, (uint32_t *)to);
  return cudaGetLastError();
}

/* x += value; a thread computes one element. */
static __global__ void add_constant_kernel(float *x, size_t n, float value) {
  size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
  if (i < n) x[i] += value;
}
cudaError_t vd_cuda_add_constant(float *x, size_t n, float value, cudaStream_t stream) {
  add_constant_kernel<<<vd_blocks((int64_t)n, BLOCK), BLOCK, 0, stream>>>(x, n, value);
  return cudaGetLastError();
}

/* x = clamp(x, 0, 1); NaN stays NaN. */
static __global__ void clamp01_kernel(float *x, size_t n) {
  size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
  if (i < n) x[i] = x[i] < 0 ? 0.0f : x[i] > 1 ? 1.0f : x[i];
}
cudaError_t vd_cuda_clamp01(float *x, size_t n, cudaStream_t stream) {
  clamp01_kernel<<<vd_blocks((int64_t)n, BLOCK), BLOCK, 0, stream>>>(x, n);
  return cudaGetLastError();
}
