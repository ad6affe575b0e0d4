#include "io/reader.h"

#include "src/base/clock.h"
#include "src/base/thread.h"

#include <stdlib.h>
#include <string.h>

/* Tokens of a stream fetched at once, and what all segments of a reader may take together. */
enum { SEGMENT_TOKENS = 65536, SEGMENT_BYTES = 64 << 20 };

/* A run of tokens of one stream, ahead of its blocks. */
typedef struct segment {
  int64_t first, n;
  int32_t *token; /* [segment_tokens] */
} segment;

typedef struct slot {
  int64_t block;
  int32_t *x, *y; /* [n_stream][block] */
} slot;

struct vd_reader {
  vd_corpus *corpus;
  char split[16];
  vd_streams geometry;
  int64_t s0, s1, first_block, n_block; /* n_block < 0: endless */
  int64_t segment_tokens;
  segment *segment; /* [s1 - s0] */
  double waited;    /* seconds, of the caller */

  vd_thread *thread; /* its lock guards what follows */
  int n_slot;
  slot *slot;               /* ring buffer: block number i (from 0) lies in slot i % n_slot */
  int64_t written, started; /* blocks filled by the thread; blocks handed out */
  bool in_use;              /* the caller reads the block handed out last */
};

/* Tokens [first, first + n) of stream s, which ends before token `end`: from its segment, fetched anew where it does
 * not hold them. NULL on error. */
static const int32_t *tokens_of(vd_reader *r, int64_t s, int64_t first, int64_t n, int64_t end, vd_error *err) {
  segment *g = &r->segment[s - r->s0];
  if (first < g->first || first + n > g->first + g->n) {
    g->first = first;
    g->n = end - first < r->segment_tokens ? end - first : r->segment_tokens;
    if (vd_corpus_read(r->corpus, r->split, first, g->n, g->token, err)) {
      g->n = 0;
      return NULL;
    }
  }
  return g->token + (first - g->first);
}

static int fill_slot(vd_reader *r, slot *to, int64_t number, vd_error *err) {
  int64_t block = r->geometry.block, b = number % vd_stream_blocks(&r->geometry);
  to->block = number;
  for (int64_t s = r->s0; s < r->s1; s++) {
    int32_t *x = to->x + (s - r->s0) * block, *y = to->y + (s - r->s0) * block;
    int64_t target = vd_stream_first(&r->geometry, s) + b * block, last = vd_stream_first(&r->geometry, s + 1);
    int64_t n = last - target < block ? last - target : block;
    if (n < 0) n = 0;
    if (n > 0) {
      const int32_t *token = tokens_of(r, s, target - 1, n + 1, last, err);
      if (!token) return vd_wrap(err, "split %s, stream %lld, block %lld", r->split, (long long)s, (long long)b);
      memcpy(x, token, (size_t)n * sizeof *x);
      memcpy(y, token + 1, (size_t)n * sizeof *y);
    }
    for (int64_t i = n; i < block; i++) x[i] = 0, y[i] = -1;
  }
  return VD_OK;
}

/* Body of the thread: fills free slots until all blocks are read, a read fails or the reader stops. */
static void read_ahead(vd_thread *thread, void *self) {
  vd_reader *r = self;
  vd_error err = {0};
  while (!vd_thread_is_stopping(thread) && err.status == VD_OK && (r->n_block < 0 || r->written < r->n_block)) {
    int64_t done = r->started - (r->in_use ? 1 : 0);
    if (r->written - done >= r->n_slot) {
      vd_thread_wait(thread);
      continue;
    }
    int64_t i = r->written;
    vd_thread_unlock(thread);
    fill_slot(r, &r->slot[i % r->n_slot], r->first_block + i, &err);
    vd_thread_lock(thread);
    if (err.status == VD_OK) r->written++;
    vd_thread_wake(thread);
  }
  vd_thread_fail(thread, &err);
}

static void allocate(vd_reader *r, int ahead) {
  int64_t n = r->s1 - r->s0, block = r->geometry.block;
  r->segment_tokens = n > 0 ? SEGMENT_BYTES / (int64_t)sizeof(int32_t) / n : 0;
  if (r->segment_tokens > SEGMENT_TOKENS) r->segment_tokens = SEGMENT_TOKENS;
  if (r->segment_tokens < block + 1) r->segment_tokens = block + 1;
  /* No segment need be longer than the longest stream. */
  int64_t longest = (r->geometry.n_token - 2) / r->geometry.n_stream + 2;
  if (r->segment_tokens > longest) r->segment_tokens = longest;
  r->segment = vd_calloc((size_t)n, sizeof *r->segment);
  for (int64_t s = 0; s < n; s++) r->segment[s].token = vd_calloc((size_t)r->segment_tokens, sizeof(int32_t));
  r->n_slot = ahead + 1;
  r->slot = vd_calloc((size_t)r->n_slot, sizeof *r->slot);
  for (int i = 0; i < r->n_slot; i++) {
    r->slot[i].x = vd_calloc((size_t)(n * block), sizeof(int32_t));
    r->slot[i].y = vd_calloc((size_t)(n * block), sizeof(int32_t));
  }
}

static void release(vd_reader *r) {
  for (int64_t s = 0; s < r->s1 - r->s0; s++) free(r->segment[s].token);
  for (int i = 0; i < r->n_slot; i++) {
    free(r->slot[i].x);
    free(r->slot[i].y);
  }
  free(r->segment);
  free(r->slot);
  free(r);
}

int vd_reader_start(vd_reader **reader, vd_corpus *corpus, const char *split, const vd_streams *geometry, int64_t s0,
                    int64_t s1, int64_t first_block, int64_t n_block, int ahead, vd_error *err) {
  int64_t n = 0;
  *reader = NULL;
  if (vd_corpus_length(corpus, split, &n, err)) return err->status;
  if (n != geometry->n_token) vd_bug("%s has %lld tokens, not %lld", split, (long long)n, (long long)geometry->n_token);
  if (s0 < 0 || s1 < s0 || s1 > geometry->n_stream || first_block < 0 || ahead < 0 || geometry->block < 1)
    vd_bug("streams %lld to %lld, block %lld, %d ahead", (long long)s0, (long long)s1, (long long)first_block, ahead);
  if (vd_stream_blocks(geometry) == 0)
    return vd_fail(err, VD_FAILED, "the split %s has %lld tokens; prediction needs at least 2", split, (long long)n);
  vd_reader *r = vd_calloc(1, sizeof *r);
  r->corpus = corpus;
  strncpy(r->split, split, sizeof r->split - 1);
  r->geometry = *geometry;
  r->s0 = s0;
  r->s1 = s1;
  r->first_block = first_block;
  r->n_block = n_block;
  allocate(r, ahead);
  if (vd_thread_start(&r->thread, read_ahead, r, "the reader", err))
    release(r);
  else
    *reader = r;
  return err->status;
}

int vd_reader_next(vd_reader *r, int64_t *block, const int32_t **x, const int32_t **y, vd_error *err) {
  *x = *y = NULL;
  vd_thread_lock(r->thread);
  if (r->in_use) {
    r->in_use = false;
    vd_thread_wake(r->thread);
  }
  if (r->written == r->started) {
    double start = vd_clock_seconds();
    while (r->written == r->started && !vd_thread_has_ended(r->thread)) vd_thread_wait(r->thread);
    r->waited += vd_clock_seconds() - start;
  }
  if (r->written > r->started) { /* blocks that were read before a failure are good */
    slot *s = &r->slot[r->started % r->n_slot];
    *block = s->block;
    *x = s->x;
    *y = s->y;
    r->started++;
    r->in_use = true;
  } else {
    vd_thread_error(r->thread, err);
  }
  vd_thread_unlock(r->thread);
  return err->status;
}

double vd_reader_waited(const vd_reader *reader) {
  return reader->waited;
}

void vd_reader_stop(vd_reader *reader) {
  if (!reader) return;
  vd_thread_stop(reader->thread);
  release(reader);
}
