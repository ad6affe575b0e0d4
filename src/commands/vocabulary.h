/* Pre-tokenised text: words with blanks between, and a dictionary of them. As in fairseq, every line
 * ends with the symbol "</s>" (empty lines too, and a last line without a newline), and the dictionary is sorted by
 * falling count, equal counts by rising bytes. Blanks are the ASCII ones: space, tab, carriage return, vertical tab,
 * form feed. fairseq's binary data is read as such text too: its dict.txt holds the words. */
#ifndef VD_VOCABULARY_H
#define VD_VOCABULARY_H

#include "io/corpus_write.h"
#include "src/commands/source.h"

#include <nettle/md5.h>

enum { VD_MAX_VOCABULARY = 65535 };

typedef struct vd_vocabulary_builder vd_vocabulary_builder;

/* Not collective. An empty dictionary; free it with vd_vocabulary_builder_destroy(). */
vd_vocabulary_builder *vd_vocabulary_builder_create(void);
/* Not collective. Frees. NULL is allowed. */
void vd_vocabulary_builder_destroy(vd_vocabulary_builder *words);
/* Not collective. Counts a word [n], new or known; its index in *index (may be NULL), in the order of first sight.
 * VD_FAILED when there are more than VD_MAX_VOCABULARY. */
int vd_vocabulary_builder_add(vd_vocabulary_builder *words, const char *word, size_t n, int64_t *index, vd_error *err);
/* Not collective. The index of a word [n]; -1 when it is not in the dictionary. */
int64_t vd_vocabulary_builder_find(const vd_vocabulary_builder *words, const char *word, size_t n);
/* Not collective. The sorted vocabulary, whose arrays the caller frees. */
void vd_vocabulary_builder_sorted(const vd_vocabulary_builder *words, vd_vocabulary *vocabulary);

/* Not collective. Whether `path` is NAME.bin with a NAME.idx beside it, as fairseq-preprocess writes them. */
bool vd_fairseq_is(const char *path);
/* Not collective. Writes into beside [size] the path of another file that belongs to NAME.bin: with name ".idx"
 * NAME.idx, with "dict.txt" the dict.txt in its folder. */
void vd_fairseq_beside(const char *path, const char *name, char *beside, size_t size);
/* Not collective. Reads the index of such a file, in the format `mmap` of integers; *width: bytes of a token in the
 * .bin file. VD_FAILED: another format, an index that is damaged, a .bin file of another length. */
int vd_fairseq_index(const char *path, int *width, vd_error *err);
/* Not collective. The symbols of the dict.txt beside it by fairseq's ids: <s>, <pad>, </s>, <unk>, those of the lines;
 * counts are 0. Where all but fillers are numbers of bytes, symbols are those bytes, </s> is a newline and *words is
 * false. The caller frees the arrays with vd_vocabulary_free(), also on error. VD_FAILED: no dict.txt, a line that is
 * not a symbol and a count, a symbol that is there twice, more than VD_MAX_VOCABULARY symbols. */
int vd_fairseq_vocabulary(const char *path, vd_vocabulary *v, bool *words, vd_error *err);

typedef struct vd_word_scanner vd_word_scanner;

/* Not collective. Reads the words of a file (plain or compressed), or of fairseq's binary data; free *scanner with
 * vd_word_scanner_close(). Errors of vd_source_open(), vd_fairseq_index() and vd_fairseq_vocabulary(). */
int vd_word_scanner_open(vd_word_scanner **scanner, const char *path, vd_error *err);
/* Not collective. *word [*n]: the next word, "</s>" at the end of a line, NULL at the end of the file; borrowed until
 * the next call. VD_FAILED: the file cannot be read, a word is longer than VD_LONGEST_SYMBOL bytes, or a token of
 * fairseq's is not in its dictionary. */
int vd_word_scanner_next(vd_word_scanner *scanner, const char **word, size_t *n, vd_error *err);
/* Not collective. Uncompressed bytes read so far. */
int64_t vd_word_scanner_bytes(const vd_word_scanner *scanner);
/* Not collective. The running md5 of the bytes read so far; borrowed. */
struct md5_ctx *vd_word_scanner_md5(vd_word_scanner *scanner);
/* Not collective. How the file is packed, or "fairseq". Static storage. */
const char *vd_word_scanner_kind(const vd_word_scanner *scanner);
/* Not collective. The source below; borrowed. */
const vd_source_file *vd_word_scanner_source(const vd_word_scanner *scanner);
/* Not collective. Closes and frees. NULL is allowed. */
void vd_word_scanner_close(vd_word_scanner *scanner);

#endif
