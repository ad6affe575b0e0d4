/* Small corpora with known tokens, for the tests of corpus and reader. */
#ifndef VD_CORPUS_MAKER_H
#define VD_CORPUS_MAKER_H

#include "io/corpus_write.h"

/* Not collective. Token i of split k, below `vocab`: runs that compress well and never repeat in step with shards. */
int32_t maker_token(int split, int64_t i, int64_t vocab);
/* Not collective. Writes a whole corpus of n[3] tokens. Symbol s has the bytes "s<number>", of 1 byte each where
 * vocab <= 256. */
int maker_write(vd_h5 *h5, const char *path, const int64_t n[VD_N_SPLIT], int64_t shard_tokens, int deflate,
                int64_t vocab, vd_error *err);
/* Not collective. Flips bit `bit` of byte `at` of a file; false when there is no such byte. */
bool maker_flip(const char *path, long at, int bit);
/* Not collective. Removes a folder of files. */
void maker_remove(const char *folder);

#endif
