/* What the files of the model share; nobody else includes this. */
#ifndef VD_MODEL_INTERNAL_H
#define VD_MODEL_INTERNAL_H

#include "src/model/model.h"

/* Tensors of a layer, as indices into vd_model.param. */
struct vd_layer_params {
  int span, query, key, value;               /* of adaptive span */
  int qkv, rel, content_bias, position_bias; /* of Transformer-XL */
  size_t query_at, key_at, value_at;         /* where the three projections lie in the arenas */
  size_t begin; /* in the arenas, of the layer's matrices; they end where those of the next layer begin */
  int out, fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  int norm1_weight, norm1_bias, norm2_weight, norm2_bias;
};

/* What the forward pass of one layer leaves for the backward pass; n = micro streams * block rows. Without training
 * all layers share one set. */
struct vd_layer_saved {
  vd_act *input;          /* [n, d] hidden states going into the layer */
  vd_qkv qkv;             /* [n, 3, width]; [micro streams, window, 2, width] */
  int64_t kv_rows;        /* rows that qkv.memory has room for, per stream */
  vd_act *attended;       /* [n, width] */
  real *lse;              /* [micro streams, n_head, block] */
  vd_act *sum1, *normed1; /* [n, d] */
  real *mean1, *rstd1;    /* [n] */
  vd_act *ff;             /* [n, d_inner] hidden units after ReLU and dropout */
  vd_act *sum2;           /* [n, d] */
  real *mean2, *rstd2;    /* [n] */
};

struct vd_layer_state {
  vd_act *memory; /* [n_stream, rows, d], a ring */
  int64_t rows, oldest;
  int64_t window;
  int64_t *reach; /* host [n_head] */
  real *z;        /* host [n_span] */
  /* Projected memory, kept from one one-token step to the next (model_cache.c). */
  vd_act *cache;      /* [n_stream, cache_rows, 2, width] keys and values, as in vd_qkv.memory; NULL: none */
  int64_t cache_rows; /* rows that there is space for, per stream */
  int64_t cache_end;  /* the newest row of the memory is row cache_end - 1 */
  bool cache_valid;   /* the rows are projections of the present memory by the present weights */
  /* Of Transformer-XL: */
  vd_act *rel_key; /* [mem_len + max_block, width] row x: distance x */
  real *drel_key;  /* the same, training */
};

/* Attention weights that evaluation records (model_attention.c). */
struct vd_model_record {
  int64_t n_distance;
  int64_t n_chosen, done;     /* queries that `weight` has space for; queries chosen so far */
  int64_t *chosen;            /* host: those of this micro batch */
  double **sum;               /* [n_layer], each [n_stream, n_head, n_distance] */
  real **weight;              /* [n_layer], each [n_chosen, n_head, n_distance] */
  vd_attention_record *layer; /* [n_layer] for the attention ops of this micro batch */
};

struct vd_model {
  vd_model_config config;
  vd_ops *ops;
  int64_t stream0, n_stream, micro, max_block, d, n_span;
  int64_t width; /* n_head * d_head */
  bool training;
  const vd_model *owner; /* of the parameters; NULL: they are its own */

  int n_param, in_emb, key_pe, out_weight, out_bias;
  vd_param *param;
  struct vd_layer_params *layer;
  size_t arena;
  size_t common;            /* in the arenas, end of the tensors that ops read as `real` */
  size_t output_begin;      /* in the arenas, of the tensors after those of the last layer */
  int64_t span_margin;      /* see vd_model_set_span_margin */
  bool spans_moved;         /* vd_layer_state.z is older than the spans in the backend's memory */
  size_t span_extent;       /* reals at the arena's start that hold the spans of all layers, padding included */
  real *params, *gradients; /* backend */
  size_t final_from;        /* gradients from here on are final in this update */

  struct vd_layer_state *state;
  struct vd_layer_saved *saved; /* [n_layer] */
  vd_act *output;               /* [n, d] hidden states after the last layer */
  int64_t logit_stride;         /* vocab rounded up, so that rows of 16-bit logits are whole vectors of 16 bytes */
  vd_act *logits;               /* [n, logit_stride], zero beyond vocab */
  vd_act *branch;               /* [n, d] attention or feed-forward output before the residual sum */
  int32_t *x, *y;               /* [n] */
  real *nll;                    /* [n] */
  double *loss;                 /* one */
  vd_act *dhidden;              /* [n, d] */
  vd_act *dsum, *dbranch;       /* [n, the greater of d and width], [n, d] */
  int64_t encoded;              /* rows 0 .. encoded - 1 of rel_key are valid, Transformer-XL without training */
  bool cached;                  /* this step uses the caches of projected memory */
  vd_act *distances;            /* [mem_len + max_block, d] encodings, Transformer-XL */
  vd_act *dff;                  /* [n, d_inner] */
  vd_qkv dqkv;                  /* as a layer's qkv, the largest */
  int64_t dkv_rows;
  struct vd_model_record *record; /* NULL: steps record no attention weights */
};

/* Not collective. *p (a pointer to a pointer) gets elements * size bytes of the backend's memory, zeroed. */
int vd_model_alloc(vd_model *m, void *p, size_t elements, size_t size, vd_error *err);
/* Not collective. Fills m->param, m->layer and the arena size from m->config. */
void vd_model_layout(vd_model *m);
/* Not collective. Draws the initial parameters into host [arena] (config->init, section 3 of doc/DESIGN.md). */
void vd_model_draw(const vd_model *m, real *host);
/* Not collective. Window and reach of every layer from the host copy of its spans. */
void vd_model_plan(vd_model *m);
/* Not collective. Is it Transformer-XL? */
static inline bool vd_model_is_xl(const vd_model *m) {
  return m->config.arch == VD_TRANSFORMER_XL;
}
/* Not collective. Gives every layer's memory and key/value buffers the room that its window and `block` ask for, and in
 * Transformer-XL their reach. */
int vd_model_reserve(vd_model *m, int64_t block, vd_error *err);

/* Not collective. Fills the records of all layers for local streams first .. first + n_stream - 1 of a step. Does
 * nothing in a model that records nothing. */
void vd_model_attention_micro(vd_model *m, const vd_step *step, int64_t first, int64_t n_stream);

/* Not collective. Decides whether a step uses the caches, and makes space for the row that it adds. To be called after
 * vd_model_reserve. Errors: out of memory. */
int vd_model_cache_begin(vd_model *m, const vd_step *step, vd_error *err);
/* Not collective. Sets qkv->memory and memory_rows to keys and values of the memory in the layer's cache, from local
 * stream `first` on. */
void vd_model_cache_rows(const vd_model *m, int layer, int64_t first, vd_qkv *qkv);
/* Stream-ordered. Appends keys and values of a token of each local stream first .. first + n - 1, qkv->block [n, 3,
 * width], to the layer's cache. */
void vd_model_cache_push(vd_model *m, int layer, int64_t first, int64_t n, const vd_qkv *qkv);
/* Not collective. The step is enqueued: the caches hold one row more. */
void vd_model_cache_end(vd_model *m);
/* Not collective. Weights, spans or memories have changed in another way than by a one-token step: the next one
 * projects the whole memory again. */
void vd_model_cache_drop(vd_model *m);

#endif
