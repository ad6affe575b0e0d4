#include "src/cpu/attention.h"

#include "src/cpu/attention_tile.h"

#include "src/base/error.h"

#include <stdlib.h>
#include <string.h>

/* With p = e^(s - lse), w = 0 or 1/(1 - dropout), a = m p in both kinds, A = w (dout . v) the gradient of a, and
 * D = sum a A = dout . out:
 *   masked   ds = a (A - D)     dm = p (A - D)
 *   trimmed  ds = p (m A - D)   dm = p A            dz = sum dm dm/dz
 * Nothing holds back the score of a masked key with m = 0, since it takes no part in the output, and its p would grow
 * without bound. Its dm counts p up to ramp only, the most that a key with m >= 1/ramp can have. */

/* What one thread needs for one (stream, head). */
typedef struct workspace {
  int64_t ld_k;
  real *k_columns, *v_columns; /* [d_head, ld_k] */
  real *k_rows;                /* [keys, wide] */
  real *q, *q_position, *dout; /* [block + margin, wide]; q is scaled; both the same where there are no biases */
  real *s, *da;                /* sheared tiles: scores, then ds; A without dropout, then w a */
  real *dq, *dq_position;      /* [VD_ROWS, wide] */
  real *dk, *dv;               /* [keys, wide] */
  real *dot;                   /* [block] D */
  uint16_t *halves;
} workspace;

/* The gradients of what all streams and heads share, of one (stream, head), summed later in a fixed order. */
typedef struct partial {
  real *pe_rows;                      /* [n rounded up to VD_ROWS, wide] */
  real *content_bias, *position_bias; /* [wide] */
  double span;
} partial;

static void *workspace_new(const vd_attention_plan *plan, workspace *w) {
  const vd_attention *a = plan->a;
  w->ld_k = vd_leading(plan->keys);
  int64_t columns = a->d_head * w->ld_k, rows = plan->keys * plan->wide, block = (a->block + VD_MARGIN) * plan->wide;
  int64_t s = (VD_TILE_MAX + 1) * vd_leading(plan->longest + VD_MARGIN);
  int64_t dot = vd_round_up(a->block, VD_LANES), dq = VD_ROWS * plan->wide;
  int64_t halves = vd_round_up(VD_TILE_MAX * vd_half_ld(plan->longest), 64); /* at most as many reals */
  real *store = vd_aligned(2 * columns + 3 * rows + 3 * block + 2 * s + 2 * dq + dot + halves), *next = store;
  const int64_t sizes[] = {columns, columns, rows, block, block, block, s, s, dq, dq, rows, rows, dot};
  real **const places[] = {&w->k_columns, &w->v_columns, &w->k_rows,      &w->q,  &w->q_position, &w->dout, &w->s,
                           &w->da,        &w->dq,        &w->dq_position, &w->dk, &w->dv,         &w->dot};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    *places[i] = next;
    next += sizes[i];
  }
  w->halves = (uint16_t *)next;
  if (!plan->biased) w->q_position = w->q;
  memset(w->halves, 0, (size_t)halves * sizeof(uint16_t));
  return store;
}

/* One row: s becomes ds and da becomes w a; returns the row's share of dz. */
static inline __attribute__((always_inline)) real row_gradient(const bool masked, const vd_attention_plan *plan,
                                                               const vd_head_plan *head, int64_t exists,
                                                               const uint16_t *restrict half, real lse, real dot,
                                                               real *restrict s, real *restrict da) {
  const real *restrict mask = head->mask, *restrict slope = head->slope;
  int64_t n = head->n, first = head->first > exists ? head->first : exists;
  uint32_t threshold = plan->threshold;
  real keep = plan->keep_scale, faintest = (real)plan->a->ramp, dz = 0;
  memset(s, 0, (size_t)first * sizeof *s);
  memset(da, 0, (size_t)first * sizeof *da);
#pragma omp simd reduction(+ : dz)
  for (int64_t u = first; u < n; u++) {
    real e = vd_exp(s[u] - lse), m = mask[u], w = half[u] >= threshold ? keep : 0;
    real p = masked && m == 0 && e > faintest ? faintest : e; /* before m p: 0 * infinity would be NaN */
    real A = w * da[u], weight = m * p;
    dz += p * (masked ? A - dot : A) * slope[u];
    s[u] = masked ? weight * (A - dot) : p * (m * A - dot);
    da[u] = w * weight;
  }
  memset(s + n, 0, (size_t)(head->ld - n) * sizeof *s);
  memset(da + n, 0, (size_t)(head->ld - n) * sizeof *da);
  return dz;
}

/* to [keys, wide] += (band matrix of T rows, zero at distances u < first)^T x, x [T, wide]: for the keys of query i0's
 * band on. Only queries that reach a key take part. */
static void add_to_keys(const vd_attention_plan *plan, const vd_head_plan *head, int64_t T, int64_t first,
                        const real *band, const real *x, real *to) {
  int64_t wide = plan->wide, ld = head->ld - 1;
  for (int64_t c = first; c < head->n + T - 1; c += VD_ROWS) {
    int64_t from = c - head->n + 1 > 0 ? c - head->n + 1 : 0;
    int64_t end = c + VD_ROWS - first < T ? c + VD_ROWS - first : T;
    vd_tile_product(VD_ROWS, wide, end - from, band + from * ld + c, 1, ld, x + from * wide, wide, to + c * wide, wide,
                    true);
  }
}

/* dq of VD_ROWS queries from t on, of which `rows` exist; their parts by content and position add up to those of the
 * biases. */
static void query_gradient(const vd_attention_plan *plan, const vd_head_plan *head, const workspace *w, int64_t i0,
                           int64_t t, int64_t rows, real *dq, partial *sum) {
  int64_t wide = plan->wide, c = t + head->first, n = head->n - head->first;
  vd_tile_product(VD_ROWS, wide, n + VD_ROWS - 1, w->s + t * (head->ld - 1) + c, head->ld - 1, 1,
                  w->k_rows + (head->skip + i0 + c) * wide, wide, w->dq, wide, false);
  vd_tile_product(VD_ROWS, wide, n, w->s + t * head->ld + head->first, head->ld, 1, head->pe_rows + head->first * wide,
                  wide, w->dq_position, wide, false);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t e = 0; e < plan->a->d_head; e++) {
      real content = w->dq[r * wide + e] * plan->scale, position = w->dq_position[r * wide + e] * plan->scale;
      dq[(t + r) * 3 * plan->d + e] = content + position;
      sum->content_bias[e] += content;
      sum->position_bias[e] += position;
    }
}

static void one_tile(const vd_attention_plan *plan, const workspace *w, int64_t stream, int64_t h, int64_t i0,
                     const real *lse, real *dq, partial *sum) {
  int64_t left = plan->a->block - i0, T = left < plan->heads[h].tile ? left : plan->heads[h].tile;
  const vd_head_plan seen = vd_tile_head(plan, h, i0, T), *head = &seen;
  int64_t padded = vd_round_up(T, VD_ROWS), key = (head->skip + i0) * plan->wide;
  int64_t half_ld = vd_half_ld(head->n), half_at = 0, wide = plan->wide;
  vd_tile_scores(plan, head, i0, T, w->q, w->q_position, w->k_columns + head->skip, w->ld_k, w->s);
  vd_tile_band(plan, head, i0, T, w->dout, w->v_columns + head->skip, w->ld_k, w->da, false);
  if (plan->threshold > 0) half_at = vd_tile_halves(plan, head, stream, h, i0, T, w->halves);
  for (int64_t t = 0; t < T; t++) {
    const uint16_t *half = w->halves + t * half_ld + (plan->threshold > 0 ? half_at + t : 0);
    real *s = w->s + t * head->ld, *da = w->da + t * head->ld, L = lse[i0 + t], D = w->dot[i0 + t];
    int64_t exists = vd_first_key(plan, head, i0 + t);
    sum->span += (double)(plan->a->softmax == VD_MASKED ? row_gradient(true, plan, head, exists, half, L, D, s, da)
                                                        : row_gradient(false, plan, head, exists, half, L, D, s, da));
  }
  memset(w->s + T * head->ld, 0, (size_t)((padded - T) * head->ld) * sizeof(real));
  memset(w->da + T * head->ld, 0, (size_t)((padded - T) * head->ld) * sizeof(real));
  for (int64_t t = 0; t < T; t += VD_ROWS) {
    query_gradient(plan, head, w, i0, t, T - t < VD_ROWS ? T - t : VD_ROWS, dq + i0 * 3 * plan->d, sum);
  }
  add_to_keys(plan, head, T, head->first, w->s, w->q + i0 * wide, w->dk + key);
  add_to_keys(plan, head, T, head->seen, w->da, w->dout + i0 * wide, w->dv + key);
  vd_tile_product(vd_round_up(head->n, VD_ROWS), wide, T, w->s, 1, head->ld, w->q_position + i0 * wide, wide,
                  sum->pe_rows + head->skip * wide, wide, true);
}

/* The tensors of one call. */
typedef struct tensors {
  const vd_qkv *x, *dx;
  const real *out, *lse, *dout;
} tensors;

static void one_head(const vd_attention_plan *plan, workspace *w, const tensors *x, int64_t b, int64_t h,
                     partial *sum) {
  const vd_attention *a = plan->a;
  vd_key_rows keys = vd_key_rows_of(plan, x->x, VD_KEY, b, h), values = vd_key_rows_of(plan, x->x, VD_VALUE, b, h);
  int64_t padded = a->reach[h] + a->block + VD_MARGIN, query = b * a->block * plan->d + h * a->d_head;
  vd_pack_key_columns(plan, &keys, w->ld_k, w->k_columns);
  vd_pack_key_columns(plan, &values, w->ld_k, w->v_columns);
  vd_pack_key_rows(plan, &keys, w->k_rows);
  vd_pack_queries(plan, x->x, b, h, a->content_bias, w->q);
  if (plan->biased) vd_pack_queries(plan, x->x, b, h, a->position_bias, w->q_position);
  vd_pack_rows(plan, x->dout + query, plan->d, a->block, a->block + VD_MARGIN, w->dout);
  memset(w->dk, 0, (size_t)(padded * plan->wide) * sizeof(real));
  memset(w->dv, 0, (size_t)(padded * plan->wide) * sizeof(real));
  for (int64_t i = 0; i < a->block; i++) {
    real dot = 0;
    for (int64_t e = 0; e < a->d_head; e++) dot += w->dout[i * plan->wide + e] * x->out[query + i * plan->d + e];
    w->dot[i] = dot;
  }
  memset(sum->pe_rows, 0, (size_t)(vd_round_up(plan->heads[h].n, VD_ROWS) * plan->wide) * sizeof(real));
  memset(sum->content_bias, 0, (size_t)plan->wide * sizeof(real));
  memset(sum->position_bias, 0, (size_t)plan->wide * sizeof(real));
  sum->span = 0;
  for (int64_t i0 = 0; i0 < a->block; i0 += plan->heads[h].tile) {
    one_tile(plan, w, b, h, i0, x->lse + (b * a->n_head + h) * a->block, vd_block_rows(plan, x->dx, VD_QUERY, b, h),
             sum);
  }
  keys = vd_key_rows_of(plan, x->dx, VD_KEY, b, h);
  values = vd_key_rows_of(plan, x->dx, VD_VALUE, b, h);
  vd_unpack_key_rows(plan, &keys, w->dk);
  vd_unpack_key_rows(plan, &values, w->dv);
}

/* The gradients of relative keys and biases += the partials of `streams` streams, stream after stream. */
static void add_relative(const vd_attention_plan *plan, const partial *sums, int64_t streams) {
  const vd_attention *a = plan->a;
  int64_t width = a->d_head;
#pragma omp parallel for schedule(static)
  for (int64_t x = a->first_distance; x < a->first_distance + plan->longest; x++) {
    for (int64_t i = 0; i < streams * a->n_head; i++) {
      int64_t h = i % a->n_head;
      if (x > a->reach[h]) continue;
      const real *row = sums[i].pe_rows + (a->reach[h] - x) * plan->wide;
      for (int64_t e = 0; e < width; e++) a->drel_key[x * plan->d + h * width + e] += row[e];
    }
  }
  for (int64_t i = 0; plan->biased && i < streams * a->n_head; i++)
    for (int64_t e = 0, at = i % a->n_head * width; e < width; e++, at++) {
      a->dcontent_bias[at] += sums[i].content_bias[e];
      a->dposition_bias[at] += sums[i].position_bias[e];
    }
}

/* dkey_pe and dspan += the partials of `streams` streams, stream after stream and head after head. A distance is a
 * column of dkey_pe: it is read and written once, some elements at a time. */
static void add_partials(const vd_attention_plan *plan, const partial *sums, int64_t streams, real *dkey_pe,
                         real *dspan) {
  enum { ELEMENTS = 64 };
  const vd_attention *a = plan->a;
#pragma omp parallel for schedule(static)
  for (int64_t x = a->first_distance; x < a->first_distance + plan->longest; x++) {
    for (int64_t e0 = 0; e0 < a->d_head; e0 += ELEMENTS) {
      int64_t n = a->d_head - e0 < ELEMENTS ? a->d_head - e0 : ELEMENTS;
      real total[ELEMENTS], *column = dkey_pe + e0 * a->attn_span + a->attn_span - x;
      for (int64_t e = 0; e < n; e++) total[e] = column[e * a->attn_span];
      for (int64_t i = 0; i < streams * a->n_head; i++) {
        int64_t reach = a->reach[i % a->n_head];
        if (x > reach) continue;
        const real *row = sums[i].pe_rows + (reach - x) * plan->wide + e0;
        for (int64_t e = 0; e < n; e++) total[e] += row[e];
      }
      for (int64_t e = 0; e < n; e++) column[e * a->attn_span] = total[e];
    }
  }
  for (int64_t i = 0; i < streams * a->n_head; i++) dspan[a->n_span == 1 ? 0 : i % a->n_head] += (real)sums[i].span;
}

/* Streams are taken in groups, so that the partials of all of them need not be held at once. */
static int64_t group_size(const vd_attention_plan *plan, int64_t *per_stream) {
  const int64_t budget = 16 << 20; /* reals */
  *per_stream = 0;
  for (int64_t h = 0; h < plan->a->n_head; h++) {
    *per_stream += (vd_round_up(plan->heads[h].n, VD_ROWS) + 2) * plan->wide;
  }
  if (*per_stream == 0) vd_bug("attention without heads");
  int64_t group = budget / *per_stream;
  return group < 1 ? 1 : group < plan->a->n_stream ? group : plan->a->n_stream;
}

void vd_cpu_attention_backward(vd_ops *o, const vd_attention *a, const vd_qkv *qkv, const vd_act *out, const real *lse,
                               const vd_act *dout, const vd_qkv *dqkv, real *dkey_pe, real *dspan) {
  (void)o;
  const tensors x = {qkv, dqkv, out, lse, dout};
  vd_attention_plan plan;
  vd_attention_plan_new(&plan, a, true);
  int64_t per_stream, group = group_size(&plan, &per_stream);
  real *store = vd_aligned(group * per_stream), *next = store;
  partial *sums = vd_calloc((size_t)(group * a->n_head), sizeof *sums);
  for (int64_t i = 0; i < group * a->n_head; i++) {
    sums[i].pe_rows = next;
    sums[i].content_bias = next + vd_round_up(plan.heads[i % a->n_head].n, VD_ROWS) * plan.wide;
    sums[i].position_bias = sums[i].content_bias + plan.wide;
    next = sums[i].position_bias + plan.wide;
  }
  for (int64_t b0 = 0; b0 < a->n_stream; b0 += group) {
    int64_t streams = a->n_stream - b0 < group ? a->n_stream - b0 : group;
#pragma omp parallel
    {
      workspace w;
      void *own = workspace_new(&plan, &w);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < streams * a->n_head; task++) {
        int64_t h = plan.order[task / streams], b = task % streams;
        one_head(&plan, &w, &x, b0 + b, h, &sums[b * a->n_head + h]);
      }
      free(own);
    }
    if (a->rel_key)
      add_relative(&plan, sums, streams);
    else
      add_partials(&plan, sums, streams, dkey_pe, dspan);
  }
  free(sums);
  free(store);
  vd_attention_plan_free(&plan);
}
