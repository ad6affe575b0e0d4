/* Kernels of Transformer-XL other than attention: scaled dropout between the parts of a layer, sinusoidal position
 * encodings. Blocks of 256 threads, no shared memory.
 *
 * scale_dropout: 8 elements a thread where the width is a multiple of 8, else one; bound by memory bandwidth.
 * position_encodings: a thread computes one frequency of 16 distances; bound by fp64 sine and cosine, once an update.
 */
#include "cuda/kernels/dropout.cuh"
#include "cuda/kernels/pdl.cuh"

enum { BLOCK = 256 };

/* y = scale * dropout(x); x and y may be one array. */
template <typename T, int N>
static __global__ void scale_dropout_kernel(int64_t total, float scale, vd_drop drop, const T *x, T *y) {
  int64_t e = ((int64_t)blockIdx.x * BLOCK + threadIdx.x) * N;
  vd_pdl_wait();
  if (e >= total) return;
  float v[N];
  vd_read<T, N>(x + e, v);
#pragma unroll
  for (int i = 0; i < N; i++) v[i] *= scale;
  if (drop.threshold > 0) vd_apply_drop<N>(drop, e, v);
  vd_write<T, N>(y + e, v);
}

cudaError_t vd_cuda_scale_dropout(enum vd_precision type, int64_t n, int64_t width, float scale,
                                  const vd_dropout *dropout, const void *x, void *y, cudaStream_t stream) {
  vd_drop drop = vd_make_drop(dropout, width);
  int64_t total = n * width;
  if (total == 0) return cudaSuccess;
  cudaError_t e = cudaSuccess;
#define CALL(T)                                                                                                        \
  e = width % 8 == 0 ? vd_launch_pdl(scale_dropout_kernel<T, 8>, vd_blocks(total, BLOCK * 8), BLOCK, 0, stream, total, \
                                     scale, drop, (const T *)x, (T *)y)                                                \
                     : vd_launch_pdl(scale_dropout_kernel<T, 1>, vd_blocks(total, BLOCK), BLOCK, 0, stream, total,     \
                                     scale, drop, (const T *)x, (T *)y)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return e;
}

/* A thread computes one frequency of DISTANCES distances. In double: an fp32 angle of distance 1000 has an error of
 * 3e-5 and more, and the encodings are made only once an update. */
enum { DISTANCES = 16 };
template <typename T>
static __global__ void position_encodings_kernel(int64_t n, int64_t d, int64_t clamp_len, vd_drop drop, T *out) {
  int64_t i = (int64_t)blockIdx.y * BLOCK + threadIdx.x, half = d / 2, first = (int64_t)blockIdx.x * DISTANCES;
  if (i >= half) return;
  double w = pow(10000.0, -2.0 * (double)i / (double)d);
  for (int64_t x = first; x < first + DISTANCES && x < n; x++) {
    double sine, cosine;
    sincos((double)(clamp_len > 0 && x > clamp_len ? clamp_len : x) * w, &sine, &cosine);
    float at[2] = {(float)sine, (float)cosine};
    for (int k = 0; k < 2; k++) {
      int64_t e = x * d + k * half + i;
      if (drop.threshold > 0) vd_apply_drop<1>(drop, e, &at[k]);
      vd_set(&out[e], at[k]);
    }
  }
}

cudaError_t vd_cuda_position_encodings(enum vd_precision type, int64_t n, int64_t d, int64_t clamp_len,
                                       const vd_dropout *dropout, void *out, cudaStream_t stream) {
  vd_drop drop = vd_make_drop(dropout, d);
  if (n == 0 || d < 2) return cudaSuccess;
#define CALL(T)                                                                                                        \
  position_encodings_kernel<T>                                                                                         \
      <<<dim3(vd_blocks(n, DISTANCES), vd_blocks(d / 2, BLOCK)), BLOCK, 0, stream>>>(n, d, clamp_len, drop, (T *)out)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}
