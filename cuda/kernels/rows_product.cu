/* See rows_product.h; by the pipeline of weight_stationary.cuh.
 *
 * Blocks: width / 128 sets of units, each owned by as many blocks as fill the GPU. The epilogue stores 16 bytes a lane.
 */
#include "cuda/kernels/rows_product.h"
#include "cuda/kernels/weight_stationary.cuh"

enum { MAX_DEPTH = VD_MAX_STEPS * VD_STEP, MIN_DEPTH = 256, MIN_ROWS = 256, MAX_WIDTH = 8192 };

typedef struct product_args {
  CUtensorMap x_map, weight_map;
  int64_t n, out_stride;
  int d, width, row_splits;
  void *out;
} product_args;

/* Stores a warp's 16 rows from row0 on. This lane has rows row0 + g, row0 + g + 8, and of these eight units of each 32.
 */
template <typename T, bool ACROSS>
VD_DEV void store_rows(const product_args &a, int64_t row0, int unit0, const float c[16][4]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    const int64_t row = row0 + (lane >> 2) + 8 * ih;
    T *to = (T *)a.out + row * a.out_stride + unit0 + 8 * (lane & 3);
#pragma unroll
    for (int block = 0; block < 4; block++) {
      uint32_t w[4];
#pragma unroll
      for (int u = 0; u < 4; u++) w[u] = vd_pack(c[4 * block + u][2 * ih], c[4 * block + u][2 * ih + 1], T());
      if constexpr (ACROSS) vd_transpose_quad(w);
      if (row < a.n) *(uint4 *)(to + 32 * block) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

/* STEPS: of d, or 0 where the number is not known at compile time. */
template <typename T, bool ACROSS, int STEPS>
static __global__ void __launch_bounds__(VD_STATIONARY_THREADS, 1)
    product_kernel(const __grid_constant__ product_args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  vd_stationary<T> *m = (vd_stationary<T> *)shared;
  const vd_stationary_work w = vd_stationary_work_of(a.n, a.d, a.width, a.row_splits);
  constexpr int major = ACROSS ? VD_MN_MAJOR : VD_K_MAJOR;
  vd_start_stationary(m);
  vd_pdl_wait();
  const int consumer = vd_stationary_consumer();
  if (consumer < 0) {
    vd_producer_registers();
    if (threadIdx.x == 0) vd_produce_tiles<T, major>(w, m, &a.x_map, &a.weight_map, nullptr);
  } else {
    vd_consumer_registers();
    for (int i = consumer; w.split + i * w.row_splits < w.n_tile; i += VD_CONSUMERS) {
      const int64_t row0 = (int64_t)(w.split + i * w.row_splits) * VD_ROWS + 16 * ((int)threadIdx.x >> 5 & 3);
      const bool more = w.split + (i + 1) * w.row_splits < w.n_tile;
      float c[16][4];
      vd_multiply_tile<T, major, STEPS>(m, i, w.steps, i < VD_CONSUMERS, 0, more, c);
      store_rows<T, ACROSS>(a, row0, w.unit0, c);
    }
  }
}

bool vd_cuda_rows_product_supports(enum vd_precision type, const vd_rows_product *p) {
  const bool aligned = ((size_t)p->x | (size_t)p->weight | (size_t)p->out) % 16 == 0;
  return type != VD_FP32 && aligned && p->n >= MIN_ROWS && p->d >= MIN_DEPTH && p->d <= MAX_DEPTH &&
         p->d % VD_STEP == 0 && p->width > 0 && p->width % VD_UNITS == 0 && p->width <= MAX_WIDTH &&
         p->x_stride % 8 == 0 && p->out_stride % 8 == 0;
}

template <typename T, bool ACROSS> static cudaError_t launch(const product_args *a, cudaStream_t stream) {
  auto kernel = a->d == MAX_DEPTH ? product_kernel<T, ACROSS, MAX_DEPTH / VD_STEP> : product_kernel<T, ACROSS, 0>;
  return vd_launch_stationary<T>(kernel, a->width / VD_UNITS * a->row_splits, a, stream);
}

cudaError_t vd_cuda_rows_product(enum vd_precision type, const vd_rows_product *p, cudaStream_t stream) {
  if (!vd_cuda_rows_product_supports(type, p)) return cudaErrorInvalidValue;
  product_args a = {};
  int device, n_sm;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device);
  if (e == cudaSuccess) e = vd_make_matrix_map(&a.x_map, p->x, p->n, p->d, p->x_stride);
  if (e == cudaSuccess)
    e = p->across ? vd_make_matrix_map(&a.weight_map, p->weight, p->d, p->width, p->width)
                  : vd_make_weight_map(&a.weight_map, p->weight, p->width, p->d, VD_UNITS);
  if (e != cudaSuccess) return e;
  const int units = (int)(p->width / VD_UNITS);
  a.n = p->n, a.d = (int)p->d, a.width = (int)p->width, a.row_splits = n_sm > units ? n_sm / units : 1;
  a.out = p->out, a.out_stride = p->out_stride;
  if (type == VD_BF16)
    return p->across ? launch<__nv_bfloat16, true>(&a, stream) : launch<__nv_bfloat16, false>(&a, stream);
  return p->across ? launch<__half, true>(&a, stream) : launch<__half, false>(&a, stream);
}
