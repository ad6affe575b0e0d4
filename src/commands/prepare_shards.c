#include "src/base/signals.h"
#include "src/commands/prepare.h"
#include "src/commands/vocabulary.h"
#include "src/train/task_queue.h"

#include <stdlib.h>
#include <string.h>

enum { TOKENS = 1 << 18 }; /* converted at once */
static const uint32_t NO_ID = 1u << 31;

/* The tokens of the sources, one after another. */
typedef struct token_source {
  const vd_corpus_plan *plan;
  vd_source_file *bytes;    /* of raw bytes */
  size_t token_bytes;       /* in the shards: 1 or 2 */
  uint32_t id[256];         /* of each byte; NO_ID: not in the vocabulary */
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
  for (int i = 0; i < 256; i++) t->id[i] = NO_ID;
  for (int64_t i = 0; i < v->n; i++)
    if (v->length[i] == 1) t->id[v->symbol[i * v->width]] = (uint32_t)i;
  return vd_source_open(&t->bytes, t->plan->source[0], err);
}

/* ids: where the n ids go, in the type of the shards; NULL: nowhere. */
static int read_words(token_source *t, int split, void *ids, int64_t n, vd_error *err) {
  for (int64_t i = 0; i < n; i++) {
    const char *word;
    size_t length;
    if (vd_word_scanner_next(t->scanner, &word, &length, err)) return err->status;
    int64_t id = word ? vd_vocabulary_builder_find(t->words, word, length) : -1;
    if (id < 0) return changed(t, split, err);
    if (ids && t->token_bytes == 1) ((uint8_t *)ids)[i] = (uint8_t)id;
    if (ids && t->token_bytes == 2) ((uint16_t *)ids)[i] = (uint16_t)id;
  }
  return VD_OK;
}

/* The ids of x [n]. Returns them all combined by `or`, which tells whether one was NO_ID. */
static uint32_t map_narrow(const uint32_t id[256], const uint8_t *restrict x, int64_t n, uint8_t *restrict ids) {
  uint32_t seen = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t it = id[x[i]];
    ids[i] = (uint8_t)it;
    seen |= it;
  }
  return seen;
}

static uint32_t map_wide(const uint32_t id[256], const uint8_t *restrict x, int64_t n, uint16_t *restrict ids) {
  uint32_t seen = 0;
  for (int64_t i = 0; i < n; i++) {
    uint32_t it = id[x[i]];
    ids[i] = (uint16_t)it;
    seen |= it;
  }
  return seen;
}

static int read_bytes(token_source *t, void *ids, int64_t n, vd_error *err) {
  for (int64_t done = 0, got; done < n; done += got) {
    if (vd_source_read(t->bytes, t->raw, n - done, &got, err)) return err->status;
    uint32_t seen = t->token_bytes == 1 ? map_narrow(t->id, t->raw, got, (uint8_t *)ids + done)
                                        : map_wide(t->id, t->raw, got, (uint16_t *)ids + done);
    if (got == 0 || (seen & NO_ID)) return changed(t, 0, err);
  }
  return VD_OK;
}

static const vd_source_file *file_of(const token_source *t) {
  return t->plan->n_source > 1 ? vd_word_scanner_source(t->scanner) : t->bytes;
}

/* Reading, writing and waiting for the disk overlap: the caller's thread reads tokens and maps them to ids, the thread
 * of one queue puts them into a shard, the thread of the other syncs the shards before it. */
typedef struct shard_writer {
  vd_h5 *h5;
  vd_task_queue *put, *commit;
} shard_writer;

/* Tokens on their way into a shard, or its end. */
struct part {
  shard_writer *writer;
  vd_shard *shard;
  void *ids; /* [n], of the queue `put` */
  int64_t n;
  bool is_whole; /* of the end: all tokens were put */
};

static void add_part(shard_writer *w, vd_task *task, const struct part *part, size_t bytes) {
  struct part *p = vd_calloc(1, sizeof *p);
  *p = *part;
  p->writer = w;
  vd_task_queue_add(w->put, task, p, bytes);
}

static void put_part(void *argument, vd_error *err) {
  struct part *p = argument;
  if (err->status == VD_OK) vd_shard_put(p->shard, p->ids, p->n, err);
  vd_task_queue_recycle(p->writer->put, p->ids);
  free(p);
}

static void commit_shard(void *argument, vd_error *err) {
  vd_shard *shard = argument;
  if (err->status == VD_OK)
    vd_shard_commit(&shard, err);
  else
    vd_shard_abandon(&shard);
}

static void end_shard(void *argument, vd_error *err) {
  struct part *p = argument;
  if (err->status == VD_OK && p->is_whole && vd_shard_finish(p->shard, err) == VD_OK)
    vd_task_queue_add(p->writer->commit, commit_shard, p->shard, 1);
  else
    vd_shard_abandon(&p->shard);
  free(p);
}

static int open_writer(shard_writer *w, vd_h5 *h5, vd_error *err) {
  enum { AHEAD = 8 /* parts */, SHARDS = 2 /* that wait for their sync */ };
  *w = (shard_writer){.h5 = h5};
  if (vd_task_queue_create(&w->put, AHEAD * TOKENS * sizeof(uint16_t), err) == VD_OK)
    vd_task_queue_create(&w->commit, SHARDS, err);
  return err->status;
}

/* Waits until all shards are in their places, or abandoned after an error. */
static int close_writer(shard_writer *w, vd_error *err) {
  if (w->put) vd_task_queue_wait(w->put, err);
  if (w->commit) vd_task_queue_wait(w->commit, err);
  vd_task_queue_destroy(w->put);
  vd_task_queue_destroy(w->commit);
  return err->status;
}

/* Returns when the tokens are read; shard and error may still be on their way. */
static int write_shard(token_source *t, shard_writer *w, int split, int64_t index, vd_progress *progress,
                       vd_error *err) {
  struct part part = {0};
  int64_t left = vd_shard_length(t->plan->n_token[split], t->plan->shard_tokens, index);
  if (vd_shard_begin(&part.shard, w->h5, t->plan, split, index, err)) return err->status;
  while (left > 0 && err->status == VD_OK) {
    part.n = left < TOKENS ? left : TOKENS;
    part.ids = vd_task_queue_buffer(w->put, TOKENS * t->token_bytes);
    if (vd_signals_check(err) == VD_OK && vd_task_queue_poll(w->put, err) == VD_OK &&
        vd_task_queue_poll(w->commit, err) == VD_OK &&
        (t->plan->n_source > 1 ? read_words(t, split, part.ids, part.n, err) : read_bytes(t, part.ids, part.n, err)) ==
            VD_OK)
      add_part(w, put_part, &part, TOKENS * t->token_bytes);
    else
      vd_task_queue_recycle(w->put, part.ids);
    left -= part.n;
    vd_progress_show(progress, vd_source_fraction(file_of(t)));
  }
  part.is_whole = err->status == VD_OK;
  add_part(w, end_shard, &part, 0);
  return err->status;
}

static int skip(token_source *t, int split, int64_t n, vd_error *err) {
  return t->plan->n_source > 1 ? read_words(t, split, NULL, n, err) : vd_source_skip(t->bytes, n, err);
}

int vd_prepare_shards(vd_h5 *h5, const vd_corpus_plan *plan, int rank, int size, vd_error *err) {
  token_source t = {.plan = plan, .token_bytes = vd_corpus_token_bytes(plan), .raw = vd_calloc(TOKENS, 1)};
  shard_writer writer;
  open_writer(&writer, h5, err);
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
      if (skip(&t, k, behind, err) == VD_OK) write_shard(&t, &writer, k, i, &progress, err);
      behind = 0;
    }
  }
  close_writer(&writer, err);
  vd_progress_end(&progress);
  vd_source_close(t.bytes);
  vd_word_scanner_close(t.scanner);
  vd_vocabulary_builder_destroy(t.words);
  free(t.raw);
  return err->status;
}
