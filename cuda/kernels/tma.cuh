/* The tensor memory accelerator (TMA, Hopper): copies of boxes of a matrix to shared memory, and the mbarriers that
 * they complete.
 *
 * A box has 64 columns of 16 bits; its rows of 128 bytes are swizzled as wgmma.cuh wants them. Rows and columns beyond
 * the matrix are zeros. */
#ifndef VD_TMA_CUH
#define VD_TMA_CUH

#include "cuda/kernels/mma.cuh"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

/* Not collective. map: the array of `rank` dimensions of 16-bit elements at `array`, aligned to 16 bytes, in boxes of
 * box[rank] elements, of which box[0] is 64. Dimension 0 is contiguous; stride[i] is that of dimension i + 1 in bytes,
 * a multiple of 16. The driver makes the map; this library is linked to the runtime alone, which knows the driver's
 * function. */
static inline cudaError_t vd_make_tensor_map(CUtensorMap *map, const void *array, cuuint32_t rank,
                                             const cuuint64_t *size, const cuuint64_t *stride, const cuuint32_t *box) {
  const cuuint32_t step[5] = {1, 1, 1, 1, 1};
  void *encode = NULL;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
#else
  cudaError_t e = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &encode, cudaEnableDefault, &found);
#endif
  if (e != cudaSuccess) return e;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const CUresult result = ((PFN_cuTensorMapEncodeTiled_v12000)encode)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT16, rank, (void *)array, size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
/* Not collective. The same for the row-major matrix [rows, columns], whose rows are `stride` elements apart, in boxes
 * of 64 x 64. */
static inline cudaError_t vd_make_matrix_map(CUtensorMap *map, const void *matrix, int64_t rows, int64_t columns,
                                             int64_t stride) {
  const cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, bytes[1] = {(cuuint64_t)stride * 2};
  const cuuint32_t box[2] = {64, 64};
  return vd_make_tensor_map(map, matrix, 2, size, bytes, box);
}

/* Not collective. The same for an array [n, rows, columns], in boxes of 64 x 64 of one of the n. */
static inline cudaError_t vd_make_stream_map(CUtensorMap *map, const void *array, int64_t n, int64_t rows,
                                             int64_t columns) {
  const cuuint64_t size[3] = {(cuuint64_t)columns, (cuuint64_t)rows, (cuuint64_t)n};
  const cuuint64_t stride[2] = {(cuuint64_t)columns * 2, (cuuint64_t)(rows * columns) * 2};
  const cuuint32_t box[3] = {64, 64, 1};
  return vd_make_tensor_map(map, array, 3, size, stride, box);
}

/* Starts the copy of the box at `row`, `column` of the matrix to `to`, aligned to 1024 bytes. Its bytes count as
 * arrived at the mbarrier `full`. One thread calls this. */
VD_DEV void vd_copy_box(void *to, const CUtensorMap *map, int row, int column, uint64_t *full) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];" ::"r"(vd_smem_address(to)),
               "l"(map), "r"(vd_smem_address(full)), "r"(column), "r"(row)
               : "memory");
}
/* The same for an array of three dimensions; the box begins at index `outer` of the last. `row` may be negative. */
VD_DEV void vd_copy_box_3d(void *to, const CUtensorMap *map, int outer, int row, int column, uint64_t *full) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(vd_smem_address(to)),
               "l"(map), "r"(vd_smem_address(full)), "r"(column), "r"(row), "r"(outer)
               : "memory");
}
/* The same for an array of five dimensions, of which the box begins at `first` in dimension 0, at `last` in dimension 4
 * and at 0 in the others. */
VD_DEV void vd_copy_box_5d(void *to, const CUtensorMap *map, int first, int last, uint64_t *full) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %5, %5, %5, %4}], [%2];" ::"r"(vd_smem_address(to)),
               "l"(map), "r"(vd_smem_address(full)), "r"(first), "r"(last), "r"(0)
               : "memory");
}
/* Starts the copy of `bytes`, a multiple of 16, to `to`; both are aligned to 16 bytes. They count as arrived at `full`.
 * One thread calls this. */
VD_DEV void vd_copy_bytes(void *to, const void *from, int bytes, uint64_t *full) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   vd_smem_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(vd_smem_address(full))
               : "memory");
}
/* Reads the box to L2. */
VD_DEV void vd_prefetch_box(const CUtensorMap *map, int row, int column) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row)
               : "memory");
}

/* An mbarrier in shared memory whose phases end when `count` threads have arrived and all expected bytes have come. */
VD_DEV void vd_mbarrier_init(uint64_t *barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(vd_smem_address(barrier)), "r"(count) : "memory");
}
/* Makes this thread's initializations visible to copies, once a barrier of the block has followed. */
VD_DEV void vd_mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
/* Arrives, and adds to the bytes that the phase waits for. */
VD_DEV void vd_mbarrier_expect(uint64_t *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(vd_smem_address(barrier)), "r"(bytes)
               : "memory");
}
/* This thread arrives. */
VD_DEV void vd_mbarrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(vd_smem_address(barrier)) : "memory");
}
/* This thread arrives when its copies by cp.async have landed. */
VD_DEV void vd_mbarrier_arrive_copies(uint64_t *barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(vd_smem_address(barrier)) : "memory");
}
/* This warp arrives, once. */
VD_DEV void vd_mbarrier_arrive_warp(uint64_t *barrier) {
  if ((threadIdx.x & 31) == 0) vd_mbarrier_arrive(barrier);
}
/* Waits until the phase of this parity has ended; the one before the first has parity 1. The caller knows that the
 * phase before it has: parities do not tell a phase from the one after the next. */
VD_DEV void vd_mbarrier_wait(uint64_t *barrier, int parity) {
  uint32_t ended;
  do
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ended)
                 : "r"(vd_smem_address(barrier)), "r"(parity)
                 : "memory");
  while (!ended);
}

#endif
