/* Embedding, residual sum with normalisation, memories, conversions. */
#include "tests/cuda/ops_case.h"

#include <math.h>
#include <stdio.h>

static int tokens(side_call *c, size_t n, int64_t vocab, double missing, uint64_t salt) {
  int b = case_fill(c, SIDE_TOKEN, n, 0);
  for (size_t i = 0; i < n; i++)
    c->buffer[b].x[i] = case_uniform(salt + 1, i) < missing ? -1 : floor(case_uniform(salt, i) * (double)vocab);
  return b;
}

static void embed(ops_test *t, const char *name, int64_t n, int64_t d, int64_t vocab, double p) {
  side_call c = {.op = SIDE_EMBED, .n = n, .in = d, .p = p, .seed = 5, .update = 9, .row0 = 777};
  tokens(&c, (size_t)n, vocab, 0, 20);
  case_noise(t, &c, SIDE_PARAM, (size_t)(vocab * d), 1, 21);
  int out = case_fill(&c, SIDE_ACT, (size_t)(n * d), 9);
  case_check(t, name, &c, &(case_result){.buffer = out, .name = "out", .exact_zeros = true}, 1);

  char backward[96];
  snprintf(backward, sizeof backward, "%s backward", name);
  side_call b = {
      .op = SIDE_EMBED_BACKWARD, .n = n, .in = d, .vocab = vocab, .p = p, .seed = 5, .update = 9, .row0 = 777};
  tokens(&b, (size_t)n, vocab, 0, 20);
  case_noise(t, &b, SIDE_ACT, (size_t)(n * d), 1, 22);
  int dw = case_noise(t, &b, SIDE_REAL, (size_t)(vocab * d), 1, 23);
  case_check(t, backward, &b, &(case_result){.buffer = dw, .name = "dweight"}, 1);
}

static void add_norm(ops_test *t, const char *name, int64_t n, int64_t d, double p) {
  side_call c = {.op = SIDE_ADD_NORM, .n = n, .in = d, .p = p, .seed = 6, .update = 10, .row0 = 555};
  size_t nd = (size_t)(n * d), width = (size_t)d;
  case_noise(t, &c, SIDE_ACT, nd, 1, 30);
  case_noise(t, &c, SIDE_ACT, nd, 2, 31);
  case_noise(t, &c, SIDE_PARAM, width, 1, 32);
  case_noise(t, &c, SIDE_PARAM, width, 1, 33);
  case_fill(&c, SIDE_ACT, nd, 9);
  case_fill(&c, SIDE_REAL, (size_t)n, 9);
  case_fill(&c, SIDE_REAL, (size_t)n, 9);
  case_fill(&c, SIDE_ACT, nd, 9);
  case_result results[] = {{.buffer = 4, .name = "sum"},
                           {.buffer = 5, .name = "mean"},
                           {.buffer = 6, .name = "rstd"},
                           {.buffer = 7, .name = "y"}};
  case_check(t, name, &c, results, 4);
}

/* mean and rstd are given as the forward pass would: those of the rounded sum. */
static void add_norm_backward(ops_test *t, const char *name, int64_t n, int64_t d) {
  side_call c = {.op = SIDE_ADD_NORM_BACKWARD, .n = n, .in = d};
  size_t nd = (size_t)(n * d), width = (size_t)d;
  int sum = case_noise(t, &c, SIDE_ACT, nd, 2, 34);
  int mean = case_fill(&c, SIDE_REAL, (size_t)n, 0), rstd = case_fill(&c, SIDE_REAL, (size_t)n, 0);
  for (size_t r = 0; r < (size_t)n; r++) {
    const double *x = c.buffer[sum].x + r * width;
    double m = 0, v = 0;
    for (size_t i = 0; i < width; i++) m += x[i] / (double)d;
    for (size_t i = 0; i < width; i++) v += (x[i] - m) * (x[i] - m) / (double)d;
    c.buffer[mean].x[r] = (double)(float)m;
    c.buffer[rstd].x[r] = (double)(float)(1 / sqrt(v + 1e-5));
  }
  case_noise(t, &c, SIDE_PARAM, width, 1, 35);
  case_noise(t, &c, SIDE_ACT, nd, 1, 36);
  int dsum = case_fill(&c, SIDE_ACT, nd, 9);
  int dw = case_noise(t, &c, SIDE_REAL, width, 1, 37), db = case_noise(t, &c, SIDE_REAL, width, 1, 38);
  int shift = case_noise(t, &c, SIDE_REAL, n > 3 ? width : 0, 1, 39);
  case_result results[] = {{.buffer = dsum, .name = "dsum"},
                           {.buffer = dw, .name = "dweight"},
                           {.buffer = db, .name = "dbias"},
                           {.buffer = shift, .name = "dshift"}};
  case_check(t, name, &c, results, n > 3 ? 4 : 3);
}

static void ring_push(ops_test *t, const char *name, int64_t d, int64_t rows, int64_t oldest, int64_t block,
                      int64_t stride) {
  int64_t streams = 3;
  side_call c = {.op = SIDE_MEMORY_RING_PUSH,
                 .n_stream = streams,
                 .in = d,
                 .memory_rows = rows,
                 .oldest = oldest,
                 .block = block,
                 .stride = stride};
  case_noise(t, &c, SIDE_ACT, (size_t)(streams * rows * d), 1, 40);
  for (uint64_t ring = 1; ring < 3; ring++)
    case_noise(t, &c, SIDE_ACT, (size_t)(streams * (rows - 1) * d), 1, 42 + ring);
  case_noise(t, &c, SIDE_ACT, (size_t)(streams * block * stride), 1, 41);
  case_result results[] = {{.buffer = 0, .name = "memory", .exact_zeros = true},
                           {.buffer = 1, .name = "the second memory", .exact_zeros = true},
                           {.buffer = 2, .name = "the third memory", .exact_zeros = true}};
  case_check(t, name, &c, results, 3);
}

static void push(ops_test *t, const char *name, int64_t old, int64_t oldest, int64_t block, int64_t new, bool same) {
  int64_t streams = 3, d = 40;
  side_call c = {.op = SIDE_MEMORY_PUSH,
                 .n_stream = streams,
                 .in = d,
                 .memory_rows = old,
                 .oldest = oldest,
                 .block = block,
                 .window = new,
                 .same_buffer = same};
  case_noise(t, &c, SIDE_ACT, (size_t)(streams * old * d), 1, 40);
  case_noise(t, &c, SIDE_ACT, (size_t)(streams * block * d), 1, 41);
  case_fill(&c, SIDE_ACT, (size_t)(streams * new *d), 9);
  case_check(t, name, &c, &(case_result){.buffer = same ? 0 : 2, .name = "memory", .exact_zeros = true}, 1);
}

static void copies(ops_test *t) {
  side_call c = {.op = SIDE_COPY_ACT};
  case_noise(t, &c, SIDE_ACT, 100003, 3, 50);
  case_noise(t, &c, SIDE_REAL, 100003, 3, 51);
  case_noise(t, &c, SIDE_PARAM, 1003, 3, 52);
  side_call original = case_copy(&c);
  if (!case_selected(t, "copies") || !side_gpu_run(t->gpu, &c)) {
    if (case_selected(t, "copies")) case_report(t, "copies", "runs", false, NAN, 0);
  } else {
    size_t wrong = 0;
    for (int b = 0; b < c.n_buffer; b++)
      for (size_t i = 0; i < c.buffer[b].n; i++) wrong += c.buffer[b].x[i] != original.buffer[b].x[i];
    case_report(t, "copies", "there and back, exactly", wrong == 0, (double)wrong, 0);
  }
  case_free(&original);
  case_free(&c);
}

void test_elementwise(ops_test *t) {
  copies(t);
  embed(t, "embed", 70, 64, 205, 0);
  embed(t, "embed dropout", 301, 72, 205, 0.3);
  embed(t, "embed odd", 33, 37, 5, 0.1);
  embed(t, "embed many rows", 4999, 72, 205, 0);
  embed(t, "embed many rows, dropout", 8192, 64, 27, 0.3);
  embed(t, "embed many rows and symbols", 4999, 64, 700, 0);
  add_norm(t, "add_norm", 70, 512, 0);
  add_norm(t, "add_norm odd", 33, 37, 0);
  add_norm(t, "add_norm wide", 3, 1024, 0);
  add_norm(t, "add_norm wider", 9, 2040, 0);
  add_norm(t, "add_norm wide odd", 19, 501, 0);
  add_norm(t, "add_norm widest", 600, 4104, 0);
  add_norm(t, "add_norm long", 5003, 264, 0);
  add_norm(t, "add_norm drops", 70, 512, 0.1);
  add_norm(t, "add_norm drops odd", 33, 37, 0.3);
  add_norm(t, "add_norm drops wider", 9, 2040, 0.5);
  add_norm(t, "add_norm drops wide odd", 19, 501, 0.3);
  add_norm(t, "add_norm drops widest", 5, 4104, 0.2);
  add_norm(t, "add_norm drops long", 5003, 264, 0.2);
  add_norm_backward(t, "add_norm backward", 300, 512);
  add_norm_backward(t, "add_norm backward odd", 33, 37);
  add_norm_backward(t, "add_norm backward wide", 3, 1024);
  add_norm_backward(t, "add_norm backward wider", 9, 2040);
  add_norm_backward(t, "add_norm backward wide odd", 19, 501);
  add_norm_backward(t, "add_norm backward wide odd, long", 2501, 131);
  add_norm_backward(t, "add_norm backward widest", 5, 4104);
  add_norm_backward(t, "add_norm backward widest, long", 2501, 2056);
  add_norm_backward(t, "add_norm backward long", 5003, 264);
  push(t, "memory_push", 100, 0, 33, 100, false);
  push(t, "memory_push same buffer", 100, 0, 33, 100, true);
  push(t, "memory_push longer block", 20, 0, 33, 20, true);
  push(t, "memory_push equal block", 33, 0, 33, 33, true);
  push(t, "memory_push grows", 64, 50, 17, 128, false);
  push(t, "memory_push shrinks", 128, 100, 17, 64, false);
  push(t, "memory_push from nothing", 0, 0, 17, 64, false);
  push(t, "memory_push rows only", 64, 1, 0, 192, false);
  ring_push(t, "memory_ring_push", 40, 100, 80, 33, 40);
  ring_push(t, "memory_ring_push odd", 37, 100, 3, 33, 37);
  ring_push(t, "memory_ring_push longer block", 40, 20, 7, 33, 40);
  ring_push(t, "memory_ring_push equal block", 40, 33, 5, 33, 40);
  ring_push(t, "memory_ring_push stride", 80, 100, 80, 33, 120);
  ring_push(t, "memory_ring_push odd stride", 40, 100, 80, 33, 43);
  ring_push(t, "memory_ring_push one token", 80, 20, 19, 1, 120);
}
