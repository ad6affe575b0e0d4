/* Which attention weights are kept, drawn once for both kernels of the backward pass where forward has not left it. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/pipeline.cuh"

/* Key tiles that a block draws for one query tile. */
enum { VD_DRAWN = 16 };

template <bool REL>
__global__ void __launch_bounds__(2 * VD_WARPGROUP)
    vd_draw_kernel(const __grid_constant__ vd_cuda_attention a, vd_dropout_draws drop, uint32_t *dropout_mask) {
  const vd_query_work work = vd_query_work_at<REL>(a, (const vd_tile_schedule *)a.schedule, (int)blockIdx.x);
  const int first = (int)blockIdx.y * VD_DRAWN, end = min(first + VD_DRAWN, work.n), thread = threadIdx.x & 127;
  vd_seek_dropout(&drop, a, work.at.head, work.at.stream);
  for (int far = first + (int)(threadIdx.x >> 7); far < end; far += 2) {
    uint32_t *to = vd_dropout_mask_tile(a, dropout_mask, work.at.stream, work.at.head, work.at.tile, far);
    to[thread] = vd_draw_dropout_mask(a, drop, work.i0 + 16 * (thread >> 5), work.i0 - far * VD_TILE);
  }
}

size_t vd_cuda_attention_dropout_mask_size(const vd_cuda_attention *a) {
  if (!vd_uses_wgmma(a) || !vd_make_dropout_draws(a).threshold) return 0;
  return (size_t)a->n_stream * (size_t)a->n_head * (size_t)vd_ceil_div(a->block, VD_TILE) *
         (size_t)vd_max_key_tiles(*a) * VD_WARPGROUP * sizeof(uint32_t);
}

cudaError_t vd_draw_kept(const vd_cuda_attention *a, uint32_t *dropout_mask, cudaStream_t stream) {
  const vd_dropout_draws drop = vd_make_dropout_draws(a);
  dim3 blocks((unsigned)(a->n_head * a->n_stream * vd_ceil_div(a->block, VD_TILE)),
              (unsigned)vd_ceil_div(vd_max_key_tiles(*a), VD_DRAWN));
  if (!drop.threshold) return cudaSuccess;
  if (a->rel_key) {
    vd_draw_kernel<true><<<blocks, 2 * VD_WARPGROUP, 0, stream>>>(*a, drop, dropout_mask);
  } else {
    vd_draw_kernel<false><<<blocks, 2 * VD_WARPGROUP, 0, stream>>>(*a, drop, dropout_mask);
  }
  return cudaGetLastError();
}
