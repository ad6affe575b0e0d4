/* What Transformer-XL alone needs: src/ops.h's words for the kernels of relative.cu, and the projections of its
 * attention, which are plain products because all heads reach the same rows. */
#include "internal.h"

void vd_cuda_scale_dropout_op(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout,
                              const vd_act *x, vd_act *y) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_dropout drop = {dropout->p, dropout->rng, dropout->row0};
  vd_cuda_note(c, vd_cuda_scale_dropout(c->type, n, width, (float)scale, &drop, x, y, c->stream), "scaled dropout");
}

void vd_cuda_encode_distances_op(vd_ops *o, const vd_encoding *e, vd_act *out) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_dropout drop = {e->dropout.p, e->dropout.rng, e->dropout.row0};
  vd_cuda_note(c, vd_cuda_encode_distances(c->type, e->n, e->d, e->clamp_len, &drop, out, c->stream),
               "encoding distances");
}

void vd_cuda_weight_gradient_op(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                                real *dweight) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const void *left = dy;
  if (c->type != VD_CUDA_FP32) {
    void *copy = vd_cuda_room(c, &c->scratch, (size_t)(n * out) * c->act_size);
    if (!copy) return;
    vd_cuda_note(c, vd_cuda_from_float(c->type, (size_t)(n * out), dy, copy, c->stream), "converting a gradient");
    left = copy;
  }
  vd_cuda_weight_gradient(c, n, out, in, left, out, x, dweight);
}

/* Widths and rows of one call. */
typedef struct shape {
  int64_t d, width, rows, used; /* hidden states, heads together; rows of keys, rows of memory that are reached */
} shape;

static shape shape_of(const vd_attention *a) {
  for (int64_t h = 1; h < a->n_head; h++)
    if (a->reach[h] != a->reach[0]) vd_bug("heads with relative keys reach different rows");
  int64_t width = a->n_head * a->d_head;
  return (shape){.d = a->d_model > 0 ? a->d_model : width,
                 .width = width,
                 .rows = a->window + a->block,
                 .used = a->reach[0] < a->window ? a->reach[0] : a->window};
}

/* `rows` rows of each stream, x_rows apart in x [.., d], times weight^T to k or v from row `to` on. */
static void project_rows(vd_cuda_backend *c, const vd_attention *a, const shape *s, const void *x, int64_t x_rows,
                         int64_t rows, const real *weight, void *to) {
  bool one = a->n_stream == 1 || (rows == x_rows && rows == s->rows); /* the streams follow each other on both sides */
  vd_product_call call = {.m = one ? a->n_stream * rows : rows,
                          .n = s->width,
                          .k = s->d,
                          .n_batch = one ? 1 : a->n_stream,
                          .a = {x, s->d, one ? 0 : x_rows * s->d, false},
                          .b = {vd_cuda_weight(c, weight), s->d, 0, true},
                          .c = to,
                          .ldc = s->width,
                          .c_stride = one ? 0 : s->rows * s->width,
                          .alpha = 1};
  vd_cuda_product(c, &call);
}

/* The newest `used` rows of the memory of the first stream. */
static const void *memory_rows(const vd_cuda_backend *c, const vd_attention_input *in, const shape *s) {
  return (const char *)in->memory + (size_t)((in->memory_rows - s->used) * s->d) * c->act_size;
}

void vd_cuda_relative_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                              const real *wk, const real *wv, vd_act *q, vd_act *k, vd_act *v) {
  vd_cuda_backend *c = vd_cuda_of(o);
  shape s = shape_of(a);
  size_t block_at = (size_t)(a->window * s.width) * c->act_size;
  size_t memory_at = (size_t)((a->window - s.used) * s.width) * c->act_size;
  const real *weight[] = {wk, wv};
  char *to[] = {k, v};
  vd_linear queries = {.n = a->n_stream * a->block, .in = s.d, .out = s.width};
  vd_cuda_linear(o, &queries, in->hidden, wq, NULL, q);
  for (int i = 0; i < 2; i++) {
    project_rows(c, a, &s, in->hidden, a->block, a->block, weight[i], to[i] + block_at);
    project_rows(c, a, &s, memory_rows(c, in, &s), in->memory_rows, s.used, weight[i], to[i] + memory_at);
  }
}

/* The reached rows of all streams' memories, one after the other: as they lie, or copied to `room`. */
static const void *packed_memory(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                                 const shape *s, void *room) {
  size_t row = (size_t)s->d * c->act_size, mine = (size_t)s->used * row;
  const void *from = memory_rows(c, in, s);
  if (a->n_stream == 1 || s->used == in->memory_rows || s->used == 0) return from;
  vd_cuda_note(c,
               cudaMemcpy2DAsync(room, mine, from, (size_t)in->memory_rows * row, mine, (size_t)a->n_stream,
                                 cudaMemcpyDeviceToDevice, c->stream),
               "gathering memory rows");
  return room;
}

/* Is what follows `first`, two pieces of n elements each, where the products of three or two tensors at once want it?
 */
static bool follow(const real *first, const real *second, const real *third, size_t n) {
  return second == first + n && third == second + n;
}

void vd_cuda_relative_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                       const real *wk, const real *wv, const vd_act *dq, const vd_act *dk,
                                       const vd_act *dv, vd_act *dhidden, real *dwq, real *dwk, real *dwv) {
  vd_cuda_backend *c = vd_cuda_of(o);
  shape s = shape_of(a);
  int64_t n = a->n_stream * a->block, kept = a->n_stream * s.used, width = s.width;
  size_t block_bytes = (size_t)(n * 3 * width) * c->act_size, memory_bytes = (size_t)(kept * 2 * width) * c->act_size;
  char *block = vd_cuda_room(c, &c->scratch, block_bytes + memory_bytes + (size_t)(kept * s.d) * c->act_size);
  if (!block) return;
  char *memory = block + block_bytes;
  vd_cuda_gather gather = {a->n_stream, a->block, s.used, s.rows, width, dq, dk, dv, block, memory};
  vd_cuda_note(c, vd_cuda_gather_relative(c->type, &gather, c->stream), "gathering gradients");
  const void *kept_rows = packed_memory(c, a, in, &s, memory + memory_bytes);
  size_t tensor = (size_t)(width * s.d);
  if (follow(wq, wk, wv, tensor) && follow(dwq, dwk, dwv, tensor)) { /* slices of one tensor */
    vd_cuda_input_gradient(c, n, 3 * width, s.d, block, 3 * width, wq, dhidden, true);
    vd_cuda_weight_gradient(c, n, 3 * width, s.d, block, 3 * width, in->hidden, dwq);
    vd_cuda_weight_gradient(c, kept, 2 * width, s.d, memory, 2 * width, kept_rows, dwk);
    return;
  }
  const real *weight[] = {wq, wk, wv};
  real *gradient[] = {dwq, dwk, dwv};
  for (int i = 0; i < 3; i++) {
    const char *mine = block + (size_t)(i * width) * c->act_size;
    vd_cuda_input_gradient(c, n, width, s.d, mine, 3 * width, weight[i], dhidden, true);
    vd_cuda_weight_gradient(c, n, width, s.d, mine, 3 * width, in->hidden, gradient[i]);
    const char *keys = memory + (size_t)((i - 1) * width) * c->act_size;
    if (i > 0) vd_cuda_weight_gradient(c, kept, width, s.d, keys, 2 * width, kept_rows, gradient[i]);
  }
}
