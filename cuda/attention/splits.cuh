/* Splits of a query tile (pipeline.cuh): each block stores the sums of its split, and the block that ends last joins
 * them. It adds them in the order of the splits, so that results do not depend on the order in which blocks end. */
#ifndef VD_ATTENTION_SPLITS_CUH
#define VD_ATTENTION_SPLITS_CUH

#include "cuda/attention/pipeline.cuh"

/* float4 of a slot of a->splits: sums [64, width], and four numbers of each consumer thread. */
static constexpr __host__ __device__ int vd_split_float4(int width) {
  return (width / 8 + 1) * VD_WARPGROUP;
}

/* This thread's place in the slot of a split. */
VD_DEV float4 *vd_split_slot(const vd_cuda_attention &a, const vd_query_work &work, int split) {
  return (float4 *)a.splits + (int64_t)(work.slot + split) * vd_split_float4(VD_HEAD_WIDTH) + threadIdx.x;
}

/* Stores the sums of this block's split. */
VD_DEV void vd_store_split(const vd_cuda_attention &a, const vd_query_work &work, const float sum[VD_SUMS][4],
                           float4 rest) {
  float4 *to = vd_split_slot(a, work, work.split);
#pragma unroll
  for (int n = 0; n < VD_SUMS; n++)
    __stcg(to + n * VD_WARPGROUP, make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]));
  __stcg(to + VD_SUMS * VD_WARPGROUP, rest);
}

/* Whether the other splits were stored before this one. Barrier of the consumer warpgroup; `shared` is its own. */
VD_DEV bool vd_is_last_split(const vd_cuda_attention &a, const vd_query_work &work, int *shared, int consumer = 0) {
  __threadfence();
  vd_consumer_sync(consumer);
  if (threadIdx.x == 0) {
    int *arrived = &((vd_tile_schedule *)a.schedule)->arrived[work.slot];
    *shared = atomicAdd(arrived, 1) + 1 == work.n_split;
    if (*shared) *arrived = 0;
  }
  vd_consumer_sync(consumer);
  if (!*shared) return false;
  __threadfence();
  return true;
}

/* The four numbers that this thread's counterpart stored. */
VD_DEV float4 vd_split_rest(const vd_cuda_attention &a, const vd_query_work &work, int split) {
  return __ldcg(vd_split_slot(a, work, split) + VD_SUMS * VD_WARPGROUP);
}
/* sum = keep * sum + add * the split's sums; factors of rows g and g + 8. */
VD_DEV void vd_add_split(const vd_cuda_attention &a, const vd_query_work &work, int split, const float keep[2],
                         const float add[2], float sum[VD_SUMS][4]) {
  const float4 *from = vd_split_slot(a, work, split);
#pragma unroll
  for (int n = 0; n < VD_SUMS; n++) {
    const float4 x = __ldcg(from + n * VD_WARPGROUP);
    sum[n][0] = sum[n][0] * keep[0] + x.x * add[0], sum[n][1] = sum[n][1] * keep[0] + x.y * add[0];
    sum[n][2] = sum[n][2] * keep[1] + x.z * add[1], sum[n][3] = sum[n][3] * keep[1] + x.w * add[1];
  }
}

#endif
