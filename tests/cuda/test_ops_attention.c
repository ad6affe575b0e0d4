/* Attention and its projections: spans at their edges (0, the ramp's ends on a key, the whole attn_span), both
 * softmaxes, one span for all heads, odd blocks and windows, memories longer than the window. Rows that a head does not
 * reach hold numbers fifty times as large as the others, so that an op that reads them is found. */
#include "tests/cuda/ops_case.h"

#include <math.h>
#include <stdio.h>

struct geometry {
  const char *name;
  int64_t n_stream, block, window, n_head, d_head, attn_span, ramp, n_span, memory_spare;
  bool trimmed;
  double p;
  double span[5]; /* tokens */
};

static const struct geometry CASES[] = {
    {"zero spans", 1, 64, 64, 2, 64, 128, 32, 2, 0, false, 0, {0, 0}},
    {"spans", 2, 70, 192, 5, 64, 256, 32, 5, 5, false, 0, {0, 10.3, 61.7, 150, 200.9}},
    {"spans dropout", 2, 70, 192, 5, 64, 256, 32, 5, 5, false, 0.3, {0, 10.3, 61.7, 150, 200.9}},
    {"ramp ends on keys", 2, 64, 128, 4, 64, 128, 32, 4, 0, false, 0.3, {1, 32, 64, 96}},
    {"full spans", 1, 65, 256, 3, 64, 256, 32, 3, 0, false, 0.3, {256, 224, 0}},
    {"one span per layer", 2, 100, 192, 3, 64, 192, 32, 1, 0, false, 0.3, {60.4}},
    {"trimmed", 2, 70, 192, 4, 64, 256, 32, 4, 3, true, 0.3, {0, 61.7, 100, 150}},
    {"trimmed zero spans", 1, 64, 64, 2, 64, 128, 32, 2, 0, true, 0, {0, 0}},
    {"trimmed full", 1, 64, 128, 2, 64, 128, 32, 2, 0, true, 0.2, {128, 128}},
    {"narrow heads", 2, 50, 90, 3, 32, 90, 8, 3, 0, false, 0.3, {18.3, 54.2, 90}},
    {"wide heads", 1, 70, 150, 2, 128, 160, 20, 2, 0, false, 0.3, {16.5, 112.2}},
    {"one query", 2, 1, 70, 2, 64, 70, 8, 2, 0, false, 0.3, {7.3, 63.2}},
    {"odd block", 3, 33, 77, 3, 64, 301, 10, 3, 5, false, 0.3, {30.2, 5.1, 60.9}},
    {"long", 1, 130, 700, 2, 64, 700, 32, 2, 0, false, 0.3, {560.4, 28.3}},
};
enum { N_CASES = sizeof CASES / sizeof *CASES };

/* The call with span and key_pe, and each head's reach (src/ops/ops.h). Spans are fp32 on both sides. */
static side_call begin(const ops_test *t, const struct geometry *g, enum side_op op) {
  side_call c = {.op = op,
                 .n_stream = g->n_stream,
                 .block = g->block,
                 .window = g->window,
                 .n_head = g->n_head,
                 .d_head = g->d_head,
                 .attn_span = g->attn_span,
                 .ramp = g->ramp,
                 .n_span = g->n_span,
                 .memory_rows = g->window + g->memory_spare,
                 .kv_spare = op == SIDE_ATTENTION || op == SIDE_PROJECT ? g->memory_spare : 0,
                 .oldest = g->window / 3, /* of the memory that projections read */
                 .trimmed = g->trimmed,
                 .p = g->p,
                 .seed = 99,
                 .update = 11,
                 .layer = 2,
                 .row0 = 5};
  int span = case_fill(&c, SIDE_PARAM, (size_t)g->n_span, 0);
  for (int64_t h = 0; h < g->n_span; h++) c.buffer[span].x[h] = (double)(float)(g->span[h] / (double)g->attn_span);
  for (int64_t h = 0; h < g->n_head; h++) {
    double z = c.buffer[span].x[g->n_span == 1 ? 0 : h];
    int64_t reach = (int64_t)floor(z * (double)g->attn_span) + g->ramp + 1;
    c.own[h] = reach > g->window ? g->window : reach;
    c.reach[h] = g->trimmed ? g->window : c.own[h];
  }
  case_noise(t, &c, SIDE_PARAM, (size_t)(g->d_head * g->attn_span), 1, 101);
  return c;
}

static void forward(ops_test *t, const struct geometry *g) {
  char name[96];
  snprintf(name, sizeof name, "attention %s", g->name);
  side_call c = begin(t, g, SIDE_ATTENTION);
  case_qkv(t, &c, 2, 102);
  int out = case_fill(&c, SIDE_ACT, case_rows(&c), 9);
  int lse = case_fill(&c, SIDE_REAL, (size_t)(g->n_stream * g->n_head * g->block), 9);
  case_check(t, name, &c, (case_result[]){{.buffer = out, .name = "out"}, {.buffer = lse, .name = "lse"}}, 2);
}

/* The weights that evaluation records. */
static void record(ops_test *t, const struct geometry *g) {
  char name[96];
  snprintf(name, sizeof name, "attention recorded %s", g->name);
  side_call c = begin(t, g, SIDE_ATTENTION);
  c.p = 0;
  case_qkv(t, &c, 2, 142);
  int out = case_fill(&c, SIDE_ACT, case_rows(&c), 9);
  case_fill(&c, SIDE_REAL, (size_t)(g->n_stream * g->n_head * g->block), 9);
  int sum = case_record(&c);
  case_check(t, name, &c,
             (case_result[]){{.buffer = out, .name = "out"},
                             {.buffer = sum, .name = "sums", .exact_zeros = true},
                             {.buffer = sum + 1, .name = "weights", .exact_zeros = true}},
             3);
}

static void backward(ops_test *t, const struct geometry *g) {
  char name[96];
  snprintf(name, sizeof name, "attention backward %s", g->name);
  side_call c = begin(t, g, SIDE_ATTENTION_BACKWARD);
  case_qkv(t, &c, 2, 112);
  case_fill(&c, SIDE_ACT, case_rows(&c), 9);
  case_fill(&c, SIDE_REAL, (size_t)(g->n_stream * g->n_head * g->block), 9);
  case_noise(t, &c, SIDE_ACT, case_rows(&c), 1, 115);
  int dqkv = case_qkv_out(&c);
  int dkey_pe = case_noise(t, &c, SIDE_REAL, (size_t)(g->d_head * g->attn_span), 0.1, 116);
  int dspan = case_noise(t, &c, SIDE_REAL, (size_t)g->n_span, 0.1, 117);
  case_result results[CASE_PARTS + 2] = {{.buffer = dkey_pe, .name = "dkey_pe"}, {.buffer = dspan, .name = "dspan"}};
  case_parts(dqkv, results + 2);
  case_check(t, name, &c, results, CASE_PARTS + 2);
}

/* All scores are equal, and a group of keys has unit vectors for values: out holds those keys' weights, one in each
 * column, so that zeros show which were dropped. Every key is in one of the groups. */
static void mask(ops_test *t, bool trimmed) {
  struct geometry g = {"", 2, 70, 192, 2, 64, 256, 32, 2, 0, trimmed, 0.3, {30.5, 140.25}};
  for (int64_t group = 0; group * g.d_head < g.window + g.block; group++) {
    char name[96];
    snprintf(name, sizeof name, "attention%s dropout mask of keys %lld to %lld", trimmed ? " trimmed" : "",
             (long long)(group * g.d_head), (long long)((group + 1) * g.d_head - 1));
    side_call c = begin(t, &g, SIDE_ATTENTION);
    case_unit_values(&c, group);
    int out = case_fill(&c, SIDE_ACT, case_rows(&c), 9);
    case_fill(&c, SIDE_REAL, (size_t)(g.n_stream * g.n_head * g.block), 9);
    case_check(t, name, &c, &(case_result){.buffer = out, .name = "weights", .exact_zeros = true}, 1);
  }
}

void test_attention_ops(ops_test *t) {
  for (int i = 0; i < N_CASES; i++) {
    forward(t, &CASES[i]);
    record(t, &CASES[i]);
    backward(t, &CASES[i]);
  }
  mask(t, false);
  mask(t, true);
}

/* Memory, hidden states, weights: one tensor of all three where sliced, or three. */
static void inputs(ops_test *t, side_call *c, const struct geometry *g, uint64_t salt) {
  size_t d = (size_t)(g->n_head * g->d_head), weight = d * d;
  case_noise(t, c, SIDE_ACT, (size_t)(g->n_stream * c->memory_rows) * d, 1, salt);
  case_noise(t, c, SIDE_ACT, case_rows(c), 1, salt + 1);
  for (uint64_t i = 0; i < 3; i++)
    case_noise(t, c, SIDE_PARAM, !c->sliced ? weight : i > 0 ? 0 : 3 * weight, 0.2, salt + 2 + i);
}

static void project(ops_test *t, const struct geometry *g, bool sliced) {
  char name[96];
  snprintf(name, sizeof name, "project %s%s", g->name, sliced ? ", one tensor" : "");
  side_call c = begin(t, g, SIDE_PROJECT);
  c.sliced = sliced;
  inputs(t, &c, g, 200);
  case_result results[CASE_PARTS];
  case_parts(case_qkv_out(&c), results);
  case_check(t, name, &c, results, CASE_PARTS);
}

static void project_backward(ops_test *t, const struct geometry *g, bool sliced) {
  char name[96];
  snprintf(name, sizeof name, "project backward %s%s", g->name, sliced ? ", one tensor" : "");
  side_call c = begin(t, g, SIDE_PROJECT_BACKWARD);
  c.sliced = sliced;
  size_t weight = (size_t)(g->n_head * g->d_head * g->n_head * g->d_head);
  inputs(t, &c, g, 210);
  case_qkv(t, &c, 1, 220);
  int dhidden = case_noise(t, &c, SIDE_ACT, case_rows(&c), 1, 223);
  int dw = case_noise(t, &c, SIDE_REAL, sliced ? 3 * weight : weight, 1, 224);
  for (uint64_t i = 1; i < 3; i++) case_noise(t, &c, SIDE_REAL, sliced ? 0 : weight, 1, 224 + i);
  case_result results[] = {{.buffer = dhidden, .name = "dhidden"},
                           {.buffer = dw, .name = sliced ? "dwqkv" : "dwq"},
                           {.buffer = dw + 1, .name = "dwk"},
                           {.buffer = dw + 2, .name = "dwv"}};
  case_check(t, name, &c, results, sliced ? 2 : 4);
}

void test_project(ops_test *t) {
  for (int i = 0; i < N_CASES; i++) {
    for (int sliced = 0; sliced < 2; sliced++) {
      project(t, &CASES[i], sliced);
      project_backward(t, &CASES[i], sliced);
    }
  }
}
