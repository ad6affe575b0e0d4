/* See ops_side.h. Compiled once for each side: `real` is double here, or float. */
#include "tests/cuda/ops_side.h"

#include "src/ops/cuda_plugin.h"
#include "src/ops/ops.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if VD_REAL_IS_DOUBLE
#define SIDE(name) side_cpu_##name
#else
#define SIDE(name) side_gpu_##name
#endif

/* Parameters of all calls lie in one arena, as a model's do; tensors start at multiples of ALIGN reals. */
enum { ARENA = 1 << 21, ALIGN = 32 };

struct side {
  vd_ops *ops;
  void *library;
  real *arena;
};

/* Addresses of a call's buffers in the backend's memory. */
struct place {
  void *p[SIDE_BUFFERS];
};

static size_t bytes_of(const side *s, const side_buffer *b) {
  switch (b->kind) {
  case SIDE_ACT:
    return b->n * s->ops->act_size;
  case SIDE_TOKEN:
    return b->n * sizeof(int32_t);
  case SIDE_SUM:
    return b->n * sizeof(double);
  default:
    return b->n * sizeof(real);
  }
}

#if VD_REAL_IS_DOUBLE
static int open_ops(side *s, enum side_precision precision, const char *library, vd_error *err) {
  (void)precision;
  (void)library;
  return vd_ops_cpu(&s->ops, 1, err);
}
#else
static int open_ops(side *s, enum side_precision precision, const char *library, vd_error *err) {
  static const enum vd_precision type[] = {VD_FP32, VD_BF16, VD_FP16};
  s->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!s->library) return vd_fail(err, VD_FAILED, "%s", dlerror());
  const vd_cuda_plugin *table = dlsym(s->library, "vd_cuda");
  if (!table) return vd_fail(err, VD_FAILED, "%s: no symbol vd_cuda", library);
  if (table->interface_version != VD_CUDA_INTERFACE)
    return vd_fail(err, VD_FAILED, "%s has interface %u, this program %u", library, table->interface_version,
                   VD_CUDA_INTERFACE);
  return table->ops(&s->ops, 0, type[precision], err);
}
#endif

side *SIDE(open)(enum side_precision precision, const char *library) {
  side *s = vd_calloc(1, sizeof *s);
  vd_error err = {0};
  void *arena = NULL;
  if (open_ops(s, precision, library, &err) == VD_OK) s->ops->alloc(s->ops, ARENA * sizeof(real), &arena, &err);
  s->arena = arena;
  if (err.status == VD_OK) return s;
  vd_error_print(&err);
  SIDE(close)(s);
  return NULL;
}

void SIDE(close)(side *s) {
  if (!s) return;
  if (s->ops) {
    s->ops->free(s->ops, s->arena);
    s->ops->destroy(s->ops);
  }
  if (s->library) dlclose(s->library);
  free(s);
}

/* The values of a buffer in the type that the backend copies. The caller frees. */
static void *to_host(const side_buffer *b) {
  real *x = vd_calloc(b->n, sizeof *x);
  int32_t *token = vd_calloc(b->n, sizeof *token);
  for (size_t i = 0; i < b->n; i++) {
    if (b->kind == SIDE_TOKEN)
      token[i] = (int32_t)b->x[i];
    else
      x[i] = (real)b->x[i];
  }
  free(b->kind == SIDE_TOKEN ? (void *)x : (void *)token);
  return b->kind == SIDE_TOKEN ? (void *)token : (void *)x;
}

static bool put_buffers(side *s, const side_call *call, struct place *at, vd_error *err) {
  vd_ops *o = s->ops;
  size_t used = 0;
  for (int i = 0; i < call->n_buffer; i++) {
    const side_buffer *b = &call->buffer[i];
    if (b->n == 0) continue;
    if (b->kind == SIDE_PARAM) {
      at->p[i] = s->arena + used;
      used += (b->n + ALIGN - 1) / ALIGN * ALIGN;
      if (used > ARENA) vd_bug("the parameters of a test case need a larger arena");
    } else if (o->alloc(o, bytes_of(s, b), &at->p[i], err)) {
      return false;
    }
    void *host = to_host(b);
    if (b->kind == SIDE_TOKEN)
      o->put_tokens(o, at->p[i], host, b->n);
    else if (b->kind == SIDE_ACT)
      o->put_act(o, at->p[i], host, b->n);
    else if (b->kind != SIDE_SUM) /* sums begin as the zeros of alloc */
      o->put(o, at->p[i], host, b->n);
    if (o->synchronize(o, err)) return false;
    free(host);
  }
  if (o->weights_changed) o->weights_changed(o, s->arena, ARENA);
  return true;
}

static void get_buffers(side *s, side_call *call, const struct place *at) {
  vd_ops *o = s->ops;
  for (int i = 0; i < call->n_buffer; i++) {
    side_buffer *b = &call->buffer[i];
    if (b->n == 0 || b->kind == SIDE_TOKEN) continue;
    real *x = vd_calloc(b->n, sizeof *x);
    if (b->kind == SIDE_SUM)
      o->get_double(o, b->x, at->p[i], b->n);
    else if (b->kind == SIDE_ACT)
      o->get_act(o, x, at->p[i], b->n);
    else
      o->get(o, x, at->p[i], b->n);
    for (size_t e = 0; e < b->n && b->kind != SIDE_SUM; e++) b->x[e] = (double)x[e];
    free(x);
  }
}

static vd_dropout dropout_of(const side_call *c, enum vd_site site) {
  return (vd_dropout){c->p, {.seed = c->seed, .update = c->update, .layer = c->layer, .site = (uint16_t)site}, c->row0};
}

static vd_attention attention_of(const side_call *c, const void *span, const void *key_pe) {
  return (vd_attention){.n_stream = c->n_stream,
                        .block = c->block,
                        .window = c->window,
                        .n_head = c->n_head,
                        .d_head = c->d_head,
                        .attn_span = c->attn_span,
                        .ramp = c->ramp,
                        .first_distance = 1,
                        .softmax = c->trimmed ? VD_TRIMMED : VD_MASKED,
                        .reach = c->reach,
                        .span = span,
                        .n_span = c->n_span,
                        .key_pe = key_pe,
                        .dropout = dropout_of(c, VD_SITE_ATTENTION)};
}

static void run_dense(vd_ops *o, const side_call *c, void *const *p) {
  vd_dropout embed = dropout_of(c, VD_SITE_EMBED), branch = dropout_of(c, VD_SITE_ATTENDED);
  vd_linear l = {.n = c->n, .in = c->in, .out = c->out, .relu = c->relu, .dropout = dropout_of(c, VD_SITE_HIDDEN)};
  vd_linear before = {.n = c->n, .out = c->in, .relu = true, .dropout = l.dropout};
  switch (c->op) {
  case SIDE_EMBED:
    o->embed(o, c->n, c->in, p[0], p[1], &embed, p[2]);
    break;
  case SIDE_EMBED_BACKWARD:
    o->embed_backward(o, c->n, c->in, c->vocab, p[0], &embed, p[1], p[2]);
    break;
  case SIDE_LINEAR:
    o->linear(o, &l, p[0], p[1], p[2], p[3]);
    break;
  case SIDE_LINEAR_BACKWARD:
    o->linear_backward(o, &l, p[0], p[1], p[2], p[3], c->accumulate, p[4], p[5], c->relu ? &before : NULL, p[6]);
    break;
  case SIDE_ADD_NORM:
    o->add_norm(o, c->n, c->in, p[0], p[1], &branch, p[2], p[3], p[4], p[5], p[6], p[7]);
    break;
  case SIDE_NORM_LINEAR:
    before = l, before.dropout.row0++;
    for (int i = 0; i < 2; i++) { /* the mask that was drawn is not that of the first layer */
      if (o->draw_ahead) o->draw_ahead(o, &l);
      o->add_norm(o, c->n, c->in, p[0], p[1], c->branch_drops ? &branch : NULL, p[2], p[3], p[4], p[5], p[6], p[7]);
      o->linear(o, i == 0 ? &before : &l, p[7], p[8], p[9], p[11 - i]);
    }
    break;
  case SIDE_ADD_NORM_BACKWARD:
    o->add_norm_backward(o, c->n, c->in, p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8]);
    break;
  default:
    break;
  }
}

/* Weights and their gradients where the first buffer of each holds all three. */
static void slice(const side_call *c, int64_t d_model, const real *w[3], real *dw[3]) {
  size_t tensor = (size_t)(c->n_head * c->d_head * d_model);
  for (int i = 1; i < 3 && c->sliced; i++) {
    w[i] = w[0] + (size_t)i * tensor;
    dw[i] = dw[0] + (size_t)i * tensor;
  }
}

static int64_t kv_rows_of(const side_call *c) {
  return c->kv_spare > 0 ? c->window + c->kv_spare : 0;
}

/* What the call records into buffers p[0 .. 2]. */
static vd_attention_record record_of(const side_call *c, void *const *p) {
  return (vd_attention_record){.n_distance = c->n_distance,
                               .target = p[0],
                               .sum = p[1],
                               .n_chosen = SIDE_CHOSEN,
                               .chosen = c->chosen,
                               .weight = p[2]};
}

/* Attention's buffers begin with span and key_pe. */
static void run_attention(vd_ops *o, const side_call *c, void *const *p) {
  vd_attention a = attention_of(c, p[0], p[1]);
  vd_attention_input in = {p[2], c->memory_rows, c->oldest, p[3]};
  const real *w[3] = {p[4], p[5], p[6]};
  real *dw[3] = {p[10], p[11], p[12]};
  int64_t kv_rows = kv_rows_of(c);
  vd_qkv projected = {p[7], p[8], kv_rows}, x = {p[2], p[3], kv_rows}, dx = {p[7], p[8], kv_rows};
  vd_attention_record record = record_of(c, p + 6);
  if (c->n_distance > 0) a.record = &record;
  slice(c, c->n_head * c->d_head, w, dw);
  switch (c->op) {
  case SIDE_PROJECT:
    o->attention_project(o, &a, &in, w[0], w[1], w[2], &projected);
    break;
  case SIDE_PROJECT_BACKWARD:
    o->attention_project_backward(o, &a, &in, w[0], w[1], w[2], &projected, p[9], dw[0], dw[1], dw[2]);
    break;
  case SIDE_ATTENTION:
    o->attention(o, &a, &x, p[4], p[5]);
    break;
  case SIDE_ATTENTION_BACKWARD: /* the forward pass comes first: its out and lse are what backward is given */
    o->attention(o, &a, &x, p[4], p[5]);
    o->attention_backward(o, &a, &x, p[4], p[5], p[6], &dx, p[9], p[10]);
    if (o->backward_end) o->backward_end(o);
    break;
  default:
    break;
  }
}

/* Relative keys' buffers begin with them and the two biases. */
static vd_attention relative_of(const side_call *c, void *const *p) {
  vd_attention a = attention_of(c, NULL, NULL);
  a.first_distance = 0;
  a.softmax = VD_MASKED;
  a.n_span = a.ramp = 0;
  a.d_model = c->in;
  a.rel_key = p[0];
  a.content_bias = p[1];
  a.position_bias = p[2];
  return a;
}

static void run_relative(vd_ops *o, const side_call *c, void *const *p) {
  vd_attention a = relative_of(c, p);
  vd_attention_input in = {p[3], c->memory_rows, 0, p[4]};
  const real *w[3] = {p[5], p[6], p[7]};
  real *dw[3] = {p[11], p[12], p[13]};
  int64_t kv_rows = kv_rows_of(c);
  vd_qkv projected = {p[8], p[9], kv_rows}, x = {p[3], p[4], kv_rows}, dx = {p[8], p[9], kv_rows};
  vd_attention_record record = record_of(c, p + 7);
  if (c->n_distance > 0) a.record = &record;
  slice(c, c->in, w, dw);
  if (c->op == SIDE_RELATIVE_PROJECT)
    o->attention_project(o, &a, &in, w[0], w[1], w[2], &projected);
  else if (c->op == SIDE_RELATIVE_PROJECT_BACKWARD)
    o->attention_project_backward(o, &a, &in, w[0], w[1], w[2], &projected, p[10], dw[0], dw[1], dw[2]);
  else
    o->attention(o, &a, &x, p[5], p[6]);
  if (c->op != SIDE_RELATIVE_ATTENTION_BACKWARD) return;
  a.drel_key = p[10];
  a.dcontent_bias = p[11];
  a.dposition_bias = p[12];
  o->attention_backward(o, &a, &x, p[5], p[6], p[7], &dx, NULL, NULL);
  if (o->backward_end) o->backward_end(o);
}

static void run_xl(vd_ops *o, const side_call *c, void *const *p, const vd_extent *tensor) {
  vd_dropout drop = dropout_of(c, (enum vd_site)c->site), position = dropout_of(c, VD_SITE_POSITION);
  vd_position_encoding e = {c->n, c->in, c->clamp_len, position};
  vd_adam adam = {c->lr, c->beta1, c->beta2, c->eps, c->t};
  if (c->op == SIDE_ADAM) {
    o->gradient_norms(o, p[1], tensor, c->n_tensor, c->n_tensor, (double *)p[4] + VD_STATS_TENSORS);
    o->gradient_stats(o, c->n_tensor, c->scale, c->clip_norm, p[4]);
    o->adam(o, p[0], p[1], p[2], p[3], tensor, c->n_tensor, p[4], &adam);
  } else if (c->op == SIDE_SCALE_DROPOUT)
    o->scale_dropout(o, c->n, c->in, c->scale, &drop, p[0], c->same_buffer ? p[0] : p[1]);
  else if (c->op == SIDE_POSITION_ENCODINGS)
    o->position_encodings(o, &e, p[0]);
  else
    o->weight_gradient(o, c->n, c->in, c->out, p[0], p[1], p[2]);
}

/* More rings than a launch takes: the first again and again, and two of one row less, of which the last comes in the
 * second launch alone. */
static void run_ring_push(vd_ops *o, const side_call *c, void *const *p) {
  enum { RINGS = 70 };
  vd_ring_push push[RINGS];
  for (int i = 0; i < RINGS; i++) {
    int ring = i == 5 ? 1 : i == RINGS - 1 ? 2 : 0, less = ring > 0;
    push[i] = (vd_ring_push){p[ring], p[3], c->memory_rows - less, c->oldest - less};
  }
  o->memory_ring_push(o, c->n_stream, c->in, c->stride, c->block, RINGS, push);
}

static void run_rest(vd_ops *o, side_call *c, void *const *p) {
  vd_extent tensor[SIDE_TENSORS];
  for (int t = 0; t < c->n_tensor; t++) tensor[t] = (vd_extent){c->offset[t], c->size[t], t};
  switch (c->op) {
  case SIDE_MEMORY_PUSH:
    o->memory_push(o, c->n_stream, c->in, p[0], c->memory_rows, c->oldest, p[1], c->block, c->same_buffer ? p[0] : p[2],
                   c->window);
    break;
  case SIDE_MEMORY_RING_PUSH:
    run_ring_push(o, c, p);
    break;
  case SIDE_CROSS_ENTROPY:
    o->cross_entropy(o, c->n, c->vocab, c->stride, p[0], p[1], c->scale, p[2], p[3], c->same_buffer ? p[0] : p[4]);
    break;
  case SIDE_ADD_CONSTANT:
    o->add_constant(o, p[0], c->buffer[0].n, c->value);
    break;
  case SIDE_SQUARE_SUMS:
    o->square_sums(o, p[0], tensor, c->n_tensor, c->norm2);
    break;
  case SIDE_ADAGRAD:
    o->gradient_norms(o, p[1], tensor, c->n_tensor, c->n_tensor, (double *)p[3] + VD_STATS_TENSORS);
    o->gradient_stats(o, c->n_tensor, c->scale, c->clip_norm, p[3]);
    o->adagrad(o, p[0], p[1], p[2], tensor, c->n_tensor, p[3], c->lr, c->eps, c->clip_step);
    break;
  case SIDE_CLAMP:
    o->clamp01(o, p[0], c->buffer[0].n);
    break;
  default:
    run_xl(o, c, p, tensor);
    break;
  }
}

bool SIDE(run)(side *s, side_call *call) {
  struct place at = {0};
  vd_error err = {0};
  if (put_buffers(s, call, &at, &err)) {
    if (call->op >= SIDE_MEMORY_PUSH)
      run_rest(s->ops, call, at.p);
    else if (call->op >= SIDE_RELATIVE_PROJECT)
      run_relative(s->ops, call, at.p);
    else if (call->op >= SIDE_PROJECT)
      run_attention(s->ops, call, at.p);
    else if (call->op != SIDE_COPY_ACT)
      run_dense(s->ops, call, at.p);
    if (s->ops->synchronize(s->ops, &err) == VD_OK) get_buffers(s, call, &at);
  }
  for (int i = 0; i < call->n_buffer; i++)
    if (call->buffer[i].kind != SIDE_PARAM) s->ops->free(s->ops, at.p[i]);
  s->ops->synchronize(s->ops, &err);
  vd_error_print(&err);
  return err.status == VD_OK;
}
