/* src/ops is the interface between the model and the backends. It holds declarations only:
 *   ops.h           vd_ops, the table of operations of a backend, and the structs that its members take
 *   update_stats.h, cuda_limits.h  the layout of the gradient statistics, limits of kernels; kernels include them too
 *   cuda_plugin.h, nccl_plugin.h  the tables that libviaduct_cuda.so exports; the host program owns the contract
 * In: choices, errors, random numbers and `real` of src/base. Out: src/model calls the table; src/cpu (OpenBLAS,
 * OpenMP; float and double) and cuda/ (cuBLASLt and kernels) fill it. No file here includes MPI, HDF5 or CUDA headers.
 *
 * Operations are coarse, so that a backend can fuse. All members of vd_ops are stream-ordered and not collective: where
 * the backend is asynchronous they return before the work is done, and `synchronize` waits and reports the first error
 * since its last call. On the CPU the work is done when they return. Pointers point to the backend's memory (`alloc`)
 * unless a comment says host. `real *` is a parameter, a gradient or a statistic; `vd_act *` an activation of
 * `act_size` bytes (CPU backend: real). Matrices are row-major; n is the number of rows = streams * block. */
#ifndef VD_OPS_H
#define VD_OPS_H

#include "src/base/choices.h"
#include "src/base/error.h"
#include "src/base/random.h"
#include "src/base/real.h"
#include "src/ops/ring_push.h"
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

/* The attention weights that an attention op records besides its output, all as they multiply the values: with the soft
 * mask, divided by the softmax's denominator. Without dropout only. */
typedef struct vd_attention_record {
  int64_t n_distance; /* distances 0 .. n_distance - 1; more than every reach */
  double *sum; /* [n_stream, n_head, n_distance] += weights at each distance, over the counted queries; of a stream
                  in an order that does not depend on the other streams */
  const int32_t *target; /* [n_stream * block]; a query whose target is -1 is not counted */
  int64_t n_chosen;
  const int64_t *chosen; /* host [n_chosen]: queries, stream * block + i */
  real *weight;          /* [n_chosen, n_head, n_distance]: their weights, written; 0 where the head sees no key */
} vd_attention_record;

// clang-format off
/* One relative-position attention layer over n_stream streams of `block` queries each, of width d = n_head * d_head.
 *
 * Keys of stream b are rows 0 .. window + block - 1: the newest `window` rows of the memory, then the block. Query i
 * has key row j at distance x = window + i - j and sees distances first_distance .. reach[h] (reach[h] <= window).
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
 * that do. attn_span (>= window) then serves only the numbering of dropout's draws. */
// clang-format on
typedef struct vd_attention {
  int64_t n_stream, block, window;
  int64_t n_head, d_head, attn_span;
  int64_t ramp;
  int first_distance; /* 1 */
  enum vd_softmax softmax;
  /* host [n_head]. Where `bounds`, the spans may have moved since the host chose window and reach, which are then upper
   * bounds: a backend that reads the spans on the device uses the window that they need (vd_model_window), at most this
   * one. The CPU backend uses both as given, since its host always knows the current spans. */
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

  const vd_attention_record *record; /* what `attention` records; NULL: nothing */
} vd_attention;

/* Queries, keys and values of a layer, or their gradients, d = n_head * d_head wide each. block [n_stream * block, 3,
 * d]: those of the block's rows, side by side. memory [n_stream, memory_rows, 2, d]: rows 0 .. window - 1 of a stream
 * are keys and values of the newest `window` rows of the memory, of which head h uses rows >= window - reach[h]; not
 * read where no head uses any. With VD_TRIMMED a head uses values within its own span only, min(window, floor(z
 * attn_span) + ramp + 1), as with VD_MASKED: farther values and their gradients may hold anything. */
typedef struct vd_qkv {
  vd_act *block, *memory;
  int64_t memory_rows; /* rows from one stream's memory to the next's, at least the window; 0: the window */
} vd_qkv;

/* Sinusoidal position encodings of the distances 0 .. n - 1 (arXiv 1901.02860): with y = min(x, clamp_len), or y = x
 * where clamp_len <= 0, and w_i = 10000^(-2i/d),
 *   row x = dropout([sin(y w_0) .. sin(y w_(d/2-1)), cos(y w_0) .. cos(y w_(d/2-1))]).   d is even. */
typedef struct vd_position_encoding {
  int64_t n, d, clamp_len;
  vd_dropout dropout; /* row-major; row = distance */
} vd_position_encoding;

/* Adam (Kingma and Ba, arXiv 1412.6980) with bias correction; t: updates including this one. */
typedef struct vd_adam {
  double lr, beta1, beta2, eps;
  int64_t t;
} vd_adam;

/* The hidden states that a layer attends to. memory [n_stream, memory_rows, d] is a ring: row `oldest` of each stream
 * is the oldest, and row 0 follows the last. The newest `window` rows are used; memory_rows >= window. */
typedef struct vd_attention_input {
  const vd_act *memory;
  int64_t memory_rows;
  int64_t oldest;       /* 0 with relative keys */
  const vd_act *hidden; /* [n_stream, block, d] */
} vd_attention_input;

/* A tensor, or a contiguous part of one, for the optimiser: its first element and number of elements, the same in the
 * arenas of parameters, gradients and optimiser state, and the tensor's index. Lists of them are sorted by tensor; an
 * offset is a multiple of 16 bytes. */
typedef struct vd_extent { /* host */
  size_t offset, size;
  int tensor;
} vd_extent;

typedef struct vd_ops vd_ops;
struct vd_ops {
  const char *name; /* "cpu", "cuda" */
  size_t act_size;
  int64_t max_streams;                 /* of one call; 0: no limit */
  int64_t (*max_block)(int64_t width); /* tokens of a block where all heads are `width` wide together; NULL: no limit */
  bool memory_is_remote;               /* the host cannot address it: only put and get reach it */
  void *self;                          /* the backend's state */

  /* `alloc` zeroes the memory. Copies take n real or int32 elements and convert activations to and from the backend's
   * type. */
  int (*alloc)(vd_ops *o, size_t bytes, void **p, vd_error *err);
  /* As alloc, for an arena that ranks exchange (vd_nccl_plugin.use_symmetric_memory). The member may be NULL: alloc. */
  int (*alloc_arena)(vd_ops *o, size_t bytes, void **p, vd_error *err);
  void (*free)(vd_ops *o, void *p);
  void (*zero)(vd_ops *o, void *p, size_t bytes);
  /* gradients [n] = 0, before a forward pass. Ops of a backward pass, norms, `put` and `get` find them zeroed; `zero`,
   * add_constant and optimisers may be called on them after backward_end only. */
  void (*zero_gradients)(vd_ops *o, real *gradients, size_t n);
  void (*put)(vd_ops *o, real *device, const real *host, size_t n);
  void (*get)(vd_ops *o, real *host, const real *device, size_t n); /* waits */
  void (*put_tokens)(vd_ops *o, int32_t *device, const int32_t *host, size_t n);
  void (*put_act)(vd_ops *o, vd_act *device, const real *host, size_t n);
  void (*get_act)(vd_ops *o, real *host, const vd_act *device, size_t n); /* waits */
  int (*synchronize)(vd_ops *o, vd_error *err);
  void (*destroy)(vd_ops *o);
  /* Opens a named range on a profiler's timeline (NVTX) and closes the previous one; NULL name: only closes. The member
   * may be NULL. */
  void (*phase)(vd_ops *o, const char *name);

  /* Parameters [n] (from the start of an arena) have changed: a backend that multiplies in another type converts them
   * again. To be called before an op first uses them and after every change. NULL: nothing to do. */
  void (*weights_changed)(vd_ops *o, const real *params, size_t n);

  /* out[r, :] = dropout(weight[tokens[r], :]). tokens [n]; weight [vocab, d]. */
  void (*embed)(vd_ops *o, int64_t n, int64_t d, const int32_t *tokens, const real *weight, const vd_dropout *dropout,
                vd_act *out);
  /* dweight[tokens[r], :] += dropout(dout[r, :]), in an order that does not depend on timing. dout is overwritten where
   * there is dropout. */
  void (*embed_backward)(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                         const vd_dropout *dropout, vd_act *dout, real *dweight);

  void (*linear)(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias, vd_act *y);
  /* dy [n, out] is the gradient of x W^T + bias. dx [n, in] = dy W, or += where accumulate; NULL: not computed. dweight
   * += dy^T x; dbias (NULL: none) += column sums of dy. `before` (or NULL) is a layer with ReLU whose output is x: dx
   * is then the gradient before its dropout and ReLU (units with x > 0 were active and not dropped), and dbefore, the
   * gradient of its bias, += column sums of dx; dx is then required, and accumulate false. */
  void (*linear_backward)(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                          vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                          real *dbefore);

  /* Optional, before the add_norm whose y the layer l reads: a backend may then draw the dropout of l in passing, with
   * the same result. The member may be NULL. */
  void (*draw_ahead)(vd_ops *o, const vd_linear *l);
  /* sum = a + dropout(b); y = (sum - mean) * rstd * weight + bias, eps 1e-5. `dropped` NULL, or its p 0: b as it is;
   * else with the bits of scale_dropout, whose result is rounded before it is added. Saved for backward: sum [n,d],
   * mean, rstd [n]. */
  void (*add_norm)(vd_ops *o, int64_t n, int64_t d, const vd_act *a, const vd_act *b, const vd_dropout *dropped,
                   const real *weight, const real *bias, vd_act *sum, real *mean, real *rstd, vd_act *y);
  /* dsum [n, d]: the gradient of both a and dropout(b), written. dweight and dbias are added to. dshift [d] (NULL:
   * none), the gradient of a bias whose output is a or b, += column sums of dsum. */
  void (*add_norm_backward)(vd_ops *o, int64_t n, int64_t d, const vd_act *sum, const real *mean, const real *rstd,
                            const real *weight, const vd_act *dy, vd_act *dsum, real *dweight, real *dbias,
                            real *dshift);

  /* Optional, before the first attention op of a pass: the attentions of all n layers, so that a backend makes their
   * tile schedules in one launch. Attention ops work without it, too. The member may be NULL. `a` is host memory. */
  void (*attention_schedule)(vd_ops *o, int n, const vd_attention *a);
  /* Projects the hidden states to x. wq, wk, wv [d, d_model], no bias; memory and hidden are d_model wide, d = n_head *
   * d_head. Of x->memory only the rows that heads use are guaranteed to be written. Weights that are contiguous in
   * memory take one product. With a->window 0 the rows of the block alone are projected, whatever the reaches. */
  void (*attention_project)(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                            const real *wk, const real *wv, const vd_qkv *x);
  /* dhidden [n, d_model] += gradient of the block's rows; memory rows get none. dwq, dwk, dwv += gradients from both
   * the block's and the memory's rows. Rows of dx->memory that no head uses may be overwritten. */
  void (*attention_project_backward)(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                     const real *wk, const real *wv, const vd_qkv *dx, vd_act *dhidden, real *dwq,
                                     real *dwk, real *dwv);
  /* out [n, d]; lse [n_stream, n_head, block]: log of the softmax's denominator, saved for backward. */
  void (*attention)(vd_ops *o, const vd_attention *a, const vd_qkv *x, vd_act *out, real *lse);
  /* dx is written, except the rows of dx->memory that no head uses. dkey_pe [d_head, attn_span] and dspan [n_span] are
   * added to. */
  void (*attention_backward)(vd_ops *o, const vd_attention *a, const vd_qkv *x, const vd_act *out, const real *lse,
                             const vd_act *dout, const vd_qkv *dx, real *dkey_pe, real *dspan);

  /* To be called once after the last attention_backward of a pass: adds gradients that the backend accumulates over
   * layers in buffers of its own to the gradient arena: dkey_pe, those of norms (dweight, dbias, dshift), and dbefore.
   * Until then these and weight gradients may be incomplete (`get`, square_sums and gradient_norms complete all but
   * dkey_pe), and no op of a forward pass may write what the backward pass reads. NULL: nothing to do. */
  void (*backward_end)(vd_ops *o);

  /* memory' = newest `rows_new` rows of [zeros; memory (rows_old, a ring); hidden (block)], per stream, oldest first;
   * old and new may be the same buffer when rows_old == rows_new and oldest is 0. With block = 0 (hidden NULL) only the
   * number of rows changes. */
  void (*memory_push)(vd_ops *o, int64_t n_stream, int64_t d, const vd_act *old, int64_t rows_old, int64_t oldest,
                      const vd_act *hidden, int64_t block, vd_act *memory, int64_t rows_new);
  /* Pushes a block into each of n ring buffers, in place: the block's rows replace the oldest, and the oldest row is
   * then (oldest + block) mod rows. Row i of stream b of a block begins at element (b * block + i) * stride of
   * `hidden`; stride >= d. `push` is host memory. */
  void (*memory_ring_push)(vd_ops *o, int64_t n_stream, int64_t d, int64_t stride, int64_t block, int n,
                           const vd_ring_push *push);

  /* Softmax cross entropy. logits [n, stride], of which the first vocab columns count; targets [n], -1: not counted.
   * *loss_sum (one double, backend memory) += sum of nll in nats over counted rows. nll [n] or NULL: nll per row, 0
   * where not counted. dlogits [n, stride] or NULL (may be logits): scale * (softmax - onehot), 0 in rows not counted
   * and in columns from vocab on. */
  void (*cross_entropy)(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                        const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits);
  void (*get_double)(vd_ops *o, double *host, const double *device, size_t n); /* waits */

  /* Enqueues an async copy of the parts (at most VD_STATS_PARTS), one after the other, to pinned slot `slot` (below
   * VD_PINNED_SLOTS) in host memory. A slot must be pulled before it is pushed again. VD_FAILED without memory. */
  int (*push_stats)(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err);
  /* Waits for the copy into the slot. Returns host memory, aligned to 8 bytes, borrowed until the slot is pushed again;
   * NULL where earlier work failed. */
  const void *(*pull_stats)(vd_ops *o, int slot, vd_error *err);
  /* Reports errors known so far. Does not wait. */
  int (*check)(vd_ops *o, vd_error *err);

  /* x[i] += value. */
  void (*add_constant)(vd_ops *o, real *x, size_t n, double value);
  /* norm2[i] = sum of squares of extent i, in double. norm2: host [n]; waits. Non-finite sums are returned as they are.
   */
  void (*square_sums)(vd_ops *o, const real *x, const vd_extent *extent, int n, double *norm2);
  /* norm2[t] = sum of squares of the extents of tensor t, 0 where it has none. norm2: backend memory [n_tensor]. */
  void (*gradient_norms)(vd_ops *o, const real *gradient, const vd_extent *extent, int n, int n_tensor, double *norm2);
  /* grad_stats (backend memory, layout in update_stats.h) holds the plain gradients' squared norms from
   * VD_STATS_TENSORS on, in whatever parts they were summed: fills in the rest and multiplies the norms by the factor.
   * VD_STATS_SCALE is scale * min(1, clip_norm / (norm + 1e-6)) with norm = scale * (global norm), or `scale` where
   * clip_norm <= 0. */
  void (*gradient_stats)(vd_ops *o, int n_tensor, double scale, double clip_norm, double *grad_stats);
  /* Adagrad over the n extents: g = gradient * factor; acc += g^2; p -= lr_t g / (sqrt(acc) + eps), lr_t = lr *
   * clip_step / (|g_t| + 1e-10) where |g_t|, the norm of tensor t of g, exceeds clip_step > 0, else lr. `factor` is
   * VD_STATS_SCALE and the norms come from grad_stats. Changes nothing where VD_STATS_NONFINITE >= 0: the step is
   * skipped. */
  void (*adagrad)(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *extent, int n,
                  const double *grad_stats, double lr, double eps, double clip_step);
  /* param -= lr m^ / (sqrt(v^) + eps), with g = gradient * factor, m = beta1 m + (1 - beta1) g, v = beta2 v + (1 -
   * beta2) g^2, m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t). param, gradient, m, v: arenas. grad_stats as in
   * adagrad. */
  void (*adam)(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *extent, int n,
               const double *grad_stats, const vd_adam *a);
  /* x = clamp(x, 0, 1). */
  void (*clamp01)(vd_ops *o, real *x, size_t n);

  /* Used by Transformer-XL only: these and `adam` may be NULL in a backend that supports adaptive span alone. */

  /* y = scale * dropout(x), [n, width]; y may be x. The same call on the gradient is the backward. */
  void (*scale_dropout)(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout, const vd_act *x,
                        vd_act *y);
  /* out [n, d]: the sinusoidal position encodings of *e. */
  void (*position_encodings)(vd_ops *o, const vd_position_encoding *e, vd_act *out);
  /* dweight [out, in] += dy^T x: the weight gradient of y = x W^T, x [n, in], from dy [n, out] in real. Serves the
   * relative keys, whose gradient is complete after the update's last attention_backward of the layer. */
  void (*weight_gradient)(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                          real *dweight);
};

/* Not collective. Makes the CPU backend with `threads` threads; <= 0: OpenMP's default. Free with o->destroy(o). */
int vd_ops_cpu(vd_ops **o, int threads, vd_error *err);

#endif
