#include "src/comm/collectives.h"
#include "src/train/train.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const double VD_GIB = 1073741824.0;

/* Where one rank runs: its line of the map. */
struct placement {
  char host[64], device[192];
  int local_rank, threads;
  int64_t first, last; /* streams */
};

/* The nearest existing folder above (or at) `path` must be writable. Root may write anywhere: what root cannot write
 * shows when the run begins. */
static int check_folder(const char *path, vd_error *err) {
  char part[VD_PATH];
  snprintf(part, sizeof part, "%s", path);
  while (access(part, F_OK) != 0 && errno == ENOENT) {
    char *slash = strrchr(part, '/');
    if (!slash) {
      snprintf(part, sizeof part, ".");
      break;
    }
    if (slash == part) slash++;
    *slash = '\0';
  }
  if (access(part, W_OK | X_OK) != 0)
    return vd_fail(err, VD_FAILED, "run%%directory = '%s' cannot be written: %s: %s", path, part, strerror(errno));
  return VD_OK;
}

/* The sum, in bytes. */
static double print_memory(const vd_train *t, const char *when, int64_t window) {
  int64_t streams = (t->geometry.n_stream + t->ctx->size - 1) / t->ctx->size;
  vd_train_need need;
  const double mib = 1024.0 * 1024.0, total = vd_train_memory(t, streams, window, &need);
  const vd_memory_estimate *e = &need.model;
  printf("  %s (window %lld tokens): %.1f MiB: parameters %.1f, gradients %.1f, optimiser %.1f, memories %.1f, "
         "activations %.1f, workspace %.1f, validation %.1f",
         when, (long long)window, total / mib, e->parameters / mib, e->gradients / mib, e->optimizer / mib,
         e->memories / mib, e->activations / mib, e->workspace / mib, need.evaluator / mib);
  if (t->device.is_gpu) printf(", GPU backend %.1f", need.backend / mib);
  printf("\n");
  return total;
}

static void print_plan(const vd_train *t) {
  const vd_settings *s = t->settings;
  printf("deck: %s: %s\n", s->origin, s->run.title);
  printf("data: %s: %lld training tokens, %lld symbols; %lld streams of blocks of %lld: %lld updates an epoch\n",
         s->data.path, (long long)t->geometry.n_token, (long long)t->config.vocab, (long long)t->geometry.n_stream,
         (long long)t->geometry.block, (long long)t->blocks);
  printf("run: %s, %lld updates, ", s->run.directory, (long long)s->run.max_updates);
  if (t->resume.path[0])
    printf("resumes after update %lld of %s\n%s", (long long)t->resume.update, t->resume.path, t->resume.notice);
  else
    printf("starts afresh\n");
  printf("memory a rank (the one with most streams), without the program and its libraries:\n");
  if (t->config.arch == VD_TRANSFORMER_XL) {
    print_memory(t, "with full memories", t->config.mem_len);
    return;
  }
  print_memory(t, "at the first spans", vd_train_first_window(&t->config));
  double full = print_memory(t, "at full spans", t->config.attn_span);
  if (t->device.is_gpu && full > (double)t->device.gpu.free_bytes)
    printf("  note: the GPU has %.1f GiB free: a run whose spans all grew to the full would end for want of memory\n",
           (double)t->device.gpu.free_bytes / VD_GIB);
}

static void print_placement(const vd_train *t) {
  struct placement own = {.threads = t->device.threads, .first = t->stream0, .last = t->stream0 + t->n_own};
  int local_size;
  gethostname(own.host, sizeof own.host - 1);
  const vd_device *d = &t->device;
  if (d->is_gpu)
    snprintf(own.device, sizeof own.device, "GPU %d of %d (%s, %.1f of %.1f GiB free)", d->number, d->count,
             d->gpu.name, (double)d->gpu.free_bytes / VD_GIB, (double)d->gpu.total_bytes / VD_GIB);
  else
    snprintf(own.device, sizeof own.device, "%s", t->ops->name);
  vd_local_rank(t->ctx->comm, &own.local_rank, &local_size);
  struct placement *all = vd_calloc((size_t)t->ctx->size, sizeof *all);
  MPI_Gather(&own, (int)sizeof own, MPI_BYTE, all, (int)sizeof own, MPI_BYTE, 0, t->ctx->comm);
  for (int r = 0; r < t->ctx->size && t->ctx->rank == 0; r++)
    printf("rank %d: host %s, local rank %d, device %s, %d threads, streams %lld to %lld\n", r, all[r].host,
           all[r].local_rank, all[r].device, all[r].threads, (long long)all[r].first, (long long)all[r].last - 1);
  free(all);
}

static void print_comm(const vd_train *t) {
  int v = t->device.nccl_version;
  if (t->device.comm == VD_COMM_NCCL)
    printf("gradients: summed by NCCL %d.%d.%d\n", v / 10000, v / 100 % 100, v % 100);
  else if (t->ctx->size > 1)
    printf("gradients: summed by MPI%s\n", t->device.is_gpu ? " through host memory" : "");
  if (t->device.comm_notice[0]) printf("%s\n", t->device.comm_notice);
}

int vd_train_dry_run(vd_train *t, vd_error *err) {
  if (vd_device_open(t->ctx, t->settings, &t->config, &t->ops, &t->device, err) ||
      vd_device_choose_comm(t->ctx, t->settings, &t->device, err))
    return err->status;
  if (t->ctx->rank == 0) check_folder(t->settings->run.directory, err);
  if (vd_broadcast_error(t->ctx->comm, err)) return err->status;
  if (t->ctx->rank == 0) print_plan(t);
  if (t->ctx->rank == 0) print_comm(t);
  print_placement(t);
  if (vd_train_check_memory(t, err)) return err->status;
  if (t->ctx->rank == 0 && t->device.notice[0]) printf("note: %s\n", t->device.notice);
  if (t->ctx->rank == 0) printf("nothing was written\n");
  if (t->ctx->rank == 0 && fflush(stdout) != 0) vd_fail(err, VD_FAILED, "cannot write to standard output");
  return vd_broadcast_error(t->ctx->comm, err);
}
