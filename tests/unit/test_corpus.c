/* io/corpus: what is written is read again, over any borders of shards; damage is named and never read as tokens. */
#include "io/corpus.h"
#include "tests/unit/corpus_maker.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

typedef struct fixture {
  vd_h5 *h5;
  char folder[256], path[300];
} fixture;

static int setup(void **state) {
  fixture *f = vd_calloc(1, sizeof *f);
  vd_error err = {0};
  const char *tmp = getenv("TMPDIR");
  snprintf(f->folder, sizeof f->folder, "%s/vd-test-corpus-XXXXXX", tmp ? tmp : "/tmp");
  if (!mkdtemp(f->folder) || vd_h5_create(&f->h5, &err)) return -1;
  snprintf(f->path, sizeof f->path, "%s/c.h5", f->folder);
  *state = f;
  return 0;
}

static int teardown(void **state) {
  fixture *f = *state;
  maker_remove(f->folder);
  vd_h5_destroy(f->h5);
  free(f);
  return 0;
}

static vd_corpus *open_made(fixture *f, const int64_t n[3], int64_t shard_tokens, int deflate, int64_t vocab) {
  vd_error err = {0};
  vd_corpus *c = NULL;
  maker_write(f->h5, f->path, n, shard_tokens, deflate, vocab, &err);
  assert_string_equal(err.message, "");
  vd_corpus_open(&c, f->h5, f->path, &err);
  assert_string_equal(err.message, "");
  return c;
}

static void check_read(vd_corpus *c, int split, int64_t first, int64_t n, int64_t vocab) {
  vd_error err = {0};
  int32_t *out = vd_calloc((size_t)n + 1, sizeof *out);
  out[n] = 77;
  assert_int_equal(vd_corpus_read(c, vd_split_name(split), first, n, out, &err), VD_OK);
  for (int64_t i = 0; i < n; i++) assert_int_equal(out[i], maker_token(split, first + i, vocab));
  assert_int_equal(out[n], 77);
  free(out);
}

static void check_round_trip(fixture *f, int64_t shard_tokens, int deflate, int64_t vocab) {
  const int64_t n[3] = {20000, 1000, 0};
  vd_corpus *c = open_made(f, n, shard_tokens, deflate, vocab);
  vd_error err = {0};
  for (int k = 0; k < 3; k++) {
    int64_t length = -1;
    assert_int_equal(vd_corpus_length(c, vd_split_name(k), &length, &err), VD_OK);
    assert_int_equal(length, n[k]);
    check_read(c, k, 0, n[k], vocab);
  }
  assert_int_equal(vd_corpus_vocab(c), vocab);
  for (int i = 0; i < 300; i++) {
    int64_t first = rand() % n[0];
    check_read(c, 0, first, rand() % (n[0] - first + 1), vocab);
  }
  char id[64];
  snprintf(id, sizeof id, "%s", vd_corpus_id(c));
  vd_corpus_close(c);
  assert_int_equal(vd_corpus_remove(f->h5, f->path, "another corpus", &err), VD_OK);
  assert_int_not_equal(rmdir(f->folder), 0); /* the shards are another corpus's */
  assert_int_equal(vd_corpus_remove(f->h5, f->path, id, &err), VD_OK);
  assert_int_equal(rmdir(f->folder), 0); /* nothing is left behind */
  assert_int_equal(mkdir(f->folder, 0700), 0);
}

static void test_round_trip(void **state) {
  srand(3);
  check_round_trip(*state, 20000, 0, 256);
  check_round_trip(*state, 777, 0, 205); /* 26 shards: more than are held open */
  check_round_trip(*state, 6001, 3, 300);
  check_round_trip(*state, 1000000, 9, 65535);
}

/* Shards of several chunks, the last one not full: HDF5 compares the checksum of each when it reads. */
static void test_many_chunks(void **state) {
  const int64_t n[3] = {200001, 65537, 1}, vocab[] = {1, 200, 300};
  for (size_t i = 0; i < sizeof vocab / sizeof *vocab; i++) {
    vd_corpus *c = open_made(*state, n, 150000, 0, vocab[i]);
    for (int k = 0; k < 3; k++) check_read(c, k, 0, n[k], vocab[i]);
    vd_corpus_close(c);
  }
}

/* A limit on the size of files stands for a full disk. Both ways to the file tell what the system said. */
static void test_full_disk(void **state) {
  fixture *f = *state;
  const int64_t n[3] = {1200000, 0, 0};
  struct rlimit before, small;
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
  small = (struct rlimit){4000, before.rlim_max};
  for (int deflate = 0; deflate < 2; deflate++) {
    vd_error err = {0};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    maker_write(f->h5, f->path, n, 1200000, deflate, 65535, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    assert_int_equal(err.status, VD_FAILED);
    assert_non_null(strstr(err.message, "c-train-0000.h5"));
    assert_non_null(strstr(err.message, "File too large"));
    assert_int_equal(rmdir(f->folder), 0); /* nothing is left behind */
    assert_int_equal(mkdir(f->folder, 0700), 0);
  }
}

static void test_names_of_files(void **state) {
  (void)state;
  char prefix[64], name[64], path[64];
  vd_error err = {0};
  vd_corpus_prefix("data/a-train.h5", prefix, sizeof prefix);
  assert_string_equal(prefix, "a-train");
  vd_shard_name(prefix, 2, 12345, name, sizeof name);
  assert_string_equal(name, "a-train-test-12345.h5");
  assert_int_equal(vd_shard_path("data/x.h5", "a", 0, 7, path, sizeof path, &err), VD_OK);
  assert_string_equal(path, "data/a-train-0007.h5");
  assert_int_equal(vd_shard_path("data/x.h5", "a", 0, 7, path, 20, &err), VD_FAILED);
  static const char *const own[] = {"a-train-0000.h5", "a-test-12345.h5", ".a-valid-0001.h5.tmp-5", ".a.h5.tmp-77"};
  static const char *const foreign[] = {
      "a.h5",         "a-train-000.h5", "a-train-0000.h5x", "a-training-0000.h5", "b-train-0000.h5",
      ".b.h5.tmp-77", ".a.h5.tmp-",     "a-train-.h5"};
  for (size_t i = 0; i < sizeof own / sizeof *own; i++) assert_true(vd_corpus_owns("a", own[i]));
  for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++) assert_false(vd_corpus_owns("a", foreign[i]));
  assert_true(vd_corpus_owns("a.tmp-1", ".a.tmp-1.h5.tmp-2"));
  assert_int_equal(vd_shard_length(10, 4, 0), 4);
  assert_int_equal(vd_shard_length(10, 4, 2), 2);
  assert_int_equal(vd_split_number("valid"), 1);
  assert_int_equal(vd_split_number("trian"), -1);
}

static void test_unknown_split(void **state) {
  const int64_t n[3] = {100, 50, 50};
  vd_corpus *c = open_made(*state, n, 64, 0, 10);
  vd_error err = {0};
  int64_t length;
  assert_int_equal(vd_corpus_length(c, "trian", &length, &err), VD_USAGE);
  assert_non_null(strstr(err.message, "'train', 'valid' and 'test'"));
  vd_corpus_close(c);
}

static void test_symbols(void **state) {
  const int64_t n[3] = {100, 50, 50};
  vd_corpus *c = open_made(*state, n, 64, 0, 300);
  size_t length, used;
  assert_memory_equal(vd_corpus_symbol(c, 299, &length), "s299", 4);
  assert_int_equal(length, 4);
  assert_true(vd_corpus_is_word_level(c));
  assert_int_equal(vd_corpus_encode(c, "s29", 3, &used), 29);
  assert_int_equal(vd_corpus_encode(c, "s299x", 5, &used), 299); /* the longest, not s2 or s29 */
  assert_int_equal(used, 4);
  assert_int_equal(vd_corpus_encode(c, "s299x", 3, &used), 29);
  assert_int_equal(vd_corpus_encode(c, "x", 1, &used), -1);
  vd_corpus_close(c);
}

static void opening_fails(fixture *f, const char *file, const char *word) {
  vd_error err = {0};
  vd_corpus *c;
  assert_int_equal(vd_corpus_open(&c, f->h5, f->path, &err), VD_FAILED);
  assert_null(c);
  if (!strstr(err.message, file) || !strstr(err.message, word))
    fail_msg("'%s' does not name %s and '%s'", err.message, file, word);
}

static void test_shards_missing_or_foreign(void **state) {
  fixture *f = *state;
  const int64_t n[3] = {2500, 500, 500}, other[3] = {2501, 500, 500};
  char shard[400], second[400], text[400];
  snprintf(shard, sizeof shard, "%s/c-train-0001.h5", f->folder);
  snprintf(second, sizeof second, "%s/c-train-0000.h5", f->folder);
  snprintf(text, sizeof text, "%s/kept", f->folder);
  vd_corpus_close(open_made(f, other, 1000, 0, 10));
  assert_int_equal(rename(shard, text), 0);
  vd_corpus_close(open_made(f, n, 1000, 0, 10));
  assert_int_equal(unlink(shard), 0);
  opening_fails(f, "c-train-0001.h5", "No such file");
  assert_int_equal(rename(text, shard), 0);
  opening_fails(f, "c-train-0001.h5", "belongs to the corpus");
  assert_int_equal(rename(second, shard), 0);
  vd_corpus_close(open_made(f, n, 1000, 0, 10));
  assert_int_equal(rename(second, shard), 0);
  opening_fails(f, "c-train-0000.h5", "No such file");
  assert_int_equal(link(shard, second), 0);
  opening_fails(f, "c-train-0001.h5", "holds train from token 0 on, not train from token 1000 on");
  assert_int_equal(truncate(shard, 3000), 0);
  opening_fails(f, "c-train-0000.h5", "truncated");
  assert_int_equal(truncate(f->path, 3000), 0);
  opening_fails(f, "c.h5", "truncated");
}

/* A shard that disappears or is damaged after it was opened must not read as zeros. Any flipped bit is either without
 * meaning or an error that names the shard. */
static void test_flipped_bits_of_a_shard(void **state) {
  fixture *f = *state;
  const int64_t n[3] = {3000, 10, 10};
  vd_corpus_close(open_made(f, n, 3000, 0, 50));
  char shard[400];
  snprintf(shard, sizeof shard, "%s/c-train-0000.h5", f->folder);
  int32_t out[3000];
  int caught = 0, harmless = 0;
  for (long at = 0; maker_flip(shard, at, (int)(at % 8)); at += 3) {
    vd_error err = {0};
    vd_corpus *c;
    if (vd_corpus_open(&c, f->h5, f->path, &err) == VD_OK) {
      vd_corpus_read(c, "train", 0, 3000, out, &err);
      vd_corpus_close(c);
    }
    if (err.status) {
      assert_non_null(strstr(err.message, "c-train-0000.h5"));
      caught++;
    } else {
      for (int i = 0; i < 3000; i++) assert_int_equal(out[i], maker_token(0, i, 50));
      harmless++;
    }
    maker_flip(shard, at, (int)(at % 8));
  }
  print_message("%d flips caught, %d without meaning\n", caught, harmless);
  assert_true(caught >= 1000); /* all those of the 3000 bytes of tokens at least */
  vd_error err = {0};
  vd_corpus *c;
  assert_int_equal(vd_corpus_open(&c, f->h5, f->path, &err), VD_OK);
  vd_corpus_close(c);
}

static void test_flipped_bits_of_the_index(void **state) {
  fixture *f = *state;
  const int64_t n[3] = {300, 10, 10};
  vd_corpus_close(open_made(f, n, 3000, 0, 50));
  for (long at = 0; maker_flip(f->path, at, (int)(at % 8)); at += 11) {
    vd_error err = {0};
    vd_corpus *c;
    if (vd_corpus_open(&c, f->h5, f->path, &err) != VD_FAILED) fail_msg("a flip at %ld went unseen", at);
    assert_non_null(strstr(err.message, "c.h5"));
    maker_flip(f->path, at, (int)(at % 8));
  }
}

static void test_compare(void **state) {
  fixture *f = *state;
  const int64_t n[3] = {300, 10, 10};
  char why[512];
  vd_corpus_plan plan = {.path = f->path, .shard_tokens = 100};
  assert_int_equal(vd_corpus_compare(f->h5, &plan, why, sizeof why), VD_CORPUS_ABSENT);
  vd_corpus *c = open_made(f, n, 100, 0, 50);
  snprintf(plan.id, sizeof plan.id, "%s", vd_corpus_id(c));
  vd_corpus_close(c);
  assert_int_equal(vd_corpus_compare(f->h5, &plan, why, sizeof why), VD_CORPUS_SAME);
  plan.shard_tokens = 101;
  assert_int_equal(vd_corpus_compare(f->h5, &plan, why, sizeof why), VD_CORPUS_OTHER);
  assert_non_null(strstr(why, "100 tokens"));
  plan.shard_tokens = 100;
  plan.id[0] = 'x';
  assert_int_equal(vd_corpus_compare(f->h5, &plan, why, sizeof why), VD_CORPUS_OTHER);
  plan.id[0] = '0';
  char shard[400];
  snprintf(shard, sizeof shard, "%s/c-train-0002.h5", f->folder);
  assert_int_equal(unlink(shard), 0);
  assert_int_equal(vd_corpus_compare(f->h5, &plan, why, sizeof why), VD_CORPUS_DAMAGED);
  assert_non_null(strstr(why, "c-train-0002.h5"));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_setup_teardown(test_round_trip, setup, teardown),
      cmocka_unit_test_setup_teardown(test_many_chunks, setup, teardown),
      cmocka_unit_test_setup_teardown(test_full_disk, setup, teardown),
      cmocka_unit_test(test_names_of_files),
      cmocka_unit_test_setup_teardown(test_unknown_split, setup, teardown),
      cmocka_unit_test_setup_teardown(test_symbols, setup, teardown),
      cmocka_unit_test_setup_teardown(test_shards_missing_or_foreign, setup, teardown),
      cmocka_unit_test_setup_teardown(test_flipped_bits_of_a_shard, setup, teardown),
      cmocka_unit_test_setup_teardown(test_flipped_bits_of_the_index, setup, teardown),
      cmocka_unit_test_setup_teardown(test_compare, setup, teardown),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
