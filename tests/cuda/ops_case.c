#include "tests/cuda/ops_case.h"

#include "src/base/error.h"
#include "src/base/random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const PRECISION[] = {"fp32", "bf16", "fp16"};
static const double BOUND[] = {1e-5, 2e-2, 2e-2};

double case_uniform(uint64_t salt, size_t i) {
  return vd_uniform(vd_philox((vd_rng){.seed = salt, .update = 77}, i).v[2]);
}

/* To `bits` bits of significand, ties to even; exponents as they are. fp16's subnormal numbers are not used. */
static double round_bits(double x, int bits) {
  int exponent;
  double fraction = frexp(x, &exponent);
  return ldexp(nearbyint(ldexp(fraction, bits)), exponent - bits);
}

double case_round(enum side_precision precision, double x) {
  if (!isfinite(x)) return x;
  if (precision == SIDE_BF16) return round_bits(x, 8);
  return precision == SIDE_FP16 ? round_bits(x, 11) : (double)(float)x;
}

int case_fill(side_call *call, enum side_kind kind, size_t n, double value) {
  if (call->n_buffer == SIDE_BUFFERS) vd_bug("too many buffers");
  double *x = vd_calloc(n + 1, sizeof *x);
  for (size_t i = 0; i < n; i++) x[i] = value;
  call->buffer[call->n_buffer] = (side_buffer){kind, n, x};
  return call->n_buffer++;
}

int case_noise(const ops_test *t, side_call *call, enum side_kind kind, size_t n, double range, uint64_t salt) {
  int b = case_fill(call, kind, n, 0);
  bool rounded = kind == SIDE_PARAM || kind == SIDE_ACT;
  for (size_t i = 0; i < n; i++)
    call->buffer[b].x[i] = case_round(rounded ? t->precision : SIDE_FP32, range * (2 * case_uniform(salt, i) - 1));
  return b;
}

side_call case_copy(const side_call *call) {
  side_call copy = *call;
  for (int i = 0; i < call->n_buffer; i++) {
    const side_buffer *b = &call->buffer[i];
    copy.buffer[i].x = vd_calloc(b->n + 1, sizeof(double));
    memcpy(copy.buffer[i].x, b->x, b->n * sizeof(double));
  }
  return copy;
}

void case_free(side_call *call) {
  for (int i = 0; i < call->n_buffer; i++) free(call->buffer[i].x);
  call->n_buffer = 0;
}

bool case_selected(const ops_test *t, const char *name) {
  return !t->only || strstr(name, t->only);
}

void case_report(ops_test *t, const char *name, const char *result, bool good, double error, double bound) {
  printf("%s %s %s %s: relative error %.2e (bound %.0e)\n", good ? "ok" : "not ok", PRECISION[t->precision], name,
         result, error, bound);
  fflush(stdout);
  if (good)
    t->passed++;
  else
    t->failed++;
}

static void compare(ops_test *t, const char *name, const side_call *cpu, const side_call *gpu, const case_result *r) {
  const side_buffer *ours = &gpu->buffer[r->buffer], *theirs = &cpu->buffer[r->buffer];
  double error = 0, size = 0;
  size_t zeros = 0, first = 0;
  for (size_t i = 0; i < ours->n; i++) {
    if (r->wanted && !r->wanted(cpu, i)) continue;
    double e = ours->x[i] - theirs->x[i];
    error += e * e;
    size += theirs->x[i] * theirs->x[i];
    if (r->exact_zeros && (ours->x[i] == 0) != (theirs->x[i] == 0) && zeros++ == 0) first = i;
  }
  double relative = size > 0 ? sqrt(error / size) : sqrt(error), bound = BOUND[t->precision];
  case_report(t, name, r->name, relative <= bound && zeros == 0, relative, bound); /* a NaN is not within */
  if (zeros) printf("#   %zu elements are zero on one side only, the first is %zu\n", zeros, first);
}

void case_check(ops_test *t, const char *name, side_call *call, const case_result *result, int n) {
  if (case_selected(t, name)) {
    side_call cpu = case_copy(call);
    bool ran = side_cpu_run(t->cpu, &cpu) && side_gpu_run(t->gpu, call);
    for (int i = 0; i < n && ran; i++) compare(t, name, &cpu, call, &result[i]);
    if (!ran) case_report(t, name, "runs", false, NAN, 0);
    case_free(&cpu);
  }
  case_free(call);
}

size_t case_rows(const side_call *c) {
  return (size_t)(c->n_stream * c->block * c->n_head * c->d_head);
}
size_t case_memory(const side_call *c) {
  return (size_t)(c->n_stream * (c->window + c->kv_spare) * 2 * c->n_head * c->d_head);
}

static bool is_query(const side_call *c, size_t element) {
  return (int64_t)element / (c->n_head * c->d_head) % 3 == 0;
}
static bool is_key(const side_call *c, size_t element) {
  return (int64_t)element / (c->n_head * c->d_head) % 3 == 1;
}
static bool is_value(const side_call *c, size_t element) {
  return (int64_t)element / (c->n_head * c->d_head) % 3 == 2;
}

/* Element of keys and values in memory: is it of a row that lies at most as far back as its head's `most`? */
static bool is_within(const side_call *c, size_t element, const int64_t *most) {
  int64_t width = c->n_head * c->d_head, head = (int64_t)element % width / c->d_head;
  int64_t row = (int64_t)element / (2 * width) % (c->window + c->kv_spare);
  return row < c->window && row >= c->window - most[head];
}
static bool is_old_key(const side_call *c, size_t element) {
  return is_within(c, element, c->reach) && (int64_t)element / (c->n_head * c->d_head) % 2 == 0;
}
static bool is_old_value(const side_call *c, size_t element) {
  return is_within(c, element, c->own) && (int64_t)element / (c->n_head * c->d_head) % 2 == 1;
}

int case_qkv(const ops_test *t, side_call *c, double range, uint64_t salt) {
  int block = case_noise(t, c, SIDE_ACT, 3 * case_rows(c), 1, salt);
  int memory = case_noise(t, c, SIDE_ACT, case_memory(c), 1, salt + 1000);
  side_buffer *new = &c->buffer[block], *old = &c->buffer[memory];
  for (size_t i = 0; i < new->n; i++)
    if (!is_value(c, i)) new->x[i] = case_round(t->precision, range * new->x[i]);
  for (size_t i = 0; i < old->n; i++) {
    bool key = (int64_t)i / (c->n_head * c->d_head) % 2 == 0, reached = is_within(c, i, c->reach);
    double factor = !reached ? 50 : key || is_within(c, i, c->own) ? 1 : 0;
    if (key) factor *= range;
    old->x[i] = case_round(t->precision, factor * old->x[i]);
  }
  return block;
}

int case_record(side_call *c) {
  int64_t n = c->n_stream * c->block;
  for (int64_t h = 0; h < c->n_head; h++)
    if (c->reach[h] >= c->n_distance) c->n_distance = c->reach[h] + 7;
  const int64_t chosen[SIDE_CHOSEN] = {0, n / 2, n - 1};
  for (int i = 0; i < SIDE_CHOSEN; i++) c->chosen[i] = chosen[i];
  int target = case_fill(c, SIDE_TOKEN, (size_t)n, 1);
  for (int64_t i = 6; i < n; i += 7) c->buffer[target].x[i] = -1;
  int sum = case_fill(c, SIDE_SUM, (size_t)(c->n_stream * c->n_head * c->n_distance), 0);
  case_fill(c, SIDE_REAL, (size_t)(SIDE_CHOSEN * c->n_head * c->n_distance), 9);
  return sum;
}

void case_unit_values(side_call *c, int64_t group) {
  int block = case_fill(c, SIDE_ACT, 3 * case_rows(c), 0), memory = case_fill(c, SIDE_ACT, case_memory(c), 0);
  side_buffer *new = &c->buffer[block], *old = &c->buffer[memory];
  int64_t width = c->n_head * c->d_head, first = group * c->d_head;
  for (size_t i = 0; i < new->n; i++)
    new->x[i] = is_value(c, i) && c->window + (int64_t)i / (3 * width) % c->block == first + (int64_t)i % c->d_head;
  for (size_t i = 0; i < old->n; i++)
    old->x[i] = (int64_t)i / width % 2 == 1 && (int64_t)i / (2 * width) % c->window == first + (int64_t)i % c->d_head;
}

int case_qkv_out(side_call *c) {
  int block = case_fill(c, SIDE_ACT, 3 * case_rows(c), 9);
  case_fill(c, SIDE_ACT, case_memory(c), 9);
  return block;
}

void case_parts(int buffer, case_result result[CASE_PARTS]) {
  static const case_result part[CASE_PARTS] = {{.name = "q", .wanted = is_query},
                                               {.name = "k", .wanted = is_key},
                                               {.name = "v", .wanted = is_value},
                                               {.buffer = 1, .name = "k of memory", .wanted = is_old_key},
                                               {.buffer = 1, .name = "v of memory", .wanted = is_old_value}};
  for (int i = 0; i < CASE_PARTS; i++) {
    result[i] = part[i];
    result[i].buffer += buffer;
  }
}
