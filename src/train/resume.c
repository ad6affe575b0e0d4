#include "src/train/resume.h"

#include "src/train/configure.h"

#include "io/checkpoint.h"
#include "src/comm/collectives.h"
#include "src/deck/settings_table.h"
#include "src/train/snapshot.h"

#include <dirent.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a resumed run may not change: shapes, the loss function, the order of the data, random numbers, the optimizer's
 * state. */
static const char *const fixed[] = {"run%seed",      "data%tokens_per_sample", "data%batch_streams", "model%arch",
                                    "model%n_layer", "model%d_model",          "model%n_head",       "model%d_head",
                                    "model%d_inner", "span%attn_span",         "span%ramp",          "span%per_layer",
                                    "span%softmax",  "optimizer%method",       "model%untie_r"};
/* Groups and variables that do not change what is learnt, or that act at the start only: no notice is given. */
static const char *const ignored[] = {
    "run%",      "device%",  "valid%",    "checkpoint%",        "trace%",          "eval%",
    "generate%", "prepare%", "data%path", "data%micro_streams", "data%read_ahead", "model%init",
    "span%init"};

enum kind { FIXED, IGNORED, NOTICE };

static enum kind kind_of(const char *name) {
  for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++)
    if (strcmp(name, fixed[i]) == 0) return FIXED;
  for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
    if (strncmp(name, ignored[i], strlen(ignored[i])) == 0) return IGNORED;
  return NOTICE;
}

static void add_notice(vd_resume *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void add_notice(vd_resume *r, const char *format, ...) {
  size_t used = strlen(r->notice);
  va_list args;
  va_start(args, format);
  vsnprintf(r->notice + used, sizeof r->notice - used, format, args);
  va_end(args);
}

static int compare(const vd_settings *deck, const vd_settings *saved, vd_resume *r, vd_error *err) {
  vd_settings a = *saved, b = *deck;
  if (a.model.d_head == 0) a.model.d_head = a.model.d_model / a.model.n_head;
  /* Old checkpoints name the default that the method now has of its own. */
  a.optimizer.eps = vd_configure_eps(&a);
  b.optimizer.eps = vd_configure_eps(&b);
  bool cosine = b.optimizer.schedule == VD_COSINE;
  if (b.model.d_head == 0) b.model.d_head = b.model.d_model / b.model.n_head;
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    char was[2 * VD_PATH + 3], is[2 * VD_PATH + 3], name[128];
    vd_variable_value(v, &a, was, sizeof was);
    vd_variable_value(v, &b, is, sizeof is);
    if (strcmp(was, is) == 0) continue;
    snprintf(name, sizeof name, "%s%%%s", v->group, v->name);
    enum kind kind = kind_of(name);
    if (cosine && strcmp(name, "run%max_updates") == 0) kind = NOTICE; /* the cosine ends there */
    if (kind == FIXED)
      return vd_fail(err, VD_USAGE,
                     "%s = %.200s, but the checkpoint %s was made with %.200s: a resumed run cannot change it "
                     "(another run%%directory starts a new run)",
                     name, is, r->path, was);
    if (kind == NOTICE) add_notice(r, "resumes with %s = %.200s (was %.200s)\n", name, is, was);
  }
  return VD_OK;
}

int64_t vd_resume_newest(const char *directory) {
  char path[VD_PATH + 32];
  snprintf(path, sizeof path, "%s/checkpoints", directory);
  DIR *folder = opendir(path);
  if (!folder) return -1;
  int64_t newest = -1;
  for (struct dirent *e = readdir(folder); e; e = readdir(folder)) {
    long long update;
    int end = 0;
    if (sscanf(e->d_name, "update-%lld.h5%n", &update, &end) == 1 && end > 0 && !e->d_name[end] && update > newest)
      newest = update;
  }
  closedir(folder);
  return newest;
}

/* run%resume: one of two words, or the path of a checkpoint. */
enum start { START_AUTO, START_NEVER, START_FROM_PATH };

static enum start start_of(const vd_settings *s) {
  if (strcmp(s->run.resume, "auto") == 0) return START_AUTO;
  return strcmp(s->run.resume, "never") == 0 ? START_NEVER : START_FROM_PATH;
}

/* On rank 0: which checkpoint? */
static int choose(vd_context *ctx, const vd_settings *s, vd_resume *r, vd_error *err) {
  const char *directory = s->run.directory;
  enum start start = start_of(s);
  if (start == START_NEVER) {
    int64_t newest = vd_resume_newest(directory);
    if (newest < 0) return VD_OK;
    return vd_fail(err, VD_USAGE,
                   "run%%resume = 'never', but %s/checkpoints holds a checkpoint of update %lld: choose another "
                   "run%%directory, or run%%resume = 'auto' to resume",
                   directory, (long long)newest);
  }
  if (start == START_AUTO && vd_checkpoint_check_names(directory, err)) return err->status;
  if (start == START_AUTO)
    return vd_checkpoint_newest(ctx->h5, directory, r->path, sizeof r->path, r->notice, sizeof r->notice / 2, err);
  snprintf(r->path, sizeof r->path, "%s", s->run.resume);
  return VD_OK;
}

int vd_resume_find(vd_context *ctx, const vd_settings *s, const char *corpus_id, vd_resume *r, vd_error *err) {
  memset(r, 0, sizeof *r);
  r->newest = ctx->rank == 0 ? vd_resume_newest(s->run.directory) : -1;
  if (ctx->rank == 0) choose(ctx, s, r, err);
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  MPI_Bcast(r->path, (int)sizeof r->path, MPI_CHAR, 0, ctx->comm);
  if (!r->path[0]) return VD_OK;
  vd_settings saved;
  char id[64] = "";
  /* The newest of the folder was verified when it was found. */
  if (vd_snapshot_describe(ctx, r->path, start_of(s) == START_FROM_PATH, &saved, id, &r->update, err))
    return err->status;
  size_t length = strlen(r->notice);
  if (length > 0 && r->notice[length - 1] != '\n') add_notice(r, "\n");
  if (compare(s, &saved, r, err)) return err->status;
  if (strcmp(id, corpus_id) != 0)
    return vd_fail(err, VD_USAGE, "data%%path = '%s' holds other tokens (%s) than the checkpoint %s was made with (%s)",
                   s->data.path, corpus_id, r->path, id);
  bool named = start_of(s) == START_FROM_PATH;
  int64_t newest = ctx->rank == 0 && named ? vd_resume_newest(s->run.directory) : -1;
  MPI_Bcast(&newest, 1, MPI_INT64_T, 0, ctx->comm);
  if (newest > r->update)
    return vd_fail(
        err, VD_USAGE,
        "run%%resume names a checkpoint of update %lld, but %s holds a newer one, of update %lld, that would "
        "be overwritten: choose another run%%directory, or run%%resume = 'auto'",
        (long long)r->update, s->run.directory, (long long)newest);
  return VD_OK;
}
