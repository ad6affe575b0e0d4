#include "src/cpu/philox.h"

void vd_cpu_philox(const vd_rng *rng, uint64_t call, uint32_t words[4][VD_PHILOX_BATCH]) {
  uint32_t k0 = (uint32_t)rng->seed, k1 = (uint32_t)(rng->seed >> 32);
  for (uint32_t c = 0; c < VD_PHILOX_BATCH; c++) {
    words[0][c] = (uint32_t)call + c; /* call is a multiple of the batch: no carry */
    words[1][c] = (uint32_t)(call >> 32);
    words[2][c] = rng->update;
    words[3][c] = (uint32_t)rng->layer | ((uint32_t)rng->site << 16);
  }
  for (int round = 0; round < 10; round++) {
#pragma omp simd
    for (int c = 0; c < VD_PHILOX_BATCH; c++) {
      uint64_t p0 = (uint64_t)words[0][c] * PHILOX_M4x32_0, p1 = (uint64_t)words[2][c] * PHILOX_M4x32_1;
      words[0][c] = (uint32_t)(p1 >> 32) ^ words[1][c] ^ k0;
      words[1][c] = (uint32_t)p1;
      words[2][c] = (uint32_t)(p0 >> 32) ^ words[3][c] ^ k1;
      words[3][c] = (uint32_t)p0;
    }
    k0 += PHILOX_W32_0;
    k1 += PHILOX_W32_1;
  }
}
