/* The optimisers' refusals, steps and schedules, initial parameters, and the monitor's warnings. */
#include "src/model/optimizer.h"
#include "src/train/monitor.h"

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

/* After the warmup half a period of the cosine down to min_lr, and no further. */
static void turns_down_as_a_cosine(void **state) {
  (void)state;
  struct fixture f;
  vd_optimizer_config config = recipe;
  config.schedule = VD_COSINE;
  config.min_lr = 0.01;
  config.max_updates = 24;
  open_fixture(&f, &config);
  const double pi = acos(-1.0);
  assert_true(fabs(vd_optimizer_lr(f.optimizer, 1) - 0.07 / 2) < 1e-15);
  assert_true(fabs(vd_optimizer_lr(f.optimizer, 4) - 0.07) < 1e-15);
  assert_true(fabs(vd_optimizer_lr(f.optimizer, 14) - 0.04) < 1e-15);
  assert_true(fabs(vd_optimizer_lr(f.optimizer, 23) - (0.01 + 0.03 * (1 + cos(pi * 19 / 20)))) < 1e-15);
  assert_true(vd_optimizer_lr(f.optimizer, 24) == 0.01 && vd_optimizer_lr(f.optimizer, 1000) == 0.01);
  close_fixture(&f);
}

/* First step of Adam: every element with a gradient moves by lr; the states are of the clipped gradient. */
static void steps_as_adam(void **state) {
  (void)state;
  struct fixture f;
  vd_error err = {0};
  double norm;
  vd_optimizer_config config = {
      .method = VD_ADAM, .lr = 0.01, .eps = 1e-8, .beta1 = 0.9, .beta2 = 0.999, .clip_norm = 0.5};
  open_fixture(&f, &config);
  const vd_param *bias = find(f.model, "out_emb.bias");
  size_t at = bias->at.offset;
  real *p = vd_model_params(f.model), *g = vd_model_gradients(f.model), was[3] = {p[at], p[at + 1], p[at + 2]};
  g[at] = 3;
  g[at + 1] = -4;
  assert_int_equal(vd_optimizer_update(f.optimizer, 0, &norm, &err), VD_OK);
  assert_true(fabs(norm - 5.0) < 1e-6);
  assert_true(fabs((double)(was[0] - p[at]) - 0.01) < 1e-6 && fabs((double)(p[at + 1] - was[1]) - 0.01) < 1e-6);
  assert_true(p[at + 2] == was[2]);
  assert_int_equal(vd_optimizer_n_state(f.optimizer), 2);
  assert_string_equal(vd_optimizer_state_name(f.optimizer, 0), "adam_m");
  assert_string_equal(vd_optimizer_state_name(f.optimizer, 1), "adam_v");
  assert_true(fabs((double)vd_optimizer_state(f.optimizer, 0)[at] - 0.1 * 0.3) < 1e-7);
  assert_true(fabs((double)vd_optimizer_state(f.optimizer, 1)[at + 1] - 0.001 * 0.16) < 1e-8);
  close_fixture(&f);
}

/* A backend without what Transformer-XL and Adam need says so instead of crashing. */
static void names_what_a_backend_lacks(void **state) {
  (void)state;
  struct fixture f;
  vd_error err = {0};
  open_fixture(&f, &recipe);
  vd_ops lacking = *f.ops;
  lacking.adam = NULL;
  lacking.position_encodings = NULL;
  vd_optimizer *optimizer = NULL;
  vd_optimizer_config config = {.method = VD_ADAM, .lr = 0.01};
  assert_int_equal(vd_optimizer_create(&optimizer, &config, f.model, &lacking, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "Adam"));
  vd_model *model = NULL;
  vd_model_config xl = *vd_model_config_of(f.model);
  xl.arch = VD_TRANSFORMER_XL;
  err = (vd_error){0};
  assert_int_equal(vd_model_create(&model, &xl, &lacking, 0, 1, 0, 4, true, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "Transformer-XL"));
  assert_null(model);
  close_fixture(&f);
}

static void draws_transformer_xl(void **state) {
  (void)state;
  struct fixture f = {0};
  vd_error err = {0};
  vd_model_config c = {.arch = VD_TRANSFORMER_XL,
                       .vocab = 50,
                       .n_layer = 2,
                       .d_model = 64,
                       .n_head = 2,
                       .d_head = 16,
                       .d_inner = 96,
                       .mem_len = 8,
                       .seed = 3};
  assert_int_equal(vd_ops_cpu(&f.ops, 1, &err), VD_OK);
  assert_int_equal(vd_model_create(&f.model, &c, f.ops, 0, 1, 0, 4, true, &err), VD_OK);
  for (int i = 0; i < vd_model_n_param(f.model); i++) {
    const vd_param *p = vd_model_param(f.model, i);
    bool norm = strstr(p->name, "layer_norm.weight") != NULL, drawn = p->rank == 2 || norm;
    double mean = norm ? 1 : 0, n = (double)p->at.size, sum = 0, square = 0;
    for (size_t e = 0; e < p->at.size; e++) {
      double x = (double)vd_model_params(f.model)[p->at.offset + e] - mean;
      sum += x;
      square += x * x;
    }
    if (!drawn)
      assert_true(square == 0);
    else if (fabs(sum / n) > 4 * 0.02 / sqrt(n) || fabs(sqrt(square / n) / 0.02 - 1) > 4 / sqrt(2 * n))
      fail_msg("%s: mean %g, standard deviation %g", p->name, mean + sum / n, sqrt(square / n));
  }
  /* untie_r is off: one pair of biases; the output has no weights of its own */
  find(f.model, "r_w");
  find(f.model, "r_r");
  assert_int_equal(vd_model_n_param(f.model), 4 + 2 * 11);
  vd_model_destroy(f.model);
  f.ops->destroy(f.ops);
}

/* nats of two blocks by an evaluation's model */
static double nats(vd_model *m) {
  static const int32_t x[8] = {1, 5, 2, 7, 3, 3, 9, 0}, y[8] = {5, 2, 7, 3, 3, 9, 0, 4};
  vd_error err = {0};
  double sum = 0;
  vd_model_params_changed(m);
  assert_int_equal(vd_model_reset_memory(m, &err), VD_OK);
  for (int b = 0; b < 2; b++) {
    double nll;
    vd_step step = {.x = x + 4 * b, .y = y + 4 * b, .block = 4, .nll_sum = &nll};
    assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
    sum += nll;
  }
  return sum;
}

/* A model that shares another's parameters sees them change, wider windows included, and starts each run afresh. */
static void evaluates_shared_parameters(void **state) {
  (void)state;
  struct fixture f;
  vd_error err = {0};
  double before, after;
  vd_model *shared, *own;
  open_fixture(&f, &recipe);
  const vd_model_config *config = vd_model_config_of(f.model);
  assert_int_equal(vd_model_create_shared(&shared, f.model, 0, 1, 0, 4, &err), VD_OK);
  assert_int_equal(vd_model_create(&own, config, f.ops, 0, 1, 0, 4, false, &err), VD_OK);
  assert_ptr_equal(vd_model_params(shared), vd_model_params(f.model));
  before = nats(shared);
  assert_true(before > 0 && before == nats(shared) && before == nats(own));
  for (int i = 0; i < vd_model_n_param(f.model); i++) {
    const vd_param *p = vd_model_param(f.model, i);
    if (p->is_span) vd_model_params(f.model)[p->at.offset] = 1;
  }
  vd_model_params(f.model)[find(f.model, "out_emb.bias")->at.offset + 5] += 1;
  vd_model_params_changed(f.model);
  memcpy(vd_model_params(own), vd_model_params(f.model), vd_model_arena(own) * sizeof(real));
  after = nats(shared);
  assert_true(after != before && after == nats(own));
  float span[4];
  vd_model_spans(shared, span);
  assert_true(span[0] == 16 && span[1] == 0);
  vd_model_destroy(shared);
  vd_model_destroy(own);
  assert_true(vd_model_params(f.model)[0] == 1); /* still there */
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
    vd_monitor_check(m, MPI_COMM_WORLD, update, 4.05, warning, sizeof warning);
    if (warning[0]) {
      said++;
      assert_int_equal(update, 200);
      assert_non_null(strstr(warning, "4.00 bpc"));
    }
  }
  assert_int_equal(said, 1);
  vd_monitor_destroy(m);
}

/* A run of 12 layers that collapsed, every 25 updates, and how runs that learn slowly pass the same place: as bits
 * below and above the entropy of single symbols. */
static void speaks_of_a_loss_that_wanders(void **state) {
  (void)state;
  static const double collapsed[] = {1.35, .50,  .26,  .16,  .13,  .10,  .04,  -.10, -.15, -.09, -.19, -.25,
                                     -.23, -.18, -.15, -.23, -.25, -.22, -.15, -.13, -.20, -.07, -.07, -.13};
  static const double slow[] = {2.5, 2.1, 1.6, .94, .4, .11, -.22, -.46, -.58, -.63};
  static const double crawling[] = {.09,  .05,  .01,  -.03, -.07, -.11, -.15, -.19,
                                    -.23, -.27, -.31, -.35, -.39, -.43, -.47, -.51};
  vd_monitor *m = watch();
  char warning[512];
  for (int i = 0; i < 24; i++) {
    vd_monitor_check(m, MPI_COMM_WORLD, 25 * (i + 1), 4 + collapsed[i], warning, sizeof warning);
    if (i != 19) assert_string_equal(warning, "");
    if (i == 19) assert_non_null(strstr(warning, "since update 300 the loss has stayed near 4.00 bpc"));
  }
  vd_monitor_destroy(m);
  m = watch();
  for (int i = 0; i < 10; i++) {
    vd_monitor_check(m, MPI_COMM_WORLD, 25 * (i + 1), 4 + slow[i], warning, sizeof warning);
    assert_string_equal(warning, "");
  }
  vd_monitor_destroy(m);
  m = watch();
  for (int i = 0; i < 16; i++) {
    vd_monitor_check(m, MPI_COMM_WORLD, 50 * (i + 1), 4 + crawling[i], warning, sizeof warning);
    assert_string_equal(warning, "");
  }
  vd_monitor_check(m, MPI_COMM_WORLD, 900, NAN, warning, sizeof warning);
  assert_string_equal(warning, "");
  vd_monitor_destroy(m);
}

static void is_silent_on_a_healthy_run(void **state) {
  (void)state;
  vd_monitor *m = watch();
  char warning[512];
  double bpc[] = {8.0, 5.0, 4.08, 4.02, 3.95, 3.5, 3.0, 3.2, 2.9};
  for (int i = 0; i < 9; i++) {
    vd_monitor_check(m, MPI_COMM_WORLD, 50 * i, bpc[i], warning, sizeof warning);
    assert_string_equal(warning, "");
  }
  vd_monitor_check(m, MPI_COMM_WORLD, 450, 3.95, warning, sizeof warning);
  assert_non_null(strstr(warning, "risen to 3.95 bpc, from 2.90"));
  vd_monitor_check(m, MPI_COMM_WORLD, 500, 3.96, warning, sizeof warning);
  assert_string_equal(warning, "");
  vd_monitor_destroy(m);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(warms_up),
      cmocka_unit_test(refuses_what_is_not_finite),
      cmocka_unit_test(steps_and_clamps),
      cmocka_unit_test(turns_down_as_a_cosine),
      cmocka_unit_test(steps_as_adam),
      cmocka_unit_test(names_what_a_backend_lacks),
      cmocka_unit_test(draws_transformer_xl),
      cmocka_unit_test(evaluates_shared_parameters),
      cmocka_unit_test(speaks_of_a_stall_once),
      cmocka_unit_test(speaks_of_a_loss_that_wanders),
      cmocka_unit_test(is_silent_on_a_healthy_run),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
