/* `--check`: what a run would do, what it needs, and whether that is there. Writes nothing. */
#include "io/checkpoint.h"
#include "src/base/machine.h"
#include "src/comm/collectives.h"
#include "src/train/train.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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
  char folder[VD_PATH];
  vd_existing_folder(path, folder, sizeof folder);
  if (access(folder, W_OK | X_OK) != 0)
    return vd_fail(err, VD_FAILED, "run%%directory = '%s' cannot be written: %s: %s", path, folder, strerror(errno));
  return VD_OK;
}

/* The window that layers have on average in the checkpoint at `path`. */
static int read_window(const vd_train *t, const char *path, int64_t *window, vd_error *err) {
  const vd_model_config *c = &t->config;
  vd_checkpoint *file;
  int64_t sum = 0;
  if (vd_checkpoint_open(&file, t->ctx->h5, path, false, err)) return err->status;
  for (int l = 0; l < (int)c->n_layer && err->status == VD_OK; l++) {
    char name[96];
    float span[1024]; /* as many as heads at most */
    hsize_t shape[3] = {(hsize_t)(c->span_per_layer ? 1 : c->n_head), 1, 1};
    float most = 0;
    snprintf(name, sizeof name, "/model/layers.%d.attn.attn.adaptive_span._mask.current_val", l);
    if (vd_checkpoint_get(file, name, VD_F32, c->span_per_layer ? 1 : 3, shape, span, err)) break;
    for (hsize_t h = 0; h < shape[0]; h++) most = span[h] > most ? span[h] : most;
    sum += vd_train_window(c, most);
  }
  *window = (sum + c->n_layer - 1) / c->n_layer;
  vd_checkpoint_close(&file);
  return err->status;
}

/* Collective. The window of every layer as this run begins: of the first spans, or of those in its checkpoint. */
static int begin_window(const vd_train *t, int64_t *window, vd_error *err) {
  const char *path = t->resume.path[0] ? t->resume.path : t->start.path;
  *window = vd_train_first_window(&t->config);
  if (!path[0] || t->config.arch == VD_TRANSFORMER_XL) return VD_OK;
  if (t->ctx->rank == 0) read_window(t, path, window, err);
  if (vd_broadcast_error(t->ctx->comm, err)) return err->status;
  MPI_Bcast(window, 1, MPI_INT64_T, 0, t->ctx->comm);
  return VD_OK;
}

static void print_memory(const vd_train *t, const char *when, int64_t window) {
  int64_t streams = vd_stream_greatest_share(t->geometry.n_stream, t->ctx->size);
  vd_train_need need;
  const double mib = 1024.0 * 1024.0, total = vd_train_memory(t, streams, window, &need);
  const vd_memory_estimate *e = &need.model;
  printf("  %s (window %lld tokens): %.1f MiB: parameters %.1f, gradients %.1f, optimiser %.1f, memories %.1f, "
         "activations %.1f, workspace %.1f, validation %.1f",
         when, (long long)window, total / mib, e->parameters / mib, e->gradients / mib, e->optimizer / mib,
         e->memories / mib, e->activations / mib, e->workspace / mib, need.evaluator / mib);
  if (t->device.is_gpu) printf(", GPU backend %.1f", need.backend / mib);
  printf("\n");
}

static void print_plan(const vd_train *t, int64_t window) {
  vd_train_print_header(t);
  if (t->resume.notice[0]) printf("%s\n", t->resume.notice);
  printf("memory a rank (the one with most streams), without the program and its libraries:\n");
  if (t->config.arch == VD_TRANSFORMER_XL) {
    print_memory(t, "with full memories", t->config.mem_len);
    return;
  }
  print_memory(t, window == vd_train_first_window(&t->config) ? "at the first spans" : "at the checkpoint's spans",
               window);
  print_memory(t, "at full spans", t->config.attn_span);
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

/* ---- what is needed, and what there is ---- */

/* As the run begins, and with all spans full. */
enum { BEGIN, FULL, N_MOMENT };

/* Needs of one rank, and what it finds. Bytes. */
struct need {
  char host[64], limit[VD_LIMIT_TEXT], gpu[128];
  unsigned char uuid[sizeof((vd_gpu *)0)->uuid];
  double host_need[N_MOMENT], host_has, process_has, gpu_need[N_MOMENT], gpu_has;
};

/* One resource, where it is scarcest. has = HUGE_VAL: without a limit that is known. */
struct resource {
  const char *name;
  double need[N_MOMENT], has;
  char where[256];
};

static struct need gather_own(const vd_train *t, const int64_t window[N_MOMENT]) {
  struct need own = {.process_has = vd_process_memory(), .gpu_has = HUGE_VAL};
  gethostname(own.host, sizeof own.host - 1);
  own.host_has = vd_host_memory("", own.limit);
  if (t->device.is_gpu) {
    memcpy(own.gpu, t->device.gpu.name, sizeof own.gpu);
    memcpy(own.uuid, t->device.gpu.uuid, sizeof own.uuid);
    own.gpu_has = (double)t->device.gpu.free_bytes;
  }
  for (int k = 0; k < N_MOMENT; k++) {
    vd_train_need parts;
    own.host_need[k] = vd_train_host_memory(t, window[k]);
    own.gpu_need[k] = t->device.is_gpu ? vd_train_memory(t, t->n_own, window[k], &parts) : 0;
  }
  return own;
}

/* Takes `other` where it is the scarcer one. */
static void keep_scarcer(struct resource *r, const struct resource *other) {
  if (!r->name || other->need[BEGIN] / other->has > r->need[BEGIN] / r->has) *r = *other;
}

/* The host with the least memory for its ranks. */
static struct resource host_memory(const struct need *all, int size) {
  struct resource scarcest = {0};
  for (int r = 0; r < size; r++) {
    struct resource host = {.name = "host memory", .has = HUGE_VAL};
    int ranks = 0;
    for (int q = 0; q < size; q++) {
      if (strcmp(all[q].host, all[r].host) != 0) continue;
      ranks++;
      for (int k = 0; k < N_MOMENT; k++) host.need[k] += all[q].host_need[k];
      host.has = fmin(host.has, all[q].host_has);
    }
    snprintf(host.where, sizeof host.where, "%d rank%s on %s, %s", ranks, ranks > 1 ? "s" : "", all[r].host,
             all[r].limit);
    keep_scarcer(&scarcest, &host);
  }
  return scarcest;
}

/* The rank with the least address space. */
static struct resource process_memory(const struct need *all, int size) {
  struct resource scarcest = {0};
  for (int r = 0; r < size; r++) {
    struct resource rank = {
        .name = "a rank's limit", .need = {all[r].host_need[BEGIN], all[r].host_need[FULL]}, .has = all[r].process_has};
    snprintf(rank.where, sizeof rank.where, "rank %d, address space (ulimit -v)", r);
    keep_scarcer(&scarcest, &rank);
  }
  return scarcest;
}

/* The GPU with the least memory for its ranks. */
static struct resource gpu_memory(const struct need *all, int size) {
  struct resource scarcest = {0};
  for (int r = 0; r < size; r++) {
    struct resource gpu = {.name = "GPU memory", .has = HUGE_VAL};
    int ranks = 0;
    for (int q = 0; q < size; q++) {
      if (memcmp(all[q].uuid, all[r].uuid, sizeof all[q].uuid) != 0) continue;
      ranks++;
      for (int k = 0; k < N_MOMENT; k++) gpu.need[k] += all[q].gpu_need[k];
      gpu.has = fmin(gpu.has, all[q].gpu_has);
    }
    snprintf(gpu.where, sizeof gpu.where, "%d rank%s on the GPU of rank %d (%.100s), host %s", ranks,
             ranks > 1 ? "s" : "", r, all[r].gpu, all[r].host);
    keep_scarcer(&scarcest, &gpu);
  }
  return scarcest;
}

/* Bytes of the checkpoints that are there: those that the run writes take their place. */
static double present_checkpoints(const char *directory) {
  char path[VD_PATH + 64];
  double bytes = 0;
  snprintf(path, sizeof path, "%s/checkpoints", directory);
  DIR *folder = opendir(path);
  for (const struct dirent *e; folder && (e = readdir(folder)) != NULL;) {
    struct stat info;
    if (strncmp(e->d_name, "update-", 7) == 0 && fstatat(dirfd(folder), e->d_name, &info, 0) == 0)
      bytes += (double)info.st_size;
  }
  if (folder) closedir(folder);
  return bytes;
}

static struct resource disk_space(const vd_train *t, const int64_t window[N_MOMENT]) {
  const char *directory = t->settings->run.directory;
  int64_t files;
  struct resource disk = {.name = "disk", .has = vd_disk_free(directory) + present_checkpoints(directory)};
  for (int k = 0; k < N_MOMENT; k++) disk.need[k] = vd_train_disk(t, window[k], &files);
  snprintf(disk.where, sizeof disk.where, "%.150s: %lld checkpoint%s, trace and log", directory, (long long)files,
           files > 1 ? "s" : "");
  return disk;
}

/* "1.3 MiB", "22.9 GiB", "1.4 TiB" or "unknown", into text [32]. */
static const char *amount(double bytes, char text[32]) {
  static const char *const units[] = {"MiB", "GiB", "TiB", "PiB", "EiB"};
  int i = 0;
  bytes /= 1048576.0;
  for (; bytes >= 1024.0 && i < 4; i++) bytes /= 1024.0;
  if (bytes < HUGE_VAL)
    snprintf(text, 32, "%.1f %s", bytes, units[i]);
  else
    snprintf(text, 32, "unknown");
  return text;
}

static void print_resource(const struct resource *r, int moments) {
  static const char *const when[N_MOMENT] = {"as the run begins", "with full spans"};
  char need[32], has[32];
  for (int k = 0; k < moments; k++)
    printf("  %-14s %-17s %11s of %11s  %-12s  %s\n", r->name, when[k], amount(r->need[k], need), amount(r->has, has),
           r->need[k] <= r->has ? "fits" : "does not fit", r->where);
}

/* Appends to text [size] the resources that are too small at a moment. */
static void list_lacking(const struct resource *r, int n, int moment, char *text, size_t size) {
  size_t used = 0;
  text[0] = '\0';
  char need[32], has[32];
  for (int i = 0; i < n && used < size; i++)
    if (r[i].need[moment] > r[i].has)
      used += (size_t)snprintf(text + used, size - used, "%s%s: %s needed, %s there (%s)", used > 0 ? "; " : "",
                               r[i].name, amount(r[i].need[moment], need), amount(r[i].has, has), r[i].where);
}

/* Rank 0. VD_FAILED where the run does not fit as it begins. */
static int check_resources(const vd_train *t, const struct need *all, const int64_t window[N_MOMENT], vd_error *err) {
  struct resource r[4] = {host_memory(all, t->ctx->size), disk_space(t, window)};
  int n = 2, moments = t->config.arch == VD_TRANSFORMER_XL ? 1 : N_MOMENT;
  char lacking[1024];
  struct resource limit = process_memory(all, t->ctx->size);
  if (limit.has < HUGE_VAL) r[n++] = limit;
  if (t->device.is_gpu) r[n++] = gpu_memory(all, t->ctx->size);
  printf("what the run needs, of what there is:\n");
  for (int i = 0; i < n; i++) print_resource(&r[i], moments);
  list_lacking(r, n, BEGIN, lacking, sizeof lacking);
  if (lacking[0])
    return vd_fail(err, VD_FAILED,
                   "the run does not fit as it begins: %s. Less memory: fewer data%%batch_streams, a smaller "
                   "data%%micro_streams or model, more hosts or GPUs; less disk: a smaller checkpoint%%keep",
                   lacking);
  list_lacking(r, n, FULL, lacking, sizeof lacking);
  if (lacking[0])
    printf("warning: the run fits as it begins, but would not if all spans grew to span%%attn_span: %s\n", lacking);
  return VD_OK;
}

static int compare_needs(const vd_train *t, int64_t begin, vd_error *err) {
  int64_t window[N_MOMENT] = {begin, t->config.arch == VD_TRANSFORMER_XL ? begin : t->config.attn_span};
  struct need own = gather_own(t, window), *all = vd_calloc((size_t)t->ctx->size, sizeof *all);
  MPI_Gather(&own, (int)sizeof own, MPI_BYTE, all, (int)sizeof own, MPI_BYTE, 0, t->ctx->comm);
  if (t->ctx->rank == 0) check_resources(t, all, window, err);
  free(all);
  return vd_broadcast_error(t->ctx->comm, err);
}

int vd_train_dry_run(vd_train *t, vd_error *err) {
  int64_t window;
  bool first = t->ctx->rank == 0;
  if (vd_device_open(t->ctx, t->settings, &t->config, &t->ops, &t->device, err) ||
      vd_device_choose_comm(t->ctx, t->settings, &t->device, err) || vd_train_check_sizes(t, err) ||
      begin_window(t, &window, err))
    return err->status;
  vd_run_facts_gather(t->ctx, &t->device, &t->config, t->corpus, &t->facts);
  if (first) check_folder(t->settings->run.directory, err);
  if (vd_broadcast_error(t->ctx->comm, err)) return err->status;
  if (first) print_plan(t, window);
  if (first && t->device.comm_notice[0]) printf("note: %s\n", t->device.comm_notice);
  print_placement(t);
  if (first && t->device.notice[0]) printf("note: %s\n", t->device.notice);
  int status = compare_needs(t, window, err);
  if (first && status == VD_OK) printf("nothing was written\n");
  if (first && fflush(stdout) != 0) vd_fail(err, VD_FAILED, "cannot write to standard output");
  return vd_broadcast_error(t->ctx->comm, err);
}
