#include "src/comm/shard.h"

#include <stdlib.h>

enum {
  ALIGN = 32,             /* reals: chunks begin on cache lines, also in the 16-bit copy of the parameters */
  MOST_ELEMENTS = 1 << 26 /* of a bucket: MPI counts in int */
};

/* Elements of the first bucket, where it is apart: no more than another bucket, and no arena of less than half a bucket
 * is cut. */
static size_t apart_bucket(size_t first, size_t sharded, size_t step, size_t unit) {
  size_t whole = (first + unit - 1) / unit * unit;
  return whole <= step && 2 * sharded > step && whole < sharded ? whole : 0;
}

void vd_shard_layout_make(vd_shard_layout *s, const vd_shard_arena *arena, size_t bucket, int n_rank) {
  size_t n = arena->n, unit = (size_t)n_rank * ALIGN;
  size_t sharded = arena->common < n ? (n - arena->common) / unit * unit : 0;
  size_t most = MOST_ELEMENTS / unit * unit, step = (bucket + unit - 1) / unit * unit;
  if (step > most) step = most;
  if (step < unit) step = unit;
  size_t first = apart_bucket(arena->first_layer, sharded, step, unit);
  size_t whole = (sharded - first) / step, rest = (sharded - first) % step;
  /* A small rest is no message of its own: it joins the bucket beside it. */
  bool apart = rest > 0 && (whole == 0 || rest >= step / 2 || step + rest > MOST_ELEMENTS);
  int n_other = (int)whole + apart;
  *s = (vd_shard_layout){.common = n - sharded, .n_rank = n_rank, .n_bucket = n_other + (first > 0)};
  s->start = vd_calloc((size_t)s->n_bucket + 1, sizeof *s->start);
  for (int b = 0; b < n_other; b++) s->start[s->n_bucket - b] = n - (size_t)b * step;
  s->start[s->n_bucket - n_other] = s->common + first;
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
