/* The choice of OpenBLAS's kernel by the instructions that a processor has. */
#include "src/cpu/openblas_kernel.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static void test_choice(void **state) {
  (void)state;
  static const struct {
    const char *chosen;
    bool avx512, avx2;
    const char *wider;
  } cases[] = {
      {"Prescott", true, true, "SkylakeX"}, {"Zen", true, true, "SkylakeX"},     {"Haswell", true, true, "SkylakeX"},
      {"SkylakeX", true, true, NULL},       {"Cooperlake", true, true, NULL},    {"SapphireRapids", true, true, NULL},
      {"Prescott", false, true, "Haswell"}, {"Nehalem", false, true, "Haswell"}, {"Zen", false, true, NULL},
      {"Haswell", false, true, NULL},       {"Prescott", false, false, NULL},    {"ARMV8", false, false, NULL},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    const char *wider = vd_cpu_wider_openblas_kernel(cases[i].chosen, cases[i].avx512, cases[i].avx2);
    if (cases[i].wider == NULL)
      assert_null(wider);
    else
      assert_string_equal(wider, cases[i].wider);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(test_choice)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
