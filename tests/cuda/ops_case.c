#include "ops_case.h"

#include "error.h"
#include "random.h"

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
size_t case_key_rows(const side_call *c) {
  return (size_t)(c->n_stream * (c->window + c->block) * c->n_head * c->d_head);
}

bool case_reached(const side_call *c, size_t element) {
  int64_t width = c->n_head * c->d_head, head = (int64_t)element % width / c->d_head;
  int64_t row = (int64_t)element / width % (c->window + c->block);
  return row >= c->window - c->reach[head];
}

int case_keys(const ops_test *t, side_call *c, double range, uint64_t salt) {
  size_t n = case_key_rows(c);
  int b = case_noise(t, c, SIDE_ACT, n, range, salt);
  for (size_t i = 0; i < n; i++)
    if (!case_reached(c, i)) c->buffer[b].x[i] = case_round(t->precision, 50 * c->buffer[b].x[i]);
  return b;
}
