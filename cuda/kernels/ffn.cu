/* See ffn.h. A block keeps the weights of 128 hidden units in shared memory, so that rows alone are read while it
 * works. Each of its four warpgroups takes tiles of 64 rows by itself, with copies and barriers of its own: while some
 * finish a tile the others keep the tensor cores busy. Rows go to the products through registers, the weights from
 * shared memory. */
#include "cuda/kernels/ffn.h"
#include "cuda/kernels/pdl.cuh"
#include "cuda/kernels/wgmma.cuh"

enum {
  VD_SLAB = 128,  /* hidden units of a block */
  VD_GROUPS = 4,  /* warpgroups of a block */
  VD_ROWS = 64,   /* of a tile */
  VD_DEPTH = 64,  /* contracted in a stage */
  VD_DEEP = 512,  /* contracted at most */
  VD_STAGES = 3,  /* of a warpgroup's pipeline */
  VD_BLOCKS = 128 /* about; a constant, to fix the order of sums */
};
enum { VD_SLAB_STAGE = VD_SLAB * VD_DEPTH, VD_ROWS_STAGE = VD_ROWS * VD_DEPTH }; /* elements */
enum { VD_HIDDEN_BYTES = (VD_DEEP / VD_DEPTH * VD_SLAB_STAGE + VD_GROUPS * VD_STAGES * VD_ROWS_STAGE) * 2 };

typedef struct vd_hidden_args {
  int64_t n;
  int d, width, groups; /* groups: blocks that share a slab */
  const void *x, *weight;
  void *out;
  const float *bias; /* forward */
  vd_rng rng;
  int64_t first; /* dropout's number of element 0 */
  uint32_t threshold;
  float scale;
  const void *y; /* backward */
  float *partial;
} vd_hidden_args;

/* Waits for the 128 threads of a warpgroup. */
VD_DEV void vd_group_sync(int group) {
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

/* Starts the copy of the block's weights: stage after stage, 128 rows of 64 elements, or (BACK) 64 rows of 128 units in
 * two panels. */
template <typename T, bool BACK> VD_DEV void vd_copy_slab(const vd_hidden_args &a, int unit0, T *slab) {
  const T *weight = (const T *)a.weight;
  for (int id = (int)threadIdx.x; id < a.d / VD_DEPTH * (VD_SLAB_STAGE / 8); id += 128 * VD_GROUPS) {
    int stage = id / (VD_SLAB_STAGE / 8), in = id % (VD_SLAB_STAGE / 8);
    T *to = slab + stage * VD_SLAB_STAGE;
    if constexpr (BACK) {
      int row = in / 16, chunk = in % 16;
      vd_cp_async16(to + chunk / 8 * VD_ROWS_STAGE + vd_swizzled_chunk<T, VD_DEPTH>(row, chunk % 8),
                    weight + (int64_t)(stage * VD_DEPTH + row) * a.width + unit0 + chunk * 8, true);
    } else {
      int row = in / 8, chunk = in % 8;
      vd_cp_async16(to + vd_swizzled_chunk<T, VD_DEPTH>(row, chunk),
                    weight + (int64_t)(unit0 + row) * a.d + stage * VD_DEPTH + chunk * 8, true);
    }
  }
}

/* Where a warpgroup's copies of rows stand: this thread's next one, and the rows of the tile from its row on. Addresses
 * are stepped, not worked out: they were half of the instructions between products. */
template <typename T> struct vd_row_cursor {
  const T *from;
  int64_t row;
  int stage, slot, left;
};
VD_DEV int vd_rows_left(const vd_hidden_args &a, int64_t row) {
  return (int)max((int64_t)0, min(a.n - row, (int64_t)VD_ROWS));
}
/* DEPTH: a.d, or 0 where the compiler is not to know it. */
template <int DEPTH, typename T> VD_DEV void vd_copy_rows(const vd_hidden_args &a, T *rows, vd_row_cursor<T> &at) {
  const int thread = (int)threadIdx.x & 127, d = DEPTH > 0 ? DEPTH : a.d;
  T *to = rows + at.slot * VD_ROWS_STAGE + vd_swizzled_chunk<T, VD_DEPTH>(thread / 8, thread % 8);
#pragma unroll
  for (int i = 0; i < VD_ROWS / 16; i++)
    if (at.row < a.n + thread / 8) vd_cp_async16(to + 16 * i * VD_DEPTH, at.from + 16 * i * d, 16 * i < at.left);
  vd_cp_async_commit();
  at.slot = at.slot == VD_STAGES - 1 ? 0 : at.slot + 1;
  at.from += VD_DEPTH;
  if (++at.stage < d / VD_DEPTH) return;
  const int step = a.groups * VD_GROUPS * VD_ROWS;
  at.stage = 0, at.row += step, at.from += (int64_t)(step - 1) * d, at.left = vd_rows_left(a, at.row);
}

/* Lane t of a quad gives word u and gets that of lane u which was numbered t: of four neighbouring groups of eight
 * columns each lane then has one whole. */
VD_DEV void vd_turn_quad(uint32_t w[4]) {
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

/* Of two neighbours: x < 0 ? 0 : x, and all bits of those that are not <= 0. What is no number passes on. */
VD_DEV uint32_t vd_relu_pair(uint32_t x, __nv_bfloat16) {
  __nv_bfloat162 y = __hmax2_nan(*(__nv_bfloat162 *)&x, __nv_bfloat162(0.0f, 0.0f));
  return *(uint32_t *)&y;
}
VD_DEV uint32_t vd_relu_pair(uint32_t x, __half) {
  __half2 y = __hmax2_nan(*(__half2 *)&x, __half2(0.0f, 0.0f));
  return *(uint32_t *)&y;
}
VD_DEV uint32_t vd_above_zero(uint32_t x, __nv_bfloat16) {
  return ~__hle2_mask(*(__nv_bfloat162 *)&x, __nv_bfloat162(0.0f, 0.0f));
}
VD_DEV uint32_t vd_above_zero(uint32_t x, __half) {
  return ~__hle2_mask(*(__half2 *)&x, __half2(0.0f, 0.0f));
}

/* Writes a tile of hidden units: rows from row0 on, of which this lane's are row0 + g and row0 + g + 8. */
template <typename T> VD_DEV void vd_finish_forward(const vd_hidden_args &a, int64_t row0, int unit0, float c[16][4]) {
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
        w[u] = vd_relu_pair(vd_pack(x, y, T()), T());
      }
      vd_turn_quad(w);
      if (a.threshold > 0) {
        philox4x32_ctr_t words = vd_philox(a.rng, (uint64_t)(a.first + e) / 8);
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] &= __vcmpgeu2(words.v[i], a.threshold * 0x10001U);
      }
      if (row < a.n) *(uint4 *)((T *)a.out + e) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

/* Sums of x[0..7] over the eight lanes that differ in g: that of x[g]. */
VD_DEV float vd_sum_lanes(float x[8]) {
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

/* Writes a tile of gradients, and adds to the sums of the columns that are this lane's. */
template <typename T> VD_DEV uint4 vd_units_at(const vd_hidden_args &a, int64_t row, int unit) {
  return row < a.n ? *(const uint4 *)((const T *)a.y + row * a.width + unit) : make_uint4(0, 0, 0, 0);
}
template <typename T>
VD_DEV void vd_finish_backward(const vd_hidden_args &a, int64_t row0, int unit0, float c[16][4], float total[4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  uint4 ahead[2] = {vd_units_at<T>(a, row0 + g, unit0 + 8 * t), vd_units_at<T>(a, row0 + g + 8, unit0 + 8 * t)};
#pragma unroll
  for (int block = 0; block < 4; block++) {
    const uint4 units[2] = {ahead[0], ahead[1]};
    for (int ih = 0; ih < 2 && block < 3; ih++)
      ahead[ih] = vd_units_at<T>(a, row0 + g + 8 * ih, unit0 + 8 * (4 * block + 4 + t));
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
      vd_turn_quad(w);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        w[i] &= vd_above_zero(y[i], T());
        float2 dx = vd_unpack(w[i], T());
        sum[2 * i] += dx.x, sum[2 * i + 1] += dx.y;
      }
      if (row < a.n) *(uint4 *)((T *)a.out + e) = make_uint4(w[0], w[1], w[2], w[3]);
    }
    total[block] += vd_sum_lanes(sum);
  }
}

template <typename T, bool BACK, int DEPTH>
__global__ void __launch_bounds__(128 * VD_GROUPS, 1) vd_hidden_kernel(const __grid_constant__ vd_hidden_args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int group = (int)threadIdx.x >> 7, warp = (int)threadIdx.x >> 5 & 3,
            stages = (DEPTH > 0 ? DEPTH : a.d) / VD_DEPTH, slabs = a.width / VD_SLAB;
  const int unit0 = (int)blockIdx.x % slabs * VD_SLAB, share = (int)blockIdx.x / slabs;
  T *slab = (T *)shared, *rows = slab + VD_DEEP / VD_DEPTH * VD_SLAB_STAGE + group * VD_STAGES * VD_ROWS_STAGE;
  const int64_t first = (int64_t)(share * VD_GROUPS + group) * VD_ROWS;
  vd_row_cursor<T> at = {NULL, first + (threadIdx.x & 127) / 8, 0, 0, 0};
  at.from = (const T *)a.x + at.row * a.d + threadIdx.x % 8 * 8, at.left = vd_rows_left(a, at.row);
  float total[4] = {0, 0, 0, 0};
  int slot = 0;
  vd_pdl_wait();
  vd_copy_slab<T, BACK>(a, unit0, slab);
  vd_cp_async_commit();
  for (int s = 0; s < VD_STAGES - 1; s++) vd_copy_rows<DEPTH>(a, rows, at);
  vd_cp_async_wait<VD_STAGES - 1>();
  vd_fence_proxy_async();
  __syncthreads();
  for (int64_t row0 = first; row0 < a.n; row0 += (int64_t)a.groups * VD_GROUPS * VD_ROWS) {
    float c[16][4];
#pragma unroll
    for (int i = 0; i < 64; i++) c[i >> 2][i & 3] = 0;
    vd_wgmma_fence_operand<16>(c);
    for (int s = 0; s < stages; s++) {
      vd_frag_a<T> x[VD_DEPTH / 16];
      vd_cp_async_wait<VD_STAGES - 2>();
      vd_group_sync(group); /* this stage is there, and the one before has been read */
      vd_wgmma_wait<0>();
#pragma unroll
      for (int k = 0; k < VD_DEPTH / 16; k++)
        vd_load_a<T, VD_DEPTH>(x[k], rows + slot * VD_ROWS_STAGE, warp * 16, 16 * k);
      uint64_t right = vd_smem_descriptor(slab + s * VD_SLAB_STAGE, VD_ROWS_STAGE * 2);
      vd_wgmma_fence();
#pragma unroll
      for (int k = 0; k < VD_DEPTH / 16; k++) vd_wgmma_held<T, BACK>(c, x[k], right + (BACK ? k * 128 : k * 2));
      vd_wgmma_commit();
      vd_copy_rows<DEPTH>(a, rows, at);
      slot = slot == VD_STAGES - 1 ? 0 : slot + 1;
    }
    vd_wgmma_wait<0>();
    vd_wgmma_fence_operand<16>(c);
    int64_t mine = row0 + warp * 16;
    if constexpr (BACK) {
      vd_finish_backward<T>(a, mine, unit0, c, total);
    } else {
      vd_finish_forward<T>(a, mine, unit0, c);
    }
  }
  if constexpr (BACK) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int64_t row = (int64_t)share * 4 * VD_GROUPS + (threadIdx.x >> 5);
#pragma unroll
    for (int i = 0; i < 4; i++) a.partial[row * a.width + unit0 + 8 * (4 * i + t) + g] = total[i];
  }
}

static int vd_groups_of(int64_t width) {
  int slabs = (int)(width / VD_SLAB);
  return slabs < VD_BLOCKS ? VD_BLOCKS / slabs : 1;
}

int64_t vd_cuda_ffn_partials(int64_t width) {
  return (int64_t)vd_groups_of(width) * 4 * VD_GROUPS;
}

bool vd_cuda_ffn_supports(enum vd_precision type, int64_t d, int64_t width) {
  return type != VD_FP32 && d > 0 && d <= VD_DEEP && d % VD_DEPTH == 0 && width > 0 && width % VD_SLAB == 0 &&
         width <= INT32_MAX / VD_DEEP;
}

template <typename T, bool BACK> static cudaError_t vd_launch_hidden(const vd_hidden_args *a, cudaStream_t stream) {
  auto kernel = a->d == VD_DEEP ? vd_hidden_kernel<T, BACK, VD_DEEP> : vd_hidden_kernel<T, BACK, 0>;
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)VD_HIDDEN_BYTES);
  if (e != cudaSuccess) return e;
  return vd_launch_pdl(kernel, (unsigned)(a->width / VD_SLAB * a->groups), 128 * VD_GROUPS, VD_HIDDEN_BYTES, stream,
                       *a);
}

cudaError_t vd_cuda_ffn(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *x, const void *weight,
                        const float *bias, const vd_dropout *dropout, void *out, cudaStream_t stream) {
  uint32_t threshold = vd_dropout_threshold(dropout->p);
  vd_hidden_args a = {};
  if (!vd_cuda_ffn_supports(type, d, width)) return cudaErrorInvalidValue;
  if (n == 0) return cudaSuccess;
  a.n = n, a.d = (int)d, a.width = (int)width, a.groups = vd_groups_of(width);
  a.x = x, a.weight = weight, a.out = out, a.bias = bias;
  a.rng = dropout->rng, a.first = dropout->row0 * width, a.threshold = threshold;
  a.scale = (float)vd_dropout_scale(threshold);
  if (type == VD_BF16) return vd_launch_hidden<__nv_bfloat16, false>(&a, stream);
  return vd_launch_hidden<__half, false>(&a, stream);
}

cudaError_t vd_cuda_ffn_backward(enum vd_precision type, int64_t n, int64_t d, int64_t width, const void *dy,
                                 const void *weight, const void *y, float scale, void *dx, float *partial,
                                 cudaStream_t stream) {
  vd_hidden_args a = {};
  if (!vd_cuda_ffn_supports(type, d, width)) return cudaErrorInvalidValue;
  a.n = n, a.d = (int)d, a.width = (int)width, a.groups = vd_groups_of(width);
  a.x = dy, a.weight = weight, a.out = dx, a.y = y, a.scale = scale, a.partial = partial;
  if (type == VD_BF16) return vd_launch_hidden<__nv_bfloat16, true>(&a, stream);
  return vd_launch_hidden<__half, true>(&a, stream);
}
