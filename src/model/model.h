/* The adaptive-span transformer (arXiv 1905.07799) and Transformer-XL (arXiv 1901.02860), wired out of ops; owns no
 * arithmetic of its own.
 * Host-side parameters are named as in the golden files. */
#ifndef VD_MODEL_H
#define VD_MODEL_H

#include "src/ops/ops.h"

typedef struct vd_model_config {
  enum vd_arch arch;
  int64_t vocab, n_layer, d_model, n_head, d_head, d_inner;
  double dropout, emb_dropout;
  int64_t attn_span, ramp;
  double span_init;
  bool span_per_layer;
  enum vd_softmax softmax;
  double aux_loss_scaler;
  enum vd_init init;
  uint64_t seed;
  /* Only of Transformer-XL, which knows no spans, and drops the embedding with `dropout`. */
  double dropatt;    /* dropout of attention weights */
  int64_t mem_len;   /* tokens of memory that a layer keeps at most; it begins empty */
  int64_t clamp_len; /* greatest distance that is told apart; <= 0: all are */
  bool same_length;  /* every token sees mem_len tokens at most, itself included */
  bool untie_r;      /* biases of content and position in each layer; else one pair for all */
} vd_model_config;

typedef struct vd_param {
  char name[96];
  int rank;
  int64_t shape[3];
  vd_extent at; /* place in the parameter, gradient and state arenas */
  int layer;    /* -1: none */
  bool is_span; /* clamped to 0..1 after each update */
} vd_param;

typedef struct vd_model vd_model;

/* Not collective. A model for the global streams [stream0, stream0 + n_stream) of a rank, computed at most
 * micro_streams at a time (0: all) in blocks of at most max_block tokens. Parameters are drawn from config->seed;
 * memories are zeros, or empty. ops must outlive it. Errors: out of memory, with the size asked for. */
int vd_model_create(vd_model **out, const vd_model_config *config, vd_ops *ops, int64_t stream0, int64_t n_stream,
                    int64_t micro_streams, int64_t max_block, bool training, vd_error *err);
/* Not collective. A model for evaluation with the parameters of `owner`, which must outlive it; the rest as above. Tell
 * vd_model_params_changed of both when they change, of the owner first. */
int vd_model_create_shared(vd_model **out, const vd_model *owner, int64_t stream0, int64_t n_stream,
                           int64_t micro_streams, int64_t max_block, vd_error *err);
/* Not collective. Frees the model and all its buffers; NULL is allowed. */
void vd_model_destroy(vd_model *m);

/* Bytes that a rank needs for parameters, optimiser state, memories and activations at the given window of every layer
 * (tokens). */
typedef struct vd_memory_estimate {
  double parameters, gradients, optimizer /* one state */, memories, activations, workspace; /* bytes */
} vd_memory_estimate;
/* Not collective. Fills *e for n_stream streams of a rank (micro_streams at a time, 0: all) when every layer's window
 * is `window` tokens; act_size: bytes of an activation. */
void vd_model_estimate(const vd_model_config *config, size_t act_size, int64_t n_stream, int64_t micro_streams,
                       int64_t block, int64_t window, vd_memory_estimate *e);

/* Not collective. The configuration the model was made with. Borrowed. */
const vd_model_config *vd_model_config_of(const vd_model *m);
/* Not collective. Number of parameter tensors. */
int vd_model_n_param(const vd_model *m);
/* Not collective. Name, shape and place of tensor i. Borrowed. */
const vd_param *vd_model_param(const vd_model *m, int i);
/* Not collective. Elements in an arena (parameters, gradients, one optimiser state), padding between tensors included.
 */
size_t vd_model_arena(const vd_model *m);
/* Not collective. Reals at the start of the arenas that hold the spans of all layers, padding included; 0: no spans. */
size_t vd_model_span_extent(const vd_model *m);
/* Not collective. The parameter arena, in the backend's memory. Borrowed; tell vd_model_params_changed after writing.
 */
real *vd_model_params(vd_model *m);
/* Not collective. The gradient arena, in the backend's memory; NULL when the model is not for training. Borrowed. */
real *vd_model_gradients(vd_model *m);

/* Stream-ordered. Gradients [first, first + n) of the arena have got all that this rank adds to them in this update:
 * what is enqueued on the backend after the call finds them whole. The first call, with n = 0, comes as the last
 * backward pass begins. Then every element comes once, from the end of the arena to its start, in the same ranges on
 * all ranks. */
typedef void (*vd_gradients_ready)(void *receiver, size_t first, size_t n);

/* One block of all the rank's streams. x, y: host [n_stream][block]; y = -1: not counted. */
typedef struct vd_step {
  const int32_t *x, *y;
  int64_t block;
  int64_t update; /* for the dropout's counter */
  bool train;     /* dropout on, gradients ADDED to the arena (zero it first) */
  double scale;   /* gradient of the loss = scale * gradient of the sum of nll (1 / targets of the update, all ranks) */
  bool deferred;  /* nothing waits for the backend, and nll_sum is not told: vd_model_loss has it */
  real *nll;      /* host [n_stream][block] or NULL; not where `deferred` */
  double nll_sum; /* out: nats */
  int64_t n_target;         /* out */
  real *logits;             /* host [n_stream][vocab] or NULL: logits of the block's last position */
  vd_gradients_ready ready; /* where `train`, so that gradients can be summed while others are computed; NULL: none */
  void *receiver;           /* what it is given */
} vd_step;

/* Not collective. Forward (and backward where s->train), then the memories move on by the block. The span penalty is
 * not part of it: vd_model_span_penalty. */
int vd_model_run(vd_model *m, vd_step *step, vd_error *err);
/* Not collective. In the backend's memory: the sum of nll, in nats, of the last vd_model_run. Borrowed. */
const double *vd_model_loss(const vd_model *m);
/* Not collective. Memories become zeros of their first size (start of an epoch), or empty in Transformer-XL. */
int vd_model_reset_memory(vd_model *m, vd_error *err);

/* Not collective. aux_loss_scaler * sum_l attn_span * mean_h z (section 3 of doc/DESIGN.md): the value; its gradient
 * times gradient_scale (0: not wanted) is added to the arena. */
double vd_model_span_penalty(vd_model *m, double gradient_scale);

/* Not collective. Floating-point operations of one training step for each token of a full block: the products of the
 * linear layers, of each head's keys within its reach, and of the memory rows that heads project, forward and (twice
 * that, but for the memory's rows, which get no gradient) backward. */
double vd_model_flops(const vd_model *m);

/* Not collective. Spans in tokens into host span [n_layer][n_head] (per_layer: repeated over heads). In Transformer-XL
 * the greatest distance, in tokens, at which a token of the last block could see. */
void vd_model_spans(vd_model *m, float *span);
/* Not collective. Window, in tokens, of layer l: in Transformer-XL the rows that its memory holds, else with the
 * current spans (after vd_model_stepped: with spans 64 tokens longer) attn_span - 64 floor(min(attn_span - 1,
 * attn_span - cur) / 64), cur = min(attn_span, ceil(max_h z attn_span) + ramp). */
int64_t vd_model_window(const vd_model *m, int layer);

/* Not collective. Rows (tokens) of memory that layer `layer` holds per stream, at most attn_span or mem_len. */
int64_t vd_model_memory_rows(const vd_model *m, int layer);
/* Not collective. Copies the memories of the rank's streams first .. first + n - 1 to host out [n][rows][d_model],
 * oldest row first. */
void vd_model_memory_get(vd_model *m, int layer, int64_t first, int64_t n, real *out);
/* Not collective. The reverse; the layer's memory gets `rows` rows per stream first (those of other streams are kept or
 * zeroed; of more than mem_len the newest are kept). VD_FAILED when memory runs out. */
int vd_model_memory_put(vd_model *m, int layer, int64_t rows, int64_t first, int64_t n, const real *in, vd_error *err);

/* Not collective. Tells the model that its parameters were changed from outside (optimiser, checkpoint): it reads the
 * spans again and plans windows and reaches. */
void vd_model_params_changed(vd_model *m);
/* Stream-ordered. Tells it that the optimiser moves the parameters. Until vd_model_spans_are tells what the spans are,
 * windows and reaches are planned for spans 64 tokens longer, which the backend takes as bounds: it sees no farther, if
 * a span should grow by more in one update, before the host has heard of it. Nothing waits. */
void vd_model_stepped(vd_model *m);
/* Not collective. What the first vd_model_span_extent reals of the arena were `unheard` calls of vd_model_stepped ago.
 * spans: host memory. */
void vd_model_spans_are(vd_model *m, const real *spans, int unheard);

#endif
