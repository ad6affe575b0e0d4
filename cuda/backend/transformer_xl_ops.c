/* See transformer_xl_ops.h. The projections are plain products, because all heads reach the same memory rows. */
#include "cuda/backend/transformer_xl_ops.h"
#include "cuda/backend/gemm.h"
#include "cuda/backend/gradient_stream.h"

void vd_cuda_scale_dropout_op(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout,
                              const vd_act *x, vd_act *y) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_gradient_release(c, y);
  vd_cuda_record_error(c, vd_cuda_scale_dropout(c->type, n, width, (float)scale, dropout, x, y, c->stream),
                       "scaled dropout");
}

void vd_cuda_position_encodings_op(vd_ops *o, const vd_position_encoding *e, vd_act *out) {
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_record_error(c, vd_cuda_position_encodings(c->type, e->n, e->d, e->clamp_len, &e->dropout, out, c->stream),
                       "position encodings");
}

void vd_cuda_weight_gradient_op(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                                real *dweight) {
  vd_cuda_backend *c = vd_cuda_of(o);
  const void *left = dy;
  cudaStream_t stream = vd_cuda_gradient_fork(c);
  if (c->type != VD_FP32) {
    void *copy = vd_cuda_workspace(c, &c->gradient.scratch, (size_t)(n * out) * c->act_size);
    if (!copy) return;
    vd_cuda_record_error(c, vd_cuda_from_float(c->type, (size_t)(n * out), dy, copy, stream), "converting a gradient");
    left = copy;
  }
  vd_cuda_weight_gradient(c, n, out, in, left, out, x, dweight);
  vd_cuda_gradient_job(c, dy);
}

typedef struct shape {
  int64_t d;     /* width of the hidden states */
  int64_t width; /* of all heads together */
  int64_t used;  /* memory rows within reach */
} shape;

static shape shape_of(const vd_attention *a) {
  for (int64_t h = 1; h < a->n_head; h++)
    if (a->reach[h] != a->reach[0]) vd_bug("heads with relative keys reach different rows");
  int64_t width = a->n_head * a->d_head;
  return (shape){.d = a->d_model > 0 ? a->d_model : width,
                 .width = width,
                 .used = a->reach[0] < a->window ? a->reach[0] : a->window};
}

/* The newest `rows` rows of the memory of the first stream. */
static const void *newest_rows(const vd_cuda_backend *c, const vd_attention_input *in, const shape *s, int64_t rows) {
  return (const char *)in->memory + (size_t)((in->memory_rows - rows) * s->d) * c->act_size;
}

void vd_cuda_relative_project(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                              const real *const weight[2], const vd_qkv *qkv) {
  shape s = shape_of(a);
  int64_t kv_rows = qkv->memory_rows > 0 ? qkv->memory_rows : a->window;
  int64_t n = a->n_stream, skip = a->window - s.used;
  int joined = vd_cuda_are_contiguous(2, weight, s.width * s.d) ? 2 : 1;
  if (s.used == 0) return;
  bool one = n == 1 || (s.used == in->memory_rows && s.used == kv_rows); /* contiguous over streams on both sides */
  for (int i = 0; i < 2; i += joined) {
    vd_gemm_call call = {.m = one ? n * s.used : s.used,
                         .n = joined * s.width,
                         .k = s.d,
                         .n_batch = one ? 1 : n,
                         .a = {newest_rows(c, in, &s, s.used), s.d, one ? 0 : in->memory_rows * s.d, false},
                         .b = {vd_cuda_weight(c, weight[i]), s.d, 0, true},
                         .c = (char *)qkv->memory + (size_t)((2 * skip + i) * s.width) * c->act_size,
                         .ldc = 2 * s.width,
                         .c_stride = one ? 0 : kv_rows * 2 * s.width,
                         .alpha = 1};
    vd_cuda_gemm(c, &call);
  }
}

/* Distances between streams, in bytes, above which CUDA's copies and fills in two dimensions fail. */
static const size_t MAX_PITCH = INT32_MAX;

/* Stream-ordered. Copies `bytes` of each of n streams. */
static cudaError_t copy_streams(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t bytes, int64_t n,
                                cudaStream_t stream) {
  if (to_pitch <= MAX_PITCH && from_pitch <= MAX_PITCH)
    return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, (size_t)n, cudaMemcpyDeviceToDevice, stream);
  cudaError_t e = cudaSuccess;
  for (int64_t i = 0; i < n && e == cudaSuccess; i++, to += to_pitch, from += from_pitch)
    e = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  return e;
}

/* Stream-ordered. Zeroes the first `bytes` of each of n streams. */
static cudaError_t zero_streams(char *to, size_t pitch, size_t bytes, int64_t n, cudaStream_t stream) {
  if (pitch <= MAX_PITCH) return cudaMemset2DAsync(to, pitch, 0, bytes, (size_t)n, stream);
  cudaError_t e = cudaSuccess;
  for (int64_t i = 0; i < n && e == cudaSuccess; i++, to += pitch) e = cudaMemsetAsync(to, 0, bytes, stream);
  return e;
}

/* The window's rows of all streams' memories, contiguous: in place, or copied to a workspace of the gradient
 * stream. NULL: out of memory. */
static const void *packed_memory(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                                 const shape *s, cudaStream_t stream) {
  size_t row = (size_t)s->d * c->act_size, mine = (size_t)a->window * row;
  const void *from = newest_rows(c, in, s, a->window);
  if (a->n_stream == 1 || a->window == in->memory_rows) return from;
  void *packed = vd_cuda_workspace(c, &c->gradient.scratch, (size_t)a->n_stream * mine);
  if (!packed) return NULL;
  vd_cuda_record_error(c, copy_streams(packed, mine, from, (size_t)in->memory_rows * row, mine, a->n_stream, stream),
                       "gathering memory rows");
  return packed;
}

void vd_cuda_relative_project_backward(vd_cuda_backend *c, const vd_attention *a, const vd_attention_input *in,
                                       vd_act *dmemory, real *const dweight[2], cudaStream_t stream) {
  shape s = shape_of(a);
  size_t row = (size_t)(2 * s.width) * c->act_size;
  if (s.used == 0) return;
  if (s.used < a->window) /* rows out of reach enter the product as zeros */
    vd_cuda_record_error(
        c, zero_streams(dmemory, (size_t)a->window * row, (size_t)(a->window - s.used) * row, a->n_stream, stream),
        "zeroing gradients");
  const void *rows = packed_memory(c, a, in, &s, stream);
  if (!rows) return;
  const real *const gradient[] = {dweight[0], dweight[1]};
  int joined = vd_cuda_are_contiguous(2, gradient, s.width * s.d) ? 2 : 1;
  for (int i = 0; i < 2; i += joined)
    vd_cuda_weight_gradient(c, a->n_stream * a->window, joined * s.width, s.d,
                            (const char *)dmemory + (size_t)(i * s.width) * c->act_size, 2 * s.width, rows, dweight[i]);
}
