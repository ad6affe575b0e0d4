/* Score gradients of the dQ kernel (bwd_dq_wgmma.cu) by columns of e, in shared memory, where they are an operand of
 * two products. */
#ifndef VD_ATTENTION_SKEW_CUH
#define VD_ATTENTION_SKEW_CUH

#include "cuda/attention/pipeline.cuh"

/* Byte offset of a pair of columns in the two adjacent skewed tiles, for row g of a warp's 16; `chunk` counts 16
 * bytes modulo both tiles. */
VD_DEV int vd_skewed_chunk(int chunk, int g) {
  return ((chunk & 7) ^ g) * 16 + (chunk & 8) * (VD_TILE_BYTES / 8);
}
/* Stores score gradients by columns of e: element (r, c) goes to column c - r of block `block`, or of the previous
 * block where that is negative. Odd rows are shifted by one against pairs of columns and exchange halves with the
 * lane of the next columns. */
template <typename T> VD_DEV void vd_write_skewed(T skewed[2][VD_PANEL], int block, const vd_frag_a<T> gradient[4]) {
  int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, odd = g & 1, r = 16 * (int)(threadIdx.x >> 5) + g;
  int first = 64 * (block & 1) + 128 + 2 * t + odd - r; /* the column of this lane's first pair, modulo 128 */
  char *to = (char *)skewed[0] + r * 128 + (first & 6) * 2;
#pragma unroll
  for (int n = -1; n < 8; n++) { /* columns 8 (n + 1) of row g + 8 lie where columns 8 n of row g do */
    char *at = to + vd_skewed_chunk((first >> 3) + n, g);
#pragma unroll
    for (int ih = 0; ih < 2; ih++) {
      int c = n + ih;
      if (c < 0 || c > 7) continue;
      uint32_t mine = gradient[c >> 1].x[2 * (c & 1) + ih];
      uint32_t after = c < 7 ? gradient[(c + 1) >> 1].x[2 * ((c + 1) & 1) + ih] : 0;
      uint32_t got = __shfl_sync(0xffffffffU, t == 0 ? after : mine, (lane & 28) | ((t + 1) & 3));
      if (c == 7 && odd && t == 3) {
        *(uint16_t *)(at + ih * 1024) =
            (uint16_t)(mine >> 16); /* its neighbour is the first column of the next key tile */
      } else {
        *(uint32_t *)(at + ih * 1024) = __byte_perm(mine, got, odd ? 0x5432 : 0x3210);
      }
    }
  }
  if (!odd || t > 0) return;
  to = (char *)skewed[0] + r * 128 + ((first - 2) & 6) * 2 + 2;
  *(uint16_t *)(to + vd_skewed_chunk((first - 2) >> 3, g)) = (uint16_t)gradient[0].x[0];
  *(uint16_t *)(to + 1024 + vd_skewed_chunk(((first - 2) >> 3) - 1, g)) = (uint16_t)gradient[0].x[1];
}

#endif
