/* Projected memory for one-token steps. A step of a block projects the keys and values of all memory rows that heads
 * reach; for a block of one token that costs as much as the whole span, although all rows but one were projected with
 * the same weights a step before. Each layer therefore keeps keys and values of its memory: the first one-token step
 * projects the whole memory into the cache, the next ones append the row of their token.
 *
 * Attention wants the rows of a stream in order, so the cache is no ring: rows are appended until the space is used up,
 * then the newest `window` move to its start. With a quarter of the window as spare space this copies four rows a
 * step. */
#include "src/model/model_internal.h"

static char *row_of(const vd_model *m, const struct vd_layer_state *s, int64_t stream, int64_t row) {
  return (char *)s->cache + (size_t)((stream * s->cache_rows + row) * 2 * m->width) * m->ops->act_size;
}

static int reserve(vd_model *m, struct vd_layer_state *s, vd_error *err) {
  int64_t most = vd_model_is_xl(m) ? m->config.mem_len : s->window, spare = most / 4 > 64 ? most / 4 : 64;
  if (s->cache && s->cache_rows >= most + spare) return VD_OK;
  m->ops->free(m->ops, s->cache);
  s->cache = NULL;
  s->cache_valid = false;
  s->cache_rows = most + spare;
  return vd_model_alloc(m, &s->cache, (size_t)(m->n_stream * s->cache_rows * 2 * m->width), m->ops->act_size, err);
}

/* Moves the newest `window` rows to the start. The shared buffer of projected memory is free between two layers. */
static void move_to_start(vd_model *m, struct vd_layer_state *s) {
  vd_ops *o = m->ops;
  vd_act *between = m->saved[0].qkv.memory;
  for (int64_t b = 0; b < m->n_stream && s->window > 0; b++) {
    vd_act *rows = row_of(m, s, b, 0);
    o->memory_push(o, 1, 2 * m->width, rows, s->cache_end, 0, NULL, 0, between, s->window);
    o->memory_push(o, 1, 2 * m->width, between, s->window, 0, NULL, 0, rows, s->window);
  }
  s->cache_end = s->window;
}

int vd_model_cache_begin(vd_model *m, const vd_step *step, vd_error *err) {
  m->cached = !m->training && step->block == 1;
  if (!m->cached) vd_model_cache_drop(m);
  for (int l = 0; m->cached && l < (int)m->config.n_layer; l++) {
    struct vd_layer_state *s = &m->state[l];
    if (reserve(m, s, err)) return err->status;
    if (!s->cache_valid)
      s->cache_end = s->window;
    else if (s->cache_end == s->cache_rows)
      move_to_start(m, s);
  }
  return VD_OK;
}

void vd_model_cache_rows(const vd_model *m, int layer, int64_t first, vd_qkv *qkv) {
  const struct vd_layer_state *s = &m->state[layer];
  qkv->memory = row_of(m, s, first, s->cache_end - s->window);
  qkv->memory_rows = s->cache_rows;
}

void vd_model_cache_push(vd_model *m, int layer, int64_t first, int64_t n, const vd_qkv *qkv) {
  struct vd_layer_state *s = &m->state[layer];
  const char *keys = (const char *)qkv->block + (size_t)m->width * m->ops->act_size;
  const vd_ring_push push = {row_of(m, s, first, 0), keys, s->cache_rows, s->cache_end};
  m->ops->memory_ring_push(m->ops, n, 2 * m->width, 3 * m->width, 1, 1, &push);
}

void vd_model_cache_end(vd_model *m) {
  for (int l = 0; m->cached && l < (int)m->config.n_layer; l++) {
    m->state[l].cache_valid = true;
    m->state[l].cache_end++;
  }
}

void vd_model_cache_drop(vd_model *m) {
  for (int l = 0; l < (int)m->config.n_layer; l++) m->state[l].cache_valid = false;
}
