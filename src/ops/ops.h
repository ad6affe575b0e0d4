/* The table of operations that a backend fills: src/cpu (OpenBLAS, OpenMP; float and double), cuda/.
 *
 * Operations are coarse, so that a backend can fuse. They are stream-ordered: they return before the work is done
 * where the backend is asynchronous; `synchronize` waits and reports what went wrong since. On the CPU they are done
 * when they return. Pointers are in the backend's memory (`alloc`) unless a comment says host. `real *` is a parameter,
 * a gradient or a statistic; `vd_act *` an activation, of `act_size` bytes an element (the CPU backend: real). All
 * matrices are row-major; n is the number of rows = streams * block. */
#ifndef VD_OPS_H
#define VD_OPS_H

#include "src/base/choices.h"
#include "src/base/error.h"
#include "src/base/random.h"
#include "src/base/real.h"
#include "src/ops/update_stats.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef void vd_act;

/* y = x W^T (+ bias) (then ReLU and dropout where `relu`). x [n, in], W [out, in], bias [out] or NULL, y [n, out]. */
typedef struct vd_linear {
  int64_t n, in, out;
  bool relu;
  vd_dropout dropout; /* only with relu */
} vd_linear;

// clang-format off
/* One relative-position attention layer over n_stream streams of `block` queries each, of width d = n_head * d_head.
 *
 * Keys of stream b are rows 0 .. window + block - 1: first the newest `window` rows of the memory, then the block. Query
 * i has key row j at distance x = window + i - j and sees distances first_distance .. reach[h] (reach[h] <= window).
 *
 *   s_ij = (q_i . k_j + q_i . pe(x)) / sqrt(d_head),  pe(x) = key_pe[:, attn_span - x]   (arXiv 1905.07799, eq. 1-2)
 *   m_h(x) = clamp((z_h attn_span - (x - 1)) / ramp + 1, 0, 1)                           (eq. 3-4)
 *   VD_MASKED:  a = m e^s / sum m e^s
 *   VD_TRIMMED: a = m e^s / sum e^s, the sum over all x in 1..window (reach = window)
 *   out_i = sum_j dropout(a_ij) v_j
 *
 * Derivative of the clamp: attn_span / ramp where 0 <= (unclamped value) <= 1, both ends included, else 0. Because of
 * the included ends, reach of VD_MASKED is min(window, floor(z attn_span) + ramp + 1): the last key may have m = 0 and
 * gives to the span's gradient only. Such a key's e^s / sum m e^s is counted up to `ramp` (section 3 of doc/DESIGN.md).
 *
 * The terms of Transformer-XL (arXiv 1901.02860), where rel_key is given; key_pe and span are then NULL, n_span 0,
 * first_distance 0, softmax VD_MASKED with m = 1:
 *   s_ij = ((q_i + u_h) . k_j + (q_i + v_h) . r_h(x)) / sqrt(d_head)
 * A reach may then exceed the window, up to window + block - 1: keys before row 0 do not exist, and a query sees those
 * that do. attn_span (>= window) only counts places for dropout's numbers. */
// clang-format on
typedef struct vd_attention {
  int64_t n_stream, block, window;
  int64_t n_head, d_head, attn_span;
  int64_t ramp;
  int first_distance; /* 1 */
  enum vd_softmax softmax;
  /* host [n_head]. Where `bounds`, the spans may have moved since the host planned window and reach, which are then the
   * most that may be used: a backend that reads the spans takes no more than the window that they ask for
   * (vd_model_window); the CPU, whose host is never late, takes both as they are. */
  const int64_t *reach;
  bool bounds;
  const real *span;   /* [n_span] z in 0..1 */
  int64_t n_span;     /* n_head, or 1: one for all heads of the layer */
  const real *key_pe; /* [d_head, attn_span] */
  vd_dropout dropout;

  int64_t d_model; /* width of the hidden states; 0: n_head * d_head. The heads' width is n_head * d_head always */
  const real *content_bias, *position_bias; /* u, v [n_head, d_head]; both NULL: none */
  const vd_act *rel_key;                    /* [>= greatest reach + 1, n_head * d_head], r_h(x) in row x; or NULL */
  real *dcontent_bias, *dposition_bias;     /* attention_backward adds to them; [n_head, d_head] */
  real *drel_key;                           /* as rel_key, in real; attention_backward adds to it */
} vd_attention;

/* Queries, keys and values of a layer, or their gradients, d = n_head * d_head wide each. block [n_stream * block, 3,
 * d]: those of the block's rows, side by side. memory [n_stream, window, 2, d]: keys and values of the newest `window`
 * rows of the memory, of which head h has rows >= window - reach[h]; where no head has any it is not looked at. */
typedef struct vd_qkv {
  vd_act *block, *memory;
} vd_qkv;

/* Sinusoidal encodings of the distances 0 .. n - 1 (arXiv 1901.02860, as published): with y = min(x, clamp_len)
 * (clamp_len
 * <= 0: x) and w_i = 10000^(-2i/d), row x = dropout([sin(y w_0) .. sin(y w_(d/2-1)), cos(y w_0) ..]). d is even. */
typedef struct vd_position_encoding {
  int64_t n, d, clamp_len;
  vd_dropout dropout; /* row-major; row = distance */
} vd_position_encoding;

/* Adam (Kingma and Ba, arXiv 1412.6980) with bias correction; t: updates including this one. */
typedef struct vd_adam {
  double lr, beta1, beta2, eps;
  int64_t t;
} vd_adam;

/* Where the layer's hidden states lie. memory [n_stream, memory_rows, d] is a ring: row `oldest` of each stream is the
 * oldest, and row 0 follows the last. The newest `window` rows are used; memory_rows >= window. */
typedef struct vd_attention_input {
  const vd_act *memory;
  int64_t memory_rows;
  int64_t oldest;       /* 0 with relative keys */
  const vd_act *hidden; /* [n_stream, block, d] */
} vd_attention_input;

/* One tensor for the optimiser: element counts and places within the parameter, gradient and state arenas. */
typedef struct vd_extent { /* host */
  size_t offset, size;
} vd_extent;

typedef struct vd_ops vd_ops;
struct vd_ops {
  const char *name; /* "cpu", "cuda" */
  size_t act_size;
  bool memory_is_remote; /* not the host's: reached by put and get alone */
  void *self;

  /* Memory: zeroed. Copies are of n real or int32 elements, converted where the backend stores activations otherwise.
   */
  int (*alloc)(vd_ops *o, size_t bytes, void **p, vd_error *err);
  void (*free)(vd_ops *o, void *p);
  void (*zero)(vd_ops *o, void *p, size_t bytes);
  void (*put)(vd_ops *o, real *device, const real *host, size_t n);
  void (*get)(vd_ops *o, real *host, const real *device, size_t n); /* waits */
  void (*put_tokens)(vd_ops *o, int32_t *device, const int32_t *host, size_t n);
  void (*put_act)(vd_ops *o, vd_act *device, const real *host, size_t n);
  void (*get_act)(vd_ops *o, real *host, const vd_act *device, size_t n); /* waits */
  int (*synchronize)(vd_ops *o, vd_error *err);
  void (*destroy)(vd_ops *o);
  /* What comes now, for a profiler's timeline (NVTX); NULL name: nothing of ours. May be NULL itself. */
  void (*phase)(vd_ops *o, const char *name);

  /* Parameters [n] (from the start of an arena) have changed: a backend that multiplies in another type makes its copy
   * anew. To be called before they are first used in an op and after every change. NULL: nothing to do. */
  void (*weights_changed)(vd_ops *o, const real *params, size_t n);

  /* out[r, :] = dropout(weight[tokens[r], :]). tokens [n]; weight [vocab, d]. */
  void (*embed)(vd_ops *o, int64_t n, int64_t d, const int32_t *tokens, const real *weight, const vd_dropout *dropout,
                vd_act *out);
  /* dweight[tokens[r], :] += dropout(dout[r, :]), rows in ascending order. dout is overwritten where there is dropout.
   */
  void (*embed_backward)(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                         const vd_dropout *dropout, vd_act *dout, real *dweight);

  void (*linear)(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y);
  /* From dy [n, out], the gradient of x W^T + bias. dx [n, in]: written, or added to where accumulate; NULL: not
   * wanted. dweight, dbias (NULL: none): added to. Where x is the output of `before`, a layer with ReLU, dx becomes the
   * gradient before its dropout and ReLU (x > 0 tells what was kept), and its column sums are added to dbefore, the
   * gradient of that layer's bias; dx is then wanted, and not accumulated. NULL: x comes from elsewhere. */
  void (*linear_backward)(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                          vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                          real *dbefore);

  /* sum = a + b; y = (sum - mean) * rstd * weight + bias, eps 1e-5. Saved for backward: sum [n,d], mean, rstd [n]. */
  void (*add_norm)(vd_ops *o, int64_t n, int64_t d, const vd_act *a, const vd_act *b, const real *weight,
                   const real *bias, vd_act *sum, real *mean, real *rstd, vd_act *y);
  /* dsum [n, d]: the gradient of both a and b, written. dweight, dbias: added to; so are the sums of dsum's columns to
   * dshift [d] (NULL: none), the gradient of a bias that a or b ends with. */
  void (*add_norm_backward)(vd_ops *o, int64_t n, int64_t d, const vd_act *sum, const real *mean, const real *rstd,
                            const real *weight, const vd_act *dy, vd_act *dsum, real *dweight, real *dbias,
                            real *dshift);

  /* The attentions of all n layers, before the first op of a pass that is given one of them: what follows from spans
   * and shapes can then be worked out for all at once. NULL: not wanted; an attention that was not announced is right
   * too. `a` is host memory. */
  void (*attention_plan)(vd_ops *o, int n, const vd_attention *a);
  /* x from the hidden states; of x->memory only what heads have is sure to be written. wq, wk, wv [d, d_model], no
   * bias; memory and hidden are d_model wide, d = n_head * d_head. Weights that follow each other can be one product.
   */
  void (*attention_project)(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                            const real *wk, const real *wv, const vd_qkv *x);
  /* dhidden [n, d_model] is added to (memory rows get no gradient; the weights get theirs from memory rows too); dw*:
   * added to. What no head has of dx->memory may be overwritten. */
  void (*attention_project_backward)(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                     const real *wk, const real *wv, const vd_qkv *dx, vd_act *dhidden, real *dwq,
                                     real *dwk, real *dwv);
  /* out [n, d]; lse [n_stream, n_head, block]: log of the softmax's denominator, saved for backward. */
  void (*attention)(vd_ops *o, const vd_attention *a, const vd_qkv *x, vd_act *out, real *lse);
  /* dx is written (what no head has of dx->memory is not touched); dkey_pe [d_head, attn_span] and dspan [n_span] are
   * added to. */
  void (*attention_backward)(vd_ops *o, const vd_attention *a, const vd_qkv *x, const vd_act *out, const real *lse,
                             const vd_act *dout, const vd_qkv *dx, real *dkey_pe, real *dspan);

  /* To be called once after the last attention_backward of a pass: gradients that a backend has kept aside are added to
   * where they belong. NULL: nothing is kept aside. */
  void (*backward_end)(vd_ops *o);

  /* memory' = newest `rows_new` rows of [zeros; memory (rows_old, a ring); hidden (block)], per stream, oldest first;
   * old and new may be the same buffer when rows_old == rows_new and oldest is 0. With block = 0 (hidden NULL) only the
   * number of rows changes. */
  void (*memory_push)(vd_ops *o, int64_t n_stream, int64_t d, const vd_act *old, int64_t rows_old, int64_t oldest,
                      const vd_act *hidden, int64_t block, vd_act *memory, int64_t rows_new);
  /* The same for a ring of `rows` rows, where it lies: the block's rows take the places of the oldest, and (oldest +
   * block) mod rows is the oldest then. */
  void (*memory_ring_push)(vd_ops *o, int64_t n_stream, int64_t d, vd_act *memory, int64_t rows, int64_t oldest,
                           const vd_act *hidden, int64_t block);

  /* Softmax cross entropy. logits [n, vocab]; targets [n], -1: not counted. *loss_sum (one double, backend memory) +=
   * sum of nll in nats over counted rows. nll [n] or NULL: nll per row, 0 where not counted. dlogits [n, vocab] or NULL
   * (may be logits): scale * (softmax - onehot), 0 in rows not counted. */
  void (*cross_entropy)(vd_ops *o, int64_t n, int64_t vocab, const vd_act *logits, const int32_t *targets, double scale,
                        double *loss_sum, real *nll, vd_act *dlogits);
  void (*get_double)(vd_ops *o, double *host, const double *device, size_t n); /* waits */

  /* Letter `slot` (below VD_PINNED_SLOTS) becomes a copy of the parts, at most VD_STATS_PARTS, one after the other, as
   * they are when the work before is done. Not to be sent again before it was received. VD_FAILED without memory. */
  int (*push_stats)(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err);
  /* Waits for the slot: host memory, aligned to 8 bytes, borrowed until it is sent again. NULL where the work before
   * failed. */
  const void *(*pull_stats)(vd_ops *o, int slot, vd_error *err);
  /* What went wrong so far, as far as is known without waiting. */
  int (*check)(vd_ops *o, vd_error *err);

  /* x[i] += value. */
  void (*add_constant)(vd_ops *o, real *x, size_t n, double value);
  /* norm2[t] = sum of squares of extent t, in double. norm2: host [n_tensor]; waits. Non-finite sums come through. */
  void (*square_sums)(vd_ops *o, const real *x, const vd_extent *tensor, int n_tensor, double *norm2);
  /* Fills the grad_stats (backend memory, see VD_STATS_NORM2) on gradients that are to be multiplied by `scale` and,
   * where clip_norm > 0 and their global norm times scale exceeds it, by clip_norm / (that norm + 1e-6) too. */
  void (*gradient_stats)(vd_ops *o, const real *gradient, const vd_extent *tensor, int n_tensor, double scale,
                         double clip_norm, double *grad_stats);
  /* Adagrad: g = gradient * factor; acc += g^2; p -= lr_t g / (sqrt(acc) + eps), lr_t = lr * min(1, clip_step / (|g_t|
   * + 1e-10)) where |g_t| > clip_step > 0, |g_t| the norm of tensor t of g; factor and norms from the grad_stats.
   * Nothing where that leaves the update out. */
  void (*adagrad)(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *tensor,
                  int n_tensor, const double *grad_stats, double lr, double eps, double clip_step);
  /* param -= lr m^ / (sqrt(v^) + eps), with g = gradient * factor, m = beta1 m + (1 - beta1) g, v = beta2 v + (1 -
   * beta2) g^2, m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t). param, gradient, m, v: arenas. The grad_stats as above.
   */
  void (*adam)(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *tensor, int n_tensor,
               const double *grad_stats, const vd_adam *a);
  /* x = clamp(x, 0, 1). */
  void (*clamp01)(vd_ops *o, real *x, size_t n);

  /* What only Transformer-XL needs: with `adam` above these may be NULL in a backend that has only adaptive span. */

  /* y = scale * dropout(x), [n, width]; y may be x. It is its own backward. */
  void (*scale_dropout)(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout, const vd_act *x,
                        vd_act *y);
  /* out [n, d]: the encodings of distances 0 .. n - 1, row after row. */
  void (*position_encodings)(vd_ops *o, const vd_position_encoding *e, vd_act *out);
  /* dweight [out, in] += dy^T x: the weight gradient of y = x W^T from a gradient dy [n, out] in real (that of relative
   * keys: complete once the last attention_backward of the layer and update is done). x [n, in]. */
  void (*weight_gradient)(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                          real *dweight);
};

/* Not collective. The CPU backend; `threads` <= 0: OpenMP's own choice. Free with o->destroy(o). */
int vd_ops_cpu(vd_ops **o, int threads, vd_error *err);

#endif
