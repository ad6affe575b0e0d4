/* viaduct: parses the command line, starts MPI, reads the deck for all ranks, runs one command, prints its error once.
 */
#include "src/base/signals.h"
#include "src/base/version.h"
#include "src/comm/collectives.h"
#include "src/commands/command_line.h"
#include "src/commands/commands.h"
#include "src/commands/manual.h"
#include "src/cpu/openblas_kernel.h"

#include <stdlib.h>
#include <string.h>

/* Rank 0 alone reads the deck, so that a thousand ranks do not open the same file, and broadcasts it. */
static int read_settings(const vd_context *ctx, const vd_command_line *line, vd_settings *s, vd_error *err) {
  memset(s, 0, sizeof *s);
  if (ctx->rank == 0) vd_settings_read(s, line->arguments[0], line->set, line->n_set, line->name, err);
  if (vd_broadcast_error(ctx->comm, err)) return err->status;
  MPI_Bcast(s, (int)sizeof *s, MPI_BYTE, 0, ctx->comm);
  return VD_OK;
}

/* `viaduct info`: of several files each has its own error, and the worst status is that of the command. */
static int run_info(vd_context *ctx, const vd_command_line *line, vd_error *err) {
  int worst = VD_OK, n_bad = 0;
  if (line->n_argument == 1) return vd_cmd_info(ctx, line->arguments[0], err);
  for (int i = 0; i < line->n_argument; i++) {
    vd_error own = {0};
    int status = vd_cmd_info(ctx, line->arguments[i], &own);
    fflush(stdout); /* so that the error follows what it is about */
    vd_error_print(&own);
    if (i + 1 < line->n_argument) printf("\n");
    n_bad += status != VD_OK;
    if (status > worst) worst = status;
  }
  return n_bad ? vd_fail(err, worst, "%d of %d files cannot be described", n_bad, line->n_argument) : VD_OK;
}

/* The commands that need neither a deck nor more than one rank. */
static int run_alone(vd_context *ctx, const vd_command_line *line, vd_error *err) {
  if (ctx->rank == 0) {
    switch (line->command) {
    case VD_COMMAND_HELP:
      if (line->man)
        vd_manual(stdout);
      else if (line->completion)
        vd_completion(stdout);
      else
        vd_command_line_help(line, stdout);
      break;
    case VD_COMMAND_VERSION:
      printf("viaduct %s (%s)\n", vd_version(), vd_git_version());
      break;
    case VD_COMMAND_INPUT:
      if (line->markdown)
        vd_settings_markdown(stdout);
      else
        vd_settings_help(line->n_argument > 0 ? line->arguments[0] : NULL, stdout, err);
      break;
    case VD_COMMAND_INFO:
      run_info(ctx, line, err);
      break;
    default:
      vd_bug("command %d wants a deck", (int)line->command);
    }
    if (fflush(stdout) != 0 || ferror(stdout)) vd_fail(err, VD_FAILED, "cannot write to standard output");
  }
  return vd_broadcast_error(ctx->comm, err);
}

static int run(vd_context *ctx, const vd_command_line *line, vd_error *err) {
  if (line->command >= VD_COMMAND_INPUT) {
    vd_signals_default();
    return run_alone(ctx, line, err);
  }
  vd_settings s;
  if (read_settings(ctx, line, &s, err)) {
    if (line->command != VD_COMMAND_TRAIN || err->status <= 128) return err->status;
    *err = (vd_error){0}; /* a signal ended the wait for the deck: nothing is lost */
    return VD_STOPPED;
  }
  switch (line->command) {
  case VD_COMMAND_PREPARE:
    return vd_cmd_prepare(ctx, &s, err);
  case VD_COMMAND_TRAIN:
    return vd_cmd_train(ctx, &s, err);
  case VD_COMMAND_EVAL:
    return vd_cmd_eval(ctx, &s, err);
  case VD_COMMAND_COMPRESS:
    return vd_cmd_compress(ctx, &s, err);
  case VD_COMMAND_DECOMPRESS:
    return vd_cmd_decompress(ctx, &s, err);
  default:
    return vd_cmd_generate(ctx, &s, err);
  }
}

/* Runs before the constructors of the libraries, which take longer than a signal may: OpenBLAS looks at the processor,
 * MPI and HDF5 start. */
__attribute__((section(".preinit_array"), used)) static void (*const before_libraries)(void) = vd_signals_catch;

int main(int argc, char **argv) {
  int level;
  vd_signals_catch();
  vd_cpu_choose_openblas_kernel(argv);
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  vd_context ctx = {0};
  MPI_Comm_dup(MPI_COMM_WORLD, &ctx.comm);
  MPI_Comm_rank(ctx.comm, &ctx.rank);
  MPI_Comm_size(ctx.comm, &ctx.size);
  vd_error err = {0};
  vd_command_line line;
  int status = vd_command_line_parse(&line, argc, argv, &err); /* the same on all ranks */
  if (status == VD_OK && level < MPI_THREAD_FUNNELED)
    status = vd_fail(&err, VD_FAILED, "this MPI library allows no threads beside it (MPI_THREAD_FUNNELED)");
  if (status == VD_OK) status = vd_h5_create(&ctx.h5, &err);
  if (status == VD_OK) {
    ctx.check_only = line.check;
    status = run(&ctx, &line, &err);
  }
  if (ctx.rank == 0) vd_error_print(&err);
  vd_h5_destroy(ctx.h5);
  free(line.set);
  free(line.arguments);
  MPI_Comm_free(&ctx.comm);
  MPI_Finalize();
  return status;
}
