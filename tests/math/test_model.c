/* The models' gradients against central finite differences in double, memory rows, dropout, trimmed windows,
 * ramps and span parameters included; and what the model promises about streams computed apart. */
#include "src/model/model.h"
#include "tests/math/padding.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const double STEP = 1e-5, TOLERANCE = 1e-6;

/* A model with a filled memory and one block to train on. */
struct bench {
  vd_ops *ops;
  vd_model *m;
  int64_t n_stream, block;
  int32_t *x, *y;
  real **memory;   /* [n_layer] copies, before the block */
  int64_t rows[4]; /* [n_layer] theirs */
  double nll;      /* sum of the last block */
};

static vd_model_config base(void) {
  return (vd_model_config){.vocab = 11,
                           .n_layer = 2,
                           .d_model = 12,
                           .n_head = 3,
                           .d_head = 4,
                           .d_inner = 10,
                           .attn_span = 150,
                           .ramp = 7,
                           .span_init = 0.1,
                           .softmax = VD_MASKED,
                           .aux_loss_scaler = 3e-4,
                           .seed = 7};
}

static int32_t token(int64_t i, int64_t vocab) {
  return (int32_t)(vd_philox((vd_rng){.seed = 99}, (uint64_t)i).v[0] % (uint32_t)vocab);
}

/* Spans of all sizes, none on a kink of the mask: z L has a fraction. */
static void spread_spans(struct bench *b) {
  int at = 0;
  for (int i = 0; i < vd_model_n_param(b->m); i++) {
    const vd_param *p = vd_model_param(b->m, i);
    for (size_t h = 0; p->is_span && h < p->at.size; h++, at++) {
      double tokens[6] = {1.37, 20.61, 61.23, 3.44, 33.77, 12.18};
      vd_model_params(b->m)[p->at.offset + h] = tokens[at % 6] / (double)vd_model_config_of(b->m)->attn_span;
    }
  }
  vd_model_params_changed(b->m);
}

/* Transformer-XL begins with weights so small that attention is flat and its gradients drown in rounding. */
static void enlarge(struct bench *b) {
  if (vd_model_config_of(b->m)->arch != VD_TRANSFORMER_XL) return;
  for (int i = 0; i < vd_model_n_param(b->m); i++) {
    const vd_param *p = vd_model_param(b->m, i);
    for (size_t e = 0; p->rank == 2 && e < p->at.size; e++) vd_model_params(b->m)[p->at.offset + e] *= 20;
  }
  vd_model_params_changed(b->m);
}

static void run(struct bench *b, vd_step *s, int64_t block, bool train) {
  vd_error err = {0};
  *s = (vd_step){.x = b->x,
                 .y = b->y,
                 .block = block,
                 .update = 5,
                 .train = train,
                 .scale = 1.0 / (double)(b->n_stream * block),
                 .nll_sum = &b->nll};
  assert_int_equal(vd_model_run(b->m, s, &err), VD_OK);
}

static struct bench setup(const vd_model_config *config, int64_t stream0, int64_t n_stream, int64_t micro) {
  struct bench b = {.n_stream = n_stream, .block = 9};
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&b.ops, 1, &err), VD_OK);
  assert_int_equal(vd_model_create(&b.m, config, b.ops, stream0, n_stream, micro, b.block, true, &err), VD_OK);
  spread_spans(&b);
  enlarge(&b);
  size_t n = (size_t)(n_stream * b.block);
  b.x = vd_calloc(n, sizeof *b.x);
  b.y = vd_calloc(n, sizeof *b.y);
  vd_step s;
  for (int64_t blocks = 0; blocks < 12; blocks++) { /* history longer than the shortest windows, zeros before it */
    for (int64_t i = 0; i < (int64_t)n; i++) {
      int64_t e = ((stream0 * b.block) + i) * 16 + blocks;
      b.x[i] = token(2 * e, config->vocab);
      b.y[i] = (stream0 * b.block + i) % 5 == 3 ? -1 : token(2 * e + 1, config->vocab);
    }
    if (blocks < 11) run(&b, &s, b.block, false);
  }
  b.memory = vd_calloc((size_t)config->n_layer, sizeof *b.memory);
  for (int l = 0; l < (int)config->n_layer; l++) {
    b.rows[l] = vd_model_memory_rows(b.m, l);
    b.memory[l] = vd_calloc((size_t)(n_stream * vd_model_memory_rows(b.m, l) * config->d_model), sizeof(real));
    vd_model_memory_get(b.m, l, 0, n_stream, b.memory[l]);
  }
  return b;
}

static void teardown(struct bench *b) {
  for (int l = 0; l < (int)vd_model_config_of(b->m)->n_layer; l++) free(b->memory[l]);
  free(b->memory);
  free(b->x);
  free(b->y);
  vd_model_destroy(b->m);
  b->ops->destroy(b->ops);
}

/* Loss and penalty of the block with the memories as they were; gradients are left in the arena. */
static double objective(struct bench *b) {
  vd_error err = {0};
  vd_model_params_changed(b->m);
  for (int l = 0; l < (int)vd_model_config_of(b->m)->n_layer; l++)
    assert_int_equal(vd_model_memory_put(b->m, l, b->rows[l], 0, b->n_stream, b->memory[l], &err), VD_OK);
  b->ops->zero_gradients(b->ops, vd_model_gradients(b->m), vd_model_arena(b->m));
  vd_step s;
  run(b, &s, b->block, true);
  return b->nll * s.scale + vd_model_span_penalty(b->m, true);
}

static double central_difference(struct bench *b, size_t at) {
  real *params = vd_model_params(b->m), kept = params[at];
  params[at] = kept + STEP;
  double above = objective(b);
  params[at] = kept - STEP;
  double below = objective(b);
  params[at] = kept;
  return (above - below) / (2 * STEP);
}

static void compare_gradients(const vd_model_config *config) {
  struct bench b = setup(config, 3, 2, 0);
  size_t arena = vd_model_arena(b.m);
  real *gradient = vd_calloc(arena, sizeof *gradient);
  objective(&b);
  memcpy(gradient, vd_model_gradients(b.m), arena * sizeof *gradient);
  for (int i = 0; i < vd_model_n_param(b.m); i++) {
    const vd_param *p = vd_model_param(b.m, i);
    size_t stride = p->at.size / 23 + 1; /* about 23 elements of each tensor */
    double error = 0, size = 0;
    for (size_t e = 0; e < p->at.size; e += stride) {
      double numeric = central_difference(&b, p->at.offset + e), ours = gradient[p->at.offset + e];
      error += (numeric - ours) * (numeric - ours);
      size += ours * ours;
    }
    if (!(sqrt(error) <= TOLERANCE * sqrt(size) + 1e-11))
      fail_msg("%s: finite differences differ by %.2e of %.2e", p->name, sqrt(error), sqrt(size));
    if (p->is_span) assert_true(size > 0);
  }
  assert_int_equal(padding_not_zero(b.m, gradient), 0);
  free(gradient);
  teardown(&b);
}

static void gradients_masked(void **state) {
  (void)state;
  vd_model_config c = base();
  compare_gradients(&c);
}
static void gradients_masked_dropout_per_layer(void **state) {
  (void)state;
  vd_model_config c = base();
  c.span_per_layer = true;
  c.dropout = 0.3;
  c.emb_dropout = 0.2;
  compare_gradients(&c);
}
static void gradients_trimmed(void **state) {
  (void)state;
  vd_model_config c = base();
  c.softmax = VD_TRIMMED;
  c.init = VD_INIT_FAIRSEQ;
  compare_gradients(&c);
}
static void gradients_trimmed_dropout_per_layer(void **state) {
  (void)state;
  vd_model_config c = base();
  c.softmax = VD_TRIMMED;
  c.span_per_layer = true;
  c.dropout = 0.3;
  compare_gradients(&c);
}

/* Heads wider than d_model / n_head; 99 tokens lie behind the block, of which mem_len are remembered. */
static vd_model_config xl(void) {
  return (vd_model_config){.arch = VD_TRANSFORMER_XL,
                           .vocab = 11,
                           .n_layer = 2,
                           .d_model = 12,
                           .n_head = 3,
                           .d_head = 6,
                           .d_inner = 10,
                           .mem_len = 40,
                           .untie_r = true,
                           .seed = 7};
}
static void gradients_xl(void **state) {
  (void)state;
  vd_model_config c = xl();
  compare_gradients(&c);
  c.mem_len = 120; /* not yet full */
  compare_gradients(&c);
  c.mem_len = 0;
  compare_gradients(&c);
}
static void gradients_xl_dropout(void **state) {
  (void)state;
  vd_model_config c = xl();
  c.dropout = 0.2;
  c.dropatt = 0.3;
  compare_gradients(&c);
}
static void gradients_xl_shared_clamped_same_length(void **state) {
  (void)state;
  vd_model_config c = xl();
  c.untie_r = false;
  c.clamp_len = 15;
  c.same_length = true;
  c.dropatt = 0.1;
  compare_gradients(&c);
  c.d_head = 2;  /* narrower heads */
  c.mem_len = 5; /* a block longer than the memory */
  compare_gradients(&c);
}

/* As streams_computed_apart, with every dropout there is: its numbers are those of the global streams. */
static void streams_computed_apart_xl(void **state) {
  (void)state;
  vd_model_config c = xl();
  c.dropout = 0.3;
  c.dropatt = 0.2;
  struct bench whole = setup(&c, 0, 5, 0), micro = setup(&c, 0, 5, 2), low = setup(&c, 0, 2, 0),
               high = setup(&c, 2, 3, 0);
  double loss = objective(&whole), loss_micro = objective(&micro);
  double parts = (2 * objective(&low) + 3 * objective(&high)) / 5;
  assert_true(fabs(loss - loss_micro) < 1e-13 * loss && fabs(loss - parts) < 1e-13 * loss);
  const real *g = vd_model_gradients(whole.m), *gm = vd_model_gradients(micro.m);
  for (size_t e = 0; e < vd_model_arena(whole.m); e++) {
    double sum = (2 * (double)vd_model_gradients(low.m)[e] + 3 * (double)vd_model_gradients(high.m)[e]) / 5;
    assert_true(fabs((double)g[e] - (double)gm[e]) < 1e-12 && fabs((double)g[e] - sum) < 1e-12);
  }
  teardown(&whole), teardown(&micro), teardown(&low), teardown(&high);
}

/* Rows grow from none to mem_len, the newest last; more rows than mem_len are cut when they are put back. */
static void memory_grows_xl(void **state) {
  (void)state;
  vd_model_config c = xl();
  struct bench b = setup(&c, 0, 2, 0);
  vd_error err = {0};
  vd_step s;
  assert_int_equal(vd_model_memory_rows(b.m, 0), 40);
  assert_int_equal(vd_model_reset_memory(b.m, &err), VD_OK);
  assert_int_equal(vd_model_memory_rows(b.m, 1), 0);
  for (int blocks = 1; blocks < 7; blocks++) {
    run(&b, &s, b.block, false);
    assert_int_equal(vd_model_memory_rows(b.m, 1), blocks < 5 ? 9 * blocks : 40);
  }
  int64_t d = c.d_model;
  real *memory = vd_calloc((size_t)(2 * 50 * d), sizeof *memory);
  vd_model_memory_get(b.m, 0, 0, 2, memory);
  for (int64_t t = 0; t < b.block; t++)
    for (int64_t e = 0; e < d; e++) {
      const vd_param *p = vd_model_param(b.m, 0);
      double embedding = vd_model_params(b.m)[p->at.offset + (size_t)(b.x[b.block + t] * d + e)] * sqrt((double)d);
      assert_true(fabs((double)memory[(2 * 40 - b.block + t) * d + e] - embedding) < 1e-14);
    }
  for (int64_t i = 0; i < 2 * 50 * d; i++) memory[i] = (real)i;
  assert_int_equal(vd_model_memory_put(b.m, 1, 50, 0, 2, memory, &err), VD_OK);
  real *back = vd_calloc((size_t)(2 * 40 * d), sizeof *back);
  vd_model_memory_get(b.m, 1, 0, 2, back);
  assert_memory_equal(back, memory + 10 * d, (size_t)(40 * d) * sizeof *back);
  assert_memory_equal(back + 40 * d, memory + 60 * d, (size_t)(40 * d) * sizeof *back);
  free(memory), free(back);
  teardown(&b);
}

/* A memory that begins with zeros is one that was given mem_len rows of zeros, and is not an empty one. */
static void memory_begins_with_zeros_xl(void **state) {
  (void)state;
  vd_model_config c = xl();
  struct bench empty = setup(&c, 0, 2, 0), given = setup(&c, 0, 2, 0);
  c.initial_memory = VD_MEMORY_ZEROS;
  struct bench zeros = setup(&c, 0, 2, 0), *all[] = {&empty, &given, &zeros};
  real *rows = vd_calloc((size_t)(2 * 40 * c.d_model), sizeof *rows);
  vd_error err = {0};
  for (int i = 0; i < 3; i++) {
    assert_int_equal(vd_model_reset_memory(all[i]->m, &err), VD_OK);
    for (int l = 0; l < c.n_layer && all[i] == &given; l++)
      assert_int_equal(vd_model_memory_put(given.m, l, 40, 0, 2, rows, &err), VD_OK);
    assert_int_equal(vd_model_memory_rows(all[i]->m, 1), all[i] == &empty ? 0 : 40);
  }
  for (int blocks = 0; blocks < 2; blocks++) {
    vd_step s;
    for (int i = 0; i < 3; i++) run(all[i], &s, all[i]->block, false);
    assert_true(zeros.nll == given.nll && fabs(zeros.nll - empty.nll) > 1e-4);
  }
  free(rows);
  teardown(&empty), teardown(&given), teardown(&zeros);
}

/* Five streams at once, two at a time, and shared out as 2 + 3: the same loss and gradients, to rounding. */
static void streams_computed_apart(void **state) {
  (void)state;
  vd_model_config c = base();
  c.dropout = 0.3;
  c.emb_dropout = 0.1;
  struct bench whole = setup(&c, 0, 5, 0), micro = setup(&c, 0, 5, 2), low = setup(&c, 0, 2, 0),
               high = setup(&c, 2, 3, 0);
  double loss = objective(&whole), penalty = vd_model_span_penalty(whole.m, false);
  double loss_micro = objective(&micro);
  objective(&low);
  objective(&high);
  assert_true(fabs(loss - loss_micro) < 1e-13 * fabs(loss));
  size_t arena = vd_model_arena(whole.m);
  const real *g = vd_model_gradients(whole.m), *gm = vd_model_gradients(micro.m);
  for (int i = 0; i < vd_model_n_param(whole.m); i++) {
    const vd_param *p = vd_model_param(whole.m, i);
    for (size_t e = p->at.offset; e < p->at.offset + p->at.size; e++) {
      assert_true(fabs((double)g[e] - (double)gm[e]) < 1e-12);
      if (p->is_span) continue; /* the penalty's gradient is in both halves */
      double parts = (2 * vd_model_gradients(low.m)[e] + 3 * vd_model_gradients(high.m)[e]) / 5;
      assert_true(fabs(g[e] - parts) < 1e-12);
    }
  }
  assert_true(arena > 0 && penalty > 0);
  teardown(&whole), teardown(&micro), teardown(&low), teardown(&high);
}

/* Memory: after blocks b1, b2 the last rows of layer 0 are the embeddings of the last tokens; what is put is what one
 * gets, and other streams keep theirs; a window that grows by more than is kept finds zeros before them. */
static void memory_moves_on(void **state) {
  (void)state;
  vd_model_config c = base();
  c.attn_span = 400;
  struct bench b = setup(&c, 0, 2, 0);
  vd_step s;
  run(&b, &s, b.block, false);
  int64_t rows = vd_model_memory_rows(b.m, 0), d = c.d_model;
  real *memory = vd_calloc((size_t)(2 * c.attn_span * d), sizeof *memory);
  vd_model_memory_get(b.m, 0, 0, 2, memory);
  for (int64_t t = 0; t < b.block; t++) {
    const real *embedding = vd_model_params(b.m) + vd_model_param(b.m, 0)->at.offset + b.x[b.block + t] * d;
    assert_memory_equal(memory + (2 * rows - b.block + t) * d, embedding, (size_t)d * sizeof(real));
  }
  size_t stream = (size_t)(rows * d);
  real *back = vd_calloc(2 * stream, sizeof *back);
  vd_error err = {0};
  assert_true(12 * b.block % rows != 0); /* the oldest row is not the first one */
  for (size_t i = stream; i < 2 * stream; i++) memory[i] = (real)i;
  assert_int_equal(vd_model_memory_put(b.m, 0, rows, 1, 1, memory + stream, &err), VD_OK);
  vd_model_memory_get(b.m, 0, 0, 2, back);
  assert_memory_equal(back, memory, 2 * stream * sizeof *back);
  free(back);
  int64_t before = vd_model_memory_rows(b.m, 0);
  for (int i = 0; i < vd_model_n_param(b.m); i++)
    if (vd_model_param(b.m, i)->is_span) vd_model_params(b.m)[vd_model_param(b.m, i)->at.offset] = 1.0;
  vd_model_params_changed(b.m);
  run(&b, &s, b.block, false);
  assert_int_equal(vd_model_memory_rows(b.m, 0), c.attn_span);
  assert_true(before + b.block < c.attn_span);
  vd_model_memory_get(b.m, 0, 0, 2, memory);
  for (int64_t i = 0; i < (c.attn_span - before - b.block) * d; i++) assert_true(memory[i] == 0);
  free(memory);
  teardown(&b);
}

static int64_t few_tokens(int64_t width) {
  return 96 / width;
}

/* A backend that computes few streams at a time, as a GPU's grid of blocks has few rows, and short blocks. */
static void sizes_are_checked(void **state) {
  (void)state;
  vd_model_config config = base();
  vd_error err = {0};
  vd_ops *ops = NULL;
  vd_model *m = NULL;
  assert_int_equal(vd_ops_cpu(&ops, 1, &err), VD_OK);
  ops->max_streams = 3;
  ops->max_block = few_tokens;
  assert_int_equal(vd_model_create(&m, &config, ops, 0, 5, 0, 8, true, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "5 streams at a time"));
  assert_non_null(strstr(err.message, "at most 3"));
  assert_null(m);
  err = (vd_error){0};
  assert_int_equal(vd_model_create(&m, &config, ops, 0, 5, 3, 9, true, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "tokens_per_sample = 9"));
  assert_non_null(strstr(err.message, "at most 8 where all heads of a layer are 12 wide"));
  assert_null(m);
  err = (vd_error){0};
  assert_int_equal(vd_model_create(&m, &config, ops, 0, 5, 3, 8, true, &err), VD_OK);
  vd_model_destroy(m);
  ops->destroy(ops);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(gradients_masked),
      cmocka_unit_test(gradients_masked_dropout_per_layer),
      cmocka_unit_test(gradients_trimmed),
      cmocka_unit_test(gradients_trimmed_dropout_per_layer),
      cmocka_unit_test(streams_computed_apart),
      cmocka_unit_test(memory_moves_on),
      cmocka_unit_test(gradients_xl),
      cmocka_unit_test(gradients_xl_dropout),
      cmocka_unit_test(gradients_xl_shared_clamped_same_length),
      cmocka_unit_test(streams_computed_apart_xl),
      cmocka_unit_test(memory_grows_xl),
      cmocka_unit_test(memory_begins_with_zeros_xl),
      cmocka_unit_test(sizes_are_checked),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
