#include "src/base/signals.h"
#include "src/comm/collectives.h"
#include "src/commands/commands.h"
#include "src/train/train.h"

/* A signal that came before the first update ends the run with nothing to save: VD_STOPPED on all ranks. */
static int stop_early(const vd_context *ctx) {
  double noted = vd_signals_noted();
  vd_all_reduce_doubles(ctx->comm, &noted, 1);
  return noted > 0 ? VD_STOPPED : VD_OK;
}

int vd_cmd_train(vd_context *ctx, const vd_settings *s, vd_error *err) {
  vd_train t;
  int status = vd_train_plan(&t, ctx, s, err);
  if (status == VD_OK && ctx->check_only)
    status = vd_train_dry_run(&t, err);
  else if (status == VD_OK && (status = stop_early(ctx)) == VD_OK && (status = vd_train_open(&t, err)) == VD_OK &&
           (status = stop_early(ctx)) == VD_OK)
    status = vd_train_loop(&t, err);
  vd_train_close(&t, err);
  /* Closing happens on rank 0 only, and may fail too (a full disk). */
  vd_error closing = {.status = VD_OK};
  if (status == VD_OK || status == VD_STOPPED) closing = *err;
  if (vd_agree(ctx->comm, &closing)) {
    *err = closing;
    status = closing.status;
  }
  return status;
}
