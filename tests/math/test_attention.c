/* The CPU attention against the equations of ops.h written as plain loops, and its gradients against central
 * differences, in double. */
#include "src/cpu/attention.h"
#include "tests/math/qkv.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST_HEADS = 4 };

/* One problem with its tensors. Owned; freed by problem_free. */
typedef struct problem {
  vd_attention a;
  int64_t reach[MOST_HEADS];
  real z[MOST_HEADS];
  size_t n_q, n_k, n_pe, n_lse;
  real *q, *k, *v, *pe, *dout;
  real *out, *lse, *dq, *dk, *dv, *dpe, dz[MOST_HEADS];
} problem;

/* Uniform in +-1, other numbers for every salt. */
static real *noise(size_t n, uint64_t salt) {
  real *x = vd_calloc(n, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = 2 * vd_uniform(vd_philox((vd_rng){.seed = salt}, i).v[1]) - 1;
  return x;
}

/* Shape, spans and kind of one case of the table below. */
typedef struct shape {
  const char *name;
  enum vd_softmax kind;
  int64_t n_stream, block, window, n_head, d_head, attn_span, ramp, n_span;
  double z[MOST_HEADS], dropout;
} shape;

static const shape shapes[] = {
    {"masked, z = 0, whole, odd and full spans", VD_MASKED, 2, 21, 40, 4, 5, 40, 7, 4, {0, 0.25, 0.4321, 1}, 0},
    {"masked, dropout", VD_MASKED, 3, 37, 50, 3, 8, 50, 8, 3, {0.04, 0.5, 0.777}, 0.3},
    {"masked, window shorter than the span", VD_MASKED, 2, 70, 19, 2, 16, 64, 8, 2, {0.05, 0.9}, 0.2},
    {"masked, one span a layer", VD_MASKED, 2, 17, 33, 3, 3, 33, 4, 1, {0.3}, 0.1},
    {"masked, long", VD_MASKED, 1, 90, 300, 2, 7, 320, 16, 2, {0.9, 0.1}, 0.25},
    {"masked, one query", VD_MASKED, 2, 1, 20, 2, 4, 20, 5, 2, {0.15, 0.6}, 0},
    {"trimmed", VD_TRIMMED, 2, 21, 40, 4, 5, 40, 7, 4, {0, 0.25, 0.4321, 1}, 0},
    {"trimmed, dropout, short window", VD_TRIMMED, 3, 35, 30, 2, 9, 47, 8, 2, {0.1, 0.33}, 0.3},
    {"trimmed, one span a layer", VD_TRIMMED, 1, 66, 50, 3, 8, 50, 10, 1, {0.2}, 0.15},
};
enum { N_SHAPE = sizeof shapes / sizeof *shapes };

static void problem_new(problem *p, const shape *s, uint64_t salt) {
  *p = (problem){.a = {.n_stream = s->n_stream,
                       .block = s->block,
                       .window = s->window,
                       .n_head = s->n_head,
                       .d_head = s->d_head,
                       .attn_span = s->attn_span,
                       .ramp = s->ramp,
                       .first_distance = 1,
                       .softmax = s->kind,
                       .n_span = s->n_span,
                       .dropout = {s->dropout, {0x123456789abcULL + salt, 77, 3, VD_SITE_ATTENTION}, 11}}};
  for (int64_t h = 0; h < s->n_head; h++) {
    p->z[h] = s->z[h];
    int64_t need = (int64_t)floor(s->z[s->n_span == 1 ? 0 : h] * (double)s->attn_span) + s->ramp + 1;
    p->reach[h] = s->kind == VD_TRIMMED || need > s->window ? s->window : need;
  }
  size_t d = (size_t)(s->n_head * s->d_head);
  p->n_q = (size_t)(s->n_stream * s->block) * d;
  p->n_k = (size_t)(s->n_stream * (s->window + s->block)) * d;
  p->n_pe = (size_t)(s->d_head * s->attn_span);
  p->n_lse = (size_t)(s->n_stream * s->n_head * s->block);
  p->q = noise(p->n_q, salt + 1);
  p->k = noise(p->n_k, salt + 2);
  p->v = noise(p->n_k, salt + 3);
  p->pe = noise(p->n_pe, salt + 4);
  p->dout = noise(p->n_q, salt + 5);
  p->out = vd_calloc(p->n_q, sizeof *p->out);
  p->lse = vd_calloc(p->n_lse, sizeof *p->lse);
  p->dq = vd_calloc(p->n_q, sizeof *p->dq);
  p->dk = vd_calloc(p->n_k, sizeof *p->dk);
  p->dv = vd_calloc(p->n_k, sizeof *p->dv);
  p->dpe = vd_calloc(p->n_pe, sizeof *p->dpe);
}

static void problem_free(problem *p) {
  real *const all[] = {p->q, p->k, p->v, p->pe, p->dout, p->out, p->lse, p->dq, p->dk, p->dv, p->dpe};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* A struct that points into itself must be pointed anew before each call. */
static const vd_attention *args(problem *p) {
  p->a.reach = p->reach;
  p->a.span = p->z;
  p->a.key_pe = p->pe;
  return &p->a;
}

static void forward(problem *p) {
  vd_qkv x = qkv_pack(args(p), p->q, p->k, p->v);
  vd_cpu_attention(NULL, args(p), &x, p->out, p->lse);
  qkv_free(&x);
}

static void backward(problem *p) {
  vd_qkv x = qkv_pack(args(p), p->q, p->k, p->v), dx = qkv_pack(args(p), p->dq, p->dk, p->dv);
  vd_cpu_attention_backward(NULL, args(p), &x, p->out, p->lse, p->dout, &dx, p->dpe, p->dz);
  qkv_unpack(args(p), &dx, p->dq, p->dk, p->dv);
  qkv_free(&x);
  qkv_free(&dx);
}

static double keep(const vd_attention *a, int64_t b, int64_t h, int64_t i, int64_t x) {
  if (a->dropout.p == 0) return 1;
  int64_t Lr = (a->attn_span + 15) / 16 * 16, Mr = (a->block + 15) / 16 * 16, j = Lr + i - x;
  int64_t tile = (((b + a->dropout.row0) * a->n_head + h) * (Mr / 16) + i / 16) * ((Lr + Mr) / 16) + j / 16;
  uint64_t call = (uint64_t)(tile * 32 + i % 16 % 8 * 4 + j % 16 % 8 / 2);
  int lane = (int)(j % 2 + 2 * (j % 16 / 8) + 4 * (i % 16 / 8));
  uint32_t threshold = vd_dropout_threshold(a->dropout.p);
  bool kept = vd_dropout_half(vd_philox(a->dropout.rng, call), lane) >= threshold;
  return kept ? vd_dropout_scale(threshold) : 0;
}

static double mask_of(const vd_attention *a, int64_t h, int64_t x) {
  double v = (a->span[a->n_span == 1 ? 0 : h] * (double)a->attn_span - (double)(x - 1)) / (double)a->ramp + 1;
  return v < 0 ? 0 : v > 1 ? 1 : v;
}

/* Query (b, h, i) by the equations: out [d_head]; returns the log of the denominator. */
static double naive(const problem *p, int64_t b, int64_t h, int64_t i, double *out) {
  const vd_attention *a = &p->a;
  int64_t d = a->n_head * a->d_head;
  const real *q = p->q + (b * a->block + i) * d + h * a->d_head;
  double sum = 0, top = -INFINITY, score[512];
  memset(out, 0, (size_t)a->d_head * sizeof *out);
  for (int64_t x = 1; x <= a->window; x++) {
    const real *k = p->k + (b * (a->window + a->block) + a->window + i - x) * d + h * a->d_head;
    score[x] = 0;
    for (int64_t e = 0; e < a->d_head; e++) score[x] += q[e] * (k[e] + p->pe[e * a->attn_span + a->attn_span - x]);
    score[x] /= sqrt((double)a->d_head);
    if ((a->softmax == VD_TRIMMED || mask_of(a, h, x) > 0) && score[x] > top) top = score[x];
  }
  for (int64_t x = 1; x <= a->window; x++) {
    double m = mask_of(a, h, x), e = m > 0 || a->softmax == VD_TRIMMED ? exp(score[x] - top) : 0;
    sum += a->softmax == VD_MASKED ? m * e : e;
    const real *v = p->v + (b * (a->window + a->block) + a->window + i - x) * d + h * a->d_head;
    for (int64_t c = 0; c < a->d_head && m > 0; c++) out[c] += keep(a, b, h, i, x) * m * e * v[c];
  }
  for (int64_t c = 0; c < a->d_head; c++) out[c] /= sum;
  return top + log(sum);
}

static void check_forward(problem *p, const char *name) {
  const vd_attention *a = args(p);
  double worst = 0, out[64];
  for (int64_t b = 0; b < a->n_stream; b++)
    for (int64_t h = 0; h < a->n_head; h++)
      for (int64_t i = 0; i < a->block; i++) {
        double lse = naive(p, b, h, i, out);
        worst = fmax(worst, fabs(lse - p->lse[(b * a->n_head + h) * a->block + i]));
        for (int64_t e = 0; e < a->d_head; e++) {
          double got = p->out[((b * a->block + i) * a->n_head + h) * a->d_head + e];
          worst = isnan(got) ? INFINITY : fmax(worst, fabs(out[e] - got));
        }
      }
  if (!(worst < 1e-12)) fail_msg("%s: off by %.2e", name, worst);
}

static void forward_follows_the_equations(void **state) {
  (void)state;
  for (int i = 0; i < N_SHAPE; i++) {
    problem p;
    problem_new(&p, &shapes[i], 100 * (uint64_t)i);
    forward(&p);
    check_forward(&p, shapes[i].name);
    problem_free(&p);
  }
}

static double objective(problem *p) {
  forward(p);
  double sum = 0;
  for (size_t i = 0; i < p->n_q; i++) sum += p->out[i] * p->dout[i];
  return sum;
}

/* At most 60 elements of x, spread evenly, by central differences. */
static void check_gradient(problem *p, const char *name, const char *what, real *x, size_t n, const real *gradient) {
  const double step = 1e-5;
  double error = 0, size = 0;
  for (size_t i = 0; i < n; i += 1 + n / 60) {
    real kept = x[i];
    x[i] = kept + step;
    double above = objective(p);
    x[i] = kept - step;
    double below = objective(p);
    x[i] = kept;
    double numeric = (above - below) / (2 * step);
    error += (numeric - gradient[i]) * (numeric - gradient[i]);
    size += numeric * numeric;
  }
  assert_true(size > 0);
  if (!(sqrt(error) <= 1e-6 * sqrt(size))) fail_msg("%s: %s off by %.2e of %.2e", name, what, sqrt(error), sqrt(size));
}

static void gradients_agree_with_differences(void **state) {
  (void)state;
  for (int i = 0; i < N_SHAPE; i++) {
    problem p;
    problem_new(&p, &shapes[i], 1000 + 100 * (uint64_t)i);
    /* Away from the clamp's kinks, which a test of its own covers. */
    for (int64_t h = 0; h < p.a.n_head; h++) {
      p.z[h] = (floor(p.z[h] * (double)p.a.attn_span) + 0.37) / (double)p.a.attn_span;
    }
    forward(&p);
    backward(&p);
    const char *name = shapes[i].name;
    check_gradient(&p, name, "dq", p.q, p.n_q, p.dq);
    check_gradient(&p, name, "dk", p.k, p.n_k, p.dk);
    check_gradient(&p, name, "dv", p.v, p.n_k, p.dv);
    check_gradient(&p, name, "dkey_pe", p.pe, p.n_pe, p.dpe);
    for (int64_t h = 0; h < p.a.n_span; h++) {
      if (p.z[h] * (double)p.a.attn_span > (double)p.a.window) { /* the whole window has m = 1 */
        assert_true(p.dz[h] == 0);
      } else {
        check_gradient(&p, name, "dspan", p.z + h, 1, p.dz + h);
      }
    }
    problem_free(&p);
  }
}

/* Where z L is an integer both ends of the ramp lie on keys and both count: the farthest adds what the difference from
 * above sees, the nearest what the difference from below sees. One key after the other is known from one-sided
 * differences with the mask held linear, so the sum of the ramp's keys is d/dt of the objective with the unclamped mask
 * on all keys of the closed ramp. */
static void closed_ramp_counts_both_ends(void **state) {
  (void)state;
  const shape s = {"kink", VD_MASKED, 1, 5, 24, 1, 3, 24, 6, 1, {0.25}, 0};
  problem p;
  problem_new(&p, &s, 5000);
  forward(&p);
  backward(&p);
  double expected = 0, out[8], weight[64];
  for (int64_t i = 0; i < s.block; i++) {
    double lse = naive(&p, 0, 0, i, out), along = 0;
    for (int64_t e = 0; e < s.d_head; e++) along += out[e] * p.dout[i * s.d_head + e];
    for (int64_t x = 7; x <= 13; x++) { /* z L = 6: m(7) = 1, m(13) = 0 */
      double score = 0, dot = 0;
      int64_t row = s.window + i - x;
      for (int64_t e = 0; e < s.d_head; e++) {
        score += p.q[i * s.d_head + e] * (p.k[row * s.d_head + e] + p.pe[e * s.attn_span + s.attn_span - x]);
        dot += p.dout[i * s.d_head + e] * p.v[row * s.d_head + e];
      }
      weight[x] = exp(score / sqrt((double)s.d_head) - lse);
      expected += weight[x] * (dot - along) * (double)s.attn_span / (double)s.ramp;
    }
  }
  assert_int_equal(p.reach[0], 13);
  assert_true(fabs(expected) > 1e-3);
  if (!(fabs(p.dz[0] - expected) < 1e-11)) fail_msg("dspan %.15g, expected %.15g", p.dz[0], expected);
  problem_free(&p);
}

/* One query whose only key with m = 0, at the closed end of the ramp, scores higher than any exponential can hold: its
 * pull on the span is counted up to the ramp, and nothing else knows of it. */
static void pull_of_a_masked_key_is_bounded(void **state) {
  (void)state;
  const shape s = {"bound", VD_MASKED, 1, 1, 24, 1, 3, 24, 6, 1, {0.25}, 0};
  problem p, plain;
  problem_new(&p, &s, 6000);
  problem_new(&plain, &s, 6000);
  real *far = p.k + (s.window - 13) * s.d_head; /* z L = 6: m(13) = 0 */
  double dot = 0, along = 0;
  for (int64_t e = 0; e < s.d_head; e++) {
    far[e] = 1e4 * p.q[e];
    plain.k[(s.window - 13) * s.d_head + e] = -1e4 * p.q[e]; /* this one pulls nothing */
    dot += p.dout[e] * p.v[(s.window - 13) * s.d_head + e];
  }
  forward(&p);
  backward(&p);
  forward(&plain);
  backward(&plain);
  for (int64_t e = 0; e < s.d_head; e++) along += p.out[e] * p.dout[e];
  double expected = (double)s.ramp * (dot - along) * (double)s.attn_span / (double)s.ramp;
  assert_true(fabs(expected) > 1e-3);
  if (!(fabs(p.dz[0] - plain.dz[0] - expected) < 1e-11))
    fail_msg("dspan %.15g, without the key %.15g, expected %.15g more", p.dz[0], plain.dz[0], expected);
  assert_memory_equal(p.out, plain.out, p.n_q * sizeof(real));
  assert_memory_equal(p.dv, plain.dv, p.n_k * sizeof(real));
  assert_memory_equal(p.dpe, plain.dpe, p.n_pe * sizeof(real));
  for (size_t i = 0; i < p.n_q; i++) assert_true(p.dq[i] == plain.dq[i]);
  for (size_t i = 0; i < p.n_k; i++) assert_true(p.dk[i] == plain.dk[i]);
  problem_free(&p);
  problem_free(&plain);
}

/* Stream b of *all as a problem of its own. */
static void one_stream(const problem *all, const shape *s, int64_t b, uint64_t salt, problem *one) {
  shape alone = *s;
  alone.n_stream = 1;
  problem_new(one, &alone, salt);
  one->a.dropout = all->a.dropout;
  one->a.dropout.row0 += b;
  memcpy(one->q, all->q + (size_t)b * one->n_q, one->n_q * sizeof(real));
  memcpy(one->k, all->k + (size_t)b * one->n_k, one->n_k * sizeof(real));
  memcpy(one->v, all->v + (size_t)b * one->n_k, one->n_k * sizeof(real));
  memcpy(one->pe, all->pe, one->n_pe * sizeof(real));
  memcpy(one->dout, all->dout + (size_t)b * one->n_q, one->n_q * sizeof(real));
}

static void streams_apart_give_the_same_bits(void **state) {
  (void)state;
  for (int i = 0; i < N_SHAPE; i++) {
    const shape *s = &shapes[i];
    problem all;
    problem_new(&all, s, 2000 + 100 * (uint64_t)i);
    forward(&all);
    backward(&all);
    real *dpe = vd_calloc(all.n_pe, sizeof *dpe), dz[MOST_HEADS] = {0};
    for (int64_t b = 0; b < s->n_stream; b++) {
      problem one;
      one_stream(&all, s, b, 2000, &one);
      memcpy(one.dpe, dpe, one.n_pe * sizeof *dpe);
      memcpy(one.dz, dz, sizeof dz);
      forward(&one);
      backward(&one);
      assert_memory_equal(one.out, all.out + (size_t)b * one.n_q, one.n_q * sizeof(real));
      assert_memory_equal(one.lse, all.lse + (size_t)b * one.n_lse, one.n_lse * sizeof(real));
      assert_memory_equal(one.dq, all.dq + (size_t)b * one.n_q, one.n_q * sizeof(real));
      assert_memory_equal(one.dk, all.dk + (size_t)b * one.n_k, one.n_k * sizeof(real));
      assert_memory_equal(one.dv, all.dv + (size_t)b * one.n_k, one.n_k * sizeof(real));
      memcpy(dpe, one.dpe, one.n_pe * sizeof *dpe);
      memcpy(dz, one.dz, sizeof dz);
      problem_free(&one);
    }
    assert_memory_equal(dpe, all.dpe, all.n_pe * sizeof *dpe);
    assert_memory_equal(dz, all.dz, sizeof dz);
    free(dpe);
    problem_free(&all);
  }
}

/* Keys and values beyond a head's reach are NaN: nothing of them may show. */
static void rows_beyond_the_reach_are_not_touched(void **state) {
  (void)state;
  const shape *s = &shapes[1];
  problem p, clean;
  problem_new(&p, s, 3000);
  problem_new(&clean, s, 3000);
  forward(&clean);
  backward(&clean);
  int64_t d = s->n_head * s->d_head, poisoned = 0;
  for (int64_t row = 0; row < s->n_stream * (s->window + s->block); row++)
    for (int64_t e = 0; e < d; e++)
      if (row % (s->window + s->block) < s->window - p.reach[e / s->d_head]) {
        p.k[row * d + e] = p.v[row * d + e] = NAN;
        p.dk[row * d + e] = clean.dk[row * d + e] = 12345;
        poisoned++;
      }
  assert_true(poisoned > 0);
  forward(&p);
  backward(&p);
  assert_memory_equal(p.out, clean.out, p.n_q * sizeof(real));
  assert_memory_equal(p.dq, clean.dq, p.n_q * sizeof(real));
  assert_memory_equal(p.dk, clean.dk, p.n_k * sizeof(real));
  assert_memory_equal(p.dv, clean.dv, p.n_k * sizeof(real));
  assert_memory_equal(p.dpe, clean.dpe, p.n_pe * sizeof(real));
  assert_memory_equal(p.dz, clean.dz, sizeof p.dz);
  problem_free(&p);
  problem_free(&clean);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(forward_follows_the_equations),         cmocka_unit_test(gradients_agree_with_differences),
      cmocka_unit_test(closed_ramp_counts_both_ends),          cmocka_unit_test(streams_apart_give_the_same_bits),
      cmocka_unit_test(rows_beyond_the_reach_are_not_touched), cmocka_unit_test(pull_of_a_masked_key_is_bounded),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
