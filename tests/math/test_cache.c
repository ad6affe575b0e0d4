/* Caches of projected memory in double: equal to 1e-12. */
#include "tests/math/cache_cases.h"

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(adaptive_span), cmocka_unit_test(transformer_xl)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
