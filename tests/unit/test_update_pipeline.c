/* The pipeline of updates with lag 1: the same parameters and log lines as with lag 0, the order of ops, errors that
 * name their update, history for windows that grow, and rows that memories keep. The CPU, marked as memory that get and
 * put alone reach, stands in for a GPU. */
#include "tests/math/padding.h"
#include "tests/unit/small_run.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { UPDATES = 23 };

/* Spans that move by whole windows in a few updates; log, trace, validation and checkpoint due at the same and at
 * different updates. */
#define SPANS                                                                                                          \
  "&model n_layer=2, d_model=8, n_head=2, d_inner=16, dropout=0.2 /\n"                                                 \
  "&span attn_span=512, ramp=16, softmax='masked', init=%s /\n"                                                        \
  "&optimizer lr=0.07, warmup_updates=2 /\n&valid interval=10, streams=2 /\n"                                          \
  "&checkpoint interval=8 /\n&trace interval=3 /"
#define MEMORIES                                                                                                       \
  "&model arch='transformer_xl', n_layer=2, d_model=8, n_head=2, d_inner=16 /\n&memory mem_len=12 /\n"                 \
  "&optimizer method='adam', lr=0.01, eps=1e-8, clip_norm=0.25 /\n"                                                    \
  "&valid interval=10, streams=2 /\n&checkpoint interval=8 /\n&trace interval=3 /"

static const char RUN[] = "max_updates=23, log_interval=5, seed=3";

/* The value of `key` in a line of the log; NAN for null. */
static double value(const char *line, const char *key) {
  char quoted[64];
  snprintf(quoted, sizeof quoted, "\"%s\":", key);
  const char *at = strstr(line, quoted);
  assert_non_null(at);
  return strncmp(at + strlen(quoted), "null", 4) == 0 ? NAN : atof(at + strlen(quoted));
}

/* The next line of the log with this key, or NULL. */
static const char *next_line(const char *text, const char *key) {
  const char *at = strstr(text, key);
  while (at && at > text && at[-1] != '\n') at--;
  return at;
}
static const char *after(const char *line) {
  return strchr(line, '\n') + 1;
}

static void compare_logs(const char *a, const char *b) {
  static const char *const keys[] = {"num_updates", "loss", "bpc", "lr", "gnorm", "avg_span", "max_span"};
  int lines = 0;
  for (a = next_line(a, "\"gnorm\""), b = next_line(b, "\"gnorm\""); a && b;
       a = next_line(after(a), "\"gnorm\""), b = next_line(after(b), "\"gnorm\""), lines++)
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
      double x = value(a, keys[i]), y = value(b, keys[i]);
      if (!(fabs(x - y) <= 1e-4 * fabs(x))) fail_msg("line %d: %s is %.9g and %.9g", lines, keys[i], x, y);
    }
  assert_true(!a && !b);
  assert_int_equal(lines, 5);
}

/* Trains; log.jsonl into text. Returns the greatest difference of parameters from `params`, or fills it. */
static double train(struct small_run *f, const char *name, const char *groups, int lag, char *text, size_t size,
                    real **params) {
  vd_error err = {0};
  double worst = 0;
  small_run_open(f, name, RUN, groups);
  vd_train *t = &f->t;
  small_run_set_remote(f, lag > 0);
  assert_int_equal(vd_update_pipeline_lag(t->pipeline), lag);
  assert_int_equal(vd_train_loop(t, &err), VD_OK);
  assert_string_equal(err.message, "");
  assert_int_equal(t->progress.update, UPDATES);
  assert_int_equal(vd_update_pipeline_pending(t->pipeline), 0);
  const real *p = vd_model_params(t->model);
  size_t n = vd_model_arena(t->model);
  assert_int_equal(padding_not_zero(t->model, p), 0);
  if (!*params) {
    *params = vd_calloc(n, sizeof **params);
    memcpy(*params, p, n * sizeof *p);
  }
  for (size_t i = 0; i < n; i++) worst = fmax(worst, fabs((double)(p[i] - (*params)[i])));
  t->ops->memory_is_remote = false;
  vd_train_close(t, &err);
  small_run_log(f, text, size);
  return worst;
}

static void same_run(struct small_run *f, const char *groups, int number) {
  static char logs[2][20000];
  char name[2][32];
  real *params = NULL;
  for (int lag = 0; lag < 2; lag++) snprintf(name[lag], sizeof name[lag], "lag-%d-%d", lag, number);
  train(f, name[0], groups, 0, logs[0], sizeof logs[0], &params);
  /* Sums over longer windows round differently, and this short warmup amplifies that to 3e-5. Another window or another
   * memory moves parameters by 1e-3 and more. */
  double off = train(f, name[1], groups, 1, logs[1], sizeof logs[1], &params);
  if (!(off < 2e-4)) fail_msg("parameters differ by %.2e", off);
  compare_logs(logs[0], logs[1]);
  free(params);
}

/* Spans that are learnt, and spans that a large penalty shortens by 30 tokens in an update, from near the longest to 0.
 */
static void the_same_with_spans(void **state) {
  static const char *const spans[] = {"0.0, aux_loss_scaler=5d-7", "0.9, aux_loss_scaler=1.0"};
  char groups[1000];
  for (int i = 0; i < 2; i++) {
    snprintf(groups, sizeof groups, SPANS, spans[i]);
    same_run(*state, groups, i);
  }
}

static void the_same_with_memories(void **state) {
  same_run(*state, MEMORIES, 0);
}

/* A backend whose gradients, and where `loss_too` its loss, are not finite in one update. */
static void (*real_cross_entropy)(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                                  const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits);
static int passes, bad_pass;
static bool loss_too;

static void broken_cross_entropy(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                                 const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits) {
  real_cross_entropy(o, n, vocab, stride, logits, targets, scale, loss_sum, nll, dlogits);
  if (passes++ != bad_pass) return;
  ((real *)dlogits)[3] = NAN;
  if (loss_too) *loss_sum = NAN;
}

/* The run ends one update later and names the update, which changed no parameter. `update` counts from 1. */
static void ends_at(struct small_run *f, int update, bool with_loss) {
  vd_error err = {0};
  char groups[1000], expected[64];
  snprintf(groups, sizeof groups, SPANS, "0.0");
  small_run_open(f, "bad", RUN, groups);
  vd_train *t = &f->t;
  small_run_set_remote(f, true);
  real_cross_entropy = t->ops->cross_entropy;
  t->ops->cross_entropy = broken_cross_entropy;
  passes = 0, bad_pass = update - 1, loss_too = with_loss;
  assert_int_equal(vd_train_loop(t, &err), VD_FAILED);
  snprintf(expected, sizeof expected, "update %d: the %s", update, with_loss ? "loss is not finite" : "gradient of");
  assert_non_null(strstr(err.message, expected));
  assert_non_null(strstr(err.message, "no checkpoint yet"));
  assert_null(vd_monitor_not_finite(t->model, t->ops, vd_model_params(t->model)));
  t->ops->memory_is_remote = false;
  vd_error other = {0};
  vd_train_close(t, &other);
}

static void names_the_update(void **state) {
  for (int i = 0; i < 2; i++) {
    ends_at(*state, 3, i > 0); /* nothing is due after it */
    ends_at(*state, 5, i > 0); /* the log is */
  }
}

/* A model of one layer with spans of `span` tokens. Its memory holds embeddings, whatever the spans were. */
static vd_model *model_of(vd_ops *o, double span) {
  vd_error err = {0};
  vd_model *m;
  vd_model_config c = {.vocab = 11,
                       .n_layer = 1,
                       .d_model = 8,
                       .n_head = 2,
                       .d_head = 4,
                       .d_inner = 12,
                       .attn_span = 1024,
                       .ramp = 4,
                       .span_init = span / 1024,
                       .softmax = VD_MASKED,
                       .seed = 1};
  assert_int_equal(vd_model_create(&m, &c, o, 0, 2, 0, 16, true, &err), VD_OK);
  return m;
}

/* The loss of block `number` of two streams. */
static double block_of(vd_model *m, int number) {
  vd_error err = {0};
  int32_t x[32], y[32];
  for (int i = 0; i < 32; i++) x[i] = (i * i + 3 * number) % 11, y[i] = (x[i] + i + number) % 11;
  vd_step step = {.x = x, .y = y, .block = 16, .update = number};
  assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
  return *vd_model_loss(m);
}

/* Spans that grow by 60 tokens in one step find the history that a model has which was long all the time. */
static void a_window_that_grows_finds_history(void **state) {
  (void)state;
  vd_ops *o;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  for (int lag = 0; lag < 2; lag++) {
    vd_model *grows = model_of(o, 8), *always = model_of(o, 68);
    if (lag > 0) vd_model_set_span_margin(grows, VD_WINDOW_STEP);
    for (int b = 0; b < 30; b++) block_of(grows, b), block_of(always, b);
    for (int h = 0; h < 2; h++) vd_model_params(grows)[h] = (real)(68.0 / 1024);
    if (lag > 0)
      vd_model_params_moved(grows);
    else
      vd_model_params_changed(grows);
    double expected = block_of(always, 30), found = block_of(grows, 30);
    if (!(fabs(found / expected - 1) < 1e-6)) fail_msg("lag %d: %.9g, not %.9g", lag, found, expected);
    vd_model_destroy(grows);
    vd_model_destroy(always);
  }
  o->destroy(o);
}

/* Where a span shrinks and grows again by a step of windows while the host's copy turns old and new, a memory with a
 * margin keeps its rows: it is not allocated again, and the oldest rows are still there. Without a margin the memory
 * follows the window. */
static void memory_keeps_its_rows(void **state) {
  (void)state;
  vd_ops *o;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  for (int lag = 0; lag < 2; lag++) {
    vd_model *m = model_of(o, 400);
    size_t n = vd_model_span_extent(m);
    real *spans = vd_calloc(n, sizeof *spans);
    memcpy(spans, vd_model_params(m), n * sizeof *spans);
    if (lag > 0) vd_model_set_span_margin(m, VD_WINDOW_STEP);
    vd_model_params_moved(m); /* the window is planned with the margin */
    int b = 0;
    while (b < 60) block_of(m, b++); /* fills the memory */
    int64_t rows = vd_model_memory_rows(m, 0), d = 8;
    real *before = vd_calloc((size_t)(2 * rows * d), sizeof *before),
         *after = vd_calloc((size_t)(2 * rows * d), sizeof *after);
    for (int turn = 0; turn < 3; turn++) {
      vd_model_set_spans(m, spans);
      int64_t known = vd_model_window(m, 0);
      block_of(m, b++);
      vd_model_params_moved(m);
      assert_int_equal(vd_model_window(m, 0), known + (lag > 0 ? VD_WINDOW_STEP : 0));
      block_of(m, b++);
      assert_int_equal(vd_model_memory_rows(m, 0), rows);
    }
    vd_model_memory_get(m, 0, 0, 2, before);
    for (size_t i = 0; i < n; i++) spans[i] = (real)((400.0 - VD_WINDOW_STEP) / 1024);
    vd_model_set_spans(m, spans);
    block_of(m, b++);
    int64_t shrunk = vd_model_memory_rows(m, 0);
    assert_int_equal(shrunk, lag > 0 ? rows : rows - VD_WINDOW_STEP);
    for (size_t i = 0; i < n; i++) spans[i] = (real)(400.0 / 1024);
    vd_model_set_spans(m, spans);
    block_of(m, b++);
    assert_int_equal(vd_model_memory_rows(m, 0), rows);
    vd_model_memory_get(m, 0, 0, 2, after);
    /* two blocks of 16 were appended */
    bool same = memcmp(after, before + 32 * d, (size_t)((rows - 32) * d) * sizeof *after) == 0;
    assert_int_equal(same, lag > 0);
    free(spans), free(before), free(after);
    vd_model_destroy(m);
  }
  o->destroy(o);
}

/* The ops that show in which order host and device work, recorded by a backend in front of the CPU's:
 * F forward, B end of backward, P pull, C gradient of the penalty, G gradient statistics, A Adagrad, K clamp of the
 * spans, W copy of the weights, S push; lower case: the host waits (g get, d get_double, s synchronize). */
static vd_ops plain;
static char order[400];
static void record(char op) {
  size_t n = strlen(order);
  if (n + 1 < sizeof order) order[n] = op;
}
static void record_embed(vd_ops *o, int64_t n, int64_t d, const int32_t *x, const real *w, const vd_dropout *drop,
                         vd_act *out) {
  record('F');
  plain.embed(o, n, d, x, w, drop, out);
}
static void record_embed_backward(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *x,
                                  const vd_dropout *drop, vd_act *dout, real *dw) {
  record('B');
  plain.embed_backward(o, n, d, vocab, x, drop, dout, dw);
}
static const void *record_pull(vd_ops *o, int slot, vd_error *err) {
  record('P');
  return plain.pull_stats(o, slot, err);
}
static int record_push(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err) {
  record('S');
  return plain.push_stats(o, slot, n, part, err);
}
static void record_constant(vd_ops *o, real *x, size_t n, double value) {
  record('C');
  plain.add_constant(o, x, n, value);
}
static void record_stats(vd_ops *o, int n, double scale, double clip, double *stats) {
  record('G');
  plain.gradient_stats(o, n, scale, clip, stats);
}
static void record_adagrad(vd_ops *o, real *p, const real *g, real *a, const vd_extent *t, int n, const double *stats,
                           double lr, double eps, double clip) {
  record('A');
  plain.adagrad(o, p, g, a, t, n, stats, lr, eps, clip);
}
static void record_clamp(vd_ops *o, real *x, size_t n) {
  record('K');
  plain.clamp01(o, x, n);
}
static void record_weights(vd_ops *o, const real *p, size_t n) {
  (void)o, (void)p, (void)n;
  record('W');
}
static void record_get(vd_ops *o, real *host, const real *device, size_t n) {
  record('g');
  plain.get(o, host, device, n);
}
static void record_get_double(vd_ops *o, double *host, const double *device, size_t n) {
  record('d');
  plain.get_double(o, host, device, n);
}
static int record_synchronize(vd_ops *o, vd_error *err) {
  record('s');
  return plain.synchronize(o, err);
}

static void record_ops(vd_ops *o) {
  plain = *o;
  o->embed = record_embed;
  o->embed_backward = record_embed_backward;
  o->pull_stats = record_pull;
  o->push_stats = record_push;
  o->add_constant = record_constant;
  o->gradient_stats = record_stats;
  o->adagrad = record_adagrad;
  o->clamp01 = record_clamp;
  o->weights_changed = record_weights;
  o->get = record_get;
  o->get_double = record_get_double;
  o->synchronize = record_synchronize;
  memset(order, 0, sizeof order);
}

/* Three updates and a drain. With lag 1 the host waits in pulls alone, each after the passes of the next block. */
static void ops_come_in_order(void **state) {
  struct small_run *f = *state;
  static const char *const expected[2] = {"FBdsCGAKWSP"
                                          "FBdsCGAKWSP"
                                          "FBdsCGAKWSP",
                                          "FBCGAKWS"
                                          "FBPCGAKWS"
                                          "FBPCGAKWS"
                                          "P"};
  for (int lag = 0; lag < 2; lag++) {
    vd_error err = {0};
    char groups[1000], name[32];
    bool signalled;
    snprintf(groups, sizeof groups, SPANS, "0.0");
    snprintf(name, sizeof name, "order-%d", lag);
    small_run_open(f, name, RUN, groups);
    small_run_set_remote(f, lag > 0);
    record_ops(f->t.ops);
    for (int u = 0; u < 3; u++) assert_int_equal(vd_train_update(&f->t, &signalled, &err), VD_OK);
    assert_int_equal(vd_update_pipeline_pending(f->t.pipeline), lag);
    assert_int_equal(vd_train_drain(&f->t, &err), VD_OK);
    assert_string_equal(order, expected[lag]);
    *f->t.ops = plain;
    f->t.ops->memory_is_remote = false;
    vd_train_close(&f->t, &err);
  }
}

/* What pull returns of each update is that update's own record. */
static void statistics_are_of_their_update(void **state) {
  struct small_run *f = *state;
  vd_error err = {0};
  char groups[1000];
  int32_t x[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7};
  snprintf(groups, sizeof groups, SPANS, "0.5, aux_loss_scaler=0.01");
  small_run_open(f, "stats", RUN, groups);
  small_run_set_remote(f, true);
  vd_train *t = &f->t;
  vd_update_pipeline *p = t->pipeline;
  double loss[3], penalty[3];
  for (int u = 0; u < 3; u++) {
    vd_step step = {.x = x, .y = x, .block = 8, .update = u, .train = true, .scale = 1.0 / 16};
    vd_update_stats stats;
    t->ops->zero_gradients(t->ops, vd_model_gradients(t->model), vd_model_arena(t->model));
    assert_int_equal(vd_update_pipeline_run(p, &step, &err), VD_OK);
    assert_null(step.nll_sum);
    loss[u] = *vd_model_loss(t->model);
    if (u > 0) {
      assert_int_equal(vd_update_pipeline_pull(p, &stats, &err), VD_OK);
      assert_true(stats.known && stats.update == u - 1 && stats.targets == 100 + u - 1);
      assert_true(stats.nll == loss[u - 1] && stats.span_penalty == penalty[u - 1]);
      assert_true(stats.grad_norm > 0);
    }
    penalty[u] = vd_model_span_penalty(t->model, 1);
    assert_true(u == 0 || penalty[u] < penalty[u - 1]);
    assert_int_equal(vd_update_pipeline_push(p, u, 100 + u, false, &err), VD_OK);
    assert_int_equal(vd_update_pipeline_pending(p), 1);
    assert_false(vd_update_pipeline_is_full(p));
  }
  assert_true(loss[0] != loss[1] && loss[1] != loss[2]);
  t->ops->memory_is_remote = false;
  vd_train_close(t, &err);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(the_same_with_spans, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(the_same_with_memories, small_run_setup, small_run_teardown),
      cmocka_unit_test(a_window_that_grows_finds_history),
      cmocka_unit_test(memory_keeps_its_rows),
      cmocka_unit_test_setup_teardown(ops_come_in_order, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(statistics_are_of_their_update, small_run_setup, small_run_teardown),
      cmocka_unit_test_setup_teardown(names_the_update, small_run_setup, small_run_teardown),
  };
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
