/* One update of the 12-layer model, GPU in fp32 against CPU in fp32: the same parameters, tokens and dropout masks. The
 * memories are filled by a block before. The loss is held to 1e-5. Gradients differ by more than rounding: sums before
 * a ReLU differ by a millionth of their size, so that about a millionth of the hidden units is on on one side only, and
 * each of those counts fully: sqrt(1e-6) of the norm. (fp32 against double on CPUs alone: median of all tensors 2.5e-4,
 * worst 8.9e-4.) So the median over the tensors is held to 1e-3 of a tensor's norm, and every tensor, of which some see
 * few units, to four times that. Usage: one_update [STREAMS [masked|trimmed [LAYERS]]], 8 streams unless told. */
#include "gpu_ops.h"
#include "model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 512, VOCAB = 205 };
static const double LOSS_BOUND = 1e-5, MEDIAN_BOUND = 1e-3, GRADIENT_BOUND = 4e-3;

struct outcome {
  double nll;
  real *gradient; /* host [arena] */
};

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
    real z[64];
    for (size_t h = 0; h < p->at.size; h++)
      z[h] = (real)((double)(h * h * (size_t)(p->layer + 1)) / (double)c->attn_span);
    o->put(o, vd_model_params(m) + p->at.offset, z, p->at.size);
  }
  vd_model_params_changed(m);
}

static int run(vd_ops *o, const vd_model_config *config, int64_t n_stream, struct outcome *out, vd_error *err) {
  vd_model *m = NULL;
  if (vd_model_create(&m, config, o, 0, n_stream, 0, BLOCK, true, err)) return err->status;
  spread_spans(m, o);
  int status = vd_model_reset_memory(m, err);
  for (int64_t block = 0; block < 2 && status == VD_OK; block++) {
    int32_t *x = tokens(n_stream, block, 0), *y = tokens(n_stream, block, 1);
    vd_step step = {.x = x,
                    .y = y,
                    .block = BLOCK,
                    .update = block,
                    .train = block == 1,
                    .scale = 1.0 / (double)(n_stream * BLOCK)};
    o->zero(o, vd_model_gradients(m), vd_model_arena(m) * sizeof(real));
    status = vd_model_run(m, &step, err);
    out->nll = step.nll_sum * step.scale;
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

/* One line a tensor; returns how many are out of bounds. */
static int compare(vd_ops *cpu, const vd_model_config *config, const struct outcome *a, const struct outcome *b) {
  vd_error err = {0};
  vd_model *m = NULL;
  int failed = 0;
  double loss = fabs(b->nll / a->nll - 1);
  printf("%s loss: CPU %.9f, GPU %.9f, relative difference %.2e (bound %.0e)\n", loss <= LOSS_BOUND ? "ok" : "not ok",
         a->nll, b->nll, loss, LOSS_BOUND);
  failed += !(loss <= LOSS_BOUND);
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
    bool good = relative <= GRADIENT_BOUND;
    printf("%s gradient of %s: relative difference %.2e (bound %.0e)\n", good ? "ok" : "not ok", p->name, relative,
           GRADIENT_BOUND);
    failed += !good;
  }
  qsort(all, (size_t)n, sizeof *all, by_size);
  bool good = all[n / 2] <= MEDIAN_BOUND;
  printf("%s gradients: median relative difference %.2e (bound %.0e)\n", good ? "ok" : "not ok", all[n / 2],
         MEDIAN_BOUND);
  failed += !good;
  free(all);
  vd_model_destroy(m);
  return failed;
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int64_t n_stream = argc > 1 ? atoll(argv[1]) : 8;
  bool trimmed = argc > 2 && strcmp(argv[2], "trimmed") == 0;
  vd_model_config config = {.vocab = VOCAB,
                            .n_layer = argc > 3 ? atoll(argv[3]) : 12,
                            .d_model = 512,
                            .n_head = 8,
                            .d_head = 64,
                            .d_inner = 2048,
                            .dropout = 0.3,
                            .emb_dropout = 0.1,
                            .attn_span = 8192,
                            .ramp = 32,
                            .softmax = trimmed ? VD_TRIMMED : VD_MASKED,
                            .aux_loss_scaler = 5e-7,
                            .init = VD_INIT_TOOLKIT,
                            .seed = 3};
  vd_error err = {0};
  vd_ops *cpu = NULL, *gpu = NULL;
  struct outcome a = {0}, b = {0};
  int failed = 1;
  const vd_cuda_table *table = gpu_table(&err);
  if (table && vd_ops_cpu(&cpu, 0, &err) == VD_OK && table->ops(&gpu, 0, VD_FP32, &err) == VD_OK) {
    double t0 = MPI_Wtime();
    run(cpu, &config, n_stream, &a, &err);
    double t1 = MPI_Wtime();
    if (err.status == VD_OK) run(gpu, &config, n_stream, &b, &err);
    printf("# %lld streams, CPU %.1f s, GPU %.1f s\n", (long long)n_stream, t1 - t0, MPI_Wtime() - t1);
    if (err.status == VD_OK) failed = compare(cpu, &config, &a, &b);
  }
  vd_error_print(&err);
  free(a.gradient);
  free(b.gradient);
  if (gpu) gpu->destroy(gpu);
  if (cpu) cpu->destroy(cpu);
  MPI_Finalize();
  return failed != 0;
}
