/* io/streams: every target exactly once, for any sizes and any number of ranks. */
#include "io/streams.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Walks all blocks of all streams as the reader does and counts how often each token is a target. */
static void check_cover(int64_t n, int64_t n_stream, int64_t block) {
  vd_streams g = {n, n_stream, block};
  unsigned char *seen = calloc((size_t)n + 1, 1);
  int64_t blocks = vd_stream_blocks(&g), all = 0;
  for (int64_t b = 0; b < blocks; b++) {
    int64_t targets = 0;
    for (int64_t s = 0; s < n_stream; s++) {
      int64_t first = vd_stream_first(&g, s) + b * block, last = vd_stream_first(&g, s + 1);
      for (int64_t t = first; t < first + block && t < last; t++, targets++) seen[t]++;
    }
    assert_int_equal(vd_stream_targets(&g, b), targets);
    assert_true(targets > 0);
    all += targets;
  }
  assert_int_equal(all, n < 2 ? 0 : n - 1);
  assert_int_equal(vd_stream_targets(&g, blocks), 0);
  for (int64_t t = 0; t < n; t++) assert_int_equal(seen[t], t == 0 ? 0 : 1);
  free(seen);
}

static void test_every_target_once(void **state) {
  (void)state;
  for (int64_t n = 1; n <= 40; n++)
    for (int64_t s = 1; s <= 12; s++)
      for (int64_t block = 1; block <= 9; block++) check_cover(n, s, block);
  srand(7);
  for (int i = 0; i < 300; i++) check_cover(1 + rand() % 5000, 1 + rand() % 100, 1 + rand() % 700);
}

static void test_borders(void **state) {
  (void)state;
  vd_streams g = {1001, 4, 100};
  assert_int_equal(vd_stream_first(&g, 0), 1);
  assert_int_equal(vd_stream_first(&g, 1), 251);
  assert_int_equal(vd_stream_first(&g, 4), 1001);
  assert_int_equal(vd_stream_blocks(&g), 3);
  assert_int_equal(vd_stream_targets(&g, 2), 200);
  vd_streams none = {0, 4, 100}, one = {1, 4, 100};
  assert_int_equal(vd_stream_blocks(&none), 0);
  assert_int_equal(vd_stream_blocks(&one), 0);
}

/* s (n-1) would overflow 64 bits here: streams must still rise evenly and end at n. */
static void test_no_overflow(void **state) {
  (void)state;
  vd_streams g = {1000000000000000, 1048576, 512};
  assert_true(vd_stream_first(&g, g.n_stream) == g.n_token);
  for (int64_t s = 0; s < g.n_stream; s += 1023) {
    int64_t length = vd_stream_first(&g, s + 1) - vd_stream_first(&g, s);
    assert_true(length == 953674316 || length == 953674317);
  }
}

static void test_shares(void **state) {
  (void)state;
  for (int size = 1; size <= 20; size++)
    for (int64_t n = 1; n <= 50; n++) {
      int64_t next = 0, most = 0;
      for (int rank = 0; rank < size; rank++) {
        int64_t first, last;
        vd_stream_share(n, rank, size, &first, &last);
        assert_int_equal(first, next);
        assert_true(last - first == n / size || last - first == n / size + 1);
        next = last;
        most = last - first > most ? last - first : most;
      }
      assert_int_equal(next, n);
      assert_int_equal(vd_stream_greatest_share(n, size), most);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_target_once),
      cmocka_unit_test(test_borders),
      cmocka_unit_test(test_no_overflow),
      cmocka_unit_test(test_shares),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
