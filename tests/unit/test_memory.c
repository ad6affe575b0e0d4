/* The estimate of a run's memory against what model, optimiser and the evaluation's model allocate, and against a GPU
 * that is too small. */
#include "src/train/train.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { BLOCK = 32, STREAMS = 6 };
static const double MIB = 1048576, GIB = 1073741824;

static size_t asked;
static int (*real_alloc)(vd_ops *o, size_t bytes, void **p, vd_error *err);

static int counting_alloc(vd_ops *o, size_t bytes, void **p, vd_error *err) {
  asked += bytes;
  return real_alloc(o, bytes, p, err);
}

static void make(vd_train *t, vd_context *ctx, vd_settings *s, bool valid) {
  static const char deck[] = "&data path='x', tokens_per_sample=32, batch_streams=6 /\n"
                             "&model n_layer=3, d_model=64, n_head=4, d_inner=128 /\n"
                             "&span attn_span=256, ramp=8, init=0.5 /\n&valid interval=10, streams=2 /\n";
  vd_error err = {0};
  vd_settings_read_text(s, deck, "deck", &err);
  if (!valid) s->valid.interval = 0;
  *ctx = (vd_context){.comm = MPI_COMM_WORLD, .size = 1};
  *t = (vd_train){.ctx = ctx, .settings = s, .n_own = STREAMS, .geometry = {.n_stream = STREAMS, .block = BLOCK}};
  assert_int_equal(vd_ops_cpu(&t->ops, 1, &err), VD_OK);
  assert_int_equal(vd_configure_model(&t->config, s, 50, &err), VD_OK);
  assert_string_equal(err.message, "");
}

static void run(vd_model *m, int64_t streams, bool train) {
  vd_error err = {0};
  int32_t *tokens = vd_calloc((size_t)(streams * BLOCK), sizeof *tokens);
  vd_step step = {.x = tokens, .y = tokens, .block = BLOCK, .train = train, .scale = 1};
  assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
  free(tokens);
}

static void matches_what_is_allocated(void **state) {
  (void)state;
  vd_train t;
  vd_context ctx;
  vd_settings s;
  vd_error err = {0};
  vd_model *evaluation;
  vd_train_need need;
  make(&t, &ctx, &s, true);
  real_alloc = t.ops->alloc;
  t.ops->alloc = counting_alloc;
  asked = 0;
  vd_optimizer_config optimizer = {.lr = 0.07, .eps = 1e-10};
  assert_int_equal(vd_model_create(&t.model, &t.config, t.ops, 0, STREAMS, 0, BLOCK, true, &err), VD_OK);
  assert_int_equal(vd_optimizer_create(&t.optimizer, &optimizer, t.model, t.ops, &err), VD_OK);
  run(t.model, STREAMS, true);
  double training = (double)asked;
  assert_int_equal(vd_model_create_shared(&evaluation, t.model, 0, 2, 0, BLOCK, &err), VD_OK);
  run(evaluation, 2, false);
  double validation = (double)asked - training;
  int64_t window = vd_train_first_window(&t.config);
  assert_int_equal(window, vd_model_window(t.model, 0));
  double total = vd_train_memory(&t, STREAMS, window, &need);
  assert_true(need.backend == 0);
  if (need.evaluator < 0.97 * validation || need.evaluator > 1.1 * validation)
    fail_msg("validation: %.0f bytes estimated, %.0f allocated", need.evaluator, validation);
  if (total - need.evaluator < 0.97 * training || total - need.evaluator > 1.03 * training)
    fail_msg("training: %.0f bytes estimated, %.0f allocated", total - need.evaluator, training);
  vd_model_destroy(evaluation);
  vd_optimizer_destroy(t.optimizer);
  vd_model_destroy(t.model);
  t.ops->destroy(t.ops);
}

/* As on a GPU in bf16. */
static void on_a_gpu(vd_train *t) {
  t->ops->act_size = 2;
  t->device.is_gpu = true;
  t->device.precision = VD_BF16;
}

static void twelve_layers(vd_train *t, vd_settings *s) {
  on_a_gpu(t);
  s->data.tokens_per_sample = 512;
  t->config.n_layer = 12;
  t->config.d_model = 512;
  t->config.n_head = 8;
  t->config.d_head = 64;
  t->config.d_inner = 2048;
  t->config.attn_span = 8192;
  t->config.vocab = 205;
  t->config.dropout = 0.3;
}

/* A bit for each pair of a layer's window: 64 streams, 8 heads, 8 query tiles, 27 key tiles (1584 and 64 tokens, and
 * the query's own) of 64 x 64 pairs. */
static void counts_the_draws_of_all_layers(void **state) {
  (void)state;
  vd_train t;
  vd_context ctx;
  vd_settings s;
  vd_train_need need;
  make(&t, &ctx, &s, false);
  twelve_layers(&t, &s);
  t.n_own = 64;
  vd_train_memory(&t, 64, 1584, &need);
  double with = need.backend;
  t.config.dropout = 0;
  vd_train_memory(&t, 64, 1584, &need);
  assert_true(with - need.backend == 12.0 * 64 * 8 * 8 * 27 * 64 * 64 / 8);
  t.ops->destroy(t.ops);
}

/* That the estimate for n streams with that window, and `cuda` bytes of CUDA's own, is within `bound` of what a GPU
 * took, in bytes. */
static void is_near(vd_train *t, int64_t n, int64_t window, double cuda, double took, double bound) {
  vd_train_need need;
  t->n_own = n;
  double bytes = vd_train_memory(t, n, window, &need) + cuda;
  if (bytes < (1 - bound) * took || bytes > (1 + bound) * took)
    fail_msg("%d streams, %d wide: %.3f GiB estimated, %.3f used", (int)n, (int)t->config.d_model, bytes / GIB,
             took / GIB);
}

/* On an H200: 64 streams of 12 layers at the spans that the benchmark holds (a mean window of 1584 tokens) took 11.19
 * GiB, of which half a GiB is CUDA's own; 16 streams 3.83. Two layers of d_model = 4096 took 2813 MiB, of which 360 are
 * CUDA's own; of d_model = 8192, 9105. */
static void is_near_what_a_gpu_took(void **state) {
  (void)state;
  vd_train t;
  vd_context ctx;
  vd_settings s;
  make(&t, &ctx, &s, false);
  twelve_layers(&t, &s);
  is_near(&t, 16, 1584, 0.5 * GIB, 3.83 * GIB, 0.1);
  is_near(&t, 64, 1584, 0.5 * GIB, 11.19 * GIB, 0.1);
  t.ops->destroy(t.ops);
  make(&t, &ctx, &s, false);
  on_a_gpu(&t);
  s.data.tokens_per_sample = 64;
  t.config.n_layer = 2, t.config.d_inner = 256, t.config.d_head = 64;
  t.config.d_model = 4096, t.config.n_head = 64;
  is_near(&t, 4, 64, 360 * MIB, 2813 * MIB, 0.03);
  t.config.d_model = 8192, t.config.n_head = 128;
  is_near(&t, 4, 64, 360 * MIB, 9105 * MIB, 0.03);
  t.ops->destroy(t.ops);
}

static int64_t few_tokens(int64_t width) {
  return 2048 / width; /* BLOCK */
}

/* What a backend does not compute is refused before a run, that of its validations too. */
static void refuses_sizes(void **state) {
  (void)state;
  vd_train t;
  vd_context ctx;
  vd_settings s;
  vd_error err = {0};
  make(&t, &ctx, &s, true);
  t.ops->max_streams = STREAMS;
  t.ops->max_block = few_tokens;
  assert_int_equal(vd_train_check_sizes(&t, &err), VD_OK);
  t.ops->max_streams = STREAMS - 1;
  assert_int_equal(vd_train_check_sizes(&t, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "a rank has 6 streams at a time"));
  err = (vd_error){0};
  s.data.micro_streams = 3;
  assert_int_equal(vd_train_check_sizes(&t, &err), VD_OK);
  s.data.micro_streams = 0;
  t.ops->max_streams = STREAMS;
  s.valid.streams = STREAMS + 1;
  assert_int_equal(vd_train_check_sizes(&t, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "valid%streams = 7: a rank has 7 streams"));
  err = (vd_error){0};
  ctx.size = 2;
  assert_int_equal(vd_train_check_sizes(&t, &err), VD_OK);
  ctx.size = 1;
  s.valid.interval = 0;
  assert_int_equal(vd_train_check_sizes(&t, &err), VD_OK);
  s.data.tokens_per_sample = BLOCK + 1;
  assert_int_equal(vd_train_check_sizes(&t, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "tokens_per_sample = 33"));
  t.ops->destroy(t.ops);
}

static void refuses_a_gpu_that_is_too_small(void **state) {
  (void)state;
  vd_train t;
  vd_context ctx;
  vd_settings s;
  vd_train_need need;
  vd_error err = {0};
  make(&t, &ctx, &s, true);
  assert_int_equal(vd_train_check_memory(&t, vd_train_first_window(&t.config), &err),
                   VD_OK); /* the CPU is not checked */
  t.device.is_gpu = true;
  t.device.precision = VD_BF16;
  strcpy(t.device.gpu.name, "A small one");
  double total = vd_train_memory(&t, STREAMS, vd_train_first_window(&t.config), &need);
  assert_true(need.backend > need.model.parameters / 2);
  t.device.gpu.free_bytes = (size_t)(total * 1.001);
  assert_int_equal(vd_train_check_memory(&t, vd_train_first_window(&t.config), &err), VD_OK);
  t.device.gpu.free_bytes = (size_t)(total * 0.999);
  assert_int_equal(vd_train_check_memory(&t, vd_train_first_window(&t.config), &err), VD_FAILED);
  assert_non_null(strstr(err.message, "A small one"));
  assert_non_null(strstr(err.message, "1 rank needs"));
  assert_non_null(strstr(err.message, "data%batch_streams"));
  t.ops->destroy(t.ops);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(matches_what_is_allocated),       cmocka_unit_test(counts_the_draws_of_all_layers),
      cmocka_unit_test(is_near_what_a_gpu_took),         cmocka_unit_test(refuses_sizes),
      cmocka_unit_test(refuses_a_gpu_that_is_too_small),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
