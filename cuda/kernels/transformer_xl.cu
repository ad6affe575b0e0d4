/* What Transformer-XL needs beside attention: scaled dropout between the parts of a layer, encodings of distances. */
#include "cuda/kernels/element.cuh"

enum { VD_BLOCK = 256 };

/* x and y may be one array. */
template <typename T, int N>
__global__ void vd_scale_dropout_kernel(int64_t total, float scale, vd_drop drop, const T *x, T *y) {
  int64_t e = ((int64_t)blockIdx.x * VD_BLOCK + threadIdx.x) * N;
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
#define CALL(T)                                                                                                        \
  if (width % 8 == 0)                                                                                                  \
    vd_scale_dropout_kernel<T, 8>                                                                                      \
        <<<vd_blocks(total, VD_BLOCK * 8), VD_BLOCK, 0, stream>>>(total, scale, drop, (const T *)x, (T *)y);           \
  else                                                                                                                 \
    vd_scale_dropout_kernel<T, 1>                                                                                      \
        <<<vd_blocks(total, VD_BLOCK), VD_BLOCK, 0, stream>>>(total, scale, drop, (const T *)x, (T *)y)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}

/* A thread a frequency and VD_ROWS distances. In double: in fp32 the angle of distance 1000 would be off by 3e-5 and
 * more, and this is done once an update. */
enum { VD_ROWS = 16 };
template <typename T> __global__ void vd_encode_kernel(int64_t n, int64_t d, int64_t clamp_len, vd_drop drop, T *out) {
  int64_t i = (int64_t)blockIdx.x * VD_BLOCK + threadIdx.x, half = d / 2, first = (int64_t)blockIdx.y * VD_ROWS;
  if (i >= half) return;
  double w = pow(10000.0, -2.0 * (double)i / (double)d);
  for (int64_t x = first; x < first + VD_ROWS && x < n; x++) {
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
  vd_encode_kernel<T><<<dim3(vd_blocks(d / 2, VD_BLOCK), vd_blocks(n, VD_ROWS)), VD_BLOCK, 0, stream>>>(               \
      n, d, clamp_len, drop, (T *)out)
  VD_BY_TYPE(type, CALL);
#undef CALL
  return cudaGetLastError();
}
