/* What Transformer-XL asks of the CPU backend, against its equations in ops.h written as plain loops, in double:
 * attention with relative keys and query biases, its gradients by central differences, position encodings, scaled
 * dropout, Adam. */
#include "src/ops/ops.h"
#include "tests/math/qkv.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST_HEADS = 3 };

/* One case: reach[h] beyond window + block - 1 is cut there. */
typedef struct shape {
  const char *name;
  int64_t n_stream, block, window, n_head, d_head, attn_span;
  int64_t reach[MOST_HEADS];
  double dropout;
  bool biased;
} shape;

static const shape shapes[] = {
    {"no memory", 2, 21, 0, 2, 5, 0, {1000, 1000}, 0, true},
    {"memory as long as the block", 2, 32, 32, 2, 8, 32, {1000, 1000}, 0, true},
    {"memory still growing, dropout", 3, 37, 19, 3, 8, 50, {1000, 1000, 1000}, 0.3, true},
    {"several tiles, dropout", 2, 150, 70, 1, 16, 70, {1000}, 0.2, true},
    {"as many keys for every query", 2, 40, 60, 2, 7, 60, {59, 59}, 0.25, true},
    {"fewer keys than the block is long", 1, 90, 20, 2, 4, 20, {19, 30}, 0.1, true},
    {"one query", 2, 1, 20, 2, 4, 30, {1000, 1000}, 0.1, true},
    {"only itself", 2, 9, 4, 1, 3, 4, {0}, 0, true},
    {"long, wide reach", 1, 70, 400, 1, 8, 400, {1000}, 0.1, true},
    {"no biases", 2, 33, 40, 2, 6, 40, {1000, 20}, 0.15, false},
};
enum { N_SHAPE = sizeof shapes / sizeof *shapes };

enum tensor { Q, K, V, REL, CONTENT, POSITION, N_TENSOR };

/* One problem with its tensors and their gradients. Owned; freed by problem_free. */
typedef struct problem {
  vd_attention a;
  vd_ops *ops;
  int64_t reach[MOST_HEADS];
  size_t n[N_TENSOR], n_out, n_lse;
  real *x[N_TENSOR], *dx[N_TENSOR], *dout, *out, *lse;
} problem;

/* Uniform in +-1, other numbers for every salt. */
static real *noise(size_t n, uint64_t salt) {
  real *x = vd_calloc(n, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = 2 * vd_uniform(vd_philox((vd_rng){.seed = salt}, i).v[1]) - 1;
  return x;
}

static void problem_new(problem *p, const shape *s, uint64_t salt) {
  vd_error err = {0};
  *p = (problem){.a = {.n_stream = s->n_stream,
                       .block = s->block,
                       .window = s->window,
                       .n_head = s->n_head,
                       .d_head = s->d_head,
                       .attn_span = s->attn_span,
                       .softmax = VD_MASKED,
                       .dropout = {s->dropout, {0x123456789abcULL + salt, 77, 3, VD_SITE_ATTENTION}, 11}}};
  assert_int_equal(vd_ops_cpu(&p->ops, 2, &err), VD_OK);
  int64_t keys = s->window + s->block;
  for (int64_t h = 0; h < s->n_head; h++) p->reach[h] = s->reach[h] < keys ? s->reach[h] : keys - 1;
  size_t d = (size_t)(s->n_head * s->d_head);
  p->n[Q] = p->n_out = (size_t)(s->n_stream * s->block) * d;
  p->n[K] = p->n[V] = (size_t)(s->n_stream * keys) * d;
  p->n[REL] = (size_t)keys * d;
  p->n[CONTENT] = p->n[POSITION] = d;
  p->n_lse = (size_t)(s->n_stream * s->n_head * s->block);
  for (int t = 0; t < N_TENSOR; t++) {
    p->x[t] = noise(p->n[t], salt + (uint64_t)t);
    p->dx[t] = vd_calloc(p->n[t], sizeof(real));
    if (t >= CONTENT && !s->biased) memset(p->x[t], 0, p->n[t] * sizeof(real));
  }
  p->dout = noise(p->n_out, salt + 50);
  p->out = vd_calloc(p->n_out, sizeof *p->out);
  p->lse = vd_calloc(p->n_lse, sizeof *p->lse);
  p->a.reach = p->reach;
  p->a.rel_key = p->x[REL];
  p->a.drel_key = p->dx[REL];
  if (!s->biased) return;
  p->a.content_bias = p->x[CONTENT];
  p->a.position_bias = p->x[POSITION];
  p->a.dcontent_bias = p->dx[CONTENT];
  p->a.dposition_bias = p->dx[POSITION];
}

static void problem_free(problem *p) {
  for (int t = 0; t < N_TENSOR; t++) free(p->x[t]), free(p->dx[t]);
  free(p->dout), free(p->out), free(p->lse);
  p->ops->destroy(p->ops);
}

/* A struct that points into itself must be pointed anew where it was copied. */
static void forward(problem *p) {
  p->a.reach = p->reach;
  vd_qkv x = qkv_pack(&p->a, p->x[Q], p->x[K], p->x[V]);
  p->ops->attention(p->ops, &p->a, &x, p->out, p->lse);
  qkv_free(&x);
}

/* Of the streams from stream b on, as many as p->a says. */
static void backward(problem *p, int64_t b) {
  const vd_attention *a = &p->a;
  int64_t d = a->n_head * a->d_head, q = b * a->block * d, k = b * (a->window + a->block) * d;
  vd_qkv x = qkv_pack(a, p->x[Q] + q, p->x[K] + k, p->x[V] + k);
  vd_qkv dx = qkv_pack(a, p->dx[Q] + q, p->dx[K] + k, p->dx[V] + k);
  p->ops->attention_backward(p->ops, a, &x, p->out + q, p->lse + b * a->n_head * a->block, p->dout + q, &dx, NULL,
                             NULL);
  qkv_unpack(a, &dx, p->dx[Q] + q, p->dx[K] + k, p->dx[V] + k);
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
  return vd_dropout_half(vd_philox(a->dropout.rng, call), lane) >= threshold ? vd_dropout_scale(threshold) : 0;
}

/* Query (b, h, i) by the equations: out [d_head]; returns the log of the denominator. */
static double naive(const problem *p, int64_t b, int64_t h, int64_t i, double *out) {
  const vd_attention *a = &p->a;
  int64_t width = a->d_head, d = a->n_head * width, keys = a->window + a->block;
  double sum = 0;
  memset(out, 0, (size_t)width * sizeof *out);
  for (int64_t j = 0; j <= a->window + i; j++) {
    int64_t x = a->window + i - j;
    if (x > p->reach[h]) continue;
    double score = 0;
    for (int64_t e = 0, c = h * width; e < width; e++, c++) {
      double q = p->x[Q][(b * a->block + i) * d + c];
      score +=
          (q + p->x[CONTENT][c]) * p->x[K][(b * keys + j) * d + c] + (q + p->x[POSITION][c]) * p->x[REL][x * d + c];
    }
    double weight = exp(score / sqrt((double)width));
    sum += weight;
    for (int64_t e = 0; e < width; e++)
      out[e] += keep(a, b, h, i, x) * weight * p->x[V][(b * keys + j) * d + h * width + e];
  }
  for (int64_t e = 0; e < width; e++) out[e] /= sum;
  return log(sum);
}

static void forward_is_the_equations(void **state) {
  (void)state;
  for (int s = 0; s < N_SHAPE; s++) {
    problem p;
    double out[64];
    problem_new(&p, &shapes[s], (uint64_t)(100 * s));
    forward(&p);
    const vd_attention *a = &p.a;
    for (int64_t row = 0; row < a->n_stream * a->n_head * a->block; row++) {
      int64_t i = row % a->block, h = row / a->block % a->n_head, b = row / a->block / a->n_head;
      double lse = naive(&p, b, h, i, out);
      if (!(fabs(lse - p.lse[row]) < 1e-12)) fail_msg("%s: lse of query %d", shapes[s].name, (int)i);
      for (int64_t e = 0; e < a->d_head; e++) {
        double ours = p.out[((b * a->block + i) * a->n_head + h) * a->d_head + e];
        if (!(fabs(ours - out[e]) < 1e-12)) fail_msg("%s: query %d of head %d", shapes[s].name, (int)i, (int)h);
      }
    }
    problem_free(&p);
  }
}

static double objective(problem *p) {
  double sum = 0;
  forward(p);
  for (size_t i = 0; i < p->n_out; i++) sum += (double)p->out[i] * (double)p->dout[i];
  return sum;
}

static void gradients_are_differences(void **state) {
  (void)state;
  const char *const names[N_TENSOR] = {"q", "k", "v", "relative keys", "content bias", "position bias"};
  for (int s = 0; s < N_SHAPE; s++) {
    problem p;
    problem_new(&p, &shapes[s], (uint64_t)(100 * s));
    forward(&p);
    backward(&p, 0);
    for (int t = 0; t < (shapes[s].biased ? N_TENSOR : CONTENT); t++) {
      double error = 0, size = 0;
      for (size_t e = 0; e < p.n[t]; e += p.n[t] / 40 + 1) {
        const double step = 1e-5;
        real kept = p.x[t][e];
        p.x[t][e] = kept + step;
        double above = objective(&p);
        p.x[t][e] = kept - step;
        double numeric = (above - objective(&p)) / (2 * step);
        p.x[t][e] = kept;
        error += (numeric - p.dx[t][e]) * (numeric - p.dx[t][e]);
        size += numeric * numeric;
      }
      if (!(sqrt(error) <= 1e-7 * sqrt(size) + 1e-8))
        fail_msg("%s: %s: finite differences differ by %.2e of %.2e", shapes[s].name, names[t], sqrt(error),
                 sqrt(size));
    }
    problem_free(&p);
  }
}

/* Streams shared out over calls, each with the number of its first: the same outputs bit for bit, and gradients that
 * add up. */
static void streams_apart_give_the_same(void **state) {
  (void)state;
  problem whole, part;
  problem_new(&whole, &shapes[2], 7);
  problem_new(&part, &shapes[2], 7);
  forward(&whole);
  int64_t d = part.a.n_head * part.a.d_head, keys = part.a.window + part.a.block, block = part.a.block;
  part.a.reach = part.reach;
  part.a.n_stream = 1;
  for (int64_t b = 0; b < 3; b++) {
    int64_t q = b * block * d, k = b * keys * d, l = b * part.a.n_head * block;
    part.a.dropout.row0 = 11 + b;
    vd_qkv x = qkv_pack(&part.a, part.x[Q] + q, part.x[K] + k, part.x[V] + k);
    part.ops->attention(part.ops, &part.a, &x, part.out + q, part.lse + l);
    qkv_free(&x);
    backward(&part, b);
  }
  assert_memory_equal(whole.out, part.out, whole.n_out * sizeof(real));
  backward(&whole, 0);
  for (int t = 0; t < N_TENSOR; t++)
    for (size_t e = 0; e < whole.n[t]; e++) assert_true(fabs((double)whole.dx[t][e] - (double)part.dx[t][e]) < 1e-12);
  problem_free(&whole);
  problem_free(&part);
}

static void encodings(void **state) {
  (void)state;
  vd_ops *o;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  enum { N = 30, D = 6 };
  real out[N * D], dropped[N * D];
  vd_position_encoding e = {.n = N, .d = D, .clamp_len = 20};
  o->position_encodings(o, &e, out);
  for (int x = 0; x < N; x++)
    for (int i = 0; i < D / 2; i++) {
      double angle = (x < 20 ? x : 20) / pow(10000, 2.0 * i / D);
      assert_true(fabs(out[x * D + i] - sin(angle)) < 1e-14 && fabs(out[x * D + D / 2 + i] - cos(angle)) < 1e-14);
    }
  e.clamp_len = -1;
  o->position_encodings(o, &e, out);
  assert_true(fabs(out[29 * D] - sin(29.0)) < 1e-14);
  e.dropout = (vd_dropout){.p = 0.5, .rng = {1, 2, 0, VD_SITE_POSITION}};
  o->position_encodings(o, &e, dropped);
  o->scale_dropout(o, N, D, 1, &e.dropout, out, out);
  assert_memory_equal(out, dropped, sizeof out);
  o->destroy(o);
}

static void scaled_dropout(void **state) {
  (void)state;
  vd_ops *o;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  enum { N = 40, WIDTH = 25 };
  real *x = noise((size_t)(N * WIDTH), 5), y[N * WIDTH];
  vd_dropout d = {.p = 0.3, .rng = {9, 8, 7, VD_SITE_OUTPUT}, .row0 = 1000};
  uint32_t threshold = vd_dropout_threshold(d.p);
  o->scale_dropout(o, N, WIDTH, 2.5, &d, x, y);
  int lost = 0;
  for (int i = 0; i < N * WIDTH; i++) {
    uint64_t at = 1000 * WIDTH + (uint64_t)i;
    bool kept = vd_dropout_half(vd_philox(d.rng, at / 8), (int)(at % 8)) >= threshold;
    assert_true(fabs(y[i] - (kept ? 2.5 * x[i] * vd_dropout_scale(threshold) : 0)) < 1e-14);
    lost += !kept;
  }
  assert_in_range(lost, 230, 370);
  d.p = 0;
  o->scale_dropout(o, N, WIDTH, 2.5, &d, x, x);
  for (int i = 0; i < N * WIDTH; i++) assert_true(y[i] == 0 || fabs(y[i] / vd_dropout_scale(threshold) - x[i]) < 1e-14);
  free(x);
  o->destroy(o);
}

/* Five steps over two tensors with room between them, which stays as it is. */
static void adam_is_the_equations(void **state) {
  (void)state;
  vd_ops *o;
  vd_error err = {0};
  assert_int_equal(vd_ops_cpu(&o, 2, &err), VD_OK);
  enum { N = 50 };
  const vd_extent tensor[2] = {{0, 17, 0}, {32, 18, 1}};
  real *p = noise(N, 1), m[N] = {0}, v[N] = {0};
  double q[N], first[N] = {0}, second[N] = {0};
  for (int i = 0; i < N; i++) q[i] = p[i];
  for (int t = 1; t <= 5; t++) {
    real *g = noise(N, 10 + (uint64_t)t);
    vd_adam a = {0.01 * t, 0.9, 0.99, 1e-3, t};
    const double grad_stats[VD_STATS_TENSORS] = {[VD_STATS_SCALE] = 0.5, [VD_STATS_NONFINITE] = -1};
    o->adam(o, p, g, m, v, tensor, 2, grad_stats, &a);
    for (int i = 0; i < N; i++) {
      if (i >= 17 && i < 32) continue;
      first[i] = 0.9 * first[i] + 0.1 * 0.5 * g[i];
      second[i] = 0.99 * second[i] + 0.01 * 0.25 * g[i] * g[i];
      q[i] -= 0.01 * t * (first[i] / (1 - pow(0.9, t))) / (sqrt(second[i] / (1 - pow(0.99, t))) + 1e-3);
    }
    free(g);
  }
  for (int i = 0; i < N; i++) assert_true(fabs(p[i] - q[i]) < 1e-14 && fabs(m[i] - first[i]) < 1e-14);
  free(p);
  o->destroy(o);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(forward_is_the_equations),
      cmocka_unit_test(gradients_are_differences),
      cmocka_unit_test(streams_apart_give_the_same),
      cmocka_unit_test(encodings),
      cmocka_unit_test(scaled_dropout),
      cmocka_unit_test(adam_is_the_equations),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
