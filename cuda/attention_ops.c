/* Attention and its projections: src/ops.h's words for the kernels of attention.h. */
#include "internal.h"
#include "project.h"

#include <stdlib.h>
#include <string.h>

_Static_assert((int)VD_CUDA_MOST_HEADS == (int)VD_CUDA_MAX_HEADS, "heads that the program is told of");

static int64_t width_of(const vd_attention *a) {
  return a->n_head * a->d_head;
}

/* Other models have come and gone. */
static void drop_plans(vd_cuda_backend *c) {
  vd_cuda_note(c, cudaStreamSynchronize(c->stream), "waiting");
  while (c->n_layer > 0) cudaFree(c->layer[--c->n_layer].plan);
}

/* The layer's plan, the same for the same spans. NULL: no memory for it. */
static vd_layer_plan *plan_of(vd_cuda_backend *c, const real *span) {
  for (int i = 0; i < c->n_layer; i++)
    if (c->layer[i].span == span) return &c->layer[i];
  if (c->n_layer == VD_MAX_LAYERS) drop_plans(c);
  void *plan = NULL;
  size_t bytes = vd_cuda_attention_plan_size();
  cudaError_t e = cudaMalloc(&plan, bytes);
  vd_cuda_note(c, e, "allocating a plan");
  if (e != cudaSuccess) return NULL;
  vd_cuda_note(c, cudaMemsetAsync(plan, 0, bytes, c->stream), "zeroing a plan");
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
                         .q_stride = width_of(a),
                         .kv_stride = width_of(a),
                         .kv_rows = a->window + a->block,
                         .span = a->span,
                         .plan = plan ? plan->plan : NULL,
                         .dropout = a->dropout.p,
                         .rng = a->dropout.rng,
                         .row0 = a->dropout.row0,
                         .rel_key = a->rel_key,
                         .rel_stride = width_of(a),
                         .reach = a->rel_key ? (int32_t)a->reach[0] : 0,
                         .content_bias = a->content_bias,
                         .position_bias = a->position_bias};
  size_t bytes = vd_cuda_attention_room_size(&x);
  x.room = bytes > 0 ? vd_cuda_room(c, &c->scratch, bytes) : NULL;
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
    cudaError_t e = vd_cuda_attention_make_plans(n_wanted, wanted, c->stream);
    vd_cuda_note(c, e, "attention's plans");
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
  cudaFree(c->key_table.table);
  cudaFree(c->key_table.gradient);
  c->key_table = (vd_key_table){0};
}

/* The key table of a->key_pe, up to date. */
static vd_key_table *table_of(vd_cuda_backend *c, const vd_attention *a) {
  vd_key_table *t = &c->key_table;
  size_t n = (size_t)(a->d_head * a->attn_span);
  if (!t->table || t->d_head != a->d_head || t->attn_span != a->attn_span) {
    vd_cuda_note(c, cudaStreamSynchronize(c->stream), "waiting");
    cudaFree(t->table);
    cudaFree(t->gradient);
    *t = (vd_key_table){.d_head = (int32_t)a->d_head, .attn_span = (int32_t)a->attn_span};
    cudaError_t e = cudaMalloc(&t->table, n * c->act_size);
    if (e == cudaSuccess) e = cudaMalloc((void **)&t->gradient, n * sizeof(float));
    vd_cuda_note(c, e, "allocating the key table");
    if (e != cudaSuccess) return NULL;
  }
  if (t->made && t->key_pe == a->key_pe) return t;
  vd_cuda_note(c, vd_cuda_attention_key_pe(c->type, t->d_head, t->attn_span, a->key_pe, t->table, c->stream),
               "key table");
  t->key_pe = a->key_pe;
  t->made = true;
  return t;
}

void vd_cuda_backward_end(vd_ops *o) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_key_table *t = &c->key_table;
  if (!t->dkey_pe) return;
  vd_cuda_note(c, vd_cuda_attention_key_pe_backward(t->d_head, t->attn_span, t->gradient, t->dkey_pe, c->stream),
               "key table's gradient");
  t->dkey_pe = NULL;
}

void vd_cuda_attention_op(vd_ops *o, const vd_attention *a, const vd_act *q, const vd_act *k, const vd_act *v,
                          vd_act *out, real *lse) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_attention x = kernel_of(c, a);
  const vd_key_table *t = a->rel_key ? NULL : table_of(c, a);
  if ((!t && !a->rel_key) || !make_plans(c, 1, &x)) return;
  vd_cuda_note(c, vd_cuda_attention_forward(&x, q, k, v, t ? t->table : NULL, out, lse, c->stream), "attention");
}

/* The gradient of the table is summed over the layers, and goes to dkey_pe at the end. */
static void begin_table_gradient(vd_ops *o, vd_key_table *t, real *dkey_pe) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (t->dkey_pe == dkey_pe) return;
  vd_cuda_backward_end(o);
  size_t bytes = (size_t)t->d_head * (size_t)t->attn_span * sizeof(float);
  vd_cuda_note(c, cudaMemsetAsync(t->gradient, 0, bytes, c->stream), "zeroing the key table's gradient");
  t->dkey_pe = dkey_pe;
}

void vd_cuda_attention_backward_op(vd_ops *o, const vd_attention *a, const vd_act *q, const vd_act *k, const vd_act *v,
                                   const vd_act *out, const real *lse, const vd_act *dout, vd_act *dq, vd_act *dk,
                                   /* NOLINTNEXTLINE(readability-non-const-parameter): written through a struct */
                                   vd_act *dv, real *dkey_pe, real *dspan) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_attention x = kernel_of(c, a);
  vd_key_table *t = a->rel_key ? NULL : table_of(c, a);
  void *workspace = vd_cuda_room(c, &c->partial, vd_cuda_attention_workspace_size(&x));
  if (!x.plan || (!t && !a->rel_key) || !workspace) return;
  if (t) begin_table_gradient(o, t, dkey_pe);
  vd_cuda_attention_gradient g = {.q = q,
                                  .k = k,
                                  .v = v,
                                  .table = t ? t->table : NULL,
                                  .out = out,
                                  .lse = lse,
                                  .dout = dout,
                                  .dq = dq,
                                  .dk = dk,
                                  .dv = dv,
                                  .dtable = t ? t->gradient : NULL,
                                  .dspan = dspan,
                                  .workspace = workspace,
                                  .side = c->side,
                                  .fork = c->fork,
                                  .join = c->join,
                                  .drel_key = a->drel_key,
                                  .dcontent_bias = a->dcontent_bias,
                                  .dposition_bias = a->dposition_bias};
  vd_cuda_note(c, vd_cuda_attention_backward(&x, &g, c->stream), "attention backward");
}

/* Rows of k or v from row `to` of each stream = rows of x W^T. */
static void project_rows(vd_cuda_backend *c, const vd_attention *a, const void *x, int64_t x_rows, int64_t rows,
                         const real *weight, void *to) {
  int64_t d = width_of(a);
  vd_product_call call = {.m = rows,
                          .n = d,
                          .k = d,
                          .n_batch = a->n_stream,
                          .a = {x, d, x_rows * d, false},
                          .b = {vd_cuda_weight(c, weight), d, 0, true},
                          .c = to,
                          .ldc = d,
                          .c_stride = (a->window + a->block) * d,
                          .alpha = 1};
  vd_cuda_product(c, &call);
}

void vd_cuda_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                               const real *wk, const real *wv, vd_act *q, vd_act *k, vd_act *v) {
  if (a->rel_key) {
    vd_cuda_relative_project(o, a, in, wq, wk, wv, q, k, v);
    return;
  }
  vd_cuda_backend *c = vd_cuda_of(o);
  int64_t d = width_of(a);
  size_t block_at = (size_t)(a->window * d) * c->act_size;
  vd_linear queries = {.n = a->n_stream * a->block, .in = d, .out = d};
  vd_cuda_linear(o, &queries, in->hidden, wq, NULL, q);
  project_rows(c, a, in->hidden, a->block, a->block, wk, (char *)k + block_at);
  project_rows(c, a, in->hidden, a->block, a->block, wv, (char *)v + block_at);
  vd_cuda_attention x = kernel_of(c, a);
  if (!make_plans(c, 1, &x)) return;
  vd_cuda_note(c,
               vd_cuda_project_memory(&x, in->memory, in->memory_rows, vd_cuda_weight(c, wk), vd_cuda_weight(c, wv), k,
                                      v, c->stream),
               "projecting memory rows");
}

void vd_cuda_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                        const real *wk, const real *wv, const vd_act *dq, const vd_act *dk,
                                        const vd_act *dv, vd_act *dhidden, real *dwq, real *dwk, real *dwv) {
  if (a->rel_key) {
    vd_cuda_relative_project_backward(o, a, in, wq, wk, wv, dq, dk, dv, dhidden, dwq, dwk, dwv);
    return;
  }
  vd_cuda_backend *c = vd_cuda_of(o);
  int64_t d = width_of(a), n = a->n_stream * a->block, rows = a->window + a->block;
  char *all = vd_cuda_room(c, &c->scratch, (size_t)(n * 3 * d) * c->act_size);
  if (!all) return;
  vd_cuda_note(c, vd_cuda_gather_gradients(c->type, a->n_stream, a->block, rows, d, dq, dk, dv, all, c->stream),
               "gathering gradients");
  if (wk == wq + d * d && wv == wk + d * d && dwk == dwq + d * d && dwv == dwk + d * d) {
    vd_cuda_input_gradient(c, n, 3 * d, d, all, 3 * d, wq, dhidden, true);
    vd_cuda_weight_gradient(c, n, 3 * d, d, all, 3 * d, in->hidden, dwq);
  } else {
    const real *weight[] = {wq, wk, wv};
    real *gradient[] = {dwq, dwk, dwv};
    for (int i = 0; i < 3; i++) {
      const char *mine = all + (size_t)(i * d) * c->act_size;
      vd_cuda_input_gradient(c, n, d, d, mine, 3 * d, weight[i], dhidden, true);
      vd_cuda_weight_gradient(c, n, d, d, mine, 3 * d, in->hidden, gradient[i]);
    }
  }
  vd_cuda_attention x = kernel_of(c, a);
  void *workspace = vd_cuda_room(c, &c->partial, vd_cuda_project_workspace_size(&x));
  if (!workspace) return;
  vd_cuda_note(c,
               vd_cuda_project_memory_backward(&x, in->memory, in->memory_rows, dk, dv, dwk, dwv, workspace, c->stream),
               "gradients from memory rows");
}
