/* Streams tokens of one rank's streams ahead of use, on a thread, in bounded memory. */
#ifndef VD_READER_H
#define VD_READER_H

#include "io/corpus.h"
#include "io/streams.h"

typedef struct vd_reader vd_reader;

/* Not collective. Reads blocks first_block, first_block + 1, ... of the streams [s0, s1) of `geometry`; blocks count on
 * over epochs: block number b stands for block b % blocks of epoch b / blocks. At most `ahead` blocks are held beside
 * the one in use. Tokens are fetched in segments of up to 65536 of a stream, so that a block costs no read of its own.
 * Memory: (ahead + 1) * (s1-s0) * block * 8 bytes, and for the segments at most 64 MiB or (s1-s0) * (block + 1) * 4
 * bytes, whichever is more. The corpus must outlive the reader. Free with vd_reader_stop(). Errors: no such split
 * (VD_USAGE), a split of fewer than 2 tokens, no thread to be had. */
int vd_reader_start(vd_reader **reader, vd_corpus *corpus, const char *split, const vd_streams *geometry, int64_t s0,
                    int64_t s1, int64_t first_block, int64_t n_block /* <0: endless */, int ahead, vd_error *err);

/* Not collective. The next block: *x, *y [s1-s0][block] int32 (y = -1 where padded), borrowed until the next call.
 * *block gets its number. Errors of the thread (a damaged shard, with file, split and position) come out here. After
 * the last block: *x = NULL, VD_OK. */
int vd_reader_next(vd_reader *reader, int64_t *block, const int32_t **x, const int32_t **y, vd_error *err);

/* Not collective. Seconds that vd_reader_next() has waited for blocks that were not read yet. */
double vd_reader_waited(const vd_reader *reader);

/* Not collective. Ends the thread, after the read that it is in, and frees all. The caller does not hold the lock of
 * HDF5. NULL is allowed. */
void vd_reader_stop(vd_reader *reader);

#endif
