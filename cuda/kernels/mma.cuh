/* 16 x 16 tiles on tensor cores (mma.sync m16n8k16): tiles in swizzled shared memory, fragments, products.
 *
 * Lane l of a warp has g = l / 4 and t = l % 4. A product's result c[jn][2 ih + jj] is row g + 8 ih, column 8 jn + 2t +
 * jj of the 16 x 16 tile. Operand fragments hold the same elements in every type: fp32 operands are split into two TF32
 * parts and multiplied in three m16n8k8 products, where the order of the k index is permuted alike in both operands so
 * that a result can be used as the next product's operand. */
#ifndef VD_FRAGMENT_CUH
#define VD_FRAGMENT_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define VD_DEV __device__ __forceinline__

enum { VD_TILE = 64 }; /* rows of a tile */

template <typename T> struct vd_frag_a { /* 16 x 16 */
  uint32_t x[4];
};
template <> struct vd_frag_a<float> { float x[8]; };
template <typename T> struct vd_frag_b { /* 16 (k) x 8 */
  uint32_t x[2];
};
template <> struct vd_frag_b<float> { float x[4]; };

/* Two floats to a pair of 16-bit elements, and back; the last argument chooses the type. */
VD_DEV uint32_t vd_pack(float lo, float hi, __nv_bfloat16) {
  __nv_bfloat162 p = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t *>(&p);
}
VD_DEV uint32_t vd_pack(float lo, float hi, __half) {
  __half2 p = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<uint32_t *>(&p);
}
VD_DEV float2 vd_unpack(uint32_t v, __nv_bfloat16) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&v));
}
VD_DEV float2 vd_unpack(uint32_t v, __half) {
  return __half22float2(*reinterpret_cast<__half2 *>(&v));
}

/* Element offset of 16-byte chunk `chunk` of row `row` in a swizzled tile of D columns: the exclusive or spreads eight
 * rows of one chunk column over all banks. */
template <typename T, int D> VD_DEV int vd_swizzled_chunk(int row, int chunk) {
  constexpr int per_chunk = 16 / (int)sizeof(T), chunks = D / per_chunk;
  constexpr int shift = chunks >= 8 ? 0 : 1, mask = chunks >= 8 ? 7 : 3;
  return row * D + ((chunk ^ ((row >> shift) & mask)) * per_chunk);
}
/* Element offset of an element of a swizzled tile. */
template <typename T, int D> VD_DEV int vd_swizzled(int row, int col) {
  constexpr int per_chunk = 16 / (int)sizeof(T);
  return vd_swizzled_chunk<T, D>(row, col / per_chunk) + col % per_chunk;
}

/* Address in the shared window, as PTX instructions take it. */
VD_DEV uint32_t vd_smem_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* Address of chunk column + chunk of row block + row; block is a multiple of 16, column even, chunk 0 or 1. Only the
 * exclusive or depends on the lane and the column, so that few addresses serve all rows. Tiles are aligned to a row. */
template <typename T, int D>
VD_DEV uint32_t vd_swizzled_address(const T *tile, int block, int row, int column, int chunk) {
  uint32_t lane = vd_smem_address(tile) + (uint32_t)(vd_swizzled_chunk<T, D>(row, chunk) * (int)sizeof(T));
  return (lane ^ (uint32_t)(column * 16)) + (uint32_t)(block * D * (int)sizeof(T));
}

/* Four 8 x 8 matrices of 16-bit elements; each lane gives the address of a row. */
VD_DEV void vd_ldmatrix(uint32_t *x, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
/* The same, transposed. */
VD_DEV void vd_ldmatrix_trans(uint32_t *x, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
/* Stores four 8 x 8 matrices; each lane gives the address of a row. */
VD_DEV void vd_stmatrix(uint32_t address, const uint32_t *x) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

/* A (m x k) from rows m of a tile: rows row0.. + 15, columns col0.. + 15. */
template <typename T, int D> VD_DEV void vd_load_a(vd_frag_a<T> &a, const T *tile, int row0, int col0) {
  int lane = threadIdx.x & 31;
  if constexpr (sizeof(T) == 4) {
    int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 4; i++) {
      float2 p = *(const float2 *)(tile + vd_swizzled<T, D>(row0 + g + 8 * (i & 1), col0 + 2 * t + 8 * (i >> 1)));
      a.x[2 * i] = p.x, a.x[2 * i + 1] = p.y;
    }
  } else {
    vd_ldmatrix(a.x, vd_swizzled_address<T, D>(tile, row0, lane & 15, col0 >> 3, lane >> 4));
  }
}

/* A (m x k) from a tile whose rows are k and columns m: rows k0.. + 15, columns m0.. + 15. */
template <typename T, int D> VD_DEV void vd_load_a_trans(vd_frag_a<T> &a, const T *tile, int k0, int m0) {
  int lane = threadIdx.x & 31;
  if constexpr (sizeof(T) == 4) {
    int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 8; i++) {
      int m = m0 + g + 8 * ((i >> 1) & 1), k = k0 + 2 * t + (i & 1) + 8 * (i >> 2);
      a.x[i] = tile[vd_swizzled<T, D>(k, m)];
    }
  } else {
    int row = (lane & 7) + ((lane >> 4) << 3);
    vd_ldmatrix_trans(a.x, vd_swizzled_address<T, D>(tile, k0, row, m0 >> 3, (lane >> 3) & 1));
  }
}

/* Two B (k x 8) from a tile whose rows are n: rows n0.. + 15, columns k0.. + 15. */
template <typename T, int D> VD_DEV void vd_load_b(vd_frag_b<T> *b, const T *tile, int n0, int k0) {
  int lane = threadIdx.x & 31;
  if constexpr (sizeof(T) == 4) {
    int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 4; i++) {
      float2 p = *(const float2 *)(tile + vd_swizzled<T, D>(n0 + g + 8 * (i >> 1), k0 + 2 * t + 8 * (i & 1)));
      b[i >> 1].x[2 * (i & 1)] = p.x, b[i >> 1].x[2 * (i & 1) + 1] = p.y;
    }
  } else {
    uint32_t x[4];
    int row = (lane & 7) + ((lane >> 4) << 3);
    vd_ldmatrix(x, vd_swizzled_address<T, D>(tile, n0, row, k0 >> 3, (lane >> 3) & 1));
    b[0].x[0] = x[0], b[0].x[1] = x[1], b[1].x[0] = x[2], b[1].x[1] = x[3];
  }
}

/* Two B (k x 8) from a tile whose rows are k: rows k0.. + 15, columns n0.. + 15. */
template <typename T, int D> VD_DEV void vd_load_b_trans(vd_frag_b<T> *b, const T *tile, int k0, int n0) {
  int lane = threadIdx.x & 31;
  if constexpr (sizeof(T) == 4) {
    int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 8; i++)
      b[i >> 2].x[i & 3] = tile[vd_swizzled<T, D>(k0 + 2 * t + (i & 1) + 8 * ((i >> 1) & 1), n0 + g + 8 * (i >> 2))];
  } else {
    uint32_t x[4];
    vd_ldmatrix_trans(x, vd_swizzled_address<T, D>(tile, k0, lane & 15, n0 >> 3, lane >> 4));
    b[0].x[0] = x[0], b[0].x[1] = x[1], b[1].x[0] = x[2], b[1].x[1] = x[3];
  }
}

/* c += a b. */
VD_DEV void vd_mma(float *c, const vd_frag_a<__nv_bfloat16> &a, const vd_frag_b<__nv_bfloat16> &b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}
VD_DEV void vd_mma(float *c, const vd_frag_a<__half> &a, const vd_frag_b<__half> &b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

/* Rounds to TF32. */
VD_DEV uint32_t vd_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
/* c += a b of TF32 operands, m16n8k8. */
VD_DEV void vd_mma_tf32(float *c, const uint32_t *a, const uint32_t *b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* c += a b in fp32, as three TF32 products. The tensor core truncates its sums; a fresh accumulator for each step,
 * added with rounding, keeps fp32 accuracy over long sums. */
VD_DEV void vd_mma(float *c, const vd_frag_a<float> &a, const vd_frag_b<float> &b) {
  float sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t ah[4], al[4], bh[2], bl[2];
#pragma unroll
    for (int i = 0; i < 4; i++) { /* (g, k), (g + 8, k), (g, k'), (g + 8, k'), with k = 2t, k' = 2t + 1 */
      float x = a.x[4 * half + 2 * (i & 1) + (i >> 1)];
      ah[i] = vd_tf32(x);
      al[i] = vd_tf32(x - __uint_as_float(ah[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float x = b.x[2 * half + i];
      bh[i] = vd_tf32(x);
      bl[i] = vd_tf32(x - __uint_as_float(bh[i]));
    }
    vd_mma_tf32(sum, al, bh);
    vd_mma_tf32(sum, ah, bl);
    vd_mma_tf32(sum, ah, bh);
  }
  for (int i = 0; i < 4; i++) c[i] += sum[i];
}

/* A result (16 x 16) as the left operand of the next product. */
template <typename T> VD_DEV void vd_result_to_a(vd_frag_a<T> &a, const float c[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float lo = c[i >> 1][2 * (i & 1)], hi = c[i >> 1][2 * (i & 1) + 1];
    if constexpr (sizeof(T) == 4) {
      a.x[2 * i] = lo, a.x[2 * i + 1] = hi;
    } else {
      a.x[i] = vd_pack(lo, hi, T());
    }
  }
}

/* Sixteen rows of a tile as left operand: in registers where they fit (HOLD), otherwise read again for every product.
 */
template <typename T, int D, bool HOLD> struct vd_left_rows {
  /* How far loops over the D / 16 steps of a contraction are unrolled: wholly where registers hold the operand, else so
   * far that loads overlap and few registers spill. In fp32 a step has six times as many products as in 16 bits. */
  static constexpr int unroll = HOLD ? D / 16 : sizeof(T) == 2 ? 4 : 2;
  vd_frag_a<T> held[HOLD ? D / 16 : 1];
  const T *tile;
  int row0;
  VD_DEV void set(const T *tile_, int row0_) {
    tile = tile_, row0 = row0_;
    if constexpr (HOLD) {
#pragma unroll
      for (int i = 0; i < D / 16; i++) vd_load_a<T, D>(held[i], tile, row0, 16 * i);
    }
  }
  VD_DEV void get(vd_frag_a<T> &a, int i) const {
    if constexpr (HOLD) {
      a = held[i];
    } else {
      vd_load_a<T, D>(a, tile, row0, 16 * i);
    }
  }
};

/* Zeros a 16 x 16 accumulator. */
VD_DEV void vd_clear(float c[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; i++) c[i >> 2][i & 3] = 0;
}

/* c += rows * (rows n0.. + 15 of tile)^T, contracted over D columns. */
template <typename T, int D, bool HOLD>
VD_DEV void vd_add_dots(float c[2][4], const vd_left_rows<T, D, HOLD> &rows, const T *tile, int n0) {
#pragma unroll(vd_left_rows <T, D, HOLD>::unroll)
  for (int i = 0; i < D / 16; i++) {
    vd_frag_a<T> a;
    vd_frag_b<T> b[2];
    rows.get(a, i);
    vd_load_b<T, D>(b, tile, n0, 16 * i);
    vd_mma(c[0], a, b[0]);
    vd_mma(c[1], a, b[1]);
  }
}

/* c = rows * (rows n0.. + 15 of tile)^T. */
template <typename T, int D, bool HOLD>
VD_DEV void vd_dots(float c[2][4], const vd_left_rows<T, D, HOLD> &rows, const T *tile, int n0) {
  vd_clear(c);
  vd_add_dots<T, D>(c, rows, tile, n0);
}

/* sum (16 x D) += a * (rows k0.. + 15 of tile). */
template <typename T, int D>
VD_DEV void vd_accumulate(float sum[D / 8][4], const vd_frag_a<T> &a, const T *tile, int k0) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) {
    vd_frag_b<T> b[2];
    vd_load_b_trans<T, D>(b, tile, k0, 16 * i);
    vd_mma(sum[2 * i], a, b[0]);
    vd_mma(sum[2 * i + 1], a, b[1]);
  }
}

/* Starts an asynchronous copy of 16 bytes to shared memory; zeros where !valid. */
VD_DEV void vd_cp_async16(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(vd_smem_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
/* The same of 4 bytes. */
VD_DEV void vd_cp_async4(void *to, const void *from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(vd_smem_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
/* Closes a batch of started copies. */
VD_DEV void vd_cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Waits until all committed copies have landed. */
VD_DEV void vd_cp_async_wait_all() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}
/* Waits until all committed batches of copies but the N newest have landed. */
template <int N> VD_DEV void vd_cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Starts the copy of 64 rows into a tile: rows first .. first + 63 of a matrix, those outside lowest .. end - 1 as
 * zeros; columns beyond `width` as zeros. For 128 threads that begin at a multiple of 128. The matrix begins at row 0
 * of one stream and head, so that offsets fit 32 bits; rows that do not exist are not read. */
template <typename T, int D>
VD_DEV void vd_copy_tile(T *tile, const T *matrix, int stride, int first, int lowest, int end, int width) {
  constexpr int per_chunk = 16 / (int)sizeof(T), chunks = D / per_chunk, step = 128 / chunks;
  int thread = (int)threadIdx.x & 127, across = stride;
  /* The asm makes the compiler recompute addresses for each tile, since few registers are free to keep them. */
  asm volatile("" : "+r"(thread), "+r"(across));
  int row = thread / chunks, chunk = thread % chunks;
  unsigned above = (unsigned)(first + row - lowest), rows = chunk * per_chunk < width ? (unsigned)(end - lowest) : 0;
  const T *from = matrix + ((first + row) * across + chunk * per_chunk);
#pragma unroll
  for (int i = 0; i < VD_TILE / step; i++, from += step * across)
    vd_cp_async16(tile + vd_swizzled_chunk<T, D>(row + i * step, chunk), from, above + (unsigned)(i * step) < rows);
}

#endif
