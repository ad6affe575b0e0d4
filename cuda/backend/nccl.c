/* Gradient all-reduces by NCCL, and the exchange of a sharded optimizer. The communicator is non-blocking: calls return
 * while they wait for other ranks, so that another thread can abort them. */
#include "cuda/backend/nccl.h"
#include "cuda/backend/context.h"
#include "cuda/backend/gradient_stream.h"
#include "cuda/backend/nccl_library.h"
#include "cuda/backend/symmetric_memory.h"
#include "src/ops/nccl_plugin.h"

#include <nvtx3/nvToolsExt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* An all-reduce or a reduce-scatter. */
struct all_reduce {
  size_t first, n;
  bool scattered;
  cudaEvent_t ready, start, end;
};

/* A wait of the backend's stream for an all-gather. */
struct wait {
  cudaEvent_t before, after;
};

/* The operations of an update. */
struct update {
  cudaEvent_t began;
  struct all_reduce *all_reduce; /* [capacity], n of them in use */
  int n, capacity;
  struct all_reduce norms; /* of all_reduce_doubles */
  bool has_norms;
  struct wait *wait; /* [n_slot], n_wait of them in use */
  int n_wait, n_slot;
};

struct vd_nccl {
  vd_nccl_calls call;
  vd_cuda_backend *backend;
  ncclComm_t comm;
  pthread_mutex_t lock; /* guards comm, which takes calls of one thread at a time */
  cudaStream_t stream;
  struct update update[2]; /* the current and the previous one, whose all-reduces may still run */
  int current;
  int rank, size;
  cudaEvent_t stepped;   /* what an all-gather reads is there */
  cudaEvent_t *gathered; /* [n_slot] the last all-gather of each slot */
  int n_slot;
  ncclWindow_t window[2]; /* of the gradients and of what all-gathers move; NULL: not in symmetric memory */
  bool uses_symmetric;    /* an operation has used them: NCCL 2.28 cannot abort it */
};

static int fail_nccl(const vd_nccl *n, ncclResult_t r, const char *what, vd_error *err) {
  return vd_fail(err, VD_FAILED, "NCCL, %s: %s (%s)", what, n->call.error_string(r), n->call.last_error(n->comm));
}
static int fail_cuda(cudaError_t e, const char *what, vd_error *err) {
  return vd_fail(err, VD_FAILED, "NCCL, %s: %s", what, cudaGetErrorString(e));
}

static ncclResult_t async_state(vd_nccl *n) {
  ncclResult_t now = ncclSuccess;
  pthread_mutex_lock(&n->lock);
  ncclResult_t r = n->comm ? n->call.async_error(n->comm, &now) : ncclInvalidUsage;
  pthread_mutex_unlock(&n->lock);
  return r != ncclSuccess ? r : now;
}

/* Waits for the end of a non-blocking call that returned r; the communicator takes no other call before. Most calls
 * take microseconds, so the loop spins before it sleeps. */
static int finish(vd_nccl *n, ncclResult_t r, const char *what, vd_error *err) {
  for (long polls = 0; r == ncclInProgress; polls++) {
    if (polls > 10000) usleep(100);
    r = async_state(n);
  }
  return r == ncclSuccess ? VD_OK : fail_nccl(n, r, what, err);
}

static int make_events(struct all_reduce *a, vd_error *err) {
  cudaError_t e = cudaEventCreate(&a->ready);
  if (e == cudaSuccess) e = cudaEventCreate(&a->start);
  if (e == cudaSuccess) e = cudaEventCreate(&a->end);
  return e == cudaSuccess ? VD_OK : fail_cuda(e, "an event", err);
}

static struct all_reduce *next_all_reduce(vd_nccl *n, vd_error *err) {
  struct update *u = &n->update[n->current];
  if (u->n == u->capacity) {
    int capacity = 2 * u->capacity + 8;
    struct all_reduce *more = vd_calloc((size_t)capacity, sizeof *more);
    if (u->capacity > 0) memcpy(more, u->all_reduce, (size_t)u->capacity * sizeof *more);
    free(u->all_reduce);
    u->all_reduce = more;
    u->capacity = capacity;
  }
  struct all_reduce *a = &u->all_reduce[u->n];
  if (!a->end && make_events(a, err)) return NULL;
  u->n++;
  return a;
}

/* Begins an operation that reads what the backend's stream has made so far. */
static cudaError_t begin(vd_nccl *n, struct all_reduce *a) {
  cudaError_t e = cudaEventRecord(a->ready, n->backend->stream);
  if (e == cudaSuccess) e = cudaStreamWaitEvent(n->stream, a->ready, 0);
  if (e == cudaSuccess) e = vd_cuda_gradient_wait(n->backend, n->stream);
  return e == cudaSuccess ? cudaEventRecord(a->start, n->stream) : e;
}

/* A sum over the ranks: of gradients, all of it or (scattered) this rank's chunk. */
static int sum_gradients(vd_nccl *n, real *arena, size_t first, size_t count, bool scattered, vd_error *err) {
  static const char what[] = "the gradient all-reduce";
  struct all_reduce *a = next_all_reduce(n, err);
  if (!a) return err->status;
  a->first = first;
  a->n = count;
  a->scattered = scattered;
  char range[64];
  snprintf(range, sizeof range, "%s %zu MB", scattered ? "reduce-scatter" : "all-reduce",
           count * sizeof *arena / 1000000);
  nvtxRangePushA(range);
  cudaError_t e = begin(n, a);
  n->uses_symmetric = n->uses_symmetric || n->window[0];
  if (e == cudaSuccess) {
    real *x = arena + first;
    size_t chunk = count / (size_t)n->size;
    pthread_mutex_lock(&n->lock);
    ncclResult_t r = scattered ? n->call.reduce_scatter(x, x + (size_t)n->rank * chunk, chunk, ncclFloat, ncclSum,
                                                        n->comm, n->stream)
                               : n->call.all_reduce(x, x, count, ncclFloat, ncclSum, n->comm, n->stream);
    pthread_mutex_unlock(&n->lock);
    if (finish(n, r, what, err) == VD_OK) e = cudaEventRecord(a->end, n->stream);
  }
  nvtxRangePop();
  return e == cudaSuccess ? err->status : fail_cuda(e, what, err);
}

static int nccl_all_reduce(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err) {
  return sum_gradients(n, arena, first, count, false, err);
}
static int nccl_reduce_scatter(vd_nccl *n, real *arena, size_t first, size_t chunk, vd_error *err) {
  return sum_gradients(n, arena, first, chunk * (size_t)n->size, true, err);
}

static int nccl_all_reduce_doubles(vd_nccl *n, double *x, size_t count, vd_error *err) {
  static const char what[] = "the all-reduce of the gradients' norms";
  struct update *u = &n->update[n->current];
  if (!u->norms.end && make_events(&u->norms, err)) return err->status;
  u->has_norms = true;
  cudaError_t e = begin(n, &u->norms);
  if (e == cudaSuccess) {
    pthread_mutex_lock(&n->lock);
    ncclResult_t r = n->call.all_reduce(x, x, count, ncclDouble, ncclSum, n->comm, n->stream);
    pthread_mutex_unlock(&n->lock);
    if (finish(n, r, what, err) == VD_OK) e = cudaEventRecord(u->norms.end, n->stream);
  }
  if (e == cudaSuccess && err->status == VD_OK) e = cudaStreamWaitEvent(n->backend->stream, u->norms.end, 0);
  return e == cudaSuccess ? err->status : fail_cuda(e, what, err);
}

/* Events for slots up to `slot`. */
static int reserve_slot(vd_nccl *n, int slot, vd_error *err) {
  if (slot < n->n_slot) return VD_OK;
  int capacity = slot + 8;
  cudaEvent_t *more = vd_calloc((size_t)capacity, sizeof(cudaEvent_t));
  if (n->n_slot > 0) memcpy((void *)more, (void *)n->gathered, (size_t)n->n_slot * sizeof(cudaEvent_t));
  free((void *)n->gathered);
  n->gathered = more;
  for (; n->n_slot < capacity; n->n_slot++) {
    cudaError_t e = cudaEventCreateWithFlags(&n->gathered[n->n_slot], cudaEventDisableTiming);
    if (e != cudaSuccess) return fail_cuda(e, "an event", err);
  }
  return VD_OK;
}

static int nccl_all_gather(vd_nccl *n, int slot, real *arena, size_t first, size_t chunk, bool masters, vd_error *err) {
  static const char what[] = "the all-gather of weights";
  const vd_arena *a = masters ? NULL : vd_cuda_arena_of(n->backend, arena);
  size_t element = a ? n->backend->act_size : sizeof *arena;
  char *x = (a ? (char *)a->copy : (char *)arena) + first * element, range[64];
  ncclDataType_t type = !a ? ncclFloat : n->backend->type == VD_BF16 ? ncclBfloat16 : ncclHalf;
  if (reserve_slot(n, slot, err)) return err->status;
  snprintf(range, sizeof range, "all-gather %zu MB", chunk * (size_t)n->size * element / 1000000);
  nvtxRangePushA(range);
  cudaError_t e = cudaEventRecord(n->stepped, n->backend->stream);
  if (e == cudaSuccess) e = cudaStreamWaitEvent(n->stream, n->stepped, 0);
  if (e == cudaSuccess) {
    pthread_mutex_lock(&n->lock);
    ncclResult_t r = n->call.all_gather(x + (size_t)n->rank * chunk * element, x, chunk, type, n->comm, n->stream);
    pthread_mutex_unlock(&n->lock);
    if (finish(n, r, what, err) == VD_OK) e = cudaEventRecord(n->gathered[slot], n->stream);
  }
  nvtxRangePop();
  return e == cudaSuccess ? err->status : fail_cuda(e, what, err);
}

static cudaError_t next_wait(struct update *u, struct wait **wait) {
  if (u->n_wait == u->n_slot) {
    int capacity = u->n_slot + 16;
    struct wait *more = vd_calloc((size_t)capacity, sizeof *more);
    if (u->n_slot > 0) memcpy(more, u->wait, (size_t)u->n_slot * sizeof *more);
    free(u->wait);
    u->wait = more;
    u->n_slot = capacity;
  }
  struct wait *w = *wait = &u->wait[u->n_wait];
  cudaError_t e = w->before ? cudaSuccess : cudaEventCreate(&w->before);
  if (e == cudaSuccess && !w->after) e = cudaEventCreate(&w->after);
  if (e == cudaSuccess) u->n_wait++;
  return e;
}

static void nccl_wait_all_gather(vd_nccl *n, int slot) {
  struct wait *w = NULL;
  cudaError_t e = next_wait(&n->update[n->current], &w);
  if (e == cudaSuccess) e = cudaEventRecord(w->before, n->backend->stream);
  if (e == cudaSuccess) e = cudaStreamWaitEvent(n->backend->stream, n->gathered[slot], 0);
  if (e == cudaSuccess) e = cudaEventRecord(w->after, n->backend->stream);
  vd_cuda_record_error(n->backend, e, "waiting for the all-gather of weights");
}

/* All-reduces rank + 1, whose sum is known. The first all-reduce also opens the connections. */
static int check_all_reduce(vd_nccl *n, int rank, int size, vd_error *err) {
  float *x = NULL, mine = (float)(rank + 1), sum = 0, expected = 0.5F * (float)size * (float)(size + 1);
  cudaError_t e = cudaMalloc((void **)&x, sizeof *x);
  if (e == cudaSuccess) e = cudaMemcpy(x, &mine, sizeof mine, cudaMemcpyHostToDevice);
  if (e == cudaSuccess && nccl_all_reduce(n, x, 0, 1, err) == VD_OK) {
    do e = cudaStreamQuery(n->stream);
    while (e == cudaErrorNotReady && async_state(n) == ncclSuccess);
    if (async_state(n) != ncclSuccess) fail_nccl(n, async_state(n), "the first all-reduce", err);
    if (e == cudaSuccess) e = cudaMemcpy(&sum, x, sizeof sum, cudaMemcpyDeviceToHost);
  }
  if (err->status == VD_OK && e != cudaSuccess) fail_cuda(e, "the first all-reduce", err);
  if (err->status == VD_OK && sum != expected)
    vd_fail(err, VD_FAILED, "NCCL's all-reduce of 1 to %d gives %g, not %g", size, (double)sum, (double)expected);
  if (err->status == VD_OK) cudaFree(x); /* else cudaFree may wait for an all-reduce that never ends */
  n->update[n->current].n = 0;
  return err->status;
}

/* NCCL's operations get the highest priority: their few blocks start before those of the kernels that they overlap. */
static int make_streams(vd_nccl *n, vd_error *err) {
  int least = 0, greatest = 0;
  cudaError_t e = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  if (e == cudaSuccess) e = cudaStreamCreateWithPriority(&n->stream, cudaStreamNonBlocking, greatest);
  if (e == cudaSuccess) e = cudaEventCreateWithFlags(&n->stepped, cudaEventDisableTiming);
  for (int i = 0; i < 2 && e == cudaSuccess; i++) e = cudaEventCreate(&n->update[i].began);
  return e == cudaSuccess ? VD_OK : fail_cuda(e, "a stream", err);
}

static void nccl_abort(vd_nccl *n) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 2;
  bool locked = pthread_mutex_timedlock(&n->lock, &until) == 0; /* not locked where the other thread hangs */
  if (n->comm && !n->uses_symmetric) {
    n->call.abort(n->comm);
    n->comm = NULL;
  }
  if (locked) pthread_mutex_unlock(&n->lock);
}

static void deregister(vd_nccl *n, ncclWindow_t *window) {
  vd_error ignored = {0};
  pthread_mutex_lock(&n->lock);
  ncclResult_t r = n->comm ? n->call.window_deregister(n->comm, *window) : ncclInvalidUsage;
  *window = NULL;
  pthread_mutex_unlock(&n->lock);
  finish(n, r, "ncclCommWindowDeregister", &ignored);
}

/* Where ranks have no symmetric memory, NCCL 2.28 registers p in another way. A window of symmetric memory is in device
 * memory. */
static bool is_symmetric_window(ncclWindow_t window) {
  struct cudaPointerAttributes a;
  cudaError_t e = cudaPointerGetAttributes(&a, window);
  cudaGetLastError();
  return e == cudaSuccess && a.type == cudaMemoryTypeDevice;
}

/* NCCL 2.28 returns ncclSuccess although the registration still runs, and sets *window at its end. */
static int register_symmetric(vd_nccl *n, void *p, size_t bytes, ncclWindow_t *window, vd_error *err) {
  if (!vd_cuda_is_symmetric(n->backend, p)) return VD_OK;
  pthread_mutex_lock(&n->lock);
  ncclResult_t r = n->call.window_register(n->comm, p, bytes, window, NCCL_WIN_COLL_SYMMETRIC);
  pthread_mutex_unlock(&n->lock);
  if (finish(n, r == ncclSuccess ? ncclInProgress : r, "registering symmetric memory", err)) return err->status;
  if (*window && !is_symmetric_window(*window)) deregister(n, window);
  return VD_OK;
}

static int nccl_register_arenas(vd_nccl *n, real *gradients, real *params, size_t count, vd_error *err) {
  const vd_arena *a = vd_cuda_arena_of(n->backend, params);
  size_t element = a ? n->backend->act_size : sizeof *params;
  if (register_symmetric(n, gradients, count * sizeof *gradients, &n->window[0], err) == VD_OK &&
      register_symmetric(n, a ? a->copy : params, count * element, &n->window[1], err) == VD_OK)
    return VD_OK;
  n->window[0] = n->window[1] = NULL;
  nccl_abort(n); /* the other ranks may wait for this one */
  return err->status;
}

static bool nccl_is_registered(const vd_nccl *n) {
  return n->window[0] != NULL;
}

static void free_event(cudaEvent_t e) {
  if (e) cudaEventDestroy(e);
}

static void free_events(const struct all_reduce *a) {
  free_event(a->ready);
  free_event(a->start);
  free_event(a->end);
}

static void free_update(struct update *u) {
  for (int i = 0; i < u->capacity; i++) free_events(&u->all_reduce[i]);
  free_events(&u->norms);
  for (int i = 0; i < u->n_slot; i++) {
    free_event(u->wait[i].before);
    free_event(u->wait[i].after);
  }
  free_event(u->began);
  free(u->all_reduce);
  free(u->wait);
}

/* Peers read symmetric memory until the operations have ended here, too. */
static void nccl_finalize(vd_nccl *n) {
  vd_error ignored = {0};
  if (!n->comm) return;
  bool ended = cudaStreamSynchronize(n->stream) == cudaSuccess;
  for (int i = 0; i < 2 && ended; i++)
    if (n->window[i]) deregister(n, &n->window[i]);
  pthread_mutex_lock(&n->lock);
  ncclResult_t r = n->comm ? n->call.finalize(n->comm) : ncclInvalidUsage;
  pthread_mutex_unlock(&n->lock);
  bool finalized = finish(n, r, "ncclCommFinalize", &ignored) == VD_OK;
  pthread_mutex_lock(&n->lock);
  ncclComm_t comm = n->comm;
  n->comm = NULL;
  pthread_mutex_unlock(&n->lock);
  if (!comm) return; /* aborted meanwhile */
  if (finalized)
    n->call.destroy(comm);
  else
    n->call.abort(comm);
}

static void nccl_destroy(vd_nccl *n) {
  if (!n) return;
  for (int i = 0; i < 2; i++) free_update(&n->update[i]);
  for (int i = 0; i < n->n_slot; i++) free_event(n->gathered[i]);
  free_event(n->stepped);
  free((void *)n->gathered);
  if (n->stream) cudaStreamDestroy(n->stream);
  pthread_mutex_destroy(&n->lock);
  free(n);
}

static int nccl_init(vd_nccl **out, vd_ops *o, const vd_nccl_id *id, int rank, int size, vd_error *err) {
  vd_nccl_calls calls;
  *out = NULL;
  if (vd_cuda_nccl_load(&calls, err)) return err->status;
  vd_nccl *n = vd_calloc(1, sizeof *n);
  n->call = calls;
  n->backend = vd_cuda_of(o);
  n->rank = rank;
  n->size = size;
  pthread_mutex_init(&n->lock, NULL);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclUniqueId unique_id;
  memcpy(unique_id.internal, id->bytes, sizeof unique_id.internal);
  if (make_streams(n, err) == VD_OK) {
    ncclResult_t r = n->call.init(&n->comm, size, unique_id, rank, &config);
    if (finish(n, r, "ncclCommInitRankConfig", err) == VD_OK) check_all_reduce(n, rank, size, err);
  }
  if (err->status == VD_OK) {
    *out = n;
    return VD_OK;
  }
  nccl_abort(n);
  nccl_destroy(n);
  return err->status;
}

static void nccl_begin_update(vd_nccl *n) {
  n->current = 1 - n->current;
  n->update[n->current].n = n->update[n->current].n_wait = 0;
  n->update[n->current].has_norms = false;
}

static void nccl_begin_backward(vd_nccl *n) {
  vd_cuda_record_error(n->backend, cudaEventRecord(n->update[n->current].began, n->backend->stream), "an event");
}

static void nccl_wait_all_reduces(vd_nccl *n) {
  const struct update *u = &n->update[n->current];
  if (u->n > 0)
    vd_cuda_record_error(n->backend, cudaStreamWaitEvent(n->backend->stream, u->all_reduce[u->n - 1].end, 0),
                         "waiting for the gradient all-reduce");
}

static void nccl_async_error(vd_nccl *n, vd_error *err) {
  ncclResult_t now = ncclSuccess;
  if (pthread_mutex_trylock(&n->lock) != 0) return; /* the other thread holds it, and checks by itself */
  if (n->comm && n->call.async_error(n->comm, &now) == ncclSuccess && now != ncclSuccess && now != ncclInProgress)
    fail_nccl(n, now, "the gradient all-reduce", err);
  pthread_mutex_unlock(&n->lock);
}

static const struct update *update_of(const vd_nccl *n, int before) {
  return &n->update[before ? 1 - n->current : n->current];
}

static int nccl_count(const vd_nccl *n, int before) {
  return update_of(n, before)->n;
}

static bool nccl_times(const vd_nccl *n, int before, int i, vd_all_reduce_times *t) {
  const struct update *u = update_of(n, before);
  const struct all_reduce *a = &u->all_reduce[i];
  float ready, start, end;
  if (cudaEventElapsedTime(&ready, u->began, a->ready) != cudaSuccess ||
      cudaEventElapsedTime(&start, u->began, a->start) != cudaSuccess ||
      cudaEventElapsedTime(&end, u->began, a->end) != cudaSuccess) {
    cudaGetLastError(); /* cudaErrorNotReady is not an error of later calls */
    return false;
  }
  *t = (vd_all_reduce_times){a->first, a->n, a->scattered, (double)ready, (double)start, (double)end};
  return true;
}

/* Milliseconds between two events; 0 where one of them has not completed. */
static double elapsed(cudaEvent_t from, cudaEvent_t to) {
  float ms = 0;
  if (cudaEventElapsedTime(&ms, from, to) == cudaSuccess) return (double)ms;
  cudaGetLastError();
  return 0;
}

static double nccl_waited(const vd_nccl *n, int before) {
  const struct update *u = update_of(n, before);
  double ms = u->has_norms ? elapsed(u->norms.ready, u->norms.end) : 0;
  for (int i = 0; i < u->n_wait; i++) ms += elapsed(u->wait[i].before, u->wait[i].after);
  return ms;
}

const vd_nccl_plugin *vd_cuda_nccl(void) {
  static const vd_nccl_plugin table = {.version = vd_cuda_nccl_version,
                                       .unique_id = vd_cuda_nccl_unique_id,
                                       .use_symmetric_memory = vd_cuda_use_symmetric_memory,
                                       .register_arenas = nccl_register_arenas,
                                       .is_registered = nccl_is_registered,
                                       .init = nccl_init,
                                       .begin_update = nccl_begin_update,
                                       .begin_backward = nccl_begin_backward,
                                       .all_reduce = nccl_all_reduce,
                                       .reduce_scatter = nccl_reduce_scatter,
                                       .all_reduce_doubles = nccl_all_reduce_doubles,
                                       .all_gather = nccl_all_gather,
                                       .wait_all_gather = nccl_wait_all_gather,
                                       .waited = nccl_waited,
                                       .wait_all_reduces = nccl_wait_all_reduces,
                                       .async_error = nccl_async_error,
                                       .count = nccl_count,
                                       .times = nccl_times,
                                       .abort = nccl_abort,
                                       .finalize = nccl_finalize,
                                       .destroy = nccl_destroy};
  return &table;
}
