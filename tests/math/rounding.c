/* How far the gradients of one update move when every parameter moves by a little of its size, in double: what rounding
 * in fp32 can do, without rounding. Not a test: tests/gpu/one_update.c takes its bounds from it. Usage: rounding
 * [STREAMS [masked|trimmed|transformer_xl [LAYERS [NOISE [clear]]]]], unless told 2 streams, masked, 12 layers, 5e-7;
 * clear: hidden units are kept clear of the ReLU's edge. */
#include "tests/gpu/update_case.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
  int64_t n_stream = argc > 1 ? atoll(argv[1]) : 2;
  bool clear = argc > 5 && strcmp(argv[5], "clear") == 0;
  const update_change none = {.clear = clear}, noise = {argc > 4 ? atof(argv[4]) : 5e-7, clear};
  vd_model_config config = update_model(argc > 2 ? argv[2] : "masked", argc > 3 ? atoll(argv[3]) : 12, 512);
  const update_bounds bounds = {INFINITY, INFINITY, INFINITY};
  vd_error err = {0};
  vd_ops *cpu = NULL;
  update_outcome still = {0}, moved = {0};
  if (vd_ops_cpu(&cpu, 0, &err) == VD_OK && update_run(cpu, &config, n_stream, &none, &still, &err) == VD_OK &&
      update_run(cpu, &config, n_stream, &noise, &moved, &err) == VD_OK)
    update_compare(cpu, &config, "", &still, &moved, &bounds);
  vd_error_print(&err);
  free(still.gradient);
  free(moved.gradient);
  if (cpu) cpu->destroy(cpu);
  return err.status != VD_OK;
}
