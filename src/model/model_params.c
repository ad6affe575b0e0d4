/* The tensors of the models: names, shapes, places, initial values. */
#include "src/model/model_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum {
  VD_ALIGN = 32,   /* reals; tensors start on cache lines */
  LOGITS_ALIGN = 8 /* columns of logits */
};

static size_t padded(size_t n) {
  return (n + VD_ALIGN - 1) / VD_ALIGN * VD_ALIGN;
}

static int add(vd_model *m, int layer, const char *name, int rank, int64_t a, int64_t b, int64_t c) {
  vd_param *p = &m->param[m->n_param];
  if (layer < 0)
    snprintf(p->name, sizeof p->name, "%s", name);
  else
    snprintf(p->name, sizeof p->name, "layers.%d.%s", layer, name);
  p->rank = rank;
  p->shape[0] = a;
  p->shape[1] = b;
  p->shape[2] = c;
  p->layer = layer;
  p->is_common = rank == 1;
  p->at.size = (size_t)a;
  for (int i = 1; i < rank; i++) p->at.size *= (size_t)p->shape[i];
  p->at.tensor = m->n_param;
  return m->n_param++;
}

/* A tensor of more than one dimension that ops read as `real`. */
static int add_common(vd_model *m, int layer, const char *name, int rank, int64_t a, int64_t b, int64_t c) {
  int i = add(m, layer, name, rank, a, b, c);
  m->param[i].is_common = true;
  return i;
}

static void add_layer(vd_model *m, int l) {
  struct vd_layer_params *p = &m->layer[l];
  int64_t d = m->d, inner = m->config.d_inner;
  p->span = add(m, l, "attn.attn.adaptive_span._mask.current_val", m->config.span_per_layer ? 1 : 3, m->n_span, 1, 1);
  m->param[p->span].is_span = m->param[p->span].is_common = true;
  p->query = add(m, l, "attn.proj_query.weight", 2, d, d, 1);
  p->key = add(m, l, "attn.proj_key.weight", 2, d, d, 1);
  p->value = add(m, l, "attn.proj_val.weight", 2, d, d, 1);
  p->out = add(m, l, "attn.proj_out.weight", 2, d, d, 1);
  p->norm1_weight = add(m, l, "norm1.weight", 1, d, 1, 1);
  p->norm1_bias = add(m, l, "norm1.bias", 1, d, 1, 1);
  p->fc1_weight = add(m, l, "ff.fc1.weight", 2, inner, d, 1);
  p->fc1_bias = add(m, l, "ff.fc1.bias", 1, inner, 1, 1);
  p->fc2_weight = add(m, l, "ff.fc2.weight", 2, d, inner, 1);
  p->fc2_bias = add(m, l, "ff.fc2.bias", 1, d, 1, 1);
  p->norm2_weight = add(m, l, "norm2.weight", 1, d, 1, 1);
  p->norm2_bias = add(m, l, "norm2.bias", 1, d, 1, 1);
}

/* Transformer-XL's layer, under the names of the published code. */
static void add_layer_xl(vd_model *m, int l) {
  struct vd_layer_params *p = &m->layer[l];
  int64_t d = m->d, inner = m->config.d_inner, heads = m->config.n_head, width = m->width;
  bool own = m->config.untie_r || l == 0;
  int owner = m->config.untie_r ? l : -1;
  p->content_bias = own ? add_common(m, owner, "r_w", 2, heads, m->config.d_head, 1) : m->layer[0].content_bias;
  p->position_bias = own ? add_common(m, owner, "r_r", 2, heads, m->config.d_head, 1) : m->layer[0].position_bias;
  p->qkv = add(m, l, "dec_attn.qkv_net.weight", 2, 3 * width, d, 1);
  p->rel = add(m, l, "dec_attn.r_net.weight", 2, width, d, 1);
  p->out = add(m, l, "dec_attn.o_net.weight", 2, d, width, 1);
  p->norm1_weight = add(m, l, "dec_attn.layer_norm.weight", 1, d, 1, 1);
  p->norm1_bias = add(m, l, "dec_attn.layer_norm.bias", 1, d, 1, 1);
  p->fc1_weight = add(m, l, "pos_ff.CoreNet.0.weight", 2, inner, d, 1);
  p->fc1_bias = add(m, l, "pos_ff.CoreNet.0.bias", 1, inner, 1, 1);
  p->fc2_weight = add(m, l, "pos_ff.CoreNet.3.weight", 2, d, inner, 1);
  p->fc2_bias = add(m, l, "pos_ff.CoreNet.3.bias", 1, d, 1, 1);
  p->norm2_weight = add(m, l, "pos_ff.layer_norm.weight", 1, d, 1, 1);
  p->norm2_bias = add(m, l, "pos_ff.layer_norm.bias", 1, d, 1, 1);
}

static void layout_xl(vd_model *m) {
  const vd_model_config *c = &m->config;
  m->in_emb = m->out_weight = add_common(m, -1, "word_emb.emb_layers.0.weight", 2, c->vocab, m->d, 1);
  for (int l = 0; l < (int)c->n_layer; l++) add_layer_xl(m, l);
  m->out_bias = add(m, -1, "crit.out_layers.0.bias", 1, c->vocab, 1, 1);
}

/* Reals that tensor i takes in an arena. The output layer also has rows for the logits beyond the vocabulary, which
 * stay zero: no tensor holds them, so no optimizer steps them. For its bias the padding of every tensor is enough. */
static size_t reals_taken(const vd_model *m, int i) {
  _Static_assert(VD_ALIGN % LOGITS_ALIGN == 0, "a padded bias has all columns of the logits");
  return padded(i == m->out_weight ? (size_t)(m->logit_stride * m->d) : m->param[i].at.size);
}

/* Gives tensors of one kind their places, in their order. */
static void place(vd_model *m, bool spans, bool common) {
  for (int i = 0; i < m->n_param; i++) {
    vd_param *p = &m->param[i];
    if (p->is_span != spans || p->is_common != common) continue;
    p->at.offset = m->arena;
    m->arena += reals_taken(m, i);
  }
}

/* The arenas begin with the tensors that ops read as `real`, the spans of all layers first, so that they are read and
 * clamped as one. The rest, which products read in the activations' type, follows in the order of the forward pass. */
static void place_all(vd_model *m) {
  m->arena = 0;
  place(m, true, true);
  m->span_extent = m->arena;
  place(m, false, true);
  m->common = m->arena;
  place(m, false, false);
  bool xl = vd_model_is_xl(m);
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_params *p = &m->layer[l];
    size_t part = (size_t)(m->width * m->d);
    p->begin = p->query_at = m->param[xl ? p->qkv : p->query].at.offset;
    p->key_at = xl ? p->query_at + part : m->param[p->key].at.offset;
    p->value_at = xl ? p->key_at + part : m->param[p->value].at.offset;
  }
  m->output_begin = m->param[xl ? m->out_bias : m->out_weight].at.offset;
}

void vd_model_layout(vd_model *m) {
  const vd_model_config *c = &m->config;
  m->width = c->n_head * c->d_head;
  m->logit_stride = (c->vocab + LOGITS_ALIGN - 1) / LOGITS_ALIGN * LOGITS_ALIGN;
  m->param = vd_calloc((size_t)(4 + 14 * c->n_layer), sizeof *m->param);
  m->layer = vd_calloc((size_t)c->n_layer, sizeof *m->layer);
  m->n_param = 0;
  if (vd_model_is_xl(m)) {
    layout_xl(m);
  } else {
    m->in_emb = add_common(m, -1, "in_emb.weight", 2, c->vocab, m->d, 1);
    m->key_pe = add_common(m, -1, "key_pe", 3, 1, c->d_head, c->attn_span);
    for (int l = 0; l < (int)c->n_layer; l++) add_layer(m, l);
    m->out_weight = add(m, -1, "out_emb.weight", 2, c->vocab, m->d, 1);
    m->out_bias = add(m, -1, "out_emb.bias", 1, c->vocab, 1, 1);
  }
  m->param[m->out_bias].is_common = false; /* the output product reads it as it reads its weight */
  place_all(m);
}

static vd_rng init_rng(const vd_model *m, int param) {
  return (vd_rng){.seed = m->config.seed, .update = 0, .layer = (uint16_t)param, .site = VD_SITE_INIT};
}

static void draw_uniform(const vd_model *m, int param, double bound, real *host) {
  const size_t n = m->param[param].at.size;
  real *to = host + m->param[param].at.offset;
  vd_rng rng = init_rng(m, param);
#pragma omp parallel for schedule(static)
  for (size_t i = 0; i < n; i += 4) {
    philox4x32_ctr_t words = vd_philox(rng, i / 4);
    for (size_t k = 0; k < 4 && i + k < n; k++) to[i + k] = (real)(bound * (2.0 * vd_uniform(words.v[k]) - 1.0));
  }
}

/* Box and Muller (1958): two uniforms give two normals, elements 2k and 2k+1. */
static void draw_normal(const vd_model *m, int param, double deviation, real *host) {
  const size_t n = m->param[param].at.size;
  real *to = host + m->param[param].at.offset;
  vd_rng rng = init_rng(m, param);
#pragma omp parallel for schedule(static)
  for (size_t i = 0; i < n; i += 2) {
    philox4x32_ctr_t words = vd_philox(rng, i / 2);
    double radius = sqrt(-2.0 * log(vd_uniform(words.v[0]))), angle = 2.0 * acos(-1.0) * vd_uniform(words.v[1]);
    to[i] = (real)(deviation * radius * cos(angle));
    if (i + 1 < n) to[i + 1] = (real)(deviation * radius * sin(angle));
  }
}

static void fill(const vd_model *m, int param, double value, real *host) {
  const vd_param *p = &m->param[param];
  for (size_t i = 0; i < p->at.size; i++) host[p->at.offset + i] = (real)value;
}

static void draw_layer(const vd_model *m, const struct vd_layer_params *p, real *host) {
  bool fairseq = m->config.init == VD_INIT_FAIRSEQ;
  double d = (double)m->d, inner = (double)m->config.d_inner;
  int attention[4] = {p->query, p->key, p->value, p->out};
  for (int i = 0; i < 4; i++) {
    if (fairseq)
      draw_normal(m, attention[i], sqrt(2.0 / (d + d)), host);
    else
      draw_uniform(m, attention[i], 1.0 / sqrt(d), host);
  }
  draw_uniform(m, p->fc1_weight, fairseq ? sqrt(6.0 / (d + inner)) : 1.0 / sqrt(d), host);
  draw_uniform(m, p->fc2_weight, fairseq ? sqrt(6.0 / (d + inner)) : 1.0 / sqrt(inner), host);
  draw_uniform(m, p->fc1_bias, 1.0 / sqrt(d), host);
  draw_uniform(m, p->fc2_bias, 1.0 / sqrt(inner), host);
  fill(m, p->span, m->config.span_init, host);
  fill(m, p->norm1_weight, 1.0, host);
  fill(m, p->norm2_weight, 1.0, host);
}

/* As the published code: N(0, 0.02) for all matrices and query biases, N(1, 0.02) for the weights of layer norms, zero
 * for the other biases. */
static void draw_xl(const vd_model *m, real *host) {
  const double deviation = 0.02;
  for (int i = 0; i < m->n_param; i++)
    if (m->param[i].rank == 2) draw_normal(m, i, deviation, host);
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    int norms[2] = {m->layer[l].norm1_weight, m->layer[l].norm2_weight};
    for (int i = 0; i < 2; i++) {
      draw_normal(m, norms[i], deviation, host);
      vd_extent at = m->param[norms[i]].at;
      for (size_t e = at.offset; e < at.offset + at.size; e++) host[e] += 1;
    }
  }
}

void vd_model_draw(const vd_model *m, real *host) {
  double d = (double)m->d;
  if (vd_model_is_xl(m)) {
    draw_xl(m, host);
    return;
  }
  draw_normal(m, m->in_emb, m->config.init == VD_INIT_FAIRSEQ ? 1.0 / sqrt(d) : 1.0, host);
  draw_normal(m, m->key_pe, 1.0, host);
  for (int l = 0; l < (int)m->config.n_layer; l++) draw_layer(m, &m->layer[l], host);
  draw_uniform(m, m->out_weight, 1.0 / sqrt(d), host);
  draw_uniform(m, m->out_bias, 1.0 / sqrt(d), host);
}
