/* What decides the bits of a prediction besides model and input: backend, build, BLAS, C library. */
#ifndef VD_ENVIRONMENT_H
#define VD_ENVIRONMENT_H

#include "src/base/error.h"

enum { VD_ENVIRONMENT_TEXT = 256, VD_N_ENVIRONMENT = 5 };

typedef struct vd_environment {
  char backend[VD_ENVIRONMENT_TEXT]; /* "cpu" */
  char build[VD_ENVIRONMENT_TEXT];   /* version, commit, compiler, instruction set, type of activations */
  char kernel[VD_ENVIRONMENT_TEXT];  /* of OpenBLAS: "SkylakeX" */
  char blas[VD_ENVIRONMENT_TEXT];    /* as OpenBLAS describes itself */
  char libc[VD_ENVIRONMENT_TEXT];    /* "glibc 2.36" */
} vd_environment;

/* Not collective. That of this process on the CPU backend. */
void vd_environment_of_process(vd_environment *e);

/* Not collective. Text i of *e, 0 <= i < VD_N_ENVIRONMENT, and its name in *name (static; NULL: not wanted). Borrowed.
 */
char *vd_environment_text(vd_environment *e, int i, const char **name);

/* Not collective. VD_FAILED where `here` differs from `there`, the environment of a file, naming both values. */
int vd_environment_check(const vd_environment *there, const vd_environment *here, vd_error *err);

/* Not collective. From now on BLAS computes with one thread: which rows and columns a thread of a product takes depends
 * on the number of threads, and the order of its sums may. */
void vd_environment_use_one_thread(void);

#endif
