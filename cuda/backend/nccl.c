/* Sums over GPUs by NCCL. The communicator does not block: calls return while they wait for other ranks, so that they
 * can be given up. */
#include "cuda/backend/nccl.h"
#include "cuda/backend/context.h"
#include "src/ops/nccl_plugin.h"

#include <dlfcn.h>
#include <nccl.h>
#include <nvtx3/nvToolsExt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(vd_nccl_id) == sizeof(ncclUniqueId), "NCCL's name of a group has another size");
enum { VD_OLDEST_NCCL = 21400 }; /* of the first with communicators that do not block */

/* The functions of libnccl.so.2 that are used. */
struct calls {
  ncclResult_t (*version)(int *);
  ncclResult_t (*unique_id)(ncclUniqueId *);
  ncclResult_t (*init)(ncclComm_t *, int, ncclUniqueId, int, ncclConfig_t *);
  ncclResult_t (*all_reduce)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t);
  ncclResult_t (*async_error)(ncclComm_t, ncclResult_t *);
  ncclResult_t (*finalize)(ncclComm_t);
  ncclResult_t (*destroy)(ncclComm_t);
  ncclResult_t (*abort)(ncclComm_t);
  const char *(*error_string)(ncclResult_t);
  const char *(*last_error)(ncclComm_t);
};

struct sum {
  size_t first, n;
  cudaEvent_t ready, start, end;
};

/* Those of an update. */
struct sums {
  cudaEvent_t began;
  struct sum *sum; /* [room], n of them in use */
  int n, room;
};

struct vd_nccl {
  struct calls call;
  vd_cuda_backend *backend;
  ncclComm_t comm;
  pthread_mutex_t lock; /* of comm: NCCL wants one thread at a time */
  cudaStream_t stream;
  struct sums sums[2]; /* of this update and of the one before, which may be under way still */
  int now;             /* that of this update */
};

static int load(struct calls *c, vd_error *err) {
  const char *const names[] = {"ncclGetVersion",        "ncclGetUniqueId",  "ncclCommInitRankConfig", "ncclAllReduce",
                               "ncclCommGetAsyncError", "ncclCommFinalize", "ncclCommDestroy",        "ncclCommAbort",
                               "ncclGetErrorString",    "ncclGetLastError"};
  void *found[sizeof names / sizeof *names];
  _Static_assert(sizeof found == sizeof *c, "a name for each function");
  setenv("NCCL_NVLS_ENABLE", "0", 0); /* multicast needs a fabric manager in order; where it is not, it hangs */
  void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!library) return vd_fail(err, VD_FAILED, "NCCL cannot be loaded: %s", dlerror());
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    found[i] = dlsym(library, names[i]);
    if (!found[i]) return vd_fail(err, VD_FAILED, "this libnccl.so.2 is too old: it has no %s", names[i]);
  }
  memcpy(c, found, sizeof *c);
  return VD_OK;
}

static int nccl_version(int *version, vd_error *err) {
  struct calls c;
  if (load(&c, err)) return err->status;
  if (c.version(version) != ncclSuccess) return vd_fail(err, VD_FAILED, "NCCL does not tell its version");
  if (*version < VD_OLDEST_NCCL)
    return vd_fail(err, VD_FAILED, "NCCL %d.%d.%d is too old: 2.14 is the first that will do", *version / 10000,
                   *version / 100 % 100, *version % 100);
  return VD_OK;
}

static int nccl_new_id(vd_nccl_id *id, vd_error *err) {
  struct calls c;
  if (load(&c, err)) return err->status;
  ncclUniqueId mine;
  ncclResult_t r = c.unique_id(&mine);
  if (r != ncclSuccess) return vd_fail(err, VD_FAILED, "NCCL: %s: %s", c.error_string(r), c.last_error(NULL));
  memcpy(id->bytes, mine.internal, sizeof id->bytes);
  return VD_OK;
}

static int fail_nccl(const vd_nccl *n, ncclResult_t r, const char *what, vd_error *err) {
  return vd_fail(err, VD_FAILED, "NCCL, %s: %s (%s)", what, n->call.error_string(r), n->call.last_error(n->comm));
}
static int fail_cuda(cudaError_t e, const char *what, vd_error *err) {
  return vd_fail(err, VD_FAILED, "NCCL, %s: %s", what, cudaGetErrorString(e));
}

static ncclResult_t state_of(vd_nccl *n) {
  ncclResult_t now = ncclSuccess;
  pthread_mutex_lock(&n->lock);
  ncclResult_t r = n->comm ? n->call.async_error(n->comm, &now) : ncclInvalidUsage;
  pthread_mutex_unlock(&n->lock);
  return r != ncclSuccess ? r : now;
}

/* A call that returned r, to its end: until then nothing may be asked of the communicator. Most take microseconds. */
static int finish(vd_nccl *n, ncclResult_t r, const char *what, vd_error *err) {
  for (long turn = 0; r == ncclInProgress; turn++) {
    if (turn > 10000) usleep(100);
    r = state_of(n);
  }
  return r == ncclSuccess ? VD_OK : fail_nccl(n, r, what, err);
}

static int make_sum(struct sum *s, vd_error *err) {
  cudaError_t e = cudaEventCreate(&s->ready);
  if (e == cudaSuccess) e = cudaEventCreate(&s->start);
  if (e == cudaSuccess) e = cudaEventCreate(&s->end);
  return e == cudaSuccess ? VD_OK : fail_cuda(e, "an event", err);
}

static struct sum *next_sum(vd_nccl *n, vd_error *err) {
  struct sums *u = &n->sums[n->now];
  if (u->n == u->room) {
    int room = 2 * u->room + 8;
    struct sum *more = vd_calloc((size_t)room, sizeof *more);
    if (u->room > 0) memcpy(more, u->sum, (size_t)u->room * sizeof *more);
    free(u->sum);
    u->sum = more;
    u->room = room;
  }
  struct sum *s = &u->sum[u->n];
  if (!s->end && make_sum(s, err)) return NULL;
  u->n++;
  return s;
}

static int nccl_sum(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err) {
  struct sum *s = next_sum(n, err);
  if (!s) return err->status;
  s->first = first;
  s->n = count;
  char range[64];
  snprintf(range, sizeof range, "sum %zu MB", count * sizeof *arena / 1000000);
  nvtxRangePushA(range);
  cudaError_t e = cudaEventRecord(s->ready, n->backend->stream);
  if (e == cudaSuccess) e = cudaStreamWaitEvent(n->stream, s->ready, 0);
  if (e == cudaSuccess) e = cudaEventRecord(s->start, n->stream);
  if (e == cudaSuccess) {
    pthread_mutex_lock(&n->lock);
    ncclResult_t r = n->call.all_reduce(arena + first, arena + first, count, ncclFloat, ncclSum, n->comm, n->stream);
    pthread_mutex_unlock(&n->lock);
    if (finish(n, r, "summing gradients", err) == VD_OK) e = cudaEventRecord(s->end, n->stream);
  }
  nvtxRangePop();
  return e == cudaSuccess ? err->status : fail_cuda(e, "summing gradients", err);
}

/* The sum of rank + 1 is known, and its making opens the connections. */
static int try_sum(vd_nccl *n, int rank, int size, vd_error *err) {
  float *x = NULL, mine = (float)(rank + 1), sum = 0, expected = 0.5F * (float)size * (float)(size + 1);
  cudaError_t e = cudaMalloc((void **)&x, sizeof *x);
  if (e == cudaSuccess) e = cudaMemcpy(x, &mine, sizeof mine, cudaMemcpyHostToDevice);
  if (e == cudaSuccess && nccl_sum(n, x, 0, 1, err) == VD_OK) {
    do e = cudaStreamQuery(n->stream);
    while (e == cudaErrorNotReady && state_of(n) == ncclSuccess);
    if (state_of(n) != ncclSuccess) fail_nccl(n, state_of(n), "the first sum", err);
    if (e == cudaSuccess) e = cudaMemcpy(&sum, x, sizeof sum, cudaMemcpyDeviceToHost);
  }
  if (err->status == VD_OK && e != cudaSuccess) fail_cuda(e, "the first sum", err);
  if (err->status == VD_OK && sum != expected)
    vd_fail(err, VD_FAILED, "NCCL's sum of 1 to %d is %g, not %g", size, (double)sum, (double)expected);
  if (err->status == VD_OK) cudaFree(x); /* else it may wait for a sum that is never over */
  n->sums[n->now].n = 0;
  return err->status;
}

/* Sums go before the kernels that they run beside. */
static int make_streams(vd_nccl *n, vd_error *err) {
  int least = 0, greatest = 0;
  cudaError_t e = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  if (e == cudaSuccess) e = cudaStreamCreateWithPriority(&n->stream, cudaStreamNonBlocking, greatest);
  for (int i = 0; i < 2 && e == cudaSuccess; i++) e = cudaEventCreate(&n->sums[i].began);
  return e == cudaSuccess ? VD_OK : fail_cuda(e, "a stream", err);
}

static void nccl_abort(vd_nccl *n) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 2;
  bool locked =
      pthread_mutex_timedlock(&n->lock, &until) == 0; /* without it where the other thread does not come back */
  if (n->comm) n->call.abort(n->comm);
  n->comm = NULL;
  if (locked) pthread_mutex_unlock(&n->lock);
}

static void free_sums(struct sums *u) {
  for (int i = 0; i < u->room; i++) {
    if (u->sum[i].ready) cudaEventDestroy(u->sum[i].ready);
    if (u->sum[i].start) cudaEventDestroy(u->sum[i].start);
    if (u->sum[i].end) cudaEventDestroy(u->sum[i].end);
  }
  if (u->began) cudaEventDestroy(u->began);
  free(u->sum);
}

static void nccl_close(vd_nccl *n) {
  vd_error ignored = {0};
  if (!n) return;
  if (n->comm && finish(n, n->call.finalize(n->comm), "ending", &ignored) == VD_OK)
    n->call.destroy(n->comm);
  else if (n->comm)
    n->call.abort(n->comm);
  for (int i = 0; i < 2; i++) free_sums(&n->sums[i]);
  if (n->stream) cudaStreamDestroy(n->stream);
  pthread_mutex_destroy(&n->lock);
  free(n);
}

static int nccl_open(vd_nccl **out, vd_ops *o, const vd_nccl_id *id, int rank, int size, vd_error *err) {
  struct calls calls;
  *out = NULL;
  if (load(&calls, err)) return err->status;
  vd_nccl *n = vd_calloc(1, sizeof *n);
  n->call = calls;
  n->backend = vd_cuda_of(o);
  pthread_mutex_init(&n->lock, NULL);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclUniqueId group;
  memcpy(group.internal, id->bytes, sizeof group.internal);
  if (make_streams(n, err) == VD_OK) {
    ncclResult_t r = n->call.init(&n->comm, size, group, rank, &config);
    if (finish(n, r, "opening", err) == VD_OK) try_sum(n, rank, size, err);
  }
  if (err->status == VD_OK) {
    *out = n;
    return VD_OK;
  }
  nccl_abort(n);
  nccl_close(n);
  return err->status;
}

static void nccl_begin(vd_nccl *n) {
  n->now = 1 - n->now;
  n->sums[n->now].n = 0;
  vd_cuda_record_error(n->backend, cudaEventRecord(n->sums[n->now].began, n->backend->stream), "an event");
}

static void nccl_join(vd_nccl *n) {
  const struct sums *u = &n->sums[n->now];
  if (u->n > 0)
    vd_cuda_record_error(n->backend, cudaStreamWaitEvent(n->backend->stream, u->sum[u->n - 1].end, 0),
                         "waiting for the gradient sum");
}

static void nccl_look(vd_nccl *n, vd_error *err) {
  ncclResult_t now = ncclSuccess;
  if (pthread_mutex_trylock(&n->lock) != 0) return; /* the other thread asks itself */
  if (n->comm && n->call.async_error(n->comm, &now) == ncclSuccess && now != ncclSuccess && now != ncclInProgress)
    fail_nccl(n, now, "summing gradients", err);
  pthread_mutex_unlock(&n->lock);
}

static const struct sums *sums_of(const vd_nccl *n, int before) {
  return &n->sums[before ? 1 - n->now : n->now];
}

static int nccl_count(const vd_nccl *n, int before) {
  return sums_of(n, before)->n;
}

static bool nccl_times(const vd_nccl *n, int before, int i, vd_all_reduce_times *t) {
  const struct sums *u = sums_of(n, before);
  const struct sum *s = &u->sum[i];
  float ready, start, end;
  if (cudaEventElapsedTime(&ready, u->began, s->ready) != cudaSuccess ||
      cudaEventElapsedTime(&start, u->began, s->start) != cudaSuccess ||
      cudaEventElapsedTime(&end, u->began, s->end) != cudaSuccess) {
    cudaGetLastError(); /* an event that is not there yet is no fault of later calls */
    return false;
  }
  *t = (vd_all_reduce_times){s->first, s->n, (double)ready, (double)start, (double)end};
  return true;
}

const vd_nccl_plugin *vd_cuda_nccl(void) {
  static const vd_nccl_plugin table = {nccl_version, nccl_new_id, nccl_open,  nccl_begin, nccl_sum,  nccl_join,
                                       nccl_look,    nccl_count,  nccl_times, nccl_abort, nccl_close};
  return &table;
}
