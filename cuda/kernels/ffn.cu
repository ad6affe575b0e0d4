/* The products of a feed-forward layer with hidden units; ffn.h has the equations.
 *
 * - Tiles: 64 rows x 128 hidden units of results, contracted over d in steps of 64. A block has 4 warpgroups (512
 *   threads) and owns 128 units. Their weights, for all of d, stay in shared memory while the block goes over its rows,
 *   so that only rows are read. About 128 blocks run, one on each multiprocessor: width / 128 sets of units, each owned
 *   by `row_splits` blocks. The number is constant, so that the order of the bias sums is.
 * - Warpgroups: each is its own producer and consumer. It takes tiles of rows with a pipeline of 3 stages and a barrier
 *   of its own, so that the epilogue of one overlaps the products of the others. Rows are the left operand, in
 *   registers (ldmatrix); weights are the right operand, which wgmma reads from shared memory.
 * - Shared memory, 224 KB: weights [8 steps][128 x 64], 128 KB; rows [4 warpgroups][3 stages][64 x 64], 96 KB; both
 *   swizzled as in wgmma.cuh.
 * - Barriers: one __syncthreads after the weights have arrived; then, once a step, bar.sync 1 .. 4 of 128 threads, one
 *   for each warpgroup: the step's rows have arrived, and the stage that is filled next has been read.
 * - Epilogue forward: bias, ReLU, dropout, 16-byte stores. Backward: mask by y > 0, scale, column sums in registers.
 * - Bound by the tensor cores. The feed-forward layers, these products and cuBLASLt's together, take 2.67 ms of an
 *   update of 16 streams against 1.57 ms at 790 TFLOP/s, and 8.77 against 6.26 with 64 (doc/PERFORMANCE.md). */
#include "cuda/kernels/ffn.h"
#include "cuda/kernels/pdl.cuh"
#include "cuda/kernels/wgmma.cuh"
#include "src/base/random.h"

enum {
  UNITS = 128,        /* hidden units of a block and of a tile */
  WARPGROUPS = 4,     /* warpgroups of a block */
  ROWS = 64,          /* of a tile */
  DEPTH_STEP = 64,    /* contracted elements of a step */
  MAX_DEPTH = 512,    /* greatest d */
  STAGES = 3,         /* of a warpgroup's pipeline */
  TARGET_BLOCKS = 128 /* about so many run; constant, to fix the order of sums */
};
enum { WEIGHT_STAGE = UNITS * DEPTH_STEP, ROWS_STAGE = ROWS * DEPTH_STEP }; /* elements */
enum { SHARED_BYTES = (MAX_DEPTH / DEPTH_STEP * WEIGHT_STAGE + WARPGROUPS * STAGES * ROWS_STAGE) * 2 };

typedef struct ffn_args {
  int64_t n;
  int d, width, row_splits; /* blocks that share the same units */
  const void *x, *weight;
  void *out;
  const float *bias; /* forward */
  vd_rng rng;
  int64_t first; /* dropout's position of element 0 */
  uint32_t threshold;
  float scale;
  const void *y; /* backward */
  float *partial;
} ffn_args;

/* Barrier of a warpgroup's 128 threads. */
VD_DEV void warpgroup_sync(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

/* Starts the async copy of the block's weights, step after step: 128 rows of 64 contracted elements (K-major), or
 * (BACK) 64 contracted rows of 128 units in two panels (MN-major). */
template <typename T, bool BACK> VD_DEV void copy_weights(const ffn_args &a, int unit0, T *weights) {
  const T *weight = (const T *)a.weight;
  for (int id = (int)threadIdx.x; id < a.d / DEPTH_STEP * (WEIGHT_STAGE / 8); id += 128 * WARPGROUPS) {
    int stage = id / (WEIGHT_STAGE / 8), in = id % (WEIGHT_STAGE / 8);
    T *to = weights + stage * WEIGHT_STAGE;
    if constexpr (BACK) {
      int row = in / 16, chunk = in % 16;
      vd_cp_async16(to + chunk / 8 * ROWS_STAGE + vd_swizzled_chunk<T, DEPTH_STEP>(row, chunk % 8),
                    weight + (int64_t)(stage * DEPTH_STEP + row) * a.width + unit0 + chunk * 8, true);
    } else {
      int row = in / 8, chunk = in % 8;
      vd_cp_async16(to + vd_swizzled_chunk<T, DEPTH_STEP>(row, chunk),
                    weight + (int64_t)(unit0 + row) * a.d + stage * DEPTH_STEP + chunk * 8, true);
    }
  }
}

/* Position of a thread in its warpgroup's copies of rows: address, row, step and stage of its next copy, and the number
 * of rows that the tile has left from that row on. Addresses are incremented: computing them anew took half of the
 * instructions between products. */
template <typename T> struct row_cursor {
  const T *from;
  int64_t row;
  int stage, slot, left;
};
VD_DEV int rows_left(const ffn_args &a, int64_t row) {
  return (int)max((int64_t)0, min(a.n - row, (int64_t)ROWS));
}
/* Starts the async copy of one stage and advances the cursor. DEPTH: a.d, or 0 where d is not known at compile time. */
template <int DEPTH, typename T> VD_DEV void copy_rows(const ffn_args &a, T *rows, row_cursor<T> &at) {
  const int thread = (int)threadIdx.x & 127, d = DEPTH > 0 ? DEPTH : a.d;
  T *to = rows + at.slot * ROWS_STAGE + vd_swizzled_chunk<T, DEPTH_STEP>(thread / 8, thread % 8);
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++)
    if (at.row < a.n + thread / 8) vd_cp_async16(to + 16 * i * DEPTH_STEP, at.from + 16 * i * d, 16 * i < at.left);
  vd_cp_async_commit();
  at.slot = at.slot == STAGES - 1 ? 0 : at.slot + 1;
  at.from += DEPTH_STEP;
  if (++at.stage < d / DEPTH_STEP) return;
  const int step = a.row_splits * WARPGROUPS * ROWS;
  at.stage = 0, at.row += step, at.from += (int64_t)(step - 1) * d, at.left = rows_left(a, at.row);
}

/* Transposes 4 x 4 words over the lanes of a quad: word u of lane t becomes word t of lane u. A lane's four words are
 * then eight neighbouring columns, one 16-byte store. */
VD_DEV void transpose_quad(uint32_t w[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t got = __shfl_xor_sync(0xffffffffU, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? got : w[i], w[i + 1] = odd ? w[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t got = __shfl_xor_sync(0xffffffffU, high ? w[i] : w[i + 2], 2);
    w[i] = high ? got : w[i], w[i + 2] = high ? w[i + 2] : got;
  }
}

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

/* Bias, ReLU and dropout of a warp's 16 rows from row0 on, and stores. This lane has rows row0 + g, row0 + g + 8. */
template <typename T> VD_DEV void epilogue_forward(const ffn_args &a, int64_t row0, int unit0, float c[16][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int block = 0; block < 4; block++) {
    float2 bias[4];
#pragma unroll
    for (int u = 0; u < 4; u++) bias[u] = *(const float2 *)(a.bias + unit0 + 8 * (4 * block + u) + 2 * t);
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      int64_t row = row0 + g + 8 * ih, e = row * a.width + unit0 + 8 * (4 * block + t);
      uint32_t w[4];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const float *from = c[4 * block + u] + 2 * ih;
        float x = (from[0] + bias[u].x) * a.scale, y = (from[1] + bias[u].y) * a.scale;
        w[u] = relu_pair(vd_pack(x, y, T()), T());
      }
      transpose_quad(w);
      if (a.threshold > 0) {
        philox4x32_ctr_t words = vd_philox(a.rng, (uint64_t)(a.first + e) / 8);
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] &= __vcmpgeu2(words.v[i], a.threshold * 0x10001U);
      }
      if (row < a.n) *(uint4 *)((T *)a.out + e) = make_uint4(w[0], w[1], w[2], w[3]);
    }
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

template <typename T> VD_DEV uint4 load_units(const ffn_args &a, int64_t row, int unit) {
  return row < a.n ? *(const uint4 *)((const T *)a.y + row * a.width + unit) : make_uint4(0, 0, 0, 0);
}
/* Masks and scales a warp's 16 rows of gradients, stores them, and adds them to total[], the sums of this lane's
 * columns. y is loaded one block of columns ahead. */
template <typename T>
VD_DEV void epilogue_backward(const ffn_args &a, int64_t row0, int unit0, float c[16][4], float total[4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  uint4 ahead[2] = {load_units<T>(a, row0 + g, unit0 + 8 * t), load_units<T>(a, row0 + g + 8, unit0 + 8 * t)};
#pragma unroll
  for (int block = 0; block < 4; block++) {
    const uint4 units[2] = {ahead[0], ahead[1]};
    for (int ih = 0; ih < 2 && block < 3; ih++)
      ahead[ih] = load_units<T>(a, row0 + g + 8 * ih, unit0 + 8 * (4 * block + 4 + t));
    float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      int64_t row = row0 + g + 8 * ih, e = row * a.width + unit0 + 8 * (4 * block + t);
      const uint32_t y[4] = {units[ih].x, units[ih].y, units[ih].z, units[ih].w};
      uint32_t w[4];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const float *from = c[4 * block + u] + 2 * ih;
        w[u] = vd_pack(from[0] * a.scale, from[1] * a.scale, T());
      }
      transpose_quad(w);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        w[i] &= positive_mask(y[i], T());
        float2 dx = vd_unpack(w[i], T());
        sum[2 * i] += dx.x, sum[2 * i + 1] += dx.y;
      }
      if (row < a.n) *(uint4 *)((T *)a.out + e) = make_uint4(w[0], w[1], w[2], w[3]);
    }
    total[block] += sum_lanes(sum);
  }
}

template <typename T, bool BACK, int DEPTH>
static __global__ void __launch_bounds__(128 * WARPGROUPS, 1) ffn_kernel(const __grid_constant__ ffn_args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warpgroup = (int)threadIdx.x >> 7, warp = (int)threadIdx.x >> 5 & 3,
            stages = (DEPTH > 0 ? DEPTH : a.d) / DEPTH_STEP, unit_blocks = a.width / UNITS;
  const int unit0 = (int)blockIdx.x % unit_blocks * UNITS, split = (int)blockIdx.x / unit_blocks;
  T *weights = (T *)shared, *rows = weights + MAX_DEPTH / DEPTH_STEP * WEIGHT_STAGE + warpgroup * STAGES * ROWS_STAGE;
  const int64_t first = (int64_t)(split * WARPGROUPS + warpgroup) * ROWS;
  row_cursor<T> at = {NULL, first + (threadIdx.x & 127) / 8, 0, 0, 0};
  at.from = (const T *)a.x + at.row * a.d + threadIdx.x % 8 * 8, at.left = rows_left(a, at.row);
  float total[4] = {0, 0, 0, 0};
  int slot = 0;
  vd_pdl_wait();
  copy_weights<T, BACK>(a, unit0, weights);
  vd_cp_async_commit();
  for (int s = 0; s < STAGES - 1; s++) copy_rows<DEPTH>(a, rows, at);
  vd_cp_async_wait<STAGES - 1>();
  vd_fence_proxy_async();
  __syncthreads();
  for (int64_t row0 = first; row0 < a.n; row0 += (int64_t)a.row_splits * WARPGROUPS * ROWS) {
    float c[16][4];
#pragma unroll
    for (int i = 0; i < 64; i++) c[i >> 2][i & 3] = 0;
    vd_wgmma_fence_operand<16>(c);
    for (int s = 0; s < stages; s++) {
      vd_frag_a<T> x[DEPTH_STEP / 16];
      vd_cp_async_wait<STAGES - 2>();
      warpgroup_sync(warpgroup); /* this stage has arrived; the previous one has been read */
      vd_wgmma_wait<0>();
#pragma unroll
      for (int k = 0; k < DEPTH_STEP / 16; k++)
        vd_load_a<T, DEPTH_STEP>(x[k], rows + slot * ROWS_STAGE, warp * 16, 16 * k);
      uint64_t right = vd_smem_descriptor<true>(weights + s * WEIGHT_STAGE, ROWS_STAGE * 2);
      vd_wgmma_fence();
      vd_wgmma_k64_rs<T, 128, BACK ? VD_MN_MAJOR : VD_K_MAJOR>(c, x, right, true);
      vd_wgmma_commit();
      copy_rows<DEPTH>(a, rows, at);
      slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    vd_wgmma_wait<0>();
    vd_wgmma_fence_operand<16>(c);
    int64_t mine = row0 + warp * 16;
    if constexpr (BACK) {
      epilogue_backward<T>(a, mine, unit0, c, total);
    } else {
      epilogue_forward<T>(a, mine, unit0, c);
    }
  }
  if constexpr (BACK) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int64_t row = (int64_t)split * 4 * WARPGROUPS + (threadIdx.x >> 5);
#pragma unroll
    for (int i = 0; i < 4; i++) a.partial[row * a.width + unit0 + 8 * (4 * i + t) + g] = total[i];
  }
}

static int row_splits_of(int64_t width) {
  int unit_blocks = (int)(width / UNITS);
  return unit_blocks < TARGET_BLOCKS ? TARGET_BLOCKS / unit_blocks : 1;
}

int64_t vd_cuda_ffn_partials(int64_t width) {
  return (int64_t)row_splits_of(width) * 4 * WARPGROUPS;
}

bool vd_cuda_ffn_supports(enum vd_precision type, int64_t d, int64_t width) {
  return type != VD_FP32 && d > 0 && d <= MAX_DEPTH && d % DEPTH_STEP == 0 && width > 0 && width % UNITS == 0 &&
         width <= INT32_MAX / MAX_DEPTH;
}

template <typename T, bool BACK> static cudaError_t launch_ffn(const ffn_args *a, cudaStream_t stream) {
  auto kernel = a->d == MAX_DEPTH ? ffn_kernel<T, BACK, MAX_DEPTH> : ffn_kernel<T, BACK, 0>;
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)SHARED_BYTES);
  if (e != cudaSuccess) return e;
  return vd_launch_pdl(kernel, (unsigned)(a->width / UNITS * a->row_splits), 128 * WARPGROUPS, SHARED_BYTES, stream,
                       *a);
}

cudaError_t vd_cuda_ffn(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *x, const void *weight,
                        const float *bias, const vd_dropout *dropout, void *out, cudaStream_t stream) {
  uint32_t threshold = vd_dropout_threshold(dropout->p);
  ffn_args a = {};
  if (!vd_cuda_ffn_supports(type, d, width)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  a.n = n, a.d = (int)d, a.width = (int)width, a.row_splits = row_splits_of(width);
  a.x = x, a.weight = weight, a.out = out, a.bias = bias;
  a.rng = dropout->rng, a.first = dropout->row0 * width, a.threshold = threshold;
  a.scale = (float)vd_dropout_scale(threshold);
  if (type == VD_BF16) return launch_ffn<__nv_bfloat16, false>(&a, stream);
  return launch_ffn<__half, false>(&a, stream);
}

cudaError_t vd_cuda_ffn_backward(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *dy,
                                 const void *weight, const void *y, float scale, void *dx, float *partial,
                                 cudaStream_t stream) {
  ffn_args a = {};
  if (!vd_cuda_ffn_supports(type, d, width)) return cudaErrorInvalidValue;
  a.n = n, a.d = (int)d, a.width = (int)width, a.row_splits = row_splits_of(width);
  a.x = dy, a.weight = weight, a.out = dx, a.y = y, a.scale = scale, a.partial = partial;
  if (type == VD_BF16) return launch_ffn<__nv_bfloat16, true>(&a, stream);
  return launch_ffn<__half, true>(&a, stream);
}
