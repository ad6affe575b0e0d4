/* Losses and gradients that overflow under a loss scale: skipped updates, their bound, what a checkpoint keeps of them.
 * The CPU never scales its losses by itself; here an optimiser that does stands in the run's, and a cross entropy that
 * loses a loss now and then in the backend's. */
#include "tests/unit/small_run.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const vd_optimizer_config recipe = {
    .lr = 0.07, .eps = 1e-10, .clip_step = 0.03, .loss_scale = 128, .loss_scale_window = 4};

/* The backend of a fixture, whose losses of these updates (counted from 0) are lost. */
static void (*real_cross_entropy)(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                                  const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits);
static int64_t first_lost, last_lost, passes;

static void lossy_cross_entropy(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                                const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits) {
  real_cross_entropy(o, n, vocab, stride, logits, targets, scale, loss_sum, nll, dlogits);
  if (passes >= first_lost && passes <= last_lost) *loss_sum = INFINITY; /* the gradients stay finite */
  passes++;
}

static void lose(vd_train *t, int64_t first, int64_t last) {
  real_cross_entropy = t->ops->cross_entropy;
  t->ops->cross_entropy = lossy_cross_entropy;
  first_lost = first;
  last_lost = last;
  passes = 0;
}

/* Opens a run of `updates` and puts an optimiser that scales its losses into it. */
static void open_run(struct small_run *f, const char *name, int updates, const vd_optimizer_config *config) {
  vd_error err = {0};
  char run[64];
  snprintf(run, sizeof run, "max_updates=%d, log_interval=1", updates);
  small_run_open(f, name, run,
                 "&model n_layer=1, d_model=8, n_head=2, d_inner=16 /\n&span attn_span=16, ramp=4 /\n"
                 "&valid interval=0 /\n&checkpoint interval=1000 /\n&trace interval=1 /");
  vd_optimizer_destroy(f->t.optimizer);
  vd_optimizer_create(&f->t.optimizer, config, f->t.model, f->t.ops, &err);
  assert_string_equal(err.message, "");
  vd_update_pipeline_destroy(f->t.pipeline);
  f->t.pipeline = vd_update_pipeline_create(f->t.model, f->t.optimizer, f->t.ops);
}

static vd_loss_scale scaling_of(const vd_train *t) {
  vd_loss_scale l;
  assert_true(vd_optimizer_scaling(t->optimizer, &l));
  return l;
}

static void assert_scaling(const vd_train *t, double scale, int64_t clean, int64_t skipped) {
  vd_loss_scale l = scaling_of(t);
  assert_true(l.scale == scale);
  assert_int_equal(l.clean, clean);
  assert_int_equal(l.skipped, skipped);
}

/* The third update of six is lost: nothing moves in it, the scale is halved, the log has it, the run continues. */
static void skips_a_lost_loss(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  open_run(f, "skip", 6, &recipe);
  vd_train *t = &f->t;
  lose(t, 2, 2);
  assert_int_equal(vd_train_loop(t, &err), VD_OK);
  assert_int_equal(t->progress.update, 6);
  assert_scaling(t, 64, 3, 1);
  char log[8000];
  small_run_log(f, log, sizeof log);
  const char *line = strstr(log, "\"num_updates\":3,");
  assert_non_null(line);
  assert_non_null(strstr(line, "\"loss\":null,\"bpc\":null"));
  assert_true(strstr(line, "\"loss\":null") < strstr(line, "\"num_updates\":4,"));
  assert_null(strstr(strstr(line, "\"num_updates\":4,"), "null")); /* what follows is whole again */
  assert_non_null(strstr(line, "\"loss_scale\":64.0,\"skipped\":1"));
  vd_train_close(t, &err);
}

/* Parameters and state are as they were, and the memories, which may hold what overflowed, are zeros. */
static void leaves_parameters_alone(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  open_run(f, "alone", 1, &recipe);
  vd_train *t = &f->t;
  size_t bytes = vd_model_arena(t->model) * sizeof(real);
  real *before = vd_calloc(1, bytes);
  memcpy(before, vd_model_params(t->model), bytes);
  lose(t, 0, 0);
  assert_int_equal(vd_train_loop(t, &err), VD_OK);
  assert_memory_equal(before, vd_model_params(t->model), bytes);
  assert_int_equal(t->progress.update, 1);
  for (size_t i = 0; i < vd_model_arena(t->model); i++) assert_true(vd_optimizer_state(t->optimizer, 0)[i] == 0);
  free(before);
  int64_t values = vd_model_memory_rows(t->model, 0) * 8;
  real *memory = vd_calloc((size_t)values, sizeof *memory);
  vd_model_memory_get(t->model, 0, 1, 1, memory);
  for (int64_t i = 0; i < values; i++) assert_true(memory[i] == 0);
  free(memory);
  vd_train_close(t, &err);
}

/* 128 / 2^21 is the first below 1e-4. */
static void ends_where_every_loss_is_lost(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  open_run(f, "end", 100, &recipe);
  vd_train *t = &f->t;
  lose(t, 0, 1000);
  assert_int_equal(vd_train_loop(t, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "the loss scale has fallen below 1e-4: update 21: the loss is not finite"));
  assert_int_equal(t->progress.update, 20);
  vd_train_close(t, &err);
}

/* Without a loss scale the first one ends the run. */
static void ends_without_a_loss_scale(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  vd_optimizer_config plain = recipe;
  plain.loss_scale = 0;
  open_run(f, "plain", 5, &plain);
  lose(&f->t, 1, 1);
  assert_int_equal(vd_train_loop(&f->t, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "update 2: the loss is not finite (inf); all parameters are finite"));
  vd_train_close(&f->t, &err);
}

static void save(vd_train *t, const char *path) {
  vd_error err = {0};
  const vd_snapshot s = vd_train_snapshot(t);
  vd_snapshot_write(&s, path, &t->progress, &err);
  vd_task_queue_wait(t->writer, &err);
  assert_string_equal(err.message, "");
}

static void load(vd_train *t, const char *path) {
  vd_error err = {0};
  const vd_snapshot s = vd_train_snapshot(t);
  vd_snapshot_read(&s, path, &t->progress, &err);
  assert_string_equal(err.message, "");
  vd_reader_stop(t->reader);
  t->reader = NULL;
  vd_reader_start(&t->reader, t->corpus, "train", &t->geometry, 0, 2, t->progress.update, -1, 1, &err);
  assert_string_equal(err.message, "");
}

/* Six updates, the second of them lost, and eight more, against the eight alone from a checkpoint of the six. */
static void resumes_the_same_bits(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  char path[400];
  snprintf(path, sizeof path, "%s/six.h5", f->folder);
  open_run(f, "whole", 6, &recipe);
  vd_train *t = &f->t;
  lose(t, 1, 1);
  assert_int_equal(vd_train_loop(t, &err), VD_OK);
  assert_scaling(t, 128, 0, 1); /* halved at the second, doubled after four more */
  save(t, path);
  f->settings.run.max_updates = 14;
  assert_int_equal(vd_train_loop(t, &err), VD_OK);
  vd_loss_scale whole = scaling_of(t);
  assert_true(whole.scale == 512);
  size_t bytes = vd_model_arena(t->model) * sizeof(real);
  real *end = vd_calloc(1, bytes);
  memcpy(end, vd_model_params(t->model), bytes);
  vd_train_close(t, &err);

  vd_optimizer_config other = recipe;
  other.loss_scale = 3;
  open_run(f, "resumed", 14, &other);
  load(t, path);
  assert_scaling(t, 128, 0, 1);
  assert_int_equal(vd_train_loop(t, &err), VD_OK);
  assert_memory_equal(end, vd_model_params(t->model), bytes);
  assert_scaling(t, whole.scale, whole.clean, whole.skipped);
  free(end);
  vd_train_close(t, &err);
}

/* From a run that did not scale its losses into one that does, and back. */
static void loads_files_without_and_with(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  vd_optimizer_config plain = recipe;
  char without[400], with[400];
  plain.loss_scale = 0;
  snprintf(without, sizeof without, "%s/without.h5", f->folder);
  snprintf(with, sizeof with, "%s/with.h5", f->folder);
  open_run(f, "without", 2, &plain);
  assert_int_equal(vd_train_loop(&f->t, &err), VD_OK);
  save(&f->t, without);
  vd_train_close(&f->t, &err);
  open_run(f, "with", 3, &recipe);
  load(&f->t, without);
  assert_scaling(&f->t, 128, 0, 0);
  assert_int_equal(vd_train_loop(&f->t, &err), VD_OK);
  save(&f->t, with);
  vd_train_close(&f->t, &err);
  open_run(f, "back", 4, &plain);
  load(&f->t, with);
  vd_loss_scale l;
  assert_false(vd_optimizer_scaling(f->t.optimizer, &l));
  assert_true(vd_optimizer_loss_scale(f->t.optimizer) == 1);
  assert_int_equal(vd_train_loop(&f->t, &err), VD_OK);
  vd_train_close(&f->t, &err);
}

int main(int argc, char **argv) {
  int level;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(skips_a_lost_loss, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(leaves_parameters_alone, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(ends_where_every_loss_is_lost, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(ends_without_a_loss_scale, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(resumes_the_same_bits, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(loads_files_without_and_with, small_run_setup, small_run_teardown),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
