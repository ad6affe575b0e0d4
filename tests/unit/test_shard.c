/* The optimizer sharded over ranks: the layout of shards, and training with it by MPI and by a stand-in for NCCL, on
 * any number of ranks (tests/mpi/test_shard.py starts it on several). */
#include "src/comm/collectives.h"
#include "src/comm/grad_reducer.h"
#include "src/comm/shard.h"

#include <math.h>
#include <mpi.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { LINE = 32 }; /* reals of a cache line, as tensors are placed */

/* Buckets cover the arena behind the common part without a gap; each has a chunk of whole cache lines for every rank,
 * and none is less than half the size asked for, but a single one and that of the first layer. */
static void check_layout(size_t n, size_t common, size_t first_layer, size_t bucket, int n_rank) {
  vd_shard_layout s;
  size_t unit = (size_t)n_rank * LINE;
  const vd_shard_arena arena = {n, common, first_layer};
  vd_shard_layout_make(&s, &arena, bucket, n_rank);
  assert_int_equal(s.n_rank, n_rank);
  assert_int_equal(s.start[0], s.common);
  assert_int_equal(s.start[s.n_bucket], n);
  assert_true(s.common >= common && s.common - common < unit);
  assert_true((s.n_bucket == 0) == (n - common < unit));
  size_t longest = 0, step = bucket < unit ? unit : bucket;
  if (first_layer > 0 && first_layer <= step && 2 * (n - s.common) > step + unit && n - s.common > first_layer + unit)
    assert_true(s.start[1] >= common + first_layer && s.start[1] < s.common + first_layer + unit);
  if (first_layer > step + unit || 2 * (n - s.common) < bucket) { /* it is not apart */
    vd_shard_layout other;
    const vd_shard_arena together = {n, common, 0};
    vd_shard_layout_make(&other, &together, bucket, n_rank);
    assert_int_equal(other.n_bucket, s.n_bucket);
    assert_memory_equal(other.start, s.start, ((size_t)s.n_bucket + 1) * sizeof *s.start);
    vd_shard_layout_free(&other);
  }
  for (int b = 0; b < s.n_bucket; b++) {
    size_t size = s.start[b + 1] - s.start[b], chunk = vd_shard_chunk(&s, b);
    assert_true(chunk > 0 && chunk % LINE == 0 && chunk * (size_t)n_rank == size);
    assert_true(s.n_bucket <= 1 + (first_layer > 0) || 2 * size >= bucket || (b == 0 && first_layer > 0));
    assert_true(2 * size <= 3 * (bucket + unit));
    longest = chunk > longest ? chunk : longest;
  }
  assert_int_equal(vd_shard_longest_chunk(&s), longest);
  vd_shard_layout_free(&s);
}

static void lays_out_shards(void **state) {
  (void)state;
  const size_t sizes[] = {320, 1024, 4096, 10016, 1000000};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (int n_rank = 2; n_rank <= 40; n_rank++)
      for (size_t bucket = 1; bucket <= sizes[i]; bucket = 3 * bucket + 1) {
        check_layout(sizes[i], 0, 0, bucket, n_rank);
        check_layout(sizes[i], 96, 0, bucket, n_rank);
        check_layout(sizes[i], 96, sizes[i] / 7, bucket, n_rank);
        check_layout(sizes[i], 96, sizes[i] - 96, bucket, n_rank);
        check_layout(sizes[i], sizes[i] - LINE, LINE, bucket, n_rank);
      }
  check_layout(4096, 4096, 0, 100, 2);     /* nothing but a common part */
  check_layout(4096, 1024, 64, 100, 1000); /* more ranks than cache lines */
  vd_shard_layout s;
  const vd_shard_arena large = {(size_t)1 << 33, 0, (size_t)1 << 30};
  vd_shard_layout_make(&s, &large, (size_t)1 << 33, 3); /* MPI counts in int */
  for (int b = 0; b < s.n_bucket; b++) assert_true(s.start[b + 1] - s.start[b] <= (size_t)1 << 26);
  vd_shard_layout_free(&s);
}

static vd_model_config model_of(bool xl) {
  return (vd_model_config){.arch = xl ? VD_TRANSFORMER_XL : VD_ADAPTIVE_SPAN,
                           .vocab = 11,
                           .n_layer = 3,
                           .d_model = 16,
                           .n_head = 2,
                           .d_head = 8,
                           .d_inner = 24,
                           .dropout = 0.1,
                           .attn_span = 16,
                           .ramp = 4,
                           .span_init = 0.4,
                           .softmax = VD_MASKED,
                           .aux_loss_scaler = 1e-3,
                           .mem_len = 7,
                           .seed = 1};
}

/* Over all ranks each element of each tensor is summed once. It is stepped by one rank, or in the common part by all.
 * Extents are sorted by tensor, keep within it, and begin on 16 bytes. */
static void shares_out_tensors(void **state) {
  (void)state;
  for (int xl = 0; xl < 2; xl++)
    for (int n_rank = 2; n_rank <= 9; n_rank++)
      for (size_t bucket = 100; bucket < 10000; bucket *= 4) {
        vd_error err = {0};
        vd_ops *o;
        vd_model *m;
        vd_shard_layout s;
        const vd_model_config config = model_of(xl);
        assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
        assert_int_equal(vd_model_create(&m, &config, o, 0, 1, 0, 4, true, &err), VD_OK);
        size_t arena = vd_model_arena(m), common = vd_model_common_extent(m);
        const vd_shard_arena shape = {arena, common, vd_model_first_layer_extent(m)};
        vd_shard_layout_make(&s, &shape, bucket, n_rank);
        int *stepped = vd_calloc(arena, sizeof *stepped), *summed = vd_calloc(arena, sizeof *summed);
        for (int rank = 0; rank < n_rank; rank++)
          for (int kind = 0; kind < 2; kind++) {
            int n, tensor = 0, *count = kind ? summed : stepped;
            vd_extent *part = vd_shard_extents(&s, m, rank, !kind || rank == 0, &n);
            for (int i = 0; i < n; i++) {
              assert_true(part[i].tensor >= tensor && part[i].offset * sizeof(real) % 16 == 0 && part[i].size > 0);
              tensor = part[i].tensor;
              vd_extent whole = vd_model_param(m, tensor)->at;
              assert_true(part[i].offset >= whole.offset && part[i].offset + part[i].size <= whole.offset + whole.size);
              for (size_t k = 0; k < part[i].size; k++) count[part[i].offset + k]++;
            }
            free(part);
          }
        for (int t = 0; t < vd_model_n_param(m); t++) {
          const vd_param *p = vd_model_param(m, t);
          assert_true(!p->is_common || p->at.offset + p->at.size <= common);
          for (size_t k = p->at.offset; k < p->at.offset + p->at.size; k++) {
            assert_int_equal(summed[k], 1);
            assert_int_equal(stepped[k], k < s.common ? n_rank : 1);
          }
        }
        free(stepped);
        free(summed);
        vd_shard_layout_free(&s);
        vd_model_destroy(m);
        o->destroy(o);
      }
}

/* A stand-in for NCCL, over MPI in host memory. It works as late as the contract allows: sums in wait_all_reduces,
 * weights in wait_all_gather. Until then, and in chunks whose contents are undefined, the arenas hold NaN. */
enum { MOST = 64 };
struct sum {
  real *x, *kept;
  size_t n;
  bool scattered;
};
struct vd_nccl {
  int rank, size, n_sum, n_wait;
  real *gradients, *params; /* registered */
  struct sum sum[MOST];
  struct {
    real *x, *kept;
    size_t chunk;
  } gather[MOST];
};

static int stand_in_unique_id(vd_nccl_id *id, vd_error *err) {
  memset(id->bytes, 7, sizeof id->bytes);
  return err->status;
}
static int stand_in_init(vd_nccl **n, vd_ops *o, const vd_nccl_id *id, int rank, int size, vd_error *err) {
  (void)o, (void)id;
  *n = vd_calloc(1, sizeof **n);
  (*n)->rank = rank;
  (*n)->size = size;
  return err->status;
}
static int stand_in_register_arenas(vd_nccl *n, real *gradients, real *params, size_t count, vd_error *err) {
  assert_true(n->n_sum == 0 && count > 0);
  n->gradients = gradients;
  n->params = params;
  return err->status;
}
static void stand_in_begin_update(vd_nccl *n) {
  n->n_sum = n->n_wait = 0;
}
static void stand_in_begin_backward(vd_nccl *n) {
  assert_int_equal(n->n_sum, 0);
}

static real *keep(const real *x, size_t n) {
  real *kept = vd_calloc(n, sizeof *kept);
  memcpy(kept, x, n * sizeof *x);
  return kept;
}
static void poison(real *x, size_t n) {
  for (size_t i = 0; i < n; i++) x[i] = (real)NAN;
}

static int add_sum(vd_nccl *n, real *x, size_t count, bool scattered, vd_error *err) {
  assert_true(n->n_sum < MOST);
  n->sum[n->n_sum++] = (struct sum){x, keep(x, count), count, scattered};
  poison(x, count);
  return err->status;
}
static int stand_in_all_reduce(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err) {
  return add_sum(n, arena + first, count, false, err);
}
static int stand_in_reduce_scatter(vd_nccl *n, real *arena, size_t first, size_t chunk, vd_error *err) {
  assert_ptr_equal(arena, n->gradients);
  return add_sum(n, arena + first, chunk * (size_t)n->size, true, err);
}
/* NOLINTNEXTLINE(readability-non-const-parameter): a member of the table */
static int stand_in_refuse(vd_nccl *n, real *arena, size_t first, size_t chunk, vd_error *err) {
  (void)n, (void)arena, (void)first, (void)chunk;
  return vd_fail(err, VD_FAILED, "the sum is refused");
}
static void stand_in_wait_all_reduces(vd_nccl *n) {
  for (int i = 0; i < n->n_sum; i++) {
    struct sum *s = &n->sum[i];
    size_t chunk = s->n / (size_t)n->size;
    if (!s->kept) continue;
    if (s->scattered)
      MPI_Reduce_scatter_block(s->kept, s->x + (size_t)n->rank * chunk, (int)chunk, VD_MPI_REAL, MPI_SUM,
                               MPI_COMM_WORLD);
    else
      MPI_Allreduce(s->kept, s->x, (int)s->n, VD_MPI_REAL, MPI_SUM, MPI_COMM_WORLD);
    free(s->kept);
    s->kept = NULL;
  }
}
static int stand_in_all_reduce_doubles(vd_nccl *n, double *x, size_t count, vd_error *err) {
  (void)n;
  MPI_Allreduce(MPI_IN_PLACE, x, (int)count, MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  return err->status;
}
static int stand_in_all_gather(vd_nccl *n, int slot, real *arena, size_t first, size_t chunk, bool masters,
                               vd_error *err) {
  assert_true(masters || arena == n->params);
  assert_true(slot >= 0 && slot < MOST && !n->gather[slot].kept);
  real *x = arena + first;
  n->gather[slot].x = x;
  n->gather[slot].chunk = chunk;
  n->gather[slot].kept = keep(x + (size_t)n->rank * chunk, chunk);
  poison(x, chunk * (size_t)n->size);
  return err->status;
}
static void stand_in_wait_all_gather(vd_nccl *n, int slot) {
  size_t chunk = n->gather[slot].chunk;
  assert_non_null(n->gather[slot].kept);
  MPI_Allgather(n->gather[slot].kept, (int)chunk, VD_MPI_REAL, n->gather[slot].x, (int)chunk, VD_MPI_REAL,
                MPI_COMM_WORLD);
  free(n->gather[slot].kept);
  n->gather[slot].kept = NULL;
  n->n_wait++;
}
static double stand_in_waited(const vd_nccl *n, int before) {
  (void)before;
  return 1e3 * n->n_wait;
}
static void stand_in_async_error(vd_nccl *n, vd_error *err) {
  (void)n, (void)err;
}
static int stand_in_count(const vd_nccl *n, int before) {
  (void)before;
  return n->n_sum;
}
static bool stand_in_times(const vd_nccl *n, int before, int i, vd_all_reduce_times *t) {
  (void)before;
  *t = (vd_all_reduce_times){0, n->sum[i].n, n->sum[i].scattered, 1, 2, 3};
  return true;
}
static bool stand_in_is_registered(const vd_nccl *n) {
  return n->gradients != NULL;
}
static void stand_in_abort(vd_nccl *n) {
  (void)n;
  fail();
}
static void stand_in_finalize(vd_nccl *n) {
  int started[2] = {n->n_sum, -n->n_sum};
  MPI_Allreduce(MPI_IN_PLACE, started, 2, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  assert_int_equal(started[0], -started[1]);
}
static void stand_in_destroy(vd_nccl *n) {
  for (int i = 0; i < MOST; i++) {
    free(n->sum[i].kept);
    free(n->gather[i].kept);
  }
  free(n);
}
static const vd_nccl_plugin stand_in = {.unique_id = stand_in_unique_id,
                                        .init = stand_in_init,
                                        .register_arenas = stand_in_register_arenas,
                                        .begin_update = stand_in_begin_update,
                                        .begin_backward = stand_in_begin_backward,
                                        .all_reduce = stand_in_all_reduce,
                                        .reduce_scatter = stand_in_reduce_scatter,
                                        .all_reduce_doubles = stand_in_all_reduce_doubles,
                                        .all_gather = stand_in_all_gather,
                                        .wait_all_gather = stand_in_wait_all_gather,
                                        .waited = stand_in_waited,
                                        .wait_all_reduces = stand_in_wait_all_reduces,
                                        .async_error = stand_in_async_error,
                                        .count = stand_in_count,
                                        .times = stand_in_times,
                                        .is_registered = stand_in_is_registered,
                                        .abort = stand_in_abort,
                                        .finalize = stand_in_finalize,
                                        .destroy = stand_in_destroy};

/* How a run exchanges. */
enum way { ALL_REDUCE, SHARDED_MPI, SHARDED_REMOTE, SHARDED_NCCL, N_WAY };

/* What a run ends with: parameters and states, one arena after the other, and the gradient norm of each update. */
enum { UPDATES = 5, STREAMS = 2, BLOCK = 6, ARENAS = 3 };
struct result {
  real *arena[ARENAS];
  size_t n;
  double norm[UPDATES];
};

static void tokens(int32_t *x, int rank, uint64_t seed) {
  for (size_t i = 0; i < STREAMS * BLOCK; i++)
    x[i] = (int32_t)(vd_philox((vd_rng){.seed = seed}, (uint64_t)(rank * STREAMS * BLOCK) + i).v[0] % 11U);
}

static void train(vd_grad_reducer *r, vd_model *m, vd_ops *o, vd_optimizer *optimizer, int rank,
                  struct result *result) {
  int size;
  vd_error err = {0};
  int32_t x[STREAMS * BLOCK], y[STREAMS * BLOCK];
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (int64_t update = 0; update < UPDATES; update++) {
    tokens(x, rank, (uint64_t)(1 + 2 * update));
    tokens(y, rank, (uint64_t)(2 + 2 * update));
    o->zero_gradients(o, vd_model_gradients(m), vd_model_arena(m));
    vd_step step = {.x = x,
                    .y = y,
                    .block = BLOCK,
                    .update = update,
                    .train = true,
                    .scale = 1.0 / (size * STREAMS * BLOCK),
                    .ready = vd_grad_reducer_ready,
                    .needed = vd_grad_reducer_needed,
                    .receiver = r};
    vd_grad_reducer_begin(r, update + 1);
    assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
    vd_grad_reducer_finish(r);
    vd_model_span_penalty(m, 1);
    assert_int_equal(vd_optimizer_update(optimizer, update, &result->norm[update], &err), VD_OK);
    assert_int_equal(vd_grad_reducer_check(r, &err), VD_OK);
    assert_true(isfinite(result->norm[update]) && vd_grad_reducer_exposed_seconds(r, update + 1) >= 0);
  }
}

/* Trains for a few updates; one rank computes `streams` from its own on. */
static void run(enum way way, bool xl, size_t bucket, struct result *result) {
  int rank;
  vd_error err = {0};
  vd_ops *o;
  vd_model *m;
  vd_optimizer *optimizer;
  vd_grad_reducer *r;
  const vd_model_config config = model_of(xl);
  const vd_optimizer_config adagrad = {.lr = 0.07, .eps = 1e-10, .clip_step = 0.03, .warmup_updates = 10},
                            adam = {.method = VD_ADAM,
                                    .lr = 0.001,
                                    .beta1 = 0.9,
                                    .beta2 = 0.99,
                                    .eps = 1e-8,
                                    .clip_norm = 0.05,
                                    .warmup_updates = 10};
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  o->memory_is_remote = way == SHARDED_REMOTE;
  assert_int_equal(vd_model_create(&m, &config, o, rank * STREAMS, STREAMS, 1, BLOCK, true, &err), VD_OK);
  assert_int_equal(vd_optimizer_create(&optimizer, xl ? &adam : &adagrad, m, o, &err), VD_OK);
  vd_grad_reducer_config how = {.comm = way == SHARDED_NCCL ? VD_COMM_NCCL : VD_COMM_MPI,
                                .nccl = &stand_in,
                                .bucket = bucket,
                                .shard = way != ALL_REDUCE,
                                .timeout = 60,
                                .timeline = ""};
  const vd_grad_reducer_arenas arenas = vd_grad_reducer_arenas_of(m);
  assert_int_equal(vd_grad_reducer_create(&r, MPI_COMM_WORLD, &how, o, &arenas, &err), VD_OK);
  vd_grad_reducer_shard_optimizer(r, m, optimizer);
  train(r, m, o, optimizer, rank, result);
  result->n = vd_model_arena(m);
  for (int i = 0; i <= vd_optimizer_n_state(optimizer); i++) {
    real *arena = i == 0 ? vd_model_params(m) : vd_optimizer_state(optimizer, i - 1);
    assert_int_equal(vd_grad_reducer_gather(r, arena, &err), VD_OK);
    result->arena[i] = keep(arena, result->n);
  }
  vd_grad_reducer_destroy(r);
  vd_optimizer_destroy(optimizer);
  vd_model_destroy(m);
  o->destroy(o);
}

/* On at most two ranks there is one order of additions over them, and the bits are the same; on more they are near. */
static void compare(const struct result *a, const struct result *b) {
  int size;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  assert_int_equal(a->n, b->n);
  for (int i = 0; i < UPDATES; i++) assert_true(fabs(a->norm[i] / b->norm[i] - 1) < 1e-5);
  for (int k = 0; k < ARENAS; k++) {
    assert_true(!a->arena[k] == !b->arena[k]);
    if (!a->arena[k]) continue;
    if (size <= 2) assert_memory_equal(a->arena[k], b->arena[k], a->n * sizeof(real));
    for (size_t i = 0; i < a->n; i++) assert_true(fabs((double)a->arena[k][i] - (double)b->arena[k][i]) < 1e-5);
  }
}

static void steps_as_one(void **state) {
  (void)state;
  for (int xl = 0; xl < 2; xl++) {
    struct result whole = {0};
    run(ALL_REDUCE, xl, 2000, &whole);
    for (enum way way = SHARDED_MPI; way < N_WAY; way++)
      for (size_t bucket = 400; bucket <= 1000000; bucket *= 50) {
        struct result sharded = {0};
        run(way, xl, bucket, &sharded);
        compare(&whole, &sharded);
        for (int k = 0; k < ARENAS; k++) free(sharded.arena[k]);
      }
    for (int k = 0; k < ARENAS; k++) free(whole.arena[k]);
  }
}

/* Rank 0 fails in update 2, after `done` of its gradients (-1: before the update began). The other ranks have started
 * all their sums, which must end; where NCCL refuses, that is an error. */
static void fail_at(int done, bool refused) {
  enum { N = 1000, COMMON = 40, FIRST_LAYER = 200 };
  int rank, size;
  vd_error err = {0};
  vd_ops *o;
  vd_grad_reducer *r;
  real gradients[N] = {0}, params[N] = {0};
  vd_nccl_plugin table = stand_in;
  vd_grad_reducer_config how = {
      .comm = VD_COMM_NCCL, .nccl = &table, .bucket = 800, .shard = true, .timeout = 20, .timeline = ""};
  const vd_grad_reducer_arenas arenas = {gradients, params, {N, COMMON, FIRST_LAYER}};
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (size == 1) return; /* nothing is sharded */
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  assert_int_equal(vd_grad_reducer_create(&r, MPI_COMM_WORLD, &how, o, &arenas, &err), VD_OK);
  for (int64_t update = 1; update <= 2; update++) {
    int last = update == 2 && (rank == 0 || refused) ? done : N;
    if (last >= 0) vd_grad_reducer_begin(r, update);
    if (last >= 0) vd_grad_reducer_ready(r, N, 0);
    for (int at = 0; at < last; at += 100) vd_grad_reducer_ready(r, (size_t)(N - at - 100), 100);
    if (update == 1) vd_grad_reducer_finish(r);
  }
  if (refused) table.reduce_scatter = stand_in_refuse;
  assert_int_equal(vd_grad_reducer_abort(r, 2, &err), refused ? VD_FAILED : VD_OK);
  assert_true(!refused || strstr(err.message, "refused"));
  vd_grad_reducer_destroy(r);
  o->destroy(o);
}

static void ends_sums_of_others(void **state) {
  (void)state;
  const int done[] = {-1, 0, 300, 800, 1000};
  for (size_t i = 0; i < sizeof done / sizeof *done; i++) fail_at(done[i], false);
  fail_at(-1, true);
  fail_at(300, true);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(lays_out_shards), cmocka_unit_test(shares_out_tensors),
                                     cmocka_unit_test(steps_as_one), cmocka_unit_test(ends_sums_of_others)};
  MPI_Init(&argc, &argv);
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
