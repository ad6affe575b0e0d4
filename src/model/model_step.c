/* One block through a model, forward and backward (arXiv 1905.07799 and 1901.02860; section 3 of doc/DESIGN.md). */
#include "src/model/model_internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The streams that are computed at once. */
struct micro {
  int64_t first, n_stream, block, rows; /* first: local number; rows = n_stream * block */
  bool last;                            /* of the update */
  const vd_step *step;
};

static const real *weight(const vd_model *m, int param) {
  return m->params + m->param[param].at.offset;
}
static real *gradient(const vd_model *m, int param) {
  return m->gradients + m->param[param].at.offset;
}

static vd_dropout dropout(const vd_model *m, const struct micro *u, double p, int layer, enum vd_site site) {
  int64_t stream = m->stream0 + u->first;
  return (vd_dropout){.p = u->step->train ? p : 0.0,
                      .rng = {m->config.seed, (uint32_t)u->step->update, (uint16_t)layer, (uint16_t)site},
                      .row0 = site == VD_SITE_ATTENTION ? stream : stream * u->block};
}

/* Transformer-XL's branches and last output are dropped in training, the adaptive-span transformer's are not. */
static vd_dropout branch_dropout(const vd_model *m, const struct micro *u, int layer, enum vd_site site) {
  return dropout(m, u, vd_model_is_xl(m) ? m->config.dropout : 0.0, layer, site);
}
/* Where there is no dropout, *x is passed on as it is; else what is dropped goes to `target`, which may be x. */
static vd_act *drop(vd_model *m, const struct micro *u, int layer, enum vd_site site, vd_act *x, vd_act *target) {
  vd_dropout d = branch_dropout(m, u, layer, site);
  if (d.p <= 0) return x;
  m->ops->scale_dropout(m->ops, u->rows, m->d, 1.0, &d, x, target);
  return target;
}

/* What the attention op of layer l records. */
static const vd_attention_record *record_of(const vd_model *m, int l) {
  return m->record ? &m->record->layer[l] : NULL;
}

static vd_attention attention_xl(const vd_model *m, const struct micro *u, int l) {
  const vd_model_config *c = &m->config;
  const struct vd_layer_state *s = &m->state[l];
  const struct vd_layer_params *p = &m->layer[l];
  bool train = u->step->train;
  return (vd_attention){.n_stream = u->n_stream,
                        .block = u->block,
                        .window = s->window,
                        .n_head = c->n_head,
                        .d_head = c->d_head,
                        .attn_span = c->mem_len,
                        .softmax = VD_MASKED,
                        .reach = s->reach,
                        .dropout = dropout(m, u, c->dropatt, l, VD_SITE_ATTENTION),
                        .d_model = m->d,
                        .content_bias = weight(m, p->content_bias),
                        .position_bias = weight(m, p->position_bias),
                        .rel_key = s->rel_key,
                        .dcontent_bias = train ? gradient(m, p->content_bias) : NULL,
                        .dposition_bias = train ? gradient(m, p->position_bias) : NULL,
                        .drel_key = s->drel_key,
                        .record = record_of(m, l)};
}

static vd_attention attention_of(const vd_model *m, const struct micro *u, int l) {
  const vd_model_config *c = &m->config;
  if (vd_model_is_xl(m)) return attention_xl(m, u, l);
  return (vd_attention){.n_stream = u->n_stream,
                        .block = u->block,
                        .window = m->state[l].window,
                        .n_head = c->n_head,
                        .d_head = c->d_head,
                        .attn_span = c->attn_span,
                        .ramp = c->ramp,
                        .first_distance = 1,
                        .softmax = c->softmax,
                        .reach = m->state[l].reach,
                        .bounds = m->spans_moved,
                        .span = weight(m, m->layer[l].span),
                        .n_span = m->n_span,
                        .key_pe = weight(m, m->key_pe),
                        .dropout = dropout(m, u, c->dropout, l, VD_SITE_ATTENTION),
                        .record = record_of(m, l)};
}

static vd_attention_input input_of(const vd_model *m, const struct micro *u, int l) {
  const struct vd_layer_state *s = &m->state[l];
  size_t skip = (size_t)(u->first * s->rows * m->d) * m->ops->act_size;
  return (vd_attention_input){(const char *)s->memory + skip, s->rows, s->oldest, m->saved[l].input};
}

static vd_linear fc1_of(const vd_model *m, const struct micro *u, int l) {
  return (vd_linear){.n = u->rows,
                     .in = m->d,
                     .out = m->config.d_inner,
                     .relu = true,
                     .dropout = dropout(m, u, m->config.dropout, l, VD_SITE_HIDDEN)};
}
static vd_linear plain(const struct micro *u, int64_t in, int64_t out) {
  return (vd_linear){.n = u->rows, .in = in, .out = out};
}

/* The ops after this call read the matrices of layer l; l = n_layer: of the output layer. */
static void weights_needed(const vd_model *m, const vd_step *s, int l) {
  int n_layer = (int)m->config.n_layer;
  size_t first = l < n_layer ? m->layer[l].begin : m->output_begin;
  size_t end = l + 1 < n_layer ? m->layer[l + 1].begin : l + 1 == n_layer ? m->output_begin : m->arena;
  if (s->needed) s->needed(s->receiver, first, end - first);
}

static void layer_forward(vd_model *m, const struct micro *u, int l, vd_act *output) {
  vd_ops *o = m->ops;
  weights_needed(m, u->step, l);
  const struct vd_layer_params *p = &m->layer[l];
  struct vd_layer_saved *s = &m->saved[l];
  vd_attention a = attention_of(m, u, l);
  vd_attention_input in = input_of(m, u, l);
  vd_linear join = plain(u, m->width, m->d), fc1 = fc1_of(m, u, l), fc2 = plain(u, m->config.d_inner, m->d);
  vd_attention projected = a;
  vd_qkv qkv = s->qkv;
  if (m->cached) vd_model_cache_rows(m, l, u->first, &qkv);
  if (m->cached && m->state[l].cache_valid) projected.window = 0; /* the tokens' rows alone */
  o->attention_project(o, &projected, &in, m->params + p->query_at, m->params + p->key_at, m->params + p->value_at,
                       &qkv);
  o->attention(o, &a, &qkv, s->attended, s->lse);
  if (m->cached) vd_model_cache_push(m, l, u->first, u->n_stream, &qkv);
  o->linear(o, &join, s->attended, weight(m, p->out), NULL, m->branch);
  if (o->draw_ahead) o->draw_ahead(o, &fc1);
  vd_dropout dropped = branch_dropout(m, u, l, VD_SITE_ATTENDED);
  o->add_norm(o, u->rows, m->d, s->input, m->branch, &dropped, weight(m, p->norm1_weight), weight(m, p->norm1_bias),
              s->sum1, s->mean1, s->rstd1, s->normed1);
  o->linear(o, &fc1, s->normed1, weight(m, p->fc1_weight), weight(m, p->fc1_bias), s->ff);
  o->linear(o, &fc2, s->ff, weight(m, p->fc2_weight), weight(m, p->fc2_bias), m->branch);
  dropped = branch_dropout(m, u, l, VD_SITE_FED_FORWARD);
  o->add_norm(o, u->rows, m->d, s->normed1, m->branch, &dropped, weight(m, p->norm2_weight), weight(m, p->norm2_bias),
              s->sum2, s->mean2, s->rstd2, output);
}

/* Distances 0 .. reach of which a block needs relative keys. */
static int64_t distances_of(const struct vd_layer_state *s) {
  return s->reach[0] + 1;
}

/* dhidden: in, the gradient of the layer's output; out, that of its input. */
static void layer_backward(vd_model *m, const struct micro *u, int l) {
  vd_ops *o = m->ops;
  const struct vd_layer_params *p = &m->layer[l];
  struct vd_layer_saved *s = &m->saved[l];
  vd_attention a = attention_of(m, u, l);
  vd_attention_input in = input_of(m, u, l);
  vd_linear join = plain(u, m->width, m->d), fc1 = fc1_of(m, u, l), fc2 = plain(u, m->config.d_inner, m->d);
  /* Where nothing drops the branch, its bias has the sum's gradient. */
  bool dropped = branch_dropout(m, u, l, VD_SITE_FED_FORWARD).p > 0;
  o->add_norm_backward(o, u->rows, m->d, s->sum2, s->mean2, s->rstd2, weight(m, p->norm2_weight), m->dhidden, m->dsum,
                       gradient(m, p->norm2_weight), gradient(m, p->norm2_bias),
                       dropped ? NULL : gradient(m, p->fc2_bias));
  vd_act *dbranch = drop(m, u, l, VD_SITE_FED_FORWARD, m->dsum, m->dbranch);
  o->linear_backward(o, &fc2, s->ff, weight(m, p->fc2_weight), dbranch, m->dff, false, gradient(m, p->fc2_weight),
                     dropped ? gradient(m, p->fc2_bias) : NULL, &fc1, gradient(m, p->fc1_bias));
  o->linear_backward(o, &fc1, s->normed1, weight(m, p->fc1_weight), m->dff, m->dsum, true, gradient(m, p->fc1_weight),
                     NULL, NULL, NULL);
  o->add_norm_backward(o, u->rows, m->d, s->sum1, s->mean1, s->rstd1, weight(m, p->norm1_weight), m->dsum, m->dhidden,
                       gradient(m, p->norm1_weight), gradient(m, p->norm1_bias), NULL);
  /* dsum now holds nothing needed: it takes the gradient of the heads' output. */
  dbranch = drop(m, u, l, VD_SITE_ATTENDED, m->dhidden, m->dbranch);
  o->linear_backward(o, &join, s->attended, weight(m, p->out), dbranch, m->dsum, false, gradient(m, p->out), NULL, NULL,
                     NULL);
  bool xl = vd_model_is_xl(m);
  o->attention_backward(o, &a, &s->qkv, s->attended, s->lse, m->dsum, &m->dqkv, xl ? NULL : gradient(m, m->key_pe),
                        xl ? NULL : gradient(m, p->span));
  o->attention_project_backward(o, &a, &in, m->params + p->query_at, m->params + p->key_at, m->params + p->value_at,
                                &m->dqkv, m->dhidden, m->gradients + p->query_at, m->gradients + p->key_at,
                                m->gradients + p->value_at);
  if (xl && u->last)
    o->weight_gradient(o, distances_of(&m->state[l]), m->d, m->width, m->distances, m->state[l].drel_key,
                       gradient(m, p->rel));
}

/* Once an update: the encodings of all distances, and their keys in every layer. */
static void encode_positions(vd_model *m, const vd_step *step) {
  vd_ops *o = m->ops;
  int64_t n = distances_of(&m->state[0]); /* alike in all layers */
  if (m->cached && n <= m->encoded) return;
  if (m->cached) n = m->config.mem_len + m->max_block; /* all that there can be: the next steps find them here */
  m->encoded = step->train ? 0 : n;
  vd_position_encoding e = {.n = n,
                            .d = m->d,
                            .clamp_len = m->config.clamp_len,
                            .dropout = {.p = step->train ? m->config.dropout : 0.0,
                                        .rng = {m->config.seed, (uint32_t)step->update, 0, VD_SITE_POSITION}}};
  vd_linear l = {.n = n, .in = m->d, .out = m->width};
  o->position_encodings(o, &e, m->distances);
  for (int i = 0; i < (int)m->config.n_layer; i++) {
    struct vd_layer_state *s = &m->state[i];
    weights_needed(m, step, i);
    o->linear(o, &l, m->distances, weight(m, m->layer[i].rel), NULL, s->rel_key);
    if (step->train) o->zero(o, s->drel_key, (size_t)(n * m->width) * sizeof(real));
  }
}

/* Transformer-XL scales the embedding, and drops it as everything else. */
static double embedding_scale(const vd_model *m) {
  return vd_model_is_xl(m) ? sqrt((double)m->d) : 1.0;
}
static vd_dropout embedding_dropout(const vd_model *m, const struct micro *u) {
  return dropout(m, u, vd_model_is_xl(m) ? m->config.dropout : m->config.emb_dropout, 0, VD_SITE_EMBED);
}

static void embed(vd_model *m, const struct micro *u) {
  vd_ops *o = m->ops;
  vd_dropout drop = embedding_dropout(m, u), none = {.p = 0.0};
  bool scaled = vd_model_is_xl(m);
  vd_act *out = m->saved[0].input;
  o->embed(o, u->rows, m->d, m->x, weight(m, m->in_emb), scaled ? &none : &drop, out);
  if (scaled) o->scale_dropout(o, u->rows, m->d, embedding_scale(m), &drop, out, out);
}

static void embed_backward(vd_model *m, const struct micro *u) {
  vd_ops *o = m->ops;
  vd_dropout drop = embedding_dropout(m, u), none = {.p = 0.0};
  bool scaled = vd_model_is_xl(m);
  if (scaled) o->scale_dropout(o, u->rows, m->d, embedding_scale(m), &drop, m->dhidden, m->dhidden);
  o->embed_backward(o, u->rows, m->d, m->config.vocab, m->x, scaled ? &none : &drop, m->dhidden,
                    gradient(m, m->in_emb));
}

static void schedule_attention(vd_model *m, const struct micro *u) {
  int n = (int)m->config.n_layer;
  vd_attention *a = vd_calloc((size_t)n, sizeof *a);
  for (int l = 0; l < n; l++) a[l] = attention_of(m, u, l);
  m->ops->attention_schedule(m->ops, n, a);
  free(a);
}

static void forward(vd_model *m, const struct micro *u) {
  vd_ops *o = m->ops;
  int last = (int)m->config.n_layer - 1;
  if (o->attention_schedule) schedule_attention(m, u);
  o->put_tokens(o, m->x, u->step->x + u->first * u->block, (size_t)u->rows);
  o->put_tokens(o, m->y, u->step->y + u->first * u->block, (size_t)u->rows);
  embed(m, u);
  for (int l = 0; l <= last; l++) layer_forward(m, u, l, l == last ? m->output : m->saved[l + 1].input);
  drop(m, u, last, VD_SITE_OUTPUT, m->output, m->output);
  vd_linear head = plain(u, m->d, m->logit_stride);
  weights_needed(m, u->step, last + 1);
  o->linear(o, &head, m->output, weight(m, m->out_weight), weight(m, m->out_bias), m->logits);
}

/* In the last micro batch: nothing adds to gradients from `first` on any more. */
static void gradients_final(vd_model *m, const struct micro *u, size_t first) {
  const vd_step *s = u->step;
  if (!u->last || !s->ready) return;
  s->ready(s->receiver, first, m->final_from - first);
  m->final_from = first;
}

static void backward(vd_model *m, const struct micro *u) {
  vd_ops *o = m->ops;
  gradients_final(m, u, m->final_from = m->arena);
  vd_linear head = plain(u, m->d, m->logit_stride);
  o->linear_backward(o, &head, m->output, weight(m, m->out_weight), m->logits, m->dhidden, false,
                     gradient(m, m->out_weight), gradient(m, m->out_bias), NULL, NULL);
  drop(m, u, (int)m->config.n_layer - 1, VD_SITE_OUTPUT, m->dhidden, m->dhidden);
  gradients_final(m, u, m->output_begin);
  for (int l = (int)m->config.n_layer - 1; l >= 0; l--) {
    layer_backward(m, u, l);
    gradients_final(m, u, m->layer[l].begin);
  }
  if (o->backward_end) o->backward_end(o);
  embed_backward(m, u);
  gradients_final(m, u, 0);
}

static void read_logits(vd_model *m, const struct micro *u) {
  size_t vocab = (size_t)m->config.vocab;
  for (int64_t b = 0; b < u->n_stream; b++) {
    size_t row = (size_t)((b + 1) * u->block - 1);
    const char *last = (const char *)m->logits + row * (size_t)m->logit_stride * m->ops->act_size;
    m->ops->get_act(m->ops, u->step->logits + (size_t)(u->first + b) * vocab, last, vocab);
  }
}

/* The layers' inputs become the newest rows of their memories. */
static void push_memories(vd_model *m, const struct micro *u) {
  vd_ops *o = m->ops;
  int n = (int)m->config.n_layer;
  vd_ring_push *push = vd_calloc((size_t)n, sizeof *push);
  for (int l = 0; l < n; l++) {
    const struct vd_layer_state *s = &m->state[l];
    vd_act *mine = (char *)s->memory + (size_t)(u->first * s->rows * m->d) * o->act_size;
    push[l] = (vd_ring_push){mine, m->saved[l].input, s->rows, s->oldest};
    if (vd_model_is_xl(m)) /* its products want rows that follow each other */
      o->memory_push(o, u->n_stream, m->d, mine, s->rows, 0, m->saved[l].input, u->block, mine, s->rows);
  }
  if (!vd_model_is_xl(m)) o->memory_ring_push(o, u->n_stream, m->d, m->d, u->block, n, push);
  free(push);
}

static void run_micro(vd_model *m, const struct micro *u) {
  vd_ops *o = m->ops;
  const vd_step *step = u->step;
  if (o->phase) o->phase(o, "forward");
  vd_model_attention_micro(m, step, u->first, u->n_stream);
  forward(m, u);
  if (step->logits) read_logits(m, u);
  o->cross_entropy(o, u->rows, m->config.vocab, m->logit_stride, m->logits, m->y, step->scale, m->loss,
                   step->nll ? m->nll : NULL, step->train ? m->logits : NULL);
  if (step->nll) o->get(o, step->nll + u->first * u->block, m->nll, (size_t)u->rows);
  if (step->train && o->phase) o->phase(o, "backward");
  if (step->train) backward(m, u);
  if (o->phase) o->phase(o, "memories");
  push_memories(m, u);
}

int vd_model_run(vd_model *m, vd_step *step, vd_error *err) {
  if (step->block < 1 || step->block > m->max_block) vd_bug("block of %lld tokens", (long long)step->block);
  if (step->train && !m->training) vd_bug("a model made for evaluation cannot train");
  if (vd_model_reserve(m, step->block, err) || vd_model_cache_begin(m, step, err)) return err->status;
  m->ops->zero(m->ops, m->loss, sizeof *m->loss);
  if (vd_model_is_xl(m)) encode_positions(m, step);
  for (int64_t first = 0; first < m->n_stream; first += m->micro) {
    int64_t n = m->n_stream - first < m->micro ? m->n_stream - first : m->micro;
    struct micro u = {first, n, step->block, n * step->block, first + n == m->n_stream, step};
    run_micro(m, &u);
  }
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_state *s = &m->state[l];
    if (vd_model_is_xl(m))
      s->window = s->window + step->block < s->rows ? s->window + step->block : s->rows;
    else
      s->oldest = (s->oldest + step->block) % s->rows;
  }
  vd_model_cache_end(m);
  step->n_target = 0;
  for (int64_t i = 0; i < m->n_stream * step->block; i++) step->n_target += step->y[i] >= 0;
  if (!step->nll_sum && !step->nll && !step->logits) return m->ops->check(m->ops, err);
  if (step->nll_sum) m->ops->get_double(m->ops, step->nll_sum, m->loss, 1);
  return m->ops->synchronize(m->ops, err);
}
