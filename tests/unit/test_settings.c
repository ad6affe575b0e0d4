/* The settings table and what is made of it: defaults, ranges, messages, --set, rules, echo. */
#include "src/deck/settings_errors.h"
#include "src/deck/settings_table.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

static const char path[] = "test_settings.tmp.nml";

/* Reads the text as a deck in a file, with one --set unless it is NULL. */
static int read_deck(vd_settings *s, const char *text, const char *set, vd_error *err) {
  char *sets[] = {(char *)set};
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  assert_true(fputs(text, f) >= 0);
  assert_int_equal(fclose(f), 0);
  *err = (vd_error){0};
  int status = vd_settings_read(s, path, sets, set ? 1 : 0, NULL, err);
  remove(path);
  return status;
}

static void test_table(void **state) {
  (void)state;
  size_t group = 0;
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    while (group < vd_n_groups && strcmp(v->group, vd_groups[group].name) != 0) group++;
    assert_true(group < vd_n_groups); /* rows stand in the order of the groups */
    assert_ptr_equal(vd_variable_find(v->group, v->name), v);
    assert_true(strlen(v->doc) > 10 && !strchr(v->doc, '\n'));
    for (size_t k = 0; k < i; k++) assert_true(v->offset != vd_variables[k].offset);
  }
  vd_settings *s = vd_calloc(1, sizeof *s);
  vd_error err = {0};
  vd_settings_default(s); /* a default that its own row does not allow would be a bug and abort */
  assert_int_equal(s->model.n_layer, 12);
  assert_true(s->optimizer.eps == 0);
  assert_int_equal(s->span.softmax, VD_MASKED);
  assert_false(s->prepare.overwrite);
  assert_int_equal(vd_settings_check(s, NULL, &err), VD_OK);
  free(s);
}

static void test_read(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  vd_error err;
  assert_int_equal(read_deck(s, "&Model DROPOUT=3d-1 n_head=, /\n&span per_layer=T softmax=\"trimmed\" /", NULL, &err),
                   VD_OK);
  assert_true(s->model.dropout == 0.3);
  assert_int_equal(s->model.n_head, 8);
  assert_true(s->span.per_layer);
  assert_int_equal(s->span.softmax, VD_TRIMMED);
  vd_settings *before = vd_calloc(1, sizeof *before);
  *before = *s; /* an error in the last line changes nothing */
  assert_int_equal(read_deck(s, "&model dropout=0.1 /\n&span ramp=0 /", NULL, &err), VD_USAGE);
  assert_memory_equal(before, s, sizeof *s);
  free(before);
  free(s);
}

typedef struct message_case {
  const char *deck, *set, *message;
} message_case;

static const message_case messages[] = {
    {"&run\n  sed = 3 /", NULL,
     "test_settings.tmp.nml:2:3: unknown variable run%sed; the nearest known one is run%seed"},
    {"&model lr=1 /", NULL,
     "test_settings.tmp.nml:1:8: unknown variable model%lr; the nearest known one is optimizer%lr"},
    {"&modle /", NULL, "test_settings.tmp.nml:1:1: unknown group &modle; the nearest known group is &model"},
    {"&run seed=3.0 /", NULL,
     "test_settings.tmp.nml:1:11: run%seed = 3.0 is not an integer: it takes an integer from 0 to 9007199254740992"},
    {"&run seed='3' /", NULL,
     "test_settings.tmp.nml:1:11: run%seed = '3' is not an integer: it takes an integer from 0 to 9007199254740992"},
    {"&run seed=-1 /", NULL,
     "test_settings.tmp.nml:1:11: run%seed = -1 is out of range: it takes an integer from 0 to 9007199254740992"},
    {"&run seed=99999999999999999999 /", NULL,
     "test_settings.tmp.nml:1:11: run%seed = 99999999999999999999 is beyond what fits into 64 bits: it takes an "
     "integer "
     "from 0 to 9007199254740992"},
    {"&run seed=1 2 /", NULL, "test_settings.tmp.nml:1:13: too many values for seed: it takes one"},
    {"&run seed(1)=1 /", NULL, "test_settings.tmp.nml:1:6: seed is a single value and takes no subscript"},
    {"&run seed=1\nseed=2 /", NULL, "test_settings.tmp.nml:2:1: seed is assigned a second time (first in line 1)"},
    {"&run title=abc /", NULL,
     "test_settings.tmp.nml:1:12: run%title = abc is not a string in quotes: it takes a string in quotes, of at most "
     "255 "
     "bytes"},
    {"&run title='a\tb' /", NULL, "test_settings.tmp.nml:1:12: run%title: a string cannot hold control characters"},
    {"&span softmax='Masked' /", NULL,
     "test_settings.tmp.nml:1:15: span%softmax = 'Masked' is not allowed: it takes 'masked' or 'trimmed'"},
    {"&span softmax='masked trimmed' /", NULL,
     "test_settings.tmp.nml:1:15: span%softmax = 'masked trimmed' is not allowed: it takes 'masked' or 'trimmed'"},
    {"&span per_layer=1 /", NULL,
     "test_settings.tmp.nml:1:17: span%per_layer = 1 is not a logical: it takes .true. or .false."},
    {"&model dropout=1.0 /", NULL,
     "test_settings.tmp.nml:1:16: model%dropout = 1.0 is out of range: it takes a real from 0 to 0.99"},
    {"&model n_layer=257 /", NULL,
     "test_settings.tmp.nml:1:16: model%n_layer = 257 is out of range: it takes an integer from 1 to 256"},
    {"&optimizer lr=nan /", NULL,
     "test_settings.tmp.nml:1:15: optimizer%lr = nan is not finite: it takes a real greater than 0"},
    {"&optimizer lr=1e999 /", NULL,
     "test_settings.tmp.nml:1:15: optimizer%lr = 1e999 is beyond what fits into 64 bits: it takes a real greater than "
     "0"},
    {"&span init=1.01 /", NULL,
     "test_settings.tmp.nml:1:12: span%init = 1.01 is out of range: it takes a real from 0 to 1"},
    {"&model\n d_model=100 /", NULL,
     "test_settings.tmp.nml:2:10: model%d_model = 100 is not a multiple of model%n_head = 8, and model%d_head is not "
     "given"},
    {"&data batch_streams=2 micro_streams=3 /", NULL,
     "test_settings.tmp.nml:1:37: data%micro_streams = 3 is more than data%batch_streams = 2"},
    {"&prepare source='a' valid_text='b' /", NULL,
     "test_settings.tmp.nml:1:32: prepare%valid_text and prepare%source exclude each other: give the source or three "
     "texts"},
    {"&prepare train=1.5 /", NULL,
     "test_settings.tmp.nml:1:16: prepare%train = 1.5 is neither a fraction of at most 1 nor a whole number of tokens"},
    {"&prepare train=.9 valid=.1 test=.1 /", NULL,
     "test_settings.tmp.nml:1:16: the fractions prepare%train, prepare%valid and prepare%test add up to 1.1, more than "
     "1"},
    {"", "run%sed=3", "--set run%sed=3: unknown variable run%sed; the nearest known one is run%seed"},
    {"", "rnu%seed=3", "--set rnu%seed=3: unknown group &rnu; the nearest known group is &run"},
    {"", "run%seed=x",
     "--set run%seed=x: run%seed = x is not an integer: it takes an integer from 0 to 9007199254740992"},
    {"", "run%seed", "--set run%seed: this is no assignment (write --set GROUP%NAME=VALUE)"},
    {"", "seed=3", "--set seed=3: this is no assignment (write --set GROUP%NAME=VALUE)"},
    {"", "run%seed=", "--set run%seed=: there is no value (write --set GROUP%NAME=VALUE)"},
    {"", "run%seed=1 max_updates=2",
     "--set run%seed=1 max_updates=2: this is more or less than one assignment (write --set GROUP%NAME=VALUE)"},
    {"", "model%d_model=100",
     "--set model%d_model: model%d_model = 100 is not a multiple of model%n_head = 8, and model%d_head is not given"},
};

static void test_messages(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  for (size_t i = 0; i < sizeof messages / sizeof *messages; i++) {
    vd_error err;
    assert_int_equal(read_deck(s, messages[i].deck, messages[i].set, &err), VD_USAGE);
    assert_string_equal(err.message, messages[i].message);
  }
  free(s);
}

/* All errors at once, in the order of their places, those of --set behind those of the deck. */
static void test_several_errors(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  vd_error err;
  const char *deck =
      "&span ramp=0\n sofmax='masked' /\n&run seed=1 seed=2\n sed=3 seed=4 /\n&modle x=1 /\n&data path=3 /";
  assert_int_equal(read_deck(s, deck, "model%dropout=2", &err), VD_USAGE);
  assert_string_equal(
      err.message, "test_settings.tmp.nml:1:12: span%ramp = 0 is out of range: it takes an integer from 1 to 16777216\n"
                   "test_settings.tmp.nml:2:2: unknown variable span%sofmax; the nearest known one is span%softmax\n"
                   "test_settings.tmp.nml:3:13: seed is assigned a second time (first in line 3)\n"
                   "test_settings.tmp.nml:4:2: unknown variable run%sed; the nearest known one is run%seed\n"
                   "test_settings.tmp.nml:5:1: unknown group &modle; the nearest known group is &model\n"
                   "test_settings.tmp.nml:6:12: data%path = 3 is not a string in quotes: it takes a string in quotes, "
                   "of at most 1023 "
                   "bytes\n"
                   "--set model%dropout=2: model%dropout = 2 is out of range: it takes a real from 0 to 0.99");
  free(s);
}

/* Text that is no namelist, values that are wrong and --set, in one message. */
static void test_errors_around_faults(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  vd_error err = {0};
  char *sets[] = {"run%seed=1", "run%seed=x", "span%ramp"};
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  assert_true(fputs("&run seed = 3 4\n title=='x'\n log_intervl=3 /\n&span ramp=0 /", f) >= 0);
  assert_int_equal(fclose(f), 0);
  assert_int_equal(vd_settings_read(s, path, sets, 3, NULL, &err), VD_USAGE);
  remove(path);
  assert_string_equal(
      err.message,
      "test_settings.tmp.nml:1:15: too many values for seed: it takes one\n"
      "test_settings.tmp.nml:2:8: a second '=' where a value was expected\n"
      "test_settings.tmp.nml:3:2: unknown variable run%log_intervl; the nearest known one is run%log_interval\n"
      "test_settings.tmp.nml:4:12: span%ramp = 0 is out of range: it takes an integer from 1 to 16777216\n"
      "--set run%seed=x (number 2): run%seed = x is not an integer: it takes an integer from 0 to 9007199254740992\n"
      "--set span%ramp (number 3): this is no assignment (write --set GROUP%NAME=VALUE)");
  free(s);
}

/* Rules and the needs of a command are one pass: the variables that nobody set come last. */
static void test_several_rules(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  vd_error err = {0};
  char *sets[] = {"optimizer%min_lr=3", "run%seed=x"};
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  assert_true(fputs("&data batch_streams=2 micro_streams=3 /\n&model d_model=100 beta=1 /", f) >= 0);
  assert_int_equal(fclose(f), 0);
  assert_int_equal(vd_settings_read(s, path, sets, 2, "train", &err), VD_USAGE);
  assert_string_equal(err.message, "test_settings.tmp.nml:2:20: unknown variable model%beta; the nearest known one is "
                                   "optimizer%beta1\n"
                                   "--set run%seed=x (number 2): run%seed = x is not an integer: it takes an integer "
                                   "from 0 to 9007199254740992");
  f = fopen(path, "w");
  assert_non_null(f);
  assert_true(fputs("&data batch_streams=2 micro_streams=3 /\n&model d_model=100 /", f) >= 0);
  assert_int_equal(fclose(f), 0);
  err = (vd_error){0};
  assert_int_equal(vd_settings_read(s, path, sets, 1, "train", &err), VD_USAGE);
  remove(path);
  assert_string_equal(
      err.message, "test_settings.tmp.nml:1:37: data%micro_streams = 3 is more than data%batch_streams = 2\n"
                   "test_settings.tmp.nml:2:16: model%d_model = 100 is not a multiple of model%n_head = 8, and "
                   "model%d_head is not given\n"
                   "--set optimizer%min_lr: optimizer%min_lr = 3 is more than optimizer%lr = 0.07\n"
                   "--set optimizer%min_lr: optimizer%min_lr = 3.0 goes with optimizer%schedule = 'cosine' only, not "
                   "with 'constant'\n"
                   "test_settings.tmp.nml: train needs data%path, the corpus\n"
                   "test_settings.tmp.nml: train needs run%max_updates, at least 1");
  free(s);
}

/* As many errors as fit into the message; the others are counted. A huge deck of unknown names ends soon. */
static void test_many_errors(void **state) {
  (void)state;
  enum { N = 200000 };
  vd_settings *s = vd_calloc(1, sizeof *s);
  char *text = vd_calloc(N, 5);
  vd_error err = {0};
  size_t used = (size_t)snprintf(text, 8, "&run\n");
  for (int i = 0; i < 40; i++) used += (size_t)snprintf(text + used, 8, "x=\n");
  snprintf(text + used, 4, "/");
  assert_int_equal(vd_settings_read_text(s, text, "t", &err), VD_USAGE);
  int lines = 1, more = 0;
  for (const char *p = err.message; *p; p++) lines += *p == '\n';
  const char *last = strrchr(err.message, '\n');
  assert_non_null(last);
  assert_int_equal(sscanf(last, "\nand %d more errors", &more), 1);
  assert_int_equal(lines - 1, VD_DECK_ERRORS);
  assert_int_equal(lines - 1 + more, 40);
  assert_non_null(strstr(err.message, "\nt:21:1: unknown"));
  assert_null(strstr(err.message, "\nt:22:1: unknown"));
  used = (size_t)snprintf(text, 8, "&run\n");
  for (int i = 0; i < N; i++) used += (size_t)snprintf(text + used, 8, "x=\n");
  snprintf(text + used, 4, "/");
  err = (vd_error){0};
  assert_int_equal(vd_settings_read_text(s, text, "t", &err), VD_USAGE);
  free(text);
  free(s);
}

static void test_long_string(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  char text[VD_TEXT + 64];
  vd_error err;
  snprintf(text, sizeof text, "&run title='%0*d' /", VD_TEXT - 1, 0);
  assert_int_equal(read_deck(s, text, NULL, &err), VD_OK);
  assert_int_equal(strlen(s->run.title), VD_TEXT - 1);
  snprintf(text, sizeof text, "&run title='%0*d' /", VD_TEXT, 0);
  assert_int_equal(read_deck(s, text, NULL, &err), VD_USAGE);
  assert_string_equal(err.message, "test_settings.tmp.nml:1:12: run%title: the string is too long, 256 bytes where 255 "
                                   "are allowed");
  free(s);
}

static void test_set(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  vd_error err;
  const char *deck = "&run seed=1 title='deck' /";
  assert_int_equal(read_deck(s, deck, "RUN%Seed=7", &err), VD_OK);
  assert_int_equal(s->run.seed, 7);
  assert_string_equal(s->run.title, "deck");
  assert_int_equal(read_deck(s, deck, "run%title='it''s'", &err), VD_OK);
  assert_string_equal(s->run.title, "it's");
  assert_int_equal(read_deck(s, deck, "run%title=it's 5/6 ! x=y, z", &err), VD_OK);
  assert_string_equal(s->run.title, "it's 5/6 ! x=y, z");
  assert_int_equal(read_deck(s, deck, "run%title=", &err), VD_OK);
  assert_string_equal(s->run.title, "");
  char *twice[] = {"run%seed=8", "run%seed=9"};
  FILE *f = fopen(path, "w");
  assert_non_null(f);
  assert_int_equal(fclose(f), 0);
  assert_int_equal(vd_settings_read(s, path, twice, 2, NULL, &err), VD_OK);
  remove(path);
  assert_int_equal(s->run.seed, 9);
  free(s);
}

static const struct {
  const char *command, *deck, *message;
} commands[] = {
    {"train", "&run max_updates=1 /", "t: train needs data%path, the corpus"},
    {"train", "&data path='x' /", "t: train needs run%max_updates, at least 1"},
    {"train", "&data path='x' /\n&run max_updates=0 /", "t:2:18: train needs run%max_updates, at least 1"},
    {"train", "&data path='x' /\n&run max_updates=1 directory='' /",
     "t:2:30: train needs run%directory, the folder of the run"},
    {"train", "&data path='x' /\n&run max_updates=1 /", NULL},
    {"prepare", "&data path='x' /",
     "t: prepare needs prepare%source, or prepare%train_text, prepare%valid_text and prepare%test_text"},
    {"prepare", "&prepare source='y' /", "t: prepare needs data%path, the corpus"},
    {"prepare", "&data path='x' /\n&prepare train_text='a' test_text='b' /",
     "t:2:35: prepare%valid_text is missing: the three texts are given together"},
    {"prepare", "&data path='x' /\n&prepare train_text='a' test_text='b' valid_text='c' /", NULL},
    {"prepare", "&data path='x' /\n&prepare source='y' /", NULL},
    {"eval", "", "t: eval needs data%path, the corpus"},
    {"eval", "&data path='x' /", NULL},
    {"eval", "&data path='x' /\n&run directory='' /", "t:2:16: eval needs run%directory, the folder of the run"},
    {"eval", "&data path='x' /\n&run directory='' /\n&eval checkpoint='c' /", NULL},
    {"eval", "&data path='x' /\n&eval attention_at='7 9' attention_file='a' /", NULL},
    {"eval", "&data path='x' /\n&eval attention_at='7 9' /",
     "t:2:20: eval%attention_at needs eval%attention_file, the file for the weights at these tokens"},
    {"eval", "&data path='x' /\n&eval attention_at=' ' attention_file='a' /",
     "t:2:20: eval%attention_at = ' ' is no list of tokens: whole numbers with blanks between"},
    {"generate", "&data path='x' /", "t: generate needs generate%prompt or generate%prompt_file, the text to continue"},
    {"generate", "&data path='x' /\n&generate prompt_file='p' /", NULL},
    {"generate", "&data path='x' /\n&generate prompt='a' prompt_file='p' /",
     "t:2:18: generate%prompt and generate%prompt_file exclude each other"},
    {"generate", "&data path='x' /\n&generate prompt='Once' /", NULL},
    {"compress", "&compress output='o' /", "t: compress needs compress%input, the file to read"},
    {"decompress", "&compress input='i' /", "t: decompress needs compress%output, the file to write"},
    {"decompress", "&run directory='' /\n&compress input='i' output='o' /",
     "t:1:16: decompress needs run%directory, the folder of the run"},
    {"compress", "&compress input='i' output='o' /\n&device backend='cuda' /",
     "t:2:17: compress computes on the CPU, where a model predicts the same bits each time: device%backend = 'cuda' is "
     "not for it"},
    {"compress", "&run directory='' /\n&compress input='i' output='o' checkpoint='c' /", NULL},
};

static void test_commands(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
    vd_error err = {0};
    if (vd_settings_read_text(s, commands[i].deck, "t", &err)) fail_msg("%s", err.message);
    int status = vd_settings_check(s, commands[i].command, &err);
    assert_int_equal(status, commands[i].message ? VD_USAGE : VD_OK);
    assert_string_equal(err.message, commands[i].message ? commands[i].message : "");
  }
  free(s);
}

/* A choice becomes its enum; a word of earlier versions is refused in a deck and translated in a file's settings. */
static void test_choices(void **state) {
  (void)state;
  vd_settings s;
  vd_error err = {0};
  const char *deck = "&model init='toolkit', arch='transformer_xl' /\n&device precision='fp16', comm='mpi' /\n";
  assert_int_equal(vd_settings_read_text(&s, deck, "file", &err), VD_OK);
  assert_int_equal(s.model.init, VD_INIT_FAIRSEQ);
  assert_int_equal(s.model.arch, VD_TRANSFORMER_XL);
  assert_int_equal(s.device.precision, VD_FP16);
  assert_int_equal(s.device.comm, VD_COMM_MPI);
  assert_int_equal(s.eval.split, VD_SPLIT_TEST);
  char *echo = vd_settings_echo(&s);
  assert_non_null(strstr(echo, "init = 'fairseq'"));
  free(echo);
  const char *path = "test_choices.nml";
  FILE *f = fopen(path, "w");
  fputs("&model init='toolkit' /\n", f);
  fclose(f);
  assert_int_equal(vd_settings_read(&s, path, NULL, 0, NULL, &err), VD_USAGE);
  assert_non_null(strstr(err.message, "is called 'fairseq' now"));
  unlink(path);
  err = (vd_error){0};
  assert_int_equal(vd_settings_read_text(&s, "&span softmax='mask' /", "file", &err), VD_USAGE);
  assert_non_null(strstr(err.message, "'masked' or 'trimmed'"));
}

/* Every variable away from its default, strings with quotes, reals that need all digits: the echo brings all back. */
static void test_echo(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s), *back = vd_calloc(1, sizeof *back);
  vd_error err = {0};
  vd_settings_default(s);
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    char *at = (char *)s + v->offset;
    if (v->type == VD_INTEGER) *(int64_t *)(void *)at += v->max > 100 ? 1 : 0;
    if (v->type == VD_REAL) *(double *)(void *)at = v->max <= 1 ? 1.0 / 3 : *(double *)(void *)at < 1 ? 0.1 + 0.2 : 3;
    if (v->type == VD_LOGICAL) *(bool *)(void *)at = !*(bool *)(void *)at;
    if (v->type == VD_CHOICE) *(int *)(void *)at = *(int *)(void *)at == 1 ? 0 : 1;
    if (v->type == VD_STRING) snprintf(at, v->size, "it's '' \"%zu\" ! / & \xC3\xA9", i);
  }
  s->model.d_head = 7;
  s->model.d_model = 514; /* the other architecture wants it even */
  s->prepare.source[0] = 0;
  s->prepare.train = 0.1 + 0.2;
  memset(s->prepare.train_text, 0, sizeof s->prepare.train_text);
  memset(s->run.title, 0, VD_TEXT);
  memset(s->run.title, '\'', VD_TEXT - 1); /* the longest text there is, as written */
  char *echo = vd_settings_echo(s);
  if (vd_settings_read_text(back, echo, "echo", &err)) fail_msg("%s\n%s", err.message, echo);
  for (size_t i = 0; i < vd_n_variables; i++) {
    const vd_variable *v = &vd_variables[i];
    char a[2 * VD_PATH + 3], b[2 * VD_PATH + 3];
    vd_variable_value(v, s, a, sizeof a);
    vd_variable_value(v, back, b, sizeof b);
    assert_string_equal(a, b);
    if (v->type != VD_STRING) assert_memory_equal((char *)s + v->offset, (char *)back + v->offset, v->size);
  }
  assert_string_equal(s->run.title, back->run.title);
  assert_string_equal(s->data.path, back->data.path);
  free(echo);
  free(s);
  free(back);
}

static void test_nearest(void **state) {
  (void)state;
  assert_int_equal(vd_edit_distance("kitten", "sitting"), 3);
  assert_int_equal(vd_edit_distance("lr", "rl"), 1);
  assert_int_equal(vd_edit_distance("", "abc"), 3);
  assert_string_equal(vd_variable_nearest("data", "batch_stream")->name, "batch_streams");
  assert_string_equal(vd_variable_nearest("model", "atn_span")->group, "span");
  assert_string_equal(vd_group_nearest("optimiser"), "optimizer");
}

static int help(const char *what, char *out, size_t n, vd_error *err) {
  FILE *f = fmemopen(out, n, "w");
  assert_non_null(f);
  *err = (vd_error){0};
  int status = vd_settings_help(what, f, err);
  fclose(f);
  return status;
}

static void test_help(void **state) {
  (void)state;
  enum { N = 65536 };
  char *out = vd_calloc(N, 1);
  vd_error err;
  assert_int_equal(help("SPAN%Ramp", out, N, &err), VD_OK);
  assert_non_null(strstr(out, "span%ramp = 32\n"));
  assert_non_null(strstr(out, "allowed: an integer from 1 to"));
  assert_non_null(strstr(out, "fairseq's flag: --adapt-span-ramp"));
  assert_int_equal(help("&span", out, N, &err), VD_OK);
  assert_non_null(strstr(out, "span%softmax = 'masked'"));
  assert_null(strstr(out, "run%seed"));
  assert_int_equal(help(NULL, out, N, &err), VD_OK);
  for (size_t i = 0; i < vd_n_variables; i++) {
    char name[VD_TEXT];
    snprintf(name, sizeof name, "%s%%%s = %s\n", vd_variables[i].group, vd_variables[i].name, vd_variables[i].preset);
    assert_non_null(strstr(out, name));
  }
  assert_int_equal(help("span%rampe", out, N, &err), VD_USAGE);
  assert_string_equal(err.message, "no variable \"span%rampe\" in a deck; the nearest known one is span%ramp");
  assert_int_equal(help("tokens_per_sampl", out, N, &err), VD_USAGE);
  assert_non_null(strstr(err.message, "tokens_per_sample"));
  assert_int_equal(help("spam", out, N, &err), VD_USAGE);
  assert_string_equal(err.message, "no group \"spam\" in a deck; the nearest known group is span");
  free(out);
}

/* A folder of its own: another build of the same test may run beside this one. */
static int setup(void **state) {
  (void)state;
  const char *base = getenv("TMPDIR");
  char folder[256];
  snprintf(folder, sizeof folder, "%s/test-settings-XXXXXX", base ? base : "/tmp");
  return mkdtemp(folder) && chdir(folder) == 0 ? 0 : -1;
}

static int teardown(void **state) {
  (void)state;
  return system("rm -rf \"$PWD\"");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_table),
                                     cmocka_unit_test(test_read),
                                     cmocka_unit_test(test_messages),
                                     cmocka_unit_test(test_long_string),
                                     cmocka_unit_test(test_set),
                                     cmocka_unit_test(test_commands),
                                     cmocka_unit_test(test_choices),
                                     cmocka_unit_test(test_echo),
                                     cmocka_unit_test(test_nearest),
                                     cmocka_unit_test(test_help),
                                     cmocka_unit_test(test_several_errors),
                                     cmocka_unit_test(test_errors_around_faults),
                                     cmocka_unit_test(test_several_rules),
                                     cmocka_unit_test(test_many_errors)};
  return cmocka_run_group_tests(tests, setup, teardown);
}
