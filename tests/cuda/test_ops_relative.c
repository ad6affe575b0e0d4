/* The ops of Transformer-XL: attention with relative keys and its projections (no memory, growing memories,
 * same_length, heads whose width together differs from that of the hidden states), scaled dropout, sinusoidal position
 * encodings, the weight gradient of relative keys. Rows that no query reaches hold numbers fifty times as large as the
 * others, so that an op that reads them is found. */
#include "tests/cuda/ops_case.h"

#include <math.h>
#include <stdio.h>

struct geometry {
  const char *name;
  int64_t n_stream, block, window, n_head, d_head, mem_len, d_model;
  int64_t reach; /* cut to the farthest key */
  double p;
  bool unbiased, apart; /* apart: three tensors of weights */
};
enum { FAR = 1 << 20 };

static const struct geometry CASES[] = {
    {"no memory", 2, 64, 0, 2, 64, 64, 128, FAR, 0, false, false},
    {"full memory", 2, 128, 128, 2, 64, 128, 128, FAR, 0, false, false},
    {"full memory dropout", 2, 128, 128, 2, 64, 128, 128, FAR, 0.3, false, false},
    {"growing memory", 3, 70, 33, 3, 64, 100, 160, FAR, 0.3, false, false},
    {"longer block", 2, 200, 130, 2, 64, 130, 96, FAR, 0.2, false, true},
    {"longer memory", 1, 70, 400, 2, 64, 400, 256, FAR, 0.1, false, false},
    {"same length", 2, 64, 96, 2, 64, 96, 128, 95, 0.25, false, false},
    {"same length, short memory", 2, 90, 20, 2, 64, 20, 128, 19, 0.1, false, false},
    {"same length, growing memory", 2, 48, 33, 2, 64, 96, 128, 80, 0.1, false, true},
    {"one query", 2, 1, 70, 2, 64, 77, 128, FAR, 0.1, false, false},
    {"only itself", 2, 33, 1, 2, 64, 1, 128, 0, 0.1, false, false},
    {"itself and one more", 2, 33, 2, 2, 64, 2, 128, 1, 0.1, false, false},
    {"narrow heads", 2, 50, 90, 3, 32, 90, 72, FAR, 0.3, false, false},
    {"wide heads", 1, 70, 150, 2, 128, 150, 200, FAR, 0.3, false, false},
    {"no biases", 2, 65, 40, 2, 64, 40, 128, FAR, 0.15, true, false},
    {"recipe", 1, 512, 512, 2, 64, 512, 128, FAR, 0.1, false, false},
};
enum { N_CASES = sizeof CASES / sizeof *CASES };

static int64_t width_of(const struct geometry *g) {
  return g->n_head * g->d_head;
}

/* The call with relative keys and biases. */
static side_call begin(const ops_test *t, const struct geometry *g, enum side_op op) {
  side_call c = {.op = op,
                 .in = g->d_model,
                 .n_stream = g->n_stream,
                 .block = g->block,
                 .window = g->window,
                 .n_head = g->n_head,
                 .d_head = g->d_head,
                 .attn_span = g->mem_len,
                 .memory_rows = g->mem_len,
                 .kv_spare = op == SIDE_RELATIVE_ATTENTION || op == SIDE_RELATIVE_PROJECT ? g->block % 2 * 3 : 0,
                 .sliced = !g->apart,
                 .p = g->p,
                 .seed = 98,
                 .update = 12,
                 .layer = 3,
                 .row0 = 7};
  int64_t farthest = g->window + g->block - 1;
  for (int64_t h = 0; h < g->n_head; h++) c.reach[h] = c.own[h] = g->reach < farthest ? g->reach : farthest;
  size_t biases = g->unbiased ? 0 : (size_t)width_of(g);
  case_noise(t, &c, SIDE_ACT, (size_t)((c.reach[0] + 1) * width_of(g)), 2, 301);
  case_noise(t, &c, SIDE_PARAM, biases, 1, 302);
  case_noise(t, &c, SIDE_PARAM, biases, 1, 303);
  return c;
}

static void forward(ops_test *t, const struct geometry *g) {
  char name[96];
  snprintf(name, sizeof name, "relative attention %s", g->name);
  side_call c = begin(t, g, SIDE_RELATIVE_ATTENTION);
  case_qkv(t, &c, 2, 311);
  int out = case_fill(&c, SIDE_ACT, case_rows(&c), 9);
  int lse = case_fill(&c, SIDE_REAL, (size_t)(g->n_stream * g->n_head * g->block), 9);
  case_check(t, name, &c, (case_result[]){{.buffer = out, .name = "out"}, {.buffer = lse, .name = "lse"}}, 2);
}

/* The weights that evaluation records. */
static void record(ops_test *t, const struct geometry *g) {
  char name[96];
  snprintf(name, sizeof name, "relative attention recorded %s", g->name);
  side_call c = begin(t, g, SIDE_RELATIVE_ATTENTION);
  c.p = 0;
  case_qkv(t, &c, 2, 342);
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
  snprintf(name, sizeof name, "relative attention backward %s", g->name);
  side_call c = begin(t, g, SIDE_RELATIVE_ATTENTION_BACKWARD);
  size_t biases = g->unbiased ? 0 : (size_t)width_of(g);
  case_qkv(t, &c, 2, 321);
  case_fill(&c, SIDE_ACT, case_rows(&c), 9);
  case_fill(&c, SIDE_REAL, (size_t)(g->n_stream * g->n_head * g->block), 9);
  case_noise(t, &c, SIDE_ACT, case_rows(&c), 1, 324);
  int dqkv = case_qkv_out(&c);
  int drel = case_noise(t, &c, SIDE_REAL, c.buffer[0].n, 0.1, 325);
  int dcontent = case_noise(t, &c, SIDE_REAL, biases, 0.1, 326);
  int dposition = case_noise(t, &c, SIDE_REAL, biases, 0.1, 327);
  case_result results[CASE_PARTS + 3] = {[CASE_PARTS] = {.buffer = drel, .name = "drel_key"},
                                         {.buffer = dcontent, .name = "dcontent_bias"},
                                         {.buffer = dposition, .name = "dposition_bias"}};
  case_parts(dqkv, results);
  case_check(t, name, &c, results, CASE_PARTS + (g->unbiased ? 1 : 3));
}

/* As in test_ops_attention.c: values are unit vectors of a group of keys, so that out shows which weights were
 * dropped. */
static void mask(ops_test *t) {
  struct geometry g = {"", 2, 70, 90, 2, 64, 100, 128, FAR, 0.3, true, false};
  for (int64_t group = 0; group * g.d_head < g.window + g.block; group++) {
    char name[96];
    snprintf(name, sizeof name, "relative attention dropout mask of keys %lld to %lld", (long long)(group * g.d_head),
             (long long)((group + 1) * g.d_head - 1));
    side_call c = begin(t, &g, SIDE_RELATIVE_ATTENTION);
    for (size_t i = 0; i < c.buffer[0].n; i++) c.buffer[0].x[i] = 0;
    case_unit_values(&c, group);
    int out = case_fill(&c, SIDE_ACT, case_rows(&c), 9);
    case_fill(&c, SIDE_REAL, (size_t)(g.n_stream * g.n_head * g.block), 9);
    case_check(t, name, &c, &(case_result){.buffer = out, .name = "weights", .exact_zeros = true}, 1);
  }
}

/* Memory, hidden states, weights: one tensor of all three, or three. */
static void inputs(ops_test *t, side_call *c, const struct geometry *g, uint64_t salt) {
  size_t weight = (size_t)(width_of(g) * g->d_model);
  case_noise(t, c, SIDE_ACT, (size_t)(g->n_stream * c->memory_rows * g->d_model), 1, salt);
  case_noise(t, c, SIDE_ACT, (size_t)(g->n_stream * g->block * g->d_model), 1, salt + 1);
  for (uint64_t i = 0; i < 3; i++)
    case_noise(t, c, SIDE_PARAM, g->apart ? weight : i > 0 ? 0 : 3 * weight, 0.2, salt + 2 + i);
}

static void project(ops_test *t, const struct geometry *g) {
  char name[96];
  snprintf(name, sizeof name, "relative project %s", g->name);
  side_call c = begin(t, g, SIDE_RELATIVE_PROJECT);
  inputs(t, &c, g, 330);
  case_result results[CASE_PARTS];
  case_parts(case_qkv_out(&c), results);
  case_check(t, name, &c, results, CASE_PARTS);
}

static void project_backward(ops_test *t, const struct geometry *g) {
  char name[96];
  snprintf(name, sizeof name, "relative project backward %s", g->name);
  side_call c = begin(t, g, SIDE_RELATIVE_PROJECT_BACKWARD);
  size_t weight = (size_t)(width_of(g) * g->d_model);
  inputs(t, &c, g, 340);
  case_qkv(t, &c, 1, 350);
  int dhidden = case_noise(t, &c, SIDE_ACT, (size_t)(g->n_stream * g->block * g->d_model), 1, 353);
  int dw = case_noise(t, &c, SIDE_REAL, g->apart ? weight : 3 * weight, 1, 354);
  for (uint64_t i = 1; i < 3; i++) case_noise(t, &c, SIDE_REAL, g->apart ? weight : 0, 1, 354 + i);
  case_result results[] = {{.buffer = dhidden, .name = "dhidden"},
                           {.buffer = dw, .name = g->apart ? "dwq" : "dwqkv"},
                           {.buffer = dw + 1, .name = "dwk"},
                           {.buffer = dw + 2, .name = "dwv"}};
  case_check(t, name, &c, results, g->apart ? 4 : 2);
}

static void scale_dropout(ops_test *t, const char *name, int64_t n, int64_t width, double scale, double p, bool same) {
  side_call c = {.op = SIDE_SCALE_DROPOUT,
                 .n = n,
                 .in = width,
                 .scale = scale,
                 .p = p,
                 .site = 7, /* VD_SITE_ATTENDED */
                 .seed = 4,
                 .update = 3,
                 .layer = 2,
                 .row0 = 1000003,
                 .same_buffer = same};
  case_noise(t, &c, SIDE_ACT, (size_t)(n * width), 1, 360);
  case_fill(&c, SIDE_ACT, same ? 0 : (size_t)(n * width), 9);
  case_check(t, name, &c, &(case_result){.buffer = same ? 0 : 1, .name = "y", .exact_zeros = true}, 1);
}

static void position_encodings(ops_test *t, const char *name, int64_t n, int64_t d, int64_t clamp_len, double p) {
  side_call c = {
      .op = SIDE_POSITION_ENCODINGS, .n = n, .in = d, .clamp_len = clamp_len, .p = p, .seed = 4, .update = 70000};
  int out = case_fill(&c, SIDE_ACT, (size_t)(n * d), 9);
  case_check(t, name, &c, &(case_result){.buffer = out, .name = "out", .exact_zeros = true}, 1);
}

static void weight_gradient(ops_test *t, const char *name, int64_t n, int64_t in, int64_t out) {
  side_call c = {.op = SIDE_WEIGHT_GRADIENT, .n = n, .in = in, .out = out};
  case_noise(t, &c, SIDE_ACT, (size_t)(n * in), 1, 370);
  case_noise(t, &c, SIDE_REAL, (size_t)(n * out), 1, 371);
  int dw = case_noise(t, &c, SIDE_REAL, (size_t)(out * in), 1, 372);
  case_check(t, name, &c, &(case_result){.buffer = dw, .name = "dweight"}, 1);
}

void test_relative(ops_test *t) {
  scale_dropout(t, "scale_dropout", 70, 64, 1, 0.1, false);
  scale_dropout(t, "scale_dropout in place", 301, 72, sqrt(512), 0.3, true);
  scale_dropout(t, "scale_dropout odd", 33, 37, 1, 0.3, false);
  scale_dropout(t, "scale_dropout scale only", 33, 40, sqrt(40), 0, true);
  position_encodings(t, "position_encodings", 1024, 512, -1, 0);
  position_encodings(t, "position_encodings far", 5000, 64, 0, 0);
  position_encodings(t, "position_encodings clamped", 700, 72, 400, 0);
  position_encodings(t, "position_encodings dropout", 1024, 512, -1, 0.1);
  position_encodings(t, "position_encodings odd", 33, 38, 20, 0.3);
  weight_gradient(t, "weight_gradient", 1024, 512, 512);
  weight_gradient(t, "weight_gradient odd", 77, 72, 96);
  for (int i = 0; i < N_CASES; i++) {
    project(t, &CASES[i]);
    project_backward(t, &CASES[i]);
    forward(t, &CASES[i]);
    record(t, &CASES[i]);
    if (CASES[i].reach > 0)
      backward(t, &CASES[i]); /* the only key's score has no gradient: what is there is rounding */
  }
  mask(t);
}
