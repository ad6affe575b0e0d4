/* `viaduct compress` and `viaduct decompress`: checkpoint, paths, files and reports around src/compress. */
#include "io/atomic_file.h"
#include "src/base/clock.h"
#include "src/base/regular_file.h"
#include "src/base/terminal.h"
#include "src/base/version.h"
#include "src/comm/collectives.h"
#include "src/commands/commands.h"
#include "src/compress/compressor.h"
#include "src/train/log.h"
#include "src/train/open_checkpoint.h"
#include "src/train/run_folder.h"
#include "src/train/snapshot.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LABEL = -11 };

struct compress {
  vd_context *ctx;
  const vd_settings *s;
  bool decompress;
  vd_open_checkpoint from;
  vd_model_config config;
  vd_ops *ops;
  vd_compressor *compressor;
  uint8_t symbol[256]; /* the byte of each id */
  char *bytes;         /* rank 0: [packed.n_byte] the original; on other ranks NULL */
  vd_packed packed;    /* its arrays on rank 0 alone */
  bool live;           /* rank 0: progress is a line that is rewritten */
  double start, shown; /* monotonic seconds: of the first step, of the last line of progress */
};

/* ---- progress, on rank 0 ---- */

static void end_live_line(const struct compress *c) {
  if (c->live && c->shown > c->start) printf("\r%*s\r", vd_terminal_width(stdout) - 1, "");
}

static void show_progress(void *receiver, int64_t done) {
  struct compress *c = receiver;
  char left[24], line[128];
  double now = vd_clock_seconds(), passed = now - c->start;
  if (c->ctx->rank != 0 || done == 0 || now - c->shown < (c->live ? 0.1 : 30)) return;
  c->shown = now;
  vd_log_duration(passed * (double)(c->packed.n_byte - done) / (double)done, left);
  snprintf(line, sizeof line, "%s %.1f%%  %.0f bytes/s  %s left", c->decompress ? "decompress" : "compress",
           100.0 * (double)done / (double)c->packed.n_byte, (double)done / passed, left);
  if (c->live)
    printf("\r%-*.*s", vd_terminal_width(stdout) - 1, vd_terminal_width(stdout) - 1, line);
  else
    puts(line);
  fflush(stdout);
}

/* ---- what is read before any work ---- */

static int check_paths(const struct compress *c, vd_error *err) {
  if (c->ctx->rank == 0) {
    vd_atomic_file file;
    vd_path_list *list = vd_path_list_create();
    vd_run_paths_inputs(list, c->s, NULL);
    vd_run_paths_protect(list, c->s, c->from.path);
    vd_path_list_add(list, VD_PATH_INPUT, "compress%input", c->s->compress.input);
    vd_path_list_add(list, VD_PATH_OUTPUT, "compress%output", c->s->compress.output);
    vd_path_list_check(list, err);
    vd_path_list_destroy(list);
    if (err->status == VD_OK && vd_atomic_begin(&file, c->s->compress.output, err)) vd_wrap(err, "compress%%output");
  }
  return vd_broadcast_error(c->ctx->comm, err);
}

/* The bytes that the model's ids stand for, and their digest in digest. */
static int read_vocabulary(struct compress *c, uint8_t digest[VD_DIGEST_BYTES], vd_error *err) {
  vd_vocabulary v;
  bool has = false, single = true;
  if (vd_snapshot_read_vocabulary(c->ctx, c->from.path, &v, &has, err)) {
    vd_vocabulary_free(&v);
    return err->status;
  }
  for (int64_t i = 0; i < v.n; i++) single = single && v.length[i] == 1;
  if (!has)
    vd_fail(err, VD_FAILED,
            "%s was written by an earlier version and does not hold its vocabulary (resume the run for one update to "
            "have it written anew)",
            c->from.path);
  else if (!single || v.n > 256)
    vd_fail(err, VD_USAGE, "the symbols of %s are words: files are packed with a model of bytes", c->from.path);
  else if (vd_configure_model(&c->config, &c->from.settings, v.n, err) == VD_OK)
    for (int64_t i = 0; i < v.n; i++) c->symbol[i] = v.symbol[i * v.width];
  vd_digest_bytes(c->symbol, (size_t)v.n, digest);
  vd_vocabulary_free(&v);
  return vd_agree(c->ctx->comm, err);
}

/* &memory of *s as a namelist into text. */
static void put_memory(const vd_settings *s, char text[VD_PACKED_MEMORY]) {
  vd_settings *alone = vd_calloc(1, sizeof *alone);
  vd_settings_default(alone); /* no text of the user's is in its echo */
  alone->memory = s->memory;
  char *echo = vd_settings_echo(alone), *start = strstr(echo, "&memory"), *end = strstr(start, "\n/\n");
  snprintf(text, VD_PACKED_MEMORY, "%.*s", (int)(end + 3 - start), start);
  free(echo);
  free(alone);
}

/* The reverse: the memory that the file was packed with takes the place of the deck's. */
static int take_memory(struct compress *c, vd_error *err) {
  vd_settings *alone = vd_calloc(1, sizeof *alone);
  if (vd_settings_read_text(alone, c->packed.memory, c->s->compress.input, err) == VD_OK)
    c->from.settings.memory = alone->memory;
  else
    err->status = VD_FAILED; /* no fault of a deck of the user's */
  free(alone);
  return err->status;
}

/* Many streams make use of ranks and of wide products; a short one has little context on average. */
static void choose_streams(const vd_settings *s, vd_packed *p) {
  enum { SHORTEST = 4096, MOST = 32 };
  int64_t some = p->n_byte / SHORTEST < MOST ? p->n_byte / SHORTEST : MOST;
  p->n_stream = s->compress.streams > 0 ? s->compress.streams : some > 1 ? some : 1;
  if (p->n_stream > p->n_byte) p->n_stream = p->n_byte;
  p->group = s->compress.group < p->n_stream ? s->compress.group : p->n_stream > 0 ? p->n_stream : 1;
}

/* The packed file's header of a file to compress, and its bytes on rank 0. */
static int read_original(struct compress *c, const char *checkpoint, vd_error *err) {
  vd_packed *p = &c->packed;
  size_t n = 0;
  if (c->ctx->rank == 0 && vd_read_regular(c->s->compress.input, VD_PACKED_LONGEST, &c->bytes, &n, err) == VD_OK)
    vd_digest_bytes(c->bytes, n, p->sha256);
  if (err->status) vd_wrap(err, "compress%%input");
  if (vd_broadcast_error(c->ctx->comm, err)) return err->status;
  p->n_byte = (int64_t)n;
  p->update = c->from.update;
  snprintf(p->checkpoint, sizeof p->checkpoint, "%s", checkpoint);
  choose_streams(c->s, p);
  if (c->from.settings.model.arch == VD_TRANSFORMER_XL) put_memory(&c->from.settings, p->memory);
  vd_environment_of_process(&p->environment);
  return VD_OK;
}

/* The packed file on rank 0, made with this checkpoint. */
static int read_packed(struct compress *c, const char *checkpoint, vd_error *err) {
  vd_packed *p = &c->packed;
  if (c->ctx->rank == 0) {
    if (vd_packed_read(p, c->s->compress.input, err)) vd_wrap(err, "compress%%input");
    if (err->status == VD_OK && strcmp(p->checkpoint, checkpoint) != 0)
      vd_fail(
          err, VD_USAGE,
          "%s was packed with the checkpoint of update %lld, SHA-256 %s; %s is of update %lld, SHA-256 %s: name the "
          "right one in compress%%checkpoint",
          c->s->compress.input, (long long)p->update, p->checkpoint, c->from.path, (long long)c->from.update,
          checkpoint);
    if (err->status == VD_OK) c->bytes = vd_calloc((size_t)p->n_byte + 1, 1);
  }
  return vd_broadcast_error(c->ctx->comm, err);
}

/* All ranks get the header of rank 0, and must be of its environment. */
static int share_header(struct compress *c, vd_error *err) {
  vd_packed *p = &c->packed, own = *p;
  vd_environment here;
  MPI_Bcast(p, (int)sizeof *p, MPI_BYTE, 0, c->ctx->comm);
  p->length = own.length;
  p->code = own.code;
  vd_environment_of_process(&here);
  if (!(c->decompress && c->s->compress.ignore_build) && vd_environment_check(&p->environment, &here, err))
    vd_wrap(err, "%s", c->decompress ? c->s->compress.input : "rank 0 and this rank");
  if (err->status == VD_OK && c->decompress && p->memory[0]) take_memory(c, err);
  return vd_agree(c->ctx->comm, err);
}

static int read_inputs(struct compress *c, vd_error *err) {
  char checkpoint[VD_DIGEST_TEXT] = "";
  uint8_t vocabulary[VD_DIGEST_BYTES];
  if (vd_open_checkpoint_find(c->ctx, c->s, c->s->compress.checkpoint, &c->from, err) ||
      vd_open_checkpoint_override(c->s, &c->from, err) || check_paths(c, err))
    return err->status;
  if (c->ctx->rank == 0) vd_digest_text(c->from.path, checkpoint, err);
  if (vd_broadcast_error(c->ctx->comm, err) ||
      (c->decompress ? read_packed(c, checkpoint, err) : read_original(c, checkpoint, err)) || share_header(c, err) ||
      read_vocabulary(c, vocabulary, err))
    return err->status;
  if (c->decompress && memcmp(vocabulary, c->packed.vocabulary, sizeof vocabulary) != 0)
    return vd_fail(err, VD_FAILED, "%s and %s have different vocabularies", c->s->compress.input, c->from.path);
  memcpy(c->packed.vocabulary, vocabulary, sizeof vocabulary);
  return VD_OK;
}

/* ---- reports, on rank 0 ---- */

static void print_header(const struct compress *c) {
  const vd_packed *p = &c->packed;
  const vd_model_config *m = &c->config;
  printf("viaduct %s (%s)\n", vd_version(), vd_git_version());
  printf("  %*s %s, update %lld\n", LABEL, "checkpoint", c->from.path, (long long)c->from.update);
  printf("  %*s %s, %lld layers of %lld heads, width %lld: %lld parameters\n", LABEL, "model",
         m->arch == VD_TRANSFORMER_XL ? "Transformer-XL" : "adaptive span", (long long)m->n_layer, (long long)m->n_head,
         (long long)m->d_model, (long long)vd_model_parameters(m));
  printf("  %*s %d of one thread each; OpenBLAS kernel %s\n", LABEL, "ranks", c->ctx->size, p->environment.kernel);
  printf("  %*s %s: %lld bytes in %lld streams, %lld at once\n", LABEL, c->decompress ? "packed" : "input",
         c->s->compress.input, (long long)p->n_byte, (long long)p->n_stream, (long long)p->group);
  int64_t groups = (p->n_stream + p->group - 1) / p->group;
  if (c->ctx->size > groups && groups > 0)
    printf("  %*s %lld of the %d ranks have work: there are as many groups of streams\n", LABEL, "note",
           (long long)groups, c->ctx->size);
  if (c->from.notice[0]) printf("%s", c->from.notice);
  fflush(stdout);
}

static int print_result(const struct compress *c, vd_error *err) {
  const vd_packed *p = &c->packed;
  double seconds = vd_clock_seconds() - c->start, bpc = p->n_byte > 0 ? 8.0 * (double)p->n_code / (double)p->n_byte : 0;
  char took[24];
  end_live_line(c);
  vd_log_duration(seconds, took);
  printf("  %*s %s: %lld bytes, of which %lld are code: %.4f bits per byte\n", LABEL, c->decompress ? "was" : "output",
         c->decompress ? c->s->compress.input : c->s->compress.output, (long long)vd_packed_size(p),
         (long long)p->n_code, bpc);
  if (c->decompress)
    printf("  %*s %s: %lld bytes, SHA-256 as of the original\n", LABEL, "output", c->s->compress.output,
           (long long)p->n_byte);
  printf("  %*s %s, %.0f bytes a second\n", LABEL, "time", took, seconds > 0 ? (double)p->n_byte / seconds : 0.0);
  printf("{\"bytes\": %lld, \"packed\": %lld, \"code\": %lld, \"bpc\": %.17g, \"streams\": %lld, \"group\": %lld, "
         "\"update\": %lld}\n",
         (long long)p->n_byte, (long long)vd_packed_size(p), (long long)p->n_code, bpc, (long long)p->n_stream,
         (long long)p->group, (long long)c->from.update);
  return fflush(stdout) == 0 ? VD_OK : vd_fail(err, VD_FAILED, "cannot write to standard output");
}

/* ---- the work ---- */

static int make_compressor(struct compress *c, vd_error *err) {
  vd_settings cpu = *c->s;
  vd_device device;
  cpu.device.backend = VD_BACKEND_CPU;
  cpu.device.threads = 1;
  if (vd_device_open(c->ctx, &cpu, &c->config, &c->ops, &device, err)) return err->status;
  vd_environment_use_one_thread();
  vd_compress_plan plan = {.ctx = c->ctx,
                           .ops = c->ops,
                           .config = &c->config,
                           .symbol = c->symbol,
                           .n_byte = c->packed.n_byte,
                           .n_stream = c->packed.n_stream,
                           .group = c->packed.group,
                           .path = c->from.path,
                           .progress = show_progress,
                           .receiver = c};
  if (vd_compressor_create(&c->compressor, &plan, err)) return err->status;
  return vd_snapshot_read_parameters(c->ctx, c->ops, vd_compressor_model(c->compressor), c->from.path, err);
}

/* The decoded bytes to their file, if they are the right ones. */
static int write_original(const struct compress *c, vd_error *err) {
  uint8_t digest[VD_DIGEST_BYTES];
  vd_digest_bytes(c->bytes, (size_t)c->packed.n_byte, digest);
  if (memcmp(digest, c->packed.sha256, sizeof digest) != 0)
    return vd_fail(
        err, VD_FAILED,
        "%s: the bytes that come out have another SHA-256 than the original: nothing is written. This processor or "
        "program predicts other bits, or the file was made by another program",
        c->s->compress.input);
  return vd_atomic_write(c->s->compress.output, c->bytes, (size_t)c->packed.n_byte, err);
}

static int run(struct compress *c, vd_error *err) {
  if (read_inputs(c, err) || make_compressor(c, err)) return err->status;
  if (c->ctx->rank == 0) {
    c->live = vd_terminal_takes_live_line(c->s->run.progress);
    print_header(c);
  }
  c->start = c->shown = vd_clock_seconds();
  if (c->decompress ? vd_compressor_decode(c->compressor, &c->packed, (uint8_t *)c->bytes, err)
                    : vd_compressor_encode(c->compressor, (uint8_t *)c->bytes, &c->packed, err)) {
    if (c->ctx->rank == 0) end_live_line(c);
    return err->status;
  }
  if (c->ctx->rank == 0) {
    if (c->decompress)
      write_original(c, err);
    else
      vd_packed_write(&c->packed, c->s->compress.output, err);
    if (err->status == VD_OK) print_result(c, err);
  }
  return vd_broadcast_error(c->ctx->comm, err);
}

static int compress(vd_context *ctx, const vd_settings *s, bool decompress, vd_error *err) {
  struct compress c = {.ctx = ctx, .s = s, .decompress = decompress};
  int status = run(&c, err);
  vd_compressor_destroy(c.compressor);
  if (c.ops) c.ops->destroy(c.ops);
  vd_packed_free(&c.packed);
  free(c.bytes);
  return status;
}

int vd_cmd_compress(vd_context *ctx, const vd_settings *s, vd_error *err) {
  return compress(ctx, s, false, err);
}

int vd_cmd_decompress(vd_context *ctx, const vd_settings *s, vd_error *err) {
  return compress(ctx, s, true, err);
}
