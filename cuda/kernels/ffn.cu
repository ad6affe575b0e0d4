/* The products of a feed-forward layer with hidden units; ffn.h has the equations.
 *
 * - Tiles: 64 rows x 128 hidden units, by the pipeline of weight_stationary.cuh. A block owns 128 units. About 128
 *   blocks run: width / 128 sets of units, each owned by `row_splits` blocks. The number is constant, so that the order
 *   of the bias sums is.
 * - Epilogue forward: bias, ReLU, dropout, 16-byte stores. Backward: mask by y > 0, scale, column sums in registers;
 *   the producer has brought y to L2.
 * - Bound by the tensor cores without dropout (745 TFLOP/s on an H200 with 32,768 rows) and about so where the mask has
 *   been drawn before; 505 with draws, and 600 backward: the epilogue's instructions slow the products beside them. */
#include "cuda/kernels/ffn.h"
#include "cuda/kernels/unit_mask.cuh"
#include "cuda/kernels/weight_stationary.cuh"

enum {
  MAX_DEPTH = VD_MAX_STEPS * VD_STEP, /* greatest d */
  TARGET_BLOCKS = 128                 /* about so many run; constant, to fix the order of sums */
};

typedef struct ffn_args {
  CUtensorMap x_map, weight_map, y_map; /* y: backward */
  int64_t n;
  int d, width, row_splits; /* blocks that share the same units */
  void *out;
  const float *bias; /* forward */
  vd_philox_keys keys;
  int64_t first; /* dropout's position of element 0 */
  uint32_t threshold;
  float scale;
  const uint32_t *mask; /* dropout's words, as in unit_mask.cuh; NULL: the kernel draws */
  const void *y;        /* backward */
  float *partial;
} ffn_args;

/* Two packed elements: max(x, 0), and a mask with all bits set unless x <= 0. NaN propagates through both. */
VD_DEV uint32_t relu_pair(uint32_t x, __nv_bfloat16) {
  __nv_bfloat162 y = __hmax2_nan(*(__nv_bfloat162 *)&x, __nv_bfloat162(0.0f, 0.0f));
  return *(uint32_t *)&y;
}
VD_DEV uint32_t relu_pair(uint32_t x, __half) {
  __half2 y = __hmax2_nan(*(__half2 *)&x, __half2(0.0f, 0.0f));
  return *(uint32_t *)&y;
}
VD_DEV uint32_t positive_mask(uint32_t x, __nv_bfloat16) {
  return ~__hle2_mask(*(__nv_bfloat162 *)&x, __nv_bfloat162(0.0f, 0.0f));
}
VD_DEV uint32_t positive_mask(uint32_t x, __half) {
  return ~__hle2_mask(*(__half2 *)&x, __half2(0.0f, 0.0f));
}

/* Where the dropout of hidden units comes from. */
enum { DROPS_NONE, DRAWS, READS_MASK };

/* This lane's eight units of each 32. */
typedef struct ffn_bias {
  float at[4][8];
} ffn_bias;
VD_DEV void load_bias(const ffn_args &a, int unit0, ffn_bias &bias) {
#pragma unroll
  for (int i = 0; i < 32; i++)
    bias.at[i >> 3][i & 7] = a.bias[unit0 + 8 * (4 * (i >> 3) + (int)(threadIdx.x & 3)) + (i & 7)] * a.scale;
}
/* The words of the mask of this lane's two rows of a warp's 16 from row0 on. */
VD_DEV void load_mask(const ffn_args &a, int64_t row0, int unit0, uint32_t mask[2]) {
  const int g = (int)(threadIdx.x & 31) >> 2, t = (int)(threadIdx.x & 3);
#pragma unroll
  for (int ih = 0; ih < 2; ih++) {
    const int64_t row = row0 + g + 8 * ih;
    mask[ih] = row < a.n ? a.mask[row * (a.width / 32) + unit0 / 32 + t] : 0;
  }
}
/* Bias, ReLU and dropout of a warp's 16 rows from row0 on, and stores. This lane has rows row0 + g, row0 + g + 8. */
template <typename T, int DROP>
VD_DEV void epilogue_forward(const ffn_args &a, int64_t row0, int unit0, const float c[16][4], const ffn_bias &bias,
                             const uint32_t mask[2]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int64_t element = (row0 + g) * a.width + unit0 + 8 * t, below = (int64_t)8 * a.width;
  T *to = (T *)a.out + element;
  const uint64_t call = (uint64_t)(a.first + element) / 8;
  const bool stored[2] = {row0 + g < a.n, row0 + g + 8 < a.n};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int block = i >> 1, ih = i & 1;
    uint32_t w[4];
#pragma unroll
    for (int u = 0; u < 4; u++) {
      const float *from = c[4 * block + u] + 2 * ih, *shift = bias.at[block] + 2 * u;
      w[u] = relu_pair(vd_pack(fmaf(from[0], a.scale, shift[0]), fmaf(from[1], a.scale, shift[1]), T()), T());
    }
    if constexpr (DROP == READS_MASK) {
#pragma unroll
      for (int u = 0; u < 4; u++) w[u] &= vd_unit_pair_mask(mask[ih], block, u);
    }
    if constexpr (DROP == DRAWS) {
      const vd_philox_words words = vd_draw_words(a.keys, call + (uint64_t)(4 * block + ih * a.width));
#pragma unroll
      for (int u = 0; u < 4; u++) w[u] &= vd_keep_mask(words.v[u], a.threshold);
    }
    if (stored[ih]) *(uint4 *)(to + ih * below + 32 * block) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

/* Sums x[0..7] over the eight lanes that differ in g; lane g gets the sum of x[g]. */
VD_DEV float sum_lanes(float x[8]) {
#pragma unroll
  for (int n = 4; n > 0; n >>= 1) {
    const bool upper = threadIdx.x & (4 * n);
#pragma unroll
    for (int i = 0; i < n; i++) {
      float got = __shfl_xor_sync(0xffffffffU, upper ? x[i] : x[i + n], 4 * n);
      x[i] = (upper ? x[i + n] : x[i]) + got;
    }
  }
  return x[0];
}

/* The outputs that a lane needs of a warp's 16 rows from row0 on: eight units of rows g and g + 8, in four blocks of 32
 * units. */
typedef struct ffn_units {
  uint4 at[4][2];
} ffn_units;
template <typename T> VD_DEV void load_units(const ffn_args &a, int64_t row0, int unit0, ffn_units &units) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int64_t row = row0 + g + 8 * (i & 1);
    const uint4 *from = (const uint4 *)((const T *)a.y + row * a.width + unit0 + 8 * t) + 4 * (i >> 1);
    units.at[i >> 1][i & 1] = row < a.n ? *from : make_uint4(0, 0, 0, 0);
  }
}

/* Masks and scales a warp's 16 rows of gradients, stores them, and adds them to this lane's sums of its columns. */
template <typename T>
VD_DEV void epilogue_backward(const ffn_args &a, int64_t row0, int unit0, const float c[16][4], const ffn_units &units,
                              float total[4][8]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  T *to = (T *)a.out + (row0 + g) * a.width + unit0 + 8 * t;
  const int64_t below = (int64_t)8 * a.width;
  const bool stored[2] = {row0 + g < a.n, row0 + g + 8 < a.n};
#pragma unroll
  for (int block = 0; block < 4; block++) {
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      const uint4 unit = units.at[block][ih];
      const uint32_t y[4] = {unit.x, unit.y, unit.z, unit.w};
      uint32_t w[4];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const float *from = c[4 * block + u] + 2 * ih;
        w[u] = vd_pack(from[0] * a.scale, from[1] * a.scale, T());
      }
      vd_transpose_quad(w);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        w[i] &= positive_mask(y[i], T());
        float2 dx = vd_unpack(w[i], T());
        total[block][2 * i] += dx.x, total[block][2 * i + 1] += dx.y;
      }
      if (stored[ih]) *(uint4 *)(to + ih * below + 32 * block) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

/* A consumer warpgroup. STEPS, here and below: w.steps, or 0 where the number is not known at compile time. */
template <typename T, bool BACK, int DROP, int STEPS>
VD_DEV void consume(const ffn_args &a, const vd_stationary_work &w, vd_stationary<T> *m, int consumer) {
  const int warp = (int)threadIdx.x >> 5 & 3;
  float total[4][8] = {};
  ffn_bias bias;
  ffn_units units;
  if constexpr (!BACK) load_bias(a, w.unit0, bias);
  for (int i = consumer; w.split + i * w.row_splits < w.n_tile; i += VD_CONSUMERS) {
    const int64_t row0 = (int64_t)(w.split + i * w.row_splits) * VD_ROWS + 16 * warp;
    const bool more = w.split + (i + 1) * w.row_splits < w.n_tile;
    float c[16][4];
    uint32_t mask[2] = {0, 0};
    if constexpr (DROP == READS_MASK) load_mask(a, row0, w.unit0, mask);
    if constexpr (BACK) load_units<T>(a, row0, w.unit0, units);
    vd_multiply_tile<T, BACK ? VD_MN_MAJOR : VD_K_MAJOR, STEPS>(m, i, w.steps, i < VD_CONSUMERS, 0, more, c);
    if constexpr (BACK) {
      epilogue_backward<T>(a, row0, w.unit0, c, units, total);
    } else {
      epilogue_forward<T, DROP>(a, row0, w.unit0, c, bias, mask);
    }
  }
  if constexpr (BACK) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int64_t row = (int64_t)(w.split * VD_CONSUMERS + consumer) * 4 + warp;
#pragma unroll
    for (int i = 0; i < 4; i++) a.partial[row * a.width + w.unit0 + 8 * (4 * i + t) + g] = sum_lanes(total[i]);
  }
}

template <typename T, bool BACK, int DROP, int STEPS>
static __global__ void __launch_bounds__(VD_STATIONARY_THREADS, 1) ffn_kernel(const __grid_constant__ ffn_args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  vd_stationary<T> *m = (vd_stationary<T> *)shared;
  const vd_stationary_work w = vd_stationary_work_of(a.n, a.d, a.width, a.row_splits);
  vd_start_stationary(m);
  vd_pdl_wait();
  const int consumer = vd_stationary_consumer();
  if (consumer < 0) {
    vd_producer_registers();
    if (threadIdx.x == 0)
      vd_produce_tiles<T, BACK ? VD_MN_MAJOR : VD_K_MAJOR>(w, m, &a.x_map, &a.weight_map, BACK ? &a.y_map : nullptr);
  } else {
    vd_consumer_registers();
    consume<T, BACK, DROP, STEPS>(a, w, m, consumer);
  }
}

static int row_splits_of(int64_t width) {
  int unit_blocks = (int)(width / VD_UNITS);
  return unit_blocks < TARGET_BLOCKS ? TARGET_BLOCKS / unit_blocks : 1;
}

int64_t vd_cuda_ffn_partials(int64_t width) {
  return (int64_t)row_splits_of(width) * 4 * VD_CONSUMERS;
}

bool vd_cuda_ffn_supports(enum vd_precision type, int64_t d, int64_t width) {
  return type != VD_FP32 && d > 0 && d <= MAX_DEPTH && d % VD_STEP == 0 && width > 0 && width % VD_UNITS == 0 &&
         width <= INT32_MAX / MAX_DEPTH;
}

template <typename T, bool BACK, int DROP> static cudaError_t launch_kernel(const ffn_args *a, cudaStream_t stream) {
  auto kernel = a->d == MAX_DEPTH ? ffn_kernel<T, BACK, DROP, MAX_DEPTH / VD_STEP> : ffn_kernel<T, BACK, DROP, 0>;
  return vd_launch_stationary<T>(kernel, a->width / VD_UNITS * a->row_splits, a, stream);
}

template <typename T, bool BACK>
static cudaError_t launch_ffn(ffn_args *a, const void *x, const void *weight, cudaStream_t stream) {
  cudaError_t e = vd_make_matrix_map(&a->x_map, x, a->n, a->d, a->d);
  if (e == cudaSuccess)
    e = BACK ? vd_make_matrix_map(&a->weight_map, weight, a->d, a->width, a->width)
             : vd_make_weight_map(&a->weight_map, weight, a->width, a->d, VD_UNITS);
  if (e == cudaSuccess && BACK) e = vd_make_matrix_map(&a->y_map, a->y, a->n, a->width, a->width);
  if (e != cudaSuccess) return e;
  if constexpr (!BACK)
    if (a->threshold > 0)
      return a->mask ? launch_kernel<T, false, READS_MASK>(a, stream) : launch_kernel<T, false, DRAWS>(a, stream);
  return launch_kernel<T, BACK, DROPS_NONE>(a, stream);
}

cudaError_t vd_cuda_ffn(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *x, const void *weight,
                        const float *bias, const vd_dropout *dropout, const vd_unit_mask *mask, void *out,
                        cudaStream_t stream) {
  uint32_t threshold = vd_dropout_threshold(dropout->p);
  ffn_args a = {};
  if (!vd_cuda_ffn_supports(type, d, width)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  a.n = n, a.d = (int)d, a.width = (int)width, a.row_splits = row_splits_of(width);
  a.out = out, a.bias = bias;
  a.keys = vd_make_philox_keys(dropout->rng), a.first = dropout->row0 * width, a.threshold = threshold;
  a.scale = (float)vd_dropout_scale(threshold), a.mask = mask ? mask->words : NULL;
  if (type == VD_BF16) return launch_ffn<__nv_bfloat16, false>(&a, x, weight, stream);
  return launch_ffn<__half, false>(&a, x, weight, stream);
}

cudaError_t vd_cuda_ffn_backward(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *dy,
                                 const void *weight, const void *y, float scale, void *dx, float *partial,
                                 cudaStream_t stream) {
  ffn_args a = {};
  if (!vd_cuda_ffn_supports(type, d, width)) return cudaErrorInvalidValue;
  a.n = n, a.d = (int)d, a.width = (int)width, a.row_splits = row_splits_of(width);
  if (n == 0)
    return cudaMemsetAsync(partial, 0, (size_t)(vd_cuda_ffn_partials(width) * width) * sizeof *partial, stream);
  a.out = dx, a.y = y, a.scale = scale, a.partial = partial;
  if (type == VD_BF16) return launch_ffn<__nv_bfloat16, true>(&a, dy, weight, stream);
  return launch_ffn<__half, true>(&a, dy, weight, stream);
}
