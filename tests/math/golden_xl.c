/* Golden files of Transformer-XL: training as for adaptive span, and a group `eval` in which the trained model reads on
 * with other settings. Part of check_golden. */
#include "tests/math/golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* The model under test with all that it needs. */
struct replay {
  vd_ops *ops;
  vd_model *m;
  vd_optimizer *optimizer;
};

static bool fail_with(const vd_error *err) {
  vd_error_print(err);
  return false;
}

static bool train(vd_golden *g, struct replay *r, real *loss, real *norm) {
  vd_error err = {0};
  for (int64_t u = 0; u < g->n_step; u++) {
    size_t at = (size_t)(u * g->n_stream * g->block);
    double nll;
    vd_step step = {.x = g->x + at,
                    .y = g->y + at,
                    .block = g->block,
                    .update = u,
                    .train = true,
                    .scale = 1.0 / (double)(g->n_stream * g->block),
                    .nll_sum = &nll};
    r->ops->zero_gradients(r->ops, vd_model_gradients(r->m), vd_model_arena(r->m));
    if (vd_model_run(r->m, &step, &err)) return fail_with(&err);
    loss[u] = (real)(nll * step.scale);
    char group[64];
    snprintf(group, sizeof group, "grad_step%d", (int)u);
    if (u == 0 || (VD_REAL_IS_DOUBLE && u == g->n_step - 1))
      vd_golden_compare_arena(g, r->ops, r->m, group, vd_model_gradients(r->m));
    double total;
    if (vd_optimizer_update(r->optimizer, u, &total, &err)) return fail_with(&err);
    norm[u] = (real)total;
  }
  return true;
}

static void compare_series(vd_golden *g, const char *name, const real *ours) {
  size_t n;
  hsize_t shape[4];
  double *theirs = vd_golden_dataset(g->file, name, &n, shape);
  vd_golden_report(g, name, vd_golden_difference(ours, theirs, n), g->tolerance);
  free(theirs);
}

/* mems_final/layerN is [position, stream, feature]; what follows the last layer is no layer's input, and not kept. */
static void compare_memories(vd_golden *g, vd_model *m) {
  double worst = 0;
  int64_t d = g->config.d_model, streams = g->n_stream;
  for (int l = 0; l < (int)g->config.n_layer; l++) {
    char path[64];
    size_t n;
    hsize_t shape[4];
    snprintf(path, sizeof path, "mems_final/layer%d", l);
    double *theirs = vd_golden_dataset(g->file, path, &n, shape), *turned = vd_calloc(n, sizeof *turned);
    int64_t rows = vd_model_memory_rows(m, l);
    if (rows != (int64_t)shape[0]) g->failed = true;
    real *ours = vd_calloc((size_t)(streams * rows * d), sizeof *ours);
    vd_model_memory_get(m, l, 0, streams, ours);
    for (int64_t i = 0; i < (int64_t)shape[0]; i++)
      for (int64_t b = 0; b < streams; b++)
        for (int64_t e = 0; e < d; e++) turned[(b * rows + i) * d + e] = theirs[(i * streams + b) * d + e];
    if (!g->failed) worst = vd_golden_worse(worst, vd_golden_difference(ours, turned, n));
    free(theirs), free(turned), free(ours);
  }
  vd_golden_report(g, "mems_final", worst, g->tolerance);
}

/* One block of the text after `at`, its nll into nll [n_stream][length]. */
static bool evaluate_block(vd_model *m, const double *text, int64_t streams, int64_t length, int64_t at, int64_t block,
                           real *nll) {
  vd_error err = {0};
  int32_t *x = vd_calloc((size_t)(streams * block), sizeof *x), *y = vd_calloc((size_t)(streams * block), sizeof *y);
  real *out = vd_calloc((size_t)(streams * block), sizeof *out);
  for (int64_t b = 0; b < streams; b++)
    for (int64_t i = 0; i < block; i++) {
      x[b * block + i] = (int32_t)text[b * (length + 1) + at + i];
      y[b * block + i] = (int32_t)text[b * (length + 1) + at + i + 1];
    }
  vd_step step = {.x = x, .y = y, .block = block, .nll = out};
  int status = vd_model_run(m, &step, &err);
  for (int64_t b = 0; b < streams; b++)
    for (int64_t i = 0; i < block; i++) nll[b * length + at + i] = out[b * block + i];
  free(x), free(y), free(out);
  return status == VD_OK || fail_with(&err);
}

/* The trained parameters with the settings of the group `eval`. */
static bool evaluate(vd_golden *g, vd_ops *ops) {
  hid_t group = H5Gopen2(g->file, "eval", H5P_DEFAULT);
  if (group < 0) return true; /* not every file has one */
  vd_model_config c = g->config;
  c.mem_len = (int64_t)vd_golden_attribute(group, "mem_len");
  c.clamp_len = (int64_t)vd_golden_attribute(group, "clamp_len");
  c.same_length = vd_golden_attribute(group, "same_length") != 0;
  int64_t block = (int64_t)vd_golden_attribute(group, "tgt_len");
  H5Gclose(group);
  size_t n;
  hsize_t shape[4];
  double *text = vd_golden_dataset(g->file, "eval/tokens", &n, shape);
  int64_t streams = (int64_t)shape[0], length = (int64_t)shape[1] - 1;
  vd_model *m = NULL;
  vd_error err = {0};
  bool good = vd_model_create(&m, &c, ops, 0, streams, 0, block, false, &err) == VD_OK || fail_with(&err);
  if (good) vd_golden_load(g, ops, m, "params_final");
  real *nll = vd_calloc((size_t)(streams * length), sizeof *nll);
  for (int64_t at = 0; at < length && good; at += block)
    good = evaluate_block(m, text, streams, length, at, length - at < block ? length - at : block, nll);
  if (good) compare_series(g, "eval/nll", nll);
  free(text), free(nll);
  vd_model_destroy(m);
  return good;
}

bool vd_golden_check_xl(vd_golden *g) {
  struct replay r = {0};
  vd_error err = {0};
  if (vd_golden_ops(g, &r.ops, &err) ||
      vd_model_create(&r.m, &g->config, r.ops, 0, g->n_stream, 0, g->block, true, &err) ||
      vd_optimizer_create(&r.optimizer, &g->optimizer, r.m, r.ops, &err))
    return fail_with(&err);
  vd_golden_load(g, r.ops, r.m, "params_init");
  real *loss = vd_calloc((size_t)g->n_step, sizeof *loss), *norm = vd_calloc((size_t)g->n_step, sizeof *norm);
  bool good = train(g, &r, loss, norm);
  if (good) {
    compare_series(g, "loss", loss);
    compare_series(g, "grad_norm", norm);
  }
  if (good && VD_REAL_IS_DOUBLE) {
    vd_golden_compare_arena(g, r.ops, r.m, "params_final", vd_model_params(r.m));
    compare_memories(g, r.m);
  }
  good = good && evaluate(g, r.ops);
  if (!good) g->failed = true;
  printf("  %s\n", g->failed ? "FAILED" : "passed");
  free(loss), free(norm), free(g->x), free(g->y);
  vd_optimizer_destroy(r.optimizer);
  vd_model_destroy(r.m);
  r.ops->destroy(r.ops);
  H5Fclose(g->file);
  return !g->failed;
}
