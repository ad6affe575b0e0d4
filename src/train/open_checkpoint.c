#include "src/train/open_checkpoint.h"

#include "src/comm/collectives.h"
#include "src/deck/settings_table.h"
#include "src/train/snapshot.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int choose(const vd_settings *s, const char *named, vd_open_checkpoint *r, vd_error *err) {
  if (named[0]) {
    snprintf(r->path, sizeof r->path, "%s", named);
    return VD_OK;
  }
  static const char *const links[] = {"best.h5", "last.h5"};
  for (int i = 0; i < 2; i++) {
    snprintf(r->path, sizeof r->path, "%s/checkpoints/%s", s->run.directory, links[i]);
    if (access(r->path, F_OK) == 0) return VD_OK;
  }
  return vd_fail(err, VD_FAILED, "there is no checkpoint: neither best.h5 nor last.h5 in %s/checkpoints",
                 s->run.directory);
}

/* Puts the name of the file in the place of a link to a file of the same folder, as last.h5 and best.h5 are: a run that
 * continues may point the link elsewhere while the checkpoint is read part by part. */
static void follow_link(char path[VD_PATH + 64]) {
  char target[256];
  char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
  ssize_t n = readlink(path, target, sizeof target);
  size_t space = VD_PATH + 64 - (size_t)(name - path);
  if (n > 0 && (size_t)n < sizeof target && (size_t)n < space && !memchr(target, '/', (size_t)n))
    snprintf(name, space, "%.*s", (int)n, target);
}

int vd_open_checkpoint_find(vd_context *ctx, const vd_settings *s, const char *named, vd_open_checkpoint *r,
                            vd_error *err) {
  memset(r, 0, sizeof *r);
  if (ctx->rank == 0 && choose(s, named, r, err) == VD_OK) follow_link(r->path);
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  MPI_Bcast(r->path, (int)sizeof r->path, MPI_CHAR, 0, ctx->comm);
  return vd_snapshot_describe(ctx, r->path, true, &r->settings, r->corpus_id, &r->update, err);
}

enum part { ELSEWHERE, TRAINING, MEMORY, SHAPE };

/* What a variable sets: nothing of the model, its training alone, its memory, or its shape. */
static enum part part_of(const vd_variable *v) {
  static const char *const training[] = {"dropout", "emb_dropout", "dropatt", "init", "aux_loss_scaler"};
  if (strcmp(v->group, "memory") == 0) return MEMORY;
  if (strcmp(v->group, "model") != 0 && strcmp(v->group, "span") != 0) return ELSEWHERE;
  for (size_t i = 0; i < sizeof training / sizeof *training; i++)
    if (strcmp(v->name, training[i]) == 0) return TRAINING;
  return SHAPE;
}

static int refuse(const vd_settings *s, size_t i, const char *is, const char *was, const vd_open_checkpoint *r,
                  vd_error *err) {
  const vd_variable *v = &vd_variables[i];
  char place[VD_PLACE];
  vd_settings_place(s, v, place);
  return vd_fail(err, VD_USAGE,
                 "%s: %s%%%s = %.100s, but the model of %s was trained with %.100s: it cannot be changed now", place,
                 v->group, v->name, is, r->path, was);
}

int vd_open_checkpoint_shape(const vd_settings *s, const vd_open_checkpoint *r, vd_error *err) {
  static const char *const shape[] = {"model%arch",    "model%n_layer",  "model%d_model",
                                      "model%n_head",  "model%d_head",   "model%d_inner",
                                      "model%untie_r", "span%attn_span", "span%per_layer"};
  vd_settings a = *s, b = r->settings;
  if (a.model.d_head == 0) a.model.d_head = a.model.d_model / a.model.n_head;
  if (b.model.d_head == 0) b.model.d_head = b.model.d_model / b.model.n_head;
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    char name[128], is[2 * VD_PATH + 3], was[2 * VD_PATH + 3];
    snprintf(name, sizeof name, "%s%%%s", v->group, v->name);
    bool matters = false;
    for (size_t k = 0; k < sizeof shape / sizeof *shape; k++) matters = matters || strcmp(name, shape[k]) == 0;
    if (!matters) continue;
    vd_variable_value(v, &a, is, sizeof is);
    vd_variable_value(v, &b, was, sizeof was);
    if (strcmp(is, was) != 0)
      return vd_fail(err, VD_USAGE, "%s = %.100s, but the model of %s has %.100s: its parameters do not fit", name, is,
                     r->path, was);
  }
  return VD_OK;
}

int vd_open_checkpoint_override(const vd_settings *s, vd_open_checkpoint *r, vd_error *err) {
  vd_settings own = *s;
  if (own.model.d_head == 0) own.model.d_head = own.model.d_model / own.model.n_head;
  if (r->settings.model.d_head == 0) r->settings.model.d_head = r->settings.model.d_model / r->settings.model.n_head;
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    enum part part = part_of(v);
    char is[2 * VD_PATH + 3], was[2 * VD_PATH + 3];
    if (part == ELSEWHERE || part == TRAINING || s->source[i].line == 0) continue;
    vd_variable_value(v, &own, is, sizeof is);
    vd_variable_value(v, &r->settings, was, sizeof was);
    if (strcmp(is, was) == 0) continue;
    if (part == SHAPE || r->settings.model.arch != VD_TRANSFORMER_XL) return refuse(s, i, is, was, r, err);
    memcpy((char *)&r->settings + v->offset, (const char *)s + v->offset, v->size);
    size_t used = strlen(r->notice);
    snprintf(r->notice + used, sizeof r->notice - used, "works with %s%%%s = %.40s (trained with %.40s)\n", v->group,
             v->name, is, was);
  }
  if (r->settings.memory.same_length && r->settings.memory.mem_len == 0)
    return vd_fail(err, VD_USAGE, "memory%%same_length with memory%%mem_len = 0 lets no token see anything");
  return VD_OK;
}

int vd_open_checkpoint_config(const vd_open_checkpoint *r, const vd_corpus *corpus, vd_model_config *config,
                              vd_error *err) {
  return vd_configure_model(config, &r->settings, vd_corpus_vocab(corpus), err);
}
