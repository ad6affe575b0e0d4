/* How an optimizer is sharded over ranks: which elements of an arena each rank steps. Plain arithmetic, the same on all
 * ranks.
 *
 *     arena   [ common | bucket 0 | bucket 1 | ... | bucket n-1 ]
 *     bucket           [ chunk of rank 0 | chunk of rank 1 | ... ]
 *
 * All ranks step the common part. A bucket has one chunk a rank, all of the same length, as reduce-scatter and
 * all-gather ask for; chunks begin on cache lines. Bucket 0 is the first layer, unless that is longer than a bucket or
 * the arena less than half of one: its gradients are final last, so that nothing hides their exchange, and its weights
 * are needed first. Other boundaries of tensors play no part: a tensor may lie in several chunks and buckets. Where the
 * arena is too small for a cache line a rank, all of it is common. */
#ifndef VD_SHARD_H
#define VD_SHARD_H

#include "src/model/model.h"

typedef struct vd_shard_layout {
  size_t common; /* elements at the arena's start that every rank steps */
  int n_rank, n_bucket;
  size_t *start; /* [n_bucket + 1]: bucket b is [start[b], start[b + 1]); start[0] is `common`, the last one the arena's
                    end */
} vd_shard_layout;

/* What is laid out, in elements. */
typedef struct vd_shard_arena {
  size_t n;
  size_t common;      /* at least these, at the arena's start, are common */
  size_t first_layer; /* behind the common part: those of the first layer; 0: no bucket of its own */
} vd_shard_arena;

/* Not collective. Fills *s, in buckets of about `bucket` elements, from the arena's end. Free with
 * vd_shard_layout_free. */
void vd_shard_layout_make(vd_shard_layout *s, const vd_shard_arena *arena, size_t bucket, int n_rank);
/* Not collective. Frees what *s owns. */
void vd_shard_layout_free(vd_shard_layout *s);
/* Not collective. Elements of one rank's chunk of a bucket. */
size_t vd_shard_chunk(const vd_shard_layout *s, int bucket);
/* Not collective. The longest chunk of all buckets. */
size_t vd_shard_longest_chunk(const vd_shard_layout *s);
/* Not collective. The parts of the model's tensors in the chunks of `rank`, and in the common part where `common`,
 * sorted by tensor. Returns a new array [*n] to be freed with free. */
vd_extent *vd_shard_extents(const vd_shard_layout *s, const vd_model *m, int rank, bool common, int *n);

#endif
