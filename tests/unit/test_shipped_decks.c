/* The decks in input/ are right for the commands that they are for, hold the values that they promise, and doc/INPUT.md
 * is what the table says. Paths are relative to $SOURCE, or else to the working directory. */
#include "src/deck/settings.h"

#include <glob.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void source_path(char *out, size_t n, const char *name) {
  const char *source = getenv("SOURCE");
  snprintf(out, n, "%s/%s", source ? source : ".", name);
}

/* Reads input/NAME and checks it for each of the blank-separated commands. */
static void check_deck(const char *name, const char *commands, vd_settings *s) {
  char path[VD_PATH], file[VD_TEXT], command[32];
  vd_error err = {0};
  int used;
  snprintf(file, sizeof file, "input/%s", name);
  source_path(path, sizeof path, file);
  if (vd_settings_read(s, path, NULL, 0, NULL, &err)) fail_msg("%s", err.message);
  for (const char *p = commands; sscanf(p, "%31s%n", command, &used) == 1; p += used)
    if (vd_settings_check(s, command, &err)) fail_msg("%s: %s", command, err.message);
}

static const struct {
  const char *name, *commands;
} decks[] = {
    {"enwik8_prepare.nml", "prepare"},
    {"enwik8_adaptive_span.nml", "train eval"},
    {"enwik8_adaptive_span_paper.nml", "train eval"},
    {"enwik8_adaptive_span_large.nml", "train eval"},
    {"enwik8_adaptive_span_large_paper.nml", "train eval"},
    {"enwik8_adaptive_span_small.nml", "train eval"},
    {"enwik8_eval.nml", "eval"},
    {"enwik8_transformer_xl.nml", "train eval"},
    {"enwik8_transformer_xl_eval.nml", "eval"},
    {"text8_prepare.nml", "prepare"},
    {"text8_adaptive_span.nml", "train eval"},
    {"quickstart.nml", "prepare train eval"},
};
enum { DECKS = sizeof decks / sizeof *decks };

static void test_decks(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  for (size_t i = 0; i < DECKS; i++) check_deck(decks[i].name, decks[i].commands, s);
  free(s);
}

/* No deck lies in input/ that is not in the list above. */
static void test_list(void **state) {
  (void)state;
  char pattern[VD_PATH];
  glob_t found;
  source_path(pattern, sizeof pattern, "input/*.nml");
  assert_int_equal(glob(pattern, 0, NULL, &found), 0);
  for (size_t i = 0; i < found.gl_pathc; i++) {
    const char *name = strrchr(found.gl_pathv[i], '/') + 1;
    bool listed = false;
    for (size_t k = 0; k < DECKS; k++) listed = listed || strcmp(decks[k].name, name) == 0;
    if (!listed) fail_msg("%s is in no test", name);
  }
  assert_int_equal(found.gl_pathc, DECKS);
  globfree(&found);
}

/* A deck of published enwik8 or text8 models: sizes of the model, and what all of them share. */
static void check_recipe(const char *name, bool paper, const int64_t size[3], double dropout, int64_t updates,
                         vd_settings *s) {
  check_deck(name, "train", s);
  assert_int_equal(s->span.softmax, paper ? VD_MASKED : VD_TRIMMED);
  assert_int_equal(s->model.init, paper ? VD_INIT_PUBLISHED : VD_INIT_FAIRSEQ);
  assert_int_equal(s->model.n_layer, size[0]);
  assert_int_equal(s->model.d_model, size[1]);
  assert_int_equal(s->model.n_head, 8);
  assert_int_equal(s->model.d_inner, size[2]);
  assert_true(s->model.dropout == dropout);
  assert_int_equal(s->span.attn_span, 8192);
  assert_int_equal(s->span.ramp, 32);
  assert_true(s->span.aux_loss_scaler == 5e-7);
  assert_true(s->optimizer.clip_step == 0.03);
  assert_true(s->optimizer.lr == 0.07);
  assert_int_equal(s->optimizer.warmup_updates, 32000);
  assert_int_equal(s->run.max_updates, updates);
  assert_int_equal(s->data.batch_streams, 64);
  assert_int_equal(s->data.tokens_per_sample, 512);
}

/* The recipe of fairseq's adaptive_span example; the paper's, which differs from it in two choices; and the paper's of
 * text8, which is longer. */
static void test_recipe(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  const int64_t size[] = {12, 512, 2048};
  check_recipe("enwik8_adaptive_span.nml", false, size, 0.3, 600000, s);
  check_recipe("enwik8_adaptive_span_paper.nml", true, size, 0.3, 600000, s);
  check_recipe("text8_adaptive_span.nml", true, size, 0.3, 900000, s);
  check_deck("enwik8_adaptive_span_small.nml", "train", s);
  assert_int_equal(s->model.n_layer, 8);
  assert_int_equal(s->model.d_model, 256);
  assert_int_equal(s->span.attn_span, 1024);
  free(s);
}

/* The 24-layer model of the paper, with both softmaxes. */
static void test_large(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  const int64_t size[] = {24, 768, 4096};
  check_recipe("enwik8_adaptive_span_large.nml", false, size, 0.4, 150000, s);
  check_recipe("enwik8_adaptive_span_large_paper.nml", true, size, 0.4, 150000, s);
  free(s);
}

static void test_transformer_xl(void **state) {
  (void)state;
  vd_settings *s = vd_calloc(1, sizeof *s);
  check_deck("enwik8_transformer_xl.nml", "train", s);
  assert_int_equal(s->model.arch, VD_TRANSFORMER_XL);
  assert_int_equal(s->model.n_layer, 12);
  assert_int_equal(s->model.d_model, 512);
  assert_int_equal(s->model.n_head, 8);
  assert_int_equal(s->model.d_head, 64);
  assert_int_equal(s->model.d_inner, 2048);
  assert_true(s->model.dropout == 0.1 && s->model.dropatt == 0.0 && s->model.untie_r);
  assert_int_equal(s->memory.mem_len, 512);
  assert_true(s->memory.clamp_len <= 0 && !s->memory.same_length);
  assert_int_equal(s->optimizer.method, VD_ADAM);
  assert_int_equal(s->optimizer.schedule, VD_COSINE);
  assert_true(s->optimizer.lr == 0.00025 && s->optimizer.clip_norm == 0.25);
  assert_int_equal(s->optimizer.warmup_updates, 0);
  assert_int_equal(s->run.max_updates, 400000);
  assert_int_equal(s->data.batch_streams, 60);
  check_deck("enwik8_transformer_xl_eval.nml", "eval", s);
  assert_int_equal(s->eval.tokens_per_sample, 80);
  assert_int_equal(s->memory.mem_len, 2100);
  assert_int_equal(s->memory.clamp_len, 820);
  assert_true(s->memory.same_length);
  assert_int_equal(s->eval.split, VD_SPLIT_VALID);
  free(s);
}

static void test_markdown(void **state) {
  (void)state;
  enum { CAPACITY = 1 << 18 };
  char path[VD_PATH], *made = vd_calloc(CAPACITY, 1), *stored = vd_calloc(CAPACITY, 1);
  FILE *out = fmemopen(made, CAPACITY - 1, "w");
  assert_non_null(out);
  vd_settings_markdown(out);
  assert_int_equal(fclose(out), 0);
  source_path(path, sizeof path, "doc/INPUT.md");
  FILE *in = fopen(path, "r");
  if (!in) fail_msg("cannot read %s", path);
  assert_true(fread(stored, 1, CAPACITY - 1, in) > 0);
  fclose(in);
  if (strcmp(made, stored) != 0) fail_msg("doc/INPUT.md is not what `viaduct input --markdown` prints");
  free(made);
  free(stored);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_decks),          cmocka_unit_test(test_list),
                                     cmocka_unit_test(test_recipe),         cmocka_unit_test(test_large),
                                     cmocka_unit_test(test_transformer_xl), cmocka_unit_test(test_markdown)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
