/* Rules between variables, and what each command needs. */
#include "src/deck/settings_table.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Fails with the place where group%name (or, when that has its default, the second variable) was set. */
static int broken(const vd_settings *s, const char *const *names, vd_error *err, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static int broken(const vd_settings *s, const char *const *names, vd_error *err, const char *format, ...) {
  char message[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  for (; *names; names++) {
    for (size_t i = 0; i < vd_n_variables; i++) {
      char full[VD_TEXT];
      const vd_source *from = &s->source[i];
      snprintf(full, sizeof full, "%s%%%s", vd_variables[i].group, vd_variables[i].name);
      if (strcmp(full, *names) == 0 && from->line > 0)
        return vd_fail(err, VD_USAGE, "%s:%d:%d: %s", from->command ? "--set" : s->origin, from->line, from->column,
                       message);
    }
  }
  return vd_fail(err, VD_USAGE, "%s%s%s", s->origin, *s->origin ? ": " : "", message);
}
#define BROKEN(s, err, names, ...) broken(s, (const char *const[]){names, NULL}, err, __VA_ARGS__)
#define BOTH(a, b) a, b

/* A split's size below 1 is a fraction; from 1 on it counts tokens and must be whole. */
static int check_sizes(const vd_settings *s, vd_error *err) {
  const char *names[] = {"prepare%train", "prepare%valid", "prepare%test"};
  const double sizes[] = {s->prepare.train, s->prepare.valid, s->prepare.test};
  double fractions = 0;
  for (int i = 0; i < 3; i++) {
    if (sizes[i] < 1)
      fractions += sizes[i];
    else if (sizes[i] != floor(sizes[i]))
      return BROKEN(s, err, names[i], "%s = %.17g is neither a fraction below 1 nor a whole number of tokens", names[i],
                    sizes[i]);
  }
  if (fractions > 1 + 1e-12)
    return broken(s, (const char *const[]){names[0], names[1], names[2], NULL}, err,
                  "the fractions prepare%%train, prepare%%valid and prepare%%test add up to %.6g, more than 1",
                  fractions);
  return VD_OK;
}

int vd_settings_rules(const vd_settings *s, vd_error *err) {
  if (s->model.d_head == 0 && s->model.d_model % s->model.n_head != 0)
    return BROKEN(s, err, BOTH("model%d_model", "model%n_head"),
                  "model%%d_model = %lld is not a multiple of model%%n_head = %lld, and model%%d_head is not given",
                  (long long)s->model.d_model, (long long)s->model.n_head);
  if (s->model.arch == VD_TRANSFORMER_XL && s->model.d_model % 2 != 0)
    return BROKEN(s, err, BOTH("model%d_model", "model%arch"),
                  "model%%d_model = %lld is odd: 'transformer_xl' encodes distances in pairs",
                  (long long)s->model.d_model);
  if (s->memory.same_length && s->memory.mem_len == 0)
    return BROKEN(s, err, BOTH("memory%same_length", "memory%mem_len"),
                  "memory%%same_length with memory%%mem_len = 0 lets no token see anything");
  if (s->data.micro_streams > s->data.batch_streams)
    return BROKEN(s, err, BOTH("data%micro_streams", "data%batch_streams"),
                  "data%%micro_streams = %lld is more than data%%batch_streams = %lld",
                  (long long)s->data.micro_streams, (long long)s->data.batch_streams);
  if (s->prepare.source[0]) {
    const char *texts[] = {s->prepare.train_text, s->prepare.valid_text, s->prepare.test_text};
    const char *names[] = {"prepare%train_text", "prepare%valid_text", "prepare%test_text"};
    for (int i = 0; i < 3; i++)
      if (texts[i][0])
        return BROKEN(s, err, names[i], "%s and prepare%%source exclude each other: give the source or three texts",
                      names[i]);
  }
  if (!s->run.resume[0])
    return BROKEN(s, err, "run%resume", "run%%resume is empty: 'auto', 'never' or the path of a checkpoint");
  return check_sizes(s, err);
}

static int needs_path(const vd_settings *s, const char *command, vd_error *err) {
  if (s->data.path[0]) return VD_OK;
  return BROKEN(s, err, "data%path", "%s needs data%%path, the corpus", command);
}

static int needs_directory(const vd_settings *s, const char *command, vd_error *err) {
  if (s->run.directory[0]) return VD_OK;
  return BROKEN(s, err, "run%directory", "%s needs run%%directory, the folder of the run", command);
}

static int check_prepare(const vd_settings *s, vd_error *err) {
  const char *texts[] = {s->prepare.train_text, s->prepare.valid_text, s->prepare.test_text};
  const char *names[] = {"prepare%train_text", "prepare%valid_text", "prepare%test_text"};
  int given = 0;
  for (int i = 0; i < 3; i++) given += texts[i][0] != 0;
  if (needs_path(s, "prepare", err)) return err->status;
  if (s->prepare.source[0]) return VD_OK; /* the rules saw to it that no text is given too */
  if (given == 0)
    return BROKEN(s, err, "prepare%source",
                  "prepare needs prepare%%source, or prepare%%train_text, prepare%%valid_text and prepare%%test_text");
  for (int i = 0; i < 3; i++)
    if (!texts[i][0])
      return broken(s, (const char *const[]){names[i], names[(i + 1) % 3], names[(i + 2) % 3], NULL}, err,
                    "%s is missing: the three texts are given together", names[i]);
  return VD_OK;
}

/* Variables that mean nothing to the chosen architecture or method must have their defaults: a deck that sets them is
 * mistaken about what it trains. */
static const struct {
  const char *name, *choice, *value; /* belongs to choice = value */
} belongings[] = {
    {"model%emb_dropout", "model%arch", "adaptive_span"},   {"model%dropatt", "model%arch", "transformer_xl"},
    {"model%untie_r", "model%arch", "transformer_xl"},      {"span%attn_span", "model%arch", "adaptive_span"},
    {"span%ramp", "model%arch", "adaptive_span"},           {"span%init", "model%arch", "adaptive_span"},
    {"span%per_layer", "model%arch", "adaptive_span"},      {"span%aux_loss_scaler", "model%arch", "adaptive_span"},
    {"span%softmax", "model%arch", "adaptive_span"},        {"memory%mem_len", "model%arch", "transformer_xl"},
    {"memory%clamp_len", "model%arch", "transformer_xl"},   {"memory%same_length", "model%arch", "transformer_xl"},
    {"optimizer%clip_step", "optimizer%method", "adagrad"}, {"optimizer%beta1", "optimizer%method", "adam"},
    {"optimizer%beta2", "optimizer%method", "adam"},        {"optimizer%min_lr", "optimizer%schedule", "cosine"},
};

static const vd_variable *find(const char *full) {
  for (size_t i = 0; i < vd_n_variables; i++) {
    char name[VD_TEXT];
    snprintf(name, sizeof name, "%s%%%s", vd_variables[i].group, vd_variables[i].name);
    if (strcmp(name, full) == 0) return &vd_variables[i];
  }
  vd_bug("no variable %s", full);
}

static int check_belongings(const vd_settings *s, vd_error *err) {
  vd_settings *preset = vd_calloc(1, sizeof *preset);
  vd_settings_default(preset);
  for (size_t i = 0; i < sizeof belongings / sizeof *belongings && err->status == VD_OK; i++) {
    const vd_variable *v = find(belongings[i].name), *choice = find(belongings[i].choice);
    char is[2 * VD_PATH + 3], was[2 * VD_PATH + 3], chosen[VD_TEXT], wanted[VD_TEXT];
    vd_variable_value(v, s, is, sizeof is);
    vd_variable_value(v, preset, was, sizeof was);
    vd_variable_value(choice, s, chosen, sizeof chosen);
    snprintf(wanted, sizeof wanted, "'%s'", belongings[i].value);
    if (strcmp(chosen, wanted) == 0 || strcmp(is, was) == 0) continue;
    BROKEN(s, err, BOTH(belongings[i].name, belongings[i].choice), "%s = %.100s goes with %s = %s only, not with %s",
           belongings[i].name, is, belongings[i].choice, wanted, chosen);
  }
  free(preset);
  return err->status;
}

static int check_train(const vd_settings *s, vd_error *err) {
  if (needs_path(s, "train", err) || needs_directory(s, "train", err)) return err->status;
  if (s->run.max_updates < 1) return BROKEN(s, err, "run%max_updates", "train needs run%%max_updates, at least 1");
  if (s->optimizer.schedule == VD_COSINE && s->optimizer.warmup_updates >= s->run.max_updates)
    return BROKEN(s, err, BOTH("optimizer%warmup_updates", "run%max_updates"),
                  "optimizer%%warmup_updates = %lld leaves no update of run%%max_updates = %lld to the cosine",
                  (long long)s->optimizer.warmup_updates, (long long)s->run.max_updates);
  if (s->optimizer.min_lr > s->optimizer.lr)
    return BROKEN(s, err, BOTH("optimizer%min_lr", "optimizer%lr"),
                  "optimizer%%min_lr = %g is more than optimizer%%lr = %g", s->optimizer.min_lr, s->optimizer.lr);
  return check_belongings(s, err);
}

int vd_settings_check(const vd_settings *s, const char *command, vd_error *err) {
  if (vd_settings_rules(s, err)) return err->status;
  if (strcmp(command, "prepare") == 0) return check_prepare(s, err);
  if (strcmp(command, "train") == 0) return check_train(s, err);
  bool generate = strcmp(command, "generate") == 0;
  if (!generate && strcmp(command, "eval") != 0) vd_bug("no command \"%s\" reads a deck", command);
  if (needs_path(s, command, err)) return err->status;
  const char *checkpoint = generate ? s->generate.checkpoint : s->eval.checkpoint;
  if (!checkpoint[0] && needs_directory(s, command, err)) return err->status;
  if (generate && !s->generate.prompt[0])
    return BROKEN(s, err, "generate%prompt", "generate needs generate%%prompt, the text to continue");
  return VD_OK;
}
