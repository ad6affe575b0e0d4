/* src/comm: the ranks of a run, and what each of them computes on.
 *
 * Here live collectives whose errors and results are the same on all ranks (collectives.h), the choice of the backend
 * and the placement of ranks on GPUs (device.h), the gradient all-reduce over MPI or NCCL (grad_reducer.h), and the
 * watchdog that ends a run whose ranks wait too long for each other (watchdog.h). run_facts.h gathers hosts, devices
 * and sizes for the header on the terminal and for attributes of files.
 * In:  a communicator, the settings of &device, gradients in the backend's memory.
 * Out: a vd_ops for the model, summed gradients, errors that all ranks agree on.
 * The room knows nothing of checkpoints, logs or the training loop. This header is the context that main makes and
 * every command gets: communicator, lock of the HDF5 library, dry run or not. */
#ifndef VD_CONTEXT_H
#define VD_CONTEXT_H

#include "io/h5.h"

#include <mpi.h>
#include <stdbool.h>

typedef struct vd_context {
  MPI_Comm comm; /* all ranks of the run; not MPI_COMM_WORLD itself but a duplicate */
  int rank, size;
  vd_h5 *h5;       /* lock of the HDF5 library, shared with reader threads */
  bool check_only; /* --check: write nothing */
} vd_context;

#endif
