/* The main header of src/commands/: one function for each command of the program.
 *
 * Each command lives in its cmd_ file and a few helpers: `prepare` in prepare_* (the passes over the sources),
 * source (unpacking) and vocabulary (words of tokenised text); `info` in info_*. command_line parses argv. main.c calls
 * the parser, reads the deck on rank 0, broadcasts it, and calls one function below.
 * In: the context (communicator, HDF5 lock) and the checked settings, or the path of a file or folder for `info`.
 * Out: files in the places that the deck names, results on standard output, notes on standard error, and one error
 * for main to print.
 * A command checks its inputs and its output paths before it writes anything, and no output may be one of its inputs.
 *
 * Each function returns VD_OK, VD_USAGE, VD_FAILED, VD_STOPPED or 128 + a signal's number, the same on all ranks. *err
 * is filled and agreed on (vd_agree) unless the status is VD_OK; VD_STOPPED carries no message. */
#ifndef VD_COMMANDS_H
#define VD_COMMANDS_H

#include "src/comm/context.h"
#include "src/deck/settings.h"

/* Collective(ctx->comm). `viaduct prepare`: writes the corpus data%path and its shards from the sources of &prepare.
 * With ctx->check_only it reads the sources and writes nothing. VD_USAGE: the corpus exists and holds something else,
 * or an output is an input. */
int vd_cmd_prepare(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). `viaduct train`: trains a model in run%directory, or resumes the run there. With
 * ctx->check_only it prints what the run would do and writes nothing. VD_STOPPED: a signal ended it after a checkpoint.
 */
int vd_cmd_train(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). `viaduct eval`: prints the bits per symbol of a split with a checkpoint, and writes
 * eval%nll_file where one is named. */
int vd_cmd_eval(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). `viaduct generate`: samples of text that continue a prompt, shared out over the
 * ranks; rank 0 writes them to generate%output or standard output. */
int vd_cmd_generate(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). `viaduct compress`: packs compress%input into compress%output with the predictions of a model.
 */
int vd_cmd_compress(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Collective(ctx->comm). `viaduct decompress`: the reverse. VD_USAGE: the checkpoint is not the one that the file was
 * packed with. VD_FAILED: the file is damaged, another build or BLAS packed it, or what comes out has another SHA-256;
 * then there is no output. */
int vd_cmd_decompress(vd_context *ctx, const vd_settings *s, vd_error *err);
/* Not collective. `viaduct info`: verifies the file at `path`, or the folder of a run, as far as its kind allows and
 * describes it on standard output. VD_FAILED with the path when it is damaged or not one of Viaduct's. */
int vd_cmd_info(vd_context *ctx, const char *path, vd_error *err);

#endif
