#include "io/corpus_write.h"
#include "io/digest.h"
#include "io/eval_file.h"
#include "src/base/signals.h"
#include "src/comm/collectives.h"
#include "src/comm/run_facts.h"
#include "src/commands/commands.h"
#include "src/train/evaluate.h"
#include "src/train/open_checkpoint.h"
#include "src/train/run_folder.h"
#include "src/train/snapshot.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE = 1 << 20 /* tokens that travel at once */ };

struct eval {
  vd_context *ctx;
  const vd_settings *s;
  vd_corpus *corpus;
  vd_open_checkpoint from;
  vd_model_config config;
  vd_ops *ops;
  vd_evaluator *evaluator;
  vd_evaluation result;
  vd_device device;
  int64_t *positions; /* of eval%attention_at */
  /* Rank 0, where a file is written: the checkpoint's absolute path, its digest. */
  char *checkpoint, sha256[VD_DIGEST_TEXT];
};

/* A rank's tokens are contiguous: they travel piece by piece to rank 0, which continues receiving after an error. */
static void gather_nll(const struct eval *e, int owner, vd_nll *file, vd_error *err) {
  const vd_evaluation *r = &e->result;
  const vd_streams *g = vd_evaluator_streams(e->evaluator);
  int64_t s0, s1;
  vd_stream_share(g->n_stream, owner, e->ctx->size, &s0, &s1);
  int64_t first = vd_stream_first(g, s0), last = vd_stream_first(g, s1);
  float *buffer = vd_calloc(PIECE, sizeof *buffer);
  for (int64_t i = first; i < last; i += PIECE) {
    int n = (int)(last - i < PIECE ? last - i : PIECE);
    if (e->ctx->rank == owner) memcpy(buffer, r->token_nll + (i - first), (size_t)n * sizeof *buffer);
    if (owner != 0 && e->ctx->rank == owner) MPI_Send(buffer, n, MPI_FLOAT, 0, 0, e->ctx->comm);
    if (owner != 0 && e->ctx->rank == 0) MPI_Recv(buffer, n, MPI_FLOAT, owner, 0, e->ctx->comm, MPI_STATUS_IGNORE);
    if (e->ctx->rank == 0 && err->status == VD_OK) vd_nll_put(file, i, n, buffer, err);
  }
  free(buffer);
}

static vd_eval_source source_of(const struct eval *e, const char *model_settings) {
  return (vd_eval_source){.checkpoint = e->checkpoint,
                          .sha256 = e->sha256,
                          .model_settings = model_settings,
                          .split = vd_split_name(e->s->eval.split),
                          .corpus_id = vd_corpus_id(e->corpus),
                          .update = e->from.update};
}

static void begin_nll(const struct eval *e, vd_nll **file, const vd_run_facts *facts, vd_error *err) {
  const float none = NAN;
  char *settings = vd_settings_echo(e->s), *model_settings = vd_settings_echo(&e->from.settings);
  vd_origin origin = vd_run_facts_origin(facts, e->s->run.title, settings);
  vd_eval_source source = source_of(e, model_settings);
  if (vd_nll_begin(file, e->ctx->h5, e->s->eval.nll_file, e->result.n_token, &source, &origin, err) == VD_OK)
    vd_nll_put(*file, 0, 1, &none, err);
  free(settings);
  free(model_settings);
}

static int write_nll(const struct eval *e, vd_error *err) {
  vd_nll *file = NULL;
  vd_run_facts facts;
  vd_run_facts_gather(e->ctx, &e->device, &e->config, e->corpus, &facts);
  if (e->ctx->rank == 0) begin_nll(e, &file, &facts, err);
  for (int owner = 0; owner < e->ctx->size; owner++) gather_nll(e, owner, file, err);
  if (file && err->status == VD_OK) vd_nll_commit(&file, err);
  if (file) vd_nll_abandon(&file);
  return vd_broadcast_error(e->ctx->comm, err);
}

/* Spans in tokens, [n_layer][n_head]. A head of Transformer-XL sees all distances that there are. */
static void read_spans(const struct eval *e, int64_t n_distance, float *span) {
  int64_t n = e->config.n_layer * e->config.n_head;
  if (e->config.arch != VD_TRANSFORMER_XL) vd_model_spans(vd_evaluator_model(e->evaluator), span);
  for (int64_t i = 0; i < n && e->config.arch == VD_TRANSFORMER_XL; i++) span[i] = (float)(n_distance - 1);
}

/* The token at a position, and those at distances 0 .. n - 1 before the one that predicts it; -1 before the stream. */
static int read_context(const struct eval *e, const vd_evaluator_position *p, int64_t n, int32_t *token,
                        int32_t *context, vd_error *err) {
  int64_t start = vd_stream_first(vd_evaluator_streams(e->evaluator), p->stream) - 1, first = p->token - n;
  if (first < start) first = start;
  int64_t there = p->token - first;
  int32_t *read = vd_calloc((size_t)there + 1, sizeof *read);
  vd_corpus_read(e->corpus, vd_split_name(e->s->eval.split), first, there + 1, read, err);
  *token = read[there];
  for (int64_t x = 0; x < n; x++) context[x] = x < there ? read[there - 1 - x] : -1;
  free(read);
  return err->status;
}

/* Rank 0. Begins the file with all but the weights; nll [n_position]. */
static void begin_attention(const struct eval *e, vd_attention_file **file, const vd_run_facts *facts, const float *nll,
                            vd_error *err) {
  int64_t n, n_distance = vd_evaluator_distances(e->evaluator);
  const vd_evaluator_position *p = vd_evaluator_positions(e->evaluator, &n);
  char *settings = vd_settings_echo(e->s), *model_settings = vd_settings_echo(&e->from.settings);
  vd_origin origin = vd_run_facts_origin(facts, e->s->run.title, settings);
  vd_eval_source source = source_of(e, model_settings);
  float *span = vd_calloc((size_t)(e->config.n_layer * e->config.n_head), sizeof *span);
  int64_t *position = vd_calloc((size_t)n + 1, sizeof *position);
  int32_t *token = vd_calloc((size_t)n + 1, sizeof *token);
  int32_t *context = vd_calloc((size_t)(n * n_distance) + 1, sizeof *context);
  vd_attention_contents contents = {.n_layer = e->config.n_layer,
                                    .n_head = e->config.n_head,
                                    .n_distance = n_distance,
                                    .n_position = n,
                                    .span = span,
                                    .position = position,
                                    .token = token,
                                    .nll = nll,
                                    .context = context,
                                    .vocabulary = vd_corpus_vocabulary(e->corpus)};
  read_spans(e, n_distance, span);
  for (int64_t k = 0; k < n && err->status == VD_OK; k++) {
    position[k] = p[k].token;
    read_context(e, &p[k], n_distance, &token[k], context + k * n_distance, err);
  }
  if (err->status == VD_OK)
    vd_attention_file_begin(file, e->ctx->h5, e->s->eval.attention_file, &contents, &source, &origin, err);
  void *const all[] = {settings, model_settings, span, position, token, context};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Weights travel to rank 0 a layer at a time; it continues receiving after an error. */
static int write_attention(const struct eval *e, vd_error *err) {
  vd_attention_file *file = NULL;
  vd_run_facts facts;
  bool first = e->ctx->rank == 0;
  int64_t n;
  vd_evaluator_positions(e->evaluator, &n);
  size_t elements = (size_t)(e->config.n_head * vd_evaluator_distances(e->evaluator));
  double *mean = vd_calloc(elements, sizeof *mean);
  float *weight = vd_calloc(elements, sizeof *weight), *nll = vd_calloc((size_t)n + 1, sizeof *nll);
  vd_run_facts_gather(e->ctx, &e->device, &e->config, e->corpus, &facts);
  vd_evaluator_gather_nll(e->evaluator, nll);
  if (first) begin_attention(e, &file, &facts, nll, err);
  for (int l = 0; l < (int)e->config.n_layer; l++) {
    vd_evaluator_gather_mean(e->evaluator, l, e->result.n_target, mean);
    if (first && err->status == VD_OK) vd_attention_file_put_mean(file, l, mean, err);
    for (int64_t k = 0; k < n; k++) {
      vd_evaluator_gather_weight(e->evaluator, k, l, weight);
      if (first && err->status == VD_OK) vd_attention_file_put_position(file, k, l, weight, err);
    }
  }
  if (file && err->status == VD_OK) vd_attention_file_commit(&file, err);
  if (file) vd_attention_file_abandon(&file);
  free(mean);
  free(weight);
  free(nll);
  return vd_broadcast_error(e->ctx->comm, err);
}

/* Are all symbols single bytes? Then bpc, bits per symbol, are bits per byte. */
static bool is_bytes(const vd_corpus *corpus) {
  for (int64_t i = 0; i < vd_corpus_vocab(corpus); i++) {
    size_t n;
    vd_corpus_symbol(corpus, i, &n);
    if (n != 1) return false;
  }
  return true;
}

static void report(const struct eval *e) {
  const vd_evaluation *r = &e->result;
  double bpc = r->nll / (double)r->n_target / log(2.0);
  bool bytes = is_bytes(e->corpus);
  int64_t streams = e->s->eval.streams, block = e->s->eval.tokens_per_sample;
  printf("checkpoint: %s, update %lld\n", e->from.path, (long long)e->from.update);
  if (strcmp(e->from.corpus_id, vd_corpus_id(e->corpus)) != 0)
    printf("note: it was trained on other data than %s\n", e->s->data.path);
  printf("%s: %lld of %lld tokens predicted%s\n", vd_split_name(e->s->eval.split), (long long)r->n_target,
         (long long)r->n_token, r->n_target == r->n_token - 1 ? " (all but the first, which nothing precedes)" : "");
  bool xl = e->config.arch == VD_TRANSFORMER_XL;
  int64_t memory = xl ? e->config.mem_len : e->config.attn_span;
  printf("%s", e->from.notice);
  if (xl)
    printf(
        "context: %lld streams in blocks of %lld tokens; each layer remembers up to %lld tokens before the block, %s "
        "where a stream begins\n",
        (long long)streams, (long long)block, (long long)memory,
        e->config.initial_memory == VD_MEMORY_ZEROS ? "as many zeros" : "none");
  else
    printf("context: %lld streams in blocks of %lld tokens; each token sees those before it in its stream, up to %lld, "
           "through the layers' memories, which are zeros where a stream begins\n",
           (long long)streams, (long long)block, (long long)memory);
  printf("bpc: %.6f bits per symbol%s (%.6f nats), %.0f tokens a second\n", bpc, bytes ? ", here bits per byte" : "",
         bpc * log(2.0), (double)r->n_target / r->seconds);
  printf("{\"split\": \"%s\", \"bpc\": %.17g, \"nll\": %.17g, \"predicted\": %lld, \"tokens\": %lld, "
         "\"unit\": \"%s\", \"streams\": %lld, \"block\": %lld, \"%s\": %lld, \"update\": %lld}\n",
         vd_split_name(e->s->eval.split), bpc, r->nll, (long long)r->n_target, (long long)r->n_token,
         bytes ? "byte" : "symbol", (long long)streams, (long long)block, xl ? "mem_len" : "attn_span",
         (long long)memory, (long long)e->from.update);
}

/* Before hours of work: may the files be written, and are they none of the files that are read? */
static int check_output(struct eval *e, vd_error *err) {
  const struct {
    const char *name, *path;
  } files[] = {{"eval%nll_file", e->s->eval.nll_file}, {"eval%attention_file", e->s->eval.attention_file}};
  enum { N_FILE = sizeof files / sizeof *files };
  if (e->ctx->rank == 0 && (files[0].path[0] || files[1].path[0])) {
    vd_path_list *list = vd_path_list_create();
    vd_run_paths_inputs(list, e->s, e->corpus);
    vd_run_paths_protect(list, e->s, e->from.path);
    for (int i = 0; i < N_FILE; i++) vd_path_list_add(list, VD_PATH_OUTPUT, files[i].name, files[i].path);
    vd_path_list_check(list, err);
    vd_path_list_destroy(list);
    vd_atomic_file file;
    for (int i = 0; i < N_FILE && err->status == VD_OK; i++)
      if (files[i].path[0] && vd_atomic_begin(&file, files[i].path, err)) vd_wrap(err, "%s", files[i].name);
    if (err->status == VD_OK && vd_digest_text(e->from.path, e->sha256, err) == VD_OK)
      e->checkpoint = realpath(e->from.path, NULL);
    if (err->status == VD_OK && !e->checkpoint)
      vd_fail(err, VD_FAILED, "cannot resolve the path %s: %s", e->from.path, strerror(errno));
  }
  return vd_broadcast_error(e->ctx->comm, err);
}

static int compare_tokens(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

/* The whole numbers of eval%attention_at, ascending, each once; *n: how many. The caller frees. */
static int64_t *read_positions(const char *text, int64_t *n) {
  int64_t *found = vd_calloc(strlen(text) + 1, sizeof *found), count = 0;
  *n = 0;
  for (char *end; *(text += strspn(text, " ")) != '\0'; text = end) found[count++] = strtoll(text, &end, 10);
  qsort(found, (size_t)count, sizeof *found, compare_tokens);
  for (int64_t i = 0; i < count; i++)
    if (i == 0 || found[i] != found[i - 1]) found[(*n)++] = found[i];
  return found;
}

static int evaluate(struct eval *e, vd_error *err) {
  const vd_settings *s = e->s;
  if (vd_open_checkpoint_find(e->ctx, s, s->eval.checkpoint, &e->from, err) ||
      vd_open_checkpoint_override(s, &e->from, err) || vd_configure_corpus(e->ctx, s, &e->corpus, err) ||
      check_output(e, err) || vd_snapshot_adopt_vocabulary(e->ctx, e->from.path, e->from.corpus_id, e->corpus, err) ||
      vd_open_checkpoint_config(&e->from, e->corpus, &e->config, err) ||
      vd_device_open(e->ctx, s, &e->config, &e->ops, &e->device, err))
    return err->status;
  vd_evaluate_plan plan = {.ctx = e->ctx,
                           .corpus = e->corpus,
                           .split = vd_split_name(s->eval.split),
                           .streams = s->eval.streams,
                           .block = s->eval.tokens_per_sample,
                           .max_blocks = s->eval.max_blocks,
                           .micro_streams = s->data.micro_streams,
                           .read_ahead = (int)s->data.read_ahead,
                           .stoppable = true,
                           .attention = s->eval.attention_file[0] != '\0',
                           .n_position = s->eval.attention_positions};
  if (s->eval.attention_at[0]) plan.position = e->positions = read_positions(s->eval.attention_at, &plan.n_position);
  if (vd_evaluator_create(&e->evaluator, &plan, NULL, &e->config, e->ops, err) ||
      vd_snapshot_read_parameters(e->ctx, e->ops, vd_evaluator_model(e->evaluator), e->from.path, err) ||
      vd_evaluator_run(e->evaluator, s->eval.nll_file[0] != '\0', &e->result, err))
    return err->status;
  if (e->result.stopped) {
    vd_signals_check(err);
    if (vd_agree(e->ctx->comm, err)) return err->status;
  }
  if (!isfinite(e->result.nll))
    return vd_fail(err, VD_FAILED, "the loss of %s with %s is not finite", vd_split_name(s->eval.split), e->from.path);
  /* The result first: a disk that is full must not cost it. */
  if (e->ctx->rank == 0) {
    report(e);
    if (fflush(stdout) != 0) vd_fail(err, VD_FAILED, "cannot write to standard output");
  }
  if (vd_broadcast_error(e->ctx->comm, err)) return err->status;
  if (s->eval.nll_file[0] && write_nll(e, err)) return err->status;
  return s->eval.attention_file[0] ? write_attention(e, err) : VD_OK;
}

int vd_cmd_eval(vd_context *ctx, const vd_settings *s, vd_error *err) {
  struct eval e = {.ctx = ctx, .s = s};
  int status = evaluate(&e, err);
  vd_evaluator_destroy(e.evaluator);
  free(e.result.token_nll);
  free(e.checkpoint);
  free(e.positions);
  if (e.ops) e.ops->destroy(e.ops);
  if (e.corpus) vd_corpus_close(e.corpus);
  return status;
}
