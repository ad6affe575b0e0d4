/* See linear.h. */
#include "cuda/backend/linear.h"
#include "cuda/backend/gemm.h"
#include "cuda/backend/gradient_stream.h"
#include "cuda/backend/row_sums.h"
#include "cuda/kernels/ffn.h"

void vd_cuda_draw_ahead(vd_ops *o, const vd_linear *l) {
  vd_cuda_backend *c = vd_cuda_of(o);
  c->unit_mask = (vd_unit_mask){l->dropout, l->n, l->out, NULL};
  c->mask_state = VD_NO_MASK;
  if (!l->relu || l->n == 0 || vd_dropout_threshold(l->dropout.p) == 0 || !vd_cuda_ffn_supports(c->type, l->in, l->out))
    return;
  c->unit_mask.words = vd_cuda_workspace(c, &c->mask, (size_t)l->n * (size_t)l->out / 8);
  if (c->unit_mask.words) c->mask_state = VD_MASK_WANTED;
}

/* The mask of this layer's dropout if it has been drawn, else NULL. It is used once. */
static const vd_unit_mask *drawn_mask(vd_cuda_backend *c, const vd_linear *l) {
  const vd_unit_mask *m = &c->unit_mask;
  const vd_rng *drawn = &m->dropout.rng, *wanted = &l->dropout.rng;
  bool same = c->mask_state == VD_MASK_DRAWN && m->n == l->n && m->width == l->out && m->dropout.p == l->dropout.p &&
              m->dropout.row0 == l->dropout.row0 && drawn->seed == wanted->seed && drawn->update == wanted->update &&
              drawn->layer == wanted->layer && drawn->site == wanted->site;
  c->mask_state = VD_NO_MASK;
  return same ? m : NULL;
}

void vd_cuda_linear(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (l->relu && bias && vd_cuda_ffn_supports(c->type, l->in, l->out)) {
    vd_cuda_record_error(c,
                         vd_cuda_ffn(c->type, l->n, l->in, l->out, x, vd_cuda_weight(c, weight), bias, &l->dropout,
                                     drawn_mask(c, l), y, c->stream),
                         "feed-forward");
    return;
  }
  vd_gemm_call call = {.m = l->n,
                       .n = l->out,
                       .k = l->in,
                       .n_batch = 1,
                       .a = {x, l->in, 0, false},
                       .b = {vd_cuda_weight(c, weight), l->in, 0, true},
                       .c = y,
                       .ldc = l->out,
                       .alpha = 1,
                       .bias = bias ? vd_cuda_weight(c, bias) : NULL,
                       .relu = l->relu};
  vd_cuda_gemm(c, &call);
  if (l->relu && l->dropout.p > 0)
    vd_cuda_record_error(c, vd_cuda_drop_rows(c->type, l->n, l->out, &l->dropout, y, c->stream), "dropout");
}

static float scale_of(const vd_dropout *dropout) {
  return dropout->p > 0 ? (float)vd_dropout_scale(vd_dropout_threshold(dropout->p)) : 1.0F;
}

/* dx = dy weight, times the derivative of dropout and ReLU of `before`, whose output is x; dbefore += its column sums.
 */
static void relu_backward(vd_cuda_backend *c, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                          vd_act *dx, const vd_linear *before, real *dbefore) {
  bool fits = vd_cuda_ffn_supports(c->type, l->out, l->in);
  int64_t rows = fits ? vd_cuda_ffn_partials(l->in) : vd_cuda_partial_rows(l->n);
  float scale = scale_of(&before->dropout), *partial = vd_cuda_row_partials(c, rows, l->in);
  if (!partial) return;
  if (fits)
    vd_cuda_record_error(c,
                         vd_cuda_ffn_backward(c->type, l->n, l->out, l->in, dy, vd_cuda_weight(c, weight), x, scale, dx,
                                              partial, c->stream),
                         "feed-forward backward");
  else
    vd_cuda_input_gradient(c, l->n, l->out, l->in, dy, l->out, weight, dx, false);
  if (!fits)
    vd_cuda_record_error(c, vd_cuda_relu_backward(c->type, l->n, l->in, x, scale, dx, partial, c->stream),
                         "ReLU's gradient");
  real *const to[] = {dbefore};
  vd_cuda_row_sum_later(c, partial, rows, l->in, l->in, 1, to);
}

void vd_cuda_linear_backward(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                             vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                             real *dbefore) {
  vd_cuda_backend *c = vd_cuda_of(o);
  if (dbias) {
    float *partial = vd_cuda_workspace(c, &c->partial, vd_cuda_rows_workspace(l->n, l->out));
    if (!partial) return;
    vd_cuda_gradient_release(c, dbias);
    vd_cuda_record_error(c, vd_cuda_column_sums(c->type, l->n, l->out, dy, partial, dbias, c->stream), "bias gradient");
  }
  vd_cuda_gradient_fork(c);
  vd_cuda_weight_gradient(c, l->n, l->out, l->in, dy, l->out, x, dweight);
  vd_cuda_gradient_job(c, dy);
  vd_cuda_gradient_release(c, dx);
  if (before)
    relu_backward(c, l, x, weight, dy, dx, before, dbefore);
  else if (dx)
    vd_cuda_input_gradient(c, l->n, l->out, l->in, dy, l->out, weight, dx, accumulate);
}

/* As a product of one-hot rows and dout, whose time does not depend on how often a symbol occurs. In embed_backward's
 * kernel one block has all rows of a symbol: with 32,768 rows of 512, and symbols as skewed as in text, it takes 132 us
 * (uniform symbols 76), this 44 (doc/notes/2026-11-29-output-layer.md). */
static void one_hot_gradient(vd_cuda_backend *c, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                             const vd_act *dout, real *dweight) {
  enum { ELEMENTS = 1 << 23 }; /* of one-hot rows at a time: 16 MiB of scratch */
  const int64_t width = (vocab + 7) / 8 * 8, most = ELEMENTS / width;
  void *rows = vd_cuda_workspace(c, &c->scratch, (size_t)((n < most ? n : most) * width) * c->act_size);
  for (int64_t r = 0; rows && r < n; r += most) {
    const int64_t taken = n - r < most ? n - r : most;
    vd_cuda_record_error(c, vd_cuda_one_hot(c->type, taken, width, tokens + r, rows, c->stream), "one-hot rows");
    vd_cuda_main_weight_gradient(c, taken, vocab, d, rows, width, (const char *)dout + (size_t)(r * d) * c->act_size,
                                 dweight);
  }
}

void vd_cuda_embed_backward_op(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                               const vd_dropout *dropout, vd_act *dout, real *dweight) {
  /* Each block of the kernel lists up to FEW_ROWS rows in one pass. The bounds were not tuned. */
  enum { FEW_ROWS = 4096, MOST_SYMBOLS = 512 };
  vd_cuda_backend *c = vd_cuda_of(o);
  vd_cuda_gradient_release(c, dout);
  if (dropout->p > 0)
    vd_cuda_record_error(c, vd_cuda_drop_rows(c->type, n, d, dropout, dout, c->stream), "embed backward");
  if (c->type != VD_FP32 && n > FEW_ROWS && vocab <= MOST_SYMBOLS)
    one_hot_gradient(c, n, d, vocab, tokens, dout, dweight);
  else
    vd_cuda_record_error(c, vd_cuda_embed_backward(c->type, n, d, vocab, tokens, dout, dweight, c->stream),
                         "embed backward");
}
