#include "src/compress/compressor.h"

#include "io/streams.h"
#include "src/base/signals.h"
#include "src/comm/collectives.h"
#include "src/compress/coder.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum {
  PIECE = 1 << 20 /* bytes that travel at once */,
  CHECK_EVERY = 64 /* steps between two agreements of the ranks */
};

/* One of the rank's streams. */
struct stream {
  int64_t at, length; /* its bytes: of those of the rank, from `at` on */
  int64_t escapes;    /* bytes so far that are not in the vocabulary */
  vd_encoder encoder;
  vd_decoder decoder;
};

struct vd_compressor {
  vd_compress_plan plan;
  vd_streams geometry;
  int64_t vocab, first, n; /* the rank's streams: first .. first + n - 1 */
  vd_model *model;
  int id_of[256];        /* -1: not in the vocabulary */
  struct stream *stream; /* [n] */
  int32_t *x, *y;        /* [n rounded up to whole groups] */
  real *logits;          /* [the same, vocab] */
  uint8_t *bytes;        /* of the rank's streams */
};

/* The first stream of a rank: a rank has whole groups. */
static int64_t first_stream(const vd_compressor *c, int rank) {
  const vd_compress_plan *p = &c->plan;
  int64_t first, last;
  vd_stream_share((p->n_stream + p->group - 1) / p->group, rank, p->ctx->size, &first, &last);
  return first * p->group < p->n_stream ? first * p->group : p->n_stream;
}

/* The first byte of stream s. vd_streams counts targets, which begin with token 1. */
static int64_t first_byte(const vd_compressor *c, int64_t s) {
  return c->plan.n_stream > 0 ? vd_stream_first(&c->geometry, s) - 1 : 0;
}

int vd_compressor_create(vd_compressor **out, const vd_compress_plan *plan, vd_error *err) {
  vd_compressor *c = *out = vd_calloc(1, sizeof *c);
  c->plan = *plan;
  c->geometry = (vd_streams){.n_token = plan->n_byte + 1, .n_stream = plan->n_stream, .block = 1};
  c->vocab = plan->config->vocab;
  if (c->vocab > VD_MOST_SYMBOLS) vd_bug("a vocabulary of %lld bytes", (long long)c->vocab);
  c->first = first_stream(c, plan->ctx->rank);
  c->n = first_stream(c, plan->ctx->rank + 1) - c->first;
  for (int i = 0; i < 256; i++) c->id_of[i] = -1;
  for (int i = 0; i < (int)c->vocab; i++) c->id_of[plan->symbol[i]] = i;
  /* Whole groups, streams that are none after the last one: no shape depends on the number of ranks. A rank without
   * streams has a model, too, since parameters are broadcast. */
  int64_t n_group = c->n > 0 ? (c->n + plan->group - 1) / plan->group : 1;
  size_t n = (size_t)(n_group * plan->group);
  int64_t at = first_byte(c, c->first);
  c->stream = vd_calloc(n, sizeof *c->stream);
  for (int64_t s = 0; s < c->n; s++) {
    c->stream[s].at = first_byte(c, c->first + s) - at;
    c->stream[s].length = first_byte(c, c->first + s + 1) - first_byte(c, c->first + s);
  }
  c->x = vd_calloc(n, sizeof *c->x);
  c->y = vd_calloc(n, sizeof *c->y);
  memset(c->y, 0xff, n * sizeof *c->y);
  c->logits = vd_calloc(n * (size_t)c->vocab, sizeof *c->logits);
  c->bytes = vd_calloc((size_t)(first_byte(c, c->first + c->n) - at) + 1, 1);
  vd_model_create(&c->model, plan->config, plan->ops, c->first, (int64_t)n, plan->group, 1, false, err);
  return vd_agree(plan->ctx->comm, err);
}

void vd_compressor_destroy(vd_compressor *c) {
  if (!c) return;
  for (int64_t s = 0; s < c->n; s++) vd_encoder_free(&c->stream[s].encoder);
  if (c->model) vd_model_destroy(c->model);
  free(c->stream);
  free(c->x);
  free(c->y);
  free(c->logits);
  free(c->bytes);
  free(c);
}

vd_model *vd_compressor_model(vd_compressor *c) {
  return c->model;
}

/* Rank 0's bytes [at[size]] to the ranks: at[r] to at[r + 1] to rank r's `mine`; or back. */
static void exchange(const vd_context *ctx, const int64_t *at, uint8_t *all, uint8_t *mine, bool to_root) {
  for (int rank = 0; rank < ctx->size; rank++) {
    if (ctx->rank != 0 && ctx->rank != rank) continue;
    int64_t n = at[rank + 1] - at[rank];
    uint8_t *there = ctx->rank == 0 && all ? all + at[rank] : NULL;
    if (rank == 0 && n > 0) memcpy(to_root ? there : mine, to_root ? mine : there, (size_t)n);
    for (int64_t i = 0; rank > 0 && i < n; i += PIECE) {
      int size = (int)(n - i < PIECE ? n - i : PIECE);
      if (to_root == (ctx->rank == rank))
        MPI_Send((to_root ? mine : there) + i, size, MPI_BYTE, to_root ? 0 : rank, 0, ctx->comm);
      else
        MPI_Recv((to_root ? there : mine) + i, size, MPI_BYTE, to_root ? rank : 0, 0, ctx->comm, MPI_STATUS_IGNORE);
    }
  }
}

/* Where the bytes of each rank begin in the file: [size + 1], which the caller frees. */
static int64_t *places_of_bytes(const vd_compressor *c) {
  int size = c->plan.ctx->size;
  int64_t *at = vd_calloc((size_t)size + 1, sizeof *at);
  for (int rank = 0; rank <= size; rank++) at[rank] = first_byte(c, first_stream(c, rank));
  return at;
}

/* Where the codes of each rank begin, by the lengths of all streams. The same. */
static int64_t *places_of_codes(const vd_compressor *c, const int64_t *length) {
  int size = c->plan.ctx->size;
  int64_t *at = vd_calloc((size_t)size + 1, sizeof *at);
  for (int rank = 0; rank < size; rank++) {
    at[rank + 1] = at[rank];
    for (int64_t s = first_stream(c, rank); s < first_stream(c, rank + 1); s++) at[rank + 1] += length[s];
  }
  return at;
}

/* The probabilities of byte i of stream s. */
static int predict(const vd_compressor *c, int64_t s, int64_t i, vd_frequencies *f, vd_error *err) {
  real *logits = c->logits + s * c->vocab;
  if (i == 0) memset(logits, 0, (size_t)c->vocab * sizeof *logits);
  for (int64_t v = 0; v < c->vocab; v++)
    if (!isfinite(logits[v])) return vd_fail(err, VD_FAILED, "%s gives logits that are not finite", c->plan.path);
  uint32_t escape = c->vocab < 256 ? vd_escape_frequency(c->stream[s].escapes, i) : 0;
  vd_frequencies_set(f, logits, (int)c->vocab, escape);
  return VD_OK;
}

static void encode_byte(vd_compressor *c, int64_t s, int64_t i, const vd_frequencies *f) {
  struct stream *stream = &c->stream[s];
  uint8_t byte = c->bytes[stream->at + i];
  int id = c->id_of[byte], symbol = id < 0 ? f->n : id;
  vd_encoder_put(&stream->encoder, f->start[symbol], f->start[symbol + 1] - f->start[symbol], VD_FREQUENCY_BITS);
  if (id < 0) {
    vd_encoder_put(&stream->encoder, byte, 1, 8);
    stream->escapes++;
  }
  c->x[s] = id < 0 ? 0 : id;
}

static void decode_byte(vd_compressor *c, int64_t s, int64_t i, const vd_frequencies *f) {
  struct stream *stream = &c->stream[s];
  int symbol = vd_frequencies_find(f, vd_decoder_peek(&stream->decoder, VD_FREQUENCY_BITS));
  vd_decoder_take(&stream->decoder, f->start[symbol], f->start[symbol + 1] - f->start[symbol], VD_FREQUENCY_BITS);
  uint8_t byte = symbol < f->n ? c->plan.symbol[symbol] : (uint8_t)vd_decoder_peek(&stream->decoder, 8);
  if (symbol == f->n) {
    vd_decoder_take(&stream->decoder, byte, 1, 8);
    stream->escapes++;
  }
  c->bytes[stream->at + i] = byte;
  c->x[s] = symbol < f->n ? symbol : 0;
}

/* One position of all streams. Streams that have ended, one byte before the longest, are predicted and nothing more. */
static void one_position(vd_compressor *c, int64_t i, bool decode, vd_error *err) {
  vd_step step = {.x = c->x, .y = c->y, .block = 1, .logits = c->logits};
  if (i > 0 && vd_model_run(c->model, &step, err)) return;
  for (int64_t s = 0; s < c->n; s++) {
    vd_frequencies f;
    c->x[s] = 0;
    if (i >= c->stream[s].length) continue;
    if (predict(c, s, i, &f, err)) return;
    if (decode)
      decode_byte(c, s, i, &f);
    else
      encode_byte(c, s, i, &f);
  }
}

/* True on all ranks while none has failed and none was sent a signal. */
static bool all_continue(const vd_compressor *c, vd_error *err) {
  int mine = vd_signals_check(err) != VD_OK, any;
  MPI_Allreduce(&mine, &any, 1, MPI_INT, MPI_MAX, c->plan.ctx->comm);
  return !any;
}

static int all_positions(vd_compressor *c, bool decode, vd_error *err) {
  const vd_compress_plan *p = &c->plan;
  int64_t longest = p->n_stream > 0 ? (p->n_byte + p->n_stream - 1) / p->n_stream : 0;
  vd_model_reset_memory(c->model, err);
  for (int64_t i = 0; i < longest; i++) {
    if (i % CHECK_EVERY == 0) {
      if (!all_continue(c, err)) break;
      if (p->progress) p->progress(p->receiver, i * p->n_stream);
    }
    if (c->n > 0 && err->status == VD_OK) one_position(c, i, decode, err);
  }
  return vd_agree(p->ctx->comm, err);
}

/* Rank 0 gets the codes of all streams. */
static void gather_codes(vd_compressor *c, vd_packed *p) {
  const vd_context *ctx = c->plan.ctx;
  int64_t n_stream = c->plan.n_stream, own = 0;
  int64_t *length = vd_calloc((size_t)n_stream + 1, sizeof *length);
  for (int64_t s = 0; s < c->n; s++) own += length[c->first + s] = (int64_t)c->stream[s].encoder.n;
  MPI_Allreduce(MPI_IN_PLACE, length, (int)n_stream, MPI_INT64_T, MPI_SUM, ctx->comm);
  uint8_t *mine = vd_calloc((size_t)own + 1, 1);
  for (int64_t s = 0, at = 0; s < c->n; at += length[c->first + s++])
    if (length[c->first + s] > 0) memcpy(mine + at, c->stream[s].encoder.bytes, (size_t)length[c->first + s]);
  int64_t *at = places_of_codes(c, length);
  uint8_t *all = ctx->rank == 0 ? vd_calloc((size_t)at[ctx->size] + 1, 1) : NULL;
  exchange(ctx, at, all, mine, true);
  if (ctx->rank == 0) {
    p->n_code = at[ctx->size];
    p->code = all;
    p->length = length;
  } else {
    free(length);
  }
  free(at);
  free(mine);
}

int vd_compressor_encode(vd_compressor *c, const uint8_t *bytes, vd_packed *p, vd_error *err) {
  int64_t *at = places_of_bytes(c);
  exchange(c->plan.ctx, at, (uint8_t *)bytes, c->bytes, false);
  free(at);
  if (all_positions(c, false, err)) return err->status;
  for (int64_t s = 0; s < c->n; s++) vd_encoder_end(&c->stream[s].encoder);
  gather_codes(c, p);
  return VD_OK;
}

int vd_compressor_decode(vd_compressor *c, const vd_packed *p, uint8_t *bytes, vd_error *err) {
  const vd_context *ctx = c->plan.ctx;
  int64_t n_stream = c->plan.n_stream;
  int64_t *length = vd_calloc((size_t)n_stream + 1, sizeof *length);
  if (ctx->rank == 0 && n_stream > 0) memcpy(length, p->length, (size_t)n_stream * sizeof *length);
  MPI_Bcast(length, (int)n_stream, MPI_INT64_T, 0, ctx->comm);
  int64_t *at = places_of_codes(c, length);
  uint8_t *mine = vd_calloc((size_t)(at[ctx->rank + 1] - at[ctx->rank]) + 1, 1);
  exchange(ctx, at, ctx->rank == 0 ? p->code : NULL, mine, false);
  free(at);
  for (int64_t s = 0, from = 0; s < c->n; from += length[c->first + s++])
    vd_decoder_start(&c->stream[s].decoder, mine + from, (size_t)length[c->first + s]);
  if (all_positions(c, true, err) == VD_OK) {
    at = places_of_bytes(c);
    exchange(ctx, at, bytes, c->bytes, true);
    free(at);
  }
  free(mine);
  free(length);
  return err->status;
}
