/* Linear layers: bias, ReLU with dropout, accumulation, no input gradient, shapes of the head and odd ones. */
#include "tests/cuda/ops_case.h"

#include <stdio.h>

struct shape {
  const char *name;
  int64_t n, in, out;
  bool relu, bias, accumulate, no_dx;
  double p;
};

static const struct shape SHAPES[] = {
    {"linear", 70, 64, 96, false, false, false, false, 0},
    {"linear bias", 33, 48, 205, false, true, false, false, 0},
    {"linear odd", 37, 37, 51, false, true, false, false, 0},
    {"linear one row", 1, 64, 32, false, true, false, false, 0},
    {"linear accumulate", 130, 128, 64, false, true, true, false, 0},
    {"linear no dx", 65, 40, 72, false, true, false, true, 0},
    {"linear relu", 65, 64, 256, true, true, true, false, 0},
    {"linear relu dropout", 129, 72, 264, true, true, true, false, 0.3},
    {"linear relu dropout odd", 19, 21, 43, true, true, false, false, 0.3},
    {"linear relu rows", 777, 64, 264, true, true, false, false, 0.3},
    {"linear relu tiles", 5003, 64, 2048, true, true, false, false, 0.3},
    {"linear relu deep", 301, 512, 256, true, true, false, false, 0.3},
    {"linear relu wide", 5003, 512, 2048, true, true, false, false, 0.3},
    {"linear relu blocks", 11001, 64, 384, true, true, false, false, 0.3},
    {"linear relu one block", 70, 128, 128, true, true, false, false, 0},
    {"linear stationary", 1003, 512, 384, false, false, false, false, 0},
    {"linear stationary back", 4099, 384, 256, false, false, false, false, 0},
    {"linear stationary turns", 20000, 512, 384, false, false, false, false, 0},
    {"linear stationary least", 256, 512, 256, false, false, false, false, 0},
    {"linear stationary one more", 257, 512, 256, false, false, false, false, 0},
    {"linear wide", 96, 2048, 512, false, true, true, false, 0},
};

static side_call shape_call(const struct shape *s, enum side_op op) {
  return (side_call){.op = op,
                     .n = s->n,
                     .in = s->in,
                     .out = s->out,
                     .relu = s->relu,
                     .accumulate = s->accumulate,
                     .p = s->p,
                     .seed = 12345,
                     .update = 7,
                     .layer = 3,
                     .row0 = 1000003};
}

static void forward(ops_test *t, const struct shape *s) {
  side_call c = shape_call(s, SIDE_LINEAR);
  size_t n = (size_t)s->n, in = (size_t)s->in, out = (size_t)s->out;
  case_noise(t, &c, SIDE_ACT, n * in, 1, 1);
  case_noise(t, &c, SIDE_PARAM, out * in, 0.2, 2);
  case_noise(t, &c, SIDE_PARAM, s->bias ? out : 0, 1, 3);
  int y = case_fill(&c, SIDE_ACT, n * out, 9);
  case_check(t, s->name, &c, &(case_result){.buffer = y, .name = "y"}, 1);
}

/* For a shape with ReLU, backward is tested on the layer that follows it, of the transposed shape. Both sides get the
 * same rounded x, so that its zeros are the same. */
static void backward(ops_test *t, const struct shape *s) {
  side_call c = shape_call(s, SIDE_LINEAR_BACKWARD);
  if (s->relu) c.in = s->out, c.out = s->in, c.accumulate = false;
  size_t n = (size_t)s->n, in = (size_t)c.in, out = (size_t)c.out;
  char name[96];
  snprintf(name, sizeof name, "%s backward", s->name);
  int x = case_noise(t, &c, SIDE_ACT, n * in, 1, 4);
  for (size_t i = 0; i < n * in && s->relu; i++)
    if (c.buffer[x].x[i] < 0) c.buffer[x].x[i] = 0; /* dropped, or below the ReLU */
  case_noise(t, &c, SIDE_PARAM, out * in, 0.2, 5);
  case_noise(t, &c, SIDE_ACT, n * out, 1, 7);
  int dx = case_noise(t, &c, SIDE_ACT, s->no_dx ? 0 : n * in, 1, 8);
  int dw = case_noise(t, &c, SIDE_REAL, out * in, 1, 9);
  int db = case_noise(t, &c, SIDE_REAL, s->bias ? out : 0, 1, 10);
  int dbefore = case_noise(t, &c, SIDE_REAL, s->relu ? in : 0, 1, 11);
  case_result results[4] = {{.buffer = dw, .name = "dweight"}};
  int k = 1;
  if (!s->no_dx) results[k++] = (case_result){.buffer = dx, .name = "dx", .exact_zeros = s->relu};
  if (s->bias) results[k++] = (case_result){.buffer = db, .name = "dbias"};
  if (s->relu) results[k++] = (case_result){.buffer = dbefore, .name = "dbias before the ReLU"};
  case_check(t, name, &c, results, k);
}

/* A bias far above zero: zeros are dropped units, and both backends must drop the same. */
static void mask(ops_test *t, const char *name, int64_t in, int64_t out) {
  struct shape s = {name, 77, in, out, true, true, false, false, 0.3};
  side_call c = shape_call(&s, SIDE_LINEAR);
  case_noise(t, &c, SIDE_ACT, (size_t)(s.n * s.in), 1, 11);
  case_noise(t, &c, SIDE_PARAM, (size_t)(s.out * s.in), 0.2, 12);
  case_fill(&c, SIDE_PARAM, (size_t)s.out, 16);
  int y = case_fill(&c, SIDE_ACT, (size_t)(s.n * s.out), 9);
  case_check(t, s.name, &c, &(case_result){.buffer = y, .name = "y", .exact_zeros = true}, 1);
}

/* The same where a layer norm before the layer may draw the mask, and for a layer of which it has not. */
static void mask_ahead(ops_test *t, const char *name, int64_t rows, int64_t in, int64_t out, bool branch_drops) {
  struct shape s = {name, rows, in, out, true, true, false, false, 0.3};
  side_call c = shape_call(&s, SIDE_NORM_LINEAR);
  c.branch_drops = branch_drops;
  size_t n = (size_t)rows;
  for (int i = 0; i < 2; i++) case_noise(t, &c, SIDE_ACT, n * (size_t)in, 1, 13 + (uint64_t)i);
  for (int i = 0; i < 2; i++) case_noise(t, &c, SIDE_PARAM, (size_t)in, 1, 15 + (uint64_t)i);
  case_fill(&c, SIDE_ACT, n * (size_t)in, 9);
  for (int i = 0; i < 2; i++) case_fill(&c, SIDE_REAL, n, 9);
  case_fill(&c, SIDE_ACT, n * (size_t)in, 9);
  case_noise(t, &c, SIDE_PARAM, (size_t)(out * in), 0.05, 17);
  case_fill(&c, SIDE_PARAM, (size_t)out, 32);
  for (int i = 0; i < 2; i++) case_fill(&c, SIDE_ACT, n * (size_t)out, 9);
  case_result results[] = {{.buffer = 4, .name = "sum"},
                           {.buffer = 5, .name = "mean"},
                           {.buffer = 6, .name = "rstd"},
                           {.buffer = 7, .name = "norm"},
                           {.buffer = 10, .name = "y", .exact_zeros = true},
                           {.buffer = 11, .name = "y, not drawn before", .exact_zeros = true}};
  case_check(t, name, &c, results, 6);
}

void test_dense(ops_test *t) {
  for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
    forward(t, &SHAPES[i]);
    backward(t, &SHAPES[i]);
  }
  mask(t, "linear dropout mask", 16, 104);
  mask(t, "linear dropout mask wide", 64, 256);
  mask_ahead(t, "linear mask ahead", 77, 512, 2048, false);
  mask_ahead(t, "linear mask ahead drops", 77, 512, 2048, true);
  mask_ahead(t, "linear mask ahead narrow", 300, 64, 384, false);
  mask_ahead(t, "linear mask ahead odd", 33, 37, 51, true);
}
