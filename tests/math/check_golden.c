/* Replays golden files (section 6 of doc/DESIGN.md): a small model trained for some updates in double by an independent
 * implementation. Usage: check_golden [--backend cuda] FILE... Prints the largest relative error of each quantity, and
 * exits 1 where one exceeds its tolerance, 2 where a file cannot be replayed at all.
 *
 * A tensor's error is the largest |ours - theirs| over the largest |theirs|.
 *
 * check_golden links the double library. check_golden_f32 is the same program over the float library that ships: there
 * it holds losses, spans and the first gradients to 1e-5, some hundred roundings, and leaves out what twelve updates
 * of a young model amplify (last gradients, final tensors). With --backend cuda it replays on the GPU, whose sums have
 * another order in every product, and holds all that to 1e-4. */
#include "tests/math/golden.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A text attribute (fixed or variable length) equals `value`. */
static bool attribute_is(hid_t file, const char *name, const char *value) {
  hid_t a = H5Aopen(file, name, H5P_DEFAULT), type = a < 0 ? -1 : H5Aget_type(a);
  bool same = false;
  if (type >= 0 && H5Tis_variable_str(type) > 0) {
    char *text = NULL;
    same = H5Aread(a, type, &text) >= 0 && text && strcmp(text, value) == 0;
    if (text) H5free_memory(text);
  } else if (type >= 0) {
    char text[256] = {0};
    same = H5Tget_size(type) < sizeof text && H5Aread(a, type, text) >= 0 && strcmp(text, value) == 0;
  }
  if (type >= 0) H5Tclose(type);
  if (a >= 0) H5Aclose(a);
  return same;
}

static int32_t *tokens(vd_golden *g, const char *name) {
  size_t n;
  hsize_t shape[4];
  double *data = vd_golden_dataset(g->file, name, &n, shape);
  int32_t *out = vd_calloc(n, sizeof *out);
  for (size_t i = 0; i < n; i++) out[i] = (int32_t)data[i];
  g->n_step = (int64_t)shape[0];
  g->n_stream = (int64_t)shape[1];
  g->block = (int64_t)shape[2];
  free(data);
  return out;
}

static void open_xl(vd_golden *g) {
  vd_model_config *c = &g->config;
  c->arch = VD_TRANSFORMER_XL;
  c->d_head = (int64_t)vd_golden_attribute(g->file, "d_head");
  c->mem_len = (int64_t)vd_golden_attribute(g->file, "mem_len");
  c->clamp_len = (int64_t)vd_golden_attribute(g->file, "clamp_len");
  c->same_length = vd_golden_attribute(g->file, "same_length") != 0;
  c->untie_r = vd_golden_attribute(g->file, "untie_r") != 0;
  g->optimizer = (vd_optimizer_config){.method = VD_ADAM,
                                       .schedule = VD_COSINE,
                                       .lr = vd_golden_attribute(g->file, "lr"),
                                       .eps = 1e-8,
                                       .beta1 = 0.9,
                                       .beta2 = 0.999,
                                       .clip_norm = vd_golden_attribute(g->file, "clip_norm"),
                                       .max_updates = (int64_t)vd_golden_attribute(g->file, "max_update")};
}

static void open_adaptive(vd_golden *g) {
  vd_model_config *c = &g->config;
  c->d_head = c->d_model / c->n_head;
  c->attn_span = (int64_t)vd_golden_attribute(g->file, "attn_span");
  c->ramp = (int64_t)vd_golden_attribute(g->file, "ramp");
  c->aux_loss_scaler = vd_golden_attribute(g->file, "aux_loss_scaler");
  c->span_per_layer = vd_golden_attribute(g->file, "span_per_layer") != 0;
  c->softmax = attribute_is(g->file, "span_softmax", "trimmed") ? VD_TRIMMED : VD_MASKED;
  g->optimizer = (vd_optimizer_config){.lr = vd_golden_attribute(g->file, "lr"),
                                       .eps = 1e-10,
                                       .clip_step = vd_golden_attribute(g->file, "adagrad_clip"),
                                       .warmup_updates = (int64_t)vd_golden_attribute(g->file, "warmup_updates")};
}

static bool open_golden(vd_golden *g) {
  g->file = H5Fopen(g->path, H5F_ACC_RDONLY, H5P_DEFAULT);
  bool xl = g->file >= 0 && attribute_is(g->file, "model", "transformer_xl");
  if (g->file < 0 || (!xl && !attribute_is(g->file, "model", "adaptive_span"))) {
    fprintf(stderr, "check_golden: %s: not a golden file of a model that is known here\n", g->path);
    return false;
  }
  vd_model_config *c = &g->config;
  c->n_layer = (int64_t)vd_golden_attribute(g->file, "n_layer");
  c->d_model = (int64_t)vd_golden_attribute(g->file, "d_model");
  c->n_head = (int64_t)vd_golden_attribute(g->file, "n_head");
  c->d_inner = (int64_t)vd_golden_attribute(g->file, "d_inner");
  c->vocab = (int64_t)vd_golden_attribute(g->file, "vocab");
  c->dropout = vd_golden_attribute(g->file, "dropout");
  c->seed = 1;
  if (xl)
    open_xl(g);
  else
    open_adaptive(g);
  g->x = tokens(g, "x");
  g->y = tokens(g, "y");
  return true;
}

static void compare_memories(vd_golden *g, vd_model *m) {
  double worst = 0;
  for (int l = 0; l < (int)g->config.n_layer; l++) {
    char path[64];
    size_t n;
    hsize_t shape[4];
    snprintf(path, sizeof path, "cache_final/layer%d", l);
    double *theirs = vd_golden_dataset(g->file, path, &n, shape);
    int64_t rows = vd_model_memory_rows(m, l), d = g->config.d_model, held = (int64_t)shape[1];
    int64_t both = rows < held ? rows : held;
    real *ours = vd_calloc((size_t)(g->n_stream * rows * d), sizeof *ours);
    vd_model_memory_get(m, l, 0, g->n_stream, ours);
    for (int64_t s = 0; s < g->n_stream; s++)
      worst = vd_golden_worse(worst, vd_golden_difference(ours + ((s + 1) * rows - both) * d,
                                                          theirs + ((s + 1) * held - both) * d, (size_t)(both * d)));
    free(theirs);
    free(ours);
  }
  vd_golden_report(g, "cache_final", worst, g->tolerance);
}

/* What is known of each update: losses, auxiliary losses, windows and spans, for the comparison at the end. */
struct series {
  real *loss, *aux, *window, *span, *logprob; /* logprob: log probabilities at the last position of step 0 */
};

static void log_softmax(const real *logits, int64_t vocab, real *out) {
  double top = (double)logits[0], sum = 0;
  for (int64_t c = 1; c < vocab; c++) top = fmax(top, (double)logits[c]);
  for (int64_t c = 0; c < vocab; c++) sum += exp((double)logits[c] - top);
  for (int64_t c = 0; c < vocab; c++) out[c] = (real)((double)logits[c] - top - log(sum));
}

static void note_spans(const vd_golden *g, vd_ops *ops, vd_model *m, int64_t step, const struct series *s) {
  int64_t n_span = g->config.span_per_layer ? 1 : g->config.n_head, at = 0;
  for (int i = 0; i < vd_model_n_param(m); i++) {
    const vd_param *p = vd_model_param(m, i);
    if (!p->is_span) continue;
    real *z = vd_golden_host(ops, vd_model_params(m) + p->at.offset, p->at.size);
    for (size_t h = 0; h < p->at.size; h++)
      s->span[step * g->config.n_layer * n_span + at++] = z[h] * (real)g->config.attn_span;
    free(z);
  }
  for (int l = 0; l < (int)g->config.n_layer; l++)
    s->window[step * g->config.n_layer + l] = (real)vd_model_window(m, l);
}

static void replay(vd_golden *g, vd_model *m, vd_optimizer *optimizer, vd_ops *ops, struct series *s) {
  vd_error err = {0};
  real *logits = vd_calloc((size_t)(g->n_stream * g->config.vocab), sizeof *logits);
  for (int64_t u = 0; u < g->n_step; u++) {
    size_t at = (size_t)(u * g->n_stream * g->block);
    double nll;
    vd_step step = {.x = g->x + at,
                    .y = g->y + at,
                    .block = g->block,
                    .update = u,
                    .train = true,
                    .scale = 1.0 / (double)(g->n_stream * g->block),
                    .nll_sum = &nll,
                    .logits = u == 0 ? logits : NULL};
    note_spans(g, ops, m, u, s);
    ops->zero_gradients(ops, vd_model_gradients(m), vd_model_arena(m));
    double norm;
    if (vd_model_run(m, &step, &err)) break;
    s->loss[u] = (real)(nll * step.scale);
    s->aux[u] = (real)vd_model_span_penalty(m, true);
    char group[64];
    snprintf(group, sizeof group, "grad_step%d", (int)u);
    if (u == 0 || (VD_REAL_IS_DOUBLE && u == g->n_step - 1))
      vd_golden_compare_arena(g, ops, m, group, vd_model_gradients(m));
    if (vd_optimizer_update(optimizer, u, &norm, &err)) break;
  }
  for (int64_t b = 0; b < g->n_stream; b++)
    log_softmax(logits + b * g->config.vocab, g->config.vocab, s->logprob + b * g->config.vocab);
  free(logits);
  if (err.status == VD_OK) return;
  vd_error_print(&err);
  g->failed = true;
}

static void compare_series(vd_golden *g, const struct series *s) {
  const char *names[4] = {"loss", "aux", "layer_window", "span_positions"};
  const real *ours[4] = {s->loss, s->aux, s->window, s->span};
  for (int i = 0; i < 4; i++) {
    size_t n;
    hsize_t shape[4];
    double *theirs = vd_golden_dataset(g->file, names[i], &n, shape);
    vd_golden_report(g, names[i], vd_golden_difference(ours[i], theirs, n), i == 2 ? 0 : g->tolerance);
    free(theirs);
  }
  size_t n;
  hsize_t shape[4];
  double *theirs = vd_golden_dataset(g->file, "logprob_step0", &n, shape), worst = 0;
  int64_t vocab = g->config.vocab;
  for (int64_t b = 0; b < g->n_stream; b++) {
    const double *last = theirs + ((b + 1) * g->block - 1) * vocab;
    worst = vd_golden_worse(worst, vd_golden_difference(s->logprob + b * vocab, last, (size_t)vocab));
  }
  vd_golden_report(g, "logprob_step0", worst, g->tolerance);
  free(theirs);
}

static bool check(const char *path, bool gpu) {
  vd_golden g = {.path = path, .gpu = gpu, .tolerance = VD_REAL_IS_DOUBLE ? 1e-9 : gpu ? 1e-4 : 1e-5};
  vd_ops *ops = NULL;
  vd_model *m = NULL;
  vd_optimizer *optimizer = NULL;
  vd_error err = {0};
  if (!open_golden(&g)) return false;
  printf("%s\n", path);
  if (g.config.arch == VD_TRANSFORMER_XL) return vd_golden_check_xl(&g);
  if (vd_golden_ops(&g, &ops, &err) || vd_model_create(&m, &g.config, ops, 0, g.n_stream, 0, g.block, true, &err) ||
      vd_optimizer_create(&optimizer, &g.optimizer, m, ops, &err)) {
    vd_error_print(&err);
    return false;
  }
  vd_golden_load(&g, ops, m, "params_init");
  if (vd_model_reset_memory(m, &err)) return false;
  size_t per_step = (size_t)(g.config.n_layer * g.config.n_head), steps = (size_t)g.n_step;
  struct series s = {vd_calloc(steps, sizeof(real)), vd_calloc(steps, sizeof(real)),
                     vd_calloc(steps * per_step, sizeof(real)), vd_calloc(steps * per_step, sizeof(real)),
                     vd_calloc((size_t)(g.n_stream * g.config.vocab), sizeof(real))};
  replay(&g, m, optimizer, ops, &s);
  compare_series(&g, &s);
  if (VD_REAL_IS_DOUBLE) {
    vd_golden_compare_arena(&g, ops, m, "params_final", vd_model_params(m));
    vd_golden_compare_arena(&g, ops, m, "adagrad_sum_final", vd_optimizer_state(optimizer, 0));
    compare_memories(&g, m);
  }
  printf("  %s\n", g.failed ? "FAILED" : "passed");
  free(s.loss), free(s.aux), free(s.window), free(s.span), free(s.logprob), free(g.x), free(g.y);
  vd_optimizer_destroy(optimizer);
  vd_model_destroy(m);
  ops->destroy(ops);
  H5Fclose(g.file);
  return !g.failed;
}

int main(int argc, char **argv) {
  bool gpu = argc > 2 && strcmp(argv[1], "--backend") == 0 && strcmp(argv[2], "cuda") == 0;
  int first = gpu ? 3 : 1;
  if (argc <= first || argv[first][0] == '-') {
    fprintf(stderr, "usage: check_golden [--backend cuda] FILE...\n");
    return 2;
  }
  MPI_Init(&argc, &argv);
  H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
  int failed = 0;
  for (int i = first; i < argc; i++)
    if (!check(argv[i], gpu)) failed++;
  MPI_Finalize();
  return failed ? 1 : 0;
}
