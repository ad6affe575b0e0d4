/* Tokens per second of the whole training update, random tokens, as skewed as in text, in blocks of 512. Adaptive
 * spans are as a 12-layer model learns them, held fixed: layers 0 to 4 have heads of 8 to 64 tokens, each later layer
 * one of 700 and one of 1024 + 512 (l - 5); 'masked', dropout 0.3, Adagrad with the recipe's step clip, the span
 * penalty included. Memories are full before anything is timed. The figure is the median over windows of updates,
 * waiting for the GPU at each window's end only. Usage: bench_train STREAMS [PRECISION [WINDOWS [UPDATES [WORDS]]]];
 * one line of JSON. PRECISION is bf16 (the default), fp16 or fp32, or `cpu` for the CPU backend. WORDS is any of these,
 * with commas between them:
 *   transformer_xl   the model of input/enwik8_transformer_xl.nml with its dropout, Adam and norm clip
 *   large            the 24-layer model of input/enwik8_adaptive_span_large_paper.nml; two layers have the spans of one
 *   short            all spans are 0, as in early training
 *   trimmed          the other softmax
 *   parts            on a GPU, as many updates more, with the time that each kind of op takes
 *   layers=N d_model=N heads=N inner=N attn_span=N block=N   another size
 *   span=S           spans of S tokens
 *   head=S           one head of S tokens in each layer, after `span=`
 * Under mpirun the streams are shared out over the ranks, which take the node's GPUs in turn, and the environment's
 * COMM, 'mpi' (the default) or 'nccl', all-reduces gradients; SHARD=on shards the optimizer over the ranks, which are
 * on one node; BUCKET: bytes of a bucket; FIRST_LAYER=with_others: no bucket for the first layer alone; REGISTER=off:
 * no arena is registered with NCCL. */
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

enum { VOCAB = 205, N_HEAD = 8, MAX_HEADS = 64 };

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
  bool cpu, xl, large, short_spans, trimmed, parts;
  int64_t block, n_layer, n_head, d_model, d_inner, attn_span;
  int64_t span, head; /* tokens of all heads, of the last head; -1: as learnt, as the others */
  int32_t *x, *y;
};

/* The number after `name`, which ends in '=' and begins a word. */
static int64_t number(const char *words, const char *name, int64_t otherwise) {
  for (const char *at = words; (at = strstr(at, name)) != NULL; at++)
    if (at == words || at[-1] == ',') return atoll(at + strlen(name));
  return otherwise;
}

static void read_words(struct bench *b, const char *words) {
  b->xl = strstr(words, "transformer_xl"), b->large = strstr(words, "large");
  b->short_spans = strstr(words, "short"), b->trimmed = strstr(words, "trimmed"), b->parts = strstr(words, "parts");
  b->block = number(words, "block=", 512);
  b->n_layer = number(words, "layers=", b->large ? 24 : 12);
  b->d_model = number(words, "d_model=", b->large ? 768 : 512);
  b->d_inner = number(words, "inner=", b->large ? 4096 : 2048);
  b->n_head = number(words, "heads=", N_HEAD);
  b->attn_span = number(words, "attn_span=", 8192);
  b->span = number(words, "span=", -1);
  b->head = number(words, "head=", b->span);
  if (b->n_head > MAX_HEADS || (b->span < 0 && b->n_head != N_HEAD)) vd_bug("spans of %d heads", (int)b->n_head);
}

static double span_of(int layer, size_t head) {
  static const double near[N_HEAD] = {8, 16, 16, 24, 24, 32, 40, 64}, far[N_HEAD] = {16, 24, 40, 64, 110, 220, 700, 0};
  if (layer < 5) return near[head];
  return head < N_HEAD - 1 ? far[head] : 1024 + 512 * (layer - 5);
}

static void set_spans(struct bench *b) {
  for (int i = 0; i < vd_model_n_param(b->model); i++) {
    const vd_param *p = vd_model_param(b->model, i);
    if (!p->is_span) continue;
    real z[MAX_HEADS];
    for (int64_t h = 0; h < b->n_head; h++) {
      double set = (double)(h == b->n_head - 1 ? b->head : b->span);
      double span = b->short_spans ? 0 : b->span >= 0 ? set : span_of(b->large ? p->layer / 2 : p->layer, (size_t)h);
      z[h] = (real)(span / (double)b->attn_span);
    }
    b->ops->put(b->ops, vd_model_params(b->model) + p->at.offset, z, (size_t)b->n_head);
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
  *bpc = stats.nll / (double)(b->n_stream * b->block) / log(2.0);
  return VD_OK;
}

/* As a run does: with a lag the host waits for the update before while the device works on this one. */
static int one_update(struct bench *b, double *bpc, vd_error *err) {
  vd_ops *o = b->ops;
  o->zero_gradients(o, vd_model_gradients(b->model), vd_model_arena(b->model));
  vd_step step = {.x = b->x,
                  .y = b->y,
                  .block = b->block,
                  .update = b->update,
                  .train = true,
                  .scale = vd_optimizer_loss_scale(b->optimizer) / (double)(b->n_stream * b->block),
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
  /* The longest memory of learnt spans, 4,160 tokens, takes 9 blocks; rows of zeros cost as much. */
  for (int i = 0; i < (b->cpu ? 2 : 12); i++)
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
  *c = (vd_model_config){.vocab = VOCAB,
                         .n_layer = b->n_layer,
                         .d_model = b->d_model,
                         .n_head = b->n_head,
                         .d_head = b->d_model / b->n_head,
                         .d_inner = b->d_inner,
                         .seed = 1};
  if (b->xl) {
    c->arch = VD_TRANSFORMER_XL;
    c->dropout = 0.1;
    c->mem_len = b->block;
    c->clamp_len = -1;
    c->untie_r = true;
    *optimizer = (vd_optimizer_config){
        .method = VD_ADAM, .lr = 0.00025, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .clip_norm = 0.25};
    return;
  }
  c->dropout = b->large ? 0.4 : 0.3;
  c->attn_span = b->attn_span;
  c->ramp = 32;
  c->softmax = b->trimmed ? VD_TRIMMED : VD_MASKED;
  c->aux_loss_scaler = 5e-7;
  c->init = VD_INIT_PUBLISHED;
  *optimizer = (vd_optimizer_config){.lr = 0.07, .eps = 1e-10, .clip_step = 0.03, .warmup_updates = 32000};
}

static bool environment_is(const char *name, const char *value) {
  const char *found = getenv(name);
  return found && strcmp(found, value) == 0;
}

/* As a run has them. */
static bool has_symmetric_memory(const struct bench *b) {
  return b->size > 1 && environment_is("COMM", "nccl") && environment_is("SHARD", "on") &&
         !environment_is("REGISTER", "off");
}

static int make_reducer(struct bench *b, vd_error *err) {
  const char *timeline = getenv("TIMELINE"), *bucket = getenv("BUCKET");
  vd_grad_reducer_config config = {.comm = environment_is("COMM", "nccl") ? VD_COMM_NCCL : VD_COMM_MPI,
                                   .nccl = b->table ? b->table->nccl() : NULL,
                                   .shard = environment_is("SHARD", "on"),
                                   .timeout = 60,
                                   .timeline = timeline ? timeline : ""};
  config.bucket = bucket ? (size_t)atoll(bucket) : vd_grad_reducer_default_bucket(&config, true);
  vd_grad_reducer_arenas arenas = vd_grad_reducer_arenas_of(b->model);
  if (environment_is("FIRST_LAYER", "with_others")) arenas.shape.first_layer = 0;
  if (vd_grad_reducer_create(&b->reducer, MPI_COMM_WORLD, &config, b->ops, &arenas, err) == VD_OK)
    vd_grad_reducer_shard_optimizer(b->reducer, b->model, b->optimizer);
  return err->status;
}

/* The backend: the CPUs, or this rank's GPU, the node's in turn. */
static int open_backend(struct bench *b, const char *word, int *device, vd_error *err) {
  int local, locals, count;
  enum vd_precision precision;
  MPI_Comm_rank(MPI_COMM_WORLD, &b->rank);
  MPI_Comm_size(MPI_COMM_WORLD, &b->size);
  b->cpu = strcmp(word, "cpu") == 0;
  if (b->cpu) return vd_ops_cpu(&b->ops, 0, err);
  if (gpu_precision(word, &precision, err)) return err->status;
  b->table = gpu_table(err);
  if (!b->table || b->table->count(&count, err)) return err->status;
  vd_local_rank(MPI_COMM_WORLD, &local, &locals);
  *device = local % count;
  if (b->table->ops(&b->ops, *device, precision, err)) return err->status;
  b->ops = op_times_wrap(b->ops, b->table);
  return VD_OK;
}

/* On a GPU, its name and memory. */
static int describe(const struct bench *b, int device, vd_gpu *gpu, vd_error *err) {
  if (b->cpu) return VD_OK;
  return b->table->describe(device, gpu, err);
}

/* The most frequent symbol has 17 % of the tokens, the next 4 %: gradients of the embedding are summed by symbol. */
static int32_t draw_symbol(uint32_t word) {
  double u = vd_uniform(word);
  int32_t v = (int32_t)(VOCAB * u * u * u);
  return v < VOCAB ? v : VOCAB - 1;
}

static int make(struct bench *b, vd_error *err) {
  vd_model_config config;
  vd_optimizer_config optimizer;
  int64_t last;
  choose(b, &config, &optimizer);
  vd_stream_share(b->n_stream, b->rank, b->size, &b->stream0, &last);
  b->n_own = last - b->stream0;
  size_t n = (size_t)(b->n_own * b->block);
  b->x = vd_calloc(n, sizeof *b->x);
  b->y = vd_calloc(n, sizeof *b->y);
  for (size_t i = 0; i < n; i++) {
    philox4x32_ctr_t r = vd_philox((vd_rng){.seed = 8}, (uint64_t)(b->stream0 * b->block) + i);
    b->x[i] = draw_symbol(r.v[0]);
    b->y[i] = draw_symbol(r.v[1]);
  }
  if (has_symmetric_memory(b) && b->table->nccl()->use_symmetric_memory(b->ops, err)) return err->status;
  if (vd_model_create(&b->model, &config, b->ops, b->stream0, b->n_own, 0, b->block, true, err) ||
      vd_optimizer_create(&b->optimizer, &optimizer, b->model, b->ops, err) || make_reducer(b, err))
    return err->status;
  b->pipeline = vd_update_pipeline_create(b->model, b->optimizer, b->ops);
  set_spans(b);
  return vd_model_reset_memory(b->model, err);
}

static void print_result(const struct bench *b, const char *precision, int updates, const double *seconds, int windows,
                         double bpc, const vd_gpu *gpu) {
  double median = seconds[windows / 2], tokens = (double)(b->n_stream * b->block);
  const char *model = b->xl ? "transformer_xl" : b->large ? "adaptive_span_large" : "adaptive_span";
  printf("{\"gpu\": \"%s\", \"model\": \"%s\", \"precision\": \"%s\", \"streams\": %lld, \"tokens_per_second\": %.0f, "
         "\"ms_per_update\": %.3f, \"fastest_ms\": %.3f, \"slowest_ms\": %.3f, \"memory_gib\": %.2f, "
         "\"updates\": %d, \"bpc\": %.3f, \"ranks\": %d, \"sharded\": %s, \"exposed_sum_ms\": %.3f}\n",
         gpu->name, model, precision, (long long)b->n_stream, tokens / median, median * 1e3, seconds[0] * 1e3,
         seconds[windows - 1] * 1e3, (double)(gpu->total_bytes - gpu->free_bytes) / 1073741824.0, updates, bpc, b->size,
         vd_grad_reducer_is_sharded(b->reducer) ? "true" : "false", b->exposed * 1e3 / updates);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  struct bench b = {.n_stream = argc > 1 ? atoll(argv[1]) : 16};
  const char *word = argc > 2 ? argv[2] : "bf16";
  int windows = argc > 3 ? atoi(argv[3]) : 9, updates = argc > 4 ? atoi(argv[4]) : 10;
  const char *words = argc > 5 ? argv[5] : "";
  read_words(&b, words);
  vd_error err = {0};
  vd_gpu gpu = {0};
  double *seconds = vd_calloc((size_t)windows, sizeof *seconds), bpc = 0;
  int device = 0;
  if (open_backend(&b, word, &device, &err) == VD_OK && make(&b, &err) == VD_OK &&
      measure(&b, windows, updates, seconds, &bpc, &err) == VD_OK && describe(&b, device, &gpu, &err) == VD_OK) {
    if (b.rank == 0) print_result(&b, word, windows * updates, seconds, windows, bpc, &gpu);
    if (b.parts && !b.cpu) measure_parts(&b, updates, &err);
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
