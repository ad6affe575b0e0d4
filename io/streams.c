#include "io/streams.h"

int64_t vd_stream_first(const vd_streams *g, int64_t s) {
  /* floor(s (n-1) / n_stream), with the quotient taken apart so that s (n-1) cannot overflow. */
  int64_t n = g->n_token - 1, whole = n / g->n_stream, rest = n % g->n_stream;
  return 1 + s * whole + s * rest / g->n_stream;
}

int64_t vd_stream_blocks(const vd_streams *g) {
  if (g->n_token < 2) return 0;
  int64_t longest = (g->n_token - 2) / g->n_stream + 1;
  return (longest - 1) / g->block + 1;
}

static int64_t targets_of(int64_t length, int64_t block, int64_t b) {
  int64_t left = length - b * block;
  return left < 0 ? 0 : left < block ? left : block;
}

int64_t vd_stream_targets(const vd_streams *g, int64_t b) {
  if (g->n_token < 2) return 0;
  /* `longer` streams have one target more than the others. */
  int64_t length = (g->n_token - 1) / g->n_stream, longer = (g->n_token - 1) % g->n_stream;
  return longer * targets_of(length + 1, g->block, b) + (g->n_stream - longer) * targets_of(length, g->block, b);
}

void vd_stream_share(int64_t n_stream, int rank, int size, int64_t *first, int64_t *last) {
  *first = rank * n_stream / size;
  *last = (rank + 1) * n_stream / size;
}

int64_t vd_stream_greatest_share(int64_t n_stream, int size) {
  return (n_stream + size - 1) / size;
}
