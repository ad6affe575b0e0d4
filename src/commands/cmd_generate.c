#include "io/atomic_file.h"
#include "src/base/regular_file.h"
#include "src/base/signals.h"
#include "src/base/terminal.h"
#include "src/base/terminal_text.h"
#include "src/comm/collectives.h"
#include "src/commands/commands.h"
#include "src/commands/generated_text.h"
#include "src/model/sampler.h"
#include "src/train/open_checkpoint.h"
#include "src/train/run_folder.h"
#include "src/train/snapshot.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char line_end[] = "</s>", blanks[] = " \t\r\v\f", word_ends[] = " \t\r\v\f\n";

enum { PROMPT_BLOCK = 128, LONGEST_PROMPT = 1 << 30 };

/* One of the rank's samples. */
struct sample {
  vd_generated_text text;
  bool amid_a_line; /* of words */
};

struct generate {
  vd_context *ctx;
  const vd_settings *s;
  vd_corpus *corpus;
  vd_open_checkpoint from;
  vd_ops *ops;
  vd_model *model;
  int64_t vocab;
  bool words;              /* symbols are words, with blanks between them and </s> for the end of a line */
  int32_t *prompt;         /* [n_prompt] symbols to begin with */
  int64_t n_prompt, block; /* block: most tokens of the prompt that are fed at once */
  char *stop;              /* [n_stop] generate%stop without escapes */
  size_t n_stop;
  int64_t first, n;      /* this rank's samples are first .. first + n - 1, from 0 */
  struct sample *sample; /* [n] */
  int32_t *x, *y;        /* [n * block] */
  real *logits;          /* [n, vocab] of the next token */
  vd_sampler *sampler;
  FILE *out;               /* rank 0: standard output, or the temporary of `file` */
  vd_atomic_file file;     /* generate%output, where it is named */
  bool on_terminal;        /* `out` is a person's terminal */
  vd_terminal_text screen; /* what it shows */
  bool amid_a_line;        /* in `out` */
  int64_t shown;           /* samples that are complete in `out` */
};

/* The first sample of a rank; rank 0 has the most, so that someone who watches sees a text grow. */
static int64_t first_sample(const struct generate *g, int rank) {
  int64_t size = g->ctx->size;
  return (rank * g->s->generate.samples + size - 1) / size;
}

/* Feeds a block of tokens of all samples, g->x [n, block]; logits of what follows are left in g->logits. */
static int feed(struct generate *g, int64_t block, vd_error *err) {
  vd_step step = {.x = g->x, .y = g->y, .block = block, .logits = g->logits};
  return vd_signals_check(err) ? err->status : vd_model_run(g->model, &step, err);
}

/* Appends a symbol to a sample. */
static void append_symbol(struct generate *g, struct sample *sample, int64_t id, bool prompt) {
  size_t n;
  const char *bytes = vd_corpus_symbol(g->corpus, id, &n);
  char *text = vd_calloc(n + 1, 1);
  bool end = g->words && n == strlen(line_end) && memcmp(bytes, line_end, n) == 0, blank = g->words && !end;
  if (end) bytes = "\n", n = 1;
  blank = blank && sample->amid_a_line;
  if (blank) text[0] = ' ';
  memcpy(text + blank, bytes, n);
  sample->amid_a_line = !end;
  if (prompt)
    vd_generated_text_prompt(&sample->text, text, n + blank);
  else
    vd_generated_text_append(&sample->text, text, n + blank, g->stop, g->n_stop);
  free(text);
}

/* The symbol that text [n] begins with, its length in *used; -1 when there is none. A word must be whole. */
static int64_t next_symbol(const struct generate *g, const char *text, size_t n, size_t *used) {
  if (g->words && text[0] == '\n') {
    int64_t id = vd_corpus_encode(g->corpus, line_end, strlen(line_end), used);
    *used = 1;
    return id;
  }
  size_t length = g->words ? strcspn(text, word_ends) : n;
  int64_t id = vd_corpus_encode(g->corpus, text, length, used);
  return g->words && *used != length ? -1 : id;
}

/* text [n], followed by a zero, into g->prompt. name: the variable that it comes from. */
static int encode_prompt(struct generate *g, const char *name, const char *text, size_t n, vd_error *err) {
  size_t used = 0;
  g->prompt = vd_calloc(n + 1, sizeof *g->prompt);
  for (size_t i = 0; i < n; i += used) {
    used = g->words ? strspn(text + i, blanks) : 0;
    if (used > 0) continue;
    int64_t id = next_symbol(g, text + i, n - i, &used);
    if (id < 0 && g->words)
      return vd_fail(err, VD_USAGE, "generate%%%s: the vocabulary of %s has no word '%.*s'", name, g->s->data.path,
                     text[i] == '\n' ? (int)strlen(line_end) : (int)strcspn(text + i, word_ends),
                     text[i] == '\n' ? line_end : text + i);
    if (id < 0)
      return vd_fail(err, VD_USAGE, "generate%%%s: the vocabulary of %s has no symbol for byte %zu (0x%02x)", name,
                     g->s->data.path, i + 1, (unsigned)(unsigned char)text[i]);
    g->prompt[g->n_prompt++] = (int32_t)id;
  }
  if (g->n_prompt == 0) return vd_fail(err, VD_USAGE, "generate%%%s is empty: a text needs a first symbol", name);
  return VD_OK;
}

/* The prompt and the stop text of the deck. All ranks get the prompt that rank 0 read. */
static int read_texts(struct generate *g, vd_error *err) {
  char *text = NULL;
  size_t n = 0;
  bool named = g->s->generate.prompt_file[0];
  g->words = vd_corpus_is_word_level(g->corpus);
  if (vd_unescape(g->s->generate.stop, &g->stop, &g->n_stop, err)) vd_wrap(err, "generate%%stop");
  if (g->ctx->rank == 0 && err->status == VD_OK) {
    if (named && vd_read_regular(g->s->generate.prompt_file, LONGEST_PROMPT, &text, &n, err))
      vd_wrap(err, "generate%%prompt_file");
    else if (!named && vd_unescape(g->s->generate.prompt, &text, &n, err))
      vd_wrap(err, "generate%%prompt");
    if (err->status == VD_OK) encode_prompt(g, named ? "prompt_file" : "prompt", text, n, err);
  }
  free(text);
  if (vd_broadcast_error(g->ctx->comm, err)) return err->status;
  MPI_Bcast(&g->n_prompt, 1, MPI_INT64_T, 0, g->ctx->comm);
  if (g->ctx->rank != 0) g->prompt = vd_calloc((size_t)g->n_prompt, sizeof *g->prompt);
  MPI_Bcast(g->prompt, (int)g->n_prompt, MPI_INT32_T, 0, g->ctx->comm);
  g->block = g->n_prompt < PROMPT_BLOCK ? g->n_prompt : PROMPT_BLOCK;
  return VD_OK;
}

/* A regular file appears whole at the end; a device or a pipe gets each symbol at once. */
static int open_output(struct generate *g, vd_error *err) {
  const char *path = g->s->generate.output;
  struct stat there;
  int fd = -1;
  if (!path[0]) {
    g->out = stdout;
    g->on_terminal = vd_terminal_is_interactive(stdout);
  } else if (stat(path, &there) == 0 && !S_ISREG(there.st_mode)) {
    g->out = fopen(path, "w");
  } else if (vd_atomic_begin(&g->file, path, err) == VD_OK && vd_atomic_create(&g->file, 0, &fd, err) == VD_OK) {
    g->out = fdopen(fd, "w");
  }
  if (!g->out && err->status == VD_OK) vd_fail(err, VD_FAILED, "cannot write %s: %s", path, strerror(errno));
  return vd_wrap(err, "generate%%output");
}

static int flush(const struct generate *g, vd_error *err) {
  if (fflush(g->out) == 0 && !ferror(g->out)) return VD_OK;
  return vd_fail(err, VD_FAILED, "cannot write the text: %s", strerror(errno));
}

static void put(struct generate *g, const char *bytes, size_t n) {
  if (n == 0) return;
  if (g->on_terminal)
    vd_terminal_text_put(&g->screen, bytes, n, g->out);
  else
    fwrite(bytes, 1, n, g->out);
  g->amid_a_line = bytes[n - 1] != '\n';
}

/* With several samples a line precedes each. */
static void announce(struct generate *g) {
  char line[64];
  if (g->s->generate.samples == 1) return;
  if (g->on_terminal)
    vd_terminal_text_end(&g->screen, g->out);
  else if (g->amid_a_line)
    put(g, "\n", 1);
  int n = snprintf(line, sizeof line, "--- sample %lld of %lld ---\n", (long long)g->shown + 1,
                   (long long)g->s->generate.samples);
  put(g, line, (size_t)n);
}

/* Writes what is final of the text that is being shown. */
static void show(struct generate *g, vd_generated_text *text) {
  put(g, text->bytes, text->final);
  vd_generated_text_take(text);
}

/* Rank 0 shows a sample as it is drawn, then those that were complete before it. */
static int show_samples(struct generate *g, vd_error *err) {
  while (g->out && g->shown < g->n) {
    vd_generated_text *text = &g->sample[g->shown].text;
    show(g, text);
    if (!text->ended) break;
    g->shown++;
    if (g->shown < g->s->generate.samples) announce(g);
  }
  return g->out ? flush(g, err) : VD_OK;
}

static int feed_prompt(struct generate *g, vd_error *err) {
  for (int64_t s = 0; s < g->n; s++)
    for (int64_t i = 0; i < g->n_prompt; i++) append_symbol(g, &g->sample[s], g->prompt[i], true);
  if (show_samples(g, err)) return err->status;
  for (int64_t i = 0, n; i < g->n_prompt; i += n) {
    n = g->n_prompt - i < g->block ? g->n_prompt - i : g->block;
    for (int64_t s = 0; s < g->n; s++) memcpy(g->x + s * n, g->prompt + i, (size_t)n * sizeof *g->x);
    if (feed(g, n, err)) return err->status;
  }
  return VD_OK;
}

/* Symbol number `position` of all samples that have not ended; false in *more when none is left. */
static int draw_symbols(struct generate *g, int64_t position, bool *more, vd_error *err) {
  *more = false;
  for (int64_t s = 0; s < g->n; s++) {
    vd_generated_text *text = &g->sample[s].text;
    const real *logits = g->logits + s * g->vocab;
    if (text->ended) continue;
    for (int64_t v = 0; v < g->vocab; v++)
      if (!isfinite(logits[v])) return vd_fail(err, VD_FAILED, "%s gives logits that are not finite", g->from.path);
    int64_t id = vd_sampler_draw(g->sampler, logits, (uint32_t)(g->first + s), position);
    g->x[s] = (int32_t)id;
    append_symbol(g, &g->sample[s], id, false);
    if (position + 1 == g->s->generate.tokens) vd_generated_text_end(text);
    *more = *more || !text->ended;
  }
  return show_samples(g, err);
}

/* The samples of this rank. */
static int write_samples(struct generate *g, vd_error *err) {
  size_t n = (size_t)(g->n * g->block);
  bool more = true;
  g->sample = vd_calloc((size_t)g->n, sizeof *g->sample);
  g->x = vd_calloc(n, sizeof *g->x);
  g->y = vd_calloc(n, sizeof *g->y);
  memset(g->y, 0xff, n * sizeof *g->y);
  g->logits = vd_calloc((size_t)(g->n * g->vocab), sizeof *g->logits);
  g->sampler = vd_sampler_create(g->vocab, g->s->generate.temperature, g->s->generate.top_k, g->s->generate.top_p,
                                 (uint64_t)(g->s->generate.seed < 0 ? g->s->run.seed : g->s->generate.seed));
  if (g->ctx->rank == 0) {
    if (open_output(g, err)) return err->status;
    announce(g);
  }
  if (feed_prompt(g, err)) return err->status;
  for (int64_t i = 0; more; i++)
    if (draw_symbols(g, i, &more, err) || (more && feed(g, 1, err))) return err->status;
  return VD_OK;
}

enum { PIECE = 1 << 20 };

static void send_samples(const struct generate *g) {
  for (int64_t k = 0; k < g->n; k++) {
    const vd_generated_text *text = &g->sample[k].text;
    int64_t n = (int64_t)text->n;
    MPI_Send(&n, 1, MPI_INT64_T, 0, 0, g->ctx->comm);
    for (int64_t i = 0; i < n; i += PIECE)
      MPI_Send(text->bytes + i, (int)(n - i < PIECE ? n - i : PIECE), MPI_CHAR, 0, 0, g->ctx->comm);
  }
}

static void receive_sample(struct generate *g, int rank) {
  char *piece = vd_calloc(PIECE, 1);
  int64_t n = 0;
  MPI_Recv(&n, 1, MPI_INT64_T, rank, 0, g->ctx->comm, MPI_STATUS_IGNORE);
  for (int64_t i = 0; i < n; i += PIECE) {
    int size = (int)(n - i < PIECE ? n - i : PIECE);
    MPI_Recv(piece, size, MPI_CHAR, rank, 0, g->ctx->comm, MPI_STATUS_IGNORE);
    put(g, piece, (size_t)size);
  }
  free(piece);
}

/* Rank 0 writes the samples of the other ranks behind its own. */
static void collect_samples(struct generate *g) {
  if (g->ctx->rank != 0) {
    send_samples(g);
    return;
  }
  for (int rank = 1; rank < g->ctx->size; rank++)
    for (int64_t k = first_sample(g, rank); k < first_sample(g, rank + 1); k++) {
      receive_sample(g, rank);
      if (++g->shown < g->s->generate.samples) announce(g);
    }
}

static int close_output(struct generate *g, vd_error *err) {
  if (g->out && g->on_terminal) vd_terminal_text_end(&g->screen, g->out);
  if (g->out) flush(g, err);
  if (g->out && g->out != stdout && fclose(g->out) != 0)
    vd_fail(err, VD_FAILED, "cannot write %s: %s", g->s->generate.output, strerror(errno));
  if (g->file.temporary[0] && err->status == VD_OK) vd_atomic_commit(&g->file, err);
  vd_atomic_abandon(&g->file);
  return err->status;
}

static int check_output(const struct generate *g, vd_error *err) {
  if (g->ctx->rank == 0 && g->s->generate.output[0]) {
    vd_path_list *list = vd_path_list_create();
    vd_run_paths_inputs(list, g->s, g->corpus);
    vd_run_paths_protect(list, g->s, g->from.path);
    if (g->s->generate.prompt_file[0])
      vd_path_list_add(list, VD_PATH_INPUT, "generate%prompt_file", g->s->generate.prompt_file);
    vd_path_list_add(list, VD_PATH_OUTPUT, "generate%output", g->s->generate.output);
    vd_path_list_check(list, err);
    vd_path_list_destroy(list);
  }
  return vd_broadcast_error(g->ctx->comm, err);
}

/* Rank 0 prints on stderr what the user may not expect. */
static void print_notes(const struct generate *g) {
  const vd_settings *s = g->s;
  if (g->ctx->size > s->generate.samples)
    fprintf(stderr, "viaduct: generate%%samples = %lld: one rank computes a sample; the other %lld are idle\n",
            (long long)s->generate.samples, (long long)(g->ctx->size - s->generate.samples));
  if (g->from.notice[0]) fprintf(stderr, "viaduct: %s", g->from.notice);
  if (strcmp(g->from.corpus_id, vd_corpus_id(g->corpus)) != 0)
    fprintf(stderr, "viaduct: note: %s was trained on other data than %s\n", g->from.path, s->data.path);
}

/* One sample at a time gives texts that do not depend on the number of samples: products of other shapes may round
 * differently. A GPU takes hardly longer for 64 samples than for one, so there speed is the default. */
static int64_t samples_at_once(const struct generate *g) {
  enum { ON_GPU = 64 };
  if (g->s->generate.micro_samples > 0) return g->s->generate.micro_samples;
  return g->ops->memory_is_remote ? ON_GPU : 1;
}

static int generate(struct generate *g, vd_error *err) {
  const vd_settings *s = g->s;
  vd_model_config config;
  vd_device device;
  if (vd_open_checkpoint_find(g->ctx, s, s->generate.checkpoint, &g->from, err) ||
      vd_open_checkpoint_override(s, &g->from, err) || vd_configure_corpus(g->ctx, s, &g->corpus, err) ||
      check_output(g, err) || vd_snapshot_adopt_vocabulary(g->ctx, g->from.path, g->from.corpus_id, g->corpus, err) ||
      vd_open_checkpoint_config(&g->from, g->corpus, &config, err) || read_texts(g, err) ||
      vd_device_open(g->ctx, s, &config, &g->ops, &device, err))
    return err->status;
  g->vocab = config.vocab;
  g->first = first_sample(g, g->ctx->rank);
  g->n = first_sample(g, g->ctx->rank + 1) - g->first;
  vd_model_create(&g->model, &config, g->ops, g->first, g->n > 0 ? g->n : 1, samples_at_once(g), g->block, false, err);
  if (vd_agree(g->ctx->comm, err) || vd_snapshot_read_parameters(g->ctx, g->ops, g->model, g->from.path, err))
    return err->status;
  if (g->ctx->rank == 0) print_notes(g);
  if (g->n > 0) write_samples(g, err);
  if (vd_agree(g->ctx->comm, err) == VD_OK) collect_samples(g);
  if (g->ctx->rank == 0) close_output(g, err);
  return vd_agree(g->ctx->comm, err);
}

int vd_cmd_generate(vd_context *ctx, const vd_settings *s, vd_error *err) {
  struct generate g = {.ctx = ctx, .s = s};
  int status = generate(&g, err);
  for (int64_t i = 0; g.sample && i < g.n; i++) vd_generated_text_free(&g.sample[i].text);
  free(g.sample);
  free(g.x);
  free(g.y);
  free(g.logits);
  free(g.stop);
  free(g.prompt);
  vd_sampler_destroy(g.sampler);
  if (g.model) vd_model_destroy(g.model);
  if (g.ops) g.ops->destroy(g.ops);
  if (g.corpus) vd_corpus_close(g.corpus);
  return status;
}
