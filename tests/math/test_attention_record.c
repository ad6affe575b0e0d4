/* Attention weights that the CPU attention records, in double: against the equations of ops.h written as plain loops
 * (masked, trimmed, relative keys with biases), against the op's own output, and the same bits however streams and
 * threads share the work. */
#include "src/ops/ops.h"
#include "tests/math/qkv.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST_HEADS = 3, MOST_DISTANCES = 512, N_CHOSEN = 3 };

/* reach [h] of relative keys, cut to the farthest key; z [h] of spans. attn_span 0: relative keys. */
typedef struct shape {
  const char *name;
  enum vd_softmax kind;
  int64_t n_stream, block, window, n_head, d_head, attn_span, ramp, n_span;
  double z[MOST_HEADS];
  int64_t reach[MOST_HEADS];
} shape;

static const shape shapes[] = {
    {"masked", VD_MASKED, 3, 37, 40, 3, 5, 40, 7, 3, {0, 0.4321, 1}, {0}},
    {"masked, one span a layer", VD_MASKED, 2, 21, 30, 2, 4, 64, 8, 1, {0.3}, {0}},
    {"masked, one query", VD_MASKED, 2, 1, 20, 2, 4, 20, 5, 2, {0.15, 0.6}, {0}},
    {"masked, several tiles", VD_MASKED, 2, 70, 300, 2, 8, 320, 16, 2, {0.9, 0.1}, {0}},
    {"trimmed", VD_TRIMMED, 2, 35, 30, 2, 9, 47, 8, 2, {0.1, 0.33}, {0}},
    {"relative, no memory", VD_MASKED, 2, 21, 0, 2, 5, 0, 0, 0, {0}, {1000, 1000}},
    {"relative, memory", VD_MASKED, 3, 90, 33, 2, 8, 0, 0, 0, {0}, {1000, 1000}},
    {"relative, same length", VD_MASKED, 2, 70, 96, 2, 6, 0, 0, 0, {0}, {95, 95}},
};
enum { N_SHAPE = sizeof shapes / sizeof *shapes };

typedef struct problem {
  vd_attention a;
  vd_ops *ops;
  bool relative;
  int64_t reach[MOST_HEADS], chosen[N_CHOSEN];
  real z[MOST_HEADS];
  size_t n_out, n_sum;
  real *q, *k, *v, *pe, *rel, *u, *w, *out, *lse, *weight;
  int32_t *target;
  double *sum;
  vd_attention_record record;
} problem;

static real *noise(size_t n, uint64_t salt) {
  real *x = vd_calloc(n + 1, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = 2 * vd_uniform(vd_philox((vd_rng){.seed = salt}, i).v[1]) - 1;
  return x;
}

static void plan_reaches(problem *p, const shape *s) {
  int64_t farthest = s->window + s->block - 1;
  for (int64_t h = 0; h < s->n_head; h++) {
    p->z[h] = s->z[h];
    int64_t need = (int64_t)floor(s->z[s->n_span == 1 ? 0 : h] * (double)s->attn_span) + s->ramp + 1;
    p->reach[h] = s->kind == VD_TRIMMED || need > s->window ? s->window : need;
    if (p->relative) p->reach[h] = s->reach[h] < farthest ? s->reach[h] : farthest;
    if (p->reach[h] + 5 > p->record.n_distance) p->record.n_distance = p->reach[h] + 5;
  }
}

/* The last query of every stream but the first is padding; the first, one in the middle and the last one are chosen. */
static void choose(problem *p) {
  int64_t n = p->a.n_stream * p->a.block;
  p->target = vd_calloc((size_t)n, sizeof *p->target);
  for (int64_t b = 1; b < p->a.n_stream && p->a.block > 1; b++) p->target[(b + 1) * p->a.block - 1] = -1;
  p->chosen[1] = n / 2;
  p->chosen[2] = n - 1;
}

static void problem_new(problem *p, const shape *s, int threads) {
  vd_error err = {0};
  *p = (problem){.a = {.n_stream = s->n_stream,
                       .block = s->block,
                       .window = s->window,
                       .n_head = s->n_head,
                       .d_head = s->d_head,
                       .attn_span = s->attn_span > 0 ? s->attn_span : s->window,
                       .ramp = s->ramp,
                       .first_distance = s->attn_span > 0,
                       .softmax = s->kind,
                       .n_span = s->n_span},
                 .relative = s->attn_span == 0};
  assert_int_equal(vd_ops_cpu(&p->ops, threads, &err), VD_OK);
  plan_reaches(p, s);
  choose(p);
  size_t d = (size_t)(s->n_head * s->d_head), keys = (size_t)(s->window + s->block);
  p->n_out = (size_t)(s->n_stream * s->block) * d;
  p->n_sum = (size_t)(s->n_stream * s->n_head * p->record.n_distance);
  p->q = noise(p->n_out, 1), p->k = noise((size_t)s->n_stream * keys * d, 2);
  p->v = noise((size_t)s->n_stream * keys * d, 3), p->pe = noise((size_t)(s->d_head * p->a.attn_span), 4);
  p->rel = noise(keys * d, 5), p->u = noise(d, 6), p->w = noise(d, 7);
  p->out = vd_calloc(p->n_out, sizeof *p->out);
  p->lse = vd_calloc((size_t)(s->n_stream * s->n_head * s->block), sizeof *p->lse);
  p->sum = vd_calloc(p->n_sum, sizeof *p->sum);
  p->weight = noise((size_t)(N_CHOSEN * s->n_head * p->record.n_distance), 8); /* every element is to be written */
}

static void problem_free(problem *p) {
  real *const all[] = {p->q, p->k, p->v, p->pe, p->rel, p->u, p->w, p->out, p->lse, p->weight};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
  free(p->target);
  free(p->sum);
  p->ops->destroy(p->ops);
}

/* Streams b .. b + n - 1, recorded or not. */
static void run(problem *p, int64_t b, int64_t n, bool recorded) {
  vd_attention a = p->a;
  int64_t d = a.n_head * a.d_head, q = b * a.block * d, k = b * (a.window + a.block) * d, all = p->a.n_stream;
  a.n_stream = n;
  a.reach = p->reach;
  a.span = p->relative ? NULL : p->z;
  a.key_pe = p->relative ? NULL : p->pe;
  a.rel_key = p->relative ? p->rel : NULL;
  a.content_bias = p->relative ? p->u : NULL;
  a.position_bias = p->relative ? p->w : NULL;
  p->record.sum = p->sum + (size_t)b * (p->n_sum / (size_t)all);
  p->record.target = p->target + b * a.block;
  p->record.chosen = p->chosen;
  p->record.n_chosen = n == all ? N_CHOSEN : 0;
  p->record.weight = p->weight;
  if (recorded) a.record = &p->record;
  vd_qkv x = qkv_pack(&a, p->q + q, p->k + k, p->v + k);
  p->ops->attention(p->ops, &a, &x, p->out + q, p->lse + b * a.n_head * a.block);
  qkv_free(&x);
}

static double score(const problem *p, int64_t b, int64_t h, int64_t i, int64_t x) {
  const vd_attention *a = &p->a;
  int64_t d = a->n_head * a->d_head, key = b * (a->window + a->block) + a->window + i - x;
  double sum = 0;
  for (int64_t e = 0, c = h * a->d_head; e < a->d_head; e++, c++) {
    double q = p->q[(b * a->block + i) * d + c], content = p->k[key * d + c];
    sum += p->relative ? (q + p->u[c]) * content + (q + p->w[c]) * p->rel[x * d + c]
                       : q * (content + p->pe[e * a->attn_span + a->attn_span - x]);
  }
  return sum / sqrt((double)a->d_head);
}

/* The weights of query (b, h, i) by the equations, for all distances. */
static void naive(const problem *p, int64_t b, int64_t h, int64_t i, double weight[MOST_DISTANCES]) {
  const vd_attention *a = &p->a;
  double sum = 0, z = (double)p->z[a->n_span == 1 ? 0 : h] * (double)a->attn_span;
  for (int64_t x = 0; x < p->record.n_distance; x++) {
    weight[x] = 0;
    if (x < a->first_distance || x > p->reach[h] || a->window + i - x < 0) continue;
    double m = p->relative ? 1 : fmin(fmax((z - (double)(x - 1)) / (double)a->ramp + 1, 0), 1);
    double e = exp(score(p, b, h, i, x));
    weight[x] = m * e;
    sum += a->softmax == VD_TRIMMED ? e : m * e;
  }
  for (int64_t x = 0; x < p->record.n_distance; x++) weight[x] /= sum;
}

/* The recorded weights of chosen query c times the values are the op's output. */
static void check_output(const problem *p, const char *name, int c) {
  const vd_attention *a = &p->a;
  int64_t b = p->chosen[c] / a->block, i = p->chosen[c] % a->block, d = a->n_head * a->d_head;
  for (int64_t column = 0; column < d; column++) {
    const real *weight = p->weight + (c * a->n_head + column / a->d_head) * p->record.n_distance;
    double out = 0;
    for (int64_t x = 0; x <= a->window + i && x < p->record.n_distance; x++)
      out += (double)weight[x] * (double)p->v[(b * (a->window + a->block) + a->window + i - x) * d + column];
    if (!(fabs(out - (double)p->out[p->chosen[c] * d + column]) < 1e-12))
      fail_msg("%s: the weights of chosen query %d do not give its output", name, c);
  }
}

static void records_are_the_equations(void **state) {
  (void)state;
  for (int s = 0; s < N_SHAPE; s++) {
    problem p;
    problem_new(&p, &shapes[s], 2);
    run(&p, 0, shapes[s].n_stream, true);
    const vd_attention *a = &p.a;
    double weight[MOST_DISTANCES], *sum = vd_calloc(p.n_sum, sizeof *sum);
    for (int64_t row = 0; row < a->n_stream * a->block * a->n_head; row++) {
      int64_t h = row % a->n_head, query = row / a->n_head, b = query / a->block;
      naive(&p, b, h, query % a->block, weight);
      for (int64_t x = 0; x < p.record.n_distance && p.target[query] >= 0; x++)
        sum[(b * a->n_head + h) * p.record.n_distance + x] += weight[x];
      for (int c = 0; c < N_CHOSEN; c++)
        for (int64_t x = 0; x < p.record.n_distance && query == p.chosen[c]; x++)
          if (!(fabs(weight[x] - (double)p.weight[(c * a->n_head + h) * p.record.n_distance + x]) < 1e-13))
            fail_msg("%s: weight of chosen query %d at distance %d", shapes[s].name, c, (int)x);
    }
    for (size_t e = 0; e < p.n_sum; e++)
      if (!(fabs(sum[e] - p.sum[e]) < 1e-12)) fail_msg("%s: sum %d", shapes[s].name, (int)e);
    for (int c = 0; c < N_CHOSEN; c++) check_output(&p, shapes[s].name, c);
    free(sum);
    problem_free(&p);
  }
}

static void recording_changes_no_output(void **state) {
  (void)state;
  for (int s = 0; s < N_SHAPE; s++) {
    problem p;
    problem_new(&p, &shapes[s], 2);
    run(&p, 0, shapes[s].n_stream, false);
    real *kept = vd_calloc(p.n_out, sizeof *kept);
    memcpy(kept, p.out, p.n_out * sizeof *kept);
    run(&p, 0, shapes[s].n_stream, true);
    assert_memory_equal(kept, p.out, p.n_out * sizeof *kept);
    free(kept);
    problem_free(&p);
  }
}

/* One stream at a time on one thread, all on three; each twice, since records add up. */
static void streams_apart_give_the_same_bits(void **state) {
  (void)state;
  for (int s = 0; s < N_SHAPE; s++) {
    problem whole, part;
    problem_new(&whole, &shapes[s], 3);
    problem_new(&part, &shapes[s], 1);
    for (int times = 0; times < 2; times++) {
      run(&whole, 0, shapes[s].n_stream, true);
      for (int64_t b = 0; b < shapes[s].n_stream; b++) run(&part, b, 1, true);
    }
    assert_memory_equal(whole.sum, part.sum, whole.n_sum * sizeof(double));
    problem_free(&whole);
    problem_free(&part);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(records_are_the_equations),
      cmocka_unit_test(recording_changes_no_output),
      cmocka_unit_test(streams_apart_give_the_same_bits),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
