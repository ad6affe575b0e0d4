#include "src/cpu/openblas_kernel.h"

#include "src/base/signals.h"

#include <cblas.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool has_avx512(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

void vd_cpu_choose_openblas_kernel(char **argv) {
  const char *chosen = openblas_get_corename();
  bool narrow = strcmp(chosen, "Haswell") == 0 || strcmp(chosen, "Zen") == 0;
  if (!narrow || !has_avx512() || getenv("OPENBLAS_CORETYPE")) return;
  vd_signals_block();
  if (setenv("OPENBLAS_CORETYPE", "SkylakeX", 1) == 0) execv("/proc/self/exe", argv);
  vd_signals_catch(); /* the program was not replaced */
}
