/* zlib inflates what src/base/plane_deflate writes to the planes of the data, whatever these are; bfloat16 in float32
 * takes a third. */
#include "src/base/error.h"
#include "src/base/plane_deflate.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include <cmocka.h>

enum { GUARD = 64 };

static uint32_t next_random(uint32_t *state) {
  *state = *state * 1664525u + 1013904223u;
  return *state >> 8;
}

/* Roughly normal, of standard deviation 1. */
static float next_normal(uint32_t *state) {
  float sum = 0;
  for (int i = 0; i < 12; i++) sum += (float)next_random(state) / 16777216.0f;
  return sum - 6.0f;
}

/* Compresses, inflates, compares. Returns the bytes of the stream. */
static size_t there_and_back(const void *data, size_t n, size_t size) {
  size_t bytes = n * size, bound = vd_plane_deflate_bound(n, size);
  const uint8_t *from = data;
  uint8_t *planes = vd_calloc(bytes, 1), *out = vd_calloc(bound + GUARD, 1), *back = vd_calloc(bytes, 1);
  memset(out + bound, 0x5a, GUARD);
  size_t packed = vd_plane_deflate(data, n, size, planes, out);
  assert_in_range(packed, 1, bound);
  for (size_t i = 0; i < GUARD; i++) assert_int_equal(out[bound + i], 0x5a);
  uLongf got = bytes;
  assert_int_equal(uncompress(back, &got, out, packed), Z_OK); /* all of the stream, its Adler-32 compared */
  assert_int_equal(got, bytes);
  bool same = true;
  for (size_t k = 0; k < size; k++)
    for (size_t i = 0; i < n; i++) same = same && back[k * n + i] == from[i * size + k];
  assert_true(same);
  free(planes);
  free(out);
  free(back);
  return packed;
}

/* Bytes whose counts are Fibonacci numbers make the longest codes that there are. */
static void fill_fibonacci(uint8_t *x, size_t n) {
  size_t at = 0, a = 1, b = 1;
  for (int byte = 0; at < n; byte++) {
    for (size_t i = 0; i < a && at < n; i++) x[at++] = (uint8_t)byte;
    size_t sum = a + b;
    a = b;
    b = sum;
  }
}

static void test_comes_back(void **unused) {
  (void)unused;
  static const size_t lengths[] = {1, 2, 3, 5, 17, 257, 258, 259, 260, 517, 4095, 4099, 65535, 65536, 131073};
  uint32_t state = 1;
  for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
    size_t n = lengths[l];
    uint8_t *x = vd_calloc(n, 8);
    for (size_t size = 1; size <= 8; size *= 2) {
      memset(x, 0, n * size);
      there_and_back(x, n, size);
      memset(x, 0xff, n * size);
      there_and_back(x, n, size);
      fill_fibonacci(x, n * size);
      there_and_back(x, n, size);
      x[n * size - 1] ^= 1; /* nearly a run */
      there_and_back(x, n, size);
      for (unsigned bits = 1; bits <= 8; bits++) {
        for (size_t i = 0; i < n * size; i++) x[i] = (uint8_t)(next_random(&state) & ((1u << bits) - 1));
        there_and_back(x, n, size);
      }
    }
    free(x);
  }
}

static void test_sizes(void **unused) {
  (void)unused;
  enum { N = 131072 };
  float *x = vd_calloc(N, sizeof *x);
  uint32_t state = 7;
  there_and_back(x, N, sizeof *x);
  double zeros = (double)there_and_back(x, N, sizeof *x) / (N * sizeof *x);
  assert_true(zeros < 0.003);
  for (size_t i = 0; i < N; i++) x[i] = next_normal(&state);
  double full = (double)there_and_back(x, N, sizeof *x) / (N * sizeof *x);
  assert_true(full < 0.85);
  for (size_t i = 0; i < N; i++) {
    uint32_t bits;
    memcpy(&bits, &x[i], sizeof bits);
    bits &= 0xffff0000;
    memcpy(&x[i], &bits, sizeof bits);
  }
  double half = (double)there_and_back(x, N, sizeof *x) / (N * sizeof *x);
  assert_true(half < 0.35);
  uint8_t *noise = (uint8_t *)x;
  for (size_t i = 0; i < N * sizeof *x; i++) noise[i] = (uint8_t)next_random(&state);
  double most = (double)there_and_back(x, N, sizeof *x) / (N * sizeof *x);
  assert_true(most < 1.0002);
  free(x);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_comes_back), cmocka_unit_test(test_sizes)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
