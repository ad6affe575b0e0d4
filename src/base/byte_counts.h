/* Counts of bytes. */
#ifndef VD_BYTE_COUNTS_H
#define VD_BYTE_COUNTS_H

#include <stddef.h>
#include <stdint.h>

/* Not collective. Writes to count [256] how often each byte value occurs in x [n], n below 2^32. */
static inline void vd_byte_counts(const uint8_t *x, size_t n, uint32_t count[256]) {
  uint32_t part[4][256] = {{0}}; /* equal bytes in a row would wait for each other's count */
  size_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (size_t k = 0; k < 4; k++) part[k][x[i + k]]++;
  for (; i < n; i++) part[0][x[i]]++;
  for (int s = 0; s < 256; s++) count[s] = part[0][s] + part[1][s] + part[2][s] + part[3][s];
}

#endif
