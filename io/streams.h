/* How a split is cut into streams and blocks. One rule for training, validation and evaluation, pure integers.
 *
 * A split of n tokens has n - 1 predictions: of tokens 1 .. n-1, each from the tokens before it. Stream s of n_stream
 * predicts a contiguous part of them, targets [first, last): first = 1 + floor(s (n-1) / n_stream), last likewise for
 * s+1. Its inputs are the tokens first-1 .. last-2. Block b of a stream predicts `block` targets from first + b*block
 * on; the last block is padded (target -1, input 0) where the stream has ended. Every target is predicted exactly once
 * per epoch. An epoch has ceil(longest stream / block) blocks; the memory starts anew at block 0. */
#ifndef VD_STREAMS_H
#define VD_STREAMS_H

#include <stdint.h>

typedef struct vd_streams {
  int64_t n_token;  /* of the split */
  int64_t n_stream; /* global */
  int64_t block;    /* targets per block */
} vd_streams;

/* Not collective. First target of stream s (0 <= s <= n_stream; s = n_stream gives n_token). */
int64_t vd_stream_first(const vd_streams *g, int64_t s);
/* Not collective. Blocks in an epoch; 0 when the split has fewer than 2 tokens. */
int64_t vd_stream_blocks(const vd_streams *g);
/* Not collective. Targets in block b over all streams (the padded ones left out). */
int64_t vd_stream_targets(const vd_streams *g, int64_t b);
/* Not collective. The streams [*first, *last) of a rank: floor(rank n_stream / size) and so on. */
void vd_stream_share(int64_t n_stream, int rank, int size, int64_t *first, int64_t *last);
/* Not collective. Streams of the rank that has most of them. */
int64_t vd_stream_greatest_share(int64_t n_stream, int size);

#endif
