/* io/reader: the blocks are those of io/streams, in order, over epochs and any shards; errors come out; it stops at any
 * time; and a corpus larger than the memory allowed streams through. */
#include "io/reader.h"
#include "tests/unit/corpus_maker.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

enum { VOCAB = 61 };

typedef struct fixture {
  vd_h5 *h5;
  vd_corpus *corpus;
  char folder[256], path[300];
} fixture;

static int setup(void **state) {
  fixture *f = vd_calloc(1, sizeof *f);
  vd_error err = {0};
  const char *tmp = getenv("TMPDIR");
  snprintf(f->folder, sizeof f->folder, "%s/vd-test-reader-XXXXXX", tmp ? tmp : "/tmp");
  if (!mkdtemp(f->folder) || vd_h5_create(&f->h5, &err)) return -1;
  snprintf(f->path, sizeof f->path, "%s/c.h5", f->folder);
  *state = f;
  return 0;
}

static int teardown(void **state) {
  fixture *f = *state;
  vd_corpus_close(f->corpus);
  maker_remove(f->folder);
  vd_h5_destroy(f->h5);
  free(f);
  return 0;
}

static void make(fixture *f, int64_t n_token, int64_t shard_tokens, int deflate) {
  vd_error err = {0};
  const int64_t n[3] = {n_token, 1, 0};
  vd_corpus_close(f->corpus);
  f->corpus = NULL;
  maker_write(f->h5, f->path, n, shard_tokens, deflate, VOCAB, &err);
  vd_corpus_open(&f->corpus, f->h5, f->path, &err);
  assert_string_equal(err.message, "");
}

/* Compares block `number` with the rule; returns its targets. */
static int64_t check_block(const vd_streams *g, int64_t s0, int64_t s1, int64_t number, const int32_t *x,
                           const int32_t *y) {
  int64_t b = number % vd_stream_blocks(g), targets = 0;
  for (int64_t s = s0; s < s1; s++) {
    int64_t first = vd_stream_first(g, s) + b * g->block, last = vd_stream_first(g, s + 1);
    for (int64_t i = 0; i < g->block; i++, x++, y++) {
      bool padded = first + i >= last;
      int32_t input = padded ? 0 : maker_token(0, first + i - 1, VOCAB);
      int32_t target = padded ? -1 : maker_token(0, first + i, VOCAB);
      if (*x != input || *y != target)
        fail_msg("block %lld, stream %lld, position %lld: %d %d, not %d %d", (long long)number, (long long)s,
                 (long long)i, (int)*x, (int)*y, (int)input, (int)target);
      targets += !padded;
    }
  }
  return targets;
}

static void check_reading(fixture *f, const vd_streams *g, int64_t s0, int64_t s1, int64_t first, int64_t n,
                          int ahead) {
  vd_error err = {0};
  vd_reader *r;
  assert_int_equal(vd_reader_start(&r, f->corpus, "train", g, s0, s1, first, n, ahead, &err), VD_OK);
  const int32_t *x, *y;
  int64_t number = -1;
  for (int64_t i = first; i < first + n; i++) {
    assert_int_equal(vd_reader_next(r, &number, &x, &y, &err), VD_OK);
    assert_non_null(x);
    assert_int_equal(number, i);
    int64_t targets = check_block(g, s0, s1, i, x, y);
    if (s0 == 0 && s1 == g->n_stream) assert_int_equal(targets, vd_stream_targets(g, i % vd_stream_blocks(g)));
  }
  for (int i = 0; i < 2; i++) {
    assert_int_equal(vd_reader_next(r, &number, &x, &y, &err), VD_OK);
    assert_null(x);
  }
  vd_reader_stop(r);
}

static void test_blocks(void **state) {
  fixture *f = *state;
  srand(5);
  for (int i = 0; i < 60; i++) {
    vd_streams g = {2 + rand() % 4000, 1 + rand() % 20, 1 + rand() % 300};
    make(f, g.n_token, 1 + rand() % 2000 + g.n_token / 20, 0);
    int64_t s0 = rand() % (g.n_stream + 1), s1 = s0 + rand() % (g.n_stream - s0 + 1), blocks = vd_stream_blocks(&g);
    check_reading(f, &g, s0, s1, rand() % (3 * blocks), 2 * blocks + 1, rand() % 4);
    check_reading(f, &g, 0, g.n_stream, 0, blocks, rand() % 4);
  }
}

/* Longer than a segment, and many more blocks than are read ahead. */
static void test_long_streams(void **state) {
  fixture *f = *state;
  make(f, 400000, 150000, 1);
  vd_streams g = {400000, 3, 512};
  check_reading(f, &g, 0, 3, 200, vd_stream_blocks(&g), 3);
  vd_streams large = {400000, 2, 150000};
  check_reading(f, &large, 1, 2, 0, 5, 1);
}

/* Keeps the reader's thread from HDF5 until half a second after `asked` is set. */
struct keeper {
  vd_h5 *h5;
  atomic_bool keeps, asked;
};
static void *keep(void *self) {
  struct keeper *k = self;
  vd_h5_lock(k->h5);
  atomic_store(&k->keeps, true);
  while (!atomic_load(&k->asked)) usleep(1000);
  usleep(500000);
  vd_h5_unlock(k->h5);
  return NULL;
}

/* Counted is the wait for a block that is not read yet, and none for those that were read ahead. */
static void test_waits(void **state) {
  fixture *f = *state;
  make(f, 40000, 20000, 0);
  vd_streams g = {40000, 4, 64};
  struct keeper k = {.h5 = f->h5};
  vd_error err = {0};
  vd_reader *r;
  pthread_t keeper;
  assert_int_equal(pthread_create(&keeper, NULL, keep, &k), 0);
  while (!atomic_load(&k.keeps)) usleep(1000);
  assert_int_equal(vd_reader_start(&r, f->corpus, "train", &g, 0, 4, 0, -1, 3, &err), VD_OK);
  assert_true(vd_reader_waited(r) == 0);
  const int32_t *x, *y;
  int64_t number = -1;
  atomic_store(&k.asked, true);
  assert_int_equal(vd_reader_next(r, &number, &x, &y, &err), VD_OK);
  pthread_join(keeper, NULL);
  double first = vd_reader_waited(r), before = -1;
  for (int i = 0; i < 500 && vd_reader_waited(r) != before; i++) {
    usleep(20000);
    before = vd_reader_waited(r);
    assert_int_equal(vd_reader_next(r, &number, &x, &y, &err), VD_OK);
  }
  assert_true(first > 0 && vd_reader_waited(r) == before);
  vd_reader_stop(r);
}

static void test_too_short(void **state) {
  fixture *f = *state;
  make(f, 10, 10, 0);
  vd_streams g = {1, 4, 8};
  vd_error err = {0};
  vd_reader *r;
  assert_int_equal(vd_reader_start(&r, f->corpus, "valid", &g, 0, 4, 0, -1, 2, &err), VD_FAILED);
  assert_non_null(strstr(err.message, "valid has 1 tokens"));
  assert_null(r);
  vd_reader_stop(NULL);
}

static void test_stops_at_any_time(void **state) {
  fixture *f = *state;
  make(f, 50000, 7000, 0);
  vd_streams g = {50000, 5, 64};
  for (int i = 0; i < 200; i++) {
    vd_error err = {0};
    vd_reader *r;
    assert_int_equal(vd_reader_start(&r, f->corpus, "train", &g, 0, 5, i, -1, i % 5, &err), VD_OK);
    for (int j = 0; j < i % 7; j++) {
      int64_t number;
      const int32_t *x, *y;
      assert_int_equal(vd_reader_next(r, &number, &x, &y, &err), VD_OK);
    }
    vd_reader_stop(r);
  }
}

/* The blocks before the damage come out whole, then the error, which stays. */
/* Where in its file a shard's first chunk of tokens begins. */
static long tokens_offset(vd_h5 *h5, const char *shard) {
  vd_error err = {0};
  hid_t file;
  haddr_t at = HADDR_UNDEF;
  hsize_t bytes, first = 0;
  unsigned mask;
  vd_h5_lock(h5);
  assert_int_equal(vd_h5_open(shard, "shard", &file, &err), VD_OK);
  hid_t tokens = H5Dopen2(file, "/tokens", H5P_DEFAULT);
  assert_true(H5Dget_chunk_info_by_coord(tokens, &first, &mask, &at, &bytes) >= 0 && at != HADDR_UNDEF);
  H5Dclose(tokens);
  H5Fclose(file);
  vd_h5_unlock(h5);
  return (long)at;
}

static void test_damage_comes_out(void **state) {
  fixture *f = *state;
  make(f, 30000, 10000, 0);
  char shard[400];
  snprintf(shard, sizeof shard, "%s/c-train-0001.h5", f->folder);
  /* Somewhere within the tokens of the second shard: the stream gets there after the first. */
  vd_corpus_close(f->corpus);
  assert_true(maker_flip(shard, tokens_offset(f->h5, shard) + 5000, 3));
  vd_error err = {0};
  assert_int_equal(vd_corpus_open(&f->corpus, f->h5, f->path, &err), VD_OK);
  vd_streams g = {30000, 3, 100};
  vd_reader *r;
  assert_int_equal(vd_reader_start(&r, f->corpus, "train", &g, 0, 1, 0, -1, 2, &err), VD_OK);
  int64_t number;
  const int32_t *x, *y;
  assert_int_equal(vd_reader_next(r, &number, &x, &y, &err), VD_OK); /* stream 0 is undamaged */
  vd_reader_stop(r);
  assert_int_equal(vd_reader_start(&r, f->corpus, "train", &g, 0, 3, 0, -1, 2, &err), VD_OK);
  for (int i = 0; i < 2; i++) {
    err = (vd_error){0};
    assert_int_equal(vd_reader_next(r, &number, &x, &y, &err), VD_FAILED);
    assert_non_null(strstr(err.message, "c-train-0001.h5"));
    assert_non_null(strstr(err.message, "split train, stream 1"));
  }
  vd_reader_stop(r);
}

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#endif

#ifndef SANITIZED
/* In a child that may map `allowed` more bytes than it has: walks one epoch. */
static void read_within(fixture *f, const vd_streams *g, rlim_t allowed) {
  long pages = 0;
  FILE *statm = fopen("/proc/self/statm", "r");
  if (!statm || fscanf(statm, "%ld", &pages) != 1) exit(5);
  fclose(statm);
  rlim_t size = (rlim_t)pages * (rlim_t)sysconf(_SC_PAGESIZE) + allowed;
  if (setrlimit(RLIMIT_AS, &(struct rlimit){size, size}) != 0) exit(6);
  vd_error err = {0};
  vd_reader *r;
  if (vd_reader_start(&r, f->corpus, "train", g, 0, g->n_stream, 0, vd_stream_blocks(g), 2, &err)) exit(7);
  int64_t number, targets = 0;
  const int32_t *x, *y;
  while (vd_reader_next(r, &number, &x, &y, &err) == VD_OK && x) {
    for (int64_t i = 0; i < g->n_stream * g->block; i++) targets += y[i] >= 0;
    if (number % 16 == 0) check_block(g, 0, g->n_stream, number, x, y);
  }
  vd_reader_stop(r);
  if (err.status) fprintf(stderr, "%s\n", err.message);
  exit(err.status ? 8 : targets == g->n_token - 1 ? 0 : 9);
}
#endif

/* 300 MB of tokens within 96 MiB, of which a thread's stack and heap take most of what is not used. */
static void test_larger_than_memory(void **state) {
#ifdef SANITIZED
  (void)state;
  skip();
#else
  fixture *f = *state;
  const int64_t n = 300000000;
  make(f, n, 64000000, 1);
  vd_streams g = {n, 16, 4096};
  pid_t child = fork();
  if (child == 0) read_within(f, &g, 96 << 20);
  int status = 0;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), 0);
#endif
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_blocks, setup, teardown),
      cmocka_unit_test_setup_teardown(test_long_streams, setup, teardown),
      cmocka_unit_test_setup_teardown(test_waits, setup, teardown),
      cmocka_unit_test_setup_teardown(test_too_short, setup, teardown),
      cmocka_unit_test_setup_teardown(test_stops_at_any_time, setup, teardown),
      cmocka_unit_test_setup_teardown(test_damage_comes_out, setup, teardown),
      cmocka_unit_test_setup_teardown(test_larger_than_memory, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
