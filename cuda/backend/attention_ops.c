/* See attention_ops.h: translates vd_attention into the kernels' arguments; owns schedules, masks and the key table. */
#include "cuda/backend/attention_ops.h"

#include "cuda/attention/attention.h"
#include "cuda/attention/memory_projection.h"
#include "cuda/backend/gemm.h"
#include "cuda/backend/gradient_stream.h"
#include "cuda/backend/transformer_xl_ops.h"

#include <stdlib.h>
#include <string.h>

/* A layer's tile schedule, found again in backward by the address of its spans. */
typedef struct layer_schedule {
  const float *span;
  void *schedule;
  bool made;               /* since the parameters last changed */
  vd_cuda_attention shape; /* what it was made for */
} layer_schedule;

/* The dropout mask of a layer's attention weights, from forward to backward, and the call that it was drawn for. */
typedef struct layer_mask {
  vd_workspace mask;
  vd_cuda_attention shape;
} layer_mask;

/* The table of relative keys in the activations' type, and its gradient until backward_end. */
typedef struct key_table {
  const float *key_pe;
  int32_t d_head, attn_span;
  bool made;       /* since the parameters last changed */
  void *table;     /* [attn_span, d_head] of type */
  float *gradient; /* vd_cuda_attention_dtable_size() bytes */
  float *dkey_pe;  /* destination of the gradient; NULL: none pending */
} key_table;

enum { VD_MAX_LAYERS = 256 };
struct vd_attention_state {
  layer_schedule layer[VD_MAX_LAYERS];
  int n_layer;
  layer_mask dropout_mask[VD_MAX_LAYERS]; /* by the layer number of the random draws */
  key_table key_table;
};

static struct vd_attention_state *state_of(vd_cuda_backend *c) {
  if (!c->attention) c->attention = vd_calloc(1, sizeof *c->attention);
  return c->attention;
}

static int64_t width_of(const vd_attention *a) {
  return a->n_head * a->d_head;
}

/* Frees all schedules, once those of models that no longer exist have filled the cache. */
static void free_schedules(vd_cuda_backend *c) {
  vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting");
  struct vd_attention_state *s = state_of(c);
  while (s->n_layer > 0) cudaFree(s->layer[--s->n_layer].schedule);
}

/* The cached schedule of the layer with these spans; a new one is zeroed. NULL: out of memory. */
static layer_schedule *schedule_of(vd_cuda_backend *c, const real *span) {
  struct vd_attention_state *s = state_of(c);
  for (int i = 0; i < s->n_layer; i++)
    if (s->layer[i].span == span) return &s->layer[i];
  if (s->n_layer == VD_MAX_LAYERS) free_schedules(c);
  void *schedule = NULL;
  size_t bytes = vd_cuda_attention_schedule_size();
  cudaError_t e = cudaMalloc(&schedule, bytes);
  vd_cuda_record_error(c, e, "allocating a tile schedule");
  if (e != cudaSuccess) return NULL;
  vd_cuda_record_error(c, cudaMemsetAsync(schedule, 0, bytes, c->stream), "zeroing a tile schedule");
  s->layer[s->n_layer] = (layer_schedule){.span = span, .schedule = schedule};
  return &s->layer[s->n_layer++];
}

void vd_cuda_attention_changed(vd_cuda_backend *c) {
  struct vd_attention_state *s = state_of(c);
  s->key_table.made = false;
  for (int i = 0; i < s->n_layer; i++) s->layer[i].made = false;
}

/* The kernels' arguments; qkv NULL: those of a schedule. With relative keys there are no spans, so all layers share one
 * schedule. */
static vd_cuda_attention kernel_of(vd_cuda_backend *c, const vd_attention *a, const vd_qkv *qkv) {
  const layer_schedule *schedule = schedule_of(c, a->span);
  vd_cuda_attention x = {.type = c->type,
                         .n_stream = (int32_t)a->n_stream,
                         .block = (int32_t)a->block,
                         .window = (int32_t)a->window,
                         .bounds = a->bounds,
                         .n_head = (int32_t)a->n_head,
                         .d_head = (int32_t)a->d_head,
                         .attn_span = (int32_t)a->attn_span,
                         .ramp = (int32_t)a->ramp,
                         .first_distance = a->first_distance,
                         .trimmed = a->softmax == VD_TRIMMED,
                         .n_span = (int32_t)a->n_span,
                         .kv_rows = qkv && qkv->memory_rows > 0 ? qkv->memory_rows : a->window,
                         .span = a->span,
                         .schedule = schedule ? schedule->schedule : NULL,
                         .dropout = a->dropout.p,
                         .rng = a->dropout.rng,
                         .row0 = a->dropout.row0,
                         .rel_key = a->rel_key,
                         .rel_stride = width_of(a),
                         .reach = a->rel_key ? (int32_t)a->reach[0] : 0,
                         .content_bias = a->content_bias,
                         .position_bias = a->position_bias};
  for (int64_t h = 0; h < a->n_head && !a->rel_key; h++) x.key_tiles += (int32_t)((a->reach[h] + 63) / 64) + 1;
  size_t bytes = vd_cuda_attention_bias_scores_size(&x);
  x.bias_scores = bytes > 0 ? vd_cuda_workspace(c, &c->scratch, bytes) : NULL;
  bytes = vd_cuda_attention_splits_size(&x);
  x.splits = bytes > 0 ? vd_cuda_workspace(c, &c->scratch, bytes) : NULL;
  return x;
}

/* True where a schedule made for `x` is that of `y`, given the same spans. */
static bool same_shape(const vd_cuda_attention *x, const vd_cuda_attention *y) {
  return x->n_stream == y->n_stream && x->block == y->block && x->window == y->window && x->bounds == y->bounds &&
         x->n_head == y->n_head && x->attn_span == y->attn_span && x->ramp == y->ramp &&
         x->first_distance == y->first_distance && x->trimmed == y->trimmed && x->n_span == y->n_span &&
         !x->rel_key == !y->rel_key && !x->splits == !y->splits && x->reach == y->reach && x->key_tiles == y->key_tiles;
}

/* Makes the schedules that are missing or stale, in one launch. False, with a recorded error, where that fails. */
static bool make_schedules(vd_cuda_backend *c, int n, const vd_cuda_attention *x) {
  vd_cuda_attention *wanted = vd_calloc((size_t)n, sizeof *wanted);
  int32_t n_wanted = 0;
  bool ok = true;
  for (int i = 0; i < n; i++) {
    layer_schedule *schedule = schedule_of(c, x[i].span);
    ok = ok && schedule;
    if (!schedule || (schedule->made && same_shape(&schedule->shape, &x[i]))) continue;
    wanted[n_wanted++] = schedule->shape = x[i];
    schedule->made = true;
  }
  if (n_wanted > 0) {
    cudaError_t e = vd_cuda_attention_make_schedules(n_wanted, wanted, c->stream);
    vd_cuda_record_error(c, e, "tile schedules");
    ok = ok && e == cudaSuccess;
    if (e != cudaSuccess) vd_cuda_attention_changed(c);
  }
  free(wanted);
  return ok;
}

void vd_cuda_attention_schedule_op(vd_ops *o, int n, const vd_attention *a) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (n > VD_MAX_LAYERS) return;
  if (state_of(c)->n_layer + n > VD_MAX_LAYERS) free_schedules(c);
  vd_cuda_attention *x = vd_calloc((size_t)n, sizeof *x);
  for (int i = 0; i < n; i++) x[i] = kernel_of(c, &a[i], NULL);
  make_schedules(c, n, x);
  free(x);
}

void vd_cuda_attention_end(vd_cuda_backend *c) {
  struct vd_attention_state *s = c->attention;
  if (!s) return;
  while (s->n_layer > 0) cudaFree(s->layer[--s->n_layer].schedule);
  for (int i = 0; i < VD_MAX_LAYERS; i++) cudaFree(s->dropout_mask[i].mask.p);
  cudaFree(s->key_table.table);
  cudaFree(s->key_table.gradient);
  free(s);
  c->attention = NULL;
}

/* The key table of a->key_pe, converted again where the parameters have changed. NULL: out of memory. */
static key_table *table_of(vd_cuda_backend *c, const vd_attention *a) {
  key_table *t = &state_of(c)->key_table;
  size_t n = (size_t)(a->d_head * a->attn_span);
  if (!t->table || t->d_head != a->d_head || t->attn_span != a->attn_span) {
    vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting");
    cudaFree(t->table);
    cudaFree(t->gradient);
    *t = (key_table){.d_head = (int32_t)a->d_head, .attn_span = (int32_t)a->attn_span};
    cudaError_t e = cudaMalloc(&t->table, n * c->act_size);
    if (e == cudaSuccess)
      e = cudaMalloc((void **)&t->gradient, vd_cuda_attention_dtable_size(c->type, t->d_head, t->attn_span));
    vd_cuda_record_error(c, e, "allocating the key table");
    if (e != cudaSuccess) return NULL;
  }
  if (t->made && t->key_pe == a->key_pe) return t;
  vd_cuda_record_error(c, vd_cuda_attention_key_pe(c->type, t->d_head, t->attn_span, a->key_pe, t->table, c->stream),
                       "key table");
  t->key_pe = a->key_pe;
  t->made = true;
  return t;
}

/* Adds the table's gradient to its destination, if there is one. */
static void end_table_gradient(vd_cuda_backend *c) {
  key_table *t = &state_of(c)->key_table;
  if (!t->dkey_pe) return;
  vd_cuda_record_error(
      c, vd_cuda_attention_key_pe_backward(c->type, t->d_head, t->attn_span, t->gradient, t->dkey_pe, c->stream),
      "key table's gradient");
  t->dkey_pe = NULL;
}

void vd_cuda_backward_end(vd_ops *o) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_gradient_join(c);
  end_table_gradient(c);
}

/* True where `x` and `y` draw the same dropout mask, in the same layout. */
static bool same_mask(const vd_cuda_attention *x, const vd_cuda_attention *y) {
  return same_shape(x, y) && x->span == y->span && x->row0 == y->row0 && x->dropout == y->dropout &&
         x->rng.seed == y->rng.seed && x->rng.update == y->rng.update && x->rng.layer == y->rng.layer &&
         x->rng.site == y->rng.site;
}

/* The layer's mask buffer, which forward fills for `x`. NULL: the kernels keep no mask. */
static uint32_t *mask_to_write(vd_cuda_backend *c, const vd_cuda_attention *x) {
  size_t bytes = vd_cuda_attention_dropout_mask_size(x);
  if (bytes == 0 || x->rng.layer >= VD_MAX_LAYERS) return NULL;
  layer_mask *l = &state_of(c)->dropout_mask[x->rng.layer];
  l->shape = *x;
  return vd_cuda_workspace(c, &l->mask, bytes);
}
/* The mask that forward left for `x`; NULL where it was for another call, which backward refuses. */
static uint32_t *mask_to_read(vd_cuda_backend *c, const vd_cuda_attention *x) {
  if (x->rng.layer >= VD_MAX_LAYERS) return NULL;
  const layer_mask *l = &state_of(c)->dropout_mask[x->rng.layer];
  return l->mask.p && same_mask(&l->shape, x) ? l->mask.p : NULL;
}

static void record_weights(vd_cuda_backend *c, const vd_cuda_attention *x, const vd_attention_record *record,
                           const vd_qkv *qkv, const key_table *t, const real *lse) {
  const vd_cuda_attention_record r = {.n_distance = (int32_t)record->n_distance,
                                      .sum = record->sum,
                                      .target = record->target,
                                      .n_chosen = record->n_chosen,
                                      .chosen = record->chosen,
                                      .weight = record->weight};
  vd_cuda_record_error(
      c, vd_cuda_attention_record_weights(x, &r, qkv->block, qkv->memory, t ? t->table : NULL, lse, c->stream),
      "recording attention weights");
}

void vd_cuda_attention_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, vd_act *out, real *lse) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_attention x = kernel_of(c, a, qkv);
  const key_table *t = a->rel_key ? NULL : table_of(c, a);
  if ((!t && !a->rel_key) || !make_schedules(c, 1, &x)) return;
  x.dropout_mask = mask_to_write(c, &x);
  vd_cuda_record_error(
      c, vd_cuda_attention_forward(&x, qkv->block, qkv->memory, t ? t->table : NULL, out, lse, c->stream), "attention");
  if (a->record) record_weights(c, &x, a->record, qkv, t, lse);
}

/* Zeroes the table's gradient at the first layer of a pass. All layers add to it; backward_end adds it to dkey_pe. */
static void begin_table_gradient(vd_cuda_backend *c, key_table *t, real *dkey_pe) {
  if (t->dkey_pe == dkey_pe) return;
  end_table_gradient(c);
  size_t bytes = vd_cuda_attention_dtable_size(c->type, t->d_head, t->attn_span);
  vd_cuda_record_error(c, cudaMemsetAsync(t->gradient, 0, bytes, c->stream), "zeroing the key table's gradient");
  t->dkey_pe = dkey_pe;
}

void vd_cuda_attention_backward_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, const vd_act *out,
                                   const real *lse, const vd_act *dout, const vd_qkv *dqkv, real *dkey_pe,
                                   /* NOLINTNEXTLINE(readability-non-const-parameter): written through a struct */
                                   real *dspan) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_attention x = kernel_of(c, a, qkv);
  key_table *t = a->rel_key ? NULL : table_of(c, a);
  x.dropout_mask = mask_to_read(c, &x);
  void *workspace = vd_cuda_workspace(c, &c->partial, vd_cuda_attention_workspace_size(&x));
  if (!x.schedule || (!t && !a->rel_key) || !workspace) return;
  vd_cuda_gradient_release(c, dqkv->block);
  if (t) begin_table_gradient(c, t, dkey_pe);
  vd_cuda_attention_gradient g = {.block = qkv->block,
                                  .memory = qkv->memory,
                                  .table = t ? t->table : NULL,
                                  .out = out,
                                  .lse = lse,
                                  .dout = dout,
                                  .dblock = dqkv->block,
                                  .dmemory = dqkv->memory,
                                  .dtable = t ? t->gradient : NULL,
                                  .dspan = dspan,
                                  .workspace = workspace,
                                  .side = c->side,
                                  .fork = c->fork,
                                  .join = c->join,
                                  .drel_key = a->drel_key,
                                  .dcontent_bias = a->dcontent_bias,
                                  .dposition_bias = a->dposition_bias};
  vd_cuda_record_error(c, vd_cuda_attention_backward(&x, &g, c->stream), "attention backward");
}

/* Queries, keys and values of the block, by one product where the weights are contiguous. */
static void project_block(vd_cuda_backend *c, const vd_attention *a, const vd_act *hidden, const real *const weight[3],
                          vd_act *block) {
  int64_t d = width_of(a), in = a->d_model > 0 ? a->d_model : d;
  int joined = vd_cuda_are_contiguous(3, weight, d * in) ? 3 : 1;
  for (int i = 0; i < 3; i += joined) {
    vd_gemm_call call = {.m = a->n_stream * a->block,
                         .n = joined * d,
                         .k = in,
                         .n_batch = 1,
                         .a = {hidden, in, 0, false},
                         .b = {vd_cuda_weight(c, weight[i]), in, 0, true},
                         .c = (char *)block + (size_t)(i * d) * c->act_size,
                         .ldc = 3 * d,
                         .alpha = 1};
    vd_cuda_gemm(c, &call);
  }
}

static void project_block_backward(vd_cuda_backend *c, const vd_attention *a, const vd_act *hidden,
                                   const real *const weight[3], const vd_act *dblock, vd_act *dhidden,
                                   real *const dweight[3]) {
  int64_t d = width_of(a), in = a->d_model > 0 ? a->d_model : d, n = a->n_stream * a->block;
  const real *const gradient[] = {dweight[0], dweight[1], dweight[2]};
  int joined = vd_cuda_are_contiguous(3, weight, d * in) && vd_cuda_are_contiguous(3, gradient, d * in) ? 3 : 1;
  for (int i = 0; i < 3; i += joined) {
    const char *mine = (const char *)dblock + (size_t)(i * d) * c->act_size;
    vd_cuda_weight_gradient(c, n, joined * d, in, mine, 3 * d, hidden, dweight[i]);
    vd_cuda_input_gradient(c, n, joined * d, in, mine, 3 * d, weight[i], dhidden, true);
  }
}

void vd_cuda_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                               const real *wk, const real *wv, const vd_qkv *qkv) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const real *const weight[] = {wq, wk, wv};
  project_block(c, a, in->hidden, weight, qkv->block);
  if (a->rel_key) {
    vd_cuda_relative_project(c, a, in, weight + 1, qkv);
    return;
  }
  if (a->window == 0) return;
  vd_cuda_attention x = kernel_of(c, a, qkv);
  const vd_cuda_ring memory = {in->memory, in->memory_rows, in->oldest};
  if (!make_schedules(c, 1, &x)) return;
  vd_cuda_record_error(
      c, vd_cuda_project_memory(&x, &memory, vd_cuda_weight(c, wk), vd_cuda_weight(c, wv), qkv->memory, c->stream),
      "projecting memory rows");
}

/* dwk, dwv += gradients from memory rows, on the gradient stream. */
static void memory_backward(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in, const vd_qkv *dqkv,
                            real *dwk, real *dwv, cudaStream_t stream) {
  vd_cuda_attention x = kernel_of(c, a, dqkv);
  const vd_cuda_ring memory = {in->memory, in->memory_rows, in->oldest};
  void *workspace = vd_cuda_workspace(c, &c->gradient.scratch, vd_cuda_project_workspace_size(&x));
  if (!workspace) return;
  vd_cuda_record_error(c, vd_cuda_project_memory_backward(&x, &memory, dqkv->memory, dwk, dwv, workspace, stream),
                       "gradients from memory rows");
}

void vd_cuda_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                        const real *wk, const real *wv, const vd_qkv *dqkv, vd_act *dhidden, real *dwq,
                                        real *dwk, real *dwv) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const real *const weight[] = {wq, wk, wv};
  real *const dweight[] = {dwq, dwk, dwv};
  cudaStream_t stream = vd_cuda_gradient_fork(c);
  vd_cuda_gradient_release(c, dhidden);
  project_block_backward(c, a, in->hidden, weight, dqkv->block, dhidden, dweight);
  if (a->rel_key)
    vd_cuda_relative_project_backward(c, a, in, dqkv->memory, dweight + 1, stream);
  else
    memory_backward(c, a, in, dqkv, dwk, dwv, stream);
  vd_cuda_gradient_job(c, dqkv->block);
}
