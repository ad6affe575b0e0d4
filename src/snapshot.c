#include "snapshot.h"

#include "checkpoint.h"
#include "parallel.h"
#include "streams.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* /statistics in this order. */
enum {
  BEST_BPC,
  BEST_UPDATE,
  VALID_UPDATE,
  LOG_NLL,
  LOG_TARGETS,
  LOG_SECONDS,
  TRACE_NLL,
  TRACE_TARGETS,
  TRACE_SECONDS,
  N_STATISTIC
};
enum { N_POSITION = 3, PIECE_BYTES = 64 << 20 /* of memories that travel at once */ };
static const enum vd_dtype dtype = VD_REAL_IS_DOUBLE ? VD_F64 : VD_F32;

/* A tensor as a dataset PREFIX/NAME, its dimensions named by what they count. */
static vd_dataset describe(const vd_param *p, const char *path, const char *long_name) {
  vd_dataset d = {.path = path, .dtype = dtype, .rank = p->rank, .units = "1", .long_name = long_name};
  for (int i = 0; i < p->rank; i++) d.shape[i] = (hsize_t)p->shape[i];
  static const char *const plain[3][3] = {
      {"feature", NULL, NULL}, {"out_feature", "in_feature", NULL}, {"table", "head_feature", "distance"}};
  static const char *const span[3][3] = {
      {"span_of_layer", NULL, NULL}, {"head", "column", NULL}, {"head", "row", "column"}};
  for (int i = 0; i < p->rank; i++) d.dimension[i] = (p->is_span ? span : plain)[p->rank - 1][i];
  static const char *const symbols[] = {"in_emb.", "out_emb.", "word_emb.", "crit."};
  for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++)
    if (strncmp(p->name, symbols[i], strlen(symbols[i])) == 0) d.dimension[0] = "symbol";
  const char *last = strrchr(p->name, '.');
  last = last ? last + 1 : p->name;
  if (strcmp(last, "r_w") == 0 || strcmp(last, "r_r") == 0) {
    d.dimension[0] = "head";
    d.dimension[1] = "head_feature";
  }
  return d;
}

/* One arena (parameters or a state) under `group`, from backend memory. */
static int put_arena(const vd_snapshot *s, vd_checkpoint *c, const char *group, const char *what, const real *arena,
                     vd_error *err) {
  size_t n = vd_model_arena(s->model);
  real *host = vd_calloc(n, sizeof *host);
  s->ops->get(s->ops, host, arena, n);
  for (int i = 0; i < vd_model_n_param(s->model) && err->status == VD_OK; i++) {
    const vd_param *p = vd_model_param(s->model, i);
    char path[256], long_name[256];
    snprintf(path, sizeof path, "%s/%s", group, p->name);
    snprintf(long_name, sizeof long_name, "%s of %s", what, p->name);
    vd_dataset d = describe(p, path, long_name);
    vd_checkpoint_put(c, &d, host + p->at.offset, err);
  }
  free(host);
  return err->status;
}

static int put_arenas(const vd_snapshot *s, vd_checkpoint *c, vd_error *err) {
  if (put_arena(s, c, "/model", "parameter", vd_model_params(s->model), err)) return err->status;
  for (int i = 0; i < vd_optimizer_n_state(s->optimizer); i++) {
    char group[128];
    snprintf(group, sizeof group, "/optimizer/%s", vd_optimizer_state_name(s->optimizer, i));
    if (put_arena(s, c, group, vd_optimizer_state_name(s->optimizer, i), vd_optimizer_state(s->optimizer, i), err))
      return err->status;
  }
  return VD_OK;
}

static int put_progress(vd_checkpoint *c, const vd_progress *p, const char *echo, const char *corpus_id,
                        vd_error *err) {
  int64_t position[N_POSITION] = {p->update, p->epoch, p->block};
  double statistic[N_STATISTIC] = {
      [BEST_BPC] = p->best_bpc,   [BEST_UPDATE] = (double)p->best_update, [VALID_UPDATE] = (double)p->valid_update,
      [LOG_NLL] = p->log.nll,     [LOG_TARGETS] = p->log.targets,         [LOG_SECONDS] = p->log.seconds,
      [TRACE_NLL] = p->trace.nll, [TRACE_TARGETS] = p->trace.targets,     [TRACE_SECONDS] = p->trace.seconds,
  };
  vd_dataset where = {.path = "/position",
                      .dtype = VD_I64,
                      .rank = 1,
                      .shape = {N_POSITION},
                      .dimension = {"counter"},
                      .units = "1",
                      .long_name = "updates done; epoch (from 1) and block (from 0) of the next update"};
  vd_dataset sums = {.path = "/statistics",
                     .dtype = VD_F64,
                     .rank = 1,
                     .shape = {N_STATISTIC},
                     .dimension = {"statistic"},
                     .units = "1",
                     .long_name = "lowest valid bpc, its update, update of the last validation; nats, targets and "
                                  "seconds since the last row of the log, and of the trace"};
  vd_checkpoint_put(c, &where, position, err);
  if (err->status == VD_OK) vd_checkpoint_put(c, &sums, statistic, err);
  if (err->status == VD_OK) vd_checkpoint_put_text(c, "settings", echo, err);
  if (err->status == VD_OK) vd_checkpoint_put_text(c, "corpus_id", corpus_id, err);
  if (err->status == VD_OK) vd_checkpoint_put_i64(c, "update", p->update, err);
  if (err->status == VD_OK && p->best_update > 0) vd_checkpoint_put_f64(c, "best_valid_bpc", p->best_bpc, err);
  return err->status;
}

static int64_t piece_streams(const vd_snapshot *s, int64_t rows) {
  int64_t bytes = rows * vd_model_config_of(s->model)->d_model * (int64_t)sizeof(real);
  return bytes > 0 && bytes < PIECE_BYTES ? PIECE_BYTES / bytes : 1;
}

/* Memories of the streams [first, first + n) of rank `owner` on their way to rank 0 and into the file. Rank 0 goes on
 * receiving after an error of its own, or the senders would wait for ever. */
static void gather_piece(const vd_snapshot *s, vd_checkpoint *c, int layer, int owner, int64_t first, int64_t n,
                         int64_t rows, real *buffer, vd_error *err) {
  vd_context *ctx = s->ctx;
  int64_t own0, own1;
  vd_stream_share(s->n_stream, owner, ctx->size, &own0, &own1);
  int count = (int)(n * rows * vd_model_config_of(s->model)->d_model);
  if (ctx->rank == owner) vd_model_memory_get(s->model, layer, first - own0, n, buffer);
  if (owner != 0 && ctx->rank == owner) MPI_Send(buffer, count, VD_MPI_REAL, 0, layer, ctx->comm);
  if (owner != 0 && ctx->rank == 0) MPI_Recv(buffer, count, VD_MPI_REAL, owner, layer, ctx->comm, MPI_STATUS_IGNORE);
  if (ctx->rank != 0 || err->status != VD_OK) return;
  char path[64];
  snprintf(path, sizeof path, "/memory/layer%d", layer);
  vd_checkpoint_put_rows(c, path, first, n, buffer, err);
}

static void gather_memory(const vd_snapshot *s, vd_checkpoint *c, int layer, vd_error *err) {
  int64_t rows = vd_model_memory_rows(s->model, layer), d_model = vd_model_config_of(s->model)->d_model;
  vd_same_on_all(s->ctx->comm, rows, "rows of memory");
  if (s->ctx->rank == 0 && err->status == VD_OK) {
    char path[64], long_name[96];
    snprintf(path, sizeof path, "/memory/layer%d", layer);
    snprintf(long_name, sizeof long_name, "previous inputs of layer %d, oldest position first", layer);
    vd_dataset d = {.path = path,
                    .dtype = dtype,
                    .rank = 3,
                    .shape = {(hsize_t)s->n_stream, (hsize_t)rows, (hsize_t)d_model},
                    .dimension = {"stream", "position", "feature"},
                    .units = "1",
                    .long_name = long_name};
    vd_checkpoint_create(c, &d, err);
  }
  if (rows == 0) { /* without a memory there is nothing to gather, but the streams are there */
    char path[64];
    const real nothing = 0;
    snprintf(path, sizeof path, "/memory/layer%d", layer);
    if (s->ctx->rank == 0 && err->status == VD_OK) vd_checkpoint_put_rows(c, path, 0, s->n_stream, &nothing, err);
    return;
  }
  int64_t step = piece_streams(s, rows);
  real *buffer = vd_calloc((size_t)(step * rows * d_model), sizeof *buffer);
  for (int owner = 0; owner < s->ctx->size; owner++) {
    int64_t first, last;
    vd_stream_share(s->n_stream, owner, s->ctx->size, &first, &last);
    for (int64_t i = first; i < last; i += step)
      gather_piece(s, c, layer, owner, i, i + step < last ? step : last - i, rows, buffer, err);
  }
  free(buffer);
}

int vd_snapshot_write(const vd_snapshot *s, const char *path, const vd_progress *progress, const char *echo,
                      const char *corpus_id, vd_error *err) {
  vd_checkpoint *c = NULL;
  if (s->ctx->rank == 0) {
    if (vd_checkpoint_begin(&c, s->ctx->h5, path, err) == VD_OK && put_progress(c, progress, echo, corpus_id, err) == 0)
      put_arenas(s, c, err);
  }
  for (int l = 0; l < (int)vd_model_config_of(s->model)->n_layer; l++) gather_memory(s, c, l, err);
  if (s->ctx->rank == 0) {
    if (err->status == VD_OK)
      vd_checkpoint_commit(&c, err);
    else if (c)
      vd_checkpoint_abandon(&c);
    vd_wrap(err, "the checkpoint was not written");
  }
  return vd_share_error(s->ctx->comm, err);
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
    vd_checkpoint_get(c, path, dtype, p->rank, shape, host + p->at.offset, err);
  }
  if (vd_share_error(ctx->comm, err) == VD_OK) {
    vd_broadcast_reals(ctx->comm, 0, host, n);
    ops->put(ops, arena, host, n);
  }
  free(host);
  return err->status;
}

static void get_progress(vd_checkpoint *c, vd_progress *p, vd_error *err) {
  int64_t position[N_POSITION];
  double statistic[N_STATISTIC];
  const hsize_t n_position = N_POSITION, n_statistic = N_STATISTIC;
  if (vd_checkpoint_get(c, "/position", VD_I64, 1, &n_position, position, err)) return;
  if (vd_checkpoint_get(c, "/statistics", VD_F64, 1, &n_statistic, statistic, err)) return;
  *p = (vd_progress){.update = position[0],
                     .epoch = position[1],
                     .block = position[2],
                     .valid_update = (int64_t)statistic[VALID_UPDATE],
                     .best_update = (int64_t)statistic[BEST_UPDATE],
                     .best_bpc = statistic[BEST_BPC],
                     .log = {statistic[LOG_NLL], statistic[LOG_TARGETS], statistic[LOG_SECONDS]},
                     .trace = {statistic[TRACE_NLL], statistic[TRACE_TARGETS], statistic[TRACE_SECONDS]}};
}

/* The rank's own rows of one layer's memory. */
static int get_memory(const vd_snapshot *s, vd_checkpoint *c, int layer, vd_error *err) {
  char path[64];
  int rank;
  hsize_t shape[4];
  snprintf(path, sizeof path, "/memory/layer%d", layer);
  if (vd_checkpoint_shape(c, path, &rank, shape, err)) return err->status;
  int64_t d_model = vd_model_config_of(s->model)->d_model;
  if (rank != 3 || (int64_t)shape[0] != s->n_stream || (int64_t)shape[2] != d_model)
    return vd_fail(err, VD_FAILED, "%s is not of %lld streams and %lld features", path, (long long)s->n_stream,
                   (long long)d_model);
  int64_t rows = (int64_t)shape[1], first, last;
  vd_stream_share(s->n_stream, s->ctx->rank, s->ctx->size, &first, &last);
  if (rows == 0) return vd_model_memory_put(s->model, layer, 0, 0, last - first, NULL, err);
  int64_t step = piece_streams(s, rows);
  real *buffer = vd_calloc((size_t)(step * rows * d_model), sizeof *buffer);
  for (int64_t i = first; i < last && err->status == VD_OK; i += step) {
    int64_t n = i + step < last ? step : last - i;
    if (vd_checkpoint_get_rows(c, path, dtype, i, n, buffer, err) == VD_OK)
      vd_model_memory_put(s->model, layer, rows, i - first, n, buffer, err);
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
  for (int l = 0; l < (int)vd_model_config_of(s->model)->n_layer && err->status == VD_OK; l++) get_memory(s, c, l, err);
  return vd_agree(ctx->comm, err);
}

int vd_snapshot_read(const vd_snapshot *s, const char *path, vd_progress *progress, vd_error *err) {
  vd_checkpoint *c = NULL;
  if (vd_checkpoint_open(&c, s->ctx->h5, path, false, err) == VD_OK) get_progress(c, progress, err);
  if (vd_agree(s->ctx->comm, err) == VD_OK) read_tensors(s, c, err);
  if (c) vd_checkpoint_close(&c);
  return err->status ? vd_wrap(err, "%s", path) : VD_OK;
}

int vd_snapshot_read_parameters(vd_context *ctx, vd_ops *ops, vd_model *model, const char *path, vd_error *err) {
  vd_checkpoint *c = NULL;
  if (ctx->rank == 0) vd_checkpoint_open(&c, ctx->h5, path, false, err);
  if (vd_share_error(ctx->comm, err) == VD_OK &&
      get_arena(ctx, ops, model, c, "/model", vd_model_params(model), err) == VD_OK)
    vd_model_params_changed(model);
  if (c) vd_checkpoint_close(&c);
  return err->status;
}

static void read_description(vd_context *ctx, const char *path, vd_settings *settings, char corpus_id[64],
                             int64_t *update, vd_error *err) {
  vd_checkpoint *c = NULL;
  char *echo = NULL, *id = NULL;
  if (vd_checkpoint_open(&c, ctx->h5, path, false, err)) return;
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
  if (vd_share_error(ctx->comm, err)) return err->status;
  MPI_Bcast(settings, (int)sizeof *settings, MPI_BYTE, 0, ctx->comm);
  MPI_Bcast(corpus_id, 64, MPI_CHAR, 0, ctx->comm);
  MPI_Bcast(update, 1, MPI_INT64_T, 0, ctx->comm);
  return VD_OK;
}
