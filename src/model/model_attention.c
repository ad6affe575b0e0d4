/* The attention weights that evaluation records (vd_attention_record): for each layer and stream the sums over the
 * predicted tokens by head and distance, and the weights of chosen queries. The sums of a stream depend on that stream
 * alone, so that sums added in the streams' global order have the same bits on any number of ranks. */
#include "src/model/model_internal.h"

#include <stdlib.h>

/* Elements of one stream's sums, and of the weights of one query. */
static int64_t elements(const vd_model *m) {
  return m->config.n_head * m->record->n_distance;
}

int64_t vd_model_attention_distances(const vd_model *m) {
  const vd_model_config *c = &m->config;
  if (vd_model_is_xl(m)) return c->same_length ? c->mem_len : c->mem_len + m->max_block;
  int64_t most = 0;
  for (int l = 0; l < (int)c->n_layer; l++)
    for (int64_t h = 0; h < c->n_head; h++) most = m->state[l].reach[h] > most ? m->state[l].reach[h] : most;
  return most + 1;
}

int vd_model_attention_begin(vd_model *m, int64_t n_chosen, vd_error *err) {
  if (m->training) vd_bug("a model made for training records no attention");
  vd_model_attention_end(m);
  size_t n_layer = (size_t)m->config.n_layer;
  struct vd_model_record *r = m->record = vd_calloc(1, sizeof *r);
  r->n_distance = vd_model_attention_distances(m);
  r->n_chosen = n_chosen;
  r->chosen = vd_calloc((size_t)n_chosen + 1, sizeof *r->chosen);
  r->layer = vd_calloc(n_layer, sizeof *r->layer);
  r->sum = vd_calloc(n_layer, sizeof *r->sum);
  r->weight = vd_calloc(n_layer, sizeof *r->weight);
  for (size_t l = 0; l < n_layer; l++)
    if (vd_model_alloc(m, &r->sum[l], (size_t)(m->n_stream * elements(m)), sizeof(double), err) ||
        vd_model_alloc(m, &r->weight[l], (size_t)(n_chosen * elements(m)), sizeof(real), err))
      return err->status;
  return VD_OK;
}

void vd_model_attention_end(vd_model *m) {
  struct vd_model_record *r = m->record;
  if (!r) return;
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    m->ops->free(m->ops, r->sum[l]);
    m->ops->free(m->ops, r->weight[l]);
  }
  free(r->chosen);
  free(r->layer);
  free(r->sum);
  free(r->weight);
  free(r);
  m->record = NULL;
}

void vd_model_attention_micro(vd_model *m, const vd_step *step, int64_t first, int64_t n_stream) {
  struct vd_model_record *r = m->record;
  if (!r) return;
  int64_t n = 0, begin = first * step->block, end = begin + n_stream * step->block;
  for (int64_t k = 0; k < step->n_chosen; k++)
    if (step->chosen[k] >= begin && step->chosen[k] < end) r->chosen[n++] = step->chosen[k] - begin;
  if (r->done + n > r->n_chosen) vd_bug("more than %lld queries are chosen", (long long)r->n_chosen);
  for (int l = 0; l < (int)m->config.n_layer; l++)
    r->layer[l] = (vd_attention_record){.n_distance = r->n_distance,
                                        .sum = r->sum[l] + first * elements(m),
                                        .target = m->y,
                                        .n_chosen = n,
                                        .chosen = r->chosen,
                                        .weight = r->weight[l] + r->done * elements(m)};
  r->done += n;
}

void vd_model_attention_sum(vd_model *m, int layer, int64_t stream, double *out) {
  m->ops->get_double(m->ops, out, m->record->sum[layer] + stream * elements(m), (size_t)elements(m));
}

void vd_model_attention_weight(vd_model *m, int layer, int64_t k, real *out) {
  m->ops->get(m->ops, out, m->record->weight[layer] + k * elements(m), (size_t)elements(m));
}
