/* Which attention weights are kept, drawn once for both kernels of the backward pass where forward has not left it. */
#include "cuda/attention/bwd_common.cuh"
#include "cuda/attention/pipeline.cuh"

/* Key tiles that a block draws for one query tile. */
enum { VD_DRAWN = 16 };

template <bool REL>
__global__ void __launch_bounds__(2 * VD_THREADS)
    vd_draw_kernel(const __grid_constant__ vd_cuda_attention a, vd_drop drop, uint32_t *kept) {
  const vd_query_work work = vd_query_work_of<REL>(a, (const vd_plan *)a.plan, (int)blockIdx.x);
  const int first = (int)blockIdx.y * VD_DRAWN, end = min(first + VD_DRAWN, work.n), thread = threadIdx.x & 127;
  vd_set_drop(&drop, a, work.it.head, work.it.stream);
  for (int far = first + (int)(threadIdx.x >> 7); far < end; far += 2) {
    uint32_t *to = vd_kept_of(a, kept, work.it.stream, work.it.head, work.it.tile, far);
    to[thread] = vd_draw_queries(a, drop, work.i0 + 16 * (thread >> 5), work.i0 - far * VD_TILE);
  }
}

size_t vd_cuda_attention_kept_size(const vd_cuda_attention *a) {
  if (!vd_by_group(a) || !vd_make_drop(a).threshold) return 0;
  return (size_t)a->n_stream * (size_t)a->n_head * (size_t)vd_ceil_div(a->block, VD_TILE) * (size_t)vd_most_tiles(*a) *
         VD_THREADS * sizeof(uint32_t);
}

cudaError_t vd_draw_kept(const vd_cuda_attention *a, uint32_t *kept, cudaStream_t stream) {
  const vd_drop drop = vd_make_drop(a);
  dim3 blocks((unsigned)(a->n_head * a->n_stream * vd_ceil_div(a->block, VD_TILE)),
              (unsigned)vd_ceil_div(vd_most_tiles(*a), VD_DRAWN));
  if (!drop.threshold) return cudaSuccess;
  if (a->rel_key) {
    vd_draw_kernel<true><<<blocks, 2 * VD_THREADS, 0, stream>>>(*a, drop, kept);
  } else {
    vd_draw_kernel<false><<<blocks, 2 * VD_THREADS, 0, stream>>>(*a, drop, kept);
  }
  return cudaGetLastError();
}
