/* The models: their buffers, memories and spans. The passes are in model_step.c. */
#include "src/model/model_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The step in which windows change, and rows of memory kept beyond the window, as the published code has it. */
enum { VD_WINDOW_STEP = 64 };

static int take(vd_model *m, void *p, size_t elements, size_t size, vd_error *err) {
  void *got = NULL;
  if (m->ops->alloc(m->ops, (elements > 0 ? elements : 1) * size, &got, err))
    return vd_wrap(err, "allocating the model");
  *(void **)p = got;
  return VD_OK;
}

static int take_saved(vd_model *m, struct vd_layer_saved *s, vd_error *err) {
  size_t n = (size_t)(m->micro * m->max_block), d = (size_t)m->d, width = (size_t)m->width, act = m->ops->act_size;
  size_t lse = (size_t)(m->micro * m->config.n_head * m->max_block);
  if (take(m, &s->qkv.block, n * 3 * width, act, err) || take(m, &s->attended, n * width, act, err) ||
      take(m, &s->lse, lse, sizeof(real), err) || take(m, &s->sum1, n * d, act, err) ||
      take(m, &s->normed1, n * d, act, err) || take(m, &s->mean1, n, sizeof(real), err) ||
      take(m, &s->rstd1, n, sizeof(real), err) || take(m, &s->ff, n * (size_t)m->config.d_inner, act, err) ||
      take(m, &s->sum2, n * d, act, err) || take(m, &s->mean2, n, sizeof(real), err) ||
      take(m, &s->rstd2, n, sizeof(real), err))
    return err->status;
  return VD_OK;
}

/* Encodings of distances and what the layers' r_net makes of them, for as many distances as there can be. */
static int take_distances(vd_model *m, vd_error *err) {
  size_t rows = (size_t)(m->config.mem_len + m->max_block), width = (size_t)m->width, act = m->ops->act_size;
  if (take(m, &m->distances, rows * (size_t)m->d, act, err)) return err->status;
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_state *s = &m->state[l];
    if (take(m, &s->rel_key, rows * width, act, err) ||
        (m->training && take(m, &s->drel_key, rows * width, sizeof(real), err)))
      return err->status;
  }
  return VD_OK;
}

static int take_buffers(vd_model *m, vd_error *err) {
  size_t n = (size_t)(m->micro * m->max_block), d = (size_t)m->d, act = m->ops->act_size;
  if (m->owner) m->params = m->owner->params;
  if ((!m->owner && take(m, &m->params, m->arena, sizeof(real), err)) || take(m, &m->output, n * d, act, err) ||
      take(m, &m->logits, n * (size_t)m->config.vocab, act, err) || take(m, &m->branch, n * d, act, err) ||
      take(m, &m->x, n, sizeof(int32_t), err) || take(m, &m->y, n, sizeof(int32_t), err) ||
      take(m, &m->nll, n, sizeof(real), err) || take(m, &m->loss, 1, sizeof(double), err))
    return err->status;
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_saved *s = &m->saved[l];
    if (l > 0 && !m->training) *s = m->saved[0];
    if (take(m, &s->input, n * d, act, err)) return err->status;
    if ((l == 0 || m->training) && take_saved(m, s, err)) return err->status;
  }
  if (vd_model_is_xl(m) && take_distances(m, err)) return err->status;
  if (!m->training) return VD_OK;
  size_t wider = m->d > m->width ? d : (size_t)m->width;
  if (take(m, &m->gradients, m->arena, sizeof(real), err) || take(m, &m->dhidden, n * d, act, err) ||
      take(m, &m->dsum, n * wider, act, err) || take(m, &m->dqkv.block, n * 3 * (size_t)m->width, act, err) ||
      (vd_model_is_xl(m) && take(m, &m->dbranch, n * d, act, err)) ||
      take(m, &m->dff, n * (size_t)m->config.d_inner, act, err))
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

/* shape: what the arguments of the creators say, the rest zero. */
static int create(vd_model **out, const vd_model *shape, int64_t micro_streams, vd_error *err) {
  const vd_model_config *config = &shape->config;
  vd_model *m = vd_calloc(1, sizeof *m);
  *m = *shape;
  m->micro = micro_streams > 0 && micro_streams < m->n_stream ? micro_streams : m->n_stream;
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
  return m->span_room;
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
int64_t vd_model_memory_rows(const vd_model *m, int layer) {
  return vd_model_is_xl(m) ? m->state[layer].window : m->state[layer].rows;
}

/* Span h of the layer, in 0..1, and a step of windows more for each update that the host has not heard of. */
static double longest(const vd_model *m, const struct vd_layer_state *s, int64_t h) {
  double more = (double)m->unheard * VD_WINDOW_STEP / (double)m->config.attn_span;
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
  if (vd_model_is_xl(m)) return; /* reaches follow memories and blocks: vd_model_reserve */
  for (int l = 0; l < (int)m->config.n_layer; l++) plan_layer(m, &m->state[l]);
}

void vd_model_spans_are(vd_model *m, const real *spans, int unheard) {
  for (int l = 0; l < (int)m->config.n_layer && m->span_room > 0; l++) {
    vd_extent at = m->param[m->layer[l].span].at;
    memcpy(m->state[l].z, spans + at.offset, at.size * sizeof *spans);
  }
  m->unheard = unheard;
  vd_model_plan(m);
}

void vd_model_stepped(vd_model *m) {
  if (m->ops->weights_changed) m->ops->weights_changed(m->ops, m->params, m->arena);
  if (m->span_room == 0) return;
  m->unheard++;
  vd_model_plan(m);
}

void vd_model_params_changed(vd_model *m) {
  m->unheard = 0;
  if (m->owner) {
    if (m->owner->unheard > 0) vd_bug("the spans of the model in training are not known");
    for (int l = 0; l < (int)m->config.n_layer; l++)
      memcpy(m->state[l].z, m->owner->state[l].z, (size_t)m->n_span * sizeof(real));
    vd_model_plan(m);
    return;
  }
  if (m->ops->weights_changed) m->ops->weights_changed(m->ops, m->params, m->arena);
  real *spans = vd_calloc(m->span_room + 1, sizeof *spans);
  if (m->span_room > 0) m->ops->get(m->ops, spans, m->params, m->span_room);
  vd_model_spans_are(m, spans, 0);
  free(spans);
}

static int resize_memory(vd_model *m, struct vd_layer_state *s, int64_t rows, vd_error *err) {
  if (s->rows == rows && s->memory) return VD_OK;
  vd_act *memory = NULL;
  if (take(m, &memory, (size_t)(m->n_stream * rows * m->d), m->ops->act_size, err)) return err->status;
  if (s->memory) m->ops->memory_push(m->ops, m->n_stream, m->d, s->memory, s->rows, s->oldest, NULL, 0, memory, rows);
  m->ops->free(m->ops, s->memory);
  s->memory = memory;
  s->rows = rows;
  s->oldest = 0;
  return VD_OK;
}

/* A window that grows by a step from one update to the next finds real history. */
static int64_t rows_wanted(const vd_model *m, const struct vd_layer_state *s) {
  if (vd_model_is_xl(m)) return m->config.mem_len; /* of which the newest `window` are real */
  int64_t rows = s->window + VD_WINDOW_STEP;
  return rows < m->config.attn_span ? rows : m->config.attn_span;
}

/* Where the host hears of spans late, windows are planned a step longer or, each time that it knows them, not: memories
 * do not follow that down and up again. */
static int64_t rows_kept(const vd_model *m, const struct vd_layer_state *s) {
  int64_t wanted = rows_wanted(m, s);
  bool keep = m->late && s->memory && s->rows > wanted && s->rows <= wanted + 2 * VD_WINDOW_STEP;
  return keep && s->rows <= m->config.attn_span ? s->rows : wanted;
}

/* Gives keys and values of memory room for `wanted` rows per stream; what they held is lost. */
static int grow_memory(vd_model *m, vd_qkv *x, int64_t *rows, int64_t wanted, vd_error *err) {
  if (x->memory && wanted <= *rows) return VD_OK;
  m->ops->free(m->ops, x->memory);
  x->memory = NULL;
  *rows = 0;
  if (take(m, &x->memory, (size_t)(m->micro * wanted * 2 * m->width), m->ops->act_size, err)) return err->status;
  *rows = wanted;
  return VD_OK;
}

/* How far a token of the block sees. With K keys, token i of the block sees keys beyond i - w, w = block - (K -
 * mem_len) where K > mem_len, else block (section 3 of doc/DESIGN.md): the distance stays below mem_len, or below K. */
static void plan_reach(const vd_model *m, struct vd_layer_state *s, int64_t block) {
  int64_t reach = s->window + block - 1;
  if (m->config.same_length && reach > m->config.mem_len - 1) reach = m->config.mem_len - 1;
  for (int64_t h = 0; h < m->config.n_head; h++) s->reach[h] = reach;
}

int vd_model_reserve(vd_model *m, int64_t block, vd_error *err) {
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_state *s = &m->state[l];
    struct vd_layer_saved *saved = m->training ? &m->saved[l] : &m->saved[0];
    int64_t rows = vd_model_is_xl(m) ? m->config.mem_len : s->window;
    if (vd_model_is_xl(m)) plan_reach(m, s, block);
    if (resize_memory(m, s, rows_kept(m, s), err) || grow_memory(m, &saved->qkv, &saved->kv_rows, rows, err) ||
        (m->training && grow_memory(m, &m->dqkv, &m->dkv_rows, rows, err)))
      return err->status;
  }
  for (int l = 1; !m->training && l < (int)m->config.n_layer; l++) m->saved[l].qkv = m->saved[0].qkv;
  return VD_OK;
}

int vd_model_reset_memory(vd_model *m, vd_error *err) {
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_state *s = &m->state[l];
    int64_t rows = rows_kept(m, s);
    s->oldest = 0;
    if (vd_model_is_xl(m)) s->window = 0;
    if (s->memory && s->rows == rows) {
      m->ops->zero(m->ops, s->memory, (size_t)(m->n_stream * rows * m->d) * m->ops->act_size);
      continue;
    }
    m->ops->free(m->ops, s->memory);
    s->memory = NULL;
    if (resize_memory(m, s, rows, err)) return err->status;
  }
  return VD_OK;
}

/* Transformer-XL's memories have room for mem_len rows a stream, of which the newest `window` are real. */
static char *real_rows(const vd_model *m, int layer, int64_t stream) {
  const struct vd_layer_state *s = &m->state[layer];
  return (char *)s->memory + (size_t)(((stream + 1) * s->rows - s->window) * m->d) * m->ops->act_size;
}

static void put_rows_xl(vd_model *m, int layer, int64_t rows, int64_t first, int64_t n, const real *in) {
  struct vd_layer_state *s = &m->state[layer];
  s->window = rows < s->rows ? rows : s->rows;
  for (int64_t b = 0; b < n && s->window > 0; b++)
    m->ops->put_act(m->ops, real_rows(m, layer, first + b), in + ((b + 1) * rows - s->window) * m->d,
                    (size_t)(s->window * m->d));
}

/* Copies the memories of streams first .. first + n - 1 to `out`, or `in` to them, each stream's oldest row first. */
static void copy_memory(const vd_model *m, int layer, int64_t first, int64_t n, real *out, const real *in) {
  const struct vd_layer_state *s = &m->state[layer];
  size_t row = (size_t)m->d, stream = (size_t)s->rows * row, turned = (size_t)s->oldest * row;
  size_t pieces = turned > 0 ? 2 * (size_t)n : 1; /* of a ring that begins with its oldest row all streams are one */
  for (size_t i = 0; i < pieces; i++) {
    size_t older = turned > 0 ? stream - turned : (size_t)n * stream, b = i / 2;
    size_t at = b * stream + (i % 2 ? older : 0), size = i % 2 ? turned : older;
    char *there = (char *)s->memory + (((size_t)first + b) * stream + (i % 2 ? 0 : turned)) * m->ops->act_size;
    if (out)
      m->ops->get_act(m->ops, out + at, there, size);
    else
      m->ops->put_act(m->ops, there, in + at, size);
  }
}

void vd_model_memory_get(vd_model *m, int layer, int64_t first, int64_t n, real *out) {
  const struct vd_layer_state *s = &m->state[layer];
  for (int64_t b = 0; b < n && vd_model_is_xl(m); b++)
    m->ops->get_act(m->ops, out + b * s->window * m->d, real_rows(m, layer, first + b), (size_t)(s->window * m->d));
  if (!vd_model_is_xl(m)) copy_memory(m, layer, first, n, out, NULL);
}

int vd_model_memory_put(vd_model *m, int layer, int64_t rows, int64_t first, int64_t n, const real *in, vd_error *err) {
  struct vd_layer_state *s = &m->state[layer];
  if (vd_model_is_xl(m)) {
    put_rows_xl(m, layer, rows, first, n, in);
    return VD_OK;
  }
  if (resize_memory(m, s, rows, err)) return err->status;
  copy_memory(m, layer, first, n, NULL, in);
  return VD_OK;
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
    m->ops->add_constant(m->ops, m->gradients, m->span_room,
                         gradient_scale * m->config.aux_loss_scaler * length / (double)m->n_span);
  return m->config.aux_loss_scaler * total;
}

/* Keys that a token of a full block sees on average within `reach`. Transformer-XL's reaches go beyond the first key.
 */
static double keys_seen(const vd_model *m, const struct vd_layer_state *s, int64_t reach) {
  if (!vd_model_is_xl(m)) return (double)reach;
  double keys = 0;
  for (int64_t i = 0; i < m->max_block; i++) keys += (double)(reach < s->window + i ? reach : s->window + i) + 1;
  return keys / (double)m->max_block;
}

double vd_model_flops(const vd_model *m) {
  const vd_model_config *c = &m->config;
  double d = (double)m->d, width = (double)m->width, inner = (double)c->d_inner, layers = (double)c->n_layer;
  double forward = layers * (4 * d * width + 2 * d * inner) + d * (double)c->vocab, projected = 0;
  for (int l = 0; l < (int)c->n_layer; l++)
    for (int64_t h = 0; h < c->n_head; h++) {
      double reach = (double)m->state[l].reach[h];
      forward += 3 * keys_seen(m, &m->state[l], m->state[l].reach[h]) * (double)c->d_head; /* and positions, values */
      projected += 2 * fmin(reach, (double)m->state[l].window) * d * (double)c->d_head / (double)m->max_block;
    }
  return 2 * (3 * forward + 2 * projected);
}

void vd_model_spans(vd_model *m, float *span) {
  for (int64_t l = 0; l < m->config.n_layer; l++)
    for (int64_t h = 0; h < m->config.n_head; h++)
      span[l * m->config.n_head + h] =
          vd_model_is_xl(m) ? (float)m->state[l].reach[h]
                            : (float)((double)m->state[l].z[m->n_span == 1 ? 0 : h] * (double)m->config.attn_span);
}

void vd_model_estimate(const vd_model_config *config, size_t act_size, int64_t n_stream, int64_t micro_streams,
                       int64_t block, int64_t window, vd_memory_estimate *e) {
  vd_model shape = {.config = *config, .d = config->d_model, .n_span = config->span_per_layer ? 1 : config->n_head};
  vd_model_layout(&shape);
  double arena = (double)(shape.arena * sizeof(real)), act = (double)act_size, layers = (double)config->n_layer;
  free(shape.param);
  free(shape.layer);
  double micro = (double)(micro_streams > 0 && micro_streams < n_stream ? micro_streams : n_stream);
  bool xl = vd_model_is_xl(&shape);
  double n = micro * (double)block, d = (double)config->d_model, width = (double)(config->n_head * config->d_head);
  double qkv = micro * (3.0 * (double)block + 2.0 * (double)window) * width;
  int64_t rows = xl                                            ? config->mem_len
                 : window + VD_WINDOW_STEP < config->attn_span ? window + VD_WINDOW_STEP
                                                               : config->attn_span;
  e->parameters = e->gradients = e->optimizer = arena;
  e->memories = layers * (double)n_stream * (double)rows * d * act;
  double statistics = (4.0 * n + n * (double)config->n_head) * (double)sizeof(real);
  e->activations = layers * ((4.0 * n * d + n * width + n * (double)config->d_inner + qkv) * act + statistics);
  if (xl) e->activations += layers * (double)(config->mem_len + block) * width * (act + (double)sizeof(real));
  e->workspace = ((xl ? 5.0 : 4.0) * n * d + n * (double)config->d_inner + n * (double)config->vocab + qkv) * act +
                 n * (2.0 * sizeof(int32_t) + sizeof(real));
}
