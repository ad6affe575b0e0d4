/* A run out of a checkpoint. */
#include "io/checkpoint.h"
#include "io/streams.h"
#include "src/comm/collectives.h"
#include "src/train/snapshot_internal.h"

#include <math.h>
#include <stddef.h>
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

#define AT(member) offsetof(vd_snapshot_numbers, member)
static const vd_snapshot_number position[] = {
    {"update", VD_I64, AT(progress.update), "1", "updates done"},
    {"epoch", VD_I64, AT(epoch), "1", "epoch of the next update, counted from 1"},
    {"block", VD_I64, AT(block), "1", "block of the epoch that the next update reads, counted from 0"},
};
static const vd_snapshot_number statistics[] = {
    {"best_valid_bpc", VD_F64, AT(progress.best_bpc), "bits",
     "lowest bits per symbol of a validation so far; NaN where there was none"},
    {"best_valid_update", VD_I64, AT(progress.best_update), "1", "updates done at that validation; 0: none"},
    {"last_valid_update", VD_I64, AT(progress.valid_update), "1", "updates done at the last validation; 0: none"},
    {"log_nll", VD_F64, AT(progress.log.nll), "nats", "training loss since the last row of log.jsonl, sum"},
    {"log_targets", VD_F64, AT(progress.log.targets), "tokens", "predicted tokens since the last row of log.jsonl"},
    {"log_seconds", VD_F64, AT(progress.log.seconds), "s", "time of the updates since the last row of log.jsonl"},
    {"trace_nll", VD_F64, AT(progress.trace.nll), "nats", "training loss since the last row of trace.h5, sum"},
    {"trace_targets", VD_F64, AT(progress.trace.targets), "tokens", "predicted tokens since the last row of trace.h5"},
    {"trace_seconds", VD_F64, AT(progress.trace.seconds), "s", "time of the updates since the last row of trace.h5"},
};
static const vd_snapshot_number loss_scale[] = {
    {"scale", VD_F64, AT(scaling.scale), "1", "factor by which the loss is multiplied"},
    {"clean_updates", VD_I64, AT(scaling.clean), "1", "updates without overflow since the factor changed"},
    {"skipped_updates", VD_I64, AT(scaling.skipped), "1", "updates skipped for overflow since the run began"},
};
#define N_OF(array) (int)(sizeof(array) / sizeof *(array))
const vd_snapshot_group vd_snapshot_groups[VD_N_GROUP] = {
    [VD_GROUP_POSITION] = {"/position", VD_I64, N_OF(position), position},
    [VD_GROUP_STATISTICS] = {"/statistics", VD_F64, N_OF(statistics), statistics},
    [VD_GROUP_LOSS_SCALE] = {"/loss_scale", VD_F64, N_OF(loss_scale), loss_scale},
};

/* A count that files of format versions 1 and 2 hold as a double; -1: it is none. */
static int64_t count_of(double x) {
  return x >= 0 && x <= 9007199254740992.0 && x == floor(x) ? (int64_t)x : -1;
}

/* A group of format versions 1 and 2: one array. */
static int read_array(hid_t file, const vd_snapshot_group *g, vd_snapshot_numbers *numbers, vd_error *err) {
  union {
    int64_t count[16];
    double real[16];
  } value;
  const hsize_t n = (hsize_t)g->n;
  if (vd_h5_read(file, g->path, g->array_dtype, 1, &n, &value, err)) return err->status;
  for (int i = 0; i < g->n; i++) {
    char *to = (char *)numbers + g->number[i].offset;
    if (g->array_dtype == VD_I64)
      *(int64_t *)(void *)to = value.count[i];
    else if (g->number[i].dtype == VD_I64)
      *(int64_t *)(void *)to = count_of(value.real[i]);
    else
      *(double *)(void *)to = value.real[i];
  }
  return VD_OK;
}

static int read_group(hid_t file, const vd_snapshot_group *g, vd_snapshot_numbers *numbers, vd_error *err) {
  H5O_info_t what;
  if (H5Oget_info_by_name(file, g->path, &what, H5P_DEFAULT) < 0)
    return vd_h5_fail(err, "there is no group %s", g->path);
  if (what.type == H5O_TYPE_DATASET) return read_array(file, g, numbers, err);
  for (int i = 0; i < g->n && err->status == VD_OK; i++) {
    char path[128];
    snprintf(path, sizeof path, "%s/%s", g->path, g->number[i].name);
    vd_h5_read(file, path, g->number[i].dtype, 0, NULL, (char *)numbers + g->number[i].offset, err);
  }
  return err->status;
}

/* A run could not have written counts below 0, or times and sums that are not finite. A sum of losses may round to less
 * than 0. */
static int check_group(const vd_snapshot_group *g, const vd_snapshot_numbers *numbers, vd_error *err) {
  for (int i = 0; i < g->n; i++) {
    const vd_snapshot_number *number = &g->number[i];
    const char *at = (const char *)numbers + number->offset;
    double value =
        number->dtype == VD_I64 ? (double)*(const int64_t *)(const void *)at : *(const double *)(const void *)at;
    bool is_loss = strcmp(number->units, "nats") == 0;
    if (!isfinite(value) || (!is_loss && value < 0))
      return vd_fail(err, VD_FAILED, "%s: %s is %g", g->path, number->name, value);
  }
  return VD_OK;
}

static int check_numbers(vd_snapshot_numbers *numbers, vd_error *err) {
  vd_progress *p = &numbers->progress;
  if (p->best_update == 0) p->best_bpc = 0; /* there is none, and the file says NaN, or 0 in format versions 1 and 2 */
  for (int i = 0; i < VD_N_GROUP; i++)
    if ((i != VD_GROUP_LOSS_SCALE || numbers->is_scaled) && check_group(&vd_snapshot_groups[i], numbers, err))
      return err->status;
  if (p->best_update > p->update || p->valid_update > p->update)
    return vd_fail(err, VD_FAILED,
                   "/statistics names validations at updates %lld and %lld in a checkpoint of update %lld",
                   (long long)p->best_update, (long long)p->valid_update, (long long)p->update);
  if (numbers->is_scaled && !(numbers->scaling.scale > 0))
    return vd_fail(err, VD_FAILED, "/loss_scale: scale is %g", numbers->scaling.scale);
  return VD_OK;
}

int vd_snapshot_read_numbers(hid_t file, vd_snapshot_numbers *numbers, vd_error *err) {
  *numbers = (vd_snapshot_numbers){.is_scaled = H5Lexists(file, "/loss_scale", H5P_DEFAULT) > 0};
  for (int i = 0; i < VD_N_GROUP; i++)
    if ((i != VD_GROUP_LOSS_SCALE || numbers->is_scaled) && read_group(file, &vd_snapshot_groups[i], numbers, err))
      return err->status;
  int64_t named;
  if (check_numbers(numbers, err) || vd_h5_get_i64(file, "update", &named, err)) return err->status;
  if (named != numbers->progress.update)
    vd_fail(err, VD_FAILED, "/position says %lld updates, and the attribute `update` %lld",
            (long long)numbers->progress.update, (long long)named);
  return err->status;
}

/* /position is redundant: an update is one block. A file whose counters contradict each other was damaged or made for
 * other data. */
static int check_position(const vd_snapshot_numbers *numbers, int64_t n_block, vd_error *err) {
  int64_t update = numbers->progress.update;
  if (numbers->epoch == 1 + update / n_block && numbers->block == update % n_block) return VD_OK;
  return vd_fail(
      err, VD_FAILED,
      "/position says %lld updates, epoch %lld, block %lld: with %lld blocks in an epoch %lld updates end at "
      "epoch %lld, block %lld",
      (long long)update, (long long)numbers->epoch, (long long)numbers->block, (long long)n_block, (long long)update,
      (long long)(1 + update / n_block), (long long)(update % n_block));
}

/* Where the run stands, and the state of the loss scale, of which files of runs that did not scale their losses say
 * nothing: then the deck's value stays. */
static int get_progress(const vd_snapshot *s, vd_checkpoint *c, vd_progress *p, vd_error *err) {
  vd_snapshot_numbers numbers;
  vd_h5_lock(s->ctx->h5);
  vd_snapshot_read_numbers(vd_checkpoint_file(c), &numbers, err);
  vd_h5_unlock(s->ctx->h5);
  if (err->status || check_position(&numbers, s->n_block, err)) return err->status;
  *p = numbers.progress;
  if (numbers.is_scaled) vd_optimizer_set_scaling(s->optimizer, &numbers.scaling);
  return VD_OK;
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
  if (vd_checkpoint_open(&c, s->ctx->h5, path, false, err) == VD_OK) get_progress(s, c, progress, err);
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

static void read_description(vd_context *ctx, const char *path, bool verify, vd_settings *settings, char corpus_id[64],
                             int64_t *update, vd_error *err) {
  vd_checkpoint *c = NULL;
  char *echo = NULL, *id = NULL;
  if (vd_checkpoint_open(&c, ctx->h5, path, verify, err)) return;
  if (vd_checkpoint_get_text(c, "settings", &echo, err) == VD_OK &&
      vd_checkpoint_get_text(c, "corpus_id", &id, err) == VD_OK &&
      vd_checkpoint_get_i64(c, "update", update, err) == VD_OK) {
    snprintf(corpus_id, 64, "%s", id);
    vd_snapshot_numbers numbers;
    vd_h5_lock(ctx->h5);
    vd_snapshot_read_numbers(vd_checkpoint_file(c), &numbers, err);
    vd_h5_unlock(ctx->h5);
    if (err->status)
      vd_wrap(err, "%s", path);
    else
      vd_settings_read_text(settings, echo, path, err);
  }
  free(echo);
  free(id);
  vd_checkpoint_close(&c);
}

int vd_snapshot_describe(vd_context *ctx, const char *path, bool verify, vd_settings *settings, char corpus_id[64],
                         int64_t *update, vd_error *err) {
  memset(settings, 0, sizeof *settings);
  if (ctx->rank == 0) {
    read_description(ctx, path, verify, settings, corpus_id, update, err);
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

int vd_snapshot_read_vocabulary(vd_context *ctx, const char *path, vd_vocabulary *v, bool *has, vd_error *err) {
  vd_checkpoint *c = NULL;
  int found = 0;
  *v = (vd_vocabulary){0};
  if (ctx->rank == 0 && vd_checkpoint_open(&c, ctx->h5, path, false, err) == VD_OK) {
    found = vd_checkpoint_has(c, "/vocabulary/symbol");
    if (found) vd_checkpoint_get_vocabulary(c, v, err);
    vd_checkpoint_close(&c);
  }
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  MPI_Bcast(&found, 1, MPI_INT, 0, ctx->comm);
  if (found) share_vocabulary(ctx, v);
  *has = found != 0;
  return VD_OK;
}

int vd_snapshot_adopt_vocabulary(vd_context *ctx, const char *path, const char *trained_id, vd_corpus *corpus,
                                 vd_error *err) {
  vd_vocabulary v;
  bool has = false;
  if (vd_snapshot_read_vocabulary(ctx, path, &v, &has, err) == VD_OK) {
    if (has)
      vd_corpus_adopt(corpus, &v, err);
    else if (strcmp(trained_id, vd_corpus_id(corpus)) != 0)
      vd_fail(err, VD_FAILED,
              "%s was written by an earlier version and does not hold its vocabulary: only the corpus that it was "
              "trained on can be used with it (resume the run for one update to have it written anew)",
              path);
  }
  if (vd_agree(ctx->comm, err)) vd_wrap(err, "the vocabulary of %s", path);
  vd_vocabulary_free(&v);
  return err->status;
}
