/* One update of the 12-layer model, GPU in fp32 against CPU in fp32: the same parameters, tokens and dropout masks. The
 * memories are filled by a block before. The loss is held to 1e-5. As the model is drawn, gradients differ by more than
 * rounding: sums before a ReLU differ by a millionth of their size, so that some hidden units are on on one side only,
 * and each of those counts fully. `build/tests/rounding` shows how far this goes without any rounding, in double:
 * parameters moved by 5e-7 of their size move gradients by 8e-4 (median over the tensors) and up to 2.3e-3. So the
 * median is held to 1e-3 of a tensor's norm, and every tensor to four times that. Then the same with hidden units that
 * are clear of the ReLU's edge, half of them on, half off: what is left is rounding, and each tensor is held to 2e-5.
 * Usage: one_update [STREAMS [masked|trimmed|transformer_xl [LAYERS [D_MODEL]]]] (default: 8 streams,
 * masked, 12 layers of 512). */
#include "tests/gpu/gpu_ops.h"
#include "tests/gpu/update_case.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

/* The update on both; returns how many quantities are out of bounds, 1 with *err filled where the update failed. */
static int compare(vd_ops *cpu, vd_ops *gpu, const vd_model_config *config, int64_t n_stream, bool clear,
                   vd_error *err) {
  const update_bounds bounds[2] = {{1e-5, 1e-3, 4e-3}, {1e-6, 1e-5, 2e-5}};
  const update_change change = {.clear = clear};
  update_outcome a = {0}, b = {0};
  int failed = 1;
  double t0 = MPI_Wtime();
  update_run(cpu, config, n_stream, &change, &a, err);
  double t1 = MPI_Wtime();
  if (err->status == VD_OK) update_run(gpu, config, n_stream, &change, &b, err);
  printf("# %lld streams, CPU %.1f s, GPU %.1f s\n", (long long)n_stream, t1 - t0, MPI_Wtime() - t1);
  if (err->status == VD_OK)
    failed = update_compare(cpu, config, clear ? "clear of the ReLU's edge: " : "", &a, &b, &bounds[clear]);
  free(a.gradient);
  free(b.gradient);
  return failed;
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  int64_t n_stream = argc > 1 ? atoll(argv[1]) : 8;
  vd_model_config config =
      update_model(argc > 2 ? argv[2] : "masked", argc > 3 ? atoll(argv[3]) : 12, argc > 4 ? atoll(argv[4]) : 512);
  vd_error err = {0};
  vd_ops *cpu = NULL, *gpu = NULL;
  int failed = 1;
  const vd_cuda_plugin *table = gpu_table(&err);
  if (table && vd_ops_cpu(&cpu, 0, &err) == VD_OK && table->ops(&gpu, 0, VD_FP32, &err) == VD_OK) {
    failed = 0;
    for (int clear = 0; clear < 2 && err.status == VD_OK; clear++)
      failed += compare(cpu, gpu, &config, n_stream, clear, &err);
  }
  vd_error_print(&err);
  if (gpu) gpu->destroy(gpu);
  if (cpu) cpu->destroy(cpu);
  MPI_Finalize();
  return failed != 0;
}
