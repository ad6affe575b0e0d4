/* The models: their buffers, their spans, and the windows that follow from them. */
#include "src/model/model_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int vd_model_alloc(vd_model *m, void *p, size_t elements, size_t size, vd_error *err) {
  void *got = NULL;
  if (m->ops->alloc(m->ops, (elements > 0 ? elements : 1) * size, &got, err))
    return vd_wrap(err, "allocating the model");
  *(void **)p = got;
  return VD_OK;
}

/* Parameters or gradients. */
static int take_arena(const vd_model *m, real **arena, vd_error *err) {
  void *got = NULL;
  vd_ops *o = m->ops;
  if ((o->alloc_arena ? o->alloc_arena : o->alloc)(o, m->arena * sizeof **arena, &got, err))
    return vd_wrap(err, "allocating the model");
  *arena = got;
  return VD_OK;
}

static int take_saved(vd_model *m, struct vd_layer_saved *s, vd_error *err) {
  size_t n = (size_t)(m->micro * m->max_block), d = (size_t)m->d, width = (size_t)m->width, act = m->ops->act_size;
  size_t lse = (size_t)(m->micro * m->config.n_head * m->max_block);
  if (vd_model_alloc(m, &s->qkv.block, n * 3 * width, act, err) ||
      vd_model_alloc(m, &s->attended, n * width, act, err) || vd_model_alloc(m, &s->lse, lse, sizeof(real), err) ||
      vd_model_alloc(m, &s->sum1, n * d, act, err) || vd_model_alloc(m, &s->normed1, n * d, act, err) ||
      vd_model_alloc(m, &s->mean1, n, sizeof(real), err) || vd_model_alloc(m, &s->rstd1, n, sizeof(real), err) ||
      vd_model_alloc(m, &s->ff, n * (size_t)m->config.d_inner, act, err) ||
      vd_model_alloc(m, &s->sum2, n * d, act, err) || vd_model_alloc(m, &s->mean2, n, sizeof(real), err) ||
      vd_model_alloc(m, &s->rstd2, n, sizeof(real), err))
    return err->status;
  return VD_OK;
}

/* Encodings of distances and what the layers' r_net makes of them, for as many distances as there can be. */
static int take_distances(vd_model *m, vd_error *err) {
  size_t rows = (size_t)(m->config.mem_len + m->max_block), width = (size_t)m->width, act = m->ops->act_size;
  if (vd_model_alloc(m, &m->distances, rows * (size_t)m->d, act, err)) return err->status;
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_state *s = &m->state[l];
    if (vd_model_alloc(m, &s->rel_key, rows * width, act, err) ||
        (m->training && vd_model_alloc(m, &s->drel_key, rows * width, sizeof(real), err)))
      return err->status;
  }
  return VD_OK;
}

static int take_buffers(vd_model *m, vd_error *err) {
  size_t n = (size_t)(m->micro * m->max_block), d = (size_t)m->d, act = m->ops->act_size;
  if (m->owner) m->params = m->owner->params;
  if ((!m->owner && take_arena(m, &m->params, err)) || vd_model_alloc(m, &m->output, n * d, act, err) ||
      vd_model_alloc(m, &m->logits, n * (size_t)m->logit_stride, act, err) ||
      vd_model_alloc(m, &m->branch, n * d, act, err) || vd_model_alloc(m, &m->x, n, sizeof(int32_t), err) ||
      vd_model_alloc(m, &m->y, n, sizeof(int32_t), err) || vd_model_alloc(m, &m->nll, n, sizeof(real), err) ||
      vd_model_alloc(m, &m->loss, 1, sizeof(double), err))
    return err->status;
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_saved *s = &m->saved[l];
    if (l > 0 && !m->training) *s = m->saved[0];
    if (vd_model_alloc(m, &s->input, n * d, act, err)) return err->status;
    if ((l == 0 || m->training) && take_saved(m, s, err)) return err->status;
  }
  if (vd_model_is_xl(m) && take_distances(m, err)) return err->status;
  if (!m->training) return VD_OK;
  size_t wider = m->d > m->width ? d : (size_t)m->width;
  if (take_arena(m, &m->gradients, err) || vd_model_alloc(m, &m->dhidden, n * d, act, err) ||
      vd_model_alloc(m, &m->dsum, n * wider, act, err) ||
      vd_model_alloc(m, &m->dqkv.block, n * 3 * (size_t)m->width, act, err) ||
      (vd_model_is_xl(m) && vd_model_alloc(m, &m->dbranch, n * d, act, err)) ||
      vd_model_alloc(m, &m->dff, n * (size_t)m->config.d_inner, act, err))
    return err->status;
  return VD_OK;
}

static int start_parameters(vd_model *m, vd_error *err) {
  if (!m->owner) {
    real *host = vd_calloc(m->arena, sizeof *host);
    vd_model_draw(m, host);
    m->ops->put(m->ops, m->params, host, m->arena);
    free(host);
  }
  vd_model_params_changed(m);
  return vd_model_reset_memory(m, err);
}

int64_t vd_model_streams_at_once(int64_t n_stream, int64_t micro_streams) {
  return micro_streams > 0 && micro_streams < n_stream ? micro_streams : n_stream;
}

int vd_model_check_sizes(const vd_model_config *config, const vd_ops *ops, int64_t n_stream, int64_t micro_streams,
                         int64_t block, vd_error *err) {
  const int64_t n = vd_model_streams_at_once(n_stream, micro_streams), width = config->n_head * config->d_head;
  const int64_t longest = ops->max_block ? ops->max_block(width) : block;
  if (ops->max_streams > 0 && n > ops->max_streams)
    return vd_fail(
        err, VD_FAILED,
        "a rank has %lld streams at a time, and the backend '%s' computes at most %lld: use fewer streams, a "
        "smaller data%%micro_streams or more ranks",
        (long long)n, ops->name, (long long)ops->max_streams);
  if (block > longest)
    return vd_fail(err, VD_FAILED,
                   "tokens_per_sample = %lld is too long for the backend '%s': at most %lld where all heads of a layer "
                   "are %lld wide together",
                   (long long)block, ops->name, (long long)longest, (long long)width);
  return VD_OK;
}

/* shape: what the arguments of the creators say, the rest zero. */
static int create(vd_model **out, const vd_model *shape, int64_t micro_streams, vd_error *err) {
  const vd_model_config *config = &shape->config;
  if (vd_model_check_sizes(config, shape->ops, shape->n_stream, micro_streams, shape->max_block, err))
    return err->status;
  vd_model *m = vd_calloc(1, sizeof *m);
  *m = *shape;
  m->micro = vd_model_streams_at_once(m->n_stream, micro_streams);
  m->d = config->d_model;
  m->n_span = vd_model_is_xl(m) ? 0 : config->span_per_layer ? 1 : config->n_head;
  if (!vd_model_is_xl(m) && config->n_head * config->d_head != config->d_model)
    vd_bug("d_model is not n_head * d_head");
  vd_model_layout(m);
  m->state = vd_calloc((size_t)config->n_layer, sizeof *m->state);
  m->saved = vd_calloc((size_t)config->n_layer, sizeof *m->saved);
  for (int l = 0; l < (int)config->n_layer; l++) {
    m->state[l].reach = vd_calloc((size_t)config->n_head, sizeof(int64_t));
    m->state[l].z = vd_calloc((size_t)config->n_head, sizeof(real));
  }
  if (take_buffers(m, err) || start_parameters(m, err)) {
    vd_model_destroy(m);
    return err->status;
  }
  *out = m;
  return VD_OK;
}

int vd_model_create(vd_model **out, const vd_model_config *config, vd_ops *ops, int64_t stream0, int64_t n_stream,
                    int64_t micro_streams, int64_t max_block, bool training, vd_error *err) {
  if (config->arch == VD_TRANSFORMER_XL && !(ops->scale_dropout && ops->position_encodings && ops->weight_gradient))
    return vd_fail(err, VD_FAILED, "the backend '%s' cannot compute Transformer-XL", ops->name);
  vd_model shape = {.config = *config,
                    .ops = ops,
                    .stream0 = stream0,
                    .n_stream = n_stream,
                    .max_block = max_block,
                    .training = training};
  return create(out, &shape, micro_streams, err);
}

int vd_model_create_shared(vd_model **out, const vd_model *owner, int64_t stream0, int64_t n_stream,
                           int64_t micro_streams, int64_t max_block, vd_error *err) {
  vd_model shape = {.config = owner->config,
                    .ops = owner->ops,
                    .owner = owner,
                    .stream0 = stream0,
                    .n_stream = n_stream,
                    .max_block = max_block};
  return create(out, &shape, micro_streams, err);
}

static void release_layer(vd_model *m, int l) {
  struct vd_layer_saved *s = &m->saved[l];
  m->ops->free(m->ops, s->input);
  m->ops->free(m->ops, m->state[l].memory);
  m->ops->free(m->ops, m->state[l].cache);
  m->ops->free(m->ops, m->state[l].rel_key);
  m->ops->free(m->ops, m->state[l].drel_key);
  free(m->state[l].reach);
  free(m->state[l].z);
  if (l > 0 && !m->training) return;
  void *mine[] = {s->qkv.block, s->qkv.memory, s->attended, s->lse,  s->sum1,  s->normed1,
                  s->mean1,     s->rstd1,      s->ff,       s->sum2, s->mean2, s->rstd2};
  for (size_t i = 0; i < sizeof mine / sizeof *mine; i++) m->ops->free(m->ops, mine[i]);
}

void vd_model_destroy(vd_model *m) {
  if (!m) return;
  vd_model_attention_end(m);
  for (int l = 0; l < (int)m->config.n_layer; l++) release_layer(m, l);
  void *shared[] = {m->distances, m->dbranch, m->gradients, m->output, m->logits, m->branch,     m->x,          m->y,
                    m->nll,       m->loss,    m->dhidden,   m->dsum,   m->dff,    m->dqkv.block, m->dqkv.memory};
  for (size_t i = 0; i < sizeof shared / sizeof *shared; i++) m->ops->free(m->ops, shared[i]);
  if (!m->owner) m->ops->free(m->ops, m->params);
  free(m->state);
  free(m->saved);
  free(m->param);
  free(m->layer);
  free(m);
}

const vd_model_config *vd_model_config_of(const vd_model *m) {
  return &m->config;
}
int vd_model_n_param(const vd_model *m) {
  return m->n_param;
}
const vd_param *vd_model_param(const vd_model *m, int i) {
  return &m->param[i];
}
size_t vd_model_arena(const vd_model *m) {
  return m->arena;
}
size_t vd_model_span_extent(const vd_model *m) {
  return m->span_extent;
}
size_t vd_model_common_extent(const vd_model *m) {
  return m->common;
}
size_t vd_model_first_layer_extent(const vd_model *m) {
  return (m->config.n_layer > 1 ? m->layer[1].begin : m->output_begin) - m->common;
}
real *vd_model_params(vd_model *m) {
  return m->params;
}
real *vd_model_gradients(vd_model *m) {
  return m->gradients;
}
const double *vd_model_loss(const vd_model *m) {
  return m->loss;
}
int64_t vd_model_window(const vd_model *m, int layer) {
  return m->state[layer].window;
}
/* The longest, in 0..1, that span h of the layer can be: the host's copy, plus the margin where that copy is old. */
static double longest(const vd_model *m, const struct vd_layer_state *s, int64_t h) {
  double more = m->spans_moved ? (double)m->span_margin / (double)m->config.attn_span : 0.0;
  return fmin(fmax((double)s->z[m->n_span == 1 ? 0 : h] + more, 0.0), 1.0);
}

static void plan_layer(vd_model *m, struct vd_layer_state *s) {
  int64_t length = m->config.attn_span, ramp = m->config.ramp;
  double widest = 0.0;
  for (int64_t h = 0; h < m->n_span; h++) widest = fmax(widest, longest(m, s, h));
  int64_t current = (int64_t)ceil(widest * (double)length) + ramp;
  if (current > length) current = length;
  int64_t spare = length - current < length - 1 ? length - current : length - 1;
  s->window = length - VD_WINDOW_STEP * (spare / VD_WINDOW_STEP);
  for (int64_t h = 0; h < m->config.n_head; h++) {
    int64_t reach = (int64_t)floor(longest(m, s, h) * (double)length) + ramp + 1;
    s->reach[h] = m->config.softmax == VD_TRIMMED || reach > s->window ? s->window : reach;
  }
}

void vd_model_plan(vd_model *m) {
  vd_model_cache_drop(m);
  m->encoded = 0;
  if (vd_model_is_xl(m)) return; /* reaches follow memories and blocks: vd_model_reserve */
  for (int l = 0; l < (int)m->config.n_layer; l++) plan_layer(m, &m->state[l]);
}

void vd_model_set_spans(vd_model *m, const real *spans) {
  for (int l = 0; l < (int)m->config.n_layer && m->span_extent > 0; l++) {
    vd_extent at = m->param[m->layer[l].span].at;
    memcpy(m->state[l].z, spans + at.offset, at.size * sizeof *spans);
  }
  m->spans_moved = false;
  vd_model_plan(m);
}

void vd_model_set_span_margin(vd_model *m, int64_t tokens) {
  m->span_margin = tokens;
  vd_model_plan(m);
}

void vd_model_params_moved(vd_model *m) {
  if (m->ops->weights_changed) m->ops->weights_changed(m->ops, m->params, m->arena);
  if (m->span_extent == 0) return;
  m->spans_moved = true;
  vd_model_plan(m);
}

void vd_model_params_changed(vd_model *m) {
  if (m->owner) {
    if (m->owner->spans_moved) vd_bug("the spans of the model in training have not been read");
    for (int l = 0; l < (int)m->config.n_layer; l++)
      memcpy(m->state[l].z, m->owner->state[l].z, (size_t)m->n_span * sizeof(real));
    vd_model_plan(m);
    return;
  }
  if (m->ops->weights_changed) m->ops->weights_changed(m->ops, m->params, m->arena);
  real *spans = vd_calloc(m->span_extent + 1, sizeof *spans);
  if (m->span_extent > 0) m->ops->get(m->ops, spans, m->params, m->span_extent);
  vd_model_set_spans(m, spans);
  free(spans);
}

double vd_model_span_penalty(vd_model *m, double gradient_scale) {
  double total = 0.0, length = (double)m->config.attn_span;
  if (vd_model_is_xl(m)) return 0.0;
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    double sum = 0.0;
    for (int64_t h = 0; h < m->n_span; h++) sum += (double)m->state[l].z[h];
    total += length * sum / (double)m->n_span;
  }
  if (gradient_scale != 0) /* padding between the layers' spans gets it too, and is never read */
    m->ops->add_constant(m->ops, m->gradients, m->span_extent,
                         gradient_scale * m->config.aux_loss_scaler * length / (double)m->n_span);
  return m->config.aux_loss_scaler * total;
}

void vd_model_spans(vd_model *m, float *span) {
  for (int64_t l = 0; l < m->config.n_layer; l++)
    for (int64_t h = 0; h < m->config.n_head; h++)
      span[l * m->config.n_head + h] =
          vd_model_is_xl(m) ? (float)m->state[l].reach[h]
                            : (float)((double)m->state[l].z[m->n_span == 1 ? 0 : h] * (double)m->config.attn_span);
}
