/* The second step of sums over rows: kernels have written a partial row a block, which are added up here, those of
 * several sums in one launch.
 *
 * Blocks of 32 x 32 threads, each for 32 columns of one sum: 32 lanes of rows. Shared memory: a 32 x 33 tile. Partial
 * rows lie in the second-level cache; the launch costs more than the bytes. */
#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/pdl.cuh"

/* Kernel arguments of up to 4 KB. Sum i has the blocks first[i] .. first[i + 1] - 1. */
typedef struct row_sum_list {
  vd_row_sum sum[VD_ROW_SUMS];
  int32_t first[VD_ROW_SUMS + 1];
} row_sum_list;
static_assert(sizeof(row_sum_list) <= 4096, "arguments of a kernel");

static __global__ void add_row_sums_kernel(const __grid_constant__ row_sum_list all) {
  __shared__ float lane[32][33];
  vd_pdl_wait();
  int id = 0;
  while ((int)blockIdx.x >= all.first[id + 1]) id++;
  const vd_row_sum &s = all.sum[id];
  const int width = s.n_vector * s.d, c0 = ((int)blockIdx.x - all.first[id]) * 32;
  int c = c0 + (int)threadIdx.x;
  float mine = 0;
  if (c < width) {
#pragma unroll 4
    for (int r = (int)threadIdx.y; r < s.rows; r += 32) mine += s.partial[(int64_t)r * s.stride + c];
  }
  lane[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  float total = vd_warp_sum(lane[threadIdx.x][threadIdx.y]);
  c = c0 + (int)threadIdx.y;
  if (threadIdx.x > 0 || c >= width) return;
  float *to = c < s.d ? s.to[0] : c < 2 * s.d ? s.to[1] : s.to[2];
  to[c % s.d] += total;
}

cudaError_t vd_cuda_add_row_sums(int n, const vd_row_sum *sum, cudaStream_t stream) {
  row_sum_list all = {};
  if (n > VD_ROW_SUMS) return cudaErrorInvalidValue;
  for (int i = 0; i < n; i++) {
    all.sum[i] = sum[i];
    all.first[i + 1] = all.first[i] + (int32_t)vd_blocks(sum[i].n_vector * sum[i].d, 32);
  }
  if (n == 0 || all.first[n] == 0) return cudaSuccess;
  return vd_launch_pdl(add_row_sums_kernel, (unsigned)all.first[n], dim3(32, 32), 0, stream, all);
}
