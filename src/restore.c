#include "restore.h"

#include "parallel.h"
#include "snapshot.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int choose(const vd_settings *s, const char *named, vd_restore *r, vd_error *err) {
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

int vd_restore_find(vd_context *ctx, const vd_settings *s, const char *named, vd_restore *r, vd_error *err) {
  memset(r, 0, sizeof *r);
  if (ctx->rank == 0) choose(s, named, r, err);
  if (vd_share_error(ctx->comm, err)) return err->status;
  MPI_Bcast(r->path, (int)sizeof r->path, MPI_CHAR, 0, ctx->comm);
  return vd_snapshot_describe(ctx, r->path, &r->settings, r->corpus_id, &r->update, err);
}

int vd_restore_config(const vd_restore *r, const vd_corpus *corpus, vd_model_config *config, vd_error *err) {
  return vd_configure_model(config, &r->settings, vd_corpus_vocab(corpus), err);
}
