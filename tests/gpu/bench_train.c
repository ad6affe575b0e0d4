/* Tokens per second of the whole training update on a GPU, random tokens in blocks of 512. Adaptive spans are as a
 * 12-layer model learns them, held fixed: layers 0 to 4 have heads of 8 to 64 tokens, each later layer one of 700 and
 * one of 1024 + 512 (l - 5); 'masked', dropout 0.3, Adagrad with the recipe's step clip, the span penalty included.
 * Memories are full before anything is timed. The figure is the median over windows of updates, waiting for the GPU at
 * each window's end only. Usage: bench_train STREAMS [PRECISION [WINDOWS [UPDATES [WORDS]]]]; one line of JSON. WORDS
 * is any of `transformer_xl`: the model of input/enwik8_transformer_xl.nml with its dropout, Adam and norm clip;
 * `short`: all spans are 0, as in early training; `trimmed`; `parts`: as many updates more, with the time that each
 * kind of op takes. Under mpirun the streams are shared out over the ranks, which take the node's GPUs in turn, and the
 * environment's COMM, 'mpi' (the default) or 'nccl', sums gradients; SHARD=on shards the optimizer over the ranks,
 * which are on one node; BUCKET: bytes of a bucket. */
#include "io/streams.h"
#include "src/comm/collectives.h"
#include "src/comm/grad_reducer.h"
#include "src/model/model.h"
#include "src/train/update_pipeline.h"
#include "tests/gpu/gpu_ops.h"
#include "tests/gpu/op_times.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 512, VOCAB = 205, N_LAYER = 12, N_HEAD = 8, ATTN_SPAN = 8192 };

struct bench {
  vd_ops *ops;
  vd_model *model;
  vd_optimizer *optimizer;
  vd_update_pipeline *pipeline;
  int rank, size;
  const vd_cuda_plugin *table;
  vd_grad_reducer *reducer;
  double exposed; /* seconds of all updates so far */
  int64_t n_stream, stream0, n_own, update;
  bool xl, short_spans, trimmed, parts;
  int32_t *x, *y;
};

static double span_of(int layer, size_t head) {
  static const double near[N_HEAD] = {8, 16, 16, 24, 24, 32, 40, 64}, far[N_HEAD] = {16, 24, 40, 64, 110, 220, 700, 0};
  if (layer < 5) return near[head];
  return head < N_HEAD - 1 ? far[head] : 1024 + 512 * (layer - 5);
}

static void set_spans(struct bench *b) {
  for (int i = 0; i < vd_model_n_param(b->model); i++) {
    const vd_param *p = vd_model_param(b->model, i);
    if (!p->is_span) continue;
    real z[N_HEAD];
    for (size_t h = 0; h < N_HEAD; h++) z[h] = b->short_spans ? 0 : (real)(span_of(p->layer, h) / ATTN_SPAN);
    b->ops->put(b->ops, vd_model_params(b->model) + p->at.offset, z, N_HEAD);
  }
  vd_model_params_changed(b->model);
}

/* A zero gradient moves nothing in Adagrad. */
static void hold_spans(struct bench *b) {
  for (int i = 0; i < vd_model_n_param(b->model); i++) {
    const vd_param *p = vd_model_param(b->model, i);
    if (p->is_span) b->ops->zero(b->ops, vd_model_gradients(b->model) + p->at.offset, p->at.size * sizeof(real));
  }
}

/* Waits for the pending update. */
static int pull(struct bench *b, double *bpc, vd_error *err) {
  vd_update_stats stats;
  if (vd_update_pipeline_pull(b->pipeline, &stats, err)) return err->status;
  b->exposed += vd_grad_reducer_exposed_seconds(b->reducer, stats.update + 1);
  vd_grad_reducer_all_reduce_scalars(b->reducer, &stats.nll, 1);
  *bpc = stats.nll / (double)(b->n_stream * BLOCK) / log(2.0);
  return VD_OK;
}

/* As a run does: with a lag the host waits for the update before while the device works on this one. */
static int one_update(struct bench *b, double *bpc, vd_error *err) {
  vd_ops *o = b->ops;
  o->zero(o, vd_model_gradients(b->model), vd_model_arena(b->model) * sizeof(real));
  vd_step step = {.x = b->x,
                  .y = b->y,
                  .block = BLOCK,
                  .update = b->update,
                  .train = true,
                  .scale = vd_optimizer_loss_scale(b->optimizer) / (double)(b->n_stream * BLOCK),
                  .ready = vd_grad_reducer_ready,
                  .needed = vd_grad_reducer_needed,
                  .receiver = b->reducer};
  vd_grad_reducer_begin(b->reducer, b->update + 1);
  if (vd_update_pipeline_run(b->pipeline, &step, err) || vd_grad_reducer_check(b->reducer, err)) return err->status;
  if (vd_update_pipeline_pending(b->pipeline) > 0 && pull(b, bpc, err)) return err->status;
  vd_grad_reducer_finish(b->reducer);
  vd_model_span_penalty(b->model, true);
  hold_spans(b);
  if (vd_update_pipeline_push(b->pipeline, b->update++, (double)step.n_target, false, err)) return err->status;
  if (vd_update_pipeline_is_full(b->pipeline) && pull(b, bpc, err)) return err->status;
  return VD_OK;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static int measure(struct bench *b, int windows, int updates, double *seconds, double *bpc, vd_error *err) {
  for (int i = 0; i < 12; i++) /* the longest memory, 4,160 tokens, takes 9 blocks */
    if (one_update(b, bpc, err)) return err->status;
  b->exposed = 0;
  for (int w = 0; w < windows; w++) {
    if (b->ops->synchronize(b->ops, err)) return err->status;
    MPI_Barrier(MPI_COMM_WORLD);
    double start = MPI_Wtime();
    for (int i = 0; i < updates; i++)
      if (one_update(b, bpc, err)) return err->status;
    if (b->ops->synchronize(b->ops, err)) return err->status;
    seconds[w] = (MPI_Wtime() - start) / updates;
  }
  qsort(seconds, (size_t)windows, sizeof *seconds, by_value);
  return VD_OK;
}

/* On rank 0 the time that each kind of op takes. */
static int measure_parts(struct bench *b, int updates, vd_error *err) {
  double bpc;
  for (int i = 0; i < updates; i++) {
    op_times_update(b->ops);
    if (one_update(b, &bpc, err) || b->ops->synchronize(b->ops, err)) return err->status;
  }
  op_times_update(b->ops);
  if (b->rank == 0) op_times_print(b->ops);
  return VD_OK;
}

static void choose(const struct bench *b, vd_model_config *c, vd_optimizer_config *optimizer) {
  *c = (vd_model_config){
      .vocab = VOCAB, .n_layer = N_LAYER, .d_model = 512, .n_head = N_HEAD, .d_head = 64, .d_inner = 2048, .seed = 1};
  if (b->xl) {
    c->arch = VD_TRANSFORMER_XL;
    c->dropout = 0.1;
    c->mem_len = BLOCK;
    c->clamp_len = -1;
    c->untie_r = true;
    *optimizer = (vd_optimizer_config){
        .method = VD_ADAM, .lr = 0.00025, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .clip_norm = 0.25};
    return;
  }
  c->dropout = 0.3;
  c->attn_span = ATTN_SPAN;
  c->ramp = 32;
  c->softmax = b->trimmed ? VD_TRIMMED : VD_MASKED;
  c->aux_loss_scaler = 5e-7;
  c->init = VD_INIT_PUBLISHED;
  *optimizer = (vd_optimizer_config){.lr = 0.07, .eps = 1e-10, .clip_step = 0.03, .warmup_updates = 32000};
}

static int make_reducer(struct bench *b, vd_error *err) {
  const char *comm = getenv("COMM"), *timeline = getenv("TIMELINE"), *bucket = getenv("BUCKET");
  const char *shard = getenv("SHARD");
  bool nccl = comm && strcmp(comm, "nccl") == 0;
  vd_grad_reducer_config config = {.comm = nccl ? VD_COMM_NCCL : VD_COMM_MPI,
                                   .nccl = b->table->nccl(),
                                   .shard = shard && strcmp(shard, "on") == 0,
                                   .timeout = 60,
                                   .timeline = timeline ? timeline : ""};
  config.bucket = bucket ? (size_t)atoll(bucket) : vd_grad_reducer_default_bucket(&config, true);
  const vd_grad_reducer_arenas arenas = vd_grad_reducer_arenas_of(b->model);
  if (vd_grad_reducer_create(&b->reducer, MPI_COMM_WORLD, &config, b->ops, &arenas, err) == VD_OK)
    vd_grad_reducer_shard_optimizer(b->reducer, b->model, b->optimizer);
  return err->status;
}

/* The GPU of this rank: the node's in turn. */
static int own_gpu(struct bench *b, int *device, vd_error *err) {
  int local, locals, count;
  MPI_Comm_rank(MPI_COMM_WORLD, &b->rank);
  MPI_Comm_size(MPI_COMM_WORLD, &b->size);
  b->table = gpu_table(err);
  if (!b->table || b->table->count(&count, err)) return err->status;
  vd_local_rank(MPI_COMM_WORLD, &local, &locals);
  *device = local % count;
  return VD_OK;
}

static int make(struct bench *b, vd_error *err) {
  vd_model_config config;
  vd_optimizer_config optimizer;
  int64_t last;
  choose(b, &config, &optimizer);
  vd_stream_share(b->n_stream, b->rank, b->size, &b->stream0, &last);
  b->n_own = last - b->stream0;
  size_t n = (size_t)(b->n_own * BLOCK);
  b->x = vd_calloc(n, sizeof *b->x);
  b->y = vd_calloc(n, sizeof *b->y);
  for (size_t i = 0; i < n; i++) {
    philox4x32_ctr_t r = vd_philox((vd_rng){.seed = 8}, (uint64_t)(b->stream0 * BLOCK) + i);
    b->x[i] = (int32_t)(r.v[0] % (uint32_t)VOCAB);
    b->y[i] = (int32_t)(r.v[1] % (uint32_t)VOCAB);
  }
  if (vd_model_create(&b->model, &config, b->ops, b->stream0, b->n_own, 0, BLOCK, true, err) ||
      vd_optimizer_create(&b->optimizer, &optimizer, b->model, b->ops, err) || make_reducer(b, err))
    return err->status;
  b->pipeline = vd_update_pipeline_create(b->model, b->optimizer, b->ops);
  set_spans(b);
  return vd_model_reset_memory(b->model, err);
}

static void print_result(const struct bench *b, const char *precision, int updates, const double *seconds, int windows,
                         double bpc, const vd_gpu *gpu) {
  double median = seconds[windows / 2], tokens = (double)(b->n_stream * BLOCK);
  printf("{\"gpu\": \"%s\", \"model\": \"%s\", \"precision\": \"%s\", \"streams\": %lld, \"tokens_per_second\": %.0f, "
         "\"ms_per_update\": %.3f, \"fastest_ms\": %.3f, \"slowest_ms\": %.3f, \"memory_gib\": %.2f, "
         "\"updates\": %d, \"bpc\": %.3f, \"ranks\": %d, \"sharded\": %s, \"exposed_sum_ms\": %.3f}\n",
         gpu->name, b->xl ? "transformer_xl" : "adaptive_span", precision, (long long)b->n_stream, tokens / median,
         median * 1e3, seconds[0] * 1e3, seconds[windows - 1] * 1e3,
         (double)(gpu->total_bytes - gpu->free_bytes) / 1073741824.0, updates, bpc, b->size,
         vd_grad_reducer_is_sharded(b->reducer) ? "true" : "false", b->exposed * 1e3 / updates);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  struct bench b = {.n_stream = argc > 1 ? atoll(argv[1]) : 16};
  const char *word = argc > 2 ? argv[2] : "bf16";
  int windows = argc > 3 ? atoi(argv[3]) : 9, updates = argc > 4 ? atoi(argv[4]) : 10;
  const char *words = argc > 5 ? argv[5] : "";
  b.xl = strstr(words, "transformer_xl");
  b.short_spans = strstr(words, "short"), b.trimmed = strstr(words, "trimmed"), b.parts = strstr(words, "parts");
  enum vd_precision precision;
  vd_error err = {0};
  vd_gpu before = {0}, after = {0};
  double *seconds = vd_calloc((size_t)windows, sizeof *seconds), bpc = 0;
  int device = 0;
  if (gpu_precision(word, &precision, &err) == VD_OK && own_gpu(&b, &device, &err) == VD_OK &&
      b.table->describe(device, &before, &err) == VD_OK && b.table->ops(&b.ops, device, precision, &err) == VD_OK &&
      (b.ops = op_times_wrap(b.ops, b.table)) != NULL && make(&b, &err) == VD_OK &&
      measure(&b, windows, updates, seconds, &bpc, &err) == VD_OK && b.table->describe(device, &after, &err) == VD_OK) {
    if (b.rank == 0) print_result(&b, word, windows * updates, seconds, windows, bpc, &after);
    if (b.parts) measure_parts(&b, updates, &err);
  }
  vd_error_print(&err);
  if (err.status != VD_OK && b.size > 1) MPI_Abort(MPI_COMM_WORLD, err.status);
  vd_grad_reducer_destroy(b.reducer);
  vd_update_pipeline_destroy(b.pipeline);
  vd_optimizer_destroy(b.optimizer);
  vd_model_destroy(b.model);
  if (b.ops) b.ops->destroy(b.ops);
  free(b.x), free(b.y), free(seconds);
  MPI_Finalize();
  return err.status;
}
