/* The optimiser's refusals and schedule, and the monitor's warnings. */
#include "monitor.h"
#include "optimizer.h"

#include <math.h>
#include <mpi.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct fixture {
  vd_ops *ops;
  vd_model *model;
  vd_optimizer *optimizer;
};

static const vd_optimizer_config recipe = {.lr = 0.07, .eps = 1e-10, .warmup_updates = 4};

static void open_fixture(struct fixture *f, const vd_optimizer_config *config) {
  vd_error err = {0};
  vd_model_config c = {.vocab = 11,
                       .n_layer = 2,
                       .d_model = 8,
                       .n_head = 2,
                       .d_head = 4,
                       .d_inner = 12,
                       .attn_span = 16,
                       .ramp = 4,
                       .softmax = VD_MASKED,
                       .seed = 1};
  assert_int_equal(vd_ops_cpu(&f->ops, 1, &err), VD_OK);
  assert_int_equal(vd_model_create(&f->model, &c, f->ops, 0, 1, 0, 4, true, &err), VD_OK);
  assert_int_equal(vd_optimizer_create(&f->optimizer, config, f->model, f->ops, &err), VD_OK);
}

static void close_fixture(struct fixture *f) {
  vd_optimizer_destroy(f->optimizer);
  vd_model_destroy(f->model);
  f->ops->destroy(f->ops);
}

static const vd_param *find(const vd_model *m, const char *name) {
  for (int i = 0; i < vd_model_n_param(m); i++)
    if (strcmp(vd_model_param(m, i)->name, name) == 0) return vd_model_param(m, i);
  fail_msg("no tensor %s", name);
  return NULL;
}

static void warms_up(void **state) {
  (void)state;
  struct fixture f;
  open_fixture(&f, &recipe);
  assert_true(fabs(vd_optimizer_lr(f.optimizer, 0) - 0.07 / 4) < 1e-15);
  assert_true(fabs(vd_optimizer_lr(f.optimizer, 2) - 0.07 * 3 / 4) < 1e-15);
  assert_true(vd_optimizer_lr(f.optimizer, 3) == 0.07 && vd_optimizer_lr(f.optimizer, 1000) == 0.07);
  close_fixture(&f);
}

/* NaN and infinity, in a tensor of a layer and in one of none: named, and nothing changes. */
static void refuses_what_is_not_finite(void **state) {
  (void)state;
  static const struct {
    const char *name, *layer;
    double value;
  } cases[] = {{"layers.1.ff.fc1.weight", "layer 1", NAN}, {"out_emb.bias", "no layer", INFINITY}};
  for (int i = 0; i < 2; i++) {
    struct fixture f;
    vd_error err = {0};
    double norm;
    open_fixture(&f, &recipe);
    size_t bytes = vd_model_arena(f.model) * sizeof(real);
    real *before = malloc(bytes);
    memcpy(before, vd_model_params(f.model), bytes);
    for (size_t k = 0; k < vd_model_arena(f.model); k++) vd_model_gradients(f.model)[k] = (real)0.1;
    vd_model_gradients(f.model)[find(f.model, cases[i].name)->at.offset + 3] = (real)cases[i].value;
    assert_int_equal(vd_optimizer_update(f.optimizer, 6, &norm, &err), VD_FAILED);
    assert_non_null(strstr(err.message, "update 7"));
    assert_non_null(strstr(err.message, cases[i].name));
    assert_non_null(strstr(err.message, cases[i].layer));
    assert_memory_equal(before, vd_model_params(f.model), bytes);
    assert_string_equal(vd_monitor_not_finite(f.model, f.ops, vd_model_gradients(f.model))->name, cases[i].name);
    assert_null(vd_monitor_not_finite(f.model, f.ops, vd_model_params(f.model)));
    free(before);
    close_fixture(&f);
  }
}

/* First step of Adagrad: every element moves by lr, whatever clip_norm does; spans stay within 0..1. */
static void steps_and_clamps(void **state) {
  (void)state;
  struct fixture f;
  vd_error err = {0};
  double norm;
  vd_optimizer_config config = recipe;
  config.warmup_updates = 0;
  config.clip_norm = 0.5;
  open_fixture(&f, &config);
  const vd_param *bias = find(f.model, "out_emb.bias");
  const vd_param *span = find(f.model, "layers.0.attn.attn.adaptive_span._mask.current_val");
  real *p = vd_model_params(f.model), *g = vd_model_gradients(f.model), was = p[bias->at.offset];
  g[bias->at.offset] = 3;
  g[span->at.offset] = 4; /* downhill from 0: must stay 0 */
  assert_int_equal(vd_optimizer_update(f.optimizer, 0, &norm, &err), VD_OK);
  assert_true(fabs(norm - 5.0) < 1e-6); /* before the clip */
  assert_true(fabs((double)(was - p[bias->at.offset]) - 0.07) < 1e-6);
  assert_true(p[span->at.offset] == 0);
  /* the accumulator holds the clipped gradient: 3 * 0.5 / 5, squared */
  assert_true(fabs((double)vd_optimizer_state(f.optimizer, 0)[bias->at.offset] - 0.09) < 1e-6);
  close_fixture(&f);
}

/* 16 equally frequent symbols: 4 bits. */
static vd_monitor *watch(void) {
  vd_monitor *m = vd_monitor_create(16);
  int32_t y[17];
  for (int i = 0; i < 16; i++) y[i] = i;
  y[16] = -1;
  vd_monitor_count(m, y, 17);
  return m;
}

static void speaks_of_a_stall_once(void **state) {
  (void)state;
  vd_monitor *m = watch();
  char warning[512];
  int said = 0;
  for (int64_t update = 0; update <= 1000; update += 50) {
    vd_monitor_judge(m, MPI_COMM_WORLD, update, 4.05, warning, sizeof warning);
    if (warning[0]) {
      said++;
      assert_int_equal(update, 200);
      assert_non_null(strstr(warning, "4.00 bpc"));
    }
  }
  assert_int_equal(said, 1);
  vd_monitor_destroy(m);
}

static void is_silent_on_a_healthy_run(void **state) {
  (void)state;
  vd_monitor *m = watch();
  char warning[512];
  double bpc[] = {8.0, 5.0, 4.08, 4.02, 3.95, 3.5, 3.0, 3.2, 2.9};
  for (int i = 0; i < 9; i++) {
    vd_monitor_judge(m, MPI_COMM_WORLD, 50 * i, bpc[i], warning, sizeof warning);
    assert_string_equal(warning, "");
  }
  vd_monitor_judge(m, MPI_COMM_WORLD, 450, 3.95, warning, sizeof warning);
  assert_non_null(strstr(warning, "risen to 3.95 bpc, from 2.90"));
  vd_monitor_judge(m, MPI_COMM_WORLD, 500, 3.96, warning, sizeof warning);
  assert_string_equal(warning, "");
  vd_monitor_destroy(m);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(warms_up),
      cmocka_unit_test(refuses_what_is_not_finite),
      cmocka_unit_test(steps_and_clamps),
      cmocka_unit_test(speaks_of_a_stall_once),
      cmocka_unit_test(is_silent_on_a_healthy_run),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
