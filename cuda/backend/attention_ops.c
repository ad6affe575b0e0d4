/* Attention and its projections: src/ops/ops.h's words for the kernels of attention.h. */
#include "cuda/backend/attention_ops.h"
#include "cuda/attention/memory_projection.h"

#include "cuda/backend/gemm.h"
#include "cuda/backend/transformer_xl_ops.h"

#include <stdlib.h>
#include <string.h>

_Static_assert((int)VD_CUDA_MOST_HEADS == (int)VD_CUDA_MAX_HEADS, "heads that the program is told of");

static int64_t width_of(const vd_attention *a) {
  return a->n_head * a->d_head;
}

/* Other models have come and gone. */
static void drop_plans(vd_cuda_backend *c) {
  vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting");
  while (c->n_layer > 0) cudaFree(c->layer[--c->n_layer].plan);
}

/* The layer's plan, the same for the same spans. NULL: no memory for it. */
static vd_layer_plan *plan_of(vd_cuda_backend *c, const real *span) {
  for (int i = 0; i < c->n_layer; i++)
    if (c->layer[i].span == span) return &c->layer[i];
  if (c->n_layer == VD_MAX_LAYERS) drop_plans(c);
  void *plan = NULL;
  size_t bytes = vd_cuda_attention_schedule_size();
  cudaError_t e = cudaMalloc(&plan, bytes);
  vd_cuda_record_error(c, e, "allocating a plan");
  if (e != cudaSuccess) return NULL;
  vd_cuda_record_error(c, cudaMemsetAsync(plan, 0, bytes, c->stream), "zeroing a plan");
  c->layer[c->n_layer] = (vd_layer_plan){.span = span, .plan = plan};
  return &c->layer[c->n_layer++];
}

void vd_cuda_attention_changed(vd_cuda_backend *c) {
  c->key_table.made = false;
  for (int i = 0; i < c->n_layer; i++) c->layer[i].made = false;
}

/* What every kernel is told. Relative keys know no spans, and one plan and one room serve all layers. */
static vd_cuda_attention kernel_of(vd_cuda_backend *c, const vd_attention *a) {
  const vd_layer_plan *plan = plan_of(c, a->span);
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
                         .kv_rows = a->window,
                         .span = a->span,
                         .schedule = plan ? plan->plan : NULL,
                         .dropout = a->dropout.p,
                         .rng = a->dropout.rng,
                         .row0 = a->dropout.row0,
                         .rel_key = a->rel_key,
                         .rel_stride = width_of(a),
                         .reach = a->rel_key ? (int32_t)a->reach[0] : 0,
                         .content_bias = a->content_bias,
                         .position_bias = a->position_bias};
  size_t bytes = vd_cuda_attention_bias_scores_size(&x);
  x.bias_scores = bytes > 0 ? vd_cuda_workspace(c, &c->scratch, bytes) : NULL;
  return x;
}

/* Does a plan made for `x` serve `y` with the same spans? */
static bool alike(const vd_cuda_attention *x, const vd_cuda_attention *y) {
  return x->n_stream == y->n_stream && x->block == y->block && x->window == y->window && x->bounds == y->bounds &&
         x->n_head == y->n_head && x->attn_span == y->attn_span && x->ramp == y->ramp &&
         x->first_distance == y->first_distance && x->trimmed == y->trimmed && x->n_span == y->n_span &&
         !x->rel_key == !y->rel_key && x->reach == y->reach;
}

/* Makes those plans that are not there yet. False, with a noted error, where that fails. */
static bool make_plans(vd_cuda_backend *c, int n, const vd_cuda_attention *x) {
  vd_cuda_attention *wanted = vd_calloc((size_t)n, sizeof *wanted);
  int32_t n_wanted = 0;
  bool whole = true;
  for (int i = 0; i < n; i++) {
    vd_layer_plan *plan = plan_of(c, x[i].span);
    whole = whole && plan;
    if (!plan || (plan->made && alike(&plan->shape, &x[i]))) continue;
    wanted[n_wanted++] = plan->shape = x[i];
    plan->made = true;
  }
  if (n_wanted > 0) {
    cudaError_t e = vd_cuda_attention_make_schedules(n_wanted, wanted, c->stream);
    vd_cuda_record_error(c, e, "attention's plans");
    whole = whole && e == cudaSuccess;
    if (e != cudaSuccess) vd_cuda_attention_changed(c);
  }
  free(wanted);
  return whole;
}

void vd_cuda_attention_plan_op(vd_ops *o, int n, const vd_attention *a) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (n > VD_MAX_LAYERS) return;
  if (c->n_layer + n > VD_MAX_LAYERS) drop_plans(c);
  vd_cuda_attention *x = vd_calloc((size_t)n, sizeof *x);
  for (int i = 0; i < n; i++) x[i] = kernel_of(c, &a[i]);
  make_plans(c, n, x);
  free(x);
}

void vd_cuda_attention_end(vd_cuda_backend *c) {
  while (c->n_layer > 0) cudaFree(c->layer[--c->n_layer].plan);
  for (int i = 0; i < VD_MAX_LAYERS; i++) cudaFree(c->kept[i].room.p);
  cudaFree(c->key_table.table);
  cudaFree(c->key_table.gradient);
  c->key_table = (vd_key_table){0};
}

/* The key table of a->key_pe, up to date. */
static vd_key_table *table_of(vd_cuda_backend *c, const vd_attention *a) {
  vd_key_table *t = &c->key_table;
  size_t n = (size_t)(a->d_head * a->attn_span);
  if (!t->table || t->d_head != a->d_head || t->attn_span != a->attn_span) {
    vd_cuda_record_error(c, cudaStreamSynchronize(c->stream), "waiting");
    cudaFree(t->table);
    cudaFree(t->gradient);
    *t = (vd_key_table){.d_head = (int32_t)a->d_head, .attn_span = (int32_t)a->attn_span};
    cudaError_t e = cudaMalloc(&t->table, n * c->act_size);
    if (e == cudaSuccess) e = cudaMalloc((void **)&t->gradient, n * sizeof(float));
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

void vd_cuda_backward_end(vd_ops *o) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_key_table *t = &c->key_table;
  if (!t->dkey_pe) return;
  vd_cuda_record_error(c,
                       vd_cuda_attention_key_pe_backward(t->d_head, t->attn_span, t->gradient, t->dkey_pe, c->stream),
                       "key table's gradient");
  t->dkey_pe = NULL;
}

/* Are the weights that dropout keeps of `x` those of `y`, in the same places? */
static bool drawn_alike(const vd_cuda_attention *x, const vd_cuda_attention *y) {
  return alike(x, y) && x->span == y->span && x->row0 == y->row0 && x->dropout == y->dropout &&
         x->rng.seed == y->rng.seed && x->rng.update == y->rng.update && x->rng.layer == y->rng.layer &&
         x->rng.site == y->rng.site;
}

/* Where forward leaves them: the layer's room, which it is from now on. */
static uint32_t *keep_drawn(vd_cuda_backend *c, const vd_cuda_attention *x) {
  size_t bytes = vd_cuda_attention_dropout_mask_size(x);
  if (bytes == 0 || x->rng.layer >= VD_MAX_LAYERS) return NULL;
  vd_layer_kept *l = &c->kept[x->rng.layer];
  l->shape = *x;
  return vd_cuda_workspace(c, &l->room, bytes);
}
/* What it left, or NULL where that was for something else. */
static uint32_t *find_drawn(vd_cuda_backend *c, const vd_cuda_attention *x) {
  if (x->rng.layer >= VD_MAX_LAYERS) return NULL;
  const vd_layer_kept *l = &c->kept[x->rng.layer];
  return l->room.p && drawn_alike(&l->shape, x) ? l->room.p : NULL;
}

void vd_cuda_attention_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, vd_act *out, real *lse) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_attention x = kernel_of(c, a);
  const vd_key_table *t = a->rel_key ? NULL : table_of(c, a);
  if ((!t && !a->rel_key) || !make_plans(c, 1, &x)) return;
  x.dropout_mask = keep_drawn(c, &x);
  vd_cuda_record_error(
      c, vd_cuda_attention_forward(&x, qkv->block, qkv->memory, t ? t->table : NULL, out, lse, c->stream), "attention");
}

/* The gradient of the table is summed over the layers, and goes to dkey_pe at the end. */
static void begin_table_gradient(vd_ops *o, vd_key_table *t, real *dkey_pe) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (t->dkey_pe == dkey_pe) return;
  vd_cuda_backward_end(o);
  size_t bytes = (size_t)t->d_head * (size_t)t->attn_span * sizeof(float);
  vd_cuda_record_error(c, cudaMemsetAsync(t->gradient, 0, bytes, c->stream), "zeroing the key table's gradient");
  t->dkey_pe = dkey_pe;
}

void vd_cuda_attention_backward_op(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, const vd_act *out,
                                   const real *lse, const vd_act *dout, const vd_qkv *dqkv, real *dkey_pe,
                                   /* NOLINTNEXTLINE(readability-non-const-parameter): written through a struct */
                                   real *dspan) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_attention x = kernel_of(c, a);
  vd_key_table *t = a->rel_key ? NULL : table_of(c, a);
  x.dropout_mask = find_drawn(c, &x);
  void *workspace = vd_cuda_workspace(c, &c->partial, vd_cuda_attention_workspace_size(&x));
  if (!x.schedule || (!t && !a->rel_key) || !workspace) return;
  if (t) begin_table_gradient(o, t, dkey_pe);
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

/* Queries, keys and values of the block, in one product where the weights allow. */
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
    vd_cuda_input_gradient(c, n, joined * d, in, mine, 3 * d, weight[i], dhidden, true);
    vd_cuda_weight_gradient(c, n, joined * d, in, mine, 3 * d, hidden, dweight[i]);
  }
}

void vd_cuda_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                               const real *wk, const real *wv, const vd_qkv *qkv) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const real *const weight[] = {wq, wk, wv};
  project_block(c, a, in->hidden, weight, qkv->block);
  if (a->rel_key) {
    vd_cuda_relative_project(c, a, in, weight + 1, qkv->memory);
    return;
  }
  vd_cuda_attention x = kernel_of(c, a);
  const vd_cuda_ring memory = {in->memory, in->memory_rows, in->oldest};
  if (!make_plans(c, 1, &x)) return;
  vd_cuda_record_error(
      c, vd_cuda_project_memory(&x, &memory, vd_cuda_weight(c, wk), vd_cuda_weight(c, wv), qkv->memory, c->stream),
      "projecting memory rows");
}

void vd_cuda_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                        const real *wk, const real *wv, const vd_qkv *dqkv, vd_act *dhidden, real *dwq,
                                        real *dwk, real *dwv) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const real *const weight[] = {wq, wk, wv};
  real *const dweight[] = {dwq, dwk, dwv};
  project_block_backward(c, a, in->hidden, weight, dqkv->block, dhidden, dweight);
  if (a->rel_key) {
    vd_cuda_relative_project_backward(c, a, in, dqkv->memory, dweight + 1);
    return;
  }
  vd_cuda_attention x = kernel_of(c, a);
  const vd_cuda_ring memory = {in->memory, in->memory_rows, in->oldest};
  void *workspace = vd_cuda_workspace(c, &c->partial, vd_cuda_project_workspace_size(&x));
  if (!workspace) return;
  vd_cuda_record_error(c, vd_cuda_project_memory_backward(&x, &memory, dqkv->memory, dwk, dwv, workspace, c->stream),
                       "gradients from memory rows");
}
