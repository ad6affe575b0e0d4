#include "src/comm/shard.h"

#include <stdlib.h>

enum {
  ALIGN = 32,             /* reals: chunks begin on cache lines, also in the 16-bit copy of the parameters */
  MOST_ELEMENTS = 1 << 26 /* of a bucket: MPI counts in int */
};

void vd_shard_layout_make(vd_shard_layout *s, size_t n, size_t common, size_t bucket, int n_rank) {
  size_t unit = (size_t)n_rank * ALIGN;
  size_t sharded = common < n ? (n - common) / unit * unit : 0;
  size_t most = MOST_ELEMENTS / unit * unit, step = (bucket + unit - 1) / unit * unit;
  if (step > most) step = most;
  if (step < unit) step = unit;
  size_t whole = sharded / step, rest = sharded % step;
  /* A small rest is no message of its own: it joins the bucket beside it. */
  bool apart = rest > 0 && (whole == 0 || rest >= step / 2 || step + rest > MOST_ELEMENTS);
  *s = (vd_shard_layout){.common = n - sharded, .n_rank = n_rank, .n_bucket = (int)whole + apart};
  s->start = vd_calloc((size_t)s->n_bucket + 1, sizeof *s->start);
  for (int b = 0; b <= s->n_bucket; b++) s->start[b] = n - (size_t)(s->n_bucket - b) * step;
  s->start[0] = s->common;
}

void vd_shard_layout_free(vd_shard_layout *s) {
  free(s->start);
  *s = (vd_shard_layout){0};
}

size_t vd_shard_chunk(const vd_shard_layout *s, int bucket) {
  return (s->start[bucket + 1] - s->start[bucket]) / (size_t)s->n_rank;
}

size_t vd_shard_longest_chunk(const vd_shard_layout *s) {
  size_t longest = 0;
  for (int b = 0; b < s->n_bucket; b++)
    if (vd_shard_chunk(s, b) > longest) longest = vd_shard_chunk(s, b);
  return longest;
}

/* Adds the elements that `at` has in [first, end). */
static void add_part(vd_extent *list, int *n, vd_extent at, size_t first, size_t end) {
  size_t from = at.offset > first ? at.offset : first;
  size_t to = at.offset + at.size < end ? at.offset + at.size : end;
  if (from < to) list[(*n)++] = (vd_extent){from, to - from, at.tensor};
}

vd_extent *vd_shard_extents(const vd_shard_layout *s, const vd_model *m, int rank, bool common, int *n) {
  int n_tensor = vd_model_n_param(m);
  /* Each border of a tensor or a chunk begins one part at most. */
  vd_extent *list = vd_calloc(2 * (size_t)n_tensor + (size_t)s->n_bucket + 1, sizeof *list);
  *n = 0;
  for (int t = 0; t < n_tensor; t++) {
    vd_extent at = vd_model_param(m, t)->at;
    if (common) add_part(list, n, at, 0, s->common);
    for (int b = 0; b < s->n_bucket; b++) {
      size_t chunk = vd_shard_chunk(s, b), first = s->start[b] + (size_t)rank * chunk;
      add_part(list, n, at, first, first + chunk);
    }
  }
  return list;
}
