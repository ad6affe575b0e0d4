/* The arithmetic coder of `viaduct compress`: round trips and sizes of many distributions, carries, frequencies. */
#include "src/base/error.h"
#include "src/compress/coder.h"
#include "src/compress/packed_file.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { WHOLE = 1 << VD_FREQUENCY_BITS };

static uint64_t state_of_draws;
static uint32_t draw(void) {
  state_of_draws = state_of_draws * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(state_of_draws >> 32);
}

/* One part of the whole: [start, start + size) of 2^bits. */
struct part {
  uint32_t start, size;
  int bits;
};

/* Codes the parts and reads them back. Returns the bytes of the code, which are those of the ideal code and one. */
static size_t round_trip(const struct part *part, size_t n) {
  vd_encoder e = {0};
  vd_decoder d;
  double bits = 0;
  for (size_t i = 0; i < n; i++) {
    vd_encoder_put(&e, part[i].start, part[i].size, part[i].bits);
    bits -= log2((double)part[i].size / (double)((uint64_t)1 << part[i].bits));
  }
  vd_encoder_end(&e);
  vd_decoder_start(&d, e.bytes, e.n);
  for (size_t i = 0; i < n; i++) {
    uint32_t number = vd_decoder_peek(&d, part[i].bits);
    if (number < part[i].start || number - part[i].start >= part[i].size)
      fail_msg("part %zu: %u is not in %u + %u", i, number, part[i].start, part[i].size);
    vd_decoder_take(&d, part[i].start, part[i].size, part[i].bits);
  }
  size_t size = e.n;
  if ((double)size > bits / 8 + 2) fail_msg("%zu bytes where %.2f are enough", size, bits / 8);
  vd_encoder_free(&e);
  return size;
}

static void test_random_parts(void **state) {
  (void)state;
  enum { N = 20000 };
  struct part *part = vd_calloc(N, sizeof *part);
  for (int run = 0; run < 24; run++) {
    for (int i = 0; i < N; i++) {
      int bits = 1 + (int)(draw() % VD_FREQUENCY_BITS),
          narrow = run % 3 == 0 ? bits : (int)(draw() % (unsigned)(bits + 1));
      uint32_t whole = (uint32_t)1 << bits, size = 1 + draw() % (whole >> narrow);
      part[i] = (struct part){draw() % (whole - size + 1), size, bits};
    }
    round_trip(part, N);
  }
  free(part);
}

/* Parts at the upper end make the code 0.ffff..., which a later part may carry over; those at the lower end zeros, of
 * which none is stored. */
static void test_extremes(void **state) {
  (void)state;
  enum { N = 50000 };
  struct part *part = vd_calloc(N, sizeof *part);
  assert_int_equal(round_trip(part, 0), 0);
  for (int i = 0; i < N; i++) part[i] = (struct part){0, 1, VD_FREQUENCY_BITS};
  assert_int_equal(round_trip(part, N), 0);
  for (int i = 0; i < N; i++) part[i] = (struct part){WHOLE - 1, 1, VD_FREQUENCY_BITS};
  round_trip(part, N);
  for (int i = 0; i < N; i++) part[i] = (struct part){WHOLE - WHOLE / 2 - 1, WHOLE / 2, VD_FREQUENCY_BITS};
  round_trip(part, N);
  for (int i = 0; i < N; i++)
    part[i] = (struct part){1, WHOLE - 1, VD_FREQUENCY_BITS}; /* a long run of likely symbols */
  assert_true(round_trip(part, N) < 8);
  for (int i = 0; i < N; i++) part[i] = (struct part){0, WHOLE, VD_FREQUENCY_BITS}; /* no information at all */
  assert_true(round_trip(part, N) <= 1);
  free(part);
}

/* Which of 256 equal parts holds the number at which the code's next byte overflows. */
static uint32_t undecided(const vd_encoder *e) {
  return (uint32_t)((0 - e->low) / (e->range >> 8));
}

/* As long as the parts hold that number, bytes of 255 leave, and a later part decides whether a carry runs through all
 * of them. */
static void test_carry(void **state) {
  (void)state;
  enum { MOST = 400 };
  struct part part[MOST + 1];
  int n_carry = 0, n_none = 0;
  for (int run = 2; run < 2 * MOST; run++) {
    vd_encoder e = {0};
    int n = run / 2 + 1;
    part[0] = (struct part){0x7fffff, 2, VD_FREQUENCY_BITS}; /* 1/2 lies in it */
    for (int i = 0; i < n; i++) {
      if (i > 0) part[i] = (struct part){undecided(&e), 1, 8};
      if (i == n - 1) part[i].start = run % 2 ? part[i].start / 2 : (part[i].start + 256) / 2;
      vd_encoder_put(&e, part[i].start, part[i].size, part[i].bits);
    }
    assert_true(e.n >= (size_t)n - 2);
    bool carry = e.bytes[0] == 0x80;
    n_carry += carry;
    n_none += e.bytes[0] == 0x7f;
    for (size_t i = 1; i + 3 < e.n; i++) assert_int_equal(e.bytes[i], carry ? 0 : 0xff);
    vd_encoder_free(&e);
    round_trip(part, (size_t)n);
  }
  assert_true(n_carry > MOST / 2 && n_none > MOST / 2 && n_carry + n_none == 2 * MOST - 2);
}

/* A code that no encoder wrote gives numbers in range, and nothing is read behind its end. */
static void test_foreign_code(void **state) {
  (void)state;
  for (int run = 0; run < 200; run++) {
    size_t n = draw() % 40;
    uint8_t *bytes = malloc(n > 0 ? n : 1);
    for (size_t i = 0; i < n; i++) bytes[i] = run % 4 == 0 ? 0xff : (uint8_t)draw();
    vd_decoder d;
    vd_decoder_start(&d, bytes, n);
    for (int i = 0; i < 100; i++) {
      uint32_t number = vd_decoder_peek(&d, VD_FREQUENCY_BITS), start = number / 1000 * 1000;
      assert_true(number < WHOLE);
      vd_decoder_take(&d, start, start + 1000 < WHOLE ? 1000 : WHOLE - start, VD_FREQUENCY_BITS);
    }
    free(bytes);
  }
}

/* Every symbol has a part, the parts cover the whole, and cost what the softmax says. */
static void check_frequencies(const real *logits, int n, uint32_t escape, double most_excess) {
  vd_frequencies f;
  vd_frequencies_set(&f, logits, n, escape);
  double top = (double)logits[0], sum = 0, ideal = 0, cost = 0;
  assert_true(f.n == n && f.start[0] == 0 && f.start[n + 1] == WHOLE && WHOLE - f.start[n] == escape);
  for (int i = 0; i < n; i++) top = (double)logits[i] > top ? (double)logits[i] : top;
  for (int i = 0; i < n; i++) sum += exp((double)logits[i] - top);
  for (int i = 0; i < n; i++) {
    assert_true(f.start[i + 1] > f.start[i]);
    double p = exp((double)logits[i] - top) / sum;
    if (p > 0) ideal -= p * log2(p);
    cost -= p * log2((double)(f.start[i + 1] - f.start[i]) / WHOLE);
    assert_int_equal(vd_frequencies_find(&f, f.start[i]), i);
    assert_int_equal(vd_frequencies_find(&f, f.start[i + 1] - 1), i);
  }
  if (escape > 0) assert_int_equal(vd_frequencies_find(&f, WHOLE - 1), n);
  if (cost > ideal + most_excess) fail_msg("%d symbols cost %.9f bits, ideally %.9f", n, cost, ideal);
}

static void test_frequencies(void **state) {
  (void)state;
  real logits[VD_MOST_SYMBOLS];
  for (int run = 0; run < 400; run++) {
    int n = 1 + (int)(draw() % VD_MOST_SYMBOLS);
    double spread = pow(2, (int)(draw() % 12) - 3), shift = run % 5 == 0 ? 1e6 : 0;
    for (int i = 0; i < n; i++) logits[i] = (real)(shift + spread * ((double)draw() / 4294967296.0 - 0.5));
    check_frequencies(logits, n, run % 2 ? 1 : 0, 5e-5);
  }
  for (int n = 1; n <= VD_MOST_SYMBOLS; n += 51)
    for (int likely = 0; likely < n; likely++) { /* all but one are next to impossible */
      for (int i = 0; i < n; i++) logits[i] = (real)(i == likely ? 0 : -1e30);
      check_frequencies(logits, n, 1, 5e-5);
      check_frequencies(logits, n, WHOLE - WHOLE / 64, 8);
    }
}

static void test_escapes(void **state) {
  (void)state;
  double bits = 0;
  for (int64_t i = 0; i < 100000; i++) bits -= log2(1 - (double)vd_escape_frequency(0, i) / WHOLE);
  assert_true(bits < 0.2); /* what a file without escapes pays in all */
  assert_int_equal(vd_escape_frequency(INT64_C(1) << 40, INT64_C(1) << 40), WHOLE - WHOLE / 64);
  assert_int_equal(vd_escape_frequency(0, INT64_C(1) << 40), 1);
  assert_true(vd_escape_frequency(0, 0) == WHOLE / 512 && vd_escape_frequency(50, 98) > WHOLE / 2);
}

/* What was written is read; every flipped byte, every shorter and a longer file is refused. */
static void test_packed_file(void **state) {
  (void)state;
  char path[1024];
  const char *base = getenv("TMPDIR");
  snprintf(path, sizeof path, "%s/viaduct-packed-XXXXXX", base ? base : "/tmp");
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  close(fd);
  int64_t length[3] = {2, 0, 3};
  uint8_t code[5] = {1, 2, 3, 4, 5};
  vd_packed p = {.n_byte = 9, .update = 70000, .n_stream = 3, .group = 2, .length = length, .code = code, .n_code = 5};
  memset(p.sha256, 7, sizeof p.sha256);
  memset(p.checkpoint, 'a', VD_DIGEST_TEXT - 1);
  snprintf(p.memory, sizeof p.memory, "&memory\n/\n");
  vd_environment_of_process(&p.environment);
  vd_error err = {0};
  vd_packed q;
  assert_int_equal(vd_packed_write(&p, path, &err), VD_OK);
  assert_true(vd_packed_is(path));
  assert_int_equal(vd_packed_read(&q, path, &err), VD_OK);
  assert_true(q.n_byte == 9 && q.update == 70000 && q.n_stream == 3 && q.group == 2 && q.n_code == 5);
  assert_memory_equal(q.code, code, 5);
  assert_memory_equal(q.length, length, sizeof length);
  assert_memory_equal(q.sha256, p.sha256, sizeof p.sha256);
  assert_string_equal(q.checkpoint, p.checkpoint);
  assert_string_equal(q.memory, p.memory);
  assert_int_equal(vd_environment_check(&q.environment, &p.environment, &err), VD_OK);
  vd_packed_free(&q);

  int64_t size = vd_packed_size(&p);
  FILE *file = fopen(path, "r+b");
  for (int64_t i = 0; i < size; i++) {
    vd_error refused = {0};
    assert_int_equal(fseek(file, (long)i, SEEK_SET), 0);
    int byte = fgetc(file);
    fseek(file, (long)i, SEEK_SET);
    fputc(byte ^ 0x10, file);
    fflush(file);
    assert_int_equal(vd_packed_read(&q, path, &refused), VD_FAILED);
    vd_packed_free(&q);
    fseek(file, (long)i, SEEK_SET);
    fputc(byte, file);
    fflush(file);
  }
  fclose(file);
  for (int64_t i = size - 1; i >= 0; i -= 7) {
    vd_error refused = {0};
    assert_int_equal(truncate(path, i), 0);
    assert_int_equal(vd_packed_read(&q, path, &refused), VD_FAILED);
    vd_packed_free(&q);
  }
  unlink(path);
}

static void test_environments(void **state) {
  (void)state;
  vd_environment a, b;
  vd_environment_of_process(&a);
  for (int i = 0; i < VD_N_ENVIRONMENT; i++) {
    const char *name;
    vd_error err = {0};
    b = a;
    snprintf(vd_environment_text(&b, i, &name), VD_ENVIRONMENT_TEXT, "Other");
    assert_int_equal(vd_environment_check(&a, &b, &err), VD_FAILED);
    assert_non_null(strstr(err.message, name));
    assert_non_null(strstr(err.message, "'Other' here"));
    assert_non_null(strstr(err.message, vd_environment_text(&a, i, NULL)));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_random_parts), cmocka_unit_test(test_extremes),
                                     cmocka_unit_test(test_carry),        cmocka_unit_test(test_foreign_code),
                                     cmocka_unit_test(test_frequencies),  cmocka_unit_test(test_escapes),
                                     cmocka_unit_test(test_packed_file),  cmocka_unit_test(test_environments)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
