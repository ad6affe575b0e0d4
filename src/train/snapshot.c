/* A run out of a checkpoint. */
#include "io/checkpoint.h"
#include "io/streams.h"
#include "src/comm/collectives.h"
#include "src/train/snapshot_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Values of one tensor that a run could not have written: not finite, spans outside 0..1, negative sums of squares. */
static int check_values(const vd_param *p, const char *group, const char *path, const real *x, vd_error *err) {
  bool model = strcmp(group, "/model") == 0;
  bool squares = strcmp(group, "/optimizer/adagrad_sum") == 0 || strcmp(group, "/optimizer/adam_v") == 0;
  for (size_t i = 0; i < p->at.size; i++) {
    if (!isfinite(x[i])) return vd_fail(err, VD_FAILED, "%s holds a value that is not finite", path);
    if (model && p->is_span && !(x[i] >= 0 && x[i] <= 1))
      return vd_fail(err, VD_FAILED, "%s holds the span %g, outside 0..1", path, (double)x[i]);
    if (squares && x[i] < 0)
      return vd_fail(err, VD_FAILED, "%s holds the negative sum of squares %g", path, (double)x[i]);
  }
  return VD_OK;
}

/* One arena from the file to all ranks' backend memory. c: open on rank 0. */
static int get_arena(vd_context *ctx, vd_ops *ops, vd_model *m, vd_checkpoint *c, const char *group, real *arena,
                     vd_error *err) {
  size_t n = vd_model_arena(m);
  real *host = vd_calloc(n, sizeof *host);
  for (int i = 0; ctx->rank == 0 && i < vd_model_n_param(m) && err->status == VD_OK; i++) {
    const vd_param *p = vd_model_param(m, i);
    char path[256];
    hsize_t shape[3];
    snprintf(path, sizeof path, "%s/%s", group, p->name);
    for (int k = 0; k < p->rank; k++) shape[k] = (hsize_t)p->shape[k];
    if (vd_checkpoint_get(c, path, vd_snapshot_dtype, p->rank, shape, host + p->at.offset, err) == VD_OK)
      check_values(p, group, path, host + p->at.offset, err);
  }
  if (vd_broadcast_error(ctx->comm, err) == VD_OK) {
    vd_broadcast_reals(ctx->comm, 0, host, n);
    ops->put(ops, arena, host, n);
  }
  free(host);
  return err->status;
}

/* A count that was written as a double; -1: it is none. */
static int64_t count_of(double x) {
  return x >= 0 && x <= 9007199254740992.0 && x == floor(x) ? (int64_t)x : -1;
}

/* A run could not have written values that are not finite or negative, or updates after its own. */
static int check_statistics(const double statistic[N_STATISTIC], int64_t update, vd_error *err) {
  for (int i = 0; i < N_STATISTIC; i++)
    if (!isfinite(statistic[i]) || (i != LOG_NLL && i != TRACE_NLL && statistic[i] < 0))
      return vd_fail(err, VD_FAILED, "/statistics holds %g at place %d", statistic[i], i);
  int64_t best = count_of(statistic[BEST_UPDATE]), valid = count_of(statistic[VALID_UPDATE]);
  if (best < 0 || best > update || valid < 0 || valid > update)
    return vd_fail(err, VD_FAILED, "/statistics names the updates %g and %g in a checkpoint of update %lld",
                   statistic[BEST_UPDATE], statistic[VALID_UPDATE], (long long)update);
  return VD_OK;
}

/* /position is redundant: an update is one block. A file whose counters contradict each other, or its attribute
 * `update`, was damaged or made for other data. */
static int check_position(vd_checkpoint *c, const int64_t position[N_POSITION], int64_t n_block, vd_error *err) {
  int64_t update = position[0], named;
  if (vd_checkpoint_get_i64(c, "update", &named, err)) return err->status;
  if (update == named && update >= 0 && position[1] == 1 + update / n_block && position[2] == update % n_block)
    return VD_OK;
  return vd_fail(
      err, VD_FAILED,
      "/position says %lld updates, epoch %lld, block %lld, and the attribute `update` %lld: with %lld blocks "
      "in an epoch %lld updates end at epoch %lld, block %lld",
      (long long)update, (long long)position[1], (long long)position[2], (long long)named, (long long)n_block,
      (long long)named, (long long)(1 + named / n_block), (long long)(named % n_block));
}

static void get_progress(vd_checkpoint *c, int64_t n_block, vd_progress *p, vd_error *err) {
  int64_t position[N_POSITION];
  double statistic[N_STATISTIC];
  const hsize_t n_position = N_POSITION, n_statistic = N_STATISTIC;
  if (vd_checkpoint_get(c, "/position", VD_I64, 1, &n_position, position, err) ||
      check_position(c, position, n_block, err))
    return;
  if (vd_checkpoint_get(c, "/statistics", VD_F64, 1, &n_statistic, statistic, err) ||
      check_statistics(statistic, position[0], err))
    return;
  *p = (vd_progress){.update = position[0],
                     .valid_update = (int64_t)statistic[VALID_UPDATE],
                     .best_update = (int64_t)statistic[BEST_UPDATE],
                     .best_bpc = statistic[BEST_BPC],
                     .log = {statistic[LOG_NLL], statistic[LOG_TARGETS], statistic[LOG_SECONDS]},
                     .trace = {statistic[TRACE_NLL], statistic[TRACE_TARGETS], statistic[TRACE_SECONDS]}};
}

/* Of a run that scales its losses; files of runs that did not are silent, and leave what the deck says. */
static void get_scaling(vd_checkpoint *c, vd_optimizer *o, vd_error *err) {
  double value[N_SCALING];
  const hsize_t n = N_SCALING;
  if (!vd_checkpoint_has(c, "/loss_scale") || vd_checkpoint_get(c, "/loss_scale", VD_F64, 1, &n, value, err)) return;
  if (!(value[0] > 0) || !isfinite(value[0]) || count_of(value[1]) < 0 || count_of(value[2]) < 0) {
    vd_fail(err, VD_FAILED, "/loss_scale is %g, %g, %g", value[0], value[1], value[2]);
    return;
  }
  vd_loss_scale l = {value[0], (int64_t)value[1], (int64_t)value[2]};
  vd_optimizer_set_scaling(o, &l);
}

/* The most rows of memory that a checkpoint may hold for a stream. A resumed Transformer-XL may have a shorter memory
 * than the run that wrote the checkpoint: then the settings in the checkpoint allow more rows than the model keeps. */
static int most_rows(const vd_snapshot *s, vd_checkpoint *c, int64_t *most, vd_error *err) {
  const vd_model_config *config = vd_model_config_of(s->model);
  char *echo = NULL;
  *most = config->attn_span;
  if (config->arch != VD_TRANSFORMER_XL) return VD_OK;
  vd_settings *written = vd_calloc(1, sizeof *written);
  if (vd_checkpoint_get_text(c, "settings", &echo, err) == VD_OK &&
      vd_settings_read_text(written, echo, "its settings", err) == VD_OK)
    *most = written->memory.mem_len > config->mem_len ? written->memory.mem_len : config->mem_len;
  if (err->status) err->status = VD_FAILED; /* a deck of the user's is not at fault */
  free(echo);
  free(written);
  return err->status;
}

/* The rank's own rows of one layer's memory, at most `most` of a stream. */
static int get_memory(const vd_snapshot *s, vd_checkpoint *c, int layer, int64_t most, vd_error *err) {
  char path[64];
  int rank;
  hsize_t shape[4];
  snprintf(path, sizeof path, "/memory/layer%d", layer);
  if (vd_checkpoint_shape(c, path, &rank, shape, err)) return err->status;
  int64_t d_model = vd_model_config_of(s->model)->d_model;
  if (rank != 3 || (int64_t)shape[0] != s->n_stream || (int64_t)shape[2] != d_model)
    return vd_fail(err, VD_FAILED, "%s is not of %lld streams and %lld features", path, (long long)s->n_stream,
                   (long long)d_model);
  if (shape[1] > (hsize_t)most)
    return vd_fail(err, VD_FAILED, "%s has %llu rows a stream; the settings allow %lld", path,
                   (unsigned long long)shape[1], (long long)most);
  int64_t rows = (int64_t)shape[1], first, last;
  vd_stream_share(s->n_stream, s->ctx->rank, s->ctx->size, &first, &last);
  if (rows == 0) return vd_model_memory_put(s->model, layer, 0, 0, last - first, NULL, err);
  int64_t step = vd_snapshot_piece(s, rows);
  real *buffer = vd_calloc((size_t)(step * rows * d_model), sizeof *buffer);
  for (int64_t i = first; i < last && err->status == VD_OK; i += step) {
    int64_t n = i + step < last ? step : last - i;
    if (vd_checkpoint_get_rows(c, path, vd_snapshot_dtype, i, n, buffer, err)) break;
    for (int64_t k = 0; k < n * rows * d_model && err->status == VD_OK; k++)
      if (!isfinite(buffer[k])) vd_fail(err, VD_FAILED, "%s holds a value that is not finite", path);
    if (err->status == VD_OK) vd_model_memory_put(s->model, layer, rows, i - first, n, buffer, err);
  }
  free(buffer);
  return err->status;
}

static int read_tensors(const vd_snapshot *s, vd_checkpoint *c, vd_error *err) {
  vd_context *ctx = s->ctx;
  if (get_arena(ctx, s->ops, s->model, c, "/model", vd_model_params(s->model), err)) return err->status;
  for (int i = 0; i < vd_optimizer_n_state(s->optimizer); i++) {
    char group[128];
    snprintf(group, sizeof group, "/optimizer/%s", vd_optimizer_state_name(s->optimizer, i));
    if (get_arena(ctx, s->ops, s->model, c, group, vd_optimizer_state(s->optimizer, i), err)) return err->status;
  }
  vd_model_params_changed(s->model);
  int64_t most = 0;
  most_rows(s, c, &most, err);
  for (int l = 0; l < (int)vd_model_config_of(s->model)->n_layer && err->status == VD_OK; l++)
    get_memory(s, c, l, most, err);
  return vd_agree(ctx->comm, err);
}

int vd_snapshot_read(const vd_snapshot *s, const char *path, vd_progress *progress, vd_error *err) {
  vd_checkpoint *c = NULL;
  if (vd_checkpoint_open(&c, s->ctx->h5, path, false, err) == VD_OK) get_progress(c, s->n_block, progress, err);
  if (err->status == VD_OK) get_scaling(c, s->optimizer, err);
  if (vd_agree(s->ctx->comm, err) == VD_OK) read_tensors(s, c, err);
  if (c) vd_checkpoint_close(&c);
  return err->status ? vd_wrap(err, "%s", path) : VD_OK;
}

int vd_snapshot_read_parameters(vd_context *ctx, vd_ops *ops, vd_model *model, const char *path, vd_error *err) {
  vd_checkpoint *c = NULL;
  if (ctx->rank == 0) vd_checkpoint_open(&c, ctx->h5, path, false, err);
  if (vd_broadcast_error(ctx->comm, err) == VD_OK &&
      get_arena(ctx, ops, model, c, "/model", vd_model_params(model), err) == VD_OK)
    vd_model_params_changed(model);
  if (c) vd_checkpoint_close(&c);
  return err->status;
}

static void read_description(vd_context *ctx, const char *path, vd_settings *settings, char corpus_id[64],
                             int64_t *update, vd_error *err) {
  vd_checkpoint *c = NULL;
  char *echo = NULL, *id = NULL;
  /* Every command describes a checkpoint before it reads more of it: here the digest is compared. */
  if (vd_checkpoint_open(&c, ctx->h5, path, true, err)) return;
  if (vd_checkpoint_get_text(c, "settings", &echo, err) == VD_OK &&
      vd_checkpoint_get_text(c, "corpus_id", &id, err) == VD_OK &&
      vd_checkpoint_get_i64(c, "update", update, err) == VD_OK) {
    snprintf(corpus_id, 64, "%s", id);
    vd_settings_read_text(settings, echo, path, err);
  }
  free(echo);
  free(id);
  vd_checkpoint_close(&c);
}

int vd_snapshot_describe(vd_context *ctx, const char *path, vd_settings *settings, char corpus_id[64], int64_t *update,
                         vd_error *err) {
  memset(settings, 0, sizeof *settings);
  if (ctx->rank == 0) {
    read_description(ctx, path, settings, corpus_id, update, err);
    if (err->status) err->status = VD_FAILED; /* settings inside a file are no fault of the user's deck */
  }
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  MPI_Bcast(settings, (int)sizeof *settings, MPI_BYTE, 0, ctx->comm);
  MPI_Bcast(corpus_id, 64, MPI_CHAR, 0, ctx->comm);
  MPI_Bcast(update, 1, MPI_INT64_T, 0, ctx->comm);
  return VD_OK;
}

/* The vocabulary of an open checkpoint on rank 0, to all ranks. */
static int share_vocabulary(vd_context *ctx, vd_vocabulary *v) {
  int64_t shape[2] = {v->n, v->width};
  MPI_Bcast(shape, 2, MPI_INT64_T, 0, ctx->comm);
  if (ctx->rank != 0)
    *v = (vd_vocabulary){.n = shape[0],
                         .width = shape[1],
                         .symbol = vd_calloc((size_t)shape[0], (size_t)shape[1]),
                         .length = vd_calloc((size_t)shape[0], sizeof *v->length),
                         .count = vd_calloc((size_t)shape[0], sizeof *v->count)};
  MPI_Bcast(v->symbol, (int)(shape[0] * shape[1]), MPI_BYTE, 0, ctx->comm);
  MPI_Bcast(v->length, (int)shape[0], MPI_INT32_T, 0, ctx->comm);
  return MPI_Bcast(v->count, (int)shape[0], MPI_INT64_T, 0, ctx->comm);
}

int vd_snapshot_adopt_vocabulary(vd_context *ctx, const char *path, const char *trained_id, vd_corpus *corpus,
                                 vd_error *err) {
  vd_checkpoint *c = NULL;
  vd_vocabulary v = {0};
  int has = 0;
  if (ctx->rank == 0 && vd_checkpoint_open(&c, ctx->h5, path, false, err) == VD_OK) {
    has = vd_checkpoint_has(c, "/vocabulary/symbol");
    if (has)
      vd_checkpoint_get_vocabulary(c, &v, err);
    else if (strcmp(trained_id, vd_corpus_id(corpus)) != 0)
      vd_fail(err, VD_FAILED,
              "%s was written by an earlier version and does not hold its vocabulary: only the corpus that it was "
              "trained on can be used with it (resume the run for one update to have it written anew)",
              path);
    vd_checkpoint_close(&c);
  }
  if (vd_broadcast_error(ctx->comm, err) == VD_OK) {
    MPI_Bcast(&has, 1, MPI_INT, 0, ctx->comm);
    if (has) {
      share_vocabulary(ctx, &v);
      vd_corpus_adopt(corpus, &v, err);
    }
    if (vd_agree(ctx->comm, err)) vd_wrap(err, "the vocabulary of %s", path);
  }
  vd_vocabulary_free(&v);
  return err->status;
}
