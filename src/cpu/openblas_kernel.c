#include "src/cpu/openblas_kernel.h"

#include "src/base/signals.h"

#include <cblas.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool is_one_of(const char *name, const char *const *list) {
  for (; *list; list++)
    if (strcmp(name, *list) == 0) return true;
  return false;
}

const char *vd_cpu_wider_openblas_kernel(const char *chosen, bool avx512, bool avx2) {
  static const char *const wide[] = {"SkylakeX", "Cooperlake", "SapphireRapids", NULL};
  static const char *const middle[] = {"Haswell", "Zen", NULL};
  if (is_one_of(chosen, wide)) return NULL;
  if (avx512) return "SkylakeX";
  return avx2 && !is_one_of(chosen, middle) ? "Haswell" : NULL;
}

static bool has_avx512(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

static bool has_avx2(void) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

/* By its path, so that the process keeps the program's name, by which people and scripts find it. */
static void begin_anew(char **argv) {
  char program[PATH_MAX];
  ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
  if (n > 0 && n < (ssize_t)sizeof program - 1) {
    program[n] = '\0';
    execv(program, argv);
  }
  execv("/proc/self/exe", argv); /* the file is not at that path any more */
}

void vd_cpu_choose_openblas_kernel(char **argv) {
  const char *wider = vd_cpu_wider_openblas_kernel(openblas_get_corename(), has_avx512(), has_avx2());
  if (!wider || getenv("OPENBLAS_CORETYPE")) return;
  vd_signals_block();
  if (setenv("OPENBLAS_CORETYPE", wider, 1) == 0) begin_anew(argv);
  vd_signals_catch(); /* the program was not replaced */
}
