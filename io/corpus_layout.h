/* What the reader and the writer of a corpus share: splits, the names of shard files, the vocabulary. */
#ifndef VD_CORPUS_LAYOUT_H
#define VD_CORPUS_LAYOUT_H

#include "io/h5.h"
#include "src/base/choices.h"

#include <stdbool.h>
#include <stdint.h>

enum { VD_LONGEST_SYMBOL = 1024 /* bytes */ };

/* Symbols in the order of their ids. */
typedef struct vd_vocabulary {
  int64_t n, width; /* width: bytes of the longest symbol */
  uint8_t *symbol;  /* [n][width], padded with zeros */
  int32_t *length;  /* [n] bytes */
  int64_t *count;   /* [n] occurrences in the whole source */
} vd_vocabulary;

/* Not collective. Under the lock. Writes /vocabulary/symbol, length and count into an open file. Errors: HDF5's. */
int vd_vocabulary_write(hid_t file, const vd_vocabulary *v, vd_error *err);
/* Not collective. Under the lock. Reads them into *v, whose arrays the caller frees with vd_vocabulary_free(), also on
 * error. VD_FAILED where a shape or a length is impossible. */
int vd_vocabulary_read(hid_t file, vd_vocabulary *v, vd_error *err);
/* Not collective. Frees the arrays. */
void vd_vocabulary_free(vd_vocabulary *v);
/* Not collective. The id of the symbol of these n bytes; -1: there is none. */
int64_t vd_vocabulary_find(const vd_vocabulary *v, const uint8_t *symbol, int64_t n);
/* Not collective. map [from->n]: the id in `to` of each symbol of `from`, by its bytes; -1 where `to` lacks it.
 * VD_USAGE naming the first few that `to` lacks and that occur in the source (count > 0). */
int vd_vocabulary_map(const vd_vocabulary *from, const vd_vocabulary *to, int32_t *map, vd_error *err);

/* Not collective. "train", "valid" or "test" for an enum vd_split. */
const char *vd_split_name(int split);
/* Not collective. The enum vd_split of a name; -1 when there is none of that name. */
int vd_split_number(const char *name);

/* Not collective. Number of shards of a split of n_token tokens. */
int64_t vd_shard_count(int64_t n_token, int64_t shard_tokens);
/* Not collective. Tokens in shard `index` of a split of n_token tokens: shard_tokens, or the rest in the last one. */
int64_t vd_shard_length(int64_t n_token, int64_t shard_tokens, int64_t index);

/* Not collective. The prefix of a corpus's shards, its file name without ".h5", into prefix [size]. */
void vd_corpus_prefix(const char *corpus_path, char *prefix, size_t size);
/* Not collective. File name of a shard, PREFIX-train-0000.h5, into name [size]; a name that does not fit is a bug. */
void vd_shard_name(const char *prefix, int split, int64_t index, char *name, size_t size);
/* Not collective. The path of that file in the folder of `corpus_path`, into path [size]. VD_FAILED when it does not
 * fit. */
int vd_shard_path(const char *corpus_path, const char *prefix, int split, int64_t index, char *path, size_t size,
                  vd_error *err);
/* Not collective. True for the file names PREFIX-train-0000.h5 and the like, and for temporaries of those and of
 * PREFIX.h5. */
bool vd_corpus_owns(const char *prefix, const char *name);

#endif
