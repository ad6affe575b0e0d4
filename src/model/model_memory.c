/* Memories of the layers: ring buffers of earlier hidden states. Their room follows the windows. */
#include "src/model/model_internal.h"

int64_t vd_model_memory_rows(const vd_model *m, int layer) {
  return vd_model_is_xl(m) ? m->state[layer].window : m->state[layer].rows;
}

static int resize_memory(vd_model *m, struct vd_layer_state *s, int64_t rows, vd_error *err) {
  if (s->rows == rows && s->memory) return VD_OK;
  vd_act *memory = NULL;
  if (vd_model_alloc(m, &memory, (size_t)(m->n_stream * rows * m->d), m->ops->act_size, err)) return err->status;
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

/* Hysteresis. With a margin, windows alternate between one planned with it and one planned without it, each time that
 * the host has read the spans. The memory keeps its rows then: a memory that shrank and grew again would be allocated
 * twice and would have lost its oldest rows. */
static int64_t rows_kept(const vd_model *m, const struct vd_layer_state *s) {
  int64_t wanted = rows_wanted(m, s);
  bool keep = m->span_margin > 0 && s->memory && s->rows > wanted && s->rows <= wanted + 2 * VD_WINDOW_STEP;
  return keep && s->rows <= m->config.attn_span ? s->rows : wanted;
}

/* Enlarges keys and values of memory to `wanted` rows per stream; their contents are dropped. */
static int grow_memory(vd_model *m, vd_qkv *x, int64_t *rows, int64_t wanted, vd_error *err) {
  if (x->memory && wanted <= *rows) return VD_OK;
  m->ops->free(m->ops, x->memory);
  x->memory = NULL;
  *rows = 0;
  if (vd_model_alloc(m, &x->memory, (size_t)(m->micro * wanted * 2 * m->width), m->ops->act_size, err))
    return err->status;
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
  vd_model_cache_drop(m);
  for (int l = 0; l < (int)m->config.n_layer; l++) {
    struct vd_layer_state *s = &m->state[l];
    int64_t rows = rows_kept(m, s);
    s->oldest = 0;
    if (vd_model_is_xl(m)) s->window = m->config.initial_memory == VD_MEMORY_ZEROS ? rows : 0;
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
  vd_model_cache_drop(m);
  if (vd_model_is_xl(m)) {
    put_rows_xl(m, layer, rows, first, n, in);
    return VD_OK;
  }
  if (resize_memory(m, s, rows, err)) return err->status;
  copy_memory(m, layer, first, n, NULL, in);
  return VD_OK;
}
