/* Writing a corpus: shard files, in any order and by any process, then the file NAME.h5 that makes one corpus of them.
 */
#ifndef VD_CORPUS_WRITE_H
#define VD_CORPUS_WRITE_H

#include "io/corpus_layout.h"
#include "io/h5.h"

/* All that decides what the files of a corpus hold. Pointers are borrowed. */
typedef struct vd_corpus_plan {
  const char *path; /* NAME.h5 */
  char id[33];      /* identity of the token stream, 32 hexadecimal digits */
  int64_t n_token[VD_N_SPLIT];
  int64_t shard_tokens; /* tokens in a shard, but for the last one of a split */
  int deflate;          /* 0: off; 1..9 */
  bool words;           /* symbols are words of text, else bytes */
  vd_vocabulary vocabulary;
  int n_source;
  const char *source[VD_N_SPLIT];   /* one file, or one for each split */
  int64_t source_bytes[VD_N_SPLIT]; /* uncompressed */
  char source_md5[VD_N_SPLIT][33];  /* of the uncompressed bytes */
  char split_rule[256];             /* for people */
  vd_origin origin;
} vd_corpus_plan;

/* Not collective. Bytes of a token in the shards: 1 where the vocabulary has at most 256 symbols, else 2. */
size_t vd_corpus_token_bytes(const vd_corpus_plan *plan);

/* A shard that is being written. One thread at a time uses it; it need not be the same one. */
typedef struct vd_shard vd_shard;
/* Not collective. Starts writing shard `index` of a split; memory: about 1 MiB. Errors: the file cannot be created. */
int vd_shard_begin(vd_shard **shard, vd_h5 *h5, const vd_corpus_plan *plan, int split, int64_t index, vd_error *err);
/* Not collective. Tokens that the shard still wants. */
int64_t vd_shard_wants(const vd_shard *shard);
/* Not collective. Appends n (at most vd_shard_wants()) tokens, each of vd_corpus_token_bytes(): uint8_t or uint16_t.
 * Errors: the disk is full ... */
int vd_shard_put(vd_shard *shard, const void *tokens, int64_t n, vd_error *err);
/* Not collective. Writes what HDF5 still buffers of the whole shard and closes the file, so that vd_shard_commit() does
 * not hold HDF5's lock while it waits for the disk. The caller commits; after an error it abandons. */
int vd_shard_finish(vd_shard *shard, vd_error *err);
/* Not collective. Puts the whole shard in its place and frees *shard, also on error. Finishes it where that was not
 * done. */
int vd_shard_commit(vd_shard **shard, vd_error *err);
/* Not collective. Gives the shard up, removes what was written of it, frees *shard. NULL is allowed. */
void vd_shard_abandon(vd_shard **shard);

/* Not collective. Writes NAME.h5, when all shards are in place. Errors: the file cannot be written. */
int vd_corpus_write(vd_h5 *h5, const vd_corpus_plan *plan, vd_error *err);
/* Not collective. Removes NAME.h5 first, then those files named like its shards that carry the corpus id `id`, and the
 * temporaries of killed runs. Other files stay. VD_FAILED naming a file that cannot be removed, or a NAME.h5 that is no
 * corpus: then nothing is removed. The caller makes sure that no other process writes this corpus. */
int vd_corpus_remove(vd_h5 *h5, const char *path, const char *id, vd_error *err);

/* What lies at plan->path already. */
enum vd_corpus_state {
  VD_CORPUS_ABSENT,
  VD_CORPUS_SAME,    /* this corpus, whole */
  VD_CORPUS_DAMAGED, /* this corpus, but a file of it is missing or damaged */
  VD_CORPUS_OTHER    /* something else */
};
/* Not collective. Compares what lies at plan->path with the plan; `why` [size] says what is damaged or different. */
enum vd_corpus_state vd_corpus_compare(vd_h5 *h5, const vd_corpus_plan *plan, char *why, size_t size);

#endif
