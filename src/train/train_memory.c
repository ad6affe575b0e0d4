/* The memory and the disk that a training run needs, and whether GPUs have that much free. */
#include "src/comm/collectives.h"
#include "src/ops/cuda_limits.h"
#include "src/train/train.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const double VD_GIB = 1073741824.0;

int64_t vd_train_window(const vd_model_config *c, double z) {
  if (c->arch == VD_TRANSFORMER_XL) return c->mem_len;
  double reach = ceil(z * (double)c->attn_span) + (double)c->ramp;
  int64_t cur = reach < (double)c->attn_span ? (int64_t)reach : c->attn_span;
  int64_t cut = c->attn_span - cur < c->attn_span - 1 ? c->attn_span - cur : c->attn_span - 1;
  return c->attn_span - VD_WINDOW_STEP * (cut / VD_WINDOW_STEP);
}

int64_t vd_train_first_window(const vd_model_config *c) {
  return vd_train_window(c, c->span_init);
}

/* The evaluator's model shares the parameters, and its layers one set of activations but for their inputs. */
static double evaluator_bytes(const vd_train *t, int64_t window) {
  const vd_settings *s = t->settings;
  const vd_model_config *c = &t->config;
  if (s->valid.interval <= 0) return 0;
  int64_t streams = vd_stream_greatest_share(s->valid.streams, t->ctx->size), block = s->data.tokens_per_sample;
  int64_t micro = vd_model_streams_at_once(streams, s->data.micro_streams);
  vd_memory_estimate e;
  vd_model_estimate(c, t->ops->act_size, streams, s->data.micro_streams, block, window, &e);
  double rows = (double)(micro * block), layers = (double)c->n_layer, d = (double)c->d_model;
  return e.memories + e.activations / layers + e.logits + rows * (layers + 2) * d * (double)t->ops->act_size;
}

/* What attention's 16-bit kernels keep for each pair of 64 queries and 64 keys (cuda/attention/attention.h): of all
 * layers the dropout mask from forward to backward, and of one layer at a time the weights, up to a limit or those of
 * one stream. */
static double attention_pair_bytes(const vd_train *t, int64_t window) {
  const vd_settings *s = t->settings;
  const vd_model_config *c = &t->config;
  int64_t block = s->data.tokens_per_sample, streams = vd_model_streams_at_once(t->n_own, s->data.micro_streams);
  bool xl = c->arch == VD_TRANSFORMER_XL;
  const int64_t widest = t->device.precision == VD_BF16 && !xl ? 96 : 64; /* of the kernels that keep them */
  if (t->device.precision == VD_FP32 || c->d_head > widest) return 0;
  int64_t far = xl ? window + block : window; /* the longest reach of a head */
  int64_t tiles = ((block + 63) / 64) * ((far + 63) / 64 + 1);
  double pairs = (double)(c->n_head * tiles); /* of a stream and layer */
  double masks = (xl ? c->dropatt : c->dropout) > 0 ? (double)(c->n_layer * streams) * pairs * VD_CUDA_MASK_BYTES : 0;
  double weights = pairs * VD_CUDA_WEIGHT_BYTES; /* of a stream */
  return masks + fmin((double)streams * weights, fmax(weights, VD_CUDA_WEIGHT_LIMIT));
}

/* What the backend allocates besides the model's buffers (cuda/backend/context.h): the parameters in the activations'
 * type, the key table and its gradient, what attention keeps, partial sums, and 256 MiB. Half of these are the
 * workspaces of cuBLASLt, of reductions over rows, of attention's work lists and of the optimiser; the other half is a
 * margin, since an H100 used 0.38 GiB (16 streams) and 0.75 GiB (64 streams) more than this sum without it. */
static double cuda_bytes(const vd_train *t, const vd_memory_estimate *e, int64_t window) {
  const vd_model_config *c = &t->config;
  double act = (double)t->ops->act_size, constant = 256.0 * 1048576.0;
  double copy = t->device.precision == VD_FP32 ? 0 : e->parameters * act / (double)sizeof(real);
  if (c->arch == VD_TRANSFORMER_XL) return copy + attention_pair_bytes(t, window) + constant;
  double table = (double)(c->attn_span * c->d_head) * (act + sizeof(float));
  /* A wide model's partial weight gradients of memory rows, two of each head; those of a narrow one are in `constant`.
   */
  double partial = 4.0 * (double)(c->d_model * c->d_model) * sizeof(float);
  return copy + table + partial + attention_pair_bytes(t, window) + constant;
}

double vd_train_memory(const vd_train *t, int64_t streams, int64_t window, vd_train_need *need) {
  const vd_settings *s = t->settings;
  vd_memory_estimate *e = &need->model;
  /* On a GPU windows are planned one step longer (update_pipeline.h). */
  if (t->device.is_gpu && t->config.arch == VD_ADAPTIVE_SPAN && window + VD_WINDOW_STEP <= t->config.attn_span)
    window += VD_WINDOW_STEP;
  vd_model_estimate(&t->config, t->ops->act_size, streams, s->data.micro_streams, s->data.tokens_per_sample, window, e);
  e->optimizer *= s->optimizer.method == VD_ADAM ? 2.0 : 1.0; /* states */
  need->evaluator = evaluator_bytes(t, window);
  need->backend = t->device.is_gpu ? cuda_bytes(t, e, window) : 0;
  return e->parameters + e->gradients + e->optimizer + e->memories + e->activations + e->workspace + need->evaluator +
         need->backend;
}

/* A checkpoint in bytes: parameters and optimizer states, and the memories of all streams. */
struct checkpoint_size {
  double arena, tensors; /* in memory: one arena; everything */
  double file;
};

static struct checkpoint_size checkpoint_size(const vd_train *t, int64_t window) {
  const vd_settings *s = t->settings;
  vd_memory_estimate e;
  vd_model_estimate(&t->config, sizeof(real), s->data.batch_streams, 1, s->data.tokens_per_sample, window, &e);
  double arenas = e.parameters * (s->optimizer.method == VD_ADAM ? 3.0 : 2.0);
  struct checkpoint_size size = {.arena = e.parameters, .tensors = arenas + e.memories};
  /* Compressed: 0.80 to 0.84 was measured for float32, 0.34 for bf16 and 0.43 for fp16 in it. */
  double memories = t->ops->act_size < sizeof(real) ? 0.45 : 0.85;
  size.file = s->checkpoint.compress ? 0.85 * arenas + memories * e.memories : size.tensors;
  return size;
}

double vd_train_host_memory(const vd_train *t, int64_t window) {
  vd_train_need need;
  struct checkpoint_size checkpoint = checkpoint_size(t, window);
  double arena = checkpoint.arena, bytes = 0;
  if (!t->device.is_gpu)
    bytes = vd_train_memory(t, t->n_own, window, &need);
  else if (t->device.comm == VD_COMM_MPI && t->ctx->size > 1)
    bytes = arena; /* gradients on their way through host memory */
  return t->ctx->rank > 0 ? bytes : bytes + fmin(checkpoint.tensors, arena + (double)VD_TASK_QUEUE_BYTES);
}

double vd_train_disk(const vd_train *t, int64_t window, int64_t *files) {
  const vd_settings *s = t->settings;
  const vd_model_config *c = &t->config;
  double file = checkpoint_size(t, window).file, updates = (double)s->run.max_updates;
  double row = (double)(c->n_layer * c->n_head) * sizeof(float) + 7 * sizeof(double), line = 300;
  double written = 1 + floor(updates / (double)s->checkpoint.interval);
  if (s->valid.interval > 0) written += floor(updates / (double)s->valid.interval);
  *files = (int64_t)fmin(written, (double)s->checkpoint.keep + 2); /* the best, and the one that is being written */
  return (double)*files * file + 2 * row * (1 + floor(updates / (double)s->trace.interval)) +
         line * (1 + floor(updates / (double)s->run.log_interval));
}

/* What one rank needs on which GPU, in bytes. */
struct claim {
  char host[64], gpu[128];
  unsigned char uuid[16];
  double need, available;
};

/* Compares what all ranks of one GPU need with its free memory. `first`: a rank; does nothing unless it is the lowest
 * of its GPU. */
static void check_gpu(const struct claim *all, int size, int first, vd_error *err) {
  double need = 0, available = all[first].available;
  int ranks = 0;
  for (int r = 0; r < size; r++) {
    if (memcmp(all[r].uuid, all[first].uuid, sizeof all[r].uuid) != 0) continue;
    if (r < first) return;
    ranks++;
    need += all[r].need;
    available = fmin(available, all[r].available);
  }
  if (need > available)
    vd_fail(err, VD_FAILED,
            "the GPU of rank %d (%s, host %s) has %.2f GiB free, and %d rank%s need%s about %.2f GiB there as the run "
            "begins: fewer data%%batch_streams, or data%%micro_streams, or more GPUs",
            first, all[first].gpu, all[first].host, available / VD_GIB, ranks, ranks > 1 ? "s" : "",
            ranks > 1 ? "" : "s", need / VD_GIB);
}

int vd_train_check_sizes(const vd_train *t, vd_error *err) {
  const vd_settings *s = t->settings;
  const int64_t micro = s->data.micro_streams, block = s->data.tokens_per_sample;
  const int64_t own = vd_stream_greatest_share(t->geometry.n_stream, t->ctx->size);
  const int64_t valid = vd_stream_greatest_share(s->valid.streams, t->ctx->size);
  if (vd_model_check_sizes(&t->config, t->ops, own, micro, block, err)) return err->status;
  if (s->valid.interval > 0 && vd_model_check_sizes(&t->config, t->ops, valid, micro, block, err))
    return vd_wrap(err, "valid%%streams = %lld", (long long)s->valid.streams);
  return VD_OK;
}

int vd_train_check_memory(const vd_train *t, int64_t window, vd_error *err) {
  if (!t->device.is_gpu) return VD_OK;
  vd_train_need need;
  struct claim own = {.available = (double)t->device.gpu.free_bytes};
  gethostname(own.host, sizeof own.host - 1);
  memcpy(own.gpu, t->device.gpu.name, sizeof own.gpu);
  memcpy(own.uuid, t->device.gpu.uuid, sizeof own.uuid);
  own.need = vd_train_memory(t, t->n_own, window, &need);
  struct claim *all = vd_calloc((size_t)t->ctx->size, sizeof *all);
  MPI_Allgather(&own, (int)sizeof own, MPI_BYTE, all, (int)sizeof own, MPI_BYTE, t->ctx->comm);
  for (int r = 0; r < t->ctx->size; r++) check_gpu(all, t->ctx->size, r, err);
  free(all);
  return err->status; /* all ranks saw the same */
}
