#include "src/base/plane_deflate.h"

#include "src/base/error.h"

#include <stdbool.h>
#include <string.h>
#include <zlib.h>

/* How zlib deflates a plane. */
typedef struct plane_kind {
  int level, strategy;
} plane_kind;

static const plane_kind RUN = {1, Z_RLE}, CODES = {1, Z_HUFFMAN_ONLY}, STORED = {0, Z_DEFAULT_STRATEGY};

/* True where Huffman codes would save less than about an eighth: some 8,000 of the bytes are looked at. */
static bool is_noise(const uint8_t *x, size_t n) {
  uint64_t count[256] = {0}, squares = 0, seen = 0;
  for (size_t i = 0, step = n / 8192 + 1; i < n; i += step, seen++) count[x[i]]++;
  for (int i = 0; i < 256; i++) squares += count[i] * count[i];
  return 128 * squares < seen * seen;
}

static plane_kind kind_of(const uint8_t *x, size_t n) {
  if (n == 1 || memcmp(x, x + 1, n - 1) == 0) return RUN;
  return is_noise(x, n) ? STORED : CODES;
}

/* One pass over the data, in parts that stay in the first cache; loops that the compiler makes vector code of. */
static void split_planes(const uint8_t *restrict data, size_t n, size_t size, uint8_t *restrict planes) {
  enum { PART = 1024 };
  for (size_t i = 0; i < n; i += PART) {
    size_t m = n - i < PART ? n - i : PART;
    for (size_t k = 0; k < size; k++) {
      const uint8_t *from = data + i * size + k;
      uint8_t *to = planes + k * n + i;
      if (size == 4)
        for (size_t j = 0; j < m; j++) to[j] = from[4 * j];
      else
        for (size_t j = 0; j < m; j++) to[j] = from[size * j];
    }
  }
}

/* zlib's own bound (deflateBound) for a stream whose parameters are not the default ones, and its flush before each
 * change of them. */
size_t vd_plane_deflate_bound(size_t n, size_t size) {
  const size_t bytes = n * size;
  return bytes + (bytes + 7) / 8 + (bytes + 63) / 64 + 64 * (size + 1);
}

/* The output has room for all: whatever is not a success is a fault of this program, or no memory is left. */
static void expect(int got, int wanted, const char *what) {
  if (got != wanted) vd_bug("zlib's %s returned %d", what, got);
}

/* NOLINTNEXTLINE(readability-non-const-parameter): out is written through a struct */
size_t vd_plane_deflate(const void *data, size_t n, size_t size, uint8_t *planes, uint8_t *out) {
  split_planes(data, n, size, planes);
  plane_kind now = kind_of(planes, n);
  z_stream z = {.next_out = out, .avail_out = (uInt)vd_plane_deflate_bound(n, size)};
  expect(deflateInit2(&z, now.level, Z_DEFLATED, MAX_WBITS, MAX_MEM_LEVEL, now.strategy), Z_OK, "deflateInit2");
  for (size_t k = 0; k < size; k++) {
    plane_kind next = kind_of(planes + k * n, n);
    if (next.level != now.level || next.strategy != now.strategy)
      expect(deflateParams(&z, next.level, next.strategy), Z_OK, "deflateParams");
    now = next;
    z.next_in = planes + k * n, z.avail_in = (uInt)n;
    const bool last = k + 1 == size;
    expect(deflate(&z, last ? Z_FINISH : Z_NO_FLUSH), last ? Z_STREAM_END : Z_OK, "deflate");
  }
  const size_t written = z.total_out;
  deflateEnd(&z);
  return written;
}
