/* The parts of `viaduct generate`: escapes, stop texts, the terminal, the sampler. */
#include "src/base/terminal_text.h"
#include "src/commands/generated_text.h"
#include "src/model/sampler.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_escapes(void **state) {
  (void)state;
  vd_error err = {0};
  char *bytes;
  size_t n;
  assert_int_equal(vd_unescape("a\\n\\t\\r\\\\\\x00\\xfFz", &bytes, &n, &err), VD_OK);
  assert_int_equal(n, 8);
  assert_memory_equal(bytes, "a\n\t\r\\\0\xffz", 8);
  free(bytes);
  static const char *const wrong[] = {"a\\", "\\q", "\\x", "\\x1", "\\x1g", "\\N"};
  for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
    vd_error refused = {0};
    assert_int_equal(vd_unescape(wrong[i], &bytes, &n, &refused), VD_USAGE);
    assert_non_null(strstr(refused.message, "is no escape"));
  }
}

/* Appends `text` byte by byte and takes what is final at once; returns what was taken. */
static const char *stopped(const char *prompt, const char *text, const char *stop, bool *ended) {
  static char out[256];
  size_t n = 0;
  vd_generated_text t = {0};
  vd_generated_text_prompt(&t, prompt, strlen(prompt));
  for (size_t i = 0; i <= strlen(text); i++) {
    if (i > 0) vd_generated_text_append(&t, text + i - 1, 1, stop, strlen(stop));
    if (t.final > 0) memcpy(out + n, t.bytes, t.final);
    n += t.final;
    vd_generated_text_take(&t);
  }
  *ended = t.ended;
  vd_generated_text_end(&t);
  if (t.final > 0) memcpy(out + n, t.bytes, t.final);
  out[n + t.final] = 0;
  vd_generated_text_free(&t);
  return out;
}

static void test_stop(void **state) {
  (void)state;
  bool ended;
  assert_string_equal(stopped("ab", "cdef", "", &ended), "abcdef");
  assert_false(ended);
  assert_string_equal(stopped("ab", "aabaabaac--", "aabaac", &ended), "abaab");
  assert_true(ended);
  assert_string_equal(stopped("xab", "bcab", "abc", &ended), "xabbcab"); /* the prompt is no part of the stop text */
  assert_false(ended);
  assert_string_equal(stopped("", "a\n\nb", "\n\n", &ended), "a");
  assert_true(ended);
}

static const char *screened(const char *text, size_t n, bool begin) {
  static char out[256];
  memset(out, 0, sizeof out);
  FILE *f = fmemopen(out, sizeof out, "w");
  vd_terminal_text t = {0};
  for (size_t i = 0; i < n; i++) vd_terminal_text_put(&t, text + i, 1, f);
  if (!begin) vd_terminal_text_end(&t, f);
  fclose(f);
  return out;
}
#define SCREENED(text) screened(text, sizeof(text) - 1, false)

static void test_terminal(void **state) {
  (void)state;
  assert_string_equal(SCREENED("plain\ttext"), "plain\ttext\n");
  assert_string_equal(SCREENED("line\n"), "line\n");
  assert_string_equal(SCREENED(""), "");
  assert_string_equal(SCREENED("\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"), "\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80\n");
  assert_string_equal(SCREENED("\x1b[2J\r\x7f"), "\\x1B[2J\\x0D\\x7F\n");
  assert_string_equal(SCREENED("\xc2\x9b\xe2\x80\xae"), "\\xC2\\x9B\\xE2\\x80\\xAE\n");
  assert_string_equal(SCREENED("\xff\xc3(\xe2\x82"), "\\xFF\\xC3(\\xE2\\x82\n");
  assert_string_equal(SCREENED("\xed\xa0\x80\xc0\xaf"), "\\xED\\xA0\\x80\\xC0\\xAF\n"); /* surrogate, overlong */
  assert_string_equal(screened("a\xe2\x82", 3, true), "a"); /* held back until it is complete */
}

static void test_sampler(void **state) {
  (void)state;
  enum { N = 20000 };
  const real logits[4] = {(real)0.0, (real)1.0986122886681098, (real)0.0, (real)1.6094379124341003}; /* 1 3 1 5 */
  const struct {
    double temperature;
    int64_t top_k;
    double top_p, share[4];
  } cases[] = {
      {1, 0, 1, {.1, .3, .1, .5}},
      {0, 0, 1, {0, 0, 0, 1}},
      {1, 1, 1, {0, 0, 0, 1}},
      {1, 2, 1, {0, .375, 0, .625}},
      {1, 0, .5, {0, 0, 0, 1}},
      {1, 0, .79, {0, .375, 0, .625}},
      {1, 2, .7, {0, .375, 0, .625}},
      {1, 2, .6, {0, 0, 0, 1}},
      {.5, 0, 1, {1 / 36., 9 / 36., 1 / 36., 25 / 36.}},
      {1, 0, .85, {1 / 9., 3 / 9., 0, 5 / 9.}},
  };
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    double count[4] = {0};
    vd_sampler *s = vd_sampler_create(4, cases[c].temperature, cases[c].top_k, cases[c].top_p, 11);
    for (int64_t i = 0; i < N; i++) count[vd_sampler_draw(s, logits, 3, i)]++;
    vd_sampler_destroy(s);
    for (int v = 0; v < 4; v++)
      assert_true(fabs(count[v] / N - cases[c].share[v]) < (cases[c].share[v] > 0 ? .02 : 1e-9));
  }
}

static void test_reproducible(void **state) {
  (void)state;
  enum { N = 200 };
  const real logits[3] = {0};
  vd_sampler *a = vd_sampler_create(3, 1, 0, 1, 5), *b = vd_sampler_create(3, 1, 0, 1, 5),
             *c = vd_sampler_create(3, 1, 0, 1, 6);
  int other_sample = 0, other_seed = 0;
  for (int64_t i = N - 1; i >= 0; i--) vd_sampler_draw(b, logits, 0, i); /* draws leave no trace */
  for (int64_t i = 0; i < N; i++) {
    int64_t id = vd_sampler_draw(a, logits, 0, i);
    assert_int_equal(id, vd_sampler_draw(b, logits, 0, i));
    other_sample += id != vd_sampler_draw(b, logits, 1, i);
    other_seed += id != vd_sampler_draw(c, logits, 0, i);
  }
  assert_true(other_sample > N / 3 && other_seed > N / 3);
  vd_sampler_destroy(a);
  vd_sampler_destroy(b);
  vd_sampler_destroy(c);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_escapes), cmocka_unit_test(test_stop),         cmocka_unit_test(test_terminal),
      cmocka_unit_test(test_sampler), cmocka_unit_test(test_reproducible),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
