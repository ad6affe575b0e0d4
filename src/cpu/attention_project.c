#include "src/cpu/attention.h"
#include "src/cpu/attention_tile.h"
#include "src/cpu/blas.h"
#include "src/cpu/product.h"

#include <stdlib.h>
#include <string.h>

/* Memory rows are named by their age: row window - age has age 1..window. The block's rows and the ages that all heads
 * reach are products of full width, straight into place. Older rows are cut at the heads' reaches into spans of
 * ages that the same heads need; those rows of all streams are gathered into one product with those heads' weights. */
typedef struct projection {
  const vd_attention *a;
  const vd_attention_input *in;
  int64_t d, in_width; /* width of the heads together, and of the hidden states */
  int64_t common;      /* the age that all heads reach */
  int64_t kv_rows;     /* rows from one stream's keys and values to the next's */
  int64_t *reach;      /* [n_head] within the window */
  int64_t *order;      /* [n_head] heads by falling reach */
} projection;

/* Ages after + 1 .. last, needed by the first `heads` of order. */
typedef struct span_of_ages {
  int64_t after, last, heads;
} span_of_ages;

static void projection_new(projection *p, const vd_attention *a, const vd_attention_input *in, const vd_qkv *x) {
  *p = (projection){.a = a, .in = in, .d = a->n_head * a->d_head};
  p->kv_rows = x->memory_rows > 0 ? x->memory_rows : a->window;
  p->in_width = a->d_model > 0 ? a->d_model : p->d;
  p->reach = vd_calloc((size_t)a->n_head, sizeof *p->reach);
  p->order = vd_calloc((size_t)a->n_head, sizeof *p->order);
  for (int64_t h = 0; h < a->n_head; h++) {
    int64_t at = h;
    p->reach[h] = a->reach[h] < a->window ? a->reach[h] : a->window;
    for (; at > 0 && p->reach[p->order[at - 1]] < p->reach[h]; at--) p->order[at] = p->order[at - 1];
    p->order[at] = h;
  }
  p->common = p->reach[p->order[a->n_head - 1]];
}

static void projection_free(projection *p) {
  free(p->reach);
  free(p->order);
}

/* The span after *s; false where there is none. Short spans are merged, because a product of few rows is slow. */
static bool next_span(const projection *p, span_of_ages *s) {
  const int64_t enough = 64; /* rows of all streams */
  int64_t heads = p->a->n_head;
  while (heads > 0 && p->reach[p->order[heads - 1]] <= s->last) heads--;
  if (heads == 0) return false;
  s->after = s->last;
  s->heads = heads;
  do {
    s->last = p->reach[p->order[heads - 1]];
    heads--;
  } while (heads > 0 && (s->last - s->after) * p->a->n_stream < enough);
  return true;
}

static const real *memory_row(const projection *p, int64_t stream, int64_t age) {
  int64_t rows = p->in->memory_rows, row = (p->in->oldest + rows - age) % rows;
  return (const real *)p->in->memory + (stream * rows + row) * p->in_width;
}
/* How many rows from that age on, of `rows` towards the newest, lie one after the other. */
static int64_t straight_rows(const projection *p, int64_t age, int64_t rows) {
  int64_t all = p->in->memory_rows, straight = all - (p->in->oldest + all - age) % all;
  return straight < rows ? straight : rows;
}

/* Where keys or values lie in their rows of memory, 2 d elements each. */
static int64_t key_row(const projection *p, int64_t stream, int64_t age) {
  return (stream * p->kv_rows + p->a->window - age) * 2 * p->d;
}

/* x [streams * ages, in_width]: the span's memory rows, oldest first, stream after stream. */
static void gather_memory(const projection *p, const span_of_ages *s, real *x) {
  int64_t ages = s->last - s->after;
  for (int64_t i = 0, n; i < p->a->n_stream * ages; i += n) {
    int64_t age = s->last - i % ages;
    n = straight_rows(p, age, age - s->after);
    memcpy(x + i * p->in_width, memory_row(p, i / ages, age), (size_t)(n * p->in_width) * sizeof *x);
  }
}

/* Copies between columns of keys (or values) and rows of the span, compact [streams * ages, heads * d_head]; what a
 * head does not reach is left alone in `keys` and is zero in `compact`. */
static void scatter_keys(const projection *p, const span_of_ages *s, const real *compact, real *keys) {
  int64_t ages = s->last - s->after, width = p->a->d_head;
  for (int64_t b = 0; b < p->a->n_stream; b++)
    for (int64_t age = s->last; age > s->after; age--) {
      const real *from = compact + (b * ages + s->last - age) * s->heads * width;
      for (int64_t i = 0; i < s->heads && p->reach[p->order[i]] >= age; i++)
        memcpy(keys + key_row(p, b, age) + p->order[i] * width, from + i * width, (size_t)width * sizeof *from);
    }
}

static void gather_keys(const projection *p, const span_of_ages *s, const real *keys, real *compact) {
  int64_t ages = s->last - s->after, width = p->a->d_head;
  memset(compact, 0, (size_t)(p->a->n_stream * ages * s->heads * width) * sizeof *compact);
  for (int64_t b = 0; b < p->a->n_stream; b++)
    for (int64_t age = s->last; age > s->after; age--) {
      real *to = compact + (b * ages + s->last - age) * s->heads * width;
      for (int64_t i = 0; i < s->heads && p->reach[p->order[i]] >= age; i++)
        memcpy(to + i * width, keys + key_row(p, b, age) + p->order[i] * width, (size_t)width * sizeof *to);
    }
}

/* The older rows of k or v, for the heads that reach them. */
static void project_far(const projection *p, const real *weight, real *keys) {
  int64_t d = p->in_width, width = p->a->d_head;
  for (span_of_ages s = {.last = p->common}; next_span(p, &s);) {
    int64_t rows = (s.last - s.after) * p->a->n_stream, columns = s.heads * width;
    real *x = vd_aligned(rows * d + columns * d + rows * columns), *w = x + rows * d, *y = w + columns * d;
    gather_memory(p, &s, x);
    for (int64_t i = 0; i < s.heads; i++) {
      memcpy(w + i * width * d, weight + p->order[i] * width * d, (size_t)(width * d) * sizeof *w);
    }
    vd_gemm(CblasNoTrans, CblasTrans, rows, columns, d, 1, x, d, w, d, 0, y, columns);
    scatter_keys(p, &s, y, keys);
    free(x);
  }
}

/* The rows of a stream that all heads reach, oldest first: in place, or where the ring wraps there copied to
 * x [common, in_width]. Two products would sum in an order that depends on where the ring begins. A resumed run's ring
 * begins elsewhere, and the run must continue with the same bits. */
static const real *common_rows(const projection *p, int64_t stream, real *x) {
  const real *oldest = memory_row(p, stream, p->common);
  int64_t n = straight_rows(p, p->common, p->common), rest = p->common - n;
  if (rest == 0) return oldest;
  memcpy(x, oldest, (size_t)(n * p->in_width) * sizeof *x);
  memcpy(x + n * p->in_width, memory_row(p, stream, rest), (size_t)(rest * p->in_width) * sizeof *x);
  return x;
}

static int64_t blocks_of(int64_t rows) {
  return (rows + VD_PRODUCT_BLOCK - 1) / VD_PRODUCT_BLOCK;
}

/* Keys and values of the rows that all heads reach. Block i of all streams' blocks of rows, oldest first; a block in
 * which the ring wraps takes two products. */
static void project_common(const projection *p, const vd_panels *weight, int64_t i, real *memory) {
  int64_t blocks = blocks_of(p->common), stream = i / blocks, age = p->common - i % blocks * VD_PRODUCT_BLOCK;
  int64_t end = age > VD_PRODUCT_BLOCK ? age - VD_PRODUCT_BLOCK : 0, n;
  for (; age > end; age -= n) {
    n = straight_rows(p, age, age - end);
    for (int64_t part = 0; part < 2; part++)
      vd_product_rows(&weight[part], n, memory_row(p, stream, age), p->in_width,
                      memory + key_row(p, stream, age) + part * p->d, 2 * p->d, false);
  }
}

/* Queries, keys and values of a block of rows of the hidden states from row r on. */
static void project_block(const projection *p, const vd_panels *weight, int64_t r, real *block) {
  int64_t left = p->a->n_stream * p->a->block - r, n = left < VD_PRODUCT_BLOCK ? left : VD_PRODUCT_BLOCK;
  for (int64_t part = 0; part < 3; part++)
    vd_product_rows(&weight[part], n, (const real *)p->in->hidden + r * p->in_width, p->in_width,
                    block + (r * 3 + part) * p->d, 3 * p->d, false);
}

/* All that the panels give, where there are so few rows that packing weights would take longer than the products. */
static void project_few(const projection *p, const real *const *weight, const vd_qkv *x) {
  int64_t d = p->d, in = p->in_width, n = p->common, rows = p->a->n_stream * p->a->block;
  real *copy = n > 0 ? vd_aligned(n * in) : NULL;
  for (int64_t i = 0; i < 3; i++) {
    vd_gemm(CblasNoTrans, CblasTrans, rows, d, in, 1, p->in->hidden, in, weight[i], in, 0, (real *)x->block + i * d,
            3 * d);
    for (int64_t b = 0; b < p->a->n_stream && n > 0 && i > 0; b++)
      vd_gemm(CblasNoTrans, CblasTrans, n, d, in, 1, common_rows(p, b, copy), in, weight[i], in, 0,
              (real *)x->memory + key_row(p, b, n) + (i - 1) * d, 2 * d);
  }
  free(copy);
}

void vd_cpu_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                              const real *wk, const real *wv, const vd_qkv *x) {
  (void)o;
  projection p;
  projection_new(&p, a, in, x);
  int64_t rows = a->n_stream * a->block, width = p.in_width, far = a->n_stream * blocks_of(p.common);
  const real *const weight[] = {wq, wk, wv};
  if (rows + a->n_stream * p.common < VD_PRODUCT_FEW) {
    project_few(&p, weight, x);
  } else {
    vd_panels w[3];
    for (int i = 0; i < 3; i++) vd_panels_new(&w[i], width, p.d, weight[i], width, true);
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < rows; r += VD_PRODUCT_BLOCK) project_block(&p, w, r, x->block);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < far; i++) project_common(&p, w + 1, i, x->memory);
    }
    for (int i = 0; i < 3; i++) vd_panels_free(&w[i]);
  }
  for (int64_t i = 1; i < 3; i++) project_far(&p, weight[i], (real *)x->memory + (i - 1) * p.d);
  projection_free(&p);
}

static void far_backward(const projection *p, const real *dkeys, real *dweight) {
  int64_t d = p->in_width, width = p->a->d_head;
  for (span_of_ages s = {.last = p->common}; next_span(p, &s);) {
    int64_t rows = (s.last - s.after) * p->a->n_stream, columns = s.heads * width;
    real *x = vd_aligned(rows * d + columns * d + rows * columns), *dw = x + rows * d, *dy = dw + columns * d;
    gather_memory(p, &s, x);
    gather_keys(p, &s, dkeys, dy);
    vd_gemm(CblasTrans, CblasNoTrans, columns, d, rows, 1, dy, columns, x, d, 0, dw, d);
    for (int64_t i = 0; i < s.heads; i++) {
      real *to = dweight + p->order[i] * width * d;
      for (int64_t e = 0; e < width * d; e++) to[e] += dw[i * width * d + e];
    }
    free(x);
  }
}

static void memory_backward(const projection *p, const real *dkeys, real *dweight) {
  int64_t d = p->d, in = p->in_width, n = p->common;
  real *x = n > 0 ? vd_aligned(n * in) : NULL;
  for (int64_t b = 0; b < p->a->n_stream && n > 0; b++)
    vd_gemm(CblasTrans, CblasNoTrans, d, in, n, 1, dkeys + key_row(p, b, n), 2 * d, common_rows(p, b, x), in, 1,
            dweight, in);
  free(x);
  far_backward(p, dkeys, dweight);
}

/* dhidden += the gradients of queries, keys and values times their weights. */
static void hidden_gradient(const projection *p, const real *const *weight, const real *dy, real *dhidden) {
  int64_t rows = p->a->n_stream * p->a->block, d = p->d, width = p->in_width;
  if (rows < VD_PRODUCT_FEW) {
    for (int64_t i = 0; i < 3; i++)
      vd_gemm(CblasNoTrans, CblasNoTrans, rows, width, d, 1, dy + i * d, 3 * d, weight[i], width, 1, dhidden, width);
    return;
  }
  vd_panels w[3];
  for (int i = 0; i < 3; i++) vd_panels_new(&w[i], d, width, weight[i], width, false);
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r += VD_PRODUCT_BLOCK)
    for (int64_t i = 0, n = rows - r < VD_PRODUCT_BLOCK ? rows - r : VD_PRODUCT_BLOCK; i < 3; i++)
      vd_product_rows(&w[i], n, dy + (r * 3 + i) * d, 3 * d, dhidden + r * width, width, true);
  for (int i = 0; i < 3; i++) vd_panels_free(&w[i]);
}

void vd_cpu_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                       const real *wk, const real *wv, const vd_qkv *dx, vd_act *dhidden, real *dwq,
                                       real *dwk, real *dwv) {
  (void)o;
  projection p;
  projection_new(&p, a, in, dx);
  int64_t n = a->n_stream * a->block, d = p.d, width = p.in_width;
  const real *const weight[] = {wq, wk, wv};
  real *const dweight[] = {dwq, dwk, dwv};
  hidden_gradient(&p, weight, dx->block, dhidden);
  for (int64_t i = 0; i < 3; i++) {
    const real *dy = (const real *)dx->block + i * d;
    vd_gemm(CblasTrans, CblasNoTrans, d, width, n, 1, dy, 3 * d, in->hidden, width, 1, dweight[i], width);
    if (i > 0) memory_backward(&p, (const real *)dx->memory + (i - 1) * d, dweight[i]);
  }
  projection_free(&p);
}
