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
  vd_watchdog *watch; /* NULL: one rank, MPI */
  vd_nccl *nccl;      /* NULL: MPI */
  vd_grad_reducer_arenas arenas;
  real *stage;            /* host [a bucket] for memory on a GPU */
  size_t n, bucket;       /* elements */
  vd_shard_layout layout; /* n_bucket 0: the optimizer is not sharded */
  real *own;              /* sharded, MPI: host [the longest chunk] */
  int64_t update;         /* the last that began, counted from 1 */
  int64_t timed;          /* updates whose times were read */
  FILE *timeline;         /* NULL: none */
  bool failed;            /* aborted */
  /* Of this update: gradients from `pending` on are final; the all-reduce of those from `launched` on has started. */
  size_t pending, launched;
  int to_reduce;           /* sharded: buckets from this one on are being reduced */
  int arrived;             /* sharded: the backend waits for the weights of the buckets before this one */
  struct times times[2];   /* of the last two updates, at the update's number modulo 2 */
  vd_error error;          /* of an operation */
  vd_error timeline_error; /* of its file */
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

/* Sharded: of each bucket. */
static int warm_up_shards(vd_grad_reducer *r, vd_error *err) {
  const vd_nccl_plugin *nccl = nccl_of(r);
  const vd_shard_layout *s = &r->layout;
  for (int b = 0; b < s->n_bucket; b++)
    if (nccl->reduce_scatter(r->nccl, r->arenas.gradients, s->start[b], vd_shard_chunk(s, b), err) ||
        nccl->all_gather(r->nccl, b, r->arenas.params, s->start[b], vd_shard_chunk(s, b), false, err))
      return err->status;
  for (int b = 0; b < s->n_bucket; b++) nccl->wait_all_gather(r->nccl, b);
  return nccl->all_reduce(r->nccl, r->arenas.gradients, 0, s->common, err);
}

/* NCCL opens connections in the first all-reduce of a size, here of a bucket and of the whole arena, so that the first
 * update does not wait for them. The gradients are still zeros, and the parameters the same on all ranks. */
static int warm_up(vd_grad_reducer *r, vd_error *err) {
  const vd_nccl_plugin *nccl = nccl_of(r);
  nccl->begin_update(r->nccl);
  if (vd_grad_reducer_is_sharded(r))
    warm_up_shards(r, err);
  else if (nccl->all_reduce(r->nccl, r->arenas.gradients, 0, r->bucket, err) == VD_OK)
    nccl->all_reduce(r->nccl, r->arenas.gradients, 0, r->n, err);
  if (err->status != VD_OK) return err->status;
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
    if (vd_grad_reducer_is_sharded(r)) nccl->register_arenas(made, r->arenas.gradients, r->arenas.params, r->n, err);
  }
  if (vd_agree(r->comm, err) == VD_OK) {
    if (warm_up(r, err) && nccl->is_registered(made)) vd_end_other_ranks(r->comm, err); /* nothing aborts theirs */
    vd_agree(r->comm, err);
  }
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

/* NCCL takes multiprocessors from the backward pass, and kernels of one wave of blocks then take a second wave, so that
 * few large operations cost less than many small ones. Between nodes what counts is that little is left to do when the
 * backward pass ends. Measured: doc/notes/2026-11-28-sharded-optimizer.md. */
size_t vd_grad_reducer_default_bucket(const vd_grad_reducer_config *config, bool one_node) {
  return config->comm == VD_COMM_NCCL && config->shard && one_node ? 80000000 : 25000000;
}

/* Buckets, and host memory that they pass through. */
static void make_buckets(vd_grad_reducer *r) {
  bool nccl = r->config.comm == VD_COMM_NCCL;
  size_t longest, bucket = r->config.bucket / sizeof(real);
  r->bucket = bucket > 0 ? bucket : 1;
  if (r->bucket > r->n) r->bucket = r->n;
  if (r->config.shard && r->size > 1) vd_shard_layout_make(&r->layout, &r->arenas.shape, r->bucket, r->size);
  r->arrived = r->layout.n_bucket;
  longest = vd_grad_reducer_is_sharded(r) ? vd_shard_longest_chunk(&r->layout) : 0;
  if (!nccl && longest > 0) r->own = vd_calloc(longest, sizeof *r->own);
  size_t most = longest * (size_t)r->size > r->bucket ? longest * (size_t)r->size : r->bucket;
  if (!nccl && r->ops->memory_is_remote && r->size > 1) r->stage = vd_calloc(most, sizeof *r->stage);
}

int vd_grad_reducer_create(vd_grad_reducer **out, MPI_Comm comm, const vd_grad_reducer_config *config, vd_ops *o,
                           const vd_grad_reducer_arenas *arenas, vd_error *err) {
  vd_grad_reducer *r = vd_calloc(1, sizeof *r);
  *r = (vd_grad_reducer){.comm = comm, .config = *config, .ops = o, .arenas = *arenas, .n = arenas->shape.n};
  MPI_Comm_rank(comm, &r->rank);
  MPI_Comm_size(comm, &r->size);
  bool nccl = config->comm == VD_COMM_NCCL;
  make_buckets(r);
  vd_watchdog_hooks hooks = {r, poll_nccl, abort_nccl};
  if (nccl || r->size > 1) vd_watchdog_start(&r->watch, comm, config->timeout, &hooks, err);
  open_timeline(r, err);
  if (vd_agree(comm, err) == VD_OK && nccl) open_nccl(r, err);
  if (err->status == VD_OK) {
    *out = r;
    return VD_OK;
  }
  vd_error dropped = {0};
  vd_grad_reducer_abort(r, 0, &dropped);
  vd_grad_reducer_destroy(r);
  *out = NULL;
  return err->status;
}

void vd_grad_reducer_begin(vd_grad_reducer *r, int64_t update) {
  r->update = update;
  r->pending = r->launched = r->n;
  r->to_reduce = r->layout.n_bucket;
  r->times[update & 1] = (struct times){0};
  if (r->nccl) nccl_of(r)->begin_update(r->nccl);
}

bool vd_grad_reducer_is_sharded(const vd_grad_reducer *r) {
  return r->layout.n_bucket > 0;
}

/* Starts the all-reduce of gradients from `first` on, once they fill a bucket. */
static void launch_bucket(vd_grad_reducer *r, size_t first) {
  if (r->launched == first || (first > 0 && r->launched - first < r->bucket)) return;
  /* From here on this rank may wait for others: on the GPU, or in a call that waits for the GPU. */
  if (r->launched == r->n) vd_grad_reducer_arm_watchdog(r, "the gradient all-reduce");
  nccl_of(r)->all_reduce(r->nccl, r->arenas.gradients, first, r->launched - first, &r->error);
  r->launched = first;
}

/* Starts the reduce-scatters of the buckets that are final, and at last the all-reduce of the common part. */
static void launch_shards(vd_grad_reducer *r, size_t first) {
  const vd_shard_layout *s = &r->layout;
  while (r->to_reduce > 0 && s->start[r->to_reduce - 1] >= first && r->error.status == VD_OK) {
    int b = --r->to_reduce;
    if (b == s->n_bucket - 1) vd_grad_reducer_arm_watchdog(r, "the gradient all-reduce");
    nccl_of(r)->reduce_scatter(r->nccl, r->arenas.gradients, s->start[b], vd_shard_chunk(s, b), &r->error);
  }
  if (first == 0 && r->error.status == VD_OK)
    nccl_of(r)->all_reduce(r->nccl, r->arenas.gradients, 0, s->common, &r->error);
}

void vd_grad_reducer_ready(void *reducer, size_t first, size_t n) {
  vd_grad_reducer *r = reducer;
  if (first + n != r->pending)
    vd_bug("gradients %zu to %zu are final, after those from %zu on", first, first + n, r->pending);
  r->pending = first;
  if (n == 0) r->times[r->update & 1].began = MPI_Wtime();
  if (!r->nccl || r->error.status != VD_OK) return;
  if (n == 0)
    nccl_of(r)->begin_backward(r->nccl);
  else if (vd_grad_reducer_is_sharded(r))
    launch_shards(r, first);
  else
    launch_bucket(r, first);
}

int vd_grad_reducer_check_operations(const vd_grad_reducer *r, vd_error *err) {
  if (r->error.status != VD_OK) return vd_fail(err, r->error.status, "%s", r->error.message);
  return VD_OK;
}

int vd_grad_reducer_check(const vd_grad_reducer *r, vd_error *err) {
  if (vd_grad_reducer_check_operations(r, err)) return err->status;
  if (r->timeline_error.status != VD_OK) return vd_fail(err, VD_FAILED, "%s", r->timeline_error.message);
  return VD_OK;
}

void vd_grad_reducer_all_reduce_scalars(vd_grad_reducer *r, double *x, int n) {
  vd_grad_reducer_arm_watchdog(r, "the other ranks' losses");
  vd_all_reduce_doubles(r->comm, x, n);
  vd_grad_reducer_disarm_watchdog(r);
}

/* MPI: sums the first n gradients over the ranks. */
static void sum_by_mpi(vd_grad_reducer *r, size_t n) {
  real *gradients = r->arenas.gradients;
  if (!r->stage) vd_all_reduce_reals(r->comm, gradients, n);
  for (size_t i = 0; r->stage && i < n; i += r->bucket) {
    size_t count = n - i < r->bucket ? n - i : r->bucket;
    r->ops->get(r->ops, r->stage, gradients + i, count);
    vd_all_reduce_reals(r->comm, r->stage, count);
    r->ops->put(r->ops, gradients + i, r->stage, count);
  }
}

/* MPI: the sums of this rank's chunks. */
static void scatter_by_mpi(vd_grad_reducer *r) {
  const vd_shard_layout *s = &r->layout;
  for (int b = s->n_bucket - 1; b >= 0; b--) {
    size_t chunk = vd_shard_chunk(s, b);
    real *x = r->arenas.gradients + s->start[b];
    if (r->stage) r->ops->get(r->ops, r->stage, x, chunk * (size_t)r->size);
    vd_reduce_scatter_reals(r->comm, r->stage ? r->stage : x, chunk, r->own);
    r->ops->put(r->ops, x + (size_t)r->rank * chunk, r->own, chunk);
  }
}

/* MPI: an arena gets each rank's chunks from that rank. */
static void gather_by_mpi(vd_grad_reducer *r, real *arena) {
  const vd_shard_layout *s = &r->layout;
  for (int b = 0; b < s->n_bucket; b++) {
    size_t chunk = vd_shard_chunk(s, b), mine = (size_t)r->rank * chunk;
    real *x = arena + s->start[b];
    if (r->stage) r->ops->get(r->ops, r->stage + mine, x + mine, chunk);
    vd_all_gather_reals(r->comm, r->stage ? r->stage : x, chunk);
    if (r->stage) r->ops->put(r->ops, x, r->stage, chunk * (size_t)r->size);
  }
}

void vd_grad_reducer_finish(vd_grad_reducer *r) {
  if (r->pending != 0) vd_bug("the gradients before %zu were never final", r->pending);
  if (r->nccl) {
    vd_grad_reducer_all_needed(r); /* a step writes what an all-gather reads */
    nccl_of(r)->wait_all_reduces(r->nccl);
    return;
  }
  struct times *t = &r->times[r->update & 1];
  vd_grad_reducer_arm_all_reduce(r, r->update);
  t->ended = MPI_Wtime();
  if (vd_grad_reducer_is_sharded(r)) scatter_by_mpi(r);
  sum_by_mpi(r, vd_grad_reducer_is_sharded(r) ? r->layout.common : r->n);
  t->waited = MPI_Wtime() - t->ended;
  vd_grad_reducer_disarm_watchdog(r);
}

/* A vd_optimizer_shard.all_reduce_norms. */
static void all_reduce_norms(void *reducer, double *norm2, int n) {
  vd_grad_reducer *r = reducer;
  if (r->nccl) {
    if (r->error.status == VD_OK) nccl_of(r)->all_reduce_doubles(r->nccl, norm2, (size_t)n, &r->error);
    return;
  }
  double start = MPI_Wtime(), *host = norm2;
  if (r->stage) host = vd_calloc((size_t)n, sizeof *host);
  if (r->stage) r->ops->get_double(r->ops, host, norm2, (size_t)n);
  vd_all_reduce_doubles(r->comm, host, n);
  if (r->stage) { /* the bytes, which `put` moves as reals */
    r->ops->put(r->ops, (real *)(void *)norm2, (const real *)(const void *)host,
                (size_t)n * (sizeof *host / sizeof(real)));
    free(host);
  }
  r->times[r->update & 1].waited += MPI_Wtime() - start;
}

/* NCCL: starts the all-gathers of an arena, in the order of the forward pass. */
static void start_all_gathers(vd_grad_reducer *r, real *arena, bool masters, vd_error *err) {
  const vd_shard_layout *s = &r->layout;
  for (int b = 0; b < s->n_bucket && err->status == VD_OK; b++)
    nccl_of(r)->all_gather(r->nccl, b, arena, s->start[b], vd_shard_chunk(s, b), masters, err);
  r->arrived = 0;
}

/* A vd_optimizer_shard.all_gather_weights. */
static void all_gather_weights(void *reducer) {
  vd_grad_reducer *r = reducer;
  if (r->nccl) {
    start_all_gathers(r, r->arenas.params, false, &r->error);
    return;
  }
  double start = MPI_Wtime();
  gather_by_mpi(r, r->arenas.params);
  r->times[r->update & 1].waited += MPI_Wtime() - start;
}

void vd_grad_reducer_shard_optimizer(vd_grad_reducer *r, const vd_model *m, vd_optimizer *o) {
  if (!vd_grad_reducer_is_sharded(r)) return;
  vd_optimizer_shard shard = {
      .receiver = r, .all_reduce_norms = all_reduce_norms, .all_gather_weights = all_gather_weights};
  vd_extent *step = vd_shard_extents(&r->layout, m, r->rank, true, &shard.n_step);
  vd_extent *norm = vd_shard_extents(&r->layout, m, r->rank, r->rank == 0, &shard.n_norm);
  shard.step = step;
  shard.norm = norm;
  vd_optimizer_set_shard(o, &shard);
  free(step);
  free(norm);
}

void vd_grad_reducer_needed(void *reducer, size_t first, size_t n) {
  vd_grad_reducer *r = reducer;
  const vd_shard_layout *s = &r->layout;
  while (r->nccl && r->error.status == VD_OK && r->arrived < s->n_bucket && s->start[r->arrived] < first + n)
    nccl_of(r)->wait_all_gather(r->nccl, r->arrived++);
}

void vd_grad_reducer_all_needed(vd_grad_reducer *r) {
  vd_grad_reducer_needed(r, 0, r->n);
}

int vd_grad_reducer_gather(vd_grad_reducer *r, real *arena, vd_error *err) {
  if (!vd_grad_reducer_is_sharded(r)) return VD_OK;
  vd_grad_reducer_arm_watchdog(r, "the other ranks' weights and optimizer state for the checkpoint");
  vd_grad_reducer_all_needed(r);
  if (r->nccl)
    start_all_gathers(r, arena, true, err);
  else if (arena != r->arenas.params) /* parameters are whole */
    gather_by_mpi(r, arena);
  if (err->status == VD_OK) vd_grad_reducer_all_needed(r);
  if (err->status == VD_OK) r->ops->synchronize(r->ops, err);
  vd_agree(r->comm, err);
  vd_grad_reducer_disarm_watchdog(r);
  return err->status;
}

vd_grad_reducer_arenas vd_grad_reducer_arenas_of(vd_model *m) {
  return (vd_grad_reducer_arenas){vd_model_gradients(m),
                                  vd_model_params(m),
                                  {vd_model_arena(m), vd_model_common_extent(m), vd_model_first_layer_extent(m)}};
}

static void print_sum(FILE *f, int64_t update, double backward, const vd_all_reduce_times *t) {
  fprintf(f,
          "{\"update\": %lld, \"backward_end_ms\": %.4f, \"operation\": \"%s\", \"first\": %zu, \"elements\": %zu, "
          "\"ready_ms\": %.4f, \"start_ms\": %.4f, \"end_ms\": %.4f}\n",
          (long long)update, backward, t->scattered ? "reduce-scatter" : "all-reduce", t->first, t->n, t->ready,
          t->start, t->end);
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
    vd_all_reduce_times whole = {0, r->n, vd_grad_reducer_is_sharded(r), start, start, start + mine->waited * 1e3};
    print_sum(r->timeline, update, start, &whole);
  }
  if (fflush(r->timeline) != 0)
    vd_fail(&r->timeline_error, VD_FAILED, "device%%timeline = '%s' cannot be written: %s", r->config.timeline,
            strerror(errno));
}

double vd_grad_reducer_exposed_seconds(vd_grad_reducer *r, int64_t update) {
  vd_all_reduce_times last;
  int before = update < r->update;
  if (r->update - update > 1) vd_bug("the times of update %lld are overwritten", (long long)update);
  double exposed = r->times[update & 1].waited;
  if (r->nccl && nccl_of(r)->times(r->nccl, before, nccl_of(r)->count(r->nccl, before) - 1, &last))
    exposed = (last.end - last.ready) * 1e-3;
  if (r->nccl && vd_grad_reducer_is_sharded(r)) exposed += nccl_of(r)->waited(r->nccl, before) * 1e-3;
  r->timed++;
  if (r->timeline && r->timed >= TIMELINE_FROM && r->timed <= TIMELINE_TO) write_timeline(r, update);
  return exposed;
}

/* The sums of the failed update end once each rank has started them: this rank starts the missing ones and waits for
 * all. With shards alone, since otherwise the ranges depend on the model's calls. */
static int end_sums(vd_grad_reducer *r, int64_t update, vd_error *err) {
  vd_error before = {0}; /* dropped: it is what failed, or the wait below meets it again */
  r->ops->synchronize(r->ops, &before);
  if (r->update < update) vd_grad_reducer_begin(r, update);
  if (r->pending > 0) vd_grad_reducer_ready(r, 0, r->pending);
  if (r->error.status != VD_OK) return vd_fail(err, r->error.status, "%s", r->error.message);
  nccl_of(r)->wait_all_reduces(r->nccl);
  expect(r, "the end of the sums", update);
  return r->ops->synchronize(r->ops, err);
}

int vd_grad_reducer_abort(vd_grad_reducer *r, int64_t update, vd_error *err) {
  if (r->failed || !r->nccl) return VD_OK;
  r->failed = true;
  expect(r, "the end of the sums", update);
  if (update > 0 && nccl_of(r)->is_registered(r->nccl))
    end_sums(r, update, err);
  else
    nccl_of(r)->abort(r->nccl);
  vd_grad_reducer_disarm_watchdog(r);
  return err->status;
}

void vd_grad_reducer_destroy(vd_grad_reducer *r) {
  if (!r) return;
  if (r->nccl) {
    vd_grad_reducer_arm_watchdog(r, "the end of NCCL");
    nccl_of(r)->finalize(r->nccl);
    vd_grad_reducer_disarm_watchdog(r);
  }
  vd_watchdog_stop(r->watch); /* it polls NCCL */
  if (r->nccl) nccl_of(r)->destroy(r->nccl);
  if (r->timeline) fclose(r->timeline);
  vd_shard_layout_free(&r->layout);
  free(r->stage);
  free(r->own);
  free(r);
}
