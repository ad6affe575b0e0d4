/* viaduct prepare: sources become a corpus of shards. Rank 0 reads the sources once and plans; all ranks write shards;
 * rank 0 writes NAME.h5 when every shard is in its place, so that nothing looks whole before it is. */
#include "io/corpus_write.h"
#include "src/comm/collectives.h"
#include "src/comm/run_facts.h"
#include "src/commands/commands.h"
#include "src/commands/prepare.h"
#include "src/commands/prepare_place.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char enwik8_md5[] = "a1fa5ffddb56f4953e226637dabbb36a";

static void say_sources(const vd_corpus_plan *plan, const char *const kind[VD_N_SPLIT]) {
  for (int i = 0; i < plan->n_source; i++)
    printf("viaduct: source %s (%s): %lld bytes, md5 %s\n", plan->source[i], kind[i], (long long)plan->source_bytes[i],
           plan->source_md5[i]);
  if (plan->n_source == 1)
    printf("viaduct: this %s enwik8 (100000000 bytes, md5 %s)\n",
           strcmp(plan->source_md5[0], enwik8_md5) == 0 ? "is" : "is not", enwik8_md5);
  int64_t shards = 0, used = 0;
  for (int k = 0; k < VD_N_SPLIT; k++) {
    shards += vd_shard_count(plan->n_token[k], plan->shard_tokens);
    used += plan->n_token[k];
  }
  printf("viaduct: %lld symbols; tokens: train %lld, valid %lld, test %lld; %lld shard%s of at most %lld\n",
         (long long)plan->vocabulary.n, (long long)plan->n_token[0], (long long)plan->n_token[1],
         (long long)plan->n_token[2], (long long)shards, shards == 1 ? "" : "s", (long long)plan->shard_tokens);
  if (plan->n_source == 1 && used < plan->source_bytes[0])
    printf("viaduct: the last %lld bytes of the source are in no split\n", (long long)(plan->source_bytes[0] - used));
}

/* Whether there is something to write, and if so that it may be. */
static int decide(vd_context *ctx, const vd_settings *s, const vd_corpus_plan *plan, bool *write, vd_error *err) {
  char why[2048];
  *write = true;
  switch (vd_corpus_compare(ctx->h5, plan, why, sizeof why)) {
  case VD_CORPUS_ABSENT:
    break;
  case VD_CORPUS_SAME:
    printf("viaduct: %s is already there, made from the same source in the same way; nothing to do\n", plan->path);
    *write = false;
    break;
  case VD_CORPUS_DAMAGED:
    printf("viaduct: %s is there but not whole (%s); it is made anew\n", plan->path, why);
    break;
  case VD_CORPUS_OTHER:
    if (!s->prepare.overwrite)
      return vd_fail(err, VD_USAGE,
                     "%s exists already, but %s; choose another data%%path, or set prepare%%overwrite = .true. to "
                     "replace it",
                     plan->path, why);
    printf("viaduct: %s is replaced, as prepare%%overwrite says (%s)\n", plan->path, why);
  }
  return *write ? vd_prepare_place_shards(ctx->h5, plan, err) : VD_OK;
}

/* Everything that the other ranks need of rank 0's plan. */
static void share_plan(vd_context *ctx, vd_corpus_plan *plan, const vd_settings *s) {
  vd_vocabulary own = plan->vocabulary;
  MPI_Bcast(plan, (int)sizeof *plan, MPI_BYTE, 0, ctx->comm);
  vd_vocabulary *v = &plan->vocabulary;
  if (ctx->rank == 0) {
    *v = own;
  } else {
    v->symbol = vd_calloc((size_t)v->n, (size_t)v->width);
    v->length = vd_calloc((size_t)v->n, sizeof *v->length);
    v->count = vd_calloc((size_t)v->n, sizeof *v->count);
  }
  MPI_Bcast(v->symbol, (int)(v->n * v->width), MPI_BYTE, 0, ctx->comm);
  MPI_Bcast(v->length, (int)v->n, MPI_INT32_T, 0, ctx->comm);
  MPI_Bcast(v->count, (int)v->n, MPI_INT64_T, 0, ctx->comm);
  /* Pointers are each rank's own. */
  plan->path = s->data.path;
  vd_prepare_name_sources(s, plan);
}

/* All shards, then NAME.h5. What a failed run wrote is removed again. */
static int write_corpus(vd_context *ctx, const vd_settings *s, vd_corpus_plan *plan, const vd_prepare_stamp *stamp,
                        const char *echo, vd_error *err) {
  if (ctx->rank == 0) {
    char replaced[64];
    vd_prepare_place_id(ctx->h5, plan->path, replaced);
    if (!replaced[0] || vd_corpus_remove(ctx->h5, plan->path, replaced, err) == VD_OK)
      vd_corpus_remove(ctx->h5, plan->path, plan->id, err);
  }
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  share_plan(ctx, plan, s);
  vd_run_facts facts;
  vd_run_facts_gather(ctx, &(vd_device){.threads = 1}, NULL, NULL, &facts);
  plan->origin = vd_run_facts_origin(&facts, s->run.title, echo);
  plan->origin.precision = NULL; /* nothing is computed */
  vd_prepare_shards(ctx->h5, plan, ctx->rank, ctx->size, err);
  vd_agree(ctx->comm, err);
  if (ctx->rank == 0) {
    if (err->status == VD_OK && vd_prepare_unchanged(plan, stamp, err) == VD_OK) vd_corpus_write(ctx->h5, plan, err);
    vd_error ignored = {0}; /* the first error is the one to tell */
    if (err->status)
      vd_corpus_remove(ctx->h5, plan->path, plan->id, &ignored);
    else
      printf("viaduct: wrote %s\n", plan->path);
  }
  return vd_broadcast_error(ctx->comm, err);
}

static int plan_corpus(vd_context *ctx, const vd_settings *s, vd_corpus_plan *plan, vd_prepare_stamp *stamp,
                       vd_prepare_lock *lock, int *made, bool *write, vd_error *err) {
  const char *kind[VD_N_SPLIT] = {"", "", ""};
  if (vd_prepare_place_check(ctx->h5, s, err)) return err->status;
  /* A bad source is an error before the folder of the corpus is made. */
  if (vd_prepare_sources(s, plan, stamp, err)) return err->status;
  /* Once more under the lock: what lies there may be new since the first look. */
  if (!ctx->check_only && (vd_prepare_place_make(plan->path, made, err) ||
                           vd_prepare_lock_take(lock, plan->path, err) || vd_prepare_place_check(ctx->h5, s, err)))
    return err->status;
  if (vd_prepare_scan(plan, s, ctx->h5, kind, err)) return err->status;
  say_sources(plan, kind);
  if (decide(ctx, s, plan, write, err)) return err->status;
  if (*write && ctx->check_only) {
    printf("viaduct: --check: %s and its shards would be written; nothing was\n", plan->path);
    *write = false;
  }
  return VD_OK;
}

int vd_cmd_prepare(vd_context *ctx, const vd_settings *s, vd_error *err) {
  vd_corpus_plan plan = {
      .path = s->data.path, .shard_tokens = s->prepare.shard_tokens, .deflate = (int)s->prepare.deflate};
  vd_prepare_stamp stamp[VD_N_SPLIT];
  vd_prepare_lock lock = {.fd = -1};
  char *echo = vd_settings_echo(s);
  bool write = false;
  int made = 0;
  if (ctx->rank == 0) {
    plan_corpus(ctx, s, &plan, stamp, &lock, &made, &write, err);
    fflush(stdout);
  }
  if (vd_broadcast_error(ctx->comm, err) == VD_OK) {
    MPI_Bcast(&write, 1, MPI_C_BOOL, 0, ctx->comm);
    if (write) write_corpus(ctx, s, &plan, stamp, echo, err);
  }
  vd_prepare_lock_release(&lock);
  if (err->status) vd_prepare_place_unmake(plan.path, made);
  vd_prepare_free(&plan);
  free(echo);
  return err->status;
}
