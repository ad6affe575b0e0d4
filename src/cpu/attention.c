#include "src/cpu/attention.h"

#include "src/cpu/attention_tile.h"

#include <stdlib.h>
#include <string.h>

/* What one thread needs for one (stream, head). */
typedef struct workspace {
  int64_t ld_k;
  real *k, *v;          /* [d_head, ld_k]; [keys, wide] */
  real *q, *q_position; /* [block + margin, wide], scaled; the same where there are no biases */
  real *s;              /* sheared tile */
  real *out;            /* [VD_ROWS, wide] */
  uint16_t *halves;     /* [VD_TILE_MAX, vd_half_ld] */
} workspace;

static void *workspace_new(const vd_attention_plan *plan, workspace *w) {
  const vd_attention *a = plan->a;
  w->ld_k = vd_leading(plan->keys);
  int64_t k = a->d_head * w->ld_k, v = plan->keys * plan->wide, q = (a->block + VD_MARGIN) * plan->wide;
  int64_t s = (VD_TILE_MAX + 1) * vd_leading(plan->longest + VD_MARGIN), out = VD_ROWS * plan->wide;
  int64_t halves = vd_round_up(VD_TILE_MAX * vd_half_ld(plan->longest), 64); /* at most as many reals */
  real *store = vd_aligned(k + v + (plan->biased ? 2 : 1) * q + s + out + halves);
  w->k = store;
  w->v = w->k + k;
  w->q = w->v + v;
  w->q_position = plan->biased ? w->q + q : w->q;
  w->s = w->q_position + q;
  w->out = w->s + s;
  w->halves = (uint16_t *)(w->out + out);
  memset(w->halves, 0, (size_t)halves * sizeof(uint16_t));
  return store;
}

/* The maximum of s[0..n-1], n > 0, by lanes: compilers do not vectorise the maximum of a plain loop. */
static inline real greatest(const real *s, int64_t n) {
  enum { LANES = 4 * VD_VECTOR_BYTES / (int)sizeof(real) };
  real lane[LANES];
  for (int l = 0; l < LANES; l++) lane[l] = s[0];
  int64_t u = 0;
  for (; u + LANES <= n; u += LANES)
    for (int l = 0; l < LANES; l++) lane[l] = s[u + l] > lane[l] ? s[u + l] : lane[l];
  for (; u < n; u++) lane[0] = s[u] > lane[0] ? s[u] : lane[0];
  for (int l = 1; l < LANES; l++) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
  return lane[0];
}

/* Replaces a row of scores, whose keys exist from u = `exists` on, by the weights before normalisation, and returns the
 * sum that normalises them: of m e^s where the constant `masked` is true, else of e^s. *top is the greatest score that
 * enters the sum; it is subtracted before the exponential. */
static inline __attribute__((always_inline)) real weigh_row(const bool masked, const vd_head_plan *head, int64_t exists,
                                                            uint32_t threshold, const uint16_t *restrict half,
                                                            real *restrict s, real *top) {
  const real *restrict mask = head->mask;
  int64_t n = head->n, first = masked && head->seen > exists ? head->seen : exists;
  real most = greatest(s + first, n - first), sum = 0;
  memset(s, 0, (size_t)first * sizeof *s);
#pragma omp simd reduction(+ : sum)
  for (int64_t u = first; u < n; u++) {
    real e = vd_exp(s[u] - most), weighted = e * mask[u];
    sum += masked ? weighted : e;
    s[u] = half[u] >= threshold ? weighted : 0;
  }
  memset(s + n, 0, (size_t)(head->ld - n) * sizeof *s);
  *top = most;
  return sum;
}

/* Rows t .. t + VD_ROWS - 1 of a tile of weights times the values, normalised, into out. */
static void sum_values(const vd_attention_plan *plan, const vd_head_plan *head, const workspace *w, int64_t i0,
                       int64_t t, int64_t rows, const real *norm, real *out) {
  int64_t wide = plan->wide, c = t + head->seen;
  vd_tile_product(VD_ROWS, wide, head->n - head->seen + VD_ROWS - 1, w->s + t * (head->ld - 1) + c, head->ld - 1, 1,
                  w->v + (head->skip + i0 + c) * wide, wide, w->out, wide, false);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t e = 0; e < plan->a->d_head; e++) out[(t + r) * plan->d + e] = w->out[r * wide + e] * norm[t + r];
}

/* Adds the weights of query i, s[u] * norm at distance reach - u, to the head's sums where the query is counted, and
 * copies them where it is chosen. */
static void record_row(const vd_attention *a, const vd_head_plan *head, int64_t stream, int64_t h, int64_t i,
                       const real *s, real norm) {
  const vd_attention_record *record = a->record;
  int64_t row = stream * a->block + i;
  if (record->target[row] >= 0) {
    double *sum = record->sum + (stream * a->n_head + h) * record->n_distance + head->reach;
    for (int64_t u = 0; u < head->n; u++) sum[-u] += (double)(s[u] * norm);
  }
  for (int64_t k = 0; k < record->n_chosen; k++) {
    if (record->chosen[k] != row) continue;
    real *weight = record->weight + (k * a->n_head + h) * record->n_distance;
    memset(weight, 0, (size_t)record->n_distance * sizeof *weight);
    for (int64_t u = 0; u < head->n; u++) weight[head->reach - u] = s[u] * norm;
  }
}

static void one_tile(const vd_attention_plan *plan, const workspace *w, int64_t stream, int64_t h, int64_t i0,
                     real *out, real *lse) {
  int64_t left = plan->a->block - i0, T = left < plan->heads[h].tile ? left : plan->heads[h].tile;
  const vd_head_plan seen = vd_tile_head(plan, h, i0, T), *head = &seen;
  int64_t half_ld = vd_half_ld(head->n), half_at = 0;
  real norm[VD_TILE_MAX];
  vd_tile_scores(plan, head, i0, T, w->q, w->q_position, w->k + head->skip, w->ld_k, w->s);
  if (plan->threshold > 0) half_at = vd_tile_halves(plan, head, stream, h, i0, T, w->halves);
  for (int64_t t = 0; t < T; t++) {
    const uint16_t *half = w->halves + t * half_ld + (plan->threshold > 0 ? half_at + t : 0);
    real *s = w->s + t * head->ld, top;
    int64_t exists = vd_first_key(plan, head, i0 + t);
    real sum = plan->a->softmax == VD_MASKED ? weigh_row(true, head, exists, plan->threshold, half, s, &top)
                                             : weigh_row(false, head, exists, plan->threshold, half, s, &top);
    norm[t] = plan->keep_scale / sum;
    lse[i0 + t] = top + (real)log((double)sum);
    if (plan->a->record) record_row(plan->a, head, stream, h, i0 + t, s, norm[t]);
  }
  memset(w->s + T * head->ld, 0, (size_t)((vd_round_up(T, VD_ROWS) - T) * head->ld) * sizeof(real));
  for (int64_t t = 0; t < T; t += VD_ROWS) {
    sum_values(plan, head, w, i0, t, T - t < VD_ROWS ? T - t : VD_ROWS, norm, out + i0 * plan->d);
  }
}

void vd_cpu_attention(vd_ops *o, const vd_attention *a, const vd_qkv *x, vd_act *out, real *lse) {
  (void)o;
  vd_attention_plan plan;
  vd_attention_plan_new(&plan, a, false);
#pragma omp parallel
  {
    workspace w;
    void *store = workspace_new(&plan, &w);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a->n_stream * a->n_head; task++) {
      int64_t h = plan.order[task / a->n_stream], b = task % a->n_stream;
      vd_key_rows keys = vd_key_rows_of(&plan, x, VD_KEY, b, h), values = vd_key_rows_of(&plan, x, VD_VALUE, b, h);
      int64_t query = b * a->block * plan.d + h * a->d_head;
      vd_pack_key_columns(&plan, &keys, w.ld_k, w.k);
      vd_pack_key_rows(&plan, &values, w.v);
      vd_pack_queries(&plan, x, b, h, a->content_bias, w.q);
      if (plan.biased) vd_pack_queries(&plan, x, b, h, a->position_bias, w.q_position);
      for (int64_t i0 = 0; i0 < a->block; i0 += plan.heads[h].tile) {
        one_tile(&plan, &w, b, h, i0, (real *)out + query, lse + (b * a->n_head + h) * a->block);
      }
    }
    free(store);
  }
  vd_attention_plan_free(&plan);
}
