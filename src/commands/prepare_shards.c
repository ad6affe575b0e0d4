#include "src/base/signals.h"
#include "src/commands/prepare.h"
#include "src/commands/vocabulary.h"

#include <stdlib.h>
#include <string.h>

enum { TOKENS = 1 << 18 }; /* converted at once */

/* The tokens of the sources, one after another. */
typedef struct token_source {
  const vd_corpus_plan *plan;
  vd_source_file *bytes;    /* of raw bytes */
  int32_t id[256];          /* of each byte; -1: not in the vocabulary */
  vd_word_scanner *scanner; /* of text */
  vd_vocabulary_builder *words;
  uint8_t *raw; /* [TOKENS] */
} token_source;

static int changed(const token_source *t, int split, vd_error *err) {
  return vd_fail(err, VD_FAILED, "%s changed while it was read", t->plan->source[t->plan->n_source > 1 ? split : 0]);
}

/* Opens what split k is read from; raw bytes continue where the split before ended. */
static int open_split(token_source *t, int k, vd_error *err) {
  const vd_vocabulary *v = &t->plan->vocabulary;
  if (t->plan->n_source > 1) {
    vd_word_scanner_close(t->scanner);
    t->scanner = NULL;
    if (!t->words) {
      t->words = vd_vocabulary_builder_create();
      for (int64_t i = 0; i < v->n; i++)
        if (vd_vocabulary_builder_add(t->words, (const char *)v->symbol + i * v->width, (size_t)v->length[i], NULL,
                                      err))
          break;
    }
    return err->status ? err->status : vd_word_scanner_open(&t->scanner, t->plan->source[k], err);
  }
  if (t->bytes) return VD_OK;
  for (int i = 0; i < 256; i++) t->id[i] = -1;
  for (int64_t i = 0; i < v->n; i++) t->id[v->symbol[i]] = (int32_t)i;
  return vd_source_open(&t->bytes, t->plan->source[0], err);
}

static int read_words(token_source *t, int split, uint16_t *out, int64_t n, vd_error *err) {
  for (int64_t i = 0; i < n; i++) {
    const char *word;
    size_t length;
    if (vd_word_scanner_next(t->scanner, &word, &length, err)) return err->status;
    int64_t id = word ? vd_vocabulary_builder_find(t->words, word, length) : -1;
    if (id < 0) return changed(t, split, err);
    out[i] = (uint16_t)id;
  }
  return VD_OK;
}

static int read_bytes(token_source *t, uint16_t *out, int64_t n, vd_error *err) {
  for (int64_t done = 0, got; done < n; done += got) {
    if (vd_source_read(t->bytes, t->raw, n - done, &got, err)) return err->status;
    if (got == 0) return changed(t, 0, err);
    for (int64_t i = 0; i < got; i++) {
      if (t->id[t->raw[i]] < 0) return changed(t, 0, err);
      out[done + i] = (uint16_t)t->id[t->raw[i]];
    }
  }
  return VD_OK;
}

static int skip(token_source *t, int split, uint16_t *out, int64_t n, vd_error *err) {
  if (t->plan->n_source == 1) return vd_source_skip(t->bytes, n, err);
  for (int64_t part; n > 0; n -= part) {
    part = n < TOKENS ? n : TOKENS;
    if (read_words(t, split, out, part, err)) break;
  }
  return err->status;
}

static int write_shard(token_source *t, vd_h5 *h5, int split, int64_t index, uint16_t *buffer, vd_progress *progress,
                       vd_error *err) {
  vd_shard *shard;
  if (vd_shard_begin(&shard, h5, t->plan, split, index, err)) return err->status;
  while (vd_shard_wants(shard) > 0 && err->status == VD_OK) {
    if (vd_signals_check(err)) break;
    int64_t n = vd_shard_wants(shard) < TOKENS ? vd_shard_wants(shard) : TOKENS;
    if ((t->plan->n_source > 1 ? read_words(t, split, buffer, n, err) : read_bytes(t, buffer, n, err)) == VD_OK)
      vd_shard_put(shard, buffer, n, err);
    vd_progress_show(progress,
                     vd_source_fraction(t->plan->n_source > 1 ? vd_word_scanner_source(t->scanner) : t->bytes));
  }
  if (err->status)
    vd_shard_abandon(&shard);
  else
    vd_shard_commit(&shard, err);
  return err->status;
}

int vd_prepare_shards(vd_h5 *h5, const vd_corpus_plan *plan, int rank, int size, vd_error *err) {
  token_source t = {.plan = plan, .raw = vd_calloc(TOKENS, 1)};
  uint16_t *buffer = vd_calloc(TOKENS, sizeof *buffer);
  vd_progress progress;
  vd_progress_start(&progress, rank == 0 ? "writing shards" : NULL);
  int64_t number = 0, behind = 0; /* behind: tokens of others' shards, not passed over yet */
  for (int k = 0; k < VD_N_SPLIT && err->status == VD_OK; k++) {
    if (plan->n_source > 1) behind = 0;
    if (open_split(&t, k, err)) break;
    int64_t shards = vd_shard_count(plan->n_token[k], plan->shard_tokens);
    for (int64_t i = 0; i < shards && err->status == VD_OK; i++, number++) {
      int64_t left = plan->n_token[k] - i * plan->shard_tokens;
      if (number % size != rank) {
        behind += left < plan->shard_tokens ? left : plan->shard_tokens;
        continue;
      }
      if (skip(&t, k, buffer, behind, err) == VD_OK) write_shard(&t, h5, k, i, buffer, &progress, err);
      behind = 0;
    }
  }
  vd_progress_end(&progress);
  vd_source_close(t.bytes);
  vd_word_scanner_close(t.scanner);
  vd_vocabulary_builder_destroy(t.words);
  free(t.raw);
  free(buffer);
  return err->status;
}
