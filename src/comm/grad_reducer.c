#include "src/comm/grad_reducer.h"

#include "src/comm/collectives.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TIMELINE_FROM = 11, TIMELINE_TO = 20 }; /* updates; the first ones choose kernels and allocate */

/* MPI: when an update's last backward pass began and ended, and the seconds of its all-reduce. NCCL has its own events.
 */
struct times {
  double began, ended, waited;
};

struct vd_grad_reducer {
  MPI_Comm comm;
  int rank, size;
  vd_grad_reducer_config config;
  vd_ops *ops;
  vd_watchdog *watch;      /* NULL: one rank, MPI */
  vd_nccl *nccl;           /* NULL: MPI */
  real *gradients, *stage; /* stage: host [bucket] for gradients on a GPU */
  size_t n, bucket;        /* elements */
  int64_t update;          /* the last that began, counted from 1 */
  int64_t timed;           /* updates whose times were read */
  FILE *timeline;          /* NULL: none */
  bool failed;             /* aborted */
  /* Of this update: gradients from `pending` on are final; the all-reduce of those from `launched` on has started. */
  size_t pending, launched;
  struct times times[2]; /* of the last two updates, at the update's number modulo 2 */
  vd_error error;
};

static const vd_nccl_plugin *nccl_of(const vd_grad_reducer *r) {
  return r->config.nccl;
}

static void poll_nccl(void *self, vd_error *err) {
  const vd_grad_reducer *r = self;
  if (r->nccl) nccl_of(r)->async_error(r->nccl, err);
}
static void abort_nccl(void *self) {
  const vd_grad_reducer *r = self;
  if (r->nccl) nccl_of(r)->abort(r->nccl);
}

static void expect(vd_grad_reducer *r, const char *what, int64_t update) {
  if (r->watch) vd_watchdog_arm(r->watch, "%s of update %lld", what, (long long)update);
}
void vd_grad_reducer_arm_watchdog(vd_grad_reducer *r, const char *what) {
  expect(r, what, r->update);
}
void vd_grad_reducer_arm_all_reduce(vd_grad_reducer *r, int64_t update) {
  expect(r, "the gradient all-reduce", update);
}
void vd_grad_reducer_disarm_watchdog(vd_grad_reducer *r) {
  if (r->watch) vd_watchdog_disarm(r->watch);
}

/* NCCL opens connections in the first all-reduce of a size, here of a bucket and of the whole arena, so that the first
 * update does not wait for them. The gradients are still zeros. */
static int warm_up(vd_grad_reducer *r, vd_error *err) {
  const vd_nccl_plugin *nccl = nccl_of(r);
  nccl->begin_update(r->nccl);
  if (nccl->all_reduce(r->nccl, r->gradients, 0, r->bucket, err) ||
      nccl->all_reduce(r->nccl, r->gradients, 0, r->n, err))
    return err->status;
  nccl->wait_all_reduces(r->nccl);
  return r->ops->synchronize(r->ops, err);
}

static int open_nccl(vd_grad_reducer *r, vd_error *err) {
  vd_nccl_id id = {{0}};
  vd_nccl *made = NULL;
  const vd_nccl_plugin *nccl = nccl_of(r);
  if (r->rank == 0) nccl->unique_id(&id, err);
  if (vd_broadcast_error(r->comm, err)) return err->status;
  MPI_Bcast(id.bytes, (int)sizeof id.bytes, MPI_BYTE, 0, r->comm);
  vd_watchdog_arm(r->watch, "the start of NCCL on %d ranks", r->size);
  if (nccl->init(&made, r->ops, &id, r->rank, r->size, err) == VD_OK) {
    r->nccl = made;
    warm_up(r, err);
  }
  vd_agree(r->comm, err);
  vd_watchdog_disarm(r->watch);
  if (err->status != VD_OK) vd_wrap(err, "device%%comm = 'nccl' ('mpi' is another way)");
  return err->status;
}

static int open_timeline(vd_grad_reducer *r, vd_error *err) {
  const char *path = r->config.timeline;
  if (r->rank != 0 || !path[0]) return VD_OK;
  r->timeline = fopen(path, "w");
  if (r->timeline) return VD_OK;
  return vd_fail(err, VD_FAILED, "device%%timeline = '%s' cannot be written: %s", path, strerror(errno));
}

int vd_grad_reducer_create(vd_grad_reducer **out, MPI_Comm comm, const vd_grad_reducer_config *config, vd_ops *o,
                           real *gradients, size_t n, vd_error *err) {
  vd_grad_reducer *r = vd_calloc(1, sizeof *r);
  *r = (vd_grad_reducer){.comm = comm, .config = *config, .ops = o, .n = n};
  r->gradients = gradients;
  MPI_Comm_rank(comm, &r->rank);
  MPI_Comm_size(comm, &r->size);
  bool nccl = config->comm == VD_COMM_NCCL;
  r->bucket = config->bucket / sizeof *gradients > 0 ? config->bucket / sizeof *gradients : 1;
  if (r->bucket > n) r->bucket = n;
  if (!nccl && o->memory_is_remote && r->size > 1) r->stage = vd_calloc(r->bucket, sizeof *r->stage);
  vd_watchdog_hooks hooks = {r, poll_nccl, abort_nccl};
  if (nccl || r->size > 1) vd_watchdog_start(&r->watch, comm, config->timeout, &hooks, err);
  open_timeline(r, err);
  if (vd_agree(comm, err) == VD_OK && nccl) open_nccl(r, err);
  if (err->status == VD_OK) {
    *out = r;
    return VD_OK;
  }
  vd_grad_reducer_abort(r);
  vd_grad_reducer_destroy(r);
  *out = NULL;
  return err->status;
}

void vd_grad_reducer_begin(vd_grad_reducer *r, int64_t update) {
  r->update = update;
  r->pending = r->launched = r->n;
  r->times[update & 1] = (struct times){0};
}

void vd_grad_reducer_ready(void *reducer, size_t first, size_t n) {
  vd_grad_reducer *r = reducer;
  if (first + n != r->pending)
    vd_bug("gradients %zu to %zu are final, after those from %zu on", first, first + n, r->pending);
  r->pending = first;
  if (n == 0) r->times[r->update & 1].began = MPI_Wtime();
  if (!r->nccl || r->error.status != VD_OK) return;
  if (n == 0) nccl_of(r)->begin_update(r->nccl);
  if (r->launched == first || (first > 0 && r->launched - first < r->bucket)) return;
  /* From here on this rank may wait for others: on the GPU, or in a call that waits for the GPU. */
  if (r->launched == r->n) vd_grad_reducer_arm_watchdog(r, "the gradient all-reduce");
  nccl_of(r)->all_reduce(r->nccl, r->gradients, first, r->launched - first, &r->error);
  r->launched = first;
}

int vd_grad_reducer_check(const vd_grad_reducer *r, vd_error *err) {
  if (r->error.status != VD_OK) return vd_fail(err, r->error.status, "%s", r->error.message);
  return VD_OK;
}

void vd_grad_reducer_all_reduce_scalars(vd_grad_reducer *r, double *x, int n) {
  vd_grad_reducer_arm_watchdog(r, "the other ranks' losses");
  vd_all_reduce_doubles(r->comm, x, n);
  vd_grad_reducer_disarm_watchdog(r);
}

static void sum_staged(vd_grad_reducer *r) {
  for (size_t i = 0; i < r->n; i += r->bucket) {
    size_t count = r->n - i < r->bucket ? r->n - i : r->bucket;
    r->ops->get(r->ops, r->stage, r->gradients + i, count);
    vd_all_reduce_reals(r->comm, r->stage, count);
    r->ops->put(r->ops, r->gradients + i, r->stage, count);
  }
}

void vd_grad_reducer_finish(vd_grad_reducer *r) {
  if (r->pending != 0) vd_bug("the gradients before %zu were never final", r->pending);
  if (r->nccl) {
    nccl_of(r)->wait_all_reduces(r->nccl);
    return;
  }
  struct times *t = &r->times[r->update & 1];
  vd_grad_reducer_arm_all_reduce(r, r->update);
  t->ended = MPI_Wtime();
  if (r->stage)
    sum_staged(r);
  else
    vd_all_reduce_reals(r->comm, r->gradients, r->n);
  t->waited = MPI_Wtime() - t->ended;
  vd_grad_reducer_disarm_watchdog(r);
}

static void print_sum(FILE *f, int64_t update, double backward, const vd_all_reduce_times *t) {
  fprintf(f,
          "{\"update\": %lld, \"backward_end_ms\": %.4f, \"first\": %zu, \"elements\": %zu, \"ready_ms\": %.4f, "
          "\"start_ms\": %.4f, \"end_ms\": %.4f}\n",
          (long long)update, backward, t->first, t->n, t->ready, t->start, t->end);
}

static void write_timeline(vd_grad_reducer *r, int64_t update) {
  int before = update < r->update;
  if (r->nccl) {
    vd_all_reduce_times t, last = {0};
    int n = nccl_of(r)->count(r->nccl, before);
    nccl_of(r)->times(r->nccl, before, n - 1, &last);
    for (int i = 0; i < n; i++)
      if (nccl_of(r)->times(r->nccl, before, i, &t)) print_sum(r->timeline, update, last.ready, &t);
  } else {
    const struct times *mine = &r->times[update & 1];
    double start = (mine->ended - mine->began) * 1e3;
    vd_all_reduce_times whole = {0, r->n, start, start, start + mine->waited * 1e3};
    print_sum(r->timeline, update, start, &whole);
  }
  if (fflush(r->timeline) != 0)
    vd_fail(&r->error, VD_FAILED, "device%%timeline = '%s' cannot be written: %s", r->config.timeline, strerror(errno));
}

double vd_grad_reducer_exposed_seconds(vd_grad_reducer *r, int64_t update) {
  vd_all_reduce_times last;
  int before = update < r->update;
  if (r->update - update > 1) vd_bug("the times of update %lld are overwritten", (long long)update);
  double exposed = r->times[update & 1].waited;
  if (r->nccl && nccl_of(r)->times(r->nccl, before, nccl_of(r)->count(r->nccl, before) - 1, &last))
    exposed = (last.end - last.ready) * 1e-3;
  r->timed++;
  if (r->timeline && r->timed >= TIMELINE_FROM && r->timed <= TIMELINE_TO) write_timeline(r, update);
  return exposed;
}

void vd_grad_reducer_abort(vd_grad_reducer *r) {
  if (r->failed) return;
  r->failed = true;
  if (!r->nccl) return;
  vd_grad_reducer_arm_watchdog(r, "the abort of NCCL");
  nccl_of(r)->abort(r->nccl);
  vd_grad_reducer_disarm_watchdog(r);
}

void vd_grad_reducer_destroy(vd_grad_reducer *r) {
  if (!r) return;
  if (r->nccl) {
    vd_grad_reducer_arm_watchdog(r, "the end of NCCL");
    nccl_of(r)->destroy(r->nccl);
    vd_grad_reducer_disarm_watchdog(r);
    r->nccl = NULL;
  }
  vd_watchdog_stop(r->watch);
  if (r->timeline) fclose(r->timeline);
  free(r->stage);
  free(r);
}
