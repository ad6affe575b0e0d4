/* The corpus: NAME.h5 with virtual datasets /train /valid /test over shard files NAME-train-0000.h5 ... (dataset
 * /tokens, uint8 or uint16), /vocabulary/symbol, /vocabulary/length and /vocabulary/count, attributes with source file,
 * size, md5, split rule. Shards are read directly, never through the virtual datasets, so that a missing one is an
 * error and not a run of fill values. */
#ifndef VD_CORPUS_H
#define VD_CORPUS_H

#include "io/corpus_layout.h"

typedef struct vd_corpus vd_corpus;

/* Not collective. Opens for reading; *corpus is freed with vd_corpus_close(). Checks: kind, the seal of NAME.h5, every
 * shard present and of the length, type and id that the corpus was made with. Missing, damaged or foreign files are
 * named. Tokens are verified (fletcher32) as they are read. At most 16 shards are held open, each with a cache of 1
 * MiB.
 */
int vd_corpus_open(vd_corpus **corpus, vd_h5 *h5, const char *path, vd_error *err);
/* Not collective. Closes and frees; no reader may use the corpus any more. NULL is allowed. */
void vd_corpus_close(vd_corpus *corpus);

/* Not collective. *n: tokens of "train", "valid" or "test"; VD_USAGE naming the splits when there is no such one. */
int vd_corpus_length(const vd_corpus *corpus, const char *split, int64_t *n, vd_error *err);
/* Not collective. Number of symbols; every token read is below it. */
int64_t vd_corpus_vocab(const vd_corpus *corpus);

/* Not collective. The vocabulary that ids refer to: the corpus's own or the adopted one. Borrowed. */
const vd_vocabulary *vd_corpus_vocabulary(const vd_corpus *corpus);
/* Not collective. From now on ids are those of a model's vocabulary (copied): tokens that are read, symbols, encoding
 * and vd_corpus_vocab(). Symbols are matched by their bytes. VD_USAGE naming the first few that the model lacks. Call
 * it before a reader starts. */
int vd_corpus_adopt(vd_corpus *corpus, const vd_vocabulary *model, vd_error *err);

/* Not collective. Reads tokens [first, first + n) of a split, which must lie in it (a bug otherwise), into out [n],
 * int32. Several threads may read. A damaged, missing or replaced shard is named: VD_FAILED. */
int vd_corpus_read(vd_corpus *corpus, const char *split, int64_t first, int64_t n, int32_t *out, vd_error *err);

/* Not collective. The bytes of symbol `id` (borrowed, not terminated; length in *n). Raw bytes: one byte; text: a word.
 */
const char *vd_corpus_symbol(const vd_corpus *corpus, int64_t id, size_t *n);
/* Not collective. The id of the longest symbol that text [n] begins with, its length in *used; -1 when none. */
int64_t vd_corpus_encode(const vd_corpus *corpus, const char *text, size_t n, size_t *used);
/* Not collective. True when symbols are words of tokenised text, with blanks between them that are no symbols, and
 * "</s>" at the end of each line; false when they are bytes. */
bool vd_corpus_is_word_level(const vd_corpus *corpus);
/* Not collective. A 32-hex-digit identity of the token stream (for checkpoints: same data?). Borrowed. */
const char *vd_corpus_id(const vd_corpus *corpus);
/* Not collective. The path of NAME.h5 with symbolic links followed, and in *prefix what the names of its shards, which
 * lie beside it, begin with. Both borrowed. */
const char *vd_corpus_place(const vd_corpus *corpus, const char **prefix);

#endif
