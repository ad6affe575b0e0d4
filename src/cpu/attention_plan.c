#include "src/cpu/attention_tile.h"

#include "src/base/error.h"

#include <stdlib.h>
#include <string.h>

static void check_relative(const vd_attention *a) {
  if (a->first_distance != 0 || a->softmax != VD_MASKED || a->span || a->key_pe)
    vd_bug("relative keys go without a key table and a soft mask, from distance 0");
  if (!a->content_bias != !a->position_bias) vd_bug("one bias without the other");
  if (a->window > a->attn_span)
    vd_bug("window %lld exceeds attn_span %lld", (long long)a->window, (long long)a->attn_span);
  for (int64_t h = 0; h < a->n_head; h++)
    if (a->reach[h] < 0 || a->reach[h] >= a->window + a->block)
      vd_bug("head %lld: reach %lld goes beyond the keys", (long long)h, (long long)a->reach[h]);
}

static void check_record(const vd_attention *a) {
  if (a->dropout.p > 0) vd_bug("weights are recorded without dropout only");
  for (int64_t h = 0; h < a->n_head; h++)
    if (a->reach[h] >= a->record->n_distance)
      vd_bug("head %lld: reach %lld goes beyond the recorded distances", (long long)h, (long long)a->reach[h]);
}

static void check(const vd_attention *a) {
  if (a->record) check_record(a);
  if (a->rel_key) {
    check_relative(a);
    return;
  }
  if (a->first_distance < 1) vd_bug("first_distance is %d: the key table starts at distance 1", a->first_distance);
  if (a->window > a->attn_span) {
    vd_bug("window %lld exceeds attn_span %lld", (long long)a->window, (long long)a->attn_span);
  }
  if (a->n_span != 1 && a->n_span != a->n_head) vd_bug("n_span is %lld", (long long)a->n_span);
  for (int64_t h = 0; h < a->n_head; h++) {
    int64_t reach = a->reach[h];
    if (reach < a->first_distance || reach > a->window || (a->softmax == VD_TRIMMED && reach != a->window)) {
      vd_bug("head %lld: reach %lld does not fit window %lld", (long long)h, (long long)reach, (long long)a->window);
    }
  }
}

/* Mask and slope of one head: m = clamp(v, 0, 1), v = (z L - (x - 1)) / ramp + 1 falls with the distance. */
static void fill_mask(const vd_attention *a, vd_head_plan *head, double z, real *mask, real *slope) {
  head->first = a->softmax == VD_MASKED ? head->n : 0;
  head->seen = head->n;
  for (int64_t u = head->n - 1; u >= 0; u--) {
    double x = (double)(head->reach - u);
    double v = (z * (double)a->attn_span - (x - 1)) / (double)a->ramp + 1;
    mask[u] = (real)(v < 0 ? 0 : v > 1 ? 1 : v);
    slope[u] = (real)(v >= 0 && v <= 1 ? (double)a->attn_span / (double)a->ramp : 0);
    if (v >= 0 && u < head->first) head->first = u;
    if (v > 0) head->seen = u;
  }
  head->mask = mask;
  head->slope = slope;
}

/* No mask: every distance counts in full. */
static void fill_plain(vd_head_plan *head, real *mask, real *slope) {
  head->first = head->seen = 0;
  for (int64_t u = 0; u < head->n; u++) {
    mask[u] = 1;
    slope[u] = 0;
  }
  head->mask = mask;
  head->slope = slope;
}

/* The relative keys of one head, as pack_table. */
static void pack_relative(vd_attention_plan *plan, int64_t h, int64_t farthest, real *columns, real *rows) {
  const vd_attention *a = plan->a;
  const real *keys = (const real *)a->rel_key + h * a->d_head;
  memset(columns, 0, (size_t)(a->d_head * plan->ld_pe) * sizeof(real));
  for (int64_t u = 0; u < plan->longest; u++)
    for (int64_t e = 0; e < a->d_head; e++) columns[e * plan->ld_pe + u] = keys[(farthest - u) * plan->d + e];
  if (rows == NULL) return;
  for (int64_t u = 0; u < plan->longest; u++)
    for (int64_t e = 0; e < plan->wide; e++)
      rows[u * plan->wide + e] = e < a->d_head ? keys[(farthest - u) * plan->d + e] : 0;
}

/* The key table, once as [d_head, distances] and once transposed, both with the farthest distance first. */
static void pack_table(vd_attention_plan *plan, int64_t farthest, real *columns, real *rows) {
  const vd_attention *a = plan->a;
  int64_t first = a->attn_span - farthest;
  memset(columns, 0, (size_t)(a->d_head * plan->ld_pe) * sizeof(real));
  for (int64_t e = 0; e < a->d_head; e++) {
    memcpy(columns + e * plan->ld_pe, a->key_pe + e * a->attn_span + first, (size_t)plan->longest * sizeof(real));
  }
  if (rows == NULL) return;
  for (int64_t u = 0; u < plan->longest; u++)
    for (int64_t e = 0; e < plan->wide; e++)
      rows[u * plan->wide + e] = e < a->d_head ? columns[e * plan->ld_pe + u] : 0;
}

static void sort_heads(vd_attention_plan *plan) {
  for (int64_t h = 0; h < plan->a->n_head; h++) {
    int64_t at = h;
    for (; at > 0 && plan->heads[plan->order[at - 1]].reach < plan->heads[h].reach; at--) {
      plan->order[at] = plan->order[at - 1];
    }
    plan->order[at] = h;
  }
}

void vd_attention_plan_new(vd_attention_plan *plan, const vd_attention *a, bool backward) {
  check(a);
  int64_t farthest = 0;
  for (int64_t h = 0; h < a->n_head; h++) farthest = a->reach[h] > farthest ? a->reach[h] : farthest;
  *plan = (vd_attention_plan){.a = a,
                              .d = a->n_head * a->d_head,
                              .wide = vd_round_up(a->d_head, VD_LANES),
                              .longest = farthest - a->first_distance + 1,
                              .keys = farthest + a->block + VD_MARGIN,
                              .scale = (real)(1 / sqrt((double)a->d_head)),
                              .threshold = vd_dropout_threshold(a->dropout.p)};
  plan->keep_scale = (real)vd_dropout_scale(plan->threshold);
  plan->ld_pe = vd_leading(plan->longest + VD_LANES);
  plan->biased = a->content_bias != NULL;
  int64_t table = a->d_head * plan->ld_pe, rows = backward ? plan->longest * plan->wide : 0;
  int64_t tables = a->rel_key ? a->n_head : 1; /* one of each head's own, or one for all */
  plan->store = vd_aligned(tables * (table + rows) + 2 * a->n_head * plan->longest);
  plan->heads = vd_calloc((size_t)a->n_head, sizeof *plan->heads);
  plan->order = vd_calloc((size_t)a->n_head, sizeof *plan->order);
  real *next = plan->store + tables * (table + rows);
  if (!a->rel_key) pack_table(plan, farthest, plan->store, backward ? plan->store + table : NULL);
  for (int64_t h = 0; h < a->n_head; h++, next += 2 * plan->longest) {
    vd_head_plan *head = &plan->heads[h];
    head->reach = a->reach[h];
    head->n = head->reach - a->first_distance + 1;
    head->ld = vd_leading(head->n + VD_MARGIN);
    head->tile = head->n <= 256 ? 64 : 32; /* the tile stays within the second-level cache */
    real *columns = plan->store + (a->rel_key ? h * (table + rows) : 0), *pe_rows = backward ? columns + table : NULL;
    if (a->rel_key) pack_relative(plan, h, farthest, columns, pe_rows);
    head->pe = columns + (farthest - head->reach);
    head->pe_rows = backward ? pe_rows + (farthest - head->reach) * plan->wide : NULL;
    if (a->rel_key)
      fill_plain(head, next, next + plan->longest);
    else
      fill_mask(a, head, (double)a->span[a->n_span == 1 ? 0 : h], next, next + plan->longest);
  }
  sort_heads(plan);
}

void vd_attention_plan_free(vd_attention_plan *plan) {
  free(plan->heads);
  free(plan->order);
  free(plan->store);
}
