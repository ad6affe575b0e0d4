#include "tests/gpu/op_times.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINES = 64, CALLS = 2048, UPDATES = 512 };

/* Floors of an op: dense bf16 products of random numbers as measured (H200), and the memory bandwidth of an H100,
 * where each byte read and each written counts. */
static const double FLOP_A_MS = 0.79e12, BYTES_A_MS = 3.35e9;

/* One kind of op, and what it took in each update. */
struct line {
  char name[64];
  int calls;
  double flop, bytes; /* of one update */
  double ms[UPDATES];
};

struct op_times {
  vd_ops ops; /* first, so that a table of ops is one of these */
  vd_ops *inner;
  const vd_cuda_plugin *cuda;
  struct line line[LINES];
  int n_line, n_update;
  bool on;       /* since the first op_times_update */
  bool counting; /* floors are counted in the first update alone */
  int call[CALLS], n_call;
};

static struct op_times *times_of(vd_ops *o) {
  return (struct op_times *)(void *)o;
}

static int line_of(struct op_times *t, const char *name) {
  for (int i = 0; i < t->n_line; i++)
    if (strcmp(t->line[i].name, name) == 0) return i;
  if (t->n_line == LINES) vd_bug("more than %d kinds of ops", LINES);
  snprintf(t->line[t->n_line].name, sizeof t->line[0].name, "%s", name);
  return t->n_line++;
}

static vd_ops *begin(vd_ops *o, const char *name, double flop, double bytes) {
  struct op_times *t = times_of(o);
  if (!t->on) return t->inner;
  if (t->n_call == CALLS) vd_bug("more than %d ops in an update", CALLS);
  struct line *l = &t->line[t->call[t->n_call] = line_of(t, name)];
  if (t->counting) {
    l->calls++;
    l->flop += flop;
    l->bytes += bytes;
  }
  t->cuda->event_record(t->inner, 2 * t->n_call);
  return t->inner;
}

static void end(vd_ops *o) {
  struct op_times *t = times_of(o);
  if (!t->on) return;
  t->cuda->event_record(t->inner, 2 * t->n_call + 1);
  t->n_call++;
}

static void timed_zero(vd_ops *o, void *p, size_t bytes) {
  vd_ops *i = begin(o, "zero", 0, (double)bytes);
  i->zero(i, p, bytes);
  end(o);
}

static void timed_zero_gradients(vd_ops *o, real *gradients, size_t n) {
  vd_ops *i = begin(o, "zero_gradients", 0, (double)(n * sizeof *gradients));
  i->zero_gradients(i, gradients, n);
  end(o);
}

static void timed_put_tokens(vd_ops *o, int32_t *device, const int32_t *host, size_t n) {
  vd_ops *i = begin(o, "put_tokens", 0, 0);
  i->put_tokens(i, device, host, n);
  end(o);
}

static void timed_weights_changed(vd_ops *o, const real *params, size_t n) {
  vd_ops *i = begin(o, "weights_changed", 0, 0);
  i->weights_changed(i, params, n);
  end(o);
}

static double act(const vd_ops *o) {
  return (double)o->act_size;
}

static void timed_embed(vd_ops *o, int64_t n, int64_t d, const int32_t *tokens, const real *weight,
                        const vd_dropout *dropout, vd_act *out) {
  vd_ops *i = begin(o, "embed", 0, (double)(n * d) * act(o));
  i->embed(i, n, d, tokens, weight, dropout, out);
  end(o);
}

static void timed_embed_backward(vd_ops *o, int64_t n, int64_t d, int64_t vocab, const int32_t *tokens,
                                 const vd_dropout *dropout, vd_act *dout, real *dweight) {
  vd_ops *i = begin(o, "embed_backward", 0, (double)(n * d) * act(o));
  i->embed_backward(i, n, d, vocab, tokens, dropout, dout, dweight);
  end(o);
}

static const char *linear_name(char name[64], const char *what, const vd_linear *l, bool bias) {
  snprintf(name, 64, "%s %lld > %lld%s%s", what, (long long)l->in, (long long)l->out, bias ? " bias" : "",
           l->relu ? " ReLU" : "");
  return name;
}

static void timed_linear(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const real *bias,
                         vd_act *y) {
  char name[64];
  double n = (double)l->n, in = (double)l->in, out = (double)l->out;
  vd_ops *i =
      begin(o, linear_name(name, "linear", l, bias != NULL), 2 * n * in * out, (n * in + n * out + in * out) * act(o));
  i->linear(i, l, x, weight, bias, y);
  end(o);
}

/* The gradients of the weights are added to: fp32, read and written. */
static void timed_linear_backward(vd_ops *o, const vd_linear *l, const vd_act *x, const real *weight, const vd_act *dy,
                                  vd_act *dx, bool accumulate, real *dweight, real *dbias, const vd_linear *before,
                                  real *dbefore) {
  char name[64];
  double n = (double)l->n, in = (double)l->in, out = (double)l->out;
  double acts = n * in * (1 + (dx != NULL) + accumulate) + n * out + in * out;
  vd_ops *i =
      begin(o, linear_name(name, before ? "linear_backward, ReLU before," : "linear_backward", l, dbias != NULL),
            (dx ? 4 : 2) * n * in * out, acts * act(o) + in * out * 8);
  i->linear_backward(i, l, x, weight, dy, dx, accumulate, dweight, dbias, before, dbefore);
  end(o);
}

static void timed_add_norm(vd_ops *o, int64_t n, int64_t d, const vd_act *a, const vd_act *b, const vd_dropout *dropped,
                           const real *weight, const real *bias, vd_act *sum, real *mean, real *rstd, vd_act *y) {
  vd_ops *i = begin(o, "add_norm", 0, (double)(n * d) * 4 * act(o));
  i->add_norm(i, n, d, a, b, dropped, weight, bias, sum, mean, rstd, y);
  end(o);
}

static void timed_add_norm_backward(vd_ops *o, int64_t n, int64_t d, const vd_act *sum, const real *mean,
                                    const real *rstd, const real *weight, const vd_act *dy, vd_act *dsum, real *dweight,
                                    real *dbias, real *dshift) {
  vd_ops *i = begin(o, "add_norm_backward", 0, (double)(n * d) * 3 * act(o));
  i->add_norm_backward(i, n, d, sum, mean, rstd, weight, dy, dsum, dweight, dbias, dshift);
  end(o);
}

/* (query, key) pairs that the heads see, and rows of memory that they reach. With relative keys a reach may go beyond
 * the first key. */
static double pairs_of(const vd_attention *a) {
  double sum = 0;
  for (int64_t h = 0; h < a->n_head && !a->rel_key; h++) sum += (double)(a->reach[h] * a->block);
  for (int64_t i = 0; i < a->block && a->rel_key; i++) {
    int64_t keys = (a->reach[0] < a->window + i ? a->reach[0] : a->window + i) + 1;
    sum += (double)(keys * a->n_head);
  }
  return sum * (double)a->n_stream;
}
static double memory_rows(const vd_attention *a) {
  double sum = 0;
  for (int64_t h = 0; h < a->n_head; h++) sum += (double)(a->reach[h] < a->window ? a->reach[h] : a->window);
  return sum * (double)a->n_stream;
}

static void timed_attention_schedule(vd_ops *o, int n, const vd_attention *a) {
  vd_ops *i = begin(o, "attention_schedule", 0, 0);
  i->attention_schedule(i, n, a);
  end(o);
}

static void timed_attention_project(vd_ops *o, const vd_attention *a, const vd_attention_input *in, const real *wq,
                                    const real *wk, const real *wv, const vd_qkv *x) {
  double n = (double)(a->n_stream * a->block), d = (double)(a->n_head * a->d_head), rows = memory_rows(a);
  double head = (double)a->d_head;
  vd_ops *i = begin(o, "attention_project", 6 * n * d * d + 4 * rows * head * d,
                    (4 * n * d + 3 * d * d + 2 * rows * head) * act(o));
  i->attention_project(i, a, in, wq, wk, wv, x);
  end(o);
}

static void timed_attention_project_backward(vd_ops *o, const vd_attention *a, const vd_attention_input *in,
                                             const real *wq, const real *wk, const real *wv, const vd_qkv *dx,
                                             vd_act *dhidden, real *dwq, real *dwk, real *dwv) {
  double n = (double)(a->n_stream * a->block), d = (double)(a->n_head * a->d_head), rows = memory_rows(a);
  double head = (double)a->d_head;
  vd_ops *i = begin(o, "attention_project_backward", 12 * n * d * d + 4 * rows * head * d,
                    (6 * n * d + 3 * d * d + 2 * rows * head) * act(o) + 24 * d * d);
  i->attention_project_backward(i, a, in, wq, wk, wv, dx, dhidden, dwq, dwk, dwv);
  end(o);
}

static void timed_attention(vd_ops *o, const vd_attention *a, const vd_qkv *x, vd_act *out, real *lse) {
  double n = (double)(a->n_stream * a->block), d = (double)(a->n_head * a->d_head);
  vd_ops *i = begin(o, "attention", pairs_of(a) * 6 * (double)a->d_head,
                    (4 * n * d + 2 * memory_rows(a) * (double)a->d_head) * act(o));
  i->attention(i, a, x, out, lse);
  end(o);
}

static void timed_attention_backward(vd_ops *o, const vd_attention *a, const vd_qkv *x, const vd_act *out,
                                     const real *lse, const vd_act *dout, const vd_qkv *dx, real *dkey_pe,
                                     real *dspan) {
  double n = (double)(a->n_stream * a->block), d = (double)(a->n_head * a->d_head);
  vd_ops *i = begin(o, "attention_backward", pairs_of(a) * 16 * (double)a->d_head,
                    (8 * n * d + 4 * memory_rows(a) * (double)a->d_head) * act(o));
  i->attention_backward(i, a, x, out, lse, dout, dx, dkey_pe, dspan);
  end(o);
}

static void timed_backward_end(vd_ops *o) {
  vd_ops *i = begin(o, "backward_end", 0, 0);
  i->backward_end(i);
  end(o);
}

static void timed_memory_push(vd_ops *o, int64_t n_stream, int64_t d, const vd_act *old, int64_t rows_old,
                              int64_t oldest, const vd_act *hidden, int64_t block, vd_act *memory, int64_t rows_new) {
  int64_t fresh = block < rows_new ? block : rows_new; /* the rest could stay where it is */
  vd_ops *i = begin(o, "memory_push", 0, (double)(n_stream * fresh * d) * 2 * act(o));
  i->memory_push(i, n_stream, d, old, rows_old, oldest, hidden, block, memory, rows_new);
  end(o);
}

static void timed_memory_ring_push(vd_ops *o, int64_t n_stream, int64_t d, int64_t stride, int64_t block, int n,
                                   const vd_ring_push *push) {
  int64_t rows = 0;
  for (int k = 0; k < n; k++) rows += block < push[k].rows ? block : push[k].rows;
  vd_ops *i = begin(o, "memory_ring_push", 0, (double)(n_stream * rows * d) * 2 * act(o));
  i->memory_ring_push(i, n_stream, d, stride, block, n, push);
  end(o);
}

static void timed_cross_entropy(vd_ops *o, int64_t n, int64_t vocab, int64_t stride, const vd_act *logits,
                                const int32_t *targets, double scale, double *loss_sum, real *nll, vd_act *dlogits) {
  vd_ops *i = begin(o, "cross_entropy", 0, (double)(n * stride) * 2 * act(o));
  i->cross_entropy(i, n, vocab, stride, logits, targets, scale, loss_sum, nll, dlogits);
  end(o);
}

static double elements(const vd_extent *tensor, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += (double)tensor[i].size;
  return sum;
}

static void timed_gradient_norms(vd_ops *o, const real *gradient, const vd_extent *extent, int n, int n_tensor,
                                 double *norm2) {
  vd_ops *i = begin(o, "gradient_norms", 0, elements(extent, n) * sizeof(real));
  i->gradient_norms(i, gradient, extent, n, n_tensor, norm2);
  end(o);
}

static void timed_gradient_stats(vd_ops *o, int n_tensor, double scale, double clip_norm, double *grad_stats) {
  vd_ops *i = begin(o, "gradient_stats", 0, (double)n_tensor * sizeof(double));
  i->gradient_stats(i, n_tensor, scale, clip_norm, grad_stats);
  end(o);
}

static void timed_adagrad(vd_ops *o, real *param, const real *gradient, real *accumulator, const vd_extent *extent,
                          int n, const double *grad_stats, double lr, double eps, double clip_step) {
  vd_ops *i = begin(o, "adagrad", 0, elements(extent, n) * (5 * sizeof(real) + act(o)));
  i->adagrad(i, param, gradient, accumulator, extent, n, grad_stats, lr, eps, clip_step);
  end(o);
}

static void timed_adam(vd_ops *o, real *param, const real *gradient, real *m, real *v, const vd_extent *extent, int n,
                       const double *grad_stats, const vd_adam *a) {
  vd_ops *i = begin(o, "adam", 0, elements(extent, n) * (7 * sizeof(real) + act(o)));
  i->adam(i, param, gradient, m, v, extent, n, grad_stats, a);
  end(o);
}

static void timed_scale_dropout(vd_ops *o, int64_t n, int64_t width, double scale, const vd_dropout *dropout,
                                const vd_act *x, vd_act *y) {
  vd_ops *i = begin(o, "scale_dropout", 0, (double)(n * width) * 2 * act(o));
  i->scale_dropout(i, n, width, scale, dropout, x, y);
  end(o);
}

static void timed_position_encodings(vd_ops *o, const vd_position_encoding *e, vd_act *out) {
  vd_ops *i = begin(o, "position_encodings", 0, (double)(e->n * e->d) * act(o));
  i->position_encodings(i, e, out);
  end(o);
}

static void timed_weight_gradient(vd_ops *o, int64_t n, int64_t in, int64_t out, const vd_act *x, const real *dy,
                                  real *dweight) {
  double bytes = (double)(n * in) * act(o) + (double)(n * out + 2 * in * out) * sizeof(real);
  vd_ops *i = begin(o, "weight_gradient", 2 * (double)(n * in * out), bytes);
  i->weight_gradient(i, n, in, out, x, dy, dweight);
  end(o);
}

static void timed_destroy(vd_ops *o) {
  struct op_times *t = times_of(o);
  t->inner->destroy(t->inner);
  free(t);
}

vd_ops *op_times_wrap(vd_ops *inner, const vd_cuda_plugin *cuda) {
  struct op_times *t = vd_calloc(1, sizeof *t);
  t->inner = inner;
  t->cuda = cuda;
  t->ops = *inner; /* ops that are not timed go straight to the backend, whose state is `self` */
  vd_ops *o = &t->ops;
  o->destroy = timed_destroy;
  o->zero = timed_zero;
  o->zero_gradients = timed_zero_gradients;
  o->put_tokens = timed_put_tokens;
  if (inner->weights_changed) o->weights_changed = timed_weights_changed;
  o->embed = timed_embed;
  o->embed_backward = timed_embed_backward;
  o->linear = timed_linear;
  o->linear_backward = timed_linear_backward;
  o->add_norm = timed_add_norm;
  o->add_norm_backward = timed_add_norm_backward;
  if (inner->attention_schedule) o->attention_schedule = timed_attention_schedule;
  o->attention_project = timed_attention_project;
  o->attention_project_backward = timed_attention_project_backward;
  o->attention = timed_attention;
  o->attention_backward = timed_attention_backward;
  if (inner->backward_end) o->backward_end = timed_backward_end;
  o->memory_push = timed_memory_push;
  o->memory_ring_push = timed_memory_ring_push;
  o->cross_entropy = timed_cross_entropy;
  o->gradient_norms = timed_gradient_norms;
  o->gradient_stats = timed_gradient_stats;
  o->adagrad = timed_adagrad;
  o->adam = timed_adam;
  o->scale_dropout = timed_scale_dropout;
  o->position_encodings = timed_position_encodings;
  o->weight_gradient = timed_weight_gradient;
  return o;
}

void op_times_update(vd_ops *o) {
  struct op_times *t = times_of(o);
  int u = t->n_update - 1;
  for (int i = 0; i < t->n_call && u >= 0 && u < UPDATES; i++)
    t->line[t->call[i]].ms[u] += t->cuda->event_elapsed(t->inner, 2 * i, 2 * i + 1);
  t->on = true;
  t->counting = t->n_update == 0;
  t->n_update++;
  t->n_call = 0;
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

void op_times_print(const vd_ops *o) {
  const struct op_times *t = (const struct op_times *)(const void *)o;
  int n = t->n_update - 1 < UPDATES ? t->n_update - 1 : UPDATES;
  double total = 0, floors = 0;
  if (n < 1) return;
  printf("%-34s %6s %9s %11s %11s\n", "op", "calls", "ms", "FLOP floor", "byte floor");
  for (int i = 0; i < t->n_line; i++) {
    struct line l = t->line[i];
    qsort(l.ms, (size_t)n, sizeof *l.ms, by_value);
    double flop = l.flop / FLOP_A_MS, bytes = l.bytes / BYTES_A_MS;
    total += l.ms[n / 2];
    floors += flop > bytes ? flop : bytes;
    printf("%-34s %6d %9.4f %11.4f %11.4f\n", l.name, l.calls, l.ms[n / 2], flop, bytes);
  }
  printf("%-34s %6s %9.4f %11.4f (sum of each op's greater floor)\n", "sum of the ops", "", total, floors);
}
