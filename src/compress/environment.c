#include "src/compress/environment.h"

#include "src/base/real.h"
#include "src/base/version.h"

#include <cblas.h>
#include <omp.h>
#include <stdio.h>
#include <string.h>
#ifdef __GLIBC__
#include <gnu/libc-version.h>
#endif

/* The compiler and what it compiled for: sums of a vector are added in an order that depends on its width. */
#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif
#if defined(__AVX512F__)
#define TARGET "AVX-512"
#elif defined(__AVX2__)
#define TARGET "AVX2"
#elif defined(__AVX__)
#define TARGET "AVX"
#else
#define TARGET "baseline"
#endif

void vd_environment_of_process(vd_environment *e) {
  *e = (vd_environment){.backend = "cpu"};
  snprintf(e->build, sizeof e->build, "%s (%s), %s, %s, %s", vd_version(), vd_git_version(), COMPILER, TARGET,
           VD_REAL_IS_DOUBLE ? "fp64" : "fp32");
  snprintf(e->blas, sizeof e->blas, "%s", openblas_get_config());
  snprintf(e->kernel, sizeof e->kernel, "%s", openblas_get_corename());
#ifdef __GLIBC__
  snprintf(e->libc, sizeof e->libc, "glibc %s", gnu_get_libc_version());
#else
  snprintf(e->libc, sizeof e->libc, "unknown");
#endif
}

char *vd_environment_text(vd_environment *e, int i, const char **name) {
  static const char *const names[VD_N_ENVIRONMENT] = {"backend", "build", "kernel", "blas", "libc"};
  char *const texts[VD_N_ENVIRONMENT] = {e->backend, e->build, e->kernel, e->blas, e->libc};
  if (name) *name = names[i];
  return texts[i];
}

int vd_environment_check(const vd_environment *there, const vd_environment *here, vd_error *err) {
  vd_environment a = *there, b = *here;
  for (int i = 0; i < VD_N_ENVIRONMENT; i++) {
    const char *name, *was = vd_environment_text(&a, i, &name), *is = vd_environment_text(&b, i, NULL);
    if (strcmp(was, is) == 0) continue;
    return vd_fail(err, VD_FAILED,
                   "the %s differs: '%s' there, '%s' here. Predictions may differ in their last bits%s%s", name, was,
                   is, i == 2 ? "; OPENBLAS_CORETYPE chooses the kernel: OPENBLAS_CORETYPE=" : "", i == 2 ? was : "");
  }
  return VD_OK;
}

void vd_environment_use_one_thread(void) {
  omp_set_num_threads(1);
  openblas_set_num_threads(1);
}
