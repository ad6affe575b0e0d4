/* A run into a checkpoint. The loop's thread copies it, piece by piece; the pieces are written by the writer's. */
#include "io/checkpoint.h"
#include "io/streams.h"
#include "src/comm/collectives.h"
#include "src/train/snapshot_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A tensor as a dataset PREFIX/NAME, its dimensions named by what they count. */
static vd_dataset describe(const vd_param *p, const char *path, const char *long_name) {
  vd_dataset d = {.path = path, .dtype = vd_snapshot_dtype, .rank = p->rank, .units = "1", .long_name = long_name};
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

static int put_numbers(vd_checkpoint *c, const vd_snapshot_group *g, const vd_snapshot_numbers *numbers,
                       vd_error *err) {
  for (int i = 0; i < g->n && err->status == VD_OK; i++) {
    const vd_snapshot_number *number = &g->number[i];
    char path[128];
    snprintf(path, sizeof path, "%s/%s", g->path, number->name);
    vd_dataset d = {.path = path, .dtype = number->dtype, .units = number->units, .long_name = number->long_name};
    vd_checkpoint_put(c, &d, (const char *)numbers + number->offset, err);
  }
  return err->status;
}

static int put_progress(vd_checkpoint *c, const vd_snapshot *s, const vd_progress *p, vd_error *err) {
  vd_snapshot_numbers numbers = {.progress = *p, .epoch = 1 + p->update / s->n_block, .block = p->update % s->n_block};
  if (p->best_update == 0) numbers.progress.best_bpc = NAN;
  numbers.is_scaled = vd_optimizer_scaling(s->optimizer, &numbers.scaling);
  for (int i = 0; i < VD_N_GROUP; i++)
    if ((i != VD_GROUP_LOSS_SCALE || numbers.is_scaled) && put_numbers(c, &vd_snapshot_groups[i], &numbers, err)) break;
  if (err->status == VD_OK) vd_checkpoint_put_text(c, "corpus_id", vd_corpus_id(s->corpus), err);
  if (err->status == VD_OK) vd_checkpoint_put_vocabulary(c, vd_corpus_vocabulary(s->corpus), err);
  if (err->status == VD_OK) vd_checkpoint_put_i64(c, "update", p->update, err);
  if (err->status == VD_OK && p->best_update > 0) vd_checkpoint_put_f64(c, "best_valid_bpc", p->best_bpc, err);
  return err->status;
}

/* A piece of the run on its way to the file. The last one ends the checkpoint, which all of them share. */
struct piece {
  vd_checkpoint *c;
  vd_task_queue *writer; /* keeps the buffer; NULL: it is the piece's own, on ranks that do not write */
  const vd_model *model; /* for the names and shapes of its tensors */
  char group[128], what[64];
  int layer;
  int64_t n_stream, first, n, rows;
  real *data;
};

static struct piece *piece_of(const vd_snapshot *s, vd_checkpoint *c, size_t elements) {
  struct piece *p = vd_calloc(1, sizeof *p);
  *p = (struct piece){.c = c, .writer = s->writer, .model = s->model, .n_stream = s->n_stream};
  size_t bytes = elements * sizeof *p->data;
  if (elements > 0) p->data = s->writer ? vd_task_queue_buffer(s->writer, bytes) : vd_calloc(1, bytes);
  return p;
}

static void free_piece(struct piece *p) {
  if (p->writer)
    vd_task_queue_recycle(p->writer, p->data);
  else
    free(p->data);
  free(p);
}

/* One arena (parameters or a state) under p->group. */
static void write_arena(void *piece, vd_error *err) {
  struct piece *p = piece;
  for (int i = 0; i < vd_model_n_param(p->model) && err->status == VD_OK; i++) {
    const vd_param *tensor = vd_model_param(p->model, i);
    char path[256], long_name[256];
    snprintf(path, sizeof path, "%s/%s", p->group, tensor->name);
    snprintf(long_name, sizeof long_name, "%s of %s", p->what, tensor->name);
    vd_dataset d = describe(tensor, path, long_name);
    vd_checkpoint_put(p->c, &d, p->data + tensor->at.offset, err);
  }
  free_piece(p);
}

/* The dataset that a layer's memory goes to. */
static void create_memory(void *piece, vd_error *err) {
  struct piece *p = piece;
  char path[64], long_name[96];
  snprintf(path, sizeof path, "/memory/layer%d", p->layer);
  snprintf(long_name, sizeof long_name, "previous inputs of layer %d, oldest position first", p->layer);
  vd_dataset d = {.path = path,
                  .dtype = vd_snapshot_dtype,
                  .rank = 3,
                  .shape = {(hsize_t)p->n_stream, (hsize_t)p->rows, (hsize_t)vd_model_config_of(p->model)->d_model},
                  .dimension = {"stream", "position", "feature"},
                  .units = "1",
                  .long_name = long_name};
  const real nothing = 0;
  if (err->status == VD_OK) vd_checkpoint_create(p->c, &d, err);
  /* without a memory there is nothing to write, but the streams are there */
  if (err->status == VD_OK && p->rows == 0) vd_checkpoint_put_rows(p->c, path, 0, p->n_stream, &nothing, err);
  free_piece(p);
}

static void write_memory(void *piece, vd_error *err) {
  struct piece *p = piece;
  char path[64];
  snprintf(path, sizeof path, "/memory/layer%d", p->layer);
  if (err->status == VD_OK) vd_checkpoint_put_rows(p->c, path, p->first, p->n, p->data, err);
  free_piece(p);
}

static void end_checkpoint(void *piece, vd_error *err) {
  struct piece *p = piece;
  if (err->status == VD_OK)
    vd_checkpoint_commit(&p->c, err);
  else
    vd_checkpoint_abandon(&p->c);
  vd_wrap(err, "the checkpoint was not written");
  free_piece(p);
}

/* On rank 0. */
static void send_arena(const vd_snapshot *s, vd_checkpoint *c, const char *group, const char *what, const real *arena) {
  size_t n = vd_model_arena(s->model);
  struct piece *p = piece_of(s, c, n);
  snprintf(p->group, sizeof p->group, "%s", group);
  snprintf(p->what, sizeof p->what, "%s", what);
  s->ops->get(s->ops, p->data, arena, n);
  vd_task_queue_add(s->writer, write_arena, p, n * sizeof *p->data);
}

static void send_arenas(const vd_snapshot *s, vd_checkpoint *c) {
  send_arena(s, c, "/model", "parameter", vd_model_params(s->model));
  for (int i = 0; i < vd_optimizer_n_state(s->optimizer); i++) {
    const char *name = vd_optimizer_state_name(s->optimizer, i);
    char group[128];
    snprintf(group, sizeof group, "/optimizer/%s", name);
    send_arena(s, c, group, name, vd_optimizer_state(s->optimizer, i));
  }
}

/* On rank 0. The others may wait for rank 0's disk, which nothing limits; no disk delays what they send. */
static void receive_rows(const vd_snapshot *s, struct piece *p, int owner, int layer, int count) {
  if (s->reducer) vd_grad_reducer_arm_watchdog(s->reducer, "another rank's memory rows for the checkpoint");
  MPI_Recv(p->data, count, VD_MPI_REAL, owner, layer, s->ctx->comm, MPI_STATUS_IGNORE);
  if (s->reducer) vd_grad_reducer_disarm_watchdog(s->reducer);
}

/* Memories of the streams [first, first + n) of rank `owner` on their way to rank 0 and into the file. */
static void send_memory(const vd_snapshot *s, vd_checkpoint *c, int layer, int owner, int64_t first, int64_t n,
                        int64_t rows) {
  const vd_context *ctx = s->ctx;
  int64_t own0, own1;
  if (ctx->rank != 0 && ctx->rank != owner) return;
  vd_stream_share(s->n_stream, owner, ctx->size, &own0, &own1);
  size_t count = (size_t)(n * rows * vd_model_config_of(s->model)->d_model);
  struct piece *p = piece_of(s, c, count);
  p->layer = layer;
  p->first = first;
  p->n = n;
  if (ctx->rank == owner) vd_model_memory_get(s->model, layer, first - own0, n, p->data);
  if (owner != 0 && ctx->rank == owner) MPI_Send(p->data, (int)count, VD_MPI_REAL, 0, layer, ctx->comm);
  if (owner != 0 && ctx->rank == 0) receive_rows(s, p, owner, layer, (int)count);
  if (ctx->rank == 0)
    vd_task_queue_add(s->writer, write_memory, p, count * sizeof *p->data);
  else
    free_piece(p);
}

static void send_memories(const vd_snapshot *s, vd_checkpoint *c, int layer) {
  int64_t rows = vd_model_memory_rows(s->model, layer), step = vd_snapshot_piece(s, rows);
  vd_same_on_all(s->ctx->comm, rows, "rows of memory");
  if (s->ctx->rank == 0) {
    struct piece *p = piece_of(s, c, 0);
    p->layer = layer;
    p->rows = rows;
    vd_task_queue_add(s->writer, create_memory, p, 0);
  }
  for (int owner = 0; owner < s->ctx->size && rows > 0; owner++) {
    int64_t first, last;
    vd_stream_share(s->n_stream, owner, s->ctx->size, &first, &last);
    for (int64_t i = first; i < last; i += step)
      send_memory(s, c, layer, owner, i, i + step < last ? step : last - i, rows);
  }
}

int vd_snapshot_write(const vd_snapshot *s, const char *path, const vd_progress *progress, vd_error *err) {
  vd_checkpoint *c = NULL;
  if (s->ctx->rank == 0 && vd_checkpoint_begin(&c, s->ctx->h5, path, s->origin, err) == VD_OK) {
    if (s->compress) vd_checkpoint_compress(c);
    if (put_progress(c, s, progress, err) != VD_OK) vd_checkpoint_abandon(&c);
  }
  vd_wrap(err, "the checkpoint was not written");
  if (vd_broadcast_error(s->ctx->comm, err)) return err->status;
  if (s->ctx->rank == 0) send_arenas(s, c);
  for (int l = 0; l < (int)vd_model_config_of(s->model)->n_layer; l++) send_memories(s, c, l);
  if (s->ctx->rank == 0) vd_task_queue_add(s->writer, end_checkpoint, piece_of(s, c, 0), 0);
  return VD_OK;
}
