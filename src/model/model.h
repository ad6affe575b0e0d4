/* src/model: the adaptive-span transformer (arXiv 1905.07799), Transformer-XL (arXiv 1901.02860) and their optimisers.
 *
 * Here live the layout and the initial values of the parameters, the buffers of activations, the memories of earlier
 * hidden states, the forward and backward passes, spans and the windows that follow from them, and the optimisers'
 * states and schedules. The files order ops (src/ops/ops.h) and compute nothing themselves.
 * In:  a vd_model_config or vd_optimizer_config, a backend's vd_ops, and blocks of token ids of this rank's streams.
 * Out: the loss, gradients in one arena, parameters in another (tensors are named as in the golden files), counts of
 *      operations and bytes for logs and for checks of memory.
 * The room knows nothing of MPI, files, decks or the training loop: src/train connects it with them.
 * model.c: buffers and windows; model_params.c: layout and initial values; model_step.c: the passes; model_memory.c:
 * the memories; model_cache.c: their projections in one-token steps; model_attention.c: the attention weights that
 * evaluation records; model_cost.c: operations and bytes; optimizer.c: Adagrad, Adam, loss scaling; sampler.c: draws
 * from logits. */
#ifndef VD_MODEL_H
#define VD_MODEL_H

#include "src/ops/ops.h"

/* Windows change in steps of this many tokens, as in the published code; a memory holds one step more. */
enum { VD_WINDOW_STEP = 64 };

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
  /* Transformer-XL alone, which has no spans and applies `dropout` to the embedding too. */
  double dropatt;    /* dropout of attention weights */
  int64_t mem_len;   /* most tokens in the memory of a layer */
  int64_t clamp_len; /* longer distances get the encoding of this one; <= 0: every distance has its own */
  bool same_length;  /* every token sees mem_len tokens at most, itself included */
  enum vd_initial_memory initial_memory; /* at the start of a split: no rows, or mem_len rows of zeros */
  bool untie_r;                          /* biases of content and position in each layer; else one pair for all */
} vd_model_config;

typedef struct vd_param {
  char name[96];
  int rank;
  int64_t shape[3];
  vd_extent at;   /* place in the parameter, gradient and state arenas */
  int layer;      /* -1: none */
  bool is_span;   /* clamped to 0..1 after each update */
  bool is_common; /* ops read it as `real` (spans, norms, biases, tables of embeddings and keys); the other tensors are
                     matrices that products read in the activations' type */
} vd_param;

typedef struct vd_model vd_model;

/* Not collective. How many of a rank's n_stream streams are computed at once: micro_streams, 0: all. */
int64_t vd_model_streams_at_once(int64_t n_stream, int64_t micro_streams);
/* Not collective. VD_FAILED where n_stream streams of a rank, micro_streams at a time (0: all), are more at a time than
 * ops->max_streams, or blocks longer than ops->max_block allows. */
int vd_model_check_sizes(const vd_model_config *config, const vd_ops *ops, int64_t n_stream, int64_t micro_streams,
                         int64_t block, vd_error *err);
/* Not collective. A model for the global streams [stream0, stream0 + n_stream) of a rank, computed at most
 * micro_streams at a time (0: all) in blocks of at most max_block tokens. Parameters are drawn from config->seed;
 * memories are zeros, or empty. ops must outlive it. Errors: out of memory, with the size asked for; those
 * of vd_model_check_sizes. */
int vd_model_create(vd_model **out, const vd_model_config *config, vd_ops *ops, int64_t stream0, int64_t n_stream,
                    int64_t micro_streams, int64_t max_block, bool training, vd_error *err);
/* Not collective. A model for evaluation with the parameters of `owner`, which must outlive it; the rest as above. When
 * they change, call vd_model_params_changed on the owner first, then on this model. */
int vd_model_create_shared(vd_model **out, const vd_model *owner, int64_t stream0, int64_t n_stream,
                           int64_t micro_streams, int64_t max_block, vd_error *err);
/* Not collective. Frees the model and all its buffers; NULL is allowed. */
void vd_model_destroy(vd_model *m);

/* Bytes that a rank needs for parameters, optimiser state, memories and activations at the given window of every layer
 * (tokens). */
typedef struct vd_memory_estimate {
  double parameters, gradients, optimizer /* one state */, memories, activations, workspace; /* bytes */
  double logits; /* contained in workspace */
} vd_memory_estimate;
/* Not collective. Fills *e for n_stream streams of a rank (micro_streams at a time, 0: all) when every layer's window
 * is `window` tokens; act_size: bytes of an activation. What one-token steps keep of projected memory is not counted.
 */
void vd_model_estimate(const vd_model_config *config, size_t act_size, int64_t n_stream, int64_t micro_streams,
                       int64_t block, int64_t window, vd_memory_estimate *e);

/* Not collective. Number of parameters of such a model: the elements of all tensors, without padding. */
int64_t vd_model_parameters(const vd_model_config *config);

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
/* Not collective. Reals at the start of the arenas that hold all tensors with `is_common`; the matrices follow, layer
 * by layer in the order of the forward pass, and at last the output layer. */
size_t vd_model_common_extent(const vd_model *m);
/* Not collective. Reals of the first layer's matrices, which follow those. */
size_t vd_model_first_layer_extent(const vd_model *m);
/* Not collective. The parameter arena, in the backend's memory. Borrowed; call vd_model_params_changed after writing.
 */
real *vd_model_params(vd_model *m);
/* Not collective. The gradient arena, in the backend's memory; NULL when the model is not for training. Borrowed. */
real *vd_model_gradients(vd_model *m);

/* Stream-ordered. Gradients [first, first + n) of the arena are final in this update: this rank adds nothing more to
 * them, and work that is enqueued on the backend after the call reads the final values. The first call has n = 0 and
 * marks the start of the last backward pass. The calls after it cover the arena once, from its end to its start, in
 * the same ranges on all ranks. */
typedef void (*vd_gradients_ready)(void *receiver, size_t first, size_t n);

/* Stream-ordered. The ops that are enqueued after the call read the weights [first, first + n) of the parameter arena.
 * A pass calls it for the matrices of each layer, in the order of the forward pass, and for the output layer; more than
 * once where it computes in micro batches. The common extent needs no call. */
typedef void (*vd_weights_needed)(void *receiver, size_t first, size_t n);

/* One block of all the rank's streams. x, y: host [n_stream][block]; y = -1: not counted. */
typedef struct vd_step {
  const int32_t *x, *y;
  int64_t block;
  int64_t update; /* for the dropout's counter */
  bool train;     /* dropout on, gradients ADDED to the arena (zero it first) */
  double scale;   /* gradient of the loss = scale * gradient of the sum of nll (1 / targets of the update, all ranks) */
  /* Host memory for results, or NULL. Where all three are NULL the host does not wait for the backend. */
  double *nll_sum;          /* one: the sum of nll, in nats */
  real *nll;                /* [n_stream][block] nats */
  real *logits;             /* [n_stream][vocab]: logits of the block's last position */
  int64_t n_target;         /* out: targets that are counted */
  vd_gradients_ready ready; /* where `train`: called for each range of final gradients; NULL: not called */
  vd_weights_needed needed; /* called before the ops of each layer; NULL: not called */
  void *receiver;           /* first argument of both */
  /* Host [n_chosen], ascending: queries, stream * block + i, whose attention weights are recorded after
   * vd_model_attention_begin. */
  const int64_t *chosen;
  int64_t n_chosen;
} vd_step;

/* Not collective. Forward (and backward where step->train), then appends the block to the memories. The span penalty is
 * separate: vd_model_span_penalty. Waits for the backend only where step asks for results on the host. VD_FAILED where
 * memory runs out, or the backend has failed as far as is known. */
int vd_model_run(vd_model *m, vd_step *step, vd_error *err);
/* Not collective. In the backend's memory: the sum of nll, in nats, of the last vd_model_run. Borrowed. */
const double *vd_model_loss(const vd_model *m);
/* Not collective. Memories become zeros of their first size (start of an epoch); in Transformer-XL empty, or with
 * VD_MEMORY_ZEROS mem_len rows of zeros. VD_FAILED without memory. */
int vd_model_reset_memory(vd_model *m, vd_error *err);

/* Not collective. Distances 0 .. n - 1 that attention weights can have in this model at its present spans: n is the
 * greatest reach of a head plus 1; in Transformer-XL that of a full memory and a block of max_block tokens. */
int64_t vd_model_attention_distances(const vd_model *m);
/* Not collective. From now on every step (without training) records attention weights, in the backend's memory: 8 bytes
 * for each layer, stream, head and distance, and sizeof(real) for each layer, chosen query, head and distance.
 * n_chosen: the most queries that the steps choose together. Begins anew where the model records already. The spans
 * must not change until vd_model_attention_end. VD_FAILED without memory. */
int vd_model_attention_begin(vd_model *m, int64_t n_chosen, vd_error *err);
/* Not collective. The steps record no more, and what they recorded is freed. */
void vd_model_attention_end(vd_model *m);
/* Not collective. Sums of a layer's weights over the queries of local stream `stream` whose targets were counted, into
 * host out [n_head][distances]. Waits. */
void vd_model_attention_sum(vd_model *m, int layer, int64_t stream, double *out);
/* Not collective. The weights of chosen query k, counted over all steps, into host out [n_head][distances]. Waits. */
void vd_model_attention_weight(vd_model *m, int layer, int64_t k, real *out);

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
/* Not collective. Window, in tokens, of layer l. Transformer-XL: the rows that its memory holds. Adaptive span:
 * attn_span - 64 floor(min(attn_span - 1, attn_span - cur) / 64), cur = min(attn_span, ceil(max_h z attn_span) + ramp),
 * with spans longer by the margin (vd_model_set_span_margin) where the host's copy z is older than the last step. */
int64_t vd_model_window(const vd_model *m, int layer);

/* Not collective. Rows (tokens) of memory that layer `layer` holds per stream, at most attn_span or mem_len. */
int64_t vd_model_memory_rows(const vd_model *m, int layer);
/* Not collective. Copies the memories of the rank's streams first .. first + n - 1 to host out [n][rows][d_model],
 * oldest row first. Waits. */
void vd_model_memory_get(vd_model *m, int layer, int64_t first, int64_t n, real *out);
/* Not collective. The reverse. First resizes the layer's memory to `rows` rows per stream: other streams keep their
 * newest rows, with zeros before them; Transformer-XL takes the newest mem_len of `rows`. VD_FAILED when memory runs
 * out. */
int vd_model_memory_put(vd_model *m, int layer, int64_t rows, int64_t first, int64_t n, const real *in, vd_error *err);

/* Not collective. The parameters were written from outside (a checkpoint, a test): reads the spans from the backend's
 * memory, which waits, and plans windows and reaches for them. */
void vd_model_params_changed(vd_model *m);
/* Stream-ordered. An optimiser step that moves the parameters has been enqueued: the host's copy of the spans is old
 * from here to vd_model_set_spans. Until then windows and reaches are planned for spans that are longer by the margin;
 * the backend takes them as upper bounds and reads the spans themselves. Does not wait. */
void vd_model_params_moved(vd_model *m);
/* Not collective. spans: host copy of the first vd_model_span_extent reals of the arena, as they are after the last
 * step. Plans windows and reaches for them. */
void vd_model_set_spans(vd_model *m, const real *spans);
/* Not collective. The one thing that the model knows of how updates are scheduled: the most tokens by which a span may
 * grow before the host reads it. 0 (the default): every step is followed by vd_model_set_spans before the next block.
 * Otherwise VD_WINDOW_STEP: a span that grows by more in one update may be cut at 64 tokens more for the next block,
 * and memories keep rows that a window planned without the margin would give up. */
void vd_model_set_span_margin(vd_model *m, int64_t tokens);

#endif
