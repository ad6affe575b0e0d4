/* Every op of the CUDA backend against the double CPU reference, on fresh random inputs: odd sizes, spans at
 * their limits, optional arguments left out. Usage: test_ops [fp32|bf16|fp16|all [NAME]]: only cases whose name
 * contains NAME. The library is VIADUCT_CUDA_LIBRARY, else libviaduct_cuda.so where the loader looks. Needs a GPU. */
#include "tests/cuda/ops_case.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void run(ops_test *t) {
  test_dense(t);
  test_elementwise(t);
  test_project(t);
  test_attention_ops(t);
  test_update(t);
  test_relative(t);
}

int main(int argc, char **argv) {
  static const char *const names[] = {"fp32", "bf16", "fp16"};
  const char *which = argc > 1 ? argv[1] : "all", *library = getenv("VIADUCT_CUDA_LIBRARY");
  ops_test t = {.only = argc > 2 ? argv[2] : NULL};
  MPI_Init(&argc, &argv);
  int met = 0;
  for (int p = 0; p < 3; p++) {
    if (strcmp(which, "all") != 0 && strcmp(which, names[p]) != 0) continue;
    met++;
    t.precision = (enum side_precision)p;
    t.cpu = side_cpu_open(t.precision, NULL);
    t.gpu = side_gpu_open(t.precision, library ? library : "libviaduct_cuda.so");
    if (t.cpu && t.gpu)
      run(&t);
    else
      case_report(&t, "backends", "open", false, 0, 0);
    side_gpu_close(t.gpu);
    side_cpu_close(t.cpu);
  }
  MPI_Finalize();
  if (met == 0) fprintf(stderr, "usage: test_ops [fp32|bf16|fp16|all [NAME]]\n");
  printf("# %d ok, %d not ok\n", t.passed, t.failed);
  return t.failed > 0 || t.passed == 0;
}
