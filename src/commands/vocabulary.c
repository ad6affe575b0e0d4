#include "src/commands/vocabulary.h"

#include <stdlib.h>
#include <string.h>

enum { BUCKETS = 1 << 18, BUFFER = 1 << 18 };

typedef struct entry {
  char *word;
  size_t n;
  int64_t count;
} entry;

struct vd_vocabulary_builder {
  entry *entry; /* [VD_MAX_VOCABULARY], in the order of first sight */
  int64_t n;
  int32_t *bucket; /* [BUCKETS] index + 1; 0: free. Open addressing, at most a quarter full */
};

vd_vocabulary_builder *vd_vocabulary_builder_create(void) {
  vd_vocabulary_builder *w = vd_calloc(1, sizeof *w);
  w->entry = vd_calloc(VD_MAX_VOCABULARY, sizeof *w->entry);
  w->bucket = vd_calloc(BUCKETS, sizeof *w->bucket);
  return w;
}

void vd_vocabulary_builder_destroy(vd_vocabulary_builder *words) {
  if (!words) return;
  for (int64_t i = 0; i < words->n; i++) free(words->entry[i].word);
  free(words->entry);
  free(words->bucket);
  free(words);
}

/* The bucket of a word: where it is, or the free one where it would be. Hash: FNV-1a. */
static uint32_t bucket_of(const vd_vocabulary_builder *w, const char *word, size_t n) {
  uint64_t hash = 14695981039346656037ULL;
  for (size_t i = 0; i < n; i++) hash = (hash ^ (uint8_t)word[i]) * 1099511628211ULL;
  uint32_t b = (uint32_t)(hash ^ (hash >> 32)) % BUCKETS;
  for (; w->bucket[b] != 0; b = (b + 1) % BUCKETS) {
    const entry *e = &w->entry[w->bucket[b] - 1];
    if (e->n == n && memcmp(e->word, word, n) == 0) break;
  }
  return b;
}

int vd_vocabulary_builder_add(vd_vocabulary_builder *words, const char *word, size_t n, int64_t *index, vd_error *err) {
  uint32_t b = bucket_of(words, word, n);
  if (words->bucket[b] == 0) {
    if (words->n == VD_MAX_VOCABULARY)
      return vd_fail(err, VD_FAILED, "there are more than %d different words; split them into smaller symbols first",
                     (int)VD_MAX_VOCABULARY);
    entry *e = &words->entry[words->n++];
    e->word = vd_calloc(n, 1);
    e->n = n;
    memcpy(e->word, word, n);
    words->bucket[b] = (int32_t)words->n;
  }
  int64_t i = words->bucket[b] - 1;
  words->entry[i].count++;
  if (index) *index = i;
  return VD_OK;
}

int64_t vd_vocabulary_builder_find(const vd_vocabulary_builder *words, const char *word, size_t n) {
  return words->bucket[bucket_of(words, word, n)] - 1;
}

static int by_count_then_bytes(const void *a, const void *b) {
  const entry *x = a, *y = b;
  if (x->count != y->count) return x->count < y->count ? 1 : -1;
  int order = memcmp(x->word, y->word, x->n < y->n ? x->n : y->n);
  return order ? order : (x->n > y->n) - (x->n < y->n);
}

void vd_vocabulary_builder_sorted(const vd_vocabulary_builder *words, vd_vocabulary *v) {
  entry *sorted = vd_calloc((size_t)words->n, sizeof *sorted);
  memcpy(sorted, words->entry, (size_t)words->n * sizeof *sorted);
  qsort(sorted, (size_t)words->n, sizeof *sorted, by_count_then_bytes);
  *v = (vd_vocabulary){.n = words->n, .width = 1};
  for (int64_t i = 0; i < v->n; i++)
    if ((int64_t)sorted[i].n > v->width) v->width = (int64_t)sorted[i].n;
  v->symbol = vd_calloc((size_t)v->n, (size_t)v->width);
  v->length = vd_calloc((size_t)v->n, sizeof *v->length);
  v->count = vd_calloc((size_t)v->n, sizeof *v->count);
  for (int64_t i = 0; i < v->n; i++) {
    memcpy(v->symbol + i * v->width, sorted[i].word, sorted[i].n);
    v->length[i] = (int32_t)sorted[i].n;
    v->count[i] = sorted[i].count;
  }
  free(sorted);
}

struct vd_word_scanner {
  vd_source_file *source;
  char *path;
  struct md5_ctx md5;
  int64_t bytes;
  uint8_t *buffer; /* [BUFFER] */
  int64_t n, at;
  bool in_line, newline; /* bytes since the last newline; a newline waits behind the word just given */
  char word[VD_LONGEST_SYMBOL];
  int width;                /* bytes of a token of fairseq's; 0: text */
  vd_vocabulary dictionary; /* fairseq's */
};

int vd_word_scanner_open(vd_word_scanner **scanner, const char *path, vd_error *err) {
  *scanner = NULL;
  vd_word_scanner *s = vd_calloc(1, sizeof *s);
  bool words, is_fairseq = vd_fairseq_is(path);
  if (is_fairseq ? vd_fairseq_index(path, &s->width, err) || vd_fairseq_vocabulary(path, &s->dictionary, &words, err) ||
                       vd_source_open_plain(&s->source, path, err)
                 : vd_source_open(&s->source, path, err)) {
    vd_word_scanner_close(s);
    return err->status;
  }
  s->path = vd_calloc(strlen(path) + 1, 1);
  memcpy(s->path, path, strlen(path));
  s->buffer = vd_calloc(BUFFER, 1);
  md5_init(&s->md5);
  *scanner = s;
  return VD_OK;
}

/* The next byte; -1 at the end and on error. */
static int next_byte(vd_word_scanner *s, vd_error *err) {
  if (s->at == s->n) {
    s->at = 0;
    if (vd_source_read(s->source, s->buffer, BUFFER, &s->n, err) || s->n == 0) return -1;
    md5_update(&s->md5, (size_t)s->n, s->buffer);
    s->bytes += s->n;
  }
  return s->buffer[s->at++];
}

static bool is_blank(int c) {
  return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f';
}

/* The word of the next token of fairseq's. */
static int next_token(vd_word_scanner *s, const char **word, size_t *n, vd_error *err) {
  const vd_vocabulary *v = &s->dictionary;
  uint64_t id = 0;
  int c = 0;
  *word = NULL;
  for (int i = 0; i < s->width; i++) {
    c = next_byte(s, err);
    if (c < 0) break;
    id |= (uint64_t)c << 8 * i;
  }
  if (c < 0) return err->status;
  if (id >= (uint64_t)v->n)
    return vd_fail(err, VD_FAILED, "%s: token %lld is %llu, but the dict.txt beside it has symbols 0 to %lld", s->path,
                   (long long)((s->bytes - (s->n - s->at)) / s->width - 1), (unsigned long long)id,
                   (long long)(v->n - 1));
  *word = (const char *)v->symbol + (int64_t)id * v->width;
  *n = (size_t)v->length[id];
  return VD_OK;
}

int vd_word_scanner_next(vd_word_scanner *s, const char **word, size_t *n, vd_error *err) {
  if (s->width > 0) return next_token(s, word, n, err);
  *word = s->word;
  *n = 0;
  int c = s->newline ? '\n' : next_byte(s, err);
  s->newline = false;
  for (; c >= 0 && c != '\n'; c = next_byte(s, err)) {
    s->in_line = true;
    if (is_blank(c)) {
      if (*n > 0) return VD_OK;
      continue;
    }
    if (*n == VD_LONGEST_SYMBOL)
      return vd_fail(err, VD_FAILED, "%s: the word '%.40s...' has more than %d bytes; is this tokenised text?", s->path,
                     s->word, (int)VD_LONGEST_SYMBOL);
    s->word[(*n)++] = (char)c;
  }
  if (err->status) return err->status;
  if (*n > 0) {
    s->newline = c == '\n';
    return VD_OK;
  }
  if (c == '\n' || s->in_line) {
    *word = "</s>";
    *n = 4;
  } else {
    *word = NULL;
  }
  s->in_line = false;
  return VD_OK;
}

int64_t vd_word_scanner_bytes(const vd_word_scanner *scanner) {
  return scanner->bytes;
}

struct md5_ctx *vd_word_scanner_md5(vd_word_scanner *scanner) {
  return &scanner->md5;
}

const char *vd_word_scanner_kind(const vd_word_scanner *scanner) {
  return scanner->width > 0 ? "fairseq" : vd_source_packing(scanner->source);
}

const vd_source_file *vd_word_scanner_source(const vd_word_scanner *scanner) {
  return scanner->source;
}

void vd_word_scanner_close(vd_word_scanner *s) {
  if (!s) return;
  vd_source_close(s->source);
  vd_vocabulary_free(&s->dictionary);
  free(s->buffer);
  free(s->path);
  free(s);
}
