#include "io/corpus_write.h"
#include "io/digest.h"
#include "io/nll.h"
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
  char *checkpoint, sha256[VD_DIGEST_TEXT]; /* rank 0, with eval%nll_file: the checkpoint's absolute path, its digest */
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

static void begin_nll(const struct eval *e, vd_nll **file, const vd_run_facts *facts, vd_error *err) {
  const float none = NAN;
  char *settings = vd_settings_echo(e->s), *model_settings = vd_settings_echo(&e->from.settings);
  vd_origin origin = vd_run_facts_origin(facts, e->s->run.title, settings);
  vd_nll_source source = {.checkpoint = e->checkpoint,
                          .sha256 = e->sha256,
                          .model_settings = model_settings,
                          .split = vd_split_name(e->s->eval.split),
                          .corpus_id = vd_corpus_id(e->corpus),
                          .update = e->from.update};
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
        "context: %lld streams in blocks of %lld tokens; each layer remembers up to %lld tokens before the block, none "
        "where a stream begins\n",
        (long long)streams, (long long)block, (long long)memory);
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

/* Before hours of work: may the nll file be written, and is it none of the files that are read? */
static int check_output(struct eval *e, vd_error *err) {
  const char *path = e->s->eval.nll_file;
  if (e->ctx->rank == 0 && path[0]) {
    vd_path_list *list = vd_path_list_create();
    vd_run_paths_inputs(list, e->s, e->corpus);
    vd_run_paths_protect(list, e->s, e->from.path);
    vd_path_list_add(list, VD_PATH_OUTPUT, "eval%nll_file", path);
    vd_path_list_check(list, err);
    vd_path_list_destroy(list);
    vd_atomic_file file;
    if (err->status == VD_OK && vd_atomic_begin(&file, path, err)) vd_wrap(err, "eval%%nll_file");
    if (err->status == VD_OK && vd_digest_text(e->from.path, e->sha256, err) == VD_OK)
      e->checkpoint = realpath(e->from.path, NULL);
    if (err->status == VD_OK && !e->checkpoint)
      vd_fail(err, VD_FAILED, "cannot resolve the path %s: %s", e->from.path, strerror(errno));
  }
  return vd_broadcast_error(e->ctx->comm, err);
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
                           .stoppable = true};
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
  return s->eval.nll_file[0] ? write_nll(e, err) : VD_OK;
}

int vd_cmd_eval(vd_context *ctx, const vd_settings *s, vd_error *err) {
  struct eval e = {.ctx = ctx, .s = s};
  int status = evaluate(&e, err);
  vd_evaluator_destroy(e.evaluator);
  free(e.result.token_nll);
  free(e.checkpoint);
  if (e.ops) e.ops->destroy(e.ops);
  if (e.corpus) vd_corpus_close(e.corpus);
  return status;
}
