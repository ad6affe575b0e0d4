/* One update of the 12-layer model, GPU in fp32 against CPU in fp32: the same parameters, tokens and dropout masks. The
 * memories are filled by a block before. The loss is held to 1e-5. Gradients differ by more than rounding: sums before
 * a ReLU differ by a millionth of their size, so that some hidden units are on on one side only, and each of those
 * counts fully. `build/tests/rounding` shows how far this goes without any rounding, in double: parameters moved by
 * 5e-7 of their size move gradients by 8e-4 (median over the tensors) and up to 2.3e-3. So the median is held to 1e-3
 * of a tensor's norm, and every tensor to four times that. Usage: one_update [STREAMS
 * [masked|trimmed|transformer_xl [LAYERS]]], 8 streams of 'masked' unless told. */
#include "gpu_ops.h"
#include "update_case.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int64_t n_stream = argc > 1 ? atoll(argv[1]) : 8;
  vd_model_config config = update_model(argc > 2 ? argv[2] : "masked", argc > 3 ? atoll(argv[3]) : 12);
  vd_error err = {0};
  vd_ops *cpu = NULL, *gpu = NULL;
  update_outcome a = {0}, b = {0};
  const update_bounds bounds = {1e-5, 1e-3, 4e-3};
  int failed = 1;
  const vd_cuda_table *table = gpu_table(&err);
  if (table && vd_ops_cpu(&cpu, 0, &err) == VD_OK && table->ops(&gpu, 0, VD_FP32, &err) == VD_OK) {
    double t0 = MPI_Wtime();
    update_run(cpu, &config, n_stream, 0, &a, &err);
    double t1 = MPI_Wtime();
    if (err.status == VD_OK) update_run(gpu, &config, n_stream, 0, &b, &err);
    printf("# %lld streams, CPU %.1f s, GPU %.1f s\n", (long long)n_stream, t1 - t0, MPI_Wtime() - t1);
    if (err.status == VD_OK) failed = update_compare(cpu, &config, &a, &b, &bounds);
  }
  vd_error_print(&err);
  free(a.gradient);
  free(b.gradient);
  if (gpu) gpu->destroy(gpu);
  if (cpu) cpu->destroy(cpu);
  MPI_Finalize();
  return failed != 0;
}
