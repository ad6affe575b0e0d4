#include "backend.h"

#include "parallel.h"

#include <dlfcn.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Beside the program (as built), in ../lib (as installed), else where the loader looks. The library stays loaded: CUDA
 * does not take kindly to being unloaded. */
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

static const vd_cuda_table *find_table(vd_error *err) {
  char why[1024] = "";
  void *library = load(why, sizeof why);
  const vd_cuda_table *table = library ? dlsym(library, "vd_cuda") : NULL;
  if (!library) {
    vd_fail(err, VD_FAILED, "%s", why);
  } else if (!table || table->interface_version != VD_CUDA_INTERFACE) {
    vd_fail(err, VD_FAILED, "libviaduct_cuda.so is of another build than this program: build and install both anew");
    return NULL;
  }
  return table;
}

static enum vd_precision precision_of(const vd_settings *s) {
  if (strcmp(s->device.precision, "fp32") == 0) return VD_FP32;
  return strcmp(s->device.precision, "fp16") == 0 ? VD_FP16 : VD_BF16;
}

static int open_gpu(const vd_settings *s, vd_ops **ops, vd_device *d, vd_error *err) {
  const vd_cuda_table *table = find_table(err);
  if (!table || table->count(&d->count, err)) return err->status;
  d->number = d->local_rank % d->count;
  d->precision = precision_of(s);
  if (table->describe(d->number, &d->gpu, err) || table->ops(ops, d->number, d->precision, err)) return err->status;
  d->is_gpu = true;
  return VD_OK;
}

static int open_cpu(const vd_settings *s, int threads, vd_ops **ops, vd_error *err) {
  if (strcmp(s->device.precision, "auto") != 0 && strcmp(s->device.precision, "fp32") != 0)
    return vd_fail(err, VD_USAGE, "device%%precision = '%s' is for GPUs; the CPU computes in 'fp32'",
                   s->device.precision);
  return vd_ops_cpu(ops, threads, err);
}

/* Launchers may show each rank GPUs of its own, so that numbers say nothing of which GPU it is: UUIDs do. */
static void count_gpus(vd_context *ctx, vd_device *d) {
  enum { ID = sizeof d->gpu.uuid };
  unsigned char *all = vd_calloc((size_t)ctx->size, ID);
  MPI_Allgather(d->gpu.uuid, ID, MPI_BYTE, all, ID, MPI_BYTE, ctx->comm);
  for (int r = 0; r < ctx->size; r++) {
    bool seen = false;
    for (int other = 0; other < r && !seen; other++) seen = memcmp(all + r * ID, all + other * ID, ID) == 0;
    if (!seen) d->n_gpu++;
  }
  free(all);
  d->shared = d->n_gpu < ctx->size;
  if (d->shared)
    snprintf(d->notice, sizeof d->notice, "%d ranks share %d GPU%s: one rank per GPU is faster", ctx->size, d->n_gpu,
             d->n_gpu > 1 ? "s" : "");
}

/* True where GPUs compute; else *why holds the reason, agreed. */
static bool all_have_gpus(vd_context *ctx, const vd_settings *s, vd_ops **ops, vd_device *d, vd_error *why) {
  open_gpu(s, ops, d, why);
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

int vd_backend_open(vd_context *ctx, const vd_settings *s, vd_ops **ops, vd_device *d, vd_error *err) {
  vd_error why = {0};
  *ops = NULL;
  *d = (vd_device){.threads = vd_threads(ctx->comm, s->device.threads)};
  vd_local_rank(ctx->comm, &d->local_rank, &d->local_size);
  if (strcmp(s->device.backend, "cpu") != 0) {
    if (all_have_gpus(ctx, s, ops, d, &why)) return VD_OK;
    if (strcmp(s->device.backend, "cuda") == 0)
      return vd_fail(err, VD_FAILED, "device%%backend = 'cuda': %s", why.message);
    snprintf(d->notice, sizeof d->notice, "computes on the CPU: %.1000s", why.message);
  }
  open_cpu(s, d->threads, ops, err);
  return vd_agree(ctx->comm, err);
}
