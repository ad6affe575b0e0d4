/* The CPU backend: the table of operations, memory and copies. An activation is a real here. */
#include "src/cpu/attention.h"
#include "src/cpu/cpu.h"

#include <malloc.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum { VD_CACHE_LINE = 64 };

static int cpu_alloc(vd_ops *o, size_t bytes, void **p, vd_error *err) {
  (void)o;
  size_t rounded = (bytes + VD_CACHE_LINE) / VD_CACHE_LINE * VD_CACHE_LINE;
  *p = aligned_alloc(VD_CACHE_LINE, rounded);
  if (!*p) return vd_fail(err, VD_FAILED, "out of memory: %.1f MiB asked for", (double)bytes / 1048576.0);
  memset(*p, 0, rounded);
  return VD_OK;
}
static void cpu_free(vd_ops *o, void *p) {
  (void)o;
  free(p);
}
static void cpu_zero(vd_ops *o, void *p, size_t bytes) {
  (void)o;
  memset(p, 0, bytes);
}
static void cpu_zero_gradients(vd_ops *o, real *gradients, size_t n) {
  cpu_zero(o, gradients, n * sizeof *gradients);
}
static void cpu_put(vd_ops *o, real *device, const real *host, size_t n) {
  (void)o;
  memcpy(device, host, n * sizeof *host);
}
static void cpu_get(vd_ops *o, real *host, const real *device, size_t n) {
  (void)o;
  memcpy(host, device, n * sizeof *host);
}
static void cpu_put_tokens(vd_ops *o, int32_t *device, const int32_t *host, size_t n) {
  (void)o;
  memcpy(device, host, n * sizeof *host);
}
static void cpu_put_act(vd_ops *o, vd_act *device, const real *host, size_t n) {
  cpu_put(o, device, host, n);
}
static void cpu_get_act(vd_ops *o, real *host, const vd_act *device, size_t n) {
  cpu_get(o, host, device, n);
}
static void cpu_get_double(vd_ops *o, double *host, const double *device, size_t n) {
  (void)o;
  memcpy(host, device, n * sizeof *host);
}
static int cpu_synchronize(vd_ops *o, vd_error *err) {
  (void)o;
  return err->status;
}

/* Pinned slots: on the CPU a push copies at once. */
typedef struct cpu_self {
  void *slot[VD_PINNED_SLOTS];
} cpu_self;

static int cpu_push_stats(vd_ops *o, int slot, int n, const vd_stats_part *part, vd_error *err) {
  cpu_self *self = o->self;
  size_t bytes = 0, at = 0;
  for (int i = 0; i < n; i++) bytes += part[i].bytes;
  char *copy = realloc(self->slot[slot], bytes > 0 ? bytes : 1);
  if (!copy) return vd_fail(err, VD_FAILED, "out of memory: %zu bytes asked for", bytes);
  self->slot[slot] = copy;
  for (int i = 0; i < n; at += part[i++].bytes) memcpy(copy + at, part[i].p, part[i].bytes);
  return VD_OK;
}
static const void *cpu_pull_stats(vd_ops *o, int slot, vd_error *err) {
  (void)err;
  return ((cpu_self *)o->self)->slot[slot];
}
static void cpu_destroy(vd_ops *o) {
  cpu_self *self = o->self;
  for (int i = 0; i < VD_PINNED_SLOTS; i++) free(self->slot[i]);
  free(self);
  free(o);
}

static void cpu_add_constant(vd_ops *o, real *x, size_t n, double value) {
  (void)o;
  for (size_t i = 0; i < n; i++) x[i] += (real)value;
}
static void cpu_clamp01(vd_ops *o, real *x, size_t n) {
  (void)o;
  for (size_t i = 0; i < n; i++) x[i] = x[i] < 0 ? 0 : x[i] > 1 ? 1 : x[i];
}

int vd_ops_cpu(vd_ops **o, int threads, vd_error *err) {
  (void)err;
  if (threads > 0) omp_set_num_threads(threads);
  /* Workspaces of an op are freed and allocated again in the next: the system would have to clear their pages each time
   * if the allocator gave them back. 32 MiB is the most that glibc takes. */
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
  vd_ops *t = vd_calloc(1, sizeof *t);
  *t = (vd_ops){.name = "cpu",
                .act_size = sizeof(real),
                .self = vd_calloc(1, sizeof(cpu_self)),
                .alloc = cpu_alloc,
                .free = cpu_free,
                .zero = cpu_zero,
                .zero_gradients = cpu_zero_gradients,
                .put = cpu_put,
                .get = cpu_get,
                .put_tokens = cpu_put_tokens,
                .put_act = cpu_put_act,
                .get_act = cpu_get_act,
                .get_double = cpu_get_double,
                .push_stats = cpu_push_stats,
                .pull_stats = cpu_pull_stats,
                .check = cpu_synchronize,
                .synchronize = cpu_synchronize,
                .destroy = cpu_destroy,
                .embed = vd_cpu_embed,
                .embed_backward = vd_cpu_embed_backward,
                .linear = vd_cpu_linear,
                .linear_backward = vd_cpu_linear_backward,
                .add_norm = vd_cpu_add_norm,
                .add_norm_backward = vd_cpu_add_norm_backward,
                .attention_project = vd_cpu_attention_project,
                .attention_project_backward = vd_cpu_attention_project_backward,
                .attention = vd_cpu_attention,
                .attention_backward = vd_cpu_attention_backward,
                .memory_push = vd_cpu_memory_push,
                .memory_ring_push = vd_cpu_memory_ring_push,
                .cross_entropy = vd_cpu_cross_entropy,
                .add_constant = cpu_add_constant,
                .square_sums = vd_cpu_square_sums,
                .gradient_norms = vd_cpu_gradient_norms,
                .gradient_stats = vd_cpu_gradient_stats,
                .adagrad = vd_cpu_adagrad,
                .adam = vd_cpu_adam,
                .clamp01 = cpu_clamp01,
                .scale_dropout = vd_cpu_scale_dropout,
                .position_encodings = vd_cpu_position_encodings,
                .weight_gradient = vd_cpu_weight_gradient};
  *o = t;
  return VD_OK;
}
