/* What every command gets: the communicator, the terminal, and the lock of the HDF5 library. */
#ifndef VD_CONTEXT_H
#define VD_CONTEXT_H

#include "io/h5.h"
#include "src/base/error.h"
#include "src/deck/settings.h"

#include <mpi.h>
#include <stdbool.h>

typedef struct vd_context {
  MPI_Comm comm; /* all ranks of the run; not MPI_COMM_WORLD itself but a duplicate */
  int rank, size;
  vd_h5 *h5;       /* lock of the HDF5 library, shared with reader threads */
  bool check_only; /* --check: write nothing */
} vd_context;

/* The commands. Each returns VD_OK, VD_USAGE, VD_FAILED or VD_STOPPED, the same on all ranks, with *err filled (and
 * agreed, see vd_agree) unless VD_OK; main prints it once. VD_STOPPED carries no message. */

/* Collective(ctx->comm). Makes a corpus of the source that the deck names. */
int vd_cmd_prepare(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). Trains a model, or goes on with one; with ctx->check_only says what would be done. */
int vd_cmd_train(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). Evaluates a split with a checkpoint. */
int vd_cmd_eval(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). Continues a prompt with a checkpoint. */
int vd_cmd_generate(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Not collective. Verifies one file as far as its kind allows and describes it on standard output; VD_FAILED naming it
 * when it is damaged or foreign. */
int vd_cmd_info(vd_context *ctx, const char *path, vd_error *err);

#endif
