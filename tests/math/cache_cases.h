/* One-token steps, whose memory is projected once, against blocks and against steps that project the whole memory: the
 * cases of tests/math/test_cache.c in double and of tests/unit/test_cache_float.c in float. */
#ifndef CACHE_CASES_H
#define CACHE_CASES_H

#include "src/base/random.h"
#include "src/model/model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { VOCAB = 11, TOKENS = 320, BLOCK = 16 };

static const double TOLERANCE = VD_REAL_IS_DOUBLE ? 1e-12 : 1e-5;

static vd_model_config base(void) {
  return (vd_model_config){.vocab = VOCAB,
                           .n_layer = 3,
                           .d_model = 24,
                           .n_head = 3,
                           .d_head = 8,
                           .d_inner = 20,
                           .attn_span = 200,
                           .ramp = 7,
                           .softmax = VD_MASKED,
                           .mem_len = 90,
                           .clamp_len = 60,
                           .untie_r = true,
                           .seed = 7};
}

static int32_t token(int64_t i) {
  return (int32_t)(vd_philox((vd_rng){.seed = 99}, (uint64_t)i).v[0] % VOCAB);
}

static vd_model *make(const vd_model_config *c, vd_ops *ops, int64_t streams, int64_t micro) {
  vd_error err = {0};
  vd_model *m = NULL;
  assert_int_equal(vd_model_create(&m, c, ops, 0, streams, micro, BLOCK, false, &err), VD_OK);
  return m;
}

/* All spans become `part` of attn_span, more or less by head. */
static void set_spans(vd_model *m, double part) {
  for (int i = 0; i < vd_model_n_param(m); i++) {
    const vd_param *p = vd_model_param(m, i);
    for (size_t h = 0; p->is_span && h < p->at.size; h++)
      vd_model_params(m)[p->at.offset + h] = (real)fmin(part * (0.5 + 0.5 * (double)h) + 0.003, 1.0);
  }
  vd_model_params_changed(m);
}

/* Other weights, under which windows stay as they are. */
static void change_weights(vd_model *m) {
  for (int i = 0; i < vd_model_n_param(m); i++) {
    const vd_param *p = vd_model_param(m, i);
    for (size_t e = 0; !p->is_span && e < p->at.size; e++)
      vd_model_params(m)[p->at.offset + e] *= e % 2 ? (real)1.1 : (real)0.9;
  }
  vd_model_params_changed(m);
}

/* Feeds tokens first .. first + block - 1 to all streams; stream s reads the sequence from 1000 s on. */
/* NOLINTNEXTLINE(readability-non-const-parameter): written through a struct */
static void feed(vd_model *m, int64_t streams, int64_t first, int64_t block, real *logits) {
  vd_error err = {0};
  int32_t x[2 * BLOCK], y[2 * BLOCK];
  for (int64_t s = 0; s < streams; s++)
    for (int64_t i = 0; i < block; i++) x[s * block + i] = token(1000 * s + first + i), y[s * block + i] = -1;
  vd_step step = {.x = x, .y = y, .block = block, .logits = logits};
  assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
}

static void compare(const real *a, const real *b, int64_t n, int64_t at) {
  double top = 0;
  for (int64_t i = 0; i < n; i++) top = fmax(top, fabs((double)b[i]));
  for (int64_t i = 0; i < n; i++)
    if (!(fabs((double)a[i] - (double)b[i]) <= TOLERANCE * top))
      fail_msg("token %lld: %.17g and %.17g", (long long)at, (double)a[i], (double)b[i]);
}

/* Two streams: one at a time, together, and together with a memory that is projected for every step. Prompts of a block
 * begin, in the middle spans grow and a block interrupts the one-token steps, and in the end the memory starts anew. */
static void against_projections_of_all(const vd_model_config *c) {
  vd_ops *ops;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&ops, 1, &err), VD_OK);
  enum { MODELS = 3, PROJECTS_ALL = 2 };
  vd_model *m[MODELS] = {make(c, ops, 2, 1), make(c, ops, 2, 2), make(c, ops, 2, 2)};
  real logits[MODELS][2 * VOCAB];
  for (int64_t t = 0; t < TOKENS;) {
    int64_t block = t == 0 || t == 200 ? BLOCK : 1;
    for (int i = 0; i < MODELS; i++) {
      if (t == 0) set_spans(m[i], 0.2);
      if (t == 165) change_weights(m[i]);
      if (t == 225) set_spans(m[i], 0.9);
      if (t == 305) assert_int_equal(vd_model_reset_memory(m[i], &err), VD_OK);
      if (i == PROJECTS_ALL) vd_model_params_changed(m[i]);
      feed(m[i], 2, t, block, logits[i]);
    }
    for (int i = 0; i < PROJECTS_ALL; i++) compare(logits[i], logits[PROJECTS_ALL], 2 * VOCAB, t);
    t += block;
  }
  for (int i = 0; i < MODELS; i++) vd_model_destroy(m[i]);
  ops->destroy(ops);
}

/* One stream, token by token, against blocks, at the last token of each block. */
static void against_blocks(const vd_model_config *c) {
  vd_ops *ops;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&ops, 1, &err), VD_OK);
  vd_model *m[2] = {make(c, ops, 1, 1), make(c, ops, 1, 1)};
  real logits[2][VOCAB];
  for (int i = 0; i < 2; i++) set_spans(m[i], 0.5);
  for (int64_t t = 0; t < TOKENS; t += BLOCK) {
    for (int64_t i = 0; i < BLOCK; i++) feed(m[0], 1, t + i, 1, logits[0]);
    feed(m[1], 1, t, BLOCK, logits[1]);
    compare(logits[0], logits[1], VOCAB, t);
  }
  for (int i = 0; i < 2; i++) vd_model_destroy(m[i]);
  ops->destroy(ops);
}

static void adaptive_span(void **state) {
  (void)state;
  vd_model_config c = base();
  against_projections_of_all(&c);
  against_blocks(&c);
  c.softmax = VD_TRIMMED;
  against_projections_of_all(&c);
  against_blocks(&c);
  c.attn_span = 1;
  against_projections_of_all(&c);
  against_blocks(&c);
}

static void transformer_xl(void **state) {
  (void)state;
  vd_model_config c = base();
  c.arch = VD_TRANSFORMER_XL;
  against_projections_of_all(&c);
  c.initial_memory = VD_MEMORY_ZEROS;
  against_projections_of_all(&c);
  c.same_length = true; /* the block's length then changes nothing */
  against_projections_of_all(&c);
  against_blocks(&c);
  c.initial_memory = VD_MEMORY_EMPTY;
  against_projections_of_all(&c);
  against_blocks(&c);
}

#endif
