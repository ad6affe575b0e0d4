/* What the kernels of a GPU do not take is said before a GPU is touched. */
#include "src/comm/device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void refuses_config(enum vd_precision precision, vd_model_config c, const char *word) {
  vd_error err = {0};
  int status = vd_device_supports(precision, &c, &err);
  assert_int_equal(status, word ? VD_FAILED : VD_OK);
  if (word && !strstr(err.message, word)) fail_msg("'%s' is not in: %s", word, err.message);
}

static void refuses(enum vd_precision precision, int64_t n_head, int64_t d_head, const char *word) {
  refuses_config(precision, (vd_model_config){.n_head = n_head, .d_head = d_head}, word);
}

static void test_heads(void **state) {
  (void)state;
  refuses(VD_BF16, 8, 64, NULL);
  refuses(VD_BF16, 128, 128, NULL);
  refuses(VD_FP32, 8, 4, NULL);
  refuses(VD_BF16, 8, 4, "these have 4");
  refuses(VD_FP16, 8, 20, "a multiple of 8");
  refuses(VD_FP32, 8, 6, "a multiple of 4");
  refuses(VD_FP32, 2, 132, "at most 128 wide");
  refuses(VD_BF16, 129, 8, "n_head = 129");
}

/* Offsets of keys and values in a window have 32 bits. */
static void test_windows(void **state) {
  (void)state;
  vd_model_config wide = {.n_head = 128, .d_head = 128, .attn_span = 65407};
  refuses_config(VD_BF16, wide, NULL);
  wide.attn_span++;
  refuses_config(VD_BF16, wide,
                 "span%attn_span is at most 65407 where all heads of a layer are 16384 wide together, and it is 65408");
  vd_model_config xl = {.arch = VD_TRANSFORMER_XL, .n_head = 8, .d_head = 64, .mem_len = 2097023};
  refuses_config(VD_FP32, xl, NULL);
  xl.mem_len++;
  refuses_config(VD_FP32, xl, "memory%mem_len is at most 2097023");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_heads), cmocka_unit_test(test_windows)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
