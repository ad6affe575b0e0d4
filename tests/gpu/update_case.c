#include "tests/gpu/update_case.h"

#include "src/ops/cuda_limits.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 512, VOCAB = 205 };

vd_model_config update_model(const char *model, int64_t n_layer, int64_t d_model) {
  vd_model_config c = {.vocab = VOCAB,
                       .n_layer = n_layer,
                       .d_model = d_model,
                       .n_head = d_model / 64,
                       .d_head = 64,
                       .d_inner = 2048,
                       .seed = 3};
  if (strcmp(model, "transformer_xl") == 0) {
    c.arch = VD_TRANSFORMER_XL;
    c.dropout = c.dropatt = 0.1;
    c.mem_len = 512;
    c.untie_r = true;
    return c;
  }
  c.dropout = 0.3;
  c.emb_dropout = 0.1;
  c.attn_span = 8192;
  c.ramp = 32;
  c.softmax = strcmp(model, "trimmed") == 0 ? VD_TRIMMED : VD_MASKED;
  c.aux_loss_scaler = 5e-7;
  c.init = VD_INIT_FAIRSEQ;
  return c;
}

/* Tokens of an order that a model can learn something from; block 0 or 1. */
static int32_t *tokens(int64_t n_stream, int64_t block, int64_t shift) {
  int32_t *x = vd_calloc((size_t)(n_stream * BLOCK), sizeof *x);
  for (int64_t i = 0; i < n_stream * BLOCK; i++) {
    int64_t stream = i / BLOCK, at = block * BLOCK + i % BLOCK + shift;
    philox4x32_ctr_t r = vd_philox((vd_rng){.seed = 6, .update = (uint32_t)stream}, (uint64_t)(at / 3));
    x[i] = (int32_t)(r.v[at % 3] % (uint32_t)VOCAB);
  }
  return x;
}

/* Spans of many lengths: 0, some, a few of several blocks. */
static void spread_spans(vd_model *m, vd_ops *o) {
  const vd_model_config *c = vd_model_config_of(m);
  for (int i = 0; i < vd_model_n_param(m); i++) {
    const vd_param *p = vd_model_param(m, i);
    if (!p->is_span) continue;
    real z[VD_CUDA_MAX_HEADS];
    for (size_t h = 0; h < p->at.size; h++)
      z[h] = (real)((double)(h * h * (size_t)(p->layer + 1)) / (double)c->attn_span);
    o->put(o, vd_model_params(m) + p->at.offset, z, p->at.size);
  }
  vd_model_params_changed(m);
}

/* Biases of five times the deviation of the units' sums, which is the norm of their weights as what they read is
 * normalised; the even units on, the odd ones off. fc2's biases take away what that adds to every token alike, beside
 * which a layer's input would be lost. `fc1`: its weights' number; its biases, fc2's weights and biases follow. */
static void clear_layer(const vd_model *m, int fc1, real *params) {
  const vd_param *weight = vd_model_param(m, fc1);
  size_t inner = (size_t)weight->shape[0], d = (size_t)weight->shape[1];
  const real *w1 = params + weight->at.offset, *w2 = params + vd_model_param(m, fc1 + 2)->at.offset;
  real *b1 = params + vd_model_param(m, fc1 + 1)->at.offset, *b2 = params + vd_model_param(m, fc1 + 3)->at.offset;
  for (size_t u = 0; u < inner; u++) {
    double square = 0;
    for (size_t c = 0; c < d; c++) square += (double)w1[u * d + c] * (double)w1[u * d + c];
    b1[u] = (real)((u % 2 ? -5 : 5) * sqrt(square));
  }
  for (size_t c = 0; c < d; c++) {
    double sum = 0;
    for (size_t u = 0; u < inner; u += 2) sum += (double)w2[c * inner + u] * (double)b1[u];
    b2[c] = (real)((double)b2[c] - sum);
  }
}

static void change_params(vd_model *m, vd_ops *o, const update_change *change) {
  size_t n = vd_model_arena(m), spans = vd_model_span_extent(m);
  real *p = vd_calloc(n, sizeof *p);
  o->get(o, p, vd_model_params(m), n);
  for (size_t i = spans; i < n; i++) p[i] = (real)(float)p[i];
  for (int i = 0; change->clear && i < vd_model_n_param(m); i++) {
    const char *name = vd_model_param(m, i)->name;
    if (strstr(name, ".fc1.weight") || strstr(name, ".CoreNet.0.weight")) clear_layer(m, i, p);
  }
  for (size_t i = spans; i < n; i++) {
    double draw = vd_philox((vd_rng){.seed = 99}, i).v[0] / 4294967296.0;
    p[i] = (real)((double)(float)p[i] * (1 + change->noise * (2 * draw - 1)));
  }
  o->put(o, vd_model_params(m), p, n);
  vd_model_params_changed(m);
  free(p);
}

int update_run(vd_ops *o, const vd_model_config *config, int64_t n_stream, const update_change *change,
               update_outcome *out, vd_error *err) {
  vd_model *m = NULL;
  if (vd_model_create(&m, config, o, 0, n_stream, 0, BLOCK, true, err)) return err->status;
  spread_spans(m, o);
  change_params(m, o, change);
  int status = vd_model_reset_memory(m, err);
  for (int64_t block = 0; block < 2 && status == VD_OK; block++) {
    int32_t *x = tokens(n_stream, block, 0), *y = tokens(n_stream, block, 1);
    double nll = 0;
    vd_step step = {.x = x,
                    .y = y,
                    .block = BLOCK,
                    .update = block,
                    .train = block == 1,
                    .scale = 1.0 / (double)(n_stream * BLOCK),
                    .nll_sum = &nll};
    o->zero_gradients(o, vd_model_gradients(m), vd_model_arena(m));
    status = vd_model_run(m, &step, err);
    out->nll = nll * step.scale;
    free(x);
    free(y);
  }
  out->gradient = vd_calloc(vd_model_arena(m), sizeof(real));
  if (status == VD_OK) vd_model_span_penalty(m, true);
  if (status == VD_OK) o->get(o, out->gradient, vd_model_gradients(m), vd_model_arena(m));
  vd_model_destroy(m);
  return status;
}

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

int update_compare(vd_ops *cpu, const vd_model_config *config, const char *what, const update_outcome *a,
                   const update_outcome *b, const update_bounds *bounds) {
  vd_error err = {0};
  vd_model *m = NULL;
  int failed = 0;
  double loss = fabs(b->nll / a->nll - 1);
  printf("%s %sloss: %.9f, %.9f, relative difference %.2e (bound %.0e)\n", loss <= bounds->loss ? "ok" : "not ok", what,
         a->nll, b->nll, loss, bounds->loss);
  failed += !(loss <= bounds->loss);
  if (vd_model_create(&m, config, cpu, 0, 1, 0, 1, false, &err)) return failed + 1; /* for its names */
  int n = vd_model_n_param(m);
  double *all = vd_calloc((size_t)n, sizeof *all);
  for (int i = 0; i < n; i++) {
    const vd_param *p = vd_model_param(m, i);
    double error = 0, size = 0;
    for (size_t e = p->at.offset; e < p->at.offset + p->at.size; e++) {
      double d = (double)b->gradient[e] - (double)a->gradient[e];
      error += d * d;
      size += (double)a->gradient[e] * (double)a->gradient[e];
    }
    double relative = all[i] = sqrt(error / size);
    bool good = relative <= bounds->each;
    printf("%s %sgradient of %s: relative difference %.2e (bound %.0e)\n", good ? "ok" : "not ok", what, p->name,
           relative, bounds->each);
    failed += !good;
  }
  qsort(all, (size_t)n, sizeof *all, by_size);
  bool good = all[n / 2] <= bounds->median;
  printf("%s %sgradients: median relative difference %.2e (bound %.0e)\n", good ? "ok" : "not ok", what, all[n / 2],
         bounds->median);
  failed += !good;
  free(all);
  vd_model_destroy(m);
  return failed;
}
