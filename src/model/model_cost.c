/* What a model costs: floating-point operations and bytes. */
#include "src/model/model_internal.h"

#include <math.h>
#include <stdlib.h>

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

int64_t vd_model_parameters(const vd_model_config *config) {
  vd_model shape = {.config = *config, .d = config->d_model, .n_span = config->span_per_layer ? 1 : config->n_head};
  int64_t n = 0;
  vd_model_layout(&shape);
  for (int i = 0; i < shape.n_param; i++) n += (int64_t)shape.param[i].at.size;
  free(shape.param);
  free(shape.layer);
  return n;
}

void vd_model_estimate(const vd_model_config *config, size_t act_size, int64_t n_stream, int64_t micro_streams,
                       int64_t block, int64_t window, vd_memory_estimate *e) {
  vd_model shape = {.config = *config, .d = config->d_model, .n_span = config->span_per_layer ? 1 : config->n_head};
  vd_model_layout(&shape);
  double arena = (double)(shape.arena * sizeof(real)), act = (double)act_size, layers = (double)config->n_layer;
  free(shape.param);
  free(shape.layer);
  double micro = (double)vd_model_streams_at_once(n_stream, micro_streams);
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
  e->logits = n * (double)shape.logit_stride * act;
  e->workspace = ((xl ? 5.0 : 4.0) * n * d + n * (double)config->d_inner + qkv) * act + e->logits +
                 n * (2.0 * sizeof(int32_t) + sizeof(real));
}
