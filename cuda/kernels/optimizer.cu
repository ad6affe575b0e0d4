/* The loss, sums of squares, the optimiser: what begins and ends a backward pass. */
#include "cuda/kernels/element.cuh"

enum { VD_BLOCK = 256 };

/* A warp a row; three passes over it. dlogits may be logits: a lane writes only what it alone reads again. */
template <typename T>
__global__ void vd_cross_entropy_kernel(int64_t n, int vocab, const T *logits, const int32_t *targets, float scale,
                                        float *row_nll, T *dlogits) {
  int lane = (int)threadIdx.x % 32;
  int64_t r = (int64_t)blockIdx.x * (VD_BLOCK / 32) + threadIdx.x / 32;
  if (r >= n) return;
  const T *row = logits + r * vocab;
  int32_t target = targets[r];
  float top = -INFINITY, total = 0;
  for (int c = lane; c < vocab; c += 32) top = fmaxf(top, vd_load(row[c]));
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, i));
  for (int c = lane; c < vocab; c += 32) total += expf(vd_load(row[c]) - top);
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) total += __shfl_xor_sync(0xffffffffU, total, i);
  if (lane == 0) row_nll[r] = target < 0 ? 0.0f : logf(total) - (vd_load(row[target]) - top);
  __syncwarp();
  if (!dlogits) return;
  for (int c = lane; c < vocab; c += 32) {
    float p = expf(vd_load(row[c]) - top) / total;
    vd_set(&dlogits[r * vocab + c], target < 0 ? 0.0f : scale * (p - (c == target ? 1.0f : 0.0f)));
  }
}

static __global__ void vd_add_rows_kernel(int64_t n, const float *row, double *sum) {
  __shared__ double part[VD_BLOCK];
  double mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += VD_BLOCK) mine += (double)row[i];
  part[threadIdx.x] = mine;
  __syncthreads();
  for (int half = VD_BLOCK / 2; half > 0; half /= 2) {
    if ((int)threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *sum += part[0];
}

cudaError_t vd_cuda_cross_entropy(enum vd_precision type, int64_t n, int64_t vocab, const void *logits,
                                  const int32_t *targets, float scale, double *loss_sum, float *row_nll, void *dlogits,
                                  cudaStream_t stream) {
#define CALL(T)                                                                                                        \
  vd_cross_entropy_kernel<T><<<vd_blocks(n, VD_BLOCK / 32), VD_BLOCK, 0, stream>>>(                                    \
      n, (int)vocab, (const T *)logits, targets, scale, row_nll, (T *)dlogits)
  VD_BY_TYPE(type, CALL);
#undef CALL
  vd_add_rows_kernel<<<1, VD_BLOCK, 0, stream>>>(n, row_nll, loss_sum);
  return cudaGetLastError();
}

static __global__ void vd_square_kernel(const float *x, const vd_cuda_piece *piece, double *partial) {
  __shared__ double part[VD_BLOCK / 32];
  vd_cuda_piece p = piece[blockIdx.x];
  const float *v = x + p.first;
  /* 16 squares of floats are added in float at most: what is lost is below what they carry. */
  double mine = 0;
  for (int i = (int)threadIdx.x * 4; i < p.n; i += VD_BLOCK * 4) {
    float s = 0;
    if (i + 4 <= p.n) {
      float4 q = *(const float4 *)(v + i);
      s = (q.x * q.x + q.y * q.y) + (q.z * q.z + q.w * q.w);
    } else {
      for (int k = i; k < p.n; k++) s += v[k] * v[k];
    }
    mine += (double)s;
  }
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) mine += __shfl_xor_sync(0xffffffffU, mine, i);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < VD_BLOCK / 32; w++) part[0] += part[w];
  partial[blockIdx.x] = part[0];
}

static __global__ void vd_square_tensor_kernel(const double *partial, const int32_t *tensor_piece, int n_tensor,
                                               double *norm2) {
  int t = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = (int)threadIdx.x % 32;
  if (t >= n_tensor) return;
  double sum = 0;
  for (int i = tensor_piece[t] + lane; i < tensor_piece[t + 1]; i += 32) sum += partial[i];
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) sum += __shfl_xor_sync(0xffffffffU, sum, i);
  if (lane == 0) norm2[t] = sum;
}

cudaError_t vd_cuda_square_sums(const float *x, const vd_cuda_piece *piece, int n_piece, const int32_t *tensor_piece,
                                int n_tensor, double *partial, double *norm2, cudaStream_t stream) {
  vd_square_kernel<<<(unsigned)n_piece, VD_BLOCK, 0, stream>>>(x, piece, partial);
  vd_square_tensor_kernel<<<vd_blocks(n_tensor, VD_BLOCK / 32), VD_BLOCK, 0, stream>>>(partial, tensor_piece, n_tensor,
                                                                                       norm2);
  return cudaGetLastError();
}

/* One warp: the norms are few. The total is added up in order, as the CPU backend does. */
static __global__ void vd_judge_kernel(int n_tensor, double scale, double clip_norm, double *grad_stats) {
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
  vd_judge_kernel<<<1, 32, 0, stream>>>(n_tensor, scale, clip_norm, grad_stats);
  return cudaGetLastError();
}

VD_GPU float vd_adagrad_step(float g, float scale, float rate, float eps, float *acc, float p) {
  g *= scale;
  *acc += g * g;
  return p - rate * g / (sqrtf(*acc) + eps);
}

template <typename T>
__global__ void vd_adagrad_kernel(float *param, const float *gradient, float *accumulator, T *copy,
                                  const vd_cuda_piece *piece, const double *grad_stats, double lr, float eps,
                                  double clip_step) {
  if (grad_stats[VD_STATS_NONFINITE] >= 0) return;
  vd_cuda_piece where = piece[blockIdx.x];
  double norm = sqrt(grad_stats[VD_STATS_TENSORS + where.tensor]);
  float step = (float)(clip_step > 0 && norm > clip_step ? lr * clip_step / (norm + 1e-10) : lr);
  float scale = (float)grad_stats[VD_STATS_SCALE];
  size_t first = where.first;
  for (int i = (int)threadIdx.x * 4; i < where.n; i += VD_BLOCK * 4) {
    if (i + 4 <= where.n) {
      float4 g = *(const float4 *)(gradient + first + i), acc = *(float4 *)(accumulator + first + i);
      float4 p = *(float4 *)(param + first + i);
      p.x = vd_adagrad_step(g.x, scale, step, eps, &acc.x, p.x);
      p.y = vd_adagrad_step(g.y, scale, step, eps, &acc.y, p.y);
      p.z = vd_adagrad_step(g.z, scale, step, eps, &acc.z, p.z);
      p.w = vd_adagrad_step(g.w, scale, step, eps, &acc.w, p.w);
      *(float4 *)(accumulator + first + i) = acc;
      *(float4 *)(param + first + i) = p;
      float out[4] = {p.x, p.y, p.z, p.w};
      if (copy) vd_write<T, 4>(copy + first + i, out);
    } else {
      for (int k = i; k < where.n; k++) {
        float acc = accumulator[first + k];
        float p = vd_adagrad_step(gradient[first + k], scale, step, eps, &acc, param[first + k]);
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
  vd_adagrad_kernel<T><<<(unsigned)n_piece, VD_BLOCK, 0, stream>>>(param, gradient, accumulator, (T *)copy, piece,     \
                                                                   grad_stats, lr, eps, clip_step)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

VD_GPU float vd_adam_step(float g, const vd_cuda_adam_step &a, float *m, float *v, float p) {
  *m = a.beta1 * *m + a.rest1 * g;
  *v = a.beta2 * *v + a.rest2 * g * g;
  return p - a.step * *m / (sqrtf(*v) * a.correct + a.eps);
}

/* Four neighbouring elements, or the `last` of a piece that are fewer. */
template <typename T>
VD_GPU void vd_adam_four(const vd_cuda_adam_step &a, float scale, int last, float *param, const float *gradient,
                         float *m, float *v, T *copy) {
  float p[4], g[4], first[4], second[4];
  if (last >= 4) {
    vd_read<float, 4>(param, p);
    vd_read<float, 4>(gradient, g);
    vd_read<float, 4>(m, first);
    vd_read<float, 4>(v, second);
#pragma unroll
    for (int i = 0; i < 4; i++) p[i] = vd_adam_step(g[i] * scale, a, &first[i], &second[i], p[i]);
    vd_write<float, 4>(m, first);
    vd_write<float, 4>(v, second);
    vd_write<float, 4>(param, p);
    if (copy) vd_write<T, 4>(copy, p);
    return;
  }
  for (int i = 0; i < last; i++) {
    param[i] = vd_adam_step(gradient[i] * scale, a, &m[i], &v[i], param[i]);
    if (copy) vd_set(&copy[i], param[i]);
  }
}

template <typename T>
__global__ void vd_adam_kernel(float *param, const float *gradient, float *m, float *v, T *copy,
                               const vd_cuda_piece *piece, const double *grad_stats, vd_cuda_adam_step a) {
  if (grad_stats[VD_STATS_NONFINITE] >= 0) return;
  vd_cuda_piece where = piece[blockIdx.x];
  float scale = (float)grad_stats[VD_STATS_SCALE];
  for (int i = (int)threadIdx.x * 4; i < where.n; i += VD_BLOCK * 4) {
    size_t at = where.first + (size_t)i;
    vd_adam_four<T>(a, scale, where.n - i, param + at, gradient + at, m + at, v + at, copy ? copy + at : NULL);
  }
}

cudaError_t vd_cuda_adam(enum vd_precision type, float *param, const float *gradient, float *m, float *v, void *copy,
                         const vd_cuda_piece *piece, int n_piece, const double *grad_stats,
                         const vd_cuda_adam_step *step, cudaStream_t stream) {
#define CALL(T)                                                                                                        \
  vd_adam_kernel<T>                                                                                                    \
      <<<(unsigned)n_piece, VD_BLOCK, 0, stream>>>(param, gradient, m, v, (T *)copy, piece, grad_stats, *step)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

static __global__ void vd_fetch_kernel(size_t n, const uint32_t *from, uint32_t *to) {
  size_t i = (size_t)blockIdx.x * VD_BLOCK + threadIdx.x;
  if (i < n) to[i] = from[i];
}

cudaError_t vd_cuda_fetch(size_t n, const uint32_t *from, uint32_t *to, cudaStream_t stream) {
  vd_fetch_kernel<<<vd_blocks((int64_t)n, VD_BLOCK), VD_BLOCK, 0, stream>>>(n, from, to);
  return cudaGetLastError();
}

typedef struct vd_letter_parts {
  const uint32_t *from[VD_STATS_PARTS];
  int n[VD_STATS_PARTS]; /* words */
} vd_letter_parts;

static __global__ void vd_letter_kernel(const __grid_constant__ vd_letter_parts part, uint32_t *to) {
#pragma unroll
  for (int i = 0; i < VD_STATS_PARTS; i++) {
    for (int w = (int)threadIdx.x; w < part.n[i]; w += VD_BLOCK) to[w] = part.from[i][w];
    to += part.n[i];
  }
}

cudaError_t vd_cuda_letter(int n, const vd_stats_part *part, void *to, cudaStream_t stream) {
  vd_letter_parts parts = {};
  for (int i = 0; i < n; i++) {
    parts.from[i] = (const uint32_t *)part[i].p;
    parts.n[i] = (int)(part[i].bytes / sizeof(uint32_t));
  }
  vd_letter_kernel<<<1, VD_BLOCK, 0, stream>>>(parts, (uint32_t *)to);
  return cudaGetLastError();
}

static __global__ void vd_add_constant_kernel(float *x, size_t n, float value) {
  size_t i = (size_t)blockIdx.x * VD_BLOCK + threadIdx.x;
  if (i < n) x[i] += value;
}
cudaError_t vd_cuda_add_constant(float *x, size_t n, float value, cudaStream_t stream) {
  vd_add_constant_kernel<<<vd_blocks((int64_t)n, VD_BLOCK), VD_BLOCK, 0, stream>>>(x, n, value);
  return cudaGetLastError();
}

/* NaN stays NaN. */
static __global__ void vd_clamp01_kernel(float *x, size_t n) {
  size_t i = (size_t)blockIdx.x * VD_BLOCK + threadIdx.x;
  if (i < n) x[i] = x[i] < 0 ? 0.0f : x[i] > 1 ? 1.0f : x[i];
}
cudaError_t vd_cuda_clamp01(float *x, size_t n, cudaStream_t stream) {
  vd_clamp01_kernel<<<vd_blocks((int64_t)n, VD_BLOCK), VD_BLOCK, 0, stream>>>(x, n);
  return cudaGetLastError();
}
