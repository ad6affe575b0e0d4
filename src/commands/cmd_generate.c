#include "io/atomic_file.h"
#include "src/base/signals.h"
#include "src/comm/collectives.h"
#include "src/commands/commands.h"
#include "src/train/open_checkpoint.h"
#include "src/train/run_folder.h"
#include "src/train/snapshot.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char line_end[] = "</s>", blanks[] = " \t\r\v\f";

struct generate {
  vd_context *ctx;
  const vd_settings *s;
  vd_corpus *corpus;
  vd_open_checkpoint from;
  vd_ops *ops;
  vd_model *model;
  int64_t vocab;
  bool words;      /* symbols are words, with blanks between them and </s> for the end of a line */
  int64_t *prompt; /* [n_prompt] symbols to begin with */
  size_t n_prompt;
  bool amid_a_line; /* of words */
  real *logits;     /* [vocab] of the next token */
  struct choice {
    double weight;
    int64_t id;
  } * choice;          /* [vocab] */
  FILE *out;           /* standard output, or the temporary of `file` */
  vd_atomic_file file; /* generate%output, where it is named */
};

/* Feeds one token; its successor's logits are left in g->logits. */
static int feed(struct generate *g, int64_t id, vd_error *err) {
  int32_t x = (int32_t)id, y = -1;
  vd_step step = {.x = &x, .y = &y, .block = 1, .logits = g->logits};
  return vd_model_run(g->model, &step, err);
}

static int write_symbol(struct generate *g, int64_t id, vd_error *err) {
  size_t n;
  const char *bytes = vd_corpus_symbol(g->corpus, id, &n);
  bool end = g->words && n == strlen(line_end) && memcmp(bytes, line_end, n) == 0;
  if (end) bytes = "\n", n = 1;
  if (g->words && !end && g->amid_a_line) fputc(' ', g->out);
  g->amid_a_line = !end;
  if (fwrite(bytes, 1, n, g->out) == n && fflush(g->out) == 0) return VD_OK;
  return vd_fail(err, VD_FAILED, "cannot write the text: %s", strerror(errno));
}

/* Heaviest first; equal ones by id, so that the choice does not depend on the sort. */
static int compare(const void *a, const void *b) {
  const struct choice *x = a, *y = b;
  if (x->weight != y->weight) return x->weight > y->weight ? -1 : 1;
  return (x->id > y->id) - (x->id < y->id);
}

/* Draws token number `i` from softmax(logits / temperature) over the top_k likeliest; temperature 0: the likeliest. */
static int64_t draw(struct generate *g, int64_t i) {
  double t = g->s->generate.temperature, top = -HUGE_VAL, total = 0;
  int64_t k = g->s->generate.top_k;
  if (k <= 0 || k > g->vocab) k = g->vocab;
  for (int64_t v = 0; v < g->vocab; v++) top = fmax(top, (double)g->logits[v]);
  for (int64_t v = 0; v < g->vocab; v++) {
    double l = (double)g->logits[v] - top;
    g->choice[v] = (struct choice){t > 0 ? exp(l / t) : l, v};
  }
  qsort(g->choice, (size_t)g->vocab, sizeof *g->choice, compare);
  if (t <= 0) return g->choice[0].id;
  for (int64_t v = 0; v < k; v++) total += g->choice[v].weight;
  vd_rng rng = {.seed = (uint64_t)g->s->run.seed, .update = 0, .layer = 0, .site = VD_SITE_SAMPLE};
  double u = vd_uniform(vd_philox(rng, (uint64_t)i).v[0]) * total;
  for (int64_t v = 0; v < k - 1; v++) {
    u -= g->choice[v].weight;
    if (u < 0) return g->choice[v].id;
  }
  return g->choice[k - 1].id;
}

/* The symbol that text [n] begins with, its length in *used; -1 when there is none. A word must be whole. */
static int64_t next_symbol(const struct generate *g, const char *text, size_t n, size_t *used) {
  size_t length = g->words ? strcspn(text, blanks) : n;
  int64_t id = vd_corpus_encode(g->corpus, text, length, used);
  return g->words && *used != length ? -1 : id;
}

/* The whole prompt, before anything is written. */
static int encode_prompt(struct generate *g, vd_error *err) {
  const char *prompt = g->s->generate.prompt;
  size_t n = strlen(prompt), used = 0;
  g->words = vd_corpus_is_word_level(g->corpus);
  g->prompt = vd_calloc(n + 1, sizeof *g->prompt);
  for (size_t i = 0; i < n; i += used) {
    used = g->words ? strspn(prompt + i, blanks) : 0;
    if (used > 0) continue;
    int64_t id = next_symbol(g, prompt + i, n - i, &used);
    if (id < 0 && g->words)
      return vd_fail(err, VD_USAGE, "generate%%prompt: the vocabulary of %s has no word '%.*s'", g->s->data.path,
                     (int)strcspn(prompt + i, blanks), prompt + i);
    if (id < 0)
      return vd_fail(err, VD_USAGE, "generate%%prompt: the vocabulary of %s has no symbol for byte %zu (0x%02x)",
                     g->s->data.path, i + 1, (unsigned)(unsigned char)prompt[i]);
    g->prompt[g->n_prompt++] = id;
  }
  if (g->n_prompt == 0) return vd_fail(err, VD_USAGE, "generate%%prompt is empty: a text needs a first symbol");
  return VD_OK;
}

/* A regular file appears whole at the end; a device or a pipe gets each symbol at once. */
static int open_output(struct generate *g, vd_error *err) {
  const char *path = g->s->generate.output;
  struct stat there;
  int fd = -1;
  if (!path[0]) {
    g->out = stdout;
  } else if (stat(path, &there) == 0 && !S_ISREG(there.st_mode)) {
    g->out = fopen(path, "w");
  } else if (vd_atomic_begin(&g->file, path, err) == VD_OK && vd_atomic_create(&g->file, 0, &fd, err) == VD_OK) {
    g->out = fdopen(fd, "w");
  }
  if (!g->out && err->status == VD_OK) vd_fail(err, VD_FAILED, "cannot write %s: %s", path, strerror(errno));
  return vd_wrap(err, "generate%%output");
}

static int write_text(struct generate *g, vd_error *err) {
  if (encode_prompt(g, err) || open_output(g, err)) return err->status;
  for (size_t i = 0; i < g->n_prompt; i++)
    if (feed(g, g->prompt[i], err) || write_symbol(g, g->prompt[i], err)) return err->status;
  for (int64_t i = 0; i < g->s->generate.tokens; i++) {
    for (int64_t v = 0; v < g->vocab; v++)
      if (!isfinite(g->logits[v])) return vd_fail(err, VD_FAILED, "%s gives logits that are not finite", g->from.path);
    if (vd_signals_check(err)) return err->status;
    int64_t id = draw(g, i);
    if (write_symbol(g, id, err) || feed(g, id, err)) return err->status;
  }
  return VD_OK;
}

/* The work of rank 0, after parameters are read. */
static int generate_text(struct generate *g, vd_error *err) {
  g->logits = vd_calloc((size_t)g->vocab, sizeof *g->logits);
  g->choice = vd_calloc((size_t)g->vocab, sizeof *g->choice);
  write_text(g, err);
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
    vd_path_list_add(list, VD_PATH_OUTPUT, "generate%output", g->s->generate.output);
    vd_path_list_check(list, err);
    vd_path_list_destroy(list);
  }
  return vd_broadcast_error(g->ctx->comm, err);
}

static int generate(struct generate *g, vd_error *err) {
  const vd_settings *s = g->s;
  vd_model_config config;
  vd_device device;
  if (vd_open_checkpoint_find(g->ctx, s, s->generate.checkpoint, &g->from, err) ||
      vd_open_checkpoint_override(s, &g->from, err) || vd_configure_corpus(g->ctx, s, &g->corpus, err) ||
      check_output(g, err) || vd_snapshot_adopt_vocabulary(g->ctx, g->from.path, g->from.corpus_id, g->corpus, err) ||
      vd_open_checkpoint_config(&g->from, g->corpus, &config, err) ||
      vd_device_open(g->ctx, s, &config, &g->ops, &device, err))
    return err->status;
  g->vocab = config.vocab;
  vd_model_create(&g->model, &config, g->ops, 0, 1, 0, 1, false, err);
  if (vd_agree(g->ctx->comm, err) || vd_snapshot_read_parameters(g->ctx, g->ops, g->model, g->from.path, err))
    return err->status;
  if (g->ctx->rank == 0) {
    if (g->ctx->size > 1)
      fprintf(stderr, "viaduct: generate runs on one rank; the other %d are idle\n", g->ctx->size - 1);
    if (g->from.notice[0]) fprintf(stderr, "viaduct: %s", g->from.notice);
    if (strcmp(g->from.corpus_id, vd_corpus_id(g->corpus)) != 0)
      fprintf(stderr, "viaduct: note: %s was trained on other data than %s\n", g->from.path, s->data.path);
    generate_text(g, err);
  }
  return vd_broadcast_error(g->ctx->comm, err);
}

int vd_cmd_generate(vd_context *ctx, const vd_settings *s, vd_error *err) {
  struct generate g = {.ctx = ctx, .s = s};
  int status = generate(&g, err);
  free(g.logits);
  free(g.choice);
  free(g.prompt);
  if (g.model) vd_model_destroy(g.model);
  if (g.ops) g.ops->destroy(g.ops);
  if (g.corpus) vd_corpus_close(g.corpus);
  return status;
}
