/* NCCL with a rank that never arrives: the watchdog must end the wait. One process initialises a communicator as rank 0
 * of 2; there is no rank 1. After TIMEOUT seconds the program ends with a message and status 1, which run_gpu.py
 * checks. Usage: silent_peer [TIMEOUT] (default 4). */
#include "src/comm/watchdog.h"
#include "tests/gpu/gpu_ops.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  vd_error err = {0};
  vd_ops *o = NULL;
  vd_nccl *n = NULL;
  vd_watchdog *w = NULL;
  vd_nccl_id id;
  const vd_cuda_plugin *table = gpu_table(&err);
  if (table && table->ops(&o, 0, VD_FP32, &err) == VD_OK && table->nccl()->unique_id(&id, &err) == VD_OK &&
      vd_watchdog_start(&w, MPI_COMM_WORLD, argc > 1 ? atof(argv[1]) : 4, NULL, &err) == VD_OK) {
    vd_watchdog_arm(w, "the start of NCCL on 2 ranks");
    table->nccl()->init(&n, o, &id, 0, 2, &err);
    vd_watchdog_disarm(w);
    printf("the watchdog did not end the wait\n");
  }
  vd_error_print(&err);
  MPI_Finalize();
  return 2;
}
