/* Shared by the kernels of this room: conversions of the activation types, vectors of elements, sums over a warp,
 * the choice of an instance by type. */
#ifndef VD_CUDA_ELEMENT_CUH
#define VD_CUDA_ELEMENT_CUH

#include "cuda/kernels/kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define VD_GPU static __device__ __forceinline__

/* An element as fp32 (vd_load), and fp32 rounded to an element (vd_set). */
VD_GPU float vd_load(float x) {
  return x;
}
VD_GPU float vd_load(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
VD_GPU float vd_load(__half x) {
  return __half2float(x);
}
VD_GPU void vd_set(float *to, float x) {
  *to = x;
}
VD_GPU void vd_set(__nv_bfloat16 *to, float x) {
  *to = __float2bfloat16(x);
}
VD_GPU void vd_set(__half *to, float x) {
  *to = __float2half(x);
}

/* N neighbouring elements, moved by one instruction where N > 1; the address must be a multiple of their size. */
template <typename T, int N> struct __align__(sizeof(T) * N) vd_pack {
  T at[N];
};
template <typename T, int N> VD_GPU void vd_read(const T *from, float out[N]) {
  vd_pack<T, N> p = *(const vd_pack<T, N> *)from;
#pragma unroll
  for (int i = 0; i < N; i++) out[i] = vd_load(p.at[i]);
}
template <typename T, int N> VD_GPU void vd_write(T *to, const float in[N]) {
  vd_pack<T, N> p;
#pragma unroll
  for (int i = 0; i < N; i++) vd_set(&p.at[i], in[i]);
  *(vd_pack<T, N> *)to = p;
}

/* The maximum and the sum of the x of a warp's lanes, in every lane; all 32 lanes take part. */
VD_GPU float vd_warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, i));
  return x;
}
template <typename T> VD_GPU T vd_warp_sum(T x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(0xffffffffU, x, i);
  return x;
}

/* Expands CALL(T) with the C++ type of `type`. */
#define VD_BY_TYPE(type, CALL)                                                                                         \
  do {                                                                                                                 \
    if ((type) == VD_FP32) {                                                                                           \
      CALL(float);                                                                                                     \
    } else if ((type) == VD_BF16) {                                                                                    \
      CALL(__nv_bfloat16);                                                                                             \
    } else {                                                                                                           \
      CALL(__half);                                                                                                    \
    }                                                                                                                  \
  } while (0)

/* Not collective. Number of blocks of `per_block` items each that n items need. */
static inline unsigned vd_blocks(int64_t n, int64_t per_block) {
  return (unsigned)((n + per_block - 1) / per_block);
}

#endif
