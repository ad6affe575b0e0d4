/* What the kernels of a GPU do not take is said before a GPU is touched. */
#include "src/comm/device.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static void refuses(enum vd_precision precision, int64_t n_head, int64_t d_head, const char *word) {
  vd_model_config c = {.n_head = n_head, .d_head = d_head};
  vd_error err = {0};
  int status = vd_device_supports(precision, &c, &err);
  assert_int_equal(status, word ? VD_FAILED : VD_OK);
  if (word && !strstr(err.message, word)) fail_msg("'%s' is not in: %s", word, err.message);
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

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_heads)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
