/* Rules between variables, and what each command needs. */
#include "src/deck/settings_errors.h"
#include "src/deck/settings_table.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const vd_variable *find(const char *full) {
  for (size_t i = 0; i < vd_n_variables; i++) {
    char name[VD_TEXT];
    snprintf(name, sizeof name, "%s%%%s", vd_variables[i].group, vd_variables[i].name);
    if (strcmp(name, full) == 0) return &vd_variables[i];
  }
  vd_bug("no variable %s", full);
}

void vd_settings_place(const vd_settings *s, const vd_variable *v, char out[VD_PLACE]) {
  const vd_source *from = &s->source[v - vd_variables];
  if (from->command)
    snprintf(out, VD_PLACE, "--set %s%%%s", v->group, v->name);
  else if (from->line > 0)
    snprintf(out, VD_PLACE, "%s:%d:%d", s->origin, from->line, from->column);
  else
    snprintf(out, VD_PLACE, "%s", s->origin);
}

/* What is checked, and the errors found. */
typedef struct check {
  const vd_settings *s;
  const char *command; /* NULL: the rules for all commands alone */
  vd_deck_errors *errors;
} check;

/* The variable that --set gave a value, else the first that the deck did: NULL where all have their defaults. */
static const vd_variable *find_culprit(const check *c, const char *const *names) {
  const vd_variable *first = NULL;
  for (; *names; names++) {
    const vd_variable *v = find(*names);
    const vd_source *from = &c->s->source[v - vd_variables];
    if (from->command) return v;
    if (!first && from->line > 0) first = v;
  }
  return first;
}

/* Adds an error with the place where one of the variables was set. */
static void broken(const check *c, const char *const *names, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void broken(const check *c, const char *const *names, const char *format, ...) {
  char message[1024], place[VD_PLACE];
  vd_error err = {0};
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  const vd_variable *v = find_culprit(c, names);
  if (v) {
    const vd_source *from = &c->s->source[v - vd_variables];
    vd_settings_place(c->s, v, place);
    vd_fail(&err, VD_USAGE, "%s: %s", place, message);
    vd_deck_errors_add(c->errors, from->command ? 1 : VD_NO_SET, (vd_deck_place){from->line, from->column}, &err);
    return;
  }
  vd_fail(&err, VD_USAGE, "%s%s%s", c->s->origin, *c->s->origin ? ": " : "", message);
  vd_deck_errors_add(c->errors, VD_NO_PLACE, (vd_deck_place){0, 0}, &err);
}
#define BROKEN(c, names, ...) broken(c, (const char *const[]){names, NULL}, __VA_ARGS__)
#define BOTH(a, b) a, b

/* A split's size up to 1 is a fraction of the source; above 1 it counts tokens and must be whole. */
static void check_sizes(const check *c) {
  const vd_settings *s = c->s;
  const char *names[] = {"prepare%train", "prepare%valid", "prepare%test"};
  const double sizes[] = {s->prepare.train, s->prepare.valid, s->prepare.test};
  double fractions = 0;
  for (int i = 0; i < 3; i++) {
    if (sizes[i] <= 1)
      fractions += sizes[i];
    else if (sizes[i] != floor(sizes[i]))
      BROKEN(c, names[i], "%s = %.17g is neither a fraction of at most 1 nor a whole number of tokens", names[i],
             sizes[i]);
  }
  if (fractions > 1 + 1e-12)
    broken(c, (const char *const[]){names[0], names[1], names[2], NULL},
           "the fractions prepare%%train, prepare%%valid and prepare%%test add up to %.6g, more than 1", fractions);
}

static void check_rules(const check *c) {
  const vd_settings *s = c->s;
  if (s->model.d_head == 0 && s->model.d_model % s->model.n_head != 0)
    BROKEN(c, BOTH("model%d_model", "model%n_head"),
           "model%%d_model = %lld is not a multiple of model%%n_head = %lld, and model%%d_head is not given",
           (long long)s->model.d_model, (long long)s->model.n_head);
  if (s->model.arch == VD_TRANSFORMER_XL && s->model.d_model % 2 != 0)
    BROKEN(c, BOTH("model%d_model", "model%arch"),
           "model%%d_model = %lld is odd: 'transformer_xl' encodes distances in pairs", (long long)s->model.d_model);
  if (s->memory.same_length && s->memory.mem_len == 0)
    BROKEN(c, BOTH("memory%same_length", "memory%mem_len"),
           "memory%%same_length with memory%%mem_len = 0 lets no token see anything");
  if (s->data.micro_streams > s->data.batch_streams)
    BROKEN(c, BOTH("data%micro_streams", "data%batch_streams"),
           "data%%micro_streams = %lld is more than data%%batch_streams = %lld", (long long)s->data.micro_streams,
           (long long)s->data.batch_streams);
  if (s->prepare.source[0]) {
    const char *texts[] = {s->prepare.train_text, s->prepare.valid_text, s->prepare.test_text};
    const char *names[] = {"prepare%train_text", "prepare%valid_text", "prepare%test_text"};
    for (int i = 0; i < 3; i++)
      if (texts[i][0])
        BROKEN(c, names[i], "%s and prepare%%source exclude each other: give the source or three texts", names[i]);
  }
  if (!s->run.resume[0]) BROKEN(c, "run%resume", "run%%resume is empty: 'auto', 'never' or the path of a checkpoint");
  check_sizes(c);
}

static void needs_path(const check *c) {
  if (!c->s->data.path[0]) BROKEN(c, "data%path", "%s needs data%%path, the corpus", c->command);
}

static void needs_directory(const check *c) {
  if (!c->s->run.directory[0]) BROKEN(c, "run%directory", "%s needs run%%directory, the folder of the run", c->command);
}

static void check_prepare(const check *c) {
  const vd_settings *s = c->s;
  const char *texts[] = {s->prepare.train_text, s->prepare.valid_text, s->prepare.test_text};
  const char *names[] = {"prepare%train_text", "prepare%valid_text", "prepare%test_text"};
  int given = 0;
  for (int i = 0; i < 3; i++) given += texts[i][0] != 0;
  needs_path(c);
  if (s->prepare.source[0]) return; /* the rules saw to it that no text is given too */
  if (given == 0)
    BROKEN(c, "prepare%source",
           "prepare needs prepare%%source, or prepare%%train_text, prepare%%valid_text and prepare%%test_text");
  for (int i = 0; i < 3; i++)
    if (given > 0 && !texts[i][0])
      broken(c, (const char *const[]){names[i], names[(i + 1) % 3], names[(i + 2) % 3], NULL},
             "%s is missing: the three texts are given together", names[i]);
}

/* Variables that mean nothing to the chosen architecture or method must have their defaults: a deck that sets them is
 * mistaken about what it trains. */
static const struct {
  const char *name, *choice;
  int number; /* the variable belongs to this value of the choice */
} belongings[] = {
    {"model%emb_dropout", "model%arch", VD_ADAPTIVE_SPAN}, {"model%dropatt", "model%arch", VD_TRANSFORMER_XL},
    {"model%untie_r", "model%arch", VD_TRANSFORMER_XL},    {"span%attn_span", "model%arch", VD_ADAPTIVE_SPAN},
    {"span%ramp", "model%arch", VD_ADAPTIVE_SPAN},         {"span%init", "model%arch", VD_ADAPTIVE_SPAN},
    {"span%per_layer", "model%arch", VD_ADAPTIVE_SPAN},    {"span%aux_loss_scaler", "model%arch", VD_ADAPTIVE_SPAN},
    {"span%softmax", "model%arch", VD_ADAPTIVE_SPAN},      {"memory%mem_len", "model%arch", VD_TRANSFORMER_XL},
    {"memory%clamp_len", "model%arch", VD_TRANSFORMER_XL}, {"memory%same_length", "model%arch", VD_TRANSFORMER_XL},
    {"memory%initial", "model%arch", VD_TRANSFORMER_XL},   {"optimizer%clip_step", "optimizer%method", VD_ADAGRAD},
    {"optimizer%beta1", "optimizer%method", VD_ADAM},      {"optimizer%beta2", "optimizer%method", VD_ADAM},
    {"optimizer%min_lr", "optimizer%schedule", VD_COSINE},
};

static void check_belongings(const check *c) {
  const vd_settings *s = c->s;
  vd_settings *preset = vd_calloc(1, sizeof *preset);
  for (size_t i = 0; i < sizeof belongings / sizeof *belongings; i++) {
    const vd_variable *v = find(belongings[i].name), *choice = find(belongings[i].choice);
    char is[2 * VD_PATH + 3], was[2 * VD_PATH + 3], chosen[VD_TEXT], wanted[VD_TEXT];
    int number;
    memcpy(&number, (const char *)s + choice->offset, sizeof number);
    if (number == belongings[i].number) continue;
    vd_settings_default(preset);
    vd_variable_value(v, s, is, sizeof is);
    vd_variable_value(v, preset, was, sizeof was);
    if (strcmp(is, was) == 0) continue;
    memcpy((char *)preset + choice->offset, &belongings[i].number, sizeof number);
    vd_variable_value(choice, s, chosen, sizeof chosen);
    vd_variable_value(choice, preset, wanted, sizeof wanted);
    BROKEN(c, BOTH(belongings[i].name, belongings[i].choice), "%s = %.100s goes with %s = %s only, not with %s",
           belongings[i].name, is, belongings[i].choice, wanted, chosen);
  }
  free(preset);
}

static void check_train(const check *c) {
  const vd_settings *s = c->s;
  needs_path(c);
  needs_directory(c);
  if (s->run.max_updates < 1)
    BROKEN(c, "run%max_updates", "train needs run%%max_updates, at least 1");
  else if (s->optimizer.schedule == VD_COSINE && s->optimizer.warmup_updates >= s->run.max_updates)
    BROKEN(c, BOTH("optimizer%warmup_updates", "run%max_updates"),
           "optimizer%%warmup_updates = %lld leaves no update of run%%max_updates = %lld to the cosine",
           (long long)s->optimizer.warmup_updates, (long long)s->run.max_updates);
  if (s->optimizer.min_lr > s->optimizer.lr)
    BROKEN(c, BOTH("optimizer%min_lr", "optimizer%lr"), "optimizer%%min_lr = %g is more than optimizer%%lr = %g",
           s->optimizer.min_lr, s->optimizer.lr);
  check_belongings(c);
}

/* A deck is no shell: '~/runs' would be a folder named ~ in the working directory. Decks inside checkpoints are exempt.
 */
static void check_paths(const check *c) {
  const vd_settings *s = c->s;
  const struct {
    const char *name, *path;
  } paths[] = {{"run%directory", s->run.directory},
               {"run%resume", s->run.resume},
               {"run%start_from", s->run.start_from},
               {"data%path", s->data.path},
               {"device%timeline", s->device.timeline},
               {"eval%checkpoint", s->eval.checkpoint},
               {"eval%nll_file", s->eval.nll_file},
               {"eval%attention_file", s->eval.attention_file},
               {"generate%checkpoint", s->generate.checkpoint},
               {"generate%output", s->generate.output},
               {"compress%input", s->compress.input},
               {"compress%output", s->compress.output},
               {"compress%checkpoint", s->compress.checkpoint},
               {"prepare%source", s->prepare.source},
               {"generate%prompt_file", s->generate.prompt_file},
               {"prepare%train_text", s->prepare.train_text},
               {"prepare%valid_text", s->prepare.valid_text},
               {"prepare%test_text", s->prepare.test_text}};
  for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
    char first = paths[i].path[0];
    if (first == '~' || first == '$')
      BROKEN(
          c, paths[i].name,
          "%s = '%.200s' begins with '%c', which a shell replaces and a deck does not: write the path out ('./%c...' "
          "for a file of that very name)",
          paths[i].name, paths[i].path, first, first);
  }
}

static void check_compress(const check *c) {
  const vd_settings *s = c->s;
  if (!s->compress.input[0]) BROKEN(c, "compress%input", "%s needs compress%%input, the file to read", c->command);
  if (!s->compress.output[0]) BROKEN(c, "compress%output", "%s needs compress%%output, the file to write", c->command);
  if (!s->compress.checkpoint[0]) needs_directory(c);
  if (s->device.backend == VD_BACKEND_CUDA)
    BROKEN(
        c, "device%backend",
        "%s computes on the CPU, where a model predicts the same bits each time: device%%backend = 'cuda' is not for "
        "it",
        c->command);
}

static void check_attention(const check *c) {
  const char *at = c->s->eval.attention_at;
  size_t digit = strcspn(at, "0123456789");
  if (at[0] && (!at[digit] || at[strspn(at, " 0123456789")]))
    BROKEN(c, "eval%attention_at",
           "eval%%attention_at = '%.200s' is no list of tokens: whole numbers with blanks between", at);
  if (at[0] && !c->s->eval.attention_file[0])
    BROKEN(c, BOTH("eval%attention_at", "eval%attention_file"),
           "eval%%attention_at needs eval%%attention_file, the file for the weights at these tokens");
}

static void check_command(const check *c) {
  const vd_settings *s = c->s;
  check_paths(c);
  if (strcmp(c->command, "compress") == 0 || strcmp(c->command, "decompress") == 0) {
    check_compress(c);
    return;
  }
  if (strcmp(c->command, "prepare") == 0) {
    check_prepare(c);
    return;
  }
  if (strcmp(c->command, "train") == 0) {
    check_train(c);
    return;
  }
  bool generate = strcmp(c->command, "generate") == 0;
  if (!generate && strcmp(c->command, "eval") != 0) vd_bug("no command \"%s\" reads a deck", c->command);
  needs_path(c);
  if (!generate) check_attention(c);
  const char *checkpoint = generate ? s->generate.checkpoint : s->eval.checkpoint;
  if (!checkpoint[0]) needs_directory(c);
  if (generate && s->generate.prompt[0] && s->generate.prompt_file[0])
    BROKEN(c, BOTH("generate%prompt", "generate%prompt_file"),
           "generate%%prompt and generate%%prompt_file exclude each other");
  if (generate && !s->generate.prompt[0] && !s->generate.prompt_file[0])
    BROKEN(c, "generate%prompt", "generate needs generate%%prompt or generate%%prompt_file, the text to continue");
}

int vd_settings_check(const vd_settings *s, const char *command, vd_error *err) {
  vd_deck_errors *errors = vd_calloc(1, sizeof *errors);
  check c = {s, command, errors};
  check_rules(&c);
  if (command) check_command(&c);
  vd_deck_errors_join(errors, err);
  free(errors);
  return err->status;
}
