#include "src/comm/device.h"

#include "src/comm/collectives.h"

#include <dlfcn.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Loads the CUDA part from the program's folder (as built), from ../lib (as installed), or from the loader's path. It
 * stays loaded: CUDA's own threads and exit handlers refer to it until the process ends. */
static void *load(char *why, size_t size) {
  char program[VD_PATH], path[VD_PATH + 64];
  ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
  const char *folder = ".";
  if (n > 0) {
    program[n] = '\0';
    folder = dirname(program);
  }
  const char *const places[] = {"", "../lib/"};
  for (int i = 0; i < 2; i++) {
    snprintf(path, sizeof path, "%s/%slibviaduct_cuda.so", folder, places[i]);
    if (access(path, F_OK) != 0) continue;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) snprintf(why, size, "%s", dlerror());
    return library;
  }
  void *library = dlopen("libviaduct_cuda.so", RTLD_NOW | RTLD_LOCAL);
  if (!library)
    snprintf(why, size, "this program has no libviaduct_cuda.so (it was built without CUDA; looked in %s)", folder);
  return library;
}

static const vd_cuda_plugin *find_table(vd_error *err) {
  char why[1024] = "";
  void *library = load(why, sizeof why);
  const vd_cuda_plugin *table = library ? dlsym(library, "vd_cuda") : NULL;
  if (!library) {
    vd_fail(err, VD_FAILED, "%s", why);
  } else if (!table || table->interface_version != VD_CUDA_INTERFACE) {
    vd_fail(err, VD_FAILED, "libviaduct_cuda.so is of another build than this program: build and install both anew");
    return NULL;
  }
  return table;
}

static enum vd_precision precision_of(const vd_settings *s) {
  return s->device.precision == VD_PRECISION_AUTO ? VD_BF16 : s->device.precision;
}

int vd_device_supports(enum vd_precision precision, const vd_model_config *c, vd_error *err) {
  int64_t step = precision == VD_FP32 ? 4 : 8; /* 16 bytes */
  if (c->n_head > VD_CUDA_MAX_HEADS)
    return vd_fail(err, VD_FAILED, "a layer has at most %d heads on a GPU, and model%%n_head = %lld", VD_CUDA_MAX_HEADS,
                   (long long)c->n_head);
  if (c->d_head > VD_CUDA_MAX_D_HEAD || c->d_head % step != 0)
    return vd_fail(
        err, VD_FAILED,
        "on a GPU heads are at most %d wide and a multiple of %lld (8 in 'bf16' and 'fp16', 4 in 'fp32'), and "
        "these have %lld (model%%d_head, or model%%d_model / model%%n_head)",
        VD_CUDA_MAX_D_HEAD, (long long)step, (long long)c->d_head);
  /* Keys and values of a window are numbered in 32 bits (cuda/attention/scheduler.cu), and windows grow in training. */
  const bool xl = c->arch == VD_TRANSFORMER_XL;
  const int64_t longest = xl ? c->mem_len : c->attn_span, most = vd_cuda_max_window(c->n_head * c->d_head);
  if (longest > most)
    return vd_fail(err, VD_FAILED,
                   "on a GPU %s is at most %lld where all heads of a layer are %lld wide together, and it is %lld",
                   xl ? "memory%mem_len" : "span%attn_span", (long long)most, (long long)(c->n_head * c->d_head),
                   (long long)longest);
  return VD_OK;
}

static int open_gpu(const vd_settings *s, const vd_model_config *model, vd_ops **ops, vd_device *d, vd_error *err) {
  const vd_cuda_plugin *table = find_table(err);
  if (!table || table->count(&d->count, err)) return err->status;
  d->number = d->local_rank % d->count;
  d->precision = precision_of(s);
  if (vd_device_supports(d->precision, model, err)) return err->status;
  if (table->describe(d->number, &d->gpu, err) || table->ops(ops, d->number, d->precision, err)) return err->status;
  d->is_gpu = true;
  d->cuda = table;
  return VD_OK;
}

static int open_cpu(const vd_settings *s, int threads, vd_ops **ops, vd_error *err) {
  enum vd_precision p = s->device.precision;
  if (p == VD_BF16 || p == VD_FP16)
    return vd_fail(err, VD_USAGE, "device%%precision = '%s' is for GPUs; the CPU computes in 'fp32'",
                   p == VD_BF16 ? "bf16" : "fp16");
  return vd_ops_cpu(ops, threads, err);
}

/* Placement of a rank. The UUID identifies its GPU: device numbers do not, since launchers may show each rank GPUs of
 * its own. */
struct place {
  unsigned char uuid[sizeof((vd_gpu *)0)->uuid];
  char host[64];
  int number;
};

/* Text that names the ranks of one GPU. */
static void describe_sharing(const struct place *all, int size, int first, char *out, size_t capacity) {
  const struct place *p = &all[first];
  const unsigned char *u = p->uuid;
  int n = 0;
  size_t used = (size_t)snprintf(out, capacity, "ranks");
  for (int r = first; r < size; r++) {
    if (memcmp(all[r].uuid, p->uuid, sizeof p->uuid) != 0) continue;
    if (++n <= 8 && used < capacity)
      used += (size_t)snprintf(out + used, capacity - used, "%s %d", n > 1 ? "," : "", r);
  }
  if (used < capacity)
    snprintf(out + used, capacity - used,
             "%s have GPU %d of host %s together (GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-"
             "%02x%02x%02x%02x%02x%02x)",
             n > 8 ? ", ..." : "", p->number, p->host, u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9],
             u[10], u[11], u[12], u[13], u[14], u[15]);
}

static void count_gpus(vd_context *ctx, vd_device *d) {
  struct place own = {.number = d->number}, *all = vd_calloc((size_t)ctx->size, sizeof *all);
  memcpy(own.uuid, d->gpu.uuid, sizeof own.uuid);
  gethostname(own.host, sizeof own.host - 1);
  MPI_Allgather(&own, (int)sizeof own, MPI_BYTE, all, (int)sizeof own, MPI_BYTE, ctx->comm);
  for (int r = 0; r < ctx->size; r++) {
    int seen = 0;
    while (memcmp(all[r].uuid, all[seen].uuid, sizeof own.uuid) != 0) seen++;
    if (seen == r)
      d->n_gpu++;
    else if (!d->sharing[0])
      describe_sharing(all, ctx->size, seen, d->sharing, sizeof d->sharing);
  }
  free(all);
  d->shared = d->n_gpu < ctx->size;
  if (d->shared)
    snprintf(d->notice, sizeof d->notice, "%d ranks share %d GPU%s: one rank per GPU is faster", ctx->size, d->n_gpu,
             d->n_gpu > 1 ? "s" : "");
}

/* Collective. True when every rank has a GPU; else *why holds the reason, the same on all ranks. */
static bool all_have_gpus(vd_context *ctx, const vd_settings *s, const vd_model_config *model, vd_ops **ops,
                          vd_device *d, vd_error *why) {
  open_gpu(s, model, ops, d, why);
  if (vd_agree(ctx->comm, why) == VD_OK) {
    count_gpus(ctx, d);
    return true;
  }
  if (*ops) (*ops)->destroy(*ops);
  *ops = NULL;
  d->is_gpu = false;
  d->precision = VD_FP32;
  return false;
}

int vd_device_open(vd_context *ctx, const vd_settings *s, const vd_model_config *model, vd_ops **ops, vd_device *d,
                   vd_error *err) {
  vd_error why = {0};
  *ops = NULL;
  *d = (vd_device){.threads = vd_threads(ctx->comm, s->device.threads)};
  vd_local_rank(ctx->comm, &d->local_rank, &d->local_size);
  d->one_node = d->local_size == ctx->size; /* the same on all ranks */
  if (s->device.backend != VD_BACKEND_CPU) {
    if (all_have_gpus(ctx, s, model, ops, d, &why)) return VD_OK;
    if (s->device.backend == VD_BACKEND_CUDA)
      return vd_fail(err, VD_FAILED, "device%%backend = 'cuda': %s", why.message);
    snprintf(d->notice, sizeof d->notice, "computes on the CPU: %.1000s", why.message);
  }
  if (open_cpu(s, d->threads, ops, err) && why.message[0])
    vd_wrap(err, "no GPU can be used (%.1000s), and on a CPU", why.message);
  return vd_agree(ctx->comm, err);
}

/* Collective. VD_OK when NCCL can all-reduce, else the reason, the same on all ranks. */
static int find_nccl(vd_context *ctx, vd_device *d, vd_error *why) {
  if (d->shared)
    return vd_fail(why, VD_FAILED, "NCCL wants a GPU for every rank, and %s; start at most one rank a GPU", d->sharing);
  d->cuda->nccl()->version(&d->nccl_version, why);
  if (vd_agree(ctx->comm, why)) return why->status;
  int mine[2] = {d->nccl_version, -d->nccl_version}, most[2];
  MPI_Allreduce(mine, most, 2, MPI_INT, MPI_MAX, ctx->comm);
  if (most[0] != -most[1])
    return vd_fail(why, VD_FAILED, "ranks find different versions of NCCL, from %d to %d", -most[1], most[0]);
  return VD_OK;
}

int vd_device_choose_comm(vd_context *ctx, const vd_settings *s, vd_device *d, vd_error *err) {
  bool asked = s->device.comm == VD_COMM_NCCL;
  vd_error why = {0};
  d->comm = VD_COMM_MPI;
  if (s->device.comm == VD_COMM_MPI || (!asked && (ctx->size == 1 || !d->is_gpu))) return VD_OK;
  if (!d->is_gpu)
    return vd_fail(err, VD_FAILED, "device%%comm = 'nccl' is for GPUs, and this run %.1500s",
                   d->notice[0] ? d->notice : "computes on the CPU");
  if (find_nccl(ctx, d, &why) == VD_OK) {
    d->comm = VD_COMM_NCCL;
    return VD_OK;
  }
  if (asked) return vd_fail(err, VD_FAILED, "device%%comm = 'nccl': %s", why.message);
  snprintf(d->comm_notice, sizeof d->comm_notice, "gradients are summed by MPI through host memory: %.1000s",
           why.message);
  return VD_OK;
}
