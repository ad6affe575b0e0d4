/* On the host: which kernels serve a layer, their variants, and persistent launches. */
#ifndef VD_ATTENTION_LAUNCH_CUH
#define VD_ATTENTION_LAUNCH_CUH

#include "cuda/attention/attention.h"
#include "cuda/kernels/mma.cuh"
#include "cuda/kernels/pdl.cuh"

enum { VD_WARPGROUP = 128 }; /* threads */

/* Not collective. Number of blocks of a persistent kernel: as many as the device holds at once. */
static inline cudaError_t vd_persistent_blocks(const void *kernel, int shared, int *blocks,
                                               int threads = VD_WARPGROUP) {
  int device, n_sm, per_sm;
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (e == cudaSuccess) e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess) e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, (size_t)shared);
  if (e == cudaSuccess && per_sm == 0) e = cudaErrorInvalidConfiguration;
  if (e == cudaSuccess) *blocks = n_sm * per_sm;
  return e;
}

/* Not collective. The variant of a kernel for this layer's keys, softmax and dropout. */
template <typename KERNEL>
static KERNEL *vd_variant(const vd_cuda_attention *a, KERNEL *plain, KERNEL *dropout, KERNEL *trimmed,
                          KERNEL *trimmed_dropout, KERNEL *relative, KERNEL *relative_dropout) {
  const bool drops = vd_dropout_threshold(a->dropout) > 0;
  if (a->rel_key) return drops ? relative_dropout : relative;
  if (a->trimmed) return drops ? trimmed_dropout : trimmed;
  return drops ? dropout : plain;
}
/* Not collective. The same for kernels that have no variant of their own for a trimmed softmax. */
template <typename KERNEL>
static KERNEL *vd_variant(const vd_cuda_attention *a, KERNEL *plain, KERNEL *dropout, KERNEL *relative,
                          KERNEL *relative_dropout) {
  return vd_variant(a, plain, dropout, plain, dropout, relative, relative_dropout);
}

/* Stream-ordered. Launches a persistent kernel with as many blocks as are resident at once. attribute: n launch
 * attributes. */
template <typename... PARAMS, typename... ARGS>
static cudaError_t vd_launch_persistent(void (*kernel)(PARAMS...), dim3 threads, int shared, cudaStream_t stream,
                                        cudaLaunchAttribute *attribute, unsigned n, ARGS... args) {
  int blocks;
  cudaError_t e = vd_persistent_blocks((const void *)kernel, shared, &blocks, (int)(threads.x * threads.y));
  if (e != cudaSuccess) return e;
  return vd_launch_attributes(attribute, n, kernel, (unsigned)blocks, threads, (size_t)shared, stream, args...);
}

/* Not collective. Score tiles of one stream (vd_first_score_tile), at most. */
static inline size_t vd_stream_score_tiles(const vd_cuda_attention *a) {
  const int32_t reach = a->rel_key ? a->reach : a->window;
  const int32_t key_tiles =
      a->key_tiles > 0 && !a->rel_key ? a->key_tiles : a->n_head * ((reach + VD_TILE - 1) / VD_TILE + 1);
  return (size_t)key_tiles * (size_t)((a->block + VD_TILE - 1) / VD_TILE);
}

/* Stream-ordered. Calls LAUNCH<type, width>::run for the activation type and a tile width that holds a head, for the
 * mma kernels: 16-bit heads up to 64 wide go to the wgmma kernels. */
template <template <typename, int> class LAUNCH, typename... ARGS>
static cudaError_t vd_dispatch(const vd_cuda_attention *a, ARGS... args) {
  switch (a->type) {
  case VD_FP32:
    if (a->d_head <= 32) return LAUNCH<float, 32>::run(a, args...);
    if (a->d_head <= 64) return LAUNCH<float, 64>::run(a, args...);
    return LAUNCH<float, 128>::run(a, args...);
  case VD_BF16:
    return LAUNCH<__nv_bfloat16, 128>::run(a, args...);
  case VD_FP16:
    return LAUNCH<__half, 128>::run(a, args...);
  case VD_PRECISION_AUTO:
    break;
  }
  return cudaErrorInvalidValue;
}

/* Stream-ordered. Fills a->bias_scores; relative.cu. */
cudaError_t vd_fill_bias_scores(const vd_cuda_attention *a, cudaStream_t stream);

/* Not collective. Whether the warp-specialized wgmma kernels (pipeline.cuh) support these shapes. */
static inline bool vd_uses_wgmma(const vd_cuda_attention *a) {
  if (a->d_head > 64) return a->type == VD_BF16 && a->d_head <= 96 && !a->rel_key;
  return a->type != VD_FP32;
}
/* Not collective. The columns of a head that they multiply. */
static inline int vd_wgmma_width(int d_head) {
  return d_head > 64 ? 96 : 64;
}
/* Stream-ordered. vd_cuda_attention_forward by the wgmma kernels, fwd_wgmma.cu. */
cudaError_t vd_forward_wgmma(const vd_cuda_attention *a, const void *block, const void *memory, const void *table,
                             void *out, float *lse, cudaStream_t stream);
/* Stream-ordered. The same for bf16 heads of 65 to 96 without relative keys, fwd_wgmma_96.cu. */
cudaError_t vd_forward_wgmma_96(const vd_cuda_attention *a, const void *block, const void *memory, const void *table,
                                void *out, float *lse, cudaStream_t stream);

#endif
