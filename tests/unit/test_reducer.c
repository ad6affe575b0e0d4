/* The gradient all-reduce on any number of ranks (tests/mpi/test_reducer.py starts it on several), and the calls by
 * which the model reports final gradients. */
#include "src/comm/collectives.h"
#include "src/comm/grad_reducer.h"
#include "src/model/model.h"

#include <math.h>
#include <mpi.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { N = 1000, PIECE = 96 };

/* Whole numbers: their sums are exact in any order. */
static real value(int rank, size_t i, int turn) {
  return (real)((int)(i % 17) * (rank + 1) + turn);
}

/* An update up to its sums. */
static void sum(vd_grad_reducer *r, real *x, int turn) {
  int rank, size;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (size_t i = 0; i < N; i++) x[i] = value(rank, i, turn);
  vd_grad_reducer_begin(r, turn + 1);
  vd_grad_reducer_ready(r, N, 0);
  for (size_t end = N; end > 0;) {
    size_t n = end < PIECE ? end : PIECE;
    end -= n;
    vd_grad_reducer_ready(r, end, n);
  }
  double ranks = 1;
  vd_grad_reducer_all_reduce_scalars(r, &ranks, 1);
  assert_true(ranks == (double)size);
  vd_grad_reducer_finish(r);
}

/* Returns the exposed seconds. */
static double sum_and_compare(vd_grad_reducer *r, real *x, int turn) {
  int size;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  sum(r, x, turn);
  double exposed = vd_grad_reducer_exposed_seconds(r, turn + 1);
  assert_true(exposed >= 0);
  for (size_t i = 0; i < N; i++) {
    real expected = 0;
    for (int other = 0; other < size; other++) expected += value(other, i, turn);
    assert_true(x[i] == expected);
  }
  return exposed;
}

/* Through the host, memory that is not the host's counts as the GPU's does: reached by get and put alone. */
static void sums_over_ranks(void **state) {
  (void)state;
  const size_t buckets[] = {1, 400, 4000, 1 << 20};
  for (size_t b = 0; b < sizeof buckets / sizeof *buckets; b++)
    for (int remote = 0; remote < 2; remote++) {
      vd_error err = {0};
      vd_ops *o;
      vd_grad_reducer *r;
      real x[N] = {0};
      vd_grad_reducer_config config = {.comm = VD_COMM_MPI, .bucket = buckets[b], .timeout = 60, .timeline = ""};
      assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
      o->memory_is_remote = remote == 1;
      const vd_grad_reducer_arenas arenas = {.gradients = x, .shape = {.n = N}};
      assert_int_equal(vd_grad_reducer_create(&r, MPI_COMM_WORLD, &config, o, &arenas, &err), VD_OK);
      for (int turn = 0; turn < 3; turn++) sum_and_compare(r, x, turn);
      assert_int_equal(vd_grad_reducer_check(r, &err), VD_OK);
      vd_grad_reducer_destroy(r);
      o->destroy(o);
    }
}

/* A stand-in for NCCL, over MPI in host memory. It all-reduces as late as the contract allows, in wait_all_reduces, on
 * copies of the gradients taken when all_reduce was called. */
enum { MOST = 64 };
struct vd_nccl {
  int n_sum, n_abort, n_final;
  real *arena;
  vd_all_reduce_times sum[MOST];
  real *kept[MOST];
  int begun, n_before; /* the sums of the update before, and their times */
  vd_all_reduce_times before[MOST];
};

static int fake_unique_id(vd_nccl_id *id, vd_error *err) {
  memset(id->bytes, 7, sizeof id->bytes);
  return err->status;
}
static int fake_init(vd_nccl **n, vd_ops *o, const vd_nccl_id *id, int rank, int size, vd_error *err) {
  int own_rank, own_size;
  (void)o;
  MPI_Comm_rank(MPI_COMM_WORLD, &own_rank);
  MPI_Comm_size(MPI_COMM_WORLD, &own_size);
  assert_true(rank == own_rank && size == own_size && id->bytes[0] == 7 && id->bytes[127] == 7);
  *n = vd_calloc(1, sizeof **n);
  return err->status;
}
static void fake_begin_update(vd_nccl *n) {
  memcpy(n->before, n->sum, sizeof n->sum);
  n->n_before = n->n_sum;
  n->n_sum = 0;
  n->begun++;
}
static void fake_begin_backward(vd_nccl *n) {
  assert_int_equal(n->n_sum, 0);
}
static int fake_all_reduce(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err) {
  assert_true(n->n_sum < MOST);
  n->arena = arena;
  n->sum[n->n_sum] =
      (vd_all_reduce_times){first, count, false, 1 + n->n_sum, 2 + n->n_sum, 5 + n->n_sum + n->begun % 2};
  n->kept[n->n_sum] = vd_calloc(count, sizeof(real));
  memcpy(n->kept[n->n_sum++], arena + first, count * sizeof(real));
  return err->status;
}
/* NOLINTNEXTLINE(readability-non-const-parameter): a member of the table */
static int fake_refuse(vd_nccl *n, real *arena, size_t first, size_t count, vd_error *err) {
  (void)n, (void)arena, (void)first, (void)count;
  return vd_fail(err, VD_FAILED, "the sum is refused");
}
static void fake_wait_all_reduces(vd_nccl *n) {
  for (int i = 0; i < n->n_sum; i++) {
    MPI_Allreduce(n->kept[i], n->arena + n->sum[i].first, (int)n->sum[i].n, VD_MPI_REAL, MPI_SUM, MPI_COMM_WORLD);
    free(n->kept[i]);
    n->kept[i] = NULL;
  }
}
static void fake_async_error(vd_nccl *n, vd_error *err) {
  (void)n, (void)err;
}
static int fake_count(const vd_nccl *n, int before) {
  return before ? n->n_before : n->n_sum;
}
static bool fake_times(const vd_nccl *n, int before, int i, vd_all_reduce_times *t) {
  *t = before ? n->before[i] : n->sum[i];
  return true;
}
static bool fake_is_registered(const vd_nccl *n) {
  (void)n;
  return false;
}
static void fake_abort(vd_nccl *n) {
  n->n_abort++;
}
static void fake_finalize(vd_nccl *n) {
  n->n_final++;
}
static void fake_destroy(vd_nccl *n) {
  assert_int_equal(n->n_final, 1);
  for (int i = 0; i < MOST; i++) free(n->kept[i]);
  free(n);
}
static const vd_nccl_plugin fake = {.unique_id = fake_unique_id,
                                    .init = fake_init,
                                    .begin_update = fake_begin_update,
                                    .begin_backward = fake_begin_backward,
                                    .all_reduce = fake_all_reduce,
                                    .wait_all_reduces = fake_wait_all_reduces,
                                    .async_error = fake_async_error,
                                    .count = fake_count,
                                    .times = fake_times,
                                    .is_registered = fake_is_registered,
                                    .abort = fake_abort,
                                    .finalize = fake_finalize,
                                    .destroy = fake_destroy};

static vd_grad_reducer *open_fake(const vd_nccl_plugin *table, size_t bucket, const char *timeline, vd_ops **o,
                                  /* NOLINTNEXTLINE(readability-non-const-parameter): written through a struct */
                                  real *x) {
  vd_error err = {0};
  vd_grad_reducer *r;
  vd_grad_reducer_config config = {
      .comm = VD_COMM_NCCL, .nccl = table, .bucket = bucket, .timeout = 60, .timeline = timeline};
  assert_int_equal(vd_ops_cpu(o, 1, &err), VD_OK);
  const vd_grad_reducer_arenas arenas = {.gradients = x, .shape = {.n = N}};
  assert_int_equal(vd_grad_reducer_create(&r, MPI_COMM_WORLD, &config, *o, &arenas, &err), VD_OK);
  return r;
}

static void sums_in_buckets(void **state) {
  (void)state;
  const size_t buckets[] = {1, 400, 1 << 20}; /* bytes */
  for (size_t b = 0; b < sizeof buckets / sizeof *buckets; b++) {
    vd_ops *o;
    real x[N] = {0};
    vd_grad_reducer *r = open_fake(&fake, buckets[b], "", &o, x);
    for (size_t i = 0; i < N; i++) assert_true(x[i] == 0); /* trying out left zeros */
    double exposed = 0;
    for (int turn = 0; turn < 3; turn++) exposed = sum_and_compare(r, x, turn);
    assert_true(exposed > 3.9e-3 && exposed < 4.1e-3); /* of the last sum: 5 - 1 ms */
    vd_grad_reducer_destroy(r);
    o->destroy(o);
  }
}

/* The exposed time of an update may be read after the next one has begun. The stand-in's all-reduces take 4 and 5 ms in
 * turns. */
static void times_the_update_before(void **state) {
  (void)state;
  vd_ops *o;
  real x[N] = {0};
  vd_grad_reducer *r = open_fake(&fake, 400, "", &o, x);
  sum(r, x, 0);
  for (int turn = 1; turn < 5; turn++) {
    sum(r, x, turn);
    double expected = turn % 2 ? 4e-3 : 5e-3;
    assert_true(fabs(vd_grad_reducer_exposed_seconds(r, turn) - expected) < 1e-4);
  }
  assert_true(fabs(vd_grad_reducer_exposed_seconds(r, 5) - 4e-3) < 1e-4);
  vd_grad_reducer_destroy(r);
  o->destroy(o);
}

/* The timeline of rank 0 shows the buckets: at least as large as asked, each beginning where a reported range begins,
 * covering the arena once from its end. */
static void cuts_buckets(void **state) {
  (void)state;
  vd_ops *o;
  real x[N] = {0};
  char path[] = "/tmp/viaduct-timeline-XXXXXX", line[512];
  int rank, number = 0, file = mkstemp(path);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  assert_true(file >= 0);
  close(file);
  vd_grad_reducer *r = open_fake(&fake, 400, path, &o, x);
  for (int turn = 0; turn < 30; turn++) sum_and_compare(r, x, turn);
  vd_grad_reducer_destroy(r);
  o->destroy(o);
  FILE *f = fopen(path, "r");
  size_t end = N, first, n;
  assert_non_null(f);
  while (fgets(line, sizeof line, f)) {
    const char *at = strstr(line, "\"first\"");
    assert_non_null(at);
    assert_int_equal(sscanf(at, "\"first\": %zu, \"elements\": %zu", &first, &n), 2);
    assert_int_equal(first + n, end);
    assert_true(n * sizeof(real) >= 400 || first == 0);
    assert_true(n <= 2 * PIECE); /* 100 elements asked for, 96 reported at a time */
    end = first > 0 ? first : N;
    number++;
  }
  assert_int_equal(number, rank == 0 ? 10 * 6 : 0); /* updates 11 to 20, 1000 elements by 192 */
  assert_int_equal(end, N);
  fclose(f);
  unlink(path);
}

/* A sum that cannot begin is an error that is kept; what is given up is not waited for. */
static void keeps_errors(void **state) {
  (void)state;
  vd_error err = {0};
  vd_ops *o;
  real x[N] = {0};
  vd_nccl_plugin table = fake;
  vd_grad_reducer *r = open_fake(&table, 400, "", &o, x);
  vd_grad_reducer_begin(r, 1);
  vd_grad_reducer_ready(r, N, 0);
  vd_grad_reducer_ready(r, N / 2, N / 2);
  table.all_reduce = fake_refuse;
  vd_grad_reducer_ready(r, 0, N / 2);
  assert_int_equal(vd_grad_reducer_check(r, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "refused"));
  double failed = 1;
  vd_grad_reducer_all_reduce_scalars(r, &failed, 1);
  vd_error none = {0};
  assert_int_equal(vd_grad_reducer_abort(r, 1, &none), VD_OK);
  vd_grad_reducer_destroy(r);
  o->destroy(o);
}

/* The ranges that the model reported, and the gradients at that time. */
struct reported {
  const real *gradient;
  real *then;
  int *times;
  size_t arena, next;
  int n_call, n_empty;
  bool in_order;
};

static void note(void *receiver, size_t first, size_t n) {
  struct reported *t = receiver;
  t->n_call++;
  t->n_empty += n == 0;
  if (first + n != t->next || first + n > t->arena) t->in_order = false;
  t->next = first;
  for (size_t i = first; i < first + n; i++) {
    t->times[i]++;
    t->then[i] = t->gradient[i];
  }
}

static void tokens(int32_t *x, size_t n, int32_t vocab, uint64_t seed) {
  for (size_t i = 0; i < n; i++) x[i] = (int32_t)(vd_philox((vd_rng){.seed = seed}, i).v[0] % (uint32_t)vocab);
}

/* Every gradient is reported once, and has its final value then. */
static void check_model(const vd_model_config *config, int64_t streams, int64_t micro) {
  enum { BLOCK = 6 };
  vd_error err = {0};
  vd_ops *o;
  vd_model *m;
  int32_t x[4 * BLOCK], y[4 * BLOCK];
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  assert_int_equal(vd_model_create(&m, config, o, 0, streams, micro, BLOCK, true, &err), VD_OK);
  assert_int_equal(vd_model_reset_memory(m, &err), VD_OK);
  size_t n = vd_model_arena(m), moved = 0;
  struct reported t = {.gradient = vd_model_gradients(m), .arena = n};
  t.then = vd_calloc(n, sizeof *t.then);
  t.times = vd_calloc(n, sizeof *t.times);
  for (int64_t update = 0; update < 3; update++) {
    tokens(x, (size_t)(streams * BLOCK), (int32_t)config->vocab, (uint64_t)(1 + 2 * update));
    tokens(y, (size_t)(streams * BLOCK), (int32_t)config->vocab, (uint64_t)(2 + 2 * update));
    memset(t.times, 0, n * sizeof *t.times);
    memset(t.then, 0xff, n * sizeof *t.then); /* no number */
    t.next = n;
    t.n_call = t.n_empty = 0;
    t.in_order = true;
    o->zero_gradients(o, vd_model_gradients(m), n);
    vd_step step = {
        .x = x, .y = y, .block = BLOCK, .update = update, .train = true, .scale = 1, .ready = note, .receiver = &t};
    assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
    assert_true(t.in_order && t.next == 0);
    assert_int_equal(t.n_empty, 1);
    assert_int_equal(t.n_call, config->n_layer + 3); /* begin, output, layers, the rest */
    for (size_t i = 0; i < n; i++) {
      assert_int_equal(t.times[i], 1);
      assert_memory_equal(&t.then[i], &t.gradient[i], sizeof(real));
      moved += t.gradient[i] != 0;
    }
  }
  assert_true(moved > n / 2); /* the gradients are there at all */
  free(t.then);
  free(t.times);
  vd_model_destroy(m);
  o->destroy(o);
}

static void reports_final_gradients(void **state) {
  (void)state;
  for (int kind = 0; kind < 5; kind++) {
    vd_model_config c = {.arch = kind < 2 ? VD_ADAPTIVE_SPAN : VD_TRANSFORMER_XL,
                         .vocab = 11,
                         .n_layer = kind == 4 ? 1 : 3,
                         .d_model = 8,
                         .n_head = 2,
                         .d_head = 4,
                         .d_inner = 12,
                         .dropout = 0.1,
                         .attn_span = 16,
                         .ramp = 4,
                         .span_init = 0.4,
                         .span_per_layer = kind == 1,
                         .softmax = VD_MASKED,
                         .mem_len = 7,
                         .untie_r = kind == 2,
                         .seed = 1};
    check_model(&c, 3, 0);
    check_model(&c, 3, 2);
    check_model(&c, 4, 1);
  }
}

/* Nothing is reported without training, or without a receiver. */
static void reports_nothing_in_evaluation(void **state) {
  (void)state;
  vd_error err = {0};
  vd_ops *o;
  vd_model *m;
  vd_model_config c = {.vocab = 11,
                       .n_layer = 1,
                       .d_model = 8,
                       .n_head = 2,
                       .d_head = 4,
                       .d_inner = 12,
                       .attn_span = 16,
                       .ramp = 4,
                       .seed = 1};
  int32_t x[4] = {1, 2, 3, 4};
  struct reported t = {0};
  assert_int_equal(vd_ops_cpu(&o, 1, &err), VD_OK);
  assert_int_equal(vd_model_create(&m, &c, o, 0, 1, 0, 4, true, &err), VD_OK);
  vd_step step = {.x = x, .y = x, .block = 4, .scale = 1, .ready = note, .receiver = &t};
  assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
  assert_int_equal(t.n_call, 0);
  step = (vd_step){.x = x, .y = x, .block = 4, .scale = 1, .train = true};
  assert_int_equal(vd_model_run(m, &step, &err), VD_OK);
  vd_model_destroy(m);
  o->destroy(o);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(sums_over_ranks),
                                     cmocka_unit_test(sums_in_buckets),
                                     cmocka_unit_test(times_the_update_before),
                                     cmocka_unit_test(cuts_buckets),
                                     cmocka_unit_test(keeps_errors),
                                     cmocka_unit_test(reports_final_gradients),
                                     cmocka_unit_test(reports_nothing_in_evaluation)};
  MPI_Init(&argc, &argv);
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  MPI_Finalize();
  return failed;
}
